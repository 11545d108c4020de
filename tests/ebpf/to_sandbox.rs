//! `to_sandbox` on crafted packets: a mark admits only what its owner would send.

use netd_common::mark;

use crate::{
    classifier::{delivered, delivered_bytes},
    packet::{ACK, Frame, GATEWAY_MAC, ICMP, RST, SYN},
    world::{Sandbox, World, privileged},
};

#[test]
fn only_answers_and_admitted_connections_reach_a_sandbox() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let to = sandbox.address();
    let answer = Frame {
        to_mac: sandbox.endpoint.mac,
        from_port: 443,
        flags: SYN | ACK,
        ..Frame::tcp([203, 0, 113, 10].into(), GATEWAY_MAC, to, 40_000)
    };
    let opening = Frame {
        flags: SYN,
        ..answer.clone()
    };
    let reset = Frame {
        flags: RST | ACK,
        ..answer.clone()
    };
    let datagram = Frame {
        to_mac: sandbox.endpoint.mac,
        from_port: 53,
        ..Frame::udp([1, 1, 1, 1].into(), GATEWAY_MAC, to, 40_000)
    };
    let echo = Frame {
        protocol: ICMP,
        ..answer.clone()
    };

    let admitted = [
        ("netd's answer", mark::NETD, answer.clone()),
        ("netd's DNS answer", mark::NETD, datagram.clone()),
        ("refusal of a connection", mark::REFUSE, reset.clone()),
        ("late reset", mark::PROXY, reset),
    ];
    let dropped = [
        ("netd's sockets open nothing", mark::NETD, opening.clone()),
        (
            "netd's other datagrams",
            mark::NETD,
            datagram.but(|frame| frame.from_port = 54),
        ),
        ("a refusal is only that", mark::REFUSE, answer.clone()),
        ("nothing is opened by an answer", mark::PROXY, opening),
        ("proxy's mark on a datagram", mark::PROXY, datagram.clone()),
        ("echo", mark::REFUSE, echo.clone()),
        ("echo with netd's mark", mark::NETD, echo.clone()),
        ("unmarked", 0, answer.clone()),
        ("unmarked datagram", 0, datagram),
        ("mark of inbound packets", mark::INBOUND, answer.clone()),
        (
            "another address",
            mark::NETD,
            answer.but(|frame| frame.to = [10, 213, 0, 2].into()),
        ),
        ("IPv6", mark::NETD, answer.but(|frame| frame.ethertype = 0x86dd)),
        ("ARP", mark::NETD, answer.but(|frame| frame.ethertype = 0x0806)),
        (
            "fragment",
            mark::NETD,
            answer.but(|frame| frame.fragment = 0x2000),
        ),
        (
            "other protocol",
            mark::NETD,
            answer.but(|frame| frame.protocol = 132),
        ),
        ("cut", mark::NETD, answer.but(|frame| frame.cut_to = Some(36))),
    ];
    for (name, set_mark, frame) in admitted {
        assert!(delivered(datapath, handle.ifindex, set_mark, &frame), "{name}");
    }
    for (name, set_mark, frame) in dropped {
        assert!(!delivered(datapath, handle.ifindex, set_mark, &frame), "{name}");
    }
    // The kernel's answer to a refused datagram: destination unreachable, administratively prohibited.
    let mut unreachable = echo.bytes();
    unreachable[34] = 3;
    unreachable[35] = 13;
    assert!(delivered_bytes(
        datapath,
        handle.ifindex,
        mark::REFUSE,
        &unreachable
    ));
    assert!(!delivered_bytes(datapath, handle.ifindex, 0, &unreachable));

    let inward = Frame {
        to_mac: sandbox.endpoint.mac,
        from_port: 50_000,
        ..Frame::tcp([169, 254, 1, 1].into(), GATEWAY_MAC, to, 7000)
    };
    assert!(!delivered(datapath, handle.ifindex, 0, &inward));
    datapath
        .admit_inbound(handle, 7000, "169.254.1.1:50000".parse().expect("an address"), 1)
        .expect("admitted");
    // The socket of a test run is not the admitted one.
    assert!(!delivered(datapath, handle.ifindex, 0, &inward));
    let inward = inward.but(|frame| frame.flags = ACK);
    assert!(delivered(datapath, handle.ifindex, 0, &inward));
    for wrong in [
        inward.but(|frame| frame.from_port = 50_001),
        inward.but(|frame| frame.to_port = 7001),
        inward.but(|frame| frame.from = [169, 254, 1, 2].into()),
    ] {
        assert!(!delivered(datapath, handle.ifindex, 0, &wrong), "{wrong:?}");
    }

    let stranger = Sandbox::create(datapath.router(), 9);
    assert!(
        !delivered(datapath, stranger.endpoint.ifindex, mark::NETD, &answer),
        "unknown interface"
    );
    assert!(datapath.counters().expect("counters").unadmitted > 10);
}
