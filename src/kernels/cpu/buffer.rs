//! Buffers: 64-byte aligned memory that goes back to a pool when it is dropped.
//!
//! A training step asks for the same sizes again and again, so after the first step little is
//! allocated: a buffer that is dropped waits for the next request of its size. Large ones are mapped, and
//! memory from the system arrives zeroed page by page when first touched; reuse also saves those page faults.
//!
//! Ragged batches have new sizes at every step. So sizes are rounded up to an eighth of their power of
//! two, and when what waits would take the total past an eighth more than was ever in use at once,
//! what has waited longest is given back to the system. Equal steps allocate nothing where their buffers fit
//! that bound together; those of different sizes at different times, as with checkpointing, do not always.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

use crate::tensor::BytesMut;

/// One cache line, so that vectors start at one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes from which on a buffer is mapped.
const MAPPED_BYTES: usize = 1 << 20;

/// Zeroed memory of whole lines.
enum Lines {
    /// The allocator zeroes what it aligns to a line, and so takes all of its pages.
    Allocated(Vec<Line>),
    Mapped(MmapMut),
}

impl Lines {
    /// Of a [`size_class`].
    ///
    /// # Panics
    /// Where there is no memory.
    fn new(n_lines: usize) -> Self {
        let bytes = n_lines * size_of::<Line>();
        if bytes < MAPPED_BYTES {
            return Self::Allocated(bytemuck::allocation::zeroed_vec(n_lines));
        }
        match MmapMut::map_anon(bytes) {
            Ok(map) => Self::Mapped(map),
            Err(error) => panic!("no memory for {bytes} bytes: {error}"),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Allocated(lines) => bytemuck::cast_slice(lines),
            Self::Mapped(map) => map,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Allocated(lines) => bytemuck::cast_slice_mut(lines),
            Self::Mapped(map) => map,
        }
    }

    fn len(&self) -> usize {
        self.bytes().len()
    }
}

#[derive(Default)]
struct Shelves {
    /// The buffers of each size, those that have waited longest first.
    by_lines: HashMap<usize, Vec<Waiting>>,
    /// Buffers that were ever dropped.
    n_dropped: u64,
    /// Handed out now.
    used_bytes: usize,
    /// Most that was ever handed out at once.
    peak_used_bytes: usize,
    /// Waiting.
    waiting_bytes: usize,
    /// Most that was ever handed out and waiting.
    peak_bytes: usize,
}

struct Waiting {
    lines: Lines,
    /// How many were dropped before it.
    since: u64,
}

impl Shelves {
    /// A waiting buffer of `n_lines`, if there is one, handed out; makes room for a new one if not.
    fn take(&mut self, n_lines: usize) -> Option<Lines> {
        let bytes = n_lines * mem::size_of::<Line>();
        if let Some(reused) = self.by_lines.get_mut(&n_lines).and_then(Vec::pop) {
            self.waiting_bytes -= bytes;
            self.hand_out(bytes);
            return Some(reused.lines);
        }
        let used = self.used_bytes + bytes;
        while used + self.waiting_bytes > used.max(self.peak_used_bytes) / 8 * 9 {
            let oldest = self.by_lines.values_mut().filter(|waiting| !waiting.is_empty());
            let Some(oldest) = oldest.min_by_key(|waiting| waiting[0].since) else { break };
            self.waiting_bytes -= oldest.remove(0).lines.len();
        }
        None
    }

    /// Counts bytes that are in use from now on.
    fn hand_out(&mut self, bytes: usize) {
        self.used_bytes += bytes;
        self.peak_used_bytes = self.peak_used_bytes.max(self.used_bytes);
        self.peak_bytes = self.peak_bytes.max(self.used_bytes + self.waiting_bytes);
    }

    /// Puts a buffer back.
    fn put(&mut self, lines: Lines) {
        let bytes = lines.len();
        self.used_bytes -= bytes;
        self.waiting_bytes += bytes;
        self.n_dropped += 1;
        let since = self.n_dropped;
        self.by_lines.entry(bytes / size_of::<Line>()).or_default().push(Waiting { lines, since });
    }
}

/// Lines rounded up to an eighth of their power of two.
fn size_class(n_lines: usize) -> usize {
    let step = (n_lines.next_power_of_two() / 16).max(1);
    n_lines.next_multiple_of(step)
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

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `bytes` bytes with whatever was in it.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Buffer {
        let n_lines = size_class(bytes.div_ceil(mem::size_of::<Line>()));
        let reused = self.shelves().take(n_lines);
        let mut lines = reused.unwrap_or_else(|| {
            let lines = Lines::new(n_lines);
            // Not before it is there: a panic for want of memory leaves the shelves as they were.
            self.shelves().hand_out(lines.len());
            lines
        });
        if self.poison {
            lines.bytes_mut().fill(0xFF_u8); // NaN as f32 and as bf16.
        }
        Buffer(Memory::Pooled(Pooled { lines, bytes, pool: Arc::clone(self) }))
    }

    /// Bytes handed out or waiting, at their peak.
    pub(super) fn peak_bytes(&self) -> usize {
        self.shelves().peak_bytes
    }
}

/// Memory of a tensor on the CPU.
pub struct Buffer(Memory);

enum Memory {
    Pooled(Pooled),
    /// A caller's.
    Lent(Box<dyn BytesMut>),
}

/// Goes back to its pool.
struct Pooled {
    lines: Lines,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// Memory that a caller lends.
    pub(super) fn lent(memory: Box<dyn BytesMut>) -> Self {
        Self(Memory::Lent(memory))
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Pooled(Pooled { lines, bytes, .. }) => &lines.bytes()[..*bytes],
            Memory::Lent(memory) => memory.bytes(),
        }
    }

    /// All bytes, for writing.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Pooled(Pooled { lines, bytes, .. }) => &mut lines.bytes_mut()[..*bytes],
            Memory::Lent(memory) => memory.bytes_mut(),
        }
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

impl Drop for Pooled {
    fn drop(&mut self) {
        let lines = mem::replace(&mut self.lines, Lines::Allocated(vec![]));
        self.pool.shelves.lock().unwrap_or_else(PoisonError::into_inner).put(lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ever_new_sizes_do_not_add_up() {
        let pool: Arc<Pool> = Arc::default();
        for n in 0..2000 {
            let buffers: Vec<_> = (0..4).map(|i| pool.take(100_000 + 640 * n + 64 * i)).collect();
            assert_eq!(buffers[3].bytes().len(), 100_000 + 640 * n + 192);
        }
        assert!(pool.peak_bytes() < 4 * 1_400_000 * 3 / 2, "{}", pool.peak_bytes());
    }

    /// Once there is too much, what waits goes one by one, the oldest first.
    #[test]
    fn what_has_waited_longest_is_given_back() {
        let pool: Arc<Pool> = Arc::default();
        drop([104, 60].map(|n_lines| pool.take(64 * n_lines)));
        assert_eq!(pool.peak_bytes(), 64 * 164);
        drop(pool.take(64 * 30));
        let shelves = pool.shelves.lock().expect("no one panics");
        let mut waiting: Vec<_> =
            shelves.by_lines.iter().filter(|(_, all)| !all.is_empty()).collect();
        waiting.sort_unstable_by_key(|(n_lines, _)| **n_lines);
        let waiting: Vec<_> =
            waiting.into_iter().map(|(&n_lines, all)| (n_lines, all.len())).collect();
        assert_eq!(waiting, [(30, 1), (60, 1)]);
        assert_eq!((shelves.used_bytes, shelves.waiting_bytes), (0, 64 * 90));
    }

    /// What nobody has touched is in no memory: sequences may reserve what they will hardly need.
    #[cfg(target_os = "linux")]
    #[test]
    fn pages_are_taken_when_they_are_touched() {
        let pool: Arc<Pool> = Arc::default();
        let mut buffer = pool.take(1 << 30);
        buffer.bytes_mut()[5 << 20] = 1;
        let at = buffer.bytes().as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("a map of this process");
        let mut lines = maps.lines().skip_while(|line| {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let ends = range.map(|(a, b)| [a, b].map(|end| usize::from_str_radix(end, 16)));
            !matches!(ends, Some([Ok(start), Ok(end)]) if (start..end).contains(&at))
        });
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).expect("its pages");
        let kib: usize = rss.trim().trim_end_matches(" kB").parse().expect("a number of KiB");
        // A huge page, or what another test has beside it.
        assert!((4..256 << 10).contains(&kib), "{kib} KiB");
    }

    #[test]
    fn the_same_size_is_reused() {
        let pool: Arc<Pool> = Arc::default();
        for _ in 0..10 {
            drop(pool.take(1000));
        }
        assert_eq!(pool.peak_bytes(), 1024);
    }
}
