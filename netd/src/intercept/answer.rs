//! What netd answers in a server's place: small JSON that says why, and which one call would change it.

use bytes::Bytes;
use http::{
    Response, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
};
use http_body_util::{BodyExt as _, Full};
use sandgate_api::feed::TierName;
use sandgate_policy::{Quota, Reason};
use serde_json::{Map, Value, json};

use super::{Body, Flow, account::Account};
use crate::sandbox::{Decision, OverQuota};

/// A refusal.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) decision: Decision,
    /// For people.
    pub(crate) message: String,
    /// Whether the connection ends with it.
    pub(crate) closes: bool,
    /// In seconds.
    pub(crate) retry_after: Option<u64>,
}

impl Refusal {
    pub(crate) fn of(status: StatusCode, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status,
            decision: Decision::of(reason),
            message: message.into(),
            closes: status == StatusCode::BAD_REQUEST,
            retry_after: None,
        }
    }

    pub(crate) fn malformed(message: &str) -> Self {
        Self::of(StatusCode::BAD_REQUEST, Reason::Malformed, message)
    }

    pub(crate) fn denied(decision: Decision, message: String) -> Self {
        Self {
            status: StatusCode::FORBIDDEN,
            decision,
            message,
            closes: false,
            retry_after: None,
        }
    }

    /// A quota is used up.
    pub(crate) fn over(over: OverQuota) -> Self {
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            decision: over.decision,
            message: over.detail,
            closes: false,
            // Rounded up: who comes back then is not too early.
            retry_after: over
                .retry_after
                .map(|time| time.as_secs() + u64::from(time.subsec_nanos() > 0)),
        }
    }

    /// Records the refusal and makes the answer.
    pub(crate) fn answer(self, flow: &Flow, account: &Account, is_http1: bool) -> Response<Body> {
        account.note(self.message.clone());
        let event = account.settle(&self.decision);
        let mut body = Map::new();
        body.insert("code".to_owned(), json!("egress_refused"));
        body.insert("reason".to_owned(), json!(self.decision.reason.as_str()));
        body.insert("message".to_owned(), json!(self.message));
        for (name, value) in [
            ("rule", self.decision.rule.clone().map(Value::from)),
            ("tier", self.decision.tier.map(|tier| json!(tier))),
            ("event_id", event.clone().map(Value::from)),
            ("allow", self.allow(flow)),
        ] {
            if let Some(value) = value {
                body.insert(name.to_owned(), value);
            }
        }
        let body = Full::new(Bytes::from(Value::Object(body).to_string()));
        let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(event) = event.and_then(|event| HeaderValue::from_str(&event).ok()) {
            headers.insert("x-sandgate-event", event);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.closes && is_http1 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// The one call that would allow it, where rules forbid it.
    fn allow(&self, flow: &Flow) -> Option<Value> {
        let quota = self.decision.rule.as_deref().and_then(Quota::from_path);
        if quota.is_none() && !matches!(self.decision.reason, Reason::MethodDenied | Reason::PathDenied) {
            return None;
        }
        let call = if self.decision.tier == Some(TierName::Organization) {
            "PUT /api/v1/settings/egress".to_owned()
        } else {
            format!("PUT /api/v1/sandbox/{}/network", flow.world.sandbox_id())
        };
        let change = match &self.decision.rule {
            Some(quota) if self.decision.reason == Reason::Quota => format!("with a higher `{quota}`"),
            Some(rule) => format!("with this method and path in the `http` list of the rule {rule}"),
            None => "with a rule that has this method and path in its `http` list".to_owned(),
        };
        Some(json!(format!("{call} {change}")))
    }
}
