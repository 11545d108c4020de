//! Proves at start that the wall stands: a throw-away endpoint in a namespace of its own sends one packet
//! that must be refused and one that must reach netd's listener. Owns: that endpoint, from making to removal.
//! Nothing it sends can leave the node: the kernel refuses the one, netd itself answers the other.

mod endpoint;

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use sandgate_policy::{KernelAction, KernelTable, PortRange, PrefixEntry, Protocol};

use self::endpoint::{Throwaway, ThrowawayError};
use crate::kernel::{Datapath, DatapathError};

/// A destination of the documentation ranges (RFC 5737): nobody has it.
const TO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const REDIRECTED: u16 = 443;
const REFUSED: u16 = 444;
/// Both answers come from this machine.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// What netd says to its own canary, so that it knows who answered.
#[derive(Debug, Default)]
pub struct Greeting {
    expected: Mutex<Option<(Ipv4Addr, [u8; 16])>>,
}

/// The wall is not proven to stand.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The endpoint could not be made.
    #[error("the canary's endpoint: {0}")]
    Endpoint(#[from] ThrowawayError),
    /// The kernel half did not take it.
    #[error("the canary's rules: {0}")]
    Datapath(#[from] DatapathError),
    /// No randomness.
    #[error("no randomness for the canary: {0}")]
    Random(getrandom::Error),
    /// The refused connection was not refused.
    #[error(
        "the refusal failed: a forbidden connection ended with `{0}` and not with a reset (the tc program on the endpoint, or the refusing nftables rule of the router namespace)"
    )]
    Refusal(String),
    /// The redirected connection did not arrive.
    #[error(
        "the redirection failed: an allowed connection did not reach netd's listener: {0} (the tc program on the endpoint, or the routing rule for its mark in the router namespace)"
    )]
    Redirection(String),
}

impl Greeting {
    /// The word for a connection from this address, if it is the canary's.
    pub fn for_canary(&self, from: Ipv4Addr) -> Option<[u8; 16]> {
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        expected
            .filter(|(address, _)| *address == from)
            .map(|(_, word)| word)
    }

    fn set(&self, expected: Option<(Ipv4Addr, [u8; 16])>) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = expected;
    }
}

/// The canary's address: the last of the range, which is not given to a sandbox.
pub fn address(sandbox_cidr: Ipv4Net) -> Ipv4Addr {
    sandbox_cidr.broadcast()
}

/// Sends both packets. Blocking, a fraction of a second when all is well.
///
/// # Errors
/// Names what failed.
pub fn fly(datapath: &Datapath, sandbox_cidr: Ipv4Net, greeting: &Greeting) -> Result<(), CanaryError> {
    let address = address(sandbox_cidr);
    let mut word = [0; 16];
    getrandom::fill(&mut word).map_err(CanaryError::Random)?;
    let throwaway = Throwaway::make(datapath.router(), address)?;
    let endpoint = datapath.attach(throwaway.endpoint())?;
    greeting.set(Some((address, word)));
    let outcome = (|| {
        datapath.set_policy(endpoint, &table())?;
        throwaway.connect_up(datapath.router())?;
        let refused = throwaway.inside(refused)?;
        let redirected = throwaway.inside(|| redirected(word))?;
        refused.and(redirected)
    })();
    greeting.set(None);
    let detached = datapath.detach(endpoint);
    throwaway.remove(datapath.router())?;
    outcome?;
    Ok(detached?)
}

fn table() -> KernelTable {
    let range = PortRange {
        protocol: Protocol::Tcp,
        first: REDIRECTED,
        last: REDIRECTED,
        action: KernelAction::Proxy,
    };
    KernelTable {
        entries: vec![PrefixEntry {
            prefix: Ipv4Net::default().into(),
            ranges: vec![range],
        }],
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::V4(SocketAddrV4::new(TO, port)), ANSWER_TIME)
}

fn refused() -> Result<(), CanaryError> {
    let began = Instant::now();
    match connect(REFUSED) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!(after = ?began.elapsed(), "the canary was refused, as it should be");
            Ok(())
        }
        Err(error) => Err(CanaryError::Refusal(error.to_string())),
        Ok(_) => Err(CanaryError::Refusal("connected".to_owned())),
    }
}

fn redirected(word: [u8; 16]) -> Result<(), CanaryError> {
    let failed = |error: io::Error| CanaryError::Redirection(error.to_string());
    let mut stream = connect(REDIRECTED).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_TIME)).map_err(failed)?;
    let mut heard = [0; 16];
    stream.read_exact(&mut heard).map_err(failed)?;
    if heard != word {
        return Err(CanaryError::Redirection("somebody else answered".to_owned()));
    }
    Ok(())
}
