//! What a document says of how much may be done: `quotas`.

use crate::{
    document::{
        fields::Fields,
        table::{self, HOSTS_PER_HOUR, UPLOAD_BYTES, USES_PER_HOUR},
    },
    error::PolicyError,
    quota::{Quota, Quotas},
};

pub(super) fn quotas(document: &Fields<'_>) -> Result<Quotas, PolicyError> {
    let Some(value) = document.get("quotas") else {
        return Ok(Quotas::default());
    };
    let fields = Fields::of(value, document.path("quotas"), table::QUOTAS)?;
    Ok(Quotas {
        upload_bytes_per_host: fields.whole(Quota::UploadBytesPerHost.field(), UPLOAD_BYTES)?,
        new_hosts_per_hour: fields.whole(Quota::NewHostsPerHour.field(), HOSTS_PER_HOUR)?,
        secret_uses_per_hour: fields.whole(Quota::SecretUsesPerHour.field(), USES_PER_HOUR)?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{Policy, Quotas};

    fn refused(document: &Value) -> (String, String) {
        let error = Policy::parse(document).expect_err("the document was accepted");
        (error.field, error.message)
    }

    #[test]
    fn quotas_are_read_strictly_and_come_back_from_the_store() {
        let document = |quotas: Value| json!({"mode": "allow_all", "quotas": quotas});
        let parsed = |quotas: Value| Policy::parse(&document(quotas)).expect("a policy");
        let all =
            json!({"upload_bytes_per_host": 1_048_576, "new_hosts_per_hour": 20, "secret_uses_per_hour": 1});
        let policy = parsed(all.clone());
        assert_eq!(
            policy.quotas(),
            Quotas {
                upload_bytes_per_host: Some(1_048_576),
                new_hosts_per_hour: Some(20),
                secret_uses_per_hour: Some(1),
            }
        );
        assert_eq!(policy.to_value()["quotas"], all);
        let stored = serde_json::to_string(&policy).expect("written");
        assert_eq!(
            serde_json::from_str::<Policy>(&stored).expect("read back"),
            policy
        );
        assert_eq!(parsed(json!({})), Policy::default());
        assert_eq!(Policy::default().to_value()["quotas"], json!({}));
        for (quotas, field, says) in [
            (json!([]), "quotas", "an object"),
            (
                json!({"upload_bytes_per_host": 0}),
                "quotas.upload_bytes_per_host",
                "a whole number",
            ),
            (
                json!({"upload_bytes_per_host": "1 MiB"}),
                "quotas.upload_bytes_per_host",
                "a whole number",
            ),
            (
                json!({"new_hosts_per_hour": 10_001}),
                "quotas.new_hosts_per_hour",
                "from 1 to 10000",
            ),
            (
                json!({"secret_uses_per_hour": 1.5}),
                "quotas.secret_uses_per_hour",
                "a whole number",
            ),
            (
                json!({"secret_uses_per_hour": null}),
                "quotas.secret_uses_per_hour",
                "a whole number",
            ),
            (
                json!({"upload_byte_per_host": 1}),
                "quotas.upload_byte_per_host",
                "did you mean `upload_bytes_per_host`?",
            ),
        ] {
            let (at, message) = refused(&document(quotas));
            assert_eq!(at, field);
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn what_cannot_be_counted_is_refused_by_its_rule() {
        let document = |quotas: Value, action: &str| {
            json!({"mode": "allowlist", "quotas": quotas, "rules": [
                {"action": "deny", "domains": ["evil.test"]},
                {"action": action, "protocol": "udp", "cidrs": ["203.0.113.0/24"], "ports": ["123"]},
            ]})
        };
        for quotas in [
            json!({"upload_bytes_per_host": 1000}),
            json!({"new_hosts_per_hour": 1}),
        ] {
            let (field, message) = refused(&document(quotas.clone(), "allow"));
            assert_eq!(field, "rules[1].protocol");
            assert!(message.contains("datagrams are not counted"), "{message}");
            assert!(Policy::parse(&document(quotas, "deny")).is_ok());
        }
        assert!(Policy::parse(&document(json!({"secret_uses_per_hour": 1}), "allow")).is_ok());
    }
}
