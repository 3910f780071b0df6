//! Device memory: buffers that come back when they are dropped and are used again in stream order.
//!
//! One stream does everything, so memory can be handed out again the moment its last use is *queued*.
//! Freed blocks are kept by size class (four classes an octave, so at most a quarter more than asked for) and
//! handed out from the lowest address on. So what a request gets depends on which blocks are in use and not on
//! the order in which they came back: a step that repeats asks for the same sizes in the same order and gets
//! the same addresses, and its graphs stay as they are.
//!
//! Uploads do not wait in the queue. They go to blocks whose last use the device has been given.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{device::Command, graph::Queue};
use crate::error::{Error, Result};

/// Small requests share one class.
const SMALLEST_BYTES: usize = 512;

/// The memory of a device.
pub(super) struct Arena {
    queue: Arc<Queue>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Addresses that are free, by size class, with how many commands had been pushed by then.
    free: BTreeMap<usize, BTreeMap<u64, u64>>,
    used_bytes: usize,
    kept_bytes: usize,
    peak_bytes: usize,
}

/// What a piece of memory is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// For commands, which are queued.
    Commands,
    /// For an upload, which comes before commands that are pending.
    Upload,
    /// For an upload that stays: what is asked for and no more, as nothing else will use it again.
    Weights,
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
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self { queue, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // Numbers: valid at all times.
    }

    /// Bytes in use or kept, at their peak.
    pub(super) fn peak_bytes(&self) -> usize {
        self.state().peak_bytes
    }

    /// Memory for `bytes` bytes, unwritten.
    pub(super) fn take(self: &Arc<Self>, bytes: usize, what_for: Use) -> Result<Buffer> {
        let device = self.queue.device();
        let strict = device.is_strict();
        let class_bytes = match what_for {
            _ if strict => bytes.max(1),
            Use::Weights => bytes.max(1).next_multiple_of(SMALLEST_BYTES),
            Use::Commands | Use::Upload => class_bytes(bytes),
        };
        let buffer = |address| Buffer { arena: Arc::clone(self), address, class_bytes };
        let mut state = self.state();
        let free = state.free.entry(class_bytes).or_default();
        let is_ready = |n: u64| what_for == Use::Commands || self.queue.has_run(n);
        let lowest = free.iter().find(|&(_, &n)| is_ready(n)).map(|(&address, _)| address);
        if let Some(address) = lowest {
            free.remove(&address);
            state.kept_bytes -= class_bytes;
            state.used_bytes += class_bytes;
            return Ok(buffer(address));
        }
        let address = match device.alloc(class_bytes)? {
            Some(address) => address,
            None => {
                // What is kept has other sizes: give it back and ask again.
                self.release(&mut state)?;
                device
                    .alloc(class_bytes)?
                    .ok_or_else(|| self.out_of_memory(class_bytes, state.used_bytes))?
            }
        };
        state.used_bytes += class_bytes;
        state.peak_bytes = state.peak_bytes.max(state.used_bytes + state.kept_bytes);
        if strict {
            // SAFETY: `alloc` gave so many bytes there.
            unsafe {
                self.queue.push(Command::Fill { to: address, byte: 0xFF, bytes: class_bytes })
            }?;
        }
        Ok(buffer(address))
    }

    fn out_of_memory(&self, bytes: usize, used_bytes: usize) -> Error {
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let total = self.queue.device().memory().map_or(0, |(total, _)| total);
        Error::Fault(format!(
            "out of memory on {}: {} MiB more do not fit beside {} MiB in use of {} MiB: \
             use a smaller --batch-size, --checkpointing on or --dtype bf16",
            self.queue.device().name(),
            mib(bytes),
            mib(used_bytes),
            mib(total),
        ))
    }

    fn give_back(&self, address: u64, class_bytes: usize) {
        let mut state = self.state();
        state.used_bytes -= class_bytes;
        let device = self.queue.device();
        if device.is_strict() {
            // SAFETY: The address came from `alloc` with this size; its buffer is gone. A strict device
            // has run what was pushed.
            unsafe { device.free(address, class_bytes) };
        } else {
            state.kept_bytes += class_bytes;
            let n_pushed = self.queue.n_pushed();
            state.free.entry(class_bytes).or_default().insert(address, n_pushed);
        }
    }

    /// Gives everything that is kept back to the device, after what is pending.
    fn release(&self, state: &mut State) -> Result<()> {
        let flushed = self.queue.flush();
        for (class_bytes, addresses) in std::mem::take(&mut state.free) {
            for address in addresses.into_keys() {
                // SAFETY: The address came from `alloc` with this size, and no buffer has it; nothing
                // that uses it is pending.
                unsafe { self.queue.device().free(address, class_bytes) };
            }
        }
        state.kept_bytes = 0;
        flushed
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        if let Err(error) = self.release(&mut state) {
            tracing::warn!("{error}"); // After a fault nothing runs any more.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::device::{Arrival, Device, Graph},
        *,
    };

    /// What `Numbers` have not because of an earlier fault.
    const FAULT: usize = 7 << 20;

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
        fn alloc(&self, bytes: usize) -> Result<Option<u64>> {
            let mut state = self.0.lock().unwrap();
            if bytes == FAULT {
                return Err(Error::Fault("a kernel before".into()));
            }
            if state.1 + bytes > 1 << 20 {
                return Ok(None);
            }
            *state = (state.0 + bytes as u64, state.1 + bytes);
            Ok(Some(state.0))
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
        unsafe fn fetch(&self, _: u64, _: usize) -> Result<Box<dyn Arrival>> {
            unreachable!()
        }
        unsafe fn run(&self, _: &Command) -> Result<()> {
            Ok(())
        }
        fn has_graphs(&self) -> bool {
            true
        }
        fn graph(&self, _: &[Command]) -> Result<Option<Box<dyn Graph>>> {
            unreachable!()
        }
    }

    fn arena() -> Arc<Arena> {
        Arc::new(Arena::new(Arc::new(Queue::new(Arc::new(Numbers(Mutex::default()))))))
    }

    fn take(arena: &Arc<Arena>, bytes: usize) -> Buffer {
        arena.take(bytes, Use::Commands).unwrap()
    }

    #[test]
    fn a_fault_is_no_lack_of_memory() {
        let arena = arena();
        drop(take(&arena, 1000));
        let kept_bytes = arena.state().kept_bytes;
        let error = arena.take(FAULT, Use::Commands).err().unwrap().to_string();
        assert!(error.contains("a kernel before") && !error.contains("out of memory"), "{error}");
        assert_eq!(arena.state().kept_bytes, kept_bytes, "nothing is given back for it");
        let error = arena.take(2 << 20, Use::Commands).err().unwrap().to_string();
        assert!(error.contains("out of memory"), "{error}");
        assert_eq!(arena.state().kept_bytes, 0);
    }

    #[test]
    fn weights_take_what_they_need() {
        let arena = arena();
        assert_eq!(arena.take(600_001, Use::Weights).unwrap().class_bytes, 600_064);
        assert_eq!(arena.take(300_001, Use::Commands).unwrap().class_bytes, 327_680);
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
        let arena = arena();
        let step = || {
            let a = take(&arena, 1000);
            let b = take(&arena, 5000);
            drop(a);
            let [c, d, e] = [1001, 1002, 1003].map(|bytes| take(&arena, bytes));
            let addresses = [&b, &c, &d, &e].map(Buffer::address);
            drop((d, c, e)); // In an order that a stack would give back.
            addresses
        };
        let first = step();
        for _ in 0..3 {
            assert_eq!(first, step());
        }
        assert_eq!(arena.peak_bytes(), 3 * 1024 + 5120);
    }

    #[test]
    fn an_upload_goes_where_nothing_pending_is() {
        let arena = arena();
        let [used, other] = [take(&arena, 1000), take(&arena, 1000)];
        let [used, other] = [(used.address(), used), (other.address(), other)];
        drop(other.1);
        // SAFETY: Nothing is touched.
        unsafe { arena.queue.push(Command::Fill { to: used.0, byte: 0, bytes: 1 }) }.unwrap();
        drop(used.1);
        assert_eq!(arena.take(1000, Use::Upload).unwrap().address(), other.0);
        assert_eq!(take(&arena, 1000).address(), used.0);
        arena.queue.flush().unwrap();
        assert_eq!(arena.take(1000, Use::Upload).unwrap().address(), used.0);
    }

    #[test]
    fn kept_memory_makes_room_before_a_request_fails() {
        let arena = arena();
        drop(take(&arena, 700 << 10));
        let held = take(&arena, 600 << 10);
        let Err(error) = arena.take(600 << 10, Use::Commands) else { panic!("it does not fit") };
        let text = error.to_string();
        assert!(text.contains("640 MiB") || text.contains("1 MiB more"), "{text}");
        drop(held);
    }
}
