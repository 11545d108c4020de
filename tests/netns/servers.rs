//! The servers of the test internet: they answer, and they remember.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, UdpSocket},
    sync::Arc,
};

use harness::{
    dns::Answer,
    wait,
    world::{EVIL, OK, OTHER_RESOLVER, RESOLVER, World},
};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::pem::PemObject as _};

use super::{PATIENCE, connect_from_node, world};

fn ask(world: &World, server: Ipv4Addr, name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(
        Name::from_ascii(format!("{name}.")).expect("a name"),
        kind,
    ));
    let bytes = query.to_vec().expect("it encodes");
    let answer = world.node().run(move || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(&bytes, (server, 53))?;
        let mut buffer = vec![0; 4096];
        let length = socket.recv(&mut buffer)?;
        buffer.truncate(length);
        std::io::Result::Ok(buffer)
    });
    Message::from_vec(&answer.expect("the server answers")).expect("it decodes")
}

fn addresses(answer: &Message) -> Vec<Ipv4Addr> {
    let data = answer.answers.iter().map(|record| &record.data);
    data.filter_map(|data| {
        if let RData::A(address) = data {
            Some(address.0)
        } else {
            None
        }
    })
    .collect()
}

#[test]
fn names_resolve_and_every_query_is_remembered() {
    let Some(world) = world() else { return };
    assert_eq!(addresses(&ask(&world, RESOLVER, "ok.test", RecordType::A)), [OK]);
    assert_eq!(
        addresses(&ask(&world, OTHER_RESOLVER, "data.x.evil.test", RecordType::A)),
        [EVIL]
    );
    let chain = ask(&world, RESOLVER, "alias.test", RecordType::A);
    assert_eq!((chain.answers.len(), addresses(&chain)), (3, vec![OK]));
    let missing = ask(&world, RESOLVER, "missing.test", RecordType::A);
    assert_eq!(missing.metadata.response_code, ResponseCode::NXDomain);
    assert!(
        ask(&world, RESOLVER, "many.test", RecordType::A)
            .metadata
            .truncation,
        "60 addresses do not fit"
    );
    let asked: Vec<_> = world
        .dns
        .queries_for("evil.test")
        .into_iter()
        .map(|query| (query.server.ip(), query.name))
        .collect();
    assert_eq!(asked, [(OTHER_RESOLVER.into(), "data.x.evil.test".to_owned())]);
    world.dns.set("missing.test", Answer::Addresses(vec![OK.into()]));
    assert_eq!(
        addresses(&ask(&world, RESOLVER, "missing.test", RecordType::A)),
        [OK]
    );
}

#[test]
fn a_tls_server_proves_its_name_by_the_worlds_ca_and_remembers_the_sni() {
    let Some(world) = world() else { return };
    let mut roots = RootCertStore::empty();
    let certificate =
        rustls::pki_types::CertificateDer::from_pem_slice(world.ca.pem().as_bytes()).expect("PEM");
    roots.add(certificate).expect("a CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions");
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let visit = |name: &'static str| {
        let client =
            ClientConnection::new(Arc::clone(&config), name.try_into().expect("a name")).expect("a client");
        let stream = connect_from_node(&world, (OK, 443)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut stream = StreamOwned::new(client, stream);
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n"
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    let text = visit("ok.test").expect("ok.test has a certificate");
    assert!(text.contains("hello from ok.test at 203.0.113.10"), "{text}");
    visit("evil.test").expect_err("this server has no certificate for evil.test");
    wait::until("both are over", PATIENCE, || {
        world.web.visits().iter().all(|visit| visit.closed).then_some(())
    });
    let seen: Vec<_> = world
        .web
        .visits()
        .into_iter()
        .map(|visit| (visit.sni.expect("SNI"), visit.requests))
        .collect();
    let expected = [
        ("ok.test", vec!["GET ok.test /".to_owned()]),
        ("evil.test", vec![]),
    ];
    assert_eq!(seen, expected.map(|(sni, requests)| (sni.to_owned(), requests)));
}

#[test]
fn a_plain_server_answers_and_a_collector_greets() {
    let Some(world) = world() else { return };
    let mut stream = connect_from_node(&world, (OK, 80)).expect("it listens");
    stream
        .write_all(b"GET / HTTP/1.0\r\nHost: ok.test\r\n\r\n")
        .expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    assert!(text.ends_with("hello from ok.test at 203.0.113.10\n"), "{text}");
    let mut stream = connect_from_node(&world, (OK, 22)).expect("it listens");
    let mut banner = [0; 15];
    stream.read_exact(&mut banner).expect("a banner");
    assert_eq!(&banner, b"SSH-2.0-world\r\n");
}
