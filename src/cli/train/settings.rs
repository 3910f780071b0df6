//! What is written down of a run: what a resumed one must share, and `config.json`.

use std::{io::Write, path::Path};

use serde_json::{Map, Value, json};

use super::{
    super::{Described, data::NamedFile},
    flags::{Evaluating, Learning, Saving, spelling},
    run::Evaluator,
};
use crate::{
    error::Result,
    formats::safetensors::write_atomically,
    model::{Model, dataset::Dataset},
    train::{Optimizer, RouterRows, Trainer, choices::Choices},
};

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// What a resumed run must share, so that it is the same run.
pub(in crate::cli) fn arguments<B: Described>(
    trainer: &Trainer<'_, B>,
    per_step: usize,
    learning: &Learning,
    data: &Dataset,
    choices: Option<&Choices>,
    evaluator: Option<&Evaluator<'_, B>>,
) -> Map<String, Value> {
    let (model, config) = (trainer.model(), trainer.config());
    let backend = model.backend();
    let generated = evaluator.filter(|e| e.metric.is_generated()).map(|e| &e.options);
    let (optim, scale_parameter) = match config.optimizer {
        Optimizer::AdamW => ("adamw", None),
        Optimizer::Adafactor(adafactor) => ("adafactor", Some(adafactor.scale_parameter)),
    };
    let adapter: Value =
        serde_json::from_str(&trainer.adapter().config().to_json()).unwrap_or_default();
    object(json!({
        "model_fingerprint": model.fingerprint().to_string(),
        "data_fingerprint": data.fingerprint().to_string(),
        "choices_fingerprint": choices.map(|choices| choices.fingerprint().to_string()),
        "eval_data_fingerprint": evaluator.map(|e| e.data.fingerprint().to_string()),
        "eval_choices_fingerprint": evaluator
            .filter(|e| !e.choices.is_empty())
            .map(|e| e.choices.fingerprint().to_string()),
        "metric_for_best": evaluator.map(|e| e.metric.name()),
        "max_new_tokens": generated.map(|options| options.max_new_tokens),
        "num_beams": generated.map(|options| options.num_beams),
        // Few rows are decoded in another order of sums than many.
        "eval_batch_size": evaluator.filter(|_| generated.is_some()).map(|e| e.batch_size),
        "isa": backend.hardware(),
        "dtype": backend.compute().to_string(),
        "adapter_config": adapter,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": per_step / config.batch_size,
        "learning_rate": config.learning_rate,
        "router_learning_rate": config.router_learning_rate,
        "weight_decay": config.weight_decay,
        "router_weight_decay": config.router_weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "lr_scheduler_type": config.schedule.name(),
        "warmup_steps": config.warmup_steps,
        "router_sampling": format!("{:?}", config.router_sampling).to_lowercase(),
        "shuffle": learning.shuffle.is_on(),
        "sampling": learning.sampling(),
        "label_smoothing_factor": config.label_smoothing,
        "loss": spelling(learning.loss),
        "optim": optim,
        "scale_parameter": scale_parameter,
        "router_updates": match &config.trainable.router {
            RouterRows::None => json!("none"),
            RouterRows::All => json!("dense"),
            RouterRows::Present => json!("lazy"),
            RouterRows::Only(tasks) => json!(tasks),
        },
        "ibp_prior": config.ibp_prior,
        "routing": trainer.adapter().routing(),
        "dropout": config.dropout.unwrap_or(model.dropout_rate()),
        "seed": config.seed,
    }))
}

/// What a resumed run may change, and versions.
pub(in crate::cli) fn settings(
    model: &Model<impl Described>,
    evaluating: &Evaluating,
    saving: &Saving,
    learning: &Learning,
) -> Map<String, Value> {
    let eval_data: Value = evaluating.eval_data.iter().map(NamedFile::shown).collect();
    object(json!({
        "polytape_version": env!("CARGO_PKG_VERSION"),
        "threads": model.backend().host_threads(),
        "eval_data": (!evaluating.eval_data.is_empty()).then_some(eval_data),
        "validation_split": evaluating.validation_split,
        "eval_steps": evaluating.eval_steps,
        "early_stopping_patience": evaluating.early_stopping_patience,
        "early_stopping_threshold": evaluating.threshold(),
        "load_best_model_at_end": evaluating.load_best_model_at_end.is_on(),
        "save_steps": saving.save_steps,
        "save_total_limit": saving.save_total_limit,
        "logging_steps": saving.logging_steps,
        "report_to": spelling(saving.report_to),
        "checkpointing": learning.checkpointing(),
    }))
}

/// Writes `config.json`.
pub(in crate::cli) fn write(
    output_dir: &Path,
    mut settings: Map<String, Value>,
    arguments: Map<String, Value>,
) -> Result<()> {
    settings.extend(arguments);
    let settings = Value::Object(settings);
    write_atomically(&output_dir.join("config.json"), |file| writeln!(file, "{settings:#}"))
}
