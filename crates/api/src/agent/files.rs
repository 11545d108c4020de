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
    /// Opens a regular file. Answered by [`FileReply::Opened`]; the connection stays open for one [`FilePart`].
    Open {
        /// The file.
        path: String,
    },
    /// Writes a file whose bytes come as they come, replacing it, making its parents: data frames, the last of them empty.
    /// Nothing shows at the path before that one. Answered by [`super::Reply::Written`].
    Upload {
        /// The file.
        path: String,
        /// Length in bytes, where it is known; more or less is then [`super::AgentErrorCode::Invalid`].
        #[serde(default)]
        size: Option<u64>,
        /// Permission bits; those of the old file, or 0644, when absent.
        #[serde(default)]
        mode: Option<u32>,
    },
    /// Follows a directory. Answered by [`FileReply::Watching`], then by [`FileReply::Changes`] as they come, and by
    /// [`FileReply::Done`] when the directory itself is gone.
    Watch {
        /// The directory.
        path: String,
        /// Also what is below its directories (symbolic links are not followed).
        recursive: bool,
    },
}

/// What of an opened file is wanted, as a JSON frame. [`super::FrameKind::Data`] frames of together `length` bytes answer it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePart {
    /// First byte.
    pub offset: u64,
    /// How many; no more than there are behind the offset.
    pub length: u64,
}

/// A file as it was when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedFile {
    /// Its length in bytes.
    pub size: u64,
    /// Last change of its content, in seconds since the epoch.
    pub modified: i64,
    /// A number that is another one when the file is another one, or its content changed.
    pub version: u64,
}

/// Answers to a [`FileRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum FileReply {
    /// It is done.
    Done,
    /// The file is open.
    Opened(OpenedFile),
    /// What happens from here on is told.
    Watching {
        /// There are more directories below than can be followed.
        partly: bool,
    },
    /// Something happened.
    Changes {
        /// In their order.
        changes: Vec<FileChange>,
        /// More happened than is told: whoever wants to know must look.
        lost: bool,
    },
}

/// Something that happened below a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// What.
    pub action: FileAction,
    /// To what: an absolute path.
    pub path: String,
    /// It is a directory.
    pub directory: bool,
}

/// What happened to a file. One that gets another path is deleted from the old one and created at the new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileAction {
    /// It came.
    Created,
    /// Its content changed.
    Modified,
    /// It went.
    Deleted,
}
