//! The caller's memory: pointers with sizes become slices, strings and tensors' memory, or a status.

use std::{
    ffi::{CStr, c_char},
    mem, ptr, slice,
};

use super::status::{Failure, POLYTAPE_NULL};
use crate::tensor::{Bytes, BytesMut};

fn null(name: &str) -> Failure {
    Failure::new(POLYTAPE_NULL, format!("{name} is null"))
}

/// What must hold before a slice of `n` elements may be made: not null (where there is an element),
/// aligned, and not larger than memory can be.
fn check<T>(pointer: *const T, n: usize, name: &str) -> Result<(), Failure> {
    if n == 0 {
        return Ok(());
    }
    if pointer.is_null() {
        return Err(null(name));
    }
    if !pointer.is_aligned() {
        let align = mem::align_of::<T>();
        return Err(Failure::size(format!("{name} is not aligned to {align} bytes")));
    }
    match n.checked_mul(mem::size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Failure::size(format!("{name} cannot have {n} elements"))),
    }
}

/// `n` elements that the caller lets us read during the call. `T` is valid for any bits.
pub(super) fn read<'a, T: Copy>(
    pointer: *const T,
    n: usize,
    name: &str,
) -> Result<&'a [T], Failure> {
    check(pointer, n, name)?;
    if n == 0 {
        return Ok(&[]);
    }
    // SAFETY: not null, aligned and of a possible size, as was checked; that so many are there and
    // nobody writes them is the caller's duty (module doc of `capi`).
    Ok(unsafe { slice::from_raw_parts(pointer, n) })
}

/// `n` elements that the caller lets us write during the call.
pub(super) fn write<'a, T: Copy>(
    pointer: *mut T,
    n: usize,
    name: &str,
) -> Result<&'a mut [T], Failure> {
    check(pointer, n, name)?;
    if n == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `read`; functions that take several pieces of memory check that none overlaps.
    Ok(unsafe { slice::from_raw_parts_mut(pointer, n) })
}

/// Puts a result where the caller wants it.
pub(super) fn put<T>(pointer: *mut T, value: T, name: &str) -> Result<(), Failure> {
    check(pointer, 1, name)?;
    // SAFETY: not null and aligned, as was checked; writable is the caller's duty.
    unsafe { pointer.write(value) };
    Ok(())
}

/// Fails before any work if a result could not be put there.
pub(super) fn check_place<T>(pointer: *const T, name: &str) -> Result<(), Failure> {
    check(pointer, 1, name)
}

/// A string.
pub(super) fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: not null; that a zero byte ends it is the caller's duty.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| Failure::usage(format!("{name} is not UTF-8")))
}

/// A string, where there is one.
pub(super) fn optional_text<'a>(
    pointer: *const c_char,
    name: &str,
) -> Result<Option<&'a str>, Failure> {
    if pointer.is_null() { Ok(None) } else { text(pointer, name).map(Some) }
}

/// A structure that begins with its size in bytes, so that it can grow.
///
/// # Safety
/// It is `repr(C)`, begins with a `usize`, and every other field is valid for any bits.
pub(super) unsafe trait Versioned: Copy + Default {
    /// Its name in messages.
    const NAME: &'static str;
    /// Its size when it first appeared.
    const FIRST_SIZE: usize;
}

/// The `size` of a structure.
fn size_of_struct<T: Versioned>(pointer: *const T) -> Result<usize, Failure> {
    check(pointer, 1, T::NAME)?;
    // SAFETY: not null and aligned, and begins with its size, which the caller has set.
    let size = unsafe { pointer.cast::<usize>().read() };
    if size < T::FIRST_SIZE || (size > mem::size_of::<T>() && size > 4096) {
        return Err(Failure::size(format!(
            "{} has size {size}, not {}: set it to sizeof, or let its _init function do so",
            T::NAME,
            mem::size_of::<T>()
        )));
    }
    Ok(size)
}

/// A structure of settings. What an older header does not have is as its default; one of a newer
/// header is refused, because it may ask for what is not here.
pub(super) fn settings<T: Versioned>(pointer: *const T) -> Result<T, Failure> {
    let (size, ours) = (size_of_struct(pointer)?, mem::size_of::<T>());
    if size > ours {
        let name = T::NAME;
        return Err(Failure::size(format!(
            "{name} has size {size}, this library's has {ours}: the header is newer than the library"
        )));
    }
    let mut settings = T::default();
    // SAFETY: `size` bytes can be read, which is what the field says, and fit into `settings`, whose
    // fields are valid for any bits.
    unsafe { ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut settings).cast(), size) };
    Ok(settings)
}

/// [`settings`], or the defaults where there are none.
pub(super) fn optional_settings<T: Versioned>(pointer: *const T) -> Result<T, Failure> {
    if pointer.is_null() { Ok(T::default()) } else { settings(pointer) }
}

/// Fails before any work if a structure of results could not be filled.
pub(super) fn check_report<T: Versioned>(pointer: *const T) -> Result<(), Failure> {
    size_of_struct(pointer).map(|_| ())
}

/// Fills as much of a caller's structure of results as its header has.
pub(super) fn report<T: Versioned>(pointer: *mut T, report: T) -> Result<(), Failure> {
    let size = size_of_struct(pointer)?;
    let fields = mem::size_of::<usize>()..size.min(mem::size_of::<T>());
    // SAFETY: the caller's structure has `size` writable bytes, `report` at least as many as are
    // copied; the field `size` itself stays.
    unsafe {
        ptr::copy_nonoverlapping(
            (&raw const report).cast::<u8>().add(fields.start),
            pointer.cast::<u8>().add(fields.start),
            fields.len(),
        );
    }
    Ok(())
}

/// Fills a caller's structure of `size` bytes with the defaults.
pub(super) fn init<T: Versioned>(pointer: *mut T, size: usize) -> Result<(), Failure> {
    if size < T::FIRST_SIZE || size > mem::size_of::<T>() {
        return Err(Failure::size(format!(
            "{} has size {size}, this library's has {}",
            T::NAME,
            mem::size_of::<T>()
        )));
    }
    check(pointer, 1, T::NAME)?;
    let defaults = T::default();
    // SAFETY: the caller says that there are `size` bytes; `defaults` has as many.
    unsafe {
        pointer.cast::<u8>().copy_from_nonoverlapping((&raw const defaults).cast(), size);
        pointer.cast::<usize>().write(size);
    }
    Ok(())
}

/// The caller's memory as a tensor's or a frozen weight's, for the time of one call.
///
/// Making one is safe only inside a function that drops every tensor and weight made of it before it
/// returns: so it stays inside `capi::kernels`, whose functions keep nothing.
pub(super) struct Lent {
    start: *mut u8,
    len: usize,
    writable: bool,
}

// SAFETY: a piece of memory that is only read, or that only this value writes: `write` and the
// checks of overlap see to it.
unsafe impl Send for Lent {}
// SAFETY: as above; `&Lent` only reads.
unsafe impl Sync for Lent {}

impl Lent {
    /// To read.
    pub(super) fn read<T: bytemuck::Pod>(
        pointer: *const T,
        n: usize,
        name: &str,
    ) -> Result<Self, Failure> {
        let memory = read(pointer, n, name)?;
        let start = memory.as_ptr().cast::<u8>().cast_mut();
        Ok(Self { start, len: mem::size_of_val(memory), writable: false })
    }

    /// To read and write.
    pub(super) fn write<T: bytemuck::Pod>(
        pointer: *mut T,
        n: usize,
        name: &str,
    ) -> Result<Self, Failure> {
        let memory = write(pointer, n, name)?;
        let start = memory.as_mut_ptr().cast::<u8>();
        Ok(Self { start, len: mem::size_of_val(memory), writable: true })
    }

    /// The same piece once more, for [`Lent::check_apart`].
    pub(super) fn again(&self) -> Self {
        Self { ..*self }
    }

    /// Fails if one that is written overlaps another.
    pub(super) fn check_apart(all: &[(&str, Self)]) -> Result<(), Failure> {
        for (i, (name, one)) in all.iter().enumerate() {
            for (other_name, other) in &all[..i] {
                let (a, b) = (one.start.addr(), other.start.addr());
                let apart = a + one.len <= b || b + other.len <= a;
                if (one.writable || other.writable) && !apart && one.len > 0 && other.len > 0 {
                    return Err(Failure::size(format!("{other_name} and {name} overlap")));
                }
            }
        }
        Ok(())
    }
}

impl Bytes for Lent {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `read` or `write` made this of a slice of the caller's, which lives until the call
        // returns, and `self` does not outlive the call (doc of the type).
        unsafe { slice::from_raw_parts(self.start, self.len) }
    }
}

impl BytesMut for Lent {
    fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(self.writable, "an operand that is read was written");
        // SAFETY: as in `bytes`; the memory was made of a mutable slice, and none that is lent
        // overlaps it (`check_apart`).
        unsafe { slice::from_raw_parts_mut(self.start, self.len) }
    }
}
