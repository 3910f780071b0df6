//! Mixing a bank's skills into a pair for each routing row, and its backward.
//!
//! ```text
//! Â[row, q] = Σ_s w[row, q, s] A[q, s]       d_A[q, s] += Σ_row w[row, q, s] d_Â[row, q]
//! (B̂, d_B likewise)                          d_w[row, q, s] += <d_Â[row, q], A[q, s]> + <d_B̂[row, q], B[q, s]>
//! ```
//!
//! Every slice `A[q, s]` and every row of `B[q, s]` is contiguous, on both sides: the work is
//! weighted sums and dot products of long vectors. The one difference between the halves is that
//! a row of `B̂` holds the rows of all splits side by side.

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    isa::{LANES, Simd, SimdOp},
    math::dot,
    threads::run_tasks,
};

pub(super) fn mix(cpu: &Cpu, args: Mix<'_, Cpu>) -> MixedPair<Cpu> {
    let Mix { stacked: Stacked { bank, params, weights }, n_rows } = args;
    let Bank { n_splits, n_skills, d_in, d_out, rank, .. } = bank;
    let weights = Weights::new(&bank, weights.f32s(), n_rows);
    let (bank_a, bank_b) = (&params.f32s()[bank.a()], &params.f32s()[bank.b()]);
    let mut a = cpu.alloc(n_rows * d_in, rank, Precision::Full);
    let mut b = cpu.alloc(n_rows * rank, d_out, Precision::Full);

    let (slice, o) = (d_in / n_splits * rank, d_out / n_splits);
    let slices = pieces(Half::A, a.f32s_mut(), slice, n_skills);
    let rows = pieces(Half::B, b.f32s_mut(), d_out, n_skills);
    run_tasks(slices.chain(rows), |task| match task.half {
        Half::A => task.each(slice, |i, out| {
            let (row, q) = (i / n_splits, i % n_splits);
            let skills = &bank_a[q * n_skills * slice..][..n_skills * slice];
            let terms = Terms { from: skills, stride: slice, weights: weights.of(row, q), step: 1 };
            cpu.isa.run(WeightedSum { terms, add: false, out });
        }),
        Half::B => task.each(d_out, |i, out| {
            let (row, r) = (i / rank, i % rank);
            for (q, out) in out.chunks_exact_mut(o).enumerate() {
                let first = (q * n_skills * rank + r) * o;
                let (from, weights) = (&bank_b[first..], weights.of(row, q));
                let terms = Terms { from, stride: rank * o, weights, step: 1 };
                cpu.isa.run(WeightedSum { terms, add: false, out });
            }
        }),
        Half::Weights => unreachable!("they are what mixes"),
    });
    MixedPair { a, b }
}

pub(super) fn unmix(cpu: &Cpu, args: Unmix<'_, Cpu>) {
    let Unmix { stacked: Stacked { bank, params, weights }, d_a, d_b, grads, d_weights } = args;
    let Bank { n_splits, n_skills, d_in, d_out, rank, .. } = bank;
    if n_splits * n_skills * rank == 0 {
        return;
    }
    let n_rows = d_b.rows / rank;
    assert_eq!((d_a.rows, d_a.cols), (n_rows * d_in, rank));
    assert_eq!(d_b.cols, d_out);
    let weights = Weights::new(&bank, weights.f32s(), n_rows);
    let (bank_a, bank_b) = (&params.f32s()[bank.a()], &params.f32s()[bank.b()]);
    let (d_a, d_b) = (d_a.f32s(), d_b.f32s());
    let (slice, o) = (d_in / n_splits * rank, d_out / n_splits);

    let width = n_splits * n_skills;
    let own = bank.linear * n_rows * width..(bank.linear + 1) * n_rows * width;
    let d_own = pieces(Half::Weights, &mut d_weights.f32s_mut()[own], 1, slice + rank * o);
    let grads = grads.f32s_mut().get_disjoint_mut([bank.a(), bank.b()]);
    let [grads_a, grads_b] = grads.expect("A and B share nothing");
    let slices = pieces(Half::A, grads_a, slice, n_rows);
    let rows = pieces(Half::B, grads_b, rank * o, n_rows);
    run_tasks(d_own.chain(slices).chain(rows), |task| match task.half {
        Half::Weights => task.each(1, |i, d_w| {
            let (row, q, qs) = (i / width, i % width / n_skills, i % width);
            d_w[0] += cpu.isa.run(DotPair {
                d_a: &d_a[(row * n_splits + q) * slice..][..slice],
                a: &bank_a[qs * slice..][..slice],
                d_b: &d_b[row * rank * d_out..][..rank * d_out],
                first_col: q * o,
                b: &bank_b[qs * rank * o..][..rank * o],
                rank,
            }) as f32;
        }),
        Half::A => task.each(slice, |qs, out| {
            let from = d_a.get(qs / n_skills * slice..).unwrap_or_default();
            let (stride, weights) = (n_splits * slice, weights.column(qs));
            let terms = Terms { from, stride, weights, step: width };
            cpu.isa.run(WeightedSum { terms, add: true, out });
        }),
        Half::B => task.each(rank * o, |qs, out| {
            for (r, out) in out.chunks_exact_mut(o).enumerate() {
                let from = d_b.get(r * d_out + qs / n_skills * o..).unwrap_or_default();
                let (stride, weights) = (rank * d_out, weights.column(qs));
                let terms = Terms { from, stride, weights, step: width };
                cpu.isa.run(WeightedSum { terms, add: true, out });
            }
        }),
    });
}

/// What a task of [`mix`] or [`unmix`] writes.
#[derive(Clone, Copy)]
enum Half {
    A,
    B,
    Weights,
}

/// Consecutive pieces of one kind.
struct Pieces<'a> {
    half: Half,
    /// The number of the first one.
    first: usize,
    out: &'a mut [f32],
}

impl Pieces<'_> {
    /// Runs `run` for each piece of `size` elements, with its number.
    fn each(self, size: usize, mut run: impl FnMut(usize, &mut [f32])) {
        let pieces = self.out.chunks_mut(size.max(1)).enumerate();
        pieces.for_each(|(i, out)| run(self.first + i, out));
    }
}

/// The pieces of `out`, `size` elements each that take `work` times as many operations, in tasks of a quarter of a grain: a
/// linear's are few, and a queue costs less than a fork.
fn pieces(
    half: Half,
    out: &mut [f32],
    size: usize,
    work: usize,
) -> impl Iterator<Item = Pieces<'_>> {
    let n = (GRAIN / 4 / (size * work).max(1)).max(1);
    let tasks = out.chunks_mut((n * size).max(1)).enumerate();
    tasks.map(move |(i, out)| Pieces { half, first: i * n, out })
}

/// One linear's mixing weights, `[n_rows, n_splits, n_skills]`.
#[derive(Clone, Copy)]
struct Weights<'a> {
    all: &'a [f32],
    n_splits: usize,
    n_skills: usize,
}

impl<'a> Weights<'a> {
    fn new(bank: &Bank, all: &'a [f32], n_rows: usize) -> Self {
        let size = n_rows * bank.n_splits * bank.n_skills;
        let all = &all[bank.linear * size..][..size];
        Self { all, n_splits: bank.n_splits, n_skills: bank.n_skills }
    }

    /// Of every skill, in a routing row and split.
    fn of(&self, row: usize, q: usize) -> &'a [f32] {
        &self.all[(row * self.n_splits + q) * self.n_skills..][..self.n_skills]
    }

    /// From a split and skill's weight in the first routing row on; the others' follow at every
    /// `n_splits * n_skills`.
    fn column(&self, qs: usize) -> &'a [f32] {
        self.all.get(qs..).unwrap_or_default()
    }
}

/// Vectors `from[i * stride..]` with weights `weights[i * step]`.
#[derive(Clone, Copy)]
struct Terms<'a> {
    from: &'a [f32],
    stride: usize,
    weights: &'a [f32],
    step: usize,
}

impl<'a> Terms<'a> {
    /// Elements `at..at + n` of each vector, with its weight.
    #[inline(always)]
    fn iter(self, at: usize, n: usize) -> impl Iterator<Item = (&'a [f32], f32)> {
        let weights = self.weights.iter().step_by(self.step).enumerate();
        weights.map(move |(i, &w)| (&self.from[i * self.stride + at..][..n], w))
    }
}

/// `out = Σ weight * vector`, in order, or `out +=` it.
struct WeightedSum<'a> {
    terms: Terms<'a>,
    add: bool,
    out: &'a mut [f32],
}

impl SimdOp for WeightedSum<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        const BLOCK: usize = 4 * LANES;
        let Self { terms, add, out } = self;
        let (blocks, tail) = out.as_chunks_mut::<BLOCK>();
        let mut at = 0;
        for out in blocks {
            let out = out.as_chunks_mut::<LANES>().0;
            let mut sums = [s.splat(0.0); 4];
            if add {
                for (sum, out) in sums.iter_mut().zip(&*out) {
                    *sum = s.load(out);
                }
            }
            for (from, weight) in terms.iter(at, BLOCK) {
                let weight = s.splat(weight);
                for (sum, from) in sums.iter_mut().zip(from.as_chunks::<LANES>().0) {
                    *sum = s.fma(weight, s.load(from), *sum);
                }
            }
            for (sum, out) in sums.iter().zip(out) {
                s.store(*sum, out);
            }
            at += BLOCK;
        }
        for out in tail.chunks_mut(LANES) {
            let mut sum = if add { s.load_part(out, 0.0) } else { s.splat(0.0) };
            for (from, weight) in terms.iter(at, out.len()) {
                sum = s.fma(s.splat(weight), s.load_part(from, 0.0), sum);
            }
            s.store_part(sum, out);
            at += out.len();
        }
    }
}

/// `<d_Â[row, q], A[q, s]> + <d_B̂[row, q], B[q, s]>`.
struct DotPair<'a> {
    d_a: &'a [f32],
    a: &'a [f32],
    /// `[rank, d_out]`, of which the columns from `first_col` on count.
    d_b: &'a [f32],
    first_col: usize,
    b: &'a [f32],
    rank: usize,
}

impl SimdOp for DotPair<'_> {
    type Output = f64;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f64 {
        let (o, d_out) = (self.b.len() / self.rank, self.d_b.len() / self.rank);
        let mut sum = dot(s, self.d_a, self.a);
        for r in 0..self.rank {
            let d_b = &self.d_b[r * d_out + self.first_col..][..o];
            sum += dot(s, d_b, &self.b[r * o..][..o]);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::Backend,
            testing::{Random, bits, each_cpu, same_for_any_threads},
        },
        *,
    };
    use crate::tensor::Tensor;

    const LINEAR: usize = 1;

    fn bank(n_splits: usize, n_skills: usize, d: usize, o: usize, rank: usize) -> Bank {
        let (d_in, d_out) = (d * n_splits, o * n_splits);
        let a_len = n_skills * d_in * rank;
        Bank {
            linear: LINEAR,
            a_start: 5,
            b_start: 8 + a_len,
            n_splits,
            n_skills,
            d_in,
            d_out,
            rank,
        }
    }

    fn banks() -> Vec<Bank> {
        vec![
            bank(1, 1, 1, 1, 1),
            bank(1, 4, 33, 17, 4),
            bank(2, 3, 64, 65, 8),
            bank(4, 2, 5, 3, 3),
            bank(3, 1, 130, 64, 16),
        ]
    }

    struct Case {
        bank: Bank,
        n_rows: usize,
        params: Tensor<Cpu>,
        weights: Tensor<Cpu>,
        d_a: Tensor<Cpu>,
        d_b: Tensor<Cpu>,
    }

    impl Case {
        /// `values(n)` gives inputs.
        fn new(
            cpu: &Cpu,
            bank: Bank,
            n_rows: usize,
            mut values: impl FnMut(usize) -> Vec<f64>,
        ) -> Self {
            let full = Precision::Full;
            let n = bank.b().end + 3;
            let Bank { d_in, d_out, rank, .. } = bank;
            let (rows, width) = ((LINEAR + 2) * n_rows, bank.n_splits * bank.n_skills);
            Self {
                bank,
                n_rows,
                params: cpu.upload(&values(n), 1, n, full),
                weights: cpu.upload(&values(rows * width), rows, width, full),
                d_a: cpu.upload(&values(n_rows * d_in * rank), n_rows * d_in, rank, full),
                d_b: cpu.upload(&values(n_rows * d_out * rank), n_rows * rank, d_out, full),
            }
        }

        fn stacked(&self) -> Stacked<'_, Cpu> {
            Stacked { bank: self.bank, params: &self.params, weights: &self.weights }
        }

        /// The mixed pair, gradients and weight gradients (started at 1).
        fn run(&self, cpu: &Cpu) -> [Vec<f64>; 4] {
            let pair = cpu.mix(Mix { stacked: self.stacked(), n_rows: self.n_rows });
            let ones = |like: &Tensor<Cpu>| {
                cpu.upload(&vec![1.0; like.len()], like.rows(), like.cols(), Precision::Full)
            };
            let (mut grads, mut d_weights) = (ones(&self.params), ones(&self.weights));
            cpu.unmix(Unmix {
                stacked: self.stacked(),
                d_a: &self.d_a,
                d_b: &self.d_b,
                grads: &mut grads,
                d_weights: &mut d_weights,
            });
            [&pair.a, &pair.b, &grads, &d_weights].map(|t| cpu.download(t))
        }

        /// The same by the definition, in f64, each with the sum of its terms' magnitudes.
        fn oracle(&self, cpu: &Cpu) -> [Vec<(f64, f64)>; 4] {
            let Bank { n_splits, n_skills, d_in, d_out, rank, .. } = self.bank;
            let (d, o) = (d_in / n_splits, d_out / n_splits);
            let [params, weights, d_a, d_b] =
                [&self.params, &self.weights, &self.d_a, &self.d_b].map(|t| cpu.download(t));
            let zero = |n: usize, start: f64| vec![(start, start); n];
            let mut a = zero(d_a.len(), 0.0);
            let mut b = zero(d_b.len(), 0.0);
            let mut grads = zero(params.len(), 1.0);
            let mut d_weights = zero(weights.len(), 1.0);
            let add = |to: &mut (f64, f64), term: f64| *to = (to.0 + term, to.1 + term.abs());
            for row in 0..self.n_rows {
                for (q, s) in (0..n_splits).flat_map(|q| (0..n_skills).map(move |s| (q, s))) {
                    let w_at =
                        (LINEAR * self.n_rows + row) * n_splits * n_skills + q * n_skills + s;
                    let w = weights[w_at];
                    for (i, r) in (0..d).flat_map(|i| (0..rank).map(move |r| (i, r))) {
                        let own = self.bank.a_start + ((q * n_skills + s) * d + i) * rank + r;
                        let mixed = (row * d_in + q * d + i) * rank + r;
                        add(&mut a[mixed], w * params[own]);
                        add(&mut grads[own], w * d_a[mixed]);
                        add(&mut d_weights[w_at], params[own] * d_a[mixed]);
                    }
                    for (r, j) in (0..rank).flat_map(|r| (0..o).map(move |j| (r, j))) {
                        let own = self.bank.b_start + ((q * n_skills + s) * rank + r) * o + j;
                        let mixed = (row * rank + r) * d_out + q * o + j;
                        add(&mut b[mixed], w * params[own]);
                        add(&mut grads[own], w * d_b[mixed]);
                        add(&mut d_weights[w_at], params[own] * d_b[mixed]);
                    }
                }
            }
            [a, b, grads, d_weights]
        }
    }

    #[test]
    fn agrees_with_f64_and_is_exact_on_integers() {
        each_cpu(|cpu| {
            for bank in banks() {
                for n_rows in [0, 1, 3] {
                    for exact in [true, false] {
                        let mut random = Random::new(n_rows as u64);
                        let case = Case::new(cpu, bank, n_rows, |n| match exact {
                            true => random.integers(n, 4),
                            false => random.reals(n),
                        });
                        for (got, want) in case.run(cpu).iter().zip(case.oracle(cpu)) {
                            assert_eq!(got.len(), want.len());
                            for (i, (got, (want, size))) in got.iter().zip(want).enumerate() {
                                let u = if exact { 0.0 } else { f64::powi(2.0, -24) };
                                let bound = 4.0 * u * size;
                                assert!(
                                    (got - want).abs() <= bound,
                                    "{cpu:?} {bank:?} {n_rows} [{i}]: {got}, not {want}"
                                );
                            }
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn threads_and_other_rows_change_nothing() {
        same_for_any_threads(|cpu| {
            let mut random = Random::new(4);
            let case = Case::new(cpu, bank(2, 8, 300, 260, 16), 3, |n| random.reals(n));
            case.run(cpu).concat()
        });
        each_cpu(|cpu| {
            let mut random = Random::new(4);
            let mut case = Case::new(cpu, bank(2, 3, 64, 65, 8), 3, |n| random.reals(n));
            let all = case.run(cpu)[0].clone();
            let width = 6;
            let row = &cpu.download(&case.weights)[(LINEAR * 3 + 2) * width..][..width];
            let weights: Vec<f64> = (0..=LINEAR).flat_map(|_| row).copied().collect();
            case.weights = cpu.upload(&weights, 2, width, Precision::Full);
            let alone = cpu.mix(Mix { stacked: case.stacked(), n_rows: 1 });
            let alone = cpu.download(&alone.a);
            assert_eq!(bits(&alone), bits(&all[2 * alone.len()..]));
        });
    }
}
