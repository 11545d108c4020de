//! Programs of others that do what netd does, in `middle`: relays, and proxies that read what is inside TLS.
//!
//! The latter stand in the way as netd does: what plain sends to a port of theirs at the origin is redirected to them
//! (nftables), and they connect to the same port of the origin. Each trusts the world's authority, and plain trusts the
//! one they sign with.

use std::{
    fs,
    net::SocketAddrV4,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use harness::{namespace::Namespace, wait};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;

use super::{Ground, MIDDLE, NAME_SERVER, ORIGIN, SECRET, end};

const HAPROXY: &str = "/usr/sbin/haproxy";
const SQUID: &str = "/usr/sbin/squid";
const SQUID_CERTIFICATES: &str = "/usr/lib/squid/security_file_certgen";
const MITMPROXY: &str = "/usr/bin/mitmdump";
/// As whom Debian's squid runs.
const SQUID_USER: &str = "proxy";
/// Time to start: of these, a large program in Python is the slowest.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of them; it ends with this value.
pub(crate) struct Peer {
    child: Child,
    /// Its files.
    directory: TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Whether what is inside is changed too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// No.
    Nothing,
    /// A credential is put into each request, and as far as the program can, masked in what comes back.
    Credential,
}

impl Peer {
    /// haproxy relaying TCP, with splice(2) as it sees fit.
    pub(crate) fn haproxy(ground: &Ground, port: u16, to: u16) -> Result<Option<Self>> {
        if !Path::new(HAPROXY).exists() {
            return Ok(None);
        }
        let directory = directory()?;
        let file = directory.path().join("haproxy.cfg");
        let text = format!(
            "global\n  nbthread 2\n  maxconn 2048\ndefaults\n  mode tcp\n  option splice-auto\n  timeout connect 5s\n  \
             timeout client 60s\n  timeout server 60s\nlisten relay\n  bind {MIDDLE}:{port} backlog 4096\n  \
             server origin {ORIGIN}:{to}\n"
        );
        fs::write(&file, text)?;
        let mut command = Command::new(HAPROXY);
        command.args(["-db", "-f"]).arg(&file);
        Self::start(&ground.middle, command, directory, port).map(Some)
    }

    /// squid with ssl-bump, for what is sent to the origin's port `through`.
    pub(crate) fn squid(ground: &Ground, through: u16, change: Change) -> Result<Option<Self>> {
        if !Path::new(SQUID).exists() || !Path::new(SQUID_CERTIFICATES).exists() {
            return Ok(None);
        }
        let directory = directory()?;
        let own = directory.path().display().to_string();
        let (port, unused) = (through + 10_000, through + 20_000);
        let added = match change {
            Change::Nothing => String::new(),
            Change::Credential => format!("request_header_add Authorization \"Bearer {SECRET}\" all\n"),
        };
        authority(directory.path(), "authority-own.pem")?;
        fs::copy(&ground.authorities, directory.path().join("world.pem"))?;
        let text = format!(
            "http_port {MIDDLE}:{unused}\n\
             https_port {MIDDLE}:{port} intercept ssl-bump tls-cert={own}/authority-own.pem \
             generate-host-certificates=on dynamic_cert_mem_cache_size=16MB\n\
             sslcrtd_program {SQUID_CERTIFICATES} -s {own}/certificates -M 16MB\nsslcrtd_children 2 startup=2\n\
             acl step1 at_step SslBump1\nssl_bump peek step1\nssl_bump bump all\nhttp_access allow all\n{added}\
             tls_outgoing_options cafile={own}/world.pem\ncache deny all\naccess_log none\ncache_store_log none\n\
             cache_log {own}/cache.log\npid_filename {own}/pid\ncoredump_dir {own}\nnetdb_filename none\npinger_enable off\n\
             dns_nameservers {}\nvia off\nforwarded_for delete\npipeline_prefetch 1\nshutdown_lifetime 0 seconds\n\
             max_filedescriptors 8192\nvisible_hostname squid.test\n",
            NAME_SERVER.ip()
        );
        let file = directory.path().join("squid.conf");
        fs::write(&file, text)?;
        let certificates = directory.path().join("certificates");
        let made = Command::new(SQUID_CERTIFICATES)
            .args(["-c", "-s"])
            .arg(certificates)
            .args(["-M", "16MB"])
            .stdout(Stdio::null())
            .status()?;
        ensure!(made.success(), "squid's certificates: {made}");
        let given = Command::new("chown")
            .args(["-R", SQUID_USER])
            .arg(directory.path())
            .status()?;
        ensure!(given.success(), "chown: {given}");
        redirect(&ground.middle, through, port)?;
        let mut command = Command::new(SQUID);
        // -C: a fault ends it, in place of a report.
        command
            .args(["-N", "-C", "-n", &format!("bench{through}"), "-f"])
            .arg(&file);
        Self::start(&ground.middle, command, directory, port).map(Some)
    }

    /// mitmproxy without a screen, for what is sent to the origin's port `through`.
    pub(crate) fn mitmproxy(ground: &Ground, through: u16, change: Change) -> Result<Option<Self>> {
        if !Path::new(MITMPROXY).exists() {
            return Ok(None);
        }
        let directory = directory()?;
        let port = through + 10_000;
        authority(directory.path(), "mitmproxy-ca.pem")?;
        redirect(&ground.middle, through, port)?;
        let mut command = Command::new(MITMPROXY);
        command
            .args([
                "--quiet",
                "--mode",
                "transparent",
                "--listen-host",
                &MIDDLE.to_string(),
            ])
            .args([
                "--listen-port",
                &port.to_string(),
                "--set",
                "flow_detail=0",
                "--set",
            ])
            .arg(format!("confdir={}", directory.path().display()))
            .arg("--set")
            .arg(format!(
                "ssl_verify_upstream_trusted_ca={}",
                ground.authorities.display()
            ));
        if change == Change::Credential {
            command
                .arg("--modify-headers")
                .arg(format!("/~q/Authorization/Bearer {SECRET}"))
                .arg("--modify-body")
                .arg(format!("/~s/{SECRET}/{}", "*".repeat(SECRET.len())));
        }
        Self::start(&ground.middle, command, directory, port).map(Some)
    }

    fn start(namespace: &Namespace, mut command: Command, directory: TempDir, port: u16) -> Result<Self> {
        let shown = format!("{command:?}");
        command.stdin(Stdio::null()).env("HOME", directory.path());
        let child = namespace
            .run(move || command.spawn())
            .with_context(|| shown.clone())?;
        let peer = Self { child, directory };
        let listens = wait::within(PATIENCE, || {
            let to = SocketAddrV4::new(MIDDLE, port);
            namespace
                .run(move || std::net::TcpStream::connect(to))
                .ok()
                .map(drop)
        });
        ensure!(listens.is_some(), "{shown} does not listen");
        Ok(peer)
    }

    /// The authority it signs with, and the world's, for a client behind it.
    pub(crate) fn authorities(&self) -> std::path::PathBuf {
        self.directory.path().join("clients.pem")
    }
}

/// One that its user may enter, whoever that is.
fn directory() -> Result<TempDir> {
    let directory = TempDir::new()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    Ok(directory)
}

/// An authority: certificate and key in the named file, the certificate for clients beside it.
fn authority(directory: &Path, name: &str) -> Result<()> {
    let mut params = CertificateParams::new(Vec::new())?;
    params
        .distinguished_name
        .push(DnType::CommonName, "a peer of the benchmarks");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?.pem();
    fs::write(
        directory.join(name),
        format!("{}{certificate}", key.serialize_pem()),
    )?;
    fs::write(directory.join("clients.pem"), certificate)?;
    Ok(())
}

/// Sends what comes for the port of somebody else to one here.
fn redirect(namespace: &Namespace, from: u16, to: u16) -> Result<()> {
    let table = format!("peer{from}");
    for arguments in [
        vec!["add", "table", "ip", &table],
        vec![
            "add",
            "chain",
            "ip",
            &table,
            "way",
            "{ type nat hook prerouting priority dstnat; }",
        ],
        vec![
            "add",
            "rule",
            "ip",
            &table,
            "way",
            "iifname",
            "inner",
            "tcp",
            "dport",
            &from.to_string(),
            "redirect",
            "to",
            &format!(":{to}"),
        ],
    ] {
        let output = namespace.command("nft", &arguments)?;
        ensure!(
            output.status.success(),
            "nft {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
