//! IPv6 between namespaces: refused at once, steered with its destination, dropped where it must be, by TCX links and by
//! clsact filters alike.

use std::{
    io::{ErrorKind, Read as _},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    time::Duration,
};

use netd::{
    kernel::{Attach, Datapath, DatapathConfig, DenyEvent},
    router::GATEWAY6,
    sockets,
};
use sandgate_policy::{KernelAction, Reason};

use crate::{
    lab::address6,
    sockets::answer,
    world::{
        RunDir, Sandbox, config, events_until, ip, mac_text, mac_text_of_gateway, platform, privileged, table,
    },
};

const PATIENCE: Duration = Duration::from_secs(5);

fn at(address: &str, port: u16) -> SocketAddrV6 {
    SocketAddrV6::new(address.parse().expect("an address"), port, 0, 0)
}

/// Gives a running sandbox its IPv6 address, as the controller does.
fn give_ipv6(sandbox: &Sandbox, datapath: &Datapath, address: Ipv6Addr) {
    let on = |interface: &str| {
        let setting = |name: &str| format!("/proc/sys/net/ipv6/conf/{interface}/{name}");
        // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
        std::fs::write(setting("addr_gen_mode"), "1").expect("no address of its own");
        std::fs::write(setting("disable_ipv6"), "0").expect("IPv6");
    };
    let gateway = mac_text_of_gateway();
    sandbox.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0").expect("IPv6");
        on("eth0");
        ip(&format!(
            "address add {address}/128 dev eth0 nodad\n\
             neighbour replace {GATEWAY6} lladdr {gateway} dev eth0 nud permanent\n\
             route add default via {GATEWAY6} dev eth0 onlink\n"
        ));
    });
    let (interface, mac) = (&sandbox.endpoint.interface, mac_text(sandbox.endpoint.mac));
    datapath
        .router()
        .run(|| {
            on(interface);
            ip(&format!(
                "neighbour replace {address} lladdr {mac} dev {interface} nud permanent\n\
                 route add {address}/128 dev {interface}\n"
            ));
        })
        .expect("router");
}

fn the_same_wall(attach: Attach) {
    let run_dir = RunDir::new();
    let place = DatapathConfig {
        attach,
        ..config(run_dir.path())
    };
    let datapath = Datapath::open(&place, &platform()).expect("a datapath");
    let mut sandbox = Sandbox::create(datapath.router(), 1);
    sandbox.endpoint.address6 = Some(address6(1));
    let handle = datapath.attach(&sandbox.endpoint).expect("attached");
    sandbox.start(datapath.router());
    give_ipv6(&sandbox, &datapath, address6(1));
    let policy = table(&[
        ("0.0.0.0/0", &[]),
        ("2001:db8::/32", &[(443, 443, KernelAction::Proxy)]),
    ]);
    datapath.set_policy(handle, &policy).expect("a policy");
    let listeners = sockets::Listeners::open(datapath.router()).expect("listeners");
    datapath
        .set_listeners(&listeners.indexed())
        .expect("known to the kernel");
    let steered = &listeners.v6.as_ref().expect("IPv6").tcp;
    steered.set_nonblocking(false).expect("blocking");
    answer(steered, "tcp");
    let mut reader = datapath.take_events().expect("a reader");

    let open = at("2001:db8::10", 443);
    let heard = sandbox.run(|| {
        let mut stream = TcpStream::connect_timeout(&open.into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).map(|_length| heard)
    });
    assert_eq!(heard.expect("an answer"), format!("tcp {open}"));
    for (to, port, reason) in [
        ("2001:db8::10", 80, Reason::DefaultDeny),
        ("3fff::1", 443, Reason::DefaultDeny),
        ("fd00:ec2::254", 80, Reason::PlatformDenied),
        ("64:ff9b::10.0.0.7", 443, Reason::PlatformDenied),
    ] {
        let refused = sandbox.run(|| TcpStream::connect_timeout(&at(to, port).into(), PATIENCE));
        assert_eq!(
            refused.expect_err(to).kind(),
            ErrorKind::ConnectionRefused,
            "{to}"
        );
        // The namespace's own kernel may say something by itself, too.
        let of_this = |event: &&DenyEvent| event.dst == SocketAddr::V6(at(to, port));
        let events = events_until(&mut reader, |events| events.iter().any(|event| of_this(&event)));
        let event = events.iter().find(of_this).expect("there is one");
        assert_eq!((event.ordinal, event.reason), (handle.ordinal, reason), "{to}");
    }
    // A datagram is refused to the program that sent it.
    let refused = sandbox.run(|| {
        let socket = UdpSocket::bind("[::]:0")?;
        socket.connect(at("2001:db8::10", 443))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(b"query")?;
        socket.recv(&mut [0; 16])
    });
    let refused = refused.expect_err("refused");
    assert!(
        !matches!(refused.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        "{refused}"
    );
    // Another's address goes nowhere, and nothing is delivered that no connection asked for.
    let before = datapath.counters().expect("counters");
    let spoofed = sandbox.run(|| {
        ip(&format!("address add {}/128 dev eth0 nodad\n", address6(2)));
        let socket = UdpSocket::bind(SocketAddrV6::new(address6(2), 0, 0, 0))?;
        socket.send_to(b"query", open)
    });
    spoofed.expect("sent");
    let events = events_until(&mut reader, |events| {
        events.iter().any(|event| event.reason == Reason::SpoofedSource)
    });
    assert!(
        events.iter().all(|event| event.ordinal == handle.ordinal),
        "{events:?}"
    );
    let own = SocketAddrV6::new(address6(1), 7000, 0, 0);
    let stranger = datapath.router().run(|| {
        let socket = UdpSocket::bind("[::1]:0")?;
        // Sent or refused by the namespace's own rules: it is not delivered.
        let _sent = socket.send_to(b"query", own);
        TcpStream::connect_timeout(&own.into(), Duration::from_millis(300))
    });
    stranger
        .expect("the router")
        .expect_err("nothing connects inward by IPv6");
    let after = datapath.counters().expect("counters");
    assert!(after.dropped > before.dropped, "{before:?} {after:?}");
}

#[test]
fn ipv6_meets_the_same_wall_by_tcx_links() {
    if privileged() {
        the_same_wall(Attach::Tcx);
    }
}

#[test]
fn ipv6_meets_the_same_wall_by_clsact_filters() {
    if privileged() {
        the_same_wall(Attach::Clsact);
    }
}
