//! Sessions: an interpreter that keeps its state from one piece of code to the next.
//!
//! A session is a process of the sandbox like others, and runs a few lines of ours in the interpreter itself: they read
//! pieces of code from the standard input, and mark in the output where each one's begins and ends. The marks hold a
//! random word. Code in the session could forge them, and deceive nobody but its own caller: what is read here is
//! bounded, and believed for nothing else. The controller holds no state of a session.

mod scan;

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sandgate_api::{
    agent::{Command, Exec, Start},
    id::{OrgId, SandboxId},
};
use tokio::time::{Instant, timeout};

use super::{Service, ServiceError, commands::Kept};
use crate::agent::{AgentError, Follow, ProcessOutput};
use scan::{Piece, Scan};

/// How long an interpreter may take to begin.
const READY: Duration = Duration::from_secs(20);
/// How long code may wait for other code of its session.
const TURN: Duration = Duration::from_secs(60);
/// How often code whose time is up is interrupted: it may hold an interrupt back for a while.
const INTERRUPTS: u32 = 5;
/// How long it may take to end after each.
const GRACE: Duration = Duration::from_secs(1);
/// Most bytes of output in an answer.
const MAX_OUTPUT: usize = 4 * 1024 * 1024;
/// What an interpreter said instead of beginning, in characters.
const MAX_COMPLAINT: usize = 200;
/// The signal that interrupts, as Linux counts them.
const INTERRUPT: i32 = 2;
/// What a session says when it has begun.
const BEGUN: &[u8] = b"\x1eready\x1f";

/// An interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// `python3`.
    Python,
    /// `node`.
    Node,
    /// `bash`.
    Bash,
}

/// What a piece of code left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// What it wrote, and the value of its last expression.
    pub output: String,
    /// Something of that is missing.
    pub truncated: bool,
    /// Why it failed; empty when it did not.
    pub error: String,
    /// Pieces of code that the session has run.
    pub count: u64,
    /// Its time was up.
    pub timed_out: bool,
    /// How long it took.
    pub took: Duration,
}

impl Language {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Python, Self::Node, Self::Bash];

    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Node => "node",
            Self::Bash => "bash",
        }
    }

    fn command(self) -> Command {
        let (line, session) = match self {
            Self::Python => ("exec python3 -u -c \"$1\" 2>&1", include_str!("repl/session.py")),
            Self::Node => ("exec node -e \"$1\" 2>&1", include_str!("repl/session.js")),
            Self::Bash => ("exec bash -c \"$1\" 2>&1", include_str!("repl/session.sh")),
        };
        Command::Argv(
            ["/bin/sh", "-c", line, self.name(), session]
                .map(str::to_owned)
                .into(),
        )
    }
}

impl Service {
    /// Begins a session. Answers the id of its process.
    ///
    /// # Errors
    /// A sandbox that does not run or does not answer, or has no such interpreter.
    pub async fn begin_session(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        language: Language,
        place: Exec,
    ) -> Result<String, ServiceError> {
        let start = Start {
            exec: Exec {
                command: language.command(),
                ..place
            },
            terminal: None,
            attended: false,
        };
        let process = self.start_process(org_id, id, start).await?.process_id;
        let mut follow = self
            .follow_process(org_id, id, &process, 0, (true, false))
            .await?;
        let complaint = match timeout(READY, begun(&mut follow)).await {
            Ok(Ok(None)) => return Ok(process),
            Ok(Ok(Some(complaint))) => complaint,
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => format!("no answer in {} s", READY.as_secs()),
        };
        // It is of no use to anybody.
        let _gone = self.remove_process(org_id, id, &process).await;
        Err(ServiceError::Invalid {
            field: "language".to_owned(),
            message: format!("{} does not start in this sandbox: {complaint}", language.name()),
        })
    }

    /// Runs code in a session. Dropping the future interrupts the code, and so does the end of its time.
    ///
    /// # Errors
    /// A sandbox that does not run or does not answer; no such session, or one that has ended.
    pub async fn execute_in_session(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
        (code, limit): (&str, Duration),
    ) -> Result<Executed, ServiceError> {
        let processes = self.processes(org_id, id).await?;
        let status = processes.into_iter().find(|status| status.process_id == process);
        let status =
            status.ok_or_else(|| ServiceError::NotFound("such session in this sandbox".to_owned()))?;
        if !status.running {
            return Err(ServiceError::Conflict("the session has ended".to_owned()));
        }
        let mut follow = self
            .follow_process(org_id, id, process, status.next_seq, (true, true))
            .await?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let line = format!("{name} {}\n", STANDARD.encode(code));
        follow.write(line.as_bytes()).await?;
        let mut running = Running {
            follow,
            scan: Scan::new(&name),
            output: Kept::of(MAX_OUTPUT),
            lost: false,
            end: None,
        };
        // An interrupt before the code has begun would be lost, or meet other code.
        match timeout(TURN, running.begin()).await {
            Ok(begun) => begun?,
            Err(_elapsed) => {
                let message = "the session is busy with other code; this code runs after it, unheard";
                return Err(ServiceError::Conflict(message.to_owned()));
            }
        }
        let begun = Instant::now();
        let interrupting = Interrupting {
            service: self,
            of: Some((org_id, id, process)),
        };
        let mut ended = timeout(limit, running.end()).await;
        let timed_out = ended.is_err();
        for _ in 0..INTERRUPTS {
            if ended.is_ok() {
                break;
            }
            self.interrupt_session(org_id, id, process).await?;
            ended = timeout(GRACE, running.end()).await;
        }
        interrupting.not_any_more();
        let (mut error, count) = match ended {
            Ok(ended) => ended?,
            Err(_elapsed) => {
                let message = "the code was interrupted and goes on all the same: destroy the session";
                (message.to_owned(), 0)
            }
        };
        if timed_out {
            error = format!("the code took longer than {} ms\n{error}", limit.as_millis());
        }
        let truncated = running.lost || running.output.is_cut();
        Ok(Executed {
            output: running.output.into_text(),
            truncated,
            error,
            count,
            timed_out,
            took: begun.elapsed(),
        })
    }

    /// Interrupts what runs in a session.
    ///
    /// # Errors
    /// A sandbox that does not run or does not answer; no such session, or one that has ended.
    pub async fn interrupt_session(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
    ) -> Result<(), ServiceError> {
        self.signal_process(org_id, id, process, INTERRUPT).await
    }
}

/// Interrupts a session's code when it is dropped before its time.
struct Interrupting<'a> {
    service: &'a Service,
    of: Option<(&'a OrgId, &'a SandboxId, &'a str)>,
}

impl Interrupting<'_> {
    fn not_any_more(mut self) {
        self.of = None;
    }
}

impl Drop for Interrupting<'_> {
    fn drop(&mut self) {
        let Some((org_id, id, process)) = self.of else {
            return;
        };
        let (service, org_id, id, process) = (
            self.service.clone(),
            org_id.clone(),
            id.clone(),
            process.to_owned(),
        );
        self.service.shared.tasks.spawn("interrupt", async move {
            // A session that is gone runs nothing.
            let _gone = service.interrupt_session(&org_id, &id, &process).await;
        });
    }
}

/// Waits for a session's first words. Answers what came instead, if it was something else.
async fn begun(follow: &mut Follow) -> Result<Option<String>, AgentError> {
    let mut said = Vec::new();
    while let Some(event) = follow.next().await {
        match event? {
            ProcessOutput::Part { bytes, .. } => said.extend_from_slice(&bytes),
            ProcessOutput::Lost(_) | ProcessOutput::Exited { .. } | ProcessOutput::CaughtUp => break,
        }
        if said.windows(BEGUN.len()).any(|window| window == BEGUN) {
            return Ok(None);
        }
        if said.len() > MAX_OUTPUT {
            break;
        }
    }
    let said = String::from_utf8_lossy(&said);
    let plain = said.chars().filter(|character| !character.is_control());
    Ok(Some(plain.take(MAX_COMPLAINT).collect()))
}

/// Code that runs in a session.
struct Running {
    follow: Follow,
    scan: Scan,
    output: Kept,
    lost: bool,
    /// Why it failed, or nothing, and how many the session has run.
    end: Option<(String, u64)>,
}

impl Running {
    /// Waits for the code's turn.
    async fn begin(&mut self) -> Result<(), AgentError> {
        while self.end.is_none() && !self.scan.has_begun() {
            self.step().await?;
        }
        Ok(())
    }

    /// Why it failed, or nothing, and how many the session has run. Can be dropped and called again.
    async fn end(&mut self) -> Result<(String, u64), AgentError> {
        loop {
            if let Some(end) = self.end.take() {
                return Ok(end);
            }
            self.step().await?;
        }
    }

    /// Takes one event.
    async fn step(&mut self) -> Result<(), AgentError> {
        let bytes = match self.follow.next().await {
            Some(event) => match event? {
                ProcessOutput::Part { bytes, .. } => bytes,
                ProcessOutput::Lost(_) => {
                    self.lost = true;
                    self.scan.skip();
                    return Ok(());
                }
                ProcessOutput::Exited { exit_code, .. } => {
                    self.end = Some((format!("the session ended with exit code {exit_code}"), 0));
                    return Ok(());
                }
                ProcessOutput::CaughtUp => return Err(AgentError::Closed),
            },
            None => return Err(AgentError::Closed),
        };
        self.scan.push(&bytes);
        while let Some(piece) = self.scan.next() {
            match piece {
                Piece::Output(bytes) => self.output.push(&bytes),
                Piece::End { error, count } => {
                    self.end = Some((error, count));
                    return Ok(());
                }
                Piece::Nonsense => {
                    return Err(AgentError::Protocol(
                        "a session whose marks say nothing".to_owned(),
                    ));
                }
            }
        }
        Ok(())
    }
}
