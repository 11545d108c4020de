//! What people call APIs with, inside the sandbox, without a flag or a setting that would help.

use harness::sandbox::Sandbox;
use serde_json::{Value, json};

/// What is called, and the command line before URL and headers.
pub(crate) const CLIENTS: [(&str, &str); 9] = [
    ("curl with HTTP/2", "sh clients/curl.sh --http2"),
    ("curl with HTTP/1.1", "sh clients/curl.sh --http1.1"),
    ("requests", "python3 clients/with_requests.py"),
    ("httpx with HTTP/1.1", "python3 clients/with_httpx.py 1"),
    ("httpx with HTTP/2", "python3 clients/with_httpx.py 2"),
    ("urllib", "python3 clients/with_urllib.py"),
    ("fetch of Node.js", "node clients/fetch.js"),
    ("https of Node.js", "node clients/https.js"),
    ("requests in a session", "python3 clients/with_session.py"),
];

/// The same one wherever it does not matter which.
pub(crate) const CURL: &str = CLIENTS[0].1;

const FILES: [(&str, &str); 7] = [
    (
        "curl.sh",
        r#"version=$1 url=$2; shift 2
for header; do shift; set -- "$@" -H "$header"; done
body=$(mktemp)
curl -sS --max-time 30 "$version" -o "$body" -w '%{http_code}\n' "$url" "$@" || exit
cat "$body"
"#,
    ),
    (
        "with_requests.py",
        r#"import sys, requests
headers = dict(header.split(": ", 1) for header in sys.argv[2:])
answer = requests.get(sys.argv[1], headers=headers, timeout=30)
print(answer.status_code)
print(answer.text)
"#,
    ),
    (
        "with_session.py",
        r#"import sys, requests
session = requests.Session()
session.headers.update(header.split(": ", 1) for header in sys.argv[2:])
answer = session.get(sys.argv[1], timeout=30)
print(answer.status_code)
print(answer.text)
"#,
    ),
    (
        "with_httpx.py",
        r#"import sys, httpx
headers = dict(header.split(": ", 1) for header in sys.argv[3:])
with httpx.Client(http2=sys.argv[1] == "2", timeout=30) as client:
    answer = client.get(sys.argv[2], headers=headers)
assert answer.http_version == ("HTTP/2" if sys.argv[1] == "2" else "HTTP/1.1"), answer.http_version
print(answer.status_code)
print(answer.text)
"#,
    ),
    (
        "with_urllib.py",
        r#"import sys, urllib.error, urllib.request
headers = dict(header.split(": ", 1) for header in sys.argv[2:])
try:
    answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=30)
except urllib.error.HTTPError as refusal:
    answer = refusal
print(answer.status)
print(answer.read().decode())
"#,
    ),
    (
        "fetch.js",
        r#"const headers = Object.fromEntries(process.argv.slice(3).map((header) => header.split(/: (.*)/s).slice(0, 2)));
fetch(process.argv[2], { headers, signal: AbortSignal.timeout(30000) })
  .then(async (answer) => console.log(`${answer.status}\n${await answer.text()}`))
  .catch((error) => { console.error(error, error.cause); process.exit(1); });
"#,
    ),
    (
        "https.js",
        r#"const headers = Object.fromEntries(process.argv.slice(3).map((header) => header.split(/: (.*)/s).slice(0, 2)));
require("https").get(process.argv[2], { headers, timeout: 30000 }, (answer) => {
  let body = "";
  answer.on("data", (data) => (body += data));
  answer.on("end", () => console.log(`${answer.statusCode}\n${body}`));
});
"#,
    ),
];

/// What a client was answered.
#[derive(Debug, Clone)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answered {
    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// It is netd's own refusal, for this reason.
    #[track_caller]
    pub(crate) fn assert_refused(&self, status: u16, reason: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.body.contains(reason), "{reason} is not named in {self:?}");
        assert!(self.json().is_object(), "no JSON object in {self:?}");
    }
}

/// Puts the clients into a sandbox.
#[track_caller]
pub(crate) fn install(sandbox: &Sandbox) {
    for (name, text) in FILES {
        sandbox.write(&format!("/workspace/clients/{name}"), text);
    }
    sandbox.write("/workspace/clients/raw.py", include_str!("raw.py"));
    sandbox.write("/workspace/clients/live.py", include_str!("live.py"));
}

/// The shell line of a call. Variables in headers and URL are expanded inside.
pub(crate) fn line(client: &str, url: &str, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|header| format!(" \"{header}\"")).collect();
    format!("cd /workspace && {client} \"{url}\"{headers}")
}

/// Calls with a client.
#[track_caller]
pub(crate) fn call(sandbox: &Sandbox, client: &str, url: &str, headers: &[&str]) -> Answered {
    let output = sandbox.sh(&line(client, url, headers));
    let (status, body) = output.stdout.split_once('\n').unwrap_or_default();
    let status = status
        .parse()
        .unwrap_or_else(|_| panic!("{client} of {url}: {output:?}"));
    let body = body.to_owned();
    Answered { status, body }
}

/// Bytes to be spoken to a host, by TLS with its name.
pub(crate) fn bytes_to(host: &str, send: &[u8]) -> Value {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    json!({ "to": host, "port": 443, "sni": host, "send": STANDARD.encode(send) })
}

/// Speaks bytes, one connection each, and gives what came back until the peer closed.
#[track_caller]
pub(crate) fn speak(sandbox: &Sandbox, attempts: &[Value]) -> Vec<Vec<u8>> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    sandbox.write(
        "/workspace/clients/attempts.json",
        Value::from(attempts).to_string(),
    );
    let output = sandbox.execute(&json!({
        "command": "python3 /workspace/clients/raw.py /workspace/clients/attempts.json", "timeout": 55_000,
    }));
    let lines: Vec<Value> = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}")))
        .collect();
    assert_eq!(lines.len(), attempts.len(), "{output:?}");
    lines
        .iter()
        .zip(attempts)
        .map(|(line, attempt)| {
            let data = STANDARD
                .decode(line["data"].as_str().expect("a text"))
                .expect("base64");
            assert!(
                !data.is_empty() || line["error"] == "",
                "{attempt} was answered by {}",
                line["error"]
            );
            data
        })
        .collect()
}
