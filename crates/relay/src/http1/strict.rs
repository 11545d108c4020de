//! Holds an HTTP/1.1 client to strict framing before any other parser sees its bytes (RFC 9112). Owns: where
//! each request begins and ends. What two parsers could read in two ways never reaches the second one: after
//! the first such byte nothing more of the connection is read, and the request is answered with 400.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use super::{
    body::Body,
    head::{self, Framing, Reading},
};

/// Longest head of a request, in bytes.
pub const HEAD_MAX: usize = 32 * 1024;
/// Why a request is no request: its head is longer than [`HEAD_MAX`].
pub const TOO_LONG: &str = "a head over 32 KiB";
/// Why a request is no request: its head took too long.
pub const TOO_SLOW: &str = "a head that did not come in time";
const CHUNK: usize = 8 * 1024;
/// What the parser behind sees in place of a broken request.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nHost: invalid\r\nConnection: close\r\n\r\n";

/// A client's bytes, of which only well-framed requests come out.
#[derive(Debug)]
pub struct Strict<S> {
    stream: S,
    notes: Arc<Notes>,
    inbox: Vec<u8>,
    /// Bytes of the inbox in which no line ended at the last look.
    looked: usize,
    outbox: Vec<u8>,
    at: usize,
    state: State,
    heads: u64,
    ended: bool,
    upgrades: Upgrades,
    scheme: Option<&'static str>,
    hides_end: bool,
    head_time: Option<Duration>,
    /// Runs while a head has begun and not ended.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Which other protocols a request may ask to go on as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upgrades {
    /// WebSocket.
    WebSocket,
    /// Anything but another HTTP.
    Any,
}

#[derive(Debug)]
enum State {
    Head,
    Body(Body),
    /// A request to change the protocol waits for its answer.
    Undecided,
    /// Another protocol: bytes pass as they are.
    Raw,
    Broken,
}

/// What the filter and the one who answers tell each other.
#[derive(Debug, Default)]
pub struct Notes {
    broken: OnceLock<(u64, &'static str)>,
    upgrade: Mutex<Upgrade>,
    answers: Mutex<Answers>,
}

#[derive(Debug, Default)]
struct Answers {
    ended: u64,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Upgrade {
    accepted: Option<bool>,
    waker: Option<Waker>,
}

impl Notes {
    /// Why the request with this ordinal, counted from 0, is no request.
    pub fn broken(&self, ordinal: u64) -> Option<&'static str> {
        let (at, why) = self.broken.get()?;
        (*at == ordinal).then_some(*why)
    }

    /// Settles a request to change the protocol. Must be called for every one.
    pub fn settle_upgrade(&self, accepted: bool) {
        let mut upgrade = self.upgrade.lock().unwrap_or_else(PoisonError::into_inner);
        upgrade.accepted = Some(accepted);
        if let Some(waker) = upgrade.waker.take() {
            waker.wake();
        }
    }

    /// One more answer has ended, for [`Strict::with_half_close`].
    pub fn answer_ended(&self) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.ended += 1;
        if let Some(waker) = answers.waker.take() {
            waker.wake();
        }
    }

    /// Whether so many answers have ended; else remembers whom to wake.
    fn poll_answers(&self, expected: u64, cx: &Context<'_>) -> bool {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = answers.ended >= expected;
        if !ended {
            answers.waker = Some(cx.waker().clone());
        }
        ended
    }

    /// Takes the answer, or remembers whom to wake.
    fn poll_upgrade(&self, cx: &Context<'_>) -> Option<bool> {
        let mut upgrade = self.upgrade.lock().unwrap_or_else(PoisonError::into_inner);
        let accepted = upgrade.accepted.take();
        if accepted.is_none() {
            upgrade.waker = Some(cx.waker().clone());
        }
        accepted
    }
}

impl<S> Strict<S> {
    /// A filter over a client's bytes.
    pub fn new(stream: S, notes: Arc<Notes>) -> Self {
        Self {
            stream,
            notes,
            inbox: Vec::new(),
            looked: 0,
            outbox: Vec::new(),
            at: 0,
            state: State::Head,
            heads: 0,
            ended: false,
            upgrades: Upgrades::WebSocket,
            scheme: None,
            hides_end: false,
            head_time: None,
            deadline: None,
        }
    }

    /// The same for requests that may ask for these protocols; [`Upgrades::WebSocket`] without this. What is asked for
    /// otherwise is no request for a change: the head's fields must not go on then.
    #[must_use]
    pub fn with_upgrades(self, upgrades: Upgrades) -> Self {
        Self { upgrades, ..self }
    }

    /// The same for requests whose targets may also be absolute URIs of this scheme, `http` or `https`.
    #[must_use]
    pub fn with_absolute(self, scheme: &'static str) -> Self {
        Self {
            scheme: Some(scheme),
            ..self
        }
    }

    /// The same for clients that close their half after the last request: what is behind learns of it only when every
    /// answer has ended, as [`Notes::answer_ended`] says. It can go on reading, and so sees a client that is gone.
    #[must_use]
    pub fn with_half_close(self) -> Self {
        Self {
            hides_end: true,
            ..self
        }
    }

    /// The same with a limit on the time from a head's first byte to its last.
    #[must_use]
    pub fn with_head_time(self, limit: Duration) -> Self {
        Self {
            head_time: Some(limit),
            ..self
        }
    }

    fn broken(&mut self, why: &'static str) {
        // The first one stands; there is no second.
        let _again = self.notes.broken.set((self.heads, why));
        self.state = State::Broken;
        self.inbox = Vec::new();
        self.outbox.extend_from_slice(STAND_IN);
    }

    /// Turns what is in the inbox into what may pass. False: more bytes are needed.
    fn digest(&mut self) -> io::Result<bool> {
        if self.inbox.is_empty() {
            return Ok(false);
        }
        match &mut self.state {
            State::Head => {
                self.digest_head();
                Ok(!self.outbox.is_empty())
            }
            State::Body(body) => {
                let taken = body
                    .push(&self.inbox, &mut self.outbox)
                    .map_err(|broken| io::Error::new(io::ErrorKind::InvalidData, broken))?;
                self.inbox.drain(..taken);
                if body.is_done() {
                    self.state = State::Head;
                    self.looked = 0;
                }
                Ok(taken > 0)
            }
            State::Raw => {
                self.outbox.append(&mut self.inbox);
                Ok(true)
            }
            State::Undecided | State::Broken => Ok(false),
        }
    }

    fn digest_head(&mut self) {
        // A head is read again only when a line has ended since, or while it may not be one at all.
        let line_ended = self.inbox[self.looked..].contains(&b'\n');
        self.looked = self.inbox.len();
        if !line_ended && self.inbox.len() > 64 && self.inbox.len() < HEAD_MAX {
            return;
        }
        let reading = match self.scheme {
            Some(scheme) => head::read_for(&self.inbox, scheme),
            None => head::read(&self.inbox),
        };
        match reading {
            Reading::Incomplete if self.inbox.len() >= HEAD_MAX => self.broken(TOO_LONG),
            Reading::Incomplete => {}
            Reading::Malformed(why) => self.broken(why),
            Reading::Complete(head) => {
                let upgrades = match self.upgrades {
                    Upgrades::WebSocket => head.asks_for_websocket(),
                    Upgrades::Any => head.asks_for_upgrade(),
                };
                if upgrades && head.framing != Framing::Nothing {
                    return self.broken("an upgrade with a body");
                }
                self.outbox.extend(self.inbox.drain(..head.length));
                self.looked = 0;
                self.deadline = None;
                self.heads += 1;
                self.state = match head.framing {
                    Framing::Nothing if upgrades => State::Undecided,
                    Framing::Nothing => State::Head,
                    Framing::Length(_) | Framing::Chunked => State::Body(Body::new(head.framing)),
                };
            }
        }
    }
}

impl<S> Strict<S> {
    /// Whether a head that has begun is late; else wakes the task when it will be.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(limit) = self.head_time else {
            return false;
        };
        if !matches!(self.state, State::Head) || self.inbox.is_empty() {
            self.deadline = None;
            return false;
        }
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        deadline.as_mut().poll(cx).is_ready()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Strict<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.at < this.outbox.len() {
                let rest = &this.outbox[this.at..];
                let length = rest.len().min(buf.remaining());
                buf.put_slice(&rest[..length]);
                this.at += length;
                if this.at == this.outbox.len() {
                    this.outbox.clear();
                    this.at = 0;
                }
                return Poll::Ready(Ok(()));
            }
            if matches!(this.state, State::Undecided)
                && let Some(accepted) = this.notes.poll_upgrade(cx)
            {
                this.looked = 0;
                this.state = if accepted { State::Raw } else { State::Head };
            }
            if this.digest()? {
                continue;
            }
            if this.is_late(cx) {
                this.broken(TOO_SLOW);
                continue;
            }
            match this.state {
                State::Raw => return Pin::new(&mut this.stream).poll_read(cx, buf),
                // The stand-in closes the connection; nothing is read until then.
                State::Broken => return Poll::Pending,
                State::Undecided if this.inbox.len() >= HEAD_MAX => return Poll::Pending,
                State::Head | State::Body(_) | State::Undecided => {}
            }
            if this.ended {
                let hidden = match this.state {
                    State::Head => this.hides_end && !this.notes.poll_answers(this.heads, cx),
                    State::Undecided => this.hides_end,
                    State::Body(_) | State::Raw | State::Broken => false,
                };
                return if hidden {
                    Poll::Pending
                } else {
                    Poll::Ready(Ok(()))
                };
            }
            let mut chunk = [0; CHUNK];
            let mut read = ReadBuf::new(&mut chunk);
            std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            this.ended = read.filled().is_empty();
            this.inbox.extend_from_slice(read.filled());
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Strict<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn passed(sent: &[u8]) -> (Vec<u8>, Arc<Notes>) {
        let notes = Arc::new(Notes::default());
        let mut out = Vec::new();
        let (mut client, inside) = tokio::io::duplex(1 << 16);
        let mut strict = Strict::new(inside, Arc::clone(&notes));
        client.write_all(sent).await.expect("written");
        drop(client);
        let reading = async { while matches!(strict.read_buf(&mut out).await, Ok(1..)) {} };
        let _elapsed = tokio::time::timeout(Duration::from_secs(1), reading).await;
        (out, notes)
    }

    #[tokio::test(start_paused = true)]
    async fn well_framed_requests_pass_one_after_another() {
        let sent = b"POST /a HTTP/1.1\r\nHost: ok.test\r\nContent-Length: 2\r\n\r\nhiGET /b HTTP/1.1\r\nHost: ok.test\r\n\r\n";
        let (out, notes) = passed(sent).await;
        assert_eq!(out, sent);
        assert_eq!(notes.broken(2), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_two_parsers_read_in_two_ways_never_passes() {
        for (ordinal, sent) in [
            (0, &b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n"[..]),
            (0, b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            (0, b"GET / HTTP/1.1\nHost: a.test\n\n"),
            (0, b"GET / HTTP/1.1\r\nHost: a.test\r\n folded\r\n\r\n"),
            (1, b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\nGET / HTTP/1.1\r\nHost : a.test\r\n\r\n"),
        ] {
            let (out, notes) = passed(sent).await;
            assert!(out.ends_with(STAND_IN), "{}", String::from_utf8_lossy(&out));
            assert!(notes.broken(ordinal).is_some());
        }
        let (out, notes) = passed(
            b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        )
        .await;
        assert!(
            !out.windows(3).any(|part| part == b"0\r\n"),
            "the broken body ended well"
        );
        assert_eq!(notes.broken(0), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_and_silence_before_it_has_none() {
        let notes = Arc::new(Notes::default());
        let (mut client, inside) = tokio::io::duplex(1 << 16);
        let mut strict = Strict::new(inside, Arc::clone(&notes)).with_head_time(Duration::from_secs(10));
        let request = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
        let writing = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            client.write_all(request).await.expect("written");
            tokio::time::sleep(Duration::from_secs(60)).await;
            for byte in request {
                client.write_all(&[*byte]).await.expect("written");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let mut out = Vec::new();
        let reading = async {
            while !out.ends_with(STAND_IN) {
                strict.read_buf(&mut out).await.expect("read");
            }
        };
        tokio::select! {
            () = writing => panic!("the head was waited for to its end"),
            () = reading => {}
        }
        assert_eq!(out, [request, STAND_IN].concat());
        assert_eq!(notes.broken(1), Some(TOO_SLOW));
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_half_is_seen_when_the_answers_have_ended() {
        let notes = Arc::new(Notes::default());
        let (mut client, inside) = tokio::io::duplex(1 << 16);
        let mut strict = Strict::new(inside, Arc::clone(&notes)).with_half_close();
        let request = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
        client
            .write_all(&[&request[..], request].concat())
            .await
            .expect("written");
        client.shutdown().await.expect("closed");
        let mut out = vec![0; 2 * request.len()];
        strict.read_exact(&mut out).await.expect("both");
        for _ in 0..2 {
            let reading = tokio::time::timeout(Duration::from_secs(5), strict.read(&mut out));
            assert!(reading.await.is_err(), "the end was seen");
            notes.answer_ended();
        }
        assert_eq!(strict.read(&mut out).await.expect("the end"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn another_protocol_begins_only_when_it_was_agreed() {
        let head = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        for accepted in [true, false] {
            let notes = Arc::new(Notes::default());
            let (mut client, inside) = tokio::io::duplex(1 << 16);
            let mut strict = Strict::new(inside, Arc::clone(&notes));
            client.write_all(head).await.expect("written");
            client.write_all(b"\x81\x00 raw\n").await.expect("written");
            let mut out = Vec::new();
            let reading = async { while matches!(strict.read_buf(&mut out).await, Ok(1..)) {} };
            let _elapsed = tokio::time::timeout(Duration::from_secs(1), reading).await;
            assert_eq!(out, head);
            notes.settle_upgrade(accepted);
            out.clear();
            strict.read_buf(&mut out).await.expect("read");
            assert_eq!(
                out.as_slice(),
                if accepted { b"\x81\x00 raw\n" } else { STAND_IN }
            );
        }
    }
}
