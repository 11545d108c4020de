use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use proptest::prelude::*;

use super::{spool::SMALLEST, *};

/// An audit with a spool of its own, of the smallest size. Dropped without a word, as when netd is killed.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("spool")
    }

    fn audit(&self) -> Audit {
        let spool = Spool::open(&self.path(), SMALLEST).expect("a spool");
        Audit::new(Metrics::default(), spool)
    }

    /// Bytes in its files.
    fn size(&self) -> u64 {
        files(&self.path())
            .iter()
            .map(|path| fs::metadata(path).expect("a file").len())
            .sum()
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(directory).expect("a directory");
    let mut files: Vec<_> = listed.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

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
    let events = read(state.queue.batch(limit));
    state.queue.delivered();
    events
}

fn read(batch: &[Bytes]) -> Vec<AuditEvent> {
    let events = batch
        .iter()
        .map(|said| serde_json::from_slice(said).expect("a record"));
    events.collect()
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
    let place = Place::new();
    let audit = place.audit();
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
    let place = Place::new();
    let audit = place.audit();
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
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    for port in 0..10_000 {
        audit.deny(&owner, &Decision::of(Reason::DefaultDeny), attempt(port), 1);
    }
    audit.settle();
    let events = take_all(&audit);
    assert!(events.len() < 300, "{} records", events.len());
    assert_eq!(events.iter().map(|event| event.repeated).sum::<u64>(), 10_000);
}

/// Records until there is no room.
fn fill(audit: &Audit, owner: &Owner) -> u64 {
    let mut count = 0;
    while audit.has_room(owner) {
        allow(audit, owner, 443);
        count += 1;
    }
    count
}

fn repeated(events: &[AuditEvent]) -> u64 {
    events.iter().map(|event| event.repeated).sum()
}

#[test]
fn under_fail_closed_a_full_lane_refuses_new_flows_and_loses_nothing() {
    let place = Place::new();
    let audit = place.audit();
    let (full, other) = (
        owner(1, FailureMode::FailClosed),
        owner(2, FailureMode::FailClosed),
    );
    let count = usize::try_from(fill(&audit, &full)).expect("few");
    assert!(count > 100, "{count}");
    assert!(
        audit.has_room(&other),
        "one sandbox's records filled everybody's queue"
    );
    for _ in 0..3 {
        audit.deny(&full, &Decision::of(Reason::Quota), attempt(443), 1);
        audit.settle();
    }
    let events = take(&audit, 100);
    assert_eq!(events.len(), 100);
    assert!(audit.has_room(&full));
    audit.settle();
    let rest = take_all(&audit);
    assert_eq!(events.len() + rest.len(), count + 1);
    assert_eq!(
        rest.iter()
            .find(|event| event.reason == Reason::Quota)
            .map(|event| event.repeated),
        Some(3)
    );
}

#[test]
fn what_is_being_delivered_is_still_the_sandboxes_share() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    let count = fill(&audit, &owner);
    drop(audit);
    // The next netd begins by trying to deliver, and nobody takes it.
    let audit = place.audit();
    assert!(!audit.has_room(&owner));
    let batch = audit.lock().queue.batch(100).to_vec();
    assert_eq!(batch.len(), 100);
    assert!(
        !audit.has_room(&owner),
        "a batch that nobody has taken makes room"
    );
    audit.lock().queue.delivered();
    assert!(audit.has_room(&owner));
    assert_eq!(repeated(&take_all(&audit)), count - 100);
    assert!(audit.lock().queue.is_forgotten());
}

#[test]
fn under_fail_open_the_oldest_goes_and_a_gap_says_how_many() {
    let place = Place::new();
    let audit = place.audit();
    let (closed, open) = (owner(1, FailureMode::FailClosed), owner(1, FailureMode::FailOpen));
    let room = fill(&audit, &closed);
    for index in 0..10 {
        assert!(audit.has_room(&open));
        allow(&audit, &open, index);
    }
    let events = take_all(&audit);
    assert_eq!(events[0].reason, Reason::Quota);
    assert_eq!(events[0].gap, Some(AuditGap::default()));
    assert!(events[1..].iter().all(|event| event.gap.is_none()));
    assert_eq!(repeated(&events), room + 10);
    let gap = events[0].repeated;
    assert!((10..20).contains(&gap), "{gap}");
    assert_eq!(audit.lost(), gap);
    let last: Vec<_> = events[events.len() - 10..]
        .iter()
        .map(|event| event.port)
        .collect();
    assert_eq!(last, (0..10).map(Some).collect::<Vec<_>>());
}

#[test]
fn a_quiet_sandbox_does_not_wait_for_a_loud_one() {
    let place = Place::new();
    let audit = place.audit();
    let (loud, quiet) = (
        owner(1, FailureMode::FailClosed),
        owner(2, FailureMode::FailClosed),
    );
    fill(&audit, &loud);
    allow(&audit, &quiet, 443);
    assert!(
        take(&audit, 10)
            .iter()
            .any(|event| event.sandbox_id == quiet.sandbox_id)
    );
}

#[test]
fn what_a_killed_netd_had_not_delivered_the_next_one_delivers_in_order() {
    let place = Place::new();
    let audit = place.audit();
    let (one, other) = (owner(1, FailureMode::FailClosed), owner(2, FailureMode::FailOpen));
    for port in 0..100 {
        allow(&audit, &one, port);
        allow(&audit, &other, port);
    }
    let delivered = take(&audit, 50);
    // Under way when it is killed: whether they arrived, nobody knows.
    let flying = read(audit.lock().queue.batch(20));
    drop(audit);
    let audit = place.audit();
    assert_eq!(audit.waiting(), 150);
    let rest = take_all(&audit);
    let ids = |events: &[AuditEvent]| -> std::collections::BTreeSet<String> {
        events.iter().map(|event| event.id.clone()).collect()
    };
    assert!(
        ids(&rest).is_superset(&ids(&flying)),
        "the same records under the same ids"
    );
    assert!(ids(&rest).is_disjoint(&ids(&delivered)));
    assert_eq!(rest.len(), 150);
    for owner in [&one, &other] {
        let ports: Vec<_> = delivered
            .iter()
            .chain(&rest)
            .filter(|event| event.sandbox_id == owner.sandbox_id)
            .map(|event| event.port)
            .collect();
        assert_eq!(ports, (0..100).map(Some).collect::<Vec<_>>());
    }
    drop(audit);
    assert_eq!(place.audit().waiting(), 0);
}

#[test]
fn a_gap_is_told_once_also_by_the_next_netd() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailOpen);
    let mut pushed = 0;
    while audit.lost() < 20 {
        allow(&audit, &owner, 443);
        pushed += 1;
    }
    audit.settle();
    let lost = audit.lost();
    drop(audit);
    let audit = place.audit();
    let first = read(audit.lock().queue.batch(1));
    assert_eq!((first[0].reason, first[0].repeated), (Reason::Quota, lost));
    // Killed before it knew that the gap arrived: the next one delivers the same.
    drop(audit);
    let audit = place.audit();
    let all = take_all(&audit);
    let gaps: Vec<_> = all.iter().filter(|event| event.reason == Reason::Quota).collect();
    assert_eq!(
        gaps.iter().map(|event| &event.id).collect::<Vec<_>>(),
        [&first[0].id]
    );
    assert_eq!(repeated(&all), pushed);
}

#[test]
fn half_a_line_and_foreign_lines_cost_only_themselves() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    allow(&audit, &owner, 1);
    drop(audit);
    let segment = files(&place.path()).remove(0);
    let mut bytes = fs::read(&segment).expect("read");
    let whole = bytes.clone();
    bytes.extend_from_slice(b"\xff{}\n{\"later\":[1]}\n");
    bytes.extend_from_slice(&whole[..whole.len() / 2]);
    fs::write(&segment, bytes).expect("written");
    let audit = place.audit();
    assert_eq!(audit.waiting(), 1);
    allow(&audit, &owner, 2);
    drop(audit);
    let ports: Vec<_> = take_all(&place.audit()).iter().map(|event| event.port).collect();
    assert_eq!(ports, [Some(1), Some(2)]);
}

#[test]
fn what_is_delivered_leaves_nothing_on_the_disk() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    for _ in 0..20 {
        let count = fill(&audit, &owner);
        assert_eq!(u64::try_from(take_all(&audit).len()).expect("few"), count);
        assert!(place.size() <= SMALLEST, "{} bytes", place.size());
    }
    audit.settle();
    assert_eq!(place.size(), 0);
    allow(&audit, &owner, 7);
    drop(audit);
    assert_eq!(take_all(&place.audit())[0].port, Some(7));
}

#[test]
fn while_the_disk_takes_nothing_records_stay_in_memory_and_new_flows_are_refused() {
    let place = Place::new();
    let audit = place.audit();
    let (closed, open) = (owner(1, FailureMode::FailClosed), owner(2, FailureMode::FailOpen));
    allow(&audit, &closed, 1);
    audit.lock().queue.break_disk();
    allow(&audit, &closed, 2);
    assert!(!audit.has_room(&closed));
    let mut pushed = 0;
    while audit.lost() == 0 {
        allow(&audit, &open, 3);
        pushed += 1;
        assert!(pushed < 100_000, "memory has no bound");
    }
    let events = take_all(&audit);
    let of = |owner: &Owner| -> Vec<AuditEvent> {
        let own = events.iter().filter(|event| event.sandbox_id == owner.sandbox_id);
        own.cloned().collect()
    };
    assert_eq!(
        of(&closed).iter().map(|event| event.port).collect::<Vec<_>>(),
        [Some(1), Some(2)]
    );
    assert_eq!(repeated(&of(&open)), pushed);
}

#[test]
fn what_was_kept_in_memory_is_written_once_there_is_room() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    allow(&audit, &owner, 1);
    audit.lock().queue.break_disk();
    allow(&audit, &owner, 2);
    assert!(!audit.has_room(&owner));
    audit.settle();
    assert!(audit.has_room(&owner));
    allow(&audit, &owner, 3);
    drop(audit);
    let ports: Vec<_> = take_all(&place.audit()).iter().map(|event| event.port).collect();
    assert_eq!(ports, [Some(1), Some(2), Some(3)]);
}

#[test]
fn a_write_that_finds_no_room_is_noticed_and_made_up_for() {
    let place = Place::new();
    let audit = place.audit();
    let owner = owner(1, FailureMode::FailClosed);
    allow(&audit, &owner, 1);
    let full = OpenOptions::new().write(true).open("/dev/full").expect("opened");
    audit.lock().queue.write_to(full);
    allow(&audit, &owner, 2);
    assert!(!audit.has_room(&owner));
    assert_eq!(take_all(&audit).last().and_then(|event| event.port), Some(2));
}

/// Runs a test with a spool of its own on a disk of so many bytes, which nobody else sees. Not without root.
fn on_a_small_disk(bytes: u32, test: impl FnOnce(&Place) + Send) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("mounts of its own");
            let nothing = None::<&str>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(nothing, "/", nothing, private, nothing).expect("private");
            let place = Place::new();
            fs::create_dir(place.path()).expect("a folder");
            let size = format!("size={bytes}");
            let flags = MsFlags::empty();
            mount(nothing, &place.path(), Some("tmpfs"), flags, Some(size.as_str())).expect("a disk");
            test(&place);
            umount2(&place.path(), MntFlags::MNT_DETACH).expect("unmounted");
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn a_disk_that_only_its_own_dead_segments_fill_is_used_again() {
    // Less than the spool may have, and room for what it keeps in memory besides.
    on_a_small_disk(256 << 10, |place| {
        let audit = place.audit();
        let closed = owner(9, FailureMode::FailClosed);
        for round in 0_u64..3 {
            let lost = audit.lost();
            let mut pushed = 0_u64;
            // Until all of them have lost something, so that every segment says so of somebody.
            for sandbox in (0..4).cycle() {
                allow(&audit, &owner(sandbox, FailureMode::FailOpen), 443);
                pushed += 1;
                if audit.lost() - lost > 100 {
                    break;
                }
                assert!(pushed < 100_000, "the disk is never full");
            }
            assert!(!audit.has_room(&closed), "{round}: there is room on a full disk");
            assert_eq!(repeated(&take_all(&audit)), pushed, "{round}");
            // All is delivered, and what fills the disk is its own.
            audit.settle();
            assert!(
                audit.has_room(&closed),
                "{round}: the disk is full of what nobody waits for"
            );
        }
        allow(&audit, &closed, 7);
        drop(audit);
        // The next netd tells what was not told, and nothing twice.
        let audit = place.audit();
        let ports: Vec<_> = take_all(&audit).iter().map(|event| event.port).collect();
        assert_eq!(ports, [Some(7)]);
        audit.settle();
        assert_eq!(place.size(), 0);
    });
}

#[test]
fn what_was_lost_is_not_forgotten_with_the_segment_that_said_so() {
    on_a_small_disk(256 << 10, |place| {
        let audit = place.audit();
        let mut pushed = 0_u64;
        while audit.lost() < 100 {
            for sandbox in 0..4 {
                allow(&audit, &owner(sandbox, FailureMode::FailOpen), 443);
                pushed += 1;
            }
        }
        let told = repeated(&take_all(&audit));
        // Nobody takes anything from here on, and there is more than the disk and the memory hold.
        let lost = audit.lost();
        audit.settle();
        let mut later = 0_u64;
        while audit.lost() < lost + 100 {
            for sandbox in 0..4 {
                allow(&audit, &owner(sandbox, FailureMode::FailOpen), 443);
                later += 1;
            }
        }
        audit.settle();
        let rest = repeated(&take_all(&audit));
        assert_eq!((told, rest), (pushed, later));
        audit.settle();
        drop(audit);
        assert_eq!(place.audit().waiting(), 0);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn every_record_is_delivered_or_counted_in_a_gap_whenever_netd_is_killed(
        steps in proptest::collection::vec((0usize..3, 1usize..700, 0u8..4), 1..30)
    ) {
        let place = Place::new();
        let mut audit = place.audit();
        let (mut pushed, mut unsure) = (0u64, false);
        let mut seen = std::collections::BTreeMap::new();
        let mut see = |events: Vec<AuditEvent>| {
            for event in events {
                seen.insert(event.id.clone(), event.repeated);
            }
        };
        for (sandbox, count, then) in steps {
            let owner = owner(sandbox, FailureMode::FailOpen);
            for _ in 0..count {
                allow(&audit, &owner, 443);
                pushed += 1;
            }
            match then {
                0 => see(take(&audit, 300)),
                // Delivered, and killed before it was known.
                1 => {
                    unsure = true;
                    audit.settle();
                    see(read(audit.lock().queue.batch(300)));
                    drop(audit);
                    audit = place.audit();
                }
                2 => audit.settle(),
                _ => {}
            }
            prop_assert!(place.size() <= SMALLEST + SMALLEST / 4, "{} bytes", place.size());
        }
        see(take_all(&audit));
        let told = seen.values().sum::<u64>();
        // What arrived without an answer may be given up later: then it is told twice, and never not at all.
        prop_assert!(told == pushed || unsure && told > pushed, "{told} of {pushed}");
        audit.settle();
        prop_assert_eq!(place.size(), 0);
    }
}
