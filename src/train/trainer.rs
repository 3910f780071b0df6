//! One optimiser step: route, forward, backward, clip, update.

use std::{fmt, path::Path};

use super::{
    adafactor::{self, Adafactor, Matrices, Moments},
    checkpoint::{OPTIMIZER_FILE, STATE_FILE},
    choices::{Counts, t_few_weights},
    prior,
};
use crate::{
    error::{Error, Result},
    formats::safetensors::{SafetensorsFile, write_safetensors},
    kernels::{
        Backend, Precision,
        cuda::catch_faults,
        ops::{AdamW, GradScale, Key, Noise, ParamGroup, RouteBackward, clip_scale},
        philox::Purpose,
    },
    model::{Adapter, Batch, Example, Model, network::Sides},
    tape::{
        Gradients, Tape,
        ops::{LossShape, TokenWeights, mean_row},
    },
    tensor::Tensor,
    train::Schedule,
};

/// The most steps of a run: what f64 counts exactly.
const MAX_STEPS: u64 = 1 << 53;

/// How gradients become steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Optimizer {
    /// PyTorch's AdamW, betas 0.9 and 0.999, eps 1e-8.
    AdamW,
    /// [`Adafactor`] without relative steps, warm-up and first moment.
    Adafactor(Adafactor),
}

/// What an optimiser remembers.
enum Memory<B: Backend> {
    AdamW {
        m: Tensor<B>,
        v: Tensor<B>,
    },
    /// By tensor that learns.
    Adafactor {
        rule: Adafactor,
        tensors: Vec<(Matrices, Moments)>,
    },
}

/// Which parameters learn. The others keep their bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainable {
    /// A and B of every adapted linear.
    pub bank: bool,
    /// Rows of the router.
    pub router: RouterRows,
}

impl Trainable {
    /// Everything.
    pub const ALL: Self = Self { bank: true, router: RouterRows::All };
}

/// Which rows of the router learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouterRows {
    /// None: what routes is given.
    None,
    /// All in every step, as PyTorch's AdamW does: the moments of a task that is not in the batch
    /// decay, and its row goes on moving by them.
    All,
    /// Those of the tasks in the step's examples; the others keep row and moments. Unlike
    /// [`RouterRows::All`], a task that is rare moves only when it is seen.
    Present,
    /// Those of these tasks.
    Only(Vec<u32>),
}

/// What the router does in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterSampling {
    /// It takes the sigmoid.
    Off,
    /// It draws relaxed Bernoulli samples.
    On,
    /// It draws them and rounds them; the gradient is that of the sample before.
    Hard,
}

/// How an adapter is trained. [`Default`] has the papers' two speeds: the router learns a hundred
/// times faster than the skills.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Learning rate of A and B.
    pub learning_rate: f64,
    /// Learning rate of the router logits.
    pub router_learning_rate: f64,
    /// Decoupled weight decay of A and B.
    pub weight_decay: f64,
    /// Decoupled weight decay of the router logits.
    pub router_weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0: never.
    pub max_grad_norm: f64,
    /// How the learning rates change.
    pub schedule: Schedule,
    /// Steps in which they rise from zero.
    pub warmup_steps: u64,
    /// Steps in all, for the schedule.
    pub max_steps: u64,
    /// Examples that are computed together; a step has one or more such micro-batches.
    pub batch_size: usize,
    /// The share of a label's probability that goes to all ids; the reported loss is without.
    pub label_smoothing: f64,
    /// How gradients become steps.
    pub optimizer: Optimizer,
    /// What learns.
    pub trainable: Trainable,
    /// Weight of the [`prior`](super::prior) of the routing; 0: none. Not part of the reported loss.
    pub ibp_prior: f64,
    /// What the router does in training; in inference it takes the sigmoid.
    pub router_sampling: RouterSampling,
    /// Dropout of the base; none: as its configuration says.
    pub dropout: Option<f32>,
    /// Whether blocks run again in the backward instead of keeping their activations.
    pub checkpointing: bool,
    /// What everything random is derived from.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            router_learning_rate: 1e-1,
            weight_decay: 0.01,
            router_weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: Schedule::Linear,
            warmup_steps: 0,
            max_steps: 1000,
            batch_size: 8,
            label_smoothing: 0.0,
            optimizer: Optimizer::AdamW,
            trainable: Trainable::ALL,
            ibp_prior: 0.0,
            router_sampling: RouterSampling::On,
            dropout: None,
            checkpointing: false,
            seed: 42,
        }
    }
}

impl TrainConfig {
    /// Refuses settings that cannot mean anything.
    ///
    /// # Errors
    /// Names the setting.
    pub fn validate(&self) -> Result<()> {
        let rates = [
            ("learning_rate", self.learning_rate),
            ("router_learning_rate", self.router_learning_rate),
            ("weight_decay", self.weight_decay),
            ("router_weight_decay", self.router_weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("ibp_prior", self.ibp_prior),
        ];
        for (name, value) in rates {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::Usage(format!("{name} must be 0 or more, not {value}")));
            }
        }
        // Beyond this a step could overflow the parameters themselves, and then nothing is left to keep.
        for (name, value) in &rates[..2] {
            if *value > 1e4 {
                return Err(Error::Usage(format!("{name} must be at most 10000, not {value}")));
            }
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            let found = self.label_smoothing;
            return Err(Error::Usage(format!("label_smoothing must be in 0..1, not {found}")));
        }
        if self.batch_size == 0 {
            return Err(Error::Usage("batch_size must be at least 1".into()));
        }
        match self.dropout {
            Some(p) if !(0.0..1.0).contains(&p) => {
                Err(Error::Usage(format!("dropout must be in 0..1, not {p}")))
            }
            _ => Ok(()),
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// The step's number, from 1.
    pub step: u64,
    /// Sum of the nll over the number of label tokens of the step, in nats, before the update.
    pub loss: f64,
    /// Learning rate of A and B.
    pub lr: f64,
    /// Learning rate of the router logits.
    pub router_lr: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Source and label tokens.
    pub n_tokens: usize,
}

/// Examples that are computed together.
struct Micro<'a> {
    examples: &'a [&'a Example],
    /// The wrong choices of each.
    wrong: Option<&'a [&'a [Example]]>,
    /// The number of the first within the step.
    first: usize,
    step: u64,
    counts: Counts,
}

/// An adapter in training: its parameters, gradients and moments.
pub struct Trainer<'m, B: Backend> {
    model: &'m Model<B>,
    adapter: Adapter<B>,
    config: TrainConfig,
    grads: Tensor<B>,
    memory: Memory<B>,
    /// The mean row of the head, where labels are smoothed.
    mean_row: Vec<f64>,
    step: u64,
    noise: Option<Vec<f64>>,
}

impl<B: Backend> fmt::Debug for Trainer<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trainer")
            .field("model", self.model)
            .field("adapter", &self.adapter)
            .field("config", &self.config)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl<'m, B: Backend> Trainer<'m, B> {
    /// Starts from an adapter, with fresh moments.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(model: &'m Model<B>, adapter: Adapter<B>, config: TrainConfig) -> Result<Self> {
        config.validate()?;
        if adapter.config().weighting.straight_through
            && config.router_sampling != RouterSampling::Off
        {
            return Err(Error::Usage(
                "the adapter's router rounds (straight-through), so it cannot sample, too".into(),
            ));
        }
        if let RouterRows::Only(tasks) = &config.trainable.router {
            let n_tasks = adapter.config().n_tasks;
            if let Some(task) = tasks.iter().find(|&&task| task as usize >= n_tasks) {
                return Err(Error::Usage(format!(
                    "task {task} is to learn, but there are {n_tasks}"
                )));
            }
        }
        let zeros = || model.backend().zeros(1, adapter.n_params(), Precision::Full);
        let grads = zeros();
        let memory = match config.optimizer {
            Optimizer::AdamW => Memory::AdamW { m: zeros(), v: zeros() },
            Optimizer::Adafactor(rule) => {
                let matrices = adapter_matrices(&adapter, &config.trainable)?;
                let with_moments = |tensor: Matrices| {
                    let moments = Moments::new(&tensor);
                    (tensor, moments)
                };
                let tensors = matrices.into_iter().map(with_moments).collect();
                Memory::Adafactor { rule, tensors }
            }
        };
        let mean_row = if config.label_smoothing > 0.0 {
            let head = &model.network().head().linear.weight;
            mean_row(model.backend(), head, model.vocab_size())
        } else {
            Vec::new()
        };
        Ok(Self { model, adapter, config, grads, memory, mean_row, step: 0, noise: None })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter<B> {
        &self.adapter
    }

    /// The adapter, given back.
    pub fn into_adapter(self) -> Adapter<B> {
        self.adapter
    }

    /// The base.
    pub fn model(&self) -> &'m Model<B> {
        self.model
    }

    /// The settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The gradients of the last step, flat as the parameters, before clipping.
    pub fn gradients(&self) -> &Tensor<B> {
        &self.grads
    }

    /// Replaces the router's uniform draws by recorded ones, `[n_linears * examples, n_splits *
    /// n_skills]`, for parity tests. For steps of one micro-batch.
    pub fn set_noise(&mut self, noise: Option<Vec<f64>>) {
        self.noise = noise;
    }

    /// Writes what the optimiser remembers: `exp_avg` and `exp_avg_sq`, flat as the parameters, or
    /// Adafactor's `exp_avg_sq_row` and `exp_avg_sq_col`, tensor after tensor.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_optimizer(&self, path: &Path) -> Result<()> {
        let narrow = |values: Vec<f64>| -> Vec<f32> { values.iter().map(|&v| v as f32).collect() };
        let backend = self.model.backend();
        let [(first, a), (second, b)] = match &self.memory {
            Memory::AdamW { m, v } => {
                [("exp_avg", backend.download(m)), ("exp_avg_sq", backend.download(v))]
            }
            Memory::Adafactor { tensors, .. } => {
                let rows = tensors.iter().flat_map(|(_, moments)| &moments.row).copied();
                let cols = tensors.iter().flat_map(|(_, moments)| &moments.col).copied();
                [("exp_avg_sq_row", rows.collect()), ("exp_avg_sq_col", cols.collect())]
            }
        };
        let (a, b) = (narrow(a), narrow(b));
        write_safetensors(path, &[(first, &[a.len()], &a), (second, &[b.len()], &b)])
    }

    /// Goes on from step `step` with what the optimiser remembers in a checkpoint's folder. The
    /// adapter is the checkpoint's already.
    ///
    /// # Errors
    /// If the moments are missing, not as many as they must be, or none that a run leaves.
    pub fn restore(&mut self, checkpoint_dir: &Path, step: u64) -> Result<()> {
        if step > MAX_STEPS {
            let detail = format!("global_step is {step}; at most {MAX_STEPS} are counted");
            return Err(Error::file(checkpoint_dir.join(STATE_FILE), detail));
        }
        let path = checkpoint_dir.join(OPTIMIZER_FILE);
        let file = SafetensorsFile::open(&path)?;
        let read = |name: &str, n: usize| -> Result<Vec<f64>> {
            let Some((tensor, shape)) = file.tensor(name)? else {
                let detail = format!("tensor {name} is missing");
                return Err(Error::Tensors { path: path.clone(), detail });
            };
            if shape != [n] {
                let (path, name, found) = (path.clone(), name.to_owned(), shape.to_vec());
                return Err(Error::Shape { path, name, expected: vec![n], found });
            }
            let values: Vec<f64> = tensor.to_f32().iter().map(|&v| f64::from(v)).collect();
            // Means of squares have roots. Others would make every parameter NaN, a step later.
            let is_square = name.starts_with("exp_avg_sq");
            let possible = |v: &f64| v.is_finite() && (!is_square || *v >= 0.0);
            if let Some((i, value)) = values.iter().enumerate().find(|(_, v)| !possible(v)) {
                let detail =
                    format!("tensor {name} has the value {value} at {i}; the file is damaged");
                return Err(Error::file(&path, detail));
            }
            Ok(values)
        };
        match &mut self.memory {
            Memory::AdamW { m, v } => {
                let (backend, n) = (self.model.backend(), self.adapter.n_params());
                for (name, to) in [("exp_avg", m), ("exp_avg_sq", v)] {
                    *to = backend.upload(&read(name, n)?, 1, n, Precision::Full);
                }
            }
            Memory::Adafactor { tensors, .. } => {
                let count = |of: fn(&Moments) -> usize| tensors.iter().map(|(_, m)| of(m)).sum();
                let rows = read("exp_avg_sq_row", count(|m| m.row.len()))?;
                let cols = read("exp_avg_sq_col", count(|m| m.col.len()))?;
                let (mut rows, mut cols) = (rows.into_iter(), cols.into_iter());
                for (_, moments) in tensors {
                    moments.row.iter_mut().zip(&mut rows).for_each(|(to, from)| *to = from);
                    moments.col.iter_mut().zip(&mut cols).for_each(|(to, from)| *to = from);
                }
            }
        }
        self.step = step;
        Ok(())
    }

    /// One optimiser step over these examples, in micro-batches of the configured size.
    ///
    /// # Errors
    /// If there is no label, an example is mixed otherwise than by its task, the loss or a gradient is not finite, or the
    /// base's files have changed: parameters and moments are as before the step. If a GPU fails; where it was out of
    /// memory, a smaller step may follow.
    ///
    /// # Panics
    /// If an example's task is not below the adapter's `n_tasks`, or the model cannot take it: [`Model::check_example`]
    /// says so.
    pub fn step(&mut self, examples: &[&Example]) -> Result<StepReport> {
        let model = self.model;
        catch_faults(|| model.backend().scope(|| self.step_inside(examples, None)))
    }

    /// One optimiser step on T-Few's losses ([`choices`](super::choices)): `wrong` has the wrong
    /// choices of each example. The reported loss is that of the answers.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    ///
    /// # Panics
    /// As [`Trainer::step`], and if there are not choices for each example.
    pub fn step_on_choices(
        &mut self,
        examples: &[&Example],
        wrong: &[&[Example]],
    ) -> Result<StepReport> {
        assert_eq!(examples.len(), wrong.len(), "the wrong choices of each example");
        let model = self.model;
        catch_faults(|| model.backend().scope(|| self.step_inside(examples, Some(wrong))))
    }

    fn step_inside(
        &mut self,
        examples: &[&Example],
        wrong: Option<&[&[Example]]>,
    ) -> Result<StepReport> {
        let step = self.step + 1;
        let all_wrong = || wrong.unwrap_or_default().iter().copied().flatten();
        if let Some(place) = examples
            .iter()
            .position(|example| example.mixing.is_some())
            .or_else(|| all_wrong().position(|example| example.mixing.is_some()))
        {
            return Err(Error::Usage(format!(
                "example {place} of the step has a mixing: in training an example is routed by its task; leave mixing out"
            )));
        }
        let n_labels: usize = examples.iter().map(|e| e.labels.len()).sum();
        if n_labels == 0 {
            return Err(Error::Usage(
                "a step without labels has no loss: give it examples that have some".into(),
            ));
        }
        let n_inputs: usize = examples.iter().map(|e| e.input.len()).sum();
        let backend = self.model.backend();
        // A step that a GPU's fault ended may have left none.
        let n = self.adapter.n_params();
        if self.grads.len() != n {
            self.grads = backend.zeros(1, n, Precision::Full);
        }
        backend.clear(&mut self.grads);
        let mut total = backend.number(0.0);
        let size = self.config.batch_size;
        let counts = Counts {
            n_label_tokens: n_labels,
            n_wrong_tokens: all_wrong().map(|e| e.labels.len()).sum(),
            n_rows: wrong.unwrap_or_default().iter().filter(|wrong| !wrong.is_empty()).count(),
        };
        for (i, examples) in examples.chunks(size).enumerate() {
            let wrong = wrong.map(|wrong| &wrong[i * size..][..examples.len()]);
            let nll = self.accumulate(Micro { examples, wrong, first: i * size, step, counts });
            backend.add_up(&mut total, &nll, examples.iter().map(|e| e.labels.len()).sum());
        }
        // Before anything is learned from what was computed.
        self.model.verify_unchanged()?;
        self.add_prior();
        let groups = self.groups(step, examples);
        let squares = self.sum_of_squares(&groups);
        // Queued before anybody looks at loss and norm: it changes nothing where they are not finite.
        self.adamw(step, &squares, &total, &groups);
        let loss = backend.numbers(&total)[0] / n_labels.max(1) as f64;
        let grad_norm = backend.numbers(&squares)[0].sqrt();
        if !loss.is_finite() || !grad_norm.is_finite() {
            let tasks: Vec<String> = examples.iter().map(|e| e.task.to_string()).collect();
            return Err(Error::NotFinite(format!(
                "step {step}: the loss is {loss} and the gradient norm {grad_norm} (tasks {}); the adapter of step {} is kept; a lower learning rate or clipping may help",
                tasks.join(", "),
                self.step
            )));
        }
        let (lr, router_lr) = self.rates(step);
        self.adafactor(step, grad_norm, &groups);
        self.step = step;
        Ok(StepReport { step, loss, lr, router_lr, grad_norm, n_tokens: n_labels + n_inputs })
    }

    /// Adds the gradients of one micro-batch; returns the nll of its labels, its examples' first.
    fn accumulate(&mut self, micro: Micro<'_>) -> B::Numbers {
        let Micro { examples, wrong, first, step, counts } = micro;
        let (model, config, adapter) = (self.model, &self.config, &self.adapter);
        let backend = model.backend();
        let d_nll = 1.0 / counts.n_label_tokens.max(1) as f32;
        let others = || wrong.unwrap_or_default().iter().copied().flatten();
        let mut batch = Batch::new(examples.iter().copied().chain(others()), model.layout(), first);
        if let Some(wrong) = wrong {
            // A choice shares the noise of its row.
            let row_of =
                wrong.iter().enumerate().flat_map(|(i, w)| std::iter::repeat_n(i, w.len()));
            for (number, row) in batch.numbers[examples.len()..].iter_mut().zip(row_of) {
                *number = (first + row) as u32;
            }
        }
        let samples = config.router_sampling != RouterSampling::Off;
        let rows = if samples { batch.own_rows() } else { batch.rows_by_task() };
        let noise = match &self.noise {
            Some(noise) => Noise::Given(noise),
            None if samples => Noise::Philox {
                key: Key::new(config.seed, Purpose::Router, step),
                examples: &batch.numbers,
            },
            None => Noise::Off,
        };
        let mut route = adapter.route(&rows.tasks, noise);
        route.weighting.straight_through |= config.router_sampling == RouterSampling::Hard;
        let mixture = adapter.mixture(backend, &route, false);
        let dropout = config.dropout.unwrap_or(model.dropout_rate());
        let dropout = (dropout, Key::new(config.seed, Purpose::Dropout, step));
        let mut sides = Sides::new(&batch, &rows, Some(dropout));
        sides.source.keep = !config.checkpointing;
        sides.target.keep = !config.checkpointing;

        let mut tape = Tape::recording(backend, Some(adapter.on_tape(&mixture, None)));
        if wrong.is_some() || config.label_smoothing > 0.0 {
            let n_wrong = wrong.map(|wrong| wrong.iter().map(|w| w.len()).collect::<Vec<_>>());
            let lens = &batch.label_spans.lens;
            tape.shape_loss(LossShape {
                smoothing: (config.label_smoothing > 0.0)
                    .then_some((config.label_smoothing, &self.mean_row[..])),
                weights: n_wrong.map(|n_wrong| -> TokenWeights<'_> {
                    Box::new(move |nll| t_few_weights(nll, lens, &n_wrong, counts))
                }),
            });
        }
        let nll = model.network().loss(&mut tape, &batch, &sides, d_nll);
        let (n_rows, width) = (mixture.routing.weights.rows(), mixture.routing.weights.cols());
        let params = std::mem::replace(&mut self.grads, backend.zeros(0, 0, Precision::Full));
        let weights = backend.zeros(n_rows, width, Precision::Full);
        let mut gradients = Gradients { params, weights };
        tape.backward(Vec::new(), &mut gradients);
        backend.route_backward(RouteBackward {
            forward: &route,
            routing: &mixture.routing,
            d_weights: &gradients.weights,
            grads: &mut gradients.params,
        });
        self.grads = gradients.params;
        nll
    }

    /// Adds the gradient of the router's prior.
    fn add_prior(&mut self) {
        let weight = self.config.ibp_prior;
        if weight == 0.0 {
            return;
        }
        let backend = self.model.backend();
        let params = backend.download(self.adapter.params());
        let mut gradient = vec![0.0; params.len()];
        for split in self.adapter.splits() {
            let logits: Vec<f64> = split.places().map(|at| params[at]).collect();
            let (_, of_split) = prior::ibp(&logits, split.n_skills);
            split.places().zip(of_split).for_each(|(at, g)| gradient[at] += weight * g);
        }
        let gradient = backend.upload(&gradient, 1, params.len(), Precision::Full);
        let grads = std::mem::replace(&mut self.grads, backend.zeros(0, 0, Precision::Full));
        self.grads = backend.add(grads, &gradient);
    }

    /// The two learning rates of a step.
    fn rates(&self, step: u64) -> (f64, f64) {
        let config = &self.config;
        let factor = config.schedule.factor(step, config.warmup_steps, config.max_steps);
        (config.learning_rate * factor, config.router_learning_rate * factor)
    }

    /// The parameters that learn in a step, with their rates; in order, disjoint.
    fn groups(&self, step: u64, examples: &[&Example]) -> Vec<ParamGroup> {
        let config = &self.config;
        let (lr, router_lr) = self.rates(step);
        let (n_bank, n) = (self.adapter.n_bank_params(), self.adapter.n_params());
        let mut groups = Vec::new();
        if config.trainable.bank {
            let (lr, weight_decay) = (lr as f32, config.weight_decay as f32);
            groups.push(ParamGroup { range: 0..n_bank, lr, weight_decay });
        }
        let mut router = |range| {
            let (lr, weight_decay) = (router_lr as f32, config.router_weight_decay as f32);
            groups.push(ParamGroup { range, lr, weight_decay });
        };
        let mut tasks: Vec<u32> = match &config.trainable.router {
            RouterRows::None => return groups,
            RouterRows::All => {
                router(n_bank..n);
                return groups;
            }
            RouterRows::Present => examples.iter().map(|example| example.task).collect(),
            RouterRows::Only(tasks) => tasks.clone(),
        };
        tasks.sort_unstable();
        tasks.dedup();
        for row in self.adapter.router_rows(&tasks) {
            router(row);
        }
        groups
    }

    /// Of the gradients of what learns.
    fn sum_of_squares(&self, groups: &[ParamGroup]) -> B::Numbers {
        let backend = self.model.backend();
        match self.config.trainable {
            Trainable { bank: true, router: RouterRows::All } => {
                backend.sum_of_squares(&self.grads)
            }
            // The gradient of a task that is not there is zero, but for the prior's.
            Trainable { bank: true, router: RouterRows::Present }
                if self.config.ibp_prior == 0.0 =>
            {
                backend.sum_of_squares(&self.grads)
            }
            _ => {
                let ranges: Vec<_> = groups.iter().map(|group| group.range.clone()).collect();
                backend.sum_of_squares_in(&self.grads, &ranges)
            }
        }
    }

    /// Clips and updates, where it is AdamW and `loss` and the gradients are finite.
    fn adamw(&mut self, step: u64, squares: &B::Numbers, loss: &B::Numbers, groups: &[ParamGroup]) {
        let Memory::AdamW { m, v } = &mut self.memory else { return };
        let max_norm = self.config.max_grad_norm;
        self.model.backend().adamw(AdamW {
            params: self.adapter.params_mut(),
            m,
            v,
            grads: &self.grads,
            groups,
            grad_scale: GradScale::Clipped { max_norm, squares, loss },
            step,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        });
    }

    /// Clips and updates on the host, where it is Adafactor.
    fn adafactor(&mut self, step: u64, grad_norm: f64, groups: &[ParamGroup]) {
        let Memory::Adafactor { rule, tensors } = &mut self.memory else { return };
        let backend = self.model.backend();
        let grad_scale = clip_scale(self.config.max_grad_norm, grad_norm);
        let mut params = backend.download(self.adapter.params());
        let mut grads = backend.download(&self.grads);
        grads.iter_mut().for_each(|g| *g *= grad_scale);
        for (tensor, moments) in tensors {
            let range = tensor.range.clone();
            let group =
                groups.iter().find(|g| g.range.start <= range.start && range.end <= g.range.end);
            let Some(group) = group else { continue };
            rule.update(
                tensor,
                adafactor::Step {
                    params: &mut params[range.clone()],
                    grads: &grads[range],
                    moments,
                    lr: f64::from(group.lr),
                    weight_decay: f64::from(group.weight_decay),
                    step,
                },
            );
            moments.round();
        }
        let n = params.len();
        *self.adapter.params_mut() = backend.upload(&params, 1, n, Precision::Full);
    }
}

/// The tensors that learn, as Adafactor sees them: A and B of each linear, and each router.
fn adapter_matrices<B: Backend>(
    adapter: &Adapter<B>,
    trainable: &Trainable,
) -> Result<Vec<Matrices>> {
    let mut tensors = Vec::new();
    if trainable.bank {
        for bank in adapter.banks().iter().flatten() {
            let (d_in, d_out) = (bank.d_in / bank.n_splits, bank.d_out / bank.n_splits);
            tensors.push(Matrices { range: bank.a(), rows: d_in, cols: bank.rank });
            tensors.push(Matrices { range: bank.b(), rows: bank.rank, cols: d_out });
        }
    }
    let n_tasks = adapter.config().n_tasks as u32;
    let tasks: Vec<u32> = match &trainable.router {
        RouterRows::None => return Ok(tensors),
        RouterRows::All => (0..n_tasks).collect(),
        RouterRows::Only(tasks) => tasks.clone(),
        RouterRows::Present => {
            return Err(Error::Usage(
                "lazy router updates are for AdamW: Adafactor shares its moments among the rows"
                    .into(),
            ));
        }
    };
    for rows in adapter.router_rows(&tasks).chunks(tasks.len().max(1)) {
        // Rows that learn on their own are tensors of one row, as the authors make a new table of one.
        if trainable.router == RouterRows::All {
            let (first, last) = (&rows[0], &rows[rows.len() - 1]);
            let range = first.start..last.end;
            tensors.push(Matrices { range, rows: rows.len(), cols: first.len() });
        } else {
            tensors.extend(rows.iter().map(|row| Matrices {
                range: row.clone(),
                rows: 1,
                cols: row.len(),
            }));
        }
    }
    Ok(tensors)
}
