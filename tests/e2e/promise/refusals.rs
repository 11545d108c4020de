//! The key goes nowhere else: other hosts, ports, methods, paths, names, and servers that are not who they say.

use harness::{probe, world::EVIL};
use serde_json::json;

use super::{
    Promise, assert_bearer,
    clients::{CLIENTS, CURL, bytes_to, call, speak},
    fresh,
};

pub(crate) fn in_clear_or_on_another_port_there_is_no_key(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    // With the placeholder the request is refused, without it there is nothing to inject.
    let refused = |url: &str, header: &str| {
        let output = sandbox.sh(&format!(
            "curl -sS --max-time 30 -w '%{{http_code}}' \"{url}\" -H \"{header}\""
        ));
        assert!(output.took < probe::AT_ONCE, "{output:?}");
        // By an answer, or by an end of the connection.
        assert!(
            output.exit_code != 0 || output.stdout.ends_with("403"),
            "{output:?}"
        );
        assert_ne!(output.exit_code, 28, "{output:?}");
    };
    let path = fresh("clear");
    refused(
        &format!("http://api.test{path}"),
        "Authorization: Bearer $API_KEY",
    );
    assert!(mirror.heard_below(&path).is_empty());
    sandbox.audited(
        &json!({ "decision": "deny", "host": "api.test", "port": 80, "reason": "placeholder_misuse" }),
    );
    let path = fresh("clear");
    let answered = call(sandbox, CURL, &format!("http://api.test{path}"), &[]);
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = mirror.only(&path);
    assert!(heard.all("authorization").is_empty(), "{heard:?}");
    assert_eq!(heard.sni, None);
    // In other places of the request, and in other forms of it.
    for (place, header) in [
        ("?x=$API_KEY", "X-Any: x"),
        ("/$API_KEY", "X-Any: x"),
        ("", "X-Any: before $API_KEY after"),
        ("", "Authorization: Basic $(printf u:$API_KEY | base64 -w0)"),
    ] {
        let path = fresh("clear");
        refused(&format!("http://other.test{path}{place}"), header);
        assert!(mirror.heard_below(&path).is_empty(), "{place} {header}");
    }
    // On another port the bytes are not read: what arrives is worthless.
    let (path, placeholder) = (fresh("port"), promise.placeholder("API_KEY"));
    let ca = promise.world.ca.pem();
    sandbox.write(probe::CA, ca);
    sandbox.sh(&format!(
        "curl -sS --max-time 30 --cacert {} -H \"Authorization: Bearer $API_KEY\" https://api.test:8443{path}",
        probe::CA
    ));
    for heard in mirror.heard_below(&path) {
        assert_bearer(&heard, &placeholder);
    }
}

pub(crate) fn other_methods_and_paths_of_a_bound_host_get_no_key(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    let path = fresh("v1/good");
    let good = call(
        sandbox,
        CURL,
        &format!("https://limited.test{path}"),
        &["Authorization: Bearer $LIMITED_KEY"],
    );
    assert_eq!(good.status, 200, "{good:?}");
    assert_bearer(&mirror.only(&path), promise.key("LIMITED_KEY"));
    for path in [fresh("admin"), fresh("v1/../admin"), fresh("v1x"), fresh("V1")] {
        let target = format!("https://limited.test{path}");
        let refused = call(
            sandbox,
            "sh clients/curl.sh --path-as-is",
            &target,
            &["Authorization: Bearer $LIMITED_KEY"],
        );
        refused.assert_refused(403, "placeholder_misuse");
        call(sandbox, "sh clients/curl.sh --path-as-is", &target, &[]);
    }
    for path in [
        "/v1/%2e%2e/admin",
        "/v1/..%2fadmin",
        "/v1/%5c../admin",
        "/v1/a%00b",
        "/v1/..;/%2e%2e%2fadmin",
    ] {
        let answered = call(
            sandbox,
            "sh clients/curl.sh --path-as-is",
            &format!("https://limited.test{path}"),
            &["Authorization: Bearer $LIMITED_KEY"],
        );
        assert_eq!(answered.status, 400, "{path}: {answered:?}");
    }
    // A refusal reaches clients that are still sending, each time.
    let path = fresh("v1/post");
    let mut unheard = Vec::new();
    for (version, body, times) in [
        ("--http2", "x", 20),
        ("--http1.1", "x", 5),
        ("--http2", "@large", 5),
        ("--http1.1", "@large", 5),
    ] {
        let posted = sandbox.sh(&format!(
            "cd /workspace; head -c 1000000 /dev/zero > large; for n in $(seq {times}); do \
             curl -sS {version} --max-time 30 --data-binary {body} -H \"Authorization: Bearer $LIMITED_KEY\" https://limited.test{path} 2>&1; \
             echo; done"
        ));
        let refused = posted.stdout.matches("placeholder_misuse").count();
        if refused != times {
            unheard.push(format!(
                "{version} {body}: {refused} of {times}: {}",
                posted.stdout
            ));
        }
    }
    assert!(mirror.heard_below(&path).is_empty());
    assert!(unheard.is_empty(), "{unheard:#?}");
    for heard in mirror.heard() {
        if heard.authority == "limited.test" && !heard.target.starts_with("/v1/") {
            assert!(!heard.text().contains(promise.key("LIMITED_KEY")), "{heard:#?}");
        }
    }
}

pub(crate) fn the_name_inside_must_be_the_name_outside(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    let placeholder = promise.placeholder("API_KEY");
    let mark = promise.world.capture().mark();
    // Another host on the connection, allowed or not, in either version.
    for host in ["evil.test", "other.test", "old.test"] {
        for version in ["--http1.1", "--http2"] {
            let path = fresh("front");
            let answered = call(
                sandbox,
                &format!("sh clients/curl.sh {version}"),
                &format!("https://api.test{path}"),
                &[&format!("Host: {host}"), "Authorization: Bearer $API_KEY"],
            );
            answered.assert_refused(421, "host_mismatch");
            assert!(mirror.heard_below(&path).is_empty(), "{host} {version}");
        }
    }
    sandbox.audited(&json!({ "decision": "deny", "reason": "host_mismatch", "host": "api.test" }));
    // Two readings of one request are none.
    let path = fresh("strict");
    let broken = [
        "GET {path} HTTP/1.1\r\nHost: api.test\r\nHost: evil.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test\r\nHost: api.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost:\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test:443@evil.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test#evil.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test\tevil.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: user@api.test\r\n\r\n",
        "GET https://evil.test{path} HTTP/1.1\r\nHost: api.test\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test\r\nX: a\r\n b\r\n\r\n",
        "GET {path} HTTP/1.1\nHost: api.test\n\n",
        "GET {path} HTTP/1.1\r\nHost: api.test\r\nX: a\rb\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost : api.test\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nContent-Length: +5\r\n\r\nhello",
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: api.test\r\nAuthorization: Bearer a\0b\r\n\r\n",
        "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n",
    ];
    let attempts: Vec<_> = broken
        .iter()
        .map(|request| bytes_to("api.test", request.replace("{path}", &path).as_bytes()))
        .collect();
    for (request, answer) in broken.iter().zip(speak(sandbox, &attempts)) {
        let text = String::from_utf8_lossy(&answer);
        let refused = ["HTTP/1.1 400", "HTTP/1.1 421", "HTTP/1.1 403", "HTTP/1.1 405"];
        assert!(
            refused.iter().any(|status| text.starts_with(status)),
            "{request:?} was answered {text:?}"
        );
        promise.assert_no_key(&text);
    }
    assert!(
        mirror.heard_below(&path).is_empty(),
        "{:#?}",
        mirror.heard_below(&path)
    );
    // The twin: the same bytes without the flaw.
    let path = fresh("strict");
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: api.test:443\r\nAuthorization: Bearer {placeholder}\r\nConnection: close\r\n\
         Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    );
    let answers = speak(sandbox, &[bytes_to("api.test", request.as_bytes())]);
    assert!(
        answers[0].starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answers[0])
    );
    let heard = mirror.only(&path);
    assert_bearer(&heard, promise.key("API_KEY"));
    assert_eq!(heard.body, "hello");
    // Two requests in one write are judged one by one.
    let (first, second) = (fresh("strict"), fresh("strict"));
    let request = format!(
        "GET {first} HTTP/1.1\r\nHost: api.test\r\n\r\nGET {second} HTTP/1.1\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    );
    let answers = speak(sandbox, &[bytes_to("api.test", request.as_bytes())]);
    let text = String::from_utf8_lossy(&answers[0]);
    assert!(
        text.starts_with("HTTP/1.1 200") && text.contains("HTTP/1.1 421"),
        "{text}"
    );
    assert_bearer(&mirror.only(&first), promise.key("API_KEY"));
    assert!(mirror.heard_below(&second).is_empty());
    promise.world.capture().assert_nothing_to(EVIL, mark);
}

pub(crate) fn http_rules_hold_for_every_request(promise: &Promise) {
    let sandbox = promise.another(json!({ "network": {
        "mode": "allowlist",
        "rules": [{
            "name": "read-only", "action": "allow", "domains": ["strict.test"], "ports": ["443"],
            "http": [
                { "methods": ["GET"], "paths": ["/repos/**"] },
                { "methods": ["POST"], "paths": ["/search"] },
            ],
        }],
    }}));
    let mirror = promise.mirror();
    let url = |path: &str| format!("https://strict.test{path}");
    let path = fresh("repos/a");
    let (name, client) = CLIENTS[0];
    let good = call(&sandbox, client, &url(&path), &[]);
    assert_eq!(good.status, 200, "{name}: {good:?}");
    assert_bearer(&mirror.only(&path), promise.key("STRICT_KEY"));
    let good = sandbox.sh_ok(&format!("curl -sS --max-time 30 -d x {}", url("/search")));
    assert!(good.contains("\"method\":\"POST\""), "{good}");
    let before = mirror.heard().len();
    for (method, path, reason) in [
        ("GET", "/admin", "path_denied"),
        ("GET", "/repositories", "path_denied"),
        ("GET", "/repos/../admin", "path_denied"),
        ("GET", "/repos/x/.././../admin", "path_denied"),
        ("DELETE", "/repos/a", "method_denied"),
        ("PUT", "/repos/a", "method_denied"),
        ("get", "/repos/a", "method_denied"),
        ("TRACE", "/repos/a", "method_denied"),
        ("POST", "/repos/a", "_denied"),
        ("GET", "/search", "_denied"),
    ] {
        let refused = sandbox.sh_ok(&format!(
            "curl -sS --max-time 30 --path-as-is -X {method} -w '\\n%{{http_code}}' {}",
            url(path)
        ));
        let (body, status) = refused.rsplit_once('\n').unwrap_or_default();
        assert_eq!(status, "403", "{method} {path}: {refused}");
        assert!(
            body.contains(reason) && body.contains("read-only"),
            "{method} {path}: {refused}"
        );
        let body: serde_json::Value = serde_json::from_str(body).expect("a JSON body");
        assert!(body.is_object());
    }
    for path in [
        "/repos/%2e%2e/admin",
        "/repos/..%2fadmin",
        "/repos/%5cadmin",
        "/repos/a\\b",
        "/repos/%00",
    ] {
        let refused = sandbox.sh_ok(&format!(
            "curl -sS -o /dev/null --max-time 30 --path-as-is -w '%{{http_code}}' '{}'",
            url(path)
        ));
        assert_eq!(refused, "400", "{path}");
    }
    // Methods in disguise.
    let disguised = call(
        &sandbox,
        CURL,
        &url(&fresh("repos/b")),
        &["X-HTTP-Method-Override: DELETE"],
    );
    assert_eq!(disguised.status, 200, "{disguised:?}");
    assert_eq!(mirror.heard().len(), before + 1);
    let last = mirror.heard().pop().expect("heard");
    assert!(last.all("x-http-method-override").is_empty(), "{last:?}");
    // An upgrade must be listed.
    let socket = sandbox.sh(
        "curl -sS --max-time 30 --http1.1 -o /dev/null -w '%{http_code}' -H 'Connection: Upgrade' -H 'Upgrade: websocket' \
         -H 'Sec-WebSocket-Version: 13' -H 'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==' https://strict.test/repos/socket",
    );
    assert_eq!(socket.stdout, "403", "{socket:?}");
    sandbox.audited(&json!({
        "decision": "deny", "reason": "path_denied", "host": "strict.test", "method": "GET", "path": "/admin",
    }));
    sandbox.stop();
}

pub(crate) fn servers_that_are_not_who_they_say_get_nothing(promise: &Promise) {
    for host in ["over.test", "stranger.test", "wrong.test"] {
        for (name, client) in &CLIENTS[..3] {
            let path = fresh("untrusted");
            let url = format!("https://{host}{path}");
            let answered = call(
                &promise.sandbox,
                client,
                &url,
                &["Authorization: Bearer $UNTRUSTED_KEY"],
            );
            assert_eq!(answered.status, 502, "{name} of {host}: {answered:?}");
            answered.assert_refused(502, "upstream_tls");
            assert!(promise.mirror().heard_below(&path).is_empty());
        }
        promise
            .sandbox
            .audited(&json!({ "decision": "deny", "host": host, "reason": "upstream_tls" }));
    }
    // Nobody listens at all.
    let path = fresh("late");
    promise.world.dns.set(
        "late.test",
        harness::dns::Answer::Addresses(vec![std::net::Ipv4Addr::new(203, 0, 113, 99).into()]),
    );
    let sandbox = promise.another(json!({}));
    super::store(
        &promise.organization,
        "LATE_KEY",
        "sk-canary-late-0123456789",
        &json!({ "hosts": ["late.test"], "ports": [443], "inject": [{ "kind": "bearer" }] }),
    );
    sandbox
        .client()
        .post(&sandbox.path("/secrets/inject"))
        .json(&json!({ "secrets": ["LATE_KEY"] }))
        .send()
        .ok();
    let answered = call(&sandbox, CURL, &format!("https://late.test{path}"), &[]);
    answered.assert_refused(502, "upstream_unreachable");
    sandbox.client().delete("/secrets/LATE_KEY").send();
    sandbox.stop();
}

pub(crate) fn a_placeholder_is_of_one_sandbox(promise: &Promise) {
    let other = promise.another(json!({}));
    let (own, foreign) = (
        other.sh_ok("printenv PLACED_KEY"),
        promise.placeholder("PLACED_KEY"),
    );
    assert_ne!(own, foreign);
    let path = fresh("foreign");
    let header = format!("X-Anywhere: {foreign}");
    let answered = call(&other, CURL, &format!("https://placed.test{path}"), &[&header]);
    promise.assert_no_key(&answered.body);
    for heard in promise.mirror().heard_below(&path) {
        assert!(!heard.text().contains(promise.key("PLACED_KEY")), "{heard:?}");
    }
    let path = fresh("foreign");
    let answered = call(
        &other,
        CURL,
        &format!("https://placed.test{path}"),
        &["X-Anywhere: $PLACED_KEY"],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_eq!(
        promise.mirror().only(&path).all("x-anywhere"),
        [promise.key("PLACED_KEY")]
    );
    // One placeholder at another's host.
    let path = fresh("foreign");
    call(
        &other,
        CURL,
        &format!("https://placed.test{path}"),
        &["X-Anywhere: $API_KEY"],
    )
    .assert_refused(403, "placeholder_misuse");
    assert!(promise.mirror().heard_below(&path).is_empty());
    other.stop();
}

pub(crate) fn questions_to_name_servers_go_nowhere(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    let before = mirror.heard().len();
    let question = "-H 'Accept: application/dns-message'";
    for (path, options) in [
        ("/dns-query?dns=AAABAAABAAAAAAAAA3d3dwdleGFtcGxlA2NvbQAAAQAB", ""),
        ("/resolve?name=secret.evil.test&type=16", ""),
        ("/innocent", question),
        ("/innocent", "-d x -H 'Content-Type: application/dns-message'"),
        (
            "/innocent",
            "-d x -H 'Content-Type: application/oblivious-dns-message'",
        ),
    ] {
        for version in ["--http1.1", "--http2"] {
            let line = format!(
                "curl -sS --max-time 30 {version} {options} -w '\\n%{{http_code}}' 'https://api.test{path}'"
            );
            let refused = sandbox.sh_ok(&line);
            assert!(
                refused.ends_with("403") && refused.contains("dns_refused"),
                "{line}: {refused}"
            );
        }
    }
    assert_eq!(mirror.heard().len(), before, "a question reached the server");
    sandbox.audited(&json!({
        "decision": "deny", "host": "api.test", "path": "/dns-query", "reason": "dns_refused", "enforced": true,
    }));
    // The same path where nobody asks a question.
    let path = fresh("innocent");
    assert_eq!(
        call(sandbox, CURL, &format!("https://api.test{path}"), &[]).status,
        200
    );
    mirror.only(&path);
}
