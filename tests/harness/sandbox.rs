//! An organisation and its sandboxes, as a client of the API sees them.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::{client::Client, wait};

/// Longest wait for an audit record: they travel in batches.
const AUDIT: Duration = Duration::from_secs(60);
/// Longest wait for a program in the background.
const READY: Duration = Duration::from_secs(60);

/// A registered organisation.
#[derive(Clone)]
pub struct Organization {
    /// The API with its key.
    pub client: Client,
    /// Its id.
    pub id: String,
    /// Its key.
    pub key: String,
}

/// A running sandbox.
#[derive(Clone)]
pub struct Sandbox {
    /// Its owner.
    pub organization: Organization,
    /// Its id.
    pub id: String,
    /// What create answered.
    pub created: Value,
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit status.
    pub exit_code: i64,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// The whole answer.
    pub answer: Value,
    /// From the request to the answer.
    pub took: Duration,
}

impl Organization {
    pub(crate) fn new(client: Client, registered: &Value) -> Self {
        let key = registered["api_key"]["key"]
            .as_str()
            .unwrap_or_else(|| panic!("no key in {registered}"))
            .to_owned();
        let id = registered["organization"]["id"]
            .as_str()
            .unwrap_or_else(|| panic!("no id in {registered}"))
            .to_owned();
        Self {
            client: client.with_key(&key),
            id,
            key,
        }
    }

    /// Creates a sandbox from a body such as `{}`.
    #[track_caller]
    pub fn sandbox(&self, body: &Value) -> Sandbox {
        let created = self.client.post("/sandbox/create").json(body).send().ok();
        assert_eq!(created["status"], "running", "create answered {created}");
        let id = created["sandbox_id"]
            .as_str()
            .unwrap_or_else(|| panic!("no id in {created}"))
            .to_owned();
        Sandbox {
            organization: self.clone(),
            id,
            created,
        }
    }

    /// The ids of its sandboxes that run.
    #[track_caller]
    pub fn running(&self) -> Vec<String> {
        let list = self.client.get("/sandboxes").send().ok();
        let sandboxes = list["sandboxes"]
            .as_array()
            .unwrap_or_else(|| panic!("no list in {list}"));
        let running = sandboxes.iter().filter(|sandbox| sandbox["status"] == "running");
        running
            .filter_map(|sandbox| sandbox["sandbox_id"].as_str().map(str::to_owned))
            .collect()
    }

    /// Replaces the organisation's policy.
    #[track_caller]
    pub fn set_egress(&self, policy: &Value) -> Value {
        self.client.put("/settings/egress").json(policy).send().ok()
    }

    /// Audit records by filters such as `decision=deny`.
    #[track_caller]
    pub fn audit(&self, filters: &str) -> Vec<Value> {
        let answer = self
            .client
            .get(&format!("/egress/audit?limit=1000&{filters}"))
            .send()
            .ok();
        answer["events"]
            .as_array()
            .unwrap_or_else(|| panic!("no events in {answer}"))
            .clone()
    }
}

impl Sandbox {
    /// `/sandbox/<id><rest>`.
    pub fn path(&self, rest: &str) -> String {
        format!("/sandbox/{}{rest}", self.id)
    }

    /// Its owner's client.
    pub fn client(&self) -> &Client {
        &self.organization.client
    }

    /// Runs a shell line.
    #[track_caller]
    pub fn sh(&self, line: &str) -> Output {
        self.execute(&json!({ "command": line }))
    }

    /// Runs a shell line that must succeed and gives what it wrote, without white space around it.
    #[track_caller]
    pub fn sh_ok(&self, line: &str) -> String {
        let output = self.sh(line);
        assert_eq!(output.exit_code, 0, "{line}: {output:?}");
        output.stdout.trim().to_owned()
    }

    /// Executes with a body such as `{"command": […]}`.
    #[track_caller]
    pub fn execute(&self, body: &Value) -> Output {
        let answer = self.client().post(&self.path("/execute")).json(body).send();
        let took = answer.took;
        let answer = answer.ok();
        let text = |field: &str| {
            answer[field]
                .as_str()
                .unwrap_or_else(|| panic!("no {field} in {answer}"))
                .to_owned()
        };
        let exit_code = answer["exit_code"]
            .as_i64()
            .unwrap_or_else(|| panic!("no exit_code in {answer}"));
        Output {
            exit_code,
            stdout: text("stdout"),
            stderr: text("stderr"),
            took,
            answer,
        }
    }

    /// Writes a file.
    #[track_caller]
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let body = json!({ "files": [{ "path": path, "content": STANDARD.encode(content) }] });
        self.client().post(&self.path("/files")).json(&body).send().ok();
    }

    /// Reads a file.
    #[track_caller]
    pub fn read(&self, path: &str) -> Vec<u8> {
        let answer = self
            .client()
            .get(&self.path(&format!("/files?path={path}")))
            .send()
            .ok();
        let content = answer["content"]
            .as_str()
            .unwrap_or_else(|| panic!("no content in {answer}"));
        STANDARD.decode(content).expect("standard base64")
    }

    /// Replaces its policy and makes sure that the node has applied it.
    #[track_caller]
    pub fn set_network(&self, policy: &Value) -> Value {
        let answer = self.client().put(&self.path("/network")).json(policy).send().ok();
        assert_eq!(
            answer["applied"], true,
            "the node did not apply the policy: {answer}"
        );
        answer
    }

    /// Its audit records by further filters.
    #[track_caller]
    pub fn audit(&self, filters: &str) -> Vec<Value> {
        self.organization
            .audit(&format!("sandbox_id={}&{filters}", self.id))
    }

    /// Waits for an audit record with these fields.
    #[track_caller]
    pub fn audited(&self, fields: &Value) -> Value {
        let fields = fields.as_object().expect("an object");
        let fits = |event: &Value| fields.iter().all(|(name, value)| event.get(name) == Some(value));
        let found = wait::within(AUDIT, || self.audit("").into_iter().find(fits));
        found.unwrap_or_else(|| {
            let mut all = String::new();
            for event in self.audit("") {
                writeln!(all, "{event}").expect("writing to a string");
            }
            panic!("no audit record with {fields:?} among\n{all}")
        })
    }

    /// Its status as the API tells it.
    #[track_caller]
    pub fn status(&self) -> String {
        let answer = self.client().get(&self.path("")).send().ok();
        answer["status"]
            .as_str()
            .unwrap_or_else(|| panic!("no status in {answer}"))
            .to_owned()
    }

    /// Stops it.
    #[track_caller]
    pub fn stop(&self) {
        let answer = self.client().post(&self.path("/stop")).send().ok();
        assert_eq!(answer["success"], true, "stop answered {answer}");
    }

    /// Starts a command that goes on, and comes back once `ready` is true.
    #[track_caller]
    pub fn background(&self, line: &str, ready: impl Fn(&Self) -> bool) {
        self.sh_ok(&format!(
            ": >/workspace/background.log; setsid sh -c '{line}' >/workspace/background.log 2>&1 </dev/null & echo started"
        ));
        let started = Instant::now();
        let ready = wait::within(READY, || ready(self).then_some(()));
        ready.unwrap_or_else(|| {
            panic!(
                "`{line}` is not ready after {:?}: {}",
                started.elapsed(),
                self.sh("cat /workspace/background.log").stdout
            )
        });
    }
}
