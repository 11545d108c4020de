//! `make bench`: how fast Sandgate is, beside something that does the same without it, in the same run.
//!
//! `cargo bench` (with `--bench`) measures and writes RESULTS.md, results.svg and a file of raw figures;
//! `cargo test` goes once through every benchmark with next to no load, to see that they work. Nothing here
//! fails because something is slow. Everything runs in namespaces without uplink.

use std::{env, fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result, bail};

use crate::{
    measure::Effort,
    place::{Ground, Guarded},
    result::{Outcome, Table},
};

mod load;
mod machine;
mod measure;
#[expect(dead_code, reason = "the kernel tests need more of it")]
#[path = "../ebpf/packet.rs"]
mod packet;
mod place;
mod plot;
mod report;
mod result;
#[expect(dead_code, reason = "the kernel tests need more of it")]
#[path = "../ebpf/world.rs"]
mod world;

/// Every benchmark, in the order of a whole run.
const NAMES: [&str; 13] = [
    "program", "scale", "manners", "memory", "exec", "policy", "create", "splice", "connects", "read",
    "verdicts", "dns", "tunnel",
];
/// Those before this make their own world.
const ON_A_NODE: usize = 4;

fn main() -> Result<ExitCode> {
    let mut arguments = env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|word| word == load::WORD) {
        return load::main(arguments.skip(1)).map(|()| ExitCode::SUCCESS);
    }
    let words: Vec<String> = arguments.collect();
    if words.iter().any(|word| word == "--list") {
        return Ok(ExitCode::SUCCESS);
    }
    if !words.iter().any(|word| word == "--bench") {
        return Ok(smoke(&words));
    }
    let wanted: Vec<&str> = words
        .iter()
        .flat_map(|word| word.split_whitespace())
        .filter(|word| !word.starts_with("--"))
        .collect();
    for word in &wanted {
        if !NAMES.contains(word) {
            bail!("no benchmark `{word}`; there are {}", NAMES.join(", "));
        }
    }
    let outcomes = measure(&wanted, Effort::FULL)?;
    publish(&outcomes)?;
    Ok(ExitCode::SUCCESS)
}

/// One tiny round of everything, as a test.
fn smoke(words: &[String]) -> ExitCode {
    const NAME: &str = "bench::every_benchmark_runs";
    let filters: Vec<_> = words.iter().filter(|word| !word.starts_with('-')).collect();
    // By their names, some of them.
    let some: Vec<&str> = NAMES
        .into_iter()
        .filter(|name| filters.iter().any(|filter| filter.as_str() == *name))
        .collect();
    let wanted =
        filters.is_empty() || !some.is_empty() || filters.iter().any(|filter| NAME.contains(filter.as_str()));
    if !wanted || !harness::suite::root() {
        say("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out");
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    match measure(&some, Effort::SMOKE) {
        Ok(_) => {
            say(&format!("test {NAME} ... ok ({:.1?})", began.elapsed()));
            say("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("test {NAME} ... FAILED\n{error:#}"));
            say("test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out");
            ExitCode::FAILURE
        }
    }
}

/// Measures what is wanted, or everything.
fn measure(wanted: &[&str], effort: Effort) -> Result<Vec<Outcome>> {
    let wants = |name: &str| wanted.is_empty() || wanted.contains(&name);
    let mut outcomes = Vec::new();
    let mut keep = |name: &str, began: Instant, tables: Vec<Table>| {
        let outcome = Outcome {
            name: name.to_owned(),
            run: machine::run(),
            tables,
        };
        say(&format!(
            "== {name} ({:.1?})\n{}",
            began.elapsed(),
            report::tables(&outcome)
        ));
        outcomes.push(outcome);
    };
    let began = Instant::now();
    if wants("program") {
        keep("program", began, measure::program::program(effort)?);
    }
    if wants("scale") {
        let began = Instant::now();
        keep("scale", began, measure::scale::scale(effort)?);
    }
    if !NAMES[2..].iter().any(|name| wants(name)) {
        return Ok(outcomes);
    }
    let ground = Ground::make()?;
    if wants("manners") {
        let began = Instant::now();
        keep("manners", began, measure::manners::manners(&ground, effort)?);
    }
    if wants("memory") && effort.more_nodes {
        let began = Instant::now();
        keep("memory", began, measure::memory::memory(&ground, effort)?);
    }
    if !NAMES[ON_A_NODE..].iter().any(|name| wants(name)) {
        return Ok(outcomes);
    }
    let guarded = Guarded::start(&ground)?;
    let failed = |name: &str| format!("{name}\n{}", guarded.node.report());
    for name in NAMES[ON_A_NODE..].iter().filter(|name| wants(name)) {
        let began = Instant::now();
        let tables = match *name {
            "exec" => measure::execute::execute(&guarded, effort),
            "policy" => measure::policy::policy_change(&guarded, effort),
            "create" => measure::create::create(&guarded, effort),
            "splice" => measure::relay::splice(&ground, &guarded, effort),
            "connects" => measure::relay::connects(&ground, &guarded, effort),
            "read" => measure::read::read(&ground, &guarded, effort),
            "verdicts" => measure::verdicts::verdicts(&ground, &guarded, effort),
            "dns" => measure::dns::dns(&ground, &guarded, effort),
            "tunnel" => measure::tunnel::tunnel(&ground, &guarded, effort).map(Option::unwrap_or_default),
            other => bail!("no benchmark `{other}`"),
        };
        let tables = tables.with_context(|| failed(name))?;
        if tables.is_empty() {
            say(&format!(
                "== {name}: left out, this version has nothing to measure"
            ));
        } else {
            keep(name, began, tables);
        }
    }
    Ok(outcomes)
}

/// Writes raw figures, the tables of RESULTS.md, and the plot.
fn publish(outcomes: &[Outcome]) -> Result<()> {
    let home = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bench");
    let raw = env::current_exe()?
        .ancestors()
        .nth(3)
        .context("the target directory")?
        .join("bench");
    fs::create_dir_all(&raw)?;
    let results = home.join("RESULTS.md");
    let mut document = fs::read_to_string(&results)?;
    document = report::replace(&document, "machine", &machine::describe()?)?;
    for outcome in outcomes {
        let path = raw.join(format!("{}.json", outcome.name));
        fs::write(path, serde_json::to_vec_pretty(outcome)?)?;
        document = report::replace(&document, &outcome.name, &report::tables(outcome))?;
    }
    fs::write(results, document)?;
    // Of a part, the rest of the picture is what was measured before.
    let all = NAMES.iter().filter_map(|name| {
        let text = fs::read(raw.join(format!("{name}.json"))).ok()?;
        serde_json::from_slice(&text).ok()
    });
    let all: Vec<Outcome> = all.collect();
    fs::write(home.join("results.svg"), plot::draw(&all))?;
    say(&format!(
        "tests/bench/RESULTS.md is written; raw figures in {}",
        raw.display()
    ));
    Ok(())
}

#[expect(clippy::print_stdout, reason = "figures are the result of a benchmark")]
fn say(line: &str) {
    println!("{line}");
}
