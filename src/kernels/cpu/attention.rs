//! Attention, flash style, forward and backward.
//!
//! ```text
//! s_ij = scale q_i·k_j + bias[j - i]     p_ij = e^(s_ij - lse_i)     m_ij = dropout's 0 or scale
//! o_i  = Σ_j m_ij p_ij v_j               lse_i = ln Σ_j e^s_ij
//!
//! D_i  = d_o_i·o_i     d_p_ij = m_ij d_o_i·v_j     d_s_ij = p_ij (d_p_ij - D_i)
//! d_q_i = scale Σ_j d_s_ij k_j     d_k_j = scale Σ_i d_s_ij q_i     d_v_j = Σ_i m_ij p_ij d_o_i
//! ```
//!
//! A task is a sequence and a key-value head: it packs K and V once into f32 panels and goes
//! through the query heads that share them. All products run on one register tile of `MR` rows by
//! `NV` vectors. The scores of `MR` queries (forward) or of a block of 96 by 96 (backward) exist at
//! a time, in the cache; the backward computes the probabilities again from `lse`.
//!
//! A single query (decoding) reads K and V where they lie.
//!
//! Keys that no query of a tile sees (later ones, or earlier ones than a window) are not touched, but
//! for whole blocks' sake; those that only some of them see have the probability 0 in the others.

// Loops over the register tile are by index: iterators over arrays keep it out of the registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::{
    super::{Precision, ops::*},
    Cpu,
    elementwise::{factors, load, store},
    isa::{Element, ElementMut, LANES, Simd, SimdOp},
    math::exp,
    with_element,
};
use crate::tensor::Tensor;

/// Keys of a block, and queries of one in the backward: a multiple of every tile's rows and columns.
const BLOCK: usize = 96;
/// The largest register tile of all instruction sets, to size buffers by.
const MAX_MR: usize = 12;
const MAX_WIDTH: usize = 2 * LANES;
/// Products that are surely worth a task.
const GRAIN: usize = 128 * 1024;

/// One vector for each of `NV` columns of a panel's row.
type PanelRow<const NV: usize> = [[f32; LANES]; NV];

pub(super) fn attention(cpu: &Cpu, args: &Attention<'_, Cpu>) -> Attended<Cpu> {
    check(args);
    let mut o = cpu.alloc(args.q.rows, args.q.cols, Precision::Activation);
    let mut lse = cpu.alloc(args.q.rows, args.n_heads, Precision::Full);
    if o.is_empty() {
        return Attended { o, lse };
    }
    with_element!(args.q.dtype, T => {
        let o = deal(o.items_mut::<T>(), args.q.cols, args.queries, args.n_heads, args.n_kv_heads);
        let lse = deal(lse.f32s_mut(), args.n_heads, args.queries, args.n_heads, args.n_kv_heads);
        let tasks = o.into_par_iter().zip(lse).enumerate().with_max_len(1);
        tasks.with_min_len(tasks_in_a_grain(args)).for_each(|(task, (o, lse))| {
            let pair = Pair::<T>::new(args, task);
            let mut scratch = cpu.scratch(pair.forward_scratch().next_power_of_two());
            let scratch = scratch.as_mut_slice();
            if pair.n_queries == 1 {
                cpu.isa.run(Decode { pair, o, lse, scratch });
            } else {
                cpu.isa.run(Forward { pair, o, lse, scratch });
            }
        });
    });
    Attended { o, lse }
}

pub(super) fn attention_backward(cpu: &Cpu, args: AttentionBackward<'_, Cpu>) -> [Tensor<Cpu>; 3] {
    let AttentionBackward { forward, o, lse, d_o } = args;
    check(forward);
    let like_q = (forward.q.rows, forward.q.cols);
    assert_eq!((o.rows, o.cols), like_q);
    assert_eq!((d_o.rows, d_o.cols), like_q);
    assert_eq!((lse.rows, lse.cols), (like_q.0, forward.n_heads));
    let [mut d_q, mut d_k, mut d_v] = [forward.q, forward.k, forward.v]
        .map(|like| cpu.alloc(like.rows, like.cols, Precision::Activation));
    with_element!(o.dtype, T => {
        let (n_heads, n_kv_heads) = (forward.n_heads, forward.n_kv_heads);
        let d_q = deal(d_q.items_mut::<T>(), forward.q.cols, forward.queries, n_heads, n_kv_heads);
        let d_k = deal(d_k.items_mut::<T>(), forward.k.cols, forward.keys, n_kv_heads, n_kv_heads);
        let d_v = deal(d_v.items_mut::<T>(), forward.v.cols, forward.keys, n_kv_heads, n_kv_heads);
        let tasks = (d_q, d_k, d_v).into_par_iter().enumerate().with_max_len(1);
        tasks.with_min_len(tasks_in_a_grain(forward)).for_each(|(task, (d_q, d_k, d_v))| {
            let pair = Pair::<T>::new(forward, task);
            let mut scratch = cpu.scratch(pair.backward_scratch().next_power_of_two());
            let scratch = scratch.as_mut_slice();
            let (o, d_o) = (o.items::<T>(), d_o.items::<T>());
            cpu.isa.run(Backward { pair, o, lse: lse.f32s(), d_o, d_q, d_k, d_v, scratch });
        });
    });
    [d_q, d_k, d_v]
}

fn check(args: &Attention<'_, Cpu>) {
    let Attention { q, k, v, queries, keys, n_heads, n_kv_heads, head_dim, .. } = *args;
    assert!(n_kv_heads > 0 && n_heads % n_kv_heads == 0 && head_dim > 0);
    assert_eq!(q.cols, n_heads * head_dim);
    assert_eq!((k.cols, v.cols), (n_kv_heads * head_dim, n_kv_heads * head_dim));
    assert_eq!((k.rows, k.dtype, v.dtype), (v.rows, q.dtype, q.dtype));
    assert_eq!(queries.n(), keys.n());
    assert_eq!(*queries, Spans::packed(&queries.lens), "queries are packed in order");
    assert_eq!(queries.end(), q.rows);
    assert!(keys.end() <= k.rows);
    if let Some(window) = args.window {
        assert!(args.causal && window > 0, "a window ends at the query and has it");
    }
    if let Some(bias) = args.bias {
        assert_eq!(bias.table.rows, n_heads);
    }
    if let Some(dropout) = args.dropout {
        assert_eq!(dropout.tokens.len(), q.rows, "a key for each query token");
    }
}

/// How many tasks of average size are worth starting one.
fn tasks_in_a_grain(args: &Attention<'_, Cpu>) -> usize {
    let lens = args.queries.lens.iter().zip(&args.keys.lens);
    let products = lens.map(|(q, k)| q * k).sum::<usize>() * args.n_heads * args.head_dim;
    let n_tasks = args.queries.n() * args.n_kv_heads;
    (GRAIN * n_tasks / products.max(1)).max(1)
}

/// Deals the rows of a matrix `width` wide, each cut into `n_heads` pieces, out to the tasks: sequence by sequence,
/// and within one to `n_groups` groups of neighbouring heads. A task gets its pieces row by row.
/// Rows of no sequence are set to zero.
///
/// # Panics
/// If two sequences share a row.
fn deal<'a, T: bytemuck::Zeroable + Copy>(
    matrix: &'a mut [T],
    width: usize,
    spans: &Spans,
    n_heads: usize,
    n_groups: usize,
) -> Vec<Vec<&'a mut [T]>> {
    let mut tasks: Vec<Vec<&'a mut [T]>> = Vec::new();
    for &len in &spans.lens {
        tasks.extend((0..n_groups).map(|_| Vec::with_capacity(len * (n_heads / n_groups))));
    }
    let mut in_order: Vec<usize> = (0..spans.n()).filter(|&i| spans.lens[i] > 0).collect();
    in_order.sort_unstable_by_key(|&i| spans.starts[i]);
    let (mut rest, mut at) = (matrix, 0);
    for sequence in in_order {
        let gap = spans.starts[sequence].checked_sub(at).expect("sequences share no row");
        let (before, after) = rest.split_at_mut(gap * width);
        before.fill(T::zeroed());
        let (own, after) = after.split_at_mut(spans.lens[sequence] * width);
        let group = n_heads / n_groups;
        for (piece, cell) in own.chunks_exact_mut(width / n_heads).enumerate() {
            tasks[sequence * n_groups + piece % n_heads / group].push(cell);
        }
        rest = after;
        at = spans.starts[sequence] + spans.lens[sequence];
    }
    rest.fill(T::zeroed());
    tasks
}

/// A task's view of the arguments: one sequence and one key-value head.
struct Pair<'a, T: Element> {
    args: &'a Attention<'a, Cpu>,
    q: &'a [T::Item],
    k: &'a [T::Item],
    v: &'a [T::Item],
    first_query: usize,
    n_queries: usize,
    first_key: usize,
    n_keys: usize,
    /// The key-value head.
    kv_head: usize,
    /// Query heads that share it.
    group: usize,
    head_dim: usize,
}

impl<T: Element> Clone for Pair<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: Element> Copy for Pair<'_, T> {}

impl<'a, T: Element> Pair<'a, T> {
    fn new(args: &'a Attention<'a, Cpu>, task: usize) -> Self {
        let sequence = task / args.n_kv_heads;
        Self {
            args,
            q: args.q.items::<T>(),
            k: args.k.items::<T>(),
            v: args.v.items::<T>(),
            first_query: args.queries.starts[sequence],
            n_queries: args.queries.lens[sequence],
            first_key: args.keys.starts[sequence],
            n_keys: args.keys.lens[sequence],
            kv_head: task % args.n_kv_heads,
            group: args.n_heads / args.n_kv_heads,
            head_dim: args.head_dim,
        }
    }

    /// The query head number `g` of the group.
    fn head(&self, g: usize) -> usize {
        self.kv_head * self.group + g
    }

    /// A head's piece of query `i`'s row of a matrix shaped as `q`.
    #[inline(always)]
    fn of_query(&self, matrix: &'a [T::Item], head: usize, i: usize) -> &'a [T::Item] {
        let start = ((self.first_query + i) * self.args.n_heads + head) * self.head_dim;
        &matrix[start..][..self.head_dim]
    }

    /// The head's piece of key `j`'s row of `k` or `v`.
    #[inline(always)]
    fn of_key(&self, matrix: &'a [T::Item], j: usize) -> &'a [T::Item] {
        let row = self.first_key + j;
        &matrix[(row * self.args.n_kv_heads + self.kv_head) * self.head_dim..][..self.head_dim]
    }

    /// One past the last key that query `i` sees.
    #[inline(always)]
    fn limit(&self, i: usize) -> usize {
        match self.args.causal {
            true => (i + 1 + self.n_keys).saturating_sub(self.n_queries),
            false => self.n_keys,
        }
    }

    /// The first key that query `i` sees. It never moves back from one query to the next.
    #[inline(always)]
    fn first(&self, i: usize) -> usize {
        self.args.window.map_or(0, |window| self.limit(i).saturating_sub(window))
    }

    /// The score biases of the keys up to the last that query `i` sees.
    #[inline(always)]
    fn bias(&self, head: usize, i: usize) -> Option<&'a [f32]> {
        let limit = self.limit(i);
        self.args.bias.filter(|_| limit > 0).map(|bias| {
            let start = bias.zero + self.n_queries - (i + self.n_keys);
            &bias.table.f32s()[head * bias.table.cols..][..bias.table.cols][start..][..limit]
        })
    }

    /// The dropout factors of [`BLOCK`] keys from `first_key` on, for query `i`.
    #[inline(always)]
    fn factors(&self, head: usize, i: usize, first_key: usize, n: usize) -> [f32; BLOCK] {
        let mut kept = [1.0; BLOCK];
        if let Some(dropout) = self.args.dropout {
            let start = head * self.n_keys.next_multiple_of(8) + first_key;
            factors(dropout, self.first_query + i, start..start + n, &mut kept[..n]);
        }
        kept
    }

    /// Room for K and V panels.
    fn panels(&self) -> usize {
        let (keys, width) = (self.n_keys, self.head_dim);
        keys.next_multiple_of(MAX_WIDTH) * width + keys * width.next_multiple_of(MAX_WIDTH)
    }

    fn forward_scratch(&self) -> usize {
        if self.n_queries == 1 {
            return self.n_keys.next_multiple_of(LANES) + self.head_dim.next_multiple_of(LANES);
        }
        let strip = self.n_keys.next_multiple_of(BLOCK) * MAX_MR;
        self.panels() + strip + self.head_dim * MAX_MR
    }

    fn backward_scratch(&self) -> usize {
        let width = self.head_dim.next_multiple_of(MAX_WIDTH);
        let (keys, queries) = (self.n_keys, self.n_queries);
        let (key_rows, tile_rows) =
            (keys.next_multiple_of(BLOCK), queries.next_multiple_of(MAX_MR) + MAX_MR);
        let k_and_v = 2 * keys.next_multiple_of(MAX_WIDTH) * self.head_dim + keys * width;
        let d_k_and_d_v = 2 * key_rows * width;
        let q_and_d_o = 2 * (queries * width + tile_rows * self.head_dim);
        k_and_v + d_k_and_d_v + q_and_d_o + queries + 2 * BLOCK * BLOCK + BLOCK * width
    }
}

/// Takes `n` elements off the front of a scratch buffer.
fn carve<'a>(scratch: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    scratch.split_off_mut(..n).expect("scratch was sized for this")
}

/// A slice as rows of panels `NV` vectors wide.
fn panel_rows<const NV: usize>(x: &mut [f32]) -> &mut [PanelRow<NV>] {
    x.as_chunks_mut::<LANES>().0.as_chunks_mut::<NV>().0
}

/// `n` rows as panels of columns: panel `c` holds columns `c * NV * LANES..` of every row. The last
/// panel is filled up with zeros.
#[inline(always)]
fn pack_rows<'a, S: Simd, T: Element, const NV: usize>(
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
fn pack_transposed<'a, S: Simd, T: Element, const NV: usize>(
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
fn pack_tile<'a, T: Element, const MR: usize>(
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
type Tile<V, const MR: usize, const NV: usize> = [[V; NV]; MR];

/// One step of the register tile: `acc + a ⊗ b`.
#[inline(always)]
fn step<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    a: &[f32; MR],
    b: &PanelRow<NV>,
    mut acc: Tile<S::V, MR, NV>,
) -> Tile<S::V, MR, NV> {
    let mut vectors = [s.splat(0.0); NV];
    for j in 0..NV {
        vectors[j] = s.load(&b[j]);
    }
    for m in 0..MR {
        let a = s.splat(a[m]);
        for j in 0..NV {
            acc[m][j] = s.fma(a, vectors[j], acc[m][j]);
        }
    }
    acc
}

/// `acc + lhsᵀ·rhs`, the left side packed by [`pack_tile`].
#[inline(always)]
fn product<S: Simd, const MR: usize, const NV: usize>(
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
fn product_of_rows<S: Simd, const MR: usize, const NV: usize>(
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
fn product_of_columns<S: Simd, const MR: usize, const NV: usize>(
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
fn zeros<S: Simd, const MR: usize, const NV: usize>(s: S) -> Tile<S::V, MR, NV> {
    [[s.splat(0.0); NV]; MR]
}

/// Stores the register tile as panel `panel` of `MR` rows of a block.
#[inline(always)]
fn store_block<S: Simd, const MR: usize, const NV: usize>(
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
fn load_rows<S: Simd, const MR: usize, const NV: usize>(
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
fn store_rows<S: Simd, const MR: usize, const NV: usize>(
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
fn rows_from<const MR: usize, const NV: usize>(
    panel: &mut [PanelRow<NV>],
    first: usize,
) -> &mut [PanelRow<NV>; MR] {
    panel[first..].first_chunk_mut().expect("rows are padded to blocks")
}

/// Writes row `i` of panels (`n` rows each), times `scale`, to a row of the output.
#[inline(always)]
fn write_row<S: Simd, T: ElementMut, const NV: usize>(
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

/// The number of a vector's lane.
const LANE: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// `v` in the first `n` lanes, `fill` in the others.
#[inline(always)]
fn first_lanes<S: Simd>(s: S, n: usize, v: S::V, fill: f32) -> S::V {
    s.select_lt(s.load(&LANE), s.splat(n as f32), v, s.splat(fill))
}

/// `fill` in the first `n` lanes, `v` in the others.
#[inline(always)]
fn without_lanes<S: Simd>(s: S, n: usize, v: S::V, fill: f32) -> S::V {
    s.select_lt(s.load(&LANE), s.splat(n as f32), s.splat(fill), v)
}

/// Vector `i` of scaled scores with their bias.
#[inline(always)]
fn score<S: Simd>(s: S, x: S::V, scale: f32, bias: Option<&[f32]>, i: usize) -> S::V {
    match bias {
        Some(bias) => s.fma(x, s.splat(scale), load::<S, f32>(s, bias, i)),
        None => s.mul(x, s.splat(scale)),
    }
}

struct Forward<'a, T: ElementMut> {
    pair: Pair<'a, T>,
    /// Query by query, the pieces of the group's heads.
    o: Vec<&'a mut [T::Item]>,
    lse: Vec<&'a mut [f32]>,
    scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        match (S::MR, S::NV) {
            (6, 1) => self.run::<S, 6, 1>(s),
            (12, 2) => self.run::<S, 12, 2>(s),
            _ => self.run::<S, 4, 1>(s),
        }
    }
}

impl<T: ElementMut> Forward<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const MR: usize, const NV: usize>(mut self, s: S) {
        let Pair { n_queries, n_keys, head_dim, group, .. } = self.pair;
        let pair = self.pair;
        let width = NV * LANES;
        let mut scratch = self.scratch;
        let k = panel_rows::<NV>(carve(&mut scratch, n_keys.next_multiple_of(width) * head_dim));
        pack_transposed::<S, T, NV>(s, |j| pair.of_key(pair.k, j), n_keys, k, head_dim);
        let v = panel_rows::<NV>(carve(&mut scratch, n_keys * head_dim.next_multiple_of(width)));
        pack_rows::<S, T, NV>(s, |j| pair.of_key(pair.v, j), n_keys, v);
        let tile = carve(&mut scratch, head_dim * MR).as_chunks_mut::<MR>().0;
        let strip = carve(&mut scratch, n_keys.next_multiple_of(BLOCK) * MR);
        let strip = strip.as_chunks_mut::<BLOCK>().0.as_chunks_mut::<MR>().0;

        for (g, first) in (0..group).flat_map(|g| (0..n_queries).step_by(MR).map(move |i| (g, i))) {
            let head = pair.head(g);
            let n = MR.min(n_queries - first);
            let limit = pair.limit(first + n - 1);
            let start = pair.first(first) / BLOCK;
            pack_tile::<T, MR>(|i| pair.of_query(pair.q, head, i), first, n_queries, tile);
            let per_block = BLOCK / width;
            let panels = k.chunks_exact(head_dim).take(limit.div_ceil(width)).enumerate();
            for (p, panel) in panels.skip(start * per_block) {
                let acc = product(s, tile, panel, zeros::<S, MR, NV>(s));
                store_block(s, acc, &mut strip[p / per_block], p % per_block);
            }
            let mut sums = [1.0; MR];
            for (m, sum) in sums.iter_mut().enumerate() {
                if m < n {
                    let lse;
                    (*sum, lse) = softmax(s, &pair, head, first + m, strip, m, start..limit);
                    self.lse[(first + m) * group + g][0] = lse;
                } else {
                    clear(strip, m, limit);
                }
            }
            for c in 0..head_dim.div_ceil(width) {
                let mut rows = [[[0.0; LANES]; NV]; MR];
                let blocks = strip.iter().zip(v[c * n_keys..][..limit].chunks(BLOCK));
                for (block, panel) in blocks.skip(start) {
                    // Through memory once a block: carried along, the tile stays there for good.
                    let acc = product_of_rows(s, block, panel, load_rows(s, &rows));
                    store_rows(s, acc, &mut rows);
                }
                for (m, row) in rows.iter().enumerate().take(n) {
                    let o = &mut self.o[(first + m) * group + g];
                    for (j, x) in row.iter().enumerate() {
                        let vector = c * NV + j;
                        if vector * LANES < head_dim {
                            let mean = s.div(s.load(x), s.splat(sums[m]));
                            store::<S, T>(s, mean, o, vector);
                        }
                    }
                }
            }
        }
    }
}

/// Zeros in row `m` of a strip of scores, up to `limit`.
#[inline(always)]
fn clear<const MR: usize>(strip: &mut [[[f32; BLOCK]; MR]], m: usize, limit: usize) {
    for block in strip.iter_mut().take(limit.div_ceil(BLOCK)) {
        block[m].fill(0.0);
    }
}

/// Turns row `m` of a strip of scores, that of query `i`, into unnormalised probabilities after
/// dropout, zero beyond what the query sees. `tile` is what the tile's queries see together: first
/// block and last key. Gives the sum before dropout and `lse`.
#[inline(always)]
fn softmax<S: Simd, T: Element, const MR: usize>(
    s: S,
    pair: &Pair<'_, T>,
    head: usize,
    i: usize,
    strip: &mut [[[f32; BLOCK]; MR]],
    m: usize,
    tile: Range<usize>,
) -> (f32, f32) {
    const VECTORS: usize = BLOCK / LANES;
    let (from, limit) = (pair.first(i), pair.limit(i));
    if limit == 0 {
        clear(strip, m, tile.end);
        return (1.0, f32::NEG_INFINITY);
    }
    let bias = pair.bias(head, i);
    let mut most = s.splat(f32::NEG_INFINITY);
    for (b, block) in strip.iter_mut().enumerate().take(limit.div_ceil(BLOCK)).skip(tile.start) {
        for (j, x) in block[m].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let vector = b * VECTORS + j;
            let left = limit.saturating_sub(vector * LANES);
            if left == 0 {
                break;
            }
            let mut v = score(s, s.load(x), pair.args.scale, bias, vector);
            if left < LANES {
                v = first_lanes(s, left, v, f32::NEG_INFINITY);
            }
            if from > vector * LANES {
                v = without_lanes(s, from - vector * LANES, v, f32::NEG_INFINITY);
            }
            most = s.max(most, v);
            s.store(v, x);
        }
    }
    let most = s.max_lane(most);
    let mut sums = s.splat(0.0);
    for (b, block) in strip.iter_mut().enumerate().take(tile.end.div_ceil(BLOCK)).skip(tile.start) {
        let row = &mut block[m];
        let seen = limit.saturating_sub(b * BLOCK).min(BLOCK);
        let n_vectors = seen.div_ceil(LANES);
        let (vectors, unseen) = row.as_chunks_mut::<LANES>().0.split_at_mut(n_vectors);
        for x in &mut *vectors {
            let p = exp(s, s.sub(s.load(x), s.splat(most)));
            sums = s.add(sums, p);
            s.store(p, x);
        }
        unseen.iter_mut().for_each(|x| *x = [0.0; LANES]);
        if pair.args.dropout.is_some() {
            let kept = pair.factors(head, i, b * BLOCK, seen);
            for (x, kept) in vectors.iter_mut().zip(kept.as_chunks::<LANES>().0) {
                s.store(s.mul(s.load(x), s.load(kept)), x);
            }
        }
    }
    let sum = s.sum(sums);
    (sum, most + sum.ln())
}

/// [`Forward`] of a single query: K and V are read where they lie.
struct Decode<'a, T: ElementMut> {
    pair: Pair<'a, T>,
    /// The pieces of the group's heads.
    o: Vec<&'a mut [T::Item]>,
    lse: Vec<&'a mut [f32]>,
    scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Decode<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        const COLUMNS: usize = 4;
        let Self { pair, mut o, mut lse, mut scratch } = self;
        let (from, limit) = (pair.first(0) / LANES * LANES, pair.limit(0));
        let n_vectors = pair.head_dim.div_ceil(LANES);
        let q = carve(&mut scratch, n_vectors * LANES).as_chunks_mut::<LANES>().0;
        let scores = carve(&mut scratch, limit.next_multiple_of(LANES));
        for (g, (o, lse)) in o.iter_mut().zip(&mut lse).enumerate() {
            let head = pair.head(g);
            let row = pair.of_query(pair.q, head, 0);
            for (i, q) in q.iter_mut().enumerate() {
                s.store(load::<S, T>(s, row, i), q);
            }
            for (j, score) in scores.iter_mut().enumerate().take(limit).skip(from) {
                let (row, tail) = pair.of_key(pair.k, j).as_chunks::<LANES>();
                let mut sum = s.splat(0.0);
                for (q, k) in q.iter().zip(row) {
                    sum = s.fma(s.load(q), T::load(s, k), sum);
                }
                if !tail.is_empty() {
                    sum = s.fma(s.load(&q[n_vectors - 1]), T::load_part(s, tail), sum);
                }
                *score = s.sum(sum);
            }
            let (sum, log) = softmax_of_one(s, &pair, head, scores, limit);
            lse[0] = log;
            let divisor = s.splat(sum);
            for first in (0..n_vectors).step_by(COLUMNS) {
                let start = first * LANES;
                let end = pair.head_dim.min(start + COLUMNS * LANES);
                let mut sums = [s.splat(0.0); COLUMNS];
                for (j, &p) in scores.iter().enumerate().take(limit).skip(from) {
                    let p = s.splat(p);
                    let (row, tail) = pair.of_key(pair.v, j)[start..end].as_chunks::<LANES>();
                    for (sum, v) in sums.iter_mut().zip(row) {
                        *sum = s.fma(p, T::load(s, v), *sum);
                    }
                    if !tail.is_empty() {
                        sums[row.len()] = s.fma(p, T::load_part(s, tail), sums[row.len()]);
                    }
                }
                let o = &mut o[start..end];
                for (i, &sum) in sums.iter().enumerate().take((end - start).div_ceil(LANES)) {
                    store::<S, T>(s, s.div(sum, divisor), o, i);
                }
            }
        }
    }
}

/// Turns the raw scores of the only query into unnormalised probabilities after dropout. Gives
/// their sum before dropout and `lse`.
#[inline(always)]
fn softmax_of_one<S: Simd, T: Element>(
    s: S,
    pair: &Pair<'_, T>,
    head: usize,
    scores: &mut [f32],
    limit: usize,
) -> (f32, f32) {
    if limit == 0 {
        return (1.0, f32::NEG_INFINITY);
    }
    scores[limit..].fill(0.0);
    let bias = pair.bias(head, 0);
    let (from, vectors) = (pair.first(0), scores.as_chunks_mut::<LANES>().0);
    let mut most = s.splat(f32::NEG_INFINITY);
    for (i, x) in vectors.iter_mut().enumerate().skip(from / LANES) {
        let v = score(s, s.load(x), pair.args.scale, bias, i);
        let mut v = first_lanes(s, limit - i * LANES, v, f32::NEG_INFINITY);
        if from > i * LANES {
            v = without_lanes(s, from - i * LANES, v, f32::NEG_INFINITY);
        }
        most = s.max(most, v);
        s.store(v, x);
    }
    let most = s.max_lane(most);
    let mut sums = s.splat(0.0);
    for x in vectors.iter_mut().skip(from / LANES) {
        let p = exp(s, s.sub(s.load(x), s.splat(most)));
        sums = s.add(sums, p);
        s.store(p, x);
    }
    if pair.args.dropout.is_some() {
        for (b, scores) in scores[..limit].chunks_mut(BLOCK).enumerate() {
            let kept = pair.factors(head, 0, b * BLOCK, scores.len());
            scores.iter_mut().zip(kept).for_each(|(p, kept)| *p *= kept);
        }
    }
    let sum = s.sum(sums);
    (sum, most + sum.ln())
}

struct Backward<'a, T: ElementMut> {
    pair: Pair<'a, T>,
    o: &'a [T::Item],
    /// `[query tokens, n_heads]`.
    lse: &'a [f32],
    d_o: &'a [T::Item],
    /// Query by query, the pieces of the group's heads.
    d_q: Vec<&'a mut [T::Item]>,
    /// Key by key.
    d_k: Vec<&'a mut [T::Item]>,
    d_v: Vec<&'a mut [T::Item]>,
    scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        match (S::MR, S::NV) {
            (6, 1) => self.run::<S, 6, 1>(s),
            (12, 2) => self.run::<S, 12, 2>(s),
            _ => self.run::<S, 4, 1>(s),
        }
    }
}

impl<T: ElementMut> Backward<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const MR: usize, const NV: usize>(mut self, s: S) {
        let Pair { n_queries, n_keys, head_dim, group, .. } = self.pair;
        let pair = self.pair;
        let width = NV * LANES;
        let padded_dim = head_dim.next_multiple_of(width);
        let n_panels = padded_dim / width;
        let mut scratch = self.scratch;
        let mut panels = |n: usize| panel_rows::<NV>(carve(&mut scratch, n));

        // K and V with keys in lanes, K with columns in lanes, and the sums over queries.
        let padded_keys = n_keys.next_multiple_of(width);
        let k_transposed = panels(padded_keys * head_dim);
        pack_transposed::<S, T, NV>(s, |j| pair.of_key(pair.k, j), n_keys, k_transposed, head_dim);
        let v_transposed = panels(padded_keys * head_dim);
        pack_transposed::<S, T, NV>(s, |j| pair.of_key(pair.v, j), n_keys, v_transposed, head_dim);
        let k = panels(n_keys * padded_dim);
        pack_rows::<S, T, NV>(s, |j| pair.of_key(pair.k, j), n_keys, k);
        let key_rows = n_keys.next_multiple_of(BLOCK);
        let d_k = panels(key_rows * padded_dim);
        let d_v = panels(key_rows * padded_dim);
        d_k.fill([[0.0; LANES]; NV]);
        d_v.fill([[0.0; LANES]; NV]);

        let q = panels(n_queries * padded_dim);
        let d_o = panels(n_queries * padded_dim);
        let d_q = panels(BLOCK * padded_dim);
        let tiles = n_queries.next_multiple_of(MR) * head_dim;
        let q_tiles = carve(&mut scratch, tiles).as_chunks_mut::<MR>().0;
        let d_o_tiles = carve(&mut scratch, tiles).as_chunks_mut::<MR>().0;
        let dots = carve(&mut scratch, n_queries);
        let p = carve(&mut scratch, BLOCK * BLOCK).as_chunks_mut::<BLOCK>().0;
        let d_s = carve(&mut scratch, BLOCK * BLOCK).as_chunks_mut::<BLOCK>().0;

        for g in 0..group {
            let head = pair.head(g);
            let q_row = |i| pair.of_query(pair.q, head, i);
            let d_o_row = |i| pair.of_query(self.d_o, head, i);
            pack_rows::<S, T, NV>(s, q_row, n_queries, q);
            pack_rows::<S, T, NV>(s, d_o_row, n_queries, d_o);
            let tiles =
                q_tiles.chunks_exact_mut(head_dim).zip(d_o_tiles.chunks_exact_mut(head_dim));
            for (t, (q_tile, d_o_tile)) in tiles.enumerate() {
                pack_tile::<T, MR>(q_row, t * MR, n_queries, q_tile);
                pack_tile::<T, MR>(d_o_row, t * MR, n_queries, d_o_tile);
            }
            for (i, dot) in dots.iter_mut().enumerate() {
                *dot = dot_rows::<S, T>(s, d_o_row(i), pair.of_query(self.o, head, i));
            }

            for first_query in (0..n_queries).step_by(BLOCK) {
                let in_block = BLOCK.min(n_queries - first_query);
                d_q.fill([[0.0; LANES]; NV]);
                let limit = pair.limit(first_query + in_block - 1);
                let start = pair.first(first_query) / BLOCK * BLOCK;
                for first_key in (start..limit).step_by(BLOCK) {
                    let seen = BLOCK.min(limit - first_key);
                    // Scores, and gradients of the probabilities after dropout.
                    let rows =
                        p.as_chunks_mut::<MR>().0.iter_mut().zip(d_s.as_chunks_mut::<MR>().0);
                    for (t, (p, d_s)) in rows.enumerate().take(in_block.div_ceil(MR)) {
                        let tile = (first_query / MR + t) * head_dim;
                        for panel in 0..seen.div_ceil(width) {
                            let start = (first_key / width + panel) * head_dim;
                            let rhs = &k_transposed[start..][..head_dim];
                            let lhs = &q_tiles[tile..][..head_dim];
                            let acc = product(s, lhs, rhs, zeros::<S, MR, NV>(s));
                            store_block(s, acc, p, panel);
                            let rhs = &v_transposed[start..][..head_dim];
                            let lhs = &d_o_tiles[tile..][..head_dim];
                            let acc = product(s, lhs, rhs, zeros::<S, MR, NV>(s));
                            store_block(s, acc, d_s, panel);
                        }
                    }
                    for (r, (p, d_s)) in p.iter_mut().zip(&mut *d_s).enumerate().take(in_block) {
                        let i = first_query + r;
                        let lse = self.lse[(pair.first_query + i) * pair.args.n_heads + head];
                        let query = Query { head, i, lse, dot: dots[i] };
                        score_gradients(
                            s,
                            &pair,
                            query,
                            first_key,
                            // What the tiles below read: of whole panels, and of whole rows of tiles.
                            seen.next_multiple_of(width)
                                .max(seen.next_multiple_of(MR).next_multiple_of(LANES))
                                .min(BLOCK),
                            p,
                            d_s,
                        );
                    }
                    // Sums over queries, a tile of keys at a time.
                    for first in (0..seen).step_by(MR) {
                        for c in 0..n_panels {
                            let own = c * key_rows + first_key + first;
                            let from = c * n_queries + first_query;
                            let rows = rows_from::<MR, NV>(d_v, own);
                            let acc = product_of_columns(
                                s,
                                p,
                                first,
                                &d_o[from..][..in_block],
                                load_rows(s, rows),
                            );
                            store_rows(s, acc, rows);
                            let rows = rows_from::<MR, NV>(d_k, own);
                            let acc = product_of_columns(
                                s,
                                d_s,
                                first,
                                &q[from..][..in_block],
                                load_rows(s, rows),
                            );
                            store_rows(s, acc, rows);
                        }
                    }
                    // Sums over keys, a tile of queries at a time.
                    let rows = d_s.as_chunks::<MR>().0.iter().enumerate();
                    for (t, d_s) in rows.take(in_block.div_ceil(MR)) {
                        for c in 0..n_panels {
                            let rhs = &k[c * n_keys + first_key..][..seen];
                            let rows = rows_from::<MR, NV>(d_q, c * BLOCK + t * MR);
                            let acc = product_of_rows(s, d_s, rhs, load_rows(s, rows));
                            store_rows(s, acc, rows);
                        }
                    }
                }
                for i in 0..in_block {
                    let to = &mut self.d_q[(first_query + i) * group + g];
                    write_row::<S, T, NV>(s, d_q, BLOCK, i, pair.args.scale, to);
                }
            }
        }
        for (i, (d_k_row, d_v_row)) in self.d_k.iter_mut().zip(&mut self.d_v).enumerate() {
            write_row::<S, T, NV>(s, d_k, key_rows, i, pair.args.scale, d_k_row);
            write_row::<S, T, NV>(s, d_v, key_rows, i, 1.0, d_v_row);
        }
    }
}

/// What the backward knows of a query.
struct Query {
    head: usize,
    i: usize,
    lse: f32,
    /// `D`.
    dot: f32,
}

/// From a row of a block, with raw scores in `p` and gradients of the probabilities after dropout
/// in `d_s`, to probabilities after dropout and gradients of the scores; zeros in what the query
/// does not see of the first `n` columns.
#[inline(always)]
fn score_gradients<S: Simd, T: Element>(
    s: S,
    pair: &Pair<'_, T>,
    query: Query,
    first_key: usize,
    n: usize,
    p: &mut [f32; BLOCK],
    d_s: &mut [f32; BLOCK],
) {
    let Query { head, i, lse, dot } = query;
    let seen = pair.limit(i).saturating_sub(first_key).min(n);
    let unseen = pair.first(i).saturating_sub(first_key);
    let bias = pair.bias(head, i).map(|bias| bias.get(first_key..).unwrap_or_default());
    let kept = pair.factors(head, i, first_key, seen);
    let (lse, dot) = (s.splat(lse), s.splat(dot));
    let vectors = p.as_chunks_mut::<LANES>().0.iter_mut().zip(d_s.as_chunks_mut::<LANES>().0);
    for (j, (p, d_s)) in vectors.enumerate().take(n / LANES) {
        let left = seen.saturating_sub(j * LANES);
        if left == 0 {
            (*p, *d_s) = ([0.0; LANES], [0.0; LANES]);
            continue;
        }
        let kept = s.load(&kept.as_chunks::<LANES>().0[j]);
        let mut value = exp(s, s.sub(score(s, s.load(p), pair.args.scale, bias, j), lse));
        let mut gradient = s.mul(value, s.sub(s.mul(s.load(d_s), kept), dot));
        value = s.mul(value, kept);
        if left < LANES {
            value = first_lanes(s, left, value, 0.0);
            gradient = first_lanes(s, left, gradient, 0.0);
        }
        if unseen > j * LANES {
            value = without_lanes(s, unseen - j * LANES, value, 0.0);
            gradient = without_lanes(s, unseen - j * LANES, gradient, 0.0);
        }
        s.store(value, p);
        s.store(gradient, d_s);
    }
}

/// `Σ a b` over a row.
#[inline(always)]
fn dot_rows<S: Simd, T: Element>(s: S, a: &[T::Item], b: &[T::Item]) -> f32 {
    let mut sum = s.splat(0.0);
    for i in 0..a.len().div_ceil(LANES) {
        sum = s.fma(load::<S, T>(s, a, i), load::<S, T>(s, b, i), sum);
    }
    s.sum(sum)
}

#[cfg(test)]
mod tests {
    use std::array;

    use super::{
        super::{
            super::Backend,
            isa::Isa,
            testing::{
                Random, activation, assert_close, bits, dropout_of, each_cpu, same_for_any_threads,
            },
        },
        *,
    };
    use crate::dtype::Dtype;

    const U: f64 = 1.0 / (1u64 << 24) as f64;

    /// A shape: sequences as (queries, keys), rows left free before each sequence's keys, and so on.
    #[derive(Clone, Debug)]
    struct Case {
        lens: Vec<(usize, usize)>,
        gap: usize,
        n_heads: usize,
        n_kv_heads: usize,
        head_dim: usize,
        causal: bool,
        window: Option<usize>,
        bias: bool,
        dropout: f32,
    }

    impl Case {
        fn plain(lens: &[(usize, usize)], head_dim: usize) -> Self {
            Self {
                lens: lens.to_vec(),
                gap: 0,
                n_heads: 2,
                n_kv_heads: 2,
                head_dim,
                causal: false,
                window: None,
                bias: false,
                dropout: 0.0,
            }
        }
    }

    /// Inputs of a case, on a backend and as it has them.
    struct Data {
        case: Case,
        queries: Spans,
        keys: Spans,
        tensors: [Tensor<Cpu>; 4],
        /// q, k, v, d_o.
        values: [Vec<f64>; 4],
        bias: Option<RelativeBias<Cpu>>,
        bias_values: Vec<f64>,
        dropout: Option<Dropout>,
        scale: f32,
    }

    impl Data {
        fn new(cpu: &Cpu, case: &Case) -> Self {
            let mut random = Random::new(case.head_dim as u64);
            let query_lens: Vec<_> = case.lens.iter().map(|l| l.0).collect();
            let queries = Spans::packed(&query_lens);
            let mut keys = Spans::default();
            let mut end = 0;
            for &(_, n_keys) in &case.lens {
                keys.starts.push(end + case.gap);
                keys.lens.push(n_keys);
                end += case.gap + n_keys;
            }
            let key_rows = end + case.gap;
            let shapes = [(queries.end(), case.n_heads), (key_rows, case.n_kv_heads)];
            let pairs: [_; 4] = array::from_fn(|i| {
                let (rows, heads) = shapes[usize::from(i == 1 || i == 2)];
                let (tensor, mut values) =
                    activation(cpu, &mut random, rows, heads * case.head_dim);
                if i == 0 || i == 3 || case.gap == 0 {
                    return (tensor, values);
                }
                // What lies between the sequences must not be read.
                let width = heads * case.head_dim;
                for row in 0..rows {
                    if !(0..keys.n())
                        .any(|s| (keys.starts[s]..keys.starts[s] + keys.lens[s]).contains(&row))
                    {
                        values[row * width..][..width].fill(f64::NAN);
                    }
                }
                (cpu.upload(&values, rows, width, Precision::Activation), values)
            });
            let most = case.lens.iter().map(|l| l.0.max(l.1)).max().unwrap_or(0);
            let distances = 2 * most + 3;
            let table = random.reals(case.n_heads * distances);
            let table = cpu.upload(&table, case.n_heads, distances, Precision::Full);
            let bias_values = cpu.download(&table);
            Self {
                queries,
                keys,
                tensors: pairs.each_ref().map(|p| p.0.clone()),
                values: pairs.map(|p| p.1),
                bias: case.bias.then(|| RelativeBias { table, zero: most + 1 }),
                bias_values,
                dropout: (case.dropout > 0.0).then(|| dropout_of(case.dropout, shapes[0].0)),
                scale: (1.5 / (case.head_dim as f64).sqrt()) as f32,
                case: case.clone(),
            }
        }

        fn args(&self) -> Attention<'_, Cpu> {
            Attention {
                q: &self.tensors[0],
                k: &self.tensors[1],
                v: &self.tensors[2],
                queries: &self.queries,
                keys: &self.keys,
                n_heads: self.case.n_heads,
                n_kv_heads: self.case.n_kv_heads,
                head_dim: self.case.head_dim,
                scale: self.scale,
                causal: self.case.causal,
                window: self.case.window,
                bias: self.bias.as_ref(),
                dropout: self.dropout.as_ref(),
            }
        }

        /// Calls `see` for each (query token, head, query's place, key rows with score and factor).
        fn each_query(&self, mut see: impl FnMut(usize, usize, &[(usize, f64, f64)])) {
            let Case { n_heads, n_kv_heads, head_dim, causal, window, .. } = self.case;
            let [q, k, ..] = &self.values;
            for (sequence, &(n_queries, n_keys)) in self.case.lens.iter().enumerate() {
                for (i, head) in (0..n_queries).flat_map(|i| (0..n_heads).map(move |h| (i, h))) {
                    let token = self.queries.starts[sequence] + i;
                    let position = (i + n_keys) as isize - n_queries as isize;
                    let mut keys = Vec::new();
                    for j in 0..n_keys {
                        let past = position - j as isize;
                        if causal && (past < 0 || window.is_some_and(|w| past >= w as isize)) {
                            continue;
                        }
                        let row = self.keys.starts[sequence] + j;
                        let kv = head / (n_heads / n_kv_heads);
                        let q = &q[(token * n_heads + head) * head_dim..][..head_dim];
                        let k = &k[(row * n_kv_heads + kv) * head_dim..][..head_dim];
                        let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                        let mut score = f64::from(self.scale) * dot;
                        if let Some(bias) = &self.bias {
                            let col = (bias.zero + j) as isize - position;
                            score += self.bias_values[head * bias.table.cols() + col as usize];
                        }
                        let col = head * n_keys.next_multiple_of(8) + j;
                        let factor = |d: &Dropout| f64::from(d.factor(token, col));
                        keys.push((row, score, self.dropout.as_ref().map_or(1.0, factor)));
                    }
                    see(token, head, &keys);
                }
            }
        }

        /// `o` with the sum of its terms' magnitudes, and `lse`.
        fn forward(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
            let Case { n_heads, n_kv_heads, head_dim, .. } = self.case;
            let v = &self.values[2];
            let mut o = vec![0.0; self.values[0].len()];
            let mut size = o.clone();
            let mut lse = vec![f64::NEG_INFINITY; self.queries.end() * n_heads];
            self.each_query(|token, head, keys| {
                let most = keys.iter().map(|k| k.1).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = keys.iter().map(|k| (k.1 - most).exp()).sum();
                if !keys.is_empty() {
                    lse[token * n_heads + head] = most + sum.ln();
                }
                let kv = head / (n_heads / n_kv_heads);
                for &(row, score, factor) in keys {
                    let p = factor * (score - most).exp() / sum;
                    for c in 0..head_dim {
                        let term = p * v[(row * n_kv_heads + kv) * head_dim + c];
                        o[(token * n_heads + head) * head_dim + c] += term;
                        size[(token * n_heads + head) * head_dim + c] += term.abs();
                    }
                }
            });
            (o, size, lse)
        }

        /// `d_q, d_k, d_v` with the sums of their terms' magnitudes, from `o` and `lse` as given.
        fn backward(&self, o: &[f64], lse: &[f64]) -> [Vec<(f64, f64)>; 3] {
            let Case { n_heads, n_kv_heads, head_dim, .. } = self.case;
            let [q, k, v, d_o] = &self.values;
            let mut out = [q, k, v].map(|like| vec![(0.0, 0.0); like.len()]);
            self.each_query(|token, head, keys| {
                let kv = head / (n_heads / n_kv_heads);
                let at_q = (token * n_heads + head) * head_dim;
                let dot: f64 = (0..head_dim).map(|c| d_o[at_q + c] * o[at_q + c]).sum();
                let dot_size: f64 =
                    (0..head_dim).map(|c| (d_o[at_q + c] * o[at_q + c]).abs()).sum();
                for &(row, score, factor) in keys {
                    let at_k = (row * n_kv_heads + kv) * head_dim;
                    let p = (score - lse[token * n_heads + head]).exp();
                    let terms = (0..head_dim).map(|c| factor * d_o[at_q + c] * v[at_k + c]);
                    let d_p: f64 = terms.clone().sum();
                    let d_p_size: f64 = terms.map(f64::abs).sum();
                    let d_s = f64::from(self.scale) * p * (d_p - dot);
                    let d_s_size = f64::from(self.scale) * p * (d_p_size + dot_size);
                    for c in 0..head_dim {
                        let add = |to: &mut (f64, f64), a: f64, a_size: f64, b: f64| {
                            *to = (to.0 + a * b, to.1 + a_size * b.abs());
                        };
                        add(&mut out[0][at_q + c], d_s, d_s_size, k[at_k + c]);
                        add(&mut out[1][at_k + c], d_s, d_s_size, q[at_q + c]);
                        add(&mut out[2][at_k + c], p * factor, p * factor, d_o[at_q + c]);
                    }
                }
            });
            out
        }
    }

    fn run(cpu: &Cpu, data: &Data) -> (Attended<Cpu>, [Tensor<Cpu>; 3]) {
        let forward = data.args();
        let out = cpu.attention(&forward);
        let d = cpu.attention_backward(AttentionBackward {
            forward: &forward,
            o: &out.o,
            lse: &out.lse,
            d_o: &data.tensors[3],
        });
        (out, d)
    }

    fn check_case(cpu: &Cpu, case: &Case) {
        let data = Data::new(cpu, case);
        let (out, d) = run(cpu, &data);
        let (o, size, lse) = data.forward();
        assert_close(cpu, &out.o, &o, |i| 48.0 * U * size[i]);
        let got = cpu.download(&out.lse);
        for (got, want) in got.iter().zip(&lse) {
            let close = (got - want).abs() <= 16.0 * U * (1.0 + want.abs());
            assert!(close || got == want, "{cpu:?} {case:?}: lse {got}, not {want}");
        }
        let want = data.backward(&cpu.download(&out.o), &got);
        for (d, want) in d.iter().zip(want) {
            let values: Vec<f64> = want.iter().map(|w| w.0).collect();
            assert_close(cpu, d, &values, |i| 48.0 * U * want[i].1);
        }
    }

    #[test]
    fn agrees_with_f64() {
        let sizes: &[&[(usize, usize)]] = &[
            &[],
            &[(0, 0)],
            &[(1, 1)],
            &[(2, 2), (0, 3), (5, 5), (1, 7)],
            &[(6, 6), (7, 7), (15, 17)],
            &[(16, 16), (33, 33)],
            &[(1, 63), (3, 65), (64, 64)],
            &[(97, 97)],
            &[(65, 129), (12, 200)],
            &[(3, 0), (4, 2)],
            &[(200, 216)], // Blocks of keys that end inside a register tile.
        ];
        each_cpu(|cpu| {
            for (i, lens) in sizes.iter().enumerate() {
                let head_dim = [8, 12, 16, 33, 64, 1, 64, 16, 8, 8, 8][i];
                let plain = Case::plain(lens, head_dim);
                let cases = [
                    plain.clone(),
                    Case { causal: true, n_heads: 4, gap: 3, ..plain.clone() },
                    Case { causal: true, window: Some(1 + 13 * i), ..plain.clone() },
                    Case { bias: true, n_heads: 3, n_kv_heads: 1, dropout: 0.3, ..plain.clone() },
                    Case { bias: true, causal: true, gap: 2, dropout: 0.1, ..plain },
                ];
                for case in cases {
                    check_case(cpu, &case);
                }
            }
        });
    }

    #[test]
    fn wide_heads() {
        let cpu = Cpu::with_isa(Isa::detect().expect("an instruction set"), Dtype::F32, 2);
        let cpu = cpu.expect("a backend").poisoned();
        for head_dim in [80, 128, 130] {
            let case = Case { causal: true, ..Case::plain(&[(1, 40), (50, 50)], head_dim) };
            check_case(&cpu, &case);
        }
    }

    /// The f64 backward above is the derivative of the f64 forward above.
    #[test]
    fn backward_is_the_difference_quotient() {
        let cpu = Cpu::with_isa(Isa::detect().expect("an instruction set"), Dtype::F32, 1);
        let cpu = cpu.expect("a backend");
        let case = Case {
            causal: true,
            bias: true,
            dropout: 0.3,
            n_heads: 4,
            ..Case::plain(&[(2, 3), (4, 4)], 3)
        };
        let mut data = Data::new(&cpu, &case);
        let (o, _, lse) = data.forward();
        let d = data.backward(&o, &lse);
        let d_o = data.values[3].clone();
        for input in 0..3 {
            for i in 0..data.values[input].len() {
                let mut objective = |step: f64| {
                    let old = data.values[input][i];
                    data.values[input][i] += step;
                    let o = data.forward().0;
                    data.values[input][i] = old;
                    o.iter().zip(&d_o).map(|(a, b)| a * b).sum::<f64>()
                };
                let want = (objective(1e-5) - objective(-1e-5)) / 2e-5;
                assert!((d[input][i].0 - want).abs() < 1e-8, "{input} {i}");
            }
        }
    }

    /// Equal scores over 2^n keys: the mean of integers, without error.
    #[test]
    fn exact_means() {
        each_cpu(|cpu| {
            for (n_queries, n_keys) in [(1, 64), (7, 64), (1, 128), (13, 128)] {
                let mut data = Data::new(cpu, &Case::plain(&[(n_queries, n_keys)], 16));
                let zero = vec![0.0; data.values[0].len()];
                data.tensors[0] = cpu.upload(&zero, n_queries, 32, Precision::Activation);
                data.values[0] = zero;
                let v = Random::new(5).integers(n_keys * 32, 2);
                data.tensors[2] = cpu.upload(&v, n_keys, 32, Precision::Activation);
                data.values[2] = v;
                let got = cpu.attention(&data.args());
                assert_close(cpu, &got.o, &data.forward().0, |_| 0.0);
            }
        });
    }

    #[test]
    fn threads_and_other_sequences_change_nothing() {
        let lens = [(20, 20), (65, 65), (1, 30), (130, 130)];
        for case in [
            Case { bias: true, ..Case::plain(&lens, 16) },
            Case { causal: true, n_heads: 4, dropout: 0.2, ..Case::plain(&lens, 16) },
        ] {
            same_for_any_threads(|cpu| {
                let data = Data::new(cpu, &case);
                let (out, [d_q, d_k, d_v]) = run(cpu, &data);
                let all = [&out.o, &out.lse, &d_q, &d_k, &d_v].map(|t| cpu.download(t));
                for (sequence, &(n_queries, n_keys)) in lens.iter().enumerate() {
                    let (first_query, first_key) =
                        (data.queries.starts[sequence], data.keys.starts[sequence]);
                    let mut alone = Data::new(cpu, &case);
                    alone.case.lens = vec![(n_queries, n_keys)];
                    alone.queries = Spans::packed(&[n_queries]);
                    alone.keys = Spans::packed(&[n_keys]);
                    for (i, (tensor, values)) in
                        alone.tensors.iter_mut().zip(&data.values).enumerate()
                    {
                        let (first, n) = match i {
                            0 | 3 => (first_query, n_queries),
                            _ => (first_key, n_keys),
                        };
                        let rows = &values[first * tensor.cols..][..n * tensor.cols];
                        *tensor = cpu.upload(rows, n, tensor.cols, Precision::Activation);
                    }
                    if let Some(dropout) = &mut alone.dropout {
                        dropout.tokens =
                            dropout.tokens[first_query..first_query + n_queries].into();
                    }
                    let (out, [d_q, d_k, d_v]) = run(cpu, &alone);
                    let alone = [&out.o, &out.lse, &d_q, &d_k, &d_v].map(|t| cpu.download(t));
                    for (i, (alone, all)) in alone.iter().zip(&all).enumerate() {
                        let first = if i < 3 { first_query } else { first_key };
                        let rows = if i < 3 { n_queries } else { n_keys };
                        let width = alone.len() / rows;
                        let all = &all[first * width..][..alone.len()];
                        assert_eq!(bits(alone), bits(all), "sequence {sequence}, result {i}");
                    }
                }
                all.concat()
            });
        }
    }
}
