//! BART: an encoder-decoder with learned positions, biases everywhere, and norms after the sums.
//!
//! ```text
//! start    x = norm(embedding[id] + positions[place + 2])                 one table of positions a stack
//! layer    x = norm(x + out(attention(q, k, v of x)))                     decoder: causal
//!          x = norm(x + out(attention(q of x, k and v of the encoder)))   decoder only
//!          x = norm(x + fc2(activation(fc1 x)))
//! head     x · embeddingᵀ
//! ```
//!
//! The first two rows of a table of positions are never used: an offset from fairseq's padding.
//! `final_logits_bias` is a buffer that transformers adds to the logits and nobody ever trained; it
//! must be zero. Of the three dropouts of `config.json` the plain one is applied (after the
//! embedding and each sub-layer); `modeling_bart.py` (transformers 5.17) is what this follows.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    formats::{checkpoint::Checkpoint, config::BartConfig},
    kernels::{Backend, ops::Ids},
    model::{
        Module, ModuleKind,
        batch::Batch,
        cache::{Decoding, Room, Step},
        network::{Head, Network, Side, Sides},
    },
    tape::{
        Tape, Var,
        ops::{AttentionSpec, FrozenLinear, KeyValue, LayerNorm, LinearSpec},
    },
};

/// A BART encoder-decoder.
pub struct Bart<B: Backend> {
    config: BartConfig,
    shared: B::Weight,
    encoder: Stack<B>,
    decoder: Stack<B>,
    head: Head<B>,
}

struct Stack<B: Backend> {
    positions: B::Weight,
    embedding_norm: LayerNorm<B>,
    layers: Vec<Layer<B>>,
    n_heads: usize,
    site: u32,
}

struct Layer<B: Backend> {
    attention: AttentionLayer<B>,
    cross: Option<AttentionLayer<B>>,
    fc1: FrozenLinear<B>,
    fc2: FrozenLinear<B>,
    norm: LayerNorm<B>,
    site: u32,
}

struct AttentionLayer<B: Backend> {
    k: FrozenLinear<B>,
    v: FrozenLinear<B>,
    q: FrozenLinear<B>,
    out: FrozenLinear<B>,
    /// After the sum.
    norm: LayerNorm<B>,
}

/// Rows of a table of positions before that of place 0.
const OFFSET: usize = 2;
/// `torch.nn.LayerNorm`'s; no key of `config.json` changes it.
const EPS: f32 = 1e-5;

/// Sites of a layer's dropouts, from its own first one.
mod site {
    pub(super) const ATTENTION: u32 = 0;
    pub(super) const CROSS: u32 = 1;
    pub(super) const FEED_FORWARD: u32 = 2;
    pub(super) const PER_LAYER: u32 = 4;
    /// After a stack's embedding, counted from the stack's first site.
    pub(super) const EMBEDDING: u32 = 0;
    pub(super) const DECODER: u32 = 1 << 16;
}

/// The ids' rows of a table of positions.
fn places(positions: impl IntoIterator<Item = u32>) -> Vec<u32> {
    positions.into_iter().map(|position| position + OFFSET as u32).collect()
}

impl<B: Backend> Bart<B> {
    /// Takes the tensors that the configuration implies out of a checkpoint.
    ///
    /// # Errors
    /// If one is missing or of another shape, or `final_logits_bias` is not zero.
    pub fn load(backend: &B, config: BartConfig, checkpoint: &mut Checkpoint) -> Result<Self> {
        // A bare BartModel's names have no prefix.
        let bare = checkpoint.info("shared.weight").is_some();
        let prefix = if bare { "" } else { "model." };
        let shape = [config.vocab_size, config.d_model];
        if let Some(bias) = checkpoint.try_tensor("final_logits_bias", &[1, config.vocab_size])?
            && bias.to_f32().iter().any(|&b| b != 0.0)
        {
            return Err(Error::Tensors {
                path: checkpoint.dir().to_path_buf(),
                detail: "final_logits_bias is not zero, which is not supported".into(),
            });
        }
        for stack in ["encoder", "decoder"] {
            let copy = format!("{prefix}{stack}.embed_tokens.weight");
            let shared = format!("{prefix}shared.weight");
            checkpoint.ignore_copy(&copy, &shared, "the shared embedding again")?;
        }
        let mut loader = Loader { backend, config: &config, checkpoint, prefix, next: 0 };
        let shared = loader.weight("shared.weight", &shape)?;
        let encoder = loader.stack("encoder")?;
        let decoder = loader.stack("decoder")?;
        let index = loader.next;
        let own = checkpoint.try_tensor("lm_head.weight", &shape)?;
        let weight = own.map_or_else(|| shared.clone(), |own| backend.weight(&own));
        let head = Head { linear: FrozenLinear { weight, bias: None, index }, scale: 1.0 };
        Ok(Self { config, shared, encoder, decoder, head })
    }

    fn embed(
        &self,
        tape: &mut Tape<'_, B>,
        stack: &Stack<B>,
        ids: Ids<'_, B>,
        at: &[u32],
    ) -> Var<B> {
        tape.embed_at((&self.shared, ids), (&stack.positions, at))
    }

    fn run<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        stack: &'m Stack<B>,
        ids: &[u32],
        side: &Side,
        encoded: Option<(&Var<B>, &Side)>,
    ) -> Var<B> {
        let at = places(side.spans.lens.iter().flat_map(|&len| 0..len as u32));
        let mut x = self.embed(tape, stack, Ids::Given(ids), &at);
        if side.watch {
            x = tape.watched(x.tensor().clone());
        }
        let x = tape.layer_norm(&x, &stack.embedding_norm, EPS);
        let mut x = tape.dropout(x, side.dropout(stack.site + site::EMBEDDING));
        for layer in &stack.layers {
            let side = side.clone();
            let n_heads = stack.n_heads;
            x = match encoded {
                None => tape.checkpoint(&[&x], side.keep, move |tape, inputs| {
                    self.layer(tape, layer, n_heads, &inputs[0], &side, None)
                }),
                Some((output, source)) => {
                    let source = source.clone();
                    tape.checkpoint(&[&x, output], side.keep, move |tape, inputs| {
                        let encoded = Some((&inputs[1], &source));
                        self.layer(tape, layer, n_heads, &inputs[0], &side, encoded)
                    })
                }
            };
        }
        x
    }

    fn layer<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        layer: &'m Layer<B>,
        n_heads: usize,
        x: &Var<B>,
        side: &Side,
        encoded: Option<(&Var<B>, &Side)>,
    ) -> Var<B> {
        let AttentionLayer { k, v, q, .. } = &layer.attention;
        let [k, v, q] = tape.linears(x, [k, v, q], &side.segments);
        let keys = KeyValue { k, v, spans: Arc::clone(&side.spans) };
        let spec = self.attention_spec(n_heads, layer.cross.is_some());
        let site = layer.site + site::ATTENTION;
        let mut x = attend(tape, &layer.attention, x, (q, keys), spec, side, site);
        if let (Some(cross), Some((output, source))) = (&layer.cross, encoded) {
            let [q] = tape.linears(&x, [&cross.q], &side.segments);
            let [k, v] = tape.linears(output, [&cross.k, &cross.v], &source.segments);
            let keys = KeyValue { k, v, spans: Arc::clone(&source.spans) };
            let spec = self.attention_spec(n_heads, false);
            x = attend(tape, cross, &x, (q, keys), spec, side, layer.site + site::CROSS);
        }
        self.feed_forward(tape, layer, &x, side)
    }

    fn feed_forward<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        layer: &'m Layer<B>,
        x: &Var<B>,
        side: &Side,
    ) -> Var<B> {
        let [h] = tape.linears(x, [&layer.fc1], &side.segments);
        let h = tape.gated(h, None, self.config.activation, None);
        let after = LinearSpec {
            residual: Some(x),
            dropout: side.dropout(layer.site + site::FEED_FORWARD),
            full_precision: false,
        };
        let sum = tape.linear(&h, &layer.fc2, &side.segments, after);
        tape.layer_norm(&sum, &layer.norm, EPS)
    }

    fn attention_spec(&self, n_heads: usize, causal: bool) -> AttentionSpec<B> {
        let head_dim = self.config.d_model / n_heads;
        AttentionSpec {
            n_heads,
            n_kv_heads: n_heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            causal,
            window: None,
            bias: None,
            dropout: None,
        }
    }
}

/// `norm(x + dropout(out(attention)))`.
fn attend<'m, B: Backend>(
    tape: &mut Tape<'m, B>,
    layer: &'m AttentionLayer<B>,
    x: &Var<B>,
    (q, keys): (Var<B>, KeyValue<B>),
    spec: AttentionSpec<B>,
    side: &Side,
    site: u32,
) -> Var<B> {
    let attended = tape.attention(q, &side.spans, keys, spec);
    let after =
        LinearSpec { residual: Some(x), dropout: side.dropout(site), full_precision: false };
    let sum = tape.linear(&attended, &layer.out, &side.segments, after);
    tape.layer_norm(&sum, &layer.norm, EPS)
}

impl<B: Backend> Network<B> for Bart<B> {
    fn head(&self) -> &Head<B> {
        &self.head
    }

    fn hidden<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Var<B> {
        let encoded = self.run(tape, &self.encoder, &batch.source, &sides.source, None);
        let encoded = Some((&encoded, &sides.source));
        self.run(tape, &self.decoder, &batch.target, &sides.target, encoded)
    }

    fn room(&self, backend: &B, room: Room) -> Decoding<B> {
        let shape = [self.decoder.layers.len(), self.config.d_model];
        Decoding::new(backend, shape, true, room)
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
        let layers = self.decoder.layers.iter().filter_map(|layer| layer.cross.as_ref());
        let layers = layers.map(|AttentionLayer { k, v, .. }| [k, v]);
        decoding.write_source(tape, &encoded, source, slots, layers);
    }

    fn advance<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        step: &Step<'_, B>,
    ) -> Var<B> {
        let (backend, stack) = (tape.backend(), &self.decoder);
        let placed = decoding.cache.place(backend, step.slots, step.lens);
        let side = &Side::inference(Arc::clone(&placed.queries), Arc::clone(step.segments));
        let x = self.embed(tape, stack, step.ids, &places(placed.positions.iter().copied()));
        let mut x = tape.layer_norm(&x, &stack.embedding_norm, EPS);
        for (i, layer) in stack.layers.iter().enumerate() {
            let AttentionLayer { k, v, q, .. } = &layer.attention;
            let [k, v, q] = tape.linears(&x, [k, v, q], step.segments);
            let keys = decoding.cache.extend(backend, i, &placed, &k, &v);
            let spec = self.attention_spec(stack.n_heads, true);
            x = attend(tape, &layer.attention, &x, (q, keys), spec, side, 0);
            if let Some(cross) = &layer.cross {
                let [q] = tape.linears(&x, [&cross.q], step.segments);
                let keys = decoding.cross(i, step.slots);
                let spec = self.attention_spec(stack.n_heads, false);
                x = attend(tape, cross, &x, (q, keys), spec, side, 0);
            }
            x = self.feed_forward(tape, layer, &x, side);
        }
        tape.gather(x, placed.last.as_deref())
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    config: &'a BartConfig,
    checkpoint: &'a mut Checkpoint,
    prefix: &'a str,
    next: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight> {
        let name = format!("{}{name}", self.prefix);
        Ok(self.backend.weight(&self.checkpoint.tensor(&name, shape)?))
    }

    fn norm(&mut self, path: &str) -> Result<LayerNorm<B>> {
        let shape = [self.config.d_model];
        Ok(LayerNorm {
            weight: self.weight(&format!("{path}.weight"), &shape)?,
            bias: self.weight(&format!("{path}.bias"), &shape)?,
        })
    }

    fn linear(&mut self, path: &str, d_in: usize, d_out: usize) -> Result<FrozenLinear<B>> {
        let weight = self.weight(&format!("{path}.weight"), &[d_out, d_in])?;
        let bias = Some(self.weight(&format!("{path}.bias"), &[d_out])?);
        self.next += 1;
        Ok(FrozenLinear { weight, bias, index: self.next - 1 })
    }

    fn attention(&mut self, layer: &str, name: &str) -> Result<AttentionLayer<B>> {
        let d = self.config.d_model;
        let path = |linear: &str| format!("{layer}.{name}.{linear}");
        Ok(AttentionLayer {
            k: self.linear(&path("k_proj"), d, d)?,
            v: self.linear(&path("v_proj"), d, d)?,
            q: self.linear(&path("q_proj"), d, d)?,
            out: self.linear(&path("out_proj"), d, d)?,
            norm: self.norm(&format!("{layer}.{name}_layer_norm"))?,
        })
    }

    fn stack(&mut self, name: &str) -> Result<Stack<B>> {
        let config = self.config;
        let decoder = name == "decoder";
        let (d, d_ff) = (config.d_model, config.stack(decoder).d_ff);
        let first_site = if decoder { site::DECODER } else { 0 };
        let mut layers = Vec::new();
        for i in 0..config.stack(decoder).n_layers {
            let layer = format!("{name}.layers.{i}");
            layers.push(Layer {
                attention: self.attention(&layer, "self_attn")?,
                cross: decoder.then(|| self.attention(&layer, "encoder_attn")).transpose()?,
                fc1: self.linear(&format!("{layer}.fc1"), d, d_ff)?,
                fc2: self.linear(&format!("{layer}.fc2"), d_ff, d)?,
                norm: self.norm(&format!("{layer}.final_layer_norm"))?,
                site: first_site + site::PER_LAYER * (i as u32 + 1),
            });
        }
        let rows = config.max_positions + OFFSET;
        Ok(Stack {
            positions: self.weight(&format!("{name}.embed_positions.weight"), &[rows, d])?,
            embedding_norm: self.norm(&format!("{name}.layernorm_embedding"))?,
            layers,
            n_heads: config.stack(decoder).n_heads,
            site: first_site,
        })
    }
}

/// Every module of a BART, in Hugging Face's order; the numbers of the linears are those that
/// [`Bart::load`] gives.
pub fn modules(config: &BartConfig) -> Vec<Module> {
    let mut modules = Vec::new();
    let mut index = 0;
    let mut push = |path: String, kind| modules.push(Module { path, kind });
    let mut linear = |d_in, d_out| {
        index += 1;
        ModuleKind::Linear { index: index - 1, d_in, d_out }
    };
    let d = config.d_model;
    for name in ["model", "model.shared"] {
        push(name.into(), ModuleKind::Other);
    }
    for stack in ["encoder", "decoder"] {
        let decoder = stack == "decoder";
        for name in ["", ".embed_tokens", ".embed_positions", ".layers"] {
            push(format!("model.{stack}{name}"), ModuleKind::Other);
        }
        for i in 0..config.stack(decoder).n_layers {
            let layer = format!("model.{stack}.layers.{i}");
            push(layer.clone(), ModuleKind::Other);
            let attentions: &[&str] =
                if decoder { &["self_attn", "encoder_attn"] } else { &["self_attn"] };
            for attention in attentions {
                push(format!("{layer}.{attention}"), ModuleKind::Other);
                for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
                    push(format!("{layer}.{attention}.{name}"), linear(d, d));
                }
                push(format!("{layer}.{attention}_layer_norm"), ModuleKind::Other);
            }
            push(format!("{layer}.activation_fn"), ModuleKind::Other);
            let d_ff = config.stack(decoder).d_ff;
            push(format!("{layer}.fc1"), linear(d, d_ff));
            push(format!("{layer}.fc2"), linear(d_ff, d));
            push(format!("{layer}.final_layer_norm"), ModuleKind::Other);
        }
        push(format!("model.{stack}.layernorm_embedding"), ModuleKind::Other);
    }
    push("lm_head".into(), ModuleKind::Head);
    modules
}
