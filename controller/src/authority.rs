//! The certificate authority of one sandbox: what the sandbox trusts, so that netd can speak in a host's place.
//!
//! Its key is derived from the installation's key, the sandbox's id and a generation, and stored nowhere. It
//! signs for this sandbox only, because no other one trusts it.

use aws_lc_rs::{
    agreement::{ECDH_P256, PrivateKey},
    encoding::{AsDer as _, EcPrivateKeyRfc5915Der},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    SerialNumber, date_time_ymd,
};
use sandgate_api::{credential::Sensitive, id::SandboxId};

use crate::installation::InstallationKey;

/// The generation of a new sandbox's authority. Sandboxes of generation 0 have none.
pub const FIRST_GENERATION: u32 = 1;

/// Days before the sandbox's creation from which the certificate is valid: clocks differ.
const DAYS_BEFORE: i64 = 2;

/// Days after the sandbox's creation until which it is valid.
const DAYS_AFTER: i64 = 3_650;

/// A derived number is a private key of the curve but for one time in 2^32; how often the next one is tried.
const ATTEMPTS: u32 = 8;

/// The authority could not be made. Never the sandbox's doing.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// No derived number is a key of the curve.
    #[error("no certificate authority key can be derived")]
    Key,
    /// The certificate cannot be written.
    #[error("the certificate of an authority cannot be made: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// A sandbox's authority.
#[derive(Debug)]
pub struct Authority {
    key: KeyPair,
    params: CertificateParams,
}

impl Authority {
    /// Derives the authority.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn derive(
        installation: &InstallationKey,
        id: &SandboxId,
        generation: u32,
        created_at: Timestamp,
    ) -> Result<Self, AuthorityError> {
        let private = (0..ATTEMPTS)
            .find_map(|attempt| {
                let label = format!("certificate authority key 1 {id} {generation} {attempt}");
                PrivateKey::from_private_key(&ECDH_P256, &installation.expand(&label)).ok()
            })
            .ok_or(AuthorityError::Key)?;
        let der: EcPrivateKeyRfc5915Der<'_> = private.as_der().map_err(|_unspecified| AuthorityError::Key)?;
        let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, der.as_ref())
            .map_err(|_rejected| AuthorityError::Key)?;
        let document = pair.to_pkcs8v1().map_err(|_unspecified| AuthorityError::Key)?;
        let key = KeyPair::try_from(document.as_ref())?;

        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = name(id, generation);
        let (first, last) = (day(created_at, -DAYS_BEFORE), day(created_at, DAYS_AFTER));
        params.not_before = date_time_ymd(first.0, first.1, first.2);
        params.not_after = date_time_ymd(last.0, last.1, last.2);
        let mut serial = installation.expand(&format!("certificate authority serial 1 {id} {generation}"));
        // A positive number of at most 20 octets (RFC 5280, 4.1.2.2), without a leading zero.
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from(serial[..16].to_vec()));
        Ok(Self { key, params })
    }

    /// The certificate, PEM. Signed anew by each call: whoever must show the same one again stores it.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn certificate(&self) -> Result<String, AuthorityError> {
        Ok(self.params.self_signed(&self.key)?.pem())
    }

    /// The private key, PKCS #8 PEM.
    pub fn key(&self) -> Sensitive {
        Sensitive::new(self.key.serialize_pem())
    }
}

fn name(id: &SandboxId, generation: u32) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Sandgate");
    name.push(DnType::CommonName, format!("Sandgate {id} {generation}"));
    name
}

/// Year, month and day in UTC; certificates have no use for more.
fn day(time: Timestamp, days: i64) -> (i32, u8, u8) {
    let moved = time
        .saturating_add(SignedDuration::from_hours(days * 24))
        .unwrap_or(time);
    let date = moved.to_zoned(TimeZone::UTC).date();
    (
        i32::from(date.year()),
        date.month().unsigned_abs(),
        date.day().unsigned_abs(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyfile::LENGTH;

    fn derived(installation: u8, id: &SandboxId, generation: u32) -> Authority {
        let key = InstallationKey::from_key([installation; LENGTH]);
        Authority::derive(&key, id, generation, Timestamp::UNIX_EPOCH).expect("an authority")
    }

    #[test]
    fn the_key_depends_on_everything_and_on_nothing_else() {
        let (one, other) = (SandboxId::random(), SandboxId::random());
        let key = derived(1, &one, 1).key();
        assert!(key.expose().starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_eq!(derived(1, &one, 1).key(), key);
        for different in [derived(2, &one, 1), derived(1, &other, 1), derived(1, &one, 2)] {
            assert_ne!(different.key(), key);
        }
    }

    #[test]
    fn the_certificate_is_of_the_key() {
        let authority = derived(1, &SandboxId::random(), 1);
        let certificate = authority.certificate().expect("a certificate");
        assert!(
            certificate.starts_with("-----BEGIN CERTIFICATE-----"),
            "{certificate}"
        );
        let text: String = certificate
            .lines()
            .filter(|line| !line.starts_with('-'))
            .collect();
        let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text).expect("base64");
        let public = authority.key.public_key_raw();
        assert!(der.windows(public.len()).any(|window| window == public));
        assert!(!format!("{authority:?}").contains("PRIVATE"));
    }

    #[test]
    fn it_is_valid_before_and_long_after_the_creation() {
        let new_year: Timestamp = "2027-01-01T00:30:00Z".parse().expect("a time");
        assert_eq!(day(new_year, -DAYS_BEFORE), (2026, 12, 30));
        assert_eq!(day(new_year, DAYS_AFTER), (2036, 12, 29));
    }
}
