//! What the controller asks of a sandbox's files beyond writing, reading and listing, and what the agent answers.

use serde::{Deserialize, Serialize};

/// Work on files. Every path is absolute and without `..`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum FileRequest {
    /// Removes a file, a link (never what is behind it) or a directory. Answered by [`FileReply::Done`].
    Remove {
        /// What to remove.
        path: String,
        /// Also a directory with everything in it; else only an empty one ([`super::AgentErrorCode::NotEmpty`]).
        recursive: bool,
    },
    /// Makes a directory. Answered by [`FileReply::Done`].
    MakeDirectory {
        /// The new directory.
        path: String,
        /// Also its parents; then one that is there already is no error.
        parents: bool,
    },
    /// Gives a file, link or directory another path, making its parents; a file there is replaced. Answered by
    /// [`FileReply::Done`].
    Move {
        /// What is there.
        source: String,
        /// Its new path, not the directory to put it in.
        destination: String,
    },
    /// Copies a file, or a directory with everything in it, making the destination's parents. A file there is replaced;
    /// a directory is not ([`super::AgentErrorCode::Exists`]). Answered by [`FileReply::Done`].
    Copy {
        /// What is there; through a link, what is behind it.
        source: String,
        /// The path of the copy, not the directory to put it in.
        destination: String,
    },
    /// Finds what is below a directory by a pattern of its path relative to that directory. Answered as
    /// [`super::Request::List`] is.
    Glob {
        /// The directory.
        base: String,
        /// `*` and `?` within a component, `**` across them, `[a-z]`, `{one,other}`.
        pattern: String,
        /// At most so many entries.
        limit: u32,
    },
}

/// Answers to a [`FileRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum FileReply {
    /// It is done.
    Done,
}
