use proptest::prelude::*;

use super::*;
use crate::document::table::{DNS, QUOTAS, REQUESTS, RULE};
use crate::random::{ALL, Parts, any_policy};

/// Whether the value is one that the schema describes. Knows the words that [`Policy::schema`] uses, and no other.
fn fits(schema: &Value, value: &Value) -> bool {
    let schema = schema.as_object().expect("a schema");
    schema.iter().all(|(word, says)| {
        let number = || says.as_u64().expect("a number");
        let length = |length: usize| u64::try_from(length).expect("short");
        match word.as_str() {
            "title" | "description" | "default" => true,
            "type" => match says.as_str().expect("a word") {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "integer" => value.is_u64(),
                other => panic!("{other}"),
            },
            "enum" => says.as_array().expect("a list").contains(value),
            "minimum" => value.as_u64().is_some_and(|value| value >= number()),
            "maximum" => value.as_u64().is_some_and(|value| value <= number()),
            "minLength" => value
                .as_str()
                .is_some_and(|text| length(text.chars().count()) >= number()),
            "maxLength" => value
                .as_str()
                .is_some_and(|text| length(text.chars().count()) <= number()),
            "minItems" => value
                .as_array()
                .is_some_and(|list| length(list.len()) >= number()),
            "maxItems" => value
                .as_array()
                .is_some_and(|list| length(list.len()) <= number()),
            "pattern" => {
                assert_eq!(says, "^[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?$");
                let number = |text: &str| {
                    (1..=5).contains(&text.len())
                        && !text.starts_with('0')
                        && text.bytes().all(|byte| byte.is_ascii_digit())
                };
                value.as_str().is_some_and(|text| match text.split_once('-') {
                    Some((first, last)) => number(first) && number(last),
                    None => number(text),
                })
            }
            "oneOf" => {
                let one_of = says.as_array().expect("a list");
                one_of.iter().filter(|schema| fits(schema, value)).count() == 1
            }
            "items" => value
                .as_array()
                .is_some_and(|list| list.iter().all(|item| fits(says, item))),
            "required" => {
                let names = says.as_array().expect("a list");
                names
                    .iter()
                    .all(|name| value.get(name.as_str().expect("a name")).is_some())
            }
            "additionalProperties" => {
                assert_eq!(says, false);
                let known = &schema["properties"];
                value
                    .as_object()
                    .is_some_and(|object| object.keys().all(|name| known.get(name).is_some()))
            }
            "properties" => value
                .as_object()
                .is_some_and(|object| object.iter().all(|(name, value)| fits(&says[name], value))),
            other => panic!("{other}"),
        }
    })
}

fn example() -> Value {
    json!({
        "mode": "allowlist",
        "allowed_domains": ["api.example.org", "*.example.net", "*"],
        "denied_domains": ["tracker.example.net"],
        "allowed_cidrs": ["203.0.113.0/24", "2001:db8::/32"],
        "denied_cidrs": ["198.51.100.7"],
        "allowed_ports": [443],
        "rules": [
            {
                "name": "read only", "action": "allow", "domains": ["api.example.org"], "cidrs": [],
                "ports": ["443", "8000-8080", 8443], "protocol": "http", "tls": "auto",
                "http": [{"methods": ["GET"], "paths": ["/v1/**"], "upgrade": false}], "credential": "EXAMPLE_TOKEN",
            },
            {"action": "allow", "protocol": "udp", "cidrs": ["203.0.113.0/24"], "ports": ["123"]},
        ],
        "enforcement": "audit",
        "failure_mode": "fail_open",
        "ech": "allow",
        "dns": {
            "types": ["A", "TXT"], "unique_names_per_minute": 60, "query_bytes_per_minute": 8192,
            "label_max": 40, "name_max": 128,
        },
        "quotas": {"secret_uses_per_hour": 100},
        "org_id": "org-1", "updated_at": null, "revision": 7, "applied": true, "effective": [],
    })
}

#[test]
fn every_field_of_the_schema_is_read_and_no_other_is() {
    let path = |inside: &str, name: &str| format!("{inside}{name}");
    for (fields, inside) in [
        (DOCUMENT, ""),
        (RULE, "rules[0]."),
        (REQUESTS, "rules[0].http[0]."),
        (DNS, "dns."),
        (QUOTAS, "quotas."),
    ] {
        for field in fields
            .iter()
            .filter(|field| !matches!(field.shape, Shape::Anything))
        {
            // No field is a table of weights: whoever looks at it refuses that.
            let mut document = example();
            let place = match inside {
                "" => &mut document,
                "dns." => &mut document["dns"],
                "quotas." => &mut document["quotas"],
                "rules[0]." => &mut document["rules"][0],
                _ => &mut document["rules"][0]["http"][0],
            };
            place[field.name] = json!({"weight": 1});
            let error = Policy::parse(&document).expect_err(field.name);
            assert!(error.field.starts_with(&path(inside, field.name)), "{error}");
        }
    }
    let properties = Policy::schema()["properties"]
        .as_object()
        .expect("properties")
        .len();
    assert_eq!(properties, DOCUMENT.len());
}

#[test]
fn examples_fit_the_schema_and_mistakes_do_not() {
    let schema = Policy::schema();
    for document in [
        example(),
        json!({"mode": "allow_all"}),
        Policy::default().to_value(),
    ] {
        assert!(
            Policy::parse(&document).is_ok() && fits(&schema, &document),
            "{document}"
        );
    }
    for (field, value) in [
        ("mode", json!("open")),
        ("modus", json!("allow_all")),
        ("allowed_ports", json!([0])),
        ("allowed_ports", json!([70_000])),
        ("rules", json!([{"domains": ["a.test"]}])),
        (
            "rules",
            json!([{"action": "allow", "cidrs": ["203.0.113.0/24"], "ports": []}]),
        ),
        (
            "rules",
            json!([{"action": "allow", "cidrs": ["203.0.113.0/24"], "ports": ["x"]}]),
        ),
        ("dns", json!({"label_max": 64})),
        ("dns", json!({"types": ["HTTPS"]})),
        ("ech", json!(true)),
        ("quotas", json!({"upload_bytes_per_host": 0})),
        ("quotas", json!({"upload_bytes": 1})),
    ] {
        let mut document = json!({"mode": "allow_all"});
        document[field] = value;
        assert!(
            Policy::parse(&document).is_err() && !fits(&schema, &document),
            "{document}"
        );
    }
    assert!(!fits(&schema, &json!({})));
    assert_eq!(schema["properties"]["allowed_ports"]["default"], json!([443]));
    assert_eq!(
        schema["properties"]["dns"]["properties"]["label_max"]["default"],
        json!(40)
    );
}

/// Documents, and what somebody may have made of them.
fn any_document() -> impl Strategy<Value = Value> {
    let names: Vec<&str> = DOCUMENT.iter().map(|field| field.name).collect();
    let change = (proptest::sample::select(names), any_json());
    let changes = proptest::collection::vec(change, 0..3);
    (any_policy(Parts { audit: true, ..ALL }), changes).prop_map(|(policy, changes)| {
        let mut document = policy.to_value();
        for (name, value) in changes {
            document[name] = value;
        }
        document
    })
}

/// Any JSON, built of pieces that documents are built of.
fn any_json() -> impl Strategy<Value = Value> {
    const WORDS: &[&str] = &[
        "allow",
        "audit",
        "udp",
        "443",
        "9-1",
        "203.0.113.0/24",
        "::/0",
        "*",
        "*.a.test",
        "a.test",
        "GET",
        "/",
        "A",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u32..70_000).prop_map(Value::from),
        proptest::sample::select(WORDS).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    let names = [DOCUMENT, RULE, REQUESTS, DNS, QUOTAS];
    let names: Vec<String> = names
        .iter()
        .copied()
        .flatten()
        .map(|field| field.name.to_owned())
        .collect();
    leaf.prop_recursive(4, 48, 6, move |inner| {
        let name = prop_oneof![9 => proptest::sample::select(names.clone()), 1 => any::<String>()];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::hash_map(name, inner, 0..6)
                .prop_map(|object| Value::Object(object.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_the_parser_takes_the_schema_takes(document in any_document()) {
        let schema = Policy::schema();
        if let Ok(policy) = Policy::parse(&document) {
            prop_assert!(fits(&schema, &document), "{document}");
            prop_assert!(fits(&schema, &policy.to_value()));
        }
    }

    #[test]
    fn whatever_is_read_is_read_or_refused_and_reads_back(document in any_json(), changed in any_document()) {
        for document in [document, changed] {
            match Policy::parse(&document) {
                Ok(policy) => prop_assert_eq!(Policy::parse(&policy.to_value()), Ok(policy)),
                Err(error) => prop_assert!(error.to_string().len() < 1000, "{error}"),
            }
        }
    }
}
