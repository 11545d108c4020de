//! A case: what it tries, what must happen, its positive twin, and by which traces outside it is judged.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    attempt::{Attempt, Attempts},
    cases,
    world::World,
};

/// Stands for a part's token in traces.
pub const TOKEN: &str = "TOKEN";

/// A case of the suite.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Short, and never given to another case.
    pub id: &'static str,
    /// What it tries, in a sentence.
    pub tries: &'static str,
    /// What must happen.
    pub must: &'static str,
    /// The same by an allowed way: what must pass.
    pub twin: &'static str,
    /// What it needs of the sandbox.
    pub needs: Needs,
    /// Makes the attempts that must fail.
    pub attack: fn(&mut Attempts<'_>),
    /// Makes those that must succeed.
    pub allowed: fn(&mut Attempts<'_>),
    /// Traces outside that convict it, beside what convicts any: see [`crate::evidence`].
    pub forbidden: fn(&World) -> Vec<Trace>,
    /// Traces outside that the twin must leave; [`TOKEN`] in them stands for its token.
    pub required: fn(&World) -> Vec<Trace>,
    /// So many different messages with the attack's token may arrive: more than none only where the case is about how
    /// many.
    pub most: usize,
}

/// What a case needs of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// What every program has.
    Nothing,
    /// CAP_NET_RAW: root in the sandbox's network namespace.
    RawSockets,
}

/// Something seen outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trace {
    /// A packet to this address.
    To(IpAddr),
    /// A packet to this address and port.
    At(SocketAddr),
    /// A packet to this port, wherever it goes.
    Port(u16),
    /// A packet of this protocol of IP.
    Protocol(u8),
    /// These bytes, in whatever went out; letters in either case.
    Bytes(String),
    /// A request that a server read and that has this text.
    Request(String),
    /// The same, with the key in it.
    Keyed(String),
    /// Something that the attack found and told, beginning so: where nothing can be seen outside.
    Told(&'static str),
}

/// One of the two halves of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// What must fail.
    Attack,
    /// What must succeed.
    Twin,
}

/// What came of a part, as it is told outside: one line of JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The case.
    pub case: String,
    /// Its half.
    pub part: Part,
    /// Why it was not tried, or not to its end.
    pub not_possible: Option<String>,
    /// What was tried.
    pub attempts: Vec<Attempt>,
    /// What lies around in the sandbox.
    #[serde(default)]
    pub shown: Vec<String>,
}

impl Case {
    /// A case that needs nothing and is judged by what convicts any; `text` has what it tries, what must happen, and its
    /// twin.
    #[must_use]
    pub const fn new(
        id: &'static str,
        text: [&'static str; 3],
        attack: fn(&mut Attempts<'_>),
        allowed: fn(&mut Attempts<'_>),
    ) -> Self {
        Self {
            id,
            tries: text[0],
            must: text[1],
            twin: text[2],
            needs: Needs::Nothing,
            attack,
            allowed,
            forbidden: |_| Vec::new(),
            required: |_| vec![Trace::Bytes(TOKEN.to_owned())],
            most: 0,
        }
    }

    /// The same, convicted by further traces.
    #[must_use]
    pub const fn forbids(self, forbidden: fn(&World) -> Vec<Trace>) -> Self {
        Self { forbidden, ..self }
    }

    /// The same, whose twin must leave other traces than its token.
    #[must_use]
    pub const fn requires(self, required: fn(&World) -> Vec<Trace>) -> Self {
        Self { required, ..self }
    }

    /// The same, which needs raw sockets.
    #[must_use]
    pub const fn raw(self) -> Self {
        Self {
            needs: Needs::RawSockets,
            ..self
        }
    }

    /// The same, of which so many different messages may arrive.
    #[must_use]
    pub const fn at_most(self, most: usize) -> Self {
        Self { most, ..self }
    }

    /// Every case there is.
    pub fn all() -> Vec<Self> {
        cases::ALL.concat()
    }

    /// The one with this id.
    pub fn find(id: &str) -> Option<Self> {
        Self::all()
            .into_iter()
            .find(|case| case.id.eq_ignore_ascii_case(id))
    }

    /// What stands in everything that a part sends.
    pub fn token(&self, part: Part, world: &World) -> String {
        let half = match part {
            Part::Attack => 'a',
            Part::Twin => 't',
        };
        format!("{}{}{half}", world.canary, self.id.to_ascii_lowercase())
    }

    /// Makes the attempts of a part.
    pub fn run(&self, part: Part, world: &World) -> Report {
        let mut attempts = Attempts::new(world, self.token(part, world));
        match part {
            Part::Attack => (self.attack)(&mut attempts),
            Part::Twin => (self.allowed)(&mut attempts),
        }
        Report {
            case: self.id.to_owned(),
            part,
            not_possible: attempts.not_possible,
            attempts: attempts.made,
            shown: attempts.shown,
        }
    }
}
