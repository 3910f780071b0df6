//! `demo`: four adapters on a suite of generated tasks, in less than a minute.

use std::path::PathBuf;

use clap::Args;

use super::{Common, print, print_json};
use crate::{
    demo::{self, DemoOptions, methods::Plan},
    error::Result,
};

#[derive(Args)]
pub(super) struct Demo {
    #[command(flatten)]
    pub(super) common: Common,
    /// Where base, rows, adapters and heat maps are written.
    #[arg(long, default_value = "polytape-demo")]
    output_dir: PathBuf,
}

impl Demo {
    pub(super) fn run(self) -> Result<()> {
        self.common.cpu_only("demo")?;
        self.common.no_dtype("demo", "its base is f32")?;
        let options = DemoOptions {
            output_dir: self.output_dir,
            seed: self.common.seed,
            n_threads: self.common.n_threads(),
            plan: Plan::default(),
        };
        let bar = self.common.progress(0);
        let report = demo::run(&options, &mut |progress| {
            bar.set_length(progress.n_steps);
            bar.set_position(progress.step);
            let what = progress.adapts_to.unwrap_or("all tasks");
            bar.set_message(format!("{} on {what}", progress.method.name()));
            Ok(())
        })?;
        bar.finish_and_clear();
        if self.common.json { print_json(&report) } else { print(&report.to_string()) }
    }
}
