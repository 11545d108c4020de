//! Makes a frame true on this node. Owns: the order of the steps. Rules are in the kernel, names and flows
//! follow them, what they forbid has ended, and only then the frame counts as applied. A sandbox that cannot
//! be enforced as asked is denied everything and reported.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use sandgate_api::{
    feed::{FeedError, FeedFrame, FeedSandbox, Revision},
    id::SandboxId,
};
use sandgate_policy::{Platform, PolicyError};

use super::StateFile;
use crate::{
    kernel::{Datapath, DatapathError, EndpointHandle},
    memory,
    node::{self, Change, Desired},
    pins::{log::PinLog, room::Room},
    sandbox::{CutReason, Library, PinError, Rules, RulesError, Sandbox, Sandboxes},
    sockets,
};

/// Time for the tasks of cut flows to end. They only have to notice.
const CUT_TIME: Duration = Duration::from_secs(2);

/// Makes frames true.
pub struct Enforcer {
    datapath: Arc<Datapath>,
    platform: Arc<Platform>,
    sandboxes: Arc<Sandboxes>,
    library: Arc<Library>,
    pins: PathBuf,
    /// For the pins of all sandboxes.
    room: Room,
    file: StateFile,
    desired: Desired,
    /// What is enforced exactly as listed.
    actual: BTreeMap<SandboxId, FeedSandbox>,
    /// Why the others are not.
    failed: BTreeMap<SandboxId, String>,
    /// Endpoints adopted from an earlier netd, or that could not be detached: gone unless the first frame lists
    /// them. Read once at the start, for netd's canary makes an endpoint of its own later.
    leftovers: Vec<(EndpointHandle, Ipv4Addr)>,
    /// Pins of sandboxes that went while there was no netd are still to be looked for.
    has_old_pins: bool,
    /// The file does not hold what is desired.
    is_unsaved: bool,
    /// The file tells of sandboxes that are gone.
    remembers_ended: bool,
    /// What nobody needs any more is still to be given back.
    has_changed: bool,
}

/// One sandbox could not be enforced as asked.
#[derive(Debug, thiserror::Error)]
enum EnforceError {
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Kernel(#[from] DatapathError),
    #[error(transparent)]
    Pins(#[from] PinError),
    #[error("flows that the new rules forbid did not end in time")]
    StillOpen,
    #[error("the work was interrupted")]
    Interrupted,
}

impl Enforcer {
    /// Enforces nothing yet. Pins of sandboxes are kept in the directory `pins`.
    pub fn new(
        datapath: Arc<Datapath>,
        platform: Arc<Platform>,
        sandboxes: Arc<Sandboxes>,
        pins: PathBuf,
        file: StateFile,
    ) -> Self {
        let desired = Desired::default();
        let (actual, failed) = (BTreeMap::new(), BTreeMap::new());
        let leftovers = datapath.known();
        Self {
            datapath,
            platform,
            sandboxes,
            library: Arc::default(),
            pins,
            room: Room::default(),
            file,
            desired,
            actual,
            failed,
            leftovers,
            has_old_pins: true,
            is_unsaved: false,
            remembers_ended: false,
            has_changed: false,
        }
    }

    /// The revision that is in force.
    pub fn revision(&self) -> Option<Revision> {
        self.desired.revision
    }

    /// The sandboxes that are denied everything because they could not be enforced as asked.
    pub fn errors(&self) -> Vec<FeedError> {
        let error = |(id, message): (&SandboxId, &String)| FeedError {
            sandbox_id: id.clone(),
            message: message.clone(),
        };
        self.failed.iter().map(error).collect()
    }

    /// Puts the saved state in force, before the controller is reached.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn restore(&mut self) -> io::Result<()> {
        let Some(saved) = self.file.load()? else {
            return Ok(());
        };
        tracing::info!(
            revision = saved.revision,
            sandboxes = saved.sandboxes.len(),
            "restoring the last state"
        );
        if let Some(mut snapshot) = saved.snapshot() {
            self.library.share_documents(&mut snapshot);
            self.desired = Desired::default().after(snapshot);
        }
        self.converge().await;
        memory::give_back();
        Ok(())
    }

    /// Puts a frame in force, whose line is as it came.
    pub async fn apply(&mut self, mut frame: FeedFrame, line: &[u8]) {
        let is_delta = matches!(frame, FeedFrame::Delta { .. });
        self.has_changed = true;
        self.remembers_ended |= matches!(&frame, FeedFrame::Delta { removed, .. } if !removed.is_empty());
        self.library.share_documents(&mut frame);
        self.desired = std::mem::take(&mut self.desired).after(frame);
        self.converge().await;
        self.remove_leftovers();
        if std::mem::take(&mut self.has_old_pins) {
            self.remove_old_pins();
        }
        let saved = self.file.add(line, is_delta, &self.desired);
        self.note_saved(&saved);
    }

    /// Does what need not be done before a frame is acknowledged.
    pub fn tidy(&mut self) {
        // What is over is not kept: the deltas before it tell of sandboxes that are gone.
        if std::mem::take(&mut self.remembers_ended) || self.file.is_long() {
            self.save();
        }
    }

    /// Tries again what failed, and does what has time until nothing else happens.
    pub async fn retry(&mut self) {
        if !self.failed.is_empty() {
            self.converge().await;
        }
        if self.is_unsaved {
            self.save();
        }
        if std::mem::take(&mut self.has_changed) {
            memory::give_back();
        }
    }

    fn save(&mut self) {
        let saved = self.file.save(&self.desired);
        self.note_saved(&saved);
    }

    fn note_saved(&mut self, saved: &io::Result<()>) {
        if let Err(error) = saved {
            tracing::error!(
                %error,
                "cannot save the state: a restart would begin without it, and refuse what netd decides on until the \
                 controller is reached"
            );
        } else if self.is_unsaved {
            tracing::info!("the state is saved again");
        }
        self.is_unsaved = saved.is_err();
    }

    async fn converge(&mut self) {
        let is_wanted = |id: &SandboxId| self.desired.sandboxes.contains_key(id);
        let given_up: Vec<_> = self.failed.keys().filter(|id| !is_wanted(id)).cloned().collect();
        for id in given_up {
            self.remove(&id).await;
        }
        let (mut rules, mut attachments) = (Vec::new(), Vec::new());
        for change in node::changes(&self.actual, &self.desired.sandboxes) {
            match change {
                Change::Remove(id) => self.remove(&id).await,
                Change::Attach(wanted) => attachments.push(wanted),
                Change::Rules(wanted) => rules.push(wanted),
                Change::Ports(wanted) => self.ports(wanted).await,
                Change::Refuse(id, why) => {
                    self.remove(&id).await;
                    self.failed.insert(id, why);
                }
            }
        }
        // What others may do no longer must not wait for new ones, whose attachment takes the kernel longer.
        self.rules(rules).await;
        for wanted in attachments {
            self.attach(wanted).await;
        }
        // Gone ones that were never enforced as listed, but may be attached.
        for sandbox in self.sandboxes.all() {
            if !self.desired.sandboxes.contains_key(&sandbox.id) {
                self.remove(&sandbox.id).await;
            }
        }
    }

    async fn attach(&mut self, wanted: FeedSandbox) {
        // It may be there already, denied everything since an earlier attempt.
        if let Some(present) = self.sandboxes.get(&wanted.sandbox_id) {
            if present.endpoint == wanted.endpoint {
                return self.rules(vec![wanted]).await;
            }
            self.remove(&wanted.sandbox_id).await;
        }
        let (datapath, platform) = (Arc::clone(&self.datapath), Arc::clone(&self.platform));
        let library = Arc::clone(&self.library);
        let (pin_file, room) = (self.pins.join(wanted.sandbox_id.as_str()), self.room.clone());
        let asked = wanted.clone();
        let attached = tokio::task::spawn_blocking(move || {
            let handle = datapath.attach(&asked.endpoint)?;
            let rules = Rules::compile(&library, &platform, &asked);
            let (rules, broken) = match rules {
                Ok(rules) => (rules, None),
                Err(error) => (
                    Rules::nothing(&platform, asked.org_id.clone())?,
                    Some(EnforceError::from(error)),
                ),
            };
            let sandbox = Sandbox::open(
                asked.sandbox_id,
                (asked.endpoint, handle),
                rules,
                Arc::clone(&datapath),
                (&pin_file, &room),
            );
            let sandbox = match sandbox {
                Ok(sandbox) => sandbox,
                Err(error) => {
                    // Nobody here knows it: nothing may pass, neither by an earlier netd's rules, nor for whoever gets
                    // its interface or address next.
                    datapath.detach(handle)?;
                    return Err(error.into());
                }
            };
            let broken = sandbox.install_rules().err().map(EnforceError::from).or(broken);
            Ok::<_, EnforceError>((sandbox, broken))
        });
        let attached = attached
            .await
            .unwrap_or_else(|_panic| Err(EnforceError::Interrupted));
        let id = wanted.sandbox_id.clone();
        match attached {
            Ok((sandbox, broken)) => {
                let sandbox = Arc::new(sandbox);
                // Of what an earlier netd admitted only that which is still wanted stays.
                let ports = if broken.is_none() {
                    wanted.tunnel_ports.as_slice()
                } else {
                    &[]
                };
                let opened = open_ports(&self.datapath, &sandbox, ports).await;
                self.sandboxes.insert(Arc::clone(&sandbox));
                match broken.map_or(opened, Err) {
                    Ok(()) => {
                        tracing::info!(sandbox_id = %id, interface = wanted.endpoint.interface, "enforced");
                        self.succeeded(wanted);
                    }
                    Err(error) => {
                        self.deny(&sandbox, &wanted).await;
                        self.fail(id, &error);
                    }
                }
            }
            Err(error) => self.fail(id, &error),
        }
    }

    /// All in one go: a change that concerns every sandbox of an organisation takes one turn, not one for each.
    async fn rules(&mut self, all: Vec<FeedSandbox>) {
        let mut work = Vec::with_capacity(all.len());
        for wanted in all {
            match self.sandboxes.get(&wanted.sandbox_id) {
                Some(sandbox) => work.push((sandbox, wanted)),
                None => {
                    // Listed as enforced and yet not there: begin anew.
                    self.actual.remove(&wanted.sandbox_id);
                    self.fail(wanted.sandbox_id, &EnforceError::Interrupted);
                }
            }
        }
        if work.is_empty() {
            return;
        }
        let (platform, library) = (Arc::clone(&self.platform), Arc::clone(&self.library));
        let present = work.clone();
        let replaced = tokio::task::spawn_blocking(move || {
            let replace = |(sandbox, wanted): &(Arc<Sandbox>, FeedSandbox)| {
                let rules = Rules::compile(&library, &platform, wanted)?;
                Ok::<_, EnforceError>(sandbox.replace_rules(rules)?)
            };
            work.iter().map(replace).collect::<Vec<_>>()
        });
        let interrupted = |_panic| {
            present
                .iter()
                .map(|_| Err(EnforceError::Interrupted))
                .collect::<Vec<_>>()
        };
        let replaced = replaced.await.unwrap_or_else(interrupted);
        let (count, deadline) = (present.len(), Instant::now() + CUT_TIME);
        for ((sandbox, wanted), cut) in present.into_iter().zip(replaced) {
            let outcome = match cut {
                Ok(cut) => self.settle(&sandbox, &wanted, &cut, deadline).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => {
                    tracing::debug!(sandbox_id = %wanted.sandbox_id, "new rules in force");
                    self.succeeded(wanted);
                }
                Err(error) => {
                    self.deny(&sandbox, &wanted).await;
                    self.actual.remove(&wanted.sandbox_id);
                    self.fail(wanted.sandbox_id, &error);
                }
            }
        }
        tracing::info!(sandboxes = count, "new rules in force");
    }

    /// Until the flows that were cut have ended, and tunnels lead where they may.
    async fn settle(
        &self,
        sandbox: &Arc<Sandbox>,
        wanted: &FeedSandbox,
        cut: &[u64],
        deadline: Instant,
    ) -> Result<(), EnforceError> {
        if !cut.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            sandbox
                .gone(cut, left)
                .await
                .map_err(|_elapsed| EnforceError::StillOpen)?;
        }
        let enforced = self.actual.get(&wanted.sandbox_id);
        if enforced.is_some_and(|enforced| node::same_ports(enforced, wanted)) {
            return Ok(());
        }
        open_ports(&self.datapath, sandbox, &wanted.tunnel_ports).await
    }

    /// Whatever is half done: nothing may pass, as the controller is told.
    async fn deny(&self, sandbox: &Arc<Sandbox>, wanted: &FeedSandbox) {
        let id = &wanted.sandbox_id;
        if let Ok(nothing) = Rules::nothing(&self.platform, wanted.org_id.clone())
            && let Err(error) = self.replace(sandbox, nothing).await
        {
            tracing::error!(sandbox_id = %id, %error, "cannot deny a sandbox in whole");
        }
        if let Err(error) = open_ports(&self.datapath, sandbox, &[]).await {
            tracing::error!(sandbox_id = %id, %error, "cannot close a sandbox's tunnels");
        }
    }

    /// Only the ports that tunnels lead to are others: the rules stay as they are.
    async fn ports(&mut self, wanted: FeedSandbox) {
        let id = wanted.sandbox_id.clone();
        let Some(sandbox) = self.sandboxes.get(&id) else {
            self.actual.remove(&id);
            self.fail(id, &EnforceError::Interrupted);
            return;
        };
        match open_ports(&self.datapath, &sandbox, &wanted.tunnel_ports).await {
            Ok(()) => {
                tracing::info!(sandbox_id = %id, ports = wanted.tunnel_ports.len(), "new tunnel ports in force");
                self.succeeded(wanted);
            }
            Err(error) => {
                self.deny(&sandbox, &wanted).await;
                self.actual.remove(&id);
                self.fail(id, &error);
            }
        }
    }

    async fn replace(&self, sandbox: &Arc<Sandbox>, rules: Rules) -> Result<(), EnforceError> {
        let replaced = {
            let sandbox = Arc::clone(sandbox);
            tokio::task::spawn_blocking(move || sandbox.replace_rules(rules)).await
        };
        let cut = replaced.map_err(|_panic| EnforceError::Interrupted)??;
        sandbox
            .gone(&cut, CUT_TIME)
            .await
            .map_err(|_elapsed| EnforceError::StillOpen)
    }

    async fn remove(&mut self, id: &SandboxId) {
        self.actual.remove(id);
        self.failed.remove(id);
        let Some(sandbox) = self.sandboxes.remove(id) else {
            self.remove_pins(id);
            return;
        };
        let flows = sandbox.close(CutReason::SandboxGone);
        if let Err(error) = open_ports(&self.datapath, &sandbox, &[]).await {
            // Its end takes them away, too.
            tracing::debug!(sandbox_id = %id, %error, "cannot close a removed sandbox's tunnels");
        }
        if sandbox.gone(&flows, CUT_TIME).await.is_err() {
            tracing::error!(sandbox_id = %id, "flows of a removed sandbox did not end in time");
        }
        match self.datapath.detach(sandbox.handle) {
            Ok(()) => sandbox.retire(),
            Err(error) => {
                // Still denied: no address of it is known here any more. The next frame tries again.
                tracing::error!(sandbox_id = %id, %error, "cannot detach a removed sandbox");
                self.leftovers.push((sandbox.handle, sandbox.endpoint.address));
            }
        }
        self.remove_pins(id);
        tracing::info!(sandbox_id = %id, "removed");
    }

    fn remove_pins(&self, id: &SandboxId) {
        if let Err(error) = PinLog::delete(&self.pins.join(id.as_str())) {
            tracing::warn!(sandbox_id = %id, %error, "cannot delete the pin log");
        }
    }

    /// Deletes the pins of sandboxes that the controller does not list: they went while there was no netd.
    fn remove_old_pins(&self) {
        let entries = std::fs::read_dir(&self.pins).into_iter().flatten();
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            // The one that is being written anew has an extension.
            let id = path
                .file_stem()
                .and_then(|name| name.to_str()?.parse::<SandboxId>().ok());
            if id.is_some_and(|id| self.desired.sandboxes.contains_key(&id)) {
                continue;
            }
            if let Err(error) = PinLog::delete(&path) {
                tracing::warn!(%error, path = %path.display(), "cannot delete a pin log that is nobody's");
            }
        }
    }

    /// Detaches endpoints of an earlier netd that the controller does not list.
    fn remove_leftovers(&mut self) {
        if self.leftovers.is_empty() {
            return;
        }
        let ours: HashSet<u32> = self
            .sandboxes
            .all()
            .iter()
            .map(|sandbox| sandbox.handle.ordinal)
            .collect();
        let datapath = Arc::clone(&self.datapath);
        self.leftovers.retain(|(handle, address)| {
            if ours.contains(&handle.ordinal) {
                return false;
            }
            tracing::info!(ordinal = handle.ordinal, %address, "detaching an endpoint that is not listed");
            match datapath.detach(*handle) {
                Ok(()) => false,
                Err(error) => {
                    tracing::error!(ordinal = handle.ordinal, %error, "cannot detach it");
                    true
                }
            }
        });
    }

    fn succeeded(&mut self, wanted: FeedSandbox) {
        self.failed.remove(&wanted.sandbox_id);
        self.actual.insert(wanted.sandbox_id.clone(), wanted);
    }

    fn fail(&mut self, id: SandboxId, error: &EnforceError) {
        tracing::error!(sandbox_id = %id, %error, "cannot enforce a sandbox as asked; it is denied everything");
        self.failed.insert(id, error.to_string());
    }
}

/// Lets tunnels lead to these ports and to no others, and ends connections to those. Nothing flows on them once the
/// kernel no longer admits them; that their holders learn of it at once is a kindness that a kernel may not know.
async fn open_ports(
    datapath: &Arc<Datapath>,
    sandbox: &Arc<Sandbox>,
    ports: &[u16],
) -> Result<(), EnforceError> {
    let (datapath, sandbox, ports) = (Arc::clone(datapath), Arc::clone(sandbox), ports.to_vec());
    let opened = tokio::task::spawn_blocking(move || {
        let gone = sandbox.set_tunnel_ports(ports)?;
        if let Err(error) = sockets::destroy(datapath.router(), &gone) {
            tracing::warn!(sandbox_id = %sandbox.id, %error, "cannot destroy connections of closed tunnels");
        }
        Ok::<_, EnforceError>(())
    });
    opened.await.unwrap_or(Err(EnforceError::Interrupted))
}
