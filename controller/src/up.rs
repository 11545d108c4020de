//! `controller up`: a small supervisor of everything on one machine.
//!
//! Owns what must outlive its children: the socket pair between controller and netd, and the API's listening
//! socket. So any child can be killed or replaced while the other notices no more than a pause. It serves
//! nothing itself, and what the kernel enforces does not depend on it: when it ends, its children end with
//! it, sandboxes stay, and their packets go on being judged or refused.

mod becoming;
mod child;
mod lock;
mod probe;

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use sandgate_api::control::CONTROL_FD_VARIABLE;
use sandgate_daemon::{handover, signal};
use tokio_util::sync::CancellationToken;

pub use becoming::Become;
pub use lock::InstanceLock;

use crate::{
    app,
    config::{API_FD_VARIABLE, Config, EXIT_USAGE, Registration, Settings},
    vault::{KEY_FILE_VARIABLE, KEY_VARIABLE},
};
use child::{Child, Verdict};

/// The oldest kernel whose traffic control takes our programs at the head of the chain and pins their links
/// (TCX, since 6.6).
const OLDEST_KERNEL: (u32, u32) = (6, 6);

/// Runs until a signal, or until a child refuses its configuration.
///
/// # Errors
/// When this machine cannot run sandboxes, or another instance uses the same directories or address.
pub fn run(config: &Config, settings: &Settings) -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "`controller up` must run as root"
    );
    check_kernel(&rustix::system::uname().release().to_string_lossy())?;
    let own = std::env::current_exe().context("finding this program's own file")?;
    let netd = app::beside("netd")?;
    app::beside("sandboxd")?;
    app::make_directory(&config.run_dir)?;
    app::make_directory(&config.data_dir)?;
    let _locks = InstanceLock::take(config)?;
    let listener = TcpListener::bind(config.api_addr)
        .with_context(|| format!("SANDGATE_API_ADDR: listening on {}", config.api_addr))?;
    let address = listener.local_addr().context("asking for the API's address")?;
    let listener = OwnedFd::from(listener);
    let (for_controller, for_netd) = handover::pair().context("making the control channel")?;
    let children = [
        Child {
            name: "controller",
            supervisor: own.clone(),
            program: own,
            arguments: vec!["serve".to_owned()],
            descriptors: vec![(CONTROL_FD_VARIABLE, for_controller), (API_FD_VARIABLE, listener)],
            variables: settings.variables(),
            withheld: &[],
        },
        Child {
            name: "netd",
            supervisor: std::env::current_exe().context("finding this program's own file")?,
            program: netd,
            arguments: Vec::new(),
            descriptors: vec![(CONTROL_FD_VARIABLE, for_netd)],
            variables: settings
                .variables()
                .into_iter()
                .filter(|(name, _)| !FOR_CONTROLLER.contains(name))
                .collect(),
            withheld: &FOR_CONTROLLER,
        },
    ];
    // One thread: a child's death signal is tied to the thread that started it, which must be one that stays.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(supervise(config, address, children))
}

/// Variables that may hold secrets of the controller; netd faces sandboxes and has no use for them.
const FOR_CONTROLLER: [&str; 4] = ["DATABASE_URL", "JWT_SECRET", KEY_VARIABLE, KEY_FILE_VARIABLE];

async fn supervise(config: &Config, address: SocketAddr, children: [Child; 2]) -> Result<ExitCode> {
    let shutdown = signal::shutdown().context("installing signal handlers")?;
    let [controller, netd] = children;
    say(&format!("API       http://{}", reachable(address)))?;
    say(&registration_line(config.registration, reachable(address)))?;
    let stop_netd = CancellationToken::new();
    let announced = async {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            () = probe::until_ready(reachable(address)) => say("ready     sandboxes can be created"),
        }
    };
    // The controller ends first, so that what it takes down is still enforced and acknowledged.
    let controller = async {
        let verdict = controller.supervise(&shutdown).await;
        shutdown.cancel();
        stop_netd.cancel();
        verdict
    };
    let netd = async {
        let verdict = netd.supervise(&stop_netd).await;
        shutdown.cancel();
        verdict
    };
    let (controller, netd, announced) = tokio::join!(controller, netd, announced);
    announced?;
    match (controller, netd) {
        (Verdict::Stopped, Verdict::Stopped) => Ok(ExitCode::SUCCESS),
        (Verdict::Misconfigured, _) | (_, Verdict::Misconfigured) => Ok(ExitCode::from(EXIT_USAGE)),
    }
}

/// Standard output is what people and scripts read; logs go elsewhere.
fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match writeln!(output, "{line}").and_then(|()| output.flush()) {
        // Nobody reads (any more): that is no reason to stop.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("writing to standard output"),
    }
}

fn registration_line(registration: Registration, address: SocketAddr) -> String {
    match registration {
        Registration::Open => format!(
            "Register  curl -s http://{address}/api/v1/register -H 'content-type: application/json' \
             -d '{{\"email\":\"you@example.org\",\"organization_name\":\"you\"}}'"
        ),
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

fn check_kernel(release: &str) -> Result<()> {
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("the kernel release `{release}` is not understood");
    };
    let (oldest_major, oldest_minor) = OLDEST_KERNEL;
    ensure!(
        (major, minor) >= OLDEST_KERNEL,
        "this kernel is {release}; sandboxes need Linux {oldest_major}.{oldest_minor} or newer, \
         whose traffic control can hold our program in place (TCX)"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_refused_by_name() {
        for release in ["6.6.0", "6.6", "6.18.3-0-generic", "7.0.0-rc1", "10.1"] {
            assert!(check_kernel(release).is_ok(), "{release}");
        }
        for release in ["6.5.0-1-amd64", "6.1.0-18-amd64", "5.15.0", "", "x.y"] {
            assert!(check_kernel(release).is_err(), "{release}");
        }
        let message = check_kernel("6.1.0-18-amd64").expect_err("refused").to_string();
        assert!(
            message.contains("6.1.0-18-amd64") && message.contains("6.6"),
            "{message}"
        );
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
