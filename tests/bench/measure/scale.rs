//! A thousand sandboxes on one node: what their policies take of memory and time. A real netd follows a scripted
//! controller ([`script`]); the endpoints are real veths in its router namespace, with the programs on them. No sandbox
//! runs behind them, for netd never looks there. Beside it, what looking up a destination costs, and what it costs
//! nftables ([`peer`]).

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use harness::namespace::Namespace;
use netd::router::RouterNamespace;
use sandgate_api::{
    feed::{Endpoint, FeedSandbox, PolicyTier, TierName},
    id::SandboxId,
};
use sandgate_policy::{Platform, Policy, SandboxPolicy};
use serde_json::{Value, json};

use self::script::Script;
use super::Effort;
use crate::{
    result::{Kind, Table},
    say,
    world::{RunDir, World},
};

mod peer;
mod script;

pub(crate) use self::peer::{neighbour, table};

/// Endpoints of one node.
const MANY: usize = 1000;
/// Endpoints at which a change has its aim.
const SOME: usize = 200;
/// Organisations among which they are spread.
const GROUPS: usize = 10;
/// Rules of one policy that many share.
const SIZES: [u32; 3] = [10, 1000, 10_000];
/// Rules of one policy that nobody shares. A node's kernel holds a million rules (`limit::PREFIXES`) of all its sandboxes
/// together, the old ones beside the new while they change: the most here are a tenth of that, as many as ten policies of
/// 10,000 rules.
const OWN_SIZES: [u32; 2] = [10, 100];
/// Changes of one sandbox in a round, and of an organisation.
const CHANGES: usize = 40;
const WIDE_CHANGES: usize = 10;

/// Runs it.
pub(crate) fn scale(effort: Effort) -> Result<Vec<Table>> {
    let sizes: Vec<u32> = SIZES
        .into_iter()
        .filter(|size| {
            let fits = document(*size, 0, 0).is_ok_and(|policy| compile(&policy).is_ok());
            if !fits {
                say(&format!(
                    "scale: a policy of {size} rules is over the limits, left out"
                ));
            }
            fits
        })
        .collect();
    let mut tables = one_policy(effort, &sizes)?;
    tables.extend(node(effort, &sizes)?);
    tables.extend(peer::lookups(effort, &SIZES)?);
    Ok(tables)
}

/// A policy of so many rules, each of its own address. `variant` makes it another one with the same addresses, `owner`
/// one with others.
fn document(size: u32, owner: u32, variant: u32) -> Result<Policy> {
    let rule = |number: u32| {
        let address = Ipv4Addr::from(0x2000_0000 + (owner << 14) + number);
        let port = 443 + number % 8 + variant * 8;
        json!({ "name": format!("rule-{number}"), "action": "allow", "cidrs": [format!("{address}/32")],
            "ports": [port.to_string()], "protocol": "tcp" })
    };
    let rules: Vec<Value> = (0..size).map(rule).collect();
    Ok(Policy::parse(&json!({ "mode": "allowlist", "rules": rules }))?)
}

fn compile(policy: &Policy) -> Result<SandboxPolicy> {
    let tiers = [("organization".to_owned(), policy.clone())];
    Ok(SandboxPolicy::compile(&Platform::new(Vec::new()), &tiers)?)
}

/// Compiling, writing and sharing one policy, in this process.
fn one_policy(effort: Effort, sizes: &[u32]) -> Result<Vec<Table>> {
    let world = World::with_sandboxes(2);
    let [one, two] = [0, 1].map(|index: usize| world.sandboxes[index].1);
    let names: Vec<String> = sizes
        .iter()
        .flat_map(|size| {
            [
                format!("{size} rules: compile"),
                format!("{size} rules: write into the kernel, switch one endpoint"),
                format!("{size} rules: switch another endpoint to it"),
            ]
        })
        .collect();
    let rows: Vec<_> = names.iter().map(|name| (name.as_str(), None)).collect();
    let mut table = Table::new("One policy", "ms", Kind::Latency, &rows);
    for round in 0..effort.rounds {
        for (size, names) in sizes.iter().zip(names.chunks(3)) {
            let (mut compiled, mut written, mut shared) = (Vec::new(), Vec::new(), Vec::new());
            for number in 0..effort.times(10) {
                let variant = u32::try_from(1 + round * 10 + number)?;
                let policy = document(*size, 0, variant)?;
                let began = Instant::now();
                let policy = compile(&policy)?;
                compiled.push(milliseconds(began.elapsed()));
                let table = policy.kernel_table();
                let began = Instant::now();
                let content = world.datapath.set_policy(one, &table)?;
                written.push(milliseconds(began.elapsed()));
                let began = Instant::now();
                ensure!(world.datapath.share_policy(two, content)?, "it was just written");
                shared.push(milliseconds(began.elapsed()));
            }
            for (name, figures) in names.iter().zip([compiled, written, shared]) {
                table.add(name, figures);
            }
            world.datapath.sweep()?;
        }
    }
    Ok(vec![table])
}

/// Everything that a whole node shows.
fn node(effort: Effort, sizes: &[u32]) -> Result<Vec<Table>> {
    let run_dir = RunDir::new();
    let router = RouterNamespace::open(run_dir.path())?;
    let outside = Namespace::network("scale")?;
    let (many, some) = (effort.times(MANY), effort.times(SOME));
    let endpoints = endpoints(&router, many)?;
    let mut all: BTreeMap<SandboxId, FeedSandbox> = BTreeMap::new();
    let first = Arc::new(document(SIZES[0], 0, 0)?);
    for (number, endpoint) in endpoints.into_iter().enumerate() {
        let sandbox = sandbox(number, endpoint, &first)?;
        all.insert(sandbox.sandbox_id.clone(), sandbox);
    }

    let mut script = Script::start(run_dir.path(), &outside, 0)?;
    let few: BTreeMap<_, _> = all
        .iter()
        .take(some)
        .map(|(id, sandbox)| (id.clone(), sandbox.clone()))
        .collect();
    script.snapshot(&BTreeMap::new())?;
    let mut memory = Memory::new(&script, run_dir.path())?;
    let took = script.snapshot(&few)?;
    let mut attached = vec![milliseconds(took) / number(some)];
    memory.note(
        &format!("{some} endpoints, one policy of 10 rules"),
        &script,
        run_dir.path(),
    )?;

    let mut changes = Vec::new();
    changes.push(changed(effort, &mut script, &few, some)?);
    let rest: Vec<_> = all.values().skip(some).cloned().collect();
    let took = script.upsert(rest)?;
    attached.push(milliseconds(took) / number(many - some));
    memory.note(
        &format!("{many} endpoints, one policy of 10 rules"),
        &script,
        run_dir.path(),
    )?;
    changes.push(changed(effort, &mut script, &all, many)?);

    let mut applied = Vec::new();
    for size in sizes {
        // Each organisation its own policy.
        let policies = (0..GROUPS)
            .map(|owner| document(*size, u32::try_from(owner)?, 0).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let of = |index: usize| Arc::clone(&policies[index % GROUPS]);
        let what = format!("{many} endpoints in {GROUPS} groups of one policy each, {size} rules");
        applied.push((what.clone(), vec![give(&mut script, &mut all, of)?]));
        memory.note(&what, &script, run_dir.path())?;
    }
    for size in OWN_SIZES {
        let policies = (0..many)
            .map(|owner| document(size, u32::try_from(owner)?, 0).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let what = format!("{many} endpoints, each its own {size} rules");
        applied.push((
            what.clone(),
            vec![give(&mut script, &mut all, |index| Arc::clone(&policies[index]))?],
        ));
        memory.note(&what, &script, run_dir.path())?;
    }
    give(&mut script, &mut all, |_| Arc::clone(&first))?;

    let revision = script.revision();
    drop(script);
    let began = Instant::now();
    let script = Script::start(run_dir.path(), &outside, revision)?;
    let adopted = vec![milliseconds(script.adopted()?.saturating_duration_since(began))];
    drop(script);

    let mut endpoints = Table::new(
        "Attaching endpoints",
        "ms",
        Kind::Cost,
        &[
            ("one more endpoint, two veths' programs and its rules", None),
            ("a netd that starts again, until all are enforced anew", None),
        ],
    );
    for figure in attached {
        endpoints.add(
            "one more endpoint, two veths' programs and its rules",
            vec![figure],
        );
    }
    endpoints.add("a netd that starts again, until all are enforced anew", adopted);
    let names: Vec<_> = applied.iter().map(|(name, _)| (name.as_str(), None)).collect();
    let mut frames = Table::new(
        "Everybody's policy changes at once: frame to acknowledgement",
        "ms",
        Kind::Cost,
        &names,
    );
    for (name, figures) in &applied {
        frames.add(name, figures.clone());
    }
    let mut tables = vec![endpoints];
    tables.extend(changes);
    tables.push(frames);
    tables.extend(memory.tables());
    Ok(tables)
}

fn sandbox(number: usize, endpoint: Endpoint, policy: &Arc<Policy>) -> Result<FeedSandbox> {
    Ok(FeedSandbox {
        sandbox_id: format!("sandbox-{number:04}").parse()?,
        org_id: format!("org-{}", number % GROUPS).parse()?,
        endpoint,
        tiers: vec![tier(TierName::Organization, policy)],
        bindings: Vec::new(),
        ca_generation: 0,
        tunnel_ports: Vec::new(),
    })
}

fn tier(tier: TierName, policy: &Arc<Policy>) -> PolicyTier {
    PolicyTier {
        tier,
        policy: Arc::clone(policy),
    }
}

/// Gives every sandbox a policy in one frame.
fn give(
    script: &mut Script,
    all: &mut BTreeMap<SandboxId, FeedSandbox>,
    policy: impl Fn(usize) -> Arc<Policy>,
) -> Result<f64> {
    for (index, sandbox) in all.values_mut().enumerate() {
        sandbox.tiers = vec![tier(TierName::Organization, &policy(index))];
    }
    Ok(milliseconds(script.upsert(all.values().cloned().collect())?))
}

/// One sandbox's own tier and everybody's organisation change, again and again.
fn changed(
    effort: Effort,
    script: &mut Script,
    all: &BTreeMap<SandboxId, FeedSandbox>,
    count: usize,
) -> Result<Table> {
    let rows = [
        ("one sandbox's policy", None),
        ("the policy of all of them, which they share", None),
    ];
    let title = format!("A change with {count} endpoints: frame to acknowledgement");
    let mut table = Table::new(&title, "ms", Kind::Latency, &rows);
    let policies = (1..=40)
        .map(|variant| document(SIZES[0], 0, variant).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let mut next = policies.iter().cycle();
    let mut sandboxes = all.values().cycle();
    for _ in 0..effort.rounds {
        let mut figures = Vec::new();
        for _ in 0..effort.times(CHANGES) {
            let mut one = sandboxes.next().context("a sandbox")?.clone();
            one.tiers
                .push(tier(TierName::Sandbox, next.next().context("a policy")?));
            figures.push(milliseconds(script.upsert(vec![one])?));
        }
        table.add(rows[0].0, figures);
        let mut figures = Vec::new();
        for _ in 0..effort.times(WIDE_CHANGES) {
            let policy = next.next().context("a policy")?;
            let all = all.values().map(|sandbox| FeedSandbox {
                tiers: vec![tier(TierName::Organization, policy)],
                ..sandbox.clone()
            });
            figures.push(milliseconds(script.upsert(all.collect())?));
        }
        table.add(rows[1].0, figures);
    }
    script.upsert(all.values().cloned().collect())?;
    Ok(table)
}

/// Memory as it is after each step.
struct Memory {
    steps: Vec<(String, f64, f64, f64)>,
}

impl Memory {
    fn new(script: &Script, run_dir: &Path) -> Result<Self> {
        let mut memory = Self { steps: Vec::new() };
        memory.note("no endpoint", script, run_dir)?;
        Ok(memory)
    }

    fn note(&mut self, name: &str, script: &Script, run_dir: &Path) -> Result<()> {
        // What was replaced is freed a few seconds later.
        std::thread::sleep(netd::dial::SWEEP + Duration::from_secs(1));
        let policies = locked(run_dir, "POLICIES")?;
        let mut all = 0.0;
        for entry in fs::read_dir(run_dir.join("bpf/maps"))? {
            let name = entry?.file_name();
            all += locked(run_dir, &name.to_string_lossy())?;
        }
        self.steps
            .push((name.to_owned(), script.resident()?, policies, all - policies));
        Ok(())
    }

    fn tables(self) -> [Table; 3] {
        let names: Vec<_> = self
            .steps
            .iter()
            .map(|(name, ..)| (name.as_str(), None))
            .collect();
        let mut tables = [
            "netd's resident memory",
            "The kernel's map of policies",
            "All other maps",
        ]
        .map(|title| Table::new(title, "MiB", Kind::Cost, &names));
        for (name, resident, policies, others) in &self.steps {
            for (table, figure) in tables.iter_mut().zip([resident, policies, others]) {
                table.add(name, vec![*figure]);
            }
        }
        tables
    }
}

/// What a map takes of the kernel's memory, in MiB, as the kernel says (`memlock` of its descriptor).
fn locked(run_dir: &Path, map: &str) -> Result<f64> {
    let map = MapData::from_pin(run_dir.join("bpf/maps").join(map))?;
    let number = std::os::fd::AsFd::as_fd(map.fd()).as_raw_fd();
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    let bytes: f64 = line.context("no memlock")?.trim().parse()?;
    Ok(bytes / 1024.0 / 1024.0)
}

/// Pairs of veths, both ends in the router namespace.
fn endpoints(router: &RouterNamespace, count: usize) -> Result<Vec<Endpoint>> {
    let gateway = netd_common::GATEWAY_MAC
        .map(|byte| format!("{byte:02x}"))
        .join(":");
    let mut commands = String::new();
    for number in 0..count {
        writeln!(
            commands,
            "link add sg{number} address {gateway} type veth peer name pe{number}"
        )?;
    }
    router.run(|| -> Result<Vec<Endpoint>> {
        let mut command = Command::new("ip");
        let mut child = command
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("a pipe")?
            .write_all(commands.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "ip: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        (0..count)
            .map(|number| {
                let interface = format!("sg{number}");
                let [_, _, high, low] = u32::try_from(number + 1)?.to_be_bytes();
                Ok(Endpoint {
                    ifindex: nix::net::if_::if_nametoindex(interface.as_str())?,
                    interface,
                    address: Ipv4Addr::new(10, 213, high, low),
                    address6: None,
                    mac: [0x02, 0x53, 0x47, 0x01, high, low],
                    agent_port: 7000,
                })
            })
            .collect()
    })?
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn number(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
