//! Arbitrary bytes as `tokenizer.json` and as text.
//!
//! ```text
//! bytes   tokenizer.json, a zero byte, text
//! ```
//!
//! Of an accepted tokenizer: every id of a text is below the embedding's rows, and can be decoded;
//! the same text gives the same ids.

use std::path::Path;

use polytape::formats::tokenizer::Tokenizer;

use crate::messages::assert_presentable;

/// Rows of the embedding.
const ROWS: usize = 64;
const NAME: &str = "tokenizer.json";

/// The crate's panics are errors here; libFuzzer's hook would end the process.
fn ignore_panics_of_the_crate() {
    static DONE: std::sync::Once = std::sync::Once::new();
    DONE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let of_the_crate =
                |place: &std::panic::Location<'_>| place.file().contains("/tokenizers-");
            if !panic.location().is_some_and(of_the_crate) {
                before(panic);
            }
        }));
    });
}

/// A tokenizer and a text.
pub fn check(data: &[u8]) {
    ignore_panics_of_the_crate();
    let mut parts = data.splitn(2, |&byte| byte == 0);
    let (file, text) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let tokenizer = match Tokenizer::parse(file, Path::new(NAME), ROWS) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert_presentable(&error, NAME),
    };
    let text = String::from_utf8_lossy(text);
    for special in [false, true] {
        match tokenizer.encode(&text, special) {
            Ok(ids) => {
                assert_eq!(tokenizer.encode(&text, special).ok(), Some(ids.clone()));
                for &id in &ids {
                    assert!((id as usize) < ROWS, "id {id} of {text:?}");
                }
                if let Err(error) = tokenizer.decode(&ids, !special) {
                    assert_presentable(&error, NAME);
                }
            }
            Err(error) => assert_presentable(&error, NAME),
        }
    }
}
