//! One connection that follows a process: its output from a position on, and what somebody types.

use std::{io, sync::Arc};

use sandgate_api::agent::{FrameKind, MAX_FRAME, Reply, TerminalSize};
use tokio::net::{
    TcpStream,
    tcp::{OwnedReadHalf, OwnedWriteHalf},
};

use super::Process;
use crate::wire;

/// Bytes of output in one frame.
const PART: usize = 64 * 1024;

/// What a follower wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    /// The position it has got to.
    pub(crate) since: u64,
    /// Also what is yet to come.
    pub(crate) wait: bool,
    /// It types.
    pub(crate) input: bool,
}

/// One of those who follow a process. An attended process ends with the last of them.
struct Follower<'a>(&'a Process);

impl<'a> Follower<'a> {
    fn of(process: &'a Process) -> Self {
        *process.followers() += 1;
        Self(process)
    }
}

impl Drop for Follower<'_> {
    fn drop(&mut self) {
        let left = {
            let mut followers = self.0.followers();
            *followers = followers.saturating_sub(1);
            *followers
        };
        if left == 0 && self.0.attended {
            self.0.leader.kill_all(&self.0.tasks);
        }
    }
}

/// Serves the connection until the process ends or the follower goes.
pub(crate) async fn follow(stream: TcpStream, process: Arc<Process>, wish: Wish) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let _follower = wish.wait.then(|| Follower::of(&process));
    tokio::select! {
        biased;
        received = receive(&mut reader, &process, wish.input) => received,
        sent = send(&mut writer, &process, wish) => sent,
    }
}

/// Takes what is typed. Ends with the connection.
async fn receive(reader: &mut OwnedReadHalf, process: &Process, input: bool) -> io::Result<()> {
    loop {
        let Some((kind, payload)) = wire::await_frame(reader, MAX_FRAME).await? else {
            return Ok(());
        };
        let breach = || io::Error::new(io::ErrorKind::InvalidData, "a follower that may not say this");
        match kind {
            FrameKind::Data if input => {
                if process.write(&payload).await < payload.len() {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the process reads nothing",
                    ));
                }
            }
            FrameKind::Json if input => {
                let size: TerminalSize = serde_json::from_slice(&payload).map_err(|_other| breach())?;
                process.resize(size)?;
            }
            FrameKind::Data | FrameKind::Json | FrameKind::Stdout | FrameKind::Stderr => return Err(breach()),
        }
    }
}

/// Sends the output. A follower that is too slow is told where it goes on; it never holds the process up.
async fn send(writer: &mut OwnedWriteHalf, process: &Process, wish: Wish) -> io::Result<()> {
    let mut news = process.news();
    let mut told = None;
    let mut position = wish.since;
    loop {
        news.mark_unchanged();
        // In this order: what it wrote is in the ring before its end is known.
        let ended = process.ended();
        let part = process.ring().read(position, PART);
        let from = part.as_ref().map_or(position, |(from, _, _)| *from);
        if told != Some(from) {
            wire::reply(writer, &Reply::Output { from }).await?;
            told = Some(from);
        }
        if let Some((from, kind, bytes)) = part {
            wire::send(writer, kind, &bytes).await?;
            position = from + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            told = Some(position);
            continue;
        }
        if let Some(end) = ended {
            let duration_ms = u64::try_from(end.at_ms - process.started_ms).unwrap_or(0);
            let exited = Reply::Exited {
                exit_code: end.exit_code,
                timed_out: false,
                duration_ms,
                changes: None,
            };
            return wire::reply(writer, &exited).await;
        }
        if !wish.wait {
            return wire::reply(writer, &Reply::Done).await;
        }
        if news.changed().await.is_err() {
            return Ok(());
        }
    }
}
