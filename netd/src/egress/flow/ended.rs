//! How flows end, and what is recorded of them then.

use sandgate_policy::Reason;

use crate::sandbox::{Decision, OverQuota};

/// How a flow ended.
pub(in crate::egress) enum Ended {
    /// By itself.
    Well,
    /// By something that is no verdict.
    Stopped(&'static str),
    /// The client broke off, in this way.
    Client(String),
    /// By new rules.
    Cut(Decision),
    /// It could not go on.
    Failed(Reason, String),
    /// More would have gone to its host than may.
    Over(OverQuota),
}

impl Ended {
    /// What is recorded of a flow that `admitted` let in, and what people should know.
    pub(in crate::egress) fn settle(self, admitted: Decision) -> (Decision, Option<String>) {
        match self {
            Self::Well => (admitted, None),
            Self::Stopped(why) => (admitted, Some(why.to_owned())),
            Self::Client(how) => (admitted, Some(how)),
            Self::Cut(decision) => {
                let detail = format!("new rules: {}", decision.reason.as_str());
                let cut = Decision {
                    enforced: true,
                    ..decision.because(Reason::PolicyTightened)
                };
                (cut, Some(detail))
            }
            Self::Over(over) => (over.decision, Some(over.detail)),
            Self::Failed(reason, detail) => {
                let decision = Decision {
                    tier: None,
                    ..Decision::of(reason)
                };
                (decision, Some(detail))
            }
        }
    }
}
