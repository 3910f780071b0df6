//! Sequences of calls of the C library: right ones, and wrong ones of every kind that it can notice.
//!
//! ```text
//! bytes   0          1..                     (again and again)
//!         function   choices: handle, sizes, which pointer is null or odd, ...
//! ```
//!
//! Asserted of each call: a status that the header has, and never that of a panic; a message where it
//! failed; nothing written where it failed; the kernels' objects live until they are freed, and not
//! longer. Sizes that a call accepts lie within the memory that it is given: a C program that lies
//! about its memory cannot be noticed.

#![allow(unsafe_code)]

use std::{ffi::CStr, ptr};

use polytape::capi::*;

/// Elements of each piece of memory: more than any accepted problem has.
const ROOM: usize = 1 << 13;

struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A small size; now and then none, or one that no memory has.
    fn size(&mut self, max: usize) -> usize {
        match self.byte() {
            255 => usize::MAX,
            254 => usize::MAX / 2 + 1,
            byte => usize::from(byte) % (max + 1),
        }
    }

    /// A pointer to this; now and then null, or one that is not aligned.
    fn pointer<T>(&mut self, to: &[T]) -> *const T {
        match self.byte() {
            255 => ptr::null(),
            254 => to.as_ptr().wrapping_byte_add(1),
            _ => to.as_ptr(),
        }
    }

    fn handle(&mut self, live: &[*mut polytape_kernels]) -> *mut polytape_kernels {
        match self.byte() {
            255 => ptr::null_mut(),
            254 => ptr::without_provenance_mut(usize::from(self.byte())),
            byte if live.is_empty() => ptr::without_provenance_mut(usize::from(byte)),
            byte => live[usize::from(byte) % live.len()],
        }
    }
}

/// Asserts what holds for every call; whether it was done.
fn done(status: i32) -> bool {
    assert!((POLYTAPE_OK..=POLYTAPE_FORKED).contains(&status), "status {status}");
    // SAFETY: a string of the library's, until this thread's next call.
    let message = unsafe { CStr::from_ptr(polytape_last_error()) }.to_str();
    let message = message.unwrap_or_else(|error| panic!("the message is not UTF-8: {error}"));
    assert_ne!(status, POLYTAPE_PANIC, "{message}");
    assert!(status == POLYTAPE_OK || (1..4000).contains(&message.len()), "{message}");
    status == POLYTAPE_OK
}

/// Some calls.
pub fn check(data: &[u8]) {
    let mut choices = Choices(data);
    let values: Vec<f32> = (0..ROOM).map(|i| (i % 13) as f32 * 0.25 - 1.0).collect();
    let (mut y, mut z, mut grads) = (vec![7.0_f32; ROOM], vec![7.0; ROOM], vec![7.0; ROOM]);
    let (mut d_mixing, mut d_x) = (vec![7.0_f32; ROOM], vec![7.0_f32; ROOM]);
    let mut live = Vec::new();
    let n_before = live.len();
    for _ in 0..8 {
        let function = choices.byte() % 6;
        if function == 0 || live.is_empty() {
            let options = polytape_kernels_options {
                dtype: u32::from(choices.byte()) % 4,
                n_threads: 1,
                ..Default::default()
            };
            let mut made = ptr::null_mut();
            // SAFETY: all of it lives through the call, here and below.
            if done(unsafe { polytape_kernels_new(&options, &mut made) }) {
                live.push(made);
            }
            continue;
        }
        let kernels = choices.handle(&live);
        let (n_splits, n_skills) = (choices.size(4), choices.size(4));
        let lens: Vec<usize> = (0..choices.byte() % 4).map(|_| choices.size(9)).collect();
        let rows: Vec<usize> = lens.iter().map(|_| choices.size(4)).collect();
        match function {
            1 => {
                // SAFETY: handles are not followed.
                if done(unsafe { polytape_kernels_free(kernels) }) && !kernels.is_null() {
                    let n = live.len();
                    live.retain(|&other| other != kernels);
                    assert_eq!(live.len() + 1, n, "what was no object was freed");
                    // SAFETY: as above.
                    assert!(!done(unsafe { polytape_kernels_free(kernels) }), "freed twice");
                }
            }
            2 => {
                let tasks: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
                let logits = [choices.size(200)];
                let router = polytape_router {
                    params: choices.pointer(&values),
                    n_params: 150,
                    logits: logits.as_ptr(),
                    n_linears: usize::from(choices.byte()) % 2,
                    n_tasks: choices.size(5),
                    n_splits,
                    n_skills,
                    tasks: tasks.as_ptr(),
                    n_rows: tasks.len(),
                    ..Default::default()
                };
                let (weights, samples) = (&mut y[..], &mut z[..]);
                let (weights, samples) = (weights.as_mut_ptr(), samples.as_mut_ptr());
                // SAFETY: as above; at most 3 rows of 16.
                done(unsafe { polytape_route(kernels, &router, weights, samples) });
            }
            _ => {
                let linear = polytape_routed_linear {
                    size: match choices.byte() {
                        255 => usize::from(choices.byte()),
                        _ => size_of::<polytape_routed_linear>(),
                    },
                    params: choices.pointer(&values),
                    n_params: choices.size(250) % ROOM,
                    a_start: choices.size(250),
                    b_start: choices.size(250),
                    d_in: choices.size(24),
                    d_out: choices.size(24),
                    rank: choices.size(5),
                    n_splits,
                    n_skills,
                    mixing_weights: choices.pointer(&values),
                    n_rows: usize::from(choices.byte()) % 5,
                    lens: lens.as_ptr(),
                    rows: rows.as_ptr(),
                    n_sequences: lens.len(),
                    x: choices.pointer(&values).cast(),
                    weight: if choices.byte() % 2 == 0 {
                        ptr::null()
                    } else {
                        values.as_ptr().cast()
                    },
                    bias: if choices.byte() % 2 == 0 {
                        ptr::null()
                    } else {
                        values.as_ptr().cast()
                    },
                    weight_dtype: u32::from(choices.byte()) % 5,
                    reserved: 0,
                };
                // SAFETY: as above; 27 tokens of 24 features at most.
                unsafe {
                    let before = y.clone();
                    let to = y.as_mut_ptr();
                    let add = i32::from(choices.byte()) % 2;
                    if !done(polytape_routed_linear_forward(
                        kernels,
                        &linear,
                        add,
                        to.cast(),
                        z.as_mut_ptr(),
                    )) {
                        assert_eq!(y, before, "a call that failed has written");
                        continue;
                    }
                    if function == 3 {
                        continue;
                    }
                    let gradients = polytape_routed_gradients {
                        params: grads.as_mut_ptr(),
                        mixing_weights: d_mixing.as_mut_ptr(),
                        x: if function == 4 { ptr::null_mut() } else { d_x.as_mut_ptr().cast() },
                        add_to_x: u32::from(choices.byte()) % 2,
                        ..Default::default()
                    };
                    let (z, d_y) = (z.as_ptr(), values.as_ptr().cast());
                    let back =
                        polytape_routed_linear_backward(kernels, &linear, z, d_y, &gradients);
                    assert!(done(back), "what the forward accepts, the backward does");
                }
            }
        }
    }
    for kernels in live.drain(n_before..) {
        // SAFETY: as above.
        assert!(done(unsafe { polytape_kernels_free(kernels) }));
    }
}
