//! The node daemon's program: arguments, logs, runtime. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;
use netd::{
    app,
    config::{Arguments, Config},
    kernel,
    metrics::ADDRESS_VARIABLE,
    uplink::Uplink,
};
use sandgate_daemon::{metrics, telemetry};

/// `EX_USAGE` of sysexits.h: the configuration is wrong, and starting again will not help.
const USAGE: u8 = 64;

#[expect(
    clippy::print_stderr,
    reason = "there are no logs before the configuration is read"
)]
fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing is left to tell anybody when the terminal is gone.
            let _unprinted = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if arguments.remove_uplink {
        return match Uplink::take_away(&arguments.run_dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("netd: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let check = arguments.check;
    let config = match Config::try_from(arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("netd: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if check {
        return match kernel::prove(config.attach) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("netd: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let shown = match metrics::listen(ADDRESS_VARIABLE, config.metrics_addr) {
        Ok(shown) => shown,
        Err(error) => {
            eprintln!("netd: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if let Err(error) = telemetry::init("netd") {
        eprintln!("netd: {error}");
        return ExitCode::from(USAGE);
    }
    // Before the runtime: what it gives up, every thread of the runtime has never had.
    let ground = match app::Ground::lay(&config) {
        Ok(ground) => ground,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "netd cannot begin");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(app::run(config, ground, shown)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "netd ends");
            ExitCode::FAILURE
        }
    }
}
