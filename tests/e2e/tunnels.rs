//! Tunnels: a sandbox's port as a URL, from its creation to its end.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use harness::{
    node::{Node, Process},
    sandbox::Sandbox,
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::machine::Machine;

/// Longest wait for what happens within a second on a machine that has nothing else to do.
const SOON: Duration = Duration::from_secs(60);
/// The listener of all tunnels.
const SHARED: &str = "127.0.0.1:8081";
const HELLO: &str = "hello from the sandbox\n";

/// A sandbox that serves.
#[track_caller]
fn serving(machine: &Machine) -> Sandbox {
    let sandbox = machine.organization.sandbox(&json!({}));
    sandbox.write("/workspace/app.py", include_str!("tunnels/app.py"));
    sandbox.background("exec python3 /workspace/app.py", |sandbox| {
        let probe =
            "import socket; [socket.create_connection((\"127.0.0.1\", port)) for port in (3000, 5432)]";
        sandbox.sh(&format!("python3 -c '{probe}'")).exit_code == 0
    });
    sandbox
}

#[track_caller]
fn open(sandbox: &Sandbox, body: &Value) -> Value {
    let call = sandbox.client().post(&sandbox.path("/tunnels")).json(body);
    let tunnel = call.send().ok();
    assert_eq!(tunnel["sandbox_id"], sandbox.id.as_str(), "{tunnel}");
    tunnel
}

#[track_caller]
fn close(sandbox: &Sandbox, tunnel: &Value) {
    let path = format!("/tunnels/{}", text(tunnel, "tunnel_id"));
    let answer = sandbox.client().delete(&path).send().ok();
    assert_eq!(answer["success"], true, "{answer}");
}

#[track_caller]
fn listed(sandbox: &Sandbox) -> Vec<Value> {
    let list = sandbox.client().get(&sandbox.path("/tunnels")).send().ok();
    list["tunnels"]
        .as_array()
        .unwrap_or_else(|| panic!("no list in {list}"))
        .clone()
}

#[track_caller]
fn text<'a>(tunnel: &'a Value, field: &str) -> &'a str {
    tunnel[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field} in {tunnel}"))
}

/// The address in a URL.
#[track_caller]
fn address(tunnel: &Value) -> SocketAddr {
    let url = text(tunnel, "url");
    let (_, rest) = url.split_once("://").expect("a URL");
    rest.trim_end_matches('/').parse().expect("an address")
}

/// Status and everything else of what curl was answered on the node.
#[track_caller]
fn curl(machine: &Machine, arguments: &[&str]) -> (u16, String) {
    let all = [&["-sS", "-i", "--max-time", "60"], arguments].concat();
    let output = machine.world.node().command("curl", &all).expect("an answer");
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer = answer
        .trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n")
        .to_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status in {answer}")), answer)
}

#[track_caller]
fn connect(machine: &Machine, to: SocketAddr) -> TcpStream {
    let stream = machine.world.node().run(move || TcpStream::connect(to));
    let stream = stream.expect("connected");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream
}

/// Reads until `end` has come.
#[track_caller]
fn read_until(stream: &mut TcpStream, end: &[u8]) -> String {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    while !all.windows(end.len()).any(|part| part == end) {
        let length = stream.read(&mut chunk).expect("more");
        assert!(length > 0, "it ended: {:?}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&chunk[..length]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// A WebSocket through a tunnel, agreed upon and alive.
#[track_caller]
fn websocket(machine: &Machine, tunnel: &Value) -> TcpStream {
    let mut stream = connect(machine, address(tunnel));
    let token = tunnel["token"].as_str().unwrap_or("none");
    let request = format!(
        "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Tunnel-Token: {token}\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("written");
    let head = read_until(&mut stream, b"\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 101 ") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "{head}"
    );
    ping(&mut stream);
    stream
}

/// One masked frame there and one back (RFC 6455 5.7, with a mask of zeros).
#[track_caller]
fn ping(stream: &mut TcpStream) {
    stream.write_all(b"\x81\x84\0\0\0\0ping").expect("written");
    let mut echo = [0; 6];
    stream.read_exact(&mut echo).expect("an echo");
    assert_eq!(&echo, b"\x81\x04ping");
}

/// The connection ends.
#[track_caller]
fn assert_cut(mut stream: TcpStream) {
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let began = Instant::now();
    let mut chunk = [0; 65536];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return,
            Ok(_) => assert!(began.elapsed() < SOON, "it goes on"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("it is still open: {error}"),
        }
    }
}

fn tunnel_proxy(node: &Node) -> Option<Process> {
    node.processes()
        .into_iter()
        .find(|process| process.is("tunnel-proxy", None))
}

fn signal(process: &Process, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(process.pid).expect("a pid"));
    kill(pid, signal).expect("it runs");
}

pub(crate) fn tunnels_are_opened_listed_and_closed(machine: &Machine) {
    let sandbox = serving(machine);
    let private = open(
        &sandbox,
        &json!({ "port": 3000, "protocol": "http", "expiresIn": 600 }),
    );
    let public = open(
        &sandbox,
        &json!({ "port": 3000, "expires_in": 600, "public": true }),
    );
    assert!(text(&private, "token").len() >= 32, "{private}");
    assert_eq!(public.get("token"), None);
    assert_eq!(
        (&private["port"], &private["protocol"]),
        (&json!(3000), &json!("http"))
    );
    for tunnel in [&private, &public] {
        assert!(text(tunnel, "expires_at") > "2026");
        assert!(address(tunnel).ip().is_loopback());
    }
    assert_ne!(address(&private), address(&public));
    let list = listed(&sandbox);
    assert_eq!(list.len(), 2, "{list:?}");
    assert!(
        list.iter().all(|tunnel| tunnel.get("token").is_none()),
        "{list:?}"
    );
    assert_eq!(curl(machine, &[text(&public, "url")]).0, 200);

    close(&sandbox, &public);
    let longer = sandbox.path(&format!("/tunnels/{}", text(&private, "tunnel_id")));
    sandbox.client().delete(&longer).send().ok();
    assert!(listed(&sandbox).is_empty());
    assert_eq!(sandbox.client().delete(&longer).send().status, 404);
    for tunnel in [&private, &public] {
        let to = address(tunnel);
        let refused = wait::within(SOON, || {
            machine
                .world
                .node()
                .run(move || TcpStream::connect(to))
                .is_err()
                .then_some(())
        });
        assert!(refused.is_some(), "{to} is still listened on");
        assert_eq!(curl(machine, &[text(tunnel, "host_url")]).0, 404);
    }
    sandbox.stop();
}

pub(crate) fn a_private_tunnel_opens_to_its_token_which_the_program_never_sees(machine: &Machine) {
    let sandbox = serving(machine);
    let tunnel = open(&sandbox, &json!({ "port": 3000 }));
    let token = text(&tunnel, "token");
    let (bearer, own) = (
        format!("Authorization: Bearer {token}"),
        format!("X-Tunnel-Token: {token}"),
    );
    for url in [text(&tunnel, "url"), text(&tunnel, "host_url")] {
        let (status, answer) = curl(machine, &[url]);
        assert_eq!(status, 401, "{answer}");
        assert!(
            answer.contains("www-authenticate: Bearer") && answer.contains("no-store"),
            "{answer}"
        );
        assert_eq!(curl(machine, &["-H", "X-Tunnel-Token: wrong", url]).0, 403);
        assert_eq!(curl(machine, &["-H", "Accept: text/html", url]).0, 401);
        for header in [&bearer, &own] {
            let (status, answer) = curl(machine, &["-H", header, url]);
            assert_eq!(status, 200, "{answer}");
            assert!(answer.ends_with(HELLO), "{answer}");
            assert!(
                answer.contains("set-cookie: narrow=1") && !answer.contains("wide=1"),
                "{answer}"
            );
        }
    }
    let forged = [
        "-H",
        &own,
        "-H",
        "X-Forwarded-For: 192.0.2.1",
        "-H",
        "X-Sandgate-User: root",
    ];
    let mine = ["-H", "Authorization: Bearer mine", text(&tunnel, "url")];
    assert_eq!(curl(machine, &[&forged[..], &mine].concat()).0, 200);

    let heard = String::from_utf8(sandbox.read("/workspace/heard.log")).expect("text");
    assert!(heard.contains("Authorization: Bearer mine") || heard.contains("authorization: Bearer mine"));
    assert!(
        heard.to_lowercase().contains("x-forwarded-for: 127.0.0.1"),
        "{heard}"
    );
    for unseen in [token, "192.0.2.1", "X-Sandgate-User", "x-sandgate-user"] {
        assert!(!heard.contains(unseen), "{unseen} in {heard}");
    }
    let logged = machine.node.log_lines().join("\n");
    assert!(!logged.contains(token), "the token is in the log");
    assert!(logged.contains(text(&tunnel, "tunnel_id")), "no access record");
    sandbox.stop();
}

pub(crate) fn every_protocol_passes(machine: &Machine) {
    let sandbox = serving(machine);
    let site = open(&sandbox, &json!({ "port": 3000, "public": true }));
    let url = text(&site, "url");

    let (status, answer) = curl(machine, &["--http2-prior-knowledge", url]);
    assert_eq!(status, 200, "{answer}");
    assert!(
        answer.starts_with("HTTP/2 ") && answer.ends_with(HELLO),
        "{answer}"
    );

    // A body of 20 MB, sent at once and when it is asked for.
    let file = machine.world.directory().join("body");
    std::fs::write(&file, vec![7; 20_000_000]).expect("written");
    let data = format!("@{}", file.display());
    for expecting in ["Expect:", "Expect: 100-continue"] {
        let (status, answer) = curl(machine, &["-H", expecting, "--data-binary", &data, url]);
        assert_eq!(status, 200, "{answer}");
        assert!(answer.ends_with(&digest_of_sevens()), "{answer}");
    }

    let mut socket = websocket(machine, &site);
    for _ in 0..10 {
        ping(&mut socket);
    }

    let mut events = connect(machine, address(&site));
    let began = Instant::now();
    events
        .write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        .expect("written");
    read_until(&mut events, b"data: 0\n\n");
    read_until(&mut events, b"data: 5\n\n");
    assert!(began.elapsed() > Duration::from_millis(300), "they came at once");

    let bytes = open(
        &sandbox,
        &json!({ "port": 5432, "protocol": "tcp", "public": true }),
    );
    assert!(text(&bytes, "url").starts_with("tcp://127.0.0.1:"), "{bytes}");
    let mut raw = connect(machine, address(&bytes));
    raw.write_all(b"\0\x01anything\r\n\r\n").expect("written");
    read_until(&mut raw, b"\0\x01anything\r\n\r\n");
    raw.shutdown(std::net::Shutdown::Write).expect("half closed");
    let mut rest = String::new();
    raw.read_to_string(&mut rest).expect("the rest");
    assert_eq!(rest, "goodbye");

    let private = open(&sandbox, &json!({ "port": 5432, "protocol": "tcp" }));
    for (token, expected) in [("wrong", "403"), (text(&private, "token"), "200")] {
        let mut raw = connect(machine, address(&private));
        let request =
            format!("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\nX-Tunnel-Token: {token}\r\n\r\nping");
        raw.write_all(request.as_bytes()).expect("written");
        let head = read_until(&mut raw, b"\r\n\r\n");
        assert!(head.starts_with(&format!("HTTP/1.1 {expected} ")), "{head}");
        if expected == "200" && !head.ends_with("ping") {
            read_until(&mut raw, b"ping");
        }
    }
    sandbox.stop();
}

fn digest_of_sevens() -> String {
    use std::fmt::Write as _;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &vec![7; 20_000_000]);
    digest.as_ref().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}

pub(crate) fn grpc_passes_with_its_trailers(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    sandbox.write("/workspace/grpc.js", include_str!("tunnels/grpc.js"));
    let probe = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 50051))'";
    sandbox.background("exec node /workspace/grpc.js", |sandbox| {
        sandbox.sh(probe).exit_code == 0
    });
    let tunnel = open(&sandbox, &json!({ "port": 50051, "protocol": "h2c" }));
    let token = format!("X-Tunnel-Token: {}", text(&tunnel, "token"));
    for url in [text(&tunnel, "url"), text(&tunnel, "host_url")] {
        let arguments = [
            "--http2-prior-knowledge",
            "-H",
            "TE: trailers",
            "-H",
            &token,
            "-d",
            "message",
            url,
        ];
        let (status, answer) = curl(machine, &arguments);
        assert_eq!(status, 200, "{answer}");
        assert!(
            answer.contains("message") && answer.contains("grpc-status: 0"),
            "{answer}"
        );
        let authority = url.trim_start_matches("http://").trim_end_matches('/');
        assert!(answer.contains(&format!("x-authority: {authority}")), "{answer}");
    }
    sandbox.stop();
}

pub(crate) fn closing_cuts_what_is_open(machine: &Machine) {
    let sandbox = serving(machine);
    let site = open(&sandbox, &json!({ "port": 3000, "public": true }));
    let other = open(&sandbox, &json!({ "port": 3000, "public": true }));
    let bytes = open(
        &sandbox,
        &json!({ "port": 5432, "protocol": "tcp", "public": true }),
    );
    let socket = websocket(machine, &site);
    let mut kept = websocket(machine, &other);
    let mut events = connect(machine, address(&site));
    events
        .write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        .expect("written");
    read_until(&mut events, b"data: 1\n\n");
    let mut raw = connect(machine, address(&bytes));
    raw.write_all(b"ping").expect("written");
    read_until(&mut raw, b"ping");

    close(&sandbox, &site);
    assert_cut(socket);
    assert_cut(events);
    close(&sandbox, &bytes);
    assert_cut(raw);
    ping(&mut kept);
    // The end of the sandbox is the end of its tunnels.
    sandbox.stop();
    assert_cut(kept);
    let gone = wait::within(SOON, || {
        (curl(machine, &[text(&other, "host_url")]).0 == 404).then_some(())
    });
    assert!(gone.is_some(), "a stopped sandbox has tunnels");
}

pub(crate) fn an_expired_tunnel_is_cut_and_says_so(machine: &Machine) {
    let sandbox = serving(machine);
    let tunnel = open(
        &sandbox,
        &json!({ "port": 3000, "expires_in": 8, "public": true }),
    );
    assert_cut(websocket(machine, &tunnel));
    for url in [text(&tunnel, "url"), text(&tunnel, "host_url")] {
        let (status, answer) = curl(machine, &[url]);
        assert_eq!(status, 410, "{answer}");
        assert!(answer.contains("TUNNEL_EXPIRED"), "{answer}");
    }
    assert!(listed(&sandbox).is_empty());
    sandbox.stop();
}

pub(crate) fn a_tunnel_leads_to_its_port_and_nowhere_else(machine: &Machine) {
    let sandbox = serving(machine);
    let other = serving(machine);
    let tunnel = open(&sandbox, &json!({ "port": 3000, "public": true }));
    let host = |sandbox: &Sandbox, port: u16| format!("http://{port}-{}.localhost:8081/", sandbox.id);
    assert_eq!(curl(machine, &[&host(&sandbox, 3000)]).0, 200);
    // Ports that nobody opened, of this sandbox and of another.
    for url in [
        host(&sandbox, 5432),
        host(&other, 3000),
        format!("http://{SHARED}/"),
    ] {
        assert_eq!(curl(machine, &[&url]).0, 404, "{url}");
    }
    // The port of the agent that runs in the sandbox, whatever protocol.
    let agent = sandbox.sh_ok("cat /proc/net/tcp | awk 'NR > 1 && $4 == \"0A\" {print $2}' | cut -d: -f2");
    let ports: Vec<u16> = agent
        .lines()
        .map(|port| u16::from_str_radix(port, 16).expect("a port"))
        .filter(|port| ![3000, 5432].contains(port))
        .collect();
    assert_eq!(ports.len(), 1, "the agent's port: {agent}");
    for (body, field) in [
        (json!({ "port": ports[0] }), "port"),
        (
            json!({ "port": ports[0], "protocol": "tcp", "public": true }),
            "port",
        ),
        (json!({ "port": 0 }), "port"),
        (json!({ "port": 65536 }), "port"),
        (json!({}), "port"),
        (json!({ "port": 80, "protocol": "udp" }), "protocol"),
        (json!({ "port": 80, "expires_in": 0 }), "expires_in"),
    ] {
        let answer = sandbox
            .client()
            .post(&sandbox.path("/tunnels"))
            .json(&body)
            .send();
        assert_eq!(answer.status, 400, "{body}");
        let error: Value = serde_json::from_slice(&answer.body).expect("JSON");
        assert_eq!(error["error"]["details"]["field"], field, "{body}: {error}");
    }
    // Nothing listens there.
    let empty = open(&sandbox, &json!({ "port": 3001, "public": true }));
    let (status, answer) = curl(machine, &[text(&empty, "url")]);
    assert_eq!(status, 502, "{answer}");
    assert!(answer.contains("PORT_NOT_LISTENING"), "{answer}");
    // One organisation's tunnels are not another's.
    let stranger = machine.node.register("tunnel-stranger");
    let path = format!("/tunnels/{}", text(&tunnel, "tunnel_id"));
    assert_eq!(stranger.client.delete(&path).send().status, 404);
    assert_eq!(stranger.client.get(&sandbox.path("/tunnels")).send().status, 404);
    let opened = stranger
        .client
        .post(&sandbox.path("/tunnels"))
        .json(&json!({ "port": 3000 }))
        .send();
    assert_eq!(opened.status, 404);
    sandbox.stop();
    other.stop();
}

pub(crate) fn tunnel_proxy_may_nothing(machine: &Machine) {
    let proxy = tunnel_proxy(&machine.node).expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid)).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {status}"))
            .trim_start_matches(':')
            .trim()
            .to_owned()
    };
    for name in ["Uid", "Gid"] {
        let ids = field(name);
        assert!(ids.split_whitespace().all(|id| id != "0"), "{name}: {ids}");
    }
    assert_eq!(field("Groups"), "");
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(name), "0000000000000000", "{name}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    let environment = std::fs::read(format!("/proc/{}/environ", proxy.pid)).expect("its environment");
    let environment = String::from_utf8_lossy(&environment);
    assert!(!environment.contains("SANDGATE_KEY") && !environment.contains("DATABASE_URL"));
}

pub(crate) fn a_killed_tunnel_proxy_loses_no_waiting_connection(machine: &Machine) {
    let sandbox = serving(machine);
    let tunnel = open(&sandbox, &json!({ "port": 3000 }));
    let token = text(&tunnel, "token").to_owned();
    let host = format!("3000-{}.localhost", sandbox.id);
    // The successor has only what its predecessor left: the controller says nothing meanwhile.
    let controller = machine.node.controller().expect("it runs");
    signal(&controller, Signal::SIGSTOP);
    let proxy = tunnel_proxy(&machine.node).expect("it runs");
    signal(&proxy, Signal::SIGSTOP);
    let shared: SocketAddr = SHARED.parse().expect("an address");
    let mut waiting = Vec::new();
    for number in 0..40 {
        let to = if number % 2 == 0 { shared } else { address(&tunnel) };
        let mut stream = connect(machine, to);
        let request = format!(
            "GET /{number} HTTP/1.1\r\nHost: {host}\r\nX-Tunnel-Token: {token}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).expect("written");
        waiting.push(stream);
    }
    machine.node.kill(&proxy).expect("it runs");
    let mut answers = Vec::new();
    for mut stream in waiting {
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        answers.push((read.is_ok(), answer));
    }
    signal(&controller, Signal::SIGCONT);
    for (number, (whole, answer)) in answers.iter().enumerate() {
        assert!(
            *whole && answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(HELLO),
            "connection {number}: {answer:?}"
        );
    }
    let next = tunnel_proxy(&machine.node).expect("it runs");
    assert_ne!(next.pid, proxy.pid);
    // What held holds: the token, the port, and that a tunnel can be closed.
    assert_eq!(curl(machine, &[text(&tunnel, "url")]).0, 401);
    assert_eq!(listed(&sandbox)[0]["url"], tunnel["url"]);
    machine.node.wait_ready();
    let second = open(&sandbox, &json!({ "port": 3000, "public": true }));
    assert_eq!(curl(machine, &[text(&second, "url")]).0, 200);
    close(&sandbox, &tunnel);
    assert_eq!(
        curl(machine, &[text(&tunnel, "host_url")]).0,
        200,
        "the second one's host"
    );
    sandbox.stop();
}

pub(crate) fn tunnels_survive_netd_and_the_controller(machine: &Machine) {
    let sandbox = serving(machine);
    let tunnel = open(&sandbox, &json!({ "port": 3000, "public": true }));
    let url = text(&tunnel, "url");
    let mut socket = websocket(machine, &tunnel);
    machine.node.replace(Node::controller);
    ping(&mut socket);
    assert_eq!(curl(machine, &[url]).0, 200);
    machine.node.replace(Node::netd);
    let served = wait::within(SOON, || {
        let (status, answer) = curl(machine, &[url]);
        assert!([200, 404, 502, 503, 504].contains(&status), "{answer}");
        (status == 200).then_some(())
    });
    assert!(served.is_some(), "the tunnel does not come back");
    machine.node.wait_ready();
    assert_eq!(listed(&sandbox).len(), 1);
    sandbox.stop();
}

pub(crate) fn tunnel_proxy_shows_numbers(machine: &Machine) {
    let sandbox = serving(machine);
    let tunnel = open(&sandbox, &json!({ "port": 3000, "public": true }));
    assert_eq!(curl(machine, &[text(&tunnel, "url")]).0, 200);
    let (status, numbers) = curl(machine, &["http://127.0.0.1:9466/metrics"]);
    assert_eq!(status, 200);
    for name in [
        r#"sandgate_tunnel_requests_total{protocol="http/1",outcome="served",code="2xx"}"#,
        "sandgate_tunnel_dial_seconds_count",
        "sandgate_tunnel_connections",
    ] {
        assert!(numbers.contains(name), "{name} is missing in\n{numbers}");
    }
    assert!(!numbers.contains(&sandbox.id), "a number names a sandbox");
    sandbox.stop();
}
