//! Routing options, presets and `--config`: what they leave in the adapter and in the log.

use std::{collections::BTreeMap, fs, path::Path};

use polytape::formats::adapter::AdapterFiles;
use serde_json::{Value, json};

use crate::{data, fails, lines, ok, polytape, scratch, str, text, train};

/// The router logits of each linear, as bits.
fn routers(out: &Path) -> BTreeMap<String, Vec<u32>> {
    let files = AdapterFiles::open(out).unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    files.modules.iter().map(|(path, m)| (path.clone(), bits(&m.router_logits))).collect()
}

#[test]
fn linears_share_routers() {
    let dir = scratch("granularity");
    let rows = data(&dir, 12);
    let mut n_routers = Vec::new();
    for granularity in ["linear", "layerwise", "block", "coderwise", "one"] {
        let out = dir.join(granularity);
        ok(&train(
            &rows,
            &out,
            &[
                "--max-steps",
                "4",
                "--router-granularity",
                granularity,
                "--target-modules",
                "all-linear",
            ],
        ));
        let routers = routers(&out);
        let mut different: Vec<_> = routers.values().collect();
        different.sort();
        different.dedup();
        n_routers.push(different.len());
        let block: Vec<_> =
            routers.iter().filter(|(path, _)| path.starts_with("encoder.block.0.")).collect();
        let shares = granularity != "linear" && granularity != "layerwise";
        assert!(!shares || block.iter().all(|(_, logits)| *logits == block[0].1), "{granularity}");
        assert_eq!(out.join("routing.json").exists(), granularity != "linear");
        // It learned: a fresh logit is below 0.001.
        assert!(routers.values().flatten().any(|bits| f32::from_bits(*bits).abs() > 2e-3));
    }
    // Eight linears each side; five sub-layers; the base has one block each side.
    assert_eq!(n_routers, [16, 5, 2, 2, 1]);
    // It goes on as it was, and another granularity is refused.
    let (from, out) = (dir.join("block"), dir.join("on"));
    ok(&train(&rows, &out, &["--max-steps", "1", "--adapter-init", str(&from)]));
    assert_eq!(text(&out.join("routing.json")), text(&from.join("routing.json")));
    let other = ["--adapter-init", str(&from), "--router-granularity", "one"];
    fails(&train(&rows, &dir.join("no"), &other), 2, "--router-granularity differs");
    // Numbers that do not belong to a shared router.
    fs::copy(from.join("routing.json"), dir.join("linear/routing.json")).unwrap();
    let from = dir.join("linear");
    let wrong = ["--adapter-init", str(&from), "--max-steps", "1"];
    fails(
        &train(&rows, &dir.join("no"), &wrong),
        3,
        "differ from those of the linears that share its router",
    );
}

#[test]
fn a_given_routing_stays() {
    let dir = scratch("given");
    let rows = data(&dir, 12);
    let skills = dir.join("skills.json");
    fs::write(&skills, r#"{"task-0": ["a"], "task-1": ["b", "a"], "task-2": ["b"]}"#).unwrap();
    let expert = ["--task-skills", str(&skills)];
    for (name, flags, n_skills, on) in [
        ("shared", ["--routing", "shared"], 1, [&[0][..], &[0], &[0]]),
        ("private", ["--routing", "private"], 3, [&[0], &[1], &[2]]),
        ("expert", expert, 2, [&[0], &[0, 1], &[1]]),
    ] {
        let out = dir.join(name);
        ok(&train(
            &rows,
            &out,
            &[&["--max-steps", "3", "--learning-rate", "0.05"], &flags[..]].concat(),
        ));
        let files = AdapterFiles::open(&out).unwrap();
        assert_eq!((files.config.n_skills, files.config.n_splits), (n_skills, 1));
        for module in files.modules.values() {
            for (task, row) in module.router_logits.chunks(n_skills).enumerate() {
                let expected: Vec<f32> = (0..n_skills)
                    .map(|skill| if on[task].contains(&skill) { 200.0 } else { -200.0 })
                    .collect();
                assert_eq!(row, expected, "{name}");
            }
            assert!(module.lora_b.values.iter().any(|b| *b != 0.0), "{name} learned nothing");
        }
    }
    fails(
        &train(&rows, &dir.join("no"), &["--routing", "private", "--n-skills", "2"]),
        2,
        "--n-skills 2, but the routing that is given has 3",
    );
    fs::write(&skills, r#"{"task-0": ["a"], "task-9": ["b"]}"#).unwrap();
    fails(
        &train(&rows, &dir.join("no"), &["--task-skills", str(&skills)]),
        3,
        "task \"task-9\" is not in the data",
    );
    fs::write(&skills, r#"{"task-0": ["a"], "task-1": []}"#).unwrap();
    fails(
        &train(&rows, &dir.join("no"), &["--task-skills", str(&skills)]),
        3,
        "task \"task-1\" has no skill",
    );
}

/// Samples that are rounded are a matter of training: the adapter is PEFT's. The other two ways are the
/// adapter's own, in inference, too, and PEFT refuses its `poly_type`; it knows what `export` makes.
#[test]
fn routers_round_and_scale() {
    let dir = scratch("weightings");
    let (rows, base) = (data(&dir, 12), crate::fixture("base"));
    let loss = |adapter: &Path, task: &str| {
        let (base, adapter) = (str(&base), str(adapter));
        let evaluated = ok(&[
            "eval",
            "--model",
            base,
            "--adapter",
            adapter,
            "--data",
            str(&rows),
            "--generate",
            "off",
        ]);
        let evaluated: Value = serde_json::from_str(evaluated.trim()).unwrap();
        evaluated["tasks"][task]["loss"].as_f64().unwrap()
    };
    let common =
        ["--max-steps", "5", "--n-splits", "2", "--dtype", "f32", "--learning-rate", "0.05"];
    let mut losses = Vec::new();
    for (name, flags, poly_type) in [
        ("on", &["--router-sampling", "on"][..], "poly"),
        ("hard", &["--router-sampling", "hard"], "poly"),
        ("rounded", &["--router-sampling", "straight-through"], "poly+straight_through"),
        ("scaled", &["--poly_average_correction", "on"], "poly+average_correction"),
        (
            "both",
            &["--average-correction", "on", "--router-sampling", "straight-through"],
            "poly+straight_through+average_correction",
        ),
    ] {
        let out = dir.join(name);
        ok(&train(&rows, &out, &[&common[..], flags].concat()));
        let config: Value = serde_json::from_str(&text(&out.join("adapter_config.json"))).unwrap();
        assert_eq!(config["poly_type"], poly_type, "{name}");
        assert!(!out.join("routing.json").exists());
        losses.push(lines(&out.join("log.jsonl"))[4]["loss"].as_f64().unwrap().to_bits());
        // A task's mixture on the host and on the backend: the exported LoRA computes the same.
        let lora = dir.join(format!("{name}-lora"));
        ok(&[
            "export",
            "--model",
            str(&base),
            "--adapter",
            str(&out),
            "--task",
            "task-1",
            "--output-dir",
            str(&lora),
        ]);
        let (routed, plain) = (loss(&out, "task-1"), loss(&lora, "task-1"));
        assert!((routed - plain).abs() < 1e-5 * routed, "{name}: {routed}, {plain}");
        // It goes on as it was.
        let on = dir.join(format!("{name}-on"));
        ok(&train(&rows, &on, &["--max-steps", "1", "--adapter-init", str(&out)]));
        let config: Value = serde_json::from_str(&text(&on.join("adapter_config.json"))).unwrap();
        assert_eq!(config["poly_type"], poly_type, "{name}");
    }
    losses.sort_unstable();
    losses.dedup();
    assert_eq!(losses.len(), 5, "each is another way");

    let (no, rounded, on) = (dir.join("no"), dir.join("rounded"), dir.join("on"));
    let from = |adapter, flags: &[&'static str]| {
        let init = ["--adapter-init", Box::leak(str(adapter).to_owned().into_boxed_str())];
        [&init[..], flags].concat()
    };
    for (flags, message) in [
        (from(&rounded, &["--router-sampling", "on"]), "the adapter's, which is straight-through"),
        (from(&on, &["--router-sampling", "straight-through"]), "which is not straight-through"),
        (from(&on, &["--average-correction", "on"]), "--average-correction differs from that of"),
        (
            vec!["--routing", "private", "--average-correction", "on"],
            "are for a routing that learns",
        ),
    ] {
        fails(&train(&rows, &no, &flags), 2, message);
    }
    let adapt = |tune| {
        [
            "adapt",
            "--model",
            str(&base),
            "--adapter",
            str(&rounded),
            "--data",
            str(&rows),
            "--task",
            "task-new",
            "--tune",
            tune,
            "--output-dir",
            str(&no),
        ]
    };
    fails(&adapt("average"), 2, "the average needs a normalised routing");
    let both = [format!("a={}", str(&on)), format!("b={}", str(&rounded))];
    fails(
        &["eval", "--model", str(&base), "--adapter", &both[0], &both[1], "--data", str(&rows)],
        2,
        "adapter \"b\" has straight-through rounding or the average correction",
    );
}

/// Lazy updates leave the rows of absent tasks alone; dense ones move them by their moments.
#[test]
fn lazy_rows_wait_for_their_task() {
    let dir = scratch("lazy");
    let rows = data(&dir, 12);
    // In order, one row a step: tasks 0, 1, 2, 0, 1, 2, ...; after step 7 (task 0) only row 0 moved.
    let common = [
        "--shuffle",
        "off",
        "--batch-size",
        "1",
        "--lr-scheduler-type",
        "constant",
        "--init-weights",
        "off",
    ];
    let run = |name: &str, steps: &str, more: &[&str]| {
        let out = dir.join(name);
        ok(&train(&rows, &out, &[&common[..], &["--max-steps", steps], more].concat()));
        routers(&out)
    };
    for (updates, waits) in [("lazy", true), ("dense", false)] {
        let flags = ["--router-updates", updates];
        let six = run(&format!("{updates}-6"), "6", &flags);
        let seven = run(&format!("{updates}-7"), "7", &flags);
        for (path, before) in &six {
            let (after, width) = (&seven[path], before.len() / 3);
            assert_ne!(before[..width], after[..width], "task 0 is there");
            assert_eq!(before[width..] == after[width..], waits, "{updates} {path}");
        }
    }
    // With all tasks in each step they are the same.
    let all = ["--batch-size", "12"];
    let lazy = run("lazy-all", "3", &[&all[..], &["--router-updates", "lazy"]].concat());
    assert_eq!(lazy, run("dense-all", "3", &all));
}

#[test]
fn the_prior_moves_the_router() {
    let dir = scratch("prior");
    let rows = data(&dir, 12);
    let run = |name: &str, more: &[&str]| {
        let out = dir.join(name);
        ok(&train(&rows, &out, &[&["--max-steps", "1", "--max-grad-norm", "0"], more].concat()));
        routers(&out)
    };
    // At the first step B is zero, so the loss gives the router no gradient: what moves is the prior.
    let (without, with) = (run("without", &[]), run("with", &["--ibp-prior", "1"]));
    // A skill that one of the three tasks uses becomes rarer, one that all use likelier; two of three is where it turns.
    let mut n_moved = 0;
    for (path, before) in &without {
        let floats = |bits: &[u32]| bits.iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>();
        let (before, after) = (floats(before), floats(&with[path]));
        let width = before.len() / 3;
        for skill in 0..width {
            let of = |logits: &Vec<f32>| [0, 1, 2].map(|task| logits[task * width + skill]);
            let users = of(&before).iter().filter(|&&z| z > 0.0).count();
            for (before, after) in of(&before).into_iter().zip(of(&after)) {
                match users {
                    1 => assert!(after < before, "{path}: {before} -> {after}"),
                    3 => assert!(after > before, "{path}: {before} -> {after}"),
                    _ => assert!((after - before).abs() < 1e-3, "{path}: {before} -> {after}"),
                }
                n_moved += usize::from(users % 2 == 1);
            }
        }
    }
    assert!(n_moved > 3, "{n_moved}");
    fails(&train(&rows, &dir.join("no"), &["--ibp-prior=-1"]), 2, "ibp_prior must be 0 or more");
}

#[test]
fn presets_are_defaults_and_flags_win() {
    let dir = scratch("presets");
    let rows = data(&dir, 12);
    for (preset, r, q, accumulation) in [
        ("peft", 8, 4, 1),
        ("poly-crossfit", 16, 1, 1),
        ("mhr-t0", 1, 2, 2),
        ("mhr-superni", 16, 2, 1),
    ] {
        let out = dir.join(preset);
        let mut flags = vec!["--preset", preset, "--max-steps", "1"];
        if preset.starts_with("mhr") {
            flags.extend(["--n-splits", "2", "--target-modules", "q,v"]); // The base is tiny.
        }
        ok(&train(&rows, &out, &flags));
        let config: Value = serde_json::from_str(&text(&out.join("config.json"))).unwrap();
        let adapter = &config["adapter_config"];
        assert_eq!((adapter["r"].as_u64(), adapter["n_splits"].as_u64()), (Some(r), Some(q)));
        assert_eq!(config["gradient_accumulation_steps"], accumulation);
        assert_eq!(config["router_sampling"], if preset == "mhr-t0" { "off" } else { "on" });
        assert_eq!(config["preset"], preset);
    }
    fails(&train(&rows, &dir, &["--preset", "mhr-to"]), 2, "mhr-t0");
}

/// A preset's linears are those that do the same in the base, whatever they are called.
#[test]
fn presets_fit_every_base() {
    let dir = scratch("presets-bases");
    let rows = data(&dir, 9);
    let attention = "poly-crossfit";
    for (base, preset, expected) in [
        ("tiny", attention, &["k", "o", "q", "v"][..]),
        ("tiny", "mhr-t0", &["k", "o", "q", "v", "wi", "wo"]),
        ("v11-untied", "mhr-t0", &["k", "o", "q", "v", "wi_0", "wi_1", "wo"]),
        ("bart", attention, &["k_proj", "out_proj", "q_proj", "v_proj"]),
        ("bart", "mhr-t0", &["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
        ("llama", attention, &["k_proj", "o_proj", "q_proj", "v_proj"]),
        (
            "llama",
            "mhr-t0",
            &["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
        ("gpt2", attention, &["attn.c_attn", "attn.c_proj"]),
        ("gpt2", "mhr-t0", &["c_attn", "c_fc", "c_proj"]),
    ] {
        let name = format!("tests/data/parity/{base}/base");
        let (out, base) = (dir.join(format!("{base}-{preset}")), Path::new(&name));
        let mut run = train(&rows, &out, &["--preset", preset, "--max-steps", "1"]);
        run[2] = str(base);
        run.extend(["--n-splits", "1"]); // The bases are tiny.
        ok(&run);
        let config: Value = serde_json::from_str(&text(&out.join("adapter_config.json"))).unwrap();
        assert_eq!(config["target_modules"], json!(expected), "{name} {preset}");
    }
}

#[test]
fn a_config_file_is_flags() {
    let dir = scratch("config");
    let (rows, file) = (data(&dir, 12), dir.join("run.toml"));
    let flags = dir.join("flags");
    ok(&train(
        &rows,
        &flags,
        &[
            "--max-steps",
            "4",
            "--learning-rate",
            "0.003",
            "--target-modules",
            "q,v,o",
            "--router-sampling",
            "off",
            "--seed",
            "5",
            "--batch-size",
            "3",
        ],
    ));
    fs::write(
        &file,
        "# as HF names them\nlearning_rate = 3e-3\ntarget_modules = [\"q\", \"v\", \"o\"]\n\
         router_sampling = false\nper_device_train_batch_size = 3\nmax_steps = 9\nseed = 7\n",
    )
    .unwrap();
    let out = dir.join("out");
    ok(&train(&rows, &out, &["--config", str(&file), "--max_steps", "4", "--seed=5"]));
    let model = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(model(&out) == model(&flags), "the command line wins over the file");
    assert_eq!(lines(&out.join("log.jsonl")).len(), 4);
    for (content, message) in [
        (
            "seed = 1\n\nlerning_rate = 1\n",
            "run.toml:3: unknown key lerning_rate; the nearest is learning_rate",
        ),
        ("zzzzzz = 1\n", "run.toml:1: unknown key zzzzzz"),
        ("seed = \n", "run.toml:1: "),
        ("seed = { a = 1 }\n", "run.toml:1: key seed: found a table or a date"),
    ] {
        fs::write(&file, content).unwrap();
        fails(&train(&rows, &out, &["--config", str(&file)]), 3, message);
    }
    // A file of transformers' TrainingArguments: what means something is done, what does not is named.
    let settings = "adam_beta1 = 0.9\nbf16 = true\ndataloader_num_workers = 4\ndisable_tqdm = true\n\
         eval_steps = 2\neval_strategy = \"steps\"\ngreater_is_better = false\nlogging_steps = 5\n\
         max_steps = -1\nmetric_for_best_model = \"eval_loss\"\nnum_train_epochs = 1\n\
         per_device_eval_batch_size = 2\nreport_to = [\"none\"]\nrun_name = \"x\"\n\
         save_only_model = false\nsave_strategy = \"no\"\n";
    fs::write(&file, settings).unwrap();
    let trained = dir.join("trained");
    let command = train(&rows, &trained, &["--config", str(&file), "--eval-data", str(&rows)]);
    let output = polytape(&command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let warning = "of no effect here: dataloader_num_workers, disable_tqdm, run_name";
    assert!(
        said.lines().any(|line| line.starts_with("WARN ") && line.ends_with(warning)),
        "{said}"
    );
    let log = lines(&trained.join("log.jsonl"));
    let evaluated = log.iter().filter(|line| line.get("eval_loss").is_some());
    assert_eq!((log.len(), evaluated.count()), (3, 1), "one epoch: two steps");
    let config: Value = serde_json::from_str(&text(&trained.join("config.json"))).unwrap();
    assert_eq!((&config["dtype"], &config["logging_steps"]), (&json!("bf16"), &json!(5)));
    for (content, message) in [
        ("adam_beta2 = 0.95\n", "run.toml:1: key adam_beta2: AdamW has 0.999 here"),
        (
            "seed = 1\neval_strategy = \"steps\"\n",
            "run.toml:2: key eval_strategy: eval_steps must say",
        ),
        ("save_strategy = \"epoch\"\n", "key save_strategy: only steps are counted"),
        ("greater_is_better = true\n", "key greater_is_better: of loss less is better"),
        ("fp16 = true\n", "key fp16: there are f32 and bf16"),
    ] {
        fs::write(&file, content).unwrap();
        fails(&train(&rows, &out, &["--config", str(&file)]), 3, message);
    }
    fs::write(&file, "max_steps = \"many\"\n").unwrap();
    fails(&train(&rows, &out, &["--config", str(&file)]), 3, "many");
    fails(&train(&rows, &out, &["--config", "/nowhere.toml"]), 3, "/nowhere.toml");
}

/// What is left out stays left out, in the files as in PEFT, and a repeated flag must say the same.
#[test]
fn excluded_modules_are_not_adapted() {
    let dir = scratch("excluded");
    let rows = data(&dir, 9);
    let adapted = |out: &Path| -> Vec<String> {
        AdapterFiles::open(out).unwrap().modules.into_keys().collect()
    };
    let whole = dir.join("whole");
    let common = ["--max-steps", "1", "--target-modules", "q,v"];
    ok(&train(&rows, &whole, &common));
    for (name, given, written, is_left_out) in [
        (
            "list",
            "EncDecAttention.q",
            json!(["EncDecAttention.q"]),
            (|path| path.ends_with("EncDecAttention.q")) as fn(&str) -> bool,
        ),
        ("pattern", r"decoder\..*", json!(r"decoder\..*"), |path| path.starts_with("decoder.")),
    ] {
        let out = dir.join(name);
        ok(&train(&rows, &out, &[&common[..], &["--exclude-modules", given]].concat()));
        let left: Vec<String> =
            adapted(&whole).into_iter().filter(|path| !is_left_out(path)).collect();
        assert!(!left.is_empty() && left.len() < adapted(&whole).len());
        assert_eq!(adapted(&out), left);
        let config: Value = serde_json::from_str(&text(&out.join("adapter_config.json"))).unwrap();
        assert_eq!(config["exclude_modules"], written);
        let on = ["--adapter-init", str(&out), "--max-steps", "1", "--exclude-modules"];
        ok(&train(&rows, &dir.join(format!("{name}-on")), &[&on[..], &[given]].concat()));
        let other = [&on[..], &["v"]].concat();
        let message = "--exclude-modules v differs from that of --adapter-init";
        fails(&train(&rows, &dir.join("no"), &other), 2, message);
    }
    let (file, out) = (dir.join("run.toml"), dir.join("of-file"));
    fs::write(&file, "exclude_modules = [\"EncDecAttention.q\"]\n").unwrap();
    ok(&train(&rows, &out, &[&common[..], &["--config", str(&file)]].concat()));
    assert_eq!(adapted(&out), adapted(&dir.join("list")));
}
