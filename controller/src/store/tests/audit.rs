//! The audit: filters, pages, and what is forgotten.

use sandgate_api::audit::{AuditEvent, AuditVerdict};
use sandgate_policy::Reason;

use super::*;
use crate::{chain::ChainKey, installation::InstallationKey};

fn chain_key() -> ChainKey {
    ChainKey::new(&InstallationKey::from_key([3; 32]))
}

fn event(world: &World, host: &str, verdict: AuditVerdict, age_seconds: i64) -> AuditEvent {
    AuditEvent {
        id: uuid::Uuid::now_v7().to_string(),
        time: now() - SignedDuration::from_secs(age_seconds),
        org_id: world.org.clone(),
        sandbox_id: SandboxId::random(),
        verdict,
        reason: Reason::Allowed,
        tier: Some(TierName::Sandbox),
        rule: None,
        protocol: "tls".to_owned(),
        host: Some(host.to_owned()),
        ip: None,
        port: Some(443),
        method: None,
        path: None,
        credential: None,
        bytes_up: 1,
        bytes_down: 2,
        duration_ms: 3,
        repeated: 1,
        detail: None,
        gap: None,
        alert: None,
    }
}

async fn audit(world: &World, filter: AuditFilter) -> Vec<String> {
    let filter = AuditFilter {
        limit: if filter.limit == 0 { 100 } else { filter.limit },
        ..filter
    };
    let rows = world.store.audit(&world.org, &filter).await.expect("records");
    rows.into_iter().filter_map(|row| row.event.host).collect()
}

#[tokio::test]
async fn a_batch_of_many_is_stored_in_its_order_without_what_is_stored_already() {
    let world = world().await;
    let mut events: Vec<_> = (0..300)
        .map(|number| {
            event(
                &world,
                &format!("{number}.test"),
                AuditVerdict::Allow,
                300 - number,
            )
        })
        .collect();
    let of = |range: std::ops::Range<usize>| range.map(|number| format!("{number}.test")).rev();
    let stored = async || {
        let all = AuditFilter {
            limit: 1000,
            ..AuditFilter::default()
        };
        audit(&world, all).await
    };
    let insert = async |events: &[AuditEvent]| {
        let inserted = world.store.insert_audit(&chain_key(), events).await;
        inserted.expect("stored");
    };
    insert(&events[100..150]).await;
    // Twice in one batch, too.
    events.push(events[0].clone());
    insert(&events).await;
    let expected: Vec<_> = of(150..300).chain(of(0..100)).chain(of(100..150)).collect();
    assert_eq!(stored().await, expected);
    let verified = world
        .store
        .verify_audit(&chain_key(), &world.org, None)
        .await
        .expect("verified");
    assert_eq!(
        (verified.records, verified.problem.is_none()),
        (300, true),
        "one chain of all of them"
    );
    insert(&events).await;
    insert(&[]).await;
    assert_eq!(stored().await, expected);
}

#[tokio::test]
async fn a_record_delivered_twice_is_stored_once_and_every_filter_counts() {
    let world = world().await;
    let events = [
        event(&world, "a.test", AuditVerdict::Allow, 30),
        event(&world, "b.test", AuditVerdict::Deny, 20),
        event(&world, "c.test", AuditVerdict::Deny, 10),
    ];
    world
        .store
        .insert_audit(&chain_key(), &events)
        .await
        .expect("stored");
    world
        .store
        .insert_audit(&chain_key(), &events[1..])
        .await
        .expect("stored again");
    assert_eq!(
        audit(&world, AuditFilter::default()).await,
        ["c.test", "b.test", "a.test"]
    );
    let stored = world
        .store
        .audit(
            &world.org,
            &AuditFilter {
                limit: 1,
                ..AuditFilter::default()
            },
        )
        .await;
    assert_eq!(stored.expect("records")[0].event, events[2]);

    let deny = AuditFilter {
        verdicts: &[AuditVerdict::Deny],
        ..AuditFilter::default()
    };
    assert_eq!(audit(&world, deny).await, ["c.test", "b.test"]);
    let host = AuditFilter {
        host: Some("a.test".to_owned()),
        ..AuditFilter::default()
    };
    assert_eq!(audit(&world, host).await, ["a.test"]);
    let of = AuditFilter {
        sandbox_id: Some(events[1].sandbox_id.clone()),
        ..AuditFilter::default()
    };
    assert_eq!(audit(&world, of).await, ["b.test"]);
    let between = AuditFilter {
        since: Some(events[1].time),
        until: Some(events[2].time),
        ..AuditFilter::default()
    };
    assert_eq!(audit(&world, between).await, ["b.test"]);
    let second = AuditFilter {
        limit: 1,
        offset: 1,
        ..AuditFilter::default()
    };
    assert_eq!(audit(&world, second).await, ["b.test"]);
    let before = world
        .store
        .audit(
            &world.org,
            &AuditFilter {
                limit: 1,
                ..AuditFilter::default()
            },
        )
        .await;
    let before = Some(before.expect("records")[0].sequence);
    assert_eq!(
        audit(
            &world,
            AuditFilter {
                before,
                ..AuditFilter::default()
            }
        )
        .await,
        ["b.test", "a.test"]
    );
    let stranger = organization(&world.store, "stranger@example.org").await;
    let filter = AuditFilter {
        limit: 9,
        ..AuditFilter::default()
    };
    assert!(
        world
            .store
            .audit(&stranger, &filter)
            .await
            .expect("records")
            .is_empty()
    );
}

#[tokio::test]
async fn old_records_go_first() {
    let world = world().await;
    let ages = [100, 50, 10, 5];
    let events: Vec<_> = ages
        .map(|age| event(&world, &format!("{age}.test"), AuditVerdict::Allow, age))
        .into_iter()
        .collect();
    world
        .store
        .insert_audit(&chain_key(), &events)
        .await
        .expect("stored");
    let before = now() - SignedDuration::from_secs(60);
    assert_eq!(
        world
            .store
            .prune_audit(&chain_key(), before, 1_000, 100)
            .await
            .expect("pruned"),
        1
    );
    assert_eq!(
        audit(&world, AuditFilter::default()).await,
        ["5.test", "10.test", "50.test"]
    );
    assert_eq!(
        world
            .store
            .prune_audit(&chain_key(), before, 1, 1)
            .await
            .expect("pruned"),
        1,
        "step by step"
    );
    assert_eq!(
        world
            .store
            .prune_audit(&chain_key(), before, 1, 100)
            .await
            .expect("pruned"),
        1
    );
    assert_eq!(audit(&world, AuditFilter::default()).await, ["5.test"]);
    assert_eq!(
        world
            .store
            .prune_audit(&chain_key(), before, 1, 100)
            .await
            .expect("pruned"),
        0
    );
}
