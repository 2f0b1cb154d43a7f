//! Text tables. Pure.

use std::fmt;

use crate::{counts::LONGEST, text::visible};

/// Rows under a head; each column is as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Columns {
    head: Vec<&'static str>,
    /// Columns with figures are aligned to the right.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Columns {
    /// A title that ends in `>` marks a column of figures.
    pub(super) fn new(head: &[&'static str]) -> Self {
        Self {
            head: head.iter().map(|cell| cell.trim_end_matches('>')).collect(),
            right: head.iter().map(|cell| cell.ends_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let widths = cells.map(|cell| cell.chars().count());
            widths.chain(self.head.get(column).map(|cell| cell.len())).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.head.len()).map(width).collect();
        let head = self.head.iter().map(ToString::to_string).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = String::new();
            for (column, (cell, (width, right))) in
                row.iter().zip(widths.iter().zip(&self.right)).enumerate()
            {
                let gap = if column == 0 { "" } else { "  " };
                line += &match right {
                    true => format!("{gap}{cell:>width$}"),
                    false => format!("{gap}{cell:<width$}"),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Text from outside, for example a registry's error, on one line and without characters that a terminal would interpret.
pub(super) fn printable(text: &str) -> String {
    visible(text).into_owned()
}

/// `1.2 kB`, as `docker stats` has it: powers of 1000.
pub(super) fn bytes(count: u64) -> String {
    let mut rest = count as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if rest < 1000.0 || unit == "TB" {
            return if unit == "B" { format!("{count} B") } else { format!("{rest:.1} {unit}") };
        }
        rest /= 1000.0;
    }
    format!("{count} B")
}

/// An age with useful precision: `<1 ms`, `850 ms`, `12 s`, `3 min`, `5 h`, `2 d`.
pub(super) fn age(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => "<1 ms".to_owned(),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// The connect time; above the histogram's highest bucket, `>` and that bucket's limit.
pub(super) fn connect(seconds: f64) -> String {
    if seconds < LONGEST { age(seconds) } else { format!(">{}", age(LONGEST)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Columns::new(&["NAME", "ACTIVE>", "SERVICE"]);
        table.row(["app".into(), "7".into(), "redis\u{1b}[2J".into()]);
        table.row(["another".into(), "12345678".into(), String::new()]);
        let expected = "\
NAME       ACTIVE  SERVICE
app             7  redis\\u{1b}[2J
another  12345678
";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn figures_are_short() {
        let sizes = [0, 999, 1000, 1_234_567, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "1.2 MB", "18446744.1 TB"]);
        let ages = [0.000_5, 0.25, 61.0, 600.0, 86_400.0, 864_000.0].map(age);
        assert_eq!(ages, ["<1 ms", "250 ms", "61 s", "10 min", "24 h", "10 d"]);
        assert_eq!([0.25, 4.9, 5.0].map(connect), ["250 ms", "5 s", ">5 s"]);
    }
}
