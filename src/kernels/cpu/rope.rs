//! Rotary position embedding: pairs of features turned by an angle.
//!
//! ```text
//! y_i         = cos x_i - sin x_(i + d/2)          i < d/2, the features of one head
//! y_(i + d/2) = cos x_(i + d/2) + sin x_i          angle of the token's position and of pair i
//! ```
//!
//! The backward turns the other way. The result takes the place of the input where nobody else holds it.

use super::{
    super::ops::*,
    Cpu, GRAIN,
    elementwise::{load, store},
    isa::{ElementMut, LANES, Simd, SimdOp},
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

pub(super) fn rope(cpu: &Cpu, args: Rope<'_, Cpu>) -> Tensor<Cpu> {
    let Rope { x, rotary, positions, inverse } = args;
    let Tensor { rows: n_positions, cols: head_dim, .. } = rotary.table;
    assert!(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0, "heads of whole pairs");
    assert_eq!(positions.len(), x.rows, "a position for each token");
    assert!(positions.iter().all(|&p| (p as usize) < n_positions), "an angle for each position");
    let mut y = x.own(cpu);
    if y.is_empty() {
        return y;
    }
    let (width, table) = (y.cols, rotary.table.f32s());
    with_element!(y.dtype, T => {
        let rows = (GRAIN / width).max(1);
        let tasks = y.items_mut::<T>().chunks_mut(rows * width).zip(positions.chunks(rows));
        run_tasks(tasks, |(x, positions)| {
            let sign = if inverse { -1.0 } else { 1.0 };
            cpu.isa.run(Turn::<T> { x, positions, table, width, head_dim, sign });
        });
    });
    y
}

/// Turns rows in place.
struct Turn<'a, T: ElementMut> {
    x: &'a mut [T::Item],
    positions: &'a [u32],
    /// `[positions, head_dim]`: cosines, then sines.
    table: &'a [f32],
    width: usize,
    head_dim: usize,
    /// Of the sines.
    sign: f32,
}

impl<T: ElementMut> SimdOp for Turn<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Self { x, positions, table, width, head_dim, sign } = self;
        let half = head_dim / 2;
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let angles = &table[position as usize * head_dim..][..head_dim];
            let (cos, sin) = angles.split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half.div_ceil(LANES) {
                    let (a, b) = (load::<S, T>(s, first, i), load::<S, T>(s, second, i));
                    let cos = load::<S, f32>(s, cos, i);
                    let sin = s.mul(load::<S, f32>(s, sin, i), s.splat(sign));
                    store::<S, T>(s, s.sub(s.mul(cos, a), s.mul(sin, b)), first, i);
                    store::<S, T>(s, s.fma(cos, b, s.mul(sin, a)), second, i);
                }
            }
        }
    }
}
