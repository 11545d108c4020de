//! Several files in one request, as browsers and curl send them.

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
};
use futures_util::stream;
use http::{HeaderMap, header};
use sandgate_api::{
    id::SandboxId,
    rest::{FilesWritten, WrittenFile},
};

use super::{
    auth::Authenticated,
    document::drain,
    error::ApiError,
    files::{DIRECTORY, MAX_FILES},
    multipart::{Multipart, invalid},
    path::{self, MAX_PATH, SandboxPath},
    query::Parameters,
};
use crate::service::{Caller, Scope, Service, ServiceError};

/// Stores every file of a form, one after the other, below one directory. Each shows at its path when all of it came;
/// those before one that is refused stay.
#[utoipa::path(
    post, path = "/sandbox/{id}/files/upload", operation_id = "upload_files", tag = "files",
    params(("path" = Option<String>, Query, description = "The directory, absolute; `/workspace` when left out. A field `path` of the form is another one, for the files behind it")),
    request_body(content = Vec<u8>, content_type = "multipart/form-data", description = "Parts with a `filename`, which may hold directories"),
    responses((status = 200, description = "What was written", body = FilesWritten))
)]
pub(super) async fn upload(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
    request: Request,
) -> Result<Json<FilesWritten>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let directory = parameters.text("path").unwrap_or(DIRECTORY);
    path::inside("path", directory)?;
    let (head, mut body) = request.into_parts();
    match store(&service, &caller, &id, directory, &head.headers, &mut body).await {
        Ok(files) => Ok(Json(FilesWritten { success: true, files })),
        Err(error) => {
            if !head.headers.contains_key(header::EXPECT) {
                drain(&mut body).await;
            }
            Err(error)
        }
    }
}

async fn store(
    service: &Service,
    caller: &Caller,
    id: &SandboxId,
    directory: &str,
    headers: &HeaderMap,
    body: &mut Body,
) -> Result<Vec<WrittenFile>, ApiError> {
    let mut form = Multipart::new(headers, body)?;
    let mut directory = directory.to_owned();
    let mut written = Vec::new();
    while let Some(part) = form.next().await? {
        let Some(file_name) = part.file_name else {
            if part.name != "path" {
                let field: String = part.name.chars().take(80).collect();
                return Err(ApiError::field(field, "expected a file, or the field `path`"));
            }
            directory = form.text(MAX_PATH).await?.unwrap_or_default();
            path::inside("path", &directory)?;
            continue;
        };
        let path = below(&directory, &file_name)?;
        if written.len() == MAX_FILES {
            return Err(ApiError::field(
                "files",
                format!("expected at most {MAX_FILES} files"),
            ));
        }
        let bytes = stream::unfold(&mut form, |form| async {
            let bytes = form.bytes().await.transpose()?;
            Some((bytes, form))
        });
        let size = service
            .store_file((caller.org_id(), id), &path, (None, None), bytes)
            .await
            .map_err(|error| named(error, &file_name))?;
        written.push(WrittenFile { path, size });
    }
    if written.is_empty() {
        return Err(invalid("files", "the form holds no file").into());
    }
    Ok(written)
}

/// What is wrong with a path is wrong with the name that the form gives.
fn named(error: ServiceError, file_name: &str) -> ServiceError {
    match error {
        ServiceError::Invalid { field, message } if field == "path" => {
            invalid("filename", &format!("`{}`: {message}", file_name.escape_debug()))
        }
        other => other,
    }
}

fn below(directory: &str, file_name: &str) -> Result<String, ApiError> {
    if file_name.is_empty() || file_name.starts_with('/') {
        return Err(ApiError::field(
            "filename",
            "expected the name of a file, relative to the directory",
        ));
    }
    let path = format!("{}/{file_name}", directory.trim_end_matches('/'));
    path::file("filename", &path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_form_stays_below_its_directory() {
        for (directory, name, expected) in [
            ("/workspace", "a.txt", Some("/workspace/a.txt")),
            ("/workspace/", "d/a.txt", Some("/workspace/d/a.txt")),
            ("/", "a", Some("/a")),
            ("/workspace", "", None),
            ("/workspace", "/etc/passwd", None),
            ("/workspace", "../a", None),
            ("/workspace", "a/../../b", None),
            ("/workspace", "a/", None),
        ] {
            let found = below(directory, name);
            assert_eq!(found.as_deref().ok(), expected, "{name}");
        }
    }
}
