//! T5 and mT5: v1.0 (relu), v1.1 and flan (gated).
//!
//! ```text
//! encoder block   x += o(attention(q,k,v of norm(x)) + bias[head, distance])
//!                 x += wo(activation(wi_0 norm(x)) * wi_1 norm(x))
//! decoder block   the same, causal, with attention to the encoder's output in between (no bias)
//! ```
//!
//! No linear has a bias, scores are not scaled, and the relative position bias of block 0 serves all
//! blocks of a stack. Dropout stands where Hugging Face's T5 has it: after the embedding, on the
//! probabilities, on every sub-layer's output, inside the feed-forward, and after the last norm.

use std::sync::Arc;

use crate::{
    error::Result,
    formats::{checkpoint::Checkpoint, config::T5Config},
    kernels::{
        Backend, Precision,
        ops::{Activation, Ids, RelativeBias},
    },
    model::{
        Module, ModuleKind,
        batch::Batch,
        cache::{Decoding, Room, Step},
        network::{Head, Network, Side, Sides},
    },
    tape::{
        Tape, Var,
        ops::{AttentionSpec, FrozenLinear, KeyValue, LinearSpec},
    },
};

/// A T5 encoder-decoder.
pub struct T5<B: Backend> {
    config: T5Config,
    activation: Activation,
    shared: B::Weight,
    encoder: Stack<B>,
    decoder: Stack<B>,
    head: Head<B>,
}

struct Stack<B: Backend> {
    blocks: Vec<Block<B>>,
    last_norm: B::Weight,
    bias: BiasBuckets,
    site: u32,
}

struct Block<B: Backend> {
    attention: AttentionLayer<B>,
    cross: Option<AttentionLayer<B>>,
    feed_forward: FeedForward<B>,
    site: u32,
}

struct AttentionLayer<B: Backend> {
    norm: B::Weight,
    q: FrozenLinear<B>,
    k: FrozenLinear<B>,
    v: FrozenLinear<B>,
    o: FrozenLinear<B>,
}

struct FeedForward<B: Backend> {
    norm: B::Weight,
    gate: FrozenLinear<B>,
    up: Option<FrozenLinear<B>>,
    down: FrozenLinear<B>,
}

/// Sites of a block's dropouts, from its own first one.
mod site {
    pub(super) const PROBABILITIES: u32 = 0;
    pub(super) const ATTENTION: u32 = 1;
    pub(super) const CROSS_PROBABILITIES: u32 = 2;
    pub(super) const CROSS: u32 = 3;
    pub(super) const INNER: u32 = 4;
    pub(super) const FEED_FORWARD: u32 = 5;
    pub(super) const PER_BLOCK: u32 = 8;
    /// After a stack's embedding and after its last norm, counted from the stack's first site.
    pub(super) const EMBEDDING: u32 = 0;
    pub(super) const LAST_NORM: u32 = 1;
    pub(super) const DECODER: u32 = 1 << 16;
}

impl<B: Backend> T5<B> {
    /// Takes the tensors that the configuration implies out of a checkpoint.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn load(backend: &B, config: T5Config, checkpoint: &mut Checkpoint) -> Result<Self> {
        let mut loader = Loader { backend, config: &config, checkpoint, next: 0 };
        let shared = loader.shared()?;
        let encoder = loader.stack("encoder", config.num_layers)?;
        let decoder = loader.stack("decoder", config.num_decoder_layers)?;
        let head = loader.head(&shared)?;
        let activation = config.activation;
        Ok(Self { config, activation, shared, encoder, decoder, head })
    }

    fn run<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        stack: &'m Stack<B>,
        ids: &[u32],
        side: &Side,
        encoded: Option<(&Var<B>, &Side)>,
    ) -> Var<B> {
        let mut x = tape.embed(&self.shared, Ids::Given(ids));
        if side.watch {
            x = tape.watched(x.tensor().clone());
        }
        x = tape.dropout(x, side.dropout(stack.site + site::EMBEDDING));
        let longest = side.spans.lens.iter().copied().max().unwrap_or(0);
        let bias = stack.bias.table(tape.backend(), longest);
        for block in &stack.blocks {
            let (side, bias) = (side.clone(), bias.clone());
            x = match encoded {
                None => tape.checkpoint(&[&x], side.keep, move |tape, inputs| {
                    self.block(tape, block, &inputs[0], &side, &bias, None)
                }),
                Some((output, source)) => {
                    let source = source.clone();
                    tape.checkpoint(&[&x, output], side.keep, move |tape, inputs| {
                        let encoded = Some((&inputs[1], &source));
                        self.block(tape, block, &inputs[0], &side, &bias, encoded)
                    })
                }
            };
        }
        let y = tape.norm(&x, &stack.last_norm, self.config.layer_norm_epsilon);
        drop(x);
        tape.dropout(y, side.dropout(stack.site + site::LAST_NORM))
    }

    fn block<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        block: &'m Block<B>,
        x: &Var<B>,
        side: &Side,
        bias: &RelativeBias<B>,
        encoded: Option<(&Var<B>, &Side)>,
    ) -> Var<B> {
        let AttentionLayer { norm, q, k, v, o } = &block.attention;
        let h = tape.norm(x, norm, self.config.layer_norm_epsilon);
        let [q, k, v] = tape.linears(&h, [q, k, v], &side.segments);
        let keys = KeyValue { k, v, spans: Arc::clone(&side.spans) };
        let mut spec = self.attention_spec(Some(bias.clone()), block.cross.is_some());
        spec.dropout = side.dropout(block.site + site::PROBABILITIES);
        let attended = tape.attention(q, &side.spans, keys, spec);
        let after = LinearSpec {
            residual: Some(x),
            dropout: side.dropout(block.site + site::ATTENTION),
            full_precision: false,
        };
        let mut x = tape.linear(&attended, o, &side.segments, after);
        drop(attended);

        if let (Some(AttentionLayer { norm, q, k, v, o }), Some((output, source))) =
            (&block.cross, encoded)
        {
            let h = tape.norm(&x, norm, self.config.layer_norm_epsilon);
            let [q] = tape.linears(&h, [q], &side.segments);
            let [k, v] = tape.linears(output, [k, v], &source.segments);
            let keys = KeyValue { k, v, spans: Arc::clone(&source.spans) };
            let mut spec = self.attention_spec(None, false);
            spec.dropout = side.dropout(block.site + site::CROSS_PROBABILITIES);
            let attended = tape.attention(q, &side.spans, keys, spec);
            let after = LinearSpec {
                residual: Some(&x),
                dropout: side.dropout(block.site + site::CROSS),
                full_precision: false,
            };
            x = tape.linear(&attended, o, &side.segments, after);
        }
        self.feed_forward(tape, block, &x, side)
    }

    fn feed_forward<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        block: &'m Block<B>,
        x: &Var<B>,
        side: &Side,
    ) -> Var<B> {
        let FeedForward { norm, gate, up, down } = &block.feed_forward;
        let h = tape.norm(x, norm, self.config.layer_norm_epsilon);
        let (gate, up) = match up {
            Some(up) => {
                let [gate, up] = tape.linears(&h, [gate, up], &side.segments);
                (gate, Some(up))
            }
            None => {
                let [gate] = tape.linears(&h, [gate], &side.segments);
                (gate, None)
            }
        };
        drop(h);
        let inner = side.dropout(block.site + site::INNER);
        let h = tape.gated(gate, up, self.activation, inner);
        let after = LinearSpec {
            residual: Some(x),
            dropout: side.dropout(block.site + site::FEED_FORWARD),
            full_precision: false,
        };
        tape.linear(&h, down, &side.segments, after)
    }

    fn attention_spec(&self, bias: Option<RelativeBias<B>>, causal: bool) -> AttentionSpec<B> {
        AttentionSpec {
            n_heads: self.config.num_heads,
            n_kv_heads: self.config.num_heads,
            head_dim: self.config.d_kv,
            scale: 1.0,
            causal,
            window: None,
            bias,
            dropout: None,
        }
    }
}

impl<B: Backend> Network<B> for T5<B> {
    fn head(&self) -> &Head<B> {
        &self.head
    }

    fn hidden<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Var<B> {
        let encoded = self.run(tape, &self.encoder, &batch.source, &sides.source, None);
        let encoded = Some((&encoded, &sides.source));
        self.run(tape, &self.decoder, &batch.target, &sides.target, encoded)
    }

    fn room(&self, backend: &B, room: Room) -> Decoding<B> {
        let width = self.config.num_heads * self.config.d_kv;
        Decoding::new(backend, [self.decoder.blocks.len(), width], true, room)
    }

    fn encode<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        batch: &Batch,
        sides: &Sides,
        slots: &[usize],
    ) {
        let source = &sides.source;
        let encoded = self.run(tape, &self.encoder, &batch.source, source, None);
        let layers = self.decoder.blocks.iter().filter_map(|block| block.cross.as_ref());
        let layers = layers.map(|AttentionLayer { k, v, .. }| [k, v]);
        decoding.write_source(tape, &encoded, source, slots, layers);
    }

    fn advance<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        step: &Step<'_, B>,
    ) -> Var<B> {
        let (eps, backend) = (self.config.layer_norm_epsilon, tape.backend());
        let placed = decoding.cache.place(backend, step.slots, step.lens);
        if let Some(n) = decoding.more_positions() {
            decoding.bias = Some(self.decoder.bias.table(backend, n));
        }
        let queries = &placed.queries;
        let side = Side::inference(Arc::clone(queries), Arc::clone(step.segments));
        let mut x = tape.embed(&self.shared, step.ids);
        for (layer, block) in self.decoder.blocks.iter().enumerate() {
            let AttentionLayer { norm, q, k, v, o } = &block.attention;
            let h = tape.norm(&x, norm, eps);
            let [q, k, v] = tape.linears(&h, [q, k, v], step.segments);
            let keys = decoding.cache.extend(backend, layer, &placed, &k, &v);
            let spec = self.attention_spec(decoding.bias.clone(), true);
            let attended = tape.attention(q, queries, keys, spec);
            x = tape.linear(&attended, o, step.segments, LinearSpec::onto(&x));
            if let Some(AttentionLayer { norm, q, o, .. }) = &block.cross {
                let h = tape.norm(&x, norm, eps);
                let [q] = tape.linears(&h, [q], step.segments);
                let keys = decoding.cross(layer, step.slots);
                let attended = tape.attention(q, queries, keys, self.attention_spec(None, false));
                x = tape.linear(&attended, o, step.segments, LinearSpec::onto(&x));
            }
            x = self.feed_forward(tape, block, &x, &side);
        }
        let x = tape.gather(x, placed.last.as_deref());
        tape.norm(&x, &self.decoder.last_norm, eps)
    }
}

/// The relative position biases of a stack: values by bucket, and which distance is in which.
struct BiasBuckets {
    /// `[n_buckets, n_heads]`.
    values: Vec<f32>,
    n_buckets: usize,
    n_heads: usize,
    max_distance: usize,
    bidirectional: bool,
}

impl BiasBuckets {
    /// The bias of every distance that sequences up to `longest` have.
    fn table<B: Backend>(&self, backend: &B, longest: usize) -> RelativeBias<B> {
        let zero = longest.saturating_sub(1);
        let n_distances = 2 * zero + 1;
        let mut table = vec![0.0; self.n_heads * n_distances];
        for column in 0..n_distances {
            let distance = column as i64 - zero as i64;
            let bucket = bucket(distance, self.n_buckets, self.max_distance, self.bidirectional);
            for head in 0..self.n_heads {
                table[head * n_distances + column] =
                    f64::from(self.values[bucket * self.n_heads + head]);
            }
        }
        let table = backend.upload(&table, self.n_heads, n_distances, Precision::Full);
        RelativeBias { table, zero }
    }
}

/// The bucket of a distance `key - query`, with Hugging Face's arithmetic: small distances have a
/// bucket each, larger ones share buckets of logarithmic width, the logarithm taken in f32.
fn bucket(distance: i64, n_buckets: usize, max_distance: usize, bidirectional: bool) -> usize {
    let (mut first, mut n) = (0, n_buckets);
    let distance = if bidirectional {
        n /= 2;
        if distance > 0 {
            first = n;
        }
        distance.unsigned_abs() as usize
    } else {
        (-distance).max(0) as usize
    };
    let exact = n / 2;
    if distance < exact {
        return first + distance;
    }
    if max_distance <= exact {
        return first + n - 1; // No logarithm to spread over.
    }
    let widths = (max_distance as f64 / exact as f64).ln() as f32;
    let log = (distance as f32 / exact as f32).ln() / widths * (n - exact) as f32;
    first + (exact + log as usize).min(n - 1)
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    config: &'a T5Config,
    checkpoint: &'a mut Checkpoint,
    next: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight> {
        Ok(self.backend.weight(&self.checkpoint.tensor(name, shape)?))
    }

    fn shared(&mut self) -> Result<B::Weight> {
        let shape = [self.config.vocab_size, self.config.d_model];
        // Old files repeat the embedding under the stacks' own names.
        for copy in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] {
            let reason = "the shared embedding again";
            self.checkpoint.ignore_copy(copy, "shared.weight", reason)?;
        }
        self.weight("shared.weight", &shape)
    }

    fn linear(&mut self, path: &str, d_in: usize, d_out: usize) -> Result<FrozenLinear<B>> {
        let weight = self.weight(&format!("{path}.weight"), &[d_out, d_in])?;
        self.next += 1;
        Ok(FrozenLinear { weight, bias: None, index: self.next - 1 })
    }

    fn head(&mut self, shared: &B::Weight) -> Result<Head<B>> {
        let config = self.config;
        let scale = if config.scales_head() { (config.d_model as f32).powf(-0.5) } else { 1.0 };
        let shape = [self.config.vocab_size, self.config.d_model];
        let own = self.checkpoint.try_tensor("lm_head.weight", &shape)?;
        let weight = own.map_or_else(|| shared.clone(), |own| self.backend.weight(&own));
        Ok(Head { linear: FrozenLinear { weight, bias: None, index: self.next }, scale })
    }

    fn attention(&mut self, layer: &str, name: &str) -> Result<AttentionLayer<B>> {
        let T5Config { d_model, num_heads, d_kv, .. } = *self.config;
        let inner = num_heads * d_kv;
        let path = |linear: &str| format!("{layer}.{name}.{linear}");
        Ok(AttentionLayer {
            q: self.linear(&path("q"), d_model, inner)?,
            k: self.linear(&path("k"), d_model, inner)?,
            v: self.linear(&path("v"), d_model, inner)?,
            o: self.linear(&path("o"), inner, d_model)?,
            norm: self.weight(&format!("{layer}.layer_norm.weight"), &[d_model])?,
        })
    }

    fn feed_forward(&mut self, layer: &str) -> Result<FeedForward<B>> {
        let T5Config { d_model, d_ff, gated, .. } = *self.config;
        let path = |linear: &str| format!("{layer}.DenseReluDense.{linear}");
        let (gate, up) = if gated {
            let gate = self.linear(&path("wi_0"), d_model, d_ff)?;
            (gate, Some(self.linear(&path("wi_1"), d_model, d_ff)?))
        } else {
            (self.linear(&path("wi"), d_model, d_ff)?, None)
        };
        Ok(FeedForward {
            gate,
            up,
            down: self.linear(&path("wo"), d_ff, d_model)?,
            norm: self.weight(&format!("{layer}.layer_norm.weight"), &[d_model])?,
        })
    }

    fn stack(&mut self, name: &str, n_blocks: usize) -> Result<Stack<B>> {
        let decoder = name == "decoder";
        let first_site = if decoder { site::DECODER } else { 0 };
        let mut blocks = Vec::with_capacity(n_blocks);
        for i in 0..n_blocks {
            let layer = |n: usize| format!("{name}.block.{i}.layer.{n}");
            let attention = self.attention(&layer(0), "SelfAttention")?;
            let cross =
                if decoder { Some(self.attention(&layer(1), "EncDecAttention")?) } else { None };
            let feed_forward = self.feed_forward(&layer(if decoder { 2 } else { 1 }))?;
            let site = first_site + site::PER_BLOCK * (i as u32 + 1);
            blocks.push(Block { attention, cross, feed_forward, site });
        }
        let (n_buckets, n_heads) =
            (self.config.relative_attention_num_buckets, self.config.num_heads);
        let bias_name =
            format!("{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let values = self.checkpoint.tensor(&bias_name, &[n_buckets, n_heads])?.to_f32();
        self.checkpoint.ignore(
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "an unused bias of the first T5 files",
        );
        Ok(Stack {
            blocks,
            last_norm: self
                .weight(&format!("{name}.final_layer_norm.weight"), &[self.config.d_model])?,
            bias: BiasBuckets {
                values,
                n_buckets,
                n_heads,
                max_distance: self.config.relative_attention_max_distance,
                bidirectional: !decoder,
            },
            site: first_site,
        })
    }
}

/// Every module of a T5, in Hugging Face's order; the numbers of the linears are those that
/// [`T5::load`] gives.
pub fn modules(config: &T5Config) -> Vec<Module> {
    let T5Config { d_model, d_kv, d_ff, num_heads, gated, .. } = *config;
    let inner = num_heads * d_kv;
    let mut modules = Vec::new();
    let mut index = 0;
    let mut push = |path: String, kind| modules.push(Module { path, kind });
    let mut linear = |d_in, d_out| {
        index += 1;
        ModuleKind::Linear { index: index - 1, d_in, d_out }
    };
    push("shared".into(), ModuleKind::Other);
    for (stack, n_blocks) in
        [("encoder", config.num_layers), ("decoder", config.num_decoder_layers)]
    {
        let decoder = stack == "decoder";
        for name in ["", ".embed_tokens", ".block"] {
            push(format!("{stack}{name}"), ModuleKind::Other);
        }
        for i in 0..n_blocks {
            let block = format!("{stack}.block.{i}");
            push(block.clone(), ModuleKind::Other);
            push(format!("{block}.layer"), ModuleKind::Other);
            let attentions: &[&str] =
                if decoder { &["SelfAttention", "EncDecAttention"] } else { &["SelfAttention"] };
            for (n, attention) in attentions.iter().enumerate() {
                let layer = format!("{block}.layer.{n}");
                push(layer.clone(), ModuleKind::Other);
                push(format!("{layer}.{attention}"), ModuleKind::Other);
                for name in ["q", "k", "v"] {
                    push(format!("{layer}.{attention}.{name}"), linear(d_model, inner));
                }
                push(format!("{layer}.{attention}.o"), linear(inner, d_model));
                if i == 0 && n == 0 {
                    let bias = format!("{layer}.{attention}.relative_attention_bias");
                    push(bias, ModuleKind::Other);
                }
                push(format!("{layer}.layer_norm"), ModuleKind::Other);
                push(format!("{layer}.dropout"), ModuleKind::Other);
            }
            let layer = format!("{block}.layer.{}", attentions.len());
            let dense = format!("{layer}.DenseReluDense");
            push(layer.clone(), ModuleKind::Other);
            push(dense.clone(), ModuleKind::Other);
            let inputs: &[&str] = if gated { &["wi_0", "wi_1"] } else { &["wi"] };
            for name in inputs {
                push(format!("{dense}.{name}"), linear(d_model, d_ff));
            }
            push(format!("{dense}.wo"), linear(d_ff, d_model));
            for name in ["dropout", "act"] {
                push(format!("{dense}.{name}"), ModuleKind::Other);
            }
            push(format!("{layer}.layer_norm"), ModuleKind::Other);
            push(format!("{layer}.dropout"), ModuleKind::Other);
        }
        push(format!("{stack}.final_layer_norm"), ModuleKind::Other);
        push(format!("{stack}.dropout"), ModuleKind::Other);
    }
    push("lm_head".into(), ModuleKind::Head);
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The buckets that transformers computes, as runs of equal ones.
    #[test]
    fn buckets_are_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/bucket_reference.json");
        let text = std::fs::read(path).expect("a committed fixture");
        let reference: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        for case in reference["cases"].as_array().expect("cases") {
            let number = |name: &str| case[name].as_u64().expect("a number") as usize;
            let (n, max) = (number("num_buckets"), number("max_distance"));
            let bidirectional = case["bidirectional"] == true;
            let mut distance = reference["first"].as_i64().expect("a number");
            for run in case["runs"].as_array().expect("runs") {
                for _ in 0..run[1].as_u64().expect("a count") {
                    // Below zero: transformers took the logarithm of nothing.
                    let want = run[0].as_i64().expect("a bucket").try_into().unwrap_or(n - 1);
                    let got = bucket(distance, n, max, bidirectional);
                    assert_eq!(got, want, "distance {distance} of {n} buckets to {max}");
                    distance += 1;
                }
            }
        }
    }
}
