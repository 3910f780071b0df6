//! The four methods, their sizes and their settings.
//!
//! | method | skills | what a task uses | new task |
//! |---|---|---|---|
//! | shared | 1 of rank r·S | the one skill | goes on from it |
//! | private | one a task, rank r | its own, fixed | a fresh one |
//! | poly | S of rank r | a learned mixture | the bank, with a fresh router row |
//! | mhr | S of rank r, in 4 splits | a learned mixture for each split | the same |
//!
//! Shared and private are Poly adapters whose router has nothing to learn, so one trainer runs all.

use crate::{
    error::Result,
    formats::poly_config::{PolyConfig, TargetModules},
    kernels::cpu::Cpu,
    model::{Adapter, Model},
    train::{
        RouterRows, RouterSampling, Trainable,
        adapt::{self, Tune},
    },
};

use super::suite::RowCounts;

/// A way to share an adapter among tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// One LoRA for all tasks.
    Shared,
    /// One LoRA for each task.
    Private,
    /// A bank of skills, one mixture a task.
    Poly,
    /// A bank of skills, one mixture a task and split.
    Mhr,
}

/// How much the demo does. [`Default`] is what `polytape demo` runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Rows of the tasks.
    pub n_rows: RowCounts,
    /// Skills of Poly and MHR.
    pub n_skills: usize,
    /// Rank of a skill, and of a private LoRA.
    pub rank: usize,
    /// Training on all tasks at once.
    pub training: Fit,
    /// Adaptation to a new task.
    pub adaptation: Fit,
}

/// A run of the trainer.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Optimiser steps.
    pub n_steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Of A and B.
    pub learning_rate: f64,
    /// Of the router.
    pub router_learning_rate: f64,
    /// What the router does in training.
    pub router_sampling: RouterSampling,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            n_rows: RowCounts { train: 200, few: 16, test: 50 },
            n_skills: 8,
            rank: 4,
            training: Fit {
                n_steps: 300,
                batch_size: 36,
                learning_rate: 2e-2,
                router_learning_rate: 0.1,
                router_sampling: RouterSampling::Off,
            },
            adaptation: Fit {
                n_steps: 50,
                batch_size: 16,
                learning_rate: 1e-2,
                router_learning_rate: 0.3,
                router_sampling: RouterSampling::Off,
            },
        }
    }
}

impl Method {
    /// All, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Shared, Self::Private, Self::Poly, Self::Mhr];

    /// Its name in tables and folders.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Poly => "poly",
            Self::Mhr => "mhr",
        }
    }

    /// Whether there is a mixture to learn.
    pub fn learns_routing(self) -> bool {
        matches!(self, Self::Poly | Self::Mhr)
    }

    fn config(self, plan: &Plan, n_tasks: usize) -> PolyConfig {
        let (n_skills, n_splits, r) = match self {
            Self::Shared => (1, 1, plan.rank * plan.n_skills),
            Self::Private => (n_tasks, 1, plan.rank),
            Self::Poly => (plan.n_skills, 1, plan.rank),
            Self::Mhr => (plan.n_skills, 4, plan.rank),
        };
        PolyConfig {
            task_type: Some("SEQ_2_SEQ_LM".to_owned()),
            target_modules: Some(TargetModules::Pattern("all-linear".to_owned())),
            r,
            n_tasks,
            n_skills,
            n_splits,
            ..PolyConfig::default()
        }
    }

    /// A fresh adapter for so many tasks.
    pub(super) fn adapter(
        self,
        base: &Model,
        plan: &Plan,
        n_tasks: usize,
        seed: u64,
    ) -> Result<Adapter<Cpu>> {
        let mut adapter = Adapter::new(base, &self.config(plan, n_tasks), seed)?;
        if self == Self::Private {
            let own: Vec<_> = (0..n_tasks).map(|task| vec![task]).collect();
            adapter.fix_routing(base, &own);
        }
        Ok(adapter)
    }

    /// Parameters that training changes.
    pub(super) fn n_trainable(self, adapter: &Adapter<Cpu>) -> usize {
        if self.learns_routing() { adapter.n_params() } else { adapter.n_bank_params() }
    }

    /// How it trains on all tasks.
    pub(super) fn training(self, plan: &Plan) -> Fit {
        self.without_router(plan.training.clone())
    }

    /// The ways in which it can adapt to a new task.
    pub(super) fn adaptations(self) -> Vec<Tune> {
        if self.learns_routing() { vec![Tune::All, Tune::Router] } else { vec![Tune::All] }
    }

    /// How it adapts.
    pub(super) fn adaptation(self, plan: &Plan) -> Fit {
        self.without_router(plan.adaptation.clone())
    }

    /// What learns when it trains on all tasks.
    pub(super) fn trainable(self) -> Trainable {
        if self.learns_routing() {
            Trainable::ALL
        } else {
            Trainable { bank: true, router: RouterRows::None }
        }
    }

    /// Where there is nothing to route, the router neither learns nor samples.
    fn without_router(self, fit: Fit) -> Fit {
        if self.learns_routing() {
            return fit;
        }
        Fit { router_sampling: RouterSampling::Off, ..fit }
    }

    /// Where adaptation to one new task begins: the papers' protocol, a fresh router row over the
    /// trained bank. None of the private LoRAs is for the new task, so it begins with a fresh one.
    pub(super) fn for_new_task(
        self,
        base: &Model,
        plan: &Plan,
        trained: &Adapter<Cpu>,
        tune: Tune,
        seed: u64,
    ) -> Result<Adapter<Cpu>> {
        if self == Self::Private {
            return self.adapter(base, plan, trained.config().n_tasks + 1, seed);
        }
        adapt::add_task(base, trained, None, tune, seed)
    }
}
