//! The instructions of AVX-512 on vectors and masks.

use std::cmp::Ordering;

use half::{bf16, f16};
use iced_x86::{Instruction, Mnemonic, OpKind, Register, RoundingControl};

use super::machine::{Machine, fatal};

/// 64 bytes.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Vector(pub [u8; 64]);

impl Vector {
    pub const ZERO: Self = Self([0; 64]);

    /// Element `i` of so many bytes, without its sign.
    #[inline(always)]
    pub fn get(&self, size: usize, i: usize) -> u64 {
        match size {
            1 => u64::from(self.0[i]),
            2 => u64::from(u16::from_le_bytes(self.0.as_chunks().0[i])),
            4 => u64::from(u32::from_le_bytes(self.0.as_chunks().0[i])),
            _ => u64::from_le_bytes(self.0.as_chunks().0[i]),
        }
    }

    #[inline(always)]
    pub fn set(&mut self, size: usize, i: usize, value: u64) {
        match size {
            1 => self.0[i] = value as u8,
            2 => self.0.as_chunks_mut().0[i] = (value as u16).to_le_bytes(),
            4 => self.0.as_chunks_mut().0[i] = (value as u32).to_le_bytes(),
            _ => self.0.as_chunks_mut().0[i] = value.to_le_bytes(),
        }
    }

    #[inline(always)]
    fn from_fn(size: usize, n: usize, element: impl Fn(usize) -> u64) -> Self {
        let mut vector = Self::ZERO;
        (0..n).for_each(|i| vector.set(size, i, element(i)));
        vector
    }
}

/// Zero in the place of a denormal, with its sign.
pub fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}

/// A function of f32 as one of bits.
fn f32s(f: impl Fn([f32; 3]) -> f32) -> impl Fn([u64; 3]) -> u64 {
    move |x| u64::from(f(x.map(|bits| f32::from_bits(bits as u32))).to_bits())
}

/// A function of f64 as one of bits.
fn f64s(f: impl Fn([f64; 3]) -> f64) -> impl Fn([u64; 3]) -> u64 {
    move |x| f(x.map(f64::from_bits)).to_bits()
}

/// To an integer, ties to even; what is out of range becomes the smallest.
fn to_i32(x: f32) -> i32 {
    let rounded = x.round_ties_even();
    if (-2_147_483_648.0..2_147_483_648.0).contains(&rounded) { rounded as i32 } else { i32::MIN }
}

/// A comparison of floats by its number in the instruction; those from 16 on differ in what they signal.
fn compares(predicate: u8, a: f64, b: f64) -> bool {
    use Ordering::{Equal, Greater, Less};
    let order = a.partial_cmp(&b);
    match predicate % 16 {
        0 => order == Some(Equal),
        1 => order == Some(Less),
        2 => matches!(order, Some(Less | Equal)),
        3 => order.is_none(),
        4 => order != Some(Equal),
        5 => order != Some(Less),
        6 => !matches!(order, Some(Less | Equal)),
        7 => order.is_some(),
        8 => matches!(order, None | Some(Equal)),
        9 => !matches!(order, Some(Greater | Equal)),
        10 => order != Some(Greater),
        11 => false,
        12 => matches!(order, Some(Less | Greater)),
        13 => matches!(order, Some(Greater | Equal)),
        14 => order == Some(Greater),
        _ => true,
    }
}

/// A comparison of integers by its number.
fn compares_integers<T: Ord>(predicate: u8, a: T, b: T) -> bool {
    match predicate % 8 {
        0 => a == b,
        1 => a < b,
        2 => a <= b,
        3 => false,
        4 => a != b,
        5 => a >= b,
        6 => a > b,
        _ => true,
    }
}

fn signed(size: usize, value: u64) -> i64 {
    let unused = 64 - 8 * size as u32;
    (value << unused) as i64 >> unused
}

/// The lowest `n` bits.
fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

impl Machine<'_> {
    /// Whether it was one on masks alone.
    pub fn execute_mask(&mut self, i: &Instruction) -> bool {
        use Mnemonic::*;
        let (bits, f): (usize, fn(u64, u64) -> u64) = match i.mnemonic() {
            Kmovb => return self.move_mask(i, 1),
            Kmovw => return self.move_mask(i, 2),
            Kmovd => return self.move_mask(i, 4),
            Kmovq => return self.move_mask(i, 8),
            Kunpckbw => return self.unpack_masks(i, 8),
            Kunpckwd => return self.unpack_masks(i, 16),
            Kunpckdq => return self.unpack_masks(i, 32),
            Kortestb => return self.test_masks(i, 8),
            Kortestw => return self.test_masks(i, 16),
            Kortestd => return self.test_masks(i, 32),
            Kortestq => return self.test_masks(i, 64),
            Kshiftlb => return self.shift_mask(i, 8, |a, n| a << n),
            Kshiftlw => return self.shift_mask(i, 16, |a, n| a << n),
            Kshiftld => return self.shift_mask(i, 32, |a, n| a << n),
            Kshiftlq => return self.shift_mask(i, 64, |a, n| a << n),
            Kshiftrb => return self.shift_mask(i, 8, |a, n| a >> n),
            Kshiftrw => return self.shift_mask(i, 16, |a, n| a >> n),
            Kshiftrd => return self.shift_mask(i, 32, |a, n| a >> n),
            Kshiftrq => return self.shift_mask(i, 64, |a, n| a >> n),
            Knotb => (8, |a, _| !a),
            Knotw => (16, |a, _| !a),
            Knotd => (32, |a, _| !a),
            Knotq => (64, |a, _| !a),
            Kandb => (8, |a, b| a & b),
            Kandw => (16, |a, b| a & b),
            Kandd => (32, |a, b| a & b),
            Kandq => (64, |a, b| a & b),
            Kandnb => (8, |a, b| !a & b),
            Kandnw => (16, |a, b| !a & b),
            Kandnd => (32, |a, b| !a & b),
            Kandnq => (64, |a, b| !a & b),
            Korb => (8, |a, b| a | b),
            Korw => (16, |a, b| a | b),
            Kord => (32, |a, b| a | b),
            Korq => (64, |a, b| a | b),
            Kxorb => (8, |a, b| a ^ b),
            Kxorw => (16, |a, b| a ^ b),
            Kxord => (32, |a, b| a ^ b),
            Kxorq => (64, |a, b| a ^ b),
            Kxnorb => (8, |a, b| !(a ^ b)),
            Kxnorw => (16, |a, b| !(a ^ b)),
            Kxnord => (32, |a, b| !(a ^ b)),
            Kxnorq => (64, |a, b| !(a ^ b)),
            _ => return false,
        };
        let second = if i.op_count() == 3 { self.mask(i.op2_register()) } else { 0 };
        let value = f(self.mask(i.op1_register()), second) & low_bits(bits);
        self.state.masks[i.op0_register().number()] = value;
        true
    }

    fn mask(&self, register: Register) -> u64 {
        self.state.masks[register.number()]
    }

    fn move_mask(&mut self, i: &Instruction, size: usize) -> bool {
        let value = match i.op1_kind() {
            OpKind::Memory => self.load(self.address(i, 1, 0), size),
            _ if i.op1_register().is_k() => self.mask(i.op1_register()),
            _ => self.general(i.op1_register()),
        };
        let value = value & low_bits(8 * size);
        match i.op0_kind() {
            OpKind::Memory => self.store(self.address(i, 0, 0), size, value),
            _ if i.op0_register().is_k() => self.state.masks[i.op0_register().number()] = value,
            _ => self.set_general(i.op0_register(), value),
        }
        true
    }

    fn unpack_masks(&mut self, i: &Instruction, bits: usize) -> bool {
        let [high, low] =
            [i.op1_register(), i.op2_register()].map(|k| self.mask(k) & low_bits(bits));
        self.state.masks[i.op0_register().number()] = high << bits | low;
        true
    }

    fn test_masks(&mut self, i: &Instruction, bits: usize) -> bool {
        let either = (self.mask(i.op0_register()) | self.mask(i.op1_register())) & low_bits(bits);
        self.set_flags(either == low_bits(bits), either == 0, false, false, false);
        true
    }

    fn shift_mask(&mut self, i: &Instruction, bits: usize, f: fn(u64, u32) -> u64) -> bool {
        let (value, n) = (self.mask(i.op1_register()) & low_bits(bits), u32::from(i.immediate8()));
        let shifted = if n as usize >= bits { 0 } else { f(value, n) };
        self.state.masks[i.op0_register().number()] = shifted & low_bits(bits);
        true
    }

    /// Whether it is one on vectors.
    pub fn execute_vector(&mut self, i: &Instruction) -> bool {
        use Mnemonic::*;
        if !matches!(i.rounding_control(), RoundingControl::None | RoundingControl::RoundToNearest)
        {
            return false;
        }
        match i.mnemonic() {
            Vmovdqu8 => self.lanes(i, 1, |[_, a, _]| a),
            Vmovdqu16 => self.lanes(i, 2, |[_, a, _]| a),
            Vmovups | Vmovdqu | Vmovdqu32 | Vlddqu => self.lanes(i, 4, |[_, a, _]| a),
            Vmovupd | Vmovdqu64 => self.lanes(i, 8, |[_, a, _]| a),
            Vmovaps | Vmovdqa | Vmovdqa32 => self.aligned(i).lanes(i, 4, |[_, a, _]| a),
            Vmovntps | Vmovntdq => self.aligned(i).lanes(i, 4, |[_, a, _]| a),
            Vmovapd | Vmovdqa64 => self.aligned(i).lanes(i, 8, |[_, a, _]| a),

            Vaddps => self.lanes(i, 4, f32s(|[_, a, b]| a + b)),
            Vsubps => self.lanes(i, 4, f32s(|[_, a, b]| a - b)),
            Vmulps => self.lanes(i, 4, f32s(|[_, a, b]| a * b)),
            Vdivps => self.lanes(i, 4, f32s(|[_, a, b]| a / b)),
            Vmaxps => self.lanes(i, 4, f32s(|[_, a, b]| if a > b { a } else { b })),
            Vminps => self.lanes(i, 4, f32s(|[_, a, b]| if a < b { a } else { b })),
            Vsqrtps => self.lanes(i, 4, f32s(|[_, a, _]| a.sqrt())),
            Vaddpd => self.lanes(i, 8, f64s(|[_, a, b]| a + b)),
            Vsubpd => self.lanes(i, 8, f64s(|[_, a, b]| a - b)),
            Vmulpd => self.lanes(i, 8, f64s(|[_, a, b]| a * b)),
            Vdivpd => self.lanes(i, 8, f64s(|[_, a, b]| a / b)),
            Vfmadd132ps => self.lanes(i, 4, f32s(|[d, a, b]| d.mul_add(b, a))),
            Vfmadd213ps => self.lanes(i, 4, f32s(|[d, a, b]| a.mul_add(d, b))),
            Vfmadd231ps => self.lanes(i, 4, f32s(|[d, a, b]| a.mul_add(b, d))),
            Vfmsub132ps => self.lanes(i, 4, f32s(|[d, a, b]| d.mul_add(b, -a))),
            Vfmsub213ps => self.lanes(i, 4, f32s(|[d, a, b]| a.mul_add(d, -b))),
            Vfmsub231ps => self.lanes(i, 4, f32s(|[d, a, b]| a.mul_add(b, -d))),
            Vfnmadd132ps => self.lanes(i, 4, f32s(|[d, a, b]| (-d).mul_add(b, a))),
            Vfnmadd213ps => self.lanes(i, 4, f32s(|[d, a, b]| (-a).mul_add(d, b))),
            Vfnmadd231ps => self.lanes(i, 4, f32s(|[d, a, b]| (-a).mul_add(b, d))),
            Vscalefps => self.lanes(
                i,
                4,
                // In f64, where nothing that f32 has is out of range: rounded once.
                f32s(|[_, a, n]| {
                    (f64::from(a) * f64::from(n.floor().clamp(-600.0, 600.0)).exp2()) as f32
                }),
            ),
            Vrndscaleps if i.immediate8() & !8 == 0 => {
                self.lanes(i, 4, f32s(|[_, a, _]| a.round_ties_even()))
            }
            Vcvtps2dq => {
                let convert = |[_, a, _]: [u64; 3]| to_i32(f32::from_bits(a as u32)) as u32;
                self.lanes(i, 4, |x| u64::from(convert(x)))
            }
            Vcvtdq2ps => self.lanes(i, 4, |[_, a, _]| u64::from((a as i32 as f32).to_bits())),
            Vcvtph2ps => {
                self.convert(i, 2, 4, |a| u64::from(f16::from_bits(a as u16).to_f32().to_bits()))
            }
            Vcvtps2ph if i.immediate8() & 4 != 0 || i.immediate8() & 3 == 0 => {
                self.convert(i, 4, 2, |a| {
                    u64::from(f16::from_f32(f32::from_bits(a as u32)).to_bits())
                })
            }
            // NaN stays NaN; denormals, before and after, are zeros.
            Vcvtneps2bf16 => self.convert(i, 4, 2, |a| {
                let rounded = bf16::from_f32(flushed(f32::from_bits(a as u32)));
                u64::from(rounded.to_bits())
            }),
            // The first source's are the upper ones.
            Vcvtne2ps2bf16 => {
                let n = Self::width(i) / 4;
                self.arrange(i, 2, |[_, upper, lower], at| {
                    let x = if at < n { lower.get(4, at) } else { upper.get(4, at - n) };
                    u64::from(bf16::from_f32(flushed(f32::from_bits(x as u32))).to_bits())
                })
            }
            Vcvtps2pd => self.convert(i, 4, 8, |a| f64::from(f32::from_bits(a as u32)).to_bits()),
            // From memory the destination alone does not say how many.
            Vcvtpd2ps if i.op1_kind() == OpKind::Register => {
                self.convert(i, 8, 4, |a| u64::from((f64::from_bits(a) as f32).to_bits()))
            }

            Vpaddd => self.lanes(i, 4, |[_, a, b]| a.wrapping_add(b)),
            Vpaddq => self.lanes(i, 8, |[_, a, b]| a.wrapping_add(b)),
            Vpsubd => self.lanes(i, 4, |[_, a, b]| a.wrapping_sub(b)),
            Vpsubq => self.lanes(i, 8, |[_, a, b]| a.wrapping_sub(b)),
            Vpmulld => self.lanes(i, 4, |[_, a, b]| a.wrapping_mul(b)),
            Vpmullq => self.lanes(i, 8, |[_, a, b]| a.wrapping_mul(b)),
            Vpmuludq => self.lanes(i, 8, |[_, a, b]| (a & 0xFFFF_FFFF) * (b & 0xFFFF_FFFF)),
            Vpandd | Vandps => self.lanes(i, 4, |[_, a, b]| a & b),
            Vpandq | Vpand | Vandpd => self.lanes(i, 8, |[_, a, b]| a & b),
            Vpandnd | Vandnps => self.lanes(i, 4, |[_, a, b]| !a & b),
            Vpandnq | Vpandn | Vandnpd => self.lanes(i, 8, |[_, a, b]| !a & b),
            Vpord | Vorps => self.lanes(i, 4, |[_, a, b]| a | b),
            Vporq | Vpor | Vorpd => self.lanes(i, 8, |[_, a, b]| a | b),
            Vpxord | Vxorps => self.lanes(i, 4, |[_, a, b]| a ^ b),
            Vpxorq | Vpxor | Vxorpd => self.lanes(i, 8, |[_, a, b]| a ^ b),
            Vpmaxsd => self.lanes(i, 4, |[_, a, b]| (a as i32).max(b as i32) as u64),
            Vpminsd => self.lanes(i, 4, |[_, a, b]| (a as i32).min(b as i32) as u64),
            Vpmaxud => self.lanes(i, 4, |[_, a, b]| a.max(b)),
            Vpminud => self.lanes(i, 4, |[_, a, b]| a.min(b)),
            Vpmaxuq => self.lanes(i, 8, |[_, a, b]| a.max(b)),
            Vpminuq => self.lanes(i, 8, |[_, a, b]| a.min(b)),
            Vpternlogd => self.ternary_logic(i, 4),
            Vpternlogq => self.ternary_logic(i, 8),
            Vpslld => self.shift(i, 4, |a, n| a << n),
            Vpsllq => self.shift(i, 8, |a, n| a << n),
            Vpsrld => self.shift(i, 4, |a, n| a >> n),
            Vpsrlq => self.shift(i, 8, |a, n| a >> n),
            Vpsllvd => self.lanes(i, 4, |[_, a, n]| if n < 32 { a << n } else { 0 }),
            Vpsllvq => self.lanes(i, 8, |[_, a, n]| if n < 64 { a << n } else { 0 }),
            Vpsrlvd => self.lanes(i, 4, |[_, a, n]| if n < 32 { a >> n } else { 0 }),
            Vpsrlvq => self.lanes(i, 8, |[_, a, n]| if n < 64 { a >> n } else { 0 }),

            Vpmovzxbw => self.convert(i, 1, 2, |a| a),
            Vpmovzxbd => self.convert(i, 1, 4, |a| a),
            Vpmovzxbq => self.convert(i, 1, 8, |a| a),
            Vpmovzxwd => self.convert(i, 2, 4, |a| a),
            Vpmovzxwq => self.convert(i, 2, 8, |a| a),
            Vpmovzxdq => self.convert(i, 4, 8, |a| a),
            Vpmovsxbd => self.convert(i, 1, 4, |a| signed(1, a) as u64),
            Vpmovsxwd => self.convert(i, 2, 4, |a| signed(2, a) as u64),
            Vpmovsxdq => self.convert(i, 4, 8, |a| signed(4, a) as u64),
            Vpmovwb => self.convert(i, 2, 1, |a| a),
            Vpmovdb => self.convert(i, 4, 1, |a| a),
            Vpmovdw => self.convert(i, 4, 2, |a| a),
            Vpmovqb => self.convert(i, 8, 1, |a| a),
            Vpmovqw => self.convert(i, 8, 2, |a| a),
            Vpmovqd => self.convert(i, 8, 4, |a| a),

            Vcmpps => self.compare(i, 4, |p, a, b| {
                let [a, b] = [a, b].map(|x| f64::from(f32::from_bits(x as u32)));
                compares(p, a, b)
            }),
            Vcmppd => {
                self.compare(i, 8, |p, a, b| compares(p, f64::from_bits(a), f64::from_bits(b)))
            }
            Vpcmpud => self.compare(i, 4, compares_integers),
            Vpcmpuq => self.compare(i, 8, compares_integers),
            Vpcmpd => {
                self.compare(i, 4, |p, a, b| compares_integers(p, signed(4, a), signed(4, b)))
            }
            Vpcmpq => {
                self.compare(i, 8, |p, a, b| compares_integers(p, signed(8, a), signed(8, b)))
            }
            Vpcmpeqd => self.compare(i, 4, |_, a, b| a == b),
            Vpcmpeqq => self.compare(i, 8, |_, a, b| a == b),
            Vpcmpgtd => self.compare(i, 4, |_, a, b| signed(4, a) > signed(4, b)),
            Vpcmpgtq => self.compare(i, 8, |_, a, b| signed(8, a) > signed(8, b)),
            Vptestmd => self.compare(i, 4, |_, a, b| a & b != 0),
            Vptestmq => self.compare(i, 8, |_, a, b| a & b != 0),
            Vptestnmd => self.compare(i, 4, |_, a, b| a & b == 0),
            Vptestnmq => self.compare(i, 8, |_, a, b| a & b == 0),
            Vblendmps | Vpblendmd => self.blend(i, 4),
            Vblendmpd | Vpblendmq => self.blend(i, 8),

            Vbroadcastss | Vpbroadcastd => self.repeat(i, 4, 1),
            Vbroadcastsd | Vpbroadcastq => self.repeat(i, 8, 1),
            Vpbroadcastw => self.repeat(i, 2, 1),
            Vpbroadcastb => self.repeat(i, 1, 1),
            Vbroadcastf32x4 | Vbroadcasti32x4 | Vbroadcastf128 | Vbroadcasti128 => {
                self.repeat(i, 4, 4)
            }
            Vbroadcastf32x8 | Vbroadcasti32x8 => self.repeat(i, 4, 8),
            Vbroadcastf64x2 | Vbroadcasti64x2 => self.repeat(i, 8, 2),
            Vbroadcastf64x4 | Vbroadcasti64x4 => self.repeat(i, 8, 4),
            Vextractf32x4 | Vextracti32x4 | Vextractf128 | Vextracti128 => self.extract(i, 4, 4),
            Vextractf32x8 | Vextracti32x8 => self.extract(i, 4, 8),
            Vextractf64x2 | Vextracti64x2 => self.extract(i, 8, 2),
            Vextractf64x4 | Vextracti64x4 => self.extract(i, 8, 4),
            Vinsertf32x4 | Vinserti32x4 | Vinsertf128 | Vinserti128 => self.insert(i, 4, 4),
            Vinsertf32x8 | Vinserti32x8 => self.insert(i, 4, 8),
            Vinsertf64x2 | Vinserti64x2 => self.insert(i, 8, 2),
            Vinsertf64x4 | Vinserti64x4 => self.insert(i, 8, 4),

            Vunpcklps | Vpunpckldq => self.unpack(i, 4, 0),
            Vunpckhps | Vpunpckhdq => self.unpack(i, 4, 1),
            Vunpcklpd | Vpunpcklqdq => self.unpack(i, 8, 0),
            Vunpckhpd | Vpunpckhqdq => self.unpack(i, 8, 1),
            Vshuff32x4 | Vshufi32x4 => self.shuffle_blocks(i, 4),
            Vshuff64x2 | Vshufi64x2 => self.shuffle_blocks(i, 8),
            Vpshufd => self.in_quads(i, 4),
            Vpermilpd if i.op2_kind() == OpKind::Immediate8 => {
                let order = usize::from(i.immediate8());
                self.arrange(i, 8, |[_, a, _], at| a.get(8, at / 2 * 2 + (order >> at & 1)))
            }
            Vshufpd => {
                let order = usize::from(i.immediate8());
                self.arrange(i, 8, |[_, a, b], at| {
                    let from = if at % 2 == 0 { a } else { b };
                    from.get(8, at / 2 * 2 + (order >> at & 1))
                })
            }
            Vblendps => {
                let chosen = u64::from(i.immediate8());
                self.arrange(i, 4, |[_, a, b], at| {
                    if chosen >> at & 1 == 1 { b } else { a }.get(4, at)
                })
            }
            Vperm2f128 | Vperm2i128 => {
                let order = usize::from(i.immediate8());
                self.arrange(i, 8, |[_, a, b], at| {
                    let order = order >> (at / 2 * 4);
                    let from = if order & 2 == 0 { a } else { b };
                    if order & 8 != 0 { 0 } else { from.get(8, (order & 1) * 2 + at % 2) }
                })
            }
            Vmovshdup => self.arrange(i, 4, |[_, a, _], at| a.get(4, at | 1)),
            Vmovsldup => self.arrange(i, 4, |[_, a, _], at| a.get(4, at & !1)),
            Vmovddup if Self::width(i) == 16 => self.repeat(i, 8, 1),
            Vmovddup => self.arrange(i, 8, |[_, a, _], at| a.get(8, at & !1)),
            Vpermilps if i.op2_kind() == OpKind::Immediate8 => self.in_quads(i, 4),
            Vshufps => {
                let order = usize::from(i.immediate8());
                self.arrange(i, 4, |[_, a, b], at| {
                    let from = if at % 4 < 2 { a } else { b };
                    from.get(4, at / 4 * 4 + (order >> (2 * (at % 4)) & 3))
                })
            }
            Vpermq | Vpermpd if i.op2_kind() == OpKind::Immediate8 => self.in_quads(i, 8),
            Vpermd | Vpermps => self.permute(i, 4, |[_, a, b], n| (a, [b, b], n)),
            Vpermq | Vpermpd => self.permute(i, 8, |[_, a, b], n| (a, [b, b], n)),
            Vpermt2w => self.permute(i, 2, |[d, a, b], n| (a, [d, b], n)),
            Vpermt2d | Vpermt2ps => self.permute(i, 4, |[d, a, b], n| (a, [d, b], n)),
            Vpermt2q | Vpermt2pd => self.permute(i, 8, |[d, a, b], n| (a, [d, b], n)),
            Vpermi2w => self.permute(i, 2, |[d, a, b], n| (d, [a, b], n)),
            Vpermi2d | Vpermi2ps => self.permute(i, 4, |[d, a, b], n| (d, [a, b], n)),
            Vpermi2q | Vpermi2pd => self.permute(i, 8, |[d, a, b], n| (d, [a, b], n)),
            Vpshufb => self.arrange(i, 1, |[_, a, b], at| match b.get(1, at) as usize {
                index if index < 128 => a.get(1, at / 16 * 16 + index % 16),
                _ => 0,
            }),
            Valignd => self.align(i, 4),
            Valignq => self.align(i, 8),

            Vscatterdps | Vpscatterdd => self.scatter(i, 4, 4),
            Vscatterqps | Vpscatterqd => self.scatter(i, 8, 4),
            Vscatterqpd | Vpscatterqq => self.scatter(i, 8, 8),
            Vgatherdps | Vpgatherdd => self.gather(i, 4, 4),
            Vgatherqps | Vpgatherqd => self.gather(i, 8, 4),
            Vgatherqpd | Vpgatherqq => self.gather(i, 8, 8),

            Vcvtsi2ss | Vcvtusi2ss => self.convert_general(i, 4),
            Vcvtsi2sd | Vcvtusi2sd => self.convert_general(i, 8),
            Vmovss => self.move_scalar(i, 4),
            Vmovsd => self.move_scalar(i, 8),
            Vmovd => self.move_general(i, 4),
            Vmovq => self.move_general(i, 8),
            Vaddss => self.scalar(i, f32s(|[_, a, b]| a + b)),
            Vsubss => self.scalar(i, f32s(|[_, a, b]| a - b)),
            Vmulss => self.scalar(i, f32s(|[_, a, b]| a * b)),
            Vdivss => self.scalar(i, f32s(|[_, a, b]| a / b)),
            Vmaxss => self.scalar(i, f32s(|[_, a, b]| if a > b { a } else { b })),
            Vminss => self.scalar(i, f32s(|[_, a, b]| if a < b { a } else { b })),
            Vfmadd132ss => self.scalar_of(i, 0, f32s(|[d, a, b]| d.mul_add(b, a))),
            Vfmadd213ss => self.scalar_of(i, 0, f32s(|[d, a, b]| a.mul_add(d, b))),
            Vfmadd231ss => self.scalar_of(i, 0, f32s(|[d, a, b]| a.mul_add(b, d))),
            _ => return false,
        }
        true
    }

    /// Bytes of the widest vector of an instruction.
    fn width(i: &Instruction) -> usize {
        let sizes = (0..i.op_count())
            .filter(|&op| {
                i.op_kind(op) == OpKind::Register && i.op_register(op).is_vector_register()
            })
            .map(|op| i.op_register(op).size());
        sizes.max().unwrap_or_else(|| fatal(format_args!("{:?} has no vector", i.code())))
    }

    /// The elements that its mask lets an instruction touch, of `n`.
    fn active(&self, i: &Instruction, n: usize) -> u64 {
        let all = low_bits(n);
        if i.op_mask() == Register::None { all } else { self.mask(i.op_mask()) & all }
    }

    /// Ends the process where the CPU would, should the operand in memory not be aligned.
    fn aligned(&mut self, i: &Instruction) -> &mut Self {
        for op in (0..2).filter(|&op| i.op_kind(op) == OpKind::Memory) {
            let address = self.address(i, op, 0);
            if !address.is_multiple_of(Self::width(i)) {
                fatal(format_args!("{:?} of {address:#x}, which is not aligned", i.code()));
            }
        }
        self
    }

    /// Elements of an operand; of memory only those that are active, or the one that is for all.
    fn operand(&self, i: &Instruction, op: u32, size: usize, n: usize, active: u64) -> Vector {
        match i.op_kind(op) {
            OpKind::Register => self.vector(i.op_register(op)),
            OpKind::Memory if i.is_broadcast() => {
                let value = if active == 0 { 0 } else { self.load(self.address(i, op, 0), size) };
                Vector::from_fn(size, n, |_| value)
            }
            OpKind::Memory if active == low_bits(n) => {
                self.load_vector(self.address(i, op, 0), n * size)
            }
            OpKind::Memory => {
                let address = self.address(i, op, 0);
                let mut vector = Vector::ZERO;
                for at in (0..n).filter(|at| active >> at & 1 == 1) {
                    vector.set(size, at, self.load(address + at * size, size));
                }
                vector
            }
            _ => Vector::ZERO,
        }
    }

    /// The first three operands that are vectors, the one that is written among them.
    fn operands(&self, i: &Instruction, size: usize, n: usize, active: u64) -> [Vector; 3] {
        [0, 1, 2].map(|op| match op < i.op_count() {
            true if op == 0 && i.op0_kind() == OpKind::Memory => Vector::ZERO,
            true => self.operand(i, op, size, n, active),
            false => Vector::ZERO,
        })
    }

    /// Writes `n` elements under the mask: what is not active keeps its value, or becomes zero if the
    /// instruction says so; what lies beyond becomes zero.
    fn write(&mut self, i: &Instruction, size: usize, n: usize, active: u64, values: &Vector) {
        if i.op0_kind() == OpKind::Memory {
            let address = self.address(i, 0, 0);
            for at in (0..n).filter(|at| active >> at & 1 == 1) {
                self.store(address + at * size, size, values.get(size, at));
            }
            return;
        }
        if active == low_bits(n) {
            self.set_vector(i.op0_register(), Vector::from_fn(size, n, |at| values.get(size, at)));
            return;
        }
        let before = self.vector(i.op0_register());
        let result = Vector::from_fn(size, n, |at| match active >> at & 1 {
            1 => values.get(size, at),
            _ if i.zeroing_masking() => 0,
            _ => before.get(size, at),
        });
        self.set_vector(i.op0_register(), result);
    }

    /// Element by element, from the old value and two operands.
    #[inline(always)]
    fn lanes(&mut self, i: &Instruction, size: usize, f: impl Fn([u64; 3]) -> u64) {
        let n = Self::width(i) / size;
        let active = self.active(i, n);
        let operands = self.operands(i, size, n, active);
        let values = Vector::from_fn(size, n, |at| f(operands.each_ref().map(|v| v.get(size, at))));
        self.write(i, size, n, active, &values);
    }

    /// Elements of another size.
    fn convert(&mut self, i: &Instruction, from: usize, to: usize, f: impl Fn(u64) -> u64) {
        // What becomes narrower has its width in memory, where it is there.
        let in_memory = match i.op1_kind() {
            OpKind::Memory if !i.is_broadcast() => i.memory_size().size(),
            _ => 0,
        };
        let n = Self::width(i).max(in_memory) / from.max(to);
        let active = self.active(i, n);
        let source = self.operand(i, 1, from, n, active);
        let values = Vector::from_fn(to, n, |at| f(source.get(from, at)));
        self.write(i, to, n, active, &values);
    }

    /// Each element as its place and whole operands say.
    fn arrange(&mut self, i: &Instruction, size: usize, f: impl Fn([&Vector; 3], usize) -> u64) {
        let n = Self::width(i) / size;
        // Any element of an operand may be read, whatever the mask.
        let operands = self.operands(i, size, n, low_bits(n));
        let values = Vector::from_fn(size, n, |at| f(operands.each_ref(), at));
        self.write(i, size, n, self.active(i, n), &values);
    }

    /// Within each four elements, each as two bits of an immediate say.
    fn in_quads(&mut self, i: &Instruction, size: usize) {
        let order = usize::from(i.immediate8());
        self.arrange(i, size, |[_, a, _], at| {
            a.get(size, at / 4 * 4 + (order >> (2 * (at % 4)) & 3))
        });
    }

    /// From one of two tables, which together have as many elements as an index counts.
    fn permute(
        &mut self,
        i: &Instruction,
        size: usize,
        roles: impl for<'a> Fn([&'a Vector; 3], usize) -> (&'a Vector, [&'a Vector; 2], usize),
    ) {
        let n = Self::width(i) / size;
        self.arrange(i, size, |operands, at| {
            let (indices, tables, n) = roles(operands, n);
            let index = indices.get(size, at) as usize % (2 * n);
            tables[index / n].get(size, index % n)
        });
    }

    fn unpack(&mut self, i: &Instruction, size: usize, half: usize) {
        let per_block = 16 / size;
        self.arrange(i, size, |[_, a, b], at| {
            let from = if at % 2 == 0 { a } else { b };
            from.get(size, at / per_block * per_block + half * per_block / 2 + at % per_block / 2)
        });
    }

    /// Blocks of 16 bytes: the lower half of them from one operand, the others from the other.
    fn shuffle_blocks(&mut self, i: &Instruction, size: usize) {
        let (order, n_blocks) = (usize::from(i.immediate8()), Self::width(i) / 16);
        let bits = n_blocks.ilog2();
        self.arrange(i, size, |[_, a, b], at| {
            let block = at * size / 16;
            let from = if block < n_blocks / 2 { a } else { b };
            let chosen = order >> (bits * block as u32) & (n_blocks - 1);
            from.get(size, chosen * 16 / size + at % (16 / size))
        });
    }

    fn align(&mut self, i: &Instruction, size: usize) {
        let n = Self::width(i) / size;
        let shift = usize::from(i.immediate8()) % n;
        self.arrange(i, size, |[_, a, b], at| match at + shift {
            place if place < n => b.get(size, place),
            place => a.get(size, place - n),
        });
    }

    fn ternary_logic(&mut self, i: &Instruction, size: usize) {
        let table = u64::from(i.immediate8());
        self.lanes(i, size, |[a, b, c]| {
            (0..8).filter(|row| table >> row & 1 == 1).fold(0, |result, row| {
                let is = |value: u64, bit: u32| if row >> bit & 1 == 1 { value } else { !value };
                result | is(a, 2) & is(b, 1) & is(c, 0)
            })
        });
    }

    /// By an immediate, or by the lowest 8 bytes of a register.
    fn shift(&mut self, i: &Instruction, size: usize, f: impl Fn(u64, u64) -> u64) {
        let amount = match i.op2_kind() {
            OpKind::Immediate8 => u64::from(i.immediate8()),
            OpKind::Register => self.vector(i.op2_register()).get(8, 0),
            _ => fatal(format_args!("{:?} is not implemented", i.code())),
        };
        let is_out = amount >= 8 * size as u64;
        self.lanes(i, size, |[_, a, _]| if is_out { 0 } else { f(a, amount) });
    }

    fn compare(&mut self, i: &Instruction, size: usize, f: impl Fn(u8, u64, u64) -> bool) {
        let n = Self::width(i) / size;
        let active = self.active(i, n);
        let [a, b] = [1, 2].map(|op| self.operand(i, op, size, n, active));
        let predicate = if i.op_count() > 3 { i.immediate8() } else { 0 };
        let holds = |&at: &usize| f(predicate, a.get(size, at), b.get(size, at));
        let bits = (0..n).filter(holds).fold(0, |bits, at| bits | 1_u64 << at);
        self.state.masks[i.op0_register().number()] = bits & active;
    }

    /// The second operand where the mask is set, else the first; else zero, if the instruction says so.
    fn blend(&mut self, i: &Instruction, size: usize) {
        let n = Self::width(i) / size;
        let active = self.active(i, n);
        let [a, b] = [1, 2].map(|op| self.operand(i, op, size, n, active));
        let result = Vector::from_fn(size, n, |at| match active >> at & 1 {
            1 => b.get(size, at),
            _ if i.zeroing_masking() => 0,
            _ => a.get(size, at),
        });
        self.set_vector(i.op0_register(), result);
    }

    /// A block of `n_source` elements, over and over.
    fn repeat(&mut self, i: &Instruction, size: usize, n_source: usize) {
        let n = Self::width(i) / size;
        let active = self.active(i, n);
        let source = match i.op1_kind() {
            OpKind::Register if i.op1_register().is_gpr() => {
                Vector::from_fn(size, 1, |_| self.general(i.op1_register()))
            }
            OpKind::Register => self.vector(i.op1_register()),
            _ => {
                let read = (0..n).filter(|at| active >> at & 1 == 1);
                let read = read.fold(0, |read, at| read | 1 << (at % n_source));
                self.operand(i, 1, size, n_source, read)
            }
        };
        let values = Vector::from_fn(size, n, |at| source.get(size, at % n_source));
        self.write(i, size, n, active, &values);
    }

    /// One block of a vector.
    fn extract(&mut self, i: &Instruction, size: usize, n: usize) {
        let source = self.vector(i.op1_register());
        let block = usize::from(i.immediate8()) % (i.op1_register().size() / (size * n));
        let values = Vector::from_fn(size, n, |at| source.get(size, block * n + at));
        self.write(i, size, n, self.active(i, n), &values);
    }

    /// A vector with one block from elsewhere.
    fn insert(&mut self, i: &Instruction, size: usize, n_block: usize) {
        let n = Self::width(i) / size;
        let (a, b) =
            (self.vector(i.op1_register()), self.operand(i, 2, size, n_block, low_bits(n_block)));
        let block = usize::from(i.immediate8()) % (n / n_block);
        let values = Vector::from_fn(size, n, |at| match at / n_block == block {
            true => b.get(size, at % n_block),
            false => a.get(size, at),
        });
        self.write(i, size, n, self.active(i, n), &values);
    }

    /// As many elements as there are indices and room.
    fn scattered(i: &Instruction, register: Register, index: usize, size: usize) -> usize {
        (i.memory_index().size() / index).min(register.size() / size)
    }

    fn scatter(&mut self, i: &Instruction, index: usize, size: usize) {
        let values = self.vector(i.op1_register());
        let n = Self::scattered(i, i.op1_register(), index, size);
        let active = self.active(i, n);
        for at in (0..n).filter(|at| active >> at & 1 == 1) {
            self.store(self.address(i, 0, at), size, values.get(size, at));
        }
        self.state.masks[i.op_mask().number()] = 0;
    }

    fn gather(&mut self, i: &Instruction, index: usize, size: usize) {
        let mut values = self.vector(i.op0_register());
        let n = Self::scattered(i, i.op0_register(), index, size);
        let active = self.active(i, n);
        for at in (0..n).filter(|at| active >> at & 1 == 1) {
            values.set(size, at, self.load(self.address(i, 1, at), size));
        }
        let result = Vector::from_fn(size, n, |at| values.get(size, at));
        self.set_vector(i.op0_register(), result);
        self.state.masks[i.op_mask().number()] = 0;
    }

    /// The lowest element from an operand (a vector's lowest, or memory), under the mask; the rest of 16
    /// bytes from the first operand.
    fn write_scalar(&mut self, i: &Instruction, size: usize, rest: &Vector, value: u64) {
        let before = self.vector(i.op0_register());
        let mut result = Vector::from_fn(8, 2, |at| rest.get(8, at));
        result.set(
            size,
            0,
            match self.active(i, 1) {
                1 => value,
                _ if i.zeroing_masking() => 0,
                _ => before.get(size, 0),
            },
        );
        self.set_vector(i.op0_register(), result);
    }

    fn scalar(&mut self, i: &Instruction, f: impl Fn([u64; 3]) -> u64) {
        self.scalar_of(i, 1, f);
    }

    /// With the operand that the rest of the 16 bytes is from.
    fn scalar_of(&mut self, i: &Instruction, rest: usize, f: impl Fn([u64; 3]) -> u64) {
        let operands = self.operands(i, 4, 1, self.active(i, 1));
        let value = f(operands.each_ref().map(|v| v.get(4, 0)));
        self.write_scalar(i, 4, &operands[rest], value);
    }

    fn move_scalar(&mut self, i: &Instruction, size: usize) {
        let active = self.active(i, 1);
        match (i.op0_kind(), i.op1_kind()) {
            (OpKind::Memory, _) if active == 0 => {}
            (OpKind::Memory, _) => {
                let value = self.vector(i.op1_register()).get(size, 0);
                self.store(self.address(i, 0, 0), size, value);
            }
            (_, OpKind::Memory) => {
                let value = self.operand(i, 1, size, 1, active).get(size, 0);
                self.write_scalar(i, size, &Vector::ZERO, value);
            }
            _ => {
                let value = self.vector(i.op2_register()).get(size, 0);
                self.write_scalar(i, size, &self.vector(i.op1_register()), value);
            }
        }
    }

    fn move_general(&mut self, i: &Instruction, size: usize) {
        let value = match i.op1_kind() {
            OpKind::Memory => self.load(self.address(i, 1, 0), size),
            _ if i.op1_register().is_gpr() => self.general(i.op1_register()),
            _ => self.vector(i.op1_register()).get(size, 0),
        };
        match i.op0_kind() {
            OpKind::Memory => self.store(self.address(i, 0, 0), size, value),
            _ if i.op0_register().is_gpr() => self.set_general(i.op0_register(), value),
            _ => self.set_vector(i.op0_register(), Vector::from_fn(size, 1, |_| value)),
        }
    }

    fn convert_general(&mut self, i: &Instruction, size: usize) {
        let (bits, value) = match i.op2_kind() {
            OpKind::Memory => {
                let bytes = i.memory_size().size();
                (bytes, self.load(self.address(i, 2, 0), bytes))
            }
            _ => (i.op2_register().size(), self.general(i.op2_register())),
        };
        let is_signed = matches!(i.mnemonic(), Mnemonic::Vcvtsi2ss | Mnemonic::Vcvtsi2sd);
        let integer = if is_signed { i128::from(signed(bits, value)) } else { i128::from(value) };
        let value = match size {
            4 => u64::from((integer as f32).to_bits()),
            _ => (integer as f64).to_bits(),
        };
        self.write_scalar(i, size, &self.vector(i.op1_register()), value);
    }
}
