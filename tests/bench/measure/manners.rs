//! The manners of relaying by themselves: what netd's splice is built on, beside what it is not.

use anyhow::Result;

use super::Effort;
use crate::{
    load::{self, Manner, Relay, Relayed, Task},
    place::Ground,
    result::{Kind, Table},
};

const COPIED: &str = "copied, 16 KiB at once";
const MANNERS: [(&str, Manner); 5] = [
    (COPIED, Manner::Copied(16 * 1024)),
    ("copied, 64 KiB at once", Manner::Copied(64 * 1024)),
    ("copied, 256 KiB at once", Manner::Copied(256 * 1024)),
    ("splice(2), a pipe of 512 KiB", Manner::Spliced(512 * 1024)),
    ("sockmap", Manner::Joined),
];

/// Runs it.
pub(crate) fn manners(ground: &Ground, effort: Effort) -> Result<Vec<Table>> {
    let rows: Vec<_> = MANNERS
        .iter()
        .map(|(name, _)| (*name, (*name != COPIED).then_some(COPIED)))
        .collect();
    let mut bulk = Table::new(
        "One connection relayed over loopback, bulk",
        "Gbit/s",
        Kind::Rate,
        &rows,
    );
    let title = "One connection relayed over loopback, messages of 64 bytes there and back";
    let mut small = Table::new(title, "messages/s", Kind::Rate, &rows);
    for _ in 0..effort.rounds {
        for (name, manner) in MANNERS {
            let count_ms = effort.count_ms;
            let relayed: Relayed = load::run(&ground.middle, &Task::Relay(Relay { manner, count_ms }))?;
            bulk.add(name, vec![relayed.bits / 1e9]);
            small.add(name, vec![relayed.messages]);
        }
    }
    Ok(vec![bulk, small])
}
