//! Everything that exists because of one instance, so that two moments can be compared: processes, namespaces, mounts,
//! links, routes, rules, firewall, control groups, BPF, loop devices, files and open descriptors.
//!
//! All of it is read from the kernel and the disk, none of it from the programs. What one moment has and the other has
//! not is told line by line.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    bpf,
    namespace::Namespace,
    node::{Node, Process},
    wait,
};

/// What is asked in each network namespace. None of it shows a counter.
const NETWORK: [&[&str]; 8] = [
    &["ip", "-o", "link"],
    &["ip", "-o", "-4", "address"],
    &["ip", "-o", "-6", "address"],
    &["ip", "-4", "route", "show", "table", "all"],
    &["ip", "-6", "route", "show", "table", "all"],
    &["ip", "-4", "rule"],
    &["ip", "-6", "rule"],
    &["ip", "-o", "neigh", "show", "nud", "permanent"],
];
/// The kinds of namespaces (namespaces(7)).
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// A moment: how often there is what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, usize>);

/// What one moment has more than another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference(BTreeMap<String, isize>);

/// What a process holds of memory, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Pages of its own that no file backs (`RssAnon` of proc_pid_status(5)).
    pub anonymous: u64,
    /// Its share of everything (`Pss` of proc_pid_smaps_rollup).
    pub proportional: u64,
}

impl Snapshot {
    /// This moment.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn take(node: &Node) -> Result<Self> {
        let mut snapshot = Self::default();
        // Seen from the node: its mounts are nobody else's.
        let root = node.world().node().task().join("root");
        let within = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let processes = node.processes();
        for process in &processes {
            snapshot.add(format!("process {} {}", process.pid, process.command.join(" ")));
        }
        snapshot.namespaces(&processes);
        for process in node.programs() {
            snapshot.descriptors(&process);
        }
        snapshot.mounts(node)?;
        snapshot.network("node", node.place())?;
        let router = within(&node.run_dir().join("netns/router"));
        if router.exists() {
            snapshot.network("router", &Namespace::join("router", &router)?)?;
        }
        for trace in node.traces() {
            // Mounts and processes are told above, and more exactly.
            if trace.starts_with("cgroup ") || trace.starts_with("loop ") {
                snapshot.add(trace);
            }
        }
        let objects = bpf::objects(&within(&node.run_dir().join("bpf")))?;
        for (kind, lines) in [
            ("pin", objects.pins),
            ("map", objects.maps),
            ("map entry", objects.keys),
            ("program", objects.programs),
            ("link", objects.links),
        ] {
            for line in lines {
                snapshot.add(format!("BPF {kind} {line}"));
            }
        }
        for directory in [node.run_dir(), node.data_dir()] {
            for path in files_below(&within(directory)) {
                let shown = path.strip_prefix(&root).unwrap_or(&path);
                snapshot.add(format!("file /{}", shown.display()));
            }
        }
        Ok(snapshot)
    }

    /// A moment like the one before it, but for lines that begin with one of these, in which no canary of netd's flies:
    /// one that can be seen to return.
    ///
    /// # Panics
    /// With what changes when there is none within `limit`.
    #[track_caller]
    pub fn at_rest(node: &Node, prefixes: &[&str], limit: Duration) -> Self {
        let look = || Self::take(node).expect("a look at the node");
        let (mut last, mut changed) = (look(), None);
        let rest = wait::within(limit, || {
            let now = look();
            let difference = now.since(&last).without(prefixes);
            let rests = difference.is_empty() && !now.tells_of(": sgcanary") && !now.tells_of(": sgcn");
            changed = Some(difference);
            last = now;
            rests.then(|| last.clone())
        });
        match (rest, changed) {
            (Some(rest), _) => rest,
            (None, changed) => panic!("not at rest within {limit:?}: {changed:#?}"),
        }
    }

    /// What is there more, and what less, than `before`.
    pub fn since(&self, before: &Self) -> Difference {
        let mut difference = BTreeMap::new();
        for (line, count) in &self.0 {
            *difference.entry(line.clone()).or_default() += isize::try_from(*count).unwrap_or(isize::MAX);
        }
        for (line, count) in &before.0 {
            *difference.entry(line.clone()).or_default() -= isize::try_from(*count).unwrap_or(isize::MAX);
        }
        difference.retain(|_, count| *count != 0);
        Difference(difference)
    }

    /// Waits until the present is the same as `self`; what ends takes its time.
    ///
    /// # Panics
    /// With what is different when that takes longer than `limit`.
    #[track_caller]
    pub fn assert_returns(&self, node: &Node, limit: Duration) {
        self.assert_returns_but(node, &[], limit);
    }

    /// The same but for lines that begin with one of these.
    #[track_caller]
    pub fn assert_returns_but(&self, node: &Node, prefixes: &[&str], limit: Duration) {
        let mut last = None;
        let same = wait::within(limit, || {
            let now = Self::take(node).expect("a look at the node");
            let difference = now.since(self).without(prefixes);
            let same = difference.is_empty();
            last = Some(difference);
            same.then_some(())
        });
        if same.is_none() {
            let last = last.expect("looked at least once");
            panic!("not as it was within {limit:?}:\n{last}");
        }
    }

    /// Whether a line holds the word.
    pub fn tells_of(&self, word: &str) -> bool {
        self.0.keys().any(|line| line.contains(word))
    }

    /// How many things there are of each kind, whatever they are called and numbered, but for open descriptors: what
    /// two moments have in common between which programs were started anew.
    pub fn census(&self) -> BTreeMap<String, isize> {
        let mut kinds = BTreeMap::new();
        for (line, count) in &self.0 {
            let mut words = line.split(' ');
            let kind = match words.next().unwrap_or_default() {
                "descriptor" => continue,
                // `node: ip -o link: 2: eth0 …`
                "node:" | "router:" => line.splitn(3, ": ").take(2).collect::<Vec<_>>().join(": "),
                "BPF" => match line.strip_prefix("BPF map entry ") {
                    Some(entry) => format!("BPF map entry {}", entry.split(' ').next().unwrap_or_default()),
                    None => format!("BPF {}", words.next().unwrap_or_default()),
                },
                kind => kind.to_owned(),
            };
            *kinds.entry(kind).or_default() += isize::try_from(*count).unwrap_or(isize::MAX);
        }
        kinds
    }

    /// Its lines that begin with this.
    pub fn lines(&self, prefix: &str) -> Vec<&str> {
        let lines = self.0.keys().map(String::as_str);
        lines.filter(|line| line.starts_with(prefix)).collect()
    }

    fn add(&mut self, line: String) {
        *self.0.entry(line).or_default() += 1;
    }

    /// Those that somebody lives in. Held ones are mounts or descriptors.
    fn namespaces(&mut self, processes: &[Process]) {
        let mut seen = std::collections::BTreeSet::new();
        for process in processes {
            for task in entries(&PathBuf::from(format!("/proc/{}/task", process.pid))) {
                for kind in NAMESPACES {
                    seen.extend(fs::read_link(task.join("ns").join(kind)).ok());
                }
            }
        }
        for namespace in seen {
            self.add(format!("namespace {}", namespace.display()));
        }
    }

    fn descriptors(&mut self, process: &Process) {
        let name = process.name();
        for descriptor in entries(&PathBuf::from(format!("/proc/{}/fd", process.pid))) {
            let Ok(target) = fs::read_link(descriptor) else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            // `socket:[123]` is another each time; `net:[123]` is a namespace, and the same one.
            let target = match target.split_once(":[") {
                Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
                Some(_) | None => target,
            };
            self.add(format!("descriptor of {name} ({}): {target}", process.pid));
        }
    }

    fn mounts(&mut self, node: &Node) -> Result<()> {
        let table = fs::read_to_string(node.world().node().task().join("mountinfo")).context("the mounts")?;
        for line in table.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_, _, _, root, point, ..] = fields[..] else {
                continue;
            };
            let source = line.split_once(" - ").map_or("", |(_, source)| source);
            self.add(format!("mount {point} of {root} {source}"));
        }
        Ok(())
    }

    fn network(&mut self, name: &str, namespace: &Namespace) -> Result<()> {
        for command in NETWORK {
            let output = namespace.command(command[0], &command[1..])?;
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                self.add(format!("{name}: {}: {}", command.join(" "), line.trim_end()));
            }
        }
        let rules = namespace.command("nft", &["list", "ruleset"])?;
        let (mut table, mut is_counted) = (String::new(), false);
        for line in String::from_utf8_lossy(&rules.stdout).lines() {
            if line.starts_with("table ") {
                line.trim_end_matches(" {").clone_into(&mut table);
            }
            // A set that packets fill: what is in it comes and goes by itself.
            is_counted = match line.trim() {
                "}" => false,
                line => is_counted || (line.starts_with("flags ") && line.contains("dynamic")),
            };
            let is_content = is_counted && !line.trim_start().starts_with("flags ");
            if is_content {
                continue;
            }
            self.add(format!("{name}: nft: {table}: {}", line.trim_end()));
        }
        // `/proc/sys/net` shows the namespace of whoever opens it.
        for line in namespace.run(forwarding) {
            self.add(format!("{name}: {line}"));
        }
        Ok(())
    }
}

impl Difference {
    /// Both moments are the same.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Without lines that begin with one of these.
    #[must_use]
    pub fn without(mut self, prefixes: &[&str]) -> Self {
        self.0
            .retain(|line, _| !prefixes.iter().any(|prefix| line.starts_with(prefix)));
        self
    }
}

impl Difference {
    /// Without lines that hold one of these.
    #[must_use]
    pub fn without_any(mut self, words: &[String]) -> Self {
        self.0
            .retain(|line, _| !words.iter().any(|word| line.contains(word)));
        self
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (line, count) in &self.0 {
            let sign = if *count > 0 { '+' } else { '-' };
            formatter.write_char(sign)?;
            if count.unsigned_abs() > 1 {
                write!(formatter, " {} times", count.unsigned_abs())?;
            }
            writeln!(formatter, " {line}")?;
        }
        Ok(())
    }
}

impl Memory {
    /// What a process holds now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(process: &Process) -> Result<Self> {
        let read = |file: &str, field: &str| -> Result<u64> {
            let path = format!("/proc/{}/{file}", process.pid);
            let text = fs::read_to_string(&path).context(path)?;
            let line = text.lines().find_map(|line| line.strip_prefix(field));
            let number = line.and_then(|line| line.split_whitespace().next());
            Ok(number.with_context(|| format!("no {field} in {file}"))?.parse()?)
        };
        Ok(Self {
            anonymous: read("status", "RssAnon:")?,
            proportional: read("smaps_rollup", "Pss:")?,
        })
    }
}

/// Files below a directory that hold one of these words, with the word: for what should be forgotten.
pub fn files_that_hold(directory: &Path, words: &[String], but: &[&Path]) -> Vec<String> {
    let mut found = Vec::new();
    for path in files_below(directory) {
        if but.contains(&path.as_path()) || !path.is_file() {
            continue;
        }
        let content = fs::read(&path).unwrap_or_default();
        for word in words {
            if content
                .windows(word.len())
                .any(|window| window == word.as_bytes())
            {
                found.push(format!("{} holds {word}", path.display()));
            }
        }
    }
    found
}

/// How many rows each table of a SQLite database has.
///
/// # Errors
/// When it cannot be read.
pub fn rows(database: &Path) -> Result<BTreeMap<String, u64>> {
    let counted = python(
        "import json, sqlite3, sys
database = sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True)
names = [name for (name,) in database.execute(\"SELECT name FROM sqlite_master WHERE type = 'table'\")]
print(json.dumps({name: database.execute(f'SELECT count(*) FROM \"{name}\"').fetchone()[0] for name in names}))
",
        database,
        "",
    )?;
    Ok(serde_json::from_slice(&counted)?)
}

/// The size of a SQLite database in KiB, what is still in its log included.
///
/// # Errors
/// When it cannot be read.
pub fn size(database: &Path) -> Result<u64> {
    let size = python(
        "import sqlite3, sys
database = sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True)
pages, bytes = (database.execute(f'PRAGMA {name}').fetchone()[0] for name in ('page_count', 'page_size'))
print(pages * bytes // 1024)
",
        database,
        "",
    )?;
    Ok(serde_json::from_slice(&size)?)
}

/// Gives the database a past: `rows` audit records more, copies of those that it has.
///
/// # Errors
/// When it has none, or cannot be written.
pub fn give_past(database: &Path, rows: usize) -> Result<()> {
    python(
        "import itertools, sqlite3, sys, uuid
database = sqlite3.connect(sys.argv[1], timeout=20)
names = 'org_id, sandbox_id, time, verdict, host, document'
known = database.execute(f'SELECT {names} FROM egress_audit').fetchall()
more = itertools.islice(itertools.cycle(known), int(sys.argv[2]))
database.executemany(f'INSERT INTO egress_audit (id, {names}) VALUES (?, ?, ?, ?, ?, ?, ?)',
    [(str(uuid.uuid4()), *row) for row in more])
database.commit()
",
        database,
        &rows.to_string(),
    )
    .map(drop)
}

/// Changes the database as somebody would who has nothing but its file. Returns how many rows it concerned.
///
/// # Errors
/// When it cannot be done.
pub fn tamper(database: &Path, statement: &str) -> Result<u64> {
    let changed = python(
        "import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=20)
print(database.execute(sys.argv[2]).rowcount)
database.commit()
",
        database,
        statement,
    )?;
    Ok(serde_json::from_slice(&changed)?)
}

/// What the program writes.
fn python(program: &str, database: &Path, argument: &str) -> Result<Vec<u8>> {
    let output = std::process::Command::new("python3")
        .args(["-c", program])
        .arg(database)
        .arg(argument)
        .output()
        .context("python3")?;
    anyhow::ensure!(
        output.status.success(),
        "{}: {}",
        database.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for path in entries(&directory) {
            if path.is_dir() && !path.is_symlink() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

/// The switches for forwarding of the calling thread's namespace.
fn forwarding() -> Vec<String> {
    let families = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"];
    let interfaces = families.into_iter().flat_map(|family| entries(Path::new(family)));
    let switches = interfaces.flat_map(|path| [path.join("forwarding"), path.join("force_forwarding")]);
    switches
        .filter_map(|path| {
            let value = fs::read_to_string(&path).ok()?;
            Some(format!("{} is {}", path.display(), value.trim()))
        })
        .collect()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(Result::ok).map(|entry| entry.path()).collect()
}
