//! One request: checked, judged, given its secrets, forwarded. Owns: the order of those steps. Nothing reaches
//! the server before the rules allow it, and nothing but the canonical path that they judged.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, LazyLock, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    header::{EXPECT, HOST},
    request::Parts,
    uri::PathAndQuery,
};
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use sandgate_policy::{NormalPath, Reason};
use sandgate_relay::{headers, redact::Needles};

use super::{
    Body, BodyError, Flow, FlowTasks, HEADERS_MAX, World,
    account::Account,
    answer::Refusal,
    bindings::Bindings,
    doh,
    inject::{MARKED, Misuse, Outgoing, is_marked},
    leases::Unavailable,
    response, upgrade,
    upstream::UpstreamError,
};
use crate::sandbox::{Decision, Judgement, OverQuota, RequestFacts};

/// How much, and for how long, is read of a body that goes nowhere.
const DISCARDED_MAX: usize = 32 << 20;
const DISCARDING_TIME: Duration = Duration::from_secs(30);
/// Headers by which some servers read another method than the one that is sent.
const METHOD_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

/// Answers one request. `ordinal` counts those of a connection of HTTP/1.1 from 0.
pub(super) async fn answer(
    flow: Arc<Flow>,
    request: Request<Incoming>,
    ordinal: Option<u64>,
) -> Response<Body> {
    let account = Account::open(Arc::clone(&flow.world), &method_text(request.method()));
    let upgrades = ordinal.is_some() && upgrade::is_asked(request.headers());
    let answer = match exchange(&flow, &account, request, ordinal, upgrades).await {
        Ok(response) => response,
        Err(refusal) => refusal.answer(&flow, &account, ordinal.is_some()),
    };
    if upgrades {
        flow.notes
            .settle_upgrade(answer.status() == StatusCode::SWITCHING_PROTOCOLS);
    }
    answer
}

/// The method as it is recorded: a short text.
fn method_text(method: &Method) -> String {
    method.as_str().chars().take(32).collect()
}

async fn exchange(
    flow: &Arc<Flow>,
    account: &Arc<Account>,
    mut request: Request<Incoming>,
    ordinal: Option<u64>,
    upgrades: bool,
) -> Result<Response<Body>, Refusal> {
    if let Some(why) = ordinal.and_then(|ordinal| flow.notes.broken(ordinal)) {
        return Err(Refusal::malformed(why));
    }
    check_authority(flow, &request)?;
    let client_upgrade = upgrades.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let fate = Arc::new(OnceLock::new());
    let body = Upward {
        inner: Some(body),
        world: Arc::clone(&flow.world),
        account: Arc::clone(account),
        tasks: flow.tasks.clone(),
        fate: Arc::clone(&fate),
        tail: Vec::new(),
    };
    if parts.headers.len() > HEADERS_MAX {
        return Err(Refusal::malformed("more than 100 fields"));
    }
    let (path, readable) = path(flow, &parts)?;
    let facts = RequestFacts {
        method: method_text(&parts.method),
        path,
        upgrade: upgrades,
    };
    let leave = flow.world.admit(facts.clone()).map_err(|decision| {
        account.path(facts.path.as_str());
        let message = match &decision.rule {
            Some(rule) => format!("{} {} is not allowed by {rule}", facts.method, facts.path),
            None => format!("{} {} is not allowed", facts.method, facts.path),
        };
        Refusal::denied(decision, message)
    })?;
    // In clear, what no rule looks at goes on as it came, and is nobody's business.
    let is_read = flow.target.is_secure() || leave.judgement.intercept;
    if is_read && readable.is_ok() {
        account.path(facts.path.as_str());
    }
    let (path, query) = match readable {
        Ok(query) if is_read => (facts.path.as_str().to_owned(), query),
        Err(why) if is_read => return Err(Refusal::malformed(&why)),
        Ok(_) | Err(_) => as_sent(&parts),
    };
    if doh::is_question(&facts.path, query.as_deref(), &parts.headers) {
        let message = "DNS goes by the resolver of the sandbox, not by HTTPS";
        return Err(Refusal::of(StatusCode::FORBIDDEN, Reason::DnsRefused, message));
    }
    if !flow.world.has_room() && !flow.world.fails_open() {
        let message = "the audit has no room for more records";
        return Err(Refusal::of(
            StatusCode::SERVICE_UNAVAILABLE,
            Reason::Quota,
            message,
        ));
    }
    let mut outgoing = Outgoing {
        path,
        query,
        headers: parts.headers,
    };
    headers::strip_hop_by_hop(&mut outgoing.headers);
    // The client gets its 100 from us once the body is wanted.
    outgoing.headers.remove(EXPECT);
    // What was judged is the method, not one in disguise.
    for name in METHOD_OVERRIDES.iter().filter(|_| is_read) {
        outgoing.headers.remove(*name);
    }
    let sent = flow.world.spend(size(&facts.method, &outgoing));
    let beyond = sent.map_err(Refusal::over)?;
    let (needles, overused) = inject(
        flow,
        account,
        &mut outgoing,
        &facts,
        &leave.bindings,
        &leave.judgement,
    )
    .await?;
    let mut decision = leave.judgement.decision;
    if decision.reason == Reason::Allowed
        && let Some(noted) = beyond.or(overused)
    {
        decision = noted;
    }
    account.admitted(decision, leave.books);
    if upgrades {
        upgrade::ask_again(&mut outgoing.headers);
    }
    let mut forwarded = Request::new(body.boxed_unsync());
    *forwarded.method_mut() = parts.method;
    *forwarded.uri_mut() = target(&outgoing)?;
    *forwarded.headers_mut() = outgoing.headers;
    let sent = if upgrades {
        flow.upstream.send_upgrade(forwarded).await
    } else {
        flow.upstream.send(forwarded).await
    };
    let (answer, home) = sent.map_err(|error| refusal(&error, fate.get()))?;
    match client_upgrade {
        Some(near) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            upgrade::agree(flow, account, near, answer, needles)
        }
        Some(_) | None => response::finish(account, answer, home, needles, &facts.method),
    }
}

/// One authority, and the one for which the certificate was shown.
fn check_authority(flow: &Flow, request: &Request<Incoming>) -> Result<(), Refusal> {
    let malformed = || Refusal::malformed("not exactly one authority");
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() || request.method() == Method::CONNECT {
        return Err(malformed());
    }
    let host = host.map(|host| host.to_str().map_err(|_not_text| malformed()));
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    let said = match (host.transpose()?, authority) {
        (Some(host), Some(authority)) if !host.eq_ignore_ascii_case(authority) => return Err(malformed()),
        (Some(said), _) | (None, Some(said)) => said,
        (None, None) => return Err(malformed()),
    };
    if flow.target.is_meant_by(said) {
        return Ok(());
    }
    Err(Refusal::of(
        StatusCode::MISDIRECTED_REQUEST,
        Reason::HostMismatch,
        format!("this connection is for {}", flow.target.authority()),
    ))
}

/// The canonical path, and the query or why there is no such path. In clear, where perhaps no rule looks at paths, one
/// that can be read in two ways is judged as `/`; a rule that does look then refuses the request.
fn path(flow: &Flow, parts: &Parts) -> Result<(NormalPath, Result<Option<String>, String>), Refusal> {
    let target = parts.uri.path_and_query().map_or("", PathAndQuery::as_str);
    let broken = |error| Refusal::malformed(&format!("the path {error}"));
    match NormalPath::parse(target) {
        Ok((path, query)) => Ok((path, Ok(query.map(str::to_owned)))),
        Err(error) if flow.target.is_secure() => Err(broken(error)),
        Err(error) => {
            let (root, _) = NormalPath::parse("/").map_err(broken)?;
            Ok((root, Err(format!("the path {error}"))))
        }
    }
}

/// Path and query as the client wrote them.
fn as_sent(parts: &Parts) -> (String, Option<String>) {
    let target = parts.uri.path_and_query();
    let path = target.map_or("/", PathAndQuery::path).to_owned();
    (path, target.and_then(PathAndQuery::query).map(str::to_owned))
}

fn target(outgoing: &Outgoing) -> Result<Uri, Refusal> {
    let text = match &outgoing.query {
        Some(query) => format!("{}?{query}", outgoing.path),
        None => outgoing.path.clone(),
    };
    text.parse()
        .map_err(|_invalid: http::uri::InvalidUri| Refusal::malformed("not a request target"))
}

/// Bytes of a request's head as the sandbox made it.
fn size(method: &str, outgoing: &Outgoing) -> usize {
    let query = outgoing.query.as_ref().map_or(0, |query| 1 + query.len());
    // Two spaces and a line's end.
    method.len() + outgoing.path.len() + query + 4 + headers_size(&outgoing.headers)
}

/// With a colon, a space and a line's end for each.
fn headers_size(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum()
}

/// Puts the secrets in; returns what must not come back, and the denial of a tier in audit mode if they were used too
/// often for it.
async fn inject(
    flow: &Flow,
    account: &Account,
    outgoing: &mut Outgoing,
    facts: &RequestFacts,
    bindings: &Bindings,
    judgement: &Judgement,
) -> Result<(Arc<Needles>, Option<Decision>), Refusal> {
    let port = flow.target.to.port();
    let name = flow.target.name.as_ref().filter(|_| flow.target.is_secure());
    let Some(name) = name else {
        return in_clear(outgoing, bindings, judgement);
    };
    let own = bindings.for_request(name, port, &facts.head());
    let plan = outgoing
        .plan(bindings, &own, &judgement.credentials)
        .map_err(|misuse| misused(&misuse))?;
    let mut needed = plan.secrets();
    for required in &judgement.credentials {
        if !needed.contains(required.as_str()) {
            return Err(unavailable(required, "it is not bound to this request"));
        }
    }
    account.credential(&needed.iter().copied().collect::<Vec<_>>());
    let overused = flow.world.use_secrets(&needed).map_err(Refusal::over)?;
    let written = needed.clone();
    // A server that had a value from another request must not hand it back in the answer to this one.
    needed.extend(bindings.for_host(name, port).map(|bound| bound.secret.as_str()));
    let mut values = BTreeMap::new();
    for secret in needed {
        let version = bindings.version(secret).unwrap_or_default();
        match flow.world.lease(secret, version).await {
            Ok(lease) => {
                if written.contains(secret) {
                    values.insert(secret.to_owned(), lease.value);
                }
            }
            Err(error) if flow.world.fails_open() => {
                account.note(format!("without {secret}: {error}"));
            }
            Err(error) => return Err(credential(secret, &error)),
        }
    }
    account.credential(&values.keys().map(String::as_str).collect::<Vec<_>>());
    outgoing
        .write(&plan, &values)
        .map_err(|_invalid| unavailable("the secret", "its value does not fit into a header"))?;
    let needles = flow.world.needles();
    if !needles.is_empty() {
        headers::prepare_redacted_request(&mut outgoing.headers);
    }
    Ok((needles, overused))
}

/// No secret goes out in clear, so that none can come back: a rule that wants one denies the request.
fn in_clear(
    outgoing: &mut Outgoing,
    bindings: &Bindings,
    judgement: &Judgement,
) -> Result<(Arc<Needles>, Option<Decision>), Refusal> {
    static NONE: LazyLock<Arc<Needles>> = LazyLock::new(|| Arc::new(Needles::new(Vec::new())));
    if !judgement.credentials.is_empty() {
        let decision = judgement.decision.clone().because(Reason::CredentialUnavailable);
        let message = "its rule wants a secret, which never goes out in clear";
        return Err(Refusal::denied(decision, message.to_owned()));
    }
    outgoing
        .plan(bindings, &[], &[])
        .map_err(|misuse| misused(&misuse))?;
    Ok((Arc::clone(&NONE), None))
}

fn misused(misuse: &Misuse) -> Refusal {
    let whose = match &misuse.0 {
        Some(secret) => format!("the placeholder of {secret}"),
        None => "the placeholder of a secret that this sandbox does not have".to_owned(),
    };
    let message = format!("{whose} stands where its binding does not put the value");
    Refusal::denied(Decision::of(Reason::PlaceholderMisuse), message)
}

fn credential(secret: &str, error: &Unavailable) -> Refusal {
    unavailable(secret, &error.to_string())
}

fn unavailable(secret: &str, why: &str) -> Refusal {
    Refusal::of(
        StatusCode::SERVICE_UNAVAILABLE,
        Reason::CredentialUnavailable,
        format!("{secret} cannot be used now: {why}"),
    )
}

fn refusal(error: &UpstreamError, fate: Option<&Fate>) -> Refusal {
    match fate {
        Some(Fate::Misuse) => {
            let message = "a placeholder stands in the body, where no binding puts a value";
            let mut refusal = Refusal::denied(Decision::of(Reason::PlaceholderMisuse), message.to_owned());
            refusal.closes = true;
            refusal
        }
        Some(Fate::Broken) => Refusal::malformed("a broken request body"),
        Some(Fate::Over(over)) => {
            let mut refusal = Refusal::over(over.clone());
            refusal.closes = true;
            refusal
        }
        None => Refusal::of(StatusCode::BAD_GATEWAY, error.reason(), error.to_string()),
    }
}

/// Why a request's body did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    /// It holds a placeholder.
    Misuse,
    /// The client did not finish it, or not well.
    Broken,
    /// It is more than may go to the host.
    Over(OverQuota),
}

/// A request's body on its way to the server: counted, and searched for placeholders as it streams.
struct Upward {
    /// Until it is dropped.
    inner: Option<Incoming>,
    world: Arc<dyn World>,
    account: Arc<Account>,
    tasks: FlowTasks,
    fate: Arc<OnceLock<Fate>>,
    /// The last bytes that went on, in which a placeholder may have begun.
    tail: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
#[error("the request body was given up")]
struct GivenUp;

impl Upward {
    fn give_up(&self, fate: Fate) -> BodyError {
        // The first one stands.
        let _again = self.fate.set(fate);
        Box::new(GivenUp)
    }

    fn is_misused(&mut self, data: &[u8]) -> bool {
        let begun = self.tail.len();
        // The tail and as much as a placeholder may need to end; then the data by itself.
        self.tail.extend_from_slice(&data[..data.len().min(MARKED)]);
        if is_marked(&self.tail) || is_marked(data) {
            return true;
        }
        if data.len() >= MARKED {
            self.tail.clear();
            self.tail.extend_from_slice(&data[data.len() - (MARKED - 1)..]);
        } else {
            let excess = self.tail.len().saturating_sub(MARKED - 1);
            self.tail.drain(..excess.min(begun + data.len()));
        }
        false
    }
}

impl HttpBody for Upward {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        let frame = match std::task::ready!(Pin::new(inner).poll_frame(cx)) {
            None => return Poll::Ready(None),
            Some(Err(_broken)) => return Poll::Ready(Some(Err(self.give_up(Fate::Broken)))),
            Some(Ok(frame)) => frame,
        };
        let (misused, length) = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => {
                let data = data.clone();
                (self.is_misused(&data), data.len())
            }
            (None, Some(trailers)) => (is_marked_anywhere(trailers), headers_size(trailers)),
            (None, None) => (false, 0),
        };
        if let Err(over) = self.world.spend(length) {
            self.account.cut(over.decision.clone(), over.detail.clone());
            return Poll::Ready(Some(Err(self.give_up(Fate::Over(over)))));
        }
        if frame.is_data() {
            self.account.add_up(length);
        }
        Poll::Ready(Some(if misused {
            Err(self.give_up(Fate::Misuse))
        } else {
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner
            .as_ref()
            .map_or_else(SizeHint::default, HttpBody::size_hint)
    }
}

impl Drop for Upward {
    fn drop(&mut self) {
        if let Some(rest) = self.inner.take().filter(|rest| !rest.is_end_stream()) {
            self.tasks.spawn("rest of a body", discard(rest));
        }
    }
}

/// Reads away what a client still sends after the answer was decided: many clients look at an answer only when
/// they are done, and take a connection that is closed before for a failure.
async fn discard(mut rest: Incoming) {
    let mut left = DISCARDED_MAX;
    let reading = async {
        while left > 0 && !rest.is_end_stream() {
            let Some(Ok(frame)) = rest.frame().await else {
                return;
            };
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        }
    };
    // Who is still sending then has its connection closed.
    let _elapsed = tokio::time::timeout(DISCARDING_TIME, reading).await;
}

fn is_marked_anywhere(headers: &HeaderMap) -> bool {
    headers.values().any(|value| is_marked(value.as_bytes()))
}
