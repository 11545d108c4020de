//! Processes that outlive the connection that started them: as many as are bounded, each with a bounded part of its
//! output. They end when they like, when somebody says so, or with the sandbox.

mod follow;
mod ring;

use std::{
    io,
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use sandgate_api::agent::{
    AgentErrorCode, Command, FrameKind, MAX_FRAME, ProcessEnd, ProcessStatus, Reply, Start, TerminalSize,
};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    net::{TcpStream, unix::pipe},
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    children::{Children, Ended, Leader},
    claim::Owner,
    exec::{self, NotStarted},
    init,
    mark::Mark,
    output::Output,
    wire::{self, Refusal},
};

pub(crate) use follow::{Wish, follow};
use ring::Ring;

/// Processes that run, and ended ones that are remembered.
const MAX_PROCESSES: usize = 32;
/// Bytes taken from a pipe at once.
const PART: usize = 16 * 1024;
/// What is read of a terminal after its process has ended: others may go on writing to it.
const LAST_WORDS: usize = 64 * 1024;
/// How long a process may leave alone what is written to it.
const STALL: Duration = Duration::from_secs(10);
/// Characters of a command that are shown.
const SHOWN: usize = 200;
/// What a terminal's programs take it for, unless they are told otherwise.
const TERM: (&str, &str) = ("TERM", "xterm-256color");
/// What a terminal makes the end of the input of: Ctrl-D.
const END_OF_INPUT: u8 = 4;

/// The sandbox's processes.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    /// In the order in which they were started.
    all: Vec<Arc<Process>>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Process {
    id: String,
    pid: i32,
    shown: String,
    has_terminal: bool,
    attended: bool,
    started_ms: i64,
    leader: Leader,
    tasks: Tasks,
    /// Where it reads; none when that was closed, or it has ended.
    input: tokio::sync::Mutex<Option<pipe::Sender>>,
    /// The terminal's other side, to be resized.
    terminal: Mutex<Option<OwnedFd>>,
    ring: Mutex<Ring>,
    ended: Mutex<Option<ProcessEnd>>,
    followers: Mutex<usize>,
    /// Written to with every change of `ring` and `ended`.
    changed: watch::Sender<()>,
}

/// Writes what follows as data frames to a process's input, and closes it after them.
pub(crate) async fn input(
    stream: &mut TcpStream,
    process: &Process,
    size: u64,
    close: bool,
) -> io::Result<Result<(), Refusal>> {
    let invalid = |message: &str| Ok(Err(Refusal::new(AgentErrorCode::Invalid, message)));
    if !process.has_input().await {
        return invalid("the process reads nothing any more");
    }
    let (mut left, mut taken) = (size, 0);
    while left > 0 {
        let (kind, part) = wire::receive(stream, MAX_FRAME).await?;
        let length = u64::try_from(part.len()).unwrap_or(u64::MAX);
        if kind != FrameKind::Data || length == 0 || length > left {
            return invalid("more or less than the announced bytes");
        }
        // What comes after something that was not taken is read and forgotten, so that the answer can be heard.
        if taken + left == size {
            taken += u64::try_from(process.write(&part).await).unwrap_or(u64::MAX);
        }
        left -= length;
    }
    if close && taken == size {
        process.close_input().await;
    }
    wire::reply(stream, &Reply::Written { size: taken }).await?;
    Ok(Ok(()))
}

/// Our ends of what a process reads and writes.
struct Ends {
    input: OwnedFd,
    outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
}

impl Processes {
    /// Starts a process.
    pub(crate) fn start(
        &self,
        start: &Start,
        owner: &Owner,
        children: &Children,
        tasks: &Tasks,
    ) -> Result<Reply, Refusal> {
        let mut table = lock(&self.table);
        if table.all.len() >= MAX_PROCESSES {
            let ended = table.all.iter().position(|process| process.ended().is_some());
            let Some(oldest) = ended else {
                let message = format!("{MAX_PROCESSES} processes run already, and that is as many as may");
                return Err(Refusal::new(AgentErrorCode::Invalid, message));
            };
            drop(table.all.remove(oldest));
        }
        table.last += 1;
        let id = format!("proc-{}", table.last);
        let (process, ends, ended) = launch(id, start, owner, children, tasks)?;
        let process = Arc::new(process);
        tasks.spawn("process", pump(Arc::clone(&process), ends, ended));
        let reply = Reply::Started {
            process_id: process.id.clone(),
            pid: process.pid,
        };
        table.all.push(process);
        Ok(reply)
    }

    /// All of them.
    pub(crate) fn list(&self) -> Reply {
        let table = lock(&self.table);
        Reply::Processes {
            processes: table.all.iter().map(|process| process.status()).collect(),
        }
    }

    /// The one with this id, or with this number inside the sandbox.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Process>, Refusal> {
        let pid = name.parse::<i32>().ok();
        let table = lock(&self.table);
        let mut latest_first = table.all.iter().rev();
        latest_first
            .find(|process| process.id == name || Some(process.pid) == pid)
            .cloned()
            .ok_or_else(|| Refusal::new(AgentErrorCode::NotFound, "there is no such process"))
    }

    /// Ends a process with everything it started, and forgets it.
    pub(crate) fn remove(&self, name: &str) -> Result<Reply, Refusal> {
        let process = self.find(name)?;
        process.leader.kill_all(&process.tasks);
        lock(&self.table).all.retain(|other| other.id != process.id);
        Ok(Reply::Done)
    }
}

impl Process {
    /// Writes to its standard input. Answers how many bytes it took: fewer when it reads nothing for a while.
    pub(crate) async fn write(&self, bytes: &[u8]) -> usize {
        let mut input = self.input.lock().await;
        let mut written = 0;
        while written < bytes.len() {
            let Some(descriptor) = input.as_ref() else {
                return written;
            };
            match timeout(STALL, descriptor.writable()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return written,
            }
            match descriptor.try_write(&bytes[written..]) {
                Ok(wrote) => written += wrote,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_closed) => *input = None,
            }
        }
        written
    }

    /// Its input has come to an end.
    pub(crate) async fn close_input(&self) {
        if self.has_terminal {
            let _taken = self.write(&[END_OF_INPUT]).await;
        } else {
            *self.input.lock().await = None;
        }
    }

    /// Whether its input takes anything yet.
    pub(crate) async fn has_input(&self) -> bool {
        self.input.lock().await.is_some()
    }

    /// Sends a signal to its process group.
    pub(crate) fn signal(&self, signal: i32) -> Result<Reply, Refusal> {
        let invalid = |message: &str| Refusal::new(AgentErrorCode::Invalid, message);
        let signal = Signal::from_named_raw(signal).ok_or_else(|| invalid("there is no such signal"))?;
        if !self.leader.signal_group(signal) {
            return Err(invalid("the process has ended"));
        }
        Ok(Reply::Done)
    }

    /// Gives its terminal another size, if it has one.
    pub(crate) fn give_size(&self, size: TerminalSize) -> Result<Reply, Refusal> {
        let invalid = |message: String| Refusal::new(AgentErrorCode::Invalid, message);
        if !self.has_terminal {
            return Err(invalid("the process has no terminal".to_owned()));
        }
        self.resize(size).map_err(|error| invalid(error.to_string()))?;
        Ok(Reply::Done)
    }

    fn resize(&self, size: TerminalSize) -> io::Result<()> {
        match &*lock(&self.terminal) {
            Some(terminal) => init::resize(terminal, size),
            None => Ok(()),
        }
    }

    /// Position of the next byte that it will write.
    pub(crate) fn next_position(&self) -> u64 {
        self.ring().next()
    }

    fn status(&self) -> ProcessStatus {
        let (first, next) = {
            let ring = self.ring();
            (ring.first(), ring.next())
        };
        ProcessStatus {
            process_id: self.id.clone(),
            pid: self.pid,
            command: self.shown.clone(),
            terminal: self.has_terminal,
            attended: self.attended,
            started_ms: self.started_ms,
            ended: self.ended(),
            first,
            next,
        }
    }

    fn push(&self, kind: FrameKind, bytes: &[u8]) {
        self.ring().push(kind, bytes);
        self.changed.send_replace(());
    }

    async fn end(&self, ended: Ended) {
        *self.input.lock().await = None;
        drop(lock(&self.terminal).take());
        *lock(&self.ended) = Some(ProcessEnd {
            exit_code: ended.exit_code(),
            at_ms: now_ms(),
        });
        self.changed.send_replace(());
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        lock(&self.ring)
    }

    fn ended(&self) -> Option<ProcessEnd> {
        *lock(&self.ended)
    }

    fn followers(&self) -> MutexGuard<'_, usize> {
        lock(&self.followers)
    }

    fn news(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

fn launch(
    id: String,
    start: &Start,
    owner: &Owner,
    children: &Children,
    tasks: &Tasks,
) -> Result<(Process, Ends, oneshot::Receiver<Ended>), Refusal> {
    let mut environment = owner.environment();
    if start.terminal.is_some() {
        let (name, value) = TERM;
        environment
            .entry(name.to_owned())
            .or_insert_with(|| value.to_owned());
    }
    let internal = |error: &io::Error| {
        Refusal::new(
            AgentErrorCode::Internal,
            format!("the process cannot be connected: {error}"),
        )
    };
    let mut process = exec::command(&start.exec, environment)?;
    let mark = Mark::fresh();
    init::own_session(&mut process, mark, start.terminal.is_some());
    let terminal = start
        .terminal
        .map(init::open_terminal)
        .transpose()
        .map_err(|error| internal(&error))?;
    match &terminal {
        Some((_, inside)) => {
            let end = || {
                inside
                    .try_clone()
                    .map(Stdio::from)
                    .map_err(|error| internal(&error))
            };
            process.stdin(end()?).stdout(end()?).stderr(end()?);
        }
        None => {
            process.stdin(Stdio::piped());
        }
    }
    let mut child = process
        .spawn()
        .map_err(|error| match exec::not_started(&start.exec, &error) {
            NotStarted::Refused(refusal) => refusal,
            NotStarted::Failed { message, .. } => {
                Refusal::new(AgentErrorCode::Invalid, message.trim_end().to_owned())
            }
        })?;
    let (leader, ended) = children.adopt(&child, mark);
    // The ends inside are the child's alone from here on, or a terminal would never end.
    drop(process);
    exec::prefer_as_victim(&leader);
    let ends = match terminal {
        Some((outside, _inside)) => terminal_ends(outside),
        None => pipe_ends(&mut child),
    };
    let ends = ends.and_then(|ends| {
        rustix::io::ioctl_fionbio(&ends.input, true)?;
        // A terminal is no pipe, and is written to in the same way.
        let input = pipe::Sender::from_owned_fd_unchecked(ends.input.try_clone()?)?;
        Ok((ends, input))
    });
    let (mut ends, input) = ends.map_err(|error| {
        leader.kill_group();
        internal(&error)
    })?;
    let process = Process {
        id,
        pid: leader.process(),
        shown: shown(&start.exec.command),
        has_terminal: start.terminal.is_some(),
        attended: start.attended,
        started_ms: now_ms(),
        leader,
        tasks: tasks.clone(),
        input: tokio::sync::Mutex::new(Some(input)),
        terminal: Mutex::new(ends.terminal.take()),
        ring: Mutex::default(),
        ended: Mutex::default(),
        followers: Mutex::default(),
        changed: watch::Sender::new(()),
    };
    Ok((process, ends, ended))
}

fn terminal_ends(outside: OwnedFd) -> io::Result<Ends> {
    Ok(Ends {
        input: outside.try_clone()?,
        outputs: vec![Output::new(FrameKind::Stdout, outside.try_clone()?)?],
        terminal: Some(outside),
    })
}

fn pipe_ends(child: &mut std::process::Child) -> io::Result<Ends> {
    let missing = || io::Error::other("no pipe");
    let stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    Ok(Ends {
        input: stdin.into(),
        outputs: vec![
            Output::new(FrameKind::Stdout, stdout.into())?,
            Output::new(FrameKind::Stderr, stderr.into())?,
        ],
        terminal: None,
    })
}

/// Moves output into the ring until the process ends, and what it wrote before that.
async fn pump(process: Arc<Process>, ends: Ends, mut ended: oneshot::Receiver<Ended>) {
    let Ends {
        input, mut outputs, ..
    } = ends;
    // The process has its own.
    drop(input);
    let mut buffer = vec![0; PART];
    let ended = loop {
        let index = tokio::select! {
            ended = &mut ended => break ended.unwrap_or(Ended::Killed(9)),
            () = readable(outputs.first()) => 0,
            () = readable(outputs.get(1)) => 1,
        };
        let read = outputs[index].read(&mut buffer);
        process.push(outputs[index].kind, &buffer[..read]);
    };
    for output in &outputs {
        // As with a command: what came before the end, not what others add.
        let mut waiting = if process.has_terminal {
            LAST_WORDS
        } else {
            output.waiting()
        };
        while waiting > 0 {
            let most = waiting.min(buffer.len());
            let read = output.take(&mut buffer[..most]);
            if read == 0 {
                break;
            }
            waiting -= read;
            process.push(output.kind, &buffer[..read]);
        }
    }
    process.end(ended).await;
    if !process.has_terminal {
        for output in outputs {
            output.keep_empty(&process.tasks);
        }
    }
}

async fn readable(output: Option<&Output>) {
    match output {
        Some(output) => output.readable().await,
        None => std::future::pending().await,
    }
}

fn shown(command: &Command) -> String {
    match command {
        Command::Shell(line) => line.chars().take(SHOWN).collect(),
        Command::Argv(argv) => argv.join(" ").chars().take(SHOWN).collect(),
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
