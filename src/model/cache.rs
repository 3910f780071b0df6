//! Keys and values of sequences that are being decoded.
//!
//! ```text
//! rows of a layer's k (and v)    slot 0: 0 .. capacity | slot 1: capacity .. 2 capacity | ...
//!                                [=====len=====|  free ]
//! ```
//!
//! Every sequence has a slot of the same room and fills it at its own pace; a [`Step`] appends any
//! number of tokens to any of them: a whole prompt, or one token each. A slot that is emptied is the
//! next sequence's. What the caller says will be needed is reserved at once, so nothing is copied
//! when sequences grow; memory is taken from the system only where something is written. Beyond
//! `MAX_RESERVED_BYTES` the room doubles when a slot is full.

use std::{ops::Range, sync::Arc};

use crate::{
    kernels::{
        Backend, Precision,
        ops::{CacheWrite, Gather, Ids, RelativeBias, Rotary, Segments, Spans},
    },
    model::network::Side,
    tape::{
        Tape, Var,
        ops::{FrozenLinear, KeyValue},
    },
    tensor::Tensor,
};

/// Tokens that a slot has room for at least, and positions that tables have at least.
const LEAST_CAPACITY: usize = 64;

/// The most that is reserved before it is needed.
const MAX_RESERVED_BYTES: usize = 1 << 30;

/// New tokens of some sequences.
pub struct Step<'a, B: Backend> {
    /// One sequence's new ids after the other's.
    pub ids: Ids<'a, B>,
    /// Whose they are, each at most once.
    pub slots: &'a [usize],
    /// How many each gets, at least one.
    pub lens: &'a [usize],
    /// The routing rows of the new tokens.
    pub segments: &'a Arc<Segments>,
}

/// What a cache must hold.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Sequences at a time.
    pub slots: usize,
    /// Tokens that the longest sequence may have.
    pub tokens: usize,
    /// Tokens of the longest source; unused without an encoder.
    pub source: usize,
}

/// Sequences that are being decoded.
pub struct Decoding<B: Backend> {
    /// Own keys and values.
    pub(super) cache: Cache<B>,
    /// The encoder's output as keys and values, where there is an encoder.
    pub(super) cross: Option<Cache<B>>,
    /// By slot: the slot of `cross` that it reads.
    source_of: Vec<usize>,
    /// The score bias of every distance within [`Decoding::positions`], where there is one.
    pub(super) bias: Option<RelativeBias<B>>,
    /// The angles (without and with a window) of every position within [`Decoding::positions`], where there are any.
    pub(super) rotary: Option<[Rotary<B>; 2]>,
    /// Positions that the tables have.
    positions: usize,
}

impl<B: Backend> Decoding<B> {
    /// Empty slots of `n_layers` layers, each `width` wide, maybe with as many layers of an encoder's
    /// output.
    pub(super) fn new(
        backend: &B,
        [n_layers, width]: [usize; 2],
        has_encoder: bool,
        room: Room,
    ) -> Self {
        let Room { slots, tokens, source } = room;
        Self {
            cache: Cache::new(backend, [n_layers, width], slots, tokens),
            cross: has_encoder.then(|| Cache::new(backend, [n_layers, width], slots, source)),
            source_of: (0..slots).collect(),
            bias: None,
            rotary: None,
            positions: 0,
        }
    }

    /// Tokens of a slot so far.
    pub fn len(&self, slot: usize) -> usize {
        self.cache.lens[slot]
    }

    /// Whether a slot has no token yet.
    pub fn is_empty(&self, slot: usize) -> bool {
        self.len(slot) == 0
    }

    /// Empties slots, which will share the encoder's output for one example.
    pub fn vacate(&mut self, slots: Range<usize>) {
        for slot in slots.clone() {
            self.cache.lens[slot] = 0;
            self.source_of[slot] = slots.start;
        }
        if let Some(cross) = &mut self.cross {
            cross.lens[slots.start] = 0;
        }
    }

    /// Makes the second slot of each pair a copy of the first.
    pub fn copy_slots(&mut self, backend: &B, pairs: &[(usize, usize)]) {
        self.cache.copy_slots(backend, pairs);
    }

    /// Writes the encoder's output for the examples of a batch, as keys and values of each layer's
    /// linears; example i is decoded in `slots[i]`.
    pub(super) fn write_source<'m>(
        &mut self,
        tape: &mut Tape<'m, B>,
        encoded: &Var<B>,
        source: &Side,
        slots: &[usize],
        layers: impl Iterator<Item = [&'m FrozenLinear<B>; 2]>,
    ) {
        let Some(cross) = &mut self.cross else { unreachable!("a network without an encoder") };
        let backend = tape.backend();
        let placed = cross.place(backend, slots, &source.spans.lens);
        for (layer, linears) in layers.enumerate() {
            let [k, v] = tape.linears(encoded, linears, &source.segments);
            cross.write(backend, layer, &placed, &k, &v);
        }
    }

    /// How many positions the tables must have for a step that was placed; none if they have them.
    pub(super) fn more_positions(&mut self) -> Option<usize> {
        let longest = self.cache.lens.iter().copied().max().unwrap_or(0);
        (longest > self.positions).then(|| {
            self.positions = longest.next_power_of_two().max(LEAST_CAPACITY);
            self.positions
        })
    }

    /// Layer `layer`'s view of the encoder's output for these slots.
    pub(super) fn cross(&self, layer: usize, slots: &[usize]) -> KeyValue<B> {
        let Some(cross) = &self.cross else { unreachable!("a network without an encoder") };
        cross.view(layer, slots.iter().map(|&slot| self.source_of[slot]))
    }
}

/// Keys and values of every layer.
pub(super) struct Cache<B: Backend> {
    layers: Vec<[Tensor<B>; 2]>,
    lens: Vec<usize>,
    capacity: usize,
}

/// Where new tokens are in a cache.
pub(super) struct Placed {
    /// Each sequence's new tokens.
    pub(super) queries: Arc<Spans>,
    /// Where each new token stands in its sequence.
    pub(super) positions: Vec<u32>,
    /// The last new token of each sequence; none where there is one each.
    pub(super) last: Option<Vec<usize>>,
    slots: Vec<usize>,
    /// The row of the cache of each new token.
    rows: Vec<usize>,
}

impl<B: Backend> Cache<B> {
    /// Empty slots with room for `tokens`, or as many of them as may be reserved.
    fn new(backend: &B, [n_layers, width]: [usize; 2], n_slots: usize, tokens: usize) -> Self {
        let bytes_of_token = n_slots * n_layers * 2 * width * size_of::<f32>();
        let most = MAX_RESERVED_BYTES / bytes_of_token.max(1);
        let capacity = tokens.min(most).max(LEAST_CAPACITY);
        let room = || backend.room(n_slots * capacity, width, Precision::Activation);
        let layers = (0..n_layers).map(|_| [room(), room()]).collect();
        Self { layers, lens: vec![0; n_slots], capacity }
    }

    /// Makes room for `lens` new tokens of `slots`.
    pub(super) fn place(&mut self, backend: &B, slots: &[usize], lens: &[usize]) -> Placed {
        assert_eq!(slots.len(), lens.len());
        let needed = slots.iter().zip(lens).map(|(&slot, len)| self.lens[slot] + len).max();
        if let Some(needed) = needed.filter(|&needed| needed > self.capacity) {
            self.grow(backend, needed.next_power_of_two());
        }
        let queries = Spans::packed(lens);
        let mut positions = Vec::new();
        let mut rows = Vec::new();
        for (&slot, &len) in slots.iter().zip(lens) {
            let (start, before) = (slot * self.capacity, self.lens[slot]);
            positions.extend((before..before + len).map(|position| position as u32));
            rows.extend(start + before..start + before + len);
            self.lens[slot] += len;
        }
        let last = lens.iter().any(|&len| len != 1).then(|| {
            queries
                .starts
                .iter()
                .zip(lens)
                .map(|(start, len)| (start + len).saturating_sub(1))
                .collect()
        });
        Placed { queries: Arc::new(queries), positions, last, slots: slots.to_vec(), rows }
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
        self.write(backend, layer, placed, k, v);
        self.view(layer, placed.slots.iter().copied())
    }

    fn write(&mut self, backend: &B, layer: usize, placed: &Placed, k: &Var<B>, v: &Var<B>) {
        for (cache, source) in self.layers[layer].iter_mut().zip([k, v]) {
            let (source, rows) = (source.tensor(), &placed.rows[..]);
            backend.cache_write(CacheWrite { cache, source, rows });
        }
    }

    /// A layer's keys and values of slots.
    fn view(&self, layer: usize, slots: impl Iterator<Item = usize>) -> KeyValue<B> {
        let mut spans = Spans::default();
        for slot in slots {
            spans.starts.push(slot * self.capacity);
            spans.lens.push(self.lens[slot]);
        }
        let [k, v] = &self.layers[layer];
        KeyValue {
            k: Var::constant(k.clone()),
            v: Var::constant(v.clone()),
            spans: Arc::new(spans),
        }
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

    /// Moves what there is to slots of a larger room.
    fn grow(&mut self, backend: &B, capacity: usize) {
        let rows_of = |capacity: usize| -> Vec<usize> {
            let slots = self.lens.iter().enumerate();
            slots.flat_map(|(slot, &len)| slot * capacity..slot * capacity + len).collect()
        };
        let (from, to) = (rows_of(self.capacity), rows_of(capacity));
        let n_slots = self.lens.len();
        for cache in self.layers.iter_mut().flatten() {
            let filled = backend.gather(Gather { x: cache, rows: &from });
            let mut larger = backend.room(n_slots * capacity, cache.cols(), Precision::Activation);
            backend.cache_write(CacheWrite { cache: &mut larger, source: &filled, rows: &to });
            *cache = larger;
        }
        self.capacity = capacity;
    }
}
