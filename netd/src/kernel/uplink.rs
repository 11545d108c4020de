//! The way out of the router namespace, as the programs are told of it. Owns: that nobody's packets leave by a way that is
//! not proven but those that prove it, and none where our program does not judge first what comes back.

use netd_common::Uplink as Entry;

use super::{Datapath, DatapathError, EndpointHandle, State};

/// The way out of the router namespace, for what the kernel forwards itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uplink {
    /// Index of its end in the router namespace.
    pub ifindex: u32,
    /// Ethernet address of its other end.
    pub peer_mac: [u8; 6],
    /// Whether packets of IPv6 may leave by it too.
    pub ipv6: bool,
}

/// The families whose packets leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proven {
    /// Those of IPv4.
    pub ipv4: bool,
    /// Those of IPv6.
    pub ipv6: bool,
}

impl Datapath {
    /// Attaches the program that judges what comes back to the uplink's interface in the router namespace, before all
    /// others. Idempotent.
    ///
    /// # Errors
    /// When it does not stand there first.
    pub fn attach_uplink(&self, uplink: &Uplink) -> Result<(), DatapathError> {
        self.come_first(&mut self.state(), uplink)
    }

    /// Says where packets leave that the kernel may forward itself, and that the way is proven; who says so has seen to
    /// our program there. `None`: there is no such way, so what address and port alone allow goes to netd if it is TCP,
    /// and is refused if it is UDP. Holds from the next packet on.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn set_uplink(&self, uplink: Option<Uplink>) -> Result<(), DatapathError> {
        let entry = uplink.map_or_else(Entry::default, |uplink| Entry {
            proven: families(&uplink),
            ..entry(&uplink)
        });
        self.state().tables.set_uplink(entry)
    }

    /// Says where packets will leave. Whatever was proven of this very uplink stays so, also by an earlier netd; of
    /// another nothing is, and then only [`Self::set_prover`]'s leave. Gives what is.
    ///
    /// # Errors
    /// When our program does not stand there first. Nothing leaves then.
    pub fn prepare_uplink(&self, uplink: &Uplink) -> Result<Proven, DatapathError> {
        let mut state = self.state();
        self.come_first(&mut state, uplink)?;
        let before = state.tables.uplink()?;
        let mut wanted = entry(uplink);
        if is_of(&before, uplink) {
            wanted.proven = before.proven & families(uplink);
        }
        state.tables.set_uplink(wanted)?;
        Ok(Proven {
            ipv4: wanted.proven & Entry::IPV4 != 0,
            ipv6: wanted.proven & Entry::IPV6 != 0,
        })
    }

    /// Has the packets of one endpoint leave by the uplink before it is proven, or no longer.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn set_prover(&self, endpoint: Option<EndpointHandle>) -> Result<(), DatapathError> {
        let mut state = self.state();
        let before = state.tables.uplink()?;
        if before.ifindex == 0 {
            return Ok(());
        }
        let prover = endpoint.map_or(0, |endpoint| endpoint.ordinal);
        state.tables.set_uplink(Entry { prover, ..before })
    }

    /// Says that the uplink's way is proven for a family: everybody's packets leave by it from the next one on.
    ///
    /// # Errors
    /// When our program does not stand there first, or the uplink was taken out of use meanwhile.
    pub fn open_uplink(&self, uplink: &Uplink, ipv6: bool) -> Result<(), DatapathError> {
        let mut state = self.state();
        self.come_first(&mut state, uplink)?;
        let before = state.tables.uplink()?;
        if !is_of(&before, uplink) {
            return Err(DatapathError::UplinkGone);
        }
        let family = if ipv6 { Entry::IPV6 } else { Entry::IPV4 };
        let proven = before.proven | family;
        state.tables.set_uplink(Entry { proven, ..before })
    }

    /// Has no packet of IPv6 leave by the uplink, whichever it is. IPv4 stays as it is.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn close_uplink6(&self) -> Result<(), DatapathError> {
        let mut state = self.state();
        let before = state.tables.uplink()?;
        let proven = before.proven & !Entry::IPV6;
        state.tables.set_uplink(Entry { proven, ..before })
    }

    /// In one step with what follows from it under the same lock: what was found not to be first ([`Datapath::guard`])
    /// is not used again by somebody who did not look.
    fn come_first(&self, state: &mut State, uplink: &Uplink) -> Result<(), DatapathError> {
        let attached = state
            .programs
            .attach_uplink(&self.router, &self.pins, uplink.ifindex);
        if attached.is_err() {
            state.tables.set_uplink(Entry::default())?;
        }
        attached
    }
}

/// With nothing proven.
fn entry(uplink: &Uplink) -> Entry {
    Entry {
        ifindex: uplink.ifindex,
        peer_mac: uplink.peer_mac,
        proven: 0,
        prover: 0,
    }
}

fn families(uplink: &Uplink) -> u16 {
    if uplink.ipv6 {
        Entry::IPV4 | Entry::IPV6
    } else {
        Entry::IPV4
    }
}

fn is_of(entry: &Entry, uplink: &Uplink) -> bool {
    (entry.ifindex, entry.peer_mac) == (uplink.ifindex, uplink.peer_mac)
}
