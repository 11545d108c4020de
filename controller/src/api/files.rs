//! Files of a sandbox.

use axum::{Json, extract::State, response::Response};
use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose::STANDARD},
};
use bytes::Bytes;
use sandgate_api::{
    agent::FileRequest,
    error::ErrorEnvelope,
    rest::{FileList, FileRead, FilesWritten, Success, WatchEvent},
};

use super::{
    auth::Authenticated,
    bodies::{DeleteBody, FilesBody, GlobBody, MakeDirectoryBody, RelocationBody},
    document::{Document, LargeDocument},
    error::ApiError,
    path::{self, SandboxPath},
    query::Parameters,
    sse,
};
use crate::service::{Caller, Scope, Service};

/// Most files of one request.
pub(super) const MAX_FILES: usize = 1_000;

/// Where is looked unless something else is asked for.
pub(super) const DIRECTORY: &str = "/workspace";

/// Longest pattern, in bytes.
const MAX_PATTERN: usize = 1_024;

/// Padding may be left out: there is only one way to read it.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// `{"files": [{"path", "content"}]}`, or one file as `{"path", "content"}`.
#[utoipa::path(
    post, path = "/sandbox/{id}/files", operation_id = "write_files", tag = "files",
    request_body = FilesBody, responses((status = 200, description = "What was written", body = FilesWritten))
)]
pub(super) async fn write(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    LargeDocument(mut document): LargeDocument,
) -> Result<Json<FilesWritten>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let files = files(document)?;
    let files = service.write_files(caller.org_id(), &id, files).await?;
    Ok(Json(FilesWritten { success: true, files }))
}

fn files(mut document: Document) -> Result<Vec<(String, Bytes)>, ApiError> {
    let Some(listed) = document.documents("files")? else {
        if document.is_empty() {
            return Err(ApiError::field("files", "is required"));
        }
        return Ok(vec![file(document)?]);
    };
    document.finish()?;
    if listed.is_empty() || listed.len() > MAX_FILES {
        return Err(ApiError::field(
            "files",
            format!("expected 1 to {MAX_FILES} files"),
        ));
    }
    listed.into_iter().map(file).collect()
}

fn file(mut document: Document) -> Result<(String, Bytes), ApiError> {
    let path = document.required_text("path")?;
    path::file(&document.path("path"), &path)?;
    let mut content = document.required_text("content")?;
    let field = document.path("content");
    document.finish()?;
    // `base64` of coreutils breaks lines.
    content.retain(|character| !character.is_ascii_whitespace());
    match LENIENT.decode(content) {
        Ok(bytes) => Ok((path, bytes.into())),
        Err(error) => Err(ApiError::field(field, format!("is not base64: {error}"))),
    }
}

/// Reads a file.
#[utoipa::path(
    get, path = "/sandbox/{id}/files", operation_id = "read_file", tag = "files",
    params(("path" = String, Query, description = "Absolute")),
    responses((status = 200, description = "The file, base64", body = FileRead))
)]
pub(super) async fn read(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
) -> Result<Json<FileRead>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let path = wanted(&parameters)?;
    let content = service.read_file(caller.org_id(), &id, path).await?;
    Ok(Json(FileRead {
        path: path.to_owned(),
        size: u64::try_from(content.len()).unwrap_or(u64::MAX),
        content: STANDARD.encode(content),
    }))
}

/// Lists a directory.
#[utoipa::path(
    get, path = "/sandbox/{id}/files/list", operation_id = "list_files", tag = "files",
    params(
        ("path" = Option<String>, Query, description = "Absolute; `/workspace` when left out"),
        ("recursive" = Option<bool>, Query, description = "Also what is below")
    ),
    responses((status = 200, description = "Entries, sorted by path", body = FileList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
) -> Result<Json<FileList>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let directory = parameters.text("path").unwrap_or(DIRECTORY);
    path::inside("path", directory)?;
    let recursive = parameters.flag("recursive")?;
    Ok(Json(
        service
            .list_files(caller.org_id(), &id, directory, recursive)
            .await?,
    ))
}

/// Finds files by a pattern of their path: `*` and `?` within a component, `**` across them, `[a-z]`, `{one,other}`.
#[utoipa::path(
    post, path = "/sandbox/{id}/files/glob", operation_id = "glob_files", tag = "files",
    request_body = GlobBody,
    responses((status = 200, description = "Entries, sorted by path", body = FileList))
)]
pub(super) async fn glob(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<FileList>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let pattern = document.required_text("pattern")?;
    let base = document.text("path")?.unwrap_or_else(|| DIRECTORY.to_owned());
    document.finish()?;
    path::inside("path", &base)?;
    let pattern = relative(&base, &pattern)?;
    Ok(Json(
        service.glob_files(caller.org_id(), &id, &base, pattern).await?,
    ))
}

/// A pattern relative to the directory it is looked for in; one of a whole path loses the directory.
fn relative<'a>(base: &str, pattern: &'a str) -> Result<&'a str, ApiError> {
    let refuse = |message: &str| Err(ApiError::field("pattern", message));
    let inside = match pattern.strip_prefix('/') {
        None => Some(pattern),
        Some(_) => pattern
            .strip_prefix(base.trim_end_matches('/'))
            .and_then(|rest| rest.strip_prefix('/')),
    };
    match inside {
        None => refuse(&format!(
            "expected a pattern of paths below {base}, for example **/*.py"
        )),
        Some("") => refuse("is required"),
        Some(inside) if inside.len() > MAX_PATTERN => refuse("the pattern is too long"),
        Some(inside) if inside.split('/').any(|part| part == "..") => {
            refuse("`..` is not possible in a pattern")
        }
        Some(inside) => Ok(inside.strip_prefix("./").unwrap_or(inside)),
    }
}

/// Removes a file, a link or a directory. What it is can be said in the body or in the query.
#[utoipa::path(
    delete, path = "/sandbox/{id}/files", operation_id = "delete_file", tag = "files",
    params(
        ("path" = Option<String>, Query, description = "Absolute; unless it is in the body"),
        ("recursive" = Option<bool>, Query, description = "Also a directory with everything in it")
    ),
    request_body = DeleteBody,
    responses((status = 200, description = "It is gone", body = Success))
)]
pub(super) async fn delete(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
    mut document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let named = document.text("path")?;
    let recursive = document.flag("recursive")?;
    document.finish()?;
    let path = match named {
        Some(path) => path,
        None => parameters.text("path").unwrap_or_default().to_owned(),
    };
    path::inside("path", &path)?;
    let recursive = match recursive {
        Some(recursive) => recursive,
        None => parameters.flag("recursive")?,
    };
    let request = FileRequest::Remove { path, recursive };
    service.work_on_files(caller.org_id(), &id, request).await?;
    Ok(Json(Success::OK))
}

/// Makes a directory.
#[utoipa::path(
    post, path = "/sandbox/{id}/files/mkdir", operation_id = "make_directory", tag = "files",
    request_body = MakeDirectoryBody,
    responses((status = 200, description = "It is there", body = Success))
)]
pub(super) async fn mkdir(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let path = document.required_text("path")?;
    let parents = document.flag("recursive")?.unwrap_or(true);
    document.finish()?;
    path::inside("path", &path)?;
    let request = FileRequest::MakeDirectory { path, parents };
    service.work_on_files(caller.org_id(), &id, request).await?;
    Ok(Json(Success::OK))
}

/// Gives a file, link or directory another path. A file that is there is replaced.
#[utoipa::path(
    post, path = "/sandbox/{id}/files/move", operation_id = "move_file", tag = "files",
    request_body = RelocationBody,
    responses((status = 200, description = "It has the new path", body = Success))
)]
pub(super) async fn relocate(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let (source, destination) = relocation(document, &caller)?;
    let request = FileRequest::Move { source, destination };
    service.work_on_files(caller.org_id(), &id, request).await?;
    Ok(Json(Success::OK))
}

/// Copies a file, or a directory with everything in it. A file that is there is replaced, a directory is not.
#[utoipa::path(
    post, path = "/sandbox/{id}/files/copy", operation_id = "copy_file", tag = "files",
    request_body = RelocationBody,
    responses((status = 200, description = "It is there twice", body = Success))
)]
pub(super) async fn copy(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let (source, destination) = relocation(document, &caller)?;
    let request = FileRequest::Copy { source, destination };
    service.work_on_files(caller.org_id(), &id, request).await?;
    Ok(Json(Success::OK))
}

fn relocation(mut document: Document, caller: &Caller) -> Result<(String, String), ApiError> {
    document.organization(caller)?;
    let source = document.required_text("source")?;
    let destination = document.required_text("destination")?;
    document.finish()?;
    path::inside("source", &source)?;
    path::inside("destination", &destination)?;
    Ok((source, destination))
}

/// Tells what happens below a directory as it happens; a comment every few seconds keeps it open. What cannot be told is
/// an `overflow`. It ends with `done`: after an `error` when the sandbox ended, else when the directory is gone.
#[utoipa::path(
    get, path = "/sandbox/{id}/files/watch", operation_id = "watch_files", tag = "files",
    params(
        ("path" = Option<String>, Query, description = "The directory, absolute; `/workspace` when left out"),
        ("recursive" = Option<bool>, Query, description = "Also what is below its directories, as far as there are no more than 2,000; `true` when left out")
    ),
    responses(
        (status = 200, description = "Changes, one an event", body = WatchEvent, content_type = "text/event-stream"),
        (status = 429, description = "The organisation follows 32 directories already", body = ErrorEnvelope)
    )
)]
pub(super) async fn watch(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let directory = parameters.text("path").unwrap_or(DIRECTORY);
    path::inside("path", directory)?;
    let recursive = match parameters.text("recursive") {
        None => true,
        Some(_) => parameters.flag("recursive")?,
    };
    let watching = service
        .watch_files(caller.org_id(), &id, directory, recursive)
        .await?;
    Ok(sse::changes(directory.to_owned(), watching))
}

fn wanted(parameters: &Parameters) -> Result<&str, ApiError> {
    let path = parameters.text("path").unwrap_or_default();
    path::inside("path", path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(body: &Value) -> Result<Vec<(String, Bytes)>, ApiError> {
        files(Document::parse(body.to_string().as_bytes())?)
    }

    #[test]
    fn files_come_as_a_list_or_alone() {
        let expected = vec![("/workspace/a".to_owned(), Bytes::from_static(b"hello"))];
        for content in ["aGVsbG8=", "aGVs\nbG8=\n", "aGVsbG8"] {
            let list = json!({"files": [{"path": "/workspace/a", "content": content}]});
            assert_eq!(parsed(&list).expect("files"), expected, "{content:?}");
            let alone = json!({"path": "/workspace/a", "content": content});
            assert_eq!(parsed(&alone).expect("a file"), expected, "{content:?}");
        }
        let empty = parsed(&json!({"path": "/a", "content": ""})).expect("an empty file");
        assert!(empty[0].1.is_empty());
    }

    #[test]
    fn a_pattern_is_relative_to_its_directory() {
        for (pattern, expected) in [
            ("**/*.py", Some("**/*.py")),
            ("./a", Some("a")),
            ("/workspace/**/*.py", Some("**/*.py")),
            ("/workspace", None),
            ("/workspaces/a", None),
            ("/etc/*", None),
            ("", None),
            ("../*", None),
            ("a/../../b", None),
        ] {
            let found = relative("/workspace", pattern);
            let field = found.as_ref().err().and_then(ApiError::refused_field);
            assert_eq!(found.as_deref().ok(), expected, "{pattern}");
            assert_eq!(field.as_deref(), expected.is_none().then_some("pattern"));
        }
        assert_eq!(relative("/", "/etc/*").ok(), Some("etc/*"));
        assert!(relative("/", &"x".repeat(MAX_PATTERN + 1)).is_err());
    }

    #[test]
    fn a_refusal_names_the_field() {
        let many: Vec<_> = (0..=MAX_FILES)
            .map(|_| json!({"path": "/a", "content": ""}))
            .collect();
        for (body, field) in [
            (json!({}), "files"),
            (json!({"files": []}), "files"),
            (json!({"files": {}}), "files"),
            (json!({"files": many}), "files"),
            (json!({"files": ["a"]}), "files[0]"),
            (json!({"files": [{"content": ""}]}), "files[0].path"),
            (json!({"files": [{"path": "/a"}]}), "files[0].content"),
            (
                json!({"files": [{"path": "/a", "content": 1}]}),
                "files[0].content",
            ),
            (
                json!({"files": [{"path": "/a", "content": "%"}]}),
                "files[0].content",
            ),
            (json!({"files": [{"path": "a", "content": ""}]}), "files[0].path"),
            (
                json!({"files": [{"path": "/a/../b", "content": ""}]}),
                "files[0].path",
            ),
            (
                json!({"files": [{"path": "/a/", "content": ""}]}),
                "files[0].path",
            ),
            (
                json!({"files": [{"path": "/a", "content": "", "x": 1}]}),
                "files[0].x",
            ),
            (json!({"files": [{"path": "/a", "content": ""}], "x": 1}), "x"),
            (json!({"path": "/a"}), "content"),
        ] {
            let error = parsed(&body).expect_err("refused");
            assert_eq!(error.refused_field().as_deref(), Some(field));
        }
    }
}
