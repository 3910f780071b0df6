//! `bench gemm|routed|attention`: kernels on shapes of known models, each checked against the oracle
//! first, beside the peaks that were measured in the moments before.

use std::time::Duration;

use clap::{Args, Command, ValueEnum};
use serde_json::{Value, json};

use crate::{
    bench::{
        AttentionCase, AttentionShape, Direction, GemmCase, GemmShape, RoutedCase, RoutedShape,
        Timing, time,
    },
    cli::{Common, Device, print, print_json},
    dtype::Dtype,
    error::{Error, Result},
    formats::poly_config::{MAX_RANK, MAX_SKILLS, MAX_SPLITS, MAX_TASKS},
    kernels::{
        Backend,
        cpu::{Cpu, Peaks},
        cuda::{Cuda, catch_faults},
    },
};

/// Models whose linears are timed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shapes {
    FlanT5Base,
    FlanT5Xl,
    #[value(name = "llama-1b")]
    Llama1b,
}

impl Shapes {
    fn name(self) -> &'static str {
        match self {
            Self::FlanT5Base => "flan-t5-base",
            Self::FlanT5Xl => "flan-t5-xl",
            Self::Llama1b => "llama-1b",
        }
    }

    /// Output and input features of the model's different linears, without the head.
    fn linears(self) -> &'static [(usize, usize)] {
        match self {
            Self::FlanT5Base => &[(768, 768), (2048, 768), (768, 2048)],
            Self::FlanT5Xl => &[(2048, 2048), (5120, 2048), (2048, 5120)],
            Self::Llama1b => &[(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
        }
    }

    /// Query heads, key heads and their width.
    fn heads(self) -> (usize, usize, usize) {
        match self {
            Self::FlanT5Base => (12, 12, 64),
            Self::FlanT5Xl => (32, 32, 64),
            Self::Llama1b => (32, 8, 64),
        }
    }
}

#[derive(Args)]
struct Kernels {
    /// Models whose shapes are timed.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Shapes::FlanT5Base, Shapes::FlanT5Xl, Shapes::Llama1b])]
    shapes: Vec<Shapes>,
    /// Type of the frozen weights.
    #[arg(long, default_value = "bf16")]
    weights: Weights,
    /// At least so many seconds for each measurement.
    #[arg(long, default_value_t = 0.5, value_parser = seconds)]
    seconds: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weights {
    F32,
    Bf16,
    F16,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("not in 0..=3600".into()) }
}

impl Kernels {
    fn weights(&self) -> Dtype {
        match self.weights {
            Weights::F32 => Dtype::F32,
            Weights::Bf16 => Dtype::Bf16,
            Weights::F16 => Dtype::F16,
        }
    }

    fn time(&self, run: impl FnMut()) -> Timing {
        time(Duration::from_secs_f64(self.seconds), run)
    }
}

fn cpu(common: &Common, verb: &str) -> Result<Cpu> {
    common.cpu_only(verb)?;
    Cpu::new(common.dtype().unwrap_or(Dtype::Bf16), common.n_threads())
}

/// What `--dtype` is where no base says it.
pub(super) fn with_own_defaults(command: Command) -> Command {
    command.mut_arg("dtype", |flag| flag.help("Compute type [default: bf16]"))
}

/// Geometric mean; none of nothing.
fn mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|v| v.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

/// Reads a number of something of which there is one at least, and `max` at most.
fn up_to(max: usize) -> impl Fn(&str) -> std::result::Result<usize, String> + Clone {
    move |text| match text.parse() {
        Ok(n) if (1..=max).contains(&n) => Ok(n),
        _ => Err(format!("not a number from 1 to {max}")),
    }
}

/// Rows, or sequences, at most.
const MAX_ROWS: usize = 1 << 20;

/// Elements of an operand at most: the check holds some of each in f64, which take 8 GiB then.
const MAX_ELEMENTS: usize = 1 << 28;
/// Of the pairs of all tasks, of which there may be ten thousand.
const MAX_PAIR_ELEMENTS: usize = 1 << 30;

/// Refuses operands that there is no memory for, which an allocation would end the process by.
fn check_size(what: &str, sizes: &[usize], most: usize) -> Result<()> {
    let n = sizes.iter().fold(1_usize, |n, &size| n.saturating_mul(size));
    if n > most {
        let shape: Vec<_> = sizes.iter().map(usize::to_string).collect();
        return Err(Error::Usage(format!(
            "{what} would have {} elements, more than {most}: ask for less",
            shape.join(" x ")
        )));
    }
    Ok(())
}

/// What a run reached, beside what bounds it.
struct Rates {
    seconds: f64,
    flop_per_s: f64,
    /// Of what it reads at least. Operands that fit into a cache stay there from run to run, so it may be
    /// more than memory gives.
    bytes_per_s: f64,
    /// What bounds [`Rates::flop_per_s`].
    peak: f64,
    /// What bounds [`Rates::bytes_per_s`].
    read: f64,
}

impl Rates {
    fn new(seconds: f64, [flops, bytes]: [f64; 2], peaks: &Peaks, on_tiles: bool) -> Self {
        Self {
            seconds,
            flop_per_s: flops / seconds,
            bytes_per_s: bytes / seconds,
            peak: peaks.amx.filter(|_| on_tiles).unwrap_or(peaks.fma),
            read: peaks.read,
        }
    }

    /// The share of the peak that bounds it.
    fn share(&self) -> f64 {
        (self.flop_per_s / self.peak).max(self.bytes_per_s / self.read)
    }

    fn line(&self) -> String {
        format!(
            "{:>9.3} ms {:>7.1} of {:>6.1} GFLOP/s {:>6.2} of {:>5.1} GB/s {:>4.0} %",
            1e3 * self.seconds,
            self.flop_per_s / 1e9,
            self.peak / 1e9,
            self.bytes_per_s / 1e9,
            self.read / 1e9,
            100.0 * self.share(),
        )
    }

    /// Adds the fields of what `name` names.
    fn add_to(&self, line: &mut Value, name: &str) {
        line[format!("{name}_gflop_per_s")] = (self.flop_per_s / 1e9).into();
        line[format!("{name}_gb_per_s")] = (self.bytes_per_s / 1e9).into();
        line[format!("{name}_share_of_peak")] = self.share().into();
    }
}

/// Adds what was measured in the moments before.
fn add_peaks(line: &mut Value, peaks: &Peaks) {
    line["fma_gflop_per_s"] = (peaks.fma / 1e9).into();
    line["amx_gflop_per_s"] = peaks.amx.map(|amx| amx / 1e9).into();
    line["read_gb_per_s"] = (peaks.read / 1e9).into();
}

#[derive(Args)]
pub(super) struct Gemm {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    kernels: Kernels,
    /// Rows of the input: tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 512, 1024, 4096], value_parser = up_to(MAX_ROWS))]
    rows: Vec<usize>,
}

impl Gemm {
    pub(super) fn run(&self) -> Result<()> {
        if let Device::Cuda = self.common.device {
            let cuda = Cuda::new(self.common.dtype().unwrap_or(Dtype::Bf16))?;
            return catch_faults(|| {
                self.each(|model, shape| self.shape_on_cuda(&cuda, model, shape))
            });
        }
        let cpu = cpu(&self.common, "bench gemm")?;
        let (mut shares, mut n) = (Vec::new(), 0);
        self.each(|model, shape| {
            let share = self.shape(&cpu, model, shape)?;
            if shape.rows > 16 {
                shares.push(share);
            }
            n += 1;
            Ok(())
        })?;
        let share = mean(&shares);
        if self.common.json {
            return print_json(&json!({
                "what": "gemm", "isa": cpu.isa().name(), "threads": cpu.n_threads(), "shapes": n,
                "geometric_mean_share_of_peak": share,
            }));
        }
        let of_many = share.map_or_else(String::new, |share| {
            format!("; those of many rows reach {:.0} % of the peak", 100.0 * share)
        });
        print(&format!("{n} shapes{of_many}"))
    }

    /// Every shape that the flags ask for.
    fn each(&self, mut run: impl FnMut(Shapes, GemmShape) -> Result<()>) -> Result<()> {
        for &shapes in &self.kernels.shapes {
            for &(d_out, d_in) in shapes.linears() {
                for &rows in &self.rows {
                    check_size("an input", &[rows, d_out.max(d_in)], MAX_ELEMENTS)?;
                    for direction in [Direction::Forward, Direction::Backward] {
                        if rows <= 16 && direction == Direction::Backward {
                            continue; // Nothing trains on so few.
                        }
                        let weights = self.kernels.weights();
                        run(shapes, GemmShape { rows, d_out, d_in, direction, weights })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// On a GPU, by what `POLYTAPE_CUDA_GEMM` names. Ten products are queued at a time, then waited for.
    fn shape_on_cuda(&self, cuda: &Cuda, model: Shapes, shape: GemmShape) -> Result<()> {
        const QUEUED: u32 = 10;
        let mut case = GemmCase::new(cuda, shape).on_tensor_cores();
        let worst = case.check()?;
        let last = cuda.number(0.0);
        let timing = self.kernels.time(|| {
            (0..QUEUED).for_each(|_| case.run());
            cuda.numbers(&last);
        });
        let [median_s, min_s] = [timing.median_s, timing.min_s].map(|s| s / f64::from(QUEUED));
        let (flops, bytes) = (shape.flops() / median_s, shape.weight_bytes() / median_s);
        let direction = if shape.direction == Direction::Forward { "forward" } else { "backward" };
        if self.common.json {
            return print_json(&json!({
                "what": "gemm", "model": model.name(), "direction": direction, "rows": shape.rows,
                "d_out": shape.d_out, "d_in": shape.d_in, "weights": shape.weights.to_string(),
                "dtype": cuda.compute_dtype().to_string(), "device": cuda.device().name(),
                "kernels": cuda.gemm().name(), "median_s": median_s, "min_s": min_s,
                "tflop_per_s": flops / 1e12, "gb_per_s": bytes / 1e9,
                "worst_error_in_bounds": worst,
            }));
        }
        print(&format!(
            "{:<13} {direction:<8} {:>5} x {:>4} x {:>4} {:<6} {:>9.4} ms {:>7.1} TFLOP/s {:>7.1} GB/s",
            model.name(),
            shape.rows,
            shape.d_out,
            shape.d_in,
            cuda.gemm().name(),
            1e3 * median_s,
            flops / 1e12,
            bytes / 1e9,
        ))
    }

    /// The share of the peak that bounds it.
    fn shape(&self, cpu: &Cpu, model: Shapes, shape: GemmShape) -> Result<f64> {
        let mut case = GemmCase::new(cpu, shape);
        let worst = case.check()?;
        let peaks = cpu.peaks();
        let timing = self.kernels.time(|| case.run());
        let on_tiles = cpu.compute_dtype() == Dtype::Bf16 && shape.weights == Dtype::Bf16;
        let work = [shape.flops(), shape.weight_bytes()];
        let rates = Rates::new(timing.median_s, work, &peaks, on_tiles && shape.rows > 16);
        let direction = if shape.direction == Direction::Forward { "forward" } else { "backward" };
        if self.common.json {
            let mut line = json!({
                "what": "gemm", "model": model.name(), "direction": direction, "rows": shape.rows,
                "d_out": shape.d_out, "d_in": shape.d_in, "weights": shape.weights.to_string(),
                "dtype": cpu.compute_dtype().to_string(), "isa": cpu.isa().name(),
                "threads": cpu.n_threads(), "median_s": timing.median_s, "min_s": timing.min_s,
                "gflop_per_s": rates.flop_per_s / 1e9, "gb_per_s": rates.bytes_per_s / 1e9,
                "share_of_peak": rates.share(), "worst_error_in_bounds": worst,
            });
            add_peaks(&mut line, &peaks);
            print_json(&line)?;
        } else {
            print(&format!(
                "{:<13} {direction:<8} {:>5} x {:>4} x {:>4} {}",
                model.name(),
                shape.rows,
                shape.d_out,
                shape.d_in,
                rates.line(),
            ))?;
        }
        Ok(rates.share())
    }
}

#[derive(Args)]
pub(super) struct Routed {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    kernels: Kernels,
    /// Tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [128, 1024, 4096], value_parser = up_to(MAX_ROWS))]
    rows: Vec<usize>,
    /// Rank.
    #[arg(long, default_value_t = 8, value_parser = up_to(MAX_RANK))]
    r: usize,
    /// Skills.
    #[arg(long, default_value_t = 4, value_parser = up_to(MAX_SKILLS))]
    n_skills: usize,
    /// Splits; must divide the widths.
    #[arg(long, default_value_t = 4, value_parser = up_to(MAX_SPLITS))]
    n_splits: usize,
    /// Tasks in the batch.
    #[arg(long, default_value_t = 8, value_parser = up_to(MAX_TASKS))]
    n_tasks: usize,
}

impl Routed {
    pub(super) fn run(&self) -> Result<()> {
        let cpu = cpu(&self.common, "bench routed")?;
        let mut overheads = Vec::new();
        for &shapes in &self.kernels.shapes {
            for &(d_out, d_in) in shapes.linears() {
                if d_out % self.n_splits != 0 || d_in % self.n_splits != 0 {
                    return Err(Error::Usage(format!(
                        "--n-splits {} divides not both widths of {d_in} -> {d_out}",
                        self.n_splits
                    )));
                }
                for &rows in &self.rows {
                    let Self { r, n_skills, n_splits, n_tasks, .. } = *self;
                    check_size("an input", &[rows, d_out.max(d_in)], MAX_ELEMENTS)?;
                    check_size("the bank", &[n_skills, d_in + d_out, r], MAX_ELEMENTS)?;
                    check_size(
                        "the tasks' mixed pairs",
                        &[n_tasks, d_in + d_out, r],
                        MAX_PAIR_ELEMENTS,
                    )?;
                    check_size("the logits", &[n_tasks, n_splits, n_skills], MAX_ELEMENTS)?;
                    let weights = self.kernels.weights();
                    let shape =
                        RoutedShape { rows, d_out, d_in, r, n_skills, n_splits, n_tasks, weights };
                    overheads.push(self.shape(&cpu, shapes, shape)?);
                }
            }
        }
        let overhead = mean(&overheads);
        if self.common.json {
            return print_json(&json!({
                "what": "routed", "isa": cpu.isa().name(), "threads": cpu.n_threads(),
                "shapes": overheads.len(), "geometric_mean_step_over_frozen": overhead,
            }));
        }
        print(&format!(
            "{} shapes; a step takes {:.3} times that of the frozen linear",
            overheads.len(),
            overhead.unwrap_or(f64::NAN)
        ))
    }

    /// A step with the routed LoRA over one without.
    fn shape(&self, cpu: &Cpu, model: Shapes, shape: RoutedShape) -> Result<f64> {
        let mut case = RoutedCase::new(cpu, shape);
        let worst = case.check()?;
        let peaks = cpu.peaks();
        // In turns, so that a machine that slows down slows both.
        let mut ratios = [Vec::new(), Vec::new()];
        let mut last = [0.0; 4];
        for _ in 0..3 {
            last = [
                self.kernels.time(|| case.run_frozen()).median_s,
                self.kernels.time(|| case.run_routed()).median_s,
                self.kernels.time(|| case.run_frozen_step()).median_s,
                self.kernels.time(|| case.run_routed_step()).median_s,
            ];
            ratios[0].push(last[1] / last[0]);
            ratios[1].push(last[3] / last[2]);
        }
        let [forward, step] = ratios.map(|mut ratios| {
            ratios.sort_by(f64::total_cmp);
            ratios[1]
        });
        let on_tiles = cpu.compute_dtype() == Dtype::Bf16 && shape.weights == Dtype::Bf16;
        let [frozen, routed] = [shape.frozen_work(), shape.routed_work()];
        let [frozen_step, routed_step] = [shape.frozen_step_work(), shape.routed_step_work()];
        let rates = [
            ("frozen", frozen, last[0]),
            ("routed", routed, last[1]),
            ("frozen_step", frozen_step, last[2]),
            ("routed_step", routed_step, last[3]),
        ]
        .map(|(name, work, seconds)| (name, Rates::new(seconds, work, &peaks, on_tiles)));
        if self.common.json {
            let mut line = json!({
                "what": "routed", "model": model.name(), "rows": shape.rows, "d_out": shape.d_out,
                "d_in": shape.d_in, "r": shape.r, "n_skills": shape.n_skills,
                "n_splits": shape.n_splits, "n_tasks": shape.n_tasks,
                "weights": shape.weights.to_string(), "dtype": cpu.compute_dtype().to_string(),
                "isa": cpu.isa().name(), "threads": cpu.n_threads(), "forward_over_frozen": forward,
                "step_over_frozen": step, "worst_error_in_bounds": worst,
            });
            for (name, rates) in &rates {
                line[format!("{name}_s")] = rates.seconds.into();
                rates.add_to(&mut line, name);
            }
            add_peaks(&mut line, &peaks);
            print_json(&line)?;
            return Ok(step);
        }
        for ((name, rates), times) in rates.iter().zip([1.0, forward, 1.0, step]) {
            print(&format!(
                "{:<13} {:<11} {:>5} x {:>4} x {:>4} {} {times:>6.3} of frozen",
                model.name(),
                name.replace('_', " "),
                shape.rows,
                shape.d_out,
                shape.d_in,
                rates.line(),
            ))?;
        }
        Ok(step)
    }
}

#[derive(Args)]
pub(super) struct Attention {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    kernels: Kernels,
    /// Tokens of a sequence.
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512, 1024], value_parser = up_to(MAX_ROWS))]
    rows: Vec<usize>,
    /// Sequences.
    #[arg(long, default_value_t = 4, value_parser = up_to(MAX_ROWS))]
    batch: usize,
}

impl Attention {
    pub(super) fn run(&self) -> Result<()> {
        let cpu = cpu(&self.common, "bench attention")?;
        let mut n = 0;
        for &shapes in &self.kernels.shapes {
            let (n_heads, n_kv_heads, head_dim) = shapes.heads();
            for &rows in &self.rows {
                check_size("the queries", &[self.batch, rows, n_heads, head_dim], MAX_ELEMENTS)?;
                let causal = shapes == Shapes::Llama1b;
                let one = AttentionShape {
                    batch: self.batch,
                    n_queries: rows,
                    n_keys: rows,
                    n_heads,
                    n_kv_heads,
                    head_dim,
                    causal,
                };
                self.shape(&cpu, shapes, one)?;
                self.shape(&cpu, shapes, AttentionShape { n_queries: 1, ..one })?;
                n += 2;
            }
        }
        if self.common.json {
            return print_json(&json!({
                "what": "attention", "isa": cpu.isa().name(), "threads": cpu.n_threads(),
                "shapes": n,
            }));
        }
        print(&format!("{n} shapes"))
    }

    fn shape(&self, cpu: &Cpu, model: Shapes, shape: AttentionShape) -> Result<()> {
        let case = AttentionCase::new(cpu, shape);
        let worst = case.check()?;
        let peaks = cpu.peaks();
        let on_tiles = cpu.compute_dtype() == Dtype::Bf16 && shape.n_queries > 1;
        let element = if cpu.compute_dtype() == Dtype::Bf16 { 2.0 } else { 4.0 };
        let forward = self.kernels.time(|| case.run());
        let backward = self.kernels.time(|| case.run_backward());
        let rates = [
            ("forward", [shape.flops(), element * shape.elements_read()], forward),
            ("backward", [2.5 * shape.flops(), element * shape.elements_read_backward()], backward),
        ]
        .map(|(name, work, timing)| (name, Rates::new(timing.median_s, work, &peaks, on_tiles)));
        if self.common.json {
            let mut line = json!({
                "what": "attention", "model": model.name(), "batch": shape.batch,
                "n_queries": shape.n_queries, "n_keys": shape.n_keys, "n_heads": shape.n_heads,
                "n_kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim,
                "causal": shape.causal, "dtype": cpu.compute_dtype().to_string(),
                "isa": cpu.isa().name(), "threads": cpu.n_threads(),
                "peak_gflop_per_s": rates[0].1.peak / 1e9, "worst_error_in_bounds": worst,
            });
            for (name, rates) in &rates {
                line[format!("{name}_s")] = rates.seconds.into();
                rates.add_to(&mut line, name);
            }
            add_peaks(&mut line, &peaks);
            return print_json(&line);
        }
        for (name, rates) in &rates {
            print(&format!(
                "{:<13} {name:<8} {:>4} queries, {:>4} keys{} {}",
                model.name(),
                shape.n_queries,
                shape.n_keys,
                if shape.causal { ", causal" } else { "        " },
                rates.line(),
            ))?;
        }
        Ok(())
    }
}
