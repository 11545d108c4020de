//! Billing, as an installation of one's own answers.

use serde::{Deserialize, Serialize};

/// `GET /billing/subscription`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// Always null, and always there.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub subscription: Option<serde_json::Map<String, serde_json::Value>>,
    /// Always `self-hosted`.
    pub plan: std::borrow::Cow<'static, str>,
}

impl Subscription {
    /// The only one there is.
    pub const SELF_HOSTED: Self = Self {
        subscription: None,
        plan: std::borrow::Cow::Borrowed("self-hosted"),
    };
}

/// `GET /billing/invoices`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoices {
    /// Always empty.
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<Object>))]
    pub invoices: Vec<serde_json::Map<String, serde_json::Value>>,
}
