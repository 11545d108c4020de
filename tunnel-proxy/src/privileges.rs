//! tunnel-proxy faces strangers, so it holds nothing that a stranger could want: no uid of root's, no capability,
//! and no way to get any. Its supervisor sees to that; this module refuses to start where it did not.

use std::{fs, io};

/// The process may do more than it should.
#[derive(Debug, thiserror::Error)]
pub enum TooPowerful {
    /// `proc(5)`.
    #[error("cannot read /proc/self/status: {0}")]
    Unreadable(#[source] io::Error),
    /// A line of it.
    #[error(
        "{field} is {value}: tunnel-proxy runs only as `controller up` starts it, under a uid of its own without capabilities"
    )]
    Field {
        /// Its name.
        field: &'static str,
        /// What it says.
        value: String,
    },
}

/// Refuses uid and gid 0, any capability in any set, and a process that could gain some by executing a file.
///
/// # Errors
/// The first thing that is too much.
pub fn check() -> Result<(), TooPowerful> {
    let status = fs::read_to_string("/proc/self/status").map_err(TooPowerful::Unreadable)?;
    check_status(&status)
}

const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

fn check_status(status: &str) -> Result<(), TooPowerful> {
    let ids = |value: &str| {
        value
            .split_whitespace()
            .all(|id| id.parse::<u32>().is_ok_and(|id| id != 0))
    };
    for field in ["Uid", "Gid"] {
        require(status, field, |value| !value.is_empty() && ids(value))?;
    }
    require(status, "Groups", ids)?;
    for field in CAPABILITIES {
        require(status, field, |value| u64::from_str_radix(value, 16) == Ok(0))?;
    }
    require(status, "NoNewPrivs", |value| value == "1")
}

fn require(status: &str, field: &'static str, holds: impl Fn(&str) -> bool) -> Result<(), TooPowerful> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    match line.map(str::trim) {
        Some(value) if holds(value) => Ok(()),
        found => Err(TooPowerful::Field {
            field,
            value: found.unwrap_or("missing").to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\ttunnel-proxy\nUid:\t60742\t60742\t60742\t60742\nGid:\t60742\t60742\t60742\t60742\n\
        Groups:\t \nNoNewPrivs:\t1\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
        CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\n";

    #[test]
    fn a_process_that_may_nothing_is_taken() {
        check_status(STATUS).expect("taken");
    }

    #[test]
    fn whoever_may_anything_is_refused_and_told_why() {
        for (field, from, to) in [
            ("Uid", "Uid:\t60742\t60742", "Uid:\t60742\t0"),
            ("Gid", "Gid:\t60742", "Gid:\t0"),
            ("Groups", "Groups:\t ", "Groups:\t0 27"),
            ("CapPrm", "CapPrm:\t0000000000000000", "CapPrm:\t0000000000000400"),
            ("CapEff", "CapEff:\t0000000000000000", "CapEff:\t000001ffffffffff"),
            ("CapBnd", "CapBnd:\t0000000000000000", "CapBnd:\t0000000000200000"),
            ("CapAmb", "CapAmb:\t0000000000000000", "CapXmb:\t0"),
            ("NoNewPrivs", "NoNewPrivs:\t1", "NoNewPrivs:\t0"),
        ] {
            let status = STATUS.replace(from, to);
            assert_ne!(status, STATUS, "{field}");
            let error = check_status(&status).expect_err(field).to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
