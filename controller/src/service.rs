//! Use cases. They know the store, the node and the backend, but no HTTP and no SQL.
//!
//! One file per area; each adds its methods to [`Service`]. Every method takes the organisation it acts
//! for, and whatever belongs to another one does not exist for it.

mod access;
mod accounts;
mod actions;
mod audit;
mod commands;
mod doctor;
mod files;
mod happenings;
mod keeper;
mod keys;
mod lifetime;
mod limits;
mod meters;
mod policies;
mod pool;
mod processes;
mod reconcile;
mod repl;
mod retention;
mod review;
mod sandboxes;
mod secrets;
mod sockets;
mod templates;
mod tokens;
mod tunnels;
mod usage;
mod users;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use jiff::Timestamp;
use prometheus_client::registry::Registry;
use sandgate_api::{
    id::SandboxId,
    rest::{Health, NodeHealth},
};
use sandgate_daemon::tasks::Tasks;
use tokio::sync::watch;

pub use access::{Caller, Scope};
pub use accounts::{Registration, invite_from_outside};
pub use audit::Trail;
pub use commands::{Command, Output, Running};
pub use files::{MAX_FILE, MAX_STREAMED, Watching};

pub use happenings::Events;
pub use keys::{IssuedKey, KeyRequest};
pub use meters::KEPT as MEASUREMENTS;
pub use policies::{NetworkView, OrganizationView};
pub use repl::{Executed, Language};
pub use review::Span;
pub use sandboxes::{SandboxPage, SandboxRequest, Started};
pub use secrets::{EgressRequest, SCOPE, SecretChangeRequest, SecretRequest};
pub use sockets::Socket;
pub use templates::TemplateFilter;
pub use tokens::TokenRequest;
pub use tunnels::TunnelRequest;
pub use usage::{Granularity, Period};
pub use users::{InvitationRequest, UserRequest};

use crate::{
    agent::AgentError,
    backend::LocalBackend,
    config::Config,
    ingress::ProxyLink,
    installation::InstallationKey,
    jwt::TokenKey,
    ledger::Ledger,
    lifecycle::Cause,
    metrics::{Metrics, Present, StatusLabels},
    node::{DialFailure, LOCAL_NODE, NodeLink},
    places::Places,
    store::{Conflict, Store, StoreError},
    vault::Vault,
};

/// Everything the use cases need. Clones share it.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    config: Arc<Config>,
    store: Store,
    node: NodeLink,
    proxy: ProxyLink,
    installation: InstallationKey,
    vault: Arc<Vault>,
    ledger: Ledger,
    tasks: Tasks,
    backend: watch::Sender<BackendState>,
    keepers: Mutex<HashMap<SandboxId, keeper::Keeper>>,
    metrics: Metrics,
    pool: pool::Pool,
    /// Streams of audit records.
    streams: Places,
    /// Directories that are followed.
    watches: Places,
    /// WebSockets and followed processes.
    sockets: Places,
    uses: keys::Uses,
    actions: actions::Actions,
    limits: limits::Limits,
    tokens: TokenKey,
    meters: meters::Meters,
    teller: happenings::Teller,
    /// Streams of events.
    event_streams: Places,
}

/// Whether sandboxes can be made.
#[derive(Clone)]
pub enum BackendState {
    /// It is being probed, or what ran before is being adopted.
    Starting,
    /// It can make sandboxes, and everything it has is looked after.
    Ready(Arc<LocalBackend>),
    /// It cannot; for the operator.
    Failed(String),
}

/// A use case did not do what it was asked. Nothing was changed, unless the message says so.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A field is not acceptable.
    #[error("{message}")]
    Invalid {
        /// Which one, as a path.
        field: String,
        /// What would be right.
        message: String,
    },
    /// No credential, or one that does not work.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The caller may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// A limit of the organisation is reached.
    #[error("{0}")]
    Quota(String),
    /// No such sandbox in this organisation.
    #[error("there is no sandbox {0}")]
    SandboxNotFound(String),
    /// No such file in the sandbox.
    #[error("{0}")]
    FileNotFound(String),
    /// No such other thing in this organisation.
    #[error("there is no {0}")]
    NotFound(String),
    /// It does not fit the present state.
    #[error("{0}")]
    Conflict(String),
    /// Somebody else changed it first.
    #[error("the policy was changed meanwhile: it is at revision {current}")]
    Stale {
        /// The revision it has.
        current: u64,
    },
    /// Larger than is possible here.
    #[error("{0}")]
    TooLarge(String),
    /// The organisation has as many at once as it may; one of them must end first.
    #[error("{0}")]
    TooMany(String),
    /// A part of the system is not there at the moment; nothing was begun.
    #[error("{0}")]
    Unavailable(String),
    /// Our fault.
    #[error(transparent)]
    Store(StoreError),
    /// Our fault.
    #[error("{0}")]
    Internal(String),
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        let conflict = match error {
            StoreError::Conflict(conflict) => conflict,
            StoreError::Failed(_)
            | StoreError::Migrate(_)
            | StoreError::Corrupt { .. }
            | StoreError::Random(_) => {
                return Self::Store(error);
            }
        };
        match conflict {
            Conflict::EmailTaken
            | Conflict::WrongState
            | Conflict::SecretExists
            | Conflict::SessionTaken
            | Conflict::InvitationUsed
            | Conflict::LastOwner => Self::Conflict(conflict.to_string()),
            Conflict::QuotaReached { .. }
            | Conflict::TooManyKeys { .. }
            | Conflict::TooManyUsers { .. }
            | Conflict::TooManyTemplates { .. }
            | Conflict::TooManyInvitations { .. }
            | Conflict::TooManySecrets { .. }
            | Conflict::TooManyTunnels { .. }
            | Conflict::TooManyTunnelsOfOrganization { .. } => Self::Quota(conflict.to_string()),
            Conflict::NoTunnelLeft => Self::Unavailable(conflict.to_string()),
            Conflict::NoSuchSecret { .. } => Self::NotFound("secret of this name".to_owned()),
            Conflict::StaleRevision { current } => Self::Stale { current },
        }
    }
}

impl From<DialFailure> for ServiceError {
    /// Nothing has been asked of the sandbox yet, so whoever may try again, may.
    fn from(failure: DialFailure) -> Self {
        match failure {
            DialFailure::Refused(refused) => {
                Self::Conflict(format!("the sandbox cannot be reached: {refused}"))
            }
            DialFailure::Silent | DialFailure::Away | DialFailure::Io(_) => {
                Self::Unavailable(failure.to_string())
            }
        }
    }
}

impl From<AgentError> for ServiceError {
    /// Never a 5xx: published clients repeat a request that failed so, and a command must not run twice.
    fn from(error: AgentError) -> Self {
        use sandgate_api::agent::AgentErrorCode as Code;
        match error {
            AgentError::Refused { code, message } => match code {
                Code::NotFound => Self::FileNotFound(message),
                Code::IsDirectory | Code::NotDirectory => Self::Invalid {
                    field: "path".to_owned(),
                    message,
                },
                Code::PermissionDenied => Self::Forbidden(message),
                Code::TooLarge => Self::TooLarge(message),
                Code::Invalid
                | Code::NoSpace
                | Code::Exists
                | Code::NotEmpty
                | Code::Unauthorized
                | Code::Internal => Self::Conflict(message),
            },
            AgentError::RequestTooLarge(_) => Self::TooLarge(error.to_string()),
            AgentError::Io(_) | AgentError::Closed | AgentError::Timeout | AgentError::Protocol(_) => {
                Self::Conflict(error.to_string())
            }
        }
    }
}

impl Service {
    /// Puts the parts together. The backend is added when it has been opened.
    pub fn new(
        config: Arc<Config>,
        store: Store,
        (node, proxy): (NodeLink, ProxyLink),
        installation: InstallationKey,
        vault: Arc<Vault>,
        tasks: Tasks,
    ) -> Self {
        let backend = watch::channel(BackendState::Starting).0;
        let tokens = match &config.jwt_secret {
            Some(secret) => TokenKey::new(secret.as_bytes()),
            None => TokenKey::new(&installation.expand("sandgate tokens 1")),
        };
        let shared = Shared {
            pool: pool::Pool::new(config.pool),
            teller: happenings::Teller::start(store.clone(), &tasks),
            ledger: Ledger::new(store.clone(), &installation, &config.data_dir),
            store,
            node,
            proxy,
            installation,
            vault,
            tasks,
            backend,
            keepers: Mutex::new(HashMap::new()),
            metrics: Metrics::default(),
            streams: Places::new(audit::STREAMS),
            watches: Places::new(files::WATCHES),
            sockets: Places::new(sockets::SOCKETS),
            meters: meters::Meters::default(),
            event_streams: Places::new(happenings::STREAMS),
            uses: keys::Uses::default(),
            actions: actions::Actions::default(),
            limits: limits::Limits::new(&config),
            tokens,
            config,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Shows what is counted, and what stands in the store and with the node.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.shared.metrics.register(registry);
        registry.register_collector(Box::new(Present {
            node: self.shared.node.clone(),
            revision: self.shared.store.watch_revision(),
        }));
    }

    /// Counts the sandboxes anew. When the store fails, the last counts stay.
    pub async fn refresh_metrics(&self) {
        match self.shared.store.count_sandboxes().await {
            Ok(counts) => {
                for (status, count) in counts {
                    let status = status.as_str();
                    let gauge = self
                        .shared
                        .metrics
                        .sandboxes
                        .get_or_create_owned(&StatusLabels { status });
                    gauge.set(count);
                }
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the sandboxes cannot be counted"
            ),
        }
    }

    /// Sandboxes cannot be made here; `reason` is for the operator.
    pub fn backend_failed(&self, reason: String) {
        self.shared.backend.send_replace(BackendState::Failed(reason));
    }

    /// How everything is.
    pub async fn health(&self) -> Health {
        let database = match self.shared.store.check().await {
            Ok(()) => "ok",
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the database does not answer"
                );
                "failed"
            }
        };
        let (backend, backend_error) = match &*self.shared.backend.borrow() {
            BackendState::Starting => ("starting", None),
            BackendState::Ready(_) => ("ready", None),
            BackendState::Failed(reason) => ("failed", Some(reason.clone())),
        };
        let node = self.shared.node.state();
        Health {
            status: if database == "ok" { "ok" } else { "degraded" }.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            database: database.to_owned(),
            backend: backend.to_owned(),
            backend_error,
            tunnel_proxy: if self.shared.proxy.state().connected {
                "connected"
            } else {
                "away"
            }
            .to_owned(),
            nodes: vec![NodeHealth {
                name: LOCAL_NODE.to_owned(),
                connected: node.connected,
                ready: node.ready,
                reason: node.reason,
                kernel_pass: node.kernel_pass.is_ok(),
                kernel_pass_reason: node.kernel_pass.err(),
                kernel_pass6: node.kernel_pass6.is_ok(),
                kernel_pass6_reason: node.kernel_pass6.err(),
            }],
        }
    }

    /// A sandbox could be created now.
    pub fn is_ready(health: &Health) -> bool {
        health.status == "ok" && health.backend == "ready" && health.nodes.iter().any(|node| node.ready)
    }

    fn backend(&self) -> Result<Arc<LocalBackend>, ServiceError> {
        match &*self.shared.backend.borrow() {
            BackendState::Ready(backend) => Ok(Arc::clone(backend)),
            BackendState::Starting => Err(ServiceError::Unavailable("the controller is starting".to_owned())),
            BackendState::Failed(_) => Err(ServiceError::Unavailable(
                "this node cannot run sandboxes; see its health".to_owned(),
            )),
        }
    }

    /// Ends a sandbox and waits until it is gone; at once when nothing looks after it any more.
    async fn end(&self, id: &SandboxId, cause: Cause) {
        let progress = {
            let keepers = self
                .shared
                .keepers
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            keepers.get(id).map(|keeper| keeper.end(cause))
        };
        if let Some(progress) = progress {
            keeper::gone(progress).await;
        }
    }
}

fn invalid(field: &str, message: &str) -> ServiceError {
    ServiceError::Invalid {
        field: field.to_owned(),
        message: message.to_owned(),
    }
}

/// The time, to the millisecond: as exactly as the store keeps it, so that an answer shows what the next
/// one will.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}
