//! The second address: what a sandbox has of IPv6, and that nothing of it speaks by itself.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use crate::world::{World, can_run, in_namespace};
use controller::backend::{LocalBackend, LocalConfig};
use sandgate_policy::Range6;

/// Tells every IPv6 frame that comes in through an interface of its namespace, until its input ends.
const LISTEN: &str = "
import select, socket, sys
seen = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print('listening', flush=True)
while sys.stdin not in select.select([seen, sys.stdin], [], [])[0]:
    frame, origin = seen.recvfrom(2048)
    if origin[1] == 0x86DD and origin[2] != 4:
        print(frame[:12].hex(), socket.inet_ntop(socket.AF_INET6, frame[22:38]),
              socket.inet_ntop(socket.AF_INET6, frame[38:54]), frame[20], flush=True)
";

/// What the kernel would announce or ask by itself it does within two seconds (RFC 3810 9.11, RFC 4861 10).
const SPEAK: &str = "
import socket, time
time.sleep(2)
socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('2001:db8::9', 9))
";

fn listen(router: PathBuf) -> Child {
    in_namespace(router, || {
        Command::new("python3")
            .args(["-c", LISTEN])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
    })
    .unwrap()
}

fn chosen() -> Range6 {
    Range6::parse("fd00:5347:1::/64", b"").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_has_one_ipv6_address_and_says_nothing_by_itself() {
    if !can_run() {
        return;
    }
    let world = World::open_with(chosen()).await;
    let mut listener = listen(world.config.run_dir.join("netns/router"));
    let mut lines = BufReader::new(listener.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "listening\n");
    let spec = world.spec();
    let (endpoint, _) = world.start(&spec).await;
    let address = endpoint.address6.unwrap();
    // The same place in both ranges.
    let [.., place] = endpoint.address.octets();
    assert_eq!(address.to_string(), format!("fd00:5347:1::{place:x}"));

    let said = world
        .sh(&spec, "cat /proc/net/if_inet6; grep eth0 /proc/net/ipv6_route")
        .await
        .stdout;
    let of_eth0: Vec<&str> = said.lines().filter(|line| line.ends_with("eth0")).collect();
    let hex = format!("{:032x}", address.to_bits());
    // Address, length 128, global; the route of the address itself, the default route by the gateway, multicast.
    assert!(
        of_eth0
            .iter()
            .any(|line| line.starts_with(&format!("{hex} 02 80 00 "))),
        "{said}"
    );
    let gateway = "fe800000000000000000000053470001";
    let default = format!("{0} 00 {0} 00 {gateway} ", "0".repeat(32));
    assert!(of_eth0.iter().any(|line| line.starts_with(&default)), "{said}");
    assert!(!said.contains(" 40 "), "a prefix on the link: {said}");
    let addresses = world.sh(&spec, "wc -l < /proc/net/if_inet6").await.stdout;
    assert_eq!(addresses.trim(), "2", "loopback's and its own: {said}");
    let settings = "cd /proc/sys/net/ipv6/conf/eth0 && cat accept_ra autoconf forwarding accept_redirects";
    assert_eq!(world.sh(&spec, settings).await.stdout, "0\n0\n0\n0\n");
    let hosts = world.sh(&spec, "cat /etc/hosts").await.stdout;
    assert!(
        hosts.contains(&format!("{address} {}\n", spec.sandbox_id)),
        "{hosts}"
    );
    let itself = world.sh(&spec, "python3 -c \"import socket; s = socket.create_server(('::', 8000), family=socket.AF_INET6); socket.create_connection(('::1', 8000)); socket.create_connection((socket.gethostname(), 8000)); print('both')\"").await;
    assert_eq!(itself.stdout, "both\n", "{}", itself.stderr);

    let spoken = world.sh(&spec, &format!("python3 -c \"{SPEAK}\"")).await;
    assert_eq!(spoken.code, 0, "{}", spoken.stderr);
    line.clear();
    lines.read_line(&mut line).unwrap();
    listener.stdin.take().unwrap().write_all(b"end").unwrap();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    listener.wait().unwrap();
    let mac: String = endpoint.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(line, format!("025347000001{mac} {address} 2001:db8::9 17\n"));
    assert_eq!(rest, "", "what nobody sent");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_of_before_keep_what_they_had() {
    if !can_run() {
        return;
    }
    let world = World::open_with(chosen()).await;
    let (with, without) = (world.spec(), world.spec());
    let (before, _) = world.start(&with).await;
    let off = LocalConfig {
        sandbox_cidr6: Range6::Off,
        ..world.config.clone()
    };
    let later = LocalBackend::open(off).await.unwrap();
    assert_ne!(later.build(), world.backend.build(), "members of the pool differ");
    assert_eq!(
        later.endpoint(&with.sandbox_id).unwrap().address6,
        None,
        "dropped from here on"
    );
    let made = later.prepare(&without).await.unwrap();
    later.launch(&without).await.unwrap();
    assert_eq!(made.address6, None);
    let last = LocalBackend::open(world.config.clone()).await.unwrap();
    assert_eq!(last.endpoint(&with.sandbox_id), Some(before));
    assert_eq!(last.endpoint(&without.sandbox_id), Some(made));
    for spec in [&with, &without] {
        last.destroy(&spec.sandbox_id).await.unwrap();
    }
    drop((later, last));
    world.close().await;
}
