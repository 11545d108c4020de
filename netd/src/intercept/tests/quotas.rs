//! Quotas on requests that are read.

use hyper::client::conn::http1::SendRequest;
use serde_json::{Value, json};

use super::*;

fn counted(quotas: &Value, enforcement: &str) -> Value {
    json!({ "mode": "allow_all", "quotas": quotas, "enforcement": enforcement })
}

async fn place(quotas: &Value, enforcement: &str) -> Place {
    let plan = Plan {
        policy: counted(quotas, enforcement),
        ..open_world(vec![binding(bearer(), 1)])
    };
    Place::make(plan, |_seen: &Seen| Response::new(Full::from("answer"))).await
}

fn post(length: usize) -> Request<Full<Bytes>> {
    Request::post("/upload")
        .header("host", NAME)
        .body(Full::from(vec![b'x'; length]))
        .expect("a request")
}

async fn ask(client: &mut SendRequest<Full<Bytes>>, request: Request<Full<Bytes>>) -> (StatusCode, String) {
    client.ready().await.expect("kept open");
    read(client.send_request(request).await.expect("an answer")).await
}

#[tokio::test]
async fn a_secret_is_used_as_often_as_it_may_be_on_all_connections_together() {
    let quotas = json!({ "secret_uses_per_hour": 2 });
    let place = place(&quotas, "enforce").await;
    let mut one = place.http1().await;
    assert_eq!(ask(&mut one, get("/")).await.0, StatusCode::OK);
    let mut two = place.http2().await;
    let request = get(&format!("https://{NAME}/"));
    let (status, _) = read(two.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::OK);
    let (status, text) = ask(&mut one, get("/")).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    for part in [
        "\"code\":\"egress_refused\"",
        "\"reason\":\"quota\"",
        "\"rule\":\"quotas.secret_uses_per_hour\"",
        "\"tier\":\"sandbox\"",
        "\"event_id\":\"event-",
        "with a higher `quotas.secret_uses_per_hour`",
        "\"retry-after\": \"",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(place.seen.lock().expect("whole").len(), 2, "the third went on");
    let records = place.world.records.lock().expect("whole").clone();
    let (decision, exchange) = records.last().expect("recorded");
    assert_eq!(decision.reason, Reason::Quota);
    assert_eq!(exchange.credential.as_deref(), Some("KEY"));

    place.replace(
        &counted(&json!({ "secret_uses_per_hour": 3 }), "enforce"),
        &[binding(bearer(), 1)],
    );
    assert_eq!(
        ask(&mut one, get("/")).await.0,
        StatusCode::OK,
        "what was used is known"
    );
    assert_eq!(ask(&mut one, get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn no_more_of_heads_and_bodies_goes_to_a_host_than_may() {
    let place = place(&json!({ "upload_bytes_per_host": 20_000 }), "enforce").await;
    let mut client = place.http1().await;
    assert_eq!(ask(&mut client, post(10_000)).await.0, StatusCode::OK);
    let (status, text) = ask(&mut client, post(15_000)).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert!(
        text.contains("quotas.upload_bytes_per_host is 20000") && !text.contains("retry-after"),
        "{text}"
    );
    let whole = |seen: &Seen| seen.body.len();
    let seen: Vec<usize> = place.seen.lock().expect("whole").iter().map(whole).collect();
    assert_eq!(seen, [10_000], "the second was whole at the server");

    // Small requests go on, on another connection, until the heads alone are too much.
    let mut last = StatusCode::OK;
    let mut other = place.http1().await;
    for _ in 0..1_000 {
        last = ask(&mut other, get("/")).await.0;
        if last != StatusCode::OK {
            break;
        }
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
    let records = place.world.records.lock().expect("whole").clone();
    let up: u64 = records.iter().map(|(_, exchange)| exchange.up).sum();
    assert!(up <= 20_000, "{up}");
    let (decision, _) = records.last().expect("recorded");
    assert_eq!(decision.rule.as_deref(), Some("quotas.upload_bytes_per_host"));
}

#[tokio::test]
async fn what_a_websocket_sends_counts() {
    let place = place(&json!({ "upload_bytes_per_host": 1_000 }), "enforce").await;
    let mut client = place.http1().await;
    let request = Request::get("/ws")
        .header("host", NAME)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .body(Full::default())
        .expect("a request");
    let response = client.send_request(request).await.expect("an answer");
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let upgraded = hyper::upgrade::on(response).await.expect("agreed");
    let mut stream = hyper_util::rt::TokioIo::new(upgraded);
    // What the server says until its peer has gone: everything ends there.
    let mut said = Vec::new();
    stream.write_all(&[b'x'; 2_000]).await.expect("written");
    let _ended = stream.read_to_end(&mut said).await;
    drop(stream);
    let recorded = async {
        loop {
            let records = place.world.records.lock().expect("whole").clone();
            if let Some((decision, _)) = records.last() {
                return decision.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let decision = tokio::time::timeout(Duration::from_secs(60), recorded)
        .await
        .expect("recorded");
    assert_eq!(decision.reason, Reason::Quota, "{decision:?}");
}

#[tokio::test]
async fn a_tier_in_audit_mode_limits_nothing_and_says_what_it_would() {
    let quotas = json!({ "secret_uses_per_hour": 1, "upload_bytes_per_host": 1 });
    let place = place(&quotas, "audit").await;
    let mut client = place.http1().await;
    for _ in 0..3 {
        assert_eq!(ask(&mut client, post(100)).await.0, StatusCode::OK);
    }
    let rules = || {
        let records = place.world.records.lock().expect("whole").clone();
        let audited = records
            .into_iter()
            .filter(|(decision, _)| decision.is_audited())
            .filter_map(|(decision, _)| decision.rule);
        audited.collect::<Vec<_>>()
    };
    assert!(!rules().is_empty(), "nothing was told");
    assert_eq!(place.seen.lock().expect("whole").len(), 3);
}
