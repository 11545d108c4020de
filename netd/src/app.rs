//! Puts the parts together, in the order that is safe: the kernel half first, then what the last state
//! wants, then the listeners, and only then whoever brings news.

use std::{
    fs, iter,
    num::NonZero,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{AccessFlags, access},
};
use sandgate_daemon::{signal, tasks::Tasks};
use sandgate_policy::Platform;
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::{Semaphore, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    audit::{
        Audit, packets, passed,
        spool::{Recovered, Spool},
    },
    canary::{self, Greeting},
    config::{Config, KernelPass},
    control::{Control, ControlError, Inherited},
    dial::{self, Caller, Inward},
    dns::{Resolver, cache::Cache, filter::Filter, upstream::Servers},
    egress::{Egress, dial::Dialer},
    feed::{Controller, Feed, Standing, StateFile, acknowledge, enforce::Enforcer},
    guard,
    intercept::{leases::Broker, upstream::UpstreamTls},
    kernel::{Datapath, DatapathConfig},
    metrics::{Counted, Metrics, Present},
    nodeaddr::NodeAddresses,
    privileges,
    router::pass,
    sandbox::Sandboxes,
    sockets::{Family, Listeners},
    uplink::{Keeper, Passing, Place, Uplink},
};

/// Time for flows to end when netd does.
const DRAIN: Duration = Duration::from_secs(3);
/// Time for the last records to be delivered.
const LAST_RECORDS: Duration = Duration::from_secs(2);
/// Pause before the canaries fly again after a failure.
const CANARY_PAUSE: Duration = Duration::from_secs(5);
/// How often pins and leases that ended are dropped.
const PIN_SWEEP: Duration = Duration::from_secs(30);
/// Dial sockets that tunnel-proxy may have at once; it needs one, and for a moment two when it restarts.
const TUNNEL_SOCKETS_MAX: usize = 8;
/// Pause after a packet that could not be received.
const TUNNEL_PAUSE: Duration = Duration::from_millis(100);
/// Time for a predecessor to be gone.
const LOCK_TIME: Duration = Duration::from_secs(5);

/// What needs more rights than the rest: made first, while there is one thread.
pub struct Ground {
    inherited: Inherited,
    directory: PathBuf,
    platform: Arc<Platform>,
    datapath: Arc<Datapath>,
    listeners: Listeners,
    uplink: Result<Place, String>,
    upstream: UpstreamTls,
    spool: (Spool, Recovered),
    /// Released by the kernel when the process ends, however it ends.
    _lock: Flock<fs::File>,
}

impl Ground {
    /// Sets the kernel half up or adopts it, makes the listeners, and then gives up every right that the rest does
    /// not need. Blocking; call it before any thread is started.
    ///
    /// # Errors
    /// When netd cannot begin. What is in the kernel stays as it is.
    pub fn lay(config: &Config) -> Result<Self> {
        let inherited = Inherited::take()?;
        raise_descriptor_limit();
        let directory = config.run_dir.join("netd");
        let pins = directory.join("pins");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&pins)
            .with_context(|| format!("cannot make {}", pins.display()))?;
        let lock = lock(&directory)?;
        let platform = Platform::new(config.allow_private.clone()).without(config.deny_ranges.clone());
        let platform = Arc::new(platform);
        let place = DatapathConfig {
            run_dir: config.run_dir.clone(),
            sandbox_cidr: config.sandbox_cidr,
            sandbox_cidr6: config.sandbox_cidr6,
            attach: config.attach,
        };
        let datapath = Datapath::open(&place, &platform).context("cannot set up the kernel half")?;
        let listeners = Listeners::open(datapath.router())?;
        let uplink = uplink(config, &datapath)?;
        let upstream = UpstreamTls::load(config.upstream_ca_file.as_deref())
            .context("cannot verify the servers of flows that are read")?;
        privileges::give_up()?;
        // Root may now be refused by permission bits like everybody else.
        access(&pins, AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK).with_context(|| {
            format!(
                "SANDGATE_RUN_DIR: {} must belong to root, and every folder above it be passable (chmod o+x)",
                config.run_dir.display()
            )
        })?;
        let spool = Spool::open(&config.spool_dir, config.spool_bytes).with_context(|| {
            format!(
                "SANDGATE_DATA_DIR: the audit's spool {} cannot be used; it must belong to root, and every folder above \
                 it be passable",
                config.spool_dir.display()
            )
        })?;
        Ok(Self {
            inherited,
            directory,
            platform,
            datapath: Arc::new(datapath),
            listeners,
            uplink,
            upstream,
            spool,
            _lock: lock,
        })
    }
}

/// Where a way out for what needs no look inside would belong; the reason why there shall be none, and then nothing
/// of an earlier one is left.
fn uplink(config: &Config, datapath: &Datapath) -> Result<Result<Place, String>> {
    match config.kernel_pass {
        KernelPass::Auto => Ok(Ok(Place {
            run_dir: config.run_dir.clone(),
            sandboxes: config.sandbox_cidr,
            sandboxes6: config.sandbox_cidr6,
            opened6: config
                .allow_private
                .iter()
                .filter_map(|exception| match exception.network() {
                    IpNet::V6(network) => Some(network),
                    IpNet::V4(_) => None,
                })
                .collect(),
        })),
        KernelPass::Off => {
            datapath
                .set_uplink(None)
                .context("the programs cannot be told that there is no uplink")?;
            pass::close(datapath.router()).context("cannot close the way out")?;
            Uplink::take_away(&config.run_dir).context("cannot take away what an earlier netd left")?;
            Ok(Err("SANDGATE_KERNEL_PASS is off".to_owned()))
        }
    }
}

/// Runs netd until it is told to end; shows its metrics on the listener, if there is one.
///
/// # Errors
/// When it cannot begin. What is in the kernel stays as it is.
pub async fn run(config: Config, ground: Ground, shown: Option<std::net::TcpListener>) -> Result<()> {
    let Ground {
        inherited,
        directory,
        platform,
        datapath,
        listeners,
        uplink,
        upstream,
        spool,
        _lock,
    } = ground;
    let end = signal::shutdown().context("cannot listen for signals")?;
    // Flows and loops end at once; what brings their records away ends after them.
    let tasks = Tasks::new(end.clone());
    let late = Tasks::new(CancellationToken::new());
    let control = Arc::new(Control::new(inherited.controller)?);
    let tunnel_proxy = inherited.tunnel_proxy.map(Control::new).transpose()?;
    let node = NodeAddresses::default();
    node.watch(&tasks, &late, Arc::clone(&datapath))
        .await
        .context("cannot learn the node's addresses")?;
    let sandboxes = Arc::new(Sandboxes::default());
    let metrics = Metrics::default();
    let audit = Arc::new(Audit::new(metrics.clone(), spool));

    let mut enforcer = Enforcer::new(
        Arc::clone(&datapath),
        Arc::clone(&platform),
        Arc::clone(&sandboxes),
        directory.join("pins"),
        StateFile::at(&directory.join("state.json")),
    );
    enforcer.restore().await.context("cannot read the saved state")?;

    let controller = Arc::new(Controller::new(Arc::clone(&control), late.clone()));
    let greeting = Arc::new(Greeting::default());
    let sandbox_ranges: Vec<IpNet> = iter::once(IpNet::V4(config.sandbox_cidr))
        .chain(config.sandbox_cidr6.map(IpNet::V6))
        .collect();
    let dialer = Dialer::open(Arc::clone(&platform), node.clone(), sandbox_ranges.clone())
        .context("cannot open a netlink socket")?;
    let egress = Arc::new(Egress {
        sandboxes: Arc::clone(&sandboxes),
        audit: Arc::clone(&audit),
        dialer,
        broker: Arc::new(Counted {
            broker: Arc::clone(&controller) as Arc<dyn Broker>,
            metrics: metrics.clone(),
        }),
        metrics: metrics.clone(),
        upstream: Arc::new(upstream),
        greeting: Arc::clone(&greeting),
        tasks: tasks.clone(),
    });
    let resolver = Arc::new(Resolver {
        sandboxes: Arc::clone(&sandboxes),
        audit: Arc::clone(&audit),
        metrics: metrics.clone(),
        cache: Arc::new(Cache::new(
            Servers::new(config.dns_upstream.clone(), tasks.clone()),
            metrics.clone(),
            tasks.clone(),
        )),
        filter: Filter::new(platform, node, sandbox_ranges),
        tasks: tasks.clone(),
    });
    tasks.spawn("dns sweep", Arc::clone(&resolver).keep_tidy());
    listen(&tasks, &datapath, listeners, &egress, &resolver)?;
    let denials = packets::follow(
        datapath
            .take_events()
            .context("cannot read the kernel's denials")?,
        Arc::clone(&sandboxes),
        Arc::clone(&audit),
        metrics.clone(),
        end.clone(),
    )
    .context("cannot start a thread")?;

    let gathering = Arc::clone(&audit);
    let passing = passed::follow(
        Arc::clone(&datapath),
        Arc::clone(&sandboxes),
        Arc::clone(&audit),
        end.clone(),
    );
    tasks.spawn("passed flows", passing);
    late.spawn("audit", async move { gathering.gather().await });
    late.spawn(
        "audit delivery",
        Arc::clone(&audit).deliver(Arc::clone(&controller)),
    );
    let inward = Arc::new(Inward::new(Arc::clone(&sandboxes), Arc::clone(&datapath)));
    keep_tidy(&tasks, &datapath, &sandboxes, &inward);

    let unknown = "the canaries have not returned yet".to_owned();
    let (told, standing) = watch::channel(Standing {
        ready: Err(unknown.clone()),
        kernel_pass: Passing::nothing(unknown),
        lost: Vec::new(),
    });
    let told = Arc::new(told);
    let (enforced, news) = watch::channel(None);
    let guarded = Arc::clone(&sandboxes);
    if let Some(listener) = shown {
        let present = Present {
            sandboxes,
            audit: Arc::clone(&audit),
            datapath: Arc::clone(&datapath),
            enforced: news.clone(),
            standing: standing.clone(),
        };
        show_metrics(listener, &metrics, present, &tasks)?;
    }
    let keeper = Arc::new(Keeper::new(uplink, Arc::clone(&datapath)));
    let guarding = guard::watch(
        Arc::clone(&datapath),
        Arc::clone(&guarded),
        Arc::clone(&keeper),
        Arc::clone(&told),
        end.clone(),
    );
    tasks.spawn("guard", guarding);
    fly_canaries(&tasks, &late, &config, (datapath, keeper), greeting, told);
    let feed = Feed {
        controller: Arc::clone(&controller),
        node: config.node,
        enforced,
    };
    tasks.spawn("feed", feed.follow(enforcer, end.clone()));
    late.spawn("acknowledge", acknowledge(controller, news, standing));
    if let Some(tunnel_proxy) = tunnel_proxy {
        tasks.spawn(
            "tunnel dials",
            take_tunnel_sockets(tunnel_proxy, Arc::clone(&inward), tasks.clone()),
        );
    }
    tracing::info!("netd is up");

    let ended = tokio::select! {
        ended = take_dial_sockets(&control, &inward, &tasks) => ended,
        () = end.cancelled() => Ok(()),
    };
    end.cancel();
    if let Err(forced) = tasks.drain(DRAIN).await {
        tracing::warn!(tasks = forced.tasks, "not everything ended in time");
    }
    if tokio::task::spawn_blocking(|| denials.join())
        .await
        .is_ok_and(|joined| joined.is_err())
    {
        tracing::error!("the thread that reads denials panicked");
    }
    if !audit.flush(LAST_RECORDS).await {
        tracing::warn!("the controller did not take the last audit records; the next netd delivers them");
    }
    // They never end by themselves.
    let _stopped = late.drain(Duration::ZERO).await;
    ended
}

fn show_metrics(
    listener: std::net::TcpListener,
    metrics: &Metrics,
    present: Present,
    tasks: &Tasks,
) -> Result<()> {
    let mut registry = sandgate_daemon::metrics::registry("netd");
    metrics.register(&mut registry);
    registry.register_collector(Box::new(present));
    sandgate_daemon::metrics::serve(listener, registry, None, tasks).context("cannot serve the metrics")
}

/// Shows the listeners to the kernel and serves them.
fn listen(
    tasks: &Tasks,
    datapath: &Datapath,
    listeners: Listeners,
    egress: &Arc<Egress>,
    resolver: &Arc<Resolver>,
) -> Result<()> {
    datapath
        .set_listeners(&listeners.indexed())
        .context("the kernel did not take the listeners")?;
    let families = [Some(listeners.v4), listeners.v6];
    for family in families.into_iter().flatten() {
        serve(tasks, family, egress, resolver)?;
    }
    Ok(())
}

/// Serves the listeners of one family.
fn serve(tasks: &Tasks, family: Family, egress: &Arc<Egress>, resolver: &Arc<Resolver>) -> Result<()> {
    let tcp = TcpListener::from_std(family.tcp).context("the TCP listener")?;
    let dns_tcp = TcpListener::from_std(family.dns_tcp).context("the DNS listener")?;
    tasks.spawn("egress", Arc::clone(egress).serve(tcp));
    tasks.spawn("dns over tcp", Arc::clone(resolver).serve_tcp(dns_tcp));
    let questions = Arc::new(UdpSocket::from_std(family.dns_udp).context("the DNS socket")?);
    let answers = Arc::new(UdpSocket::from_std(family.dns_answers).context("the DNS answer socket")?);
    // More than one would only wake each other where there are few processors.
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    for _ in 0..(cores / 2).clamp(1, 4) {
        let (questions, answers) = (Arc::clone(&questions), Arc::clone(&answers));
        let (resolver, end) = (Arc::clone(resolver), tasks.shutdown());
        tasks.spawn("dns over udp", async move {
            if let Err(error) = resolver.serve_udp(questions, answers).await {
                tracing::error!(%error, "DNS over UDP broke; ending, so that netd is started anew");
                end.cancel();
            }
        });
    }
    Ok(())
}

fn keep_tidy(tasks: &Tasks, datapath: &Arc<Datapath>, sandboxes: &Arc<Sandboxes>, inward: &Arc<Inward>) {
    let (datapath, inward, end) = (Arc::clone(datapath), Arc::clone(inward), tasks.shutdown());
    let departed = Arc::clone(sandboxes);
    tasks.spawn("sweep", async move {
        while !waited(dial::SWEEP, &end).await {
            departed.sweep();
            let (datapath, inward) = (Arc::clone(&datapath), Arc::clone(&inward));
            let swept = tokio::task::spawn_blocking(move || {
                inward.sweep();
                datapath.sweep()
            });
            match swept.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "cannot free what was replaced; it is tried again"),
                Err(_panic) => tracing::error!("looking for what has ended broke"),
            }
        }
    });
    let (sandboxes, end) = (Arc::clone(sandboxes), tasks.shutdown());
    tasks.spawn("pin sweep", async move {
        while !waited(PIN_SWEEP, &end).await {
            for sandbox in sandboxes.all() {
                sandbox.sweep_pins();
                sandbox.leases.sweep();
                sandbox.upstreams.sweep();
                tokio::task::yield_now().await;
            }
        }
    });
}

/// Flies them until the node is ready, and then looks after its uplink.
fn fly_canaries(
    tasks: &Tasks,
    late: &Tasks,
    config: &Config,
    (datapath, keeper): (Arc<Datapath>, Arc<Keeper>),
    greeting: Arc<Greeting>,
    told: Arc<watch::Sender<Standing>>,
) {
    let (sandbox_cidr, end, late) = (config.sandbox_cidr, tasks.shutdown(), late.clone());
    tasks.spawn("canaries", async move {
        loop {
            let (datapath, greeting) = (Arc::clone(&datapath), Arc::clone(&greeting));
            let prover = Arc::clone(&keeper);
            let flown = tokio::task::spawn_blocking(move || {
                canary::fly(&datapath, sandbox_cidr, &greeting)
                    .map_err(|error| error.to_string())
                    .map(|()| prover.prove())
            });
            let outcome = flown.await.unwrap_or_else(|error| Err(error.to_string()));
            match outcome {
                Ok(passing) => {
                    tracing::info!("the canaries returned: refusing and redirecting work");
                    told.send_modify(|standing| {
                        standing.ready = Ok(());
                        standing.kernel_pass = passing.clone();
                    });
                    let changed = |passing| told.send_modify(|standing| standing.kernel_pass = passing);
                    keeper.keep(passing, changed, &late, end.clone()).await;
                    // Kept, so that the standing stays readable.
                    end.cancelled().await;
                    drop(told);
                    return;
                }
                Err(reason) => {
                    tracing::error!(%reason, "the canaries failed; the node is not ready");
                    told.send_modify(|standing| standing.ready = Err(reason));
                }
            }
            if waited(CANARY_PAUSE, &end).await {
                return;
            }
        }
    });
}

async fn take_dial_sockets(control: &Control, inward: &Arc<Inward>, tasks: &Tasks) -> Result<()> {
    loop {
        match control.next_dial_socket().await {
            Ok(socket) => {
                let serving = Arc::clone(inward).serve(socket, Caller::Controller, tasks.clone());
                tasks.spawn("dial socket", serving);
            }
            Err(ControlError::Closed) => {
                tracing::info!("the supervisor is gone, ending; the kernel keeps denying");
                return Ok(());
            }
            Err(error) => return Err(anyhow!(error)),
        }
    }
}

/// tunnel-proxy faces strangers: what it does on its channel harms nobody but itself.
async fn take_tunnel_sockets(channel: Control, inward: Arc<Inward>, tasks: Tasks) {
    let end = tasks.shutdown();
    let slots = Arc::new(Semaphore::new(TUNNEL_SOCKETS_MAX));
    loop {
        let next = tokio::select! {
            next = channel.next_dial_socket() => next,
            () = end.cancelled() => return,
        };
        let socket = match next {
            Ok(socket) => socket,
            Err(ControlError::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "a packet on tunnel-proxy's channel was lost");
                if waited(TUNNEL_PAUSE, &end).await {
                    return;
                }
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!("tunnel-proxy has too many dial sockets");
            continue;
        };
        let serving = Arc::clone(&inward).serve(socket, Caller::TunnelProxy, tasks.clone());
        tasks.spawn("tunnel dial socket", async move {
            serving.await;
            drop(slot);
        });
    }
}

/// Waits; true when the program ends meanwhile.
async fn waited(pause: Duration, end: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(pause) => false,
        () = end.cancelled() => true,
    }
}

/// One netd per instance: two would fight over the same maps.
fn lock(directory: &Path) -> Result<Flock<fs::File>> {
    let path = directory.join("lock");
    let mut file = fs::File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let deadline = Instant::now() + LOCK_TIME;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                file = again;
                thread::sleep(Duration::from_millis(50));
            }
            Err((_, errno)) => {
                return Err(anyhow!(errno)).with_context(|| format!("another netd holds {}", path.display()));
            }
        }
    }
}

/// Every flow takes two descriptors.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
