//! The maps that say what is allowed, and what netd remembers of them so that nothing is left behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd, BorrowedFd},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SockMap, lpm_trie::Key};
use ipnet::Ipv6Net;
use netd_common::{
    Address, BoundKey, Counter, Endpoint, InboundKey, LAYOUT, Meta, NO_ADDRESS, PlatformEntry, Throttle,
    Uplink, counter, wire, wire6,
};
use sandgate_policy::KernelTable;

use super::{
    Counters, DatapathError, EndpointHandle,
    address::{from_wire, ipv4_from_wire, to_wire},
    batch,
    error::on_map,
    events::is_missing,
    flows::{Counts, Living},
    pins::Pins,
    policies::{Policies, PolicyContent},
};

/// Reopens a pinned map under its kind.
macro_rules! open {
    ($pins:expr, $kind:ident, $variant:ident, $name:literal) => {
        $kind::try_from(Map::$variant($pins.map($name)?)).map_err(on_map("open", $name))?
    };
}

/// Of one endpoint, beside what stands in its map entry.
#[derive(Default)]
struct Belongings {
    bound: BTreeSet<IpAddr>,
    inbound: Vec<InboundKey>,
}

/// All maps but those of events.
pub(super) struct Tables {
    endpoints: HashMap<MapData, u32, Endpoint>,
    policies: Policies,
    addresses: HashMap<MapData, Address, u32>,
    platform: LpmTrie<MapData, Address, PlatformEntry>,
    bound: HashMap<MapData, BoundKey, u32>,
    /// The same, for many entries at once.
    bound_entries: MapData,
    inbound: HashMap<MapData, InboundKey, u64>,
    flow_counts: Counts,
    uplink: Array<MapData, Uplink>,
    listeners: SockMap<MapData>,
    throttles: HashMap<MapData, u32, Throttle>,
    counters: PerCpuArray<MapData, Counter>,
    meta: Array<MapData, Meta>,
    /// Mirror of `endpoints`.
    known: BTreeMap<u32, Endpoint>,
    /// By ordinal.
    belongings: BTreeMap<u32, Belongings>,
}

impl Tables {
    /// Reopens the pinned maps and reads what they hold.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let mut tables = Self {
            endpoints: open!(pins, HashMap, HashMap, "ENDPOINTS"),
            policies: Policies::new(open!(pins, LpmTrie, LpmTrie, "POLICIES"), pins.map("POLICIES")?),
            addresses: open!(pins, HashMap, HashMap, "ADDRESSES"),
            platform: open!(pins, LpmTrie, LpmTrie, "PLATFORM"),
            bound: open!(pins, HashMap, HashMap, "BOUND"),
            bound_entries: pins.map("BOUND")?,
            inbound: open!(pins, HashMap, HashMap, "INBOUND"),
            flow_counts: Counts::open(pins)?,
            uplink: open!(pins, Array, Array, "UPLINK"),
            listeners: open!(pins, SockMap, SockMap, "LISTENERS"),
            throttles: open!(pins, HashMap, HashMap, "THROTTLES"),
            counters: open!(pins, PerCpuArray, PerCpuArray, "COUNTERS"),
            meta: open!(pins, Array, Array, "META"),
            known: BTreeMap::new(),
            belongings: BTreeMap::new(),
        };
        for entry in tables.endpoints.iter() {
            let (ifindex, endpoint) = entry.map_err(on_map("list", "ENDPOINTS"))?;
            tables.known.insert(ifindex, endpoint);
            tables.belongings.insert(endpoint.ordinal, Belongings::default());
        }
        Ok(tables)
    }

    /// Removes what no endpoint owns, and finds what each owns. After a start.
    pub(super) fn tidy(&mut self) -> Result<(), DatapathError> {
        let mut users = BTreeMap::new();
        for known in self.known.values() {
            *users.entry(known.policy).or_insert(0) += 1;
        }
        self.policies.adopt(&users)?;

        let bound: Vec<BoundKey> = self
            .bound
            .keys()
            .collect::<Result<_, _>>()
            .map_err(on_map("list", "BOUND"))?;
        for key in bound {
            match self.belongings.get_mut(&key.ordinal) {
                Some(owner) => {
                    owner.bound.insert(from_wire(key.address));
                }
                None => missing_is_fine("BOUND", self.bound.remove(&key))?,
            }
        }
        let addresses: Vec<Address> = self
            .addresses
            .keys()
            .collect::<Result<_, _>>()
            .map_err(on_map("list", "ADDRESSES"))?;
        for address in addresses {
            if self.owner(from_wire(address)).is_none() {
                missing_is_fine("ADDRESSES", self.addresses.remove(&address))?;
            }
        }
        // The sockets of these connections ended with the netd that opened them, or were passed on and are closed by
        // whoever holds them; those that live on keep their admission until the endpoint goes.
        let inbound: Vec<InboundKey> = self
            .inbound
            .keys()
            .collect::<Result<_, _>>()
            .map_err(on_map("list", "INBOUND"))?;
        for key in inbound {
            match self.belongings.get_mut(&key.ordinal) {
                Some(owner) => owner.inbound.push(key),
                None => missing_is_fine("INBOUND", self.inbound.remove(&key))?,
            }
        }
        Ok(())
    }

    /// Says that the pins can be adopted from here on.
    pub(super) fn complete(&mut self) -> Result<(), DatapathError> {
        self.change_meta(|meta| meta.layout = LAYOUT).map(drop)
    }

    fn change_meta(&mut self, change: impl FnOnce(&mut Meta)) -> Result<Meta, DatapathError> {
        change_meta(&mut self.meta, change)
    }

    /// An ordinal never given out before.
    pub(super) fn next_ordinal(&mut self) -> Result<u32, DatapathError> {
        let exhausted =
            || DatapathError::Table("all ordinals are used up; `controller down` starts anew".to_owned());
        let next = self.meta.get(&0, 0).map_err(on_map("read", "META"))?.last_ordinal;
        let next = next.checked_add(1).ok_or_else(exhausted)?;
        self.change_meta(|meta| meta.last_ordinal = next)?;
        Ok(next)
    }

    pub(super) fn set_listener(&mut self, index: u32, socket: BorrowedFd<'_>) -> Result<(), DatapathError> {
        self.listeners
            .set(index, &socket.as_raw_fd(), 0)
            .map_err(on_map("write", "LISTENERS"))
    }

    pub(super) fn add_throttle(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        self.throttles
            .insert(ordinal, Throttle::default(), 0)
            .map_err(on_map("write", "THROTTLES"))
    }

    /// The entry of an interface.
    pub(super) fn endpoint(&self, ifindex: u32) -> Option<&Endpoint> {
        self.known.get(&ifindex)
    }

    /// The interface that holds an address.
    pub(super) fn owner(&self, address: IpAddr) -> Option<u32> {
        let address = to_wire(address);
        self.known
            .iter()
            .find(|(_, known)| known.address == address || known.address6 == address)
            .map(|(ifindex, _)| *ifindex)
    }

    /// The endpoints in force.
    pub(super) fn living(&self) -> Result<Living, DatapathError> {
        let meta = self.meta.get(&0, 0).map_err(on_map("read", "META"))?;
        Ok(Living {
            ordinals: self.known.values().map(|known| known.ordinal).collect(),
            newest: meta.last_ordinal,
        })
    }

    /// Says where packets leave that the programs may forward.
    pub(super) fn set_uplink(&mut self, uplink: Uplink) -> Result<(), DatapathError> {
        self.uplink.set(0, uplink, 0).map_err(on_map("write", "UPLINK"))
    }

    /// What the programs were told; no interface: nothing leaves.
    pub(super) fn uplink(&self) -> Result<Uplink, DatapathError> {
        self.uplink.get(&0, 0).map_err(on_map("read", "UPLINK"))
    }

    pub(super) fn known(&self) -> Vec<(EndpointHandle, Ipv4Addr)> {
        self.known
            .iter()
            .map(|(&ifindex, known)| {
                let handle = EndpointHandle {
                    ordinal: known.ordinal,
                    ifindex,
                };
                (handle, ipv4_from_wire(known.address))
            })
            .collect()
    }

    /// Makes the endpoint known: from here on its packets are judged, by a policy that allows nothing.
    pub(super) fn add_endpoint(
        &mut self,
        ifindex: u32,
        ordinal: u32,
        (address, address6): (Address, Address),
        mac: [u8; 6],
    ) -> Result<(), DatapathError> {
        let entry = Endpoint {
            address,
            address6,
            ordinal,
            policy: 0,
            mac,
            no_new_flows: 0,
        };
        self.flow_counts.add(ordinal)?;
        for address in [address, address6] {
            if address != NO_ADDRESS {
                self.addresses
                    .insert(address, ifindex, 0)
                    .map_err(on_map("write", "ADDRESSES"))?;
            }
        }
        self.endpoints
            .insert(ifindex, entry, 0)
            .map_err(on_map("write", "ENDPOINTS"))?;
        self.known.insert(ifindex, entry);
        self.belongings.insert(ordinal, Belongings::default());
        Ok(())
    }

    /// Makes the interface unknown; returns the ordinal whose belongings are now to be purged.
    pub(super) fn remove_endpoint(&mut self, ifindex: u32) -> Result<u32, DatapathError> {
        missing_is_fine("ENDPOINTS", self.endpoints.remove(&ifindex))?;
        let Some(known) = self.known.remove(&ifindex) else {
            return Ok(0);
        };
        for address in [known.address, known.address6] {
            missing_is_fine("ADDRESSES", self.addresses.remove(&address))?;
        }
        self.policies.release(known.policy);
        Ok(known.ordinal)
    }

    /// Removes everything under an ordinal.
    pub(super) fn purge(&mut self, ordinal: u32) -> Result<(), DatapathError> {
        let Some(belongings) = self.belongings.remove(&ordinal) else {
            return Ok(());
        };
        for key in &belongings.inbound {
            missing_is_fine("INBOUND", self.inbound.remove(key))?;
        }
        let bound: Vec<BoundKey> = belongings
            .bound
            .iter()
            .map(|it| bound_key(ordinal, *it))
            .collect();
        batch::remove(&self.bound_entries, &bound).map_err(on_map("remove from", "BOUND"))?;
        self.flow_counts.remove(ordinal)?;
        missing_is_fine("THROTTLES", self.throttles.remove(&ordinal))
    }

    /// Frees policies that were replaced a while ago.
    pub(super) fn sweep(&mut self) -> Result<(), DatapathError> {
        self.policies.sweep()
    }

    /// The entry of a handle, if it is still the handle's.
    pub(super) fn check(&self, endpoint: EndpointHandle) -> Result<Endpoint, DatapathError> {
        let EndpointHandle { ordinal, ifindex } = endpoint;
        self.known
            .get(&ifindex)
            .filter(|known| known.ordinal == ordinal)
            .copied()
            .ok_or(DatapathError::Detached { ordinal, ifindex })
    }

    fn belongings(&mut self, endpoint: EndpointHandle) -> Result<&mut Belongings, DatapathError> {
        let EndpointHandle { ordinal, ifindex } = endpoint;
        self.check(endpoint)?;
        self.belongings
            .get_mut(&ordinal)
            .ok_or(DatapathError::Detached { ordinal, ifindex })
    }

    /// Rules first, then one update of the endpoint's entry.
    pub(super) fn set_policy(
        &mut self,
        endpoint: EndpointHandle,
        table: &KernelTable,
    ) -> Result<PolicyContent, DatapathError> {
        self.check(endpoint)?;
        let meta = &mut self.meta;
        let (policy, content) = self.policies.take(table, || next_policy(meta))?;
        self.switch(endpoint, policy).map(|()| content)
    }

    /// The same with a policy that is in the kernel already. False: it is not.
    pub(super) fn share_policy(
        &mut self,
        endpoint: EndpointHandle,
        content: PolicyContent,
    ) -> Result<bool, DatapathError> {
        self.check(endpoint)?;
        match self.policies.share(content) {
            Some(policy) => self.switch(endpoint, policy).map(|()| true),
            None => Ok(false),
        }
    }

    /// Switches to a policy that was counted as used by the endpoint.
    fn switch(&mut self, endpoint: EndpointHandle, policy: u32) -> Result<(), DatapathError> {
        let current = self.check(endpoint)?;
        let entry = Endpoint { policy, ..current };
        if entry != current
            && let Err(error) = self.endpoints.insert(endpoint.ifindex, entry, 0)
        {
            self.policies.release(policy);
            return Err(on_map("write", "ENDPOINTS")(error));
        }
        self.known.insert(endpoint.ifindex, entry);
        self.policies.release(current.policy);
        Ok(())
    }

    /// Says whether the programs may forward new flows of the endpoint.
    pub(super) fn allow_new_flows(
        &mut self,
        endpoint: EndpointHandle,
        allowed: bool,
    ) -> Result<(), DatapathError> {
        let current = self.check(endpoint)?;
        let entry = Endpoint {
            no_new_flows: u16::from(!allowed),
            ..current
        };
        if entry != current {
            self.endpoints
                .insert(endpoint.ifindex, entry, 0)
                .map_err(on_map("write", "ENDPOINTS"))?;
            self.known.insert(endpoint.ifindex, entry);
        }
        Ok(())
    }

    /// How many different policies are in the kernel, and how many prefixes they have together.
    pub(super) fn policies(&self) -> (usize, usize) {
        self.policies.size()
    }

    /// With one call of the kernel's, as what follows.
    pub(super) fn bind_all(
        &mut self,
        endpoint: EndpointHandle,
        addresses: &[IpAddr],
    ) -> Result<(), DatapathError> {
        self.check(endpoint)?;
        let keys = bound_keys(endpoint, addresses);
        if let Err(stopped) = batch::insert(&self.bound_entries, &keys, &vec![1_u32; keys.len()]) {
            // Those before the one that it refused.
            let done = keys.get(..stopped.done).unwrap_or_default();
            batch::remove(&self.bound_entries, done).map_err(on_map("remove from", "BOUND"))?;
            return Err(on_map("write", "BOUND")(stopped));
        }
        let addresses = addresses.iter().map(IpAddr::to_canonical);
        self.belongings(endpoint)?.bound.extend(addresses);
        Ok(())
    }

    pub(super) fn unbind_all(
        &mut self,
        endpoint: EndpointHandle,
        addresses: &[IpAddr],
    ) -> Result<(), DatapathError> {
        batch::remove(&self.bound_entries, &bound_keys(endpoint, addresses))
            .map_err(on_map("remove from", "BOUND"))?;
        let belongings = self.belongings(endpoint)?;
        for address in addresses {
            belongings.bound.remove(&address.to_canonical());
        }
        Ok(())
    }

    pub(super) fn unbind_others(
        &mut self,
        endpoint: EndpointHandle,
        keep: &BTreeSet<IpAddr>,
    ) -> Result<(), DatapathError> {
        let bound = &self.belongings(endpoint)?.bound;
        let others: Vec<IpAddr> = bound.difference(keep).copied().collect();
        self.unbind_all(endpoint, &others)
    }

    pub(super) fn admit(
        &mut self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
        cookie: u64,
    ) -> Result<(), DatapathError> {
        self.check(endpoint)?;
        let key = inbound_key(endpoint, sandbox_port, local);
        self.inbound
            .insert(key, cookie, 0)
            .map_err(on_map("write", "INBOUND"))?;
        self.belongings(endpoint)?.inbound.push(key);
        Ok(())
    }

    pub(super) fn revoke(
        &mut self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        let key = inbound_key(endpoint, sandbox_port, local);
        missing_is_fine("INBOUND", self.inbound.remove(&key))?;
        if let Ok(owner) = self.belongings(endpoint) {
            owner.inbound.retain(|other| *other != key);
        }
        Ok(())
    }

    /// Ends every admission to ports that are not to be kept, also those of an earlier netd. Gives the sandbox's port
    /// and netd's end of each.
    pub(super) fn revoke_ports(
        &mut self,
        endpoint: EndpointHandle,
        keep: impl Fn(u16) -> bool,
    ) -> Result<Vec<(u16, SocketAddrV4)>, DatapathError> {
        let gone: Vec<InboundKey> = self
            .belongings(endpoint)?
            .inbound
            .iter()
            .filter(|key| !keep(key.sandbox_port))
            .copied()
            .collect();
        for key in &gone {
            missing_is_fine("INBOUND", self.inbound.remove(key))?;
        }
        self.belongings(endpoint)?
            .inbound
            .retain(|key| keep(key.sandbox_port));
        let local = |key: &InboundKey| {
            SocketAddrV4::new(Ipv4Addr::from(key.local_address.to_ne_bytes()), key.local_port)
        };
        Ok(gone.iter().map(|key| (key.sandbox_port, local(key))).collect())
    }

    /// Every admission in force, those of an earlier netd included: endpoint, local and sandbox end.
    pub(super) fn admissions(&self) -> Vec<(EndpointHandle, SocketAddrV4, SocketAddrV4)> {
        let of_endpoint = |(&ifindex, known): (&u32, &Endpoint)| {
            let ordinal = known.ordinal;
            let address = ipv4_from_wire(known.address);
            let keys = self
                .belongings
                .get(&ordinal)
                .map(|owner| owner.inbound.as_slice());
            let admission = move |key: &InboundKey| {
                let local = Ipv4Addr::from(key.local_address.to_ne_bytes());
                (
                    EndpointHandle { ordinal, ifindex },
                    SocketAddrV4::new(local, key.local_port),
                    SocketAddrV4::new(address, key.sandbox_port),
                )
            };
            keys.unwrap_or_default().iter().map(admission).collect::<Vec<_>>()
        };
        self.known.iter().flat_map(of_endpoint).collect()
    }

    /// Makes the platform map hold these entries. New ones first, so that no denial lapses. Others go, but for denied
    /// single addresses when `keep_nodes`: an earlier netd knew them as the node's, and this one has not looked yet.
    pub(super) fn write_platform(
        &mut self,
        entries: &BTreeMap<Ipv6Net, PlatformEntry>,
        keep_nodes: bool,
    ) -> Result<(), DatapathError> {
        let wanted: BTreeMap<(u32, Address), &PlatformEntry> = entries
            .iter()
            .map(|(prefix, entry)| {
                (
                    (u32::from(prefix.prefix_len()), wire6(prefix.addr().octets())),
                    entry,
                )
            })
            .collect();
        let present: Vec<(u32, Address)> = self
            .platform
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .map_err(on_map("list", "PLATFORM"))?;
        let present: BTreeSet<(u32, Address)> = present.into_iter().collect();
        for ((length, address), entry) in &wanted {
            let key = Key::new(*length, *address);
            let stands = present.contains(&(*length, *address))
                && self
                    .platform
                    .get(&key, 0)
                    .is_ok_and(|standing| standing == **entry);
            if !stands {
                self.platform
                    .insert(&key, **entry, 0)
                    .map_err(on_map("write", "PLATFORM"))?;
            }
        }
        for (length, address) in present {
            let key = Key::new(length, address);
            let is_node = |entry: PlatformEntry| length == 128 && entry.denied == 1 && entry.len == 0;
            let kept = wanted.contains_key(&(length, address))
                || keep_nodes && self.platform.get(&key, 0).is_ok_and(is_node);
            if !kept {
                missing_is_fine("PLATFORM", self.platform.remove(&key))?;
            }
        }
        Ok(())
    }

    pub(super) fn counters(&self) -> Result<Counters, DatapathError> {
        let sum = |index: u32| -> Result<u64, DatapathError> {
            let values = self.counters.get(&index, 0).map_err(on_map("read", "COUNTERS"))?;
            Ok(values.iter().map(|counter| counter.packets).sum())
        };
        Ok(Counters {
            steered: sum(counter::STEERED)?,
            dns: sum(counter::DNS)?,
            inbound: sum(counter::INBOUND)?,
            refused: sum(counter::REFUSED)?,
            dropped: sum(counter::DROPPED)?,
            no_listener: sum(counter::NO_LISTENER)?,
            delivered: sum(counter::DELIVERED)?,
            unadmitted: sum(counter::UNADMITTED)?,
            suppressed: sum(counter::SUPPRESSED)?,
            passed: sum(counter::PASSED)?,
            returned: sum(counter::RETURNED)?,
        })
    }
}

fn change_meta(
    notes: &mut Array<MapData, Meta>,
    change: impl FnOnce(&mut Meta),
) -> Result<Meta, DatapathError> {
    let mut meta = notes.get(&0, 0).map_err(on_map("read", "META"))?;
    change(&mut meta);
    notes.set(0, meta, 0).map_err(on_map("write", "META"))?;
    Ok(meta)
}

/// A policy id never given out before.
fn next_policy(notes: &mut Array<MapData, Meta>) -> Result<u32, DatapathError> {
    let exhausted =
        || DatapathError::Table("all policy ids are used up; `controller down` starts anew".to_owned());
    let next = notes.get(&0, 0).map_err(on_map("read", "META"))?.last_policy;
    let next = next.checked_add(1).ok_or_else(exhausted)?;
    change_meta(notes, |meta| meta.last_policy = next)?;
    Ok(next)
}

fn bound_key(ordinal: u32, address: IpAddr) -> BoundKey {
    BoundKey {
        ordinal,
        address: to_wire(address),
    }
}

fn bound_keys(endpoint: EndpointHandle, addresses: &[IpAddr]) -> Vec<BoundKey> {
    let key = |address: &IpAddr| bound_key(endpoint.ordinal, *address);
    addresses.iter().map(key).collect()
}

fn inbound_key(endpoint: EndpointHandle, sandbox_port: u16, local: SocketAddrV4) -> InboundKey {
    InboundKey {
        ordinal: endpoint.ordinal,
        local_address: wire(local.ip().octets()),
        local_port: local.port(),
        sandbox_port,
    }
}

pub(super) fn missing_is_fine(map: &'static str, removed: Result<(), MapError>) -> Result<(), DatapathError> {
    match removed {
        Err(error) if !is_missing(&error) => Err(on_map("remove from", map)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
