//! The egress audit.

use axum::{Json, extract::State, response::Response};
use http::{HeaderMap, HeaderValue};
use sandgate_api::{
    audit::{AlertKind, AuditVerdict},
    error::ErrorEnvelope,
    id::SandboxId,
    rest::{AuditPage, AuditRecord, AuditVerification},
};

use super::{auth::Authenticated, error::ApiError, query::Parameters, sse};
use crate::{
    service::{Scope, Service},
    store::AuditFilter,
};

/// Which records are wanted. Never constructed: [`filter`] reads them one by one.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "a description, not values")]
struct Selection {
    /// Of one sandbox
    sandbox_id: Option<String>,
    /// For one name
    host: Option<String>,
    /// `allow` or `deny`
    decision: Option<String>,
    /// `false`: what went through although a tier in audit mode denies it
    enforced: Option<bool>,
    /// `any`: what somebody should look at; or one kind of it
    alert: Option<String>,
    /// Not before: RFC 3339, or seconds since 1970
    since: Option<String>,
}

/// Lists what sandboxes tried to reach, and what was decided.
#[utoipa::path(
    get, path = "/egress/audit", operation_id = "list_egress_audit", tag = "network",
    params(
        Selection,
        ("until" = Option<String>, Query, description = "Before"),
        ("offset" = Option<u32>, Query, description = "How many to skip"),
        ("limit" = Option<u32>, Query, description = "At most so many, 1 to 1000"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before")
    ),
    responses((status = 200, description = "A page, newest first", body = AuditPage))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<AuditPage>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(Json(service.audit(caller.org_id(), &filter(&parameters)?).await?))
}

/// Sends records as they are stored, as server-sent events. Each event's id is its position: give the last one back as
/// `cursor`, or as the header `Last-Event-ID`, and nothing is missed. Without either, records follow from now on, or, with
/// `since`, from then. A record with an `alert` comes a second time before that, as an event `security.alert` without id.
#[utoipa::path(
    get, path = "/egress/audit/stream", operation_id = "stream_egress_audit", tag = "network",
    params(
        Selection,
        ("cursor" = Option<String>, Query, description = "The id of the last event that was seen"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same; it wins")
    ),
    responses(
        (status = 200, description = "Records, one an event", body = AuditRecord, content_type = "text/event-stream"),
        (status = 429, description = "The organisation follows 16 streams already", body = ErrorEnvelope)
    )
)]
pub(super) async fn stream(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkRead)?;
    let filter = filter(&parameters)?;
    let after =
        match headers.get("last-event-id") {
            None => filter.before,
            Some(id) => Some(position(id).ok_or_else(|| {
                ApiError::field("last-event-id", "expected the id of an event of this stream")
            })?),
        };
    let trail = service.follow_audit(caller.org_id(), filter, after).await?;
    Ok(sse::records(trail))
}

fn position(id: &HeaderValue) -> Option<i64> {
    let position = id.to_str().ok()?.parse().ok()?;
    (position >= 0).then_some(position)
}

/// Verifies that no record was edited, removed, inserted or put elsewhere since it was stored.
#[utoipa::path(
    get, path = "/egress/audit/verify", operation_id = "verify_egress_audit", tag = "network",
    responses((status = 200, description = "What was found, also when records were changed", body = AuditVerification))
)]
pub(super) async fn verify(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<AuditVerification>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(Json(service.verify_audit(caller.org_id()).await?))
}

fn filter(parameters: &Parameters) -> Result<AuditFilter, ApiError> {
    let sandbox_id = match parameters.text("sandbox_id") {
        None => None,
        Some(text) => Some(
            text.parse::<SandboxId>()
                .map_err(|error| ApiError::field("sandbox_id", error.to_string()))?,
        ),
    };
    let enforced = match parameters.text("enforced") {
        None => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(_) => return Err(ApiError::field("enforced", "expected `true` or `false`")),
    };
    let verdicts: &[AuditVerdict] = match (parameters.text("decision"), enforced) {
        (None, None) => &[],
        (None, Some(true)) => &[AuditVerdict::Allow, AuditVerdict::Deny],
        (Some("allow"), None | Some(true)) => &[AuditVerdict::Allow],
        (Some("deny"), None) => &[AuditVerdict::Deny, AuditVerdict::Audit],
        (Some("deny"), Some(true)) => &[AuditVerdict::Deny],
        (None | Some("deny"), Some(false)) => &[AuditVerdict::Audit],
        (Some("allow"), Some(false)) => {
            return Err(ApiError::field(
                "enforced",
                "what is allowed is not a denial that could be carried out",
            ));
        }
        (Some(_), _) => return Err(ApiError::field("decision", "expected `allow` or `deny`")),
    };
    Ok(AuditFilter {
        sandbox_id,
        host: parameters
            .text("host")
            .map(|host| host.trim_end_matches('.').to_lowercase()),
        verdicts,
        alerts: alerts(parameters.text("alert"))?,
        since: parameters.time("since")?,
        until: parameters.time("until")?,
        before: parameters.cursor()?,
        offset: parameters.whole("offset", 0..=1_000_000)?.unwrap_or(0),
        limit: parameters.whole("limit", 1..=1_000)?.unwrap_or(50),
    })
}

fn alerts(wanted: Option<&str>) -> Result<&'static [AlertKind], ApiError> {
    let Some(wanted) = wanted else { return Ok(&[]) };
    if wanted == "any" {
        return Ok(AlertKind::ALL);
    }
    let place = AlertKind::ALL.iter().position(|kind| kind.as_str() == wanted);
    place.map(|at| &AlertKind::ALL[at..=at]).ok_or_else(|| {
        let words: Vec<&str> = AlertKind::ALL.iter().map(|kind| kind.as_str()).collect();
        ApiError::field("alert", format!("expected `any` or one of {}", words.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(query: &str) -> Result<AuditFilter, ApiError> {
        let request = http::Request::builder()
            .uri(format!("/x?{query}"))
            .body(())
            .expect("a request");
        filter(&Parameters::of(&request.into_parts().0)?)
    }

    #[test]
    fn every_filter_is_understood() {
        let query = "sandbox_id=sandbox-0a&host=API.Example.org.&decision=deny&since=0&until=10&limit=7&offset=3&cursor=9";
        let filter = filtered(query).expect("a filter");
        assert_eq!(filter.sandbox_id.map(String::from).as_deref(), Some("sandbox-0a"));
        assert_eq!(filter.host.as_deref(), Some("api.example.org"));
        assert_eq!(filter.verdicts, [AuditVerdict::Deny, AuditVerdict::Audit]);
        assert_eq!((filter.limit, filter.offset, filter.before), (7, 3, Some(9)));
        assert_eq!(filtered("").expect("defaults").limit, 50);
        let audited = filtered("enforced=false").expect("a filter");
        assert_eq!(audited.verdicts, [AuditVerdict::Audit]);
        assert_eq!(
            filtered("alert=scanning").expect("a filter").alerts,
            [AlertKind::Scanning]
        );
        assert_eq!(filtered("alert=any").expect("a filter").alerts, AlertKind::ALL);
        let carried_out = filtered("decision=deny&enforced=true").expect("a filter");
        assert_eq!(carried_out.verdicts, [AuditVerdict::Deny]);
    }

    #[test]
    fn a_refusal_names_the_parameter() {
        for (query, field) in [
            ("sandbox_id=x", "sandbox_id"),
            ("decision=audit", "decision"),
            ("enforced=maybe", "enforced"),
            ("alert=true", "alert"),
            ("decision=allow&enforced=false", "enforced"),
            ("since=x", "since"),
            ("until=x", "until"),
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("offset=-1", "offset"),
            ("cursor=x", "cursor"),
        ] {
            let error = filtered(query).expect_err("refused");
            assert_eq!(error.refused_field().as_deref(), Some(field), "{query}");
        }
    }
}
