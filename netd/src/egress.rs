//! TCP out of the sandboxes. Owns: the accept loop of the transparent listener and each flow's way from
//! first byte to audit record. Decides nothing: that is [`crate::sandbox`], and nothing is dialled without
//! its leave.

pub mod clear;
pub mod dial;
mod doctor;
mod flow;
pub mod hello;
mod intercepted;
pub mod retry;
mod route;
pub mod sniff;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use sandgate_daemon::tasks::Tasks;
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};

use self::dial::Dialer;
use crate::{
    audit::Audit,
    canary::Greeting,
    intercept::{leases::Broker, upstream::UpstreamTls},
    metrics::Metrics,
    sandbox::Sandboxes,
};

/// Pause when no connection can be accepted, for example because descriptors ran out.
const PAUSE: Duration = Duration::from_millis(20);

/// Everything a flow needs.
pub struct Egress {
    /// Whose flow it is.
    pub sandboxes: Arc<Sandboxes>,
    /// Where it is recorded.
    pub audit: Arc<Audit>,
    /// Where it is counted.
    pub metrics: Metrics,
    /// How it goes on.
    pub dialer: Dialer,
    /// Who gives values and authorities for the flows that are read.
    pub broker: Arc<dyn Broker>,
    /// How their servers are verified.
    pub upstream: Arc<UpstreamTls>,
    /// What the canary is told.
    pub greeting: Arc<Greeting>,
    /// Where it runs.
    pub tasks: Tasks,
}

impl Egress {
    /// Serves connections until the program ends.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let end = self.tasks.shutdown();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = end.cancelled() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if let Ok(to) = stream.local_addr() {
                        // Without the scope that the kernel gives link-local addresses.
                        self.begin(stream, peer.ip(), SocketAddr::new(to.ip(), to.port()));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a sandbox's connection");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn begin(self: &Arc<Self>, stream: TcpStream, from: IpAddr, to: SocketAddr) {
        if let IpAddr::V4(from) = from
            && let Some(word) = self.greeting.for_canary(from)
        {
            self.tasks.spawn("canary", greet(stream, word));
            return;
        }
        // The kernel has checked the source against the interface: it names the sandbox.
        let Some(sandbox) = self.sandboxes.by_address(from) else {
            refuse(&stream);
            return;
        };
        if doctor::is_for(to) {
            let egress = Arc::clone(self);
            self.tasks
                .spawn("self-test", async move { egress.examine(&sandbox, stream).await });
            return;
        }
        let Some(entry) = self.enter(&sandbox, to) else {
            refuse(&stream);
            return;
        };
        let egress = Arc::clone(self);
        let span = sandbox.span();
        self.tasks
            .spawn_within("flow", &span, async move { egress.run(entry, stream).await });
    }
}

async fn greet(mut stream: TcpStream, word: [u8; 16]) {
    // The canary itself notices what is missing.
    let _unwritten = stream.write_all(&word).await;
    let _unclosed = stream.shutdown().await;
}

/// Makes closing the stream a reset: the client learns at once that this was a refusal.
fn refuse(stream: &TcpStream) {
    let reset: io::Result<()> = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    if let Err(error) = reset {
        tracing::debug!(%error, "cannot reset a connection, closing it");
    }
}
