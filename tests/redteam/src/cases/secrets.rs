//! The key that the sandbox may use and must not have. The twins need a program that speaks TLS; `curl` is taken where
//! the sandbox has it.

use std::{
    env, fs,
    process::{Command, Stdio},
    time::Instant,
};

use super::{at, resolved};
use crate::{
    attempt::{Attempts, End, Outcome, Wanted},
    case::{Case, TOKEN, Trace},
    world::Secret,
};

/// Most processes whose environment is looked at.
const PROCESSES: usize = 500;
/// Arrivals of the placeholder at another host, where it is worth nothing.
const HARMLESS: usize = 8;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "S01",
        [
            "the key in the sandbox: in the environment of this process and of every other that can be read",
            "what stands there is not the key",
            "a request to the key's host, which arrives with the key",
        ],
        |attempts| {
            let Some(secret) = secret(attempts) else { return };
            let start = format!("{}=", secret.variable);
            let own = env::vars().map(|(name, value)| format!("{name}={value}"));
            let mut shown: Vec<String> = own.filter(|entry| entry.starts_with(&start)).collect();
            let processes = fs::read_dir("/proc")
                .into_iter()
                .flatten()
                .flatten()
                .take(PROCESSES);
            for process in processes {
                let environment = fs::read(process.path().join("environ")).unwrap_or_default();
                let entries = environment.split(|byte| *byte == 0);
                let entries = entries.map(|entry| String::from_utf8_lossy(entry).into_owned());
                shown.extend(entries.filter(|entry| entry.starts_with(&start)));
            }
            shown.sort_unstable();
            shown.dedup();
            attempts.shown = shown;
            let looked = Outcome::of(End::Sent, false, Instant::now());
            attempts.note("looked for the key", &Wanted::Anything, looked);
        },
        keyed,
    )
    .requires(|_| vec![Trace::Keyed(TOKEN.to_owned())]),
    Case::new(
        "S02",
        [
            "what stands in the key's place, sent in clear",
            "refused: it is used towards its host and by TLS only",
            "the same request without it",
        ],
        |attempts| {
            let Some(value) = secret(attempts).and_then(|secret| env::var(secret.variable).ok()) else {
                return attempts.impossible("the sandbox has nothing in the key's place");
            };
            in_clear(
                attempts,
                &format!("Authorization: Bearer {value}\r\n"),
                &Wanted::HttpRefusal,
            );
            in_clear(attempts, &format!("X-Other: {value}\r\n"), &Wanted::HttpRefusal);
        },
        |attempts| in_clear(attempts, "", &Wanted::Answer("HTTP/1.1 200".to_owned())),
    ),
    Case::new(
        "S03",
        [
            "what stands in the key's place, sent to another allowed host by TLS",
            "it arrives without the key, or not at all",
            "a request to the key's host, which arrives with the key",
        ],
        |attempts| {
            let ok = attempts.world.ok.name.clone();
            call(attempts, &ok, &Wanted::Anything);
        },
        keyed,
    )
    .requires(|_| vec![Trace::Keyed(TOKEN.to_owned())])
    .at_most(HARMLESS),
];

fn secret(attempts: &mut Attempts<'_>) -> Option<Secret> {
    let secret = attempts.world.secret.clone();
    if secret.is_none() {
        attempts.impossible("the world has no key");
    }
    secret
}

fn in_clear(attempts: &mut Attempts<'_>, header: &str, wanted: &Wanted) {
    let plain = attempts.world.plain.clone();
    resolved(attempts, &plain.name, plain.address);
    let request = format!(
        "GET /{} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{header}\r\n",
        attempts.token, plain.name
    );
    let outcome = attempts.tcp(at(plain.address, 80), request.as_bytes());
    let what = header.split(':').next().unwrap_or_default();
    attempts.note(
        format!("a request in clear, with it in {what:?}"),
        wanted,
        outcome,
    );
}

fn keyed(attempts: &mut Attempts<'_>) {
    let Some(secret) = secret(attempts) else { return };
    call(attempts, &secret.host.name, &Wanted::Answer("200".to_owned()));
}

/// A request by TLS with what stands in the key's place.
fn call(attempts: &mut Attempts<'_>, host: &str, wanted: &Wanted) {
    let Some(secret) = secret(attempts) else { return };
    let value = env::var(&secret.variable).unwrap_or_default();
    let started = Instant::now();
    let seconds = attempts.timeout().as_secs().max(1).to_string();
    let mut command = Command::new("curl");
    // Its certificate is not what is judged: that is who got the key.
    command
        .args([
            "-sk",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--noproxy",
            "*",
            "--max-time",
            &seconds,
            "-H",
        ])
        .arg(format!("Authorization: Bearer {value}"))
        .arg(format!("https://{host}/{}", attempts.token))
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    match command.output() {
        Ok(output) => {
            let end = if output.status.success() {
                End::Answered
            } else {
                End::Refused
            };
            let outcome = Outcome {
                data: String::from_utf8_lossy(&output.stdout).into_owned(),
                ..Outcome::of(end, false, started)
            };
            attempts.note(format!("a request to {host}"), wanted, outcome);
        }
        Err(error) => attempts.impossible(format!("curl: {error}")),
    }
}
