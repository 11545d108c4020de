//! Attacks on the egress of a sandbox, whoever made it.
//!
//! | module | holds |
//! |---|---|
//! | [`world`] | what a run is told: servers, names, what is allowed |
//! | [`case`] | a case: what it tries, what must happen, its twin; the list of all |
//! | [`attempt`] | one attempt, and how it ended as a client feels it |
//! | [`wire`] | messages as no well-behaved program writes them |
//! | [`cases`] | the cases |
//! | [`evidence`] | what arrived outside, and the verdict that follows from it |
//! | [`scorecard`] | the verdicts as text, JSON and HTML |
//!
//! What runs inside the sandbox only tells what it felt. Whether something got out is decided outside, from what was
//! seen there: see [`evidence`]. Nothing here sends to an address that the [`world`] does not permit, and every
//! attempt has an end.

pub mod attempt;
pub mod case;
pub mod cases;
pub mod evidence;
pub mod scorecard;
pub mod wire;
pub mod world;
