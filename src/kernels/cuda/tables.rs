//! What kernels need to know of a batch, uploaded once: the routing row of each token, spans, keys.
//!
//! Every operation of a step asks for the same few tables, so they are kept by what they are made of,
//! until the step ends; one that the next step makes again is kept for good. So what differs in every
//! step (where tokens stand in a cache) does not pile up, and gets the same addresses in every step.
//! A kernel never searches: segments become a routing row a token, spans become a list of tiles.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytemuck::{NoUninit, Pod, Zeroable};

use super::{Buffer, Cuda, narrow};
use crate::kernels::ops::{self, Segments, Spans, TokenKey};

/// Tables that are kept; more than any step needs, so that a run of distinct batches stays bounded.
const MAX_TABLES: usize = 512;

/// Uploaded tables by content.
#[derive(Default)]
pub(super) struct Tables(Mutex<State>);

#[derive(Default)]
struct State {
    tables: HashMap<Source, Table>,
    /// Whether anybody asked for one in this step.
    is_used: bool,
}

/// A table, or that there was one in the last step.
struct Table {
    buffer: Option<Arc<Buffer>>,
    /// Whether two steps in a row made it.
    is_kept: bool,
}

impl Tables {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // Each change leaves it valid.
    }

    /// Lets go of what only the step that ends here needed.
    pub(super) fn end_step(&self) {
        let mut state = self.state();
        if std::mem::take(&mut state.is_used) {
            state.tables.retain(|_, table| table.is_kept || table.buffer.take().is_some());
        }
    }
}

/// What a table is made of.
#[derive(PartialEq, Eq, Hash)]
enum Source {
    TokenRows(Vec<usize>),
    RowRuns(Vec<usize>),
    RunTiles(Vec<usize>, u32),
    Spans(Vec<usize>),
    Tiles(Vec<usize>, u32),
    /// The address of the keys, which the entry keeps alive.
    TokenKeys(TokenKeys),
    Words(Vec<u64>),
    Indices(Vec<u32>),
}

/// Compared by address: a batch has one list, shared by all its dropouts.
struct TokenKeys(Arc<[TokenKey]>);

impl PartialEq for TokenKeys {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for TokenKeys {}
impl std::hash::Hash for TokenKeys {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.as_ptr().hash(state);
    }
}

/// The runs of segments as numbers.
fn runs(segments: &Segments) -> Vec<usize> {
    let runs = segments.iter().flat_map(|(run, row)| [run.start, run.end, row]);
    runs.chain([segments.n_rows()]).collect()
}

impl Cuda {
    fn table<T: NoUninit>(&self, source: Source, make: impl FnOnce() -> Vec<T>) -> Arc<Buffer> {
        let mut state = self.tables.state();
        state.is_used = true;
        let last = state.tables.get(&source);
        if let Some(buffer) = last.and_then(|table| table.buffer.as_ref()) {
            return Arc::clone(buffer);
        }
        let is_kept = last.is_some();
        if state.tables.len() >= MAX_TABLES {
            state.tables.clear();
        }
        let buffer = Arc::new(self.buffer_of(&make()));
        state.tables.insert(source, Table { buffer: Some(Arc::clone(&buffer)), is_kept });
        buffer
    }

    /// The routing row of each token, `u32`.
    pub(super) fn token_rows(&self, segments: &Segments) -> Arc<Buffer> {
        self.table(Source::TokenRows(runs(segments)), || {
            segments.iter().flat_map(|(run, row)| run.map(move |_| narrow(row))).collect()
        })
    }

    /// For each routing row, where its runs start in a list of `(first token, length)`, and one past
    /// the last; then that list. Both `u32`, the list from an even word on.
    pub(super) fn row_runs(&self, segments: &Segments) -> RowRuns {
        let starts = (segments.n_rows() + 1).next_multiple_of(2);
        let table = self.table(Source::RowRuns(runs(segments)), || {
            let mut words = Vec::with_capacity(starts + 2 * segments.n());
            let mut list = Vec::new();
            for row in 0..segments.n_rows() {
                words.push(narrow(list.len() / 2));
                let own = segments.iter().filter(|&(_, run_row)| run_row == row);
                list.extend(own.flat_map(|(run, _)| [narrow(run.start), narrow(run.len())]));
            }
            words.push(narrow(list.len() / 2));
            words.resize(starts, 0);
            words.extend(list);
            words
        });
        RowRuns { runs_offset: 4 * starts as u64, table }
    }

    /// `(first token, tokens, routing row)` of each tile of at most `height` tokens of one run, and their
    /// number.
    pub(super) fn run_tiles(&self, segments: &Segments, height: u32) -> (Arc<Buffer>, usize) {
        let tiles = || {
            segments.iter().flat_map(move |(run, row)| {
                let end = run.end;
                run.step_by(height as usize)
                    .map(move |first| [first, (end - first).min(height as usize), row])
            })
        };
        let table = self.table(Source::RunTiles(runs(segments), height), || {
            tiles().map(|tile| tile.map(narrow)).collect::<Vec<[u32; 3]>>()
        });
        (table, tiles().count())
    }

    /// `(first query, queries, first key, keys)` of each sequence, `u32`.
    pub(super) fn spans(&self, queries: &Spans, keys: &Spans) -> Arc<Buffer> {
        let numbers = [&queries.starts, &queries.lens, &keys.starts, &keys.lens];
        let all = |sequence: usize| numbers.map(|numbers| numbers[sequence]);
        let source = (0..queries.n()).flat_map(all).collect();
        self.table(Source::Spans(source), || {
            (0..queries.n()).flat_map(|sequence| all(sequence).map(narrow)).collect()
        })
    }

    /// `(sequence, first row)` of each tile of `height` rows, and their number.
    pub(super) fn tiles(&self, lens: &[usize], height: u32) -> (Arc<Buffer>, usize) {
        let n = lens.iter().map(|len| len.div_ceil(height as usize)).sum();
        let table = self.table(Source::Tiles(lens.to_vec(), height), || {
            let tiles = lens.iter().enumerate().flat_map(|(sequence, &len)| {
                (0..len).step_by(height as usize).map(move |row| [narrow(sequence), narrow(row)])
            });
            tiles.collect::<Vec<[u32; 2]>>()
        });
        (table, n)
    }

    /// Any numbers.
    pub(super) fn words(&self, words: impl Iterator<Item = u64> + Clone) -> Arc<Buffer> {
        self.table(Source::Words(words.clone().collect()), || words.collect::<Vec<u64>>())
    }

    /// Rows or positions, `u32`.
    pub(super) fn indices(&self, indices: impl Iterator<Item = u32>) -> Arc<Buffer> {
        let indices: Vec<u32> = indices.collect();
        self.table(Source::Indices(indices.clone()), || indices)
    }

    /// A dropout as kernels get it. The table must live until the launch is queued.
    pub(super) fn dropout_arg(&self, dropout: Option<&ops::Dropout>, rows: usize) -> DropoutTable {
        let Some(dropout) = dropout else {
            return DropoutTable { arg: DropoutArg::zeroed(), _tokens: None };
        };
        assert_eq!(dropout.tokens.len(), rows, "a key for each token");
        let source = Source::TokenKeys(TokenKeys(Arc::clone(&dropout.tokens)));
        let tokens = self.table(source, || {
            let keys = dropout.tokens.iter().map(|key| [key.example, key.position]);
            keys.collect::<Vec<[u32; 2]>>()
        });
        let arg = DropoutArg {
            tokens: tokens.address(),
            key: dropout.key.words(),
            site: dropout.site,
            threshold: dropout.threshold(),
            scale: dropout.scale(),
            padding: 0,
        };
        DropoutTable { arg, _tokens: Some(tokens) }
    }
}

/// See [`Cuda::row_runs`].
pub(super) struct RowRuns {
    table: Arc<Buffer>,
    runs_offset: u64,
}

impl RowRuns {
    pub(super) fn row_segments(&self) -> u64 {
        self.table.address()
    }

    pub(super) fn row_runs(&self) -> u64 {
        self.table.address() + self.runs_offset
    }
}

/// A dropout as kernels get it, with what it points to.
pub(super) struct DropoutTable {
    pub(super) arg: DropoutArg,
    _tokens: Option<Arc<Buffer>>,
}

/// `Dropout` of `cuda/philox.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct DropoutArg {
    tokens: u64,
    key: [u32; 2],
    site: u32,
    threshold: u32,
    scale: f32,
    padding: u32,
}
