use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, rdata},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
};
use tokio_util::sync::CancellationToken;

use super::*;

fn answer(packet: &[u8], addresses: u8) -> Message {
    let mut message = Message::from_vec(packet).expect("a query");
    message.metadata.message_type = MessageType::Response;
    let name = message.queries[0].name().clone();
    for last in 0..addresses {
        let data = RData::A(rdata::A(Ipv4Addr::new(203, 0, 113, last)));
        message.add_answer(Record::from_rdata(name.clone(), 30, data));
    }
    message
}

fn failure(packet: &[u8], code: ResponseCode) -> Message {
    let mut message = answer(packet, 0);
    message.metadata.response_code = code;
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    message.to_vec().expect("written")
}

/// A server: its socket, and where it is.
async fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    let address = socket.local_addr().expect("bound");
    (socket, address)
}

async fn asked(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 512];
    let (length, from) = socket.recv_from(&mut buffer).await.expect("asked");
    (buffer[..length].to_vec(), from)
}

fn servers(addresses: &[SocketAddr]) -> Servers {
    Servers::new(addresses.to_vec(), Tasks::new(CancellationToken::new()))
}

async fn found(servers: &Servers) -> Result<usize, UpstreamError> {
    let name = DomainName::parse("ok.test").expect("a name");
    servers
        .resolve(&name, DnsType::A)
        .await
        .map(|found| found.records.len())
}

async fn found_by(address: SocketAddr) -> Result<usize, UpstreamError> {
    found(&servers(&[address])).await
}

#[tokio::test]
async fn a_silent_server_is_passed_over_and_a_forged_answer_ignored() {
    let ((_silent, first), (server, second)) = (server().await, server().await);
    let serving = async {
        let (query, from) = asked(&server).await;
        let mut forged = answer(&query, 9);
        forged.metadata.id ^= 1;
        server.send_to(&bytes(&forged), from).await.expect("sent");
        server
            .send_to(&bytes(&answer(&query, 1)), from)
            .await
            .expect("sent");
    };
    let servers = servers(&[first, second]);
    assert_eq!(tokio::join!(found(&servers), serving).0.expect("answered"), 1);
    assert_eq!(servers.order(), [1, 0], "the silent one is not asked first again");
}

#[tokio::test]
async fn nobody_but_the_asked_server_is_heard() {
    let ((server, address), (stranger, _)) = (server().await, server().await);
    let serving = async {
        let (query, from) = asked(&server).await;
        stranger
            .send_to(&bytes(&answer(&query, 9)), from)
            .await
            .expect("sent");
        server
            .send_to(&bytes(&answer(&query, 1)), from)
            .await
            .expect("sent");
    };
    assert_eq!(tokio::join!(found_by(address), serving).0.expect("answered"), 1);
}

#[tokio::test]
async fn a_late_answer_counts_although_another_attempt_was_begun() {
    let (server, address) = server().await;
    let serving = async {
        let (first, from) = asked(&server).await;
        let (second, _) = asked(&server).await;
        assert_ne!(first[..2], second[..2], "the id is fresh");
        server
            .send_to(&bytes(&answer(&first, 1)), from)
            .await
            .expect("sent");
    };
    assert_eq!(tokio::join!(found_by(address), serving).0.expect("answered"), 1);
}

#[tokio::test]
async fn a_failure_makes_the_next_server_be_asked_at_once() {
    for code in [
        ResponseCode::ServFail,
        ResponseCode::Refused,
        ResponseCode::NotImp,
    ] {
        let ((bad, first), (good, second)) = (server().await, server().await);
        let serving = async {
            let (query, from) = asked(&bad).await;
            bad.send_to(&bytes(&failure(&query, code)), from)
                .await
                .expect("sent");
            let (query, from) = asked(&good).await;
            good.send_to(&bytes(&answer(&query, 2)), from)
                .await
                .expect("sent");
        };
        let servers = servers(&[first, second]);
        assert_eq!(tokio::join!(found(&servers), serving).0.expect("answered"), 2);
        assert_eq!(servers.order(), [0, 1], "it failed for the name, and is well");
    }
}

#[tokio::test]
async fn when_all_fail_the_question_fails_without_waiting() {
    let (bad, address) = server().await;
    let serving = async {
        let (query, from) = asked(&bad).await;
        bad.send_to(&bytes(&failure(&query, ResponseCode::ServFail)), from)
            .await
            .expect("sent");
    };
    let servers = servers(&[address]);
    let outcome = tokio::join!(found(&servers), serving).0;
    assert!(matches!(
        outcome,
        Err(UpstreamError::Unanswered(AttemptError::Unusable(_)))
    ));
}

#[tokio::test]
async fn a_server_that_is_gone_is_passed_over_at_once_and_tried_again_beside_the_others() {
    let (gone, first) = server().await;
    drop(gone);
    let (good, second) = server().await;
    let servers = servers(&[first, second]);
    let serving = async {
        let (query, from) = asked(&good).await;
        good.send_to(&bytes(&answer(&query, 1)), from)
            .await
            .expect("sent");
    };
    assert_eq!(tokio::join!(found(&servers), serving).0.expect("answered"), 1);
    assert_eq!(servers.order(), [1, 0]);
    // It is back, and its rest is over.
    let back = UdpSocket::bind(first).await.expect("the port is free");
    servers.servers[0].health().rests_until = Some(Instant::now());
    let serving = async {
        let (query, from) = asked(&good).await;
        good.send_to(&bytes(&answer(&query, 1)), from)
            .await
            .expect("sent");
        let (query, from) = asked(&back).await;
        back.send_to(&bytes(&answer(&query, 1)), from)
            .await
            .expect("sent");
    };
    assert_eq!(tokio::join!(found(&servers), serving).0.expect("answered"), 1);
    while servers.order() != [0, 1] {
        tokio::task::yield_now().await;
    }
}

/// Serves one question over TCP.
async fn serve_tcp(listener: &TcpListener, addresses: u8) {
    let (mut stream, _) = listener.accept().await.expect("accepted");
    let mut query = vec![0; usize::from(stream.read_u16().await.expect("length"))];
    stream.read_exact(&mut query).await.expect("query");
    let whole = bytes(&answer(&query, addresses));
    let length = u16::try_from(whole.len()).expect("short");
    stream.write_u16(length).await.expect("sent");
    stream.write_all(&whole).await.expect("sent");
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_again_over_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let server = UdpSocket::bind(address).await.expect("bound");
    let serving = async {
        let (query, from) = asked(&server).await;
        let mut short = answer(&query, 0);
        short.metadata.truncation = true;
        server.send_to(&bytes(&short), from).await.expect("sent");
        serve_tcp(&listener, 60).await;
    };
    assert_eq!(tokio::join!(found_by(address), serving).0.expect("answered"), 60);
}

#[tokio::test]
async fn where_somebody_may_be_guessing_tcp_decides() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let server = UdpSocket::bind(address).await.expect("bound");
    // Many wrong ids; and a server that does not repeat the letters as they were sent.
    for respelt in [false, true] {
        let serving = async {
            let (query, from) = asked(&server).await;
            if respelt {
                let other: Vec<u8> = query
                    .iter()
                    .enumerate()
                    .map(|(at, byte)| {
                        if at >= 12 && byte.is_ascii_alphabetic() {
                            byte ^ 0x20
                        } else {
                            *byte
                        }
                    })
                    .collect();
                server
                    .send_to(&bytes(&answer(&other, 9)), from)
                    .await
                    .expect("sent");
            } else {
                for guess in 1..=16 {
                    let mut forged = answer(&query, 9);
                    forged.metadata.id ^= guess;
                    server.send_to(&bytes(&forged), from).await.expect("sent");
                }
            }
            serve_tcp(&listener, 3).await;
        };
        assert_eq!(tokio::join!(found_by(address), serving).0.expect("answered"), 3);
    }
}
