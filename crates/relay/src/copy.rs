//! Two-way streaming copy with half-close, an idle limit, byte counts and a way to be cut.
//!
//! Owns: moving bytes between two streams until both directions ended or a limit was hit. Never looks at
//! the bytes, never buffers more than one chunk per direction, so that a slow reader slows its writer.

use std::{
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use crate::allowance::Allowance;

/// Bytes moved at once, per direction.
pub const CHUNK: usize = 16 * 1024;

/// Bytes moved so far. Shared with the caller, so that the numbers are right however the copy ended.
#[derive(Debug, Default)]
pub struct Traffic {
    up: AtomicU64,
    down: AtomicU64,
    /// What may still go up; none: everything.
    allowance: Option<Arc<Allowance>>,
}

impl Traffic {
    /// Traffic of which no more goes up than `allowance` has.
    pub fn within(allowance: Arc<Allowance>) -> Self {
        Self {
            allowance: Some(allowance),
            ..Self::default()
        }
    }

    /// Takes so many bytes of what may go up, for the caller itself to send and then to count with
    /// [`Traffic::add_up`]. False: they may not go.
    #[must_use]
    pub fn may_send(&self, bytes: usize) -> bool {
        self.allowance().is_none_or(|allowance| allowance.take(bytes))
    }

    pub(crate) fn allowance(&self) -> Option<&Allowance> {
        self.allowance.as_deref()
    }

    /// Bytes from the near side to the far side.
    pub fn up(&self) -> u64 {
        self.up.load(Ordering::Relaxed)
    }

    /// Bytes from the far side to the near side.
    pub fn down(&self) -> u64 {
        self.down.load(Ordering::Relaxed)
    }

    pub(crate) fn up_counter(&self) -> &AtomicU64 {
        &self.up
    }

    pub(crate) fn down_counter(&self) -> &AtomicU64 {
        &self.down
    }

    /// Counts bytes that the caller itself sent to the far side, for example a sniffed beginning.
    pub fn add_up(&self, bytes: usize) {
        // usize is at most 64 bits wide on every supported target.
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes that the caller itself sent to the near side.
    pub fn add_down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// When something last moved, for limits on silence.
#[derive(Debug)]
pub struct Activity {
    began: Instant,
    /// Milliseconds after `began`.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            last: AtomicU64::new(0),
        }
    }
}

impl Activity {
    /// Something moved.
    pub fn touch(&self) {
        let passed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(passed, Ordering::Relaxed);
    }

    /// How long nothing has moved.
    pub fn since(&self) -> Duration {
        let last = self.began + Duration::from_millis(self.last.load(Ordering::Relaxed));
        Instant::now().saturating_duration_since(last)
    }

    /// Waits until nothing has moved for `limit`.
    pub async fn silence(&self, limit: Duration) {
        loop {
            let deadline = self.began + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

/// Why a copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides closed in their own time.
    Closed,
    /// Nothing moved in either direction for the idle limit.
    Idle,
    /// The near side's connection failed.
    NearFailed,
    /// The far side's connection failed.
    FarFailed,
    /// More would have gone up than may.
    Over,
}

/// Copies both ways between `near` and `far` until both directions have ended, one of them failed, or
/// nothing moved for `idle`. The end of input on one side is passed on as the end of output on the other,
/// while the opposite direction goes on.
///
/// Dropping the future stops the copy; `traffic` then still holds what was moved.
pub async fn both_ways<N, F>(near: N, far: F, idle: Duration, traffic: &Traffic) -> End
where
    N: AsyncRead + AsyncWrite + Unpin,
    F: AsyncRead + AsyncWrite + Unpin,
{
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let active = Activity::default();

    let up = one_way(
        &mut near_read,
        &mut far_write,
        &traffic.up,
        &active,
        traffic.allowance(),
    );
    let down = one_way(&mut far_read, &mut near_write, &traffic.down, &active, None);
    until_both_end(up, down, &active, idle).await
}

/// Drives both directions until both have ended, one failed, or nothing moved for `idle`.
pub(crate) async fn until_both_end(
    up: impl Future<Output = Result<(), Side>>,
    down: impl Future<Output = Result<(), Side>>,
    active: &Activity,
    idle: Duration,
) -> End {
    let up = async {
        up.await.map_err(|side| match side {
            Side::Reading => End::NearFailed,
            Side::Writing => End::FarFailed,
            Side::Over => End::Over,
        })
    };
    let down = async {
        down.await.map_err(|side| match side {
            Side::Reading => End::FarFailed,
            Side::Writing => End::NearFailed,
            Side::Over => End::Over,
        })
    };
    let both = pin!(async { tokio::try_join!(up, down) });
    tokio::select! {
        ended = both => match ended {
            Ok(((), ())) => End::Closed,
            Err(end) => end,
        },
        () = active.silence(idle) => End::Idle,
    }
}

/// Where a direction failed.
pub(crate) enum Side {
    Reading,
    Writing,
    /// Nowhere: what was read may not go on.
    Over,
}

/// Takes what is about to be written, where that is limited.
pub(crate) fn take(allowance: Option<&Allowance>, bytes: usize) -> Result<(), Side> {
    if allowance.is_none_or(|allowance| allowance.take(bytes)) {
        Ok(())
    } else {
        Err(Side::Over)
    }
}

async fn one_way<R, W>(
    from: &mut R,
    to: &mut W,
    moved: &AtomicU64,
    active: &Activity,
    allowance: Option<&Allowance>,
) -> Result<(), Side>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut chunk = vec![0u8; CHUNK];
    loop {
        let length = from.read(&mut chunk).await.map_err(|_error| Side::Reading)?;
        active.touch();
        if length == 0 {
            // A peer that is gone already cannot be told that no more is coming: not a failure of the copy.
            return match to.shutdown().await {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                Err(_) => Err(Side::Writing),
            };
        }
        take(allowance, length)?;
        let mut rest = &chunk[..length];
        while !rest.is_empty() {
            // Written piece by piece, so that slow progress counts as progress.
            let written = to.write(rest).await.map_err(|_error| Side::Writing)?;
            if written == 0 {
                return Err(Side::Writing);
            }
            active.touch();
            moved.fetch_add(written as u64, Ordering::Relaxed);
            rest = &rest[written..];
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::DuplexStream, task::JoinHandle};

    use super::*;

    struct Copying {
        near: DuplexStream,
        far: DuplexStream,
        ended: JoinHandle<(End, u64, u64)>,
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this crate lies below the one with named tasks"
    )]
    fn copying(idle: Duration) -> Copying {
        let (near, near_inside) = tokio::io::duplex(1024);
        let (far, far_inside) = tokio::io::duplex(1024);
        let ended = tokio::spawn(async move {
            let traffic = Traffic::default();
            let end = both_ways(near_inside, far_inside, idle, &traffic).await;
            (end, traffic.up(), traffic.down())
        });
        Copying { near, far, ended }
    }

    #[tokio::test]
    async fn one_direction_goes_on_after_the_other_has_ended() {
        let mut copying = copying(Duration::from_secs(60));
        copying.near.write_all(b"question").await.expect("written");
        copying.near.shutdown().await.expect("closed");
        let mut question = Vec::new();
        copying.far.read_to_end(&mut question).await.expect("read");
        assert_eq!(question, b"question");

        copying.far.write_all(&[7; 100_000][..10]).await.expect("written");
        copying.far.shutdown().await.expect("closed");
        let mut answer = Vec::new();
        copying.near.read_to_end(&mut answer).await.expect("read");
        assert_eq!(answer, [7; 10]);
        assert_eq!(copying.ended.await.expect("joined"), (End::Closed, 8, 10));
    }

    #[tokio::test]
    async fn no_more_goes_up_than_may_and_down_is_not_counted() {
        let allowance = Arc::new(Allowance::within(Arc::new(AtomicU64::new(10))));
        let (mut near, near_inside) = tokio::io::duplex(1024);
        let (mut far, far_inside) = tokio::io::duplex(1024);
        let traffic = Traffic::within(Arc::clone(&allowance));
        let copying = both_ways(near_inside, far_inside, Duration::from_secs(60), &traffic);
        let talking = async {
            near.write_all(b"0123456").await.expect("written");
            let mut seen = [0; 7];
            far.read_exact(&mut seen).await.expect("what may go, goes");
            far.write_all(&[7; 100]).await.expect("written");
            near.read_exact(&mut [0; 100]).await.expect("answered");
            near.write_all(b"789a").await.expect("written");
            let mut rest = Vec::new();
            far.read_to_end(&mut rest).await.expect("closed");
            assert_eq!(rest, b"", "beyond the limit");
        };
        let (end, ()) = tokio::join!(copying, talking);
        assert_eq!((end, traffic.up(), traffic.down()), (End::Over, 7, 100));
        assert_eq!(allowance.used(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_the_copy_and_traffic_keeps_it_alive() {
        let mut copying = copying(Duration::from_secs(10));
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(6)).await;
            copying.near.write_all(b"x").await.expect("still open");
            let mut byte = [0];
            copying.far.read_exact(&mut byte).await.expect("still open");
        }
        let before = Instant::now();
        let (end, up, down) = copying.ended.await.expect("joined");
        assert_eq!((end, up, down), (End::Idle, 3, 0));
        assert!(before.elapsed() >= Duration::from_secs(9));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_does_not_read_stops_its_writer_and_then_the_copy() {
        let mut copying = copying(Duration::from_secs(10));
        let big = vec![1u8; 1 << 20];
        let sending = tokio::time::timeout(Duration::from_secs(5), copying.near.write_all(&big)).await;
        assert!(sending.is_err(), "a megabyte went into a copy that nobody reads");
        let (end, up, _) = copying.ended.await.expect("joined");
        assert_eq!((end, up), (End::Idle, 1024));
    }

    #[tokio::test]
    async fn the_side_that_failed_is_named() {
        let copying = copying(Duration::from_secs(60));
        let Copying { mut near, far, ended } = copying;
        drop(far);
        // The far side's end is passed on; writing to it then fails.
        near.write_all(b"lost").await.expect("buffered");
        let (end, up, down) = ended.await.expect("joined");
        assert_eq!((end, up, down), (End::FarFailed, 0, 0));
    }
}
