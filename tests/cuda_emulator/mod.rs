//! A [`Device`] that is no GPU: the sources in `cuda/`, built by the host's C++ compiler after
//! `emulator.hpp` and loaded into the test. See there for what is emulated.
//!
//! Its memory starts as NaN and ends at a page that nothing may touch; the bytes around each piece are
//! checked when it is given back. With graphs ([`Emulator::with_graphs`]) memory is kept and used again, as
//! on a GPU, and a graph is a list of commands that runs as it was last changed.

#![allow(unsafe_code, unreachable_pub)]

use std::{
    collections::HashMap,
    env,
    ffi::{CStr, c_char, c_int, c_void},
    fs,
    path::{Path, PathBuf},
    process, ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use polytape::{
    Result,
    kernels::cuda::device::{Arrival, BoxedMatrix, Command, Device, Graph, Launch, TensorMap},
};

const GUARD: u8 = 0xA5;
const PAGE: usize = 4096;

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    u32,
    usize,
    *const *mut c_void,
    usize,
    *const usize,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// Copies of a library: what runs at the same time, as its threads and shared memory are statics.
const COPIES: usize = 4;

/// The kernels of one compute type.
struct Library {
    _loaded: [libloading::Library; COPIES],
    /// Of each copy; locked while it runs.
    launches: [Mutex<LaunchFn>; COPIES],
}

/// The emulated device.
pub struct Emulator {
    machine: Arc<Machine>,
    has_graphs: bool,
}

/// What runs commands.
struct Machine {
    libraries: Arc<[Library; 2]>,
    /// What the order of threads is made of.
    seed: Mutex<u64>,
    /// The mapping of each piece of memory, by address: its start and length, and the piece's length.
    pieces: Mutex<HashMap<u64, (usize, usize, usize)>>,
    /// What the device was asked for, from when somebody first wanted to know.
    log: Mutex<Option<Vec<Event>>>,
}

/// What the host does that costs time on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Of this kernel, by itself.
    Launch(String),
    /// Of a graph, in which so many commands changed since it ran last.
    Graph { kernels: Vec<String>, changed: usize },
    /// A graph is made.
    Instantiated,
    /// Of so many bytes: the host waits.
    Read(usize),
    /// Of so many bytes: the host goes on, and waits later.
    Fetch(usize),
    /// For a fetch.
    Wait,
    /// Of so many bytes, to the device.
    Write(usize),
    /// Of so many bytes.
    Alloc(usize),
}

impl Event {
    /// The kernels that it runs.
    #[allow(dead_code)] // As below.
    pub fn kernels(&self) -> Vec<&str> {
        match self {
            Self::Launch(kernel) => vec![kernel],
            Self::Graph { kernels, .. } => kernels.iter().map(String::as_str).collect(),
            _ => vec![],
        }
    }
}

impl Emulator {
    /// The device, whose threads run in an order derived from `seed`; or why there is none.
    pub fn new(seed: u64) -> std::result::Result<Self, String> {
        static LIBRARIES: OnceLock<std::result::Result<Arc<[Library; 2]>, String>> =
            OnceLock::new();
        let libraries = LIBRARIES.get_or_init(|| {
            let compiler = compiler().ok_or("no C++ compiler (g++, clang++ or $CXX)")?;
            let (f32, bf16) = rayon::join(|| build(&compiler, false), || build(&compiler, true));
            Ok(Arc::new([f32, bf16]))
        });
        let libraries = libraries.as_ref().map_err(Clone::clone).map(Arc::clone)?;
        let (pieces, log) = (Mutex::default(), Mutex::default());
        let machine = Arc::new(Machine { libraries, seed: Mutex::new(seed), pieces, log });
        Ok(Self { machine, has_graphs: false })
    }

    /// The same with graphs, and memory that is kept.
    #[allow(dead_code)] // Not every test that has the emulator has it.
    pub fn with_graphs(seed: u64) -> std::result::Result<Self, String> {
        Ok(Self { has_graphs: true, ..Self::new(seed)? })
    }

    /// What happened since the last call; from the first one on it is written down.
    #[allow(dead_code)] // Not every test that has the emulator looks.
    pub fn take_log(&self) -> Vec<Event> {
        let mut log = self.machine.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.replace(Vec::new()).unwrap_or_default()
    }
}

impl Machine {
    fn note(&self, event: impl FnOnce() -> Event) {
        if let Some(log) = &mut *self.log.lock().unwrap_or_else(PoisonError::into_inner) {
            log.push(event());
        }
    }

    /// Runs a command now.
    unsafe fn run(&self, command: &Command) {
        match command {
            // SAFETY: The caller's promise.
            Command::Launch(launch) => unsafe { self.launch(launch) },
            // SAFETY: The caller's promise.
            &Command::Copy { to, from, bytes } => unsafe {
                ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
            },
            // SAFETY: The caller's promise.
            &Command::Fill { to, byte, bytes } => unsafe {
                ptr::write_bytes(to as *mut u8, byte, bytes);
            },
        }
    }

    unsafe fn launch(&self, launch: &Launch) {
        let copies = &self.libraries[usize::from(launch.bf16)].launches;
        let idle = copies.iter().find_map(|copy| copy.try_lock().ok());
        let run = idle.unwrap_or_else(|| copies[0].lock().unwrap_or_else(PoisonError::into_inner));
        let seed = {
            let mut seed = self.seed.lock().unwrap_or_else(PoisonError::into_inner);
            *seed = seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            *seed
        };
        let name = std::ffi::CString::new(&*launch.kernel).unwrap();
        let (pointers, sizes) = (launch.args.pointers(), launch.args.sizes());
        let mut message = [0_u8; 300];
        // SAFETY: The arguments are those of the function; each kernel's own are checked by number and
        // size in there.
        let failed = unsafe {
            run(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared_bytes as usize,
                pointers.as_ptr(),
                pointers.len(),
                sizes.as_ptr(),
                seed,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        let message = CStr::from_bytes_until_nul(&message).unwrap().to_string_lossy();
        assert_eq!(failed, 0, "kernel {}: {message}", launch.kernel);
    }
}

/// A graph: commands as they were last changed.
struct Replay {
    machine: Arc<Machine>,
    commands: Vec<Command>,
    changed: usize,
}

// SAFETY: The commands run as they are.
unsafe impl Graph for Replay {
    unsafe fn set(&mut self, index: usize, command: &Command) -> Result<bool> {
        let old = &mut self.commands[index];
        // What CUDA cannot change of a node.
        match (&*old, command) {
            (Command::Launch(old), Command::Launch(new)) => {
                assert_eq!((&old.kernel, old.bf16), (&new.kernel, new.bf16));
                assert_eq!(old.args.sizes(), new.args.sizes());
            }
            (Command::Copy { .. }, Command::Copy { .. })
            | (Command::Fill { .. }, Command::Fill { .. }) => {}
            (old, new) => panic!("{old:?} cannot become {new:?}"),
        }
        *old = command.clone();
        self.changed += 1;
        Ok(true)
    }

    unsafe fn run(&mut self) -> Result<()> {
        let changed = std::mem::take(&mut self.changed);
        let kernels = self.commands.iter().filter_map(|command| match command {
            Command::Launch(launch) => Some(launch.kernel.to_string()),
            _ => None,
        });
        self.machine.note(|| Event::Graph { kernels: kernels.collect(), changed });
        // SAFETY: The caller's promise.
        self.commands.iter().for_each(|command| unsafe { self.machine.run(command) });
        Ok(())
    }
}

/// Bytes that were copied, as everything before them has run.
struct Fetched {
    machine: Arc<Machine>,
    bytes: Vec<u8>,
}

impl Arrival for Fetched {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        self.machine.note(|| Event::Wait);
        Ok(self.bytes)
    }
}

fn compiler() -> Option<String> {
    let candidates = env::var("CXX").into_iter().chain(["g++", "clang++", "c++"].map(String::from));
    let works = |name: &String| {
        process::Command::new(name)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    };
    candidates.into_iter().find(works)
}

fn run(command: &mut process::Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{errors}");
    output.stdout
}

/// FNV-1a.
fn hash(bytes: &[u8], from: u64) -> u64 {
    bytes.iter().fold(from, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01B3))
}

/// All kernels with activations of one type, as a loaded library. A library of the same text that an
/// earlier run built is used again.
fn build(compiler: &str, bf16: bool) -> Library {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cuda_emulator");
    fs::create_dir_all(&dir).unwrap();
    let mut sources: Vec<_> =
        fs::read_dir(root.join("cuda")).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.sort();
    sources.push(root.join("tests/cuda_emulator/emulator.hpp"));
    let key =
        sources.iter().fold(0xCBF2_9CE4_8422_2325, |key, path| hash(&fs::read(path).unwrap(), key));
    let stem = format!("kernels_{}_{key:016x}", if bf16 { "bf16" } else { "f32" });
    let library = dir.join(format!("{stem}.so"));
    if !library.exists() {
        // A folder of our own: other test binaries may build the same at this moment.
        let own = dir.join(format!("{stem}.{}", process::id()));
        fs::create_dir_all(&own).unwrap();
        let mut text =
            format!("#include \"emulator.hpp\"\n#define POLYTAPE_BF16 {}\n", u8::from(bf16));
        for path in sources.iter().filter(|path| path.extension().is_some_and(|e| e == "cu")) {
            text += &format!("#include \"{}\"\n", path.file_name().unwrap().to_str().unwrap());
        }
        let includes = [root.join("tests/cuda_emulator"), root.join("cuda")]
            .map(|dir| format!("-I{}", dir.display()));
        let source = own.join("kernels.cpp");
        fs::write(&source, &text).unwrap();
        let preprocessed = run(process::Command::new(compiler)
            .args(["-std=c++17", "-E", "-P", "-DPOLYTAPE_LIST_KERNELS"])
            .args(&includes)
            .arg(&source));
        let preprocessed = String::from_utf8(preprocessed).unwrap();
        text += LAUNCH_HEAD;
        for (name, bound) in kernels(&preprocessed) {
            text += &format!(
                "    if (!strcmp(name, \"{name}\")) return emulator::block_size.x > unsigned({bound}) ? too_large({bound}) \
                 : emulator::launch({name}, args, n, sizes);\n"
            );
        }
        text += LAUNCH_TAIL;
        fs::write(&source, text).unwrap();
        let built = own.join("kernels.so");
        let flags =
            ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-Bsymbolic"];
        // No fused or reordered arithmetic beyond what the source says, and jumps between stacks.
        let more =
            ["-ffp-contract=off", "-mfma", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-w"];
        let more = more.iter().filter(|flag| **flag != "-mfma" || cfg!(target_arch = "x86_64"));
        run(process::Command::new(compiler)
            .args(flags)
            .args(more)
            .args(&includes)
            .arg(&source)
            .arg("-o")
            .arg(&built));
        fs::rename(&built, &library).unwrap();
        fs::remove_dir_all(&own).unwrap();
    }
    // Files of their own, or the system would load the same library again.
    let loaded = std::array::from_fn(|i| {
        let (copy, own) = (format!("{stem}.{i}.so"), format!("{stem}.{i}.{}", process::id()));
        let (copy, own) = (dir.join(copy), dir.join(own));
        if !copy.exists() {
            fs::copy(&library, &own).unwrap();
            fs::rename(&own, &copy).unwrap();
        }
        // SAFETY: The library was built from this repository's sources; it has no constructors that matter.
        unsafe { libloading::Library::new(&copy) }.unwrap()
    });
    let launches = loaded.each_ref().map(|library| {
        // SAFETY: `LAUNCH_HEAD` defines the function with this signature; it lives as long as `library`.
        Mutex::new(unsafe { *library.get::<LaunchFn>(b"polytape_emulator_launch\0").unwrap() })
    });
    Library { _loaded: loaded, launches }
}

/// The kernels of a preprocessed source, in which `__global__` has vanished, and the most threads that
/// each may be launched with.
fn kernels(preprocessed: &str) -> Vec<(String, String)> {
    let parts = preprocessed.split("extern \"C\"").skip(1);
    let kernel = |part: &str| {
        let rest = part.trim_start().strip_prefix("void")?.trim_start();
        let rest = rest.strip_prefix("launch_bounds(").expect("a kernel has launch bounds");
        let (bounds, rest) = rest.split_once(')').expect("launch bounds end");
        let bound = bounds.split(',').next().unwrap_or_default().trim();
        let name = rest.split('(').next()?.trim();
        Some((name.to_owned(), bound.to_owned()))
    };
    parts.filter_map(kernel).collect()
}

const LAUNCH_HEAD: &str = r#"
static int too_large(unsigned threads) {
    emulator::problem = "the kernel's launch bounds are " + std::to_string(threads) + " threads";
    return 1;
}
static int dispatch(const char* name, void** args, size_t n, const size_t* sizes) {
"#;
const LAUNCH_TAIL: &str = r#"
    emulator::problem = "no such kernel";
    return 1;
}
extern "C" __attribute__((visibility("default"))) int polytape_emulator_launch(
    const char* name, const unsigned* grid, unsigned threads, size_t shared_bytes, void** args, size_t n,
    const size_t* sizes, uint64_t seed, char* message, size_t message_bytes) {
    emulator::grid_size = {grid[0], grid[1], grid[2]};
    emulator::block_size = {threads, 1, 1};
    emulator::dynamic_bytes = shared_bytes;
    emulator::random_state = seed;
    emulator::problem.clear();
    const int failed = dispatch(name, args, n, sizes);
    snprintf(message, message_bytes, "%s", emulator::problem.c_str());
    return failed;
}
"#;

// SAFETY: Each piece is a mapping of its own.
unsafe impl Device for Emulator {
    fn name(&self) -> String {
        "the CUDA emulator".into()
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((8 << 30, 8 << 30))
    }

    fn alloc(&self, bytes: usize) -> Result<Option<u64>> {
        self.machine.note(|| Event::Alloc(bytes));
        // The last byte's 16 bytes end at the guard page.
        let room = bytes.next_multiple_of(16) + 16;
        let mapping_len = room.next_multiple_of(PAGE) + PAGE;
        // SAFETY: A fresh anonymous mapping at an address of the system's choice; its last page is then
        // closed.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let mapping = libc::mmap(ptr::null_mut(), mapping_len, access, flags, -1, 0);
            assert_ne!(mapping, libc::MAP_FAILED, "no memory for {bytes} bytes");
            let guard = mapping.byte_add(mapping_len - PAGE);
            assert_eq!(libc::mprotect(guard, PAGE, libc::PROT_NONE), 0);
            mapping as usize
        };
        let address = start + mapping_len - PAGE - bytes.next_multiple_of(16);
        // SAFETY: All of it lies in the mapping, before the guard page.
        unsafe {
            ptr::write_bytes((address - 16) as *mut u8, GUARD, 16);
            let end = address + bytes;
            ptr::write_bytes(end as *mut u8, GUARD, start + mapping_len - PAGE - end);
        }
        let mut pieces = self.machine.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.insert(address as u64, (start, mapping_len, bytes));
        Ok(Some(address as u64))
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        let mut pieces = self.machine.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, mapping_len, own_bytes) =
            pieces.remove(&address).expect("a piece of this device");
        assert_eq!(bytes, own_bytes);
        let intact = |from: usize, to: usize| {
            // SAFETY: Both lie in the mapping, which still stands.
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, to - from) };
            bytes.iter().all(|&byte| byte == GUARD)
        };
        let address = address as usize;
        let fine =
            intact(address - 16, address) && intact(address + bytes, start + mapping_len - PAGE);
        // SAFETY: The mapping that `alloc` made, which nobody uses any more.
        unsafe { libc::munmap(start as *mut c_void, mapping_len) };
        if !std::thread::panicking() {
            assert!(fine, "a kernel wrote around a piece of {bytes} bytes");
        }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.machine.note(|| Event::Write(bytes.len()));
        // SAFETY: The caller's promise.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.machine.note(|| Event::Read(bytes.len()));
        // SAFETY: The caller's promise.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn fetch(&self, from: u64, bytes: usize) -> Result<Box<dyn Arrival>> {
        self.machine.note(|| Event::Fetch(bytes));
        // SAFETY: The caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec();
        Ok(Box::new(Fetched { machine: Arc::clone(&self.machine), bytes }))
    }

    unsafe fn run(&self, command: &Command) -> Result<()> {
        if let Command::Launch(launch) = command {
            self.machine.note(|| Event::Launch(launch.kernel.to_string()));
        }
        // SAFETY: The caller's promise.
        unsafe { self.machine.run(command) };
        Ok(())
    }

    fn has_graphs(&self) -> bool {
        self.has_graphs
    }

    fn graph(&self, commands: &[Command]) -> Result<Option<Box<dyn Graph>>> {
        self.machine.note(|| Event::Instantiated);
        let (machine, commands) = (Arc::clone(&self.machine), commands.to_vec());
        Ok(Some(Box::new(Replay { machine, commands, changed: 0 })))
    }

    fn hopper_multiprocessors(&self) -> u32 {
        3
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        let &BoxedMatrix { address, rows, cols, box_rows } = matrix;
        // What the driver asks for.
        assert!(address % 16 == 0 && rows > 0 && cols > 0 && cols % 8 == 0, "{matrix:?}");
        assert!((1..=256).contains(&box_rows), "{matrix:?}");
        // `Box` of emulator.hpp.
        let mut map = TensorMap::default();
        map.0[..5].copy_from_slice(&[address, rows as u64, cols as u64, u64::from(box_rows), 64]);
        Ok(map)
    }

    fn is_strict(&self) -> bool {
        !self.has_graphs
    }
}
