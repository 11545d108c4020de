//! Sessions, extensions and what is stored beside resources.

use super::*;
use crate::{
    store::{Extension, Longer},
    terms::Terms,
};

fn of_session(key: &str) -> Terms {
    Terms {
        session_key: Some(key.to_owned()),
        idle_timeout_seconds: Some(30),
        metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        template_id: Some("base".to_owned()),
    }
}

#[tokio::test]
async fn of_any_number_of_insertions_of_one_session_one_succeeds() {
    let world = world().await;
    let mut inserting = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (store, org) = (world.store.clone(), world.org.clone());
        inserting.spawn(async move {
            let new = NewSandbox {
                terms: of_session("one"),
                ..new_sandbox(&org, None)
            };
            store.insert_sandbox(&new, 100).await
        });
    }
    let (mut made, mut refused) = (Vec::new(), 0);
    while let Some(inserted) = inserting.join_next().await {
        match inserted.expect("no panic") {
            Ok(record) => made.push(record),
            Err(StoreError::Conflict(Conflict::SessionTaken)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((made.len(), refused), (1, 7));
    let found = world.store.sandbox_of_session(&world.org, "one").await;
    assert_eq!(found.expect("a reading").as_ref(), Some(&made[0].id));
    // What is stored comes back.
    let stored = world.store.sandbox(&world.org, &made[0].id).await;
    assert_eq!(
        stored.expect("a reading").expect("a sandbox").terms,
        of_session("one")
    );
    // Another key, and the same key of another organisation, are free; so is the key when its sandbox ends.
    let other = organization(&world.store, "second@example.org").await;
    for (org, key) in [(&world.org, "two"), (&other, "one")] {
        let new = NewSandbox {
            terms: of_session(key),
            ..new_sandbox(org, None)
        };
        world.store.insert_sandbox(&new, 100).await.expect("free");
    }
    world.store.withdraw(&made[0].id).await.expect("withdrawn");
    let new = NewSandbox {
        terms: of_session("one"),
        ..new_sandbox(&world.org, None)
    };
    world.store.insert_sandbox(&new, 100).await.expect("free again");
}

#[tokio::test]
async fn a_life_is_extended_as_far_as_it_goes_and_never_shortened() {
    let world = world().await;
    let new = new_sandbox(&world.org, None);
    let record = world.store.insert_sandbox(&new, 9).await.expect("inserted");
    let (id, began) = (record.id, record.created_at);
    let extend = async |longer| {
        world
            .store
            .extend_sandbox(&world.org, &id, longer, 600)
            .await
            .expect("asked")
    };
    let not_yet = Extension::NotRunning(SandboxStatus::Creating);
    assert_eq!(extend(Longer::By(1)).await, not_yet);
    world.store.mark_running(&id).await.expect("running");
    let until = |seconds| Extension::Until(began + SignedDuration::from_secs(seconds));
    assert_eq!(extend(Longer::By(40)).await, until(100));
    assert_eq!(extend(Longer::By(501)).await, Extension::Beyond(500));
    assert_eq!(extend(Longer::ToLast(50, began)).await, until(100));
    assert_eq!(extend(Longer::ToLast(300, began)).await, until(300));
    assert_eq!(extend(Longer::ToLast(9_000, began)).await, until(600));
    assert_eq!(extend(Longer::By(u64::MAX)).await, Extension::Beyond(0));
    let stored = world.store.sandbox(&world.org, &id).await;
    let stored = stored.expect("a reading").expect("a sandbox").expires_at;
    assert_eq!(Extension::Until(stored), until(600));
    let other = organization(&world.store, "second@example.org").await;
    let foreign = world
        .store
        .extend_sandbox(&other, &id, Longer::By(1), 9_000)
        .await;
    assert_eq!(foreign.expect("asked"), Extension::Absent);
}
