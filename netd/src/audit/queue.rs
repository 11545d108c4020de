//! The bounded queue of records, one lane per sandbox, so that one sandbox's flood neither delays nor displaces
//! another's records. What waits is on disk ([`super::spool`]); in memory is where, and, while the disk takes nothing,
//! the records themselves. What the newest records say is kept beside that, to a limit, so that those that are delivered
//! soon need not be read back.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    sync::Arc,
};

use bytes::Bytes;
use sandgate_api::{
    audit::AuditEvent,
    id::{OrgId, SandboxId},
};
use sandgate_policy::FailureMode;

use super::{
    gap,
    spool::{At, Line, Recovered, Spool, record, runs},
};

/// What part of the spool one sandbox may have.
const SHARE: u64 = 8;
/// Records of one sandbox in memory that are kept under `FailOpen` while the disk takes nothing.
const MEMORY_LANE: usize = 1024;
/// The same of all sandboxes.
const MEMORY_MAX: usize = 16_384;
/// Bytes of records on the disk that are also in memory.
const KEPT_MAX: usize = 2 << 20;

pub(super) struct Queue {
    spool: Spool,
    lanes: HashMap<SandboxId, Lane>,
    /// Lanes with something in them, the one whose turn it is first.
    turns: VecDeque<SandboxId>,
    /// Records in lanes.
    length: usize,
    /// Of them and of those in flight, the ones in memory.
    in_memory: usize,
    /// Bytes in memory of records in lanes that are on the disk too.
    kept: usize,
    /// Bytes on disk of records that are not delivered.
    live: u64,
    next: u64,
    lost: u64,
    in_flight: Vec<Entry>,
    /// What those in flight say, as JSON, without any that cannot be read.
    batch: Vec<Bytes>,
}

#[derive(Default)]
struct Lane {
    records: VecDeque<Entry>,
    /// Bytes on disk of these.
    bytes: u64,
    /// Bytes on disk of those that are being delivered: they are the sandbox's share until they are.
    in_flight: u64,
    in_memory: usize,
    /// Attempts whose records were given up, and no gap record tells it yet.
    lost: u64,
    /// Numbers of records that went with it, to be written down.
    gone: Vec<u64>,
    /// `lost` has changed since it was written down.
    is_stale: bool,
    org_id: Option<OrgId>,
}

struct Entry {
    sequence: u64,
    repeated: u64,
    place: Place,
    /// What it says, as JSON, while that is kept.
    said: Option<Bytes>,
}

enum Place {
    Disk(At),
    Memory(Box<AuditEvent>),
}

impl Lane {
    fn is_empty(&self) -> bool {
        self.records.is_empty() && self.lost == 0
    }

    /// Nothing need be known of it any more.
    fn is_done(&self) -> bool {
        self.is_empty() && !self.is_stale && self.in_flight == 0
    }

    /// What is to be written down of what was lost: a line, or nothing.
    fn loss(&self, id: &SandboxId) -> Option<Vec<u8>> {
        let org_id = self.org_id.as_ref().filter(|_| self.is_stale)?;
        let line = Line::Lost {
            sandbox_id: Cow::Borrowed(id),
            org_id: Cow::Borrowed(org_id),
            count: self.lost,
            gone: runs(self.gone.clone()),
        };
        line.written().ok()
    }

    /// That line is written.
    fn is_told(&mut self) {
        self.gone.clear();
        self.is_stale = false;
    }

    fn lose(&mut self, repeated: u64) {
        self.lost = self.lost.saturating_add(repeated);
        self.is_stale = true;
    }
}

impl Queue {
    /// Goes on with what an earlier netd left.
    pub(super) fn new(spool: Spool, Recovered(left): Recovered) -> Self {
        let mut queue = Self {
            spool,
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            length: 0,
            in_memory: 0,
            kept: 0,
            live: 0,
            next: left.highest + 1,
            lost: 0,
            in_flight: Vec::new(),
            batch: Vec::new(),
        };
        for (id, (org_id, count)) in left.lost {
            let lane = queue.lanes.entry(id).or_default();
            lane.org_id = Some(org_id);
            lane.lost = count;
        }
        for (sequence, kept) in left.records {
            let lane = queue.lanes.entry(kept.sandbox_id).or_default();
            lane.org_id = Some(kept.org_id);
            lane.bytes += u64::from(kept.at.length);
            queue.live += u64::from(kept.at.length);
            queue.length += 1;
            lane.records.push_back(Entry {
                sequence,
                repeated: kept.repeated,
                place: Place::Disk(kept.at),
                said: None,
            });
        }
        let waiting = queue.lanes.iter().filter(|(_, lane)| !lane.is_empty());
        queue.turns = waiting.map(|(id, _)| id.clone()).collect();
        queue
    }

    /// Whether one more record of this sandbox may be promised.
    pub(super) fn has_room(&self, sandbox_id: &SandboxId) -> bool {
        let capacity = self.spool.capacity();
        let lane = self.lanes.get(sandbox_id);
        !self.spool.is_failing()
            && self.live < capacity
            && lane.is_none_or(|lane| lane.bytes + lane.in_flight < capacity / SHARE)
    }

    /// Adds a record. Under `FailOpen` a full queue gives up the sandbox's own oldest records; under
    /// `FailClosed` the record is kept: flows that could not be recorded were not admitted, so that what
    /// still comes is bounded by those that were.
    pub(super) fn push(&mut self, mode: FailureMode, event: AuditEvent) {
        let sequence = self.next;
        self.next += 1;
        let said = serde_json::to_vec(&event);
        let line = said.as_ref().map(|said| record(sequence, said));
        let needed = line.as_ref().map_or(0, |line| bytes(line.len()));
        let id = event.sandbox_id.clone();
        let lane = self.lanes.entry(id.clone()).or_default();
        if lane.is_empty() {
            self.turns.push_back(id.clone());
        }
        lane.org_id = Some(event.org_id.clone());
        if mode == FailureMode::FailOpen && !self.makes_room(&id, needed) {
            self.lost = self.lost.saturating_add(event.repeated);
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.lose(event.repeated);
            }
            return;
        }
        let repeated = event.repeated;
        let written = line.ok().and_then(|line| self.spool.append(&line).ok());
        let (place, said) = match written {
            Some(at) => (Place::Disk(at), self.keep(said.unwrap_or_default())),
            None => (Place::Memory(Box::new(event)), None),
        };
        self.place(&id, &place);
        self.length += 1;
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.records.push_back(Entry {
                sequence,
                repeated,
                place,
                said,
            });
        }
        self.compact();
    }

    /// Keeps what a record says, if there is room for it.
    fn keep(&mut self, said: Vec<u8>) -> Option<Bytes> {
        if said.is_empty() || self.kept + said.len() > KEPT_MAX {
            return None;
        }
        self.kept += said.len();
        Some(Bytes::from(said.into_boxed_slice()))
    }

    /// What a record says, if it was kept; then it is kept no more.
    fn unkeep(&mut self, entry: &mut Entry) -> Option<Bytes> {
        let said = entry.said.take()?;
        self.kept = self.kept.saturating_sub(said.len());
        Some(said)
    }

    /// Whether a record may be kept under `FailOpen`, if need be instead of older ones of the same sandbox.
    fn makes_room(&mut self, id: &SandboxId, needed: u64) -> bool {
        if self.has_room(id) {
            return true;
        }
        let lane = self.lanes.get(id);
        let in_memory = lane.map_or(0, |lane| lane.in_memory);
        if self.spool.is_failing() && in_memory < MEMORY_LANE && self.in_memory < MEMORY_MAX {
            return true;
        }
        let mut freed = 0;
        while freed < needed {
            let Some(lane) = self.lanes.get_mut(id) else { break };
            // While the disk takes nothing, what is on it makes no room.
            let index = match self.spool.is_failing() {
                true => lane
                    .records
                    .iter()
                    .position(|entry| matches!(entry.place, Place::Memory(_))),
                false => Some(0),
            };
            let Some(mut entry) = index.and_then(|index| lane.records.remove(index)) else {
                break;
            };
            lane.lose(entry.repeated);
            if matches!(entry.place, Place::Disk(_)) {
                lane.gone.push(entry.sequence);
            }
            self.unkeep(&mut entry);
            self.lost = self.lost.saturating_add(entry.repeated);
            self.length -= 1;
            freed += match &entry.place {
                Place::Disk(at) => u64::from(at.length),
                Place::Memory(_) => needed,
            };
            self.leave(Some(id), &entry.place);
            self.release(&entry.place);
        }
        freed >= needed
    }

    /// Counts a record in.
    fn place(&mut self, id: &SandboxId, place: &Place) {
        let Some(lane) = self.lanes.get_mut(id) else {
            return;
        };
        match place {
            Place::Disk(at) => {
                lane.bytes += u64::from(at.length);
                self.live += u64::from(at.length);
                self.spool.hold(*at);
            }
            Place::Memory(_) => {
                lane.in_memory += 1;
                self.in_memory += 1;
            }
        }
    }

    /// It is no longer in its lane.
    fn leave(&mut self, id: Option<&SandboxId>, place: &Place) {
        let Some(lane) = id.and_then(|id| self.lanes.get_mut(id)) else {
            return;
        };
        match place {
            Place::Disk(at) => lane.bytes = lane.bytes.saturating_sub(u64::from(at.length)),
            Place::Memory(_) => lane.in_memory = lane.in_memory.saturating_sub(1),
        }
    }

    /// It is done with.
    fn release(&mut self, place: &Place) {
        match place {
            Place::Disk(at) => {
                self.live = self.live.saturating_sub(u64::from(at.length));
                self.spool.release(*at);
            }
            Place::Memory(_) => self.in_memory = self.in_memory.saturating_sub(1),
        }
    }

    /// Records that are not delivered yet.
    pub(super) fn len(&self) -> usize {
        self.length + self.in_flight.len()
    }

    /// Bytes of them on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.live
    }

    /// Records that were given up since netd began.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// The next records to deliver, at most `limit`, as JSON each: the same again until [`Self::delivered`].
    pub(super) fn batch(&mut self, limit: usize) -> &[Bytes] {
        if !self.in_flight.is_empty() {
            return &self.batch;
        }
        self.batch.clear();
        while self.in_flight.len() < limit {
            let Some(id) = self.turns.pop_front() else { break };
            // Before those that were kept, as what it stands for is older.
            if let Some((entry, said)) = self.tell_loss(&id) {
                self.in_flight.push(entry);
                self.batch.push(said);
            } else if let Some(mut entry) = self.lanes.get_mut(&id).and_then(|lane| lane.records.pop_front())
            {
                self.length -= 1;
                self.leave(Some(&id), &entry.place);
                let said = match self.unkeep(&mut entry) {
                    Some(said) => Ok(said),
                    None => self.said(&entry.place),
                };
                match said {
                    Ok(said) => {
                        if let (Place::Disk(at), Some(lane)) = (&entry.place, self.lanes.get_mut(&id)) {
                            lane.in_flight += u64::from(at.length);
                        }
                        self.batch.push(said);
                        self.in_flight.push(entry);
                    }
                    Err(error) => self.miss(&id, &entry, &error),
                }
            }
            match self.lanes.get(&id) {
                Some(lane) if lane.is_done() => drop(self.lanes.remove(&id)),
                Some(lane) if lane.is_empty() => {}
                Some(_) => self.turns.push_back(id),
                None => {}
            }
        }
        &self.batch
    }

    fn said(&self, place: &Place) -> io::Result<Bytes> {
        let said = match place {
            Place::Disk(at) => serde_json::to_vec(&self.spool.read(*at)?)?,
            Place::Memory(event) => serde_json::to_vec(event)?,
        };
        Ok(said.into())
    }

    /// A record that cannot be read any more is one that was lost.
    fn miss(&mut self, id: &SandboxId, entry: &Entry, error: &io::Error) {
        tracing::error!(%error, sandbox_id = %id, "an audit record cannot be read back from the spool");
        self.lost = self.lost.saturating_add(entry.repeated);
        self.release(&entry.place);
        if let Some(lane) = self.lanes.get_mut(id) {
            lane.gone.push(entry.sequence);
            lane.lose(entry.repeated);
        }
    }

    /// Makes what a sandbox has lost a record.
    fn tell_loss(&mut self, id: &SandboxId) -> Option<(Entry, Bytes)> {
        let lane = self.lanes.get(id).filter(|lane| lane.lost > 0)?;
        let event = gap(id, lane.org_id.as_ref()?, lane.lost);
        let said = serde_json::to_vec(&event).ok()?;
        // First, so that what is gone does not come back beside the record of its loss.
        self.write_loss(id);
        let sequence = self.next;
        self.next += 1;
        let line = Line::Gap {
            sequence,
            event: Cow::Borrowed(&event),
        };
        let place = match line.written().and_then(|line| self.spool.append(&line)) {
            Ok(at) => Place::Disk(at),
            Err(_told) => Place::Memory(Box::new(event.clone())),
        };
        self.place(id, &place);
        self.leave(Some(id), &place);
        if let Some(lane) = self.lanes.get_mut(id) {
            lane.lost = 0;
            lane.is_stale = matches!(place, Place::Memory(_)) || !lane.gone.is_empty();
        }
        let entry = Entry {
            sequence,
            repeated: event.repeated,
            place,
            said: None,
        };
        Some((entry, said.into()))
    }

    /// The records of the last batch are the controller's.
    pub(super) fn delivered(&mut self) {
        let delivered = std::mem::take(&mut self.in_flight);
        self.batch.clear();
        let on_disk = delivered
            .iter()
            .filter(|entry| matches!(entry.place, Place::Disk(_)));
        let done = runs(on_disk.map(|entry| entry.sequence).collect());
        for entry in &delivered {
            self.release(&entry.place);
        }
        for lane in self.lanes.values_mut() {
            lane.in_flight = 0;
        }
        self.lanes.retain(|_, lane| !lane.is_done());
        if !done.is_empty() {
            // What is not said here is delivered again by the next netd, and known by its id.
            let line = Line::Done(done).written();
            line.and_then(|line| self.spool.append(&line)).ok();
        }
        self.reap();
    }

    /// Does what waits for room on the disk, or for a moment without hurry. Now and then.
    pub(super) fn settle(&mut self) {
        if self.spool.is_failing() && (self.spool.try_again().is_ok() || self.recycle()) {
            self.write_memory();
            if !self.spool.is_failing() {
                tracing::info!("the audit's spool takes records again");
            }
        }
        self.spool.prepare();
        self.write_losses();
        self.reap();
        if self.len() == 0 && self.lanes.is_empty() {
            self.spool.clear();
        }
    }

    /// Files to be forced to the disk.
    pub(super) fn unsynced(&mut self) -> Vec<Arc<File>> {
        self.spool.unsynced()
    }

    /// Writes down what was kept in memory because there was no room.
    fn write_memory(&mut self) {
        let mut flying = std::mem::take(&mut self.in_flight);
        for entry in &mut flying {
            self.write_entry(entry);
        }
        self.in_flight = flying;
        let kept = self.lanes.iter().filter(|(_, lane)| lane.in_memory > 0);
        let ids: Vec<_> = kept.map(|(id, _)| id.clone()).collect();
        for id in ids {
            let Some(lane) = self.lanes.get_mut(&id) else {
                continue;
            };
            let mut records = std::mem::take(&mut lane.records);
            let written: Vec<u64> = records
                .iter_mut()
                .filter_map(|entry| self.write_entry(entry))
                .collect();
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.records = records;
                lane.in_memory = lane.in_memory.saturating_sub(written.len());
                lane.bytes += written.iter().sum::<u64>();
            }
        }
    }

    /// Writes down one that is in memory. Returns its bytes.
    fn write_entry(&mut self, entry: &mut Entry) -> Option<u64> {
        let Place::Memory(event) = &entry.place else {
            return None;
        };
        let said = serde_json::to_vec(event).ok()?;
        let at = self.spool.append(&record(entry.sequence, &said)).ok()?;
        let length = u64::from(at.length);
        self.spool.hold(at);
        self.live += length;
        self.in_memory = self.in_memory.saturating_sub(1);
        entry.place = Place::Disk(at);
        Some(length)
    }

    /// Writes down what sandboxes have lost. True: all of it.
    fn write_losses(&mut self) -> bool {
        let stale = self.lanes.iter().filter(|(_, lane)| lane.is_stale);
        let ids: Vec<_> = stale.map(|(id, _)| id.clone()).collect();
        let mut all = true;
        for id in ids {
            all &= self.write_loss(&id);
            if self.lanes.get(&id).is_some_and(Lane::is_done) {
                self.lanes.remove(&id);
            }
        }
        all
    }

    fn write_loss(&mut self, id: &SandboxId) -> bool {
        let Some(lane) = self.lanes.get_mut(id) else {
            return true;
        };
        let Some(line) = lane.loss(id) else { return true };
        let written = self.spool.append(&line).is_ok();
        if written {
            lane.is_told();
        }
        written
    }

    /// Takes the room of the oldest segment, if nobody waits for anything in it. Removing it would have to wait for room in
    /// which what it says of losses is said again; so that is said in its place. True: there is room.
    fn recycle(&mut self) -> bool {
        let Some(room) = self.spool.reusable() else {
            return false;
        };
        let mut lines = Vec::new();
        let mut said = Vec::new();
        for (id, lane) in &mut self.lanes {
            // Those for whom there is no room here are told of next.
            lane.is_stale |= lane.lost > 0;
            let Some(line) = lane.loss(id) else { continue };
            if bytes(lines.len() + line.len()) <= room {
                lines.extend(line);
                said.push(id.clone());
            }
        }
        if let Err(error) = self.spool.recycle(&lines) {
            tracing::debug!(%error, "no room in the oldest segment of the audit's spool either");
            return false;
        }
        for id in said {
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.is_told();
            }
        }
        self.lanes.retain(|_, lane| !lane.is_done());
        true
    }

    /// Removes segments that nobody waits for. What they say of losses is said again.
    fn reap(&mut self) {
        if !self.spool.can_reap() {
            return;
        }
        for lane in self.lanes.values_mut() {
            lane.is_stale |= lane.lost > 0;
        }
        if !self.write_losses() {
            return;
        }
        while self.spool.can_reap() {
            self.spool.reap();
        }
    }

    /// Makes room on the disk when most of what is there is done with, and only the order keeps it.
    fn compact(&mut self) {
        for _ in 0..self.spool.segments() {
            let Some(oldest) = self.spool.crowded(self.live) else {
                return;
            };
            if !self.move_away(oldest) {
                return;
            }
        }
    }

    /// Writes what is waited for in a segment to the end of the log, and removes the segment.
    fn move_away(&mut self, segment: u64) -> bool {
        let Self {
            lanes,
            in_flight,
            spool,
            live,
            ..
        } = self;
        let mut moving = |entry: &mut Entry| -> io::Result<i64> {
            let Place::Disk(at) = entry.place else {
                return Ok(0);
            };
            if at.segment != segment {
                return Ok(0);
            }
            let said = serde_json::to_vec(&spool.read(at)?)?;
            let now = spool.append(&record(entry.sequence, &said))?;
            spool.hold(now);
            spool.release(at);
            entry.place = Place::Disk(now);
            *live = live.saturating_sub(u64::from(at.length)) + u64::from(now.length);
            Ok(i64::from(now.length) - i64::from(at.length))
        };
        for entry in in_flight {
            if moving(entry).is_err() {
                return false;
            }
        }
        for lane in lanes.values_mut() {
            for entry in &mut lane.records {
                match moving(entry) {
                    Ok(grown) => lane.bytes = lane.bytes.saturating_add_signed(grown),
                    Err(_told) => return false,
                }
            }
        }
        // Old records have long been on the disk: they must not depend on the next second's sync again.
        if !self.spool.settle() {
            return false;
        }
        let before = self.spool.segments();
        self.reap();
        self.spool.segments() < before
    }
}

#[cfg(test)]
impl Queue {
    /// Whether nothing is known of any sandbox.
    pub(super) fn is_forgotten(&self) -> bool {
        self.lanes.is_empty()
    }

    /// As if the disk had become full.
    pub(super) fn break_disk(&mut self) {
        self.spool.break_disk();
    }

    /// Has the next line go there.
    pub(super) fn write_to(&mut self, file: File) {
        self.spool.write_to(file);
    }
}

fn bytes(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
