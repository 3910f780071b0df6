//! Rows by index: embedding, gathering, and writing into a cache.

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    isa::{Bf16Bytes, Element, ElementMut, F16Bytes, F32Bytes, LANES, Simd, SimdOp},
    threads::run_tasks,
    with_element,
};
use crate::{dtype::Dtype, tensor::Tensor};

pub(super) fn embed(cpu: &Cpu, args: Embed<'_, Cpu>) -> Tensor<Cpu> {
    let mut y = cpu.alloc(args.ids.len(), args.table.cols(), Precision::Activation);
    with_element!(y.dtype, T => match args.table.dtype() {
        Dtype::F32 => look_up::<F32Bytes, T>(cpu, &args, &mut y),
        Dtype::Bf16 => look_up::<Bf16Bytes, T>(cpu, &args, &mut y),
        Dtype::F16 => look_up::<F16Bytes, T>(cpu, &args, &mut y),
        Dtype::F64 => unreachable!("files have f32, bf16 or f16"),
    });
    y
}

fn look_up<F: Element, T: ElementMut>(cpu: &Cpu, args: &Embed<'_, Cpu>, y: &mut Tensor<Cpu>) {
    let width = y.cols;
    if y.is_empty() {
        return;
    }
    let table: &[F::Item] = bytemuck::cast_slice(args.table.bytes()); // Bytes: no alignment needed.
    let rows = (GRAIN / width).max(1);
    let tasks = y.items_mut::<T>().chunks_mut(rows * width).zip(args.ids.chunks(rows));
    run_tasks(tasks, |(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            let from = &table[id as usize * width..][..width];
            cpu.isa.run(Convert::<F, T> { from, to: y, scale: args.scale });
        }
    });
}

/// Elements of one type as elements of another, times a number.
struct Convert<'a, F: Element, T: ElementMut> {
    from: &'a [F::Item],
    to: &'a mut [T::Item],
    scale: f32,
}

impl<F: Element, T: ElementMut> SimdOp for Convert<'_, F, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let scale = s.splat(self.scale);
        let (from, from_tail) = self.from.as_chunks::<LANES>();
        let (to, to_tail) = self.to.as_chunks_mut::<LANES>();
        for (from, to) in from.iter().zip(to) {
            T::store(s, s.mul(scale, F::load(s, from)), to);
        }
        T::store_part(s, s.mul(scale, F::load_part(s, from_tail)), to_tail);
    }
}

pub(super) fn gather(cpu: &Cpu, args: Gather<'_, Cpu>) -> Tensor<Cpu> {
    let Gather { x, rows } = args;
    let width = x.cols * x.dtype.size_bytes();
    let mut y = cpu.pool.take(rows.len() * width);
    if let Some(n) = GRAIN.checked_div(width).map(|n| n.max(1)) {
        run_tasks(y.bytes_mut().chunks_mut(n * width).zip(rows.chunks(n)), |(y, rows)| {
            for (y, &row) in y.chunks_mut(width).zip(rows) {
                y.copy_from_slice(&x.buffer.bytes()[row * width..][..width]);
            }
        });
    }
    Tensor::new(y, x.dtype, rows.len(), x.cols)
}

pub(super) fn cache_write(args: CacheWrite<'_, Cpu>) {
    let CacheWrite { cache, source, rows } = args;
    assert_eq!((cache.cols, cache.dtype), (source.cols, source.dtype));
    assert_eq!(source.rows, rows.len());
    let width = source.cols * source.dtype.size_bytes();
    if width == 0 {
        return;
    }
    let cache = cache.buffer_mut().expect("a tensor that is written is held once").bytes_mut();
    for (source, &row) in source.buffer.bytes().chunks_exact(width).zip(rows) {
        cache[row * width..][..width].copy_from_slice(source);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::Backend,
            testing::{Random, SIZES, each_cpu},
        },
        *,
    };
    use crate::tensor::Frozen;

    #[test]
    fn embed_takes_the_rows() {
        each_cpu(|cpu| {
            for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                for width in SIZES {
                    let values = Random::new(width as u64).integers(7 * width, 100);
                    let narrow: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                    let table = Frozen::from_f32(&narrow, 7, width, dtype);
                    for ids in [&[][..], &[6], &[0, 6, 3, 3, 1]] {
                        let y = cpu.embed(Embed { table: &table, ids, scale: 1.0 });
                        assert_eq!((y.rows(), y.cols()), (ids.len(), width));
                        let want: Vec<f64> = ids
                            .iter()
                            .flat_map(|&id| &values[id as usize * width..][..width])
                            .copied()
                            .collect();
                        assert_eq!(cpu.download(&y), want);
                    }
                }
            }
        });
    }

    #[test]
    fn cache_write_replaces_only_its_rows() {
        each_cpu(|cpu| {
            let values = Random::new(1).integers(5 * 17, 100);
            let mut cache = cpu.upload(&values, 5, 17, Precision::Activation);
            let source: Vec<f64> = (0..34).map(f64::from).collect();
            let written = cpu.upload(&source, 2, 17, Precision::Activation);
            cpu.cache_write(CacheWrite { cache: &mut cache, source: &written, rows: &[4, 1] });
            let got = cpu.download(&cache);
            for row in 0..5 {
                let want = match row {
                    4 => &source[..17],
                    1 => &source[17..],
                    _ => &values[row * 17..][..17],
                };
                assert_eq!(&got[row * 17..][..17], want);
            }
        });
    }
}
