//! What is neither TCP nor UDP: who asks for the gateway, who answers, and ICMP errors. On crafted packets.

use std::net::{Ipv4Addr, Ipv6Addr};

use netd::kernel::EndpointHandle;
use netd_common::{limit, mark};

use crate::{
    lab::{Lab, NEXT, REDIRECT, SHOT, address6},
    packet::{ACK, Frame, GATEWAY_MAC, SYN, TCP},
    packet6::{Arp, Frame6, GATEWAY6, ICMP6, icmp4, icmp6, neighbour, segment},
    pass::passing,
    world::{platform, privileged, table},
};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

fn remote6() -> Ipv6Addr {
    "2001:db8::1".parse().expect("an address")
}

/// Waits until the window of the kernel's rates is over.
fn next_window() {
    std::thread::sleep(std::time::Duration::from_nanos(limit::WINDOW_NS) * 2);
}

#[test]
fn only_the_gateway_is_asked_for_and_only_it_answers() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let (sandbox, handle) = &lab.sandboxes[0];
    let (mac, me) = (sandbox.endpoint.mac, sandbox.endpoint.address);
    let asked = |frame: &[u8]| {
        let seen = lab.out(*handle, frame);
        match (seen.returned, seen.mark) {
            (NEXT, mark::PROXY) => true,
            (SHOT, _) => false,
            other => panic!("{other:?}"),
        }
    };
    let request = Arp {
        to_mac: [0xff; 6],
        from_mac: mac,
        operation: 1,
        sender: (mac, me),
        target: ([0; 6], GATEWAY),
    };
    let stranger = Ipv4Addr::new(10, 213, 0, 2);
    let other_mac = [2, 0x53, 0x47, 1, 0, 2];
    assert!(asked(&request.bytes()));
    assert!(asked(
        &Arp {
            to_mac: GATEWAY_MAC,
            ..request
        }
        .bytes()
    ));
    for (name, wrong) in [
        (
            "another's address",
            Arp {
                target: ([0; 6], stranger),
                ..request
            },
        ),
        (
            "as another",
            Arp {
                sender: (mac, stranger),
                ..request
            },
        ),
        (
            "as nobody",
            Arp {
                sender: (mac, Ipv4Addr::UNSPECIFIED),
                ..request
            },
        ),
        (
            "for another's MAC",
            Arp {
                sender: (other_mac, me),
                ..request
            },
        ),
        (
            "from another's MAC",
            Arp {
                from_mac: other_mac,
                ..request
            },
        ),
        (
            "an answer",
            Arp {
                operation: 2,
                ..request
            },
        ),
        (
            "announcing itself",
            Arp {
                target: ([0; 6], me),
                ..request
            },
        ),
        (
            "to a neighbour",
            Arp {
                to_mac: other_mac,
                ..request
            },
        ),
    ] {
        assert!(!asked(&wrong.bytes()), "{name}");
    }
    let reply = Arp {
        to_mac: mac,
        from_mac: GATEWAY_MAC,
        operation: 2,
        sender: (GATEWAY_MAC, GATEWAY),
        target: (mac, me),
    };
    let answered = |frame: &[u8]| lab.toward(*handle, 0, 0, frame);
    assert!(answered(&reply.bytes()));
    assert!(!answered(
        &Arp {
            sender: (other_mac, GATEWAY),
            ..reply
        }
        .bytes()
    ));
    assert!(!answered(
        &Arp {
            sender: (GATEWAY_MAC, stranger),
            ..reply
        }
        .bytes()
    ));
    assert!(!answered(
        &Arp {
            operation: 1,
            ..reply
        }
        .bytes()
    ));

    next_window();
    let ours = address6(1);
    let ask = Frame6::new(ours, mac, GATEWAY6, ICMP6, neighbour(135, GATEWAY6, 1, mac))
        .but(|frame| frame.hops = 255);
    let group = ask.but(|frame| {
        frame.to = "ff02::1:ff47:1".parse().expect("an address");
        frame.to_mac = [0x33, 0x33, 0xff, 0x47, 0, 1];
    });
    assert!(asked(&ask.bytes()));
    assert!(asked(&group.bytes()));
    for (name, wrong) in [
        ("forwarded", ask.but(|frame| frame.hops = 254)),
        ("as another", ask.but(|frame| frame.from = address6(2))),
        ("as nobody", group.but(|frame| frame.from = Ipv6Addr::UNSPECIFIED)),
        (
            "for another",
            ask.but(|frame| frame.payload = neighbour(135, address6(2), 1, mac)),
        ),
        (
            "for another's MAC",
            ask.but(|frame| frame.payload = neighbour(135, GATEWAY6, 1, other_mac)),
        ),
        (
            "an advertisement",
            ask.but(|frame| frame.payload = neighbour(136, GATEWAY6, 2, mac)),
        ),
        (
            "a router advertisement",
            ask.but(|frame| frame.payload = neighbour(134, GATEWAY6, 1, mac)),
        ),
        (
            "with more options",
            ask.but(|frame| frame.payload.extend([1, 1, 0, 0, 0, 0, 0, 0])),
        ),
        (
            "to all",
            group.but(|frame| frame.to = "ff02::1".parse().expect("an address")),
        ),
    ] {
        assert!(!asked(&wrong.bytes()), "{name}");
    }
    let advertise = Frame6::new(
        GATEWAY6,
        GATEWAY_MAC,
        ours,
        ICMP6,
        neighbour(136, GATEWAY6, 2, GATEWAY_MAC),
    )
    .but(|frame| (frame.hops, frame.to_mac) = (255, mac));
    assert!(answered(&advertise.bytes()));
    for wrong in [
        advertise.but(|frame| frame.from = "fe80::2".parse().expect("an address")),
        advertise.but(|frame| frame.hops = 64),
        advertise.but(|frame| frame.to = address6(2)),
        advertise.but(|frame| frame.payload = neighbour(136, GATEWAY6, 2, other_mac)),
        advertise.but(|frame| frame.payload = neighbour(135, GATEWAY6, 1, GATEWAY_MAC)),
        advertise.but(|frame| frame.payload = neighbour(137, GATEWAY6, 2, GATEWAY_MAC)),
    ] {
        assert!(!answered(&wrong.bytes()), "{wrong:?}");
    }

    next_window();
    let flood = limit::CONTROLS_PER_WINDOW * 4;
    let let_through = (0..flood).filter(|_| asked(&request.bytes())).count();
    assert!(let_through < flood as usize, "no end to it");
}

#[test]
fn icmp_errors_pass_for_flows_that_there_are() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(2, &platform());
    let uplink = lab.set_uplink();
    let [(one, handle), (two, other)] = &lab.sandboxes[..] else {
        panic!("two sandboxes");
    };
    for handle in [handle, other] {
        lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    }
    let (mac, me) = (one.endpoint.mac, one.endpoint.address);
    let opening = Frame::tcp(me, mac, REMOTE, 443);
    let query = Frame::udp(me, mac, REMOTE, 443);
    let opening6 = Frame6::new(address6(1), mac, remote6(), TCP, segment(40_000, 443, SYN));
    let router = Ipv4Addr::new(192, 0, 2, 1);
    let outer = Frame {
        to_mac: mac,
        ..Frame::tcp(router, GATEWAY_MAC, me, 0)
    };
    let outer6 =
        Frame6::new(remote6(), GATEWAY_MAC, address6(1), ICMP6, Vec::new()).but(|frame| frame.to_mac = mac);
    let told = |handle: EndpointHandle, ingress, frame: &[u8]| lab.toward(handle, 0, ingress, frame);
    let unreachable = icmp4(&outer, 3, 3, &query);
    assert!(!told(*handle, uplink, &unreachable), "there is no such flow yet");
    for frame in [opening.bytes(), query.bytes(), opening6.bytes()] {
        assert_eq!(lab.out(*handle, &frame).returned, REDIRECT);
    }
    for (kind, code) in [(3, 0), (3, 3), (3, 4), (11, 0), (12, 0)] {
        assert!(
            told(*handle, uplink, &icmp4(&outer, kind, code, &query)),
            "{kind}"
        );
        assert!(
            told(*handle, uplink, &icmp4(&outer, kind, code, &opening)),
            "{kind}"
        );
    }
    for kind in 1..=4 {
        assert!(
            told(*handle, uplink, &icmp6(&outer6, kind, 0, &opening6)),
            "{kind}"
        );
    }
    assert!(!told(*handle, 0, &unreachable), "not through the uplink");
    assert!(!told(*other, uplink, &unreachable), "another's");
    for (kind, code) in [(0, 0), (5, 1), (8, 0), (9, 0), (13, 0)] {
        assert!(
            !told(*handle, uplink, &icmp4(&outer, kind, code, &query)),
            "{kind}"
        );
    }
    for kind in [128, 129, 133, 134, 135, 136, 137] {
        assert!(
            !told(*handle, uplink, &icmp6(&outer6, kind, 0, &opening6)),
            "{kind}"
        );
    }
    for wrong in [
        query.but(|frame| frame.from_port += 1),
        query.but(|frame| frame.to_port += 1),
        query.but(|frame| frame.to = router),
        query.but(|frame| frame.from = two.endpoint.address),
        query.but(|frame| frame.fragment = 1),
        query.but(|frame| frame.version_and_length = 0x46),
        query.but(|frame| frame.protocol = 132),
    ] {
        assert!(!told(*handle, uplink, &icmp4(&outer, 3, 3, &wrong)), "{wrong:?}");
    }
    let mut cut = unreachable.clone();
    cut.truncate(64);
    assert!(!told(*handle, uplink, &cut));

    // From the sandbox: that its port is closed, that a packet was too big. Nothing else, and about its flows alone.
    next_window();
    let reply = Frame {
        from_port: 443,
        ..Frame::udp(REMOTE, GATEWAY_MAC, me, 40_000)
    };
    let reply6 = Frame6::new(
        remote6(),
        GATEWAY_MAC,
        address6(1),
        TCP,
        segment(443, 40_000, ACK),
    );
    let to_remote = Frame::tcp(me, mac, REMOTE, 0);
    let to_remote6 = Frame6::new(address6(1), mac, remote6(), ICMP6, Vec::new());
    let leaves = |frame: &[u8]| lab.out(*handle, frame).returned == REDIRECT;
    assert!(leaves(&icmp4(&to_remote, 3, 3, &reply)));
    assert!(leaves(&icmp4(&to_remote, 3, 4, &reply)));
    assert!(leaves(&icmp6(&to_remote6, 2, 0, &reply6)));
    assert!(leaves(&icmp6(&to_remote6, 1, 4, &reply6)));
    for (kind, code) in [(3, 1), (8, 0), (0, 0), (11, 0), (5, 0)] {
        assert!(!leaves(&icmp4(&to_remote, kind, code, &reply)), "{kind}");
    }
    for (kind, code) in [(1, 0), (3, 0), (128, 0), (134, 0)] {
        assert!(!leaves(&icmp6(&to_remote6, kind, code, &reply6)), "{kind}");
    }
    let elsewhere = Frame {
        to: router,
        ..to_remote.clone()
    };
    assert!(
        !leaves(&icmp4(&elsewhere, 3, 3, &reply)),
        "to nobody but its sender"
    );
    assert!(!leaves(&icmp4(
        &to_remote,
        3,
        3,
        &reply.but(|frame| frame.from_port = 444)
    )));
    next_window();
    let mut large = icmp4(&to_remote, 3, 3, &reply);
    large.resize(1400, 0);
    large[16..18].copy_from_slice(&1386_u16.to_be_bytes());
    assert!(!leaves(&large), "as little as is needed");
    let many = (0..limit::CONTROLS_PER_WINDOW * 4)
        .filter(|_| leaves(&icmp4(&to_remote, 3, 3, &reply)))
        .count();
    assert!(many < limit::CONTROLS_PER_WINDOW as usize * 4, "no end to it");

    // A policy that forbids the flow ends its errors too.
    next_window();
    lab.datapath.set_policy(*handle, &table(&[])).expect("a policy");
    assert!(!told(*handle, uplink, &unreachable));
    assert!(!leaves(&icmp4(&to_remote, 3, 3, &reply)));
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    lab.datapath.set_uplink(None).expect("no uplink");
    assert!(!told(*handle, uplink, &unreachable));
    assert!(!leaves(&icmp4(&to_remote, 3, 3, &reply)));
}
