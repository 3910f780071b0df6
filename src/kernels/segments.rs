//! Segments: the tokens of a batch, grouped by the routing row they belong to.
//!
//! A grouped kernel multiplies each run of tokens by its own routing row's matrix. This holds those
//! runs, made once per batch, so that no kernel ever searches for its routing row.
//!
//! ```text
//! tokens  0 1 2 | 3 | 4 5 6 7     routing row  1 | 2 | 1     offsets = [0, 3, 4, 8]
//! ```
//!
//! Offsets start at 0, strictly increase and end at the number of tokens; routing rows are below
//! `n_rows`; a routing row may come back. Kernels rely on this, so [`Segments::new`] is the only
//! way in.

use std::ops::Range;

/// Runs of consecutive tokens of one routing row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    offsets: Vec<usize>,
    rows: Vec<usize>,
    n_rows: usize,
}

impl Segments {
    /// Sequences of these lengths, one after the other, each of the routing row beside it. Empty
    /// sequences vanish; neighbours of one row become one segment.
    ///
    /// # Panics
    /// If the slices differ in length or a routing row is not below `n_rows`.
    pub fn new(lens: &[usize], rows: &[usize], n_rows: usize) -> Self {
        assert_eq!(lens.len(), rows.len(), "a routing row for each sequence");
        let mut segments = Self { offsets: vec![0], rows: Vec::new(), n_rows };
        let mut end = 0;
        for (&len, &row) in lens.iter().zip(rows) {
            assert!(row < n_rows, "routing row {row} of {n_rows}");
            if len == 0 {
                continue;
            }
            end += len;
            if segments.rows.last() == Some(&row) {
                segments.offsets.pop();
            } else {
                segments.rows.push(row);
            }
            segments.offsets.push(end);
        }
        segments
    }

    /// The runs: tokens and routing row.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Range<usize>, usize)> + '_ {
        self.rows.iter().zip(self.offsets.windows(2)).map(|(&row, w)| (w[0]..w[1], row))
    }

    /// The number of runs.
    pub fn n(&self) -> usize {
        self.rows.len()
    }

    /// The number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.offsets[self.rows.len()]
    }

    /// Which routing rows any segment has.
    pub(crate) fn used_rows(&self) -> Vec<bool> {
        let mut used = vec![false; self.n_rows()];
        self.iter().for_each(|(_, row)| used[row] = true);
        used
    }

    /// The number of routing rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The runs that overlap a range of tokens, cut to it.
    pub fn within(&self, tokens: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        let first = self.offsets.partition_point(|&o| o <= tokens.start).saturating_sub(1);
        (first..self.rows.len())
            .map(|i| (self.offsets[i]..self.offsets[i + 1], self.rows[i]))
            .take_while({
                let end = tokens.end;
                move |(run, _)| run.start < end
            })
            .map(move |(run, row)| (run.start.max(tokens.start)..run.end.min(tokens.end), row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_and_empty_sequences_vanish() {
        let segments = Segments::new(&[2, 0, 1, 4], &[1, 0, 1, 2], 3);
        assert_eq!(segments.iter().collect::<Vec<_>>(), [(0..3, 1), (3..7, 2)]);
        assert_eq!(segments.n_tokens(), 7);
        assert_eq!(Segments::new(&[], &[], 1).n_tokens(), 0);
    }

    #[test]
    fn within_cuts_runs_to_the_range() {
        let segments = Segments::new(&[3, 1, 4], &[0, 1, 0], 2);
        assert_eq!(segments.within(2..5).collect::<Vec<_>>(), [(2..3, 0), (3..4, 1), (4..5, 0)]);
        assert_eq!(segments.within(3..4).collect::<Vec<_>>(), [(3..4, 1)]);
        assert_eq!(segments.within(4..8).count(), 1);
    }
}
