//! Usage and metrics, as far as nothing has to run.

use super::*;
use crate::store::{Amounts, Used, hour_of};

#[tokio::test]
async fn usage_is_that_of_the_organisation_and_has_every_field_that_published_clients_need() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let id = world.stored_sandbox(&tenant).await;
    let used = Used {
        org_id: tenant.org.clone(),
        sandbox_id: id.clone(),
        hour: hour_of(Timestamp::now()),
        amounts: Amounts {
            cpu_micros: 1_800_000_000,
            memory_kib_seconds: 1_000_000_000,
            network_bytes: 2_000_000_000,
            creations: 0,
        },
    };
    world.store.add_usage(&[used]).await.expect("stored");
    let get = async |who: &Tenant, path: &str| {
        let answer = world.call(who, "GET", path, &Value::Null).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
        answer.body
    };
    // The organisation's hour may be another by now, of the same month at worst at its very end.
    let month = get(&tenant, "/usage/history?granularity=monthly").await;
    let months = month["data"].as_array().expect("a list");
    let sum = |field: &str| -> f64 { months.iter().filter_map(|month| month[field].as_f64()).sum() };
    assert_eq!((sum("cpu_hours"), sum("network_gb")), (0.5, 2.0));
    assert!(sum("memory_gb_hours") > 0.28 && sum("memory_gb_hours") < 0.29);
    assert_eq!(sum("sandbox_creations"), 1.0);
    let current = get(&tenant, "/usage/current").await;
    for field in ["cpu_hours", "memory_gb_hours", "network_gb"] {
        assert!(current[field].is_f64(), "{field}: {current}");
    }
    assert!(current["sandbox_creations"].is_u64() && current["period_end"].is_string());
    assert_eq!(
        (&current["estimated_cost_cents"], &current["breakdown"]),
        (&json!(0), &json!({"cpu": 0, "memory": 0, "network": 0}))
    );
    let daily = get(&tenant, "/usage/history").await;
    assert_eq!(daily["granularity"], "daily");
    assert!(daily["data"].as_array().is_some_and(|days| days.len() >= 30));
    let days = "/usage/history?granularity=daily&start_date=2026-01-30&end_date=2026-02-02T00:00:00Z";
    let days = get(&tenant, days).await;
    assert_eq!(days["data"].as_array().map(Vec::len), Some(3));
    assert_eq!(days["start_date"], "2026-01-30T00:00:00Z");
    let each = get(&tenant, "/usage/sandboxes").await;
    assert_eq!(
        (
            &each["sandboxes"][0]["sandbox_id"],
            &each["sandboxes"][0]["cpu_hours"]
        ),
        (&json!(id), &json!(0.5))
    );
    let theirs = get(&other, "/usage/sandboxes").await;
    assert_eq!(theirs["sandboxes"], json!([]));
    assert_eq!(get(&other, "/usage/current").await["cpu_hours"], json!(0.0));
    for (path, field) in [
        ("/usage/history?granularity=weekly", "granularity"),
        ("/usage/history?start_date=soon", "start_date"),
        (
            "/usage/history?start_date=2026-02-01&end_date=2026-01-01",
            "start_date",
        ),
        (
            "/usage/history?granularity=hourly&start_date=2026-01-01&end_date=2026-12-01",
            "start_date",
        ),
        ("/usage/sandboxes?end_date=x", "end_date"),
    ] {
        let answer = world.call(&tenant, "GET", path, &Value::Null).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{path}");
    }
}

#[tokio::test]
async fn what_does_not_run_has_no_metrics_and_what_is_foreign_does_not_exist() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let id = world.stored_sandbox(&tenant).await;
    for (path, nothing) in [
        ("metrics", json!({"metrics": null})),
        ("metrics/history", json!({"history": []})),
        ("metrics/history?limit=500", json!({"history": []})),
        ("metrics/summary", json!({"summary": null})),
    ] {
        let path = format!("/sandbox/{id}/{path}");
        let answer = world.call(&tenant, "GET", &path, &Value::Null).await;
        assert_eq!(
            (answer.status, &answer.body),
            (StatusCode::OK, &nothing),
            "{path}"
        );
        let answer = world.call(&other, "GET", &path, &Value::Null).await;
        assert_eq!(answer.refusal(), (404, "SANDBOX_NOT_FOUND", None), "{path}");
    }
    let path = format!("/sandbox/{id}/metrics/history?limit=0");
    let answer = world.call(&tenant, "GET", &path, &Value::Null).await;
    assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some("limit")));
}
