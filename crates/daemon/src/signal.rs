//! SIGTERM and SIGINT ask for a drain; a second one ends the process at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Listens for SIGTERM and SIGINT. The token is cancelled by the first; the second exits with 130.
///
/// Must be called inside a tokio runtime.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn shutdown() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    #[expect(clippy::disallowed_methods, reason = "the one task that outlives every drain")]
    tokio::spawn(async move {
        for attempt in 0_u8..2 {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if attempt == 0 {
                tracing::info!(
                    signal = name,
                    "shutting down; a second signal ends the process at once"
                );
                cancelled.cancel();
            }
        }
        std::process::exit(130);
    });
    Ok(token)
}
