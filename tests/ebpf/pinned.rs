//! Names with hundreds of addresses: the kernel knows those that are pinned, and no others.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use aya::maps::{HashMap, Map, MapData};
use netd::{
    kernel::EndpointHandle,
    pins::{PINS_MAX, room::Room},
    sandbox::{Library, Rules, Sandbox},
};
use netd_common::{BoundKey, octets};
use sandgate_api::{
    feed::FeedSandbox,
    id::{OrgId, SandboxId},
};
use sandgate_policy::DomainName;

use crate::world::{RunDir, World, platform, privileged};

/// Addresses of one answer.
const MANY: u16 = 500;

fn addresses(round: u8) -> Vec<IpAddr> {
    let of = |index: u16| match index % 2 {
        0 => {
            let [high, low] = index.to_be_bytes();
            IpAddr::from([198, 51, 2 * round + high, low])
        }
        _ => IpAddr::from([0x2001, 0xdb8, u16::from(round), 0, 0, 0, 0, index]),
    };
    (0..MANY).map(of).collect()
}

fn name(round: u8) -> DomainName {
    DomainName::parse(&format!("n{round}.test")).expect("a name")
}

/// What the kernel's set holds of an endpoint.
fn bound(run_dir: &RunDir, handle: EndpointHandle) -> BTreeSet<IpAddr> {
    let map = MapData::from_pin(run_dir.path().join("bpf/maps/BOUND")).expect("the pinned map");
    let map: HashMap<_, BoundKey, u32> = HashMap::try_from(Map::HashMap(map)).expect("a set");
    let keys = map.keys().map(|key| key.expect("a key"));
    keys.filter(|key| key.ordinal == handle.ordinal)
        .map(|key| IpAddr::from(octets(key.address)).to_canonical())
        .collect()
}

#[test]
fn the_kernel_knows_exactly_what_is_pinned_however_much_comes_at_once() {
    if !privileged() {
        return;
    }
    let World {
        run_dir,
        sandboxes,
        datapath,
    } = World::with_sandboxes(2);
    let datapath = Arc::new(datapath);
    let (library, room) = (Library::default(), Room::default());
    let open: Vec<(Sandbox, EndpointHandle)> = sandboxes
        .iter()
        .map(|(namespace, handle)| {
            // No policy: every public name may be asked for.
            let wanted = FeedSandbox {
                sandbox_id: SandboxId::random(),
                org_id: OrgId::nobody(),
                endpoint: namespace.endpoint.clone(),
                tiers: Vec::new(),
                bindings: Vec::new(),
                ca_generation: 0,
                tunnel_ports: Vec::new(),
            };
            let rules = Rules::compile(&library, &platform(), &wanted).expect("rules");
            let file = run_dir.path().join(format!("{}.pins", wanted.sandbox_id));
            let of = (wanted.endpoint, *handle);
            let sandbox = Sandbox::open(
                wanted.sandbox_id,
                of,
                rules,
                Arc::clone(&datapath),
                (&file, &room),
            );
            (sandbox.expect("a sandbox"), *handle)
        })
        .collect();
    let [(greedy, handle), (modest, other)] = &open[..] else {
        panic!("two sandboxes")
    };
    let few = addresses(1)[..3].to_vec();
    assert_eq!(modest.pin(&name(1), None, &few).expect("pinned"), few.len());

    // All at once, and more in turn than are remembered.
    let mut latest: Vec<IpAddr> = Vec::new();
    for round in 0..12 {
        let all = addresses(round);
        assert_eq!(greedy.pin(&name(round), None, &all).expect("pinned"), all.len());
        latest.extend(all);
        let kept = latest.len().saturating_sub(PINS_MAX);
        let expected: BTreeSet<IpAddr> = latest[kept..].iter().copied().collect();
        assert_eq!(bound(&run_dir, *handle), expected, "round {round}");
        assert_eq!(greedy.pins(), expected.len());
    }
    // Known already: nothing is written, and nothing lost.
    let before = bound(&run_dir, *handle);
    assert_eq!(greedy.pin(&name(11), None, &addresses(11)).expect("pinned"), 0);
    assert_eq!(bound(&run_dir, *handle), before);
    // Rules that allow no name take all of them, and none of another's.
    greedy
        .replace_rules(Rules::nothing(&platform(), OrgId::nobody()).expect("rules"))
        .expect("in force");
    assert_eq!((greedy.pins(), bound(&run_dir, *handle).len()), (0, 0));
    assert!(greedy.pin(&name(1), None, &few).is_err());
    assert_eq!(bound(&run_dir, *other), few.iter().copied().collect());
    datapath.detach(*other).expect("detached");
    assert_eq!(bound(&run_dir, *other).len(), 0);
    // Of an endpoint that is gone nothing is bound any more.
    assert!(modest.pin(&name(2), None, &addresses(2)).is_err());
    assert_eq!(bound(&run_dir, *other).len(), 0);
}
