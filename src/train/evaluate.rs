//! Evaluation: loss, exact match and Rouge-L, per task and overall.

use std::collections::BTreeMap;

use serde::Serialize;

use super::metrics;
use crate::{
    error::Result,
    formats::rows::{Row, Sequence},
    generate::{Engine, GenerateOptions},
    kernels::Backend,
    model::{Example, dataset::Dataset},
};

/// Turns ids into text.
pub trait Decode {
    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    fn decode(&self, ids: &[u32]) -> Result<String>;
}

#[cfg(feature = "cli")]
impl Decode for crate::formats::tokenizer::Tokenizer {
    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode(ids, true)
    }
}

/// The scores of some rows.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// Sum of the nll over the number of label tokens, in nats.
    pub loss: f64,
    /// Share of rows whose generated text equals a reference, SQuAD-normalised (of ids: equal ids).
    pub exact_match: Option<f64>,
    /// Mean Rouge-L F-measure against the best reference (of ids: over ids).
    pub rouge_l: Option<f64>,
    /// Rows.
    pub n_rows: usize,
    /// Label tokens.
    pub n_tokens: usize,
}

/// What an evaluation gives.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Over all rows.
    #[serde(flatten)]
    pub overall: Scores,
    /// By task.
    pub tasks: BTreeMap<String, Scores>,
    /// Rows that were cut to the length limits.
    pub n_truncated: usize,
    /// Rows that were left out because of the length limits.
    pub n_skipped: usize,
    /// Sum of the nll of each row and its label tokens, in the data's order.
    #[serde(skip)]
    pub rows: Vec<(f64, usize)>,
}

#[derive(Default)]
struct Sums {
    nll: f64,
    n_tokens: usize,
    n_rows: usize,
    exact: f64,
    rouge: f64,
}

impl Sums {
    fn scores(&self, generated: bool) -> Scores {
        let mean = |sum: f64| generated.then(|| sum / self.n_rows.max(1) as f64);
        Scores {
            loss: self.nll / self.n_tokens.max(1) as f64,
            exact_match: mean(self.exact),
            rouge_l: mean(self.rouge),
            n_rows: self.n_rows,
            n_tokens: self.n_tokens,
        }
    }
}

/// Evaluates a data set; `generate` adds exact match and Rouge-L of greedy outputs. `name_of` names
/// the task of a row.
///
/// # Errors
/// If an output cannot be decoded.
pub fn evaluate<B: Backend>(
    engine: &Engine<'_, B>,
    data: &Dataset,
    generate: Option<&GenerateOptions>,
    decoder: Option<&dyn Decode>,
    name_of: impl Fn(&Row, &Example) -> String,
) -> Result<Evaluation> {
    let examples: Vec<&Example> = data.examples.iter().collect();
    let nll = engine.nll(&examples);
    let outputs = generate.map(|options| engine.generate(&examples, options, |_, _| ()));
    let mut overall = Sums::default();
    let mut tasks: BTreeMap<String, Sums> = BTreeMap::new();
    let mut rows = Vec::with_capacity(examples.len());
    for (i, example) in examples.iter().enumerate() {
        let (sum, n): (f64, usize) = (nll[i].iter().sum(), nll[i].len());
        rows.push((sum, n));
        let (exact, rouge) = match &outputs {
            Some(outputs) => score(data, i, &outputs[i], decoder)?,
            None => (0.0, 0.0),
        };
        for sums in [&mut overall, tasks.entry(name_of(&data.rows[i], example)).or_default()] {
            sums.nll += sum;
            sums.n_tokens += n;
            sums.n_rows += 1;
            sums.exact += exact;
            sums.rouge += rouge;
        }
    }
    let generated = outputs.is_some();
    Ok(Evaluation {
        overall: overall.scores(generated),
        tasks: tasks.into_iter().map(|(name, sums)| (name, sums.scores(generated))).collect(),
        n_truncated: data.n_truncated,
        n_skipped: data.n_skipped,
        rows,
    })
}

/// Exact match (0 or 1) and Rouge-L of one output.
fn score(
    data: &Dataset,
    i: usize,
    output: &[u32],
    decoder: Option<&dyn Decode>,
) -> Result<(f64, f64)> {
    let row = &data.rows[i];
    if let (Some(Sequence::Text(target)), Some(decoder)) = (&row.target, decoder) {
        let text = decoder.decode(output)?;
        let references: Vec<&str> = match &row.references {
            Some(references) if !references.is_empty() => {
                references.iter().map(String::as_str).collect()
            }
            _ => vec![target],
        };
        let exact = metrics::exact_match(&text, &references);
        return Ok((f64::from(u8::from(exact)), metrics::rouge_l(&text, &references)));
    }
    let labels = &data.examples[i].labels;
    Ok((f64::from(u8::from(output == labels)), metrics::rouge_l_ids(output, labels)))
}
