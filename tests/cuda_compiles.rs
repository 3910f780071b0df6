//! Every kernel through NVRTC, without a GPU: it compiles for sm_80 and sm_90a in both compute types,
//! uses no local memory (so nothing is spilled), and its registers and shared memory fit a block of the
//! size that it is launched with.
//!
//! Needs NVRTC (`pip install nvidia-cuda-nvrtc`, found as `compile::find` says); without it the tests
//! say so and pass. `POLYTAPE_NVRTC_REQUIRED=1` makes its absence a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

#[path = "common/skipped.rs"]
mod skipped;

use std::collections::BTreeMap;

use polytape::kernels::cuda::compile;
use rayon::prelude::*;

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];
/// Registers of a multiprocessor, and shared memory of a block that is not asked for at launch.
const REGISTERS: u32 = 65536;
const STATIC_SHARED_BYTES: u64 = 48 << 10;

/// Whether NVRTC is there; says so if not.
fn has_nvrtc() -> bool {
    match compile::find() {
        Ok(_) => true,
        Err(error) => {
            let required = std::env::var_os("POLYTAPE_NVRTC_REQUIRED").is_some_and(|v| v == "1");
            assert!(!required, "{error}");
            skipped::skipped(error);
            false
        }
    }
}

/// What a kernel uses.
#[derive(Debug, Default)]
struct Usage {
    registers: Option<u32>,
    /// Local memory of a thread: arrays that are not in registers, and spills.
    frame_bytes: Option<u32>,
    shared_bytes: u64,
    /// From `__launch_bounds__`.
    max_threads: Option<u32>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
fn text_at(bytes: &[u8], at: usize) -> String {
    let end = bytes[at..].iter().position(|&b| b == 0).unwrap();
    String::from_utf8(bytes[at..at + end].to_vec()).unwrap()
}

/// The attributes of a `.nv.info` section: number and value, for those that have one.
fn attributes(section: &[u8]) -> Vec<(u8, &[u8])> {
    let (mut at, mut found) = (0, Vec::new());
    while at < section.len() {
        let (format, number) = (section[at], section[at + 1]);
        let size = if format == 4 { usize::from(u16_at(section, at + 2)) } else { 0 };
        found.push((number, &section[at + 4..at + 4 + size]));
        at += 4 + size;
    }
    found
}

/// What each kernel of a cubin (an ELF file) uses.
fn usage(cubin: &[u8]) -> BTreeMap<String, Usage> {
    let (table, entry_bytes) = (u64_at(cubin, 40) as usize, usize::from(u16_at(cubin, 58)));
    let (n, names) = (usize::from(u16_at(cubin, 60)), usize::from(u16_at(cubin, 62)));
    let header = |i: usize| &cubin[table + i * entry_bytes..][..entry_bytes];
    // Offset, size, linked section, entry size.
    let place = |i: usize| (u64_at(header(i), 24) as usize, u64_at(header(i), 32) as usize);
    let name = |i: usize| text_at(cubin, place(names).0 + u32_at(header(i), 0) as usize);
    let is_nobits = |i: usize| u32_at(header(i), 4) == 8;
    let content = |i: usize| &cubin[place(i).0..][..place(i).1];
    let all: Vec<(usize, String)> = (0..n).map(|i| (i, name(i))).collect();

    let mut kernels: BTreeMap<String, Usage> = BTreeMap::new();
    for (_, section) in &all {
        if let Some(kernel) = section.strip_prefix(".text.") {
            kernels.insert(kernel.to_owned(), Usage::default());
        }
    }
    let symbols = all.iter().find(|(_, section)| section == ".symtab").unwrap().0;
    let strings = u32_at(header(symbols), 40) as usize;
    let symbol = |i: u32| {
        let at = place(symbols).0 + 24 * i as usize;
        text_at(cubin, place(strings).0 + u32_at(cubin, at) as usize)
    };
    for (i, section) in &all {
        if section == ".nv.info" {
            for (number, value) in attributes(content(*i)) {
                let by_symbol = matches!(number, 0x2F | 0x11);
                let Some(kernel) = by_symbol.then(|| symbol(u32_at(value, 0))) else { continue };
                let Some(usage) = kernels.get_mut(&kernel) else { continue };
                let field =
                    if number == 0x2F { &mut usage.registers } else { &mut usage.frame_bytes };
                *field = Some(u32_at(value, 4));
            }
        } else if let Some(usage) =
            section.strip_prefix(".nv.info.").and_then(|kernel| kernels.get_mut(kernel))
        {
            let bounds = attributes(content(*i)).into_iter().find(|(number, _)| *number == 0x05);
            usage.max_threads = bounds.map(|(_, value)| u32_at(value, 0));
        } else if let Some(usage) =
            section.strip_prefix(".nv.shared.").and_then(|kernel| kernels.get_mut(kernel))
        {
            assert!(is_nobits(*i));
            usage.shared_bytes = place(*i).1 as u64;
        }
    }
    kernels
}

/// `BLOCK_REGISTERS` of `cuda/linear_wgmma.cu`.
const WGMMA_REGISTERS: u32 = 168;

/// What is wrong with a kernel.
fn problems(kernel: &str, usage: &Usage) -> Vec<String> {
    let mut problems = Vec::new();
    match usage.frame_bytes {
        Some(0) => {}
        Some(bytes) => problems.push(format!("{kernel} keeps {bytes} bytes in local memory")),
        None => problems.push(format!("{kernel} does not say what it keeps in local memory")),
    }
    match (usage.registers, usage.max_threads) {
        (Some(registers), Some(threads)) => {
            // Handed out to warps in units of 8 a thread.
            let block = registers.next_multiple_of(8) * threads.next_multiple_of(32);
            if block > REGISTERS {
                problems.push(format!("{kernel} needs {block} registers for {threads} threads"));
            }
            // Its warpgroups pass registers around, by numbers that rest on what a block starts with.
            if kernel.contains("wgmma") && registers != WGMMA_REGISTERS {
                problems.push(format!("{kernel} starts with {registers} registers a thread"));
            }
        }
        _ => problems.push(format!("{kernel} has no registers or no launch bounds")),
    }
    if usage.shared_bytes > STATIC_SHARED_BYTES {
        problems.push(format!("{kernel} has {} bytes of shared memory", usage.shared_bytes));
    }
    problems
}

#[test]
fn every_kernel_compiles_and_fits() {
    if !has_nvrtc() {
        return;
    }
    let compilations: Vec<_> = compile::modules()
        .flat_map(|module| ARCHITECTURES.map(|arch| [false, true].map(|bf16| (module, arch, bf16))))
        .flatten()
        .collect();
    let checked = compilations.into_par_iter().map(|(module, arch, bf16)| {
        // Where a cache is named, it is filled: for a machine without NVRTC.
        if std::env::var_os("POLYTAPE_CACHE").is_some() {
            compile::cubin(module, arch, bf16).unwrap_or_else(|e| panic!("{e}"));
        }
        let cubin = compile::compile_for(module, arch, bf16).unwrap_or_else(|e| panic!("{e}"));
        let kernels = usage(&cubin);
        let has_some = match module {
            "linear_wgmma" => arch == "sm_90a" && bf16,
            "attention_tiles" => bf16,
            _ => true,
        };
        assert_eq!(!kernels.is_empty(), has_some, "{module} for {arch}, bf16={bf16}");
        let problems = kernels.iter().flat_map(|(kernel, usage)| problems(kernel, usage));
        let problems = problems.map(|p| format!("{arch} bf16={bf16}: {p}"));
        (kernels.len(), problems.collect::<Vec<_>>())
    });
    let (n, found): (Vec<usize>, Vec<_>) = checked.collect::<Vec<_>>().into_iter().unzip();
    let (n, found) = (n.iter().sum::<usize>(), found.concat());
    assert!(found.is_empty(), "{found:#?}");
    println!("{n} kernels");
}

#[test]
fn what_does_not_fit_is_seen() {
    if !has_nvrtc() {
        return;
    }
    let source = r#"
        extern "C" __global__ void __launch_bounds__(64) local(float* x, int n) {
            float kept[64];
            for (int i = 0; i < 64; ++i) kept[i] = x[i * 7];
            float sum = 0;
            for (int i = 0; i < n; ++i) sum += kept[i * n % 64];
            x[threadIdx.x] = sum;
        }
        extern "C" __global__ void __launch_bounds__(32) fine(float* x) {
            __shared__ float y[10];
            y[threadIdx.x % 10] = x[1];
            __syncthreads();
            x[0] = y[threadIdx.x % 7];
        }
        extern "C" __global__ void unbounded(float* x) { *x = 1; }
    "#;
    for arch in ARCHITECTURES {
        let options = [format!("--gpu-architecture={arch}")];
        let kernels = usage(&compile::compile_source("test", source, &options).unwrap());
        assert_eq!(kernels.len(), 3);
        assert_eq!(problems("fine", &kernels["fine"]), [""; 0]);
        assert!(kernels["fine"].shared_bytes >= 40);
        assert!(problems("wgmma", &kernels["fine"])[0].contains("registers a thread"));
        assert!(problems("local", &kernels["local"])[0].contains("256 bytes in local memory"));
        assert!(problems("unbounded", &kernels["unbounded"])[0].contains("launch bounds"));
    }
    let error =
        compile::compile_source("test", "int f() { return x; }", &[]).unwrap_err().to_string();
    assert!(error.contains("identifier \"x\" is undefined"), "{error}");
}

/// One that does not may read what the kernel before it has not written yet, and only on a GPU, now and then.
#[test]
fn every_kernel_starts_by_waiting_for_the_one_before() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let mut n = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let file = file.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        for kernel in text.split("__global__").skip(1) {
            let (head, body) = kernel.split_once('{').unwrap();
            let first = body.trim_start_matches([' ', '\n', '\\']);
            assert!(first.starts_with("after_previous();"), "{}: {head}", file.display());
            n += 1;
        }
    }
    assert!(n > 40, "{n} kernels");
}
