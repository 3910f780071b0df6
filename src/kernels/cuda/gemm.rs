//! Products with frozen weights: which kernel takes them, and its launch.
//!
//! ```text
//! mma       linear.cu          every GPU, every shape, f32 and bf16
//! wgmma     linear_wgmma.cu    Hopper, bf16, rows of whole 16 bytes; other shapes go to mma
//! ```
//!
//! `POLYTAPE_CUDA_GEMM` chooses; without it the fastest that the device has. What a shape goes to depends on the weight's shape
//! alone and never on how many tokens there are: a token's bits do not change with its neighbours.

use std::iter;

use bytemuck::{NoUninit, Zeroable};

use super::{
    Cuda,
    dense::{EXPAND_COLUMNS, MAX_TERMS, ProjectionArg, TermsArg},
    device::{BoxedMatrix, Device, TensorMap},
    must, narrow,
};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
    kernels::Precision,
};

/// What multiplies by frozen weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gemm {
    /// Tensor cores by the warp, or CUDA cores in f32.
    Mma,
    /// Tensor cores by the warpgroup.
    Wgmma,
}

impl Gemm {
    /// Its name in `POLYTAPE_CUDA_GEMM`, logs and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mma => "mma",
            Self::Wgmma => "wgmma",
        }
    }

    /// What `POLYTAPE_CUDA_GEMM` says, without it the fastest that the device has.
    ///
    /// # Errors
    /// If it names none.
    pub fn from_env(device: &dyn Device) -> Result<Self> {
        match std::env::var("POLYTAPE_CUDA_GEMM").as_deref() {
            Err(_) | Ok("") if device.hopper_multiprocessors() > 0 => Ok(Self::Wgmma),
            Err(_) | Ok("" | "mma") => Ok(Self::Mma),
            Ok("wgmma") => Ok(Self::Wgmma),
            Ok(other) => {
                Err(Error::Usage(format!("POLYTAPE_CUDA_GEMM={other}: it is mma or wgmma")))
            }
        }
    }
}

/// `ScalarTile` and `MmaTile` of `cuda/gemm.cuh`.
pub(super) const SCALAR_TILE: Tile = Tile { side: 64, shared_bytes: 4 * 64 * (64 + 1) };
pub(super) const MMA_TILE: Tile = Tile { side: 128, shared_bytes: 4 * 128 * (128 + 4) };
pub(super) const GEMM_THREADS: u32 = 256;

/// A tile of a matrix product: rows and columns, and the block's dynamic shared memory.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) side: usize,
    pub(super) shared_bytes: usize,
}

impl Tile {
    /// What frozen weights are multiplied in.
    fn of(cuda: &Cuda) -> Self {
        if cuda.compute == Dtype::Bf16 { MMA_TILE } else { SCALAR_TILE }
    }

    /// Blocks for a result of this shape.
    pub(super) fn grid(self, rows: usize, cols: usize) -> [usize; 3] {
        [cols.div_ceil(self.side), rows.div_ceil(self.side), 1]
    }
}

/// `Stages` of `cuda/linear_wgmma.cu`.
const WGMMA_ROWS: usize = 128;
/// Columns of its tiles.
const WGMMA_WIDTHS: [usize; 3] = [256, 128, 64];
const WGMMA_DEPTH: usize = 64;
const WGMMA_THREADS: u32 = 384;

fn wgmma_shared_bytes(width: usize) -> usize {
    let (stage, stages) = (2 * WGMMA_DEPTH * (WGMMA_ROWS + width), if width == 64 { 8 } else { 4 });
    1024 + stages * stage + 4 * 8 * 16 * 40 + stages * 2 * 8
}

/// The width of the tiles of `linear_wgmma.cu` for products with so many columns, of matrices whose rows have so
/// many elements; none if they are not for it. That depends on the weight's shape, the width on anything: it
/// changes no bits.
fn wgmma_width(
    cuda: &Cuda,
    tokens: usize,
    widths: impl Iterator<Item = usize> + Clone,
    rows: impl IntoIterator<Item = usize>,
) -> Option<usize> {
    let is_for_it = cuda.gemm == Gemm::Wgmma && cuda.compute == Dtype::Bf16;
    // A copy's rows are multiples of 16 bytes.
    let fits = rows.into_iter().all(|len| len > 0 && len % 8 == 0);
    let multiprocessors = cuda.device().hopper_multiprocessors().max(1) as usize;
    let cost = |&width: &usize| tile_rounds(tokens, widths.clone(), width, multiprocessors);
    (is_for_it && fits).then(|| WGMMA_WIDTHS.into_iter().min_by_key(cost).expect("three widths"))
}

/// So many tokens, whole tiles of them and at most `most`, that a product with `cols` columns takes least for each; `most`
/// where there is no way to know.
pub(super) fn best_tokens(cuda: &Cuda, most: usize, cols: usize) -> usize {
    let multiprocessors = cuda.device().hopper_multiprocessors() as usize;
    if cuda.gemm != Gemm::Wgmma || multiprocessors == 0 {
        return most;
    }
    let cost = |tokens: usize| {
        let of = |width| tile_rounds(tokens, [cols].into_iter(), width, multiprocessors);
        let least = WGMMA_WIDTHS.into_iter().map(of).min().unwrap_or(0);
        least as f64 / tokens as f64
    };
    // The largest of equals.
    let all = (1..=most / WGMMA_ROWS).rev().map(|n| n * WGMMA_ROWS);
    all.min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(most)
}

/// How long the multiprocessor with the most tiles takes: a tile's products, or at least the copies of its
/// left rows, and some more to start and to finish it.
fn tile_rounds(
    tokens: usize,
    widths: impl Iterator<Item = usize>,
    width: usize,
    multiprocessors: usize,
) -> usize {
    wgmma_tiles(tokens, widths, width).div_ceil(multiprocessors) * (width.max(80) + 24)
}

/// Tiles of `linear_wgmma.cu` for products with so many columns each.
fn wgmma_tiles(tokens: usize, widths: impl Iterator<Item = usize>, width: usize) -> usize {
    tokens.div_ceil(WGMMA_ROWS) * widths.map(|n| n.div_ceil(width)).sum::<usize>()
}

/// Blocks of `linear_wgmma.cu`: each takes one tile after another.
fn wgmma_grid(
    cuda: &Cuda,
    tokens: usize,
    widths: impl Iterator<Item = usize>,
    width: usize,
) -> [usize; 3] {
    let tiles = wgmma_tiles(tokens, widths, width);
    [tiles.min(cuda.device().hopper_multiprocessors() as usize), 1, 1]
}

fn tensor_map(cuda: &Cuda, address: u64, rows: usize, cols: usize, box_rows: usize) -> TensorMap {
    let matrix = BoxedMatrix { address, rows, cols, box_rows: narrow(box_rows) };
    must(cuda.device().tensor_map(&matrix))
}

/// Tokens of a block of `expand_stacked` of `cuda/linear.cu`.
const EXPAND_TOKENS: usize = 64;
/// `MAX_PROJECTIONS` of `cuda/linear.cuh`.
pub(super) const MAX_PROJECTIONS: usize = 4;

/// `Projections` of `cuda/linear.cuh`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ProjectionsArg {
    of: [ProjectionArg; MAX_PROJECTIONS],
    n: u32,
    padding: u32,
}

/// `y = epilogue(x Wᵀ)` of some linears with one input, at most [`MAX_PROJECTIONS`].
pub(super) struct Forward<'a> {
    pub(super) projections: &'a [ProjectionArg],
    /// Its address.
    pub(super) x: u64,
    pub(super) tokens: usize,
    pub(super) d_in: usize,
    pub(super) output: Precision,
}

impl Forward<'_> {
    fn widths(&self) -> impl Iterator<Item = usize> + Clone {
        self.projections.iter().map(|projection| projection.d_out as usize)
    }

    fn arg(&self) -> ProjectionsArg {
        let mut of = [ProjectionArg::zeroed(); MAX_PROJECTIONS];
        of[..self.projections.len()].copy_from_slice(self.projections);
        ProjectionsArg { of, n: narrow(self.projections.len()), padding: 0 }
    }

    /// The launch without tiles of warpgroups: blocks of so many columns and tokens.
    fn launch_blocks(
        &self,
        cuda: &Cuda,
        name: String,
        shared_bytes: usize,
        [columns, tokens]: [usize; 2],
    ) {
        let kernel = cuda.kernel("linear", name).arg(self.arg()).arg(self.x);
        let kernel = kernel.count(self.tokens).count(self.d_in).shared_bytes(shared_bytes);
        let widest = self.widths().max().unwrap_or(0);
        let grid = [widest.div_ceil(columns), self.tokens.div_ceil(tokens), self.projections.len()];
        kernel.launch(grid, GEMM_THREADS);
    }

    fn name(&self) -> &'static str {
        if self.output == Precision::Full { "linear_full" } else { "linear" }
    }

    pub(super) fn launch(self, cuda: &Cuda) {
        if self.tokens == 0 {
            return;
        }
        if self.projections.iter().any(|projection| projection.epilogue.expand.is_ready()) {
            let kernel = cuda.kernel("linear", "expand_stacked").arg(self.arg());
            let widest = self.widths().max().unwrap_or(0).div_ceil(EXPAND_COLUMNS);
            let grid = [widest, self.tokens.div_ceil(EXPAND_TOKENS), self.projections.len()];
            kernel.count(self.tokens).launch(grid, GEMM_THREADS);
        }
        let Some(width) = wgmma_width(cuda, self.tokens, self.widths(), [self.d_in]) else {
            let Tile { side, shared_bytes } = Tile::of(cuda);
            let name = self.name().to_owned();
            return self.launch_blocks(cuda, name, shared_bytes, [side; 2]);
        };
        let mut maps = [TensorMap::default(); MAX_PROJECTIONS];
        for (map, projection) in maps.iter_mut().zip(self.projections) {
            let rows = projection.d_out as usize;
            *map = tensor_map(cuda, projection.weight, rows, self.d_in, width);
        }
        let kernel = cuda.kernel("linear_wgmma", format!("{}_wgmma_{width}", self.name()));
        let kernel = kernel.arg(self.arg());
        let kernel = kernel.arg(tensor_map(cuda, self.x, self.tokens, self.d_in, WGMMA_ROWS));
        let kernel = kernel.arg(maps).count(self.tokens).count(self.d_in);
        let kernel = kernel.shared_bytes(wgmma_shared_bytes(width));
        let grid = wgmma_grid(cuda, self.tokens, self.widths(), width);
        kernel.launch(grid, WGMMA_THREADS);
    }

    /// By `linear_dot`, which streams the weights for few tokens.
    pub(super) fn launch_dot(self, cuda: &Cuda) {
        if cuda.compute != Dtype::Bf16 {
            return self.launch_blocks(cuda, "linear_dot".to_owned(), 0, [8, 8]);
        }
        // Tiles of 8 tokens.
        let tiles = self.tokens.div_ceil(8).next_power_of_two().min(8);
        self.launch_blocks(cuda, format!("{}_dot_{tiles}", self.name()), 0, [16, 8 * tiles]);
    }
}

/// `TermMaps` of `cuda/linear_wgmma.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct TermMapsArg {
    d_y: [TensorMap; MAX_TERMS],
    weight: [TensorMap; MAX_TERMS],
}

/// `d_x = d_residual + Σ d_y W` and what of the LoRA comes to it, each an address.
pub(super) struct Backward {
    pub(super) d_x: u64,
    pub(super) d_residual: u64,
    pub(super) terms: TermsArg,
    pub(super) tokens: usize,
    pub(super) d_in: usize,
}

impl Backward {
    pub(super) fn launch(self, cuda: &Cuda) {
        let Self { d_x, d_residual, terms, tokens, d_in } = self;
        if tokens == 0 {
            return;
        }
        let used = &terms.terms[..terms.n as usize];
        let depths = used.iter().map(|term| term.d_out as usize);
        let Some(width) = wgmma_width(cuda, tokens, iter::once(d_in), depths.chain([d_in])) else {
            let kernel = cuda.kernel("linear", "linear_backward").arg(d_x).arg(d_residual);
            let kernel = kernel.arg(terms).count(tokens).count(d_in);
            let tile = Tile::of(cuda);
            let kernel = kernel.shared_bytes(tile.shared_bytes);
            return kernel.launch(tile.grid(tokens, d_in), GEMM_THREADS);
        };
        let mut maps = TermMapsArg {
            d_y: [TensorMap::default(); MAX_TERMS],
            weight: [TensorMap::default(); MAX_TERMS],
        };
        for (i, term) in used.iter().enumerate() {
            let d_out = term.d_out as usize;
            maps.d_y[i] = tensor_map(cuda, term.d_y, tokens, d_out, WGMMA_ROWS);
            maps.weight[i] = tensor_map(cuda, term.weight, d_out, d_in, WGMMA_DEPTH);
        }
        let name = format!("linear_backward_wgmma_{width}");
        let kernel = cuda.kernel("linear_wgmma", name).arg(d_x).arg(d_residual).arg(maps);
        let kernel = kernel.arg(terms).count(tokens).count(d_in);
        let kernel = kernel.shared_bytes(wgmma_shared_bytes(width));
        let grid = wgmma_grid(cuda, tokens, iter::once(d_in), width);
        kernel.launch(grid, WGMMA_THREADS);
    }
}
