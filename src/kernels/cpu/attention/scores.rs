//! From scores to probabilities, and to their gradients.

use std::ops::Range;

use super::{
    super::{
        elementwise::load,
        isa::{Element, LANES, Simd},
        math::{exp, exp_from},
    },
    Pair,
};

/// The number of a vector's lane.
pub(super) const LANE: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// `v` in the first `n` lanes, `fill` in the others.
#[inline(always)]
pub(super) fn first_lanes<S: Simd>(s: S, n: usize, v: S::V, fill: f32) -> S::V {
    s.select_lt(s.load(&LANE), s.splat(n as f32), v, s.splat(fill))
}

/// `fill` in the first `n` lanes, `v` in the others.
#[inline(always)]
pub(super) fn without_lanes<S: Simd>(s: S, n: usize, v: S::V, fill: f32) -> S::V {
    s.select_lt(s.load(&LANE), s.splat(n as f32), s.splat(fill), v)
}

/// Vector `i` of scaled scores with their bias.
#[inline(always)]
pub(super) fn score<S: Simd>(s: S, x: S::V, scale: f32, bias: Option<&[f32]>, i: usize) -> S::V {
    match bias {
        Some(bias) => s.fma(x, s.splat(scale), load::<S, f32>(s, bias, i)),
        None => s.mul(x, s.splat(scale)),
    }
}

/// Zeros in row `m` of a strip of scores, up to `limit`.
#[inline(always)]
pub(super) fn clear<const MR: usize, const W: usize>(
    strip: &mut [[[f32; W]; MR]],
    m: usize,
    limit: usize,
) {
    for block in strip.iter_mut().take(limit.div_ceil(W)) {
        block[m].fill(0.0);
    }
}

/// Turns row `m` of a strip of scores, that of query `i`, into unnormalised probabilities after
/// dropout, zero beyond what the query sees. `tile` is what the tile's queries see together: first
/// block and last key. Gives the sum before dropout and `lse`.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Element, const MR: usize, const W: usize>(
    s: S,
    pair: &Pair<'_, T>,
    head: usize,
    i: usize,
    strip: &mut [[[f32; W]; MR]],
    m: usize,
    tile: Range<usize>,
) -> (f32, f32) {
    let (from, limit) = (pair.first(i), pair.limit(i));
    if limit == 0 {
        clear(strip, m, tile.end);
        return (1.0, f32::NEG_INFINITY);
    }
    let bias = pair.bias(head, i);
    let mut most = s.splat(f32::NEG_INFINITY);
    for (b, block) in strip.iter_mut().enumerate().take(limit.div_ceil(W)).skip(tile.start) {
        for (j, x) in block[m].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let vector = b * (W / LANES) + j;
            let left = limit.saturating_sub(vector * LANES);
            if left == 0 {
                break;
            }
            let mut v = score(s, s.load(x), pair.args.scale, bias, vector);
            if left < LANES {
                v = first_lanes(s, left, v, f32::NEG_INFINITY);
            }
            if from > vector * LANES {
                v = without_lanes(s, from - vector * LANES, v, f32::NEG_INFINITY);
            }
            most = s.max(most, v);
            s.store(v, x);
        }
    }
    let most = s.max_lane(most);
    let mut sums = s.splat(0.0);
    for (b, block) in strip.iter_mut().enumerate().take(tile.end.div_ceil(W)).skip(tile.start) {
        let row = &mut block[m];
        let seen = limit.saturating_sub(b * W).min(W);
        let n_vectors = seen.div_ceil(LANES);
        let (vectors, unseen) = row.as_chunks_mut::<LANES>().0.split_at_mut(n_vectors);
        for x in &mut *vectors {
            let p = exp(s, s.sub(s.load(x), s.splat(most)));
            sums = s.add(sums, p);
            s.store(p, x);
        }
        unseen.iter_mut().for_each(|x| *x = [0.0; LANES]);
        if pair.args.dropout.is_some() {
            let kept = pair.factors::<W>(head, i, b * W, seen);
            for (x, kept) in vectors.iter_mut().zip(kept.as_chunks::<LANES>().0) {
                s.store(s.mul(s.load(x), s.load(kept)), x);
            }
        }
    }
    let sum = s.sum(sums);
    (sum, most + sum.ln())
}

/// Logarithm of the least probability in the backward, 2^-100: products of smaller ones with gradients would be denormal,
/// which CPUs take a hundred cycles for.
const LEAST: f32 = -69.314_72;

/// What the backward knows of a query.
pub(super) struct Query {
    pub(super) head: usize,
    pub(super) i: usize,
    pub(super) lse: f32,
    /// `D`.
    pub(super) dot: f32,
}

/// From a row of a block, with raw scores in `p` and gradients of the probabilities after dropout
/// in `d_s`, to probabilities after dropout and gradients of the scores; zeros in what the query
/// does not see of the first `n` columns.
#[inline(always)]
pub(super) fn score_gradients<S: Simd, T: Element, const W: usize>(
    s: S,
    pair: &Pair<'_, T>,
    query: Query,
    first_key: usize,
    n: usize,
    p: &mut [f32; W],
    d_s: &mut [f32; W],
) {
    let Query { head, i, lse, dot } = query;
    let seen = pair.limit(i).saturating_sub(first_key).min(n);
    let unseen = pair.first(i).saturating_sub(first_key);
    let bias = pair.bias(head, i).map(|bias| bias.get(first_key..).unwrap_or_default());
    let kept = pair.args.dropout.map(|_| pair.factors::<W>(head, i, first_key, seen));
    let (lse, dot) = (s.splat(lse), s.splat(dot));
    let vectors = p.as_chunks_mut::<LANES>().0.iter_mut().zip(d_s.as_chunks_mut::<LANES>().0);
    for (j, (p, d_s)) in vectors.enumerate().take(n / LANES) {
        let left = seen.saturating_sub(j * LANES);
        if left == 0 {
            (*p, *d_s) = ([0.0; LANES], [0.0; LANES]);
            continue;
        }
        let x = s.sub(score(s, s.load(p), pair.args.scale, bias, j), lse);
        let mut value = exp_from(s, x, LEAST);
        let mut d_p = s.load(d_s);
        let kept = kept.as_ref().map(|kept| s.load(&kept.as_chunks::<LANES>().0[j]));
        if let Some(kept) = kept {
            d_p = s.mul(d_p, kept);
        }
        let mut gradient = s.mul(value, s.sub(d_p, dot));
        if let Some(kept) = kept {
            value = s.mul(value, kept);
        }
        if left < LANES {
            value = first_lanes(s, left, value, 0.0);
            gradient = first_lanes(s, left, gradient, 0.0);
        }
        if unseen > j * LANES {
            value = without_lanes(s, unseen - j * LANES, value, 0.0);
            gradient = without_lanes(s, unseen - j * LANES, gradient, 0.0);
        }
        s.store(value, p);
        s.store(gradient, d_s);
    }
}

/// `Σ a b` over a row.
#[inline(always)]
pub(super) fn dot_rows<S: Simd, T: Element>(s: S, a: &[T::Item], b: &[T::Item]) -> f32 {
    let mut sum = s.splat(0.0);
    for i in 0..a.len().div_ceil(LANES) {
        sum = s.fma(load::<S, T>(s, a, i), load::<S, T>(s, b, i), sum);
    }
    s.sum(sum)
}
