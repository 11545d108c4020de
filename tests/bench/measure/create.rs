//! From nothing to the first command's result, cold and from the warm pool.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use harness::{node::Node, sandbox::Organization, wait, world::World};
use serde_json::{Value, json};

use super::Effort;
use crate::{
    load::{self, Create, Lives, PARTS, Task},
    place::{Guarded, access, start_node},
    result::{Kind, Table},
};

/// Sandboxes in a round, one after the other.
const SINGLE: usize = 10;
/// Sandboxes in a round, all at once.
const MANY: usize = 20;
/// How many wait in the pool.
const POOL: usize = 24;
/// Longest wait for the pool to be full.
const FILL: Duration = Duration::from_secs(60);

const COLD: &str = "cold";
const WARM: &str = "warm";

/// Runs it: a node without pool and another with one.
pub(crate) fn create(guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let world = World::builder().unwatched().build()?;
    let warm = if effort.more_nodes {
        Warm::start(&world)?
    } else {
        None
    };
    let rows: &[(&str, Option<&str>)] = match warm {
        Some(_) => &[(COLD, None), (WARM, Some(COLD))],
        None => &[(COLD, None)],
    };
    let mut tables = Vec::new();
    for (ways, times) in [(1, effort.times(SINGLE)), (effort.times(MANY), 1)] {
        let table = |what: &str, rows: &[(&str, Option<&str>)]| {
            Table::new(&format!("{what}, {ways} at once"), "ms", Kind::Latency, rows)
        };
        let mut first = table("Create to the first command's result", rows);
        let mut gone = table("Stop", rows);
        let mut parts = table("The parts of a cold create", &PARTS.map(|part| (part, None)));
        for _ in 0..effort.rounds {
            let create = |organization: &Organization| {
                Task::Create(Create {
                    access: access(organization),
                    ways,
                    times,
                    body: json!({ "timeout_seconds": 600 }),
                })
            };
            let lives: Lives = load::run(guarded.node.world().node(), &create(&guarded.organization))?;
            first.add(COLD, lives.first_command);
            gone.add(COLD, lives.stopped);
            for (part, figures) in PARTS.iter().zip(lives.parts) {
                parts.add(part, figures);
            }
            let Some(warm) = &warm else { continue };
            warm.wait_full();
            let lives: Lives = load::run(world.node(), &create(&warm.organization))?;
            first.add(WARM, lives.first_command);
            gone.add(WARM, lives.stopped);
        }
        tables.extend([first, parts, gone]);
    }
    if let Some(warm) = &warm {
        let rate = warm.hit_rate();
        for row in tables.iter_mut().flat_map(|table| &mut table.rows) {
            if row.name == WARM {
                row.name = format!("{WARM} ({:.0} % from the pool)", rate * 100.0);
            }
        }
    }
    Ok(tables)
}

/// A node with a warm pool.
struct Warm {
    organization: Organization,
    // Stopped before its world goes.
    _node: Node,
}

impl Warm {
    /// `None` from a controller that has no pool.
    fn start(world: &Arc<World>) -> Result<Option<Self>> {
        let size = POOL.to_string();
        let node = start_node(world, &[("WARM_POOL_ENABLED", "true"), ("WARM_POOL_SIZE", &size)])?;
        let organization = node.register("warm");
        let answer = organization.client.get("/pool/stats").send();
        Ok(answer.status.is_success().then_some(Self {
            organization,
            _node: node,
        }))
    }

    fn stats(&self) -> Value {
        self.organization.client.get("/pool/stats").send().ok()
    }

    /// The part of its creations that took a sandbox from the pool.
    fn hit_rate(&self) -> f64 {
        self.stats()["hit_rate"].as_f64().unwrap_or_default()
    }

    fn wait_full(&self) {
        wait::until("the pool is full", FILL, || {
            let stats = self.stats();
            (stats["ready"].as_u64()? >= POOL as u64).then_some(())
        });
    }
}
