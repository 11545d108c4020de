//! The store against a real database file.

use std::collections::{BTreeMap, HashMap};

use jiff::SignedDuration;
use sandgate_api::{
    feed::{FeedFrame, FeedSandbox, TierName},
    id::{OrgId, SandboxId},
    rest::{ActionOutcome, SandboxStatus},
};
use sandgate_policy::Policy;
use serde_json::json;

use super::{
    samples::{account, endpoint, key, now, organization, sandbox as new_sandbox},
    *,
};

mod audit;
mod feed;
mod pool;
mod secrets;
mod terms;
mod tunnels;
mod usage;

struct World {
    store: Store,
    directory: tempfile::TempDir,
    org: OrgId,
}

async fn world() -> World {
    let (store, directory) = samples::store().await;
    let org = organization(&store, "first@example.org").await;
    World {
        store,
        directory,
        org,
    }
}

fn policy(mode: &str) -> Policy {
    Policy::parse(&json!({"mode": mode})).expect("a policy")
}

impl World {
    async fn sandbox(&self, policy: Option<Policy>) -> SandboxId {
        let new = new_sandbox(&self.org, policy);
        self.store.insert_sandbox(&new, 100).await.expect("inserted").id
    }

    async fn announced(&self, last: u8) -> (SandboxId, Revision) {
        let id = self.sandbox(None).await;
        let revision = self
            .store
            .announce(&id, &endpoint(last))
            .await
            .expect("announced");
        (id, revision)
    }

    async fn since(&self, since: Option<Revision>) -> FeedChange {
        self.store.feed_since(since).await.expect("a change")
    }
}

fn delta(change: FeedChange) -> (Vec<FeedSandbox>, Vec<SandboxId>) {
    match change.frame {
        FeedFrame::Delta { upserts, removed, .. } => (upserts, removed),
        other => panic!("not a delta: {other:?}"),
    }
}

fn snapshot(change: FeedChange) -> Vec<FeedSandbox> {
    match change.frame {
        FeedFrame::Snapshot { sandboxes, .. } => sandboxes,
        other => panic!("not a snapshot: {other:?}"),
    }
}

#[tokio::test]
async fn an_address_registers_once_and_nothing_is_left_of_the_second_attempt() {
    let world = world().await;
    let other = OrgId::random();
    let second = world
        .store
        .register(&account("first@example.org"), "acme", &key(&other), None, now())
        .await;
    assert!(matches!(second, Err(StoreError::Conflict(Conflict::EmailTaken))));
    assert!(world.store.keys(&other).await.expect("keys").is_empty());
    let third = world
        .store
        .register(&account("other@example.org"), "acme", &key(&other), None, now())
        .await;
    assert_ne!(third.expect("registered"), "acme", "a slug is unique");
}

#[tokio::test]
async fn a_key_is_found_until_it_is_revoked_and_only_by_its_owner() {
    let world = world().await;
    let stranger = organization(&world.store, "stranger@example.org").await;
    let own = world.store.keys(&world.org).await.expect("keys").remove(0);
    assert!(
        !world
            .store
            .revoke_key(&stranger, &own.id, now())
            .await
            .expect("asked")
    );
    let at = now();
    let uses = HashMap::from([(own.id.clone(), at)]);
    world.store.touch_keys(&uses).await.expect("touched");
    let found = world.store.key(&own.id).await.expect("asked").expect("found");
    assert_eq!(
        (found.org_id, found.last_used_at, found.hash),
        (world.org.clone(), Some(at), vec![7; 32])
    );
    assert!(
        world
            .store
            .revoke_key(&world.org, &own.id, now())
            .await
            .expect("revoked")
    );
    assert!(
        world
            .store
            .revoke_key(&world.org, &own.id, now())
            .await
            .expect("revoked twice")
    );
    assert!(world.store.key(&own.id).await.expect("asked").is_none());
    assert!(world.store.keys(&world.org).await.expect("keys").is_empty());
}

#[tokio::test]
async fn an_organization_has_only_so_many_keys() {
    let world = world().await;
    let first = world.store.keys(&world.org).await.expect("keys").remove(0);
    let of_user = || NewKey {
        user_id: first.user_id.clone(),
        ..key(&world.org)
    };
    world
        .store
        .insert_key(&of_user(), 2, now())
        .await
        .expect("the second");
    let third = world.store.insert_key(&of_user(), 2, now()).await;
    assert!(matches!(
        third,
        Err(StoreError::Conflict(Conflict::TooManyKeys { limit: 2 }))
    ));
}

#[tokio::test]
async fn the_newest_actions_of_each_organization_are_kept() {
    let world = world().await;
    let stranger = organization(&world.store, "stranger@example.org").await;
    let action = |org_id: &OrgId, number: usize, time: Timestamp| NewAction {
        id: format!("event-{org_id}-{number}"),
        org_id: org_id.clone(),
        user_id: None,
        sandbox_id: None,
        time,
        action: "sandbox.create".to_owned(),
        outcome: ActionOutcome::Success,
        duration: 1,
        text: ActionText {
            resource: number.to_string(),
            details: serde_json::Map::new(),
            error_message: None,
        },
    };
    let mut actions: Vec<_> = (0..5).map(|number| action(&world.org, number, now())).collect();
    actions.push(action(&stranger, 0, now()));
    actions.push(action(&stranger, 1, Timestamp::UNIX_EPOCH));
    for _ in 0..2 {
        world.store.insert_actions(&actions).await.expect("stored, once");
    }
    let kept = async |org_id: &OrgId| -> Vec<String> {
        let filter = ActionFilter {
            limit: 9,
            ..ActionFilter::default()
        };
        let (actions, total) = world.store.actions(org_id, &filter).await.expect("asked");
        assert_eq!(u64::try_from(actions.len()), Ok(total));
        actions.into_iter().map(|action| action.resource).collect()
    };
    assert_eq!(
        (kept(&world.org).await.len(), kept(&stranger).await.len()),
        (5, 2)
    );
    let oldest = now() - SignedDuration::from_hours(1);
    let mut forgotten = 0;
    loop {
        match world.store.prune_actions(oldest, 3, 1).await.expect("pruned") {
            0 => break,
            number => forgotten += number,
        }
    }
    assert_eq!(forgotten, 3);
    assert_eq!(
        (kept(&world.org).await, kept(&stranger).await),
        (
            vec!["4".to_owned(), "3".to_owned(), "2".to_owned()],
            vec!["0".to_owned()]
        )
    );
}

#[tokio::test]
async fn the_quota_counts_live_sandboxes_of_one_organization() {
    let world = world().await;
    let stranger = organization(&world.store, "stranger@example.org").await;
    let first = world
        .store
        .insert_sandbox(&new_sandbox(&world.org, None), 1)
        .await
        .expect("the first");
    let second = world
        .store
        .insert_sandbox(&new_sandbox(&world.org, None), 1)
        .await;
    assert!(matches!(
        second,
        Err(StoreError::Conflict(Conflict::QuotaReached { limit: 1 }))
    ));
    world
        .store
        .insert_sandbox(&new_sandbox(&stranger, None), 1)
        .await
        .expect("a stranger's");
    world.store.withdraw(&first.id).await.expect("withdrawn");
    let while_ending = world
        .store
        .insert_sandbox(&new_sandbox(&world.org, None), 1)
        .await;
    assert!(
        while_ending.is_err(),
        "a sandbox that is ending holds its resources"
    );
    world
        .store
        .finish(&first.id, SandboxStatus::Terminated, None, now())
        .await
        .expect("finished");
    world
        .store
        .insert_sandbox(&new_sandbox(&world.org, None), 1)
        .await
        .expect("after the first has ended");
}

#[tokio::test]
async fn a_sandbox_comes_back_as_it_was_stored() {
    let world = world().await;
    let new = new_sandbox(&world.org, None);
    let inserted = world.store.insert_sandbox(&new, 1).await.expect("inserted");
    let found = world
        .store
        .sandbox(&world.org, &new.id)
        .await
        .expect("asked")
        .expect("found");
    assert_eq!(found, inserted);
    assert_eq!((found.spec, found.expires_at), (new.spec, new.expires_at));
    assert_eq!(found.status, SandboxStatus::Creating);
}

#[tokio::test]
async fn a_foreign_or_deleted_sandbox_is_not_there() {
    let world = world().await;
    let stranger = organization(&world.store, "stranger@example.org").await;
    let id = world.sandbox(None).await;
    assert!(
        world
            .store
            .sandbox(&stranger, &id)
            .await
            .expect("asked")
            .is_none()
    );
    assert!(!world.store.had_sandbox(&stranger, &id).await.expect("asked"));
    world.store.withdraw(&id).await.expect("withdrawn");
    world
        .store
        .finish(&id, SandboxStatus::Terminated, Some("stopped"), now())
        .await
        .expect("finished");
    let ended = world
        .store
        .sandbox(&world.org, &id)
        .await
        .expect("asked")
        .expect("still shown");
    assert_eq!(
        (ended.status, ended.status_reason.as_deref()),
        (SandboxStatus::Terminated, Some("stopped"))
    );
    world.store.mark_deleted(&id, now()).await.expect("deleted");
    assert!(
        world
            .store
            .sandbox(&world.org, &id)
            .await
            .expect("asked")
            .is_none()
    );
    assert!(world.store.had_sandbox(&world.org, &id).await.expect("asked"));
}

#[tokio::test]
async fn lists_are_paged_newest_first_and_leave_ended_ones_out() {
    let world = world().await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(world.sandbox(None).await);
    }
    world.store.withdraw(&ids[1]).await.expect("withdrawn");
    world
        .store
        .finish(&ids[1], SandboxStatus::Error, None, now())
        .await
        .expect("finished");
    let page = world
        .store
        .sandboxes(&world.org, false, None, 2)
        .await
        .expect("a page");
    assert_eq!(
        page.iter().map(|record| &record.id).collect::<Vec<_>>(),
        [&ids[3], &ids[2]]
    );
    let rest = world
        .store
        .sandboxes(&world.org, false, Some(page[1].sequence), 2)
        .await
        .expect("a page");
    assert_eq!(
        rest.iter().map(|record| &record.id).collect::<Vec<_>>(),
        [&ids[0]]
    );
    assert_eq!(
        world
            .store
            .sandboxes(&world.org, true, None, 9)
            .await
            .expect("all")
            .len(),
        4
    );
}

#[tokio::test]
async fn a_status_moves_only_forward() {
    let world = world().await;
    let id = world.sandbox(None).await;
    world.store.mark_running(&id).await.expect("running");
    assert!(world.store.mark_running(&id).await.is_err());
    assert!(
        world.store.announce(&id, &endpoint(1)).await.is_err(),
        "only what is being created is announced"
    );
    world.store.withdraw(&id).await.expect("withdrawn");
    world
        .store
        .finish(&id, SandboxStatus::Terminated, None, now())
        .await
        .expect("finished");
    assert_eq!(world.store.withdraw(&id).await.expect("withdrawn again"), None);
    let record = world
        .store
        .sandbox(&world.org, &id)
        .await
        .expect("asked")
        .expect("found");
    assert_eq!(record.status, SandboxStatus::Terminated, "an end is final");
    assert!(world.store.live_sandboxes().await.expect("live").is_empty());
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let world = world().await;
    let (id, revision) = world.announced(1).await;
    world
        .store
        .set_organization_policy(&world.org, &policy("deny_all"), None, now())
        .await
        .expect("set");
    let before = world.since(None).await;
    world.store.close().await;
    let store = Store::open(&world.directory.path().join("test.db"))
        .await
        .expect("opened again");
    assert!(*store.watch_revision().borrow() > revision);
    let after = store.feed_since(None).await.expect("a change");
    assert_eq!(snapshot(after), snapshot(before));
    assert_eq!(store.live_sandboxes().await.expect("live")[0].id, id);
}

#[tokio::test]
async fn ended_sandboxes_are_forgotten_with_their_policies() {
    let world = world().await;
    let id = world.sandbox(Some(policy("deny_all"))).await;
    let live = world.sandbox(None).await;
    world.store.withdraw(&id).await.expect("withdrawn");
    world
        .store
        .finish(&id, SandboxStatus::Terminated, None, now())
        .await
        .expect("finished");
    let past = now() - SignedDuration::from_secs(60);
    assert_eq!(world.store.prune_sandboxes(past, 10).await.expect("pruned"), 0);
    let future = now() + SignedDuration::from_secs(60);
    assert_eq!(world.store.prune_sandboxes(future, 10).await.expect("pruned"), 1);
    assert!(!world.store.had_sandbox(&world.org, &id).await.expect("asked"));
    assert!(world.store.sandbox_policy(&id).await.expect("asked").is_none());
    assert!(world.store.had_sandbox(&world.org, &live).await.expect("asked"));
}
