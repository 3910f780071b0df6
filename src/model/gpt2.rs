//! GPT-2: a decoder with learned positions, layer norms and biases.
//!
//! ```text
//! start   x = embedding[id] + positions[place]
//! block   x += c_proj(attention(c_attn of norm(x)))           c_attn: q, k and v in one
//!         x += c_proj(gelu_new(c_fc norm(x)))
//! head    norm(x) · embeddingᵀ
//! ```
//!
//! Its linears are `Conv1D`s: weights lie transposed, `[d_in, d_out]`. They are
//! copied when a model is opened, as Gemma's norms are: kernels read a row for each output. PEFT's Poly names
//! `c_attn` in its table of default targets and then refuses it, as it adapts `torch.nn.Linear` alone;
//! here a `Conv1D` is a linear like others, whose adapter PEFT would load if it did. What `export`
//! makes of one is a LoRA, and that PEFT does load. (`modeling_gpt2.py` of transformers 5.17.)

use std::sync::Arc;

use crate::{
    error::Result,
    formats::{checkpoint::Checkpoint, config::Gpt2Config},
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
    tensor::Frozen,
};

/// A GPT-2.
pub struct Gpt2<B: Backend> {
    config: Gpt2Config,
    embedding: B::Weight,
    positions: B::Weight,
    blocks: Vec<Block<B>>,
    last_norm: LayerNorm<B>,
    head: Head<B>,
}

struct Block<B: Backend> {
    attention_norm: LayerNorm<B>,
    /// q, k and v in one.
    qkv: FrozenLinear<B>,
    out: FrozenLinear<B>,
    scale: f32,
    feed_forward_norm: LayerNorm<B>,
    up: FrozenLinear<B>,
    down: FrozenLinear<B>,
    /// The number of its first dropout.
    site: u32,
}

/// Sites of a block's dropouts, from its own first one; the embedding has the one before all.
mod site {
    pub(super) const PROBABILITIES: u32 = 0;
    pub(super) const ATTENTION: u32 = 1;
    pub(super) const FEED_FORWARD: u32 = 2;
    pub(super) const OF_BLOCK: u32 = 3;
}

impl<B: Backend> Gpt2<B> {
    /// Takes the tensors that the configuration implies out of a checkpoint, and transposes its
    /// linears.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn load(backend: &B, config: Gpt2Config, checkpoint: &mut Checkpoint) -> Result<Self> {
        // A bare GPT2Model's names, as on the Hub, have no prefix.
        let bare = checkpoint.info("wte.weight").is_some();
        let prefix = if bare { "" } else { "transformer." };
        let Gpt2Config { vocab_size, d_model, max_positions, .. } = config;
        let mut loader = Loader { backend, checkpoint, prefix, next: 0 };
        let embedding = loader.weight("wte.weight", &[vocab_size, d_model])?;
        let positions = loader.weight("wpe.weight", &[max_positions, d_model])?;
        let blocks =
            (0..config.n_layers).map(|i| loader.block(&config, i)).collect::<Result<Vec<_>>>()?;
        let last_norm = loader.norm("ln_f", d_model)?;
        let index = loader.next;
        let own = checkpoint.try_tensor("lm_head.weight", &[vocab_size, d_model])?;
        let weight = own.map_or_else(|| embedding.clone(), |own| backend.weight(&own));
        let head = Head { linear: FrozenLinear { weight, bias: None, index }, scale: 1.0 };
        Ok(Self { config, embedding, positions, blocks, last_norm, head })
    }

    /// q, k and v of a block.
    fn qkv<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        block: &'m Block<B>,
        x: &Var<B>,
        side: &Side,
    ) -> [Var<B>; 3] {
        let h = tape.layer_norm(x, &block.attention_norm, self.config.norm_eps);
        let [qkv] = tape.linears(&h, [&block.qkv], &side.segments);
        tape.split(qkv)
    }

    /// What comes after q, k and v.
    fn rest<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        block: &'m Block<B>,
        x: &Var<B>,
        (q, keys): (Var<B>, KeyValue<B>),
        side: &Side,
    ) -> Var<B> {
        let Gpt2Config { n_heads, d_model, norm_eps, activation, .. } = self.config;
        let spec = AttentionSpec {
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            scale: block.scale,
            causal: true,
            window: None,
            bias: None,
            dropout: side.dropout(block.site + site::PROBABILITIES),
        };
        let attended = tape.attention(q, &side.spans, keys, spec);
        let onto = |x, site| LinearSpec {
            residual: Some(x),
            dropout: side.dropout(block.site + site),
            full_precision: false,
        };
        let spec = onto(x, site::ATTENTION);
        let x = &tape.linear(&attended, &block.out, &side.segments, spec);
        let h = tape.layer_norm(x, &block.feed_forward_norm, norm_eps);
        let [h] = tape.linears(&h, [&block.up], &side.segments);
        let h = tape.gated(h, None, activation, None);
        tape.linear(&h, &block.down, &side.segments, onto(x, site::FEED_FORWARD))
    }

    fn embed(&self, tape: &mut Tape<'_, B>, ids: Ids<'_, B>, places: &[u32]) -> Var<B> {
        tape.embed_at((&self.embedding, ids), (&self.positions, places))
    }
}

impl<B: Backend> Network<B> for Gpt2<B> {
    fn head(&self) -> &Head<B> {
        &self.head
    }

    fn hidden<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Var<B> {
        let side = &sides.target;
        let places: Vec<u32> = side.spans.lens.iter().flat_map(|&len| 0..len as u32).collect();
        let mut x = self.embed(tape, Ids::Given(&batch.target), &places);
        if side.watch {
            x = tape.watched(x.tensor().clone());
        }
        x = tape.dropout(x, side.dropout(0));
        for block in &self.blocks {
            let side = side.clone();
            x = tape.checkpoint(&[&x], side.keep, move |tape, inputs| {
                let [q, k, v] = self.qkv(tape, block, &inputs[0], &side);
                let keys = KeyValue { k, v, spans: Arc::clone(&side.spans) };
                self.rest(tape, block, &inputs[0], (q, keys), &side)
            });
        }
        let x = tape.gather(x, batch.label_rows.as_deref());
        tape.layer_norm(&x, &self.last_norm, self.config.norm_eps)
    }

    fn room(&self, backend: &B, room: Room) -> Decoding<B> {
        let Gpt2Config { n_layers, d_model, .. } = self.config;
        Decoding::new(backend, [n_layers, d_model], false, room)
    }

    fn advance<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        step: &Step<'_, B>,
    ) -> Var<B> {
        let backend = tape.backend();
        let placed = decoding.cache.place(backend, step.slots, step.lens);
        let side = Side::inference(Arc::clone(&placed.queries), Arc::clone(step.segments));
        let mut x = self.embed(tape, step.ids, &placed.positions);
        for (layer, block) in self.blocks.iter().enumerate() {
            let [q, k, v] = self.qkv(tape, block, &x, &side);
            let keys = decoding.cache.extend(backend, layer, &placed, &k, &v);
            x = self.rest(tape, block, &x, (q, keys), &side);
        }
        let x = tape.gather(x, placed.last.as_deref());
        tape.layer_norm(&x, &self.last_norm, self.config.norm_eps)
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a mut Checkpoint,
    prefix: &'a str,
    next: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Frozen> {
        self.checkpoint.tensor(&format!("{}{name}", self.prefix), shape)
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight> {
        Ok(self.backend.weight(&self.tensor(name, shape)?))
    }

    fn norm(&mut self, path: &str, d: usize) -> Result<LayerNorm<B>> {
        Ok(LayerNorm {
            weight: self.weight(&format!("{path}.weight"), &[d])?,
            bias: self.weight(&format!("{path}.bias"), &[d])?,
        })
    }

    /// A Conv1D as a linear.
    fn conv(&mut self, path: &str, [d_in, d_out]: [usize; 2]) -> Result<FrozenLinear<B>> {
        let weight = self.tensor(&format!("{path}.weight"), &[d_in, d_out])?.transposed();
        let bias = Some(self.weight(&format!("{path}.bias"), &[d_out])?);
        self.next += 1;
        Ok(FrozenLinear { weight: self.backend.weight(&weight), bias, index: self.next - 1 })
    }

    fn block(&mut self, config: &Gpt2Config, i: usize) -> Result<Block<B>> {
        let Gpt2Config { d_model: d, n_heads, scale_scores, scale_by_layer, .. } = *config;
        let path = |name: &str| format!("h.{i}.{name}");
        for mask in ["attn.bias", "attn.masked_bias"] {
            let name = format!("{}{}", self.prefix, path(mask));
            self.checkpoint.ignore(&name, "a causal mask that early versions saved");
        }
        let scale = if scale_scores { ((d / n_heads) as f32).powf(-0.5) } else { 1.0 };
        let mut convs = convs(config).into_iter();
        let mut conv = || {
            let (name, shape) = convs.next().expect("as many as a block has");
            self.conv(&path(name), shape)
        };
        let (qkv, out, up, down) = (conv()?, conv()?, conv()?, conv()?);
        Ok(Block {
            attention_norm: self.norm(&path("ln_1"), d)?,
            qkv,
            out,
            scale: if scale_by_layer { scale / (i + 1) as f32 } else { scale },
            feed_forward_norm: self.norm(&path("ln_2"), d)?,
            up,
            down,
            site: 1 + i as u32 * site::OF_BLOCK,
        })
    }
}

/// The Conv1Ds of a block with `[d_in, d_out]`, in Hugging Face's order.
fn convs(config: &Gpt2Config) -> [(&'static str, [usize; 2]); 4] {
    let Gpt2Config { d_model: d, d_ff, .. } = *config;
    [
        ("attn.c_attn", [d, 3 * d]),
        ("attn.c_proj", [d, d]),
        ("mlp.c_fc", [d, d_ff]),
        ("mlp.c_proj", [d_ff, d]),
    ]
}

/// Every module of a GPT-2, in Hugging Face's order; the numbers of the linears are those that
/// [`Gpt2::load`] gives.
pub fn modules(config: &Gpt2Config) -> Vec<Module> {
    let mut modules = Vec::new();
    let mut push = |path: String, kind| modules.push(Module { path, kind });
    for name in ["", ".wte", ".wpe", ".drop", ".h"] {
        push(format!("transformer{name}"), ModuleKind::Other);
    }
    for i in 0..config.n_layers {
        let block = format!("transformer.h.{i}");
        let mut index = i * convs(config).len();
        for name in [
            "",
            ".ln_1",
            ".attn",
            ".attn.c_attn",
            ".attn.c_proj",
            ".attn.attn_dropout",
            ".attn.resid_dropout",
            ".ln_2",
            ".mlp",
            ".mlp.c_fc",
            ".mlp.c_proj",
            ".mlp.act",
            ".mlp.dropout",
        ] {
            let conv =
                convs(config).into_iter().find(|(conv, _)| name.strip_prefix('.') == Some(*conv));
            let kind = match conv {
                Some((_, [d_in, d_out])) => {
                    index += 1;
                    ModuleKind::Linear { index: index - 1, d_in, d_out }
                }
                None => ModuleKind::Other,
            };
            push(format!("{block}{name}"), kind);
        }
    }
    push("transformer.ln_f".into(), ModuleKind::Other);
    push("lm_head".into(), ModuleKind::Head);
    modules
}
