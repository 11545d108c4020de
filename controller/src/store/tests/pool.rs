//! The warm pool: nobody's until claimed, claimed once, and then somebody's sandbox like any other.

use proptest::prelude::*;

use super::*;

fn member() -> PoolRecord {
    let new = new_sandbox(&OrgId::nobody(), None);
    PoolRecord {
        id: new.id,
        status: PoolStatus::Creating,
        spec: new.spec,
        build: "1".to_owned(),
        created_at: now(),
        authority: AuthorityRecord {
            generation: 1,
            certificate: "PEM".to_owned(),
        },
    }
}

/// A claim of `member` by `org`.
fn claim(org: &OrgId, member: &PoolRecord, policy: Option<Policy>) -> NewSandbox {
    NewSandbox {
        id: member.id.clone(),
        authority: Some(member.authority.clone()),
        ..new_sandbox(org, policy)
    }
}

impl World {
    async fn ready_member(&self, last: u8) -> (PoolRecord, Revision) {
        let member = member();
        self.store.insert_pooled(&member).await.expect("inserted");
        let announced = self.store.announce_pooled(&member.id, &endpoint(last)).await;
        self.store.mark_pooled_ready(&member.id).await.expect("ready");
        (member, announced.expect("announced"))
    }
}

#[tokio::test]
async fn a_member_is_denied_everything_and_nobody_sees_it() {
    let world = world().await;
    let (member, revision) = world.ready_member(1).await;
    let listed = snapshot(world.since(None).await);
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].org_id, OrgId::nobody());
    assert_eq!(listed[0].endpoint, endpoint(1));
    assert_eq!(listed[0].tiers.len(), 1);
    assert_eq!(*listed[0].tiers[0].policy, policy("deny_all"));
    assert!(delta(world.since(Some(revision)).await).0.is_empty());
    let store = &world.store;
    for org in [&world.org, &OrgId::nobody()] {
        assert!(store.sandbox(org, &member.id).await.expect("asked").is_none());
        assert!(!store.had_sandbox(org, &member.id).await.expect("asked"));
        assert!(
            store
                .sandboxes(org, true, None, 9)
                .await
                .expect("asked")
                .is_empty()
        );
    }
    assert!(store.sandbox_on_feed(&member.id).await.expect("asked").is_none());
    assert!(store.live_sandboxes().await.expect("asked").is_empty());
    assert_eq!(store.pooled().await.expect("asked")[0].status, PoolStatus::Ready);
}

#[tokio::test]
async fn a_claim_makes_it_its_owners_in_one_step() {
    let world = world().await;
    world
        .store
        .set_organization_policy(&world.org, &policy("allow_all"), None, now())
        .await
        .expect("set");
    let (member, before) = world.ready_member(1).await;
    let claim = claim(&world.org, &member, Some(policy("deny_all")));
    let record = world.store.claim_pooled(&claim, 9).await.expect("claimed");
    assert_eq!(record.status, SandboxStatus::Creating);
    assert!(record.feed_revision > before);
    let stored = world.store.sandbox(&world.org, &member.id).await.expect("asked");
    assert_eq!(stored.as_ref(), Some(&record));
    // The node hears of a change, never of an end.
    let (upserts, removed) = delta(world.since(Some(before)).await);
    assert!(removed.is_empty());
    assert_eq!(upserts.len(), 1);
    assert_eq!(upserts[0].org_id, world.org);
    assert_eq!(upserts[0].endpoint, endpoint(1));
    let tiers: Vec<TierName> = upserts[0].tiers.iter().map(|tier| tier.tier).collect();
    assert_eq!(tiers, [TierName::Organization, TierName::Sandbox]);
    assert!(delta(world.since(Some(record.feed_revision)).await).0.is_empty());
    // And from here it goes on as any other.
    world.store.mark_running(&member.id).await.expect("running");
    let gone = world.store.withdraw(&member.id).await.expect("withdrawn");
    let (upserts, removed) = delta(world.since(Some(record.feed_revision)).await);
    assert_eq!((upserts.len(), removed), (0, vec![member.id.clone()]));
    assert!(gone > Some(record.feed_revision));
    assert!(world.store.pooled().await.expect("asked").is_empty());
}

#[tokio::test]
async fn a_claim_that_fails_leaves_the_member_for_others() {
    let world = world().await;
    let (member, _) = world.ready_member(1).await;
    let refused = world
        .store
        .claim_pooled(&claim(&world.org, &member, None), 0)
        .await;
    let quota = Conflict::QuotaReached { limit: 0 };
    assert!(matches!(refused, Err(StoreError::Conflict(conflict)) if conflict == quota));
    let unknown = NewSandbox {
        secrets: SecretChoice::Named(vec!["NONE".to_owned()]),
        ..claim(&world.org, &member, None)
    };
    let refused = world.store.claim_pooled(&unknown, 9).await;
    assert!(matches!(
        refused,
        Err(StoreError::Conflict(Conflict::NoSuchSecret { index: 0 }))
    ));
    assert_eq!(snapshot(world.since(None).await)[0].org_id, OrgId::nobody());
    world
        .store
        .claim_pooled(&claim(&world.org, &member, None), 9)
        .await
        .expect("claimed");
}

#[tokio::test]
async fn only_what_is_ready_can_be_claimed_and_what_is_claimed_does_not_end_as_a_member() {
    let world = world().await;
    let store = &world.store;
    let refused = async |member: &PoolRecord| {
        let claimed = store.claim_pooled(&claim(&world.org, member, None), 9).await;
        matches!(claimed, Err(StoreError::Conflict(Conflict::WrongState)))
    };
    let young = member();
    assert!(refused(&young).await, "it does not exist");
    store.insert_pooled(&young).await.expect("inserted");
    assert!(refused(&young).await, "it is being made");
    assert!(
        store.mark_pooled_ready(&young.id).await.is_err(),
        "not before it is on the feed"
    );
    let (ending, before) = world.ready_member(2).await;
    let withdrawn = store.withdraw_pooled(&ending.id).await.expect("withdrawn");
    assert!(matches!(withdrawn, Withdrawal::Ending(Some(_))));
    assert!(refused(&ending).await, "it is ending");
    assert_eq!(
        delta(world.since(Some(before)).await).1,
        std::slice::from_ref(&ending.id)
    );
    let again = store.withdraw_pooled(&ending.id).await.expect("withdrawn");
    assert_eq!(again, Withdrawal::Ending(None));
    store.forget_pooled(&ending.id).await.expect("forgotten");
    let (taken, _) = world.ready_member(3).await;
    store
        .claim_pooled(&claim(&world.org, &taken, None), 9)
        .await
        .expect("claimed");
    let late = store.withdraw_pooled(&taken.id).await.expect("asked");
    assert_eq!(late, Withdrawal::Claimed);
    store.forget_pooled(&taken.id).await.expect("nothing to forget");
    assert!(store.sandbox_on_feed(&taken.id).await.expect("asked").is_some());
    // An ending that is not over is found again.
    assert_eq!(store.pooled().await.expect("asked").len(), 1);
}

#[tokio::test]
async fn of_many_who_want_one_member_one_gets_it() {
    let world = world().await;
    let other = organization(&world.store, "other@example.org").await;
    for last in 1..=5 {
        let (member, _) = world.ready_member(last).await;
        let claims: Vec<NewSandbox> = [&world.org, &other, &world.org, &other]
            .into_iter()
            .map(|org| claim(org, &member, None))
            .collect();
        let claims = claims.iter().map(|claim| world.store.claim_pooled(claim, 99));
        let results = futures_util::future::join_all(claims).await;
        let won = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(won, 1, "{results:?}");
    }
}

#[tokio::test]
async fn what_one_sandbox_goes_through_spares_the_disk_and_nothing_else_does() {
    let world = world().await;
    let level = async |transaction: &mut Transaction<'static, Sqlite>| -> i64 {
        let level = sqlx::query_scalar("PRAGMA synchronous");
        level.fetch_one(&mut **transaction).await.expect("a level")
    };
    for _ in 0..2 {
        let mut brief = world.store.write_brief().await.expect("begun");
        assert_eq!(level(&mut brief).await, 1, "NORMAL");
        brief.commit().await.expect("committed");
        let mut whole = world.store.write().await.expect("begun");
        assert_eq!(level(&mut whole).await, 2, "FULL");
        whole.rollback().await.expect("ended");
        drop(world.store.write_brief().await.expect("begun"));
        let single: i64 = sqlx::query_scalar("PRAGMA synchronous")
            .fetch_one(&world.store.writer)
            .await
            .expect("a level");
        assert_eq!(single, 2, "a statement of its own");
    }
}

/// What is done to a few members, in any order.
#[derive(Debug, Clone, Copy)]
enum Step {
    Insert,
    Announce,
    Ready,
    Claim,
    Withdraw,
    Forget,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_is_nobodys_or_somebodys_and_a_node_that_follows_knows_whose(
        steps in proptest::collection::vec((0_usize..3, 0_usize..6), 1..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let world = world().await;
            let store = &world.store;
            let members = [member(), member(), member()];
            let mut followed: BTreeMap<SandboxId, OrgId> = BTreeMap::new();
            let mut at = None;
            let mut claimed = [0_u8; 3];
            for (who, what) in steps {
                let member = &members[who];
                let step = [Step::Insert, Step::Announce, Step::Ready, Step::Claim, Step::Withdraw, Step::Forget][what];
                match step {
                    // An id is used once.
                    Step::Insert if claimed[who] == 0 => drop(store.insert_pooled(member).await),
                    Step::Insert => {}
                    Step::Announce => {
                        let place = endpoint(u8::try_from(who).expect("small") + 1);
                        drop(store.announce_pooled(&member.id, &place).await);
                    }
                    Step::Ready => drop(store.mark_pooled_ready(&member.id).await),
                    Step::Claim => {
                        if store.claim_pooled(&claim(&world.org, member, None), 99).await.is_ok() {
                            claimed[who] += 1;
                        }
                    }
                    Step::Withdraw => drop(store.withdraw_pooled(&member.id).await.expect("asked")),
                    Step::Forget => store.forget_pooled(&member.id).await.expect("asked"),
                }
                let change = world.since(at).await;
                at = Some(change.revision);
                match change.frame {
                    FeedFrame::Snapshot { sandboxes, .. } => {
                        followed = sandboxes.into_iter().map(|one| (one.sandbox_id, one.org_id)).collect();
                    }
                    FeedFrame::Delta { upserts, removed, .. } => {
                        removed.iter().for_each(|id| drop(followed.remove(id)));
                        followed.extend(upserts.into_iter().map(|one| (one.sandbox_id, one.org_id)));
                    }
                    FeedFrame::Heartbeat { .. } => {}
                }
                let whole: BTreeMap<_, _> = snapshot(world.since(None).await)
                    .into_iter()
                    .map(|one| (one.sandbox_id, one.org_id))
                    .collect();
                assert_eq!(followed, whole, "after {step:?}");
                let pooled: Vec<SandboxId> =
                    store.pooled().await.expect("asked").into_iter().map(|member| member.id).collect();
                for (member, claims) in members.iter().zip(claimed) {
                    assert!(claims <= 1, "claimed twice");
                    let owned = store.sandbox(&world.org, &member.id).await.expect("asked").is_some();
                    assert_eq!(owned, claims == 1);
                    assert!(!(owned && pooled.contains(&member.id)), "in two places");
                }
            }
        });
    }
}
