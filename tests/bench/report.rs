//! RESULTS.md: the tables between its marks are ours, every other line is its authors'.
//!
//! ```text
//! <!-- figures: splice -->
//! ...replaced by each run of `splice`...
//! <!-- end -->
//! ```

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use crate::result::{Kind, Outcome, Row, Spread, Table, percentile};

const END: &str = "<!-- end -->";

/// Puts `text` between the marks of `name`.
pub(crate) fn replace(document: &str, name: &str, text: &str) -> Result<String> {
    let mark = format!("<!-- figures: {name} -->");
    let begin = document
        .find(&mark)
        .with_context(|| format!("RESULTS.md has no line `{mark}`"))?
        + mark.len();
    let length = document[begin..]
        .find(END)
        .with_context(|| format!("`{mark}` has no `{END}`"))?;
    Ok(format!(
        "{}\n{}\n{}",
        &document[..begin],
        text.trim_end(),
        &document[begin + length..]
    ))
}

/// A benchmark's tables.
pub(crate) fn tables(outcome: &Outcome) -> String {
    let mut text = format!("_{}_\n", outcome.run);
    for table in &outcome.tables {
        write!(text, "\n**{}**\n\n", table.title).expect("writing to a string");
        text.push_str(&rows(table));
    }
    text
}

fn rows(table: &Table) -> String {
    let compared = table.rows.iter().any(|row| row.peer.is_some());
    let latency = table.kind == Kind::Latency;
    let mut heads = vec!["".to_owned()];
    heads.push(format!(
        "{}{} (min..max of rounds)",
        if latency { "p50, " } else { "" },
        table.unit
    ));
    if latency {
        heads.extend(["p99".to_owned(), "most".to_owned(), "n".to_owned()]);
    }
    if compared {
        heads.push("ratio (min..max of rounds)".to_owned());
    }
    let mut lines = vec![line(&heads), format!("|---{}|", "|--:".repeat(heads.len() - 1))];
    for row in &table.rows {
        let mut cells = vec![row.name.clone(), spread(&row.spread())];
        if latency {
            let all = row.all();
            cells.extend([
                figure(percentile(&all, 99)),
                figure(percentile(&all, 100)),
                all.len().to_string(),
            ]);
        }
        if compared {
            cells.push(ratio(table, row));
        }
        lines.push(line(&cells));
    }
    lines.join("\n") + "\n"
}

fn line(cells: &[String]) -> String {
    format!("| {} |", cells.join(" | "))
}

fn ratio(table: &Table, row: &Row) -> String {
    let (Some(ratio), Some(peer)) = (table.ratio(row), &row.peer) else {
        return String::new();
    };
    let equal = if ratio.is_equal() { "equal: " } else { "" };
    format!(
        "{equal}{:.2} ({:.2}..{:.2}) of {peer}",
        ratio.median, ratio.least, ratio.most
    )
}

fn spread(spread: &Spread) -> String {
    format!(
        "{} ({}..{})",
        figure(spread.median),
        figure(spread.least),
        figure(spread.most)
    )
}

/// Three digits that mean something.
pub(crate) fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}
