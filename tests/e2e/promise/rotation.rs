//! A key that is replaced, taken back, or cannot be asked for.

use std::{
    thread,
    time::{Duration, Instant},
};

use harness::{mirror::Heard, node::Node, sandbox::Sandbox, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use super::{
    Promise, assert_bearer,
    clients::{CURL, call, line},
    fresh, policy,
};

/// How long a request may have been under way when a change took effect, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(4);
/// Longest wait for a client that asks all the time.
const ASKED: Duration = Duration::from_secs(60);
/// The longest that a node may use a value without the controller.
const LEASE: Duration = Duration::from_secs(60);

/// Asks again and again on one connection while `change` runs, and gives what the server heard since, with how
/// each request ended for the client.
fn while_asking(
    promise: &Promise,
    sandbox: &Sandbox,
    host: &str,
    name: &str,
    change: impl FnOnce(),
) -> (Vec<Heard>, String, Instant, Instant) {
    let path = fresh("live");
    let stop = format!("/workspace/stop{}", path.replace('/', "-"));
    let command = format!("exec python3 /workspace/clients/live.py {host} {path} {name} {stop}");
    sandbox.background(&command, |_| promise.mirror().heard_below(&path).len() > 10);
    let asked = Instant::now();
    change();
    let changed = Instant::now();
    thread::sleep(AT_ONCE);
    let asked_for = || sandbox.read("/workspace/background.log").len();
    let before = asked_for();
    wait::until("the client goes on asking", ASKED, || {
        (asked_for() > before + 64).then_some(())
    });
    sandbox.sh_ok(&format!("touch {stop}"));
    let log = sandbox.sh_ok("cat /workspace/background.log");
    (promise.mirror().heard_below(&path), log, asked, changed)
}

pub(crate) fn a_new_value_is_used_on_the_next_request(promise: &Promise) {
    let old = promise.key("ROTATED_KEY");
    let new = old.replace("canary", "newer-canary");
    let placeholder = promise.placeholder("ROTATED_KEY");
    let (heard, log, asked, changed) =
        while_asking(promise, &promise.sandbox, "rotated.test", "ROTATED_KEY", || {
            let call = promise
                .organization
                .client
                .put("/secrets/ROTATED_KEY")
                .json(&json!({ "value": new }));
            let answer = call.send().ok();
            assert!(!answer.to_string().contains("canary"), "{answer}");
        });
    for heard in &heard {
        let expected = if heard.at < asked {
            vec![old]
        } else if heard.at > changed + AT_ONCE {
            vec![new.as_str()]
        } else {
            vec![old, &new]
        };
        let sent = heard.all("authorization");
        assert!(
            sent.len() == 1 && expected.iter().any(|key| sent[0] == format!("Bearer {key}")),
            "{heard:?} {:?} after the change",
            heard.at.checked_duration_since(changed)
        );
    }
    let last = heard.last().expect("heard");
    assert!(last.at > changed + AT_ONCE, "the client stopped asking: {log}");
    // No request failed, and the connection was never a new one.
    assert!(log.lines().all(|line| line.ends_with(" 1 200")), "{log}");
    assert_eq!(promise.placeholder("ROTATED_KEY"), placeholder);
    // Also in a sandbox that is made now.
    let sandbox = promise.another(json!({}));
    let path = fresh("live");
    call(&sandbox, CURL, &format!("https://rotated.test{path}"), &[]);
    assert_bearer(&promise.mirror().only(&path), &new);
    sandbox.stop();
}

pub(crate) fn a_key_that_is_taken_back_stops_at_once(promise: &Promise) {
    let sandbox = promise.another(json!({}));
    let key = promise.key("REVOKED_KEY");
    let dead = sandbox.sh_ok("printenv REVOKED_KEY");
    let (heard, log, asked, changed) = while_asking(promise, &sandbox, "revoked.test", "REVOKED_KEY", || {
        let answer = promise.organization.client.delete("/secrets/REVOKED_KEY").send();
        assert!(answer.status.is_success(), "{answer:?}");
    });
    assert!(heard.iter().any(|heard| heard.at < asked), "{log}");
    for heard in &heard {
        let late = heard.at > changed + AT_ONCE;
        assert!(!late || !heard.text().contains(key), "{heard:?}");
    }
    let statuses: Vec<&str> = log.lines().filter_map(|line| line.rsplit(' ').next()).collect();
    assert_eq!(statuses.first(), Some(&"200"), "{log}");
    assert_ne!(
        statuses.last(),
        Some(&"200"),
        "requests with a dead placeholder go on being answered: {log}"
    );
    let listed = promise.organization.client.get("/secrets").send().ok();
    assert!(!listed.to_string().contains("REVOKED_KEY"), "{listed}");
    // The dead placeholder opens nothing, also for a new key of that name.
    let new = key.replace("canary", "again-canary");
    super::store(
        &promise.organization,
        "REVOKED_KEY",
        &new,
        &json!({ "hosts": ["revoked.test"], "ports": [443], "inject": [{ "kind": "placeholder", "in": ["header"] }] }),
    );
    let path = fresh("live");
    let header = format!("Authorization: Bearer {dead}");
    call(&sandbox, CURL, &format!("https://revoked.test{path}"), &[&header]);
    for heard in promise.mirror().heard_below(&path) {
        assert!(!heard.text().contains(&new), "{heard:?}");
    }
    sandbox.stop();
}

/// The controller's serving process, held; it goes on when this is dropped.
struct Held(Pid);

impl Held {
    fn new(node: &Node) -> Self {
        let serving = node.controller().expect("it runs");
        let pid = Pid::from_raw(i32::try_from(serving.pid).expect("a process number"));
        kill(pid, Signal::SIGSTOP).expect("it runs");
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The supervisor may have replaced it.
        kill(self.0, Signal::SIGCONT).ok();
    }
}

/// The answers of a client that runs in the background, because no command can be started meanwhile.
fn ask_in_background(sandbox: &Sandbox, url: &str, file: &str, header: &str) {
    let call = line(CURL, url, &[header]).replace("cd /workspace && ", "");
    sandbox.write(
        "/workspace/clients/again.sh",
        format!("cd /workspace\nn=0\nwhile :; do n=$((n+1)); echo \"$n $({} 2>&1 | tr '\\n' ' ')\" >> {file}; sleep 1; done\n",
            call.replace("/N", "/$n")),
    );
    sandbox.sh_ok("cd /workspace && setsid sh clients/again.sh >/dev/null 2>&1 </dev/null & echo started");
}

pub(crate) fn without_the_controller_a_key_lives_no_longer_than_its_lease(promise: &Promise) {
    promise.node.wait_ready();
    let sandbox = promise.another(json!({}));
    let mut open_policy = policy();
    open_policy["failure_mode"] = json!("fail_open");
    let open = promise.another(json!({ "network": open_policy }));
    let (warm, cold, gone) = (fresh("warm"), fresh("cold"), fresh("gone"));
    ask_in_background(
        &sandbox,
        &format!("https://api.test{warm}/N"),
        "/workspace/warm.log",
        "Authorization: Bearer $API_KEY",
    );
    wait::until("the lease is there", ASKED, || {
        (promise.mirror().heard_below(&warm).len() > 2).then_some(())
    });
    // A sandbox in which nothing was ever read has no authority to be asked for either.
    call(&open, CURL, &format!("https://api.test{}", fresh("open")), &[]);
    let started = Instant::now();
    {
        // What nobody has asked for yet cannot be asked for now. The clients wait until then.
        for (sandbox, path) in [(&sandbox, &cold), (&open, &gone)] {
            let call = line(
                CURL,
                &format!("https://cold.test{path}/N"),
                &["Authorization: Bearer $COLD_KEY", "X-Other: stays"],
            );
            let script = format!(
                "cd /workspace; sleep 20; for n in 1 2 3; do {} 2>&1 | tr '\\n' ' '; echo; sleep 1; done",
                call.replace("cd /workspace && ", "").replace("/N", "/$n")
            );
            sandbox.write("/workspace/clients/cold.sh", script);
            sandbox.sh_ok(
                "setsid sh /workspace/clients/cold.sh >/workspace/cold.log 2>&1 </dev/null & echo started",
            );
        }
        let _held = Held::new(&promise.node);
        let stopped = Instant::now();
        wait::until("the last request with the key", LEASE + ASKED, || {
            let last = promise.mirror().heard_below(&warm).last().expect("heard").at;
            (stopped.elapsed() > LEASE + Duration::from_secs(20) || last.elapsed() > Duration::from_secs(12))
                .then_some(())
        });
        let warm = promise.mirror().heard_below(&warm);
        let last = warm.last().expect("heard");
        assert!(
            last.at < stopped + LEASE + Duration::from_secs(10),
            "the key is used {:?} after the controller was last heard",
            last.at - stopped
        );
        warm.iter()
            .for_each(|heard| assert_bearer(heard, promise.key("API_KEY")));
    }
    promise.node.wait_ready();
    wait::until("commands run again", ASKED, || {
        let call = sandbox
            .client()
            .post(&sandbox.path("/execute"))
            .json(&json!({ "command": "true" }));
        call.try_send().ok().filter(|answer| answer.status.is_success())
    });
    let refused = sandbox.sh_ok("cat /workspace/cold.log");
    assert_eq!(refused.matches("503 ").count(), 3, "{refused}");
    assert!(refused.contains("credential_unavailable"), "{refused}");
    assert!(promise.mirror().heard_below(&cold).is_empty());
    let answers = sandbox.sh_ok("cat /workspace/warm.log");
    assert!(
        answers.contains("credential_unavailable"),
        "after {:?}: {answers}",
        started.elapsed()
    );
    // Where the policy says so, requests go on, without the key and without what stands for it.
    let dead = open.sh_ok("printenv COLD_KEY");
    let forwarded = promise.mirror().heard_below(&gone);
    assert_eq!(forwarded.len(), 3, "{}", open.sh_ok("cat /workspace/cold.log"));
    for heard in forwarded {
        assert!(
            heard.all("authorization").is_empty() && !heard.text().contains(&dead),
            "{heard:?}"
        );
        assert_eq!(heard.all("x-other"), ["stays"]);
    }
    sandbox.audited(&json!({ "decision": "deny", "host": "cold.test", "reason": "credential_unavailable" }));
    // And with the controller the key is back.
    let path = fresh("cold");
    let answered = call(
        &sandbox,
        CURL,
        &format!("https://cold.test{path}"),
        &["Authorization: Bearer $COLD_KEY"],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_bearer(&promise.mirror().only(&path), promise.key("COLD_KEY"));
    sandbox.stop();
    open.stop();
}
