//! Attention and its backward.

use polytape::{
    dtype::Dtype,
    kernels::{Backend, Precision, ops, oracle::Oracle},
};

use super::{
    common::{
        Batch, Case, Class, Cut, Gen, Inputs, Loaded, Matrix, Op, Output, SMALLEST, U, check,
    },
    dense::activations,
};

#[derive(Clone, Debug)]
pub struct Attention {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub causal: bool,
    pub window: Option<usize>,
    /// The column of distance 0.
    pub bias: Option<usize>,
    pub dropout: Option<f32>,
}

impl Attention {
    /// Inputs: `q, k, v`, and the bias table where there is one as the last.
    fn with<B: Backend, R>(
        &self,
        batch: &Batch,
        inputs: &Loaded<B>,
        run: impl FnOnce(&ops::Attention<'_, B>) -> R,
    ) -> R {
        let bias = self
            .bias
            .map(|zero| ops::RelativeBias { table: inputs.t[inputs.t.len() - 1].clone(), zero });
        let dropout = self.dropout.map(|p| batch.dropout(3, p));
        run(&ops::Attention {
            q: &inputs.t[0],
            k: &inputs.t[1],
            v: &inputs.t[2],
            queries: &ops::Spans::packed(&batch.lens),
            keys: &batch.keys,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            causal: self.causal,
            window: self.window,
            bias: bias.as_ref(),
            dropout: dropout.as_ref(),
        })
    }

    /// For each query token and head: the keys it sees, as rows of `k`.
    fn for_each_query(&self, batch: &Batch, mut visit: impl FnMut(Query)) {
        let mut token = 0;
        for (sequence, &n) in batch.lens.iter().enumerate() {
            let (first_key, n_keys) = (batch.keys.starts[sequence], batch.keys.lens[sequence]);
            for i in 0..n {
                let n_seen = if self.causal { (i + n_keys + 1).saturating_sub(n) } else { n_keys };
                for head in 0..self.n_heads {
                    let q_col = head * self.head_dim;
                    let kv_col = head * self.n_kv_heads / self.n_heads * self.head_dim;
                    let dropout_col = head * n_keys.next_multiple_of(8);
                    // The query stands at key `i + n_keys - n` of its sequence.
                    let bias_col = self.bias.map(|zero| zero + n - i - n_keys);
                    let first_seen = self.window.map_or(0, |window| n_seen.saturating_sub(window));
                    visit(Query {
                        token,
                        head,
                        q_col,
                        kv_col,
                        first_key,
                        first_seen,
                        n_seen,
                        dropout_col,
                        bias_col,
                        is_alone: n == 1,
                    });
                }
                token += 1;
            }
        }
    }
}

/// One head of one query token.
struct Query {
    token: usize,
    head: usize,
    q_col: usize,
    kv_col: usize,
    first_key: usize,
    first_seen: usize,
    /// One past the last key seen.
    n_seen: usize,
    dropout_col: usize,
    /// The bias table's column for key 0.
    bias_col: Option<usize>,
    /// Whether it is its sequence's only query, whose forward is not on tiles.
    is_alone: bool,
}

/// Per key up to the last that a query sees: its score and the score's error.
fn scores(op: &Attention, inputs: &Inputs, query: &Query) -> (Vec<f64>, Vec<f64>) {
    let [q, k] = [&inputs.tensors[0], &inputs.tensors[1]];
    let table = inputs.tensors.last().unwrap();
    let scale = f64::from(op.scale);
    let score = |j: usize| {
        let products = (0..op.head_dim).map(|c| {
            scale * q.at(query.token, query.q_col + c) * k.at(query.first_key + j, query.kv_col + c)
        });
        let bias = query.bias_col.map_or(0.0, |col| table.at(query.head, col + j));
        let score = products.clone().sum::<f64>() + bias;
        (score, 6.0 * U * (products.map(f64::abs).sum::<f64>() + bias.abs()))
    };
    (0..query.n_seen).map(score).unzip()
}

impl Op for Attention {
    const CUT: Cut = Cut::Sequence;

    fn splits_operands(&self) -> bool {
        true
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let ops::Attended { o, lse } = self.with(batch, inputs, |args| backend.attention(args));
        vec![Output::tokens(backend, "o", &o), Output::tokens(backend, "lse", &lse)]
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        let [tolerance, _] = self.bounds(batch, inputs, expected);
        tolerance
    }

    fn rounding_on_tiles(
        &self,
        batch: &Batch,
        inputs: &Inputs,
        expected: &[Output],
    ) -> Option<Vec<Vec<f64>>> {
        let [_, rounding] = self.bounds(batch, inputs, expected);
        Some(rounding)
    }
}

/// Probabilities below it may be zero in the backward, so that their products with gradients are not denormal.
const NEGLIGIBLE: f64 = 1.0 / (1_u128 << 100) as f64;

/// A bound of zero for each element.
fn zeros(expected: &[Output]) -> Vec<Vec<f64>> {
    expected.iter().map(|output| vec![0.0; output.values.len()]).collect()
}

impl Attention {
    /// The tolerance, and what rounding the probabilities to bf16 adds.
    fn bounds(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> [Vec<Vec<f64>>; 2] {
        let v = &inputs.tensors[2];
        let dropout = self.dropout.map(|p| batch.dropout(3, p));
        let [mut bounds, mut rounding] = [zeros(expected), zeros(expected)];
        self.for_each_query(batch, |query| {
            let (scores, errors) = scores(self, inputs, &query);
            let lse = expected[1].values[query.token * self.n_heads + query.head];
            let error = errors.into_iter().skip(query.first_seen).fold(0.0, f64::max);
            let lse_error = error + 6.0 * U * (1.0 + lse.abs());
            bounds[1][query.token * self.n_heads + query.head] =
                if query.n_seen == 0 { 0.0 } else { lse_error };
            for c in 0..self.head_dim {
                let size: f64 = (query.first_seen..query.n_seen)
                    .map(|j| {
                        let kept = dropout.as_ref().map_or(1.0, |dropout| {
                            f64::from(dropout.factor(query.token, query.dropout_col + j))
                        });
                        let v = v.at(query.first_key + j, query.kv_col + c).abs();
                        kept * ((scores[j] - lse).exp() + SMALLEST / U) * v
                    })
                    .sum();
                let at = query.token * self.n_heads * self.head_dim + query.q_col + c;
                bounds[0][at] = ((2.0 * error).exp_m1() + 16.0 * U) * size;
                let unit = if query.is_alone { 0.0 } else { Dtype::Bf16.unit_roundoff() };
                rounding[0][at] = unit * size;
            }
        });
        [bounds, rounding]
    }
}

fn parameters(random: &mut Gen, batch: &mut Batch, class: Class) -> (Attention, Vec<usize>) {
    let n_kv_heads = random.pick(&[1, 2, 3]);
    let n_heads = n_kv_heads * random.pick(&[1, 2, 4]);
    let head_dim = random.pick(&[1, 3, 8, 16, 17, 33, 64, 80, 128, 136]);
    // A key that is masked may be multiplied by its probability, 0, as PyTorch does: a NaN in it
    // may or may not show.
    let causal = random.coin() && class != Class::Special;
    let widest = random.pick(&[3, 3, 30, 140]);
    let window = (causal && random.coin()).then(|| 1 + random.below(widest));
    // Itself, a cache with room between, or other keys altogether.
    let past = |random: &mut Gen| random.below(20);
    let lens: Vec<_> = match random.below(3) {
        0 => batch.lens.clone(),
        1 => batch.lens.iter().map(|len| len + past(random)).collect(),
        _ => batch.lens.iter().map(|_| 1 + random.size(129)).collect(),
    };
    let gap = random.pick(&[0, 0, 7]);
    let starts = lens.iter().scan(gap, |at, len| Some(std::mem::replace(at, *at + len + gap)));
    batch.keys = ops::Spans { starts: starts.collect(), lens };
    let furthest = batch.lens.iter().chain(&batch.keys.lens).max().map_or(1, |max| max + 1);
    let (scale, has_bias) = (random.pick(&[1.0, 0.3]), random.coin());
    let dropout = (class != Class::Special && random.below(3) == 0).then_some(0.2);
    let bias = has_bias.then_some(furthest);
    let op = Attention { n_heads, n_kv_heads, head_dim, scale, causal, window, bias, dropout };
    (op, vec![batch.keys.end() + gap, 2 * furthest + 1])
}

/// Pushes `q, k, v`.
fn push_qkv(
    random: &mut Gen,
    class: Class,
    batch: &Batch,
    op: &Attention,
    n_keys: usize,
    inputs: &mut Inputs,
) {
    let (q, kv) = (op.n_heads * op.head_dim, op.n_kv_heads * op.head_dim);
    let nan = [f64::NAN];
    inputs.tokens(batch, q, activations(random, class, batch.n_tokens() * q, &nan));
    for _ in 0..2 {
        let values = activations(random, class, n_keys * kv, &nan);
        let precision = Precision::Activation;
        inputs.tensors.push(Matrix { values, rows: n_keys, cols: kv, precision, per_token: false });
    }
}

fn push_bias(random: &mut Gen, op: &Attention, columns: usize, inputs: &mut Inputs) {
    if op.bias.is_some() {
        let values = random.values(Class::Uniform, op.n_heads * columns, false);
        inputs.full(op.n_heads, columns, values);
    }
}

pub fn attention(random: &mut Gen, class: Class, mut batch: Batch) -> Case<Attention> {
    let (class, mut inputs) = (class.inexact(), Inputs::default());
    let (op, sizes) = parameters(random, &mut batch, class);
    push_qkv(random, class, &batch, &op, sizes[0], &mut inputs);
    push_bias(random, &op, sizes[1], &mut inputs);
    Case { class, batch, inputs, op }
}

#[test]
fn attentions() {
    check("attention", attention);
}

/// Inputs: `q, k, v, o, lse, d_o`, and the bias table.
#[derive(Debug)]
pub struct AttentionBackward(Attention);

impl Op for AttentionBackward {
    const CUT: Cut = Cut::Sequence;

    fn splits_operands(&self) -> bool {
        true
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [o, lse, d_o] = &inputs.t[3..6] else { unreachable!() };
        let [d_q, d_k, d_v] = self.0.with(batch, inputs, |forward| {
            backend.attention_backward(ops::AttentionBackward { forward, o, lse, d_o })
        });
        vec![
            Output::tokens(backend, "d_q", &d_q),
            Output::whole(backend, "d_k", &d_k),
            Output::whole(backend, "d_v", &d_v),
        ]
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        let [tolerance, _] = self.bounds(batch, inputs, expected);
        tolerance
    }

    fn rounding_on_tiles(
        &self,
        batch: &Batch,
        inputs: &Inputs,
        expected: &[Output],
    ) -> Option<Vec<Vec<f64>>> {
        let [_, rounding] = self.bounds(batch, inputs, expected);
        Some(rounding)
    }
}

impl AttentionBackward {
    /// The tolerance, and what rounding the probabilities and their gradients to bf16 adds.
    fn bounds(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> [Vec<Vec<f64>>; 2] {
        let [q, k, v, o, lse, d_o] = &inputs.tensors[..6] else { unreachable!() };
        let op = &self.0;
        let dropout = op.dropout.map(|p| batch.dropout(3, p));
        let [mut bounds, mut rounding] = [zeros(expected), zeros(expected)];
        let scale = f64::from(op.scale);
        op.for_each_query(batch, |query| {
            let (scores, errors) = scores(op, inputs, &query);
            let (token, q_col, kv_col) = (query.token, query.q_col, query.kv_col);
            let dot = |term: &dyn Fn(usize) -> f64| {
                let terms = (0..op.head_dim).map(term);
                (terms.clone().sum::<f64>(), terms.map(f64::abs).sum::<f64>())
            };
            let lse = lse.at(token, query.head);
            let (inner, inner_size) = dot(&|c| d_o.at(token, q_col + c) * o.at(token, q_col + c));
            for j in query.first_seen..query.n_seen {
                let key = query.first_key + j;
                let kept = dropout
                    .as_ref()
                    .map_or(1.0, |dropout| f64::from(dropout.factor(token, query.dropout_col + j)));
                let (d_p, d_p_size) =
                    dot(&|c| kept * d_o.at(token, q_col + c) * v.at(key, kv_col + c));
                let p = (scores[j] - lse).exp();
                let p_error = p
                    * ((errors[j] + 4.0 * U * (lse.abs() + scores[j].abs())).exp_m1() + 6.0 * U)
                    + NEGLIGIBLE;
                let d_score = p * (d_p - inner).abs();
                let d_score_error = p_error * (d_p - inner).abs()
                    + (p + p_error) * 6.0 * U * (d_p_size + inner_size);
                let d_score_bound = scale * (d_score_error + 6.0 * U * d_score);
                let round = |size: f64| Dtype::Bf16.unit_roundoff() * size;
                for c in 0..op.head_dim {
                    let (at_q, at_kv) = (token * q.cols + q_col + c, key * k.cols + kv_col + c);
                    let [k, q, d_o] =
                        [k.at(key, kv_col + c), q.at(token, q_col + c), d_o.at(token, q_col + c)];
                    bounds[0][at_q] += d_score_bound * k.abs();
                    bounds[1][at_kv] += d_score_bound * q.abs();
                    bounds[2][at_kv] += kept * (p_error + 6.0 * U * p) * d_o.abs();
                    rounding[0][at_q] += round(scale * d_score + d_score_bound) * k.abs();
                    rounding[1][at_kv] += round(scale * d_score + d_score_bound) * q.abs();
                    rounding[2][at_kv] += round(kept * (p + p_error)) * d_o.abs();
                }
            }
        });
        [bounds, rounding]
    }
}

pub fn attention_backward(
    random: &mut Gen,
    class: Class,
    mut batch: Batch,
) -> Case<AttentionBackward> {
    let (class, mut inputs) = (class.inexact(), Inputs::default());
    let (op, sizes) = parameters(random, &mut batch, class);
    push_qkv(random, class, &batch, &op, sizes[0], &mut inputs);
    let cols = inputs.tensors[0].cols;
    let d_o = random.values(class, batch.n_tokens() * cols, false);
    let mut forward = inputs.clone();
    push_bias(random, &op, sizes[1], &mut forward);
    let attended = op.with(&batch, &forward.load(&Oracle), |args| Oracle.attention(args));
    inputs.tokens(&batch, cols, Oracle.download(&attended.o));
    inputs.tokens_full(&batch, op.n_heads, Oracle.download(&attended.lse));
    inputs.tokens(&batch, cols, d_o);
    if op.bias.is_some() {
        inputs.tensors.extend(forward.tensors.pop());
    }
    Case { class, batch, inputs, op: AttentionBackward(op) }
}

#[test]
fn attentions_backward() {
    check("attention_backward", attention_backward);
}
