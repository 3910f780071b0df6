//! Attention: flash style, so no score matrix is kept or even formed.
//!
//! Saved: q, k, v, o and the log-sum-exp of each row and head. Decoding attends to a cache
//! ([`KeyValue`] rows anywhere in a larger tensor) and is never recorded.

use std::sync::Arc;

use crate::{
    kernels::{
        Backend,
        ops::{Attention, AttentionBackward, Dropout, RelativeBias, Spans},
    },
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

/// What an attention is, beside its inputs.
pub struct AttentionSpec<B: Backend> {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// With `causal`: how many keys a query sees at most, its own included.
    pub window: Option<usize>,
    /// Added to the scores.
    pub bias: Option<RelativeBias<B>>,
    /// On the probabilities.
    pub dropout: Option<Dropout>,
}

/// Keys and values, and where each sequence's rows of them are.
pub struct KeyValue<B: Backend> {
    /// `[key rows, n_kv_heads * head_dim]`.
    pub k: Var<B>,
    /// `[key rows, n_kv_heads * head_dim]`.
    pub v: Var<B>,
    /// Each sequence's rows.
    pub spans: Arc<Spans>,
}

struct AttentionNode<B: Backend> {
    q: Var<B>,
    keys: KeyValue<B>,
    queries: Arc<Spans>,
    spec: AttentionSpec<B>,
    o: Option<Tensor<B>>,
    lse: Option<Tensor<B>>,
    o_id: Option<usize>,
}

impl<B: Backend> AttentionNode<B> {
    fn args(&self) -> Attention<'_, B> {
        Attention {
            q: self.q.tensor(),
            k: self.keys.k.tensor(),
            v: self.keys.v.tensor(),
            queries: &self.queries,
            keys: &self.keys.spans,
            n_heads: self.spec.n_heads,
            n_kv_heads: self.spec.n_kv_heads,
            head_dim: self.spec.head_dim,
            scale: self.spec.scale,
            causal: self.spec.causal,
            window: self.spec.window,
            bias: self.spec.bias.as_ref(),
            dropout: self.spec.dropout.as_ref(),
        }
    }
}

impl<B: Backend> Tape<'_, B> {
    /// Attends from `q` `[query tokens, n_heads * head_dim]` to keys and values, sequence by
    /// sequence; the result has the shape of `q`.
    pub fn attention(
        &mut self,
        q: Var<B>,
        queries: &Arc<Spans>,
        keys: KeyValue<B>,
        spec: AttentionSpec<B>,
    ) -> Var<B> {
        let needed = [&q, &keys.k, &keys.v].iter().any(|var| var.id().is_some());
        let queries = Arc::clone(queries);
        let mut node = AttentionNode { q, keys, queries, spec, o: None, lse: None, o_id: None };
        let attended = self.backend.attention(&node.args());
        node.o_id = self.new_id(needed);
        let id = node.o_id;
        if id.is_some() {
            node.o = Some(attended.o.clone());
            node.lse = Some(attended.lse);
            self.push(node);
        }
        Var { tensor: attended.o, id, again: None }
    }
}

impl<'m, B: Backend> Operation<'m, B> for AttentionNode<B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_o) = pass.take(self.o_id) else { return };
        let (Some(o), Some(lse)) = (&self.o, &self.lse) else { return };
        let forward = &self.args();
        let args = AttentionBackward { forward, o, lse, d_o: &d_o };
        let [d_q, d_k, d_v] = pass.backend.attention_backward(args);
        pass.give(self.q.id(), d_q);
        pass.give(self.keys.k.id(), d_k);
        pass.give(self.keys.v.id(), d_v);
    }
}
