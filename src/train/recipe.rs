//! Recipes: what the papers and PEFT's notebook train with, as defaults that flags override.
//!
//! | preset | source | base there |
//! |---|---|---|
//! | peft | PEFT's Poly notebook | flan-t5-xl |
//! | poly-crossfit | mttl's CrossFit scripts (Polytropon) | t5-large |
//! | mhr-t0 | mttl's T0 scripts (MHR) | t5-xl-lm-adapt |
//! | mhr-superni | mttl's SuperNI scripts (MHR) | t5-large-lm-adapt |
//!
//! A batch is that of one of their GPUs. mttl's SuperNI scripts leave the number of splits to the
//! caller; 64 is what its T0 scripts have. It must divide the base's widths, so small bases want less.
//! The scripts name T5's linears; of another base they mean those that do the same.

use super::{Optimizer, RouterSampling, Schedule, TrainConfig, adafactor::Adafactor};
use crate::{
    formats::{config::ModelConfig, poly_config::TargetModules},
    model::routing::InitA,
};

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Optimiser steps.
    Steps(u64),
    /// Passes over the data.
    Epochs(f64),
}

/// Which linears a recipe adapts, whatever the base calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linears {
    /// PEFT's default of the architecture.
    Default,
    /// The projections of attention: T5's q, k, v, o.
    Attention,
    /// All but the output head.
    All,
}

impl Linears {
    /// Their `target_modules`; none where they are the default.
    pub fn targets(self, base: &ModelConfig) -> Option<TargetModules> {
        match self {
            Self::Default => None,
            Self::Attention => {
                let names = base.attention_targets().iter().map(|&name| name.to_owned());
                Some(TargetModules::List(names.collect()))
            }
            Self::All => Some(TargetModules::Pattern("all-linear".to_owned())),
        }
    }
}

/// Defaults of a run.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Rank.
    pub r: usize,
    /// Skills.
    pub n_skills: usize,
    /// Splits.
    pub n_splits: usize,
    /// What is adapted.
    pub linears: Linears,
    /// How A begins.
    pub init_a: InitA,
    /// The trainer's settings; warm-up and steps are below.
    pub train: TrainConfig,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: u32,
    /// Steps of warm-up; below 1 a share of all steps.
    pub warmup_steps: f64,
    /// How long it runs.
    pub length: Length,
    /// The most source tokens of a text.
    pub max_source_length: Option<usize>,
    /// The most label tokens.
    pub max_target_length: usize,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            r: 8,
            n_skills: 4,
            n_splits: 1,
            linears: Linears::Default,
            init_a: InitA::Peft,
            train: TrainConfig::default(),
            gradient_accumulation_steps: 1,
            warmup_steps: 0.0,
            length: Length::Epochs(3.0),
            max_source_length: None,
            max_target_length: 128,
        }
    }
}

impl Recipe {
    /// The names of the presets.
    pub const NAMES: [&'static str; 4] = ["peft", "poly-crossfit", "mhr-t0", "mhr-superni"];

    /// The preset of a name.
    pub fn named(name: &str) -> Option<Self> {
        let paper = TrainConfig {
            learning_rate: 1e-3,
            router_learning_rate: 0.1,
            schedule: Schedule::Linear,
            ..TrainConfig::default()
        };
        Some(match name {
            "peft" => Self {
                r: 8,
                n_skills: 2,
                n_splits: 4,
                train: TrainConfig {
                    learning_rate: 5e-5,
                    router_learning_rate: 5e-5,
                    weight_decay: 0.0,
                    ..paper
                },
                length: Length::Epochs(8.0),
                max_source_length: Some(512),
                ..Self::default()
            },
            "poly-crossfit" => Self {
                r: 16,
                n_skills: 8,
                linears: Linears::Attention,
                init_a: InitA::Authors,
                train: TrainConfig {
                    weight_decay: 0.01,
                    router_weight_decay: 0.01,
                    max_grad_norm: 0.1,
                    ..paper
                },
                warmup_steps: 0.06,
                length: Length::Epochs(30.0),
                max_source_length: Some(512),
                max_target_length: 64,
                ..Self::default()
            },
            "mhr-t0" => Self {
                r: 1,
                n_skills: 8,
                n_splits: 64,
                linears: Linears::All,
                init_a: InitA::Authors,
                train: TrainConfig {
                    weight_decay: 0.0,
                    router_sampling: RouterSampling::Off,
                    optimizer: Optimizer::Adafactor(Adafactor { scale_parameter: false }),
                    ..paper
                },
                gradient_accumulation_steps: 2,
                warmup_steps: 0.06,
                length: Length::Steps(100_000),
                max_source_length: Some(256),
                max_target_length: 256,
            },
            "mhr-superni" => Self {
                r: 16,
                n_skills: 8,
                n_splits: 64,
                linears: Linears::Attention,
                init_a: InitA::Authors,
                train: TrainConfig {
                    weight_decay: 0.01,
                    router_weight_decay: 0.01,
                    max_grad_norm: 0.1,
                    label_smoothing: 0.1,
                    ..paper
                },
                gradient_accumulation_steps: 1,
                warmup_steps: 1500.0,
                length: Length::Steps(25_000),
                max_source_length: Some(1024),
                max_target_length: 128,
            },
            _ => return None,
        })
    }
}
