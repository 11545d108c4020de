//! The feed: who is told what, and when.

use super::*;

#[tokio::test]
async fn a_node_without_position_gets_everything_and_then_only_changes() {
    let world = world().await;
    let waiting = world.sandbox(None).await;
    let (one, _) = world.announced(1).await;
    let first = world.since(None).await;
    let position = first.revision;
    let everything = snapshot(first);
    assert_eq!(everything.len(), 1, "{waiting} is not on the feed yet");
    assert_eq!(
        (&everything[0].sandbox_id, &everything[0].endpoint),
        (&one, &endpoint(1))
    );
    assert!(everything[0].tiers.is_empty());

    let (two, revision) = world.announced(2).await;
    assert!(revision > position);
    let change = world.since(Some(position)).await;
    assert_eq!(change.revision, revision);
    let (upserts, removed) = delta(change);
    assert_eq!(
        (upserts.len(), &upserts[0].sandbox_id, removed),
        (1, &two, vec![])
    );

    let gone = world
        .store
        .withdraw(&one)
        .await
        .expect("withdrawn")
        .expect("a revision");
    assert_eq!(
        delta(world.since(Some(revision)).await),
        (vec![], vec![one.clone()])
    );
    assert_eq!(delta(world.since(Some(gone)).await), (vec![], vec![]));
    assert_eq!(snapshot(world.since(None).await).len(), 1);
}

#[tokio::test]
async fn a_position_from_elsewhere_gets_a_snapshot() {
    let world = world().await;
    let (_, revision) = world.announced(1).await;
    for since in [0, 1, revision + 1, Revision::MAX] {
        assert_eq!(snapshot(world.since(Some(since)).await).len(), 1, "since {since}");
    }
}

#[tokio::test]
async fn a_policy_change_puts_exactly_those_it_concerns_on_the_feed() {
    let world = world().await;
    let stranger = organization(&world.store, "stranger@example.org").await;
    let (one, _) = world.announced(1).await;
    let (two, _) = world.announced(2).await;
    let foreign = world
        .store
        .insert_sandbox(&new_sandbox(&stranger, None), 9)
        .await
        .expect("inserted")
        .id;
    let before = world
        .store
        .announce(&foreign, &endpoint(3))
        .await
        .expect("announced");

    let deny = policy("deny_all");
    let change = world
        .store
        .set_organization_policy(&world.org, &deny, None, now())
        .await
        .expect("set");
    let (upserts, _) = delta(world.since(Some(before)).await);
    let ids: Vec<_> = upserts.iter().map(|sandbox| sandbox.sandbox_id.clone()).collect();
    assert_eq!(ids.len(), 2);
    assert!(ids.contains(&one) && ids.contains(&two));
    assert_eq!(change.concerns.len(), 2);
    for sandbox in &upserts {
        assert_eq!(sandbox.tiers.len(), 1);
        assert_eq!(
            (sandbox.tiers[0].tier, &*sandbox.tiers[0].policy),
            (TierName::Organization, &deny)
        );
    }

    let own = policy("allow_all");
    let at = change.stored.revision;
    let change = world
        .store
        .set_sandbox_policy(&one, &own, None, now())
        .await
        .expect("set");
    assert_eq!(change.concerns, std::slice::from_ref(&one));
    let (upserts, _) = delta(world.since(Some(at)).await);
    assert_eq!(upserts.len(), 1);
    let tiers: Vec<_> = upserts[0].tiers.iter().map(|tier| tier.tier).collect();
    assert_eq!(
        tiers,
        [TierName::Organization, TierName::Sandbox],
        "in the order of precedence"
    );
    assert_eq!(
        world
            .store
            .sandbox_policy(&one)
            .await
            .expect("asked")
            .expect("stored")
            .policy,
        own
    );
}

#[tokio::test]
async fn a_policy_given_at_creation_is_on_the_feed_from_the_first_frame() {
    let world = world().await;
    let id = world.sandbox(Some(policy("deny_all"))).await;
    world.store.announce(&id, &endpoint(1)).await.expect("announced");
    let everything = snapshot(world.since(None).await);
    assert_eq!(everything[0].tiers.len(), 1);
    assert_eq!(*everything[0].tiers[0].policy, policy("deny_all"));
}

#[tokio::test]
async fn a_stale_revision_changes_nothing() {
    let world = world().await;
    let (id, _) = world.announced(1).await;
    let set = |policy: Policy, expected| {
        let (store, id) = (world.store.clone(), id.clone());
        async move { store.set_sandbox_policy(&id, &policy, expected, now()).await }
    };
    let first = set(policy("deny_all"), Some(0))
        .await
        .expect("the first")
        .stored
        .revision;
    let position = world.since(None).await.revision;
    for stale in [0, first - 1, first + 1] {
        let refused = set(policy("allow_all"), Some(stale)).await;
        assert!(
            matches!(refused, Err(StoreError::Conflict(Conflict::StaleRevision { current })) if current == first),
            "{stale}"
        );
    }
    assert_eq!(
        world.since(None).await.revision,
        position,
        "a refusal takes no revision"
    );
    assert_eq!(
        world
            .store
            .sandbox_policy(&id)
            .await
            .expect("asked")
            .expect("stored")
            .policy,
        policy("deny_all")
    );
    set(policy("allow_all"), Some(first))
        .await
        .expect("with the present revision");
}

#[tokio::test]
async fn an_ended_sandbox_takes_no_policy() {
    let world = world().await;
    let (id, _) = world.announced(1).await;
    world.store.withdraw(&id).await.expect("withdrawn");
    let refused = world
        .store
        .set_sandbox_policy(&id, &policy("deny_all"), None, now())
        .await;
    assert!(matches!(refused, Err(StoreError::Conflict(Conflict::WrongState))));
}

#[tokio::test]
async fn those_who_follow_are_told_after_the_commit() {
    let world = world().await;
    let mut follower = world.store.watch_revision();
    follower.mark_unchanged();
    let (_, revision) = world.announced(1).await;
    assert!(follower.has_changed().expect("open"));
    assert_eq!(*follower.borrow_and_update(), revision);
    world.sandbox(None).await;
    assert!(
        !follower.has_changed().expect("open"),
        "nothing on the feed changed"
    );
}
