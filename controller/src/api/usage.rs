//! What sandboxes use, and what organisations have used.

use axum::{Json, extract::State};
use jiff::{Timestamp, civil::Date, tz::TimeZone};
use sandgate_api::rest::{
    MetricsHistory, SandboxMetrics, SandboxSummary, SandboxUsageList, UsageHistory, UsageSummary,
};

use super::{auth::Authenticated, error::ApiError, path::SandboxPath, query::Parameters};
use crate::service::{Granularity, MEASUREMENTS, Scope, Service};

/// Shows what a sandbox uses at this moment.
#[utoipa::path(
    get, path = "/sandbox/{id}/metrics", operation_id = "sandbox_metrics", tag = "sandboxes",
    responses((status = 200, description = "A measurement", body = SandboxMetrics))
)]
pub(super) async fn metrics(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<SandboxMetrics>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let metrics = service.sandbox_metrics(caller.org_id(), &id).await?;
    Ok(Json(SandboxMetrics { metrics }))
}

/// Shows what a sandbox used lately: a measurement every ten seconds, of half an hour.
#[utoipa::path(
    get, path = "/sandbox/{id}/metrics/history", operation_id = "sandbox_metrics_history", tag = "sandboxes",
    params(("limit" = Option<u32>, Query, description = "The newest so many, 1 to 180")),
    responses((status = 200, description = "Measurements, oldest first", body = MetricsHistory))
)]
pub(super) async fn metrics_history(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
) -> Result<Json<MetricsHistory>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    // Published clients ask for more than there is.
    let limit = parameters.whole("limit", 1..=100_000)?.unwrap_or(MEASUREMENTS);
    let history = service
        .sandbox_metrics_history(caller.org_id(), &id, limit.min(MEASUREMENTS))
        .await?;
    Ok(Json(MetricsHistory { history }))
}

/// Shows averages and extremes of what a sandbox used lately.
#[utoipa::path(
    get, path = "/sandbox/{id}/metrics/summary", operation_id = "sandbox_metrics_summary", tag = "sandboxes",
    responses((status = 200, description = "Of the last half hour", body = SandboxSummary))
)]
pub(super) async fn metrics_summary(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<SandboxSummary>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let summary = service.sandbox_metrics_summary(caller.org_id(), &id).await?;
    Ok(Json(SandboxSummary { summary }))
}

/// Shows what the organisation has used this month. Nobody is charged: costs are 0.
#[utoipa::path(
    get, path = "/usage/current", operation_id = "current_usage", tag = "operations",
    responses((status = 200, description = "Its amounts", body = UsageSummary))
)]
pub(super) async fn current(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<UsageSummary>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(service.current_usage(caller.org_id()).await?))
}

/// Shows what the organisation has used, period by period.
#[utoipa::path(
    get, path = "/usage/history", operation_id = "usage_history", tag = "operations",
    params(
        ("granularity" = Option<String>, Query, description = "`hourly`, `daily` (the default) or `monthly`, in UTC"),
        ("start_date" = Option<String>, Query, description = "A time or a date; 24 hours, 30 days or a year before the end when left out"),
        ("end_date" = Option<String>, Query, description = "A time or a date; now when left out")
    ),
    responses((status = 200, description = "At most 1000 periods, oldest first", body = UsageHistory))
)]
pub(super) async fn history(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<UsageHistory>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let granularity = match parameters.text("granularity") {
        Some("hourly" | "hour") => Granularity::Hourly,
        None | Some("daily" | "day") => Granularity::Daily,
        Some("monthly" | "month") => Granularity::Monthly,
        Some(_) => {
            return Err(ApiError::field(
                "granularity",
                "expected `hourly`, `daily` or `monthly`",
            ));
        }
    };
    let period = (date(&parameters, "start_date")?, date(&parameters, "end_date")?);
    let history = service
        .usage_history(caller.org_id(), granularity, period)
        .await?;
    Ok(Json(history))
}

/// Shows what each of the organisation's sandboxes has used.
#[utoipa::path(
    get, path = "/usage/sandboxes", operation_id = "usage_by_sandbox", tag = "operations",
    params(
        ("start_date" = Option<String>, Query, description = "A time or a date; 30 days before the end when left out"),
        ("end_date" = Option<String>, Query, description = "A time or a date; now when left out")
    ),
    responses((status = 200, description = "Whole hours of that time", body = SandboxUsageList))
)]
pub(super) async fn by_sandbox(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<SandboxUsageList>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let period = (date(&parameters, "start_date")?, date(&parameters, "end_date")?);
    Ok(Json(service.usage_by_sandbox(caller.org_id(), period).await?))
}

/// A time, or a day's beginning in UTC.
fn date(parameters: &Parameters, name: &str) -> Result<Option<Timestamp>, ApiError> {
    let day = parameters.text(name).and_then(|text| text.parse::<Date>().ok());
    // A time parses as the day that it is of.
    match day.filter(|_| parameters.text(name).is_some_and(|text| text.len() == 10)) {
        Some(day) => day
            .to_zoned(TimeZone::UTC)
            .map(|start| Some(start.timestamp()))
            .map_err(|_beyond| ApiError::field(name, "expected a date, for example 2026-01-30")),
        None => parameters.time(name),
    }
}
