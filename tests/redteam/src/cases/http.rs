//! Requests in clear: for whom a request is, and where it ends. Everything here goes to the address of an allowed name,
//! and each request has the token in its target, so that one that was passed on is known.

use super::{at, resolved};
use crate::{
    attempt::{Attempts, Outcome, Wanted},
    case::Case,
    wire::http2,
};

const GOOD: &str = "HTTP/1.1 200";

pub(super) const CASES: &[Case] = &[
    Case::new(
        "H01",
        [
            "a request for a host that is not allowed, at the address of one that is",
            "refused: the host that the request names is judged",
            "the same for the allowed host",
        ],
        |attempts| {
            let world = attempts.world;
            let (evil, ok, plain) = (&world.evil.name, &world.ok.name, &world.plain.name);
            for host in [
                evil.clone(),
                world.tenant.clone(),
                ok.clone(),
                format!("{plain}.{evil}"),
                format!("www.{plain}"),
                world.evil.address.to_string(),
                format!("{plain}:22"),
            ] {
                bad(attempts, &format!("Host: {host}"), |token| {
                    format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\n\r\n")
                });
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            })
        },
    ),
    Case::new(
        "H02",
        [
            "one host in the target and another one in the header",
            "refused: two readings are none",
            "a request that names its host once",
        ],
        |attempts| {
            let (evil, plain) = (
                attempts.world.evil.name.clone(),
                attempts.world.plain.name.clone(),
            );
            for (target, host) in [
                (format!("http://{evil}"), &plain),
                (format!("http://{plain}"), &evil),
                (format!("http://{plain}@{evil}"), &plain),
                (format!("http://{evil}#@{plain}"), &plain),
                (format!("HTTP://{evil}:80"), &plain),
                (format!("//{evil}"), &evil),
            ] {
                bad(attempts, &format!("{target} with Host: {host}"), |token| {
                    format!("GET {target}/{token} HTTP/1.1\r\nHost: {host}\r\n\r\n")
                });
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            });
        },
    ),
    Case::new(
        "H03",
        [
            "a header that names no host, two, or one that is read in two ways",
            "refused",
            "one that names the host with its port",
        ],
        |attempts| {
            let (evil, plain) = (
                attempts.world.evil.name.clone(),
                attempts.world.plain.name.clone(),
            );
            for headers in [
                String::new(),
                "Host:".to_owned(),
                format!("Host: {plain}\r\nHost: {evil}"),
                format!("Host: {evil}\r\nHost: {plain}"),
                format!("Host: {plain}\r\nhost: {plain}"),
                format!("Host: {plain}:80@{evil}"),
                format!("Host: {plain}#{evil}"),
                format!("Host: {plain}\t{evil}"),
                format!("Host: {plain}, {evil}"),
                format!("Host: {plain}/{evil}"),
                format!("Host: user@{plain}"),
                format!("Host : {plain}"),
                format!("Host: {plain}\r\n\t.{evil}"),
                format!(" Host: {plain}\r\nHost: {evil}"),
                format!("Host: {plain}\0.{evil}"),
                format!("Host: {plain}.."),
            ] {
                bad(attempts, &format!("{headers:?}"), |token| {
                    let end = if headers.is_empty() { "" } else { "\r\n" };
                    format!("GET /{token} HTTP/1.1\r\n{headers}{end}\r\n")
                });
            }
            bad(attempts, "HTTP/1.0 without Host", |token| {
                format!("GET /{token} HTTP/1.0\r\n\r\n")
            });
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}:80\r\nConnection: close\r\n\r\n")
            });
        },
    ),
    Case::new(
        "H04",
        [
            "a second request on the connection of an allowed one, for a host that is not allowed",
            "refused, or not read: every request is judged",
            "the allowed request alone",
        ],
        |attempts| {
            let (evil, plain) = (
                attempts.world.evil.name.clone(),
                attempts.world.plain.name.clone(),
            );
            let plain_address = attempts.world.plain.address;
            resolved(attempts, &plain, plain_address);
            let token = attempts.token.clone();
            for (what, first) in [
                (
                    "after a GET",
                    format!("GET /first HTTP/1.1\r\nHost: {plain}\r\n\r\n"),
                ),
                (
                    "after a POST",
                    format!("POST /first HTTP/1.1\r\nHost: {plain}\r\nContent-Length: 5\r\n\r\nhello"),
                ),
                (
                    "after chunks",
                    format!(
                        "POST /first HTTP/1.1\r\nHost: {plain}\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
                    ),
                ),
            ] {
                let second = format!("GET /{token} HTTP/1.1\r\nHost: {evil}\r\nConnection: close\r\n\r\n");
                let to = at(plain_address, 80);
                let outcome = attempts.tcp(to, format!("{first}{second}").as_bytes());
                attempts.note(format!("in one piece, {what}"), &Wanted::Anything, outcome);
                let outcome = attempts.tcp_in_turns(to, first.as_bytes(), |_| second.into_bytes());
                attempts.note(format!("in turns, {what}"), &Wanted::HttpRefusal, outcome);
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!(
                    "POST /{token} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
                     1\r\nx\r\n0\r\n\r\n"
                )
            });
        },
    ),
    Case::new(
        "H05",
        [
            "a request hidden in another one's body, where two parsers differ about its end",
            "refused, or passed on as one body: never as a request of its own",
            "a body whose end everybody sees",
        ],
        |attempts| {
            let plain = attempts.world.plain.name.clone();
            for framing in [
                "Content-Length: 4\r\nTransfer-Encoding: chunked",
                "Transfer-Encoding: chunked\r\nContent-Length: 4",
                "Content-Length: 0\r\nContent-Length: 80",
                "Content-Length: 0, 80",
                "Content-Length: +0",
                "Content-Length: 0x0",
                "Content-Length: -1",
                "Transfer-Encoding: xchunked",
                "Transfer-Encoding: chunked, identity",
                "Transfer-Encoding: identity, chunked, chunked",
                "Transfer-Encoding:\u{b}chunked",
                "Transfer-Encoding : chunked",
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
                "X: y\nTransfer-Encoding: chunked",
                "X: y\rTransfer-Encoding: chunked",
            ] {
                bad(attempts, framing, |token| {
                    format!(
                        "POST /outer-{token} HTTP/1.1\r\nHost: {plain}\r\n{framing}\r\n\r\n\
                         0\r\n\r\nGET /{token} HTTP/1.1\r\nHost: {plain}\r\n\r\n"
                    )
                });
            }
            for chunk in [
                "5;x=\"\n\"\r\nhello",
                "0x5\r\nhello",
                "5\nhello",
                "5 \r\nhello",
                "-5\r\nhello",
                "\r\n5\r\nhello",
                "FFFFFFFFFFFFFFFF5\r\nhello",
            ] {
                bad(attempts, &format!("a chunk {chunk:?}"), |token| {
                    format!(
                        "POST /x HTTP/1.1\r\nHost: {plain}\r\nTransfer-Encoding: chunked\r\n\r\n\
                         {chunk}\r\n0\r\n\r\nGET /{token} HTTP/1.1\r\nHost: {plain}.{token}\r\n\r\n"
                    )
                });
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!(
                    "POST /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                     5\r\nhello\r\n0\r\n\r\n"
                )
            });
        },
    ),
    Case::new(
        "H06",
        [
            "a tunnel through the guard itself: CONNECT, and upgrades",
            "refused",
            "a request without either",
        ],
        |attempts| {
            let (evil, plain) = (
                attempts.world.evil.name.clone(),
                attempts.world.plain.name.clone(),
            );
            for (target, host) in [
                (format!("{evil}:443"), &format!("{evil}:443")),
                (format!("{evil}:443"), &plain),
                (format!("{plain}:22"), &plain),
                (format!("{}:443", attempts.world.evil.address), &plain),
            ] {
                bad(
                    attempts,
                    &format!("CONNECT {target} with Host: {host}"),
                    |token| format!("CONNECT {target} HTTP/1.1\r\nHost: {host}\r\nX-Token: {token}\r\n\r\n"),
                );
            }
            for protocol in ["h2c", "websocket", "connect-udp", "TLS/1.0"] {
                bad(
                    attempts,
                    &format!("an upgrade to {protocol} for {evil}"),
                    |token| {
                        format!(
                            "GET /{token} HTTP/1.1\r\nHost: {evil}\r\nUpgrade: {protocol}\r\n\
                             Connection: Upgrade, HTTP2-Settings\r\n\
                         HTTP2-Settings: AAMAAABkAAQAAP__\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
                        )
                    },
                );
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            })
        },
    ),
    Case::new(
        "H07",
        [
            "HTTP/2 in clear: a stream for a host that is not allowed, alone and beside an allowed one",
            "refused: every stream is judged, or none is taken",
            "a request for the allowed host by HTTP/1.1",
        ],
        |attempts| {
            let (evil, plain) = (
                attempts.world.evil.name.clone(),
                attempts.world.plain.name.clone(),
            );
            let address = attempts.world.plain.address;
            resolved(attempts, &plain, address);
            let path = format!("/{}", attempts.token);
            for (what, streams) in [
                ("alone", vec![(evil.as_str(), path.as_str())]),
                (
                    "second",
                    vec![(plain.as_str(), "/first"), (evil.as_str(), path.as_str())],
                ),
                (
                    "another allowed host",
                    vec![(attempts.world.ok.name.as_str(), path.as_str())],
                ),
            ] {
                let outcome = attempts.tcp(at(address, 80), &http2::requests(&streams));
                attempts.note(
                    format!("a stream for another host, {what}"),
                    &Wanted::Anything,
                    outcome,
                );
            }
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            })
        },
    ),
    Case::new(
        "H08",
        [
            "requests without measure: a head of 70,000 bytes, 10,000 headers, a line without end",
            "refused within bounds",
            "a request with fifty headers",
        ],
        |attempts| {
            let plain = attempts.world.plain.name.clone();
            bad(attempts, "a header of 70,000 bytes", |token| {
                format!(
                    "GET /{token} HTTP/1.1\r\nHost: {plain}\r\nX: {}\r\n\r\n",
                    "x".repeat(70_000)
                )
            });
            bad(attempts, "10,000 headers", |token| {
                format!(
                    "GET /{token} HTTP/1.1\r\nHost: {plain}\r\n{}\r\n",
                    "X: y\r\n".repeat(10_000)
                )
            });
            bad(attempts, "a target of 70,000 bytes", |token| {
                format!(
                    "GET /{token}{} HTTP/1.1\r\nHost: {plain}\r\n\r\n",
                    "x".repeat(70_000)
                )
            });
            bad(attempts, "a line without end", |token| {
                format!("GET /{token}{}", "x".repeat(70_000))
            });
        },
        |attempts| {
            good(attempts, |token, host| {
                format!(
                    "GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{}\r\n",
                    "X-More: y\r\n".repeat(50)
                )
            });
        },
    ),
    Case::new(
        "H09",
        [
            "bytes that are no request where requests are allowed: methods that are none, bare line ends, other protocols",
            "refused",
            "a request",
        ],
        |attempts| {
            let plain = attempts.world.plain.name.clone();
            for (what, start) in [
                ("a method with a space", "G ET"),
                ("no method", ""),
                ("a method that is a control character", "\u{1}"),
                ("a tab for a space", "GET\t"),
            ] {
                bad(attempts, what, |token| {
                    format!("{start} /{token} HTTP/1.1\r\nHost: {plain}\r\n\r\n")
                });
            }
            bad(attempts, "bare line feeds", |token| {
                format!("GET /{token} HTTP/1.1\nHost: {plain}\n\n")
            });
            bad(attempts, "HTTP/0.9", |token| format!("GET /{token}\r\n"));
            bad(attempts, "HTTP/3.7", |token| {
                format!("GET /{token} HTTP/3.7\r\nHost: {plain}\r\n\r\n")
            });
            bad(attempts, "SMTP", |token| format!("EHLO {token}.{plain}\r\n"));
            bad(attempts, "SSH", |token| format!("SSH-2.0-{token}\r\n"));
        },
        |attempts| {
            good(attempts, |token, host| {
                format!("GET /{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            })
        },
    ),
];

/// Sends what must be refused to the allowed host's address.
fn bad(attempts: &mut Attempts<'_>, what: &str, request: impl FnOnce(&str) -> String) {
    let outcome = exchange(attempts, request);
    attempts.note(what, &Wanted::HttpRefusal, outcome);
}

/// Sends what must be answered there.
fn good(attempts: &mut Attempts<'_>, request: impl FnOnce(&str, &str) -> String) {
    let host = attempts.world.plain.name.clone();
    let outcome = exchange(attempts, |token| request(token, &host));
    attempts.note("a good request", &Wanted::Answer(GOOD.to_owned()), outcome);
}

fn exchange(attempts: &mut Attempts<'_>, request: impl FnOnce(&str) -> String) -> Outcome {
    let plain = attempts.world.plain.clone();
    if attempts.made.is_empty() {
        resolved(attempts, &plain.name, plain.address);
    }
    let request = request(&attempts.token);
    attempts.tcp(at(plain.address, 80), request.as_bytes())
}
