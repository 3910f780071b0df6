//! Arbitrary bytes as `config.json` and as `adapter_config.json`.
//!
//! Sizes of an accepted model are in range, and so are its token ids; an accepted adapter
//! configuration is written as one that is read as the same, and its targets can be looked up in a
//! model.

use std::path::Path;

use polytape::{
    formats::{
        config::{
            BartConfig, DecoderConfig, MAX_FEATURES, MAX_FEED_FORWARD, MAX_HEADS, MAX_LAYERS,
            MAX_VOCAB, ModelConfig,
        },
        poly_config::{MAX_LOGITS, PolyConfig},
    },
    model::{Module, ModuleKind, targets},
};

use crate::messages::assert_presentable;

/// Both kinds of configuration.
pub fn check(data: &[u8]) {
    match ModelConfig::parse(data, Path::new("config.json")) {
        Ok(config) => check_model(&config),
        Err(error) => assert_presentable(&error, "config.json"),
    }
    match PolyConfig::parse(data, Path::new("adapter_config.json")) {
        Ok(config) => check_adapter(&config),
        Err(error) => assert_presentable(&error, "adapter_config.json"),
    }
}

fn check_model(config: &ModelConfig) {
    let config = match config {
        ModelConfig::T5(config) => config,
        ModelConfig::Decoder(config) => return check_decoder(config),
        ModelConfig::Bart(config) => return check_bart(config),
        _ => return,
    };
    for (size, max) in [
        (config.vocab_size, MAX_VOCAB),
        (config.d_model, MAX_FEATURES),
        (config.d_kv, MAX_FEATURES),
        (config.d_ff, MAX_FEED_FORWARD),
        (config.num_layers, MAX_LAYERS),
        (config.num_decoder_layers, MAX_LAYERS),
        (config.num_heads, MAX_HEADS),
    ] {
        assert!((1..=max).contains(&size), "{config:?}");
    }
    let ids = config.eos_token_ids.iter().copied().chain(config.pad_token_id);
    for id in ids.chain([config.decoder_start_token_id]) {
        assert!((id as usize) < config.vocab_size, "{config:?}");
    }
    // Even the largest network's parameters can be counted.
    let inner = config.num_heads * config.d_kv;
    let layer = 8 * inner * config.d_model + 3 * config.d_ff * config.d_model;
    let layers = (config.num_layers + config.num_decoder_layers).checked_mul(layer);
    let n = layers.and_then(|n| n.checked_add(2 * config.vocab_size * config.d_model));
    assert!(n.is_some(), "{config:?}");
    assert!((0.0..1.0).contains(&config.dropout_rate), "{config:?}");
    assert!(config.layer_norm_epsilon > 0.0 && config.layer_norm_epsilon < 1.0, "{config:?}");
}

fn check_bart(config: &BartConfig) {
    for stack in [config.encoder, config.decoder] {
        for (size, max) in [
            (stack.n_layers, MAX_LAYERS),
            (stack.n_heads, MAX_HEADS),
            (stack.d_ff, MAX_FEED_FORWARD),
        ] {
            assert!((1..=max).contains(&size), "{config:?}");
        }
        assert_eq!(config.d_model % stack.n_heads, 0, "{config:?}");
    }
    assert!((1..=MAX_FEATURES).contains(&config.d_model), "{config:?}");
    let ids = config.eos_token_ids.iter().copied().chain(config.pad_token_id);
    for id in ids.chain([config.decoder_start_token_id]) {
        assert!((id as usize) < config.vocab_size, "{config:?}");
    }
    assert!((0.0..1.0).contains(&config.dropout), "{config:?}");
}

fn check_decoder(config: &DecoderConfig) {
    for (size, max) in [
        (config.vocab_size, MAX_VOCAB),
        (config.d_model, MAX_FEATURES),
        (config.head_dim, MAX_FEATURES),
        (config.d_ff, MAX_FEED_FORWARD),
        (config.n_layers, MAX_LAYERS),
        (config.n_heads, MAX_HEADS),
    ] {
        assert!((1..=max).contains(&size), "{config:?}");
    }
    assert_eq!((config.n_heads % config.n_kv_heads, config.head_dim % 2), (0, 0), "{config:?}");
    assert_eq!(config.windows.len(), config.n_layers, "{config:?}");
    assert!(config.windows.iter().all(|window| window.is_none_or(|w| w > 0)), "{config:?}");
    for id in config.eos_token_ids.iter().chain(&config.pad_token_id) {
        assert!((*id as usize) < config.vocab_size, "{config:?}");
    }
    assert!(
        config.rope.theta > 1.0 && (0.0..1.0).contains(&config.attention_dropout),
        "{config:?}"
    );
    assert!(config.norm_eps > 0.0 && config.norm_eps < 1.0, "{config:?}");
    let (inner, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let layer = 2 * (inner + kv) * config.d_model + 3 * config.d_ff * config.d_model;
    let layers = config.n_layers.checked_mul(layer);
    let n = layers.and_then(|n| n.checked_add(2 * config.vocab_size * config.d_model));
    assert!(n.is_some(), "{config:?}");
}

fn check_adapter(config: &PolyConfig) {
    config.validate().expect("what was parsed is valid");
    assert!(config.n_tasks * config.n_splits * config.n_skills <= MAX_LOGITS);
    let json = config.to_json();
    let again = PolyConfig::parse(json.as_bytes(), Path::new("again")).expect("what was written");
    assert_eq!((&again, again.to_json()), (config, json));

    let modules = [
        ("shared", ModuleKind::Other),
        (
            "encoder.block.0.layer.0.SelfAttention.q",
            ModuleKind::Linear { index: 0, d_in: 12, d_out: 8 },
        ),
        (
            "encoder.block.0.layer.1.DenseReluDense.wo",
            ModuleKind::Linear { index: 1, d_in: 8, d_out: 12 },
        ),
        ("lm_head", ModuleKind::Head),
    ];
    let modules = modules.map(|(path, kind)| Module { path: path.to_owned(), kind });
    match targets::resolve(config, &modules, &["q"]) {
        Ok((targets, _)) => {
            assert!(!targets.is_empty());
            for target in targets {
                assert_eq!(modules[1 + target.index].path, target.path);
                assert_eq!((target.d_in % config.n_splits, target.d_out % config.n_splits), (0, 0));
            }
        }
        Err(error) => assert_presentable(&error, ""),
    }
}
