//! The controller's numbers. Owns: their names, labels and buckets. Counting is done where things happen.
//!
//! Labels are closed sets: routes as they are registered, methods, outcomes. Never an organisation, a sandbox, a
//! key or anything else that a caller chooses.

mod present;
mod watch;

use http::{Method, StatusCode};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use sandgate_api::rest::StartupBreakdown;
use sandgate_daemon::metrics::{SECONDS, UNIT_SECONDS, prometheus_client};

pub use present::Present;
pub use watch::{CommandEnd, Creating, Requested, Watched};

/// The variable that says where they are shown.
pub const ADDRESS_VARIABLE: &str = "SANDGATE_METRICS_ADDR";

/// Upper bounds of phases of a start, in seconds: a claimed sandbox takes milliseconds, a made one tenths.
const START_SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 15.0,
];

/// Everything that is counted as it happens. Clones share the numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    creations: Family<CreationLabels, Counter>,
    start_seconds: Family<PhaseLabels, Histogram, fn() -> Histogram>,
    commands: Family<CommandLabels, Counter>,
    command_seconds: Histogram,
    policy_changes: Family<AppliedLabels, Counter>,
    policy_seconds: Histogram,
    /// By status; brought up to date at each scrape.
    pub(crate) sandboxes: Family<StatusLabels, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            creations: Family::default(),
            start_seconds: Family::new_with_constructor(|| Histogram::new(START_SECONDS)),
            commands: Family::default(),
            command_seconds: Histogram::new(SECONDS),
            policy_changes: Family::default(),
            policy_seconds: Histogram::new(SECONDS),
            sandboxes: Family::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: String,
    method: Verb,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    method: Verb,
    status: StatusClass,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CreationLabels {
    outcome: Creation,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CommandLabels {
    outcome: CommandEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AppliedLabels {
    outcome: Applied,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StatusLabels {
    pub(crate) status: &'static str,
}

/// A closed set of words, as label values.
macro_rules! words {
    ($(#[$doc:meta])* $visibility:vis $name:ident { $($(#[$of:meta])* $word:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        $visibility enum $name {
            $($(#[$of])* $word,)+
        }

        impl $name {
            pub(super) const ALL: &'static [Self] = &[$(Self::$word,)+];

            const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                EncodeLabelValue::encode(&self.as_str(), encoder)
            }
        }
    };
}
use words;

words! {
    /// The methods that have routes, and one word for all others.
    Verb {
        Get = "GET",
        Post = "POST",
        Put = "PUT",
        Patch = "PATCH",
        Delete = "DELETE",
        Head = "HEAD",
        Options = "OPTIONS",
        Other = "other",
    }
}

impl Verb {
    fn of(method: &Method) -> Self {
        Self::ALL
            .iter()
            .copied()
            .find(|verb| verb.as_str() == method.as_str())
            .unwrap_or(Self::Other)
    }
}

words! {
    /// The first digit of a status, or that there was none.
    StatusClass {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
        /// The client went away first.
        Aborted = "aborted",
    }
}

impl StatusClass {
    fn of(status: StatusCode) -> Self {
        let digit = status.as_str().as_bytes().first();
        Self::ALL
            .iter()
            .copied()
            .find(|class| class.as_str().as_bytes().first() == digit)
            .unwrap_or(Self::ServerError)
    }
}

words! {
    /// How a creation ended.
    pub(crate) Creation {
        /// The sandbox runs.
        Created = "created",
        /// The request was wrong.
        Invalid = "invalid",
        /// The organisation has as many as it may.
        Quota = "quota",
        /// It does not fit beside the others.
        NoCapacity = "no_capacity",
        /// The node cannot enforce its policy.
        NotEnforceable = "not_enforceable",
        /// The node did not acknowledge in time.
        NodeSilent = "node_silent",
        /// Sandboxes cannot be made at the moment.
        Unavailable = "unavailable",
        /// It was stopped while it was being made.
        Stopped = "stopped",
        /// The client went away.
        Abandoned = "abandoned",
        /// Our fault.
        Failed = "failed",
    }
}

words! {
    /// The parts of a start.
    Phase {
        Prepare = "prepare",
        Enforce = "enforce",
        Launch = "launch",
        Agent = "agent",
        Total = "total",
    }
}

words! {
    /// Whether a changed policy is in force.
    pub(crate) Applied {
        /// The node says so.
        InForce = "applied",
        /// It governs no sandbox that runs.
        Unused = "unused",
        /// The node cannot enforce it.
        Refused = "refused",
        /// The node has not said so in time.
        Pending = "pending",
    }
}

impl Metrics {
    /// Shows them in a registry.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("sandgate_controller");
        registry.register(
            "http_requests",
            "API requests that were answered, by route, method and class of status",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "http_request_duration",
            "From a request's head to its answer's head",
            UNIT_SECONDS,
            self.request_seconds.clone(),
        );
        registry.register(
            "sandboxes",
            "Sandboxes that were not deleted, by status",
            self.sandboxes.clone(),
        );
        registry.register(
            "sandbox_creations",
            "Attempts to create a sandbox, by outcome",
            self.creations.clone(),
        );
        registry.register_with_unit(
            "sandbox_start_duration",
            "Phases of successful creations",
            UNIT_SECONDS,
            self.start_seconds.clone(),
        );
        registry.register(
            "commands",
            "Commands run in sandboxes, by outcome",
            self.commands.clone(),
        );
        registry.register_with_unit(
            "command_duration",
            "How long commands ran, as the controller sees it",
            UNIT_SECONDS,
            self.command_seconds.clone(),
        );
        registry.register(
            "policy_changes",
            "Stored changes of egress policies, by whether they are in force",
            self.policy_changes.clone(),
        );
        registry.register_with_unit(
            "policy_apply_duration",
            "From a stored change of an egress policy to the node's acknowledgement",
            UNIT_SECONDS,
            self.policy_seconds.clone(),
        );
        // Shown from the start, so that a first event is an increase and not a new series.
        for outcome in Creation::ALL {
            drop(
                self.creations
                    .get_or_create(&CreationLabels { outcome: *outcome }),
            );
        }
        for phase in Phase::ALL {
            drop(self.start_seconds.get_or_create(&PhaseLabels { phase: *phase }));
        }
        for outcome in CommandEnd::ALL {
            drop(self.commands.get_or_create(&CommandLabels { outcome: *outcome }));
        }
        for outcome in Applied::ALL {
            drop(
                self.policy_changes
                    .get_or_create(&AppliedLabels { outcome: *outcome }),
            );
        }
    }

    fn request(&self, route: String, method: Verb, status: StatusClass, seconds: f64) {
        let labels = RouteLabels { route, method };
        self.request_seconds.get_or_create(&labels).observe(seconds);
        let RouteLabels { route, method } = labels;
        let labels = RequestLabels {
            route,
            method,
            status,
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// A creation ended.
    pub(crate) fn creation(&self, outcome: Creation) {
        self.creations.get_or_create(&CreationLabels { outcome }).inc();
    }

    /// How long the parts of a successful one took.
    pub(crate) fn started(&self, breakdown: &StartupBreakdown, total_ms: u64) {
        for (phase, millis) in [
            (Phase::Prepare, breakdown.prepare_ms),
            (Phase::Enforce, breakdown.enforce_ms),
            (Phase::Launch, breakdown.launch_ms),
            (Phase::Agent, breakdown.agent_ms),
            (Phase::Total, total_ms),
        ] {
            let seconds = std::time::Duration::from_millis(millis).as_secs_f64();
            self.start_seconds
                .get_or_create(&PhaseLabels { phase })
                .observe(seconds);
        }
    }

    fn command(&self, outcome: CommandEnd, seconds: f64) {
        self.commands.get_or_create(&CommandLabels { outcome }).inc();
        self.command_seconds.observe(seconds);
    }

    /// A stored change of a policy was waited for.
    pub(crate) fn policy_change(&self, outcome: Applied, took: std::time::Duration) {
        self.policy_changes
            .get_or_create(&AppliedLabels { outcome })
            .inc();
        if outcome == Applied::InForce {
            self.policy_seconds.observe(took.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests;
