//! The test internet's certificate authority.

use std::sync::Arc;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Now and for long.
    Now,
    /// Years ago.
    Over,
}

/// Signs the certificates of the world's TLS servers.
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl CertificateAuthority {
    /// A fresh one, with a key of its own.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params
            .distinguished_name
            .push(DnType::CommonName, "Sandgate test world");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    /// Its certificate, for clients that shall trust it.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A TLS server's configuration with a certificate for `names`.
    ///
    /// # Errors
    /// When one of them is not a DNS name.
    pub fn server(&self, names: &[&str]) -> Result<Arc<ServerConfig>> {
        self.server_with(names, &[], Validity::Now)
    }

    /// The same with the protocols that it offers by ALPN, and a certificate that may be over.
    ///
    /// # Errors
    /// When one of `names` is not a DNS name.
    pub fn server_with(
        &self,
        names: &[&str],
        protocols: &[&str],
        validity: Validity,
    ) -> Result<Arc<ServerConfig>> {
        let (certificate, key) = self.issue(names, validity)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key.into())?;
        config.alpn_protocols = protocols
            .iter()
            .map(|protocol| protocol.as_bytes().to_vec())
            .collect();
        Ok(Arc::new(config))
    }

    /// A certificate for `names` and its key.
    ///
    /// # Errors
    /// When one of `names` is not a DNS name.
    pub fn issue(
        &self,
        names: &[&str],
        validity: Validity,
    ) -> Result<(CertificateDer<'static>, PrivatePkcs8KeyDer<'static>)> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names.clone())?;
        if validity == Validity::Over {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        params
            .distinguished_name
            .push(DnType::CommonName, names.first().map_or("server", String::as_str));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((
            certificate.der().clone(),
            PrivatePkcs8KeyDer::from(key.serialize_der()),
        ))
    }
}
