//! Gradients of the routed LoRA, in rank space and of the mixed pairs:
//! `d_z = scale * d_y·B̂ᵀ`, `d_a = xᵀ·d_z` and `d_b = zᵀ·d_y` of each routing row.
//!
//! `d_z` is a shrink with another right operand. The other two are one kind of product, with the
//! tokens as K: `narrow[tokens, rank]ᵀ · wide[tokens, features]`, for `d_a` with the result transposed. A task is some of a
//! routing row's features, as many as its sums leave room for in the L1 cache: it goes through the row's tokens
//! in order, whole lines of several rows at a time. (128 features at a time and packed, as the other products have them, it took
//! 1.6 times as long.)

use super::{
    super::{Precision, ops::*},
    Cpu, TASKS_OF_A_THREAD,
    elementwise::load,
    gemm::COLS,
    isa::{Element, LANES, Simd, SimdOp},
    matrix::{Matrix, MatrixMut, Rectangle, cut, with_element},
    shrink::{Layout, Side, into_rank_space},
    threads::run_tasks,
};
use crate::tensor::Tensor;

/// Sums of a task: half of an L1 cache.
const SUMS: usize = 6 * 1024;
/// Tokens whose products are added up before they are added to the sums.
const TOKENS: usize = 4;

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
    let d_bs = d_b(cpu, terms, rank, segments);
    let gradients = d_zs.into_iter().zip(d_as).zip(d_bs);
    gradients.map(|((d_z, d_a), d_b)| LoraGradients { d_z, d_a, d_b }).collect()
}

/// `xᵀ·d_z` of each routing row and sibling, `[rows * d_in, rank]`.
fn d_a(cpu: &Cpu, x: &Tensor<Cpu>, d_zs: &[Tensor<Cpu>], segments: &Segments) -> Vec<Tensor<Cpu>> {
    let (d_in, rank) = (x.cols(), d_zs[0].cols());
    let alloc = |_| cpu.alloc(segments.n_rows() * d_in, rank, Precision::Full);
    let mut d_as: Vec<_> = d_zs.iter().map(alloc).collect();
    if rank * d_in == 0 {
        return d_as;
    }
    let width = task_width(cpu, rank, segments.n_rows() * d_zs.len(), d_in);
    let mut tasks = Vec::new();
    for (d_a, d_z) in d_as.iter_mut().zip(d_zs) {
        for (row, of_row) in d_a.f32s_mut().chunks_mut(d_in * rank).enumerate() {
            let pieces = of_row.chunks_mut(width * rank).enumerate();
            tasks.extend(pieces.map(|(i, out)| (d_z, row, i * width, out)));
        }
    }
    // Siblings one after the other, while what they share of x is in the L2 cache.
    tasks.sort_by_key(|&(_, row, start, _)| (row, start));
    run_tasks(tasks, |(d_z, row, start, out)| {
        let n = out.len() / rank;
        let mut sums = cpu.scratch(rank * n);
        let rows = MatrixMut::new(sums.as_mut_slice::<f32>(), n);
        add_up(cpu, (d_z, x), (segments, row), start, rows);
        let rows = sums.as_slice::<f32>();
        for (i, out) in out.chunks_mut(rank).enumerate() {
            out.iter_mut().zip(rows.chunks(n)).for_each(|(out, row)| *out = row[i]);
        }
    });
    d_as
}

/// `zᵀ·d_y` of each routing row and sibling, `[rows * rank, d_out]`.
fn d_b(
    cpu: &Cpu,
    terms: &[LoraTerm<'_, Cpu>],
    rank: usize,
    segments: &Segments,
) -> Vec<Tensor<Cpu>> {
    let n_rows = segments.n_rows();
    let alloc = |t: &LoraTerm<'_, Cpu>| cpu.alloc(n_rows * rank, t.d_y.cols(), Precision::Full);
    let mut d_bs: Vec<_> = terms.iter().map(alloc).collect();
    let mut tasks = Vec::new();
    for (d_b, term) in d_bs.iter_mut().zip(terms) {
        let d_out = term.d_y.cols();
        let width = task_width(cpu, rank, n_rows * terms.len(), d_out);
        // A rectangle is one routing row's ranks.
        let rectangles = cut(d_b.f32s_mut(), d_out, 0, (rank.max(1), width));
        tasks.extend(rectangles.into_iter().map(|rectangle| (term, rectangle)));
    }
    run_tasks(tasks, |(term, Rectangle { rows, cols, out })| {
        let of = (segments, rows.start / rank);
        add_up(cpu, (term.z, term.d_y), of, cols.start, out);
    });
    d_bs
}

/// Features of a task, of `n` in all, where there are `n_parts` products of them.
fn task_width(cpu: &Cpu, rank: usize, n_parts: usize, n: usize) -> usize {
    let wanted = (TASKS_OF_A_THREAD * cpu.n_threads()).div_ceil(n_parts.max(1));
    let most = (SUMS / rank.max(1)).min(n.div_ceil(wanted));
    (most / COLS * COLS).max(COLS)
}

/// `sums[j, c] = Σ_t narrow[t, j] wide[t, first_col + c]` over a routing row's tokens.
fn add_up(
    cpu: &Cpu,
    (narrow, wide): (&Tensor<Cpu>, &Tensor<Cpu>),
    (segments, row): (&Segments, usize),
    first_col: usize,
    mut sums: MatrixMut<'_, f32>,
) {
    let rank = sums.rows();
    (0..rank).for_each(|j| sums.row_mut(j).fill(0.0));
    for (run, _) in segments.iter().filter(|&(_, of)| of == row) {
        let narrow = &narrow.f32s()[run.start * rank..run.end * rank];
        let wide = Matrix::tensor(wide).part(run, first_col..first_col + sums.cols());
        cpu.isa.run(AddUp { narrow, wide, sums: &mut sums });
    }
}

/// `sums += narrowᵀ·wide`, [`TOKENS`] at a time.
struct AddUp<'a, 's> {
    /// `[tokens, rank]`.
    narrow: &'a [f32],
    /// `[tokens, n]`.
    wide: Matrix<'a>,
    /// `[rank, n]`.
    sums: &'a mut MatrixMut<'s, f32>,
}

impl SimdOp for AddUp<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self { narrow, wide, sums } = self;
        with_element!(wide.dtype, E => {
            let (n_whole, rank) = (wide.rows / TOKENS * TOKENS, sums.rows());
            for first in (0..n_whole).step_by(TOKENS) {
                let row = |i: usize| wide.row::<E>((first + i).min(wide.rows - 1));
                let rows = [row(0), row(1), row(2), row(3)];
                let next = [row(4), row(5), row(6), row(7)];
                add_tokens::<S, E, TOKENS>(s, &narrow[first * rank..], rows, next, sums);
            }
            let (row, narrow) = (|i| wide.row::<E>(n_whole + i), &narrow[n_whole * rank..]);
            match wide.rows - n_whole {
                0 => {}
                1 => add_tokens::<S, E, 1>(s, narrow, [row(0)], [row(0)], sums),
                2 => add_tokens::<S, E, 2>(s, narrow, [row(0), row(1)], [row(0); 2], sums),
                _ => add_tokens::<S, E, 3>(s, narrow, [row(0), row(1), row(2)], [row(0); 3], sums),
            }
        });
    }
}

/// [`AddUp`] of `N` tokens. Fetches the `next` ones.
#[inline(always)]
fn add_tokens<S: Simd, E: Element, const N: usize>(
    s: S,
    narrow: &[f32],
    rows: [&[E::Item]; N],
    next: [&[E::Item]; N],
    sums: &mut MatrixMut<'_, f32>,
) {
    let (rank, n_whole) = (sums.rows(), rows[0].len() / LANES);
    let mut narrows: [&[f32]; N] = [&[]; N];
    for (of_token, narrow) in narrows.iter_mut().zip(narrow.chunks_exact(rank)) {
        *of_token = narrow;
    }
    let mut i = 0;
    // As many as there are registers for.
    while S::NV > 1 && i + 4 <= n_whole {
        for next in next {
            s.prefetch(&next[i * LANES..(i + 4) * LANES]);
        }
        add_columns::<S, E, N, 4>(s, narrows, rows, i, sums);
        i += 4;
    }
    while i < n_whole {
        for next in next {
            s.prefetch(&next[i * LANES..(i + 1) * LANES]);
        }
        add_columns::<S, E, N, 1>(s, narrows, rows, i, sums);
        i += 1;
    }
    let rest = n_whole * LANES;
    if rest < rows[0].len() {
        let mut wide = [s.splat(0.0); N];
        for (wide, row) in wide.iter_mut().zip(rows) {
            *wide = load::<S, E>(s, row, n_whole);
        }
        for j in 0..rank {
            let sums = &mut sums.row_mut(j)[rest..];
            let mut sum = s.splat(0.0);
            for (narrow, &wide) in narrows.iter().zip(&wide) {
                sum = s.fma(s.splat(narrow[j]), wide, sum);
            }
            s.store_part(s.add(s.load_part(sums, 0.0), sum), sums);
        }
    }
}

/// [`AddUp`] of `N` tokens and `NV` vectors of columns.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // Of several tokens and sums, by the same number.
fn add_columns<S: Simd, E: Element, const N: usize, const NV: usize>(
    s: S,
    narrows: [&[f32]; N],
    rows: [&[E::Item]; N],
    vector: usize,
    sums: &mut MatrixMut<'_, f32>,
) {
    let mut wide = [[s.splat(0.0); NV]; N];
    for t in 0..N {
        let row: &[_; NV] = rows[t].as_chunks::<LANES>().0[vector..].first_chunk().expect("whole");
        for v in 0..NV {
            wide[t][v] = E::load(s, &row[v]);
        }
    }
    for j in 0..sums.rows() {
        let mut products = [s.splat(0.0); NV];
        for t in 0..N {
            let narrow = s.splat(narrows[t][j]);
            for v in 0..NV {
                products[v] = s.fma(narrow, wide[t][v], products[v]);
            }
        }
        let sums = &mut sums.row_mut(j).as_chunks_mut::<LANES>().0[vector..];
        let sums: &mut [_; NV] = sums.first_chunk_mut().expect("as many columns");
        for v in 0..NV {
            s.store(s.add(s.load(&sums[v]), products[v]), &mut sums[v]);
        }
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
