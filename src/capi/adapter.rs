//! The adapter.

use std::{ffi::c_char, sync::Arc};

use super::{
    handles::{self, Handle},
    memory::{self, Versioned, optional_text, settings, text},
    model::polytape_model,
    status::{Failure, call},
};
use crate::{
    formats::poly_config::PolyConfig,
    kernels::cpu::Cpu,
    model::{Adapter, Model, routed_lora::parse_targets},
};

/// A Poly / MHR adapter of a base; it does not change. Any thread may use it, several at a time.
pub struct polytape_adapter {
    _private: [u8; 0],
}

/// An adapter and the base it is laid out for.
pub(super) struct AdapterObject {
    pub(super) model: Arc<Model<Cpu>>,
    pub(super) adapter: Arc<Adapter<Cpu>>,
}

impl Handle for polytape_adapter {
    type Object = AdapterObject;
    const NAME: &'static str = "adapter";
}

/// PEFT's PolyConfig.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_adapter_config {
    /// sizeof(polytape_adapter_config).
    pub size: usize,
    /// The rank of a skill.
    pub r: usize,
    /// Rows of the router.
    pub n_tasks: usize,
    /// LoRA pairs in the shared bank.
    pub n_skills: usize,
    /// Slices of the feature axis with their own mixture: 1 is Poly, more is MHR.
    pub n_splits: usize,
    /// What is adapted: names with commas between, a pattern for whole paths, "all-linear"; null: the
    /// default of the architecture.
    pub target_modules: *const c_char,
    /// Not 0: B begins as zeros, so that a fresh adapter changes nothing.
    pub init_weights: u32,
    /// 0.
    pub reserved: u32,
}

impl Default for polytape_adapter_config {
    fn default() -> Self {
        let PolyConfig { r, n_tasks, n_skills, n_splits, init_weights, .. } = PolyConfig::default();
        Self {
            size: size_of::<Self>(),
            r,
            n_tasks,
            n_skills,
            n_splits,
            target_modules: std::ptr::null(),
            init_weights: u32::from(init_weights),
            reserved: 0,
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and a pointer.
unsafe impl Versioned for polytape_adapter_config {
    const NAME: &'static str = "polytape_adapter_config";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// What an adapter is.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct polytape_adapter_info {
    /// sizeof(polytape_adapter_info).
    pub size: usize,
    /// The rank of a skill.
    pub r: usize,
    /// Rows of the router.
    pub n_tasks: usize,
    /// LoRA pairs in the shared bank.
    pub n_skills: usize,
    /// Slices of the feature axis with their own mixture.
    pub n_splits: usize,
    /// The linears that it adapts.
    pub n_linears: usize,
    /// Parameters in all.
    pub n_params: usize,
}

// SAFETY: `repr(C)`, begins with `size`, numbers only.
unsafe impl Versioned for polytape_adapter_info {
    const NAME: &'static str = "polytape_adapter_info";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// PEFT's defaults. `size` is sizeof(polytape_adapter_config).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_config_init(
    config: *mut polytape_adapter_config,
    size: usize,
) -> i32 {
    call(|| memory::init(config, size))
}

/// A fresh adapter on a base, initialised as PEFT does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_new(
    model: *const polytape_model,
    config: *const polytape_adapter_config,
    seed: u64,
    adapter: *mut *mut polytape_adapter,
) -> i32 {
    call(|| {
        memory::check_place(adapter, "adapter")?;
        let model = Arc::clone(&handles::object(model)?.model);
        let config = settings(config)?;
        let targets = optional_text(config.target_modules, "target_modules")?;
        let config = PolyConfig {
            task_type: Some(model.task_type().to_owned()),
            base_model_name_or_path: Some(model.dir().display().to_string()),
            target_modules: targets.map(parse_targets),
            r: config.r,
            n_tasks: config.n_tasks,
            n_skills: config.n_skills,
            n_splits: config.n_splits,
            init_weights: config.init_weights != 0,
            ..PolyConfig::default()
        };
        let made = Adapter::new(&model, &config, seed)?;
        give(adapter, model, made)
    })
}

/// Loads a PEFT adapter folder onto a base.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_open(
    model: *const polytape_model,
    dir: *const c_char,
    adapter: *mut *mut polytape_adapter,
) -> i32 {
    call(|| {
        memory::check_place(adapter, "adapter")?;
        let model = Arc::clone(&handles::object(model)?.model);
        let opened = Adapter::open(&model, text(dir, "dir")?)?;
        give(adapter, model, opened)
    })
}

/// Hands an adapter out.
pub(super) fn give(
    to: *mut *mut polytape_adapter,
    model: Arc<Model<Cpu>>,
    adapter: Adapter<Cpu>,
) -> Result<(), Failure> {
    let object = AdapterObject { model, adapter: Arc::new(adapter) };
    memory::put(to, handles::give(object), "adapter")
}

/// Saves an adapter as PEFT does. A crash leaves the adapter of before or the new one; where the folder
/// has one of other names, routing or settings, perhaps none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_save(
    adapter: *const polytape_adapter,
    dir: *const c_char,
) -> i32 {
    call(|| {
        let object = handles::object(adapter)?;
        Ok(object.adapter.save_peft(object.model.backend(), text(dir, "dir")?)?)
    })
}

/// What an adapter is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_get_info(
    adapter: *const polytape_adapter,
    info: *mut polytape_adapter_info,
) -> i32 {
    call(|| {
        let object = handles::object(adapter)?;
        let PolyConfig { r, n_tasks, n_skills, n_splits, .. } = *object.adapter.config();
        let (n_linears, n_params) = (object.adapter.targets().len(), object.adapter.n_params());
        let size = size_of::<polytape_adapter_info>();
        let found =
            polytape_adapter_info { size, r, n_tasks, n_skills, n_splits, n_linears, n_params };
        memory::report(info, found)
    })
}

/// The id of a task by its name, of an adapter whose folder has `tasks.json`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_find_task(
    adapter: *const polytape_adapter,
    name: *const c_char,
    task: *mut u32,
) -> i32 {
    call(|| {
        let object = handles::object(adapter)?;
        let name = text(name, "name")?;
        let found = object.adapter.tasks().and_then(|tasks| tasks.id(name));
        let unknown = || Failure::usage(format!("the adapter has no task of the name {name:?}"));
        memory::put(task, found.ok_or_else(unknown)?, "task")
    })
}

/// Frees an adapter; null is fine. What was made from it goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_adapter_free(adapter: *mut polytape_adapter) -> i32 {
    call(|| handles::free(adapter))
}
