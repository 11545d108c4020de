//! Runs each case and reads what it left outside, between two marks of the capture.

use std::{collections::HashMap, net::SocketAddr};

use harness::capture::{Mark, Packet};
use redteam::{
    case::{Case, Needs, Part, Report},
    evidence::{Flow, Judged, Request, Seen, judge},
    scorecard::Scorecard,
    world::World,
};
use serde_json::Value;

use crate::{
    around::{Around, SECRET},
    system::System,
};

/// Judges all cases.
pub(crate) fn judge_all(around: &Around, system: &dyn System) -> Scorecard {
    let told = around.told(system.neighbour());
    let world = World::parse(&told.to_string()).expect("a world of documentation addresses");
    let judging = Judging {
        around,
        system,
        told,
        world: &world,
    };
    Scorecard {
        system: system.name(),
        cases: Case::all().iter().map(|case| judging.case(case)).collect(),
    }
}

struct Judging<'a> {
    around: &'a Around,
    system: &'a dyn System,
    told: Value,
    world: &'a World,
}

/// A moment, as every witness has it.
struct Moment {
    mark: Mark,
    heard: usize,
    inside: usize,
}

impl Judging<'_> {
    fn case(&self, case: &Case) -> Judged {
        let as_root = case.needs == Needs::RawSockets && self.system.has_root();
        let (attack, attacked) = self.part(case, Part::Attack, as_root);
        let (twin, passed) = self.part(case, Part::Twin, as_root);
        Judged {
            as_root,
            ..judge(
                case,
                self.world,
                Some(SECRET),
                (&attack, &attacked),
                (&twin, &passed),
            )
        }
    }

    fn part(&self, case: &Case, part: Part, as_root: bool) -> (Report, Seen) {
        let name = match part {
            Part::Attack => "attack",
            Part::Twin => "twin",
        };
        let mut told = self.told.clone();
        if part == Part::Attack {
            told["patience_ms"] = self.system.patience().into();
        }
        let told = told.to_string();
        let arguments = ["run", &told, case.id, "--part", name];
        let began = self.moment();
        let said = if as_root {
            self.system.run_as_root(&arguments)
        } else {
            self.system.run(&arguments)
        };
        let report = said.and_then(|text| Ok(serde_json::from_str(text.trim())?));
        let report = report.unwrap_or_else(|error| panic!("{} {name}: {error:#}", case.id));
        (report, self.seen_since(&began))
    }

    fn moment(&self) -> Moment {
        Moment {
            mark: self.around.world.capture().mark(),
            heard: self.around.world.mirror.heard().len(),
            inside: self.inside(),
        }
    }

    /// Connections to listeners inside so far.
    fn inside(&self) -> usize {
        self.around.node.arrivals().len() + self.system.visits_of_neighbour()
    }

    fn seen_since(&self, moment: &Moment) -> Seen {
        let packets = self.around.world.capture().sent_since(moment.mark);
        let heard = self.around.world.mirror.heard();
        let requests = heard[moment.heard..].iter().map(|heard| Request {
            host: heard.authority.clone(),
            text: heard.text(),
        });
        Seen {
            flows: flows(packets),
            requests: requests.collect(),
            inside: self.inside() - moment.inside,
        }
    }
}

/// Packets by the connection or conversation that they belong to.
fn flows(packets: Vec<Packet>) -> Vec<Flow> {
    let mut flows: Vec<Flow> = Vec::new();
    let mut known = HashMap::new();
    for packet in packets {
        let to = SocketAddr::new(packet.destination, packet.destination_port);
        let from = SocketAddr::new(packet.source, packet.source_port);
        let index = *known.entry((packet.protocol, from, to)).or_insert_with(|| {
            flows.push(Flow {
                protocol: packet.protocol,
                to,
                bytes: Vec::new(),
            });
            flows.len() - 1
        });
        flows[index].bytes.extend(packet.payload);
    }
    flows
}
