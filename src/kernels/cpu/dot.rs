//! Dot products in 16 lanes: `y[m, n] = Σ_k x[m, k] W[n, k]`, for a few rows.
//!
//! Lane `i` sums the products of `k = i mod 16`, one after the other; then the lanes are added as a
//! tree. Each weight row is read from memory once, whatever the number of rows: decoding is as fast
//! as the memory.
//!
//! On AMX weights of bf16 are the left tiles, as they lie in the file, and the rows of `x` the right ones, packed
//! once: a tile of 16 weight rows, 1 KiB, takes one product for up to 16 rows of `x`, faster than a thread's memory,
//! where dot products of eight rows take as long as the multiply-adds do. The sums are those of [`gemm_amx`].

use std::ops::Range;

use bytemuck::Zeroable;

use super::{
    Cpu,
    buffer::Buffer,
    gemm_amx::{self, PackColumns, padded},
    isa::{
        Amx, Bf16Bytes, Element, LANES, LeftRows, Simd, SimdOp, TILE_COLS, TILE_K, TILE_ROWS, Tile,
        Tiles, load_rows,
    },
    matrix::{Matrix, with_element},
};
use crate::tensor::Frozen;

/// A few rows, prepared for products with weights.
pub(super) enum FewRows {
    /// [`PackedRows`].
    Packed(Buffer),
    /// Right tiles, `[column tile][step]`, of `m` columns.
    Tiles { amx: Amx, tiles: Buffer, m: usize },
}

impl FewRows {
    /// `x`, for products with these weights.
    pub(super) fn new<'a>(
        cpu: &Cpu,
        x: Matrix<'_>,
        weights: impl Iterator<Item = &'a Frozen>,
    ) -> Self {
        let Some(amx) = gemm_amx::takes(cpu, weights) else {
            let mut packed = cpu.scratch(PackedRows::len(x.rows, x.cols));
            cpu.isa.run(PackRows { matrix: x, out: packed.as_mut_slice() });
            return Self::Packed(packed);
        };
        let (m, steps) = (x.rows, gemm_amx::steps(x.cols));
        let mut tiles = cpu.tiles(m.div_ceil(TILE_COLS) * steps);
        let out = tiles.as_mut_slice();
        amx.run(PackColumns { matrix: x, transposed: true, steps: 0..steps, cols: 0..m, out });
        Self::Tiles { amx, tiles, m }
    }

    /// `y[m, n] = Σ_k x[m, k] weight[n, k]`; `y` is `[m, stride]`.
    pub(super) fn dots(&self, cpu: &Cpu, weight: Matrix<'_>, y: &mut [f32], stride: usize) {
        let (amx, tiles, m) = match self {
            Self::Packed(x) => return cpu.isa.run(Dots { x: x.as_slice(), weight, y, stride }),
            Self::Tiles { amx, tiles, m } => (amx, tiles.as_slice::<Tile>(), *m),
        };
        assert_eq!(y.len(), m * stride);
        amx.with_tiles(|registers| {
            for first in (0..weight.rows).step_by(TILE_ROWS) {
                let rows = weight.part_rows(first..weight.rows.min(first + TILE_ROWS));
                let of_columns = tiles.chunks(gemm_amx::steps(weight.cols));
                for (right, y) in of_columns.zip(y.chunks_mut(TILE_COLS * stride)) {
                    let sums = strip(registers, rows, right);
                    amx.run(Put { sums: &sums, n: rows.rows, y, stride, first });
                }
            }
        });
    }
}

/// Sums of up to 16 rows with 16 columns.
#[repr(align(64))]
struct Strip([[f32; TILE_COLS]; TILE_ROWS]);

/// The products of up to 16 rows of bf16, from where they lie, and a column of right tiles.
fn strip(registers: &mut Tiles, weight: Matrix<'_>, right: &[Tile]) -> Strip {
    let mut sums = Strip([[0.0; TILE_COLS]; TILE_ROWS]);
    let (whole, rest) = right.split_at(weight.cols / TILE_K);
    let (n, to) = (weight.rows, &mut sums.0[..weight.rows]);
    if !whole.is_empty() {
        let (bytes, stride) = weight.lines();
        let rows = LeftRows::in_memory(bytes, n, stride, whole.len());
        registers.multiply_rows(rows, whole, to, true);
    }
    if !rest.is_empty() {
        // What follows a row's end in memory must not even meet a zero.
        let mut ends = Tile::zeroed();
        for (row, line) in ends.0.iter_mut().enumerate().take(n) {
            let items = &weight.row::<Bf16Bytes>(row)[whole.len() * TILE_K..];
            *line = bytemuck::cast(padded::<TILE_K>(items));
        }
        let ends = [ends];
        let rows = LeftRows::of_tiles(&ends).part(0..n);
        registers.multiply_rows(rows, rest, to, whole.is_empty());
    }
    sums
}

/// `y[m, first + i] = sums[i, m]` of the first `n` rows of sums, for the rows that `y` has.
struct Put<'a> {
    sums: &'a Strip,
    n: usize,
    y: &'a mut [f32],
    stride: usize,
    first: usize,
}

impl SimdOp for Put<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { sums, n, y, stride, first } = self;
        let columns = simd.transpose(load_rows(simd, sums.0.iter()));
        for (v, y) in columns.into_iter().zip(y.chunks_mut(stride)) {
            let y = &mut y[first..first + n];
            match y.as_chunks_mut().0 {
                [whole] => simd.store(v, whole),
                _ => simd.store_part(v, y),
            }
        }
    }
}

/// Rows of x as [`Dots`] reads them: one after the other in memory, whatever the number of rows at a time. Four rows are
/// together, `[k / 16][row][16]`, and each of the last three is by itself; zeros fill the last step.
pub(super) struct PackedRows<'a> {
    values: &'a [f32],
    /// Steps of 16 k.
    steps: usize,
}

impl<'a> PackedRows<'a> {
    /// Floats of `m` rows of `k`.
    pub(super) fn len(m: usize, k: usize) -> usize {
        m * k.next_multiple_of(LANES)
    }

    /// Where the lanes of a step of a row of `m` rows of `k` go.
    pub(super) fn place(m: usize, k: usize, row: usize, step: usize) -> Range<usize> {
        let steps = k.div_ceil(LANES);
        let vector = if row < m / TOGETHER * TOGETHER {
            (row / TOGETHER * steps + step) * TOGETHER + row % TOGETHER
        } else {
            row * steps + step
        };
        vector * LANES..(vector + 1) * LANES
    }

    /// `TOGETHER` rows from a multiple of it on, or one of the last rows; a step's vectors by themselves.
    fn rows<const R: usize>(&self, first: usize) -> &'a [[[f32; LANES]; R]] {
        let start = first * self.steps;
        self.values.as_chunks().0[start..start + R * self.steps].as_chunks().0
    }
}

/// Rows of x that lie together.
const TOGETHER: usize = 4;

/// Rows as [`PackedRows`].
pub(super) struct PackRows<'a> {
    pub(super) matrix: Matrix<'a>,
    pub(super) out: &'a mut [f32],
}

impl SimdOp for PackRows<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { matrix, out } = self;
        let (m, k) = (matrix.rows, matrix.cols);
        with_element!(matrix.dtype, E => {
            for row in 0..m {
                let (whole, rest) = matrix.row::<E>(row).as_chunks();
                let mut put = |step, v| {
                    let place = PackedRows::place(m, k, row, step);
                    simd.store(v, out[place].first_chunk_mut().expect("16 lanes"));
                };
                for (step, x) in whole.iter().enumerate() {
                    put(step, E::load(simd, x));
                }
                if !rest.is_empty() {
                    put(whole.len(), E::load_part(simd, rest));
                }
            }
        });
    }
}

/// `y[m, n] = Σ_k x[m, k] weight[n, k]`.
pub(super) struct Dots<'a> {
    /// [`PackedRows`], `[m, k]`.
    pub(super) x: &'a [f32],
    /// `[n, k]`.
    pub(super) weight: Matrix<'a>,
    /// `[m, stride]`, of which the first n columns are written.
    pub(super) y: &'a mut [f32],
    pub(super) stride: usize,
}

impl SimdOp for Dots<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_element!(self.weight.dtype, E => dots::<S, E>(simd, self));
    }
}

#[inline(always)]
fn dots<S: Simd, E: Element>(simd: S, args: Dots<'_>) {
    let Dots { x, weight, y, stride } = args;
    let m = y.len() / stride;
    assert_eq!(x.len(), PackedRows::len(m, weight.cols));
    let x = PackedRows { values: x, steps: weight.cols.div_ceil(LANES) };
    let mut rest = Rest { x, m, weight, y, stride, first: 0 };
    // As many weight rows at a time as there are registers for sums, with 8 rows of x or 4.
    if S::NV > 1 && m >= 2 * TOGETHER {
        groups::<S, E, 3>(simd, &mut rest);
        groups::<S, E, 2>(simd, &mut rest);
    }
    groups::<S, E, 4>(simd, &mut rest);
    groups::<S, E, 1>(simd, &mut rest);
}

/// What is left of [`Dots`]: the weight rows from `first` on.
struct Rest<'a> {
    x: PackedRows<'a>,
    m: usize,
    weight: Matrix<'a>,
    y: &'a mut [f32],
    stride: usize,
    first: usize,
}

impl Rest<'_> {
    #[inline(always)]
    fn put<const C: usize>(&mut self, row: usize, dots: &[[f32; C]]) {
        for (i, dots) in dots.iter().enumerate() {
            self.y[(row + i) * self.stride + self.first..][..C].copy_from_slice(dots);
        }
    }
}

/// Whole groups of `C` weight rows, which stay in the L1 cache while the rows of x pass over them.
#[inline(always)]
fn groups<S: Simd, E: Element, const C: usize>(simd: S, rest: &mut Rest<'_>) {
    let (weight, m) = (rest.weight, rest.m);
    let group = |first: usize| {
        let mut rows: [&[E::Item]; C] = [&[]; C];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = weight.row::<E>(first + i);
        }
        rows
    };
    while rest.first + C <= weight.rows {
        let w = group(rest.first);
        // No prefetcher looks across a page, which a row soon ends in.
        let next = rest.first + C;
        let ahead = group(if next + C <= weight.rows { next } else { rest.first });
        let mut row = 0;
        while S::NV > 1 && C < 4 && row + 2 * TOGETHER <= m {
            let x = [rest.x.rows(row), rest.x.rows(row + TOGETHER)];
            let dots = tile::<S, E, 2, TOGETHER, C>(simd, x, w, ahead);
            rest.put(row, dots.as_flattened());
            row += 2 * TOGETHER;
        }
        while row + TOGETHER <= m {
            let x = [rest.x.rows(row)];
            // AVX2 has registers for eight vectors of sums; four rows share a weight's conversion, and
            // x comes from the L1 cache as an operand.
            if S::NV == 1 {
                let mut dots = [[0.0; C]; TOGETHER];
                for j in 0..C {
                    let [column] = tile::<S, E, 1, TOGETHER, 1>(simd, x, [w[j]], [ahead[j]]);
                    for (dots, [dot]) in dots.iter_mut().zip(column) {
                        dots[j] = dot;
                    }
                }
                rest.put(row, &dots);
            } else {
                let dots = tile::<S, E, 1, TOGETHER, C>(simd, x, w, ahead);
                rest.put(row, dots.as_flattened());
            }
            row += TOGETHER;
        }
        while row < m {
            let dots = tile::<S, E, 1, 1, C>(simd, [rest.x.rows(row)], w, ahead);
            rest.put(row, dots.as_flattened());
            row += 1;
        }
        rest.first = next;
    }
}

/// The dot products of `G` times `R` rows of x with `C` weight rows, in the one order there is. Meanwhile the weight rows
/// `ahead` are fetched.
#[inline(always)]
fn tile<S: Simd, E: Element, const G: usize, const R: usize, const C: usize>(
    simd: S,
    x: [&[[[f32; LANES]; R]]; G],
    w: [&[E::Item]; C],
    ahead: [&[E::Item]; C],
) -> [[[f32; C]; R]; G] {
    let (steps, whole) = (w[0].len().div_ceil(LANES), w[0].len() / LANES);
    let mut sums = [[[simd.splat(0.0); C]; R]; G];
    // Of one length that the compiler sees, so that the loop has no bounds to check.
    let x = x.map(|x| &x[..steps]);
    let (mut w_chunks, mut ahead_chunks): ([&[_]; C], [&[_]; C]) = ([&[]; C], [&[]; C]);
    for j in 0..C {
        w_chunks[j] = &w[j].as_chunks::<LANES>().0[..whole];
        ahead_chunks[j] = &ahead[j].as_chunks::<LANES>().0[..whole];
    }
    let mut w_lanes = [simd.splat(0.0); C];
    for k in 0..whole {
        for j in 0..C {
            simd.prefetch(&ahead_chunks[j][k]);
            w_lanes[j] = E::load(simd, &w_chunks[j][k]);
        }
        for g in 0..G {
            for i in 0..R {
                add(simd, &mut sums[g][i], simd.load(&x[g][k][i]), &w_lanes);
            }
        }
    }
    if whole < steps {
        for j in 0..C {
            w_lanes[j] = E::load_part(simd, &w[j][whole * LANES..]);
        }
        for g in 0..G {
            for i in 0..R {
                add(simd, &mut sums[g][i], simd.load(&x[g][whole][i]), &w_lanes);
            }
        }
    }
    let mut dots = [[[0.0; C]; R]; G];
    let (fours, rest) = dots.as_flattened_mut().as_flattened_mut().as_chunks_mut::<4>();
    for (i, four) in fours.iter_mut().enumerate() {
        let of = |j: usize| sums[(4 * i + j) / (R * C)][(4 * i + j) / C % R][(4 * i + j) % C];
        *four = simd.sum_4([of(0), of(1), of(2), of(3)]);
    }
    for (i, dot) in rest.iter_mut().enumerate() {
        let i = G * R * C / 4 * 4 + i;
        *dot = simd.sum(sums[i / (R * C)][i / C % R][i % C]);
    }
    dots
}

/// `sums[j] += x w[j]`.
#[inline(always)]
fn add<S: Simd, const C: usize>(simd: S, sums: &mut [S::V; C], x: S::V, w: &[S::V; C]) {
    for j in 0..C {
        sums[j] = simd.fma(x, w[j], sums[j]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{Data, Sized, amx, backends, bits, check, some_rows};
    use crate::{
        dtype::Dtype,
        kernels::{Backend, Precision, ops::*},
        tensor::Frozen,
    };

    /// On either side of what the tiles take at once: 16 rows of x, 64 weight rows, 32 k.
    #[test]
    fn few_rows_are_their_definition_and_do_not_meet() {
        for cpu in backends().into_iter().chain(amx()) {
            for exact in [true, false] {
                let mut data = Data::new(22, exact);
                let ms = [1, 5, 16, 17, 33];
                let shapes = [(31, 15), (32, 64), (33, 65), (1, 1), (200, 130), (64, 16), (97, 80)];
                for (i, (k, n)) in shapes.into_iter().enumerate() {
                    let m = ms[i % ms.len()];
                    let x = data.tensor(&cpu, m, k, Precision::Activation);
                    let values: Vec<_> = (0..n * k).map(|_| data.value() as f32).collect();
                    let weight = Frozen::from_f32(&values, n, k, Dtype::Bf16);
                    let run = |x| {
                        let projections = [Projection::plain(&weight)];
                        let (order, output) = (Order::Dot, Precision::Full);
                        let linear = Linear { x, projections: &projections, order, output };
                        cpu.linear(linear).remove(0)
                    };
                    let y = run(&x);
                    let (xs, w) = (cpu.download(&x), weight.to_f32());
                    let mut want = vec![Sized::default(); m * n];
                    for (i, want) in want.iter_mut().enumerate() {
                        let term = |j| xs[i / n * k + j] * f64::from(w[i % n * k + j]);
                        (0..k).for_each(|j| want.add(term(j)));
                    }
                    check(&format!("{m} x {k} x {n}"), &cpu, &y, &want, exact);
                    let rows = m / 2..m;
                    let alone = run(&some_rows(&cpu, &x, rows.clone()));
                    assert_eq!(bits(&cpu, &alone), bits(&cpu, &some_rows(&cpu, &y, rows)));
                }
            }
        }
    }

    /// What lies behind a row's end in the file is the next row.
    #[test]
    fn the_next_rows_infinity_stays_there() {
        for cpu in backends().into_iter().chain(amx()) {
            let (k, n) = (40, 70);
            let mut data = Data::new(23, true);
            let x = data.tensor(&cpu, 3, k, Precision::Activation);
            let values: Vec<_> =
                (0..n * k).map(|i| if i / k % 2 == 0 { 1.0 } else { f32::INFINITY }).collect();
            let weight = Frozen::from_f32(&values, n, k, Dtype::Bf16);
            let projections = [Projection::plain(&weight)];
            let (order, output) = (Order::Dot, Precision::Full);
            let linear = Linear { x: &x, projections: &projections, order, output };
            let y = cpu.download(&cpu.linear(linear).remove(0));
            for (i, y) in y.into_iter().enumerate() {
                assert_eq!(y.is_finite(), i % n % 2 == 0, "element {i}");
            }
        }
    }
}
