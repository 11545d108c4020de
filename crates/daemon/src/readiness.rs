//! Ready when the last start-up guard is dropped.

use std::sync::Arc;

use tokio::sync::watch;

/// Tracks the parts of a program that must be up before it may be called ready.
#[derive(Debug, Clone)]
pub struct Readiness {
    ready: watch::Receiver<bool>,
}

/// Held by one part of the start-up. The program is ready when every clone is dropped.
#[derive(Debug, Clone)]
pub struct Pending {
    _last: Arc<Last>,
}

#[derive(Debug)]
struct Last(watch::Sender<bool>);

impl Drop for Last {
    fn drop(&mut self) {
        let _unheard = self.0.send_replace(true);
    }
}

impl Readiness {
    /// Not ready, until the guard and its clones are gone.
    pub fn new() -> (Self, Pending) {
        let (sender, ready) = watch::channel(false);
        (
            Self { ready },
            Pending {
                _last: Arc::new(Last(sender)),
            },
        )
    }

    /// Whether every part is up.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Waits until every part is up.
    pub async fn wait(&self) {
        let mut ready = self.ready.clone();
        // An error means that the sender is gone, which it is only after it has said `true`.
        let _gone = ready.wait_for(|ready| *ready).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_guard_makes_ready() {
        let (readiness, first) = Readiness::new();
        let second = first.clone();
        drop(first);
        assert!(!readiness.is_ready());
        drop(second);
        readiness.wait().await;
        assert!(readiness.is_ready());
    }
}
