//! `config.json` and `generation_config.json`, as transformers 4 and 5 write them.
//!
//! ```text
//! config.json            -> ModelConfig      what the network is: a wrong value gives other numbers
//! generation_config.json -> GenerationConfig which ids begin and end an output
//! ```
//!
//! A configuration decides what is computed, so a key is in one of four classes:
//!
//! 1. read: taken, with transformers' default where it is absent, checked for range;
//! 2. harmless: known to change nothing here (`use_cache`, the generation defaults that transformers
//!    4 dumps beside the architecture, labels of classifiers): passed over in silence;
//! 3. meaningful and not supported (`quantization_config`, `is_decoder`, ...): an error that names the
//!    key, unless its value is the one that changes nothing;
//! 4. unknown: null changes nothing; anything else is logged once as a warning, because private keys
//!    are common and harmless (taggers, trainers and the Hub add theirs). What a truly other network
//!    needs shows in its `model_type` and in its tensors, which are both checked.

mod bart;
mod decoder;
mod gpt2;
mod t5;

use std::path::Path;

pub use bart::{BartConfig, BartStack};
pub use decoder::{DecoderConfig, Llama3Scaling, RopeConfig, RopeScaling};
pub use gpt2::Gpt2Config;
pub use t5::T5Config;

use serde_json::{Map, Value};

use crate::{
    activation::Activation,
    dtype::Dtype,
    error::{Error, Result},
    formats::{
        fields::Fields,
        json::{self, MAX_CONFIG_BYTES, UniqueObject, excerpt},
    },
};

/// The most features of a layer's input and of a head.
pub const MAX_FEATURES: usize = 65_536;
/// The most features inside a feed-forward layer.
pub const MAX_FEED_FORWARD: usize = 1 << 20;
/// The most layers.
pub const MAX_LAYERS: usize = 1024;
/// The most attention heads.
pub const MAX_HEADS: usize = 1024;
/// The most rows of an embedding.
pub const MAX_VOCAB: usize = 4_194_304;

/// Change nothing that is computed here: bookkeeping, classifier heads, initialisation, speed, and the
/// generation defaults, which the command line's flags replace.
const HARMLESS: &[&str] = &[
    // Bookkeeping.
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "auto_map",
    "attn_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "initializer_factor",
    "initializer_range",
    "init_std",
    "keys_to_ignore_at_inference",
    "model_type",
    "name_or_path",
    "n_positions",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "prefix",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    // Speed and memory only.
    "cache_implementation",
    "pretraining_tp",
    "chunk_size_feed_forward",
    // Classifiers and retrieval.
    "classifier_dropout",
    "id2label",
    "label2id",
    "num_labels",
    "sep_token_id",
    "bos_token_id",
    // Generation defaults.
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Change what is computed and are not supported, with the one value (beside null) that changes
/// nothing.
const UNSUPPORTED: &[(&str, Neutral)] = &[
    ("adapters", Neutral::Empty),
    ("add_cross_attention", Neutral::Bool(false)),
    ("cross_attention_hidden_size", Neutral::Null),
    ("is_decoder", Neutral::Bool(false)),
    ("is_encoder_decoder", Neutral::Bool(true)),
    ("layer_types", Neutral::Null),
    ("num_experts", Neutral::Null),
    ("pruned_heads", Neutral::Empty),
    ("quantization_config", Neutral::Null),
    ("rope_parameters", Neutral::Null),
    ("rope_scaling", Neutral::Null),
    ("sliding_window", Neutral::Null),
    ("tie_encoder_decoder", Neutral::Bool(false)),
];

#[derive(Clone, Copy)]
enum Neutral {
    Null,
    Bool(bool),
    Empty,
}

impl Neutral {
    fn accepts(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (Self::Bool(neutral), Value::Bool(value)) => neutral == *value,
            (Self::Empty, Value::Object(map)) => map.is_empty(),
            (Self::Empty, Value::Array(items)) => items.is_empty(),
            _ => false,
        }
    }
}

/// The activation of one of transformers' names.
fn activation_named(name: &str) -> Option<Activation> {
    Some(match name {
        "relu" => Activation::Relu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluNew,
        "gelu" => Activation::Gelu,
        "silu" | "swish" => Activation::Silu,
        _ => return None,
    })
}

/// A model's configuration, by family.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ModelConfig {
    /// T5 and mT5.
    T5(T5Config),
    /// Llama and its kin: decoders only.
    Decoder(DecoderConfig),
    /// BART.
    Bart(BartConfig),
    /// GPT-2.
    Gpt2(Gpt2Config),
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    pub fn open(model_dir: impl AsRef<Path>) -> Result<Self> {
        let path = model_dir.as_ref().join("config.json");
        Self::parse(&json::read_capped(&path, MAX_CONFIG_BYTES)?, &path)
    }

    /// Parses a `config.json`. `path` is for the messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut fields = Fields::new(json::parse::<UniqueObject>(bytes, path)?.0, path);
        let Some(model_type) = fields.text("model_type")? else {
            return Err(Error::file(
                path,
                "field model_type is missing: not a model's config.json",
            ));
        };
        let config = match model_type.as_str() {
            "t5" | "mt5" => Self::T5(T5Config::from_fields(&mut fields, model_type)?),
            "umt5" => {
                return Err(fields.error(
                    "model_type",
                    "umt5 is not supported: it has a relative position bias in every layer; t5 \
                    and mt5 are",
                ));
            }
            "bart" => Self::Bart(BartConfig::from_fields(&mut fields)?),
            "gpt2" => Self::Gpt2(Gpt2Config::from_fields(&mut fields)?),
            _ => match DecoderConfig::of_family(&model_type) {
                Some(family) => Self::Decoder(family(&mut fields)?),
                None => {
                    let found = excerpt(&model_type);
                    let supported =
                        "t5, mt5, bart, llama, mistral, qwen2, qwen3, gemma3_text, gpt2";
                    let detail = format!("{found} is not supported; supported: {supported}");
                    return Err(fields.error("model_type", detail));
                }
            },
        };
        judge_unread(&fields)?;
        Ok(config)
    }

    /// Hugging Face's name of the family.
    pub fn model_type(&self) -> &str {
        match self {
            Self::T5(config) => &config.model_type,
            Self::Decoder(config) => &config.model_type,
            Self::Bart(_) => "bart",
            Self::Gpt2(_) => "gpt2",
        }
    }

    /// Rows of the embedding: ids must be below.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::T5(config) => config.vocab_size,
            Self::Decoder(config) => config.vocab_size,
            Self::Bart(config) => config.vocab_size,
            Self::Gpt2(config) => config.vocab_size,
        }
    }

    /// The most tokens of a sequence; none: any number.
    pub fn max_positions(&self) -> Option<usize> {
        match self {
            Self::T5(_) => None,
            Self::Decoder(config) => Some(config.max_positions),
            Self::Bart(config) => Some(config.max_positions),
            Self::Gpt2(config) => Some(config.max_positions),
        }
    }

    /// The dropout that the base was trained with.
    pub fn dropout_rate(&self) -> f32 {
        match self {
            Self::T5(config) => config.dropout_rate,
            Self::Decoder(config) => config.attention_dropout,
            Self::Bart(config) => config.dropout,
            Self::Gpt2(config) => config.dropout,
        }
    }

    /// The id that labels are shifted behind in training and evaluation; none: a causal model, whose
    /// labels follow the input.
    pub fn decoder_start(&self) -> Option<u32> {
        match self {
            Self::T5(config) => Some(config.decoder_start_token_id),
            Self::Decoder(_) | Self::Gpt2(_) => None,
            Self::Bart(config) => Some(config.decoder_start_token_id),
        }
    }

    /// The ids that end an output, and the padding id.
    fn special_ids(&self) -> (&[u32], Option<u32>) {
        match self {
            Self::T5(config) => (&config.eos_token_ids, config.pad_token_id),
            Self::Decoder(config) => (&config.eos_token_ids, config.pad_token_id),
            Self::Bart(config) => (&config.eos_token_ids, config.pad_token_id),
            Self::Gpt2(config) => (&config.eos_token_ids, config.pad_token_id),
        }
    }

    /// PEFT's default targets of this architecture (`TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING`).
    pub fn default_targets(&self) -> &'static [&'static str] {
        match self {
            Self::T5(_) => &["q", "v"],
            Self::Decoder(_) | Self::Bart(_) => &["q_proj", "v_proj"],
            Self::Gpt2(_) => &["c_attn"],
        }
    }

    /// The projections of attention, as `target_modules` name them.
    pub fn attention_targets(&self) -> &'static [&'static str] {
        match self {
            Self::T5(_) => &["q", "k", "v", "o"],
            Self::Decoder(_) => &["q_proj", "k_proj", "v_proj", "o_proj"],
            Self::Bart(_) => &["q_proj", "k_proj", "v_proj", "out_proj"],
            // Its feed-forward layer has a c_proj, too.
            Self::Gpt2(_) => &["attn.c_attn", "attn.c_proj"],
        }
    }
}

/// Which ids begin and end an output: `generation_config.json` where it says so, else the model's
/// configuration; and what `generation_config.json` asks for where no flag says otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// The ids that end an output.
    pub eos_token_ids: Vec<u32>,
    /// The padding id, if there is one.
    pub pad_token_id: Option<u32>,
    /// The id that the decoder begins with; none: a causal model, which begins with its input.
    pub decoder_start_token_id: Option<u32>,
    /// The second token of a decoder that begins with one, whatever the scores say.
    pub forced_bos_token_id: Option<u32>,
    /// The last token where an output reaches its greatest length.
    pub forced_eos_token_id: Option<u32>,
    /// How tokens are chosen.
    pub defaults: GenerationDefaults,
    /// Keys that would change the output and are not understood.
    pub unsupported: Vec<String>,
}

/// `generation_config.json`'s choices, with transformers' names.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "the fields of GenerateOptions")]
pub struct GenerationDefaults {
    pub max_new_tokens: Option<usize>,
    pub min_new_tokens: Option<usize>,
    pub max_length: Option<usize>,
    pub min_length: Option<usize>,
    pub num_beams: Option<usize>,
    pub num_return_sequences: Option<usize>,
    pub length_penalty: Option<f64>,
    pub early_stopping: Option<EarlyStopping>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f64>,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub no_repeat_ngram_size: Option<usize>,
}

/// When a beam search ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EarlyStopping {
    /// When no running beam looks better than the worst finished one at its present length.
    #[default]
    No,
    /// As soon as there are `num_beams` finished sequences.
    Yes,
    /// When no running beam can become better at any length.
    Never,
}

/// The largest count that is read; all are below this in any real file.
const MAX_COUNT: usize = 1 << 20;

impl GenerationDefaults {
    fn take(fields: &mut Fields, is_causal: bool) -> Result<Self> {
        let count = |fields: &mut Fields, key: &str| -> Result<Option<usize>> {
            let Some(value) = fields.take_value(key) else { return Ok(None) };
            let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
            match count.filter(|&count| count <= MAX_COUNT) {
                Some(count) => Ok(Some(count)),
                None => Err(fields.error(
                    key,
                    format!("expected an integer from 0 to {MAX_COUNT}, found {value}"),
                )),
            }
        };
        // Lengths with the prompt; only the start id of an encoder-decoder is a known prompt.
        let (max_length, min_length) = (count(fields, "max_length")?, count(fields, "min_length")?);
        let new = |length: Option<usize>| {
            length.filter(|_| !is_causal).and_then(|length| length.checked_sub(1))
        };
        let early_stopping = match fields.take_value("early_stopping") {
            None => None,
            Some(Value::Bool(true)) => Some(EarlyStopping::Yes),
            Some(Value::Bool(false)) => Some(EarlyStopping::No),
            Some(Value::String(text)) if text == "never" => Some(EarlyStopping::Never),
            Some(other) => {
                return Err(fields.wrong_type(
                    "early_stopping",
                    "true, false or \"never\"",
                    &other,
                ));
            }
        };
        Ok(Self {
            max_new_tokens: (count(fields, "max_new_tokens")?.or(new(max_length)))
                .filter(|&n| n > 0),
            min_new_tokens: count(fields, "min_new_tokens")?.or(new(min_length)),
            max_length: max_length.filter(|&n| is_causal && n > 0),
            min_length: min_length.filter(|_| is_causal),
            num_beams: count(fields, "num_beams")?.filter(|&n| n > 0),
            num_return_sequences: count(fields, "num_return_sequences")?.filter(|&n| n > 0),
            length_penalty: fields.number("length_penalty")?,
            early_stopping,
            do_sample: fields.boolean("do_sample")?,
            temperature: fields.number("temperature")?,
            top_k: count(fields, "top_k")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            no_repeat_ngram_size: count(fields, "no_repeat_ngram_size")?,
        })
    }
}

/// Keys that change outputs and have no counterpart here, with the numbers that change nothing; no value, `false`
/// and an empty list never do.
const UNSUPPORTED_GENERATION: [(&str, &[f64]); 19] = [
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("suppress_tokens", &[]),
    ("sequence_bias", &[]),
    ("force_words_ids", &[]),
    ("exponential_decay_length_penalty", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("guidance_scale", &[1.0]),
    ("typical_p", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("penalty_alpha", &[0.0]),
    ("num_beam_groups", &[1.0]),
    ("renormalize_logits", &[]),
    ("top_h", &[]),
    ("watermarking_config", &[]),
    ("stop_strings", &[]),
    ("forced_decoder_ids", &[]),
];

/// Where a model folder says how tokens are generated.
pub const GENERATION_FILE: &str = "generation_config.json";

impl GenerationConfig {
    /// Reads `generation_config.json` of a model folder; where there is none, what `config.json` says of it, as
    /// transformers does.
    pub fn open(model_dir: impl AsRef<Path>, model: &ModelConfig) -> Result<Self> {
        let own = model_dir.as_ref().join(GENERATION_FILE);
        let is_own = own.exists();
        let path = if is_own { own } else { model_dir.as_ref().join("config.json") };
        let mut fields = match path.exists() {
            true => json::read_json::<UniqueObject>(&path, MAX_CONFIG_BYTES)?.0,
            false => Map::new(),
        };
        if !is_own {
            // Of these the model's configuration was asked.
            for key in ["eos_token_id", "pad_token_id", "decoder_start_token_id"] {
                fields.remove(key);
            }
        }
        let mut fields = Fields::new(fields, &path);
        let (model_eos, model_pad) = model.special_ids();
        let eos = fields.token_ids("eos_token_id", model.vocab_size())?;
        let pad = fields.token_id("pad_token_id", model.vocab_size())?;
        let start = fields.token_id("decoder_start_token_id", model.vocab_size())?;
        let mut forced = |key: &str| -> Result<Option<u32>> {
            // transformers takes a list of one, too.
            let ids = fields.token_ids(key, model.vocab_size())?.unwrap_or_default();
            match ids[..] {
                [] => Ok(None),
                [id] => Ok(Some(id)),
                _ => Err(fields.error(key, "expected one token id, found several")),
            }
        };
        let (bos, forced_eos) = (forced("forced_bos_token_id")?, forced("forced_eos_token_id")?);
        let is_causal = model.decoder_start().is_none();
        let defaults = GenerationDefaults::take(&mut fields, is_causal)?;
        let unsupported = UNSUPPORTED_GENERATION.iter().filter(|(key, harmless)| {
            fields.take_value(key).is_some_and(|value| match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(items) => !items.is_empty(),
                value => !value.as_f64().is_some_and(|number| harmless.contains(&number)),
            })
        });
        Ok(Self {
            forced_bos_token_id: bos,
            forced_eos_token_id: forced_eos,
            defaults,
            unsupported: unsupported.map(|(key, _)| (*key).to_owned()).collect(),
            eos_token_ids: eos.unwrap_or_else(|| model_eos.to_vec()),
            pad_token_id: pad.flatten().or(model_pad),
            decoder_start_token_id: model.decoder_start().map(|own| start.flatten().unwrap_or(own)),
        })
    }
}

/// A share, at least 0 and below 1.
fn fraction(fields: &mut Fields, key: &str, default: f32) -> Result<f32> {
    let value = fields.float(key, default)?;
    if (0.0..1.0).contains(&value) {
        return Ok(value);
    }
    Err(fields.error(key, format!("expected 0 or more, below 1, found {value}")))
}

/// What a norm adds to the mean square.
fn norm_eps(fields: &mut Fields, key: &str, default: f32) -> Result<f32> {
    let value = fields.float(key, default)?;
    if value > 0.0 && value < 1.0 {
        return Ok(value);
    }
    Err(fields.error(key, format!("expected a value between 0 and 1, found {value}")))
}

/// `dtype` (transformers 5) or `torch_dtype` (4). It is what the weights were saved in; each
/// tensor's own type decides how it is read.
fn saved_dtype(fields: &mut Fields) -> Result<Option<Dtype>> {
    let (new, old) = (fields.text("dtype")?, fields.text("torch_dtype")?);
    // transformers prefers the new name, too.
    let Some(name) = new.or(old) else { return Ok(None) };
    Ok(match name.strip_prefix("torch.").unwrap_or(&name) {
        "float32" => Some(Dtype::F32),
        "bfloat16" => Some(Dtype::Bf16),
        "float16" => Some(Dtype::F16),
        _ => {
            tracing::warn!("{}: dtype {} is not known", fields.path().display(), excerpt(&name));
            None
        }
    })
}

/// Judges the keys that nobody took, as the module's doc says.
fn judge_unread(fields: &Fields) -> Result<()> {
    for (key, value) in fields.unread() {
        if HARMLESS.contains(&key.as_str()) || value.is_null() {
            continue;
        }
        match UNSUPPORTED.iter().find(|(name, _)| name == key) {
            Some((_, neutral)) if neutral.accepts(value) => {}
            Some(_) => {
                let value = excerpt(&value.to_string());
                return Err(fields.error(
                    key,
                    format!(
                        "its value {value} changes what the model computes and is not supported"
                    ),
                ));
            }
            None => tracing::warn!(
                "{}: key {} is not known and was ignored",
                fields.path().display(),
                excerpt(key)
            ),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(config: &Value) -> Result<T5Config> {
        match ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))? {
            ModelConfig::T5(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_keys_have_transformers_defaults() {
        let config = parse(&json!({"model_type": "t5"})).unwrap();
        let expected = T5Config {
            model_type: "t5".to_owned(),
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            dropout_rate: 0.1,
            layer_norm_epsilon: 1e-6,
            activation: Activation::Relu,
            gated: false,
            pad_token_id: Some(0),
            eos_token_ids: vec![1],
            decoder_start_token_id: 0,
            scale_decoder_outputs: None,
            tie_word_embeddings: None,
            dtype: None,
        };
        assert_eq!(config, expected);
        assert!(config.scales_head());

        let config = parse(&json!({"model_type": "mt5", "num_layers": 3})).unwrap();
        assert_eq!((config.vocab_size, config.d_ff, config.num_heads), (250_112, 1024, 6));
        assert_eq!((config.num_layers, config.num_decoder_layers), (3, 3));
        assert_eq!((config.activation, config.gated), (Activation::GeluNew, true));
        assert!(!config.scales_head());
    }

    #[test]
    fn what_transformers_4_and_5_write_is_understood() {
        // google/flan-t5-base as transformers 4 wrote it.
        let four = json!({
            "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768,
            "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": true,
            "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_decoder_layers": 12,
            "num_heads": 12, "num_layers": 12, "output_past": true, "pad_token_id": 0,
            "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
            "task_specific_params": {"summarization": {"num_beams": 4}}, "tie_word_embeddings": false,
            "transformers_version": "4.23.1", "use_cache": true, "vocab_size": 32128, "torch_dtype": "float32"
        });
        let config = parse(&four).unwrap();
        assert_eq!((config.d_model, config.num_heads, config.gated), (768, 12, true));
        assert_eq!((config.dtype, config.layer_norm_epsilon), (Some(Dtype::F32), 1e-6));
        assert!(!config.scales_head());

        let mut five = four.clone();
        five["scale_decoder_outputs"] = json!(false);
        five["tie_word_embeddings"] = json!(true);
        five["dense_act_fn"] = json!("gelu_new");
        five["is_gated_act"] = json!(true);
        five["is_decoder"] = json!(false);
        five["dtype"] = json!("bfloat16");
        five["eos_token_id"] = json!([1, 7]);
        five["quantization_config"] = json!(null);
        let config = parse(&five).unwrap();
        assert_eq!(
            (config.dtype, config.eos_token_ids.as_slice()),
            (Some(Dtype::Bf16), &[1, 7][..])
        );
        assert!(!config.scales_head());
        five["scale_decoder_outputs"] = json!(true);
        assert!(parse(&five).unwrap().scales_head());

        for (name, activation, gated) in [
            ("gelu", Activation::Gelu, false),
            ("gated-silu", Activation::Silu, true),
            ("gated-gelu_new", Activation::GeluNew, true),
            ("gelu_new", Activation::GeluNew, false),
        ] {
            let config = parse(&json!({"model_type": "t5", "feed_forward_proj": name})).unwrap();
            assert_eq!((config.activation, config.gated), (activation, gated));
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let cases = [
            ("model_type", json!("bert"), "\"bert\" is not supported; supported: t5, mt5, bart"),
            ("model_type", json!("umt5"), "bias in every layer"),
            ("model_type", json!(null), "model_type is missing"),
            ("model_type", json!(3), "expected a string, found a number"),
            ("d_model", json!(0), "field d_model: expected an integer from 1 to 65536, found 0"),
            ("d_model", json!(-1), "found -1"),
            ("d_model", json!(2.5), "found 2.5"),
            ("d_model", json!("512"), "found a string"),
            ("vocab_size", json!(1u64 << 40), "from 1 to 4194304"),
            ("num_layers", json!(1 << 20), "from 1 to 1024"),
            ("hidden_size", json!(7), "field hidden_size: 7 contradicts d_model 512"),
            ("relative_attention_num_buckets", json!(3), "at least 4"),
            ("relative_attention_max_distance", json!(8), "more than a quarter"),
            ("dropout_rate", json!(1.0), "below 1, found 1"),
            ("layer_norm_epsilon", json!(0), "field layer_norm_epsilon"),
            ("layer_norm_epsilon", json!("1"), "expected a number, found a string"),
            ("feed_forward_proj", json!("gated-mish"), "\"gated-mish\" is not supported"),
            (
                "dense_act_fn",
                json!("gelu"),
                "field dense_act_fn: \"gelu\" contradicts feed_forward_proj",
            ),
            ("is_gated_act", json!(true), "field is_gated_act: true contradicts"),
            (
                "vocab_size",
                json!(1),
                "field eos_token_id: expected a token id below vocab_size (1), found 1",
            ),
            ("eos_token_id", json!(32128), "below vocab_size (32128), found 32128"),
            ("eos_token_id", json!([1, -1]), "found -1"),
            ("pad_token_id", json!(-1), "field pad_token_id"),
            ("is_decoder", json!(true), "field is_decoder: its value \"true\" changes"),
            ("is_encoder_decoder", json!(false), "field is_encoder_decoder"),
            ("quantization_config", json!({"bits": 4}), "field quantization_config"),
            ("tie_encoder_decoder", json!(true), "field tie_encoder_decoder"),
            ("pruned_heads", json!({"0": [1]}), "field pruned_heads"),
            ("scale_decoder_outputs", json!(1), "expected true or false, found a number"),
        ];
        for (key, value, reason) in cases {
            let mut config = json!({"model_type": "t5", "d_model": 512});
            config[key] = value;
            let error = parse(&config).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(
                error.starts_with("config.json: ") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }
        for (bytes, reason) in [
            (&b""[..], "EOF"),
            (b"[]", "expected an object"),
            (b"{\"model_type\":\"t5\",\"model_type\":\"t5\"}", "comes twice"),
            (b"\xff", "not the JSON expected"),
        ] {
            let error =
                ModelConfig::parse(bytes, Path::new("config.json")).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        // Unknown keys are warned about, not refused.
        parse(&json!({"model_type": "t5", "my_note": "x", "pruned_heads": {}})).unwrap();
    }

    #[test]
    fn generation_config_overrides_the_ids() {
        let folder = std::env::temp_dir().join(format!("polytape-genconf-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let model =
            ModelConfig::T5(parse(&json!({"model_type": "t5", "eos_token_id": 5})).unwrap());
        let read = || GenerationConfig::open(&folder, &model);
        let plain = read().unwrap();
        assert_eq!((plain.eos_token_ids, plain.decoder_start_token_id), (vec![5], Some(0)));
        let path = folder.join("generation_config.json");
        let text = r#"{"eos_token_id":[1,2],"decoder_start_token_id":3,"num_beams":4}"#;
        std::fs::write(&path, text).unwrap();
        let read_back = read().unwrap();
        let start = read_back.decoder_start_token_id;
        assert_eq!((read_back.eos_token_ids, start), (vec![1, 2], Some(3)));
        assert_eq!(read_back.pad_token_id, Some(0));
        std::fs::write(
            &path,
            r#"{"forced_eos_token_id":[1],"suppress_tokens":[],"renormalize_logits":false,"top_h":0.5,"stop_strings":["a"]}"#,
        )
        .unwrap();
        let read_back = read().unwrap();
        assert_eq!(read_back.forced_eos_token_id, Some(1));
        assert_eq!(read_back.unsupported, ["top_h", "stop_strings"]);
        std::fs::write(&path, r#"{"eos_token_id":99999}"#).unwrap();
        assert!(
            read().unwrap_err().to_string().contains("generation_config.json: field eos_token_id")
        );
        // Without it the model's own configuration is asked, as by transformers.
        std::fs::remove_file(&path).unwrap();
        let config = json!({
            "model_type": "t5", "eos_token_id": 5, "num_beams": 3, "max_length": 20,
            "forced_eos_token_id": 1, "bad_words_ids": [[3]], "min_length": 0,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let of_model = read().unwrap();
        assert_eq!((of_model.eos_token_ids, of_model.forced_eos_token_id), (vec![5], Some(1)));
        let found = &of_model.defaults;
        assert_eq!(
            (found.num_beams, found.max_new_tokens, found.max_length),
            (Some(3), Some(19), None)
        );
        assert_eq!(of_model.unsupported, ["bad_words_ids"]);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
