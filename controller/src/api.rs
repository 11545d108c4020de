//! The REST API: routes, and what happens to every request on its way.
//!
//! A request passes, from the outside in: [`request`] (its id, its log line, and the error envelope for
//! whatever comes back), routing, [`auth`] (who is it), the handler of its area (fields read and checked),
//! and then a use case of [`crate::service`]. Handlers hold no logic; an error becomes a status in one
//! place, [`error`].

mod accounts;
mod actions;
mod audit;
mod auth;
mod billing;
mod bodies;
mod commands;
mod document;
mod error;
mod events;
mod files;
mod happenings;
mod health;
mod keys;
mod lifetime;
mod limits;
mod multipart;
mod network;
mod openapi;
mod path;
mod pool;
mod present;
mod processes;
mod query;
mod raw;
mod reference;
mod remainder;
mod repl;
mod request;
mod review;
mod sandboxes;
mod secrets;
mod serve;
mod settings;
mod socket;
mod sse;
mod templates;
mod text;
mod tunnels;
mod uploads;
mod usage;
mod users;
mod ws;

use axum::{Extension, Router, middleware};
use sandgate_api::error::ErrorCode;
use utoipa_axum::routes;

pub use serve::serve;

use crate::service::Service;
use error::ApiError;
use openapi::Routes;
use reference::Description;
use request::Around;

/// Every route.
pub fn router(service: Service) -> Router {
    let (routes, description) = described().split();
    let around = Around::new(service.clone(), &description);
    // A value that was built from maps and texts can be written.
    let description = serde_json::to_vec(&description).unwrap_or_default();
    routes
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(service)
        .layer(Extension(Description(description.into())))
        .layer(middleware::from_fn_with_state(around, request::around))
}

fn described() -> Routes {
    let v1 = Routes::new()
        .add(routes!(accounts::register))
        .add(routes!(keys::list, keys::create))
        .add(routes!(keys::revoke))
        .add(routes!(keys::rotate))
        .add(routes!(keys::create_token))
        .add(routes!(users::list, users::add))
        .add(routes!(users::get, users::change, users::remove))
        .add(routes!(users::invitations, users::invite))
        .add(routes!(users::withdraw))
        .add(routes!(actions::list))
        .add(routes!(actions::summary))
        .add(routes!(billing::subscription))
        .add(routes!(billing::invoices))
        .add(routes!(billing::upgrade))
        .add(routes!(billing::portal))
        .add(routes!(sandboxes::list))
        .add(routes!(sandboxes::create_short))
        .add(routes!(sandboxes::create))
        .add(routes!(sandboxes::create_from_template))
        .add(routes!(sandboxes::get, sandboxes::delete))
        .add(routes!(sandboxes::status))
        .add(routes!(sandboxes::stop))
        .add(routes!(lifetime::extend))
        .add(routes!(lifetime::pause))
        .add(routes!(lifetime::resume))
        .add(routes!(commands::execute))
        .add(routes!(processes::list, processes::start))
        .add(routes!(processes::output))
        .add(routes!(processes::stdin))
        .add(routes!(processes::signal))
        .add(routes!(processes::resize))
        .add(routes!(processes::delete))
        .add(routes!(processes::terminal::terminal))
        .add(routes!(repl::create))
        .add(routes!(repl::execute))
        .add(routes!(repl::interrupt))
        .add(routes!(repl::destroy))
        .add(routes!(files::read, files::write, files::delete))
        .add(routes!(files::list))
        .add(routes!(files::glob))
        .add(routes!(files::mkdir))
        .add(routes!(files::relocate))
        .add(routes!(files::copy))
        .add(routes!(raw::get, raw::put))
        .add(routes!(raw::download))
        .add(routes!(uploads::upload))
        .add(routes!(files::watch))
        .add(routes!(network::get, network::put, network::patch))
        .add(routes!(network::doctor))
        .add(routes!(secrets::inject))
        .add(routes!(tunnels::list, tunnels::open))
        .add(routes!(tunnels::close_of_sandbox))
        .add(routes!(tunnels::close))
        .add(routes!(secrets::list, secrets::create))
        .add(routes!(secrets::update, secrets::delete))
        .add(routes!(
            settings::get_egress,
            settings::put_egress,
            settings::patch_egress
        ))
        .add(routes!(settings::schema))
        .add(routes!(audit::list))
        .add(routes!(audit::stream))
        .add(routes!(audit::verify))
        .add(routes!(review::explain))
        .add(routes!(review::allow))
        .add(routes!(review::simulate))
        .add(routes!(review::suggest))
        .add(routes!(pool::stats))
        .add(routes!(usage::metrics))
        .add(routes!(usage::metrics_history))
        .add(routes!(usage::metrics_summary))
        .add(routes!(usage::current))
        .add(routes!(usage::history))
        .add(routes!(usage::by_sandbox))
        .add(routes!(happenings::stream))
        .add(routes!(templates::list, templates::create))
        .add(routes!(templates::get, templates::replace, templates::delete));
    Routes::new()
        .below("/api/v1", v1)
        .add(routes!(ws::commands))
        .add(routes!(health::health))
        .add(routes!(health::ready))
        .add(routes!(reference::openapi))
        .add(routes!(reference::page))
        .add(routes!(reference::script))
        .add(routes!(reference::style))
}

async fn no_such_route() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no such endpoint")
}

async fn no_such_method() -> ApiError {
    ApiError::new(
        ErrorCode::MethodNotAllowed,
        "this endpoint does not know the method",
    )
}

#[cfg(test)]
mod tests;
