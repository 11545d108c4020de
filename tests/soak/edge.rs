//! The judge: what left the node, packet by packet, and what the name servers were asked. No policy of the soak allows
//! more than HTTPS to two names, so whatever else is seen was forbidden, whoever sent it.

use std::{collections::BTreeSet, net::IpAddr};

use harness::{
    capture::{Packet, protocol},
    world::{RESOLVER, World},
};

use crate::life::ALLOWED;

/// Forbidden packets that are kept to be looked at.
const SAMPLES: usize = 20;
const HTTPS: u16 = 443;
const DNS: u16 = 53;

/// What was seen so far.
pub(crate) struct Edge {
    allowed: BTreeSet<IpAddr>,
    seen: usize,
    forbidden: usize,
    questions: usize,
    samples: Vec<String>,
}

impl Edge {
    pub(crate) fn new(world: &World) -> Self {
        let allowed = ALLOWED.iter().flat_map(|name| world.dns.addresses(name));
        Self {
            allowed: allowed.collect(),
            seen: 0,
            forbidden: 0,
            questions: 0,
            samples: Vec::new(),
        }
    }

    /// Judges everything since the last time.
    pub(crate) fn judge(&mut self, world: &World) {
        for packet in world.capture().take() {
            self.seen += 1;
            if !self.is_allowed(&packet) {
                self.condemn(format!("{packet:?}"));
            }
        }
        let questions = world.dns.queries();
        for question in &questions[self.questions..] {
            if !ALLOWED.contains(&question.name.as_str()) {
                self.condemn(format!("{question:?}"));
            }
        }
        self.questions = questions.len();
    }

    pub(crate) fn seen(&self) -> usize {
        self.seen
    }

    pub(crate) fn forbidden(&self) -> usize {
        self.forbidden
    }

    pub(crate) fn samples(&self) -> &[String] {
        &self.samples
    }

    fn condemn(&mut self, what: String) {
        self.forbidden += 1;
        if self.samples.len() < SAMPLES {
            self.samples.push(what);
        }
    }

    fn is_allowed(&self, packet: &Packet) -> bool {
        let resolver = packet.destination == IpAddr::from(RESOLVER);
        match packet.protocol {
            protocol::TCP => {
                self.allowed.contains(&packet.destination) && packet.destination_port == HTTPS
                    || resolver && packet.destination_port == DNS
            }
            protocol::UDP => resolver && packet.destination_port == DNS,
            // The node tells the resolver that nobody waits any more for what a killed netd had asked.
            protocol::ICMP => resolver,
            _ => false,
        }
    }
}
