//! Keys of transformers' `TrainingArguments` that are no flags here, so that its files can be used as
//! they are.
//!
//! ```text
//! bf16 = true                    ->  --dtype=bf16
//! eval_strategy = "steps"        ->  nothing, if eval_steps says how many
//! adam_beta2 = 0.999             ->  nothing: it is so
//! adam_beta2 = 0.95              ->  refused, with the reason
//! disable_tqdm = true            ->  a warning: of no effect
//! ```
//!
//! What would change the run is never passed over: either it is done, or it is refused.

/// What a key comes to.
#[derive(Debug, PartialEq)]
pub(super) enum Meaning {
    /// These flags; without any it says what is so anyway.
    Flags(Vec<String>),
    /// Nothing here depends on it.
    NoEffect,
    /// Why it cannot be.
    Refused(String),
}

/// What else is said.
pub(super) struct Beside<'a> {
    /// What the file says of a flag, under any of its names.
    pub(super) in_file: &'a dyn Fn(&str) -> Option<String>,
    /// Whether the command line has a flag.
    pub(super) is_given: &'a dyn Fn(&str) -> bool,
}

impl Beside<'_> {
    fn has(&self, flag: &str) -> bool {
        (self.is_given)(flag) || (self.in_file)(flag).is_some()
    }
}

/// What is the same for every value that a run may have.
const NO_EFFECT: [&str; 20] = [
    "dataloader-num-workers",
    "dataloader-persistent-workers",
    "dataloader-pin-memory",
    "dataloader-prefetch-factor",
    "ddp-find-unused-parameters",
    "disable-tqdm",
    "do-eval",
    "do-train",
    "eval-accumulation-steps",
    "eval-do-concat-batches",
    "gradient-checkpointing-kwargs",
    "log-level",
    "logging-dir",
    "logging-first-step",
    "logging-nan-inf-filter",
    "logging-strategy",      // log.jsonl has every step.
    "predict-with-generate", // The metric says it.
    "remove-unused-columns",
    "run-name",
    "save-safetensors",
];

/// What is never done.
const OFF: [(&str, &str); 8] = [
    ("auto-find-batch-size", "batch_size is what it is; the memory that it needs is said first"),
    ("dataloader-drop-last", "the last batch of an epoch is learned from"),
    (
        "eval-on-start",
        "train evaluates first after eval_steps steps, adapt before the first step anyway",
    ),
    ("fp16", "there are f32 and bf16: bf16 = true"),
    ("group-by-length", "batches are ragged, so rows of other lengths cost nothing"),
    ("push-to-hub", "nothing leaves this machine"),
    ("save-only-model", "a checkpoint has what a run goes on from"),
    ("tf32", "there are f32 and bf16: bf16 = true"),
];

/// The constants of AdamW.
const FIXED: [(&str, f64); 3] =
    [("adam-beta1", 0.9), ("adam-beta2", 0.999), ("adam-epsilon", 1e-8)];

/// What a key means, in kebab-case, with its value as a flag would have it; nothing if transformers has no
/// such key, or it is a flag here. A value that is no scalar is empty.
pub(super) fn meaning(key: &str, value: &str, beside: &Beside<'_>) -> Option<Meaning> {
    if NO_EFFECT.contains(&key) {
        return Some(Meaning::NoEffect);
    }
    let nothing = || Ok(Vec::new());
    if let Some((_, why)) = OFF.iter().find(|(off, _)| *off == key) {
        return Some(match value {
            "off" | "false" | "False" => Meaning::Flags(Vec::new()),
            _ => Meaning::Refused((*why).to_owned()),
        });
    }
    if let Some((_, is)) = FIXED.iter().find(|(fixed, _)| *fixed == key) {
        return Some(match value.parse::<f64>() {
            Ok(value) if value == *is => Meaning::Flags(Vec::new()),
            _ => Meaning::Refused(format!(
                "AdamW has {is} here, PyTorch's default, and no flag for it"
            )),
        });
    }
    let flags: Result<Vec<String>, String> = match (key, value) {
        ("bf16", "on") => Ok(vec!["--dtype=bf16".to_owned()]),
        ("bf16", "off") => nothing(),
        ("bf16", _) => Err("expected true or false".to_owned()),
        // In transformers: as many as num_train_epochs says.
        ("max-steps", "-1") => nothing(),
        ("eval-strategy" | "evaluation-strategy", _) => {
            strategy(value, "eval_steps", "eval-steps", beside).and_then(|()| {
                let rows = ["eval-data", "validation-split"];
                match rows.into_iter().find(|rows| value == "no" && beside.has(rows)) {
                    Some(rows) => Err(format!(
                        "where there are rows to evaluate on, that is done at the end: leave {} out",
                        rows.replace('-', "_")
                    )),
                    None => nothing(),
                }
            })
        }
        ("save-strategy", "best") => {
            Err("the best adapter is kept in best/ whenever there are rows to evaluate on; checkpoints are for going on, every save_steps steps".to_owned())
        }
        ("save-strategy", _) => {
            strategy(value, "save_steps", "save-steps", beside).and_then(|()| nothing())
        }
        ("greater-is-better", "on" | "off") => {
            let metric = (beside.in_file)("metric-for-best").unwrap_or_else(|| "loss".to_owned());
            let is_loss = ["loss", "eval_loss"].contains(&metric.as_str());
            // The command line may have another metric, of which it is not said.
            if (beside.is_given)("metric-for-best") || (value == "off") == is_loss {
                nothing()
            } else {
                let better = if is_loss { "less" } else { "more" };
                Err(format!("of {metric} {better} is better, which need not be said"))
            }
        }
        ("greater-is-better", _) => Err("expected true or false".to_owned()),
        _ => return None,
    };
    Some(flags.map_or_else(Meaning::Refused, Meaning::Flags))
}

/// Whether so many steps are what a strategy means.
fn strategy(value: &str, key: &str, flag: &str, beside: &Beside<'_>) -> Result<(), String> {
    match (value, beside.has(flag)) {
        ("steps", true) | ("no", false) => Ok(()),
        ("steps", false) => Err(format!("{key} must say how many steps")),
        ("no", true) => Err(format!("{key} says otherwise: leave one of them out")),
        ("epoch", _) => Err(format!(
            "only steps are counted: set {key} to those of an epoch, rows / batch size"
        )),
        _ => Err("expected \"no\" or \"steps\"".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(file: &[(&str, &str)], key: &str, value: &str) -> Option<Meaning> {
        let in_file = |flag: &str| {
            file.iter().find(|(name, _)| *name == flag).map(|(_, value)| (*value).to_owned())
        };
        meaning(key, value, &Beside { in_file: &in_file, is_given: &|flag| flag == "save-steps" })
    }

    #[test]
    fn what_would_change_the_run_is_done_or_refused() {
        let so_anyway = Some(Meaning::Flags(vec![]));
        let evaluated = [("eval-steps", "5"), ("metric-for-best", "rouge_l")];
        for (file, key, value) in [
            (&[][..], "adam-beta2", "0.999"),
            (&[], "adam-epsilon", "0.00000001"),
            (&[], "fp16", "off"),
            (&[], "bf16", "off"),
            (&[], "max-steps", "-1"),
            (&[], "eval-strategy", "no"),
            (&[], "save-strategy", "steps"), // The command line says how many.
            (&[], "greater-is-better", "off"),
            (&evaluated, "eval-strategy", "steps"),
            (&evaluated, "greater-is-better", "on"),
        ] {
            assert_eq!(with(file, key, value), so_anyway, "{key} = {value}");
        }
        for (file, key, value) in [
            (&[][..], "adam-beta1", "0.95"),
            (&[], "adam-beta1", "many"),
            (&[], "fp16", "on"),
            (&[], "bf16", "3"),
            (&[], "eval-strategy", "steps"),
            (&[], "eval-strategy", "epoch"),
            (&[], "save-strategy", "no"),
            (&[], "save-strategy", "best"),
            (&[], "greater-is-better", "on"),
            (&evaluated, "eval-strategy", "no"),
            (&evaluated, "greater-is-better", "off"),
            (&[("eval-data", "rows.jsonl")], "evaluation-strategy", "no"),
        ] {
            let found = with(file, key, value);
            assert!(matches!(found, Some(Meaning::Refused(_))), "{key} = {value}: {found:?}");
        }
        assert_eq!(with(&[], "bf16", "on"), Some(Meaning::Flags(vec!["--dtype=bf16".into()])));
        assert_eq!(with(&[], "run-name", "x"), Some(Meaning::NoEffect));
        assert_eq!(with(&[], "max-steps", "7"), None);
        assert_eq!(with(&[], "max_stepps", "7"), None);
    }
}
