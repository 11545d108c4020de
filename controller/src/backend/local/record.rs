//! What is leased to whom: address, user ids, interface. One file per sandbox, so that a later process adopts
//! what is still there and finds what is left over.

use std::{
    collections::HashMap,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use ipnet::{Ipv4Net, Ipv6Net};
use sandgate_api::{agent::AGENT_PORT, feed::Endpoint, id::SandboxId};
use serde::{Deserialize, Serialize};

use super::{layout::Layout, process::Process};
use crate::backend::LaunchMetrics;

/// User and group ids of one sandbox.
pub(super) const IDS: u32 = 65_536;
/// First id of the first range: above those of people and services.
const FIRST_ID: u32 = 1_000_000;
/// How many ranges fit below the highest id.
const RANGES: u32 = 65_500;
/// File name of a record.
const FILE: &str = "lease.json";

/// A sandbox as far as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) sandbox_id: SandboxId,
    /// Place in the range of addresses. Everything else that must be unique follows from it.
    pub(super) index: u32,
    pub(super) address: Ipv4Addr,
    /// Its second address. Records of before there were any have none.
    #[serde(default)]
    pub(super) address6: Option<Ipv6Addr>,
    /// Ethernet address of the sandbox's end.
    pub(super) mac: [u8; 6],
    /// First of its [`IDS`] user and group ids on the node.
    pub(super) first_id: u32,
    /// Name of the router end.
    pub(super) interface: String,
    /// Index of the router end; 0 until it is there.
    pub(super) ifindex: u32,
    /// Its PID 1, once there was one.
    pub(super) process: Option<Process>,
}

impl Record {
    /// The user id on the node of the user `inside` in the sandbox.
    pub(super) fn id_outside(&self, inside: u32) -> u32 {
        self.first_id + inside
    }

    pub(super) fn endpoint(&self) -> Option<Endpoint> {
        (self.ifindex != 0).then(|| Endpoint {
            ifindex: self.ifindex,
            interface: self.interface.clone(),
            address: self.address,
            address6: self.address6,
            mac: self.mac,
            agent_port: AGENT_PORT,
        })
    }

    /// Writes the record, whole or not at all.
    pub(super) fn save(&self, layout: &Layout) -> io::Result<()> {
        let folder = layout.record(self.sandbox_id.as_str());
        fs::create_dir_all(&folder)?;
        replace(&folder.join(FILE), &serde_json::to_vec(self)?)
    }

    /// Reads the record of an earlier process. None: there is none, or only a part of one.
    fn load(layout: &Layout, name: &str) -> Option<Self> {
        let bytes = fs::read(layout.record(name).join(FILE)).ok()?;
        let record: Self = serde_json::from_slice(&bytes).ok()?;
        (record.sandbox_id.as_str() == name).then_some(record)
    }
}

/// Writes beside the file and renames. Two writers at once do not disturb each other; the later one stays.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let beside = path.with_extension(format!("new{}", SERIAL.fetch_add(1, Ordering::Relaxed)));
    let written = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // What failed to be written may have failed to exist.
        let _absent = fs::remove_file(&beside);
    }
    written
}

/// A sandbox known to this process.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) record: Record,
    pub(super) metrics: LaunchMetrics,
}

/// Where the addresses are that are leased.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    /// Of every sandbox.
    pub(super) range: Ipv4Net,
    /// Of those that have a second one.
    pub(super) range6: Option<Ipv6Net>,
    /// Whether new sandboxes get one.
    pub(super) gives6: bool,
}

/// All leases of this instance.
#[derive(Debug)]
pub(super) struct Leases {
    addresses: Addresses,
    /// Where this instance's ranges of ids begin, so that two instances rarely share one.
    offset: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    known: HashMap<SandboxId, Known>,
    cursor: u32,
}

/// Why there is no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoLease {
    /// The id has one already.
    Taken,
    /// Every address is leased.
    Exhausted,
}

impl Leases {
    /// Adopts what earlier processes left.
    ///
    /// What lies outside the ranges is not adopted: a sandbox by its first address, and one's second address, without
    /// which its IPv6 packets are dropped.
    pub(super) fn open(layout: &Layout, addresses: Addresses) -> io::Result<Self> {
        let Addresses { range, range6, .. } = addresses;
        let mut known = HashMap::new();
        for entry in fs::read_dir(layout.records())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let record = Record::load(layout, &name).filter(|record| range.contains(&record.address));
            if let Some(mut record) = record {
                record.address6 = record
                    .address6
                    .filter(|address| range6.is_some_and(|range| range.contains(address)));
                let metrics = LaunchMetrics::default();
                known.insert(record.sandbox_id.clone(), Known { record, metrics });
            }
        }
        let cursor = fs::read_to_string(layout.cursor())
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let offset = layout.instance().bytes().fold(0_u32, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u32::from(byte))
        });
        Ok(Self {
            addresses,
            offset,
            inner: Mutex::new(Inner {
                known,
                cursor: cursor.unwrap_or(0),
            }),
        })
    }

    /// Leases the next address in the ring: one that was given back is the last to be used again.
    pub(super) fn take(&self, id: &SandboxId) -> Result<Record, NoLease> {
        let mut inner = self.lock();
        if inner.known.contains_key(id) {
            return Err(NoLease::Taken);
        }
        let range = self.addresses.range;
        let size = 1_u32 << (32 - u32::from(range.prefix_len()));
        let taken: Vec<u32> = inner.known.values().map(|known| known.record.index).collect();
        let index = (1..=size)
            .map(|step| (inner.cursor + step) % size)
            .find(|index| usable(range, *index) && !taken.contains(index))
            .ok_or(NoLease::Exhausted)?;
        inner.cursor = index;
        let record = self.record(id, index);
        let metrics = LaunchMetrics::default();
        inner.known.insert(
            id.clone(),
            Known {
                record: record.clone(),
                metrics,
            },
        );
        Ok(record)
    }

    fn record(&self, id: &SandboxId, index: u32) -> Record {
        let [_, _, high, low] = index.to_be_bytes();
        let Addresses {
            range,
            range6,
            gives6,
        } = self.addresses;
        let network6 = range6.filter(|_| gives6).map(|range| range.network());
        Record {
            sandbox_id: id.clone(),
            index,
            address: Ipv4Addr::from_bits(range.network().to_bits() + index),
            address6: network6.map(|network| Ipv6Addr::from_bits(network.to_bits() + u128::from(index))),
            mac: [0x02, 0x53, 0x47, 0x01, high, low],
            first_id: FIRST_ID + IDS * (self.offset.wrapping_add(index) % RANGES),
            interface: interface(id),
            ifindex: 0,
            process: None,
        }
    }

    /// Whether new sandboxes get an IPv6 address.
    pub(super) fn gives6(&self) -> bool {
        self.addresses.gives6
    }

    /// The position in the ring, to be kept over a restart.
    pub(super) fn cursor(&self) -> u32 {
        self.lock().cursor
    }

    pub(super) fn get(&self, id: &SandboxId) -> Option<Known> {
        self.lock().known.get(id).cloned()
    }

    /// Changes what is known of a sandbox; nothing when it is gone.
    pub(super) fn change(&self, id: &SandboxId, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().known.get_mut(id) {
            change(known);
        }
    }

    /// Gives the lease back.
    pub(super) fn release(&self, id: &SandboxId) {
        self.lock().known.remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Addresses that end in .0 or .255 look like networks and broadcasts to some software.
fn usable(range: Ipv4Net, index: u32) -> bool {
    let last = Ipv4Addr::from_bits(range.network().to_bits() + index).octets()[3];
    let at_the_edge = index == 0 || range.network().to_bits() + index == range.broadcast().to_bits();
    !at_the_edge && last != 0 && last != 255
}

/// Name of the router end: `sg` and the end of the id, at most 15 characters (IFNAMSIZ).
pub(super) fn interface(id: &SandboxId) -> String {
    let id = id.as_str().trim_start_matches(SandboxId::PREFIX);
    format!("sg{}", &id[id.len().saturating_sub(12)..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(range: &str, range6: Option<&str>) -> Addresses {
        Addresses {
            range: range.parse().unwrap(),
            range6: range6.map(|range| range.parse().unwrap()),
            gives6: range6.is_some(),
        }
    }

    fn leases(folder: &Path, range: &str) -> (Layout, Leases) {
        let layout = Layout::new(&folder.join("run"), &folder.join("data"));
        fs::create_dir_all(layout.records()).unwrap();
        let leases = Leases::open(&layout, addresses(range, Some("fd00:1::/64"))).unwrap();
        (layout, leases)
    }

    #[test]
    fn an_address_that_was_given_back_is_the_last_to_be_leased_again() {
        let folder = tempfile::tempdir().unwrap();
        let (_, leases) = leases(folder.path(), "203.0.113.0/28");
        let mut seen = Vec::new();
        for _ in 0..14 {
            let id = SandboxId::random();
            seen.push(leases.take(&id).unwrap().address);
            leases.release(&id);
        }
        let mut distinct = seen.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 14, "{seen:?}");
        assert!(!seen.contains(&Ipv4Addr::new(203, 0, 113, 0)));
        assert!(!seen.contains(&Ipv4Addr::new(203, 0, 113, 15)));
        assert_eq!(leases.take(&SandboxId::random()).unwrap().address, seen[0]);
    }

    #[test]
    fn no_two_sandboxes_share_anything() {
        let folder = tempfile::tempdir().unwrap();
        let (_, leases) = leases(folder.path(), "203.0.113.0/28");
        let records: Vec<Record> = (0..14)
            .map(|_| leases.take(&SandboxId::random()).unwrap())
            .collect();
        assert_eq!(leases.take(&SandboxId::random()), Err(NoLease::Exhausted));
        for (position, one) in records.iter().enumerate() {
            assert_eq!(leases.take(&one.sandbox_id), Err(NoLease::Taken));
            for other in &records[position + 1..] {
                assert_ne!(one.address, other.address);
                assert_ne!(one.address6, other.address6);
                assert_ne!(one.mac, other.mac);
                assert_ne!(one.interface, other.interface);
                assert!(one.first_id.abs_diff(other.first_id) >= IDS);
            }
        }
    }

    #[test]
    fn a_later_process_adopts_the_records() {
        let folder = tempfile::tempdir().unwrap();
        let (layout, first) = leases(folder.path(), "10.213.0.0/16");
        let mut record = first.take(&SandboxId::random()).unwrap();
        record.ifindex = 7;
        record.save(&layout).unwrap();
        fs::create_dir_all(layout.record("sandbox-halfmade")).unwrap();
        let second = Leases::open(&layout, addresses("10.213.0.0/16", Some("fd00:1::/64"))).unwrap();
        assert_eq!(second.get(&record.sandbox_id).unwrap().record, record);
        assert_eq!(second.lock().known.len(), 1);
        assert_eq!(
            second.get(&record.sandbox_id).unwrap().record.endpoint(),
            record.endpoint()
        );
        assert!(record.endpoint().is_some());
    }

    #[test]
    fn the_second_address_follows_from_the_same_place_and_is_kept_while_its_range_is() {
        let folder = tempfile::tempdir().unwrap();
        let (layout, first) = leases(folder.path(), "10.213.0.0/16");
        let record = first.take(&SandboxId::random()).unwrap();
        assert_eq!(record.address, Ipv4Addr::new(10, 213, 0, 1));
        assert_eq!(record.address6, "fd00:1::1".parse().ok());
        record.save(&layout).unwrap();
        let adopted = |range6, gives6| {
            let addresses = Addresses {
                gives6,
                ..addresses("10.213.0.0/16", range6)
            };
            let later = Leases::open(&layout, addresses).unwrap();
            let given = later.take(&SandboxId::random()).unwrap().address6;
            (later.get(&record.sandbox_id).unwrap().record.address6, given)
        };
        // A node that has lost its default route.
        assert_eq!(adopted(Some("fd00:1::/64"), false), (record.address6, None));
        assert_eq!(adopted(Some("fd00:2::/64"), true).0, None);
        assert_eq!(adopted(None, false), (None, None));
        // Written before there were second addresses.
        let path = layout.record(record.sandbox_id.as_str()).join(FILE);
        let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        old.as_object_mut().unwrap().remove("address6");
        fs::write(&path, old.to_string()).unwrap();
        assert_eq!(adopted(Some("fd00:1::/64"), true).0, None);
    }

    #[test]
    fn many_writers_of_one_file_all_succeed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::thread::scope(|scope| {
            for number in 0..8_u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..200 {
                        replace(path, &[number; 64]).unwrap();
                    }
                });
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert!(
            bytes.len() == 64 && bytes.iter().all(|byte| *byte == bytes[0]),
            "{bytes:?}"
        );
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "something was left beside it"
        );
    }

    #[test]
    fn ids_and_names_stay_within_their_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let (_, leases) = leases(folder.path(), "10.213.0.0/16");
        for index in [1, 65_534] {
            let record = leases.record(&SandboxId::random(), index);
            assert!(
                record
                    .first_id
                    .checked_add(IDS - 1)
                    .is_some_and(|last| last < u32::MAX - 1)
            );
            assert_eq!(record.interface.len(), 14);
        }
    }
}
