//! The soak: sandboxes are made, used, attacked from and ended, again and again, warm and cold, while the programs
//! around them are killed, frozen and replaced and policies change. It counts the packets at the world's edge that no
//! policy allows, and what is left behind. One line sums it up.
//!
//! | variable | default | meaning |
//! |---|---|---|
//! | `SOAK_CYCLES` | 60 | sandboxes in all |
//! | `SOAK_MINUTES` | 120 | when it ends before it has made them all |
//! | `SOAK_SEED` | the clock | what happens when |

use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use harness::{
    cases,
    node::Node,
    probe,
    sandbox::Organization,
    snapshot::{Memory, Snapshot},
    suite::{Fixture, Suite},
    wait,
    world::World,
};
use serde_json::json;

use crate::{
    edge::Edge,
    life::{Figures, Lives},
    unrest::Unrest,
};

mod edge;
mod life;
mod random;
mod unrest;

/// Sandboxes at the same time, beside the warm pool.
const AT_ONCE: usize = 4;
/// Members of the pool.
const POOL: &str = "3";
/// Longest wait for what happens by itself when nobody disturbs it.
const SETTLED: Duration = Duration::from_secs(120);
/// Longer than the pause of any sweep (netd's is 5 s).
const QUIET: Duration = Duration::from_secs(7);
/// How often the edge is judged, and what was heard forgotten.
const JUDGED: Duration = Duration::from_secs(2);
/// What a program may have more at the end than after the first tenth, in KiB.
const GROWTH: u64 = 64 << 10;

fn main() -> ExitCode {
    Suite::from_arguments()
        .group("soak", cases![nothing_gets_out_and_nothing_is_left])
        .finish()
}

/// How long, and how.
#[derive(Debug, Clone, Copy)]
struct Plan {
    cycles: usize,
    limit: Duration,
    seed: u64,
}

impl Plan {
    fn from_environment() -> Self {
        let number = |name: &str, otherwise: u64| {
            let set = env::var(name).ok().filter(|text| !text.is_empty());
            set.map_or(otherwise, |text| {
                text.parse()
                    .unwrap_or_else(|_| panic!("{name}: `{text}` is no number"))
            })
        };
        Self {
            cycles: usize::try_from(number("SOAK_CYCLES", 60)).expect("a number of sandboxes"),
            limit: Duration::from_secs(60 * number("SOAK_MINUTES", 120)),
            seed: number("SOAK_SEED", random::clock()),
        }
    }
}

/// A node with program files of its own.
struct Place {
    world: Arc<World>,
}

impl Fixture for Place {
    fn start() -> Result<Self> {
        Ok(Self {
            world: World::fixture().build()?,
        })
    }
}

fn nothing_gets_out_and_nothing_is_left(place: &Place) {
    let plan = Plan::from_environment();
    say(&format!(
        "{} cycles, at most {:?}, SOAK_SEED={}",
        plan.cycles, plan.limit, plan.seed
    ));
    let world = &place.world;
    let settings = [
        ("MAX_SANDBOXES_PER_ORG", "60"),
        ("SANDGATE_DEFAULT_DISK", "64Mi"),
        ("WARM_POOL_SIZE", POOL),
        ("WARM_POOL_ENABLED", "true"),
    ];
    let mut node = Node::start_upgradable(world, &settings).expect("it starts");
    let organization = node.register("soak");
    let mut edge = Edge::new(world);

    // Everything once, so that what is made once is there, in peace and one after the other.
    let first = Lives::new(&node, &organization, plan.seed, 8, plan.limit);
    first.live();
    assert_eq!(
        first.figures().stuck,
        Vec::<String>::new(),
        "without any disturbance"
    );
    again(&mut node, "false");
    let before = rest(&node, &organization);
    edge.judge(world);

    again(&mut node, "true");
    let began = Instant::now();
    let lives = Lives::new(&node, &organization, plan.seed, plan.cycles, plan.limit);
    let unrest = Unrest::new(&node, plan.seed, plan.cycles);
    let mut memory: Option<BTreeMap<String, Memory>> = None;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| lives.live())).collect();
        scope.spawn(|| unrest.go_on());
        let calm = unrest.until_dropped();
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(JUDGED);
            edge.judge(world);
            node.forget();
            if memory.is_none() && lives.figures().done * 10 >= plan.cycles {
                memory = memories(&node);
            }
        }
        drop(calm);
    });
    let (took, figures, disturbances) = (began.elapsed(), lives.figures(), unrest.done());
    node.wait_ready();
    works(&node, &organization);
    let memory = (memory.unwrap_or_default(), memories(&node).unwrap_or_default());

    again(&mut node, "false");
    let (leaks, new) = left(&node, &organization, &before);
    edge.judge(world);
    report(&figures, &disturbances, &edge, took, &leaks, &memory);
    if !leaks.is_empty() {
        say(&format!("what is new:\n{new}"));
    }
    verdict(&plan, &figures, &edge, &leaks, &memory);
}

/// Ends everything in good order and starts it anew, with the pool or without.
fn again(node: &mut Node, pool: &str) {
    node.stop().expect("it ends when asked");
    node.set("WARM_POOL_ENABLED", pool);
    node.start_again().expect("it starts again");
}

/// Waits until no sandbox is left and nothing ends any more, and looks what there is then.
fn rest(node: &Node, organization: &Organization) -> Snapshot {
    // What was committed although its answer was lost.
    for id in organization.running() {
        let call = organization.client.delete(&format!("/sandbox/{id}"));
        drop(call.try_send());
    }
    let mut last: Option<(Snapshot, Instant)> = None;
    wait::until("the node comes to rest without a sandbox", SETTLED, || {
        thread::sleep(Duration::from_millis(500));
        let present = Snapshot::take(node).expect("a look at the node");
        let any = node.traces().iter().any(|trace| trace.contains("sandbox-"));
        match last.take().filter(|(before, _)| !any && *before == present) {
            Some((_, since)) if since.elapsed() >= QUIET => return Some(present),
            Some(same) => last = Some(same),
            None => last = Some((present, Instant::now())),
        }
        None
    })
}

/// What there is more than before, and which of it is new.
fn left(node: &Node, organization: &Organization, before: &Snapshot) -> (BTreeMap<String, isize>, String) {
    let after = rest(node, organization);
    let mut difference = after.census();
    for (kind, count) in before.census() {
        *difference.entry(kind).or_default() -= count;
    }
    difference.retain(|_, count| *count != 0);
    (difference, after.since(before).to_string())
}

fn memories(node: &Node) -> Option<BTreeMap<String, Memory>> {
    let programs = node.programs().into_iter();
    // One that is being replaced is not there to be read.
    let all: BTreeMap<String, Memory> = programs
        .filter_map(|program| Some((program.name(), Memory::of(&program).ok()?)))
        .collect();
    (all.len() >= 4).then_some(all)
}

/// The positive twin at the end: after all that, everything works.
fn works(node: &Node, organization: &Organization) {
    let sandbox = organization.sandbox(&json!({ "network": life::open_policy() }));
    let probe = probe::Probe::install(&sandbox, node.world());
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    sandbox.stop();
}

fn report(
    figures: &Figures,
    disturbances: &BTreeMap<&'static str, usize>,
    edge: &Edge,
    took: Duration,
    leaks: &BTreeMap<String, isize>,
    (begin, end): &(BTreeMap<String, Memory>, BTreeMap<String, Memory>),
) {
    for (what, count) in disturbances {
        say(&format!("{what}: {count} times"));
    }
    let growth: Vec<String> = end
        .iter()
        .map(|(program, memory)| {
            let first = begin.get(program).map_or(0, |memory| memory.anonymous);
            format!("{program} {first}/{}", memory.anonymous)
        })
        .collect();
    say(&format!(
        "RssAnon in KiB after the first tenth and at the end: {}",
        growth.join(", ")
    ));
    let left: Vec<String> = leaks
        .iter()
        .map(|(kind, count)| format!("{kind} {count:+}"))
        .collect();
    let left = if left.is_empty() {
        "nothing".to_owned()
    } else {
        left.join(", ")
    };
    say(&format!(
        "soak: {} forbidden packets at the edge of {} sent; {} cycles ({} warm) in {:.0?}, {} forbidden attempts, \
         {} allowed ones answered, {} policies changed, {} disturbances; left behind: {left}",
        edge.forbidden() + figures.broken.len(),
        edge.seen(),
        figures.done,
        figures.warm,
        took,
        figures.attacks,
        figures.served,
        figures.changes,
        disturbances.values().sum::<usize>(),
    ));
}

fn verdict(
    plan: &Plan,
    figures: &Figures,
    edge: &Edge,
    leaks: &BTreeMap<String, isize>,
    (begin, end): &(BTreeMap<String, Memory>, BTreeMap<String, Memory>),
) {
    assert_eq!(edge.forbidden(), 0, "this left the node: {:#?}", edge.samples());
    assert!(
        figures.broken.is_empty(),
        "this was answered: {:#?}",
        figures.broken
    );
    assert!(
        figures.stuck.is_empty(),
        "these did not go on: {:#?}",
        figures.stuck
    );
    assert!(leaks.is_empty(), "left behind: {leaks:#?}");
    assert!(
        figures.done == plan.cycles || figures.is_late,
        "{} of {} cycles",
        figures.done,
        plan.cycles
    );
    assert!(
        figures.served > 0 && figures.attacks > 0 && figures.warm > 0,
        "it was asleep"
    );
    for (program, memory) in end {
        let first = begin
            .get(program)
            .map_or(memory.anonymous, |memory| memory.anonymous);
        let grown = memory.anonymous.saturating_sub(first);
        assert!(
            grown <= GROWTH,
            "{program} has {grown} KiB more than after the first tenth"
        );
    }
}

#[expect(clippy::print_stdout, reason = "figures of a run that is looked at")]
fn say(line: &str) {
    println!("    {line}");
}
