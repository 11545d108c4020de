//! The name that a connection shows, said in every way that a guard might hear differently from a server.

use super::{HANDSHAKE, at, by_name, greet, marked, resolved};
use crate::{
    attempt::{Attempts, Wanted},
    case::Case,
    wire::tls::Hello,
};

/// Encrypted ClientHello (RFC 9849), and the draft before it.
const ENCRYPTED_HELLO: u16 = 0xfe0d;
const ENCRYPTED_NAME: u16 = 0xffce;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "T01",
        [
            "names that are not allowed at the address of one that is: other tenants, and names that look alike",
            "refused before a server hears of it",
            "the allowed name at that address",
        ],
        |attempts| {
            let world = attempts.world;
            let (ok, wild, evil) = (&world.ok.name, &world.wild.name, &world.evil.name);
            resolved(attempts, ok, world.ok.address);
            for name in [
                world.tenant.clone(),
                evil.clone(),
                format!("www.{ok}"),
                format!("{ok}.{evil}"),
                format!("x{ok}"),
                wild.clone(),
                format!("x{wild}"),
                format!("evil-{wild}"),
                format!("{wild}.{evil}"),
                format!("*.{wild}"),
                ok.replace('.', "_"),
                ok.replace('.', "-"),
            ] {
                greet(attempts, at(world.ok.address, 443), &name, &Wanted::Refusal);
            }
        },
        by_name,
    ),
    Case::new(
        "T02",
        [
            "an allowed name at the address of another allowed name",
            "refused before a server hears of it",
            "each of them at its own address",
        ],
        |attempts| {
            let world = attempts.world;
            resolved(attempts, &world.ok.name, world.ok.address);
            resolved(attempts, &world.plain.name, world.plain.address);
            greet(
                attempts,
                at(world.ok.address, 443),
                &world.plain.name,
                &Wanted::Refusal,
            );
            greet(
                attempts,
                at(world.plain.address, 443),
                &world.ok.name,
                &Wanted::Refusal,
            );
        },
        |attempts| {
            by_name(attempts);
            let plain = &attempts.world.plain;
            resolved(attempts, &plain.name, plain.address);
            let wanted = Wanted::Answer(HANDSHAKE.to_owned());
            greet(attempts, at(plain.address, 443), &plain.name, &wanted);
        },
    ),
    Case::new(
        "T03",
        [
            "no name at all at the address of an allowed one",
            "refused before a server hears of it",
            "the allowed name at that address",
        ],
        |attempts| hello(attempts, "without a name", &Hello::default()),
        by_name,
    ),
    Case::new(
        "T04",
        [
            "names that are none: with NUL, with white space, two final dots, addresses, too long, not ASCII, empty",
            "refused before a server hears of it",
            "the allowed name, in letters of either case",
        ],
        |attempts| {
            let (ok, evil) = (attempts.world.ok.name.clone(), attempts.world.evil.name.clone());
            for name in [
                format!("{ok}\0.{evil}").into_bytes(),
                format!("{ok}\0").into_bytes(),
                format!(" {ok}").into_bytes(),
                format!("{ok} ").into_bytes(),
                format!("{ok}\r\n{evil}").into_bytes(),
                format!("{ok}..").into_bytes(),
                format!(".{ok}").into_bytes(),
                format!("{evil}/{ok}").into_bytes(),
                format!("{ok}:443").into_bytes(),
                format!("{evil}@{ok}").into_bytes(),
                attempts.world.ok.address.to_string().into_bytes(),
                format!("{}.{}", "a".repeat(300), ok).into_bytes(),
                [&b"\xff\xfe."[..], ok.as_bytes()].concat(),
                Vec::new(),
            ] {
                let what = format!("for {:?}", String::from_utf8_lossy(&name));
                let names = vec![(0, name)];
                hello(
                    attempts,
                    &what,
                    &Hello {
                        names,
                        ..Hello::default()
                    },
                );
            }
        },
        |attempts| {
            by_name(attempts);
            let ok = &attempts.world.ok;
            let wanted = Wanted::Answer(HANDSHAKE.to_owned());
            greet(attempts, at(ok.address, 443), &ok.name.to_uppercase(), &wanted);
        },
    ),
    Case::new(
        "T05",
        [
            "two names in one hello: in the list, in two extensions, under an unknown type",
            "refused before a server hears of it: two readings are none",
            "one name",
        ],
        |attempts| {
            let ok = attempts.world.ok.name.clone().into_bytes();
            let evil = attempts.world.evil.name.clone().into_bytes();
            for (what, names, second) in [
                (
                    "the allowed one first",
                    vec![(0, ok.clone()), (0, evil.clone())],
                    None,
                ),
                (
                    "the allowed one last",
                    vec![(0, evil.clone()), (0, ok.clone())],
                    None,
                ),
                ("in a second extension", vec![(0, ok.clone())], Some(evil.clone())),
                ("in a first extension", vec![(0, evil)], Some(ok)),
            ] {
                let two = Hello {
                    names,
                    second,
                    ..Hello::default()
                };
                hello(attempts, &format!("with two names, {what}"), &two);
            }
        },
        by_name,
    ),
    Case::new(
        "T06",
        [
            "a name hidden in a form that no client sends for show: the draft before ECH, an inner hello in clear",
            "refused before a server hears of it",
            "GREASE, which browsers always send",
        ],
        |attempts| {
            let name = attempts.world.ok.name.clone();
            hello(
                attempts,
                "with an encrypted name",
                &Hello::to(&name).with(ENCRYPTED_NAME, &[0x13; 40]),
            );
            hello(
                attempts,
                "that says it is an inner one",
                &Hello::to(&name).with(ENCRYPTED_HELLO, &[1]),
            );
            hello(
                attempts,
                "with a broken ECH",
                &Hello::to(&name).with(ENCRYPTED_HELLO, &[9, 9, 9]),
            );
        },
        |attempts| {
            let ok = &attempts.world.ok;
            resolved(attempts, &ok.name, ok.address);
            // Outer, HKDF-SHA256 and AES-128-GCM, a key of 32 bytes and a payload of 144.
            let mut grease = vec![0, 0, 1, 0, 1, 7, 0, 32];
            grease.extend([0x42; 32]);
            grease.extend([0, 144]);
            grease.extend([0x24; 144]);
            let hello = marked(attempts, Hello::to(&ok.name).with(ENCRYPTED_HELLO, &grease)).bytes();
            let outcome = attempts.tcp(at(ok.address, 443), &hello);
            attempts.note(
                "a hello with GREASE",
                &Wanted::Answer(HANDSHAKE.to_owned()),
                outcome,
            );
        },
    ),
    Case::new(
        "T07",
        [
            "a denied name in a hello that is cut: into records of one byte, into segments of a few",
            "refused before a server hears of it",
            "the allowed name, cut in the same ways",
        ],
        |attempts| {
            let name = attempts.world.tenant.clone();
            cut(attempts, &name, &Wanted::Refusal);
        },
        |attempts| {
            let name = attempts.world.ok.name.clone();
            cut(attempts, &name, &Wanted::Answer(HANDSHAKE.to_owned()));
        },
    ),
    Case::new(
        "T08",
        [
            "a second hello with another name, after the server asked for one",
            "cut before the server hears of it",
            "a second hello with the same name",
        ],
        |attempts| {
            let (first, second) = (attempts.world.ok.name.clone(), attempts.world.tenant.clone());
            let ok = attempts.world.ok.address;
            resolved(attempts, &first, ok);
            let greeting = Hello {
                keyless: true,
                ..Hello::to(&first)
            }
            .bytes();
            let again = marked(attempts, Hello::to(&second)).bytes();
            let outcome = attempts.tcp_in_turns(at(ok, 443), &greeting, |_| again);
            attempts.note(
                format!("a hello for {first}, then one for {second}"),
                &Wanted::Refusal,
                outcome,
            );
        },
        |attempts| {
            let ok = &attempts.world.ok;
            resolved(attempts, &ok.name, ok.address);
            let greeting = Hello {
                keyless: true,
                ..Hello::to(&ok.name)
            }
            .bytes();
            let again = marked(attempts, Hello::to(&ok.name)).bytes();
            let outcome = attempts.tcp_in_turns(at(ok.address, 443), &greeting, |_| again);
            attempts.note("the same name twice", &Wanted::Answer(String::new()), outcome);
        },
    ),
    Case::new(
        "T09",
        [
            "something that is no TLS where TLS is allowed: SSH, SOCKS, CONNECT, alerts, noise",
            "refused before a server hears of it",
            "TLS",
        ],
        |attempts| {
            let (ok, token) = (attempts.world.ok.clone(), attempts.token.clone());
            let evil = attempts.world.evil.name.clone();
            resolved(attempts, &ok.name, ok.address);
            let noise: Vec<u8> = (0_u8..=255).map(|byte| byte.wrapping_mul(167) ^ 0x5a).collect();
            for (what, bytes) in [
                ("SSH", format!("SSH-2.0-{token}\r\n").into_bytes()),
                ("SOCKS 5", [&[5, 1, 0][..], token.as_bytes()].concat()),
                (
                    "SOCKS 4a",
                    [&[4, 1, 1, 187, 0, 0, 0, 1, 0][..], token.as_bytes(), &[0]].concat(),
                ),
                (
                    "CONNECT",
                    format!("CONNECT {evil}:443 HTTP/1.1\r\nHost: {evil}\r\nX: {token}\r\n\r\n").into_bytes(),
                ),
                (
                    "an alert",
                    [&[21, 3, 3, 0, 2, 1, 0][..], token.as_bytes()].concat(),
                ),
                (
                    "data before any hello",
                    [&[23, 3, 3, 0, 32][..], token.as_bytes(), &[0; 32]].concat(),
                ),
                (
                    "a hello of SSL 2",
                    [&[0x80, 46, 1, 3, 1][..], token.as_bytes(), &[0; 48]].concat(),
                ),
                ("noise", [&noise[..], token.as_bytes()].concat()),
            ] {
                let outcome = attempts.tcp(at(ok.address, 443), &bytes);
                attempts.note(
                    format!("{what} at {}:443", ok.address),
                    &Wanted::HttpRefusal,
                    outcome,
                );
            }
        },
        by_name,
    ),
    Case::new(
        "T10",
        [
            "a hello larger than anybody's, with the name at its end or not at all",
            "refused before a server hears of it",
            "one as large as those with post-quantum keys, in two segments",
        ],
        |attempts| {
            let (ok, tenant) = (attempts.world.ok.clone(), attempts.world.tenant.clone());
            resolved(attempts, &ok.name, ok.address);
            for by in [20_000, 60_000] {
                let bytes = marked(attempts, Hello::to(&tenant)).padded(by).bytes();
                let outcome = attempts.tcp(at(ok.address, 443), &bytes);
                attempts.note(
                    format!("a hello for {tenant} of {} bytes", bytes.len()),
                    &Wanted::Refusal,
                    outcome,
                );
            }
        },
        |attempts| {
            let ok = &attempts.world.ok;
            resolved(attempts, &ok.name, ok.address);
            let bytes = marked(attempts, Hello::to(&ok.name).padded(1400)).bytes();
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            let outcome = attempts.tcp_in_pieces(at(ok.address, 443), &[first, rest]);
            attempts.note(
                "a hello of two segments",
                &Wanted::Answer(HANDSHAKE.to_owned()),
                outcome,
            );
        },
    ),
];

/// Says any hello where an allowed name is.
fn hello(attempts: &mut Attempts<'_>, what: &str, hello: &Hello) {
    let ok = &attempts.world.ok;
    if attempts.made.is_empty() {
        resolved(attempts, &ok.name, ok.address);
    }
    let bytes = marked(attempts, hello.clone()).bytes();
    let outcome = attempts.tcp(at(ok.address, 443), &bytes);
    attempts.note(format!("a hello {what}"), &Wanted::Refusal, outcome);
}

/// Says a hello in several cuts.
fn cut(attempts: &mut Attempts<'_>, name: &str, wanted: &Wanted) {
    let ok = &attempts.world.ok;
    resolved(attempts, &ok.name, ok.address);
    let to = at(ok.address, 443);
    let hello = marked(attempts, Hello::to(name));
    for size in [1, 7, 60] {
        let outcome = attempts.tcp(to, &hello.in_records_of(size));
        attempts.note(format!("{name} in records of {size}"), wanted, outcome);
    }
    for size in [1, 16] {
        let bytes = hello.bytes();
        let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
        let outcome = attempts.tcp_in_pieces(to, &pieces);
        attempts.note(format!("{name} in segments of {size}"), wanted, outcome);
    }
}
