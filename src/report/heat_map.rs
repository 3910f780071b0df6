//! Heat maps as SVG: numbers in, a picture as text out, without a drawing library.
//!
//! ```text
//!            panel 0        panel 1
//!   row 0   [ ][#][ ]      [#][ ][ ]
//!   row 1   [#][ ][ ]      [ ][ ][#]
//!            a  b  c        a  b  c
//! ```
//!
//! The largest value of all panels is darkest, 0 is the background, so panels can be compared. Each
//! cell carries its number as a tooltip. The text stands alone: no script, no font, no link.

use std::fmt::Write as _;

/// A table of numbers to be seen.
#[derive(Clone, Debug)]
pub struct HeatMap<'a> {
    /// What is shown.
    pub title: &'a str,
    /// A sentence below the title, or nothing.
    pub note: &'a str,
    /// Names of the rows.
    pub row_names: &'a [String],
    /// Names of the columns, the same in every panel.
    pub column_names: &'a [String],
    /// Tables beside each other.
    pub panels: &'a [Panel],
}

/// One table of a [`HeatMap`].
#[derive(Clone, Debug)]
pub struct Panel {
    /// What stands above it, or nothing.
    pub name: String,
    /// `[rows, columns]`, row-major, 0 or more.
    pub values: Vec<f64>,
}

/// Sizes in pixels.
const CELL: usize = 26;
const GAP: usize = 22;
const MARGIN: usize = 16;
/// A letter of the font below, at most.
const LETTER: usize = 8;
/// Above the panels: title, note, panel names.
const HEAD: usize = 78;

/// The picture.
///
/// # Panics
/// If a panel has another number of values than rows times columns.
pub fn heat_map_svg(map: &HeatMap<'_>) -> String {
    let &HeatMap { title, note, row_names, column_names, panels } = map;
    let longest = |names: &[String]| names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    let left = MARGIN + LETTER * longest(row_names) + 8;
    let panel_width = CELL * column_names.len();
    let largest = panels.iter().flat_map(|p| &p.values).fold(0.0_f64, |a, &b| a.max(b));
    // Where all cells are near the largest all are dark: without the number that says nothing.
    let note = format!("{note}; white is 0, the darkest {largest:.3}");
    let text_width = LETTER * title.chars().count().max(note.chars().count());
    let width = (left + panels.len() * (panel_width + GAP)).max(MARGIN + text_width) + MARGIN;
    let bottom = HEAD + CELL * row_names.len();
    let height = bottom + 12 + LETTER * longest(column_names) + MARGIN;

    let mut svg = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = writeln!(svg, "{text}");
    };
    line(format_args!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="ui-monospace, monospace" font-size="12" fill="#222">"##
    ));
    line(format_args!(r##"<rect width="{width}" height="{height}" fill="#fff"/>"##));
    line(format_args!(r##"<text x="{MARGIN}" y="24" font-size="15">{}</text>"##, escape(title)));
    line(format_args!(r##"<text x="{MARGIN}" y="44" fill="#666">{}</text>"##, escape(&note)));
    for (row, name) in row_names.iter().enumerate() {
        let (x, y) = (left - 8, HEAD + CELL * row + CELL * 2 / 3);
        line(format_args!(r##"<text x="{x}" y="{y}" text-anchor="end">{}</text>"##, escape(name)));
    }
    for (i, panel) in panels.iter().enumerate() {
        assert_eq!(panel.values.len(), row_names.len() * column_names.len(), "{}", panel.name);
        let x0 = left + i * (panel_width + GAP);
        let y = HEAD - 10;
        line(format_args!(
            r##"<text x="{x0}" y="{y}" fill="#666">{}</text>"##,
            escape(&panel.name)
        ));
        for (j, column) in column_names.iter().enumerate() {
            let x = x0 + CELL * j + CELL * 2 / 3;
            let y = bottom + 8;
            line(format_args!(
                r##"<text transform="translate({x} {y}) rotate(-90)" text-anchor="end">{}</text>"##,
                escape(column)
            ));
            for (row, name) in row_names.iter().enumerate() {
                let value = panel.values[row * column_names.len() + j];
                let (x, y) = (x0 + CELL * j, HEAD + CELL * row);
                let size = CELL - 2;
                let share = if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 };
                let color = color(share);
                let (name, column) = (escape(name), escape(column));
                line(format_args!(
                    r##"<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{color}"><title>{name}, {column}: {value:.3}</title></rect>"##
                ));
            }
        }
    }
    line(format_args!("</svg>"));
    svg
}

/// From nearly white to dark blue, in a line.
fn color(share: f64) -> String {
    let between = |from: f64, to: f64| (from + (to - from) * share).round() as u8;
    format!(
        "#{:02x}{:02x}{:02x}",
        between(240.0, 12.0),
        between(244.0, 44.0),
        between(250.0, 110.0)
    )
}

/// Text as XML; characters that XML has no place for become U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'.. => escaped.push(c),
            _ => escaped.push('\u{fffd}'),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map<'a>(rows: &'a [String], columns: &'a [String], panels: &'a [Panel]) -> HeatMap<'a> {
        HeatMap { title: "a < b", note: "", row_names: rows, column_names: columns, panels }
    }

    #[test]
    fn every_cell_is_there_and_the_largest_is_darkest() {
        let (rows, columns) = (vec!["one".into(), "two".into()], vec!["s0".into(), "s1".into()]);
        let panels = [
            Panel { name: "split 0".into(), values: vec![0.0, 0.25, 0.5, 0.5] },
            Panel { name: "split 1".into(), values: vec![1.0, 0.0, 0.0, 0.0] },
        ];
        let svg = heat_map_svg(&map(&rows, &columns, &panels));
        assert_eq!(svg.matches("<title>").count(), 8);
        assert_eq!(svg.matches("#0c2c6e").count(), 1);
        assert!(svg.contains("<title>two, s1: 0.500</title>"));
        assert!(svg.contains("a &lt; b") && svg.contains("white is 0, the darkest 1.000"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn names_from_outside_stay_text() {
        let (rows, columns) = (vec!["</text><script>&\"'\u{1}".into()], vec!["]]>".into()]);
        let panels = [Panel { name: "<p>".into(), values: vec![0.0] }];
        let svg = heat_map_svg(&map(&rows, &columns, &panels));
        assert!(!svg.contains("<script>") && !svg.contains("<p>") && !svg.contains('\u{1}'));
        assert!(svg.contains("&lt;/text&gt;&lt;script&gt;&amp;&quot;&apos;\u{fffd}"));
        heat_map_svg(&map(&[], &[], &[])); // An adapter without anything to show is no reason to fail.
    }
}
