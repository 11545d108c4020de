//! The key works: with real clients, in every kind of place, and only once.

use std::process::Command;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use harness::{
    mirror::Repositories,
    probe,
    world::{EVIL, OK},
};
use serde_json::json;

use super::{
    Promise, assert_bearer,
    clients::{self, CLIENTS, CURL, bytes_to, call, speak},
    fresh,
};

pub(crate) fn every_client_uses_a_key_that_it_never_has(promise: &Promise) {
    let key = promise.key("API_KEY");
    let placeholder = promise.placeholder("API_KEY");
    assert_ne!(placeholder, key);
    for host in ["api.test", "old.test"] {
        for (name, client) in CLIENTS {
            let path = fresh("every");
            let url = format!("https://{host}{path}");
            let answered = call(
                &promise.sandbox,
                client,
                &url,
                &["Authorization: Bearer $API_KEY"],
            );
            assert_eq!(answered.status, 200, "{name}: {answered:?}");
            let heard = promise.mirror().only(&path);
            assert_bearer(&heard, key);
            assert_eq!(heard.authority, host, "{name}: {heard:?}");
            assert!(!heard.text().contains(&placeholder), "{name}: {heard:?}");
            // The server told what it got, and the sandbox did not learn it.
            assert_eq!(answered.json()["path"], json!(path), "{name}: {answered:?}");
            assert!(answered.body.contains("[redacted:"), "{name}: {answered:?}");
            promise.assert_no_key(&answered.body);
        }
    }
    promise.sandbox.audited(
        &json!({ "decision": "allow", "host": "api.test", "method": "GET", "credential": "API_KEY" }),
    );
}

pub(crate) fn a_client_needs_no_credential_of_its_own(promise: &Promise) {
    let path = fresh("none");
    let answered = call(&promise.sandbox, CURL, &format!("https://api.test{path}"), &[]);
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_bearer(&promise.mirror().only(&path), promise.key("API_KEY"));
}

pub(crate) fn every_kind_puts_the_key_in_its_place(promise: &Promise) {
    let path = fresh("kinds");
    let answered = call(
        &promise.sandbox,
        CURL,
        &format!("https://odd.test{path}"),
        &["X-Odd: $ODD_KEY", "x-odd: second"],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = promise.mirror().only(&path);
    assert_eq!(heard.all("x-odd"), [format!("key {}", promise.key("ODD_KEY"))]);
    promise.assert_no_key(&answered.body);

    let path = fresh("kinds");
    let url = format!("https://query.test{path}?before=1&key=$QUERY_KEY&after=2");
    let answered = call(&promise.sandbox, CURL, &url, &[]);
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = promise.mirror().only(&path);
    let pairs: Vec<&str> = heard
        .target
        .split_once('?')
        .expect("a query")
        .1
        .split('&')
        .collect();
    let own = format!("key={}", promise.key("QUERY_KEY"));
    assert_eq!(
        pairs.iter().filter(|pair| pair.starts_with("key=")).count(),
        1,
        "{heard:?}"
    );
    for pair in [own.as_str(), "before=1", "after=2"] {
        assert!(pairs.contains(&pair), "{pair} is not in {heard:?}");
    }
    promise.assert_no_key(&answered.body);

    let path = fresh("kinds");
    let url = format!("https://placed.test{path}?other=1&where=$PLACED_KEY");
    let basic = "X-Basic: Basic $(printf user:$PLACED_KEY | base64 -w0)";
    let answered = call(
        &promise.sandbox,
        CURL,
        &url,
        &["X-Anywhere: <$PLACED_KEY>", basic],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = promise.mirror().only(&path);
    let key = promise.key("PLACED_KEY");
    assert_eq!(heard.all("x-anywhere"), [format!("<{key}>")]);
    assert!(heard.target.contains(&format!("where={key}")), "{heard:?}");
    promise.assert_no_key(&answered.body);

    let path = fresh("kinds");
    let answered = call(
        &promise.sandbox,
        CURL,
        &format!("https://placed.test{path}"),
        &["Authorization: Basic $(printf user:$PLACED_KEY | base64 -w0)"],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = promise.mirror().only(&path);
    let basic = STANDARD.encode(format!("user:{key}"));
    assert_eq!(heard.all("authorization"), [format!("Basic {basic}")]);
    promise.assert_no_key(&answered.body);
}

pub(crate) fn git_clones_and_pushes_with_a_password_that_it_never_has(promise: &Promise) {
    let root = promise.world.directory().join("repositories");
    let repository = root.join("project.git");
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().expect("git runs");
        assert!(output.status.success(), "git {arguments:?}: {output:?}");
    };
    let bare = repository.display().to_string();
    git(&["init", "-q", "--bare", "-b", "main", &bare]);
    git(&["-C", &bare, "config", "http.receivepack", "true"]);
    promise.mirror().repositories(Repositories {
        root,
        username: "x-access-token".to_owned(),
        password: promise.key("GIT_PASSWORD").to_owned(),
    });
    let work = "cd /workspace && rm -rf project && git clone -q";
    let commit = "cd project && git -c user.name=a -c user.email=a@example.org commit -q --allow-empty";
    for (url, message) in [
        ("https://git.test/project.git", "first"),
        (
            "https://x-access-token:$GIT_PASSWORD@git.test/project.git",
            "second",
        ),
        ("https://someone:else@git.test/project.git", "third"),
    ] {
        promise.sandbox.sh_ok(&format!("{work} {url} project 2>&1"));
        // More than fits one packet, so that the body is compressed and streamed.
        promise.sandbox.sh_ok(&format!(
            "cd /workspace/project && head -c 300000 /dev/urandom | base64 > {message} && git add {message} && cd .. && \
             {commit} -m {message} && git push -q origin HEAD:main 2>&1"
        ));
    }
    promise
        .sandbox
        .sh_ok(&format!("{work} https://git.test/project.git project 2>&1"));
    let log = promise.sandbox.sh_ok("git -C /workspace/project log --format=%s");
    assert_eq!(log, "third\nsecond\nfirst");
    // Without the binding the password is asked for: it is the key that opened.
    let other = promise.another(json!({ "secrets": "none" }));
    let ca = promise.world.ca.pem();
    other.write(probe::CA, ca);
    let refused = other.sh(&format!(
        "cd /workspace && GIT_TERMINAL_PROMPT=0 GIT_SSL_CAINFO={} git clone -q https://git.test/project.git project",
        probe::CA
    ));
    assert_ne!(refused.exit_code, 0, "{refused:?}");
    assert!(refused.stderr.contains("could not read Username"), "{refused:?}");
    other.stop();
}

pub(crate) fn other_credentials_do_not_travel_with_the_key(promise: &Promise) {
    let foreign = [
        "Cookie: session=attacker",
        "Proxy-Authorization: Basic attacker",
        "X-Api-Key: attacker",
        "Api-Key: attacker",
        "X-Goog-Api-Key: attacker",
        "Private-Token: attacker",
        "X-Harmless: stays",
    ];
    let query = "?q=1&key=attacker&api_key=attacker&access_token=attacker&token=attacker&z=2";
    for (name, client) in &CLIENTS[..2] {
        let path = fresh("strip");
        let answered = call(
            &promise.sandbox,
            client,
            &format!("https://api.test{path}{query}"),
            &foreign,
        );
        assert_eq!(answered.status, 200, "{name}: {answered:?}");
        let heard = promise.mirror().only(&path);
        assert_bearer(&heard, promise.key("API_KEY"));
        assert!(!heard.text().contains("attacker"), "{name}: {heard:#?}");
        assert!(heard.target.ends_with("?q=1&z=2"), "{name}: {heard:#?}");
        assert_eq!(heard.all("x-harmless"), ["stays"], "{name}: {heard:#?}");
    }
    // Where the binding says so, and where there is none, they do travel.
    for host in ["keeping.test", "unread.test"] {
        let path = fresh("strip");
        let answered = call(
            &promise.sandbox,
            CURL,
            &format!("https://{host}{path}{query}"),
            &foreign,
        );
        assert_eq!(answered.status, 200, "{answered:?}");
        let heard = promise.mirror().only(&path);
        assert_eq!(heard.all("cookie"), ["session=attacker"], "{heard:#?}");
        assert_eq!(heard.all("x-api-key"), ["attacker"], "{heard:#?}");
        assert!(heard.target.ends_with(query), "{heard:#?}");
    }
    let kept = promise.mirror().heard_below("/strip");
    let kept = kept
        .iter()
        .find(|heard| heard.authority == "keeping.test")
        .expect("heard");
    assert_bearer(kept, promise.key("KEEPING_KEY"));
}

pub(crate) fn however_often_a_client_sends_it_one_header_arrives(promise: &Promise) {
    let placeholder = promise.placeholder("API_KEY");
    let heads = [
        format!("Authorization: Bearer {placeholder}\r\nAuthorization: Bearer {placeholder}\r\n"),
        format!("authorization: Bearer {placeholder}\r\nAUTHORIZATION: Bearer attacker\r\n"),
        format!("Authorization: Bearer {placeholder}, Bearer attacker\r\n"),
        format!(
            "Authorization: Bearer attacker\r\nX-Other: {}\r\n",
            "x".repeat(1000)
        ),
        "Connection: close, authorization\r\nAuthorization: Bearer attacker\r\n".to_owned(),
        "Authorization:\r\nTransfer-Encoding-X: chunked\r\n".to_owned(),
    ];
    let mut paths = Vec::new();
    let attempts: Vec<_> = heads
        .iter()
        .map(|head| {
            let path = fresh("once");
            let request = format!("GET {path} HTTP/1.1\r\nHost: api.test\r\n{head}Connection: close\r\n\r\n");
            paths.push(path);
            bytes_to("api.test", request.as_bytes())
        })
        .collect();
    let answers = speak(&promise.sandbox, &attempts);
    for ((path, head), answer) in paths.iter().zip(&heads).zip(answers) {
        let text = String::from_utf8_lossy(&answer);
        promise.assert_no_key(&text);
        assert!(text.starts_with("HTTP/1.1 200"), "{head:?} was answered {text}");
        let heard = promise.mirror().only(path);
        assert_bearer(&heard, promise.key("API_KEY"));
        assert!(!heard.text().contains("attacker"), "{heard:#?}");
    }
}

pub(crate) fn redirects_are_not_followed_and_carry_only_the_placeholder(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    let key = promise.key("API_KEY");
    let placeholder = promise.placeholder("API_KEY");
    sandbox.sh_ok(&format!(
        "cat /etc/ssl/certs/ca-certificates.crt {} > /workspace/both.pem",
        probe::CA
    ));
    let follow = |status: u16, target: &str| {
        sandbox.sh(&format!(
            "curl -sS -i -L --location-trusted --max-time 30 --cacert /workspace/both.pem \
             -H \"Authorization: Bearer $API_KEY\" \"https://api.test/redirect/{status}?{target}\""
        ))
    };
    let mark = promise.world.capture().mark();
    for status in [301, 302, 303, 307, 308] {
        // To the same host: the next request is one like any other.
        let path = fresh("next");
        let same = follow(status, &path);
        assert_eq!(same.exit_code, 0, "{same:?}");
        assert_bearer(&mirror.only(&path), key);
        promise.assert_no_key(&same.stdout);
        // To a host that may be reached, but has nothing to do with the key.
        let path = fresh("next");
        let other = follow(status, &format!("https://other.test{path}"));
        assert_eq!(other.exit_code, 0, "{other:?}");
        let heard = mirror.only(&path);
        assert_bearer(&heard, &placeholder);
        assert!(!heard.text().contains(key), "{heard:?}");
        // The same, where netd reads.
        let path = fresh("next");
        let read = follow(status, &format!("https://unread.test{path}"));
        assert!(read.stdout.contains("placeholder_misuse"), "{read:?}");
        assert!(mirror.heard_below(&path).is_empty());
        // Downwards.
        let path = fresh("next");
        let clear = follow(status, &format!("http://api.test{path}"));
        assert!(
            clear.exit_code != 0 || clear.stdout.contains("placeholder_misuse"),
            "{clear:?}"
        );
        assert!(mirror.heard_below(&path).is_empty());
        // Away.
        for target in [
            "https://evil.test/",
            "//evil.test/",
            "http://203.0.113.66/",
            "https://203.0.113.66/",
        ] {
            let away = follow(status, target);
            assert_ne!(away.exit_code, 0, "{target}: {away:?}");
            assert!(away.stdout.contains(&status.to_string()), "{away:?}");
        }
    }
    promise.world.capture().assert_nothing_to(EVIL, mark);
    assert!(promise.world.dns.queries_for("evil.test").is_empty());
}

pub(crate) fn other_hosts_stay_spliced(promise: &Promise) {
    let issuer = |host: &str| {
        promise.sandbox.sh_ok(&format!(
            "openssl s_client -connect {host}:443 -servername {host} </dev/null 2>/dev/null | openssl x509 -noout -issuer"
        ))
    };
    for host in ["ok.test", "other.test"] {
        assert!(
            issuer(host).contains("Sandgate test world"),
            "{host}: {}",
            issuer(host)
        );
    }
    for host in ["api.test", "unread.test"] {
        assert!(
            !issuer(host).contains("Sandgate test world"),
            "{host}: {}",
            issuer(host)
        );
    }
    // Their certificate is the original one to the last byte, and pinned clients go on working.
    let by_name = promise.sandbox.sh_ok(&format!(
        "curl -sS --max-time 30 --cacert {} https://ok.test/",
        probe::CA
    ));
    assert_eq!(by_name, format!("hello from ok.test at {OK}"));
    // What the policy opens does not matter: a bound host is read under the widest one too.
    let wide = promise.another(json!({ "network": { "mode": "allow_all" } }));
    let path = fresh("wide");
    let answered = call(&wide, CURL, &format!("https://api.test{path}"), &[]);
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_bearer(&promise.mirror().only(&path), promise.key("API_KEY"));
    wide.write(probe::CA, promise.world.ca.pem());
    let spliced = wide.sh_ok(&format!(
        "curl -sS --max-time 30 --cacert {} https://ok.test/",
        probe::CA
    ));
    assert_eq!(spliced, format!("hello from ok.test at {OK}"));
    wide.stop();
}

pub(crate) fn large_bodies_stream_both_ways(promise: &Promise) {
    let sandbox = &promise.sandbox;
    let path = fresh("large");
    sandbox.sh_ok("head -c 3000000 /dev/zero | tr '\\0' x > /workspace/large");
    for version in ["--http1.1", "--http2"] {
        let url = format!("https://api.test{path}{version}");
        let sizes = sandbox.sh_ok(&format!(
            "curl -sS {version} --max-time 30 -T /workspace/large -o /workspace/back -w '%{{size_upload}}' {url}"
        ));
        assert_eq!(sizes, "3000000");
        let heard = promise.mirror().only(&format!("{path}{version}"));
        assert_eq!((heard.method.as_str(), heard.body.len()), ("PUT", 3_000_000));
        assert_bearer(&heard, promise.key("API_KEY"));
        let back: u64 = sandbox
            .sh_ok("wc -c < /workspace/back")
            .parse()
            .expect("a number");
        assert!(back > 3_000_000, "{back} bytes came back");
    }
    let events = sandbox.sh_ok("curl -sSN --max-time 30 https://api.test/events | while read -r line; do date +%s%N; echo \"$line\"; done");
    promise.assert_no_key(&events);
    let times: Vec<u64> = events.lines().filter_map(|line| line.parse().ok()).collect();
    let spread = times.last().expect("events") - times.first().expect("events");
    assert!(spread > 500_000_000, "the events came all at once: {events}");
    assert!(events.contains("data: 9 Bearer [redacted:"), "{events}");
}

pub(crate) fn websockets_pass_and_are_masked(promise: &Promise) {
    promise.sandbox.write(
        "/workspace/clients/socket.js",
        r#"const socket = new WebSocket(process.argv[2]);
const texts = [];
socket.onerror = (event) => { console.error(event.message); process.exit(1); };
socket.onmessage = (event) => {
  texts.push(event.data);
  if (texts.length === 1) socket.send("a".repeat(70000));
  if (texts.length === 2) socket.send("and back");
  if (texts.length === 3) { console.log(`${texts[0]}\n${texts[1].length}\n${texts[2]}`); socket.close(); }
};
"#,
    );
    for host in ["api.test", "old.test"] {
        let output = promise.sandbox.sh(&format!(
            "timeout 50 node /workspace/clients/socket.js wss://{host}/socket"
        ));
        assert_eq!(output.exit_code, 0, "{host}: {output:?}");
        promise.assert_no_key(&output.stdout);
        let lines: Vec<&str> = output.stdout.lines().collect();
        assert!(
            lines[0].starts_with("authorization Bearer [redacted:"),
            "{host}: {output:?}"
        );
        assert!(lines[0].ends_with("extensions []"), "{host}: {output:?}");
        assert_eq!(&lines[1..], ["70000", "and back"], "{host}: {output:?}");
    }
    let heard = promise.mirror().heard_below("/socket");
    assert_eq!(heard.len(), 2);
    heard
        .iter()
        .for_each(|heard| assert_bearer(heard, promise.key("API_KEY")));
}

pub(crate) fn a_plain_variable_is_what_it_says(promise: &Promise) {
    let other = promise.node.register("plain");
    let stored = super::store(&other, "PLAIN", "in-the-open-0123456789", &json!(null));
    assert_eq!(stored["egress"], json!(null), "{stored}");
    let sandbox = other.sandbox(&json!({ "network": super::policy() }));
    assert_eq!(sandbox.sh_ok("printenv PLAIN"), "in-the-open-0123456789");
    // And the key of another organisation is not used for it: nothing is read.
    clients::install(&sandbox);
    sandbox.write(probe::CA, promise.world.ca.pem());
    let path = fresh("plain");
    sandbox.sh_ok(&format!(
        "curl -sS --max-time 30 --cacert {} -H \"X-Value: $PLAIN\" https://api.test{path}",
        probe::CA
    ));
    let heard = promise.mirror().only(&path);
    assert_eq!(heard.all("x-value"), ["in-the-open-0123456789"]);
    assert!(heard.all("authorization").is_empty(), "{heard:?}");
    sandbox.stop();
}
