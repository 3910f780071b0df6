//! Matrix products of bf16 on AMX tiles, with the rank term and the finish of [`gemm`](super::gemm).
//!
//! ```text
//! Lhs      rows as they lie             read in place; a packed copy only where a row is not whole steps of 32 k
//! right    [column tile][step of 32 k]  packed by each task, straight from the mapped weight
//! sums     32 rows x 32 columns         in tile registers through all k and the rank term, then f32 in the L1 cache
//! ```
//!
//! Sums are finished and rounded, a few rows at a time, between the products of the next ones: what a tile has just stored
//! cannot be read at once, and tiles stand still meanwhile.
//!
//! An element's sum goes through the steps of 32 k in order, then through those of the rank term:
//! one addition a step, within a step as [`amx`](super::isa) says. Where its row lies in a tile,
//! which rows stand beside it, and where the loops are cut changes nothing, as sums between two loops
//! are stored and loaded again exactly.
//!
//! The rank term's factors are f32: each is split into two bf16 that add up to it but for 2^-17, and the three
//! largest of their four products ([`LEFT`], [`RIGHT`]) lie side by side as `3 rank` more k. What is left out is
//! below 2^-15 of a product: 2^-17 for each factor, 2^-16 for the fourth product. At rank 8 these are 24 k, one step.
//!
//! What limits it, as measured (benches/results, 2026-11-27-amx.md to 2026-11-28-amx-2-cores.md): L1 is too small for what 32 columns
//! multiply with, so right tiles come from L2, and cores have 16 misses of L1 under way at most. Vectors of 64 bytes are computed where
//! the tiles are: each instruction of finishing costs tiles their time, hence `vcvtne2ps2bf16`. Lines of an output on their way to L1
//! would take those misses from tiles, so large outputs go past the caches.

use std::ops::Range;

use bytemuck::Zeroable;
use half::bf16;

use super::{
    Cpu,
    buffer::Buffer,
    gemm::{Accumulator, Cut, Finish, Residual},
    isa::{
        Amx, BLOCK_COLS, BLOCK_ROWS, Bf16Bytes, Block, Corner, Element, ElementMut, LANES,
        LeftRows, Simd, SimdOp, Square, TILE_COLS, TILE_K, TILE_ROWS, Tile, Tiles, load_rows,
    },
    matrix::{Matrix, Rectangle, cut, with_element},
    threads::run_tasks,
};
use crate::{
    dtype::Dtype,
    kernels::ops::Segments,
    tensor::{Frozen, Tensor},
};

/// Steps of k after which a few rows of other sums are finished, or another left operand has its turn with the right
/// tiles.
const STEPS_AT_ONCE: usize = 8;
/// Steps of k whose right tiles a task packs at a time, for 128 columns: 1 MiB, half an L2 cache.
const STEPS_L2: usize = 128;
/// Rectangles of a task at most, where k is too long to be packed at once: so often less is the left operand read, from
/// memory, as a vocabulary wide it is in no cache.
const RECTANGLES: usize = 8;
/// Rows of a right operand that are on their way to L2 while others are packed: a column tile's.
const ROWS_AHEAD: usize = TILE_COLS;
/// Column tiles come in pairs, zeros past the last column.
const TILES_AT_ONCE: usize = 2;
/// Columns of a pair of column tiles.
const PAIR: usize = TILES_AT_ONCE * TILE_COLS;

/// The tiles, where products with all of these weights go through them: bf16 times bf16.
pub(super) fn takes<'a>(cpu: &Cpu, mut weights: impl Iterator<Item = &'a Frozen>) -> Option<Amx> {
    let fits = |w: &Frozen| w.dtype() == Dtype::Bf16 && w.rows() > 0 && w.cols() > 0;
    cpu.amx().filter(|_| weights.all(fits))
}

/// Tiles along `k`.
pub(super) fn steps(k: usize) -> usize {
    k.div_ceil(TILE_K)
}

/// Tiles of `cols` columns.
pub(super) fn column_tiles(cols: usize) -> usize {
    cols.div_ceil(TILES_AT_ONCE * TILE_COLS) * TILES_AT_ONCE
}

/// A left operand of bf16.
pub(super) struct Lhs<'a> {
    /// The operand, where blocks of 32 rows are read as they lie.
    matrix: Option<Matrix<'a>>,
    /// The other rows in tiles of 16, `[row tile][step]`, an even number of row tiles, zeros past the last k. Past the last
    /// row there is anything: rows do not meet.
    tiles: Buffer,
    /// The output row that the operand starts with.
    first_row: usize,
    /// The one that the tiles start with.
    first_packed: usize,
    k: usize,
}

impl<'a> Lhs<'a> {
    /// `matrix` for output rows from `first_row` on. Tiles are loaded from the matrix itself where its rows are whole steps;
    /// of the rest, and of the last rows if they are not a block, all threads pack a copy.
    pub(super) fn rows(cpu: &Cpu, amx: Amx, matrix: Matrix<'a>, first_row: usize) -> Self {
        if matrix.cols == 0 || !matrix.cols.is_multiple_of(TILE_K) {
            return Lhs::packed(cpu, amx, matrix, first_row);
        }
        let n_whole = matrix.rows / BLOCK_ROWS * BLOCK_ROWS;
        let rest = matrix.part_rows(n_whole..matrix.rows);
        let rest = Lhs::packed(cpu, amx, rest, first_row + n_whole);
        Self { matrix: Some(matrix), first_row, ..rest }
    }

    /// [`Lhs::rows`], all rows packed.
    pub(super) fn packed(
        cpu: &Cpu,
        amx: Amx,
        matrix: Matrix<'_>,
        first_row: usize,
    ) -> Lhs<'static> {
        let n_tiles = matrix.rows.next_multiple_of(BLOCK_ROWS) / TILE_ROWS;
        let steps = steps(matrix.cols);
        let mut tiles = cpu.tiles(n_tiles * steps);
        if steps > 0 {
            let of_block = tiles.as_mut_slice::<Tile>().chunks_mut(2 * steps);
            run_tasks(of_block.enumerate(), |(i, out)| {
                amx.run(PackRows { matrix, first_row: i * BLOCK_ROWS, out });
            });
        }
        Lhs { matrix: None, tiles, first_row, first_packed: first_row, k: matrix.cols }
    }

    /// Some steps of the row tiles of a block.
    #[inline(always)]
    fn block(&self, first_row: usize, some: &Range<usize>) -> [LeftRows<'_>; 2] {
        let row = first_row - self.first_row;
        assert_eq!(row % BLOCK_ROWS, 0, "blocks of sums are pairs of row tiles");
        if let Some(matrix) = self.matrix.filter(|_| first_row < self.first_packed) {
            let (bytes, stride) = matrix.lines();
            let at = |row: usize| &bytes[row * stride + some.start * size_of::<[u16; TILE_K]>()..];
            let tile = |row| LeftRows::in_memory(at(row), TILE_ROWS, stride, some.len());
            return [tile(row), tile(row + TILE_ROWS)];
        }
        let (tile, steps) = ((first_row - self.first_packed) / TILE_ROWS, steps(self.k));
        let tiles = self.tiles.as_slice();
        let of = |i: usize| LeftRows::of_tiles(&tiles[i * steps..][some.start..some.end]);
        [of(tile), of(tile + 1)]
    }
}

/// Packs the rows of two row tiles, of bf16, as many as there are.
pub(super) struct PackRows<'a> {
    pub(super) matrix: Matrix<'a>,
    pub(super) first_row: usize,
    /// `[2][step]`.
    pub(super) out: &'a mut [Tile],
}

impl SimdOp for PackRows<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { matrix, first_row, out } = self;
        let steps = steps(matrix.cols);
        let rows = first_row..matrix.rows.min(first_row + BLOCK_ROWS);
        for (i, row) in rows.enumerate() {
            let (tiles, within) = (&mut out[i / TILE_ROWS * steps..][..steps], i % TILE_ROWS);
            let (whole, rest) = matrix.row::<Bf16Bytes>(row).as_chunks::<TILE_K>();
            for (tile, items) in tiles.iter_mut().zip(whole) {
                tile.0[within] = bytemuck::cast(*items);
            }
            if !rest.is_empty() {
                tiles[whole.len()].0[within] = bytemuck::cast(padded::<TILE_K>(rest));
            }
        }
    }
}

/// Items, then zeros.
#[inline(always)]
pub(super) fn padded<const N: usize>(items: &[[u8; 2]]) -> [[u8; 2]; N] {
    let mut all = [[0; 2]; N];
    all[..items.len()].copy_from_slice(items);
    all
}

/// Packs some k and columns of a right operand of bf16, `[column tile][step]`.
pub(super) struct PackColumns<'a> {
    pub(super) matrix: Matrix<'a>,
    /// `rhs[k, n]` is `matrix[n, k]`, else `matrix[k, n]`.
    pub(super) transposed: bool,
    pub(super) steps: Range<usize>,
    pub(super) cols: Range<usize>,
    pub(super) out: &'a mut [Tile],
}

impl SimdOp for PackColumns<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { matrix, transposed, steps, cols, out } = self;
        let all_k = if transposed { matrix.cols } else { matrix.rows };
        let k = steps.start * TILE_K..all_k.min(steps.end * TILE_K);
        if transposed {
            pack_transposed(simd, matrix.part(cols, k), steps.len(), out);
        } else {
            pack_pairs(simd, matrix.part(k, cols), steps.len(), out);
        }
    }
}

/// From `matrix[n, k]`: a tile is the transpose of 16 rows of 16 pairs. (A lane is a pair here, not a number:
/// it is only moved.)
#[inline(always)]
fn pack_transposed<S: Simd>(simd: S, matrix: Matrix<'_>, steps: usize, out: &mut [Tile]) {
    const LINE: usize = size_of::<[u16; TILE_K]>();
    for (i, tiles) in out.chunks_exact_mut(steps).enumerate() {
        let first = (i * TILE_COLS).min(matrix.rows);
        let rows = matrix.part_rows(first..matrix.rows.min(first + TILE_COLS));
        let later = matrix.rows.min(first + ROWS_AHEAD)..matrix.rows.min(first + 2 * ROWS_AHEAD);
        let n_whole = if rows.rows == TILE_COLS { rows.cols / TILE_K } else { 0 };
        let (bytes, stride) = rows.lines();
        for (step, tile) in tiles.iter_mut().enumerate() {
            if step < n_whole {
                simd.transpose_rows(&bytes[step * LINE..], stride, bytemuck::cast_mut(tile));
                for row in later.clone() {
                    simd.prefetch_l2(&matrix.row::<Bf16Bytes>(row)[step * TILE_K..][..TILE_K]);
                }
                continue;
            }
            let mut part = Tile::zeroed();
            for (row, line) in part.0.iter_mut().enumerate().take(rows.rows) {
                let items = rows.row::<Bf16Bytes>(row).get(step * TILE_K..).unwrap_or_default();
                *line = bytemuck::cast(padded::<TILE_K>(&items[..items.len().min(TILE_K)]));
            }
            simd.transpose_rows(bytemuck::bytes_of(&part), LINE, bytemuck::cast_mut(tile));
        }
    }
}

/// From `matrix[k, n]`: a line of a tile has two rows, interleaved.
#[inline(always)]
fn pack_pairs<S: Simd>(simd: S, matrix: Matrix<'_>, steps: usize, out: &mut [Tile]) {
    let row = |k: usize| if k < matrix.rows { matrix.row::<Bf16Bytes>(k) } else { &[] };
    for pair in 0..steps * TILE_ROWS {
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        // A row's next one is in another page, where no prefetcher looks for it.
        simd.prefetch_l2(row(2 * pair + ROWS_AHEAD));
        simd.prefetch_l2(row(2 * pair + ROWS_AHEAD + 1));
        for (i, tiles) in out.chunks_exact_mut(steps).enumerate() {
            let (even, odd) = (sixteen(even, i), sixteen(odd, i));
            let line: &mut [u32; TILE_COLS] =
                bytemuck::cast_mut(&mut tiles[pair / TILE_ROWS].0[pair % TILE_ROWS]);
            for (both, (even, odd)) in line.iter_mut().zip(even.iter().zip(odd)) {
                *both = u32::from(*even) | u32::from(odd) << 16;
            }
        }
    }
}

/// Packs `matrixᵀ`, of bf16, as a left operand: `[row tile][step]`, a row tile 16 columns of the matrix, its rows
/// as k.
pub(super) struct PackTransposed<'a> {
    pub(super) matrix: Matrix<'a>,
    pub(super) out: &'a mut [Tile],
}

impl SimdOp for PackTransposed<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { matrix, out } = self;
        pack_pairs(simd, matrix, steps(matrix.rows), out);
        // A line has two rows of 16 columns: transposed as pairs, a line has a column of 32 rows.
        for tile in out {
            let lines: &mut [[f32; LANES]; TILE_ROWS] = bytemuck::cast_mut(tile);
            let pairs = load_rows(simd, lines.iter());
            for (line, v) in lines.iter_mut().zip(simd.transpose(pairs)) {
                simd.store(v, line);
            }
        }
    }
}

/// Items `16 i ..` of a row; zeros past its end.
#[inline(always)]
fn sixteen(row: &[[u8; 2]], i: usize) -> [u16; TILE_COLS] {
    let (whole, rest) = row.as_chunks::<TILE_COLS>();
    match whole.get(i) {
        Some(items) => bytemuck::cast(*items),
        None if i == whole.len() => bytemuck::cast(padded::<TILE_COLS>(rest)),
        None => [0; TILE_COLS],
    }
}

/// Which part of each factor a product of the rank term takes: the first or second bf16 of a number, or (2) the
/// first where it is finite. So an infinity or NaN meets only the other factor's first part, which has its sign,
/// and no zero that would make it NaN.
const LEFT: [usize; 3] = [0, 2, 1];
/// [`LEFT`], of the other factor.
const RIGHT: [usize; 3] = [0, 1, 2];

/// Numbers split at a time.
const PIECE: usize = 256;

/// Splits numbers: the first two parts of each add up to it but for 2^-17, the third is the first again if it is
/// finite. Of what is not finite the first part has all.
struct SplitItems<'a> {
    /// At most [`PIECE`].
    items: &'a [[u8; 4]],
    parts: &'a mut [[bf16; PIECE]; 3],
}

impl SimdOp for SplitItems<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { items, parts } = self;
        let (zero, infinity) = (simd.splat(0.0), simd.splat(f32::INFINITY));
        let [first, second, again] = parts.each_mut().map(|part| part.as_chunks_mut().0);
        for (i, items) in items.chunks(LANES).enumerate() {
            let x = match items.first_chunk::<LANES>() {
                Some(items) => simd.load_f32_bytes(bytemuck::cast_ref(items)),
                None => <super::isa::F32Bytes as Element>::load_part(simd, items),
            };
            simd.store_bf16(x, &mut first[i]);
            let high = simd.load_bf16(&first[i]);
            let size = simd.max(high, simd.sub(zero, high));
            let of_finite = |v| simd.select_lt(size, infinity, v, zero);
            simd.store_bf16(of_finite(high), &mut again[i]);
            simd.store_bf16(of_finite(simd.sub(x, high)), &mut second[i]);
        }
    }
}

/// Whole rows of `COLS` numbers: some of their parts beside each other.
fn side_by_side<const COLS: usize, const N: usize>(
    parts: &[[bf16; PIECE]; 3],
    order: [usize; N],
    out: &mut [bf16],
) {
    let (out, _) = out.as_chunks_mut::<COLS>();
    for (p, &part) in order.iter().enumerate() {
        let (part, _) = parts[part].as_chunks::<COLS>();
        out.iter_mut().skip(p).step_by(N).zip(part).for_each(|(out, part)| *out = *part);
    }
}

/// A matrix of split numbers: each of its `[rows, cols]` becomes several.
struct Split {
    items: Buffer,
    rows: usize,
    cols: usize,
}

impl Split {
    /// Side by side: `out[row, p * cols + col]` is part `order[p]` of `matrix[row, col]`.
    fn columns<const N: usize>(cpu: &Cpu, amx: Amx, matrix: Matrix<'_>, order: [usize; N]) -> Self {
        let cols = matrix.cols;
        let mut items = cpu.pool.take(matrix.rows * N * cols * size_of::<bf16>());
        // Short rows are split several at a time.
        let n_rows = if cols < PIECE { PIECE / cols.max(1) } else { 1 };
        let out = items.as_mut_slice::<bf16>().chunks_mut((n_rows * N * cols).max(1));
        run_tasks(out.enumerate(), |(i, out)| {
            let mut parts = [[bf16::ZERO; PIECE]; 3];
            let mut piece = [[0; 4]; PIECE];
            for start in (0..cols).step_by(PIECE) {
                let n = PIECE.min(cols - start);
                let rows = out.chunks_mut(N * cols);
                let items = match matrix.consecutive(i * n_rows..i * n_rows + rows.len()) {
                    Some(bytes) if n == cols => bytemuck::cast_slice(bytes),
                    _ => {
                        for (j, piece) in piece.chunks_mut(n).enumerate().take(rows.len()) {
                            let row = matrix.row::<super::isa::F32Bytes>(i * n_rows + j);
                            piece.copy_from_slice(&row[start..start + n]);
                        }
                        &piece[..rows.len() * n]
                    }
                };
                amx.run(SplitItems { items, parts: &mut parts });
                // The usual ranks, whose copies are an instruction each.
                match cols {
                    8 => return side_by_side::<8, N>(&parts, order, out),
                    16 => return side_by_side::<16, N>(&parts, order, out),
                    _ => {}
                }
                for (j, out) in rows.enumerate() {
                    for (out, &part) in out.chunks_mut(cols).zip(&order) {
                        out[start..start + n].copy_from_slice(&parts[part][j * n..][..n]);
                    }
                }
            }
        });
        Self { items, rows: matrix.rows, cols: N * cols }
    }

    /// On top of each other: `out[p * rows + row, col]` is part `order[p]` of `matrix[row, col]`.
    fn rows<const N: usize>(cpu: &Cpu, amx: Amx, matrix: Matrix<'_>, order: [usize; N]) -> Self {
        let (rows, cols) = (N * matrix.rows, matrix.cols);
        let mut items = cpu.pool.take(rows * cols * size_of::<bf16>());
        let out = items.as_mut_slice::<bf16>();
        let mut parts = [[bf16::ZERO; PIECE]; 3];
        for i in 0..matrix.rows {
            let row = matrix.row::<super::isa::F32Bytes>(i);
            for (piece, items) in row.chunks(PIECE).enumerate() {
                amx.run(SplitItems { items, parts: &mut parts });
                for (p, &part) in order.iter().enumerate() {
                    let start = (p * matrix.rows + i) * cols + piece * PIECE;
                    out[start..start + items.len()].copy_from_slice(&parts[part][..items.len()]);
                }
            }
        }
        Self { items, rows, cols }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::bf16s(self.items.as_slice(), self.rows, self.cols)
    }
}

/// The right operands of a rank term `z·b[row]`, packed for all columns.
pub(super) struct RankRhs<'a> {
    /// `[routing row][column tile][step]`.
    tiles: Buffer,
    column_tiles: usize,
    rank: usize,
    segments: &'a Segments,
}

impl<'a> RankRhs<'a> {
    /// `b` has a block of rows for each routing row: `[rank, cols]`, or `[cols, rank]` if `transposed`.
    pub(super) fn new(
        cpu: &Cpu,
        amx: Amx,
        b: &Tensor<Cpu>,
        rank: usize,
        transposed: bool,
        segments: &'a Segments,
    ) -> Self {
        let b = Matrix::tensor(b);
        let rows = segments.n_rows();
        let cols = if transposed { b.rows / rows.max(1) } else { b.cols };
        let (column_tiles, steps) = (column_tiles(cols), steps(RIGHT.len() * rank));
        let used = segments.used_rows();
        let mut tiles = cpu.tiles(rows * column_tiles * steps);
        // A task is 128 columns of a routing row that a segment has.
        let mut tasks = Vec::new();
        let of_rows = tiles.as_mut_slice::<Tile>().chunks_mut((column_tiles * steps).max(1));
        for (row, out) in of_rows.enumerate().filter(|(row, _)| used[*row]) {
            let of_columns = out.chunks_mut(BLOCK_COLS / TILE_COLS * steps).enumerate();
            tasks.extend(of_columns.map(|(i, out)| (row, i * BLOCK_COLS, out)));
        }
        run_tasks(tasks, |(row, start, out): (usize, usize, &mut [Tile])| {
            let some = start..cols.min(start + BLOCK_COLS);
            let n = some.len();
            let split = if transposed {
                let rows = row * cols + some.start..row * cols + some.end;
                Split::columns(cpu, amx, b.part_rows(rows), RIGHT)
            } else {
                Split::rows(cpu, amx, b.part(row * rank..(row + 1) * rank, some), RIGHT)
            };
            let (matrix, cols) = (split.matrix(), 0..n);
            amx.run(PackColumns { matrix, transposed, steps: 0..steps, cols, out });
        });
        Self { tiles, column_tiles, rank, segments }
    }

    /// The left operand, of some rows.
    pub(super) fn left(
        &self,
        cpu: &Cpu,
        amx: Amx,
        z: Matrix<'_>,
        first_row: usize,
    ) -> Lhs<'static> {
        Lhs::packed(cpu, amx, Split::columns(cpu, amx, z, LEFT).matrix(), first_row)
    }

    /// All steps of a column tile.
    fn tiles(&self, row: usize, column_tile: usize) -> &[Tile] {
        let steps = steps(RIGHT.len() * self.rank);
        &self.tiles.as_slice()[(row * self.column_tiles + column_tile) * steps..][..steps]
    }

    /// The routing row of each row tile of a block of more than [`TILE_ROWS`] rows, where neither has two.
    fn of_halves(&self, rows: &Range<usize>) -> Option<[usize; 2]> {
        let mut found = [None; 2];
        for (run, row) in self.segments.within(rows.clone()) {
            for (i, found) in found.iter_mut().enumerate() {
                let start = rows.start + i * TILE_ROWS;
                if run.start <= start && run.end >= rows.end.min(start + TILE_ROWS) {
                    *found = Some(row);
                }
            }
        }
        Some([found[0]?, found[1]?])
    }

    /// Adds the term to sums in registers, of output columns from `first_col` on; each half has one routing row.
    #[inline(always)]
    fn add_halves(
        &self,
        square: &mut Square<'_>,
        z: &Lhs<'_>,
        first_row: usize,
        halves: [usize; 2],
        first_col: usize,
    ) {
        let (tile, steps) = (first_col / TILE_COLS, 0..steps(z.k));
        if steps.is_empty() {
            return;
        }
        let left = z.block(first_row, &steps);
        let right = halves.map(|row| [self.tiles(row, tile), self.tiles(row, tile + 1)]);
        if halves[0] == halves[1] {
            square.add(left, right[0]);
        } else {
            square.add_upper(left[0], right[0]);
            square.add_lower(left[1], right[1]);
        }
    }

    /// Adds the term to sums in memory, of output rows `rows` and columns from `first_col` on.
    fn add(
        &self,
        tiles: &mut Tiles,
        z: &Lhs<'_>,
        rows: &Range<usize>,
        first_col: usize,
        sums: &mut Block,
        col: usize,
    ) {
        let (tile, steps) = (first_col / TILE_COLS, 0..steps(z.k));
        if steps.is_empty() {
            return;
        }
        let left = z.block(rows.start, &steps);
        for (run, row) in self.segments.within(rows.clone()) {
            let right = [self.tiles(row, tile), self.tiles(row, tile + 1)];
            let run = run.start - rows.start..run.end - rows.start;
            // Rows of other segments must not even get a zero: 0 * inf is NaN.
            for i in 0..2 {
                let first = run.start.max(i * TILE_ROWS);
                let end = run.end.min((i + 1) * TILE_ROWS);
                if first < end {
                    let left = left[i].part(first - i * TILE_ROWS..end - i * TILE_ROWS);
                    let to = Corner { sums: &mut *sums, row: first, col };
                    tiles.multiply_1x2(left, right, to, false);
                }
            }
        }
    }
}

/// The left operand of a product with a block.
pub(super) enum Left<'a> {
    /// All rows.
    Two([LeftRows<'a>; 2]),
    /// Some rows of one tile, and the first row of the sums.
    One(LeftRows<'a>, usize),
}

impl<'a> Left<'a> {
    /// The first `n` rows of a pair of row tiles.
    #[inline(always)]
    pub(super) fn of(upper: &'a [Tile], lower: &'a [Tile], n: usize) -> Self {
        match n > TILE_ROWS {
            true => Self::Two([upper, lower].map(LeftRows::of_tiles)),
            false => Self::One(LeftRows::of_tiles(upper).part(0..n), 0),
        }
    }
}

/// Adds products with the tiles `right` of the first `cols` columns to a block, or writes them.
#[inline(always)]
pub(super) fn multiply<'a>(
    tiles: &mut Tiles,
    left: Left<'_>,
    right: impl Fn(usize) -> &'a [Tile],
    cols: usize,
    sums: &mut Block,
    overwrite: bool,
) {
    let n = cols.div_ceil(TILE_COLS);
    match left {
        Left::Two(left) => {
            for i in (0..n).step_by(2) {
                let to = Corner { sums, row: 0, col: i * TILE_COLS };
                tiles.multiply_2x2(left, [right(i), right(i + 1)], to, overwrite);
            }
        }
        Left::One(left, row) => {
            for i in (0..n).step_by(2) {
                let to = Corner { sums, row, col: i * TILE_COLS };
                tiles.multiply_1x2(left, [right(i), right(i + 1)], to, overwrite);
            }
        }
    }
}

/// One product of a [`Task`].
pub(super) struct Part<'a> {
    /// Of one shape; their sum is the left operand.
    pub(super) lhs: &'a [Lhs<'a>],
    /// bf16.
    pub(super) matrix: Matrix<'a>,
    /// `rhs[k, n]` is `matrix[n, k]`, else `matrix[k, n]`.
    pub(super) transposed: bool,
}

/// The same rows of some rectangles side by side: a sum of products and rank terms, finished.
pub(super) struct Task<'a, T> {
    pub(super) parts: &'a [Part<'a>],
    pub(super) ranks: &'a [(&'a RankRhs<'a>, &'a Lhs<'static>)],
    /// More sums of each rectangle, or none.
    pub(super) more: Vec<Accumulator>,
    pub(super) rectangles: Vec<Rectangle<'a, T>>,
    pub(super) finish: Finish<'a>,
    /// Whether outputs go [past the caches](past_caches).
    pub(super) past: bool,
}

/// Whether an output is so large that it is written past the caches: it would not stay in them until it is read, and while
/// lines that are written partly are on their way to L1, tiles get fewer of the 16 misses that a core has under way.
pub(super) fn past_caches<T>(out: &[T]) -> bool {
    const QUARTER_L2: usize = 512 << 10;
    size_of_val(out) > QUARTER_L2
}

/// Some steps of a part.
type Piece = (usize, Range<usize>);

/// All steps of all parts in order, cut so that `most` of them stand together.
fn cut_steps(parts: &[Part<'_>], most: usize) -> Vec<Vec<Piece>> {
    let (mut chunks, mut room) = (vec![Vec::new()], most);
    for (i, part) in parts.iter().enumerate() {
        let (mut start, end) = (0, steps(part.lhs[0].k));
        while start < end {
            if room == 0 {
                chunks.push(Vec::new());
                room = most;
            }
            let now = room.min(end - start);
            chunks.last_mut().expect("one at least").push((i, start..start + now));
            start += now;
            room -= now;
        }
    }
    chunks
}

impl<T: ElementMut<Item = T>> Task<'_, T> {
    /// Computes and writes the rectangles.
    pub(super) fn run(mut self, cpu: &Cpu, amx: Amx) {
        let [Some(first), Some(last)] = [self.rectangles.first(), self.rectangles.last()] else {
            return;
        };
        // Neighbours' columns are packed as one's: more of a weight's row at a time.
        let (rows, cols) = (first.rows.clone(), first.cols.start..last.cols.end);
        let (n_rectangles, n_tiles) = (self.rectangles.len(), column_tiles(cols.len()));
        let chunks = cut_steps(self.parts, STEPS_L2 / n_rectangles);
        let n_steps = |chunk: &[Piece]| chunk.iter().map(|(_, steps)| steps.len()).sum::<usize>();
        let most_steps = chunks.iter().map(|chunk| n_steps(chunk)).max().unwrap_or(0);

        // Where all steps fit at once, two squares of sums take turns.
        let n_blocks = rows.len().div_ceil(BLOCK_ROWS);
        let n_kept = if chunks.len() == 1 { 1 } else { n_rectangles * n_blocks };
        let mut sums = cpu.pool.take(n_kept * size_of::<Block>());
        let mut right = cpu.tiles(n_tiles * most_steps);
        for (i, pieces) in chunks.iter().enumerate() {
            let right = &mut right.as_mut_slice::<Tile>()[..n_tiles * n_steps(pieces)];
            let mut rest = &mut *right;
            for (part, steps) in pieces {
                let Part { matrix, transposed, .. } = self.parts[*part];
                let out;
                (out, rest) = rest.split_at_mut(n_tiles * steps.len());
                let (steps, cols) = (steps.clone(), cols.clone());
                amx.run(PackColumns { matrix, transposed, steps, cols, out });
            }
            let (is_first, is_last) = (i == 0, i + 1 == chunks.len());
            let (task, sums, slots) = (&mut self, sums.as_mut_slice(), Slot::all(pieces, n_tiles));
            amx.with_tiles(|tiles| {
                amx.run(Chunk { tiles, task, slots, right, sums, is_first, is_last });
            });
        }
    }
}

/// A few steps of a piece.
struct Slot {
    part: usize,
    /// Of the part.
    steps: Range<usize>,
    /// The right tile of column tile 0 and the first step, and from there to the next column tile.
    right: usize,
    stride: usize,
}

impl Slot {
    /// Those of some pieces, whose right tiles are `[piece][column tile][step]`.
    fn all(pieces: &[Piece], n_tiles: usize) -> Vec<Self> {
        let (mut all, mut first) = (Vec::new(), 0);
        for (part, piece) in pieces {
            for start in piece.clone().step_by(STEPS_AT_ONCE) {
                let steps = start..piece.end.min(start + STEPS_AT_ONCE);
                let right = first + start - piece.start;
                all.push(Self { part: *part, steps, right, stride: piece.len() });
            }
            first += n_tiles * piece.len();
        }
        all
    }

    /// The right tiles of a pair of column tiles.
    #[inline(always)]
    fn right<'a>(&self, right: &'a [Tile], pair: usize) -> [&'a [Tile]; 2] {
        let tiles = |i: usize| &right[self.right + i * self.stride..][..self.steps.len()];
        [tiles(TILES_AT_ONCE * pair), tiles(TILES_AT_ONCE * pair + 1)]
    }
}

/// Multiplies some steps of a task, and writes its outputs if they are the last ones.
struct Chunk<'c, 'a, T> {
    tiles: &'c mut Tiles,
    task: &'c mut Task<'a, T>,
    slots: Vec<Slot>,
    right: &'c [Tile],
    /// Those of all rectangles and their rows; a single one if these are all steps.
    sums: &'c mut [Block],
    is_first: bool,
    is_last: bool,
}

impl<T: ElementMut<Item = T>> SimdOp for Chunk<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { tiles, task, slots, right, sums, is_first, is_last } = self;
        let Task { parts, ranks, more, rectangles, finish, past } = task;
        let (all_rows, all_at_once) = (rectangles[0].rows.clone(), is_first && is_last);
        let ranks = if is_last { *ranks } else { &[] };
        let n_blocks = all_rows.len().div_ceil(BLOCK_ROWS);
        let n_rows = BLOCK_ROWS.div_ceil(slots.len().max(1));
        let mut halves = Vec::with_capacity(ranks.len());
        // A square is finished while the next one is computed: until then its lines are on their way to the cache.
        let mut done: Option<Done> = None;
        let mut turn = 0;
        for block in 0..n_blocks {
            let start = all_rows.start + block * BLOCK_ROWS;
            let rows = start..all_rows.end.min(start + BLOCK_ROWS);
            halves.clear();
            halves.extend(ranks.iter().map_while(|(rank, _)| rank.of_halves(&rows)));
            for j in 0..rectangles.len() {
                let all_cols = rectangles[j].cols.clone();
                let pairs_before = j * (BLOCK_COLS / PAIR);
                for pair in 0..all_cols.len().div_ceil(PAIR) {
                    let start = all_cols.start + pair * PAIR;
                    let cols = start..all_cols.end.min(start + PAIR);
                    let (at, col) = match all_at_once {
                        true => (0, turn % 2 * PAIR),
                        false => (j * n_blocks + block, pair * PAIR),
                    };
                    turn += 1;
                    let mut in_memory = true;
                    if rows.len() > TILE_ROWS {
                        let corner = &mut Corner { sums: &mut sums[at], row: 0, col };
                        let mut square = tiles.square((!is_first).then_some(corner));
                        for slot in &slots {
                            let right = slot.right(right, pairs_before + pair);
                            for lhs in parts[slot.part].lhs {
                                square.add(lhs.block(rows.start, &slot.steps), right);
                            }
                            if let Some(done) = &mut done {
                                done.write(simd, n_rows, (finish, *past), more, sums, rectangles);
                            }
                        }
                        in_memory = halves.len() < ranks.len();
                        if !in_memory {
                            for ((rank, z), halves) in ranks.iter().zip(&halves) {
                                rank.add_halves(&mut square, z, rows.start, *halves, start);
                            }
                        }
                        square.store(Corner { sums: &mut sums[at], row: 0, col });
                    } else {
                        let mut overwrite = is_first;
                        for slot in &slots {
                            let right = slot.right(right, pairs_before + pair);
                            for lhs in parts[slot.part].lhs {
                                let [left, _] = lhs.block(rows.start, &slot.steps);
                                let left = left.part(0..rows.len());
                                let to = Corner { sums: &mut sums[at], row: 0, col };
                                tiles.multiply_1x2(left, right, to, overwrite);
                                overwrite = false;
                            }
                        }
                    }
                    if in_memory {
                        for (rank, z) in ranks {
                            rank.add(tiles, z, &rows, start, &mut sums[at], col);
                        }
                    }
                    if let Some(mut done) = done.take() {
                        done.write(simd, BLOCK_ROWS, (finish, *past), more, sums, rectangles);
                    }
                    if is_last {
                        let (rectangle, next) = (j, rows.start);
                        let now = Done { rectangle, rows: rows.clone(), cols, at, col, next };
                        now.prefetch(simd, finish, rectangles);
                        done = Some(now);
                    }
                }
            }
        }
        if let Some(mut done) = done {
            done.write(simd, BLOCK_ROWS, (finish, *past), more, sums, rectangles);
        }
        if *past {
            simd.fence();
        }
    }
}

/// Sums that are to be finished and written.
struct Done {
    rectangle: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    /// Their block of sums, and the column in it.
    at: usize,
    col: usize,
    /// The first row that is not written yet.
    next: usize,
}

impl Done {
    /// Fetches what is to be added.
    #[inline(always)]
    fn prefetch<S: Simd, T: ElementMut<Item = T>>(
        &self,
        simd: S,
        finish: &Finish<'_>,
        rectangles: &[Rectangle<'_, T>],
    ) {
        let Rectangle { rows: all_rows, cols: all_cols, out } = &rectangles[self.rectangle];
        match finish.residual {
            Residual::None => {}
            Residual::Output => {
                let columns = self.cols.start - all_cols.start..self.cols.end - all_cols.start;
                for row in self.rows.clone() {
                    simd.prefetch(&out.row(row - all_rows.start)[columns.clone()]);
                }
            }
            Residual::Of(matrix) => with_element!(matrix.dtype, E => {
                for row in self.rows.clone() {
                    simd.prefetch(&matrix.row::<E>(row)[self.cols.clone()]);
                }
            }),
        }
    }

    /// Writes `n` more rows, if there are as many. (With few instructions: what is between products and waits shortens the
    /// view ahead that cores have of them, and vectors of 64 bytes are computed where the tiles are.)
    #[inline(always)]
    fn write<S: Simd, T: ElementMut<Item = T>>(
        &mut self,
        simd: S,
        n: usize,
        (finish, past): (&Finish<'_>, bool),
        more: &[Accumulator],
        sums: &[Block],
        rectangles: &mut [Rectangle<'_, T>],
    ) {
        let Rectangle { rows: all_rows, cols: all_cols, out } = &mut rectangles[self.rectangle];
        let columns = self.cols.start - all_cols.start..self.cols.end - all_cols.start;
        let rows = self.next..self.rows.end.min(self.next + n);
        self.next = rows.end;
        let lines = &sums[self.at].0[rows.start - self.rows.start..rows.end - self.rows.start];
        let lines = lines.iter().map(|line| &line[self.col..self.col + PAIR]);
        let lines = lines.zip(rows.start - all_rows.start..);
        let short = columns.len() < PAIR || finish.bias.is_some() || finish.dropout.is_some();
        if short || !more.is_empty() {
            for (row, (line, out_row)) in rows.zip(lines) {
                let mut values: [f32; PAIR] = *line.first_chunk().expect("a pair of tiles");
                if let Some(more) = more.get(self.rectangle) {
                    let others = more.row(row);
                    let others = &others[columns.clone()];
                    values.iter_mut().zip(others).for_each(|(v, o)| *v += o);
                }
                let out = &mut out.row_mut(out_row)[columns.clone()];
                finish.apply(simd, (row, self.cols.clone()), &mut values, out);
                let values = values.as_chunks().0;
                if let Some(out) = out.first_chunk_mut() {
                    T::store_pair(simd, [simd.load(&values[0]), simd.load(&values[1])], out, false);
                    continue;
                }
                for (value, out) in values.iter().zip(out.chunks_mut(LANES)) {
                    T::store_part(simd, simd.load(value), out);
                }
            }
            return;
        }
        match finish.residual {
            Residual::None => {
                for (line, out_row) in lines {
                    let out = out.row_mut(out_row)[columns.clone()].first_chunk_mut();
                    let (line, out) = (line.as_chunks().0, out.expect("a pair"));
                    T::store_pair(simd, [simd.load(&line[0]), simd.load(&line[1])], out, past);
                }
            }
            Residual::Output => {
                for (line, out_row) in lines {
                    let out = out.row_mut(out_row)[columns.clone()].first_chunk_mut();
                    let (line, out) = (line.as_chunks().0, out.expect("a pair"));
                    let others = out.as_chunks().0;
                    let sums = [
                        simd.add(simd.load(&line[0]), T::load(simd, &others[0])),
                        simd.add(simd.load(&line[1]), T::load(simd, &others[1])),
                    ];
                    T::store_pair(simd, sums, out, false);
                }
            }
            Residual::Of(matrix) => with_element!(matrix.dtype, E => {
                for (row, (line, out_row)) in rows.zip(lines) {
                    let others = matrix.row::<E>(row)[self.cols.clone()].as_chunks().0;
                    let out = out.row_mut(out_row)[columns.clone()].first_chunk_mut();
                    let (line, out) = (line.as_chunks().0, out.expect("a pair"));
                    let sums = [
                        simd.add(simd.load(&line[0]), E::load(simd, &others[0])),
                        simd.add(simd.load(&line[1]), E::load(simd, &others[1])),
                    ];
                    T::store_pair(simd, sums, out, past);
                }
            }),
        }
    }
}

/// Computes and writes `lhs·rhs`, `cols` columns, all threads at it.
pub(super) fn write<T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    amx: Amx,
    part: &Part<'_>,
    out: &mut [T],
    cols: usize,
) {
    let past = past_caches(out);
    let task = Cut::rows_for_all(out.len() / cols.max(1), cols, cpu.n_threads());
    let task = task.next_multiple_of(BLOCK_ROWS);
    let tasks = cut(out, cols, 0, (task, BLOCK_COLS)).into_iter();
    let tasks: Vec<_> = tasks.map(|rectangle| (0, rectangle)).collect();
    let tasks = if steps(part.lhs[0].k) > STEPS_L2 {
        let most = (tasks.len() / cpu.n_threads()).clamp(1, RECTANGLES);
        in_groups(tasks, most)
    } else {
        in_pairs(cpu, tasks)
    };
    run_tasks(tasks, |(_, rectangles)| {
        let (parts, finish) = (std::slice::from_ref(part), Finish::default());
        Task { parts, ranks: &[], more: Vec::new(), rectangles, finish, past }.run(cpu, amx);
    });
}

/// Puts neighbouring rectangles of one width and the same rows in pairs, so that their left operand
/// is read once; leaves them alone where that would leave a thread without work for long.
pub(super) fn in_pairs<'a, T>(
    cpu: &Cpu,
    tasks: Vec<(usize, Rectangle<'a, T>)>,
) -> Vec<(usize, Vec<Rectangle<'a, T>>)> {
    let per_thread = tasks.len() / cpu.n_threads();
    let even = tasks.len().is_multiple_of(2 * cpu.n_threads());
    let pairs = per_thread >= 32 || (per_thread >= 4 && even);
    in_groups(tasks, if pairs { 2 } else { 1 })
}

/// Puts neighbouring rectangles of one width and the same rows in groups of at most `most`.
fn in_groups<'a, T>(
    tasks: Vec<(usize, Rectangle<'a, T>)>,
    most: usize,
) -> Vec<(usize, Vec<Rectangle<'a, T>>)> {
    let mut all: Vec<(usize, Vec<Rectangle<'a, T>>)> = Vec::new();
    for (i, rectangle) in tasks {
        match all.last_mut() {
            Some((last, group))
                if *last == i
                    && group.len() < most
                    && group[0].rows == rectangle.rows
                    && group[group.len() - 1].cols.len() == BLOCK_COLS =>
            {
                group.push(rectangle);
            }
            _ => all.push((i, vec![rectangle])),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::{
        checks::{Data, Sized, amx, backends, bits, check, check_with_rank, with_threads},
        isa::{Isa, round_bf16},
    };
    use crate::{
        dtype::Dtype,
        kernels::{Backend, Precision, ops::*},
        tensor::{Frozen, Tensor},
    };

    fn weight(data: &mut Data, rows: usize, cols: usize) -> Frozen {
        let values: Vec<_> = (0..rows * cols).map(|_| data.value() as f32).collect();
        Frozen::from_f32(&values, rows, cols, Dtype::Bf16)
    }

    /// More steps than are packed at a time, more rectangles than threads want: what the tests of
    /// the linears are too small for. Every instruction set must agree.
    #[test]
    fn long_sums_and_many_columns() {
        let others = backends().into_iter();
        let others =
            others.filter(|cpu| cpu.compute == Dtype::Bf16 && !matches!(cpu.isa, Isa::Amx(_)));
        for cpu in others.chain(amx()) {
            for exact in [true, false] {
                let mut data = Data::new(21, exact);
                // The first segment ends with a tile's rows or between them.
                for (m, k, n, first) in
                    [(37, 4200, 20, 16), (20, 40, 2040, 5), (9, 2090, 140, 5), (620, 1700, 20, 5)]
                {
                    let rank = 8;
                    let x = data.tensor(&cpu, m, k, Precision::Activation);
                    let w = weight(&mut data, n, k);
                    let segments = Segments::new(&[first, m - first], &[1, 0], 2);
                    let z = data.tensor(&cpu, m, rank, Precision::Full);
                    let b = data.tensor(&cpu, 2 * rank, n, Precision::Full);
                    let run = |cpu: &super::Cpu| {
                        let rhs = ExpandRhs::Mixed(&b);
                        let lora = Some(Expand { z: &z, segments: &segments, rhs });
                        let projections = [Projection { lora, ..Projection::plain(&w) }];
                        let (order, output) = (Order::Panel, Precision::Full);
                        let linear = Linear { x: &x, projections: &projections, order, output };
                        cpu.linear(linear).remove(0)
                    };
                    let (x, w, b) = (cpu.download(&x), w.to_f32(), cpu.download(&b));
                    let z = cpu.download(&z);
                    let mut want = vec![Sized::default(); m * n];
                    for (i, want) in want.iter_mut().enumerate() {
                        let (t, o, row) = (i / n, i % n, usize::from(i / n < first));
                        (0..k).for_each(|j| want.add(x[t * k + j] * f64::from(w[o * k + j])));
                        let term = |j| z[t * rank + j] * b[(row * rank + j) * n + o];
                        (0..rank).for_each(|j| want.add(term(j)));
                    }
                    let y = run(&cpu);
                    check_with_rank(&format!("{m} x {k} x {n}"), &cpu, &y, &want, exact);
                    for n_threads in [1, 16] {
                        let y_again = run(&with_threads(&cpu, n_threads));
                        assert_eq!(bits(&cpu, &y_again), bits(&cpu, &y), "{n_threads} threads");
                    }
                }

                let (m, n, ks) = (40, 33, [1500, 3000]);
                let d_ys = ks.map(|k| data.tensor(&cpu, m, k, Precision::Activation));
                let weights = ks.map(|k| weight(&mut data, k, n));
                let terms: Vec<_> = (d_ys.iter().zip(&weights))
                    .map(|(d_y, weight)| LinearBackwardTerm { d_y, weight, lora: None })
                    .collect();
                let d_x = cpu.linear_backward(LinearBackward { terms: &terms, d_residual: None });
                let mut want = vec![Sized::default(); m * n];
                for ((d_y, w), k) in d_ys.iter().zip(&weights).zip(ks) {
                    let (d_y, w) = (cpu.download(d_y), w.to_f32());
                    for (i, want) in want.iter_mut().enumerate() {
                        let term = |j| d_y[i / n * k + j] * f64::from(w[j * n + i % n]);
                        (0..k).for_each(|j| want.add(term(j)));
                    }
                }
                check("backward of two", &cpu, &d_x, &want, exact);
            }
        }
    }

    fn run_linear(
        cpu: &super::Cpu,
        weight: &Frozen,
        x: &Tensor<super::Cpu>,
        residual: Option<&Tensor<super::Cpu>>,
        output: Precision,
    ) -> Tensor<super::Cpu> {
        let projections = &[Projection { residual, ..Projection::plain(weight) }];
        cpu.linear(Linear { x, projections, order: Order::Panel, output }).remove(0)
    }

    /// What is written past the caches is what would be written otherwise, where rows are whole lines and where not.
    #[test]
    fn large_outputs_are_those_of_their_rows() {
        const K: usize = 64;
        for cpu in backends().into_iter().filter(|cpu| cpu.compute == Dtype::Bf16).chain(amx()) {
            for (n, output) in [
                (1024, Precision::Activation),
                (1000, Precision::Activation),
                (640, Precision::Full),
                (650, Precision::Full),
            ] {
                let (m, part) = (1050, 150);
                let mut data = Data::new(5, false);
                let x = data.tensor(&cpu, m, K, Precision::Activation);
                let residual = data.tensor(&cpu, m, n, Precision::Activation);
                let w = weight(&mut data, n, K);
                let (xs, residuals) = (cpu.download(&x), cpu.download(&residual));
                for with_residual in [false, true] {
                    let all = run_linear(&cpu, &w, &x, with_residual.then_some(&residual), output);
                    assert!(super::past_caches(all.buffer.as_slice::<u8>()));
                    let mut parts = Vec::new();
                    for first in (0..m).step_by(part) {
                        let rows = |values: &[f64], cols: usize| {
                            let values = &values[first * cols..][..part * cols];
                            cpu.upload(values, part, cols, Precision::Activation)
                        };
                        let (x, residual) = (rows(&xs, K), rows(&residuals, n));
                        let y =
                            run_linear(&cpu, &w, &x, with_residual.then_some(&residual), output);
                        assert!(!super::past_caches(y.buffer.as_slice::<u8>()));
                        parts.extend(bits(&cpu, &y));
                    }
                    assert_eq!(bits(&cpu, &all), parts, "{n} columns, {output:?}");
                }
            }
        }
    }

    #[test]
    fn two_parts_are_the_number() {
        for isa in Isa::testable() {
            let n = if matches!(isa, Isa::Scalar(_) | Isa::Avx2(_)) { 1_000_000 } else { 3000 };
            let spread = |i: u32| f32::from_bits(i.wrapping_mul(2_654_435_761));
            for start in (0..n).step_by(250) {
                let x: Vec<f32> = (start..start + 250).map(spread).collect();
                let items: Vec<[u8; 4]> = x.iter().map(|x| x.to_le_bytes()).collect();
                let mut parts = [[half::bf16::NAN; super::PIECE]; 3];
                isa.run(super::SplitItems { items: &items, parts: &mut parts });
                for (i, x) in x.into_iter().enumerate() {
                    let [first, second, again] = parts.map(|part| part[i]);
                    assert_eq!(first.to_bits(), round_bf16(x).to_bits());
                    if first.to_f32().is_finite() {
                        let sum = first.to_f64() + second.to_f64();
                        // The last part of a tiny number may be denormal, with fewer digits.
                        let lost = (sum - f64::from(x)).abs();
                        let bound = f64::powi(2.0, -17) * f64::from(x).abs() + f64::powi(2.0, -134);
                        assert!(lost <= bound, "{x:e}: {sum:e}");
                        assert_eq!(again.to_bits(), first.to_bits());
                    } else {
                        assert_eq!(second.to_f32(), 0.0);
                        assert_eq!(again.to_f32(), 0.0);
                    }
                }
            }
        }
    }
}
