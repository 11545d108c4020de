//! What a rule asks of what is inside a flow: `tls`, `http`, `credential`.

use serde_json::Value;

use crate::{
    document::{
        Action, Inside, Rule, RuleProtocol, Tls,
        fields::{Fields, expected},
        table::{self, MAX_HTTP, MAX_SECRET_NAME},
    },
    error::PolicyError,
    request::{self, RequestPattern},
};

pub(super) fn inside(fields: &Fields<'_>) -> Result<Inside, PolicyError> {
    Ok(Inside {
        tls: fields.word("tls", Tls::ALL)?.unwrap_or(Tls::Auto),
        http: fields.list("http", MAX_HTTP, requests)?.unwrap_or_default(),
        credential: credential(fields)?,
    })
}

fn requests(path: String, value: &Value) -> Result<RequestPattern, PolicyError> {
    let fields = Fields::of(value, path.clone(), table::REQUESTS)?;
    let methods = fields.list("methods", request::MAX_METHODS, text("a method such as \"GET\""))?;
    let paths = fields.list("paths", request::MAX_PATHS, text("a path such as \"/repos/**\""))?;
    let upgrade = match fields.get("upgrade") {
        None => false,
        Some(Value::Bool(upgrade)) => *upgrade,
        Some(value) => return Err(expected(fields.path("upgrade"), "true or false", value)),
    };
    RequestPattern::new(&methods.unwrap_or_default(), &paths.unwrap_or_default(), upgrade)
        .map_err(|error| error.under(&path))
}

fn text(expectation: &'static str) -> impl Fn(String, &Value) -> Result<String, PolicyError> {
    move |path, value| match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(expected(path, expectation, value)),
    }
}

fn credential(fields: &Fields<'_>) -> Result<Option<String>, PolicyError> {
    let Some(value) = fields.get("credential") else {
        return Ok(None);
    };
    let plain = |name: &str| {
        (1..=MAX_SECRET_NAME).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    match value.as_str().filter(|name| plain(name)) {
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(expected(fields.path("credential"), "the name of a secret", value)),
    }
}

/// Only flows that an allow rule knows by the name they show can be read: the rest has no name to answer for.
pub(super) fn check(fields: &Fields<'_>, rule: &Rule) -> Result<(), PolicyError> {
    let Inside {
        tls,
        http,
        credential,
    } = &*rule.inside;
    let asked = [
        ("http", !http.is_empty()),
        ("credential", credential.is_some()),
        ("tls", *tls == Tls::Intercept),
    ];
    let Some((field, _)) = asked.into_iter().find(|(_, asked)| *asked) else {
        return match (tls, rule.action, rule.protocol) {
            (Tls::Splice, Action::Deny, _) => fields.refuse("tls", "means nothing in a rule that denies"),
            (Tls::Splice, Action::Allow, RuleProtocol::Udp) => fields.refuse("tls", "means nothing on UDP"),
            (Tls::Auto | Tls::Splice | Tls::Intercept, Action::Allow | Action::Deny, _) => Ok(()),
        };
    };
    if rule.action == Action::Deny {
        return fields.refuse(
            field,
            "belongs into a rule that allows; requests that it does not list are denied",
        );
    }
    if let RuleProtocol::Tcp | RuleProtocol::Udp = rule.protocol {
        let word = rule.protocol.as_str();
        return fields.refuse(
            field,
            format!("needs protocol \"http\": nobody looks into \"{word}\""),
        );
    }
    if !rule.cidrs.is_empty() {
        return fields.refuse(
            field,
            "cannot be asked of `cidrs`, where flows need show no name; name the hosts in `domains`",
        );
    }
    if *tls == Tls::Splice {
        return fields.refuse(
            "tls",
            format!("\"splice\" forwards unread, and `{field}` needs a look inside; use \"auto\""),
        );
    }
    Ok(())
}
