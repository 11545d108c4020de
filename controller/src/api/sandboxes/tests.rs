//! Every field of a creation, right and wrong.

use serde_json::json;

use super::*;

fn defaults() -> SandboxDefaults {
    SandboxDefaults {
        cpus: "2".parse().expect("cpus"),
        memory: Size::memory("2Gi").expect("memory"),
        disk: Size::disk("2Gi").expect("disk"),
        pids: 512,
        timeout_seconds: 600,
        max_lifetime_seconds: 86_400,
        max_per_organization: 20,
        image: "default".to_owned(),
    }
}

fn parsed(body: &Value) -> Result<SandboxSpec, ApiError> {
    spec(Document::parse(body.to_string().as_bytes())?, &defaults(), &PLAIN)
}

#[test]
fn an_empty_request_gets_the_defaults() {
    let spec = parsed(&json!({})).expect("a spec");
    assert_eq!(
        (spec.cpus.millis(), spec.memory.bytes(), spec.disk.bytes()),
        (2_000, 2 << 30, 2 << 30)
    );
    assert_eq!((spec.pids, spec.timeout_seconds, spec.env.len()), (512, 600, 0));
}

#[test]
fn every_field_counts() {
    let spec = parsed(&json!({
        "cpus": "500m", "memory": "512Mi", "disk": "1Gi", "pids": 64, "timeout_seconds": 60,
        "env": {"A": "b"}, "isolation": "container", "image": "default"
    }))
    .expect("a spec");
    assert_eq!(
        (spec.cpus.millis(), spec.memory.bytes(), spec.disk.bytes()),
        (500, 512 << 20, 1 << 30)
    );
    assert_eq!((spec.pids, spec.timeout_seconds), (64, 60));
    assert_eq!(spec.env.get("A").map(String::as_str), Some("b"));
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    for body in [json!({"gpu": null, "cpus": null}), json!({"volumes": []})] {
        assert!(parsed(&body).is_ok(), "{body}");
    }
}

#[test]
fn a_refusal_names_the_field() {
    let many: serde_json::Map<_, _> = (0..300)
        .map(|number| (format!("V{number}"), json!("x")))
        .collect();
    for (body, field) in [
        (json!({"cpus": 2}), "cpus"),
        (json!({"cpus": "0"}), "cpus"),
        (json!({"cpus": "many"}), "cpus"),
        (json!({"memory": 2048}), "memory"),
        (json!({"memory": "2"}), "memory"),
        (json!({"disk": "1"}), "disk"),
        (json!({"disk": ["1Gi"]}), "disk"),
        (json!({"pids": 0}), "pids"),
        (json!({"pids": "64"}), "pids"),
        (json!({"timeout_seconds": 59}), "timeout_seconds"),
        (json!({"timeout_seconds": 86_401}), "timeout_seconds"),
        (json!({"timeout_seconds": "600"}), "timeout_seconds"),
        (json!({"timeout_seconds": 600.5}), "timeout_seconds"),
        (json!({"env": ["A=b"]}), "env"),
        (json!({"env": {"A": 1}}), "env.A"),
        (json!({"env": {"1A": "b"}}), "env"),
        (json!({"env": {"A": "\u{0}"}}), "env"),
        (json!({ "env": many }), "env"),
        (json!({"isolation": 1}), "isolation"),
        (json!({"isolation": "vm"}), "isolation"),
        (json!({"isolation": "gvisor"}), "isolation"),
        (json!({"isolation": "microvm"}), "isolation"),
        (json!({"image": "other"}), "image"),
        (json!({"gpu": {"count": 1}}), "gpu"),
        (json!({"gpu.count": 1}), "gpu.count"),
        (json!({"desktop_os": "linux"}), "desktop_os"),
        (json!({"volumes": [{"volume_id": "v", "path": "/x"}]}), "volumes"),
        (json!({"bandwidth_mbps": 10}), "bandwidth_mbps"),
        (json!({"cpu": "2"}), "cpu"),
        (json!({"timeout": 600}), "timeout"),
    ] {
        let error = parsed(&body).expect_err("refused");
        assert_eq!(error.refused_field().as_deref(), Some(field), "{body}");
    }
}

#[test]
fn an_isolation_that_is_not_here_has_its_own_code() {
    let error = parsed(&json!({"isolation": "gvisor"})).expect_err("refused");
    assert_eq!(error.code(), ErrorCode::UnsupportedIsolation);
    assert_eq!(error.code().status(), 400);
}
