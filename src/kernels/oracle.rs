//! The oracle: every operation in plain f64.
