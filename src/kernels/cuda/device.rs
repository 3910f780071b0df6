//! What the CUDA backend needs of a device: memory, copies and kernel launches, in one stream.
//!
//! `driver::Driver` is the real one. Tests bring an emulator, so that everything
//! above this trait, planning and kernels alike, runs and is compared with the oracle without a GPU.

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::error::Result;

/// One kernel launch.
pub struct Launch<'a> {
    /// The file in `cuda/` that has the kernel, without its extension.
    pub module: &'static str,
    /// The kernel's name.
    pub kernel: &'a str,
    /// Whether activations are bf16 (else f32).
    pub bf16: bool,
    /// Blocks along x, y and z; none is 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The parameters.
    pub args: &'a Args,
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
#[derive(Default)]
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

    /// The size of each parameter, in bytes.
    pub fn sizes(&self) -> Vec<usize> {
        self.places.iter().map(|&(_, bytes)| bytes).collect()
    }
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

    /// Reserves memory (at least one byte) and gives its address.
    fn alloc(&self, bytes: usize) -> Result<u64>;

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

    /// Copies within the device.
    ///
    /// # Safety
    /// Both places lie in memory of [`Device::alloc`] and do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Sets bytes.
    ///
    /// # Safety
    /// As for [`Device::write`].
    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()>;

    /// Runs a kernel.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and what it reads and writes by them lies in memory of
    /// [`Device::alloc`].
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Multiprocessors, if they have the instructions of `cuda/hopper.cuh`; else 0.
    fn hopper_multiprocessors(&self) -> u32 {
        0
    }

    /// What those instructions are told of a matrix.
    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        unreachable!("{} has no multiprocessors that copy {matrix:?}", self.name())
    }

    /// Whether memory is to start as NaN and to be given back at once, so that a test sees what a
    /// kernel forgets to write or touches too late.
    fn is_strict(&self) -> bool {
        false
    }
}
