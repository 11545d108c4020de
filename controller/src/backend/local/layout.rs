//! Where everything of this instance lies. Paths only: nothing here touches them.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Name of the router namespace beside those of the sandboxes. No sandbox id is called so.
const ROUTER: &str = "router";

/// The directories of one instance.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    run_dir: PathBuf,
    data_dir: PathBuf,
    instance: String,
}

impl Layout {
    pub(super) fn new(run_dir: &Path, data_dir: &Path) -> Self {
        let name = run_dir
            .file_name()
            .map_or_else(|| "root".into(), |name| name.to_string_lossy());
        // Two instances may have run directories of the same last name.
        let digest = hex::encode(Sha256::digest(run_dir.as_os_str().as_encoded_bytes()));
        Self {
            run_dir: run_dir.to_owned(),
            data_dir: data_dir.to_owned(),
            instance: format!("{name}-{}", &digest[..8]),
        }
    }

    /// What tells this instance from others on the machine.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// Network namespaces, one file each.
    pub(super) fn namespaces(&self) -> PathBuf {
        self.run_dir.join("netns")
    }

    pub(super) fn namespace(&self, name: &str) -> PathBuf {
        self.namespaces().join(name)
    }

    /// The namespace with the host ends of all veths; netd makes it.
    pub(super) fn router(&self) -> PathBuf {
        self.namespace(ROUTER)
    }

    /// Mount points of writable layers.
    pub(super) fn mounts(&self) -> PathBuf {
        self.run_dir.join("mnt")
    }

    pub(super) fn mount(&self, name: &str) -> PathBuf {
        self.mounts().join(name)
    }

    /// Records and bundles.
    pub(super) fn records(&self) -> PathBuf {
        self.run_dir.join("sandboxes")
    }

    /// One sandbox's record and bundle.
    pub(super) fn record(&self, name: &str) -> PathBuf {
        self.records().join(name)
    }

    /// The position in the ring of addresses.
    pub(super) fn cursor(&self) -> PathBuf {
        self.run_dir.join("next-address")
    }

    /// The runtime's own state.
    pub(super) fn runtime_state(&self) -> PathBuf {
        self.run_dir.join("runc")
    }

    /// Writable layers, on a real disk.
    pub(super) fn layers(&self) -> PathBuf {
        self.data_dir.join("sandboxes")
    }

    pub(super) fn layer(&self, name: &str) -> PathBuf {
        self.layers().join(name)
    }

    pub(super) fn disk(&self, name: &str) -> PathBuf {
        self.layer(name).join("disk.ext4")
    }

    /// The parent of the sandboxes' cgroups, below a hierarchy's root.
    pub(super) fn cgroups(&self) -> PathBuf {
        Path::new("sandgate").join(&self.instance)
    }

    /// A sandbox's cgroup, below a hierarchy's root.
    pub(super) fn cgroup(&self, name: &str) -> PathBuf {
        self.cgroups().join(name)
    }
}
