//! Matrix products over packed panels: `sums[m, n] += Σ_k lhs[m, k] * rhs[k, n]`.
//!
//! ```text
//! lhs    Packed       [block of k][tile][k][MR] f32, once per operation, shared by all tasks
//! rhs    panels       [panel][k][WIDTH]        f32, once per task and block of k, in its L2 cache
//! sums   Accumulator  [panel][tile][MR][WIDTH] f32, a task's rows x up to 128 columns
//! ```
//!
//! What follows one another in time lies one after the other, also across tiles: prefetchers do not
//! cross a page, and a tile of a block is about a page. What cannot (the next tile of an operand that
//! is not in blocks, a weight's or an output's next row) is fetched by instruction.
//!
//! The register tile is `MR x WIDTH` ([`Simd::TILE`]). Within a block
//! of [`K_BLOCK`] an element is one chain of fused multiply-adds in registers; blocks are added to
//! the sums in order. So an element's bits depend on its own row and column and on K, not on how
//! many rows there are, where in a tile it lies, or which thread computes it.
//!
//! Loops here are loops, not `array::map` or `from_fn`: intrinsics in a closure are compiled without
//! the instruction set wherever the closure's caller is not inlined, each to a function call.
//!
//! Frozen weights are packed anew by every operation, straight from the mapped file: a second copy
//! of the base would double its memory, and at 1000 rows packing takes 2 to 4 % of the time.

use std::ops::Range;

use half::bf16;

use super::{
    super::ops::Dropout,
    Cpu,
    buffer::Buffer,
    elementwise::factors,
    isa::{BLOCK_ROWS, Element, ElementMut, Isa, LANES, Simd, SimdOp},
    matrix::{Matrix, Rectangle, with_element},
    threads::run_tasks,
};

/// Products of an element that are summed in registers before they are added to the others.
pub(super) const K_BLOCK: usize = 256;
/// Columns of a task at most.
pub(super) const COLS: usize = 128;
/// Elements of the largest register tile.
const MAX_TILE: usize = 512;
/// Tiles of rows that stay in the L2 cache while the panels pass over them.
const TILES: usize = 16;

/// Rows of a right operand or an output that are fetched before their turn.
pub(super) const ROWS_AHEAD: usize = 8;

/// A left operand in tiles of `MR` rows, `[k][MR]` each, rows past the end zero.
pub(super) struct Packed {
    buffer: Buffer,
    /// The row of the operation's output that tile 0 starts with.
    first_row: usize,
    n_tiles: usize,
    k: usize,
    mr: usize,
    /// Whether all tiles of a [`K_BLOCK`] lie together, or all k of a tile.
    in_blocks: bool,
}

impl Packed {
    /// `lhs = matrix`, for output rows from `first_row` on, packed by all threads.
    pub(super) fn rows(cpu: &Cpu, matrix: Matrix<'_>, first_row: usize) -> Self {
        let mut packed =
            Self { in_blocks: true, ..Self::unwritten(cpu, matrix.rows, matrix.cols, first_row) };
        let (isa, mr) = (cpu.isa, packed.mr);
        let tasks = packed.blocks(matrix).flat_map(|(part, out)| {
            let some_tiles = out.chunks_mut((TILES * mr * part.cols).max(1)).enumerate();
            some_tiles.map(move |(i, out)| (part, i * TILES * mr, out))
        });
        run_tasks(tasks, |(matrix, first_row, out)| isa.run(PackRows { matrix, first_row, out }));
        packed
    }

    /// The blocks of k: what to pack, and where.
    fn blocks<'a>(
        &'a mut self,
        matrix: Matrix<'a>,
    ) -> impl Iterator<Item = (Matrix<'a>, &'a mut [f32])> {
        let block = (self.n_tiles * self.mr * K_BLOCK).max(1);
        self.buffer.as_mut_slice::<f32>().chunks_mut(block).enumerate().map(move |(i, out)| {
            let k = i * K_BLOCK..matrix.cols.min((i + 1) * K_BLOCK);
            (matrix.part(0..matrix.rows, k), out)
        })
    }

    /// Room for `n_rows x k`: at first for any `k` values of each row ([`Packed::values_mut`]),
    /// then tile by tile for their packed form ([`Packed::tiles_mut`], [`pack_tile`]).
    pub(super) fn unwritten(cpu: &Cpu, n_rows: usize, k: usize, first_row: usize) -> Self {
        let mr = tile_shape(cpu.isa).0;
        let n_tiles = n_rows.div_ceil(mr);
        let buffer = cpu.scratch(n_tiles * mr * k);
        Self { buffer, first_row, n_tiles, k, mr, in_blocks: false }
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
    pub(super) fn tiles_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let tile = (self.mr * self.k).max(1);
        self.buffer.as_mut_slice::<f32>().chunks_mut(tile)
    }

    /// Some k, of one block where the operand is in blocks: tile 0 is at the start of the values, and
    /// each next one a stride further.
    fn tiles(&self, k: Range<usize>) -> (&[f32], usize) {
        let (start, stride) = if self.in_blocks {
            let first = k.start / K_BLOCK * K_BLOCK;
            let len = K_BLOCK.min(self.k - first);
            assert!(k.end <= first + len, "a range of k in one block");
            (first * self.n_tiles + k.start - first, len)
        } else {
            (k.start, self.k)
        };
        (&self.buffer.as_slice()[start * self.mr..], stride * self.mr)
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
            S::TILE
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
        pack_rows(simd, self);
    }
}

#[inline(always)]
fn pack_rows<S: Simd>(simd: S, args: PackRows<'_>) {
    let PackRows { matrix, first_row, out } = args;
    let (mr, k) = (S::TILE.0, matrix.cols);
    let n_together = LANES / mr; // Tiles whose rows fill a transposed block.
    with_element!(matrix.dtype, E => {
        for (i, out) in out.chunks_mut((n_together * mr * k).max(1)).enumerate() {
            let mut rows: [&[<E as Element>::Item]; LANES] = [&[]; LANES];
            let first = first_row + i * n_together * mr;
            let n_rows = (out.len() / k).min(matrix.rows - first);
            for (i, row) in rows.iter_mut().enumerate().take(n_rows) {
                *row = matrix.row::<E>(first + i);
            }
            let mut columns = [[0.0; LANES]; LANES];
            for start in (0..k).step_by(LANES) {
                let mut block = [simd.splat(0.0); LANES];
                for (v, row) in block.iter_mut().zip(rows).take(n_rows) {
                    *v = load_lanes::<S, E>(simd, row, start / LANES);
                }
                for (column, v) in columns.iter_mut().zip(simd.transpose(block)) {
                    simd.store(v, column);
                }
                for (tile, out) in out.chunks_mut(mr * k).enumerate() {
                    let out = &mut out[start * mr..k.min(start + LANES) * mr];
                    for (out, column) in out.chunks_exact_mut(mr).zip(&columns) {
                        out.copy_from_slice(&column[tile * mr..(tile + 1) * mr]);
                    }
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

/// A right operand, of all output columns or of some.
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
    /// The output rows that it is added to.
    pub(super) rows: Range<usize>,
    /// Columns that it does not have are left alone.
    pub(super) rhs: Rhs<'a>,
}

/// Sums of products: some rows and at most [`COLS`] columns of an output, in f32.
pub(super) struct Accumulator {
    isa: Isa,
    sums: Buffer,
    /// Whether there is a product in the sums; nothing but rubbish before.
    used: bool,
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
        let sums = cpu.scratch(rows.len().next_multiple_of(mr) * padded_cols);
        let panels = cpu.scratch(K_BLOCK * padded_cols);
        Self { isa: cpu.isa, sums, used: false, panels, rows, cols, mr, width }
    }

    /// Adds a product. `lhs`'s tiles and this one's must begin at the same rows.
    pub(super) fn add(&mut self, product: &Product<'_>) {
        self.isa.run(Add { sums: self, product });
    }

    /// The columns' sums of output row `row`; rubbish past the last column.
    pub(super) fn row(&self, row: usize) -> [f32; COLS] {
        let mut values = [0.0; COLS];
        self.read_row(row, &mut values);
        values
    }

    /// [`Accumulator::row`], to where the last one was.
    #[inline(always)]
    pub(super) fn read_row(&self, row: usize, values: &mut [f32; COLS]) {
        if !self.used {
            return values.fill(0.0);
        }
        let row = row - self.rows.start;
        let (tile, within) = (row / self.mr, row % self.mr);
        let n_panels = self.cols.len().div_ceil(self.width);
        let n_tiles = self.rows.len().div_ceil(self.mr);
        let sums = self.sums.as_slice::<f32>();
        for (panel, values) in values.chunks_mut(self.width).take(n_panels).enumerate() {
            let start = ((panel * n_tiles + tile) * self.mr + within) * self.width;
            let sums = sums[start..start + values.len()].as_chunks::<8>().0; // All widths are whole eights.
            values.as_chunks_mut().0.iter_mut().zip(sums).for_each(|(v, s)| *v = *s);
        }
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
        add(simd, self);
    }
}

#[inline(always)]
fn add<S: Simd>(simd: S, args: Add<'_>) {
    let (mr, tile_width) = S::TILE;
    let Accumulator { sums, used, panels, rows, cols, width, .. } = args.sums;
    let Product { lhs, rows: product_rows, rhs } = args.product;
    let (k, rhs_cols) = (rhs.k(), rhs.cols());
    assert_eq!(k, lhs.k, "operands agree in K");
    assert!(product_rows.start >= rows.start && product_rows.end <= rows.end);
    let skipped = rows.start - lhs.first_row;
    assert_eq!(skipped % mr, 0, "tiles of sums are tiles of the left operand");

    // Where the product's rows and columns lie among the sums. Padding counts as wanted, so that
    // only tiles which others share need care.
    let first_row = product_rows.start - rows.start;
    let end_row =
        if product_rows.end == rows.end { usize::MAX } else { product_rows.end - rows.start };
    let first_col = rhs_cols.start.max(cols.start) - cols.start;
    let end_col =
        if rhs_cols.end >= cols.end { usize::MAX } else { rhs_cols.end.saturating_sub(cols.start) };
    if product_rows.is_empty() || rhs_cols.start >= cols.end || end_col <= first_col {
        return;
    }
    let n_panels = cols.len().div_ceil(*width);
    let used_panels = first_col / *width..end_col.div_ceil(*width).min(n_panels);
    let tiles = first_row / mr..end_row.min(rows.len()).div_ceil(mr);

    let (panels, sums) = (panels.as_mut_slice::<f32>(), sums.as_mut_slice::<f32>());
    let (tile_len, n_tiles) = (mr * tile_width, rows.len().div_ceil(mr));
    // The first product writes the sums, which saves a pass over them, if it has all their tiles.
    let everywhere = tiles == (0..n_tiles) && used_panels == (0..n_panels) && k > 0;
    let only = !*used && everywhere;
    if !*used && !everywhere {
        sums.fill(0.0);
    }
    *used = true;
    for k0 in (0..k).step_by(K_BLOCK) {
        let block = k0..k.min(k0 + K_BLOCK);
        let panel_len = block.len() * *width;
        let panels = &mut panels[..n_panels * panel_len];
        if first_col > 0 || rhs_cols.end < cols.start + n_panels * *width {
            panels.fill(0.0);
        }
        pack_rhs::<S>(simd, rhs, block.clone(), cols, panels);
        let (lhs, stride) = lhs.tiles(block.clone());
        let lhs_of = |tile: usize| &lhs[(skipped / mr + tile) * stride..][..block.len() * mr];
        for some_tiles in tiles.clone().step_by(TILES) {
            let some_tiles = some_tiles..tiles.end.min(some_tiles + TILES);
            for panel in used_panels.clone() {
                let rhs = &panels[panel * panel_len..][..panel_len];
                for tile in some_tiles.clone() {
                    let wanted = Wanted {
                        rows: clamp(first_row, tile * mr, mr)..clamp(end_row, tile * mr, mr),
                        cols: clamp(first_col, panel * *width, *width)
                            ..clamp(end_col, panel * *width, *width),
                        only: only && k0 == 0,
                    };
                    // After the last one the next panel starts over.
                    let next = if tile + 1 < some_tiles.end { tile + 1 } else { some_tiles.start };
                    let sums = &mut sums[(panel * n_tiles + tile) * tile_len..][..tile_len];
                    add_tile(simd, [lhs_of(tile), lhs_of(next)], rhs, sums, &wanted);
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

/// The part of a register tile's sums that a product is added to.
struct Wanted {
    rows: Range<usize>,
    cols: Range<usize>,
    /// There is nothing in the sums yet.
    only: bool,
}

/// The innermost product: a tile of the left operand (and which one is next) with a panel of the
/// right one.
#[inline(always)]
fn add_tile<S: Simd>(
    simd: S,
    [lhs, next_lhs]: [&[f32]; 2],
    rhs: &[f32],
    sums: &mut [f32],
    wanted: &Wanted,
) {
    let (mr, width) = S::TILE;
    if wanted.rows.len() == mr && wanted.cols.len() == width {
        return simd.add_tile(lhs, rhs, sums, wanted.only, next_lhs);
    }
    // Rows of other segments and columns of other splits must not even get a zero: 0 * inf is NaN.
    let mut products = [0.0; MAX_TILE];
    let products = &mut products[..mr * width];
    simd.add_tile(lhs, rhs, products, true, next_lhs);
    if wanted.only {
        sums.fill(0.0);
    }
    for i in wanted.rows.clone() {
        for j in wanted.cols.clone() {
            sums[i * width + j] += products[i * width + j];
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
    let (n_k, width) = (matrix.rows, S::TILE.1);
    for k in 0..n_k {
        let mut row = matrix.row::<E>(k);
        // A row's next one is in another page, where no prefetcher looks for it.
        simd.prefetch(matrix.row::<E>((k + ROWS_AHEAD).min(n_k - 1)));
        let mut at = at;
        while !row.is_empty() {
            let (now, later) = row.split_at(row.len().min(width - at % width));
            let start = (at / width * n_k + k) * width + at % width;
            widen_row::<S, E>(simd, now, &mut panels[start..start + now.len()]);
            at += now.len();
            row = later;
        }
    }
}

/// `to = from`, widened.
#[inline(always)]
fn widen_row<S: Simd, E: Element>(simd: S, from: &[E::Item], to: &mut [f32]) {
    for (to, from) in to.as_chunks_mut().0.iter_mut().zip(from.as_chunks().0) {
        simd.store(E::load(simd, from), to);
    }
    // What is left over, once more with what is before it; by itself only where that is not there.
    match (to.last_chunk_mut(), from.last_chunk()) {
        (Some(to), Some(from)) => simd.store(E::load(simd, from), to),
        _ => to.iter_mut().zip(from).for_each(|(to, &item)| *to = E::get(item)),
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
    let (n_k, width) = (matrix.cols, S::TILE.1);
    for n in (0..matrix.rows).step_by(LANES) {
        let mut rows: [&[E::Item]; LANES] = [&[]; LANES];
        let n_rows = LANES.min(matrix.rows - n);
        for (i, row) in rows.iter_mut().enumerate().take(n_rows) {
            *row = matrix.row::<E>(n + i);
        }
        // They may end in the next panel.
        let (panel, first) = ((at + n) / width, (at + n) % width);
        let n_here = n_rows.min(width - first);
        let (here, there) = panels[panel * n_k * width..].split_at_mut(n_k * width);
        for start in (0..n_k).step_by(LANES) {
            let mut block = [simd.splat(0.0); LANES];
            for (v, row) in block.iter_mut().zip(rows) {
                *v = load_lanes::<S, E>(simd, row, start / LANES);
            }
            for (k, v) in (start..n_k).zip(simd.transpose(block)) {
                let out = &mut here[k * width + first..][..n_here];
                if let [out] = out.as_chunks_mut().0 {
                    simd.store(v, out);
                    continue;
                }
                let mut lanes = [0.0; LANES];
                simd.store(v, &mut lanes);
                copy(out, &lanes[..n_here]);
                if n_here < n_rows {
                    copy(&mut there[k * width..][..n_rows - n_here], &lanes[n_here..n_rows]);
                }
            }
        }
    }
}

/// `to = from`; half a vector, which is usual, without a call.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    if from.len() == LANES / 2 {
        to[..LANES / 2].copy_from_slice(&from[..LANES / 2]);
    } else {
        to.copy_from_slice(from);
    }
}

/// Columns of a task that multiplies with this instruction set: as many panels as [`COLS`] has room for, but
/// no more than four. (Models' widths are multiples of 96 more often than of 120: no thread waits for another's last task.)
pub(super) fn task_cols(isa: Isa) -> usize {
    let width = tile_shape(isa).1;
    COLS.min(4 * width) / width * width
}

/// How the rows of an operation are cut: by shape and number of threads. The bits of a row do not depend on it.
pub(super) struct Cut {
    /// Rows whose left operands are packed at a time.
    pub(super) packed: usize,
    /// Rows of a task.
    pub(super) task: usize,
}

impl Cut {
    /// For `rows` rows in tiles of `mr`, left operands of `k` columns in all and outputs of `n` columns in
    /// all. The packed copy of a long batch stays below 32 MiB, and few columns are made up for by more
    /// tasks along the rows. The parts are about equal, so that no thread waits for another.
    pub(super) fn new(rows: usize, mr: usize, k: usize, n: usize, n_threads: usize) -> Self {
        let parts_of = |rows: usize, most: usize| {
            rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(mr).max(mr)
        };
        let packed = parts_of(rows, ((8 << 20) / k.max(1)).clamp(96, 1152));
        let rows = packed.min(rows);
        let most = if n >= 8 * COLS { rows } else { rows.min(576) };
        let most = most.min(Self::rows_for_all(rows, n, n_threads)).max(1);
        Self { packed, task: parts_of(rows, most) }
    }

    /// Rows of a task with which `n` columns make two tasks a thread, but not fewer than are worth packing their weights anew.
    pub(super) fn rows_for_all(rows: usize, n: usize, n_threads: usize) -> usize {
        const LEAST_ROWS: usize = 96;
        let n_parts = 2 * n_threads / n.div_ceil(COLS).max(1);
        rows.div_ceil(n_parts.clamp(1, (rows / LEAST_ROWS).max(1)))
    }

    /// The same on AMX, where packing a weight anew for each task along the rows takes the longer: not where the
    /// columns alone keep the threads busy, unless fewer rows of the left operand stay in the L2 cache for the next task.
    pub(super) fn on_tiles(rows: usize, k: usize, n: usize, n_threads: usize) -> Self {
        const HALF_L2: usize = 1 << 20;
        let by = Self::new(rows, BLOCK_ROWS, k, n, n_threads);
        let n_tasks = n.div_ceil(COLS);
        let n_turns = n_tasks.div_ceil(n_threads) * n_threads;
        let stays = by.task * k * size_of::<bf16>() <= HALF_L2;
        if stays || n_turns - n_tasks > n_tasks / 8 { by } else { Self { task: by.packed, ..by } }
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
    /// Writes a task's outputs from its sums: `sums` writes those of a row.
    pub(super) fn write<T: ElementMut<Item = T>>(
        self,
        isa: Isa,
        rectangle: Rectangle<'_, T>,
        sums: impl Fn(usize, &mut [f32; COLS]),
    ) {
        isa.run(Write { finish: self, rectangle, sums });
    }

    /// What is to be rounded, of some of a row's outputs, `N` at most, from their sums; `cols.start` is a multiple of 8.
    #[inline(always)]
    pub(super) fn apply<S: Simd, T: ElementMut<Item = T>, const N: usize>(
        &self,
        simd: S,
        (row, cols): (usize, Range<usize>),
        values: &mut [f32; N],
        out: &[T],
    ) {
        if let Some(bias) = self.bias {
            let mut lanes = [0.0; N];
            lanes[..cols.len()].copy_from_slice(&bias[cols.clone()]);
            for (v, b) in values.iter_mut().zip(&lanes) {
                *v += b;
            }
        }
        if let Some(dropout) = self.dropout {
            let mut kept = [1.0; N];
            factors(dropout, row, cols.clone(), &mut kept[..cols.len()]);
            for (v, kept) in values.iter_mut().zip(&kept) {
                *v *= kept;
            }
        }
        let other: Option<[f32; N]> = match self.residual {
            Residual::None => None,
            Residual::Output => Some(widen::<S, T, N>(simd, out)),
            Residual::Of(matrix) => Some(with_element!(matrix.dtype, E => {
                widen::<S, E, N>(simd, &matrix.row::<E>(row)[cols])
            })),
        };
        if let Some(other) = other {
            for (v, o) in values.iter_mut().zip(&other) {
                *v += o;
            }
        }
    }
}

/// [`Finish::write`].
struct Write<'a, T, F> {
    finish: Finish<'a>,
    rectangle: Rectangle<'a, T>,
    sums: F,
}

impl<T: ElementMut<Item = T>, F: Fn(usize, &mut [f32; COLS])> SimdOp for Write<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Rectangle { rows, cols, mut out } = self.rectangle;
        let mut values = [0.0; COLS];
        for (i, row) in rows.enumerate() {
            // A row's next one is in another page, where no prefetcher looks for it.
            if i + ROWS_AHEAD < out.rows() {
                simd.prefetch(out.row(i + ROWS_AHEAD));
            }
            (self.sums)(row, &mut values);
            let out = out.row_mut(i);
            self.finish.apply(simd, (row, cols.clone()), &mut values, out);
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

/// At most `N` elements as f32; 0 past the last.
#[inline(always)]
fn widen<S: Simd, E: Element, const N: usize>(simd: S, row: &[E::Item]) -> [f32; N] {
    let mut values = [0.0; N];
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
