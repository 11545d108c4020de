//! What sandboxes with the same rules share in memory: the documents, and what they compile to. Owns: finding out that
//! they are the same. Keeps nothing alive: what no sandbox uses is gone.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use sandgate_api::feed::{FeedFrame, PolicyTier, TierName};
use sandgate_policy::{BoundHost, KernelTable, Platform, Policy, PolicyError};

use super::rules::Compiled;

/// Entries below which it is not worth looking for dead ones.
const FEW: usize = 64;

/// Documents and compiled rules that are in use.
#[derive(Default)]
pub struct Library {
    shelves: Mutex<Shelves>,
}

#[derive(Default)]
struct Shelves {
    /// By what they say.
    documents: HashMap<u64, Vec<Weak<Policy>>>,
    hasher: RandomState,
    compiled: BTreeMap<Sources, Vec<Weak<Compiled>>>,
    /// How many of `compiled` there may be before dead ones are looked for.
    most: usize,
}

/// Tiers, with their documents by their places in memory. Compiled rules hold the documents, so that a place means the
/// same document as long as there is something compiled from it.
type Sources = Vec<(TierName, usize)>;

impl Library {
    /// Makes the sandboxes of a frame share the documents that they have in common with each other and with those of
    /// earlier frames.
    pub fn share_documents(&self, frame: &mut FeedFrame) {
        let sandboxes = match frame {
            FeedFrame::Snapshot { sandboxes, .. } => sandboxes,
            FeedFrame::Delta { upserts, .. } => upserts,
            FeedFrame::Heartbeat { .. } => return,
        };
        let mut shelves = self.shelves();
        shelves.documents.retain(|_, list| {
            list.retain(|document| document.strong_count() > 0);
            !list.is_empty()
        });
        // The frame's own are held meanwhile, so that no place is used twice.
        let mut seen: HashMap<usize, (Arc<Policy>, Arc<Policy>)> = HashMap::new();
        for tier in sandboxes.iter_mut().flat_map(|sandbox| &mut sandbox.tiers) {
            let (_, shared) = seen
                .entry(place(&tier.policy))
                .or_insert_with(|| (Arc::clone(&tier.policy), shelves.document(&tier.policy)));
            tier.policy = Arc::clone(shared);
        }
    }

    /// What tiers and bindings compile to, and the kernel's table if it had to be compiled anew.
    ///
    /// # Errors
    /// When they do not compile.
    pub(super) fn compiled(
        &self,
        platform: &Platform,
        tiers: &[PolicyTier],
        hosts: Vec<BoundHost>,
    ) -> Result<(Arc<Compiled>, Option<KernelTable>), PolicyError> {
        let sources: Sources = tiers
            .iter()
            .map(|tier| (tier.tier, place(&tier.policy)))
            .collect();
        if let Some(known) = self.shelves().compiled(&sources, &hosts) {
            return Ok((known, None));
        }
        let (compiled, table) = Compiled::new(platform, tiers, hosts)?;
        let compiled = Arc::new(compiled);
        self.shelves().add(sources, &compiled);
        Ok((compiled, Some(table)))
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        // Every method leaves it whole.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelves {
    fn document(&mut self, wanted: &Arc<Policy>) -> Arc<Policy> {
        let alike = self.documents.entry(self.hasher.hash_one(wanted)).or_default();
        let mut known = alike.iter().filter_map(Weak::upgrade);
        if let Some(known) = known.find(|known| known == wanted) {
            return known;
        }
        alike.push(Arc::downgrade(wanted));
        Arc::clone(wanted)
    }

    fn compiled(&self, sources: &Sources, hosts: &[BoundHost]) -> Option<Arc<Compiled>> {
        let mut known = self.compiled.get(sources)?.iter().filter_map(Weak::upgrade);
        known.find(|known| known.hosts == hosts)
    }

    fn add(&mut self, sources: Sources, compiled: &Arc<Compiled>) {
        if self.compiled.len() >= self.most {
            self.compiled.retain(|_, list| {
                list.retain(|compiled| compiled.strong_count() > 0);
                !list.is_empty()
            });
            self.most = FEW.max(2 * self.compiled.len());
        }
        let list = self.compiled.entry(sources).or_default();
        list.retain(|compiled| compiled.strong_count() > 0);
        list.push(Arc::downgrade(compiled));
    }
}

fn place(policy: &Arc<Policy>) -> usize {
    Arc::as_ptr(policy).addr()
}

#[cfg(test)]
mod tests {
    use sandgate_api::feed::FeedSandbox;
    use serde_json::{Value, json};

    use super::*;

    fn tier(policy: &Value) -> PolicyTier {
        PolicyTier {
            tier: TierName::Sandbox,
            policy: Policy::parse(policy).expect("a policy").into(),
        }
    }

    fn listed(number: u8, tier: PolicyTier) -> FeedSandbox {
        let endpoint = json!({ "ifindex": number, "interface": format!("sg{number}"),
            "address": format!("10.213.0.{number}"), "mac": [2, 0, 0, 0, 0, number], "agent_port": 1024 });
        FeedSandbox {
            sandbox_id: format!("sandbox-{number}").parse().expect("an id"),
            org_id: "org-1".parse().expect("an id"),
            endpoint: serde_json::from_value(endpoint).expect("an endpoint"),
            tiers: vec![tier],
            bindings: Vec::new(),
            ca_generation: 0,
            tunnel_ports: Vec::new(),
        }
    }

    fn shared(library: &Library, sandboxes: Vec<FeedSandbox>) -> Vec<FeedSandbox> {
        let mut frame = FeedFrame::Snapshot {
            revision: 1,
            sandboxes,
        };
        library.share_documents(&mut frame);
        let FeedFrame::Snapshot { sandboxes, .. } = frame else {
            unreachable!("it was one")
        };
        sandboxes
    }

    #[test]
    fn equal_documents_are_one_also_those_of_different_frames() {
        let (library, all, none) = (
            Library::default(),
            json!({ "mode": "allow_all" }),
            json!({ "mode": "deny_all" }),
        );
        let first = shared(
            &library,
            vec![
                listed(1, tier(&all)),
                listed(2, tier(&all)),
                listed(3, tier(&none)),
            ],
        );
        let second = shared(&library, vec![listed(4, tier(&none))]);
        let of = |sandbox: &FeedSandbox| place(&sandbox.tiers[0].policy);
        assert_eq!(of(&first[0]), of(&first[1]));
        assert_ne!(of(&first[0]), of(&first[2]));
        assert_eq!(of(&first[2]), of(&second[0]));
    }

    #[test]
    fn the_same_rules_are_compiled_once_and_forgotten_with_the_last_who_has_them() {
        let (library, platform) = (Library::default(), Platform::new(Vec::new()));
        let tiers = [tier(&json!({ "mode": "allow_all" }))];
        let compile = |hosts| library.compiled(&platform, &tiers, hosts).expect("compiled");
        let (first, table) = compile(Vec::new());
        assert!(table.is_some());
        let (second, table) = compile(Vec::new());
        assert!(Arc::ptr_eq(&first, &second) && table.is_none());
        let host = BoundHost {
            hosts: Vec::new(),
            ports: vec![443],
        };
        let (bound, table) = compile(vec![host]);
        assert!(!Arc::ptr_eq(&first, &bound) && table.is_some());
        drop((first, second, bound));
        assert!(compile(Vec::new()).1.is_some());
    }
}
