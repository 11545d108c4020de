//! What programs in a sandbox trust: the image's certificate authorities and the sandbox's own, as one file
//! that is mounted over those of the image, and named in the environment for runtimes that bring their own.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

/// Where distributions keep all authorities in one file. What is a symbolic link in an image leads to another
/// of these.
const BUNDLES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/lib/ssl/cert.pem",
];

/// Variables that name such a file. OpenSSL and Python; Node; requests; curl; Git; pip; the AWS tools; Deno;
/// Cargo.
const VARIABLES: [&str; 9] = [
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "DENO_CERT",
    "CARGO_HTTP_CAINFO",
];

/// Longest bundle of an image that is read, in bytes.
const LONGEST: u64 = 8 * 1024 * 1024;

/// Name of the merged file in a sandbox's folder on the node.
pub(super) const FILE: &str = "ca-certificates.crt";

/// The files of an image that hold its authorities, by their paths inside.
pub(super) fn bundles(root: &Path) -> Vec<&'static str> {
    let is_file = |path: &&str| {
        fs::symlink_metadata(outside(root, path)).is_ok_and(|metadata| metadata.file_type().is_file())
    };
    BUNDLES.into_iter().filter(is_file).collect()
}

/// The variables for programs inside, when the image has a bundle.
pub(super) fn variables(bundles: &[&'static str]) -> Vec<(String, String)> {
    let Some(bundle) = bundles.first() else {
        return Vec::new();
    };
    VARIABLES
        .into_iter()
        .map(|name| (name.to_owned(), (*bundle).to_owned()))
        .collect()
}

/// The image's authorities and one more, PEM.
pub(super) fn merged(root: &Path, bundles: &[&'static str], certificate: &str) -> io::Result<String> {
    let mut text = String::new();
    if let Some(bundle) = bundles.first() {
        fs::File::open(outside(root, bundle))?
            .take(LONGEST)
            .read_to_string(&mut text)?;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
    }
    text.push_str(certificate);
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn outside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn an_image_s_authorities_and_one_more() {
        let root = tempfile::tempdir().unwrap();
        assert!(bundles(root.path()).is_empty());
        assert!(variables(&[]).is_empty());
        fs::create_dir_all(root.path().join("etc/ssl/certs")).unwrap();
        fs::create_dir_all(root.path().join("usr/lib/ssl")).unwrap();
        fs::write(root.path().join("etc/ssl/certs/ca-certificates.crt"), "ONE").unwrap();
        // A link that, followed from here, would leave the image.
        symlink("/etc/passwd", root.path().join("usr/lib/ssl/cert.pem")).unwrap();
        let found = bundles(root.path());
        assert_eq!(found, ["/etc/ssl/certs/ca-certificates.crt"]);
        assert_eq!(merged(root.path(), &found, "TWO").unwrap(), "ONE\nTWO\n");
        let variables = variables(&found);
        assert_eq!(variables.len(), VARIABLES.len());
        assert!(variables.iter().all(|(_, path)| path == found[0]));
    }
}
