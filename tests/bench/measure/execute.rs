//! The round trip of `true` through the API.

use anyhow::Result;

use super::Effort;
use crate::{
    load::{self, Execute, Task},
    place::Guarded,
    result::{Kind, Table},
};

/// Commands in a round.
const COUNT: usize = 200;

const BARE: &str = "`true` as a child on the machine";
const EXECUTE: &str = "POST /execute of `true`";

/// Runs it.
pub(crate) fn execute(guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let rows = [(BARE, None), (EXECUTE, Some(BARE))];
    let mut table = Table::new("A command in a running sandbox", "ms", Kind::Latency, &rows);
    let node = guarded.node.world().node();
    for _ in 0..effort.rounds {
        table.add(BARE, load::run(node, &Task::Spawn(effort.times(COUNT)))?);
        let execute = Execute {
            access: guarded.access(),
            sandbox: guarded.sandbox.id.clone(),
            count: effort.times(COUNT),
        };
        table.add(EXECUTE, load::run(node, &Task::Execute(execute))?);
    }
    Ok(vec![table])
}
