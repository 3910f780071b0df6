//! The forward of several queries.

use super::{
    super::{
        elementwise::store,
        isa::{ElementMut, LANES, Simd, SimdOp},
        matrix::MatrixMut,
    },
    BLOCK, Pair, carve,
    panels::*,
    scores::{clear, softmax},
};

pub(super) struct Forward<'a, T: ElementMut> {
    pub(super) pair: Pair<'a, T>,
    /// The group's heads' columns of the queries' rows.
    pub(super) o: MatrixMut<'a, T::Item>,
    pub(super) lse: MatrixMut<'a, f32>,
    pub(super) scratch: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        with_register_tile!(S, self.run(s));
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
                    self.lse.row_mut(first + m)[g] = lse;
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
                    let o = &mut self.o.row_mut(first + m)[pair.columns(g)];
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
