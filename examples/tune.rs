#![allow(unsafe_code)]
unsafe extern "C" {
    fn clock_gettime(c: i32, t: *mut [i64; 2]) -> i32;
}
fn now() -> f64 {
    let mut t = [0i64; 2];
    unsafe {
        clock_gettime(3, &mut t);
    }
    t[0] as f64 + t[1] as f64 * 1e-9
}
use polytape::{
    dtype::Dtype,
    kernels::{
        cpu::{Cpu, isa::*},
        ops::*,
        *,
    },
    tensor::Frozen,
};

struct Peak;
impl SimdOp for Peak {
    type Output = f64;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f64 {
        let mut acc = [s.splat(1.0); 6];
        let a = s.splat(std::hint::black_box(1.0));
        let b = s.splat(std::hint::black_box(1e-9));
        let n = 5_000_000u64;
        let t = now();
        for _ in 0..n {
            for v in &mut acc {
                *v = s.fma(*v, a, b);
            }
        }
        let dt = (now() - t);
        let mut sum = 0.0;
        for v in acc {
            sum += s.sum(v);
        }
        std::hint::black_box(sum);
        n as f64 * 6.0 * 16.0 * 2.0 / dt / 1e9
    }
}
fn best(n: usize, mut f: impl FnMut()) -> f64 {
    f();
    (0..n)
        .map(|_| {
            let t = now();
            f();
            (now() - t)
        })
        .fold(f64::MAX, f64::min)
}
fn main() {
    let which = std::env::args().nth(1).unwrap_or("gemm".into());
    let isa = Isa::detect().unwrap();
    let threads = std::env::args().nth(2).map_or(1, |t| t.parse().unwrap());
    for dt in [Dtype::F32, Dtype::Bf16] {
        let cpu = Cpu::new(dt, threads).unwrap();
        let vals =
            |n: usize| (0..n).map(|i| ((i * 7919) % 1000) as f64 / 500.0 - 1.0).collect::<Vec<_>>();
        let act = |r: usize, c: usize| cpu.upload(&vals(r * c), r, c, Precision::Activation);
        let full = |r: usize, c: usize| cpu.upload(&vals(r * c), r, c, Precision::Full);
        let w = |r: usize, c: usize| {
            Frozen::from_f32(&vals(r * c).iter().map(|&v| v as f32).collect::<Vec<_>>(), r, c, dt)
        };
        cpu.scope(|| {
            let peak = || isa.run(Peak);
            let report = |name: &str, flop: f64, bytes: f64, p: f64, t: f64| {
                println!(
                    "{dt} {name:40} {:8.3} ms {:7.1} GFLOP/s {:5.1}% of {p:.1}  {:.1} GB/s",
                    t * 1e3,
                    flop / t / 1e9,
                    flop / t / 1e9 / p * 100.0,
                    bytes / t / 1e9
                )
            };
            if which == "gemm" {
                for (m, k, n) in [
                    (1152, 768, 768),
                    (1152, 768, 2048),
                    (1152, 2048, 768),
                    (1152, 2048, 2048),
                    (1152, 512, 512),
                    (128, 768, 768),
                    (32, 768, 768),
                ] {
                    let (x, wt) = (act(m, k), w(n, k));
                    let pr = [Projection::plain(&wt)];
                    let p = peak();
                    let t = best(5, || {
                        cpu.linear(Linear {
                            x: &x,
                            projections: &pr,
                            order: Order::Panel,
                            output: Precision::Activation,
                        });
                    });
                    report(&format!("linear {m}x{k}x{n}"), 2.0 * (m * k * n) as f64, 0.0, p, t);
                    let dy = act(m, n);
                    let terms = [LinearBackwardTerm { d_y: &dy, weight: &wt, lora: None }];
                    let t = best(5, || {
                        cpu.linear_backward(LinearBackward { terms: &terms, d_residual: None });
                    });
                    report(&format!("backward {m}x{k}x{n}"), 2.0 * (m * k * n) as f64, 0.0, p, t);
                }
            }
            if which == "lora" {
                let (m, k, n) = (1152, 768, 768);
                let p = peak();
                let seg = Segments::new(&[144; 8], &[0, 1, 2, 3, 4, 5, 6, 7], 8);
                let x = act(m, k);
                let wts: Vec<_> = (0..2).map(|_| w(n, k)).collect();
                let a: Vec<_> = (0..2).map(|_| full(8 * k, 8)).collect();
                let b: Vec<_> = (0..2).map(|_| full(8 * 8, n)).collect();
                let aa: Vec<_> = a.iter().collect();
                let z = cpu.shrink(Shrink {
                    x: &x,
                    mixed_a: &aa,
                    segments: &seg,
                    scale: 0.125,
                    order: Order::Panel,
                });
                let t = best(9, || {
                    cpu.shrink(Shrink {
                        x: &x,
                        mixed_a: &aa,
                        segments: &seg,
                        scale: 0.125,
                        order: Order::Panel,
                    });
                });
                report("shrink 2 siblings", 2.0 * (m * k * 16) as f64, 0.0, p, t);
                let plain: Vec<_> = wts.iter().map(Projection::plain).collect();
                let t = best(5, || {
                    cpu.linear(Linear {
                        x: &x,
                        projections: &plain,
                        order: Order::Panel,
                        output: Precision::Activation,
                    });
                });
                report("2 linears plain", 4.0 * (m * k * n) as f64, 0.0, p, t);
                let tokens: std::sync::Arc<[TokenKey]> = (0..m as u32)
                    .map(|i| TokenKey { example: i / 144, position: i % 144 })
                    .collect();
                let drop = Dropout {
                    p: 0.1,
                    key: Key::new(1, polytape::kernels::philox::Purpose::Dropout, 0),
                    site: 3,
                    tokens,
                };
                let res = act(m, n);
                let lora: Vec<_> = wts
                    .iter()
                    .enumerate()
                    .map(|(i, w)| Projection {
                        lora: Some(Expand {
                            z: &z[i],
                            segments: &seg,
                            rhs: ExpandRhs::Mixed(&b[i]),
                        }),
                        ..Projection::plain(w)
                    })
                    .collect();
                let t = best(5, || {
                    cpu.linear(Linear {
                        x: &x,
                        projections: &lora,
                        order: Order::Panel,
                        output: Precision::Activation,
                    });
                });
                report("2 linears lora", 4.0 * (m * k * n) as f64, 0.0, p, t);
                let full_: Vec<_> = wts
                    .iter()
                    .enumerate()
                    .map(|(i, w)| Projection {
                        lora: Some(Expand {
                            z: &z[i],
                            segments: &seg,
                            rhs: ExpandRhs::Mixed(&b[i]),
                        }),
                        dropout: Some(&drop),
                        residual: Some(&res),
                        ..Projection::plain(w)
                    })
                    .collect();
                let t = best(5, || {
                    cpu.linear(Linear {
                        x: &x,
                        projections: &full_,
                        order: Order::Panel,
                        output: Precision::Activation,
                    });
                });
                report("2 linears lora dropout residual", 4.0 * (m * k * n) as f64, 0.0, p, t);
                let terms: Vec<_> =
                    (0..2).map(|i| LoraTerm { z: &z[i], d_y: &res, mixed_b: &b[i] }).collect();
                let t = best(9, || {
                    cpu.lora_backward(LoraBackward {
                        x: &x,
                        terms: &terms,
                        segments: &seg,
                        scale: 0.125,
                    });
                });
                report(
                    "lora_backward 2 siblings",
                    2.0 * (m * 8 * 2 * (n + n + k)) as f64,
                    0.0,
                    p,
                    t,
                );
            }
            if which == "dot" {
                for m in [1, 2, 4, 8, 16] {
                    let (k, n) = (768, 2048);
                    let ws: Vec<_> = (0..12).map(|_| w(n, k)).collect();
                    let x = act(m, k);
                    let pr: Vec<_> = ws.iter().map(Projection::plain).collect();
                    let p = peak();
                    let t = best(9, || {
                        cpu.linear(Linear {
                            x: &x,
                            projections: &pr,
                            order: Order::Dot,
                            output: Precision::Activation,
                        });
                    });
                    report(
                        &format!("dot {m}x{k}x{n} x12"),
                        24.0 * (m * k * n) as f64,
                        (12 * k * n * dt.size_bytes()) as f64,
                        p,
                        t,
                    );
                    let t = best(9, || {
                        cpu.linear(Linear {
                            x: &x,
                            projections: &pr,
                            order: Order::Panel,
                            output: Precision::Activation,
                        });
                    });
                    report(
                        &format!("panel {m}x{k}x{n} x12"),
                        24.0 * (m * k * n) as f64,
                        (12 * k * n * dt.size_bytes()) as f64,
                        p,
                        t,
                    );
                }
            }
            if which == "head" {
                let (m, k, v) = (256, 768, 32128);
                let x = act(m, k);
                let wt = w(v, k);
                let labels: Vec<u32> = (0..m as u32).map(|i| i * 7).collect();
                let p = peak();
                let t = best(3, || {
                    cpu.head_loss(HeadLoss {
                        x: &x,
                        weight: &wt,
                        labels: &labels,
                        scale: 1.0,
                        d_nll: Some(0.1),
                    });
                });
                report("head_loss", 4.0 * (m * k * v) as f64, 0.0, p, t);
                let t = best(3, || {
                    cpu.head_loss(HeadLoss {
                        x: &x,
                        weight: &wt,
                        labels: &labels,
                        scale: 1.0,
                        d_nll: None,
                    });
                });
                report("head_loss no grad", 2.0 * (m * k * v) as f64, 0.0, p, t);
            }
        });
    }
}
