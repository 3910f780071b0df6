//! The base.

use std::{
    ffi::{CString, c_char},
    sync::Arc,
};

use super::{
    handles::{self, Handle},
    memory::{self, Versioned, optional_settings, text},
    status::{Failure, call},
};
use crate::{
    dtype::Dtype,
    formats::mmap::Access,
    kernels::cpu::Cpu,
    model::{Layout, Model, Options},
};

/// Computes in bf16 where the base is 16-bit, else in f32.
pub const POLYTAPE_DTYPE_AUTO: u32 = 0;
/// 32-bit IEEE.
pub const POLYTAPE_DTYPE_F32: u32 = 1;
/// The upper half of f32. Sums and parameters are f32 all the same.
pub const POLYTAPE_DTYPE_BF16: u32 = 2;
/// 16-bit IEEE: of frozen weights only.
pub const POLYTAPE_DTYPE_F16: u32 = 3;

/// A compute type, or none for the natural one.
pub(super) fn compute_dtype(dtype: u32) -> Result<Option<Dtype>, Failure> {
    match dtype {
        POLYTAPE_DTYPE_AUTO => Ok(None),
        POLYTAPE_DTYPE_F32 => Ok(Some(Dtype::F32)),
        POLYTAPE_DTYPE_BF16 => Ok(Some(Dtype::Bf16)),
        _ => Err(Failure::usage(format!("dtype {dtype} is not one to compute in"))),
    }
}

/// A frozen base, mapped from its folder. Any thread may use it, several at a time.
pub struct polytape_model {
    _private: [u8; 0],
}

/// The base and its instruction set's name for C.
pub(super) struct ModelObject {
    pub(super) model: Arc<Model<Cpu>>,
    isa: CString,
}

impl Handle for polytape_model {
    type Object = ModelObject;
    const NAME: &'static str = "model";
}

/// How a base is opened. All zero but `size` is the default.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct polytape_model_options {
    /// sizeof(polytape_model_options).
    pub size: usize,
    /// A POLYTAPE_DTYPE_ to compute in.
    pub dtype: u32,
    /// Threads; 0: one a core.
    pub n_threads: u32,
    /// Not 0: the weights are read into memory, so that what happens to the files later does not matter.
    pub in_memory: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, begins with `size`, numbers only.
unsafe impl Versioned for polytape_model_options {
    const NAME: &'static str = "polytape_model_options";
    const FIRST_SIZE: usize = 16;
}

/// What a base is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_model_info {
    /// sizeof(polytape_model_info).
    pub size: usize,
    /// Ids must be below.
    pub vocab_size: usize,
    /// The most tokens of a sequence that the base has positions for; SIZE_MAX: any number.
    pub max_positions: usize,
    /// The linears that an adapter may adapt.
    pub n_linears: usize,
    /// 1 where there is a decoder only: labels follow the input. 0: an encoder reads the input.
    pub is_causal: u32,
    /// The POLYTAPE_DTYPE_ that it computes in.
    pub dtype: u32,
    /// Threads that compute.
    pub n_threads: u32,
    /// 0.
    pub reserved: u32,
    /// The instruction set: "scalar", "avx2", "avx512" or "amx". Valid while the model is.
    pub isa: *const c_char,
}

impl Default for polytape_model_info {
    fn default() -> Self {
        Self {
            size: size_of::<Self>(),
            vocab_size: 0,
            max_positions: 0,
            n_linears: 0,
            is_causal: 0,
            dtype: 0,
            n_threads: 0,
            reserved: 0,
            isa: std::ptr::null(),
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and a pointer.
unsafe impl Versioned for polytape_model_info {
    const NAME: &'static str = "polytape_model_info";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// Opens a Hugging Face model folder on the CPU. Weights are mapped, and read when they are used.
/// `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_model_open(
    dir: *const c_char,
    options: *const polytape_model_options,
    model: *mut *mut polytape_model,
) -> i32 {
    call(|| {
        memory::check_place(model, "model")?;
        let options = optional_settings(options)?;
        let options = Options {
            dtype: compute_dtype(options.dtype)?,
            n_threads: options.n_threads as usize,
            access: if options.in_memory == 0 { Access::Mapped } else { Access::InMemory },
        };
        let opened = Model::open(text(dir, "dir")?, &options)?;
        let isa = CString::new(opened.backend().isa().name()).unwrap_or_default();
        memory::put(model, handles::give(ModelObject { model: Arc::new(opened), isa }), "model")
    })
}

/// What a base is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_model_get_info(
    model: *const polytape_model,
    info: *mut polytape_model_info,
) -> i32 {
    call(|| {
        let object = handles::object(model)?;
        let model = &object.model;
        let found = polytape_model_info {
            vocab_size: model.vocab_size(),
            max_positions: model.config().max_positions().unwrap_or(usize::MAX),
            n_linears: model.n_linears(),
            is_causal: u32::from(model.layout() == Layout::Causal),
            dtype: match model.backend().compute_dtype() {
                Dtype::Bf16 => POLYTAPE_DTYPE_BF16,
                _ => POLYTAPE_DTYPE_F32,
            },
            n_threads: model.backend().n_threads() as u32,
            isa: object.isa.as_ptr(),
            ..Default::default()
        };
        memory::report(info, found)
    })
}

/// Fails with POLYTAPE_BAD_INPUT if a mapped file of the base was written to or truncated since it
/// was opened: what was computed since may be wrong. To read a page that was cut off raises SIGBUS, which ends the
/// process: open with `in_memory` where somebody may truncate the files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_model_verify(model: *const polytape_model) -> i32 {
    call(|| Ok(handles::object(model)?.model.verify_unchanged()?))
}

/// Frees a base; null is fine. What was made from it goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_model_free(model: *mut polytape_model) -> i32 {
    call(|| handles::free(model))
}
