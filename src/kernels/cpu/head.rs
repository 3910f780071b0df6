//! Head and cross-entropy in one, argmax, and the draw of a token.
//!
//! ```text
//! logits = (scale * x)·Wᵀ    p = softmax(logits)    nll = -ln p[label]
//! d_x = ((p - onehot(label)) * scale * d_nll)·W
//! ```
//!
//! The logits of a chunk of tokens become, in place, the left operand of `d_x`'s product: for each
//! tile of rows exponentials, then gradients, then the packed form. On AMX the gradients are rounded to bf16
//! once, as those of every activation are, and stay where they are. No more than 32 MiB of logits
//! exist at a time; on AMX those of 256 rows where that is more. Rows do not meet, so the chunks do not change a bit.

use half::bf16;

use super::{
    super::{
        Precision,
        ops::*,
        sampling::{self, Candidate},
    },
    Cpu, Slice, SliceMut,
    gemm::{Accumulator, Cut, Finish, Packed, Product, Rhs, pack_tile, task_cols, tile_shape},
    gemm_amx::{self, Lhs, Part},
    isa::{BLOCK_ROWS, Element, ElementMut, Isa, LANES, Simd, SimdOp},
    math,
    matrix::{Matrix, cut},
    threads::run_tasks,
};
use crate::tensor::{Frozen, Tensor};

/// Logits that exist at a time.
const LOGITS: usize = 8 << 20;
/// Rows of them at least on AMX, where a weight takes as long to arrive and to be packed as products with 150 rows at the
/// peak.
const ROWS_ON_TILES: usize = 256;
/// The smallest gradient of a logit that is kept, 2^-100 (tiles have no subnormal numbers anyway). Its products with weights
/// are no subnormal numbers, with which a multiply-add takes a hundred times as long: where a base is sure of
/// itself, or random, many gradients would be.
const LEAST: f32 = 7.888_609e-31;
/// Exponentials that are added in f32 before their sum is added to the others in f64.
const SUM_BLOCK: usize = 64 * LANES;

pub(super) fn head_loss(cpu: &Cpu, args: HeadLoss<'_, Cpu>) -> Loss<Cpu> {
    let HeadLoss { x, weight, labels, scale, d_nll } = args;
    let vocabulary = weight.rows();
    assert_eq!((x.rows(), x.cols()), (labels.len(), weight.cols()));
    assert!(labels.iter().all(|&label| (label as usize) < vocabulary), "labels are ids");
    let mut nll = vec![0.0; x.rows()];
    let mut d_x = d_nll.map(|_| cpu.alloc(x.rows(), x.cols(), Precision::Activation));
    let amx = gemm_amx::takes(cpu, [weight].into_iter());
    let n_rows = (LOGITS / vocabulary.max(1) / 8 * 8).clamp(8, 1152);
    let n_rows = match amx {
        Some(_) => n_rows.next_multiple_of(BLOCK_ROWS).max(ROWS_ON_TILES),
        None => n_rows,
    };
    for start in (0..x.rows()).step_by(n_rows) {
        let rows = start..x.rows().min(start + n_rows);
        let mut logits = logits(cpu, Matrix::tensor(x).part_rows(rows.clone()), weight);
        let mr = tile_shape(cpu.isa).0;
        let nll = nll[rows.clone()].chunks_mut(mr);
        let tiles = logits.tiles_mut().zip(labels[rows.clone()].chunks(mr)).zip(nll);
        run_tasks(tiles, |((logits, labels), nll)| {
            for ((row, &label), nll) in logits.chunks_mut(vocabulary).zip(labels).zip(nll) {
                let (label, rounded) = (label as usize, amx.is_some());
                *nll = cpu.isa.run(Softmax { row, label, scale, d_nll, rounded });
            }
            if d_nll.is_some() && amx.is_none() {
                let gradients = &logits[..labels.len() * vocabulary];
                let mut copy = cpu.scratch(gradients.len());
                copy.as_mut_slice().copy_from_slice(gradients);
                let rows = Matrix::f32s(copy.as_slice(), labels.len(), vocabulary);
                pack_tile(cpu.isa, rows, logits);
            }
        });
        let cols = x.cols();
        let chunk = start * cols..rows.end * cols;
        match d_x.as_mut().map(Tensor::slice_mut) {
            Some(SliceMut::F32(d_x)) => backward(cpu, &logits, weight, &mut d_x[chunk]),
            Some(SliceMut::Bf16(d_x)) => backward(cpu, &logits, weight, &mut d_x[chunk]),
            None => {}
        }
    }
    Loss { nll, d_x }
}

/// `x·Wᵀ`, row-major, with room for whole tiles.
fn logits(cpu: &Cpu, x: Matrix<'_>, weight: &Frozen) -> Packed {
    let mut logits = Packed::unwritten(cpu, x.rows, weight.rows(), 0);
    let out = &mut logits.values_mut()[..x.rows * weight.rows()];
    if let Some(amx) = gemm_amx::takes(cpu, [weight].into_iter()) {
        let lhs = &[Lhs::rows(cpu, amx, x, 0)];
        let part = Part { lhs, matrix: Matrix::frozen(weight), transposed: true };
        gemm_amx::write(cpu, amx, &part, out, weight.rows());
        return logits;
    }
    let lhs = Packed::rows(cpu, x, 0);
    let tasks = cut(out, weight.rows(), 0, (x.rows, task_cols(cpu.isa)));
    run_tasks(tasks, |rectangle| {
        let mut sums = Accumulator::new(cpu, rectangle.rows.clone(), rectangle.cols.clone());
        sums.add(&Product {
            lhs: &lhs,
            rows: rectangle.rows.clone(),
            rhs: Rhs { matrix: Matrix::frozen(weight), transposed: true, first_col: 0 },
        });
        Finish::default().write(cpu.isa, rectangle, |row, values| sums.read_row(row, values));
    });
    logits
}

/// `d_x = d_logits·W`, of packed `d_logits` or, on AMX, rows of bf16.
fn backward<T: ElementMut<Item = T> + Send>(
    cpu: &Cpu,
    d_logits: &Packed,
    weight: &Frozen,
    d_x: &mut [T],
) {
    let n_rows = d_x.len() / weight.cols().max(1);
    if let Some(amx) = gemm_amx::takes(cpu, [weight].into_iter()) {
        let values = &d_logits.values()[..n_rows * weight.rows()];
        let d_logits = Matrix::first_halves(values, n_rows, weight.rows());
        let lhs = &[Lhs::rows(cpu, amx, d_logits, 0)];
        let part = Part { lhs, matrix: Matrix::frozen(weight), transposed: false };
        return gemm_amx::write(cpu, amx, &part, d_x, weight.cols());
    }
    let task = Cut::rows_for_all(n_rows, weight.cols(), cpu.n_threads());
    let task = task.next_multiple_of(tile_shape(cpu.isa).0);
    let tasks = cut(d_x, weight.cols(), 0, (task, task_cols(cpu.isa)));
    run_tasks(tasks, |rectangle| {
        let mut sums = Accumulator::new(cpu, rectangle.rows.clone(), rectangle.cols.clone());
        sums.add(&Product {
            lhs: d_logits,
            rows: rectangle.rows.clone(),
            rhs: Rhs { matrix: Matrix::frozen(weight), transposed: false, first_col: 0 },
        });
        Finish::default().write(cpu.isa, rectangle, |row, values| sums.read_row(row, values));
    });
}

/// One row: gives its nll and, where there is a `d_nll`, replaces the logits by their gradients.
struct Softmax<'a> {
    row: &'a mut [f32],
    label: usize,
    scale: f32,
    d_nll: Option<f32>,
    /// Whether gradients become bf16, in the first half of the row.
    rounded: bool,
}

impl SimdOp for Softmax<'_> {
    type Output = f64;
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f64 {
        let Self { row, label, scale, d_nll, rounded } = self;
        if scale != 1.0 {
            multiply(simd, row, scale);
        }
        let largest = max::<S, f32>(simd, row);
        let at_label = row[label];
        // NaN anywhere, or an infinity, makes the sum NaN: a broken model has no quiet loss.
        let shift = simd.splat(largest);
        let mut sum = 0.0;
        for block in row.chunks_mut(SUM_BLOCK) {
            let mut lanes = simd.splat(0.0);
            let (whole, rest) = block.as_chunks_mut();
            for v in whole {
                let e = math::exp(simd, simd.sub(simd.load(v), shift));
                lanes = simd.add(lanes, e);
                simd.store(e, v);
            }
            if !rest.is_empty() {
                let v = simd.load_part(rest, f32::NEG_INFINITY);
                let e = math::exp(simd, simd.sub(v, shift));
                lanes = simd.add(lanes, e);
                simd.store_part(e, rest);
            }
            sum += f64::from(simd.sum(lanes));
        }
        if let Some(d_nll) = d_nll {
            let d_logit = f64::from(scale) * f64::from(d_nll);
            let at_label = (f64::from(row[label]) / sum - 1.0) * d_logit;
            let (factor, at_label) = ((d_logit / sum) as f32, at_label as f32);
            if rounded {
                multiply_to_bf16(simd, row, factor)[label] = bf16::from_f32(at_label);
            } else {
                multiply_flushed(simd, row, factor);
                row[label] = at_label;
            }
        }
        sum.ln() + (f64::from(largest) - f64::from(at_label))
    }
}

/// `row *= factor`.
#[inline(always)]
fn multiply<S: Simd>(simd: S, row: &mut [f32], factor: f32) {
    let (whole, rest) = row.as_chunks_mut();
    let lanes = simd.splat(factor);
    for v in whole {
        simd.store(simd.mul(simd.load(v), lanes), v);
    }
    for v in rest {
        *v *= factor;
    }
}

/// `row *= factor` of numbers that are not negative; what is smaller than [`LEAST`] becomes 0.
#[inline(always)]
fn multiply_flushed<S: Simd>(simd: S, row: &mut [f32], factor: f32) {
    let least = LEAST / factor.abs();
    let (whole, rest) = row.as_chunks_mut();
    let (factors, leasts, zero) = (simd.splat(factor), simd.splat(least), simd.splat(0.0));
    for v in whole {
        let e = simd.load(v);
        simd.store(simd.select_lt(e, leasts, zero, simd.mul(e, factors)), v);
    }
    for v in rest {
        *v = if *v < least { 0.0 } else { *v * factor };
    }
}

/// `row * factor`, rounded, in the first half of the row.
#[inline(always)]
fn multiply_to_bf16<S: Simd>(simd: S, row: &mut [f32], factor: f32) -> &mut [bf16] {
    let n = row.len();
    let lanes = simd.splat(factor);
    for start in (0..n).step_by(LANES) {
        // What is overwritten has been read, in this turn or before.
        let rest = &row[start..];
        let v = match rest.first_chunk() {
            Some(v) => simd.load(v),
            None => simd.load_part(rest, 0.0),
        };
        let mut rounded = [bf16::ZERO; LANES];
        simd.store_bf16_flushed(simd.mul(v, lanes), &mut rounded);
        let to = &mut bytemuck::cast_slice_mut(row)[start..];
        match to.first_chunk_mut() {
            Some(to) if n - start >= LANES => *to = rounded,
            _ => to[..n - start].copy_from_slice(&rounded[..n - start]),
        }
    }
    &mut bytemuck::cast_slice_mut(row)[..n]
}

/// The largest element that is not NaN, or -inf.
#[inline(always)]
fn max<S: Simd, E: Element>(simd: S, row: &[E::Item]) -> f32 {
    let (whole, rest) = row.as_chunks();
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for lanes in whole {
        largest = simd.max(E::load(simd, lanes), largest);
    }
    let rest = rest.iter().map(|&item| E::get(item));
    rest.fold(simd.max_lane(largest), |a, b| if b > a { b } else { a })
}

pub(super) fn argmax(cpu: &Cpu, logits: &Tensor<Cpu>, forbidden: &[u32]) -> Vec<u32> {
    let cols = logits.cols();
    assert!(cols > 0, "a largest of none");
    let mut walls: Vec<usize> = forbidden.iter().map(|&f| f as usize).collect();
    walls.sort_unstable();
    walls.retain(|&wall| wall < cols);
    walls.push(cols);
    match logits.slice() {
        Slice::F32(slice) => argmax_of::<f32>(cpu.isa, slice, cols, &walls),
        Slice::Bf16(slice) => argmax_of::<bf16>(cpu.isa, slice, cols, &walls),
    }
}

fn argmax_of<E: Element>(isa: Isa, logits: &[E::Item], cols: usize, walls: &[usize]) -> Vec<u32> {
    let mut ids = vec![0; logits.len() / cols];
    run_tasks(ids.iter_mut().zip(logits.chunks(cols)), |(id, row)| {
        *id = isa.run(Argmax::<E> { row, walls });
    });
    ids
}

/// The first of the largest elements outside the walls, the last of which is the row's end; 0 where
/// all are NaN.
struct Argmax<'a, E: Element> {
    row: &'a [E::Item],
    walls: &'a [usize],
}

impl<E: Element> SimdOp for Argmax<'_, E> {
    type Output = u32;
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> u32 {
        let Self { row, walls } = self;
        let mut best: Option<(f32, usize)> = None;
        let mut start = 0;
        for &wall in walls {
            let run = &row[start.min(wall)..wall];
            let largest = max::<S, E>(simd, run);
            if best.is_none_or(|(best, _)| largest > best)
                && let Some(at) = run.iter().position(|&item| E::get(item) == largest)
            {
                best = Some((largest, start + at));
            }
            start = wall + 1;
        }
        best.map_or(0, |(_, at)| at as u32)
    }
}

pub(super) fn sample(cpu: &Cpu, args: &Sample<'_, Cpu>) -> Vec<u32> {
    let Sample { logits, scale, forbidden, forbids, rules, uniforms } = *args;
    let (rows, cols) = (logits.rows(), logits.cols());
    assert!(cols > 0 && scale > 0.0, "a column, and logits in their order");
    assert_eq!((forbids.len(), uniforms.len()), (rows, rows), "one for each row");
    let draw = |i: usize, row: &[f32]| {
        let mut weights = cpu.scratch(cols);
        let weights = weights.as_mut_slice::<f32>();
        weights.copy_from_slice(row);
        let forbidden = if forbids[i] { forbidden } else { &[] };
        for &id in forbidden {
            // What is not there is not forbidden.
            weights.get_mut(id as usize).into_iter().for_each(|w| *w = f32::NEG_INFINITY);
        }
        cpu.isa.run(Weigh { row: weights, scale });
        let columns = (0..).zip(row.iter().zip(&*weights));
        let candidates = columns.filter_map(|(id, (&x, &w))| Candidate::new(id, x, w.into()));
        sampling::draw(candidates.collect(), &rules, uniforms[i])
    };
    let mut ids = vec![0; rows];
    let tasks = ids.iter_mut().zip(logits.f32s().chunks(cols)).enumerate();
    run_tasks(tasks, |(i, (id, row))| *id = draw(i, row));
    ids
}

/// `row = e^(scale (row - largest))`.
struct Weigh<'a> {
    row: &'a mut [f32],
    scale: f32,
}

impl SimdOp for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { row, scale } = self;
        let (largest, scale) = (simd.splat(max::<S, f32>(simd, row)), simd.splat(scale));
        let (whole, rest) = row.as_chunks_mut();
        for v in whole {
            let x = simd.mul(simd.sub(simd.load(v), largest), scale);
            simd.store(math::exp(simd, x), v);
        }
        if !rest.is_empty() {
            let x = simd.load_part(rest, f32::NEG_INFINITY);
            let x = simd.mul(simd.sub(x, largest), scale);
            simd.store_part(math::exp(simd, x), rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::checks::*, *};
    use crate::kernels::Backend;

    /// With a row of random logits, or of a base that is sure of itself, products would be of subnormal numbers.
    #[test]
    fn gradients_are_no_subnormal_numbers() {
        let d_nll = 1.0 / 128.0;
        for isa in Isa::testable() {
            let logits: Vec<f32> = (0..37).map(|i| -2.5 * i as f32).collect();
            let mut row = logits.clone();
            let d_nll = Some(d_nll);
            let softmax = Softmax { row: &mut row, label: 1, scale: 1.0, d_nll, rounded: false };
            isa.run(softmax);
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            for (i, (got, &logit)) in row.into_iter().zip(&logits).enumerate() {
                let hot = if i == 1 { 1.0 } else { 0.0 };
                let want = (f64::from(logit).exp() / sum - hot) / 128.0;
                if want.abs() < f64::from(LEAST) {
                    assert_eq!(got, 0.0, "logit {i} on {}", isa.name());
                } else {
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= 1e-6 * want.abs(), "logit {i} on {}: {got}", isa.name());
                }
            }
        }
    }

    fn expected(cpu: &Cpu, args: &HeadLoss<'_, Cpu>) -> (Vec<(f64, f64)>, Vec<Sized>) {
        let (k, n) = (args.x.cols(), args.weight.rows());
        let w: Vec<_> = args.weight.to_f32().into_iter().map(f64::from).collect();
        let (x, scale) = (cpu.download(args.x), f64::from(args.scale));
        let on_tiles = gemm_amx::takes(cpu, [args.weight].into_iter()).is_some();
        let rounding = if on_tiles { f64::powi(2.0, 14) } else { 0.0 };
        let (mut nll, mut d_x) = (Vec::new(), Vec::new());
        for (x, &label) in x.chunks(k).zip(args.labels) {
            let mut logits = vec![Sized::default(); n];
            for (logit, w) in logits.iter_mut().zip(w.chunks(k)) {
                x.iter().zip(w).for_each(|(x, w)| logit.add(x * w * scale));
            }
            let sum: f64 = logits.iter().map(|l| l.value.exp()).sum();
            let largest = logits.iter().map(|l| l.size).fold(0.0, f64::max);
            nll.push((sum.ln() - logits[label as usize].value, largest));
            let mut d = vec![Sized::default(); k];
            for (i, (logit, w)) in logits.iter().zip(w.chunks(k)).enumerate() {
                let p = logit.value.exp() / sum;
                let hot = f64::from(u8::from(i == label as usize));
                let d_logit = scale * f64::from(args.d_nll.unwrap_or(0.0));
                for (d, w) in d.iter_mut().zip(w) {
                    d.value += (p - hot) * d_logit * w;
                    // A probability's relative error is about that of its logit.
                    d.size += (p * (2.0 + 2.0 * largest) + hot) * (d_logit * w).abs();
                    // And a gradient that is rounded to bf16 is off by 2^-8, in units of 2^-22.
                    d.size += rounding * ((p - hot) * d_logit * w).abs();
                }
            }
            // Thousands of blocks, one after the other, err by the root of their number.
            let growth = 1.0 + (n as f64 / 256.0).sqrt() / 16.0;
            d.iter_mut().for_each(|d| d.size *= growth);
            d_x.extend(d);
        }
        (nll, d_x)
    }

    #[test]
    fn head_loss_is_its_definition() {
        for cpu in backends() {
            let mut data = Data::new(5, false);
            for (m, k, n) in [
                (0, 3, 5),
                (1, 1, 1),
                (7, 31, 97),
                (13, 64, 2055),
                (33, 17, 16),
                (26, 300, 130),
                (14, 1, 700_000), // Two chunks.
                (34, 1030, 4130), // On tiles, groups of rectangles.
            ] {
                if n > 4000 && cpu.isa.name() == "scalar" {
                    continue;
                }
                let x = data.tensor(&cpu, m, k, Precision::Activation);
                let mut weight = data.weight(n, k);
                if k > 1000 {
                    weight = Frozen::from_f32(&weight.to_f32(), n, k, crate::dtype::Dtype::Bf16);
                }
                let labels: Vec<_> = (0..m).map(|_| data.below(n) as u32).collect();
                let args =
                    |d_nll| HeadLoss { x: &x, weight: &weight, labels: &labels, scale: 0.3, d_nll };
                let (nll, d_x) = expected(&cpu, &args(Some(0.7)));
                let loss = cpu.head_loss(args(Some(0.7)));
                for (got, (want, size)) in loss.nll.iter().zip(&nll) {
                    let bound = 4.0 * f64::powi(2.0, -24) * (size + want.abs() + 1.0);
                    assert!((got - want).abs() <= bound, "{m} x {k} x {n}: {got}, not {want}");
                }
                let got = loss.d_x.clone().expect("asked for");
                check(&format!("head_loss {m} x {k} x {n}"), &cpu, &got, &d_x, false);

                let plain = cpu.head_loss(args(None));
                assert!(plain.d_x.is_none());
                let nll_bits =
                    |l: &Loss<Cpu>| l.nll.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(nll_bits(&plain), nll_bits(&loss));
                let again = with_threads(&cpu, 3).head_loss(args(Some(0.7)));
                assert_eq!(nll_bits(&again), nll_bits(&loss));
                assert_eq!(bits(&cpu, &again.d_x.expect("asked for")), bits(&cpu, &got));
                for t in (0..m).step_by(3) {
                    let x = some_rows(&cpu, &x, t..t + 1);
                    let alone = cpu.head_loss(HeadLoss {
                        x: &x,
                        labels: &labels[t..=t],
                        ..args(Some(0.7))
                    });
                    assert_eq!(alone.nll[0].to_bits(), loss.nll[t].to_bits());
                    let row = some_rows(&cpu, &got, t..t + 1);
                    assert_eq!(bits(&cpu, &alone.d_x.expect("asked for")), bits(&cpu, &row));
                }
            }
        }
    }

    #[test]
    fn broken_logits_have_no_quiet_loss() {
        for cpu in backends() {
            let weight = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2.0, -1e30, 1.0];
            let weight = Frozen::from_f32(&weight, 6, 1, crate::dtype::Dtype::F32);
            let x = cpu.upload(&[1.0], 1, 1, Precision::Activation);
            for label in 0..6 {
                let loss = cpu.head_loss(HeadLoss {
                    x: &x,
                    weight: &weight,
                    labels: &[label],
                    scale: 1.0,
                    d_nll: None,
                });
                assert!(loss.nll[0].is_nan(), "label {label}: {}", loss.nll[0]);
            }
        }
    }

    #[test]
    fn argmax_is_the_first_largest_number() {
        const NAN: f64 = f64::NAN;
        for cpu in backends() {
            let mut data = Data::new(6, true);
            for cols in [1, 2, 15, 16, 17, 40] {
                let logits = data.tensor(&cpu, 9, cols, Precision::Full);
                let values = cpu.download(&logits);
                for (row, got) in values.chunks(cols).zip(cpu.argmax(&logits, &[])) {
                    let first =
                        (0..cols).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("some");
                    assert_eq!(got as usize, first, "{row:?}");
                }
            }
            let odd = [NAN, f64::NEG_INFINITY, NAN, -3.0, NAN, -3.0, NAN, NAN];
            for precision in [Precision::Activation, Precision::Full] {
                let logits = cpu.upload(&odd, 4, 2, precision);
                assert_eq!(cpu.argmax(&logits, &[]), [1, 1, 1, 0]);
            }
            let logits = cpu.upload(&[3.0, 5.0, 4.0, 5.0, -1.0], 1, 5, Precision::Full);
            for (forbidden, want) in
                [(&[][..], 1), (&[1], 3), (&[3, 1], 2), (&[3, 1, 1, 2, 9], 0), (&[0, 4], 1)]
            {
                assert_eq!(cpu.argmax(&logits, forbidden), [want], "{forbidden:?}");
            }
        }
    }
}
