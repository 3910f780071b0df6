//! `bench gemm|routed|attention`: kernels on shapes of known models, each checked against the oracle
//! first, beside the peaks that were measured in the moments before.

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{
    bench::{
        AttentionCase, AttentionShape, Direction, GemmCase, GemmShape, RoutedCase, RoutedShape,
        Timing, time,
    },
    cli::{Common, Device, print, print_json},
    dtype::Dtype,
    error::Result,
    kernels::{
        Backend,
        cpu::Cpu,
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

/// Geometric mean.
fn mean(values: &[f64]) -> f64 {
    (values.iter().map(|v| v.ln()).sum::<f64>() / values.len().max(1) as f64).exp()
}

#[derive(Args)]
pub(super) struct Gemm {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    kernels: Kernels,
    /// Rows of the input: tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 512, 1024, 4096])]
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
                "geometric_mean_share_of_peak": (!shares.is_empty()).then_some(share),
            }));
        }
        print(&format!("{n} shapes; those of many rows reach {:.0} % of the peak", 100.0 * share))
    }

    /// Every shape that the flags ask for.
    fn each(&self, mut run: impl FnMut(Shapes, GemmShape) -> Result<()>) -> Result<()> {
        for &shapes in &self.kernels.shapes {
            for &(d_out, d_in) in shapes.linears() {
                for &rows in self.rows.iter().filter(|&&rows| rows > 0) {
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
        let peak = peaks.amx.filter(|_| on_tiles && shape.rows > 16).unwrap_or(peaks.fma);
        let flops = shape.flops() / timing.median_s;
        let bytes = shape.weight_bytes() / timing.median_s;
        let share = (flops / peak).max(bytes / peaks.read);
        let direction = if shape.direction == Direction::Forward { "forward" } else { "backward" };
        if self.common.json {
            print_json(&json!({
                "what": "gemm", "model": model.name(), "direction": direction, "rows": shape.rows,
                "d_out": shape.d_out, "d_in": shape.d_in, "weights": shape.weights.to_string(),
                "dtype": cpu.compute_dtype().to_string(), "isa": cpu.isa().name(),
                "threads": cpu.n_threads(), "median_s": timing.median_s, "min_s": timing.min_s,
                "gflop_per_s": flops / 1e9, "gb_per_s": bytes / 1e9,
                "fma_gflop_per_s": peaks.fma / 1e9, "amx_gflop_per_s": peaks.amx.map(|p| p / 1e9),
                "read_gb_per_s": peaks.read / 1e9, "share_of_peak": share,
                "worst_error_in_bounds": worst,
            }))?;
        } else {
            print(&format!(
                "{:<13} {direction:<8} {:>5} x {:>4} x {:>4} {:>9.3} ms {:>7.1} of {:>6.1} GFLOP/s \
                 {:>6.2} of {:>5.1} GB/s {:>4.0} %",
                model.name(),
                shape.rows,
                shape.d_out,
                shape.d_in,
                1e3 * timing.median_s,
                flops / 1e9,
                peak / 1e9,
                bytes / 1e9,
                peaks.read / 1e9,
                100.0 * share,
            ))?;
        }
        Ok(share)
    }
}

#[derive(Args)]
pub(super) struct Routed {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    kernels: Kernels,
    /// Tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [128, 1024, 4096], value_parser = positive)]
    rows: Vec<usize>,
    /// Rank.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    r: usize,
    /// Skills.
    #[arg(long, default_value_t = 4, value_parser = positive)]
    n_skills: usize,
    /// Splits; must divide the widths.
    #[arg(long, default_value_t = 4, value_parser = positive)]
    n_splits: usize,
    /// Tasks in the batch.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    n_tasks: usize,
}

fn positive(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1_048_576) => Ok(n),
        _ => Err("not a number from 1 to 1048576".into()),
    }
}

impl Routed {
    pub(super) fn run(&self) -> Result<()> {
        let cpu = cpu(&self.common, "bench routed")?;
        let mut overheads = Vec::new();
        for &shapes in &self.kernels.shapes {
            for &(d_out, d_in) in shapes.linears() {
                if d_out % self.n_splits != 0 || d_in % self.n_splits != 0 {
                    return Err(crate::Error::Usage(format!(
                        "--n-splits {} divides not both widths of {d_in} -> {d_out}",
                        self.n_splits
                    )));
                }
                for &rows in &self.rows {
                    let Self { r, n_skills, n_splits, n_tasks, .. } = *self;
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
            overhead
        ))
    }

    /// A step with the routed LoRA over one without.
    fn shape(&self, cpu: &Cpu, model: Shapes, shape: RoutedShape) -> Result<f64> {
        let mut case = RoutedCase::new(cpu, shape);
        let worst = case.check()?;
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
        let values: [Value; 4] = last.map(Value::from);
        let [frozen_s, routed_s, frozen_step_s, routed_step_s] = values;
        if self.common.json {
            print_json(&json!({
                "what": "routed", "model": model.name(), "rows": shape.rows, "d_out": shape.d_out,
                "d_in": shape.d_in, "r": shape.r, "n_skills": shape.n_skills,
                "n_splits": shape.n_splits, "n_tasks": shape.n_tasks,
                "weights": shape.weights.to_string(), "dtype": cpu.compute_dtype().to_string(),
                "isa": cpu.isa().name(), "threads": cpu.n_threads(), "frozen_s": frozen_s,
                "routed_s": routed_s, "frozen_step_s": frozen_step_s,
                "routed_step_s": routed_step_s, "forward_over_frozen": forward,
                "step_over_frozen": step, "worst_error_in_bounds": worst,
            }))?;
        } else {
            print(&format!(
                "{:<13} {:>5} x {:>4} x {:>4}  frozen {:>8.3} ms, step {:>8.3} ms; with routed LoRA \
                 {forward:.3} and {step:.3} times that",
                model.name(),
                shape.rows,
                shape.d_out,
                shape.d_in,
                1e3 * last[0],
                1e3 * last[2],
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
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512, 1024], value_parser = positive)]
    rows: Vec<usize>,
    /// Sequences.
    #[arg(long, default_value_t = 4, value_parser = positive)]
    batch: usize,
}

impl Attention {
    pub(super) fn run(&self) -> Result<()> {
        let cpu = cpu(&self.common, "bench attention")?;
        let mut shares = Vec::new();
        for &shapes in &self.kernels.shapes {
            let (n_heads, n_kv_heads, head_dim) = shapes.heads();
            for &rows in &self.rows {
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
                shares.push(self.shape(&cpu, shapes, one)?);
                shares.push(self.shape(&cpu, shapes, AttentionShape { n_queries: 1, ..one })?);
            }
        }
        if self.common.json {
            return print_json(&json!({
                "what": "attention", "isa": cpu.isa().name(), "threads": cpu.n_threads(),
                "shapes": shares.len(),
            }));
        }
        print(&format!("{} shapes", shares.len()))
    }

    fn shape(&self, cpu: &Cpu, model: Shapes, shape: AttentionShape) -> Result<f64> {
        let case = AttentionCase::new(cpu, shape);
        let worst = case.check()?;
        let on_tiles = cpu.compute_dtype() == Dtype::Bf16 && shape.n_queries > 1;
        let peak = cpu.amx_peak().filter(|_| on_tiles).unwrap_or_else(|| cpu.fma_peak());
        let forward = self.kernels.time(|| case.run());
        let backward = self.kernels.time(|| case.run_backward());
        let flops = [shape.flops() / forward.median_s, 2.5 * shape.flops() / backward.median_s];
        if self.common.json {
            print_json(&json!({
                "what": "attention", "model": model.name(), "batch": shape.batch,
                "n_queries": shape.n_queries, "n_keys": shape.n_keys, "n_heads": shape.n_heads,
                "n_kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim,
                "causal": shape.causal, "dtype": cpu.compute_dtype().to_string(),
                "isa": cpu.isa().name(), "threads": cpu.n_threads(),
                "forward_s": forward.median_s, "backward_s": backward.median_s,
                "forward_gflop_per_s": flops[0] / 1e9, "backward_gflop_per_s": flops[1] / 1e9,
                "peak_gflop_per_s": peak / 1e9, "worst_error_in_bounds": worst,
            }))?;
        } else {
            print(&format!(
                "{:<13} {:>4} queries, {:>4} keys{}: forward {:>8.3} ms, {:>6.1} GFLOP/s; backward \
                 {:>8.3} ms, {:>6.1} GFLOP/s (peak {:.0})",
                model.name(),
                shape.n_queries,
                shape.n_keys,
                if shape.causal { ", causal" } else { "" },
                1e3 * forward.median_s,
                flops[0] / 1e9,
                1e3 * backward.median_s,
                flops[1] / 1e9,
                peak / 1e9,
            ))?;
        }
        Ok(flops[0] / peak)
    }
}
