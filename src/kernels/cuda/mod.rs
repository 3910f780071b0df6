//! NVIDIA GPUs: buffers, launches, and the operations' way to the kernels in `cuda/`.
//!
//! ```text
//! Backend (here)  ─ shapes checked, tables planned ─>  `graph`  ─>  Device (one stream)  ─>  cuda/*.cu
//!                                                                    `driver`: cudarc, NVRTC at run time
//!                                                                    the tests' emulator
//! ```
//!
//! Every operation checks its shapes, takes its results from the `arena`, and pushes launches, which
//! `graph` gives to the device some hundred at a time; the
//! host waits for the device only where the trait asks for numbers: `download`, `numbers` (once, at the
//! end of a training step) and `tokens` (once a decoding step, for what was chosen in the step before it).
//! What kernels need to know of a batch (segments, spans, token keys) is uploaded
//! once and kept in `tables`.
//!
//! In f32, matrices of the base are f32 on the device; in bf16 they are bf16 (a 16-bit float with more
//! digits, or an f32, is rounded once). Vectors of the base are f32. A device's fault (out of memory, a
//! failed launch) cannot be returned through [`Backend`]; it unwinds as an [`Error`] that
//! [`catch_faults`] turns back into one.

#![allow(unsafe_code)] // Launches, and memory that Rust does not see.

mod arena;
mod attention;
#[cfg(feature = "cuda")]
pub mod compile;
mod dense;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
mod gemm;
mod graph;
mod lora;
mod optimizer;
mod tables;

use std::{
    any::Any,
    borrow::Cow,
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
};

pub use arena::Buffer;
use bytemuck::NoUninit;
pub use gemm::Gemm;
use half::bf16;

use self::{
    arena::{Arena, Use},
    device::{Args, Arrival, Command, Device, Launch},
    graph::Queue,
    tables::Tables,
};
use super::{Backend, Precision, ops::*};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
    tensor::{Frozen, Tensor},
};

/// The CUDA backend: a device and a compute type. Cloning shares the device and its memory.
#[derive(Clone)]
pub struct Cuda {
    queue: Arc<Queue>,
    arena: Arc<Arena>,
    tables: Arc<Tables>,
    /// Zeros between launches: see [`Cuda::counters`].
    counters: Arc<Buffer>,
    compute: Dtype,
    gemm: Gemm,
}

/// Counters that are kept.
const N_COUNTERS: usize = 4096;

/// A frozen weight in device memory. Cloning shares it.
#[derive(Clone)]
pub struct Weight(Arc<WeightBuffers>);

struct WeightBuffers {
    /// `[rows, cols]` in the compute type.
    matrix: Buffer,
    /// The same in f32, for a weight of one row: norms and biases.
    vector: Option<Buffer>,
    rows: usize,
    cols: usize,
}

impl Weight {
    fn matrix(&self) -> u64 {
        self.0.matrix.address()
    }

    /// A vector of `len` elements, in f32.
    fn vector(&self, len: usize) -> u64 {
        assert_eq!(self.0.cols, len);
        self.0.vector.as_ref().expect("a norm's weight or a bias has one row").address()
    }

    fn shape(&self) -> (usize, usize) {
        (self.0.rows, self.0.cols)
    }
}

/// What of CUDA was found where, and what not and why: a name and a line each.
pub fn probe() -> Vec<(&'static str, String)> {
    #[cfg(feature = "cuda")]
    return driver::probe();
    #[cfg(not(feature = "cuda"))]
    vec![("cuda", "not in this build: it needs the feature `cuda`".into())]
}

/// Runs `work`; a fault of the device in it is the error.
///
/// # Errors
/// The fault.
pub fn catch_faults<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    // What `work` leaves behind half done is dropped by the caller, who gets no value to use it with.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(
        |payload: Box<dyn Any + Send>| match payload.downcast::<Error>() {
            Ok(error) => Err(*error),
            Err(other) => resume_unwind(other),
        },
    )
}

/// The value, or a fault that [`catch_faults`] catches.
fn must<T>(result: Result<T>) -> T {
    // Not a panic: it is no bug, and the hook's message would only be in the way.
    result.unwrap_or_else(|error| resume_unwind(Box::new(error)))
}

/// A buffer of zeros.
fn zeroed(queue: &Queue, arena: &Arc<Arena>, bytes: usize) -> Result<Buffer> {
    let buffer = arena.take(bytes, Use::Commands)?;
    // SAFETY: The buffer has that many bytes.
    unsafe { queue.push(Command::Fill { to: buffer.address(), byte: 0, bytes })? };
    Ok(buffer)
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({})", self.compute)
    }
}

impl Cuda {
    /// A backend on a device that computes in `compute` (f32 or bf16).
    ///
    /// # Errors
    /// If the compute type is another, or `POLYTAPE_CUDA_GEMM` names what the device or nobody has.
    pub fn with_device(device: Arc<dyn Device>, compute: Dtype) -> Result<Self> {
        if !matches!(compute, Dtype::F32 | Dtype::Bf16) {
            return Err(Error::Usage(format!("cannot compute in {compute}: use f32 or bf16")));
        }
        let queue = Arc::new(Queue::new(device));
        let arena = Arc::new(Arena::new(Arc::clone(&queue)));
        let gemm = Gemm::from_env(queue.device())?;
        let counters = Arc::new(zeroed(&queue, &arena, 4 * N_COUNTERS)?);
        Self { queue, arena, tables: Arc::default(), counters, compute, gemm }.with_gemm(gemm)
    }

    /// Multiplies by frozen weights so.
    ///
    /// # Errors
    /// If the device cannot.
    pub fn with_gemm(self, gemm: Gemm) -> Result<Self> {
        if gemm == Gemm::Wgmma && self.device().hopper_multiprocessors() == 0 {
            return Err(Error::Device(format!(
                "{} has no wgmma, which is of compute capability 9.0: use POLYTAPE_CUDA_GEMM=mma",
                self.device().name()
            )));
        }
        Ok(Self { gemm, ..self })
    }

    /// A backend on the first GPU.
    ///
    /// # Errors
    /// If there is no GPU that it can run on, or no NVRTC: with the remedy.
    pub fn new(compute: Dtype) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return Self::with_device(Arc::new(driver::Driver::open()?), compute);
        #[cfg(not(feature = "cuda"))]
        Err(Error::Device(format!(
            "this build cannot compute in {compute} on a GPU: build it with the feature `cuda`"
        )))
    }

    /// The type of activations.
    pub fn compute_dtype(&self) -> Dtype {
        self.compute
    }

    /// What multiplies by frozen weights.
    pub fn gemm(&self) -> Gemm {
        self.gemm
    }

    /// Fails before anything is uploaded if a base of so many elements does not fit.
    ///
    /// # Errors
    /// With the numbers.
    pub fn check_fits(&self, base_elements: usize) -> Result<()> {
        let bytes = base_elements * self.compute.size_bytes();
        let (total, free) = self.device().memory()?;
        if bytes <= free {
            return Ok(());
        }
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        Err(Error::Device(format!(
            "the base takes {} MiB in {}, and {} has {} MiB free of {}: use --dtype bf16, a smaller base \
             or --device cpu",
            mib(bytes),
            self.compute,
            self.device().name(),
            mib(free),
            mib(total),
        )))
    }

    /// The device.
    pub fn device(&self) -> &dyn Device {
        self.queue.device()
    }

    /// Room for so many numbers.
    fn unwritten_numbers(&self, n: usize) -> Numbers {
        Numbers { buffer: self.take(8 * n), n }
    }

    /// Bytes of all buffers, in use or kept for reuse, at their peak.
    pub fn peak_bytes(&self) -> usize {
        self.arena.peak_bytes()
    }

    fn take(&self, bytes: usize) -> Buffer {
        must(self.arena.take(bytes, Use::Commands))
    }

    /// An unwritten matrix. Kernels write every element.
    fn alloc(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        let dtype = self.dtype(precision);
        Tensor::new(self.take(rows * cols * dtype.size_bytes()), dtype, rows, cols)
    }

    /// A buffer with these values.
    fn buffer_of<T: NoUninit>(&self, values: &[T]) -> Buffer {
        self.uploaded(values, Use::Upload)
    }

    fn uploaded<T: NoUninit>(&self, values: &[T], what_for: Use) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = must(self.arena.take(bytes.len(), what_for));
        if !bytes.is_empty() {
            // SAFETY: The buffer has that many bytes, and no command that is pending uses them.
            must(unsafe { self.device().write(buffer.address(), bytes) });
        }
        buffer
    }

    /// A buffer's first `bytes` bytes.
    fn read(&self, buffer: &Buffer, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        if bytes > 0 {
            // SAFETY: Callers ask for no more than the buffer was taken with.
            must(unsafe { self.queue.read(buffer.address(), &mut read) });
            self.tables.end_step();
        }
        read
    }

    /// Starts to copy a buffer's first `bytes` bytes to the host.
    fn fetch(&self, buffer: &Buffer, bytes: usize) -> Box<dyn Arrival> {
        // SAFETY: As for `read`.
        let arrival = must(unsafe { self.queue.fetch(buffer.address(), bytes) });
        self.tables.end_step();
        arrival
    }

    /// Sets all elements to zero.
    fn fill_zero(&self, tensor: &mut Tensor<Self>) {
        let bytes = tensor.len() * tensor.dtype.size_bytes();
        if bytes > 0 {
            let fill = Command::Fill { to: tensor.address_mut(), byte: 0, bytes };
            // SAFETY: The tensor's buffer has that many bytes.
            must(unsafe { self.queue.push(fill) });
        }
    }

    /// Counters by which the blocks of a launch know which one is the last (`is_last_block` of
    /// `cuda/common.cuh`): zeros, which the launch leaves as such.
    fn counters(&self, n: usize) -> Arc<Buffer> {
        if n <= N_COUNTERS {
            return Arc::clone(&self.counters);
        }
        Arc::new(must(zeroed(&self.queue, &self.arena, 4 * n)))
    }

    /// Starts a launch.
    fn kernel(&self, module: &'static str, kernel: impl Into<Cow<'static, str>>) -> Kernel<'_> {
        Kernel { cuda: self, module, kernel: kernel.into(), args: Args::default(), shared_bytes: 0 }
    }

    /// The tensor itself where nobody else holds it, else an unwritten one of its shape: where a result
    /// goes that may replace it element by element.
    fn reuse_or_alloc(
        &self,
        tensor: &Option<Tensor<Self>>,
        rows: usize,
        cols: usize,
    ) -> Tensor<Self> {
        match tensor {
            Some(tensor) if Arc::strong_count(&tensor.buffer) == 1 => tensor.clone(),
            _ => self.alloc(rows, cols, Precision::Activation),
        }
    }
}

/// A launch that is being put together.
struct Kernel<'a> {
    cuda: &'a Cuda,
    module: &'static str,
    kernel: Cow<'static, str>,
    args: Args,
    shared_bytes: usize,
}

impl Kernel<'_> {
    fn arg<T: NoUninit>(mut self, value: T) -> Self {
        self.args.push(value);
        self
    }

    /// A count or an index, which kernels keep in 32 bits.
    fn count(self, value: usize) -> Self {
        self.arg(narrow(value))
    }

    fn shared_bytes(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// Pushes it. A grid without blocks does nothing.
    fn launch(self, grid: [usize; 3], threads: u32) {
        if grid.contains(&0) {
            return;
        }
        assert!(grid[1] <= 65535 && grid[2] <= 65535, "{} of {grid:?} blocks", self.kernel);
        let launch = Launch {
            module: self.module,
            kernel: self.kernel,
            bf16: self.cuda.compute == Dtype::Bf16,
            grid: grid.map(narrow),
            threads,
            shared_bytes: narrow(self.shared_bytes),
            args: self.args,
        };
        // SAFETY: The operation that put the launch together gave the parameters that the kernel's
        // first lines list, and asserted the shapes that it relies on.
        must(unsafe { self.cuda.queue.push(Command::Launch(launch)) });
    }
}

/// A count in the 32 bits that kernels have for it.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("counts on a device are below 2^32")
}

impl Tensor<Cuda> {
    fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// The address, for writing.
    ///
    /// # Panics
    /// If somebody else holds the buffer.
    fn address_mut(&mut self) -> u64 {
        self.buffer_mut().expect("a tensor that is written is held once").address()
    }

    fn assert_shape(&self, rows: usize, cols: usize) {
        assert_eq!((self.rows, self.cols), (rows, cols));
    }

    /// The address of a full-precision tensor of this shape.
    fn full(&self, rows: usize, cols: usize) -> u64 {
        assert_eq!(self.dtype, Dtype::F32);
        self.assert_shape(rows, cols);
        self.address()
    }

    /// The address of an activation of this shape.
    fn activation(&self, cuda: &Cuda, rows: usize, cols: usize) -> u64 {
        assert_eq!(self.dtype, cuda.compute);
        self.assert_shape(rows, cols);
        self.address()
    }
}

/// Tokens in device memory, and on their way to the host.
pub struct Chosen {
    columns: Buffer,
    n: usize,
    /// They are below it.
    n_columns: usize,
    arrival: Box<dyn Arrival>,
}

/// Numbers in f64 in device memory.
pub struct Numbers {
    buffer: Buffer,
    n: usize,
}

impl Numbers {
    fn address(&self) -> u64 {
        self.buffer.address()
    }
}

impl Backend for Cuda {
    type Buffer = Buffer;
    type Weight = Weight;
    type Numbers = Numbers;
    type Chosen = Chosen;

    fn dtype(&self, precision: Precision) -> Dtype {
        match precision {
            Precision::Activation => self.compute,
            Precision::Full => Dtype::F32,
        }
    }

    fn weight(&self, frozen: &Frozen) -> Weight {
        let (rows, cols) = (frozen.rows(), frozen.cols());
        let matrix = match (frozen.dtype(), self.compute) {
            (from, to) if from == to => self.uploaded(frozen.bytes(), Use::Weights),
            (_, Dtype::Bf16) => {
                let values: Vec<_> = frozen.to_f32().into_iter().map(bf16::from_f32).collect();
                self.uploaded(&values, Use::Weights)
            }
            _ => self.uploaded(&frozen.to_f32(), Use::Weights),
        };
        let vector = (rows == 1).then(|| self.uploaded(&frozen.to_f32(), Use::Weights));
        Weight(Arc::new(WeightBuffers { matrix, vector, rows, cols }))
    }

    fn upload(&self, values: &[f64], rows: usize, cols: usize, to: Precision) -> Tensor<Self> {
        assert_eq!(values.len(), rows * cols);
        let dtype = self.dtype(to);
        let buffer = match dtype {
            Dtype::Bf16 => {
                self.buffer_of(&values.iter().map(|&v| bf16::from_f64(v)).collect::<Vec<_>>())
            }
            _ => self.buffer_of(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
        };
        Tensor::new(buffer, dtype, rows, cols)
    }

    fn zeros(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        let mut tensor = self.alloc(rows, cols, precision);
        self.fill_zero(&mut tensor);
        tensor
    }

    fn room(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        self.alloc(rows, cols, precision)
    }

    fn download(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        let bytes = self.read(&tensor.buffer, tensor.len() * tensor.dtype.size_bytes());
        match tensor.dtype {
            Dtype::Bf16 => {
                bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect()
            }
            _ => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        }
    }

    fn copy(&self, tensor: &Tensor<Self>) -> Tensor<Self> {
        let bytes = tensor.len() * tensor.dtype.size_bytes();
        let buffer = self.take(bytes);
        if bytes > 0 {
            let copy = Command::Copy { to: buffer.address(), from: tensor.address(), bytes };
            // SAFETY: Both buffers have that many bytes.
            must(unsafe { self.queue.push(copy) });
        }
        Tensor::new(buffer, tensor.dtype, tensor.rows, tensor.cols)
    }

    fn number(&self, value: f64) -> Numbers {
        Numbers { buffer: self.buffer_of(&[value]), n: 1 }
    }
    fn numbers(&self, numbers: &Numbers) -> Vec<f64> {
        let bytes = self.read(&numbers.buffer, 8 * numbers.n);
        bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
    }
    fn add_up(&self, total: &mut Numbers, numbers: &Numbers, n: usize) {
        optimizer::add_up(self, total, numbers, n);
    }

    fn embed(&self, args: Embed<'_, Self>) -> Tensor<Self> {
        dense::embed(self, args)
    }
    fn embed_chosen(&self, table: &Weight, ids: &Chosen, scale: f32) -> Tensor<Self> {
        dense::embed_chosen(self, table, ids, scale)
    }
    fn rope(&self, args: Rope<'_, Self>) -> Tensor<Self> {
        dense::rope(self, args)
    }
    fn gather(&self, args: Gather<'_, Self>) -> Tensor<Self> {
        dense::gather(self, args)
    }
    fn norm(&self, args: Norm<'_, Self>) -> Normed<Self> {
        dense::norm(self, args)
    }
    fn norm_again(&self, args: NormAgain<'_, Self>) -> Tensor<Self> {
        dense::norm_again(self, args)
    }
    fn norm_backward(&self, args: NormBackward<'_, Self>) -> Tensor<Self> {
        dense::norm_backward(self, args)
    }
    fn linear(&self, args: Linear<'_, Self>) -> Vec<Tensor<Self>> {
        dense::linear(self, args)
    }
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Tensor<Self> {
        dense::linear_backward(self, args)
    }
    fn attention(&self, args: &Attention<'_, Self>) -> Attended<Self> {
        attention::attention(self, args)
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> [Tensor<Self>; 3] {
        attention::attention_backward(self, args)
    }
    fn cache_write(&self, args: CacheWrite<'_, Self>) {
        dense::cache_write(self, args);
    }
    fn gated(&self, args: &Gated<'_, Self>) -> Tensor<Self> {
        dense::gated(self, args)
    }
    fn gated_backward(
        &self,
        args: &Gated<'_, Self>,
        d_h: &Tensor<Self>,
    ) -> (Tensor<Self>, Option<Tensor<Self>>) {
        dense::gated_backward(self, args, d_h)
    }
    fn dropout(&self, x: &Tensor<Self>, dropout: &Dropout) -> Tensor<Self> {
        dense::dropout(self, x, dropout)
    }
    fn add(&self, a: Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        dense::add(self, a, b)
    }
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Loss<Self> {
        dense::head_loss(self, args)
    }
    fn argmax(&self, logits: &Tensor<Self>, forbidden: &[u32]) -> Chosen {
        dense::argmax(self, logits, forbidden)
    }
    fn sample(&self, args: &Sample<'_, Self>) -> Chosen {
        dense::sample(self, args)
    }
    fn tokens(&self, chosen: Chosen) -> Vec<u32> {
        let bytes = must(chosen.arrival.wait());
        bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
    }
    fn is_queued(&self) -> bool {
        true
    }
    fn route(&self, args: &Route<'_, Self>) -> Routing<Self> {
        lora::route(self, args)
    }
    fn route_backward(&self, args: RouteBackward<'_, Self>) {
        lora::route_backward(self, args);
    }
    fn mix(&self, args: Mix<'_, Self>) -> MixedPair<Self> {
        lora::mix(self, &[args]).remove(0)
    }
    fn mix_each(&self, args: &[Mix<'_, Self>]) -> Vec<MixedPair<Self>> {
        lora::mix(self, args)
    }
    fn shrink(&self, args: Shrink<'_, Self>) -> Vec<Tensor<Self>> {
        lora::shrink(self, args)
    }
    fn shrink_stacked(&self, args: ShrinkStacked<'_, Self>) -> Tensor<Self> {
        lora::shrink_stacked(self, args)
    }
    fn lora_backward(&self, args: LoraBackward<'_, Self>) -> Vec<LoraGradients<Self>> {
        lora::lora_backward(self, args)
    }
    fn unmix(&self, args: Unmix<'_, Self>) {
        let Unmix { stacked, d_a, d_b, grads, d_weights } = args;
        let terms = &[UnmixTerm { stacked, d_a, d_b }];
        lora::unmix(self, UnmixEach { terms, grads, d_weights });
    }
    fn unmix_each(&self, args: UnmixEach<'_, Self>) {
        lora::unmix(self, args);
    }
    fn sum_of_squares(&self, tensor: &Tensor<Self>) -> Numbers {
        optimizer::sum_of_squares(self, tensor)
    }
    fn sum_of_squares_in(&self, tensor: &Tensor<Self>, ranges: &[Range<usize>]) -> Numbers {
        optimizer::sum_of_squares_in(self, tensor, ranges)
    }
    fn clear(&self, tensor: &mut Tensor<Self>) {
        self.fill_zero(tensor);
    }
    fn adamw(&self, args: AdamW<'_, Self>) {
        optimizer::adamw(self, args);
    }
}
