//! Public URLs of sandboxes' ports.
//!
//! | module | owns |
//! |---|---|
//! | [`config`], [`privileges`] | what it runs with, and that it may nothing |
//! | [`app`] | the order in which the parts begin and end |

pub mod app;
pub mod config;
pub mod privileges;
