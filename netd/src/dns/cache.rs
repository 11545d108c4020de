//! What was found, for each organisation apart: how long a lookup takes tells nobody what another organisation asked.
//! Owns: the kept answers, their age and size, and that one name and type is asked for once at a time. Whoever asks has
//! been judged before, and pins what it is given for itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use sandgate_api::id::OrgId;
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{DnsType, DomainName};
use tokio::sync::watch;

use super::{found::Found, upstream::Servers};
use crate::metrics::Metrics;

/// Memory for the answers of all organisations, in bytes.
const WEIGHT_MAX: usize = 16 << 20;
/// Memory for those of one.
const ORGANISATION_WEIGHT_MAX: usize = 2 << 20;
/// Questions of one organisation that are being asked upstream at once, and of all.
const ASKING_MAX: usize = 256;
const ALL_ASKING_MAX: usize = 4096;

type Key = (DomainName, DnsType);
/// Nothing: no upstream could answer.
type Outcome = Option<Arc<Found>>;

/// The cache, and the way to the upstream behind it.
pub struct Cache {
    state: Mutex<State>,
    servers: Servers,
    metrics: Metrics,
    tasks: Tasks,
}

#[derive(Default)]
struct State {
    organisations: HashMap<OrgId, Organisation>,
    weight: usize,
    asking: usize,
}

struct Organisation {
    /// The least recently used last.
    kept: LruCache<Key, Kept>,
    weight: usize,
    asking: HashMap<Key, watch::Receiver<Option<Outcome>>>,
}

struct Kept {
    found: Arc<Found>,
    until: Instant,
    weight: usize,
}

/// What is known here.
pub enum Known {
    /// This, for as long as that.
    Answer(Arc<Found>, Duration),
    /// It is being asked for.
    Soon(Soon),
    /// Nothing.
    Nothing,
}

/// An answer that is on its way.
pub struct Soon(watch::Receiver<Option<Outcome>>);

/// Who asks upstream for what is not known.
pub enum Turn {
    /// The caller.
    Ask(Lead),
    /// Somebody of the same organisation, already.
    Wait(Soon),
}

/// The duty to ask upstream. When it is dropped, whoever waits is told that there is no answer.
pub struct Lead {
    asked: Asked,
    told: watch::Sender<Option<Outcome>>,
}

impl Turn {
    /// The answer. Nothing when no upstream could give one.
    pub async fn found(self) -> Option<Arc<Found>> {
        match self {
            Self::Ask(lead) => lead.found().await,
            Self::Wait(soon) => soon.found().await,
        }
    }

    /// The same, asked by a task of its own: whoever asked first may go away while others wait.
    pub fn apart(self) -> Soon {
        match self {
            Self::Ask(lead) => {
                let soon = Soon(lead.told.subscribe());
                let tasks = lead.asked.cache.tasks.clone();
                tasks.spawn("dns upstream", async move {
                    // Told to those who wait.
                    let _found = lead.found().await;
                });
                soon
            }
            Self::Wait(soon) => soon,
        }
    }
}

impl Lead {
    async fn found(self) -> Option<Arc<Found>> {
        let Self { asked, told } = self;
        let clock = Instant::now();
        let (name, kind) = &asked.key;
        let found = asked.cache.servers.resolve(name, *kind).await;
        asked.cache.metrics.resolved(clock.elapsed());
        let outcome = match found {
            Ok(found) => Some(asked.keep(found)),
            Err(error) => {
                tracing::debug!(%name, %error, "cannot resolve a name");
                None
            }
        };
        // No longer being asked before anybody hears of it.
        drop(asked);
        told.send_replace(Some(outcome.clone()));
        outcome
    }
}

impl Soon {
    /// Waits for it. Nothing when no upstream could answer.
    async fn found(mut self) -> Option<Arc<Found>> {
        let outcome = self.0.wait_for(Option::is_some).await.ok()?;
        outcome.clone().flatten()
    }
}

impl Cache {
    /// An empty cache before `servers`.
    pub fn new(servers: Servers, metrics: Metrics, tasks: Tasks) -> Self {
        Self {
            state: Mutex::default(),
            servers,
            metrics,
            tasks,
        }
    }

    /// What is known for an organisation.
    pub fn look(&self, organisation: &OrgId, key: &Key, now: Instant) -> Known {
        let mut state = self.lock();
        let State {
            organisations,
            weight,
            ..
        } = &mut *state;
        let Some(organisation) = organisations.get_mut(organisation) else {
            return Known::Nothing;
        };
        if let Some(kept) = organisation.kept.get(key) {
            if let Some(left) = kept
                .until
                .checked_duration_since(now)
                .filter(|left| !left.is_zero())
            {
                return Known::Answer(Arc::clone(&kept.found), left);
            }
            let gone = organisation.kept.pop(key).map_or(0, |kept| kept.weight);
            organisation.weight -= gone;
            *weight -= gone;
        }
        match organisation.asking.get(key) {
            Some(asking) => Known::Soon(Soon(asking.clone())),
            None => Known::Nothing,
        }
    }

    /// Whose turn it is to ask upstream. Nothing when too much is asked at once.
    pub fn ask(self: &Arc<Self>, id: &OrgId, key: Key) -> Option<Turn> {
        let (told, asking) = watch::channel(None);
        {
            let mut state = self.lock();
            if state.asking >= ALL_ASKING_MAX {
                return None;
            }
            let organisation = state.organisations.entry(id.clone()).or_default();
            if let Some(present) = organisation.asking.get(&key) {
                return Some(Turn::Wait(Soon(present.clone())));
            }
            if organisation.asking.len() >= ASKING_MAX {
                return None;
            }
            organisation.asking.insert(key.clone(), asking);
            state.asking += 1;
        }
        let asked = Asked {
            cache: Arc::clone(self),
            id: id.clone(),
            key,
        };
        Some(Turn::Ask(Lead { asked, told }))
    }

    /// Forgets what is too old.
    pub fn sweep(&self, now: Instant) {
        let mut state = self.lock();
        let State {
            organisations,
            weight,
            ..
        } = &mut *state;
        organisations.retain(|_, organisation| {
            let old: Vec<Key> = organisation
                .kept
                .iter()
                .filter(|(_, kept)| kept.until <= now)
                .map(|(key, _)| key.clone())
                .collect();
            for key in old {
                let gone = organisation.kept.pop(&key).map_or(0, |kept| kept.weight);
                organisation.weight -= gone;
                *weight -= gone;
            }
            !organisation.kept.is_empty() || !organisation.asking.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Organisation {
    fn default() -> Self {
        Self {
            kept: LruCache::unbounded(),
            weight: 0,
            asking: HashMap::new(),
        }
    }
}

impl State {
    /// Keeps an answer, and makes room for it: among the same organisation's first, then among those of the one that
    /// has most.
    fn keep(&mut self, id: &OrgId, key: &Key, found: Arc<Found>, until: Instant) {
        let weight = found.weight() + key.0.as_str().len();
        if weight > ORGANISATION_WEIGHT_MAX {
            return;
        }
        let organisation = self.organisations.entry(id.clone()).or_default();
        let kept = Kept { found, until, weight };
        let before = organisation
            .kept
            .put(key.clone(), kept)
            .map_or(0, |kept| kept.weight);
        organisation.weight = organisation.weight + weight - before;
        self.weight = self.weight + weight - before;
        while organisation.weight > ORGANISATION_WEIGHT_MAX {
            self.weight -= organisation.drop_oldest();
        }
        while self.weight > WEIGHT_MAX {
            let largest = self
                .organisations
                .values_mut()
                .max_by_key(|organisation| organisation.weight);
            let Some(largest) = largest else { return };
            self.weight -= largest.drop_oldest();
        }
    }
}

impl Organisation {
    fn drop_oldest(&mut self) -> usize {
        let gone = self.kept.pop_lru().map_or(self.weight, |(_, kept)| kept.weight);
        self.weight -= gone;
        gone
    }
}

/// A question that is being asked upstream.
struct Asked {
    cache: Arc<Cache>,
    id: OrgId,
    key: Key,
}

impl Asked {
    fn keep(&self, found: Found) -> Arc<Found> {
        let found = Arc::new(found);
        if !found.ttl.is_zero() {
            let until = Instant::now() + found.ttl;
            self.cache
                .lock()
                .keep(&self.id, &self.key, Arc::clone(&found), until);
        }
        found
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if let Some(organisation) = state.organisations.get_mut(&self.id) {
            organisation.asking.remove(&self.key);
        }
        state.asking -= 1;
    }
}

#[cfg(test)]
mod tests;
