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
//! `NV` vectors ([`panels`]); with AMX, where there are several queries, on its tiles ([`tiles`]).
//! The scores of `MR` queries (forward) or of a block of 96 by 96 (backward) exist at a time, in the cache; the backward
//! computes the probabilities again from `lse`.
//!
//! A single query (decoding) reads K and V where they lie, in one task for several key-value heads: their rows are whole.
//!
//! Keys that no query of a tile sees (later ones, or earlier ones than a window) are not touched, but
//! for whole blocks' sake; those that only some of them see have the probability 0 in the others.

mod backward;
mod decode;
mod forward;
mod panels;
mod scores;
#[cfg(test)]
mod tests;
mod tiles;

use std::ops::Range;

use half::bf16;

use self::{backward::Backward, decode::Decode, forward::Forward};
use super::{
    super::{Precision, ops::*},
    Cpu, TASKS_OF_A_THREAD,
    elementwise::factors,
    isa::{Element, ElementMut, LANES, Simd},
    matrix::MatrixMut,
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

/// Keys of a block, and queries of one in the backward: a multiple of every tile's rows and columns.
const BLOCK: usize = 96;
/// The largest register tile of all instruction sets, to size buffers by.
const MAX_MR: usize = 12;
const MAX_WIDTH: usize = 2 * LANES;
/// Products of single queries, which wait for memory, that are surely worth a task.
const DECODE_GRAIN: usize = 16 * 1024;

pub(super) fn attention(cpu: &Cpu, args: &Attention<'_, Cpu>) -> Attended<Cpu> {
    check(args);
    let mut o = cpu.alloc(args.q.rows, args.q.cols, Precision::Activation);
    let mut lse = cpu.alloc(args.q.rows, args.n_heads, Precision::Full);
    if o.is_empty() {
        return Attended { o, lse };
    }
    if let Some(amx) = cpu.amx() {
        attend(cpu, args, &mut o, &mut lse, |pair: Pair<'_, bf16>, o, lse| {
            if pair.n_queries == 1 || pair.n_keys == 0 {
                return on_vectors(cpu, pair, o, lse);
            }
            let mut scratch = cpu.tiles(pair.forward_tiles().next_power_of_two());
            let scratch = scratch.as_mut_slice();
            amx.with_tiles(|tiles| amx.run(tiles::Forward { pair, o, lse, scratch, tiles }));
        });
    } else {
        with_element!(args.q.dtype, T => {
            attend::<T>(cpu, args, &mut o, &mut lse, |pair, o, lse| on_vectors(cpu, pair, o, lse));
        });
    }
    Attended { o, lse }
}

/// Runs a task for each sequence and key-value head (each some of them, where there is a single query), with its pieces of
/// the results.
fn attend<'a, T: ElementMut>(
    cpu: &Cpu,
    args: &'a Attention<'a, Cpu>,
    o: &'a mut Tensor<Cpu>,
    lse: &'a mut Tensor<Cpu>,
    run: impl Fn(Pair<'a, T>, MatrixMut<'a, T::Item>, MatrixMut<'a, f32>) + Sync,
) {
    let decodes = args.queries.lens.iter().all(|&len| len <= 1);
    let n_parts = if decodes { parts_of_a_row(cpu, args) } else { args.n_kv_heads };
    let o = deal(o.items_mut::<T>(), args.q.cols, args.queries, n_parts);
    let lse = deal(lse.f32s_mut(), args.n_heads, args.queries, n_parts);
    run_tasks(o.into_iter().zip(lse).enumerate(), |(task, (o, lse))| {
        if o.rows() > 0 {
            run(Pair::new(args, task, n_parts), o, lse);
        }
    });
}

fn on_vectors<T: ElementMut>(
    cpu: &Cpu,
    pair: Pair<'_, T>,
    o: MatrixMut<'_, T::Item>,
    lse: MatrixMut<'_, f32>,
) {
    let mut scratch = cpu.scratch(pair.forward_scratch().next_power_of_two());
    let scratch = scratch.as_mut_slice();
    if pair.n_queries == 1 {
        cpu.isa.run(Decode { pair, o, lse, scratch });
    } else {
        cpu.isa.run(Forward { pair, o, lse, scratch });
    }
}

pub(super) fn attention_backward(cpu: &Cpu, args: AttentionBackward<'_, Cpu>) -> [Tensor<Cpu>; 3] {
    let AttentionBackward { forward, o, lse, d_o } = args;
    check(forward);
    let like_q = (forward.q.rows, forward.q.cols);
    assert_eq!((o.rows, o.cols), like_q);
    assert_eq!((d_o.rows, d_o.cols), like_q);
    assert_eq!((lse.rows, lse.cols), (like_q.0, forward.n_heads));
    let mut d = [forward.q, forward.k, forward.v]
        .map(|like| cpu.alloc(like.rows, like.cols, Precision::Activation));
    if let Some(amx) = cpu.amx() {
        differentiate(forward, &mut d, |pair: Pair<'_, bf16>, d| {
            if pair.n_queries == 0 || pair.n_keys == 0 {
                return differentiate_on_vectors(cpu, &args, pair, d);
            }
            let mut scratch = cpu.tiles(pair.backward_tiles().next_power_of_two());
            let (scratch, lse) = (scratch.as_mut_slice(), lse.f32s());
            amx.with_tiles(|tiles| {
                amx.run(tiles::Backward { pair, o, lse, d_o, d, scratch, tiles });
            });
        });
    } else {
        with_element!(o.dtype, T => {
            differentiate::<T>(forward, &mut d, |pair, d| {
                differentiate_on_vectors(cpu, &args, pair, d);
            });
        });
    }
    d
}

/// A task's columns of the gradients: of the queries those of the group's heads, then of the keys and the values.
type Gradients<'a, T> = [MatrixMut<'a, T>; 3];

/// Runs a task for each sequence and key-value head, with its pieces of the gradients.
fn differentiate<'a, T: ElementMut>(
    args: &'a Attention<'a, Cpu>,
    d: &'a mut [Tensor<Cpu>; 3],
    run: impl Fn(Pair<'a, T>, Gradients<'a, T::Item>) + Sync,
) {
    let n_kv_heads = args.n_kv_heads;
    let [d_q, d_k, d_v] = d;
    let d_q = deal(d_q.items_mut::<T>(), args.q.cols, args.queries, n_kv_heads);
    let d_k = deal(d_k.items_mut::<T>(), args.k.cols, args.keys, n_kv_heads);
    let d_v = deal(d_v.items_mut::<T>(), args.v.cols, args.keys, n_kv_heads);
    let tasks = d_q.into_iter().zip(d_k).zip(d_v).enumerate();
    run_tasks(tasks, |(task, ((d_q, d_k), d_v))| {
        run(Pair::new(args, task, n_kv_heads), [d_q, d_k, d_v])
    });
}

fn differentiate_on_vectors<'a, T: ElementMut>(
    cpu: &Cpu,
    args: &'a AttentionBackward<'a, Cpu>,
    pair: Pair<'a, T>,
    d: Gradients<'a, T::Item>,
) {
    let mut scratch = cpu.scratch(pair.backward_scratch().next_power_of_two());
    let scratch = scratch.as_mut_slice();
    let (o, d_o) = (args.o.items::<T>(), args.d_o.items::<T>());
    cpu.isa.run(Backward { pair, o, lse: args.lse.f32s(), d_o, d, scratch });
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

/// Into how many tasks the heads of a sequence with a single query are cut: as few as keep all threads busy to the end, if the
/// tasks are worth it.
fn parts_of_a_row(cpu: &Cpu, args: &Attention<'_, Cpu>) -> usize {
    let products = args.keys.lens.iter().sum::<usize>() * args.n_heads * args.head_dim;
    let n_tasks = (products / DECODE_GRAIN).min(TASKS_OF_A_THREAD * cpu.n_threads());
    let wanted = n_tasks.div_ceil(args.queries.n().max(1));
    let mut parts = (1..=args.n_kv_heads).filter(|n| args.n_kv_heads.is_multiple_of(*n));
    parts.find(|&n| n >= wanted).unwrap_or(args.n_kv_heads)
}

/// Deals the rows of a matrix `width` wide out to the tasks: sequence by sequence, and within one `n_groups` groups of
/// neighbouring heads, the columns of one to a task. Rows of no sequence are set to zero.
///
/// # Panics
/// If two sequences share a row.
fn deal<'a, T: bytemuck::Zeroable>(
    matrix: &'a mut [T],
    width: usize,
    spans: &Spans,
    n_groups: usize,
) -> Vec<MatrixMut<'a, T>> {
    let mut tasks: Vec<_> = (0..spans.n() * n_groups).map(|_| MatrixMut::default()).collect();
    let mut in_order: Vec<usize> = (0..spans.n()).filter(|&i| spans.lens[i] > 0).collect();
    in_order.sort_unstable_by_key(|&i| spans.starts[i]);
    let (mut rest, mut at) = (MatrixMut::new(matrix, width), 0);
    let clear = |mut rows: MatrixMut<'_, T>| {
        (0..rows.rows()).for_each(|i| rows.row_mut(i).fill_with(T::zeroed));
    };
    for sequence in in_order {
        let gap = spans.starts[sequence].checked_sub(at).expect("sequences share no row");
        let before;
        (before, rest) = rest.split_rows(gap);
        clear(before);
        let mut own;
        (own, rest) = rest.split_rows(spans.lens[sequence]);
        for task in &mut tasks[sequence * n_groups..][..n_groups] {
            (*task, own) = own.split_cols(width / n_groups);
        }
        at = spans.starts[sequence] + spans.lens[sequence];
    }
    clear(rest);
    tasks
}

/// A task's view of the arguments: one sequence and one key-value head, or with a single query several.
struct Pair<'a, T: Element> {
    args: &'a Attention<'a, Cpu>,
    q: &'a [T::Item],
    k: &'a [T::Item],
    v: &'a [T::Item],
    first_query: usize,
    n_queries: usize,
    first_key: usize,
    n_keys: usize,
    /// The key-value head, the first one of several.
    kv_head: usize,
    n_kv_heads: usize,
    /// Query heads that share a key-value head.
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
    /// Of each sequence's key-value heads, cut into `n_parts`, the part number `task`.
    fn new(args: &'a Attention<'a, Cpu>, task: usize, n_parts: usize) -> Self {
        let (sequence, n_kv_heads) = (task / n_parts, args.n_kv_heads / n_parts);
        Self {
            args,
            q: args.q.items::<T>(),
            k: args.k.items::<T>(),
            v: args.v.items::<T>(),
            first_query: args.queries.starts[sequence],
            n_queries: args.queries.lens[sequence],
            first_key: args.keys.starts[sequence],
            n_keys: args.keys.lens[sequence],
            kv_head: task % n_parts * n_kv_heads,
            n_kv_heads,
            group: args.n_heads / args.n_kv_heads,
            head_dim: args.head_dim,
        }
    }

    /// The task's query head number `g`.
    fn head(&self, g: usize) -> usize {
        self.kv_head * self.group + g
    }

    /// The columns of the query head number `g` among the task's own.
    #[inline(always)]
    fn columns(&self, g: usize) -> Range<usize> {
        g * self.head_dim..(g + 1) * self.head_dim
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

    /// Fetches the row of query `i` of a head's right neighbour, which is often the next one's turn: its line lies in
    /// another page than the row before, where no prefetcher looks for it.
    #[inline(always)]
    fn prefetch_query<S: Simd>(&self, s: S, matrix: &'a [T::Item], head: usize, i: usize) {
        if head + 1 < self.args.n_heads {
            s.prefetch(self.of_query(matrix, head + 1, i));
        }
    }

    /// [`Pair::prefetch_query`], of key `j`, if it is there, in `k` and `v`.
    #[inline(always)]
    fn prefetch_key<S: Simd>(&self, s: S, j: usize) {
        if self.kv_head + 1 < self.args.n_kv_heads && j < self.n_keys {
            let next = Self { kv_head: self.kv_head + 1, ..*self };
            s.prefetch(next.of_key(self.k, j));
            s.prefetch(next.of_key(self.v, j));
        }
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

    /// The dropout factors of `W` keys from `first_key` on, for query `i`; of the first `n` of them.
    #[inline(always)]
    fn factors<const W: usize>(
        &self,
        head: usize,
        i: usize,
        first_key: usize,
        n: usize,
    ) -> [f32; W] {
        let mut kept = [1.0; W];
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
            let (keys, width) = (self.n_keys, self.head_dim.next_multiple_of(LANES));
            let of_a_head = keys.next_multiple_of(LANES) + 2 * width + 1;
            return self.n_kv_heads * self.group * of_a_head;
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
fn carve<'a, T>(scratch: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    scratch.split_off_mut(..n).expect("scratch was sized for this")
}
