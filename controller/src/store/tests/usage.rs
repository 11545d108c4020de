//! What was used, and what happened.

use sandgate_api::rest::{EventDetails, EventKind};

use super::*;
use crate::store::{Amounts, Happening, Used, hour_of};

fn amounts(cpu_micros: u64) -> Amounts {
    Amounts {
        cpu_micros,
        memory_kib_seconds: 2,
        network_bytes: 3,
        creations: 0,
    }
}

#[tokio::test]
async fn what_is_added_adds_up_by_the_hour_and_by_sandbox() {
    let world = world().await;
    let other = organization(&world.store, "second@example.org").await;
    let (one, two) = (SandboxId::random(), SandboxId::random());
    let used = |org: &OrgId, id: &SandboxId, hour, cpu| Used {
        org_id: org.clone(),
        sandbox_id: id.clone(),
        hour,
        amounts: amounts(cpu),
    };
    let store = &world.store;
    let rows = [
        used(&world.org, &one, 7, 10),
        used(&world.org, &two, 7, 100),
        used(&world.org, &one, 8, 1_000),
    ];
    store.add_usage(&rows).await.expect("added");
    let more = [
        used(&world.org, &one, 7, 5),
        used(&other, &SandboxId::random(), 7, 9),
    ];
    store.add_usage(&more).await.expect("added");
    let by_hour = store.usage_by_hour(&world.org, 7..9).await.expect("read");
    let cpu: Vec<(i64, u64)> = by_hour
        .iter()
        .map(|(hour, amounts)| (*hour, amounts.cpu_micros))
        .collect();
    assert_eq!(cpu, [(7, 115), (8, 1_000)]);
    assert_eq!(by_hour[0].1.network_bytes, 9);
    let by_sandbox = store.usage_by_sandbox(&world.org, 7..9, 9).await.expect("read");
    let cpu: Vec<(&SandboxId, u64)> = by_sandbox
        .iter()
        .map(|(id, amounts)| (id, amounts.cpu_micros))
        .collect();
    assert_eq!(cpu, [(&one, 1_015), (&two, 100)]);
    let most = store.usage_by_sandbox(&world.org, 7..8, 1).await.expect("read");
    assert_eq!(most[0].0, two);
    assert_eq!(
        store.usage_of_sandbox(&one).await.expect("read").cpu_micros,
        1_015
    );
    let nobody = store.usage_of_sandbox(&SandboxId::random()).await.expect("read");
    assert!(nobody.is_nothing());
    store.prune_usage(8).await.expect("pruned");
    let left = store.usage_by_hour(&world.org, 0..100).await.expect("read");
    assert_eq!(left.len(), 1);
}

#[tokio::test]
async fn a_creation_is_counted_when_the_sandbox_runs_and_once() {
    let world = world().await;
    let id = world.sandbox(None).await;
    let hours = 0..hour_of(now()) + 2;
    let before = world.store.usage_by_hour(&world.org, hours.clone()).await;
    assert!(before.expect("read").is_empty());
    world.store.mark_running(&id).await.expect("running");
    world.store.mark_running(&id).await.expect_err("it runs already");
    assert_eq!(
        world.store.usage_of_sandbox(&id).await.expect("read").creations,
        1
    );
    let after = world.store.usage_by_hour(&world.org, hours).await.expect("read");
    assert_eq!(after.iter().map(|(_, amounts)| amounts.creations).sum::<u64>(), 1);
}

#[tokio::test]
async fn of_what_happened_each_organisation_keeps_its_newest() {
    let world = world().await;
    let other = organization(&world.store, "second@example.org").await;
    let id = SandboxId::random();
    let happening = |org: &OrgId, command: usize| Happening {
        org_id: org.clone(),
        sandbox_id: id.clone(),
        kind: EventKind::CommandStarted,
        time: now(),
        details: EventDetails {
            command_id: Some(command.to_string()),
            ..EventDetails::default()
        },
    };
    let mut watched = world.store.watch_events();
    let all: Vec<Happening> = (0..20)
        .flat_map(|command| [happening(&world.org, command), happening(&other, command)])
        .collect();
    world.store.add_events(&all[..2]).await.expect("stored");
    world.store.add_events(&all[2..]).await.expect("stored");
    assert_eq!(*watched.borrow_and_update(), 40);
    assert_eq!(world.store.newest_event().await.expect("read"), 40);
    let read = world.store.events_after(&world.org, 0, 100).await.expect("read");
    let commands: Vec<String> = read
        .iter()
        .filter_map(|(_, event)| event.data.command_id.clone())
        .collect();
    assert_eq!(
        commands,
        (0..20).map(|number| number.to_string()).collect::<Vec<_>>()
    );
    let (position, event) = &read[4];
    assert_eq!(
        (event.id.clone(), event.kind),
        (position.to_string(), EventKind::CommandStarted)
    );
    let behind = world
        .store
        .events_after(&world.org, *position, 3)
        .await
        .expect("read");
    assert_eq!(behind, read[5..8]);
    world.store.prune_events(7).await.expect("pruned");
    for org in [&world.org, &other] {
        let left = world.store.events_after(org, 0, 100).await.expect("read");
        assert_eq!(left.len(), 7);
        assert_eq!(left[6].1.data.command_id.as_deref(), Some("19"));
    }
}
