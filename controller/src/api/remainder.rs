//! What is left of a request's body when it is answered.
//!
//! A request that is refused early (no key, no such path) is answered before its body was read. hyper then closes the
//! connection, which a client that sent its body in a second segment, or its next request meanwhile, meets as a reset
//! without an answer. So what is left is read and thrown away, to a limit; beyond, the answer says that the connection
//! ends (RFC 9112, 9.6).

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    response::Response,
};
use http::{HeaderValue, Version, header};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};

/// Bytes of a body that nobody wanted which are read all the same.
const MOST: usize = 256 * 1024;
/// How long they are waited for.
const TIME: Duration = Duration::from_secs(2);

/// Where a body that was not read to its end is found again.
pub(super) struct Remainder {
    left: Arc<Mutex<Option<Body>>>,
    is_http1: bool,
    /// The client sends the body only when it is asked to, which reading it would do (RFC 9110, 10.1.1).
    waits: bool,
}

impl Remainder {
    /// Watches the body of a request.
    pub(super) fn of(request: Request) -> (Request, Self) {
        let left = Arc::new(Mutex::new(None));
        let is_http1 = request.version() <= Version::HTTP_11;
        let waits = request.headers().contains_key(header::EXPECT);
        let watched = request.map(|body| {
            if body.is_end_stream() {
                return body;
            }
            Body::new(Watched {
                body,
                ended: false,
                left: Arc::clone(&left),
            })
        });
        (
            watched,
            Self {
                left,
                is_http1,
                waits,
            },
        )
    }

    /// Reads what is left, or says that the connection ends with this answer.
    pub(super) async fn settle(self, response: &mut Response) {
        // The other multiplexes: a stream that ends early harms no other.
        if !self.is_http1 {
            return;
        }
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(left) = left else { return };
        let whole = !self.waits && matches!(tokio::time::timeout(TIME, read_away(left)).await, Ok(true));
        if !whole {
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// Whether it came to its end.
async fn read_away(mut body: Body) -> bool {
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => read += frame.data_ref().map_or(0, Bytes::len),
            Err(_broken) => return false,
        }
        if read > MOST {
            return false;
        }
    }
    true
}

struct Watched {
    body: Body,
    ended: bool,
    left: Arc<Mutex<Option<Body>>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.ended = !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            let body = std::mem::replace(&mut self.body, Body::empty());
            *self.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(body);
        }
    }
}
