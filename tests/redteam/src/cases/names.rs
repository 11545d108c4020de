//! What a question carries out, and what an answer brings in. A question is a way out for data: one that should not
//! have been asked is a leak, whatever was answered.

use std::net::{IpAddr, SocketAddr};

use super::{HANDSHAKE, at, greet};
use crate::{
    attempt::{Attempts, End, Wanted},
    case::{Case, Trace},
    wire::dns::{A, AAAA, Question, question},
};

/// Questions of the case that asks for many names.
const MANY: usize = 100;
/// How many of them may be asked outside: generous, so that systems with other budgets pass too.
const FEW: usize = 64;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "D01",
        [
            "a question for a name that is not allowed, with data in it, to the sandbox's own resolver",
            "refused, and never asked outside",
            "a question for a name that is allowed",
        ],
        |attempts| {
            let server = attempts.resolver();
            for name in [
                format!("{}.{}", attempts.token, attempts.world.evil.name),
                attempts.token.clone(),
                format!("{}.{}", attempts.token, attempts.world.tenant),
                format!("{}.svc.cluster.local", attempts.token),
                format!("{}.in-addr.arpa", attempts.token),
                format!("{}.ok.test.evil.test", attempts.token),
            ] {
                for kind in [A, AAAA] {
                    let message = question(name.as_bytes(), kind);
                    let outcome = attempts.dns(server, &message);
                    attempts.note(format!("{name}, type {kind}, by UDP"), &Wanted::NoName, outcome);
                    let outcome = attempts.dns_by_tcp(server, &message);
                    attempts.note(format!("{name}, type {kind}, by TCP"), &Wanted::NoName, outcome);
                }
            }
        },
        allowed,
    ),
    Case::new(
        "D02",
        [
            "the same question to name servers of one's choice, on port 53 and on others",
            "answered by the sandbox's own resolver or refused, and never sent there",
            "an allowed question to a server of one's choice, or to one's own",
        ],
        |attempts| {
            let world = attempts.world;
            let name = format!("{}.{}", attempts.token, world.evil.name);
            let message = question(name.as_bytes(), A);
            for server in [world.evil.address, world.ok.address, world.open] {
                let outcome = attempts.dns(at(server, 53), &message);
                attempts.note(format!("by UDP to {server}"), &Wanted::NoName, outcome);
                let outcome = attempts.dns_by_tcp(at(server, 53), &message);
                attempts.note(format!("by TCP to {server}"), &Wanted::NoName, outcome);
            }
            for port in [853, 5353, 8080] {
                let to = at(world.evil.address, port);
                let outcome = attempts.udp(to, &message);
                attempts.note(format!("by UDP to {to}"), &Wanted::Refusal, outcome);
                let outcome = attempts.tcp(to, &message);
                attempts.note(format!("by TCP to {to}"), &Wanted::NoConnection, outcome);
            }
        },
        allowed,
    ),
    Case::new(
        "D03",
        [
            "names that only look allowed: with letters before the zone, with more behind it, without dots between",
            "refused, and never asked outside",
            "a name below the zone, in letters of either case",
        ],
        |attempts| {
            let server = attempts.resolver();
            let (wild, evil, token) = (
                &attempts.world.wild.name,
                &attempts.world.evil.name,
                attempts.token.clone(),
            );
            for name in [
                format!("x{wild}"),
                format!("{token}{wild}"),
                format!("{token}-{wild}"),
                format!("{token}.{wild}.{evil}"),
                format!("{token}.{}", wild.replace('.', "-")),
                format!("{token}.www.{}", attempts.world.ok.name),
                format!("{token} .{wild}"),
                format!("{token}\0.{wild}"),
                format!("*{token}.{wild}"),
            ] {
                let outcome = attempts.dns(server, &question(name.as_bytes(), A));
                attempts.note(format!("{name:?}"), &Wanted::NoName, outcome);
            }
        },
        |attempts| {
            let world = attempts.world;
            let name = format!(
                "{}.{}",
                attempts.token.to_uppercase(),
                world.wild.name.to_uppercase()
            );
            let outcome = attempts.resolve(&name);
            attempts.note(name, &Wanted::Address(world.wild.address), outcome);
        },
    ),
    Case::new(
        "D04",
        [
            "types that carry more than addresses, for an allowed name",
            "refused or empty, and never asked outside",
            "the addresses of an allowed name",
        ],
        |attempts| {
            let server = attempts.resolver();
            for kind in [
                2, 5, 10, 12, 15, 16, 33, 35, 43, 48, 64, 65, 252, 255, 257, 65_280,
            ] {
                let name = format!("{}-{kind}.{}", attempts.token, attempts.world.wild.name);
                let outcome = attempts.dns(server, &question(name.as_bytes(), kind));
                attempts.note(format!("type {kind}"), &Wanted::Anything, outcome);
            }
        },
        allowed,
    ),
    Case::new(
        "D05",
        [
            "questions that are none: two in one, none, other classes, other operations, bytes after the end",
            "refused, and never asked outside",
            "a proper question",
        ],
        |attempts| {
            let server = attempts.resolver();
            let allowed = format!("{}.{}", attempts.token, attempts.world.wild.name);
            let denied = format!("{}.{}", attempts.token, attempts.world.evil.name);
            let proper = Question::of(allowed.as_bytes(), A);
            for (what, message) in [
                (
                    "two questions",
                    Question {
                        further: Some(denied.as_bytes()),
                        ..proper.clone()
                    },
                ),
                (
                    "the same twice",
                    Question {
                        count: 2,
                        ..proper.clone()
                    },
                ),
                (
                    "none",
                    Question {
                        count: 0,
                        trailing: attempts.token.clone().into_bytes(),
                        ..proper.clone()
                    },
                ),
                (
                    "class CHAOS",
                    Question {
                        class: 3,
                        ..proper.clone()
                    },
                ),
                (
                    "class ANY",
                    Question {
                        class: 255,
                        ..proper.clone()
                    },
                ),
                (
                    "a status request",
                    Question {
                        flags: 0x1000,
                        ..proper.clone()
                    },
                ),
                (
                    "a notification",
                    Question {
                        flags: 0x2000,
                        ..proper.clone()
                    },
                ),
                (
                    "an update",
                    Question {
                        flags: 0x2800,
                        ..proper.clone()
                    },
                ),
                (
                    "bytes after the end",
                    Question {
                        trailing: attempts.token.clone().into_bytes(),
                        ..proper.clone()
                    },
                ),
            ] {
                let outcome = attempts.dns(server, &message.bytes());
                attempts.note(what, &Wanted::NoName, outcome);
            }
        },
        allowed,
    ),
    Case::new(
        "D06",
        [
            "data beside an allowed name: options of EDNS (client subnet, cookie, padding, unknown), reserved bits",
            "a question outside has a name and a type, and nothing of this",
            "the same name without them",
        ],
        |attempts| {
            let server = attempts.resolver();
            let data = attempts.token.clone().into_bytes();
            for (index, code) in [8, 10, 12, 15, 65_001].into_iter().enumerate() {
                // The name says nothing: it may go out.
                let name = format!("plain{index}.{}", attempts.world.wild.name);
                let message = Question {
                    options: vec![(code, data.clone())],
                    flags: 0x01f0,
                    ..Question::of(name.as_bytes(), A)
                };
                let outcome = attempts.dns(server, &message.bytes());
                attempts.note(format!("option {code}"), &Wanted::Anything, outcome);
            }
        },
        allowed,
    ),
    Case::new(
        "D07",
        [
            "a hundred different names under an allowed zone, by UDP and TCP, for both families: a tunnel",
            "after some of them no more are asked outside",
            "a single name there",
        ],
        |attempts| {
            for index in 0..MANY {
                let name = format!("{}{index:04}.{}", attempts.token, attempts.world.budget);
                let kind = if index % 2 == 0 { A } else { AAAA };
                let (server, message) = (attempts.resolver(), question(name.as_bytes(), kind));
                let outcome = if index % 3 == 0 {
                    attempts.dns_by_tcp(server, &message)
                } else {
                    attempts.dns(server, &message)
                };
                attempts.note(format!("name {index}"), &Wanted::Anything, outcome);
            }
        },
        allowed,
    )
    .at_most(FEW),
    Case::new(
        "D08",
        [
            "names as long as they may be, under an allowed zone",
            "refused, and never asked outside",
            "a short one there",
        ],
        |attempts| {
            let (token, wild) = (attempts.token.clone(), attempts.world.wild.name.clone());
            let label = format!("{token:x<63}");
            for name in [
                format!("{label}.{wild}"),
                format!("{label}.{label}.{label}.{wild}"),
                format!("{}{wild}", format!("{token:x<30}.").repeat(6)),
            ] {
                let outcome = attempts.resolve(&name);
                attempts.note(format!("{} bytes", name.len()), &Wanted::NoName, outcome);
            }
        },
        allowed,
    ),
    Case::new(
        "D09",
        [
            "an allowed name that resolves to private addresses, and a connection to whatever the answer has",
            "no such address in an answer, and no connection",
            "a name of whose addresses one is public: that one works",
        ],
        |attempts| {
            let world = attempts.world;
            let outcome = attempts.resolve(&world.rebind);
            let outcome = attempts.note(&world.rebind, &Wanted::NoName, outcome);
            let half = attempts.resolve(&world.half_rebind);
            let half = attempts.note(&world.half_rebind, &Wanted::Address(world.ok.address), half);
            let private: Vec<IpAddr> = [outcome.addresses, half.addresses].concat();
            for address in private.into_iter().filter(|address| *address != world.ok.address) {
                greet(attempts, at(address, 443), &world.rebind, &Wanted::NoConnection);
            }
        },
        |attempts| {
            let world = attempts.world;
            let outcome = attempts.resolve(&world.half_rebind);
            attempts.note(&world.half_rebind, &Wanted::Among(world.ok.address), outcome);
            let wanted = Wanted::Answer(HANDSHAKE.to_owned());
            greet(attempts, at(world.ok.address, 443), &world.half_rebind, &wanted);
        },
    )
    .forbids(|_| {
        let private = ["10.0.0.5", "169.254.169.254", "127.0.0.1", "192.168.0.5"];
        private
            .iter()
            .filter_map(|text| Some(Trace::To(text.parse().ok()?)))
            .collect()
    }),
    Case::new(
        "D10",
        [
            "noise on port 53: no message, half a message, an answer nobody asked for, labels that point at themselves",
            "nothing of it goes on",
            "a question right after it",
        ],
        |attempts| {
            let server = attempts.resolver();
            let token = attempts.token.clone();
            let mut answer = question(format!("{token}.{}", attempts.world.wild.name).as_bytes(), A);
            answer[2] |= 0x80;
            let mut pointing = question(b"x", A)[..12].to_vec();
            pointing.extend([0xc0, 12, 0, 1, 0, 1]);
            pointing.extend(token.as_bytes());
            for (what, bytes) in [
                ("letters", token.clone().into_bytes()),
                ("an answer", answer.clone()),
                ("half a question", answer[..20].to_vec()),
                ("a name that points at itself", pointing),
            ] {
                noise(attempts, what, server, &bytes);
                noise(attempts, what, at(attempts.world.evil.address, 53), &bytes);
            }
        },
        allowed,
    ),
];

/// A question that must be answered, to the sandbox's own resolver.
fn allowed(attempts: &mut Attempts<'_>) {
    let world = attempts.world;
    let name = format!("{}.{}", attempts.token, world.wild.name);
    let outcome = attempts.resolve(&name);
    attempts.note(name, &Wanted::Address(world.wild.address), outcome);
}

/// Sends bytes that nobody needs to answer, by UDP without waiting and by TCP.
fn noise(attempts: &mut Attempts<'_>, what: &str, server: SocketAddr, bytes: &[u8]) {
    let started = std::time::Instant::now();
    let any: IpAddr = if server.is_ipv4() {
        [0; 4].into()
    } else {
        [0; 16].into()
    };
    let sent = attempts.permit(server.ip()).and_then(|()| {
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.send_to(bytes, server)
    });
    let outcome = match sent {
        Ok(_) => crate::attempt::Outcome::of(End::Sent, false, started),
        Err(error) => crate::attempt::Outcome::of_error(&error, false, started),
    };
    attempts.note(format!("{what} by UDP to {server}"), &Wanted::NoAnswer, outcome);
}
