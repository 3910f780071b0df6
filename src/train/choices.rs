//! Multiple choice: rows that list what could be answered.
//!
//! ```text
//! score(choice) = (1/len) Σ_t ln p(choice_t)                      length-normalised, as in T-Few
//! ranking       the answer is the choice of the highest score
//! training      L = LM + MC + UL, T-Few's three losses, each of weight 1:
//!   LM  mean over the answers' tokens of nll
//!   MC  mean over the rows of -ln softmax(scores)[answer]
//!   UL  mean over the wrong choices' tokens of -ln(1 - p + 0.01)
//! ```
//!
//! A wrong choice is an example of its own, with the input again, that shares its row's noise.

use crate::{formats::fingerprint::Fingerprint, model::Example};

/// Keeps the unlikelihood finite, as in T-Few's code.
const MARGIN: f64 = 1e-2;

/// The choices of a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    /// By row: the choices that are not its answer; none where the row lists no choices.
    pub wrong: Vec<Vec<Example>>,
}

impl Choices {
    /// Whether no row lists choices.
    pub fn is_empty(&self) -> bool {
        self.wrong.iter().all(Vec::is_empty)
    }

    /// A fingerprint of the wrong choices' ids, in order.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut print = Fingerprint::default();
        for wrong in &self.wrong {
            print.add(&(wrong.len() as u64).to_le_bytes());
            wrong.iter().for_each(|choice| print.add_ids(&choice.labels));
        }
        print
    }
}

/// The index of the choice with the highest length-normalised score, from each one's sum of nll and
/// number of tokens; the first of equals.
pub fn rank(choices: &[(f64, usize)]) -> usize {
    let mut best = (0, f64::INFINITY);
    for (i, &(nll, len)) in choices.iter().enumerate() {
        let score = nll / len.max(1) as f64;
        if score < best.1 {
            best = (i, score);
        }
    }
    best.0
}

/// What the losses are averaged over: those of the whole optimiser step.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Tokens of the answers.
    pub n_label_tokens: usize,
    /// Tokens of the wrong choices.
    pub n_wrong_tokens: usize,
    /// Rows that list choices.
    pub n_rows: usize,
}

/// The gradient of T-Few's loss with respect to the nll of each token. `lens` has the tokens of each
/// sequence, the answers of `wrong.len()` rows first and then their wrong choices, row by row:
/// `wrong[i]` of them are of row i.
pub fn t_few_weights(nll: &[f64], lens: &[usize], wrong: &[usize], counts: Counts) -> Vec<f64> {
    let mut starts = vec![0; lens.len()];
    for i in 1..lens.len() {
        starts[i] = starts[i - 1] + lens[i - 1];
    }
    let mut weights = vec![0.0; nll.len()];
    let mut add = |sequence: usize, value: &dyn Fn(f64) -> f64| {
        let tokens = starts[sequence]..starts[sequence] + lens[sequence];
        for token in tokens {
            weights[token] += value(nll[token]);
        }
    };
    let score = |sequence: usize| {
        let tokens = &nll[starts[sequence]..][..lens[sequence]];
        -tokens.iter().sum::<f64>() / lens[sequence].max(1) as f64
    };
    let mut next = wrong.len();
    for (row, &n_wrong) in wrong.iter().enumerate() {
        add(row, &|_| 1.0 / counts.n_label_tokens.max(1) as f64);
        if n_wrong == 0 {
            continue;
        }
        let sequences: Vec<usize> = std::iter::once(row).chain(next..next + n_wrong).collect();
        next += n_wrong;
        let scores: Vec<f64> = sequences.iter().map(|&sequence| score(sequence)).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
        for (i, (&sequence, score)) in sequences.iter().zip(&scores).enumerate() {
            let p = (score - highest).exp() / total;
            let is_answer = f64::from(u8::from(i == 0));
            let slope = (is_answer - p) / (lens[sequence].max(1) * counts.n_rows.max(1)) as f64;
            add(sequence, &|_| slope);
            if i > 0 {
                add(sequence, &|nll| {
                    let p = (-nll).exp();
                    -p / (1.0 - p + MARGIN) / counts.n_wrong_tokens.max(1) as f64
                });
            }
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranking_is_by_the_mean() {
        assert_eq!(rank(&[(4.0, 2), (5.0, 5), (3.0, 1)]), 1);
        assert_eq!(rank(&[(1.0, 1), (2.0, 2)]), 0, "the first of equals");
    }

    /// The loss as the module's page has it.
    fn loss(nll: &[f64], lens: &[usize], wrong: &[usize]) -> f64 {
        let mut at = 0;
        let sequences: Vec<&[f64]> = lens
            .iter()
            .map(|&len| {
                at += len;
                &nll[at - len..at]
            })
            .collect();
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let answers = &sequences[..wrong.len()];
        let lm = mean(answers.iter().flat_map(|s| s.iter().copied()).collect());
        let (mut mc, mut next) = (Vec::new(), wrong.len());
        for (row, &n) in wrong.iter().enumerate() {
            if n > 0 {
                let score = |s: &[f64]| -s.iter().sum::<f64>() / s.len() as f64;
                let own = score(sequences[row]);
                let others = sequences[next..next + n].iter().map(|s| score(s).exp());
                mc.push(-(own.exp() / (own.exp() + others.sum::<f64>())).ln());
            }
            next += n;
        }
        let wrong_tokens = sequences[wrong.len()..].iter().flat_map(|s| s.iter());
        let ul = wrong_tokens.map(|nll| -(1.0 - (-nll).exp() + MARGIN).ln()).collect();
        lm + mean(mc) + mean(ul)
    }

    #[test]
    fn weights_are_the_difference_quotient_of_the_three_losses() {
        let (lens, wrong) = ([2, 1, 3, 2, 1, 2], [2, 0, 1]);
        let nll = [0.3, 1.2, 2.0, 0.1, 0.9, 0.5, 0.7, 1.5, 0.2, 3.0, 0.05];
        let counts = Counts { n_label_tokens: 6, n_wrong_tokens: 5, n_rows: 2 };
        let weights = t_few_weights(&nll, &lens, &wrong, counts);
        for i in 0..nll.len() {
            let moved = |step: f64| {
                let mut nll = nll;
                nll[i] += step;
                loss(&nll, &lens, &wrong)
            };
            let want = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            assert!((weights[i] - want).abs() < 1e-8, "{i}: {}, not {want}", weights[i]);
        }
    }
}
