//! Denials, read from the kernel: single ones from the ring, and those that were too fast for it from their counters.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, RingBuf};
use netd_common::{Address, Event, NO_ADDRESS, Reported, Suppressed, SuppressedTable, reason};

use super::{DatapathError, DenyEvent, address::from_wire, error::on_map, pins::Pins, reasons};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// How long the reader sleeps between two looks at the ring; the kernel wakes nobody for an event.
const LOOK: Duration = Duration::from_millis(20);
/// How often suppressed denials are collected.
const SWEEP: Duration = Duration::from_millis(250);
/// The most events of one batch.
const BATCH: usize = 4096;

/// Reads denials. There should be one reader; several would share the events between them.
pub struct EventReader {
    ring: RingBuf<MapData>,
    sweep: SharedSweep,
    last_sweep: Instant,
}

impl EventReader {
    pub(super) fn open(pins: &Pins, sweep: SharedSweep) -> Result<Self, DatapathError> {
        let map = Map::RingBuf(pins.map("EVENTS")?);
        let ring = RingBuf::try_from(map).map_err(on_map("open", "EVENTS"))?;
        Ok(Self {
            ring,
            sweep,
            last_sweep: Instant::now(),
        })
    }

    /// Waits up to `timeout` for denials and returns those there are, at most a few thousand at a time. Blocking:
    /// belongs on a thread of its own.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Vec<DenyEvent>, DatapathError> {
        let deadline = Instant::now() + timeout;
        let mut batch = Vec::new();
        loop {
            while batch.len() < BATCH
                && let Some(item) = self.ring.next()
            {
                batch.extend(decode(&item));
            }
            if self.last_sweep.elapsed() >= SWEEP {
                self.last_sweep = Instant::now();
                batch.extend(self.sweep.lock().collect()?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !batch.is_empty() || left.is_zero() {
                return Ok(batch);
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// An event as it stands in the ring; `None` for one of another size, which only another layout could have written.
fn decode(bytes: &[u8]) -> Option<DenyEvent> {
    let fields: &[u8; size_of::<Event>()] = bytes.try_into().ok()?;
    let word = |at: usize| [fields[at], fields[at + 1], fields[at + 2], fields[at + 3]];
    let half = |at: usize| u16::from_ne_bytes([fields[at], fields[at + 1]]);
    let address = |at: usize| [0, 4, 8, 12].map(|step| u32::from_ne_bytes(word(at + step)));
    let ethertype = half(52);
    let end = |at: usize, port: usize| SocketAddr::new(named(address(at), ethertype), half(port));
    let mut time = [0; 8];
    time.copy_from_slice(&fields[..8]);
    Some(DenyEvent {
        monotonic: Duration::from_nanos(u64::from_ne_bytes(time)),
        ordinal: u32::from_ne_bytes(word(8)),
        ifindex: u32::from_ne_bytes(word(12)),
        src: end(16, 48),
        dst: end(32, 50),
        ethertype,
        protocol: fields[54],
        reason: reasons::from_code(fields[55]),
        audit: fields[56] != 0,
        repeated: 1,
    })
}

/// The address in a packet of a type; unspecified when none was read.
fn named(address: Address, ethertype: u16) -> IpAddr {
    match (address, ethertype) {
        (NO_ADDRESS, IPV6) => Ipv6Addr::UNSPECIFIED.into(),
        (NO_ADDRESS, _) => Ipv4Addr::UNSPECIFIED.into(),
        (address, _) => from_wire(address),
    }
}

/// Collects suppressed denials: shared between the reader and [`super::Datapath::detach`], which must not lose those
/// of an endpoint that goes.
pub(super) struct Sweep {
    suppressed: PerCpuHashMap<MapData, u32, SuppressedTable>,
    reported: HashMap<MapData, u32, Reported>,
    /// Collected, not yet taken by the reader.
    waiting: Vec<DenyEvent>,
}

/// A [`Sweep`] between threads.
#[derive(Clone)]
pub(super) struct SharedSweep(Arc<Mutex<Sweep>>);

impl SharedSweep {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let suppressed = PerCpuHashMap::try_from(Map::PerCpuHashMap(pins.map("SUPPRESSED")?))
            .map_err(on_map("open", "SUPPRESSED"))?;
        let reported =
            HashMap::try_from(Map::HashMap(pins.map("REPORTED")?)).map_err(on_map("open", "REPORTED"))?;
        Ok(Self(Arc::new(Mutex::new(Sweep {
            suppressed,
            reported,
            waiting: Vec::new(),
        }))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Sweep> {
        // Every state that a panic could leave is one that the next sweep reads correctly.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweep {
    /// Makes room for an endpoint's counts. Before the endpoint itself.
    pub(super) fn add(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| DatapathError::Io {
            action: "count CPUs",
            source,
        })?;
        let zero = PerCpuValues::try_from(vec![SuppressedTable::default(); cpus]).map_err(|source| {
            DatapathError::Io {
                action: "count CPUs",
                source,
            }
        })?;
        self.reported
            .insert(ordinal, Reported::default(), 0)
            .map_err(on_map("write", "REPORTED"))?;
        self.suppressed
            .insert(ordinal, zero, 0)
            .map_err(on_map("write", "SUPPRESSED"))
    }

    pub(super) fn has(&self, ordinal: u32) -> bool {
        self.reported.get(&ordinal, 0).is_ok() && self.suppressed.get(&ordinal, 0).is_ok()
    }

    /// Collects what is left of an endpoint and forgets it. After the endpoint itself.
    pub(super) fn remove(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        self.read(ordinal)?;
        for removed in [self.suppressed.remove(&ordinal), self.reported.remove(&ordinal)] {
            match removed {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(on_map("remove from", "SUPPRESSED")(error)),
            }
        }
        Ok(())
    }

    /// Everything suppressed since the last call.
    fn collect(&mut self) -> Result<Vec<DenyEvent>, DatapathError> {
        let ordinals: Vec<u32> = self
            .suppressed
            .keys()
            .collect::<Result<_, _>>()
            .map_err(on_map("list", "SUPPRESSED"))?;
        for ordinal in ordinals {
            self.read(ordinal)?;
        }
        Ok(std::mem::take(&mut self.waiting))
    }

    fn read(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        let tables = match self.suppressed.get(&ordinal, 0) {
            Ok(tables) => tables,
            Err(MapError::KeyNotFound) => return Ok(()),
            Err(error) => return Err(on_map("read", "SUPPRESSED")(error)),
        };
        let mut reported = match self.reported.get(&ordinal, 0) {
            Err(MapError::KeyNotFound) => Reported::default(),
            other => other.map_err(on_map("read", "REPORTED"))?,
        };
        let mut changed = false;
        for code in 0..reason::COUNT {
            let of_cpus = || tables.iter().map(|table| table.by_reason[code]);
            let total: u64 = of_cpus().map(|suppressed| suppressed.count).sum();
            let fresh = total.saturating_sub(reported.counts[code]);
            let latest = of_cpus().max_by_key(|suppressed| suppressed.time_ns);
            if let (1.., Some(latest)) = (fresh, latest) {
                reported.counts[code] = total;
                changed = true;
                self.waiting.push(aggregate(ordinal, code, fresh, &latest));
            }
        }
        if changed {
            self.reported
                .insert(ordinal, reported, 0)
                .map_err(on_map("write", "REPORTED"))?;
        }
        Ok(())
    }
}

fn aggregate(ordinal: u32, place: usize, repeated: u64, latest: &Suppressed) -> DenyEvent {
    let address = named(latest.destination, 0);
    let ethertype = match address {
        IpAddr::V4(address) if address.is_unspecified() => 0,
        IpAddr::V4(_) => IPV4,
        IpAddr::V6(_) => IPV6,
    };
    DenyEvent {
        ordinal,
        ifindex: 0,
        ethertype,
        protocol: latest.protocol,
        src: (Ipv4Addr::UNSPECIFIED, 0).into(),
        dst: SocketAddr::new(address, latest.destination_port),
        reason: reasons::from_code(latest.reason),
        audit: place == usize::from(reason::AUDITED),
        repeated,
        monotonic: Duration::from_nanos(latest.time_ns),
    }
}

/// Whether a map call failed because the key is not there.
pub(super) fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(call) => call.io_error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_as_the_kernel_writes_it() {
        let event = Event {
            time_ns: 7_000_000_001,
            ordinal: 3,
            ifindex: 9,
            source: netd_common::mapped([10, 213, 0, 1]),
            destination: netd_common::wire6("2001:db8::7".parse::<Ipv6Addr>().unwrap().octets()),
            source_port: 40000,
            destination_port: 443,
            ethertype: 0x0800,
            protocol: 6,
            reason: reason::ADDRESS_NOT_BOUND,
            audit: 1,
            padding: [0; 7],
        };
        let mut bytes = Vec::new();
        bytes.extend(event.time_ns.to_ne_bytes());
        let words = [event.ordinal, event.ifindex];
        for word in words.into_iter().chain(event.source).chain(event.destination) {
            bytes.extend(word.to_ne_bytes());
        }
        for half in [event.source_port, event.destination_port, event.ethertype] {
            bytes.extend(half.to_ne_bytes());
        }
        bytes.extend([event.protocol, event.reason, event.audit]);
        bytes.extend(event.padding);
        let read = decode(&bytes).unwrap();
        assert_eq!(read.src, "10.213.0.1:40000".parse().unwrap());
        assert_eq!(read.dst, "[2001:db8::7]:443".parse().unwrap());
        assert!(read.audit);
        assert_eq!(
            (read.ordinal, read.ifindex, read.protocol, read.ethertype),
            (3, 9, 6, 0x0800)
        );
        assert_eq!(read.reason, sandgate_policy::Reason::AddressNotBound);
        assert_eq!(read.monotonic, Duration::from_nanos(7_000_000_001));
        assert_eq!(decode(&bytes[1..]), None);
    }
}
