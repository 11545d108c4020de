//! What people ask of the egress audit afterwards.

use axum::{Json, extract::State};
use sandgate_api::rest::{Explanation, Simulation, Suggestion};

use super::{
    auth::Authenticated,
    bodies::{SimulateBody, SpanBody},
    document::Document,
    error::ApiError,
    path::{EventPath, SandboxPath},
};
use crate::service::{Scope, Service, Span};

/// Says why a record of the egress audit says what it says, and which call would allow it.
#[utoipa::path(
    get, path = "/egress/audit/{id}/explain", operation_id = "explain_egress", tag = "network",
    responses((status = 200, description = "Why, and what would allow it", body = Explanation))
)]
pub(super) async fn explain(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    EventPath(id): EventPath,
) -> Result<Json<Explanation>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(Json(service.explain(caller.org_id(), &id).await?))
}

/// Makes the call that `explain` names. Where policies allow it already nothing is changed; where no change of a policy
/// allows it, the answer is a 409.
#[utoipa::path(
    post, path = "/egress/audit/{id}/allow", operation_id = "allow_egress", tag = "network",
    responses((status = 200, description = "It is allowed from now on", body = Explanation))
)]
pub(super) async fn allow(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    EventPath(id): EventPath,
    mut document: Document,
) -> Result<Json<Explanation>, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.organization(&caller)?;
    document.finish()?;
    Ok(Json(service.allow(caller.org_id(), &id).await?))
}

/// Replays the sandbox's records under another policy, and lists what would end otherwise. Nothing is changed.
#[utoipa::path(
    post, path = "/sandbox/{id}/network/simulate", operation_id = "simulate_network", tag = "network",
    request_body = SimulateBody, responses((status = 200, description = "What would end otherwise", body = Simulation))
)]
pub(super) async fn simulate(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<Simulation>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    document.organization(&caller)?;
    let network = document.value("network");
    let span = span(&mut document)?;
    document.finish()?;
    let network = network.ok_or_else(|| ApiError::field("network", "is required: the policy to try"))?;
    let policy = service.parse_policy("network", &network)?;
    Ok(Json(service.simulate(caller.org_id(), &id, policy, span).await?))
}

/// Writes the policy that allows what the sandbox did, and nothing else. Nothing is changed.
#[utoipa::path(
    post, path = "/sandbox/{id}/network/suggest", operation_id = "suggest_network", tag = "network",
    request_body = SpanBody, responses((status = 200, description = "The policy", body = Suggestion))
)]
pub(super) async fn suggest(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<Suggestion>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    document.organization(&caller)?;
    let span = span(&mut document)?;
    document.finish()?;
    Ok(Json(service.suggest(caller.org_id(), &id, span).await?))
}

fn span(document: &mut Document) -> Result<Span, ApiError> {
    Ok(Span {
        since: document.time("since")?,
        until: document.time("until")?,
    })
}
