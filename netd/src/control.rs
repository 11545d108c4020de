//! netd's ends of the channels that it inherits, over which sockets pass: the controller's both ways, tunnel-proxy's
//! inward only. Owns: making connections toward the controller and taking dial sockets. Knows nothing of what is
//! said on them.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use sandgate_api::control::{CONTROL_FD_VARIABLE, MAX_PACKET, Open, TUNNEL_DIAL_FD_VARIABLE};
use sandgate_daemon::handover::{Channel, inherited};
use std::os::fd::AsFd as _;
use tokio::net::UnixStream;

/// How long a full channel may keep us waiting: the controller is away then.
const SEND_TIME: Duration = Duration::from_secs(2);

/// The control channel.
pub struct Control {
    channel: Channel,
}

/// What the supervisor passed down.
#[derive(Debug)]
pub struct Inherited {
    /// To the controller.
    pub controller: OwnedFd,
    /// To tunnel-proxy, where there is one.
    pub tunnel_proxy: Option<OwnedFd>,
}

impl Inherited {
    /// Takes the descriptors over, so that no program that netd starts inherits them too.
    ///
    /// # Errors
    /// When there is none to the controller.
    pub fn take() -> Result<Self, ControlError> {
        let take = |variable| inherited(variable).map_err(ControlError::Inherit);
        Ok(Self {
            controller: take(CONTROL_FD_VARIABLE)?.ok_or(ControlError::NotInherited)?,
            tunnel_proxy: take(TUNNEL_DIAL_FD_VARIABLE)?,
        })
    }
}

/// The channel cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// netd was not started by `controller up`.
    #[error("{CONTROL_FD_VARIABLE} is not set: netd is started by `controller up`")]
    NotInherited,
    /// The descriptor.
    #[error("cannot use the inherited descriptor: {0}")]
    Inherit(#[source] io::Error),
    /// A connection toward the controller.
    #[error("cannot open a connection to the controller: {0}")]
    Open(#[source] io::Error),
    /// Reading.
    #[error("cannot read the control channel: {0}")]
    Receive(#[source] io::Error),
    /// Whoever started netd is gone.
    #[error("the control channel was closed")]
    Closed,
}

impl Control {
    /// Uses an inherited descriptor. Within a runtime.
    ///
    /// # Errors
    /// When it is not a control channel.
    pub fn new(descriptor: OwnedFd) -> Result<Self, ControlError> {
        let channel = Channel::from_fd(descriptor).map_err(ControlError::Inherit)?;
        Ok(Self { channel })
    }

    /// Opens a connection for the feed's calls toward the controller.
    ///
    /// # Errors
    /// When the channel does not take it.
    pub async fn open_feed(&self) -> Result<UnixStream, ControlError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(ControlError::Open)?;
        ours.set_nonblocking(true).map_err(ControlError::Open)?;
        let packet = serde_json::to_vec(&Open::Feed).map_err(|error| ControlError::Open(error.into()))?;
        let sending = self.channel.send(&packet, Some(theirs.as_fd()));
        match tokio::time::timeout(SEND_TIME, sending).await {
            Ok(sent) => sent.map_err(ControlError::Open)?,
            Err(_elapsed) => return Err(ControlError::Open(io::ErrorKind::TimedOut.into())),
        }
        UnixStream::from_std(ours).map_err(ControlError::Open)
    }

    /// The next socket on which the other side asks for connections into sandboxes.
    ///
    /// # Errors
    /// When the channel is closed or broken.
    pub async fn next_dial_socket(&self) -> Result<OwnedFd, ControlError> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let (length, descriptor) = self
                .channel
                .recv(&mut buffer)
                .await
                .map_err(ControlError::Receive)?;
            if length == 0 && descriptor.is_none() {
                return Err(ControlError::Closed);
            }
            match (serde_json::from_slice::<Open>(&buffer[..length]), descriptor) {
                (Ok(Open::Dial), Some(socket)) => return Ok(socket),
                (Ok(Open::Dial | Open::Feed), _) => {
                    tracing::warn!("an unexpected message on the control channel");
                }
                (Err(error), _) => tracing::warn!(%error, "an unreadable message on the control channel"),
            }
        }
    }
}
