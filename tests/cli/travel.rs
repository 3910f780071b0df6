//! Adapters that travel: what `export` and `import` write, and how they fail; routing as a value.

use std::{fs, path::Path};

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::{fails, lines, ok, scratch, str, text};

fn case(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity").join(name)
}

/// The recorded rows of a case, as a data file; each with what `more` adds.
fn rows_of(dir: &Path, name: &str, more: impl Fn(usize, &mut Value)) -> std::path::PathBuf {
    let expected: Value = serde_json::from_str(&text(&case(name).join("expected.json"))).unwrap();
    let rows = expected["rows"].as_array().unwrap().iter().enumerate().map(|(i, row)| {
        let mut row = row.clone();
        more(i, &mut row);
        format!("{row}\n")
    });
    let path = dir.join(format!("{name}-rows.jsonl"));
    fs::write(&path, rows.collect::<String>()).unwrap();
    path
}

/// The nll of each row.
fn nll(dir: &Path, model: &Path, adapter: Option<&Path>, rows: &Path) -> Vec<f64> {
    let per_example = dir.join("nll.jsonl");
    let mut flags = vec!["eval", "--model", str(model), "--data", str(rows), "--dtype", "f32"];
    flags.extend(["--generate", "off", "--per-example", str(&per_example), "--overwrite"]);
    flags.extend(adapter.iter().flat_map(|dir| ["--adapter", str(dir)]));
    ok(&flags);
    lines(&per_example).iter().map(|row| row["nll"].as_f64().unwrap()).collect()
}

fn assert_near(got: &[f64], want: &[f64], relative: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= relative * w.abs(), "{what}: {got:?}, not {want:?}");
    }
}

/// Exported and read again, an adapter's task computes the same: as a LoRA, and merged into the base,
/// for every way a base is stored.
#[test]
fn an_exported_task_computes_the_same() {
    for name in ["tiny", "sharded", "v10-hub", "bart", "llama", "qwen2", "gemma3", "gpt2"] {
        let dir = scratch(&format!("export-{name}"));
        let (base, adapter) = (case(name).join("base"), case(name).join("adapter"));
        // All rows as task 0: what is exported is one mixture.
        let rows = rows_of(&dir, name, |_, row| row["task_id"] = json!(0));
        let want = nll(&dir, &base, Some(&adapter), &rows);
        let (lora, merged) = (dir.join("lora"), dir.join("merged"));
        let common = ["export", "--model", str(&base), "--adapter", str(&adapter), "--task", "0"];
        let said = ok(&[&common[..], &["--output-dir", str(&lora), "--json"]].concat());
        let said: Value = serde_json::from_str(said.trim()).unwrap();
        let (far, largest) =
            (said["deviation"]["max_logit_difference"].as_f64(), &said["deviation"]["max_logit"]);
        assert!(far.unwrap() < 2e-5 * largest.as_f64().unwrap(), "{name}: {said}");
        ok(&[&common[..], &["--output-dir", str(&merged), "--merged"]].concat());
        // The two sides round differently; what is wrong differs in the first digits.
        assert_near(&nll(&dir, &base, Some(&lora), &rows), &want, 1e-5, name);
        assert_near(&nll(&dir, &merged, None, &rows), &want, 1e-5, name);
        let alone = nll(&dir, &base, None, &rows);
        assert!(alone.iter().zip(&want).all(|(a, w)| (a - w).abs() > 1e-3), "the task does much");
    }
}

/// The exported folder has PEFT's names, shapes and fields: those that PEFT 0.21.2 wrote for a LoRA of
/// the same base (`tests/data/record_lora.py`).
#[test]
fn an_exported_folder_is_pefts() {
    let dir = scratch("export-names");
    let (adapter, out) = (case("tiny").join("adapter"), dir.join("out"));
    let said =
        ok(&["export", "--adapter", str(&adapter), "--task", "2", "--output-dir", str(&out)]);
    assert!(said.contains("not compared"), "{said}");
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lora/peft");
    let config = |dir: &Path| -> Value {
        serde_json::from_str(&text(&dir.join("adapter_config.json"))).unwrap()
    };
    let (ours, theirs) = (config(&out), config(&recorded));
    assert_eq!(ours, theirs);
    assert_eq!((&ours["r"], &ours["lora_alpha"]), (&json!(2), &json!(1)));
    // The same text, too: Python's json.dumps with sorted keys.
    let as_text = |dir: &Path| text(&dir.join("adapter_config.json")).trim_end().to_owned();
    assert_eq!(as_text(&out), as_text(&recorded));
    let shapes = |dir: &Path| {
        let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.dtype(), view.shape().to_vec()))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert_eq!(shapes(&out), shapes(&recorded));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

/// Without `--model` the base that the adapter names is what the export is compared on, if it is there.
#[test]
fn an_export_is_compared_on_the_base_that_the_adapter_names() {
    let dir = scratch("export-named");
    let adapter = dir.join("adapter");
    fs::create_dir_all(&adapter).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(case("tiny").join("adapter").join(file), adapter.join(file)).unwrap();
    }
    let path = adapter.join("adapter_config.json");
    let none = dir.join("none");
    for (name, base, compared) in [
        ("own", case("tiny").join("base"), true),
        ("other", case("v11-untied").join("base"), false),
        ("no-model", dir.clone(), false),
        ("absent", none, false),
    ] {
        let mut config: Value = serde_json::from_str(&text(&path)).unwrap();
        config["base_model_name_or_path"] = json!(str(&base));
        fs::write(&path, config.to_string()).unwrap();
        let out = dir.join(name);
        let mut flags = vec!["export", "--adapter", str(&adapter), "--task", "1"];
        flags.extend(["--output-dir", str(&out)]);
        let said = ok(&flags);
        let expected = if compared {
            "compared with the adapter on 8 rows"
        } else {
            "not compared with the adapter: that needs --model"
        };
        assert!(said.contains(expected), "{name}: {said}");
    }
}

/// Merging changes the adapted weights and no other byte, in the files that the source has.
#[test]
fn merging_touches_the_adapted_weights_alone() {
    for name in ["sharded", "bf16", "f16"] {
        let dir = scratch(&format!("merge-{name}"));
        let (base, adapter) = (case(name).join("base"), case(name).join("adapter"));
        let out = dir.join("out");
        let mut flags =
            vec!["export", "--merged", "--model", str(&base), "--adapter", str(&adapter)];
        flags.extend(["--task", "1", "--output-dir", str(&out), "--json"]);
        let said: Value = serde_json::from_str(ok(&flags).trim()).unwrap();
        let names = |dir: &Path| {
            let mut names: Vec<String> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(&out), names(&base));
        let files = polytape::formats::adapter::AdapterFiles::open(&adapter).unwrap();
        let (mut n_changed, mut n_same) = (0, 0);
        for file in names(&base) {
            let (old, new) =
                (fs::read(base.join(&file)).unwrap(), fs::read(out.join(&file)).unwrap());
            if !file.ends_with(".safetensors") {
                assert!(old == new, "{file}");
                continue;
            }
            let header = 8 + u64::from_le_bytes(old[..8].try_into().unwrap()) as usize;
            assert!(old[..header] == new[..header], "the header of {file}");
            let (old, new) =
                (SafeTensors::deserialize(&old).unwrap(), SafeTensors::deserialize(&new).unwrap());
            for (tensor, view) in old.tensors() {
                let changed = view.data() != new.tensor(&tensor).unwrap().data();
                let path = tensor.strip_suffix(".weight").unwrap_or(&tensor);
                assert_eq!(changed, files.modules.contains_key(path), "{tensor}");
                if changed { n_changed += 1 } else { n_same += 1 }
            }
        }
        assert_eq!(n_changed, files.modules.len());
        assert_eq!(
            (&said["tensors_merged"], &said["tensors_kept"]),
            (&json!(n_changed), &json!(n_same))
        );

        // A second time: nothing is overwritten. Nor is a folder left by what fails.
        fails(&flags, 2, "is not empty");
        let none = dir.join("none");
        let at = flags.iter().position(|flag| *flag == str(&out)).unwrap();
        flags[at] = str(&none);
        let task = flags.iter().position(|flag| *flag == "1").unwrap();
        flags[task] = "77";
        fails(&flags, 2, "--task: task \"77\" is not known");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }
}

#[test]
fn what_cannot_be_exported_leaves_nothing() {
    let dir = scratch("export-bad");
    let (base, adapter) = (case("tiny").join("base"), case("tiny").join("adapter"));
    let out = dir.join("out");
    let export = |more: &[&'static str], model: &Path, code, message| {
        let mut flags = vec!["export", "--adapter", str(&adapter), "--output-dir", str(&out)];
        flags.extend(["--model", str(model)]);
        flags.extend(more);
        fails(&flags, code, message);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    };
    export(&[], &base, 2, "the adapter has 3 tasks: name one with --task");
    export(&["--task", "x"], &base, 2, "--task: task \"x\" is not known");
    export(&["--routing", "mean"], &base, 2, "--routing: expected \"average\"");
    export(
        &["--routing", r#"{"weights": [1]}"#],
        &base,
        2,
        "1 weights, but the adapter has 2 skills",
    );
    export(&["--task", "0"], &case("v11-untied").join("base"), 3, "adapter_model.safetensors");
    export(&["--task", "0", "--device", "cuda"], &base, 2, "export runs on the CPU");
    // A sum that f16 cannot hold.
    let huge = dir.join("huge");
    let f16 = case("f16");
    let files = polytape::formats::adapter::AdapterFiles::open(f16.join("adapter")).unwrap();
    let mut modules = files.modules;
    for module in modules.values_mut() {
        module.lora_b.values.iter_mut().for_each(|b| *b = 1e6);
    }
    polytape::formats::adapter::save_adapter(&huge, &files.config, &modules, None).unwrap();
    let (base, out) = (f16.join("base"), dir.join("out"));
    let mut flags = vec!["export", "--merged", "--model", str(&base), "--adapter", str(&huge)];
    flags.extend(["--task", "0", "--output-dir", str(&out)]);
    fails(&flags, 1, "is not finite in f16 with the adapter merged; nothing was written");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

/// Rows say how they are mixed: a task, weights, a blend, the average. Each row is as it would be alone.
#[test]
fn rows_are_mixed_as_they_say() {
    let dir = scratch("mixing");
    let (base, adapter) = (case("tiny").join("base"), case("tiny").join("adapter"));
    let routings = [
        json!({"task": 1}),
        json!({"weights": [0.25, 0.75]}),
        json!({"weights": [1, 0, 0.5, 0.5]}),
        json!({"blend": {"0": 1, "2": 3}}),
        json!("average"),
    ];
    let with = |routing: Option<&Value>| {
        rows_of(&dir, "tiny", |i, row| match routing {
            Some(routing) => row["routing"] = routing.clone(),
            None => row["routing"] = routings[i].clone(),
        })
    };
    let together = nll(&dir, &base, Some(&adapter), &with(None));
    let mut seen = Vec::new();
    for (i, routing) in routings.iter().enumerate() {
        let alike = nll(&dir, &base, Some(&adapter), &with(Some(routing)));
        assert_eq!(alike[i], together[i], "{routing}: a row's bits do not depend on the others");
        // The same mixture as a LoRA, which knows nothing of routing.
        let lora = dir.join(format!("lora-{i}"));
        let routing = routing.to_string();
        let mut flags = vec!["export", "--model", str(&base), "--adapter", str(&adapter)];
        flags.extend(["--routing", &routing, "--output-dir", str(&lora)]);
        ok(&flags);
        let exported = nll(&dir, &base, Some(&lora), &rows_of(&dir, "tiny", |_, _| ()));
        assert_near(&exported, &alike, 1e-5, &routing);
        seen.push(alike[0]);
    }
    // For all rows that do not say it themselves.
    let out = dir.join("all.jsonl");
    let common = ["eval", "--model", str(&base), "--adapter", str(&adapter), "--dtype", "f32"];
    let evaluated = |data: &Path, more: &[&str]| {
        let flags =
            ["--generate", "off", "--overwrite", "--per-example", str(&out), "--data", str(data)];
        ok(&[&common[..], &flags, more].concat());
        lines(&out).iter().map(|row| row["nll"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    for routing in [&routings[2], &routings[3]] {
        let alike = nll(&dir, &base, Some(&adapter), &with(Some(routing)));
        let plain = rows_of(&dir, "tiny", |_, _| ());
        assert_eq!(evaluated(&plain, &["--routing", &routing.to_string()]), alike);
    }
    let average = nll(&dir, &base, Some(&adapter), &with(Some(&routings[4])));
    let own = rows_of(&dir, "tiny", |i, row| {
        if i == 0 {
            row["routing"] = routings[0].clone()
        }
    });
    let mixed = evaluated(&own, &["--routing", "average"]);
    assert_eq!((mixed[0], &mixed[1..]), (together[0], &average[1..]));
    let plain = rows_of(&dir, "tiny", |_, _| ());
    let refused = ["--generate", "off", "--data", str(&plain), "--routing", r#"{"weights": [1]}"#];
    fails(&[&common[..], &refused].concat(), 3, "tiny-rows.jsonl:1: --routing: 1 weights");
    let refused = ["--generate", "off", "--data", str(&plain), "--routing", "{"];
    fails(&[&common[..], &refused].concat(), 2, "--routing: malformed JSON, column 1");

    let by_task = rows_of(&dir, "tiny", |_, row| row["task_id"] = json!(1));
    assert_eq!(nll(&dir, &base, Some(&adapter), &by_task)[0], seen[0], "a task, said otherwise");
    seen.sort_by(f64::total_cmp);
    assert!(seen.windows(2).all(|pair| pair[1] - pair[0] > 1e-4), "all differ: {seen:?}");

    // Nothing is half-written: one bad row of many names its line.
    let answers = dir.join("answers.jsonl");
    for (routing, reason) in [
        (json!({"weights": [1, 0, 0]}), "3 weights, but the adapter has 2 skills: expected 2 or 4"),
        (json!({"weights": [1, -1]}), "weights must be finite and 0 or more, found -1"),
        (json!({"weights": [1, "NaN"]}), "weights: expected a number, found a string"),
        (json!({"blend": {"0": 1, "nope": 1}}), "task \"nope\" is not known"),
        (json!({"mix": 1}), "expected \"average\""),
    ] {
        let rows = rows_of(&dir, "tiny", |i, row| {
            if i == 3 {
                row["routing"] = routing.clone();
            }
        });
        let mut flags = vec!["generate", "--model", str(&base), "--adapter", str(&adapter)];
        flags.extend(["--data", str(&rows), "--output", str(&answers)]);
        fails(&flags, 3, &format!("tiny-rows.jsonl:4: field routing: {reason}"));
        assert!(!answers.exists());
    }
    let rows = with(Some(&json!("average")));
    let out = dir.join("out");
    let train = ["train", "--model", str(&base), "--data", str(&rows), "--output-dir", str(&out)];
    fails(&train, 3, "tiny-rows.jsonl:1: field routing: is for eval and generate");
    // A generation takes the same; the base alone and a LoRA have no tasks to choose from.
    let mut flags = vec!["generate", "--model", str(&base), "--adapter", str(&adapter)];
    flags.extend(["--data", str(&rows), "--output", str(&answers), "--max-new-tokens", "3"]);
    ok(&flags);
    assert_eq!(lines(&answers)[0]["routing"], "average");
}

/// What is wrong in an adapter's configuration is said of its file.
#[test]
fn a_bad_adapter_configuration_names_its_file() {
    let dir = scratch("adapter-config");
    let (base, adapter) = (case("tiny").join("base"), dir.join("adapter"));
    fs::create_dir_all(&adapter).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(case("tiny").join("adapter").join(file), adapter.join(file)).unwrap();
    }
    let path = adapter.join("adapter_config.json");
    let mut config: Value = serde_json::from_str(&text(&path)).unwrap();
    config["target_modules"] = json!(["nothing"]);
    fs::write(&path, config.to_string()).unwrap();
    let rows = rows_of(&dir, "tiny", |_, _| ());
    let eval = ["eval", "--model", str(&base), "--adapter", str(&adapter), "--data", str(&rows)];
    fails(&eval, 3, "adapter_config.json: target_modules [\"nothing\"] matches nothing");
}

fn lora(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lora").join(name)
}

/// The rows of `tests/data/lora/expected.json`, with what `more` adds, and the nll that PEFT gives them
/// with a LoRA.
fn lora_rows(dir: &Path, more: impl Fn(&mut Value)) -> std::path::PathBuf {
    let expected: Value = serde_json::from_str(&text(&lora("expected.json"))).unwrap();
    let rows = expected["rows"].as_array().unwrap().iter().map(|row| {
        let mut row = row.clone();
        more(&mut row);
        format!("{row}\n")
    });
    let path = dir.join("lora-rows.jsonl");
    fs::write(&path, rows.collect::<String>()).unwrap();
    path
}

fn lora_nll(name: &str) -> Vec<f64> {
    let expected: Value = serde_json::from_str(&text(&lora("expected.json"))).unwrap();
    expected["nll"][name].as_array().unwrap().iter().map(|nll| nll.as_f64().unwrap()).collect()
}

/// A LoRA's patterns of ranks and alphas and its rank-stabilised scale are PEFT's; a task that uses one
/// skill is that LoRA.
#[test]
fn loras_are_read_and_become_skills() {
    let dir = scratch("import");
    let base = case("tiny").join("base");
    let plain = lora_rows(&dir, |row| row["task"] = json!("any name: a LoRA has no tasks"));
    for name in ["peft", "one", "two"] {
        assert_near(&nll(&dir, &base, Some(&lora(name)), &plain), &lora_nll(name), 1e-5, name);
    }
    assert!(lora_nll("one").iter().zip(lora_nll("two")).all(|(a, b)| (a - b).abs() > 1e-2));
    let import = |name: &str, more: &[&str]| {
        let out = dir.join(name);
        let (one, two) = (lora("one"), lora("two"));
        let mut flags = vec!["import", "--model", str(&base), "--lora", str(&one), str(&two)];
        flags.extend(["--output-dir", str(&out), "--json"]);
        flags.extend(more);
        let said: Value = serde_json::from_str(ok(&flags).trim()).unwrap();
        (out, said)
    };
    for (splits, more) in [("1", "--one-hot"), ("2", "--one-hot")] {
        let (out, said) = import(&format!("hot-{splits}"), &["--n-splits", splits, more]);
        assert_eq!(said["tasks"], json!(["one", "two"]));
        assert_eq!((&said["r"], &said["n_skills"]), (&json!(4), &json!(2)));
        // q, v and wo of one, k and v of two: 3 attentions, 2 feed-forward layers.
        assert_eq!((&said["linears"], &said["filled_with_zeros"]), (&json!(11), &json!(3 + 5)));
        for name in ["one", "two"] {
            let rows = lora_rows(&dir, |row| row["task"] = json!(name));
            let what = format!("{name} of {splits} splits");
            assert_near(&nll(&dir, &base, Some(&out), &rows), &lora_nll(name), 1e-5, &what);
        }
        assert!(out.join("routing.json").exists(), "such routers do not learn");
    }
    // Without, the mixture is uniform, and the router alone can learn.
    let (out, said) = import("uniform", &["--n-tasks", "5"]);
    assert_eq!((&said["n_tasks"], &said["tasks"]), (&json!(5), &Value::Null));
    let files = polytape::formats::adapter::AdapterFiles::open(&out).unwrap();
    assert!(files.modules.values().all(|m| m.router_logits == [0.0; 10]));
    let rows = lora_rows(&dir, |row| row["task_id"] = json!(4));
    let weights = lora_rows(&dir.join("."), |row| row["routing"] = json!({"weights": [0.5, 0.5]}));
    let uniform = nll(&dir, &base, Some(&out), &weights);
    lora_rows(&dir, |row| row["task_id"] = json!(4));
    assert_near(&nll(&dir, &base, Some(&out), &rows), &uniform, 1e-6, "uniform");
    let trained = dir.join("trained");
    let mut flags = vec!["train", "--model", str(&base), "--data", str(&rows), "--max-steps", "2"];
    flags.extend(["--adapter-init", str(&out), "--output-dir", str(&trained)]);
    ok(&flags);

    let routed = dir.join("routed");
    *flags.last_mut().unwrap() = str(&routed);
    flags.extend(["--tune", "router", "--save-steps", "1", "--json"]);
    let said = ok(&flags);
    let said: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(said["bank"]["n_changed"], 0);
    assert_eq!(said["bank"]["before"], said["bank"]["after"]);
    assert!(said["router"]["n_changed"].as_u64().unwrap() > 0, "{said}");
    let after = polytape::formats::adapter::AdapterFiles::open(&routed).unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for (path, old) in &files.modules {
        let new = &after.modules[path];
        assert_eq!(bits(&old.lora_a.values), bits(&new.lora_a.values), "{path}");
        assert_eq!(bits(&old.lora_b.values), bits(&new.lora_b.values), "{path}");
    }
    let is_same = |(path, old): (&String, &polytape::formats::adapter::AdapterModule)| {
        old.router_logits == after.modules[path].router_logits
    };
    assert!(!files.modules.iter().all(is_same), "the router learned nothing");
    flags.extend(["--resume", "--tune", "all"]);
    fails(&flags, 3, "tune was \"router\" in the run that is to be resumed and is \"all\" now");
    flags.extend(["--tune", "router"]);
    flags.retain(|flag| *flag != "--json");
    let said = ok(&flags);
    assert!(said.starts_with("bit-identical: A and B, "), "{said}");
}

/// The authors' names and layout: the same numbers under PEFT's names.
#[test]
fn the_authors_checkpoints_become_adapters() {
    let dir = scratch("authors");
    let (base, adapter) = (case("tiny").join("base"), case("tiny").join("adapter"));
    let bytes = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let renamed: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let name = name
                .replace("base_model.model.", "model.")
                .replace("poly_lora_A", "lora_a")
                .replace("poly_lora_B", "lora_b")
                .replace("poly_router", "selector");
            (name, view)
        })
        .collect();
    let write = |n: usize| {
        let path = dir.join("mhr.safetensors");
        let some = renamed.iter().take(n).map(|(name, view)| (name.as_str(), view.clone()));
        fs::write(&path, safetensors::serialize(some, None).unwrap()).unwrap();
        path
    };
    let (file, out) = (write(usize::MAX), dir.join("out"));
    let mut flags = vec!["import", "--model", str(&base), "--authors", str(&file)];
    flags.extend(["--output-dir", str(&out)]);
    ok(&flags);
    let read = |dir: &Path| polytape::formats::adapter::AdapterFiles::open(dir).unwrap();
    let (ours, theirs) = (read(&out), read(&adapter));
    assert_eq!(ours.modules, theirs.modules);
    let sizes =
        |c: &polytape::formats::poly_config::PolyConfig| (c.r, c.n_tasks, c.n_skills, c.n_splits);
    assert_eq!(sizes(&ours.config), sizes(&theirs.config));
    assert_eq!(ours.config.target_modules, theirs.config.target_modules);
    let rows = rows_of(&dir, "tiny", |_, _| ());
    let by = |adapter: &Path| nll(&dir, &base, Some(adapter), &rows);
    assert_eq!(by(&out), by(&adapter));

    fails(&flags, 2, "is not empty");
    fs::remove_dir_all(&out).unwrap();
    ok(&[&flags[..], &["--straight-through", "--poly_average_correction"]].concat());
    let config = fs::read_to_string(out.join("adapter_config.json")).unwrap();
    assert!(config.contains("\"poly+straight_through+average_correction\""), "{config}");
    assert_ne!(by(&out), by(&adapter));
    fs::remove_dir_all(&out).unwrap();
    write(7);
    fails(&flags, 3, "tensors are missing: \"model.");
    let pickled = dir.join("best.ckpt");
    fs::write(&pickled, b"PK\x03\x04 and more").unwrap();
    flags[4] = str(&pickled);
    fails(&flags, 3, "best.ckpt: this is a pickle, which can run code and is not read");
    fails(&flags, 3, "python scripts/convert_pickled.py FILE");
    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/convert_pickled.py").exists());
    assert!(!out.exists());
}

#[test]
fn loras_that_are_not_plain_are_refused() {
    let dir = scratch("import-bad");
    let (base, out, bad) = (case("tiny").join("base"), dir.join("out"), dir.join("bad"));
    fs::create_dir_all(&bad).unwrap();
    let import = |code, message: &str| {
        let mut flags = vec!["import", "--model", str(&base), "--lora", str(&bad)];
        flags.extend(["--output-dir", str(&out)]);
        fails(&flags, code, message);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    };
    let set = |key: &str, value: Value| {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(lora("one").join(file), bad.join(file)).unwrap();
        }
        let path = bad.join("adapter_config.json");
        let mut config: Value = serde_json::from_str(&text(&path)).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
    };
    for (key, value, message) in [
        ("use_dora", json!(true), "field use_dora: \"true\" is DoRA"),
        ("bias", json!("lora_only"), "field bias: \"\\\"lora_only\\\"\" trains biases"),
        ("modules_to_save", json!(["lm_head"]), "field modules_to_save"),
        ("init_lora_weights", json!("pissa_niter_4"), "changes the base's weights"),
        ("peft_type", json!("IA3"), "field peft_type: expected \"LORA\", found \"IA3\""),
        ("lora_alpha", json!("x"), "field lora_alpha"),
        ("rank_pattern", json!({"(": 2}), "field rank_pattern: \"(\" is not a pattern"),
        ("rank_pattern", json!({}), "lora_A.weight has shape [2, 36], not [3, 36]"),
        ("r", json!(4), "has shape [3, 24], not [4, 24]"),
    ] {
        set(key, value);
        import(3, message);
    }
    set("r", json!(3));
    fs::rename(bad.join("adapter_model.safetensors"), bad.join("adapter_model.bin")).unwrap();
    import(3, "adapter_model.bin: this is a pickle");
    // Of another base: the tiny one's widths are not those of this one.
    fs::remove_file(bad.join("adapter_model.bin")).unwrap();
    set("r", json!(3));
    let other = case("v11-untied").join("base");
    let mut flags = vec!["import", "--model", str(&other), "--lora", str(&bad)];
    flags.extend(["--output-dir", str(&out)]);
    fails(&flags, 3, "bad");
    flags.extend(["--one-hot", "-3"]);
    assert!(!crate::polytape(&flags).status.success());
    // PEFT adapters of other kinds are told apart.
    let rows = rows_of(&dir, "tiny", |_, _| ());
    set("peft_type", json!("IA3"));
    let eval = ["eval", "--model", str(&base), "--adapter", str(&bad), "--data", str(&rows)];
    fails(&eval, 3, "field peft_type: expected \"POLY\", found \"IA3\"");
}

/// Which layers a LoRA adapts is what its tensors say.
#[test]
fn layers_of_a_lora_are_those_of_its_tensors() {
    let dir = scratch("lora-layers");
    let (base, some) = (case("tiny").join("base"), dir.join("some"));
    fs::create_dir_all(&some).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(lora("one").join(file), some.join(file)).unwrap();
    }
    let path = some.join("adapter_config.json");
    for pattern in [json!("block"), json!(["block", "layer"])] {
        let mut config: Value = serde_json::from_str(&text(&path)).unwrap();
        config["layers_to_transform"] = json!([0]);
        config["layers_pattern"] = pattern;
        fs::write(&path, config.to_string()).unwrap();
        let rows = rows_of(&dir, "tiny", |_, _| ());
        let of = |lora: &Path| nll(&dir, &base, Some(lora), &rows);
        assert_eq!(of(&some), of(&lora("one")));
    }
}

/// What `inspect` says of an adapter holds together.
#[test]
fn an_adapter_is_looked_into() {
    let dir = scratch("inspect-adapter");
    let adapter = case("tiny").join("adapter");
    let (tree, skills) = (dir.join("tree.svg"), dir.join("skills.svg"));
    let mut flags = vec!["inspect", str(&adapter), "--json", "--dendrogram", str(&tree)];
    flags.extend(["--skills", str(&skills)]);
    let said: Value = serde_json::from_str(ok(&flags).trim()).unwrap();
    for svg in [&tree, &skills] {
        let svg = text(svg);
        assert!(
            svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN")
        );
    }
    assert!(text(&skills).contains("<title>skill 1, skill 1: 1.000</title>"));
    let number = |value: &Value| value.as_f64().unwrap();
    let layers = said["layers"].as_array().unwrap();
    assert_eq!(layers.len() as u64, said["linears"].as_u64().unwrap());
    for task in ["0", "1", "2"] {
        let mut mean = 0.0;
        for (column, weight) in said["mixing_weights"][task].as_array().unwrap().iter().enumerate()
        {
            let of = |layer: &Value| number(&layer["tasks"][task]["mixing_weights"][column]);
            let layers_mean = layers.iter().map(of).sum::<f64>() / layers.len() as f64;
            assert!((number(weight) - layers_mean).abs() < 1e-12);
        }
        for layer in layers {
            let effective = number(&layer["tasks"][task]["effective_skills"]);
            assert!((1.0..=2.0).contains(&effective), "{effective}");
            mean += effective / layers.len() as f64;
        }
        assert!((number(&said["effective_skills"][task]) - mean).abs() < 1e-12);
    }
    let mean = layers.iter().map(|layer| number(&layer["router"]["discreteness"])).sum::<f64>();
    let overall = number(&said["router"]["discreteness"]);
    assert!((mean / layers.len() as f64 - overall).abs() < 1e-12);
    for (matrix, n) in [("task_similarity", 3), ("skill_similarity", 2)] {
        for i in 0..n {
            assert!((number(&said[matrix][i][i]) - 1.0).abs() < 1e-9, "{matrix}");
            for j in 0..n {
                assert_eq!(said[matrix][i][j], said[matrix][j][i], "{matrix}");
            }
        }
    }
    assert!(ok(&["inspect", str(&lora("two"))]).contains("r 4, lora_alpha 2, rank-stabilised"));
    let shown = ok(&["inspect", str(&adapter), "--layers"]);
    assert!(shown.contains("decoder.block.0.layer.1.EncDecAttention.q, entropy "), "{shown}");
    assert!(shown.contains("share of their skills that tasks have in common"), "{shown}");
    let base = case("tiny").join("base");
    fails(&["inspect", str(&base), "--skills", str(&skills)], 2, "--skills is for adapter folders");
}

/// Several adapters together: each row uses its own, or the sum of some, and computes what it would
/// with that alone.
#[test]
fn rows_choose_their_adapters() {
    let dir = scratch("several");
    let (base, poly) = (case("tiny").join("base"), case("tiny").join("adapter"));
    let four = dir.join("four");
    let (one, two) = (lora("one"), lora("two"));
    let mut flags = vec!["import", "--model", str(&base), "--lora", str(&one), str(&two)];
    flags.extend(["--n-splits", "4", "--one-hot", "--output-dir", str(&four)]);
    ok(&flags);
    // Two splits, four, and LoRAs: as PEFT lays named adapters out, and by name.
    let peft = dir.join("peft");
    for name in ["one", "two"] {
        fs::create_dir_all(peft.join(name)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(lora(name).join(file), peft.join(name).join(file)).unwrap();
        }
    }
    let (named, four_named) = (format!("poly={}", str(&poly)), format!("hot={}", str(&four)));
    let several = [named.as_str(), four_named.as_str(), str(&peft)];
    let eval = |rows: &Path, adapters: &[&str]| -> Vec<f64> {
        let per_example = dir.join("nll.jsonl");
        let mut flags = vec!["eval", "--model", str(&base), "--data", str(rows), "--dtype", "f32"];
        flags.push("--overwrite");
        flags.extend(["--generate", "off", "--per-example", str(&per_example), "--adapter"]);
        flags.extend(adapters);
        ok(&flags);
        lines(&per_example).iter().map(|row| row["nll"].as_f64().unwrap()).collect()
    };
    let with = |fields: Value| {
        lora_rows(&dir, move |row| {
            row.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        })
    };
    // A task of the first, by default.
    let of_poly = eval(&with(json!({"task_id": 1})), &[str(&poly)]);
    assert_near(&eval(&with(json!({"task_id": 1})), &several), &of_poly, 1e-5, "the first");
    let mut each = Vec::new();
    let average = eval(&with(json!({"routing": "average"})), &[str(&poly)]);
    let weights = json!({"weights": [0.25, 0.75, 0.5, 0.125]});
    let weighted = eval(&with(json!({"routing": weights})), &[str(&poly)]);
    for (fields, want) in [
        (json!({"adapter": "poly", "task_id": 1}), of_poly.clone()),
        (json!({"adapter": "one", "task": "of no account"}), lora_nll("one")),
        (json!({"adapter": ["two"]}), lora_nll("two")),
        (json!({"adapter": "hot", "task": "two"}), lora_nll("two")),
        (json!({"adapter": "poly", "routing": "average"}), average),
        (json!({"adapter": "poly", "routing": weights}), weighted),
    ] {
        let got = eval(&with(fields.clone()), &several);
        assert_near(&got, &want, 1e-5, &fields.to_string());
        each.push((fields, got));
    }
    // None: the base alone, beside several adapters and beside one of either kind.
    let base_alone = nll(&dir, &base, None, &with(json!({})));
    let none = with(json!({"adapter": []}));
    let first = format!("first={}", str(&poly));
    let plain = format!("plain={}", str(&one));
    for adapters in [&several[..], &[first.as_str()], &[str(&poly)], &[plain.as_str()]] {
        assert_near(&eval(&none, adapters), &base_alone, 1e-6, &format!("{adapters:?} left out"));
    }
    each.push((json!({"adapter": []}), eval(&none, &several)));
    // One that is the only one has a name as well; of a plain LoRA the task does not matter.
    let named = with(json!({"adapter": "first", "task_id": 1}));
    assert_eq!(eval(&named, &[first.as_str()]), of_poly);
    let named = with(json!({"adapter": "plain", "task": "of no account"}));
    assert_near(&eval(&named, &[plain.as_str()]), &lora_nll("one"), 1e-5, "a LoRA by its name");
    // The sum of two: the one merged into the base, the other on it.
    let merged = dir.join("merged");
    let mut flags = vec!["export", "--merged", "--model", str(&base), "--adapter", str(&poly)];
    flags.extend(["--task", "1", "--output-dir", str(&merged)]);
    ok(&flags);
    let want = nll(&dir, &merged, Some(&one), &with(json!({})));
    let fields = json!({"adapter": ["poly", "one"], "task_id": 1});
    let got = eval(&with(fields.clone()), &several);
    assert_near(&got, &want, 1e-5, "the sum");
    assert!(got.iter().zip(&of_poly).all(|(sum, one)| (sum - one).abs() > 1e-3));
    each.push((fields, got));
    // All in one file: a row's bits are its own.
    let rows: Vec<Value> = lines(&with(json!({})));
    let mixed = dir.join("mixed.jsonl");
    let mut want = Vec::new();
    let all = each.iter().enumerate().map(|(i, (fields, alone))| {
        let mut row = rows[i % rows.len()].clone();
        row.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        want.push(alone[i % rows.len()]);
        format!("{row}\n")
    });
    fs::write(&mixed, all.collect::<String>()).unwrap();
    assert_eq!(eval(&mixed, &several), want);

    let bad = |fields: Value, adapters: &[&str], code, message: &str| {
        let rows = with(fields);
        let mut flags = vec!["eval", "--model", str(&base), "--data", str(&rows), "--adapter"];
        flags.extend(adapters);
        fails(&flags, code, message);
    };
    let known = "known: \"poly\", \"hot\", \"one\", \"two\"";
    bad(
        json!({"adapter": "x"}),
        &several,
        3,
        &format!("rows.jsonl:1: field adapter: \"x\" is not known; {known}"),
    );
    bad(json!({"adapter": 1}), &several, 3, "expected a name or a list of names");
    bad(
        json!({"adapter": "poly"}),
        &several,
        3,
        "rows.jsonl:1: the row has neither task nor task_id",
    );
    bad(
        json!({"adapter": "poly", "task_id": 0}),
        &[str(&poly)],
        3,
        "field adapter: \"poly\" is not known; known: \"adapter\"",
    );
    bad(json!({"task_id": 0}), &[str(&poly), str(&poly)], 2, "two adapters are called \"adapter\"");
    let empty = dir.join("empty");
    fs::create_dir_all(&empty).unwrap();
    bad(json!({"task_id": 0}), &[str(&empty)], 3, "neither adapter_config.json nor a sub-folder");
}
