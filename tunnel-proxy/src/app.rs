//! Puts the parts together.

use anyhow::{Context as _, Result};
use sandgate_daemon::signal;

use crate::{config::Config, privileges};

/// Runs until it is told to end.
///
/// # Errors
/// When it cannot begin, or holds privileges.
pub async fn run(config: Config) -> Result<()> {
    privileges::check()?;
    let end = signal::shutdown().context("cannot listen for signals")?;
    tracing::info!(domain = config.domain, "tunnel-proxy is up");
    end.cancelled().await;
    Ok(())
}
