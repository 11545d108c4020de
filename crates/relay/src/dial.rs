//! The guarded dialer: connects to one exact address, or says why not. Never resolves a name, never
//! follows anything, and cannot be asked to connect where the platform forbids it: only
//! [`Permitted::check`] makes what [`connect`] takes.

use std::{io, net::SocketAddr, time::Duration};

use sandgate_policy::Platform;
use tokio::net::{TcpSocket, TcpStream};

/// An address that the platform's forbidden ranges do not contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permitted(SocketAddr);

impl Permitted {
    /// Holds `to` against the platform's ranges.
    ///
    /// # Errors
    /// [`DialError::Forbidden`] when the platform denies the address.
    pub fn check(platform: &Platform, to: SocketAddr) -> Result<Self, DialError> {
        if platform.denies(to) {
            return Err(DialError::Forbidden(to));
        }
        Ok(Self(to))
    }

    /// The address.
    pub fn address(self) -> SocketAddr {
        self.0
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The platform forbids the address, whoever asks.
    #[error("{0} is an address nobody may reach")]
    Forbidden(SocketAddr),
    /// The connection ended on this machine itself: the address became ours after it was checked.
    #[error("{0} is an address of this node")]
    Local(SocketAddr),
    /// No answer in time.
    #[error("{to} did not answer within {limit:?}")]
    TimedOut {
        /// Where to.
        to: SocketAddr,
        /// The limit.
        limit: Duration,
    },
    /// The connection was refused or could not be made.
    #[error("connecting to {to}: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Connects to exactly `to` within `limit`, with Nagle's delay off.
///
/// # Errors
/// See [`DialError`]; a connection that ended on this machine is closed at once and an error.
pub async fn connect(to: Permitted, limit: Duration) -> Result<TcpStream, DialError> {
    let to = to.address();
    let failed = |source| DialError::Connect { to, source };
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
    .map_err(failed)?;
    socket.set_nodelay(true).map_err(failed)?;
    socket.set_keepalive(true).map_err(failed)?;
    let stream = match tokio::time::timeout(limit, socket.connect(to)).await {
        Ok(connected) => connected.map_err(failed)?,
        Err(_elapsed) => return Err(DialError::TimedOut { to, limit }),
    };
    // Connections to an address of one's own have that address at both ends.
    if stream.local_addr().map_err(failed)?.ip() == to.ip() {
        return Err(DialError::Local(to));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_permission_is_made_for_a_forbidden_address() {
        let platform = Platform::new(Vec::new());
        for to in [
            "127.0.0.1:80",
            "10.0.0.1:443",
            "169.254.169.254:80",
            "[::ffff:10.0.0.1]:443",
        ] {
            let to = to.parse().expect("an address");
            assert!(Permitted::check(&platform, to).is_err(), "{to} was permitted");
        }
        let to = "203.0.113.10:443".parse().expect("an address");
        assert_eq!(Permitted::check(&platform, to).expect("permitted").address(), to);
    }

    #[tokio::test]
    async fn a_connection_to_this_machine_is_an_error_even_when_permitted() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let to = listener.local_addr().expect("bound");
        let outcome = connect(Permitted(to), Duration::from_secs(5)).await;
        assert!(
            matches!(outcome, Err(DialError::Local(address)) if address == to),
            "{outcome:?}"
        );
    }
}
