//! `controller serve`: puts the parts together and runs them until a signal.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use sandgate_api::control::{CONTROL_FD_VARIABLE, TUNNEL_CONTROL_FD_VARIABLE};
use sandgate_daemon::{handover, metrics, signal, tasks::Tasks};
use tokio::net::TcpListener;

use crate::{
    api,
    backend::{LocalBackend, LocalConfig},
    broker::Broker,
    config::{API_FD_VARIABLE, Config},
    ingress::ProxyLink,
    installation::InstallationKey,
    node::NodeLink,
    service::Service,
    store::Store,
    vault::{KEY_FILE_VARIABLE, KEY_VARIABLE, Vault},
};

/// How long requests and endings under way are waited for.
const DRAIN: Duration = Duration::from_secs(8);

/// How often a backend that does not open is tried again.
const BACKEND_RETRY: Duration = Duration::from_secs(15);

/// What the supervisor passed down.
#[derive(Debug)]
pub struct Inherited {
    control: std::os::fd::OwnedFd,
    tunnel_control: std::os::fd::OwnedFd,
    listener: Option<std::os::fd::OwnedFd>,
}

impl Inherited {
    /// Takes the descriptors over. Call it before any thread is started.
    ///
    /// # Errors
    /// When there is no control channel: this program is started by `controller up`.
    pub fn take() -> Result<Self> {
        let channel = |variable: &'static str| {
            handover::inherited(variable)?.with_context(|| {
                format!("{variable} is not set: `controller serve` is started by `controller up`")
            })
        };
        Ok(Self {
            control: channel(CONTROL_FD_VARIABLE)?,
            tunnel_control: channel(TUNNEL_CONTROL_FD_VARIABLE)?,
            listener: handover::inherited(API_FD_VARIABLE)?,
        })
    }
}

/// Runs until a signal; shows its metrics on the listener, if there is one.
///
/// # Errors
/// When the database, the key or the listener cannot be used. A backend that cannot be used is no error: the
/// API says so, and it is tried again.
pub async fn serve(config: Config, inherited: Inherited, shown: Option<std::net::TcpListener>) -> Result<()> {
    // Values pass through this process's memory, which must never become a file.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("forbidding core dumps")?;
    let tasks = Tasks::new(signal::shutdown().context("installing signal handlers")?);
    let config = Arc::new(config);
    make_directory(&config.data_dir)?;
    let installation = InstallationKey::open(&config.data_dir.join("installation.key"))?;
    let store = open_store(&config.database).await?;
    let vault = open_vault(&config, &store).await?;
    let broker = Broker::new(store.clone(), Arc::clone(&vault), installation.clone());
    let channel = handover::Channel::from_fd(inherited.control).context("using the control channel")?;
    let node = NodeLink::start(channel, store.clone(), broker, &tasks);
    let channel = handover::Channel::from_fd(inherited.tunnel_control).context("using the tunnel channel")?;
    let proxy = ProxyLink::start(channel, store.clone(), &tasks);
    let listener = match inherited.listener {
        Some(descriptor) => {
            let listener = std::net::TcpListener::from(descriptor);
            listener
                .set_nonblocking(true)
                .and_then(|()| TcpListener::from_std(listener))
        }
        None => TcpListener::bind(config.api_addr).await,
    };
    let listener = listener.with_context(|| format!("listening on {}", config.api_addr))?;
    let service = Service::new(
        Arc::clone(&config),
        store.clone(),
        (node, proxy),
        installation,
        vault,
        tasks.clone(),
    );
    show_metrics(shown, &service, &tasks)?;
    tasks.spawn(
        "api",
        api::serve(listener, api::router(service.clone()), tasks.clone()),
    );
    tasks.spawn("retention", service.clone().retain());
    tasks.spawn("key uses", service.clone().record_uses());
    tasks.spawn("audit heads", service.clone().sign_audit());
    tasks.spawn("tunnel expiry", service.clone().retire_tunnels());
    tasks.spawn(
        "backend",
        open_backend(service, local_config(&config)?, tasks.clone()),
    );
    tracing::info!(address = %config.api_addr, data_dir = %config.data_dir.display(), "the controller serves");
    tasks.shutdown().cancelled().await;
    if let Err(forced) = tasks.drain(DRAIN).await {
        tracing::warn!(
            tasks = forced.tasks,
            "some tasks did not end in time; the next start goes on with them"
        );
    }
    store.close().await;
    Ok(())
}

fn show_metrics(listener: Option<std::net::TcpListener>, service: &Service, tasks: &Tasks) -> Result<()> {
    let Some(listener) = listener else { return Ok(()) };
    let mut registry = metrics::registry("controller");
    service.register_metrics(&mut registry);
    let service = service.clone();
    let refresh: metrics::Refresh = Arc::new(move || {
        let service = service.clone();
        Box::pin(async move { service.refresh_metrics().await })
    });
    metrics::serve(listener, registry, Some(refresh), tasks).context("serving the metrics")
}

/// The key-encryption key, which must be the one that the stored secrets were sealed with.
async fn open_vault(config: &Config, store: &Store) -> Result<Arc<Vault>> {
    let text = std::env::var(KEY_VARIABLE).ok();
    let vault = Vault::open(config.key_file.as_deref(), text, &config.data_dir)
        .context("opening the key-encryption key")?;
    anyhow::ensure!(
        !store.has_secret_of_another_key(&vault.key_id()).await?,
        "the stored secrets are sealed with another key than the one from {KEY_FILE_VARIABLE}, {KEY_VARIABLE} or \
         the data directory; bring that key back"
    );
    Ok(Arc::new(vault))
}

/// The database file and what SQLite puts beside it, readable by nobody else.
///
/// # Errors
/// When it cannot be opened.
pub async fn open_store(path: &Path) -> Result<Store> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .and_then(|file| file.set_permissions(fs::Permissions::from_mode(0o600)))
        .with_context(|| format!("opening the database {}", path.display()))?;
    Store::open(path)
        .await
        .with_context(|| format!("opening the database {}", path.display()))
}

/// Makes a directory that sandboxes' root file systems can be reached through, but not listed.
///
/// # Errors
/// When it cannot be made.
pub fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
        .with_context(|| format!("making the directory {}", path.display()))
}

/// What the local backend needs to know.
///
/// # Errors
/// When this program does not know where it stands.
pub fn local_config(config: &Config) -> Result<LocalConfig> {
    Ok(LocalConfig {
        run_dir: config.run_dir.clone(),
        data_dir: config.data_dir.clone(),
        image_dir: config.image_dir.clone(),
        image: config.sandbox.image.clone(),
        sandbox_cidr: config.sandbox_cidr,
        sandbox_cidr6: config.sandbox_cidr6,
        sandboxd: beside("sandboxd")?,
        runtime: config.runtime.clone(),
        disk_reserve_bytes: config.disk_reserve_bytes,
    })
}

/// A program that stands beside this one.
///
/// # Errors
/// When this program does not know where it stands, or nothing of that name is there.
pub fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program's own file")?;
    let path = own.with_file_name(name);
    anyhow::ensure!(
        path.is_file(),
        "{} is missing; `make build` makes it",
        path.display()
    );
    Ok(path)
}

async fn open_backend(service: Service, config: LocalConfig, tasks: Tasks) {
    let shutdown = tasks.shutdown();
    loop {
        let opened = async {
            let backend = LocalBackend::open(config.clone()).await?;
            service.adopt(backend).await.map_err(anyhow::Error::from)
        };
        let error = match opened.await {
            Ok(()) => {
                tracing::info!("the backend is ready");
                return;
            }
            Err(error) => error,
        };
        let reason = format!("{error:#}");
        tracing::error!(reason, "the backend cannot be used; it is tried again");
        service.backend_failed(reason);
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(BACKEND_RETRY) => {}
        }
    }
}
