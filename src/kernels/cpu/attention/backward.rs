//! The backward.

use super::{
    super::isa::{ElementMut, LANES, Simd, SimdOp},
    BLOCK, Gradients, Pair, carve,
    panels::*,
    scores::{Query, dot_rows, score_gradients},
};

pub(super) struct Backward<'a, T: ElementMut> {
    pub(super) pair: Pair<'a, T>,
    pub(super) o: &'a [T::Item],
    /// `[query tokens, n_heads]`.
    pub(super) lse: &'a [f32],
    pub(super) d_o: &'a [T::Item],
    pub(super) d: Gradients<'a, T::Item>,
    pub(super) scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        with_register_tile!(S, self.run(s));
    }
}

impl<T: ElementMut> Backward<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const MR: usize, const NV: usize>(mut self, s: S) {
        let Pair { n_queries, n_keys, head_dim, group, .. } = self.pair;
        let pair = self.pair;
        let [d_q_rows, d_k_rows, d_v_rows] = &mut self.d;
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
                    let to = &mut d_q_rows.row_mut(first_query + i)[pair.columns(g)];
                    write_row::<S, T, NV>(s, d_q, BLOCK, i, pair.args.scale, to);
                }
            }
        }
        for i in 0..n_keys {
            write_row::<S, T, NV>(s, d_k, key_rows, i, pair.args.scale, d_k_rows.row_mut(i));
            write_row::<S, T, NV>(s, d_v, key_rows, i, 1.0, d_v_rows.row_mut(i));
        }
    }
}
