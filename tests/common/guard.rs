//! Bytes between two pages that nothing may touch: a kernel that reads past either end of a frozen
//! weight dies on the spot, inline assembly and intrinsics included.
//!
//! Frozen weights are the only memory that kernels get from outside; activations live in the
//! crate's own buffers, behind safe slices, and need no guard.

#![allow(unsafe_code)]

use std::{ptr, slice};

use polytape::tensor::Bytes;

/// Where in its pages the data lies.
#[derive(Clone, Copy, Debug)]
pub enum Placement {
    /// The first byte follows the guard page in front.
    AtStart,
    /// The last byte precedes the guard page behind.
    AtEnd,
    /// So many bytes before [`Placement::AtEnd`]: any alignment.
    BeforeEnd(usize),
}

/// Read-only bytes between guard pages.
pub struct Guarded {
    mapping: *mut libc::c_void,
    mapping_len: usize,
    start: usize,
    len: usize,
}

// SAFETY: The mapping is read-only from the end of `new` on, and unmapped only by `drop`.
unsafe impl Send for Guarded {}
// SAFETY: As above: nobody writes.
unsafe impl Sync for Guarded {}

impl Guarded {
    /// A copy of `bytes`.
    pub fn new(bytes: &[u8], placement: Placement) -> Self {
        // SAFETY: A query without arguments in memory.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        let room = (bytes.len() + 64).next_multiple_of(page);
        let mapping_len = room + 2 * page;
        // SAFETY: A fresh anonymous mapping at an address of the system's choice.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), mapping_len, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let start = match placement {
            Placement::AtStart => page,
            Placement::AtEnd => page + room - bytes.len(),
            Placement::BeforeEnd(shift) => page + room - bytes.len() - shift,
        };
        // SAFETY: `page..page + room` lies in the mapping, on page boundaries, and `bytes` fits at
        // `start`: `shift` is less than the 64 bytes of slack.
        unsafe {
            let inner = mapping.byte_add(page);
            assert_eq!(libc::mprotect(inner, room, libc::PROT_READ | libc::PROT_WRITE), 0);
            let data = mapping.byte_add(start).cast::<u8>();
            ptr::copy_nonoverlapping(bytes.as_ptr(), data, bytes.len());
            assert_eq!(libc::mprotect(inner, room, libc::PROT_READ), 0);
        }
        Self { mapping, mapping_len, start, len: bytes.len() }
    }
}

impl Bytes for Guarded {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `new` put `len` readable bytes there, which live as long as `self`.
        unsafe { slice::from_raw_parts(self.mapping.byte_add(self.start).cast(), self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: The mapping that `new` made, which nobody borrows any more.
        unsafe { libc::munmap(self.mapping, self.mapping_len) };
    }
}

/// Asks the system, whose calls fail where a load would die.
#[test]
fn guard_pages_cannot_be_read() {
    let bytes: Vec<u8> = (0..100).collect();
    for placement in [Placement::AtStart, Placement::AtEnd, Placement::BeforeEnd(3)] {
        assert_eq!(Guarded::new(&bytes, placement).bytes(), bytes);
    }
    let past_end = Guarded::new(&bytes, Placement::AtEnd);
    let before_start = Guarded::new(&bytes, Placement::AtStart);
    let outside = [
        past_end.bytes().as_ptr().wrapping_add(bytes.len()),
        before_start.bytes().as_ptr().wrapping_sub(1),
    ];
    for address in outside {
        // SAFETY: `write` reads one byte at `address`, or fails.
        let written = unsafe {
            let mut pipe = [0; 2];
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            let written = libc::write(pipe[1], address.cast(), 1);
            libc::close(pipe[0]);
            libc::close(pipe[1]);
            written
        };
        assert_eq!(written, -1, "the guard page can be read");
    }
}
