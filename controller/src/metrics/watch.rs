//! Guards that count what they watch when they are dropped, so that what a client abandons is counted too.

use std::time::Instant;

use http::{Method, StatusCode};
use sandgate_daemon::metrics::prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};
use tracing::Span;

use super::{Creation, Metrics, StatusClass, Verb, words};

words! {
    /// How a command ended.
    pub CommandEnd {
        /// With exit status 0.
        Success = "success",
        /// With another exit status, or by a signal.
        Failure = "failure",
        /// Its time was up.
        TimedOut = "timed_out",
        /// Nobody waited for it any more.
        Abandoned = "abandoned",
        /// The sandbox or its agent went away.
        Lost = "lost",
    }
}

/// One request to the API.
pub struct Requested {
    metrics: Metrics,
    route: Option<String>,
    method: Verb,
    status: StatusClass,
    began: Instant,
}

impl Requested {
    /// Begins to watch. Without a route it is one that nothing answers.
    pub(crate) fn new(metrics: Metrics, route: Option<&str>, method: &Method) -> Self {
        Self {
            metrics,
            route: Some(route.unwrap_or("none").to_owned()),
            method: Verb::of(method),
            status: StatusClass::Aborted,
            began: Instant::now(),
        }
    }

    /// The answer's head is there.
    pub(crate) fn answered(mut self, status: StatusCode) {
        self.status = StatusClass::of(status);
    }
}

impl Drop for Requested {
    fn drop(&mut self) {
        let seconds = self.began.elapsed().as_secs_f64();
        let route = self.route.take().unwrap_or_default();
        self.metrics.request(route, self.method, self.status, seconds);
    }
}

/// One command.
pub struct Watched {
    metrics: Metrics,
    end: CommandEnd,
    began: Instant,
    span: Span,
}

impl Watched {
    /// Begins to watch a command that was started; what is logged about it belongs to the present span.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            end: CommandEnd::Abandoned,
            began: Instant::now(),
            span: Span::current(),
        }
    }

    /// It ended so.
    pub(crate) fn ended(&mut self, end: CommandEnd) {
        self.end = end;
    }

    /// Nothing more will be heard of it.
    pub(crate) fn lost(&mut self) {
        if self.end == CommandEnd::Abandoned {
            self.end = CommandEnd::Lost;
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        self.metrics.command(self.end, took.as_secs_f64());
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        // A stream outlives the call of its request.
        self.span
            .in_scope(|| tracing::info!(outcome = self.end.as_str(), took_ms, "a command ended"));
    }
}

/// One creation.
pub struct Creating {
    metrics: Metrics,
    outcome: Creation,
}

impl Creating {
    /// Begins to watch.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            outcome: Creation::Abandoned,
        }
    }

    /// It ended so.
    pub(crate) fn ended(mut self, outcome: Creation) {
        self.outcome = outcome;
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.metrics.creation(self.outcome);
    }
}
