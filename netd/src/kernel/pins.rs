//! What outlives netd: the bpffs, the maps and the links pinned in it.
//!
//! A set of pins is adopted whole or not at all. One that a netd of another layout left, or that was never completed,
//! is replaced by empty maps: every program then knows no endpoint and drops, until netd has attached them anew.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use netd_common::{
    Address, BoundKey, Counter, Endpoint, Flow, FlowKey, InboundKey, LAYOUT, Meta, PlatformEntry, PolicyKey,
    PortTable, Reported, SuppressedTable, Throttle, Uplink, counter, limit, listener,
};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::statfs,
};

use super::{
    DatapathError,
    error::{on_file, on_map},
};

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Name, key size, value size and number of entries of each map.
const SHAPES: [(&str, usize, usize, usize); 17] = [
    ("ENDPOINTS", 4, size_of::<Endpoint>(), limit::ENDPOINTS),
    (
        "POLICIES",
        4 + size_of::<PolicyKey>(),
        size_of::<PortTable>(),
        limit::PREFIXES,
    ),
    (
        "PLATFORM",
        4 + size_of::<Address>(),
        size_of::<PlatformEntry>(),
        limit::PLATFORM,
    ),
    ("ADDRESSES", size_of::<Address>(), 4, 2 * limit::ENDPOINTS),
    ("BOUND", size_of::<BoundKey>(), 4, limit::BOUND),
    ("INBOUND", size_of::<InboundKey>(), 8, limit::INBOUND),
    ("FLOWS", size_of::<FlowKey>(), size_of::<Flow>(), limit::FLOWS),
    ("FLOW_COUNTS", 4, 8, limit::ENDPOINTS + 1),
    ("FLOWS_FREED", 4, 8, limit::ENDPOINTS + 1),
    ("UPLINK", 4, size_of::<Uplink>(), 1),
    ("LISTENERS", 4, 4, listener::COUNT),
    ("THROTTLES", 4, size_of::<Throttle>(), limit::ENDPOINTS + 1),
    (
        "SUPPRESSED",
        4,
        size_of::<SuppressedTable>(),
        limit::ENDPOINTS + 1,
    ),
    ("EVENTS", 0, 0, limit::EVENT_BYTES),
    ("COUNTERS", 4, size_of::<Counter>(), counter::COUNT),
    ("REPORTED", 4, size_of::<Reported>(), limit::ENDPOINTS + 1),
    ("META", 4, size_of::<Meta>(), 1),
];

/// The instance's pins, held by this process alone.
#[derive(Debug)]
pub(super) struct Pins {
    maps: PathBuf,
    links: PathBuf,
    /// Released by the kernel when the process ends, however it ends.
    _lock: Flock<File>,
}

impl Pins {
    /// Takes the lock, mounts the bpffs if it is not, and makes the folders.
    pub(super) fn open(run_dir: &Path) -> Result<Self, DatapathError> {
        fs::create_dir_all(run_dir).map_err(on_file("create", run_dir))?;
        let path = run_dir.join("netd.lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(on_file("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => DatapathError::Busy { path: path.clone() },
            other => on_file("lock", &path)(other),
        })?;
        let root = run_dir.join("bpf");
        fs::create_dir_all(&root).map_err(on_file("create", &root))?;
        if statfs(&root)
            .map_err(on_file("statfs", &root))?
            .filesystem_type()
            .0
            != BPF_FS_MAGIC
        {
            mount(
                Some("bpffs"),
                &root,
                Some("bpf"),
                MsFlags::empty(),
                Some("mode=0700"),
            )
            .map_err(on_file("mount a bpf file system at", &root))?;
        }
        let pins = Self {
            maps: root.join("maps"),
            links: root.join("links"),
            _lock: lock,
        };
        for folder in [&pins.maps, &pins.links] {
            fs::create_dir_all(folder).map_err(on_file("create", folder))?;
        }
        Ok(pins)
    }

    /// Where each map is pinned.
    pub(super) fn map_paths(&self) -> impl Iterator<Item = (&'static str, PathBuf)> {
        SHAPES.map(|(name, ..)| (name, self.maps.join(name))).into_iter()
    }

    /// A pinned map.
    pub(super) fn map(&self, name: &'static str) -> Result<MapData, DatapathError> {
        MapData::from_pin(self.maps.join(name)).map_err(on_map("open pinned", name))
    }

    /// Where a program's link to an interface is pinned.
    pub(super) fn link(&self, ifindex: u32, program: &str) -> PathBuf {
        self.links.join(format!("{ifindex}-{program}"))
    }

    /// All pinned links: interface, program, path.
    pub(super) fn links(&self) -> Result<Vec<(u32, String, PathBuf)>, DatapathError> {
        let list = || -> io::Result<Vec<_>> {
            let mut found = Vec::new();
            for entry in fs::read_dir(&self.links)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some((ifindex, program)) = name.split_once('-')
                    && let Ok(ifindex) = ifindex.parse()
                {
                    found.push((ifindex, program.to_owned(), entry.path()));
                }
            }
            Ok(found)
        };
        list().map_err(on_file("list", &self.links))
    }

    /// Whether the pinned maps are all there, complete and of our layout.
    pub(super) fn adoptable(&self) -> bool {
        let shapes_fit = SHAPES.iter().all(|(name, key, value, entries)| {
            self.map(name)
                .and_then(|map| map.info().map_err(on_map("look at", name)))
                .is_ok_and(|info| {
                    let sizes = [info.key_size(), info.value_size(), info.max_entries()];
                    sizes.map(|size| size as usize) == [*key, *value, *entries]
                })
        });
        shapes_fit
            && self
                .map("META")
                .and_then(|map| {
                    let meta = aya::maps::Array::<_, Meta>::try_from(aya::maps::Map::Array(map));
                    meta.and_then(|meta| meta.get(&0, 0))
                        .map_err(on_map("read", "META"))
                })
                .is_ok_and(|meta| meta.layout == LAYOUT)
    }

    /// Removes the pinned maps. Programs that still run keep theirs until they are replaced.
    pub(super) fn discard_maps(&self) -> Result<(), DatapathError> {
        for entry in fs::read_dir(&self.maps).map_err(on_file("list", &self.maps))? {
            let path = entry.map_err(on_file("list", &self.maps))?.path();
            remove(&path)?;
        }
        Ok(())
    }
}

/// Removes a pin; one that is gone already is fine.
pub(super) fn remove(path: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(on_file("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
