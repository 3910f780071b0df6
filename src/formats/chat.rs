//! Chat templates: a conversation to the text that a model was trained on.
//!
//! ```text
//! [{"role": "user", "content": "Hi"}] -> "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
//! ```
//!
//! The template is Jinja: `chat_template.jinja` of the model folder, else `chat_template` in
//! `tokenizer_config.json` (of several, the one named `default`). It is rendered as transformers
//! renders it: blocks trimmed, Python's methods of strings and dicts, `raise_exception`, `tojson` as
//! `json.dumps`. `strftime_now` is not there, so that a text does not depend on the day; templates that
//! ask for it usually have a date for that case.
//!
//! A template is a program of the model folder's. It gets a budget of work and memory
//! (`FUEL`), reads no files, and fails with an error.

use std::path::{Path, PathBuf};

use minijinja::{
    Environment, ErrorKind, UndefinedBehavior,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Result},
    formats::{
        json::{MAX_CONFIG_BYTES, UniqueObject, read_capped, read_json},
        tokenizer::{SPECIAL, named_token},
    },
};

const FILE_NAME: &str = "chat_template.jinja";
const CONFIG_FILE_NAME: &str = "tokenizer_config.json";

/// What one rendering may cost: about so many steps, or 64 times as many bytes.
const FUEL: u64 = 4 << 20;

/// The most bytes of a template.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// A model folder's chat template.
pub struct ChatTemplate {
    /// The file it is from.
    path: PathBuf,
    environment: Environment<'static>,
    source: String,
    /// The one for rows with tools, where the folder has one of its own.
    with_tools: Option<String>,
    tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// The template of a model folder, if it has one.
    ///
    /// # Errors
    /// If it cannot be read or parsed.
    pub fn open(model_dir: &Path) -> Result<Option<Self>> {
        let config_path = model_dir.join(CONFIG_FILE_NAME);
        let config = match config_path.exists() {
            true => read_json::<UniqueObject>(&config_path, MAX_CONFIG_BYTES)?.0,
            false => Map::new(),
        };
        let file = model_dir.join(FILE_NAME);
        let (path, source, with_tools) = if file.exists() {
            let bytes = read_capped(&file, MAX_TEMPLATE_BYTES)?;
            let source = String::from_utf8(bytes).map_err(|_| Error::file(&file, "not UTF-8"))?;
            (file, source, None)
        } else {
            match of_config(&config, "default") {
                Ok(Some(source)) => {
                    // Without it, or where there is one template for all, the default is for tools, too.
                    let with_tools = of_config(&config, "tool_use").unwrap_or_default();
                    (config_path, source, with_tools)
                }
                Ok(None) => return Ok(None),
                Err(detail) => return Err(Error::file(&config_path, detail)),
            }
        };
        let mut tokens = Map::new();
        let extra = config.get("extra_special_tokens").and_then(Value::as_object);
        let extra = extra.into_iter().flat_map(|of| of.keys().map(move |name| (of, name.as_str())));
        for (of, name) in SPECIAL.iter().map(|&name| (&config, name)).chain(extra) {
            if let Some(token) = named_token(of, name) {
                tokens.insert(name.to_owned(), Value::from(token));
            }
        }
        let source = without_generation_marks(&source);
        let with_tools = with_tools.as_deref().map(without_generation_marks);
        let environment = environment();
        for source in [Some(&source), with_tools.as_ref()].into_iter().flatten() {
            if let Err(error) = environment.template_from_str(source) {
                return Err(Error::file(path, format!("chat template: {}", described(&error))));
            }
        }
        Ok(Some(Self { path, environment, source, with_tools, tokens }))
    }

    /// A conversation as text; with `prompt` also what an answer begins with. `tools` is what the row
    /// says of tools, or null.
    ///
    /// # Errors
    /// If the template refuses the conversation or is wrong itself: what it says.
    pub fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        prompt: bool,
    ) -> Result<String, String> {
        let mut context = self.tokens.clone();
        context.extend([
            ("messages".to_owned(), json!(messages)),
            ("tools".to_owned(), tools.clone()),
            ("add_generation_prompt".to_owned(), json!(prompt)),
        ]);
        let source = match (&self.with_tools, tools) {
            (None, _) | (_, Value::Null) => &self.source,
            (Some(source), _) => source,
        };
        let template = self.environment.template_from_str(source);
        template
            .and_then(|template| template.render(Serde(context)))
            .map_err(|error| format!("{}: {}", self.path.display(), described(&error)))
    }
}

/// The template in `tokenizer_config.json`: one, or that of a name in a list.
fn of_config(config: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => {
            let is_named = |item: &&Value| item.get("name") == Some(&json!(name));
            let source =
                named.iter().find(is_named).and_then(|item| item.get("template")?.as_str());
            source.map(|source| Some(source.to_owned())).ok_or_else(|| {
                format!("field chat_template: none of its templates is named {name}")
            })
        }
        Some(_) => Err("field chat_template: expected a string or a list".to_owned()),
    }
}

/// `{% generation %}` marks for transformers what the assistant says; it renders to what is in it.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, block) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = block.find("%}") else {
            rest = block;
            break;
        };
        let (block, after) = block.split_at(end);
        let word = block.trim_start_matches(['{', '%', '-', '+']).trim_end_matches('-').trim();
        let same = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&same.map_or_else(|| block.to_owned(), |same| block.replacen(word, same, 1)));
        rest = after;
    }
    out.push_str(rest);
    out
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn tojson(value: Serde<Value>, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    // Python's defaults, which templates repeat at most.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(n) => {
            let indent = b" ".repeat(n.min(64));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.0.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.0.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)),
    };
    let fail = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| fail(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| fail(error.to_string()))
}

/// Python's separators: a space after commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// What is wrong, and on which line of the template.
fn described(error: &minijinja::Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    match error.detail() {
        Some(detail) => format!("{line}{detail}"),
        None => format!("{line}{}", error.kind()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model folder with these files.
    fn folder(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("polytape-chat-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (file, text) in files {
            std::fs::write(dir.join(file), text).unwrap();
        }
        dir
    }

    #[test]
    fn texts_are_those_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat.json");
        let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let config = recorded["tokens"].to_string();
        let mut n = 0;
        for (name, template) in recorded["templates"].as_object().unwrap() {
            let template = template.as_str().unwrap();
            let dir = folder(name, &[(FILE_NAME, template), (CONFIG_FILE_NAME, &config)]);
            let chat = ChatTemplate::open(&dir).unwrap().unwrap();
            for case in recorded["cases"].as_array().unwrap() {
                if case["template"] != *name {
                    continue;
                }
                let messages = case["messages"].as_array().unwrap();
                let prompt = case["prompt"].as_bool().unwrap();
                let text = chat.render(messages, &case["tools"], prompt);
                match case["error"].as_str() {
                    None => {
                        assert_eq!(text.as_deref(), Ok(case["text"].as_str().unwrap()), "{case}")
                    }
                    Some(error) => assert!(text.is_err(), "{case}: {text:?} instead of {error}"),
                }
                n += 1;
            }
            std::fs::remove_dir_all(dir).unwrap();
        }
        assert_eq!(n, recorded["cases"].as_array().unwrap().len());
    }

    #[test]
    fn a_template_comes_from_either_file() {
        let named = r#"{"eos_token": {"content": "</s>"}, "chat_template": [{"name": "rag", "template": "no"},
            {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}]}"#;
        let dir = folder("either", &[(CONFIG_FILE_NAME, named)]);
        let messages = [json!({"role": "user", "content": "hi"})];
        let render =
            || ChatTemplate::open(&dir).unwrap().unwrap().render(&messages, &Value::Null, true);
        assert_eq!(render().unwrap(), "hi</s>");
        std::fs::write(dir.join(FILE_NAME), "of the file").unwrap();
        assert_eq!(render().unwrap(), "of the file");
        std::fs::remove_file(dir.join(FILE_NAME)).unwrap();
        std::fs::write(dir.join(CONFIG_FILE_NAME), "{}").unwrap();
        assert!(ChatTemplate::open(&dir).unwrap().is_none());
        std::fs::write(dir.join(CONFIG_FILE_NAME), r#"{"chat_template": 3}"#).unwrap();
        let error = ChatTemplate::open(&dir).err().unwrap().to_string();
        assert!(error.contains("field chat_template: expected a string or a list"), "{error}");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn bad_templates_end_with_an_error() {
        for (name, template, expected) in [
            ("syntax", "a\n{% for %}", "line 2: "),
            ("unknown", "{{ messages[0].content.nothing() }}", "line 1: "),
            ("refuses", "{{ raise_exception('only one turn') }}", "only one turn"),
            ("file", "{% include '/etc/passwd' %}", ""),
            (
                "forever",
                "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
                "fuel",
            ),
            (
                "bomb",
                "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
                "fuel",
            ),
            ("repeat", "{{ 'x' * 100000000000 }}", ""),
            ("deep", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        ] {
            let dir = folder(name, &[(FILE_NAME, template)]);
            let messages = [json!({"role": "user", "content": "hi"})];
            let error = match ChatTemplate::open(&dir) {
                Ok(chat) => chat.unwrap().render(&messages, &Value::Null, true).unwrap_err(),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(FILE_NAME) && error.contains(expected), "{name}: {error}");
            std::fs::remove_dir_all(dir).unwrap();
        }
    }
}
