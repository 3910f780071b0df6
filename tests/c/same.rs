//! The programs in `examples/c` print what Rust computes, to the last bit.

use std::{collections::HashMap, fs, path::PathBuf};

use polytape::{
    Dtype,
    formats::poly_config::PolyConfig,
    generate::{Engine, GenerateOptions},
    kernels::{Backend, Precision, cpu::Cpu, ops::*},
    model::{Adapter, Example, Mixing, Model, Options},
    tensor::{Frozen, Tensor},
    train::{TrainConfig, Trainer},
};

use crate::{printed, program, root};

fn temporary(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("polytape-c-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn a_c_program_trains_evaluates_and_generates_as_rust_does() {
    let dir = temporary("train");
    let Some(program) = program("train", &dir) else { return };
    let base = root().join("tests/data/parity/tiny/base");
    let printed = printed(&program, &[&base, &dir.join("adapter")], false);

    let options = Options { dtype: Some(Dtype::F32), ..Options::default() };
    let model = Model::open(&base, &options).unwrap();
    let example = |input: &[u32], labels: &[u32], task| Example {
        input: input.to_vec(),
        labels: labels.to_vec(),
        task,
        mixing: None,
    };
    let examples = [
        example(&[5, 6, 7, 1], &[9, 8, 1], 0),
        example(&[9, 4, 1], &[3, 1], 1),
        example(&[12, 13, 14, 1], &[6, 5, 1], 1),
        example(&[8, 1], &[10, 4, 1], 0),
    ];
    let examples: Vec<_> = examples.iter().collect();
    let config = PolyConfig { n_tasks: 2, n_skills: 3, n_splits: 2, r: 4, ..PolyConfig::default() };
    let adapter = Adapter::new(&model, &config, 42).unwrap();
    let train =
        TrainConfig { learning_rate: 1e-2, max_steps: 5, batch_size: 2, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&model, adapter, train).unwrap();
    let mut expected = Vec::new();
    for step in 1..=5 {
        let report = trainer.step(&examples).unwrap();
        expected.push((format!("step {step}"), vec![report.loss, report.grad_norm]));
    }
    let adapter = trainer.into_adapter();
    // What it saved is what Rust trained.
    let saved = Adapter::open(&model, dir.join("adapter")).unwrap();
    let params = |adapter: &Adapter<Cpu>| model.backend().download(adapter.params());
    assert_eq!(params(&saved), params(&adapter));

    let engine = Engine::new(&model, Some(&adapter), [0, 1], 4);
    for (i, nll) in engine.nll(&examples).into_iter().flatten().enumerate() {
        expected.push((format!("nll {i}"), vec![nll]));
    }
    let logits: Vec<f64> = examples.iter().flat_map(|example| engine.logits(example)).collect();
    assert_eq!(logits.len(), 11 * model.vocab_size());
    expected.push(("logits".into(), vec![logits[0], logits[logits.len() - 1]]));
    let mut tokens = String::new();
    let mut n_tokens = 0;
    let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
    engine.generate(&examples, &options, |example, id| {
        tokens += &format!("token {example} {id}\n");
        n_tokens += 1;
    });
    let config = adapter.config();
    let mut weights = vec![0.0; config.n_splits * config.n_skills];
    weights.iter_mut().step_by(config.n_skills).for_each(|weight| *weight = 1.0);
    let first = Example { mixing: Some(Mixing::Weights(weights)), ..examples[0].clone() };
    let engine = Engine::for_examples(&model, Some(&adapter), [&first], 2).unwrap();
    expected.push(("one skill".into(), vec![engine.nll(&[&first])[0][0]]));

    let (token_lines, lines): (Vec<&str>, Vec<&str>) =
        printed.lines().partition(|line| line.starts_with("token "));
    assert_eq!(token_lines.join("\n") + "\n", tokens);
    let mut lines: Vec<_> = lines.into_iter().filter(|line| !line.starts_with("tokens")).collect();
    assert!(printed.contains(&format!("\ntokens {n_tokens}\n")), "{printed}");
    assert_eq!(lines.len(), expected.len(), "{printed}");
    for ((name, values), line) in expected.into_iter().zip(lines.drain(..)) {
        let found = line.strip_prefix(&name).unwrap_or_else(|| panic!("{line}, not {name}"));
        let found: Vec<f64> = found.split_whitespace().map(|v| v.parse().unwrap()).collect();
        // Logits are floats, which nine digits are exactly.
        let exact = |v: f64| if name == "logits" { f64::from(v as f32) } else { v };
        let [found, values] =
            [found, values].map(|all| all.into_iter().map(exact).collect::<Vec<_>>());
        assert_eq!(found, values, "{name}");
    }
    fs::remove_dir_all(dir).unwrap();
}

const SIZES: [usize; 6] = [24, 20, 4, 2, 3, 2]; // d_in, d_out, rank, splits, skills, tasks

/// `fill` of the C program.
fn fill(n: usize, mut seed: u32) -> Vec<f64> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(seed >> 24) - 128.0) / 64.0
    };
    (0..n).map(|_| next()).collect()
}

/// The lines of the C program, by the same operations.
fn routed_linear<B: Backend>(backend: &B) -> Vec<(&'static str, Vec<f64>)> {
    let [d_in, d_out, rank, n_splits, n_skills, n_tasks] = SIZES;
    let (width, n_tokens) = (n_splits * n_skills, 7);
    let (a_len, b_len) = (n_skills * d_in * rank, n_skills * rank * d_out);
    let n_params = a_len + b_len + n_tasks * width;
    let up = |values: &[f64], rows, cols| backend.upload(values, rows, cols, Precision::Full);
    let params = up(&fill(n_params, 1), 1, n_params);
    let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<_>>();
    let frozen = |values: Vec<f64>, rows, cols| {
        backend.weight(&Frozen::from_f32(&narrow(values), rows, cols, Dtype::F32))
    };
    let weight = frozen(fill(d_out * d_in, 2), d_out, d_in);
    let bias = frozen(fill(d_out, 3), 1, d_out);
    let none = frozen(vec![0.0; d_out * d_in], d_out, d_in);
    let activation = |values, cols| backend.upload(values, n_tokens, cols, Precision::Activation);
    let (x, d_y) = (
        activation(&fill(n_tokens * d_in, 4), d_in),
        activation(&fill(n_tokens * d_out, 5), d_out),
    );

    let logits = [a_len + b_len];
    let route = Route {
        params: &params,
        logits: &logits,
        tasks: &[0, 1],
        n_splits,
        n_skills,
        noise: Noise::Off,
        weighting: Weighting::default(),
    };
    let routing = backend.route(&route);
    let segments = Segments::new(&[3, 2, 2], &[0, 1, 0], n_tasks);
    let bank =
        Bank { linear: 0, a_start: 0, b_start: a_len, n_splits, n_skills, d_in, d_out, rank };
    let stacked = Stacked { bank, params: &params, weights: &routing.weights };
    let (scale, segments, order) = (1.0 / rank as f32, &segments, Order::Panel);
    let pair = backend.mix(Mix { stacked, n_rows: n_tasks });
    // 2 rows of 3 skills are cheaper to mix than 7 tokens of 3 to stack.
    let z = backend.shrink(Shrink { x: &x, mixed_a: &[&pair.a], segments, scale, order }).remove(0);
    let forward = |weight: &B::Weight, bias, residual: Option<&Tensor<B>>| {
        let lora = Some(Expand { z: &z, segments, rhs: ExpandRhs::Mixed(&pair.b) });
        let projection = Projection { bias, lora, residual, ..Projection::plain(weight) };
        let output = Precision::Activation;
        backend.linear(Linear { x: &x, projections: &[projection], order, output }).remove(0)
    };
    let y = forward(&weight, Some(&bias), None);
    let y_again = forward(&none, None, Some(&y));

    let mut grads = backend.zeros(1, n_params, Precision::Full);
    let mut d_weights = backend.zeros(n_tasks, width, Precision::Full);
    let terms = &[LoraTerm { z: &z, d_y: &d_y, mixed_b: &pair.b }];
    let found = backend.lora_backward(LoraBackward { x: &x, terms, segments, scale }).remove(0);
    let (grads_to, d_weights_to) = (&mut grads, &mut d_weights);
    backend.unmix(Unmix {
        stacked,
        d_a: &found.d_a,
        d_b: &found.d_b,
        grads: grads_to,
        d_weights: d_weights_to,
    });
    let backward = |weight: &B::Weight, d_residual| {
        let lora = Some((&found.d_z, &pair.a, segments));
        let terms = &[LinearBackwardTerm { d_y: &d_y, weight, lora }];
        backend.linear_backward(LinearBackward { terms, d_residual })
    };
    let d_x = backward(&weight, None);
    let d_x_again = backward(&none, Some(backend.copy(&d_x)));
    let (routing_from, d_weights) = (&routing, &d_weights);
    backend.route_backward(RouteBackward {
        forward: &route,
        routing: routing_from,
        d_weights,
        grads: &mut grads,
    });
    let values = |tensor: &Tensor<B>| backend.download(tensor);
    vec![
        ("mixing", values(&routing.weights)),
        ("y", values(&y)),
        ("z", values(&z)),
        ("grads", values(&grads)),
        ("d_x", values(&d_x)),
        ("y", values(&y_again)),
        ("d_x", values(&d_x_again)),
    ]
}

#[test]
fn a_c_program_uses_the_kernels_as_rust_does() {
    let dir = temporary("kernels");
    let Some(program) = program("routed_linear", &dir) else { return };
    let printed = printed(&program, &[], true);
    let lines: Vec<(&str, Vec<f64>)> = printed
        .lines()
        .map(|line| {
            let (name, values) = line.split_once(' ').unwrap();
            // %.9g is a float exactly; as a double it is not.
            let parse = |value: &str| f64::from(value.parse::<f32>().unwrap());
            (name, values.split(' ').map(parse).collect())
        })
        .collect();
    let cpu = Cpu::new(Dtype::F32, 0).unwrap();
    let rust = routed_linear(&cpu);
    assert_eq!(lines.len(), rust.len());
    for ((name, found), (expected_name, expected)) in lines.iter().zip(&rust) {
        assert_eq!((name, found), (expected_name, expected));
    }
    // And it is right: the oracle, whose kernels' bounds tests/kernels derives, within rounding.
    let sizes: HashMap<&str, f64> = [("mixing", 1.0), ("z", 64.0), ("y", 512.0)].into();
    for ((name, found), (_, expected)) in
        rust.iter().zip(routed_linear(&polytape::kernels::oracle::Oracle))
    {
        let bound = 1e-6 * sizes.get(name).copied().unwrap_or(4096.0);
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= bound, "{name}: {found}, not {expected}");
        }
    }
    fs::remove_dir_all(dir).unwrap();
}
