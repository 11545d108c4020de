//! What the kernel says about this process, read at each scrape (proc(5)). Names are those that every
//! Prometheus client library uses.

use std::{fmt, fs, path::Path};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Fields of `/proc/self/stat` that follow the program's name, counted from 0 there (proc_pid_stat(5) counts
/// from 1 and has two before).
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const START_TICKS: usize = 19;

/// Reads `/proc/self`. A file that cannot be read leaves its numbers out.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name, help, value: Option<f64>| match value {
            None => Ok(()),
            Some(value) => {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
            }
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        gauge(
            "process_resident_memory_bytes",
            "Memory of the process that is in RAM.",
            line(&status, "VmRSS:").map(|kibibytes| kibibytes * 1024.0),
        )?;
        gauge(
            "process_threads",
            "Threads of the process.",
            line(&status, "Threads:"),
        )?;
        gauge(
            "process_open_fds",
            "Open file descriptors.",
            open_descriptors(Path::new("/proc/self/fd")),
        )?;
        gauge(
            "process_max_fds",
            "How many file descriptors the process may open.",
            descriptor_limit(),
        )?;
        gauge(
            "process_start_time_seconds",
            "When the process began, in seconds since 1970.",
            started(&stat),
        )?;
        if let Some(seconds) = processor_time(&stat) {
            let counter = ConstCounter::new(seconds);
            counter.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                "Processor time used, in user and kernel mode.",
                None,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

/// The number behind a name in `/proc/self/status`.
fn line(status: &str, name: &str) -> Option<f64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// A field of `/proc/self/stat`. The program's name, in parentheses, may hold anything, parentheses included.
fn field(stat: &str, index: usize) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(index)?.parse().ok()
}

fn processor_time(stat: &str) -> Option<f64> {
    Some((field(stat, USER_TICKS)? + field(stat, SYSTEM_TICKS)?) / ticks_per_second())
}

fn started(stat: &str) -> Option<f64> {
    let system = fs::read_to_string("/proc/stat").ok()?;
    let booted = line(&system, "btime ")?;
    Some(booted + field(stat, START_TICKS)? / ticks_per_second())
}

/// The directory's size is the number of descriptors since Linux 6.2; before, it is 0. It can be asked for also
/// by a process that may not list it.
fn open_descriptors(directory: &Path) -> Option<f64> {
    match fs::metadata(directory).ok()?.len() {
        0 => {
            // The listing itself holds one.
            let listed = fs::read_dir(directory).ok()?.count().saturating_sub(1);
            u32::try_from(listed).ok().map(f64::from)
        }
        count => u32::try_from(count).ok().map(f64::from),
    }
}

fn descriptor_limit() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    line(&limits, "Max open files")
}

#[expect(
    clippy::cast_precision_loss,
    reason = "100 on every architecture that Linux has"
)]
fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) c) S 1 2 3 4 5 6 7 8 9 10 200 100 0 0 20 0 4 0 5000 0";
        assert_eq!(field(stat, USER_TICKS), Some(200.0));
        assert_eq!(field(stat, SYSTEM_TICKS), Some(100.0));
        assert_eq!(field(stat, START_TICKS), Some(5000.0));
    }

    #[test]
    fn this_process_has_begun_a_short_while_ago() {
        let stat = fs::read_to_string("/proc/self/stat").expect("readable");
        let began = started(&stat).expect("known");
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs_f64();
        assert!((0.0..3_600.0).contains(&(now - began + 1.5)), "{began} {now}");
    }

    #[test]
    fn one_more_descriptor_counts_one_more() {
        let directory = Path::new("/proc/self/fd");
        let before = open_descriptors(directory).expect("known");
        let held: Vec<_> = (0..64)
            .map(|_| fs::File::open("/dev/null").expect("a file"))
            .collect();
        let after = open_descriptors(directory).expect("known");
        drop(held);
        // Other tests open and close a few meanwhile.
        assert!(after >= before + 48.0, "{before} {after}");
    }
}
