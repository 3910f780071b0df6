//! `config.json` of the decoder-only families: a function for each, that says what the family's keys
//! mean. Defaults and meanings are those of transformers' `configuration_<family>.py` and
//! `modeling_<family>.py` (5.17); both spellings of the rotary settings are read, `rope_parameters`
//! (transformers 5) and `rope_scaling` beside `rope_theta` (4).
//!
//! | | llama | mistral | qwen2 | qwen3 | gemma3_text |
//! |---|---|---|---|---|---|
//! | biases | `attention_bias`: q,k,v,o; `mlp_bias` | none | q, k, v | `attention_bias`: q,k,v,o | `attention_bias`: q,k,v,o |
//! | heads of q and k are normed | no | no | no | yes | yes |
//! | window | none | `sliding_window` in every layer | by `layer_types` | by `layer_types` | by `layer_types`: five of six |
//! | `head_dim` by default | d_model / n_heads | d_model / n_heads | d_model / n_heads | 128 | 256 |
//! | norms | before | before | before | before | before and after, weights are 1 more than the file's |
//! | rotary settings | one | one | one | one | others within windows |

use serde_json::Value;

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

/// The most positions that a model may say it has.
const MAX_POSITIONS: usize = 1 << 28;

/// The configuration of a decoder-only model, whatever its family.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The family: `llama`, `mistral`, `qwen2`, `qwen3` or `gemma3_text`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Features between the layers.
    pub d_model: usize,
    /// Features inside a feed-forward layer.
    pub d_ff: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Features of a head; even; `n_heads * head_dim` need not be `d_model`.
    pub head_dim: usize,
    /// The most tokens of a sequence.
    pub max_positions: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// The activation of the feed-forward layers, which are gated.
    pub activation: Activation,
    /// How positions turn q and k.
    pub rope: RopeConfig,
    /// How they do in layers with a window, where that differs.
    pub window_rope: Option<RopeConfig>,
    /// Multiplies the scores of attention.
    pub score_scale: f32,
    /// Whether it is a Gemma: the embedding is multiplied by the root of `d_model`, norms multiply by
    /// one more than their weights, and what a block adds is normed before.
    pub is_gemma: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and of k is normed before it is turned.
    pub qk_norm: bool,
    /// By layer: how many keys a query sees at most, its own included.
    pub windows: Vec<Option<usize>>,
    /// Dropout of the probabilities in training.
    pub attention_dropout: f32,
    /// Whether the head is the embedding, where the files have no head of its own.
    pub tie_word_embeddings: bool,
    /// The padding id, if there is one.
    pub pad_token_id: Option<u32>,
    /// The ids that end an output; none is possible.
    pub eos_token_ids: Vec<u32>,
    /// The type that the weights were saved in, if the file says so.
    pub dtype: Option<Dtype>,
}

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// The longest wavelength is about `2 pi theta`.
    pub theta: f64,
    /// What is done to the frequencies.
    pub scaling: RopeScaling,
}

/// How the frequencies of a rotary embedding are changed for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all (`default`).
    None,
    /// All are divided by this (`linear`).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Slow ones are divided, fast ones are not (`llama3`).
    Llama3(Llama3Scaling),
}

/// Llama 3.1's scaling: a pair that turns less than `low_freq_factor` times within
/// `original_max_positions` is slowed by `factor`, one that turns more than `high_freq_factor` times
/// is not, and in between it is a mean of the two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// The divisor of slow frequencies.
    pub factor: f64,
    /// Turns below which a frequency is slow.
    pub low_freq_factor: f64,
    /// Turns above which it is fast.
    pub high_freq_factor: f64,
    /// The positions that the model was trained with at first.
    pub original_max_positions: usize,
}

/// Where families' defaults differ.
struct Defaults {
    vocab_size: usize,
    d_ff: usize,
    /// None: as many as query heads.
    n_kv_heads: Option<usize>,
    /// None: `d_model / n_heads`.
    head_dim: Option<usize>,
    max_positions: usize,
    eos_token_ids: Vec<u32>,
}

/// What reads a family's `config.json`.
type Family = fn(&mut Fields) -> Result<DecoderConfig>;

impl DecoderConfig {
    /// The family of a `model_type`.
    pub(super) fn of_family(model_type: &str) -> Option<Family> {
        Some(match model_type {
            "llama" => llama,
            "mistral" => mistral,
            "qwen2" => qwen2,
            "qwen3" => qwen3,
            "gemma3_text" => gemma3,
            _ => return None,
        })
    }
}

/// Llama 1, 2 and 3, and what was saved under their name.
fn llama(fields: &mut Fields) -> Result<DecoderConfig> {
    let defaults = Defaults {
        vocab_size: 32_000,
        d_ff: 11_008,
        n_kv_heads: None,
        head_dim: None,
        max_positions: 2048,
        eos_token_ids: vec![2],
    };
    let attention_bias = fields.boolean("attention_bias")?.unwrap_or(false);
    let mlp_bias = fields.boolean("mlp_bias")?.unwrap_or(false);
    let common = common(fields, "llama", defaults)?;
    Ok(DecoderConfig { qkv_bias: attention_bias, o_bias: attention_bias, mlp_bias, ..common })
}

/// Mistral: a window in every layer, unless the file says null.
fn mistral(fields: &mut Fields) -> Result<DecoderConfig> {
    let defaults = Defaults {
        vocab_size: 32_000,
        d_ff: 14_336,
        n_kv_heads: Some(8),
        head_dim: None,
        max_positions: 4096 * 32,
        eos_token_ids: vec![2],
    };
    let window = sliding_window(fields, 4096)?;
    let common = common(fields, "mistral", defaults)?;
    Ok(DecoderConfig { windows: vec![window; common.n_layers], ..common })
}

/// Qwen 2 and 2.5: biases on q, k and v, whatever the file says.
fn qwen2(fields: &mut Fields) -> Result<DecoderConfig> {
    let common = common(fields, "qwen2", qwen_defaults(None))?;
    let windows = layer_windows(fields, common.n_layers)?;
    Ok(DecoderConfig { qkv_bias: true, windows, ..common })
}

/// Qwen 3: each head of q and k has a norm.
fn qwen3(fields: &mut Fields) -> Result<DecoderConfig> {
    let attention_bias = fields.boolean("attention_bias")?.unwrap_or(false);
    let common = common(fields, "qwen3", qwen_defaults(Some(128)))?;
    let windows = layer_windows(fields, common.n_layers)?;
    let (qkv_bias, o_bias) = (attention_bias, attention_bias);
    Ok(DecoderConfig { qkv_bias, o_bias, qk_norm: true, windows, ..common })
}

fn qwen_defaults(head_dim: Option<usize>) -> Defaults {
    Defaults {
        vocab_size: 151_936,
        d_ff: 22_016,
        n_kv_heads: Some(32),
        head_dim,
        max_positions: 32_768,
        eos_token_ids: Vec::new(),
    }
}

/// Gemma 3's language model. Its images are not read.
fn gemma3(fields: &mut Fields) -> Result<DecoderConfig> {
    let defaults = Defaults {
        vocab_size: 262_208,
        d_ff: 9216,
        n_kv_heads: Some(4),
        head_dim: Some(256),
        max_positions: 131_072,
        eos_token_ids: vec![1],
    };
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if fields.number(key)?.is_some() {
            return Err(fields.error(key, "logits with a soft cap are not supported; null is"));
        }
    }
    if fields.boolean("use_bidirectional_attention")? == Some(true) {
        let detail = "true makes an encoder of it, which is not supported";
        return Err(fields.error("use_bidirectional_attention", detail));
    }
    let attention_bias = fields.boolean("attention_bias")?.unwrap_or(false);
    let activation = fields.text("hidden_activation")?.unwrap_or("gelu_pytorch_tanh".to_owned());
    let score_scale = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    if !(score_scale > 0.0 && score_scale.is_finite()) {
        let detail = format!("expected more than 0, found {score_scale}");
        return Err(fields.error("query_pre_attn_scalar", detail));
    }
    let activation = activation_named(&activation).ok_or_else(|| {
        let detail = format!("{} is not supported", excerpt(&activation));
        fields.error("hidden_activation", detail)
    })?;
    let tied = fields.boolean("tie_word_embeddings")?.unwrap_or(true);
    let window = sliding_window(fields, 4096)?;
    let pattern = match fields.take_value("sliding_window_pattern") {
        None => fields.take_value("_sliding_window_pattern").unwrap_or(6.into()),
        Some(pattern) => pattern,
    };
    let Some(pattern) = pattern.as_u64().filter(|&pattern| pattern > 0) else {
        return Err(fields.wrong_type("sliding_window_pattern", "a count of layers", &pattern));
    };
    let ropes = gemma_ropes(fields)?; // Before `common`, which finds none of their keys then.
    let common = common(fields, "gemma3_text", defaults)?;
    let is_local = |layer: usize| !(layer as u64 + 1).is_multiple_of(pattern);
    let windows = typed_windows(fields, common.n_layers, window)?.unwrap_or_else(|| {
        (0..common.n_layers).map(|layer| window.filter(|_| is_local(layer))).collect()
    });
    let [rope, window_rope] = ropes.map(|(map, key, theta)| {
        let rope = Fields::within(map, fields.path(), key);
        RopeConfig::of(rope, theta, common.max_positions)
    });
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        activation,
        windows,
        rope: rope?,
        window_rope: Some(window_rope?),
        score_scale: (score_scale as f32).powf(-0.5),
        is_gemma: true,
        tie_word_embeddings: tied,
        ..common
    })
}

/// The rotary settings of layers without and with a window, each with its key and default theta: nested
/// in `rope_parameters` (transformers 5), or beside each other (4), where `rope_scaling` is for the
/// layers without.
#[allow(clippy::type_complexity)]
fn gemma_ropes(
    fields: &mut Fields,
) -> Result<[(serde_json::Map<String, Value>, &'static str, f64); 2]> {
    let theta = fields.number("rope_theta")?.unwrap_or(1_000_000.0);
    let window_theta = fields.number("rope_local_base_freq")?.unwrap_or(10_000.0);
    let mut nested = match fields.take_value("rope_parameters") {
        None | Some(Value::Null) => serde_json::Map::new(),
        Some(Value::Object(nested)) => nested,
        Some(other) => return Err(fields.wrong_type("rope_parameters", "an object", &other)),
    };
    let mut of = |key: &str| match nested.remove(key) {
        None | Some(Value::Null) => Ok(serde_json::Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(other) => Err(fields.wrong_type("rope_parameters", "objects by layer type", &other)),
    };
    let (mut full, window) = (of("full_attention")?, of("sliding_attention")?);
    if let Some(key) = nested.keys().next() {
        let detail = format!("{} is not a layer type", excerpt(key));
        return Err(fields.error("rope_parameters", detail));
    }
    match fields.take_value("rope_scaling") {
        None | Some(Value::Null) => {}
        Some(Value::Object(scaling)) => full.extend(scaling),
        Some(other) => return Err(fields.wrong_type("rope_scaling", "an object", &other)),
    }
    Ok([
        (full, "rope_parameters.full_attention", theta),
        (window, "rope_parameters.sliding_attention", window_theta),
    ])
}

/// The keys that all families have, with no bias, no norm of heads and no window.
fn common(fields: &mut Fields, model_type: &str, defaults: Defaults) -> Result<DecoderConfig> {
    let vocab_size = fields.size(&["vocab_size"], defaults.vocab_size, MAX_VOCAB)?;
    let d_model = fields.size(&["hidden_size"], 4096, MAX_FEATURES)?;
    let d_ff = fields.size(&["intermediate_size"], defaults.d_ff, MAX_FEED_FORWARD)?;
    let n_layers = fields.size(&["num_hidden_layers"], 32, MAX_LAYERS)?;
    let n_heads = fields.size(&["num_attention_heads"], 32, MAX_HEADS)?;
    let kv = "num_key_value_heads";
    let null_kv = fields.is_null(kv);
    let default_kv = defaults.n_kv_heads.filter(|_| !null_kv).unwrap_or(n_heads);
    let n_kv_heads = fields.size(&[kv], default_kv, MAX_HEADS)?;
    if !n_heads.is_multiple_of(n_kv_heads) {
        let detail = format!("{n_kv_heads} does not divide num_attention_heads {n_heads}");
        return Err(fields.error(kv, detail));
    }
    let head_dim = fields.size(
        &["head_dim"],
        defaults.head_dim.unwrap_or((d_model / n_heads).max(1)),
        MAX_FEATURES,
    )?;
    if !head_dim.is_multiple_of(2) {
        let detail = format!("{head_dim} is odd: rotary positions turn pairs of features");
        return Err(fields.error("head_dim", detail));
    }
    let max_positions =
        fields.size(&["max_position_embeddings"], defaults.max_positions, MAX_POSITIONS)?;
    let activation = match fields.text("hidden_act")? {
        None => Activation::Silu,
        Some(name) => activation_named(&name).ok_or_else(|| {
            fields.error(
                "hidden_act",
                format!(
                    "{} is not supported; supported: silu, relu, gelu, gelu_new",
                    excerpt(&name)
                ),
            )
        })?,
    };
    if fields.boolean("is_encoder_decoder")? == Some(true) {
        return Err(fields.error("is_encoder_decoder", "true contradicts model_type"));
    }
    Ok(DecoderConfig {
        model_type: model_type.to_owned(),
        vocab_size,
        d_model,
        d_ff,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim,
        max_positions,
        norm_eps: norm_eps(fields, "rms_norm_eps", 1e-6)?,
        activation,
        rope: RopeConfig::from_fields(fields, max_positions)?,
        window_rope: None,
        score_scale: (head_dim as f32).powf(-0.5),
        is_gemma: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: vec![None; n_layers],
        attention_dropout: fraction(fields, "attention_dropout", 0.0)?,
        tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
        pad_token_id: fields.token_id("pad_token_id", vocab_size)?.flatten(),
        eos_token_ids: fields.token_ids_or("eos_token_id", vocab_size, &defaults.eos_token_ids)?,
        dtype: saved_dtype(fields)?,
    })
}

/// `sliding_window`: absent is the default, null is none.
fn sliding_window(fields: &mut Fields, default: usize) -> Result<Option<usize>> {
    if fields.is_null("sliding_window") {
        return Ok(None);
    }
    fields.size(&["sliding_window"], default, MAX_POSITIONS).map(Some)
}

/// Qwen's windows: none unless `use_sliding_window`, then in the layers that `layer_types` names, by
/// default those from `max_window_layers` on.
fn layer_windows(fields: &mut Fields, n_layers: usize) -> Result<Vec<Option<usize>>> {
    let used = fields.boolean("use_sliding_window")?.unwrap_or(false);
    let window = sliding_window(fields, 4096)?.filter(|_| used);
    let first = match fields.take_value("max_window_layers") {
        None => 28,
        Some(value) => value
            .as_u64()
            .ok_or_else(|| fields.wrong_type("max_window_layers", "a count of layers", &value))?
            as usize,
    };
    Ok(typed_windows(fields, n_layers, window)?
        .unwrap_or_else(|| (0..n_layers).map(|i| window.filter(|_| i >= first)).collect()))
}

/// `layer_types`: which layers have the window, if the file says so.
fn typed_windows(
    fields: &mut Fields,
    n_layers: usize,
    window: Option<usize>,
) -> Result<Option<Vec<Option<usize>>>> {
    let key = "layer_types";
    let Some(types) = fields.take_value(key).filter(|types| !types.is_null()) else {
        return Ok(None);
    };
    let Value::Array(types) = &types else {
        return Err(fields.wrong_type(key, "a list of names", &types));
    };
    if types.len() != n_layers {
        let detail = format!("{} names for {n_layers} layers", types.len());
        return Err(fields.error(key, detail));
    }
    types
        .iter()
        .map(|name| match (name.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => Err(fields.error(
                key,
                "sliding_attention needs sliding_window (Qwen: and use_sliding_window)",
            )),
            _ => Err(fields.error(
                key,
                format!(
                    "{} is not supported; supported: full_attention, sliding_attention",
                    excerpt(&name.to_string())
                ),
            )),
        })
        .collect::<Result<_>>()
        .map(Some)
}

impl RopeConfig {
    fn from_fields(fields: &mut Fields, max_positions: usize) -> Result<Self> {
        let theta = fields.number("rope_theta")?;
        let partial = fields.number("partial_rotary_factor")?;
        // Where a set of settings wants it, transformers asks here first.
        let original = fields.take_value("original_max_position_embeddings");
        let scaling = fields.take_value("rope_scaling");
        let parameters = fields.take_value("rope_parameters");
        // As transformers 5: the old name wins where it says something.
        let (key, value) = match (scaling, parameters) {
            (Some(Value::Object(old)), _) if !old.is_empty() => ("rope_scaling", old),
            (_, Some(Value::Object(new))) => ("rope_parameters", new),
            (Some(Value::Object(empty)), None) => ("rope_scaling", empty),
            (None, None) => ("rope_parameters", serde_json::Map::new()),
            (Some(other), _) | (None, Some(other)) => {
                return Err(fields.wrong_type("rope_parameters", "an object", &other));
            }
        };
        let mut value = value;
        let is_llama3 = |key| value.get(key).and_then(Value::as_str) == Some("llama3");
        if let Some(original) = original
            && (is_llama3("rope_type") || is_llama3("type"))
        {
            value.insert("original_max_position_embeddings".to_owned(), original);
        }
        let mut rope = Fields::within(value, fields.path(), key);
        let own_partial = rope.number("partial_rotary_factor")?;
        if let Some(partial) = own_partial.or(partial).filter(|&share| share != 1.0) {
            let detail = format!("{partial} is not supported: every feature is turned, or none");
            return Err(rope.error("partial_rotary_factor", detail));
        }
        Self::of(rope, theta.unwrap_or(10_000.0), max_positions)
    }

    /// One set of settings, with what theta is where they do not say it.
    fn of(mut rope: Fields, theta: f64, max_positions: usize) -> Result<Self> {
        let old_type = rope.text("type")?;
        let rope_type = rope.text("rope_type")?.or(old_type).unwrap_or("default".to_owned());
        let theta = rope.number("rope_theta")?.unwrap_or(theta);
        if !(theta > 1.0 && theta < 1e12) {
            return Err(rope.error("rope_theta", format!("expected above 1, found {theta}")));
        }
        let scaling = match rope_type.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: rope.positive("factor")? },
            "llama3" => {
                let key = "original_max_position_embeddings";
                let scaling = Llama3Scaling {
                    factor: rope.positive("factor")?,
                    low_freq_factor: rope.positive("low_freq_factor")?,
                    high_freq_factor: rope.positive("high_freq_factor")?,
                    original_max_positions: rope.size(&[key], max_positions, MAX_POSITIONS)?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    return Err(rope.error("high_freq_factor", "expected above low_freq_factor"));
                }
                RopeScaling::Llama3(scaling)
            }
            _ => {
                let detail = format!(
                    "{} is not supported; supported: default, linear, llama3",
                    excerpt(&rope_type)
                );
                return Err(rope.error("rope_type", detail));
            }
        };
        match rope.unread().iter().find(|(_, value)| !value.is_null()) {
            Some((key, _)) => {
                let detail = format!("not known for rope_type {rope_type}");
                Err(rope.error(key, detail))
            }
            None => Ok(Self { theta, scaling }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::{super::ModelConfig, *};

    fn parse(config: &Value) -> Result<DecoderConfig> {
        match ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))? {
            ModelConfig::Decoder(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_keys_have_transformers_defaults() {
        let llama = parse(&json!({"model_type": "llama"})).unwrap();
        let expected = DecoderConfig {
            model_type: "llama".into(),
            vocab_size: 32_000,
            d_model: 4096,
            d_ff: 11_008,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 32,
            head_dim: 128,
            max_positions: 2048,
            norm_eps: 1e-6,
            activation: Activation::Silu,
            rope: RopeConfig { theta: 10_000.0, scaling: RopeScaling::None },
            window_rope: None,
            score_scale: 128_f32.powf(-0.5),
            is_gemma: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; 32],
            attention_dropout: 0.0,
            tie_word_embeddings: false,
            pad_token_id: None,
            eos_token_ids: vec![2],
            dtype: None,
        };
        assert_eq!(llama, expected);
        let mistral = parse(&json!({"model_type": "mistral"})).unwrap();
        assert_eq!((mistral.n_kv_heads, mistral.windows), (8, vec![Some(4096); 32]));
        let qwen2 = parse(&json!({"model_type": "qwen2"})).unwrap();
        assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.head_dim), (true, false, 128));
        assert_eq!((qwen2.windows, qwen2.eos_token_ids), (vec![None; 32], vec![]));
        let qwen3 = json!({"model_type": "qwen3", "hidden_size": 1024, "attention_bias": true});
        let qwen3 = parse(&qwen3).unwrap();
        assert_eq!((qwen3.qk_norm, qwen3.qkv_bias, qwen3.o_bias), (true, true, true));
        assert_eq!(qwen3.head_dim, 128);
    }

    #[test]
    fn what_transformers_4_and_5_write_is_understood() {
        // meta-llama/Llama-3.2-1B as transformers 4 wrote it.
        let four = json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008], "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
            "max_position_embeddings": 131_072, "mlp_bias": false, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500_000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128_256
        });
        let config = parse(&four).unwrap();
        let scaling = Llama3Scaling {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192,
        };
        let rope = RopeConfig { theta: 500_000.0, scaling: RopeScaling::Llama3(scaling) };
        assert_eq!((config.rope, config.dtype), (rope, Some(Dtype::Bf16)));
        assert_eq!((config.n_kv_heads, config.tie_word_embeddings), (8, true));

        // At the top it wins, as in transformers.
        let mut top = four.clone();
        top["original_max_position_embeddings"] = json!(4096);
        let scaling = Llama3Scaling { original_max_positions: 4096, ..scaling };
        assert_eq!(parse(&top).unwrap().rope.scaling, RopeScaling::Llama3(scaling));

        let mut five = four.clone();
        let fields = five.as_object_mut().unwrap();
        fields.remove("rope_theta");
        let mut parameters = fields.remove("rope_scaling").unwrap();
        parameters["rope_theta"] = json!(500_000.0);
        five["rope_parameters"] = parameters;
        five["dtype"] = five["torch_dtype"].take();
        assert_eq!(parse(&five).unwrap(), config);

        let old = json!({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}});
        let linear = RopeScaling::Linear { factor: 2.0 };
        assert_eq!(parse(&old).unwrap().rope, RopeConfig { theta: 10_000.0, scaling: linear });
        // Qwen2.5 as transformers 4 wrote it: a window that is not used.
        let qwen = json!({
            "model_type": "qwen2", "num_hidden_layers": 2, "rope_theta": 1e6, "rope_scaling": null,
            "sliding_window": 32_768, "max_window_layers": 1, "use_sliding_window": false
        });
        assert_eq!(parse(&qwen).unwrap().windows, [None, None]);
        let mut used = qwen.clone();
        used["use_sliding_window"] = json!(true);
        assert_eq!(parse(&used).unwrap().windows, [None, Some(32_768)]);
        used["layer_types"] = json!(["sliding_attention", "full_attention"]);
        assert_eq!(parse(&used).unwrap().windows, [Some(32_768), None]);
        let mistral =
            json!({"model_type": "mistral", "num_hidden_layers": 1, "sliding_window": null});
        assert_eq!(parse(&mistral).unwrap().windows, [None]);
    }

    #[test]
    fn gemma_as_on_the_hub() {
        let gemma = parse(&json!({
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 7, "num_key_value_heads": 1, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
            "use_cache": true, "vocab_size": 262144
        }))
        .unwrap();
        let rope = RopeConfig { theta: 1e6, scaling: RopeScaling::Linear { factor: 8.0 } };
        let window_rope = RopeConfig { theta: 1e4, scaling: RopeScaling::None };
        assert_eq!((gemma.rope, gemma.window_rope), (rope, Some(window_rope)));
        let of_layer = [Some(512), Some(512), Some(512), Some(512), Some(512), None, Some(512)];
        assert_eq!((&gemma.windows[..], gemma.score_scale), (&of_layer[..], 1.0 / 16.0));
        assert!(gemma.is_gemma && gemma.qk_norm && gemma.tie_word_embeddings && !gemma.qkv_bias);
        assert_eq!(
            (gemma.activation, &gemma.eos_token_ids[..]),
            (Activation::GeluNew, &[1, 106][..])
        );
        let error = parse(&json!({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("final_logit_softcapping"), "{error}");
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let rope = |value| json!({"rope_type": value});
        let cases = [
            ("num_key_value_heads", json!(5), "5 does not divide num_attention_heads 32"),
            ("head_dim", json!(7), "field head_dim: 7 is odd"),
            ("hidden_act", json!("swiglu"), "\"swiglu\" is not supported"),
            ("is_encoder_decoder", json!(true), "true contradicts model_type"),
            ("attention_dropout", json!(1.5), "below 1, found 1.5"),
            ("rope_theta", json!(0), "field rope_parameters.rope_theta: expected above 1"),
            ("rope_theta", json!("1e4"), "expected a number, found a string"),
            ("partial_rotary_factor", json!(0.5), "0.5 is not supported"),
            (
                "rope_scaling",
                rope("yarn"),
                "field rope_scaling.rope_type: \"yarn\" is not supported",
            ),
            ("rope_scaling", rope("dynamic"), "supported: default, linear, llama3"),
            ("rope_scaling", rope("longrope"), "\"longrope\" is not supported"),
            ("rope_scaling", rope("linear"), "field rope_scaling.factor: missing"),
            ("rope_scaling", json!(2.0), "expected an object, found a number"),
            (
                "rope_parameters",
                json!({"full_attention": {"rope_theta": 1e4}}),
                "field rope_parameters.full_attention: not known",
            ),
            ("layer_types", json!(["full_attention"]), "field layer_types"),
            ("quantization_config", json!({"bits": 4}), "field quantization_config"),
            ("eos_token_id", json!(40_000), "below vocab_size (32000)"),
        ];
        for (key, value, reason) in cases {
            let mut config = json!({"model_type": "llama"});
            config[key] = value;
            let error = parse(&config).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(error.contains(reason), "{error}\nnot: {reason}");
        }
        let sliding = json!({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]});
        let error = parse(&sliding).unwrap_err().to_string();
        assert!(error.contains("needs sliding_window (Qwen: and use_sliding_window)"), "{error}");
        let unknown = json!({"model_type": "gemma3"});
        let error = parse(&unknown).unwrap_err().to_string();
        assert!(
            error.contains(
                "supported: t5, mt5, bart, llama, mistral, qwen2, qwen3, gemma3_text, gpt2"
            ),
            "{error}"
        );
    }
}
