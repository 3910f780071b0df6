//! Decoder-only models of Llama's kind: Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3.
//!
//! ```text
//! block   x += o(attention(rope(q), rope(k), v) of norm(x))        causal, maybe within a window
//!         x += down(silu(gate norm(x)) * up norm(x))
//! ```
//!
//! In a Gemma both summands are normed before they are added, and the embedding is multiplied by the
//! root of the width.
//!
//! What differs between the families is in [`DecoderConfig`]: which linears have a bias, whether heads
//! of q and k are normed before they are turned, the windows, the angles, and whose the head is. A new
//! family is a page that reads its `config.json` (`formats/config/`), as long as it needs no other block.
//!
//! Dropout stands where transformers has it: on the probabilities alone.

use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use crate::{
    dtype::Dtype,
    error::Result,
    formats::{checkpoint::Checkpoint, config::DecoderConfig},
    kernels::{
        Backend, Precision,
        ops::{Ids, Rotary},
    },
    model::{
        Module, ModuleKind,
        batch::Batch,
        cache::{Decoding, Room, Step},
        network::{Head, Network, Side, Sides},
        rope::Frequencies,
    },
    tape::{
        Tape, Var,
        ops::{AttentionSpec, FrozenLinear, KeyValue, LinearSpec},
    },
};

/// A decoder-only model.
pub struct Decoder<B: Backend> {
    config: DecoderConfig,
    embedding: B::Weight,
    /// Without and with a window; the same in most families.
    frequencies: [Frequencies; 2],
    tables: Mutex<Option<Tables<B>>>,
    blocks: Vec<Block<B>>,
    last_norm: B::Weight,
    head: Head<B>,
}

/// The angles of so many positions, kept from batch to batch.
struct Tables<B: Backend> {
    n: usize,
    rotary: [Rotary<B>; 2],
}

struct Block<B: Backend> {
    attention_norm: B::Weight,
    q: FrozenLinear<B>,
    k: FrozenLinear<B>,
    v: FrozenLinear<B>,
    o: FrozenLinear<B>,
    /// Of the heads of q and of k.
    head_norms: Option<[B::Weight; 2]>,
    window: Option<usize>,
    feed_forward_norm: B::Weight,
    /// Of what attention and the feed-forward layer add (Gemma).
    after_norms: Option<[B::Weight; 2]>,
    gate: FrozenLinear<B>,
    up: FrozenLinear<B>,
    down: FrozenLinear<B>,
    /// The number of its dropout.
    site: u32,
}

/// Where tokens stand, and the angles of these places without and with a window.
struct Places<B: Backend> {
    rotary: [Rotary<B>; 2],
    positions: Arc<[u32]>,
}

impl<B: Backend> Clone for Places<B> {
    fn clone(&self) -> Self {
        Self { rotary: self.rotary.clone(), positions: Arc::clone(&self.positions) }
    }
}

impl<B: Backend> Decoder<B> {
    /// Takes the tensors that the configuration implies out of a checkpoint.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn load(backend: &B, config: DecoderConfig, checkpoint: &mut Checkpoint) -> Result<Self> {
        let mut loader = Loader { backend, checkpoint, next: 0 };
        let DecoderConfig { vocab_size, d_model, .. } = config;
        let embedding = loader.weight("model.embed_tokens.weight", &[vocab_size, d_model])?;
        let blocks =
            (0..config.n_layers).map(|i| loader.block(&config, i)).collect::<Result<Vec<_>>>()?;
        let last_norm = loader.norm(&config, "model.norm", d_model)?;
        let shape = [vocab_size, d_model];
        let head = match config.tie_word_embeddings {
            true => {
                let own = loader.checkpoint.try_tensor("lm_head.weight", &shape)?;
                own.map_or_else(|| embedding.clone(), |own| backend.weight(&own))
            }
            false => loader.weight("lm_head.weight", &shape)?,
        };
        let linear = FrozenLinear { weight: head, bias: None, index: loader.next };
        let window_rope = config.window_rope.unwrap_or(config.rope);
        let frequencies =
            [config.rope, window_rope].map(|rope| Frequencies::new(&rope, config.head_dim));
        let head = Head { linear, scale: 1.0 };
        Ok(Self {
            config,
            embedding,
            frequencies,
            tables: Mutex::default(),
            blocks,
            last_norm,
            head,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// q, k and v of a block, heads normed and turned.
    fn qkv<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        block: &'m Block<B>,
        x: &Var<B>,
        side: &Side,
        places: &Places<B>,
    ) -> [Var<B>; 3] {
        let DecoderConfig { norm_eps, head_dim, .. } = self.config;
        let h = tape.norm(x, &block.attention_norm, norm_eps);
        let [mut q, mut k, v] = tape.linears(&h, [&block.q, &block.k, &block.v], &side.segments);
        drop(h);
        if let Some([q_norm, k_norm]) = &block.head_norms {
            q = tape.norm_groups(&q, q_norm, norm_eps, head_dim);
            k = tape.norm_groups(&k, k_norm, norm_eps, head_dim);
        }
        let rotary = &places.rotary[usize::from(block.window.is_some())];
        let q = tape.rope(q, rotary, &places.positions);
        [q, tape.rope(k, rotary, &places.positions), v]
    }

    /// The angles of `n` positions, or more.
    fn tables(&self, backend: &B, n: usize) -> [Rotary<B>; 2] {
        let mut kept = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tables) = kept.as_ref().filter(|tables| tables.n >= n) {
            return tables.rotary.clone();
        }
        let n = n.next_power_of_two();
        let [rotary, of_windows] = &self.frequencies;
        let rotary = rotary.table(backend, n);
        let of_windows = match self.config.window_rope {
            Some(_) => of_windows.table(backend, n),
            None => rotary.clone(),
        };
        let rotary = [rotary, of_windows];
        *kept = Some(Tables { n, rotary: rotary.clone() });
        rotary
    }

    fn embed(&self, tape: &mut Tape<'_, B>, ids: Ids<'_, B>) -> Var<B> {
        let root = (self.config.d_model as f64).sqrt() as f32;
        // Transformers rounds it to the type of the activations.
        let activations = tape.backend().room(0, 0, Precision::Activation).dtype();
        let scale = match (self.config.is_gemma, activations) {
            (false, _) => 1.0,
            (true, Dtype::Bf16) => bf16::from_f32(root).to_f32(),
            (true, _) => root,
        };
        tape.embed_scaled(&self.embedding, ids, scale)
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
        let DecoderConfig {
            n_heads, n_kv_heads, head_dim, norm_eps, activation, score_scale, ..
        } = self.config;
        let spec = AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: score_scale,
            causal: true,
            window: block.window,
            bias: None,
            dropout: side.dropout(block.site),
        };
        let attended = tape.attention(q, &side.spans, keys, spec);
        let after = |i: usize| block.after_norms.as_ref().map(|norms| &norms[i]);
        let x = self.onto(tape, x, &attended, (&block.o, after(0)), side);
        drop(attended);
        let h = tape.norm(&x, &block.feed_forward_norm, norm_eps);
        let [gate, up] = tape.linears(&h, [&block.gate, &block.up], &side.segments);
        drop(h);
        let h = tape.gated(gate, Some(up), activation, None);
        self.onto(tape, &x, &h, (&block.down, after(1)), side)
    }

    /// `x + linear(h)`, maybe normed before it is added.
    fn onto<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        x: &Var<B>,
        h: &Var<B>,
        (linear, norm): (&'m FrozenLinear<B>, Option<&'m B::Weight>),
        side: &Side,
    ) -> Var<B> {
        let Some(norm) = norm else {
            return tape.linear(h, linear, &side.segments, LinearSpec::onto(x));
        };
        let [h] = tape.linears(h, [linear], &side.segments);
        let h = tape.norm(&h, norm, self.config.norm_eps);
        tape.add(x, h)
    }
}

impl<B: Backend> Network<B> for Decoder<B> {
    fn head(&self) -> &Head<B> {
        &self.head
    }

    fn hidden<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Var<B> {
        let side = &sides.target;
        let mut x = self.embed(tape, Ids::Given(&batch.target));
        if side.watch {
            x = tape.watched(x.tensor().clone());
        }
        let lens = &side.spans.lens;
        let places = Places {
            rotary: self.tables(tape.backend(), lens.iter().copied().max().unwrap_or(0)),
            positions: lens.iter().flat_map(|&len| 0..len as u32).collect(),
        };
        for block in &self.blocks {
            let (side, places) = (side.clone(), places.clone());
            x = tape.checkpoint(&[&x], side.keep, move |tape, inputs| {
                let x = &inputs[0];
                let [q, k, v] = self.qkv(tape, block, x, &side, &places);
                let keys = KeyValue { k, v, spans: Arc::clone(&side.spans) };
                self.rest(tape, block, x, (q, keys), &side)
            });
        }
        let x = tape.gather(x, batch.label_rows.as_deref());
        tape.norm(&x, &self.last_norm, self.config.norm_eps)
    }

    fn room(&self, backend: &B, room: Room) -> Decoding<B> {
        let DecoderConfig { n_layers, n_kv_heads, head_dim, .. } = self.config;
        Decoding::new(backend, [n_layers, n_kv_heads * head_dim], false, room)
    }

    fn advance<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        step: &Step<'_, B>,
    ) -> Var<B> {
        let backend = tape.backend();
        let placed = decoding.cache.place(backend, step.slots, step.lens);
        let longer = decoding.more_positions().map(|n| self.tables(backend, n));
        let Some(rotary) = longer.or_else(|| decoding.rotary.take()) else {
            unreachable!("a step has a token")
        };
        let places = Places { rotary, positions: placed.positions.as_slice().into() };
        let side = Side::inference(Arc::clone(&placed.queries), Arc::clone(step.segments));
        let mut x = self.embed(tape, step.ids);
        for (layer, block) in self.blocks.iter().enumerate() {
            let [q, k, v] = self.qkv(tape, block, &x, &side, &places);
            let keys = decoding.cache.extend(backend, layer, &placed, &k, &v);
            x = self.rest(tape, block, &x, (q, keys), &side);
        }
        decoding.rotary = Some(places.rotary);
        let x = tape.gather(x, placed.last.as_deref());
        tape.norm(&x, &self.last_norm, self.config.norm_eps)
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a mut Checkpoint,
    next: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight> {
        Ok(self.backend.weight(&self.checkpoint.tensor(name, shape)?))
    }

    fn linear(
        &mut self,
        path: &str,
        [d_in, d_out]: [usize; 2],
        bias: bool,
    ) -> Result<FrozenLinear<B>> {
        let weight = self.weight(&format!("{path}.weight"), &[d_out, d_in])?;
        let bias = bias.then(|| self.weight(&format!("{path}.bias"), &[d_out])).transpose()?;
        self.next += 1;
        Ok(FrozenLinear { weight, bias, index: self.next - 1 })
    }

    /// A norm's weight, as it multiplies.
    fn norm(&mut self, config: &DecoderConfig, path: &str, width: usize) -> Result<B::Weight> {
        let weight = self.checkpoint.tensor(&format!("{path}.weight"), &[width])?;
        Ok(match config.is_gemma {
            true => self.backend.weight(&weight.plus(1.0)),
            false => self.backend.weight(&weight),
        })
    }

    fn block(&mut self, config: &DecoderConfig, i: usize) -> Result<Block<B>> {
        let DecoderConfig { d_model, head_dim, qkv_bias, o_bias, mlp_bias, is_gemma, .. } = *config;
        let layer = format!("model.layers.{i}");
        let norm = |loader: &mut Self, name: &str, width| {
            loader.norm(config, &format!("{layer}.{name}"), width)
        };
        let after_norms = match is_gemma {
            true => Some([
                norm(self, "post_attention_layernorm", d_model)?,
                norm(self, "post_feedforward_layernorm", d_model)?,
            ]),
            false => None,
        };
        let before_feed_forward =
            if is_gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let head_norms = match config.qk_norm {
            true => Some([
                norm(self, "self_attn.q_norm", head_dim)?,
                norm(self, "self_attn.k_norm", head_dim)?,
            ]),
            false => None,
        };
        self.checkpoint.ignore(
            &format!("{layer}.self_attn.rotary_emb.inv_freq"),
            "the rotary frequencies, which config.json gives",
        );
        let mut linears = linears(config).into_iter();
        let mut linear = |bias| {
            let (name, shape) = linears.next().expect("as many as a block has");
            self.linear(&format!("{layer}.{name}"), shape, bias)
        };
        Ok(Block {
            q: linear(qkv_bias)?,
            k: linear(qkv_bias)?,
            v: linear(qkv_bias)?,
            o: linear(o_bias)?,
            gate: linear(mlp_bias)?,
            up: linear(mlp_bias)?,
            down: linear(mlp_bias)?,
            head_norms,
            attention_norm: norm(self, "input_layernorm", d_model)?,
            feed_forward_norm: norm(self, before_feed_forward, d_model)?,
            after_norms,
            window: config.windows[i],
            site: i as u32,
        })
    }
}

/// The linears of a block with `[d_in, d_out]`, in Hugging Face's order.
fn linears(config: &DecoderConfig) -> [(&'static str, [usize; 2]); 7] {
    let DecoderConfig { d_model, d_ff, n_heads, n_kv_heads, head_dim, .. } = *config;
    let (inner, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
    [
        ("self_attn.q_proj", [d_model, inner]),
        ("self_attn.k_proj", [d_model, kv]),
        ("self_attn.v_proj", [d_model, kv]),
        ("self_attn.o_proj", [inner, d_model]),
        ("mlp.gate_proj", [d_model, d_ff]),
        ("mlp.up_proj", [d_model, d_ff]),
        ("mlp.down_proj", [d_ff, d_model]),
    ]
}

/// Every module of a decoder, in Hugging Face's order; the numbers of the linears are those that
/// [`Decoder::load`] gives.
pub fn modules(config: &DecoderConfig) -> Vec<Module> {
    let mut modules = Vec::new();
    let mut index = 0;
    let mut push = |path: String, kind| modules.push(Module { path, kind });
    for name in ["model", "model.embed_tokens", "model.layers"] {
        push(name.into(), ModuleKind::Other);
    }
    for i in 0..config.n_layers {
        let layer = format!("model.layers.{i}");
        push(layer.clone(), ModuleKind::Other);
        push(format!("{layer}.self_attn"), ModuleKind::Other);
        for (name, [d_in, d_out]) in linears(config) {
            if name == "mlp.gate_proj" {
                let norms: &[&str] = if config.qk_norm { &["q_norm", "k_norm"] } else { &[] };
                for norm in norms {
                    push(format!("{layer}.self_attn.{norm}"), ModuleKind::Other);
                }
                push(format!("{layer}.mlp"), ModuleKind::Other);
            }
            push(format!("{layer}.{name}"), ModuleKind::Linear { index, d_in, d_out });
            index += 1;
        }
        for name in ["mlp.act_fn", "input_layernorm", "post_attention_layernorm"] {
            push(format!("{layer}.{name}"), ModuleKind::Other);
        }
        if config.is_gemma {
            for name in ["pre_feedforward_layernorm", "post_feedforward_layernorm"] {
                push(format!("{layer}.{name}"), ModuleKind::Other);
            }
        }
    }
    for name in ["model.norm", "model.rotary_emb"] {
        push(name.into(), ModuleKind::Other);
    }
    push("lm_head".into(), ModuleKind::Head);
    modules
}
