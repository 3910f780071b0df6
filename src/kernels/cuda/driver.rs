//! A GPU through the CUDA driver, loaded at run time.

use std::{
    collections::{HashMap, VecDeque},
    ffi::CString,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice_attribute, CUfunction_attribute},
};

use super::{
    compile,
    device::{BoxedMatrix, Device, Launch, TensorMap},
};
use crate::error::{Error, Result};

/// Bytes of each of the two halves of the pinned memory that uploads pass through.
const STAGING_BYTES: usize = 16 << 20;
/// Uploads up to here are left to the driver, which copies them at once.
const SMALL_BYTES: usize = 64 << 10;
/// Kernels that an error message names.
const RECENT: usize = 8;

/// A GPU with one stream.
pub struct Driver {
    context: sys::CUcontext,
    stream: sys::CUstream,
    name: String,
    architecture: String,
    /// Of a block.
    max_shared_bytes: u32,
    /// See [`Device::hopper_multiprocessors`].
    hopper_multiprocessors: u32,
    /// Whether every launch is waited for, so that a fault is put down to its kernel.
    synchronous: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    modules: HashMap<(&'static str, bool), sys::CUmodule>,
    functions: HashMap<(String, bool), sys::CUfunction>,
    staging: Option<Staging>,
    recent: VecDeque<String>,
}

/// Pinned memory in two halves, each with an event that says when its last copy is done.
struct Staging {
    start: *mut u8,
    done: [sys::CUevent; 2],
}

// SAFETY: Handles of the driver, which may be used from any thread once the context is current there;
// every method makes it so first. What changes is behind a lock.
unsafe impl Send for Driver {}
// SAFETY: As above.
unsafe impl Sync for Driver {}

/// An error of the driver, with what was tried.
fn failed(what: impl std::fmt::Display) -> impl FnOnce(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        Error::Device(format!("{what}: {}", text.unwrap_or_else(|_| format!("{error:?}"))))
    }
}

/// An error in the middle of a run.
fn fault(what: impl std::fmt::Display) -> impl FnOnce(DriverError) -> Error {
    |error| match failed(what)(error) {
        Error::Device(text) => Error::Fault(text),
        other => other,
    }
}

/// The version of CUDA that the driver speaks, as 1000 * major + 10 * minor.
///
/// # Errors
/// If there is no driver, or it does not start: with the remedy.
pub fn driver_version() -> Result<i32> {
    // SAFETY: Only looks whether a library of one of the names can be opened.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "there is no NVIDIA driver (libcuda.so.1): install it, or use --device cpu".into(),
        ));
    }
    result::init().map_err(failed("the NVIDIA driver does not start"))?;
    let mut version = 0;
    // SAFETY: A place to write to, which outlives the call.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) };
    asked.result().map_err(failed("the NVIDIA driver has no version"))?;
    Ok(version)
}

impl Driver {
    /// The first GPU.
    ///
    /// # Errors
    /// If there is no driver, no GPU, or none that the kernels can run on (compute capability 8.0 or
    /// later), or no NVRTC: with the remedy.
    pub fn open() -> Result<Self> {
        let version = driver_version()?;
        if version < 12_000 {
            return Err(Error::Device(format!(
                "the NVIDIA driver speaks CUDA {}.{}, and the kernels need 12.0 or later: update it",
                version / 1000,
                version % 1000 / 10
            )));
        }
        let n = result::device::get_count().map_err(failed("cannot count GPUs"))?;
        if n == 0 {
            let none = "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES hides some?): use --device cpu";
            return Err(Error::Device(none.into()));
        }
        let device = result::device::get(0).map_err(failed("cannot open the first GPU"))?;
        let name = result::device::get_name(device).map_err(failed("the GPU has no name"))?;
        // SAFETY: `device` comes from `get`.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        let ask = |which| attribute(which).map_err(failed(&name));
        let major = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(Error::Device(format!(
                "{name} has compute capability {major}.{minor}, and the kernels need 8.0 or later"
            )));
        }
        let shared =
            ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let is_hopper = (major, minor) == (9, 0);
        let architecture = compile::architecture(major, minor);
        compile::check_ready(&architecture)?;
        // SAFETY: `device` comes from `get`; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed(&name))?;
        // SAFETY: The context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed(&name))?;
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind).map_err(failed(&name))?;
        Ok(Self {
            context,
            stream,
            architecture,
            max_shared_bytes: u32::try_from(shared).unwrap_or(0),
            hopper_multiprocessors: u32::try_from(multiprocessors).unwrap_or(0)
                * u32::from(is_hopper),
            synchronous: std::env::var_os("POLYTAPE_CUDA_SYNC").is_some_and(|v| !v.is_empty()),
            name,
            state: Mutex::default(),
        })
    }

    /// The architecture that kernels are compiled for.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: The context is retained for the life of the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed(&self.name))
    }

    /// An error that an earlier launch may have caused.
    fn late(&self, what: &str, error: DriverError) -> Error {
        let recent: Vec<_> = self.state().recent.iter().cloned().collect();
        fault(format_args!(
            "{}: {what} failed after the kernels {} (POLYTAPE_CUDA_SYNC=1 tells which)",
            self.name,
            recent.join(", ")
        ))(error)
    }

    fn function(&self, launch: &Launch<'_>) -> Result<sys::CUfunction> {
        let key = (launch.kernel.to_owned(), launch.bf16);
        let mut state = self.state();
        if let Some(&function) = state.functions.get(&key) {
            return Ok(function);
        }
        let module = match state.modules.get(&(launch.module, launch.bf16)) {
            Some(&module) => module,
            None => {
                let cubin = compile::cubin(launch.module, &self.architecture, launch.bf16)?;
                // SAFETY: A whole cubin, which the driver copies.
                let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
                let module = loaded.map_err(fault(format_args!(
                    "{} refuses the compiled kernels of cuda/{}.cu (a driver older than NVRTC?)",
                    self.name, launch.module
                )))?;
                state.modules.insert((launch.module, launch.bf16), module);
                module
            }
        };
        let name = CString::new(launch.kernel).expect("a kernel's name has no NUL");
        // SAFETY: The module is never unloaded.
        let function = unsafe { result::module::get_function(module, name) }
            .map_err(fault(format_args!("kernel {}", launch.kernel)))?;
        if launch.shared_bytes > self.max_shared_bytes {
            return Err(Error::Device(format!(
                "kernel {} wants {} bytes of shared memory, and {} has {}",
                launch.kernel, launch.shared_bytes, self.name, self.max_shared_bytes
            )));
        }
        if launch.shared_bytes > 0 {
            // All that the device has, as a later launch may want more than this one.
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = self.max_shared_bytes as i32;
            // SAFETY: The function was just found.
            unsafe { result::function::set_function_attribute(function, most, bytes) }
                .map_err(fault(format_args!("kernel {}", launch.kernel)))?;
        }
        state.functions.insert(key, function);
        Ok(function)
    }

    /// Copies a large piece through pinned memory: one half fills while the other is on its way.
    fn write_staged(&self, to: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        if state.staging.is_none() {
            // SAFETY: Freed by nobody: it is kept for the life of the process.
            let start = unsafe { result::malloc_host(2 * STAGING_BYTES, 0) };
            let start = start.map_err(fault("no pinned memory"))?.cast();
            let event = || {
                result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(fault("no event"))
            };
            state.staging = Some(Staging { start, done: [event()?, event()?] });
        }
        let Some(Staging { start, done }) = &state.staging else { unreachable!("just made") };
        for (i, chunk) in bytes.chunks(STAGING_BYTES).enumerate() {
            let half = i % 2;
            // SAFETY: The event is alive. Each half is written only when its last copy is done, and
            // read by the copy alone until then; a chunk is no longer than a half.
            unsafe {
                result::event::synchronize(done[half]).map_err(fault("upload"))?;
                let half_start = start.add(half * STAGING_BYTES);
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), half_start, chunk.len());
                let pinned = std::slice::from_raw_parts(half_start, chunk.len());
                let at = to + (i * STAGING_BYTES) as u64;
                result::memcpy_htod_async(at, pinned, self.stream).map_err(fault("upload"))?;
                result::event::record(done[half], self.stream).map_err(fault("upload"))?;
            }
        }
        Ok(())
    }
}

// SAFETY: Memory comes from the driver, whose addresses are multiples of 256; the rest passes arguments on.
unsafe impl Device for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(failed(&self.name))?;
        Ok((total, free))
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: The stream is alive.
        unsafe { result::malloc_async(self.stream, bytes) }.map_err(fault("cannot reserve memory"))
    }

    unsafe fn free(&self, address: u64, _: usize) {
        let freed = self.enter().and_then(|()| {
            // SAFETY: The caller's promise.
            let freed = unsafe { result::free_async(address, self.stream) };
            freed.map_err(fault("cannot free memory"))
        });
        if let Err(error) = freed {
            tracing::warn!("{error}"); // After a fault nothing can be freed any more.
        }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        if bytes.len() > SMALL_BYTES {
            return self.write_staged(to, bytes);
        }
        // SAFETY: The caller's promise; the driver has copied pageable memory when it returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }
            .map_err(|error| self.late("an upload", error))
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: The caller's promise; the stream is waited for before `bytes` is read.
        unsafe {
            result::memcpy_dtoh_async(bytes, from, self.stream)
                .map_err(|error| self.late("a download", error))?;
            result::stream::synchronize(self.stream).map_err(|error| self.late("a download", error))
        }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: The caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|error| self.late("a copy", error))
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: The caller's promise.
        unsafe { result::memset_d8_async(to, byte, bytes, self.stream) }
            .map_err(|error| self.late("a fill", error))
    }

    fn hopper_multiprocessors(&self) -> u32 {
        self.hopper_multiprocessors
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        self.enter()?;
        let &BoxedMatrix { address, rows, cols, box_rows } = matrix;
        let (dims, line_bytes) = ([cols as u64, rows as u64], 2 * cols as u64);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: Every pointer is to as many numbers as a map of two dimensions has; the driver takes the
        // address of the matrix as a number.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut _,
                dims.as_ptr(),
                [line_bytes].as_ptr(),
                [64, box_rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(fault(format_args!("{}: a map of {matrix:?}", self.name)))?;
        Ok(TensorMap(map.opaque))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let function = self.function(launch)?;
        let [x, y, z] = launch.grid;
        let block = (launch.threads, 1, 1);
        let mut pointers = launch.args.pointers();
        // SAFETY: The caller's promise; the driver copies the parameters.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                block,
                launch.shared_bytes,
                self.stream,
                &mut pointers,
            )
        }
        .map_err(fault(format_args!("{}: kernel {}", self.name, launch.kernel)))?;
        let mut state = self.state();
        if state.recent.back().is_none_or(|last| last != launch.kernel) {
            if state.recent.len() == RECENT {
                state.recent.pop_front();
            }
            state.recent.push_back(launch.kernel.to_owned());
        }
        drop(state);
        if self.synchronous {
            // SAFETY: The stream is alive.
            unsafe { result::stream::synchronize(self.stream) }
                .map_err(fault(format_args!("{}: kernel {}", self.name, launch.kernel)))?;
        }
        Ok(())
    }
}

/// See [`probe`](super::probe).
pub(super) fn probe() -> Vec<(&'static str, String)> {
    let driver = match driver_version() {
        Ok(version) => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
        Err(error) => error.to_string(),
    };
    let nvrtc = match compile::find() {
        Ok(nvrtc) => format!("{} ({}.{})", nvrtc.library, nvrtc.version.0, nvrtc.version.1),
        Err(error) => error.to_string(),
    };
    let device = Driver::open().and_then(|driver| {
        let (total, free) = driver.memory()?;
        let (total, free) = (total >> 20, free >> 20);
        Ok(format!("{} ({}), {total} MiB, {free} MiB free", driver.name, driver.architecture))
    });
    let device = device.unwrap_or_else(|error| format!("none: {error}"));
    vec![("cuda driver", driver), ("nvrtc", nvrtc), ("gpu", device)]
}
