//! What every error message must be, whatever bytes caused it.

use polytape::Error;

/// Asserts that an error blames the input, begins with the file's name, and can be printed: short,
/// and without control characters, which a terminal would obey.
pub fn assert_presentable(error: &Error, file_name: &str) {
    let message = error.to_string();
    assert_eq!(error.exit_code(), 3, "{message}");
    assert!(message.contains(file_name), "no file in {message:?}");
    assert!(message.len() <= 16 << 10, "{} bytes: {message:.200}", message.len());
    assert!(!message.contains(char::is_control), "control characters in {message:?}");
}
