//! Processes of a sandbox that outlive the request that started them. They live in its agent: the controller holds
//! nothing of them, and finds them again after its own restart.

use bytes::Bytes;
use jiff::Timestamp;
use sandgate_api::{
    agent::{AgentErrorCode, ProcessStatus, Start, TerminalSize},
    id::{OrgId, SandboxId},
    rest::{Process, ProcessStarted},
};

use super::{Service, ServiceError};
use crate::agent::{AgentError, Follow};

impl Service {
    /// Starts a process.
    ///
    /// # Errors
    /// A sandbox that does not run or does not answer; a process that cannot be started.
    pub async fn start_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        start: Start,
    ) -> Result<ProcessStarted, ServiceError> {
        let record = self.running(org_id, id).await?;
        let exec = self.with_secrets(&record, start.exec).await?;
        let agent = self.dial_agent(id).await?;
        let (process_id, pid) = agent.start_process(Start { exec, ..start }).await?;
        Ok(ProcessStarted { process_id, pid })
    }

    /// The processes of a sandbox.
    ///
    /// # Errors
    /// A sandbox that does not run or does not answer.
    pub async fn processes(&self, org_id: &OrgId, id: &SandboxId) -> Result<Vec<Process>, ServiceError> {
        let processes = self.agent(org_id, id).await?.processes().await?;
        Ok(processes.into_iter().map(process).collect())
    }

    /// Follows a process from a position of its output on; with `wait` until it ends, with `input` also typing.
    ///
    /// # Errors
    /// As above; no such process; output that has not come so far.
    pub async fn follow_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
        since: u64,
        (wait, input): (bool, bool),
    ) -> Result<Follow, ServiceError> {
        let agent = self.agent(org_id, id).await?;
        let followed = agent.follow(process, since, wait, input).await;
        followed.map_err(|error| match error {
            AgentError::Refused {
                code: AgentErrorCode::Invalid,
                message,
            } => ServiceError::Invalid {
                field: "since".to_owned(),
                message,
            },
            other => of_process(other),
        })
    }

    /// Writes to a process, and closes its input after it. Answers how many bytes it took.
    ///
    /// # Errors
    /// As above; a process that reads nothing any more.
    pub async fn write_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
        (bytes, close): (Bytes, bool),
    ) -> Result<u64, ServiceError> {
        let agent = self.agent(org_id, id).await?;
        agent
            .write_process(process, bytes, close)
            .await
            .map_err(of_process)
    }

    /// Sends a signal to a process and its group.
    ///
    /// # Errors
    /// As above; a process that has ended.
    pub async fn signal_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
        signal: i32,
    ) -> Result<(), ServiceError> {
        let agent = self.agent(org_id, id).await?;
        agent.signal_process(process, signal).await.map_err(of_process)
    }

    /// Gives a process's terminal another size.
    ///
    /// # Errors
    /// As above; a process without a terminal.
    pub async fn resize_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
        size: TerminalSize,
    ) -> Result<(), ServiceError> {
        let agent = self.agent(org_id, id).await?;
        agent.resize_process(process, size).await.map_err(of_process)
    }

    /// Ends a process with everything it started, and forgets it.
    ///
    /// # Errors
    /// As above.
    pub async fn remove_process(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        process: &str,
    ) -> Result<(), ServiceError> {
        let agent = self.agent(org_id, id).await?;
        agent.remove_process(process).await.map_err(of_process)
    }
}

/// What is not found is a process, not a file.
fn of_process(error: AgentError) -> ServiceError {
    match error {
        AgentError::Refused {
            code: AgentErrorCode::NotFound,
            ..
        } => ServiceError::NotFound("such process in this sandbox".to_owned()),
        other => other.into(),
    }
}

fn process(status: ProcessStatus) -> Process {
    // The sandbox's word: a time out of range is the epoch.
    let time = |ms| Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH);
    Process {
        process_id: status.process_id,
        pid: status.pid,
        command: status.command,
        pty: status.terminal,
        background: !status.attended,
        running: status.ended.is_none(),
        exit_code: status.ended.map(|end| end.exit_code),
        started_at: time(status.started_ms),
        ended_at: status.ended.map(|end| time(end.at_ms)),
        first_seq: status.first,
        next_seq: status.next,
    }
}
