//! What must change on this node: the difference between what the controller wants and what is enforced.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use sandgate_api::{
    feed::{FeedFrame, FeedSandbox, Revision},
    id::SandboxId,
};

/// What the controller wants of this node, as of a revision.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Desired {
    /// The revision, when any frame was applied.
    pub revision: Option<Revision>,
    /// The sandboxes.
    pub sandboxes: BTreeMap<SandboxId, FeedSandbox>,
}

/// One step toward it.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The sandbox is gone, or its endpoint is another: forget all about it.
    Remove(SandboxId),
    /// The sandbox is new: attach it and enforce its rules.
    Attach(FeedSandbox),
    /// Its rules are new, and perhaps the ports that tunnels lead to.
    Rules(FeedSandbox),
    /// Only the ports that tunnels lead to are others.
    Ports(FeedSandbox),
    /// It cannot be enforced beside another; this says why.
    Refuse(SandboxId, String),
}

impl Desired {
    /// The state after a frame.
    #[must_use]
    pub fn after(mut self, frame: FeedFrame) -> Self {
        match frame {
            FeedFrame::Snapshot { revision, sandboxes } => Self {
                revision: Some(revision),
                sandboxes: by_id(sandboxes),
            },
            FeedFrame::Delta {
                since: _,
                revision,
                upserts,
                removed,
            } => {
                for id in &removed {
                    self.sandboxes.remove(id);
                }
                self.sandboxes.extend(by_id(upserts));
                self.revision = Some(revision);
                self
            }
            FeedFrame::Heartbeat { .. } => self,
        }
    }

    /// The frame that leads here from nothing; none when no frame ever came.
    pub fn snapshot(&self) -> Option<FeedFrame> {
        let sandboxes = self.sandboxes.values().cloned().collect();
        self.revision
            .map(|revision| FeedFrame::Snapshot { revision, sandboxes })
    }
}

/// The steps from `actual`, which lists only what is enforced exactly as listed, to `desired`. Removals come
/// first, so that an address or interface is free before somebody else gets it.
pub fn changes(
    actual: &BTreeMap<SandboxId, FeedSandbox>,
    desired: &BTreeMap<SandboxId, FeedSandbox>,
) -> Vec<Change> {
    let mut removals = Vec::new();
    let mut rest = Vec::new();
    for (id, enforced) in actual {
        if desired
            .get(id)
            .is_none_or(|wanted| wanted.endpoint != enforced.endpoint)
        {
            removals.push(Change::Remove(id.clone()));
        }
    }
    let mut addresses = BTreeSet::new();
    let mut interfaces = BTreeSet::new();
    for (id, wanted) in desired {
        let endpoint = &wanted.endpoint;
        let enforced = actual.get(id).filter(|enforced| enforced.endpoint == *endpoint);
        if !addresses.insert(endpoint.address) || !interfaces.insert(endpoint.ifindex) {
            if enforced.is_some() {
                removals.push(Change::Remove(id.clone()));
            }
            let why = format!(
                "its address {} or interface belongs to another sandbox",
                endpoint.address
            );
            rest.push(Change::Refuse(id.clone(), why));
            continue;
        }
        match enforced {
            None => rest.push(Change::Attach(wanted.clone())),
            Some(enforced) if !same_rules(enforced, wanted) => rest.push(Change::Rules(wanted.clone())),
            Some(enforced) if !same_ports(enforced, wanted) => rest.push(Change::Ports(wanted.clone())),
            Some(_) => {}
        }
    }
    removals.extend(rest);
    removals
}

fn same_rules(one: &FeedSandbox, other: &FeedSandbox) -> bool {
    // A sandbox made in advance belongs to nobody until somebody takes it.
    one.org_id == other.org_id
        && one.tiers == other.tiers
        && one.bindings == other.bindings
        && one.ca_generation == other.ca_generation
}

/// Whether tunnels lead to the same ports. Their order, and how many tunnels lead to one, mean nothing.
pub fn same_ports(one: &FeedSandbox, other: &FeedSandbox) -> bool {
    let set = |sandbox: &FeedSandbox| sandbox.tunnel_ports.iter().copied().collect::<BTreeSet<_>>();
    set(one) == set(other)
}

fn by_id(sandboxes: impl IntoIterator<Item = FeedSandbox>) -> BTreeMap<SandboxId, FeedSandbox> {
    sandboxes
        .into_iter()
        .map(|sandbox| (sandbox.sandbox_id.clone(), sandbox))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;
    use sandgate_api::feed::{Endpoint, PolicyTier, TierName};
    use sandgate_policy::Policy;

    use super::*;

    fn sandbox(id: u8, place: u8, ports: &[u16]) -> FeedSandbox {
        let policy = Policy::parse(&serde_json::json!({ "mode": "allow_all", "allowed_ports": ports }))
            .expect("a policy");
        FeedSandbox {
            sandbox_id: format!("sandbox-{id}").parse().expect("an id"),
            org_id: "org-1".parse().expect("an id"),
            endpoint: Endpoint {
                ifindex: u32::from(place) + 1,
                interface: format!("sg{place}"),
                address: Ipv4Addr::new(10, 213, 0, place),
                address6: None,
                mac: [2, 0, 0, 0, 0, place],
                agent_port: 1024,
            },
            tiers: vec![PolicyTier {
                tier: TierName::Sandbox,
                policy: policy.into(),
            }],
            bindings: Vec::new(),
            ca_generation: 0,
            tunnel_ports: Vec::new(),
        }
    }

    fn all(sandboxes: &[FeedSandbox]) -> BTreeMap<SandboxId, FeedSandbox> {
        by_id(sandboxes.iter().cloned())
    }

    /// What is enforced after the steps, as [`crate::feed`] keeps it.
    fn apply(
        actual: &BTreeMap<SandboxId, FeedSandbox>,
        steps: &[Change],
    ) -> BTreeMap<SandboxId, FeedSandbox> {
        let mut actual = actual.clone();
        for step in steps {
            match step {
                Change::Remove(id) => {
                    assert!(actual.remove(id).is_some(), "{id} was not there");
                }
                Change::Attach(wanted) => {
                    let place = &wanted.endpoint;
                    for other in actual.values() {
                        assert_ne!(other.endpoint.address, place.address, "an address is used twice");
                        assert_ne!(
                            other.endpoint.ifindex, place.ifindex,
                            "an interface is used twice"
                        );
                    }
                    assert!(actual.insert(wanted.sandbox_id.clone(), wanted.clone()).is_none());
                }
                Change::Rules(wanted) | Change::Ports(wanted) => {
                    let before = actual.insert(wanted.sandbox_id.clone(), wanted.clone());
                    assert_eq!(
                        before.map(|before| before.endpoint),
                        Some(wanted.endpoint.clone())
                    );
                }
                Change::Refuse(id, _) => assert!(!actual.contains_key(id)),
            }
        }
        actual
    }

    #[test]
    fn each_difference_is_one_step() {
        let (a, b, c) = (
            sandbox(1, 1, &[443]),
            sandbox(2, 2, &[443]),
            sandbox(3, 3, &[443]),
        );
        let (b_new, c_moved) = (sandbox(2, 2, &[80]), sandbox(3, 4, &[443]));
        let d = sandbox(4, 1, &[443]);
        let steps = changes(
            &all(&[a.clone(), b, c.clone()]),
            &all(&[b_new.clone(), c_moved.clone(), d.clone()]),
        );
        assert_eq!(
            steps,
            [
                Change::Remove(a.sandbox_id),
                Change::Remove(c.sandbox_id),
                Change::Rules(b_new),
                Change::Attach(c_moved),
                Change::Attach(d),
            ]
        );
        assert!(changes(&all(&[sandbox(1, 1, &[1])]), &all(&[sandbox(1, 1, &[1])])).is_empty());
    }

    #[test]
    fn a_rotated_secret_an_authority_or_an_owner_is_a_change_of_rules() {
        let before = all(&[sandbox(1, 1, &[443])]);
        let mut rotated = sandbox(1, 1, &[443]);
        rotated.bindings = serde_json::from_value(serde_json::json!([
            { "secret": "KEY", "version": 2, "hosts": ["api.test"], "ports": [443], "inject": [{ "kind": "bearer" }] }
        ]))
        .expect("bindings");
        let mut renewed = sandbox(1, 1, &[443]);
        renewed.ca_generation = 1;
        let mut taken = sandbox(1, 1, &[443]);
        taken.org_id = "org-2".parse().expect("an id");
        for wanted in [rotated, renewed, taken] {
            let steps = changes(&before, &all(std::slice::from_ref(&wanted)));
            assert_eq!(steps, [Change::Rules(wanted)]);
        }
    }

    #[test]
    fn tunnels_change_ports_and_not_rules() {
        let with = |ports: &[u16]| FeedSandbox {
            tunnel_ports: ports.to_vec(),
            ..sandbox(1, 1, &[443])
        };
        let before = all(&[with(&[3000, 8000])]);
        assert!(changes(&before, &all(&[with(&[8000, 3000, 3000])])).is_empty());
        for wanted in [with(&[3000]), with(&[]), with(&[3000, 8000, 9000])] {
            let steps = changes(&before, &all(std::slice::from_ref(&wanted)));
            assert_eq!(steps, [Change::Ports(wanted)]);
        }
        let both = FeedSandbox {
            tunnel_ports: vec![1],
            ..sandbox(1, 1, &[80])
        };
        assert_eq!(
            changes(&before, &all(std::slice::from_ref(&both))),
            [Change::Rules(both)]
        );
    }

    #[test]
    fn a_delta_changes_and_a_snapshot_replaces() {
        let snapshot = FeedFrame::Snapshot {
            revision: 3,
            sandboxes: vec![sandbox(1, 1, &[]), sandbox(2, 2, &[])],
        };
        let delta = FeedFrame::Delta {
            since: Some(3),
            revision: 5,
            upserts: vec![sandbox(3, 3, &[]), sandbox(2, 2, &[80])],
            removed: vec![sandbox(1, 1, &[]).sandbox_id],
        };
        let state = Desired::default()
            .after(snapshot)
            .after(delta)
            .after(FeedFrame::Heartbeat { revision: 5 });
        assert_eq!(state.revision, Some(5));
        assert_eq!(state.sandboxes, all(&[sandbox(2, 2, &[80]), sandbox(3, 3, &[])]));
        assert_eq!(
            state
                .after(FeedFrame::Snapshot {
                    revision: 6,
                    sandboxes: Vec::new()
                })
                .sandboxes,
            all(&[])
        );
    }

    #[test]
    fn a_snapshot_of_the_state_leads_to_it() {
        assert_eq!(Desired::default().snapshot(), None);
        let state = Desired {
            revision: Some(7),
            sandboxes: all(&[sandbox(1, 1, &[443]), sandbox(2, 2, &[80])]),
        };
        let snapshot = state.snapshot().expect("a frame");
        assert_eq!(Desired::default().after(snapshot), state);
    }

    fn world() -> impl Strategy<Value = BTreeMap<SandboxId, FeedSandbox>> {
        let rules = prop_oneof![Just(vec![443]), Just(vec![80])];
        let one = (0u8..6, 0u8..6, rules, 0u16..3);
        proptest::collection::vec(one, 0..6).prop_map(|drawn| {
            by_id(drawn.into_iter().map(|(id, place, ports, tunnel)| FeedSandbox {
                tunnel_ports: (tunnel > 0).then_some(tunnel).into_iter().collect(),
                ..sandbox(id, place, &ports)
            }))
        })
    }

    proptest! {
        #[test]
        fn the_steps_lead_to_what_is_wanted_without_two_in_one_place(before in world(), wanted in world()) {
            // Only what can be enforced is ever in force.
            let actual = apply(&BTreeMap::new(), &changes(&BTreeMap::new(), &before));
            let steps = changes(&actual, &wanted);
            let after = apply(&actual, &steps);
            let refused: Vec<_> = steps.iter().filter_map(|step| match step {
                Change::Refuse(id, _) => Some(id.clone()),
                Change::Remove(_) | Change::Attach(_) | Change::Rules(_) | Change::Ports(_) => None,
            }).collect();
            for (id, sandbox) in &wanted {
                prop_assert!(after.get(id) == Some(sandbox) || refused.contains(id));
            }
            prop_assert!(after.keys().all(|id| wanted.contains_key(id)));
            let kept = changes(&after, &wanted);
            prop_assert!(kept.iter().all(|step| matches!(step, Change::Refuse(..))), "{:?}", kept);
        }
    }
}
