//! Load: a process of its own in some network namespace, told what to do by one JSON argument, answering
//! with one line of JSON. Owns the way between the benchmark and these processes. What they measure is
//! measured in them, so that nothing of the harness is part of a figure.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddrV4,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use harness::namespace::Namespace;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub(crate) mod api;
mod connects;
pub(crate) mod dns;
mod flood;
mod lifetime;
mod origin;
mod policy;
mod refusals;
mod relays;
mod requests;
mod sockmap;
pub(crate) mod stream;

pub(crate) use connects::Connects;
pub(crate) use dns::{NameServer, Questions};
pub(crate) use flood::Flood;
pub(crate) use lifetime::{Create, Execute, Lives, PARTS};
pub(crate) use origin::{BULK, Origin};
pub(crate) use policy::{Change, Changes};
pub(crate) use refusals::Refusals;
pub(crate) use relays::{Manner, Relay, Relayed};
pub(crate) use requests::{Rate, Requests};
pub(crate) use stream::{Bulk, Target};

/// The first argument of such a process.
pub(crate) const WORD: &str = "load";
/// The processors: client and server have one each, what is measured between them may use both.
pub(crate) const CLIENT: usize = 0;
/// See [`CLIENT`].
pub(crate) const SERVER: usize = 1;

/// What a process shall do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Serve HTTP until standard input ends.
    Serve(Origin),
    /// Serve DNS until standard input ends.
    ServeDns(NameServer),
    /// Ask DNS. Gives [`Rate`].
    Dns(Questions),
    /// Read an endless answer. Gives bits a second.
    Bulk(Bulk),
    /// Connect, ask, close. Gives [`Rate`].
    Connects(Connects),
    /// Be refused. Gives milliseconds.
    Refusals(Refusals),
    /// Take all there is until standard input ends.
    Flood(Flood),
    /// Relay over loopback. Gives [`Relayed`].
    Relay(Relay),
    /// Requests on connections that are kept. Gives [`Rate`].
    Requests(Requests),
    /// Create, run a command, stop. Gives [`Lives`].
    Create(Create),
    /// Run `true` in a sandbox. Gives milliseconds.
    Execute(Execute),
    /// Run `true` here, as the bound of what running it can cost. Gives milliseconds.
    Spawn(usize),
    /// Change a policy and watch for it. Gives [`Change`]s.
    Policy(Changes),
}

/// A server that ends with this value.
pub(crate) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts a server and waits until it listens.
pub(crate) fn serve(namespace: &Namespace, origin: Origin) -> Result<Server> {
    serving(namespace, &Task::Serve(origin))
}

/// Starts a name server and waits until it listens.
pub(crate) fn serve_dns(namespace: &Namespace, server: NameServer) -> Result<Server> {
    serving(namespace, &Task::ServeDns(server))
}

/// Starts a flood and waits until it flows.
pub(crate) fn flood(namespace: &Namespace, flood: Flood) -> Result<Server> {
    serving(namespace, &Task::Flood(flood))
}

fn serving(namespace: &Namespace, task: &Task) -> Result<Server> {
    let mut server = Server(start(namespace, SERVER, task)?);
    let mut line = String::new();
    BufReader::new(server.0.stdout.as_mut().context("a pipe")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "the server did not start");
    Ok(server)
}

/// Has a load made and gives what was measured.
pub(crate) fn run<T: DeserializeOwned>(namespace: &Namespace, task: &Task) -> Result<T> {
    let output = start(namespace, CLIENT, task)?.wait_with_output()?;
    ensure!(output.status.success(), "{task:?} ended with {}", output.status);
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{task:?} wrote {:?}", String::from_utf8_lossy(&output.stdout)))
}

fn start(namespace: &Namespace, processor: usize, task: &Task) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([WORD, &processor.to_string(), &serde_json::to_string(task)?])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    namespace.run(move || command.spawn()).context("starting a load")
}

/// The life of such a process.
pub(crate) fn main(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let processor: usize = arguments.next().context("a processor")?.parse()?;
    let task: Task = serde_json::from_str(&arguments.next().context("a task")?)?;
    let available = std::thread::available_parallelism()?.get();
    let mut set = CpuSet::new();
    set.set(processor % available)?;
    match task {
        Task::Serve(origin) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            origin.start()?;
            until_told_to_end()
        }
        Task::ServeDns(server) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            server.start()?;
            until_told_to_end()
        }
        Task::Dns(questions) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            tell(&questions.measure()?)
        }
        Task::Bulk(bulk) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            tell(&bulk.measure()?)
        }
        Task::Connects(connects) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            tell(&connects.measure()?)
        }
        Task::Refusals(refusals) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            tell(&refusals.measure()?)
        }
        Task::Flood(flood) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            flood.start()?;
            until_told_to_end()
        }
        // Three ends, which the scheduler may place.
        Task::Relay(relay) => tell(&relay.measure()?),
        Task::Requests(requests) => {
            sched_setaffinity(Pid::from_raw(0), &set)?;
            tell(&requests.measure()?)
        }
        // These wait more than they work, so the scheduler may place them.
        Task::Create(create) => tell(&create.measure()?),
        Task::Execute(execute) => tell(&execute.measure()?),
        Task::Spawn(count) => tell(&lifetime::spawn(count)?),
        Task::Policy(changes) => tell(&changes.measure()?),
    }
}

/// Until the benchmark ends or is killed.
fn until_told_to_end() -> Result<()> {
    say("ready")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn tell(measured: &impl Serialize) -> Result<()> {
    say(&serde_json::to_string(measured)?)
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// A server's certificate and key, as files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// The certificate, DER.
    pub(crate) certificate: PathBuf,
    /// The key, PKCS #8 DER.
    pub(crate) key: PathBuf,
}

/// The API and a key for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Access {
    /// Where it listens, seen from the process' namespace.
    pub(crate) api: SocketAddrV4,
    /// The key.
    pub(crate) key: String,
}
