//! Making inputs into what targets need: choices, and streams that arrive in pieces.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Choices, made by the bytes of an input; 0 when there are no more.
pub(crate) struct Choices<'a>(pub(crate) &'a [u8]);

impl Choices<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub(crate) fn half(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// Up to `limit` things.
    pub(crate) fn some<T>(&mut self, limit: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.below(limit + 1);
        (0..count).map(|_| make(self)).collect()
    }
}

/// Sizes of pieces in which bytes arrive, different ones for each seed and all of them small enough to matter.
pub(crate) struct Sizes(u64);

impl Sizes {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let [low, kind, ..] = (mixed ^ mixed >> 27).to_le_bytes();
        // Single bytes often: that is where state is kept.
        if kind & 1 == 0 { 1 } else { usize::from(low) + 1 }
    }

    /// The pieces of some bytes.
    pub(crate) fn cut(mut self, mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(self.next().min(bytes.len()));
            pieces.push(piece);
            bytes = rest;
        }
        pieces
    }
}

/// A connection on which these bytes arrive in pieces, and then its end; what is written is thrown away.
pub(crate) struct Arriving<'a> {
    bytes: &'a [u8],
    sizes: Sizes,
}

impl<'a> Arriving<'a> {
    pub(crate) fn new(bytes: &'a [u8], sizes: Sizes) -> Self {
        Self { bytes, sizes }
    }
}

impl AsyncRead for Arriving<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.sizes.next().min(self.bytes.len()).min(buf.remaining());
        let (piece, rest) = self.bytes.split_at(length);
        buf.put_slice(piece);
        self.bytes = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Arriving<'_> {
    fn poll_write(self: Pin<&mut Self>, _cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs something to its end; what it waits for must come by itself.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// Checks that a reader which is asked again with more bytes never takes back what it said: `read` of each beginning
/// of the bytes is nothing or the last answer. Of long inputs some beginnings are left out.
pub(crate) fn says_the_same_of_every_beginning<T: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Option<T>,
) -> Option<T> {
    let whole = read(bytes);
    let step = bytes.len() / 256 + 1;
    let mut said = None;
    for end in (0..bytes.len()).step_by(step) {
        let now = read(&bytes[..end]);
        assert!(now == said || said.is_none(), "{said:?} became {now:?} at {end}");
        said = now;
    }
    assert!(
        said.is_none() || said == whole,
        "{said:?} became {whole:?} at the end"
    );
    whole
}
