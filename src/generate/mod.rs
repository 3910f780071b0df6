//! Inference: an engine that evaluates and generates.
//!
//! An [`Engine`] is made for a set of tasks and a capacity (the most rows that it decodes together).
//! Both fix how it computes: the mixtures are formed once, the routed LoRA runs one way, and sums
//! are ordered one way. So a row's bits never depend on which rows are beside it.

mod greedy;

use std::collections::HashMap;

pub use greedy::GenerateOptions;

use crate::{
    kernels::{
        Backend,
        ops::{Noise, Order},
        planner::Mode,
    },
    model::{Adapter, Batch, Example, Model, batch::RoutingRows, network::Sides},
    tape::{Adapted, Mixture, Tape},
};

/// Up to this capacity, decoding streams the weights in dot products.
const DOT_ROWS: usize = 16;

/// A base, maybe with an adapter, ready to compute.
pub struct Engine<'m, B: Backend> {
    model: &'m Model<B>,
    adapter: Option<Attached<'m, B>>,
    capacity: usize,
}

/// An adapter with the mixtures of an engine's tasks.
struct Attached<'m, B: Backend> {
    adapter: &'m Adapter<B>,
    mixture: Mixture<B>,
    mode: Mode,
    row_of_task: HashMap<u32, usize>,
    tasks: Vec<u32>,
}

impl<'m, B: Backend> Engine<'m, B> {
    /// An engine for examples of these tasks, up to `capacity` at a time. Without an adapter tasks
    /// do not matter.
    ///
    /// # Panics
    /// If a task is not below the adapter's `n_tasks`, or `capacity` is 0.
    pub fn new(
        model: &'m Model<B>,
        adapter: Option<&'m Adapter<B>>,
        tasks: impl IntoIterator<Item = u32>,
        capacity: usize,
    ) -> Self {
        assert!(capacity > 0, "an engine that holds no row");
        let adapter = adapter.map(|adapter| {
            let mut tasks: Vec<u32> = tasks.into_iter().collect();
            tasks.sort_unstable();
            tasks.dedup();
            // By the adapter, not by who is here: a row's bits must not depend on other rows' tasks.
            let mode = Mode::for_engine(adapter.pair_bytes(adapter.config().n_tasks));
            let rows = RoutingRows { tasks, of_example: Vec::new() };
            let keep = mode == Mode::Mixed;
            let mixture = adapter.mixture(model.backend(), &rows, Noise::Off, keep);
            let tasks = rows.tasks;
            let row_of_task = tasks.iter().enumerate().map(|(row, &task)| (task, row)).collect();
            Attached { adapter, mixture, mode, row_of_task, tasks }
        });
        Self { model, adapter, capacity }
    }

    /// The most rows that are decoded together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The nll of every label token of every example, in nats.
    pub fn nll(&self, examples: &[&Example]) -> Vec<Vec<f64>> {
        self.model.backend().scope(|| {
            let mut all = Vec::with_capacity(examples.len());
            for chunk in examples.chunks(self.capacity) {
                let (batch, rows) = self.batch(chunk);
                let sides = Sides::new(&batch, &rows, None);
                let mut tape = self.tape(Order::Panel);
                let nll = self.model.network().loss(&mut tape, &batch, &sides, 0.0);
                let spans = &batch.label_spans;
                all.extend(
                    spans.starts.iter().zip(&spans.lens).map(|(&s, &n)| nll[s..s + n].to_vec()),
                );
            }
            all
        })
    }

    fn batch(&self, examples: &[&Example]) -> (Batch, RoutingRows) {
        let batch = Batch::new(examples.iter().copied(), self.model.layout(), 0);
        let rows = match &self.adapter {
            Some(attached) => RoutingRows {
                tasks: attached.tasks.clone(),
                of_example: batch.tasks.iter().map(|task| attached.row_of_task[task]).collect(),
            },
            None => RoutingRows { tasks: vec![0], of_example: vec![0; batch.n()] },
        };
        (batch, rows)
    }

    fn tape(&self, order: Order) -> Tape<'_, B> {
        Tape::inference(self.model.backend(), self.adapted(), order)
    }

    fn adapted(&self) -> Option<Adapted<'_, B>> {
        self.adapter
            .as_ref()
            .map(|attached| attached.adapter.on_tape(&attached.mixture, Some(attached.mode)))
    }
}
