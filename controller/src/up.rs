//! `controller up`: a small supervisor of everything on one machine.
//!
//! Owns what must outlive its children: the socket pairs between controller, netd and tunnel-proxy, and the
//! listening sockets of the API and of tunnel-proxy. So any child can be killed or replaced while the others
//! notice no more than a pause. It serves nothing itself, and what the kernel enforces does not depend on it:
//! when it ends, its children end with it, sandboxes stay, and their packets go on being judged or refused.

mod becoming;
mod child;
mod lock;
mod probe;

use std::{
    fs, io,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::Path,
    process::{Command, ExitCode, Output, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sandgate_api::control::{
    CONTROL_FD_VARIABLE, TUNNEL_CONTROL_FD_VARIABLE, TUNNEL_DIAL_FD_VARIABLE, TUNNEL_KEEP_FD_VARIABLE,
    TUNNEL_LISTENER_FD_VARIABLE,
};
use sandgate_daemon::{handover, keep::DescriptorStore, signal};
use tokio_util::sync::CancellationToken;

pub use becoming::Become;
pub use lock::InstanceLock;

use crate::{
    app,
    config::{API_FD_VARIABLE, Config, EXIT_USAGE, Registration, Settings},
    vault::{KEY_FILE_VARIABLE, KEY_VARIABLE},
};
use child::{Child, Verdict};

/// The program, and its directory in the run directory: the only place where its user may write.
const TUNNEL_PROXY: &str = "tunnel-proxy";

/// Runs until a signal, or until a child refuses its configuration.
///
/// # Errors
/// When this machine cannot run sandboxes, or another instance uses the same directories or address.
pub fn run(config: &Config, settings: &Settings) -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "`controller up` must run as root"
    );
    let own = std::env::current_exe().context("finding this program's own file")?;
    let netd = app::beside("netd")?;
    let tunnel_proxy = app::beside(TUNNEL_PROXY)?;
    app::beside("sandboxd")?;
    if let Some(refusal) = refused_by(&netd, settings)? {
        return Ok(refusal);
    }
    app::make_directory(&config.run_dir)?;
    app::make_directory(&config.data_dir)?;
    let _locks = InstanceLock::take(config)?;
    give_directory(&config.run_dir.join(TUNNEL_PROXY), config.tunnels.user)
        .context("making tunnel-proxy's directory")?;
    raise_open_files().context("raising the limit of open files")?;
    let (api, address) = listen("SANDGATE_API_ADDR", config.api_addr)?;
    let (tunnels, _) = listen("SANDGATE_TUNNEL_ADDR", config.tunnels.address)?;
    let pair = || handover::pair().context("making a control channel");
    let (controller_to_netd, netd_to_controller) = pair()?;
    let (controller_to_proxy, proxy_to_controller) = pair()?;
    let (netd_to_proxy, proxy_to_netd) = pair()?;
    let child = |name, program, descriptors, inherits| Child {
        name,
        supervisor: own.clone(),
        program,
        arguments: Vec::new(),
        descriptors,
        variables: settings.variables(),
        inherits,
        user: None,
        store: None,
    };
    let children = Children {
        controller: Child {
            arguments: vec!["serve".to_owned()],
            ..child(
                "controller",
                own.clone(),
                vec![
                    (CONTROL_FD_VARIABLE, controller_to_netd),
                    (TUNNEL_CONTROL_FD_VARIABLE, controller_to_proxy),
                    (API_FD_VARIABLE, api),
                ],
                |_any| true,
            )
        },
        tunnel_proxy: Child {
            user: Some(config.tunnels.user),
            store: Some((TUNNEL_KEEP_FD_VARIABLE, DescriptorStore::default())),
            ..child(
                TUNNEL_PROXY,
                tunnel_proxy,
                vec![
                    (CONTROL_FD_VARIABLE, proxy_to_controller),
                    (TUNNEL_DIAL_FD_VARIABLE, proxy_to_netd),
                    (TUNNEL_LISTENER_FD_VARIABLE, tunnels),
                ],
                for_tunnel_proxy,
            )
        },
        netd: child(
            "netd",
            netd,
            vec![
                (CONTROL_FD_VARIABLE, netd_to_controller),
                (TUNNEL_DIAL_FD_VARIABLE, netd_to_proxy),
            ],
            for_netd,
        ),
    };
    // One thread: a child's death signal is tied to the thread that started it, which must be one that stays.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(supervise(config, address, children))
}

struct Children {
    controller: Child,
    tunnel_proxy: Child,
    netd: Child,
}

/// Variables that may hold secrets of the controller.
const FOR_CONTROLLER: [&str; 4] = ["DATABASE_URL", "JWT_SECRET", KEY_VARIABLE, KEY_FILE_VARIABLE];

/// netd faces sandboxes and has no use for the controller's secrets.
fn for_netd(variable: &str) -> bool {
    !FOR_CONTROLLER.contains(&variable)
}

/// tunnel-proxy faces strangers: it sees only what it is meant to see, whatever else an operator's environment
/// holds.
fn for_tunnel_proxy(variable: &str) -> bool {
    let ours = variable.starts_with("SANDGATE_") && !FOR_CONTROLLER.contains(&variable);
    ours || matches!(variable, "PATH" | "TZ" | "RUST_BACKTRACE")
}

/// A socket that listens from now on until the supervisor ends.
fn listen(variable: &'static str, address: SocketAddr) -> Result<(OwnedFd, SocketAddr)> {
    let listener =
        TcpListener::bind(address).with_context(|| format!("{variable}: listening on {address}"))?;
    let address = listener
        .local_addr()
        .with_context(|| format!("{variable}: asking for the address"))?;
    Ok((listener.into(), address))
}

/// A directory for one user alone; what is in it stays.
fn give_directory(path: &Path, user: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // The directory itself, never what a link in its place leads to: its user changes with the configuration.
    std::os::unix::fs::lchown(path, Some(user), Some(user))
}

/// As many open files as this process and its children may have: the usual soft limit is meant for programs
/// that call select(2).
fn raise_open_files() -> rustix::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )
}

async fn supervise(config: &Config, address: SocketAddr, children: Children) -> Result<ExitCode> {
    let shutdown = signal::shutdown().context("installing signal handlers")?;
    say(&format!("API       http://{}", reachable(address)))?;
    say(&registration_line(config.registration, reachable(address)))?;
    let stop_netd = CancellationToken::new();
    let announced = async {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            () = probe::until_ready(reachable(address)) => say("ready     sandboxes can be created"),
        }
    };
    // netd ends last, so that what the controller takes down is still enforced and acknowledged, and what
    // tunnel-proxy still carries is not cut.
    let facing_clients = async {
        let controller = async {
            let verdict = children.controller.supervise(&shutdown).await;
            shutdown.cancel();
            verdict
        };
        let tunnel_proxy = async {
            let verdict = children.tunnel_proxy.supervise(&shutdown).await;
            shutdown.cancel();
            verdict
        };
        let verdicts = tokio::join!(controller, tunnel_proxy);
        stop_netd.cancel();
        verdicts
    };
    let netd = async {
        let verdict = children.netd.supervise(&stop_netd).await;
        shutdown.cancel();
        verdict
    };
    let ((controller, tunnel_proxy), netd, announced) = tokio::join!(facing_clients, netd, announced);
    announced?;
    if [controller, tunnel_proxy, netd].contains(&Verdict::Misconfigured) {
        return Ok(ExitCode::from(EXIT_USAGE));
    }
    Ok(ExitCode::SUCCESS)
}

/// Standard output is what people and scripts read; logs go elsewhere.
fn say(line: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    match writeln!(output, "{line}").and_then(|()| output.flush()) {
        // Nobody reads (any more): that is no reason to stop.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("writing to standard output"),
    }
}

fn registration_line(registration: Registration, address: SocketAddr) -> String {
    match registration {
        Registration::Open => format!(
            "Register  curl -s http://{address}/api/v1/register -H 'content-type: application/json' \
             -d '{{\"email\":\"you@example.org\",\"organization_name\":\"you\"}}'"
        ),
        Registration::Invite => {
            "Register  by invitation; `controller invite` makes one for a new organization".to_owned()
        }
        Registration::Closed => {
            "Register  closed; SANDGATE_REGISTRATION=open lets whoever reaches the API register".to_owned()
        }
    }
}

/// An address to connect to, where `address` is one to listen on.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Has netd find out, before anything is made, whether it can work here: by its configuration, and by trying out what it
/// needs of the kernel. Gives how to end when its configuration is wrong, which it has then said.
///
/// # Errors
/// What the kernel lacks.
fn refused_by(netd: &Path, settings: &Settings) -> Result<Option<ExitCode>> {
    let mut check = Command::new(netd);
    check.arg("--check").envs(settings.variables());
    for variable in FOR_CONTROLLER {
        check.env_remove(variable);
    }
    let checked = check
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("running {}", netd.display()))?;
    judged(&checked)
}

fn judged(checked: &Output) -> Result<Option<ExitCode>> {
    let said = String::from_utf8_lossy(&checked.stderr);
    match checked.status.code() {
        Some(0) => Ok(None),
        Some(code) if code == i32::from(EXIT_USAGE) => {
            // When nobody can read it, the status says enough.
            io::stderr().write_all(said.as_bytes()).ok();
            Ok(Some(ExitCode::from(EXIT_USAGE)))
        }
        Some(_) | None => bail!(
            "{} (Linux {}; {})",
            said.trim(),
            rustix::system::uname().release().to_string_lossy(),
            checked.status
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus};

    use super::*;

    #[test]
    fn what_netd_finds_missing_ends_the_start() {
        let ended = |wait_status, said: &str| {
            judged(&Output {
                status: ExitStatus::from_raw(wait_status),
                stdout: Vec::new(),
                stderr: said.into(),
            })
        };
        assert!(ended(0, "").expect("it can work").is_none());
        let misconfigured = ended(
            i32::from(EXIT_USAGE) << 8,
            "netd: SANDGATE_ATTACH: no such means\n",
        );
        assert!(misconfigured.expect("it has said what").is_some());
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        for wait_status in [1 << 8, libc::SIGKILL] {
            let refused = ended(wait_status, "netd: this kernel has no ring buffers\n");
            let said = refused.expect_err("refused").to_string();
            assert!(
                said.contains("no ring buffers (Linux ") && said.contains(&release),
                "{said}"
            );
        }
    }

    #[test]
    fn secrets_of_the_controller_go_to_nobody_else() {
        for secret in FOR_CONTROLLER {
            assert!(!for_netd(secret) && !for_tunnel_proxy(secret), "{secret}");
        }
        assert!(for_netd("SANDGATE_DNS_UPSTREAM") && for_netd("AWS_PROFILE"));
        assert!(for_tunnel_proxy("SANDGATE_TUNNEL_DOMAIN") && for_tunnel_proxy("SANDGATE_LOG"));
        for foreign in ["AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "HOME", "SSH_AUTH_SOCK"] {
            assert!(!for_tunnel_proxy(foreign), "{foreign}");
        }
    }

    #[test]
    fn the_printed_address_can_be_connected_to() {
        for (listening, printed) in [
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("192.0.2.1:80", "192.0.2.1:80"),
        ] {
            let address = listening.parse().expect("an address");
            assert_eq!(reachable(address).to_string(), printed);
        }
    }

    #[test]
    fn the_registration_line_can_be_pasted() {
        let line = registration_line(Registration::Open, "127.0.0.1:8080".parse().expect("an address"));
        let body = line
            .split("-d '")
            .nth(1)
            .and_then(|rest| rest.strip_suffix('\''))
            .expect("a body");
        assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
    }
}
