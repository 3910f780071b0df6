//! What calling the routed LoRA from C costs over calling it from Rust: `cargo bench --bench capi`.
//!
//! The same problem both ways, interleaved, after checking that both give the same bits: the same operands and
//! results in the same memory, as where a matrix lies makes some percent. It prints medians and their ratio: `tokens=1024 d=768 ... rust 21.3 ms c 21.4 ms ratio 1.004`.

#![allow(missing_docs, unsafe_code)]

use std::{
    ptr::{null, null_mut},
    sync::Arc,
    time::Instant,
};

use polytape::{
    Dtype,
    capi::*,
    kernels::{Backend, Precision, cpu::Cpu, ops::*, planner::Mode},
    tensor::{Bytes, BytesMut, Frozen},
};

const RANK: usize = 8;
const N_SKILLS: usize = 4;
const N_SPLITS: usize = 4;
const N_ROWS: usize = 8;
const WIDTH: usize = N_SPLITS * N_SKILLS;

/// Values for the whole process at a multiple of 64 bytes, read by both sides.
#[derive(Clone, Copy)]
struct Operand(&'static [f32]);

impl Operand {
    fn new(values: &[f32]) -> Self {
        let room = vec![0.0; values.len() + 16].leak();
        let start = room.as_ptr().align_offset(64);
        let (own, _) = room[start..].split_at_mut(values.len());
        own.copy_from_slice(values);
        Self(own)
    }
}

impl Bytes for Operand {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self.0)
    }
}

impl BytesMut for Operand {
    fn bytes_mut(&mut self) -> &mut [u8] {
        unreachable!("operands are read")
    }
}

/// Where both sides leave their results, in turns.
#[derive(Clone, Copy)]
struct Output(*mut f32, usize);

// SAFETY: Whoever has the only copy in use reads or writes it; the sides take turns.
unsafe impl Send for Output {}
// SAFETY: As above.
unsafe impl Sync for Output {}

impl Output {
    fn new(n: usize) -> Self {
        let room = vec![f32::NAN; n + 16].leak();
        let start = room.as_ptr().align_offset(64);
        Self(room[start..].as_mut_ptr(), n)
    }
}

impl Bytes for Output {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `new` leaked so many values there.
        bytemuck::cast_slice(unsafe { std::slice::from_raw_parts(self.0, self.1) })
    }
}

impl BytesMut for Output {
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: As above.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.0, self.1) })
    }
}

/// Times `rust` and `c` in turn; the median of each, in milliseconds.
fn interleaved(mut rust: impl FnMut(), mut c: impl FnMut()) -> [f64; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..41 {
        let both: [&mut dyn FnMut(); 2] = [&mut rust, &mut c];
        for (work, times) in both.into_iter().zip(&mut times) {
            let start = Instant::now();
            work();
            if round >= 5 {
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

fn main() {
    for (tokens_a_row, d) in [(1, 768), (16, 768), (128, 768), (128, 2048)] {
        let n_tokens = N_ROWS * tokens_a_row;
        let value = |i: usize| ((i * 2_654_435_761) % 1024) as f32 / 512.0 - 1.0;
        let values = |n: usize| (0..n).map(value).collect::<Vec<_>>();
        let bank = Bank {
            linear: 0,
            a_start: 0,
            b_start: N_SKILLS * d * RANK,
            n_splits: N_SPLITS,
            n_skills: N_SKILLS,
            d_in: d,
            d_out: d,
            rank: RANK,
        };
        let (params, weight, x) = (values(bank.b().end), values(d * d), values(n_tokens * d));
        let mixing = vec![1.0 / N_SKILLS as f32; N_ROWS * WIDTH];
        let (lens, rows) = (vec![tokens_a_row; N_ROWS], (0..N_ROWS).collect::<Vec<_>>());

        let [params, mixing, x, weight] =
            [params, mixing, x, weight].map(|values| Operand::new(&values));

        // Rust, as the tape calls the operations: within the backend's scope.
        let cpu = Cpu::new(Dtype::F32, 0).unwrap_or_else(|error| panic!("{error}"));
        let lend = |operand: Operand, rows, cols| {
            cpu.lend(operand, rows, cols, Precision::Full).unwrap_or_else(|error| panic!("{error}"))
        };
        let tensors =
            [lend(params, 1, params.0.len()), lend(mixing, N_ROWS, WIDTH), lend(x, n_tokens, d)];
        let frozen = Frozen::new(Arc::new(weight), 0..4 * d * d, Dtype::F32, d, d);
        let output = Output::new(n_tokens * d);
        let rust = || {
            let mut y = [cpu
                .lend(output, n_tokens, d, Precision::Activation)
                .unwrap_or_else(|error| panic!("{error}"))];
            cpu.scope(|| {
                let [params, weights, x] = &tensors;
                let segments = &Segments::new(&lens, &rows, N_ROWS);
                let stacked = Stacked { bank, params, weights };
                let (scale, order, output) =
                    (1.0 / RANK as f32, Order::Panel, Precision::Activation);
                let mixed = Mode::for_tokens(n_tokens, N_ROWS, N_SKILLS) == Mode::Mixed;
                let pair = mixed.then(|| cpu.mix(Mix { stacked, n_rows: N_ROWS }));
                let z = match &pair {
                    Some(pair) => {
                        let mixed_a = &[&pair.a];
                        cpu.shrink(Shrink { x, mixed_a, segments, scale, order }).remove(0)
                    }
                    None => cpu.shrink_stacked(ShrinkStacked { x, stacked, segments, scale }),
                };
                let rhs =
                    pair.as_ref().map_or(ExpandRhs::Stacked(stacked), |p| ExpandRhs::Mixed(&p.b));
                let lora = Some(Expand { z: &z, segments, rhs });
                let projection = Projection { lora, ..Projection::plain(&frozen) };
                let linear = Linear { x, projections: &[projection], order, output };
                cpu.linear_into(linear, false, &mut y);
            });
        };

        // C.
        let mut kernels = null_mut();
        // SAFETY: null options are the defaults.
        assert_eq!(unsafe { polytape_kernels_new(null(), &mut kernels) }, POLYTAPE_OK);
        let linear = polytape_routed_linear {
            params: params.0.as_ptr(),
            n_params: params.0.len(),
            b_start: bank.b_start,
            d_in: d,
            d_out: d,
            rank: RANK,
            n_splits: N_SPLITS,
            n_skills: N_SKILLS,
            mixing_weights: mixing.0.as_ptr(),
            n_rows: N_ROWS,
            lens: lens.as_ptr(),
            rows: rows.as_ptr(),
            n_sequences: N_ROWS,
            x: x.0.as_ptr().cast(),
            weight: weight.0.as_ptr().cast(),
            ..Default::default()
        };
        let mut z = vec![f32::NAN; n_tokens * RANK];
        let mut c = || {
            let (y, z) = (output.0.cast(), z.as_mut_ptr());
            // SAFETY: the vectors have what the sizes say.
            let status = unsafe { polytape_routed_linear_forward(kernels, &linear, 0, y, z) };
            assert_eq!(status, POLYTAPE_OK);
        };

        c();
        let from_c = output.bytes().to_vec();
        { output }.bytes_mut().fill(0xFF);
        rust();
        assert!(output.bytes() == from_c, "the same bits");
        let times = interleaved(rust, &mut c);
        let [rust, c] = times;
        println!(
            "tokens={n_tokens} d={d} rank={RANK} skills={N_SKILLS} splits={N_SPLITS} {} {} threads   rust {rust:.3} ms   c {c:.3} ms   ratio {:.4}",
            cpu.isa().name(),
            cpu.n_threads(),
            c / rust
        );
        // SAFETY: a handle from above.
        unsafe { polytape_kernels_free(kernels) };
    }
}
