//! Metrics: what a model generated against what counts as right.
//!
//! ```text
//! "The cat's out, a lot."   normalised   "cats out lot"                   exact match: equal strings
//!                           tokens       the cat s out a lot              Rouge-L: 2 p r / (p + r),
//! "the cat was out"         tokens       the cat was out    LCS = 3         p = 3/6, r = 3/4
//! ```
//!
//! Both give the numbers of the scripts that papers quote, for any text: exact match is SQuAD's
//! official `evaluate-v1.1.py`, Rouge-L is Google's `rouge-score` without its stemmer. So Python's
//! idea of a letter and of white space is restated here where Rust's differs. Several references:
//! the best one counts.

use std::sync::LazyLock;

use regex::Regex;

/// Python's word characters, less the underscore, which is punctuation and gone by then. `\w` would
/// not do: in the crate `regex` it takes combining marks, in Python it does not.
static WORDS: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"[\p{L}\p{N}]+").expect("the pattern is well formed"));

/// Whether the prediction equals one of the references after SQuAD's normalisation: lower case, no
/// ASCII punctuation, no articles, single spaces.
pub fn exact_match(prediction: &str, references: &[&str]) -> bool {
    let prediction = normalise(prediction);
    references.iter().any(|reference| normalise(reference) == prediction)
}

fn normalise(text: &str) -> String {
    let text = text.to_lowercase().replace(|c: char| c.is_ascii_punctuation(), "");
    // A word stands between two changes of \w, so this is Python's r"\b(a|an|the)\b".
    let text = WORDS.replace_all(&text, |word: &regex::Captures| match &word[0] {
        "a" | "an" | "the" => " ".to_owned(),
        other => other.to_owned(),
    });
    text.split(is_python_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// `str.isspace`: Unicode's white space and the four ASCII separators.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The best F-measure of Rouge-L of the prediction against the references, from 0 to 1. Zero where
/// either side has no ASCII letter or digit.
pub fn rouge_l(prediction: &str, references: &[&str]) -> f64 {
    let prediction = prediction.to_lowercase();
    let prediction = tokens(&prediction);
    let score = |reference: &&str| f_measure(&prediction, &tokens(&reference.to_lowercase()));
    references.iter().map(score).fold(0.0, f64::max)
}

/// Rouge-L of token ids, for rows that have no text.
pub fn rouge_l_ids(prediction: &[u32], reference: &[u32]) -> f64 {
    f_measure(prediction, reference)
}

/// The tokens of `rouge-score`: runs of ASCII letters and digits in lower-case text.
fn tokens(lower_case: &str) -> Vec<&str> {
    lower_case
        .split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()))
        .filter(|token| !token.is_empty())
        .collect()
}

/// In the order of operations of `rouge-score`, so that the bits agree too.
fn f_measure<T: PartialEq>(prediction: &[T], reference: &[T]) -> f64 {
    let lcs = lcs_length(prediction, reference);
    if lcs == 0 {
        return 0.0;
    }
    let precision = lcs as f64 / prediction.len() as f64;
    let recall = lcs as f64 / reference.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// The length of the longest common subsequence: len(a) x len(b) steps, one row of the shorter one.
fn lcs_length<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let (long, short) = if a.len() < b.len() { (b, a) } else { (a, b) };
    // row[j] is the length for what was seen of `long` and the first j of `short`.
    let mut row = vec![0; short.len() + 1];
    for item in long {
        let mut diagonal = 0; // The previous row's value, one to the left.
        for (j, other) in short.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if item == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[short.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        prediction: String,
        references: Vec<String>,
        exact_match: bool,
        rouge_l: f64,
    }

    #[test]
    fn every_number_is_that_of_the_python_scripts() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/metrics.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() > 100);
        for Case { prediction, references, exact_match: exact, rouge_l: rouge } in cases {
            let references: Vec<&str> = references.iter().map(String::as_str).collect();
            let shown = format!("{prediction:?} {references:?}");
            assert_eq!(exact_match(&prediction, &references), exact, "{shown}");
            let found = rouge_l(&prediction, &references);
            assert!((found - rouge).abs() <= 1e-12, "{shown}: {found}, not {rouge}");
        }
    }

    #[test]
    fn ids_are_scored_like_tokens() {
        assert_eq!(rouge_l_ids(&[], &[1]), 0.0);
        assert_eq!(rouge_l_ids(&[1], &[]), 0.0);
        assert_eq!(rouge_l_ids(&[7, 8, 9], &[7, 8, 9]), 1.0);
        assert_eq!(
            rouge_l_ids(&[1, 2, 3, 4, 5, 6], &[1, 2, 9, 4]),
            rouge_l("the cat s out a lot", &["the cat was out"])
        );
    }
}
