//! Commands in a sandbox.

use bytes::BytesMut;
use sandgate_api::{
    agent::{AGENT_PORT, Changes, Exec},
    id::{OrgId, SandboxId},
};

pub use sandgate_api::agent::Command;

use super::{Service, ServiceError, happenings::Told, keeper::Use};
use crate::{
    agent::{Agent, AgentError, ExecEvent, ExecStream},
    metrics::{CommandEnd, Watched},
};

/// Most bytes of each of the two outputs in a buffered answer. The rest is read and thrown away, so that the
/// command is not held up.
const MAX_OUTPUT: usize = 4 * 1024 * 1024;

/// What a command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit status.
    pub exit_code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Something is missing.
    pub truncated: bool,
    /// Its time was up.
    pub timed_out: bool,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
    /// What it changed, if that was asked for.
    pub changes: Option<Changes>,
}

/// A command that runs. Dropping it ends the command.
pub struct Running {
    stream: ExecStream,
    watched: Watched,
    /// For as long as it runs, its sandbox is not idle.
    _use: Option<Use>,
    told: Told,
}

impl Running {
    /// The next event; none after the last.
    pub async fn next(&mut self) -> Option<Result<ExecEvent, AgentError>> {
        let event = self.stream.next().await;
        match &event {
            Some(Ok(ExecEvent::Exited {
                exit_code,
                timed_out,
                duration_ms,
                ..
            })) => {
                self.told.ended(*exit_code, *timed_out, *duration_ms);
                self.watched.ended(match (timed_out, exit_code) {
                    (true, _) => CommandEnd::TimedOut,
                    (false, 0) => CommandEnd::Success,
                    (false, _) => CommandEnd::Failure,
                });
            }
            Some(Err(error)) => {
                self.told.lost(&error.to_string());
                self.watched.ended(CommandEnd::Lost);
            }
            Some(Ok(ExecEvent::Stdout(_) | ExecEvent::Stderr(_))) => {}
            None => {
                self.told.lost("its sandbox ended before it did");
                self.watched.lost();
            }
        }
        event
    }

    /// What the command leaves, of each output at most `room` bytes; none when the sandbox ended before it did.
    ///
    /// # Errors
    /// A sandbox that does not answer, or says no.
    pub(super) async fn finish(mut self, room: usize) -> Result<Option<Output>, AgentError> {
        let (mut stdout, mut stderr) = (Kept::of(room), Kept::of(room));
        while let Some(event) = self.next().await {
            match event? {
                ExecEvent::Stdout(bytes) => stdout.push(&bytes),
                ExecEvent::Stderr(bytes) => stderr.push(&bytes),
                ExecEvent::Exited {
                    exit_code,
                    timed_out,
                    duration_ms,
                    changes,
                } => {
                    return Ok(Some(Output {
                        exit_code,
                        truncated: stdout.cut || stderr.cut,
                        stdout: stdout.into_text(),
                        stderr: stderr.into_text(),
                        timed_out,
                        duration_ms,
                        changes,
                    }));
                }
            }
        }
        Ok(None)
    }
}

impl Service {
    /// Starts a command.
    ///
    /// # Errors
    /// A sandbox that does not run, or does not answer; the command has not been started then, as far as the
    /// sandbox can be believed.
    pub async fn start_command(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        exec: Exec,
    ) -> Result<Running, ServiceError> {
        let record = self.running(org_id, id).await?;
        let in_use = self.life(id).map(|life| life.begin_use());
        let exec = self.with_secrets(&record, exec).await?;
        let stream = self.dial_agent(id).await?.exec(exec).await?;
        Ok(Running {
            stream,
            watched: Watched::new(self.shared.metrics.clone()),
            _use: in_use,
            told: Told::begin(&self.shared.teller, org_id, id),
        })
    }

    /// Runs a command to its end. Dropping the future ends the command.
    ///
    /// # Errors
    /// As above; a sandbox that ends before the command does.
    pub async fn run_command(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        exec: Exec,
    ) -> Result<Output, ServiceError> {
        let running = self.start_command(org_id, id, exec).await?;
        running
            .finish(MAX_OUTPUT)
            .await?
            .ok_or_else(|| ServiceError::Conflict("the sandbox ended before the command did".to_owned()))
    }

    /// A fresh connection to the agent of a sandbox that runs.
    pub(super) async fn agent(&self, org_id: &OrgId, id: &SandboxId) -> Result<Agent, ServiceError> {
        self.running(org_id, id).await?;
        self.dial_agent(id).await
    }

    pub(super) async fn dial_agent(&self, id: &SandboxId) -> Result<Agent, ServiceError> {
        let stream = self.shared.node.dial(id, AGENT_PORT).await?;
        Ok(Agent::new(stream, &self.shared.installation.agent_key(id)))
    }
}

/// An output as far as it is kept.
pub(super) struct Kept {
    bytes: BytesMut,
    most: usize,
    cut: bool,
}

impl Kept {
    pub(super) fn of(most: usize) -> Self {
        Self {
            bytes: BytesMut::new(),
            most,
            cut: false,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = self.most - self.bytes.len();
        self.cut |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut
    }

    pub(super) fn into_text(self) -> String {
        let mut bytes = self.bytes.as_ref();
        if self.cut {
            // A character cut in two is not one that the command wrote.
            if let Err(error) = std::str::from_utf8(bytes)
                && error.error_len().is_none()
            {
                bytes = &bytes[..error.valid_up_to()];
            }
        }
        String::from_utf8_lossy(bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_cut_between_characters() {
        let mut kept = Kept::of(MAX_OUTPUT);
        kept.push(&vec![b'x'; MAX_OUTPUT - 1]);
        assert!(!kept.cut);
        kept.push("é".as_bytes());
        kept.push(b"more");
        assert!(kept.cut);
        assert_eq!(kept.into_text().len(), MAX_OUTPUT - 1);
    }

    #[test]
    fn what_is_no_text_is_replaced() {
        let mut kept = Kept::of(MAX_OUTPUT);
        kept.push(b"a\xff\xc3");
        kept.push(b"\xa9");
        assert_eq!(kept.into_text(), "a\u{fffd}é");
    }
}
