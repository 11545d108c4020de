//! Runs the programs that set the network up (`ip`, `nft`) in the calling thread's network namespace. Owns: how they
//! are fed and how their failure is told. Decides nothing about what they do.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

/// A program failed, or could not be run.
#[derive(Debug, thiserror::Error)]
#[error("`{line}` failed: {message}")]
pub struct CommandError {
    /// The command line.
    pub line: String,
    /// What it printed, or why it could not be run.
    pub message: String,
}

/// Runs a program with `input` on its standard input and gives what it printed.
///
/// # Errors
/// When it cannot be started or fails; the message is what it printed on its standard error.
pub fn run(command: &[&str], input: &str) -> Result<String, CommandError> {
    let failed = |message: String| CommandError {
        line: command.join(" "),
        message,
    };
    let [program, arguments @ ..] = command else {
        return Err(failed("no command".to_owned()));
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("{error} (installed by `make setup`)")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that ended early says why on its standard error.
        if let Err(error) = stdin.write_all(input.as_bytes()) {
            tracing::debug!(%error, program, "input not taken");
        }
    }
    let done = child
        .wait_with_output()
        .map_err(|error| failed(error.to_string()))?;
    if done.status.success() {
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    } else {
        Err(failed(String::from_utf8_lossy(&done.stderr).trim().to_owned()))
    }
}
