//! `config.json` of GPT-2: transformers' `GPT2Config` (5.17), defaults included.

use super::{
    MAX_FEATURES, MAX_FEED_FORWARD, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, activation_named, fraction,
    norm_eps, saved_dtype,
};
use crate::{
    activation::Activation,
    dtype::Dtype,
    error::Result,
    formats::{fields::Fields, json::excerpt},
};

/// Keys of classifier heads.
const UNUSED: [&str; 5] = [
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
];

/// The configuration of a GPT-2.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Features between the layers.
    pub d_model: usize,
    /// Features inside a feed-forward layer.
    pub d_ff: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Heads; divides `d_model`.
    pub n_heads: usize,
    /// The most tokens of a sequence: rows of the table of positions.
    pub max_positions: usize,
    /// Added to the variance in the norms.
    pub norm_eps: f32,
    /// The activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether scores are divided by the root of the head's width.
    pub scale_scores: bool,
    /// Whether those of layer i are also divided by i + 1.
    pub scale_by_layer: bool,
    /// The dropout that the base was trained with, at every place.
    pub dropout: f32,
    /// The padding id, if there is one.
    pub pad_token_id: Option<u32>,
    /// The ids that end an output; none is possible.
    pub eos_token_ids: Vec<u32>,
    /// The type that the weights were saved in, if the file says so.
    pub dtype: Option<Dtype>,
}

impl Gpt2Config {
    pub(super) fn from_fields(fields: &mut Fields) -> Result<Self> {
        let vocab_size = fields.size(&["vocab_size"], 50_257, MAX_VOCAB)?;
        let d_model = fields.size(&["n_embd", "hidden_size"], 768, MAX_FEATURES)?;
        let d_ff = fields.size(&["n_inner"], 4 * d_model, MAX_FEED_FORWARD)?;
        let n_heads = fields.size(&["n_head", "num_attention_heads"], 12, MAX_HEADS)?;
        if !d_model.is_multiple_of(n_heads) {
            let detail = format!("{n_heads} does not divide n_embd {d_model}");
            return Err(fields.error("n_head", detail));
        }
        let activation = match fields.text("activation_function")? {
            None => Activation::GeluNew,
            Some(name) => activation_named(&name).ok_or_else(|| {
                fields.error("activation_function", format!("{} is not supported", excerpt(&name)))
            })?,
        };
        // Reordering and upcasting change nothing where everything is added up in f32.
        let _ = fields.boolean("reorder_and_upcast_attn")?;
        // The head is the embedding unless the files have one of its own.
        let _ = fields.boolean("tie_word_embeddings")?;
        for key in UNUSED {
            let _ = fields.take(key);
        }
        // The old name of the number of positions, which early files write beside the new one.
        let _ = fields.take("n_ctx");
        if fields.boolean("is_encoder_decoder")? == Some(true) {
            return Err(fields.error("is_encoder_decoder", "true contradicts model_type"));
        }
        let dropout = fraction(fields, "resid_pdrop", 0.1)?;
        for key in ["embd_pdrop", "attn_pdrop"] {
            let other = fraction(fields, key, 0.1)?;
            if other != dropout {
                let detail = format!(
                    "{other} is another than resid_pdrop {dropout}, which is not supported"
                );
                return Err(fields.error(key, detail));
            }
        }
        let scale_by_layer = fields.boolean("scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
        let eos_token_ids = match fields.token_ids("eos_token_id", vocab_size)? {
            Some(ids) => ids,
            None if vocab_size > 50_256 => vec![50_256],
            None => Vec::new(),
        };
        Ok(Self {
            vocab_size,
            d_model,
            d_ff,
            n_layers: fields.size(&["n_layer", "num_hidden_layers"], 12, MAX_LAYERS)?,
            n_heads,
            max_positions: fields.size(
                &["n_positions", "max_position_embeddings"],
                1024,
                MAX_VOCAB,
            )?,
            norm_eps: norm_eps(fields, "layer_norm_epsilon", 1e-5)?,
            activation,
            scale_scores: fields.boolean("scale_attn_weights")?.unwrap_or(true),
            scale_by_layer,
            dropout,
            pad_token_id: fields.token_id("pad_token_id", vocab_size)?.flatten(),
            eos_token_ids,
            dtype: saved_dtype(fields)?,
        })
    }
}
