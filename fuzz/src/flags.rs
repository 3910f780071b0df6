//! Arbitrary lines as the arguments of a command line.
//!
//! They are read or refused, with a message that can be printed; nothing is run. Hugging Face's spelling
//! of the flags is read as ours is.

use polytape::cli::check_arguments;

/// An argument a line.
pub fn check(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let arguments: Vec<String> =
        std::iter::once("polytape").chain(text.lines()).map(str::to_owned).collect();
    let verdict = check_arguments(&arguments);
    if let Err(message) = &verdict {
        assert!(!message.is_empty() && message.len() < (64 << 10) + 16 * data.len(), "{message}");
    }
    // Every flag's name with underscores.
    let snake: Vec<String> = arguments
        .iter()
        .map(|argument| match argument.strip_prefix("--") {
            Some(flag) => {
                let end = flag.find('=').unwrap_or(flag.len());
                format!("--{}{}", flag[..end].replace('-', "_"), &flag[end..])
            }
            None => argument.clone(),
        })
        .collect();
    // "---" and the like begin with dashes that are no part of a name.
    if !arguments.iter().any(|argument| argument.starts_with("---") || argument == "--") {
        assert_eq!(check_arguments(&snake).is_ok(), verdict.is_ok(), "{snake:?}");
    }
}
