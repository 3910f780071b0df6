//! What an architecture is to everybody else: hidden states from a batch, one step of decoding, and
//! a head. Losses, logits and generation are built from these, the same for all.
//!
//! ```text
//! batch ─ hidden ─> [labels, d_model] ─ head ─> nll, logits
//! room ─> Decoding ─ encode, advance ─> [rows, d_model] ─ head ─> logits of the next token
//! ```

use std::sync::Arc;

use crate::{
    kernels::{
        Backend,
        ops::{Dropout, Key, Segments, Spans, TokenKey},
    },
    model::{
        batch::{Batch, RoutingRows},
        cache::{Decoding, Room, Step},
    },
    tape::{
        Tape, Var,
        ops::{FrozenLinear, LinearSpec, head::HeadSpec},
    },
    tensor::Tensor,
};

/// An architecture with its frozen weights.
pub trait Network<B: Backend>: Send + Sync {
    /// The head.
    fn head(&self) -> &Head<B>;

    /// What the head reads under teacher forcing: a row for each label of the batch, `[labels,
    /// d_model]`.
    fn hidden<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Var<B>;

    /// Empty caches for decoding.
    fn room(&self, backend: &B, room: Room) -> Decoding<B>;

    /// Runs the encoder, where there is one, for a batch whose example i is decoded in
    /// `slots[i]`. Nothing of the decoder runs: a sequence's first step brings its prompt (causal)
    /// or the start id.
    fn encode<'m>(
        &'m self,
        _tape: &mut Tape<'m, B>,
        _decoding: &mut Decoding<B>,
        _batch: &Batch,
        _sides: &Sides,
        _slots: &[usize],
    ) {
    }

    /// Appends a step's tokens to the caches; what the head reads after the last one of each
    /// sequence, `[sequences of the step, d_model]`.
    fn advance<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        decoding: &mut Decoding<B>,
        step: &Step<'_, B>,
    ) -> Var<B>;

    /// The nll of every label under teacher forcing, recorded for the gradient of `d_nll` times
    /// their sum.
    fn loss<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        batch: &Batch,
        sides: &Sides,
        d_nll: f32,
    ) -> B::Numbers {
        let hidden = self.hidden(tape, batch, sides);
        let Head { linear, scale } = self.head();
        let (weight, labels, scale) = (&linear.weight, &batch.labels[..], *scale);
        tape.head_loss(&hidden, HeadSpec { weight, labels, scale, d_nll })
    }

    /// The logits of every label, `[labels, vocabulary]`. For looking at; losses and generation never
    /// hold them all.
    fn logits<'m>(&'m self, tape: &mut Tape<'m, B>, batch: &Batch, sides: &Sides) -> Vec<f64> {
        let hidden = self.hidden(tape, batch, sides);
        let logits = self.apply_head(tape, &hidden);
        let scale = f64::from(self.head().scale);
        tape.backend().download(&logits).into_iter().map(|l| l * scale).collect()
    }

    /// Logits of hidden states, before [`Head::scale`], `[rows, vocabulary]` in full precision.
    fn apply_head<'m>(&'m self, tape: &mut Tape<'m, B>, hidden: &Var<B>) -> Tensor<B> {
        // The head is never adapted, so it does not matter whose row is whose.
        let segments = Arc::new(Segments::new(&[hidden.tensor().rows()], &[0], 1));
        let spec = LinearSpec { residual: None, dropout: None, full_precision: true };
        tape.linear(hidden, &self.head().linear, &segments, spec).tensor().clone()
    }
}

/// The output head: never adapted, so its number is one past the adaptable linears.
pub struct Head<B: Backend> {
    /// `[vocabulary, d_model]`.
    pub linear: FrozenLinear<B>,
    /// Multiplies the logits (T5 v1.0: `d_model^-0.5`).
    pub scale: f32,
}

/// The dropouts of a pass over one stack.
#[derive(Clone, Debug)]
pub struct DropoutPlan {
    /// Probability of dropping.
    pub p: f32,
    /// Seed, purpose and step.
    pub key: Key,
    /// The stack's tokens.
    pub tokens: Arc<[TokenKey]>,
}

/// What a pass over one stack is about, beside its ids.
#[derive(Clone, Debug)]
pub struct Side {
    /// Each example's tokens.
    pub spans: Arc<Spans>,
    /// Which routing row they belong to.
    pub segments: Arc<Segments>,
    /// Where the base drops.
    pub dropout: Option<DropoutPlan>,
    /// Whether blocks keep their activations for the backward (else they run again).
    pub keep: bool,
    /// Whether the gradient of the embedding is wanted (a frozen base's floor in `bench`).
    pub watch: bool,
}

impl Side {
    /// A side that only computes: no dropout, nothing to come back to.
    pub fn inference(spans: Arc<Spans>, segments: Arc<Segments>) -> Self {
        Self { spans, segments, dropout: None, keep: true, watch: false }
    }

    /// The dropout of a site.
    pub fn dropout(&self, site: u32) -> Option<Dropout> {
        let DropoutPlan { p, key, tokens } = self.dropout.clone()?;
        Some(Dropout { p, key, site, tokens })
    }
}

/// Both sides of a pass over a batch; a causal model has only the target's.
#[derive(Clone, Debug)]
pub struct Sides {
    /// The encoder's.
    pub source: Side,
    /// The decoder's.
    pub target: Side,
}

impl Sides {
    /// A pass over `batch` whose examples use the mixtures of `rows`; `dropout` is probability and key.
    pub fn new(batch: &Batch, rows: &RoutingRows, dropout: Option<(f32, Key)>) -> Self {
        let side = |spans: &Arc<Spans>, tokens: Arc<[TokenKey]>| Side {
            dropout: dropout.filter(|&(p, _)| p > 0.0).map(|(p, key)| DropoutPlan {
                p,
                key,
                tokens,
            }),
            ..Side::inference(Arc::clone(spans), rows.segments(spans))
        };
        Self {
            source: side(&batch.source_spans, batch.source_keys()),
            target: side(&batch.target_spans, batch.target_keys()),
        }
    }
}
