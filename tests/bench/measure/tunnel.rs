//! Requests into a sandbox through its tunnel, beside nginx in front of the same server.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result};
use harness::namespace::Namespace;
use http::StatusCode;
use serde_json::json;

use super::Effort;
use crate::{
    load::{self, Origin, Rate, Requests, Target, Task},
    place::{Ground, Guarded, MIDDLE, PLAIN},
    result::{Kind, Table},
};

/// Where the server listens, in `plain` and in the sandbox.
const SERVED: u16 = 8000;
/// Where nginx listens.
const NGINX_PORT: u16 = 6080;
const CONNECTIONS: usize = 32;
const WARM_MS: u64 = 200;

const DIRECT: &str = "no proxy";
const NGINX: &str = "nginx";
const TUNNEL: &str = "tunnel-proxy";

/// Runs it; without tunnels in this version `None`.
pub(crate) fn tunnel(ground: &Ground, guarded: &Guarded, effort: Effort) -> Result<Option<Vec<Table>>> {
    let server = |namespace: &Namespace| {
        let origin = Origin {
            address: Ipv4Addr::UNSPECIFIED,
            plain: vec![SERVED],
            tls: Vec::new(),
            identity: None,
        };
        load::serve(namespace, origin)
    };
    let path = guarded.sandbox.path("/tunnels");
    let asked = json!({ "port": SERVED, "public": true });
    let answer = guarded.organization.client.post(&path).json(&asked).send();
    if answer.status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let url = answer.ok()["url"].as_str().context("no url")?.to_owned();
    let tunnel: SocketAddrV4 = url
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'))
        .context("not a loopback URL")?
        .parse()?;
    let _servers = [server(&ground.plain)?, server(&guarded.inside)?];
    let nginx = ground.nginx(
        NGINX_PORT,
        &format!(
            "http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {{own}}/1; \
             proxy_temp_path {{own}}/2; fastcgi_temp_path {{own}}/3; uwsgi_temp_path {{own}}/4; \
             scgi_temp_path {{own}}/5;\n\
             upstream app {{ server {PLAIN}:{SERVED}; keepalive 64; keepalive_requests 100000000; }}\n\
             server {{ listen {MIDDLE}:{NGINX_PORT}; location / {{ proxy_pass http://app; \
             proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n"
        ),
    )?;
    let mut ways = vec![(DIRECT, &ground.middle, SocketAddrV4::new(PLAIN, SERVED))];
    if nginx.is_some() {
        ways.push((NGINX, &ground.middle, SocketAddrV4::new(MIDDLE, NGINX_PORT)));
    }
    ways.push((TUNNEL, guarded.node.world().node(), tunnel));

    let peer = |name| (name == TUNNEL && nginx.is_some()).then_some(NGINX);
    let rows: Vec<_> = ways.iter().map(|(name, ..)| (*name, peer(*name))).collect();
    let title = format!("1 KiB by HTTP/1.1, {CONNECTIONS} kept connections");
    let mut rate = Table::new(&title, "requests/s", Kind::Rate, &rows);
    let mut p50 = Table::new(&format!("{title}: p50"), "ms", Kind::Cost, &rows);
    let mut p99 = Table::new(&format!("{title}: p99"), "ms", Kind::Cost, &rows);
    for _ in 0..effort.rounds {
        for (name, from, to) in &ways {
            let requests = Requests {
                target: Target { to: *to, tls: None },
                host: to.to_string(),
                path: "/".to_owned(),
                status: 200,
                headers: String::new(),
                connections: CONNECTIONS,
                warm_ms: WARM_MS.min(effort.count_ms),
                count_ms: effort.count_ms,
            };
            let measured: Rate = load::run(from, &Task::Requests(requests))?;
            rate.add(name, vec![measured.per_second]);
            p50.add(name, vec![measured.p50_ms]);
            p99.add(name, vec![measured.p99_ms]);
        }
    }
    Ok(Some(vec![rate, p50, p99]))
}
