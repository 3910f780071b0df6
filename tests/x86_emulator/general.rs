//! The instructions of the integer unit that loops over vectors are made of. Others are the CPU's: each
//! of these is only faster here than a trap.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::machine::Machine;

const CARRY: i64 = 1;
const PARITY: i64 = 1 << 2;
const ZERO: i64 = 1 << 6;
const SIGN: i64 = 1 << 7;
const OVERFLOW: i64 = 1 << 11;

/// Whether its memory is a thread's own, whose address is not known here.
pub fn has_segment(i: &Instruction) -> bool {
    matches!(i.segment_prefix(), Register::FS | Register::GS)
}

fn parity(value: u64) -> bool {
    (value as u8).count_ones().is_multiple_of(2)
}

impl Machine<'_> {
    /// Sets the flags that are the same for all; the one that decimals need is not kept.
    pub fn set_flags(&mut self, carry: bool, zero: bool, sign: bool, overflow: bool, parity: bool) {
        let flags = &mut self.general[libc::REG_EFL as usize];
        for (bit, is_set) in
            [(CARRY, carry), (ZERO, zero), (SIGN, sign), (OVERFLOW, overflow), (PARITY, parity)]
        {
            *flags = if is_set { *flags | bit } else { *flags & !bit };
        }
    }

    fn holds(&self, condition: ConditionCode) -> bool {
        let flags = self.general[libc::REG_EFL as usize];
        let [carry, zero, sign, overflow, parity] =
            [CARRY, ZERO, SIGN, OVERFLOW, PARITY].map(|bit| flags & bit != 0);
        match condition {
            ConditionCode::o => overflow,
            ConditionCode::no => !overflow,
            ConditionCode::b => carry,
            ConditionCode::ae => !carry,
            ConditionCode::e => zero,
            ConditionCode::ne => !zero,
            ConditionCode::be => carry || zero,
            ConditionCode::a => !carry && !zero,
            ConditionCode::s => sign,
            ConditionCode::ns => !sign,
            ConditionCode::p => parity,
            ConditionCode::np => !parity,
            ConditionCode::l => sign != overflow,
            ConditionCode::ge => sign == overflow,
            ConditionCode::le => zero || sign != overflow,
            ConditionCode::g => !zero && sign == overflow,
            ConditionCode::None => true,
        }
    }

    /// Bytes of an operand.
    fn size(i: &Instruction, op: u32) -> Option<usize> {
        match i.op_kind(op) {
            OpKind::Register if i.op_register(op).is_gpr() => Some(i.op_register(op).size()),
            OpKind::Memory => Some(i.memory_size().size()),
            _ => None,
        }
    }

    /// An operand, without its sign.
    fn value(&self, i: &Instruction, op: u32, size: usize) -> Option<u64> {
        Some(match i.op_kind(op) {
            OpKind::Register if i.op_register(op).is_gpr() => self.general(i.op_register(op)),
            OpKind::Memory if matches!(size, 1 | 2 | 4 | 8) => {
                self.load(self.local_address(i, op)?, size)
            }
            OpKind::Immediate8 | OpKind::Immediate32 | OpKind::Immediate64 => i.immediate(op),
            OpKind::Immediate8to16 => u64::from(i.immediate8to16() as u16),
            OpKind::Immediate16 => u64::from(i.immediate16()),
            OpKind::Immediate8to32 => u64::from(i.immediate8to32() as u32),
            OpKind::Immediate8to64 => i.immediate8to64() as u64,
            OpKind::Immediate32to64 => i.immediate32to64() as u64,
            _ => return None,
        })
    }

    /// An address, unless it is in a segment of its own.
    fn local_address(&self, i: &Instruction, op: u32) -> Option<usize> {
        (!has_segment(i)).then(|| self.address(i, op, 0))
    }

    /// Whether it is one of these.
    pub fn execute_general(&mut self, i: &Instruction) -> bool {
        self.try_general(i).is_some()
    }

    fn try_general(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic::*;
        if i.has_lock_prefix() {
            return None; // Atomic only if the CPU does it.
        }
        let mut next = i.next_ip();
        match i.mnemonic() {
            Nop | Endbr64 | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchnta | Sfence => {}
            Jmp if i.op0_kind() == OpKind::NearBranch64 => next = i.near_branch64(),
            _ if i.is_jcc_short_or_near() => {
                if self.holds(i.condition_code()) {
                    next = i.near_branch64();
                }
            }
            Call if i.op0_kind() == OpKind::NearBranch64 => {
                self.push(next);
                next = i.near_branch64();
            }
            Call => {
                Self::size(i, 0).filter(|&size| size == 8)?;
                let to = self.value(i, 0, 8)?;
                self.push(next);
                next = to;
            }
            Ret if i.op_count() == 0 => next = self.pop(),
            Push => {
                Self::size(i, 0).filter(|&size| size == 8)?;
                let value = self.value(i, 0, 8)?;
                self.push(value);
            }
            Pop if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64() => {
                let value = self.pop();
                self.set_general(i.op0_register(), value);
            }
            Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne
            | Cmovno | Cmovnp | Cmovns | Cmovo | Cmovp | Cmovs => {
                let size = Self::size(i, 0)?;
                let chosen = u32::from(self.holds(i.condition_code()));
                let value = self.value(i, chosen, size)?;
                self.set_general(i.op0_register(), value);
            }
            Shl | Shr | Sar
                if i.op1_kind() == OpKind::Immediate8 && i.op0_kind() == OpKind::Register =>
            {
                let size = Self::size(i, 0)?;
                let (n, bits) = (u32::from(i.immediate8()), 8 * size as u32);
                if n == 0 || n >= bits {
                    return None;
                }
                let a = self.general(i.op0_register());
                let signed = ((a << (64 - bits)) as i64) >> (64 - bits);
                let (result, last) = match i.mnemonic() {
                    Shl => (a << n, a >> (bits - n)),
                    Shr => (a >> n, a >> (n - 1)),
                    _ => ((signed >> n) as u64, a >> (n - 1)),
                };
                let result = result << (64 - bits) >> (64 - bits);
                let top = |x: u64| x >> (bits - 1) & 1 == 1;
                // The overflow of a shift by more than one is not defined.
                let overflow = match i.mnemonic() {
                    Shl => top(result) != (last & 1 == 1),
                    Shr => top(a),
                    _ => false,
                };
                self.set_flags(last & 1 == 1, result == 0, top(result), overflow, parity(result));
                self.set_general(i.op0_register(), result);
            }
            Mul | Imul if i.op_count() == 1 && Self::size(i, 0)? == 8 => {
                let (a, b) = (self.general(Register::RAX), self.value(i, 0, 8)?);
                let is_signed = i.mnemonic() == Imul;
                let product = match is_signed {
                    true => (i128::from(a as i64) * i128::from(b as i64)) as u128,
                    false => u128::from(a) * u128::from(b),
                };
                let (low, high) = (product as u64, (product >> 64) as u64);
                let kept = if is_signed { ((low as i64) >> 63) as u64 } else { 0 };
                self.set_general(Register::RAX, low);
                self.set_general(Register::RDX, high);
                self.set_flags(high != kept, false, false, high != kept, false); // The rest is not defined.
            }
            Div if Self::size(i, 0)? >= 4 => {
                let size = Self::size(i, 0)?;
                let divisor = u128::from(self.value(i, 0, size)?);
                let (low, high) = match size {
                    4 => (Register::EAX, Register::EDX),
                    _ => (Register::RAX, Register::RDX),
                };
                let dividend =
                    u128::from(self.general(high)) << (8 * size) | u128::from(self.general(low));
                let quotient = dividend.checked_div(divisor)?;
                if quotient >> (8 * size) != 0 {
                    return None; // A fault, the CPU's.
                }
                self.set_general(low, quotient as u64);
                self.set_general(high, (dividend % divisor) as u64);
            }
            Neg => {
                let size = Self::size(i, 0)?;
                let a = self.value(i, 0, size)?;
                let result = self.sum(size, 0, a, true);
                self.put(i, size, result)?;
            }
            Not => {
                let size = Self::size(i, 0)?;
                let a = self.value(i, 0, size)?;
                self.put(i, size, !a)?;
            }
            Bt if i.op1_kind() == OpKind::Immediate8 && i.op0_kind() == OpKind::Register => {
                let bits = 8 * Self::size(i, 0)? as u32;
                let is_set =
                    self.general(i.op0_register()) >> (u32::from(i.immediate8()) % bits) & 1 == 1;
                let flags = &mut self.general[libc::REG_EFL as usize];
                *flags = *flags & !CARRY | i64::from(is_set);
            }
            Adc | Sbb => {
                let size = Self::size(i, 0)?;
                let (a, b) = (self.value(i, 0, size)?, self.value(i, 1, size)?);
                let carry = self.general[libc::REG_EFL as usize] & CARRY;
                let result = self.sum_with(size, a, b, i.mnemonic() == Sbb, carry as u64);
                self.put(i, size, result)?;
            }
            Seta | Setae | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno
            | Setnp | Setns | Seto | Setp | Sets => {
                let value = u64::from(self.holds(i.condition_code()));
                self.put(i, 1, value)?;
            }
            Imul if i.op_count() > 1 => {
                let size = Self::size(i, 0)?;
                let first = i.op_count() - 2;
                let (a, b) = (self.value(i, first, size)?, self.value(i, first + 1, size)?);
                let unused = 64 - 8 * size as u32;
                let [x, y] = [a, b].map(|x| i128::from((x << unused) as i64 >> unused));
                let result = (x * y) as u64;
                let kept = i128::from((result << unused) as i64 >> unused);
                let is_cut = kept != x * y;
                self.set_flags(is_cut, false, false, is_cut, false); // The others are not defined.
                self.set_general(i.op0_register(), result);
            }
            Lea => {
                Self::size(i, 0)?;
                let address = self.local_address(i, 1)? as u64;
                self.set_general(i.op0_register(), address);
            }
            Mov => {
                let size = Self::size(i, 0)?;
                let value = self.value(i, 1, size)?;
                self.put(i, size, value)?;
            }
            Movzx | Movsxd => {
                Self::size(i, 0)?;
                let size = match i.op1_kind() {
                    OpKind::Memory => i.memory_size().size(),
                    _ => i.op1_register().size(),
                };
                let value = self.value(i, 1, size)?;
                let is_signed = i.mnemonic() == Movsxd;
                let value = if is_signed { value as i32 as i64 as u64 } else { value };
                self.set_general(i.op0_register(), value);
            }
            Add | Sub | Cmp => {
                let size = Self::size(i, 0)?;
                let (a, b) = (self.value(i, 0, size)?, self.value(i, 1, size)?);
                let result = self.sum(size, a, b, i.mnemonic() != Add);
                if i.mnemonic() != Cmp {
                    self.put(i, size, result)?;
                }
            }
            Inc | Dec => {
                let size = Self::size(i, 0)?;
                let a = self.value(i, 0, size)?;
                let carry = self.general[libc::REG_EFL as usize] & CARRY;
                let result = self.sum(size, a, 1, i.mnemonic() == Dec);
                let flags = &mut self.general[libc::REG_EFL as usize];
                *flags = *flags & !CARRY | carry;
                self.put(i, size, result)?;
            }
            And | Or | Xor | Test => {
                let size = Self::size(i, 0)?;
                let (a, b) = (self.value(i, 0, size)?, self.value(i, 1, size)?);
                let result = match i.mnemonic() {
                    Or => a | b,
                    Xor => a ^ b,
                    _ => a & b,
                };
                let is_negative = result >> (8 * size - 1) & 1 == 1;
                self.set_flags(false, result == 0, is_negative, false, parity(result));
                if i.mnemonic() != Test {
                    self.put(i, size, result)?;
                }
            }
            _ => return None,
        }
        self.general[libc::REG_RIP as usize] = next as i64;
        Some(())
    }

    fn push(&mut self, value: u64) {
        let top = self.general[libc::REG_RSP as usize] - 8;
        self.general[libc::REG_RSP as usize] = top;
        self.store(top as usize, 8, value);
    }

    fn pop(&mut self) -> u64 {
        let top = self.general[libc::REG_RSP as usize];
        self.general[libc::REG_RSP as usize] = top + 8;
        self.load(top as usize, 8)
    }

    /// To the first operand.
    fn put(&mut self, i: &Instruction, size: usize, value: u64) -> Option<()> {
        match i.op0_kind() {
            OpKind::Register => self.set_general(i.op0_register(), value),
            _ => self.store(self.local_address(i, 0)?, size, value),
        }
        Some(())
    }

    /// `a + b` or `a - b` with all flags.
    fn sum(&mut self, size: usize, a: u64, b: u64, is_difference: bool) -> u64 {
        self.sum_with(size, a, b, is_difference, 0)
    }

    /// With one more or less.
    fn sum_with(&mut self, size: usize, a: u64, b: u64, is_difference: bool, carry: u64) -> u64 {
        let unused = 64 - 8 * size as u32;
        let cut = |x: u64| x << unused >> unused;
        let signed = |x: u64| i128::from((x << unused) as i64 >> unused);
        let (a, b, carry) = (cut(a), cut(b), i128::from(carry));
        let (exact, exact_signed) = match is_difference {
            true => (i128::from(a) - i128::from(b) - carry, signed(a) - signed(b) - carry),
            false => (i128::from(a) + i128::from(b) + carry, signed(a) + signed(b) + carry),
        };
        let result = cut(exact as u64);
        let overflow = signed(result) != exact_signed;
        let is_negative = signed(result) < 0;
        self.set_flags(
            i128::from(result) != exact,
            result == 0,
            is_negative,
            overflow,
            parity(result),
        );
        result
    }
}
