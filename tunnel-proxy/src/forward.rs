//! One request: whose it is, whether it may, where it goes, what comes back. Owns: the order of those steps. Nothing
//! reaches a sandbox before its tunnel's access check.

pub mod body;
pub mod headers;
pub mod upgrade;

use std::sync::Arc;

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST},
    request::Parts,
    uri,
};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use sandgate_api::tunnel::TunnelProtocol;
use sandgate_relay::http1::strict::Notes;

use self::{
    body::{Body, Downward, Upward},
    headers::Hop,
};
use crate::{
    access::{Access, Verdict},
    account::{Account, Spoken},
    answer::{self, Problem, REQUEST_ID},
    connection::{Connection, Entrance},
    host,
    tunnel::Tunnel,
};

/// A request of HTTP/1.1: which one of its connection, and what the filter in front says about it.
pub struct Http1 {
    /// Counted from 0.
    pub ordinal: u64,
    /// The filter's.
    pub notes: Arc<Notes>,
}

/// Answers one request.
pub async fn answer(
    connection: Arc<Connection>,
    request: Request<Incoming>,
    http1: Option<Http1>,
) -> Response<Body> {
    let request_id = answer::given_id(request.headers()).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let spoken = if http1.is_some() {
        Spoken::Http1
    } else {
        Spoken::Http2
    };
    let metrics = &connection.proxy.metrics;
    let account = Arc::new(Account::open(
        metrics,
        request_id,
        spoken,
        request.method().as_str(),
    ));
    account.hold(connection.begin(http1.as_ref().map(|http1| Arc::clone(&http1.notes))));
    let page = answer::wants_page(request.headers());
    let upgrades = http1.is_some() && upgrade::asked(&request).is_some();
    let mut response = match exchange(&connection, &account, request, http1.as_ref()).await {
        Ok(response) => response,
        Err(problem) => {
            account.refused(&problem);
            let mut answer = problem.answer(&account.request_id, page, http1.is_some());
            // Whoever was let in nowhere yet does not keep its place.
            if !connection.is_allowed() {
                if http1.is_some() {
                    answer
                        .headers_mut()
                        .insert(CONNECTION, HeaderValue::from_static("close"));
                } else {
                    connection.dismiss();
                }
            }
            answer
        }
    };
    if let Some(http1) = http1.filter(|_| upgrades) {
        http1
            .notes
            .settle_upgrade(response.status() == StatusCode::SWITCHING_PROTOCOLS);
    }
    if let Ok(id) = HeaderValue::from_str(&account.request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn exchange(
    connection: &Arc<Connection>,
    account: &Arc<Account>,
    mut request: Request<Incoming>,
    http1: Option<&Http1>,
) -> Result<Response<Body>, Problem> {
    let asked = http1.and_then(|_| upgrade::asked(&request));
    let near = asked.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    // From here on whoever is refused can finish what it says, and then read why.
    let (body, broken) = Upward::new(body, Arc::clone(account), connection.proxy.tasks.clone());
    if let Some(why) = http1.and_then(|http1| http1.notes.broken(http1.ordinal)) {
        return Err(Problem::unreadable(why));
    }
    if let Some(problem) = &connection.refusal {
        return Err(problem.clone());
    }
    if parts.method == Method::CONNECT {
        return Err(Problem::Connect);
    }
    let host = authority(&parts)?;
    let tunnel = find(connection, account, &host, &parts.headers)?;
    connection.allow();
    let place = tunnel
        .enter(connection.kill.clone())
        .map_err(|_full| Problem::TunnelFull)?;
    account.takes(place);

    let is_head = parts.method == Method::HEAD;
    let hop = Hop {
        peer: connection.peer,
        scheme: connection.proxy.scheme,
        host: &host,
        request_id: &account.request_id,
    };
    let accesses = accesses(connection, &tunnel);
    headers::to_sandbox(&mut parts.headers, &accesses, &hop);
    if let Some(protocol) = &asked {
        headers::upgrade_to(&mut parts.headers, protocol.clone());
    }
    parts.extensions.clear();
    let request = Request::from_parts(parts, body.to_sandbox(accesses).boxed_unsync());

    let upstream = &connection.proxy.upstream;
    let sending = async {
        match tunnel.protocol {
            TunnelProtocol::H2c if asked.is_none() => {
                let answer = upstream.send_http2(&tunnel, request).await?;
                Ok((answer, None))
            }
            TunnelProtocol::Http | TunnelProtocol::H2c | TunnelProtocol::Tcp => {
                let (answer, home) = if asked.is_some() {
                    upstream.send_alone(&tunnel, request).await?
                } else {
                    upstream.send(&tunnel, request).await?
                };
                Ok((answer, Some(home)))
            }
        }
    };
    let sent = tokio::select! {
        sent = sending => sent,
        () = tunnel.end().cancelled() => return Err(ended(&tunnel)),
    };
    let (answer, home) = match sent {
        Ok(sent) => sent,
        Err(_) if broken.is_set() => return Err(Problem::unreadable("a broken request body")),
        Err(_) if tunnel.end().is_cancelled() => return Err(ended(&tunnel)),
        Err(error) => {
            tracing::debug!(tunnel_id = %tunnel.id, %error, "a request was not answered");
            return Err(Problem::upstream(&error, tunnel.port));
        }
    };
    account.answered(answer.status());
    let host = host.to_str().unwrap_or_default();
    match near {
        Some(near) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            return Ok(upgrade::agree(connection, &tunnel, account, near, answer, host));
        }
        // Nobody asked for another protocol.
        None if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            return Err(Problem::Broken(tunnel.port));
        }
        Some(_) | None => {}
    }
    let (mut parts, body) = answer.into_parts();
    headers::to_client(&mut parts.headers, host);
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    // The length of a body is said by its framing, which is made anew.
    if !is_head && parts.status != StatusCode::NOT_MODIFIED && body.size_hint().exact().is_none() {
        parts.headers.remove(CONTENT_LENGTH);
    }
    let resets = http1.map(|_| connection.resets.clone());
    let end = tunnel.end().clone();
    let body = Downward::new(body, Arc::clone(account), end, home, resets).to_client(host);
    Ok(Response::from_parts(parts, body.boxed_unsync()))
}

fn ended(tunnel: &Tunnel) -> Problem {
    if tunnel.is_expired() {
        Problem::Expired
    } else {
        Problem::Closed
    }
}

/// The one authority that a request is for.
fn authority(request: &Parts) -> Result<HeaderValue, Problem> {
    let malformed = || Problem::Malformed("not exactly one authority");
    let mut hosts = request.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(malformed());
    }
    let authority = request.uri.authority().map(uri::Authority::as_str);
    match (host, authority) {
        (Some(host), Some(authority)) if !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()) => {
            Err(malformed())
        }
        (Some(host), _) if host.to_str().is_ok_and(|host| !host.is_empty()) => Ok(host.clone()),
        (Some(_), _) | (None, None) => Err(malformed()),
        (None, Some(authority)) if authority.contains('@') => Err(malformed()),
        (None, Some(authority)) => HeaderValue::from_str(authority).map_err(|_invalid| malformed()),
    }
}

/// Of every tunnel to the same port: a token of any of them opens that port, and none is for the program behind it.
fn accesses(connection: &Connection, tunnel: &Tunnel) -> Vec<Access> {
    let table = &connection.proxy.table;
    let all = table.by_port(tunnel.sandbox_id.clone(), tunnel.port);
    // It may just have been removed.
    let own = std::iter::once(tunnel.access.clone());
    own.chain(all.iter().map(|other| other.access.clone())).collect()
}

/// The tunnel that a request is for and may use.
fn find(
    connection: &Connection,
    account: &Account,
    host: &HeaderValue,
    headers: &HeaderMap,
) -> Result<Arc<Tunnel>, Problem> {
    let candidates = match &connection.entrance {
        Entrance::Own(tunnel) => vec![Arc::clone(tunnel)],
        Entrance::Shared => {
            let host = host.to_str().map_err(|_invalid| Problem::Unknown)?;
            let (sandbox, port) = host::read(host, &connection.proxy.domain).ok_or(Problem::Unknown)?;
            connection.proxy.table.by_host(sandbox, port)
        }
    };
    let mut problem = Problem::Unknown;
    for tunnel in candidates {
        if !tunnel.is_open() {
            if problem == Problem::Unknown {
                account.concerns(&tunnel);
                problem = ended(&tunnel);
            }
            continue;
        }
        match tunnel.access.judge(headers) {
            Verdict::Allowed => {
                account.concerns(&tunnel);
                return Ok(tunnel);
            }
            Verdict::Wrong => problem = Problem::TokenWrong,
            Verdict::Missing => problem = Problem::TokenMissing,
        }
        account.concerns(&tunnel);
    }
    Err(problem)
}
