//! How many connections that stay (WebSockets, followed processes) an organisation may hold, and when they end.

use sandgate_api::id::OrgId;
use tokio_util::sync::CancellationToken;

use super::{Service, ServiceError};
use crate::places::Place;

/// Such connections of an organisation at once.
pub(super) const SOCKETS: usize = 64;

/// One of an organisation's connections that stay.
pub struct Socket {
    end: CancellationToken,
    /// Among the organisation's.
    _place: Place,
}

impl Socket {
    /// Resolves when the controller ends.
    pub async fn ended(&self) {
        self.end.cancelled().await;
    }
}

impl Service {
    /// A place for a connection that stays.
    ///
    /// # Errors
    /// When the organisation has as many as it may.
    pub fn socket(&self, org_id: &OrgId) -> Result<Socket, ServiceError> {
        let sockets = &self.shared.sockets;
        let place = sockets.take(org_id).ok_or_else(|| {
            ServiceError::TooMany(format!(
                "this organization has {} WebSockets and followed processes open, and that is as many as it may; \
                 close one first",
                sockets.each()
            ))
        })?;
        Ok(Socket {
            end: self.shared.tasks.shutdown(),
            _place: place,
        })
    }
}
