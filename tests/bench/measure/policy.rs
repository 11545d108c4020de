//! From a change of policy to its first effect on a packet.

use std::net::SocketAddrV4;

use anyhow::Result;
use serde_json::json;

use super::Effort;
use crate::{
    load::{self, Change, Changes, Task},
    place::{Guarded, ORIGIN, PASSED, network_of, policy},
    result::{Kind, Table},
};

/// Changes there and back in a round.
const COUNT: usize = 20;

/// Runs it, on a sandbox of its own.
pub(crate) fn policy_change(guarded: &Guarded, effort: Effort) -> Result<Vec<Table>> {
    let names = [
        ("allow: answered `applied`", None),
        ("allow: first connection", None),
        ("refuse: answered `applied`", None),
        ("refuse: first refusal", None),
    ];
    let title = "PUT /network, from sending it to";
    let mut table = Table::new(title, "ms", Kind::Latency, &names);
    let sandbox = guarded.organization.sandbox(&json!({ "network": policy() }));
    let [_, namespace] = network_of(&guarded.node, &sandbox.id)?;
    let changes = Changes {
        access: guarded.access(),
        sandbox: sandbox.id.clone(),
        namespace,
        target: SocketAddrV4::new(ORIGIN, PASSED),
        open: policy(),
        closed: json!({ "mode": "allowlist", "allowed_domains": ["spliced.test"] }),
        count: effort.times(COUNT),
    };
    for _ in 0..effort.rounds {
        let seen: Vec<Change> = load::run(guarded.node.world().node(), &Task::Policy(changes.clone()))?;
        for (opened, [answered, effect]) in [
            (true, [names[0].0, names[1].0]),
            (false, [names[2].0, names[3].0]),
        ] {
            let of = |pick: fn(&Change) -> f64| {
                let some = seen.iter().filter(|change| change.opened == opened);
                some.map(pick).collect()
            };
            table.add(answered, of(|change| change.answered));
            table.add(effect, of(|change| change.seen));
        }
    }
    sandbox.stop();
    Ok(vec![table])
}
