//! Parity with PyTorch + PEFT on recorded fixtures (`tests/data/parity`, made by
//! `tests/data/record_peft.py`): logits, losses, gradients under recorded router noise, AdamW steps
//! and greedy tokens. The oracle backend runs the whole model in f64; the CPU backend runs it on
//! every instruction set that this machine has.
#![allow(clippy::unwrap_used)]

#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "common/skipped.rs"]
mod skipped;
#[path = "common/wanted.rs"]
mod wanted;
#[path = "x86_emulator/mod.rs"]
mod x86_emulator;

use std::path::{Path, PathBuf};

use polytape::{
    Dtype,
    generate::{Engine, GenerateOptions},
    kernels::{
        Backend,
        cpu::{Cpu, isa::Isa},
        ops::{Noise, Order},
        oracle::Oracle,
    },
    model::{Adapter, Batch, Example, Model, network::Sides},
    tape::Tape,
    train::{RouterSampling, Schedule, TrainConfig, Trainer, checkpoint::OPTIMIZER_FILE},
};
use safetensors::SafeTensors;
use serde_json::Value;

const CASES: [&str; 16] = [
    "tiny",
    "v11-untied",
    "v11-tied",
    "v10-hub",
    "sharded",
    "mt5",
    "bf16",
    "f16",
    "llama",
    "llama-4",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gpt2",
    "bart",
];

/// A fixture: folders, rows and what PEFT said.
struct Case {
    dir: PathBuf,
    expected: Value,
    tensors: Vec<u8>,
    rows: Vec<Example>,
}

/// The repository: where this was built, or where `POLYTAPE_ROOT` says (a prebuilt test elsewhere).
fn root() -> PathBuf {
    std::env::var_os("POLYTAPE_ROOT").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

impl Case {
    fn open(name: &str) -> Self {
        let dir = root().join("tests/data/parity").join(name);
        let expected: Value =
            serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        // Not of a base alone.
        let tensors = std::fs::read(dir.join("expected.safetensors")).unwrap_or_default();
        let ids =
            |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
        let rows = expected["rows"].as_array().unwrap();
        let rows = rows
            .iter()
            .map(|row| Example {
                input: ids(&row["input_ids"]),
                labels: ids(&row["label_ids"]),
                task: row["task_id"].as_u64().unwrap() as u32,
                mixing: None,
            })
            .collect();
        Self { dir, expected, tensors, rows }
    }

    /// A recorded tensor.
    fn tensor(&self, name: &str) -> Option<Vec<f64>> {
        let all = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = all.tensor(name).ok()?;
        Some(match view.dtype() {
            safetensors::Dtype::F32 => view
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|&b| f64::from(f32::from_le_bytes(b)))
                .collect(),
            safetensors::Dtype::F64 => {
                view.data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
            }
            other => panic!("{other:?}"),
        })
    }

    fn model<B: Backend>(&self, backend: B) -> Model<B> {
        Model::open_on(backend, self.dir.join("base")).unwrap()
    }

    fn adapter<B: Backend>(&self, model: &Model<B>) -> Adapter<B> {
        Adapter::open(model, self.dir.join("adapter")).unwrap()
    }

    fn numbers(&self, path: [&str; 2]) -> Vec<f64> {
        let list = self.expected[path[0]][path[1]].as_array().unwrap();
        list.iter().map(|v| v.as_f64().unwrap()).collect()
    }

    fn examples(&self) -> Vec<&Example> {
        self.rows.iter().collect()
    }
}

fn assert_close(got: &[f64], want: &[f64], relative: f64, absolute: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        assert!(error <= relative * w.abs() + absolute, "{what}[{i}]: {g}, not {w} ({error:e})");
    }
}

/// The largest magnitude: gradients are compared relative to their tensor's.
fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |a, v| a.max(v.abs()))
}

/// Logits of all rows of a case, in one ragged batch.
fn logits<B: Backend>(case: &Case, model: &Model<B>, adapter: &Adapter<B>) -> Vec<Vec<f64>> {
    let batch = Batch::new(&case.rows, model.layout(), 0);
    let rows = batch.rows_by_task();
    let route = adapter.route(&rows.tasks, Noise::Off);
    let mixture = adapter.mixture(model.backend(), &route, false);
    let adapted = Some(adapter.on_tape(&mixture, None));
    let mut tape = Tape::inference(model.backend(), adapted, Order::Panel);
    let sides = Sides::new(&batch, &rows, None);
    let all = model.network().logits(&mut tape, &batch, &sides);
    let vocab = model.vocab_size();
    let spans = &batch.label_spans;
    spans
        .starts
        .iter()
        .zip(&spans.lens)
        .map(|(&start, &len)| all[start * vocab..(start + len) * vocab].to_vec())
        .collect()
}

fn check_evaluation<B: Backend>(case: &Case, backend: B, tolerance: f64, what: &str) {
    let model = case.model(backend);
    let adapter = case.adapter(&model);
    let tasks = case.rows.iter().map(|row| row.task);
    for (i, got) in logits(case, &model, &adapter).iter().enumerate() {
        let want = case.tensor(&format!("eval.logits.{i}")).unwrap();
        let absolute = tolerance * largest(&want);
        assert_close(got, &want, 0.0, absolute, &format!("{what} logits of row {i}"));
    }
    let engine = Engine::new(&model, Some(&adapter), tasks, 3);
    let nll: Vec<f64> = engine.nll(&case.examples()).iter().map(|row| row.iter().sum()).collect();
    assert_close(&nll, &case.numbers(["eval", "nll"]), tolerance, 0.0, &format!("{what} nll"));
    let options = GenerateOptions { max_new_tokens: 8, ..Default::default() };
    let tokens = engine.generate(&case.examples(), &options, |_, _| ());
    let want: Vec<Vec<u32>> =
        serde_json::from_value(case.expected["eval"]["greedy"].clone()).unwrap();
    assert_eq!(tokens, want, "{what} greedy tokens");
    check_base(case, &model, tolerance, what);
}

/// The base alone, in cases that have it recorded.
fn check_base<B: Backend>(case: &Case, model: &Model<B>, tolerance: f64, what: &str) {
    let Some(base) = case.expected.get("base") else { return };
    let engine = Engine::new(model, None, [], 2);
    let nll: Vec<f64> = engine.nll(&case.examples()).iter().map(|row| row.iter().sum()).collect();
    assert_close(&nll, &case.numbers(["base", "nll"]), tolerance, 0.0, &format!("{what} base nll"));
    let options = GenerateOptions { max_new_tokens: 8, ..Default::default() };
    let tokens = engine.generate(&case.examples(), &options, |_, _| ());
    let want: Vec<Vec<u32>> = serde_json::from_value(base["greedy"].clone()).unwrap();
    assert_eq!(tokens, want, "{what} base greedy tokens");
}

/// The recorded noise of every adapted linear, in the order of the router's draws.
fn noise<B: Backend>(case: &Case, adapter: &Adapter<B>) -> Vec<f64> {
    adapter
        .targets()
        .iter()
        .flat_map(|target| case.tensor(&format!("noise.{}", target.path)).unwrap())
        .collect()
}

fn train_config(case: &Case, sampling: bool) -> TrainConfig {
    let settings = &case.expected["train"];
    let number = |name: &str| settings[name].as_f64().unwrap();
    TrainConfig {
        learning_rate: number("learning_rate"),
        router_learning_rate: number("router_learning_rate"),
        weight_decay: number("weight_decay"),
        router_weight_decay: number("router_weight_decay"),
        max_grad_norm: 0.0,
        schedule: Schedule::Constant,
        router_sampling: if sampling { RouterSampling::On } else { RouterSampling::Off },
        dropout: Some(0.0),
        ..TrainConfig::default()
    }
}

fn check_gradients<B: Backend>(
    case: &Case,
    backend: B,
    checkpointing: bool,
    tolerance: f64,
    what: &str,
) {
    let model = case.model(backend);
    let adapter = case.adapter(&model);
    let noise = noise(case, &adapter);
    let config = TrainConfig { checkpointing, ..train_config(case, true) };
    let (banks, n_bank) = (adapter.banks().to_vec(), adapter.n_bank_params());
    let targets = adapter.targets().to_vec();
    let n_logits = (adapter.n_params() - n_bank) / targets.len();
    let mut trainer = Trainer::new(&model, adapter, config).unwrap();
    trainer.set_noise(Some(noise));
    let report = trainer.step(&case.examples()).unwrap();
    let want = case.expected["noise"]["loss"].as_f64().unwrap();
    assert_close(&[report.loss], &[want], tolerance, 0.0, &format!("{what} loss"));
    let gradients = model.backend().download(trainer.gradients());
    let scale: f64 = targets
        .iter()
        .map(|t| {
            largest(&case.tensor(&format!("grad.{}.poly_router.module_logits", t.path)).unwrap())
        })
        .fold(0.0, f64::max);
    for (i, (target, bank)) in targets.iter().zip(banks.iter().flatten()).enumerate() {
        let logits = n_bank + i * n_logits..n_bank + (i + 1) * n_logits;
        for (part, range) in [
            ("poly_lora_A", bank.a()),
            ("poly_lora_B", bank.b()),
            ("poly_router.module_logits", logits),
        ] {
            let name = format!("grad.{}.{part}", target.path);
            let want = case.tensor(&name).unwrap();
            // A router gradient is a difference of large numbers: relative to the largest one.
            let size =
                if part.starts_with("poly_router") { scale.max(1e-3) } else { largest(&want) };
            assert_close(
                &gradients[range],
                &want,
                0.0,
                tolerance * 10.0 * size,
                &format!("{what} {name}"),
            );
        }
    }
}

fn check_training<B: Backend>(case: &Case, backend: B, tolerance: f64, what: &str) {
    let model = case.model(backend);
    let adapter = case.adapter(&model);
    let mut trainer = Trainer::new(&model, adapter, train_config(case, false)).unwrap();
    let want = case.numbers(["train", "losses"]);
    let rows = case.examples();
    let n = case.expected["train"]["step_rows"].as_u64().unwrap() as usize;
    for (step, want) in want.iter().enumerate() {
        let batch: Vec<_> = (0..n).map(|i| rows[(step * n + i) % rows.len()]).collect();
        let report = trainer.step(&batch).unwrap();
        assert_close(
            &[report.loss],
            &[*want],
            tolerance,
            0.0,
            &format!("{what} step {}", step + 1),
        );
    }
    for (path, module) in trainer.adapter().modules(model.backend()) {
        for (part, got) in [
            ("poly_lora_A", &module.lora_a.values),
            ("poly_lora_B", &module.lora_b.values),
            ("poly_router.module_logits", &module.router_logits),
        ] {
            let Some(want) = case.tensor(&format!("final.{path}.{part}")) else { continue };
            let got: Vec<f64> = got.iter().map(|&v| f64::from(v)).collect();
            assert_close(&got, &want, 1e-3, 1e-4, &format!("{what} final {path} {part}"));
        }
    }
}

#[test]
fn the_oracle_evaluates_as_peft() {
    for name in CASES {
        check_evaluation(&Case::open(name), Oracle, 1e-5, name);
    }
}

#[test]
fn the_oracle_has_pefts_gradients() {
    for name in CASES {
        for checkpointing in [false, true] {
            check_gradients(&Case::open(name), Oracle, checkpointing, 5e-6, name);
        }
    }
}

#[test]
fn the_oracle_trains_as_peft() {
    for name in CASES {
        check_training(&Case::open(name), Oracle, 1e-4, name);
    }
}

/// Every instruction set; those that this CPU lacks, which are emulated and slow, in one case alone.
fn isas(name: &str) -> Vec<Isa> {
    let mut isas = Isa::available();
    if name == "tiny" {
        isas.extend(x86_emulator::lacking());
    }
    isas
}

/// Every instruction set, in f32.
fn on_every_isa(name: &str, check: impl Fn(Cpu, &str)) {
    for isa in isas(name) {
        check(Cpu::with_isa(isa, Dtype::F32, 2).unwrap().poisoned(), isa.name());
    }
}

#[test]
fn the_cpu_evaluates_as_peft() {
    for name in CASES {
        let case = Case::open(name);
        on_every_isa(name, |cpu, isa| check_evaluation(&case, cpu, 1e-5, &format!("{name} {isa}")));
    }
}

#[test]
fn the_cpu_has_pefts_gradients() {
    for name in CASES {
        let case = Case::open(name);
        on_every_isa(name, |cpu, isa| {
            for checkpointing in [false, true] {
                check_gradients(&case, cpu.clone(), checkpointing, 1e-5, &format!("{name} {isa}"));
            }
        });
    }
}

#[test]
fn the_cpu_trains_as_peft() {
    for name in CASES {
        let case = Case::open(name);
        on_every_isa(name, |cpu, isa| check_training(&case, cpu, 1e-3, &format!("{name} {isa}")));
    }
}

/// As `torch.nn.utils.clip_grad_norm_`: a norm above the bound becomes the bound, one below stays.
#[test]
fn clipping_scales_large_gradients_only() {
    let case = Case::open("tiny");
    let model = case.model(Cpu::new(Dtype::F32, 1).unwrap());
    // The gradient that AdamW saw, by its first moment, and its norm before.
    let first_moment = |max_grad_norm: f64| {
        let config = TrainConfig { max_grad_norm, ..train_config(&case, false) };
        let mut trainer = Trainer::new(&model, case.adapter(&model), config).unwrap();
        let norm = trainer.step(&case.examples()).unwrap().grad_norm;
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clipped.safetensors");
        trainer.save_optimizer(&path).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let moment =
            SafeTensors::deserialize(&bytes).unwrap().tensor("exp_avg").unwrap().data().to_vec();
        let moment = moment.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b)));
        (moment.collect::<Vec<_>>(), norm)
    };
    let (whole, norm) = first_moment(0.0);
    assert!(norm > 0.0 && largest(&whole) > 0.0);
    assert_eq!(first_moment(3.0 * norm).0, whole);
    let halves: Vec<_> = whole.iter().map(|m| m * 0.5 * norm / (norm + 1e-6)).collect();
    assert_close(&first_moment(0.5 * norm).0, &halves, 1e-6, 1e-12, "clipped to a half");
}

/// Examples of different tasks lie in one row of tokens and compute what each computes alone: the
/// same bits of nll, and gradients that add up.
#[test]
fn packed_examples_do_not_see_each_other() {
    for name in ["llama", "mistral", "qwen3", "gemma3", "gpt2", "tiny"] {
        let case = Case::open(name);
        let tasks = || case.rows.iter().map(|row| row.task);
        on_every_isa(name, |cpu, isa| {
            let model = case.model(cpu);
            let adapter = case.adapter(&model);
            let engine = Engine::new(&model, Some(&adapter), tasks(), case.rows.len());
            let packed = engine.nll(&case.examples());
            for (row, packed) in case.rows.iter().zip(&packed) {
                assert_eq!(&engine.nll(&[row])[0], packed, "{name} {isa}");
            }
        });

        let model = case.model(Oracle);
        let gradients = |examples: &[&Example]| {
            let config = train_config(&case, false);
            let mut trainer = Trainer::new(&model, case.adapter(&model), config).unwrap();
            trainer.step(examples).unwrap();
            model.backend().download(trainer.gradients())
        };
        let n_labels: usize = case.rows.iter().map(|row| row.labels.len()).sum();
        let mut sum: Vec<f64> = Vec::new();
        for row in &case.rows {
            let share = row.labels.len() as f64 / n_labels as f64;
            let alone = gradients(&[row]);
            sum.resize(alone.len(), 0.0);
            sum.iter_mut().zip(&alone).for_each(|(sum, g)| *sum += share * g);
        }
        let packed = gradients(&case.examples());
        // The share of a loss is rounded to f32 on its way in.
        assert_close(&packed, &sum, 1e-6, 1e-6 * largest(&sum), &format!("{name} gradients"));
    }
}

/// The base of a case with every weight rounded to bf16, as PEFT's bf16 runs had it.
fn bf16_base(case: &Case, name: &str) -> PathBuf {
    // Also where this was not built: under the repository that the battery names.
    let tmp = std::env::var_os("POLYTAPE_ROOT").map(|root| Path::new(&root).join("target/tmp"));
    let tmp = tmp.unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    let dir = tmp.join("parity-bf16").join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::copy(case.dir.join("base/config.json"), dir.join("config.json")).unwrap();
    let mut weights: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for entry in std::fs::read_dir(case.dir.join("base")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let values: Vec<f32> = match view.dtype() {
                safetensors::Dtype::F32 => {
                    view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
                }
                safetensors::Dtype::BF16 => {
                    let chunks = view.data().as_chunks().0.iter();
                    chunks.map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect()
                }
                safetensors::Dtype::F16 => {
                    let chunks = view.data().as_chunks().0.iter();
                    chunks.map(|&b| half::f16::from_le_bytes(b).to_f32()).collect()
                }
                other => panic!("{other:?}"),
            };
            let rounded =
                values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
            weights.push((name, view.shape().to_vec(), rounded));
        }
    }
    let views = weights.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::BF16;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    dir
}

/// In bf16 the error of the logits against the same model in f64 is at most 1.5 times PEFT's own.
#[test]
fn bf16_is_as_precise_as_pefts() {
    for name in CASES {
        let case = Case::open(name);
        let base = bf16_base(&case, name);
        let peft = case.expected["bf16"]["logits_rms_error"].as_f64().unwrap();
        for isa in isas(name) {
            let cpu = Cpu::with_isa(isa, Dtype::Bf16, 2).unwrap().poisoned();
            let ours = logits_rms_error(&case, cpu, &base);
            println!("{name} {}: {ours:.2e}, PEFT {peft:.2e}", isa.name());
            assert!(ours <= 1.5 * peft, "{name} {}: {ours}, PEFT {peft}", isa.name());
        }
    }
}

/// The root mean square of the logits' errors against the same model in f64.
fn logits_rms_error<B: Backend>(case: &Case, backend: B, base: &Path) -> f64 {
    let model = Model::open_on(backend, base).unwrap();
    let adapter = case.adapter(&model);
    let (mut sum, mut n) = (0.0, 0);
    for (i, got) in logits(case, &model, &adapter).iter().enumerate() {
        let truth = case.tensor(&format!("truth.logits.{i}")).unwrap();
        sum += got.iter().zip(&truth).map(|(g, t)| (g - t).powi(2)).sum::<f64>();
        n += truth.len();
    }
    (sum / n as f64).sqrt()
}

/// The CUDA backend, on the emulator and on a GPU where there is one. The emulator is slow: the smallest
/// case and the one that differs most from it.
mod cuda {
    use std::sync::Arc;

    use polytape::kernels::cuda::{Cuda, Gemm, catch_faults};

    use super::{
        cuda_emulator::{Emulator, Event},
        skipped::skipped,
        wanted::is_wanted,
        *,
    };

    const CASES: [&str; 2] = ["tiny", "v10-hub"];

    /// The emulator, where it is wanted; says so if there is none.
    fn emulator() -> Option<Arc<Emulator>> {
        made(Emulator::new)
    }

    /// The same with graphs.
    fn emulator_with_graphs() -> Option<Arc<Emulator>> {
        made(Emulator::with_graphs)
    }

    fn made(make: fn(u64) -> Result<Emulator, String>) -> Option<Arc<Emulator>> {
        if !is_wanted("emulated") {
            return None;
        }
        let why = match make(3) {
            Ok(device) => return Some(Arc::new(device)),
            Err(why) => why,
        };
        skipped(format_args!("the CUDA kernels on the emulator: {why}"));
        None
    }

    /// The backends with their names.
    fn backends(compute: Dtype) -> Vec<(&'static str, Cuda)> {
        let mut backends = Vec::new();
        if let Some(device) = emulator() {
            backends.push(("emulated", Cuda::with_device(device, compute).unwrap()));
        }
        if is_wanted("gpu") {
            match Cuda::new(compute) {
                Ok(cuda) => backends.push(("gpu", cuda)),
                Err(why) => skipped(format_args!("the CUDA kernels on a GPU: {why}")),
            }
        }
        backends
    }

    fn in_f32(check: impl Fn(&Case, Cuda, &str)) {
        for name in CASES {
            for (on, cuda) in backends(Dtype::F32) {
                let run = || {
                    check(&Case::open(name), cuda, &format!("{name} {on}"));
                    Ok(())
                };
                catch_faults(run).unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }

    #[test]
    fn the_kernels_evaluate_as_peft() {
        in_f32(|case, cuda, what| check_evaluation(case, cuda, 1e-5, what));
    }

    #[test]
    fn the_kernels_have_pefts_gradients() {
        in_f32(|case, cuda, what| check_gradients(case, cuda, true, 1e-5, what));
    }

    #[test]
    fn the_kernels_train_as_peft() {
        in_f32(|case, cuda, what| check_training(case, cuda, 1e-3, what));
    }

    #[test]
    fn bf16_is_as_precise_as_pefts() {
        for name in CASES {
            for (on, cuda) in backends(Dtype::Bf16) {
                let case = Case::open(name);
                let base = bf16_base(&case, &format!("{name}-{on}"));
                let ours = logits_rms_error(&case, cuda, &base);
                let peft = case.expected["bf16"]["logits_rms_error"].as_f64().unwrap();
                println!("{name} {on}: {ours:.2e}, PEFT {peft:.2e}");
                assert!(ours <= 1.5 * peft, "{name} {on}: {ours}, PEFT {peft}");
            }
        }
    }

    /// The kernels that each adapted linear adds to those of the base.
    const OF_ADAPTERS: [&str; 10] = [
        "mix",
        "unmix",
        "shrink",
        "shrink_tiles",
        "shrink_stacked",
        "expand_stacked",
        "d_z",
        "d_z_tiles",
        "d_pair",
        "d_pair_tiles",
    ];
    /// Those of the base, and those that a step runs once.
    const OF_A_STEP: [&str; 27] = [
        "route",
        "embed",
        "cache_write",
        "rope",
        "norm_rows",
        "norm_again",
        "norm_backward",
        "linear",
        "linear_full",
        "linear_dot",
        "linear_dot_full",
        "linear_backward",
        "gated",
        "gated_backward",
        "dropout",
        "add",
        "head_softmax",
        "head_backward",
        "argmax",
        "route_backward",
        "route_sum",
        "sum_of_squares",
        "sum_of_squares_full",
        "sum_of_squares_in",
        "add_up",
        "clip_scale",
        "adamw",
    ];

    /// Launches and waits are what a GPU's time goes to where a step is small.
    #[test]
    fn a_step_launches_little_and_is_read_at_its_end() {
        for (name, compute, gemm) in [
            ("tiny", Dtype::F32, Gemm::Mma),
            ("tiny", Dtype::Bf16, Gemm::Mma),
            ("tiny", Dtype::Bf16, Gemm::Wgmma),
            ("llama", Dtype::F32, Gemm::Mma),
        ] {
            let Some(device) = emulator() else { return };
            let cuda = Cuda::with_device(device.clone(), compute).unwrap().with_gemm(gemm).unwrap();
            let case = Case::open(name);
            let model = case.model(cuda);
            let adapter = case.adapter(&model);
            let n_linears = adapter.targets().len();
            let config = TrainConfig { dropout: Some(0.1), ..train_config(&case, true) };
            let mut trainer = Trainer::new(&model, adapter, config).unwrap();
            let _ = device.take_log();
            trainer.step(&case.examples()).unwrap();
            let log = device.take_log();

            let first_read = log.iter().position(|event| matches!(event, Event::Read(_)));
            let (step, reads) = log.split_at(first_read.unwrap());
            // The loss and the norm, when everything is queued.
            assert_eq!(reads, [Event::Read(8), Event::Read(8)], "{name} {compute}");
            let launches: Vec<&str> = step.iter().flat_map(Event::kernels).collect();
            for kernel in &launches {
                let known = OF_ADAPTERS.contains(kernel)
                    || OF_A_STEP.contains(kernel)
                    || kernel.starts_with("attention")
                    || kernel.contains("_wgmma_");
                assert!(known, "{kernel}: of the base or of adapters?");
            }
            let by_warpgroup = launches.iter().any(|kernel| kernel.contains("_wgmma_"));
            assert_eq!(by_warpgroup, gemm == Gemm::Wgmma, "{name} {compute}");
            let count = |of: &[&str], which: &[&str]| {
                of.iter().filter(|kernel| which.contains(kernel)).count()
            };
            for once in ["route", "route_backward", "route_sum", "clip_scale"] {
                assert_eq!(count(&launches, &[once]), 1, "{once}");
            }
            let middle = launches.iter().position(|kernel| *kernel == "head_softmax").unwrap();
            let forward = count(&launches[..middle], &OF_ADAPTERS);
            let backward = count(&launches[middle..], &OF_ADAPTERS);
            println!(
                "{name} {compute} {}: {n_linears} adapted linears, {forward} launches forward, {backward} backward",
                gemm.name()
            );
            assert!(forward <= 2 * n_linears, "{name}: {forward} for {n_linears} linears");
            assert!(backward <= 3 * n_linears, "{name}: {backward} for {n_linears} linears");
            // So no linear has a fourth: `d_z`, `d_pair` and `unmix` are left.
            assert_eq!(count(&launches[middle..], &["mix"]), 0, "{name}: small pairs are kept");
        }
    }

    /// Calls `work` with an engine for a case's examples.
    fn with_engine<B: Backend, R>(
        name: &str,
        backend: B,
        work: impl FnOnce(&Engine<'_, B>, &[&Example]) -> R,
    ) -> R {
        let case = Case::open(name);
        let model = case.model(backend);
        let adapter = case.adapter(&model);
        let examples = case.examples();
        let tasks = case.rows.iter().map(|row| row.task);
        work(&Engine::new(&model, Some(&adapter), tasks, examples.len()), &examples)
    }

    /// What the device is asked for while an engine generates twice; the second time, as graphs are there.
    fn decoded(
        name: &str,
        device: &Emulator,
        cuda: Cuda,
        options: &GenerateOptions,
    ) -> (Vec<Vec<u32>>, Vec<Event>) {
        with_engine(name, cuda, |engine, examples| {
            let first = engine.generate(examples, options, |_, _| ());
            let _ = device.take_log();
            let generated = engine.generate(examples, options, |_, _| ());
            assert_eq!(first, generated, "{name}");
            (generated, device.take_log())
        })
    }

    fn greedy() -> GenerateOptions {
        GenerateOptions { max_new_tokens: 8, ..Default::default() }
    }

    fn by_draws() -> GenerateOptions {
        let (do_sample, seed) = (true, 5);
        let rules = GenerateOptions { temperature: 1.5, top_k: 20, top_p: 0.9, ..greedy() };
        GenerateOptions { do_sample, seed, min_new_tokens: 3, ..rules }
    }

    /// A decoding step's tokens are copied to the host and nothing else; and while no sequence ends, the
    /// next step is asked for before the host waits for them.
    #[test]
    fn a_decoding_step_is_asked_for_before_the_last_is_read() {
        let (greedy, by_draws) = (greedy(), by_draws());
        for (name, kernel, options) in [
            ("tiny", "argmax", &greedy),
            ("llama", "argmax", &greedy),
            ("tiny", "sample", &by_draws),
            ("llama", "sample", &by_draws),
        ] {
            let Some(device) = emulator() else { return };
            let cuda = Cuda::with_device(device.clone(), Dtype::F32).unwrap();
            let (generated, log) = decoded(name, &device, cuda, options);
            let count = |wanted: &dyn Fn(&Event) -> bool| log.iter().filter(|e| wanted(e)).count();
            let n_choices = count(&|e| *e == Event::Launch(kernel.into()));
            assert_eq!(count(&|e| matches!(e, Event::Read(_))), 0, "{name}");
            assert_eq!(count(&|e| matches!(e, Event::Fetch(_))), n_choices, "{name}");
            assert_eq!(count(&|e| *e == Event::Wait), n_choices, "{name}");
            let fetched: usize =
                log.iter().map(|e| if let Event::Fetch(n) = e { *n } else { 0 }).sum();
            // A sequence that ends is in one step more, at most.
            let n_tokens: usize = generated.iter().map(Vec::len).sum();
            let most = n_tokens + generated.len();
            assert!((4 * n_tokens..=4 * most).contains(&fetched), "{name}: {fetched} bytes");
            // Choices that the host has not waited for, at most two, and two in most steps.
            let (mut open, mut n_ahead) = (0, 0);
            for event in &log {
                match event {
                    Event::Fetch(_) => open += 1,
                    Event::Wait => {
                        assert!((1..=2).contains(&open), "{name}");
                        n_ahead += usize::from(open == 2);
                        open -= 1;
                    }
                    _ => {}
                }
            }
            println!("{name}: {n_choices} steps, {n_ahead} asked for before the last was read");
            assert!(2 * n_ahead > n_choices, "{name}: {n_ahead} of {n_choices}");
        }
    }

    /// Weights may differ in the last place; of these draws none falls between two.
    #[test]
    fn draws_are_those_of_the_cpu() {
        for name in ["tiny", "llama"] {
            let Some(device) = emulator() else { return };
            let cuda = Cuda::with_device(device.clone(), Dtype::F32).unwrap();
            let (found, _) = decoded(name, &device, cuda, &by_draws());
            with_engine(name, Cpu::new(Dtype::F32, 1).unwrap(), |engine, examples| {
                let expected = engine.generate(examples, &by_draws(), |_, _| ());
                assert_eq!(found, expected, "{name}");
                assert_ne!(found, engine.generate(examples, &greedy(), |_, _| ()), "{name}");
            });
        }
    }

    /// The same tokens; and once there are graphs, steps are nothing else, and small tables before them.
    #[test]
    fn graphs_decode_as_plain_launches_do() {
        for (name, compute) in [("tiny", Dtype::F32), ("llama", Dtype::F32), ("llama", Dtype::Bf16)]
        {
            let (Some(plain), Some(graphs)) = (emulator(), emulator_with_graphs()) else { return };
            let on = |device: Arc<Emulator>| {
                let cuda = Cuda::with_device(device.clone(), compute).unwrap();
                decoded(name, &device, cuda, &greedy())
            };
            let ((expected, _), (generated, log)) = (on(plain), on(graphs));
            assert_eq!(generated, expected, "{name} {compute}");
            // From the third step on each is like the one before it.
            let fetches: Vec<usize> =
                (0..log.len()).filter(|&i| matches!(log[i], Event::Fetch(_))).collect();
            let mut n_changed = Vec::new();
            for step in fetches[2..].windows(2) {
                let mut changed_here = (0, 0);
                for event in &log[step[0] + 1..step[1]] {
                    match event {
                        Event::Graph { changed, kernels } => {
                            changed_here.0 += changed;
                            changed_here.1 += kernels.len();
                        }
                        Event::Write(_) | Event::Wait => {}
                        other => panic!("{name} {compute}: {other:?}"),
                    }
                }
                n_changed.push(changed_here);
            }
            println!("{name} {compute}: (changed, launches) in steps: {n_changed:?}");
        }
    }

    /// A step whose like was there before is graphs and nothing else: no launch by itself, no memory
    /// that is asked for, no graph that is made, and reads at its end. Only what depends on the step is
    /// changed in them: addresses stay.
    #[test]
    fn a_step_that_repeats_is_graphs() {
        for (name, compute, dropout) in [
            ("tiny", Dtype::F32, 0.0),
            ("tiny", Dtype::Bf16, 0.1),
            ("llama", Dtype::F32, 0.0),
            ("llama", Dtype::Bf16, 0.1),
        ] {
            let Some(device) = emulator_with_graphs() else { return };
            let cuda = Cuda::with_device(device.clone(), compute).unwrap();
            let case = Case::open(name);
            let model = case.model(cuda);
            let adapter = case.adapter(&model);
            let config = TrainConfig { dropout: Some(dropout), ..train_config(&case, true) };
            let mut trainer = Trainer::new(&model, adapter, config).unwrap();
            for _ in 0..3 {
                trainer.step(&case.examples()).unwrap();
            }
            let _ = device.take_log();
            trainer.step(&case.examples()).unwrap();
            let log = device.take_log();
            let (mut kernels, mut n_changed, mut n_graphs, mut written) = (Vec::new(), 0, 0, 0);
            for event in &log {
                match event {
                    Event::Graph { changed, .. } => {
                        kernels.extend(event.kernels());
                        n_graphs += 1;
                        n_changed += changed;
                    }
                    // Ids, labels, tasks, numbers of examples, rates: to memory that no graph uses yet.
                    Event::Write(bytes) => written += bytes,
                    Event::Read(8) => {}
                    other => panic!("{name} {compute}: {other:?}"),
                }
            }
            let reads = log.iter().rposition(|event| !matches!(event, Event::Read(_))).unwrap();
            assert_eq!(log.len() - 1 - reads, 2, "the loss and the norm, at the end");
            println!(
                "{name} {compute}: {} launches in {n_graphs} graphs, {n_changed} changed, {written} bytes written",
                kernels.len()
            );
            // The router's noise, the corrections of the moments; with dropout its keys.
            if dropout == 0.0 {
                assert!(
                    n_changed <= 4,
                    "{name} {compute}: {n_changed} of {} changed",
                    kernels.len()
                );
            }
        }
    }

    /// The loss, the norm and the parameters after steps of two shapes, with sampling, dropout and a
    /// falling learning rate; then what is decoded, twice.
    fn trained<B: Backend>(case: &Case, backend: B) -> Vec<u64> {
        let model = case.model(backend);
        let adapter = case.adapter(&model);
        let config = TrainConfig {
            dropout: Some(0.1),
            warmup_steps: 2,
            max_steps: 8,
            ..train_config(case, true)
        };
        let mut trainer = Trainer::new(&model, adapter, config).unwrap();
        let examples = case.examples();
        let mut bits = Vec::new();
        for n_left_out in [0, 0, 0, 1, 1, 0, 1] {
            let report = trainer.step(&examples[n_left_out..]).unwrap();
            bits.extend([report.loss, report.grad_norm].map(f64::to_bits));
            let params = model.backend().download(trainer.adapter().params());
            bits.extend(params.into_iter().map(f64::to_bits));
        }
        let tasks = case.rows.iter().map(|row| row.task);
        let engine = Engine::new(&model, Some(trainer.adapter()), tasks, examples.len());
        let options = GenerateOptions { max_new_tokens: 8, ..Default::default() };
        for _ in 0..2 {
            let generated = engine.generate(&examples, &options, |_, _| ());
            bits.extend(generated.into_iter().flatten().map(u64::from));
        }
        bits
    }

    /// A GPU without graphs.
    #[cfg(feature = "cuda")]
    fn plain_gpu(compute: Dtype) -> polytape::Result<Cuda> {
        let driver = polytape::kernels::cuda::driver::Driver::open()?;
        Cuda::with_device(Arc::new(driver.without_graphs()), compute)
    }

    /// A build without CUDA has no GPU, and says so.
    #[cfg(not(feature = "cuda"))]
    fn plain_gpu(compute: Dtype) -> polytape::Result<Cuda> {
        Cuda::new(compute)
    }

    /// Pairs of backends that differ in nothing but that the second has graphs, with their names.
    fn plain_and_graphs(compute: Dtype) -> Vec<(&'static str, [Cuda; 2])> {
        let mut pairs = Vec::new();
        if let (Some(plain), Some(graphs)) = (emulator(), emulator_with_graphs()) {
            let on = |device: Arc<Emulator>| Cuda::with_device(device, compute).unwrap();
            pairs.push(("emulated", [plain, graphs].map(on)));
        }
        if is_wanted("gpu") {
            match plain_gpu(compute).and_then(|plain| Ok([plain, Cuda::new(compute)?])) {
                Ok(pair) => pairs.push(("gpu", pair)),
                Err(why) => skipped(format_args!("graphs on a GPU: {why}")),
            }
        }
        pairs
    }

    #[test]
    fn graphs_give_the_bits_of_plain_launches() {
        for (name, compute) in [
            ("tiny", Dtype::F32),
            ("tiny", Dtype::Bf16),
            ("llama", Dtype::F32),
            ("llama", Dtype::Bf16),
        ] {
            let case = Case::open(name);
            for (on, pair) in plain_and_graphs(compute) {
                let [plain, graphs] = pair.map(|cuda| trained(&case, cuda));
                let differs = plain.iter().zip(&graphs).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{name} {on} {compute}");
            }
        }
    }

    /// Gradients and parameters after a step with sampling and dropout.
    #[test]
    fn every_run_gives_the_same_bits() {
        let case = Case::open("tiny");
        for compute in [Dtype::F32, Dtype::Bf16] {
            for (on, cuda) in backends(compute) {
                let run = || {
                    let model = case.model(cuda.clone());
                    let adapter = case.adapter(&model);
                    let config = TrainConfig { dropout: Some(0.1), ..train_config(&case, true) };
                    let mut trainer = Trainer::new(&model, adapter, config).unwrap();
                    trainer.step(&case.examples()).unwrap();
                    let gradients = model.backend().download(trainer.gradients());
                    gradients.into_iter().map(f64::to_bits).collect::<Vec<_>>()
                };
                let first = run();
                for n in 1..if on == "gpu" { 20 } else { 2 } {
                    assert!(run() == first, "{on} {compute}: run {n} differs");
                }
            }
        }
    }

    /// A checkpoint has all that a run needs to go on: the files that it ends with are the same.
    #[test]
    fn a_resumed_run_is_the_same_run() {
        let case = Case::open("tiny");
        for compute in [Dtype::F32, Dtype::Bf16] {
            for (on, cuda) in backends(compute) {
                let name = format!("polytape-resumed-{}-{on}-{compute}", std::process::id());
                let folder = std::env::temp_dir().join(name);
                let model = case.model(cuda);
                let save = |trainer: &Trainer<'_, Cuda>, name: &str| {
                    let dir = folder.join(name);
                    std::fs::create_dir_all(&dir).unwrap();
                    trainer.adapter().save_peft(model.backend(), &dir).unwrap();
                    trainer.save_optimizer(&dir.join(OPTIMIZER_FILE)).unwrap();
                    dir
                };
                let train = |trainer: &mut Trainer<'_, Cuda>| {
                    for _ in 0..2 {
                        trainer.step(&case.examples()).unwrap();
                    }
                };
                let config = TrainConfig { dropout: Some(0.1), ..train_config(&case, true) };
                let mut trainer =
                    Trainer::new(&model, case.adapter(&model), config.clone()).unwrap();
                train(&mut trainer);
                let half = save(&trainer, "half");
                train(&mut trainer);
                let whole = save(&trainer, "whole");

                let adapter = Adapter::open(&model, &half).unwrap();
                let mut trainer = Trainer::new(&model, adapter, config).unwrap();
                trainer.restore(&half, 2).unwrap();
                train(&mut trainer);
                let resumed = save(&trainer, "resumed");
                for file in ["adapter_model.safetensors", OPTIMIZER_FILE] {
                    let [half, whole, resumed] =
                        [&half, &whole, &resumed].map(|dir| std::fs::read(dir.join(file)).unwrap());
                    assert!(whole == resumed, "{on} {compute}: {file} differs");
                    assert!(whole != half, "{on} {compute}: {file} is what it was");
                }
                std::fs::remove_dir_all(&folder).unwrap();
            }
        }
    }
}
