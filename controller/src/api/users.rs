//! Users and invitations.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::{InvitationCreated, InvitationList, Role, Success, User, UserAdded, UserList};

use super::{
    auth::Authenticated,
    bodies::{InvitationBody, UserBody, UserChangeBody},
    document::Document,
    error::ApiError,
    path::{InvitationPath, UserPath},
};
use crate::service::{InvitationRequest, Scope, Service, UserRequest};

/// Days that an invitation works when it asks for nothing else.
const INVITATION_DAYS: u64 = 7;

/// Lists the organisation's users.
#[utoipa::path(
    get, path = "/users", operation_id = "list_users", tag = "accounts",
    responses((status = 200, description = "The users", body = UserList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<UserList>, ApiError> {
    caller.may(Scope::UsersRead)?;
    Ok(Json(UserList {
        users: service.users(caller.org_id()).await?,
    }))
}

/// Adds a user to the organisation, with a first API key to be handed over.
#[utoipa::path(
    post, path = "/users", operation_id = "add_user", tag = "accounts",
    request_body = UserBody, responses((status = 201, description = "The user, and the key, shown once", body = UserAdded))
)]
pub(super) async fn add(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<UserAdded>), ApiError> {
    caller.may(Scope::UsersWrite)?;
    document.organization(&caller)?;
    let request = UserRequest {
        email: document.required_text("email")?,
        role: role(&mut document)?,
        first_name: document.text("first_name")?,
        last_name: document.text("last_name")?,
    };
    document.finish()?;
    Ok((
        StatusCode::CREATED,
        Json(service.add_user(&caller, request).await?),
    ))
}

/// Shows a user.
#[utoipa::path(
    get, path = "/users/{id}", operation_id = "get_user", tag = "accounts",
    responses((status = 200, description = "The user", body = User))
)]
pub(super) async fn get(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    UserPath(id): UserPath,
) -> Result<Json<User>, ApiError> {
    caller.may(Scope::UsersRead)?;
    Ok(Json(service.user(caller.org_id(), &id).await?))
}

/// Gives a user another role, which bounds the user's keys and tokens from the next request on. There is always an owner.
#[utoipa::path(
    patch, path = "/users/{id}", operation_id = "change_user", tag = "accounts",
    request_body = UserChangeBody, responses((status = 200, description = "The user", body = User))
)]
pub(super) async fn change(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    UserPath(id): UserPath,
    mut document: Document,
) -> Result<Json<User>, ApiError> {
    caller.may(Scope::UsersWrite)?;
    document.organization(&caller)?;
    let role = role(&mut document)?;
    document.finish()?;
    Ok(Json(service.change_role(&caller, &id, role).await?))
}

/// Removes a user, whose keys and tokens work no more. There is always an owner.
#[utoipa::path(
    delete, path = "/users/{id}", operation_id = "remove_user", tag = "accounts",
    responses((status = 200, description = "The user is gone", body = Success))
)]
pub(super) async fn remove(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    UserPath(id): UserPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::UsersWrite)?;
    service.remove_user(&caller, &id).await?;
    Ok(Json(Success::OK))
}

/// Lists the invitations that were not used yet.
#[utoipa::path(
    get, path = "/invitations", operation_id = "list_invitations", tag = "accounts",
    responses((status = 200, description = "The invitations, without their tokens", body = InvitationList))
)]
pub(super) async fn invitations(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<InvitationList>, ApiError> {
    caller.may(Scope::UsersWrite)?;
    Ok(Json(InvitationList {
        invitations: service.invitations(caller.org_id()).await?,
    }))
}

/// Invites somebody into the organisation: the token is good for one registration.
#[utoipa::path(
    post, path = "/invitations", operation_id = "create_invitation", tag = "accounts",
    request_body = InvitationBody,
    responses((status = 201, description = "The invitation, its token shown once", body = InvitationCreated))
)]
pub(super) async fn invite(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<InvitationCreated>), ApiError> {
    caller.may(Scope::UsersWrite)?;
    document.organization(&caller)?;
    let request = InvitationRequest {
        role: role(&mut document)?,
        email: document.text("email")?,
        expires_in_days: document
            .whole("expires_in_days", 1..=30)?
            .unwrap_or(INVITATION_DAYS),
    };
    document.finish()?;
    Ok((StatusCode::CREATED, Json(service.invite(&caller, request).await?)))
}

/// Takes an invitation back.
#[utoipa::path(
    delete, path = "/invitations/{id}", operation_id = "withdraw_invitation", tag = "accounts",
    responses((status = 200, description = "It works no more", body = Success))
)]
pub(super) async fn withdraw(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    InvitationPath(id): InvitationPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::UsersWrite)?;
    service.withdraw_invitation(&caller, &id).await?;
    Ok(Json(Success::OK))
}

fn role(document: &mut Document) -> Result<Role, ApiError> {
    let field = document.path("role");
    let text = document.required_text("role")?;
    text.parse()
        .map_err(|expected: String| ApiError::field(field, expected))
}
