//! Clients inside a sandbox, and stand-ins for netd's listeners in the router namespace.

use std::{
    io::{self, IoSliceMut, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use netd::{kernel::Datapath, router::RouterNamespace};
use netd_common::{listener, mark};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

/// Longer than any honest answer, shorter than a retransmission would need.
const PATIENCE: Duration = Duration::from_millis(900);

/// For what a connection that there is has to say, also on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) fn at(address: [u8; 4], port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(address), port)
}

/// Connects and times it.
pub(crate) fn connect(to: SocketAddrV4) -> (io::Result<TcpStream>, Duration) {
    let started = Instant::now();
    let stream = TcpStream::connect_timeout(&SocketAddr::V4(to), PATIENCE);
    (stream, started.elapsed())
}

/// Connects and reads what the other side has to say.
pub(crate) fn ask(to: SocketAddrV4) -> io::Result<String> {
    let (stream, _) = connect(to);
    let mut stream = stream?;
    stream.set_read_timeout(Some(SOON))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Sends a datagram from a connected socket and waits for an answer.
pub(crate) fn query(to: SocketAddrV4) -> (io::Result<String>, Duration) {
    let started = Instant::now();
    let answer = (|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(b"query")?;
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })();
    (answer, started.elapsed())
}

fn transparent(kind: Type, at: SocketAddrV4) -> Socket {
    let socket = Socket::new(Domain::IPV4, kind, None).expect("a socket");
    socket.set_reuse_address(true).expect("reuse");
    socket.set_ip_transparent_v4(true).expect("transparent");
    socket.set_mark(mark::NETD).expect("marked");
    socket.bind(&at.into()).expect("bound");
    socket
}

/// What stands in for netd. Closing it closes the sockets.
pub(crate) struct Listeners {
    tcp: TcpListener,
    dns_tcp: TcpListener,
    dns_udp: UdpSocket,
    threads: Vec<JoinHandle<()>>,
}

impl Listeners {
    /// Sockets as netd makes them, known to the kernel, answering each connection with `<what> <original address>`.
    pub(crate) fn serve(datapath: &Datapath) -> Self {
        let mut listeners = datapath
            .router()
            .run(|| {
                let tcp = transparent(Type::STREAM, at([127, 0, 0, 1], 15001));
                tcp.listen(1024).expect("listening");
                let dns_tcp = transparent(Type::STREAM, at([127, 0, 0, 1], 15053));
                dns_tcp.listen(1024).expect("listening");
                let dns_udp = transparent(Type::DGRAM, at([127, 0, 0, 1], 15053));
                setsockopt(&dns_udp, sockopt::Ipv4OrigDstAddr, &true).expect("original address");
                Self {
                    tcp: tcp.into(),
                    dns_tcp: dns_tcp.into(),
                    dns_udp: dns_udp.into(),
                    threads: Vec::new(),
                }
            })
            .expect("router");
        datapath
            .set_listeners(&[
                (listener::TCP, listeners.tcp.as_fd()),
                (listener::DNS_UDP, listeners.dns_udp.as_fd()),
                (listener::DNS_TCP, listeners.dns_tcp.as_fd()),
            ])
            .expect("known to the kernel");
        listeners.threads = vec![
            answer(&listeners.tcp, "tcp"),
            answer(&listeners.dns_tcp, "dns"),
            answer_queries(datapath.router(), &listeners.dns_udp),
        ];
        listeners
    }

    /// Closes all of them, as the end of netd does.
    pub(crate) fn close(self) {
        for socket in [
            self.tcp.as_raw_fd(),
            self.dns_tcp.as_raw_fd(),
            self.dns_udp.as_raw_fd(),
        ] {
            // Wakes the threads, whose clones would keep the sockets open.
            let _woken = nix::sys::socket::shutdown(socket, nix::sys::socket::Shutdown::Both);
        }
        for thread in self.threads {
            thread.join().expect("no panic");
        }
    }
}

pub(crate) fn answer(listener: &TcpListener, what: &'static str) -> JoinHandle<()> {
    let listener = listener.try_clone().expect("a clone");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let text = format!("{what} {}", stream.local_addr().expect("an address"));
            let _client_gone = stream.write_all(text.as_bytes());
        }
    })
}

fn answer_queries(router: &RouterNamespace, socket: &UdpSocket) -> JoinHandle<()> {
    let socket = socket.try_clone().expect("a clone");
    let router = router.path().to_owned();
    thread::spawn(move || {
        let namespace = std::fs::File::open(router).expect("the router namespace");
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
        while let Some((from, to)) = receive(&socket) {
            let reply = transparent(Type::DGRAM, to);
            let _client_gone = reply.send_to(format!("udp {to}").as_bytes(), &from.into());
        }
    })
}

fn receive(socket: &UdpSocket) -> Option<(SocketAddrV4, SocketAddrV4)> {
    let mut buffer = [0; 1500];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(libc::sockaddr_in);
    let message = recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .ok()?;
    let from = message.address?;
    let to = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => Some(SockaddrIn::from(to)),
        _ => None,
    })?;
    Some((
        SocketAddrV4::new(from.ip(), from.port()),
        SocketAddrV4::new(to.ip(), to.port()),
    ))
}
