//! Structured logs on standard error.

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// Filter directives, for example `info,netd=debug`. Default: `info`.
pub const FILTER_VARIABLE: &str = "SANDGATE_LOG";

/// `text` (default) or `json`.
pub const FORMAT_VARIABLE: &str = "SANDGATE_LOG_FORMAT";

/// The logs cannot be set up as asked.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("{FILTER_VARIABLE}: {0}")]
    Filter(#[source] tracing_subscriber::filter::ParseError),
    /// The format is none of ours.
    #[error("{FORMAT_VARIABLE}: expected `text` or `json`, got `{0}`")]
    Format(String),
    /// Somebody was here before.
    #[error("logs are set up twice")]
    AlreadySet(#[source] tracing_subscriber::util::TryInitError),
}

/// Starts logging for the whole process.
///
/// # Errors
/// When an environment variable is malformed, or logging has been started already.
pub fn init(program: &'static str) -> Result<(), TelemetryError> {
    let set = |variable| std::env::var(variable).ok().filter(|value| !value.is_empty());
    let filter = match set(FILTER_VARIABLE) {
        Some(directives) => EnvFilter::try_new(directives).map_err(TelemetryError::Filter)?,
        None => EnvFilter::new("info"),
    };
    let format = set(FORMAT_VARIABLE).unwrap_or_else(|| "text".to_owned());
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format.as_str() {
        "text" => registry
            .with(fmt::layer().with_writer(std::io::stderr).with_ansi(false))
            .try_init(),
        "json" => registry
            .with(
                fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_writer(std::io::stderr),
            )
            .try_init(),
        other => return Err(TelemetryError::Format(other.to_owned())),
    };
    started.map_err(TelemetryError::AlreadySet)?;
    tracing::debug!(program, version = env!("CARGO_PKG_VERSION"), "logging");
    Ok(())
}
