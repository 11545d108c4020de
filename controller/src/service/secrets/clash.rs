//! Where policies and bindings contradict each other. Pure.

use sandgate_api::rest::EgressBinding;
use sandgate_policy::{Action, DomainPattern, Policy, Tls};

use crate::service::ServiceError;

/// A rule that leaves the TLS of a bound host unread. Neither may be ignored silently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::service) struct Clash {
    /// Index of the rule.
    rule: usize,
    /// Name of the secret.
    secret: String,
}

impl Clash {
    /// As a refusal of the policy, which is the field `inside` of a larger document.
    pub(in crate::service) fn of_policy(self, inside: &str) -> ServiceError {
        let dot = if inside.is_empty() { "" } else { "." };
        ServiceError::Invalid {
            field: format!("{inside}{dot}rules[{}].tls", self.rule),
            message: format!(
                "`splice` leaves unread what goes to a host of the secret `{}`, which could not be injected then",
                self.secret
            ),
        }
    }

    /// As a refusal of the binding.
    pub(super) fn message(&self, whose: &str) -> String {
        format!(
            "rules[{}].tls of the policy of {whose} is `splice` for a host of the secret `{}`, which could not be \
             injected there",
            self.rule, self.secret
        )
    }
}

/// The first clash of a policy with bindings.
pub(in crate::service) fn clash(policy: &Policy, bindings: &[(String, EgressBinding)]) -> Option<Clash> {
    for (index, rule) in policy.rules().iter().enumerate() {
        if rule.tls() != Tls::Splice || rule.action() != Action::Allow {
            continue;
        }
        for (secret, binding) in bindings {
            let on_port = binding.ports.iter().any(|&port| {
                rule.lists_port(port)
                    .unwrap_or_else(|| policy.allowed_ports().contains(&port))
            });
            let same_host = binding
                .hosts
                .iter()
                .filter_map(|host| DomainPattern::parse(host).ok())
                .any(|host| rule.domains().iter().any(|domain| overlap(domain, &host)));
            if on_port && same_host {
                return Some(Clash {
                    rule: index,
                    secret: secret.clone(),
                });
            }
        }
    }
    None
}

/// The first rule that asks for the binding of a secret that is none of these.
pub(in crate::service) fn unbound_rule(
    policy: &Policy,
    bindings: &[(String, EgressBinding)],
) -> Option<usize> {
    policy.rules().iter().position(|rule| {
        rule.credential()
            .is_some_and(|wanted| !bindings.iter().any(|(secret, _)| secret == wanted))
    })
}

/// As a refusal of the policy, which is the field `inside` of a larger document.
pub(in crate::service) fn unbound(rule: usize, inside: &str) -> ServiceError {
    let dot = if inside.is_empty() { "" } else { "." };
    ServiceError::Invalid {
        field: format!("{inside}{dot}rules[{rule}].credential"),
        message: "the organization has no secret of this name that is bound to hosts".to_owned(),
    }
}

/// Whether some name is meant by both.
fn overlap(one: &DomainPattern, other: &DomainPattern) -> bool {
    match (one, other) {
        (DomainPattern::Any, _) | (_, DomainPattern::Any) => true,
        (DomainPattern::Exact(name), pattern) | (pattern, DomainPattern::Exact(name)) => {
            pattern.matches(name)
        }
        (DomainPattern::Below(one), DomainPattern::Below(other)) => {
            one == other
                || DomainPattern::Below(one.clone()).matches(other)
                || DomainPattern::Below(other.clone()).matches(one)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_overlap_when_some_name_is_meant_by_both() {
        let parse = |text| DomainPattern::parse(text).expect("a pattern");
        for (one, other, expected) in [
            ("a.ok.test", "a.ok.test", true),
            ("a.ok.test", "b.ok.test", false),
            ("*.ok.test", "a.ok.test", true),
            ("*.ok.test", "ok.test", false),
            ("*.ok.test", "*.a.ok.test", true),
            ("*.ok.test", "*.ok.test", true),
            ("*.ok.test", "*.no-ok.test", false),
            ("*", "ok.test", true),
        ] {
            assert_eq!(overlap(&parse(one), &parse(other)), expected, "{one} {other}");
            assert_eq!(overlap(&parse(other), &parse(one)), expected, "{other} {one}");
        }
    }
}
