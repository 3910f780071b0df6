//! Training.

use std::sync::{Arc, Mutex, TryLockError};

use super::{
    adapter::{self, polytape_adapter},
    engine::held,
    examples::{copied, polytape_example},
    handles::{self, Handle},
    memory::{self, Versioned, settings},
    status::{Failure, POLYTAPE_BUSY, POLYTAPE_PANIC, call},
};
use crate::{
    formats::poly_config::PolyConfig,
    kernels::cpu::Cpu,
    model::{Example, Model},
    train::{RouterSampling, Schedule, TrainConfig, Trainer},
};

/// An adapter in training. Any thread may use it, one at a time: others get POLYTAPE_BUSY.
pub struct polytape_trainer {
    _private: [u8; 0],
}

/// A trainer with what it borrows.
pub(super) struct TrainerObject {
    // Before what it borrows, so that it goes first.
    trainer: Mutex<Trainer<'static, Cpu>>,
    model: Arc<Model<Cpu>>,
    config: PolyConfig,
}

impl Handle for polytape_trainer {
    type Object = TrainerObject;
    const NAME: &'static str = "trainer";
}

impl TrainerObject {
    fn with<R>(
        &self,
        work: impl FnOnce(&mut Trainer<'static, Cpu>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let mut trainer = self.trainer.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                Failure::new(POLYTAPE_BUSY, "another call is using the trainer")
            }
            TryLockError::Poisoned(_) => {
                Failure::new(POLYTAPE_PANIC, "an earlier call with this trainer was abandoned")
            }
        })?;
        work(&mut trainer)
    }
}

/// The learning rates fall linearly to 0 at `max_steps`.
pub const POLYTAPE_SCHEDULE_LINEAR: u32 = 0;
/// They fall along half a cosine.
pub const POLYTAPE_SCHEDULE_COSINE: u32 = 1;
/// They stay, without warm-up.
pub const POLYTAPE_SCHEDULE_CONSTANT: u32 = 2;
/// They stay after warm-up.
pub const POLYTAPE_SCHEDULE_CONSTANT_WITH_WARMUP: u32 = 3;

/// How an adapter is trained: with AdamW.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_train_config {
    /// sizeof(polytape_train_config).
    pub size: usize,
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
    /// Dropout of the base; negative: as its configuration says.
    pub dropout: f64,
    /// Steps in which the rates rise from zero.
    pub warmup_steps: u64,
    /// Steps in all, for the schedule.
    pub max_steps: u64,
    /// What everything random is derived from.
    pub seed: u64,
    /// Examples that are computed together; a step has one or more such micro-batches.
    pub batch_size: usize,
    /// A POLYTAPE_SCHEDULE_.
    pub schedule: u32,
    /// 0: the router takes the sigmoid; 1: it samples (relaxed Bernoulli); 2: it rounds its samples.
    pub router_sampling: u32,
    /// Not 0: blocks run again in the backward instead of keeping their activations.
    pub checkpointing: u32,
    /// 0.
    pub reserved: u32,
}

impl Default for polytape_train_config {
    fn default() -> Self {
        let config = TrainConfig::default();
        Self {
            size: size_of::<Self>(),
            learning_rate: config.learning_rate,
            router_learning_rate: config.router_learning_rate,
            weight_decay: config.weight_decay,
            router_weight_decay: config.router_weight_decay,
            max_grad_norm: config.max_grad_norm,
            dropout: -1.0,
            warmup_steps: config.warmup_steps,
            max_steps: config.max_steps,
            seed: config.seed,
            batch_size: config.batch_size,
            schedule: POLYTAPE_SCHEDULE_LINEAR,
            router_sampling: config.router_sampling as u32,
            checkpointing: u32::from(config.checkpointing),
            reserved: 0,
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers only.
unsafe impl Versioned for polytape_train_config {
    const NAME: &'static str = "polytape_train_config";
    const FIRST_SIZE: usize = size_of::<Self>();
}

impl polytape_train_config {
    fn config(&self) -> Result<TrainConfig, Failure> {
        Ok(TrainConfig {
            learning_rate: self.learning_rate,
            router_learning_rate: self.router_learning_rate,
            weight_decay: self.weight_decay,
            router_weight_decay: self.router_weight_decay,
            max_grad_norm: self.max_grad_norm,
            dropout: (self.dropout >= 0.0).then_some(self.dropout as f32),
            warmup_steps: self.warmup_steps,
            max_steps: self.max_steps,
            seed: self.seed,
            batch_size: self.batch_size,
            schedule: match self.schedule {
                POLYTAPE_SCHEDULE_LINEAR => Schedule::Linear,
                POLYTAPE_SCHEDULE_COSINE => Schedule::Cosine,
                POLYTAPE_SCHEDULE_CONSTANT => Schedule::Constant,
                POLYTAPE_SCHEDULE_CONSTANT_WITH_WARMUP => Schedule::ConstantWithWarmup,
                other => return Err(Failure::usage(format!("schedule {other} is none"))),
            },
            router_sampling: match self.router_sampling {
                0 => RouterSampling::Off,
                1 => RouterSampling::On,
                2 => RouterSampling::Hard,
                other => return Err(Failure::usage(format!("router_sampling {other} is none"))),
            },
            checkpointing: self.checkpointing != 0,
            ..TrainConfig::default()
        })
    }
}

/// The defaults. `size` is sizeof(polytape_train_config).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_train_config_init(
    config: *mut polytape_train_config,
    size: usize,
) -> i32 {
    call(|| memory::init(config, size))
}

/// What a step did.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct polytape_step_report {
    /// sizeof(polytape_step_report).
    pub size: usize,
    /// The step's number, from 1.
    pub step: u64,
    /// Sum of the nll over the number of label tokens of the step, in nats, before the update.
    pub loss: f64,
    /// Learning rate of A and B.
    pub learning_rate: f64,
    /// Learning rate of the router logits.
    pub router_learning_rate: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Source and label tokens.
    pub n_tokens: u64,
}

// SAFETY: `repr(C)`, begins with `size`, numbers only.
unsafe impl Versioned for polytape_step_report {
    const NAME: &'static str = "polytape_step_report";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// Trains a copy of an adapter, which itself stays as it is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_trainer_new(
    adapter: *const polytape_adapter,
    config: *const polytape_train_config,
    trainer: *mut *mut polytape_trainer,
) -> i32 {
    call(|| {
        memory::check_place(trainer, "trainer")?;
        let object = handles::object(adapter)?;
        let config = settings(config)?.config()?;
        let model = Arc::clone(&object.model);
        let copy = object.adapter.copy(model.backend());
        let adapter_config = copy.config().clone();
        // SAFETY: `TrainerObject` keeps the model for longer than the trainer.
        let made = Trainer::new(unsafe { held(&model) }, copy, config)?;
        let object = TrainerObject { trainer: Mutex::new(made), model, config: adapter_config };
        memory::put(trainer, handles::give(object), "trainer")
    })
}

/// One optimiser step over these examples, in micro-batches of the configured size. Where it fails
/// with POLYTAPE_FAILED (the loss is not finite), everything is as before it. `report` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_trainer_step(
    trainer: *mut polytape_trainer,
    examples: *const polytape_example,
    n_examples: usize,
    report: *mut polytape_step_report,
) -> i32 {
    call(|| {
        let object = handles::object(trainer)?;
        let check = |example: &mut Example| {
            Ok(object.model.check_example(example, Some(&object.config))?)
        };
        let examples = copied(examples, n_examples, check)?;
        if let Some(i) = examples.iter().position(|example| example.labels.is_empty()) {
            return Err(Failure::usage(format!("example {i} has no labels to learn")));
        }
        if examples.is_empty() {
            return Err(Failure::usage("a step without examples"));
        }
        if !report.is_null() {
            memory::check_report(report)?;
        }
        let done =
            object.with(|trainer| Ok(trainer.step(&examples.iter().collect::<Vec<_>>())?))?;
        if report.is_null() {
            return Ok(());
        }
        let found = polytape_step_report {
            size: size_of::<polytape_step_report>(),
            step: done.step,
            loss: done.loss,
            learning_rate: done.lr,
            router_learning_rate: done.router_lr,
            grad_norm: done.grad_norm,
            n_tokens: done.n_tokens as u64,
        };
        memory::report(report, found)
    })
}

/// The adapter as it is now: a copy, which further steps do not change.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_trainer_get_adapter(
    trainer: *const polytape_trainer,
    adapter: *mut *mut polytape_adapter,
) -> i32 {
    call(|| {
        memory::check_place(adapter, "adapter")?;
        let object = handles::object(trainer)?;
        let copy = object.with(|trainer| Ok(trainer.adapter().copy(object.model.backend())))?;
        adapter::give(adapter, Arc::clone(&object.model), copy)
    })
}

/// Frees a trainer; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_trainer_free(trainer: *mut polytape_trainer) -> i32 {
    call(|| handles::free(trainer))
}
