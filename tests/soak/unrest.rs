//! What disturbs: programs that are killed, frozen for moments and replaced by new files, one after the other at moments
//! that nobody can foresee.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use harness::node::{Node, Process};
use nix::sys::signal::Signal;

use crate::random::Random;

/// Between two disturbances at least, and as long again by chance: in a short run, and in a long one. The supervisor
/// waits longer from kill to kill, up to 5 s, for a program that does not run for 30 s, so that hardly anything would
/// ever be made.
const PAUSES_MS: [u64; 2] = [2_500, 10_000];
/// What makes a run long.
const LONG: usize = 200;
/// How long a program stands still at most.
const FROZEN_MS: u64 = 3_000;

/// The disturbances.
pub(crate) struct Unrest<'a> {
    node: &'a Node,
    random: Mutex<Random>,
    done: Mutex<BTreeMap<&'static str, usize>>,
    is_over: AtomicBool,
    pause_ms: u64,
}

/// Ends the unrest when dropped, also by a panic.
pub(crate) struct Calm<'a>(&'a AtomicBool);

impl Drop for Calm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Unrest<'a> {
    pub(crate) fn new(node: &'a Node, seed: u64, cycles: usize) -> Self {
        Self {
            node,
            random: Mutex::new(Random::new(seed, 77)),
            done: Mutex::default(),
            is_over: AtomicBool::new(false),
            pause_ms: PAUSES_MS[usize::from(cycles > LONG)],
        }
    }

    pub(crate) fn until_dropped(&self) -> Calm<'_> {
        Calm(&self.is_over)
    }

    pub(crate) fn done(&self) -> BTreeMap<&'static str, usize> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Until it is over.
    pub(crate) fn go_on(&self) {
        let below = |end| {
            let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
            random.below(end)
        };
        loop {
            self.pause(Duration::from_millis(self.pause_ms + below(self.pause_ms)));
            if self.is_over.load(Ordering::Relaxed) {
                return;
            }
            let frozen = Duration::from_millis(below(FROZEN_MS));
            let what = match below(8) {
                0 | 1 => self.signal("netd killed", Node::netd, Signal::SIGKILL),
                2 => self.freeze("netd frozen", Node::netd, frozen),
                3 => self.upgrade("netd replaced by a new file", "netd", Node::netd),
                4 => self.signal("controller killed", Node::controller, Signal::SIGKILL),
                5 => self.freeze("controller frozen", Node::controller, frozen),
                6 => self.signal("tunnel-proxy killed", Node::tunnel_proxy, Signal::SIGKILL),
                _ => self
                    .signal("netd and controller killed", Node::controller, Signal::SIGKILL)
                    .inspect(|what| {
                        self.signal(what, Node::netd, Signal::SIGKILL);
                    }),
            };
            if let Some(what) = what {
                let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
                *done.entry(what).or_default() += 1;
            }
        }
    }

    /// `None` when the program was not there to be disturbed.
    fn signal(
        &self,
        what: &'static str,
        find: fn(&Node) -> Option<Process>,
        signal: Signal,
    ) -> Option<&'static str> {
        let process = find(self.node)?;
        self.node.signal(&process, signal).ok()?;
        Some(what)
    }

    fn freeze(
        &self,
        what: &'static str,
        find: fn(&Node) -> Option<Process>,
        how_long: Duration,
    ) -> Option<&'static str> {
        let process = find(self.node)?;
        self.node.signal(&process, Signal::SIGSTOP).ok()?;
        thread::sleep(how_long);
        self.node.signal(&process, Signal::SIGCONT).ok()?;
        Some(what)
    }

    fn upgrade(
        &self,
        what: &'static str,
        program: &str,
        find: fn(&Node) -> Option<Process>,
    ) -> Option<&'static str> {
        self.node.upgrade(program).ok()?;
        self.signal(what, find, Signal::SIGTERM)
    }

    fn pause(&self, how_long: Duration) {
        let began = Instant::now();
        while began.elapsed() < how_long && !self.is_over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    }
}
