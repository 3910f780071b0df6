//! `bench`: how long things take, beside what this machine could do at most.

mod kernels;
mod model;

use clap::{Args, Command, Subcommand};

use super::Common;
use crate::error::Result;

#[derive(Args)]
pub(super) struct Bench {
    /// What is timed.
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A training step on random rows.
    Train(Box<model::ModelBench>),
    /// The loss of random rows.
    Eval(Box<model::ModelBench>),
    /// Greedy decoding of random rows.
    Generate(Box<model::ModelBench>),
    /// Frozen linears of known models, forward and backward.
    Gemm(kernels::Gemm),
    /// Linears with a routed LoRA beside the same without.
    Routed(kernels::Routed),
    /// Attention, forward and backward.
    Attention(kernels::Attention),
}

/// Kernels have no base whose type decides.
pub(super) fn with_own_defaults(command: Command) -> Command {
    ["gemm", "routed", "attention"]
        .into_iter()
        .fold(command, |command, what| command.mut_subcommand(what, kernels::with_own_defaults))
}

impl Bench {
    pub(super) fn common(&self) -> &Common {
        match &self.what {
            What::Train(bench) | What::Eval(bench) | What::Generate(bench) => &bench.common,
            What::Gemm(bench) => &bench.common,
            What::Routed(bench) => &bench.common,
            What::Attention(bench) => &bench.common,
        }
    }

    pub(super) fn run(self) -> Result<()> {
        match self.what {
            What::Train(bench) => bench.run(model::What::Train),
            What::Eval(bench) => bench.run(model::What::Eval),
            What::Generate(bench) => bench.run(model::What::Generate),
            What::Gemm(bench) => bench.run(),
            What::Routed(bench) => bench.run(),
            What::Attention(bench) => bench.run(),
        }
    }
}
