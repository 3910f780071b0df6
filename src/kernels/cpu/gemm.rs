//! Matrix products over packed panels: `sums[m, n] += Σ_k lhs[m, k] * rhs[k, n]`.
//!
//! ```text
//! lhs    Packed       [tile][k][MR]            f32, once per operation, shared by all tasks
//! rhs    panels       [panel][k][WIDTH]        f32, once per task and block of k, in its L2 cache
//! sums   Accumulator  [tile][panel][MR][WIDTH] f32, a task's rows x 128 columns
//! ```
//!
//! The register tile is `MR x WIDTH` (`WIDTH = 16 NV`, both of the instruction set). Within a block
//! of [`K_BLOCK`] an element is one chain of fused multiply-adds in registers; blocks are added to
//! the sums in order. So an element's bits depend on its own row and column and on K, not on how
//! many rows there are, where in a tile it lies, or which thread computes it.
//!
//! Loops here are loops, not `array::map` or `from_fn`: intrinsics in a closure are compiled without
//! the instruction set wherever the closure's caller is not inlined, each to a function call.
//!
//! Frozen weights are packed anew by every operation, straight from the mapped file: a second copy
//! of the base would double its memory, and at 1000 rows packing takes 2 % of the time.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{
    super::ops::{Dropout, TokenKey},
    Cpu,
    buffer::Buffer,
    isa::{Element, ElementMut, Isa, LANES, Simd, SimdOp},
};
use crate::{
    dtype::Dtype,
    tensor::{Frozen, Tensor},
};

/// Products of an element that are summed in registers before they are added to the others.
pub(super) const K_BLOCK: usize = 256;
/// Columns of a task.
pub(super) const COLS: usize = 128;
/// Tiles of rows that stay in the L2 cache while the panels pass over them.
const TILES: usize = 16;

/// Evaluates an expression with the element type of a dtype's bytes.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $element = $crate::kernels::cpu::isa::F32Bytes;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $element = $crate::kernels::cpu::isa::Bf16Bytes;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $element = $crate::kernels::cpu::isa::F16Bytes;
                $body
            }
            $crate::dtype::Dtype::F64 => unreachable!("neither activations nor files have f64"),
        }
    };
}
pub(super) use with_element;

/// Calls a function with the register tile of an instruction set as constants.
macro_rules! with_tile {
    ($s:ident, $function:ident($($argument:expr),*)) => {
        match ($s::MR, $s::NV) {
            (4, 1) => $function::<$s, 4, 1>($($argument),*),
            (6, 1) => $function::<$s, 6, 1>($($argument),*),
            (12, 2) => $function::<$s, 12, 2>($($argument),*),
            _ => unreachable!("a register tile that has no kernel"),
        }
    };
}

/// A matrix to read: an activation, a parameter or a frozen weight, or a part of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    bytes: &'a [u8],
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    pub(super) cols: usize,
    stride: usize,
}

impl<'a> Matrix<'a> {
    pub(super) fn tensor(tensor: &'a Tensor<Cpu>) -> Self {
        let Tensor { dtype, rows, cols, .. } = *tensor;
        Self { bytes: tensor.buffer.bytes(), dtype, rows, cols, stride: cols }
    }

    pub(super) fn frozen(weight: &'a Frozen) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        Self { bytes: weight.bytes(), dtype: weight.dtype(), rows, cols, stride: cols }
    }

    pub(super) fn f32s(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = bytemuck::cast_slice(values);
        Self { bytes, dtype: Dtype::F32, rows, cols, stride: cols }
    }

    pub(super) fn bf16s(values: &'a [bf16], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = bytemuck::cast_slice(values);
        Self { bytes, dtype: Dtype::Bf16, rows, cols, stride: cols }
    }

    /// Some rows and columns of it.
    pub(super) fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?}");
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?}");
        let first = (rows.start * self.stride + cols.start) * self.dtype.size_bytes();
        // A part without elements may start past the end.
        let bytes = self.bytes.get(first..).unwrap_or_default();
        Self { bytes, rows: rows.len(), cols: cols.len(), ..self }
    }

    /// Some rows of it.
    pub(super) fn part_rows(self, rows: Range<usize>) -> Self {
        self.part(rows, 0..self.cols)
    }

    /// The elements of a row; `E` is the element type of `dtype`.
    #[inline(always)]
    pub(super) fn row<E: Element>(self, row: usize) -> &'a [E::Item] {
        let size = size_of::<E::Item>();
        assert!(row < self.rows);
        let start = row * self.stride * size;
        bytemuck::cast_slice(&self.bytes[start..start + self.cols * size])
    }
}

/// A left operand in tiles of `MR` rows, `[tile][k][MR]`, rows past the end zero.
pub(super) struct Packed {
    buffer: Buffer,
    /// The row of the operation's output that tile 0 starts with.
    first_row: usize,
    k: usize,
    mr: usize,
}

impl Packed {
    /// `lhs = matrix`, for output rows from `first_row` on, packed by all threads.
    pub(super) fn rows(cpu: &Cpu, matrix: Matrix<'_>, first_row: usize) -> Self {
        let mut packed = Self::unwritten(cpu, matrix.rows, matrix.cols, first_row);
        let (isa, mr) = (cpu.isa, packed.mr);
        let tile = mr * matrix.cols;
        if tile > 0 {
            let tiles = packed.buffer.as_mut_slice::<f32>().par_chunks_mut(tile * TILES);
            tiles.enumerate().for_each(|(i, out)| {
                isa.run(PackRows { matrix, first_row: i * TILES * mr, out });
            });
        }
        packed
    }

    /// [`Packed::rows`] on the calling thread only, for use within a task.
    pub(super) fn rows_here(cpu: &Cpu, matrix: Matrix<'_>, first_row: usize) -> Self {
        let mut packed = Self::unwritten(cpu, matrix.rows, matrix.cols, first_row);
        cpu.isa.run(PackRows { matrix, first_row: 0, out: packed.buffer.as_mut_slice() });
        packed
    }

    /// `lhs = matrixᵀ`.
    pub(super) fn columns(cpu: &Cpu, matrix: Matrix<'_>) -> Self {
        let mut packed = Self::unwritten(cpu, matrix.cols, matrix.rows, 0);
        let (mr, k) = (packed.mr, packed.k);
        if k > 0 {
            let tiles = packed.buffer.as_mut_slice::<f32>().chunks_mut(mr * k);
            tiles.enumerate().for_each(|(tile, out)| {
                let cols = tile * mr..matrix.cols.min(tile * mr + mr);
                let part = matrix.part(0..k, cols);
                for (i, out) in out.chunks_mut(mr).enumerate() {
                    with_element!(part.dtype, E => {
                        out.fill(0.0);
                        for (o, &item) in out.iter_mut().zip(part.row::<E>(i)) {
                            *o = E::get(item);
                        }
                    });
                }
            });
        }
        packed
    }

    /// Room for `n_rows x k`: at first for any `k` values of each row ([`Packed::values_mut`]),
    /// then tile by tile for their packed form ([`Packed::tiles_mut`], [`pack_tile`]).
    pub(super) fn unwritten(cpu: &Cpu, n_rows: usize, k: usize, first_row: usize) -> Self {
        let mr = tile_shape(cpu.isa).0;
        Self { buffer: cpu.scratch(n_rows.next_multiple_of(mr) * k), first_row, k, mr }
    }

    /// All values.
    pub(super) fn values(&self) -> &[f32] {
        self.buffer.as_slice()
    }

    /// All values, for writing.
    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        self.buffer.as_mut_slice()
    }

    /// The tiles, `MR x k` values each.
    pub(super) fn tiles_mut(&mut self) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        let tile = (self.mr * self.k).max(1);
        self.buffer.as_mut_slice::<f32>().par_chunks_mut(tile)
    }

    fn tile(&self, tile: usize, k: Range<usize>) -> &[f32] {
        let start = tile * self.k;
        &self.buffer.as_slice()[(start + k.start) * self.mr..(start + k.end) * self.mr]
    }
}

/// Packs at most `MR` rows as one tile.
pub(super) fn pack_tile(isa: Isa, rows: Matrix<'_>, out: &mut [f32]) {
    isa.run(PackRows { matrix: rows, first_row: 0, out });
}

/// `MR` and `WIDTH` of an instruction set.
pub(super) fn tile_shape(isa: Isa) -> (usize, usize) {
    struct Shape;
    impl SimdOp for Shape {
        type Output = (usize, usize);
        #[inline(always)]
        fn eval<S: Simd>(self, _: S) -> (usize, usize) {
            (S::MR, S::NV * LANES)
        }
    }
    isa.run(Shape)
}

/// Packs consecutive tiles of rows.
struct PackRows<'a> {
    matrix: Matrix<'a>,
    first_row: usize,
    out: &'a mut [f32],
}

impl SimdOp for PackRows<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_tile!(S, pack_rows(simd, self));
    }
}

#[inline(always)]
fn pack_rows<S: Simd, const MR: usize, const NV: usize>(simd: S, args: PackRows<'_>) {
    let PackRows { matrix, first_row, out } = args;
    with_element!(matrix.dtype, E => {
        for (tile, out) in out.chunks_mut((MR * matrix.cols).max(1)).enumerate() {
            let mut rows: [&[<E as Element>::Item]; MR] = [&[]; MR];
            let first = first_row + tile * MR;
            for (i, row) in rows.iter_mut().enumerate().take(matrix.rows - first) {
                *row = matrix.row::<E>(first + i);
            }
            for (i, out) in out.as_chunks_mut::<MR>().0.chunks_mut(LANES).enumerate() {
                let mut block = [simd.splat(0.0); LANES];
                for (v, row) in block.iter_mut().zip(rows) {
                    *v = load_lanes::<S, E>(simd, row, i);
                }
                let block = simd.transpose(block);
                for (out, v) in out.iter_mut().zip(block) {
                    let mut lanes = [0.0; LANES];
                    simd.store(v, &mut lanes);
                    out.copy_from_slice(&lanes[..MR]);
                }
            }
        }
    });
}

/// Lanes `16 i ..` of a row, widened; 0 past its end.
#[inline(always)]
fn load_lanes<S: Simd, E: Element>(simd: S, row: &[E::Item], i: usize) -> S::V {
    let (whole, rest) = row.as_chunks();
    match whole.get(i) {
        Some(whole) => E::load(simd, whole),
        None if i == whole.len() => E::load_part(simd, rest),
        None => simd.splat(0.0),
    }
}

/// A right operand, or one that stands beside others in the columns.
#[derive(Clone, Copy)]
pub(super) struct Rhs<'a> {
    pub(super) matrix: Matrix<'a>,
    /// `rhs[k, n]` is `matrix[n, k]`, else `matrix[k, n]`.
    pub(super) transposed: bool,
    /// The output column of `n = 0`.
    pub(super) first_col: usize,
}

impl Rhs<'_> {
    fn k(&self) -> usize {
        if self.transposed { self.matrix.cols } else { self.matrix.rows }
    }

    fn cols(&self) -> Range<usize> {
        let n = if self.transposed { self.matrix.rows } else { self.matrix.cols };
        self.first_col..self.first_col + n
    }
}

/// One product of [`Accumulator::add`].
pub(super) struct Product<'a> {
    pub(super) lhs: &'a Packed,
    /// Where in `lhs` the right operand's k starts.
    pub(super) first_k: usize,
    /// The output rows that it is added to.
    pub(super) rows: Range<usize>,
    /// Right operands side by side, without gaps, all of one K. Columns that they do not have are
    /// left alone.
    pub(super) rhs: &'a [Rhs<'a>],
}

/// Sums of products: some rows and at most [`COLS`] columns of an output, in f32.
pub(super) struct Accumulator {
    isa: Isa,
    sums: Buffer,
    panels: Buffer,
    rows: Range<usize>,
    cols: Range<usize>,
    mr: usize,
    width: usize,
}

impl Accumulator {
    /// Zeros.
    pub(super) fn new(cpu: &Cpu, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(cols.len() <= COLS);
        let (mr, width) = tile_shape(cpu.isa);
        let padded_cols = cols.len().next_multiple_of(width);
        let mut sums = cpu.scratch(rows.len().next_multiple_of(mr) * padded_cols);
        sums.bytes_mut().fill(0);
        let panels = cpu.scratch(K_BLOCK * padded_cols);
        Self { isa: cpu.isa, sums, panels, rows, cols, mr, width }
    }

    /// Adds a product. `lhs`'s tiles and this one's must begin at the same rows.
    pub(super) fn add(&mut self, product: &Product<'_>) {
        self.isa.run(Add { sums: self, product });
    }

    /// The columns' sums of output row `row`; rubbish past the last column.
    pub(super) fn row(&self, row: usize) -> [f32; COLS] {
        let row = row - self.rows.start;
        let (tile, within) = (row / self.mr, row % self.mr);
        let n_panels = self.cols.len().div_ceil(self.width);
        let mut values = [0.0; COLS];
        let sums = self.sums.as_slice::<f32>();
        for (panel, values) in values.chunks_mut(self.width).take(n_panels).enumerate() {
            let start = ((tile * n_panels + panel) * self.mr + within) * self.width;
            values.copy_from_slice(&sums[start..start + self.width]);
        }
        values
    }
}

/// [`Accumulator::add`].
struct Add<'a> {
    sums: &'a mut Accumulator,
    product: &'a Product<'a>,
}

impl SimdOp for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_tile!(S, add(simd, self));
    }
}

#[inline(always)]
fn add<S: Simd, const MR: usize, const NV: usize>(simd: S, args: Add<'_>) {
    let Accumulator { sums, panels, rows, cols, width, .. } = args.sums;
    let Product { lhs, first_k, rows: product_rows, rhs } = args.product;
    let (Some(first), Some(last)) = (rhs.first(), rhs.last()) else { return };
    let k = first.k();
    assert!(rhs.iter().all(|rhs| rhs.k() == k) && first_k + k <= lhs.k, "operands agree in K");
    assert!(product_rows.start >= rows.start && product_rows.end <= rows.end);
    let skipped = rows.start - lhs.first_row;
    assert_eq!(skipped % MR, 0, "tiles of sums are tiles of the left operand");

    // Where the product's rows and columns lie among the sums. Padding counts as wanted, so that
    // only tiles which others share need care.
    let first_row = product_rows.start - rows.start;
    let end_row =
        if product_rows.end == rows.end { usize::MAX } else { product_rows.end - rows.start };
    let first_col = first.first_col.max(cols.start) - cols.start;
    let last_end = last.cols().end;
    let end_col =
        if last_end >= cols.end { usize::MAX } else { last_end.saturating_sub(cols.start) };
    if product_rows.is_empty() || first.first_col >= cols.end || end_col <= first_col {
        return;
    }
    let n_panels = cols.len().div_ceil(*width);
    let used_panels = first_col / *width..end_col.div_ceil(*width).min(n_panels);
    let tiles = first_row / MR..end_row.min(rows.len()).div_ceil(MR);

    let (panels, sums) = (panels.as_mut_slice::<f32>(), sums.as_mut_slice::<f32>());
    let (sums_tiles, _) = sums.as_chunks_mut::<LANES>().0.as_chunks_mut::<NV>();
    for k0 in (0..k).step_by(K_BLOCK) {
        let block = k0..k.min(k0 + K_BLOCK);
        let panel_len = block.len() * *width;
        let panels = &mut panels[..n_panels * panel_len];
        if first_col > 0 || rhs.len() > 1 || last_end < cols.start + n_panels * *width {
            panels.fill(0.0);
        }
        for rhs in *rhs {
            pack_rhs::<S>(simd, rhs, block.clone(), cols, panels);
        }
        for some_tiles in tiles.clone().step_by(TILES) {
            for panel in used_panels.clone() {
                let rhs = &panels[panel * panel_len..][..panel_len];
                let (rhs, _) = rhs.as_chunks::<LANES>().0.as_chunks::<NV>();
                for tile in some_tiles..tiles.end.min(some_tiles + TILES) {
                    let lhs =
                        lhs.tile(skipped / MR + tile, first_k + block.start..first_k + block.end);
                    let sums = sums_tiles[(tile * n_panels + panel) * MR..]
                        .first_chunk_mut::<MR>()
                        .expect("a tile has MR rows");
                    let wanted = Wanted {
                        rows: clamp(first_row, tile * MR, MR)..clamp(end_row, tile * MR, MR),
                        cols: clamp(first_col, panel * *width, *width)
                            ..clamp(end_col, panel * *width, *width),
                    };
                    add_tile(simd, lhs.as_chunks::<MR>().0, rhs, sums, &wanted);
                }
            }
        }
    }
}

/// `at` relative to `start`, within `0..=len`.
#[inline(always)]
fn clamp(at: usize, start: usize, len: usize) -> usize {
    at.saturating_sub(start).min(len)
}

/// The rows and columns of a register tile that a product is added to.
struct Wanted {
    rows: Range<usize>,
    cols: Range<usize>,
}

/// The innermost product: a tile of the left operand with a panel of the right one.
#[inline(always)]
fn add_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    lhs: &[[f32; MR]],
    rhs: &[[[f32; LANES]; NV]],
    sums: &mut [[[f32; LANES]; NV]; MR],
    wanted: &Wanted,
) {
    let mut tile = [[simd.splat(0.0); NV]; MR];
    for (l, r) in lhs.iter().zip(rhs) {
        let mut r_lanes = [simd.splat(0.0); NV];
        for (lanes, r) in r_lanes.iter_mut().zip(r) {
            *lanes = simd.load(r);
        }
        for i in 0..MR {
            let l = simd.splat(l[i]);
            for j in 0..NV {
                tile[i][j] = simd.fma(l, r_lanes[j], tile[i][j]);
            }
        }
    }
    if wanted.rows.len() == MR && wanted.cols.len() == NV * LANES {
        for i in 0..MR {
            for j in 0..NV {
                simd.store(simd.add(simd.load(&sums[i][j]), tile[i][j]), &mut sums[i][j]);
            }
        }
        return;
    }
    // Rows of other segments and columns of other splits must not even get a zero: 0 * inf is NaN.
    let mut products = [[[0.0; LANES]; NV]; MR];
    for i in 0..MR {
        for j in 0..NV {
            simd.store(tile[i][j], &mut products[i][j]);
        }
    }
    for i in wanted.rows.clone() {
        let (sums, products) = (sums[i].as_flattened_mut(), products[i].as_flattened());
        for j in wanted.cols.clone() {
            sums[j] += products[j];
        }
    }
}

/// Packs a block of k of a right operand into its columns of the panels `[panel][k][WIDTH]`.
#[inline(always)]
fn pack_rhs<S: Simd>(
    simd: S,
    rhs: &Rhs<'_>,
    k: Range<usize>,
    cols: &Range<usize>,
    panels: &mut [f32],
) {
    let all = rhs.cols();
    let some = all.start.max(cols.start)..all.end.min(cols.end);
    if some.is_empty() {
        return;
    }
    let at = some.start - cols.start;
    let n = some.start - all.start..some.end - all.start;
    if rhs.transposed {
        let matrix = rhs.matrix.part(n, k);
        with_element!(matrix.dtype, E => pack_transposed::<S, E>(simd, matrix, at, panels));
    } else {
        let matrix = rhs.matrix.part(k, n);
        with_element!(matrix.dtype, E => pack_as_is::<S, E>(simd, matrix, at, panels));
    }
}

/// `panels[.., k, at + n] = matrix[k, n]`.
#[inline(always)]
fn pack_as_is<S: Simd, E: Element>(simd: S, matrix: Matrix<'_>, at: usize, panels: &mut [f32]) {
    let (n_k, width) = (matrix.rows, S::NV * LANES);
    for k in 0..n_k {
        let mut row = matrix.row::<E>(k);
        let mut at = at;
        while !row.is_empty() {
            let (now, later) = row.split_at(row.len().min(LANES - at % LANES));
            let start = (at / width * n_k + k) * width + at % width;
            let out = &mut panels[start..start + now.len()];
            match (now.try_into(), (&mut *out).try_into()) {
                (Ok(now), Ok(out)) => simd.store(E::load(simd, now), out),
                _ => out.iter_mut().zip(now).for_each(|(o, &item)| *o = E::get(item)),
            }
            at += now.len();
            row = later;
        }
    }
}

/// `panels[.., k, at + n] = matrix[n, k]`.
#[inline(always)]
fn pack_transposed<S: Simd, E: Element>(
    simd: S,
    matrix: Matrix<'_>,
    at: usize,
    panels: &mut [f32],
) {
    let (n_k, width) = (matrix.cols, S::NV * LANES);
    let mut n = 0;
    while n < matrix.rows {
        let lane = (at + n) % LANES;
        let now = (LANES - lane).min(matrix.rows - n);
        let mut rows: [&[E::Item]; LANES] = [&[]; LANES];
        for (i, row) in rows.iter_mut().enumerate().take(now) {
            *row = matrix.row::<E>(n + i);
        }
        let panel = &mut panels[(at + n) / width * n_k * width..][..n_k * width];
        let first = (at + n) % width;
        for (i, out) in panel.chunks_mut(LANES * width).enumerate() {
            let mut block = [simd.splat(0.0); LANES];
            for (v, row) in block.iter_mut().zip(rows) {
                *v = load_lanes::<S, E>(simd, row, i);
            }
            let block = simd.transpose(block);
            for (out, v) in out.chunks_exact_mut(width).zip(block) {
                let out = &mut out[first..first + now];
                match out.as_chunks_mut().0 {
                    [out] => simd.store(v, out),
                    _ => simd.store_part(v, out),
                }
            }
        }
        n += now;
    }
}

/// One task's piece of every row of an output: the rows' columns `cols`, top to bottom.
pub(super) struct Rectangle<'a, T> {
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    pub(super) out: Vec<&'a mut [T]>,
}

/// Cuts rows of a row-major output, of which the first is `first_row`, into rectangles of at most
/// `n_rows` x [`COLS`].
pub(super) fn cut<T>(
    out: &mut [T],
    cols: usize,
    first_row: usize,
    n_rows: usize,
) -> Vec<Rectangle<'_, T>> {
    let mut all = Vec::new();
    if out.is_empty() {
        return all;
    }
    for (i, some) in out.chunks_mut(cols * n_rows).enumerate() {
        let start = first_row + i * n_rows;
        let rows = start..start + some.len() / cols;
        let n_before = all.len();
        all.extend((0..cols).step_by(COLS).map(|start| Rectangle {
            rows: rows.clone(),
            cols: start..cols.min(start + COLS),
            out: Vec::with_capacity(rows.len()),
        }));
        for row in some.chunks_mut(cols) {
            for (rectangle, piece) in all[n_before..].iter_mut().zip(row.chunks_mut(COLS)) {
                rectangle.out.push(piece);
            }
        }
    }
    all
}

/// How the rows of an operation are cut. By shape alone; the bits of a row do not depend on it.
pub(super) struct Cut {
    /// Rows whose left operands are packed at a time.
    pub(super) packed: usize,
    /// Rows of a task.
    pub(super) task: usize,
}

impl Cut {
    /// For left operands of `k` columns in all and outputs of `n` columns in all. The packed copy
    /// of a long batch stays below 32 MiB, and few columns are made up for by more tasks along the
    /// rows. All numbers are multiples of every `MR`.
    pub(super) fn new(k: usize, n: usize) -> Self {
        let packed = ((8 << 20) / k.max(1) / 96 * 96).clamp(96, 1152);
        let task = if n >= 8 * COLS { packed } else { packed.min(576) };
        Self { packed, task }
    }
}

/// What happens to a sum before it is rounded: `residual + dropout(sum + bias)`.
#[derive(Clone, Copy, Default)]
pub(super) struct Finish<'a> {
    /// Of all output columns.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) dropout: Option<&'a Dropout>,
    pub(super) residual: Residual<'a>,
}

/// Where [`Finish`] finds the residual.
#[derive(Clone, Copy, Default)]
pub(super) enum Residual<'a> {
    #[default]
    None,
    /// In the output, which it makes room for.
    Output,
    Of(Matrix<'a>),
}

impl Finish<'_> {
    /// Writes a task's outputs from its sums by row.
    pub(super) fn write<T: ElementMut<Item = T>>(
        self,
        isa: Isa,
        rectangle: Rectangle<'_, T>,
        sums: impl Fn(usize) -> [f32; COLS],
    ) {
        isa.run(Write { finish: self, rectangle, sums });
    }
}

/// [`Finish::write`].
struct Write<'a, T, F> {
    finish: Finish<'a>,
    rectangle: Rectangle<'a, T>,
    sums: F,
}

impl<T: ElementMut<Item = T>, F: Fn(usize) -> [f32; COLS]> SimdOp for Write<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Finish { bias, dropout, residual } = self.finish;
        let Rectangle { rows, cols, out } = self.rectangle;
        let mut bias_lanes = [0.0; COLS];
        if let Some(bias) = bias {
            bias_lanes[..cols.len()].copy_from_slice(&bias[cols.clone()]);
        }
        for (row, out) in rows.zip(out) {
            let mut values = (self.sums)(row);
            if bias.is_some() {
                for (v, b) in values.iter_mut().zip(&bias_lanes) {
                    *v += b;
                }
            }
            if let Some(dropout) = dropout {
                let factors = factors(dropout, row, cols.start);
                for (v, &f) in values.iter_mut().zip(&factors) {
                    *v = if f == 0.0 { 0.0 } else { *v * f };
                }
            }
            let other = match residual {
                Residual::None => None,
                Residual::Output => Some(widen::<S, T>(simd, out)),
                Residual::Of(matrix) => Some(with_element!(matrix.dtype, E => {
                    widen::<S, E>(simd, &matrix.row::<E>(row)[cols.clone()])
                })),
            };
            if let Some(other) = other {
                for (v, o) in values.iter_mut().zip(&other) {
                    *v += o;
                }
            }
            let (values, (whole, rest)) = (values.as_chunks().0, out.as_chunks_mut());
            for (value, out) in values.iter().zip(&mut *whole) {
                T::store(simd, simd.load(value), out);
            }
            if let Some(value) = values.get(whole.len()) {
                T::store_part(simd, simd.load(value), rest);
            }
        }
    }
}

/// At most [`COLS`] elements as f32; 0 past the last.
#[inline(always)]
fn widen<S: Simd, E: Element>(simd: S, row: &[E::Item]) -> [f32; COLS] {
    let mut values = [0.0; COLS];
    let (whole, rest) = row.as_chunks();
    let lanes = values.as_chunks_mut().0;
    for (whole, lanes) in whole.iter().zip(&mut *lanes) {
        simd.store(E::load(simd, whole), lanes);
    }
    if !rest.is_empty() {
        simd.store(E::load_part(simd, rest), &mut lanes[whole.len()]);
    }
    values
}

/// [`Dropout::factor`] of [`COLS`] columns from a multiple of 8 on.
#[inline(always)]
fn factors(dropout: &Dropout, token: usize, first_col: usize) -> [f32; COLS] {
    let TokenKey { example, position } = dropout.tokens[token];
    let (threshold, scale) = (dropout.threshold(), dropout.scale());
    let mut blocks = [[0; 4]; COLS / 8];
    for (i, block) in blocks.iter_mut().enumerate() {
        let counter = [(first_col / 8 + i) as u32, position, example, dropout.site];
        *block = dropout.key.block(counter);
    }
    let mut factors = [scale; COLS];
    for (pair, word) in factors.as_chunks_mut::<2>().0.iter_mut().zip(blocks.as_flattened()) {
        pair[0] = if word & 0xFFFF < threshold { 0.0 } else { scale };
        pair[1] = if word >> 16 < threshold { 0.0 } else { scale };
    }
    factors
}
