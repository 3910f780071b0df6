//! Inference: an engine that evaluates and generates.
//!
//! An [`Engine`] is made for a set of mixtures (tasks, most of all) and a capacity (the most rows that it decodes together).
//! Both fix how it computes: the mixtures are formed once, the routed LoRA runs one way, and sums
//! are ordered one way. So a row's bits never depend on which rows are beside it.

mod beam;
mod decode;
mod options;
mod sample;
mod scores;
mod stepper;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
};

pub use options::{EarlyStopping, GenerateOptions};

use crate::{
    error::{Error, Result},
    kernels::{Backend, ops::Order, planner::Mode},
    model::{Adapter, Batch, Example, Mixing, Model, batch::RoutingRows, network::Sides},
    tape::{Adapted, Mixture, Tape},
};

/// Up to this capacity, decoding streams the weights in dot products.
const DOT_ROWS: usize = 16;

/// The most bytes of mixed pairs that an engine keeps for examples with mixtures of their own.
const MAX_PAIRS_BYTES: usize = 4 << 30;

/// How an adapter runs: by itself, not by who is here. A row's bits must not depend on other rows'
/// mixtures.
fn mode<B: Backend>(adapter: &Adapter<B>) -> Mode {
    Mode::for_engine(adapter.pair_bytes(adapter.config().n_tasks))
}

/// A base, maybe with an adapter, ready to compute.
///
/// Its functions have no errors. On a GPU a fault unwinds through them: [`catch_faults`](crate::kernels::cuda::catch_faults)
/// makes it an error.
///
/// # Panics
/// Those that compute, if an example fails [`Model::check_example`], or is mixed otherwise than those that the engine was
/// made for.
pub struct Engine<'m, B: Backend> {
    model: &'m Model<B>,
    adapter: Option<Attached<'m, B>>,
    capacity: usize,
}

/// A sequence that was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// New tokens, with the end token where one came.
    pub ids: Vec<u32>,
    /// A beam's score: its tokens' log-probabilities over its length to the length penalty.
    pub score: Option<f64>,
}

/// An adapter with the mixtures of an engine.
struct Attached<'m, B: Backend> {
    adapter: &'m Adapter<B>,
    mixture: Mixture<B>,
    mode: Mode,
    row_of: HashMap<Mixing, usize>,
}

impl<B: Backend> fmt::Debug for Engine<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("model", self.model)
            .field("adapter", &self.adapter.as_ref().map(|attached| attached.adapter))
            .field("capacity", &self.capacity)
            .finish()
    }
}

impl<B: Backend> Attached<'_, B> {
    /// The routing row of an example.
    fn row(&self, example: &Example) -> usize {
        let mixing = example.mixing();
        let row = self.row_of.get(&mixing);
        *row.unwrap_or_else(|| panic!("the engine was not made for examples of {mixing:?}"))
    }
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
        // Without an adapter nothing is mixed.
        let tasks: BTreeSet<u32> =
            adapter.map_or_else(BTreeSet::new, |_| tasks.into_iter().collect());
        let mixings = tasks.into_iter().map(Mixing::Task).collect();
        Self::with_mixings(model, adapter, mixings, capacity)
    }

    /// An engine for these examples and others that are mixed like one of them.
    ///
    /// # Errors
    /// If the examples have so many different mixtures that their pairs would not fit in memory.
    ///
    /// # Panics
    /// If [`Mixing::check`] fails for an example's mixing, or `capacity` is 0.
    pub fn for_examples<'e>(
        model: &'m Model<B>,
        adapter: Option<&'m Adapter<B>>,
        examples: impl IntoIterator<Item = &'e Example>,
        capacity: usize,
    ) -> Result<Self> {
        let mut seen = HashSet::new();
        let mut mixings: Vec<Mixing> = Vec::new();
        for example in examples {
            let mixing = example.mixing();
            if !seen.contains(&mixing) {
                seen.insert(mixing.clone());
                mixings.push(mixing);
            }
        }
        if let Some(adapter) = adapter
            && mode(adapter) == Mode::Mixed
            && adapter.pair_bytes(mixings.len()) > MAX_PAIRS_BYTES
        {
            return Err(Error::Config(format!(
                "the rows have {} different mixtures, whose matrices take {} MiB; at most {} MiB are kept: split the file",
                mixings.len(),
                adapter.pair_bytes(mixings.len()) >> 20,
                MAX_PAIRS_BYTES >> 20
            )));
        }
        Ok(Self::with_mixings(model, adapter, mixings, capacity))
    }

    fn with_mixings(
        model: &'m Model<B>,
        adapter: Option<&'m Adapter<B>>,
        mixings: Vec<Mixing>,
        capacity: usize,
    ) -> Self {
        assert!(capacity > 0, "an engine that holds no row");
        let adapter = adapter.map(|adapter| {
            let mode = mode(adapter);
            let keep = mode == Mode::Mixed;
            let mixture = adapter.mixture_of(model.backend(), &mixings, keep);
            let row_of = mixings.into_iter().enumerate().map(|(row, m)| (m, row)).collect();
            Attached { adapter, mixture, mode, row_of }
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
                let nll = self.model.backend().numbers(&nll);
                let spans = &batch.label_spans;
                all.extend(
                    spans.starts.iter().zip(&spans.lens).map(|(&s, &n)| nll[s..s + n].to_vec()),
                );
            }
            all
        })
    }

    /// The logits of every label token of an example, `[labels, vocabulary]`.
    pub fn logits(&self, example: &Example) -> Vec<f64> {
        self.model.backend().scope(|| {
            let (batch, rows) = self.batch(&[example]);
            let sides = Sides::new(&batch, &rows, None);
            let mut tape = self.tape(Order::Panel);
            self.model.network().logits(&mut tape, &batch, &sides)
        })
    }

    /// The best continuation of each example: new tokens only, with the end token where one came; an
    /// output ends where the model's positions end. Up to [`Engine::capacity`] sequences are decoded
    /// together; one that ends makes room for one that waits. `on_token` sees each token as it is
    /// made, the example's index and the id; a beam search's only at its end.
    ///
    /// # Panics
    /// If [`GenerateOptions::check`] fails.
    pub fn generate(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
        on_token: impl FnMut(usize, u32) + Send,
    ) -> Vec<Vec<u32>> {
        let options = GenerateOptions { num_return_sequences: 1, ..options.clone() };
        let all = self.generate_sequences(examples, &options, on_token);
        let first = |sequences: Vec<Generated>| sequences.into_iter().next();
        all.into_iter().map(|s| first(s).map_or_else(Vec::new, |generated| generated.ids)).collect()
    }

    /// `num_return_sequences` continuations of each example, a beam search's best first.
    /// `on_token` as in [`Engine::generate`], of an example's first sequence.
    ///
    /// # Panics
    /// If [`GenerateOptions::check`] fails.
    pub fn generate_sequences(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
        mut on_token: impl FnMut(usize, u32) + Send,
    ) -> Vec<Vec<Generated>> {
        if let Err(error) = options.check() {
            panic!("{error}");
        }
        if options.max_new_tokens == 0 {
            let empty = Generated { ids: Vec::new(), score: None };
            return vec![vec![empty; options.num_return_sequences]; examples.len()];
        }
        let n = options.num_return_sequences;
        self.model.backend().scope(|| {
            if options.num_beams > 1 {
                return self.beam_search(examples, options, &mut |i, ids| {
                    ids.iter().for_each(|&id| on_token(i, id));
                });
            }
            let sequences: Vec<(usize, usize)> =
                (0..examples.len()).flat_map(|i| (0..n).map(move |j| (i, j))).collect();
            let mut told = |k: usize, id| {
                if let (i, 0) = sequences[k] {
                    on_token(i, id);
                }
            };
            let mut generated = self.decode(examples, &sequences, options, &mut told).into_iter();
            examples.iter().map(|_| generated.by_ref().take(n).collect()).collect()
        })
    }

    fn batch(&self, examples: &[&Example]) -> (Batch, RoutingRows) {
        let batch = Batch::new(examples.iter().copied(), self.model.layout(), 0);
        let rows = match &self.adapter {
            Some(attached) => RoutingRows {
                tasks: Vec::new(),
                n_rows: attached.row_of.len(),
                of_example: examples.iter().map(|example| attached.row(example)).collect(),
            },
            None => RoutingRows { tasks: Vec::new(), n_rows: 1, of_example: vec![0; batch.n()] },
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
