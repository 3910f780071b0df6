//! One optimiser step: route, forward, backward, clip, update.

use std::path::Path;

use super::{checkpoint::OPTIMIZER_FILE, prior};
use crate::{
    error::{Error, Result},
    formats::safetensors::{SafetensorsFile, write_safetensors},
    kernels::{
        Backend, Precision,
        ops::{AdamW, Key, Noise, ParamGroup, RouteBackward},
        philox::Purpose,
    },
    model::{Adapter, Batch, Example, Model, network::Sides},
    tape::{Gradients, Tape},
    tensor::Tensor,
    train::Schedule,
};

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
    /// What learns.
    pub trainable: Trainable,
    /// Weight of the [`prior`](super::prior) of the routing; 0: none. Not part of the reported loss.
    pub ibp_prior: f64,
    /// Whether the router samples (relaxed Bernoulli) or takes the sigmoid.
    pub router_sampling: bool,
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
            trainable: Trainable::ALL,
            ibp_prior: 0.0,
            router_sampling: true,
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

/// An adapter in training: its parameters, gradients and moments.
pub struct Trainer<'m, B: Backend> {
    model: &'m Model<B>,
    adapter: Adapter<B>,
    config: TrainConfig,
    grads: Tensor<B>,
    m: Tensor<B>,
    v: Tensor<B>,
    step: u64,
    noise: Option<Vec<f64>>,
}

impl<'m, B: Backend> Trainer<'m, B> {
    /// Starts from an adapter, with fresh moments.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(model: &'m Model<B>, adapter: Adapter<B>, config: TrainConfig) -> Result<Self> {
        config.validate()?;
        if let RouterRows::Only(tasks) = &config.trainable.router {
            let n_tasks = adapter.config().n_tasks;
            if let Some(task) = tasks.iter().find(|&&task| task as usize >= n_tasks) {
                return Err(Error::Usage(format!(
                    "task {task} is to learn, but there are {n_tasks}"
                )));
            }
        }
        let zeros = || model.backend().zeros(1, adapter.n_params(), Precision::Full);
        let (grads, m, v) = (zeros(), zeros(), zeros());
        Ok(Self { model, adapter, config, grads, m, v, step: 0, noise: None })
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

    /// Writes the moments: `exp_avg` and `exp_avg_sq`, flat as the parameters.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_optimizer(&self, path: &Path) -> Result<()> {
        let values = |tensor| -> Vec<f32> {
            self.model.backend().download(tensor).into_iter().map(|v| v as f32).collect()
        };
        let (m, v) = (values(&self.m), values(&self.v));
        write_safetensors(path, &[("exp_avg", &[m.len()], &m), ("exp_avg_sq", &[v.len()], &v)])
    }

    /// Goes on from step `step` with the moments in a checkpoint's folder. The adapter is the
    /// checkpoint's already.
    ///
    /// # Errors
    /// If the moments are missing, or not as many as the parameters.
    pub fn restore(&mut self, checkpoint_dir: &Path, step: u64) -> Result<()> {
        let path = checkpoint_dir.join(OPTIMIZER_FILE);
        let file = SafetensorsFile::open(&path)?;
        let backend = self.model.backend();
        let n = self.adapter.n_params();
        for (name, to) in [("exp_avg", &mut self.m), ("exp_avg_sq", &mut self.v)] {
            let Some((tensor, shape)) = file.tensor(name)? else {
                return Err(Error::Tensors { path, detail: format!("tensor {name} is missing") });
            };
            if shape != [n] {
                let (name, found) = (name.to_owned(), shape.to_vec());
                return Err(Error::Shape { path, name, expected: vec![n], found });
            }
            let values: Vec<f64> = tensor.to_f32().iter().map(|&v| f64::from(v)).collect();
            *to = backend.upload(&values, 1, n, Precision::Full);
        }
        self.step = step;
        Ok(())
    }

    /// One optimiser step over these examples, in micro-batches of the configured size.
    ///
    /// # Errors
    /// If the loss or a gradient is not finite: parameters and moments are as before the step.
    ///
    /// # Panics
    /// If an example's task is not below the adapter's `n_tasks`.
    pub fn step(&mut self, examples: &[&Example]) -> Result<StepReport> {
        let model = self.model;
        model.backend().scope(|| self.step_inside(examples))
    }

    fn step_inside(&mut self, examples: &[&Example]) -> Result<StepReport> {
        let step = self.step + 1;
        let n_labels: usize = examples.iter().map(|e| e.labels.len()).sum();
        let n_inputs: usize = examples.iter().map(|e| e.input.len()).sum();
        let backend = self.model.backend();
        backend.clear(&mut self.grads);
        let mut total = 0.0;
        let size = self.config.batch_size;
        for (i, micro) in examples.chunks(size).enumerate() {
            let d_nll = 1.0 / n_labels.max(1) as f32;
            total += self.accumulate(micro, i * size, step, d_nll);
        }
        self.add_prior();
        let loss = total / n_labels.max(1) as f64;
        let groups = self.groups(step, examples);
        let grad_norm = self.sum_of_squares(&groups).sqrt();
        if !loss.is_finite() || !grad_norm.is_finite() {
            let tasks: Vec<String> = examples.iter().map(|e| e.task.to_string()).collect();
            return Err(Error::NotFinite(format!(
                "step {step}: the loss is {loss} and the gradient norm {grad_norm} (tasks {}); the adapter of step {} is kept; a lower learning rate or clipping may help",
                tasks.join(", "),
                self.step
            )));
        }
        let (lr, router_lr) = self.rates(step);
        self.update(step, grad_norm, &groups);
        self.step = step;
        Ok(StepReport { step, loss, lr, router_lr, grad_norm, n_tokens: n_labels + n_inputs })
    }

    /// Adds the gradients of one micro-batch; returns the sum of its nll.
    fn accumulate(&mut self, examples: &[&Example], first: usize, step: u64, d_nll: f32) -> f64 {
        let (model, config, adapter) = (self.model, &self.config, &self.adapter);
        let backend = model.backend();
        let batch = Batch::new(examples.iter().copied(), model.layout(), first);
        let rows = if config.router_sampling { batch.own_rows() } else { batch.rows_by_task() };
        let noise = match (&self.noise, config.router_sampling) {
            (Some(noise), _) => Noise::Given(noise),
            (None, true) => Noise::Philox {
                key: Key::new(config.seed, Purpose::Router, step),
                examples: &batch.numbers,
            },
            (None, false) => Noise::Off,
        };
        let mixture = adapter.mixture(backend, &rows, noise, false);
        let dropout = config.dropout.unwrap_or(model.dropout_rate());
        let dropout = (dropout, Key::new(config.seed, Purpose::Dropout, step));
        let mut sides = Sides::new(&batch, &rows, Some(dropout));
        sides.source.keep = !config.checkpointing;
        sides.target.keep = !config.checkpointing;

        let mut tape = Tape::recording(backend, Some(adapter.on_tape(&mixture, None)));
        let nll = model.network().loss(&mut tape, &batch, &sides, d_nll);
        let (n_rows, width) = (mixture.routing.weights.rows(), mixture.routing.weights.cols());
        let params = std::mem::replace(&mut self.grads, backend.zeros(0, 0, Precision::Full));
        let weights = backend.zeros(n_rows, width, Precision::Full);
        let mut gradients = Gradients { params, weights };
        tape.backward(Vec::new(), &mut gradients);
        backend.route_backward(RouteBackward {
            forward: &adapter.route(&rows.tasks, noise),
            routing: &mixture.routing,
            d_weights: &gradients.weights,
            grads: &mut gradients.params,
        });
        self.grads = gradients.params;
        nll.iter().sum()
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
    fn sum_of_squares(&self, groups: &[ParamGroup]) -> f64 {
        let backend = self.model.backend();
        match self.config.trainable {
            // The gradient of a task that is not there is zero.
            Trainable { bank: true, router: RouterRows::All | RouterRows::Present } => {
                backend.sum_of_squares(&self.grads)
            }
            _ => {
                let grads = backend.download(&self.grads);
                let square = |group: &ParamGroup| -> f64 {
                    grads[group.range.clone()].iter().map(|g| g * g).sum()
                };
                groups.iter().map(square).sum()
            }
        }
    }

    /// Clips and updates.
    fn update(&mut self, step: u64, grad_norm: f64, groups: &[ParamGroup]) {
        let clip = self.config.max_grad_norm;
        // torch.nn.utils.clip_grad_norm_: the 1e-6 keeps a zero norm from dividing.
        let grad_scale = if clip > 0.0 { (clip / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        self.model.backend().adamw(AdamW {
            params: self.adapter.params_mut(),
            m: &mut self.m,
            v: &mut self.v,
            grads: &self.grads,
            groups,
            grad_scale: grad_scale as f32,
            step,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        });
    }
}
