//! What the figures were measured on, and of which state of the code.

use std::{fs, process::Command};

use anyhow::Result;

/// Date, commit, and whether the tree had changes.
pub(crate) fn run() -> String {
    let git = |arguments: &[&str]| text_of("git", arguments);
    let commit = git(&["rev-parse", "--short", "HEAD"]);
    let dirty = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    format!(
        "{}, commit {commit}{}",
        text_of("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        if dirty { " with changes" } else { "" }
    )
}

/// Processor, memory and kernel.
pub(crate) fn describe() -> Result<String> {
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim());
        value.unwrap_or("unknown").to_owned()
    };
    let processor = field(&fs::read_to_string("/proc/cpuinfo")?, "model name");
    let kibibytes: f64 = field(&fs::read_to_string("/proc/meminfo")?, "MemTotal")
        .trim_end_matches(" kB")
        .parse()?;
    let cores = std::thread::available_parallelism()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or("unknown").to_owned();
    Ok(format!(
        "| | |\n|---|---|\n| processor | {processor}, {cores} logical |\n| memory | {:.1} GiB |\n\
         | kernel | {} |\n| last run | {} |\n| load average after it | {load} |",
        kibibytes / 1024.0 / 1024.0,
        release.trim(),
        run(),
    ))
}

fn text_of(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.output().ok();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|| "unknown".to_owned())
}
