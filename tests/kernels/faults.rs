//! The harness itself: deliberate faults must be caught by the comparison that kernels pass.
//!
//! A faulty backend is the oracle with an altered argument or result, rounded to f32.

use polytape::{
    dtype::Dtype,
    kernels::{ops, ops::Activation, oracle::Oracle},
    tensor::Frozen,
};

use crate::{
    attention::attention,
    common::{Batch, Case, Class, Gen, Inputs, Op, Output, answer, case, compare, round},
    dense::{adamw, dropout, gated, head_loss, linear, linear_backward, norm, norm_backward, rope},
    lora::{Noise, lora_backward, mix, route, shrink, shrink_stacked, unmix},
};

/// Asserts that a fault is caught wherever it changes anything: on small integers always, on real
/// numbers always in these cases (a product that is lost can be too small to see, but not in every
/// element of an output).
fn assert_caught<O: Op>(
    what: &str,
    make: impl Fn(&mut Gen, Class, Batch) -> Case<O> + Copy,
    fault: impl Fn(&mut Case<O>),
) {
    let mut n_seen = 0;
    for i in 0..40 {
        let seed = Gen::new(i).word() / 8 * 5 + i % 2; // Small integers, uniform.
        let (right, mut wrong) = (case(seed, make), case(seed, make));
        fault(&mut wrong);
        let (expected, tolerance) = answer(&right, &right.inputs);
        let found = wrong.op.run(&Oracle, &wrong.batch, &wrong.inputs.load(&Oracle));
        let as_f32 = |outputs: &[Output]| -> Vec<Output> {
            let round = |output: &Output| Output {
                values: output.values.iter().map(|&v| round(v, Dtype::F32)).collect(),
                dtype: Dtype::F32,
                ..output.clone()
            };
            outputs.iter().map(round).collect()
        };
        let (found, perfect) = (as_f32(&found), as_f32(&expected));
        if found.iter().zip(&perfect).all(|(found, perfect)| found.values == perfect.values) {
            continue; // It has no effect here.
        }
        n_seen += 1;
        let outcome = compare(right.class, &found, &expected, &tolerance);
        assert!(outcome.is_err(), "{what} is not caught: {:?}, seed {seed}", right.op);
    }
    assert!(n_seen >= 5, "{what} has an effect in {n_seen} cases only");
}

/// Sets the last column of an input to zero: a lost last product.
fn drop_last_column<O>(case: &mut Case<O>, which: usize) {
    let matrix = &mut case.inputs.tensors[which];
    let cols = matrix.cols;
    matrix.values.iter_mut().skip(cols - 1).step_by(cols).for_each(|value| *value = 0.0);
}

/// Sets the last row of an input to zero: a lost last token.
fn drop_last_row<O>(case: &mut Case<O>, which: usize) {
    let matrix = &mut case.inputs.tensors[which];
    let start = matrix.values.len().saturating_sub(matrix.cols);
    matrix.values[start..].fill(0.0);
}

fn negate<O>(case: &mut Case<O>, which: usize) {
    case.inputs.tensors[which].values.iter_mut().for_each(|value| *value = -*value);
}

/// Every routing row is the next one.
fn shift_rows<O>(case: &mut Case<O>) {
    let n_rows = case.batch.n_rows;
    case.batch.rows.iter_mut().for_each(|row| *row = (*row + 1) % n_rows);
}

/// Reads columns `[n_splits, n_skills]` as `[n_skills, n_splits]`.
fn swap_split_and_skill(inputs: &mut Inputs, which: usize, n_splits: usize, n_skills: usize) {
    for row in inputs.tensors[which].values.chunks_mut(n_splits * n_skills) {
        let columns = row.to_vec();
        for (i, value) in row.iter_mut().enumerate() {
            *value = columns[i % n_skills * n_splits + i / n_skills];
        }
    }
}

fn last_weight_row_is_the_first<O>(case: &mut Case<O>) {
    let weight = &case.inputs.weights[0];
    let (mut values, rows, cols) = (weight.to_f32(), weight.rows(), weight.cols());
    values.copy_within(0..cols, (rows - 1) * cols);
    case.inputs.weights[0] = Frozen::from_f32(&values, rows, cols, Dtype::F32);
}

#[test]
fn faults_of_linears_are_caught() {
    assert_caught("a lost product", linear, |case| drop_last_column(case, 0));
    assert_caught("a lost token", linear, |case| drop_last_row(case, 0));
    assert_caught("a wrong weight row", linear, last_weight_row_is_the_first);
    assert_caught("a wrong routing row", linear, shift_rows);
    assert_caught("a lost product", shrink, |case| drop_last_column(case, 0));
    assert_caught("a wrong routing row", shrink, shift_rows);
    assert_caught("a forgotten scale", shrink, |case| case.op.scale = 0.5);
    assert_caught("a wrong routing row", shrink_stacked, shift_rows);
    assert_caught("a lost product", linear_backward, |case| drop_last_column(case, 0));
    assert_caught("a wrong sign", linear_backward, |case| negate(case, 0));
    assert_caught("a lost token", lora_backward, |case| drop_last_row(case, 0));
    assert_caught("a lost product", lora_backward, |case| drop_last_column(case, 2));
    assert_caught("a wrong routing row", lora_backward, shift_rows);
}

#[test]
fn faults_of_mixing_and_routing_are_caught() {
    let swap = |inputs: &mut Inputs, bank: &ops::Bank| {
        swap_split_and_skill(inputs, 1, bank.n_splits, bank.n_skills);
    };
    assert_caught("swapped split and skill", mix, |case| swap(&mut case.inputs, &case.op.bank));
    assert_caught("another linear", mix, |case| case.op.bank.linear ^= 1);
    assert_caught("a shifted bank", mix, |case| case.op.bank.b_start -= 1);
    assert_caught("overwritten gradients", unmix, |case| {
        case.inputs.tensors[4].values.fill(0.0);
    });
    assert_caught("a lost product", unmix, |case| drop_last_column(case, 2));
    assert_caught("a draw for another skill", route, |case| {
        let op = &mut case.op;
        let (n_splits, n_skills) = (op.n_splits, op.n_skills);
        if let Noise::Given(draws) = &mut op.noise {
            draws.chunks_mut(n_splits * n_skills).for_each(|row| row.rotate_left(1));
        }
    });
    assert_caught("another example", route, |case| {
        if let Noise::Philox(examples) = &mut case.op.noise {
            examples.iter_mut().for_each(|example| *example ^= 1);
        }
    });
    assert_caught("no noise", route, |case| case.op.noise = Noise::Off);
    assert_caught("no rounding", route, |case| case.op.weighting.straight_through = false);
    assert_caught("no average correction", route, |case| {
        case.op.weighting.average_correction = false;
    });
}

#[test]
fn faults_of_attention_are_caught() {
    assert_caught("a lost key", attention, |case| {
        case.batch.keys.lens.iter_mut().for_each(|len| *len -= usize::from(*len > 1));
    });
    assert_caught("no mask", attention, |case| {
        (case.op.causal, case.op.window) = (false, None);
    });
    assert_caught("no window", attention, |case| case.op.window = None);
    assert_caught("a window too wide", attention, |case| {
        case.op.window = case.op.window.map(|window| window + 1);
    });
    assert_caught("a shifted bias", attention, |case| {
        case.op.bias = case.op.bias.map(|zero| zero - 1);
    });
    assert_caught("a lost product", attention, |case| drop_last_column(case, 0));
    assert_caught("no dropout", attention, |case| case.op.dropout = None);
    assert_caught("a shifted key", attention, |case| {
        case.batch.keys.starts.iter_mut().for_each(|start| *start = start.saturating_sub(1));
    });
}

#[test]
fn faults_of_pointwise_operations_are_caught() {
    assert_caught("a lost product", norm, |case| drop_last_column(case, 0));
    assert_caught("a turn the other way", rope, |case| case.op.inverse ^= true);
    assert_caught("the next position", rope, |case| {
        case.batch.token_keys.iter_mut().for_each(|key| key.position += 1);
    });
    assert_caught("no bias", norm, |case| case.op.bias = false);
    // Beside the mean's own rounding, half of the smallest epsilon is too little to see.
    assert_caught("another epsilon", norm, |case| {
        case.op.eps *= if case.op.centered { 16.0 } else { 0.5 };
    });
    assert_caught("a lost product", norm_backward, |case| drop_last_column(case, 1));
    assert_caught("a wrong sign", norm_backward, |case| negate(case, 1));
    assert_caught("the other gelu", gated, |case| {
        case.op.activation = match case.op.activation {
            Activation::Gelu => Activation::GeluNew,
            Activation::GeluNew => Activation::Gelu,
            other => other,
        };
    });
    assert_caught("another site", dropout, |case| case.op.site ^= 1);
    assert_caught("another rate", dropout, |case| case.op.p += 0.01);
    assert_caught("a label too far", head_loss, |case| {
        case.batch.ids.iter_mut().for_each(|id| *id = id.wrapping_add(1) & 0x7FFF_FFFF);
    });
    assert_caught("a wrong vocabulary row", head_loss, last_weight_row_is_the_first);
    assert_caught("another step", adamw, |case| {
        case.op.step += u64::from(case.op.step < 100);
    });
    assert_caught("no decay", adamw, |case| case.op.groups[0].weight_decay = 0.0);
    assert_caught("a group too short", adamw, |case| case.op.groups[1].range.end -= 1);
}

/// What slips through a mean over the whole output (ggml's limit for products is 5e-4).
#[test]
fn faults_that_a_mean_square_error_misses_are_caught() {
    let (rows, depth) = (128, 4096);
    let make = |random: &mut Gen, _: Class, _: Batch| {
        let class = Class::Uniform;
        let mut batch = Batch::random(random);
        (batch.lens, batch.rows) = (vec![rows], vec![0]);
        batch.token_keys = vec![ops::TokenKey { example: 0, position: 0 }; rows];
        let mut inputs = Inputs::default();
        inputs.tokens(&batch, depth, random.values(class, rows * depth, false));
        inputs.weights.push(random.weight(class, rows, depth));
        let op = crate::dense::Linear::plain();
        Case { class, batch, inputs, op }
    };
    let right = case(1, make);
    let (expected, tolerance) = answer(&right, &right.inputs);
    let mut lost_product = case(1, make);
    drop_last_column(&mut lost_product, 0);
    let lost_product =
        lost_product.op.run(&Oracle, &right.batch, &lost_product.inputs.load(&Oracle));
    let mut lost_element = expected.clone();
    lost_element[0].values[rows * rows / 2] = 0.0;
    // bf16 cut off instead of rounded to the nearest: at most one unit in the last place too far.
    let mut truncated = expected.clone();
    truncated[0].dtype = Dtype::Bf16;
    for value in &mut truncated[0].values {
        *value = f64::from(f32::from_bits((*value as f32).to_bits() & 0xFFFF_0000));
    }
    for (what, found) in
        [("product", lost_product), ("element", lost_element), ("rounding", truncated)]
    {
        assert!(compare(right.class, &found, &expected, &tolerance).is_err(), "a lost {what}");
        let squares =
            |of: &dyn Fn(usize) -> f64| -> f64 { (0..rows * rows).map(|i| of(i) * of(i)).sum() };
        let (found, expected) = (&found[0].values, &expected[0].values);
        let mean = squares(&|i| found[i] - expected[i]) / squares(&|i| expected[i]);
        assert!(mean < 5e-4, "{what}: {mean}");
    }
}

/// A NaN that became a number, an infinity of the wrong sign, a value nobody wrote.
#[test]
fn hidden_special_values_are_caught() {
    let output = |value| vec![Output::numbers("y", vec![1.0, value], false)];
    let cases = [
        (f64::NAN, 0.0),
        (f64::INFINITY, f64::NEG_INFINITY),
        (f64::INFINITY, f64::NAN),
        (f64::INFINITY, f64::MAX),
        (0.5, f64::NAN),
        (0.5, f64::INFINITY),
    ];
    for (expected, found) in cases {
        for class in [Class::Exact, Class::Uniform, Class::Special] {
            let tolerance = [vec![1e-3, 1e-3]];
            let compare =
                |found: Vec<Output>| compare(class, &found, &output(expected), &tolerance);
            assert!(compare(output(found)).is_err(), "{found} for {expected}");
            assert!(compare(output(expected)).is_ok(), "{expected}");
        }
    }
}
