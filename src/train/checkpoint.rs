//! Checkpoints of a run: all that its next step depends on, in one folder.
//!
//! ```text
//! checkpoint-<step>/adapter_config.json, adapter_model.safetensors, tasks.json   the adapter (PEFT)
//! checkpoint-<step>/optimizer.safetensors                                        the moments
//! checkpoint-<step>/trainer_state.json                                           as transformers has it
//! checkpoint-<step>/training_args.json                                           what must stay the same
//! checkpoint-<step>/best/                                                        the best adapter by then
//! ```
//!
//! Data order, dropout and routing noise are functions of seed and step, so there is no generator
//! state to keep. Parameters and moments are f32 here and on disk: a resumed run computes the bits
//! of one that never stopped.
//!
//! A folder is filled under a hidden name, synced and renamed, and leaves by a rename, too: whenever
//! the machine stops, `checkpoint-<step>` is a whole checkpoint or not there.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Trainer;
use crate::{
    error::{Error, Result},
    formats::{
        adapter, disk,
        folder::{link_files, write_folder},
        json::read_json,
        poly_config,
        safetensors::write_atomically,
    },
    kernels::Backend,
};

/// The name of the state's file in a checkpoint.
pub const STATE_FILE: &str = "trainer_state.json";
/// The name of the optimiser's file in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The name of the file with what a resumed run must share.
pub const ARGUMENTS_FILE: &str = "training_args.json";
/// The name of the best adapter's folder, in a run's folder and in a checkpoint.
pub const BEST_DIR: &str = "best";
const PREFIX: &str = "checkpoint-";
/// The most bytes of a JSON file of a checkpoint.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Where a run stands, beside its parameters: the fields of transformers' `TrainerState` that mean
/// something here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// The step of the best evaluation so far.
    pub best_global_step: Option<u64>,
    /// Its metric.
    pub best_metric: Option<f64>,
    /// Where that adapter is.
    pub best_model_checkpoint: Option<PathBuf>,
    /// Epochs done, with the fraction of the one under way.
    pub epoch: f64,
    /// Steps between evaluations; 0: only at the end.
    pub eval_steps: u64,
    /// Steps done.
    pub global_step: u64,
    /// Evaluations, and the training loss of every `logging_steps` steps and of each checkpoint; every
    /// step is in `log.jsonl`.
    pub log_history: Vec<Value>,
    /// Steps between training losses in `log_history`.
    pub logging_steps: u64,
    /// Steps in all.
    pub max_steps: u64,
    /// Epochs in all.
    pub num_train_epochs: u64,
    /// Steps between checkpoints; 0: none on schedule.
    pub save_steps: u64,
    /// The state of early stopping, in transformers' form.
    pub stateful_callbacks: Map<String, Value>,
    /// Examples of a micro-batch.
    pub train_batch_size: usize,
}

const EARLY_STOPPING: &str = "EarlyStoppingCallback";

/// The most lines of `log_history` to which a training loss is added: each checkpoint has all of them.
const MAX_HISTORY: usize = 10_000;

impl TrainerState {
    /// Adds a training loss to `log_history`, where in a very long run the earliest one makes room.
    pub fn note_loss(&mut self, line: Value) {
        if self.log_history.len() >= MAX_HISTORY
            && let Some(first) = self.log_history.iter().position(|line| !line["loss"].is_null())
        {
            self.log_history.remove(first);
        }
        self.log_history.push(line);
    }

    /// Evaluations in a row that were not better than the best.
    pub fn patience_used(&self) -> u64 {
        self.stateful_callbacks
            .get(EARLY_STOPPING)
            .and_then(|callback| callback["attributes"]["early_stopping_patience_counter"].as_u64())
            .unwrap_or(0)
    }

    /// Sets [`TrainerState::patience_used`], with the arguments that transformers keeps beside it.
    pub fn set_patience_used(&mut self, used: u64, patience: u64, threshold: f64) {
        let callback = json!({
            "args": {"early_stopping_patience": patience, "early_stopping_threshold": threshold},
            "attributes": {"early_stopping_patience_counter": used},
        });
        self.stateful_callbacks.insert(EARLY_STOPPING.to_owned(), callback);
    }
}

/// A checkpoint's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointDir {
    /// Steps done when it was made.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
}

/// The checkpoints in a run's folder, the earliest first.
///
/// # Errors
/// If the folder exists and cannot be read.
pub fn list(output_dir: &Path) -> Result<Vec<CheckpointDir>> {
    let mut found = Vec::new();
    for (name, path) in entries(output_dir)? {
        let Some(step) = name.strip_prefix(PREFIX) else { continue };
        // Only names that are written here: "checkpoint-007" or "checkpoint-7-old" are not.
        let Some(step) = step.parse::<u64>().ok().filter(|n| n.to_string() == step) else {
            continue;
        };
        if path.is_dir() {
            found.push(CheckpointDir { step, path });
        }
    }
    found.sort_by_key(|checkpoint| checkpoint.step);
    Ok(found)
}

/// Removes what an interrupted save or removal left behind, in the folder of a run that nobody else is writing.
///
/// # Errors
/// If it cannot be removed.
pub fn remove_leftovers(output_dir: &Path) -> Result<()> {
    for dir in [output_dir, &output_dir.join(BEST_DIR)] {
        for (name, path) in entries(dir)? {
            if disk::is_hidden(name.as_ref()) {
                let removed = if path.is_dir() {
                    disk::remove_dir_all(&path)
                } else {
                    disk::remove_file(&path)
                };
                removed.map_err(Error::io("remove", &path))?;
            }
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        // A parent that is a file makes itself known when the folder is to be created.
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        entries => entries.map_err(Error::io("read", dir))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// Removes the earliest checkpoints until `limit` are left.
///
/// # Errors
/// If one cannot be removed.
pub fn rotate(output_dir: &Path, limit: usize) -> Result<()> {
    let found = list(output_dir)?;
    found[..found.len().saturating_sub(limit)].iter().try_for_each(|old| remove(&old.path))
}

/// Removes a checkpoint: first its name, for good, then its content.
///
/// # Errors
/// If it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    let hidden = disk::hidden_beside(path);
    disk::rename(path, &hidden).map_err(Error::io("rename", path))?;
    // Or a loss of power could give the name back to what is left.
    sync_parent(path)?;
    disk::remove_dir_all(&hidden).map_err(Error::io("remove", hidden))
}

/// Saves a run's state as `output_dir/checkpoint-<step>`, where there is none of that step yet.
///
/// # Errors
/// If a value is not finite, or the folder cannot be written.
pub fn save<B: Backend>(
    output_dir: &Path,
    trainer: &Trainer<'_, B>,
    state: &TrainerState,
    arguments: &Map<String, Value>,
) -> Result<PathBuf> {
    let path = output_dir.join(format!("{PREFIX}{}", state.global_step));
    if path.exists() {
        return Ok(path); // The run was stopped at the step it was resumed at: the same bits.
    }
    let hidden = Hidden(disk::hidden_beside(&path));
    fill(&hidden.0, trainer, state, arguments)?;
    disk::rename(&hidden.0, &path).map_err(Error::io("rename", &path))?;
    sync_parent(&path)?;
    Ok(path)
}

/// A folder without a name yet; removed when it is dropped, so after errors and panics alike. After the
/// rename there is nothing to remove.
struct Hidden(PathBuf);

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = disk::remove_dir_all(&self.0);
    }
}

/// Writes a checkpoint's files into a folder.
fn fill<B: Backend>(
    hidden: &Path,
    trainer: &Trainer<'_, B>,
    state: &TrainerState,
    arguments: &Map<String, Value>,
) -> Result<()> {
    disk::create_dir_all(hidden).map_err(Error::io("create", hidden))?;
    trainer.adapter().save_peft(trainer.model().backend(), hidden)?;
    trainer.save_optimizer(&hidden.join(OPTIMIZER_FILE))?;
    if let Some(best) = state.best_model_checkpoint.as_ref().filter(|best| best.is_dir()) {
        let kept = hidden.join(BEST_DIR);
        disk::create_dir_all(&kept).map_err(Error::io("create", &kept))?;
        link_files(best, &kept)?;
    }
    let write = |name: &str, value: &Value| {
        write_atomically(&hidden.join(name), |file| writeln!(file, "{value:#}"))
    };
    write(ARGUMENTS_FILE, &Value::Object(arguments.clone()))?;
    write(STATE_FILE, &serde_json::to_value(state).unwrap_or_default())?;
    disk::sync_dir(hidden).map_err(Error::io("sync", hidden))
}

/// So that a name survives a loss of power.
fn sync_parent(path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk::sync_dir(dir).map_err(Error::io("sync", dir))
}

/// The state of a checkpoint.
///
/// # Errors
/// If the file is missing or malformed.
pub fn read_state(checkpoint_dir: &Path) -> Result<TrainerState> {
    read_json(&checkpoint_dir.join(STATE_FILE), MAX_FILE_BYTES)
}

/// Puts the best adapter of a checkpoint to where the run keeps it, `best`, in place of one of later steps, which will be
/// done again. Without it nothing is the best yet.
///
/// # Errors
/// If a folder cannot be read or written.
pub fn restore_best(checkpoint_dir: &Path, best: &Path, state: &mut TrainerState) -> Result<()> {
    if [poly_config::FILE_NAME, adapter::FILE_NAME].iter().any(|file| best.join(file).exists()) {
        disk::remove_dir_all(best).map_err(Error::io("remove", best))?;
    }
    let Some(step) = state.best_global_step else { return Ok(()) };
    let kept = checkpoint_dir.join(BEST_DIR);
    if kept.is_dir() {
        write_folder(best, |dir| link_files(&kept, dir))?;
        state.best_model_checkpoint = Some(best.to_path_buf());
    } else {
        tracing::warn!(
            "{} has no {BEST_DIR}, the best adapter, which was that of step {step}: the next evaluation is the best one so far",
            checkpoint_dir.display()
        );
        (state.best_global_step, state.best_metric, state.best_model_checkpoint) =
            (None, None, None);
    }
    Ok(())
}

/// Checks that a run with these arguments is the one that made a checkpoint. Another instruction set
/// rounds otherwise, which is worth a warning and not a refusal.
///
/// # Errors
/// Names the first argument that differs.
pub fn check_arguments(checkpoint_dir: &Path, now: &Map<String, Value>) -> Result<()> {
    let path = checkpoint_dir.join(ARGUMENTS_FILE);
    let mut then: Map<String, Value> = read_json(&path, MAX_FILE_BYTES)?;
    modernise(&mut then, now);
    for key in then.keys().chain(now.keys()) {
        let (then, now) =
            (&then.get(key).unwrap_or(&Value::Null), &now.get(key).unwrap_or(&Value::Null));
        if then != now && key == "isa" {
            tracing::warn!("the checkpoint was made on {then}, this is {now}: bits may differ");
        } else if then != now {
            return Err(Error::file(
                path,
                format!(
                    "{key} was {then} in the run that is to be resumed and is {now} now, which would be another run: give the same settings and data, or begin anew with --adapter-init"
                ),
            ));
        }
    }
    Ok(())
}

/// Turns the arguments of a checkpoint that an earlier version made into what this one would have written.
fn modernise(then: &mut Map<String, Value>, now: &Map<String, Value>) {
    // Training's was not noted: there was one.
    if now.contains_key("tune") {
        then.entry("tune").or_insert(json!("all"));
    }
    // The rows are the same, or their own fingerprint differs; nothing was noted of their choices.
    const CHOICES: &str = "eval_choices_fingerprint";
    if !then.contains_key(CHOICES) {
        then.insert(CHOICES.to_owned(), now.get(CHOICES).cloned().unwrap_or_default());
    }
    let metric = then.get("metric_for_best").and_then(Value::as_str);
    if metric.is_some_and(|metric| ["exact_match", "rouge_l"].contains(&metric)) {
        then.entry("max_new_tokens").or_insert(json!(128));
        then.entry("num_beams").or_insert(json!(1));
        let size = then.get("batch_size").cloned().unwrap_or_default();
        then.entry("eval_batch_size").or_insert(size);
    }
    // Some values were spelled as Rust's `Debug` has them.
    let text = |key: &str| then.get(key).and_then(Value::as_str).unwrap_or_default();
    let loss = match text("loss") {
        "Lm" => Some("lm"),
        "TFew" => Some("t-few"),
        _ => None,
    };
    let optimizer = match text("optim") {
        "AdamW" => Some(("adamw", None)),
        "Adafactor(Adafactor { scale_parameter: false })" => Some(("adafactor", Some(false))),
        "Adafactor(Adafactor { scale_parameter: true })" => Some(("adafactor", Some(true))),
        _ => None,
    };
    let router = text("trainable").split_once("router: ").map(|(_, router)| {
        match router.trim_end_matches(" }") {
            "None" => json!("none"),
            "All" => json!("dense"),
            "Present" => json!("lazy"),
            // Only([3]); whether the skills learn goes with `tune`.
            only => {
                let tasks = only.trim_start_matches("Only(").trim_end_matches(')');
                serde_json::from_str(tasks).unwrap_or_default()
            }
        }
    });
    if let Some(loss) = loss {
        then.insert("loss".to_owned(), json!(loss));
    }
    if let Some((optim, scale_parameter)) = optimizer {
        then.insert("optim".to_owned(), json!(optim));
        then.insert("scale_parameter".to_owned(), json!(scale_parameter));
    }
    if let Some(router) = router {
        then.remove("trainable");
        then.insert("router_updates".to_owned(), router);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_found_by_their_number_and_the_earliest_go_first() {
        let dir = std::env::temp_dir().join(format!("polytape-ckpt-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        assert!(list(&dir).unwrap().is_empty(), "no folder, no checkpoints");
        for name in [
            "checkpoint-9",
            "checkpoint-10",
            "checkpoint-007",
            "checkpoint-x",
            ".checkpoint-8.tmp-1",
        ] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        fs::write(dir.join("checkpoint-3"), "a file").unwrap();
        let steps = || list(&dir).unwrap().iter().map(|c| c.step).collect::<Vec<_>>();
        assert_eq!(steps(), [9, 10]);
        remove_leftovers(&dir).unwrap();
        assert!(!dir.join(".checkpoint-8.tmp-1").exists() && dir.join("checkpoint-x").exists());
        rotate(&dir, 2).unwrap();
        assert_eq!(steps(), [9, 10]);
        rotate(&dir, 1).unwrap();
        assert_eq!(steps(), [10]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn patience_is_kept_as_transformers_keeps_it() {
        let mut state = TrainerState::default();
        assert_eq!(state.patience_used(), 0);
        state.set_patience_used(2, 5, 0.5);
        assert_eq!(state.patience_used(), 2);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<TrainerState>(&text).unwrap(), state);
    }

    #[test]
    fn arguments_of_earlier_versions_are_understood() {
        let map = |value: Value| value.as_object().unwrap().clone();
        for (mut then, now) in [
            (
                json!({"loss": "Lm", "optim": "AdamW", "metric_for_best": "rouge_l", "batch_size": 4,
                    "trainable": "Trainable { bank: true, router: Present }"}),
                json!({"loss": "lm", "optim": "adamw", "scale_parameter": null, "max_new_tokens": 128, "tune": "all",
                    "num_beams": 1, "metric_for_best": "rouge_l", "router_updates": "lazy", "batch_size": 4, "eval_batch_size": 4,
                    "eval_choices_fingerprint": "ab"}),
            ),
            (
                json!({"loss": "TFew", "optim": "Adafactor(Adafactor { scale_parameter: true })",
                    "trainable": "Trainable { bank: false, router: Only([3]) }"}),
                json!({"loss": "t-few", "optim": "adafactor", "scale_parameter": true,
                    "router_updates": [3], "eval_choices_fingerprint": null}),
            ),
        ] {
            let now = map(now);
            let then = then.as_object_mut().unwrap();
            modernise(then, &now);
            assert_eq!(*then, now);
            // What this version wrote stays as it is.
            modernise(then, &Map::new());
            assert_eq!(*then, now);
        }
    }

    #[test]
    fn of_a_very_long_run_the_latest_losses_are_noted() {
        let mut state = TrainerState::default();
        state.log_history.push(json!({"step": 0, "eval_loss": 1.0}));
        (1..=MAX_HISTORY + 4).for_each(|step| state.note_loss(json!({"step": step, "loss": 0.5})));
        assert_eq!(state.log_history.len(), MAX_HISTORY);
        assert_eq!(state.log_history[0]["step"], 0);
        assert_eq!(state.log_history[1]["step"], 6);
    }

    #[test]
    fn another_run_is_refused_by_the_name_of_what_differs() {
        let dir = std::env::temp_dir().join(format!("polytape-args-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(ARGUMENTS_FILE), r#"{"seed": 1, "batch_size": 8}"#).unwrap();
        let check = |seed: u64, batch: u64| {
            let now = json!({"seed": seed, "batch_size": batch});
            check_arguments(&dir, now.as_object().unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!(check(1, 8), Ok(()));
        assert!(check(2, 8).unwrap_err().contains("seed was 1 in the run"));
        assert!(check(1, 4).unwrap_err().contains("batch_size was 8"));
        fs::remove_dir_all(dir).unwrap();
    }
}
