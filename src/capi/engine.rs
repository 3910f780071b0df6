//! Evaluation and generation.

use std::{
    collections::BTreeSet,
    ffi::{c_int, c_void},
    panic::resume_unwind,
    sync::Arc,
};

use super::{
    adapter::{AdapterObject, polytape_adapter},
    examples::{check_room, copied, polytape_example},
    handles::{self, Handle},
    memory::{self, Versioned, optional_settings, read},
    model::polytape_model,
    status::{Failure, Stopped, call},
};
use crate::{
    generate::{EarlyStopping, Engine, GenerateOptions},
    kernels::cpu::Cpu,
    model::{Adapter, Example, Mixing, Model},
};

/// A base, maybe with an adapter, ready to compute. Any thread may use it, several at a time.
pub struct polytape_engine {
    _private: [u8; 0],
}

/// An engine with what it borrows.
pub(super) struct EngineObject {
    // Before what it borrows, so that it goes first.
    engine: Engine<'static, Cpu>,
    routes: Routes,
    model: Arc<Model<Cpu>>,
    adapter: Option<Arc<Adapter<Cpu>>>,
}

/// What an example's task means to an engine.
enum Routes {
    /// Nothing: there is no adapter.
    None,
    /// One of these tasks.
    Tasks(BTreeSet<u32>),
    /// A row of given mixing weights.
    Weights(Vec<Mixing>),
}

impl Handle for polytape_engine {
    type Object = EngineObject;
    const NAME: &'static str = "engine";
}

/// What an [`Arc`] holds, for as long as somebody keeps the [`Arc`].
///
/// # Safety
/// The result is not used after the last clone of `arc` is gone.
pub(super) unsafe fn held<T>(arc: &Arc<T>) -> &'static T {
    // SAFETY: an `Arc`'s content does not move; the caller keeps it.
    unsafe { &*Arc::as_ptr(arc) }
}

/// The adapter of a handle, which must be of this base.
fn adapter_of(
    model: &Arc<Model<Cpu>>,
    adapter: *const polytape_adapter,
) -> Result<Arc<AdapterObject>, Failure> {
    let object = handles::object(adapter)?;
    if !Arc::ptr_eq(&object.model, model) {
        return Err(Failure::usage("the adapter was made for another model handle"));
    }
    Ok(object)
}

/// An engine for examples of these tasks, that decodes up to `capacity` of them at a time. The tasks
/// (all of the adapter's where `tasks` is null) and the capacity fix how it computes: a row's bits do
/// not depend on the rows beside it. `adapter` may be null: the base alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_new(
    model: *const polytape_model,
    adapter: *const polytape_adapter,
    tasks: *const u32,
    n_tasks: usize,
    capacity: usize,
    engine: *mut *mut polytape_engine,
) -> i32 {
    call(|| {
        memory::check_place(engine, "engine")?;
        let model = Arc::clone(&handles::object(model)?.model);
        check_capacity(capacity)?;
        if adapter.is_null() {
            // SAFETY: `EngineObject` keeps the model for longer than the engine.
            let made = Engine::new(unsafe { held(&model) }, None, [], capacity);
            return give(engine, made, Routes::None, model, None);
        }
        let adapter = Arc::clone(&adapter_of(&model, adapter)?.adapter);
        let known = adapter.config().n_tasks as u32;
        let tasks: BTreeSet<u32> = match tasks.is_null() {
            true => (0..known).collect(),
            false => read(tasks, n_tasks, "tasks")?.iter().copied().collect(),
        };
        if let Some(task) = tasks.iter().find(|&&task| task >= known) {
            return Err(Failure::usage(format!(
                "task {task} is out of range: the adapter has {known}"
            )));
        }
        // SAFETY: `EngineObject` keeps both for longer than the engine.
        let (held_model, held_adapter) = unsafe { (held(&model), held(&adapter)) };
        let made = Engine::new(held_model, Some(held_adapter), tasks.iter().copied(), capacity);
        give(engine, made, Routes::Tasks(tasks), model, Some(adapter))
    })
}

/// An engine that routes by given mixing weights instead of the adapter's router: `weights` is
/// [n_rows, n_splits, n_skills], the same for every linear, and `n_weights` their number. An example's
/// task is its row.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_new_with_weights(
    model: *const polytape_model,
    adapter: *const polytape_adapter,
    weights: *const f32,
    n_weights: usize,
    n_rows: usize,
    capacity: usize,
    engine: *mut *mut polytape_engine,
) -> i32 {
    call(|| {
        memory::check_place(engine, "engine")?;
        let model = Arc::clone(&handles::object(model)?.model);
        check_capacity(capacity)?;
        let adapter = Arc::clone(&adapter_of(&model, adapter)?.adapter);
        let config = adapter.config();
        let width = config.n_splits * config.n_skills;
        if n_rows == 0 || n_rows.checked_mul(width) != Some(n_weights) {
            return Err(Failure::size(format!(
                "there are {n_weights} weights; {n_rows} rows have {width} each"
            )));
        }
        let rows = read(weights, n_weights, "weights")?.chunks_exact(width);
        // A weight of -0 is 0, so that rows that are equal are one.
        let row = |row: &[f32]| Mixing::Weights(row.iter().map(|weight| weight + 0.0).collect());
        let rows: Vec<Mixing> = rows.map(row).collect();
        for (i, mixing) in rows.iter().enumerate() {
            mixing.check(config).map_err(|why| Failure::usage(format!("row {i}: {why}")))?;
        }
        let example = |mixing: &Mixing| Example {
            input: Vec::new(),
            labels: Vec::new(),
            task: 0,
            mixing: Some(mixing.clone()),
        };
        let examples: Vec<Example> = rows.iter().map(example).collect();
        // SAFETY: `EngineObject` keeps both for longer than the engine.
        let (held_model, held_adapter) = unsafe { (held(&model), held(&adapter)) };
        let made = Engine::for_examples(held_model, Some(held_adapter), &examples, capacity)?;
        give(engine, made, Routes::Weights(rows), model, Some(adapter))
    })
}

/// Hands an engine out.
fn give(
    to: *mut *mut polytape_engine,
    engine: Engine<'static, Cpu>,
    routes: Routes,
    model: Arc<Model<Cpu>>,
    adapter: Option<Arc<Adapter<Cpu>>>,
) -> Result<(), Failure> {
    memory::put(to, handles::give(EngineObject { engine, routes, model, adapter }), "engine")
}

fn check_capacity(capacity: usize) -> Result<(), Failure> {
    if capacity == 0 { Err(Failure::usage("the capacity is 0")) } else { Ok(()) }
}

impl EngineObject {
    fn examples(
        &self,
        examples: *const polytape_example,
        n: usize,
    ) -> Result<Vec<Example>, Failure> {
        copied(examples, n, |example| {
            let task = example.task;
            match &self.routes {
                Routes::Tasks(tasks) if !tasks.contains(&task) => {
                    return Err(Failure::usage(format!("the engine is not for task {task}")));
                }
                Routes::Weights(rows) => {
                    let row = rows.get(task as usize);
                    let unknown =
                        || format!("the engine has {} rows of weights, not {task}", rows.len());
                    example.mixing = Some(row.ok_or_else(|| Failure::usage(unknown()))?.clone());
                }
                Routes::Tasks(_) | Routes::None => {}
            }
            let config = self.adapter.as_ref().map(|adapter| adapter.config());
            Ok(self.model.check_example(example, config)?)
        })
    }
}

fn n_labels(examples: &[Example]) -> usize {
    examples.iter().map(|example| example.labels.len()).sum()
}

/// The nll of every label token of every example, in nats: `nll` is [labels of all examples], one
/// example after the other, and `n_nll` their number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_nll(
    engine: *const polytape_engine,
    examples: *const polytape_example,
    n_examples: usize,
    nll: *mut f64,
    n_nll: usize,
) -> i32 {
    call(|| {
        let object = handles::object(engine)?;
        let examples = object.examples(examples, n_examples)?;
        check_room(n_nll, n_labels(&examples), "nll")?;
        let to = memory::write(nll, n_nll, "nll")?;
        let found = object.engine.nll(&examples.iter().collect::<Vec<_>>());
        object.model.verify_unchanged()?;
        to.iter_mut().zip(found.into_iter().flatten()).for_each(|(to, nll)| *to = nll);
        Ok(())
    })
}

/// The logits of every label token of every example: `logits` is [labels of all examples,
/// vocabulary], and `n_logits` their number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_logits(
    engine: *const polytape_engine,
    examples: *const polytape_example,
    n_examples: usize,
    logits: *mut f32,
    n_logits: usize,
) -> i32 {
    call(|| {
        let object = handles::object(engine)?;
        let examples = object.examples(examples, n_examples)?;
        let needed = n_labels(&examples).saturating_mul(object.model.vocab_size());
        check_room(n_logits, needed, "logits")?;
        let to = memory::write(logits, n_logits, "logits")?;
        let found: Vec<f64> =
            examples.iter().flat_map(|example| object.engine.logits(example)).collect();
        object.model.verify_unchanged()?;
        to.iter_mut().zip(found).for_each(|(to, logit)| *to = logit as f32);
        Ok(())
    })
}

/// How tokens are generated: names, meaning and defaults of transformers' GenerationConfig. The defaults
/// of polytape_generate_options_init are greedy; those of zeros are not allowed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_generate_options {
    /// sizeof(polytape_generate_options).
    pub size: usize,
    /// At most this many tokens a row.
    pub max_new_tokens: usize,
    /// No end token before this many.
    pub min_new_tokens: usize,
    /// Sequences that a beam search follows; 1: no beam search.
    pub num_beams: usize,
    /// Draws among this many of the most probable tokens; 0: among all.
    pub top_k: usize,
    /// No so many tokens in a row occur twice; 0: they may.
    pub no_repeat_ngram_size: usize,
    /// What draws are derived from, together with an example's index and a token's position.
    pub seed: u64,
    /// Exponent of the length by which a beam's score is divided.
    pub length_penalty: f64,
    /// Divides the scores before a draw.
    pub temperature: f64,
    /// Draws among the most probable tokens that together have this probability.
    pub top_p: f64,
    /// Draws among tokens of at least this share of the largest probability.
    pub min_p: f64,
    /// Divides (where negative: multiplies) the scores of tokens that were there before.
    pub repetition_penalty: f64,
    /// Not 0: draws tokens instead of taking the most probable.
    pub do_sample: u32,
    /// When a beam search ends: a POLYTAPE_EARLY_STOPPING_.
    pub early_stopping: u32,
}

/// A beam search ends when no beam looks better than the worst finished one at its present length.
pub const POLYTAPE_EARLY_STOPPING_FALSE: u32 = 0;
/// A beam search ends as soon as there are `num_beams` finished sequences.
pub const POLYTAPE_EARLY_STOPPING_TRUE: u32 = 1;
/// A beam search ends when no beam can become better at any length.
pub const POLYTAPE_EARLY_STOPPING_NEVER: u32 = 2;

impl Default for polytape_generate_options {
    fn default() -> Self {
        let GenerateOptions {
            max_new_tokens,
            min_new_tokens,
            max_length: _,
            min_length: _,
            num_beams,
            num_return_sequences: _, // The callback sees the best one.
            length_penalty,
            early_stopping,
            do_sample,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            no_repeat_ngram_size,
            seed,
        } = GenerateOptions::default();
        Self {
            size: size_of::<Self>(),
            max_new_tokens,
            min_new_tokens,
            num_beams,
            top_k,
            no_repeat_ngram_size,
            seed,
            length_penalty,
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            do_sample: u32::from(do_sample),
            early_stopping: match early_stopping {
                EarlyStopping::No => POLYTAPE_EARLY_STOPPING_FALSE,
                EarlyStopping::Yes => POLYTAPE_EARLY_STOPPING_TRUE,
                EarlyStopping::Never => POLYTAPE_EARLY_STOPPING_NEVER,
            },
        }
    }
}

impl polytape_generate_options {
    fn checked(self) -> Result<GenerateOptions, Failure> {
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            max_length: usize::MAX,
            min_length: 0,
            num_beams: self.num_beams,
            num_return_sequences: 1,
            length_penalty: self.length_penalty,
            early_stopping: match self.early_stopping {
                POLYTAPE_EARLY_STOPPING_FALSE => EarlyStopping::No,
                POLYTAPE_EARLY_STOPPING_TRUE => EarlyStopping::Yes,
                POLYTAPE_EARLY_STOPPING_NEVER => EarlyStopping::Never,
                other => return Err(Failure::usage(format!("there is no early_stopping {other}"))),
            },
            do_sample: self.do_sample != 0,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            seed: self.seed,
        };
        options.check()?;
        Ok(options)
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers only.
unsafe impl Versioned for polytape_generate_options {
    const NAME: &'static str = "polytape_generate_options";
    const FIRST_SIZE: usize = 3 * size_of::<usize>();
}

/// The defaults. `size` is sizeof(polytape_generate_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_generate_options_init(
    options: *mut polytape_generate_options,
    size: usize,
) -> i32 {
    call(|| memory::init(options, size))
}

/// Sees each token as it is made: the example's index and the id. Not 0: stop. It runs in one of
/// polytape's threads, one call at a time, and must return (no longjmp, no C++ exception). It must not
/// wait for another thread's call on the same model: that may wait for this one.
pub type polytape_on_token =
    Option<unsafe extern "C" fn(user: *mut c_void, example: usize, token: u32) -> c_int>;

/// A callback with its data, wherever it runs.
struct Callback {
    function: unsafe extern "C" fn(*mut c_void, usize, u32) -> c_int,
    user: *mut c_void,
}

// SAFETY: the declaration says that it runs in another thread, one call at a time; what `user` points
// to is the caller's business.
unsafe impl Send for Callback {}

impl Callback {
    fn call(&mut self, example: usize, token: u32) {
        // SAFETY: a function of this type, as the caller says.
        if unsafe { (self.function)(self.user, example, token) } != 0 {
            resume_unwind(Box::new(Stopped)); // Quiet: no panic hook runs.
        }
    }
}

/// A continuation of each example, by default the most probable one, token by token: `on_token` sees new
/// tokens only, with the end token where one comes; those of a beam search at its end. Rows of
/// different tasks step together. `options` may be null. Returns POLYTAPE_STOPPED where the callback
/// said so, and POLYTAPE_BAD_INPUT where the base's files changed meanwhile: the tokens may be wrong.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_generate(
    engine: *const polytape_engine,
    examples: *const polytape_example,
    n_examples: usize,
    options: *const polytape_generate_options,
    on_token: polytape_on_token,
    user: *mut c_void,
) -> i32 {
    call(|| {
        let object = handles::object(engine)?;
        let mut examples = object.examples(examples, n_examples)?;
        examples.iter_mut().for_each(|example| example.labels.clear());
        let options = optional_settings(options)?.checked()?;
        let Some(function) = on_token else {
            return Err(Failure::new(super::POLYTAPE_NULL, "on_token is null"));
        };
        let mut callback = Callback { function, user };
        let examples: Vec<_> = examples.iter().collect();
        object.engine.generate(&examples, &options, move |row, id| callback.call(row, id));
        Ok(object.model.verify_unchanged()?)
    })
}

/// Frees an engine; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_engine_free(engine: *mut polytape_engine) -> i32 {
    call(|| handles::free(engine))
}
