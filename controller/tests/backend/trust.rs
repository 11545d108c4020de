//! That what runs inside trusts the sandbox's own authority, by real handshakes of real clients with a server
//! whose certificate it signed, and another sandbox's authority not at all.

use controller::{authority::Authority, backend::LaunchSpec};

use crate::world::{World, authority, can_run};

/// Makes a certificate for `ok.test` with the authority in `ca.pem` and `ca.key`, and serves it on port 8443.
const SERVE: &str = r#"
set -e
mkdir -p "$DIR" && cd "$DIR"
printf '%s' "$CERTIFICATE" > ca.pem
printf '%s' "$KEY" > ca.key
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout leaf.key -out leaf.csr -subj /CN=ok.test 2>/dev/null
printf 'subjectAltName=DNS:ok.test\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n' > leaf.ext
openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -set_serial 7 -days 1 -extfile leaf.ext -out leaf.pem 2>/dev/null
setsid openssl s_server -accept "$PORT" -cert leaf.pem -key leaf.key -www -quiet >server.log 2>&1 </dev/null &
for attempt in $(seq 100); do
  if python3 -c "import socket; socket.create_connection(('127.0.0.1', $PORT))" 2>/dev/null; then exit 0; fi
  sleep 0.1
done
cat server.log
exit 1
"#;

/// Exits with 0 where the client trusts what answers at `$PORT`.
const CLIENTS: [(&str, &str); 7] = [
    (
        "curl",
        "curl -sS --max-time 10 --resolve ok.test:$PORT:127.0.0.1 https://ok.test:$PORT/ -o /dev/null",
    ),
    (
        "curl without an environment",
        "env -i PATH=$PATH curl -sS --max-time 10 --resolve ok.test:$PORT:127.0.0.1 https://ok.test:$PORT/ -o /dev/null",
    ),
    (
        "openssl",
        "echo | openssl s_client -connect 127.0.0.1:$PORT -servername ok.test -verify_return_error -verify_hostname ok.test",
    ),
    (
        "python ssl, strict",
        r#"python3 -c '
import os, socket, ssl
context = ssl.create_default_context()
context.verify_flags |= ssl.VERIFY_X509_STRICT
context.wrap_socket(socket.create_connection(("127.0.0.1", int(os.environ["PORT"]))), server_hostname="ok.test")'"#,
    ),
    (
        "python ssl without an environment",
        r#"env -i PATH=$PATH PORT=$PORT python3 -c '
import os, socket, ssl
ssl.create_default_context().wrap_socket(socket.create_connection(("127.0.0.1", int(os.environ["PORT"]))), server_hostname="ok.test")'"#,
    ),
    (
        "node",
        r#"node -e '
const socket = require("tls").connect({ port: +process.env.PORT, host: "127.0.0.1", servername: "ok.test" }, () => process.exit(0));
socket.on("error", (error) => { console.error(error.code); process.exit(1); });'"#,
    ),
    (
        "git",
        // Past the handshake this is no Git server, which is another error than a certificate's.
        r#"git -c http.curloptResolve=ok.test:$PORT:127.0.0.1 ls-remote https://ok.test:$PORT/x 2>&1 | { ! grep -i certificate; }"#,
    ),
];

/// What goes on inside, with the variables that the lines above use.
async fn sh(world: &World, spec: &LaunchSpec, port: u16, line: &str) -> (i32, String) {
    let line = format!("export PORT={port}; {line}");
    let outcome = world.sh(spec, &line).await;
    (outcome.code, format!("{}{}", outcome.stdout, outcome.stderr))
}

async fn serve(world: &World, spec: &LaunchSpec, port: u16, authority: &Authority, certificate: &str) {
    let key = authority.key();
    let line = format!(
        "export DIR=/tmp/{port} CERTIFICATE='{certificate}' KEY='{}'\n{SERVE}",
        key.expose()
    );
    let (code, text) = sh(world, spec, port, &line).await;
    assert_eq!(code, 0, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_inside_trust_their_own_authority_and_no_other_sandbox_s() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let (own, other) = (authority(), authority());
    let certificate = own.certificate().unwrap();
    let spec = LaunchSpec {
        ca_certificate: Some(certificate.clone()),
        ..world.spec()
    };
    world.start(&spec).await;
    serve(&world, &spec, 8443, &own, &certificate).await;
    serve(&world, &spec, 9443, &other, &other.certificate().unwrap()).await;
    for (client, line) in CLIENTS {
        let (code, text) = sh(&world, &spec, 8443, line).await;
        assert_eq!(code, 0, "{client} does not trust its own authority: {text}");
        let (code, text) = sh(&world, &spec, 9443, line).await;
        assert_ne!(code, 0, "{client} trusts another sandbox's authority: {text}");
    }
    let bundle = "/etc/ssl/certs/ca-certificates.crt";
    let (_, count) = sh(&world, &spec, 0, &format!("grep -c BEGIN {bundle}")).await;
    assert!(
        count.trim().parse::<u32>().unwrap() > 50,
        "the image's authorities are gone: {count}"
    );
    let (code, _) = sh(&world, &spec, 0, &format!("echo x >> {bundle}")).await;
    assert_ne!(code, 0, "the bundle can be changed from inside");
    world.backend.destroy(&spec.sandbox_id).await.unwrap();
}
