//! The sources in `cuda/`, compiled for a device by NVRTC at run time, and kept on disk.
//!
//! ```text
//! cuda/*.cu (inside the binary) ─ NVRTC ─> cubin ─> cache folder, by a hash of everything it depends on
//! ```
//!
//! Neither the build nor the binary needs a CUDA toolkit: NVRTC is one library, looked for in the places
//! that [`find`] lists. A cached file is named by a hash of all sources, the options and the architecture,
//! so nothing stale is ever used. A machine whose cache has every module in both compute types needs no NVRTC.

use std::{
    env,
    ffi::{CStr, CString, c_char, c_int},
    fs,
    io::Write,
    path::{Path, PathBuf},
    ptr,
    sync::OnceLock,
};

use cudarc::nvrtc::{
    result::NvrtcError,
    sys::{nvrtcProgram, nvrtcResult},
};
use libloading::Library;

use crate::{
    error::{Error, Result},
    formats::safetensors::write_atomically,
};

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../cuda/", $name)))),*]
    };
}

/// Files that others include.
const HEADERS: [(&str, &str); 10] = sources![
    "attention.cuh",
    "bank.cuh",
    "common.cuh",
    "gemm.cuh",
    "hopper.cuh",
    "linear.cuh",
    "mma.cuh",
    "philox.cuh",
    "siblings.cuh",
    "thin.cuh",
];

/// Files with kernels.
const MODULES: [(&str, &str); 16] = sources![
    "adamw.cu",
    "attention.cu",
    "attention_tiles.cu",
    "elementwise.cu",
    "embed.cu",
    "gated.cu",
    "grad.cu",
    "head.cu",
    "linear.cu",
    "linear_wgmma.cu",
    "mix.cu",
    "norm.cu",
    "rope.cu",
    "route.cu",
    "sampling.cu",
    "shrink.cu",
];

/// The modules' names: the files without `.cu`.
pub fn modules() -> impl Iterator<Item = &'static str> {
    MODULES.iter().map(|(name, _)| name.trim_end_matches(".cu"))
}

/// NVRTC, loaded.
#[derive(Clone, Debug)]
pub struct Nvrtc {
    /// The file, or the name that the system's loader resolved.
    pub library: String,
    /// Major and minor.
    pub version: (i32, i32),
}

/// NVRTC, from the first place that has it: `POLYTAPE_NVRTC` (a file), the loader's own search
/// (`LD_LIBRARY_PATH` and the system's folders), a virtual environment with the wheel
/// `nvidia-cuda-nvrtc`, `CUDA_HOME`, `/usr/local/cuda`.
///
/// # Errors
/// Names the places and what to install.
pub fn find() -> Result<Nvrtc> {
    loaded().map(|(nvrtc, _)| nvrtc.clone())
}

fn loaded() -> Result<&'static (Nvrtc, Api)> {
    static FOUND: OnceLock<std::result::Result<(Nvrtc, Api), String>> = OnceLock::new();
    FOUND.get_or_init(load).as_ref().map_err(|why| Error::Device(why.clone()))
}

/// What is used of NVRTC, from the library that was found and from no other of its kind.
struct Api {
    create_program: unsafe extern "C" fn(
        *mut nvrtcProgram,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> nvrtcResult,
    compile_program: unsafe extern "C" fn(nvrtcProgram, c_int, *const *const c_char) -> nvrtcResult,
    cubin_bytes: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> nvrtcResult,
    cubin: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
    log_bytes: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> nvrtcResult,
    log: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
    destroy_program: unsafe extern "C" fn(*mut nvrtcProgram) -> nvrtcResult,
}

impl Api {
    /// The functions of a library that is never closed, and its version.
    ///
    /// # Safety
    /// The library is NVRTC, of CUDA 12 or 13, if it has functions of these names.
    unsafe fn of(library: &Library) -> Option<(Self, (i32, i32))> {
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> nvrtcResult;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: The types are those of nvrtc.h, which are the same in both versions; two places to write to.
        unsafe {
            let version = *library.get::<Version>(b"nvrtcVersion\0").ok()?;
            version(&mut major, &mut minor).result().ok()?;
            let api = Self {
                create_program: *library.get(b"nvrtcCreateProgram\0").ok()?,
                compile_program: *library.get(b"nvrtcCompileProgram\0").ok()?,
                cubin_bytes: *library.get(b"nvrtcGetCUBINSize\0").ok()?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").ok()?,
                log_bytes: *library.get(b"nvrtcGetProgramLogSize\0").ok()?,
                log: *library.get(b"nvrtcGetProgramLog\0").ok()?,
                destroy_program: *library.get(b"nvrtcDestroyProgram\0").ok()?,
            };
            [12, 13].contains(&major).then_some((api, (major, minor)))
        }
    }
}

/// Files in a folder whose names start so, in order.
fn files(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(prefix) && !name.contains(".alt.") && !name.ends_with(".a")
    };
    let mut files: Vec<_> = entries.filter(named).collect();
    files.sort();
    files
}

/// Folders beyond the loader's own that may have CUDA's libraries.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(environment) = env::var_os("VIRTUAL_ENV").map(PathBuf::from) {
        for python in files(&environment.join("lib"), "python3") {
            let nvidia = python.join("site-packages/nvidia");
            folders.extend([nvidia.join("cu13/lib"), nvidia.join("cuda_nvrtc/lib")]);
        }
    }
    folders.extend(env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("lib64")));
    folders.push("/usr/local/cuda/lib64".into());
    folders
}

/// Opens a library and keeps it open.
fn open(library: &Path) -> std::result::Result<&'static Library, String> {
    // SAFETY: CUDA's libraries have no initialisers with preconditions.
    match unsafe { Library::new(library) } {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(error) => {
            use std::error::Error as _;
            let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            Err(if why.contains(&*library.to_string_lossy()) {
                why
            } else {
                format!("{}: {why}", library.display())
            })
        }
    }
}

fn load() -> std::result::Result<(Nvrtc, Api), String> {
    let mut tried = Vec::new();
    let mut candidates = Vec::new();
    if let Some(file) = env::var_os("POLYTAPE_NVRTC").filter(|file| !file.is_empty()) {
        candidates.push(PathBuf::from(file));
    } else {
        candidates.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
        for folder in folders() {
            candidates.extend(files(&folder, "libnvrtc.so"));
        }
    }
    for candidate in candidates {
        // Its second library is looked for by name only: have it there before.
        if let Some(folder) = candidate.parent().filter(|folder| folder.is_dir()) {
            for builtins in files(folder, "libnvrtc-builtins.so") {
                if let Err(error) = open(&builtins) {
                    tried.push(error);
                }
            }
        }
        match open(&candidate) {
            // SAFETY: A file of that name, or one that the user named as it.
            Ok(library) => match unsafe { Api::of(library) } {
                Some((api, version)) => {
                    return Ok((Nvrtc { library: candidate.display().to_string(), version }, api));
                }
                None => {
                    tried.push(format!("{}: not an NVRTC of CUDA 12 or 13", candidate.display()));
                }
            },
            Err(error) => tried.push(error),
        }
    }
    Err(format!(
        "NVRTC, which compiles the kernels, was not found ({}): install CUDA 12 or 13, or pip install \
         nvidia-cuda-nvrtc and set POLYTAPE_NVRTC to its libnvrtc.so.13",
        tried.join("; ")
    ))
}

/// The architecture name of a compute capability: with the features of Hopper where it is that.
pub fn architecture(major: i32, minor: i32) -> String {
    if (major, minor) == (9, 0) { "sm_90a".into() } else { format!("sm_{major}{minor}") }
}

fn options(arch: &str, bf16: bool) -> [String; 4] {
    [
        format!("--gpu-architecture={arch}"),
        format!("-DPOLYTAPE_BF16={}", u8::from(bf16)),
        "--std=c++17".into(),
        // Generic lambdas, which cannot say where they run.
        "--device-as-default-execution-space".into(),
    ]
}

/// FNV-1a.
fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01B3))
}

fn hash<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    fnv(parts.flat_map(|part| part.bytes().chain([0])))
}

fn hash_of(bytes: &[u8]) -> u64 {
    fnv(bytes.iter().copied())
}

/// Where compiled kernels are kept: `POLYTAPE_CACHE`, else the user's cache folder.
fn cache_dir() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    set("POLYTAPE_CACHE").or_else(|| Some(user()?.join("polytape")))
}

/// Where a module's cubin is kept.
fn cached(module: &str, arch: &str, bf16: bool) -> Option<PathBuf> {
    let all = HEADERS.iter().chain(&MODULES).flat_map(|(name, text)| [*name, *text]);
    let key = hash(all.chain(options(arch, bf16).iter().map(String::as_str)));
    let dtype = if bf16 { "bf16" } else { "f32" };
    Some(cache_dir()?.join(format!("{module}-{arch}-{dtype}-{key:016x}.cubin")))
}

/// Fails now if a kernel would have to be compiled later and cannot be.
///
/// # Errors
/// As [`find`].
pub fn check_ready(arch: &str) -> Result<()> {
    let is_cached = |module, bf16| cached(module, arch, bf16).is_some_and(|file| file.exists());
    if modules().all(|module| is_cached(module, false) && is_cached(module, true)) {
        return Ok(());
    }
    find().map(|_| ())
}

/// A module's cubin for an architecture, from the cache or compiled now.
///
/// # Errors
/// If NVRTC is not there or refuses the source: with its log.
pub fn cubin(module: &str, arch: &str, bf16: bool) -> Result<Vec<u8>> {
    if let Some(cubin) = cached(module, arch, bf16).and_then(|file| kept(&file)) {
        return Ok(cubin);
    }
    compiled(module, arch, bf16)
}

/// A module's cubin compiled now, whatever is kept; it is kept instead.
///
/// # Errors
/// As [`cubin`].
pub fn compiled(module: &str, arch: &str, bf16: bool) -> Result<Vec<u8>> {
    let cubin = compile_for(module, arch, bf16)?;
    if let Some(file) = cached(module, arch, bf16)
        && let Err(error) = keep(&file, &cubin)
    {
        tracing::warn!("cannot keep compiled kernels: {error}");
    }
    Ok(cubin)
}

/// Writes a cubin with the hash of its bytes behind it.
fn keep(file: &Path, cubin: &[u8]) -> Result<()> {
    let dir = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    write_atomically(file, |file| {
        file.write_all(cubin)?;
        file.write_all(&hash_of(cubin).to_le_bytes())
    })
}

/// What [`keep`] wrote, if the file is whole.
fn kept(file: &Path) -> Option<Vec<u8>> {
    let mut cubin = fs::read(file).ok()?;
    let (bytes, hash) = cubin.split_last_chunk::<8>()?;
    let n = (u64::from_le_bytes(*hash) == hash_of(bytes)).then_some(bytes.len())?;
    cubin.truncate(n);
    Some(cubin)
}

/// The text of a module's file.
fn source(module: &str) -> Result<&'static str> {
    let file = format!("{module}.cu");
    let found = MODULES.iter().find(|(name, _)| *name == file);
    found
        .map(|(_, text)| *text)
        .ok_or_else(|| Error::Device(format!("there are no kernels called {module}")))
}

/// Compiles a text that may include the headers of `cuda/`, without the cache.
///
/// # Errors
/// As [`cubin`].
pub fn compile_source(module: &str, text: &str, options: &[String]) -> Result<Vec<u8>> {
    let (_, api) = loaded()?;
    let name = format!("{module}.cu");
    let c_string = |text: &str| CString::new(text).expect("sources have no NUL");
    let (source, name) = (c_string(text), c_string(&name));
    let headers: Vec<_> = HEADERS.iter().map(|(_, text)| c_string(text)).collect();
    let names: Vec<_> = HEADERS.iter().map(|(name, _)| c_string(name)).collect();
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).collect()
    };
    let (headers_at, names_at) = (pointers(&headers), pointers(&names));
    let mut program = ptr::null_mut();
    // SAFETY: All strings end with NUL and outlive the call; the lists have the length given.
    unsafe {
        (api.create_program)(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as c_int,
            headers_at.as_ptr(),
            names_at.as_ptr(),
        )
    }
    .result()
    .map_err(|error| Error::Device(format!("NVRTC: {error:?}")))?;
    let options: Vec<_> = options.iter().map(|option| c_string(option)).collect();
    let options_at = pointers(&options);
    // SAFETY: The program was just created and is destroyed below, once; the options end with NUL, are as many as it says
    // and outlive the call; `cubin` has as many bytes as NVRTC says.
    let cubin = unsafe {
        let compile = (api.compile_program)(program, options.len() as c_int, options_at.as_ptr());
        compile.result().and_then(|()| filled(program, api.cubin_bytes, api.cubin))
    };
    let cubin = cubin.map_err(|error| {
        // SAFETY: The program is alive; the log has as many bytes as NVRTC says, NUL included.
        let log = unsafe { filled(program, api.log_bytes, api.log) }.unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        Error::Device(format!("NVRTC refuses cuda/{module}.cu ({error:?}):\n{log}"))
    });
    // SAFETY: The program is alive and not used afterwards.
    if let Err(error) = unsafe { (api.destroy_program)(&mut program) }.result() {
        tracing::warn!("NVRTC: {error:?}");
    }
    cubin
}

/// Bytes of a program, by the function that says how many and the one that writes them.
///
/// # Safety
/// The program is alive, and the functions are a pair of NVRTC's.
unsafe fn filled(
    program: nvrtcProgram,
    count: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> nvrtcResult,
    fill: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
) -> std::result::Result<Vec<u8>, NvrtcError> {
    let mut n = 0;
    // SAFETY: The caller's promise; there is room for what is written.
    unsafe {
        count(program, &mut n).result()?;
        let mut bytes = vec![0_u8; n];
        fill(program, bytes.as_mut_ptr().cast()).result()?;
        Ok(bytes)
    }
}

/// Compiles a module for an architecture, without the cache: for tests.
///
/// # Errors
/// As [`cubin`].
pub fn compile_for(module: &str, arch: &str, bf16: bool) -> Result<Vec<u8>> {
    compile_source(module, source(module)?, &options(arch, bf16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_in_the_folder_is_inside_the_binary() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut found: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        let mut inside: Vec<_> = HEADERS.iter().chain(&MODULES).map(|(name, _)| *name).collect();
        inside.sort_unstable();
        assert_eq!(found, inside);
    }

    #[test]
    fn architectures_have_their_names() {
        assert_eq!(architecture(8, 0), "sm_80");
        assert_eq!(architecture(9, 0), "sm_90a");
        assert_eq!(architecture(12, 0), "sm_120");
    }

    #[test]
    fn what_is_kept_is_read_back_only_if_it_is_whole() {
        let dir = env::temp_dir().join(format!("polytape-kept-{}", std::process::id()));
        let file = dir.join("some/module.cubin");
        assert_eq!(kept(&file), None);
        keep(&file, b"a cubin").unwrap();
        assert_eq!(kept(&file).unwrap(), b"a cubin");
        let whole = fs::read(&file).unwrap();
        for (n, last) in [(0, 0), (7, 0), (whole.len() - 1, 0), (whole.len(), 1)] {
            let mut torn = whole[..n].to_vec();
            torn.iter_mut().rev().take(last).for_each(|byte| *byte ^= 1);
            fs::write(&file, torn).unwrap();
            assert_eq!(kept(&file), None, "{n} bytes");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn keys_tell_texts_apart() {
        assert_ne!(hash(["ab", "c"].into_iter()), hash(["a", "bc"].into_iter()));
    }
}
