//! Tunnels, and the two feeds that speak of them.

use sandgate_api::{
    id::TunnelId,
    tunnel::{Access, Listening, Route, TunnelFrame, TunnelProtocol},
};

use super::*;
use crate::store::{EXPIRED_SHOWN, TunnelLimits, TunnelRecord};

const LIMITS: TunnelLimits = TunnelLimits {
    of_sandbox: 2,
    of_organization: 8,
    in_all: 4,
};

fn tunnel(org: &OrgId, sandbox: &SandboxId, port: u16, seconds: i64) -> TunnelRecord {
    TunnelRecord {
        id: TunnelId::random(),
        org_id: org.clone(),
        sandbox_id: sandbox.clone(),
        port,
        protocol: TunnelProtocol::Http,
        token_hash: None,
        local_port: None,
        created_at: now(),
        expires_at: now() + SignedDuration::from_secs(seconds),
    }
}

async fn running(world: &World, last: u8) -> SandboxId {
    let (id, _) = world.announced(last).await;
    world.store.mark_running(&id).await.expect("running");
    id
}

async fn open(world: &World, tunnel: &TunnelRecord) -> Revision {
    world.store.open_tunnel(tunnel, LIMITS).await.expect("opened")
}

/// The ports that the node is told of, by sandbox.
async fn ports(world: &World, since: Option<Revision>) -> Vec<Vec<u16>> {
    match world.since(since).await.frame {
        FeedFrame::Snapshot { sandboxes, .. } => sandboxes,
        FeedFrame::Delta { upserts, .. } => upserts,
        FeedFrame::Heartbeat { .. } => Vec::new(),
    }
    .into_iter()
    .map(|sandbox| sandbox.tunnel_ports)
    .collect()
}

async fn routes(world: &World) -> Vec<Route> {
    match world.store.tunnels_since(None).await.expect("a change").frame {
        TunnelFrame::Snapshot { routes, .. } => routes,
        other => panic!("a snapshot: {other:?}"),
    }
}

#[tokio::test]
async fn opening_and_closing_are_told_to_both_in_one_revision() {
    let world = world().await;
    let id = running(&world, 1).await;
    let before = *world.store.watch_revision().borrow();
    let first = TunnelRecord {
        token_hash: Some([0xab; 32]),
        ..tunnel(&world.org, &id, 3000, 60)
    };
    let opened = open(&world, &first).await;
    assert_eq!(ports(&world, Some(before)).await, [[3000]]);
    let change = world.store.tunnels_since(Some(before)).await.expect("a change");
    assert_eq!(change.revision, opened);
    let TunnelFrame::Delta { upserts, removed, .. } = change.frame else {
        panic!("a delta")
    };
    assert!(removed.is_empty());
    assert_eq!((upserts.len(), &upserts[0].tunnel_id), (1, &first.id));
    assert_eq!(
        upserts[0].access,
        Access::Token {
            sha256: "ab".repeat(32)
        }
    );

    // A second one to the same port: the node hears of the port once, and until both are closed.
    let second = tunnel(&world.org, &id, 3000, 60);
    open(&world, &second).await;
    assert_eq!(ports(&world, None).await, [[3000]]);
    let close = async |tunnel: &TunnelRecord| {
        let closed = world.store.close_tunnel(&world.org, &tunnel.id).await;
        closed.expect("closed").expect("it was there")
    };
    assert_eq!(close(&first).await.1, id);
    assert_eq!(ports(&world, None).await, [[3000]]);
    let (revision, _) = close(&second).await;
    let second_id = second.id.clone();
    assert_eq!(ports(&world, Some(revision - 1)).await, [[0_u16; 0]]);
    let change = world.store.tunnels_since(Some(opened)).await.expect("a change");
    assert_eq!(
        change.frame,
        TunnelFrame::Delta {
            revision,
            upserts: vec![],
            removed: vec![first.id.clone(), second.id]
        }
    );
    let again = world.store.close_tunnel(&world.org, &first.id).await;
    assert_eq!(again.expect("asked"), None);
    let closed = async |org: &OrgId| world.store.closed_tunnel(org, &second_id).await.expect("asked");
    assert_eq!(closed(&world.org).await, Some((revision, id)));
    let stranger = organization(&world.store, "second@example.org").await;
    assert_eq!(closed(&stranger).await, None);
}

#[tokio::test]
async fn a_tunnel_belongs_to_one_organisation_and_to_a_running_sandbox() {
    let world = world().await;
    let stranger = organization(&world.store, "second@example.org").await;
    let id = running(&world, 1).await;
    let own = tunnel(&world.org, &id, 3000, 60);
    open(&world, &own).await;
    assert_eq!(world.store.tunnel(&stranger, &own.id).await.expect("asked"), None);
    assert_eq!(
        world.store.close_tunnel(&stranger, &own.id).await.expect("asked"),
        None
    );
    let (creating, _) = world.announced(2).await;
    for wrong in [
        tunnel(&stranger, &id, 3000, 60),
        tunnel(&world.org, &creating, 3000, 60),
        tunnel(&world.org, &SandboxId::random(), 3000, 60),
    ] {
        let before = *world.store.watch_revision().borrow();
        let refused = world.store.open_tunnel(&wrong, LIMITS).await;
        assert!(matches!(refused, Err(StoreError::Conflict(Conflict::WrongState))));
        assert_eq!(world.since(None).await.revision, before, "nothing was committed");
    }
}

#[tokio::test]
async fn tunnels_end_with_their_sandbox() {
    let world = world().await;
    let id = running(&world, 1).await;
    let own = tunnel(&world.org, &id, 3000, 60);
    open(&world, &own).await;
    let revision = world
        .store
        .withdraw(&id)
        .await
        .expect("withdrawn")
        .expect("a revision");
    assert!(routes(&world).await.is_empty());
    let change = world
        .store
        .tunnels_since(Some(revision - 1))
        .await
        .expect("a change");
    assert_eq!(
        change.frame,
        TunnelFrame::Delta {
            revision,
            upserts: vec![],
            removed: vec![own.id]
        }
    );
}

#[tokio::test]
async fn there_are_limits_and_expired_ones_give_way() {
    let world = world().await;
    let (one, other, third) = (
        running(&world, 1).await,
        running(&world, 2).await,
        running(&world, 3).await,
    );
    open(&world, &tunnel(&world.org, &one, 1, 60)).await;
    let short = TunnelRecord {
        created_at: now() - SignedDuration::from_secs(9),
        expires_at: now() - SignedDuration::from_secs(1),
        ..tunnel(&world.org, &one, 2, 0)
    };
    open(&world, &short).await;
    // An expired one does not count for its sandbox.
    open(&world, &tunnel(&world.org, &one, 3, 60)).await;
    let refused = world
        .store
        .open_tunnel(&tunnel(&world.org, &one, 4, 60), LIMITS)
        .await;
    assert!(matches!(
        refused,
        Err(StoreError::Conflict(Conflict::TooManyTunnels { limit: 2 }))
    ));
    open(&world, &tunnel(&world.org, &other, 5, 60)).await;
    // Four are there: the expired one goes once its port is off the feed, the others stay.
    world.store.retire_tunnels(now()).await.expect("retired");
    open(&world, &tunnel(&world.org, &third, 6, 60)).await;
    assert!(
        routes(&world)
            .await
            .iter()
            .all(|route| route.tunnel_id != short.id)
    );
    let refused = world
        .store
        .open_tunnel(&tunnel(&world.org, &third, 7, 60), LIMITS)
        .await;
    assert!(matches!(
        refused,
        Err(StoreError::Conflict(Conflict::NoTunnelLeft))
    ));
}

#[tokio::test]
async fn one_organisation_leaves_tunnels_to_others() {
    let world = world().await;
    let limits = TunnelLimits {
        of_organization: 2,
        ..LIMITS
    };
    let try_open = async |tunnel: &TunnelRecord| world.store.open_tunnel(tunnel, limits).await;
    let (one, other) = (running(&world, 1).await, running(&world, 2).await);
    let expired = TunnelRecord {
        created_at: now() - SignedDuration::from_secs(9),
        expires_at: now() - SignedDuration::from_secs(1),
        ..tunnel(&world.org, &one, 1, 0)
    };
    let first = tunnel(&world.org, &one, 2, 60);
    for record in [&expired, &first, &tunnel(&world.org, &other, 3, 60)] {
        try_open(record).await.expect("opened");
    }
    let third = tunnel(&world.org, &other, 4, 60);
    assert!(matches!(
        try_open(&third).await,
        Err(StoreError::Conflict(Conflict::TooManyTunnelsOfOrganization {
            limit: 2
        }))
    ));

    let stranger = organization(&world.store, "second@example.org").await;
    let theirs = new_sandbox(&stranger, None);
    let theirs = world.store.insert_sandbox(&theirs, 9).await.expect("inserted").id;
    world
        .store
        .announce(&theirs, &endpoint(3))
        .await
        .expect("announced");
    world.store.mark_running(&theirs).await.expect("running");
    try_open(&tunnel(&stranger, &theirs, 5, 60))
        .await
        .expect("others are not concerned");
}

#[tokio::test]
async fn an_expired_tunnel_loses_its_port_and_says_so_for_an_hour() {
    let world = world().await;
    let id = running(&world, 1).await;
    let own = tunnel(&world.org, &id, 3000, 60);
    open(&world, &own).await;
    let at = |seconds| own.expires_at + SignedDuration::from_secs(seconds);
    let retire = async |time| world.store.retire_tunnels(time).await.expect("retired");
    assert_eq!(retire(at(-1)).await, Some(own.expires_at));
    assert_eq!(ports(&world, None).await, [[3000]]);
    assert_eq!(
        world.store.open_tunnels(&id, at(-1)).await.expect("open").len(),
        1
    );

    assert_eq!(retire(at(0)).await, Some(own.expires_at + EXPIRED_SHOWN));
    let revision = world.since(None).await.revision;
    assert_eq!(ports(&world, Some(revision - 1)).await, [[0_u16; 0]]);
    assert_eq!(routes(&world).await.len(), 1, "its URL says that it has expired");
    assert_eq!(world.store.open_tunnels(&id, at(0)).await.expect("open"), []);
    assert_eq!(retire(at(1)).await, Some(own.expires_at + EXPIRED_SHOWN));
    assert_eq!(world.since(None).await.revision, revision, "told once");

    assert_eq!(retire(own.expires_at + EXPIRED_SHOWN).await, None);
    assert!(routes(&world).await.is_empty());
}

#[tokio::test]
async fn tunnels_and_their_ports_are_there_after_a_restart() {
    let world = world().await;
    let id = running(&world, 1).await;
    let own = tunnel(&world.org, &id, 3000, 60);
    let revision = open(&world, &own).await;
    let listening = [Listening {
        tunnel_id: own.id.clone(),
        local_port: 40_001,
    }];
    world.store.note_local_ports(&listening).await.expect("noted");
    world.store.close().await;
    let store = Store::open(&world.directory.path().join("test.db"))
        .await
        .expect("opened again");
    let kept = store
        .tunnel(&world.org, &own.id)
        .await
        .expect("asked")
        .expect("there");
    assert_eq!(
        kept,
        TunnelRecord {
            local_port: Some(40_001),
            ..own
        }
    );
    // The last history may have had more than this store knows of.
    let routes = store.tunnels_since(Some(revision)).await.expect("a change");
    assert!(matches!(routes.frame, TunnelFrame::Snapshot { .. }), "{routes:?}");
    assert!(routes.revision > revision);
    let sandboxes = store.feed_since(Some(revision)).await.expect("a change");
    assert!(
        matches!(sandboxes.frame, FeedFrame::Snapshot { .. }),
        "{sandboxes:?}"
    );
    let current = store
        .tunnels_since(Some(routes.revision))
        .await
        .expect("a change");
    assert!(matches!(current.frame, TunnelFrame::Delta { .. }), "{current:?}");
}
