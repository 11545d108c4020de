//! Before the uplink's way is proven nobody's packets leave by it but those that prove it. On crafted packets.

use std::net::{Ipv4Addr, Ipv6Addr};

use netd::kernel::{Proven, Uplink};
use netd_common::mark;

use crate::{
    first::lead_nowhere,
    lab::{Lab, OK, REDIRECT, address6},
    packet::{Frame, SYN, TCP},
    packet6::{Frame6, segment},
    pass::passing,
    world::{platform, privileged},
};

const NONE: Proven = Proven {
    ipv4: false,
    ipv6: false,
};

/// Whether a SYN of each family leaves, by sandbox.
fn leave(lab: &Lab) -> Vec<(bool, bool)> {
    let remote = Ipv4Addr::new(203, 0, 113, 10);
    let remote6: Ipv6Addr = "2001:db8::1".parse().expect("an address");
    let left = |handle, frame: &[u8]| match lab.out(handle, frame) {
        seen if (seen.returned, seen.mark) == (REDIRECT, mark::PASS) => true,
        seen if (seen.returned, seen.mark) == (OK, mark::REFUSE) => false,
        other => panic!("{other:?}"),
    };
    let of = |number: u8| {
        let (sandbox, handle) = &lab.sandboxes[usize::from(number) - 1];
        let (own, mac) = (sandbox.endpoint.address, sandbox.endpoint.mac);
        let four = Frame::tcp(own, mac, remote, 443).bytes();
        let six = Frame6::new(address6(number), mac, remote6, TCP, segment(40_000, 443, SYN)).bytes();
        (left(*handle, &four), left(*handle, &six))
    };
    vec![of(1), of(2)]
}

#[test]
fn nobody_leaves_by_a_way_that_is_not_proven_but_who_proves_it() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(2, &platform());
    for (_, handle) in &lab.sandboxes {
        lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    }
    let uplink = lead_nowhere(&lab.datapath);
    let datapath = &lab.datapath;
    let (none, all, four) = ((false, false), (true, true), (true, false));
    assert!(datapath.open_uplink(&uplink, false).is_err(), "never prepared");
    assert_eq!(leave(&lab), [none, none]);
    assert_eq!(datapath.prepare_uplink(&uplink).expect("prepared"), NONE);
    assert_eq!(leave(&lab), [none, none]);
    datapath.set_prover(Some(lab.sandboxes[0].1)).expect("the prover");
    assert_eq!(leave(&lab), [all, none]);
    datapath.open_uplink(&uplink, false).expect("IPv4 is proven");
    assert_eq!(leave(&lab), [all, four]);
    datapath.set_prover(None).expect("no prover");
    assert_eq!(leave(&lab), [four, four]);
    datapath.open_uplink(&uplink, true).expect("IPv6 is proven");
    assert_eq!(leave(&lab), [all, all]);

    // What is proven is used while it is proven again, also by the next netd; another uplink is not this one.
    let lab = lab.restart(&platform());
    let datapath = &lab.datapath;
    let proven = datapath.prepare_uplink(&uplink).expect("prepared");
    assert!(proven.ipv4 && proven.ipv6);
    assert_eq!(leave(&lab), [all, all]);
    let without = Uplink {
        ipv6: false,
        ..uplink
    };
    datapath.prepare_uplink(&without).expect("prepared");
    assert_eq!(leave(&lab), [four, four]);
    datapath.open_uplink(&uplink, true).expect("IPv6 is proven");
    datapath.close_uplink6().expect("closed");
    assert_eq!(leave(&lab), [four, four]);
    let other = Uplink {
        peer_mac: [2, 0, 0, 0, 0, 9],
        ..uplink
    };
    assert!(datapath.open_uplink(&other, true).is_err());
    assert_eq!(datapath.prepare_uplink(&other).expect("prepared"), NONE);
    assert_eq!(leave(&lab), [none, none]);
    // Without an uplink there is nothing to prove.
    datapath.set_uplink(None).expect("no uplink");
    datapath.set_prover(Some(lab.sandboxes[0].1)).expect("nothing");
    assert_eq!(leave(&lab), [none, none]);
}
