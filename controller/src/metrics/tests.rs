use std::time::Duration;

use prometheus_client::encoding::text::encode;

use super::*;

fn shown(metrics: &Metrics) -> String {
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry).expect("written");
    text
}

#[test]
fn a_request_is_counted_once_under_its_route_method_and_class() {
    let metrics = Metrics::default();
    let watched = |route, method: &str| {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        Requested::new(metrics.clone(), route, &method)
    };
    watched(Some("/api/v1/sandbox/{id}"), "GET").answered(StatusCode::NOT_FOUND);
    watched(Some("/api/v1/sandbox/{id}"), "GET").answered(StatusCode::OK);
    watched(None, "BREW").answered(StatusCode::NOT_FOUND);
    drop(watched(Some("/api/v1/sandbox"), "POST"));
    let text = shown(&metrics);
    for line in [
        r#"http_requests_total{route="/api/v1/sandbox/{id}",method="GET",status="4xx"} 1"#,
        r#"http_requests_total{route="/api/v1/sandbox/{id}",method="GET",status="2xx"} 1"#,
        r#"http_requests_total{route="none",method="other",status="4xx"} 1"#,
        r#"http_requests_total{route="/api/v1/sandbox",method="POST",status="aborted"} 1"#,
        r#"http_request_duration_seconds_count{route="/api/v1/sandbox/{id}",method="GET"} 2"#,
    ] {
        assert!(
            text.contains(&format!("\nsandgate_controller_{line}\n")),
            "{line}: {text}"
        );
    }
}

#[test]
fn what_nobody_waits_for_is_counted_as_abandoned() {
    let metrics = Metrics::default();
    drop(Creating::new(metrics.clone()));
    Creating::new(metrics.clone()).ended(Creation::Created);
    drop(Watched::new(metrics.clone()));
    let mut watched = Watched::new(metrics.clone());
    watched.ended(CommandEnd::TimedOut);
    drop(watched);
    let text = shown(&metrics);
    for line in [
        r#"sandbox_creations_total{outcome="abandoned"} 1"#,
        r#"sandbox_creations_total{outcome="created"} 1"#,
        r#"sandbox_creations_total{outcome="quota"} 0"#,
        r#"commands_total{outcome="abandoned"} 1"#,
        r#"commands_total{outcome="timed_out"} 1"#,
        "command_duration_seconds_count 2",
    ] {
        assert!(
            text.contains(&format!("\nsandgate_controller_{line}\n")),
            "{line}: {text}"
        );
    }
}

#[test]
fn only_an_applied_policy_has_a_latency() {
    let metrics = Metrics::default();
    metrics.policy_change(Applied::InForce, Duration::from_millis(3));
    metrics.policy_change(Applied::Pending, Duration::from_secs(5));
    let text = shown(&metrics);
    assert!(
        text.contains("\nsandgate_controller_policy_apply_duration_seconds_count 1\n"),
        "{text}"
    );
    assert!(
        text.contains("policy_changes_total{outcome=\"pending\"} 1"),
        "{text}"
    );
}
