//! Proves at start that the wall stands: a throw-away endpoint in a namespace of its own sends one packet
//! that must be refused and one that must reach netd's listener. Where there is an uplink, another one sends a packet
//! that must pass without netd, be forwarded under the node's address, and be answered; in each family that leaves by it.
//!
//! Owns: those endpoints and who answers, from making to removal. Nothing they send can leave the node: the kernel
//! refuses the one, netd itself answers the other, and the third goes to a namespace behind the node's own.

mod endpoint;
mod responder;

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpStream},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ipnet::{Ipv4Net, Ipv6Net};
use sandgate_policy::{KernelAction, KernelTable, PortRange, PrefixEntry, Protocol};

use self::{
    endpoint::{Throwaway, ThrowawayError},
    responder::Responder,
};
use crate::{
    kernel::{Datapath, DatapathError},
    uplink::{Names, Place},
};

/// A destination of the documentation ranges (RFC 5737): nobody has it.
const TO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const REDIRECTED: u16 = 443;
const REFUSED: u16 = 444;
/// netd may listen where everybody may.
const PASSED: u16 = 44_500;
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
    /// The passed connection was not answered.
    #[error("the pass failed: a connection by the uplink {0}")]
    Pass(String),
}

impl CanaryError {
    /// Whether a packet that should have passed did not, so that something on its way has kept it.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Pass(_) => true,
            Self::Endpoint(_)
            | Self::Datapath(_)
            | Self::Random(_)
            | Self::Refusal(_)
            | Self::Redirection(_) => false,
        }
    }
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

/// The same for IPv6, in the place that the other one has in its range.
pub fn address6(sandbox_cidr: Ipv4Net, sandbox_cidr6: Ipv6Net) -> Ipv6Addr {
    let place = sandbox_cidr.broadcast().to_bits() - sandbox_cidr.network().to_bits();
    Ipv6Addr::from_bits(sandbox_cidr6.network().to_bits() + u128::from(place))
}

/// Sends both packets. Blocking, a fraction of a second when all is well.
///
/// # Errors
/// Names what failed.
pub fn fly(datapath: &Datapath, sandbox_cidr: Ipv4Net, greeting: &Greeting) -> Result<(), CanaryError> {
    let address = address(sandbox_cidr);
    let mut word = [0; 16];
    getrandom::fill(&mut word).map_err(CanaryError::Random)?;
    let throwaway = Throwaway::make(datapath.router(), address, None)?;
    let endpoint = datapath.attach(throwaway.endpoint())?;
    greeting.set(Some((address, word)));
    let outcome = (|| {
        datapath.set_policy(endpoint, &table(REDIRECTED, KernelAction::Proxy))?;
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

/// Sends the packet that leaves by the kernel, of this family. Blocking, a fraction of a second when all is well.
///
/// # Errors
/// Names what failed.
pub fn pass(datapath: &Datapath, place: &Place, names: &Names, ipv6: bool) -> Result<(), CanaryError> {
    let address = address(place.sandboxes);
    let address6 = place
        .sandboxes6
        .filter(|_| ipv6)
        .map(|range| address6(place.sandboxes, range));
    let mut word = [0; 16];
    getrandom::fill(&mut word).map_err(CanaryError::Random)?;
    let responder = Responder::make(names, PASSED, ANSWER_TIME, address6.is_some())?;
    let outcome = passed(datapath, (address, address6), word, &responder);
    responder.remove()?;
    outcome
}

fn passed(
    datapath: &Datapath,
    (address, address6): (Ipv4Addr, Option<Ipv6Addr>),
    word: [u8; 16],
    responder: &Responder,
) -> Result<(), CanaryError> {
    let throwaway = Throwaway::make(datapath.router(), address, address6)?;
    let own = address6.map_or(IpAddr::V4(address), IpAddr::V6);
    let endpoint = datapath.attach(throwaway.endpoint())?;
    let outcome = (|| {
        datapath.set_policy(endpoint, &table(PASSED, KernelAction::Pass))?;
        // Whether anybody else's packets leave yet or not.
        datapath.set_prover(Some(endpoint))?;
        throwaway.connect_up(datapath.router())?;
        let (from, heard) = thread::scope(|scope| {
            let answering = scope.spawn(|| responder.answer(word, own));
            let heard = throwaway.inside(|| hear(responder.at));
            // If it cannot be ended, it ends itself when nobody comes.
            let _ends_itself = responder.end();
            let from = answering
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (from, heard)
        });
        match (from, heard?) {
            (Ok(from), _) if from == own => Err(CanaryError::Pass(
                "arrived with the sandbox's own address, and not with the node's".to_owned(),
            )),
            (_, Ok(heard)) if heard == word => Ok(()),
            (_, Ok(_)) => Err(CanaryError::Pass("was answered by somebody else".to_owned())),
            (Ok(_), Err(error)) => Err(CanaryError::Pass(format!(
                "arrived, and the answer did not: {error}"
            ))),
            (Err(_), Err(error)) => Err(CanaryError::Pass(format!("did not arrive: {error}"))),
        }
    })();
    let ended = datapath.set_prover(None);
    let detached = datapath.detach(endpoint);
    throwaway.remove(datapath.router())?;
    outcome?;
    ended?;
    Ok(detached?)
}

fn table(port: u16, action: KernelAction) -> KernelTable {
    let range = PortRange {
        protocol: Protocol::Tcp,
        first: port,
        last: port,
        action,
    };
    let everywhere = [Ipv4Net::default().into(), Ipv6Net::default().into()];
    KernelTable {
        entries: everywhere
            .map(|prefix| PrefixEntry {
                prefix,
                ranges: vec![range],
            })
            .into(),
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&to(port), ANSWER_TIME)
}

fn to(port: u16) -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(TO, port))
}

/// Connects, and reads who answers.
fn hear(to: SocketAddr) -> io::Result<[u8; 16]> {
    let mut stream = TcpStream::connect_timeout(&to, ANSWER_TIME)?;
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    let mut heard = [0; 16];
    stream.read_exact(&mut heard)?;
    Ok(heard)
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
    let heard = hear(to(REDIRECTED)).map_err(|error| CanaryError::Redirection(error.to_string()))?;
    if heard != word {
        return Err(CanaryError::Redirection("somebody else answered".to_owned()));
    }
    Ok(())
}
