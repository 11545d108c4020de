//! A frame as it is written. Owns: every document once, however many sandboxes share it. Pure.

use std::{collections::HashMap, sync::Arc};

use sandgate_policy::Policy;
use serde::{Deserialize, Serialize};

use super::{Endpoint, FeedFrame, FeedSandbox, PolicyTier, Revision, TierName};
use crate::{
    credential::Binding,
    id::{OrgId, SandboxId},
};

/// [`FeedFrame`]. Tagged from outside, so that a long one is read without a copy of all of it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Frame {
    Snapshot {
        revision: Revision,
        #[serde(default)]
        policies: Vec<Document>,
        sandboxes: Vec<Sandbox>,
    },
    Delta {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<Revision>,
        revision: Revision,
        #[serde(default)]
        policies: Vec<Document>,
        #[serde(default)]
        upserts: Vec<Sandbox>,
        #[serde(default)]
        removed: Vec<SandboxId>,
    },
    Heartbeat {
        revision: Revision,
    },
}

/// A document that tiers mean by its place.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Document(#[serde(with = "shared")] Arc<Policy>);

/// [`FeedSandbox`].
#[derive(Serialize, Deserialize)]
pub(super) struct Sandbox {
    sandbox_id: SandboxId,
    org_id: OrgId,
    endpoint: Endpoint,
    #[serde(default)]
    tiers: Vec<Tier>,
    #[serde(default)]
    bindings: Vec<Binding>,
    #[serde(default)]
    ca_generation: u32,
    #[serde(default)]
    tunnel_ports: Vec<u16>,
}

/// [`PolicyTier`].
#[derive(Serialize, Deserialize)]
struct Tier {
    tier: TierName,
    /// Index into the frame's documents.
    policy: usize,
}

/// A tier means a document that the frame does not have.
#[derive(Debug, thiserror::Error)]
#[error("a tier of {sandbox} means policy {index}, and the frame has {count}")]
pub(super) struct NoDocument {
    sandbox: SandboxId,
    index: usize,
    count: usize,
}

impl From<FeedFrame> for Frame {
    fn from(frame: FeedFrame) -> Self {
        let mut documents = Documents::default();
        match frame {
            FeedFrame::Snapshot { revision, sandboxes } => {
                let sandboxes = documents.write(sandboxes);
                Self::Snapshot {
                    revision,
                    policies: documents.list,
                    sandboxes,
                }
            }
            FeedFrame::Delta {
                since,
                revision,
                upserts,
                removed,
            } => {
                let upserts = documents.write(upserts);
                Self::Delta {
                    since,
                    revision,
                    policies: documents.list,
                    upserts,
                    removed,
                }
            }
            FeedFrame::Heartbeat { revision } => Self::Heartbeat { revision },
        }
    }
}

impl TryFrom<Frame> for FeedFrame {
    type Error = NoDocument;

    fn try_from(frame: Frame) -> Result<Self, NoDocument> {
        Ok(match frame {
            Frame::Snapshot {
                revision,
                policies,
                sandboxes,
            } => Self::Snapshot {
                revision,
                sandboxes: read(sandboxes, &policies)?,
            },
            Frame::Delta {
                since,
                revision,
                policies,
                upserts,
                removed,
            } => Self::Delta {
                since,
                revision,
                upserts: read(upserts, &policies)?,
                removed,
            },
            Frame::Heartbeat { revision } => Self::Heartbeat { revision },
        })
    }
}

#[derive(Default)]
struct Documents {
    list: Vec<Document>,
    /// Places by where the document lies in memory, where it stays: the list holds it.
    places: HashMap<*const Policy, usize>,
}

impl Documents {
    fn write(&mut self, sandboxes: Vec<FeedSandbox>) -> Vec<Sandbox> {
        sandboxes
            .into_iter()
            .map(|sandbox| Sandbox {
                sandbox_id: sandbox.sandbox_id,
                org_id: sandbox.org_id,
                endpoint: sandbox.endpoint,
                tiers: sandbox.tiers.into_iter().map(|tier| self.tier(tier)).collect(),
                bindings: sandbox.bindings,
                ca_generation: sandbox.ca_generation,
                tunnel_ports: sandbox.tunnel_ports,
            })
            .collect()
    }

    fn tier(&mut self, tier: PolicyTier) -> Tier {
        let PolicyTier { tier, policy } = tier;
        let place = *self.places.entry(Arc::as_ptr(&policy)).or_insert_with(|| {
            self.list.push(Document(policy));
            self.list.len() - 1
        });
        Tier { tier, policy: place }
    }
}

fn read(sandboxes: Vec<Sandbox>, policies: &[Document]) -> Result<Vec<FeedSandbox>, NoDocument> {
    let sandbox = |written: Sandbox| {
        let tiers = written.tiers.iter().map(|tier| {
            let document = policies.get(tier.policy).ok_or_else(|| NoDocument {
                sandbox: written.sandbox_id.clone(),
                index: tier.policy,
                count: policies.len(),
            })?;
            Ok(PolicyTier {
                tier: tier.tier,
                policy: Arc::clone(&document.0),
            })
        });
        Ok(FeedSandbox {
            tiers: tiers.collect::<Result<_, _>>()?,
            sandbox_id: written.sandbox_id,
            org_id: written.org_id,
            endpoint: written.endpoint,
            bindings: written.bindings,
            ca_generation: written.ca_generation,
            tunnel_ports: written.tunnel_ports,
        })
    };
    sandboxes.into_iter().map(sandbox).collect()
}

mod shared {
    use std::sync::Arc;

    use sandgate_policy::Policy;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(policy: &Arc<Policy>, serializer: S) -> Result<S::Ok, S::Error> {
        policy.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Policy>, D::Error> {
        Policy::deserialize(deserializer).map(Arc::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(number: u8, policies: &[(TierName, &Arc<Policy>)]) -> FeedSandbox {
        let endpoint = serde_json::json!({ "ifindex": number, "interface": format!("sg{number}"),
            "address": format!("10.213.0.{number}"), "mac": [2, 0, 0, 0, 0, number], "agent_port": 1024 });
        FeedSandbox {
            sandbox_id: format!("sandbox-{number}").parse().expect("an id"),
            org_id: "org-1".parse().expect("an id"),
            endpoint: serde_json::from_value(endpoint).expect("an endpoint"),
            tiers: policies
                .iter()
                .map(|(tier, policy)| PolicyTier {
                    tier: *tier,
                    policy: Arc::clone(policy),
                })
                .collect(),
            bindings: Vec::new(),
            ca_generation: 1,
            tunnel_ports: vec![8000],
        }
    }

    #[test]
    fn a_document_that_many_share_is_written_once_and_shared_again_when_read() {
        let policy = |mode: &str| Policy::parse(&serde_json::json!({ "mode": mode })).map(Arc::new);
        let (common, own) = (
            policy("allow_all").expect("a policy"),
            policy("deny_all").expect("a policy"),
        );
        let organization = (TierName::Organization, &common);
        let upserts = vec![
            sandbox(1, &[organization]),
            sandbox(2, &[organization, (TierName::Sandbox, &own)]),
            sandbox(3, &[]),
        ];
        let removed = vec!["sandbox-9".parse().expect("an id")];
        for frame in [
            FeedFrame::Delta {
                since: Some(3),
                revision: 4,
                upserts: upserts.clone(),
                removed,
            },
            FeedFrame::Snapshot {
                revision: 5,
                sandboxes: upserts,
            },
            FeedFrame::Heartbeat { revision: 6 },
        ] {
            let text = serde_json::to_string(&frame).expect("written");
            assert!(text.matches("allow_all").count() <= 1, "{text}");
            let back: FeedFrame = serde_json::from_str(&text).expect("read");
            assert_eq!(back, frame);
            if let FeedFrame::Delta { upserts, .. } = back {
                assert!(Arc::ptr_eq(
                    &upserts[0].tiers[0].policy,
                    &upserts[1].tiers[0].policy
                ));
            }
        }
    }

    #[test]
    fn a_tier_without_its_document_is_refused() {
        let text = r#"{"snapshot":{"revision":1,"sandboxes":[{"sandbox_id":"sandbox-1","org_id":"org-1","endpoint":{"ifindex":1,
            "interface":"sg1","address":"10.213.0.1","mac":[2,0,0,0,0,1],"agent_port":1},
            "tiers":[{"tier":"sandbox","policy":0}]}]}}"#;
        let refused = serde_json::from_str::<FeedFrame>(text).expect_err("refused");
        assert!(refused.to_string().contains("means policy 0"), "{refused}");
    }
}
