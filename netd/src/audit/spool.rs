//! Records on disk until the controller has them, so that a netd that is killed, or a controller that is away for
//! hours, loses none of them. A log of segments, a line of JSON each: a record, the numbers of those that are done
//! with, or what a sandbox has lost. Owns the files, their room and what they say after a restart; which record goes
//! when is [`super::queue`]'s.
//!
//! A line is in the kernel's hands when it counts, and forced to the disk within a second ([`Spool::unsynced`]): the
//! end of netd costs nothing, the end of the machine at most the last second. Segments are removed from the oldest on, so that what says
//! that a record is done with lives at least as long as the record. The next segment's room is taken before it is
//! needed: a disk that fills up leaves time for thousands of records.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead as _, BufReader},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use sandgate_api::{
    audit::AuditEvent,
    id::{OrgId, SandboxId},
};
use serde::{Deserialize, Serialize};

/// The smallest spool that is of any use.
pub const SMALLEST: u64 = 1 << 20;
/// Largest segment.
const SEGMENT_MAX: u64 = 4 << 20;
/// Segments that a spool consists of, when it is full, if they are not of the largest size.
const SEGMENTS: u64 = 64;
/// Name of the file that becomes the next segment.
const SPARE: &str = "spare";

/// One line of a segment.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line<'a> {
    /// A record.
    Record {
        /// Its number: in the order in which records were made, never given out twice.
        sequence: u64,
        /// What it says.
        event: Cow<'a, AuditEvent>,
    },
    /// A record that tells what its sandbox has lost so far.
    Gap {
        /// As of any record.
        sequence: u64,
        /// As of any record.
        event: Cow<'a, AuditEvent>,
    },
    /// The controller has these, first and last of each run.
    Done(Vec<(u64, u64)>),
    /// What a sandbox has lost since its last gap record, and records that are gone with it.
    Lost {
        /// Which one.
        sandbox_id: Cow<'a, SandboxId>,
        /// Its owner.
        org_id: Cow<'a, OrgId>,
        /// How many attempts they stood for.
        count: u64,
        /// Those of them that had been written.
        gone: Vec<(u64, u64)>,
    },
}

impl Line<'_> {
    pub(super) fn written(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// The line of a record, [`Line::Record`], of which `event` is the JSON.
pub(super) fn record(sequence: u64, event: &[u8]) -> Vec<u8> {
    let head = format!("{{\"record\":{{\"sequence\":{sequence},\"event\":");
    [head.as_bytes(), event, b"}}\n"].concat()
}

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct At {
    pub(super) segment: u64,
    offset: u64,
    pub(super) length: u32,
}

/// What an earlier netd left.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Records that the controller has not confirmed, by their number.
    pub(super) records: BTreeMap<u64, Kept>,
    /// What sandboxes have lost and was not told yet.
    pub(super) lost: HashMap<SandboxId, (OrgId, u64)>,
    /// The highest number given out.
    pub(super) highest: u64,
}

/// A record that was left.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) at: At,
    pub(super) sandbox_id: SandboxId,
    pub(super) org_id: OrgId,
    pub(super) repeated: u64,
}

#[derive(Debug)]
struct Segment {
    file: Arc<File>,
    length: u64,
    /// Records in it that are not done with.
    live: u64,
}

/// The spool.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    limit: u64,
    segment: u64,
    /// By number; the last one is written to, if it is `open`.
    segments: BTreeMap<u64, Segment>,
    open: bool,
    highest: u64,
    spare: Option<File>,
    /// The last write failed: nothing is tried until [`Spool::try_again`].
    failing: bool,
    unsynced: Vec<Arc<File>>,
}

impl Spool {
    /// Opens the spool in `directory`, which is made if it is not there, with room for about `limit` bytes. While there
    /// is no room on the disk nothing is taken; that is no error.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn open(directory: &Path, limit: u64) -> io::Result<(Self, Recovered)> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let limit = limit.max(SMALLEST);
        let mut spool = Self {
            directory: directory.to_owned(),
            limit,
            segment: (limit / SEGMENTS).min(SEGMENT_MAX),
            segments: BTreeMap::new(),
            open: false,
            highest: 0,
            spare: None,
            failing: false,
            unsynced: Vec::new(),
        };
        let mut left = Left::default();
        let mut numbers = Vec::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".log"));
            numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        for number in numbers {
            spool.highest = number;
            let path = spool.path(number);
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            let length = replay(&file, number, &mut left)?;
            if length < file.metadata()?.len() {
                // Half a line, of a netd that was killed while it wrote it: it was promised to nobody.
                file.set_len(length)?;
            }
            spool.segments.insert(
                number,
                Segment {
                    file: Arc::new(file),
                    length,
                    live: 0,
                },
            );
        }
        for kept in left.records.values() {
            if let Some(segment) = spool.segments.get_mut(&kept.at.segment) {
                segment.live += 1;
            }
        }
        let last = spool.segments.values().next_back();
        spool.open = last.is_some_and(|last| last.length < spool.segment);
        match fs::remove_file(directory.join(SPARE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        spool.failing = !spool.open;
        if let Err(error) = spool.try_again()
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            return Err(error);
        }
        spool.prepare();
        Ok((spool, Recovered(left)))
    }

    /// Bytes of records that may wait. Less than the limit, so that what is done with between them can be cleared away.
    pub(super) fn capacity(&self) -> u64 {
        self.limit / 4 * 3 - 2 * self.segment
    }

    /// Whether nothing can be written.
    pub(super) fn is_failing(&self) -> bool {
        self.failing
    }

    /// Writes a line.
    ///
    /// # Errors
    /// When there is no room. The line is not there then, not even half of it.
    pub(super) fn append(&mut self, line: &[u8]) -> io::Result<At> {
        if self.failing {
            return Err(Errno::ENOSPC.into());
        }
        let written = self.write(line);
        if let Err(error) = &written {
            tracing::error!(%error, directory = %self.directory.display(), "the audit's spool takes no more records");
            self.failing = true;
        }
        written
    }

    fn write(&mut self, line: &[u8]) -> io::Result<At> {
        let size = u64::try_from(line.len()).unwrap_or(u64::MAX);
        let length =
            u32::try_from(line.len()).map_err(|_long| io::Error::from(io::ErrorKind::InvalidInput))?;
        let last = self.segments.values().next_back();
        if !self.open || last.is_none_or(|last| last.length > 0 && last.length + size > self.segment) {
            self.begin()?;
        }
        let mut last = self.segments.last_entry().ok_or(io::ErrorKind::NotFound)?;
        let (number, segment) = (*last.key(), last.get_mut());
        let offset = segment.length;
        if let Err(error) = segment.file.write_all_at(line, offset) {
            segment.file.set_len(offset).ok();
            return Err(error);
        }
        segment.length += size;
        if self.unsynced.is_empty() {
            self.unsynced.push(Arc::clone(&segment.file));
        }
        Ok(At {
            segment: number,
            offset,
            length,
        })
    }

    /// Begins the next segment.
    fn begin(&mut self) -> io::Result<()> {
        let number = self.highest + 1;
        let path = self.path(number);
        let spare = match self.spare.take() {
            Some(spare) => spare,
            None => self.reserve()?,
        };
        fs::rename(self.directory.join(SPARE), &path)?;
        self.highest = number;
        let file = Arc::new(spare);
        self.unsynced.push(Arc::clone(&file));
        // Its name, too.
        self.unsynced
            .extend(File::open(&self.directory).ok().map(Arc::new));
        let segment = Segment {
            file,
            length: 0,
            live: 0,
        };
        self.segments.insert(number, segment);
        self.open = true;
        self.prepare();
        Ok(())
    }

    /// A file with the room of a segment, under the name of the spare.
    fn reserve(&self) -> io::Result<File> {
        let path = self.directory.join(SPARE);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        let allocated = allocate(&file, self.segment);
        if allocated.is_err() {
            fs::remove_file(&path).ok();
        }
        allocated.map(|()| file)
    }

    /// Takes the room of the next segment, if it can be had.
    pub(super) fn prepare(&mut self) {
        if self.spare.is_none() {
            self.spare = self.reserve().ok();
        }
    }

    /// Finds out whether there is room again.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn try_again(&mut self) -> io::Result<()> {
        if !self.failing {
            return Ok(());
        }
        // Not by a line that may just fit: there must be room for more than the next one.
        if self.spare.is_none() {
            self.spare = Some(self.reserve()?);
        }
        if !self.open {
            self.begin()?;
        }
        self.failing = false;
        Ok(())
    }

    /// Whether nothing in the oldest segment is waited for, and so its room could be had ([`Self::recycle`]); how many
    /// bytes that is.
    pub(super) fn reusable(&self) -> Option<u64> {
        let oldest = self.segments.values().next()?;
        (oldest.live == 0).then_some(self.segment)
    }

    /// Makes the oldest segment, in which nothing is waited for, the next one, beginning with these lines: on a full disk
    /// there may be no other room. They are written over what it held, which needs none.
    ///
    /// Whoever is killed in between leaves the lines before the others of the log, where older ones about the same may
    /// count more: what was lost in the last seconds may then be told too low.
    ///
    /// # Errors
    /// When it cannot be written, or its room is gone to somebody else. Nothing that was waited for is touched.
    pub(super) fn recycle(&mut self, lines: &[u8]) -> io::Result<()> {
        let oldest = self
            .segments
            .first_key_value()
            .filter(|(_, oldest)| oldest.live == 0);
        let (number, file) = oldest
            .map(|(number, oldest)| (*number, Arc::clone(&oldest.file)))
            .ok_or(io::ErrorKind::NotFound)?;
        let length = u64::try_from(lines.len()).unwrap_or(u64::MAX);
        file.write_all_at(lines, 0)?;
        file.set_len(length)?;
        let next = self.highest + 1;
        fs::rename(self.path(number), self.path(next))?;
        self.segments.remove(&number);
        self.segments.insert(
            next,
            Segment {
                file: Arc::clone(&file),
                length,
                live: 0,
            },
        );
        self.highest = next;
        self.open = true;
        self.unsynced.push(Arc::clone(&file));
        self.unsynced
            .extend(File::open(&self.directory).ok().map(Arc::new));
        // What lay behind its end went with its length.
        allocate(&file, self.segment)?;
        self.failing = false;
        Ok(())
    }

    /// What a record says.
    ///
    /// # Errors
    /// When it is not there, or not readable any more.
    pub(super) fn read(&self, at: At) -> io::Result<AuditEvent> {
        match serde_json::from_slice(&self.raw(at)?)? {
            Line::Record { event, .. } | Line::Gap { event, .. } => Ok(event.into_owned()),
            Line::Done(_) | Line::Lost { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn raw(&self, at: At) -> io::Result<Vec<u8>> {
        let segment = self.segments.get(&at.segment).ok_or(io::ErrorKind::NotFound)?;
        let mut line = vec![0; usize::try_from(at.length).unwrap_or(usize::MAX)];
        segment.file.read_exact_at(&mut line, at.offset)?;
        Ok(line)
    }

    /// A record that was written is waited for.
    pub(super) fn hold(&mut self, at: At) {
        if let Some(segment) = self.segments.get_mut(&at.segment) {
            segment.live += 1;
        }
    }

    /// A record is done with.
    pub(super) fn release(&mut self, at: At) {
        if let Some(segment) = self.segments.get_mut(&at.segment) {
            segment.live = segment.live.saturating_sub(1);
        }
    }

    /// Whether the oldest segment holds nothing that is waited for, and is not the one that is written to.
    pub(super) fn can_reap(&self) -> bool {
        self.segments.len() > 1
            && self
                .segments
                .values()
                .next()
                .is_some_and(|oldest| oldest.live == 0)
    }

    /// Whether all that was written last is on the disk now, and not only with the kernel.
    pub(super) fn settle(&self) -> bool {
        let last = self.segments.values().next_back();
        last.is_none_or(|last| last.file.sync_data().is_ok())
    }

    /// Removes the oldest segment.
    pub(super) fn reap(&mut self) {
        let Some((number, _)) = self.segments.pop_first() else {
            return;
        };
        if let Err(error) = fs::remove_file(self.path(number)) {
            tracing::warn!(%error, segment = number, "cannot remove a segment of the audit's spool");
        }
    }

    /// Forgets all that was written: nothing of it is waited for.
    pub(super) fn clear(&mut self) {
        while self.segments.len() > 1 {
            self.reap();
        }
        let Some(last) = self
            .segments
            .values_mut()
            .next_back()
            .filter(|last| last.length > 0)
        else {
            return;
        };
        match last.file.set_len(0) {
            Ok(()) => {
                last.length = 0;
                // Its room went with what it held. Where there is none, writing will tell.
                allocate(&last.file, self.segment).ok();
            }
            Err(error) => tracing::warn!(%error, "cannot empty the audit's spool"),
        }
    }

    /// How many segments there are.
    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The oldest segment, when there are more bytes on the disk than there should be, and `live` bytes of records that
    /// are waited for are so much less that moving them would help.
    pub(super) fn crowded(&self, live: u64) -> Option<u64> {
        let taken: u64 = self.segments.values().map(|segment| segment.length).sum();
        let over = taken + 2 * self.segment > self.limit && taken.saturating_sub(live) > self.limit / 8;
        let oldest = self.segments.keys().next().copied();
        oldest.filter(|_| over && self.segments.len() > 1)
    }

    /// Files that were written to since the last time, to be forced to the disk by somebody who may wait.
    pub(super) fn unsynced(&mut self) -> Vec<Arc<File>> {
        std::mem::take(&mut self.unsynced)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number:012}.log"))
    }
}

#[cfg(test)]
impl Spool {
    pub(super) fn break_disk(&mut self) {
        self.failing = true;
    }

    pub(super) fn write_to(&mut self, file: File) {
        if let Some(mut last) = self.segments.last_entry() {
            last.get_mut().file = Arc::new(file);
        }
    }
}

/// What an earlier netd left, for the queue.
#[derive(Debug)]
pub struct Recovered(pub(super) Left);

/// Takes room for a file without making it longer.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    let size = i64::try_from(size).unwrap_or(i64::MAX);
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, size) {
        // A file system that cannot promise any.
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads a segment. Returns the bytes up to the end of its last whole line.
fn replay(file: &File, number: u64, left: &mut Left) -> io::Result<u64> {
    let (mut reader, mut line, mut offset) = (BufReader::new(file), Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        if line.last() != Some(&b'\n') {
            break;
        }
        let length =
            u32::try_from(line.len()).map_err(|_long| io::Error::from(io::ErrorKind::InvalidData))?;
        let at = At {
            segment: number,
            offset,
            length,
        };
        match serde_json::from_slice(&line) {
            Ok(read) => left.take(read, at),
            Err(error) => {
                tracing::error!(%error, segment = number, offset, "a line of the audit's spool cannot be read");
            }
        }
        offset += u64::from(length);
        line.clear();
    }
    Ok(offset)
}

impl Left {
    fn take(&mut self, line: Line<'_>, at: At) {
        match line {
            Line::Record { sequence, event } => self.keep(sequence, &event, at),
            Line::Gap { sequence, event } => {
                self.lost.remove(&event.sandbox_id);
                self.keep(sequence, &event, at);
            }
            Line::Done(runs) => self.forget(&runs),
            Line::Lost {
                sandbox_id,
                org_id,
                count,
                gone,
            } => {
                self.forget(&gone);
                self.lost
                    .insert(sandbox_id.into_owned(), (org_id.into_owned(), count));
            }
        }
    }

    fn keep(&mut self, sequence: u64, event: &AuditEvent, at: At) {
        self.highest = self.highest.max(sequence);
        let kept = Kept {
            at,
            sandbox_id: event.sandbox_id.clone(),
            org_id: event.org_id.clone(),
            repeated: event.repeated,
        };
        // Again, when it was moved: the later place counts.
        self.records.insert(sequence, kept);
    }

    fn forget(&mut self, runs: &[(u64, u64)]) {
        for (first, last) in runs {
            self.highest = self.highest.max(*last);
            if first > last {
                continue;
            }
            let inside: Vec<u64> = self
                .records
                .range(first..=last)
                .map(|(sequence, _)| *sequence)
                .collect();
            for sequence in inside {
                self.records.remove(&sequence);
            }
        }
    }
}

/// Numbers as runs of first and last.
pub(super) fn runs(mut numbers: Vec<u64>) -> Vec<(u64, u64)> {
    numbers.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if number <= last.saturating_add(1) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}
