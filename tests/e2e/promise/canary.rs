//! After everything else: no byte of a key is anywhere but where it belongs.

use std::{fs, path::Path, time::Duration};

use harness::{search::Search, wait};

use super::{
    Promise, assert_bearer,
    clients::{CLIENTS, call},
    fresh,
};

/// A program that has used the key and keeps all it ever saw.
const KEEPER: &str = r#"
import os, requests, time
session, kept = requests.Session(), []
while True:
    kept.append(session.get("https://api.test/kept", headers={"Authorization": f"Bearer {os.environ['API_KEY']}"}).text)
    time.sleep(0.5)
"#;

pub(crate) fn no_key_is_anywhere(promise: &Promise) {
    let sandbox = &promise.sandbox;
    sandbox.write("/workspace/keeper.py", KEEPER);
    sandbox.background("exec python3 /workspace/keeper.py", |_| {
        promise.mirror().heard_below("/kept").len() > 2
    });
    for (_, client) in CLIENTS {
        call(
            sandbox,
            client,
            &format!("https://api.test{}", fresh("last")),
            &["Authorization: Bearer $API_KEY"],
        );
    }
    sandbox.sh_ok(
        "env > /workspace/environment; cat /proc/*/environ > /workspace/environments 2>/dev/null; sync",
    );
    let keys: Vec<&str> = promise.keys.iter().map(|key| key.value.as_str()).collect();
    let search = Search::for_keys(&keys).expect("a search");
    let placeholder = promise.placeholder("API_KEY");
    let twin = Search::for_keys(&[&placeholder]).expect("a search");
    let what = |found: anyhow::Result<Vec<String>>| found.expect("searched");

    // The memory and the environment of every process of the sandbox, from outside.
    let processes = promise.node.processes_of(&sandbox.id);
    assert!(processes.len() >= 2, "{processes:?}");
    let mut seen = 0;
    for process in &processes {
        let looked = (|| {
            let environment = fs::read(format!("/proc/{}/environ", process.pid))?;
            let (found, twins) = (search.in_memory(process.pid)?, twin.in_memory(process.pid)?);
            anyhow::Ok((environment, found, twins))
        })();
        // What somebody has run may end meanwhile; what it wrote is in files.
        if looked.is_err() && !promise.node.processes_of(&sandbox.id).contains(process) {
            continue;
        }
        let (environment, found, twins) = looked.expect("it runs and can be looked at");
        assert_eq!(found, Vec::<String>::new(), "memory of {process:?}");
        seen += twins.len();
        assert_eq!(
            what(search.in_bytes([environment])),
            Vec::<String>::new(),
            "{process:?}"
        );
    }
    assert!(
        seen > 0,
        "the placeholder is in no memory either: this search finds nothing"
    );

    // Every file that the sandbox can write, and every file of the node: database, disks, logs, run files.
    let root = processes
        .first()
        .map(|process| format!("/proc/{}/root", process.pid))
        .expect("a process");
    for place in ["workspace", "tmp", "run", "etc", "var/tmp", "dev/shm"] {
        let place = Path::new(&root).join(place);
        if place.exists() {
            assert_eq!(
                what(search.in_files(&place)),
                Vec::<String>::new(),
                "{}",
                place.display()
            );
        }
    }
    let workspace = Path::new(&root).join("workspace");
    assert!(
        !what(twin.in_files(&workspace)).is_empty(),
        "the placeholder is in no file: this search finds nothing"
    );
    let directory = promise.world.directory();
    assert_eq!(
        what(search.in_files(directory)),
        Vec::<String>::new(),
        "files of the node"
    );
    assert!(
        !what(twin.in_files(directory)).is_empty(),
        "the placeholder is in no file: this search finds nothing"
    );

    // What the programs wrote at TRACE.
    let log = promise.node.log_lines();
    assert!(
        log.iter().any(|line| line.contains("TRACE")),
        "nothing was logged at TRACE"
    );
    let log = log.join("\n").into_bytes();
    assert_eq!(what(search.in_bytes([log])), Vec::<String>::new(), "logs");

    // What the API ever answered, the audit included.
    wait::within(Duration::from_secs(5), || None::<()>);
    let client = &promise.organization.client;
    for path in [
        "/secrets",
        "/sandboxes",
        "/settings/egress",
        "/egress/audit?limit=1000",
        "/api-keys",
    ] {
        client.get(path).send();
    }
    client.get(&sandbox.path("")).send();
    client.get(&sandbox.path("/network")).send();
    let answers = promise.node.answers();
    assert!(
        answers
            .iter()
            .any(|answer| answer.asked.contains("/egress/audit") && answer.body.len() > 1000)
    );
    for answer in &answers {
        let text = format!("{} {:?} {}", answer.asked, answer.headers, answer.text());
        let found = what(search.in_bytes([text.clone().into_bytes()]));
        assert_eq!(found, Vec::<String>::new(), "{text}");
    }

    // What went over the node's link could be read by nobody.
    let sent = promise
        .world
        .capture()
        .sent_since(harness::capture::Mark::default());
    assert!(sent.len() > 100);
    let payloads: Vec<Vec<u8>> = sent.into_iter().map(|packet| packet.payload).collect();
    assert_eq!(what(search.in_bytes(payloads)), Vec::<String>::new(), "packets");

    // And all the while the key worked.
    let kept = promise.mirror().heard_below("/kept");
    kept.iter()
        .for_each(|heard| assert_bearer(heard, promise.key("API_KEY")));
}
