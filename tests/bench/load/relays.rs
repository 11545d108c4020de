//! One connection relayed over loopback in different manners: through a buffer of this process, through a pipe
//! (splice(2)), and within the kernel (a map of sockets). Nothing else of a proxy is in it.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use serde::{Deserialize, Serialize};

use super::sockmap;

const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a small message.
const MESSAGE: usize = 64;
const CHUNK: usize = 256 * 1024;

/// How bytes get from one socket into the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Manner {
    /// Read and written, so many bytes at once.
    Copied(usize),
    /// Moved through a pipe of so many bytes.
    Spliced(usize),
    /// Sent on by the kernel.
    Joined,
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Relay {
    /// How.
    pub(crate) manner: Manner,
    /// While counting, in milliseconds: of each of the two figures.
    pub(crate) count_ms: u64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Relayed {
    /// Bits a second, one way.
    pub(crate) bits: f64,
    /// Small messages there and back a second, one at a time.
    pub(crate) messages: f64,
}

struct Ends {
    near: TcpStream,
    far: TcpStream,
    relays: Vec<thread::JoinHandle<io::Result<()>>>,
    _joined: Option<(sockmap::Joined, TcpStream, TcpStream)>,
}

impl Relay {
    pub(super) fn measure(&self) -> Result<Relayed> {
        Ok(Relayed {
            messages: self.messages()?,
            bits: self.bits()?,
        })
    }

    fn ends(&self) -> Result<Ends> {
        let ((near, inner), (outer, far)) = (pair()?, pair()?);
        if self.manner == Manner::Joined {
            let joined = sockmap::join(inner.as_raw_fd(), outer.as_raw_fd())?;
            let (relays, _joined) = (Vec::new(), Some((joined, inner, outer)));
            return Ok(Ends {
                near,
                far,
                relays,
                _joined,
            });
        }
        let mut relays = Vec::new();
        for (from, to) in [(&inner, &outer), (&outer, &inner)] {
            let (from, to, manner) = (from.try_clone()?, to.try_clone()?, self.manner);
            relays.push(thread::spawn(move || one_way(from, to, manner)));
        }
        let _joined = None;
        Ok(Ends {
            near,
            far,
            relays,
            _joined,
        })
    }

    fn bits(&self) -> Result<f64> {
        let Ends {
            mut near,
            mut far,
            relays,
            _joined,
        } = self.ends()?;
        let (over, moved) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::clone(&over);
        let writer = thread::spawn(move || -> io::Result<()> {
            let chunk = vec![b'x'; CHUNK];
            while !stop.load(Ordering::Relaxed) {
                near.write_all(&chunk)?;
            }
            near.shutdown(Shutdown::Both)
        });
        let (stop, counted) = (Arc::clone(&over), Arc::clone(&moved));
        let reader = thread::spawn(move || -> io::Result<()> {
            let mut chunk = vec![0; CHUNK];
            loop {
                let read = far.read(&mut chunk)?;
                if read == 0 {
                    return Ok(());
                }
                counted.fetch_add(read as u64, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    return far.shutdown(Shutdown::Both);
                }
            }
        });
        thread::sleep(Duration::from_millis(self.count_ms / 4));
        let (began, before) = (Instant::now(), moved.load(Ordering::Relaxed));
        thread::sleep(Duration::from_millis(self.count_ms));
        // On a machine that is busy with something else nothing may have come yet.
        while moved.load(Ordering::Relaxed) == before && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
        let (took, count) = (began.elapsed(), moved.load(Ordering::Relaxed) - before);
        over.store(true, Ordering::Relaxed);
        // Ends that are closed while bytes are under way fail, and are done.
        drop(reader.join().map_err(|_panic| anyhow!("the reader died"))?);
        drop(writer.join().map_err(|_panic| anyhow!("the writer died"))?);
        end(relays)?;
        ensure!(count > 0, "nothing came");
        Ok(count as f64 * 8.0 / took.as_secs_f64())
    }

    fn messages(&self) -> Result<f64> {
        let Ends {
            mut near,
            mut far,
            relays,
            _joined,
        } = self.ends()?;
        let echo = thread::spawn(move || -> io::Result<()> {
            let mut message = [0; MESSAGE];
            loop {
                far.read_exact(&mut message)?;
                far.write_all(&message)?;
            }
        });
        let (began, mut count) = (Instant::now(), 0_u32);
        let mut message = [b'm'; MESSAGE];
        while count == 0 || began.elapsed() < Duration::from_millis(self.count_ms) {
            near.write_all(&message)?;
            near.read_exact(&mut message)
                .context("a message does not come back")?;
            count += 1;
        }
        let took = began.elapsed();
        near.shutdown(Shutdown::Both)?;
        drop(near);
        drop(_joined);
        drop(echo.join().map_err(|_panic| anyhow!("the echo died"))?);
        end(relays)?;
        Ok(f64::from(count) / took.as_secs_f64())
    }
}

fn end(relays: Vec<thread::JoinHandle<io::Result<()>>>) -> Result<()> {
    for relay in relays {
        drop(relay.join().map_err(|_panic| anyhow!("a relay died"))?);
    }
    Ok(())
}

fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    let (other, _) = listener.accept()?;
    for stream in [&one, &other] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((one, other))
}

fn one_way(mut from: TcpStream, mut to: TcpStream, manner: Manner) -> io::Result<()> {
    let moved = match manner {
        Manner::Copied(size) => {
            let mut chunk = vec![0; size];
            loop {
                match from.read(&mut chunk) {
                    Ok(0) => break Ok(()),
                    Ok(length) => {
                        if let Err(error) = to.write_all(&chunk[..length]) {
                            break Err(error);
                        }
                    }
                    Err(error) => break Err(error),
                }
            }
        }
        Manner::Spliced(size) => through_a_pipe(&from, &to, size),
        Manner::Joined => Ok(()),
    };
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
    moved
}

fn through_a_pipe(from: &TcpStream, to: &TcpStream, size: usize) -> io::Result<()> {
    let (begin, end) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&end, size)?;
    loop {
        let mut rest = splice(from, None, &end, None, size, SpliceFlags::MOVE)?;
        if rest == 0 {
            return Ok(());
        }
        while rest > 0 {
            rest -= splice(&begin, None, to, None, rest, SpliceFlags::MOVE)?;
        }
    }
}
