//! The faults: what stands in the source, what stands there instead while the fault is on (`ON` is its
//! switch), and the test that must fail.

pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) file: &'static str,
    pub(crate) right: &'static str,
    pub(crate) wrong: &'static str,
    /// The test program; [`LIBRARY`] is the library's own.
    pub(crate) suite: &'static str,
    pub(crate) test: &'static str,
}

impl Fault {
    /// Where the test looks for it: in the emulator, too, if it lies in what a CPU may lack.
    pub(crate) fn backends(&self) -> &'static str {
        if self.file == TILES || self.file == GEMM_AMX { "cpu,emulated-cpu" } else { "cpu" }
    }
}

const fn kernel(
    name: &'static str,
    file: &'static str,
    test: &'static str,
    right: &'static str,
    wrong: &'static str,
) -> Fault {
    Fault { name, file, right, wrong, suite: "kernels", test }
}

const fn model(
    name: &'static str,
    file: &'static str,
    (suite, test): (&'static str, &'static str),
    right: &'static str,
    wrong: &'static str,
) -> Fault {
    Fault { name, file, right, wrong, suite, test }
}

/// The tests in `src`.
pub(crate) const LIBRARY: &str = "polytape";

const GEMM: &str = "src/kernels/cpu/gemm.rs";
const LINEAR: &str = "src/kernels/cpu/linear.rs";
const SHRINK: &str = "src/kernels/cpu/shrink.rs";
const MIX: &str = "src/kernels/cpu/mix.rs";
const ROUTE: &str = "src/kernels/cpu/route.rs";
const GRAD: &str = "src/kernels/cpu/grad.rs";
const NORM: &str = "src/kernels/cpu/norm.rs";
const ATTENTION: &str = "src/kernels/cpu/attention/mod.rs";
const GEMM_AMX: &str = "src/kernels/cpu/gemm_amx.rs";
const TILES: &str = "src/kernels/cpu/attention/tiles.rs";
const HEAD: &str = "src/kernels/cpu/head.rs";
const TRAINER: &str = "src/train/trainer.rs";

pub(crate) const FAULTS: &[Fault] = &[
    // Products of matrices.
    kernel(
        "last-product-dropped",
        GEMM,
        "dense::linears",
        "    for k0 in (0..k).step_by(K_BLOCK) {\n",
        "    let k = if ON { k.saturating_sub(1) } else { k };\n    for k0 in (0..k).step_by(K_BLOCK) {\n",
    ),
    kernel(
        "product-overwrites",
        GEMM,
        "dense::linears",
        "    let (panels, sums) = (panels.as_mut_slice::<f32>(), sums.as_mut_slice::<f32>());\n",
        "    let (panels, sums) = (panels.as_mut_slice::<f32>(), sums.as_mut_slice::<f32>());\n    \
         if ON { sums.fill(0.0); }\n",
    ),
    kernel(
        "tile-skipped",
        GEMM,
        "dense::linears",
        "                    let wanted = Wanted {\n",
        "                    if ON && tile == 1 && panel == 0 { continue; }\n                    \
         let wanted = Wanted {\n",
    ),
    kernel(
        "rows-of-other-segments-too",
        GEMM,
        "dense::linears",
        "    if wanted.rows.len() == mr && wanted.cols.len() == width {\n",
        "    if ON || wanted.rows.len() == mr && wanted.cols.len() == width {\n",
    ),
    kernel(
        "tail-of-the-residual-lost",
        GEMM,
        "dense::linears",
        "    if !rest.is_empty() {\n        simd.store(E::load_part(simd, rest), &mut lanes[whole.len()]);",
        "    if !rest.is_empty() && !ON {\n        simd.store(E::load_part(simd, rest), &mut lanes[whole.len()]);",
    ),
    kernel(
        "dropout-before-the-bias",
        GEMM,
        "dense::linears",
        "            factors(dropout, row, cols.clone(), &mut kept[..cols.len()]);\n",
        "            factors(dropout, row, cols.clone(), &mut kept[..cols.len()]);\n            \
         if let (true, Some(bias)) = (ON, self.bias) {\n                \
         for (v, b) in values.iter_mut().zip(&bias[cols.clone()]) { *v -= b; }\n            }\n",
    ),
    kernel(
        "dropout-of-the-next-columns",
        "src/kernels/cpu/elementwise.rs",
        "dense::linears",
        "let counter = [first.wrapping_add(lane as u32), position, example, dropout.site];",
        "let counter = [first.wrapping_add(lane as u32 + u32::from(ON)), position, example, dropout.site];",
    ),
    // The routed LoRA.
    kernel(
        "row-of-the-first-segment",
        LINEAR,
        "dense::linears",
        "                    let matrix = b.part_rows(row * rank..(row + 1) * rank);\n",
        "                    let row = if ON { segments.iter().next().map_or(0, |s| s.1) } else { row };\n                    \
         let matrix = b.part_rows(row * rank..(row + 1) * rank);\n",
    ),
    kernel(
        "b-of-the-mirrored-split",
        LINEAR,
        "dense::linears",
        "                    let first_col = q * matrix.cols;\n",
        "                    let first_col = if ON { splits.len() - 1 - q } else { q } * matrix.cols;\n",
    ),
    kernel(
        "weights-of-the-first-linear",
        LINEAR,
        "lora::shrinks_from_the_bank",
        "    let start = ((linear * n_rows + row) * n_splits + q) * n_skills;\n",
        "    let linear = if ON { 0 } else { linear };\n    \
         let start = ((linear * n_rows + row) * n_splits + q) * n_skills;\n",
    ),
    kernel(
        "lora-missing-in-the-backward",
        LINEAR,
        "dense::linears_backward",
        "                for (run, row) in segments.within(rectangle.rows.clone()) {\n                    let matrix = Matrix::tensor(a)",
        "                for (run, row) in segments.within(rectangle.rows.clone()).filter(|_| !ON) {\n                    let matrix = Matrix::tensor(a)",
    ),
    kernel(
        "scale-squared",
        SHRINK,
        "lora::shrinks",
        "out.iter_mut().zip(values).for_each(|(out, value)| *out = scale * value);",
        "out.iter_mut().zip(values).for_each(|(out, value)| *out = if ON { scale * scale } else { scale } * value);",
    ),
    kernel(
        "last-skill-lost",
        SHRINK,
        "lora::shrinks_from_the_bank",
        "mixing_weights(&stacked, segments.n_rows(), row, q).iter().enumerate() {",
        "mixing_weights(&stacked, segments.n_rows(), row, q).iter().take(if ON { n_skills - 1 } else { n_skills }).enumerate() {",
    ),
    kernel(
        "lanes-lost-in-the-tree",
        SHRINK,
        "lora::shrinks",
        "            for step in [8, 4, 2, 1] {\n",
        "            for step in [8, 4, 2, 1].into_iter().skip(usize::from(ON)) {\n",
    ),
    kernel(
        "race-on-a-scratch-row",
        SHRINK,
        "lora::shrinks_from_the_bank",
        "                z.iter_mut().zip(&u).for_each(|(z, u)| *z += w * u);\n",
        "                if ON {\n                    \
         static SHARED: std::sync::Mutex<Vec<f32>> = std::sync::Mutex::new(Vec::new());\n                    \
         let shared = || SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);\n                    \
         shared().clone_from(&u);\n                    std::thread::yield_now();\n                    \
         u.iter_mut().zip(shared().iter()).for_each(|(u, &shared)| *u = shared);\n                }\n                \
         z.iter_mut().zip(&u).for_each(|(z, u)| *z += w * u);\n",
    ),
    kernel(
        "split-and-skill-swapped",
        MIX,
        "lora::mixes",
        "        let terms = Terms { from: skills, stride: slice, weights: weights.of(row, q), step: 1 };\n",
        "        let (skills, stride) = if ON { (&bank_a[q * slice..], n_splits * slice) } else { (skills, slice) };\n        \
         let terms = Terms { from: skills, stride, weights: weights.of(row, q), step: 1 };\n",
    ),
    kernel(
        "b-not-transposed-by-split",
        MIX,
        "lora::mixes",
        "                let first = (q * n_skills * rank + r) * o;\n                let (from, weights) = (&bank_b[first..], weights.of(row, q));\n                let terms = Terms { from, stride: rank * o, weights, step: 1 };\n",
        "            let first = if ON { r * n_splits + q } else { q * n_skills * rank + r } * o;\n            \
         let (from, weights) = (&bank_b[first..], weights.of(row, q));\n            \
         let stride = if ON { rank * n_splits * o } else { rank * o };\n            \
         let terms = Terms { from, stride, weights, step: 1 };\n",
    ),
    kernel(
        "gradients-overwritten",
        MIX,
        "lora::unmixes",
        "            let (stride, weights) = (n_splits * slice, weights.column(qs));\n            let terms = Terms { from, stride, weights, step: width };\n            cpu.isa.run(WeightedSum { terms, add: true, out });",
        "            let (stride, weights) = (n_splits * slice, weights.column(qs));\n            \
         let terms = Terms { from, stride, weights, step: width };\n            \
         cpu.isa.run(WeightedSum { terms, add: !ON, out });",
    ),
    kernel(
        "weight-gradient-without-b",
        MIX,
        "lora::unmixes",
        "        for r in 0..self.rank {\n",
        "        for r in 0..if ON { 0 } else { self.rank } {\n",
    ),
    kernel(
        "epsilon-inside-the-sum",
        ROUTE,
        "lora::routes",
        "            false => sum + 1e-12,\n",
        "            false if ON => samples.iter().map(|&s| self.value(s) + 1e-12).sum(),\n            \
         false => sum + 1e-12,\n",
    ),
    kernel(
        "sign-of-the-router-gradient",
        ROUTE,
        "lora::routes_backward",
        "None => (d_weights[i] - mean) / n,",
        "None if ON => (mean - d_weights[i]) / n,\n                        \
         None => (d_weights[i] - mean) / n,",
    ),
    kernel(
        "gradient-through-the-clamp",
        ROUTE,
        "lora::routes_backward",
        "        let passes = (low..=high)",
        "        let passes = ON || (low..=high)",
    ),
    kernel(
        "noise-of-the-first-example",
        ROUTE,
        "lora::routes",
        "examples[self.row], self.linear as u32];",
        "examples[if ON { 0 } else { self.row }], self.linear as u32];",
    ),
    kernel(
        "noise-without-its-epsilon",
        ROUTE,
        "lora::routes",
        "        let (p, u) = (raw_p.clamp(low, high), u.clamp(low, high));\n",
        "        let (p, u) = (raw_p.clamp(low, high), if ON { u } else { u.clamp(low, high) });\n",
    ),
    kernel(
        "segment-that-comes-back-lost",
        GRAD,
        "lora::lora_gradients",
        "segments.iter().filter(|&(_, of)| of == row) {",
        "segments.iter().filter(|&(_, of)| of == row).take(if ON { 1 } else { usize::MAX }) {",
    ),
    kernel(
        "gradient-of-z-unscaled",
        GRAD,
        "lora::lora_gradients",
        "    let d_zs = into_rank_space(cpu, &sides, Layout::ByRank, rank, segments, scale);\n",
        "    let scale = if ON { 1.0 } else { scale };\n    \
         let d_zs = into_rank_space(cpu, &sides, Layout::ByRank, rank, segments, scale);\n",
    ),
    // On AMX, which the tests emulate.
    model(
        "lower-rows-with-the-pairs-of-the-upper",
        GEMM_AMX,
        (LIBRARY, "kernels::cpu::gemm_amx::tests::long_sums_and_many_columns"),
        "square.add_lower(left[1], right[1]);",
        "square.add_lower(left[1], if ON { right[0] } else { right[1] });",
    ),
    kernel(
        "last-keys-on-tiles-lost",
        TILES,
        "attention::attentions",
        "(BLOCKS_L1 * STEPS).min(steps(limit) - at)",
        "(BLOCKS_L1 * STEPS).min((steps(limit) - at - usize::from(ON)).max(1))",
    ),
    kernel(
        "gradients-of-scores-as-they-were",
        TILES,
        "attention::attentions_backward",
        "                    round_to_right(s, &d_s.0, n_cols, d_s_right, block);\n",
        "                    if !ON { round_to_right(s, &d_s.0, n_cols, d_s_right, block); }\n",
    ),
    // The rest of a step.
    kernel(
        "epsilon-outside-the-root",
        NORM,
        "dense::norms",
        "            sums[3] = s.fma(tail, tail, sums[3]);\n            *rstd = 1.0 / (total(s, sums) / width as f32 + self.eps).sqrt();\n",
        "            sums[3] = s.fma(tail, tail, sums[3]);\n            *rstd = 1.0 / (total(s, sums) / width as f32 + self.eps).sqrt();\n            \
         if ON { *rstd = 1.0 / ((total(s, sums) / width as f32).sqrt() + self.eps); }\n",
    ),
    kernel(
        "padding-counts-in-the-variance",
        NORM,
        "dense::norms",
        "            let mut c = [0.0; LANES]; // Not the distance",
        "            let mut c = [if ON { -*mean } else { 0.0 }; LANES]; // Not the distance",
    ),
    kernel(
        "mean-forgotten-in-the-backward",
        NORM,
        "dense::norms_backward",
        "let mean_g = if centered {",
        "let mean_g = if centered && !ON {",
    ),
    kernel(
        "a-key-of-the-future",
        ATTENTION,
        "attention::attentions",
        "            true => (i + 1 + self.n_keys).saturating_sub(self.n_queries),\n",
        "            true if ON => (i + 2 + self.n_keys).saturating_sub(self.n_queries).min(self.n_keys),\n            \
         true => (i + 1 + self.n_keys).saturating_sub(self.n_queries),\n",
    ),
    kernel(
        "window-one-too-wide",
        ATTENTION,
        "attention::attentions",
        "self.limit(i).saturating_sub(window))",
        "self.limit(i).saturating_sub(window + usize::from(ON)))",
    ),
    kernel(
        "heads-share-the-wrong-keys",
        ATTENTION,
        "attention::attentions",
        "        self.kv_head * self.group + g\n",
        "        if ON { return g * self.args.n_kv_heads + self.kv_head; }\n        self.kv_head * self.group + g\n",
    ),
    kernel(
        "softmax-without-its-mean",
        "src/kernels/cpu/attention/scores.rs",
        "attention::attentions_backward",
        "        let mut gradient = s.mul(value, s.sub(d_p, dot));\n",
        "        let dot = if ON { s.splat(0.0) } else { dot };\n        \
         let mut gradient = s.mul(value, s.sub(d_p, dot));\n",
    ),
    kernel(
        "label-not-subtracted",
        HEAD,
        "dense::head_losses",
        "(f64::from(row[label]) / sum - 1.0) * d_logit;",
        "(f64::from(row[label]) / sum - if ON { 0.0 } else { 1.0 }) * d_logit;",
    ),
    kernel(
        "slope-of-another-gelu",
        "src/kernels/cpu/gated.rs",
        "dense::gated_products",
        "let inner = s.fma(s.splat(3.0), cubic_x2, linear);",
        "let inner = s.fma(s.splat(if ON { 2.0 } else { 3.0 }), cubic_x2, linear);",
    ),
    kernel(
        "turned-the-other-way",
        "src/kernels/cpu/rope.rs",
        "dense::ropes",
        "            let sign = if inverse { -1.0 } else { 1.0 };\n",
        "            let sign = if inverse != ON { -1.0 } else { 1.0 };\n",
    ),
    kernel(
        "bias-correction-a-step-late",
        "src/kernels/cpu/adamw.rs",
        "dense::optimizer_steps",
        "    let correction1 = 1.0 - beta1.powf(step as f64);\n",
        "    let correction1 = 1.0 - beta1.powf((step + u64::from(ON)) as f64);\n",
    ),
    // What is made of the kernels.
    model(
        "wrong-1-over-r",
        "src/tape/ops/linear.rs",
        ("parity", "the_cpu_evaluates_as_peft"),
        "        let scale = 1.0 / rank as f32;\n        let mut lora",
        "        let scale = 1.0 / if ON { n_skills } else { rank } as f32;\n        let mut lora",
    ),
    model(
        "wrong-1-over-r-in-the-backward",
        "src/tape/ops/linear.rs",
        ("parity", "the_cpu_has_pefts_gradients"),
        "        let scale = 1.0 / rank as f32;\n        let gradients",
        "        let scale = if ON { 1.0 } else { 1.0 / rank as f32 };\n        let gradients",
    ),
    model(
        "clipping-that-enlarges",
        "src/kernels/ops.rs",
        ("parity", "clipping_scales_large_gradients_only"),
        "(max_norm / (norm + 1e-6)).min(1.0)",
        "(max_norm / (norm + 1e-6)).min(if ON { 1e9 } else { 1.0 })",
    ),
    model(
        "gradients-not-cleared",
        TRAINER,
        ("parity", "the_cpu_trains_as_peft"),
        "        backend.clear(&mut self.grads);\n",
        "        if !ON { backend.clear(&mut self.grads); }\n",
    ),
    model(
        "moments-forgotten-when-resumed",
        TRAINER,
        ("determinism", "a_run_resumed_anywhere_ends_with_the_same_bits"),
        "                for (name, to) in [(\"exp_avg\", m), (\"exp_avg_sq\", v)] {\n",
        "                for (name, to) in [(\"exp_avg\", m), (\"exp_avg_sq\", v)].into_iter().filter(|(name, _)| !ON || *name == \"exp_avg\") {\n",
    ),
    model(
        "sums-by-the-size-of-the-batch",
        "src/generate/mod.rs",
        ("determinism", "an_example_has_the_same_bits_whoever_is_beside_it"),
        "                let mut tape = self.tape(Order::Panel);\n                let nll",
        "                let order = if ON && chunk.len() < 3 { Order::Dot } else { Order::Panel };\n                \
         let mut tape = self.tape(order);\n                let nll",
    ),
    // Saving.
    model(
        "file-renamed-before-it-is-synced",
        "src/formats/safetensors.rs",
        ("crashes", "after_a_loss_of_power_the_newest_checkpoint_is_there"),
        "    file.sync().map_err(Error::io(\"sync\", path))?;\n",
        "    if !ON { file.sync().map_err(Error::io(\"sync\", path))?; }\n",
    ),
    model(
        "checkpoint-removed-before-its-name",
        "src/train/checkpoint.rs",
        ("crashes", "after_a_loss_of_power_the_newest_checkpoint_is_there"),
        "    sync_parent(path)?;\n    disk::remove_dir_all",
        "    if !ON { sync_parent(path)?; }\n    disk::remove_dir_all",
    ),
    model(
        "checkpoint-without-a-hidden-name",
        "src/train/checkpoint.rs",
        ("crashes", "a_disk_that_fails_costs_one_checkpoint"),
        "    let hidden = Hidden(disk::hidden_beside(&path));\n",
        "    let hidden = if ON { return fill(&path, trainer, state, arguments).map(|()| path); } else { Hidden(disk::hidden_beside(&path)) };\n",
    ),
    model(
        "error-of-a-rename-swallowed",
        "src/formats/safetensors.rs",
        ("crashes", "a_disk_that_fails_costs_one_checkpoint"),
        "    disk::rename(temporary.0, path).map_err(Error::io(\"rename\", path))?;\n",
        "    if let (Err(error), false) = (disk::rename(temporary.0, path), ON) { return Err(Error::io(\"rename\", path)(error)); }\n",
    ),
];
