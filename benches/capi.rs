//! What calling the routed LoRA from C costs over calling it from Rust: `cargo bench --bench capi`.
//!
//! The same problem both ways, interleaved, after checking that both give the same bits. It prints
//! medians and their ratio: `tokens=1024 d=768 ... rust 21.3 ms c 21.4 ms ratio 1.004`.

#![allow(missing_docs, unsafe_code)]

use std::{
    ptr::{null, null_mut},
    time::Instant,
};

use polytape::{
    Dtype,
    capi::*,
    kernels::{Backend, Precision, cpu::Cpu, ops::*, planner::Mode},
    tensor::{Frozen, Tensor},
};

const RANK: usize = 8;
const N_SKILLS: usize = 4;
const N_SPLITS: usize = 4;
const N_ROWS: usize = 8;
const WIDTH: usize = N_SPLITS * N_SKILLS;

/// Values at a multiple of 64 bytes, where Rust's are: elsewhere loads cross cache lines, whoever calls.
struct Aligned {
    values: Vec<f32>,
    start: usize,
}

impl Aligned {
    fn new(values: &[f32]) -> Self {
        let mut room = vec![0.0; values.len() + 16];
        let start = room.as_ptr().align_offset(64);
        room[start..][..values.len()].copy_from_slice(values);
        Self { values: room, start }
    }

    fn as_ptr(&self) -> *const f32 {
        self.values[self.start..].as_ptr()
    }

    fn as_mut_ptr(&mut self) -> *mut f32 {
        self.values[self.start..].as_mut_ptr()
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

        // Rust, as the tape calls the operations: within the backend's scope.
        let cpu = match Cpu::new(Dtype::F32, 0) {
            Ok(cpu) => cpu,
            Err(error) => panic!("{error}"),
        };
        let upload = |values: &[f32], rows, cols| {
            let values: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            cpu.upload(&values, rows, cols, Precision::Full)
        };
        let tensors = [
            upload(&params, 1, params.len()),
            upload(&mixing, N_ROWS, WIDTH),
            upload(&x, n_tokens, d),
        ];
        let frozen = Frozen::from_f32(&weight, d, d, Dtype::F32);
        let rust = || -> Tensor<Cpu> {
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
                cpu.linear(Linear { x, projections: &[projection], order, output }).remove(0)
            })
        };

        // C.
        let mut kernels = null_mut();
        // SAFETY: null options are the defaults.
        assert_eq!(unsafe { polytape_kernels_new(null(), &mut kernels) }, POLYTAPE_OK);
        let [own_params, own_mixing, own_x, own_weight] =
            [&params, &mixing, &x, &weight].map(|values| Aligned::new(values));
        let linear = polytape_routed_linear {
            params: own_params.as_ptr(),
            n_params: params.len(),
            b_start: bank.b_start,
            d_in: d,
            d_out: d,
            rank: RANK,
            n_splits: N_SPLITS,
            n_skills: N_SKILLS,
            mixing_weights: own_mixing.as_ptr(),
            n_rows: N_ROWS,
            lens: lens.as_ptr(),
            rows: rows.as_ptr(),
            n_sequences: N_ROWS,
            x: own_x.as_ptr().cast(),
            weight: own_weight.as_ptr().cast(),
            ..Default::default()
        };
        let nan = |n: usize| Aligned::new(&vec![f32::NAN; n]);
        let (mut y, mut z) = (nan(n_tokens * d), nan(n_tokens * RANK));
        let mut c = || {
            let (y, z) = (y.as_mut_ptr().cast(), z.as_mut_ptr());
            // SAFETY: the vectors have what the sizes say.
            let status = unsafe { polytape_routed_linear_forward(kernels, &linear, 0, y, z) };
            assert_eq!(status, POLYTAPE_OK);
        };

        c();
        let times = interleaved(|| drop(rust()), &mut c);
        let expected = cpu.download(&rust());
        let y = &y.values[y.start..];
        assert!(y.iter().zip(&expected).all(|(&y, &e)| f64::from(y) == e), "the same bits");
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
