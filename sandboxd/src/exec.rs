//! Running one command for one connection.
//!
//! The command leads a session of its own. When its caller goes or its time is up, it is killed with everything it
//! started; otherwise what it left in the background goes on. Its output is sent as it comes, and read no faster than the caller
//! takes it. The answer follows the leader's end at once, whoever else still holds its pipes; what was written
//! before that end is sent, what comes later is read and thrown away, so that a server left in the background
//! does not die of its own log.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    os::fd::OwnedFd,
    pin::pin,
    process::{Command as Process, Stdio},
    time::Duration,
};

use sandgate_api::agent::{AgentErrorCode, Changes, Command, Exec, FrameKind, MAX_FRAME, Reply};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, sleep_until},
};

use crate::{
    changes::Snapshot,
    children::{Children, Ended, Leader},
    claim,
    files::{self, directory},
    init,
    mark::Mark,
    output::Output,
    wire::{self, Refusal},
};

/// Exit status of a command that ran out of time, as in coreutils' `timeout`.
const TIMED_OUT: i32 = 124;
/// Exit status of a program that cannot be run, as in a shell.
const CANNOT_RUN: i32 = 126;
/// Exit status of a program that does not exist, as in a shell.
const NOT_FOUND: i32 = 127;
/// Where commands run unless they say otherwise.
const DEFAULT_DIRECTORY: &str = "/workspace";
/// Bytes of output in one frame.
const PART: usize = 64 * 1024;
/// Added to a command's badness, so that the kernel kills it before this process when memory is short.
const OOM_SCORE: &str = "500";
/// After a timeout, how long the caller may take to fetch what is left.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// Why there is no running command.
pub(crate) enum NotStarted {
    /// The operation failed.
    Refused(Refusal),
    /// The command failed as it would in a shell.
    Failed { exit_code: i32, message: String },
}

struct Started {
    leader: Leader,
    ended: tokio::sync::oneshot::Receiver<Ended>,
    outputs: [Output; 2],
}

/// Runs the command and reports its output and end.
pub(crate) async fn serve(
    mut stream: TcpStream,
    exec: Exec,
    environment: BTreeMap<String, String>,
    children: &Children,
    tasks: &Tasks,
) -> io::Result<()> {
    let before = match exec.track.as_deref().map(files::checked).transpose() {
        Ok(None) => None,
        Ok(Some(directory)) => Some(Snapshot::take(&directory).await),
        Err(Refusal { code, message }) => {
            return wire::reply(&mut stream, &Reply::Error { code, message }).await;
        }
    };
    let begun = Instant::now();
    match start(&exec, environment, children) {
        Ok(started) => relay(stream, started, &exec, (begun, before), tasks).await,
        Err(NotStarted::Refused(Refusal { code, message })) => {
            wire::reply(&mut stream, &Reply::Error { code, message }).await
        }
        Err(NotStarted::Failed { exit_code, message }) => {
            wire::send(&mut stream, FrameKind::Stderr, message.as_bytes()).await?;
            wire::reply(
                &mut stream,
                &Reply::Exited {
                    exit_code,
                    timed_out: false,
                    duration_ms: 0,
                    changes: before.map(|_untouched| Changes::default()),
                },
            )
            .await
        }
    }
}

fn start(
    exec: &Exec,
    environment: BTreeMap<String, String>,
    children: &Children,
) -> Result<Started, NotStarted> {
    let mut process = command(exec, environment).map_err(NotStarted::Refused)?;
    let mark = Mark::fresh();
    init::own_session(&mut process, mark, false);
    let mut child = process.spawn().map_err(|error| not_started(exec, &error))?;
    let (leader, ended) = children.adopt(&child, mark);
    prefer_as_victim(&leader);
    let stdout = child.stdout.take().map(OwnedFd::from);
    let stderr = child.stderr.take().map(OwnedFd::from);
    let (Some(Ok(stdout)), Some(Ok(stderr))) = (
        stdout.map(|pipe| Output::new(FrameKind::Stdout, pipe)),
        stderr.map(|pipe| Output::new(FrameKind::Stderr, pipe)),
    ) else {
        leader.kill_group();
        return Err(NotStarted::Refused(Refusal::new(
            AgentErrorCode::Internal,
            "no pipe to the command",
        )));
    };
    Ok(Started {
        leader,
        ended,
        outputs: [stdout, stderr],
    })
}

/// Has the kernel kill a command before this process when memory is short.
pub(crate) fn prefer_as_victim(leader: &Leader) {
    // Raising one's own badness needs no privilege. A command gone already needs none.
    let _gone = std::fs::write(format!("/proc/{}/oom_score_adj", leader.process()), OOM_SCORE);
}

/// What to start, with its output in pipes and no input.
pub(crate) fn command(exec: &Exec, environment: BTreeMap<String, String>) -> Result<Process, Refusal> {
    let invalid = |message: &str| Refusal::new(AgentErrorCode::Invalid, message);
    let mut process = match &exec.command {
        Command::Shell(line) => {
            let mut shell = Process::new("/bin/sh");
            shell.arg("-c").arg(line);
            shell
        }
        Command::Argv(argv) => {
            let Some((program, arguments)) = argv.split_first().filter(|(program, _)| !program.is_empty())
            else {
                return Err(invalid("the command is empty"));
            };
            let mut process = Process::new(program);
            process.args(arguments);
            process
        }
    };
    process.envs(environment);
    for (name, value) in &exec.env {
        claim::check(name, value)?;
        process.env(name, value);
    }
    process.current_dir(directory(
        exec.working_dir.as_deref().unwrap_or(DEFAULT_DIRECTORY),
    )?);
    process
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(process)
}

/// What a failure to start means.
pub(crate) fn not_started(exec: &Exec, error: &io::Error) -> NotStarted {
    let name = match &exec.command {
        Command::Shell(_) => "/bin/sh",
        Command::Argv(argv) => argv.first().map_or("", String::as_str),
    };
    let exit_code = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::ArgumentListTooLong
        | io::ErrorKind::ExecutableFileBusy => CANNOT_RUN,
        io::ErrorKind::InvalidInput => {
            let refusal = Refusal::new(AgentErrorCode::Invalid, "the command holds a NUL");
            return NotStarted::Refused(refusal);
        }
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => CANNOT_RUN,
        // No process or memory left: the command may be fine.
        _ => {
            let message = format!("`{name}` cannot be started: {error}");
            return NotStarted::Refused(Refusal::new(files::code(error), message));
        }
    };
    NotStarted::Failed {
        exit_code,
        message: format!("{name}: {error}\n"),
    }
}

/// What ends a command from outside, watched whatever else goes on.
struct Watch<'a, G> {
    leader: &'a Leader,
    tasks: &'a Tasks,
    /// Resolves when the caller hangs up.
    gone: G,
    deadline: Option<Instant>,
    timed_out: bool,
}

/// The caller is not there any more.
struct Gone;

impl<G: Future<Output = ()> + Unpin> Watch<'_, G> {
    /// Waits for `work`. Meanwhile kills the command when its time is up, and gives up when the caller goes.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Gone> {
        let mut work = pin!(work);
        loop {
            let deadline = self.deadline;
            let due = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = &mut self.gone => return Err(Gone),
                () = due => {
                    if self.timed_out {
                        return Err(Gone);
                    }
                    self.timed_out = true;
                    self.leader.kill_all(self.tasks);
                    self.deadline = Some(Instant::now() + LAST_WORDS);
                }
                done = &mut work => return Ok(done),
            }
        }
    }
}

/// Sends output until the leader ends, and then the rest of it and how it ended.
async fn relay(
    stream: TcpStream,
    started: Started,
    exec: &Exec,
    (begun, before): (Instant, Option<Snapshot>),
    tasks: &Tasks,
) -> io::Result<()> {
    let Started {
        leader,
        mut ended,
        mut outputs,
    } = started;
    let (mut reader, mut writer) = stream.into_split();
    let gone = pin!(async move {
        // A byte here is as much a breach as an end: this operation has nothing more to receive.
        let _end = reader.read_u8().await;
    });
    let deadline = exec
        .timeout_ms
        .and_then(|limit| begun.checked_add(Duration::from_millis(limit)));
    let mut watch = Watch {
        leader: &leader,
        tasks,
        gone,
        deadline,
        timed_out: false,
    };
    let mut buffer = vec![0; PART.min(MAX_FRAME)];

    let ended = loop {
        let turn = watch
            .during(async {
                let [stdout, stderr] = &outputs;
                tokio::select! {
                    // Fair between the two pipes: neither can starve the other, or the end.
                    ended = &mut ended => Turn::Ended(ended.unwrap_or(Ended::Killed(9))),
                    () = stdout.readable() => Turn::Readable(0),
                    () = stderr.readable() => Turn::Readable(1),
                }
            })
            .await;
        let output = match turn {
            Ok(Turn::Ended(ended)) => break ended,
            Ok(Turn::Readable(index)) => &mut outputs[index],
            Err(Gone) => return hang_up(&leader, tasks),
        };
        let read = output.read(&mut buffer);
        if read > 0 {
            match watch
                .during(wire::send(&mut writer, output.kind, &buffer[..read]))
                .await
            {
                Ok(sent) => sent.inspect_err(|_| leader.kill_all(tasks))?,
                Err(Gone) => return hang_up(&leader, tasks),
            }
        }
    };
    for output in &mut outputs {
        // What is in the pipe at the leader's end was written before it. What others add is not waited for.
        let mut waiting = output.waiting();
        while waiting > 0 {
            let most = waiting.min(buffer.len());
            let read = output.take(&mut buffer[..most]);
            if read == 0 {
                break;
            }
            waiting -= read;
            match watch
                .during(wire::send(&mut writer, output.kind, &buffer[..read]))
                .await
            {
                Ok(sent) => sent?,
                Err(Gone) => return Ok(()),
            }
        }
    }
    let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let exit_code = if watch.timed_out {
        TIMED_OUT
    } else {
        ended.exit_code()
    };
    let changes = match before {
        Some(before) => Some(before.changes().await),
        None => None,
    };
    let exited = Reply::Exited {
        exit_code,
        timed_out: watch.timed_out,
        duration_ms,
        changes,
    };
    for output in outputs {
        output.keep_empty(tasks);
    }
    wire::reply(&mut writer, &exited).await
}

enum Turn {
    Ended(Ended),
    Readable(usize),
}

fn hang_up(leader: &Leader, tasks: &Tasks) -> io::Result<()> {
    leader.kill_all(tasks);
    Ok(())
}
