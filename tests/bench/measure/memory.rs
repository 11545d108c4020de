//! What each daemon and an idle sandbox take of the machine's memory.

use std::fs;

use anyhow::{Context as _, Result};
use harness::node::{Node, Process};
use serde_json::json;

use super::Effort;
use crate::{
    place::{Ground, start_node},
    result::{Kind, Table},
};

/// Sandboxes over which the difference is taken.
const COUNT: usize = 20;
const MIB: f64 = 1024.0 * 1024.0;

const DAEMONS: [(&str, &str, Option<&str>); 4] = [
    ("controller up", "controller", Some("up")),
    ("controller serve", "controller", Some("serve")),
    ("netd", "netd", None),
    ("tunnel-proxy", "tunnel-proxy", None),
];

const INSIDE: &str = "its processes (PSS)";
const OUTSIDE: &str = "growth of all daemons (PSS)";

/// Runs it, each round on a fresh node.
pub(crate) fn memory(ground: &Ground, effort: Effort) -> Result<Vec<Table>> {
    let mut rows: Vec<(&str, Option<&str>)> = DAEMONS.iter().map(|(name, ..)| (*name, None)).collect();
    let title = "A daemon without sandboxes, resident (PSS)";
    let mut fresh = Table::new(title, "MiB", Kind::Cost, &rows);
    let title = format!("The same with {COUNT} idle sandboxes");
    let mut busy = Table::new(&title, "MiB", Kind::Cost, &rows);
    rows = vec![(INSIDE, None), (OUTSIDE, None)];
    let mut each = Table::new("An idle sandbox", "MiB", Kind::Cost, &rows);
    // Memory does not depend on what else runs, so that three starts show its spread.
    for round in 0..effort.rounds.min(3) {
        let node = start_node(&ground.world, &[])?;
        // The data directory is the world's, and so the one of the round before.
        let organization = node.register(&format!("memory-{round}"));
        let before = daemons(&node, &mut fresh)?;
        let count = effort.times(COUNT);
        let sandboxes: Vec<_> = (0..count).map(|_| organization.sandbox(&json!({}))).collect();
        let after = daemons(&node, &mut busy)?;
        let mut inside = 0.0;
        for sandbox in &sandboxes {
            for process in node.processes_of(&sandbox.id) {
                inside += resident(&process)?;
            }
        }
        let each_of = |sum: f64| sum / f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        each.add(INSIDE, vec![each_of(inside)]);
        each.add(OUTSIDE, vec![each_of(after - before)]);
        sandboxes.iter().for_each(harness::sandbox::Sandbox::stop);
    }
    for table in [&mut fresh, &mut busy] {
        table.rows.retain(|row| !row.rounds.is_empty());
    }
    Ok(vec![fresh, busy, each])
}

/// Adds each daemon's memory to the table and gives the sum.
fn daemons(node: &Node, table: &mut Table) -> Result<f64> {
    let processes = node.processes();
    let mut sum = 0.0;
    for (name, program, argument) in DAEMONS {
        if let Some(process) = processes.iter().find(|process| process.is(program, argument)) {
            let size = resident(process)?;
            table.add(name, vec![size]);
            sum += size;
        }
    }
    Ok(sum)
}

/// The proportional set size (proc_pid_smaps(5)), in MiB.
fn resident(process: &Process) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", process.pid);
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next());
    let kibibytes: f64 = kibibytes.with_context(|| format!("no Pss in {path}"))?.parse()?;
    Ok(kibibytes * 1024.0 / MIB)
}
