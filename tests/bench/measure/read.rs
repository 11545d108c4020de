//! TLS whose requests are read: netd beside squid with ssl-bump and mitmproxy.

use std::net::SocketAddrV4;

use anyhow::Result;
use harness::namespace::Namespace;
use serde_json::json;

use super::Effort;
use crate::{
    load::{self, Connects, Rate, Requests, Target, Task, stream::Secure},
    place::{
        Ground, Guarded, NAMES, ORIGIN, PEER_PORTS,
        peers::{Change, Peer},
        policy,
    },
    result::{Kind, Table},
};

const CONNECTIONS: usize = 16;
const THREADS: usize = 4;
const WARM_MS: u64 = 300;

const DIRECT: &str = "no proxy, two links";
const NETD: &str = "netd, read only";
const NETD_CHANGED: &str = "netd, injecting and masking";
const SQUID: &str = "squid ssl-bump, read only";
const SQUID_CHANGED: &str = "squid ssl-bump, adding a header";
const MITMPROXY: &str = "mitmproxy, read only";
const MITMPROXY_CHANGED: &str = "mitmproxy, injecting and masking";

/// A client's place, and how it goes to the origin.
struct Way<'a> {
    name: &'static str,
    from: &'a Namespace,
    target: Target,
    host: String,
}

/// Runs it.
pub(crate) fn read(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    // In a sandbox with a secret all read flows are searched for it: reading alone needs one without.
    let bare = guarded.node.register("bare");
    let without = bare.sandbox(&json!({ "network": policy(), "timeout_seconds": 86_400 }));
    let inside = guarded.inside_of(&without.id)?;
    let [_, read, masked] = NAMES;
    let mut ways = vec![
        Way::of(DIRECT, &ground.plain, ground.secure(read)),
        Way::of(NETD, &inside, guarded.secure_in(ground, &without, read)?),
        Way::of(NETD_CHANGED, &guarded.inside, guarded.secure(masked)),
    ];
    let squids = [Change::Nothing, Change::Credential]
        .into_iter()
        .zip([SQUID, SQUID_CHANGED])
        .zip(PEER_PORTS)
        .map(|((change, name), port)| Ok((name, port, Peer::squid(ground, port, change)?)));
    let mitmproxies = [Change::Nothing, Change::Credential]
        .into_iter()
        .zip([MITMPROXY, MITMPROXY_CHANGED])
        .zip(&PEER_PORTS[2..])
        .map(|((change, name), port)| Ok((name, *port, Peer::mitmproxy(ground, *port, change)?)));
    let peers: Vec<(&'static str, u16, Option<Peer>)> = squids.chain(mitmproxies).collect::<Result<_>>()?;
    for (name, port, peer) in &peers {
        let Some(peer) = peer else { continue };
        let target = Target {
            to: SocketAddrV4::new(ORIGIN, *port),
            tls: Some(Secure {
                name: read.to_owned(),
                authorities: peer.authorities(),
                resolver: None,
            }),
        };
        ways.push(Way::of(name, &ground.plain, target));
    }
    let tables = measure(&ways, effort);
    without.stop();
    tables
}

impl<'a> Way<'a> {
    fn of(name: &'static str, from: &'a Namespace, target: Target) -> Self {
        let host = match &target.tls {
            Some(secure) if target.to.port() == 443 => secure.name.clone(),
            Some(secure) => format!("{}:{}", secure.name, target.to.port()),
            None => target.to.to_string(),
        };
        Self {
            name,
            from,
            target,
            host,
        }
    }
}

fn measure(ways: &[Way<'_>], effort: Effort) -> Result<Vec<Table>> {
    let has = |name: &str| ways.iter().any(|way| way.name == name);
    let peer = |name: &str| {
        let peer = match name {
            NETD => SQUID,
            NETD_CHANGED => SQUID_CHANGED,
            MITMPROXY => SQUID,
            MITMPROXY_CHANGED => SQUID_CHANGED,
            _ => return None,
        };
        Some(peer).filter(|peer| has(peer))
    };
    let rows: Vec<_> = ways.iter().map(|way| (way.name, peer(way.name))).collect();
    let kept = format!("Requests read inside TLS, 1 KiB, {CONNECTIONS} kept connections");
    let fresh = format!("New connections read inside TLS, {THREADS} clients");
    let mut tables = Vec::new();
    for (title, unit) in [(kept, "requests/s"), (fresh, "connections/s")] {
        tables.push([
            Table::new(&title, unit, Kind::Rate, &rows),
            Table::new(&format!("{title}: p50"), "ms", Kind::Cost, &rows),
            Table::new(&format!("{title}: p99"), "ms", Kind::Cost, &rows),
        ]);
    }
    for _ in 0..effort.rounds {
        for way in ways {
            let kept = Requests {
                target: way.target.clone(),
                host: way.host.clone(),
                path: "/".to_owned(),
                status: 200,
                headers: String::new(),
                connections: CONNECTIONS,
                warm_ms: WARM_MS.min(effort.count_ms),
                count_ms: effort.count_ms,
            };
            let fresh = Connects {
                target: way.target.clone(),
                threads: THREADS,
                count_ms: effort.count_ms,
            };
            let measured: [Rate; 2] = [
                load::run(way.from, &Task::Requests(kept))?,
                load::run(way.from, &Task::Connects(fresh))?,
            ];
            for (rate, [rates, p50, p99]) in measured.into_iter().zip(&mut tables) {
                rates.add(way.name, vec![rate.per_second]);
                p50.add(way.name, vec![rate.p50_ms]);
                p99.add(way.name, vec![rate.p99_ms]);
            }
        }
    }
    Ok(tables.into_iter().flatten().collect())
}
