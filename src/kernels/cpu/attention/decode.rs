//! The forward of a single query.

use super::{
    super::{
        elementwise::{load, store},
        isa::{Element, ElementMut, LANES, Simd, SimdOp},
        math::exp,
        matrix::MatrixMut,
    },
    BLOCK, Pair, carve,
    scores::{first_lanes, score, without_lanes},
};

/// The forward of a single query, for some neighbouring key-value heads: K and V are read once each, where they lie, row by
/// row. (Head by head, two lines of a row at a time, memory gave a third of what it has.)
pub(super) struct Decode<'a, T: ElementMut> {
    pub(super) pair: Pair<'a, T>,
    /// The heads' columns of the query's row.
    pub(super) o: MatrixMut<'a, T::Item>,
    pub(super) lse: MatrixMut<'a, f32>,
    pub(super) scratch: &'a mut [f32],
}

/// Bytes of a task's rows that are fetched before their turn.
const BYTES_AHEAD: usize = 8192;

impl<T: ElementMut> SimdOp for Decode<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self { pair, mut o, mut lse, mut scratch } = self;
        let (from, limit) = (pair.first(0) / LANES * LANES, pair.limit(0));
        let n_vectors = pair.head_dim.div_ceil(LANES);
        let (n_heads, n_scores) = (lse.cols(), limit.next_multiple_of(LANES));
        let q = carve(&mut scratch, n_heads * n_vectors * LANES).as_chunks_mut::<LANES>().0;
        let sums = carve(&mut scratch, n_heads * n_vectors * LANES).as_chunks_mut::<LANES>().0;
        let divisors = carve(&mut scratch, n_heads);
        let scores = carve(&mut scratch, n_heads * n_scores);
        for (g, q) in q.chunks_mut(n_vectors).enumerate() {
            let row = pair.of_query(pair.q, pair.head(g), 0);
            for (i, q) in q.iter_mut().enumerate() {
                s.store(load::<S, T>(s, row, i), q);
            }
        }
        for j in from..limit {
            for (kv, q) in q.chunks(pair.group * n_vectors).enumerate() {
                let row = pair.row_ahead(s, pair.k, kv, j);
                for (g, q) in q.chunks(n_vectors).enumerate() {
                    scores[(kv * pair.group + g) * n_scores + j] = dot::<S, T>(s, q, row);
                }
            }
        }
        for (g, (divisor, lse)) in divisors.iter_mut().zip(lse.row_mut(0)).enumerate() {
            let scores = &mut scores[g * n_scores..][..n_scores];
            (*divisor, *lse) = softmax_of_one(s, &pair, pair.head(g), scores, limit);
        }
        sums.fill([0.0; LANES]);
        for first in (from..limit).step_by(KEYS) {
            let n = KEYS.min(limit - first);
            for (kv, sums) in sums.chunks_mut(pair.group * n_vectors).enumerate() {
                let mut rows: [&[T::Item]; KEYS] = [&[]; KEYS];
                for (i, row) in rows.iter_mut().enumerate().take(n) {
                    *row = pair.row_ahead(s, pair.v, kv, first + i);
                }
                for (g, sums) in sums.chunks_mut(n_vectors).enumerate() {
                    let p = &scores[(kv * pair.group + g) * n_scores + first..][..n];
                    add_rows::<S, T>(s, p, &rows[..n], sums);
                }
            }
        }
        let heads = o.row_mut(0).chunks_mut(pair.head_dim).zip(sums.chunks(n_vectors));
        for ((o, sums), &divisor) in heads.zip(&*divisors) {
            let divisor = s.splat(divisor);
            for (i, sum) in sums.iter().enumerate() {
                store::<S, T>(s, s.div(s.load(sum), divisor), o, i);
            }
        }
    }
}

/// Keys whose values are added at a time.
const KEYS: usize = 4;

impl<'a, T: Element> Pair<'a, T> {
    /// Key `j`'s row of `k` or `v` for the task's key-value head number `kv`. Fetches a later one.
    #[inline(always)]
    fn row_ahead<S: Simd>(
        &self,
        s: S,
        matrix: &'a [T::Item],
        kv: usize,
        j: usize,
    ) -> &'a [T::Item] {
        let head = Self { kv_head: self.kv_head + kv, ..*self };
        let ahead = BYTES_AHEAD / size_of::<T::Item>() / (self.n_kv_heads * self.head_dim);
        let later = head.of_key(matrix, (j + ahead.max(1)).min(self.n_keys - 1));
        s.prefetch(later);
        head.of_key(matrix, j)
    }
}

/// `q·k`.
#[inline(always)]
fn dot<S: Simd, T: Element>(s: S, q: &[[f32; LANES]], row: &[T::Item]) -> f32 {
    let (row, tail) = row.as_chunks::<LANES>();
    let mut sum = s.splat(0.0);
    for (q, k) in q.iter().zip(row) {
        sum = s.fma(s.load(q), T::load(s, k), sum);
    }
    if !tail.is_empty() {
        sum = s.fma(s.load(&q[row.len()]), T::load_part(s, tail), sum);
    }
    s.sum(sum)
}

/// `sums += Σ_j p_j v_j`, in the order of `j`.
#[inline(always)]
fn add_rows<S: Simd, T: Element>(s: S, p: &[f32], rows: &[&[T::Item]], sums: &mut [[f32; LANES]]) {
    const COLUMNS: usize = 4;
    for (c, sums) in sums.chunks_mut(COLUMNS).enumerate() {
        let mut columns = [s.splat(0.0); COLUMNS];
        for (column, sum) in columns.iter_mut().zip(&*sums) {
            *column = s.load(sum);
        }
        for (&p, row) in p.iter().zip(rows) {
            let p = s.splat(p);
            let end = row.len().min((c + 1) * COLUMNS * LANES);
            let (row, tail) = row[c * COLUMNS * LANES..end].as_chunks::<LANES>();
            for (column, v) in columns.iter_mut().zip(row) {
                *column = s.fma(p, T::load(s, v), *column);
            }
            if !tail.is_empty() {
                columns[row.len()] = s.fma(p, T::load_part(s, tail), columns[row.len()]);
            }
        }
        for (&column, sum) in columns.iter().zip(sums) {
            s.store(column, sum);
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
