//! What the programs in a sandbox say of netd's self-test host: whether they resolve its name, and whether they
//! trust the sandbox's authority.
//!
//! Every program runs as a command of the caller would, with the same environment, so it fails where the caller's
//! would. What it says is written by the sandbox: it is cut and cleaned, and believed by nobody but the caller.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sandgate_api::{
    agent::{AgentErrorCode, Exec},
    id::{OrgId, SandboxId},
    rest::{DOCTOR, DOCTOR_HOST, DoctorClient, DoctorFinding, NetworkDoctor, SelfTest},
};

use super::{
    Service, ServiceError,
    commands::{Command, Output},
};
use crate::agent::AgentError;

/// For one program, by the sandbox's clock.
const PROGRAM_TIME: Duration = Duration::from_secs(10);
/// The same by ours: what the sandbox may take longer to say that the time is up.
const PATIENCE: Duration = Duration::from_secs(13);
/// Programs that run at the same time: a small sandbox has room for them.
const AT_ONCE: usize = 3;
/// Most bytes of an output that are looked at.
const MAX_OUTPUT: usize = 16 * 1024;
/// Longest [`DoctorFinding::detail`], in characters.
const MAX_DETAIL: usize = 300;
/// Where netd's resolver says that the host is.
const GATEWAY: &str = "169.254.1.1";
/// Exit status of a program that is not there, as in a shell.
const NOT_FOUND: i32 = 127;

/// How it is seen that a program got through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// It writes what netd answers to this sandbox and to no other.
    Answer,
    /// It ends well: Git has nothing to write of an empty repository.
    Exit,
    /// It writes the gateway's address.
    Address,
}

/// A program, and a shell line that runs it, or exits with [`NOT_FOUND`]. The line ends within [`PROGRAM_TIME`], with
/// its reason in a line or two on standard error. It has no setting of its own: what the environment and the files
/// of the sandbox say is what is examined.
struct Program {
    name: &'static str,
    line: &'static str,
    proof: Proof,
}

const RESOLVER: Program = Program {
    name: "dns",
    line: "if command -v getent >/dev/null; then \
             getent ahostsv4 doctor.sandgate.internal || { echo the name is not known >&2; exit 1; }; \
           elif command -v python3 >/dev/null; then \
             exec python3 -c 'import socket; print(socket.gethostbyname(\"doctor.sandgate.internal\"))'; \
           else exit 127; fi",
    proof: Proof::Address,
};

const CLIENTS: [Program; 8] = [
    Program {
        name: "curl",
        line: "command -v curl >/dev/null || exit 127
exec curl -sS --max-time 8 https://doctor.sandgate.internal/",
        proof: Proof::Answer,
    },
    Program {
        name: "openssl",
        line: r#"command -v openssl >/dev/null || exit 127
printf 'GET / HTTP/1.1\r\nHost: doctor.sandgate.internal\r\n\r\n' | openssl s_client -quiet -verify_return_error \
  -verify_hostname doctor.sandgate.internal -servername doctor.sandgate.internal \
  -connect doctor.sandgate.internal:443"#,
        proof: Proof::Answer,
    },
    Program {
        name: "python-ssl",
        line: r#"command -v python3 >/dev/null || exit 127
exec python3 -c '
import sys
try:
    import socket, ssl
except ImportError:
    sys.exit(127)
host = "doctor.sandgate.internal"
try:
    with socket.create_connection((host, 443), 8) as raw:
        with ssl.create_default_context().wrap_socket(raw, server_hostname=host) as secured:
            secured.sendall(b"GET / HTTP/1.1\r\nHost: doctor.sandgate.internal\r\n\r\n")
            print(b"".join(iter(lambda: secured.recv(4096), b"")).decode())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
'"#,
        proof: Proof::Answer,
    },
    Program {
        name: "python-requests",
        line: r#"command -v python3 >/dev/null || exit 127
exec python3 -c '
import importlib.util, sys
if importlib.util.find_spec("requests") is None:
    sys.exit(127)
try:
    import requests
    print(requests.get("https://doctor.sandgate.internal/", timeout=8).text)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
'"#,
        proof: Proof::Answer,
    },
    Program {
        name: "python-httpx",
        line: r#"command -v python3 >/dev/null || exit 127
exec python3 -c '
import importlib.util, sys
if importlib.util.find_spec("httpx") is None:
    sys.exit(127)
try:
    import httpx
    print(httpx.get("https://doctor.sandgate.internal/", timeout=8).text)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
'"#,
        proof: Proof::Answer,
    },
    Program {
        name: "node-fetch",
        line: r#"command -v node >/dev/null || exit 127
exec node -e '
if (typeof fetch === "undefined") process.exit(127);
fetch("https://doctor.sandgate.internal/", { signal: AbortSignal.timeout(8000) })
  .then((answer) => answer.text())
  .then((text) => console.log(text))
  .catch((error) => { console.error(`${error}: ${error.cause ?? ""}`); process.exitCode = 1; });
'"#,
        proof: Proof::Answer,
    },
    Program {
        name: "node-https",
        line: r#"command -v node >/dev/null || exit 127
exec node -e '
const failed = (error) => { console.error(`${error}`); process.exitCode = 1; };
const request = require("https").get("https://doctor.sandgate.internal/", (answer) => {
  answer.on("data", (data) => process.stdout.write(data)).on("error", failed);
});
request.setTimeout(8000, () => request.destroy(new Error("no answer within 8 s"))).on("error", failed);
'"#,
        proof: Proof::Answer,
    },
    Program {
        name: "git",
        line: "command -v git >/dev/null || exit 127
GIT_TERMINAL_PROMPT=0 exec git ls-remote https://doctor.sandgate.internal/",
        proof: Proof::Exit,
    },
];

/// How a program's run ended.
enum Run {
    /// By itself, or because its time was up.
    Ended(Output),
    /// The sandbox said nothing of it that makes sense.
    Lost(String),
}

impl Service {
    /// Runs the programs that a sandbox has against the self-test host. Takes up to about 40 s with programs that
    /// hang, and a few hundred milliseconds each with others.
    ///
    /// # Errors
    /// A sandbox that does not run, or cannot be reached.
    pub async fn network_doctor(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<NetworkDoctor, ServiceError> {
        self.running(org_id, id).await?;
        let expected = expected(id)?;
        let programs = std::iter::once(RESOLVER).chain(CLIENTS);
        let findings: Vec<DoctorClient> = stream::iter(programs)
            .map(|program| self.examine(org_id, id, program, &expected))
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let mut findings = findings.into_iter();
        let dns = findings
            .next()
            .ok_or_else(|| ServiceError::Internal("the resolver was not examined".to_owned()))?;
        Ok(conclude(dns.finding, findings.collect()))
    }

    async fn examine(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        program: Program,
        expected: &str,
    ) -> Result<DoctorClient, ServiceError> {
        let run = match tokio::time::timeout(PATIENCE, self.run_program(org_id, id, &program)).await {
            Ok(run) => run?,
            Err(_elapsed) => Run::Lost(format!("no answer within {} s", PATIENCE.as_secs())),
        };
        Ok(DoctorClient {
            name: program.name.to_owned(),
            finding: judge(&program, run, expected),
        })
    }

    async fn run_program(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        program: &Program,
    ) -> Result<Run, ServiceError> {
        let exec = Exec {
            command: Command::Shell(program.line.to_owned()),
            env: BTreeMap::new(),
            working_dir: None,
            timeout_ms: Some(u64::try_from(PROGRAM_TIME.as_millis()).unwrap_or(u64::MAX)),
            track: None,
        };
        let running = self.start_command(org_id, id, exec).await?;
        Ok(match running.finish(MAX_OUTPUT).await {
            Ok(Some(output)) => Run::Ended(output),
            Ok(None) => Run::Lost("the sandbox ended before the program did".to_owned()),
            Err(AgentError::Refused {
                code: AgentErrorCode::NotFound,
                message,
            }) => Run::Ended(Output {
                exit_code: NOT_FOUND,
                stdout: String::new(),
                stderr: message,
                truncated: false,
                timed_out: false,
                duration_ms: 0,
                changes: None,
            }),
            Err(error) => Run::Lost(error.to_string()),
        })
    }
}

/// What netd answers to this sandbox.
fn expected(id: &SandboxId) -> Result<String, ServiceError> {
    let said = SelfTest {
        sandgate: DOCTOR.to_owned(),
        sandbox_id: id.clone(),
    };
    serde_json::to_string(&said).map_err(|error| ServiceError::Internal(error.to_string()))
}

fn conclude(dns: DoctorFinding, clients: Vec<DoctorClient>) -> NetworkDoctor {
    let well = |finding: &DoctorFinding| finding.ok || !finding.installed;
    NetworkDoctor {
        success: true,
        healthy: well(&dns)
            && clients.iter().any(|client| client.finding.installed)
            && clients.iter().all(|client| well(&client.finding)),
        host: DOCTOR_HOST.to_owned(),
        clients,
        dns,
    }
}

fn judge(program: &Program, run: Run, expected: &str) -> DoctorFinding {
    let (installed, ok, detail) = match run {
        Run::Lost(why) => (true, false, why),
        Run::Ended(output) if output.timed_out => {
            let why = format!("no end within {} s: {}", PROGRAM_TIME.as_secs(), output.stderr);
            (true, false, why)
        }
        Run::Ended(output) if output.exit_code == NOT_FOUND => (false, false, "not installed".to_owned()),
        Run::Ended(output) => {
            let proven = match program.proof {
                Proof::Answer => output.stdout.contains(expected),
                Proof::Exit => true,
                Proof::Address => output.stdout.split_whitespace().any(|word| word == GATEWAY),
            };
            match (output.exit_code, proven) {
                (0, true) if program.proof == Proof::Address => (true, true, GATEWAY.to_owned()),
                (0, true) => (true, true, "answered".to_owned()),
                (0, false) => (true, false, format!("another answer: {}", output.stdout)),
                (code, _) if output.stderr.trim().is_empty() => {
                    (true, false, format!("exit status {code} without a word"))
                }
                (_, _) => (true, false, output.stderr),
            }
        }
    };
    DoctorFinding {
        installed,
        ok,
        detail: clean(&detail),
    }
}

/// One line of letters, digits and ASCII signs, cut: nothing that could forge a log line, drive a terminal or turn
/// a text around.
fn clean(text: &str) -> String {
    let plain = |character: char| {
        if character.is_alphanumeric() || character.is_ascii_graphic() {
            character
        } else {
            ' '
        }
    };
    let line: String = text.chars().take(4 * MAX_DETAIL).map(plain).collect();
    let words: Vec<&str> = line.split_whitespace().collect();
    words.join(" ").chars().take(MAX_DETAIL).collect()
}

#[cfg(test)]
mod tests;
