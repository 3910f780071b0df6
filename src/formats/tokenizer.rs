//! `tokenizer.json`: text to ids and back, by the `tokenizers` crate.
//!
//! ```text
//! "Is it so?" -> encode, the file's own post-processor -> [271, 15, 8, 1]    (T5 appends </s> = 1)
//! [271, 15, 8, 1] -> decode -> "Is it so?"
//! ```
//!
//! Every id of the vocabulary is below the model's embedding rows, which [`Tokenizer::open`] checks, and so
//! is every id that [`Tokenizer::encode`] gives: encoded text never reads beyond the embedding. (T5 has more rows than ids, which is fine;
//! added chat tokens beyond the rows are not.) Truncation and padding that the file asks for are
//! switched off: lengths are the command line's, and there is no padding here at all.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    formats::{
        fingerprint::Fingerprint,
        json::{MAX_CONFIG_BYTES, UniqueObject, excerpt, read_capped, read_json},
    },
};

/// The most bytes of `tokenizer.json`.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

const FILE_NAME: &str = "tokenizer.json";
const CONFIG_FILE_NAME: &str = "tokenizer_config.json";
/// Tokens that `tokenizer_config.json` names.
pub(crate) const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// What transformers takes out of a decoded text where `tokenizer_config.json` says `clean_up_tokenization_spaces`, in this
/// order.
const CLEAN_UP: [(&str, &str); 10] = [
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
];
/// What a folder without it may have: the SentencePiece models that the slow tokenizers read.
const SLOW_FILES: [&str; 2] = ["spiece.model", "tokenizer.model"];

/// A model folder's tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    fingerprint: Fingerprint,
    vocab_rows: usize,
    cleans_up: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder whose embedding has `vocab_rows` rows.
    pub fn open(model_dir: impl AsRef<Path>, vocab_rows: usize) -> Result<Self> {
        let dir = model_dir.as_ref();
        let path = dir.join(FILE_NAME);
        if !path.exists()
            && let Some(slow) = SLOW_FILES.into_iter().find(|name| dir.join(name).exists())
        {
            return Err(Error::file(
                dir,
                format!(
                    "there is no {FILE_NAME}, and {slow} is not read; convert it once in \
                    Python: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                ),
            ));
        }
        let mut tokenizer = Self::parse(&read_capped(&path, MAX_FILE_BYTES)?, &path, vocab_rows)?;
        let config = tokenizer.config()?;
        tokenizer.make_special(&config)?;
        tokenizer.cleans_up = tokenizer.is_to_clean_up(&config);
        Ok(tokenizer)
    }

    /// Whether decoded texts are cleaned. As in transformers 5, those of BPE are not, whose spaces are the text's own, unless
    /// a second key insists.
    fn is_to_clean_up(&self, config: &Map<String, Value>) -> bool {
        let is_on = |key: &str| config.get(key) == Some(&Value::Bool(true));
        let is_bpe = matches!(self.inner.get_model(), tokenizers::ModelWrapper::BPE(_));
        is_on("clean_up_tokenization_spaces")
            && (!is_bpe
                || is_on("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
    }

    /// What `tokenizer_config.json` beside the file says; nothing where there is none.
    fn config(&self) -> Result<Map<String, Value>> {
        let path = self.path.with_file_name(CONFIG_FILE_NAME);
        Ok(match path.exists() {
            true => read_json::<UniqueObject>(&path, MAX_CONFIG_BYTES)?.0,
            false => Map::new(),
        })
    }

    /// As in transformers, tokens that the configuration names are special, whatever the file says of them.
    fn make_special(&mut self, config: &Map<String, Value>) -> Result<()> {
        for token in SPECIAL.iter().filter_map(|name| named_token(config, name)) {
            if self.inner.token_to_id(token).is_none() {
                tracing::warn!(
                    "{}: token {} of {CONFIG_FILE_NAME} is not there, so it is text like any other; in Python: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
                    self.path.display(),
                    excerpt(token)
                );
            } else if !self.inner.get_added_vocabulary().is_special_token(token) {
                let special = tokenizers::AddedToken::from(token, true);
                contained(|| self.inner.add_special_tokens([special]))
                    .map_err(|error| self.error(error))?;
                self.fingerprint.add(token.as_bytes());
            }
        }
        Ok(())
    }

    /// Reads the bytes of the `tokenizer.json` at `path`.
    pub fn parse(bytes: &[u8], path: &Path, vocab_rows: usize) -> Result<Self> {
        let path = path.to_path_buf();
        let fail = |detail: String| Error::file(&path, detail);
        let mut inner = contained(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|error| fail(format!("not a tokenizer: {error}")))?;
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);
        let largest = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id);
        let Some((token, id)) = largest else {
            return Err(fail("the vocabulary is empty".to_owned()));
        };
        if id as usize >= vocab_rows {
            return Err(fail(format!(
                "token {} has id {id}, but the model's embedding has {vocab_rows} rows (ids 0 \
                to {}); tokenizer and model do not belong together, or the embedding was not \
                resized when tokens were added",
                excerpt(&token),
                vocab_rows.saturating_sub(1)
            )));
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.add(bytes);
        Ok(Self { path, inner, fingerprint, vocab_rows, cleans_up: false })
    }

    /// The fingerprint of the file.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The ids of a text; with `special` also what the file's post-processor adds.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = contained(|| self.inner.encode_fast(text, special))
            .map_err(|error| self.error(format!("cannot encode {}: {error}", excerpt(text))))?;
        let ids = encoding.get_ids().to_vec();
        // A post-processor has ids of its own, which need not be the vocabulary's.
        match ids.iter().find(|&&id| id as usize >= self.vocab_rows) {
            Some(id) => Err(self.error(format!(
                "it gives id {id}, but the model's embedding has {} rows",
                self.vocab_rows
            ))),
            None => Ok(ids),
        }
    }

    /// The text of ids. Special tokens (`</s>`, ...) leave no text if `skip_special`; unknown ids
    /// leave none. Cleaned where the folder asks for it.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let text = contained(|| self.inner.decode(ids, skip_special))
            .map_err(|error| self.error(format!("cannot decode {} ids: {error}", ids.len())))?;
        if !self.cleans_up {
            return Ok(text);
        }
        Ok(CLEAN_UP.iter().fold(text, |text, (from, to)| text.replace(from, to)))
    }

    /// The end token that `tokenizer_config.json` names, if there is one: what Hugging Face's trainers
    /// put after a text.
    pub fn end_token(&self) -> Result<Option<u32>> {
        let config = self.config()?;
        if config.get("eos_token").is_none_or(Value::is_null) {
            return Ok(None);
        }
        match named_token(&config, "eos_token").and_then(|token| self.inner.token_to_id(token)) {
            Some(id) => Ok(Some(id)),
            None => {
                let path = self.path.with_file_name(CONFIG_FILE_NAME);
                Err(Error::file(&path, "field eos_token: not a token of tokenizer.json"))
            }
        }
    }

    /// The vocabulary's entry of one id, as it stands in the file.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn error(&self, detail: String) -> Error {
        Error::file(&self.path, detail)
    }
}

/// A token of `tokenizer_config.json`: a string, or an object with how it is matched in text.
pub(crate) fn named_token<'a>(config: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    let token = config.get(name)?;
    token.get("content").unwrap_or(token).as_str()
}

/// What the crate makes of a file that somebody made to hurt may be a panic (merges whose prefix is longer
/// than they are, say). It becomes an error; the panic hook has printed where it was.
fn contained<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // What the tokenizer keeps for later is a cache, whose lock says if it was poisoned.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(printable(&error.to_string())),
        Err(_) => Err("the file is inconsistent (the crate tokenizers panicked)".to_owned()),
    }
}

/// A message of the crate, which may quote the file: short, and without control characters.
fn printable(message: &str) -> String {
    message.chars().take(500).collect::<String>().replace(char::is_control, " ")
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({})", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn encodings_are_those_recorded() {
        let shared = std::env::var_os("POLYTAPE_SHARED")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
        let folder = shared.join("models/tokenizer-superni-8k");
        if !folder.exists() {
            // Past the macros: what those print is not shown of a test that passes.
            let (mut stderr, folder) = (std::io::stderr(), folder.display());
            let _ = writeln!(stderr, "skipped: {folder} is not there (set POLYTAPE_SHARED)");
            return;
        }
        let tokenizer = Tokenizer::open(&folder, 8192).unwrap();
        let bytes = std::fs::read(folder.join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        for sample in reference["samples"].as_array().unwrap() {
            let text = sample["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(sample["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
            if !text.contains('<') {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            }
        }
        assert_eq!(tokenizer.token(1).as_deref(), Some("</s>"));
        let error = Tokenizer::open(&folder, 8191).unwrap_err().to_string();
        assert!(
            error.contains("\"<extra_id_0>\" has id 8191, but the model's embedding has 8191 rows"),
            "{error}"
        );
    }

    /// Whatever `tokenizer.json` says of them: as in transformers.
    #[test]
    fn tokens_that_the_configuration_names_are_special() {
        let folder = std::env::temp_dir().join(format!("polytape-special-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = r#"{"version":"1.0","pre_tokenizer":{"type":"WhitespaceSplit"},
            "model":{"type":"WordLevel","vocab":{"a":0,"</s>":1,"u":2},"unk_token":"u"},"added_tokens":[]}"#;
        std::fs::write(folder.join(FILE_NAME), file).unwrap();
        let plain = Tokenizer::open(&folder, 8).unwrap();
        assert_eq!(plain.decode(&[0, 1], true).unwrap(), "a </s>");
        let config = r#"{"eos_token":{"content":"</s>"},"pad_token":"<none>","bos_token":null}"#;
        std::fs::write(folder.join(CONFIG_FILE_NAME), config).unwrap();
        let named = Tokenizer::open(&folder, 8).unwrap();
        assert_eq!(named.decode(&[0, 1], true).unwrap(), "a");
        assert_eq!(named.decode(&[0, 1], false).unwrap(), "a </s>");
        assert_eq!(named.encode("a</s> a", false).unwrap(), [0, 1, 0]);
        assert_eq!(named.end_token().unwrap(), Some(1));
        assert_ne!(named.fingerprint(), plain.fingerprint());
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// As in transformers 5: not where the spaces are the text's own.
    #[test]
    fn decoded_texts_are_cleaned_where_the_configuration_says_so() {
        let folder = std::env::temp_dir().join(format!("polytape-clean-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let vocab = r#""vocab":{"it":0,"'s":1,".":2,"do":3,"n't":4,"!":5,"'":6,"u":7}"#;
        let words = format!(r#"{{"type":"WordLevel",{vocab},"unk_token":"u"}}"#);
        let bpe = format!(r#"{{"type":"BPE",{vocab},"merges":[]}}"#);
        let (plain, clean) = ("it 's . do n't ! it ' it", "it's. don't! it'it");
        let on = r#"{"clean_up_tokenization_spaces":true}"#;
        let insists = r#"{"clean_up_tokenization_spaces":true,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output":true}"#;
        for (model, config, text) in [
            (&words, "{}", plain),
            (&words, r#"{"clean_up_tokenization_spaces":false}"#, plain),
            (&words, on, clean),
            (&bpe, on, plain),
            (&bpe, insists, clean),
        ] {
            let file = format!(r#"{{"version":"1.0","added_tokens":[],"model":{model}}}"#);
            std::fs::write(folder.join(FILE_NAME), file).unwrap();
            std::fs::write(folder.join(CONFIG_FILE_NAME), config).unwrap();
            let tokenizer = Tokenizer::open(&folder, 8).unwrap();
            let ids = [0, 1, 2, 3, 4, 5, 0, 6, 0];
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{model} {config}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn bad_files_are_refused() {
        let folder =
            std::env::temp_dir().join(format!("polytape-tokenizer-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let error = Tokenizer::open(&folder, 8).unwrap_err().to_string();
        assert!(error.starts_with("cannot open "), "{error}");
        std::fs::write(folder.join("spiece.model"), b"").unwrap();
        let error = Tokenizer::open(&folder, 8).unwrap_err().to_string();
        assert!(error.contains("spiece.model is not read; convert it"), "{error}");
        for (bytes, reason) in [
            ("", "not a tokenizer"),
            ("{}", "not a tokenizer"),
            (
                r#"{"version":"1.0","model":{"type":"WordLevel","vocab":{},"unk_token":"u"},"added_tokens":[]}"#,
                "vocabulary is empty",
            ),
            // An added token counts, too.
            (
                r#"{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":1,"c":2,"d":3,"e":4,"f":5,"g":6,"h":7},"unk_token":"u"},"added_tokens":[{"id":8,"content":"<x>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}]}"#,
                "has id 8, but the model's embedding has 8 rows (ids 0 to 7)",
            ),
        ] {
            std::fs::write(folder.join(FILE_NAME), bytes).unwrap();
            let error = Tokenizer::open(&folder, 8).unwrap_err().to_string();
            assert!(
                error.contains("tokenizer.json: ") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
