//! A small world: a datapath in a run directory of its own, and sandboxes that are network namespaces.

use std::{
    fs::File,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use netd::{
    kernel::{Attach, Datapath, DatapathConfig, DenyEvent, EndpointHandle, EventReader},
    router::RouterNamespace,
};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns, unshare},
};
use sandgate_api::feed::Endpoint;
use sandgate_policy::{
    KernelAction, KernelTable, Platform, PortRange, PrefixEntry, PrivateException, Protocol, Reason,
};

/// Whether the tests can run. Says so when they cannot, and fails when they must.
#[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
pub(crate) fn privileged() -> bool {
    let able =
        thread::spawn(|| nix::unistd::geteuid().is_root() && unshare(CloneFlags::CLONE_NEWNET).is_ok());
    if able.join().unwrap_or(false) {
        return true;
    }
    assert!(
        std::env::var_os("REQUIRE_ROOT").is_none_or(|value| value != "1"),
        "REQUIRE_ROOT=1, but this is not root"
    );
    eprintln!("SKIPPED: needs root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_BPF");
    false
}

/// A name that no other test of this machine uses.
fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs `ip -batch -` in the calling thread's namespace.
pub(crate) fn ip(commands: &str) {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip runs");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(commands.as_bytes())
        .expect("ip reads");
    let done = child.wait_with_output().expect("ip ends");
    assert!(
        done.status.success(),
        "ip: {}\n{commands}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// Waits until an interface of the calling thread's namespace can send.
fn wait_up(interface: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let shown = Command::new("ip")
            .args(["-o", "link", "show", interface])
            .output()
            .expect("ip runs");
        if String::from_utf8_lossy(&shown.stdout).contains("state UP") {
            return;
        }
        assert!(Instant::now() < deadline, "{interface} does not come up");
        thread::sleep(Duration::from_millis(2));
    }
}

/// One instance's run directory, removed with all that hangs on it.
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    pub(crate) fn new() -> Self {
        let path = PathBuf::from(format!("/run/sandgate-ebpf-test-{}", unique()));
        std::fs::create_dir_all(&path).expect("a run directory");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Best effort: a failed test must not hide behind its clean-up.
        let _gone = RouterNamespace::remove(&self.0);
        let _gone = umount2(&self.0.join("bpf"), MntFlags::MNT_DETACH);
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn config(run_dir: &Path) -> DatapathConfig {
    DatapathConfig {
        run_dir: run_dir.to_owned(),
        sandbox_cidr: sandbox_cidr(),
        sandbox_cidr6: Some("fd53:4700::/64".parse().expect("a prefix")),
        attach: Attach::Auto,
    }
}

pub(crate) fn sandbox_cidr() -> Ipv4Net {
    "10.213.0.0/16".parse().expect("a prefix")
}

/// The platform with one operator exception.
pub(crate) fn platform() -> Platform {
    Platform::new(PrivateException::parse_list("10.0.0.5/32:443,10.0.0.0/24:80").expect("a list"))
}

/// A namespace that stands for a sandbox.
pub(crate) struct Sandbox {
    namespace: File,
    pub(crate) endpoint: Endpoint,
}

impl Sandbox {
    /// The namespace and its veth into the router namespace, down and without an address.
    pub(crate) fn create(router: &RouterNamespace, number: u8) -> Self {
        Self::create_at(router, number, None)
    }

    /// The same, with a chosen index for the router's end.
    pub(crate) fn create_at(router: &RouterNamespace, number: u8, index: Option<u32>) -> Self {
        let namespace = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("no IPv6");
            File::open("/proc/thread-self/ns/net").expect("its file")
        })
        .join()
        .expect("no panic");
        let interface = format!("sg{number}");
        let mac = [0x02, 0x53, 0x47, 0x01, 0, number];
        let mac_text = mac_text(mac);
        let gateway = mac_text_of_gateway();
        let index = index.map_or_else(String::new, |index| format!("index {index}"));
        // A thread inside the new namespace, by whose id `ip` can name it.
        let (send_id, id) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        thread::scope(|scope| {
            let namespace = &namespace;
            scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter");
                send_id.send(nix::unistd::gettid()).expect("listened to");
                let _closed = wait.recv();
            });
            let thread_id = id.recv().expect("sent");
            let commands = format!(
                "link add {interface} {index} address {gateway} type veth peer name eth0 address {mac_text} netns {thread_id}\n"
            );
            router.run(|| ip(&commands)).expect("router");
            drop(done);
        });
        let ifindex = router
            .run(|| nix::net::if_::if_nametoindex(interface.as_str()).expect("an index"))
            .expect("router");
        let address = Ipv4Addr::new(10, 213, 0, number);
        Self {
            namespace,
            endpoint: Endpoint {
                ifindex,
                interface,
                address,
                address6: None,
                mac,
                agent_port: 7000,
            },
        }
    }

    /// Gives it its address and routes and sets both ends up: what the controller does after the acknowledgement.
    pub(crate) fn start(&self, router: &RouterNamespace) {
        let Endpoint {
            interface,
            address,
            mac,
            ..
        } = &self.endpoint;
        let gateway = mac_text_of_gateway();
        self.run(|| {
            ip(&format!(
                "link set lo up\naddress add {address}/32 dev eth0\nlink set eth0 up\n\
                 neighbour replace 169.254.1.1 lladdr {gateway} dev eth0 nud permanent\n\
                 route add default via 169.254.1.1 dev eth0 onlink\n"
            ));
        });
        let mac = mac_text(*mac);
        router
            .run(|| {
                ip(&format!(
                    "link set {interface} up\nroute add {address}/32 dev {interface}\n\
                     neighbour replace {address} lladdr {mac} dev {interface} nud permanent\n"
                ));
            })
            .expect("router");
        // The end that came up first sends nothing until the kernel has noticed, a little later, that the other did.
        self.run(|| wait_up("eth0"));
        router.run(|| wait_up(interface)).expect("router");
    }

    /// Runs a closure inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("enter");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.endpoint.address
    }
}

pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

pub(crate) fn mac_text_of_gateway() -> String {
    mac_text(netd_common::GATEWAY_MAC)
}

/// A datapath with running sandboxes. Fields drop in order: the datapath before its directory.
pub(crate) struct World {
    pub(crate) datapath: Datapath,
    pub(crate) sandboxes: Vec<(Sandbox, EndpointHandle)>,
    pub(crate) run_dir: RunDir,
}

impl World {
    /// `count` sandboxes, attached and up, denied everything.
    pub(crate) fn with_sandboxes(count: u8) -> Self {
        let run_dir = RunDir::new();
        let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
        let sandboxes = (1..=count)
            .map(|number| {
                let sandbox = Sandbox::create(datapath.router(), number);
                let handle = datapath.attach(&sandbox.endpoint).expect("attached");
                sandbox.start(datapath.router());
                (sandbox, handle)
            })
            .collect();
        Self {
            datapath,
            sandboxes,
            run_dir,
        }
    }

    /// Closes the datapath, as netd's end does, and opens another on the same pins.
    pub(crate) fn restart(self) -> Self {
        let Self {
            datapath,
            sandboxes,
            run_dir,
        } = self;
        drop(datapath);
        let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
        Self {
            datapath,
            sandboxes,
            run_dir,
        }
    }

    pub(crate) fn first(&self) -> (&Sandbox, EndpointHandle) {
        let (sandbox, handle) = &self.sandboxes[0];
        (sandbox, *handle)
    }
}

/// A prefix and its ranges of ports.
type Entry<'a> = (&'a str, &'a [(u16, u16, KernelAction)]);

/// A table from prefixes and their ranges.
pub(crate) fn table(entries: &[Entry<'_>]) -> KernelTable {
    let entries = entries
        .iter()
        .map(|(prefix, ranges)| PrefixEntry {
            prefix: prefix.parse().expect("a prefix"),
            ranges: ranges
                .iter()
                .map(|&(first, last, action)| PortRange {
                    protocol: Protocol::Tcp,
                    first,
                    last,
                    action,
                })
                .collect(),
        })
        .collect();
    KernelTable { entries }
}

/// Everything to netd.
pub(crate) fn open_table() -> KernelTable {
    table(&[("0.0.0.0/0", &[(0, u16::MAX, KernelAction::Proxy)])])
}

/// 203.0.113.0/24 port 443 to netd, the rest denied.
pub(crate) fn allow_443() -> KernelTable {
    table(&[
        ("0.0.0.0/0", &[]),
        (
            "203.0.113.0/24",
            &[
                (443, 443, KernelAction::Proxy),
                (8443, 8443, KernelAction::Deny(Reason::DeniedByRule)),
            ],
        ),
    ])
}

/// Reads events until `enough` says so; fails after a minute.
pub(crate) fn events_until(
    reader: &mut EventReader,
    enough: impl Fn(&[DenyEvent]) -> bool,
) -> Vec<DenyEvent> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut events = Vec::new();
    loop {
        events.extend(reader.next_batch(Duration::from_millis(300)).expect("events"));
        if enough(&events) {
            return events;
        }
        assert!(Instant::now() < deadline, "the events did not come: {events:?}");
    }
}
