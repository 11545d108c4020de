//! One access record per request, or per connection that carries bytes, when it ends (`target: access`). Owns: what is
//! in it: never a query, a token, a header or a byte of a body.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    time::Instant,
};

use sandgate_api::id::{SandboxId, TunnelId};
use sandgate_relay::copy::Traffic;

use crate::{
    answer::Problem,
    metrics::{Metrics, Open},
    tunnel::{Place, Tunnel},
};

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spoken {
    /// HTTP/1.x.
    Http1,
    /// HTTP/2.
    Http2,
    /// Bytes.
    Tcp,
}

impl Spoken {
    /// The word in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http/1",
            Self::Http2 => "http/2",
            Self::Tcp => "tcp",
        }
    }
}

/// How a request or a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The program behind the tunnel answered to the end.
    Served,
    /// It went on as another protocol.
    Upgraded,
    /// Refused: by its form, its token, a limit, or because there is no tunnel.
    Refused,
    /// The sandbox could not be reached, or broke off.
    Failed,
    /// The client went away.
    Abandoned,
    /// The tunnel ended.
    Cut,
}

impl Outcome {
    /// The word in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Upgraded => "upgraded",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
            Self::Cut => "cut",
        }
    }
}

/// The account of one request or connection. Written when it is dropped.
pub struct Account {
    /// In every answer.
    pub request_id: String,
    /// Bytes of bodies, or of all that was said after a change of protocol.
    pub traffic: Traffic,
    spoken: Spoken,
    method: String,
    began: Instant,
    status: AtomicU16,
    ended: AtomicBool,
    details: Mutex<Details>,
    metrics: Arc<Metrics>,
    _open: Open,
}

#[derive(Default)]
struct Details {
    tunnel: Option<(TunnelId, SandboxId)>,
    outcome: Option<Outcome>,
    /// Given back with the account: what is in the books is under way.
    place: Option<Place>,
    /// Whoever counts what is under way on the connection.
    guard: Option<Box<dyn Send>>,
}

impl Account {
    /// Begins one.
    pub fn open(metrics: &Arc<Metrics>, request_id: String, spoken: Spoken, method: &str) -> Self {
        Self {
            request_id,
            traffic: Traffic::default(),
            spoken,
            method: method.chars().take(32).collect(),
            began: Instant::now(),
            status: AtomicU16::new(0),
            ended: AtomicBool::new(false),
            details: Mutex::default(),
            metrics: Arc::clone(metrics),
            _open: metrics.request(),
        }
    }

    /// Drops something only when the account is written.
    pub fn hold(&self, guard: impl Send + 'static) {
        self.details().guard = Some(Box::new(guard));
    }

    /// Which tunnel it is about.
    pub fn concerns(&self, tunnel: &Tunnel) {
        self.details().tunnel = Some((tunnel.id.clone(), tunnel.sandbox_id.clone()));
    }

    /// Its place among what is under way.
    pub fn takes(&self, place: Place) {
        self.details().place = Some(place);
    }

    /// The status that was answered.
    pub fn answered(&self, status: http::StatusCode) {
        self.status.store(status.as_u16(), Ordering::Relaxed);
    }

    /// How it ended. The first word stands.
    pub fn ends(&self, outcome: Outcome) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            self.details().outcome = Some(outcome);
        }
    }

    /// It was answered by us.
    pub fn refused(&self, problem: &Problem) {
        self.answered(problem.status());
        self.ends(match problem {
            Problem::Closed | Problem::Expired => Outcome::Cut,
            Problem::SandboxGone
            | Problem::NotListening(_)
            | Problem::Silent(_)
            | Problem::Broken(_)
            | Problem::NodeAway => Outcome::Failed,
            Problem::Malformed(_)
            | Problem::Connect
            | Problem::Unknown
            | Problem::TokenMissing
            | Problem::ProxyTokenMissing
            | Problem::TokenWrong
            | Problem::TunnelFull
            | Problem::ProxyFull => Outcome::Refused,
        });
    }

    fn details(&self) -> std::sync::MutexGuard<'_, Details> {
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Account")
            .field("request_id", &self.request_id)
            .finish_non_exhaustive()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let details = std::mem::take(&mut *self.details());
        let outcome = details.outcome.unwrap_or(Outcome::Abandoned);
        let took_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let status = Some(self.status.load(Ordering::Relaxed)).filter(|status| *status != 0);
        let (up, down) = (self.traffic.up(), self.traffic.down());
        self.metrics.ended(self.spoken, outcome, status, (up, down));
        tracing::info!(
            target: "access",
            request_id = self.request_id,
            tunnel_id = details.tunnel.as_ref().map(|(id, _)| id.as_str()),
            sandbox_id = details.tunnel.as_ref().map(|(_, id)| id.as_str()),
            protocol = self.spoken.as_str(),
            method = self.method,
            status,
            outcome = outcome.as_str(),
            took_ms,
            bytes_in = up,
            bytes_out = down,
        );
    }
}
