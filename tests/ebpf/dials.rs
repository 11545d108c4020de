//! netd's answers to those who want to connect into sandboxes: none of them waits for another sandbox than its own.

use std::{io::Read as _, net::TcpStream, os::fd::OwnedFd, sync::Arc, time::Duration};

use netd::{
    dial::{Caller, Inward},
    pins::room::Room,
    router::EPHEMERAL_PORTS,
    sandbox::{Rules, Sandbox, Sandboxes},
};
use sandgate_api::{
    control::{DialError, DialReply, DialRequest, MAX_PACKET},
    id::{OrgId, SandboxId},
};
use sandgate_daemon::{
    handover::{self, Channel},
    tasks::Tasks,
};
use socket2::{Domain, Socket, Type};
use tokio_util::sync::CancellationToken;

use crate::{
    inbound::{AGENT, greet},
    sockets::at,
    world::{World, platform, privileged},
};

const TUNNEL: u16 = 3000;
/// So many dials that hang, one after the other in any queue that they share with others, outlast all patience.
const MANY: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(10);

/// One caller's dial socket, served by netd.
struct Calls(Channel);

impl Calls {
    fn of(inward: &Arc<Inward>, caller: Caller, tasks: &Tasks) -> Self {
        let (ours, theirs) = handover::pair().expect("a pair");
        tasks.spawn("dials", Arc::clone(inward).serve(theirs, caller, tasks.clone()));
        Self(Channel::from_fd(ours).expect("a channel"))
    }

    async fn ask(&self, request_id: u64, sandbox_id: &SandboxId, port: u16) {
        let request = DialRequest {
            request_id,
            sandbox_id: sandbox_id.clone(),
            port,
        };
        let packet = serde_json::to_vec(&request).expect("JSON");
        self.0.send(&packet, None).await.expect("sent");
    }

    async fn answer(&self) -> (u64, Result<OwnedFd, DialError>) {
        let mut buffer = vec![0; MAX_PACKET];
        let (length, descriptor) = self.0.recv(&mut buffer).await.expect("received");
        let reply: DialReply = serde_json::from_slice(&buffer[..length]).expect("a reply");
        let answer = reply
            .error
            .map_or_else(|| Ok(descriptor.expect("a descriptor")), Err);
        (reply.request_id, answer)
    }
}

fn hear(descriptor: OwnedFd) -> String {
    let mut stream = TcpStream::from(descriptor);
    stream.set_nonblocking(false).expect("blocking");
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let mut heard = String::new();
    stream.read_to_string(&mut heard).expect("heard");
    heard
}

#[test]
fn a_sandbox_that_never_accepts_delays_no_dial_but_its_own() {
    if !privileged() {
        return;
    }
    let World {
        run_dir,
        sandboxes: namespaces,
        datapath,
    } = World::with_sandboxes(2);
    let datapath = Arc::new(datapath);
    let sandboxes = Arc::new(Sandboxes::default());
    let ids = [(); 2].map(|()| SandboxId::random());
    for (id, (namespace, handle)) in ids.iter().zip(&namespaces) {
        let sandbox = Sandbox::open(
            id.clone(),
            (namespace.endpoint.clone(), *handle),
            Rules::nothing(&platform(), OrgId::nobody()).expect("rules"),
            Arc::clone(&datapath),
            (&run_dir.path().join(format!("{id}.pins")), &Room::default()),
        )
        .expect("a sandbox");
        sandbox.set_tunnel_ports([TUNNEL]).expect("ports");
        sandboxes.insert(Arc::new(sandbox));
    }
    let [(silent, _), (lively, _)] = &namespaces[..] else {
        panic!("two sandboxes")
    };
    greet(silent, AGENT);
    greet(lively, TUNNEL);
    let _never_accepts = silent.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&at([0, 0, 0, 0], TUNNEL).into()).expect("bound");
        socket.listen(0).expect("listening");
        socket
    });

    let inward = Arc::new(Inward::new(sandboxes, datapath));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let [silent, lively] = &ids;
    let (to_tunnel, to_agent, refused) = runtime.block_on(async {
        let tasks = Tasks::new(CancellationToken::new());
        let tunnels = Calls::of(&inward, Caller::TunnelProxy, &tasks);
        let agents = Calls::of(&inward, Caller::Controller, &tasks);
        let all = async {
            let asking = async {
                for request_id in 0..MANY {
                    tunnels.ask(request_id, silent, TUNNEL).await;
                }
                tunnels.ask(MANY, lively, TUNNEL).await;
                agents.ask(0, silent, AGENT).await;
            };
            let hearing = async {
                let mut refused = 0_u64;
                loop {
                    match tunnels.answer().await {
                        (MANY, answer) => break (answer.expect("connected"), refused),
                        (_, Err(DialError::TimedOut)) => refused += 1,
                        // What the queue of a listener of length 0 takes all the same.
                        (_, answer) => drop(answer.expect("connected")),
                    }
                }
            };
            let ((), (to_tunnel, refused), (_, to_agent)) = tokio::join!(asking, hearing, agents.answer());
            (to_tunnel, to_agent.expect("connected"), refused)
        };
        tokio::time::timeout(PATIENCE, all)
            .await
            .expect("those who accept are reached")
    });
    assert_eq!(hear(to_tunnel), "hello");
    assert_eq!(hear(to_agent), "hello");
    assert!(refused > 0, "the dials that hang are bounded");
}

#[test]
fn all_ports_that_the_reserve_of_the_controller_rests_on_are_there() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(0);
    let read = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("a range");
    let range = world.datapath.router().run(read).expect("router");
    let mut ends = range.split_whitespace().map(|end| end.parse().expect("a port"));
    let (Some(first), Some(last)): (Option<usize>, Option<usize>) = (ends.next(), ends.next()) else {
        panic!("{range}")
    };
    assert_eq!(last + 1 - first, EPHEMERAL_PORTS, "{range}");
}
