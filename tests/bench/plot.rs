//! The figures as bars, one panel a table: the bar ends at the median, the line through it spans the rounds,
//! and of latencies a tick shows the 99th percentile. Pure.

use std::fmt::Write as _;

use crate::{
    report::figure,
    result::{Kind, Outcome, Table, percentile},
};

const WIDTH: f64 = 900.0;
/// Where bars begin.
const LEFT: f64 = 300.0;
/// Length of the longest bar.
const LONGEST: f64 = 470.0;
const BAR: f64 = 14.0;
const STEP: f64 = 20.0;
/// Above the first bar of a panel.
const HEAD: f64 = 40.0;

/// An SVG document of all tables.
pub(crate) fn draw(outcomes: &[Outcome]) -> String {
    let tables: Vec<&Table> = outcomes.iter().flat_map(|outcome| &outcome.tables).collect();
    let height: f64 = 20.0 + tables.iter().map(|table| panel_height(table)).sum::<f64>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let mut top = 10.0;
    for table in tables {
        panel(&mut svg, table, top).expect("writing to a string");
        top += panel_height(table);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel_height(table: &Table) -> f64 {
    let rows = u16::try_from(table.rows.len()).unwrap_or(u16::MAX);
    HEAD + f64::from(rows) * STEP
}

fn panel(svg: &mut String, table: &Table, top: f64) -> std::fmt::Result {
    let better = match table.kind {
        Kind::Rate => "more is better",
        Kind::Cost | Kind::Latency => "less is better",
    };
    writeln!(
        svg,
        "<text x=\"10\" y=\"{:.0}\" font-weight=\"bold\">{} ({}; {better})</text>",
        top + 24.0,
        escaped(&table.title),
        escaped(&table.unit)
    )?;
    let furthest = |row: &crate::result::Row| match table.kind {
        Kind::Rate | Kind::Cost => row.spread().most,
        Kind::Latency => percentile(&row.all(), 99).max(row.spread().most),
    };
    let scale = LONGEST / table.rows.iter().map(furthest).fold(f64::MIN_POSITIVE, f64::max);
    for (index, row) in (0_u16..).zip(&table.rows) {
        let (spread, y) = (row.spread(), top + HEAD + f64::from(index) * STEP - 4.0);
        let middle = y + BAR / 2.0;
        let colour = if row.peer.is_some() { "#2f6db5" } else { "#9aa5b1" };
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <line x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\" stroke=\"#111\"/>",
            LEFT - 8.0,
            y + 11.0,
            escaped(&row.name),
            spread.median * scale,
            LEFT + spread.least * scale,
            LEFT + spread.most * scale,
        )?;
        let mut label = figure(spread.median);
        if table.kind == Kind::Latency {
            let high = percentile(&row.all(), 99);
            let x = LEFT + high * scale;
            writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#b5402f\" stroke-width=\"2\"/>",
                y + BAR
            )?;
            write!(label, ", p99 {}", figure(high))?;
        }
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
            LEFT + furthest(row) * scale + 8.0,
            y + 11.0
        )?;
    }
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
