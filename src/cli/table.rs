//! Columns for people. Pure.

use std::fmt;

/// Rows under a head; each column is as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table {
    head: Vec<&'static str>,
    /// Columns that hold figures stand at the right.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A head that ends in `>` is of a column of figures.
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

impl fmt::Display for Table {
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
            for (column, cell) in row.iter().enumerate().take(widths.len()) {
                let gap = if column == 0 { "" } else { "  " };
                let width = widths[column];
                line += &match self.right[column] {
                    true => format!("{gap}{cell:>width$}"),
                    false => format!("{gap}{cell:<width$}"),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// What others wrote, and that a terminal must not obey: a container's name is harmless, a registry's error may be not.
pub(super) fn printable(text: &str) -> String {
    let hidden = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(hidden).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Table::new(&["NAME", "ACTIVE>", "SERVICE"]);
        table.row(["app".into(), "7".into(), "redis\u{1b}[2J".into()]);
        table.row(["another".into(), "12345678".into(), String::new()]);
        let expected = "\
NAME       ACTIVE  SERVICE
app             7  redis\u{fffd}[2J
another  12345678
";
        assert_eq!(table.to_string(), expected);
    }
}
