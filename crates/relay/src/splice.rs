//! The two-way copy of [`crate::copy`] between two TCP connections, of which bulk does not pass through this
//! process: splice(2) moves the kernel's pages from one socket into a pipe and on into the other.
//!
//! Owns: when that is worth it, and the pipes. A direction begins as an ordinary copy, because most flows are
//! short or chatty and a pipe costs two descriptors; it is spliced once it has filled chunk after chunk, and
//! gives its pipe back when it pauses. A pipe is empty before it is filled again, so that what is under way
//! stays bounded and a slow reader slows its writer.

use std::{
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use rustix::{
    net::Shutdown,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};
use tokio::{io::Interest, net::TcpStream};

use crate::{
    allowance::Allowance,
    copy::{self, Activity, CHUNK, End, Side, Traffic},
};

/// Full chunks in a row after which a direction counts as bulk.
const BULK_AFTER: u32 = 4;
/// A direction in which nothing comes for this long gives its pipe back. It then reads as usual, which also
/// takes it past what splice(2) does not take: urgent data.
const PAUSE: Duration = Duration::from_millis(200);
/// Bytes moved at once.
const ROOM: usize = 512 * 1024;
/// Pipes at once, in the whole process; who gets none goes on copying.
const PIPES: usize = 1024;

/// As [`copy::both_ways`].
pub async fn both_ways(near: &TcpStream, far: &TcpStream, idle: Duration, traffic: &Traffic) -> End {
    let active = Activity::default();
    let up = one_way(near, far, traffic.up_counter(), &active, traffic.allowance());
    let down = one_way(far, near, traffic.down_counter(), &active, None);
    copy::until_both_end(up, down, &active, idle).await
}

async fn one_way(
    from: &TcpStream,
    to: &TcpStream,
    moved: &AtomicU64,
    active: &Activity,
    allowance: Option<&Allowance>,
) -> Result<(), Side> {
    let mut chunk = vec![0_u8; CHUNK];
    let mut full = 0;
    let mut paused = false;
    loop {
        // After a pause once without asking tokio, which believes what splice(2) said: that nothing is there.
        let read = if std::mem::take(&mut paused) {
            rustix::io::read(from, &mut chunk).map_err(io::Error::from)
        } else {
            from.try_read(&mut chunk)
        };
        let length = match read {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                from.readable().await.map_err(|_error| Side::Reading)?;
                continue;
            }
            Err(_) => return Err(Side::Reading),
        };
        active.touch();
        if length == 0 {
            return close(to);
        }
        copy::take(allowance, length)?;
        write_all(to, &chunk[..length], moved, active).await?;
        full = if length == CHUNK { full + 1 } else { 0 };
        if full < BULK_AFTER {
            continue;
        }
        full = 0;
        let Some(pipe) = Pipe::take() else { continue };
        match stream(from, to, &pipe, moved, active, allowance).await? {
            Streamed::ToTheEnd => return close(to),
            Streamed::UntilAPause => paused = true,
        }
    }
}

enum Streamed {
    ToTheEnd,
    UntilAPause,
}

/// Moves what comes until it ends or pauses. The pipe is empty then.
async fn stream(
    from: &TcpStream,
    to: &TcpStream,
    pipe: &Pipe,
    moved: &AtomicU64,
    active: &Activity,
    allowance: Option<&Allowance>,
) -> Result<Streamed, Side> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    loop {
        let filling = || Ok(splice(from, None, &pipe.end, None, ROOM, flags)?);
        let mut rest = match from.try_io(Interest::READABLE, filling) {
            Ok(length) => length,
            // The pipe is empty, so it is the socket that has nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match tokio::time::timeout(PAUSE, from.readable()).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(_)) => return Err(Side::Reading),
                    Err(_elapsed) => return Ok(Streamed::UntilAPause),
                }
            }
            Err(_) => return Err(Side::Reading),
        };
        active.touch();
        if rest == 0 {
            return Ok(Streamed::ToTheEnd);
        }
        copy::take(allowance, rest)?;
        while rest > 0 {
            let draining = || Ok(splice(&pipe.begin, None, to, None, rest, flags)?);
            match to.try_io(Interest::WRITABLE, draining) {
                Ok(0) => return Err(Side::Writing),
                Ok(length) => {
                    active.touch();
                    moved.fetch_add(length as u64, Ordering::Relaxed);
                    rest = rest.saturating_sub(length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    to.writable().await.map_err(|_error| Side::Writing)?;
                }
                Err(_) => return Err(Side::Writing),
            }
        }
    }
}

async fn write_all(
    to: &TcpStream,
    mut bytes: &[u8],
    moved: &AtomicU64,
    active: &Activity,
) -> Result<(), Side> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(0) => return Err(Side::Writing),
            Ok(length) => {
                active.touch();
                moved.fetch_add(length as u64, Ordering::Relaxed);
                bytes = &bytes[length..];
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                to.writable().await.map_err(|_error| Side::Writing)?;
            }
            Err(_) => return Err(Side::Writing),
        }
    }
    Ok(())
}

/// Passes the end of input on.
fn close(to: &TcpStream) -> Result<(), Side> {
    match rustix::net::shutdown(to, Shutdown::Write) {
        // A peer that is gone already cannot be told that no more is coming: not a failure of the copy.
        Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
        Err(_) => Err(Side::Writing),
    }
}

/// A pipe, one of a limited number.
struct Pipe {
    /// Where bytes come out.
    begin: OwnedFd,
    /// Where bytes go in.
    end: OwnedFd,
    _counted: Counted,
}

impl Pipe {
    /// `None` when there are too many, or no descriptors are left.
    fn take() -> Option<Self> {
        let counted = Counted::take()?;
        let (begin, end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // One of the default size does as well, only slower.
        let _sized = fcntl_setpipe_size(&end, ROOM);
        Some(Self {
            begin,
            end,
            _counted: counted,
        })
    }
}

/// One of [`PIPES`].
struct Counted;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

impl Counted {
    fn take() -> Option<Self> {
        let more = |taken| (taken < PIPES).then_some(taken + 1);
        let taken = TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok().then_some(Self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinHandle,
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.expect("connected"), far.expect("accepted").0)
    }

    struct Copying {
        near: TcpStream,
        far: TcpStream,
        traffic: Arc<Traffic>,
        ended: JoinHandle<End>,
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this crate lies below the one with named tasks"
    )]
    async fn copying(idle: Duration) -> Copying {
        let ((near, near_inside), (far, far_inside)) = (pair().await, pair().await);
        let traffic = Arc::new(Traffic::default());
        let counted = Arc::clone(&traffic);
        let ended = tokio::spawn(async move { both_ways(&near_inside, &far_inside, idle, &counted).await });
        Copying {
            near,
            far,
            traffic,
            ended,
        }
    }

    /// Bytes in which a lost, doubled or moved piece shows.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|index| (index / 251 + index % 251).to_le_bytes()[0])
            .collect()
    }

    #[tokio::test]
    async fn bulk_arrives_as_it_was_sent_with_pauses_and_both_ways() {
        let Copying {
            near,
            far,
            traffic,
            ended,
        } = copying(Duration::from_secs(60)).await;
        let sent = pattern(20 << 20);
        let send = |mut stream: tokio::net::tcp::OwnedWriteHalf, sent: Vec<u8>| async move {
            let (first, rest) = sent.split_at(7 << 20);
            stream.write_all(first).await.expect("written");
            // Long enough for the pipe to be given back.
            tokio::time::sleep(PAUSE * 2).await;
            for piece in rest.chunks(100_003) {
                stream.write_all(piece).await.expect("written");
            }
            stream.shutdown().await.expect("closed");
        };
        let receive = |mut stream: tokio::net::tcp::OwnedReadHalf| async move {
            let mut received = Vec::new();
            stream.read_to_end(&mut received).await.expect("read");
            received
        };
        let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
        let ((), (), up, down) = tokio::join!(
            send(near_write, sent.clone()),
            send(far_write, sent.clone()),
            receive(far_read),
            receive(near_read),
        );
        assert!(up == sent, "bulk from near to far was changed on the way");
        assert!(down == sent, "bulk from far to near was changed on the way");
        assert_eq!(ended.await.expect("joined"), End::Closed);
        assert_eq!((traffic.up(), traffic.down()), (20 << 20, 20 << 20));
    }

    #[tokio::test]
    async fn one_direction_goes_on_after_the_other_has_ended() {
        let mut copying = copying(Duration::from_secs(60)).await;
        copying.near.write_all(b"question").await.expect("written");
        copying.near.shutdown().await.expect("closed");
        let mut question = Vec::new();
        copying.far.read_to_end(&mut question).await.expect("read");
        assert_eq!(question, b"question");
        let answer = pattern(1 << 20);
        copying.far.write_all(&answer).await.expect("written");
        copying.far.shutdown().await.expect("closed");
        let mut received = Vec::new();
        copying.near.read_to_end(&mut received).await.expect("read");
        assert!(received == answer, "the answer was changed on the way");
        assert_eq!(copying.ended.await.expect("joined"), End::Closed);
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_stops_its_writer_and_then_the_copy() {
        let mut copying = copying(Duration::from_millis(500)).await;
        let big = vec![1_u8; 64 << 20];
        let sending = tokio::time::timeout(Duration::from_secs(5), copying.near.write_all(&big)).await;
        assert!(
            !matches!(sending, Ok(Ok(()))),
            "64 MiB went into a copy that nobody reads"
        );
        assert_eq!(copying.ended.await.expect("joined"), End::Idle);
        assert!(copying.traffic.up() < 64 << 20);
    }

    #[tokio::test]
    async fn the_side_that_failed_is_named() {
        let copying = copying(Duration::from_secs(60)).await;
        let Copying {
            mut near, far, ended, ..
        } = copying;
        far.set_zero_linger().expect("set");
        drop(far);
        near.write_all(b"lost").await.ok();
        assert_eq!(ended.await.expect("joined"), End::FarFailed);
    }

    #[tokio::test]
    async fn bulk_stops_at_what_may_go_up() {
        let limit = 3 << 20;
        let allowance = Arc::new(Allowance::within(Arc::new(AtomicU64::new(limit))));
        let ((mut near, near_inside), (mut far, far_inside)) = (pair().await, pair().await);
        let traffic = Traffic::within(Arc::clone(&allowance));
        let sent = pattern(8 << 20);
        let copying = async {
            let end = both_ways(&near_inside, &far_inside, Duration::from_secs(60), &traffic).await;
            // As the flow's owner does: nobody takes this for an ordinary end.
            drop((near_inside, far_inside));
            end
        };
        let mut received = Vec::new();
        let (end, _reset, _cut) =
            tokio::join!(copying, near.write_all(&sent), far.read_to_end(&mut received));
        assert_eq!(end, End::Over);
        assert!(
            u64::try_from(received.len()).expect("few") <= limit,
            "{}",
            received.len()
        );
        assert!(sent.starts_with(&received), "changed on the way");
        assert!(traffic.up() <= limit && allowance.used() <= limit);
        assert!(traffic.up() > limit / 2, "{} of {limit}", traffic.up());
    }

    #[tokio::test]
    async fn urgent_data_does_not_stall_a_flow() {
        let mut copying = copying(Duration::from_secs(60)).await;
        let sent = pattern(4 << 20);
        let mut received = vec![0; sent.len()];
        let (written, read) = tokio::join!(
            copying.near.write_all(&sent),
            copying.far.read_exact(&mut received)
        );
        written.expect("written");
        read.expect("read");
        rustix::net::send(&copying.near, b"!", rustix::net::SendFlags::OOB).expect("sent");
        copying.near.write_all(b"after").await.expect("written");
        let mut after = [0; 5];
        let read = tokio::time::timeout(Duration::from_secs(5), copying.far.read_exact(&mut after)).await;
        read.expect("in time").expect("read");
        assert_eq!(&after, b"after");
    }

    #[test]
    fn pipes_are_counted_and_given_back() {
        let before = TAKEN.load(Ordering::Relaxed);
        let pipe = Pipe::take().expect("one of many");
        drop(pipe);
        // Other tests take and give back theirs meanwhile.
        assert!(TAKEN.load(Ordering::Relaxed) <= before + 64);
    }
}
