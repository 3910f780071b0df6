//! Statuses, and the one way in: no function computes outside of [`call`].

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::OnceLock,
};

use crate::error::Error;

/// Done.
pub const POLYTAPE_OK: i32 = 0;
/// It failed: a file that cannot be written, a loss that is not finite.
pub const POLYTAPE_FAILED: i32 = 1;
/// An argument that cannot mean anything.
pub const POLYTAPE_USAGE: i32 = 2;
/// A file or its content is wrong; the message names file, tensor or field.
pub const POLYTAPE_BAD_INPUT: i32 = 3;
/// There is no such device or instruction set.
pub const POLYTAPE_NO_DEVICE: i32 = 4;
/// A pointer is null that must not be.
pub const POLYTAPE_NULL: i32 = 5;
/// A handle is of an object that was freed, of another kind, or of none.
pub const POLYTAPE_BAD_HANDLE: i32 = 6;
/// A structure's `size` is of no version of it, or memory is too small, misaligned or overlaps.
pub const POLYTAPE_BAD_SIZE: i32 = 7;
/// Another call, in another thread or around this one, is using an object that one may use at a time.
pub const POLYTAPE_BUSY: i32 = 8;
/// A callback said to stop.
pub const POLYTAPE_STOPPED: i32 = 9;
/// A bug in polytape: the call was abandoned, the object it was about can only be freed.
pub const POLYTAPE_PANIC: i32 = 10;
/// The process was forked after it had used polytape: its threads stayed in the parent.
pub const POLYTAPE_FORKED: i32 = 11;

/// Why a call did not do what it was asked.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: i32,
    message: String,
}

impl Failure {
    pub(super) fn new(status: i32, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(POLYTAPE_USAGE, message)
    }

    pub(super) fn size(message: impl Into<String>) -> Self {
        Self::new(POLYTAPE_BAD_SIZE, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        // The first four statuses are the command line's exit codes.
        let status = i32::from(error.exit_code()).min(POLYTAPE_NO_DEVICE);
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// What a callback's wish to stop unwinds with.
pub(super) struct Stopped;

/// Runs the body of a function: a status and a message come out, whatever happens inside.
pub(super) fn call(body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        not_forked()?;
        body()
    }));
    let failure = match outcome {
        Ok(Ok(())) => return POLYTAPE_OK,
        Ok(Err(failure)) => failure,
        Err(panic) if panic.is::<Stopped>() => {
            Failure::new(POLYTAPE_STOPPED, "the callback said to stop")
        }
        Err(panic) => Failure::new(POLYTAPE_PANIC, format!("panic: {}", message_of(&*panic))),
    };
    let message: Vec<u8> = failure.message.bytes().filter(|&byte| byte != 0).collect();
    let message = CString::new(message).unwrap_or_default();
    // Not during the thread's end, when there is nobody to ask for it.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
    failure.status
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// Threads do not survive a fork: waiting for them would never end.
fn not_forked() -> Result<(), Failure> {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    let (first, now) = (*PROCESS.get_or_init(process::id), process::id());
    if first == now {
        return Ok(());
    }
    let message = format!(
        "process {now} was forked from process {first}, which had used polytape already; fork first, \
        or start another program"
    );
    Err(Failure::new(POLYTAPE_FORKED, message))
}

/// What went wrong in the last call of this thread that did not return POLYTAPE_OK, in UTF-8; empty
/// where none has. Valid until the next call of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn polytape_last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| last.try_borrow().map_or(c"".as_ptr(), |last| last.as_ptr()))
        .unwrap_or(c"".as_ptr())
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}
