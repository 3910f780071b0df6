//! [`Forward`](super::forward) and [`Backward`](super::backward) on AMX tiles, of bf16.
//!
//! A [`Block`] has the scores of 32 queries and 128 keys. Its probabilities and their gradients, f32
//! until then, are rounded to bf16 once, as left or as right operand of what they are multiplied with:
//!
//! ```text
//!            left          right                          k
//! s, d_p     q, d_o        kᵀ, vᵀ    packed once a task   columns of a head
//! o          p             v         packed once a task   keys
//! d_q        d_s           k         packed once a task   keys
//! d_vᵀ, d_kᵀ d_oᵀ, qᵀ      p, d_s                         queries
//! ```
//!
//! The last two are transposed, so that no probability has to be: a right tile is made of pairs of
//! rows as they are, and what is transposed instead is packed once or written once.
//!
//! A probability of 0 is multiplied with what its query does not see, if another query of the block sees it: an
//! infinity there makes NaN.

use bytemuck::Zeroable;
use half::bf16;

use super::{
    super::{
        Cpu,
        elementwise::store,
        gemm_amx::{Left, PackColumns, PackRows, PackTransposed, column_tiles, multiply, steps},
        isa::{
            BLOCK_COLS, BLOCK_ROWS, Block, LANES, Simd, SimdOp, TILE_COLS, TILE_K, TILE_ROWS, Tile,
            Tiles, load_rows,
        },
        matrix::{Matrix, MatrixMut},
    },
    Gradients, Pair, carve,
    scores::{Query, dot_rows, score_gradients, softmax},
};
use crate::tensor::Tensor;

/// Queries of a block of scores.
const QUERIES: usize = BLOCK_ROWS;
/// Keys of a block of scores.
const KEYS: usize = BLOCK_COLS;
/// Blocks of keys between a load and a store of the forward's sums.
const BLOCKS_L1: usize = 2;
/// Blocks of queries between a load and a store of the backward's sums over queries.
const BLOCKS_OF_QUERIES: usize = 4;
/// Tiles of a block of keys, along its keys as columns and as k.
const TILES: usize = KEYS / TILE_COLS;
const STEPS: usize = KEYS / TILE_K;
/// [`Tile`]s in the room of a [`Block`].
const BLOCK_TILES: usize = size_of::<Block>() / size_of::<Tile>();

/// A block's rows.
type Rows = [[f32; KEYS]; QUERIES];

impl Pair<'_, bf16> {
    /// The head's part of the sequence's queries in a matrix shaped as `q`.
    fn queries<'a>(&self, matrix: &'a Tensor<Cpu>, head: usize) -> Matrix<'a> {
        let (first, start) = (self.first_query, head * self.head_dim);
        Matrix::tensor(matrix).part(first..first + self.n_queries, start..start + self.head_dim)
    }

    /// The head's part of the sequence's keys in `k` or `v`.
    fn keys<'a>(&self, matrix: &'a Tensor<Cpu>) -> Matrix<'a> {
        let (first, start) = (self.first_key, self.kv_head * self.head_dim);
        Matrix::tensor(matrix).part(first..first + self.n_keys, start..start + self.head_dim)
    }

    /// Packs `k` or `v` as a right operand with keys as columns: `[16 keys][step of the head]`.
    #[inline(always)]
    fn pack_as_columns<S: Simd>(&self, s: S, matrix: &Tensor<Cpu>, out: &mut [Tile]) {
        let (matrix, steps) = (self.keys(matrix), 0..steps(self.head_dim));
        PackColumns { matrix, transposed: true, steps, cols: 0..self.n_keys, out }.eval(s);
    }

    /// Packs `k` or `v` as a right operand with keys as k: `[16 columns of the head][step of keys]`.
    #[inline(always)]
    fn pack_as_rows<S: Simd>(&self, s: S, matrix: &Tensor<Cpu>, out: &mut [Tile]) {
        let (matrix, steps) = (self.keys(matrix), 0..steps(self.n_keys));
        PackColumns { matrix, transposed: false, steps, cols: 0..self.head_dim, out }.eval(s);
    }

    /// Tiles that have the keys as columns, and as k.
    fn key_tiles(&self) -> (usize, usize) {
        let as_columns = column_tiles(self.n_keys) * steps(self.head_dim);
        (as_columns, column_tiles(self.head_dim) * steps(self.n_keys))
    }

    fn key_blocks(&self) -> usize {
        self.n_keys.div_ceil(KEYS)
    }

    /// Blocks that a head's columns fill, and that they fill as rows.
    fn head_blocks(&self) -> (usize, usize) {
        (self.head_dim.div_ceil(BLOCK_COLS), self.head_dim.div_ceil(BLOCK_ROWS))
    }

    /// Tiles that have room for a number of each block of keys.
    fn begun_tiles(&self) -> usize {
        (self.key_blocks() * size_of::<u32>()).div_ceil(size_of::<Tile>())
    }

    /// Tiles for [`Forward`] to work in.
    pub(super) fn forward_tiles(&self) -> usize {
        let (as_columns, as_rows) = self.key_tiles();
        let n = self.key_blocks();
        let own = 2 * steps(self.head_dim) + 2 * STEPS * n + BLOCK_TILES * (n + 1);
        as_columns + as_rows + own
    }

    /// Tiles for [`Backward`] to work in.
    pub(super) fn backward_tiles(&self) -> usize {
        let (as_columns, as_rows) = self.key_tiles();
        let (blocks, row_blocks) = self.head_blocks();
        let queries = 2 * BLOCKS_OF_QUERIES * (2 * steps(self.head_dim));
        let transposed = 2 * column_tiles(self.head_dim) * BLOCKS_OF_QUERIES;
        let probabilities = 2 * TILES * BLOCKS_OF_QUERIES + 2 * STEPS;
        let sums = 2 * self.key_blocks() * row_blocks + BLOCKS_OF_QUERIES * blocks + 2;
        let dots = 1;
        let numbers = dots + self.begun_tiles();
        2 * as_columns
            + as_rows
            + queries
            + transposed
            + probabilities
            + BLOCK_TILES * sums
            + numbers
    }
}

fn carve_blocks<'a>(scratch: &mut &'a mut [Tile], n: usize) -> &'a mut [Block] {
    bytemuck::cast_slice_mut(carve(scratch, n * BLOCK_TILES))
}

/// The first `n` rows of a pair of row tiles, `[2][all]`, at `n_steps` steps from `start` on.
#[inline(always)]
fn left(packed: &[Tile], start: usize, n_steps: usize, n: usize) -> Left<'_> {
    let (first, second) = packed.split_at(packed.len() / 2);
    Left::of(&first[start..][..n_steps], &second[start..][..n_steps], n)
}

/// Rounds whole steps of a row of a block to row `m` of a pair of row tiles, `[2][all]`, at steps from `start` on.
#[inline(always)]
fn round_to_left<S: Simd>(s: S, row: &[f32], m: usize, packed: &mut [Tile], start: usize) {
    let n_steps = packed.len() / 2;
    let tiles = &mut packed[m / TILE_ROWS * n_steps..][start..];
    for (tile, items) in tiles.iter_mut().zip(row.as_chunks::<TILE_K>().0) {
        let line: &mut [bf16; TILE_K] = bytemuck::cast_mut(&mut tile.0[m % TILE_ROWS]);
        let line = line.as_chunks_mut::<LANES>().0.iter_mut();
        for (to, items) in line.zip(items.as_chunks::<LANES>().0) {
            s.store_bf16_flushed(s.load(items), to);
        }
    }
}

/// Rounds the first `cols` columns of a block, whole vectors, to a right operand with keys as columns and queries as k,
/// at step `step` of [`BLOCKS_OF_QUERIES`].
#[inline(always)]
fn round_to_right<S: Simd>(s: S, rows: &Rows, cols: usize, packed: &mut [Tile], step: usize) {
    let (pairs, _) = rows.as_chunks::<2>();
    for (line, [even, odd]) in pairs.iter().enumerate() {
        let [even, odd] = [even, odd].map(|row| row[..cols].as_chunks::<LANES>().0);
        let vectors = even.iter().zip(odd);
        for (tile, (even, odd)) in vectors.enumerate() {
            let mut rounded = [[bf16::ZERO; LANES]; 2];
            s.store_bf16_flushed(s.load(even), &mut rounded[0]);
            s.store_bf16_flushed(s.load(odd), &mut rounded[1]);
            let [even, odd]: [[u16; LANES]; 2] = bytemuck::cast(rounded);
            let tile = &mut packed[tile * BLOCKS_OF_QUERIES + step];
            let line: &mut [u32; LANES] = bytemuck::cast_mut(&mut tile.0[line]);
            for (both, (even, odd)) in line.iter_mut().zip(even.iter().zip(odd)) {
                *both = u32::from(*even) | u32::from(odd) << 16;
            }
        }
    }
}

/// The forward of several queries, of at least one key.
pub(super) struct Forward<'a, 't> {
    pub(super) pair: Pair<'a, bf16>,
    /// The group's heads' columns of the queries' rows.
    pub(super) o: MatrixMut<'a, bf16>,
    pub(super) lse: MatrixMut<'a, f32>,
    pub(super) scratch: &'t mut [Tile],
    pub(super) tiles: &'t mut Tiles,
}

impl SimdOp for Forward<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self { pair, mut o, mut lse, mut scratch, tiles } = self;
        let Pair { n_queries, head_dim, group, .. } = pair;
        let (depth, key_steps) = (steps(head_dim), steps(pair.n_keys));
        let (as_columns, as_rows) = pair.key_tiles();
        let k = carve(&mut scratch, as_columns);
        pair.pack_as_columns(s, pair.args.k, k);
        let v = carve(&mut scratch, as_rows);
        pair.pack_as_rows(s, pair.args.v, v);
        let q = carve(&mut scratch, 2 * depth);
        let p = carve(&mut scratch, 2 * STEPS * pair.key_blocks());
        let strip = carve_blocks(&mut scratch, pair.key_blocks());
        let sums = &mut carve_blocks(&mut scratch, 1)[0];

        let blocks_of_queries = (0..n_queries).step_by(QUERIES);
        for (g, first) in (0..group).flat_map(|g| blocks_of_queries.clone().map(move |i| (g, i))) {
            let head = pair.head(g);
            let n = QUERIES.min(n_queries - first);
            let limit = pair.limit(first + n - 1);
            let start = pair.first(first) / KEYS;
            let end = limit.div_ceil(KEYS);
            let matrix = pair.queries(pair.args.q, head);
            PackRows { matrix, first_row: first, out: q }.eval(s);
            for b in start..end {
                let of_tile = |tile: usize| &k[(b * TILES + tile) * depth..][..depth];
                let cols = KEYS.min(limit - b * KEYS);
                multiply(tiles, left(q, 0, depth, n), of_tile, cols, &mut strip[b], true);
            }
            let rows: &mut [Rows] = bytemuck::cast_slice_mut(strip);
            let mut divisors = [1.0; QUERIES];
            for (m, divisor) in divisors.iter_mut().enumerate().take(n) {
                pair.prefetch_query(s, pair.q, head, first + m);
                if g == 0 {
                    pair.prefetch_key(s, first + m);
                }
                s.prefetch(&o.row(first + m)[pair.columns(g)]);
                let log;
                (*divisor, log) = softmax(s, &pair, head, first + m, rows, m, start..limit);
                lse.row_mut(first + m)[g] = log;
                for (b, rows) in rows.iter().enumerate().take(end).skip(start) {
                    round_to_left(s, &rows[m], m, p, b * STEPS);
                }
            }
            for c in (0..head_dim).step_by(BLOCK_COLS) {
                let cols = BLOCK_COLS.min(head_dim - c);
                if start == end {
                    *sums = Block::zeroed();
                }
                for b in (start..end).step_by(BLOCKS_L1) {
                    let at = b * STEPS;
                    let n_steps = (BLOCKS_L1 * STEPS).min(steps(limit) - at);
                    let of_tile =
                        |tile: usize| &v[(c / TILE_COLS + tile) * key_steps + at..][..n_steps];
                    multiply(tiles, left(p, at, n_steps, n), of_tile, cols, sums, b == start);
                }
                for (m, row) in sums.0.iter().enumerate().take(n) {
                    let o = &mut o.row_mut(first + m)[pair.columns(g)][c..c + cols];
                    for (j, x) in row.as_chunks::<LANES>().0.iter().enumerate() {
                        if j * LANES < cols {
                            let mean = s.div(s.load(x), s.splat(divisors[m]));
                            store::<S, bf16>(s, mean, o, j);
                        }
                    }
                }
            }
        }
    }
}

/// The backward, of at least one query and one key.
pub(super) struct Backward<'a, 't> {
    pub(super) pair: Pair<'a, bf16>,
    pub(super) o: &'a Tensor<Cpu>,
    /// `[query tokens, n_heads]`.
    pub(super) lse: &'a [f32],
    pub(super) d_o: &'a Tensor<Cpu>,
    pub(super) d: Gradients<'a, bf16>,
    pub(super) scratch: &'t mut [Tile],
    pub(super) tiles: &'t mut Tiles,
}

impl SimdOp for Backward<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(mut self, s: S) {
        let Self { pair, mut scratch, tiles, .. } = self;
        let [d_q_rows, d_k_rows, d_v_rows] = &mut self.d;
        let Pair { n_queries, head_dim, group, .. } = pair;
        let (depth, key_steps) = (steps(head_dim), steps(pair.n_keys));
        let (head_blocks, row_blocks) = pair.head_blocks();
        let head_tiles = column_tiles(head_dim);
        let (as_columns, as_rows) = pair.key_tiles();
        let k_columns = carve(&mut scratch, as_columns);
        pair.pack_as_columns(s, pair.args.k, k_columns);
        let v_columns = carve(&mut scratch, as_columns);
        pair.pack_as_columns(s, pair.args.v, v_columns);
        let k_rows = carve(&mut scratch, as_rows);
        pair.pack_as_rows(s, pair.args.k, k_rows);

        let q = carve(&mut scratch, BLOCKS_OF_QUERIES * 2 * depth);
        let d_o = carve(&mut scratch, BLOCKS_OF_QUERIES * 2 * depth);
        let q_transposed = carve(&mut scratch, head_tiles * BLOCKS_OF_QUERIES);
        let d_o_transposed = carve(&mut scratch, head_tiles * BLOCKS_OF_QUERIES);
        let p_right = carve(&mut scratch, TILES * BLOCKS_OF_QUERIES);
        let d_s_right = carve(&mut scratch, TILES * BLOCKS_OF_QUERIES);
        let d_s_left = carve(&mut scratch, 2 * STEPS);
        let p = &mut carve_blocks(&mut scratch, 1)[0];
        let d_s = &mut carve_blocks(&mut scratch, 1)[0];
        let d_q = carve_blocks(&mut scratch, BLOCKS_OF_QUERIES * head_blocks);
        let d_k = carve_blocks(&mut scratch, pair.key_blocks() * row_blocks);
        let d_v = carve_blocks(&mut scratch, pair.key_blocks() * row_blocks);
        let dots: &mut [f32] = bytemuck::cast_slice_mut(carve(&mut scratch, 1));
        // Whether there is anything in the sums of a block of keys.
        let begun: &mut [u32] = bytemuck::cast_slice_mut(carve(&mut scratch, pair.begun_tiles()));
        begun.fill(0);

        let all_queries = (0..n_queries).step_by(BLOCKS_OF_QUERIES * QUERIES);
        for (g, first) in (0..group).flat_map(|g| all_queries.clone().map(move |i| (g, i))) {
            let head = pair.head(g);
            let (q_matrix, d_o_matrix) =
                (pair.queries(pair.args.q, head), pair.queries(self.d_o, head));
            let n = (BLOCKS_OF_QUERIES * QUERIES).min(n_queries - first);
            let n_blocks = n.div_ceil(QUERIES);
            for (matrix, rows, transposed) in [
                (q_matrix, &mut *q, &mut *q_transposed),
                (d_o_matrix, &mut *d_o, &mut *d_o_transposed),
            ] {
                let rows = rows.chunks_exact_mut(2 * depth).take(n_blocks);
                for (block, out) in rows.enumerate() {
                    PackRows { matrix, first_row: first + block * QUERIES, out }.eval(s);
                }
                let out = &mut transposed[..head_tiles * n_blocks];
                PackTransposed { matrix: matrix.part_rows(first..first + n), out }.eval(s);
            }
            for (i, dot) in dots.iter_mut().enumerate().take(n) {
                let (d_o, o) = (self.d_o.items::<bf16>(), self.o.items::<bf16>());
                let row = |matrix| pair.of_query(matrix, head, first + i);
                *dot = dot_rows::<S, bf16>(s, row(d_o), row(o));
            }
            let mut d_q_begun = [false; BLOCKS_OF_QUERIES];

            let (start, limit) = (pair.first(first) / KEYS, pair.limit(first + n - 1));
            for b in start..limit.div_ceil(KEYS) {
                let first_key = b * KEYS;
                let rows_of = |block: usize| QUERIES.min(n - block * QUERIES);
                // The blocks of queries that see a key: later ones than these, and earlier ones, do not.
                let sees = |block: usize| {
                    let i = first + block * QUERIES;
                    pair.limit(i + rows_of(block) - 1) > first_key
                        && pair.first(i) < first_key + KEYS
                };
                let some = (0..n_blocks).find(|&i| sees(i)).unwrap_or(n_blocks);
                let some = some..(some..n_blocks).find(|&i| !sees(i)).unwrap_or(n_blocks);
                if some.is_empty() {
                    continue;
                }
                let seen_by_all = KEYS.min(limit - first_key);
                let n_cols = seen_by_all.next_multiple_of(TILE_K);
                // The lines that the end, and the next head, will want: a few with each query.
                let is_first = g == 0 && begun[b] == 0;
                let mut keys = first_key..first_key + if is_first { seen_by_all } else { 0 };
                let keys_a_query = keys.len().div_ceil(n);
                for block in some.clone() {
                    let rows = rows_of(block);
                    let end = pair.limit(first + block * QUERIES + rows - 1);
                    let seen = KEYS.min(end - first_key);
                    let packed = block * 2 * depth..(block + 1) * 2 * depth;
                    let of_tile = |tile: usize| &k_columns[(b * TILES + tile) * depth..][..depth];
                    let queries = left(&q[packed.clone()], 0, depth, rows);
                    multiply(tiles, queries, of_tile, seen, p, true);
                    let of_tile = |tile: usize| &v_columns[(b * TILES + tile) * depth..][..depth];
                    let queries = left(&d_o[packed], 0, depth, rows);
                    multiply(tiles, queries, of_tile, seen, d_s, true);
                    for (r, (p, d_s)) in p.0.iter_mut().zip(&mut d_s.0).enumerate() {
                        let i = block * QUERIES + r;
                        if r >= rows {
                            p[..n_cols].fill(0.0);
                            d_s[..n_cols].fill(0.0);
                            continue;
                        }
                        if b == start {
                            for matrix in [pair.q, self.d_o.items::<bf16>(), self.o.items::<bf16>()]
                            {
                                pair.prefetch_query(s, matrix, head, first + i);
                            }
                            s.prefetch(&d_q_rows.row(first + i)[pair.columns(g)]);
                        }
                        for _ in 0..keys_a_query {
                            if let Some(j) = keys.next() {
                                pair.prefetch_key(s, j);
                                s.prefetch(d_k_rows.row(j));
                                s.prefetch(d_v_rows.row(j));
                            }
                        }
                        let token = pair.first_query + first + i;
                        let lse = self.lse[token * pair.args.n_heads + head];
                        let query = Query { head, i: first + i, lse, dot: dots[i] };
                        score_gradients(s, &pair, query, first_key, n_cols, p, d_s);
                        round_to_left(s, &d_s[..n_cols], r, d_s_left, 0);
                    }
                    round_to_right(s, &p.0, n_cols, p_right, block);
                    round_to_right(s, &d_s.0, n_cols, d_s_right, block);
                    let n_steps = steps(seen);
                    for (c, sums) in
                        d_q[block * head_blocks..][..head_blocks].iter_mut().enumerate()
                    {
                        let cols = BLOCK_COLS.min(head_dim - c * BLOCK_COLS);
                        let of_tile = |tile: usize| {
                            &k_rows[(c * TILES + tile) * key_steps + b * STEPS..][..n_steps]
                        };
                        multiply(
                            tiles,
                            left(d_s_left, 0, n_steps, rows),
                            of_tile,
                            cols,
                            sums,
                            !d_q_begun[block],
                        );
                    }
                    d_q_begun[block] = true;
                }
                let all_cols = KEYS.min(pair.n_keys - first_key).next_multiple_of(TILE_K);
                let first_time = std::mem::replace(&mut begun[b], 1) == 0;
                for (right, transposed, sums) in [
                    (&*p_right, &*d_o_transposed, &mut *d_v),
                    (&*d_s_right, &*q_transposed, &mut *d_k),
                ] {
                    let of_tile = |tile: usize| {
                        &right[tile * BLOCKS_OF_QUERIES..][..BLOCKS_OF_QUERIES][some.clone()]
                    };
                    let pairs = transposed.chunks_exact(2 * n_blocks);
                    for (pair, sums) in pairs.zip(&mut sums[b * row_blocks..][..row_blocks]) {
                        let left = left(pair, some.start, some.len(), BLOCK_ROWS);
                        // Of what later queries will see, some may not be among the columns yet.
                        let overwrite = first_time && n_cols == all_cols;
                        if first_time && !overwrite {
                            *sums = Block::zeroed();
                        }
                        multiply(tiles, left, of_tile, seen_by_all, sums, overwrite);
                    }
                }
            }
            for i in 0..n {
                let sums = &d_q[i / QUERIES * head_blocks..][..head_blocks];
                let to = &mut d_q_rows.row_mut(first + i)[pair.columns(g)];
                if !d_q_begun[i / QUERIES] {
                    to.fill(bf16::ZERO);
                    continue;
                }
                for j in 0..head_dim.div_ceil(LANES) {
                    let row = &sums[j / TILES].0[i % QUERIES].as_chunks::<LANES>().0[j % TILES];
                    store::<S, bf16>(s, s.mul(s.load(row), s.splat(pair.args.scale)), to, j);
                }
            }
        }
        for b in (0..pair.key_blocks()).filter(|&b| begun[b] == 0) {
            for sums in [&mut *d_k, &mut *d_v] {
                sums[b * row_blocks..][..row_blocks].fill(Block::zeroed());
            }
        }
        write_transposed(s, d_k, row_blocks, pair.args.scale, d_k_rows);
        write_transposed(s, d_v, row_blocks, 1.0, d_v_rows);
    }
}

/// Writes sums that have a key's row as a column, `[128 keys][32 columns of the head]`, times `scale`.
#[inline(always)]
fn write_transposed<S: Simd>(
    s: S,
    sums: &[Block],
    row_blocks: usize,
    scale: f32,
    out: &mut MatrixMut<'_, bf16>,
) {
    for (block, blocks) in sums.chunks_exact(row_blocks).enumerate() {
        for tile in 0..TILES {
            let first = (block * KEYS + tile * TILE_COLS).min(out.rows());
            let keys = first..out.rows().min(first + TILE_COLS);
            if keys.is_empty() {
                break;
            }
            for j in 0..out.cols().div_ceil(LANES) {
                let (rows, _) = blocks[j / 2].0.as_chunks::<LANES>();
                let square = load_rows(s, rows[j % 2].iter().map(|row| &row.as_chunks().0[tile]));
                for (v, key) in s.transpose(square).into_iter().zip(keys.clone()) {
                    store::<S, bf16>(s, s.mul(v, s.splat(scale)), out.row_mut(key), j);
                }
            }
        }
    }
}
