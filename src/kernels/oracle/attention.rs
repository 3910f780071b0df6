//! Attention with its score matrix, one sequence and head at a time.

use super::{Oracle, dense::log_sum_exp, kept, sum};
use crate::{
    kernels::ops::{Attended, Attention, AttentionBackward, CacheWrite},
    tensor::Tensor,
};

/// One head of one query token: where its data lies and what it scores each key it sees.
struct Query<'a> {
    /// The token: a row of `q`.
    token: usize,
    head: usize,
    /// First column of the head in `q` and `o`.
    q_col: usize,
    /// First column of the head's keys and values.
    kv_col: usize,
    /// The row in `k` and `v` of the sequence's first key.
    first_key: usize,
    /// The first key that the query sees.
    first_seen: usize,
    /// `scale * q·k_j + bias` of every key `j` that the query sees, from `first_seen` on; counted
    /// from it, as `j` is everywhere below.
    scores: Vec<f64>,
    /// The column of key 0 in dropout's count.
    dropout_col: usize,
    args: &'a Attention<'a, Oracle>,
}

impl Query<'_> {
    /// The row of key `j` in `k` and `v`.
    fn key(&self, j: usize) -> usize {
        self.first_key + self.first_seen + j
    }

    /// What dropout multiplies the probability of key `j` with.
    fn kept(&self, j: usize) -> f64 {
        kept(self.args.dropout, self.token, self.dropout_col + self.first_seen + j)
    }
}

/// Every head of every query token.
fn queries<'a>(args: &'a Attention<'a, Oracle>) -> impl Iterator<Item = Query<'a>> {
    let &Attention { q, k, queries, keys, n_heads, n_kv_heads, head_dim, .. } = args;
    assert_eq!(queries.n(), keys.n());
    assert!(queries.end() <= q.rows && keys.end() <= k.rows);
    assert_eq!((q.cols, k.cols), (n_heads * head_dim, n_kv_heads * head_dim));
    (0..queries.n())
        .flat_map(move |sequence| {
            (0..queries.lens[sequence])
                .flat_map(move |i| (0..n_heads).map(move |h| (sequence, i, h)))
        })
        .map(move |(sequence, i, head)| {
            let (n_queries, n_keys) = (queries.lens[sequence], keys.lens[sequence]);
            let (token, first_key) = (queries.starts[sequence] + i, keys.starts[sequence]);
            let (q_col, kv_col) = (head * head_dim, head / (n_heads / n_kv_heads) * head_dim);
            // The query's own position among the keys is `i + n_keys - n_queries`.
            let n_seen =
                if args.causal { (i + n_keys + 1).saturating_sub(n_queries) } else { n_keys };
            let score = |j: usize| {
                let product =
                    sum(head_dim, |c| q.at(token, q_col + c) * k.at(first_key + j, kv_col + c));
                let bias = args.bias.map_or(0.0, |bias| {
                    bias.table.at(head, bias.zero + j + n_queries - (i + n_keys))
                });
                f64::from(args.scale) * product + bias
            };
            let first_seen = match args.window {
                Some(window) if args.causal => n_seen.saturating_sub(window),
                _ => 0,
            };
            let scores = (first_seen..n_seen).map(score).collect();
            let dropout_col = head * n_keys.next_multiple_of(8);
            Query { token, head, q_col, kv_col, first_key, first_seen, scores, dropout_col, args }
        })
}

/// `o_i = Σ_j dropout(softmax_j(scores)) v_j`; zero, and `lse` minus infinity, where no key is seen.
pub(super) fn attention(args: &Attention<'_, Oracle>) -> Attended<Oracle> {
    let mut o = Tensor::from_fn(args.q.rows, args.q.cols, |_, _| 0.0);
    let mut lse = Tensor::from_fn(args.q.rows, args.n_heads, |_, _| 0.0);
    for query in queries(args) {
        let query_lse = log_sum_exp(&query.scores);
        lse.values_mut()[query.token * args.n_heads + query.head] = query_lse;
        for c in 0..args.head_dim {
            o.values_mut()[query.token * args.q.cols + query.q_col + c] =
                sum(query.scores.len(), |j| {
                    let probability = (query.scores[j] - query_lse).exp();
                    query.kept(j) * probability * args.v.at(query.key(j), query.kv_col + c)
                });
        }
    }
    Attended { o, lse }
}

/// With `p_j = e^(score_j - lse)`, `keep_j` dropout's factor and `d_p_j = keep_j * d_o·v_j`:
/// `d_score_j = p_j * (d_p_j - d_o·o)`, `d_q = scale * Σ_j d_score_j k_j`,
/// `d_k_j = scale * Σ_i d_score_ij q_i`, `d_v_j = Σ_i keep_ij p_ij d_o_i`.
pub(super) fn attention_backward(args: AttentionBackward<'_, Oracle>) -> [Tensor<Oracle>; 3] {
    let AttentionBackward { forward, o, lse, d_o } = args;
    let &Attention { q, k, v, head_dim, .. } = forward;
    let scale = f64::from(forward.scale);
    let zeros = |of: &Tensor<Oracle>| Tensor::<Oracle>::from_fn(of.rows, of.cols, |_, _| 0.0);
    let (mut d_q, mut d_k, mut d_v) = (zeros(q), zeros(k), zeros(v));
    for query in queries(forward) {
        let (token, q_col, kv_col) = (query.token, query.q_col, query.kv_col);
        let inner = sum(head_dim, |c| d_o.at(token, q_col + c) * o.at(token, q_col + c));
        for (j, score) in query.scores.iter().enumerate() {
            let key = query.key(j);
            let p = (score - lse.at(token, query.head)).exp();
            let d_p =
                query.kept(j) * sum(head_dim, |c| d_o.at(token, q_col + c) * v.at(key, kv_col + c));
            let d_score = p * (d_p - inner);
            for c in 0..head_dim {
                let (at_q, at_kv) = (token * q.cols + q_col + c, key * k.cols + kv_col + c);
                d_q.values_mut()[at_q] += scale * d_score * k.at(key, kv_col + c);
                d_k.values_mut()[at_kv] += scale * d_score * q.at(token, q_col + c);
                d_v.values_mut()[at_kv] += query.kept(j) * p * d_o.at(token, q_col + c);
            }
        }
    }
    [d_q, d_k, d_v]
}

/// `cache[rows[i]] = source[i]`.
pub(super) fn cache_write(args: CacheWrite<'_, Oracle>) {
    let CacheWrite { cache, source, rows } = args;
    source.assert_shape(rows.len(), cache.cols);
    let width = cache.cols;
    for (i, &row) in rows.iter().enumerate() {
        for c in 0..width {
            cache.values_mut()[row * width + c] = source.at(i, c);
        }
    }
}
