//! What the wall needs of a kernel, asked of the kernel itself and not read off its version: distributions change what a
//! version has, and builders leave things out. Owns naming what is missing; leaves nothing behind.

use aya::{
    maps::{Map, MapData, MapType, lpm_trie::Key},
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported},
};
use netd_common::{NO_ADDRESS, POLICY_BITS, PolicyKey};
use rustix::{
    io::Errno,
    thread::{CapabilitySet, capability_is_in_bounding_set},
};

use super::{
    Attach, DatapathError, batch,
    programs::{Means, Programs},
};
use crate::router::{RouterError, RouterNamespace};

/// Of linux/errno.h, for the kernel alone: what a map cannot do.
const NOT_SUPPORTED: i32 = 524;

/// Something that the kernel must have.
struct Need {
    /// For people.
    what: &'static str,
    /// The version that brought it.
    since: &'static str,
    /// Asks for it.
    is_there: fn() -> Result<bool, String>,
}

/// The oldest last, so that the message names the newest that is missing. What a table needs besides is asked of the
/// table itself ([`check_batches`]), what packets are refused with of nftables ([`prove`]).
const NEEDS: [Need; 6] = [
    Need {
        what: "the helper bpf_redirect_peer, which hands packets to a sandbox",
        since: "5.10",
        is_there: || has_helper(BpfHelper::BPF_FUNC_redirect_peer),
    },
    Need {
        what: "the capability CAP_BPF, which is all that netd keeps for its maps",
        since: "5.8",
        is_there: || match capability_is_in_bounding_set(CapabilitySet::BPF) {
            Ok(_) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(error) => Err(error.to_string()),
        },
    },
    Need {
        what: "ring buffers (BPF_MAP_TYPE_RINGBUF), which tell of denials",
        since: "5.8",
        is_there: || has_map(MapType::RingBuf),
    },
    Need {
        what: "the helper bpf_sk_assign, which hands packets to netd",
        since: "5.7",
        is_there: || has_helper(BpfHelper::BPF_FUNC_sk_assign),
    },
    Need {
        what: "the helper bpf_skc_lookup_tcp, which finds netd's connections",
        since: "5.2",
        is_there: || has_helper(BpfHelper::BPF_FUNC_skc_lookup_tcp),
    },
    Need {
        what: "maps of sockets (BPF_MAP_TYPE_SOCKMAP), where netd's listeners are",
        since: "4.14",
        is_there: || has_map(MapType::SockMap),
    },
];

/// Asks for what the programs need. Milliseconds.
///
/// # Errors
/// [`DatapathError::Unsupported`], which names what is missing.
pub(super) fn check() -> Result<(), DatapathError> {
    check_each(&NEEDS)
}

fn check_each(needs: &[Need]) -> Result<(), DatapathError> {
    for Need {
        what,
        since,
        is_there,
    } in needs
    {
        match is_there() {
            Ok(true) => {}
            Ok(false) => {
                return Err(DatapathError::Unsupported(format!(
                    "it does not have {what} (Linux {since})"
                )));
            }
            Err(error) => {
                return Err(DatapathError::Unsupported(format!(
                    "it does not say whether it has {what} (Linux {since}): {error}. BPF needs root with CAP_BPF, \
                     CAP_NET_ADMIN and CAP_SYS_ADMIN, and no user namespace around it"
                )));
            }
        }
    }
    Ok(())
}

/// Asks whether many entries of such a table can be written and removed in one call.
///
/// # Errors
/// As [`check`].
pub(super) fn check_batches(map: &MapData) -> Result<(), DatapathError> {
    // Of no policy: 0 is none.
    let nobody = PolicyKey {
        policy: 0,
        address: NO_ADDRESS,
    };
    match batch::remove(map, &[Key::new(POLICY_BITS, nobody)]) {
        Ok(()) => Ok(()),
        Err(stopped) if stopped.source.raw_os_error() == Some(NOT_SUPPORTED) => {
            Err(DatapathError::Unsupported(
                "its tables of prefixes (BPF_MAP_TYPE_LPM_TRIE) take no batches (Linux 5.13)".to_owned(),
            ))
        }
        Err(stopped) => Err(DatapathError::Unsupported(format!(
            "a table of prefixes (BPF_MAP_TYPE_LPM_TRIE) did not take a batch: {}",
            stopped.source
        ))),
    }
}

/// Finds out whether this kernel can carry the wall, by making all of it once where it ends with the call: the settings
/// and rules of a router namespace, what programs hang by, the maps, and the programs past the verifier. Blocking, a
/// fraction of a second.
///
/// # Errors
/// [`DatapathError::Unsupported`] names what is missing; others say what could not be made.
pub fn prove(attach: Attach) -> Result<(), DatapathError> {
    check()?;
    RouterNamespace::try_out(|| Means::here(attach).map(drop)).map_err(|error| match error {
        RouterError::Command(error) => DatapathError::Unsupported(format!(
            "the rules that refuse packets are not taken (reject at the hook prerouting of a table inet: Linux 5.9, \
             CONFIG_NFT_REJECT_INET): {error}"
        )),
        other => other.into(),
    })??;
    let object = Programs::try_load()?;
    match object.map("POLICIES") {
        Some(Map::LpmTrie(map)) => check_batches(map),
        Some(_) | None => Err(DatapathError::Absent("POLICIES")),
    }
}

fn has_map(kind: MapType) -> Result<bool, String> {
    is_map_supported(kind).map_err(|error| error.to_string())
}

fn has_helper(helper: BpfHelper) -> Result<bool, String> {
    is_helper_supported(ProgramType::SchedClassifier, helper).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(what: &'static str, is_there: fn() -> Result<bool, String>) -> Need {
        Need {
            what,
            since: "5.99",
            is_there,
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let there = need("this", || Ok(true));
        check_each(&[there]).expect("all is there");
        let missing = [need("this", || Ok(true)), need("that", || Ok(false))];
        let said = check_each(&missing).expect_err("refused").to_string();
        assert!(said.contains("does not have that (Linux 5.99)"), "{said}");
        let unknown = [need("those", || Err("EPERM".to_owned()))];
        let said = check_each(&unknown).expect_err("refused").to_string();
        assert!(
            said.contains("those") && said.contains("EPERM") && said.contains("CAP_BPF"),
            "{said}"
        );
    }

    #[test]
    fn this_kernel_can_carry_the_wall_by_every_means() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        for attach in [Attach::Auto, Attach::Clsact] {
            prove(attach).unwrap_or_else(|error| panic!("{attach:?}: {error}"));
        }
    }
}
