//! What can go wrong outside the program, with what its user needs to put it right.
//!
//! Input from outside (files, flags, the machine) gives an [`Error`]; a caller's bug panics. Every
//! message names the place (path, line, tensor, field), what was expected, what was found and, where
//! it is not obvious, the remedy. The command line maps the variants to the exit codes of
//! [`Error::exit_code`].

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
};

/// The result of everything that touches the outside world.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the outside world. Lower case, no full stop, so that it reads inside a sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a path.
    #[error("cannot {operation} {}: {source}", Printable(path.display()))]
    Io {
        /// What was tried: "open", "map", "write", ...
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what its format says.
    #[error("{}: {}", Printable(path.display()), Printable(detail))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong in it, with the byte, tensor or field.
        detail: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "{}: tensor {} has shape {found:?}, not {expected:?}", Printable(path.display()), Printable(name)
    )]
    Shape {
        /// The file or folder it came from.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// Tensors are missing from, or not expected in, a model or adapter folder.
    #[error("{}: {}", Printable(path.display()), Printable(detail))]
    Tensors {
        /// The folder.
        path: PathBuf,
        /// The first names, and how many in all.
        detail: String,
    },
    /// A line of a data file is wrong.
    #[error("{}:{line}: {}", Printable(path.display()), Printable(detail))]
    Line {
        /// The data file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: usize,
        /// What is wrong in it.
        detail: String,
    },
    /// A configuration value, from a file or a flag, that cannot be used.
    #[error("{}", Printable(.0))]
    Config(String),
    /// The command line asks for something that does not exist.
    #[error("{}", Printable(.0))]
    Usage(String),
    /// Training met a loss or gradient that is not finite; the last good adapter was kept.
    #[error("{}", Printable(.0))]
    NotFinite(String),
    /// The device asked for is not there.
    #[error("{0}")] // A compiler's log has lines.
    Device(String),
    /// The device failed in the middle of a run.
    #[error("{0}")]
    Fault(String),
    /// The user interrupted the run.
    #[error("interrupted")]
    Interrupted,
}

/// Text from outside without what a terminal obeys: control characters are replaced, whoever wrote them.
struct Printable<T>(T);

impl<T: fmt::Display> fmt::Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Filter<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl fmt::Write for Filter<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                for (i, piece) in text.split(char::is_control).enumerate() {
                    if i > 0 {
                        self.0.write_char(char::REPLACEMENT_CHARACTER)?;
                    }
                    self.0.write_str(piece)?;
                }
                Ok(())
            }
        }
        write!(Filter(f), "{}", self.0)
    }
}

impl Error {
    /// The exit code of the command line for this error: 1 failed, 2 usage, 3 bad input, 4 no such
    /// device, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { source, operation, .. } => match (source.kind(), *operation) {
                (_, "write" | "create" | "rename" | "sync" | "remove") => 1,
                _ => 3,
            },
            Self::File { .. }
            | Self::Shape { .. }
            | Self::Tensors { .. }
            | Self::Line { .. }
            | Self::Config(_) => 3,
            Self::Usage(_) => 2,
            Self::NotFinite(_) | Self::Fault(_) => 1,
            Self::Device(_) => 4,
            Self::Interrupted => 130,
        }
    }

    /// An [`Error::Io`] from the system's error.
    pub fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }

    /// A configuration's error as one of the file that it came from; others stay as they are.
    pub(crate) fn in_file(self, path: &std::path::Path) -> Self {
        match self {
            Self::Config(detail) => Self::file(path, detail),
            other => other,
        }
    }

    /// An [`Error::File`].
    pub fn file(path: impl Into<PathBuf>, detail: impl Into<String>) -> Self {
        Self::File { path: path.into(), detail: detail.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_message_commands_a_terminal() {
        let error = Error::file("a\u{1b}[2Jb", "field \u{7f}x\n is \u{9b}31m");
        assert_eq!(error.to_string(), "a\u{fffd}[2Jb: field \u{fffd}x\u{fffd} is \u{fffd}31m");
        assert_eq!(Error::Config("plain \u{e9}".into()).to_string(), "plain \u{e9}");
    }
}
