//! Objects by handle: numbers that are given out once and never followed as addresses.
//!
//! A call holds its objects for as long as it runs, so that freeing one meanwhile in another thread
//! ends the handle at once and the object when the call is done.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::status::{Failure, POLYTAPE_BAD_HANDLE, POLYTAPE_NULL};

/// What a handle of C's type `Self` stands for.
pub(super) trait Handle {
    /// The object.
    type Object: Send + Sync + 'static;
    /// Its name in messages.
    const NAME: &'static str;
}

#[derive(Default)]
struct Registry {
    /// Counts all that were ever given out.
    last: usize,
    objects: HashMap<usize, Arc<dyn Any + Send + Sync>>,
}

/// The one thing that is global here: which numbers are handles.
static REGISTRY: RwLock<Option<Registry>> = RwLock::new(None);

/// Odd multiples of this are no addresses of objects, so that a handle that is followed by mistake
/// is not mistaken for one.
const STRIDE: usize = 16;

/// A handle for a new object.
pub(super) fn give<H: Handle>(object: H::Object) -> *mut H {
    let mut registry = REGISTRY.write().unwrap_or_else(PoisonError::into_inner);
    let registry = registry.get_or_insert_default();
    registry.last += 1;
    let number = registry.last * STRIDE + 1;
    registry.objects.insert(number, Arc::new(object));
    std::ptr::without_provenance_mut(number)
}

/// The object of a handle.
pub(super) fn object<H: Handle>(handle: *const H) -> Result<Arc<H::Object>, Failure> {
    if handle.is_null() {
        return Err(Failure::new(POLYTAPE_NULL, format!("the {} is null", H::NAME)));
    }
    let registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    let found = registry.as_ref().and_then(|registry| registry.objects.get(&handle.addr()));
    found.cloned().and_then(|object| object.downcast().ok()).ok_or_else(|| stale(H::NAME))
}

/// Ends a handle; null is fine.
pub(super) fn free<H: Handle>(handle: *mut H) -> Result<(), Failure> {
    if handle.is_null() {
        return Ok(());
    }
    drop(object(handle)?);
    let mut registry = REGISTRY.write().unwrap_or_else(PoisonError::into_inner);
    let freed = registry.as_mut().and_then(|registry| registry.objects.remove(&handle.addr()));
    drop(registry); // Or the lock is held while a large object goes.
    // Another thread may have been faster.
    freed.map(drop).ok_or_else(|| stale(H::NAME))
}

fn stale(name: &str) -> Failure {
    let message = format!("this is not a {name}: it was freed, or is something else");
    Failure::new(POLYTAPE_BAD_HANDLE, message)
}
