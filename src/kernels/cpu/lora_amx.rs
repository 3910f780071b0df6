//! The routed LoRA's products with a bf16 operand and an f32 one, on AMX tiles.
//!
//! The f32 operand is split into three bf16 that add up to it ([`Split`]), side by side: three columns (or rows)
//! for one. Their sums are added at the end, the smallest first. So nothing of f32 is lost (of numbers above
//! 2^-102: tiles take denormals for zero); what an infinity would meet is a zero, though, where it should meet a
//! number. Therefore a result that is not finite is computed again on vectors.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Cpu,
    buffer::Buffer,
    dot::strip,
    gemm::{COLS, Matrix},
    gemm_amx::{Left, PackColumns, PackTransposed, Split, multiply, steps},
    isa::{Amx, BLOCK_COLS, BLOCK_ROWS, Block, TILE_COLS, TILE_K, TILE_ROWS, Tile, Tiles},
};
use crate::{kernels::ops::Segments, tensor::Tensor};

/// Parts of a number, in order.
const PARTS: [usize; 3] = [0, 1, 2];
/// Ranks whose parts fit beside each other in a block of sums.
const RANKS: usize = BLOCK_COLS / PARTS.len();

/// `out = scale * (third + second + first)`.
fn join<'a>(parts: [&[f32]; 3], scale: f32, out: impl Iterator<Item = &'a mut f32>) {
    let [first, second, third] = parts;
    for (((out, first), second), third) in out.zip(first).zip(second).zip(third) {
        *out = scale * (third + second + first);
    }
}

/// The `tile`-th of column tiles of `n_steps` steps each; past the last one the last one again, as [`multiply`]
/// takes several at a time.
fn column_tile(tiles: &[Tile], n_steps: usize, tile: usize) -> &[Tile] {
    let last = tiles.len() / n_steps - 1;
    &tiles[tile.min(last) * n_steps..][..n_steps]
}

/// Right operands `[k, rank]`, one for each routing row.
pub(super) struct IntoRank {
    /// `[routing row][group of ranks][column tile][step]`.
    tiles: Buffer,
    n_steps: usize,
    rank: usize,
}

impl IntoRank {
    /// From a block of rows for each routing row: `[k, rank]`, or `[rank, k]` if `transposed`. Of routing rows
    /// that no segment has, nothing is packed.
    pub(super) fn new(
        cpu: &Cpu,
        amx: Amx,
        rhs: &Tensor<Cpu>,
        rank: usize,
        transposed: bool,
        segments: &Segments,
    ) -> Self {
        let (n_rows, rhs) = (segments.n_rows(), Matrix::tensor(rhs));
        let k = if transposed { rhs.cols } else { rhs.rows / n_rows.max(1) };
        let n_steps = steps(k);
        let mut tiles = cpu.tiles(n_rows * Self::row_tiles(rank) * n_steps);
        let mut rest = tiles.as_mut_slice::<Tile>();
        let mut tasks = Vec::new();
        for (row, used) in segments.used_rows().into_iter().enumerate() {
            for ranks in groups(rank) {
                let (out, later) = rest.split_at_mut(part_tiles(ranks.len()) * n_steps);
                rest = later;
                if used {
                    tasks.push((row, ranks, out));
                }
            }
        }
        tasks.into_par_iter().for_each(|(row, ranks, out)| {
            let cols = 0..PARTS.len() * ranks.len();
            let split = if transposed {
                let ranks = row * rank + ranks.start..row * rank + ranks.end;
                Split::rows(cpu, amx, rhs.part(ranks, 0..k), PARTS)
            } else {
                Split::columns(cpu, amx, rhs.part(row * k..(row + 1) * k, ranks), PARTS)
            };
            amx.run(PackColumns {
                matrix: split.matrix(),
                transposed,
                steps: 0..n_steps,
                cols,
                out,
            });
        });
        Self { tiles, n_steps, rank }
    }

    /// Column tiles of a routing row.
    fn row_tiles(rank: usize) -> usize {
        groups(rank).map(|ranks| part_tiles(ranks.len())).sum()
    }

    /// `out = scale * lhs·rhs[row]`, of tokens of bf16. Tiles are loaded from where they lie: for so few columns, packing
    /// them takes longer than loading them again for each 16.
    pub(super) fn multiply(
        &self,
        amx: Amx,
        lhs: Matrix<'_>,
        row: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let Self { n_steps, rank, .. } = *self;
        let of_row = Self::row_tiles(rank) * n_steps;
        let of_row = &self.tiles.as_slice::<Tile>()[row * of_row..][..of_row];
        amx.with_tiles(|registers| {
            for (i, out) in out.chunks_mut(TILE_ROWS * rank).enumerate() {
                let first = i * TILE_ROWS;
                let tokens = lhs.part_rows(first..first + out.len() / rank);
                let mut rest = of_row;
                for ranks in groups(rank) {
                    let (now, later) = rest.split_at(part_tiles(ranks.len()) * n_steps);
                    rest = later;
                    let mut sums = [[0.0; BLOCK_COLS]; TILE_ROWS];
                    for (tile, right) in now.chunks(n_steps).enumerate() {
                        let strip = strip(registers, tokens, right);
                        for (sums, strip) in sums.iter_mut().zip(&strip.0) {
                            sums[tile * TILE_COLS..][..TILE_COLS].copy_from_slice(strip);
                        }
                    }
                    for (out, sums) in out.chunks_mut(rank).zip(&sums) {
                        let mut parts = sums.chunks(ranks.len());
                        let parts = PARTS.map(|_| parts.next().unwrap_or_default());
                        join(parts, scale, out[ranks.clone()].iter_mut());
                    }
                }
            }
        });
    }
}

/// Column tiles of the parts of a group of ranks.
fn part_tiles(n_ranks: usize) -> usize {
    (PARTS.len() * n_ranks).div_ceil(TILE_COLS)
}

/// The ranks, [`RANKS`] at a time.
fn groups(rank: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rank).step_by(RANKS).map(move |start| start..rank.min(start + RANKS))
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
        let split = Split::columns(cpu, amx, matrix, PARTS);
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
        (PARTS.len() * n).next_multiple_of(BLOCK_ROWS) / TILE_ROWS
    }

    /// `matrixᵀ·wide` over the tokens of one routing row, of some columns (at most [`COLS`]): `[n][COLS]`.
    pub(super) fn multiply(
        &self,
        cpu: &Cpu,
        amx: Amx,
        wide: &Tensor<Cpu>,
        segments: &Segments,
        row: usize,
        cols: Range<usize>,
    ) -> Buffer {
        let row_tiles = Self::row_tiles(self.n);
        let mut sums = cpu.pool.take(row_tiles / 2 * size_of::<Block>());
        let sums = sums.as_mut_slice::<Block>();
        sums.fill(bytemuck::Zeroable::zeroed());
        let n_tiles = cols.len().div_ceil(TILE_COLS);
        let mut right = cpu.tiles(n_tiles * STEPS_OF_TOKENS);
        let right = right.as_mut_slice::<Tile>();
        amx.with_tiles(|tiles| {
            let of_row = segments.iter().zip(&self.starts).filter(|((_, of), _)| *of == row);
            for ((run, _), start) in of_row {
                let matrix = Matrix::tensor(wide).part_rows(run.clone());
                let n_steps = steps(run.len());
                let left = &self.tiles.as_slice::<Tile>()[*start..][..row_tiles * n_steps];
                for first in (0..n_steps).step_by(STEPS_OF_TOKENS) {
                    let steps = first..n_steps.min(first + STEPS_OF_TOKENS);
                    let (some, right) = (steps.clone(), &mut right[..n_tiles * steps.len()]);
                    let (cols, out) = (cols.clone(), &mut *right);
                    amx.run(PackColumns { matrix, transposed: false, steps, cols, out });
                    Self::add(tiles, left, n_steps, some, right, n_tiles, sums);
                }
            }
        });
        let mut out = cpu.scratch(self.n * COLS);
        for (j, out) in out.as_mut_slice::<f32>().chunks_mut(COLS).enumerate() {
            let part = |p: usize| {
                let at = p * self.n + j;
                &sums[at / BLOCK_ROWS].0[at % BLOCK_ROWS][..]
            };
            join(PARTS.map(part), 1.0, out.iter_mut());
        }
        out
    }

    /// Adds the products over some steps of a segment.
    fn add(
        tiles: &mut Tiles,
        left: &[Tile],
        n_steps: usize,
        some: Range<usize>,
        right: &[Tile],
        n_tiles: usize,
        sums: &mut [Block],
    ) {
        let of_tile = |tile| column_tile(right, some.len(), tile);
        for (left, sums) in left.chunks(2 * n_steps).zip(sums) {
            let (upper, lower) = left.split_at(n_steps);
            let left = Left::of(&upper[some.clone()], &lower[some.clone()], BLOCK_ROWS);
            multiply(tiles, left, of_tile, n_tiles * TILE_COLS, sums, false);
        }
    }
}

/// Steps of tokens whose right operand a task packs at a time, for [`COLS`] columns: 64 KiB.
const STEPS_OF_TOKENS: usize = 8;

const _: () = assert!(COLS == BLOCK_COLS && TILE_K == 2 * TILE_ROWS);

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
