//! Which of the two exact ways a routed LoRA runs, by cost.
//!
//! Products per skill-rank and feature, for `tokens` tokens of `rows` routing rows:
//!
//! ```text
//! mixed     rows * n_skills (forming the pairs) + tokens (using them)
//! stacked   tokens * n_skills
//! kept      tokens                               (pairs formed once for an engine)
//! ```
//!
//! So stacked wins where a routing row has about one token (decoding many tasks), mixed everywhere
//! else, and kept pairs always, as long as they fit in memory.
//!
//! A third way, adding a task's pair to the weights it adapts, is left to `export --merged`. It would save
//! rank * (d_in + d_out) products a token beside d_in * d_out, less than one in a hundred, and needs a private
//! copy of weights that are read from the mapped file; the time that kept pairs add to decoding is below what
//! runs differ by (benches/results).

/// Two exact ways to run a routed LoRA. They agree within rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Form a pair of matrices for each routing row, then rank-r products.
    Mixed,
    /// Apply all bank columns to every token and weight them in rank space; nothing is formed.
    Stacked,
}

/// Kept pairs may take this much memory; an engine for more tasks runs stacked.
pub const KEPT_PAIRS_BYTES: usize = 256 << 20;

impl Mode {
    /// The cheaper way for one use of pairs that are not kept.
    pub fn for_tokens(n_tokens: usize, n_rows: usize, n_skills: usize) -> Self {
        if n_rows * n_skills + n_tokens <= n_tokens * n_skills {
            Self::Mixed
        } else {
            Self::Stacked
        }
    }

    /// The way of an engine whose kept pairs would take `pair_bytes`.
    pub fn for_engine(pair_bytes: usize) -> Self {
        if pair_bytes <= KEPT_PAIRS_BYTES { Self::Mixed } else { Self::Stacked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_rows_are_mixed_and_single_tokens_stacked() {
        assert_eq!(Mode::for_tokens(8 * 128, 8, 4), Mode::Mixed);
        assert_eq!(Mode::for_tokens(8, 8, 4), Mode::Stacked);
        assert_eq!(Mode::for_tokens(16, 8, 4), Mode::Mixed);
        assert_eq!(Mode::for_tokens(8, 1, 4), Mode::Mixed);
        assert_eq!(Mode::for_engine(1 << 20), Mode::Mixed);
        assert_eq!(Mode::for_engine(1 << 40), Mode::Stacked);
    }
}
