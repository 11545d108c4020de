//! What the parts of an uplink are called.

use std::{os::unix::ffi::OsStrExt as _, path::Path};

/// Ethernet address of the end in the node's namespace.
pub(super) const HOST_MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x03, 0x00, 0x01];
/// The same in the router namespace.
pub(super) const ROUTER_MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x03, 0x00, 0x02];

/// How every uplink's end in the node's namespace begins, whichever instance it belongs to.
pub(super) const PREFIX: &str = "sgup";
/// How the interface of every canary's responder begins, which lives for a moment.
pub(super) const CANARY_PREFIX: &str = "sgcn";

/// The names of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The veth's end in the node's namespace.
    pub interface: String,
    /// The nftables table.
    pub table: String,
    /// The interface toward the canary's responder.
    pub canary: String,
    /// A number that differs between instances, for addresses of canaries.
    pub number: u32,
    /// The interface's alias, which tells whose it is.
    pub owner: String,
}

impl Names {
    /// Those of the instance with this run directory.
    pub fn of(run_dir: &Path) -> Self {
        let number = fnv1a(run_dir.as_os_str().as_bytes());
        let interface = format!("{PREFIX}{number:08x}");
        Self {
            table: table_of(&interface),
            interface,
            canary: format!("{CANARY_PREFIX}{number:08x}"),
            number,
            owner: format!("sandgate {}", run_dir.display()),
        }
    }
}

/// The nftables table of the instance whose end is called so.
pub(super) fn table_of(interface: &str) -> String {
    format!("sandgate_{}", interface.trim_start_matches(PREFIX))
}

impl Names {
    /// Whether an interface with this alias is of this instance. What others left to it follows its name.
    pub(super) fn own(&self, alias: &str) -> bool {
        alias
            .strip_prefix(&self.owner)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(" +"))
    }
}

/// An Ethernet address as it is written.
pub fn written(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// FNV-1a with 32 bits (Fowler, Noll, Vo): the same in every version of netd.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_the_instance_and_fit_the_kernel() {
        let one = Names::of(Path::new("/run/sandgate"));
        assert_eq!(one, Names::of(Path::new("/run/sandgate")));
        assert_ne!(one.interface, Names::of(Path::new("/run/other")).interface);
        for name in [&one.interface, &one.canary] {
            assert!(name.len() < libc::IFNAMSIZ, "{name}");
        }
        assert_eq!(fnv1a(b"a"), 0xe40c_292c);
        let number = one.number;
        assert_eq!(one.table, format!("sandgate_{number:08x}"));
    }
}
