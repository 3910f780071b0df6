//! Dot products in 16 lanes: `y[m, n] = Σ_k x[m, k] W[n, k]`, for a few rows.
//!
//! Lane `i` sums the products of `k = i mod 16`, one after the other; then the lanes are added as a
//! tree. Each weight row is read from memory once, whatever the number of rows: decoding is as fast
//! as the memory.

use super::{
    Cpu,
    buffer::Buffer,
    gemm::{Matrix, with_element},
    isa::{Element, LANES, Simd, SimdOp},
};

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
