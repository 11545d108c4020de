//! `to_sandbox` on crafted packets: a mark admits only what its owner would send.

use netd_common::mark;

use crate::{
    classifier::delivered,
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

    let cases = [
        ("netd's answer", mark::NETD, &answer, true),
        ("netd's sockets open nothing", mark::NETD, &opening, false),
        ("netd's DNS answer", mark::NETD, &datagram, true),
        (
            "netd's other datagrams",
            mark::NETD,
            &Frame {
                from_port: 54,
                ..datagram.clone()
            },
            false,
        ),
        ("refusal of a connection", mark::REFUSE, &reset, true),
        ("a refusal is only that", mark::REFUSE, &answer, false),
        ("late reset", mark::PROXY, &reset, true),
        ("nothing is opened by an answer", mark::PROXY, &opening, false),
        (
            "the proxy's mark is not for datagrams",
            mark::PROXY,
            &datagram,
            false,
        ),
        ("echo", mark::REFUSE, &echo, false),
        ("echo with netd's mark", mark::NETD, &echo, false),
        ("unmarked", 0, &answer, false),
        ("unmarked datagram", 0, &datagram, false),
        (
            "the mark of inbound packets admits nothing",
            mark::INBOUND,
            &answer,
            false,
        ),
        (
            "another address",
            mark::NETD,
            &Frame {
                to: [10, 213, 0, 2].into(),
                ..answer.clone()
            },
            false,
        ),
        (
            "IPv6",
            mark::NETD,
            &Frame {
                ethertype: 0x86dd,
                ..answer.clone()
            },
            false,
        ),
        (
            "ARP",
            mark::NETD,
            &Frame {
                ethertype: 0x0806,
                ..answer.clone()
            },
            false,
        ),
        (
            "fragment",
            mark::NETD,
            &Frame {
                fragment: 0x2000,
                ..answer.clone()
            },
            false,
        ),
        (
            "other protocol",
            mark::NETD,
            &Frame {
                protocol: 132,
                ..answer.clone()
            },
            false,
        ),
        (
            "cut",
            mark::NETD,
            &Frame {
                cut_to: Some(36),
                ..answer.clone()
            },
            false,
        ),
    ];
    for (name, set_mark, frame, expected) in cases {
        assert_eq!(
            delivered(datapath, handle.ifindex, set_mark, frame),
            expected,
            "{name}"
        );
    }
    // The kernel's answer to a refused datagram: destination unreachable, administratively prohibited.
    let mut unreachable = echo.bytes();
    unreachable[34] = 3;
    unreachable[35] = 13;
    assert!(crate::classifier::delivered_bytes(
        datapath,
        handle.ifindex,
        mark::REFUSE,
        &unreachable
    ));
    assert!(!crate::classifier::delivered_bytes(
        datapath,
        handle.ifindex,
        0,
        &unreachable
    ));

    let inward = Frame {
        to_mac: sandbox.endpoint.mac,
        from_port: 50_000,
        ..Frame::tcp([169, 254, 1, 1].into(), GATEWAY_MAC, to, 7000)
    };
    assert!(!delivered(datapath, handle.ifindex, 0, &inward));
    datapath
        .admit_inbound(handle, 7000, "169.254.1.1:50000".parse().expect("an address"))
        .expect("admitted");
    assert!(delivered(datapath, handle.ifindex, 0, &inward));
    for wrong in [
        Frame {
            from_port: 50_001,
            ..inward.clone()
        },
        Frame {
            to_port: 7001,
            ..inward.clone()
        },
        Frame {
            from: [169, 254, 1, 2].into(),
            ..inward.clone()
        },
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
