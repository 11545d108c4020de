//! Telling netd of denials, without a wake-up for each (that alone costs ten times the rest of the program) and
//! without letting one sandbox fill the ring: what is too fast is counted per endpoint and reason instead.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, helpers::bpf_ktime_get_ns, programs::TcContext};
use netd_common::{Event, Suppressed, Throttle, counter, limit, reason};

use crate::{
    maps::{EVENTS, SUPPRESSED, THROTTLES, count},
    packet::Packet,
};

/// The rates of an endpoint, with the window moved on to now.
#[inline(always)]
pub fn throttle(ordinal: u32) -> Option<(*mut Throttle, u64)> {
    let throttle = THROTTLES.get_ptr_mut(ordinal)?;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a live map value. Two CPUs may both open a window: the limits are then a little off, nothing else.
    unsafe {
        if now - (*throttle).window > limit::WINDOW_NS {
            (*throttle).window = now;
            (*throttle).events = 0;
            (*throttle).flows = 0;
            (*throttle).queries = 0;
            (*throttle).controls = 0;
        }
    }
    Some((throttle, now))
}

/// Records a denied packet.
#[inline(always)]
pub fn denied(ctx: &TcContext, ordinal: u32, packet: &Packet, code: u8) {
    record(ctx, ordinal, packet, code, false);
}

/// Records the first packet of a flow that only tiers in audit mode deny.
#[inline(always)]
pub fn audited(ctx: &TcContext, ordinal: u32, packet: &Packet, code: u8) {
    record(ctx, ordinal, packet, code, true);
}

#[inline(always)]
fn record(ctx: &TcContext, ordinal: u32, packet: &Packet, code: u8, audit: bool) {
    let Some((throttle, now)) = throttle(ordinal) else {
        // netd makes the entry before the endpoint's, and ordinal 0 with the map.
        count(counter::SUPPRESSED, ctx.len());
        return;
    };
    // SAFETY: a live map value.
    let sent = unsafe { (*throttle).events };
    if sent < limit::EVENTS_PER_WINDOW {
        // SAFETY: a live map value; a lost increment lets one event more through.
        unsafe { (*throttle).events = sent + 1 };
        if let Some(mut entry) = EVENTS.reserve(0) {
            entry.write(Event {
                time_ns: now,
                ordinal,
                // SAFETY: the context of a classifier.
                ifindex: unsafe { (*ctx.skb.skb).ifindex },
                source: packet.source,
                destination: packet.destination,
                source_port: packet.source_port,
                destination_port: packet.destination_port,
                ethertype: packet.ethertype,
                protocol: packet.protocol,
                reason: code,
                audit: u8::from(audit),
                padding: [0, 0, 0, 0, 0, 0, 0],
            });
            entry.submit(u64::from(BPF_RB_NO_WAKEUP));
            return;
        }
    }
    count(counter::SUPPRESSED, ctx.len());
    if let Some(table) = SUPPRESSED.get_ptr_mut(ordinal) {
        let place = if audit { reason::AUDITED } else { code };
        let index = usize::from(place) & (reason::COUNT - 1);
        // SAFETY: this CPU's own value, and a classifier is not preempted by another on the same CPU: the count is
        // exact. The index is below the array's length.
        unsafe {
            let suppressed = (&raw mut (*table).by_reason).cast::<Suppressed>().add(index);
            (*suppressed).count += 1;
            (*suppressed).time_ns = now;
            (*suppressed).destination = packet.destination;
            (*suppressed).destination_port = packet.destination_port;
            (*suppressed).protocol = packet.protocol;
            (*suppressed).reason = code;
        }
    }
}
