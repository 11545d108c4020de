//! One sandbox's certificate authority, leased from the controller. Owns: the certificates that netd shows in
//! the hosts' place, valid for a day, and the bounded store of them. Its key is in memory only.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use lru::LruCache;
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType,
    date_time_ymd,
};
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::NoServerSessionStorage,
};
use sandgate_api::credential::CaLease;
use sandgate_policy::DomainName;

/// How long a certificate is good for.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// After half of it a new one is made.
const RENEWED_AFTER: Duration = Duration::from_secs(12 * 3600);
/// Begins a little earlier, for clocks inside that are behind.
const BACKDATED: Duration = Duration::from_secs(3600);
/// A clock that is set back by more makes a new one necessary, too: the old one may not be good yet.
const SET_BACK: Duration = Duration::from_secs(1800);
/// Certificates kept per sandbox.
const KEPT: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// Client limits of HTTP/2 apply after the handshake; these are offered in it.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// One sandbox's authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
    /// Which one; see [`CaLease::generation`].
    pub generation: u32,
    /// With the time at which each was made: that of the clock, by which clients judge it.
    made: Mutex<LruCache<DomainName, (SinceEpoch, Arc<ServerConfig>)>>,
}

/// Time since 1970, as the machine's clock has it at the moment.
type SinceEpoch = Duration;

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The authority or a name does not fit into a certificate.
    #[error("making a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The authority's certificate is no PEM.
    #[error("the authority's certificate cannot be read")]
    Unreadable,
    /// rustls does not take it.
    #[error("using a certificate: {0}")]
    Tls(#[from] rustls::Error),
}

impl Authority {
    /// The authority of a lease.
    ///
    /// # Errors
    /// When certificate or key cannot be read.
    pub fn new(lease: &CaLease, provider: Arc<CryptoProvider>) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(lease.key_pem.expose())?;
        let certificate = CertificateDer::from_pem_slice(lease.certificate_pem.as_bytes())
            .map_err(|_unreadable| AuthorityError::Unreadable)?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            certificate,
            provider,
            generation: lease.generation,
            made: Mutex::new(LruCache::new(KEPT)),
        })
    }

    /// What netd speaks TLS with in the place of `host`.
    ///
    /// # Errors
    /// When no certificate can be made for it.
    pub fn server(&self, host: &DomainName) -> Result<Arc<ServerConfig>, AuthorityError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.server_at(host, now.unwrap_or_default())
    }

    fn server_at(&self, host: &DomainName, now: SinceEpoch) -> Result<Arc<ServerConfig>, AuthorityError> {
        let kept = {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            made.get(host).cloned()
        };
        if let Some((made, config)) = kept
            && now + SET_BACK >= made
            && now < made + RENEWED_AFTER
        {
            return Ok(config);
        }
        let config = Arc::new(self.make(host, now)?);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.put(host.clone(), (now, Arc::clone(&config)));
        Ok(config)
    }

    fn make(&self, host: &DomainName, now: SinceEpoch) -> Result<ServerConfig, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName(host.as_str().try_into()?)];
        // A common name has room for 64 characters; clients look at the alternative names.
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Sandgate");
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + now.saturating_sub(BACKDATED);
        params.not_after = epoch + now + LIFETIME;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let chain = vec![certificate.der().clone(), self.certificate.clone()];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        // No resumption: a session must not outlive the rules under which it began.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{BasicConstraints, IsCa};
    use rustls::{
        ClientConfig, ClientConnection, RootCertStore, ServerConnection,
        pki_types::{ServerName, UnixTime},
        time_provider::TimeProvider,
    };
    use sandgate_api::credential::Sensitive;

    use super::*;
    use crate::intercept::provider;

    const HOST: &str = "ok.test";

    /// A client's clock.
    #[derive(Debug)]
    struct At(SinceEpoch);

    impl TimeProvider for At {
        fn current_time(&self) -> Option<UnixTime> {
            Some(UnixTime::since_unix_epoch(self.0))
        }
    }

    /// A sandbox's authority, and what a client has that trusts it.
    pub(crate) fn authority() -> (Authority, RootCertStore) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).expect("a certificate");
        let lease = CaLease {
            certificate_pem: certificate.pem(),
            key_pem: Sensitive::new(key.serialize_pem()),
            generation: 0,
        };
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).expect("a root");
        (Authority::new(&lease, provider()).expect("an authority"), roots)
    }

    /// Whether a client at that time takes what the server shows for the host.
    fn trusts(roots: &RootCertStore, server: &Arc<ServerConfig>, now: SinceEpoch) -> bool {
        let client = ClientConfig::builder_with_details(provider(), Arc::new(At(now)))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        let name = ServerName::try_from(HOST).expect("a name");
        let mut client = ClientConnection::new(Arc::new(client), name).expect("a client");
        let mut server = ServerConnection::new(Arc::clone(server)).expect("a server");
        while client.is_handshaking() {
            let mut said = Vec::new();
            client.write_tls(&mut said).expect("written");
            server.read_tls(&mut said.as_slice()).expect("read");
            server.process_new_packets().expect("a greeting");
            let mut said = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut said).expect("written");
            }
            client.read_tls(&mut said.as_slice()).expect("read");
            if client.process_new_packets().is_err() {
                return false;
            }
        }
        true
    }

    #[test]
    fn whatever_becomes_of_the_clock_clients_that_have_it_take_the_certificate() {
        let (authority, roots) = authority();
        let host = DomainName::parse(HOST).expect("a name");
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let start = hours(500_000);
        let mut last: Option<Arc<ServerConfig>> = None;
        for (now, is_kept) in [
            (start, false),
            (start + hours(11), true),
            (start - Duration::from_secs(1200), true),
            (start + hours(12), false),
            // Set ahead by a month, and back by a year.
            (start + hours(750), false),
            (start - hours(9_000), false),
            (start - hours(8_999), true),
            (start, false),
        ] {
            let server = authority.server_at(&host, now).expect("a certificate");
            assert!(trusts(&roots, &server, now), "{now:?}");
            let is_same = last.is_some_and(|last| Arc::ptr_eq(&last, &server));
            assert_eq!(is_same, is_kept, "{now:?}");
            last = Some(server);
        }
        let server = last.expect("the last one");
        assert!(
            !trusts(&roots, &server, start + hours(750)),
            "the test sees no difference"
        );
    }
}
