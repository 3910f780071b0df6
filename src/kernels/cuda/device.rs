//! What the CUDA backend needs of a device: memory, copies, kernel launches and graphs, in one stream.
//!
//! `driver::Driver` is the real one. Tests bring an emulator, so that everything
//! above this trait, planning and kernels alike, runs and is compared with the oracle without a GPU.

use std::borrow::Cow;

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::error::Result;

/// What a stream does in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Runs a kernel.
    Launch(Launch),
    /// Copies within the device, between places that do not overlap.
    Copy {
        /// Where to.
        to: u64,
        /// Where from.
        from: u64,
        /// How much.
        bytes: usize,
    },
    /// Sets bytes.
    Fill {
        /// Where.
        to: u64,
        /// To what.
        byte: u8,
        /// How many.
        bytes: usize,
    },
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The file in `cuda/` that has the kernel, without its extension.
    pub module: &'static str,
    /// The kernel's name.
    pub kernel: Cow<'static, str>,
    /// Whether activations are bf16 (else f32).
    pub bf16: bool,
    /// Blocks along x, y and z; none is 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The parameters.
    pub args: Args,
}

/// A bf16 matrix, and the box of it that a kernel copies at a time: 64 columns, 128 bytes.
#[derive(Clone, Copy, Debug)]
pub struct BoxedMatrix {
    /// Where it starts.
    pub address: u64,
    /// Rows.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub cols: usize,
    /// Rows of the box, at most 256.
    pub box_rows: u32,
}

/// `TensorMap` of `cuda/hopper.cuh`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct TensorMap(pub [u64; 16]);

/// The parameters of a kernel, each as its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    words: Vec<u64>, // So that each starts at a multiple of 8.
    places: Vec<(usize, usize)>,
}

impl Args {
    /// Adds a parameter: a number, a pointer as its address, or a `repr(C)` struct of those.
    pub fn push<T: NoUninit>(&mut self, value: T) {
        let bytes = bytemuck::bytes_of(&value);
        self.places.push((self.words.len(), bytes.len()));
        let chunks = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        });
        self.words.extend(chunks);
    }

    /// Where each parameter lies, as the driver wants to know. Valid while `self` is not changed.
    pub fn pointers(&self) -> Vec<*mut std::ffi::c_void> {
        let pointer = |&(at, _): &(usize, usize)| self.words[at..].as_ptr().cast_mut().cast();
        self.places.iter().map(pointer).collect()
    }

    /// How many there are.
    pub fn n(&self) -> usize {
        self.places.len()
    }

    /// The size of each parameter, in bytes.
    pub fn sizes(&self) -> Vec<usize> {
        self.places.iter().map(|&(_, bytes)| bytes).collect()
    }
}

/// Commands that were given to a device once and can be run again, with other parameters.
///
/// # Safety
/// As for [`Device`].
pub unsafe trait Graph: Send {
    /// Puts another command in the place of one: the same kernel, or the same kind. Whether the device
    /// can; where it cannot, the graph is of no use any more.
    ///
    /// # Safety
    /// As for [`Device::run`], whenever the graph runs.
    unsafe fn set(&mut self, index: usize, command: &Command) -> Result<bool>;

    /// Runs all commands, one after the other.
    ///
    /// # Safety
    /// As for [`Device::run`] of each.
    unsafe fn run(&mut self) -> Result<()>;
}

/// Bytes on their way to the host.
pub trait Arrival: Send {
    /// Waits for them.
    ///
    /// # Errors
    /// A fault of anything before them in the stream.
    fn wait(self: Box<Self>) -> Result<Vec<u8>>;
}

/// A device with one stream: calls take effect in order.
///
/// # Safety
/// `alloc` gives memory that nobody else uses, at a multiple of 16, until it is given to `free`; the other
/// calls do what they say and touch nothing else.
pub unsafe trait Device: Send + Sync + 'static {
    /// What the device is called.
    fn name(&self) -> String;

    /// Memory of the device: in all and free, in bytes.
    fn memory(&self) -> Result<(usize, usize)>;

    /// Reserves memory (at least one byte) and gives its address; none where there is not so much.
    fn alloc(&self, bytes: usize) -> Result<Option<u64>>;

    /// Gives memory back.
    ///
    /// # Safety
    /// The address comes from [`Device::alloc`] with this size and is not used afterwards.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies to the device.
    ///
    /// # Safety
    /// The place lies in memory of [`Device::alloc`].
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from the device, after everything before it in the stream.
    ///
    /// # Safety
    /// As for [`Device::write`].
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Starts to copy from the device, after everything before it in the stream and before everything
    /// after it. A few bytes.
    ///
    /// # Safety
    /// As for [`Device::write`].
    unsafe fn fetch(&self, from: u64, bytes: usize) -> Result<Box<dyn Arrival>>;

    /// Runs a command.
    ///
    /// # Safety
    /// A kernel's parameters are those of the kernel; what a command reads and writes lies in memory of
    /// [`Device::alloc`].
    unsafe fn run(&self, command: &Command) -> Result<()>;

    /// Whether commands may be collected and run as graphs.
    fn has_graphs(&self) -> bool;

    /// A graph of these commands; none where the device refuses, which it then says in the log.
    fn graph(&self, commands: &[Command]) -> Result<Option<Box<dyn Graph>>>;

    /// Multiprocessors, if they have the instructions of `cuda/hopper.cuh`; else 0.
    fn hopper_multiprocessors(&self) -> u32 {
        0
    }

    /// What those instructions are told of a matrix.
    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        unreachable!("{} has no multiprocessors that copy {matrix:?}", self.name())
    }

    /// Whether memory is to start as NaN and to be given back at once, so that a test sees what a
    /// kernel forgets to write or touches too late. Such a device has no graphs.
    fn is_strict(&self) -> bool {
        false
    }
}
