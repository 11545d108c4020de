//! Questions through netd's resolver, beside unbound that forwards to the same name server.

use anyhow::Result;
use harness::namespace::Namespace;
use serde_json::json;

use super::Effort;
use crate::{
    load::{self, Questions, Rate, Task},
    place::{Ground, Guarded, MIDDLE, network_of},
    result::{Kind, Table},
};

const WARM_MS: u64 = 200;
/// Sandboxes that ask at once. The kernel lets each have 200 questions in a tenth of a second, and a resolver answers
/// many more.
const SANDBOXES: usize = 60;
/// From one question of a client to its next, at least: below what the kernel lets a sandbox have.
const APART_US: u64 = 600;
/// Questions that each has open.
const OPEN: usize = 2;
/// Names that are known after the first round.
const KNOWN: u32 = 32;
/// Where unbound listens.
const PORT: u16 = 5300;
/// Where the questions of sandboxes go; any address would do.
const ANYWHERE: std::net::SocketAddrV4 = std::net::SocketAddrV4::new(harness::world::RESOLVER, 53);

const UNBOUND: &str = "unbound";
const NETD: &str = "netd";

/// Runs it; nothing where there is no unbound to compare with and no sandbox to ask from.
pub(crate) fn dns(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let unbound = ground.unbound(PORT)?;
    let peer = unbound.is_some().then_some(UNBOUND);
    let mut rows = vec![(NETD, peer)];
    if unbound.is_some() {
        rows.insert(0, (UNBOUND, None));
    }
    let sandboxes: Vec<_> = (0..effort.times(SANDBOXES).max(2))
        .map(|_| {
            // Every name in one zone: the budget must not be what is measured.
            let network = json!({ "mode": "allowlist", "allowed_domains": ["*.known.test", "*.fresh.test"],
                "dns": { "unique_names_per_minute": 100_000, "query_bytes_per_minute": 100_000_000 } });
            guarded
                .organization
                .sandbox(&json!({ "network": network, "timeout_seconds": 86_400 }))
        })
        .collect();
    let mut places = Vec::new();
    for sandbox in &sandboxes {
        let [place, _] = network_of(&guarded.node, &sandbox.id)?;
        places.push(place);
    }
    let mut tables = Vec::new();
    // Fresh names are never asked twice, not even in another round.
    let mut fresh = 0;
    for (what, names) in [("known names", Some(KNOWN)), ("fresh names", None)] {
        let all = SANDBOXES.min(places.len());
        let title = format!("DNS, {what}: {all} clients with {OPEN} questions open each");
        let mut rate = Table::new(&title, "answers/s", Kind::Rate, &rows);
        let title = format!("DNS, {what}: one question at a time");
        let mut p50 = Table::new(&format!("{title}, p50"), "ms", Kind::Cost, &rows);
        let mut p99 = Table::new(&format!("{title}, p99"), "ms", Kind::Cost, &rows);
        for _ in 0..effort.rounds {
            for (name, _) in &rows {
                for is_rate in [true, false] {
                    fresh += 1;
                    let count = if is_rate { places.len() } else { 1 };
                    let zone = match names {
                        Some(_) => "known.test".to_owned(),
                        None => format!("r{fresh}.fresh.test"),
                    };
                    let questions = Questions {
                        to: if *name == NETD {
                            ANYWHERE
                        } else {
                            std::net::SocketAddrV4::new(MIDDLE, PORT)
                        },
                        places: if *name == NETD {
                            places[..count].to_vec()
                        } else {
                            Vec::new()
                        },
                        sockets: count,
                        open: if is_rate { OPEN } else { 1 },
                        apart_us: APART_US,
                        zone,
                        names,
                        warm_ms: WARM_MS.min(effort.count_ms),
                        count_ms: effort.count_ms,
                    };
                    let from: &Namespace = if *name == NETD {
                        &ground.middle
                    } else {
                        &ground.plain
                    };
                    let measured: Rate = load::run(from, &Task::Dns(questions))?;
                    if is_rate {
                        rate.add(name, vec![measured.per_second]);
                    } else {
                        p50.add(name, vec![measured.p50_ms]);
                        p99.add(name, vec![measured.p99_ms]);
                    }
                }
            }
        }
        tables.extend([rate, p50, p99]);
    }
    for sandbox in sandboxes {
        sandbox.stop();
    }
    Ok(tables)
}
