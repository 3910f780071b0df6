//! Gradients of the routed LoRA, in rank space and of the mixed pairs:
//! `d_z = scale * d_y·B̂ᵀ`, `d_a = xᵀ·d_z` and `d_b = zᵀ·d_y` of each routing row.
//!
//! `d_z` is a shrink with another right operand. The other two are one kind of product, with the
//! tokens as K: `small[tokens, rank]ᵀ · wide[tokens, features]`, for `d_a` with the siblings' ranks
//! side by side (so `x` is read once) and the result transposed. A task is 128 of a routing row's
//! features; it adds up the row's segments in order.

use std::ops::Range;

use super::{
    super::{Precision, ops::*},
    Cpu,
    gemm::{Accumulator, COLS, Matrix, Packed, Product, Rectangle, Rhs, cut, run_tasks, task_cols},
    shrink::{Layout, Side, into_rank_space},
};
use crate::tensor::Tensor;

pub(super) fn lora_backward(cpu: &Cpu, args: LoraBackward<'_, Cpu>) -> Vec<LoraGradients<Cpu>> {
    let LoraBackward { x, terms, segments, scale } = args;
    let Some(rank) = terms.first().map(|t| t.z.cols()) else { return Vec::new() };
    for LoraTerm { z, d_y, mixed_b } in terms {
        assert_eq!((z.rows(), z.cols(), d_y.rows()), (x.rows(), rank, x.rows()));
        assert_eq!((mixed_b.rows(), mixed_b.cols()), (segments.n_rows() * rank, d_y.cols()));
    }
    let sides: Vec<_> = terms.iter().map(|t| Side { lhs: t.d_y, rhs: t.mixed_b }).collect();
    let d_zs = into_rank_space(cpu, &sides, Layout::ByRank, rank, segments, scale);
    let d_as = d_a(cpu, x, &d_zs, segments);
    let gradients = terms.iter().zip(d_zs).zip(d_as).map(|((term, d_z), d_a)| {
        let d_b = d_b(cpu, term, segments);
        LoraGradients { d_z, d_a, d_b }
    });
    gradients.collect()
}

/// `xᵀ·d_z` of each routing row and sibling, `[rows * d_in, rank]`.
fn d_a(cpu: &Cpu, x: &Tensor<Cpu>, d_zs: &[Tensor<Cpu>], segments: &Segments) -> Vec<Tensor<Cpu>> {
    let (d_in, rank) = (x.cols(), d_zs[0].cols());
    let mut d_as: Vec<_> =
        d_zs.iter().map(|_| cpu.alloc(segments.n_rows() * d_in, rank, Precision::Full)).collect();
    if rank * d_in == 0 {
        return d_as;
    }
    let mut side_by_side = cpu.scratch(x.rows() * d_zs.len() * rank);
    let all = side_by_side.as_mut_slice::<f32>();
    for (i, d_z) in d_zs.iter().enumerate() {
        let rows = all.chunks_mut(d_zs.len() * rank).zip(d_z.f32s().chunks(rank));
        rows.for_each(|(all, d_z)| all[i * rank..(i + 1) * rank].copy_from_slice(d_z));
    }
    let narrow = Narrow::new(cpu, Matrix::f32s(all, x.rows(), d_zs.len() * rank), x, segments);

    // Tasks: for each routing row and [`COLS`] features, the features' rows of every sibling.
    let mut tasks: Vec<_> = (0..segments.n_rows())
        .flat_map(|row| (0..d_in).step_by(COLS).map(move |start| (row, start, Vec::new())))
        .collect();
    for d_a in &mut d_as {
        let rows = d_a.f32s_mut().chunks_mut(d_in * rank);
        let pieces = rows.flat_map(|row| row.chunks_mut(COLS * rank));
        tasks.iter_mut().zip(pieces).for_each(|((.., outs), piece)| outs.push(piece));
    }
    run_tasks(tasks, |(row, start, mut outs)| {
        let cols = start..d_in.min(start + COLS);
        let sums = narrow.multiply(cpu, outs.len() * rank, row, cols);
        for column in 0..outs.len() * rank {
            let out = outs[column / rank].chunks_mut(rank);
            out.zip(sums.row(column)).for_each(|(out, value)| out[column % rank] = value);
        }
    });
    d_as
}

/// `zᵀ·d_y` of each routing row, `[rows * rank, d_out]`.
fn d_b(cpu: &Cpu, term: &LoraTerm<'_, Cpu>, segments: &Segments) -> Tensor<Cpu> {
    let (rank, d_out) = (term.z.cols(), term.d_y.cols());
    let mut d_b = cpu.alloc(segments.n_rows() * rank, d_out, Precision::Full);
    let narrow = Narrow::new(cpu, Matrix::tensor(term.z), term.d_y, segments);
    // A rectangle is one routing row's ranks.
    let tasks = cut(d_b.f32s_mut(), d_out, 0, (rank.max(1), task_cols(cpu.isa)));
    run_tasks(tasks, |Rectangle { rows, cols, mut out }| {
        let sums = narrow.multiply(cpu, rank, rows.start / rank, cols);
        for (j, out) in out.iter_mut().enumerate() {
            out.copy_from_slice(&sums.row(j)[..out.len()]);
        }
    });
    d_b
}

/// A product over the tokens of a routing row: `narrowᵀ·wide`.
struct Narrow<'a> {
    lhs: Packed,
    wide: &'a Tensor<Cpu>,
    segments: &'a Segments,
}

impl<'a> Narrow<'a> {
    /// Of an f32 matrix `[tokens, n]`.
    fn new(cpu: &Cpu, matrix: Matrix<'_>, wide: &'a Tensor<Cpu>, segments: &'a Segments) -> Self {
        Self { lhs: Packed::columns(cpu, matrix), wide, segments }
    }

    /// Some columns of the product, `n` rows.
    fn multiply(&self, cpu: &Cpu, n: usize, row: usize, cols: Range<usize>) -> Accumulator {
        let mut sums = Accumulator::new(cpu, 0..n, cols);
        for (run, _) in self.segments.iter().filter(|&(_, of)| of == row) {
            sums.add(&Product {
                lhs: &self.lhs,
                first_k: run.start,
                rows: 0..n,
                rhs: Rhs {
                    matrix: Matrix::tensor(self.wide).part_rows(run),
                    transposed: false,
                    first_col: 0,
                },
            });
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::{super::checks::*, *};
    use crate::kernels::Backend;

    #[test]
    fn lora_backward_is_its_definition() {
        for cpu in backends() {
            for exact in [true, false] {
                let mut data = Data::new(9, exact);
                for m in AWKWARD.into_iter().chain([256, 513, 700]) {
                    let (d_in, rank) = (data.pick(&AWKWARD[1..]), data.pick(&[1, 3, 8, 16]));
                    let segments = data.segments(m);
                    let n_rows = segments.n_rows();
                    let x = data.tensor(&cpu, m, d_in, Precision::Activation);
                    let parts: Vec<_> = (0..1 + data.below(3))
                        .map(|_| {
                            let d_out = data.pick(&AWKWARD[1..]);
                            (
                                data.tensor(&cpu, m, rank, Precision::Full),
                                data.tensor(&cpu, m, d_out, Precision::Activation),
                                data.tensor(&cpu, n_rows * rank, d_out, Precision::Full),
                            )
                        })
                        .collect();
                    let terms: Vec<_> = parts
                        .iter()
                        .map(|(z, d_y, mixed_b)| LoraTerm { z, d_y, mixed_b })
                        .collect();
                    let run = |cpu: &Cpu| {
                        let (x, terms, segments) = (&x, &terms[..], &segments);
                        cpu.lora_backward(LoraBackward { x, terms, segments, scale: 0.5 })
                    };
                    let (x, again) = (cpu.download(&x), run(&with_threads(&cpu, 3)));
                    for ((got, term), again) in run(&cpu).iter().zip(&terms).zip(&again) {
                        let (d_y, d_out) = (cpu.download(term.d_y), term.d_y.cols());
                        let mut d_z = vec![Sized::default(); m * rank];
                        let mut d_a = vec![Sized::default(); n_rows * d_in * rank];
                        let mut d_b = vec![Sized::default(); n_rows * rank * d_out];
                        for (run, row) in segments.iter() {
                            for (t, j) in run.flat_map(|t| (0..rank).map(move |j| (t, j))) {
                                let z = f64::from(term.z.f32s()[t * rank + j]);
                                // What the kernel goes on with is the rounded one.
                                let rounded = f64::from(got.d_z.f32s()[t * rank + j]);
                                for o in 0..d_out {
                                    let d_y = d_y[t * d_out + o];
                                    let at = (row * rank + j) * d_out + o;
                                    d_z[t * rank + j]
                                        .add(0.5 * d_y * f64::from(term.mixed_b.f32s()[at]));
                                    d_b[at].add(z * d_y);
                                }
                                for i in 0..d_in {
                                    let at = (row * d_in + i) * rank + j;
                                    d_a[at].add(x[t * d_in + i] * rounded);
                                }
                            }
                        }
                        let name = |what| format!("{what} {m} x {d_in} x {rank} x {d_out}");
                        check(&name("d_z"), &cpu, &got.d_z, &d_z, exact);
                        check(&name("d_a"), &cpu, &got.d_a, &d_a, exact);
                        check(&name("d_b"), &cpu, &got.d_b, &d_b, exact);
                        assert_eq!(bits(&cpu, &got.d_z), bits(&cpu, &again.d_z));
                        assert_eq!(bits(&cpu, &got.d_a), bits(&cpu, &again.d_a));
                        assert_eq!(bits(&cpu, &got.d_b), bits(&cpu, &again.d_b));
                    }
                }
            }
        }
    }
}
