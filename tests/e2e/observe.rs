//! What an operator sees: metrics, logs, and the description of the API.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use harness::{
    node::Node,
    openmetrics::Exposition,
    probe,
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    wait,
    world::World,
};
use serde_json::{Value, json};

/// Where the programs show their metrics when nothing else is said.
const CONTROLLER: &str = "127.0.0.1:9464";
const NETD: &str = "127.0.0.1:9465";
const TUNNEL_PROXY: &str = "127.0.0.1:9466";

/// How long a number may take to follow what happened.
const FOLLOWS: Duration = Duration::from_secs(60);

/// Exit status of a bad configuration.
const USAGE: i32 = 64;

/// A node that nobody else uses, so that counts can be told exactly, and whose logs are JSON.
pub(crate) struct Observed {
    sandbox: Sandbox,
    organization: Organization,
    // Stopped before its world goes.
    node: Node,
    world: Arc<World>,
}

impl Fixture for Observed {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start_with(
            &world,
            &[
                ("SANDGATE_LOG_FORMAT", "json"),
                ("SANDGATE_LOG", "info,netd=debug,controller=debug"),
            ],
        )?;
        let organization = node.register("observer");
        let policy = json!({ "mode": "allowlist", "allowed_domains": ["ok.test"], "allowed_ports": [443] });
        let sandbox = organization.sandbox(&json!({ "network": policy }));
        sandbox.write(probe::CA, world.ca.pem());
        Ok(Self {
            sandbox,
            organization,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Observed {
    /// Head and body of a plain request on the node.
    #[track_caller]
    fn ask(&self, address: &'static str, request: &str) -> (String, String) {
        let request = format!("{request} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        let asked = self.world.node().run(move || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(FOLLOWS))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        let answer = asked.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.to_lowercase(), body.to_owned())
    }

    #[track_caller]
    fn numbers(&self, address: &'static str) -> Exposition {
        let (head, body) = self.ask(address, "GET /metrics");
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{head}"
        );
        Exposition::parse(&body).unwrap_or_else(|error| panic!("{address}: {error:#}\n{body}"))
    }

    /// Does something and gives how much each series has grown, once the first has.
    #[track_caller]
    fn growth<const N: usize>(
        &self,
        address: &'static str,
        series: [(&str, &[(&str, &str)]); N],
        act: impl FnOnce(),
    ) -> [f64; N] {
        let read = |numbers: &Exposition| series.map(|(name, labels)| numbers.value(name, labels));
        let before = read(&self.numbers(address));
        act();
        wait::until(series[0].0, FOLLOWS, || {
            let after = read(&self.numbers(address));
            (after[0] > before[0]).then(|| std::array::from_fn(|index| after[index] - before[index]))
        })
    }

    fn log(&self) -> Vec<Value> {
        let lines = self.node.log_lines();
        lines
            .iter()
            .filter_map(|line| line.strip_prefix("err| "))
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}")))
            .collect()
    }
}

/// The value of a field of a line, or of one of the spans that it stands in.
fn named<'a>(line: &'a Value, field: &str) -> Option<&'a str> {
    line[field].as_str().or_else(|| {
        let mut spans = line["spans"].as_array()?.iter();
        spans.find_map(|span| span[field].as_str())
    })
}

pub(crate) fn every_program_shows_its_metrics_on_a_listener_of_its_own(observed: &Observed) {
    for (address, program, names) in [
        (
            CONTROLLER,
            "controller",
            &[
                "sandgate_controller_http_requests",
                "sandgate_controller_sandboxes",
            ][..],
        ),
        (
            NETD,
            "netd",
            &["sandgate_netd_decisions", "sandgate_netd_kernel_packets"][..],
        ),
        (
            TUNNEL_PROXY,
            "tunnel-proxy",
            &["sandgate_tunnel_connections", "sandgate_tunnel_tunnels"][..],
        ),
    ] {
        let numbers = observed.numbers(address);
        for name in names.iter().copied().chain([
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_threads",
            "process_start_time_seconds",
        ]) {
            assert!(
                numbers.families.contains_key(name),
                "{program} does not show {name}"
            );
        }
        assert!(numbers.value("process_open_fds", &[]) > 3.0);
        assert!(numbers.value("process_resident_memory_bytes", &[]) > 1e6);
        let builds = &numbers.families["sandgate_build"].samples;
        assert!(
            builds.keys().any(|(_, labels)| labels["program"] == program),
            "{builds:?}"
        );
        for value in numbers.label_values() {
            for tenant in [observed.sandbox.id.as_str(), "org-", "sandbox-", "ok.test"] {
                assert!(!value.contains(tenant), "{program} has the label value {value}");
            }
        }
        let (head, body) = observed.ask(address, "GET /healthz");
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert_eq!(body, "ok\n");
        assert!(observed.ask(address, "GET /").0.starts_with("http/1.1 404"));
        assert!(
            observed
                .ask(address, "DELETE /metrics")
                .0
                .starts_with("http/1.1 405")
        );
    }
    let api = observed.node.client().get("//metrics").send();
    assert_eq!(api.status.as_u16(), 404, "the API does not show metrics");
}

pub(crate) fn one_command_one_flow_and_one_question_count_one(observed: &Observed) {
    let sandbox = &observed.sandbox;
    let route: &[_] = &[
        ("route", "/api/v1/sandbox/{id}/execute"),
        ("method", "POST"),
        ("status", "2xx"),
    ];
    let [commands, requests, failures] = observed.growth(
        CONTROLLER,
        [
            ("sandgate_controller_commands_total", &[("outcome", "success")]),
            ("sandgate_controller_http_requests_total", route),
            ("sandgate_controller_commands_total", &[("outcome", "failure")]),
        ],
        || drop(sandbox.sh_ok("true")),
    );
    assert_eq!((commands, requests, failures), (1.0, 1.0, 0.0));

    let [answered, refused] = observed.growth(
        NETD,
        [
            ("sandgate_netd_dns_queries_total", &[("outcome", "answered")]),
            ("sandgate_netd_dns_queries_total", &[("outcome", "refused")]),
        ],
        || drop(sandbox.sh_ok("python3 -c \"import socket; socket.gethostbyname('ok.test')\"")),
    );
    assert_eq!((answered, refused), (1.0, 0.0));

    let allowed: &[_] = &[("protocol", "tls"), ("verdict", "allow"), ("reason", "allowed")];
    let curl = format!(
        "curl -sS --max-time 30 --resolve ok.test:443:203.0.113.10 --cacert {} https://ok.test/",
        probe::CA
    );
    let [flows, up, down, questions] = observed.growth(
        NETD,
        [
            ("sandgate_netd_decisions_total", allowed),
            ("sandgate_netd_flow_bytes_total", &[("direction", "up")]),
            ("sandgate_netd_flow_bytes_total", &[("direction", "down")]),
            ("sandgate_netd_dns_queries_total", &[("outcome", "answered")]),
        ],
        || drop(sandbox.sh_ok(&curl)),
    );
    assert_eq!((flows, questions), (1.0, 0.0));
    assert!(up > 300.0 && down > 500.0, "{up} up, {down} down");

    let platform: &[_] = &[("reason", "platform_denied")];
    let [denials, packets] = observed.growth(
        NETD,
        [
            ("sandgate_netd_kernel_denials_total", platform),
            ("sandgate_netd_kernel_packets_total", &[("outcome", "refused")]),
        ],
        || drop(sandbox.sh("curl -sS --max-time 30 http://169.254.169.254/")),
    );
    assert!(denials >= 1.0 && packets >= 1.0, "{denials} {packets}");

    let created: &[_] = &[("outcome", "created")];
    let [creations, starts, running] = observed.growth(
        CONTROLLER,
        [
            ("sandgate_controller_sandbox_creations_total", created),
            (
                "sandgate_controller_sandbox_start_duration_seconds_count",
                &[("phase", "total")],
            ),
            ("sandgate_controller_sandboxes", &[("status", "running")]),
        ],
        || observed.organization.sandbox(&json!({})).stop(),
    );
    assert_eq!((creations, starts), (1.0, 1.0));
    assert!(running.abs() < f64::EPSILON, "it was stopped");
    let numbers = observed.numbers(NETD);
    wait::until("netd to forget the stopped sandbox", FOLLOWS, || {
        let sandboxes = observed.numbers(NETD).value("sandgate_netd_sandboxes", &[]);
        ((sandboxes - 1.0).abs() < f64::EPSILON).then_some(())
    });
    assert!((numbers.value("sandgate_netd_canaries", &[]) - 1.0).abs() < f64::EPSILON);
    let numbers = observed.numbers(CONTROLLER);
    let acknowledged = numbers.value("sandgate_controller_feed_acknowledged_revision", &[]);
    let committed = numbers.value("sandgate_controller_feed_revision", &[]);
    assert!(committed >= acknowledged && acknowledged > 0.0);
    assert!(numbers.value("sandgate_controller_audit_records_total", &[]) > 0.0);
}

pub(crate) fn logs_name_the_request_and_the_sandbox(observed: &Observed) {
    let sandbox = &observed.sandbox;
    let id = sandbox.id.as_str();
    let request = "an-operator-asks-1";
    let curl = format!(
        "curl -sS --max-time 30 --resolve ok.test:443:203.0.113.10 --cacert {} https://ok.test/",
        probe::CA
    );
    let answer = sandbox
        .client()
        .post(&sandbox.path("/execute"))
        .header("x-request-id", request)
        .json(&json!({ "command": curl }))
        .send();
    assert_eq!(answer.ok()["exit_code"], 0);
    let of_request = || -> Vec<Value> {
        let lines = observed.log().into_iter();
        lines
            .filter(|line| named(line, "request_id") == Some(request))
            .collect()
    };
    wait::until("the command's lines", FOLLOWS, || {
        let lines = of_request();
        let with = |test: &dyn Fn(&Value) -> bool| {
            lines
                .iter()
                .any(|line| test(line) && named(line, "sandbox_id") == Some(id))
        };
        (with(&|line| line["target"] == "access") && with(&|line| line["message"] == "a command ended"))
            .then_some(())
    });
    wait::until("the flow's line", FOLLOWS, || {
        observed.log().into_iter().find(|line| {
            let in_span = line["spans"].as_array().is_some_and(|spans| {
                spans
                    .iter()
                    .any(|span| span["name"] == "sandbox" && span["sandbox_id"] == id)
            });
            line["target"] == "audit" && line["sandbox_id"] == id && line["host"] == "ok.test" && in_span
        })
    });
    let creation = "an-operator-creates-1";
    let made = sandbox
        .client()
        .post("/sandbox/create")
        .header("x-request-id", creation)
        .json(&json!({}))
        .send()
        .ok();
    let made = made["sandbox_id"].as_str().expect("an id").to_owned();
    sandbox.client().delete(&format!("/sandbox/{made}")).send().ok();
    wait::until("the creation's line", FOLLOWS, || {
        observed.log().into_iter().find(|line| {
            named(line, "request_id") == Some(creation) && named(line, "sandbox_id") == Some(&made)
        })
    });
    wait::until("a line of the sandbox's own task", FOLLOWS, || {
        observed.log().into_iter().find(|line| {
            line["message"] == "a sandbox ended"
                && named(line, "sandbox_id") == Some(&made)
                && line["spans"]
                    .as_array()
                    .is_some_and(|spans| spans.iter().any(|span| span["name"] == "sandbox"))
        })
    });
}

pub(crate) fn the_api_describes_itself(observed: &Observed) {
    let client = observed.node.client();
    let description = client.get("//openapi.json").send().ok();
    assert!(
        description["openapi"]
            .as_str()
            .is_some_and(|version| version.starts_with("3.1."))
    );
    for field in ["title", "version"] {
        assert!(description["info"][field].is_string(), "{field}");
    }
    let mut references = Vec::new();
    gather(&description, &mut references);
    assert!(references.len() > 20, "{}", references.len());
    for reference in references {
        let pointer = reference.strip_prefix('#').expect("in this document");
        assert!(
            description.pointer(pointer).is_some(),
            "{reference} leads nowhere"
        );
    }
    let paths = description["paths"].as_object().expect("paths");
    for path in ["/api/v1/sandbox/create", "/api/v1/sandbox/{id}/execute", "/ready"] {
        assert!(paths.contains_key(path), "{path}");
    }
    for (path, item) in paths {
        for (method, operation) in item.as_object().expect("a path item") {
            assert!(
                operation["responses"].is_object() && operation["operationId"].is_string(),
                "{method} {path}"
            );
        }
    }
    for path in ["//docs", "//docs/page.js", "//docs/page.css"] {
        let answer = client.get(path).send();
        assert!(answer.status.is_success(), "{path}");
        let policy = answer.headers["content-security-policy"].to_str().expect("text");
        assert!(policy.contains("default-src 'none'"), "{path}: {policy}");
    }
    assert!(client.get("//docs").send().text().contains("/docs/page.js"));
    assert!(client.get("//ready").send().status.is_success());
}

fn gather<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get("$ref").and_then(Value::as_str));
            fields.values().for_each(|value| gather(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| gather(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

pub(crate) fn a_place_for_metrics_that_cannot_be_had_names_its_variable(observed: &Observed) {
    for (program, arguments, variable) in [
        (
            "controller",
            &["up", "--metrics-addr", "9464"][..],
            "SANDGATE_METRICS_ADDR",
        ),
        (
            "netd",
            &["--metrics-addr", "everywhere"][..],
            "SANDGATE_NETD_METRICS_ADDR",
        ),
        // Those that run have them.
        ("controller", &["serve"][..], "SANDGATE_METRICS_ADDR"),
        ("netd", &[][..], "SANDGATE_NETD_METRICS_ADDR"),
    ] {
        let (status, said) = observed.node.run(program, arguments).expect("it runs");
        assert_eq!(status.code(), Some(USAGE), "{program} {arguments:?}: {said}");
        assert!(said.contains(variable), "{program} {arguments:?}: {said}");
    }
}
