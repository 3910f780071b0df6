//! The seam (skeleton).
/// A backend.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Storage.
    type Buffer: Send + Sync;
}
