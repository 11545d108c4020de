//! netd stopped in the middle of its work, by SIGSTOP: no answer, no end, every socket still open.

use harness::{
    bpf, probe, wait,
    world::{API, EVIL, OK, RESOLVER},
};
use serde_json::json;

use super::{Besieged, Held, address, assert_told};
use crate::{
    outages::{RECOVERY, wait_until_served},
    policies::{lines, open_drip},
};

/// Sandboxes that fill the ring together: one alone is limited to 640 events a second.
const FLOODERS: usize = 8;
/// Frames that each of them sends, in bursts of more than the kernel reports one by one.
const FRAMES: u64 = 12_000;
const BURST: u64 = 120;
/// A protocol that nobody has (RFC 3692).
const NO_PROTOCOL: u8 = 253;

pub(crate) fn a_frozen_netd_lets_nothing_out_and_goes_on_where_it_was(siege: &Besieged) {
    siege.node.wait_ready();
    let (sandbox, holder) = (siege.fenced(), siege.fenced());
    let probe = siege.probe(&sandbox);
    wait_until_served(&probe);
    // A connection that is open all the while.
    siege.probe(&holder);
    open_drip(&holder);
    let mark = siege.world.capture().mark();
    siege.unleash(&sandbox);
    let held = Held::new(&siege.node, siege.node.netd());
    let frozen = siege.world.capture().mark();

    let soon = |attempt| probe::with(attempt, json!({ "timeout": 2.0 }));
    let outcomes = siege.as_root(
        &sandbox,
        &[
            // The kernel's own verdicts.
            probe::tcp(EVIL, 8080, "canary"),
            probe::tcp(OK, 22, "canary"),
            probe::tcp("169.254.169.254", 80, "canary"),
            probe::udp(EVIL, 8080),
            // What netd would have to decide.
            soon(probe::https(OK, "ok.test")),
            soon(probe::tcp(OK, 443, "canary")),
            soon(probe::dns(RESOLVER, "ok.test")),
            soon(probe::dns(EVIL, "api.test")),
        ],
    );
    for refused in &outcomes[..3] {
        refused.assert_refused_at_connect();
    }
    outcomes[3].assert_refused();
    for waiting in &outcomes[4..] {
        let ends = ["timeout", "silent"];
        assert!(ends.contains(&waiting.outcome.as_str()), "{waiting:?}");
        assert!(waiting.addresses.is_empty(), "{waiting:?}");
    }

    // Its connections are open, and yet the controller knows that it is not there.
    let reason = wait::until("the node is not ready", RECOVERY, || {
        let answer = siege.node.client().get("//ready").send();
        (!answer.status.is_success()).then(|| answer.text())
    });
    assert!(reason.contains("silent"), "{reason}");
    let refused = siege
        .organization
        .client
        .post("/sandbox/create")
        .json(&json!({}))
        .send();
    assert!(refused.status.is_server_error(), "{refused:?}");
    let begun = siege.begun(frozen);
    assert!(
        begun.is_empty(),
        "a netd that stands still let this out: {begun:#?}"
    );

    drop(held);
    siege.node.wait_ready();
    wait_until_served(&probe);
    siege.assert_awake(&sandbox);
    assert_eq!(
        probe.try_one(&probe::lookup("api.test")).addresses,
        [std::net::IpAddr::from(API)]
    );
    let before = lines(&holder);
    wait::until("what was open goes on", RECOVERY, || {
        (lines(&holder) > before + 5).then_some(())
    });
    let fresh = siege.fenced();
    assert_eq!(fresh.sh_ok("echo fine"), "fine");
    for sandbox in [fresh, sandbox, holder] {
        sandbox.stop();
    }
    siege.assert_only_allowed(mark);
}

pub(crate) fn denials_that_find_the_ring_full_are_counted(siege: &Besieged) {
    siege.node.wait_ready();
    let sandboxes: Vec<_> = (0..FLOODERS).map(|_| siege.fenced()).collect();
    let addresses: Vec<_> = sandboxes.iter().map(address).collect();
    let root = siege.world.node().task().join("root");
    let run_dir = siege.node.run_dir();
    let bpffs = root
        .join(run_dir.strip_prefix("/").expect("absolute"))
        .join("bpf");
    let mark = siege.world.capture().mark();
    let held = Held::new(&siege.node, siege.node.netd());
    std::thread::scope(|scope| {
        for (sandbox, address) in sandboxes.iter().zip(&addresses) {
            scope.spawn(move || {
                let flood = json!({
                    "kind": "flood", "source": address, "to": EVIL.to_string(), "port": 0, "protocol": NO_PROTOCOL,
                    "count": FRAMES, "burst": BURST,
                });
                let sent = siege.as_root(sandbox, &[flood]);
                assert_eq!(sent[0].data, FRAMES.to_string(), "{sent:?}");
            });
        }
    });
    let (used, size) = bpf::ring(&bpffs, "EVENTS").expect("the ring of denials");
    assert!(size - used < 64, "the ring was not full: {used} of {size} bytes");
    drop(held);
    for sandbox in &sandboxes {
        assert_told(sandbox, FRAMES, |event| event["reason"] == "protocol_denied");
    }
    siege.node.wait_ready();
    // The next denials come as ever.
    siege.as_root(&sandboxes[0], &[probe::tcp(EVIL, 8080, "canary")])[0].assert_refused_at_connect();
    sandboxes[0].audited(&json!({ "decision": "deny", "ip": EVIL.to_string(), "port": 8080 }));
    for sandbox in &sandboxes {
        sandbox.stop();
    }
    let sent = siege.world.capture().begun_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
}
