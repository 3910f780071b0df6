//! `config.json` of T5 and mT5: transformers' `T5Config` and `MT5Config`, defaults included.

use super::{
    MAX_FEATURES, MAX_FEED_FORWARD, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, activation_named, fraction,
    norm_eps, saved_dtype,
};
use crate::{
    activation::Activation,
    dtype::Dtype,
    error::{Error, Result},
    formats::{fields::Fields, json::excerpt},
};

/// The configuration of a T5 encoder-decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// `t5` or `mt5`.
    pub model_type: String,
    /// Rows of the shared embedding.
    pub vocab_size: usize,
    /// Features between the layers.
    pub d_model: usize,
    /// Features of a head; `num_heads * d_kv` need not be `d_model`.
    pub d_kv: usize,
    /// Features inside a feed-forward layer.
    pub d_ff: usize,
    /// Blocks of the encoder.
    pub num_layers: usize,
    /// Blocks of the decoder.
    pub num_decoder_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Rows of the table of relative position biases.
    pub relative_attention_num_buckets: usize,
    /// The distance from which on all positions share a bucket.
    pub relative_attention_max_distance: usize,
    /// The dropout that the base was trained with.
    pub dropout_rate: f32,
    /// Added to the mean square in RMSNorm.
    pub layer_norm_epsilon: f32,
    /// The activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether the feed-forward layers are gated: `wi_0`, `wi_1` instead of `wi`.
    pub gated: bool,
    /// The padding id, if there is one.
    pub pad_token_id: Option<u32>,
    /// The ids that end an output; none is possible.
    pub eos_token_ids: Vec<u32>,
    /// The id that the decoder begins with.
    pub decoder_start_token_id: u32,
    /// `scale_decoder_outputs` as it stands in the file; see [`Self::scales_head`].
    pub scale_decoder_outputs: Option<bool>,
    /// `tie_word_embeddings` as it stands in the file. Whether the head is tied is seen from the
    /// tensors: transformers 5 writes true here always.
    pub tie_word_embeddings: Option<bool>,
    /// The type that the weights were saved in, if the file says so.
    pub dtype: Option<Dtype>,
}

impl T5Config {
    /// transformers' T5Config and MT5Config, defaults included.
    pub(super) fn from_fields(fields: &mut Fields, model_type: String) -> Result<Self> {
        let mt5 = model_type == "mt5";
        let default = |t5: usize, of_mt5: usize| if mt5 { of_mt5 } else { t5 };

        let vocab_size = fields.size(&["vocab_size"], default(32_128, 250_112), MAX_VOCAB)?;
        let d_model = fields.size(&["d_model", "hidden_size"], 512, MAX_FEATURES)?;
        let d_kv = fields.size(&["d_kv", "head_dim"], 64, MAX_FEATURES)?;
        let d_ff = fields.size(&["d_ff"], default(2048, 1024), MAX_FEED_FORWARD)?;
        let num_layers =
            fields.size(&["num_layers", "num_hidden_layers"], default(6, 8), MAX_LAYERS)?;
        let num_decoder_layers = fields.size(&["num_decoder_layers"], num_layers, MAX_LAYERS)?;
        let num_heads =
            fields.size(&["num_heads", "num_attention_heads"], default(8, 6), MAX_HEADS)?;

        // Half the decoder's buckets are one position each, and in the encoder half of each
        // direction's; the rest spread over the logarithm of distance / that half.
        let buckets = "relative_attention_num_buckets";
        let relative_attention_num_buckets = fields.size(&[buckets], 32, MAX_FEATURES)?;
        if relative_attention_num_buckets < 4 {
            return Err(fields.error(
                buckets,
                format!("expected at least 4, found {relative_attention_num_buckets}"),
            ));
        }
        let distance = "relative_attention_max_distance";
        let relative_attention_max_distance = fields.size(&[distance], 128, MAX_VOCAB)?;
        // An encoder has no logarithm to spread over below a quarter. (A decoder below half: there
        // transformers fails on distances of half and more; here they are in the last bucket.)
        if relative_attention_max_distance <= relative_attention_num_buckets / 4 {
            return Err(fields.error(
                distance,
                format!("expected more than a quarter of {buckets} ({relative_attention_num_buckets}), found {relative_attention_max_distance}"),
            ));
        }

        let dropout_rate = fraction(fields, "dropout_rate", 0.1)?;
        let layer_norm_epsilon = norm_eps(fields, "layer_norm_epsilon", 1e-6)?;
        let (activation, gated) = feed_forward(fields, if mt5 { "gated-gelu" } else { "relu" })?;

        let pad_token_id = fields.token_id_or("pad_token_id", vocab_size, 0)?;
        let eos_token_ids = fields.token_ids_or("eos_token_id", vocab_size, &[1])?;
        let start = "decoder_start_token_id";
        let decoder_start_token_id =
            fields.token_id(start, vocab_size)?.flatten().or(pad_token_id).ok_or_else(|| {
                fields.error(start, "missing, and there is no pad_token_id either")
            })?;
        Ok(Self {
            model_type,
            vocab_size,
            d_model,
            d_kv,
            d_ff,
            num_layers,
            num_decoder_layers,
            num_heads,
            relative_attention_num_buckets,
            relative_attention_max_distance,
            dropout_rate,
            layer_norm_epsilon,
            activation,
            gated,
            pad_token_id,
            eos_token_ids,
            decoder_start_token_id,
            scale_decoder_outputs: fields.boolean("scale_decoder_outputs")?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?,
            dtype: saved_dtype(fields)?,
        })
    }

    /// Whether the head's input is multiplied by d_model^-0.5: as `scale_decoder_outputs` says, else
    /// when `tie_word_embeddings` is not false. mT5 only scales when told so: transformers 5 forces
    /// its `tie_word_embeddings` to true and never scales.
    pub fn scales_head(&self) -> bool {
        let default = self.model_type == "t5" && self.tie_word_embeddings != Some(false);
        self.scale_decoder_outputs.unwrap_or(default)
    }
}

/// `feed_forward_proj`, checked against the two fields that transformers derives from it and writes
/// too.
fn feed_forward(fields: &mut Fields, default: &str) -> Result<(Activation, bool)> {
    let key = "feed_forward_proj";
    let project = fields.text(key)?.unwrap_or_else(|| default.to_owned());
    let (gated, name) = match project.strip_prefix("gated-") {
        Some("gelu") => (true, "gelu_new"), // So in the first T5 v1.1 files, and ever since.
        Some(name) => (true, name),
        None => (false, project.as_str()),
    };
    let unsupported = |key: &str, found: &str| {
        Error::file(
            fields.path(),
            format!(
                "field {key}: {} is not supported; supported: relu, gelu, gelu_new, silu, also \
                behind \"gated-\"",
                excerpt(found)
            ),
        )
    };
    let activation = activation_named(name).ok_or_else(|| unsupported(key, &project))?;
    let derived = fields.text("dense_act_fn")?;
    if let Some(derived) = derived
        && activation_named(&derived) != Some(activation)
    {
        return Err(fields.error(
            "dense_act_fn",
            format!("{} contradicts {key} {}", excerpt(&derived), excerpt(&project)),
        ));
    }
    let derived = fields.boolean("is_gated_act")?;
    if derived.is_some_and(|derived| derived != gated) {
        return Err(fields
            .error("is_gated_act", format!("{} contradicts {key} {}", !gated, excerpt(&project))));
    }
    Ok((activation, gated))
}
