//! The tile registers of AMX and the product of two of them in bf16.

use std::ptr;

use iced_x86::{Instruction, Mnemonic, Register};

use super::{
    machine::{Machine, fatal},
    vector::flushed,
};

/// Bytes of a row, and rows.
const ROW: usize = 64;
const ROWS: usize = 16;

pub struct Tiles {
    is_configured: bool,
    /// Rows and bytes of a row of each.
    shapes: [(usize, usize); 8],
    values: [[[u8; ROW]; ROWS]; 8],
}

impl Tiles {
    pub const NONE: Self =
        Self { is_configured: false, shapes: [(0, 0); 8], values: [[[0; ROW]; ROWS]; 8] };
}

impl Machine<'_> {
    /// Whether it was one of AMX.
    pub fn execute_tile(&mut self, instruction: &Instruction) -> bool {
        use Mnemonic::*;
        match instruction.mnemonic() {
            Ldtilecfg => self.configure(self.address(instruction, 0, 0)),
            Tilerelease => self.state.tiles = Tiles::NONE,
            Tilezero => {
                let (n, _) = self.tile(instruction.op0_register());
                self.state.tiles.values[n] = [[0; ROW]; ROWS];
            }
            Tileloadd | Tileloaddt1 => {
                let (n, (rows, bytes)) = self.tile(instruction.op0_register());
                let (start, stride) = self.rows(instruction);
                self.state.tiles.values[n] = [[0; ROW]; ROWS];
                for row in 0..rows {
                    let from =
                        ptr::with_exposed_provenance(start.wrapping_add(row.wrapping_mul(stride)));
                    let to = self.state.tiles.values[n][row].as_mut_ptr();
                    // SAFETY: what the interrupted code reads there; a row has `bytes <= ROW`.
                    unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
                }
            }
            Tilestored => {
                let (n, (rows, bytes)) = self.tile(instruction.op1_register());
                let (start, stride) = self.rows(instruction);
                for row in 0..rows {
                    let from = self.state.tiles.values[n][row].as_ptr();
                    let to = ptr::with_exposed_provenance_mut(
                        start.wrapping_add(row.wrapping_mul(stride)),
                    );
                    // SAFETY: what the interrupted code writes there.
                    unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
                }
            }
            Tdpbf16ps => self.product(instruction),
            _ => return false,
        }
        true
    }

    fn configure(&mut self, address: usize) {
        let byte = |at: usize| self.load(address + at, 1) as usize;
        let mut tiles = Tiles { is_configured: true, ..Tiles::NONE };
        if byte(0) != 1 || (1..16).chain(32..48).chain(56..64).any(|at| byte(at) != 0) {
            fatal(format_args!(
                "a tile configuration of palette {} or with reserved bytes",
                byte(0)
            ));
        }
        for (n, shape) in tiles.shapes.iter_mut().enumerate() {
            let (rows, bytes) = (byte(48 + n), byte(16 + 2 * n) + 256 * byte(17 + 2 * n));
            if rows > ROWS || bytes > ROW || (rows == 0) != (bytes == 0) {
                fatal(format_args!("tile {n} has {rows} rows of {bytes} bytes"));
            }
            *shape = (rows, bytes);
        }
        self.state.tiles = tiles;
    }

    /// The number of a tile, and its rows and their bytes.
    fn tile(&self, register: Register) -> (usize, (usize, usize)) {
        let n = register.number();
        let shape = self.state.tiles.shapes[n];
        if !self.state.tiles.is_configured || shape.0 == 0 {
            fatal(format_args!("{register:?} is used without a configuration"));
        }
        (n, shape)
    }

    /// Where a tile's rows start in memory, and the bytes from one to the next.
    fn rows(&self, instruction: &Instruction) -> (usize, usize) {
        let base = self.general(instruction.memory_base());
        let index = match instruction.memory_index() {
            Register::None => 0,
            register => self.general(register),
        };
        let start = base.wrapping_add(instruction.memory_displacement64());
        (start as usize, index.wrapping_mul(u64::from(instruction.memory_index_scale())) as usize)
    }

    /// `c[m, n] += Σ_k a[m, k] b[k, n]`: pairs of bf16 along `k`, the even and the odd ones in a chain
    /// from zero each, whose sum is added. Denormals count as zero.
    fn product(&mut self, instruction: &Instruction) {
        let (c, (rows, bytes)) = self.tile(instruction.op0_register());
        let (a, (a_rows, a_bytes)) = self.tile(instruction.op1_register());
        let (b, (b_rows, b_bytes)) = self.tile(instruction.op2_register());
        let is_even = [bytes, a_bytes, b_bytes].iter().all(|bytes| bytes % 4 == 0);
        if a_rows != rows || b_bytes != bytes || b_rows != a_bytes / 4 || !is_even {
            fatal(format_args!("a product of tiles whose shapes do not fit"));
        }
        let tiles = &mut self.state.tiles.values;
        let pair = |row: &[u8; ROW], i: usize, odd: usize| {
            let bits = u16::from_le_bytes([row[4 * i + 2 * odd], row[4 * i + 2 * odd + 1]]);
            flushed(f32::from_bits(u32::from(bits) << 16))
        };
        for m in 0..rows {
            for n in 0..bytes / 4 {
                let chain = |odd| {
                    (0..a_bytes / 4).fold(0.0, |sum: f32, k| {
                        flushed(pair(&tiles[a][m], k, odd).mul_add(pair(&tiles[b][k], n, odd), sum))
                    })
                };
                let sum = flushed(chain(0) + chain(1));
                let to: &mut [u8; 4] =
                    (&mut tiles[c][m][4 * n..4 * n + 4]).try_into().expect("four bytes");
                let before = flushed(f32::from_le_bytes(*to));
                *to = flushed(before + sum).to_le_bytes();
            }
        }
    }
}
