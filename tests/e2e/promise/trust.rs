//! The authority that a sandbox trusts: its own, for itself alone.

use harness::{probe, sandbox::Sandbox};
use serde_json::json;

use super::{
    Promise,
    clients::{CLIENTS, CURL, call},
    fresh,
};

/// The certificates that a host shows, PEM.
#[track_caller]
fn chain(sandbox: &Sandbox, host: &str) -> String {
    sandbox.sh_ok(&format!(
        "openssl s_client -showcerts -connect {host}:443 -servername {host} </dev/null 2>/dev/null | \
         sed -n '/BEGIN CERT/,/END CERT/p'"
    ))
}

#[track_caller]
fn leaf(sandbox: &Sandbox, host: &str, options: &str) -> String {
    sandbox.write("/workspace/leaf.pem", chain(sandbox, host));
    sandbox.sh_ok(&format!("openssl x509 -in /workspace/leaf.pem -noout {options}"))
}

pub(crate) fn every_sandbox_has_an_authority_of_its_own(promise: &Promise) {
    let (one, two) = (&promise.sandbox, promise.another(json!({})));
    let key = "-ext authorityKeyIdentifier";
    assert_ne!(leaf(one, "api.test", key), leaf(&two, "api.test", key));
    assert_ne!(
        leaf(one, "api.test", "-issuer"),
        leaf(&two, "api.test", "-issuer")
    );
    // What the one trusts the other does not.
    for (sandbox, of, good) in [
        (one, one, true),
        (&two, &two, true),
        (one, &two, false),
        (&two, one, false),
    ] {
        sandbox.write("/workspace/shown.pem", chain(of, "api.test"));
        let verified = sandbox.sh("openssl verify -untrusted /workspace/shown.pem /workspace/shown.pem");
        assert_eq!(verified.exit_code == 0, good, "{verified:?}");
    }
    // A leaf is for servers, for this name, for a day.
    let shown = leaf(one, "api.test", "-text");
    assert!(shown.contains("TLS Web Server Authentication"), "{shown}");
    assert!(!shown.contains("TLS Web Client Authentication"), "{shown}");
    assert!(
        shown.contains("DNS:api.test") && !shown.contains("CA:TRUE"),
        "{shown}"
    );
    let ends = one.sh("openssl x509 -in /workspace/leaf.pem -noout -checkend 86400");
    assert_ne!(ends.exit_code, 0, "valid for more than a day: {shown}");
    let now = one.sh("openssl x509 -in /workspace/leaf.pem -noout -checkend 60");
    assert_eq!(now.exit_code, 0, "{shown}");
    // The authority's key is nowhere inside; its certificate is.
    let keys = one.sh_ok(
        "grep -rlsI 'BEGIN.*PRIVATE KEY' /workspace /tmp /etc /run /usr/local/share 2>/dev/null || true",
    );
    assert_eq!(keys, "");
    two.stop();
}

pub(crate) fn clients_trust_it_without_a_flag_and_go_on_trusting_the_rest(promise: &Promise) {
    let sandbox = &promise.sandbox;
    let bundle = "/etc/ssl/certs/ca-certificates.crt";
    let inside: u64 = sandbox
        .sh_ok(&format!("grep -c BEGIN {bundle}"))
        .parse()
        .expect("a number");
    assert!(inside > 100, "the system's own authorities are missing: {inside}");
    let written = sandbox.sh(&format!("echo x >> {bundle}"));
    assert_ne!(written.exit_code, 0, "the bundle can be written");
    // With an environment of nothing, as a daemon or `env -i` would have it.
    for line in [
        "env -i /usr/bin/curl -sS --max-time 30 -o /dev/null https://api.test/",
        "env -i /usr/bin/python3 -c 'import urllib.request as u; u.urlopen(\"https://api.test/\", timeout=10)'",
        "env -i /usr/bin/git ls-remote https://git.test/project.git",
        "env -i /usr/bin/openssl s_client -verify_return_error -connect api.test:443 -servername api.test </dev/null",
    ] {
        let output = sandbox.sh(line);
        assert_eq!(output.exit_code, 0, "{line}: {output:?}");
    }
    // Nobody else is trusted because of it.
    for (name, client) in CLIENTS {
        let output = sandbox.sh(&super::clients::line(client, "https://other.test/", &[]));
        assert_ne!(
            output.exit_code, 0,
            "{name} trusts the world's own authority: {output:?}"
        );
    }
    // A client that pins a certificate sees that it is another one.
    let pinned = sandbox.sh(&format!(
        "curl -sS --max-time 30 --cacert {} https://api.test/",
        probe::CA
    ));
    assert_ne!(pinned.exit_code, 0, "{pinned:?}");
    let path = fresh("proxy");
    let output = sandbox.sh(&format!(
        "cd /workspace && HTTPS_PROXY=http://203.0.113.66:8080 timeout 10 {CURL} https://api.test{path}"
    ));
    assert_ne!(output.exit_code, 0, "{output:?}");
    let answered = call(sandbox, CURL, &format!("https://api.test{path}"), &[]);
    assert_eq!(answered.status, 200, "{answered:?}");
}
