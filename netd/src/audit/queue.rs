//! The bounded queue of records, one lane per sandbox, so that one sandbox's flood neither delays nor
//! displaces another's records. Pure.

use std::collections::{HashMap, VecDeque};

use sandgate_api::{
    audit::AuditEvent,
    id::{OrgId, SandboxId},
};
use sandgate_policy::FailureMode;

use super::gap;

/// Records of all sandboxes.
pub(super) const TOTAL_MAX: usize = 65_536;
/// Records of one sandbox.
pub(super) const LANE_MAX: usize = 8_192;

#[derive(Default)]
pub(super) struct Queue {
    lanes: HashMap<SandboxId, Lane>,
    /// Lanes with something in them, the one whose turn it is first.
    turns: VecDeque<SandboxId>,
    length: usize,
    lost: u64,
    in_flight: Vec<AuditEvent>,
}

#[derive(Default)]
struct Lane {
    records: VecDeque<AuditEvent>,
    lost: u64,
    org_id: Option<OrgId>,
}

impl Queue {
    /// Whether one more record of this sandbox may be promised.
    pub(super) fn has_room(&self, sandbox_id: &SandboxId) -> bool {
        self.length < TOTAL_MAX
            && self
                .lanes
                .get(sandbox_id)
                .is_none_or(|lane| lane.records.len() < LANE_MAX)
    }

    /// Adds a record. Under `FailOpen` a full queue gives up the sandbox's own oldest record; under
    /// `FailClosed` the record is kept: flows that could not be recorded were not admitted, so that what
    /// still comes is bounded by those that were.
    pub(super) fn push(&mut self, mode: FailureMode, event: AuditEvent) {
        let full = mode == FailureMode::FailOpen && !self.has_room(&event.sandbox_id);
        let lane = self.lanes.entry(event.sandbox_id.clone()).or_default();
        if lane.records.is_empty() && lane.lost == 0 {
            self.turns.push_back(event.sandbox_id.clone());
        }
        lane.org_id = Some(event.org_id.clone());
        if full {
            let Some(oldest) = lane.records.pop_front() else {
                lane.lost = lane.lost.saturating_add(event.repeated);
                self.lost = self.lost.saturating_add(event.repeated);
                return;
            };
            lane.lost = lane.lost.saturating_add(oldest.repeated);
            self.lost = self.lost.saturating_add(oldest.repeated);
            self.length -= 1;
        }
        lane.records.push_back(event);
        self.length += 1;
    }

    /// Records that are not delivered yet.
    pub(super) fn len(&self) -> usize {
        self.length + self.in_flight.len()
    }

    /// Records that were given up, ever.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// The next records to deliver, at most `limit`: the same again until [`Self::delivered`].
    pub(super) fn batch(&mut self, limit: usize) -> &[AuditEvent] {
        if !self.in_flight.is_empty() {
            return &self.in_flight;
        }
        while self.in_flight.len() < limit {
            let Some(id) = self.turns.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&id) else {
                continue;
            };
            if lane.lost > 0
                && let Some(org_id) = &lane.org_id
            {
                // Before those that were kept, as what it stands for is older.
                self.in_flight.push(gap(&id, org_id, lane.lost));
                lane.lost = 0;
            } else if let Some(event) = lane.records.pop_front() {
                self.in_flight.push(event);
                self.length -= 1;
            }
            if lane.records.is_empty() && lane.lost == 0 {
                self.lanes.remove(&id);
            } else {
                self.turns.push_back(id);
            }
        }
        &self.in_flight
    }

    /// The records of the last batch are the controller's.
    pub(super) fn delivered(&mut self) {
        self.in_flight.clear();
    }
}
