//! Device memory: buffers that come back when they are dropped and are used again in stream order.
//!
//! One stream does everything, so memory can be handed out again the moment its last use is *queued*.
//! Freed blocks are kept by size class (four classes an octave, so at most a quarter more than asked for); a step
//! that repeats asks for the same sizes in the same order and gets the same addresses.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::device::Device;
use crate::error::{Error, Result};

/// Small requests share one class.
const SMALLEST_BYTES: usize = 512;

/// The memory of a device.
pub(super) struct Arena {
    device: Arc<dyn Device>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Addresses that are free, by size class.
    free: BTreeMap<usize, Vec<u64>>,
    used_bytes: usize,
    kept_bytes: usize,
    peak_bytes: usize,
}

/// A piece of device memory.
pub struct Buffer {
    arena: Arc<Arena>,
    address: u64,
    class_bytes: usize,
}

impl Buffer {
    /// Where it starts.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.arena.give_back(self.address, self.class_bytes);
    }
}

/// The size that a request gets: a multiple of a quarter of the power of two below it.
fn class_bytes(bytes: usize) -> usize {
    let bytes = bytes.max(SMALLEST_BYTES);
    let step = (bytes.ilog2() as usize).saturating_sub(2);
    bytes.next_multiple_of(1 << step)
}

impl Arena {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // Numbers: valid at all times.
    }

    /// Bytes in use or kept, at their peak.
    pub(super) fn peak_bytes(&self) -> usize {
        self.state().peak_bytes
    }

    /// Memory for `bytes` bytes, unwritten.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let strict = self.device.is_strict();
        let class_bytes = if strict { bytes.max(1) } else { class_bytes(bytes) };
        let buffer = |address| Buffer { arena: Arc::clone(self), address, class_bytes };
        let mut state = self.state();
        if let Some(address) = state.free.get_mut(&class_bytes).and_then(Vec::pop) {
            state.kept_bytes -= class_bytes;
            state.used_bytes += class_bytes;
            return Ok(buffer(address));
        }
        let address = match self.device.alloc(class_bytes) {
            Ok(address) => address,
            Err(_) => {
                // What is kept has other sizes: give it back and ask again.
                self.release(&mut state);
                self.device
                    .alloc(class_bytes)
                    .map_err(|error| self.out_of_memory(class_bytes, state.used_bytes, &error))?
            }
        };
        state.used_bytes += class_bytes;
        state.peak_bytes = state.peak_bytes.max(state.used_bytes + state.kept_bytes);
        if strict {
            // SAFETY: `alloc` gave so many bytes there.
            unsafe { self.device.fill(address, 0xFF, class_bytes) }?;
        }
        Ok(buffer(address))
    }

    fn out_of_memory(&self, bytes: usize, used_bytes: usize, error: &Error) -> Error {
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let total = self.device.memory().map_or(0, |(total, _)| total);
        Error::Fault(format!(
            "out of memory on {}: {} MiB more do not fit beside {} MiB in use of {} MiB ({error}): \
             use a smaller --batch-size, --checkpointing on or --dtype bf16",
            self.device.name(),
            mib(bytes),
            mib(used_bytes),
            mib(total),
        ))
    }

    fn give_back(&self, address: u64, class_bytes: usize) {
        let mut state = self.state();
        state.used_bytes -= class_bytes;
        if self.device.is_strict() {
            // SAFETY: The address came from `alloc` with this size; its buffer is gone.
            unsafe { self.device.free(address, class_bytes) };
        } else {
            state.kept_bytes += class_bytes;
            state.free.entry(class_bytes).or_default().push(address);
        }
    }

    /// Gives everything that is kept back to the device.
    fn release(&self, state: &mut State) {
        for (class_bytes, addresses) in std::mem::take(&mut state.free) {
            for address in addresses {
                // SAFETY: The address came from `alloc` with this size, and no buffer has it.
                unsafe { self.device.free(address, class_bytes) };
            }
        }
        state.kept_bytes = 0;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.release(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::device::Launch, *};

    /// Memory that is only numbers, of a limited size.
    struct Numbers(Mutex<(u64, usize)>);

    // SAFETY: Nothing is ever touched.
    unsafe impl Device for Numbers {
        fn name(&self) -> String {
            "numbers".into()
        }
        fn memory(&self) -> Result<(usize, usize)> {
            Ok((1 << 20, 0))
        }
        fn alloc(&self, bytes: usize) -> Result<u64> {
            let mut state = self.0.lock().unwrap();
            if state.1 + bytes > 1 << 20 {
                return Err(Error::Device("no more".into()));
            }
            *state = (state.0 + bytes as u64, state.1 + bytes);
            Ok(state.0)
        }
        unsafe fn free(&self, _: u64, bytes: usize) {
            self.0.lock().unwrap().1 -= bytes;
        }
        unsafe fn write(&self, _: u64, _: &[u8]) -> Result<()> {
            unreachable!()
        }
        unsafe fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
            unreachable!()
        }
        unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
            unreachable!()
        }
        unsafe fn fill(&self, _: u64, _: u8, _: usize) -> Result<()> {
            unreachable!()
        }
        unsafe fn launch(&self, _: &Launch<'_>) -> Result<()> {
            unreachable!()
        }
    }

    #[test]
    fn classes_add_at_most_a_quarter() {
        for bytes in [0, 1, 512, 513, 640, 641, 1 << 20, (1 << 20) + 1, 12_345_678] {
            let class = class_bytes(bytes);
            assert!(class >= bytes && class <= (bytes + bytes / 4).max(SMALLEST_BYTES), "{bytes}");
            assert_eq!(class_bytes(class), class);
        }
    }

    #[test]
    fn a_step_that_repeats_gets_the_same_addresses() {
        let arena = Arc::new(Arena::new(Arc::new(Numbers(Mutex::default()))));
        let step = || {
            let a = arena.take(1000).unwrap();
            let b = arena.take(5000).unwrap();
            drop(a);
            let c = arena.take(1001).unwrap();
            [b.address(), c.address()]
        };
        let first = step();
        assert_eq!(first, step());
        assert_eq!(arena.peak_bytes(), 1024 + 5120);
    }

    #[test]
    fn kept_memory_makes_room_before_a_request_fails() {
        let arena = Arc::new(Arena::new(Arc::new(Numbers(Mutex::default()))));
        drop(arena.take(700 << 10).unwrap());
        let held = arena.take(600 << 10).unwrap();
        let Err(error) = arena.take(600 << 10) else { panic!("it does not fit") };
        let text = error.to_string();
        assert!(text.contains("640 MiB") || text.contains("1 MiB more"), "{text}");
        drop(held);
    }
}
