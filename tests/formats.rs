//! Bad files, one by one: each is refused with exit code 3 (1 for what cannot be written) and a
//! message that says where, what and what to do. Good ones of the shared models are read.

#![allow(clippy::unwrap_used)] // Its helpers are test code, too.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/skipped.rs"]
mod skipped;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use folder::Folder;
use polytape::{
    Dtype, Error, Result,
    activation::Activation,
    formats::{
        adapter::{AdapterFiles, AdapterModule, Bank, save_adapter},
        checkpoint::{Checkpoint, Fate},
        config::{GenerationConfig, ModelConfig},
        poly_config::{PolyConfig, TargetModules},
        rows::{Row, RowReader, Targets},
        safetensors::{SafetensorsFile, write_safetensors},
        tasks::TaskNames,
    },
};

impl Folder {
    /// Writes a safetensors file of one-row tensors.
    fn tensors(&self, name: &str, tensors: &[&str]) {
        let shape: &[usize] = &[1, 2];
        let tensors: Vec<_> = tensors.iter().map(|&name| (name, shape, &[1.0, 2.0][..])).collect();
        write_safetensors(&self.0.join(name), &tensors).unwrap();
    }
}

/// A safetensors file from its header and the number of its data bytes.
fn safetensors(header: &str, n_data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; n_data]].concat()
}

/// The refusal has exit code 3 and says all of `parts`.
#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted, not refused with {parts:?}") };
    assert_eq!(error.exit_code(), 3, "{error}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message}\nlacks: {part}");
    }
    assert!(!message.ends_with('.') && message.len() < 2000, "{message}");
}

#[test]
fn safetensors_files() {
    let folder = Folder::new("safetensors");
    let two = |second: &str| {
        format!(r#"{{"x":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"y":{second}}}"#)
    };
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        two(&format!(r#"{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}"#))
    };
    let good = entry("BF16", "2,2", "8,16");
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        (
            "truncated",
            safetensors(&good, 15),
            &["need 16 bytes of data, the file has 15", "truncated"],
        ),
        ("no-header", safetensors(&good, 0)[..40].to_vec(), &["but only 32 follow", "truncated"]),
        ("trailing", safetensors(&good, 17), &["1 bytes after the last tensor"]),
        (
            "overlapping",
            safetensors(&entry("F32", "2", "4,12"), 12),
            &["\"y\" begins at byte 4", "inside \"x\""],
        ),
        ("hole", safetensors(&entry("F32", "1", "12,16"), 16), &["4 bytes before tensor \"y\""]),
        (
            "oversized",
            u64::MAX.to_le_bytes().to_vec(),
            &["18446744073709551615 bytes", "16777216", "100000000"],
        ),
        (
            "dtype",
            safetensors(&entry("F33", "2", "8,16"), 16),
            &["tensor \"y\"", "unknown dtype \"F33\""],
        ),
        (
            "size",
            safetensors(&entry("F32", "3", "8,16"), 16),
            &["tensor \"y\" has 8 bytes", "needs 12"],
        ),
        (
            "dims",
            safetensors(&entry("F32", "2,1,1,1,1,1,1,1,1", "8,16"), 16),
            &["more than 8 dimensions"],
        ),
        (
            "overflow",
            safetensors(&entry("F32", "4294967296,4294967296,4294967296", "8,16"), 16),
            &["larger than"],
        ),
        ("empty", vec![], &["this one has 0"]),
    ];
    for (name, bytes, parts) in cases {
        let path = folder.file(name, bytes);
        let place = path.display().to_string();
        refused(SafetensorsFile::open(&path), &[parts, &[place.as_str()][..]].concat());
    }
    refused(SafetensorsFile::open(&folder.0), &["found a directory"]);
    refused(SafetensorsFile::open(folder.0.join("absent")), &["cannot open", "absent"]);

    // A type that the format knows may stand in a file; asking for it is the error.
    let path = folder.file("i64", safetensors(&entry("I64", "1", "8,16"), 16));
    let file = SafetensorsFile::open(path).unwrap();
    assert_eq!(file.tensor("x").unwrap().unwrap().0.to_f32(), [0.0; 2]);
    refused(file.tensor("y"), &["tensor \"y\" has dtype I64", "F32, BF16 and F16"]);
}

#[test]
fn model_folders() {
    let folder = Folder::new("model");
    let index = |entries: &str| {
        folder.file("model.safetensors.index.json", format!(r#"{{"weight_map":{{{entries}}}}}"#))
    };
    refused(Checkpoint::open(&folder.0), &["not a model folder"]);
    folder.file("pytorch_model.bin", "");
    refused(Checkpoint::open(&folder.0), &["pickle", "safe_serialization=True"]);

    folder.tensors("a.safetensors", &["x", "y"]);
    index(r#""x":"a.safetensors","y":"b.safetensors""#);
    refused(Checkpoint::open(&folder.0), &["shard b.safetensors", "missing"]);
    index(r#""x":"a.safetensors","y":"a.safetensors","z":"a.safetensors""#);
    refused(
        Checkpoint::open(&folder.0),
        &["\"z\" is said to be in a.safetensors, which does not have it"],
    );
    index(r#""x":"a.safetensors""#);
    refused(Checkpoint::open(&folder.0), &["has tensor \"y\", which the index does not list"]);
    index(r#""x":"../../etc/passwd""#);
    refused(Checkpoint::open(&folder.0), &["\"../../etc/passwd\" is not a bare file name"]);
    folder.tensors("b.safetensors", &["y"]);
    index(r#""x":"a.safetensors","y":"b.safetensors""#);
    refused(Checkpoint::open(&folder.0), &["tensor \"y\" is also in"]);

    folder.tensors("model.safetensors", &["m.q.weight", "m.k.weight"]);
    let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
    refused(checkpoint.tensor("m.q.weight", &[2, 2]), &["m.q.weight has shape [1, 2], not [2, 2]"]);
    refused(
        checkpoint.tensor("m.v.weight", &[1, 2]),
        &["m.v.weight of shape [1, 2] is missing", "\"m.k.weight\""],
    );
    checkpoint.tensor("m.q.weight", &[1, 2]).unwrap();
    refused(checkpoint.finish(), &["1 tensors belong to no part", "\"m.k.weight\""]);

    for (config, parts) in [
        (
            r#"{"model_type":"mamba"}"#,
            &["field model_type", "\"mamba\" is not supported", "t5, mt5"][..],
        ),
        (r#"{"model_type":"t5","d_ff":0}"#, &["field d_ff", "found 0"]),
        (r#"{"model_type":"t5","quantization_config":{"bits":4}}"#, &["field quantization_config"]),
        (r#"{"model_type":"t5""#, &["EOF"]),
        ("{}", &["model_type is missing"]),
    ] {
        folder.file("config.json", config);
        refused(ModelConfig::open(&folder.0), &[parts, &["config.json"]].concat());
    }
    folder.file("config.json", vec![b' '; (1 << 20) + 1]);
    refused(ModelConfig::open(&folder.0), &["larger than 1048576 bytes"]);
}

#[test]
fn links_out_of_the_folder_are_followed() {
    #[cfg(unix)]
    {
        let folder = Folder::new("links");
        folder.tensors("blob", &["x"]);
        let model = folder.0.join("snapshot");
        fs::create_dir(&model).unwrap();
        std::os::unix::fs::symlink("../blob", model.join("model.safetensors")).unwrap();
        assert_eq!(Checkpoint::open(&model).unwrap().names().collect::<Vec<_>>(), ["x"]);
    }
}

fn small_adapter() -> (PolyConfig, BTreeMap<String, AdapterModule>) {
    let config = PolyConfig {
        task_type: Some("SEQ_2_SEQ_LM".to_owned()),
        target_modules: Some(TargetModules::List(["q".to_owned()].into())),
        r: 1,
        n_tasks: 2,
        n_skills: 2,
        ..PolyConfig::default()
    };
    let module = AdapterModule {
        lora_a: Bank { shape: [1, 2, 2, 1], values: vec![0.5; 4] },
        lora_b: Bank { shape: [1, 2, 1, 3], values: vec![0.0; 6] },
        router_logits: vec![0.0; 4],
    };
    (config, BTreeMap::from([("m.q".to_owned(), module)]))
}

#[test]
fn adapter_folders() {
    let folder = Folder::new("adapter");
    let (config, modules) = small_adapter();
    save_adapter(&folder.0, &config, &modules, None).unwrap();
    assert_eq!(AdapterFiles::open(&folder.0).unwrap().modules, modules);

    let open = |tensors: &[(&str, &[usize])]| {
        let tensors: Vec<(String, &[usize], Vec<f32>)> = tensors
            .iter()
            .map(|&(name, shape)| {
                (format!("base_model.model.{name}"), shape, vec![0.0; shape.iter().product()])
            })
            .collect();
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, shape, values)| (name.as_str(), *shape, &values[..]))
            .collect();
        write_safetensors(&folder.0.join("adapter_model.safetensors"), &views).unwrap();
        AdapterFiles::open(&folder.0)
    };
    let a: (&str, &[usize]) = ("m.q.poly_lora_A", &[1, 2, 2, 1]);
    let b: (&str, &[usize]) = ("m.q.poly_lora_B", &[1, 2, 1, 3]);
    let z: (&str, &[usize]) = ("m.q.poly_router.module_logits", &[2, 2]);
    refused(
        open(&[("m.q.poly_lora_A", &[2, 1, 2, 1]), b, z]),
        &["has shape [2, 1, 2, 1], not [1, 2, 2, 1]"],
    );
    refused(
        open(&[a, b, ("m.q.poly_router.module_logits", &[3, 2])]),
        &["has shape [3, 2], not [2, 2]"],
    );
    refused(open(&[a, b]), &["missing", "module_logits"]);
    refused(
        open(&[a, b, z, ("m.q.lora_A.weight", &[1])]),
        &["not of a Poly adapter", "m.q.lora_A.weight"],
    );
    open(&[a, b, z]).unwrap();

    for (tasks, part) in [
        (r#"{"tasks":["x"]}"#, "1 names, but n_tasks in adapter_config.json is 2"),
        (r#"{"tasks":["x","y","z"]}"#, "3 names, but n_tasks"),
        (r#"{"tasks":["x","x"]}"#, "the same name \"x\""),
    ] {
        folder.file("tasks.json", tasks);
        refused(AdapterFiles::open(&folder.0), &["tasks.json", part]);
    }
    folder.file("adapter_config.json", r#"{"peft_type":"LORA","r":8}"#);
    refused(
        AdapterFiles::open(&folder.0),
        &["adapter_config.json", "expected \"POLY\", found \"LORA\""],
    );
    folder.file("adapter_config.json", r#"{"peft_type":"POLY"}"#);
    fs::remove_file(folder.0.join("adapter_model.safetensors")).unwrap();
    folder.file("adapter_model.bin", "");
    refused(
        AdapterFiles::open(&folder.0),
        &["adapter_model.bin", "pickle", "scripts/convert_pickled.py"],
    );
}

#[test]
fn data_files() {
    let folder = Folder::new("data");
    let read = |text: &str| -> Result<Vec<Row>> {
        RowReader::open(folder.file("d.jsonl", text), Targets::Required)?.collect()
    };
    let good = "{\"task\":\"a\",\"input\":\"x\",\"target\":\"y\"}\n";
    refused(read(""), &["d.jsonl: there are no rows"]);
    for (line, part) in [
        ("{\"input\": x}", "column 11: malformed JSON"),
        ("{\"input\":\"x\",\"target\":\"\"}", "the target is empty"),
        ("{\"input\":\"\",\"target\":\"y\"}", "the input is empty"),
        ("{\"input_ids\":[1],\"label_ids\":[-1]}", "found -1"),
        ("{\"input_ids\":[1],\"label_ids\":[-100]}", "the target is empty"),
        ("{\"task_id\":-1,\"input\":\"x\",\"target\":\"y\"}", "field task_id"),
        ("{\"target\":\"y\"}", "neither input nor input_ids"),
    ] {
        refused(read(&format!("{good}\n{good}{line}\n")), &["d.jsonl:4: ", part]);
    }
    let rows =
        read(&format!("{good}{{\"task\":\"b\",\"input\":\"x\",\"target\":\"y\"}}\n")).unwrap();
    let path = folder.0.join("d.jsonl");
    let tasks = TaskNames::from_rows(rows.iter().map(|row| (path.as_path(), row))).unwrap();
    assert_eq!(tasks.to_list(), Some(vec!["a".to_owned(), "b".to_owned()]));
    let others = TaskNames::from_list(&["a".to_owned()]).unwrap();
    refused(others.resolve(&rows[1], &path), &["d.jsonl:2: task \"b\" is not known"]);
}

#[cfg(feature = "cli")]
#[test]
fn tokenizer_ids_beyond_the_embedding() {
    let folder = Folder::new("tokenizer");
    let json = r#"{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":9},"unk_token":"a"},"added_tokens":[]}"#;
    folder.file("tokenizer.json", json);
    let open = |rows| polytape::formats::tokenizer::Tokenizer::open(&folder.0, rows);
    refused(open(9), &["tokenizer.json", "token \"b\" has id 9", "embedding has 9 rows"]);
    open(10).unwrap();
}

#[test]
fn unwritable_output_folders() {
    let folder = Folder::new("unwritable");
    let (config, modules) = small_adapter();
    // A file stands where a folder should: this fails for root, too.
    let file = folder.file("file", "");
    for dir in [file.clone(), file.join("deeper")] {
        let error = save_adapter(&dir, &config, &modules, None).unwrap_err();
        assert_eq!(error.exit_code(), 1, "{error}");
        assert!(
            error.to_string().starts_with(&format!("cannot create {}", dir.display())),
            "{error}"
        );
    }
    let error = write_safetensors(&folder.0.join("absent/f"), &[]).unwrap_err();
    assert!(matches!(error, Error::Io { operation: "create", .. }), "{error}");
}

#[test]
fn the_shared_t5_is_read() {
    let shared = std::env::var_os("POLYTAPE_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let folder = shared.join("models/superni-t5-mini");
    if !folder.exists() {
        let folder = folder.display();
        skipped::skipped(format_args!("{folder} is not there (set POLYTAPE_SHARED)"));
        return;
    }
    let model = ModelConfig::open(&folder).unwrap();
    let ModelConfig::T5(config) = &model else { panic!("a T5, found {model:?}") };
    assert_eq!(
        (config.d_model, config.d_kv, config.num_heads, config.vocab_size),
        (256, 32, 8, 8192)
    );
    assert_eq!((config.activation, config.gated), (Activation::GeluNew, true));
    assert_eq!((config.dtype, config.scales_head()), (Some(Dtype::Bf16), false));
    let generation = GenerationConfig::open(&folder, &model).unwrap();
    assert_eq!((generation.eos_token_ids, generation.decoder_start_token_id), (vec![1], Some(0)));

    let mut checkpoint = Checkpoint::open(&folder).unwrap();
    let embedding = checkpoint.tensor("shared.weight", &[8192, 256]).unwrap();
    assert_eq!((embedding.dtype(), embedding.rows(), embedding.cols()), (Dtype::Bf16, 8192, 256));
    assert!(embedding.to_f32().iter().all(|value| value.is_finite()));
    assert!(checkpoint.try_tensor("lm_head.weight", &[8192, 256]).unwrap().is_none());
    let others: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    for name in &others {
        checkpoint.ignore(name, "not looked at");
    }
    for file in checkpoint.mapped_files() {
        file.verify_unchanged().unwrap();
    }
    let uses = checkpoint.finish().unwrap();
    assert_eq!(uses.iter().filter(|tensor| tensor.fate == Fate::Used).count(), 1);

    let rows = shared.join("data/superni-small/train.jsonl");
    let rows_read: Vec<Row> =
        RowReader::open(&rows, Targets::Required).unwrap().collect::<Result<_>>().unwrap();
    let tasks = TaskNames::from_rows(rows_read.iter().map(|row| (rows.as_path(), row))).unwrap();
    assert_eq!((tasks.n_tasks(), tasks.to_list().map(|list| list.len())), (32, Some(32)));
}
