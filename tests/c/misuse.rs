//! What a C program can do wrong gets a status and a message, never a crash.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    ptr::{null, null_mut},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use polytape::capi::*;

use crate::root;

/// Asserts a status, and that the message has this in it.
#[track_caller]
fn expect(status: i32, expected: i32, part: &str) {
    // SAFETY: a string of the library's, until this thread's next call.
    let message = unsafe { CStr::from_ptr(polytape_last_error()) }.to_str().unwrap().to_owned();
    assert_eq!(status, expected, "{message}");
    assert!(expected == POLYTAPE_OK || message.contains(part), "{message:?} without {part:?}");
}

#[track_caller]
fn ok(status: i32) {
    expect(status, POLYTAPE_OK, "");
}

fn open() -> *mut polytape_model {
    let dir = root().join("tests/data/parity/tiny/base");
    let dir = CString::new(dir.to_str().unwrap()).unwrap();
    let options = polytape_model_options {
        size: size_of::<polytape_model_options>(),
        dtype: POLYTAPE_DTYPE_F32,
        n_threads: 2,
        ..Default::default()
    };
    let mut model = null_mut();
    // SAFETY: everything lives through the call, here and below.
    ok(unsafe { polytape_model_open(dir.as_ptr(), &options, &mut model) });
    model
}

fn adapter(model: *const polytape_model) -> *mut polytape_adapter {
    let (mut config, mut adapter) = (polytape_adapter_config::default(), null_mut());
    config.n_tasks = 2;
    // SAFETY: as above.
    ok(unsafe { polytape_adapter_new(model, &config, 1, &mut adapter) });
    adapter
}

fn engine(model: *const polytape_model) -> *mut polytape_engine {
    let mut engine = null_mut();
    // SAFETY: as above.
    ok(unsafe { polytape_engine_new(model, null(), null(), 0, 2, &mut engine) });
    engine
}

fn example(input: &[u32], labels: &[u32], task: u32) -> polytape_example {
    polytape_example {
        input: input.as_ptr(),
        n_input: input.len(),
        labels: labels.as_ptr(),
        n_labels: labels.len(),
        task,
        reserved: 0,
    }
}

#[test]
fn nulls_and_strings() {
    // SAFETY: as above; null is what is tested.
    unsafe {
        let mut model = null_mut();
        expect(polytape_model_open(null(), null(), &mut model), POLYTAPE_NULL, "dir is null");
        expect(polytape_model_open(c"x".as_ptr(), null(), null_mut()), POLYTAPE_NULL, "model");
        expect(
            polytape_model_open(c"/nowhere".as_ptr(), null(), &mut model),
            POLYTAPE_BAD_INPUT,
            "/nowhere",
        );
        let latin = [0xE9_u8, 0].as_ptr().cast::<c_char>();
        expect(polytape_model_open(latin, null(), &mut model), POLYTAPE_USAGE, "not UTF-8");
        assert!(model.is_null());
        expect(polytape_model_verify(null()), POLYTAPE_NULL, "model is null");
        ok(polytape_model_free(null_mut()));
        ok(polytape_engine_free(null_mut()));
    }
}

#[test]
fn handles_that_are_none() {
    let model = open();
    // SAFETY: as above; handles are not followed.
    unsafe {
        let engine = engine(model);
        // Of another kind, stale, invented.
        expect(polytape_model_verify(engine.cast()), POLYTAPE_BAD_HANDLE, "not a model");
        ok(polytape_engine_free(engine));
        expect(polytape_engine_free(engine), POLYTAPE_BAD_HANDLE, "it was freed");
        let mut nll = 0.0;
        let nothing = polytape_engine_nll(engine, null(), 0, &mut nll, 0);
        expect(nothing, POLYTAPE_BAD_HANDLE, "it was freed");
        for invented in [1, 2, 17, 33, 0xDEAD_BEEF, usize::MAX] {
            let invented = std::ptr::without_provenance_mut::<polytape_trainer>(invented);
            expect(polytape_trainer_free(invented), POLYTAPE_BAD_HANDLE, "not a trainer");
        }
        // An adapter of another model.
        let (other, mut engine) = (open(), null_mut());
        let foreign = adapter(other);
        let made = polytape_engine_new(model, foreign, null(), 0, 2, &mut engine);
        expect(made, POLYTAPE_USAGE, "another model");
        for model in [model, other] {
            ok(polytape_model_free(model));
        }
        ok(polytape_adapter_free(foreign));
    }
}

#[test]
fn what_was_made_from_a_freed_object_goes_on() {
    let model = open();
    let (adapter, input) = (adapter(model), [5_u32, 1]);
    let mut engine = null_mut();
    // SAFETY: as above.
    unsafe {
        ok(polytape_engine_new(model, adapter, null(), 0, 2, &mut engine));
        let mut trainer = null_mut();
        let config = polytape_train_config::default();
        ok(polytape_trainer_new(adapter, &config, &mut trainer));
        ok(polytape_model_free(model));
        ok(polytape_adapter_free(adapter));
        let (one, mut nll) = (example(&input, &input, 1), [0.0; 2]);
        ok(polytape_engine_nll(engine, &one, 1, nll.as_mut_ptr(), 2));
        assert!(nll.iter().all(|nll| nll.is_finite() && *nll > 0.0));
        ok(polytape_trainer_step(trainer, &one, 1, null_mut()));
        ok(polytape_engine_free(engine));
        ok(polytape_trainer_free(trainer));
    }
}

#[test]
fn sizes() {
    let model = open();
    // SAFETY: as above; wrong sizes are what is tested, within what is there.
    unsafe {
        let mut info = polytape_model_info { size: 0, ..Default::default() };
        let with_size = |info: &mut polytape_model_info, size| {
            info.size = size;
            polytape_model_get_info(model, info)
        };
        expect(with_size(&mut info, 0), POLYTAPE_BAD_SIZE, "has size 0");
        expect(with_size(&mut info, 1 << 40), POLYTAPE_BAD_SIZE, "has size");
        ok(with_size(&mut info, size_of::<polytape_model_info>()));
        assert!(info.vocab_size > 0 && info.n_linears > 0);
        // Of a newer header: the fields that are known are filled, the others stay.
        let mut newer = [u64::MAX; 32];
        newer[0] = size_of_val(&newer) as u64;
        ok(polytape_model_get_info(model, newer.as_mut_ptr().cast()));
        assert_eq!(newer[1], info.vocab_size as u64);
        assert!(newer[size_of::<polytape_model_info>() / 8..].iter().all(|&word| word == u64::MAX));
        // Settings of a newer header may ask for what is not here.
        let (mut config, mut made) = ([0_u64; 64], null_mut());
        config[0] = size_of_val(&config) as u64;
        let newer = polytape_adapter_new(model, config.as_ptr().cast(), 1, &mut made);
        expect(newer, POLYTAPE_BAD_SIZE, "newer than the library");
        expect(polytape_train_config_init(null_mut(), 3), POLYTAPE_BAD_SIZE, "has size 3");

        let engine = engine(model);
        let (input, labels) = ([5_u32, 1], [3_u32, 1]);
        let (one, mut nll) = (example(&input, &labels, 0), [0.0; 3]);
        let three = polytape_engine_nll(engine, &one, 1, nll.as_mut_ptr(), 3);
        expect(three, POLYTAPE_BAD_SIZE, "room for 3 elements, the result has 2");
        let many = polytape_engine_nll(engine, &one, usize::MAX / 2, nll.as_mut_ptr(), 2);
        expect(many, POLYTAPE_BAD_SIZE, "examples cannot have");
        let odd = std::ptr::without_provenance::<polytape_example>(9);
        let odd = polytape_engine_nll(engine, odd, 1, nll.as_mut_ptr(), 2);
        expect(odd, POLYTAPE_BAD_SIZE, "not aligned");
        ok(polytape_engine_free(engine));
        ok(polytape_model_free(model));
    }
}

#[test]
fn examples_that_cannot_be() {
    let model = open();
    let adapter = adapter(model);
    let (mut engine, mut nll) = (null_mut(), [0.0; 2]);
    // SAFETY: as above.
    unsafe {
        let only_one = [1_u32];
        let made = polytape_engine_new(model, adapter, only_one.as_ptr(), 1, 0, &mut engine);
        expect(made, POLYTAPE_USAGE, "capacity");
        let made = polytape_engine_new(model, adapter, [7].as_ptr(), 1, 1, &mut engine);
        expect(made, POLYTAPE_USAGE, "task 7");
        ok(polytape_engine_new(model, adapter, only_one.as_ptr(), 1, 4, &mut engine));
        let (good, big) = ([5_u32, 1], [5_u32, 1 << 30]);
        for (wrong, part) in [
            (example(&[], &good, 1), "example 0: the example has no input"),
            (example(&big, &good, 1), "token id 1073741824 is out of range"),
            (example(&good, &big, 1), "token id 1073741824 is out of range"),
            (example(&good, &good, 2), "not for task 2"),
            (example(&good, &good, 0), "not for task 0"),
        ] {
            let status = polytape_engine_nll(engine, &wrong, 1, nll.as_mut_ptr(), 2);
            expect(status, POLYTAPE_USAGE, part);
        }
        let wrong = polytape_example { labels: null(), ..example(&good, &good, 1) };
        let status = polytape_engine_nll(engine, &wrong, 1, nll.as_mut_ptr(), 2);
        expect(status, POLYTAPE_NULL, "labels is null");

        let weights = [f32::NAN; 4];
        let mut other = null_mut();
        let made =
            polytape_engine_new_with_weights(model, adapter, weights.as_ptr(), 4, 1, 1, &mut other);
        expect(made, POLYTAPE_USAGE, "row 0: weights must be finite");
        let made =
            polytape_engine_new_with_weights(model, adapter, weights.as_ptr(), 3, 1, 1, &mut other);
        expect(made, POLYTAPE_BAD_SIZE, "there are 3 weights");
        // Rows that are alike are one mixture; a row that is not there is refused.
        let weights = [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25];
        ok(polytape_engine_new_with_weights(model, adapter, weights.as_ptr(), 8, 2, 1, &mut other));
        let two = [example(&good, &[3], 0), example(&good, &[3], 1)];
        ok(polytape_engine_nll(other, two.as_ptr(), 2, nll.as_mut_ptr(), 2));
        assert_eq!(nll[0], nll[1]);
        let third = example(&good, &good, 2);
        let status = polytape_engine_nll(other, &third, 1, nll.as_mut_ptr(), 2);
        expect(status, POLYTAPE_USAGE, "2 rows of weights, not 2");
        ok(polytape_engine_free(other));

        let (mut trainer, mut config) = (null_mut(), polytape_train_config::default());
        config.learning_rate = f64::NAN;
        let made = polytape_trainer_new(adapter, &config, &mut trainer);
        expect(made, POLYTAPE_USAGE, "learning_rate");
        config = polytape_train_config { schedule: 9, ..Default::default() };
        let made = polytape_trainer_new(adapter, &config, &mut trainer);
        expect(made, POLYTAPE_USAGE, "schedule 9");
        ok(polytape_trainer_new(adapter, &Default::default(), &mut trainer));
        let step = polytape_trainer_step(trainer, null(), 0, null_mut());
        expect(step, POLYTAPE_USAGE, "without examples");
        let none = example(&good, &[], 1);
        let step = polytape_trainer_step(trainer, &none, 1, null_mut());
        expect(step, POLYTAPE_USAGE, "no labels");
        ok(polytape_trainer_free(trainer));
        ok(polytape_engine_free(engine));
        ok(polytape_adapter_free(adapter));
        ok(polytape_model_free(model));
    }
}

static SEEN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn stop_at_three(_: *mut c_void, _: usize, _: u32) -> c_int {
    c_int::from(SEEN.fetch_add(1, Ordering::Relaxed) == 2)
}

#[test]
fn a_callback_stops() {
    let model = open();
    let (engine, input) = (engine(model), [5_u32, 6, 1]);
    let two = [example(&input, &[], 0), example(&input, &[], 0)];
    let options =
        polytape_generate_options { min_new_tokens: 8, max_new_tokens: 8, ..Default::default() };
    // SAFETY: as above; the callback does not use its data.
    unsafe {
        let generate = |callback| {
            polytape_engine_generate(engine, two.as_ptr(), 2, &options, callback, null_mut())
        };
        expect(generate(None), POLYTAPE_NULL, "on_token");
        expect(generate(Some(stop_at_three)), POLYTAPE_STOPPED, "stop");
        assert_eq!(SEEN.load(Ordering::Relaxed), 3);
        // The engine is as before.
        ok(generate(Some(stop_at_three)));
        assert_eq!(SEEN.load(Ordering::Relaxed), 3 + 16);
        ok(polytape_engine_free(engine));
        ok(polytape_model_free(model));
    }
}

unsafe extern "C" fn keep(user: *mut c_void, example: usize, token: u32) -> c_int {
    // SAFETY: what `generated` passed, one call at a time.
    unsafe { (*user.cast::<Vec<(usize, u32)>>()).push((example, token)) };
    0
}

/// What C generates with these options.
fn generated(
    engine: *const polytape_engine,
    options: *const polytape_generate_options,
) -> Vec<(usize, u32)> {
    let inputs = [[5_u32, 6, 1], [9, 4, 1], [7, 7, 1]];
    let examples = inputs.each_ref().map(|input| example(input, &[], 0));
    let mut tokens: Vec<(usize, u32)> = Vec::new();
    // SAFETY: as above; `keep` gets what it expects.
    ok(unsafe {
        let user = (&raw mut tokens).cast();
        polytape_engine_generate(engine, examples.as_ptr(), 3, options, Some(keep), user)
    });
    tokens
}

/// Every setting means what it means in Rust.
#[test]
fn generation_is_set_as_in_rust() {
    use polytape::{
        Dtype,
        generate::{EarlyStopping, Engine, GenerateOptions},
        model::{Example, Model, Options},
    };
    let (model, mut engine) = (open(), null_mut());
    // SAFETY: as above.
    ok(unsafe { polytape_engine_new(model, null(), null(), 0, 8, &mut engine) });
    let base = root().join("tests/data/parity/tiny/base");
    let options = Options { dtype: Some(Dtype::F32), ..Options::default() };
    let in_rust = Model::open(base, &options).unwrap();
    let rust = Engine::new(&in_rust, None, [], 8);
    let inputs = [[5, 6, 1], [9, 4, 1], [7, 7, 1]];
    let examples =
        inputs.map(|input| Example { input: input.into(), labels: vec![], task: 0, mixing: None });
    let common = GenerateOptions { max_new_tokens: 9, min_new_tokens: 5, ..Default::default() };
    let beams = GenerateOptions { num_beams: 3, ..common.clone() };
    let draws = GenerateOptions { do_sample: true, seed: 11, top_k: 0, ..common.clone() };
    let mut seen = Vec::new();
    for options in [
        common.clone(),
        GenerateOptions { repetition_penalty: 3.0, ..common.clone() },
        GenerateOptions { no_repeat_ngram_size: 1, ..common.clone() },
        beams.clone(),
        GenerateOptions { length_penalty: -8.0, min_new_tokens: 0, ..beams.clone() },
        GenerateOptions { early_stopping: EarlyStopping::Yes, min_new_tokens: 0, ..beams.clone() },
        GenerateOptions { early_stopping: EarlyStopping::Never, ..beams },
        draws.clone(),
        GenerateOptions { seed: 12, ..draws.clone() },
        GenerateOptions { temperature: 9.0, ..draws.clone() },
        GenerateOptions { top_k: 2, ..draws.clone() },
        GenerateOptions { top_p: 0.3, ..draws.clone() },
        GenerateOptions { min_p: 0.9, ..draws },
    ] {
        let in_c = polytape_generate_options {
            max_new_tokens: options.max_new_tokens,
            min_new_tokens: options.min_new_tokens,
            num_beams: options.num_beams,
            top_k: options.top_k,
            no_repeat_ngram_size: options.no_repeat_ngram_size,
            seed: options.seed,
            length_penalty: options.length_penalty,
            temperature: options.temperature,
            top_p: options.top_p,
            min_p: options.min_p,
            repetition_penalty: options.repetition_penalty,
            do_sample: u32::from(options.do_sample),
            early_stopping: match options.early_stopping {
                EarlyStopping::No => POLYTAPE_EARLY_STOPPING_FALSE,
                EarlyStopping::Yes => POLYTAPE_EARLY_STOPPING_TRUE,
                EarlyStopping::Never => POLYTAPE_EARLY_STOPPING_NEVER,
            },
            ..Default::default()
        };
        let mut expected = Vec::new();
        let examples: Vec<&Example> = examples.iter().collect();
        rust.generate(&examples, &options, |example, id| expected.push((example, id)));
        assert_eq!(generated(engine, &in_c), expected, "{options:?}");
        seen.push(expected);
    }
    // The settings are not ignored alike on both sides.
    seen.sort();
    seen.dedup();
    assert!(seen.len() >= 8, "{} different outputs", seen.len());

    // A program that was compiled when there were three fields gets the defaults of the others.
    #[repr(C)]
    struct Old([usize; 3], [u8; 8]);
    let old = Old([24, 9, 5], [0xFF; 8]);
    let new =
        polytape_generate_options { max_new_tokens: 9, min_new_tokens: 5, ..Default::default() };
    assert_eq!(generated(engine, (&raw const old).cast()), generated(engine, &new));
    // SAFETY: as above.
    unsafe {
        let refused = |options: &polytape_generate_options, status, part| {
            let generate =
                polytape_engine_generate(engine, null(), 0, options, Some(keep), null_mut());
            expect(generate, status, part);
        };
        refused(&polytape_generate_options { size: 16, ..new }, POLYTAPE_BAD_SIZE, "has size 16");
        refused(&polytape_generate_options { num_beams: 0, ..new }, POLYTAPE_USAGE, "num-beams");
        refused(&polytape_generate_options { top_p: f64::NAN, ..new }, POLYTAPE_USAGE, "top-p");
        refused(&polytape_generate_options { early_stopping: 3, ..new }, POLYTAPE_USAGE, "3");
        ok(polytape_engine_free(engine));
        ok(polytape_model_free(model));
    }
}

/// A base that changes gives a status and no number; one in memory does not change.
#[test]
fn a_base_that_changes_is_noticed() {
    let dir = std::env::temp_dir().join(format!("polytape-c-changing-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for in_memory in [0, 1] {
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            let from = root().join("tests/data/parity/tiny/base").join(file);
            if from.exists() {
                std::fs::copy(from, dir.join(file)).unwrap();
            }
        }
        let path = CString::new(dir.to_str().unwrap()).unwrap();
        let options = polytape_model_options {
            size: size_of::<polytape_model_options>(),
            in_memory,
            ..Default::default()
        };
        let mut model = null_mut();
        // SAFETY: as above.
        ok(unsafe { polytape_model_open(path.as_ptr(), &options, &mut model) });
        let (engine, adapter) = (engine(model), adapter(model));
        let weights = dir.join("model.safetensors");
        // Shorter by a byte: within the last page, so that nothing but a question can tell.
        let file = std::fs::File::options().write(true).open(weights).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        let (input, labels) = ([5_u32, 6, 1], [7_u32, 1]);
        let example = example(&input, &labels, 0);
        let (mut nll, mut logits, mut trainer) = ([7.0; 2], [7.0; 202], null_mut());
        // SAFETY: as above.
        unsafe {
            ok(polytape_trainer_new(adapter, &Default::default(), &mut trainer));
            let check = |status| match in_memory {
                0 => expect(status, POLYTAPE_BAD_INPUT, "model.safetensors"),
                _ => ok(status),
            };
            check(polytape_model_verify(model));
            check(polytape_engine_nll(engine, &example, 1, nll.as_mut_ptr(), 2));
            check(polytape_engine_logits(engine, &example, 1, logits.as_mut_ptr(), 202));
            check(polytape_trainer_step(trainer, &example, 1, null_mut()));
            let mut tokens: Vec<(usize, u32)> = Vec::new();
            let user = (&raw mut tokens).cast();
            check(polytape_engine_generate(engine, &example, 1, null(), Some(keep), user));
            if in_memory == 0 {
                assert_eq!((nll, logits), ([7.0; 2], [7.0; 202]));
            }
            ok(polytape_trainer_free(trainer));
            ok(polytape_adapter_free(adapter));
            ok(polytape_engine_free(engine));
            ok(polytape_model_free(model));
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn one_thread_at_a_time_trains() {
    let model = open();
    let adapter = adapter(model);
    let mut trainer = null_mut();
    // SAFETY: as above.
    ok(unsafe { polytape_trainer_new(adapter, &Default::default(), &mut trainer) });
    let (handle, done) = (trainer.addr(), AtomicBool::new(false));
    let step = || {
        let trainer = std::ptr::without_provenance_mut(handle);
        let (input, labels) = ([5_u32, 6, 1], [7_u32, 1]);
        // SAFETY: as above.
        unsafe { polytape_trainer_step(trainer, &example(&input, &labels, 1), 1, null_mut()) }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let status = step();
                assert!(matches!(status, POLYTAPE_OK | POLYTAPE_BUSY), "{status}");
            }
        });
        let start = Instant::now();
        while step() != POLYTAPE_BUSY {
            assert!(start.elapsed() < Duration::from_secs(60), "never busy");
        }
        expect(POLYTAPE_BUSY, POLYTAPE_BUSY, "another call is using the trainer");
        done.store(true, Ordering::Relaxed);
    });
    // SAFETY: as above.
    unsafe {
        ok(polytape_trainer_free(trainer));
        ok(polytape_adapter_free(adapter));
        ok(polytape_model_free(model));
    }
}

#[test]
fn a_forked_process_is_told() {
    // SAFETY: null is fine.
    ok(unsafe { polytape_kernels_free(null_mut()) });
    // SAFETY: the child calls nothing that waits for a thread, and leaves at once.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let status = polytape_kernels_free(null_mut());
            libc::_exit(status);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), POLYTAPE_FORKED);
    }
}

/// A small routed linear that is right; tests break one thing at a time.
struct Problem {
    params: Vec<f32>,
    mixing: Vec<f32>,
    x: Vec<f32>,
    lens: [usize; 2],
    rows: [usize; 2],
    y: Vec<f32>,
}

impl Problem {
    fn new() -> Self {
        // d_in 4, d_out 6, rank 2, 2 splits, 3 skills: A 24, B 36.
        let (params, mixing) = (vec![0.5; 60], vec![0.25; 12]);
        Self { params, mixing, x: vec![1.0; 12], lens: [1, 2], rows: [1, 0], y: vec![0.0; 18] }
    }

    fn args(&self) -> polytape_routed_linear {
        polytape_routed_linear {
            params: self.params.as_ptr(),
            n_params: 60,
            b_start: 24,
            d_in: 4,
            d_out: 6,
            rank: 2,
            n_splits: 2,
            n_skills: 3,
            mixing_weights: self.mixing.as_ptr(),
            n_rows: 2,
            lens: self.lens.as_ptr(),
            rows: self.rows.as_ptr(),
            n_sequences: 2,
            x: self.x.as_ptr().cast(),
            ..Default::default()
        }
    }
}

#[test]
fn kernels_check_what_they_get() {
    let mut kernels = null_mut();
    // SAFETY: as above.
    unsafe {
        let options = polytape_kernels_options { dtype: 7, ..Default::default() };
        expect(polytape_kernels_new(&options, &mut kernels), POLYTAPE_USAGE, "dtype 7");
        let isa = c"sse".as_ptr();
        let options = polytape_kernels_options { isa, ..Default::default() };
        expect(polytape_kernels_new(&options, &mut kernels), POLYTAPE_NO_DEVICE, "sse");
        ok(polytape_kernels_new(null(), &mut kernels));
    }
    type Break = fn(&mut polytape_routed_linear);
    let wrong: [(Break, i32, &str); 17] = [
        (|a| a.size = 8, POLYTAPE_BAD_SIZE, "has size 8"),
        (|a| a.params = null(), POLYTAPE_NULL, "params is null"),
        (|a| a.x = null(), POLYTAPE_NULL, "x is null"),
        (|a| a.mixing_weights = null(), POLYTAPE_NULL, "mixing_weights is null"),
        (|a| a.lens = null(), POLYTAPE_NULL, "lens is null"),
        (|a| a.rank = 0, POLYTAPE_USAGE, "rank is 0"),
        (|a| a.n_splits = 3, POLYTAPE_USAGE, "does not divide"),
        (|a| a.n_params = 59, POLYTAPE_BAD_SIZE, "not inside the 59 parameters"),
        (|a| a.a_start = usize::MAX, POLYTAPE_BAD_SIZE, "not inside"),
        (|a| a.b_start = 23, POLYTAPE_BAD_SIZE, "A and B overlap"),
        (|a| a.n_rows = 1, POLYTAPE_USAGE, "routing row 1 of 1"),
        (|a| a.n_rows = usize::MAX, POLYTAPE_BAD_SIZE, "would have"),
        (|a| a.n_skills = usize::MAX / 2, POLYTAPE_BAD_SIZE, "would have"),
        (|a| a.weight_dtype = 9, POLYTAPE_USAGE, "weight_dtype 9"),
        (|a| a.d_in = usize::MAX - 1, POLYTAPE_BAD_SIZE, "would have"),
        (|a| a.x = a.x.wrapping_byte_add(1), POLYTAPE_BAD_SIZE, "x is not aligned"),
        (|a| a.n_sequences = usize::MAX, POLYTAPE_BAD_SIZE, "lens cannot have"),
    ];
    let mut problem = Problem::new();
    for (break_it, status, part) in wrong {
        let mut args = problem.args();
        break_it(&mut args);
        let y = problem.y.as_mut_ptr().cast();
        // SAFETY: as above; what is wrong is noticed before it is used.
        let found = unsafe { polytape_routed_linear_forward(kernels, &args, 0, y, null_mut()) };
        expect(found, status, part);
    }
    assert!(problem.y.iter().all(|&y| y == 0.0), "nothing was written");
    let args = problem.args();
    // SAFETY: as above.
    unsafe {
        let into = |y: *mut f32, z: *mut f32| {
            polytape_routed_linear_forward(kernels, &args, 0, y.cast(), z)
        };
        let y = problem.y.as_mut_ptr();
        expect(into(null_mut(), null_mut()), POLYTAPE_NULL, "y is null");
        expect(into(problem.x.as_mut_ptr(), null_mut()), POLYTAPE_BAD_SIZE, "x and y overlap");
        expect(into(y, y.add(10)), POLYTAPE_BAD_SIZE, "y and z overlap");
        let mut z = [0.0; 6];
        ok(into(y, z.as_mut_ptr()));
        assert!(problem.y.iter().all(|&y| y != 0.0));

        let mut grads = vec![0.0; 60];
        let gradients = polytape_routed_gradients {
            params: grads.as_mut_ptr(),
            mixing_weights: grads.as_mut_ptr().add(20),
            ..Default::default()
        };
        let backward = |gradients| {
            polytape_routed_linear_backward(kernels, &args, z.as_ptr(), y.cast(), gradients)
        };
        expect(backward(&gradients), POLYTAPE_BAD_SIZE, "overlap");
        expect(backward(null()), POLYTAPE_NULL, "polytape_routed_gradients is null");
        let mut d_mixing = [0.0; 12];
        let mixing_weights = d_mixing.as_mut_ptr();
        ok(backward(&polytape_routed_gradients { mixing_weights, ..gradients }));
        assert!(grads.iter().all(|&g| g != 0.0) && d_mixing.iter().all(|&g| g != 0.0));

        let logits = [55_usize];
        let router = polytape_router {
            params: args.params,
            n_params: 60,
            logits: logits.as_ptr(),
            n_linears: 1,
            n_tasks: 1,
            n_splits: 2,
            n_skills: 3,
            tasks: [0].as_ptr(),
            n_rows: 1,
            ..Default::default()
        };
        let route = polytape_route(kernels, &router, z.as_mut_ptr(), d_mixing.as_mut_ptr());
        expect(route, POLYTAPE_BAD_SIZE, "not inside the 60 parameters");
        // Nothing to route, but a width that no machine can count.
        let router =
            polytape_router { n_linears: 0, n_splits: 1 << 40, n_skills: 1 << 40, ..router };
        let route = polytape_route(kernels, &router, z.as_mut_ptr(), d_mixing.as_mut_ptr());
        expect(route, POLYTAPE_BAD_SIZE, "would have");
        ok(polytape_kernels_free(kernels));
    }
}
