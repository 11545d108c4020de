//! What a document says of DNS: `dns`.

use serde_json::Value;

use crate::{
    dns::{DnsBudget, DnsType, DnsTypes},
    document::{
        fields::{Fields, expected},
        table::{self, BYTES_PER_MINUTE, LABEL, NAME, NAMES_PER_MINUTE},
    },
    error::PolicyError,
};

pub(super) fn dns(document: &Fields<'_>) -> Result<DnsBudget, PolicyError> {
    let default = DnsBudget::default();
    let Some(value) = document.get("dns") else {
        return Ok(default);
    };
    let fields = Fields::of(value, document.path("dns"), table::DNS)?;
    let types = fields.list("types", DnsType::ALL.len(), kind)?;
    let small = |value: u64| u8::try_from(value).expect("the range ends below 256");
    let large = |value: u64| u32::try_from(value).expect("the range ends below 2^32");
    Ok(DnsBudget {
        types: types.map_or(default.types, |types| types.into_iter().collect::<DnsTypes>()),
        unique_names_per_minute: fields
            .whole("unique_names_per_minute", NAMES_PER_MINUTE)?
            .map_or(default.unique_names_per_minute, large),
        query_bytes_per_minute: fields
            .whole("query_bytes_per_minute", BYTES_PER_MINUTE)?
            .map_or(default.query_bytes_per_minute, large),
        label_max: fields.whole("label_max", LABEL)?.map_or(default.label_max, small),
        name_max: fields.whole("name_max", NAME)?.map_or(default.name_max, small),
    })
}

fn kind(path: String, value: &Value) -> Result<DnsType, PolicyError> {
    if let Some(text @ ("HTTPS" | "SVCB")) = value.as_str() {
        let message =
            format!("\"{text}\" is never answered: it hands out keys that hide names, and hints at QUIC");
        return Err(PolicyError::new(path, message));
    }
    let known = DnsType::ALL.iter().find(|(word, _)| value.as_str() == Some(word));
    known.map(|(_, kind)| *kind).ok_or_else(|| {
        let words: Vec<&str> = DnsType::ALL.iter().map(|(word, _)| *word).collect();
        expected(path, &format!("one of {}", words.join(", ")), value)
    })
}
