//! A running command as the events that clients are told, whichever way they come.

use std::collections::VecDeque;

use sandgate_api::rest::StreamEvent;

use super::{commands::told, text::Text};
use crate::{agent::ExecEvent, service::Running};

/// A command's output, then `exit` or `error`, then `done`. Dropping it ends the command.
pub(super) struct CommandEvents {
    /// None when the command has ended.
    running: Option<Running>,
    stdout: Text,
    stderr: Text,
    /// What is still to be told.
    last: VecDeque<StreamEvent>,
}

impl CommandEvents {
    pub(super) fn new(running: Running) -> Self {
        Self {
            running: Some(running),
            stdout: Text::default(),
            stderr: Text::default(),
            last: VecDeque::new(),
        }
    }

    /// The next event; none after `done`. Can be dropped and called again without losing anything.
    pub(super) async fn next(&mut self) -> Option<StreamEvent> {
        loop {
            let Some(running) = self.running.as_mut() else {
                return self.last.pop_front();
            };
            match running.next().await {
                Some(Ok(ExecEvent::Stdout(bytes))) => {
                    let data = self.stdout.push(&bytes);
                    if !data.is_empty() {
                        return Some(StreamEvent::Stdout { data });
                    }
                }
                Some(Ok(ExecEvent::Stderr(bytes))) => {
                    let data = self.stderr.push(&bytes);
                    if !data.is_empty() {
                        return Some(StreamEvent::Stderr { data });
                    }
                }
                Some(Ok(ExecEvent::Exited {
                    exit_code,
                    timed_out,
                    duration_ms,
                    changes,
                })) => {
                    let (files_changed, files_changed_truncated) = told(changes);
                    self.end(StreamEvent::Exit {
                        code: exit_code,
                        timed_out,
                        duration_ms,
                        files_changed,
                        files_changed_truncated,
                    });
                }
                // Never a made-up exit status.
                Some(Err(error)) => self.end(StreamEvent::Error {
                    error: error.to_string(),
                }),
                None => self.end(StreamEvent::Error {
                    error: "the sandbox ended before the command did".to_owned(),
                }),
            }
        }
    }

    /// Also tells what an output held back because it was half a character.
    fn end(&mut self, event: StreamEvent) {
        self.running = None;
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        if !stdout.is_empty() {
            self.last.push_back(StreamEvent::Stdout { data: stdout });
        }
        if !stderr.is_empty() {
            self.last.push_back(StreamEvent::Stderr { data: stderr });
        }
        self.last.extend([event, StreamEvent::Done]);
    }
}
