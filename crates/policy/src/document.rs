//! The policy document: what people write, what is stored, and what travels on the feed.
//!
//! A [`Policy`] can only be made by [`Policy::parse`] (deserialising goes the same way), so one that exists is valid:
//! every name is canonical, every range is a range, and nothing in it is beyond what this version enforces.

mod fields;
mod parse;
mod schema;
mod table;

use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value, json};

use crate::{
    dns::{DnsBudget, DnsType},
    error::PolicyError,
    names::DomainPattern,
    ports::PortSpan,
    quota::{Quota, Quotas},
    request::RequestPattern,
};

macro_rules! words {
    ($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $word_doc:literal])+ $word:ident = $text:literal,)+ }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[doc = $word_doc])+ #[serde(rename = $text)] $word,)+
        }

        impl $name {
            /// Every word of the kind, as documents spell them.
            pub(crate) const ALL: &'static [(&'static str, Self)] = &[$(($text, Self::$word),)+];

            /// The words alone.
            pub(crate) const WORDS: &'static [&'static str] = &[$($text,)+];

            /// As documents spell it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                }
            }
        }
    };
}

words! {
    /// What happens to a flow that no rule and no list mentions.
    Mode {
        /// Allowed on `allowed_ports`.
        AllowAll = "allow_all",
        /// Denied; the allow lists must be empty, so that nobody believes in them.
        DenyAll = "deny_all",
        /// Denied.
        Allowlist = "allowlist",
        /// Allowed on `allowed_ports`, as with `allow_all`.
        Denylist = "denylist",
    }
}

words! {
    /// What a rule does with a flow that it matches.
    Action {
        /// Lets it through, as far as this tier is concerned.
        Allow = "allow",
        /// Refuses it.
        Deny = "deny",
    }
}

words! {
    /// How a rule knows the name of a flow.
    RuleProtocol {
        /// By the SNI or Host that the flow itself shows; for an allow rule the address must be pinned for it too.
        Http = "http",
        /// By the names for which the flow's address is pinned; what is inside is not looked at.
        Tcp = "tcp",
        /// Not at all: it is for UDP, by address and port alone.
        Udp = "udp",
    }
}

words! {
    /// What happens to TLS on a flow that a rule allows.
    Tls {
        /// It is opened where something needs to look inside: an `http` list, a credential, a bound secret.
        Auto = "auto",
        /// It is never opened for the sake of a bound secret.
        Splice = "splice",
        /// It is always opened.
        Intercept = "intercept",
    }
}

words! {
    /// Whether denials are carried out.
    Enforcement {
        /// They are.
        Enforce = "enforce",
        /// They are only recorded: the tier denies nothing. Other tiers and the platform still do.
        Audit = "audit",
    }
}

words! {
    /// What happens to a flow whose ClientHello hides its name in a form that no client sends for show. GREASE, which
    /// cannot be told from an encrypted ClientHello (RFC 9849, 6.2), passes in any case: its outer name is judged.
    Ech {
        /// It is refused where a name must be read.
        Deny = "deny",
        /// It is judged by its outer name too.
        Allow = "allow",
    }
}

words! {
    /// What happens while a part that is not the wall itself (audit, credentials) is out of order.
    FailureMode {
        /// Flows that need the part are refused.
        FailClosed = "fail_closed",
        /// They go on without it.
        FailOpen = "fail_open",
    }
}

/// One rule of `rules`. The first that matches decides. Small, and what many rules have in common they share: a node
/// holds hundreds of thousands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    pub(crate) name: Option<Box<str>>,
    pub(crate) action: Action,
    pub(crate) protocol: RuleProtocol,
    pub(crate) domains: Arc<[DomainPattern]>,
    pub(crate) cidrs: Box<[IpNet]>,
    /// Not given: every port for a deny rule, `allowed_ports` for an allow rule.
    pub(crate) ports: Option<Arc<[PortSpan]>>,
    pub(crate) inside: Arc<Inside>,
}

/// What an allow rule asks of what is inside a flow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Inside {
    pub(crate) tls: Tls,
    /// The requests that are allowed; empty: all of them.
    pub(crate) http: Vec<RequestPattern>,
    /// The binding that requests must use.
    pub(crate) credential: Option<String>,
}

impl Inside {
    /// Nothing: what is inside does not matter.
    pub(crate) fn unseen() -> Arc<Self> {
        static UNSEEN: LazyLock<Arc<Inside>> = LazyLock::new(|| {
            Arc::new(Inside {
                tls: Tls::Auto,
                http: Vec::new(),
                credential: None,
            })
        });
        Arc::clone(&UNSEEN)
    }

    /// The same as this, together with all others that ask for nothing.
    pub(crate) fn shared(self) -> Arc<Self> {
        let unseen = Self::unseen();
        if self == *unseen { unseen } else { Arc::new(self) }
    }

    /// Whether flows must be read to enforce it.
    pub(crate) fn is_read(&self) -> bool {
        self.tls == Tls::Intercept || !self.http.is_empty() || self.credential.is_some()
    }
}

impl Rule {
    /// The name that its author gave it.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Allow or deny.
    pub fn action(&self) -> Action {
        self.action
    }

    /// How it knows the name of a flow.
    pub fn protocol(&self) -> RuleProtocol {
        self.protocol
    }

    /// The ranges that it lists, in their order.
    pub fn cidrs(&self) -> &[IpNet] {
        &self.cidrs
    }

    /// The hosts that it names.
    pub fn domains(&self) -> &[DomainPattern] {
        &self.domains
    }

    /// Whether it concerns the port. `None`: a rule without ports, which means every port for a deny rule and
    /// `allowed_ports` of the document for an allow rule.
    pub fn lists_port(&self, port: u16) -> Option<bool> {
        let spans = self.ports.as_ref()?;
        Some(spans.iter().any(|span| (span.first..=span.last).contains(&port)))
    }

    /// What happens to TLS.
    pub fn tls(&self) -> Tls {
        self.inside.tls
    }

    /// The requests that it allows; none means all of them.
    pub fn http(&self) -> &[RequestPattern] {
        &self.inside.http
    }

    /// The secret whose binding requests must use.
    pub fn credential(&self) -> Option<&str> {
        self.inside.credential.as_deref()
    }
}

/// A valid policy document of one tier.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy {
    pub(crate) mode: Mode,
    pub(crate) allowed_domains: Arc<[DomainPattern]>,
    pub(crate) denied_domains: Arc<[DomainPattern]>,
    pub(crate) allowed_cidrs: Vec<IpNet>,
    pub(crate) denied_cidrs: Vec<IpNet>,
    pub(crate) allowed_ports: Vec<u16>,
    /// Shared with what they compile to.
    pub(crate) rules: Vec<Arc<Rule>>,
    pub(crate) dns: DnsBudget,
    pub(crate) quotas: Quotas,
    pub(crate) ech: Ech,
    pub(crate) enforcement: Enforcement,
    pub(crate) failure_mode: FailureMode,
}

impl Default for Policy {
    /// In force where nobody wrote a policy: everything public on port 443.
    fn default() -> Self {
        Self {
            mode: Mode::AllowAll,
            allowed_domains: Arc::default(),
            denied_domains: Arc::default(),
            allowed_cidrs: Vec::new(),
            denied_cidrs: Vec::new(),
            allowed_ports: vec![443],
            rules: Vec::new(),
            dns: DnsBudget::default(),
            quotas: Quotas::default(),
            ech: Ech::Deny,
            enforcement: Enforcement::Enforce,
            failure_mode: FailureMode::FailClosed,
        }
    }
}

impl Policy {
    /// Reads a document. Names and ranges come out in canonical form.
    ///
    /// `org_id`, `updated_at`, `revision`, `applied` and `effective` are not looked at: answers of the API add them,
    /// and what was read must be writable.
    ///
    /// # Errors
    ///
    /// [`PolicyError`] with the path of the first field that is unknown, of the wrong type, out of range, over a
    /// limit or asks for what this version does not enforce.
    pub fn parse(value: &Value) -> Result<Self, PolicyError> {
        parse::policy(value)
    }

    /// The document with every field, flat. [`Policy::parse`] reads it back to an equal policy.
    pub fn to_value(&self) -> Value {
        json!({
            "mode": self.mode.as_str(),
            "allowed_domains": texts(&self.allowed_domains),
            "denied_domains": texts(&self.denied_domains),
            "allowed_cidrs": texts(&self.allowed_cidrs),
            "denied_cidrs": texts(&self.denied_cidrs),
            "allowed_ports": self.allowed_ports,
            "rules": self.rules.iter().map(|rule| rule.to_value()).collect::<Vec<_>>(),
            "dns": budget(&self.dns),
            "quotas": quotas(&self.quotas),
            "ech": self.ech.as_str(),
            "enforcement": self.enforcement.as_str(),
            "failure_mode": self.failure_mode.as_str(),
        })
    }

    /// What happens to a flow that nothing mentions.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether denials are carried out.
    pub fn enforcement(&self) -> Enforcement {
        self.enforcement
    }

    /// The ports that the lists and the mode open.
    pub fn allowed_ports(&self) -> &[u16] {
        &self.allowed_ports
    }

    /// What happens while audit or credentials are out of order.
    pub fn failure_mode(&self) -> FailureMode {
        self.failure_mode
    }

    /// What may be asked of DNS.
    pub fn dns(&self) -> DnsBudget {
        self.dns
    }

    /// How much may be done of what is allowed.
    pub fn quotas(&self) -> Quotas {
        self.quotas
    }

    /// What happens to names that are hidden.
    pub fn ech(&self) -> Ech {
        self.ech
    }

    /// The ordered rules.
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }
}

impl Rule {
    fn to_value(&self) -> Value {
        let mut value = Map::new();
        if let Some(name) = &self.name {
            value.insert("name".to_owned(), (&**name).into());
        }
        value.insert("action".to_owned(), self.action.as_str().into());
        value.insert("protocol".to_owned(), self.protocol.as_str().into());
        value.insert("domains".to_owned(), texts(&self.domains).into());
        value.insert("cidrs".to_owned(), texts(&self.cidrs).into());
        if let Some(ports) = &self.ports {
            value.insert("ports".to_owned(), texts(ports).into());
        }
        let Inside {
            tls,
            http,
            credential,
        } = &*self.inside;
        if *tls != Tls::Auto {
            value.insert("tls".to_owned(), tls.as_str().into());
        }
        if !http.is_empty() {
            let entries: Vec<Value> = http.iter().map(requests).collect();
            value.insert("http".to_owned(), entries.into());
        }
        if let Some(credential) = credential {
            value.insert("credential".to_owned(), credential.as_str().into());
        }
        Value::Object(value)
    }
}

fn budget(dns: &DnsBudget) -> Value {
    json!({
        "types": dns.types.iter().map(DnsType::as_str).collect::<Vec<_>>(),
        "unique_names_per_minute": dns.unique_names_per_minute,
        "query_bytes_per_minute": dns.query_bytes_per_minute,
        "label_max": dns.label_max,
        "name_max": dns.name_max,
    })
}

fn quotas(quotas: &Quotas) -> Value {
    let limits = Quota::ALL
        .into_iter()
        .filter_map(|quota| Some((quota.field().to_owned(), quotas.limit(quota)?.into())));
    Value::Object(limits.collect())
}

fn requests(pattern: &RequestPattern) -> Value {
    json!({
        "methods": pattern.methods(),
        "paths": texts(pattern.paths()),
        "upgrade": pattern.upgrade(),
    })
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(T::to_string).collect()
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::parse(&value).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
