//! The error of everything that reads or compiles a policy document.

/// A document was refused. The message is for the person who wrote it: what was expected, and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{message}", self.field, if self.field.is_empty() { "" } else { ": " })]
pub struct PolicyError {
    /// Path of the field, such as `allowed_domains[2]` or `rules[0].ports[1]`. Empty when the document as a whole is
    /// meant.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl PolicyError {
    pub(crate) fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }

    /// Puts the path below `parent`: for a document that is itself a field of a request, such as `network`.
    #[must_use]
    pub fn under(mut self, parent: &str) -> Self {
        self.field = match self.field.as_str() {
            "" => parent.to_owned(),
            field => format!("{parent}.{field}"),
        };
        self
    }
}
