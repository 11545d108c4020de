//! Numbers of a running program, served as OpenMetrics text on a listener of their own.
//!
//! Owns the registry's common part (build and process), the listener and its bounds. A program registers its
//! own numbers in the same registry. The listener answers `GET /metrics` and `GET /healthz` and nothing else;
//! it asks for no credential, which is why it is never a part of another listener, and why no label may name a
//! tenant.

mod process;
mod serve;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use prometheus_client::{
    metrics::info::Info,
    registry::{Registry, Unit},
};

pub use prometheus_client;
pub use serve::{Refresh, serve};

/// The value that switches the listener off.
const OFF: &str = "off";

/// How long a predecessor that is ending may still hold the address.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// How often the address is tried meanwhile.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Where a program shows its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Off,
    /// On a listener at this address.
    At(SocketAddr),
}

impl FromStr for Place {
    type Err = InvalidPlace;

    fn from_str(text: &str) -> Result<Self, InvalidPlace> {
        if text == OFF {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(|_not_one| InvalidPlace {
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str(OFF),
            Self::At(address) => address.fmt(formatter),
        }
    }
}

/// Neither an address nor `off`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an address and port, for example 127.0.0.1:9464, or `{OFF}`; got `{text}`")]
pub struct InvalidPlace {
    text: String,
}

/// The listener cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: listening on {address}: {source}")]
pub struct ListenError {
    /// The variable to correct.
    pub variable: &'static str,
    /// The address that was asked for.
    pub address: SocketAddr,
    source: io::Error,
}

/// Takes the listener, before anything else is started: an address that is in use is a wrong configuration. A
/// predecessor that has just ended is waited for, up to 2 s.
///
/// # Errors
/// When the address cannot be listened on; the error names `variable`.
pub fn listen(variable: &'static str, place: Place) -> Result<Option<TcpListener>, ListenError> {
    let Place::At(address) = place else {
        return Ok(None);
    };
    let until = Instant::now() + BUSY_TIME;
    loop {
        // The standard library sets SO_REUSEADDR, so that ended connections do not hold the address.
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                thread::sleep(BUSY_PAUSE);
            }
            Err(source) => {
                return Err(ListenError {
                    variable,
                    address,
                    source,
                });
            }
        }
    }
}

/// A registry that holds what every program shows: its version, and the process's memory, descriptors, threads,
/// processor time and start.
pub fn registry(program: &'static str) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(process::Process));
    registry.sub_registry_with_prefix("sandgate").register(
        "build",
        "The program and its version",
        Info::new([("program", program), ("version", env!("CARGO_PKG_VERSION"))]),
    );
    registry
}

/// Upper bounds, in seconds, of what takes between half a millisecond and a minute.
pub const SECONDS: [f64; 15] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
];

/// The unit of [`SECONDS`].
pub const UNIT_SECONDS: Unit = Unit::Seconds;

#[cfg(test)]
mod tests;
