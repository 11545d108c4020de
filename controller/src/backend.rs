//! Where sandboxes run: making them, taking them away without leaving anything, and finding what exists.
//!
//! Everything above this module knows sandboxes by id and never touches a namespace, a mount or a runtime.
//! The order is fixed: [`LocalBackend::prepare`] makes the point of attachment without an address, the caller
//! waits until netd has acknowledged it, and only then [`LocalBackend::launch`] gives it an address and starts
//! anything in it.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;
use sandgate_api::{id::SandboxId, rest::Isolation};
use sandgate_policy::Range6;

pub use local::LocalBackend;

mod local;

/// Where the local backend works. All paths are absolute.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Of this instance: namespaces, mount points, runtime state. Gone after a reboot.
    pub run_dir: PathBuf,
    /// Of this instance: writable layers.
    pub data_dir: PathBuf,
    /// Root file systems, shared between instances, read-only.
    pub image_dir: PathBuf,
    /// Which of them, a folder name.
    pub image: String,
    /// Addresses of sandboxes; a prefix between /16 and /28.
    pub sandbox_cidr: Ipv4Net,
    /// Their IPv6 addresses.
    pub sandbox_cidr6: Range6,
    /// The agent's static binary.
    pub sandboxd: PathBuf,
    /// The OCI runtime: a path, or a name to look up in `PATH`.
    pub runtime: PathBuf,
    /// Bytes of `data_dir`'s file system that writable layers never get.
    pub disk_reserve_bytes: u64,
}

/// What a sandbox gets.
#[derive(Clone)]
pub struct LaunchSpec {
    /// Which one.
    pub sandbox_id: SandboxId,
    /// CPU time per second, in thousandths of a CPU.
    pub cpu_millis: u64,
    /// Memory, page cache of its files and `/dev/shm` included.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Its writable layer: `/workspace` and `/tmp` together.
    pub disk_bytes: u64,
    /// Added to (and overriding) the image's environment.
    pub env: BTreeMap<String, String>,
    /// 64 hexadecimal digits. Reaches the agent by a pipe and is never written anywhere.
    pub agent_key: String,
    /// The certificate of its authority, PEM, which programs inside trust beside the image's.
    pub ca_certificate: Option<String>,
    /// How it is walled off.
    pub isolation: Isolation,
}

/// How long the parts of a launch took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaunchMetrics {
    /// Namespace, veth, addresses and routes.
    pub network: Duration,
    /// The writable layer: file, file system, mount.
    pub disk: Duration,
    /// The runtime's `create`.
    pub create: Duration,
    /// The runtime's `start`.
    pub start: Duration,
    /// From the start until the agent listens.
    pub agent: Duration,
}

/// A sandbox of this instance that exists at least in part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which one.
    pub sandbox_id: SandboxId,
    /// Its PID 1 is alive.
    pub running: bool,
}

/// Why the backend could not do it.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This machine or its configuration cannot run sandboxes. For the operator; names the remedy.
    #[error("{0}")]
    Unusable(String),
    /// The promised disk would not fit, or no address is free. A conflict, not a failure.
    #[error("no capacity: {message}")]
    NoCapacity {
        /// What there is too little of.
        message: String,
        /// Bytes of disk that are missing; 0 when it is something else.
        missing: u64,
    },
    /// There is already a sandbox of that id.
    #[error("{0} already exists")]
    Exists(SandboxId),
    /// There is no sandbox of that id, or it was not prepared.
    #[error("{0} is not prepared")]
    NotPrepared(SandboxId),
    /// The specification makes no sense.
    #[error("{field}: {message}")]
    Invalid {
        /// The field of [`LaunchSpec`].
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A step failed. What it had made was taken away again, or is found by [`LocalBackend::inventory`].
    #[error("{step}: {message}")]
    Failed {
        /// What was attempted, for example `making the network`.
        step: &'static str,
        /// What went wrong.
        message: String,
    },
}

/// What a sandbox has used so far, and what it holds at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Processor time of everything in it since it was made.
    pub cpu: Duration,
    /// Memory at present, without pages of files that nobody has used for a while.
    pub memory_bytes: u64,
    /// Processes and threads at present.
    pub processes: u64,
    /// Of its writable layer, at present.
    pub disk_bytes: u64,
    /// Size of its writable layer.
    pub disk_limit: u64,
    /// What it has sent since it was made, answers to the controller included.
    pub sent_bytes: u64,
    /// What it has received since it was made, questions of the controller included.
    pub received_bytes: u64,
}

/// What passes unasked, such as the last packets of a connection, in bytes.
const SILENCE: u64 = 4096;

/// Share of one processor that an agent which waits stays below, as its reciprocal.
const STANDSTILL: u32 = 100;

impl Reading {
    /// Whether nothing to speak of has happened since an earlier reading, `over` ago or more: less than 1 % of one
    /// processor and at most 4 KiB over the network.
    pub fn is_idle_since(&self, before: Self, over: Duration) -> bool {
        let crossed = |reading: &Self| reading.sent_bytes.saturating_add(reading.received_bytes);
        self.cpu.saturating_sub(before.cpu) < over / STANDSTILL
            && crossed(self).saturating_sub(crossed(&before)) <= SILENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_computes_or_talks_is_not_idle() {
        let minute = Duration::from_secs(60);
        let before = Reading {
            cpu: minute,
            memory_bytes: 1,
            processes: 1,
            disk_bytes: 0,
            disk_limit: 0,
            sent_bytes: 1_000,
            received_bytes: 1_000,
        };
        assert!(before.is_idle_since(before, minute));
        let with = |cpu: u64, sent: u64, received: u64| Reading {
            cpu: minute + Duration::from_millis(cpu),
            sent_bytes: 1_000 + sent,
            received_bytes: 1_000 + received,
            memory_bytes: 1 << 30,
            ..before
        };
        assert!(with(599, 2_048, 2_048).is_idle_since(before, minute));
        assert!(!with(600, 0, 0).is_idle_since(before, minute));
        assert!(!with(0, 4_000, 97).is_idle_since(before, minute));
    }
}
