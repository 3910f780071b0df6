//! The C library: its header is what the code says, the programs in `examples/c` are built with the
//! system's compiler and give what Rust gives, and misuse gets a status.

#![allow(clippy::unwrap_used, missing_docs, unsafe_code, unreachable_pub)]

#[path = "../../fuzz/src/capi.rs"]
mod calls;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../common/examples.rs"]
mod examples;
mod misuse;
mod same;
#[path = "../common/skipped.rs"]
mod skipped;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use skipped::skipped;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What cbindgen makes of `src/capi`.
fn header() -> String {
    let root = root();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    // Which follows its modules.
    let builder =
        cbindgen::Builder::new().with_config(config).with_src(root.join("src/capi/mod.rs"));
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_header_is_what_the_code_says() {
    let (path, made) = (root().join("include/polytape.h"), header());
    if env::var_os("POLYTAPE_WRITE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == made,
        "include/polytape.h is out of date: POLYTAPE_WRITE_HEADER=1 cargo test --test c header"
    );
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{error}", output.status);
    output
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Builds the C library, as the example that it is.
fn library_dir() -> PathBuf {
    let dir = examples::built(&["--example", "polytape"]);
    assert!(dir.join("libpolytape.so").exists(), "{} has no libpolytape.so", dir.display());
    dir
}

/// A program of `examples/c`, built; none where there is no C compiler, or not this system's.
fn program(name: &str, to: &Path) -> Option<PathBuf> {
    if !cfg!(target_os = "linux") || !is_there("cc") {
        skipped("the C programs: no C compiler `cc` on Linux");
        return None;
    }
    let (library, program) = (library_dir(), to.join(name));
    run(Command::new("cc")
        .args([
            "-std=c99",
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Wredundant-decls",
            "-Werror",
            "-O1",
            "-g",
            "-o",
        ])
        .args([&program, &root().join(format!("examples/c/{name}.c"))])
        .arg("-I")
        .arg(root().join("include"))
        .arg("-L")
        .arg(&library)
        .arg("-lpolytape")
        .arg(format!("-Wl,-rpath,{}", library.display())));
    Some(program)
}

/// What a program prints; where valgrind is, it has run a second time under it and printed the same.
fn printed(program: &Path, args: &[&Path], same_under_valgrind: bool) -> String {
    let native = run(Command::new(program).args(args).env("RAYON_NUM_THREADS", "2"));
    let native = String::from_utf8(native.stdout).unwrap();
    if !is_there("valgrind") {
        skipped(format_args!("{} under valgrind: it is not installed", program.display()));
        return native;
    }
    // Valgrind knows AVX2 at most.
    let isa = |command: &mut Command| {
        let isa = if is_x86_feature_detected!("avx2") { "avx2" } else { "scalar" };
        command.env("POLYTAPE_ISA", isa);
    };
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--leak-check=full", "--show-leak-kinds=definite"]);
    // Not the use of undefined values: optimised code tests the payload of an `Option` that is `None`
    // together with its tag.
    command.args(["--undef-value-errors=no"]);
    command.args(["--errors-for-leak-kinds=definite", "--error-exitcode=99"]);
    isa(command.arg(program).args(args));
    let checked = String::from_utf8(run(&mut command).stdout).unwrap();
    if same_under_valgrind {
        let mut command = Command::new(program);
        isa(command.args(args));
        assert_eq!(checked, String::from_utf8(run(&mut command).stdout).unwrap());
    }
    native
}

#[test]
fn the_header_is_cpp_and_c() {
    for (compiler, language) in [("c++", "c++"), ("cc", "c")] {
        if !is_there(compiler) {
            skipped(format_args!("the header in {language}: no {compiler}"));
            continue;
        }
        run(Command::new(compiler)
            .args([
                "-fsyntax-only",
                "-Wall",
                "-Wextra",
                "-Wredundant-decls",
                "-Werror",
                "-x",
                language,
            ])
            .arg(root().join("include/polytape.h")));
    }
}

#[test]
fn the_library_has_what_the_header_declares() {
    if !cfg!(target_os = "linux") {
        skipped("the library's symbols: not on Linux");
        return;
    }
    let header = fs::read_to_string(root().join("include/polytape.h")).unwrap();
    // SAFETY: a library of this crate, whose initialisers are the standard library's.
    let library =
        unsafe { libloading::Library::new(library_dir().join("libpolytape.so")) }.unwrap();
    let mut n = 0;
    for line in header.lines().filter(|line| !line.starts_with("//") && line.contains('(')) {
        let Some(name) = line.split('(').next().unwrap().split([' ', '*']).next_back() else {
            continue;
        };
        if name.starts_with("polytape_") {
            // SAFETY: only asks whether it is there.
            let symbol = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
            assert!(symbol.is_ok(), "{name} is declared but not there");
            n += 1;
        }
    }
    assert!(n >= 25, "{n} functions");
}

#[test]
fn fuzzed_calls() {
    corpus::replay("capi", calls::check);
    // And bytes that nobody chose.
    let mut state = 1_u64;
    for _ in 0..1000 {
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        let bytes: Vec<u8> = (0..200).map(|i| if i == 0 { 0 } else { byte() }).collect();
        calls::check(&bytes);
    }
}
