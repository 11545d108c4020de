//! The way in: only connections that netd opened, each by its four-tuple; and never from one sandbox to another.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use socket2::{Domain, Socket, Type};

use crate::{
    sockets::{at, connect},
    world::{Sandbox, World, open_table, privileged},
};

pub(crate) const AGENT: u16 = 7000;

/// A service inside that greets; answers on any number of connections.
pub(crate) fn greet(sandbox: &Sandbox, port: u16) {
    let listener = sandbox.run(|| TcpListener::bind(("0.0.0.0", port)).expect("listening"));
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _client_gone = stream.write_all(b"hello");
        }
    });
}

/// A socket as netd opens connections inward with: bound first, so that its four-tuple is known before it connects.
fn bound(world: &World) -> (Socket, SocketAddrV4) {
    world
        .datapath
        .router()
        .run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.bind(&at([169, 254, 1, 1], 0).into()).expect("bound");
            let local = socket
                .local_addr()
                .expect("an address")
                .as_socket_ipv4()
                .expect("IPv4");
            (socket, local)
        })
        .expect("router")
}

fn hear(socket: Socket, to: Ipv4Addr) -> io::Result<String> {
    socket.connect_timeout(&SocketAddrV4::new(to, AGENT).into(), Duration::from_secs(2))?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    Ok(heard)
}

#[test]
fn netd_reaches_a_sandbox_only_where_it_admitted_itself() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    greet(sandbox, AGENT);
    let datapath = &world.datapath;

    let (socket, _) = bound(&world);
    let error = hear(socket, sandbox.address()).expect_err("not admitted");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    assert!(datapath.counters().expect("counters").unadmitted > 0);

    let (socket, local) = bound(&world);
    let cookie = socket.cookie().expect("a cookie");
    datapath
        .admit_inbound(handle, AGENT, local, cookie)
        .expect("admitted");
    assert_eq!(hear(socket, sandbox.address()).expect("heard"), "hello");
    datapath.revoke_inbound(handle, AGENT, local).expect("revoked");

    // Admitted for one port, used for another.
    let (socket, local) = bound(&world);
    datapath
        .admit_inbound(handle, AGENT + 1, local, socket.cookie().expect("a cookie"))
        .expect("admitted");
    assert!(hear(socket, sandbox.address()).is_err());
    assert_eq!(datapath.counters().expect("counters").dropped, 0);
}

#[test]
fn one_sandbox_cannot_reach_another() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let [(one, one_handle), (two, two_handle)] = &world.sandboxes[..] else {
        panic!("two sandboxes");
    };
    greet(two, AGENT);
    let datapath = &world.datapath;
    for handle in [one_handle, two_handle] {
        datapath.set_policy(*handle, &open_table()).expect("a policy");
        // Not even an address that DNS handed out opens it.
        datapath
            .bind_address(*handle, two.address().into())
            .expect("bound");
    }
    for port in [AGENT, 22, 443, 15001] {
        let (result, _) = one.run(|| connect(at(two.address().octets(), port)));
        assert_eq!(
            result.expect_err("refused").kind(),
            io::ErrorKind::ConnectionRefused,
            "{port}"
        );
    }
    let received = two.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").expect("counters"));
    let of_eth0 = received
        .lines()
        .find(|line| line.trim_start().starts_with("eth0:"))
        .expect("eth0");
    let packets = of_eth0.split_whitespace().nth(2).expect("received packets");
    assert_eq!(packets, "0", "{of_eth0}");
}
