//! Between routed and plain LoRA: one mixture of a Poly adapter is a plain LoRA, and plain LoRAs are
//! the skills of a Poly adapter.
//!
//! ```text
//! export   Â[q] = Σ_s w[q,s] A[q,s], the splits one after the other: [d_in, r]; B̂ likewise: [r, d_out]
//!          lora_A = Âᵀ, lora_B = B̂ᵀ, lora_alpha = 1: the same function for any number of splits
//! import   A[q,s] = rows q of lora_Aᵀ of LoRA s, B[q,s] = columns q of lora_Bᵀ · (alpha/r)·R
//! ```
//!
//! R is the largest rank; smaller ones are padded with zeros, and a linear that a LoRA does not adapt
//! has zeros for it. So a task that uses one skill alone computes what that LoRA computes. A mixture
//! of several mixes A and B before they are multiplied, as always in Poly: it is not the sum of the
//! LoRAs' outputs.

use std::{collections::BTreeMap, path::Path};

use super::{
    Adapter, Mixing, Model,
    routing::{ON, Routing},
    targets,
};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::{AdapterFiles, AdapterModule, Bank},
        lora::{LoraConfig, LoraFiles, LoraPair},
        poly_config::{self, PolyConfig, TargetModules},
        tasks::TaskNames,
    },
    kernels::Backend,
};

/// A mixture of an adapter's skills as a plain LoRA. Mixed in f64, rounded once.
///
/// # Panics
/// If [`Mixing::check`] fails.
pub fn mixed(files: &AdapterFiles, mixing: &Mixing) -> (LoraConfig, BTreeMap<String, LoraPair>) {
    let config = &files.config;
    if let Err(error) = mixing.check(config) {
        panic!("{error}");
    }
    let &PolyConfig { r, n_splits, n_skills, .. } = config;
    let pair = |module: &AdapterModule| {
        let of_task = |task| module.mixing_weights(task as usize, config.weighting).into();
        let weights = mixing.weights(config, &of_task);
        let (d_in, d_out) = (module.d_in(), module.d_out());
        let (part_in, part_out) = (d_in / n_splits, d_out / n_splits);
        let mix = |bank: &Bank, q: usize, len: usize, at: usize| {
            let of_skill = |s: usize| f64::from(bank.values[(q * n_skills + s) * len + at]);
            (0..n_skills).map(|s| weights[q * n_skills + s] * of_skill(s)).sum::<f64>() as f32
        };
        let mut a = vec![0.0; r * d_in];
        let mut b = vec![0.0; d_out * r];
        for q in 0..n_splits {
            for k in 0..r {
                for i in 0..part_in {
                    a[k * d_in + q * part_in + i] = mix(&module.lora_a, q, part_in * r, i * r + k);
                }
                for o in 0..part_out {
                    let at = k * part_out + o;
                    b[(q * part_out + o) * r + k] = mix(&module.lora_b, q, part_out * r, at);
                }
            }
        }
        LoraPair { a, b, r, d_in, d_out }
    };
    let pairs = files.modules.iter().map(|(path, module)| (path.clone(), pair(module))).collect();
    (LoraConfig::of_poly(config), pairs)
}

/// How LoRAs become an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Import {
    /// Rows of the router.
    pub n_tasks: usize,
    /// Splits of the feature axis.
    pub n_splits: usize,
    /// Task i's logit for LoRA i, and minus the others'; none: all are 0, the uniform mixture.
    pub one_hot: Option<f32>,
}

/// LoRAs of one base as the skills of an adapter.
///
/// # Errors
/// If a LoRA adapts something that is not a linear of this base, or the sizes do not fit.
pub fn imported<B: Backend>(
    base: &Model<B>,
    loras: &[LoraFiles],
    import: &Import,
) -> Result<(PolyConfig, BTreeMap<String, AdapterModule>)> {
    let &Import { n_tasks, n_splits, one_hot } = import;
    let r = loras.iter().map(LoraFiles::max_rank).max().unwrap_or(1);
    let task_types: Vec<_> = loras.iter().filter_map(|l| l.config.task_type.clone()).collect();
    let paths: std::collections::BTreeSet<&String> =
        loras.iter().flat_map(|lora| lora.modules.keys()).collect();
    let config = PolyConfig {
        task_type: Some(task_types.first().cloned().unwrap_or_else(|| base.task_type().to_owned())),
        base_model_name_or_path: loras
            .iter()
            .find_map(|lora| lora.config.base_model_name_or_path.clone()),
        target_modules: Some(TargetModules::List(paths.iter().map(|&p| p.clone()).collect())),
        r,
        n_tasks,
        n_skills: loras.len(),
        n_splits,
        ..PolyConfig::default()
    };
    config.validate()?;
    // Each by itself first, so that the message names the folder at fault.
    for lora in loras {
        let path = lora.dir.join(poly_config::FILE_NAME);
        let own = PolyConfig {
            target_modules: Some(TargetModules::List(lora.modules.keys().cloned().collect())),
            ..config.clone()
        };
        let (targets, _) = targets::resolve(&own, base.modules(), base.default_targets())
            .map_err(|error| error.in_file(&path))?;
        for (name, pair) in &lora.modules {
            let Some(target) = targets.iter().find(|target| target.path == *name) else {
                return Err(Error::Tensors {
                    path: lora.dir.clone(),
                    detail: format!(
                        "{name} is not a linear of this base; the LoRA is of another base"
                    ),
                });
            };
            let factor = lora.factor(name, r);
            if let Some(b) = pair.b.iter().find(|&&b| !((factor * f64::from(b)) as f32).is_finite())
            {
                return Err(Error::Tensors {
                    path: lora.dir.clone(),
                    detail: format!("{name}: the scale {factor:e} times {b} in B is not finite"),
                });
            }
            if (pair.d_in, pair.d_out) != (target.d_in, target.d_out) {
                return Err(Error::Tensors {
                    path: lora.dir.clone(),
                    detail: format!(
                        "the LoRA of {name} is of a linear {} -> {}, the base's is {} -> {}; it is of another base",
                        pair.d_in, pair.d_out, target.d_in, target.d_out
                    ),
                });
            }
        }
    }
    let (targets, _) = targets::resolve(&config, base.modules(), base.default_targets())?;
    let config = PolyConfig {
        target_modules: Some(targets::named(
            targets.iter().map(|target| &target.path),
            base.modules(),
        )),
        ..config
    };
    let n_skills = loras.len();
    let logit = |task: usize, skill: usize| match one_hot {
        Some(logit) if task == skill => logit,
        Some(logit) => -logit,
        None => 0.0,
    };
    let router_logits: Vec<f32> = (0..n_tasks)
        .flat_map(|task| (0..n_splits * n_skills).map(move |column| (task, column % n_skills)))
        .map(|(task, skill)| logit(task, skill))
        .collect();
    let modules = targets
        .iter()
        .map(|target| {
            let (d_in, d_out) = (target.d_in, target.d_out);
            let (part_in, part_out) = (d_in / n_splits, d_out / n_splits);
            let mut lora_a = Bank {
                shape: [n_splits, n_skills, part_in, r],
                values: vec![0.0; n_skills * d_in * r],
            };
            let mut lora_b = Bank {
                shape: [n_splits, n_skills, r, part_out],
                values: vec![0.0; n_skills * d_out * r],
            };
            for (s, lora) in loras.iter().enumerate() {
                let Some(pair) = lora.modules.get(&target.path) else { continue };
                let factor = lora.factor(&target.path, r);
                for k in 0..pair.r {
                    for i in 0..d_in {
                        let (q, i_in) = (i / part_in, i % part_in);
                        let at = ((q * n_skills + s) * part_in + i_in) * r + k;
                        lora_a.values[at] = pair.a[k * d_in + i];
                    }
                    for o in 0..d_out {
                        let (q, o_in) = (o / part_out, o % part_out);
                        let at = ((q * n_skills + s) * r + k) * part_out + o_in;
                        let value = f64::from(pair.b[o * pair.r + k]);
                        lora_b.values[at] = (factor * value) as f32;
                    }
                }
            }
            let module = AdapterModule { lora_a, lora_b, router_logits: router_logits.clone() };
            (target.path.clone(), module)
        })
        .collect();
    Ok((config, modules))
}

/// A plain LoRA folder as what a folder of an adapter of one skill and one task would have.
///
/// # Errors
/// As [`Adapter::open_lora`].
pub fn lora_as_poly<B: Backend>(base: &Model<B>, dir: impl AsRef<Path>) -> Result<AdapterFiles> {
    let lora = LoraFiles::open(dir)?;
    let import = Import { n_tasks: 1, n_splits: 1, one_hot: Some(ON as f32) };
    let (config, modules) = imported(base, std::slice::from_ref(&lora), &import)?;
    Ok(AdapterFiles { dir: lora.dir, config, modules, tasks: None, ignored: Vec::new() })
}

impl<B: Backend> Adapter<B> {
    /// Loads a plain LoRA folder onto a base, as an adapter of one skill for every task.
    ///
    /// # Errors
    /// As [`Adapter::open`].
    pub fn open_lora(base: &Model<B>, dir: impl AsRef<Path>) -> Result<Self> {
        let files = lora_as_poly(base, dir)?;
        Self::from_files(base, files, Routing { fixed: true, ..Routing::default() })
    }

    /// Loads what there is for inference: a Poly adapter, or a plain LoRA. With it the tasks that
    /// rows may name; a LoRA has none.
    ///
    /// # Errors
    /// As [`Adapter::open`].
    pub fn open_any(base: &Model<B>, dir: impl AsRef<Path>) -> Result<(Self, Option<TaskNames>)> {
        if crate::formats::lora::is_lora(dir.as_ref()) {
            return Ok((Self::open_lora(base, dir)?, None));
        }
        let adapter = Self::open(base, dir)?;
        let tasks = adapter.task_names();
        Ok((adapter, Some(tasks)))
    }
}
