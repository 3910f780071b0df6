//! Evaluation: loss, exact match and Rouge-L, per task and overall.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    choices::{self, Choices},
    metrics,
};
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
    /// Share of the rows with choices whose answer has the best length-normalised score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_accuracy: Option<f64>,
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

impl Evaluation {
    /// A table in Markdown: a line a task, and one for all.
    pub fn markdown(&self) -> String {
        let percent = |score: Option<f64>| {
            score.map_or_else(|| "-".to_owned(), |score| format!("{:.2}", 100.0 * score))
        };
        let line = |name: &str, scores: &Scores| {
            let Scores { loss, exact_match, rouge_l, n_rows, n_tokens, .. } = scores;
            let (exact, rouge) = (percent(*exact_match), percent(*rouge_l));
            format!("| {name} | {n_rows} | {n_tokens} | {loss:.4} | {exact} | {rouge} |\n")
        };
        let mut table =
            "| task | rows | label tokens | loss (nats) | exact match (%) | Rouge-L (%) |\n\
                         |---|---:|---:|---:|---:|---:|\n"
                .to_owned();
        for (name, scores) in &self.tasks {
            // A bar or a line break in a name would end the cell.
            table += &line(&name.replace('|', "\\|").replace(['\n', '\r'], " "), scores);
        }
        table + &line("**all**", &self.overall)
    }
}

#[derive(Default)]
struct Sums {
    nll: f64,
    n_tokens: usize,
    n_rows: usize,
    exact: f64,
    rouge: f64,
    n_ranked: usize,
    right: f64,
}

impl Sums {
    fn scores(&self, generated: bool) -> Scores {
        let mean = |sum: f64| generated.then(|| sum / self.n_rows.max(1) as f64);
        Scores {
            loss: self.nll / self.n_tokens.max(1) as f64,
            exact_match: mean(self.exact),
            rouge_l: mean(self.rouge),
            rank_accuracy: (self.n_ranked > 0).then(|| self.right / self.n_ranked as f64),
            n_rows: self.n_rows,
            n_tokens: self.n_tokens,
        }
    }
}

/// Evaluates a data set; `choices` adds the accuracy of ranking them, `generate` adds exact match and Rouge-L of outputs. `name_of` names
/// the task of a row.
///
/// # Errors
/// If an output cannot be decoded.
pub fn evaluate<B: Backend>(
    engine: &Engine<'_, B>,
    data: &Dataset,
    generate: Option<&GenerateOptions>,
    decoder: Option<&dyn Decode>,
    choices: Option<&Choices>,
    name_of: impl Fn(&Row, &Example) -> String,
) -> Result<Evaluation> {
    let examples: Vec<&Example> = data.examples.iter().collect();
    let nll = engine.nll(&examples);
    let outputs = generate.map(|options| engine.generate(&examples, options, |_, _| ()));
    let wrong: Vec<&Example> = choices.iter().flat_map(|c| c.wrong.iter().flatten()).collect();
    let wrong_nll = engine.nll(&wrong);
    let mut wrong_nll = wrong_nll.iter().map(|nll| (nll.iter().sum(), nll.len()));
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
        let n_wrong = choices.map_or(0, |choices| choices.wrong[i].len());
        // The answer comes last, so that a draw counts against it.
        let ranked: Vec<(f64, usize)> =
            wrong_nll.by_ref().take(n_wrong).chain(std::iter::once((sum, n))).collect();
        for sums in [&mut overall, tasks.entry(name_of(&data.rows[i], example)).or_default()] {
            sums.nll += sum;
            sums.n_tokens += n;
            sums.n_rows += 1;
            sums.exact += exact;
            sums.rouge += rouge;
            if n_wrong > 0 {
                sums.n_ranked += 1;
                sums.right += f64::from(u8::from(choices::rank(&ranked) == n_wrong));
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_a_line_a_task() {
        let scores = |loss, exact_match| Scores {
            loss,
            exact_match,
            rouge_l: exact_match,
            rank_accuracy: None,
            n_rows: 2,
            n_tokens: 7,
        };
        let evaluation = Evaluation {
            overall: scores(1.5, None),
            tasks: BTreeMap::from([("a|b".to_owned(), scores(0.25, Some(0.5)))]),
            n_truncated: 0,
            n_skipped: 0,
            rows: Vec::new(),
        };
        let table = evaluation.markdown();
        assert_eq!(table.lines().count(), 4);
        assert!(table.contains("| a\\|b | 2 | 7 | 0.2500 | 50.00 | 50.00 |"), "{table}");
        assert!(table.ends_with("| **all** | 2 | 7 | 1.5000 | - | - |\n"), "{table}");
    }
}
