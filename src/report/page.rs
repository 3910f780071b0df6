//! The report of a run: one HTML page that needs nothing beside itself.
//!
//! ```text
//! log.jsonl      ┐     loss, evaluation, learning rates, gradient norm, throughput, memory
//! config.json    ┼──>  settings and versions
//! adapter        ┘     heat maps of the routing, dendrogram of the tasks, sharpness of the routers
//! ```
//!
//! No script, no font, no link: pictures are SVG inside the page, and what is shown of names and
//! settings is text, whatever is in it.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::{
    dendrogram::dendrogram_svg,
    heat_map::escape,
    routing::{Modules, Sharpness, agreement, agreement_svg, mixing_weights_svg, sharpness},
};
use crate::formats::poly_config::PolyConfig;

/// What a report is made of.
pub struct Run<'a> {
    /// The title.
    pub name: &'a str,
    /// The lines of `log.jsonl`.
    pub log: &'a [Value],
    /// `config.json`.
    pub settings: &'a Map<String, Value>,
    /// The adapter's configuration and tensors.
    pub adapter: (&'a PolyConfig, &'a Modules),
    /// The names of its tasks.
    pub task_names: &'a [String],
}

/// The most tasks whose names fit a picture.
const MAX_TASKS: usize = 64;

/// The page.
pub fn html(run: &Run<'_>) -> String {
    let mut page = String::new();
    let mut add = |text: &str| {
        page.push_str(text);
        page.push('\n');
    };
    let name = escape(run.name);
    add(&format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title>\n<style>{STYLE}</style></head><body>\n<h1>{name}</h1>"
    ));
    add(&summary(run));
    add("<h2>Training</h2>");
    let of = |key: &str| series(run.log, key);
    add(&chart(
        "Loss, nats a label token",
        &[("training", of("loss")), ("evaluation", of("eval_loss"))],
        false,
    ));
    let scores = [("exact match", of("eval_exact_match")), ("Rouge-L", of("eval_rouge_l"))];
    if scores.iter().any(|(_, points)| !points.is_empty()) {
        add(&chart("Scores of the evaluation rows", &scores, false));
    }
    let by_task = by_task(run.log, "eval_task_loss");
    if !by_task.is_empty() && by_task.len() <= MAX_TASKS {
        let lines: Vec<(&str, Vec<(f64, f64)>)> =
            by_task.iter().map(|(name, points)| (name.as_str(), points.clone())).collect();
        add(&chart("Evaluation loss of each task", &lines, false));
    }
    add(&chart("Learning rates", &[("skills", of("lr")), ("router", of("router_lr"))], true));
    add(&chart("Gradient norm, before clipping", &[("all parameters", of("grad_norm"))], true));
    add(&chart("Tokens a second", &[("training", of("tokens_per_s"))], false));
    add(&chart("Peak resident memory, MiB", &[("this process", of("rss_mib"))], false));
    let sharp = |key: &str| of(&format!("router_{key}"));
    let over_time = [
        ("discreteness, bits", sharp("discreteness")),
        ("sparsity", sharp("sparsity")),
        ("usage", sharp("usage")),
    ];
    if over_time.iter().any(|(_, points)| points.len() > 1) {
        add(&chart("Routers over time", &over_time, false));
    }

    let (config, modules) = run.adapter;
    add("<h2>Routing</h2>");
    let Sharpness { discreteness, sparsity, usage } = sharpness(config, modules.values());
    add(&format!(
        "<p>Mean Bernoulli entropy {discreteness:.3} bits (0: each skill is on or off, 1: undecided); {:.1} % of the skills are on; usage {usage:.3} (1: all skills are used alike).</p>",
        100.0 * sparsity
    ));
    if config.n_tasks <= MAX_TASKS {
        add(&mixing_weights_svg(config, modules, run.task_names));
        add(&agreement_svg(config, modules, run.task_names));
        add(&dendrogram_svg(&agreement(config, modules), run.task_names));
    } else {
        add(&format!("<p>{} tasks are too many for a picture.</p>", config.n_tasks));
    }

    add("<h2>Settings</h2>\n<table>");
    for (key, value) in run.settings {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        add(&format!("<tr><th>{}</th><td>{}</td></tr>", escape(key), escape(&value)));
    }
    add("</table>\n</body></html>");
    page
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}\
svg{max-width:100%;height:auto;display:block;margin:1rem 0}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}\
table{border-collapse:collapse;font-size:13px}th,td{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top;word-break:break-word}\
th{font-weight:600;white-space:nowrap}";

/// So many of something.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn summary(run: &Run<'_>) -> String {
    let (config, modules) = run.adapter;
    let last = |key: &str| series(run.log, key).last().copied();
    let mut text = format!(
        "<p>{}, {} of rank {}, {}, {}.",
        count(config.n_tasks, "task"),
        count(config.n_skills, "skill"),
        config.r,
        count(config.n_splits, "split"),
        count(modules.len(), "adapted linear"),
    );
    if let Some((step, loss)) = last("loss") {
        let _ = write!(text, " {step} steps, training loss {loss:.4}.");
    }
    if let Some((step, loss)) = last("eval_loss") {
        let _ = write!(text, " Evaluation loss {loss:.4} at step {step}.");
    }
    text + "</p>"
}

/// (step, value) of the lines that have the key.
fn series(log: &[Value], key: &str) -> Vec<(f64, f64)> {
    log.iter().filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?))).collect()
}

/// (step, value) of each name in the objects under a key.
fn by_task(log: &[Value], key: &str) -> std::collections::BTreeMap<String, Vec<(f64, f64)>> {
    let mut found = std::collections::BTreeMap::<_, Vec<_>>::new();
    for line in log {
        let (Some(step), Some(tasks)) = (line["step"].as_f64(), line[key].as_object()) else {
            continue;
        };
        for (name, value) in tasks {
            if let Some(value) = value.as_f64() {
                found.entry(name.clone()).or_default().push((step, value));
            }
        }
    }
    found
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 26.0;
const COLOURS: [&str; 8] =
    ["#1f5fae", "#c8502b", "#3a8f4d", "#8a4fa3", "#b58a1b", "#1c8c8c", "#7a5b46", "#666666"];
/// More points than this do not show.
const MAX_POINTS: usize = 900;

/// A line chart of one or more series; those of few points have dots.
fn chart(title: &str, lines: &[(&str, Vec<(f64, f64)>)], log_scale: bool) -> String {
    let scale = |y: f64| if log_scale { y.log10() } else { y };
    let is_shown = |&&(_, y): &&(f64, f64)| y.is_finite() && (!log_scale || y > 0.0);
    let points: Vec<(f64, f64)> = lines
        .iter()
        .flat_map(|(_, points)| points.iter().filter(is_shown).map(|&(x, y)| (x, scale(y))))
        .collect();
    if points.is_empty() {
        return String::new();
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if high > low { (low, high) } else { (low - 0.5, high + 0.5) }
    };
    let (x0, x1) = range(&mut points.iter().map(|p| p.0));
    let (y0, y1) = range(&mut points.iter().map(|p| p.1));
    let x_at = |x: f64| LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 12.0);
    let y_at = |y: f64| HEIGHT - BOTTOM - (scale(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"system-ui,sans-serif\" font-size=\"12\" fill=\"#222\">\n<text x=\"0\" y=\"14\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    for i in 0..=4 {
        let share = f64::from(i) / 4.0;
        let value = y0 + share * (y1 - y0);
        let shown = if log_scale { 10_f64.powf(value) } else { value };
        let y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
        let step = x0 + share * (x1 - x0);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{WIDTH}\" y2=\"{y:.1}\" stroke=\"#e4e4e4\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#666\">{}</text><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{step:.0}</text>",
            LEFT - 6.0,
            y + 4.0,
            number(shown),
            x_at(step).min(WIDTH - 16.0),
            HEIGHT - 8.0,
        );
    }
    let mut legend_at = LEFT + 280.0;
    for (i, (name, points)) in lines.iter().enumerate() {
        let shown: Vec<_> = points.iter().filter(is_shown).collect();
        if shown.is_empty() {
            continue;
        }
        let colour = COLOURS[i % COLOURS.len()];
        let every = shown.len().div_ceil(MAX_POINTS);
        // The last point always shows.
        let drawn = shown.iter().rev().step_by(every).rev();
        let path: String =
            drawn.clone().map(|&&(x, y)| format!("{:.1},{:.1} ", x_at(x), y_at(y))).collect();
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.4\" points=\"{path}\"/>"
        );
        if shown.len() <= 60 {
            for &&(x, y) in drawn {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.4\" fill=\"{colour}\"><title>{}, step {x}: {y}</title></circle>",
                    x_at(x),
                    y_at(y),
                    escape(name)
                );
            }
        }
        if lines.len() <= 6 {
            let _ = writeln!(
                svg,
                "<rect x=\"{legend_at}\" y=\"5\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"14\">{}</text>",
                legend_at + 14.0,
                escape(name)
            );
            legend_at += 30.0 + 7.0 * name.chars().count() as f64;
        }
    }
    svg + "</svg>"
}

/// Four digits, short.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if !(1e-3..1e5).contains(&v) => format!("{value:.1e}"),
        v if v >= 100.0 => format!("{value:.0}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::formats::adapter::{AdapterModule, Bank};

    #[test]
    fn the_page_shows_everything_and_runs_nothing() {
        let config = PolyConfig { n_tasks: 3, n_skills: 2, ..PolyConfig::default() };
        let bank = || Bank { shape: [1, 2, 1, 1], values: vec![0.0; 2] };
        let module = AdapterModule {
            lora_a: bank(),
            lora_b: bank(),
            router_logits: vec![9.0, -9.0, 8.0, -9.0, -9.0, 9.0],
        };
        let modules = BTreeMap::from([("a".to_owned(), module)]);
        let log: Vec<Value> = (1..=3)
            .map(|step| {
                json!({"step": step, "loss": 1.0 / f64::from(step), "lr": 0.1, "eval_loss": 2.0,
                "eval_task_loss": {"<b>": 1.0}, "grad_norm": 1.0})
            })
            .collect();
        let settings = json!({"model": "<script>alert(1)</script>", "seed": 3});
        let names = ["one".to_owned(), "two & two".to_owned(), "</svg>".to_owned()];
        let run = Run {
            name: "runs/<i>",
            log: &log,
            settings: settings.as_object().unwrap(),
            adapter: (&config, &modules),
            task_names: &names,
        };
        let page = html(&run);
        assert!(!page.contains("<script") && !page.contains("<i>") && !page.contains("<b>"));
        assert!(
            !page.contains("http://")
                || page.matches("http://").count()
                    == page.matches("http://www.w3.org/2000/svg").count()
        );
        for text in [
            "Loss, nats",
            "Learning rates",
            "Evaluation loss of each task",
            "average linkage",
            "&lt;script&gt;",
            "two &amp; two",
        ] {
            assert!(page.contains(text), "{text}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(!page.contains("NaN") && !page.contains("inf"), "every coordinate is a number");
        // Tasks 0 and 1 share their skill and are joined first, at distance 0.
        let empty = Run { log: &[], ..run };
        assert!(html(&empty).contains("<h2>Routing</h2>"));
    }
}
