//! Files of a sandbox.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// `POST /sandbox/:id/files`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesWritten {
    /// Always true.
    pub success: bool,
    /// In the order of the request.
    pub files: Vec<WrittenFile>,
}

/// One file of [`FilesWritten`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// Absolute path.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
}

/// `PUT /sandbox/:id/files/raw?path=`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStored {
    /// Always true.
    pub success: bool,
    /// Absolute path.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
}

/// `GET /sandbox/:id/files?path=`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRead {
    /// Absolute path.
    pub path: String,
    /// Base64 (standard alphabet, padded).
    pub content: String,
    /// Length of the file, before the encoding, in bytes.
    pub size: u64,
}

/// `GET /sandbox/:id/files/list?path=`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileList {
    /// The directory.
    pub path: String,
    /// Sorted by path.
    pub files: Vec<FileEntry>,
    /// There are more than are listed.
    pub truncated: bool,
}

/// One entry of [`FileList`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Last component of the path.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: FileKind,
    /// Length in bytes; 0 for what is not a file.
    pub size: u64,
    /// Last change of the content.
    pub modified_at: Timestamp,
    /// Permission bits in octal, for example `0644`.
    pub mode: String,
    /// Where a symbolic link leads. Only of a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// What a [`FileEntry`] is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A socket, FIFO or device.
    Other,
}

/// One event of `GET /sandbox/:id/files/watch`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WatchEvent {
    /// The first: what happens from here on is told.
    Watching {
        /// The directory.
        path: String,
        /// There are more directories below it than can be followed.
        partly: bool,
    },
    /// A file, link or directory came to this path.
    Created {
        /// Absolute.
        path: String,
        /// It is a directory.
        directory: bool,
    },
    /// A file's content changed.
    Modified {
        /// Absolute.
        path: String,
        /// It is a directory.
        directory: bool,
    },
    /// What had this path has it no more.
    Deleted {
        /// Absolute.
        path: String,
        /// It was a directory.
        directory: bool,
    },
    /// More happened than is told: list what you want to know.
    Overflow,
    /// It ended for this reason.
    Error {
        /// For people.
        error: String,
    },
    /// The last: the directory is gone, or an error ended it.
    Done,
}
