//! What the system says about files by signals, where it could say it by an error.
//!
//! **SIGBUS**: a mapped page is gone. Truncating a mapped file, or a disk that fails, takes pages away from
//! under whoever reads them, in the middle of an instruction, where nothing can be unwound. So the
//! process ends at once with exit code 3 (bad input) and the file's name. What was being written had no
//! name yet, and a run goes on from its last checkpoint, as after a kill. The handler only walks a
//! list, writes and exits, which a handler may.
//!
//! **SIGXFSZ**: a file would grow past the process's limit. Ignored, the write fails with an error instead.
//!
//! Signals belong to the process, so only the binary calls [`handle`]; a library user may.

#![allow(unsafe_code)] // A signal handler, and what it reads.

use std::{
    mem,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    ptr,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicPtr, AtomicUsize, Ordering},
    },
};

use super::mmap::REMEDY;

/// A mapped range. Nodes are never freed, as a handler may be walking; those of closed files are used
/// again.
struct Node {
    start: AtomicUsize,
    /// Behind the range; 0: a free node.
    end: AtomicUsize,
    message: AtomicPtr<Vec<u8>>,
    next: Option<&'static Node>,
}

static NODES: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
/// Held by whoever changes nodes; the handler only reads.
static CHANGES: Mutex<()> = Mutex::new(());

fn nodes() -> impl Iterator<Item = &'static Node> {
    // SAFETY: `NODES` is null or a node that was leaked by `watch`.
    let first = unsafe { NODES.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |node| node.next)
}

/// While it lives, a lost page in the range is reported.
#[derive(Debug)]
pub(super) struct Watched(Option<&'static Node>);

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:x}..{:x}",
            self.start.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed)
        )
    }
}

/// Watches the bytes of a mapped file, if [`handle`] was called.
pub(super) fn watch(bytes: &[u8], path: &Path) -> Watched {
    if !INSTALLED.is_completed() {
        return Watched(None);
    }
    let mut message = b"ERROR ".to_vec();
    message.extend_from_slice(path.as_os_str().as_bytes());
    message.extend_from_slice(
        format!(": a part of the file was gone when it was read: it was truncated while it was mapped, or its disk failed; {REMEDY}\n").as_bytes(),
    );
    let range = bytes.as_ptr_range();
    let changing = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    let node = nodes().find(|node| node.end.load(Ordering::Relaxed) == 0).unwrap_or_else(|| {
        let node: &'static Node = Box::leak(Box::new(Node {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            message: AtomicPtr::new(ptr::null_mut()),
            next: nodes().next(),
        }));
        NODES.store(ptr::from_ref(node).cast_mut(), Ordering::Release);
        node
    });
    node.message.store(Box::into_raw(Box::new(message)), Ordering::Relaxed);
    node.start.store(range.start as usize, Ordering::Relaxed);
    // Last: from here on the handler may read the others.
    node.end.store(range.end as usize, Ordering::Release);
    drop(changing);
    Watched(Some(node))
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(node) = self.0 else { return };
        let _changing = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        node.end.store(0, Ordering::Release);
        let message = node.message.swap(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: `watch` made it of a box, and the swap took it away. A handler reads it only for a
        // fault in the range, which nobody reads any more.
        drop(unsafe { Box::from_raw(message) });
    }
}

static INSTALLED: Once = Once::new();
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// From now on this process ends with exit code 3 and a message on stderr that names the file when a page
/// of a mapped file is gone, of files that are opened later; any other SIGBUS goes where it went before.
/// And a file that grows too large is an error.
pub fn handle() {
    INSTALLED.call_once(|| {
        // SAFETY: Ignoring a signal replaces no handler that Rust installs.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        // SAFETY: Zeros are a `sigaction` without flags and with an empty mask.
        let (mut action, mut previous) =
            unsafe { mem::zeroed::<(libc::sigaction, libc::sigaction)>() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the thread's own signal stack where it has one, as Rust's threads do.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: Both point to a `sigaction`; the handler keeps to what handlers may do.
        unsafe {
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous) == 0 {
                PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
                libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
            }
        }
    });
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: The kernel passes a valid `info`, whose address is that of the fault if the code says
    // that there was one. `write`, `_exit`, `sigaction` and `raise` are async-signal-safe; messages
    // live as long as their ranges, and this thread has just read in this one.
    unsafe {
        let is_fault = (*info).si_code > 0;
        let address = (*info).si_addr() as usize;
        for node in nodes().filter(|_| is_fault) {
            let end = node.end.load(Ordering::Acquire);
            if node.start.load(Ordering::Relaxed) <= address && address < end {
                if let Some(message) = node.message.load(Ordering::Relaxed).as_ref() {
                    libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len());
                }
                libc::_exit(3);
            }
        }
        // Not ours. A fault comes again when the instruction does.
        libc::sigaction(signal, PREVIOUS.load(Ordering::Acquire), ptr::null_mut());
        if !is_fault {
            libc::raise(signal);
        }
    }
}
