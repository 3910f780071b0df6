use std::array;

use super::{
    super::{
        super::Backend,
        checks::amx,
        isa::Isa,
        testing::{
            Random, activation, assert_close, bits, dropout_of, each_cpu, same_for_any_threads,
        },
    },
    *,
};
use crate::dtype::Dtype;

const U: f64 = 1.0 / (1u64 << 24) as f64;

/// A shape: sequences as (queries, keys), rows left free before each sequence's keys, and so on.
#[derive(Clone, Debug)]
struct Case {
    lens: Vec<(usize, usize)>,
    gap: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    causal: bool,
    window: Option<usize>,
    bias: bool,
    dropout: f32,
}

impl Case {
    fn plain(lens: &[(usize, usize)], head_dim: usize) -> Self {
        Self {
            lens: lens.to_vec(),
            gap: 0,
            n_heads: 2,
            n_kv_heads: 2,
            head_dim,
            causal: false,
            window: None,
            bias: false,
            dropout: 0.0,
        }
    }
}

/// Inputs of a case, on a backend and as it has them.
struct Data {
    case: Case,
    queries: Spans,
    keys: Spans,
    tensors: [Tensor<Cpu>; 4],
    /// q, k, v, d_o.
    values: [Vec<f64>; 4],
    bias: Option<RelativeBias<Cpu>>,
    bias_values: Vec<f64>,
    dropout: Option<Dropout>,
    scale: f32,
}

impl Data {
    fn new(cpu: &Cpu, case: &Case) -> Self {
        let mut random = Random::new(case.head_dim as u64);
        let query_lens: Vec<_> = case.lens.iter().map(|l| l.0).collect();
        let queries = Spans::packed(&query_lens);
        let mut keys = Spans::default();
        let mut end = 0;
        for &(_, n_keys) in &case.lens {
            keys.starts.push(end + case.gap);
            keys.lens.push(n_keys);
            end += case.gap + n_keys;
        }
        let key_rows = end + case.gap;
        let shapes = [(queries.end(), case.n_heads), (key_rows, case.n_kv_heads)];
        let pairs: [_; 4] = array::from_fn(|i| {
            let (rows, heads) = shapes[usize::from(i == 1 || i == 2)];
            let (tensor, mut values) = activation(cpu, &mut random, rows, heads * case.head_dim);
            if i == 0 || i == 3 || case.gap == 0 {
                return (tensor, values);
            }
            // What lies between the sequences must not be read.
            let width = heads * case.head_dim;
            for row in 0..rows {
                if !(0..keys.n())
                    .any(|s| (keys.starts[s]..keys.starts[s] + keys.lens[s]).contains(&row))
                {
                    values[row * width..][..width].fill(f64::NAN);
                }
            }
            (cpu.upload(&values, rows, width, Precision::Activation), values)
        });
        let most = case.lens.iter().map(|l| l.0.max(l.1)).max().unwrap_or(0);
        let distances = 2 * most + 3;
        let table = random.reals(case.n_heads * distances);
        let table = cpu.upload(&table, case.n_heads, distances, Precision::Full);
        let bias_values = cpu.download(&table);
        Self {
            queries,
            keys,
            tensors: pairs.each_ref().map(|p| p.0.clone()),
            values: pairs.map(|p| p.1),
            bias: case.bias.then(|| RelativeBias { table, zero: most + 1 }),
            bias_values,
            dropout: (case.dropout > 0.0).then(|| dropout_of(case.dropout, shapes[0].0)),
            scale: (1.5 / (case.head_dim as f64).sqrt()) as f32,
            case: case.clone(),
        }
    }

    fn args(&self) -> Attention<'_, Cpu> {
        Attention {
            q: &self.tensors[0],
            k: &self.tensors[1],
            v: &self.tensors[2],
            queries: &self.queries,
            keys: &self.keys,
            n_heads: self.case.n_heads,
            n_kv_heads: self.case.n_kv_heads,
            head_dim: self.case.head_dim,
            scale: self.scale,
            causal: self.case.causal,
            window: self.case.window,
            bias: self.bias.as_ref(),
            dropout: self.dropout.as_ref(),
        }
    }

    /// Calls `see` for each (query token, head, query's place, key rows with score and factor).
    fn each_query(&self, mut see: impl FnMut(usize, usize, &[(usize, f64, f64)])) {
        let Case { n_heads, n_kv_heads, head_dim, causal, window, .. } = self.case;
        let [q, k, ..] = &self.values;
        for (sequence, &(n_queries, n_keys)) in self.case.lens.iter().enumerate() {
            for (i, head) in (0..n_queries).flat_map(|i| (0..n_heads).map(move |h| (i, h))) {
                let token = self.queries.starts[sequence] + i;
                let position = (i + n_keys) as isize - n_queries as isize;
                let mut keys = Vec::new();
                for j in 0..n_keys {
                    let past = position - j as isize;
                    if causal && (past < 0 || window.is_some_and(|w| past >= w as isize)) {
                        continue;
                    }
                    let row = self.keys.starts[sequence] + j;
                    let kv = head / (n_heads / n_kv_heads);
                    let q = &q[(token * n_heads + head) * head_dim..][..head_dim];
                    let k = &k[(row * n_kv_heads + kv) * head_dim..][..head_dim];
                    let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                    let mut score = f64::from(self.scale) * dot;
                    if let Some(bias) = &self.bias {
                        let col = (bias.zero + j) as isize - position;
                        score += self.bias_values[head * bias.table.cols() + col as usize];
                    }
                    let col = head * n_keys.next_multiple_of(8) + j;
                    let factor = |d: &Dropout| f64::from(d.factor(token, col));
                    keys.push((row, score, self.dropout.as_ref().map_or(1.0, factor)));
                }
                see(token, head, &keys);
            }
        }
    }

    /// `o` with the sum of its terms' magnitudes, and `lse`.
    fn forward(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let Case { n_heads, n_kv_heads, head_dim, .. } = self.case;
        let v = &self.values[2];
        let mut o = vec![0.0; self.values[0].len()];
        let mut size = o.clone();
        let mut lse = vec![f64::NEG_INFINITY; self.queries.end() * n_heads];
        self.each_query(|token, head, keys| {
            let most = keys.iter().map(|k| k.1).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = keys.iter().map(|k| (k.1 - most).exp()).sum();
            if !keys.is_empty() {
                lse[token * n_heads + head] = most + sum.ln();
            }
            let kv = head / (n_heads / n_kv_heads);
            for &(row, score, factor) in keys {
                let p = factor * (score - most).exp() / sum;
                for c in 0..head_dim {
                    let term = p * v[(row * n_kv_heads + kv) * head_dim + c];
                    o[(token * n_heads + head) * head_dim + c] += term;
                    size[(token * n_heads + head) * head_dim + c] += term.abs();
                }
            }
        });
        (o, size, lse)
    }

    /// `d_q, d_k, d_v` with the sums of their terms' magnitudes, from `o` and `lse` as given.
    fn backward(&self, o: &[f64], lse: &[f64]) -> [Vec<(f64, f64)>; 3] {
        let Case { n_heads, n_kv_heads, head_dim, .. } = self.case;
        let [q, k, v, d_o] = &self.values;
        let mut out = [q, k, v].map(|like| vec![(0.0, 0.0); like.len()]);
        self.each_query(|token, head, keys| {
            let kv = head / (n_heads / n_kv_heads);
            let at_q = (token * n_heads + head) * head_dim;
            let dot: f64 = (0..head_dim).map(|c| d_o[at_q + c] * o[at_q + c]).sum();
            let dot_size: f64 = (0..head_dim).map(|c| (d_o[at_q + c] * o[at_q + c]).abs()).sum();
            for &(row, score, factor) in keys {
                let at_k = (row * n_kv_heads + kv) * head_dim;
                let p = (score - lse[token * n_heads + head]).exp();
                let terms = (0..head_dim).map(|c| factor * d_o[at_q + c] * v[at_k + c]);
                let d_p: f64 = terms.clone().sum();
                let d_p_size: f64 = terms.map(f64::abs).sum();
                let d_s = f64::from(self.scale) * p * (d_p - dot);
                let d_s_size = f64::from(self.scale) * p * (d_p_size + dot_size);
                for c in 0..head_dim {
                    let add = |to: &mut (f64, f64), a: f64, a_size: f64, b: f64| {
                        *to = (to.0 + a * b, to.1 + a_size * b.abs());
                    };
                    add(&mut out[0][at_q + c], d_s, d_s_size, k[at_k + c]);
                    add(&mut out[1][at_k + c], d_s, d_s_size, q[at_q + c]);
                    add(&mut out[2][at_k + c], p * factor, p * factor, d_o[at_q + c]);
                }
            }
        });
        out
    }
}

fn run(cpu: &Cpu, data: &Data) -> (Attended<Cpu>, [Tensor<Cpu>; 3]) {
    let forward = data.args();
    let out = cpu.attention(&forward);
    let d = cpu.attention_backward(AttentionBackward {
        forward: &forward,
        o: &out.o,
        lse: &out.lse,
        d_o: &data.tensors[3],
    });
    (out, d)
}

fn check_case(cpu: &Cpu, case: &Case) {
    let data = Data::new(cpu, case);
    let (out, d) = run(cpu, &data);
    let (o, size, lse) = data.forward();
    // Probabilities and their gradients are rounded to bf16 on their way into tiles.
    let on_tiles = matches!(cpu.isa, Isa::Amx(_)) && cpu.compute == Dtype::Bf16;
    let rounding = 48.0 * U + if on_tiles { Dtype::Bf16.unit_roundoff() } else { 0.0 };
    assert_close(cpu, &out.o, &o, |i| rounding * size[i]);
    let got = cpu.download(&out.lse);
    for (got, want) in got.iter().zip(&lse) {
        let close = (got - want).abs() <= 16.0 * U * (1.0 + want.abs());
        assert!(close || got == want, "{cpu:?} {case:?}: lse {got}, not {want}");
    }
    let want = data.backward(&cpu.download(&out.o), &got);
    for (d, want) in d.iter().zip(want) {
        let values: Vec<f64> = want.iter().map(|w| w.0).collect();
        assert_close(cpu, d, &values, |i| rounding * want[i].1);
    }
}

#[test]
fn agrees_with_f64() {
    let sizes: &[&[(usize, usize)]] = &[
        &[],
        &[(0, 0)],
        &[(1, 1)],
        &[(2, 2), (0, 3), (5, 5), (1, 7)],
        &[(6, 6), (7, 7), (15, 17)],
        &[(16, 16), (33, 33)],
        &[(1, 63), (3, 65), (64, 64)],
        &[(97, 97)],
        &[(65, 129), (12, 200)],
        &[(3, 0), (4, 2)],
        &[(200, 216)], // Blocks of keys that end inside a register tile.
    ];
    each_cpu(|cpu| {
        for (i, lens) in sizes.iter().enumerate() {
            let head_dim = [8, 12, 16, 33, 64, 1, 64, 16, 8, 8, 8][i];
            let plain = Case::plain(lens, head_dim);
            let cases = [
                plain.clone(),
                Case { causal: true, n_heads: 4, gap: 3, ..plain.clone() },
                Case { causal: true, window: Some(1 + 13 * i), ..plain.clone() },
                Case { bias: true, n_heads: 3, n_kv_heads: 1, dropout: 0.3, ..plain.clone() },
                Case { bias: true, causal: true, gap: 2, dropout: 0.1, ..plain },
            ];
            for case in cases {
                check_case(cpu, &case);
            }
        }
    });
}

/// Around the blocks of 32 queries and 128 keys, more of them than are summed at once, columns of two blocks.
#[test]
fn blocks_of_tiles() {
    let Some(cpu) = amx() else { return };
    let plain = Case::plain(&[(33, 129), (3, 0), (1, 9), (16, 16)], 16);
    check_case(&cpu, &Case { bias: true, dropout: 0.2, gap: 3, ..plain.clone() });
    check_case(&cpu, &Case { causal: true, n_heads: 4, ..plain });
    let long = Case { n_heads: 1, n_kv_heads: 1, ..Case::plain(&[(130, 290)], 8) };
    check_case(&cpu, &Case { causal: true, window: Some(20), ..long.clone() });
    check_case(&cpu, &Case { causal: true, ..long });
    let wide = Case { n_heads: 1, n_kv_heads: 1, ..Case::plain(&[(18, 40)], 145) };
    check_case(&cpu, &Case { causal: true, ..wide });
}

/// Single queries alone: the heads of a sequence together, and cut into one, some and all parts; keys on either side of those
/// whose values are added together.
#[test]
fn single_queries() {
    let lens =
        [&[(1, 1), (0, 3), (1, 0), (1, 3), (1, 4), (1, 5)][..], &[(1, 300)], &[(1, 97), (1, 31)]];
    each_cpu(|cpu| {
        for (i, lens) in lens.into_iter().enumerate() {
            let plain = Case::plain(lens, [13, 64, 80][i]);
            for (n_heads, n_kv_heads) in [(12, 12), (12, 4), (7, 7), (6, 1)] {
                let plain = Case { n_heads, n_kv_heads, ..plain.clone() };
                check_case(cpu, &Case { bias: true, dropout: 0.3, gap: 2, ..plain.clone() });
                check_case(cpu, &Case { causal: true, window: Some(40), ..plain });
            }
        }
    });
}

#[test]
fn wide_heads() {
    let cpu = Cpu::with_isa(Isa::detect().expect("an instruction set"), Dtype::F32, 2);
    let cpu = cpu.expect("a backend").poisoned();
    for head_dim in [80, 128, 130] {
        let case = Case { causal: true, ..Case::plain(&[(1, 40), (50, 50)], head_dim) };
        check_case(&cpu, &case);
    }
}

/// The f64 backward above is the derivative of the f64 forward above.
#[test]
#[allow(clippy::needless_range_loop)] // A step in a place of the data, and a look at the same place of `d`.
fn backward_is_the_difference_quotient() {
    let cpu = Cpu::with_isa(Isa::detect().expect("an instruction set"), Dtype::F32, 1);
    let cpu = cpu.expect("a backend");
    let case = Case {
        causal: true,
        bias: true,
        dropout: 0.3,
        n_heads: 4,
        ..Case::plain(&[(2, 3), (4, 4)], 3)
    };
    let mut data = Data::new(&cpu, &case);
    let (o, _, lse) = data.forward();
    let d = data.backward(&o, &lse);
    let d_o = data.values[3].clone();
    for input in 0..3 {
        for i in 0..data.values[input].len() {
            let mut objective = |step: f64| {
                let old = data.values[input][i];
                data.values[input][i] += step;
                let o = data.forward().0;
                data.values[input][i] = old;
                o.iter().zip(&d_o).map(|(a, b)| a * b).sum::<f64>()
            };
            let want = (objective(1e-5) - objective(-1e-5)) / 2e-5;
            assert!((d[input][i].0 - want).abs() < 1e-8, "{input} {i}");
        }
    }
}

/// Equal scores over 2^n keys: the mean of integers, without error.
#[test]
fn exact_means() {
    each_cpu(|cpu| {
        for (n_queries, n_keys) in [(1, 64), (7, 64), (1, 128), (13, 128)] {
            let mut data = Data::new(cpu, &Case::plain(&[(n_queries, n_keys)], 16));
            let zero = vec![0.0; data.values[0].len()];
            data.tensors[0] = cpu.upload(&zero, n_queries, 32, Precision::Activation);
            data.values[0] = zero;
            let v = Random::new(5).integers(n_keys * 32, 2);
            data.tensors[2] = cpu.upload(&v, n_keys, 32, Precision::Activation);
            data.values[2] = v;
            let got = cpu.attention(&data.args());
            assert_close(cpu, &got.o, &data.forward().0, |_| 0.0);
        }
    });
}

#[test]
fn threads_and_other_sequences_change_nothing() {
    let lens = [(20, 20), (65, 65), (1, 30), (130, 130)];
    let single = [(1, 30), (1, 200), (1, 1)]; // Cut by the number of threads.
    for case in [
        Case { bias: true, ..Case::plain(&lens, 16) },
        Case { causal: true, n_heads: 4, dropout: 0.2, ..Case::plain(&lens, 16) },
        Case { bias: true, n_heads: 12, n_kv_heads: 6, ..Case::plain(&single, 64) },
    ] {
        same_for_any_threads(|cpu| {
            let data = Data::new(cpu, &case);
            let (out, [d_q, d_k, d_v]) = run(cpu, &data);
            let all = [&out.o, &out.lse, &d_q, &d_k, &d_v].map(|t| cpu.download(t));
            for (sequence, &(n_queries, n_keys)) in case.lens.iter().enumerate() {
                let (first_query, first_key) =
                    (data.queries.starts[sequence], data.keys.starts[sequence]);
                let mut alone = Data::new(cpu, &case);
                alone.case.lens = vec![(n_queries, n_keys)];
                alone.queries = Spans::packed(&[n_queries]);
                alone.keys = Spans::packed(&[n_keys]);
                for (i, (tensor, values)) in alone.tensors.iter_mut().zip(&data.values).enumerate()
                {
                    let (first, n) = match i {
                        0 | 3 => (first_query, n_queries),
                        _ => (first_key, n_keys),
                    };
                    let rows = &values[first * tensor.cols..][..n * tensor.cols];
                    *tensor = cpu.upload(rows, n, tensor.cols, Precision::Activation);
                }
                if let Some(dropout) = &mut alone.dropout {
                    dropout.tokens = dropout.tokens[first_query..first_query + n_queries].into();
                }
                let (out, [d_q, d_k, d_v]) = run(cpu, &alone);
                let alone = [&out.o, &out.lse, &d_q, &d_k, &d_v].map(|t| cpu.download(t));
                for (i, (alone, all)) in alone.iter().zip(&all).enumerate() {
                    let first = if i < 3 { first_query } else { first_key };
                    let rows = if i < 3 { n_queries } else { n_keys };
                    let width = alone.len() / rows;
                    let all = &all[first * width..][..alone.len()];
                    assert_eq!(bits(alone), bits(all), "sequence {sequence}, result {i}");
                }
            }
            all.concat()
        });
    }
}
