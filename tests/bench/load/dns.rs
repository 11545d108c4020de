//! DNS questions over UDP from any number of sockets, and the name server that all resolvers ask in the end. Both know
//! of DNS only what they need, so that they cost little.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsFd as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
};
use serde::{Deserialize, Serialize};

use super::Rate;

/// After this long a question counts as lost and its slot is used again.
const LOST: Duration = Duration::from_millis(500);
/// How long the name server's records live, in seconds.
const TTL: u32 = 300;
const HEADER: usize = 12;

/// A name server that answers every question for an address record with the same address.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NameServer {
    /// Where it listens.
    pub(crate) listen: SocketAddrV4,
    /// What it answers.
    pub(crate) address: Ipv4Addr,
}

/// Questions as answers come, no faster than they may.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Questions {
    /// Where to.
    pub(crate) to: SocketAddrV4,
    /// The network namespaces from which they come, a socket in each. None: one in the process' own.
    pub(crate) places: Vec<PathBuf>,
    /// Sockets in the process' own namespace where no places are given.
    pub(crate) sockets: usize,
    /// Questions that each socket has open.
    pub(crate) open: usize,
    /// From one question of a socket to its next, at least, in microseconds.
    pub(crate) apart_us: u64,
    /// The zone of the names.
    pub(crate) zone: String,
    /// So many names again and again; none: never the same one twice.
    pub(crate) names: Option<u32>,
    /// Before counting begins, in milliseconds.
    pub(crate) warm_ms: u64,
    /// While counting, in milliseconds.
    pub(crate) count_ms: u64,
}

impl NameServer {
    /// Binds, and serves on a thread of its own until the process ends.
    pub(super) fn start(&self) -> Result<()> {
        let socket = UdpSocket::bind(self.listen)?;
        let address = self.address;
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                if let Some(answer) = answer(&buffer[..length], address) {
                    socket.send_to(&answer, from).ok();
                }
            }
        });
        Ok(())
    }
}

/// The answer to a question: with the address where that is asked for, else with nothing.
fn answer(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let mut end = HEADER;
    while *query.get(end)? != 0 {
        end += usize::from(query[end]) + 1;
    }
    let question = query.get(HEADER..end + 5)?;
    let is_address = question.ends_with(&[0, 1, 0, 1]);
    let mut bytes = query[..2].to_vec();
    bytes.extend([0x85, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    bytes.extend(question);
    if is_address {
        bytes.extend([0xc0, 12, 0, 1, 0, 1]);
        bytes.extend(TTL.to_be_bytes());
        bytes.extend([0, 4]);
        bytes.extend(address.octets());
    }
    Some(bytes)
}

/// One socket and what it asked.
struct Asker {
    socket: UdpSocket,
    /// When each open question was sent, by the low half of its id; the high half counts its uses.
    sent: Vec<(u8, Option<Instant>)>,
    /// When the next one may be sent.
    next: Instant,
}

impl Questions {
    pub(super) fn measure(self) -> Result<Rate> {
        let mut askers = self.askers()?;
        let from = Instant::now() + Duration::from_millis(self.warm_ms);
        let until = from + Duration::from_millis(self.count_ms);
        let mut number = 0;
        let mut latencies = Vec::new();
        let mut failed = 0_u32;
        let apart = Duration::from_micros(self.apart_us);
        // Slots that may be used, and from when on: the earliest first.
        let mut idle: BinaryHeap<Reverse<(Instant, usize, usize)>> = BinaryHeap::new();
        let free = |askers: &mut [Asker], idle: &mut BinaryHeap<_>, asker: usize, slot: usize| {
            let one: &mut Asker = &mut askers[asker];
            one.next = one.next.max(Instant::now());
            idle.push(Reverse((one.next, asker, slot)));
            one.next += apart;
        };
        for asker in 0..askers.len() {
            for slot in 0..self.open {
                free(&mut askers, &mut idle, asker, slot);
            }
        }
        loop {
            let now = Instant::now();
            if now >= until {
                break;
            }
            while let Some(&Reverse((due, asker, slot))) = idle.peek()
                && due <= now
            {
                idle.pop();
                number += 1;
                askers[asker].ask(
                    slot,
                    self.names.map_or(number, |names| number % names),
                    &self.zone,
                )?;
            }
            let wait = idle
                .peek()
                .map_or(LOST, |Reverse((due, ..))| due.saturating_duration_since(now));
            for asker in wait_for(&askers, wait.min(until - now))? {
                while let Some((slot, latency)) = askers[asker].heard()? {
                    match latency {
                        Some(latency) if Instant::now() >= from => {
                            latencies.push(latency.as_secs_f64() * 1000.0)
                        }
                        Some(_) => {}
                        None => failed += 1,
                    }
                    free(&mut askers, &mut idle, asker, slot);
                }
            }
            for asker in 0..askers.len() {
                for slot in askers[asker].give_up(now) {
                    failed += 1;
                    free(&mut askers, &mut idle, asker, slot);
                }
            }
        }
        ensure!(!latencies.is_empty(), "no answer came");
        let share = f64::from(failed) / (latencies.len() as f64 + f64::from(failed));
        ensure!(share < 0.05, "{failed} questions of {} failed", latencies.len());
        latencies.sort_by(f64::total_cmp);
        let at = |part: usize| latencies[(latencies.len() - 1) * part / 100];
        Ok(Rate {
            per_second: latencies.len() as f64 * 1000.0 / self.count_ms as f64,
            p50_ms: at(50),
            p99_ms: at(99),
        })
    }

    fn askers(&self) -> Result<Vec<Asker>> {
        let sockets: Vec<Result<UdpSocket>> = if self.places.is_empty() {
            (0..self.sockets).map(|_| bound(self.to)).collect()
        } else {
            self.places.iter().map(|place| bound_in(place, self.to)).collect()
        };
        let asker = |socket: Result<UdpSocket>| {
            Ok(Asker {
                socket: socket?,
                sent: vec![(0, None); self.open],
                next: Instant::now(),
            })
        };
        sockets.into_iter().map(asker).collect()
    }
}

fn bound(to: SocketAddrV4) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// A socket lives where it was made, wherever it is used: a thread goes there and comes back with it.
fn bound_in(place: &PathBuf, to: SocketAddrV4) -> Result<UdpSocket> {
    let namespace = File::open(place).with_context(|| place.display().to_string())?;
    thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        bound(to)
    })
    .join()
    .map_err(|_panic| anyhow!("a thread died"))?
}

fn wait_for(askers: &[Asker], limit: Duration) -> Result<Vec<usize>> {
    let mut all: Vec<PollFd<'_>> = askers
        .iter()
        .map(|asker| PollFd::new(asker.socket.as_fd(), PollFlags::POLLIN))
        .collect();
    // Not a whole millisecond: look again at once.
    let limit = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::ZERO);
    poll(&mut all, limit)?;
    let ready = all
        .iter()
        .enumerate()
        .filter(|(_, one)| one.any().unwrap_or(false));
    Ok(ready.map(|(index, _)| index).collect())
}

impl Asker {
    fn ask(&mut self, slot: usize, number: u32, zone: &str) -> Result<()> {
        let (uses, sent) = &mut self.sent[slot];
        *uses = uses.wrapping_add(1);
        *sent = Some(Instant::now());
        let mut query = vec![*uses, u8::try_from(slot)?, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in std::iter::once(format!("n{number}").as_str()).chain(zone.split('.')) {
            query.push(u8::try_from(label.len())?);
            query.extend(label.as_bytes());
        }
        query.extend([0, 0, 1, 0, 1]);
        match self.socket.send(&query) {
            // An earlier question was refused: this one was not sent, and counts as lost.
            Err(error) if is_refusal(&error) => Ok(()),
            sent => Ok(sent.map(drop)?),
        }
    }

    /// An answer: its slot, and how long it took; no time where it is no good one.
    fn heard(&mut self) -> Result<Option<(usize, Option<Duration>)>> {
        let mut answer = [0; 1500];
        loop {
            let length = match self.socket.recv(&mut answer) {
                Ok(length) => length,
                Err(error) if is_refusal(&error) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let slot = usize::from(answer[1]);
            let Some((uses, sent)) = self.sent.get_mut(slot).filter(|_| length > HEADER) else {
                continue;
            };
            if *uses != answer[0] {
                continue;
            }
            let Some(sent) = sent.take() else { continue };
            let is_good = answer[3] & 15 == 0 && answer[7] > 0;
            return Ok(Some((slot, is_good.then(|| sent.elapsed()))));
        }
    }

    /// Gives up what was lost; returns the slots.
    fn give_up(&mut self, now: Instant) -> Vec<usize> {
        let mut lost = Vec::new();
        for (slot, (_, sent)) in self.sent.iter_mut().enumerate() {
            if sent.is_some_and(|sent| now.saturating_duration_since(sent) > LOST) {
                *sent = None;
                lost.push(slot);
            }
        }
        lost
    }
}

/// The kernel told that a packet was refused.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::EACCES | libc::EPERM)
    )
}
