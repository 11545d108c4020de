//! Requests inside a flow: what is known of one, and what a rule lists of them.

use std::fmt;

use crate::{
    error::PolicyError,
    path::{NormalPath, PathPattern},
    reason::Reason,
};

/// Longest method in bytes.
const MAX_METHOD: usize = 32;
/// Methods in one list.
pub(crate) const MAX_METHODS: usize = 32;
/// Paths in one list.
pub(crate) const MAX_PATHS: usize = 100;

/// One HTTP request, as far as rules look at it.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    /// The method as sent; methods are case-sensitive (RFC 9110, 9.1).
    pub method: &'a str,
    /// The canonical path.
    pub path: &'a NormalPath,
    /// Whether it asks for another protocol on the connection, such as WebSocket.
    pub upgrade: bool,
}

/// Some requests: an entry of a rule's `http` list, or what a secret is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestPattern {
    /// None: every method.
    methods: Vec<String>,
    /// None: every path.
    paths: Vec<PathPattern>,
    /// Whether requests for another protocol are among them.
    upgrade: bool,
}

impl RequestPattern {
    /// Reads lists of methods and paths; an empty list means all of them.
    ///
    /// # Errors
    ///
    /// [`PolicyError`] with `methods`, `paths`, `methods[1]`, `paths[0]` and so on as the field.
    pub fn new(methods: &[String], paths: &[String], upgrade: bool) -> Result<Self, PolicyError> {
        for (list, length, limit) in [
            ("methods", methods.len(), MAX_METHODS),
            ("paths", paths.len(), MAX_PATHS),
        ] {
            if length > limit {
                let message = format!("has {length} entries; the limit is {limit}");
                return Err(PolicyError::new(list, message));
            }
        }
        let methods = methods.iter().enumerate().map(|(index, text)| {
            method(text).map_err(|message| PolicyError::new(format!("methods[{index}]"), message))
        });
        let paths = paths.iter().enumerate().map(|(index, text)| {
            PathPattern::parse(text)
                .map_err(|error| PolicyError::new(format!("paths[{index}]"), error.to_string()))
        });
        Ok(Self {
            methods: methods.collect::<Result<_, _>>()?,
            paths: paths.collect::<Result<_, _>>()?,
            upgrade,
        })
    }

    /// Whether the request is one of those meant.
    pub fn matches(&self, request: &RequestHead<'_>) -> bool {
        self.mismatch(request).is_none()
    }

    /// Why it is not.
    pub(crate) fn mismatch(&self, request: &RequestHead<'_>) -> Option<Reason> {
        let method = self.methods.is_empty() || self.methods.iter().any(|method| method == request.method);
        if !method || (request.upgrade && !self.upgrade) {
            return Some(Reason::MethodDenied);
        }
        let path = self.paths.is_empty() || self.paths.iter().any(|path| path.matches(request.path));
        (!path).then_some(Reason::PathDenied)
    }

    /// The methods; none means every method.
    pub fn methods(&self) -> &[String] {
        &self.methods
    }

    /// The paths; none means every path.
    pub fn paths(&self) -> &[PathPattern] {
        &self.paths
    }

    /// Whether requests for another protocol are meant too.
    pub fn upgrade(&self) -> bool {
        self.upgrade
    }
}

/// Reads a method. Lower case is refused rather than changed: `get` is another method than `GET`, and nobody means it.
fn method(text: &str) -> Result<String, &'static str> {
    let token = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    if text.is_empty() || text.len() > MAX_METHOD || !text.bytes().all(token) {
        return Err("is not a method such as \"GET\" (capital letters)");
    }
    if text == "CONNECT" {
        return Err("\"CONNECT\" asks for a tunnel, which is never allowed");
    }
    Ok(text.to_owned())
}

impl fmt::Display for RequestHead<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.method, self.path)
    }
}

#[cfg(test)]
mod tests;
