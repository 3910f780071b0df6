//! Keys and values of sequences that are being decoded.
//!
//! ```text
//! rows of a layer's k (and v)    slot 0: 0 .. capacity | slot 1: capacity .. 2 capacity | ...
//!                                [=====len=====|  free ]
//! ```
//!
//! Every sequence has a slot of the same room and fills it at its own pace; a [`Step`] appends any
//! number of tokens to any of them: a whole prompt, or one token each. The room doubles when a slot
//! is full.

use std::sync::Arc;

use crate::{
    kernels::{
        Backend, Precision,
        ops::{CacheWrite, Gather, RelativeBias, Rotary, Segments, Spans},
    },
    tape::{Var, ops::KeyValue},
    tensor::Tensor,
};

/// Tokens that a slot has room for at first.
const FIRST_CAPACITY: usize = 64;

/// New tokens of some sequences.
pub struct Step<'a> {
    /// One sequence's new ids after the other's.
    pub ids: &'a [u32],
    /// Whose they are, each at most once.
    pub slots: &'a [usize],
    /// How many each gets, at least one.
    pub lens: &'a [usize],
    /// The routing rows of the new tokens.
    pub segments: &'a Arc<Segments>,
}

/// The state of a batch that is being decoded.
pub struct Decoding<B: Backend> {
    /// Own keys and values.
    pub(super) cache: Cache<B>,
    /// By layer: the encoder's output as keys and values, where there is an encoder.
    pub(super) cross: Vec<(Var<B>, Var<B>)>,
    /// Each slot's rows of `cross`.
    pub(super) source: Arc<Spans>,
    /// The score bias of every distance within the cache's room, where there is one.
    pub(super) bias: Option<RelativeBias<B>>,
    /// The angles of every position within the cache's room, where there are any.
    pub(super) rotary: Option<Rotary<B>>,
}

impl<B: Backend> Decoding<B> {
    /// Tokens of a slot so far.
    pub fn len(&self, slot: usize) -> usize {
        self.cache.lens[slot]
    }

    /// Whether a slot has no token yet.
    pub fn is_empty(&self, slot: usize) -> bool {
        self.len(slot) == 0
    }

    /// Makes slots `n i .. n (i + 1)` of slot i, which share its encoder output.
    ///
    /// # Panics
    /// If a slot has tokens already.
    pub fn fork(&mut self, backend: &B, n: usize) {
        let repeat = |values: &[usize]| -> Vec<usize> {
            values.iter().flat_map(|&value| std::iter::repeat_n(value, n)).collect()
        };
        let Spans { starts, lens } = self.source.as_ref();
        self.source = Arc::new(Spans { starts: repeat(starts), lens: repeat(lens) });
        self.cache.fork(backend, n);
    }

    /// Makes the second slot of each pair a copy of the first.
    pub fn copy_slots(&mut self, backend: &B, pairs: &[(usize, usize)]) {
        self.cache.copy_slots(backend, pairs);
    }

    /// Layer `layer`'s view of the encoder's output for these slots.
    pub(super) fn cross(&self, layer: usize, slots: &[usize]) -> KeyValue<B> {
        let (k, v) = &self.cross[layer];
        let spans = Spans {
            starts: slots.iter().map(|&i| self.source.starts[i]).collect(),
            lens: slots.iter().map(|&i| self.source.lens[i]).collect(),
        };
        KeyValue { k: k.clone(), v: v.clone(), spans: Arc::new(spans) }
    }
}

/// Keys and values of every layer.
pub(super) struct Cache<B: Backend> {
    layers: Vec<[Tensor<B>; 2]>,
    lens: Vec<usize>,
    capacity: usize,
}

/// Where a step's tokens are in a cache.
pub(super) struct Placed {
    /// Each sequence's new tokens.
    pub(super) queries: Arc<Spans>,
    /// Each sequence's rows of the cache, the new ones included.
    pub(super) keys: Arc<Spans>,
    /// Where each new token stands in its sequence.
    pub(super) positions: Vec<u32>,
    /// The last new token of each sequence; none where there is one each.
    pub(super) last: Option<Vec<usize>>,
    /// The row of the cache of each new token.
    rows: Vec<usize>,
}

impl<B: Backend> Cache<B> {
    /// `n_slots` empty slots of `n_layers` layers, each `width` wide.
    pub(super) fn new(backend: &B, n_layers: usize, width: usize, n_slots: usize) -> Self {
        let capacity = FIRST_CAPACITY;
        let room = || backend.zeros(n_slots * capacity, width, Precision::Activation);
        let layers = (0..n_layers).map(|_| [room(), room()]).collect();
        Self { layers, lens: vec![0; n_slots], capacity }
    }

    /// Tokens that every slot has room for.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for a step's tokens. True if the room grew: tables by position must follow.
    pub(super) fn place(&mut self, backend: &B, step: &Step<'_>) -> (Placed, bool) {
        let Step { ids, slots, lens, .. } = *step;
        assert_eq!((slots.len(), ids.len()), (lens.len(), lens.iter().sum()));
        let needed = slots.iter().zip(lens).map(|(&slot, len)| self.lens[slot] + len).max();
        let grew = needed.is_some_and(|needed| needed > self.capacity);
        if let (true, Some(needed)) = (grew, needed) {
            self.grow(backend, needed.next_power_of_two());
        }
        let mut placed = Placed {
            queries: Arc::new(Spans::packed(lens)),
            keys: Arc::default(),
            positions: Vec::with_capacity(ids.len()),
            last: None,
            rows: Vec::with_capacity(ids.len()),
        };
        let mut keys = Spans::default();
        for (&slot, &len) in slots.iter().zip(lens) {
            let (start, before) = (slot * self.capacity, self.lens[slot]);
            placed.positions.extend((before..before + len).map(|position| position as u32));
            placed.rows.extend(start + before..start + before + len);
            self.lens[slot] += len;
            keys.starts.push(start);
            keys.lens.push(self.lens[slot]);
        }
        placed.keys = Arc::new(keys);
        if lens.iter().any(|&len| len != 1) {
            let Spans { starts, lens } = placed.queries.as_ref();
            placed.last =
                Some(starts.iter().zip(lens).map(|(start, len)| start + len - 1).collect());
        }
        (placed, grew)
    }

    /// Writes a layer's keys and values of the new tokens, and gives its view of everything so far.
    pub(super) fn extend(
        &mut self,
        backend: &B,
        layer: usize,
        placed: &Placed,
        k: &Var<B>,
        v: &Var<B>,
    ) -> KeyValue<B> {
        for (cache, source) in self.layers[layer].iter_mut().zip([k, v]) {
            let (source, rows) = (source.tensor(), &placed.rows[..]);
            backend.cache_write(CacheWrite { cache, source, rows });
        }
        let [k, v] = &self.layers[layer];
        KeyValue {
            k: Var::constant(k.clone()),
            v: Var::constant(v.clone()),
            spans: Arc::clone(&placed.keys),
        }
    }

    fn fork(&mut self, backend: &B, n: usize) {
        assert!(self.lens.iter().all(|&len| len == 0), "slots with tokens");
        let n_slots = n * self.lens.len();
        for cache in self.layers.iter_mut().flatten() {
            *cache = backend.zeros(n_slots * self.capacity, cache.cols(), Precision::Activation);
        }
        self.lens = vec![0; n_slots];
    }

    fn copy_slots(&mut self, backend: &B, pairs: &[(usize, usize)]) {
        if pairs.is_empty() {
            return;
        }
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for &(source, target) in pairs {
            let len = self.lens[source];
            from.extend((0..len).map(|i| source * self.capacity + i));
            to.extend((0..len).map(|i| target * self.capacity + i));
            self.lens[target] = len;
        }
        for cache in self.layers.iter_mut().flatten() {
            let copy = backend.gather(Gather { x: cache, rows: &from });
            backend.cache_write(CacheWrite { cache, source: &copy, rows: &to });
        }
    }

    fn grow(&mut self, backend: &B, capacity: usize) {
        let n_slots = self.lens.len();
        let rows: Vec<usize> = (0..n_slots * self.capacity)
            .map(|row| row / self.capacity * capacity + row % self.capacity)
            .collect();
        for cache in self.layers.iter_mut().flatten() {
            let mut larger = backend.zeros(n_slots * capacity, cache.cols(), Precision::Activation);
            backend.cache_write(CacheWrite { cache: &mut larger, source: cache, rows: &rows });
            *cache = larger;
        }
        self.capacity = capacity;
    }
}
