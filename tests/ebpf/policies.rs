//! Policies in the kernel: shared by content, changed in one step, freed when nobody uses them.

use std::{
    net::Ipv4Addr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, LpmTrie, Map, MapData, lpm_trie::Key};
use ipnet::Ipv4Net;
use netd::kernel::{Datapath, DatapathError, EndpointHandle};
use netd_common::{Endpoint, POLICY_BITS, PolicyKey, PortTable, limit};
use sandgate_policy::{KernelAction, KernelTable, PortRange, PrefixEntry, Protocol};

use crate::{
    sockets::{Listeners, ask, at},
    world::{World, allow_443, open_table, privileged},
};

/// So many prefixes of 198.18.0.0 and above, each with the given port open.
fn many(count: u32, port: u16) -> KernelTable {
    let entry = |number: u32| PrefixEntry {
        prefix: Ipv4Net::new_assert(Ipv4Addr::from(0x2000_0000 + number), 32).into(),
        ranges: vec![PortRange {
            protocol: Protocol::Tcp,
            first: port,
            last: port,
            action: KernelAction::Proxy,
        }],
    };
    KernelTable {
        entries: (0..count).map(entry).collect(),
    }
}

fn pinned_policies(run_dir: &Path) -> LpmTrie<MapData, PolicyKey, PortTable> {
    let map = MapData::from_pin(run_dir.join("bpf/maps/POLICIES")).expect("the pinned map");
    LpmTrie::try_from(Map::LpmTrie(map)).expect("a trie")
}

fn entries(world: &World) -> usize {
    pinned_policies(world.run_dir.path()).keys().count()
}

/// The id that the kernel uses for an endpoint.
fn id_of(world: &World, endpoint: EndpointHandle) -> u32 {
    let map = MapData::from_pin(world.run_dir.path().join("bpf/maps/ENDPOINTS")).expect("the pinned map");
    let endpoints: HashMap<_, u32, Endpoint> = HashMap::try_from(Map::HashMap(map)).expect("a hash map");
    endpoints.get(&endpoint.ifindex, 0).expect("an entry").policy
}

fn swept_until(datapath: &Datapath, expected: (usize, usize)) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        datapath.sweep().expect("swept");
        let present = datapath.policies();
        if present == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{present:?} instead of {expected:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn endpoints_with_the_same_rules_share_one_policy_until_the_last_has_left_it() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(3);
    let datapath = &world.datapath;
    let [one, two, three] = [0, 1, 2].map(|index: usize| world.sandboxes[index].1);
    let content = datapath.set_policy(one, &allow_443()).expect("a policy");
    assert_eq!(datapath.set_policy(two, &allow_443()).expect("a policy"), content);
    assert!(datapath.share_policy(three, content).expect("shared"));
    let id = id_of(&world, one);
    assert_eq!([id_of(&world, two), id_of(&world, three)], [id, id]);
    assert_eq!(datapath.policies(), (1, 2));
    assert_eq!(entries(&world), 2);

    // One changes: the others keep theirs.
    let _listeners = Listeners::serve(datapath);
    let (allowed, elsewhere) = (at([203, 0, 113, 10], 443), at([198, 51, 100, 7], 9));
    let connects = |index: usize, to| world.sandboxes[index].0.run(|| ask(to)).is_ok();
    datapath.set_policy(one, &open_table()).expect("a policy");
    assert_ne!(id_of(&world, one), id);
    assert!(connects(0, elsewhere) && !connects(1, elsewhere) && connects(1, allowed));
    // The same again is no new one, nor is the same back.
    datapath.set_policy(one, &open_table()).expect("a policy");
    datapath.set_policy(one, &allow_443()).expect("a policy");
    assert_eq!(id_of(&world, one), id);
    swept_until(datapath, (1, 2));
    assert!(connects(0, allowed) && !connects(0, elsewhere));

    datapath.detach(one).expect("detached");
    datapath.detach(two).expect("detached");
    swept_until(datapath, (1, 2));
    assert!(connects(2, allowed));
    datapath.detach(three).expect("detached");
    swept_until(datapath, (0, 0));
    assert_eq!(entries(&world), 0);
    assert!(matches!(
        datapath.share_policy(three, content),
        Err(DatapathError::Detached { .. })
    ));
}

#[test]
fn thousands_of_policies_come_and_go_and_leave_an_empty_map() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(4);
    let datapath = &world.datapath;
    for round in 0_u16..3000 {
        let (_, endpoint) = world.sandboxes[usize::from(round % 4)];
        // Every third is one that others have or had.
        let port = if round % 3 == 0 { 443 } else { 1000 + round };
        datapath
            .set_policy(endpoint, &many(u32::from(round % 50) + 1, port))
            .expect("a policy");
        if round % 100 == 0 {
            datapath.sweep().expect("swept");
        }
    }
    for (_, endpoint) in &world.sandboxes {
        datapath.set_policy(*endpoint, &allow_443()).expect("a policy");
    }
    swept_until(datapath, (1, 2));
    assert_eq!(entries(&world), 2);
    for (_, endpoint) in &world.sandboxes {
        datapath.detach(*endpoint).expect("detached");
    }
    swept_until(datapath, (0, 0));
    assert_eq!(entries(&world), 0);
}

#[test]
fn the_next_netd_finds_who_shares_what_and_frees_what_nobody_uses() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(3);
    let [one, two, three] = [0, 1, 2].map(|index: usize| world.sandboxes[index].1);
    for endpoint in [one, two] {
        world
            .datapath
            .set_policy(endpoint, &allow_443())
            .expect("a policy");
    }
    world
        .datapath
        .set_policy(three, &many(2000, 443))
        .expect("a policy");
    let ids = [one, two, three].map(|endpoint| id_of(&world, endpoint));
    // What a netd that was killed while it wrote leaves behind.
    let mut map = pinned_policies(world.run_dir.path());
    for number in 0..100_u32 {
        let data = PolicyKey {
            policy: ids[2] + 1,
            address: netd_common::mapped(number.to_be_bytes()),
        };
        map.insert(&Key::new(POLICY_BITS + 128, data), PortTable::default(), 0)
            .expect("written");
    }
    drop(map);

    let world = world.restart();
    assert_eq!(world.datapath.policies(), (2, 2002));
    assert_eq!(entries(&world), 2002);
    // It knows them by what they say, so that saying it again writes nothing.
    for (endpoint, id, table) in [
        (one, ids[0], allow_443()),
        (two, ids[1], allow_443()),
        (three, ids[2], many(2000, 443)),
    ] {
        world.datapath.set_policy(endpoint, &table).expect("a policy");
        assert_eq!(id_of(&world, endpoint), id);
    }
    world.datapath.detach(one).expect("detached");
    swept_until(&world.datapath, (2, 2002));
    world.datapath.set_policy(two, &open_table()).expect("a policy");
    swept_until(&world.datapath, (2, 2001));
}

#[test]
fn a_policy_that_does_not_fit_changes_nothing() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let datapath = &world.datapath;
    let [one, two] = [0, 1].map(|index: usize| world.sandboxes[index].1);
    let most = u32::try_from(limit::PREFIXES).expect("a number") - 10;
    datapath.set_policy(one, &many(most, 443)).expect("a policy");
    datapath.set_policy(two, &allow_443()).expect("a policy");
    let (before, present) = (id_of(&world, two), datapath.policies());
    let refused = datapath.set_policy(two, &many(9, 80)).expect_err("no room");
    assert!(
        matches!(refused, DatapathError::PoliciesFull { wanted: 9, .. }),
        "{refused}"
    );
    assert_eq!((id_of(&world, two), datapath.policies()), (before, present));
    assert_eq!(entries(&world), present.1);
    let _listeners = Listeners::serve(datapath);
    let (sandbox, _) = &world.sandboxes[1];
    assert!(sandbox.run(|| ask(at([203, 0, 113, 10], 443))).is_ok());
    // The room of one that was left is used again.
    datapath.set_policy(one, &allow_443()).expect("a policy");
    swept_until(datapath, (1, 2));
    datapath.set_policy(two, &many(9, 80)).expect("a policy");
}
