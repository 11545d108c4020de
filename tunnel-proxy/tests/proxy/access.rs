//! Who gets through, and what the program behind the tunnel sees of it.

use jiff::{Timestamp, ToSpan as _};
use sandgate_api::{control::DialError, tunnel::TunnelProtocol};

use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::world::{
    DialFailureKind, OK, SANDBOX, TOKEN, World, header, private, public, read_until, recorder, route, status,
};

#[tokio::test]
async fn a_private_tunnel_opens_to_its_token_alone() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    for (headers, expected) in [
        (String::new(), 401),
        ("Authorization: Bearer wrong\r\n".to_owned(), 403),
        ("X-Tunnel-Token: wrong\r\n".to_owned(), 403),
        ("Authorization: Basic dTpw\r\n".to_owned(), 401),
        (format!("Cookie: token={TOKEN}\r\n"), 401),
    ] {
        let answer = world.get(&host, &headers).await;
        assert_eq!(status(&answer), expected, "{headers}{answer}");
        assert_eq!(header(&answer, "cache-control"), Some("no-store"));
        assert_eq!(header(&answer, "www-authenticate").is_some(), expected == 401);
        assert!(header(&answer, "x-request-id").is_some());
    }
    assert!(
        heard.lock().expect("a lock").is_empty(),
        "something reached the program"
    );
    for headers in [
        format!("Authorization: Bearer {TOKEN}\r\n"),
        format!("X-Tunnel-Token: {TOKEN}\r\nAuthorization: Bearer mine\r\n"),
    ] {
        assert_eq!(status(&world.get(&host, &headers).await), 200, "{headers}");
    }
    let heard = heard.lock().expect("a lock");
    assert_eq!(heard.len(), 2);
    assert!(heard.iter().all(|request| !request.contains(TOKEN)), "{heard:?}");
    assert_eq!(header(&heard[0], "authorization"), None);
    assert_eq!(header(&heard[1], "authorization"), Some("Bearer mine"));
}

#[tokio::test]
async fn a_browser_gets_a_page_and_a_program_gets_json() {
    let world = World::start().await;
    let host = world
        .open_as(3000, Err(DialFailureKind::Away), TunnelProtocol::Http, private())
        .await;
    let page = world
        .get(&host, "Accept: text/html,*/*;q=0.8\r\nX-Request-Id: mine-1\r\n")
        .await;
    assert_eq!(status(&page), 401);
    assert!(
        page.contains("<!doctype html>") && page.contains("mine-1"),
        "{page}"
    );
    let json = world.get(&host, "X-Request-Id: mine-2\r\n").await;
    let body = json.split("\r\n\r\n").nth(1).expect("a body");
    let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(body["error"]["code"], "UNAUTHORIZED");
    assert_eq!(body["error"]["request_id"], "mine-2");
    assert_eq!(header(&json, "x-request-id"), Some("mine-2"));
}

#[tokio::test]
async fn names_that_are_no_tunnels_are_nothing() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    world.open(3000, program).await;
    for host in [
        "localhost",
        "127.0.0.1",
        &format!("3001-{SANDBOX}.localhost"),
        "3000-sandbox-ffff.localhost",
        &format!("3000-{SANDBOX}.localhost.example.org"),
        &format!("3000-{SANDBOX}"),
    ] {
        assert_eq!(status(&world.get(host, "").await), 404, "{host}");
    }
    assert!(heard.lock().expect("a lock").is_empty());
}

#[tokio::test]
async fn every_failure_has_its_status() {
    let world = World::start().await;
    for (port, failure, expected) in [
        (1, DialFailureKind::Refused(DialError::Refused), 502),
        (2, DialFailureKind::Refused(DialError::TimedOut), 504),
        (3, DialFailureKind::Refused(DialError::UnknownSandbox), 404),
        (4, DialFailureKind::Refused(DialError::PortNotAllowed), 404),
        (5, DialFailureKind::Refused(DialError::Failed), 502),
        (6, DialFailureKind::Away, 503),
    ] {
        let host = world
            .open_as(port, Err(failure), TunnelProtocol::Http, public())
            .await;
        let answer = world.get(&host, "").await;
        assert_eq!(status(&answer), expected, "{answer}");
        assert_eq!(
            header(&answer, "retry-after").is_some(),
            expected == 503,
            "{answer}"
        );
    }
}

#[tokio::test]
async fn an_expired_tunnel_says_so() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world.open(3000, program).await;
    let mut expired = route(3000, TunnelProtocol::Http, public());
    expired.expires_at = Timestamp::now() - 1.second();
    world.upsert(expired).await;
    assert_eq!(status(&world.get(&host, "").await), 410);
    assert!(heard.lock().expect("a lock").is_empty());
    // And one that is given more time is open again.
    world.upsert(route(3000, TunnelProtocol::Http, public())).await;
    assert_eq!(status(&world.get(&host, "").await), 200);
}

#[tokio::test]
async fn two_tunnels_of_one_port_have_tokens_of_their_own() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    let mut second = route(3000, TunnelProtocol::Http, public());
    second.tunnel_id = "tunnel-second".parse().expect("an id");
    second.access = sandgate_api::tunnel::Access::Token {
        sha256: hex::encode(<sha2::Sha256 as sha2::Digest>::digest("second")),
    };
    world.upsert(second).await;
    assert_eq!(status(&world.get(&host, "X-Tunnel-Token: second\r\n").await), 200);
    assert_eq!(
        status(&world.get(&host, &format!("X-Tunnel-Token: {TOKEN}\r\n")).await),
        200
    );
    assert_eq!(status(&world.get(&host, "X-Tunnel-Token: third\r\n").await), 403);
    assert_eq!(status(&world.get(&host, "").await), 401);
    // The program gets neither, whichever of them opened, on the tunnels' own ports too.
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let own = World::own_address(&ports, 3000);
    let both = [TOKEN, "second"].map(|token| format!("Authorization: Bearer {token}\r\n"));
    let fields = format!("{}{}Authorization: Bearer mine\r\n", both[0], both[1]);
    heard.lock().expect("a lock").clear();
    assert_eq!(status(&world.get(&host, &fields).await), 200);
    let mut client = TcpStream::connect(own).await.expect("connected");
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: any.test\r\n{fields}\r\n").as_bytes())
        .await
        .expect("written");
    assert_eq!(status(&read_until(&mut client, "ok").await), 200);
    for request in heard.lock().expect("a lock").drain(..) {
        let shown: Vec<&str> = request
            .lines()
            .filter(|line| line.to_ascii_lowercase().starts_with("authorization:"))
            .collect();
        assert!(
            matches!(shown[..], [one] if one.ends_with("Bearer mine")),
            "{request}"
        );
    }
    world.close(3000).await;
    assert_eq!(status(&world.get(&host, "X-Tunnel-Token: second\r\n").await), 200);
    assert_eq!(
        status(&world.get(&host, &format!("X-Tunnel-Token: {TOKEN}\r\n")).await),
        403
    );
}

#[tokio::test]
async fn a_program_is_told_the_truth_about_the_hop_before() {
    let world = World::start().await;
    let (program, heard) = recorder(
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Sandgate-Error: FAKE\r\nAlt-Svc: h3=\":1\"\r\n\
         Set-Cookie: a=1; Domain=localhost\r\nSet-Cookie: b=2; Path=/\r\nX-Request-Id: app\r\n\r\nok",
    )
    .await;
    let host = world.open(3000, program).await;
    let answer = world
        .get(
            &host,
            "X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Proto: https\r\nForwarded: for=198.51.100.7\r\n\
             X-Sandgate-User: root\r\nX-Real-IP: 198.51.100.7\r\nX-Request-Id: mine\r\nProxy-Authorization: Basic eA==\r\n",
        )
        .await;
    let heard = heard.lock().expect("a lock");
    let request = &heard[0];
    assert!(
        !request.contains("198.51.100.7") && !request.contains("root"),
        "{request}"
    );
    for (name, value) in [
        ("x-forwarded-for", Some("127.0.0.1")),
        ("x-forwarded-proto", Some("http")),
        ("x-forwarded-host", Some(host.as_str())),
        ("host", Some(host.as_str())),
        ("x-request-id", Some("mine")),
        ("proxy-authorization", None),
    ] {
        assert_eq!(header(request, name), value, "{name}");
    }
    for (name, value) in [
        ("x-sandgate-error", None),
        ("alt-svc", None),
        ("set-cookie", Some("b=2; Path=/")),
        ("x-request-id", Some("mine")),
    ] {
        assert_eq!(header(&answer, name), value, "{name}: {answer}");
    }
}

#[tokio::test]
async fn who_is_refused_while_still_sending_learns_why() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    for _ in 0..2 {
        let mut client = world.connect().await;
        let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4000000\r\n\r\n");
        client.write_all(head.as_bytes()).await.expect("written");
        client
            .write_all(&vec![7; 4_000_000])
            .await
            .expect("taken to its end");
        assert_eq!(status(&read_until(&mut client, "}}").await), 401);
    }
    assert!(heard.lock().expect("a lock").is_empty());
}
