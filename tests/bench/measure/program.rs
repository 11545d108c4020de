//! What the kernel programs take for a packet, by `BPF_PROG_TEST_RUN`: the mean of many runs, without the
//! stack around them.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use aya::TestRunOptions;
use netd::{kernel::Datapath, sockets::Listeners};
use netd_common::mark;

use sandgate_policy::KernelAction;

use super::{
    Effort,
    scale::{self, neighbour},
};
use crate::{
    packet::{ACK, Frame, GATEWAY_MAC, SYN},
    result::{Kind, Table},
    world::World,
};

/// Runs that one figure is the mean of.
const REPEAT: usize = 200_000;
/// The number of an address that no policy here lists, between those that they do.
const UNLISTED: u32 = 60_000;
/// Offsets in `struct __sk_buff` (linux/bpf.h).
const MARK: usize = 8;
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

/// Runs it for policies of several sizes.
pub(crate) fn program(effort: Effort) -> Result<Vec<Table>> {
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let listeners = Listeners::open(datapath.router())?;
    datapath.set_listeners(&listeners.indexed())?;
    let (me, mac) = (sandbox.address(), sandbox.endpoint.mac);
    let from = |to: [u8; 4], port| Frame::tcp(me, mac, Ipv4Addr::from(to), port);
    let answer = Frame {
        to_mac: mac,
        from_port: 443,
        flags: SYN | ACK,
        ..Frame::tcp([203, 0, 113, 10].into(), GATEWAY_MAC, me, 40_000)
    };
    let cases = [
        (
            "out: SYN, allowed and steered",
            "from_sandbox",
            0,
            from([203, 0, 113, 10], 443),
        ),
        (
            "out: SYN, refused by the policy",
            "from_sandbox",
            0,
            from(neighbour(UNLISTED).octets(), 443),
        ),
        (
            "out: SYN to a private address",
            "from_sandbox",
            0,
            from([10, 1, 2, 3], 443),
        ),
        (
            "out: DNS query, steered",
            "from_sandbox",
            0,
            Frame::udp(me, mac, [1, 1, 1, 1].into(), 53),
        ),
        ("in: netd's answer", "to_sandbox", mark::NETD, answer.clone()),
        ("in: not admitted", "to_sandbox", 0, answer),
    ];
    let names: Vec<_> = cases.iter().map(|(name, ..)| (*name, None)).collect();
    let sizes = [10_u32, 1000, 10_000];
    let mut tables = sizes.map(|rules| {
        let title = format!("Program time for a packet, policy of {rules} prefixes");
        Table::new(&title, "ns", Kind::Cost, &names)
    });
    for _ in 0..effort.rounds {
        for (rules, table) in sizes.into_iter().zip(&mut tables) {
            datapath.set_policy(handle, &scale::table(rules, KernelAction::Proxy))?;
            for (name, program, set_mark, frame) in &cases {
                let repeat = u32::try_from(effort.times(REPEAT))?;
                let nanoseconds = time(datapath, program, handle.ifindex, *set_mark, frame, repeat)?;
                table.add(name, vec![nanoseconds]);
            }
        }
    }
    Ok(tables.into())
}

fn time(
    datapath: &Datapath,
    program: &'static str,
    ifindex: u32,
    set_mark: u32,
    frame: &Frame,
    repeat: u32,
) -> Result<f64> {
    let mut context = [0_u8; CONTEXT];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context[MARK..MARK + 4].copy_from_slice(&set_mark.to_ne_bytes());
    let mut after = [0_u8; CONTEXT];
    let bytes = frame.bytes();
    let options = TestRunOptions {
        data_in: Some(&bytes),
        ctx_in: Some(&context),
        ctx_out: Some(&mut after),
        repeat,
        ..TestRunOptions::default()
    };
    let result = datapath.test_run(program, options)?;
    ensure!(repeat > 0, "nothing was run");
    Ok(result.duration.as_secs_f64() * 1e9)
}
