use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::tasks::Tasks;

const VARIABLE: &str = "AN_ADDRESS";

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    let _length = stream.read_to_string(&mut answer).await.expect("reads");
    answer
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

fn loopback() -> (SocketAddr, TcpListener) {
    let place = "127.0.0.1:0".parse().expect("an address");
    let listener = listen(VARIABLE, place).expect("free").expect("on");
    (listener.local_addr().expect("bound"), listener)
}

#[test]
fn a_place_is_an_address_or_off() {
    assert_eq!("off".parse(), Ok(Place::Off));
    let address: SocketAddr = "[::1]:9464".parse().expect("an address");
    assert_eq!("[::1]:9464".parse(), Ok(Place::At(address)));
    for text in ["", "9464", "localhost:9464", "Off", "127.0.0.1", "127.0.0.1:x"] {
        assert!(text.parse::<Place>().is_err(), "{text}");
    }
}

#[test]
fn off_listens_nowhere() {
    assert!(listen(VARIABLE, Place::Off).expect("no error").is_none());
}

#[test]
fn a_busy_address_names_the_variable() {
    let (address, _held) = loopback();
    let error = listen(VARIABLE, Place::At(address))
        .expect_err("busy")
        .to_string();
    assert!(
        error.contains(VARIABLE) && error.contains(&address.to_string()),
        "{error}"
    );
}

#[test]
fn an_ending_predecessor_is_waited_for() {
    let (address, held) = loopback();
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(held);
    });
    assert!(
        listen(VARIABLE, Place::At(address))
            .expect("free again")
            .is_some()
    );
    ending.join().expect("ends");
}

#[tokio::test]
async fn only_its_own_paths_and_methods_are_answered() {
    let (address, listener) = loopback();
    let tasks = Tasks::new(CancellationToken::new());
    serve(listener, registry("test"), None, &tasks).expect("serves");
    let metrics = ask(address, &get("/metrics")).await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(
        metrics.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{metrics}"
    );
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    for name in [
        "process_resident_memory_bytes ",
        "process_open_fds ",
        "process_max_fds ",
        "process_threads ",
        "process_start_time_seconds ",
        "process_cpu_seconds_total ",
        "sandgate_build_info{program=\"test\",version=",
    ] {
        assert!(metrics.contains(&format!("\n{name}")), "{name}: {metrics}");
    }
    assert!(ask(address, &get("/healthz")).await.ends_with("\r\n\r\nok\n"));
    assert!(ask(address, &get("/")).await.starts_with("HTTP/1.1 404"));
    assert!(ask(address, &get("/metrics/x")).await.starts_with("HTTP/1.1 404"));
    let post = "POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    assert!(ask(address, post).await.starts_with("HTTP/1.1 405"));
    assert!(tasks.drain(Duration::from_secs(5)).await.is_ok());
}

#[tokio::test]
async fn numbers_are_brought_up_to_date_at_each_scrape() {
    let (address, listener) = loopback();
    let tasks = Tasks::new(CancellationToken::new());
    let mut registry = registry("test");
    let gauge: Gauge = Gauge::default();
    registry.register("things", "Things", gauge.clone());
    let asked = Arc::new(AtomicI64::new(0));
    let refresh: Refresh = Arc::new(move || {
        let (gauge, asked) = (gauge.clone(), Arc::clone(&asked));
        Box::pin(async move {
            let _before = gauge.set(asked.fetch_add(1, Ordering::Relaxed) + 1);
        })
    });
    serve(listener, registry, Some(refresh), &tasks).expect("serves");
    assert!(ask(address, &get("/metrics")).await.contains("\nthings 1\n"));
    assert!(ask(address, &get("/metrics")).await.contains("\nthings 2\n"));
    assert!(tasks.drain(Duration::from_secs(5)).await.is_ok());
}

#[tokio::test]
async fn silent_connections_take_their_places_and_no_more() {
    let (address, listener) = loopback();
    let tasks = Tasks::new(CancellationToken::new());
    serve(listener, registry("test"), None, &tasks).expect("serves");
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(address).await.expect("connects"));
    }
    let waiting = tokio::time::timeout(Duration::from_millis(300), ask(address, &get("/healthz"))).await;
    assert!(waiting.is_err(), "a seventeenth is not served");
    drop(silent.pop());
    let served = tokio::time::timeout(Duration::from_secs(10), ask(address, &get("/healthz"))).await;
    assert!(served.is_ok(), "one that ends makes room");
    assert!(tasks.drain(Duration::from_secs(5)).await.is_ok());
}
