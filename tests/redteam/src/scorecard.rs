//! The verdicts of a run as text, JSON and HTML.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{
    case::Case,
    evidence::{Judged, Verdict},
};

/// The verdicts of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scorecard {
    /// What was attacked.
    pub system: String,
    /// Its verdicts, in the order of the suite.
    pub cases: Vec<Judged>,
}

const VERDICTS: [(Verdict, &str, &str); 5] = [
    (Verdict::Pass, "pass", "#1a7f37"),
    (Verdict::NotPossible, "not possible here", "#6e7781"),
    (Verdict::Rough, "rough", "#9a6700"),
    (Verdict::Blocked, "blocked", "#bc4c00"),
    (Verdict::Leak, "LEAK", "#cf222e"),
];

fn shown(verdict: Verdict) -> (&'static str, &'static str) {
    let found = VERDICTS.iter().find(|(own, ..)| *own == verdict);
    found.map_or(("", ""), |(_, name, colour)| (name, colour))
}

impl Scorecard {
    /// Nothing got out, nothing felt wrong, and what is allowed passed. A run in which nothing was possible is not green.
    pub fn is_green(&self) -> bool {
        let fine = |case: &Judged| matches!(case.verdict, Verdict::Pass | Verdict::NotPossible);
        self.cases.iter().all(fine) && self.count(Verdict::Pass) > 0
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.cases.iter().filter(|case| case.verdict == verdict).count()
    }

    /// A line with the numbers.
    pub fn sum(&self) -> String {
        let numbers: Vec<String> = VERDICTS
            .iter()
            .map(|(verdict, name, _)| format!("{} {name}", self.count(*verdict)))
            .collect();
        let attempts: usize = self.attempts();
        let colour = if self.is_green() { "green" } else { "RED" };
        format!(
            "{}: {colour}. {} cases ({}), {attempts} attempts",
            self.system,
            self.cases.len(),
            numbers.join(", ")
        )
    }

    fn attempts(&self) -> usize {
        let reports = self.cases.iter().flat_map(|case| &case.reports);
        reports.map(|report| report.attempts.len()).sum()
    }

    /// For people at a terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (judged, case) in self.with_cases() {
            let (name, _) = shown(judged.verdict);
            let root = if judged.as_root {
                " (as root in its network)"
            } else {
                ""
            };
            // Writing to a string cannot fail.
            writeln!(text, "{:<4} {name:<18} {}{root}", judged.id, case.tries).ok();
            for why in &judged.why {
                writeln!(text, "     {:<18} - {why}", "").ok();
            }
        }
        writeln!(text, "\n{}", self.sum()).ok();
        text
    }

    /// For programs: everything, also what each attempt felt.
    ///
    /// # Errors
    /// Never for a scorecard that was judged.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// For people with a browser: one page without anything from elsewhere.
    pub fn html(&self) -> String {
        let mut rows = String::new();
        for (judged, case) in self.with_cases() {
            let (name, colour) = shown(judged.verdict);
            let root = if judged.as_root {
                "<br><small>as root in its network</small>"
            } else {
                ""
            };
            let why: String = judged
                .why
                .iter()
                .map(|why| format!("<li>{}</li>", escape(why)))
                .collect();
            writeln!(
                rows,
                "<tr><td>{}</td><td style=\"background:{colour};color:#fff\">{name}{root}</td><td>{}<ul>{why}</ul></td>\
                 <td>{}</td><td>{}</td></tr>",
                judged.id,
                escape(case.tries),
                escape(case.must),
                escape(case.twin)
            )
            .ok();
        }
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
             <style>body{{font:14px sans-serif;margin:2em}}table{{border-collapse:collapse}}\
             td,th{{border:1px solid #d0d7de;padding:.4em;vertical-align:top;text-align:left}}ul{{margin:.2em 0}}</style>\
             <h1>{title}</h1><p>{sum}</p><table><tr><th>Case</th><th>Verdict</th><th>What it tries</th>\
             <th>What must happen</th><th>What must pass</th></tr>\n{rows}</table></html>\n",
            title = escape(&format!("Egress of {}", self.system)),
            sum = escape(&self.sum()),
        )
    }

    fn with_cases(&self) -> impl Iterator<Item = (&Judged, Case)> {
        self.cases
            .iter()
            .filter_map(|judged| Some((judged, Case::find(&judged.id)?)))
    }
}

fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut escaped, letter| {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
        escaped
    })
}
