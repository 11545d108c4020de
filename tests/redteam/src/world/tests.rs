use serde_json::{Value, json};

use super::*;

fn world() -> Value {
    let host = |name: &str, address: &str| json!({ "name": name, "address": address });
    json!({
        "canary": "rt0001", "ok": host("ok.test", "203.0.113.10"), "tenant": "tenant.test",
        "plain": host("plain.test", "203.0.113.20"), "late": host("late.test", "203.0.113.70"),
        "wild": host("wild.test", "203.0.113.30"), "budget": "budget.test", "evil": host("evil.test", "203.0.113.66"),
        "rebind": "rebind.test", "half_rebind": "half-rebind.test", "open": "192.0.2.40",
    })
}

fn refusal(field: &str, value: Value) -> String {
    let mut world = world();
    match field.split_once('.') {
        Some((outer, inner)) => world[outer][inner] = value,
        None => world[field] = value,
    }
    World::parse(&world.to_string()).expect_err(field).0
}

#[test]
fn a_world_of_documentation_addresses_is_taken() {
    let taken = World::parse(&world().to_string()).expect("a world");
    assert_eq!((taken.timeout_ms, taken.closed), (TIMEOUT, false));
}

#[test]
fn any_other_address_is_refused_by_the_name_of_its_field() {
    for (field, address) in [
        ("ok.address", "8.8.8.8"),
        ("evil.address", "1.1.1.1"),
        ("plain.address", "10.0.0.1"),
        ("open", "2606:4700::1"),
        ("wild.address", "::ffff:8.8.8.8"),
    ] {
        let refusal = refusal(field, json!(address));
        assert!(
            refusal.starts_with(&format!("{field}: ")) && refusal.contains("documentation"),
            "{refusal}"
        );
    }
    assert!(refusal("node", json!("10.0.0.1:80")).starts_with("node: "));
    assert!(refusal("resolver", json!("9.9.9.9")).starts_with("resolver: "));
    assert!(refusal("canary", json!("Canary!")).starts_with("canary: "));
    assert!(refusal("timeout_ms", json!(0)).starts_with("timeout_ms: "));
    assert!(refusal("unknown", json!(0)).contains("unknown"));
}

#[test]
fn private_addresses_are_for_closed_worlds_and_public_ones_for_none() {
    let mut open = World::parse(&world().to_string()).expect("a world");
    let private = [
        "10.0.0.5",
        "169.254.169.254",
        "fd00:ec2::254",
        "64:ff9b::a9fe:a9fe",
        "2002:a00:5::1",
    ];
    let public = [
        "8.8.8.8",
        "168.63.129.16",
        "2606:4700::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ];
    let permits = |world: &World, address: &str| world.permits(address.parse().expect("an address"));
    for address in private {
        assert!(!permits(&open, address), "{address}");
    }
    open.closed = true;
    for address in private {
        assert!(permits(&open, address), "{address}");
    }
    for address in public {
        assert!(!permits(&open, address), "{address}");
    }
}
