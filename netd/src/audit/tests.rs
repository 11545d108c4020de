use proptest::prelude::*;

use super::{
    queue::{LANE_MAX, TOTAL_MAX},
    *,
};

fn owner(sandbox: usize, mode: FailureMode) -> Owner {
    Owner {
        sandbox_id: format!("sandbox-{sandbox}").parse().expect("an id"),
        org_id: "org-1".parse().expect("an id"),
        mode,
    }
}

fn attempt(port: u16) -> Attempt {
    let ip = Some([203, 0, 113, 66].into());
    Attempt {
        protocol: "tcp",
        ip,
        port: Some(port),
        ..Attempt::default()
    }
}

fn passed() -> Passed {
    Passed {
        began: Timestamp::now(),
        lasted: Duration::from_millis(5),
        up: 1,
        down: 2,
    }
}

fn allow(audit: &Audit, owner: &Owner, port: u16) {
    audit.flow(owner, &Decision::of(Reason::Allowed), attempt(port), passed());
}

fn take(audit: &Audit, limit: usize) -> Vec<AuditEvent> {
    let mut state = audit.lock();
    let events = state.queue.batch(limit).to_vec();
    state.queue.delivered();
    events
}

fn take_all(audit: &Audit) -> Vec<AuditEvent> {
    let mut all = Vec::new();
    loop {
        let events = take(audit, 100);
        if events.is_empty() {
            return all;
        }
        all.extend(events);
    }
}

#[test]
fn a_batch_is_the_same_until_it_is_acknowledged() {
    let audit = Audit::default();
    let owner = owner(1, FailureMode::FailClosed);
    allow(&audit, &owner, 1);
    let first = audit.lock().queue.batch(10).to_vec();
    allow(&audit, &owner, 2);
    assert_eq!(audit.lock().queue.batch(10), first);
    audit.lock().queue.delivered();
    assert_eq!(take_all(&audit).len(), 1);
}

#[test]
fn equal_denials_become_one_record_with_their_number() {
    let audit = Audit::default();
    let owner = owner(1, FailureMode::FailClosed);
    for _ in 0..40 {
        audit.deny(&owner, &Decision::of(Reason::DefaultDeny), attempt(22), 1);
    }
    audit.deny(&owner, &Decision::of(Reason::DefaultDeny), attempt(23), 5);
    assert!(take_all(&audit).is_empty());
    audit.settle();
    let mut repeated: Vec<u64> = take_all(&audit).iter().map(|event| event.repeated).collect();
    repeated.sort_unstable();
    assert_eq!(repeated, [5, 40]);
}

#[test]
fn a_scan_is_counted_to_the_last_attempt_in_few_records() {
    let audit = Audit::default();
    let owner = owner(1, FailureMode::FailClosed);
    for port in 0..10_000 {
        audit.deny(&owner, &Decision::of(Reason::DefaultDeny), attempt(port), 1);
    }
    audit.settle();
    let events = take_all(&audit);
    assert!(events.len() < 300, "{} records", events.len());
    assert_eq!(events.iter().map(|event| event.repeated).sum::<u64>(), 10_000);
}

#[test]
fn under_fail_closed_a_full_lane_refuses_new_flows_and_loses_nothing() {
    let audit = Audit::default();
    let (full, other) = (
        owner(1, FailureMode::FailClosed),
        owner(2, FailureMode::FailClosed),
    );
    for _ in 0..LANE_MAX {
        assert!(audit.has_room(&full));
        allow(&audit, &full, 443);
    }
    assert!(!audit.has_room(&full));
    assert!(
        audit.has_room(&other),
        "one sandbox's records filled everybody's queue"
    );
    for _ in 0..3 {
        audit.deny(&full, &Decision::of(Reason::Quota), attempt(443), 1);
        audit.settle();
    }
    let events = take(&audit, 1000);
    assert_eq!(events.len(), 1000);
    assert!(audit.has_room(&full));
    audit.settle();
    let rest = take_all(&audit);
    assert_eq!(events.len() + rest.len(), LANE_MAX + 1);
    assert_eq!(
        rest.iter()
            .find(|event| event.reason == Reason::Quota)
            .map(|event| event.repeated),
        Some(3)
    );
}

#[test]
fn under_fail_open_the_oldest_goes_and_a_gap_says_how_many() {
    let audit = Audit::default();
    let owner = owner(1, FailureMode::FailOpen);
    for index in 0..(LANE_MAX + 10) {
        assert!(audit.has_room(&owner));
        allow(&audit, &owner, u16::try_from(index).expect("small"));
    }
    let events = take_all(&audit);
    assert_eq!(events.len(), LANE_MAX + 1);
    assert_eq!((events[0].reason, events[0].repeated), (Reason::Quota, 10));
    assert_eq!(events[1].port, Some(10));
}

#[test]
fn a_quiet_sandbox_does_not_wait_for_a_loud_one() {
    let audit = Audit::default();
    let (loud, quiet) = (
        owner(1, FailureMode::FailClosed),
        owner(2, FailureMode::FailClosed),
    );
    for _ in 0..1000 {
        allow(&audit, &loud, 443);
    }
    allow(&audit, &quiet, 443);
    assert!(
        take(&audit, 10)
            .iter()
            .any(|event| event.sandbox_id == quiet.sandbox_id)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn every_record_is_delivered_once_or_counted_in_a_gap(
        steps in proptest::collection::vec((0usize..3, 1usize..5000, any::<bool>()), 1..30)
    ) {
        let audit = Audit::default();
        let (mut pushed, mut seen) = (0u64, 0u64);
        for (sandbox, count, deliver) in steps {
            let owner = owner(sandbox, FailureMode::FailOpen);
            for _ in 0..count {
                allow(&audit, &owner, 443);
                pushed += 1;
            }
            if deliver {
                seen += take(&audit, 3000).iter().map(|event| event.repeated).sum::<u64>();
            }
        }
        seen += take_all(&audit).iter().map(|event| event.repeated).sum::<u64>();
        prop_assert_eq!(seen, pushed);
        prop_assert!(3 * LANE_MAX < TOTAL_MAX);
    }
}
