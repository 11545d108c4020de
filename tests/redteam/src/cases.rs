//! The cases, by what they attack.

use std::net::{IpAddr, SocketAddr};

use crate::{
    attempt::{Attempts, Outcome, Wanted},
    case::Case,
    wire::tls::Hello,
};

mod addresses;
mod frames;
mod http;
mod names;
mod protocols;
mod secrets;
mod tls;

/// All of them.
pub const ALL: [&[Case]; 7] = [
    addresses::CASES,
    protocols::CASES,
    frames::CASES,
    tls::CASES,
    http::CASES,
    names::CASES,
    secrets::CASES,
];

/// An extension that no server knows, and each one ignores (RFC 8446, 4.2): it carries the token.
const CARRIER: u16 = 0xfada;
/// The first byte of a server's answer to a hello: a handshake record.
const HANDSHAKE: &str = "\u{16}\u{3}";
/// Where datagrams are allowed.
const DATAGRAMS: u16 = 7000;

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// A hello with the part's token in it.
fn marked(attempts: &Attempts<'_>, hello: Hello) -> Hello {
    hello.with(CARRIER, attempts.token.as_bytes())
}

/// Says hello for `name` at an address.
fn greet(attempts: &mut Attempts<'_>, to: SocketAddr, name: &str, wanted: &Wanted) -> Outcome {
    let hello = marked(attempts, Hello::to(name)).bytes();
    let outcome = attempts.tcp(to, &hello);
    attempts.note(format!("a TLS hello for {name:?} at {to}"), wanted, outcome)
}

/// The allowed way that most cases have: a name that is allowed, at the address it resolves to.
fn by_name(attempts: &mut Attempts<'_>) {
    let world = attempts.world;
    resolved(attempts, &world.ok.name, world.ok.address);
    let to = at(world.ok.address, 443);
    greet(
        attempts,
        to,
        &world.ok.name,
        &Wanted::Answer(HANDSHAKE.to_owned()),
    );
}

/// The same by an address that needs no name.
fn by_address(attempts: &mut Attempts<'_>) {
    let to = at(attempts.world.open, 443);
    let hello = marked(attempts, Hello::default()).bytes();
    let outcome = attempts.tcp(to, &hello);
    attempts.note(
        format!("a TLS hello without a name at {to}, which is allowed by address"),
        &Wanted::Answer(HANDSHAKE.to_owned()),
        outcome,
    );
}

/// The same for datagrams.
fn by_datagram(attempts: &mut Attempts<'_>) {
    let to = at(attempts.world.open, DATAGRAMS);
    let outcome = attempts.udp(to, attempts.token.as_bytes());
    let wanted = Wanted::Answer(attempts.token.clone());
    attempts.note(
        format!("a datagram to {to}, which is allowed by address"),
        &wanted,
        outcome,
    );
}

/// Resolves a name, so that its address may be used.
fn resolved(attempts: &mut Attempts<'_>, name: &str, address: IpAddr) {
    let outcome = if address.is_ipv4() {
        attempts.resolve(name)
    } else {
        let question = crate::wire::dns::question(name.as_bytes(), crate::wire::dns::AAAA);
        attempts.dns(attempts.resolver(), &question)
    };
    attempts.note(format!("resolving {name}"), &Wanted::Address(address), outcome);
}
