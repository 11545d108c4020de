//! Asks the API whether a sandbox could be created, by the way every client takes.

use std::{io, net::SocketAddr, time::Duration};

use sandgate_api::rest::Health;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const INTERVAL: Duration = Duration::from_millis(200);

const TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer that is read.
const MAX_ANSWER: u64 = 64 * 1024;

/// Waits until the installation is ready, and logs what it waits for.
pub(super) async fn until_ready(address: SocketAddr) {
    let mut waiting_for = String::new();
    loop {
        let reason = match tokio::time::timeout(TIMEOUT, ask(address)).await {
            Ok(Ok((true, _))) => return,
            Ok(Ok((false, body))) => reason(&body),
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => "no answer".to_owned(),
        };
        if reason != waiting_for {
            tracing::info!(reason, "not ready yet");
            waiting_for = reason;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn ask(address: SocketAddr) -> io::Result<(bool, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /ready HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the API ended its answer early"))?;
    Ok((head.starts_with("HTTP/1.1 200 "), body.to_owned()))
}

fn reason(body: &str) -> String {
    let Ok(health) = serde_json::from_str::<Health>(body) else {
        return "the API gave an answer that is not understood".to_owned();
    };
    if health.backend != "ready" {
        let why = health.backend_error.unwrap_or_default();
        return format!("backend {} {why}", health.backend).trim_end().to_owned();
    }
    let waiting = health.nodes.into_iter().find(|node| !node.ready);
    waiting.map_or(health.status, |node| {
        format!(
            "node {}: {}",
            node.name,
            node.reason.unwrap_or_else(|| "not ready".to_owned())
        )
    })
}
