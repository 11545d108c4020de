//! Flows that the kernel forwards: finds those that have ended, gives them back and removes them. The programs make and
//! count them; nothing here lets a packet through. Looking through hundreds of thousands takes a while, and holds up nothing
//! else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use netd_common::{Flow, FlowKey};
use nix::time::{ClockId, clock_gettime};
use sandgate_policy::Protocol;

use super::{
    DatapathError, EndedFlow, EndpointHandle, FlowEnd, address::from_wire, batch, error::on_map,
    events::is_missing, pins::Pins, tables::missing_is_fine,
};

/// `BPF_EXIST` of linux/bpf.h: only what is there is written.
const PRESENT: u64 = 2;
/// In so many calls of [`Flows::ended`] all flows there can be are looked at.
pub(super) const LOOKS: usize = 8;
/// Entries that one of them looks at, so that it takes tens of milliseconds at most.
const LOOKED_AT: usize = netd_common::limit::FLOWS / LOOKS;

/// Place of all endpoints together among the counts.
const TOGETHER: u32 = 0;
const TCP: u8 = 6;

/// How long a connection that both sides have closed, or the other end has reset, may still send what is left.
const LINGER: Duration = Duration::from_secs(2);
/// The same after a reset of the sandbox's, which nobody but the other end knows to be one of the connection's
/// (RFC 9293, 3.10.7.4): one out of its window ends nothing there, nor in the node's connection tracking.
const RESET_UP_LINGER: Duration = Duration::from_secs(60);
/// Silence after which a connection is taken for dead. RFC 5382, 5: no less than 2 h 4 min would be kind to those that
/// send TCP's own keep-alives every two hours.
const TCP_IDLE: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// The same before the other end has answered.
const TCP_UNANSWERED: Duration = Duration::from_secs(120);
/// Silence after which datagrams are of a new flow.
const UDP_IDLE: Duration = Duration::from_secs(60);
/// The same before the other end has answered.
const UDP_UNANSWERED: Duration = Duration::from_secs(30);

/// How many flows each endpoint has made, and how many of them are gone.
pub(super) struct Counts {
    made: HashMap<MapData, u32, u64>,
    freed: HashMap<MapData, u32, u64>,
}

/// The flows themselves.
pub(super) struct Flows {
    entries: MapData,
    counts: Counts,
    /// Where to look next.
    place: batch::Place,
}

/// The endpoints in force at some moment.
pub(super) struct Living {
    pub(super) ordinals: BTreeSet<u32>,
    /// The last ordinal given out by then: what is beyond has come since, and lives.
    pub(super) newest: u32,
}

impl Living {
    fn has(&self, ordinal: u32) -> bool {
        ordinal > self.newest || self.ordinals.contains(&ordinal)
    }
}

impl Counts {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |name| HashMap::try_from(Map::HashMap(pins.map(name)?)).map_err(on_map("open", name));
        Ok(Self {
            made: open("FLOW_COUNTS")?,
            freed: open("FLOWS_FREED")?,
        })
    }

    /// Makes room for an endpoint's flows. Before the endpoint itself.
    pub(super) fn add(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        self.freed
            .insert(ordinal, 0, 0)
            .map_err(on_map("write", "FLOWS_FREED"))?;
        self.made
            .insert(ordinal, 0, 0)
            .map_err(on_map("write", "FLOW_COUNTS"))
    }

    /// Forgets an endpoint. Its entries are no use to any other, and go with the next [`Flows::ended`].
    pub(super) fn remove(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        missing_is_fine("FLOW_COUNTS", self.made.remove(&ordinal))?;
        missing_is_fine("FLOWS_FREED", self.freed.remove(&ordinal))
    }

    fn made(&self, ordinals: &[u32]) -> Result<BTreeMap<u32, u64>, DatapathError> {
        let read = |ordinal: &u32| {
            self.made
                .get(ordinal, 0)
                .map(|made| (*ordinal, made))
                .map_err(on_map("read", "FLOW_COUNTS"))
        };
        ordinals.iter().map(read).collect()
    }

    /// Counts some as freed; those of an endpoint that has gone meanwhile count no more.
    fn free(&mut self, ordinal: u32, count: u64) -> Result<(), DatapathError> {
        let Ok(before) = self.freed.get(&ordinal, 0) else {
            return Ok(());
        };
        match self.freed.insert(ordinal, before.wrapping_add(count), PRESENT) {
            Err(error) if !is_missing(&error) => Err(on_map("write", "FLOWS_FREED")(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl Flows {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self {
            entries: pins.map("FLOWS")?,
            counts: Counts::open(pins)?,
            place: None,
        })
    }

    /// After a start: makes the counts of all endpoints those of the entries, which an earlier netd may have removed
    /// without counting.
    pub(super) fn recount(&mut self, living: &Living) -> Result<(), DatapathError> {
        let ordinals: Vec<u32> = living.ordinals.iter().copied().chain([TOGETHER]).collect();
        for ordinal in &ordinals {
            if self.counts.made.get(ordinal, 0).is_err() {
                self.counts.add(*ordinal)?;
            }
        }
        // The programs go on making some: the counts of a moment without are taken.
        for _ in 0..8 {
            let made = self.counts.made(&ordinals)?;
            let mut live: BTreeMap<u32, u64> = BTreeMap::new();
            batch::each(&self.entries, |key: &FlowKey, _: &Flow| {
                *live.entry(key.ordinal).or_default() += 1;
                *live.entry(TOGETHER).or_default() += 1;
            })
            .map_err(on_map("list", "FLOWS"))?;
            if self.counts.made(&ordinals)? == made {
                for (ordinal, made) in made {
                    let freed = made.wrapping_sub(live.get(&ordinal).copied().unwrap_or(0));
                    self.counts
                        .freed
                        .insert(ordinal, freed, 0)
                        .map_err(on_map("write", "FLOWS_FREED"))?;
                }
                break;
            }
        }
        Ok(())
    }

    /// Removes those that have ended and gives them. Of very many it looks at a part, and at the next when it is called
    /// again.
    pub(super) fn ended(&mut self, living: &Living) -> Result<Vec<EndedFlow>, DatapathError> {
        let made = self
            .counts
            .made
            .get(&TOGETHER, 0)
            .map_err(on_map("read", "FLOW_COUNTS"))?;
        let freed = self
            .counts
            .freed
            .get(&TOGETHER, 0)
            .map_err(on_map("read", "FLOWS_FREED"))?;
        if made == freed {
            return Ok(Vec::new());
        }
        let now = monotonic()?;
        let mut gone = Vec::new();
        let mut ended = Vec::new();
        batch::some(
            &self.entries,
            &mut self.place,
            LOOKED_AT,
            |key: &FlowKey, flow: &Flow| {
                if let Some(why) = end_of(key, flow, living.has(key.ordinal), now) {
                    gone.push(*key);
                    ended.push(told(key, flow, why));
                }
            },
        )
        .map_err(on_map("list", "FLOWS"))?;
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        for key in &gone {
            *counts.entry(TOGETHER).or_default() += 1;
            *counts.entry(key.ordinal).or_default() += 1;
        }
        // First the entries: until they are counted as freed too, there is room for fewer, not for more.
        batch::remove(&self.entries, &gone).map_err(on_map("remove from", "FLOWS"))?;
        for (ordinal, count) in counts {
            self.counts.free(ordinal, count)?;
        }
        Ok(ended)
    }
}

fn monotonic() -> Result<Duration, DatapathError> {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .map_err(|errno| DatapathError::Io {
            action: "read the monotonic clock",
            source: errno.into(),
        })
}

/// Whether and how a flow has ended.
fn end_of(key: &FlowKey, flow: &Flow, of_living: bool, now: Duration) -> Option<FlowEnd> {
    let silent = now.saturating_sub(last_seen(flow));
    let answered = flow.down_packets > 0;
    let patience = match (key.protocol == TCP, answered) {
        (true, true) => TCP_IDLE,
        (true, false) => TCP_UNANSWERED,
        (false, true) => UDP_IDLE,
        (false, false) => UDP_UNANSWERED,
    };
    let after_reset = if flow.reset == Flow::RESET_DOWN {
        LINGER
    } else {
        RESET_UP_LINGER
    };
    if !of_living {
        Some(FlowEnd::EndpointGone)
    } else if flow.cut != 0 {
        Some(FlowEnd::PolicyTightened)
    } else if flow.reset != 0 && silent >= after_reset {
        Some(FlowEnd::Reset)
    } else if flow.up_fin != 0 && flow.down_fin != 0 && silent >= LINGER {
        Some(FlowEnd::Closed)
    } else if silent >= patience {
        Some(FlowEnd::Idle)
    } else {
        None
    }
}

fn last_seen(flow: &Flow) -> Duration {
    Duration::from_nanos(flow.up_ns.max(flow.down_ns))
}

fn told(key: &FlowKey, flow: &Flow, why: FlowEnd) -> EndedFlow {
    let began = Duration::from_nanos(flow.began_ns);
    EndedFlow {
        endpoint: EndpointHandle {
            ordinal: key.ordinal,
            ifindex: flow.ifindex,
        },
        protocol: if key.protocol == TCP {
            Protocol::Tcp
        } else {
            Protocol::Udp
        },
        src: SocketAddr::new(from_wire(flow.sandbox), key.sandbox_port),
        dst: SocketAddr::new(from_wire(key.remote), key.remote_port),
        began,
        lasted: last_seen(flow).saturating_sub(began),
        up: flow.up_bytes,
        down: flow.down_bytes,
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_000_000);

    fn end(protocol: u8, silent: Duration, change: impl FnOnce(&mut Flow)) -> Option<FlowEnd> {
        let key = FlowKey {
            ordinal: 1,
            remote: [0; 4],
            remote_port: 443,
            sandbox_port: 40_000,
            protocol,
            padding: [0; 3],
        };
        let mut flow = Flow {
            up_ns: u64::try_from((NOW - silent).as_nanos()).unwrap(),
            ..Flow::default()
        };
        change(&mut flow);
        end_of(&key, &flow, true, NOW)
    }

    #[test]
    fn a_flow_ends_by_its_flags_or_by_its_silence() {
        let answered = |flow: &mut Flow| flow.down_packets = 1;
        let second = Duration::from_secs(1);
        assert_eq!(end(TCP, second * 119, |_| ()), None);
        assert_eq!(end(TCP, second * 120, |_| ()), Some(FlowEnd::Idle));
        assert_eq!(end(TCP, second * 7439, answered), None);
        assert_eq!(end(TCP, second * 7440, answered), Some(FlowEnd::Idle));
        assert_eq!(end(17, second * 29, |_| ()), None);
        assert_eq!(end(17, second * 30, |_| ()), Some(FlowEnd::Idle));
        assert_eq!(end(17, second * 59, answered), None);
        assert_eq!(end(17, second * 60, answered), Some(FlowEnd::Idle));
        let closed = |flow: &mut Flow| (flow.up_fin, flow.down_fin) = (1, 1);
        assert_eq!(end(TCP, second, closed), None);
        assert_eq!(end(TCP, second * 2, closed), Some(FlowEnd::Closed));
        let half = |flow: &mut Flow| flow.up_fin = 1;
        assert_eq!(end(TCP, second * 2, half), None);
        let own_reset = |flow: &mut Flow| flow.reset = Flow::RESET_UP;
        assert_eq!(end(TCP, second * 59, own_reset), None);
        assert_eq!(end(TCP, second * 60, own_reset), Some(FlowEnd::Reset));
        let reset = |flow: &mut Flow| flow.reset = Flow::RESET_DOWN;
        assert_eq!(end(TCP, second, reset), None);
        assert_eq!(end(TCP, second * 2, reset), Some(FlowEnd::Reset));
        let cut = |flow: &mut Flow| flow.cut = 1;
        assert_eq!(end(TCP, Duration::ZERO, cut), Some(FlowEnd::PolicyTightened));
    }
}
