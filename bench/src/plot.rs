//! Bars as SVG: the median, and a line from the lowest to the highest value.

use std::fmt::Write;

use crate::summary::Summary;

const WIDTH: f64 = 640.0;
const NAMES: f64 = 110.0;
const VALUES: f64 = 90.0;
const ROW: f64 = 26.0;
const HEAD: f64 = 36.0;

/// One bar for each contender. `emphasised` is drawn in colour.
pub(crate) fn bars(title: &str, unit: &str, rows: &[(&str, Summary)], emphasised: &str) -> String {
    let most = rows.iter().map(|(_, summary)| summary.most).fold(f64::MIN_POSITIVE, f64::max);
    let length = |value: f64| (value.max(0.0) / most * (WIDTH - NAMES - VALUES)).max(1.0);
    let height = HEAD + rows.len() as f64 * ROW + 8.0;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"22\" font-weight=\"bold\">{title} <tspan font-weight=\"normal\" fill=\"#555\">({unit})</tspan></text>"
    );
    for (n, (name, summary)) in rows.iter().enumerate() {
        let top = HEAD + n as f64 * ROW;
        let (text, middle) = (top + 15.0, top + 10.0);
        let fill = if *name == emphasised { "#1f77b4" } else { "#b8c4ce" };
        let (least, most) = (NAMES + length(summary.least), NAMES + length(summary.most));
        let _ = writeln!(
            out,
            "<text x=\"8\" y=\"{text}\">{name}</text>\n\
             <rect x=\"{NAMES}\" y=\"{top}\" width=\"{:.1}\" height=\"20\" fill=\"{fill}\"/>\n\
             <path d=\"M{least:.1} {middle}H{most:.1}\" stroke=\"#333\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{text}\">{}</text>",
            length(summary.median),
            most.max(NAMES + length(summary.median)) + 6.0,
            number(summary.median)
        );
    }
    out + "</svg>\n"
}

/// About three digits: the difference between rounds is larger.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => {
            let digits = format!("{value:.0}");
            let groups: Vec<_> =
                digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
            groups.join(",")
        }
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_or_so() {
        let written = [0.0, 1.234, 12.34, 123.4, 12_345.6, 1_234_567.0].map(number);
        assert_eq!(written, ["0.00", "1.23", "12.3", "123", "12,346", "1,234,567"]);
    }

    #[test]
    fn the_longest_bar_ends_where_the_values_begin() {
        let summary = |median| Summary { median, least: median, most: median };
        let svg = bars("t", "u", &[("a", summary(50.0)), ("b", summary(100.0))], "b");
        assert!(svg.contains("width=\"220.0\" height=\"20\" fill=\"#b8c4ce\""), "{svg}");
        assert!(svg.contains("width=\"440.0\" height=\"20\" fill=\"#1f77b4\""), "{svg}");
    }
}
