//! The interrupted thread: its registers, and what becomes of each instruction.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::UnsafeCell,
    fmt::{self, Write},
    io, mem,
    ptr::{self, NonNull},
    sync::{Once, OnceLock},
};

use iced_x86::{Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::{general::has_segment, tile::Tiles, vector::Vector};

/// Has the process execute what the CPU refuses.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // The decoder's tables are made when it is first used: not in the handler, which allocates nothing.
        let nop = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        assert_eq!(nop.mnemonic(), Mnemonic::Nop);
        Wide::places();
        for signal in [libc::SIGILL, libc::SIGTRAP] {
            // SAFETY: all zeros is a valid sigaction, completed below; the handler has the signature that
            // SA_SIGINFO asks for. It allocates nothing, so it may interrupt whatever it does; no other signal
            // interrupts it, which would find the thread's signal stack free, as the handler has left it.
            let result = unsafe {
                let mut action: libc::sigaction = mem::zeroed();
                action.sa_sigaction = handle as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigfillset(&raw mut action.sa_mask);
                libc::sigaction(signal, &raw const action, ptr::null_mut())
            };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        }
    });
}

/// What a thread has beside the CPU's own registers.
pub struct State {
    /// Of registers 0..16 only the bytes from 32 on.
    pub vectors: [Vector; 32],
    /// Those of registers 0..16 whose upper bytes are not all zero, a bit each.
    pub dirty: u16,
    pub masks: [u64; 8],
    pub tiles: Tiles,
    /// The top of the handler's stack, once there is one.
    pub stack: usize,
    /// Instructions by address, with the bytes that they were decoded from.
    pub decoded: [(u128, Instruction); DECODED],
}

const DECODED: usize = 512;

thread_local! {
    static STATE: UnsafeCell<State> = const {
        UnsafeCell::new(State {
            vectors: [Vector::ZERO; 32],
            dirty: 0,
            masks: [0; 8],
            tiles: Tiles::NONE,
            stack: 0,
            // SAFETY: an instruction of zeros is what `Instruction::default` gives.
            decoded: unsafe { mem::zeroed() },
        })
    };
}

/// The interrupted thread.
pub struct Machine<'a> {
    /// General registers, instruction pointer and flags, by libc's `REG_*`.
    pub general: &'a mut [i64; 23],
    /// Its XSAVE area in the standard format, with room for 16 registers of 32 bytes.
    pub saved: NonNull<u8>,
    pub state: &'a mut State,
}

/// The trap flag: a signal after the next instruction.
const TRAP: i64 = 1 << 8;
/// Where the XSAVE area has the lower 16 bytes of vectors, the bits of what is in use, and bytes 16..32.
const XMM: usize = 160;
const IN_USE: usize = 512;
const YMM: usize = 576;

/// What an XSAVE area has of AVX-512: masks, bytes from 32 on of registers 0..16, and registers 16..32.
#[derive(Clone, Copy)]
enum Wide {
    Masks,
    Upper,
    More,
}

impl Wide {
    const ALL: [Self; 3] = [Self::Masks, Self::Upper, Self::More];

    /// Where they begin. (Asked once: in a virtual machine the instruction takes as long as a signal.)
    fn places() -> &'static [usize; 3] {
        static PLACES: OnceLock<[usize; 3]> = OnceLock::new();
        PLACES.get_or_init(|| Self::ALL.map(|part| __cpuid_count(0xD, part.bit()).ebx as usize))
    }

    /// Its bit among those of what is in use.
    fn bit(self) -> u32 {
        5 + self as u32
    }

    fn bytes(self) -> usize {
        match self {
            Self::Masks => 8 * 8,
            Self::Upper => 16 * 32,
            Self::More => 16 * 64,
        }
    }
}

/// Instructions that are executed here after the last one of AVX-512 although the CPU could go on.
const PATIENCE: usize = 64;

/// Bytes of the stack that a thread's handler works on: what Rust gives a thread for signals is too small.
const STACK: usize = 1 << 18;

extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives the context of the interrupted thread, which outlives the call. Its stack is
    // fresh memory that only this thread's handler uses, which does not interrupt itself; the stack
    // pointer comes back before anything else happens, from a register that the callee keeps.
    unsafe {
        let context = &raw mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        asm!(
            "mov r12, rsp",
            "mov rsp, {stack}",
            "call {go_on}",
            "mov rsp, r12",
            stack = in(reg) STATE.with(|state| (*state.get()).stack()),
            go_on = sym go_on,
            in("edi") signal,
            in("rsi") context,
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

impl State {
    /// The top of the handler's stack.
    fn stack(&mut self) -> usize {
        if self.stack == 0 {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a fresh anonymous mapping at an address of the system's choice.
            let memory = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(ptr::null_mut(), STACK, protection, flags, -1, 0)
            };
            if memory == libc::MAP_FAILED {
                fatal(format_args!("no memory for a stack"));
            }
            self.stack = memory.expose_provenance() + STACK;
        }
        self.stack
    }
}

/// Executes instructions until there is one for the CPU.
extern "C" fn go_on(signal: libc::c_int, context: &mut libc::mcontext_t) {
    let saved = NonNull::new(context.fpregs.cast::<u8>());
    let saved = saved.unwrap_or_else(|| fatal(format_args!("no vector registers were saved")));
    let (own, interrupted) = (ptr::from_ref(context).addr(), context.gregs[libc::REG_RSP as usize]);
    if (interrupted - (1 << 16)..interrupted).contains(&(own as i64)) {
        // The code that is executed here would write over what the kernel put there.
        fatal(format_args!("a thread has no stack of its own for signals"));
    }
    // SAFETY: the state is the thread's own, and this handler, which uses it, does not interrupt itself.
    let state = unsafe { &mut *STATE.with(UnsafeCell::get) };
    let mut machine = Machine { general: &mut context.gregs, saved, state };
    let owns_vectors = !is_x86_feature_detected!("avx512f");
    if owns_vectors {
        machine.prepare();
    }
    let mut is_refused = signal == libc::SIGILL;
    // A signal costs as much as hundreds of instructions here, so the CPU is not left to go on at once.
    let mut n_since = 0;
    loop {
        let instruction = machine.fetch();
        if instruction.is_of_tiles() || (owns_vectors && instruction.is_of_avx512()) {
            machine.execute(&instruction);
            n_since = 0;
        } else if is_refused && !owns_vectors && instruction.is_of_bf16() {
            // A CPU with AVX-512 and without AVX512-BF16.
            machine.prepare();
            machine.borrow_vectors();
            machine.execute(&instruction);
            machine.return_vectors();
        } else if is_refused {
            fatal(format_args!("{:?} is not one of AVX-512 or AMX", instruction.code()));
        } else if (machine.state.dirty == 0 && n_since >= PATIENCE)
            || !(machine.execute_general(&instruction)
                || (owns_vectors && machine.execute_avx(&instruction)))
        {
            machine.before_native(&instruction);
            break;
        } else {
            n_since += 1;
        }
        is_refused = false;
    }
    let traps = machine.state.dirty != 0;
    let flags = &mut machine.general[libc::REG_EFL as usize];
    *flags = if traps { *flags | TRAP } else { *flags & !TRAP };
}

/// Ends the process with a message: what the process was doing cannot go on.
pub fn fatal(why: fmt::Arguments<'_>) -> ! {
    /// Standard error without locks or buffers, which the interrupted code may hold.
    struct Stderr;
    impl Write for Stderr {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            // SAFETY: `write` reads the bytes of `text`.
            unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
            Ok(())
        }
    }
    let _ = writeln!(Stderr, "the x86 emulator: {why}");
    std::process::abort()
}

/// What the emulator asks of an instruction.
trait Foreign {
    /// Whether it belongs to AVX-512.
    fn is_of_avx512(&self) -> bool;
    /// Whether it belongs to AMX.
    fn is_of_tiles(&self) -> bool;
    /// Whether it belongs to AVX512-BF16.
    fn is_of_bf16(&self) -> bool;
    /// Whether it compares vectors: into a mask where it is one of AVX-512, else into a vector.
    fn is_compare(&self) -> bool;
    /// Whether it shifts all elements by the same amount.
    fn is_shift(&self) -> bool;
}

impl Foreign for Instruction {
    fn is_of_avx512(&self) -> bool {
        match self.encoding() {
            EncodingKind::EVEX => true,
            EncodingKind::VEX => self.op0_register().is_k() || self.op1_register().is_k(),
            _ => false,
        }
    }

    fn is_of_tiles(&self) -> bool {
        use Mnemonic::*;
        matches!(
            self.mnemonic(),
            Ldtilecfg | Tileloadd | Tileloaddt1 | Tilestored | Tilezero | Tilerelease | Tdpbf16ps
        )
    }

    fn is_of_bf16(&self) -> bool {
        use Mnemonic::*;
        matches!(self.mnemonic(), Vcvtneps2bf16 | Vcvtne2ps2bf16)
    }

    fn is_shift(&self) -> bool {
        use Mnemonic::*;
        matches!(self.mnemonic(), Vpslld | Vpsllq | Vpsrld | Vpsrlq)
    }

    fn is_compare(&self) -> bool {
        use Mnemonic::*;
        matches!(self.mnemonic(), Vcmpps | Vcmppd | Vpcmpeqd | Vpcmpeqq | Vpcmpgtd | Vpcmpgtq)
    }
}

/// Where the context has the sixteen general registers, in the CPU's order.
const GENERAL: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl Machine<'_> {
    /// Has all vector registers in the saved area, and loads them from there.
    fn prepare(&mut self) {
        const SSE: u64 = 1 << 1;
        const AVX: u64 = 1 << 2;
        // SAFETY: the area has the standard format, with the bits at `IN_USE`; what is not in use is zero
        // in the CPU and anything in memory.
        unsafe {
            let in_use = self.saved.byte_add(IN_USE).cast::<u64>();
            if in_use.read_unaligned() & SSE == 0 {
                self.saved.byte_add(XMM).write_bytes(0, 16 * 16);
            }
            if in_use.read_unaligned() & AVX == 0 {
                self.saved.byte_add(YMM).write_bytes(0, 16 * 16);
            }
            in_use.write_unaligned(in_use.read_unaligned() | SSE | AVX);
        }
    }

    /// The bytes of a part of the saved area that a CPU with AVX-512 has.
    fn wide(&mut self, part: Wide) -> &mut [u8] {
        let place = Wide::places()[part as usize];
        // SAFETY: the area has the standard format, in which the CPU says where a part is, and room for what
        // the CPU has; what is not in use is zero in the CPU and anything in memory.
        unsafe {
            let in_use = self.saved.byte_add(IN_USE).cast::<u64>();
            let bit = 1 << part.bit();
            let bytes = self.saved.byte_add(place);
            if in_use.read_unaligned() & bit == 0 {
                bytes.write_bytes(0, part.bytes());
                in_use.write_unaligned(in_use.read_unaligned() | bit);
            }
            std::slice::from_raw_parts_mut(bytes.as_ptr(), part.bytes())
        }
    }

    /// Copies what the CPU keeps to where [`Machine::execute`] looks for it.
    fn borrow_vectors(&mut self) {
        for part in Wide::ALL {
            let bytes: *const [u8] = self.wide(part);
            // SAFETY: the saved area is not part of the state.
            let bytes = unsafe { &*bytes };
            let state = &mut *self.state;
            match part {
                Wide::Masks => {
                    for (mask, bytes) in state.masks.iter_mut().zip(bytes.as_chunks().0) {
                        *mask = u64::from_le_bytes(*bytes);
                    }
                }
                Wide::Upper => {
                    for (vector, bytes) in state.vectors.iter_mut().zip(bytes.as_chunks::<32>().0) {
                        vector.0[32..].copy_from_slice(bytes);
                    }
                }
                Wide::More => {
                    let vectors = state.vectors[16..].iter_mut();
                    vectors.zip(bytes.as_chunks().0).for_each(|(v, bytes)| v.0 = *bytes);
                }
            }
        }
    }

    /// Copies it back.
    fn return_vectors(&mut self) {
        let (masks, vectors) = (self.state.masks, self.state.vectors);
        for (bytes, mask) in self.wide(Wide::Masks).as_chunks_mut().0.iter_mut().zip(masks) {
            *bytes = mask.to_le_bytes();
        }
        for (bytes, v) in self.wide(Wide::Upper).as_chunks_mut::<32>().0.iter_mut().zip(&vectors) {
            bytes.copy_from_slice(&v.0[32..]);
        }
        let more = self.wide(Wide::More).as_chunks_mut().0;
        more.iter_mut().zip(&vectors[16..]).for_each(|(bytes, v)| *bytes = v.0);
        self.state.dirty = 0; // The CPU has them.
    }

    /// The next instruction.
    fn fetch(&mut self) -> Instruction {
        const LONGEST: usize = 15;
        let address = self.general[libc::REG_RIP as usize] as u64;
        // SAFETY: the CPU has just read its code there; sections of code end with more than 16 bytes of
        // other things before the end of the mapped pages.
        let bytes: [u8; 16] =
            unsafe { ptr::with_exposed_provenance::<[u8; 16]>(address as usize).read() };
        let (known, decoded) = &mut self.state.decoded[address as usize % DECODED];
        let key = u128::from_le_bytes(bytes);
        if *known != key || decoded.ip() != address {
            *known = key;
            *decoded =
                Decoder::with_ip(64, &bytes[..LONGEST], address, DecoderOptions::NONE).decode();
        }
        *decoded
    }

    /// Executes an instruction of AVX-512 or AMX.
    fn execute(&mut self, instruction: &Instruction) {
        let done = self.execute_tile(instruction)
            || self.execute_mask(instruction)
            || self.execute_vector(instruction);
        if !done {
            fatal(format_args!("{:?} is not implemented", instruction.code()));
        }
        self.general[libc::REG_RIP as usize] = instruction.next_ip() as i64;
    }

    /// Whether it is an instruction of AVX whose likes AVX-512 has. It is executed as one of these.
    fn execute_avx(&mut self, instruction: &Instruction) -> bool {
        let done = instruction.encoding() == EncodingKind::VEX
            && !(instruction.is_compare() || instruction.is_vsib() || has_segment(instruction))
            && !(instruction.is_shift() && instruction.op2_kind() == OpKind::Memory)
            && self.execute_vector(instruction);
        if done {
            self.general[libc::REG_RIP as usize] = instruction.next_ip() as i64;
        }
        done
    }

    /// Does what the CPU would do to the bytes that it does not have, before it executes an instruction.
    fn before_native(&mut self, instruction: &Instruction) {
        use Mnemonic::*;
        match instruction.mnemonic() {
            Vzeroupper | Vzeroall => (0..16).for_each(|n| self.clear_upper(n)),
            Vcomiss | Vcomisd | Vucomiss | Vucomisd | Vptest | Vtestps | Vtestpd => {}
            _ if instruction.encoding() == EncodingKind::VEX => {
                let written = instruction.op0_register();
                if written.is_xmm() || written.is_ymm() {
                    self.clear_upper(written.number());
                }
                if instruction.is_vsib() {
                    self.clear_upper(instruction.op2_register().number()); // A gather's mask.
                }
            }
            _ => {}
        }
    }

    fn clear_upper(&mut self, register: usize) {
        self.state.vectors[register] = Vector::ZERO;
        self.state.dirty &= !(1 << register);
    }

    /// A vector register, all 64 bytes.
    pub fn vector(&self, register: Register) -> Vector {
        let n = register.number();
        let mut vector = self.state.vectors[n];
        if n < 16 {
            // SAFETY: both areas have 16 bytes for each of 16 registers.
            let (low, high) = unsafe {
                let [low, high] = [XMM, YMM].map(|area| self.saved.byte_add(area + 16 * n));
                (low.cast::<[u8; 16]>().read(), high.cast::<[u8; 16]>().read())
            };
            vector.0[..16].copy_from_slice(&low);
            vector.0[16..32].copy_from_slice(&high);
        }
        vector
    }

    pub fn set_vector(&mut self, register: Register, vector: Vector) {
        let n = register.number();
        self.state.vectors[n] = vector;
        if n < 16 {
            let (low, rest) = vector.0.split_first_chunk::<16>().expect("64 bytes");
            let (high, upper) = rest.split_first_chunk::<16>().expect("48 bytes");
            // SAFETY: as in `vector`.
            unsafe {
                self.saved.byte_add(XMM + 16 * n).cast::<[u8; 16]>().write(*low);
                self.saved.byte_add(YMM + 16 * n).cast::<[u8; 16]>().write(*high);
            }
            let is_dirty = upper.iter().any(|&byte| byte != 0);
            self.state.dirty = self.state.dirty & !(1 << n) | u16::from(is_dirty) << n;
        }
    }

    /// A general register, as wide as it is, without its sign.
    pub fn general(&self, register: Register) -> u64 {
        let value = self.general[GENERAL[register.full_register().number()] as usize] as u64;
        let is_second_byte =
            matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
        let value = if is_second_byte { value >> 8 } else { value };
        match register.size() {
            8 => value,
            n => value & ((1 << (8 * n)) - 1),
        }
    }

    /// Writes a register: 4 bytes clear the others of its 8, fewer do not.
    pub fn set_general(&mut self, register: Register, value: u64) {
        let whole = &mut self.general[GENERAL[register.full_register().number()] as usize];
        let is_second_byte =
            matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
        let before = *whole as u64;
        let result = match register.size() {
            1 if is_second_byte => before & !0xFF00 | (value & 0xFF) << 8,
            1 => before & !0xFF | value & 0xFF,
            2 => before & !0xFFFF | value & 0xFFFF,
            4 => value & 0xFFFF_FFFF,
            _ => value,
        };
        *whole = result as i64;
    }

    /// The address of an operand in memory; of one element, where they are scattered.
    pub fn address(&self, instruction: &Instruction, operand: u32, element: usize) -> usize {
        let address = instruction.virtual_address(operand, element, |register, element, size| {
            Some(match register {
                Register::DS | Register::ES | Register::SS | Register::CS => 0,
                _ if register.is_vector_register() => {
                    let value = self.vector(register).get(size, element);
                    if size == 4 { value as i32 as i64 as u64 } else { value }
                }
                _ if register.is_gpr() => self.general(register),
                _ => return None,
            })
        });
        address.unwrap_or_else(|| fatal(format_args!("no address: {:?}", instruction.code())))
            as usize
    }

    /// `size` bytes (1, 2, 4 or 8) of memory.
    pub fn load(&self, address: usize, size: usize) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: what the interrupted code reads there, which is what would be read had it not been
        // interrupted; if it may not, this faults as that would.
        unsafe {
            let from = ptr::with_exposed_provenance::<u8>(address);
            match size {
                1 => bytes[..1].copy_from_slice(&from.cast::<[u8; 1]>().read_volatile()),
                2 => bytes[..2].copy_from_slice(&from.cast::<[u8; 2]>().read_volatile()),
                4 => bytes[..4].copy_from_slice(&from.cast::<[u8; 4]>().read_volatile()),
                _ => bytes.copy_from_slice(&from.cast::<[u8; 8]>().read_volatile()),
            }
        }
        u64::from_le_bytes(bytes)
    }

    /// So many bytes of memory, as the first of a vector.
    pub fn load_vector(&self, address: usize, size: usize) -> Vector {
        let mut vector = Vector::ZERO;
        let from = ptr::with_exposed_provenance(address);
        // SAFETY: as in `load`; a vector has room for what an instruction reads.
        unsafe { ptr::copy_nonoverlapping::<u8>(from, vector.0[..size].as_mut_ptr(), size) };
        vector
    }

    /// As many bytes to memory.
    pub fn store(&mut self, address: usize, size: usize, value: u64) {
        let to = ptr::with_exposed_provenance_mut::<u8>(address);
        // SAFETY: as in `load`.
        unsafe {
            match size {
                1 => to.write_volatile(value as u8),
                2 => to.cast::<[u8; 2]>().write_volatile((value as u16).to_le_bytes()),
                4 => to.cast::<[u8; 4]>().write_volatile((value as u32).to_le_bytes()),
                _ => to.cast::<[u8; 8]>().write_volatile(value.to_le_bytes()),
            }
        }
    }
}
