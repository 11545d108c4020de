//! What looking a packet's destination up costs, beside an nftables interval map with the same prefixes. Both hang on a
//! veth of the same kind and see the same packets; behind each, at the netdev ingress hook, one chain drops them all, so
//! that the way of a packet differs by the look-up alone.

use std::{
    fmt::Write as _,
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use netd::router::RouterNamespace;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use sandgate_policy::{KernelAction, KernelTable, PortRange, PrefixEntry, Protocol, Reason};
use socket2::{Domain, Socket, Type};

use super::super::Effort;
use crate::{
    load::CLIENT,
    result::{Kind, Table, median},
    world::{Sandbox, World},
};

/// Volleys of packets, the median of which is one figure: each is shorter than a turn on the processor.
const VOLLEYS: usize = 100;
/// Packets of a volley.
const PACKETS: usize = 500;
/// Where they go: the one prefix that is denied.
const TARGET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The peer's interface in the router namespace.
const PEER: u8 = 9;

const BARE: &str = "nothing but the drop";
const NFTABLES: &str = "nftables, interval map";
const SANDGATE: &str = "Sandgate";

/// Runs it for policies of several sizes.
pub(crate) fn lookups(effort: Effort, sizes: &[u32]) -> Result<Vec<Table>> {
    let world = World::with_sandboxes(1);
    let router = world.datapath.router();
    let (sandbox, handle) = world.first();
    let peer = Sandbox::create(router, PEER);
    peer.start(router);
    drop_all(router, &sandbox.endpoint.interface)?;
    let rows = [(BARE, None), (NFTABLES, None), (SANDGATE, None)];
    let over = [("nftables", None), (SANDGATE, Some("nftables"))];
    let tables = |size: &u32| {
        let title = format!("A denied packet over a veth, {size} prefixes");
        let extra = format!("The look-up's part of it, {size} prefixes");
        [
            Table::new(&title, "ns", Kind::Cost, &rows),
            Table::new(&extra, "ns", Kind::Cost, &over),
        ]
    };
    let mut measured: Vec<_> = sizes.iter().map(tables).collect();
    let count = effort.times(VOLLEYS);
    for _ in 0..effort.rounds {
        for (size, [whole, part]) in sizes.iter().zip(&mut measured) {
            drop_all(router, &peer.endpoint.interface)?;
            let bare = send(&peer, count)?;
            interval_map(router, &peer.endpoint.interface, *size)?;
            let nftables = send(&peer, count)?;
            let denied = KernelAction::Deny(Reason::DeniedByRule);
            world.datapath.set_policy(handle, &table(*size, denied))?;
            let before = world.datapath.counters()?.refused;
            let sandgate = send(sandbox, count)?;
            let judged = world.datapath.counters()?.refused - before;
            ensure!(
                usize::try_from(judged)? * 100 >= count * PACKETS * 99,
                "of {} packets {judged} were judged",
                count * PACKETS
            );
            for (name, figure) in [(BARE, bare), (NFTABLES, nftables), (SANDGATE, sandgate)] {
                whole.add(name, vec![figure]);
            }
            part.add("nftables", vec![nftables - bare]);
            part.add(SANDGATE, vec![sandgate - bare]);
            world.datapath.sweep()?;
        }
    }
    Ok(measured.into_iter().flatten().collect())
}

/// Addresses near the target, numbered: where the tries are deep.
pub(crate) fn neighbour(number: u32) -> Ipv4Addr {
    // An odd factor: no number of 16 bits comes twice, and 0 not at all.
    Ipv4Addr::from(u32::from(TARGET) ^ (number.wrapping_mul(0x9e37) & 0xffff))
}

/// The target with an action of its own, and its neighbours, so many in all.
pub(crate) fn table(size: u32, target: KernelAction) -> KernelTable {
    let entry = |address, number: u32, action| PrefixEntry {
        prefix: ipnet::Ipv4Net::new_assert(address, 32).into(),
        ranges: vec![PortRange {
            protocol: Protocol::Tcp,
            first: 443,
            // Each its own table of ports, as different rules would have.
            last: 443 + u16::try_from(number % 10_000).unwrap_or(0),
            action,
        }],
    };
    let target = entry(TARGET, 0, target);
    let others = (1..size).map(|number| entry(neighbour(number), number, KernelAction::Proxy));
    KernelTable {
        entries: others.chain([target]).collect(),
    }
}

fn drop_all(router: &RouterNamespace, interface: &str) -> Result<()> {
    let table = format!("bench_{interface}");
    let text = format!(
        "add table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n\
         chain ingress {{ type filter hook ingress device \"{interface}\" priority 0; policy drop; }}\n}}\n"
    );
    nft(router, text)
}

fn interval_map(router: &RouterNamespace, interface: &str, size: u32) -> Result<()> {
    let table = format!("bench_{interface}");
    let mut elements = format!("{TARGET}/32 : drop");
    for number in 1..size {
        write!(elements, ", {}/32 : accept", neighbour(number)).expect("writing to a string");
    }
    let text = format!(
        "add table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n\
         map verdicts {{ type ipv4_addr : verdict; flags interval; elements = {{ {elements} }}; }}\n\
         chain ingress {{ type filter hook ingress device \"{interface}\" priority 0; policy drop; \
         ip daddr vmap @verdicts; }}\n}}\n"
    );
    nft(router, text)
}

fn nft(router: &RouterNamespace, text: String) -> Result<()> {
    let output = router.run(move || {
        let mut command = Command::new("nft");
        let mut child = command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .map_or(Ok(()), |mut input| input.write_all(text.as_bytes()))?;
        child.wait_with_output()
    })??;
    ensure!(
        output.status.success(),
        "nft: {}",
        String::from_utf8_lossy(&output.stderr)
            .chars()
            .take(500)
            .collect::<String>()
    );
    Ok(())
}

/// Nanoseconds for a SYN, from the call that sends it to the end of what the receiving side makes of it:
/// the kernel does that on the same processor, before the call returns.
fn send(sandbox: &Sandbox, count: usize) -> Result<f64> {
    sandbox.run(|| {
        let mut set = CpuSet::new();
        set.set(CLIENT)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::TCP))?;
        let to = SocketAddrV4::new(TARGET, 0).into();
        let mut segment = [0_u8; 20];
        segment[..2].copy_from_slice(&40_000_u16.to_be_bytes());
        segment[2..4].copy_from_slice(&443_u16.to_be_bytes());
        (segment[12], segment[13]) = (0x50, 0x02);
        let packets = f64::from(u32::try_from(PACKETS)?);
        let mut figures = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            for _ in 0..PACKETS {
                socket.send_to(&segment, &to).context("sending")?;
            }
            figures.push(began.elapsed().as_secs_f64() * 1e9 / packets);
        }
        Ok(median(&figures))
    })
}
