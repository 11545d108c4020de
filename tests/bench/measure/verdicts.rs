//! What each verdict costs one client by itself, and what a neighbour's flood costs it.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use harness::namespace::Namespace;
use serde_json::json;

use super::Effort;
use crate::{
    load::{self, Connects, Flood, Rate, Refusals, Requests, Target, Task},
    place::{Ground, Guarded, LISTED, NAMES, OPAQUE, ORIGIN, PASSED, clear, policy},
    result::{Kind, Table},
};

const WARM_MS: u64 = 100;
/// Refusals in a round.
const REFUSALS: usize = 200;
/// Nobody lists it.
const DENIED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
/// Threads of a flood, and its connections that say nothing: more than netd keeps of one sandbox.
const THREADS: usize = 4;
const SILENT: usize = 600;

const DIRECT: &str = "no wall";
const TLS_DIRECT: &str = "no wall, TLS";

/// Runs it.
pub(crate) fn verdicts(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let mut tables = allowed(ground, guarded, effort)?;
    tables.push(refused(guarded, effort)?);
    tables.extend(beside_a_flood(ground, guarded, effort)?);
    Ok(tables)
}

fn allowed(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let (inside, plain) = (&guarded.inside, &ground.plain);
    let [spliced, read, masked] = NAMES;
    let ways: [(&str, Option<&str>, &Namespace, Target); 8] = [
        (DIRECT, None, plain, clear(ORIGIN, OPAQUE)),
        ("by the kernel", Some(DIRECT), inside, clear(ORIGIN, PASSED)),
        ("spliced, opaque", Some(DIRECT), inside, clear(ORIGIN, OPAQUE)),
        (TLS_DIRECT, None, plain, ground.secure(spliced)),
        (
            "spliced, by its name",
            Some(TLS_DIRECT),
            inside,
            guarded.secure(spliced),
        ),
        ("read", Some(TLS_DIRECT), inside, guarded.secure(read)),
        (
            "read, method and path judged",
            Some(TLS_DIRECT),
            inside,
            guarded.secure(LISTED),
        ),
        (
            "read, injecting and masking",
            Some(TLS_DIRECT),
            inside,
            guarded.secure(masked),
        ),
    ];
    let rows: Vec<_> = ways.iter().map(|(name, peer, ..)| (*name, *peer)).collect();
    let mut fresh = Table::new(
        "Allowed: connect, ask, answer, close, one at a time: p50",
        "ms",
        Kind::Cost,
        &rows,
    );
    let mut kept = Table::new(
        "Allowed: one request at a time on one connection: p50",
        "ms",
        Kind::Cost,
        &rows,
    );
    for _ in 0..effort.rounds {
        for (name, _, from, target) in &ways {
            let connects = Connects {
                target: target.clone(),
                threads: 1,
                count_ms: effort.count_ms,
            };
            let rate: Rate = load::run(from, &Task::Connects(connects))?;
            fresh.add(name, vec![rate.p50_ms]);
            let rate: Rate = load::run(from, &Task::Requests(one_by_one(target, effort)))?;
            kept.add(name, vec![rate.p50_ms]);
        }
    }
    let added = [added(&fresh), added(&kept)];
    Ok([fresh, kept].into_iter().chain(added).collect())
}

fn one_by_one(target: &Target, effort: Effort) -> Requests {
    let host = target.tls.as_ref().map(|secure| secure.name.clone());
    Requests {
        target: target.clone(),
        host: host.unwrap_or_else(|| target.to.ip().to_string()),
        path: "/".to_owned(),
        status: 200,
        headers: String::new(),
        connections: 1,
        warm_ms: WARM_MS.min(effort.count_ms),
        count_ms: effort.count_ms,
    }
}

/// What there is of each row beyond its peer, round by round.
fn added(table: &Table) -> Table {
    let compared = || table.rows.iter().filter(|row| row.peer.is_some());
    let rows: Vec<_> = compared().map(|row| (row.name.as_str(), None)).collect();
    let title = format!("{}, added to what the same costs without the wall", table.title);
    let mut added = Table::new(&title, &table.unit, table.kind, &rows);
    for row in compared() {
        let peer = table
            .rows
            .iter()
            .find(|other| Some(&other.name) == row.peer.as_ref());
        for (own, other) in row
            .rounds
            .iter()
            .zip(peer.into_iter().flat_map(|peer| &peer.rounds))
        {
            let differences = own.iter().zip(other).map(|(own, other)| own - other);
            added.add(&row.name, differences.collect());
        }
    }
    added
}

fn refused(guarded: &Guarded, effort: Effort) -> Result<Table> {
    const DENIED_REQUEST: &str = "a request, by 403";
    let secure = guarded.secure(NAMES[0]);
    let hello = |name: &str| String::from_utf8_lossy(&client_hello(name)).into_owned();
    // A hello of bytes below 128 is the same text.
    let kinds = [
        (
            "a connection, by the kernel",
            SocketAddrV4::new(DENIED, 443),
            None,
        ),
        (
            "a connection, by the name in its TLS",
            secure.to,
            Some(hello("denied.test")),
        ),
    ];
    let rows: Vec<_> = kinds
        .iter()
        .map(|(name, ..)| *name)
        .chain([DENIED_REQUEST])
        .map(|name| (name, None))
        .collect();
    let mut table = Table::new(
        "Refused: until it is felt, one at a time",
        "ms",
        Kind::Latency,
        &rows,
    );
    for _ in 0..effort.rounds {
        for (name, to, said) in &kinds {
            let refusals = Refusals {
                to: *to,
                said: said.clone(),
                count: effort.times(REFUSALS),
            };
            table.add(name, load::run(&guarded.inside, &Task::Refusals(refusals))?);
        }
        let denied = Requests {
            path: "/denied".to_owned(),
            status: 403,
            ..one_by_one(&guarded.secure(LISTED), effort)
        };
        let rate: Rate = load::run(&guarded.inside, &Task::Requests(denied))?;
        table.add(DENIED_REQUEST, vec![rate.p50_ms]);
    }
    Ok(table)
}

/// The beginning of a TLS connection to a name (RFC 8446 4.1.2), of bytes below 128.
fn client_hello(name: &str) -> Vec<u8> {
    let sized = |length: usize| [0, u8::try_from(length).unwrap_or(0x7f)];
    let name = name.as_bytes();
    let mut server_name = vec![0, 0];
    server_name.extend(sized(name.len() + 5));
    server_name.extend(sized(name.len() + 3));
    server_name.push(0);
    server_name.extend(sized(name.len()));
    server_name.extend(name);
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    // No session, one cipher, no compression.
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(sized(server_name.len()));
    body.extend(server_name);
    let mut hello = vec![22, 3, 1];
    hello.extend(sized(body.len() + 4));
    hello.extend([1, 0]);
    hello.extend(sized(body.len()));
    hello.extend(body);
    hello
}

fn beside_a_flood(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    const ALONE: &str = "alone";
    const ELSEWHERE: &str = "beside the same flood that goes past netd";
    const FLOODED: &str = "beside another sandbox's flood of connections";
    const SILENCE: &str = "beside another sandbox's connections that say nothing";
    const READ: &str = "beside another sandbox's flood of connections that are read";
    let neighbour = guarded
        .organization
        .sandbox(&json!({ "network": policy(), "timeout_seconds": 86_400 }));
    let beside = guarded.inside_of(&neighbour.id)?;
    let [spliced, read, _] = NAMES;
    let rows = [
        (ALONE, None),
        (ELSEWHERE, Some(ALONE)),
        (FLOODED, Some(ELSEWHERE)),
        (READ, Some(ELSEWHERE)),
        (SILENCE, Some(ALONE)),
    ];
    let title = "A connection by its name, one at a time";
    let mut p50 = Table::new(&format!("{title}: p50"), "ms", Kind::Cost, &rows);
    let mut p99 = Table::new(&format!("{title}: p99"), "ms", Kind::Cost, &rows);
    let flood = |target: Target, threads, silent| Flood {
        target,
        threads,
        silent,
    };
    for _ in 0..effort.rounds {
        for (name, _) in rows {
            let flooding = match name {
                ELSEWHERE => Some((&ground.plain, flood(ground.secure(spliced), THREADS, 0))),
                FLOODED => Some((&beside, flood(guarded.secure(spliced), THREADS, 0))),
                READ => Some((
                    &beside,
                    flood(guarded.secure_in(ground, &neighbour, read)?, THREADS, 0),
                )),
                SILENCE => Some((&beside, flood(guarded.secure(spliced), 0, SILENT))),
                _ => None,
            };
            let _flood = flooding
                .map(|(from, flood)| load::flood(from, flood))
                .transpose()?;
            let connects = Connects {
                target: guarded.secure(spliced),
                threads: 1,
                count_ms: effort.count_ms,
            };
            let rate: Rate = load::run(&guarded.inside, &Task::Connects(connects))?;
            p50.add(name, vec![rate.p50_ms]);
            p99.add(name, vec![rate.p99_ms]);
        }
    }
    neighbour.stop();
    Ok(vec![p50, p99])
}
