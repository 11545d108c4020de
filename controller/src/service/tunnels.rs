//! Tunnels: open, list, close.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    agent::AGENT_PORT,
    feed::Revision,
    id::{OrgId, SandboxId, TunnelId},
    rest::Tunnel,
    tunnel::TunnelProtocol,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;

use super::{Service, ServiceError};
use crate::{
    config::{MAX_TUNNELS, MAX_TUNNELS_OF_ORGANIZATION, Tunnels},
    ingress::Serving,
    node::Enforcement,
    store::{TunnelLimits, TunnelRecord},
};

/// How long opening and closing wait for the node and for tunnel-proxy.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest pause before looking for expired tunnels again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Random bytes of a token.
const SECRET: usize = 32;

/// What tokens begin with, so that scanners for leaked credentials know them.
const PREFIX: &str = "tk_tunnel_";

/// A tunnel to be opened, its fields in range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelRequest {
    /// The TCP port inside.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: TunnelProtocol,
    /// Seconds until it ends by itself.
    pub expires_in: u32,
    /// Whoever reaches it may use it.
    pub public: bool,
}

impl Service {
    /// Opens a tunnel, and waits until its URL works. Dropping the future closes it again.
    ///
    /// # Errors
    /// A port or protocol that cannot be served, a sandbox that does not run, a limit, a part of the system that is
    /// away; nothing is open then.
    pub async fn open_tunnel(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        request: TunnelRequest,
    ) -> Result<Tunnel, ServiceError> {
        let settings = &self.shared.config.tunnels;
        if request.port == AGENT_PORT || request.port == 0 {
            return Err(ServiceError::Invalid {
                field: "port".to_owned(),
                message: format!("no tunnel leads to port {}", request.port),
            });
        }
        if request.protocol == TunnelProtocol::Tcp && !settings.has_local_ports() {
            return Err(ServiceError::Invalid {
                field: "protocol".to_owned(),
                message: "raw TCP needs loopback ports, which there are with the domain `localhost` only"
                    .to_owned(),
            });
        }
        let sandbox = self.running(org_id, id).await?;
        let now = super::now();
        let token = if request.public { None } else { Some(token()?) };
        let record = TunnelRecord {
            id: TunnelId::random(),
            org_id: org_id.clone(),
            sandbox_id: sandbox.id,
            port: request.port,
            protocol: request.protocol,
            token_hash: token.as_deref().map(digest),
            local_port: None,
            created_at: now,
            expires_at: now + SignedDuration::from_secs(request.expires_in.into()),
        };
        let opened = self.open_to_the_end(record).await?;
        let mut tunnel = shown(opened, settings)
            .ok_or_else(|| ServiceError::Unavailable("tunnel-proxy gave the tunnel no port".to_owned()))?;
        tunnel.token = token;
        Ok(tunnel)
    }

    /// Runs to its end also when the caller goes away, and then closes the tunnel, of which nobody knows.
    async fn open_to_the_end(&self, record: TunnelRecord) -> Result<TunnelRecord, ServiceError> {
        let (sender, receiver) = oneshot::channel();
        let service = self.clone();
        self.shared.tasks.spawn("open tunnel", async move {
            let (org_id, id) = (record.org_id.clone(), record.id.clone());
            let opened = service.store_and_serve(record).await;
            if let Err(Ok(_unheard)) = sender.send(opened) {
                tracing::info!(tunnel_id = %id, "the client went away while a tunnel was opened");
                service.take_back(&org_id, &id).await;
            }
        });
        receiver.await.unwrap_or_else(|_stopped| {
            Err(ServiceError::Unavailable(
                "the controller is shutting down".to_owned(),
            ))
        })
    }

    async fn store_and_serve(&self, record: TunnelRecord) -> Result<TunnelRecord, ServiceError> {
        let of_sandbox = self.shared.config.tunnels.max_per_sandbox;
        let limits = TunnelLimits {
            of_sandbox,
            of_organization: of_sandbox.max(MAX_TUNNELS_OF_ORGANIZATION),
            in_all: MAX_TUNNELS,
        };
        let revision = self.shared.store.open_tunnel(&record, limits).await?;
        let served = self.tunnel_served(revision, &record).await;
        if let Err(error) = served {
            self.take_back(&record.org_id, &record.id).await;
            return Err(error);
        }
        tracing::info!(
            target: "audit", org_id = %record.org_id, sandbox_id = %record.sandbox_id, tunnel_id = %record.id,
            port = record.port, protocol = record.protocol.as_str(), public = record.token_hash.is_none(),
            expires_at = %record.expires_at, "tunnel opened"
        );
        let stored = self.shared.store.tunnel(&record.org_id, &record.id).await?;
        stored.ok_or_else(|| ServiceError::Conflict("the tunnel was closed while it was opened".to_owned()))
    }

    async fn tunnel_served(&self, revision: Revision, record: &TunnelRecord) -> Result<(), ServiceError> {
        let concerns = [record.sandbox_id.clone()];
        let (enforced, served) = tokio::join!(
            self.shared.node.enforced(revision, &concerns, APPLY_TIMEOUT),
            self.shared.proxy.served(revision, &record.id, APPLY_TIMEOUT),
        );
        match enforced {
            Enforcement::Applied => {}
            Enforcement::Refused(message) => {
                return Err(ServiceError::Conflict(format!(
                    "the node cannot enforce the sandbox's policy: {message}"
                )));
            }
            Enforcement::Pending => {
                return Err(ServiceError::Unavailable(
                    "the node did not open the port in time".to_owned(),
                ));
            }
        }
        match served {
            Serving::Applied => Ok(()),
            Serving::Refused(message) => Err(ServiceError::Unavailable(format!(
                "the tunnel cannot be served: {message}"
            ))),
            Serving::Pending => Err(ServiceError::Unavailable(
                "tunnel-proxy did not answer in time".to_owned(),
            )),
        }
    }

    async fn take_back(&self, org_id: &OrgId, id: &TunnelId) {
        match self.shared.store.close_tunnel(org_id, id).await {
            Ok(_closed) => {}
            Err(error) => tracing::error!(
                tunnel_id = %id,
                error = &error as &dyn std::error::Error,
                "a tunnel that could not be opened stays until it expires"
            ),
        }
        self.shared.proxy.forget(id);
    }

    /// A sandbox's open tunnels, oldest first.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn tunnels(&self, org_id: &OrgId, id: &SandboxId) -> Result<Vec<Tunnel>, ServiceError> {
        let sandbox = self.record(org_id, id).await?;
        let open = self.shared.store.open_tunnels(&sandbox.id, super::now()).await?;
        // One without a URL is just being opened.
        let settings = &self.shared.config.tunnels;
        Ok(open
            .into_iter()
            .filter_map(|record| shown(record, settings))
            .collect())
    }

    /// Closes a tunnel, of this sandbox if one is named, and waits until its connections are cut. That is for
    /// tunnel-proxy to say: to the node, the port stays open as long as another tunnel leads to it.
    ///
    /// # Errors
    /// No such sandbox or tunnel; [`ServiceError::Unavailable`] when the cut was not heard of in time: the tunnel
    /// is closed then, and closing it again waits for the cut again.
    pub async fn close_tunnel(
        &self,
        org_id: &OrgId,
        of: Option<&SandboxId>,
        id: &TunnelId,
    ) -> Result<(), ServiceError> {
        let missing = || ServiceError::NotFound(format!("tunnel {id}"));
        if let Some(sandbox_id) = of {
            self.record(org_id, sandbox_id).await?;
            let tunnel = self.shared.store.tunnel(org_id, id).await?;
            let led_to = match tunnel {
                Some(tunnel) => Some(tunnel.sandbox_id),
                None => self.not_yet_cut(org_id, id).await?.map(|(_, led_to)| led_to),
            };
            if led_to.as_ref() != Some(sandbox_id) {
                return Err(missing());
            }
        }
        let (revision, sandbox_id) = match self.shared.store.close_tunnel(org_id, id).await? {
            Some(closed) => {
                tracing::info!(
                    target: "audit", org_id = %org_id, sandbox_id = %closed.1, tunnel_id = %id, "tunnel closed"
                );
                closed
            }
            None => self.not_yet_cut(org_id, id).await?.ok_or_else(missing)?,
        };
        let concerns = [sandbox_id];
        let (enforced, served) = tokio::join!(
            self.shared.node.enforced(revision, &concerns, APPLY_TIMEOUT),
            self.shared.proxy.served(revision, id, APPLY_TIMEOUT),
        );
        if enforced == Enforcement::Pending || served == Serving::Pending {
            tracing::warn!(
                tunnel_id = %id, ?enforced, ?served,
                "a tunnel's end has not been acknowledged yet; its connections are cut as soon as it is heard of"
            );
        }
        self.shared.proxy.forget(id);
        if served == Serving::Pending {
            return Err(ServiceError::Unavailable(
                "the tunnel is closed, but tunnel-proxy did not say in time that its connections are cut"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// A tunnel that is closed, and of which tunnel-proxy has not said that it is cut.
    async fn not_yet_cut(
        &self,
        org_id: &OrgId,
        id: &TunnelId,
    ) -> Result<Option<(Revision, SandboxId)>, ServiceError> {
        let closed = self.shared.store.closed_tunnel(org_id, id).await?;
        let acknowledged = self.shared.proxy.state().acknowledged;
        Ok(closed.filter(|(revision, _)| *revision > acknowledged))
    }

    /// Takes expired tunnels away, until the controller drains.
    pub async fn retire_tunnels(self) {
        let shutdown = self.shared.tasks.shutdown();
        let mut revision = self.shared.store.watch_revision();
        loop {
            // A tunnel that is opened from here on may be the next to expire.
            revision.mark_unchanged();
            let now = super::now();
            let pause = match self.shared.store.retire_tunnels(now).await {
                Ok(next) => next.map_or(LONGEST_PAUSE, |next| pause(now, next)),
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "expired tunnels cannot be taken away"
                    );
                    LONGEST_PAUSE
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                Ok(()) = revision.changed() => {}
            }
        }
    }
}

fn pause(now: Timestamp, next: Timestamp) -> Duration {
    let left = Duration::try_from(next.duration_since(now)).unwrap_or(Duration::ZERO);
    left.clamp(Duration::from_millis(10), LONGEST_PAUSE)
}

fn token() -> Result<String, ServiceError> {
    let mut secret = [0; SECRET];
    getrandom::fill(&mut secret).map_err(|error| ServiceError::Internal(error.to_string()))?;
    Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret)))
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// None while tunnel-proxy has not given it a port, where it needs one.
fn shown(record: TunnelRecord, settings: &Tunnels) -> Option<Tunnel> {
    let label = format!("{}-{}", record.port, record.sandbox_id);
    let (scheme, domain) = (settings.scheme.as_str(), &settings.domain);
    let is_tcp = record.protocol == TunnelProtocol::Tcp;
    let (url, host_url) = if settings.has_local_ports() {
        let local_port = record.local_port?;
        let local_scheme = if is_tcp { "tcp" } else { "http" };
        let by_host = format!("{scheme}://{label}.{domain}:{}/", settings.address.port());
        // Raw TCP has no path.
        let slash = if is_tcp { "" } else { "/" };
        (
            format!("{local_scheme}://127.0.0.1:{local_port}{slash}"),
            (!is_tcp).then_some(by_host),
        )
    } else {
        (format!("{scheme}://{label}.{domain}/"), None)
    };
    Some(Tunnel {
        tunnel_id: record.id,
        sandbox_id: record.sandbox_id,
        port: record.port,
        protocol: record.protocol,
        url,
        host_url,
        public: record.token_hash.is_none(),
        token: None,
        created_at: record.created_at,
        expires_at: record.expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Scheme;

    fn settings(domain: &str, scheme: Scheme) -> Tunnels {
        Tunnels {
            address: "127.0.0.1:8081".parse().expect("an address"),
            domain: domain.to_owned(),
            scheme,
            user: 60_742,
            max_per_sandbox: 16,
        }
    }

    fn record(protocol: TunnelProtocol, local_port: Option<u16>) -> TunnelRecord {
        let now = Timestamp::now();
        TunnelRecord {
            id: TunnelId::random(),
            org_id: OrgId::random(),
            sandbox_id: "sandbox-1".parse().expect("an id"),
            port: 3000,
            protocol,
            token_hash: None,
            local_port,
            created_at: now,
            expires_at: now,
        }
    }

    #[test]
    fn a_url_is_what_can_be_reached() {
        let local = settings("localhost", Scheme::Http);
        let urls = |record, settings| shown(record, settings).map(|tunnel| (tunnel.url, tunnel.host_url));
        for protocol in [TunnelProtocol::Http, TunnelProtocol::H2c] {
            assert_eq!(
                urls(record(protocol, Some(40_001)), &local),
                Some((
                    "http://127.0.0.1:40001/".to_owned(),
                    Some("http://3000-sandbox-1.localhost:8081/".to_owned())
                ))
            );
        }
        assert_eq!(
            urls(record(TunnelProtocol::Tcp, Some(40_001)), &local),
            Some(("tcp://127.0.0.1:40001".to_owned(), None))
        );
        assert_eq!(urls(record(TunnelProtocol::Http, None), &local), None, "not yet");
        let public = settings("tunnels.example.org", Scheme::Https);
        assert_eq!(
            urls(record(TunnelProtocol::Http, None), &public),
            Some(("https://3000-sandbox-1.tunnels.example.org/".to_owned(), None))
        );
    }

    #[test]
    fn a_token_cannot_be_guessed_and_its_digest_is_of_its_text() {
        let (one, other) = (token().expect("random"), token().expect("random"));
        assert_ne!(one, other);
        assert_eq!(one.len(), PREFIX.len() + 43, "256 bits in base64: {one}");
        assert_eq!(
            hex::encode(digest("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
