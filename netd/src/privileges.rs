//! What netd may do once it has begun. Owns: giving up every capability that its work does not need, for good.
//!
//! netd reads what sandboxes and the internet send. Whoever takes it over must not find more than the work needs:
//! no other user's files, no other process, no device, no module, no new program with more rights.

use rustix::{
    io::Errno,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};

/// What stays (capabilities(7)): `NET_ADMIN` for the marks of sockets, transparent sockets, links to interfaces and
/// netlink; `BPF` for maps and pinned links; `SYS_ADMIN` for entering the router namespace, where every connection
/// into a sandbox begins.
pub const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::SYS_ADMIN);

/// The kernel's set is a word of so many bits.
const BITS: u32 = 64;

/// The privileges could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// A call of the kernel's.
    #[error("cannot {action}: {source}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// Something needed was never there.
    #[error("netd needs the capabilities {missing:?}, which it was not given")]
    Missing {
        /// What is missing.
        missing: CapabilitySet,
    },
}

/// Gives up everything but [`KEPT`], for this thread and those that it will start. Call it while there is no other:
/// capabilities belong to threads.
///
/// # Errors
/// When the kernel does not take it, or one that is needed is missing. netd must not go on then.
pub fn give_up() -> Result<(), PrivilegeError> {
    let failed = |action| move |source| PrivilegeError::Call { action, source };
    let held = capabilities(None).map_err(failed("read its capabilities"))?;
    let missing = KEPT.difference(held.permitted);
    if !missing.is_empty() {
        return Err(PrivilegeError::Missing { missing });
    }
    // First the bounding set: taking from it needs a capability that goes next.
    for bit in 0..BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            // No kernel knows more than it has.
            Err(Errno::INVAL) => break,
            Ok(true) if !KEPT.contains(capability) => remove_capability_from_bounding_set(capability)
                .map_err(failed("limit the capabilities of its successors"))?,
            Ok(_) => {}
            Err(error) => return Err(failed("read its bounding set")(error)),
        }
    }
    clear_ambient_capability_set().map_err(failed("clear its ambient capabilities"))?;
    let sets = CapabilitySets {
        effective: KEPT,
        permitted: KEPT,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(failed("give capabilities up"))?;
    set_no_new_privs(true).map_err(failed("refuse new privileges"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_is_gone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // A thread of its own: what it gives up is lost to it alone.
        let thread = std::thread::spawn(|| {
            give_up().expect("given up");
            let held = capabilities(None).expect("read");
            assert_eq!(
                (held.effective, held.permitted, held.inheritable),
                (KEPT, KEPT, CapabilitySet::empty())
            );
            assert!(!capability_is_in_bounding_set(CapabilitySet::SYS_PTRACE).expect("read"));
            assert!(capability_is_in_bounding_set(CapabilitySet::NET_ADMIN).expect("read"));
            let again = CapabilitySets {
                effective: CapabilitySet::all(),
                permitted: CapabilitySet::all(),
                inheritable: CapabilitySet::empty(),
            };
            assert_eq!(set_capabilities(None, again), Err(Errno::PERM));
            give_up().expect("a second time changes nothing");
        });
        thread.join().expect("it holds");
    }
}
