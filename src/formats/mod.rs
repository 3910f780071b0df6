//! Untrusted bytes become checked, borrowed views. No arithmetic, no device.
