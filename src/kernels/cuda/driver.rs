//! A GPU through the CUDA driver, loaded at run time.
//!
//! A graph is a chain of nodes, one a command. A launch is a kernel node, whose parameters can be
//! changed for next to nothing. Anything else is captured, by itself and on a stream of its own that never runs
//! anything, into a graph that is the node: what a stream can do, a graph can.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    ffi::{CString, c_void},
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice_attribute, CUfunction_attribute},
};

use super::{
    compile,
    device::{Arrival, BoxedMatrix, Command, Device, Graph, Launch, TensorMap},
};
use crate::error::{Error, Result};

/// Bytes of each of the two halves of the pinned memory that uploads pass through.
const STAGING_BYTES: usize = 16 << 20;
/// See [`Driver::small_bytes`].
const SMALL_BYTES: usize = 64 << 10;
/// Where there is nothing to run on.
const NO_GPU: &str =
    "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES hides some?): use --device cpu";
/// The driver that has programmatic dependencies and edges with data: CUDA 12.3.
const GRAPHS_FROM: i32 = 12_030;
/// Pinned memory of a fetch at least.
const FETCH_BYTES: usize = 4 << 10;

/// A GPU with one stream.
pub struct Driver {
    shared: Arc<Shared>,
    architecture: String,
    /// Of a block.
    max_shared_bytes: u32,
    /// See [`Device::hopper_multiprocessors`].
    hopper_multiprocessors: u32,
    /// Whether memory comes in the order of the stream; virtual GPUs may not have that.
    has_pools: bool,
    /// Whether every launch is waited for, so that a fault is put down to its kernel.
    synchronous: bool,
    /// Whether commands are collected to graphs.
    has_graphs: bool,
    /// Whether a kernel of a graph starts while the one before it ends: `after_previous` of `cuda/common.cuh`.
    overlaps: bool,
    /// Uploads up to here are left to the driver, which copies them at once: none where the GPU reads the host's pages and
    /// need not copy them.
    small_bytes: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    modules: HashMap<(&'static str, bool), sys::CUmodule>,
    functions: HashMap<(Cow<'static, str>, bool), sys::CUfunction>,
    staging: Option<Staging>,
}

/// What graphs and fetches need of the GPU, too.
struct Shared {
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Where what is no launch becomes part of a graph; nothing runs here. Used under the lock.
    capture: Mutex<sys::CUstream>,
    name: String,
    /// Kernels since the device was last waited for, which an error message names.
    recent: Mutex<BTreeSet<Cow<'static, str>>>,
    /// Pinned memory that no fetch uses.
    slots: Mutex<Vec<Slot>>,
}

/// Pinned memory, and an event that says when the copy to it is done.
struct Slot {
    start: *mut u8,
    capacity: usize,
    done: sys::CUevent,
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
// SAFETY: As above.
unsafe impl Send for Shared {}
// SAFETY: As above.
unsafe impl Sync for Shared {}

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
    result::init().map_err(|error| {
        if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE {
            return Error::Device(NO_GPU.into());
        }
        failed("the NVIDIA driver does not start")(error)
    })?;
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
            return Err(Error::Device(NO_GPU.into()));
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
        let pools = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?;
        let reads_host_pages = ask(
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES,
        )?;
        let is_hopper = (major, minor) == (9, 0);
        let architecture = compile::architecture(major, minor);
        compile::check_ready(&architecture)?;
        // SAFETY: `device` comes from `get`; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed(&name))?;
        // SAFETY: The context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed(&name))?;
        let kind = || result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind()).map_err(failed(&name))?;
        let capture = Mutex::new(result::stream::create(kind()).map_err(failed(&name))?);
        let synchronous = match std::env::var("POLYTAPE_CUDA_SYNC").unwrap_or_default().as_str() {
            "" | "0" => false,
            "1" => true,
            other => {
                return Err(Error::Usage(format!("POLYTAPE_CUDA_SYNC={other}: it is 0 or 1")));
            }
        };
        let (recent, slots) = (Mutex::default(), Mutex::default());
        let graphs = std::env::var("POLYTAPE_CUDA_GRAPHS").unwrap_or_default();
        if !["", "on", "serial", "off"].contains(&graphs.as_str()) {
            let why = format!("POLYTAPE_CUDA_GRAPHS={graphs}: it is on, serial or off");
            return Err(Error::Usage(why));
        }
        let driver = Self {
            shared: Arc::new(Shared { context, stream, capture, name, recent, slots }),
            architecture,
            max_shared_bytes: u32::try_from(shared).unwrap_or(0),
            hopper_multiprocessors: u32::try_from(multiprocessors).unwrap_or(0)
                * u32::from(is_hopper),
            has_pools: pools != 0,
            synchronous,
            has_graphs: !synchronous && version >= GRAPHS_FROM,
            overlaps: major >= 9 && graphs != "serial",
            small_bytes: if reads_host_pages == 0 { SMALL_BYTES } else { 0 },
            state: Mutex::default(),
        };
        Ok(if graphs == "off" { driver.without_graphs() } else { driver })
    }

    /// The GPU with every kernel launched by itself.
    pub fn without_graphs(self) -> Self {
        Self { has_graphs: false, ..self }
    }

    /// The architecture that kernels are compiled for.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let key = (launch.kernel.clone(), launch.bf16);
        let mut state = self.state();
        if launch.shared_bytes > self.max_shared_bytes {
            return Err(Error::Device(format!(
                "kernel {} wants {} bytes of shared memory, and {} has {}",
                launch.kernel, launch.shared_bytes, self.shared.name, self.max_shared_bytes
            )));
        }
        if let Some(&function) = state.functions.get(&key) {
            return Ok(function);
        }
        let module = match state.modules.get(&(launch.module, launch.bf16)) {
            Some(&module) => module,
            None => {
                let (name, arch) = (launch.module, &*self.architecture);
                // SAFETY: Both are whole cubins, which the driver copies.
                let load =
                    |cubin: &[u8]| unsafe { result::module::load_data(cubin.as_ptr().cast()) };
                let refused = |error| {
                    self.shared.late(
                        &format!(
                            "loading the kernels of cuda/{name}.cu (a driver older than NVRTC?)"
                        ),
                        error,
                    )
                };
                let module = match load(&compile::cubin(name, arch, launch.bf16)?) {
                    Ok(module) => module,
                    // What is kept may be another NVRTC's.
                    Err(error) => match compile::compiled(name, arch, launch.bf16) {
                        Ok(cubin) => load(&cubin).map_err(refused)?,
                        Err(_) => return Err(refused(error)),
                    },
                };
                state.modules.insert((launch.module, launch.bf16), module);
                module
            }
        };
        let name = CString::new(&*launch.kernel).expect("a kernel's name has no NUL");
        // SAFETY: The module is never unloaded.
        let function = unsafe { result::module::get_function(module, name) }
            .map_err(fault(format_args!("kernel {}", launch.kernel)))?;
        if launch.shared_bytes > 0 {
            // All that the device has, as a later launch may want more than this one.
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // Less what the kernel has of its own, as the sum may not exceed it.
            let own = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            // SAFETY: The function was just found.
            unsafe {
                result::function::get_function_attribute(function, own).and_then(|own| {
                    let bytes = self.max_shared_bytes as i32 - own;
                    result::function::set_function_attribute(function, most, bytes)
                })
            }
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
            let event = || {
                result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(|error| self.shared.late("an event", error))
            };
            let done = [event()?, event()?];
            // SAFETY: Freed by nobody: it is kept for the life of the process.
            let start = unsafe { result::malloc_host(2 * STAGING_BYTES, 0) };
            let start = start.map_err(|error| self.shared.late("pinned memory", error))?.cast();
            state.staging = Some(Staging { start, done });
        }
        let Some(Staging { start, done }) = &state.staging else { unreachable!("just made") };
        let late = |error| self.shared.late("an upload", error);
        for (i, chunk) in bytes.chunks(STAGING_BYTES).enumerate() {
            let half = i % 2;
            // SAFETY: The event is alive. Each half is written only when its last copy is done, and
            // read by the copy alone until then; a chunk is no longer than a half.
            unsafe {
                result::event::synchronize(done[half]).map_err(late)?;
                let half_start = start.add(half * STAGING_BYTES);
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), half_start, chunk.len());
                let pinned = std::slice::from_raw_parts(half_start, chunk.len());
                let at = to + (i * STAGING_BYTES) as u64;
                result::memcpy_htod_async(at, pinned, self.shared.stream).map_err(late)?;
                result::event::record(done[half], self.shared.stream).map_err(late)?;
            }
        }
        Ok(())
    }
}

/// A lock whose value is valid at all times.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn enter(&self) -> Result<()> {
        // SAFETY: The context is retained for the life of the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed(&self.name))
    }

    /// An error that an earlier launch may have caused.
    fn late(&self, what: &str, error: DriverError) -> Error {
        let recent: Vec<_> = locked(&self.recent).iter().cloned().collect();
        if recent.is_empty() {
            return fault(format_args!("{}: {what} failed", self.name))(error);
        }
        fault(format_args!(
            "{}: {what} failed after one of the kernels {} (POLYTAPE_CUDA_SYNC=1 tells which)",
            self.name,
            recent.join(", ")
        ))(error)
    }

    /// A graph of a command that is no launch. The driver's error where it does not capture it.
    ///
    /// # Safety
    /// As for [`Device::run`], when the graph runs.
    unsafe fn captured(&self, command: &Command) -> Result<Template, DriverError> {
        let stream = locked(&self.capture);
        // SAFETY: The stream is alive and nobody else uses it; a capture that was begun ends, whatever
        // happens in it. The graph is nobody else's.
        unsafe {
            // Relaxed: what other threads do meanwhile is none of this capture's business.
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            result::stream::begin_capture(*stream, mode)?;
            let moved = move_bytes(command, *stream);
            let graph = result::stream::end_capture(*stream).map(Template)?;
            moved.map(|()| graph)
        }
    }
}

/// Copies or sets bytes, in a stream.
///
/// # Safety
/// As for [`Device::run`].
unsafe fn move_bytes(command: &Command, stream: sys::CUstream) -> Result<(), DriverError> {
    match *command {
        // SAFETY: The caller's promise.
        Command::Copy { to, from, bytes } => unsafe {
            result::memcpy_dtod_async(to, from, bytes, stream)
        },
        // SAFETY: The caller's promise.
        Command::Fill { to, byte, bytes } => unsafe {
            result::memset_d8_async(to, byte, bytes, stream)
        },
        Command::Launch(_) => unreachable!("launches have nodes of their own"),
    }
}

/// What a graph is instantiated from; it has the nodes.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: The handle came from the driver and nobody has it any more.
        if let Err(error) = unsafe { result::graph::destroy(self.0) } {
            tracing::warn!("a graph is not given back: {error:?}"); // As after a fault.
        }
    }
}

/// Runs `add` with a launch as a graph takes it.
fn with_params<R>(
    launch: &Launch,
    function: sys::CUfunction,
    add: impl FnOnce(&sys::CUDA_KERNEL_NODE_PARAMS) -> R,
) -> R {
    let [x, y, z] = launch.grid;
    let mut pointers = launch.args.pointers();
    add(&sys::CUDA_KERNEL_NODE_PARAMS {
        func: function,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes,
        kernelParams: pointers.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        ctx: ptr::null_mut(), // The one that is current.
    })
}

/// How a command follows the one before: when that is done, or for two kernels, `overlapping` its end.
fn edge(overlapping: bool) -> sys::CUgraphEdgeData {
    let (port, kind) = if overlapping {
        let kind = sys::CUgraphDependencyType_enum::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
        (sys::CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, kind)
    } else {
        let kind = sys::CUgraphDependencyType_enum::CU_GRAPH_DEPENDENCY_TYPE_DEFAULT;
        (sys::CU_GRAPH_KERNEL_NODE_PORT_DEFAULT, kind)
    };
    sys::CUgraphEdgeData { from_port: port as u8, to_port: 0, type_: kind as u8, reserved: [0; 5] }
}

/// Commands as a CUDA graph.
struct Chain {
    shared: Arc<Shared>,
    executable: sys::CUgraphExec,
    /// Each command's, with the function where it is a launch.
    nodes: Vec<(sys::CUgraphNode, Option<sys::CUfunction>)>,
    kernels: BTreeSet<Cow<'static, str>>,
    /// It has the nodes.
    _template: Template,
}

// SAFETY: Handles of the driver, which may be used from any thread once the context is current there;
// every method makes it so first.
unsafe impl Send for Chain {}

impl Chain {
    /// An [`Error::Device`] where the driver refuses.
    fn new(driver: &Driver, commands: &[Command]) -> Result<Self> {
        let shared = Arc::clone(&driver.shared);
        shared.enter()?;
        let refused = || {
            |error: DriverError| match error.0 as u32 {
                // A kernel's fault, which every call gets from then on.
                700..800 => shared.late("a graph", error),
                _ => failed("a graph")(error),
            }
        };
        let mut graph = ptr::null_mut();
        // SAFETY: A place to write to, which outlives the call.
        unsafe { sys::cuGraphCreate(&mut graph, 0) }.result().map_err(refused())?;
        let template = Template(graph);
        let mut nodes: Vec<(sys::CUgraphNode, Option<sys::CUfunction>)> =
            Vec::with_capacity(commands.len());
        let mut kernels = BTreeSet::new();
        for command in commands {
            let mut node = ptr::null_mut();
            let function = match command {
                Command::Launch(launch) => {
                    let function = driver.function(launch)?;
                    // SAFETY: The graph is alive, and the parameters are as many as the kernel has, which the
                    // driver copies.
                    let added = with_params(launch, function, |params| unsafe {
                        sys::cuGraphAddKernelNode_v2(&mut node, graph, ptr::null(), 0, params)
                    });
                    added.result().map_err(refused())?;
                    kernels.insert(launch.kernel.clone());
                    Some(function)
                }
                Command::Copy { .. } | Command::Fill { .. } => {
                    // SAFETY: Nothing runs before `Graph::run`, whose caller promises it.
                    let child = unsafe { shared.captured(command) }.map_err(refused())?;
                    // SAFETY: As above; the child is copied.
                    unsafe {
                        sys::cuGraphAddChildGraphNode(&mut node, graph, ptr::null(), 0, child.0)
                    }
                    .result()
                    .map_err(refused())?;
                    None
                }
            };
            if let Some(&(before, kernel_before)) = nodes.last() {
                let overlaps = driver.overlaps && kernel_before.is_some() && function.is_some();
                let edge = edge(overlaps);
                // SAFETY: Both nodes are of this graph; the driver copies the edge.
                unsafe { sys::cuGraphAddDependencies_v2(graph, &before, &node, &edge, 1) }
                    .result()
                    .map_err(refused())?;
            }
            nodes.push((node, function));
        }
        // SAFETY: The graph is whole.
        let executable =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        let executable = executable.map_err(refused())?;
        Ok(Self { shared, executable, nodes, kernels, _template: template })
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: The handle came from the driver and nobody has it any more; what still runs goes on.
        if let Err(error) = unsafe { result::graph::exec_destroy(self.executable) } {
            tracing::warn!("a graph is not given back: {error:?}"); // As after a fault.
        }
    }
}

// SAFETY: The nodes are the commands, in a chain.
unsafe impl Graph for Chain {
    unsafe fn set(&mut self, index: usize, command: &Command) -> Result<bool> {
        self.shared.enter()?;
        let (executable, (node, function)) = (self.executable, self.nodes[index]);
        let changed = match (command, function) {
            (Command::Launch(launch), Some(function)) => with_params(launch, function, |params| {
                // SAFETY: The node is one of this graph and runs this kernel; the driver copies the
                // parameters. Runs that are under way have the old ones.
                unsafe { sys::cuGraphExecKernelNodeSetParams_v2(executable, node, params) }.result()
            }),
            // SAFETY: Nothing runs before `run`, whose caller promises it; the child is copied.
            _ => unsafe {
                self.shared.captured(command).and_then(|child| {
                    sys::cuGraphExecChildGraphNodeSetParams(executable, node, child.0).result()
                })
            },
        };
        if let Err(error) = changed {
            tracing::debug!("a graph is made anew: {error:?}");
            return Ok(false);
        }
        Ok(true)
    }

    unsafe fn run(&mut self) -> Result<()> {
        self.shared.enter()?;
        locked(&self.shared.recent).extend(self.kernels.iter().cloned());
        // SAFETY: The caller's promise.
        unsafe { result::graph::launch(self.executable, self.shared.stream) }
            .map_err(|error| self.shared.late("a graph", error))
    }
}

/// Bytes on their way to pinned memory.
struct Fetch {
    shared: Arc<Shared>,
    /// Until the end, which gives it back.
    slot: Option<Slot>,
    bytes: usize,
}

// SAFETY: As for `Chain`; the slot is this fetch's own.
unsafe impl Send for Fetch {}

impl Fetch {
    /// Waits, and gives what `take` makes of the bytes.
    fn end<R>(&mut self, take: impl FnOnce(&[u8]) -> R) -> Result<Option<R>> {
        let Some(slot) = self.slot.take() else { return Ok(None) };
        self.shared.enter()?;
        // SAFETY: The event is alive. Where it cannot be waited for, the slot is lost.
        unsafe { result::event::synchronize(slot.done) }
            .map_err(|error| self.shared.late("a download", error))?;
        // SAFETY: The copy is done, and nobody else has the slot, which has room for so many bytes.
        let taken = take(unsafe { std::slice::from_raw_parts(slot.start, self.bytes) });
        locked(&self.shared.slots).push(slot);
        Ok(Some(taken))
    }
}

impl Arrival for Fetch {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.end(<[u8]>::to_vec)?.unwrap_or_default())
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if let Err(error) = self.end(|_| ()) {
            tracing::warn!("{error}"); // Nobody wanted the bytes.
        }
    }
}

// SAFETY: Memory comes from the driver, whose addresses are multiples of 256; the rest passes arguments on.
unsafe impl Device for Driver {
    fn name(&self) -> String {
        self.shared.name.clone()
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.shared.enter()?;
        let (free, total) = result::mem_get_info().map_err(failed(&self.shared.name))?;
        Ok((total, free))
    }

    fn alloc(&self, bytes: usize) -> Result<Option<u64>> {
        self.shared.enter()?;
        let stream = self.shared.stream;
        // SAFETY: The stream is alive.
        let reserve = || unsafe {
            match self.has_pools {
                true => result::malloc_async(stream, bytes),
                false => result::malloc_sync(bytes),
            }
        };
        let is_full = |error: &DriverError| error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        // SAFETY: The stream is alive.
        let wait = || unsafe { result::stream::synchronize(stream) };
        let reserved = match reserve() {
            // What was freed is the pool's again when the kernels before that are done.
            Err(error) if is_full(&error) => wait().and_then(|()| reserve()),
            reserved => reserved,
        };
        match reserved {
            Ok(address) => Ok(Some(address)),
            Err(error) if is_full(&error) => Ok(None),
            Err(error) => Err(self.shared.late("reserving memory", error)),
        }
    }

    unsafe fn free(&self, address: u64, _: usize) {
        let freed = self.shared.enter().and_then(|()| {
            // SAFETY: The caller's promise. Without pools the driver waits for what uses the memory.
            let freed = unsafe {
                match self.has_pools {
                    true => result::free_async(address, self.shared.stream),
                    false => result::free_sync(address),
                }
            };
            freed.map_err(fault("cannot free memory"))
        });
        if let Err(error) = freed {
            tracing::warn!("{error}"); // After a fault nothing can be freed any more.
        }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.shared.enter()?;
        if bytes.len() > self.small_bytes {
            return self.write_staged(to, bytes);
        }
        // SAFETY: The caller's promise; the driver has copied pageable memory when it returns, as it must where the GPU
        // cannot read it.
        unsafe { result::memcpy_htod_async(to, bytes, self.shared.stream) }
            .map_err(|error| self.shared.late("an upload", error))
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.shared.enter()?;
        let stream = self.shared.stream;
        // SAFETY: The caller's promise; the stream is waited for before `bytes` is read.
        unsafe {
            result::memcpy_dtoh_async(bytes, from, stream)
                .map_err(|error| self.shared.late("a download", error))?;
            result::stream::synchronize(stream)
                .map_err(|error| self.shared.late("a download", error))?;
        }
        locked(&self.shared.recent).clear();
        Ok(())
    }

    unsafe fn fetch(&self, from: u64, bytes: usize) -> Result<Box<dyn Arrival>> {
        let shared = &self.shared;
        shared.enter()?;
        let mut slots = locked(&shared.slots);
        let slot = match slots.iter().position(|slot| slot.capacity >= bytes) {
            Some(at) => slots.swap_remove(at),
            None => {
                let capacity = bytes.max(FETCH_BYTES).next_power_of_two();
                let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(|error| shared.late("an event", error))?;
                // SAFETY: Freed by nobody: slots are used again for the life of the process.
                let start = unsafe { result::malloc_host(capacity, 0) };
                let start = start.map_err(|error| shared.late("pinned memory", error))?.cast();
                Slot { start, capacity, done }
            }
        };
        // SAFETY: The caller's promise; the slot has room for so many bytes and belongs to this fetch
        // until the event has come.
        unsafe {
            let pinned = std::slice::from_raw_parts_mut(slot.start, bytes);
            result::memcpy_dtoh_async(pinned, from, shared.stream)
                .and_then(|()| result::event::record(slot.done, shared.stream))
                .map_err(|error| shared.late("a download", error))?;
        }
        Ok(Box::new(Fetch { shared: Arc::clone(shared), slot: Some(slot), bytes }))
    }

    fn hopper_multiprocessors(&self) -> u32 {
        self.hopper_multiprocessors
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        self.shared.enter()?;
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
        .map_err(fault(format_args!("{}: a map of {matrix:?}", self.shared.name)))?;
        Ok(TensorMap(map.opaque))
    }

    unsafe fn run(&self, command: &Command) -> Result<()> {
        self.shared.enter()?;
        let Command::Launch(launch) = command else {
            // SAFETY: The caller's promise.
            return unsafe { move_bytes(command, self.shared.stream) }
                .map_err(|error| self.shared.late("a copy or a fill", error));
        };
        let function = self.function(launch)?;
        let [x, y, z] = launch.grid;
        let mut pointers: Vec<*mut c_void> = launch.args.pointers();
        let of_kernel = |error: DriverError| {
            // One launch at a time has no other to blame.
            if self.synchronous {
                return fault(format!("{}: kernel {}", self.shared.name, launch.kernel))(error);
            }
            self.shared.late(&format!("kernel {}", launch.kernel), error)
        };
        // SAFETY: The caller's promise; the driver copies the parameters.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.shared.stream,
                &mut pointers,
            )
        }
        .map_err(of_kernel)?;
        let mut recent = locked(&self.shared.recent);
        if !recent.contains(&launch.kernel) {
            recent.insert(launch.kernel.clone());
        }
        drop(recent);
        if self.synchronous {
            // SAFETY: The stream is alive.
            unsafe { result::stream::synchronize(self.shared.stream) }.map_err(of_kernel)?;
        }
        Ok(())
    }

    fn has_graphs(&self) -> bool {
        self.has_graphs
    }

    fn graph(&self, commands: &[Command]) -> Result<Option<Box<dyn Graph>>> {
        match Chain::new(self, commands) {
            Ok(chain) => Ok(Some(Box::new(chain))),
            Err(Error::Device(why)) => {
                tracing::warn!("{} makes no graph: {why}", self.shared.name);
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }
}

/// The file of a library that this process has loaded, whose name begins so; where Linux lists it. The name
/// that a library is opened by does not say where the loader found it.
fn loaded_file(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut files = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
    let is_it = |file: &&str| file.rsplit('/').next().is_some_and(|last| last.starts_with(name));
    files.find(is_it).map(str::to_owned)
}

/// See [`probe`](super::probe).
pub(super) fn probe() -> Vec<(&'static str, String)> {
    let driver = match driver_version() {
        Ok(version) => {
            let file =
                loaded_file("libcuda.so").map_or_else(String::new, |file| format!("{file}, "));
            format!("{file}CUDA {}.{}", version / 1000, version % 1000 / 10)
        }
        Err(error) => error.to_string(),
    };
    let nvrtc = match compile::find() {
        Ok(nvrtc) => {
            let file = loaded_file("libnvrtc.so").unwrap_or_else(|| nvrtc.library.clone());
            format!("{file} ({}.{})", nvrtc.version.0, nvrtc.version.1)
        }
        Err(error) => error.to_string(),
    };
    let device = Driver::open().and_then(|driver| {
        let (total, free) = driver.memory()?;
        let (total, free) = (total >> 20, free >> 20);
        Ok(format!("{} ({}), {total} MiB, {free} MiB free", driver.name(), driver.architecture))
    });
    let device = device.unwrap_or_else(|error| format!("none: {error}"));
    vec![("cuda driver", driver), ("nvrtc", nvrtc), ("gpu", device)]
}
