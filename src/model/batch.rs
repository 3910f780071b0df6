//! Batches: examples one after the other, without padding.
//!
//! ```text
//! examples   [5 6 1] -> [9 1],  [7 1] -> [8 3 1]          (input -> labels)
//! source     5 6 1 7 1          spans 0..3, 3..5
//! labels     9 1 8 3 1          spans 0..2, 2..5
//! target in  0 9 0 8 3          (labels shifted right behind the start id)
//!
//! causal     5 6 1 9 7 1 8 3    spans 0..4, 4..8: the input, then the labels but the last
//! read       _ _ * * _ * * *    label_rows: the tokens that a label follows
//! ```
//!
//! No kernel ever sees a padding token, so short examples cost what they are, and what an example
//! computes does not depend on who shares its batch. So every batch is packed: examples of different
//! tasks lie in one row of tokens, each attends to itself alone ([`Spans`]), stands at its own
//! positions from 0, and uses its own task's mixture ([`Segments`]).

use std::sync::Arc;

use super::Mixing;
use crate::kernels::ops::{Segments, Spans, TokenKey};

/// One example as ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// What the encoder sees; for a causal model the prompt, at least one id.
    pub input: Vec<u32>,
    /// What should be said, with the end id; empty in generation.
    pub labels: Vec<u32>,
    /// The task, below the adapter's `n_tasks`; unused without an adapter.
    pub task: u32,
    /// In inference, what is mixed instead of the task's own mixture; in training there must be none.
    pub mixing: Option<Mixing>,
}

impl Example {
    /// What is mixed for it in inference.
    pub fn mixing(&self) -> Mixing {
        self.mixing.clone().unwrap_or(Mixing::Task(self.task))
    }
}

/// How examples become a decoder's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The encoder sees the input, the decoder the labels behind a start id.
    EncoderDecoder {
        /// The id that the decoder begins with.
        start: u32,
    },
    /// There is only a decoder: the labels follow the input.
    Causal,
}

/// Examples that are computed together.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Ids for the encoder, `[source tokens]`; none for a causal model.
    pub source: Vec<u32>,
    /// Ids for the decoder, `[target tokens]`.
    pub target: Vec<u32>,
    /// What should be said, `[labels]`.
    pub labels: Vec<u32>,
    /// The target token that each label follows, `[labels]`; none: label i follows target token i.
    pub label_rows: Option<Vec<usize>>,
    /// Each example's source tokens.
    pub source_spans: Arc<Spans>,
    /// Each example's target tokens.
    pub target_spans: Arc<Spans>,
    /// Each example's labels.
    pub label_spans: Arc<Spans>,
    /// Each example's task.
    pub tasks: Vec<u32>,
    /// Each example's number within the optimiser step: what its random numbers are counted by.
    pub numbers: Vec<u32>,
}

impl Batch {
    /// Packs examples. `first` is the number of the first one within the optimiser step.
    ///
    /// # Panics
    /// If an example of a causal model has no input.
    pub fn new<'e>(
        examples: impl IntoIterator<Item = &'e Example>,
        layout: Layout,
        first: usize,
    ) -> Self {
        let examples: Vec<_> = examples.into_iter().collect();
        let spans = |of: &dyn Fn(&Example) -> usize| -> Arc<Spans> {
            Arc::new(Spans::packed(&examples.iter().map(|e| of(e)).collect::<Vec<_>>()))
        };
        let mut batch = Self {
            source: Vec::new(),
            target: Vec::new(),
            labels: examples.iter().flat_map(|e| e.labels.iter().copied()).collect(),
            label_rows: None,
            source_spans: spans(&|_| 0),
            target_spans: Arc::default(),
            label_spans: spans(&|e| e.labels.len()),
            tasks: examples.iter().map(|e| e.task).collect(),
            numbers: (first..first + examples.len()).map(|n| n as u32).collect(),
        };
        // What is read to say the labels: they themselves but the last.
        let said = |e: &Example| e.labels.len().saturating_sub(1);
        match layout {
            Layout::EncoderDecoder { start } => {
                for example in &examples {
                    batch.source.extend(&example.input);
                    batch.target.extend((!example.labels.is_empty()).then_some(start));
                    batch.target.extend(&example.labels[..said(example)]);
                }
                batch.source_spans = spans(&|e| e.input.len());
                batch.target_spans = Arc::clone(&batch.label_spans);
            }
            Layout::Causal => {
                let mut rows = Vec::with_capacity(batch.labels.len());
                for example in &examples {
                    assert!(!example.input.is_empty(), "a causal model begins with its input");
                    batch.target.extend(&example.input);
                    let first = batch.target.len() - 1;
                    rows.extend(first..first + example.labels.len());
                    batch.target.extend(&example.labels[..said(example)]);
                }
                batch.label_rows = Some(rows);
                batch.target_spans = spans(&|e| e.input.len() + said(e));
            }
        }
        batch
    }

    /// The number of examples.
    pub fn n(&self) -> usize {
        self.tasks.len()
    }

    /// Routing rows where every example has its own (the router samples).
    pub fn own_rows(&self) -> RoutingRows {
        let (tasks, n_rows) = (self.tasks.clone(), self.n());
        RoutingRows { tasks, n_rows, of_example: (0..n_rows).collect() }
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
        let n_rows = tasks.len();
        RoutingRows { tasks, n_rows, of_example }
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
    /// The task of each routing row, where they are tasks'; none of an engine's mixtures.
    pub tasks: Vec<u32>,
    /// Routing rows.
    pub n_rows: usize,
    /// The routing row of each example.
    pub of_example: Vec<usize>,
}

impl RoutingRows {
    /// The segments of a batch whose examples have these tokens.
    pub fn segments(&self, spans: &Spans) -> Arc<Segments> {
        Arc::new(Segments::new(&spans.lens, &self.of_example, self.n_rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_right_behind_the_start_id() {
        let examples = [
            Example { input: vec![5, 6, 1], labels: vec![9, 1], task: 2, mixing: None },
            Example { input: vec![7, 1], labels: vec![8, 3, 1], task: 0, mixing: None },
            Example { input: vec![4], labels: vec![], task: 2, mixing: None },
        ];
        let batch = Batch::new(&examples, Layout::EncoderDecoder { start: 0 }, 10);
        assert_eq!(batch.source, [5, 6, 1, 7, 1, 4]);
        assert_eq!(batch.target, [0, 9, 0, 8, 3]);
        assert_eq!(batch.labels, [9, 1, 8, 3, 1]);
        assert_eq!(batch.target_spans.lens, [2, 3, 0]);
        assert_eq!(batch.numbers, [10, 11, 12]);
        let rows = batch.rows_by_task();
        assert_eq!((rows.tasks, rows.of_example), (vec![2, 0], vec![0, 1, 0]));
        assert_eq!(batch.source_keys()[4], TokenKey { example: 11, position: 1 });
    }

    #[test]
    fn labels_follow_the_input_of_a_causal_model() {
        let examples = [
            Example { input: vec![5, 6, 1], labels: vec![9, 1], task: 2, mixing: None },
            Example { input: vec![7], labels: vec![8], task: 0, mixing: None },
            Example { input: vec![4, 3], labels: vec![], task: 2, mixing: None },
        ];
        let batch = Batch::new(&examples, Layout::Causal, 0);
        assert_eq!(batch.target, [5, 6, 1, 9, 7, 4, 3]);
        assert_eq!(batch.target_spans.lens, [4, 1, 2]);
        assert_eq!(batch.labels, [9, 1, 8]);
        assert_eq!(batch.label_rows.as_deref(), Some(&[2, 3, 4][..]));
        assert_eq!((batch.source.len(), &batch.source_spans.lens[..]), (0, &[0, 0, 0][..]));
        assert_eq!(batch.label_spans.lens, [2, 1, 0]);
    }
}
