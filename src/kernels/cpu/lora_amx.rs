//! The routed LoRA's products with a bf16 operand and an f32 one, on AMX tiles.
//!
//! The f32 operand is split into three bf16 that add up to it ([`Split`]), side by side: three columns (or rows)
//! for one. Their sums are added at the end, the smallest first. So nothing of f32 is lost; what an infinity
//! would meet is a zero, though, where it should meet a number. Therefore a result that is not finite is
//! computed again on vectors.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Cpu,
    buffer::Buffer,
    gemm::{COLS, Matrix},
    gemm_amx::{Left, PackColumns, PackRows, PackTransposed, Split, multiply, steps},
    isa::{
        Amx, BLOCK_COLS, BLOCK_ROWS, Block, LeftRows, TILE_COLS, TILE_K, TILE_ROWS, Tile, Tiles,
    },
};
use crate::{dtype::Dtype, kernels::ops::Segments, tensor::Tensor};

/// Parts of a number.
const PARTS: usize = 3;
/// Steps of k between a load and a store of the sums: the left operand's stay in the L1 cache.
const STEPS_L1: usize = 8;

/// The tiles, where there are any for the products of an operand.
pub(super) fn takes(cpu: &Cpu, operand: &Tensor<Cpu>) -> Option<Amx> {
    match cpu.isa {
        super::isa::Isa::Amx(amx) if operand.dtype() == Dtype::Bf16 => Some(amx),
        _ => None,
    }
}

/// A number from the sums of its parts.
fn joined([first, second, third]: [f32; PARTS]) -> f32 {
    third + second + first
}

/// The `tile`-th of column tiles of `n_steps` steps each, of which some; past the last one the last one
/// again, as [`multiply`] takes several at a time.
fn column_tile(tiles: &[Tile], n_steps: usize, tile: usize, some: Range<usize>) -> &[Tile] {
    let last = tiles.len() / n_steps - 1;
    &tiles[tile.min(last) * n_steps..][..n_steps][some]
}

/// Right operands `[k, rank]`, one for each routing row.
pub(super) struct IntoRank {
    /// `[routing row][column tile][step]`.
    tiles: Buffer,
    n_steps: usize,
    rank: usize,
}

impl IntoRank {
    /// From a block of rows for each routing row: `[k, rank]`, or `[rank, k]` if `transposed`.
    pub(super) fn new(
        cpu: &Cpu,
        amx: Amx,
        rhs: &Tensor<Cpu>,
        n_rows: usize,
        rank: usize,
        transposed: bool,
    ) -> Self {
        let rhs = Matrix::tensor(rhs);
        let split = match transposed {
            true => Split::rows(cpu, amx, rhs, rank, [0, 1, 2]),
            false => Split::columns(cpu, amx, rhs, [0, 1, 2]),
        };
        let split = split.matrix();
        let (k, block) = match transposed {
            true => (rhs.cols, PARTS * rank),
            false => (rhs.rows / n_rows.max(1), rhs.rows / n_rows.max(1)),
        };
        let (n_steps, cols) = (steps(k), 0..PARTS * rank);
        let n_tiles = cols.len().div_ceil(TILE_COLS) * n_steps;
        let mut tiles = cpu.tiles(n_rows * n_tiles);
        let of_rows = tiles.as_mut_slice().par_chunks_mut(n_tiles.max(1));
        of_rows.enumerate().for_each(|(row, out)| {
            let matrix = split.part_rows(row * block..(row + 1) * block);
            amx.run(PackColumns { matrix, transposed, steps: 0..n_steps, cols: cols.clone(), out });
        });
        Self { tiles, n_steps, rank }
    }

    fn of_row(&self, row: usize) -> &[Tile] {
        let n_tiles = (PARTS * self.rank).div_ceil(TILE_COLS) * self.n_steps;
        &self.tiles.as_slice()[row * n_tiles..][..n_tiles]
    }

    /// `out = scale * lhs·rhs[row]`, of tokens `run`.
    pub(super) fn multiply(
        &self,
        cpu: &Cpu,
        amx: Amx,
        lhs: &Tensor<Cpu>,
        (run, row): (Range<usize>, usize),
        scale: f32,
        out: &mut [f32],
    ) {
        let Self { n_steps, rank, .. } = *self;
        let n_cols = PARTS * rank;
        let mut left = cpu.tiles(2 * n_steps);
        let left = left.as_mut_slice::<Tile>();
        let mut sums = cpu.pool.take(n_cols.div_ceil(BLOCK_COLS) * size_of::<Block>());
        let sums = sums.as_mut_slice::<Block>();
        let (right, matrix) = (self.of_row(row), Matrix::tensor(lhs).part_rows(run.clone()));
        for (block, out) in out.chunks_mut(BLOCK_ROWS * rank).enumerate() {
            let n = out.len() / rank;
            amx.run(PackRows { matrix, first_row: block * BLOCK_ROWS, out: &mut *left });
            amx.with_tiles(|tiles| {
                for (c, sums) in sums.iter_mut().enumerate() {
                    let cols = BLOCK_COLS.min(n_cols - c * BLOCK_COLS);
                    let first = c * BLOCK_COLS / TILE_COLS;
                    for some in chunks(n_steps) {
                        let of_tile =
                            |tile| column_tile(right, n_steps, first + tile, some.clone());
                        let (upper, lower) = left.split_at(n_steps);
                        let (upper, lower) = (&upper[some.clone()], &lower[some.clone()]);
                        let left = match n > TILE_ROWS {
                            true => Left::Two([upper, lower]),
                            false => Left::One(LeftRows { tiles: upper, first: 0, n }, 0),
                        };
                        multiply(tiles, left, of_tile, cols, sums, some.start == 0);
                    }
                }
            });
            for (m, out) in out.chunks_mut(rank).enumerate() {
                for (j, out) in out.iter_mut().enumerate() {
                    let part = |p: usize| {
                        let col = p * rank + j;
                        sums[col / BLOCK_COLS].0[m][col % BLOCK_COLS]
                    };
                    *out = scale * joined([part(0), part(1), part(2)]);
                }
            }
        }
    }
}

/// Pieces of at most [`STEPS_L1`] of some steps.
fn chunks(n_steps: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n_steps).step_by(STEPS_L1).map(move |start| start..n_steps.min(start + STEPS_L1))
}

/// A left operand `matrixᵀ`, with tokens as k, segment by segment.
pub(super) struct OverTokens {
    /// `[segment][row tile][step]`, an even number of row tiles.
    tiles: Buffer,
    /// Where each segment's tiles start.
    starts: Vec<usize>,
    /// Columns of the matrix.
    n: usize,
}

impl OverTokens {
    /// From an f32 matrix `[tokens, n]`.
    pub(super) fn new(cpu: &Cpu, amx: Amx, matrix: Matrix<'_>, segments: &Segments) -> Self {
        let split = Split::columns(cpu, amx, matrix, [0, 1, 2]);
        let row_tiles = Self::row_tiles(matrix.cols);
        let (mut starts, mut end) = (Vec::new(), 0);
        for (run, _) in segments.iter() {
            starts.push(end);
            end += row_tiles * steps(run.len());
        }
        let mut tiles = cpu.tiles(end);
        let mut rest = tiles.as_mut_slice::<Tile>();
        let mut tasks = Vec::new();
        for (run, _) in segments.iter() {
            let (out, later) = rest.split_at_mut(row_tiles * steps(run.len()));
            tasks.push((split.matrix().part_rows(run), out));
            rest = later;
        }
        let tasks = tasks.into_par_iter().filter(|(_, out)| !out.is_empty());
        tasks.for_each(|(matrix, out)| amx.run(PackTransposed { matrix, out }));
        Self { tiles, starts, n: matrix.cols }
    }

    fn row_tiles(n: usize) -> usize {
        (PARTS * n).next_multiple_of(BLOCK_ROWS) / TILE_ROWS
    }

    /// `matrixᵀ·wide` over the tokens of one routing row, of some columns (at most [`COLS`]): `[n][COLS]`,
    /// or nothing if a result is not finite.
    pub(super) fn multiply(
        &self,
        cpu: &Cpu,
        amx: Amx,
        wide: &Tensor<Cpu>,
        segments: &Segments,
        row: usize,
        cols: Range<usize>,
    ) -> Option<Buffer> {
        let row_tiles = Self::row_tiles(self.n);
        let mut sums = cpu.pool.take(row_tiles / 2 * size_of::<Block>());
        let sums = sums.as_mut_slice::<Block>();
        sums.fill(bytemuck::Zeroable::zeroed());
        let n_tiles = cols.len().div_ceil(TILE_COLS);
        let mut right = cpu.tiles(n_tiles * STEPS_L1);
        let right = right.as_mut_slice::<Tile>();
        for ((run, _), start) in segments.iter().zip(&self.starts).filter(|((_, of), _)| *of == row)
        {
            let matrix = Matrix::tensor(wide).part_rows(run.clone());
            let n_steps = steps(run.len());
            let left = &self.tiles.as_slice::<Tile>()[*start..][..row_tiles * n_steps];
            for some in chunks(n_steps) {
                let right = &mut right[..n_tiles * some.len()];
                let (steps, cols) = (some.clone(), cols.clone());
                let n_cols = cols.len();
                let pack = PackColumns { matrix, transposed: false, steps, cols, out: &mut *right };
                amx.run(pack);
                amx.with_tiles(|tiles| {
                    Self::add(tiles, left, n_steps, some, right, n_cols, sums);
                });
            }
        }
        let mut out = cpu.scratch(self.n * COLS);
        for (j, out) in out.as_mut_slice::<f32>().chunks_mut(COLS).enumerate() {
            let part = |p: usize| {
                let at = p * self.n + j;
                &sums[at / BLOCK_ROWS].0[at % BLOCK_ROWS]
            };
            let (first, second, third) = (part(0), part(1), part(2));
            out.fill(0.0);
            for (c, out) in out.iter_mut().enumerate().take(cols.len()) {
                *out = joined([first[c], second[c], third[c]]);
            }
            if !out.iter().all(|value| value.is_finite()) {
                return None;
            }
        }
        Some(out)
    }

    /// Adds the products over some steps of a segment.
    fn add(
        tiles: &mut Tiles,
        left: &[Tile],
        n_steps: usize,
        some: Range<usize>,
        right: &[Tile],
        cols: usize,
        sums: &mut [Block],
    ) {
        let of_tile = |tile| column_tile(right, some.len(), tile, 0..some.len());
        for (left, sums) in left.chunks(2 * n_steps).zip(sums) {
            let (upper, lower) = left.split_at(n_steps);
            let left = Left::Two([&upper[some.clone()], &lower[some.clone()]]);
            multiply(tiles, left, of_tile, cols, sums, false);
        }
    }
}

const _: () = assert!(COLS <= BLOCK_COLS && TILE_K == 2 * TILE_ROWS);

#[cfg(test)]
mod tests {
    use super::{super::checks::*, *};
    use crate::kernels::{Backend, Precision, ops::*};

    /// Tokens, their widths, rank and siblings: parts past a block's columns and rows, runs longer than what is
    /// packed at a time, segments of one routing row apart.
    const SHAPES: [(&[usize], usize, usize, usize, usize); 4] = [
        (&[40, 0, 30, 5], 40, 17, 8, 2),
        (&[7, 33], 300, 130, 1, 1),
        (&[33, 2], 33, 33, 43, 1),
        (&[300], 20, 7, 3, 1),
    ];

    fn segments(lens: &[usize]) -> Segments {
        let rows: Vec<_> = (0..lens.len()).map(|i| [1, 0, 1, 3][i]).collect();
        Segments::new(lens, &rows, 4)
    }

    #[test]
    fn into_rank_space_and_back() {
        let Some(cpu) = amx() else { return };
        for exact in [true, false] {
            for (lens, d_in, d_out, rank, n_siblings) in SHAPES {
                let mut data = Data::new(31, exact);
                let (segments, m) = (segments(lens), lens.iter().sum::<usize>());
                let n_rows = segments.n_rows();
                let x = data.tensor(&cpu, m, d_in, Precision::Activation);
                let mut full = |rows, cols| -> Vec<Tensor<Cpu>> {
                    let one = |_| data.tensor(&cpu, rows, cols, Precision::Full);
                    (0..n_siblings).map(one).collect()
                };
                let mixed_a = full(n_rows * d_in, rank);
                let mixed_b = full(n_rows * rank, d_out);
                let all_z = full(m, rank);
                let d_ys: Vec<_> = (0..n_siblings)
                    .map(|_| data.tensor(&cpu, m, d_out, Precision::Activation))
                    .collect();
                let shrink = |cpu: &Cpu| {
                    let mixed_a: Vec<_> = mixed_a.iter().collect();
                    let (x, segments, scale) = (&x, &segments, 0.5);
                    let order = Order::Panel;
                    cpu.shrink(Shrink { x, mixed_a: &mixed_a, segments, scale, order })
                };
                let backward = |cpu: &Cpu| {
                    let terms = all_z.iter().zip(&d_ys).zip(&mixed_b);
                    let terms: Vec<_> =
                        terms.map(|((z, d_y), mixed_b)| LoraTerm { z, d_y, mixed_b }).collect();
                    let (x, segments) = (&x, &segments);
                    cpu.lora_backward(LoraBackward { x, terms: &terms, segments, scale: 0.5 })
                };
                let (zs, gradients) = (shrink(&cpu), backward(&cpu));
                let other = with_threads(&cpu, 1);
                let (zs_again, gradients_again) = (shrink(&other), backward(&other));
                let x = cpu.download(&x);
                for i in 0..n_siblings {
                    let (a, b) = (cpu.download(&mixed_a[i]), cpu.download(&mixed_b[i]));
                    let (z_values, d_y) = (cpu.download(&all_z[i]), cpu.download(&d_ys[i]));
                    let got = &gradients[i];
                    let d_z_values = cpu.download(&got.d_z);
                    let (mut z, mut d_z) =
                        (vec![Sized::default(); m * rank], vec![Sized::default(); m * rank]);
                    let mut d_a = vec![Sized::default(); n_rows * d_in * rank];
                    let mut d_b = vec![Sized::default(); n_rows * rank * d_out];
                    for (run, row) in segments.iter() {
                        for (t, j) in run.flat_map(|t| (0..rank).map(move |j| (t, j))) {
                            let at = t * rank + j;
                            for k in 0..d_in {
                                let (x, pair) = (x[t * d_in + k], (row * d_in + k) * rank + j);
                                z[at].add(0.5 * x * a[pair]);
                                d_a[pair].add(x * d_z_values[at]);
                            }
                            for o in 0..d_out {
                                let (d_y, pair) =
                                    (d_y[t * d_out + o], (row * rank + j) * d_out + o);
                                d_z[at].add(0.5 * d_y * b[pair]);
                                d_b[pair].add(d_y * z_values[at]);
                            }
                        }
                    }
                    let name = |what| format!("{what} of {lens:?} x {d_in} x {rank} x {d_out}");
                    check(&name("z"), &cpu, &zs[i], &z, exact);
                    check(&name("d_z"), &cpu, &got.d_z, &d_z, exact);
                    check(&name("d_a"), &cpu, &got.d_a, &d_a, exact);
                    check(&name("d_b"), &cpu, &got.d_b, &d_b, exact);
                    let again = &gradients_again[i];
                    let pairs = [(&zs[i], &zs_again[i]), (&got.d_z, &again.d_z)];
                    let more = [(&got.d_a, &again.d_a), (&got.d_b, &again.d_b)];
                    for (got, again) in pairs.into_iter().chain(more) {
                        assert_eq!(bits(&cpu, got), bits(&cpu, again));
                    }
                }
            }
        }
    }

    /// An infinity stays one: no part of a number that is zero meets it.
    #[test]
    fn infinities() {
        let Some(cpu) = amx() else { return };
        let segments = segments(&[3, 4]);
        let mut x = vec![1.0; 7 * 5];
        x[7] = f64::INFINITY;
        let x = cpu.upload(&x, 7, 5, Precision::Activation);
        let a = cpu.upload(&[1.0; 4 * 5 * 2], 20, 2, Precision::Full);
        let (order, scale) = (Order::Panel, 1.0);
        let shrink = Shrink { x: &x, mixed_a: &[&a], segments: &segments, scale, order };
        let z = cpu.download(&cpu.shrink(shrink)[0]);
        let rows: Vec<f64> = z.iter().step_by(2).copied().collect();
        assert_eq!(rows, [5.0, f64::INFINITY, 5.0, 5.0, 5.0, 5.0, 5.0]);
        let z = cpu.upload(&[1.0; 14], 7, 2, Precision::Full);
        let b = cpu.upload(&[1.0; 4 * 2 * 3], 8, 3, Precision::Full);
        let d_y = cpu.upload(&[1.0; 21], 7, 3, Precision::Activation);
        let terms = [LoraTerm { z: &z, d_y: &d_y, mixed_b: &b }];
        let args = LoraBackward { x: &x, terms: &terms, segments: &segments, scale: 1.0 };
        let d_a = cpu.download(&cpu.lora_backward(args)[0].d_a);
        // Of routing row 1, the first segment's, feature 2 is infinite in a token.
        let want = |at: usize| match at / 10 {
            1 if at % 10 / 2 == 2 => f64::INFINITY,
            1 => 9.0,
            0 => 12.0,
            _ => 0.0,
        };
        assert_eq!(d_a, (0..40).map(want).collect::<Vec<_>>());
    }
}
