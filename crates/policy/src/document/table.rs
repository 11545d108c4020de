//! Every field that a document may have, once: the parser refuses what is not here, and the schema is made from it.

use std::ops::RangeInclusive;

use super::{Action, Ech, Enforcement, FailureMode, Mode, RuleProtocol, Tls};
use crate::{dns::DnsType, request};

/// Rules of one document.
pub(super) const MAX_RULES: usize = 10_000;
/// Names in one list.
pub(super) const MAX_DOMAINS: usize = 10_000;
/// Ranges of addresses in one list. The kernel's table has a limit for all tiers together.
pub(super) const MAX_CIDRS: usize = 10_000;
/// Entries of one list of ports.
pub(super) const MAX_PORTS: usize = 64;
/// Characters of a rule's name.
pub(super) const MAX_RULE_NAME: usize = 64;
/// Entries of one rule's list of requests.
pub(super) const MAX_HTTP: usize = 32;
/// Characters of a secret's name.
pub(super) const MAX_SECRET_NAME: usize = 128;
/// What a limit of DNS may be. Zero would answer nothing at all, which `types` says better.
pub(super) const NAMES_PER_MINUTE: RangeInclusive<u64> = 1..=100_000;
pub(super) const BYTES_PER_MINUTE: RangeInclusive<u64> = 1..=100_000_000;
/// RFC 1035, 2.3.4.
pub(super) const LABEL: RangeInclusive<u64> = 1..=63;
pub(super) const NAME: RangeInclusive<u64> = 1..=253;

/// What a quota may be. Zero would forbid what rules forbid better.
pub(super) const UPLOAD_BYTES: RangeInclusive<u64> = 1..=1 << 50;
pub(super) const HOSTS_PER_HOUR: RangeInclusive<u64> = 1..=10_000;
pub(super) const USES_PER_HOUR: RangeInclusive<u64> = 1..=10_000_000;

/// One field of an object.
pub(super) struct Field {
    pub(super) name: &'static str,
    /// What it means, for people who write documents.
    pub(super) about: &'static str,
    pub(super) is_required: bool,
    pub(super) shape: Shape,
}

/// What may stand in a field.
pub(super) enum Shape {
    /// One of these words.
    Word(&'static [&'static str]),
    /// A text of so many characters at most, of the kind that the words describe.
    Text(usize, &'static str),
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Whole(RangeInclusive<u64>),
    /// A port, or a range such as `8000-8080`.
    Ports,
    /// A list of at least and at most so many.
    List(&'static Self, usize, usize),
    /// An object with these fields.
    Object(&'static [Field]),
    /// Anything: it is not looked at.
    Anything,
}

const fn field(name: &'static str, about: &'static str, shape: Shape) -> Field {
    Field {
        name,
        about,
        is_required: false,
        shape,
    }
}

const fn required(name: &'static str, about: &'static str, shape: Shape) -> Field {
    Field {
        is_required: true,
        ..field(name, about, shape)
    }
}

/// Longest text that is read as a name.
const NAME_TEXT: usize = 1024 + 2;

const DOMAIN: Shape = Shape::Text(
    NAME_TEXT,
    "a name, `*.` and a name for everything below it, or `*` for every public name",
);
const CIDR: Shape = Shape::Text(
    64,
    "a range of IPv4 or IPv6 addresses in CIDR notation, or one address",
);
const PORT: Shape = Shape::Whole(1..=65_535);

const DOMAINS: Shape = Shape::List(&DOMAIN, 0, MAX_DOMAINS);
const CIDRS: Shape = Shape::List(&CIDR, 0, MAX_CIDRS);

/// The fields of a document.
pub(super) const DOCUMENT: &[Field] = &[
    required(
        "mode",
        "What happens to a flow that no rule and no list mentions.",
        Shape::Word(Mode::WORDS),
    ),
    field("allowed_domains", "Names that may be reached.", DOMAINS),
    field(
        "denied_domains",
        "Names that may not be reached, even if they are in the lists of what may; rules come before both.",
        DOMAINS,
    ),
    field("allowed_cidrs", "Ranges of addresses that may be reached.", CIDRS),
    field(
        "denied_cidrs",
        "Ranges of addresses that may not be reached, even if they are in the lists of what may; rules come before both.",
        CIDRS,
    ),
    field(
        "allowed_ports",
        "TCP ports that the lists and the mode open, and rules that allow without naming ports.",
        Shape::List(&PORT, 0, MAX_PORTS),
    ),
    field(
        "rules",
        "The first that matches decides; the lists come after all of them.",
        Shape::List(&Shape::Object(RULE), 0, MAX_RULES),
    ),
    field(
        "enforcement",
        "`audit`: what this document denies is let through and recorded; other tiers and the platform still deny.",
        Shape::Word(Enforcement::WORDS),
    ),
    field(
        "failure_mode",
        "What happens to flows that cannot be recorded, or whose credential cannot be had.",
        Shape::Word(FailureMode::WORDS),
    ),
    field(
        "dns",
        "What may be asked of DNS. Of several tiers the strictest counts.",
        Shape::Object(DNS),
    ),
    field(
        "quotas",
        "How much may be done of what is allowed. Of several tiers the strictest counts; what is not given has no limit.",
        Shape::Object(QUOTAS),
    ),
    field(
        "ech",
        "What happens to flows that hide their name in a form that no client sends for show.",
        Shape::Word(Ech::WORDS),
    ),
    field("org_id", "As answers have it; ignored.", Shape::Anything),
    field("updated_at", "As answers have it; ignored.", Shape::Anything),
    field(
        "revision",
        "As answers have it; another one than the present is a 409.",
        Shape::Anything,
    ),
    field("applied", "As answers have it; ignored.", Shape::Anything),
    field("effective", "As answers have it; ignored.", Shape::Anything),
];

/// The fields of a rule.
pub(super) const RULE: &[Field] = &[
    field(
        "name",
        "Shown in the audit; no two rules have the same.",
        Shape::Text(MAX_RULE_NAME, "letters, digits, spaces, `-`, `_` and `.`"),
    ),
    required(
        "action",
        "What it does with a flow that it matches.",
        Shape::Word(Action::WORDS),
    ),
    field(
        "domains",
        "Names that it matches. It needs these or `cidrs`.",
        DOMAINS,
    ),
    field(
        "cidrs",
        "Ranges of addresses that it matches. It needs these or `domains`.",
        CIDRS,
    ),
    field(
        "ports",
        "Ports that it concerns; not given: every port for a deny rule, `allowed_ports` for an allow rule.",
        Shape::List(&Shape::Ports, 1, MAX_PORTS),
    ),
    field(
        "protocol",
        "How it knows the name of a flow: `http` by the SNI or Host that the flow shows, `tcp` by the names that the sandbox asked for. `udp`: it is for UDP, by `cidrs` and `ports` alone.",
        Shape::Word(RuleProtocol::WORDS),
    ),
    field(
        "tls",
        "What happens to TLS on a flow that it allows.",
        Shape::Word(Tls::WORDS),
    ),
    field(
        "http",
        "The requests that it allows; none: all of them.",
        Shape::List(&Shape::Object(REQUESTS), 0, MAX_HTTP),
    ),
    field(
        "credential",
        "The secret whose binding every request must use.",
        Shape::Text(MAX_SECRET_NAME, "the name of a secret"),
    ),
];

/// The fields of an element of a rule's `http`.
pub(super) const REQUESTS: &[Field] = &[
    field(
        "methods",
        "None: any.",
        Shape::List(
            &Shape::Text(32, "a method such as `GET`"),
            0,
            request::MAX_METHODS,
        ),
    ),
    field(
        "paths",
        "`*` stands for one segment, `**` at the end for any number; none: any path.",
        Shape::List(
            &Shape::Text(1024, "a path such as `/repos/**`"),
            0,
            request::MAX_PATHS,
        ),
    ),
    field(
        "upgrade",
        "Whether the connection may become another protocol, for example a WebSocket.",
        Shape::Flag,
    ),
];

/// The fields of `dns`.
pub(super) const DNS: &[Field] = &[
    field(
        "types",
        "Types that are answered.",
        Shape::List(&Shape::Word(DnsType::WORDS), 0, DnsType::WORDS.len()),
    ),
    field(
        "unique_names_per_minute",
        "Different names in a minute, for each registered domain.",
        Shape::Whole(NAMES_PER_MINUTE),
    ),
    field(
        "query_bytes_per_minute",
        "Bytes of all names in a minute, for each registered domain.",
        Shape::Whole(BYTES_PER_MINUTE),
    ),
    field("label_max", "Longest label in bytes.", Shape::Whole(LABEL)),
    field("name_max", "Longest name in bytes.", Shape::Whole(NAME)),
];

/// The fields of `quotas`.
pub(super) const QUOTAS: &[Field] = &[
    field(
        "upload_bytes_per_host",
        "Bytes that may go to one host (a name, or an address where none is known) over all connections of the sandbox's life.",
        Shape::Whole(UPLOAD_BYTES),
    ),
    field(
        "new_hosts_per_hour",
        "Hosts that may be connected to for the first time, in an hour.",
        Shape::Whole(HOSTS_PER_HOUR),
    ),
    field(
        "secret_uses_per_hour",
        "Requests into which one secret may be put, in an hour.",
        Shape::Whole(USES_PER_HOUR),
    ),
];
