//! `verify`: the kernels' random tests on this very machine, for as long as one likes.
//!
//! ```text
//! round 0, 1, 2, ...   each kernel, each instruction set and device, f32 and bf16   vs. the f64 oracle
//! ```
//!
//! What is required of a case is what `cargo test --test kernels` requires. The cases come from the
//! binary ([`run`](super::run)), which takes them from there.

use std::{
    collections::BTreeMap,
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};

use super::{Common, Device, check_writable, doctor, print, print_json};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::safetensors::write_atomically,
    kernels::{cpu::isa::Isa, cuda::Cuda},
};

/// An operation with its random cases.
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// From a base seed and a case's number, the case's seed.
    pub seed: fn(u64, u64) -> u64,
    /// Checks the case of a seed on every backend: what they did, or what is wrong.
    pub check: fn(u64) -> std::result::Result<Vec<Passed>, String>,
}

/// What a backend did in a case that it passed.
pub struct Passed {
    /// Its name and compute type.
    pub backend: &'static str,
    /// The largest error, in units of what is allowed.
    pub worst: f64,
    /// How often it ran the operation.
    pub executions: u64,
}

/// Most failures that a report has.
const MAX_FAILURES: usize = 20;

#[derive(Args)]
pub(super) struct Verify {
    /// How long, in minutes; every kernel gets one case at least.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// One case alone, as a failure names it: KERNEL/SEED.
    #[arg(long, value_name = "KERNEL/SEED")]
    case: Option<String>,
    /// Writes the report there, too, as JSON.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    pub(super) common: Common,
}

/// What a kernel did on a backend.
#[derive(Default)]
struct Tally {
    cases: u64,
    executions: u64,
    worst: f64,
    /// The case of the worst error.
    worst_seed: u64,
}

impl Verify {
    pub(super) fn run(&self, kernels: &[Kernel]) -> Result<()> {
        if !(0.0..=1e6).contains(&self.minutes) {
            let found = self.minutes;
            return Err(Error::Usage(format!("--minutes must be in 0..1000000, not {found}")));
        }
        self.common.no_dtype("verify", "every kernel runs in both types")?;
        for (flag, is_given, why) in [
            ("--threads", self.common.threads.is_some(), "every kernel runs on several numbers"),
            ("--no-mmap", self.common.no_mmap, "there is no base to read"),
        ] {
            if is_given {
                tracing::warn!("{flag} is of no effect here: {why}");
            }
        }
        let needs_gpu = matches!(self.common.device, Device::Cuda);
        if needs_gpu {
            // A GPU is verified wherever there is one, so that its lack would not be noticed.
            Cuda::new(Dtype::F32)?;
        }
        if kernels.is_empty() {
            return Err(Error::Device("this build has no kernel tests: they need Unix".into()));
        }
        if let Some(path) = &self.output {
            check_writable(path)?;
        }
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(60.0 * self.minutes);
        let mut tallies: BTreeMap<(&str, &str), Tally> = BTreeMap::new();
        let mut failures: Vec<(&str, u64, String)> = Vec::new();
        let mut n_failures = 0_u64;
        let mut check = |kernel: &Kernel, seed| match (kernel.check)(seed) {
            Ok(passed) => {
                for Passed { backend, worst, executions } in passed {
                    let tally = tallies.entry((kernel.name, backend)).or_default();
                    tally.cases += 1;
                    tally.executions += executions;
                    if worst >= tally.worst {
                        (tally.worst, tally.worst_seed) = (worst, seed);
                    }
                }
            }
            Err(why) => {
                n_failures += 1;
                tracing::error!("{}/{seed}: {why}", kernel.name);
                if failures.len() < MAX_FAILURES {
                    failures.push((kernel.name, seed, why));
                }
            }
        };
        match &self.case {
            Some(case) => {
                let (kernel, seed) = named(kernels, case)?;
                check(kernel, seed);
            }
            None => {
                for round in 0.. {
                    for kernel in kernels {
                        if round == 0 || Instant::now() < end {
                            check(kernel, (kernel.seed)(self.common.seed, round));
                        }
                    }
                    if Instant::now() >= end {
                        break;
                    }
                }
            }
        }
        let report = self.report(&tallies, &failures, n_failures, start.elapsed());
        if let Some(path) = &self.output {
            write_atomically(path, |file| writeln!(file, "{report:#}"))?;
        }
        if self.common.json {
            print_json(&report)?;
        } else {
            self.print_text(&tallies, &failures, &report)?;
        }
        match n_failures {
            0 if needs_gpu && !tallies.keys().any(|(_, backend)| backend.starts_with("cuda")) => {
                Err(Error::Device("no case ran on the GPU".into()))
            }
            0 => Ok(()),
            n => {
                Err(Error::Fault(format!("{n} cases failed; a report of this helps to repair it")))
            }
        }
    }

    fn report(
        &self,
        tallies: &BTreeMap<(&str, &str), Tally>,
        failures: &[(&str, u64, String)],
        n_failures: u64,
        elapsed: Duration,
    ) -> Value {
        let kernels: Vec<_> = tallies
            .iter()
            .map(|((kernel, backend), tally)| {
                json!({
                    "kernel": kernel, "backend": backend, "cases": tally.cases,
                    "executions": tally.executions, "worst_error": tally.worst,
                    "worst_case": format!("{kernel}/{}", tally.worst_seed),
                })
            })
            .collect();
        let failures: Vec<_> = failures
            .iter()
            .map(|(kernel, seed, why)| {
                let replay = format!("polytape verify --case {kernel}/{seed}");
                json!({ "kernel": kernel, "seed": seed.to_string(), "replay": replay, "why": why })
            })
            .collect();
        let isas: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"), "cpu": doctor::cpu_model(), "isa_available": isas,
            "os": std::env::consts::OS, "arch": std::env::consts::ARCH,
            "seed": self.common.seed, "seconds": elapsed.as_secs_f64(),
            "cases": tallies.values().map(|tally| tally.cases).sum::<u64>(),
            "executions": tallies.values().map(|tally| tally.executions).sum::<u64>(),
            "n_failures": n_failures, "failures": failures, "kernels": kernels,
        })
    }

    fn print_text(
        &self,
        tallies: &BTreeMap<(&str, &str), Tally>,
        failures: &[(&str, u64, String)],
        report: &Value,
    ) -> Result<()> {
        print(&format!(
            "polytape {} on {}\nseed {}, {:.0} s, {} executions\n",
            env!("CARGO_PKG_VERSION"),
            doctor::cpu_model(),
            self.common.seed,
            report["seconds"].as_f64().unwrap_or_default(),
            report["executions"],
        ))?;
        print(&format!("{:<20} {:<18} {:>8} {:>12}", "kernel", "backend", "cases", "worst error"))?;
        for ((kernel, backend), tally) in tallies {
            // In units of the bound: 1 would be the largest error that passes.
            print(&format!("{kernel:<20} {backend:<18} {:>8} {:>12.3}", tally.cases, tally.worst))?;
        }
        for (kernel, seed, why) in failures {
            print(&format!("\nFAILED {kernel}: {why}\n  polytape verify --case {kernel}/{seed}"))?;
        }
        match report["n_failures"].as_u64() {
            Some(0) => print("\nevery kernel agrees with its f64 definition"),
            _ => Ok(()),
        }
    }
}

/// The kernel and the seed of a case's name.
fn named<'k>(kernels: &'k [Kernel], case: &str) -> Result<(&'k Kernel, u64)> {
    let found = case.split_once('/').and_then(|(name, seed)| {
        let kernel = kernels.iter().find(|kernel| kernel.name == name)?;
        Some((kernel, seed.parse().ok()?))
    });
    found.ok_or_else(|| {
        let names: Vec<_> = kernels.iter().map(|kernel| kernel.name).collect();
        Error::Usage(format!(
            "--case {case} is not KERNEL/SEED with a kernel of {}",
            names.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::{Cli, Verb},
        *,
    };

    /// A kernel that is right, and one that is wrong in every third case.
    const KERNELS: &[Kernel] = &[
        Kernel {
            name: "right",
            seed: |base, i| 100 * base + i,
            check: |_| Ok(vec![Passed { backend: "scalar f32", worst: 0.5, executions: 3 }]),
        },
        Kernel {
            name: "wrong",
            seed: |base, i| 100 * base + i,
            check: |seed| if seed % 3 == 0 { Err(format!("{seed} differs")) } else { Ok(vec![]) },
        },
    ];

    fn verify(flags: &[&str]) -> Result<()> {
        let path = std::env::temp_dir().join(format!("polytape-verify-{}", std::process::id()));
        let common = ["polytape", "verify", "--minutes", "0", "--output"];
        let arguments = common.into_iter().chain(path.to_str()).chain(flags.iter().copied());
        let Verb::Verify(verb) = Cli::parse_from(arguments).verb else { unreachable!() };
        let done = verb.run(KERNELS);
        let report: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!(report["n_failures"] == 0, done.is_ok());
        if let Err(error) = &done {
            assert_eq!(error.exit_code(), 1);
            let failure = &report["failures"][0];
            assert_eq!(failure["why"], format!("{} differs", failure["seed"].as_str().unwrap()));
            assert!(
                failure["replay"].as_str().unwrap().starts_with("polytape verify --case wrong/")
            );
        }
        done
    }

    #[test]
    fn a_wrong_kernel_is_reported_and_replayed() {
        assert!(verify(&["--seed", "1"]).is_ok()); // 100 is no multiple of 3, 300 is.
        assert!(verify(&["--seed", "3"]).is_err());
        assert!(verify(&["--case", "wrong/300"]).is_err());
        assert!(verify(&["--case", "wrong/301"]).is_ok());
    }
}
