//! Files of a sandbox.

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use sandgate_api::{
    agent::{Entry, EntryKind},
    id::{OrgId, SandboxId},
    rest::{FileEntry, FileKind, FileList, WrittenFile},
};

use super::{Service, ServiceError};
use crate::agent::FileStream;

/// Largest file in a JSON answer, in bytes: what a JSON request of 64 MiB can write.
pub const MAX_FILE: u64 = 48 * 1024 * 1024;

/// Largest file that is streamed, in bytes.
const MAX_DOWNLOAD: u64 = 16 * 1024 * 1024 * 1024;

/// Most entries of a listing.
const MAX_ENTRIES: u32 = 10_000;

impl Service {
    /// Writes files one after the other, each with its parents.
    ///
    /// # Errors
    /// What the sandbox's file system says; the files before the one that failed are written.
    pub async fn write_files(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        files: Vec<(String, Bytes)>,
    ) -> Result<Vec<WrittenFile>, ServiceError> {
        self.running(org_id, id).await?;
        let mut written = Vec::with_capacity(files.len());
        for (index, (path, content)) in files.into_iter().enumerate() {
            let size = self
                .agent(org_id, id)
                .await?
                .write_file(&path, None, content)
                .await
                .map_err(|error| match ServiceError::from(error) {
                    ServiceError::Invalid { field: _, message } => ServiceError::Invalid {
                        field: format!("files[{index}].path"),
                        message,
                    },
                    other => other,
                })?;
            written.push(WrittenFile { path, size });
        }
        Ok(written)
    }

    /// Reads a whole file of at most [`MAX_FILE`] bytes.
    ///
    /// # Errors
    /// What the sandbox's file system says.
    pub async fn read_file(&self, org_id: &OrgId, id: &SandboxId, path: &str) -> Result<Bytes, ServiceError> {
        let mut file = self
            .agent(org_id, id)
            .await?
            .read_file(path, MAX_FILE)
            .await
            .map_err(|error| match ServiceError::from(error) {
                ServiceError::TooLarge(_) => ServiceError::TooLarge(format!(
                    "the file is larger than {MAX_FILE} bytes; files/download has no such limit"
                )),
                other => other,
            })?;
        // The size is the sandbox's word: room is made for what has come.
        let mut content = BytesMut::new();
        while let Some(part) = file.next().await {
            content.extend_from_slice(&part?);
        }
        Ok(content.freeze())
    }

    /// Opens a file to be streamed.
    ///
    /// # Errors
    /// What the sandbox's file system says.
    pub async fn open_file(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        path: &str,
    ) -> Result<FileStream, ServiceError> {
        Ok(self
            .agent(org_id, id)
            .await?
            .read_file(path, MAX_DOWNLOAD)
            .await?)
    }

    /// Lists a directory.
    ///
    /// # Errors
    /// What the sandbox's file system says.
    pub async fn list_files(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        path: &str,
        recursive: bool,
    ) -> Result<FileList, ServiceError> {
        let listing = self
            .agent(org_id, id)
            .await?
            .list(path, recursive, MAX_ENTRIES)
            .await?;
        let mut files: Vec<FileEntry> = listing.entries.into_iter().map(entry).collect();
        files.sort_by(|left, right| left.path.cmp(&right.path));
        Ok(FileList {
            path: path.to_owned(),
            files,
            truncated: listing.truncated,
        })
    }
}

fn entry(entry: Entry) -> FileEntry {
    FileEntry {
        name: entry.name,
        path: entry.path,
        kind: match entry.kind {
            EntryKind::File => FileKind::File,
            EntryKind::Directory => FileKind::Directory,
            EntryKind::Symlink => FileKind::Symlink,
            EntryKind::Other => FileKind::Other,
        },
        size: entry.size,
        // The sandbox's word: a time out of range is the epoch.
        modified_at: Timestamp::from_second(entry.modified).unwrap_or(Timestamp::UNIX_EPOCH),
        mode: format!("{:04o}", entry.mode & 0o7777),
    }
}
