//! How tokens are chosen: names, meaning and defaults of transformers' `GenerationConfig`.

use crate::{
    error::{Error, Result},
    formats::config::GenerationConfig,
};

pub use crate::formats::config::EarlyStopping;

/// New tokens of an output where neither a flag nor the model's folder says how many.
const MAX_NEW_TOKENS: usize = 128;

/// Beams or sequences of a row at most: past that there is no memory for their keys and values.
const MOST_SEQUENCES: usize = 4096;

/// How tokens are generated. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// At most this many tokens a row.
    pub max_new_tokens: usize,
    /// No end token before this many.
    pub min_new_tokens: usize,
    /// At most this many tokens of a causal model's row, the prompt included, but one new token at least.
    pub max_length: usize,
    /// No end token before this many tokens of a causal model's row, the prompt included.
    pub min_length: usize,
    /// Sequences that a beam search follows; 1: no beam search.
    pub num_beams: usize,
    /// Sequences that are given for each row; more than one needs beams or sampling.
    pub num_return_sequences: usize,
    /// Exponent of the length by which a beam's score is divided.
    pub length_penalty: f64,
    /// When a beam search ends.
    pub early_stopping: EarlyStopping,
    /// Draws tokens instead of taking the most probable.
    pub do_sample: bool,
    /// Divides the scores before a draw.
    pub temperature: f64,
    /// Draws among this many of the most probable tokens; 0: among all.
    pub top_k: usize,
    /// Draws among the most probable tokens that together have this probability.
    pub top_p: f64,
    /// Draws among tokens of at least this share of the largest probability.
    pub min_p: f64,
    /// Divides (where negative: multiplies) the scores of tokens that were there before; for causal
    /// models the prompt counts, too.
    pub repetition_penalty: f64,
    /// No n tokens in a row occur twice; 0: they may.
    pub no_repeat_ngram_size: usize,
    /// What draws are derived from, together with a row's index and a token's position.
    pub seed: u64,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: MAX_NEW_TOKENS,
            min_new_tokens: 0,
            max_length: usize::MAX,
            min_length: 0,
            num_beams: 1,
            num_return_sequences: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::No,
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            seed: 0,
        }
    }
}

impl GenerateOptions {
    /// What a model's `generation_config.json` asks for.
    pub fn of_model(config: &GenerationConfig) -> Self {
        let own = Self::default();
        let file = &config.defaults;
        Self {
            // A whole length alone lets a row go on for as long as that.
            max_new_tokens: (file.max_new_tokens.or(file.max_length)).unwrap_or(own.max_new_tokens),
            min_new_tokens: file.min_new_tokens.unwrap_or(own.min_new_tokens),
            max_length: match file.max_new_tokens {
                Some(_) => own.max_length,
                None => file.max_length.unwrap_or(own.max_length),
            },
            min_length: match file.min_new_tokens {
                Some(_) => own.min_length,
                None => file.min_length.unwrap_or(own.min_length),
            },
            num_beams: file.num_beams.unwrap_or(own.num_beams),
            num_return_sequences: file.num_return_sequences.unwrap_or(own.num_return_sequences),
            length_penalty: file.length_penalty.unwrap_or(own.length_penalty),
            early_stopping: file.early_stopping.unwrap_or(own.early_stopping),
            do_sample: file.do_sample.unwrap_or(own.do_sample),
            // Files that do not sample have 0, which is none.
            temperature: (file.temperature)
                .filter(|&t| t != 0.0 || file.do_sample == Some(true))
                .unwrap_or(own.temperature),
            top_k: file.top_k.unwrap_or(own.top_k),
            top_p: file.top_p.unwrap_or(own.top_p),
            min_p: file.min_p.unwrap_or(own.min_p),
            repetition_penalty: file.repetition_penalty.unwrap_or(own.repetition_penalty),
            no_repeat_ngram_size: file.no_repeat_ngram_size.unwrap_or(own.no_repeat_ngram_size),
            seed: own.seed,
        }
    }

    /// New tokens at most, of a row whose decoder begins with `prompt_len` tokens.
    pub(super) fn most_new(&self, prompt_len: usize) -> usize {
        self.max_new_tokens.min(self.max_length.saturating_sub(prompt_len).max(1))
    }

    /// New tokens before the end at least, as [`GenerateOptions::most_new`].
    pub(super) fn least_new(&self, prompt_len: usize) -> usize {
        self.min_new_tokens.max(self.min_length.saturating_sub(prompt_len))
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the option as the command line does.
    pub fn check(&self) -> Result<()> {
        let usage = |message: String| Err(Error::Usage(message));
        let positive = [
            ("temperature", self.temperature),
            ("repetition-penalty", self.repetition_penalty),
            ("top-p", self.top_p),
        ];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return usage(format!("--{name} must be more than 0, not {value}"));
            }
        }
        if self.top_p > 1.0 {
            return usage(format!("--top-p must be at most 1, not {}", self.top_p));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return usage(format!("--min-p must be from 0 to 1, not {}", self.min_p));
        }
        if !self.length_penalty.is_finite() {
            return usage(format!("--length-penalty must be finite, not {}", self.length_penalty));
        }
        if self.min_new_tokens > self.max_new_tokens {
            return usage(format!(
                "--min-new-tokens {} is more than --max-new-tokens {}",
                self.min_new_tokens, self.max_new_tokens
            ));
        }
        if self.num_beams == 0 || self.num_return_sequences == 0 {
            return usage("--num-beams and --num-return-sequences must be at least 1".into());
        }
        for (name, n) in
            [("beams", self.num_beams), ("return-sequences", self.num_return_sequences)]
        {
            if n > MOST_SEQUENCES {
                return usage(format!("--num-{name} must be at most {MOST_SEQUENCES}, not {n}"));
            }
        }
        if self.num_beams > 1 && self.do_sample {
            return usage("--do-sample and --num-beams exclude each other: leave one out".into());
        }
        let most = if self.do_sample { usize::MAX } else { self.num_beams };
        if self.num_return_sequences > most {
            return usage(format!(
                "--num-return-sequences {} needs --do-sample, or as many --num-beams (now {})",
                self.num_return_sequences, self.num_beams
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::config::GenerationDefaults;

    fn of(defaults: GenerationDefaults) -> GenerateOptions {
        GenerateOptions::of_model(&GenerationConfig { defaults, ..GenerationConfig::default() })
    }

    #[test]
    fn whole_lengths_count_the_prompt() {
        let (max_length, min_length) = (Some(25), Some(20));
        let file = GenerationDefaults { max_length, min_length, ..Default::default() };
        let options = of(file.clone());
        assert_eq!((options.most_new(10), options.least_new(10)), (15, 10));
        assert_eq!((options.most_new(40), options.least_new(40)), (1, 0));
        // As in transformers, new tokens win over whole lengths.
        let new = Some(3);
        let options = of(GenerationDefaults { max_new_tokens: new, min_new_tokens: new, ..file });
        assert_eq!((options.most_new(10), options.least_new(10)), (3, 3));
    }

    #[test]
    fn a_temperature_of_0_is_none_where_nothing_is_drawn() {
        let file = GenerationDefaults { temperature: Some(0.0), ..Default::default() };
        assert!(of(file.clone()).check().is_ok());
        assert!(of(GenerationDefaults { do_sample: Some(true), ..file }).check().is_err());
        let many = GenerateOptions { num_beams: 1 << 40, ..Default::default() };
        assert!(many.check().unwrap_err().to_string().contains("--num-beams must be at most"));
    }
}
