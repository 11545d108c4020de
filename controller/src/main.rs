//! The `controller` program.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use controller::{
    app,
    config::{Config, ConfigError, EXIT_USAGE, Settings},
    down, invite,
    metrics::ADDRESS_VARIABLE,
    up, verify,
};
use sandgate_daemon::{metrics, telemetry};

/// API and control plane of Sandgate.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs everything on this machine: the API, netd, and whatever they need.
    Up,
    /// Serves the API; started by `up`.
    Serve,
    /// Takes every sandbox of this instance away, and what the kernel holds for it.
    Down,
    /// Looks at every record of the audit, and names what was changed since it was recorded.
    VerifyAudit,
    /// Makes an invitation to register an organisation with, whether the controller runs or not.
    Invite(invite::Invite),
    /// Becomes another program that dies with its parent; used by `up`.
    #[command(hide = true)]
    Become(up::Become),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Command::Become(program) = arguments.command {
        return failed(program.run());
    }
    if let Err(error) = telemetry::init("controller") {
        return usage(&error.to_string());
    }
    let config = match Config::new(&arguments.settings) {
        Ok(config) => config,
        Err(error @ ConfigError { .. }) => return usage(&error.to_string()),
    };
    let ended = match arguments.command {
        Command::Up => up::run(&config, &arguments.settings),
        Command::Serve => {
            let shown = match metrics::listen(ADDRESS_VARIABLE, config.metrics_addr) {
                Ok(shown) => shown,
                Err(error) => return usage(&error.to_string()),
            };
            app::Inherited::take().and_then(|inherited| {
                tokio::runtime::Builder::new_multi_thread()
                    .enable_all()
                    .build()?
                    .block_on(app::serve(config, inherited, shown))
                    .map(|()| ExitCode::SUCCESS)
            })
        }
        Command::Down => down::run(config).map(|()| ExitCode::SUCCESS),
        Command::Invite(invite) => invite.run(&config).map(|()| ExitCode::SUCCESS),
        Command::VerifyAudit => verify::run(&config),
        Command::Become(program) => return failed(program.run()),
    };
    ended.unwrap_or_else(failed)
}

fn usage(message: &str) -> ExitCode {
    complain(message);
    ExitCode::from(EXIT_USAGE)
}

fn failed(error: anyhow::Error) -> ExitCode {
    complain(&format!("{error:#}"));
    ExitCode::FAILURE
}

#[expect(
    clippy::print_stderr,
    reason = "the last words of a program, also when logging could not start"
)]
fn complain(message: &str) {
    eprintln!("controller: {message}");
}
