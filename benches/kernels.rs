//! The cases of `polytape bench gemm|routed|attention` under Criterion: `cargo bench --bench kernels`, with
//! a filter such as `-- gemm/flan-t5-base`. Each is checked against the f64 oracle before it is timed.
//!
//! The type of the computation is bf16, the threads are all; `POLYTAPE_ISA` forces an instruction set.

#![allow(missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polytape::{
    Dtype,
    bench::{
        AttentionCase, AttentionShape, Direction, GemmCase, GemmShape, RoutedCase, RoutedShape,
    },
    kernels::cpu::Cpu,
};

const WEIGHTS: Dtype = Dtype::Bf16;

/// Name, output and input features.
const LINEARS: [(&str, usize, usize); 5] = [
    ("flan-t5-base/q", 768, 768),
    ("flan-t5-base/wi", 2048, 768),
    ("flan-t5-base/wo", 768, 2048),
    ("llama-1b/q", 2048, 2048),
    ("llama-1b/up", 8192, 2048),
];

fn cpu() -> Cpu {
    Cpu::new(Dtype::Bf16, 0).expect("POLYTAPE_ISA names what this CPU has")
}

fn gemm(criterion: &mut Criterion) {
    let cpu = cpu();
    let mut group = criterion.benchmark_group("gemm");
    for (name, d_out, d_in) in LINEARS {
        for (rows, direction) in [
            (1, Direction::Forward),
            (8, Direction::Forward),
            (1024, Direction::Forward),
            (1024, Direction::Backward),
        ] {
            let shape = GemmShape { rows, d_out, d_in, direction, weights: WEIGHTS };
            let mut case = GemmCase::new(&cpu, shape);
            case.check().expect("right before it is fast");
            group.throughput(Throughput::Elements(shape.flops() as u64));
            group.bench_function(format!("{name}/{direction:?}/{rows}"), |bencher| {
                bencher.iter(|| case.run());
            });
        }
    }
    group.finish();
}

fn routed(criterion: &mut Criterion) {
    let cpu = cpu();
    let mut group = criterion.benchmark_group("routed");
    for (name, d_out, d_in) in LINEARS {
        let shape = RoutedShape {
            rows: 1024,
            d_out,
            d_in,
            r: 8,
            n_skills: 4,
            n_splits: 4,
            n_tasks: 8,
            weights: WEIGHTS,
        };
        let mut case = RoutedCase::new(&cpu, shape);
        case.check().expect("right before it is fast");
        group.bench_function(format!("{name}/step-frozen"), |b| b.iter(|| case.run_frozen_step()));
        group.bench_function(format!("{name}/step-routed"), |b| b.iter(|| case.run_routed_step()));
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let cpu = cpu();
    let mut group = criterion.benchmark_group("attention");
    for (name, n_heads, n_kv_heads, causal) in
        [("flan-t5-base", 12, 12, false), ("llama-1b", 32, 8, true)]
    {
        for n_queries in [1, 512] {
            let shape = AttentionShape {
                batch: 4,
                n_queries,
                n_keys: 512,
                n_heads,
                n_kv_heads,
                head_dim: 64,
                causal,
            };
            let case = AttentionCase::new(&cpu, shape);
            case.check().expect("right before it is fast");
            group.throughput(Throughput::Elements(shape.flops() as u64));
            group.bench_function(format!("{name}/{n_queries}"), |b| b.iter(|| case.run()));
            group.bench_function(format!("{name}/{n_queries}/backward"), |b| {
                b.iter(|| case.run_backward());
            });
        }
    }
    group.finish();
}

criterion_group!(kernels, gemm, routed, attention);
criterion_main!(kernels);
