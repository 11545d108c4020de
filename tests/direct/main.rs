//! Rules of the whole workspace that need no privilege.

mod layers;
mod sources;
