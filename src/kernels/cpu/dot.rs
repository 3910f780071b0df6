//! Dot products in 16 lanes: `y[m, n] = Σ_k x[m, k] W[n, k]`, for a few rows.
//!
//! Lane `i` sums the products of `k = i mod 16`, one after the other; then the lanes are added as a
//! tree. Each weight row is read from memory once, whatever the number of rows: decoding is as fast
//! as the memory.
//!
//! On AMX weights of bf16 are the left tiles, as they lie in the file, and the rows of `x` the right ones, packed
//! once: a tile of 16 weight rows takes the latency of a product, about 52 cycles for 1 KiB, for up to 16 rows of
//! `x`, four times as fast as a thread's memory was, where dot products of eight rows take as long as the
//! multiply-adds do. The sums are those of [`gemm_amx`].

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
    /// f32, `[m, k]`.
    Wide(Buffer),
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
            return Self::Wide(widen(cpu, x));
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
            Self::Wide(x) => return cpu.isa.run(Dots { x: x.as_slice(), weight, y, stride }),
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

/// The elements of a matrix as f32, `[rows, cols]`.
pub(super) fn widen(cpu: &Cpu, matrix: Matrix<'_>) -> Buffer {
    struct Widen<'a> {
        matrix: Matrix<'a>,
        out: &'a mut [f32],
    }
    impl SimdOp for Widen<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            let Self { matrix, out } = self;
            with_element!(matrix.dtype, E => {
                for (row, out) in out.chunks_mut(matrix.cols.max(1)).enumerate() {
                    let (whole, rest) = matrix.row::<E>(row).as_chunks();
                    let (out, out_rest) = out.as_chunks_mut();
                    for (x, out) in whole.iter().zip(out) {
                        simd.store(E::load(simd, x), out);
                    }
                    simd.store_part(E::load_part(simd, rest), out_rest);
                }
            });
        }
    }
    let mut out = cpu.scratch(matrix.rows * matrix.cols);
    cpu.isa.run(Widen { matrix, out: out.as_mut_slice() });
    out
}

/// `y[m, n] = Σ_k x[m, k] weight[n, k]`.
pub(super) struct Dots<'a> {
    /// `[m, k]`.
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
    let (k, n, m) = (weight.cols, weight.rows, y.len() / stride);
    assert_eq!(x.len(), m * k);
    let x = |row: usize| &x[row * k..row * k + k];
    // Four weight rows at a time stay in the L1 cache while the rows of x pass over them.
    for n0 in (0..n).step_by(4) {
        if n0 + 4 <= n {
            let row_of = |j| weight.row::<E>(n0 + j);
            let w = [row_of(0), row_of(1), row_of(2), row_of(3)];
            let mut row = 0;
            while row + 4 <= m {
                let x = [x(row), x(row + 1), x(row + 2), x(row + 3)];
                let mut put = |i: usize, j: usize, dot: f32| y[(row + i) * stride + n0 + j] = dot;
                // AVX2 has registers for eight vectors of sums; four rows share a weight's
                // conversion, and x comes from the L1 cache as an operand.
                if S::NV == 1 {
                    for (j, &w) in w.iter().enumerate() {
                        let dots = tile::<S, E, 4, 1>(simd, x, [w]);
                        dots.iter().enumerate().for_each(|(i, &[dot])| put(i, j, dot));
                    }
                } else {
                    for (i, dots) in tile::<S, E, 4, 4>(simd, x, w).iter().enumerate() {
                        dots.iter().enumerate().for_each(|(j, &dot)| put(i, j, dot));
                    }
                }
                row += 4;
            }
            for row in row..m {
                let [sums] = tile::<S, E, 1, 4>(simd, [x(row)], w);
                y[row * stride + n0..][..4].copy_from_slice(&sums);
            }
        } else {
            for n in n0..n {
                for row in 0..m {
                    y[row * stride + n] =
                        tile::<S, E, 1, 1>(simd, [x(row)], [weight.row::<E>(n)])[0][0];
                }
            }
        }
    }
}

/// The dot products of `R` rows of x with `C` weight rows, in the one order there is.
#[inline(always)]
fn tile<S: Simd, E: Element, const R: usize, const C: usize>(
    simd: S,
    x: [&[f32]; R],
    w: [&[E::Item]; C],
) -> [[f32; C]; R] {
    let k = x[0].len();
    let (whole, rest) = (k / LANES, k / LANES * LANES);
    let mut sums = [[simd.splat(0.0); C]; R];
    let (mut x_lanes, mut w_lanes) = ([simd.splat(0.0); R], [simd.splat(0.0); C]);
    // Of one length that the compiler sees, so that the loop has no bounds to check.
    let x_chunks = x.map(|x| &x.as_chunks::<LANES>().0[..whole]);
    let w_chunks = w.map(|w| &w.as_chunks::<LANES>().0[..whole]);
    for i in 0..whole {
        for (lanes, x) in x_lanes.iter_mut().zip(x_chunks) {
            *lanes = simd.load(&x[i]);
        }
        for (lanes, w) in w_lanes.iter_mut().zip(w_chunks) {
            *lanes = E::load(simd, &w[i]);
        }
        step(simd, &mut sums, &x_lanes, &w_lanes);
    }
    if rest < k {
        for (lanes, x) in x_lanes.iter_mut().zip(x) {
            *lanes = simd.load_part(&x[rest..], 0.0);
        }
        for (lanes, w) in w_lanes.iter_mut().zip(w) {
            *lanes = E::load_part(simd, &w[rest..]);
        }
        step(simd, &mut sums, &x_lanes, &w_lanes);
    }
    let mut dots = [[0.0; C]; R];
    for (dots, sums) in dots.iter_mut().zip(sums) {
        for (dot, sum) in dots.iter_mut().zip(sums) {
            *dot = simd.sum(sum);
        }
    }
    dots
}

#[inline(always)]
fn step<S: Simd, const R: usize, const C: usize>(
    simd: S,
    sums: &mut [[S::V; C]; R],
    x: &[S::V; R],
    w: &[S::V; C],
) {
    for i in 0..R {
        for j in 0..C {
            sums[i][j] = simd.fma(x[i], w[j], sums[i][j]);
        }
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
