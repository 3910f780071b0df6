//! The command line: one file a verb, flags and exit codes as in the README.

mod adapt;
mod adapters;
mod bench;
mod config;
mod data;
mod demo;
mod doctor;
mod eval;
mod export;
mod generate;
mod import;
mod init;
mod inspect;
mod preview;
mod report;
mod results;
mod train;
pub mod verify;

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::{checkpoint::Checkpoint, mmap::Access},
    kernels::{Backend, cpu::Cpu, cuda::Cuda},
    model::{Model, Options, natural_dtype},
    process::available_bytes,
};

/// Trains and runs Poly / MHR adapters over a frozen, memory-mapped transformer.
#[derive(Parser)]
#[command(name = "polytape", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Train an adapter on JSONL rows.
    Train(Box<train::Train>),
    /// Teach a trained adapter one more task from a few rows.
    Adapt(Box<adapt::Adapt>),
    /// Loss, exact match and Rouge-L of a data file, per task and overall.
    Eval(eval::Eval),
    /// Generate an output for every row of a data file.
    Generate(generate::Generate),
    /// Turn one task of an adapter into a plain LoRA folder, or merge it into the base.
    Export(export::Export),
    /// Make an adapter whose skills are plain LoRAs, or one of the authors' checkpoint.
    Import(import::Import),
    /// Make one HTML page of a training run.
    Report(report::Report),
    /// Show rows as the model will see them.
    Preview(preview::Preview),
    /// Say what is in a model or adapter folder.
    Inspect(inspect::Inspect),
    /// Make a base with random weights.
    Init(init::Init),
    /// Time a training step, an evaluation, a generation or single kernels.
    Bench(bench::Bench),
    /// Say what this machine offers and what is used of it.
    Doctor(doctor::Doctor),
    /// Test every kernel on this machine with random cases against its f64 definition.
    Verify(verify::Verify),
    /// Compare four ways to share adapters among tasks; all that it needs is inside the binary.
    Demo(demo::Demo),
}

/// Flags of every verb.
#[derive(Args, Clone)]
struct Common {
    /// Compute type [default: bf16 where the base is 16-bit, else f32].
    #[arg(long)]
    dtype: Option<ComputeDtype>,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Threads [default: one a core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Read the base into memory instead of mapping its files: what happens to them later does not matter.
    #[arg(long)]
    no_mmap: bool,
    /// What everything random is derived from.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// One JSON object a line on stdout; the last line is the result.
    #[arg(long)]
    json: bool,
    /// More log lines (twice: everything). RUST_LOG wins.
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Fewer log lines and no progress bar.
    #[arg(short)]
    quiet: bool,
}

/// A flag of the verbs that infer.
#[derive(Args)]
struct Invariance {
    /// Whether a row's tokens and bits do not depend on the rows beside it. Off allows more; today there is nothing that it
    /// would speed up, so it does the same.
    #[arg(long, default_value = "on")]
    batch_invariant: OnOff,
}

#[derive(Clone, Copy, ValueEnum)]
enum ComputeDtype {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

/// The other words are those that Hugging Face's parser takes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    #[value(aliases = ["On", "ON", "true", "True", "TRUE", "yes", "Yes", "YES", "1"])]
    On,
    #[value(aliases = ["Off", "OFF", "false", "False", "FALSE", "no", "No", "NO", "0"])]
    Off,
}

impl OnOff {
    fn is_on(self) -> bool {
        self == Self::On
    }
}

impl Common {
    fn dtype(&self) -> Option<Dtype> {
        self.dtype.map(|dtype| match dtype {
            ComputeDtype::F32 => Dtype::F32,
            ComputeDtype::Bf16 => Dtype::Bf16,
        })
    }

    fn n_threads(&self) -> usize {
        self.threads.map_or(0, usize::from)
    }

    fn access(&self) -> Access {
        if self.no_mmap { Access::InMemory } else { Access::Mapped }
    }

    /// For verbs that compute nothing on a GPU.
    fn cpu_only(&self, verb: &str) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            Device::Cuda => {
                Err(Error::Usage(format!("{verb} runs on the CPU: leave --device out")))
            }
        }
    }

    /// For verbs whose type is given.
    fn no_dtype(&self, verb: &str, why: &str) -> Result<()> {
        match self.dtype {
            None => Ok(()),
            Some(_) => Err(Error::Usage(format!("{verb} takes no --dtype: {why}; leave it out"))),
        }
    }

    /// Of what is done before a backend computes: tokenising.
    fn limit_host_threads(&self) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.n_threads());
        // A pool that is there already was made by an earlier call.
        let _ = pool.build_global();
    }

    fn open_model(&self, dir: &Path) -> Result<Model> {
        self.limit_host_threads();
        let options =
            Options { dtype: self.dtype(), n_threads: self.n_threads(), access: self.access() };
        let model = Model::open(dir, &options)?;
        log_opened(&model);
        Ok(model)
    }

    /// The model in a GPU's memory.
    fn open_cuda(&self, dir: &PathBuf) -> Result<Model<Cuda>> {
        self.limit_host_threads();
        let checkpoint = Checkpoint::open_with(dir, self.access())?;
        let cuda = Cuda::new(self.dtype().unwrap_or_else(|| natural_dtype(&checkpoint)))?;
        cuda.check_fits(checkpoint.n_elements())?;
        let model = Model::from_checkpoint(cuda, checkpoint)?;
        log_opened(&model);
        Ok(model)
    }

    /// A progress bar on a terminal, else nothing.
    fn progress(&self, n: u64) -> indicatif::ProgressBar {
        if self.quiet || self.json || !std::io::stderr().is_terminal() {
            return indicatif::ProgressBar::hidden();
        }
        let style = indicatif::ProgressStyle::with_template(
            "{bar:30} {pos}/{len} {msg} {elapsed} (eta {eta})",
        );
        let bar = indicatif::ProgressBar::new(n);
        style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
    }
}

/// Opens the model in `$dir` on the device that the flags of `$verb` name, and runs it there.
macro_rules! run_on_device {
    ($verb:expr, $dir:expr) => {
        match $verb.common.device {
            $crate::cli::Device::Cpu => $verb.run_on($verb.common.open_model($dir)?),
            $crate::cli::Device::Cuda => {
                $crate::kernels::cuda::catch_faults(|| $verb.run_on($verb.common.open_cuda($dir)?))
            }
        }
    };
}
use run_on_device;

/// What the command line says of a backend.
trait Described: Backend {
    /// The type of activations.
    fn compute(&self) -> Dtype;
    /// The instruction set or GPU.
    fn hardware(&self) -> String;
    /// Threads of the host that compute.
    fn host_threads(&self) -> usize;
    /// Bytes of all buffers at their peak.
    fn peak_bytes(&self) -> usize;
    /// Bytes that buffers can still take, if that is known.
    fn free_bytes(&self) -> Option<u64>;
    /// The CPU backend, if it is that.
    fn cpu(&self) -> Option<&Cpu> {
        None
    }
}

impl Described for Cpu {
    fn compute(&self) -> Dtype {
        self.compute_dtype()
    }
    fn hardware(&self) -> String {
        self.isa().name().to_owned()
    }
    fn host_threads(&self) -> usize {
        self.n_threads()
    }
    fn peak_bytes(&self) -> usize {
        self.peak_bytes()
    }
    fn free_bytes(&self) -> Option<u64> {
        available_bytes()
    }
    fn cpu(&self) -> Option<&Cpu> {
        Some(self)
    }
}

impl Described for Cuda {
    fn compute(&self) -> Dtype {
        self.compute_dtype()
    }
    fn hardware(&self) -> String {
        self.device().name()
    }
    fn host_threads(&self) -> usize {
        1
    }
    fn peak_bytes(&self) -> usize {
        self.peak_bytes()
    }
    fn free_bytes(&self) -> Option<u64> {
        self.device().memory().ok().map(|(_, free)| free as u64)
    }
}

fn log_opened(model: &Model<impl Described>) {
    let backend = model.backend();
    tracing::info!(
        "{}: {} tensors, computing in {} on {} ({} threads)",
        model.dir().display(),
        model.tensors().len(),
        backend.compute(),
        backend.hardware(),
        backend.host_threads()
    );
}

/// Fails now if a file could not be written at the end of a long run.
fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::Usage(format!("{} is a folder, not a file", path.display())));
    }
    if path.exists() {
        return Ok(());
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let probe = folder.join(format!(".polytape-probe-{}", std::process::id()));
    std::fs::write(&probe, "").map_err(Error::io("write", path))?;
    std::fs::remove_file(&probe).map_err(Error::io("remove", probe))
}

/// Refuses an adapter to begin with that lies where the run will write: the earlier adapter and `best/` there are replaced.
fn check_apart(flag: &str, source: &Path, output_dir: &Path) -> Result<()> {
    match (source.canonicalize(), output_dir.canonicalize()) {
        (Ok(from), Ok(out)) if from.starts_with(&out) => Err(Error::Usage(format!(
            "{flag} {} lies in --output-dir, whose adapters this run replaces: name another --output-dir",
            source.display()
        ))),
        _ => Ok(()),
    }
}

/// What a value NAME=PATH means; nothing where it is a path alone, as what is there is, whatever it is called.
fn named_path(value: &Path) -> Option<(String, PathBuf)> {
    let text = value.to_string_lossy();
    let (name, path) = text.split_once('=')?;
    let is_name = !name.is_empty() && !name.contains('/') && !value.exists();
    is_name.then(|| (name.to_owned(), path.into()))
}

/// A path as JSON has it; what is not UTF-8 is replaced.
fn shown(path: &Path) -> serde_json::Value {
    path.display().to_string().into()
}

/// A line on stderr, where it can be written.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints a line on stdout. A reader that went away is no error.
fn print(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write", "stdout")(error))
        }
        _ => Ok(()),
    }
}

/// Prints a result as a line of JSON.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|error| Error::Config(error.to_string()))?;
    print(&line)
}

/// Flags in Hugging Face's snake_case are the kebab-case ones.
fn kebab(argument: String) -> String {
    match argument.strip_prefix("--") {
        Some(rest) => {
            let (name, value) = rest.split_once('=').map_or((rest, None), |(n, v)| (n, Some(v)));
            let name = name.replace('_', "-");
            value.map_or(format!("--{name}"), |value| format!("--{name}={value}"))
        }
        None => argument,
    }
}

/// Reads a command line as [`run`] does, and runs nothing. Gives what is wrong with it.
pub fn check_arguments(arguments: &[String]) -> std::result::Result<(), String> {
    let arguments = arguments.iter().map(|argument| kebab(argument.clone()).into());
    let arguments = config::expand(arguments.collect(), &Cli::command());
    let arguments = arguments.map_err(|error| error.to_string())?;
    match Cli::try_parse_from(arguments) {
        Err(error) if error.use_stderr() => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Runs the command line of this process. `kernels` is what `verify` verifies.
pub fn run(kernels: &[verify::Kernel]) -> ExitCode {
    #[cfg(unix)]
    crate::formats::signals::handle();
    let arguments = std::env::args_os().map(|argument| match argument.into_string() {
        Ok(text) => kebab(text).into(),
        Err(raw) => raw,
    });
    let arguments = match config::expand(arguments.collect(), &Cli::command()) {
        Ok(arguments) => arguments,
        Err(error) => {
            tell(&format!("ERROR {error}")); // The log is not there yet: its level is a flag, too.
            return ExitCode::from(error.exit_code());
        }
    };
    // So that --max-steps -1 is out of range, not an unknown flag.
    let negative = |flag: clap::Arg| match flag.get_action().takes_values() {
        true => flag.allow_negative_numbers(true),
        false => flag,
    };
    let command = Cli::command().mut_subcommands(|verb| verb.mut_args(negative));
    let command = command.mut_subcommand("adapt", adapt::with_own_defaults);
    let command = command.mut_subcommand("bench", bench::with_own_defaults);
    let cli =
        Cli::from_arg_matches(&command.get_matches_from(arguments)).unwrap_or_else(|e| e.exit());
    let common = cli.verb.common();
    let default = match (common.quiet, common.verbose) {
        (true, _) => "error",
        (false, 0) => "polytape=info,warn",
        (false, 1) => "polytape=debug,warn",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false) // A log that nobody reads any more ends no run.
        .with_target(false)
        .without_time()
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    let done = match cli.verb {
        Verb::Train(verb) => verb.run(),
        Verb::Adapt(verb) => verb.run(),
        Verb::Eval(verb) => verb.run(),
        Verb::Generate(verb) => verb.run(),
        Verb::Export(verb) => verb.run(),
        Verb::Import(verb) => verb.run(),
        Verb::Report(verb) => verb.run(),
        Verb::Preview(verb) => verb.run(),
        Verb::Inspect(verb) => verb.run(),
        Verb::Init(verb) => verb.run(),
        Verb::Bench(verb) => verb.run(),
        Verb::Doctor(verb) => verb.run(),
        Verb::Verify(verb) => verb.run(kernels),
        Verb::Demo(verb) => verb.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

impl Verb {
    fn common(&self) -> &Common {
        match self {
            Self::Train(verb) => &verb.common,
            Self::Adapt(verb) => &verb.common,
            Self::Eval(verb) => &verb.common,
            Self::Generate(verb) => &verb.common,
            Self::Export(verb) => &verb.common,
            Self::Import(verb) => &verb.common,
            Self::Report(verb) => &verb.common,
            Self::Preview(verb) => &verb.common,
            Self::Inspect(verb) => &verb.common,
            Self::Init(verb) => &verb.common,
            Self::Bench(verb) => verb.common(),
            Self::Doctor(verb) => &verb.common,
            Self::Verify(verb) => &verb.common,
            Self::Demo(verb) => &verb.common,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn snake_case_flags_are_accepted() {
        assert_eq!(kebab("--max_steps".into()), "--max-steps");
        assert_eq!(kebab("--model=my_dir".into()), "--model=my_dir");
        assert_eq!(kebab("my_file".into()), "my_file");
    }

    #[test]
    fn values_in_hugging_faces_spelling_are_accepted() {
        let check =
            |line: &str| check_arguments(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let (train, generate) = (
            "polytape train --model m --data d --output-dir o",
            "polytape generate --model m --data d --output o",
        );
        for (verb, flags) in [
            (train, "--gradient_checkpointing --max_steps 2"),
            (train, "--gradient_checkpointing True --shuffle False --load_best_model_at_end yes"),
            (train, "--checkpointing=FALSE --init_weights No --dtype bfloat16"),
            (generate, "--do_sample True --early_stopping True --dtype float32"),
            (generate, "--early_stopping Never"),
            (generate, "--do_sample false --early_stopping False"),
        ] {
            assert_eq!(check(&format!("{verb} {flags}")), Ok(()));
        }
        for (verb, flags) in [(train, "--shuffle maybe"), (generate, "--dtype float16")] {
            assert!(check(&format!("{verb} {flags}")).is_err(), "{flags}");
        }
    }
}
