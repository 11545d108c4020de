//! Throughput and new connections: no program, the kernel forwarding without and with the wall, nginx relaying, netd.

use anyhow::Result;
use harness::namespace::Namespace;

use super::Effort;
use crate::{
    load::{self, Bulk, Connects, Rate, Target, Task},
    place::{Ground, Guarded, MIDDLE, NAMES, Nginx, OPAQUE, ORIGIN, PASSED, clear, peers::Peer},
    result::{Kind, Table},
};

/// Before a flow is counted: its windows have then grown.
const WARM_MS: u64 = 200;
/// Threads that connect.
const THREADS: usize = 4;
/// Where nginx relays TCP.
const RELAY: u16 = 6001;
/// Where haproxy does.
const HAPROXY_RELAY: u16 = 6002;

const ONE_LINK: &str = "raw, one link";
const TWO_LINKS: &str = "raw, two links";
const NGINX: &str = "nginx stream";
const HAPROXY: &str = "haproxy, mode tcp, splicing";
const THREE_LINKS: &str = "raw, three links, masqueraded";
const PASS: &str = "kernel pass, three links";
const NETD: &str = "netd, spliced";
const TLS_DIRECT: &str = "TLS, raw, two links";
const TLS_SPLICED: &str = "TLS, netd spliced";
const TLS_READ: &str = "TLS, netd intercepted";
const TLS_MASKED: &str = "TLS, netd masking a secret";

/// A client's place and what it connects to.
struct Way<'a> {
    name: &'static str,
    from: &'a Namespace,
    target: Target,
}

fn ways<'a>(ground: &'a Ground, guarded: &'a Guarded, relays: &Relays) -> Vec<Way<'a>> {
    let way = |name, from, target| Way { name, from, target };
    let [spliced, read, masked] = NAMES;
    let inside = &guarded.inside;
    let mut ways = vec![
        way(ONE_LINK, &ground.middle, clear(ORIGIN, OPAQUE)),
        way(TWO_LINKS, &ground.plain, clear(ORIGIN, OPAQUE)),
        way(THREE_LINKS, &ground.deep, clear(ORIGIN, OPAQUE)),
        way(PASS, inside, clear(ORIGIN, PASSED)),
        way(NETD, inside, clear(ORIGIN, OPAQUE)),
        way(TLS_DIRECT, &ground.plain, ground.secure(spliced)),
        way(TLS_SPLICED, inside, guarded.secure(spliced)),
        way(TLS_READ, inside, guarded.secure(read)),
        way(TLS_MASKED, inside, guarded.secure(masked)),
    ];
    if relays.haproxy.is_some() {
        ways.insert(2, way(HAPROXY, &ground.plain, clear(MIDDLE, HAPROXY_RELAY)));
    }
    if relays.nginx.is_some() {
        ways.insert(2, way(NGINX, &ground.plain, clear(MIDDLE, RELAY)));
    }
    ways
}

/// What relays beside netd, as far as it is installed.
struct Relays {
    nginx: Option<Nginx>,
    haproxy: Option<Peer>,
}

impl Relays {
    fn start(ground: &Ground) -> Result<Self> {
        Ok(Self {
            nginx: nginx(ground)?,
            haproxy: Peer::haproxy(ground, HAPROXY_RELAY, OPAQUE)?,
        })
    }
}

fn nginx(ground: &Ground) -> Result<Option<Nginx>> {
    let relay = format!(
        "stream {{ server {{ listen {MIDDLE}:{RELAY} backlog=4096; tcp_nodelay on; \
         proxy_pass {ORIGIN}:{OPAQUE}; proxy_buffer_size 64k; }} }}\n"
    );
    ground.nginx(RELAY, &relay)
}

fn rows(ways: &[Way<'_>], without: &[&str]) -> Vec<(&'static str, Option<&'static str>)> {
    let peer = |name: &str| match name {
        TWO_LINKS | THREE_LINKS | NGINX | HAPROXY | NETD => Some(ONE_LINK),
        // The same links, forwards and masquerade: what there is besides is the wall's.
        PASS => Some(THREE_LINKS),
        TLS_SPLICED | TLS_READ | TLS_MASKED => Some(TLS_DIRECT),
        _ => None,
    };
    ways.iter()
        .filter(|way| !without.contains(&way.name))
        .map(|way| (way.name, peer(way.name)))
        .collect()
}

/// Bits a second, by one flow and by four.
pub(crate) fn splice(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let relays = Relays::start(ground)?;
    let ways = ways(ground, guarded, &relays);
    let names = rows(&ways, &[]);
    let mut tables = Vec::new();
    for flows in [1, 4] {
        let title = format!(
            "Bulk throughput, {flows} flow{}",
            if flows == 1 { "" } else { "s" }
        );
        tables.push((flows, Table::new(&title, "Gbit/s", Kind::Rate, &names)));
    }
    for _ in 0..effort.rounds {
        for (flows, table) in &mut tables {
            for way in &ways {
                let bulk = Bulk {
                    target: way.target.clone(),
                    flows: *flows,
                    warm_ms: WARM_MS.min(effort.count_ms),
                    count_ms: effort.count_ms,
                };
                let bits: f64 = load::run(way.from, &Task::Bulk(bulk))?;
                table.add(way.name, vec![bits / 1e9]);
            }
        }
    }
    Ok(tables
        .into_iter()
        .flat_map(|(_, table)| [against_relays(&table), Some(table)])
        .flatten()
        .collect())
}

/// The same figures of what relays in clear, held against haproxy, where it is there.
fn against_relays(table: &Table) -> Option<Table> {
    let names: Vec<(&str, Option<&str>)> = [HAPROXY, NGINX, NETD]
        .into_iter()
        .filter(|name| table.rows.iter().any(|row| row.name == *name))
        .map(|name| (name, (name != HAPROXY).then_some(HAPROXY)))
        .collect();
    if !names.contains(&(HAPROXY, None)) {
        return None;
    }
    let title = format!("{}: relays", table.title);
    let mut relays = Table::new(&title, &table.unit, table.kind, &names);
    for row in table
        .rows
        .iter()
        .filter(|row| names.iter().any(|(name, _)| *name == row.name))
    {
        row.rounds
            .iter()
            .for_each(|round| relays.add(&row.name, round.clone()));
    }
    Some(relays)
}

/// Connect, request, 1 KiB answer, close.
pub(crate) fn connects(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let relays = Relays::start(ground)?;
    let ways = ways(ground, guarded, &relays);
    let names = rows(&ways, &[]);
    let mut table = Table::new(
        "Connect, request, 1 KiB, close: 4 clients",
        "connections/s",
        Kind::Rate,
        &names,
    );
    for _ in 0..effort.rounds {
        for way in &ways {
            let connects = Connects {
                target: way.target.clone(),
                threads: THREADS,
                count_ms: effort.count_ms,
            };
            let rate: Rate = load::run(way.from, &Task::Connects(connects))?;
            table.add(way.name, vec![rate.per_second]);
        }
    }
    Ok([against_relays(&table), Some(table)]
        .into_iter()
        .flatten()
        .collect())
}
