//! Random bases of known shapes, for benchmarks and tests of real sizes.

use std::{io::Write, path::Path};

use rayon::prelude::*;
use serde_json::json;

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::safetensors::{TensorSpec, write_atomically, write_streamed},
    kernels::philox::{Key, Purpose, unit},
};

/// A model of a known shape.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Its name on the command line.
    pub name: &'static str,
    shape: Shape,
}

#[derive(Clone, Copy, Debug)]
enum Shape {
    T5(T5Shape),
    Decoder(DecoderShape),
}

#[derive(Clone, Copy, Debug)]
struct T5Shape {
    n_layers: usize,
    d_model: usize,
    d_ff: usize,
    n_heads: usize,
    /// v1.1: gated, with a head of its own; else relu and tied.
    gated: bool,
}

#[derive(Clone, Copy, Debug)]
struct DecoderShape {
    model_type: &'static str,
    n_layers: usize,
    d_model: usize,
    d_ff: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    theta: f64,
    tied: bool,
}

const HEAD_DIM: usize = 64;
const VOCAB: usize = 32128;

/// All presets.
pub const PRESETS: [Preset; 9] = [
    t5("flan-t5-small", [8, 512, 1024, 6], true),
    t5("flan-t5-base", [12, 768, 2048, 12], true),
    t5("flan-t5-large", [24, 1024, 2816, 16], true),
    t5("flan-t5-xl", [24, 2048, 5120, 32], true),
    t5("t5-small", [6, 512, 2048, 8], false),
    t5("t5-base", [12, 768, 3072, 12], false),
    Preset {
        name: "llama-1b",
        shape: Shape::Decoder(DecoderShape {
            model_type: "llama",
            n_layers: 16,
            d_model: 2048,
            d_ff: 8192,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 64,
            vocab_size: 128_256,
            theta: 5e5,
            tied: true,
        }),
    },
    Preset {
        name: "llama-8b",
        shape: Shape::Decoder(DecoderShape {
            model_type: "llama",
            n_layers: 32,
            d_model: 4096,
            d_ff: 14_336,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 128,
            vocab_size: 128_256,
            theta: 5e5,
            tied: false,
        }),
    },
    Preset {
        name: "qwen3-0.6b",
        shape: Shape::Decoder(DecoderShape {
            model_type: "qwen3",
            n_layers: 28,
            d_model: 1024,
            d_ff: 3072,
            n_heads: 16,
            n_kv_heads: 8,
            head_dim: 128,
            vocab_size: 151_936,
            theta: 1e6,
            tied: true,
        }),
    },
];

const fn t5(
    name: &'static str,
    [n_layers, d_model, d_ff, n_heads]: [usize; 4],
    gated: bool,
) -> Preset {
    Preset { name, shape: Shape::T5(T5Shape { n_layers, d_model, d_ff, n_heads, gated }) }
}

impl Preset {
    /// The preset of a name.
    ///
    /// # Errors
    /// If there is none: the message lists them.
    pub fn named(name: &str) -> Result<Self> {
        PRESETS.into_iter().find(|preset| preset.name == name).ok_or_else(|| {
            let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
            Error::Usage(format!("no preset {name:?}: there are {}", names.join(", ")))
        })
    }

    /// The same shape with a head of its own.
    ///
    /// # Errors
    /// If its family has no such choice.
    pub fn untied(self) -> Result<Self> {
        match self.shape {
            Shape::Decoder(shape) => {
                Ok(Self { shape: Shape::Decoder(DecoderShape { tied: false, ..shape }), ..self })
            }
            Shape::T5(_) => {
                let name = self.name;
                Err(Error::Usage(format!("--untied is for decoder-only presets, not {name}")))
            }
        }
    }

    /// Writes a model folder with Gaussian weights of the spread that Hugging Face initialises the
    /// family with; norms are 1. The same seed gives the same bytes.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, dir: &Path, dtype: Dtype, seed: u64) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let (tensors, mut config) = match self.shape {
            Shape::T5(shape) => (shape.tensors(), shape.config()),
            Shape::Decoder(shape) => (shape.tensors(), shape.config()),
        };
        let saved_as = match dtype {
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::F32 | Dtype::F64 => "float32",
        };
        config["torch_dtype"] = json!(saved_as);
        let specs = tensors
            .iter()
            .map(|tensor| TensorSpec {
                name: tensor.name.clone(),
                dtype,
                shape: tensor.shape.clone(),
            })
            .collect();
        let key = Key::new(seed, Purpose::Data, 0);
        write_streamed(&dir.join("model.safetensors"), specs, |spec, out| {
            let i = tensors.iter().position(|t| t.name == spec.name).unwrap_or_default();
            let n: usize = spec.shape.iter().product();
            for start in (0..n).step_by(CHUNK) {
                out.write_all(&gaussian(key, i, start..n.min(start + CHUNK), &tensors[i], dtype))?;
            }
            Ok(())
        })?;
        write_atomically(&dir.join("config.json"), |file| writeln!(file, "{config:#}"))
    }
}

impl T5Shape {
    fn config(&self) -> serde_json::Value {
        let feed_forward_proj = if self.gated { "gated-gelu" } else { "relu" };
        json!({
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": self.d_ff,
            "d_kv": HEAD_DIM,
            "d_model": self.d_model,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": feed_forward_proj,
            "initializer_factor": 1.0,
            "is_encoder_decoder": true,
            "layer_norm_epsilon": 1e-6,
            "model_type": "t5",
            "num_decoder_layers": self.n_layers,
            "num_heads": self.n_heads,
            "num_layers": self.n_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": !self.gated,
            "use_cache": true,
            "vocab_size": VOCAB,
        })
    }

    fn tensors(&self) -> Vec<RandomTensor> {
        let Self { n_layers, d_model, d_ff, n_heads, gated } = *self;
        let inner = n_heads * HEAD_DIM;
        let spread = |n: usize| (n as f32).powf(-0.5);
        let mut all = Vec::new();
        let mut push = |name: String, shape: &[usize], std: Option<f32>| {
            all.push(RandomTensor { name, shape: shape.to_vec(), std });
        };
        push("shared.weight".into(), &[VOCAB, d_model], Some(1.0));
        if gated {
            push("lm_head.weight".into(), &[VOCAB, d_model], Some(1.0));
        }
        for stack in ["encoder", "decoder"] {
            for block in 0..n_layers {
                let layer = |n: usize| format!("{stack}.block.{block}.layer.{n}");
                let attentions: &[&str] = match stack {
                    "encoder" => &["SelfAttention"],
                    _ => &["SelfAttention", "EncDecAttention"],
                };
                for (n, attention) in attentions.iter().enumerate() {
                    let path = format!("{}.{attention}", layer(n));
                    push(
                        format!("{path}.q.weight"),
                        &[inner, d_model],
                        Some(spread(d_model * HEAD_DIM)),
                    );
                    push(format!("{path}.k.weight"), &[inner, d_model], Some(spread(d_model)));
                    push(format!("{path}.v.weight"), &[inner, d_model], Some(spread(d_model)));
                    push(format!("{path}.o.weight"), &[d_model, inner], Some(spread(inner)));
                    if block == 0 && n == 0 {
                        let name = format!("{path}.relative_attention_bias.weight");
                        push(name, &[32, n_heads], Some(spread(d_model)));
                    }
                    push(format!("{}.layer_norm.weight", layer(n)), &[d_model], None);
                }
                let last = layer(attentions.len());
                let inputs: &[&str] = if gated { &["wi_0", "wi_1"] } else { &["wi"] };
                for name in inputs {
                    let path = format!("{last}.DenseReluDense.{name}.weight");
                    push(path, &[d_ff, d_model], Some(spread(d_model)));
                }
                let path = format!("{last}.DenseReluDense.wo.weight");
                push(path, &[d_model, d_ff], Some(spread(d_ff)));
                push(format!("{last}.layer_norm.weight"), &[d_model], None);
            }
            push(format!("{stack}.final_layer_norm.weight"), &[d_model], None);
        }
        all
    }
}

/// transformers' `initializer_range`.
const DECODER_STD: f32 = 0.02;

impl DecoderShape {
    fn config(&self) -> serde_json::Value {
        let architecture = match self.model_type {
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let mut config = json!({
            "architectures": [architecture],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.d_model,
            "initializer_range": DECODER_STD,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": 40_960,
            "model_type": self.model_type,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": self.theta,
            "tie_word_embeddings": self.tied,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if self.model_type == "llama" {
            config["max_position_embeddings"] = json!(8192);
            config["rms_norm_eps"] = json!(1e-5);
            config["mlp_bias"] = json!(false);
        }
        config
    }

    fn tensors(&self) -> Vec<RandomTensor> {
        let Self { d_model, d_ff, n_heads, n_kv_heads, head_dim, vocab_size, .. } = *self;
        let (inner, kv) = (n_heads * head_dim, n_kv_heads * head_dim);
        let mut all = Vec::new();
        let mut push = |name: String, shape: &[usize]| {
            let std = (shape.len() > 1).then_some(DECODER_STD);
            all.push(RandomTensor { name: name + ".weight", shape: shape.to_vec(), std });
        };
        push("model.embed_tokens".into(), &[vocab_size, d_model]);
        for i in 0..self.n_layers {
            for (name, shape) in [
                ("self_attn.q_proj", &[inner, d_model][..]),
                ("self_attn.k_proj", &[kv, d_model]),
                ("self_attn.v_proj", &[kv, d_model]),
                ("self_attn.o_proj", &[d_model, inner]),
                ("mlp.gate_proj", &[d_ff, d_model]),
                ("mlp.up_proj", &[d_ff, d_model]),
                ("mlp.down_proj", &[d_model, d_ff]),
                ("input_layernorm", &[d_model]),
                ("post_attention_layernorm", &[d_model]),
            ] {
                push(format!("model.layers.{i}.{name}"), shape);
            }
            if self.model_type == "qwen3" {
                push(format!("model.layers.{i}.self_attn.q_norm"), &[head_dim]);
                push(format!("model.layers.{i}.self_attn.k_norm"), &[head_dim]);
            }
        }
        push("model.norm".into(), &[d_model]);
        if !self.tied {
            push("lm_head".into(), &[vocab_size, d_model]);
        }
        all
    }
}

struct RandomTensor {
    name: String,
    shape: Vec<usize>,
    /// Standard deviation; none: all ones.
    std: Option<f32>,
}

/// Elements that are made at a time.
const CHUNK: usize = 1 << 22;

/// Elements of a tensor as bytes: a pair of Gaussians from each pair of uniforms (Box-Muller).
fn gaussian(
    key: Key,
    tensor: usize,
    range: std::ops::Range<usize>,
    spec: &RandomTensor,
    dtype: Dtype,
) -> Vec<u8> {
    let size = dtype.size_bytes();
    let mut bytes = vec![0; range.len() * size];
    let starts = range.step_by(4);
    bytes.par_chunks_mut(4 * size).zip(starts.collect::<Vec<_>>()).for_each(|(out, start)| {
        let values = match spec.std {
            None => [1.0; 4],
            Some(std) => {
                let at = (start / 4) as u64;
                let words = key.block([at as u32, (at >> 32) as u32, tensor as u32, 1]);
                let [a, b, c, d] = words.map(unit);
                let pair = |u: f32, v: f32| {
                    let radius = std * (-2.0 * (1.0 - u).ln()).sqrt();
                    let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
                    [radius * cos, radius * sin]
                };
                let ([a, b], [c, d]) = (pair(a, b), pair(c, d));
                [a, b, c, d]
            }
        };
        for (out, value) in out.chunks_exact_mut(size).zip(values) {
            match dtype {
                Dtype::Bf16 => out.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                Dtype::F16 => out.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                Dtype::F32 | Dtype::F64 => out.copy_from_slice(&value.to_le_bytes()),
            }
        }
    });
    bytes
}
