//! Git repositories over HTTPS as real servers have them: `git http-backend` behind a password.

use std::{path::PathBuf, process::Stdio};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use tokio::{io::AsyncWriteExt as _, process::Command};

use super::{Body, Heard, full};
use crate::world::runtime;

/// Bare repositories below a directory.
#[derive(Debug, Clone)]
pub struct Repositories {
    /// The directory.
    pub root: PathBuf,
    /// The one user.
    pub username: String,
    /// Their password.
    pub password: String,
}

impl Repositories {
    pub(super) async fn answer(&self, heard: &Heard) -> Response<Body> {
        let expected = STANDARD.encode(format!("{}:{}", self.username, self.password));
        if heard.all("authorization") != [format!("Basic {expected}")] {
            let mut response = Response::new(full("who are you?\n"));
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            let challenge = HeaderValue::from_static("Basic realm=\"git\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            return response;
        }
        match self.run(heard).await {
            Ok(output) => translate(&output),
            Err(error) => {
                let mut response = Response::new(full(format!("git http-backend: {error}\n")));
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            }
        }
    }

    async fn run(&self, heard: &Heard) -> std::io::Result<Vec<u8>> {
        let (path, query) = heard.target.split_once('?').unwrap_or((&heard.target, ""));
        let header = |name: &str| heard.all(name).concat();
        let mut child = Command::new("git")
            .arg("http-backend")
            .env("GIT_PROJECT_ROOT", &self.root)
            .env("GIT_HTTP_EXPORT_ALL", "1")
            .env("PATH_INFO", path)
            .env("QUERY_STRING", query)
            .env("REQUEST_METHOD", &heard.method)
            .env("CONTENT_TYPE", header("content-type"))
            .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
            .env("CONTENT_LENGTH", heard.body.len().to_string())
            .env("GIT_PROTOCOL", header("git-protocol"))
            .env("REMOTE_USER", &self.username)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut input = child.stdin.take().expect("a pipe");
        let body = heard.body.clone();
        runtime().spawn(async move { input.write_all(&body).await });
        Ok(child.wait_with_output().await?.stdout)
    }
}

/// What a CGI program wrote (RFC 3875, section 6) as a response.
fn translate(output: &[u8]) -> Response<Body> {
    let end = output.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = end.map_or((&output[..0], output), |end| (&output[..end], &output[end + 4..]));
    let mut response = Response::new(full(Bytes::copy_from_slice(body)));
    for line in String::from_utf8_lossy(head).lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("status") {
            let code = value.split_whitespace().next().and_then(|code| code.parse().ok());
            *response.status_mut() = code.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        } else if let (Ok(name), Ok(value)) =
            (name.parse::<HeaderName>(), HeaderValue::from_str(value.trim()))
        {
            response.headers_mut().append(name, value);
        }
    }
    response
}
