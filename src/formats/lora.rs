//! Adapter folders: PEFT's plain LoRA, read and written.
//!
//! ```text
//! adapter_config.json                     -> config
//! adapter_model.safetensors               -> modules, of each base_model.model.<path>
//!   .lora_A.weight                           a [r, d_in]
//!   .lora_B.weight                           b [d_out, r]
//! ```
//!
//! `y = x·Wᵀ + scale · x·Aᵀ·Bᵀ`, where scale is alpha/r, or alpha/sqrt(r) of a rank-stabilised LoRA; ranks and
//! alphas may differ by module (`rank_pattern`, `alpha_pattern`). What a plain pair of matrices cannot
//! say (DoRA, biases, copies of whole modules, a base that the initialisation changed) is refused by
//! the name of its key.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use regex::Regex;
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    formats::{
        adapter::{FILE_NAME, PREFIX, open_tensors, read_values, shape_error, sort_names},
        fields::Fields,
        json::{self, MAX_CONFIG_BYTES, UniqueObject, excerpt, type_name},
        poly_config::{
            self, MAX_RANK, PEFT_VERSION, PolyConfig, TargetModules, escape_as_python, modules,
        },
        safetensors::{write_atomically, write_safetensors},
    },
};

const LORA_A: &str = ".lora_A.weight";
const LORA_B: &str = ".lora_B.weight";

/// The configuration of a plain LoRA, as far as it says something about the numbers.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// PEFT's wrapper: `SEQ_2_SEQ_LM`, `CAUSAL_LM`, ...
    pub task_type: Option<String>,
    /// The base model's name or folder, for people.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, for people.
    pub revision: Option<String>,
    /// What is adapted.
    pub target_modules: Option<TargetModules>,
    /// What is not adapted although it is a target.
    pub exclude_modules: Option<TargetModules>,
    /// The rank where `rank_pattern` says nothing.
    pub r: usize,
    /// The numerator of the scale where `alpha_pattern` says nothing.
    pub lora_alpha: f64,
    /// Whether the scale is alpha/sqrt(r) instead of alpha/r.
    pub use_rslora: bool,
    /// Ranks of modules whose path a pattern matches; the first that does.
    rank_pattern: Vec<(Regex, f64)>,
    /// The same of alphas.
    alpha_pattern: Vec<(Regex, f64)>,
}

impl LoraConfig {
    /// Of a mixture of a Poly adapter: its rank and targets, and lora_alpha 1, the scale of Poly.
    pub fn of_poly(config: &PolyConfig) -> Self {
        Self {
            task_type: config.task_type.clone(),
            base_model_name_or_path: config.base_model_name_or_path.clone(),
            revision: config.revision.clone(),
            target_modules: config.target_modules.clone(),
            exclude_modules: config.exclude_modules.clone(),
            r: config.r,
            lora_alpha: 1.0,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }

    /// Reads `adapter_config.json` of a LoRA folder.
    pub fn open(lora_dir: &Path) -> Result<Self> {
        let path = lora_dir.join(poly_config::FILE_NAME);
        Self::parse(&json::read_capped(&path, MAX_CONFIG_BYTES)?, &path)
    }

    /// Parses an `adapter_config.json`. `path` is for the messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut fields = Fields::new(json::parse::<UniqueObject>(bytes, path)?.0, path);
        match fields.text("peft_type")? {
            Some(found) if found == "LORA" => {}
            found => {
                let found = found.map_or_else(|| "nothing".to_owned(), |found| excerpt(&found));
                let detail = format!("expected \"LORA\", found {found}");
                return Err(fields.error("peft_type", detail));
            }
        }
        for (key, why) in NOT_PLAIN {
            let is_off = |value: &Value| match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                Value::String(word) => word == "none",
                Value::Bool(true) | Value::Number(_) => false,
            };
            if let Some(value) = fields.take(key)
                && !is_off(&value)
            {
                let found = excerpt(&value.to_string());
                let detail = format!("{found} {why}, which a plain LoRA cannot say: not supported");
                return Err(fields.error(key, detail));
            }
        }
        match fields.take_value("init_lora_weights") {
            Some(Value::String(word))
                if !matches!(
                    word.as_str(),
                    "gaussian" | "eva" | "orthogonal" | "true" | "false"
                ) =>
            {
                let detail = format!(
                    "{} changes the base's weights, so the adapter is not of the base alone; save it with \
                    path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
                    excerpt(&word)
                );
                return Err(fields.error("init_lora_weights", detail));
            }
            None | Some(Value::Bool(_) | Value::String(_)) => {}
            Some(other) => {
                return Err(fields.wrong_type(
                    "init_lora_weights",
                    "true, false or a name",
                    &other,
                ));
            }
        }
        let config = Self {
            task_type: fields.text("task_type")?,
            base_model_name_or_path: fields.text("base_model_name_or_path")?,
            revision: fields.text("revision")?,
            target_modules: modules(&mut fields, "target_modules")?,
            exclude_modules: modules(&mut fields, "exclude_modules")?,
            r: fields.size(&["r"], 8, MAX_RANK)?,
            lora_alpha: alpha(&mut fields)?,
            use_rslora: fields.boolean("use_rslora")?.unwrap_or(false),
            rank_pattern: patterns(&mut fields, "rank_pattern")?,
            alpha_pattern: patterns(&mut fields, "alpha_pattern")?,
        };
        // What says nothing about the numbers: the tensors show which layers are adapted.
        for key in UNUSED {
            fields.take(key);
        }
        for (key, value) in fields.unread() {
            if !value.is_null() {
                tracing::warn!(
                    "{}: key {} is not known and was ignored",
                    path.display(),
                    excerpt(key)
                );
            }
        }
        Ok(config)
    }

    /// The rank that a module has.
    fn rank(&self, module: &str) -> f64 {
        first_match(&self.rank_pattern, module).unwrap_or(self.r as f64)
    }

    /// What a module's product of rank `r` is multiplied with, times `r_out / r_out`: the factor for
    /// which `factor / r_out · A·B` is the module's delta.
    fn factor(&self, module: &str, r: usize, r_out: usize) -> f64 {
        let alpha = first_match(&self.alpha_pattern, module).unwrap_or(self.lora_alpha);
        let divisor = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        // Multiplied first: exact where the ranks are the same.
        alpha * r_out as f64 / divisor
    }

    /// The file's content, as PEFT 0.21.2 writes it, of a LoRA without patterns.
    fn to_json(&self) -> String {
        let modules = |modules: &Option<TargetModules>| match modules {
            None => Value::Null,
            Some(TargetModules::Pattern(pattern)) => pattern.clone().into(),
            Some(TargetModules::List(list)) => list.iter().cloned().collect(),
        };
        let alpha = if self.lora_alpha.fract() == 0.0 {
            Value::from(self.lora_alpha as i64)
        } else {
            Value::from(self.lora_alpha)
        };
        let mut fields = serde_json::json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": {},
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": modules(&self.exclude_modules),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": alpha,
            "lora_bias": false,
            "lora_dropout": 0.0,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": {},
            "revision": self.revision,
            "target_modules": modules(&self.target_modules),
            "target_parameters": null,
            "task_type": self.task_type,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": false,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
            "velora_config": null,
        });
        fields.sort_all_objects();
        escape_as_python(&format!("{fields:#}"))
    }
}

/// Keys that must be off, and what they are when they are not.
const NOT_PLAIN: [(&str, &str); 16] = [
    ("use_dora", "is DoRA"),
    ("bias", "trains biases"),
    ("lora_bias", "has a bias"),
    ("modules_to_save", "has copies of whole modules"),
    ("trainable_token_indices", "trains embeddings"),
    ("target_parameters", "adapts parameters that are not linears"),
    ("layer_replication", "repeats layers of the base"),
    ("alora_invocation_tokens", "is switched on by tokens"),
    ("arrow_config", "routes by tokens"),
    ("use_qalora", "groups the input"),
    ("kasa_config", "changes the product"),
    ("monteclora_config", "changes the product"),
    ("velora_config", "changes the product"),
    ("use_bdlora", "has blocks"),
    ("megatron_config", "is of a divided base"),
    ("loftq_config", "is of a quantised base"),
];

const UNUSED: [&str; 15] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "base_model_class",
];

fn alpha(fields: &mut Fields) -> Result<f64> {
    match fields.number("lora_alpha")? {
        None => Ok(8.0),
        Some(alpha) if alpha.is_finite() => Ok(alpha),
        Some(alpha) => Err(fields.error("lora_alpha", format!("{alpha} is not finite"))),
    }
}

/// Patterns that match the end of a path, as PEFT applies them, with their numbers.
fn patterns(fields: &mut Fields, key: &str) -> Result<Vec<(Regex, f64)>> {
    const MAX_PATTERNS: usize = 4096;
    let entries: Map<String, Value> = match fields.take_value(key) {
        None => Map::new(),
        Some(Value::Object(entries)) if entries.len() <= MAX_PATTERNS => entries,
        Some(Value::Object(_)) => {
            return Err(fields.error(key, format!("more than {MAX_PATTERNS} entries")));
        }
        Some(other) => return Err(fields.wrong_type(key, "an object", &other)),
    };
    entries
        .iter()
        .map(|(pattern, value)| {
            let number = value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| {
                let found = type_name(value);
                fields.error(
                    key,
                    format!("expected a number for {}, found {found}", excerpt(pattern)),
                )
            })?;
            // By itself first: ")|(" must not become a pattern by what is put around it.
            let compile = |text: &str| regex::RegexBuilder::new(text).size_limit(1 << 20).build();
            let compiled = compile(pattern)
                .and_then(|_| compile(&format!(r"\A(?:.*\.)?(?:{pattern})\z")))
                .map_err(|_| fields.error(key, format!("{} is not a pattern", excerpt(pattern))))?;
            Ok((compiled, number))
        })
        .collect()
}

fn first_match(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|&(_, number)| number)
}

/// The LoRA of one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// `[r, d_in]`
    pub a: Vec<f32>,
    /// `[d_out, r]`
    pub b: Vec<f32>,
    /// The rank.
    pub r: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
}

impl LoraPair {
    /// The pair whose product is this one's transposed.
    pub fn transposed(&self) -> Self {
        let Self { ref a, ref b, r, d_in, d_out } = *self;
        let turned = |from: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..cols).flat_map(|c| (0..rows).map(move |row| from[row * cols + c])).collect()
        };
        Self { a: turned(b, d_out, r), b: turned(a, r, d_in), r, d_in: d_out, d_out: d_in }
    }
}

/// A LoRA folder's content.
#[derive(Clone, Debug)]
pub struct LoraFiles {
    /// The folder.
    pub dir: PathBuf,
    /// `adapter_config.json`
    pub config: LoraConfig,
    /// The adapted linears, by their path in the base model.
    pub modules: BTreeMap<String, LoraPair>,
}

impl LoraFiles {
    /// Reads and checks a LoRA folder.
    pub fn open(lora_dir: impl AsRef<Path>) -> Result<Self> {
        let dir = lora_dir.as_ref().to_path_buf();
        let config = LoraConfig::open(&dir)?;
        let file = open_tensors(&dir)?;
        let (paths, _) = sort_names(&file, PREFIX, &[LORA_A, LORA_B])?;
        let mut modules = BTreeMap::new();
        for path in paths {
            let (names, rank) =
                ([LORA_A, LORA_B].map(|end| format!("{PREFIX}{path}{end}")), config.rank(path));
            let (a_shape, a) = read_values(&file, &names[0])?;
            let (b_shape, b) = read_values(&file, &names[1])?;
            let wanted = rank as usize;
            let (&[r, d_in], &[d_out, r_out]) = (a_shape, b_shape) else {
                return Err(shape_error(&file, &names[0], &[wanted, 0], a_shape));
            };
            if wanted as f64 != rank || wanted == 0 || r != wanted || d_in == 0 {
                return Err(shape_error(&file, &names[0], &[wanted, d_in.max(1)], a_shape));
            }
            if r_out != wanted || d_out == 0 {
                return Err(shape_error(&file, &names[1], &[d_out.max(1), wanted], b_shape));
            }
            modules.insert(path.to_owned(), LoraPair { a, b, r, d_in, d_out });
        }
        if modules.is_empty() {
            let path = dir.join(FILE_NAME);
            return Err(Error::Tensors { path, detail: "the file has no LoRA tensor".to_owned() });
        }
        Ok(Self { dir, config, modules })
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.modules.values().map(|pair| pair.r).max().unwrap_or(1)
    }

    /// The factor for which `factor / r_out · Aᵀ·Bᵀ` is what a module adds.
    pub fn factor(&self, module: &str, r_out: usize) -> f64 {
        self.modules.get(module).map_or(0.0, |pair| self.config.factor(module, pair.r, r_out))
    }
}

/// Whether a folder's adapter is a plain LoRA; false too where there is none or it cannot be read.
pub fn is_lora(adapter_dir: &Path) -> bool {
    let path = adapter_dir.join(poly_config::FILE_NAME);
    json::read_json::<UniqueObject>(&path, MAX_CONFIG_BYTES).is_ok_and(|UniqueObject(fields)| {
        fields.get("peft_type").is_some_and(|kind| kind == "LORA")
    })
}

/// Writes a LoRA folder that PEFT reads, creating it if need be; `adapter_config.json` last.
///
/// # Panics
/// If a pair has another rank than the configuration, or as many values as its shape says not.
pub fn save_lora(
    lora_dir: &Path,
    config: &LoraConfig,
    modules: &BTreeMap<String, LoraPair>,
) -> Result<()> {
    let mut tensors: Vec<(String, [usize; 2], &[f32])> = Vec::new();
    for (module, LoraPair { a, b, r, d_in, d_out }) in modules {
        assert_eq!(*r, config.r, "the rank of {module}");
        tensors.push((format!("{PREFIX}{module}{LORA_A}"), [*r, *d_in], a));
        tensors.push((format!("{PREFIX}{module}{LORA_B}"), [*d_out, *r], b));
    }
    for (name, _, values) in &tensors {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite(format!(
                "tensor {name} has the value {value}; nothing was written"
            )));
        }
    }
    let tensors: Vec<(&str, &[usize], &[f32])> =
        tensors.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], *values)).collect();
    fs::create_dir_all(lora_dir).map_err(Error::io("create", lora_dir))?;
    write_safetensors(&lora_dir.join(FILE_NAME), &tensors)?;
    let json = config.to_json();
    write_atomically(&lora_dir.join(poly_config::FILE_NAME), |file| {
        std::io::Write::write_all(file, json.as_bytes())
    })
}
