//! Executes the instructions of AVX-512 and AMX on a CPU that refuses them, so that the kernels for
//! these run, and are compared with the oracle, on every machine.
//!
//! The CPU answers such an instruction with SIGILL. The handler executes it on the thread's saved
//! registers and goes on with the next one. What the CPU has no room for (bytes from 32 on of the vector
//! registers, registers from 16 on, masks, tiles) is kept beside, one set a thread. The CPU's own
//! instructions of AVX clear the upper bytes of what they write, and nobody would tell: as long as upper
//! bytes of the first 16 registers are not zero, the handler has the CPU trap after each of its instructions
//! (SIGTRAP) and does the clearing. Most of what loops are made of is executed here as well, because a trap
//! costs as much as hundreds of instructions.
//!
//! What an instruction does is written from Intel's manual (Software Developer's Manual, volume 2) for
//! what the compiler makes of `src/kernels/cpu`; another one ends the process with its name. Memory is
//! touched where the instruction touches it, element by element under a mask: a guard page is fatal here
//! as it is on the CPU. Rounding is to nearest even, and no flag of MXCSR is raised.

#![allow(unsafe_code, unreachable_pub)]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod general;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod machine;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tile;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod vector;

use polytape::kernels::cpu::isa::Isa;

/// The instruction sets that this CPU lacks, emulated in this process from now on. A CPU with AVX-512 keeps
/// its vectors to itself: there only tiles are emulated and, if it lacks them, the instructions of AVX512-BF16, and nothing
/// if it has half of AVX-512.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn lacking() -> Vec<Isa> {
    // SAFETY: the process executes what the CPU refuses before anybody gets what is returned.
    let mut lacking = unsafe { Isa::lacking() };
    if is_x86_feature_detected!("avx512f") && lacking.iter().any(|isa| isa.name() == "avx512") {
        lacking.clear();
    }
    if !lacking.is_empty() {
        machine::install();
    }
    lacking
}

/// The instruction sets that this CPU lacks: nothing is emulated on this system.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn lacking() -> Vec<Isa> {
    vec![]
}
