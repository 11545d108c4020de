//! A sandbox's quotas, as flows and requests ask for them. Decides by the rules in force, under the sandbox's lock.

use std::{
    net::IpAddr,
    sync::{Arc, MutexGuard, PoisonError},
    time::Instant,
};

use sandgate_policy::{DomainName, Quota};
use sandgate_relay::allowance::Allowance;

use super::{
    Decision, Sandbox, seconds,
    spending::{Host, OverQuota, Spending, over_upload},
};

/// Leave to send to one host, as far as its quota goes. Only [`Sandbox::meet`] makes it; dropping it takes the flow out of
/// the books.
pub struct Met {
    sandbox: Arc<Sandbox>,
    host: Host,
    upload: Arc<Allowance>,
    /// The denial of a tier in audit mode, if this is one host too many for it.
    pub noted: Option<Decision>,
}

impl Sandbox {
    /// Whom a flow is for: the name under which it was admitted, else the only one of its address, else that.
    pub fn host(&self, name: Option<&DomainName>, address: IpAddr) -> Host {
        if let Some(name) = name {
            return Host::Name(name.clone());
        }
        let mut state = self.lock();
        match state.enforced.pins().names(address, seconds()).as_slice() {
            [only] => Host::Name(only.clone()),
            _ => Host::Address(address.to_canonical()),
        }
    }

    /// Counts a flow to a host in.
    ///
    /// # Errors
    /// When the host is one too many, or may get nothing any more.
    pub fn meet(self: &Arc<Self>, host: Host) -> Result<Met, OverQuota> {
        let state = self.lock();
        let met = self
            .spending()
            .meet(state.enforced.rules(), &host, Instant::now());
        drop(state);
        let (upload, noted) = met?;
        Ok(Met {
            sandbox: Arc::clone(self),
            host,
            upload,
            noted,
        })
    }

    /// Counts a request in, into which these secrets are put. The denial of a tier in audit mode, if they are too many
    /// for it.
    ///
    /// # Errors
    /// When one of them was used as often as it may be; then none is counted.
    pub fn use_secrets<'a>(
        &self,
        secrets: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Option<Decision>, OverQuota> {
        let state = self.lock();
        self.spending()
            .use_secrets(state.enforced.rules(), secrets, Instant::now())
    }

    pub(super) fn spending(&self) -> MutexGuard<'_, Spending> {
        self.spending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Met {
    /// What may still go to the host.
    pub fn upload(&self) -> &Arc<Allowance> {
        &self.upload
    }

    /// Why no more may go there.
    pub fn over(&self) -> OverQuota {
        over_upload(self.sandbox.lock().enforced.rules())
    }

    /// The denial of a tier in audit mode, if more went to the host than it allows.
    pub fn beyond(&self) -> Option<Decision> {
        let state = self.sandbox.lock();
        let rules = state.enforced.rules();
        let decision = rules.judge_quota(Quota::UploadBytesPerHost, self.upload.used());
        Some(decision).filter(Decision::is_audited)
    }
}

impl Drop for Met {
    fn drop(&mut self) {
        self.sandbox.spending().part(&self.host);
    }
}
