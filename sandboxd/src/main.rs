//! `sandboxd`: PID 1 of a sandbox. Takes its key from standard input, listens, serves until SIGTERM.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context as _;
use sandboxd::{children::Children, init, key::Key, server::Server};
use sandgate_api::agent::AGENT_PORT;
use sandgate_daemon::{signal, tasks::Tasks, telemetry};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    init::harden().context("hardening this process")?;
    let key = Key::take(std::io::stdin()).context("reading the key from standard input")?;
    // The environment is the tenant's: a filter that does not parse must not keep the sandbox from starting.
    let unlogged = telemetry::init("sandboxd");
    let address = listen_address(std::env::args().skip(1))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let tasks = Tasks::new(signal::shutdown().context("installing signal handlers")?);
        let children = Children::start(&tasks).context("watching for children that end")?;
        let server = Server::bind(address, key, children.clone()).await?;
        // Closes the pipe that brought the key. Whoever holds its other end sees that the agent listens.
        init::forget_standard_input().context("replacing standard input")?;
        tracing::debug!(%address, logged = unlogged.is_ok(), "listening");
        server.serve(&tasks).await;
        init::end_everything(&children).await;
        Ok(())
    })
}

/// `--listen <address>:<port>`; every address and the agent's port without it.
fn listen_address(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<SocketAddr> {
    match (arguments.next().as_deref(), arguments.next(), arguments.next()) {
        (None, None, None) => Ok(SocketAddr::from(([0, 0, 0, 0], AGENT_PORT))),
        (Some("--listen"), Some(address), None) => {
            address.parse().with_context(|| format!("--listen {address}"))
        }
        (_, _, _) => anyhow::bail!("usage: sandboxd [--listen <address>:<port>] < key"),
    }
}
