//! Programs that run out of something: netd out of memory, out of room and out of orders, the controller out of room.

use std::time::{Duration, Instant};

use harness::{
    node::Node,
    pressure::{Pinch, Tight},
    probe, wait,
    world::{API, EVIL, OK, World},
};
use serde_json::{Value, json};

use super::{Besieged, Held, assert_told};
use crate::{
    machine::fixture_policy,
    outages::{RECOVERY, wait_until_served},
};

/// What netd gets from the moment on when memory is short.
const MEMORY: u64 = 1 << 20;
/// How long the controller is away: longer than netd waits for a heartbeat.
const AWAY: Duration = Duration::from_secs(20);

/// Opens connections that say half of what they want, as large as netd listens to, and keeps them.
const HOARD: &str = r"
import socket, time
kept = []
for _ in range(400):
    try:
        stream = socket.create_connection(('203.0.113.10', 443), 2)
        stream.sendall(b'\x16\x03\x01\x3f\xff\x01\x00\x3f\xfb\x03\x03' + b'x' * 15000)
        kept.append(stream)
    except OSError:
        time.sleep(0.05)
time.sleep(30)
";

pub(crate) fn a_netd_without_memory_is_killed_and_replaced(siege: &Besieged) {
    siege.node.wait_ready();
    let (sandbox, hoarder) = (siege.fenced(), siege.fenced());
    let probe = siege.probe(&sandbox);
    wait_until_served(&probe);
    let resolved = siege.probe(&hoarder).try_one(&probe::lookup("ok.test"));
    assert_eq!(resolved.addresses, [std::net::IpAddr::from(OK)]);
    let mark = siege.world.capture().mark();
    siege.unleash(&sandbox);
    hoarder.write("/workspace/hoard.py", HOARD);
    let pinch = Pinch::new(MEMORY).expect("a control group for memory");
    let old = siege.node.netd().expect("it runs");
    pinch.hold(&old).expect("netd is held in it");
    // It may be dead before it has answered this.
    let hoard =
        json!({ "command": "setsid python3 /workspace/hoard.py >/dev/null 2>&1 </dev/null & echo started" });
    hoarder
        .client()
        .post(&hoarder.path("/execute"))
        .json(&hoard)
        .try_send()
        .ok();
    wait::until("the kernel kills netd for want of memory", RECOVERY, || {
        (pinch.kills().expect("the kernel counts") > 0).then_some(())
    });
    wait::until("another netd takes its place", RECOVERY, || {
        siege.node.netd().filter(|netd| netd.pid != old.pid)
    });
    siege.node.wait_ready();
    wait_until_served(&probe);
    siege.assert_awake(&sandbox);
    siege.assert_only_allowed(mark);
    sandbox.stop();
    hoarder.stop();
}

pub(crate) fn without_the_controller_what_was_wanted_is_enforced_and_nothing_is_lost(siege: &Besieged) {
    const DENIALS: u16 = 40;
    siege.node.wait_ready();
    // One for the noise, whose records are put together, and one whose records are counted.
    let (sandbox, quiet) = (siege.fenced(), siege.fenced());
    let probe = siege.probe(&sandbox);
    wait_until_served(&probe);
    let mark = siege.world.capture().mark();
    siege.unleash(&sandbox);
    let held = Held::new(&siege.node, siege.node.controller());
    let began = Instant::now();
    let served = || {
        let outcome = siege.as_root(&sandbox, &[probe::https("ok.test", "ok.test")]);
        (outcome[0].outcome == "answered").then_some(())
    };
    let enforced = || {
        wait::until("what is allowed passes", RECOVERY, served);
        let refused = [
            probe::tcp(EVIL, 8080, "canary"),
            probe::tcp(OK, 22, "canary"),
            probe::udp(EVIL, 443),
        ];
        for outcome in siege.as_root(&sandbox, &refused) {
            outcome.assert_refused();
        }
        let denied = siege.as_root(&sandbox, &[probe::lookup("evil.test")]);
        assert_eq!(denied[0].outcome, "no_name", "{denied:?}");
    };
    enforced();
    // A netd that has never heard this controller knows what the last one wanted.
    siege.node.replace(Node::netd);
    enforced();
    // A name that nobody has asked for before.
    let fresh = siege.as_root(&sandbox, &[probe::https("plain.test", "plain.test")]);
    fresh[0].assert_answered("hello from plain.test");
    let attempts: Vec<Value> = (0..DENIALS).map(|_| probe::tcp(EVIL, 8085, "canary")).collect();
    for outcome in siege.as_root(&quiet, &attempts) {
        outcome.assert_refused_at_connect();
    }
    std::thread::sleep(AWAY.saturating_sub(began.elapsed()));
    enforced();
    drop(held);
    siege.node.wait_ready();
    assert_eq!(sandbox.status(), "running");
    siege.assert_awake(&sandbox);
    assert_told(&quiet, u64::from(DENIALS), |event| event["port"] == 8085);
    // It rules again.
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    for packet in siege.world.capture().sent_since(mark) {
        let is_plain = packet.destination == std::net::IpAddr::from(API) && packet.destination_port == 443;
        let is_ok = packet.destination == std::net::IpAddr::from(OK) && packet.destination_port == 443;
        let is_resolver = packet.destination == std::net::IpAddr::from(harness::world::RESOLVER);
        assert!(
            is_plain || is_ok || is_resolver,
            "this left the node: {packet:#?}"
        );
    }
    assert!(siege.world.dns.queries_for("evil.test").is_empty());
    sandbox.stop();
    quiet.stop();
}

/// A node of its own, `prepare`d before it starts.
#[track_caller]
fn besieged(
    settings: &[(&str, &str)],
    prepare: impl FnOnce(&World, &mut Node) -> Tight,
) -> (Tight, Besieged) {
    let world = World::fixture().build().expect("a world");
    let mut node = Node::new(&world, world.place(), "", settings).expect("settings");
    let tight = prepare(&world, &mut node);
    node.start_again().expect("it starts");
    (tight, Besieged::on(world, node))
}

pub(crate) fn a_node_without_room_forgets_rather_than_allows(_shared: &Besieged) {
    let (tight, siege) = besieged(&[], |world, node| {
        Tight::mount(world, &node.run_dir().join("netd"), 256).expect("a small file system")
    });
    let sandbox = siege.fenced();
    let probe = siege.probe(&sandbox);
    wait_until_served(&probe);
    let state = tight.file("state.json");
    assert!(state.exists(), "netd keeps its state here");
    tight.fill().expect("filled");
    // Names go on being answered. What cannot be written down is kept in memory alone, and the log says so. (The page that
    // the file of the pins has may have room for some lines: sixty for one name, and one for each other.)
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_answered("hello from ok.test");
    let mut names = vec![probe::lookup("many.test")];
    // As long as a name may be: together more than a page.
    names.extend((0..58).map(|number| probe::lookup(&format!("{number:040}.wild.test"))));
    probe.try_all(&names);
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    let logged = |what: &str| {
        wait::until(what, RECOVERY, || {
            let lines = siege.node.log_lines();
            lines.iter().any(|line| line.contains(what)).then_some(())
        });
    };
    logged("cannot write a pin log");
    // Changes are in force all the same, and as soon as one finds no room in the page that the state has, there is no
    // state: an earlier one could undo it. (A change that forbids names would shorten the file of the pins, and so make
    // room.)
    for port in 1000..1050 {
        let mut narrow = fixture_policy();
        narrow["allowed_ports"] = json!([80, port]);
        sandbox.set_network(&narrow);
        if !state.exists() {
            break;
        }
    }
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    assert!(!state.exists(), "a state that is out of date was kept");
    logged("cannot save the state");

    // What begins without room allows nothing that it does not know: neither what the new rules forbid, nor an address
    // whose name it has forgotten.
    tight.fill().expect("filled again");
    let denied = siege.world.capture().mark();
    siege.node.replace(Node::netd);
    let soon = |attempt| probe::with(attempt, json!({ "timeout": 0.3 }));
    let attempts: Vec<Value> = (0..10)
        .flat_map(|_| {
            [
                soon(probe::https(OK, "ok.test")),
                soon(probe::http(API, "api.test")),
                soon(probe::tcp(EVIL, 8080, "canary")),
            ]
        })
        .collect();
    for outcome in siege.as_root(&sandbox, &attempts) {
        assert_ne!(outcome.outcome, "answered", "{outcome:?}");
    }
    let sent = siege.world.capture().sent_since(denied);
    assert!(sent.is_empty(), "this left the node: {sent:#?}");

    // Room is back, and with it everything, without anybody's help.
    tight.free().expect("freed");
    siege.node.wait_ready();
    wait::until("the state is kept again", RECOVERY, || {
        state.exists().then_some(())
    });
    wait::until("the policy can be changed", RECOVERY, || {
        let call = sandbox
            .client()
            .put(&sandbox.path("/network"))
            .json(&fixture_policy());
        let answer = call.send();
        (answer.status.is_success() && answer.json()["applied"] == true).then_some(())
    });
    wait_until_served(&probe);
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    sandbox.stop();
    siege.node.stop().expect("it ends when asked");
    drop(tight);
}

pub(crate) fn a_controller_without_room_loses_nothing(_shared: &Besieged) {
    // Room for two sandboxes and the database.
    let settings = [("SANDGATE_DISK_RESERVE", "16Mi")];
    let (tight, siege) = besieged(&settings, |world, node| {
        Tight::mount(world, node.data_dir(), 256 << 10).expect("a small file system")
    });
    let sandbox = siege
        .organization
        .sandbox(&json!({ "network": fixture_policy(), "disk": "64Mi" }));
    let probe = siege.probe(&sandbox);
    wait_until_served(&probe);
    siege.organization.set_egress(&json!({ "mode": "allow_all" }));
    let mark = siege.world.capture().mark();
    tight.fill().expect("filled");
    // Until the log of the database finds no more room, changes are taken, and what was answered counts.
    let named = |number: u32| json!({ "mode": "denylist", "denied_domains": [format!("n{number}.test")] });
    let mut last = None;
    let mut refused = None;
    for number in 0..5000 {
        let call = siege
            .organization
            .client
            .put("/settings/egress")
            .json(&named(number));
        let answer = call.send();
        if !answer.status.is_success() {
            refused = Some(answer);
            break;
        }
        last = Some(number);
    }
    let refused = refused.expect("a full disk refuses");
    assert!(refused.status.is_server_error(), "{refused:?}");
    assert!(refused.json()["error"]["message"].is_string(), "{refused:?}");
    let stored = || siege.organization.client.get("/settings/egress").send().ok()["denied_domains"].clone();
    let expected = last.map_or_else(|| json!([]), |number| named(number)["denied_domains"].clone());
    assert_eq!(
        stored(),
        expected,
        "what was refused is in force, or what was answered is not"
    );
    // Nothing else depends on it.
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    let attempts: Vec<Value> = (0..30).map(|_| probe::tcp(EVIL, 8085, "canary")).collect();
    for outcome in probe.try_all(&attempts) {
        outcome.assert_refused_at_connect();
    }
    // Not even a controller that ends meanwhile.
    let controller = siege.node.controller().expect("it runs");
    siege.node.kill(&controller).expect("it runs");
    for outcome in siege.as_root(
        &sandbox,
        &[probe::https("ok.test", "ok.test"), probe::https(OK, "ok.test")],
    ) {
        outcome.assert_answered("hello from ok.test");
    }
    siege.as_root(&sandbox, &[probe::tcp(EVIL, 8080, "canary")])[0].assert_refused_at_connect();

    tight.free().expect("freed");
    siege.node.wait_ready();
    assert_eq!(stored(), expected, "what was answered was lost");
    assert_eq!(sandbox.status(), "running");
    assert_told(&sandbox, 30, |event| event["port"] == 8085);
    siege.organization.set_egress(&json!({ "mode": "deny_all" }));
    wait::until("changes are in force again", RECOVERY, || {
        let outcome = probe.try_one(&probe::https(OK, "ok.test"));
        (outcome.outcome == "refused").then_some(())
    });
    siege.assert_only_allowed(mark);
    sandbox.stop();
    siege.node.stop().expect("it ends when asked");
    siege.node.down().expect("it is taken down");
    drop(tight);
}
