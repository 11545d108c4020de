//! Counts how the controller answers for leases. Sees no value.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use sandgate_api::credential::{CaLease, CaRequest, CredentialLease, CredentialRequest};

use super::{LeaseEnd, LeaseKind, Metrics};
use crate::intercept::leases::{Broker, BrokerError};

/// A broker whose answers are counted.
pub struct Counted {
    /// Who gives leases.
    pub broker: Arc<dyn Broker>,
    /// Where they are counted.
    pub metrics: Metrics,
}

impl Counted {
    fn count<L>(&self, kind: LeaseKind, answer: &Result<Option<L>, BrokerError>) {
        let outcome = match answer {
            Ok(Some(_)) => LeaseEnd::Given,
            Ok(None) => LeaseEnd::Unknown,
            Err(_) => LeaseEnd::Unreachable,
        };
        self.metrics.leased(kind, outcome);
    }
}

impl Broker for Counted {
    fn credential(
        &self,
        request: CredentialRequest,
    ) -> BoxFuture<'_, Result<Option<CredentialLease>, BrokerError>> {
        Box::pin(async move {
            let answer = self.broker.credential(request).await;
            self.count(LeaseKind::Credential, &answer);
            answer
        })
    }

    fn authority(&self, request: CaRequest) -> BoxFuture<'_, Result<Option<CaLease>, BrokerError>> {
        Box::pin(async move {
            let answer = self.broker.authority(request).await;
            self.count(LeaseKind::Authority, &answer);
            answer
        })
    }
}
