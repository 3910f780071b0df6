//! A profile: how often each operation ran, how long it took, and what it had to do at least.
//!
//! Off it costs a load per operation; [`Profile::start`] turns it on.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{super::ops::*, Cpu, isa::Amx};
use crate::tensor::{Frozen, Tensor};

/// What operations took since [`Profile::start`], by operation and shape.
#[derive(Default)]
pub struct Profile {
    is_on: AtomicBool,
    entries: Mutex<BTreeMap<(&'static str, String), Entry>>,
}

/// All runs of an operation on one shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// The method of [`Backend`](crate::kernels::Backend).
    pub operation: &'static str,
    /// Rows and widths, as far as they tell runs apart.
    pub shape: String,
    /// Runs.
    pub calls: u64,
    /// Seconds of all runs.
    pub seconds: f64,
    /// Floating point operations of all runs; a product and its addition are two. Only matrix
    /// products count.
    pub flops: f64,
    /// Bytes of all operands and results, each once.
    pub bytes: f64,
    /// Whether the products are on AMX tiles.
    pub on_tiles: bool,
}

/// What a run has to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) shape: String,
    pub(super) flops: f64,
    pub(super) bytes: f64,
    pub(super) on_tiles: bool,
}

impl Profile {
    /// Forgets what was and counts from here on.
    pub fn start(&self) {
        self.lock().clear();
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// What was counted, the longest first; counting ends.
    pub fn finish(&self) -> Vec<Entry> {
        self.is_on.store(false, Ordering::Relaxed);
        let mut entries: Vec<Entry> = std::mem::take(&mut *self.lock()).into_values().collect();
        entries.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        entries
    }

    /// Counts from here to the end of what is returned.
    #[inline]
    pub(super) fn time(
        &self,
        operation: &'static str,
        work: impl FnOnce() -> Work,
    ) -> Option<Timed<'_>> {
        if !self.is_on.load(Ordering::Relaxed) {
            return None;
        }
        let work = work();
        Some(Timed { profile: self, operation, work, started: Instant::now() })
    }

    fn add(&self, operation: &'static str, work: &mut Work, took: Duration) {
        let shape = std::mem::take(&mut work.shape);
        let mut entries = self.lock();
        let entry = entries.entry((operation, shape.clone())).or_insert_with(|| Entry {
            operation,
            shape,
            ..Entry::default()
        });
        entry.calls += 1;
        entry.seconds += took.as_secs_f64();
        entry.flops += work.flops;
        entry.bytes += work.bytes;
        entry.on_tiles = work.on_tiles;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(&'static str, String), Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run that is being timed.
pub(super) struct Timed<'a> {
    profile: &'a Profile,
    operation: &'static str,
    work: Work,
    started: Instant,
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.profile.add(self.operation, &mut self.work, took);
    }
}

fn size(tensor: &Tensor<Cpu>) -> f64 {
    (tensor.len() * tensor.dtype.size_bytes()) as f64
}

fn weight_size(weight: &Frozen) -> f64 {
    weight.bytes().len() as f64
}

/// `2mnk`.
fn product(m: usize, n: usize, k: usize) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64
}

impl Work {
    /// The same work, on AMX tiles if there are any for it.
    pub(super) fn on(self, tiles: Option<Amx>) -> Self {
        Self { on_tiles: tiles.is_some(), ..self }
    }

    /// Moves these bytes and multiplies no matrices.
    pub(super) fn moves(bytes: f64) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Reads or writes these tensors.
    pub(super) fn over<'a>(tensors: impl IntoIterator<Item = &'a Tensor<Cpu>>) -> Self {
        Self::moves(tensors.into_iter().map(size).sum())
    }

    /// Reads and writes a tensor's worth this many times.
    pub(super) fn passes(tensor: &Tensor<Cpu>, n: usize) -> Self {
        Self::moves(n as f64 * size(tensor))
    }

    pub(super) fn linear(args: &Linear<'_, Cpu>) -> Self {
        let (m, k) = (args.x.rows, args.x.cols);
        let mut work = Self::over([args.x]);
        let _ = write!(work.shape, "{m} x {k} ->");
        for projection in args.projections {
            let n = projection.weight.rows();
            let _ = write!(work.shape, " {n}");
            work.flops += product(m, n, k);
            work.bytes += weight_size(projection.weight);
            work.bytes += (m * n * args.x.dtype.size_bytes()) as f64;
            work.bytes += projection.residual.map_or(0.0, size);
            if let Some(lora) = &projection.lora {
                work.flops += product(m, n, lora.z.cols);
                work.bytes += size(lora.z);
                work.shape.push_str("+lora");
            }
        }
        work
    }

    pub(super) fn linear_backward(args: &LinearBackward<'_, Cpu>) -> Self {
        let mut work = Self::moves(args.d_residual.as_ref().map_or(0.0, |d| 2.0 * size(d)));
        for (i, term) in args.terms.iter().enumerate() {
            let (m, n, k) = (term.d_y.rows, term.weight.cols(), term.weight.rows());
            if i == 0 {
                let _ = write!(work.shape, "{m} x {n} <-");
            }
            let _ = write!(work.shape, " {k}");
            work.flops += product(m, n, k);
            work.bytes += size(term.d_y) + weight_size(term.weight);
            if let Some((d_z, a, _)) = term.lora {
                work.flops += product(m, n, d_z.cols);
                work.bytes += size(d_z) + size(a);
                work.shape.push_str("+lora");
            }
        }
        work
    }

    /// `n_products` products of all queries with all the keys they see.
    pub(super) fn attention(args: &Attention<'_, Cpu>, n_products: f64) -> Self {
        let pairs: f64 =
            args.queries.lens.iter().zip(&args.keys.lens).fold(0.0, |sum, (&q, &k)| {
                let seen = |i: usize| {
                    let position = (k + i + 1).saturating_sub(q);
                    if args.causal { position.min(args.window.unwrap_or(position)) } else { k }
                };
                sum + (0..q).map(seen).sum::<usize>() as f64
            });
        let keys: usize = args.keys.lens.iter().sum();
        let width = args.n_kv_heads * args.head_dim * args.k.dtype.size_bytes();
        Self {
            shape: format!(
                "{} x {}, {} heads of {}{}",
                args.q.rows,
                keys,
                args.n_heads,
                args.head_dim,
                if args.causal { ", causal" } else { "" }
            ),
            flops: n_products * 2.0 * pairs * (args.n_heads * args.head_dim) as f64,
            bytes: n_products * size(args.q) + (2 * keys * width) as f64,
            ..Self::default()
        }
    }

    pub(super) fn head_loss(args: &HeadLoss<'_, Cpu>) -> Self {
        let (m, vocabulary, k) = (args.x.rows, args.weight.rows(), args.x.cols);
        let n_products = if args.d_nll.is_some() { 2.0 } else { 1.0 };
        Self {
            shape: format!("{m} x {k} -> {vocabulary}"),
            flops: n_products * product(m, vocabulary, k),
            bytes: n_products * (weight_size(args.weight) + size(args.x)),
            ..Self::default()
        }
    }

    pub(super) fn shrink(args: &Shrink<'_, Cpu>) -> Self {
        let a: f64 = args.mixed_a.iter().map(|a| size(a)).sum();
        let rank: usize = args.mixed_a.iter().map(|a| a.cols).sum();
        Self {
            shape: format!("{} x {} -> {rank}", args.x.rows, args.x.cols),
            flops: product(args.x.rows, args.x.cols, rank),
            bytes: size(args.x) + a + (4 * args.x.rows * rank) as f64,
            ..Self::default()
        }
    }

    pub(super) fn shrink_stacked(args: &ShrinkStacked<'_, Cpu>) -> Self {
        let bank = &args.stacked.bank;
        Self {
            shape: format!("{} x {} -> {}", args.x.rows, args.x.cols, bank.rank),
            flops: product(args.x.rows, args.x.cols, bank.rank * bank.n_skills),
            bytes: size(args.x) + (4 * bank.a_len()) as f64,
            ..Self::default()
        }
    }

    pub(super) fn lora_backward(args: &LoraBackward<'_, Cpu>) -> Self {
        let (m, d_in) = (args.x.rows, args.x.cols);
        let mut work = Self::over([args.x]);
        let _ = write!(work.shape, "{m} x {d_in} ->");
        for LoraTerm { z, d_y, mixed_b } in args.terms {
            let (rank, d_out) = (z.cols, d_y.cols);
            let _ = write!(work.shape, " {rank} -> {d_out}");
            work.flops += product(m, rank, 2 * d_out + d_in);
            work.bytes += size(d_y) + 2.0 * size(mixed_b);
            work.bytes += (4 * args.segments.n_rows() * d_in * rank) as f64;
        }
        work
    }

    pub(super) fn mix(args: &Mix<'_, Cpu>) -> Self {
        let bank = &args.stacked.bank;
        let elements = (bank.d_in + bank.d_out) * bank.rank;
        Self {
            shape: format!("{} rows of {} skills", args.n_rows, bank.n_skills),
            flops: product(args.n_rows, elements, bank.n_skills),
            bytes: (4 * elements * (args.n_rows + bank.n_skills)) as f64,
            ..Self::default()
        }
    }

    pub(super) fn unmix(args: &Unmix<'_, Cpu>) -> Self {
        let bank = &args.stacked.bank;
        let elements = (bank.d_in + bank.d_out) * bank.rank;
        let pairs = size(args.d_a) + size(args.d_b);
        let n_rows = args.d_a.rows / bank.d_in.max(1);
        Self {
            shape: format!("{n_rows} rows of {} skills", bank.n_skills),
            flops: 2.0 * product(n_rows, elements, bank.n_skills),
            bytes: pairs + (3 * 4 * elements * bank.n_skills) as f64,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::Dtype,
        kernels::{Backend, Precision},
    };

    #[test]
    fn a_profile_counts_what_ran_since_its_start() {
        let cpu = Cpu::new(Dtype::F32, 1).expect("a backend");
        let x = cpu.zeros(3, 5, Precision::Activation);
        let weight = Frozen::from_f32(&[1.0; 35], 7, 5, Dtype::Bf16);
        let run = || {
            let projections = &[Projection::plain(&weight)];
            let order = Order::Panel;
            cpu.linear(Linear { x: &x, projections, order, output: Precision::Activation })
        };
        run();
        cpu.profile().start();
        run();
        run();
        let entries = cpu.profile().finish();
        run();
        assert_eq!(entries.len(), 1, "{entries:?}");
        let Entry { operation, shape, calls, seconds, flops, bytes, .. } = &entries[0];
        assert_eq!((*operation, shape.as_str(), *calls), ("linear", "3 x 5 -> 7", 2));
        assert!(*seconds > 0.0);
        assert_eq!((*flops, *bytes), (2.0 * 210.0, 2.0 * (4 * 15 + 2 * 35 + 4 * 21) as f64));
        assert!(cpu.profile().finish().is_empty());
    }
}
