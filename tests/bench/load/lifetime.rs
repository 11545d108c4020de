//! Sandboxes by the API: from nothing to the first command's result, and a command in one that runs.

use std::{
    process::{Command, Stdio},
    sync::{Arc, Barrier},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Access, api::Api};

/// Sandboxes made at once, each with a first command, then stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Create {
    /// The API.
    pub(crate) access: Access,
    /// How many at once.
    pub(crate) ways: usize,
    /// How often, one after the other.
    pub(crate) times: usize,
    /// What create is asked for.
    pub(crate) body: Value,
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Lives {
    /// Of create alone.
    pub(crate) created: Vec<f64>,
    /// From the request to create to the first command's result.
    pub(crate) first_command: Vec<f64>,
    /// Of stop.
    pub(crate) stopped: Vec<f64>,
    /// Of each of [`PARTS`] of create, as the controller tells it: whole milliseconds.
    pub(crate) parts: [Vec<f64>; PARTS.len()],
}

/// Members of create's `startup_metrics.breakdown`.
pub(crate) const PARTS: [&str; 4] = ["prepare_ms", "enforce_ms", "launch_ms", "agent_ms"];

/// One sandbox's figures.
struct Life {
    created: f64,
    first_command: f64,
    stopped: f64,
    parts: [f64; PARTS.len()],
}

/// A command, again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Execute {
    /// The API.
    pub(crate) access: Access,
    /// Where.
    pub(crate) sandbox: String,
    /// How often.
    pub(crate) count: usize,
}

impl Create {
    pub(super) fn measure(&self) -> Result<Lives> {
        let mut all = Lives::default();
        for _ in 0..self.times {
            let barrier = Arc::new(Barrier::new(self.ways));
            let threads: Vec<_> = (0..self.ways)
                .map(|_| {
                    let (create, barrier) = (self.clone(), Arc::clone(&barrier));
                    thread::spawn(move || create.live(&barrier))
                })
                .collect();
            for thread in threads {
                let life = thread.join().map_err(|_panic| anyhow!("a client died"))??;
                all.created.push(life.created);
                all.first_command.push(life.first_command);
                all.stopped.push(life.stopped);
                for (all, part) in all.parts.iter_mut().zip(life.parts) {
                    all.push(part);
                }
            }
        }
        Ok(all)
    }

    fn live(&self, barrier: &Barrier) -> Result<Life> {
        let api = Api::connect(&self.access);
        barrier.wait();
        let lived = api.and_then(|mut api| {
            let began = Instant::now();
            let created = api.call("POST", "/sandbox/create", &self.body)?;
            let after_create = milliseconds(began);
            let id = created["sandbox_id"].as_str().context("no id")?.to_owned();
            run_true(&mut api, &id)?;
            let breakdown = &created["startup_metrics"]["breakdown"];
            let parts = PARTS.map(|part| breakdown[part].as_f64().unwrap_or_default());
            Ok((api, id, parts, [after_create, milliseconds(began)]))
        });
        // None is stopped before all are done, else the first would make it easier for the last.
        barrier.wait();
        let (mut api, id, parts, [created, first_command]) = lived?;
        let began = Instant::now();
        api.call("POST", &format!("/sandbox/{id}/stop"), &json!({}))?;
        Ok(Life {
            created,
            first_command,
            stopped: milliseconds(began),
            parts,
        })
    }
}

impl Execute {
    pub(super) fn measure(&self) -> Result<Vec<f64>> {
        let mut api = Api::connect(&self.access)?;
        run_true(&mut api, &self.sandbox)?;
        (0..self.count)
            .map(|_| {
                let began = Instant::now();
                run_true(&mut api, &self.sandbox)?;
                Ok(milliseconds(began))
            })
            .collect()
    }
}

fn run_true(api: &mut Api, sandbox: &str) -> Result<()> {
    let answer = api.call(
        "POST",
        &format!("/sandbox/{sandbox}/execute"),
        &json!({ "command": ["true"] }),
    )?;
    ensure!(answer["exit_code"] == 0, "`true` answered {answer}");
    Ok(())
}

/// `true` as a child of this process.
pub(super) fn spawn(count: usize) -> Result<Vec<f64>> {
    (0..count)
        .map(|_| {
            let began = Instant::now();
            let mut command = Command::new("true");
            command.stdin(Stdio::null()).stdout(Stdio::null());
            ensure!(command.status()?.success(), "`true` failed");
            Ok(milliseconds(began))
        })
        .collect()
}

pub(super) fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
