//! Puts the parts together: first what was served before, then the listeners, then whoever brings news. Ends in the
//! other order: nothing new is accepted, what is under way has a few seconds.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sandgate_api::control::{
    CONTROL_FD_VARIABLE, TUNNEL_DIAL_FD_VARIABLE, TUNNEL_KEEP_FD_VARIABLE, TUNNEL_LISTENER_FD_VARIABLE,
};
use sandgate_daemon::{
    handover::{Channel, inherited},
    keep::StoreClient,
    signal,
    tasks::Tasks,
};
use sandgate_relay::inward::Dialer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, Limits, Scheme},
    feed::{self, Controller, Feed, StateFile},
    listeners::{OwnPorts, Room, serve_shared},
    metrics::Metrics,
    privileges,
    routes::Table,
    upstream::{IDLE_TIME, Upstream},
};

/// Time for what is under way when the program ends. The supervisor waits longer.
const DRAIN: Duration = Duration::from_secs(5);
/// Descriptors that are not for connections of clients or to sandboxes.
const OTHER_DESCRIPTORS: usize = 1500;
/// Where the last routes are, below the run directory, in a folder that the supervisor makes.
const STATE: &str = "tunnel-proxy/routes.json";

/// What connections are served from.
pub struct Proxy {
    /// The routes.
    pub table: Table,
    /// Domain of the tunnels' host names.
    pub domain: String,
    /// What clients speak to reach us.
    pub scheme: Scheme,
    /// Bounds.
    pub limits: Limits,
    /// The way to the sandboxes.
    pub upstream: Upstream,
    /// Everything that clients began.
    pub tasks: Tasks,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Runs until it is told to end; shows its metrics on the listener, if there is one.
///
/// # Errors
/// When it cannot begin, or holds privileges.
pub async fn run(config: Config, shown: Option<std::net::TcpListener>) -> Result<()> {
    // Before any descriptor of ours could take an inherited one's number.
    let control = required(CONTROL_FD_VARIABLE)?;
    let dial = required(TUNNEL_DIAL_FD_VARIABLE)?;
    let listener = required(TUNNEL_LISTENER_FD_VARIABLE)?;
    let keep = required(TUNNEL_KEEP_FD_VARIABLE)?;
    privileges::check()?;
    let end = signal::shutdown().context("cannot listen for signals")?;
    let (limits, inward) = within_descriptors(config.limits)?;

    // What clients began ends first; what it needs ends after it.
    let tasks = Tasks::new(end.clone());
    let late = Tasks::new(CancellationToken::new());
    let dial = Channel::from_fd(dial).context("cannot use the channel to netd")?;
    let dialer = Dialer::new(Arc::new(dial), late.clone());
    let room = Room::new(limits.connections);
    let metrics = Arc::new(Metrics::default());
    if let Some(shown) = shown {
        let mut registry = sandgate_daemon::metrics::registry("tunnel-proxy");
        metrics.register(&mut registry);
        sandgate_daemon::metrics::serve(shown, registry, None, &late).context("cannot serve the metrics")?;
    }
    let proxy = Arc::new(Proxy {
        table: Table::new(limits.connections_each),
        domain: config.domain.clone(),
        scheme: config.scheme,
        limits,
        upstream: Upstream::new(Arc::new(dialer), inward, late.clone(), Arc::clone(&metrics)),
        tasks: tasks.clone(),
        metrics,
    });
    let keep = Channel::from_fd(keep).context("cannot use the descriptor store")?;
    let (store, kept) = StoreClient::open(keep)
        .await
        .context("cannot take over the sockets that were kept")?;
    let ports = config
        .is_local()
        .then(|| OwnPorts::new(Arc::clone(&proxy), store, kept, room.clone()));
    let control = Channel::from_fd(control).context("cannot use the control channel")?;
    let mut feed = Feed {
        proxy: Arc::clone(&proxy),
        controller: Controller::new(control, late.clone()),
        ports,
        state: StateFile::at(&config.run_dir.join(STATE)),
    };
    feed.restore().await;
    keep_tidy(&proxy, &late);

    let listener = std::net::TcpListener::from(listener);
    listener
        .set_nonblocking(true)
        .context("cannot use the inherited listener")?;
    let listener = TcpListener::from_std(listener).context("cannot use the inherited listener")?;
    let address = listener
        .local_addr()
        .context("cannot use the inherited listener")?;
    tasks.spawn("listener", serve_shared(Arc::clone(&proxy), listener, room));
    late.spawn("feed", feed.follow(late.shutdown()));
    tracing::info!(%address, domain = config.domain, "tunnel-proxy is up");

    end.cancelled().await;
    if let Err(forced) = tasks.drain(DRAIN).await {
        tracing::info!(tasks = forced.tasks, "not everything ended in time");
    }
    // They never end by themselves.
    let _stopped = late.drain(Duration::ZERO).await;
    Ok(())
}

fn required(variable: &'static str) -> Result<OwnedFd> {
    inherited(variable)?
        .with_context(|| format!("{variable} is not set: tunnel-proxy is started by `controller up`"))
}

/// Closes what has waited or lived too long.
pub fn keep_tidy(proxy: &Arc<Proxy>, late: &Tasks) {
    let (swept, end) = (Arc::clone(proxy), late.shutdown());
    late.spawn("idle connections", async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(IDLE_TIME) => {}
                () = end.cancelled() => return,
            }
            swept.table.all().iter().for_each(|tunnel| tunnel.pool.sweep());
        }
    });
    let (proxy, end) = (Arc::clone(proxy), late.shutdown());
    late.spawn("expiry", async move {
        loop {
            let expired = tokio::select! {
                expired = proxy.table.next_expired() => expired,
                () = end.cancelled() => return,
            };
            for tunnel in &expired {
                tracing::info!(tunnel_id = %tunnel.id, "a tunnel has expired");
            }
            feed::close(&expired).await;
        }
    });
}

/// No more connections than there are descriptors for: those of clients, of which most lead to one connection to a
/// sandbox, and how many there may be to sandboxes. A client of HTTP/2 can have many of those.
fn within_descriptors(limits: Limits) -> Result<(Limits, usize)> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot ask for the limit of open files")?;
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot ask for the limit of open files")?;
    let most = usize::try_from(soft).unwrap_or(usize::MAX);
    let descriptors = most.saturating_sub(OTHER_DESCRIPTORS).max(most / 2);
    let connections = descriptors / 3;
    if connections < limits.connections {
        tracing::warn!(
            asked = limits.connections,
            connections,
            "fewer connections at once: there are no more descriptors"
        );
    }
    let connections = limits.connections.min(connections.max(1));
    // Two for each: the second while it is made.
    let inward = descriptors.saturating_sub(connections) / 2;
    let limits = Limits {
        connections,
        ..limits
    };
    Ok((limits, inward.max(1)))
}
