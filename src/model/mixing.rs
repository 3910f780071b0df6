//! Routing at inference as a value: which mixture of the skills an example uses.
//!
//! | mixing | weights of a linear `[n_splits, n_skills]` | field `routing` of a row |
//! |---|---|---|
//! | task | σ(Z\[task\]) over its sum in each split | none: the row's `task` |
//! | weights | as given, the same in every linear | `{"weights": [0.5, 0.5, 0, 0]}` |
//! | blend | Σ share·w\[task\] / Σ share | `{"blend": {"a": 1, "b": 3}}` |
//! | average | the mean of w over all tasks | `"average"` |
//! | sum | the sum of others' | `"adapter": ["a", "b"]` ([`super::united`]) |
//! | none: weights of zero | zeros, the base alone | `"adapter": []` |
//!
//! Weights are used as they are: those of a task sum to 1 in each split, and all zeros leave the base
//! alone. A blend is of mixing weights, not of outputs: A and B are mixed before they are multiplied.

use std::{
    borrow::Cow,
    hash::{Hash, Hasher},
};

use serde_json::Value;

use crate::formats::{
    json::{excerpt, type_name},
    poly_config::PolyConfig,
    tasks::TaskNames,
};

/// Which mixture of the skills an example uses in inference.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixing {
    /// A task's, as its routers have learned it.
    Task(u32),
    /// Given: of each skill, for every split, or `[n_splits * n_skills]`, column q·n_skills+s.
    Weights(Vec<f32>),
    /// Several tasks' by shares, which count relative to their sum.
    Blend(Vec<(u32, f32)>),
    /// All tasks', in equal parts.
    Average,
    /// The sum of several: what adapters that are used together add.
    Sum(Vec<Mixing>),
}

// Values that came through `check` are not NaN, and those of `parse` have no -0.
impl Eq for Mixing {}

impl Hash for Mixing {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Task(task) => (0, task).hash(state),
            Self::Weights(weights) => {
                1.hash(state);
                weights.iter().for_each(|w| (w + 0.0).to_bits().hash(state));
            }
            Self::Blend(shares) => {
                2.hash(state);
                shares.iter().for_each(|(task, s)| (task, (s + 0.0).to_bits()).hash(state));
            }
            Self::Average => 3.hash(state),
            Self::Sum(parts) => (4, parts).hash(state),
        }
    }
}

impl Mixing {
    /// The field `routing` of a row; what is wrong with it otherwise.
    pub fn parse(value: &Value, tasks: &TaskNames, config: &PolyConfig) -> Result<Self, String> {
        let expected =
            "expected \"average\", {\"weights\": [...]}, {\"blend\": {...}} or {\"task\": ...}";
        let mixing = match value {
            Value::String(word) if word == "average" => Self::Average,
            Value::Object(fields) if fields.len() == 1 => {
                match fields.iter().next().map(|(key, value)| (key.as_str(), value)) {
                    Some(("weights", Value::Array(weights))) => Self::Weights(
                        weights
                            .iter()
                            .map(|w| number(w).map_err(|e| format!("weights: {e}")))
                            .collect::<Result<_, _>>()?,
                    ),
                    Some(("blend", Value::Object(shares))) => {
                        let mut blend = Vec::with_capacity(shares.len());
                        for (name, share) in shares {
                            let share = number(share)
                                .map_err(|e| format!("blend: task {}: {e}", excerpt(name)))?;
                            blend.push((task(&Value::from(name.as_str()), tasks)?, share));
                        }
                        blend.sort_by_key(|&(task, _)| task);
                        Self::Blend(blend)
                    }
                    Some(("task", name)) => Self::Task(task(name, tasks)?),
                    Some((key, _)) => return Err(format!("{expected}, found {}", excerpt(key))),
                    None => return Err(expected.to_owned()),
                }
            }
            Value::String(word) => return Err(format!("{expected}, found {}", excerpt(word))),
            Value::Object(fields) => {
                return Err(format!("{expected}, found an object of {} fields", fields.len()));
            }
            other => return Err(format!("{expected}, found {}", type_name(other))),
        };
        mixing.check(config)?;
        // A blend of one task is that task, to the bit.
        Ok(match &mixing {
            Self::Blend(shares) => match shares[..] {
                [(task, _)] => Self::Task(task),
                _ => mixing,
            },
            _ => mixing,
        })
    }

    /// Whether an adapter of this configuration can mix so; why not otherwise.
    pub fn check(&self, config: &PolyConfig) -> Result<(), String> {
        let &PolyConfig { n_tasks, n_splits, n_skills, .. } = config;
        let is_good = |value: f32| value.is_finite() && value >= 0.0;
        let in_range = |task: u32| {
            if (task as usize) < n_tasks {
                return Ok(());
            }
            Err(format!("task {task} is out of range: there are {n_tasks}, 0 to {}", n_tasks - 1))
        };
        match self {
            Self::Task(task) => in_range(*task),
            Self::Weights(weights) => {
                if weights.len() != n_skills && weights.len() != n_splits * n_skills {
                    let or = if n_splits > 1 {
                        format!(" or {} (of each split)", n_splits * n_skills)
                    } else {
                        String::new()
                    };
                    return Err(format!(
                        "{} weights, but the adapter has {n_skills} skills: expected {n_skills}{or}",
                        weights.len()
                    ));
                }
                match weights.iter().find(|&&w| !is_good(w)) {
                    Some(w) => Err(format!("weights must be finite and 0 or more, found {w}")),
                    None => Ok(()),
                }
            }
            Self::Blend(shares) => {
                shares.iter().try_for_each(|&(task, _)| in_range(task))?;
                if let Some((task, share)) = shares.iter().find(|(_, share)| !is_good(*share)) {
                    return Err(format!(
                        "the share of task {task} must be finite and 0 or more, found {share}"
                    ));
                }
                if shares.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                    return Err("a task is in the blend twice".to_owned());
                }
                if shares.iter().map(|&(_, share)| f64::from(share)).sum::<f64>() > 0.0 {
                    Ok(())
                } else {
                    Err("the shares of a blend must not all be 0".to_owned())
                }
            }
            Self::Average => Ok(()),
            Self::Sum(parts) => parts.iter().try_for_each(|part| part.check(config)),
        }
    }

    /// The tasks whose mixing weights are needed, with their parts of the whole.
    pub(crate) fn parts(&self, n_tasks: usize) -> Vec<(u32, f64)> {
        match self {
            Self::Task(task) => vec![(*task, 1.0)],
            Self::Weights(_) => Vec::new(),
            Self::Blend(shares) => {
                let sum: f64 = shares.iter().map(|&(_, share)| f64::from(share)).sum();
                shares.iter().map(|&(task, share)| (task, f64::from(share) / sum)).collect()
            }
            Self::Sum(parts) => parts.iter().flat_map(|part| part.parts(n_tasks)).collect(),
            Self::Average => (0..n_tasks as u32).map(|task| (task, 1.0 / n_tasks as f64)).collect(),
        }
    }

    /// The weights of one linear, `[n_splits * n_skills]`; `of_task` gives those of a task.
    pub(crate) fn weights<'w>(
        &self,
        config: &PolyConfig,
        of_task: &dyn Fn(u32) -> Cow<'w, [f64]>,
    ) -> Vec<f64> {
        let width = config.n_splits * config.n_skills;
        if let Self::Sum(parts) = self {
            let mut sum = vec![0.0; width];
            for part in parts {
                let weights = part.weights(config, of_task);
                sum.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
            }
            return sum;
        }
        if let Self::Weights(weights) = self {
            return weights.iter().copied().map(f64::from).cycle().take(width).collect();
        }
        let mut sum = vec![0.0; width];
        for (task, part) in self.parts(config.n_tasks) {
            sum.iter_mut().zip(of_task(task).iter()).for_each(|(sum, w)| *sum += part * w);
        }
        sum
    }
}

fn number(value: &Value) -> Result<f32, String> {
    match value.as_f64() {
        Some(number) => Ok(number as f32 + 0.0), // -0 becomes 0.
        None => Err(format!("expected a number, found {}", type_name(value))),
    }
}

/// A task by its name, or by its id where that is no name.
fn task(value: &Value, tasks: &TaskNames) -> Result<u32, String> {
    let unknown = |shown: String| {
        let known = tasks.filled(tasks.n_tasks().min(20));
        Err(format!("task {shown} is not known; known: {}", known.join(", ")))
    };
    match value {
        Value::String(name) => match (tasks.id(name), name.parse::<u32>()) {
            (Some(id), _) => Ok(id),
            (None, Ok(id)) if (id as usize) < tasks.n_tasks() => Ok(id),
            _ => unknown(excerpt(name)),
        },
        Value::Number(id) => match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) if (id as usize) < tasks.n_tasks() => Ok(id),
            _ => unknown(id.to_string()),
        },
        other => Err(format!("expected a task's name or id, found {}", type_name(other))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<Mixing, String> {
        let tasks = TaskNames::from_list(&["a", "b", "c"].map(str::to_owned)).unwrap();
        let config = PolyConfig { n_tasks: 3, n_skills: 2, n_splits: 2, ..PolyConfig::default() };
        Mixing::parse(value, &tasks, &config)
    }

    #[test]
    fn rows_say_how_they_are_mixed() {
        for (value, mixing) in [
            (json!("average"), Mixing::Average),
            (json!({"weights": [1, 0]}), Mixing::Weights(vec![1.0, 0.0])),
            (json!({"weights": [1, 0, 0.5, -0.0]}), Mixing::Weights(vec![1.0, 0.0, 0.5, 0.0])),
            (json!({"blend": {"c": 1, "a": 3}}), Mixing::Blend(vec![(0, 3.0), (2, 1.0)])),
            (json!({"blend": {"b": 7}}), Mixing::Task(1)),
            (json!({"blend": {"1": 1, "a": 1}}), Mixing::Blend(vec![(0, 1.0), (1, 1.0)])),
            (json!({"task": "b"}), Mixing::Task(1)),
            (json!({"task": 2}), Mixing::Task(2)),
        ] {
            assert_eq!(parse(&value), Ok(mixing), "{value}");
        }
        for (value, reason) in [
            (json!("mean"), "found \"mean\""),
            (json!(3), "found a number"),
            (json!({}), "an object of 0 fields"),
            (json!({"weights": [1, 0], "task": "a"}), "an object of 2 fields"),
            (json!({"weight": [1, 0]}), "found \"weight\""),
            (
                json!({"weights": [1, 0, 0]}),
                "3 weights, but the adapter has 2 skills: expected 2 or 4",
            ),
            (json!({"weights": [1, -0.5]}), "0 or more, found -0.5"),
            (json!({"weights": [1, 1e300]}), "finite and 0 or more, found inf"),
            (json!({"weights": [1, null]}), "weights: expected a number, found null"),
            (json!({"blend": {"a": 1, "z": 1}}), "task \"z\" is not known; known: a, b, c"),
            (json!({"blend": {"a": 0, "b": 0}}), "must not all be 0"),
            (json!({"blend": {}}), "must not all be 0"),
            (json!({"blend": {"a": 1, "b": -1}}), "share of task 1 must be finite and 0 or more"),
            (json!({"blend": {"a": 1, "0": 1}}), "in the blend twice"),
            (json!({"task": 3}), "task 3 is not known"),
            (json!({"task": []}), "found an array"),
        ] {
            let error = parse(&value).unwrap_err();
            assert!(error.contains(reason), "{value}: {error}");
        }
    }

    #[test]
    fn weights_are_as_the_table_says() {
        let config = PolyConfig { n_tasks: 2, n_skills: 2, n_splits: 2, ..PolyConfig::default() };
        let of_task = |task: u32| -> Cow<'static, [f64]> {
            match task {
                0 => vec![1.0, 0.0, 0.5, 0.5].into(),
                _ => vec![0.0, 1.0, 0.25, 0.75].into(),
            }
        };
        for (mixing, expected) in [
            (Mixing::Task(1), [0.0, 1.0, 0.25, 0.75]),
            (Mixing::Weights(vec![2.0, 0.5]), [2.0, 0.5, 2.0, 0.5]),
            (Mixing::Weights(vec![1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0]),
            (Mixing::Blend(vec![(0, 3.0), (1, 1.0)]), [0.75, 0.25, 0.4375, 0.5625]),
            (Mixing::Average, [0.5, 0.5, 0.375, 0.625]),
            (Mixing::Sum(vec![Mixing::Task(0), Mixing::Average]), [1.5, 0.5, 0.875, 1.125]),
        ] {
            assert_eq!(mixing.weights(&config, &of_task), expected, "{mixing:?}");
        }
    }
}
