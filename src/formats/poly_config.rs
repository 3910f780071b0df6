//! `adapter_config.json` of a Poly adapter, as PEFT 0.21.2 reads and writes it.
//!
//! ```text
//! {"peft_type": "POLY", "r": 8, "n_tasks": 4, "n_skills": 2, ...}  <->  PolyConfig
//! ```
//!
//! Read as PEFT reads it: only `peft_type` must be there, absent keys have PEFT's defaults, unknown
//! ones are warned about. Written byte for byte as PEFT writes it, except that lists which are sets in
//! PEFT are sorted (PEFT's order depends on the hash seed). Fields that say nothing about the numbers
//! (`auto_mapping`, `revision`, `base_model_name_or_path`) come through reading and writing.
//!
//! `poly_type` is PEFT's word for the variant of Poly, and it knows `poly` alone. What it cannot compute is
//! written there (`poly+straight_through`, `poly+average_correction`), so that it refuses such an adapter
//! instead of computing something else.
//!
//! Stricter than PEFT where PEFT fails late or computes something else: [`PolyConfig::validate`]
//! bounds the counts and their product, so that sizes derived from them do not overflow.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    formats::{
        fields::Fields,
        json::{self, MAX_CONFIG_BYTES, UniqueObject, excerpt, type_name},
    },
    weighting::Weighting,
};

/// The name of the file in an adapter folder.
pub const FILE_NAME: &str = "adapter_config.json";
/// The PEFT version whose format this is.
pub const PEFT_VERSION: &str = "0.21.2";
/// The largest rank.
pub const MAX_RANK: usize = 1024;
/// The most skills.
pub const MAX_SKILLS: usize = 1024;
/// The most splits.
pub const MAX_SPLITS: usize = 1024;
/// The most tasks.
pub const MAX_TASKS: usize = 1 << 20;
/// The most router logits of a layer: n_tasks · n_splits · n_skills.
pub const MAX_LOGITS: usize = 1 << 26;
/// The most entries of a list of modules.
const MAX_MODULE_NAMES: usize = 4096;
/// The most bytes of an entry.
const MAX_MODULE_NAME_BYTES: usize = 256;
/// The most bytes of a pattern.
const MAX_PATTERN_BYTES: usize = 1024;

const TASK_TYPES: [&str; 6] =
    ["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];

/// Which linears are adapted (or are not, as `exclude_modules`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Paths, or their last components.
    List(BTreeSet<String>),
    /// A regular expression that matches the whole path, or the word `all-linear`.
    Pattern(String),
}

/// The configuration of a Poly adapter. [`Default`] is PEFT's.
#[derive(Clone, Debug, PartialEq)]
pub struct PolyConfig {
    /// PEFT's wrapper: `SEQ_2_SEQ_LM`, `CAUSAL_LM`, ... PEFT needs it to pass task ids on.
    pub task_type: Option<String>,
    /// The base model's name or folder, for people.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, for people.
    pub revision: Option<String>,
    /// The base model's Python class, which PEFT writes when there is no `task_type`.
    pub auto_mapping: Option<Map<String, Value>>,
    /// What is adapted; `None` is the default of the base's architecture.
    pub target_modules: Option<TargetModules>,
    /// What is not adapted although it is a target.
    pub exclude_modules: Option<TargetModules>,
    /// Whether B begins as zeros, so that a fresh adapter changes nothing. A begins random always.
    pub init_weights: bool,
    /// The rank of a skill.
    pub r: usize,
    /// Rows of the router.
    pub n_tasks: usize,
    /// LoRA pairs in the shared bank.
    pub n_skills: usize,
    /// Slices of the feature axis with their own mixture.
    pub n_splits: usize,
    /// How samples become mixing weights.
    pub weighting: Weighting,
}

impl Default for PolyConfig {
    fn default() -> Self {
        Self {
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            auto_mapping: None,
            target_modules: None,
            exclude_modules: None,
            init_weights: true,
            r: 8,
            n_tasks: 1,
            n_skills: 4,
            n_splits: 1,
            weighting: Weighting::default(),
        }
    }
}

impl PolyConfig {
    /// Reads `adapter_config.json` of an adapter folder.
    pub fn open(adapter_dir: impl AsRef<Path>) -> Result<Self> {
        let path = adapter_dir.as_ref().join(FILE_NAME);
        Self::parse(&json::read_capped(&path, MAX_CONFIG_BYTES)?, &path)
    }

    /// Parses an `adapter_config.json`. `path` is for the messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut fields = Fields::new(json::parse::<UniqueObject>(bytes, path)?.0, path);
        match fields.text("peft_type")? {
            Some(found) if found == "POLY" => {}
            Some(found) => {
                let found = excerpt(&found);
                return Err(fields.error(
                    "peft_type",
                    format!(
                        "expected \"POLY\", found {found}; other adapters are not read here (LoRA \
                        folders become Poly adapters with `polytape import`)"
                    ),
                ));
            }
            None => {
                return Err(fields.error("peft_type", "missing: not an adapter's configuration"));
            }
        }
        let weighting = match fields.text("poly_type")? {
            None => Weighting::default(),
            Some(found) => parse_poly_type(&found).ok_or_else(|| {
                let found = excerpt(&found);
                fields.error("poly_type", format!("expected \"poly\", found {found}"))
            })?,
        };
        if let Some(found) = fields.take_value("modules_to_save") {
            let found = excerpt(&found.to_string());
            return Err(fields.error(
                "modules_to_save",
                format!(
                    "{found} asks for trained copies of whole modules, which are not supported: \
                    expected null; train the adapter without them"
                ),
            ));
        }
        let default = Self::default();
        let config = Self {
            task_type: fields.text("task_type")?,
            base_model_name_or_path: fields.text("base_model_name_or_path")?,
            revision: fields.text("revision")?,
            auto_mapping: match fields.take_value("auto_mapping") {
                None => None,
                Some(Value::Object(map)) => Some(map),
                Some(found) => return Err(fields.wrong_type("auto_mapping", "an object", &found)),
            },
            target_modules: modules(&mut fields, "target_modules")?,
            exclude_modules: modules(&mut fields, "exclude_modules")?,
            init_weights: init_weights(&mut fields)?.unwrap_or(default.init_weights),
            r: fields.size(&["r"], default.r, MAX_RANK)?,
            n_tasks: fields.size(&["n_tasks"], default.n_tasks, MAX_TASKS)?,
            n_skills: fields.size(&["n_skills"], default.n_skills, MAX_SKILLS)?,
            n_splits: fields.size(&["n_splits"], default.n_splits, MAX_SPLITS)?,
            weighting,
        };
        // Constants of the format, and what PEFT drops itself.
        for key in ["inference_mode", "peft_version", "runtime_config"] {
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
        config.check().map_err(|detail| Error::file(path, detail))?;
        Ok(config)
    }

    /// Checks the ranges of values that did not come from a file.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(Error::Config)
    }

    fn check(&self) -> Result<(), String> {
        for (name, value, max) in [
            ("r", self.r, MAX_RANK),
            ("n_tasks", self.n_tasks, MAX_TASKS),
            ("n_skills", self.n_skills, MAX_SKILLS),
            ("n_splits", self.n_splits, MAX_SPLITS),
        ] {
            if !(1..=max).contains(&value) {
                return Err(format!("{name} must be from 1 to {max}, not {value}"));
            }
        }
        // At most 2^40, so the product does not overflow.
        let n_logits = self.n_tasks * self.n_splits * self.n_skills;
        if n_logits > MAX_LOGITS {
            return Err(format!(
                "n_tasks {} x n_splits {} x n_skills {} is {n_logits} router logits a layer; at \
                most {MAX_LOGITS} are supported",
                self.n_tasks, self.n_splits, self.n_skills
            ));
        }
        if let Some(task_type) = &self.task_type
            && !TASK_TYPES.contains(&task_type.as_str())
        {
            return Err(format!(
                "task_type {} is none of {}",
                excerpt(task_type),
                TASK_TYPES.join(", ")
            ));
        }
        let lists =
            [("target_modules", &self.target_modules), ("exclude_modules", &self.exclude_modules)];
        for (name, modules) in lists {
            match modules {
                Some(TargetModules::Pattern(pattern)) if pattern.len() > MAX_PATTERN_BYTES => {
                    return Err(format!(
                        "{name} is a pattern of {} bytes; at most {MAX_PATTERN_BYTES} are \
                        supported",
                        pattern.len()
                    ));
                }
                Some(TargetModules::List(list)) if list.len() > MAX_MODULE_NAMES => {
                    return Err(format!(
                        "{name} has {} entries; at most {MAX_MODULE_NAMES} are supported",
                        list.len()
                    ));
                }
                Some(TargetModules::List(list)) => {
                    if let Some(long) =
                        list.iter().find(|entry| entry.len() > MAX_MODULE_NAME_BYTES)
                    {
                        return Err(format!(
                            "{name} has the entry {} of {} bytes; at most \
                            {MAX_MODULE_NAME_BYTES} are supported",
                            excerpt(long),
                            long.len()
                        ));
                    }
                }
                _ => {}
            }
        }
        if matches!(&self.target_modules, Some(TargetModules::List(list)) if list.is_empty()) {
            return Err("target_modules is an empty list, so nothing would be adapted".to_owned());
        }
        Ok(())
    }

    /// The file's content, as PEFT writes it: Python's `json.dumps(..., indent=2, sort_keys=True)` of
    /// 16 keys, without a final newline.
    pub fn to_json(&self) -> String {
        let modules = |modules: &Option<TargetModules>| match modules {
            None => Value::Null,
            Some(TargetModules::Pattern(pattern)) => pattern.clone().into(),
            Some(TargetModules::List(list)) => list.iter().cloned().collect(),
        };
        let mut fields = serde_json::json!({
            "auto_mapping": self.auto_mapping,
            "base_model_name_or_path": self.base_model_name_or_path,
            "exclude_modules": modules(&self.exclude_modules),
            "inference_mode": true,
            "init_weights": self.init_weights,
            "modules_to_save": null,
            "n_skills": self.n_skills,
            "n_splits": self.n_splits,
            "n_tasks": self.n_tasks,
            "peft_type": "POLY",
            "peft_version": PEFT_VERSION,
            "poly_type": poly_type(self.weighting),
            "r": self.r,
            "revision": self.revision,
            "target_modules": modules(&self.target_modules),
            "task_type": self.task_type,
        });
        fields.sort_all_objects(); // What `auto_mapping` holds, too.
        escape_as_python(&format!("{fields:#}"))
    }
}

const STRAIGHT_THROUGH: &str = "+straight_through";
const AVERAGE_CORRECTION: &str = "+average_correction";

fn poly_type(weighting: Weighting) -> String {
    let Weighting { straight_through, average_correction } = weighting;
    let word = |is_on, word| if is_on { word } else { "" };
    let first = word(straight_through, STRAIGHT_THROUGH);
    format!("poly{first}{}", word(average_correction, AVERAGE_CORRECTION))
}

fn parse_poly_type(text: &str) -> Option<Weighting> {
    let text = text.strip_prefix("poly")?;
    let (straight_through, text) = match text.strip_prefix(STRAIGHT_THROUGH) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let average_correction = text == AVERAGE_CORRECTION;
    (text.is_empty() || average_correction)
        .then_some(Weighting { straight_through, average_correction })
}

/// A list of paths, or a pattern.
pub(super) fn modules(fields: &mut Fields, key: &str) -> Result<Option<TargetModules>> {
    let expected = "a list of strings or a string";
    Ok(match fields.take_value(key) {
        None => None,
        Some(Value::String(pattern)) => Some(TargetModules::Pattern(pattern)),
        Some(Value::Array(entries)) => {
            let mut list = BTreeSet::new();
            for entry in entries {
                match entry {
                    Value::String(entry) => list.insert(entry),
                    other => {
                        let found =
                            format!("expected {expected}, found {} in it", type_name(&other));
                        return Err(fields.error(key, found));
                    }
                };
            }
            Some(TargetModules::List(list))
        }
        Some(other) => return Err(fields.wrong_type(key, expected, &other)),
    })
}

/// PEFT asks whether it is true in Python's sense: LoRA's "gaussian" means true here.
fn init_weights(fields: &mut Fields) -> Result<Option<bool>> {
    let key = "init_weights";
    Ok(match fields.take_value(key) {
        None => None,
        Some(Value::Bool(value)) => Some(value),
        Some(Value::String(text)) => Some(!text.is_empty()),
        Some(other) => return Err(fields.wrong_type(key, "true or false", &other)),
    })
}

/// Python's `json` writes ASCII only. Outside strings there is nothing else, so escapes go anywhere.
pub(super) fn escape_as_python(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c <= '~' {
            text.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            text += &format!("\\u{unit:04x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<PolyConfig> {
        PolyConfig::parse(json.as_bytes(), Path::new("adapter_config.json"))
    }

    #[test]
    fn the_file_is_what_peft_writes() {
        let list = |names: &[&str]| {
            Some(TargetModules::List(names.iter().map(|&name| name.to_owned()).collect()))
        };
        let config = PolyConfig {
            task_type: Some("SEQ_2_SEQ_LM".to_owned()),
            base_model_name_or_path: Some("models/é🙂\u{7f}".to_owned()),
            target_modules: list(&["v", "q"]),
            n_tasks: 8,
            n_splits: 2,
            ..PolyConfig::default()
        };
        // From python: json.dumps(PolyConfig(...).to_dict(), indent=2, sort_keys=True).
        let expected = r#"{
  "auto_mapping": null,
  "base_model_name_or_path": "models/\u00e9\ud83d\ude42\u007f",
  "exclude_modules": null,
  "inference_mode": true,
  "init_weights": true,
  "modules_to_save": null,
  "n_skills": 4,
  "n_splits": 2,
  "n_tasks": 8,
  "peft_type": "POLY",
  "peft_version": "0.21.2",
  "poly_type": "poly",
  "r": 8,
  "revision": null,
  "target_modules": [
    "q",
    "v"
  ],
  "task_type": "SEQ_2_SEQ_LM"
}"#;
        assert_eq!(config.to_json(), expected);
        assert_eq!(parse(expected).unwrap(), config);
    }

    #[test]
    fn reading_follows_peft() {
        assert_eq!(parse(r#"{"peft_type":"POLY"}"#).unwrap(), PolyConfig::default());
        let config = parse(
            r#"{"peft_type":"POLY","n_tasks":3,"r":2,"target_modules":".*\\.q","revision":"main","auto_mapping":{"parent_library":"b","base_model_class":"a"},"runtime_config":{"x":1},"new_key":7,"modules_to_save":null}"#,
        )
        .unwrap();
        assert_eq!((config.n_tasks, config.r), (3, 2));
        assert_eq!(config.target_modules, Some(TargetModules::Pattern(".*\\.q".to_owned())));
        let json = config.to_json();
        assert_eq!(parse(&json).unwrap(), config);
        assert!(json.contains("\"revision\": \"main\""));
        let (class, library) = (json.find("base_model_class"), json.find("parent_library"));
        assert!(class < library, "keys inside are sorted, too");
    }

    #[test]
    fn what_peft_cannot_compute_is_a_type_that_it_refuses() {
        for (poly_type, straight_through, average_correction) in [
            ("poly", false, false),
            ("poly+straight_through", true, false),
            ("poly+average_correction", false, true),
            ("poly+straight_through+average_correction", true, true),
        ] {
            let weighting = Weighting { straight_through, average_correction };
            let json = PolyConfig { weighting, ..PolyConfig::default() }.to_json();
            assert!(json.contains(&format!("\"poly_type\": \"{poly_type}\"")), "{json}");
            assert_eq!(parse(&json).unwrap().weighting, weighting);
        }
        let twice = "poly+average_correction+average_correction";
        for unknown in ["", "Poly", "poly+", "poly+straight_through+", twice] {
            let json = format!(r#"{{"peft_type":"POLY","poly_type":"{unknown}"}}"#);
            let error = parse(&json).unwrap_err().to_string();
            assert!(error.contains("poly_type: expected \"poly\""), "{error}");
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let cases = [
            (r#"{}"#, "field peft_type: missing"),
            (r#"{"peft_type":"LORA"}"#, "expected \"POLY\", found \"LORA\""),
            (
                r#"{"peft_type":"POLY","poly_type":"mhr"}"#,
                "field poly_type: expected \"poly\", found \"mhr\"",
            ),
            (r#"{"peft_type":"POLY","modules_to_save":["classifier"]}"#, "field modules_to_save"),
            (
                r#"{"peft_type":"POLY","r":0}"#,
                "field r: expected an integer from 1 to 1024, found 0",
            ),
            (r#"{"peft_type":"POLY","r":-8}"#, "found -8"),
            (r#"{"peft_type":"POLY","r":"8"}"#, "found a string"),
            (r#"{"peft_type":"POLY","n_tasks":0}"#, "field n_tasks"),
            (r#"{"peft_type":"POLY","n_skills":0}"#, "field n_skills"),
            (r#"{"peft_type":"POLY","n_splits":0}"#, "field n_splits"),
            (
                r#"{"peft_type":"POLY","n_tasks":1048576,"n_splits":1024,"n_skills":1024}"#,
                "1099511627776 router logits a layer",
            ),
            (r#"{"peft_type":"POLY","task_type":"SEQ2SEQ"}"#, "\"SEQ2SEQ\" is none of SEQ_CLS"),
            (r#"{"peft_type":"POLY","target_modules":[]}"#, "empty list"),
            (r#"{"peft_type":"POLY","target_modules":["q",1]}"#, "found a number in it"),
            (r#"{"peft_type":"POLY","target_modules":{"q":1}}"#, "found an object"),
            (r#"{"peft_type":"POLY","peft_type":"POLY"}"#, "comes twice"),
            (r#"[]"#, "expected an object"),
            ("{", "EOF"),
        ];
        for (json, reason) in cases {
            let error = parse(json).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(
                error.starts_with("adapter_config.json: ") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }
        let long = format!(r#"{{"peft_type":"POLY","target_modules":"{}"}}"#, "a".repeat(1025));
        assert!(parse(&long).unwrap_err().to_string().contains("pattern of 1025 bytes"));
        let error = PolyConfig { r: 0, ..PolyConfig::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "r must be from 1 to 1024, not 0");
    }
}
