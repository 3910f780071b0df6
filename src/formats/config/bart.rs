//! `config.json` of BART: transformers' `BartConfig` (5.17), defaults included.

use super::{
    MAX_FEATURES, MAX_FEED_FORWARD, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, activation_named, fraction,
    saved_dtype,
};
use crate::{
    activation::Activation,
    dtype::Dtype,
    error::Result,
    formats::{fields::Fields, json::excerpt},
};

/// The configuration of a BART encoder-decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct BartConfig {
    /// Rows of the shared embedding.
    pub vocab_size: usize,
    /// Features between the layers.
    pub d_model: usize,
    /// The encoder.
    pub encoder: BartStack,
    /// The decoder.
    pub decoder: BartStack,
    /// The most tokens of a sequence on either side.
    pub max_positions: usize,
    /// The activation of the feed-forward layers.
    pub activation: Activation,
    /// The dropout that the base was trained with.
    pub dropout: f32,
    /// The padding id, if there is one.
    pub pad_token_id: Option<u32>,
    /// The ids that end an output; none is possible.
    pub eos_token_ids: Vec<u32>,
    /// The id that the decoder begins with.
    pub decoder_start_token_id: u32,
    /// The type that the weights were saved in, if the file says so.
    pub dtype: Option<Dtype>,
}

/// The shape of one of the two stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BartStack {
    /// Layers.
    pub n_layers: usize,
    /// Heads; divides `d_model`.
    pub n_heads: usize,
    /// Features inside a feed-forward layer.
    pub d_ff: usize,
}

impl BartConfig {
    pub(super) fn from_fields(fields: &mut Fields) -> Result<Self> {
        let vocab_size = fields.size(&["vocab_size"], 50_265, MAX_VOCAB)?;
        let d_model = fields.size(&["d_model", "hidden_size"], 1024, MAX_FEATURES)?;
        let encoder = stack(fields, "encoder", d_model)?;
        let decoder = stack(fields, "decoder", d_model)?;
        // Aliases of the encoder's, which older versions write too.
        for (alias, size) in
            [("num_hidden_layers", encoder.n_layers), ("num_attention_heads", encoder.n_heads)]
        {
            let found = fields.size(&[alias], size, MAX_LAYERS)?;
            if found != size {
                return Err(
                    fields.error(alias, format!("{found} contradicts the encoder's {size}"))
                );
            }
        }
        let max_positions = fields.size(&["max_position_embeddings"], 1024, MAX_VOCAB)?;
        let activation = match fields.text("activation_function")? {
            None => Activation::Gelu,
            Some(name) => activation_named(&name).ok_or_else(|| {
                fields.error("activation_function", format!("{} is not supported", excerpt(&name)))
            })?,
        };
        if fields.boolean("scale_embedding")? == Some(true) {
            return Err(fields.error("scale_embedding", "true is not supported"));
        }
        for key in
            ["attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"]
        {
            let rate = fraction(fields, key, 0.0)?;
            if rate > 0.0 {
                tracing::warn!(
                    "{}: {key} {rate} is not applied in training",
                    fields.path().display()
                );
            }
        }
        let eos_token_ids = fields.token_ids_or("eos_token_id", vocab_size, &[2])?;
        let start = "decoder_start_token_id";
        let decoder_start_token_id = fields
            .token_id_or(start, vocab_size, 2)?
            .ok_or_else(|| fields.error(start, "expected a token id, found null"))?;
        // The head is the embedding unless the files have one of its own.
        let _ = fields.boolean("tie_word_embeddings")?;
        Ok(Self {
            vocab_size,
            d_model,
            encoder,
            decoder,
            max_positions,
            activation,
            dropout: fraction(fields, "dropout", 0.1)?,
            pad_token_id: fields.token_id_or("pad_token_id", vocab_size, 1)?,
            eos_token_ids,
            decoder_start_token_id,
            dtype: saved_dtype(fields)?,
        })
    }

    /// One of the stacks.
    pub fn stack(&self, decoder: bool) -> BartStack {
        if decoder { self.decoder } else { self.encoder }
    }
}

fn stack(fields: &mut Fields, name: &str, d_model: usize) -> Result<BartStack> {
    let heads = format!("{name}_attention_heads");
    let n_heads = fields.size(&[&heads], 16, MAX_HEADS)?;
    if !d_model.is_multiple_of(n_heads) {
        return Err(fields.error(&heads, format!("{n_heads} does not divide d_model {d_model}")));
    }
    Ok(BartStack {
        n_layers: fields.size(&[&format!("{name}_layers")], 12, MAX_LAYERS)?,
        n_heads,
        d_ff: fields.size(&[&format!("{name}_ffn_dim")], 4096, MAX_FEED_FORWARD)?,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::{super::ModelConfig, *};

    fn parse(config: &Value) -> Result<BartConfig> {
        match ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))? {
            ModelConfig::Bart(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_are_read_or_refused_by_name() {
        let config = parse(&json!({"model_type": "bart", "encoder_layers": 3})).unwrap();
        let shape = |n_layers| BartStack { n_layers, n_heads: 16, d_ff: 4096 };
        assert_eq!((config.encoder, config.decoder), (shape(3), shape(12)));
        assert_eq!((config.activation, config.dropout), (Activation::Gelu, 0.1));
        assert_eq!((config.decoder_start_token_id, config.pad_token_id), (2, Some(1)));
        for (key, value, reason) in [
            ("encoder_attention_heads", json!(7), "7 does not divide d_model 1024"),
            ("scale_embedding", json!(true), "field scale_embedding: true is not supported"),
            ("num_hidden_layers", json!(5), "5 contradicts the encoder's 12"),
            ("activation_function", json!("mish"), "\"mish\" is not supported"),
            ("decoder_start_token_id", json!(null), "expected a token id, found null"),
            ("dropout", json!(2), "below 1, found 2"),
        ] {
            let mut config = json!({"model_type": "bart"});
            config[key] = value;
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}\nnot: {reason}");
        }
    }
}
