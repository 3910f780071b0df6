//! Frozen linears with routed LoRA: `y = residual + dropout(x·Wᵀ + bias + z·B̂)`, and their backward
//! `d_x = d_residual + Σ_i (d_y_i·W_i + d_z_i·Â_iᵀ)`.
//!
//! All siblings share one packed copy of `x` (on AMX, where it can be, `x` itself). The rank term is some more K after the last block, so
//! it costs neither a pass over `y` nor a rounding. A task is 128 columns of one output; it finishes
//! its sums (bias, dropout, residual) while they are in its cache and rounds once.

use half::bf16;

use super::{
    super::{Backend, Precision, ops::*},
    Cpu, SliceMut,
    buffer::Buffer,
    dot::FewRows,
    gemm::{Accumulator, COLS, Cut, Finish, Packed, Product, Residual, Rhs, task_cols, tile_shape},
    gemm_amx::{self, Lhs, Part, RankRhs},
    isa::{Amx, ElementMut, Isa, LANES, Simd, SimdOp},
    matrix::{Matrix, Rectangle, cut},
    threads::run_tasks,
};
use crate::{dtype::Dtype, tensor::Tensor};

pub(super) fn linear(cpu: &Cpu, args: Linear<'_, Cpu>) -> Vec<Tensor<Cpu>> {
    let alloc = |p: &Projection<'_, Cpu>| cpu.alloc(args.x.rows(), p.weight.rows(), args.output);
    let mut outputs: Vec<_> = args.projections.iter().map(alloc).collect();
    linear_into(cpu, args, false, &mut outputs);
    outputs
}

pub(super) fn linear_into(
    cpu: &Cpu,
    args: Linear<'_, Cpu>,
    add: bool,
    outputs: &mut [Tensor<Cpu>],
) {
    let Linear { x, projections, order, output } = args;
    assert_eq!(projections.len(), outputs.len(), "an output for each projection");
    for (projection, out) in projections.iter().zip(&*outputs) {
        assert_eq!(projection.weight.cols(), x.cols(), "a weight's columns are x's");
        assert_eq!((out.rows(), out.cols()), (x.rows(), projection.weight.rows()));
        assert_eq!(out.dtype(), cpu.dtype(output));
        assert!(!add || projection.residual.is_none(), "what is added to is in the output");
    }
    match cpu.dtype(output) {
        Dtype::F32 => {
            let outs = outputs.iter_mut().map(Tensor::f32s_mut).collect();
            write::<f32>(cpu, x, projections, order, add, outs);
        }
        _ => {
            let outs = outputs.iter_mut().map(bf16s_mut).collect();
            write::<bf16>(cpu, x, projections, order, add, outs);
        }
    }
}

fn bf16s_mut(tensor: &mut Tensor<Cpu>) -> &mut [bf16] {
    match tensor.slice_mut() {
        SliceMut::Bf16(slice) => slice,
        SliceMut::F32(_) => unreachable!("allocated as bf16"),
    }
}

/// A projection and one task's piece of its output.
type Task<'a, T> = (usize, Rectangle<'a, T>);

fn write<T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    x: &Tensor<Cpu>,
    projections: &[Projection<'_, Cpu>],
    order: Order,
    add: bool,
    mut outs: Vec<&mut [T]>,
) {
    let there = if add { Residual::Output } else { Residual::None };
    let biases: Vec<_> = projections.iter().map(|p| p.bias.map(|b| b.to_f32())).collect();
    let finish = |i: usize| Finish {
        bias: biases[i].as_deref(),
        dropout: projections[i].dropout,
        residual: projections[i].residual.map_or(there, |r| {
            assert_eq!((r.rows(), r.cols()), (x.rows(), projections[i].weight.rows()));
            Residual::Of(Matrix::tensor(r))
        }),
    };
    let x = Matrix::tensor(x);
    if order == Order::Dot {
        let n = projections.iter().map(|p| p.weight.rows()).sum();
        let width = few_cols(n, cpu.n_threads());
        let tasks = tasks(projections, &mut outs, 0..x.rows, (x.rows.max(1), width));
        let x = FewRows::new(cpu, x, projections.iter().map(|p| p.weight));
        run_tasks(tasks, |(i, rectangle)| {
            let y = dot_task(cpu, &x, &projections[i], &rectangle);
            let y = y.as_slice::<f32>().as_chunks().0;
            finish(i).write(cpu.isa, rectangle, |row, values| *values = y[row]);
        });
        return;
    }
    if let Some(amx) = gemm_amx::takes(cpu, projections.iter().map(|p| p.weight)) {
        return write_tiles(cpu, amx, x, projections, outs, finish);
    }
    let n = projections.iter().map(|p| p.weight.rows()).sum();
    let by = Cut::new(x.rows, tile_shape(cpu.isa).0, x.cols, n, cpu.n_threads());
    for start in (0..x.rows).step_by(by.packed) {
        let rows = start..x.rows.min(start + by.packed);
        let lhs = Packed::rows(cpu, x.part_rows(rows.clone()), start);
        let ranks: Vec<_> = projections
            .iter()
            .map(|p| p.lora.as_ref().map(|lora| Rank::pack(cpu, lora, rows.clone())))
            .collect();
        let size = (by.task, task_cols(cpu.isa));
        let tasks = tasks(projections, &mut outs, rows.clone(), size);
        run_tasks(tasks, |(i, rectangle)| {
            let mut sums = Accumulator::new(cpu, rectangle.rows.clone(), rectangle.cols.clone());
            let weight = Matrix::frozen(projections[i].weight);
            sums.add(&Product {
                lhs: &lhs,
                rows: rectangle.rows.clone(),
                rhs: Rhs { matrix: weight, transposed: true, first_col: 0 },
            });
            if let Some(rank) = &ranks[i] {
                rank.add(&mut sums, &rectangle);
            }
            finish(i).write(cpu.isa, rectangle, |row, values| sums.read_row(row, values));
        });
    }
}

/// [`write`] in panel order on AMX. Mixed rank terms go through the tiles; stacked ones are summed
/// beside them, as they are rare with many rows.
fn write_tiles<'a, T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    amx: Amx,
    x: Matrix<'_>,
    projections: &[Projection<'_, Cpu>],
    mut outs: Vec<&mut [T]>,
    finish: impl Fn(usize) -> Finish<'a> + Sync,
) {
    let mixed: Vec<_> = (projections.iter())
        .map(|p| match p.lora.as_ref()? {
            Expand { z, segments, rhs: ExpandRhs::Mixed(b) } => {
                let rhs = RankRhs::new(cpu, amx, b, z.cols(), false, segments);
                Some((rhs, Matrix::tensor(z)))
            }
            Expand { rhs: ExpandRhs::Stacked(_), .. } => None,
        })
        .collect();
    let past: Vec<_> = outs.iter().map(|out| gemm_amx::past_caches(out)).collect();
    let n = projections.iter().map(|p| p.weight.rows()).sum();
    let by = Cut::on_tiles(x.rows, x.cols, n, cpu.n_threads());
    for start in (0..x.rows).step_by(by.packed) {
        let rows = start..x.rows.min(start + by.packed);
        let lhs = [Lhs::rows(cpu, amx, x.part_rows(rows.clone()), start)];
        let mixed: Vec<_> = (mixed.iter().map(Option::as_ref))
            .map(|m| m.map(|(b, z)| (b, b.left(cpu, amx, z.part_rows(rows.clone()), start))))
            .collect();
        let stacked: Vec<_> = (projections.iter())
            .map(|p| p.lora.as_ref().filter(|l| matches!(l.rhs, ExpandRhs::Stacked(_))))
            .map(|lora| lora.map(|lora| Rank::pack(cpu, lora, rows.clone())))
            .collect();
        let tasks = tasks(projections, &mut outs, rows.clone(), (by.task, COLS));
        run_tasks(gemm_amx::in_pairs(cpu, tasks), |(i, rectangles)| {
            let matrix = Matrix::frozen(projections[i].weight);
            let ranks: Vec<_> = mixed[i].iter().map(|(b, z)| (*b, z)).collect();
            let mut more = Vec::new();
            if let Some(rank) = &stacked[i] {
                for r in &rectangles {
                    more.push(Accumulator::new(cpu, r.rows.clone(), r.cols.clone()));
                }
                let all = more.iter_mut().zip(&rectangles);
                all.for_each(|(sums, rectangle)| rank.add(sums, rectangle));
            }
            let task = gemm_amx::Task {
                parts: &[Part { lhs: &lhs, matrix, transposed: true }],
                ranks: &ranks,
                more,
                rectangles,
                finish: finish(i),
                past: past[i],
            };
            task.run(cpu, amx);
        });
    }
}

fn tasks<'a, T>(
    projections: &[Projection<'_, Cpu>],
    outs: &'a mut [&mut [T]],
    rows: std::ops::Range<usize>,
    size: (usize, usize),
) -> Vec<Task<'a, T>> {
    let mut tasks = Vec::new();
    for (i, (projection, out)) in projections.iter().zip(outs).enumerate() {
        let cols = projection.weight.rows();
        let out = &mut out[rows.start * cols..rows.end * cols];
        tasks.extend(cut(out, cols, rows.start, size).into_iter().map(|r| (i, r)));
    }
    tasks
}

/// The rank term `z·B̂` of one projection, its left operands packed.
enum Rank<'a> {
    /// Each segment has its own right operand.
    Mixed { z: Packed, segments: &'a Segments, b: Matrix<'a>, rank: usize },
    /// Each output split `q` has its own left operand `w[row, q, s] z`.
    Stacked { splits: Vec<Packed>, stacked: Stacked<'a, Cpu> },
}

impl<'a> Rank<'a> {
    /// For output rows `rows`.
    fn pack(cpu: &Cpu, lora: &'a Expand<'_, Cpu>, rows: std::ops::Range<usize>) -> Self {
        let rank = lora.z.cols();
        match &lora.rhs {
            ExpandRhs::Mixed(b) => Self::Mixed {
                z: Packed::rows(cpu, Matrix::tensor(lora.z).part_rows(rows.clone()), rows.start),
                segments: lora.segments,
                b: Matrix::tensor(b),
                rank,
            },
            &ExpandRhs::Stacked(stacked) => {
                let Bank { n_splits, n_skills, .. } = stacked.bank;
                let k = n_skills * rank;
                let mut weighted = cpu.scratch(rows.len() * k);
                let splits = (0..n_splits).map(|q| {
                    let values = weighted.as_mut_slice::<f32>();
                    for (run, row) in lora.segments.within(rows.clone()) {
                        for token in run {
                            let out = &mut values[(token - rows.start) * k..][..k];
                            weigh(&stacked, lora, row, q, token, out);
                        }
                    }
                    Packed::rows(cpu, Matrix::f32s(values, rows.len(), k), rows.start)
                });
                Self::Stacked { splits: splits.collect(), stacked }
            }
        }
    }

    /// Adds the term to a task's sums.
    fn add<T>(&self, sums: &mut Accumulator, task: &Rectangle<'_, T>) {
        match self {
            Self::Mixed { z, segments, b, rank } => {
                for (run, row) in segments.within(task.rows.clone()) {
                    let matrix = b.part_rows(row * rank..(row + 1) * rank);
                    sums.add(&Product {
                        lhs: z,
                        rows: run,
                        rhs: Rhs { matrix, transposed: false, first_col: 0 },
                    });
                }
            }
            Self::Stacked { splits, stacked } => {
                for (q, lhs) in splits.iter().enumerate() {
                    let matrix = bank_b(stacked, q);
                    let first_col = q * matrix.cols;
                    sums.add(&Product {
                        lhs,
                        rows: task.rows.clone(),
                        rhs: Rhs { matrix, transposed: false, first_col },
                    });
                }
            }
        }
    }
}

/// `out[s, j] = w[row, q, s] z[token, j]`.
fn weigh(
    stacked: &Stacked<'_, Cpu>,
    lora: &Expand<'_, Cpu>,
    row: usize,
    q: usize,
    token: usize,
    out: &mut [f32],
) {
    let rank = lora.z.cols();
    let z = &lora.z.f32s()[token * rank..(token + 1) * rank];
    let weights = mixing_weights(stacked, lora.segments.n_rows(), row, q);
    for (out, &w) in out.chunks_mut(rank.max(1)).zip(weights) {
        out.iter_mut().zip(z).for_each(|(o, z)| *o = w * z);
    }
}

/// `w[row, q, ..]` of a bank's linear, `[n_skills]`.
pub(super) fn mixing_weights<'a>(
    stacked: &Stacked<'a, Cpu>,
    n_rows: usize,
    row: usize,
    q: usize,
) -> &'a [f32] {
    let Bank { linear, n_splits, n_skills, .. } = stacked.bank;
    let start = ((linear * n_rows + row) * n_splits + q) * n_skills;
    &stacked.weights.f32s()[start..start + n_skills]
}

/// `B[q]` of a bank, `[n_skills * rank, d_out / n_splits]`.
fn bank_b<'a>(stacked: &Stacked<'a, Cpu>, q: usize) -> Matrix<'a> {
    let Bank { n_splits, n_skills, d_out, rank, .. } = stacked.bank;
    let (rows, cols) = (n_skills * rank, d_out / n_splits);
    let b = &stacked.params.f32s()[stacked.bank.b()];
    Matrix::f32s(&b[q * rows * cols..(q + 1) * rows * cols], rows, cols)
}

/// Columns of a task of [`Order::Dot`] with `n` columns in all: two tasks a thread, if they are not too small for what it
/// costs to hand them out.
fn few_cols(n: usize, n_threads: usize) -> usize {
    [COLS, COLS / 2].into_iter().find(|cols| n.div_ceil(*cols) >= 2 * n_threads).unwrap_or(COLS / 4)
}

/// A task of [`Order::Dot`]: `x·Wᵀ + z·B̂` of its columns, `[rows, COLS]`.
fn dot_task<T>(
    cpu: &Cpu,
    x: &FewRows,
    projection: &Projection<'_, Cpu>,
    task: &Rectangle<'_, T>,
) -> Buffer {
    let Rectangle { rows, cols, .. } = task;
    let mut buffer = cpu.scratch(rows.len() * COLS);
    let y = buffer.as_mut_slice::<f32>();
    let weight = Matrix::frozen(projection.weight).part_rows(cols.clone());
    x.dots(cpu, weight, y, COLS);
    let Some(lora) = &projection.lora else { return buffer };
    let rank = lora.z.cols();
    let values = y.as_chunks_mut::<COLS>().0;
    match &lora.rhs {
        ExpandRhs::Mixed(b) => {
            let b = Matrix::tensor(b);
            for (run, row) in lora.segments.within(rows.clone()) {
                let b = b.part(row * rank..(row + 1) * rank, cols.clone());
                for token in run {
                    let z = &lora.z.f32s()[token * rank..(token + 1) * rank];
                    add_rank(cpu.isa, z, b, &mut values[token][..cols.len()]);
                }
            }
        }
        ExpandRhs::Stacked(stacked) => {
            let mut weighted = vec![0.0; stacked.bank.n_skills * rank];
            for q in 0..stacked.bank.n_splits {
                let b = bank_b(stacked, q);
                let (start, end) = (q * b.cols, (q + 1) * b.cols);
                let some = start.max(cols.start)..end.min(cols.end);
                if some.is_empty() {
                    continue;
                }
                let b = b.part(0..b.rows, some.start - start..some.end - start);
                for (run, row) in lora.segments.within(rows.clone()) {
                    for token in run {
                        weigh(stacked, lora, row, q, token, &mut weighted);
                        let y = &mut values[token][some.start - cols.start..some.end - cols.start];
                        add_rank(cpu.isa, &weighted, b, y);
                    }
                }
            }
        }
    }
    buffer
}

/// `y[n] += Σ_j z[j] b[j, n]`, summed in the order of `j` before it is added.
fn add_rank(isa: Isa, z: &[f32], b: Matrix<'_>, y: &mut [f32]) {
    struct AddRank<'a> {
        z: &'a [f32],
        b: Matrix<'a>,
        y: &'a mut [f32],
    }
    impl SimdOp for AddRank<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            let Self { z, b, y } = self;
            for (i, y) in y.chunks_mut(LANES).enumerate() {
                let mut sum = simd.splat(0.0);
                for (j, &z) in z.iter().enumerate() {
                    let b = &b.row::<f32>(j)[i * LANES..][..y.len()];
                    let b = match b.as_chunks().0 {
                        [whole] => simd.load(whole),
                        _ => simd.load_part(b, 0.0),
                    };
                    sum = simd.fma(simd.splat(z), b, sum);
                }
                match y.as_chunks_mut().0 {
                    [whole] => simd.store(simd.add(simd.load(whole), sum), whole),
                    _ => simd.store_part(simd.add(simd.load_part(y, 0.0), sum), y),
                }
            }
        }
    }
    isa.run(AddRank { z, b, y });
}

pub(super) fn linear_backward(cpu: &Cpu, args: LinearBackward<'_, Cpu>) -> Tensor<Cpu> {
    let LinearBackward { terms, d_residual } = args;
    let (rows, cols) = match (&d_residual, terms.first()) {
        (_, Some(term)) => (term.d_y.rows(), term.weight.cols()),
        (Some(d_residual), None) => (d_residual.rows(), d_residual.cols()),
        (None, None) => panic!("a backward of nothing"),
    };
    let add = d_residual.is_some();
    let mut d_x = match d_residual {
        Some(d_residual) => {
            assert_eq!((d_residual.rows(), d_residual.cols()), (rows, cols));
            d_residual.own(cpu)
        }
        None => cpu.alloc(rows, cols, Precision::Activation),
    };
    linear_backward_into(cpu, LinearBackward { terms, d_residual: None }, add, &mut d_x);
    d_x
}

pub(super) fn linear_backward_into(
    cpu: &Cpu,
    args: LinearBackward<'_, Cpu>,
    add: bool,
    d_x: &mut Tensor<Cpu>,
) {
    let LinearBackward { terms, d_residual } = args;
    assert!(d_residual.is_none(), "what is added to is in the output");
    let cols = d_x.cols();
    assert_eq!(d_x.dtype(), cpu.dtype(Precision::Activation));
    for LinearBackwardTerm { d_y, weight, .. } in terms {
        assert_eq!((d_y.rows(), d_y.cols(), weight.cols()), (d_x.rows(), weight.rows(), cols));
    }
    let residual = if add { Residual::Output } else { Residual::None };
    let finish = Finish { residual, ..Finish::default() };
    match d_x.slice_mut() {
        SliceMut::F32(d_x) => write_backward(cpu, terms, finish, cols, d_x),
        SliceMut::Bf16(d_x) => write_backward(cpu, terms, finish, cols, d_x),
    }
}

fn write_backward<T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    terms: &[LinearBackwardTerm<'_, Cpu>],
    finish: Finish<'_>,
    cols: usize,
    d_x: &mut [T],
) {
    let n_rows = d_x.len() / cols.max(1);
    if let Some(amx) = gemm_amx::takes(cpu, terms.iter().map(|t| t.weight)) {
        return write_backward_tiles(cpu, amx, terms, finish, cols, d_x);
    }
    let k = terms.iter().map(|t| t.weight.rows()).sum();
    let by = Cut::new(n_rows, tile_shape(cpu.isa).0, k, cols, cpu.n_threads());
    for start in (0..n_rows).step_by(by.packed) {
        let rows = start..n_rows.min(start + by.packed);
        let pack =
            |tensor| Packed::rows(cpu, Matrix::tensor(tensor).part_rows(rows.clone()), start);
        let packed: Vec<_> =
            terms.iter().map(|t| (pack(t.d_y), t.lora.map(|(d_z, ..)| pack(d_z)))).collect();
        let tasks = cut(
            &mut d_x[rows.start * cols..rows.end * cols],
            cols,
            start,
            (by.task, task_cols(cpu.isa)),
        );
        run_tasks(tasks, |rectangle| {
            let mut sums = Accumulator::new(cpu, rectangle.rows.clone(), rectangle.cols.clone());
            for (term, (d_y, d_z)) in terms.iter().zip(&packed) {
                let matrix = Matrix::frozen(term.weight);
                sums.add(&Product {
                    lhs: d_y,
                    rows: rectangle.rows.clone(),
                    rhs: Rhs { matrix, transposed: false, first_col: 0 },
                });
                let (Some((_, a, segments)), Some(d_z)) = (term.lora, d_z) else { continue };
                for (run, row) in segments.within(rectangle.rows.clone()) {
                    let matrix = Matrix::tensor(a).part_rows(row * cols..(row + 1) * cols);
                    sums.add(&Product {
                        lhs: d_z,
                        rows: run,
                        rhs: Rhs { matrix, transposed: true, first_col: 0 },
                    });
                }
            }
            finish.write(cpu.isa, rectangle, |row, values| sums.read_row(row, values));
        });
    }
}

/// [`write_backward`] on AMX.
fn write_backward_tiles<T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    amx: Amx,
    terms: &[LinearBackwardTerm<'_, Cpu>],
    finish: Finish<'_>,
    cols: usize,
    d_x: &mut [T],
) {
    let n_rows = d_x.len() / cols.max(1);
    let ranks: Vec<_> = (terms.iter().filter_map(|t| t.lora))
        .map(|(d_z, a, segments)| {
            (RankRhs::new(cpu, amx, a, d_z.cols(), true, segments), Matrix::tensor(d_z))
        })
        .collect();
    let past = gemm_amx::past_caches(d_x);
    let k = terms.iter().map(|t| t.weight.rows()).sum();
    let by = Cut::on_tiles(n_rows, k, cols, cpu.n_threads());
    for start in (0..n_rows).step_by(by.packed) {
        let rows = start..n_rows.min(start + by.packed);
        let d_ys = terms.iter().map(|t| Matrix::tensor(t.d_y).part_rows(rows.clone()));
        let lhs: Vec<_> = d_ys.map(|d_y| [Lhs::rows(cpu, amx, d_y, start)]).collect();
        let parts: Vec<_> = (terms.iter().zip(&lhs))
            .map(|(t, lhs)| Part { lhs, matrix: Matrix::frozen(t.weight), transposed: false })
            .collect();
        let d_zs: Vec<_> = (ranks.iter())
            .map(|(a, d_z)| a.left(cpu, amx, d_z.part_rows(rows.clone()), start))
            .collect();
        let ranks: Vec<_> = ranks.iter().map(|(a, _)| a).zip(&d_zs).collect();
        let tasks = cut(&mut d_x[rows.start * cols..rows.end * cols], cols, start, (by.task, COLS));
        let tasks = tasks.into_iter().map(|rectangle| (0, rectangle)).collect();
        run_tasks(gemm_amx::in_pairs(cpu, tasks), |(_, rectangles)| {
            let (parts, ranks) = (&parts, &ranks);
            let more = Vec::new();
            let task = gemm_amx::Task { parts, ranks, more, rectangles, finish, past };
            task.run(cpu, amx);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::{super::checks::*, *};
    use crate::tensor::Frozen;

    /// A linear with everything that a projection can have.
    struct Case {
        x: Tensor<Cpu>,
        segments: Segments,
        projections: Vec<Parts>,
    }

    struct Parts {
        weight: Frozen,
        bias: Option<Frozen>,
        lora: Option<Lora>,
        dropout: Option<Dropout>,
        residual: Option<Tensor<Cpu>>,
    }

    struct Lora {
        z: Tensor<Cpu>,
        rank: usize,
        rhs: Rhs,
    }

    enum Rhs {
        Mixed(Tensor<Cpu>),
        Stacked { bank: Bank, params: Tensor<Cpu>, weights: Tensor<Cpu> },
    }

    impl Case {
        fn new(cpu: &Cpu, data: &mut Data, m: usize, k: usize, ns: &[usize]) -> Self {
            let segments = data.segments(m);
            let x = data.tensor(cpu, m, k, Precision::Activation);
            let mut projections = Vec::new();
            for &n in ns {
                let rank = data.pick(&[1, 4, 8, 13]);
                let lora = (data.below(4) > 0).then(|| Lora {
                    z: data.tensor(cpu, m, rank, Precision::Full),
                    rank,
                    rhs: Self::rhs(cpu, data, &segments, rank, k, n),
                });
                projections.push(Parts {
                    weight: data.weight(n, k),
                    bias: (data.below(2) > 0).then(|| data.weight(1, n)),
                    lora,
                    dropout: (data.below(2) > 0).then(|| data.dropout(m)),
                    residual: (data.below(2) > 0)
                        .then(|| data.tensor(cpu, m, n, Precision::Activation)),
                });
            }
            Self { x, segments, projections }
        }

        fn rhs(
            cpu: &Cpu,
            data: &mut Data,
            segments: &Segments,
            rank: usize,
            k: usize,
            n: usize,
        ) -> Rhs {
            let n_rows = segments.n_rows();
            if data.below(2) > 0 {
                return Rhs::Mixed(data.tensor(cpu, n_rows * rank, n, Precision::Full));
            }
            let n_splits =
                [3, 2, 1].into_iter().find(|q| n.is_multiple_of(*q)).expect("one divides");
            let n_skills = 1 + data.below(3);
            let (b_start, d_in) = (7, k.next_multiple_of(n_splits));
            let b_len = n_skills * n * rank;
            let bank =
                Bank { linear: 1, a_start: 0, b_start, n_splits, n_skills, d_in, d_out: n, rank };
            let params = data.tensor(cpu, 1, b_start + b_len + 5, Precision::Full);
            let weights = data.tensor(cpu, 3 * n_rows, n_splits * n_skills, Precision::Full);
            Rhs::Stacked { bank, params, weights }
        }

        /// The outputs, or those of some rows alone.
        fn run(
            &self,
            cpu: &Cpu,
            order: Order,
            output: Precision,
            rows: Range<usize>,
        ) -> Vec<Tensor<Cpu>> {
            let (lens, segment_rows): (Vec<_>, Vec<_>) =
                self.segments.within(rows.clone()).map(|(run, row)| (run.len(), row)).unzip();
            let segments = Segments::new(&lens, &segment_rows, self.segments.n_rows());
            let part = |t: &Tensor<Cpu>| some_rows(cpu, t, rows.clone());
            let zs: Vec<_> =
                self.projections.iter().map(|p| p.lora.as_ref().map(|l| part(&l.z))).collect();
            let residuals: Vec<_> =
                self.projections.iter().map(|p| p.residual.as_ref().map(part)).collect();
            let dropouts: Vec<_> = self
                .projections
                .iter()
                .map(|p| {
                    p.dropout
                        .clone()
                        .map(|d| Dropout { tokens: d.tokens[rows.clone()].into(), ..d })
                })
                .collect();
            let projections: Vec<_> = (self.projections.iter().enumerate())
                .map(|(i, p)| Projection {
                    weight: &p.weight,
                    bias: p.bias.as_ref(),
                    lora: p.lora.as_ref().map(|lora| Expand {
                        z: zs[i].as_ref().expect("made above"),
                        segments: &segments,
                        rhs: match &lora.rhs {
                            Rhs::Mixed(b) => ExpandRhs::Mixed(b),
                            Rhs::Stacked { bank, params, weights } => {
                                ExpandRhs::Stacked(Stacked { bank: *bank, params, weights })
                            }
                        },
                    }),
                    dropout: dropouts[i].as_ref(),
                    residual: residuals[i].as_ref(),
                })
                .collect();
            let x = part(&self.x);
            cpu.linear(Linear { x: &x, projections: &projections, order, output })
        }

        fn row_of(&self, token: usize) -> usize {
            self.segments.within(token..token + 1).next().expect("every token has a row").1
        }

        fn expected(&self, cpu: &Cpu, i: usize) -> Vec<Sized> {
            let parts = &self.projections[i];
            let (m, k, n) = (self.x.rows(), self.x.cols(), parts.weight.rows());
            let x = cpu.download(&self.x);
            let w: Vec<_> = parts.weight.to_f32().into_iter().map(f64::from).collect();
            let bias = parts.bias.as_ref().map(|b| b.to_f32());
            let residual = parts.residual.as_ref().map(|r| cpu.download(r));
            let mut all = Vec::new();
            for t in 0..m {
                for o in 0..n {
                    let mut y = Sized::default();
                    for i in 0..k {
                        y.add(x[t * k + i] * w[o * k + i]);
                    }
                    if let Some(lora) = &parts.lora {
                        lora.add(cpu, &mut y, self.row_of(t), self.segments.n_rows(), t, o, n);
                    }
                    if let Some(bias) = &bias {
                        y.add(f64::from(bias[o]));
                    }
                    let mut out = Sized::default();
                    let factor = parts.dropout.as_ref().map_or(1.0, |d| d.factor(t, o));
                    out.add_times(y, f64::from(factor));
                    if let Some(residual) = &residual {
                        out.add(residual[t * n + o]);
                    }
                    all.push(out);
                }
            }
            all
        }
    }

    impl Lora {
        #[allow(clippy::too_many_arguments)]
        fn add(
            &self,
            _: &Cpu,
            y: &mut Sized,
            row: usize,
            n_rows: usize,
            t: usize,
            o: usize,
            n: usize,
        ) {
            let rank = self.rank;
            let z = |j: usize| f64::from(self.z.f32s()[t * rank + j]);
            match &self.rhs {
                Rhs::Mixed(b) => {
                    for j in 0..rank {
                        y.add(z(j) * f64::from(b.f32s()[(row * rank + j) * n + o]));
                    }
                }
                Rhs::Stacked { bank, params, weights } => {
                    let width = n / bank.n_splits;
                    let q = o / width;
                    for s in 0..bank.n_skills {
                        let w = weights.f32s()[(bank.linear * n_rows + row)
                            * bank.n_splits
                            * bank.n_skills
                            + q * bank.n_skills
                            + s];
                        for j in 0..rank {
                            let at = ((q * bank.n_skills + s) * rank + j) * width + o % width;
                            let b = params.f32s()[bank.b_start + at];
                            y.add(f64::from(w) * z(j) * f64::from(b));
                        }
                    }
                }
            }
        }
    }

    fn shapes(data: &mut Data, n: usize) -> Vec<(usize, usize, Vec<usize>)> {
        let mut shapes = vec![
            (0, 5, vec![7]),
            (3, 0, vec![4]),
            (2, 3, vec![0, 5]),
            (1, 1, vec![1]),
            (13, 513, vec![97, 2]),
            (97, 256, vec![64]),
            (6, 257, vec![129]),
            (1160, 7, vec![6]),
        ];
        for _ in 0..n {
            let n_siblings = 1 + data.below(3);
            let ns = (0..n_siblings).map(|_| data.pick(&AWKWARD[1..])).collect();
            shapes.push((data.pick(&AWKWARD[..15]), data.pick(&AWKWARD), ns));
        }
        shapes
    }

    #[test]
    fn linear_is_its_definition() {
        for cpu in backends() {
            for exact in [true, false] {
                let mut data = Data::new(1, exact);
                for (m, k, ns) in shapes(&mut data, 30) {
                    let case = Case::new(&cpu, &mut data, m, k, &ns);
                    let expected: Vec<_> = (0..ns.len()).map(|i| case.expected(&cpu, i)).collect();
                    for order in [Order::Panel, Order::Dot] {
                        for output in [Precision::Activation, Precision::Full] {
                            let outs = case.run(&cpu, order, output, 0..m);
                            for ((out, want), n) in outs.iter().zip(&expected).zip(&ns) {
                                let name = format!("linear {order:?} {m} x {k} x {n}");
                                check_with_rank(&name, &cpu, out, want, exact);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_and_threads_do_not_change_bits() {
        for cpu in backends() {
            let mut data = Data::new(2, false);
            for (m, k, ns) in [(23, 300, vec![70, 33]), (300, 40, vec![130])] {
                let case = Case::new(&cpu, &mut data, m, k, &ns);
                for order in [Order::Panel, Order::Dot] {
                    let all = case.run(&cpu, order, Precision::Full, 0..m);
                    for n_threads in [1, 3] {
                        let other = with_threads(&cpu, n_threads);
                        let again = case.run(&other, order, Precision::Full, 0..m);
                        for (a, b) in all.iter().zip(&again) {
                            assert_eq!(bits(&cpu, a), bits(&cpu, b), "{n_threads} threads");
                        }
                    }
                    for start in (0..m).step_by(7) {
                        for len in [1, 2, 5] {
                            let rows = start..m.min(start + len);
                            let alone = case.run(&cpu, order, Precision::Full, rows.clone());
                            for (all, alone) in all.iter().zip(&alone) {
                                let among = some_rows(&cpu, all, rows.clone());
                                assert_eq!(bits(&cpu, &among), bits(&cpu, alone), "{rows:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn another_rows_infinity_stays_there() {
        for cpu in backends() {
            let mut data = Data::new(3, false);
            let segments = Segments::new(&[3, 4], &[0, 1], 2);
            let x = data.tensor(&cpu, 7, 20, Precision::Activation);
            let (weight, z) = (data.weight(40, 20), data.tensor(&cpu, 7, 8, Precision::Full));
            let b: Vec<_> =
                (0..2 * 8 * 40).map(|i| if i < 8 * 40 { 1.0 } else { f64::INFINITY }).collect();
            let b = cpu.upload(&b, 16, 40, Precision::Full);
            for order in [Order::Panel, Order::Dot] {
                let lora = Expand { z: &z, segments: &segments, rhs: ExpandRhs::Mixed(&b) };
                let projections = [Projection { lora: Some(lora), ..Projection::plain(&weight) }];
                let output = Precision::Activation;
                let y = cpu.linear(Linear { x: &x, projections: &projections, order, output });
                let y = cpu.download(&y[0]);
                assert!(y[..3 * 40].iter().all(|y| y.is_finite()));
                assert!(y[3 * 40..].iter().all(|y| !y.is_finite()));
            }
        }
    }

    #[test]
    fn linear_backward_is_its_definition() {
        for cpu in backends() {
            for exact in [true, false] {
                let mut data = Data::new(4, exact);
                for (m, n, ks) in shapes(&mut data, 30) {
                    let segments = data.segments(m);
                    let rank = data.pick(&[1, 4, 8, 13]);
                    let parts: Vec<_> = ks
                        .iter()
                        .map(|&k| {
                            let d_y = data.tensor(&cpu, m, k, Precision::Activation);
                            let lora = (data.below(4) > 0).then(|| {
                                let n_rows = segments.n_rows();
                                let d_z = data.tensor(&cpu, m, rank, Precision::Full);
                                (d_z, data.tensor(&cpu, n_rows * n, rank, Precision::Full))
                            });
                            (d_y, data.weight(k, n), lora)
                        })
                        .collect();
                    let d_residual =
                        (data.below(2) > 0).then(|| data.tensor(&cpu, m, n, Precision::Activation));
                    let mut want = vec![Sized::default(); m * n];
                    for (d_y, weight, lora) in &parts {
                        let (d_y, w) = (cpu.download(d_y), weight.to_f32());
                        let k = weight.rows();
                        for (run, row) in segments.iter() {
                            for t in run {
                                for c in 0..n {
                                    let want = &mut want[t * n + c];
                                    for i in 0..k {
                                        want.add(d_y[t * k + i] * f64::from(w[i * n + c]));
                                    }
                                    let Some((d_z, a)) = lora else { continue };
                                    for j in 0..rank {
                                        let a = a.f32s()[(row * n + c) * rank + j];
                                        let d_z = d_z.f32s()[t * rank + j];
                                        want.add(f64::from(d_z) * f64::from(a));
                                    }
                                }
                            }
                        }
                    }
                    if let Some(d_residual) = &d_residual {
                        let values = cpu.download(d_residual);
                        want.iter_mut().zip(values).for_each(|(w, r)| w.add(r));
                    }
                    let terms: Vec<_> = parts
                        .iter()
                        .map(|(d_y, weight, lora)| LinearBackwardTerm {
                            d_y,
                            weight,
                            lora: lora.as_ref().map(|(d_z, a)| (d_z, a, &segments)),
                        })
                        .collect();
                    let kept = d_residual.as_ref().map(|r| (r.clone(), bits(&cpu, r)));
                    let d_x = cpu.linear_backward(LinearBackward {
                        terms: &terms,
                        d_residual: d_residual.clone(),
                    });
                    let name = format!("linear_backward {m} x {ks:?} x {n}");
                    check_with_rank(&name, &cpu, &d_x, &want, exact);
                    if let Some((kept, before)) = kept {
                        assert_eq!(bits(&cpu, &kept), before, "somebody else's buffer");
                    }
                    let alone = d_residual.map(|r| cpu.copy(&r));
                    let again = with_threads(&cpu, 3)
                        .linear_backward(LinearBackward { terms: &terms, d_residual: alone });
                    assert_eq!(bits(&cpu, &again), bits(&cpu, &d_x), "{name}");
                }
            }
        }
    }
}
