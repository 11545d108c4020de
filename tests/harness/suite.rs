//! A test runner for tests that share something dear: each group starts one fixture, runs its cases one
//! after the other, and drops it, so that nothing is left behind (a `static` is never dropped).
//!
//! It takes the arguments of the usual runner and prints the lines that CI counts.

use std::{
    env,
    panic::{self, AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Mutex,
    time::Instant,
};

use anyhow::Result;

use crate::lock;

/// What the cases of a group share.
pub trait Fixture: Sized {
    /// Makes it.
    ///
    /// # Errors
    /// All cases of the group fail with this.
    fn start() -> Result<Self>;

    /// What helps to understand a failed case, for example logs.
    fn report(&self) -> String {
        String::new()
    }
}

/// A case: its name and what it does. It fails by panicking.
pub type Case<F> = (&'static str, fn(&F));

/// Cases by their functions' names.
#[macro_export]
macro_rules! cases {
    ($($($path:ident)::+),+ $(,)?) => { &[$((stringify!($($path)::+), $($path)::+ as fn(&_))),+] };
}

/// The state of one run.
pub struct Suite {
    arguments: Arguments,
    root: bool,
    started: Instant,
    passed: usize,
    ignored: usize,
    filtered: usize,
    /// Names, and why.
    failed: Vec<(String, String)>,
}

/// What the last panics said, of any thread, since a case began.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Panics of one case that are told of.
const PANICS_TOLD: usize = 3;

/// True when the tests may make namespaces. Panics when they may not although REQUIRE_ROOT is set: a test
/// that was skipped looks just like one that passed.
pub fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let required = env::var_os("REQUIRE_ROOT").is_some_and(|value| value != "0");
    assert!(root || !required, "REQUIRE_ROOT is set, and this is not root");
    root
}

impl Suite {
    /// A run as the command line asks for it.
    pub fn from_arguments() -> Self {
        let arguments = Arguments::parse(env::args().skip(1));
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            lock(&PANICS).push(panic.to_string());
            usual(panic);
        }));
        Self {
            arguments,
            root: root(),
            started: Instant::now(),
            passed: 0,
            ignored: 0,
            filtered: 0,
            failed: Vec::new(),
        }
    }

    /// Runs the cases that were asked for, if any, on one fixture.
    #[must_use]
    pub fn group<F: Fixture>(mut self, name: &str, cases: &[Case<F>]) -> Self {
        let full = |case: &str| format!("{name}::{}", case.rsplit("::").next().unwrap_or(case).trim());
        let (wanted, unwanted): (Vec<_>, Vec<_>) = cases
            .iter()
            .partition(|(case, _)| self.arguments.want(&full(case)));
        self.filtered += unwanted.len();
        if self.arguments.list {
            wanted
                .iter()
                .for_each(|(case, _)| say(&format!("{}: test", full(case))));
            return self;
        }
        if wanted.is_empty() {
            return self;
        }
        if !self.root {
            wanted
                .iter()
                .for_each(|(case, _)| say(&format!("test {} ... ignored, needs root", full(case))));
            self.ignored += wanted.len();
            return self;
        }
        let started = Instant::now();
        let fixture = match catch_unwind(F::start) {
            Ok(Ok(fixture)) => Ok(fixture),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err("it panicked".to_owned()),
        };
        let fixture = match fixture {
            Ok(fixture) => fixture,
            Err(error) => {
                let why = format!("the fixture of {name} did not start: {error}");
                say(&why);
                for (case, _) in wanted {
                    say(&format!("test {} ... FAILED", full(case)));
                    self.failed.push((full(case), why.clone()));
                }
                return self;
            }
        };
        say(&format!(
            "fixture of {name} ready after {:.1?}",
            started.elapsed()
        ));
        for (case, run) in wanted {
            let started = Instant::now();
            lock(&PANICS).clear();
            let result = catch_unwind(AssertUnwindSafe(|| run(&fixture)));
            let took = started.elapsed();
            if result.is_ok() {
                say(&format!("test {} ... ok ({took:.1?})", full(case)));
                self.passed += 1;
            } else {
                // Why comes last: of a long output, the end is what is read.
                let why = told();
                say(&format!(
                    "test {} ... FAILED ({took:.1?})\n{}\n{why}",
                    full(case),
                    fixture.report()
                ));
                self.failed.push((full(case), why));
            }
        }
        let started = Instant::now();
        lock(&PANICS).clear();
        if catch_unwind(AssertUnwindSafe(|| drop(fixture))).is_err() {
            say(&format!("test {name}::teardown ... FAILED"));
            self.failed.push((format!("{name}::teardown"), told()));
        }
        say(&format!("fixture of {name} gone after {:.1?}", started.elapsed()));
        self
    }

    /// Prints the closing lines.
    pub fn finish(self) -> ExitCode {
        if self.arguments.list {
            return ExitCode::SUCCESS;
        }
        if !self.failed.is_empty() {
            let names: Vec<_> = self.failed.iter().map(|(name, _)| name.as_str()).collect();
            for (name, why) in &self.failed {
                say(&format!("\n---- {name} ----\n{why}"));
            }
            say(&format!("\nfailures:\n    {}", names.join("\n    ")));
        }
        let (word, code) = if self.failed.is_empty() {
            ("ok", ExitCode::SUCCESS)
        } else {
            ("FAILED", ExitCode::FAILURE)
        };
        let (passed, failed, ignored, filtered) =
            (self.passed, self.failed.len(), self.ignored, self.filtered);
        let took = self.started.elapsed().as_secs_f64();
        say(&format!(
            "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; \
             {filtered} filtered out; finished in {took:.2}s\n"
        ));
        code
    }
}

/// Why a case failed.
fn told() -> String {
    let panics = lock(&PANICS);
    panics[..panics.len().min(PANICS_TOLD)].join("\n")
}

#[expect(clippy::print_stdout, reason = "a test runner's output is its result")]
fn say(line: &str) {
    println!("{line}");
}

#[derive(Default)]
struct Arguments {
    list: bool,
    exact: bool,
    ignored_only: bool,
    only: Vec<String>,
    skip: Vec<String>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Self {
        let mut arguments = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => arguments.list = true,
                "--exact" => arguments.exact = true,
                "--ignored" => arguments.ignored_only = true,
                "--skip" => arguments.skip.extend(words.next()),
                "--format" | "--test-threads" | "--color" | "--logfile" | "-Z" => drop(words.next()),
                flag if flag.starts_with('-') => {}
                name => arguments.only.push(name.to_owned()),
            }
        }
        arguments
    }

    fn want(&self, name: &str) -> bool {
        let fits = |text: &String| {
            if self.exact {
                name == text
            } else {
                name.contains(text.as_str())
            }
        };
        !self.ignored_only
            && (self.only.is_empty() || self.only.iter().any(fits))
            && !self.skip.iter().any(fits)
    }
}
