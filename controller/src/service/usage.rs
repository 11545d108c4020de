//! What organisations have used, by period.

use std::{collections::BTreeMap, ops::Range};

use jiff::{SignedDuration, Timestamp, ToSpan as _, Unit, Zoned, tz::TimeZone};
use sandgate_api::{
    id::OrgId,
    rest::{SandboxUsage, SandboxUsageList, UsageHistory, UsagePoint, UsageSummary},
};

use super::{Service, ServiceError};
use crate::store::{Amounts, hour_of};

/// Most periods of a history.
const MOST_PERIODS: usize = 1_000;

/// Most sandboxes of a list.
const MOST_SANDBOXES: u32 = 1_000;

/// How much is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// An hour.
    Hourly,
    /// A day, in UTC.
    Daily,
    /// A month, in UTC.
    Monthly,
}

impl Granularity {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Monthly => "monthly",
        }
    }

    /// How far back a history goes when nobody says.
    fn usual(self) -> SignedDuration {
        SignedDuration::from_hours(match self {
            Self::Hourly => 24,
            Self::Daily => 30 * 24,
            Self::Monthly => 365 * 24,
        })
    }

    /// Where the period of this time begins.
    fn floor(self, time: &Zoned) -> Result<Zoned, jiff::Error> {
        match self {
            Self::Hourly => time.round(
                jiff::ZonedRound::new()
                    .smallest(Unit::Hour)
                    .mode(jiff::RoundMode::Floor),
            ),
            Self::Daily => time.start_of_day(),
            Self::Monthly => time.first_of_month()?.start_of_day(),
        }
    }

    /// Where the period after the one that begins here begins.
    fn after(self, start: &Zoned) -> Result<Zoned, jiff::Error> {
        match self {
            Self::Hourly => start.checked_add(1.hour()),
            Self::Daily => start.checked_add(1.day()),
            Self::Monthly => start.checked_add(1.month()),
        }
    }
}

/// Since when, and until when; what is left out is what is usual.
pub type Period = (Option<Timestamp>, Option<Timestamp>);

impl Service {
    /// What an organisation has used this month.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn current_usage(&self, org_id: &OrgId) -> Result<UsageSummary, ServiceError> {
        let periods = periods(Granularity::Monthly, super::now(), super::now())?;
        let used = self.used(org_id, &periods).await?;
        let used = used
            .into_iter()
            .next()
            .ok_or_else(|| ServiceError::Internal("no month is now".to_owned()))?;
        let kinds = ["cpu", "memory", "network"];
        Ok(UsageSummary {
            used,
            estimated_cost_cents: 0,
            breakdown: kinds.map(|kind| (kind.to_owned(), 0)).into(),
        })
    }

    /// What an organisation has used, period by period.
    ///
    /// # Errors
    /// A time that is too long, or ends before it begins.
    pub async fn usage_history(
        &self,
        org_id: &OrgId,
        granularity: Granularity,
        period: Period,
    ) -> Result<UsageHistory, ServiceError> {
        let (start, end) = span(period, granularity)?;
        let periods = periods(granularity, start, end)?;
        Ok(UsageHistory {
            granularity: granularity.as_str().to_owned(),
            start_date: start,
            end_date: end,
            data: self.used(org_id, &periods).await?,
        })
    }

    /// What an organisation's sandboxes have used, each by itself: of the last 30 days, if nothing else is said.
    ///
    /// # Errors
    /// A time that ends before it begins.
    pub async fn usage_by_sandbox(
        &self,
        org_id: &OrgId,
        period: Period,
    ) -> Result<SandboxUsageList, ServiceError> {
        let (start, end) = span(period, Granularity::Daily)?;
        self.shared.store_usage(None).await;
        let hours = hour_of(start)..hour_of(end).saturating_add(1);
        let store = &self.shared.store;
        let used = store.usage_by_sandbox(org_id, hours, MOST_SANDBOXES).await?;
        let sandboxes = used.into_iter().map(|(sandbox_id, amounts)| {
            let point = point(amounts, start..end);
            SandboxUsage {
                sandbox_id,
                cpu_hours: point.cpu_hours,
                memory_gb_hours: point.memory_gb_hours,
                network_gb: point.network_gb,
            }
        });
        Ok(SandboxUsageList {
            start_date: start,
            end_date: end,
            sandboxes: sandboxes.collect(),
        })
    }

    async fn used(
        &self,
        org_id: &OrgId,
        periods: &[Range<Timestamp>],
    ) -> Result<Vec<UsagePoint>, ServiceError> {
        let (Some(first), Some(last)) = (periods.first(), periods.last()) else {
            return Ok(Vec::new());
        };
        self.shared.store_usage(None).await;
        let hours = hour_of(first.start)..hour_of(last.end);
        let used = self.shared.store.usage_by_hour(org_id, hours).await?;
        Ok(added_up(&used, periods))
    }
}

fn span((start, end): Period, granularity: Granularity) -> Result<(Timestamp, Timestamp), ServiceError> {
    let end = end.unwrap_or_else(super::now);
    let start = match start {
        Some(start) => start,
        None => end.saturating_sub(granularity.usual()).unwrap_or(Timestamp::MIN),
    };
    if start >= end {
        return Err(invalid("start_date", "expected a time before end_date"));
    }
    Ok((start, end))
}

/// Every period that has something of this span, whole.
fn periods(
    granularity: Granularity,
    start: Timestamp,
    end: Timestamp,
) -> Result<Vec<Range<Timestamp>>, ServiceError> {
    let beyond = |_error| invalid("start_date", "expected a time that a calendar has");
    let mut at = granularity
        .floor(&start.to_zoned(TimeZone::UTC))
        .map_err(beyond)?;
    let mut periods = Vec::new();
    loop {
        if periods.len() == MOST_PERIODS {
            let message = format!(
                "a {} history has at most {MOST_PERIODS} periods",
                granularity.as_str()
            );
            return Err(invalid("start_date", &message));
        }
        let next = granularity.after(&at).map_err(beyond)?;
        periods.push(at.timestamp()..next.timestamp());
        if next.timestamp() >= end {
            return Ok(periods);
        }
        at = next;
    }
}

/// Amounts of hours as those of periods, both in their order.
fn added_up(used: &[(i64, Amounts)], periods: &[Range<Timestamp>]) -> Vec<UsagePoint> {
    let by_hour: BTreeMap<i64, Amounts> = used.iter().copied().collect();
    let points = periods.iter().map(|period| {
        let hours = hour_of(period.start)..hour_of(period.end);
        let all = by_hour
            .range(hours)
            .fold(Amounts::default(), |sum, (_, amounts)| sum.plus(*amounts));
        point(all, period.clone())
    });
    points.collect()
}

#[expect(clippy::cast_precision_loss, reason = "a summary needs no more")]
fn point(amounts: Amounts, period: Range<Timestamp>) -> UsagePoint {
    const HOUR: f64 = 3600.0;
    const GIGA: f64 = 1e9;
    UsagePoint {
        period_start: period.start,
        period_end: period.end,
        cpu_hours: amounts.cpu_micros as f64 / 1e6 / HOUR,
        memory_gb_hours: amounts.memory_kib_seconds as f64 * 1024.0 / GIGA / HOUR,
        network_gb: amounts.network_bytes as f64 / GIGA,
        sandbox_creations: amounts.creations,
    }
}

fn invalid(field: &str, message: &str) -> ServiceError {
    ServiceError::Invalid {
        field: field.to_owned(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn starts(granularity: Granularity, start: &str, end: &str) -> Vec<String> {
        let found = periods(granularity, time(start), time(end)).expect("periods");
        for pair in found.windows(2) {
            assert_eq!(pair[0].end, pair[1].start, "no gap");
        }
        found.iter().map(|period| period.start.to_string()).collect()
    }

    #[test]
    fn periods_are_whole_and_follow_each_other() {
        assert_eq!(
            starts(
                Granularity::Hourly,
                "2026-02-28T22:30:00Z",
                "2026-03-01T00:00:01Z"
            ),
            [
                "2026-02-28T22:00:00Z",
                "2026-02-28T23:00:00Z",
                "2026-03-01T00:00:00Z"
            ]
        );
        assert_eq!(
            starts(Granularity::Daily, "2026-02-27T10:00:00Z", "2026-03-01T00:00:00Z"),
            ["2026-02-27T00:00:00Z", "2026-02-28T00:00:00Z"]
        );
        assert_eq!(
            starts(
                Granularity::Monthly,
                "2025-12-31T23:59:59Z",
                "2026-02-01T00:00:01Z"
            ),
            [
                "2025-12-01T00:00:00Z",
                "2026-01-01T00:00:00Z",
                "2026-02-01T00:00:00Z"
            ]
        );
        let now = "2026-02-03T04:05:06Z";
        assert_eq!(starts(Granularity::Monthly, now, now), ["2026-02-01T00:00:00Z"]);
        let endless = periods(
            Granularity::Hourly,
            time("2026-01-01T00:00:00Z"),
            time("2027-01-01T00:00:00Z"),
        );
        assert!(endless.is_err());
    }

    #[test]
    fn every_hour_counts_in_one_period() {
        let periods = periods(
            Granularity::Daily,
            time("2026-01-01T05:00:00Z"),
            time("2026-01-03T00:00:00Z"),
        )
        .expect("periods");
        let first = hour_of(time("2026-01-01T00:00:00Z"));
        let amounts = |creations| Amounts {
            cpu_micros: 3_600_000_000,
            network_bytes: 500_000_000,
            creations,
            ..Amounts::default()
        };
        let used = [
            (first, amounts(1)),
            (first + 23, amounts(2)),
            (first + 24, amounts(4)),
        ];
        let points = added_up(&used, &periods);
        let told: Vec<(f64, f64, u64)> = points
            .iter()
            .map(|point| (point.cpu_hours, point.network_gb, point.sandbox_creations))
            .collect();
        assert_eq!(told, [(2.0, 1.0, 3), (1.0, 0.5, 4)]);
    }
}
