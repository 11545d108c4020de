//! The self-test host: a server of netd's own, with which programs in a sandbox find out whether they trust the
//! sandbox's authority. Owns: flows to the gateway's port 443, which the kernel steers here whatever the policy says.
//! Such a flow is never judged and never dialled: no byte of it goes further than this file, so there is nothing to
//! allow. It counts against the limits of the sandbox like any other. What is answered is not recorded; whoever wants
//! something else of the gateway is, as a refusal.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, server::Acceptor};
use sandgate_api::{
    id::SandboxId,
    rest::{DOCTOR, DOCTOR_HOST, SelfTest},
};
use sandgate_policy::{DomainName, Reason};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use super::{Egress, refuse};
use crate::{
    audit::{Attempt, Owner},
    intercept::{
        authority::{Authority, AuthorityError},
        leases::Unavailable,
    },
    router::GATEWAY,
    sandbox::{Decision, Sandbox},
};

/// From the connection to its end.
const WHOLE_TIME: Duration = Duration::from_secs(15);
/// Until the client has said whom it wants.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Of a request; more is no client that we know.
const HEADERS_MAX: usize = 50;
const BUFFER: usize = 16 * 1024;
/// What Git asks first of a repository that is plain files; an empty one has an empty list.
const GIT_REFERENCES: &str = "/info/refs";

static HOST: LazyLock<DomainName> =
    LazyLock::new(|| DomainName::parse(DOCTOR_HOST).expect("a constant that is a name"));

/// Why a flow was closed without an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("it does not begin as TLS does: {0}")]
    NoGreeting(io::Error),
    #[error("the gateway is not the host that it names")]
    AnotherHost(Option<String>),
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("no request that is answered here: {0}")]
    Request(#[from] hyper::Error),
}

/// Whether a flow to this address is answered here.
pub(super) fn is_for(to: SocketAddr) -> bool {
    to == SocketAddr::new(GATEWAY.into(), netd_common::SELF_TEST_PORT)
}

impl Unanswered {
    /// How it is recorded when the gateway was wanted for something else.
    fn attempt(&self) -> Option<Attempt> {
        let (protocol, host) = match self {
            Self::NoGreeting(_) => ("tcp", None),
            Self::AnotherHost(host) => ("tls", host.clone()),
            Self::Handshake(_) | Self::Unavailable(_) | Self::Authority(_) | Self::Request(_) => return None,
        };
        Some(Attempt {
            host,
            ..attempt(protocol, self.to_string())
        })
    }
}

fn attempt(protocol: &'static str, detail: String) -> Attempt {
    Attempt {
        protocol,
        ip: Some(GATEWAY.into()),
        port: Some(netd_common::SELF_TEST_PORT),
        detail: Some(detail),
        ..Attempt::default()
    }
}

impl Egress {
    /// Answers a flow to the self-test host.
    pub(super) async fn examine(&self, sandbox: &Arc<Sandbox>, near: TcpStream) {
        let limits = &sandbox.limits;
        let slots = Arc::clone(&limits.flows)
            .try_acquire_owned()
            .and_then(|flow| Ok((flow, Arc::clone(&limits.intercepted).try_acquire_owned()?)));
        let Ok(_slots) = slots else {
            refuse(&near);
            let attempt = attempt("tcp", "too many connections at once".to_owned());
            self.audit
                .deny(&Owner::of(sandbox), &Decision::of(Reason::Quota), attempt, 1);
            return;
        };
        let end = self.tasks.shutdown();
        let answered = tokio::select! {
            answered = tokio::time::timeout(WHOLE_TIME, self.converse(sandbox, near)) => answered,
            () = end.cancelled() => return,
        };
        let error = match answered {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_elapsed) => {
                tracing::debug!(sandbox_id = %sandbox.id, "a self-test took too long");
                return;
            }
        };
        tracing::debug!(sandbox_id = %sandbox.id, %error, "a self-test was not answered");
        if let Some(attempt) = error.attempt() {
            let decision = Decision::of(Reason::PlatformDenied);
            self.audit.deny(&Owner::of(sandbox), &decision, attempt, 1);
        }
    }

    async fn converse(&self, sandbox: &Sandbox, near: TcpStream) -> Result<(), Unanswered> {
        let begun = greet(near).await?;
        let leased = sandbox
            .leases
            .authority(&*self.broker, &sandbox.id, sandbox.generation());
        let server = server(&*leased.await?)?;
        answer(begun, server, &sandbox.id).await
    }
}

/// Reads the client's first message, which must be for the self-test host.
async fn greet<S>(near: S) -> Result<StartHandshake<S>, Unanswered>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let greeting = tokio::time::timeout(GREETING_TIME, LazyConfigAcceptor::new(Acceptor::default(), near));
    let begun = greeting
        .await
        .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
        .map_err(Unanswered::NoGreeting)?;
    let named = begun.client_hello().server_name().map(str::to_owned);
    let ours = named.as_deref().map(DomainName::parse);
    if ours.is_some_and(|name| name.is_ok_and(|name| name == *HOST)) {
        Ok(begun)
    } else {
        Err(Unanswered::AnotherHost(named))
    }
}

/// As for any host whose requests are read, but for HTTP/1.1 alone.
fn server(authority: &Authority) -> Result<Arc<ServerConfig>, AuthorityError> {
    let mut server = ServerConfig::clone(&*authority.server(&HOST)?);
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(server))
}

/// Answers one request.
async fn answer<S>(
    begun: StartHandshake<S>,
    server: Arc<ServerConfig>,
    id: &SandboxId,
) -> Result<(), Unanswered>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = begun.into_stream(server).await.map_err(Unanswered::Handshake)?;
    let service = service_fn(async |request| respond(&request, id));
    http1::Builder::new()
        .keep_alive(false)
        .header_read_timeout(None)
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service)
        .await?;
    Ok(())
}

/// Says who asks. An error closes the connection.
fn respond<B>(request: &Request<B>, id: &SandboxId) -> Result<Response<Full<Bytes>>, &'static str> {
    if request.method() != Method::GET {
        return Err("not a GET");
    }
    let (kind, body) = if request.uri().path() == GIT_REFERENCES {
        ("text/plain", Bytes::new())
    } else {
        let said = SelfTest {
            sandgate: DOCTOR.to_owned(),
            sandbox_id: id.clone(),
        };
        let said = serde_json::to_vec(&said).map_err(|_never| "an answer that cannot be written")?;
        ("application/json", said.into())
    };
    Response::builder()
        .header(header::CONTENT_TYPE, kind)
        .header(header::CACHE_CONTROL, "no-store")
        .body(Full::from(body))
        .map_err(|_never| "an answer that cannot be written")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rustls::{ClientConfig, pki_types::ServerName};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::intercept::{authority, provider};

    /// A sandbox's authority, and a client that trusts it.
    fn trust() -> (Authority, TlsConnector) {
        let (authority, roots) = authority::tests::authority();
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        (authority, TlsConnector::from(Arc::new(client)))
    }

    async fn host(near: DuplexStream, authority: &Authority, id: &SandboxId) -> Result<(), Unanswered> {
        let begun = greet(near).await?;
        answer(begun, server(authority)?, id).await
    }

    /// What a client that asks for `name` and sends `request` gets, and how the host's half ended.
    async fn ask(
        name: &'static str,
        request: &str,
        id: &SandboxId,
    ) -> (Option<String>, Result<(), Unanswered>) {
        let (authority, client) = trust();
        let (far, near) = tokio::io::duplex(4096);
        let asking = async {
            let name = ServerName::try_from(name).expect("a name");
            let mut stream = client.connect(name, far).await.ok()?;
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
            stream.write_all(request.as_bytes()).await.expect("written");
            let mut text = String::new();
            stream.read_to_string(&mut text).await.ok()?;
            Some(text)
        };
        tokio::join!(asking, host(near, &authority, id))
    }

    #[tokio::test]
    async fn a_get_is_told_who_asks() {
        let id = SandboxId::random();
        let request =
            format!("GET /anything?x HTTP/1.1\r\nhost: {DOCTOR_HOST}\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        let (text, ended) = ask(DOCTOR_HOST, &request, &id).await;
        ended.expect("answered");
        let text = text.expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{text}");
        // One answer, whatever else was sent.
        let said: SelfTest = serde_json::from_str(body).expect("JSON and nothing else");
        assert_eq!((said.sandgate.as_str(), said.sandbox_id), (DOCTOR, id));
    }

    #[tokio::test]
    async fn git_finds_an_empty_repository() {
        let request =
            format!("GET /info/refs?service=git-upload-pack HTTP/1.1\r\nhost: {DOCTOR_HOST}\r\n\r\n");
        let (text, _ended) = ask(DOCTOR_HOST, &request, &SandboxId::random()).await;
        let text = text.expect("an answer");
        assert!(
            text.starts_with("HTTP/1.1 200 OK") && text.ends_with("\r\n\r\n"),
            "{text}"
        );
        assert!(text.contains("content-length: 0"), "{text}");
    }

    #[tokio::test]
    async fn whatever_else_is_asked_is_closed() {
        for request in [
            "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
            "CONNECT evil.test:443 HTTP/1.1\r\n\r\n",
        ] {
            let (text, ended) = ask(DOCTOR_HOST, request, &SandboxId::random()).await;
            assert!(
                matches!(ended, Err(Unanswered::Request(_))),
                "{request}: {ended:?}"
            );
            assert!(text.is_none_or(|text| text.is_empty()), "{request}");
        }
        for name in ["evil.test", "x.doctor.sandgate.internal"] {
            let (text, ended) = ask(name, "", &SandboxId::random()).await;
            assert!(
                matches!(&ended, Err(Unanswered::AnotherHost(Some(said))) if said == name),
                "{name}: {ended:?}"
            );
            assert_eq!(text, None);
        }
    }

    #[tokio::test]
    async fn no_tls_is_closed() {
        let (mut far, near) = tokio::io::duplex(4096);
        let (authority, _client) = trust();
        far.write_all(b"GET / HTTP/1.1\r\nHost: doctor.sandgate.internal\r\n\r\n")
            .await
            .expect("written");
        let ended = host(near, &authority, &SandboxId::random()).await;
        assert!(matches!(ended, Err(Unanswered::NoGreeting(_))), "{ended:?}");
    }

    #[tokio::test]
    async fn only_what_is_not_for_the_host_is_recorded() {
        let another = Unanswered::AnotherHost(Some("evil.test".to_owned()));
        let recorded = another.attempt().expect("a record");
        assert_eq!(
            (
                recorded.protocol,
                recorded.host.as_deref(),
                recorded.ip,
                recorded.port
            ),
            ("tls", Some("evil.test"), Some(GATEWAY.into()), Some(443))
        );
        assert!(
            Unanswered::NoGreeting(io::ErrorKind::TimedOut.into())
                .attempt()
                .is_some()
        );
        // A client that does not trust the authority is what the host is there to find.
        assert!(
            Unanswered::Handshake(io::ErrorKind::InvalidData.into())
                .attempt()
                .is_none()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_not_waited_for() {
        let (_far, near) = tokio::io::duplex(4096);
        let (authority, _client) = trust();
        let ended = host(near, &authority, &SandboxId::random()).await;
        assert!(matches!(ended, Err(Unanswered::NoGreeting(_))), "{ended:?}");
    }

    #[test]
    fn only_one_port_of_the_gateway_is_ours() {
        assert!(is_for(SocketAddr::new(GATEWAY.into(), 443)));
        assert!(!is_for(SocketAddr::new(GATEWAY.into(), 80)));
        assert!(!is_for(SocketAddr::new(
            Ipv4Addr::new(169, 254, 1, 2).into(),
            443
        )));
    }
}
