//! The forward of a single query.

use super::{
    super::{
        elementwise::{load, store},
        isa::{Element, ElementMut, LANES, Simd, SimdOp},
        math::exp,
    },
    BLOCK, Pair, carve,
    scores::{first_lanes, score, without_lanes},
};

/// The forward of a single query: K and V are read where they lie.
pub(super) struct Decode<'a, T: ElementMut> {
    pub(super) pair: Pair<'a, T>,
    /// The pieces of the group's heads.
    pub(super) o: Vec<&'a mut [T::Item]>,
    pub(super) lse: Vec<&'a mut [f32]>,
    pub(super) scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Decode<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        const COLUMNS: usize = 4;
        /// Keys that are fetched before their turn.
        const AHEAD: usize = 16;
        let Self { pair, mut o, mut lse, mut scratch } = self;
        let (from, limit) = (pair.first(0) / LANES * LANES, pair.limit(0));
        let n_vectors = pair.head_dim.div_ceil(LANES);
        let q = carve(&mut scratch, n_vectors * LANES).as_chunks_mut::<LANES>().0;
        let scores = carve(&mut scratch, limit.next_multiple_of(LANES));
        for (g, (o, lse)) in o.iter_mut().zip(&mut lse).enumerate() {
            let head = pair.head(g);
            let row = pair.of_query(pair.q, head, 0);
            for (i, q) in q.iter_mut().enumerate() {
                s.store(load::<S, T>(s, row, i), q);
            }
            for (j, score) in scores.iter_mut().enumerate().take(limit).skip(from) {
                // A head's piece of a row is too short, and the next row's too far away, for prefetchers.
                s.prefetch(pair.of_key(pair.k, (j + AHEAD).min(limit - 1)));
                if g == 0 {
                    s.prefetch(pair.of_key(pair.v, j));
                }
                let (row, tail) = pair.of_key(pair.k, j).as_chunks::<LANES>();
                let mut sum = s.splat(0.0);
                for (q, k) in q.iter().zip(row) {
                    sum = s.fma(s.load(q), T::load(s, k), sum);
                }
                if !tail.is_empty() {
                    sum = s.fma(s.load(&q[n_vectors - 1]), T::load_part(s, tail), sum);
                }
                *score = s.sum(sum);
            }
            let (sum, log) = softmax_of_one(s, &pair, head, scores, limit);
            lse[0] = log;
            let divisor = s.splat(sum);
            for first in (0..n_vectors).step_by(COLUMNS) {
                let start = first * LANES;
                let end = pair.head_dim.min(start + COLUMNS * LANES);
                let mut sums = [s.splat(0.0); COLUMNS];
                for (j, &p) in scores.iter().enumerate().take(limit).skip(from) {
                    let p = s.splat(p);
                    let (row, tail) = pair.of_key(pair.v, j)[start..end].as_chunks::<LANES>();
                    for (sum, v) in sums.iter_mut().zip(row) {
                        *sum = s.fma(p, T::load(s, v), *sum);
                    }
                    if !tail.is_empty() {
                        sums[row.len()] = s.fma(p, T::load_part(s, tail), sums[row.len()]);
                    }
                }
                let o = &mut o[start..end];
                for (i, &sum) in sums.iter().enumerate().take((end - start).div_ceil(LANES)) {
                    store::<S, T>(s, s.div(sum, divisor), o, i);
                }
            }
        }
    }
}

/// Turns the raw scores of the only query into unnormalised probabilities after dropout. Gives
/// their sum before dropout and `lse`.
#[inline(always)]
fn softmax_of_one<S: Simd, T: Element>(
    s: S,
    pair: &Pair<'_, T>,
    head: usize,
    scores: &mut [f32],
    limit: usize,
) -> (f32, f32) {
    if limit == 0 {
        return (1.0, f32::NEG_INFINITY);
    }
    scores[limit..].fill(0.0);
    let bias = pair.bias(head, 0);
    let (from, vectors) = (pair.first(0), scores.as_chunks_mut::<LANES>().0);
    let mut most = s.splat(f32::NEG_INFINITY);
    for (i, x) in vectors.iter_mut().enumerate().skip(from / LANES) {
        let v = score(s, s.load(x), pair.args.scale, bias, i);
        let mut v = first_lanes(s, limit - i * LANES, v, f32::NEG_INFINITY);
        if from > i * LANES {
            v = without_lanes(s, from - i * LANES, v, f32::NEG_INFINITY);
        }
        most = s.max(most, v);
        s.store(v, x);
    }
    let most = s.max_lane(most);
    let mut sums = s.splat(0.0);
    for x in vectors.iter_mut().skip(from / LANES) {
        let p = exp(s, s.sub(s.load(x), s.splat(most)));
        sums = s.add(sums, p);
        s.store(p, x);
    }
    if pair.args.dropout.is_some() {
        for (b, scores) in scores[..limit].chunks_mut(BLOCK).enumerate() {
            let kept = pair.factors::<BLOCK>(head, 0, b * BLOCK, scores.len());
            scores.iter_mut().zip(kept).for_each(|(p, kept)| *p *= kept);
        }
    }
    let sum = s.sum(sums);
    (sum, most + sum.ln())
}
