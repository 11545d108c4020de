//! What netd answers in a server's place: small JSON that says why, and which one call would change it.

use bytes::Bytes;
use http::{
    Response, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue},
};
use http_body_util::{BodyExt as _, Full};
use sandgate_api::feed::TierName;
use sandgate_policy::Reason;
use serde_json::{Map, Value, json};

use super::{Body, Flow, account::Account};
use crate::sandbox::Decision;

/// A refusal.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) decision: Decision,
    /// For people.
    pub(crate) message: String,
    /// Whether the connection ends with it.
    pub(crate) closes: bool,
}

impl Refusal {
    pub(crate) fn of(status: StatusCode, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status,
            decision: Decision::of(reason),
            message: message.into(),
            closes: status == StatusCode::BAD_REQUEST,
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
        if self.closes && is_http1 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// The one call that would allow it, where rules forbid it.
    fn allow(&self, flow: &Flow) -> Option<Value> {
        if !matches!(self.decision.reason, Reason::MethodDenied | Reason::PathDenied) {
            return None;
        }
        let call = if self.decision.tier == Some(TierName::Organization) {
            "PUT /api/v1/settings/egress".to_owned()
        } else {
            format!("PUT /api/v1/sandbox/{}/network", flow.world.sandbox_id())
        };
        let change = match &self.decision.rule {
            Some(rule) => format!("with this method and path in the `http` list of the rule {rule}"),
            None => "with a rule that has this method and path in its `http` list".to_owned(),
        };
        Some(json!(format!("{call} {change}")))
    }
}
