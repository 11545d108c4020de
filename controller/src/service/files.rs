//! Files of a sandbox.

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use jiff::Timestamp;
use sandgate_api::{
    agent::{AgentErrorCode, Entry, EntryKind, FileRequest},
    id::{OrgId, SandboxId},
    rest::{FileEntry, FileKind, FileList, WrittenFile},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Service, ServiceError,
    keeper::{Progress, gone},
};
use crate::{
    agent::{AgentError, Changes, Listing, Opened, Upload, Watch},
    places::Place,
    spec::Size,
};

/// Largest file in a JSON answer, in bytes: what a JSON request of 64 MiB can write.
pub const MAX_FILE: u64 = 48 * 1024 * 1024;

/// Largest file that is streamed, in bytes.
pub const MAX_STREAMED: u64 = 16 * 1024 * 1024 * 1024;

/// Most entries of a listing.
const MAX_ENTRIES: u32 = 10_000;

/// Directories that an organisation follows at once. A sandbox has a limit of its own, which its agent keeps.
pub(super) const WATCHES: usize = 32;

/// A directory that is followed. Dropping it ends that.
pub struct Watching {
    watch: Watch,
    /// Of the sandbox: its end is not heard from the agent, whose connection is cut without a word.
    progress: watch::Receiver<Progress>,
    end: CancellationToken,
    _place: Place,
}

impl Watching {
    /// There are more directories below than can be followed.
    pub fn partly(&self) -> bool {
        self.watch.partly()
    }

    /// The next changes; none after the last. After an error nothing is to be expected. Can be dropped and called again
    /// without losing anything.
    pub async fn next(&mut self) -> Option<Result<Changes, ServiceError>> {
        tokio::select! {
            biased;
            // What has no end of its own holds up nobody's restart.
            () = self.end.cancelled() => {
                let message = "the controller is shutting down; follow the directory again";
                Some(Err(ServiceError::Unavailable(message.to_owned())))
            }
            () = gone(self.progress.clone()) => {
                Some(Err(ServiceError::Conflict("the sandbox has ended".to_owned())))
            }
            changes = self.watch.next() => Some(changes?.map_err(ServiceError::from)),
        }
    }
}

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
        let record = self.running(org_id, id).await?;
        let mut written = Vec::with_capacity(files.len());
        for (index, (path, content)) in files.into_iter().enumerate() {
            let size = self
                .agent(org_id, id)
                .await?
                .write_file(&path, None, content)
                .await
                .map_err(|error| match of_disk(error, &record.spec.disk) {
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
                    "the file is larger than {MAX_FILE} bytes; files/raw has no such limit"
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
    ) -> Result<Opened, ServiceError> {
        Ok(self.agent(org_id, id).await?.open(path, MAX_STREAMED).await?)
    }

    /// Stores a file that comes as it comes, of a length and with permission bits where they are known. Answers its length.
    ///
    /// # Errors
    /// What the sandbox's file system says, and the first error among the parts; the path has then what it had.
    pub async fn store_file(
        &self,
        (org_id, id): (&OrgId, &SandboxId),
        path: &str,
        (size, mode): (Option<u64>, Option<u32>),
        parts: impl Stream<Item = Result<Bytes, ServiceError>>,
    ) -> Result<u64, ServiceError> {
        let record = self.running(org_id, id).await?;
        let agent = self.agent(org_id, id).await?;
        let stored = agent.upload(path, size, mode, parts).await;
        stored.map_err(|failed| match failed {
            Upload::Source(error) => error,
            Upload::Agent(error) => of_disk(error, &record.spec.disk),
        })
    }

    /// Follows a directory.
    ///
    /// # Errors
    /// [`ServiceError::TooMany`] when the organisation follows [`WATCHES`] already; what the sandbox's file system says.
    pub async fn watch_files(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        path: &str,
        recursive: bool,
    ) -> Result<Watching, ServiceError> {
        let agent = self.agent(org_id, id).await?;
        let Some(progress) = self.progress_of(id) else {
            return Err(ServiceError::Conflict("the sandbox is ending".to_owned()));
        };
        let Some(place) = self.shared.watches.take(org_id) else {
            let most = self.shared.watches.each();
            let message =
                format!("the organization follows {most} directories already; end one of them first");
            return Err(ServiceError::TooMany(message));
        };
        Ok(Watching {
            watch: agent.watch(path, recursive).await?,
            progress,
            end: self.shared.tasks.shutdown(),
            _place: place,
        })
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
        Ok(file_list(path, listing))
    }

    /// Finds files below a directory by a pattern.
    ///
    /// # Errors
    /// What the sandbox's file system says; [`ServiceError::Invalid`] for what is no pattern.
    pub async fn glob_files(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        base: &str,
        pattern: &str,
    ) -> Result<FileList, ServiceError> {
        let found = self
            .agent(org_id, id)
            .await?
            .glob(base, pattern, MAX_ENTRIES)
            .await;
        match found {
            Ok(listing) => Ok(file_list(base, listing)),
            Err(AgentError::Refused {
                code: AgentErrorCode::Invalid,
                message,
            }) => Err(ServiceError::Invalid {
                field: "pattern".to_owned(),
                message,
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes, makes, moves or copies something.
    ///
    /// # Errors
    /// What the sandbox's file system says; nothing was done then, or, of a directory that was to be removed, not all.
    pub async fn work_on_files(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        request: FileRequest,
    ) -> Result<(), ServiceError> {
        let record = self.running(org_id, id).await?;
        let destination = match &request {
            FileRequest::Move { destination, .. } | FileRequest::Copy { destination, .. } => {
                Some(destination.clone())
            }
            FileRequest::Remove { .. }
            | FileRequest::MakeDirectory { .. }
            | FileRequest::Glob { .. }
            | FileRequest::Open { .. }
            | FileRequest::Upload { .. }
            | FileRequest::Watch { .. } => None,
        };
        let done = self.agent(org_id, id).await?.work(request).await;
        done.map_err(|error| match of_disk(error, &record.spec.disk) {
            // The agent's messages begin with the path that they are about.
            ServiceError::Invalid { field: _, message } if destination.is_some() => {
                let is_about = |path: &String| {
                    message
                        .strip_prefix(path.trim_end_matches('/'))
                        .is_some_and(|rest| rest.starts_with(':'))
                };
                let field = match destination {
                    Some(destination) if is_about(&destination) => "destination",
                    Some(_) | None => "source",
                };
                ServiceError::Invalid {
                    field: field.to_owned(),
                    message,
                }
            }
            other => other,
        })
    }
}

/// Names the limit that was met when the disk is full: a client can free room, and trying again is no use.
fn of_disk(error: AgentError, disk: &Size) -> ServiceError {
    match error {
        AgentError::Refused {
            code: AgentErrorCode::NoSpace,
            message,
        } => ServiceError::Conflict(format!("the sandbox's disk of {disk} is full: {message}")),
        other => other.into(),
    }
}

fn file_list(path: &str, listing: Listing) -> FileList {
    let mut files: Vec<FileEntry> = listing.entries.into_iter().map(entry).collect();
    files.sort_by(|left, right| left.path.cmp(&right.path));
    FileList {
        path: path.to_owned(),
        files,
        truncated: listing.truncated,
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
        target: entry.target,
    }
}
