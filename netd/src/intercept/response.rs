//! A server's answer on its way to the client. Owns: that no value on lease is in its headers, body or trailers.
//! Streams: never holds more than one chunk, and what may still turn out to be the beginning of a value.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{
    HeaderMap, Response, StatusCode,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use sandgate_policy::Reason;
use sandgate_relay::{
    encoded::{Coding, Decoder, EncodedError},
    headers,
    redact::{Needles, Redactor, redact_headers},
};

use super::{Body, BodyError, account::Account, answer::Refusal, upstream::Home};

/// Makes of the server's answer the one for the client.
pub(super) fn finish(
    account: &Arc<Account>,
    answer: Response<Incoming>,
    home: Home,
    needles: Arc<Needles>,
    method: &str,
) -> Result<Response<Body>, Refusal> {
    let (mut parts, inner) = answer.into_parts();
    account.note(format!("answered {}", parts.status.as_u16()));
    if parts.status.is_informational() {
        let message = "the server changes the protocol without being asked";
        return Err(Refusal::of(
            StatusCode::BAD_GATEWAY,
            Reason::UpstreamUnreachable,
            message,
        ));
    }
    // Where both are, the chunks count (RFC 9112 6.3).
    if parts.headers.contains_key(TRANSFER_ENCODING) {
        parts.headers.remove(CONTENT_LENGTH);
    }
    headers::strip_hop_by_hop(&mut parts.headers);
    headers::strip_alt_svc(&mut parts.headers);
    let searched = !needles.is_empty();
    if searched {
        mask(account, &needles, &mut parts.headers);
        if let Some((text, _)) = parts
            .extensions
            .get::<hyper::ext::ReasonPhrase>()
            .and_then(|phrase| needles.redact(phrase.as_bytes()))
            && let Ok(phrase) = hyper::ext::ReasonPhrase::try_from(text)
        {
            parts.extensions.insert(phrase);
        }
    }
    let bodiless = method == "HEAD"
        || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || inner.is_end_stream();
    let mut decoder = None;
    if searched && !bodiless {
        let coding = Coding::of(&parts.headers).map_err(|error| {
            let message = format!("the answer cannot be searched for secrets: {error}");
            Refusal::of(StatusCode::BAD_GATEWAY, Reason::UpstreamUnreachable, message)
        })?;
        if coding != Coding::Identity {
            headers::forget_body_facts(&mut parts.headers);
            decoder = Some(Decoder::new(coding));
        }
    }
    let body = Downward {
        inner,
        decoder,
        redactor: searched.then(|| Redactor::new(Arc::clone(&needles))),
        needles,
        trailers: None,
        state: State::Streaming,
        account: Arc::clone(account),
        home: Some(home),
    };
    Ok(Response::from_parts(parts, body.boxed_unsync()))
}

/// Masks values in headers.
pub(super) fn mask(account: &Account, needles: &Needles, headers: &mut HeaderMap) {
    for name in redact_headers(needles, headers) {
        account.echoed(&name);
    }
}

/// An answer's body.
struct Downward {
    inner: Incoming,
    decoder: Option<Decoder>,
    redactor: Option<Redactor>,
    needles: Arc<Needles>,
    trailers: Option<HeaderMap>,
    state: State,
    account: Arc<Account>,
    /// The connection, which goes home when the body has ended well.
    home: Option<Home>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Streaming,
    /// The server is done; what was held back goes out next, then the trailers.
    Drained,
    Ended,
}

impl Downward {
    fn masked(&mut self, data: Bytes) -> Bytes {
        match &mut self.redactor {
            Some(redactor) => redactor.push(data),
            None => data,
        }
    }

    fn give(&self, data: Bytes) -> Option<Result<Frame<Bytes>, BodyError>> {
        self.account.add_down(data.len());
        Some(Ok(Frame::data(data)))
    }

    /// The next decoded piece with its values masked; nothing while more input is needed.
    fn decoded(&mut self) -> Result<Option<Bytes>, EncodedError> {
        while let Some(decoder) = &mut self.decoder {
            let Some(piece) = decoder.piece()? else { break };
            let piece = self.masked(piece);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    fn server_is_done(&mut self) -> Result<Bytes, EncodedError> {
        self.state = State::Drained;
        if let Some(decoder) = &self.decoder {
            decoder.finish()?;
        }
        let Some(redactor) = &mut self.redactor else {
            return Ok(Bytes::new());
        };
        let rest = redactor.finish();
        for (name, _) in redactor.hits() {
            self.account.echoed(name);
        }
        Ok(rest)
    }

    fn failed(&mut self, error: impl Into<BodyError>) -> Option<Result<Frame<Bytes>, BodyError>> {
        self.state = State::Ended;
        // A connection in the middle of something has no home.
        self.home = None;
        Some(Err(error.into()))
    }
}

impl HttpBody for Downward {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            match this.state {
                State::Ended => return Poll::Ready(None),
                State::Drained => {
                    this.state = State::Ended;
                    if let Some(home) = this.home.take() {
                        home.go();
                    }
                    return Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
                }
                State::Streaming => {}
            }
            match this.decoded() {
                Ok(Some(piece)) => return Poll::Ready(this.give(piece)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(this.failed(error)),
            }
            match std::task::ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => match &mut this.decoder {
                        Some(decoder) => decoder.feed(data),
                        None => {
                            let data = this.masked(data);
                            if !data.is_empty() {
                                return Poll::Ready(this.give(data));
                            }
                        }
                    },
                    Err(frame) => {
                        if let Ok(mut trailers) = frame.into_trailers() {
                            headers::strip_hop_by_hop(&mut trailers);
                            mask(&this.account, &this.needles, &mut trailers);
                            this.trailers = Some(trailers);
                        }
                    }
                },
                Some(Err(error)) => return Poll::Ready(this.failed(error)),
                None => match this.server_is_done() {
                    Ok(rest) if rest.is_empty() => {}
                    Ok(rest) => return Poll::Ready(this.give(rest)),
                    Err(error) => return Poll::Ready(this.failed(error)),
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.state {
            State::Streaming => {
                self.redactor.is_none() && self.decoder.is_none() && self.inner.is_end_stream()
            }
            State::Drained => false,
            State::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for Downward {
    fn drop(&mut self) {
        // Readers need not ask again after the last byte of a body whose length they know.
        if self.state != State::Ended
            && self.inner.is_end_stream()
            && let Some(home) = self.home.take()
        {
            home.go();
        }
    }
}
