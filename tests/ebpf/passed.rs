//! What somebody can do with a socket of the router namespace that netd has passed on: nothing but speak on the one
//! connection that it was passed on for. The holder here has no privileges, as tunnel-proxy has none.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use netd::kernel::EndpointHandle;
use rustix::{net::connect_unspec, process::Uid, thread::set_thread_res_uid};
use socket2::{Domain, Socket, Type};

use crate::{
    sockets::{Listeners, SOON, ask, at, connect},
    world::{Sandbox, World, open_table, privileged},
};

const AGENT: u16 = 7000;
const TUNNEL: u16 = 3000;
const GATEWAY: [u8; 4] = [169, 254, 1, 1];
const PATIENCE: Duration = Duration::from_millis(500);

/// A service inside whose connections are kept and handed to the test.
fn serve(sandbox: &Sandbox, port: u16) -> mpsc::Receiver<TcpStream> {
    let listener = sandbox.run(|| TcpListener::bind(("0.0.0.0", port)).expect("listening"));
    let (sender, streams) = mpsc::channel();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if sender.send(stream).is_err() {
                return;
            }
        }
    });
    streams
}

/// Connected as netd does it, up to the moment when it would pass the descriptor on.
fn open(world: &World, handle: EndpointHandle, to: SocketAddrV4) -> (Socket, SocketAddrV4) {
    let (socket, local) = world
        .datapath
        .router()
        .run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.bind(&at(GATEWAY, 0).into()).expect("bound");
            let local = socket.local_addr().expect("an address").as_socket_ipv4();
            (socket, local.expect("IPv4"))
        })
        .expect("router");
    let cookie = socket.cookie().expect("a cookie");
    world
        .datapath
        .admit_inbound(handle, to.port(), local, cookie)
        .expect("admitted");
    socket.connect_timeout(&to.into(), SOON).expect("connected");
    (socket, local)
}

/// Runs on a thread that has given its privileges up.
fn unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let nobody = Uid::from_raw(60_742);
                set_thread_res_uid(nobody, nobody, nobody).expect("unprivileged");
                work()
            })
            .join()
            .expect("it ends")
    })
}

fn reaches(socket: &Socket, to: SocketAddrV4) -> io::Result<()> {
    connect_unspec(socket)?;
    socket.connect_timeout(&to.into(), PATIENCE)
}

#[test]
fn disconnected_it_reaches_nothing_else() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let [(one, one_handle), (two, _)] = &world.sandboxes[..] else {
        panic!("two sandboxes");
    };
    let services = [
        serve(one, TUNNEL),
        serve(one, AGENT),
        serve(two, TUNNEL),
        serve(two, AGENT),
    ];
    let to = |sandbox: &Sandbox, port| SocketAddrV4::new(sandbox.address(), port);
    let _netd = Listeners::serve(&world.datapath);
    let (socket, local) = open(&world, *one_handle, to(one, TUNNEL));
    services[0].recv_timeout(SOON).expect("the connection itself");

    let loopback = [127, 0, 0, 1];
    unprivileged(|| {
        for place in [
            to(one, AGENT),
            to(one, TUNNEL + 1),
            to(two, TUNNEL),
            to(two, AGENT),
            at(loopback, 15_001),
            at(GATEWAY, 15_001),
            at(loopback, 15_053),
            at([198, 51, 100, 1], 443),
        ] {
            reaches(&socket, place).expect_err(&place.to_string());
        }
        // From the port that was admitted, too, which is not its own any more.
        connect_unspec(&socket).expect("disconnected");
        socket.bind(&local.into()).expect("its port is free");
        reaches(&socket, to(two, TUNNEL)).expect_err("another sandbox");
    });
    for service in &services[1..] {
        service.try_recv().expect_err("nobody came");
    }
}

#[test]
fn what_another_connection_left_admitted_is_not_for_it() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let (tunnel, agent) = (serve(sandbox, TUNNEL), serve(sandbox, AGENT));
    // The controller's connection has ended, and netd has not looked yet.
    let (ended, left) = open(&world, handle, SocketAddrV4::new(sandbox.address(), AGENT));
    drop(agent.recv_timeout(SOON).expect("the controller"));
    drop(ended);
    thread::sleep(Duration::from_millis(50));

    let (socket, _) = open(&world, handle, SocketAddrV4::new(sandbox.address(), TUNNEL));
    tunnel.recv_timeout(SOON).expect("the connection itself");
    unprivileged(|| {
        connect_unspec(&socket).expect("disconnected");
        socket.bind(&left.into()).expect("the port is free");
        let to = SocketAddrV4::new(sandbox.address(), AGENT);
        socket
            .connect_timeout(&to.into(), PATIENCE)
            .expect_err("another socket was admitted");
    });
    agent.try_recv().expect_err("nobody came");
}

#[test]
fn it_does_not_become_a_listener_that_hears_a_sandbox() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let tunnel = serve(sandbox, TUNNEL);
    world
        .datapath
        .set_policy(handle, &open_table())
        .expect("a policy");
    let netd = Listeners::serve(&world.datapath);
    let mut held = Vec::new();
    for _ in 0..3 {
        let (socket, local) = open(&world, handle, SocketAddrV4::new(sandbox.address(), TUNNEL));
        tunnel.recv_timeout(SOON).expect("the connection itself");
        connect_unspec(&socket).expect("disconnected");
        held.push((socket, local));
    }
    let everywhere = at([0, 0, 0, 0], 40_443);
    unprivileged(|| {
        for (low, socket) in [
            (at(GATEWAY, 53), 0),
            (at([127, 0, 0, 1], 15_001), 1),
            (at(GATEWAY, 8443), 2),
        ] {
            let error = held[socket]
                .0
                .bind(&low.into())
                .expect_err("a port below the kernel's own");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{low}: {error}");
        }
        let own = held[0].1;
        held[0].0.bind(&own.into()).expect("its own port");
        held[1].0.bind(&everywhere.into()).expect("every address");
        // An address that is not of the namespace.
        held[2].0.set_freebind_v4(true).expect("free");
        let foreign = at([198, 51, 100, 7], 40_444);
        held[2].0.bind(&foreign.into()).expect("bound");
        for (socket, _) in &held {
            socket.listen(16).expect("listening");
            socket.set_nonblocking(true).expect("non-blocking");
        }
    });
    let own = held[0].1;
    let places = [
        own,
        at([198, 51, 100, 7], 40_443),
        at([198, 51, 100, 7], 40_444),
        at(GATEWAY, 40_443),
    ];
    let hears_nobody = |when: &str| {
        for (socket, local) in &held {
            let error = socket.accept().expect_err(&format!("{local} {when}"));
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{local} {when}");
        }
    };
    for place in places {
        let heard = sandbox.run(|| ask(place));
        let from_netd = heard.as_ref().is_ok_and(|text| *text == format!("tcp {place}"));
        assert!(from_netd || heard.is_err(), "{place}: {heard:?}");
    }
    // From the port that was admitted, toward the port that it was admitted for.
    let from_admitted = sandbox.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("reuse");
        socket.set_reuse_port(true).expect("reuse");
        let from = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, TUNNEL);
        let bound = socket.bind(&from.into());
        bound.and_then(|()| socket.connect_timeout(&own.into(), PATIENCE))
    });
    from_admitted.expect_err("it may not open one");
    hears_nobody("while netd serves");
    netd.close();
    for place in places {
        assert!(sandbox.run(|| connect(place).0).is_err(), "{place}");
    }
    hears_nobody("while netd is away");
}

#[test]
fn when_its_port_is_taken_away_nothing_flows_and_the_holder_is_told() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let (tunnel, agent) = (serve(sandbox, TUNNEL), serve(sandbox, AGENT));
    let datapath = &world.datapath;
    let inside = |port| SocketAddrV4::new(sandbox.address(), port);
    let (closed, local) = open(&world, handle, inside(TUNNEL));
    let (kept, _) = open(&world, handle, inside(AGENT));
    let (mut closed, mut kept) = (TcpStream::from(closed), TcpStream::from(kept));
    let mut within = tunnel.recv_timeout(SOON).expect("the tunnel's connection");
    let mut with_agent = agent.recv_timeout(SOON).expect("the agent's connection");
    let mut text = [0; 5];
    closed.write_all(b"hello").expect("written");
    within.read_exact(&mut text).expect("read");

    let gone = datapath
        .revoke_inbound_ports(handle, |port| port == AGENT)
        .expect("revoked");
    assert_eq!(gone, [(TUNNEL, local)]);
    within.set_read_timeout(Some(PATIENCE)).expect("a limit");
    closed.set_read_timeout(Some(PATIENCE)).expect("a limit");
    closed.write_all(b"more!").expect("into the socket's buffer");
    assert!(within.read(&mut text).is_err(), "nothing arrives inside");
    let _refused = within.write_all(b"back!");
    assert!(closed.read(&mut text).is_err(), "nothing comes out");

    netd::sockets::destroy(datapath.router(), &[(local, inside(TUNNEL))]).expect("destroyed");
    let error = closed.write_all(b"again").expect_err("ended");
    assert!(
        matches!(
            error.kind(),
            io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe
        ),
        "{error}"
    );
    kept.write_all(b"agent").expect("written");
    with_agent.read_exact(&mut text).expect("the agent's goes on");
    assert_eq!(&text, b"agent");
}
