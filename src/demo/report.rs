//! What the demo found, as a table.

use std::{fmt, path::PathBuf};

use super::methods::Method;
use crate::train::adapt::Tune;

/// What the demo found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DemoReport {
    /// The base without an adapter, on the trained tasks' test rows.
    pub base: Score,
    /// A row of the table each.
    pub methods: Vec<MethodReport>,
    /// The tasks that were trained on.
    pub trained_on: Vec<String>,
    /// The tasks that were adapted to.
    pub held_out: Vec<String>,
    /// Optimiser steps of training, the same for every method.
    pub n_steps: u64,
    /// Rows of a held-out task to adapt from.
    pub n_shots: usize,
    /// Time in all.
    pub seconds: f64,
    /// Where everything lies.
    pub output_dir: PathBuf,
}

/// What one method reached.
#[derive(Clone, Debug, serde::Serialize)]
pub struct MethodReport {
    /// Which.
    pub method: Method,
    /// Parameters that training changed.
    pub n_params: usize,
    /// Time of the training.
    pub train_seconds: f64,
    /// Test rows of the tasks that were trained on.
    pub trained_on: Score,
    /// After adaptation, for each way to adapt.
    pub adaptations: Vec<AdaptationScore>,
}

/// What adaptation reached.
#[derive(Clone, Debug, serde::Serialize)]
pub struct AdaptationScore {
    /// What learned.
    pub tune: Tune,
    /// Test rows of each held-out task.
    pub scores: Vec<Score>,
    /// Time of all its adaptations.
    pub seconds: f64,
}

/// Loss and exact match on some rows.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Score {
    /// Mean nll of a label token, in nats.
    pub loss: f64,
    /// Share of rows whose greedy output is the target.
    pub exact_match: f64,
}

impl MethodReport {
    /// Means over the held-out tasks after this way of adapting, where the method has it.
    pub fn held_out(&self, tune: Tune) -> Option<Score> {
        let AdaptationScore { scores, .. } = self.adaptations.iter().find(|a| a.tune == tune)?;
        let mean =
            |of: fn(&Score) -> f64| scores.iter().map(of).sum::<f64>() / scores.len().max(1) as f64;
        Some(Score { loss: mean(|s| s.loss), exact_match: mean(|s| s.exact_match) })
    }
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_steps, n_shots, .. } = self;
        writeln!(
            f,
            "{:30}{:^20}{:^38}",
            "",
            "trained tasks",
            format!("new tasks, {n_shots} rows each")
        )?;
        writeln!(f, "{:30}{:^20}{:^20}{:^18}", "", "", "tune all", "tune router")?;
        let head = ["loss", "exact"];
        write!(f, "{:9}{:>12}{:>9}", "method", "parameters", "time")?;
        for _ in 0..3 {
            write!(f, "{:>10}{:>9}", head[0], head[1])?;
        }
        writeln!(f)?;
        writeln!(f, "{:9}{:>12}{:>9}{}", "none", 0, "", cells(Some(self.base)))?;
        for method in &self.methods {
            writeln!(
                f,
                "{:9}{:>12}{:>7.1} s{}{}{}",
                method.method.name(),
                method.n_params,
                method.train_seconds,
                cells(Some(method.trained_on)),
                cells(method.held_out(Tune::All)),
                cells(method.held_out(Tune::Router)),
            )?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{} tasks, {n_steps} steps for every method: {}",
            self.trained_on.len(),
            self.trained_on.join(", ")
        )?;
        writeln!(f, "new tasks, of skills that were never together: {}", self.held_out.join(", "))?;
        write!(
            f,
            "{:.0} s in all; base, rows, adapters and heat maps are in {}",
            self.seconds,
            self.output_dir.display()
        )
    }
}

fn cells(score: Option<Score>) -> String {
    score.map_or_else(
        || format!("{:>10}{:>9}", "-", "-"),
        |Score { loss, exact_match }| format!("{loss:>10.3}{:>7.1} %", 100.0 * exact_match),
    )
}
