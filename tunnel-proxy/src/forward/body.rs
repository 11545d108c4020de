//! Bodies on their way. Owns: counting them, and that they end with their tunnel. Nothing is held back: a frame goes on
//! when it is there and the other side takes it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use sandgate_daemon::tasks::Tasks;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::headers::{to_client, trailers_to_sandbox};
use crate::{
    access::Access,
    account::{Account, Outcome},
    connection::Resets,
    upstream::Home,
};

/// A body on its way, in either direction.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;
/// Why a body ended early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// How much, and for how long, is read of a body that goes nowhere: many clients look at an answer only when they
/// have sent everything.
const DISCARDED_MAX: usize = 8 << 20;
const DISCARDING_TIME: Duration = Duration::from_secs(10);

/// A request's body.
pub struct Upward {
    /// Until it is dropped.
    inner: Option<Incoming>,
    account: Arc<Account>,
    tasks: Tasks,
    broken: Broken,
    /// Whose tokens its trailers may not carry on.
    accesses: Vec<Access>,
}

/// Whether a request's body was not what its framing said.
#[derive(Debug, Clone, Default)]
pub struct Broken(Arc<AtomicBool>);

impl Broken {
    /// Whether it was.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Upward {
    /// What goes to the sandbox, and whether it broke.
    pub fn new(inner: Incoming, account: Arc<Account>, tasks: Tasks) -> (Self, Broken) {
        let broken = Broken::default();
        let body = Self {
            inner: Some(inner),
            account,
            tasks,
            broken: broken.clone(),
            accesses: Vec::new(),
        };
        (body, broken)
    }

    /// The same without the tokens of `accesses` in its trailers.
    #[must_use]
    pub fn to_sandbox(mut self, accesses: Vec<Access>) -> Self {
        self.accesses = accesses;
        self
    }
}

impl HttpBody for Upward {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        match ready!(Pin::new(inner).poll_frame(cx)) {
            None => Poll::Ready(None),
            Some(Ok(mut frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                if let Some(trailers) = frame.trailers_mut() {
                    trailers_to_sandbox(trailers, &self.accesses);
                }
                self.account.traffic.add_up(length);
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.broken.0.store(true, Ordering::Relaxed);
                Poll::Ready(Some(Err(error.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner
            .as_ref()
            .map_or_else(SizeHint::default, HttpBody::size_hint)
    }
}

impl Drop for Upward {
    fn drop(&mut self) {
        if let Some(rest) = self.inner.take().filter(|rest| !rest.is_end_stream()) {
            self.tasks.spawn("rest of a body", discard(rest));
        }
    }
}

/// Reads away what a client still sends after the answer was decided.
async fn discard(mut rest: Incoming) {
    let mut left = DISCARDED_MAX;
    let reading = async {
        while left > 0 && !rest.is_end_stream() {
            let Some(Ok(frame)) = rest.frame().await else {
                return;
            };
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        }
    };
    // Who is still sending then has its connection closed.
    let _elapsed = tokio::time::timeout(DISCARDING_TIME, reading).await;
}

#[derive(Debug, thiserror::Error)]
#[error("the tunnel was closed")]
struct TunnelClosed;

/// An answer's body.
pub struct Downward {
    inner: Incoming,
    account: Arc<Account>,
    end: Pin<Box<WaitForCancellationFutureOwned>>,
    home: Option<Home>,
    resets: Option<Resets>,
    is_over: bool,
    /// The authority that the client asked for.
    host: String,
}

impl Downward {
    /// What goes to the client until `end`. Where it ends early, `resets` makes the client's connection say so.
    pub fn new(
        inner: Incoming,
        account: Arc<Account>,
        end: CancellationToken,
        home: Option<Home>,
        resets: Option<Resets>,
    ) -> Self {
        Self {
            inner,
            account,
            end: Box::pin(end.cancelled_owned()),
            home,
            resets,
            is_over: false,
            host: String::new(),
        }
    }

    /// The same for a client that asked for `host`: its trailers follow the rules of its headers.
    #[must_use]
    pub fn to_client(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    fn is_served(&mut self) {
        self.is_over = true;
        self.account.ends(Outcome::Served);
        if let Some(home) = self.home.take() {
            home.go();
        }
    }

    fn breaks_off(&mut self, outcome: Outcome) {
        self.is_over = true;
        self.account.ends(outcome);
        if let Some(resets) = &self.resets {
            resets.set();
        }
    }
}

impl HttpBody for Downward {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if self.end.as_mut().poll(cx).is_ready() {
            self.breaks_off(Outcome::Cut);
            return Poll::Ready(Some(Err(Box::new(TunnelClosed))));
        }
        match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
            None => {
                self.is_served();
                Poll::Ready(None)
            }
            Some(Ok(mut frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                if let Some(trailers) = frame.trailers_mut() {
                    to_client(trailers, &self.host);
                }
                self.account.traffic.add_down(length);
                if self.inner.is_end_stream() {
                    self.is_served();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.breaks_off(Outcome::Failed);
                Poll::Ready(Some(Err(error.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Downward {
    fn drop(&mut self) {
        // An answer without a body is never asked for one.
        if !self.is_over && self.inner.is_end_stream() {
            self.is_served();
        }
    }
}
