//! Few-shot adaptation: a trained adapter meets a new task.
//!
//! | tune | paper | new routing row | learns |
//! |---|---|---|---|
//! | router | Poly-z, MHR-z | fresh, uniform in ±0.001 | that row |
//! | all | Poly, MHR | fresh, uniform in ±0.001 | that row, A and B |
//! | average | Poly-μ, MHR-μ | zero: the uniform mixture | A and B |
//!
//! The new task is one more row of every router, behind the others, which never change; with
//! `router` nothing that the other tasks use does. [`Kept`] is the proof of it, from the files.

use std::collections::BTreeMap;

use serde::Serialize;

use super::trainer::{RouterRows, Trainable};
use crate::{
    error::{Error, Result},
    formats::{adapter::AdapterModule, fingerprint::Fingerprint, json::excerpt, tasks::TaskNames},
    kernels::{
        Backend,
        philox::{Key, Purpose},
    },
    model::{Adapter, Model},
    weighting::Weighting,
};

/// What learns when a trained adapter meets a new task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tune {
    /// Skills and the new routing row.
    All,
    /// The new routing row alone.
    Router,
    /// The skills, under a uniform mixture.
    Average,
}

impl Tune {
    /// What learns when `task` is the new one.
    pub fn trainable(self, task: u32) -> Trainable {
        let router = match self {
            Self::All | Self::Router => RouterRows::Only(vec![task]),
            Self::Average => RouterRows::None,
        };
        Trainable { bank: self != Self::Router, router }
    }
}

/// The adapter with a routing row for a new task, the last one. `name` is its name, if tasks have
/// names.
///
/// # Errors
/// If there is a task of that name, there can be no more tasks, or no logits are the uniform mixture.
pub fn add_task<B: Backend>(
    base: &Model<B>,
    adapter: &Adapter<B>,
    name: Option<&str>,
    tune: Tune,
    seed: u64,
) -> Result<Adapter<B>> {
    let n_tasks = adapter.config().n_tasks;
    if tune == Tune::Average && adapter.config().weighting != Weighting::default() {
        return Err(Error::Usage(
            "the average needs a normalised routing; this adapter's has straight-through rounding or the average correction: tune the router or all"
                .into(),
        ));
    }
    let key = Key::new(seed, Purpose::Init, n_tasks as u64);
    let width = adapter.config().n_splits * adapter.config().n_skills;
    let mut more = adapter.with_one_more_task(base, |router, column| match tune {
        Tune::Average => 0.0,
        _ => (2.0 * f64::from(key.uniform((router * width + column) as u64)) - 1.0) * 1e-3,
    })?;
    if let Some(name) = name {
        let known = adapter.task_names();
        if let Some(id) = known.id(name) {
            return Err(Error::Usage(format!(
                "the adapter has a task {} already, with id {id}: give the new one another name",
                excerpt(name)
            )));
        }
        let mut names = known.filled(n_tasks);
        names.push(name.to_owned());
        more.set_tasks(Some(TaskNames::from_list(&names).map_err(Error::Config)?));
    }
    Ok(more)
}

/// Whether numbers are the same, bit by bit, in two adapter folders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// How many numbers were compared.
    pub n_values: usize,
    /// How many differ in a bit.
    pub n_changed: usize,
    /// The fingerprint of those before.
    pub before: String,
    /// The fingerprint of those after.
    pub after: String,
}

impl Kept {
    /// Fails where one of the numbers changed that were to stay.
    ///
    /// # Errors
    /// Says what changed.
    pub fn check(&self, what: &str) -> Result<()> {
        match self.n_changed {
            0 => Ok(()),
            n => Err(Error::NotFinite(format!(
                "{what} were to stay as they are, but {n} of {} numbers changed: this is a defect of polytape",
                self.n_values
            ))),
        }
    }

    /// In a line: whether they are the same, and their fingerprints.
    pub fn line(&self, what: &str) -> String {
        let Self { n_values, n_changed, before, after } = self;
        match n_changed {
            0 => format!("bit-identical: {what}, {n_values} numbers, fingerprint {after}"),
            n => format!(
                "trained: {what}, {n} of {n_values} numbers changed, fingerprint {before} -> {after}"
            ),
        }
    }
}

#[derive(Default)]
struct Comparison {
    n_values: usize,
    n_changed: usize,
    prints: [Fingerprint; 2],
}

impl Comparison {
    fn add(&mut self, before: &[f32], after: &[f32]) {
        self.n_values += before.len();
        self.n_changed +=
            before.iter().zip(after).filter(|(a, b)| a.to_bits() != b.to_bits()).count()
                + before.len().abs_diff(after.len());
        self.prints[0].add_values(before);
        self.prints[1].add_values(after);
    }

    fn finish(self) -> Kept {
        let [before, after] = self.prints.map(|print| print.to_string());
        Kept { n_values: self.n_values, n_changed: self.n_changed, before, after }
    }
}

/// What a run kept of an adapter, by its linears: (A and B, routing rows of the tasks of before).
pub fn compare(
    before: &BTreeMap<String, AdapterModule>,
    after: &BTreeMap<String, AdapterModule>,
) -> (Kept, Kept) {
    let (mut bank, mut rows) = (Comparison::default(), Comparison::default());
    for (path, old) in before {
        let empty = [][..].to_vec();
        let Some(new) = after.get(path) else {
            bank.add(&old.lora_a.values, &empty);
            continue;
        };
        bank.add(&old.lora_a.values, &new.lora_a.values);
        bank.add(&old.lora_b.values, &new.lora_b.values);
        let n = old.router_logits.len().min(new.router_logits.len());
        rows.add(&old.router_logits, &new.router_logits[..n]);
    }
    (bank.finish(), rows.finish())
}
