//! Asks the node's upstream resolvers, from the node's own namespace. Owns: which server is asked when, what is
//! remembered of their health, and for how long one question may take. Asks only what it is given: the decision
//! whether to ask is made before.

mod exchange;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{DnsType, DomainName};
use tokio::time::Instant;

use super::found::{Found, Unusable};

/// Time for one name, over all servers and attempts. Below the timeout of the resolver library inside.
const TOTAL: Duration = Duration::from_millis(4500);
/// Silence after which another attempt is begun. The earlier ones still count when their answer comes.
const PATIENCE: Duration = Duration::from_millis(700);
/// How often a server is asked for one name, at most: a datagram may be lost.
const ROUNDS: usize = 3;
/// Attempts for one name.
const ATTEMPTS_MAX: usize = 6;
/// A server that failed is asked last for this long, twice as long after each further failure.
const REST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(60);
/// Time for a server that failed to show that it is well.
const PROBE: Duration = Duration::from_secs(3);

/// The upstream resolvers, in the order in which they are asked while all are well. Clones share what is known of
/// their health.
#[derive(Clone)]
pub struct Servers {
    servers: Arc<[Server]>,
    tasks: Tasks,
}

struct Server {
    address: SocketAddr,
    health: Mutex<Health>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Health {
    /// Since it last answered.
    failures: u32,
    /// Of a server that failed: until when it is asked last. Then one question tries it beside the others.
    rests_until: Option<Instant>,
}

/// No upstream helped.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// All of them failed or were silent; this is the last failure.
    #[error("no DNS upstream answered: {0}")]
    Unanswered(#[source] AttemptError),
    /// There are none.
    #[error("there is no DNS upstream")]
    NoServer,
}

/// One server did not help.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The network.
    #[error("{0}")]
    Network(#[source] io::Error),
    /// Silence.
    #[error("no answer in time")]
    TimedOut,
    /// It answered with a failure, or over TCP with something else.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The name or an id could not be made into a query.
    #[error("the query could not be made")]
    Unwritable,
}

impl AttemptError {
    /// Whether the server is to blame, and not the name.
    fn is_illness(&self) -> bool {
        match self {
            Self::Network(_) | Self::TimedOut => true,
            Self::Unusable(_) | Self::Unwritable => false,
        }
    }
}

impl Servers {
    /// Asks these servers; looks after those that failed among `tasks`.
    pub fn new(servers: Vec<SocketAddr>, tasks: Tasks) -> Self {
        let server = |address| Server {
            address,
            health: Mutex::default(),
        };
        Self {
            servers: servers.into_iter().map(server).collect(),
            tasks,
        }
    }

    /// The records of `name` as the first server that can answer has them.
    ///
    /// # Errors
    /// When none answers in time.
    pub async fn resolve(&self, name: &DomainName, kind: DnsType) -> Result<Found, UpstreamError> {
        let now = Instant::now();
        let order = self.order();
        self.try_the_rested(&order, name, kind, now);
        let deadline = now + TOTAL;
        let mut plan = order
            .iter()
            .cycle()
            .take((order.len() * ROUNDS).min(ATTEMPTS_MAX))
            .copied();
        let mut attempts = FuturesUnordered::new();
        // When each server was first asked, and those that have said something.
        let mut asked: Vec<Option<Instant>> = vec![None; self.servers.len()];
        let mut heard = vec![false; self.servers.len()];
        let mut failed = None;
        let mut next = now;
        loop {
            let due = async {
                // A timer would round a moment that is here already up to its next tick, a millisecond away.
                if next > Instant::now() {
                    tokio::time::sleep_until(next.min(deadline)).await;
                }
            };
            tokio::select! {
                biased;
                Some((index, outcome)) = attempts.next(), if !attempts.is_empty() => {
                    let index: usize = index;
                    heard[index] = true;
                    match outcome {
                        Ok(found) => {
                            self.servers[index].answered();
                            self.blame(&asked, &heard);
                            return Ok(found);
                        }
                        Err(error) => {
                            self.note(index, name, &error);
                            failed = Some(error);
                            // What failed did so at once, and so does the next attempt begin.
                            next = Instant::now();
                        }
                    }
                }
                () = due => {
                    let now = Instant::now();
                    if now >= deadline {
                        self.blame(&asked, &heard);
                        return Err(UpstreamError::Unanswered(failed.unwrap_or(AttemptError::TimedOut)));
                    }
                    // One that has failed for this name fails again.
                    match plan.find(|index| !heard[*index]) {
                        Some(index) => {
                            asked[index].get_or_insert(now);
                            let address = self.servers[index].address;
                            attempts.push(async move { (index, exchange::ask(address, name, kind).await) });
                            next = now + PATIENCE;
                        }
                        None if attempts.is_empty() => {
                            return Err(failed.map_or(UpstreamError::NoServer, UpstreamError::Unanswered));
                        }
                        None => next = deadline,
                    }
                }
            }
        }
    }

    /// The servers that are well in their order, then the others.
    fn order(&self) -> Vec<usize> {
        let (well, resting): (Vec<usize>, Vec<usize>) =
            (0..self.servers.len()).partition(|index| self.servers[*index].health().rests_until.is_none());
        [well, resting].concat()
    }

    /// Asks a server that has rested beside the others, so that nobody waits for it.
    fn try_the_rested(&self, order: &[usize], name: &DomainName, kind: DnsType, now: Instant) {
        // Where no server is well the question itself tries them.
        let any_well = order
            .first()
            .is_some_and(|first| self.servers[*first].health().rests_until.is_none());
        for index in order.iter().copied().filter(|_| any_well) {
            {
                let mut health = self.servers[index].health();
                if health.rests_until.is_none_or(|until| until > now) {
                    continue;
                }
                // Nobody else tries it meanwhile.
                health.rests_until = Some(now + PROBE);
            }
            let (servers, name) = (self.clone(), name.clone());
            self.tasks.spawn("dns upstream probe", async move {
                let address = servers.servers[index].address;
                match tokio::time::timeout(PROBE, exchange::ask(address, &name, kind)).await {
                    Ok(Ok(_)) => servers.servers[index].answered(),
                    Ok(Err(error)) if !error.is_illness() => servers.servers[index].answered(),
                    Ok(Err(_)) | Err(_) => servers.servers[index].failed(),
                }
            });
        }
    }

    /// Notes the servers that were given time and said nothing.
    fn blame(&self, asked: &[Option<Instant>], heard: &[bool]) {
        for (index, since) in asked.iter().enumerate() {
            if !heard[index] && since.is_some_and(|since| since.elapsed() >= PATIENCE) {
                self.servers[index].failed();
            }
        }
    }

    fn note(&self, index: usize, name: &DomainName, error: &AttemptError) {
        let server = &self.servers[index];
        tracing::debug!(server = %server.address, %name, %error, "DNS upstream failed");
        if error.is_illness() {
            server.failed();
        } else {
            server.answered();
        }
    }
}

impl Server {
    fn answered(&self) {
        let before = std::mem::take(&mut *self.health());
        if before.rests_until.is_some() {
            tracing::info!(server = %self.address, "the DNS upstream answers again");
        }
    }

    fn failed(&self) {
        let mut health = self.health();
        let was_well = health.rests_until.is_none();
        let rest = REST * 2_u32.pow(health.failures.min(4));
        health.failures = health.failures.saturating_add(1);
        health.rests_until = Some(Instant::now() + rest.min(REST_MAX));
        drop(health);
        if was_well {
            tracing::warn!(server = %self.address, "the DNS upstream does not answer; others are asked first");
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
