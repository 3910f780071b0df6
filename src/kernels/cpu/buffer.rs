//! Buffers: 64-byte aligned memory that goes back to a pool when it is dropped.
//!
//! A training step asks for the same sizes again and again, so after the first step nothing is
//! allocated: a buffer that is dropped waits for the next request of its size. Memory from the
//! system arrives zeroed page by page when first touched; reuse also saves those page faults.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::{Pod, Zeroable};

/// One cache line, so that vectors start at one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[derive(Default)]
struct Shelves {
    by_lines: HashMap<usize, Vec<Vec<Line>>>,
    bytes: usize,
    peak_bytes: usize,
}

/// Where dropped buffers wait.
#[derive(Default)]
pub(super) struct Pool {
    shelves: Mutex<Shelves>,
    poison: bool,
}

impl Pool {
    /// A pool whose buffers start filled with NaN.
    pub(super) fn poisoned() -> Self {
        Self { poison: true, ..Self::default() }
    }

    /// A buffer of `bytes` bytes with whatever was in it.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Buffer {
        let n_lines = bytes.div_ceil(mem::size_of::<Line>());
        let reused = {
            let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
            let reused = shelves.by_lines.get_mut(&n_lines).and_then(Vec::pop);
            if reused.is_none() {
                shelves.bytes += n_lines * mem::size_of::<Line>();
                shelves.peak_bytes = shelves.peak_bytes.max(shelves.bytes);
            }
            reused
        };
        let mut lines = reused.unwrap_or_else(|| bytemuck::allocation::zeroed_vec(n_lines));
        if self.poison {
            bytemuck::cast_slice_mut(&mut lines).fill(0xFF_u8); // NaN as f32 and as bf16.
        }
        Buffer { lines, bytes, pool: Arc::clone(self) }
    }

    /// Bytes handed out or waiting, at their peak.
    pub(super) fn peak_bytes(&self) -> usize {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner).peak_bytes
    }
}

/// Memory of a tensor on the CPU.
pub struct Buffer {
    lines: Vec<Line>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes]
    }

    /// All bytes, for writing.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes]
    }

    /// As elements.
    pub(super) fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// As elements, for writing.
    pub(super) fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = mem::take(&mut self.lines);
        let mut shelves = self.pool.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.by_lines.entry(lines.len()).or_default().push(lines);
    }
}
