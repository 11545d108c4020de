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
use tokio::time::Instant;

/// How long a certificate is good for.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// After half of it a new one is made.
const RENEWED_AFTER: Duration = Duration::from_secs(12 * 3600);
/// Begins a little earlier, for clocks inside that are behind.
const BACKDATED: Duration = Duration::from_secs(3600);
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
    made: Mutex<LruCache<DomainName, (Instant, Arc<ServerConfig>)>>,
}

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
        let now = Instant::now();
        let kept = {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            made.get(host).cloned()
        };
        if let Some((since, config)) = kept
            && now.duration_since(since) < RENEWED_AFTER
        {
            return Ok(config);
        }
        let config = Arc::new(self.make(host)?);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.put(host.clone(), (now, Arc::clone(&config)));
        Ok(config)
    }

    fn make(&self, host: &DomainName) -> Result<ServerConfig, AuthorityError> {
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
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
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
