//! Panels of f32, and the register tile that multiplies them.

// Loops over the register tile are by index: iterators over arrays keep it out of the registers.
#![allow(clippy::needless_range_loop)]

use super::{
    super::{
        elementwise::{load, store},
        isa::{Element, ElementMut, LANES, Simd, step},
    },
    BLOCK,
};

/// One vector for each of `NV` columns of a panel's row.
pub(super) type PanelRow<const NV: usize> = [[f32; LANES]; NV];

/// A slice as rows of panels `NV` vectors wide.
pub(super) fn panel_rows<const NV: usize>(x: &mut [f32]) -> &mut [PanelRow<NV>] {
    x.as_chunks_mut::<LANES>().0.as_chunks_mut::<NV>().0
}

/// `n` rows as panels of columns: panel `c` holds columns `c * NV * LANES..` of every row. The last
/// panel is filled up with zeros.
#[inline(always)]
pub(super) fn pack_rows<'a, S: Simd, T: Element, const NV: usize>(
    s: S,
    row: impl Fn(usize) -> &'a [T::Item],
    n: usize,
    to: &mut [PanelRow<NV>],
) {
    for i in 0..n {
        let row = row(i);
        for (c, to) in to.iter_mut().skip(i).step_by(n).enumerate() {
            for (j, to) in to.iter_mut().enumerate() {
                let vector = c * NV + j;
                let v = match vector * LANES < row.len() {
                    true => load::<S, T>(s, row, vector),
                    false => s.splat(0.0),
                };
                s.store(v, to);
            }
        }
    }
}

/// `n` rows transposed, as panels of rows: panel `p` holds, for each column, its value in rows
/// `p * NV * LANES..`. Rows beyond the last are zeros.
#[inline(always)]
pub(super) fn pack_transposed<'a, S: Simd, T: Element, const NV: usize>(
    s: S,
    row: impl Fn(usize) -> &'a [T::Item],
    n: usize,
    to: &mut [PanelRow<NV>],
    head_dim: usize,
) {
    for (p, panel) in to.chunks_exact_mut(head_dim).enumerate() {
        for j in 0..NV {
            for (c, panel) in panel.chunks_mut(LANES).enumerate() {
                let mut square = [s.splat(0.0); LANES];
                for (lane, v) in square.iter_mut().enumerate() {
                    let i = (p * NV + j) * LANES + lane;
                    if i < n {
                        *v = load::<S, T>(s, row(i), c);
                    }
                }
                let square = s.transpose(square);
                for (to, v) in panel.iter_mut().zip(&square) {
                    s.store(*v, &mut to[j]);
                }
            }
        }
    }
}

/// Rows `first..first + MR` transposed; rows beyond the last are zeros.
#[inline(always)]
pub(super) fn pack_tile<'a, T: Element, const MR: usize>(
    row: impl Fn(usize) -> &'a [T::Item],
    first: usize,
    n: usize,
    to: &mut [[f32; MR]],
) {
    for m in 0..MR {
        if first + m < n {
            to.iter_mut().zip(row(first + m)).for_each(|(to, &x)| to[m] = T::get(x));
        } else {
            to.iter_mut().for_each(|to| to[m] = 0.0);
        }
    }
}

/// The register tile: `MR` rows of `NV` vectors. Functions take and return it by value, and index it
/// with constants only, so that it stays in registers.
pub(super) type Tile<V, const MR: usize, const NV: usize> = [[V; NV]; MR];

/// `acc + lhsᵀ·rhs`, the left side packed by [`pack_tile`].
#[inline(always)]
pub(super) fn product<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    lhs: &[[f32; MR]],
    rhs: &[PanelRow<NV>],
    mut acc: Tile<S::V, MR, NV>,
) -> Tile<S::V, MR, NV> {
    for (a, b) in lhs.iter().zip(rhs) {
        acc = step(s, a, b, acc);
    }
    acc
}

/// `acc + lhs·rhs`, the left side `MR` rows of a block.
#[inline(always)]
pub(super) fn product_of_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    lhs: &[[f32; BLOCK]; MR],
    rhs: &[PanelRow<NV>],
    mut acc: Tile<S::V, MR, NV>,
) -> Tile<S::V, MR, NV> {
    for k in 0..rhs.len().min(BLOCK) {
        let mut a = [0.0; MR];
        for m in 0..MR {
            a[m] = lhs[m][k];
        }
        acc = step(s, &a, &rhs[k], acc);
    }
    acc
}

/// `acc + lhsᵀ·rhs`, the left side `MR` columns of a block from `first` on.
#[inline(always)]
pub(super) fn product_of_columns<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    lhs: &[[f32; BLOCK]],
    first: usize,
    rhs: &[PanelRow<NV>],
    mut acc: Tile<S::V, MR, NV>,
) -> Tile<S::V, MR, NV> {
    for (a, b) in lhs.iter().zip(rhs) {
        let a: &[f32; MR] = a[first..].first_chunk().expect("a block is whole tiles");
        acc = step(s, a, b, acc);
    }
    acc
}

/// The register tile with zeros.
#[inline(always)]
pub(super) fn zeros<S: Simd, const MR: usize, const NV: usize>(s: S) -> Tile<S::V, MR, NV> {
    [[s.splat(0.0); NV]; MR]
}

/// Stores the register tile as panel `panel` of `MR` rows of a block.
#[inline(always)]
pub(super) fn store_block<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: Tile<S::V, MR, NV>,
    to: &mut [[f32; BLOCK]; MR],
    panel: usize,
) {
    for m in 0..MR {
        let row = &mut to[m].as_chunks_mut::<LANES>().0.as_chunks_mut::<NV>().0[panel];
        for j in 0..NV {
            s.store(acc[m][j], &mut row[j]);
        }
    }
}

/// `MR` rows of a panel as a register tile.
#[inline(always)]
pub(super) fn load_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    rows: &[PanelRow<NV>; MR],
) -> Tile<S::V, MR, NV> {
    let mut acc = zeros::<S, MR, NV>(s);
    for m in 0..MR {
        for j in 0..NV {
            acc[m][j] = s.load(&rows[m][j]);
        }
    }
    acc
}

/// A register tile to `MR` rows of a panel.
#[inline(always)]
pub(super) fn store_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: Tile<S::V, MR, NV>,
    rows: &mut [PanelRow<NV>; MR],
) {
    for m in 0..MR {
        for j in 0..NV {
            s.store(acc[m][j], &mut rows[m][j]);
        }
    }
}

/// `MR` rows of a panel, which is padded to whole blocks.
#[inline(always)]
pub(super) fn rows_from<const MR: usize, const NV: usize>(
    panel: &mut [PanelRow<NV>],
    first: usize,
) -> &mut [PanelRow<NV>; MR] {
    panel[first..].first_chunk_mut().expect("rows are padded to blocks")
}

/// Writes row `i` of panels (`n` rows each), times `scale`, to a row of the output.
#[inline(always)]
pub(super) fn write_row<S: Simd, T: ElementMut, const NV: usize>(
    s: S,
    panels: &[PanelRow<NV>],
    n: usize,
    i: usize,
    scale: f32,
    to: &mut [T::Item],
) {
    for vector in 0..to.len().div_ceil(LANES) {
        let v = s.load(&panels[vector / NV * n + i][vector % NV]);
        store::<S, T>(s, s.mul(v, s.splat(scale)), to, vector);
    }
}

/// Calls a method that is generic over an instruction set and the rows and vectors of its register tile.
macro_rules! with_register_tile {
    ($simd:ident, $op:ident.$run:ident($s:ident)) => {
        match ($simd::MR, $simd::NV) {
            (6, 1) => $op.$run::<$simd, 6, 1>($s),
            (12, 2) => $op.$run::<$simd, 12, 2>($s),
            _ => $op.$run::<$simd, 4, 1>($s),
        }
    };
}
pub(super) use with_register_tile;
