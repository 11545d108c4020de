//! Where a packet goes: addresses that nobody resolved, ports that nobody allowed, and everything that lies nearer to
//! the sandbox than the internet.

use std::net::{IpAddr, SocketAddr};

use super::{HANDSHAKE, at, by_address, by_name, greet, marked, resolved};
use crate::{
    attempt::{Attempts, Wanted},
    case::{Case, Trace},
    wire::{packet::default_gateway, tls::Hello},
};

/// Metadata services, all at addresses that no router carries.
const METADATA: [&str; 5] = [
    "169.254.169.254",
    "169.254.169.253",
    "169.254.170.2",
    "100.100.100.200",
    "192.0.0.192",
];
/// One address of each private range.
const PRIVATE: [&str; 8] = [
    "10.0.0.5",
    "10.96.0.1",
    "100.64.0.5",
    "172.16.0.5",
    "172.31.255.254",
    "192.168.0.5",
    "198.18.0.1",
    "192.0.0.8",
];
/// Private addresses as IPv6 has or wraps them: unique local, IPv4-mapped, NAT64, 6to4.
const WRAPPED: [&str; 7] = [
    "fd00:ec2::254",
    "fd00::1",
    "fec0::1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.5",
    "64:ff9b::a9fe:a9fe",
    "2002:a00:5::1",
];
/// Ports that the attacker's host has, and some that it has not. Not 53: questions are answered by whoever guards.
const PORTS: [u16; 12] = [1, 22, 25, 80, 443, 853, 5353, 8080, 8443, 9418, 51_820, 65_535];

pub(super) const CASES: &[Case] = &[
    Case::new(
        "A01",
        [
            "a TLS connection to an address that is not allowed, without any name",
            "refused before there is a connection",
            "the same to an address that is allowed",
        ],
        |attempts| {
            let to = at(attempts.world.evil.address, 443);
            let hello = marked(attempts, Hello::default()).bytes();
            let outcome = attempts.tcp(to, &hello);
            attempts.note(
                format!("a TLS hello without a name at {to}"),
                &Wanted::NoConnection,
                outcome,
            );
        },
        by_address,
    ),
    Case::new(
        "A02",
        [
            "an allowed name sent to an address that is not its own, as after editing /etc/hosts",
            "refused before there is a connection",
            "the same name at its own address",
        ],
        |attempts| {
            let world = attempts.world;
            resolved(attempts, &world.ok.name, world.ok.address);
            for name in [&world.ok.name, &format!("www.{}", world.wild.name)] {
                greet(attempts, at(world.evil.address, 443), name, &Wanted::NoConnection);
            }
        },
        by_name,
    ),
    Case::new(
        "A03",
        [
            "an allowed name at its own address that nobody in this sandbox has resolved",
            "refused: an address is bound to a name by an answer to this sandbox, not by the client's word",
            "the same after resolving it",
        ],
        |attempts| {
            let late = &attempts.world.late;
            greet(attempts, at(late.address, 443), &late.name, &Wanted::NoConnection);
        },
        |attempts| {
            let late = &attempts.world.late;
            resolved(attempts, &late.name, late.address);
            let wanted = Wanted::Answer(HANDSHAKE.to_owned());
            greet(attempts, at(late.address, 443), &late.name, &wanted);
        },
    )
    .forbids(|world| vec![Trace::To(world.late.address)]),
    Case::new(
        "A04",
        [
            "ports of an allowed host that no rule opens",
            "refused before there is a connection",
            "port 22 of the same host, which is open whatever is spoken there",
        ],
        |attempts| {
            let ok = &attempts.world.ok;
            resolved(attempts, &ok.name, ok.address);
            for port in [1, 25, 442, 444, 8080, 8443, 65_535] {
                refused(attempts, at(ok.address, port));
            }
        },
        |attempts| {
            let ok = &attempts.world.ok;
            resolved(attempts, &ok.name, ok.address);
            let outcome = attempts.tcp(at(ok.address, 22), attempts.token.as_bytes());
            attempts.note("anything on port 22", &Wanted::Answer(String::new()), outcome);
        },
    )
    .forbids(|world| vec![Trace::To(world.ok.address)]),
    Case::new(
        "A05",
        [
            "every port of the attacker's host, one after the other",
            "refused before there is a connection, each",
            "a connection by an allowed name meanwhile",
        ],
        |attempts| {
            for port in PORTS {
                refused(attempts, at(attempts.world.evil.address, port));
            }
        },
        by_name,
    ),
    Case::new(
        "A06",
        [
            "the metadata services of clouds",
            "refused before there is a connection, whatever is allowed",
            "an address that is allowed",
        ],
        |attempts| each(attempts, &METADATA, &[80, 443]),
        by_address,
    )
    .forbids(|_| {
        METADATA
            .iter()
            .filter_map(|text| Some(Trace::To(text.parse().ok()?)))
            .collect()
    }),
    Case::new(
        "A07",
        [
            "private networks around the machine",
            "refused before there is a connection",
            "an address that is allowed",
        ],
        |attempts| each(attempts, &PRIVATE, &[80, 443, 6443, 10_250]),
        by_address,
    )
    .forbids(|_| {
        PRIVATE
            .iter()
            .filter_map(|text| Some(Trace::To(text.parse().ok()?)))
            .collect()
    }),
    Case::new(
        "A08",
        [
            "a listener on the machine that runs the sandbox",
            "refused before there is a connection",
            "an address that is allowed",
        ],
        |attempts| {
            inside(
                attempts,
                attempts.world.node,
                "the world names no listener on the machine",
            )
        },
        by_address,
    ),
    Case::new(
        "A09",
        [
            "a listener in another sandbox, and other ports of it",
            "refused before there is a connection",
            "an address that is allowed",
        ],
        |attempts| {
            inside(
                attempts,
                attempts.world.neighbour,
                "the world names no other sandbox",
            )
        },
        by_address,
    ),
    Case::new(
        "A10",
        [
            "ports of the sandbox's own gateway",
            "refused before there is a connection",
            "an address that is allowed",
        ],
        |attempts| {
            let Some(gateway) = default_gateway() else {
                return attempts.impossible("the sandbox has no default gateway");
            };
            if !attempts.world.permits(gateway.into()) {
                return attempts.impossible("the gateway's address may be tried in a closed world only");
            }
            // Not 443, where a guard may have a page of its own to explain itself.
            for port in [22, 80, 8080, 9111, 10_250, GATEWAY_PORT, 15_001, 15_053] {
                refused(attempts, at(gateway.into(), port));
            }
        },
        by_address,
    )
    .forbids(|_| vec![Trace::Port(GATEWAY_PORT)]),
    Case::new(
        "A11",
        [
            "the attacker's host by IPv6, and its IPv4 address as IPv6 wraps it",
            "refused before there is a connection: no family is unfiltered",
            "an allowed name by IPv6",
        ],
        |attempts| {
            let Some(six) = &attempts.world.ipv6 else {
                return attempts.impossible(NO_IPV6);
            };
            for port in PORTS {
                refused(attempts, at(six.evil, port));
            }
            greet(attempts, at(six.evil, 443), &six.ok.name, &Wanted::NoConnection);
            let IpAddr::V4(evil) = attempts.world.evil.address else {
                return;
            };
            // Its IPv4 address as IPv6 wraps it: IPv4-mapped, NAT64, 6to4.
            let [high, low] = [evil.to_bits() >> 16, evil.to_bits() & 0xffff];
            let wrapped = [
                format!("::ffff:{evil}"),
                format!("64:ff9b::{high:x}:{low:x}"),
                format!("2002:{high:x}:{low:x}::1"),
            ];
            for address in wrapped.iter().filter_map(|text| text.parse().ok()) {
                if attempts.world.permits(address) {
                    refused(attempts, at(address, 443));
                }
            }
        },
        |attempts| {
            let Some(six) = &attempts.world.ipv6 else {
                return attempts.impossible(NO_IPV6);
            };
            resolved(attempts, &six.ok.name, six.ok.address);
            let wanted = Wanted::Answer(HANDSHAKE.to_owned());
            greet(attempts, at(six.ok.address, 443), &six.ok.name, &wanted);
        },
    ),
    Case::new(
        "A12",
        [
            "private and metadata addresses as IPv6 has them, and as it wraps those of IPv4",
            "refused before there is a connection",
            "an address that is allowed",
        ],
        |attempts| each(attempts, &WRAPPED, &[80, 443]),
        by_address,
    )
    .forbids(|_| {
        let plain = ["169.254.169.254", "10.0.0.5"];
        let all = WRAPPED.iter().chain(&plain);
        all.filter_map(|text| Some(Trace::To(text.parse().ok()?)))
            .collect()
    }),
];

/// Asked for on gateways: nothing else uses it.
const GATEWAY_PORT: u16 = 7778;
const NO_IPV6: &str = "the world has no IPv6";

/// A connection that must not be, with the token on it.
fn refused(attempts: &mut Attempts<'_>, to: SocketAddr) {
    let outcome = attempts.tcp(to, attempts.token.as_bytes());
    attempts.note(format!("TCP {to}"), &Wanted::NoConnection, outcome);
}

fn each(attempts: &mut Attempts<'_>, addresses: &[&str], ports: &[u16]) {
    if !attempts.world.closed {
        return attempts.impossible("private addresses are tried in a closed world only");
    }
    for address in addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok()) {
        for port in ports {
            refused(attempts, at(address, *port));
        }
    }
}

fn inside(attempts: &mut Attempts<'_>, listener: Option<SocketAddr>, without: &str) {
    let Some(listener) = listener else {
        return attempts.impossible(without);
    };
    for port in [listener.port(), 22, 443, 8080, 9111] {
        let to = at(listener.ip(), port);
        let outcome = attempts.tcp_until_answered(to, attempts.token.as_bytes());
        attempts.note(format!("TCP {to}"), &Wanted::NoConnection, outcome);
    }
}
