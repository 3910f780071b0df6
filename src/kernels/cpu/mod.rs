//! The CPU: buffers, threads, and the operations' way to their kernels.
//!
//! One file a family of kernels, each a `SimdOp` written once for all instruction sets
//! ([`isa`]). However work is cut into tasks, each output element is written by one task, in an order that shape
//! alone decides; so any number of threads gives the same bits.

mod adamw;
mod attention;
mod buffer;
#[cfg(test)]
mod checks;
mod dot;
mod elementwise;
mod embed;
mod gated;
mod gemm;
mod gemm_amx;
mod grad;
mod head;
pub mod isa;
mod linear;
mod math;
mod matrix;
mod mix;
mod norm;
mod probe;
mod profile;
mod rope;
mod route;
mod shrink;
#[cfg(test)]
mod testing;
mod threads;

use std::{fmt, mem, ops::Range, sync::Arc};

pub use buffer::Buffer;
use half::bf16;
pub use probe::Peaks;
pub use profile::{Entry, Profile};

use self::{
    buffer::Pool,
    isa::Isa,
    profile::Work,
    threads::{Threads, run_tasks},
};
use super::{Backend, Precision, ops::*};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
    tensor::{BytesMut, Frozen, Tensor},
};

/// The CPU backend: an instruction set, threads, a compute type and a pool of buffers.
///
/// Cloning shares threads and pool.
#[derive(Clone)]
pub struct Cpu {
    isa: Isa,
    compute: Dtype,
    threads: Arc<Threads>,
    pool: Arc<Pool>,
    profile: Arc<Profile>,
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({} {})", self.isa.name(), self.compute)
    }
}

impl Cpu {
    /// A backend that computes in `compute` (f32 or bf16) on `n_threads` threads (0: one a core),
    /// with the fastest instruction set or the one that `POLYTAPE_ISA` forces.
    ///
    /// # Errors
    /// If the compute type is another, `POLYTAPE_ISA` names an instruction set that is not there, or
    /// threads cannot be started.
    pub fn new(compute: Dtype, n_threads: usize) -> Result<Self> {
        Self::with_isa(Isa::detect()?, compute, n_threads)
    }

    /// [`Cpu::new`] with a given instruction set.
    pub fn with_isa(isa: Isa, compute: Dtype, n_threads: usize) -> Result<Self> {
        if !matches!(compute, Dtype::F32 | Dtype::Bf16) {
            return Err(Error::Usage(format!("cannot compute in {compute}: use f32 or bf16")));
        }
        let threads = Arc::new(Threads::start(n_threads)?);
        let (pool, profile) = (Arc::default(), Arc::default());
        Ok(Self { isa, compute, threads, pool, profile })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The type of activations.
    pub fn compute_dtype(&self) -> Dtype {
        self.compute
    }

    /// The number of threads.
    pub fn n_threads(&self) -> usize {
        self.threads.n()
    }

    /// What operations take, once it is started.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Bytes of all buffers, in use or kept for reuse, at their peak.
    pub fn peak_bytes(&self) -> usize {
        self.pool.peak_bytes()
    }

    /// The same backend whose buffers start filled with NaN, so that a test sees every element
    /// that a kernel forgets to write.
    pub fn poisoned(mut self) -> Self {
        self.pool = Arc::new(Pool::poisoned());
        self
    }

    /// A matrix in a caller's memory, read and written in place. The tensor gives the memory back when
    /// it is dropped.
    ///
    /// # Errors
    /// If the memory is not exactly `rows * cols` elements, or not aligned to an element.
    pub fn lend(
        &self,
        memory: impl BytesMut,
        rows: usize,
        cols: usize,
        precision: Precision,
    ) -> Result<Tensor<Self>> {
        let dtype = self.dtype(precision);
        let (found, size) = (memory.bytes().len(), dtype.size_bytes());
        if rows.checked_mul(cols).and_then(|n| n.checked_mul(size)) != Some(found) {
            return Err(Error::Usage(format!(
                "a {dtype} matrix [{rows}, {cols}] was lent {found} bytes"
            )));
        }
        if !memory.bytes().as_ptr().addr().is_multiple_of(size) {
            return Err(Error::Usage(format!(
                "a {dtype} matrix was lent memory that is not aligned to {size} bytes"
            )));
        }
        Ok(Tensor::new(Buffer::lent(Box::new(memory)), dtype, rows, cols))
    }

    /// [`Backend::linear`] into tensors that are there, one for each projection (memory that is
    /// [lent](Cpu::lend), say); with `add` onto what is in them, and without residuals.
    ///
    /// # Panics
    /// If an output has another shape or type than the result or is held twice; if there is a
    /// residual to add to what is added to.
    pub fn linear_into(&self, args: Linear<'_, Self>, add: bool, outputs: &mut [Tensor<Self>]) {
        self.scope(|| linear::linear_into(self, args, add, outputs));
    }

    /// [`Backend::linear_backward`] into a tensor that is there; with `add` onto what is in it.
    ///
    /// # Panics
    /// If the output has another shape or type than the result or is held twice; if there is a
    /// `d_residual`, whose place the output takes.
    pub fn linear_backward_into(
        &self,
        args: LinearBackward<'_, Self>,
        add: bool,
        d_x: &mut Tensor<Self>,
    ) {
        self.scope(|| linear::linear_backward_into(self, args, add, d_x));
    }

    /// An unwritten matrix. Kernels write every element.
    fn alloc(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        let dtype = self.dtype(precision);
        Tensor::new(self.pool.take(rows * cols * dtype.size_bytes()), dtype, rows, cols)
    }

    /// `n` unwritten f32 for a kernel's own use.
    fn scratch(&self, n: usize) -> Buffer {
        self.pool.take(4 * n)
    }

    /// The tiles, where they multiply activations.
    fn amx(&self) -> Option<isa::Amx> {
        match self.isa {
            Isa::Amx(amx) if self.compute == Dtype::Bf16 => Some(amx),
            _ => None,
        }
    }

    /// Unwritten tiles.
    fn tiles(&self, n: usize) -> Buffer {
        self.pool.take(n * size_of::<isa::Tile>())
    }
}

/// Elements of a task of pointwise work: what starting another one is surely worth.
const GRAIN: usize = 16 * 1024;
/// Tasks of a thread where they are few and long, so that none waits long for another's last one.
const TASKS_OF_A_THREAD: usize = 4;

/// Evaluates an expression with `$t` as the element type of an activation of type `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::dtype::Dtype::F16 | $crate::dtype::Dtype::F64 => {
                unreachable!("the CPU computes in f32 or bf16")
            }
        }
    };
}
use with_element;

/// Activations in memory: a slice of one of the two compute types.
enum Slice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// [`Slice`], for writing.
enum SliceMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl Tensor<Cpu> {
    /// The elements as `T`, which [`with_element`] chose.
    fn items<T: isa::Element>(&self) -> &[T::Item] {
        assert_eq!(mem::size_of::<T::Item>(), self.dtype.size_bytes());
        self.buffer.as_slice()
    }

    /// The elements as `T`, for writing.
    ///
    /// # Panics
    /// If somebody else holds the buffer.
    fn items_mut<T: isa::Element>(&mut self) -> &mut [T::Item] {
        assert_eq!(mem::size_of::<T::Item>(), self.dtype.size_bytes());
        self.buffer_mut().expect("a tensor that is written is held once").as_mut_slice()
    }

    /// The elements, whichever type they have.
    fn slice(&self) -> Slice<'_> {
        match self.dtype {
            Dtype::F32 => Slice::F32(&self.buffer.as_slice()[..self.len()]),
            Dtype::Bf16 => Slice::Bf16(&self.buffer.as_slice()[..self.len()]),
            Dtype::F16 | Dtype::F64 => unreachable!("the CPU computes in f32 or bf16"),
        }
    }

    /// The elements, for writing.
    ///
    /// # Panics
    /// If somebody else holds the buffer.
    fn slice_mut(&mut self) -> SliceMut<'_> {
        let (dtype, len) = (self.dtype, self.len());
        let buffer = self.buffer_mut().expect("a tensor that is written is held once");
        match dtype {
            Dtype::F32 => SliceMut::F32(&mut buffer.as_mut_slice()[..len]),
            Dtype::Bf16 => SliceMut::Bf16(&mut buffer.as_mut_slice()[..len]),
            Dtype::F16 | Dtype::F64 => unreachable!("the CPU computes in f32 or bf16"),
        }
    }

    /// The elements of a full-precision tensor.
    fn f32s(&self) -> &[f32] {
        match self.slice() {
            Slice::F32(slice) => slice,
            Slice::Bf16(_) => panic!("a full-precision tensor"),
        }
    }

    /// The elements of a full-precision tensor, for writing.
    fn f32s_mut(&mut self) -> &mut [f32] {
        match self.slice_mut() {
            SliceMut::F32(slice) => slice,
            SliceMut::Bf16(_) => panic!("a full-precision tensor"),
        }
    }

    /// The tensor itself where nobody else holds it, else a copy.
    fn own(self, cpu: &Cpu) -> Self {
        if Arc::strong_count(&self.buffer) == 1 { self } else { cpu.copy(&self) }
    }
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Weight = Frozen;
    type Numbers = Vec<f64>;
    type Chosen = Vec<u32>;

    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.threads.scope(work)
    }

    fn dtype(&self, precision: Precision) -> Dtype {
        match precision {
            Precision::Activation => self.compute,
            Precision::Full => Dtype::F32,
        }
    }

    fn weight(&self, frozen: &Frozen) -> Frozen {
        frozen.clone()
    }

    fn upload(&self, values: &[f64], rows: usize, cols: usize, to: Precision) -> Tensor<Self> {
        assert_eq!(values.len(), rows * cols);
        let mut tensor = self.alloc(rows, cols, to);
        match tensor.slice_mut() {
            SliceMut::F32(out) => out.iter_mut().zip(values).for_each(|(o, &v)| *o = v as f32),
            SliceMut::Bf16(out) => {
                out.iter_mut().zip(values).for_each(|(o, &v)| *o = bf16::from_f64(v));
            }
        }
        tensor
    }

    fn zeros(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        let mut tensor = self.alloc(rows, cols, precision);
        self.clear(&mut tensor);
        tensor
    }

    fn room(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        self.alloc(rows, cols, precision)
    }

    fn download(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        match tensor.slice() {
            Slice::F32(slice) => slice.iter().map(|&v| f64::from(v)).collect(),
            Slice::Bf16(slice) => slice.iter().map(|&v| v.to_f64()).collect(),
        }
    }

    fn copy(&self, tensor: &Tensor<Self>) -> Tensor<Self> {
        let mut copy = self.pool.take(tensor.len() * tensor.dtype.size_bytes());
        copy.bytes_mut().copy_from_slice(tensor.buffer.bytes());
        Tensor::new(copy, tensor.dtype, tensor.rows, tensor.cols)
    }

    fn number(&self, value: f64) -> Vec<f64> {
        vec![value]
    }
    fn numbers(&self, numbers: &Vec<f64>) -> Vec<f64> {
        numbers.clone()
    }
    fn add_up(&self, total: &mut Vec<f64>, numbers: &Vec<f64>, n: usize) {
        total[0] += numbers[..n].iter().sum::<f64>();
    }

    fn embed(&self, args: Embed<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("embed", || {
            Work::moves((2 * args.ids.len() * args.table.cols() * self.compute.size_bytes()) as f64)
        });
        self.scope(|| embed::embed(self, args))
    }
    fn embed_chosen(&self, table: &Frozen, ids: &Vec<u32>, scale: f32) -> Tensor<Self> {
        self.embed(Embed { table, ids, scale })
    }
    fn rope(&self, args: Rope<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("rope", || Work::passes(&args.x, 2));
        self.scope(|| rope::rope(self, args))
    }
    fn gather(&self, args: Gather<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("gather", || {
            Work::moves((2 * args.rows.len() * args.x.cols * args.x.dtype.size_bytes()) as f64)
        });
        self.scope(|| embed::gather(self, args))
    }
    fn norm(&self, args: Norm<'_, Self>) -> Normed<Self> {
        let _timed = self.profile.time("norm", || Work::passes(args.x, 2));
        self.scope(|| norm::norm(self, args))
    }
    fn norm_again(&self, args: NormAgain<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("norm_again", || Work::passes(args.x, 2));
        self.scope(|| norm::norm_again(self, args))
    }
    fn norm_backward(&self, args: NormBackward<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("norm_backward", || {
            Work::passes(args.x, 3 + usize::from(args.d_residual.is_some()))
        });
        self.scope(|| norm::norm_backward(self, args))
    }
    fn linear(&self, args: Linear<'_, Self>) -> Vec<Tensor<Self>> {
        let weights = || args.projections.iter().map(|p| p.weight);
        let tiles = || gemm_amx::takes(self, weights());
        let _timed = self.profile.time("linear", || Work::linear(&args).on(tiles()));
        self.scope(|| linear::linear(self, args))
    }
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Tensor<Self> {
        let tiles = || gemm_amx::takes(self, args.terms.iter().map(|t| t.weight));
        let work = || Work::linear_backward(&args).on(tiles());
        let _timed = self.profile.time("linear_backward", work);
        self.scope(|| linear::linear_backward(self, args))
    }
    fn attention(&self, args: &Attention<'_, Self>) -> Attended<Self> {
        let several = args.queries.lens.iter().any(|&n| n > 1);
        let work = || Work::attention(args, 2.0).on(self.amx().filter(|_| several));
        let _timed = self.profile.time("attention", work);
        self.scope(|| attention::attention(self, args))
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> [Tensor<Self>; 3] {
        let work = || Work::attention(args.forward, 5.0).on(self.amx());
        let _timed = self.profile.time("attention_backward", work);
        self.scope(|| attention::attention_backward(self, args))
    }
    fn cache_write(&self, args: CacheWrite<'_, Self>) {
        let _timed = self.profile.time("cache_write", || Work::passes(args.source, 2));
        embed::cache_write(args);
    }
    fn gated(&self, args: &Gated<'_, Self>) -> Tensor<Self> {
        let _timed = self
            .profile
            .time("gated", || Work::passes(args.gate, 2 + usize::from(args.up.is_some())));
        self.scope(|| gated::gated(self, args))
    }
    fn gated_backward(
        &self,
        args: &Gated<'_, Self>,
        d_h: &Tensor<Self>,
    ) -> (Tensor<Self>, Option<Tensor<Self>>) {
        let _timed = self.profile.time("gated_backward", || {
            Work::passes(args.gate, 3 + 2 * usize::from(args.up.is_some()))
        });
        self.scope(|| gated::gated_backward(self, args, d_h))
    }
    fn dropout(&self, x: &Tensor<Self>, dropout: &Dropout) -> Tensor<Self> {
        let _timed = self.profile.time("dropout", || Work::passes(x, 2));
        self.scope(|| elementwise::dropout(self, x, dropout))
    }
    fn add(&self, a: Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        let _timed = self.profile.time("add", || Work::passes(b, 3));
        self.scope(|| elementwise::add(self, a, b))
    }
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Loss<Self> {
        let tiles = || gemm_amx::takes(self, [args.weight].into_iter());
        let _timed = self.profile.time("head_loss", || Work::head_loss(&args).on(tiles()));
        self.scope(|| head::head_loss(self, args))
    }
    fn argmax(&self, logits: &Tensor<Self>, forbidden: &[u32]) -> Vec<u32> {
        let _timed = self.profile.time("argmax", || Work::over([logits]));
        self.scope(|| head::argmax(self, logits, forbidden))
    }
    fn sample(&self, args: &Sample<'_, Self>) -> Vec<u32> {
        let _timed = self.profile.time("sample", || Work::over([args.logits]));
        self.scope(|| head::sample(self, args))
    }
    fn tokens(&self, chosen: Vec<u32>) -> Vec<u32> {
        chosen
    }
    fn route(&self, args: &Route<'_, Self>) -> Routing<Self> {
        let _timed = self.profile.time("route", || {
            Work::moves(
                (8 * args.logits.len() * args.tasks.len() * args.n_splits * args.n_skills) as f64,
            )
        });
        self.scope(|| route::route(self, args))
    }
    fn route_backward(&self, args: RouteBackward<'_, Self>) {
        let _timed = self.profile.time("route_backward", || Work::passes(args.d_weights, 3));
        self.scope(|| route::route_backward(args));
    }
    fn mix(&self, args: Mix<'_, Self>) -> MixedPair<Self> {
        let _timed = self.profile.time("mix", || Work::mix(&args));
        self.scope(|| mix::mix(self, args))
    }
    fn shrink(&self, args: Shrink<'_, Self>) -> Vec<Tensor<Self>> {
        let work = || Work::shrink(&args);
        let _timed = self.profile.time("shrink", work);
        self.scope(|| shrink::shrink(self, args))
    }
    fn shrink_stacked(&self, args: ShrinkStacked<'_, Self>) -> Tensor<Self> {
        let _timed = self.profile.time("shrink_stacked", || Work::shrink_stacked(&args));
        self.scope(|| shrink::shrink_stacked(self, args))
    }
    fn lora_backward(&self, args: LoraBackward<'_, Self>) -> Vec<LoraGradients<Self>> {
        let work = || Work::lora_backward(&args);
        let _timed = self.profile.time("lora_backward", work);
        self.scope(|| grad::lora_backward(self, args))
    }
    fn unmix(&self, args: Unmix<'_, Self>) {
        let _timed = self.profile.time("unmix", || Work::unmix(&args));
        self.scope(|| mix::unmix(self, args));
    }
    fn sum_of_squares(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        let _timed = self.profile.time("sum_of_squares", || Work::over([tensor]));
        vec![self.scope(|| adamw::sum_of_squares(self, tensor))]
    }
    fn sum_of_squares_in(&self, tensor: &Tensor<Self>, ranges: &[Range<usize>]) -> Vec<f64> {
        let _timed = self.profile.time("sum_of_squares", || Work::over([tensor]));
        vec![self.scope(|| adamw::sum_of_squares_in(self, tensor, ranges))]
    }
    fn clear(&self, tensor: &mut Tensor<Self>) {
        let buffer = tensor.buffer_mut().expect("a tensor that is written is held once");
        let parts = buffer.bytes_mut().chunks_mut(4 * GRAIN);
        self.scope(|| run_tasks(parts, |bytes| bytes.fill(0)));
    }
    fn adamw(&self, args: AdamW<'_, Self>) {
        let _timed = self.profile.time("adamw", || Work::passes(args.params, 7));
        self.scope(|| adamw::adamw(self, args));
    }
}
