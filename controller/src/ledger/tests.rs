use jiff::SignedDuration;
use sandgate_api::{
    audit::{AuditEvent, AuditVerdict},
    id::SandboxId,
    rest::AuditProblemKind,
};
use sandgate_policy::Reason;
use sqlx::{Connection as _, SqliteConnection};

use super::*;

struct World {
    directory: tempfile::TempDir,
    store: Store,
    ledger: Ledger,
    org: OrgId,
}

fn installation(byte: u8) -> InstallationKey {
    InstallationKey::from_key([byte; 32])
}

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("a time")
}

async fn world() -> World {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(&directory.path().join("test.db"))
        .await
        .expect("a store");
    World {
        ledger: Ledger::new(store.clone(), &installation(1), directory.path()),
        store,
        directory,
        org: OrgId::random(),
    }
}

fn event(org: &OrgId, number: i64) -> AuditEvent {
    AuditEvent {
        id: format!("event-{number}"),
        time: now() + SignedDuration::from_secs(number),
        org_id: org.clone(),
        sandbox_id: "sandbox-1".parse::<SandboxId>().expect("an id"),
        verdict: AuditVerdict::Deny,
        reason: Reason::DefaultDeny,
        tier: None,
        rule: None,
        protocol: "tls".to_owned(),
        host: Some(format!("n{number}.test")),
        ip: None,
        port: Some(443),
        method: None,
        path: None,
        credential: None,
        bytes_up: 0,
        bytes_down: 0,
        duration_ms: 0,
        repeated: 1,
        detail: None,
        gap: None,
        alert: None,
    }
}

impl World {
    /// Stores records with these numbers, among those of others.
    async fn record(&self, numbers: std::ops::Range<i64>) {
        let other: OrgId = "org-other".parse().expect("an id");
        for number in numbers {
            let events = [event(&other, number + 1_000_000), event(&self.org, number)];
            self.store
                .insert_audit(self.ledger.key(), &events)
                .await
                .expect("stored");
        }
    }

    /// Changes the database as somebody would who has nothing but the database.
    async fn tamper(&self, statement: &'static str) {
        let path = self.directory.path().join("test.db");
        let address = format!("sqlite://{}", path.display());
        let mut connection = SqliteConnection::connect(&address).await.expect("a connection");
        let done = sqlx::query(statement)
            .execute(&mut connection)
            .await
            .expect(statement);
        assert!(done.rows_affected() > 0, "{statement}");
    }

    async fn verify(&self) -> AuditVerification {
        self.ledger.verify(&self.org).await.expect("looked at")
    }

    #[track_caller]
    fn assert_verified(&self, found: &AuditVerification, records: u64) {
        assert!(found.verified, "{found:?}");
        assert_eq!((found.records, found.unchained), (records, 0), "{found:?}");
    }

    async fn sign(&self) {
        self.ledger.sign(now()).await.expect("signed");
    }
}

#[tokio::test]
async fn what_nobody_touched_is_verified() {
    let world = world().await;
    let nothing = world.verify().await;
    world.assert_verified(&nothing, 0);
    world.record(0..10).await;
    let unsigned = world.verify().await;
    world.assert_verified(&unsigned, 10);
    assert_eq!(unsigned.signed_at, None);
    world.sign().await;
    // Delivered again: neither a second record nor a second link.
    world.record(5..12).await;
    let signed = world.verify().await;
    world.assert_verified(&signed, 12);
    assert_eq!(
        (signed.signed_at, signed.anchor, signed.position),
        (Some(now()), Some(0), Some(12))
    );
    world.sign().await;
    let more = world.verify().await;
    world.assert_verified(&more, 12);
    assert_eq!(world.ledger.organizations().await.expect("listed").len(), 2);
}

#[tokio::test]
async fn the_first_record_that_was_changed_is_named() {
    use AuditProblemKind::{Anchor, Cut, Edited, Inserted, Removed, Reordered};
    let own = "org_id <> 'org-other'";
    let cases: [(String, AuditProblemKind, Option<i64>, Option<&str>); 15] = [
        (
            "UPDATE egress_audit SET document = replace(document, 'n4.test', 'x4.test') WHERE id = 'event-4'"
                .into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET host = 'x.test' WHERE id = 'event-4'".into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET verdict = 'allow' WHERE id = 'event-4'".into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET time = time + 1 WHERE id = 'event-4'".into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET mac = zeroblob(32) WHERE id = 'event-4'".into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET mac = NULL WHERE id = 'event-4'".into(),
            Edited,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET epoch = NULL WHERE id = 'event-4'".into(),
            Inserted,
            Some(5),
            Some("event-4"),
        ),
        (
            "UPDATE egress_audit SET org_id = 'org-other' WHERE id = 'event-4'".into(),
            Removed,
            Some(5),
            Some("event-5"),
        ),
        (
            "DELETE FROM egress_audit WHERE id = 'event-4'".into(),
            Removed,
            Some(5),
            Some("event-5"),
        ),
        (
            "DELETE FROM egress_audit WHERE id = 'event-0'".into(),
            Removed,
            Some(1),
            Some("event-1"),
        ),
        (
            "DELETE FROM egress_audit WHERE id = 'event-9'".into(),
            Cut,
            Some(10),
            None,
        ),
        (
            format!(
                "INSERT INTO egress_audit (id, org_id, sandbox_id, time, verdict, document) \
          SELECT 'event-x', org_id, sandbox_id, time, verdict, document FROM egress_audit WHERE id = 'event-4' AND {own}"
            ),
            Inserted,
            Some(11),
            Some("event-x"),
        ),
        (
            "UPDATE egress_audit SET sequence = sequence + 1000 WHERE id = 'event-4'".into(),
            Reordered,
            Some(5),
            Some("event-5"),
        ),
        (
            format!("UPDATE egress_audit_chains SET anchor_position = 3 WHERE {own}"),
            Anchor,
            Some(3),
            None,
        ),
        (
            format!("UPDATE egress_audit_chains SET position = 9 WHERE {own}"),
            Anchor,
            Some(9),
            None,
        ),
    ];
    for (statement, kind, position, event_id) in cases {
        let world = world().await;
        world.record(0..10).await;
        let statement: &'static str = statement.leak();
        world.tamper(statement).await;
        let found = world.verify().await;
        let problem = found
            .problem
            .as_ref()
            .unwrap_or_else(|| panic!("unnoticed: {statement}"));
        assert!(!found.verified);
        assert_eq!(
            (problem.kind, problem.position, problem.event_id.as_deref()),
            (kind, position, event_id),
            "{statement}: {problem:?}"
        );
        let other = "org-other".parse().expect("an id");
        let theirs = world.ledger.verify(&other).await.expect("looked at");
        assert_eq!(
            theirs.verified,
            !statement.contains("org_id = 'org-other'"),
            "{statement}"
        );
    }
}

#[tokio::test]
async fn a_tail_that_is_cut_with_what_says_so_contradicts_the_signed_end() {
    let world = world().await;
    world.record(0..10).await;
    world.sign().await;
    world
        .tamper("DELETE FROM egress_audit WHERE id IN ('event-8', 'event-9')")
        .await;
    world
        .tamper(
            "UPDATE egress_audit_chains SET position = 8, \
             mac = (SELECT mac FROM egress_audit WHERE id = 'event-7') WHERE org_id <> 'org-other'",
        )
        .await;
    let found = world.verify().await;
    let problem = found.problem.expect("noticed");
    assert_eq!((problem.kind, problem.position), (AuditProblemKind::Cut, Some(9)));
    // Nor do new records or a new signature make up for it.
    world.record(20..30).await;
    world.sign().await;
    let found = world.verify().await;
    let problem = found.problem.expect("noticed");
    assert_eq!(
        (problem.kind, problem.position),
        (AuditProblemKind::Head, Some(10))
    );
    assert_eq!(problem.event_id.as_deref(), Some("event-21"));
}

#[tokio::test]
async fn a_chain_that_is_thrown_away_is_missed() {
    for statement in [
        "DELETE FROM egress_audit_chains WHERE org_id <> 'org-other'",
        "UPDATE egress_audit_chains SET key_id = zeroblob(8) WHERE org_id <> 'org-other'",
    ] {
        let world = world().await;
        world.record(0..10).await;
        world.sign().await;
        world.tamper(statement).await;
        assert!(!world.verify().await.verified, "{statement}");
        // The next record begins another one.
        world.record(10..11).await;
        world.sign().await;
        let found = world.verify().await;
        assert_eq!(
            found.problem.map(|problem| problem.kind),
            Some(AuditProblemKind::Cut),
            "{statement}"
        );
    }
}

#[tokio::test]
async fn what_is_forgotten_in_time_is_not_missed() {
    let world = world().await;
    world.record(0..10).await;
    world.sign().await;
    let before = now() + SignedDuration::from_secs(4);
    // Others' records are younger, and stand between.
    let pruned = world
        .store
        .prune_audit(world.ledger.key(), before, 1_000_000, 100)
        .await;
    assert_eq!(pruned.expect("pruned"), 0);
    world
        .tamper("DELETE FROM egress_audit WHERE org_id = 'org-other'")
        .await;
    let prune = async |before| {
        let pruned = world
            .store
            .prune_audit(world.ledger.key(), before, 1_000_000, 3)
            .await;
        pruned.expect("pruned")
    };
    assert_eq!(prune(before).await, 3, "step by step");
    assert_eq!(prune(before).await, 1);
    assert_eq!(prune(before).await, 0);
    let found = world.verify().await;
    world.assert_verified(&found, 6);
    assert_eq!((found.anchor, found.position), (Some(4), Some(10)));
    world
        .tamper("DELETE FROM egress_audit_chains WHERE org_id = 'org-other'")
        .await;
    world.record(10..12).await;
    world.sign().await;
    let found = world.verify().await;
    world.assert_verified(&found, 8);
    // Everything may go, the place where it ended stays.
    let all = now() + SignedDuration::from_secs(2_000_000);
    while prune(all).await > 0 {}
    let found = world.verify().await;
    world.assert_verified(&found, 0);
    assert_eq!(found.position, Some(12));
    world.record(12..13).await;
    let found = world.verify().await;
    world.assert_verified(&found, 1);
}

#[tokio::test]
async fn what_shows_that_somebody_changed_it_is_not_forgotten() {
    for (change, kind) in [
        (
            "DELETE FROM egress_audit WHERE id = 'event-4'",
            AuditProblemKind::Removed,
        ),
        (
            "UPDATE egress_audit SET time = 0 WHERE id = 'event-4'",
            AuditProblemKind::Edited,
        ),
        (
            "UPDATE egress_audit SET document = replace(document, 'n4.test', 'x4.test') WHERE id = 'event-4'",
            AuditProblemKind::Edited,
        ),
    ] {
        let world = world().await;
        world.record(0..10).await;
        world.sign().await;
        world.tamper(change).await;
        let all = now() + SignedDuration::from_secs(2_000_000);
        for _ in 0..20 {
            let pruned = world.store.prune_audit(world.ledger.key(), all, 0, 3).await;
            pruned.expect("pruned");
        }
        let problem = world.verify().await.problem.expect("noticed");
        assert_eq!((problem.kind, problem.position), (kind, Some(5)), "{change}");
    }
}

#[tokio::test]
async fn another_key_begins_another_chain_and_verifies_no_earlier_one() {
    let world = world().await;
    world.record(0..5).await;
    world.sign().await;
    let other = Ledger::new(world.store.clone(), &installation(2), world.directory.path());
    let found = other.verify(&world.org).await.expect("looked at");
    assert_eq!(
        found.problem.map(|problem| problem.kind),
        Some(AuditProblemKind::Head)
    );
    world
        .store
        .insert_audit(other.key(), &[event(&world.org, 5)])
        .await
        .expect("stored");
    other.sign(now()).await.expect("signed");
    let found = other.verify(&world.org).await.expect("looked at");
    assert!(found.verified, "{found:?}");
    assert_eq!((found.records, found.unchained, found.epoch), (1, 5, Some(2)));
}

#[tokio::test]
async fn records_from_before_the_chain_are_told_apart() {
    let world = world().await;
    world.record(0..3).await;
    world
        .tamper("UPDATE egress_audit SET epoch = NULL, position = NULL, mac = NULL")
        .await;
    world.tamper("DELETE FROM egress_audit_chains").await;
    world.record(3..5).await;
    let found = world.verify().await;
    assert!(found.verified, "{found:?}");
    assert_eq!((found.records, found.unchained), (2, 3));
}

#[tokio::test]
async fn heads_that_cannot_be_read_are_told() {
    let world = world().await;
    world.record(0..3).await;
    fs::write(world.directory.path().join(FILE), "{}\n").expect("written");
    assert!(matches!(
        world.ledger.verify(&world.org).await,
        Err(LedgerError::File { .. })
    ));
    world.ledger.sign(now()).await.expect_err("refused");
}

#[tokio::test]
async fn the_command_looks_at_a_database_that_is_open_and_at_one_that_is_not() {
    let world = world().await;
    world.record(0..4).await;
    world.sign().await;
    let path = world.directory.path().join("test.db");
    let look = async || {
        let store = Store::look_at(&path).await.expect("opened");
        let ledger = Ledger::new(store.clone(), &installation(1), world.directory.path());
        let found = ledger.verify(&world.org).await.expect("looked at");
        let refused = store.insert_audit(ledger.key(), &[event(&world.org, 9)]).await;
        assert!(refused.is_err(), "looking changes nothing");
        store.close().await;
        found
    };
    world.assert_verified(&look().await, 4);
    world.store.close().await;
    world.assert_verified(&look().await, 4);
    let missing = world.directory.path().join("missing.db");
    assert!(Store::look_at(&missing).await.is_err());
    assert!(!missing.exists());
}
