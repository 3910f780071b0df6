//! Into rank space: `z = scale * x·Â`, for siblings that share `x`, and the same straight from the
//! bank: `z = scale * Σ_q x_q · Σ_s w[q, s] A[q, s]`.
//!
//! An element is a dot product in 16 lanes ([`Dots`]), read from where the two vectors lie: packing them
//! takes longer than so few columns do. A task is a piece of a segment: it
//! has one routing row's `Â`, and its rows of every `z` are contiguous.

use std::{iter, mem, ops::Range};

use super::{
    super::{Precision, ops::*},
    Cpu,
    buffer::Buffer,
    dot::{Dots, PackRows, PackedRows},
    isa::{Element, LANES, Simd, SimdOp},
    linear::mixing_weights,
    matrix::{Matrix, with_element},
    threads::run_tasks,
};
use crate::tensor::Tensor;

/// Tokens of a task: enough for `Â` to be read from the cache.
const TOKENS: usize = 96;

pub(super) fn shrink(cpu: &Cpu, args: Shrink<'_, Cpu>) -> Vec<Tensor<Cpu>> {
    let Shrink { x, mixed_a, segments, scale, order } = args;
    let Some(rank) = mixed_a.first().map(|a| a.cols()) else { return Vec::new() };
    for a in mixed_a {
        assert_eq!((a.rows(), a.cols()), (segments.n_rows() * x.cols(), rank));
    }
    match order {
        Order::Panel => {
            let sides: Vec<_> = mixed_a.iter().map(|rhs| Side { lhs: x, rhs }).collect();
            into_rank_space(cpu, &sides, Layout::ByFeature, rank, segments, scale)
        }
        Order::Dot => shrink_dot(cpu, x, mixed_a, segments, scale),
    }
}

/// The right operand of each routing row that tokens use as [`PackedRows`], `[rank, k]`.
fn packed(cpu: &Cpu, rhs: &[f32], layout: Layout, k: usize, rank: usize, used: &[bool]) -> Buffer {
    let (block, packed_block) = ((k * rank).max(1), PackedRows::len(rank, k).max(1));
    let mut out = cpu.scratch(rhs.len() / block * packed_block);
    let blocks = out.as_mut_slice::<f32>().chunks_mut(packed_block).zip(rhs.chunks(block));
    let blocks = blocks.zip(used).filter_map(|(block, &used)| used.then_some(block));
    run_tasks(blocks, |(out, rhs)| match layout {
        Layout::ByRank => cpu.isa.run(PackRows { matrix: Matrix::f32s(rhs, rank, k), out }),
        // Sixteen k at a time, so that what is read is in the L1 cache while each rank picks its own.
        Layout::ByFeature => {
            for (step, rhs) in rhs.chunks(LANES * rank).enumerate() {
                for j in 0..rank {
                    let out = &mut out[PackedRows::place(rank, k, j, step)];
                    out.fill(0.0);
                    out.iter_mut().zip(rhs[j..].iter().step_by(rank)).for_each(|(o, a)| *o = *a);
                }
            }
        }
    });
    out
}

/// How a routing row's right operand lies in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[k, rank]`, as `Â`.
    ByFeature,
    /// `[rank, k]`, as `B̂`.
    ByRank,
}

/// One sibling of [`into_rank_space`].
pub(super) struct Side<'a> {
    /// `[tokens, k]`.
    pub(super) lhs: &'a Tensor<Cpu>,
    /// f32, a block for each routing row.
    pub(super) rhs: &'a Tensor<Cpu>,
}

/// `scale * lhs·rhs[row]` of each side.
pub(super) fn into_rank_space(
    cpu: &Cpu,
    sides: &[Side<'_>],
    layout: Layout,
    rank: usize,
    segments: &Segments,
    scale: f32,
) -> Vec<Tensor<Cpu>> {
    let n_tokens = segments.n_tokens();
    let mut zs: Vec<_> = sides.iter().map(|_| cpu.alloc(n_tokens, rank, Precision::Full)).collect();
    if rank == 0 {
        return zs;
    }
    for Side { lhs, rhs } in sides {
        assert_eq!(lhs.rows(), n_tokens, "a routing row for every token");
        assert_eq!(rhs.len(), segments.n_rows() * rank * lhs.cols());
    }
    let mut tasks: Vec<_> = pieces(segments).map(|(run, row)| (run, row, Vec::new())).collect();
    for z in &mut zs {
        let mut rest = z.f32s_mut();
        for (run, _, outs) in &mut tasks {
            let (now, later) = mem::take(&mut rest).split_at_mut(run.len() * rank);
            outs.push(now);
            rest = later;
        }
    }
    let used = segments.used_rows();
    let pack = |side: &Side<'_>| packed(cpu, side.rhs.f32s(), layout, side.lhs.cols(), rank, &used);
    let operands: Vec<_> = sides.iter().map(pack).collect();
    run_tasks(tasks, |(run, row, outs)| {
        for ((side, rhs), out) in sides.iter().zip(&operands).zip(outs) {
            let len = PackedRows::len(rank, side.lhs.cols());
            let rhs = &rhs.as_slice()[row * len..(row + 1) * len];
            dots(cpu, side.lhs, run.clone(), rhs, scale, out);
        }
    });
    zs
}

/// `out = scale * lhs·rhsᵀ`, of some tokens; `rhs` is [`PackedRows`].
fn dots(cpu: &Cpu, lhs: &Tensor<Cpu>, run: Range<usize>, rhs: &[f32], scale: f32, out: &mut [f32]) {
    let (n, rank) = (run.len(), out.len() / run.len());
    let mut by_rank = cpu.scratch(rank * n);
    let y = by_rank.as_mut_slice::<f32>();
    let weight = Matrix::tensor(lhs).part_rows(run);
    cpu.isa.run(Dots { x: rhs, weight, y: &mut *y, stride: n });
    for (t, out) in out.chunks_mut(rank).enumerate() {
        let values = y[t..].iter().step_by(n);
        out.iter_mut().zip(values).for_each(|(out, value)| *out = scale * value);
    }
}

/// The segments, each cut into equal pieces of at most [`TOKENS`].
fn pieces(segments: &Segments) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
    segments.iter().flat_map(|(run, row)| {
        let (end, n) = (run.end, run.len().div_ceil(TOKENS).max(1));
        let size = run.len().div_ceil(n).next_multiple_of(32);
        run.step_by(size.max(1)).map(move |start| (start..end.min(start + size), row))
    })
}

fn shrink_dot(
    cpu: &Cpu,
    x: &Tensor<Cpu>,
    mixed_a: &[&Tensor<Cpu>],
    segments: &Segments,
    scale: f32,
) -> Vec<Tensor<Cpu>> {
    let (d_in, siblings) = (x.cols(), mixed_a.iter().copied());
    by_token(cpu, x, siblings.map(|a| (a, a.cols())), segments, |a, x, row, z| {
        let a = &a.f32s()[row * d_in * z.len()..(row + 1) * d_in * z.len()];
        cpu.isa.run(Lanes { x, a, out: &mut *z });
        z.iter_mut().for_each(|z| *z *= scale);
    })
}

pub(super) fn shrink_stacked(cpu: &Cpu, args: ShrinkStacked<'_, Cpu>) -> Tensor<Cpu> {
    let ShrinkStacked { x, stacked, segments, scale } = args;
    let Bank { n_splits, n_skills, d_in, rank, .. } = stacked.bank;
    assert_eq!(d_in, x.cols());
    let width = d_in / n_splits;
    let a = &stacked.params.f32s()[stacked.bank.a()];
    let mut zs = by_token(cpu, x, iter::once(((), rank)), segments, |(), x, row, z| {
        let mut u = vec![0.0; rank];
        z.fill(0.0);
        for q in 0..n_splits {
            let x = x.part(0..1, q * width..(q + 1) * width);
            for (s, &w) in mixing_weights(&stacked, segments.n_rows(), row, q).iter().enumerate() {
                let start = (q * n_skills + s) * width * rank;
                cpu.isa.run(Lanes { x, a: &a[start..start + width * rank], out: &mut u });
                z.iter_mut().zip(&u).for_each(|(z, u)| *z += w * u);
            }
        }
        z.iter_mut().for_each(|z| *z *= scale);
    });
    zs.pop().expect("of one sibling")
}

/// For each sibling, with its rank, a `[tokens, rank]` tensor, each row written from the token's `x` and its routing row.
fn by_token<T: Copy + Send>(
    cpu: &Cpu,
    x: &Tensor<Cpu>,
    siblings: impl Iterator<Item = (T, usize)> + Clone,
    segments: &Segments,
    write: impl Fn(T, Matrix<'_>, usize, &mut [f32]) + Sync,
) -> Vec<Tensor<Cpu>> {
    assert_eq!(x.rows(), segments.n_tokens(), "a routing row for every token");
    let alloc = |(_, rank)| cpu.alloc(x.rows(), rank, Precision::Full);
    let mut zs: Vec<_> = siblings.clone().map(alloc).collect();
    let x = Matrix::tensor(x);
    let rows: Vec<_> = segments.iter().flat_map(|(run, row)| run.map(move |_| row)).collect();
    let mut tasks = Vec::with_capacity(zs.len() * rows.len());
    for ((sibling, rank), z) in siblings.zip(&mut zs) {
        let zs = z.f32s_mut().chunks_mut(rank.max(1)).zip(&rows).enumerate();
        tasks.extend(zs.map(|(token, (z, &row))| (sibling, token, row, z)));
    }
    run_tasks(tasks, |(sibling, token, row, z): (T, usize, usize, &mut [f32])| {
        write(sibling, x.part_rows(token..token + 1), row, z);
    });
    zs
}

/// `out[j] = Σ_k x[k] a[k, j]` in 16 lanes: lane `i` sums `k = i mod 16` in order, then the lanes
/// are added as a tree.
struct Lanes<'a> {
    /// `[1, k]`.
    x: Matrix<'a>,
    /// `[k, rank]`.
    a: &'a [f32],
    /// `[rank]`.
    out: &'a mut [f32],
}

impl SimdOp for Lanes<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_element!(self.x.dtype, E => {
            // A vector holds the same lane of 16 ranks, or, where the rank divides 16, several lanes
            // of all ranks: either way 16 consecutive elements of `a`.
            let Self { x, a, out } = self;
            let rank = out.len();
            let mut sums = vec![0.0; LANES * rank];
            let mut wide = vec![0.0; LANES * rank];
            let (mut x, mut a) = (x.row::<E>(0), a);
            assert_eq!(a.len(), x.len() * rank);
            let n_whole = x.len() / LANES * LANES;
            let whole = (&x[..n_whole], &a[..n_whole * rank]);
            let is_done = match rank {
                8 => add_chunks::<S, E, 8>(simd, whole, &mut sums),
                16 => add_chunks::<S, E, 16>(simd, whole, &mut sums),
                _ => false,
            };
            if is_done {
                (x, a) = (&x[n_whole..], &a[n_whole * rank..]);
            }
            for (x, a) in x.chunks(LANES).zip(a.chunks((LANES * rank).max(1))) {
                for (wide, &x) in wide.chunks_mut(rank).zip(x) {
                    wide.fill(E::get(x));
                }
                let (whole, rest) = a.as_chunks();
                let (sums, sums_rest) = sums.as_chunks_mut();
                let (wide, wide_rest) = wide.as_chunks();
                for ((sum, x), a) in sums.iter_mut().zip(wide).zip(whole) {
                    let sum_now = simd.fma(simd.load(x), simd.load(a), simd.load(sum));
                    simd.store(sum_now, sum);
                }
                if let Some((sum, x)) = sums.get_mut(whole.len()).zip(wide.get(whole.len())) {
                    let n = rest.len();
                    let a = simd.load_part(rest, 0.0);
                    let v = simd.fma(simd.load_part(&x[..n], 0.0), a, simd.load_part(&sum[..n], 0.0));
                    simd.store_part(v, &mut sum[..n]);
                }
                debug_assert!(sums_rest.is_empty() && wide_rest.is_empty());
            }
            for step in [8, 4, 2, 1] {
                let (lower, upper) = sums.split_at_mut(step * rank);
                lower.iter_mut().zip(upper).for_each(|(l, u)| *l += *u);
            }
            out.copy_from_slice(&sums[..rank]);
        });
    }
}

/// What [`Lanes`] does with whole chunks of 16 features, sums in registers, for ranks 8 and 16. True.
#[inline(always)]
fn add_chunks<S: Simd, E: Element, const RANK: usize>(
    simd: S,
    (x, a): (&[E::Item], &[f32]),
    sums: &mut [f32],
) -> bool {
    let (sums, _) = sums.as_chunks_mut::<LANES>();
    let sums: &mut [[f32; LANES]; RANK] = sums.try_into().expect("a vector a rank");
    // Of a vector, the lanes of the first feature, where it has two.
    let lanes = simd.load(&std::array::from_fn(|i| i as f32));
    let half = simd.splat(RANK as f32);
    let mut now = [simd.splat(0.0); RANK];
    let (x, _) = x.as_chunks::<LANES>();
    let (a, _) = a.as_chunks::<LANES>();
    for (x, a) in x.iter().zip(a.chunks_exact(RANK)) {
        let mut wide = [0.0; LANES];
        simd.store(E::load(simd, x), &mut wide);
        for (i, now) in now.iter_mut().enumerate() {
            let x = match RANK {
                8 => {
                    let (first, second) = (simd.splat(wide[2 * i]), simd.splat(wide[2 * i + 1]));
                    simd.select_lt(lanes, half, first, second)
                }
                _ => simd.splat(wide[i]),
            };
            *now = simd.fma(x, simd.load(&a[i]), *now);
        }
    }
    for (sum, now) in sums.iter_mut().zip(now) {
        simd.store(now, sum);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::{super::checks::*, *};
    use crate::kernels::Backend;

    const K: [usize; 10] = [0, 1, 5, 16, 17, 33, 97, 255, 256, 513];

    fn alone(segments: &Segments, token: usize) -> Segments {
        let (_, row) = segments.within(token..token + 1).next().expect("every token has a row");
        Segments::new(&[1], &[row], segments.n_rows())
    }

    #[test]
    fn shrink_is_its_definition() {
        for cpu in backends() {
            for exact in [true, false] {
                let mut data = Data::new(7, exact);
                for k in K.into_iter().chain([30; 10]) {
                    let m = data.pick(&AWKWARD);
                    let (rank, n_siblings) = (data.pick(&[1, 3, 8, 16, 40]), 1 + data.below(3));
                    let segments = data.segments(m);
                    let x = data.tensor(&cpu, m, k, Precision::Activation);
                    let mut a = || data.tensor(&cpu, segments.n_rows() * k, rank, Precision::Full);
                    let all_a: Vec<_> = (0..n_siblings).map(|_| a()).collect();
                    let all_a: Vec<_> = all_a.iter().collect();
                    let values = cpu.download(&x);
                    for order in [Order::Panel, Order::Dot] {
                        let run = |cpu: &Cpu, x: &Tensor<Cpu>, segments: &Segments| {
                            cpu.shrink(Shrink { x, mixed_a: &all_a, segments, scale: 0.5, order })
                        };
                        let zs = run(&cpu, &x, &segments);
                        let again = run(&with_threads(&cpu, 3), &x, &segments);
                        for ((z, a), again) in zs.iter().zip(&all_a).zip(&again) {
                            let mut want = vec![Sized::default(); m * rank];
                            for (run, row) in segments.iter() {
                                for (t, i, j) in run.flat_map(|t| {
                                    (0..k).flat_map(move |i| (0..rank).map(move |j| (t, i, j)))
                                }) {
                                    let a = f64::from(a.f32s()[(row * k + i) * rank + j]);
                                    want[t * rank + j].add(0.5 * values[t * k + i] * a);
                                }
                            }
                            let name = format!("shrink {order:?} {m} x {k} x {rank}");
                            check(&name, &cpu, z, &want, exact);
                            assert_eq!(bits(&cpu, z), bits(&cpu, again));
                        }
                        for t in (0..m).step_by(11) {
                            let x = some_rows(&cpu, &x, t..t + 1);
                            for (z, alone) in zs.iter().zip(run(&cpu, &x, &alone(&segments, t))) {
                                let row = some_rows(&cpu, z, t..t + 1);
                                assert_eq!(bits(&cpu, &row), bits(&cpu, &alone));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn shrink_stacked_is_its_definition() {
        for cpu in backends() {
            for exact in [true, false] {
                let mut data = Data::new(8, exact);
                for width in K {
                    let (m, rank) = (data.pick(&AWKWARD[..14]), data.pick(&[1, 3, 8, 16]));
                    let (n_splits, n_skills) = (1 + data.below(3), 1 + data.below(4));
                    let d_in = n_splits * width;
                    let segments = data.segments(m);
                    let n_rows = segments.n_rows();
                    let x = data.tensor(&cpu, m, d_in, Precision::Activation);
                    let (linear, a_start, b_start, d_out) = (2, 3, 0, 0);
                    let bank =
                        Bank { linear, a_start, b_start, n_splits, n_skills, d_in, d_out, rank };
                    let params = data.tensor(&cpu, 1, a_start + bank.a_len() + 2, Precision::Full);
                    let weights =
                        data.tensor(&cpu, 4 * n_rows, n_splits * n_skills, Precision::Full);
                    let stacked = Stacked { bank, params: &params, weights: &weights };
                    let run = |cpu: &Cpu, x: &Tensor<Cpu>, segments: &Segments| {
                        cpu.shrink_stacked(ShrinkStacked { x, stacked, segments, scale: 0.25 })
                    };
                    let z = run(&cpu, &x, &segments);
                    let values = cpu.download(&x);
                    let mut want = vec![Sized::default(); m * rank];
                    for (run, row) in segments.iter() {
                        for t in run {
                            for c in 0..n_splits * n_skills {
                                let (q, s) = (c / n_skills, c % n_skills);
                                let w = (linear * n_rows + row) * n_splits * n_skills + c;
                                let w = f64::from(weights.f32s()[w]) * 0.25;
                                for i in 0..width {
                                    let x = values[t * d_in + q * width + i];
                                    for j in 0..rank {
                                        let a = ((q * n_skills + s) * width + i) * rank + j;
                                        let a = f64::from(params.f32s()[a_start + a]);
                                        want[t * rank + j].add(w * x * a);
                                    }
                                }
                            }
                        }
                    }
                    check(&format!("shrink_stacked {m} x {d_in}"), &cpu, &z, &want, exact);
                    assert_eq!(
                        bits(&cpu, &z),
                        bits(&cpu, &run(&with_threads(&cpu, 3), &x, &segments))
                    );
                    for t in (0..m).step_by(5) {
                        let alone = run(&cpu, &some_rows(&cpu, &x, t..t + 1), &alone(&segments, t));
                        assert_eq!(bits(&cpu, &alone), bits(&cpu, &some_rows(&cpu, &z, t..t + 1)));
                    }
                }
            }
        }
    }
}
