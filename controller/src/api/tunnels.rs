//! Tunnels: open, list, close.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::{
    rest::{Success, Tunnel, TunnelList},
    tunnel::TunnelProtocol,
};

use super::{
    auth::Authenticated,
    bodies::TunnelBody,
    document::Document,
    error::ApiError,
    path::{SandboxPath, SandboxTunnelPath, TunnelPath},
};
use crate::service::{Scope, Service, TunnelRequest};

/// Seconds that a tunnel lives when it asks for nothing else.
const DEFAULT_LIFETIME: u64 = 3_600;

/// Longest life of a tunnel, in seconds: a week.
const MAX_LIFETIME: u64 = 604_800;

/// Opens a tunnel; answers when its URL works.
#[utoipa::path(
    post, path = "/sandbox/{id}/tunnels", operation_id = "open_tunnel", tag = "tunnels",
    request_body = TunnelBody, responses((status = 201, description = "The tunnel, with its token", body = Tunnel))
)]
pub(super) async fn open(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<(StatusCode, Json<Tunnel>), ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let request = request(document)?;
    let tunnel = service.open_tunnel(caller.org_id(), &id, request).await?;
    Ok((StatusCode::CREATED, Json(tunnel)))
}

/// Lists a sandbox's open tunnels.
#[utoipa::path(
    get, path = "/sandbox/{id}/tunnels", operation_id = "list_tunnels", tag = "tunnels",
    responses((status = 200, description = "The tunnels, without their tokens", body = TunnelList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<TunnelList>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(TunnelList {
        tunnels: service.tunnels(caller.org_id(), &id).await?,
    }))
}

/// Closes a tunnel; answers when its connections are cut.
#[utoipa::path(
    delete, path = "/tunnels/{id}", operation_id = "close_tunnel", tag = "tunnels",
    responses((status = 200, description = "It is closed", body = Success))
)]
pub(super) async fn close(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    TunnelPath(id): TunnelPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    service.close_tunnel(caller.org_id(), None, &id).await?;
    Ok(Json(Success::OK))
}

/// Closes a tunnel of this sandbox; answers when its connections are cut.
#[utoipa::path(
    delete, path = "/sandbox/{id}/tunnels/{tunnel}", operation_id = "close_tunnel_of_sandbox", tag = "tunnels",
    responses((status = 200, description = "It is closed", body = Success))
)]
pub(super) async fn close_of_sandbox(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxTunnelPath(sandbox, id): SandboxTunnelPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    service.close_tunnel(caller.org_id(), Some(&sandbox), &id).await?;
    Ok(Json(Success::OK))
}

fn request(mut document: Document) -> Result<TunnelRequest, ApiError> {
    let port = document
        .whole("port", 1..=u64::from(u16::MAX))?
        .and_then(|port| u16::try_from(port).ok())
        .ok_or_else(|| ApiError::field("port", "is required"))?;
    let protocol = match document.text("protocol")?.as_deref() {
        None | Some("http") => TunnelProtocol::Http,
        Some("h2c") => TunnelProtocol::H2c,
        Some("tcp") => TunnelProtocol::Tcp,
        Some(_) => return Err(ApiError::field("protocol", "expected `http`, `h2c` or `tcp`")),
    };
    // Published clients write it in two ways.
    let lifetime = 1..=MAX_LIFETIME;
    let expires_in = match (
        document.whole("expires_in", lifetime.clone())?,
        document.whole("expiresIn", lifetime)?,
    ) {
        (Some(_), Some(_)) => {
            return Err(ApiError::field(
                "expiresIn",
                "is the same as `expires_in`; send one",
            ));
        }
        (Some(seconds), None) | (None, Some(seconds)) => seconds,
        (None, None) => DEFAULT_LIFETIME,
    };
    let public = document.flag("public")?.unwrap_or(false);
    document.finish()?;
    Ok(TunnelRequest {
        port,
        protocol,
        expires_in: u32::try_from(expires_in).unwrap_or(u32::MAX),
        public,
    })
}
