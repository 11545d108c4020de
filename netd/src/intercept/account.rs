//! The account of one exchange: what was asked, what came of it, how many bytes moved. Owns: that each exchange
//! is recorded once, when its last byte has passed or it was refused. Never holds a query, a body or a value.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::World;
use crate::sandbox::{AdmittedRequest, Decision};

/// Longest path in a record, in bytes.
const PATH_MAX: usize = 1024;

/// What is recorded of an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// When it began.
    pub began: Timestamp,
    /// How long it lasted.
    pub lasted: Duration,
    /// The request's method.
    pub method: String,
    /// Its canonical path.
    pub path: Option<String>,
    /// The secret that was used.
    pub credential: Option<String>,
    /// Bytes of the request's body.
    pub up: u64,
    /// Bytes of the answer's body.
    pub down: u64,
    /// What people should know besides.
    pub detail: Option<String>,
    /// A value came back and was masked.
    pub is_echoed: bool,
}

/// An exchange that is going on.
pub(crate) struct Account {
    world: Arc<dyn World>,
    began: Timestamp,
    clock: Instant,
    method: String,
    up: AtomicU64,
    down: AtomicU64,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    path: Option<String>,
    credential: Option<String>,
    notes: Vec<String>,
    is_echoed: bool,
    decision: Option<Decision>,
    /// The request in the books: it leaves them with its record.
    books: Option<AdmittedRequest>,
    is_recorded: bool,
}

impl Account {
    pub(crate) fn open(world: Arc<dyn World>, method: &str) -> Arc<Self> {
        Arc::new(Self {
            world,
            began: Timestamp::now(),
            clock: Instant::now(),
            method: method.to_owned(),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            open: Mutex::default(),
        })
    }

    pub(crate) fn path(&self, path: &str) {
        let mut end = path.len().min(PATH_MAX);
        while !path.is_char_boundary(end) {
            end -= 1;
        }
        self.lock().path = Some(path[..end].to_owned());
    }

    pub(crate) fn admitted(&self, decision: Decision, books: Option<AdmittedRequest>) {
        let mut open = self.lock();
        open.decision = Some(decision);
        open.books = books;
    }

    /// It goes no further.
    pub(crate) fn cut(&self, decision: Decision, why: String) {
        self.note(why);
        self.lock().decision = Some(decision);
    }

    pub(crate) fn credential(&self, names: &[&str]) {
        self.lock().credential = (!names.is_empty()).then(|| names.join(","));
    }

    pub(crate) fn note(&self, note: String) {
        let mut open = self.lock();
        if open.notes.len() < 8 && !open.notes.contains(&note) {
            open.notes.push(note);
        }
    }

    /// The value of a secret came back and was masked.
    pub(crate) fn echoed(&self, name: &str) {
        self.note(format!("the value of {name} was masked in the answer"));
        self.lock().is_echoed = true;
    }

    pub(crate) fn add_up(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records the exchange as it stands; nothing is recorded later.
    pub(crate) fn settle(&self, decision: &Decision) -> Option<String> {
        let mut open = self.lock();
        if std::mem::replace(&mut open.is_recorded, true) {
            return None;
        }
        let exchange = Exchange {
            began: self.began,
            lasted: self.clock.elapsed(),
            method: self.method.clone(),
            path: open.path.clone(),
            credential: open.credential.clone(),
            up: self.up.load(Ordering::Relaxed),
            down: self.down.load(Ordering::Relaxed),
            detail: (!open.notes.is_empty()).then(|| open.notes.join("; ")),
            is_echoed: open.is_echoed,
        };
        drop(open);
        self.world.record(decision, exchange)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let decision = self.lock().decision.take();
        if let Some(decision) = decision {
            self.settle(&decision);
        }
    }
}
