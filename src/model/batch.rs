//! Batches: examples one after the other, without padding.
//!
//! ```text
//! examples   [5 6 1] -> [9 1],  [7 1] -> [8 3 1]          (input -> labels)
//! source     5 6 1 7 1          spans 0..3, 3..5
//! labels     9 1 8 3 1          spans 0..2, 2..5
//! target in  0 9 0 8 3          (labels shifted right behind the start id)
//! ```
//!
//! No kernel ever sees a padding token, so short examples cost what they are, and what an example
//! computes does not depend on who shares its batch.

use std::sync::Arc;

use crate::kernels::ops::{Segments, Spans, TokenKey};

/// One example as ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// What the encoder sees.
    pub input: Vec<u32>,
    /// What the decoder should say, with the end id; empty in generation.
    pub labels: Vec<u32>,
    /// The task, below the adapter's `n_tasks`; unused without an adapter.
    pub task: u32,
}

/// Examples that are computed together.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Ids for the encoder, `[source tokens]`.
    pub source: Vec<u32>,
    /// Ids for the decoder, `[target tokens]`.
    pub target: Vec<u32>,
    /// What each target token should be followed by, `[target tokens]`.
    pub labels: Vec<u32>,
    /// Each example's source tokens.
    pub source_spans: Arc<Spans>,
    /// Each example's target tokens.
    pub target_spans: Arc<Spans>,
    /// Each example's task.
    pub tasks: Vec<u32>,
    /// Each example's number within the optimiser step: what its random numbers are counted by.
    pub numbers: Vec<u32>,
}

impl Batch {
    /// Packs examples. `start` is the id that the decoder begins with, `first` the number of the
    /// first example within the optimiser step.
    pub fn new<'e>(
        examples: impl IntoIterator<Item = &'e Example>,
        start: u32,
        first: usize,
    ) -> Self {
        let examples: Vec<_> = examples.into_iter().collect();
        let lens = |of: fn(&Example) -> usize| -> Arc<Spans> {
            Arc::new(Spans::packed(&examples.iter().map(|e| of(e)).collect::<Vec<_>>()))
        };
        let target = examples.iter().flat_map(|e| {
            (!e.labels.is_empty())
                .then_some(start)
                .into_iter()
                .chain(e.labels.iter().rev().skip(1).rev().copied())
        });
        Self {
            source: examples.iter().flat_map(|e| e.input.iter().copied()).collect(),
            target: target.collect(),
            labels: examples.iter().flat_map(|e| e.labels.iter().copied()).collect(),
            source_spans: lens(|e| e.input.len()),
            target_spans: lens(|e| e.labels.len()),
            tasks: examples.iter().map(|e| e.task).collect(),
            numbers: (first..first + examples.len()).map(|n| n as u32).collect(),
        }
    }

    /// The number of examples.
    pub fn n(&self) -> usize {
        self.tasks.len()
    }

    /// Routing rows where every example has its own (the router samples).
    pub fn own_rows(&self) -> RoutingRows {
        RoutingRows { tasks: self.tasks.clone(), of_example: (0..self.n()).collect() }
    }

    /// Routing rows where examples of one task share one (the router does not sample).
    pub fn rows_by_task(&self) -> RoutingRows {
        let mut tasks: Vec<u32> = Vec::new();
        let of_example = self
            .tasks
            .iter()
            .map(|task| {
                tasks.iter().position(|t| t == task).unwrap_or_else(|| {
                    tasks.push(*task);
                    tasks.len() - 1
                })
            })
            .collect();
        RoutingRows { tasks, of_example }
    }

    /// The keys of the source tokens.
    pub fn source_keys(&self) -> Arc<[TokenKey]> {
        self.keys(&self.source_spans)
    }

    /// The keys of the target tokens.
    pub fn target_keys(&self) -> Arc<[TokenKey]> {
        self.keys(&self.target_spans)
    }

    fn keys(&self, spans: &Spans) -> Arc<[TokenKey]> {
        self.numbers
            .iter()
            .zip(&spans.lens)
            .flat_map(|(&example, &len)| {
                (0..len as u32).map(move |position| TokenKey { example, position })
            })
            .collect()
    }
}

/// Which mixture each example uses.
#[derive(Clone, Debug)]
pub struct RoutingRows {
    /// The task of each routing row.
    pub tasks: Vec<u32>,
    /// The routing row of each example.
    pub of_example: Vec<usize>,
}

impl RoutingRows {
    /// The segments of a batch whose examples have these tokens.
    pub fn segments(&self, spans: &Spans) -> Arc<Segments> {
        Arc::new(Segments::new(&spans.lens, &self.of_example, self.tasks.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_right_behind_the_start_id() {
        let examples = [
            Example { input: vec![5, 6, 1], labels: vec![9, 1], task: 2 },
            Example { input: vec![7, 1], labels: vec![8, 3, 1], task: 0 },
            Example { input: vec![4], labels: vec![], task: 2 },
        ];
        let batch = Batch::new(&examples, 0, 10);
        assert_eq!(batch.source, [5, 6, 1, 7, 1, 4]);
        assert_eq!(batch.target, [0, 9, 0, 8, 3]);
        assert_eq!(batch.labels, [9, 1, 8, 3, 1]);
        assert_eq!(batch.target_spans.lens, [2, 3, 0]);
        assert_eq!(batch.numbers, [10, 11, 12]);
        let rows = batch.rows_by_task();
        assert_eq!((rows.tasks, rows.of_example), (vec![2, 0], vec![0, 1, 0]));
        assert_eq!(batch.source_keys()[4], TokenKey { example: 11, position: 1 });
    }
}
