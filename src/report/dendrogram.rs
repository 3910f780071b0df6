//! Trees of tasks as SVG: similarities in, a picture as text out.

use std::fmt::Write as _;

use super::heat_map::escape;

/// Above the tree.
const TOP: f64 = 34.0;

/// Tasks joined by how much of their skills they share, `[n_tasks, n_tasks]`: average linkage over
/// 1 - agreement. Nothing for fewer than two.
pub fn dendrogram_svg(agreement: &[f64], names: &[String]) -> String {
    let n = names.len();
    if n < 2 {
        return String::new();
    }
    // A cluster: its leaves in order, where it is drawn (row), and the height of its join.
    let mut clusters: Vec<(Vec<usize>, f64)> = (0..n).map(|i| (vec![i], 0.0)).collect();
    let mut joins = Vec::new();
    while clusters.len() > 1 {
        let mut best = (f64::INFINITY, 0, 1);
        for i in 0..clusters.len() {
            for j in i + 1..clusters.len() {
                let (a, b) = (&clusters[i].0, &clusters[j].0);
                let sum: f64 = a
                    .iter()
                    .flat_map(|&x| b.iter().map(move |&y| 1.0 - agreement[x * n + y]))
                    .sum();
                let distance = sum / (a.len() * b.len()) as f64;
                if distance < best.0 {
                    best = (distance, i, j);
                }
            }
        }
        let (distance, i, j) = best;
        let (right, left) = (clusters.remove(j), clusters.remove(i));
        joins.push((left.clone(), right.clone(), distance));
        clusters.push(([left.0, right.0].concat(), distance));
    }
    let order = &clusters[0].0;
    let mut row_of = vec![0.0; n];
    order.iter().enumerate().for_each(|(row, &leaf)| row_of[leaf] = row as f64);
    let (row_height, labels) =
        (20.0, 9.0 * names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64);
    let (height, tree) = (TOP + row_height * n as f64 + 10.0, 420.0);
    let width = tree + labels + 40.0;
    let highest = joins.iter().map(|join| join.2).fold(1e-9, f64::max);
    let x_at = |distance: f64| 10.0 + tree * (1.0 - distance / highest);
    let y_at = |leaves: &[usize]| {
        TOP + row_height
            * (leaves.iter().map(|&leaf| row_of[leaf]).sum::<f64>() / leaves.len() as f64 + 0.5)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"system-ui,sans-serif\" font-size=\"12\" fill=\"#222\">\n<text x=\"0\" y=\"14\" font-size=\"14\">Tasks by the skills that they share (average linkage)</text>\n"
    );
    for (left, right, distance) in &joins {
        let (x, a, b) = (x_at(*distance), y_at(&left.0), y_at(&right.0));
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1},{a:.1}H{x:.1}V{b:.1}H{:.1}\" fill=\"none\" stroke=\"#1f5fae\"/>",
            x_at(left.1),
            x_at(right.1)
        );
    }
    for (name, row) in names.iter().zip(&row_of) {
        let y = TOP + row_height * (row + 0.5) + 4.0;
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{y:.1}\">{}</text>", tree + 18.0, escape(name));
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_tasks_are_joined_first() {
        let agreement = [1.0, 0.1, 0.9, 0.1, 1.0, 0.2, 0.9, 0.2, 1.0];
        let names = ["a", "b", "c"].map(str::to_owned);
        let svg = dendrogram_svg(&agreement, &names);
        let at = |name: &str| svg.find(&format!(">{name}</text>")).unwrap();
        let row = |name: &str| {
            svg[..at(name)]
                .rsplit("y=\"")
                .next()
                .unwrap()
                .trim_end_matches('"')
                .parse::<f64>()
                .unwrap()
        };
        assert!(
            (row("a") - row("c")).abs()
                < (row("a") - row("b")).abs().max((row("c") - row("b")).abs())
        );
        assert_eq!(svg.matches("<path").count(), 2);
        assert!(dendrogram_svg(&[1.0], &names[..1]).is_empty());
    }
}
