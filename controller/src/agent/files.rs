//! Work on files beyond writing, reading and listing.

use sandgate_api::agent::{FileReply, FileRequest, Reply, Request};
use tokio::time::Instant;

use super::{Agent, AgentError, Listing, unexpected};

impl Agent {
    /// Has something done that is answered by [`FileReply::Done`]. Dropping the future stops it, and undoes what is half done.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the sandbox's file system says no.
    pub async fn work(mut self, request: FileRequest) -> Result<(), AgentError> {
        let deadline = Instant::now() + self.patience.work;
        self.request(&Request::Files(request), deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Files(FileReply::Done) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Finds what is below a directory by a pattern, at most `limit` entries.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the directory is not there, or the pattern is none.
    pub async fn glob(self, base: &str, pattern: &str, limit: u32) -> Result<Listing, AgentError> {
        let request = Request::Files(FileRequest::Glob {
            base: base.to_owned(),
            pattern: pattern.to_owned(),
            limit,
        });
        self.listing(&request, limit).await
    }
}
