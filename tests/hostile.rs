//! Files that somebody made to hurt: each is refused, with a clear error, in bounded time and memory.
//! The limits are in `SECURITY.md`. What is merely wrong in a file is in `tests/formats.rs` and beside
//! the readers.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

#[path = "common/folder.rs"]
mod folder;
#[path = "../fuzz/src/memory.rs"]
#[allow(dead_code)]
mod memory;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use folder::Folder;
use polytape::{
    Error, Result,
    formats::{
        adapter::AdapterFiles,
        checkpoint::Checkpoint,
        config::{GenerationConfig, ModelConfig},
        poly_config::{PolyConfig, TargetModules},
        rows::{RowReader, Targets},
        safetensors::SafetensorsFile,
        tasks::TaskNames,
        tokenizer::Tokenizer,
    },
    model::{Module, ModuleKind, routing::Routing, targets::resolve},
};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

const MIB: usize = 1 << 20;

/// A refusal that blames the input, names its place, is short and printable; within ten seconds (of a
/// busy machine) and this much memory.
#[track_caller]
fn refused<T>(what: &str, max_bytes: usize, part: &str, read: impl FnOnce() -> Result<T>) {
    let start = Instant::now();
    let (result, peak) = memory::peak_bytes(|| read().err());
    let elapsed = start.elapsed();
    let error = result.unwrap_or_else(|| panic!("{what} was accepted"));
    let message = error.to_string();
    assert_eq!(error.exit_code(), 3, "{what}: {message}");
    assert!(message.contains(part), "{what}: {message}\nlacks: {part}");
    assert!(message.len() < 4000 && !message.chars().any(char::is_control), "{what}: {message}");
    assert!(elapsed < Duration::from_secs(10), "{what} took {elapsed:?}");
    assert!(peak <= max_bytes, "{what} took {peak} bytes, not {max_bytes}");
}

fn safetensors(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

#[test]
fn header_bombs() {
    let folder = Folder::new("headers");
    let open = |path: PathBuf| move || SafetensorsFile::open(path);

    // 99 MB of header are refused by its length alone: nothing of it is read.
    let path = folder.file("m", 99_000_000_u64.to_le_bytes());
    fs::File::options().write(true).open(&path).unwrap().set_len(99_000_008).unwrap();
    let start = Instant::now();
    refused("99 MB of header", 64 << 10, "at most 16777216", open(path));
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());

    // As many empty tensors as 16 MiB hold: more than a file may have.
    let entry =
        |i: usize| format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let entries: Vec<String> = (0..270_000).map(entry).collect();
    let bomb = safetensors(&format!("{{{}}}", entries.join(",")));
    assert!(bomb.len() <= 16 * MIB, "{}", bomb.len());
    let limit = 4 * bomb.len() + MIB;
    refused("270,000 tensors", limit, "262144", open(folder.file("m", &bomb)));

    // A million dimensions, a million names of metadata, a name of a megabyte, a million brackets.
    let million = |item: &str| vec![item; 1_000_000].join(",");
    for (what, header, part) in [
        (
            "a million dimensions",
            format!(
                "{{\"t\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[0,0]}}}}",
                million("1")
            ),
            "more than 8 dimensions",
        ),
        (
            "a long name",
            format!(
                "{{\"{}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}}}",
                "n".repeat(MIB)
            ),
            "at most 512",
        ),
        ("deep nesting", format!("{{\"t\":{}", "[".repeat(MIB)), "tensor \"t\""),
        ("deep metadata", format!("{{\"__metadata__\":{}", "{\"a\":".repeat(MIB)), "m: "),
        ("a long number", format!("{{\"t\":{{\"shape\":[{}", "9".repeat(MIB)), "tensor \"t\""),
    ] {
        let bytes = safetensors(&header);
        let limit = 4 * bytes.len() + MIB;
        refused(what, limit, part, open(folder.file("m", &bytes)));
    }
}

#[test]
fn indices_that_lead_elsewhere() {
    let folder = Folder::new("index");
    let outside = folder.0.join("outside.safetensors");
    fs::write(&outside, safetensors("{}")).unwrap();
    fs::create_dir(folder.0.join("model")).unwrap();
    let model = folder.0.join("model");
    let index = |shard: &str| {
        let json = serde_json::json!({"weight_map": {"x": shard}}).to_string();
        fs::write(model.join("model.safetensors.index.json"), json).unwrap();
    };
    for shard in [
        "../outside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/x.safetensors",
        "./x.safetensors",
        "..\\outside.safetensors",
        "C:\\x.safetensors",
        "x\0.safetensors",
        "../model/../outside.safetensors",
    ] {
        index(shard);
        let open = || Checkpoint::open(&model);
        refused(&format!("shard {shard:?}"), MIB, "is not a bare file name", open);
    }
    // 70 MB of index, 5,000 shards, brackets without end.
    let path = model.join("model.safetensors.index.json");
    fs::write(&path, vec![b' '; 70_000_000]).unwrap();
    refused("70 MB of index", 200 * MIB, "larger than 67108864", || Checkpoint::open(&model));
    let entries: Vec<_> = (0..5000).map(|i| format!("\"{i}\":\"{i}.safetensors\"")).collect();
    fs::write(&path, format!("{{\"weight_map\":{{{}}}}}", entries.join(","))).unwrap();
    refused("5,000 shards", 8 * MIB, "4096", || Checkpoint::open(&model));
    fs::write(&path, "[".repeat(MIB)).unwrap();
    refused("brackets", 4 * MIB, "index.json", || Checkpoint::open(&model));
}

type Read<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// Every reader with the file that it reads.
fn readers(dir: &Path) -> Vec<(&'static str, Read<'_>)> {
    fn of<'a, T>(read: impl Fn() -> Result<T> + 'a) -> Read<'a> {
        Box::new(move || read().map(|_| ()))
    }
    let t5 = || {
        ModelConfig::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity/tiny/base"))
    };
    vec![
        ("config.json", of(move || ModelConfig::open(dir))),
        ("generation_config.json", of(move || GenerationConfig::open(dir, &t5()?))),
        ("model.safetensors", of(move || Checkpoint::open(dir))),
        ("adapter_config.json", of(move || PolyConfig::open(dir))),
        ("tasks.json", of(move || TaskNames::open(dir))),
        ("routing.json", of(move || Routing::open(dir))),
        ("tokenizer.json", of(move || Tokenizer::open(dir, 1000))),
        (
            "rows.jsonl",
            of(move || {
                RowReader::open(dir.join("rows.jsonl"), Targets::Optional)?
                    .collect::<Result<Vec<_>>>()
            }),
        ),
    ]
}

#[cfg(unix)]
#[test]
fn special_files() {
    let folder = Folder::new("special");
    for (name, read) in readers(&folder.0) {
        let path = folder.0.join(name);
        let fifo = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(fifo.is_ok_and(|status| status.success()), "mkfifo is part of every Unix");
        refused(&format!("a FIFO as {name}"), MIB, "pipe", &read);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        refused(&format!("a device as {name}"), MIB, "device", &read);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused(&format!("a folder as {name}"), MIB, "directory", &read);
        fs::remove_dir(&path).unwrap();
        // A link to itself.
        std::os::unix::fs::symlink(name, &path).unwrap();
        let error = read();
        if let Err(error) = error {
            assert!(
                matches!(
                    error,
                    Error::Io { .. }
                        | Error::File { .. }
                        | Error::Tensors { .. }
                        | Error::Config(_)
                ),
                "{error}"
            );
        }
        fs::remove_file(&path).unwrap();
    }
    // Both files of an adapter.
    let config = r#"{"peft_type":"POLY","r":2,"target_modules":["q"],"task_type":"SEQ_2_SEQ_LM"}"#;
    folder.file("adapter_config.json", config);
    let path = folder.0.join("adapter_model.safetensors");
    std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    refused("a device as an adapter", MIB, "device", || AdapterFiles::open(&folder.0));
}

#[test]
fn json_bombs() {
    let folder = Folder::new("json");
    for (name, read) in readers(&folder.0) {
        if name == "model.safetensors" {
            continue; // Not JSON; see above.
        }
        let path = folder.0.join(name);
        for (what, open) in [("brackets", "["), ("braces", "{\"a\":"), ("a string", "\"aaaaaaaa")] {
            fs::write(&path, open.repeat(60_000)).unwrap();
            let file = name.split('.').next().unwrap();
            refused(&format!("{what} as {name}"), 8 * MIB, file, &read);
        }
        // Right JSON, but of many levels: nobody recurses into what it does not know.
        fs::write(&path, format!("{{\"a\":{}1{}}}", "[".repeat(5000), "]".repeat(5000))).unwrap();
        let file = name.split('.').next().unwrap();
        refused(&format!("5,000 levels as {name}"), 8 * MIB, file, &read);
        fs::remove_file(&path).unwrap();
    }
    // A row without an end, and a file of a terabyte that takes no room.
    let path = folder.file("rows.jsonl", "{\"input\": \"");
    let grow = |n| fs::File::options().write(true).open(&path).unwrap().set_len(n).unwrap();
    grow(1 << 30);
    let read = || RowReader::open(&path, Targets::Optional)?.collect::<Result<Vec<_>>>();
    refused("a line of a gigabyte", 64 * MIB, "rows.jsonl:1:", read);
    let path = folder.file("config.json", "{");
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused("a terabyte of config", 8 * MIB, "larger than", || ModelConfig::open(&folder.0));
}

#[test]
fn patterns_that_explode() {
    let path = format!("model.{}b", "a".repeat(3000));
    let module = Module { path, kind: ModuleKind::Linear { index: 0, d_in: 8, d_out: 8 } };
    for pattern in
        [r"(a+)+$", r"(a|aa)*c", r"((((a{1,50}){1,50}){1,50}){1,50})", r"(\w{1000}){1000}"]
    {
        let config = PolyConfig {
            target_modules: Some(TargetModules::Pattern(pattern.into())),
            ..PolyConfig::default()
        };
        let modules = std::slice::from_ref(&module);
        let quoted = format!("{pattern:?}");
        refused(pattern, 64 * MIB, &quoted, || resolve(&config, modules, &[]));
    }
}
