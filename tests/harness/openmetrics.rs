//! Reads OpenMetrics text strictly, as the specification (OpenMetrics 1.0, "ABNF" and "Overall Structure") wants
//! it written. What a scraper would forgive is an error here.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

/// A whole exposition.
#[derive(Debug, Clone, PartialEq)]
pub struct Exposition {
    /// By name, without suffixes.
    pub families: BTreeMap<String, Family>,
}

/// One metric family.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Family {
    /// `counter`, `gauge`, `histogram` or `info`.
    pub kind: String,
    /// What it says of itself.
    pub help: String,
    /// By name with suffix, and labels.
    pub samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
}

impl Exposition {
    /// Reads and checks one.
    ///
    /// # Errors
    /// Names the first line that is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let body = text
            .strip_suffix("# EOF\n")
            .context("the text does not end with `# EOF`")?;
        ensure!(!body.contains("# EOF"), "`# EOF` stands before the end");
        let mut families = BTreeMap::<String, Family>::new();
        let mut present: Option<(String, Family)> = None;
        for line in body.lines() {
            read(line, &mut present, &mut families).with_context(|| line.to_owned())?;
        }
        close(present, &mut families)?;
        for (name, family) in &families {
            family.check(name).with_context(|| name.clone())?;
        }
        Ok(Self { families })
    }

    /// The value of one series; 0 when nothing was counted under its labels yet.
    pub fn value(&self, sample: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: BTreeMap<String, String> = labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let key = (sample.to_owned(), labels);
        let mut found = self
            .families
            .values()
            .filter_map(|family| family.samples.get(&key));
        found.next().copied().unwrap_or(0.0)
    }

    /// Every label value there is.
    pub fn label_values(&self) -> BTreeSet<&str> {
        let samples = self.families.values().flat_map(|family| family.samples.keys());
        samples
            .flat_map(|(_, labels)| labels.values().map(String::as_str))
            .collect()
    }
}

fn read(
    line: &str,
    present: &mut Option<(String, Family)>,
    families: &mut BTreeMap<String, Family>,
) -> Result<()> {
    ensure!(!line.is_empty(), "an empty line");
    let Some(meta) = line.strip_prefix("# ") else {
        let (name, family) = present.as_mut().context("a sample before any family")?;
        let (sample, labels, value) = sample(line)?;
        ensure!(!family.kind.is_empty(), "a sample before `# TYPE`");
        ensure!(
            belongs(&family.kind, name, &sample),
            "a sample of another family than {name}"
        );
        let before = family.samples.insert((sample, labels), value);
        ensure!(before.is_none(), "the series is there twice");
        return Ok(());
    };
    let mut words = meta.splitn(3, ' ');
    let (Some(word), Some(name), rest) = (words.next(), words.next(), words.next().unwrap_or_default())
    else {
        bail!("a comment, which OpenMetrics does not have");
    };
    check_name(name)?;
    if present.as_ref().is_none_or(|(open, _)| open != name) {
        close(present.take(), families)?;
        ensure!(!families.contains_key(name), "the family is there twice");
        *present = Some((name.to_owned(), Family::default()));
    }
    let (_, family) = present.as_mut().context("just opened")?;
    ensure!(family.samples.is_empty(), "metadata after samples");
    match word {
        "HELP" => {
            ensure!(
                family.help.is_empty() && !rest.is_empty(),
                "HELP twice, or without text"
            );
            family.help = rest.to_owned();
        }
        "TYPE" => {
            ensure!(family.kind.is_empty(), "TYPE twice");
            ensure!(
                ["counter", "gauge", "histogram", "info"].contains(&rest),
                "an unknown type"
            );
            family.kind = rest.to_owned();
        }
        "UNIT" => ensure!(
            name.ends_with(&format!("_{rest}")),
            "the name does not end with the unit"
        ),
        other => bail!("`# {other}`"),
    }
    Ok(())
}

fn close(present: Option<(String, Family)>, families: &mut BTreeMap<String, Family>) -> Result<()> {
    let Some((name, family)) = present else {
        return Ok(());
    };
    ensure!(!family.kind.is_empty(), "{name} has no TYPE");
    ensure!(!family.help.is_empty(), "{name} has no HELP");
    families.insert(name, family);
    Ok(())
}

fn belongs(kind: &str, family: &str, sample: &str) -> bool {
    let suffixes: &[&str] = match kind {
        "counter" => &["_total", "_created"],
        "histogram" => &["_bucket", "_count", "_sum", "_created"],
        "info" => &["_info"],
        _ => &[""],
    };
    sample
        .strip_prefix(family)
        .is_some_and(|suffix| suffixes.contains(&suffix))
}

fn check_name(name: &str) -> Result<()> {
    let first = name.bytes().next().context("an empty name")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
    ensure!(
        !first.is_ascii_digit() && name.bytes().all(plain),
        "`{name}` is not a name"
    );
    Ok(())
}

fn sample(line: &str) -> Result<(String, BTreeMap<String, String>, f64)> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, rest) = line.split_at(end);
    check_name(name)?;
    let (labels, rest) = match rest.strip_prefix('{') {
        None => (BTreeMap::new(), rest),
        Some(rest) => labels(rest)?,
    };
    let value = rest.strip_prefix(' ').context("no space before the value")?;
    ensure!(!value.contains(' '), "a timestamp, which nothing of ours has");
    Ok((name.to_owned(), labels, number(value)?))
}

fn number(text: &str) -> Result<f64> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        _ => text.parse().with_context(|| format!("`{text}` is not a number")),
    }
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        let (name, after) = rest.split_once("=\"").context("a label without a quoted value")?;
        check_name(name)?;
        ensure!(!name.contains(':'), "`{name}` is not a label");
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next().context("a label that does not end")? {
                (at, '"') => break at + 1,
                (_, '\\') => match characters.next().context("a label that does not end")?.1 {
                    'n' => value.push('\n'),
                    escaped @ ('"' | '\\') => value.push(escaped),
                    other => bail!("`\\{other}` is no escape"),
                },
                (_, other) => value.push(other),
            }
        };
        ensure!(
            labels.insert(name.to_owned(), value).is_none(),
            "the label `{name}` is there twice"
        );
        rest = &after[end..];
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None => ensure!(rest.starts_with('}'), "something between labels"),
        }
    }
}

impl Family {
    fn check(&self, name: &str) -> Result<()> {
        match self.kind.as_str() {
            "counter" => {
                for value in self.samples.values() {
                    ensure!(*value >= 0.0, "a counter below zero");
                }
            }
            "info" => {
                for value in self.samples.values() {
                    ensure!((*value - 1.0).abs() < f64::EPSILON, "an info that is not 1");
                }
            }
            "histogram" => self.check_histogram(name)?,
            _ => {}
        }
        Ok(())
    }

    fn check_histogram(&self, name: &str) -> Result<()> {
        let mut series = BTreeMap::<BTreeMap<String, String>, Vec<(f64, f64)>>::new();
        for ((sample, labels), value) in &self.samples {
            if *sample == format!("{name}_bucket") {
                let mut labels = labels.clone();
                let bound = labels.remove("le").context("a bucket without `le`")?;
                series.entry(labels).or_default().push((number(&bound)?, *value));
            }
        }
        let count = format!("{name}_count");
        let counts = self.samples.keys().filter(|(sample, _)| *sample == count);
        ensure!(counts.count() == series.len(), "not one count for each series");
        for (labels, mut buckets) in series {
            buckets.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            ensure!(
                buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1),
                "buckets that do not add up: {buckets:?}"
            );
            let (bound, last) = buckets.last().copied().context("no bucket")?;
            ensure!(bound.is_infinite(), "no bucket `+Inf`");
            let total = self
                .samples
                .get(&(count.clone(), labels.clone()))
                .context("no count")?;
            ensure!((last - total).abs() < f64::EPSILON, "`+Inf` is not the count");
            ensure!(
                self.samples.contains_key(&(format!("{name}_sum"), labels)),
                "no sum"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a Things.\n# TYPE a counter\na_total{x=\"1 \\\"2\\\"\",y=\"\"} 3\na_total{x=\"b\",y=\"\"} 0\n\
        # HELP b_seconds Times.\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\nb_seconds_sum 1.5\n\
        b_seconds_count 2\nb_seconds_bucket{le=\"1.0\"} 1\nb_seconds_bucket{le=\"+Inf\"} 2\n# EOF\n";

    #[test]
    fn what_is_right_is_read() {
        let read = Exposition::parse(GOOD).expect("right");
        assert_eq!(read.families.len(), 2);
        assert!((read.value("a_total", &[("x", "1 \"2\""), ("y", "")]) - 3.0).abs() < f64::EPSILON);
        assert!(read.label_values().contains("b"));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for (from, to) in [
            ("# EOF\n", ""),
            ("# EOF\n", "# EOF\n# EOF\n"),
            ("# EOF\n", "\n# EOF\n"),
            ("# TYPE a counter\n", ""),
            ("# HELP a Things.\n", ""),
            ("# TYPE a counter", "# TYPE a thing"),
            ("# TYPE a counter", "# TYPE a gauge"),
            ("a_total{x=\"b\"", "c_total{x=\"b\""),
            ("a_total{x=\"b\",y=\"\"} 0", "a_total{x=\"1 \\\"2\\\"\",y=\"\"} 0"),
            ("x=\"b\",y=", "x=\"b\",x="),
            ("x=\"b\",y=\"\"} 0", "x=\"b\",y=\"\"} -1"),
            ("x=\"b\",y=\"\"} 0", "x=\"b\",y=\"\"} nothing"),
            ("# UNIT b_seconds seconds", "# UNIT b_seconds metres"),
            ("b_seconds_sum 1.5\n", ""),
            ("b_seconds_count 2", "b_seconds_count 3"),
            ("le=\"1.0\"} 1", "le=\"1.0\"} 5"),
            ("b_seconds_bucket{le=\"+Inf\"} 2\n", ""),
        ] {
            let wrong = GOOD.replacen(from, to, 1);
            assert_ne!(wrong, GOOD, "{from}");
            assert!(Exposition::parse(&wrong).is_err(), "{from} -> {to}");
        }
    }
}
