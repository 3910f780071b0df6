//! Pictures of an adapter.

/// The task-skill heat map as SVG: a row a task, a column a skill, a panel a split; `weights` is
/// `[tasks, n_splits, n_skills]`, each between 0 and 1.
pub fn heat_map_svg(tasks: &[String], n_splits: usize, n_skills: usize, weights: &[f64]) -> String {
    use std::fmt::Write;
    const CELL: usize = 22;
    const GAP: usize = 10;
    let longest = tasks.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let left = 16 + longest.min(60) * 7;
    let (top, panel) = (34, n_skills * CELL + GAP);
    let (width, height) = (left + n_splits * panel + 16, top + tasks.len() * CELL + 16);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    // Writing to a String cannot fail.
    for split in 0..n_splits {
        let x = left + split * panel;
        let title = if n_splits == 1 { "skills".into() } else { format!("split {split}") };
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"14\">{title}</text>");
        for skill in 0..n_skills {
            let x = x + skill * CELL + 7;
            let _ = writeln!(svg, "<text x=\"{x}\" y=\"29\" fill=\"#777\">{skill}</text>");
        }
    }
    for (task, name) in tasks.iter().enumerate() {
        let y = top + task * CELL;
        let name: String = name.chars().take(60).collect();
        let name = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">{name}</text>", y + 15);
        for column in 0..n_splits * n_skills {
            let weight = weights[task * n_splits * n_skills + column];
            let x = left + column / n_skills * panel + column % n_skills * CELL;
            // White to blue; the number is there for a pointer that hovers.
            let shade = |full: f64| (255.0 - weight.clamp(0.0, 1.0) * (255.0 - full)).round();
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"rgb({},{},{})\" stroke=\"#ddd\"><title>{name}: {weight:.3}</title></rect>",
                shade(8.0),
                shade(69.0),
                shade(148.0)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_every_weight_has_a_cell() {
        let tasks = ["a<b".to_owned(), "c".to_owned()];
        let svg = heat_map_svg(&tasks, 2, 3, &[0.5; 12]);
        assert_eq!(svg.matches("<title>").count(), 12);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
    }
}
