//! How an adapter routes, where it is not as PEFT does: which linears share a router, and whether the
//! routing is given instead of learned.
//!
//! | granularity | mttl's name | one router for | T5: `decoder.block.3.layer.1.EncDecAttention.q` |
//! |---|---|---|---|
//! | linear (PEFT) | finegrained | each adapted linear | the whole path |
//! | layer | layerwise | each sub-layer | `decoder.block.3.layer.1` |
//! | block | blockwise | each block | `decoder.block.3` |
//! | coder | coderwise | encoder and decoder | `decoder.block` |
//! | one | coarsegrained | all | |
//!
//! PEFT has one router for each linear and no word for sharing. So a shared router is saved once for
//! each of its linears, with the same numbers: PEFT computes the same with them (and would train them
//! apart). What is shared or given stands in `routing.json`, which PEFT ignores.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    formats::{adapter::ROUTING_FILE, json::read_json},
};

/// The name of the file in an adapter folder.
pub const FILE_NAME: &str = ROUTING_FILE;
/// σ(±200) is 1 or 0 in f32, here and in PyTorch: a skill that is fully on or off.
pub const ON: f64 = 200.0;

/// Which linears share a router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// None: each has its own.
    #[default]
    Linear,
    /// Those of a sub-layer: attention, cross-attention, feed-forward.
    Layer,
    /// Those of a block.
    Block,
    /// Those of the encoder, and those of the decoder.
    Coder,
    /// All.
    One,
}

impl Granularity {
    /// The name of the router that a linear uses. Linears with the same name share it.
    pub fn router_of(self, path: &str) -> String {
        let parts: Vec<&str> = path.split('.').collect();
        let is_number = |part: &&str| part.bytes().all(|b| b.is_ascii_digit());
        // The block's number; without one the linear stands outside of all blocks.
        let Some(block) = parts.iter().position(is_number) else {
            return if self == Self::One { String::new() } else { path.to_owned() };
        };
        let end = match self {
            Self::Linear => parts.len(),
            Self::Layer => match parts[block + 1..].iter().position(is_number) {
                Some(sub) => block + 1 + sub + 1,         // T5: layer.1
                None => (block + 2).min(parts.len() - 1), // Llama: self_attn
            },
            Self::Block => block + 1,
            Self::Coder => block,
            Self::One => 0,
        };
        parts[..end].join(".")
    }
}

/// How an adapter routes. [`Default`] is PEFT's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Routing {
    /// Which linears share a router.
    pub granularity: Granularity,
    /// Whether the routing is given and does not learn: private or expert skills.
    pub fixed: bool,
}

impl Routing {
    /// Reads `routing.json` of an adapter folder; without one it is PEFT's way.
    ///
    /// # Errors
    /// If the file is malformed.
    pub fn open(adapter_dir: &Path) -> Result<Self> {
        let path = adapter_dir.join(FILE_NAME);
        if path.exists() { read_json(&path, 1 << 16) } else { Ok(Self::default()) }
    }

    /// The content of `routing.json`; none where this is PEFT's way.
    pub fn to_json(&self) -> Option<String> {
        let json = serde_json::to_value(self).unwrap_or_default();
        (*self != Self::default()).then(|| format!("{json:#}\n"))
    }
}

/// How A begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitA {
    /// Uniform in ±1/sqrt(d_in / n_splits), as PEFT.
    #[default]
    Peft,
    /// Uniform in ±sqrt(1/3)/sqrt(d_in), as the authors: smaller by sqrt(3·n_splits).
    Authors,
}

impl InitA {
    /// The bound of the uniform distribution.
    pub fn bound(self, d_in: usize, n_splits: usize) -> f64 {
        match self {
            Self::Peft => ((d_in / n_splits) as f64).powf(-0.5),
            Self::Authors => (3.0 * d_in as f64).powf(-0.5),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn linears_share_a_router_by_their_place() {
        use Granularity::*;
        let t5 = "decoder.block.3.layer.1.EncDecAttention.q";
        let llama = "model.layers.11.self_attn.q_proj";
        for (granularity, of_t5, of_llama) in [
            (Linear, t5, llama),
            (Layer, "decoder.block.3.layer.1", "model.layers.11.self_attn"),
            (Block, "decoder.block.3", "model.layers.11"),
            (Coder, "decoder.block", "model.layers"),
            (One, "", ""),
        ] {
            assert_eq!(granularity.router_of(t5), of_t5);
            assert_eq!(granularity.router_of(llama), of_llama);
        }
        assert_eq!(Block.router_of("score"), "score");
        assert_eq!(One.router_of("score"), "");
    }

    #[test]
    fn the_file_is_there_only_where_peft_has_no_word_for_it() {
        let dir = std::env::temp_dir().join(format!("polytape-routing-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let routing = Routing { granularity: Granularity::Block, fixed: true };
        fs::write(dir.join(FILE_NAME), routing.to_json().unwrap()).unwrap();
        assert_eq!(Routing::open(&dir).unwrap(), routing);
        assert_eq!(Routing::default().to_json(), None);
        fs::remove_file(dir.join(FILE_NAME)).unwrap();
        assert_eq!(Routing::open(&dir).unwrap(), Routing::default());
        fs::write(dir.join(FILE_NAME), r#"{"granularity": "head"}"#).unwrap();
        let error = Routing::open(&dir).unwrap_err().to_string();
        assert!(error.contains("routing.json") && error.contains("head"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_authors_begin_smaller() {
        assert_eq!(InitA::Peft.bound(1024, 4), 1.0 / 16.0);
        let ratio = InitA::Peft.bound(512, 4) / InitA::Authors.bound(512, 4);
        assert!((ratio - 12.0_f64.sqrt()).abs() < 1e-12);
    }
}
