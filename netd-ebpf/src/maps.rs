//! The maps. Names and shapes are a contract with netd, which pins and fills them; see `netd-common`.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, PerCpuHashMap, RingBuf, SockMap},
    macros::btf_map,
};
use netd_common::{
    Address, BoundKey, Counter, Endpoint, Event, Flow, FlowKey, InboundKey, Meta, PlatformEntry, PolicyKey,
    PortTable, Reported, SuppressedTable, Throttle, Uplink, counter, limit, listener,
};

/// Without it a hash map takes the memory of all its entries at once.
const SPARSE: usize = BPF_F_NO_PREALLOC as usize;

/// ifindex -> endpoint.
#[btf_map]
pub static ENDPOINTS: HashMap<u32, Endpoint, { limit::ENDPOINTS }> = HashMap::new();
/// Address of an endpoint -> its ifindex.
#[btf_map]
pub static ADDRESSES: HashMap<Address, u32, { 2 * limit::ENDPOINTS }, SPARSE> = HashMap::new();
/// (policy, destination prefix) -> ports.
#[btf_map]
pub static POLICIES: LpmTrie<PolicyKey, PortTable, { limit::PREFIXES }> = LpmTrie::new();
/// Destination prefix -> what nobody may reach.
#[btf_map]
pub static PLATFORM: LpmTrie<Address, PlatformEntry, { limit::PLATFORM }> = LpmTrie::new();
/// Addresses that DNS answers gave to an endpoint.
#[btf_map]
pub static BOUND: HashMap<BoundKey, u32, { limit::BOUND }, SPARSE> = HashMap::new();
/// Connections that netd opened inward -> the cookie of the socket it opened each with.
#[btf_map]
pub static INBOUND: HashMap<InboundKey, u64, { limit::INBOUND }, SPARSE> = HashMap::new();
/// Flows that leave without netd.
#[btf_map]
pub static FLOWS: HashMap<FlowKey, Flow, { limit::FLOWS }, SPARSE> = HashMap::new();
/// ordinal, 0 for all together -> flows ever made. Written by the programs only, but for the entries themselves.
#[btf_map]
pub static FLOW_COUNTS: HashMap<u32, u64, { limit::ENDPOINTS + 1 }, SPARSE> = HashMap::new();
/// The same -> flows ever removed. Written by netd only.
#[btf_map]
pub static FLOWS_FREED: HashMap<u32, u64, { limit::ENDPOINTS + 1 }, SPARSE> = HashMap::new();
/// The way out.
#[btf_map]
pub static UPLINK: Array<Uplink, 1> = Array::new();
/// netd's sockets; the kernel empties a place when its socket is closed.
#[btf_map]
pub static LISTENERS: SockMap<{ listener::COUNT }> = SockMap::new();
/// ordinal -> rates. One more than endpoints: ordinal 0.
#[btf_map]
pub static THROTTLES: HashMap<u32, Throttle, { limit::ENDPOINTS + 1 }, SPARSE> = HashMap::new();
/// ordinal -> denials that were too fast for the ring.
#[btf_map]
pub static SUPPRESSED: PerCpuHashMap<u32, SuppressedTable, { limit::ENDPOINTS + 1 }, SPARSE> =
    PerCpuHashMap::new();
/// Denied packets.
#[btf_map]
pub static EVENTS: RingBuf<Event, { limit::EVENT_BYTES }> = RingBuf::new();
/// By index of `netd_common::counter`.
#[btf_map]
pub static COUNTERS: PerCpuArray<Counter, { counter::COUNT }> = PerCpuArray::new();
/// ordinal -> how far suppressed denials were reported. Of netd alone; here so that it lives as long as the others.
#[btf_map]
pub static REPORTED: HashMap<u32, Reported, { limit::ENDPOINTS + 1 }, SPARSE> = HashMap::new();
/// netd's notes. Of netd alone.
#[btf_map]
pub static META: Array<Meta, 1> = Array::new();

/// Adds to a value that several CPUs add to.
///
/// # Safety
/// `value` must point into a live map value.
#[inline(always)]
pub unsafe fn add(value: *mut u64, amount: u64) {
    // SAFETY: one atomic addition to memory that the caller vouches for. (core has no atomic additions for this target.)
    unsafe { core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) value, in(reg) amount) }
}

/// Adds a packet of `bytes` to a counter.
#[inline(always)]
pub fn count(index: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the pointer is this CPU's own slot, and a classifier is not preempted by another on the same CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}
