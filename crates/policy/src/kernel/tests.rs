//! Laws of random policies: the table is the decision, and tiers only narrow.

use std::net::{Ipv4Addr, SocketAddr};

use proptest::{prelude::*, sample::select};
use serde_json::json;

use super::*;
use crate::{DomainName, Enforcement, Flow, RequestHead, SandboxPolicy, Verdict, random::*};

fn strictness(action: KernelAction) -> u8 {
    match action {
        KernelAction::Pass => 0,
        KernelAction::Audit(_) | KernelAction::Proxy => 1,
        KernelAction::ProxyBound => 2,
        KernelAction::Deny(_) => 3,
    }
}

fn coarse(action: KernelAction) -> KernelAction {
    match action {
        KernelAction::Deny(_) => KernelAction::Deny(Reason::DefaultDeny),
        KernelAction::Pass | KernelAction::Proxy | KernelAction::ProxyBound | KernelAction::Audit(_) => {
            action
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_table_is_well_formed_and_says_what_the_rules_say(
        tiers in any_tiers(Parts { audit: true, ..ALL }), bindings in any_bindings(), random in any::<(u32, u128, u16)>(),
    ) {
        let policy = compile_with(&tiers, &bindings);
        let table = policy.kernel_table();
        prop_assert_eq!(table.entries[0].prefix, IpNet::V4(Ipv4Net::default()));
        prop_assert!(table.entries.windows(2).all(|pair| pair[0].prefix < pair[1].prefix));
        for entry in &table.entries {
            prop_assert!(entry.ranges.len() <= MAX_RANGES);
            prop_assert!(entry.ranges.iter().all(|range| range.first <= range.last));
            let ordered = |pair: &[PortRange]| match (pair[0].protocol, pair[1].protocol) {
                (Protocol::Tcp, Protocol::Udp) => true,
                (Protocol::Udp, Protocol::Tcp) => false,
                (Protocol::Tcp, Protocol::Tcp) | (Protocol::Udp, Protocol::Udp) => pair[0].last < pair[1].first,
            };
            prop_assert!(entry.ranges.windows(2).all(ordered));
        }
        let (four, six, port) = random;
        let somewhere = [(IpAddr::from(four.to_be_bytes()), port), (IpAddr::from(six.to_be_bytes()), port)];
        for (address, port) in destinations().chain(somewhere) {
            let to = SocketAddr::from((address, port));
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let found = table.lookup(address.to_canonical(), protocol, port);
                let decided = policy.decide_address_port(protocol, to);
                if decided == KernelAction::Deny(Reason::PlatformDenied) {
                    continue;
                }
                // Bindings may make more be read than is needed.
                let widened = decided == KernelAction::Pass && found == KernelAction::Proxy && !bindings.is_empty();
                prop_assert!(widened || coarse(found) == coarse(decided), "{to}: {found:?}, {decided:?}");
                if let KernelAction::Deny(reason) = found {
                    prop_assert!(reason == unlisted(protocol) || KernelAction::Deny(reason) == decided);
                }
            }
            // Nothing of UDP is left to userland, so the two are one.
            let verdict = policy.decide(&Flow { protocol: Protocol::Udp, to, name: None, names_bound: &[] });
            let expected = match (verdict.allowed, verdict.is_audited()) {
                (true, false) => KernelAction::Pass,
                (true, true) => KernelAction::Audit(verdict.reason),
                (false, _) => KernelAction::Deny(verdict.reason),
            };
            prop_assert_eq!(policy.decide_address_port(Protocol::Udp, to), expected);
        }
    }

    #[test]
    fn the_kernel_never_says_what_the_decision_cannot_answer(
        tiers in any_tiers(Parts { audit: true, ..ALL }), to in any_destination(),
    ) {
        let policy = compile(&tiers);
        let action = policy.decide_address_port(Protocol::Tcp, to);
        let enforcing = tiers.iter().all(|tier| tier.enforcement() == Enforcement::Enforce);
        for (bound, name, verdict) in answers(&policy, to) {
            let context = format!("{action:?}, pinned for {bound:?}, shows {name:?}: {verdict:?}");
            match action {
                KernelAction::Deny(_) => {
                    prop_assert!(!verdict.allowed && !verdict.needs_name, "{}", context);
                    // The kernel's reason is the decision's.
                    let nothing_known = name.is_none() && bound.is_empty();
                    let is_exact = enforcing && !address::wraps(&IpNet::from(to.ip()));
                    prop_assert!(
                        !nothing_known || !is_exact || KernelAction::Deny(verdict.reason) == action, "{}", context
                    );
                }
                KernelAction::Pass => {
                    prop_assert!(verdict.allowed && !verdict.needs_name && !verdict.is_audited(), "{}", context);
                }
                KernelAction::ProxyBound if bound.is_empty() => {
                    prop_assert!(!verdict.allowed && !verdict.needs_name, "{}", context);
                }
                KernelAction::ProxyBound | KernelAction::Proxy => {}
                KernelAction::Audit(_) => prop_assert!(false, "{}", context),
            }
        }
    }

    #[test]
    fn a_tier_in_audit_mode_denies_nothing_and_misses_nothing(
        tiers in any_tiers(Parts { audit: true, ..ALL }), to in any_destination(),
    ) {
        let is_audit = |tier: &Policy| tier.enforcement() == Enforcement::Audit;
        let enforcing: Vec<Policy> = tiers.iter().filter(|tier| !is_audit(tier)).cloned().collect();
        let carried_out: Vec<Policy> = tiers.iter().map(enforced).collect();
        let (policy, carried_out) = (compile(&tiers), compile(&carried_out));
        // Nobody's own policy is none at all, and not the default one.
        let without = (!enforcing.is_empty()).then(|| compile(&enforcing));
        let check = |what: &str, verdict: &Verdict, without: Option<Verdict>, carried_out: &Verdict| {
            let context = format!("{what}: {verdict:?}, {without:?}, {carried_out:?}");
            let passes = without.map_or(verdict.reason != Reason::PlatformDenied, |without| without.allowed);
            prop_assert_eq!(verdict.allowed, passes, "{}", &context);
            prop_assert_eq!(verdict.allowed && !verdict.is_audited(), carried_out.allowed, "{}", &context);
            if verdict.is_audited() {
                prop_assert!(verdict.tier.is_some_and(|tier| is_audit(&tiers[tier])), "{}", &context);
            }
            Ok(())
        };
        let names = names();
        for bound in [&[][..], &names[..2], &names[..]] {
            for name in names.iter().map(Some).chain([None]) {
                let flow = Flow { protocol: Protocol::Tcp, to, name, names_bound: bound };
                let of = |policy: &SandboxPolicy| policy.decide(&flow);
                check("flow", &of(&policy), without.as_ref().map(of), &of(&carried_out))?;
                // What must be looked at to know what would be denied is looked at.
                if name.is_none() && of(&policy).allowed {
                    let helps = of(&carried_out).needs_name && !of(&carried_out).allowed;
                    prop_assert!(!helps || of(&policy).needs_name);
                }
                for (method, path, upgrade) in &requests()[..12] {
                    let request = RequestHead { method, path, upgrade: *upgrade };
                    let of = |policy: &SandboxPolicy| policy.decide_request(&flow, &request);
                    check("request", &of(&policy), without.as_ref().map(of), &of(&carried_out))?;
                }
            }
        }
        for name in &names {
            let of = |policy: &SandboxPolicy| policy.decide_name(name);
            check("name", &of(&policy), without.as_ref().map(of), &of(&carried_out))?;
        }
        let of = |policy: &SandboxPolicy| {
            policy.decide(&Flow { protocol: Protocol::Udp, to, name: None, names_bound: &[] })
        };
        // UDP that no rule mentions is refused, whatever the mode of a tier.
        if of(&policy).tier.is_some() {
            check("udp", &of(&policy), without.as_ref().map(of), &of(&carried_out))?;
        } else {
            prop_assert!(!of(&policy).allowed && !of(&carried_out).allowed);
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_denied_ipv4_range_is_denied_in_every_ipv6_form_and_an_allowed_one_in_none(
        tiers in any_tiers(ALL), octets in select(vec![[203u8, 0, 113, 5], [203, 0, 113, 70], [198, 51, 100, 200]]),
        port in select(&PORTS[..]),
    ) {
        let four = Ipv4Addr::from(octets);
        for form in forms(four) {
            // The same documents with the form written out wherever a rule denies a range of the address.
            let spelled: Vec<Policy> = tiers.iter().map(|tier| spelled_out(tier, four, form)).collect();
            let (policy, spelled) = (compile(&tiers), compile(&spelled));
            let to = SocketAddr::from((form, port));
            for ((bound, name, implied), (_, _, explicit)) in answers(&policy, to).into_iter().zip(answers(&spelled, to)) {
                prop_assert_eq!(implied.allowed, explicit.allowed, "{} pinned for {:?}, shows {:?}", to, bound, name);
            }
            let udp = policy.decide(&Flow { protocol: Protocol::Udp, to, name: None, names_bound: &[] });
            prop_assert!(!udp.allowed);
        }
        // To every socket a mapped address is the IPv4 address itself.
        let policy = compile(&tiers);
        let mapped = SocketAddr::from((four.to_ipv6_mapped(), port));
        for (bound, name, verdict) in answers(&policy, (four, port).into()) {
            prop_assert_eq!(verdict, decide(&policy, mapped, name.as_ref(), &bound));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn bindings_change_only_what_is_read(tiers in any_tiers(ALL), bindings in any_bindings(), to in any_destination()) {
        let (without, with) = (compile(&tiers), compile_with(&tiers, &bindings));
        let is_read = bindings.iter().any(|binding| binding.ports.contains(&to.port()));
        prop_assert_eq!(with.decide_address_port(Protocol::Tcp, to), reading(without.decide_address_port(Protocol::Tcp, to), is_read));
        for ((bound, name, before), (_, _, after)) in answers(&without, to).into_iter().zip(answers(&with, to)) {
            let concerned = |name: &DomainName| {
                bindings.iter().any(|binding| {
                    binding.ports.contains(&to.port()) && binding.hosts.iter().any(|host| host.matches(name))
                })
            };
            let context = format!("pinned for {bound:?}, shows {name:?}: {before:?} became {after:?}");
            prop_assert!(after.intercept >= before.intercept && after.needs_name >= before.needs_name, "{}", context);
            if after.intercept != before.intercept {
                let name = name.as_ref().expect("only named flows are read");
                prop_assert!(after.allowed && bound.contains(name) && concerned(name), "{}", context);
            }
            if after.needs_name != before.needs_name {
                prop_assert!(after.allowed && name.is_none() && bound.iter().any(concerned), "{}", context);
            }
            let (intercept, needs_name) = (before.intercept, before.needs_name);
            prop_assert_eq!(Verdict { intercept, needs_name, ..after }, before, "{}", context);
        }
    }

    #[test]
    fn a_quota_of_flows_sends_all_tcp_through_userland_and_changes_no_decision(
        tiers in any_tiers(Parts { udp: false, audit: true, ..ALL }),
        place in any::<proptest::sample::Index>(),
        field in select(vec!["upload_bytes_per_host", "new_hosts_per_hour"]),
        to in any_destination(),
    ) {
        let mut documents: Vec<_> = tiers.iter().map(Policy::to_value).collect();
        place.get_mut(&mut documents)["quotas"] = serde_json::json!({ field: 1 });
        let counted: Vec<Policy> = documents.iter().map(|document| Policy::parse(document).expect("a policy")).collect();
        let (without, with) = (compile(&tiers), compile(&counted));
        let action = with.decide_address_port(Protocol::Tcp, to);
        prop_assert_eq!(action, reading(without.decide_address_port(Protocol::Tcp, to), true));
        prop_assert_ne!(action, KernelAction::Pass);
        prop_assert_eq!(with.kernel_table().lookup(to.ip(), Protocol::Tcp, to.port()) == KernelAction::Pass, false);
        for ((_, _, before), (_, _, after)) in answers(&without, to).into_iter().zip(answers(&with, to)) {
            prop_assert_eq!(after, before);
        }
    }

    #[test]
    fn what_must_be_read_is_never_passed_unread(
        tiers in any_tiers(ALL), bindings in any_bindings(), to in any_destination(),
    ) {
        let policy = compile_with(&tiers, &bindings);
        let action = policy.decide_address_port(Protocol::Tcp, to);
        for (bound, name, verdict) in answers(&policy, to) {
            let context = format!("{action:?}, pinned for {bound:?}, shows {name:?}: {verdict:?}");
            prop_assert!(!verdict.intercept || verdict.allowed, "{}", context);
            prop_assert!(verdict.credentials.is_empty() || verdict.intercept, "{}", context);
            if verdict.intercept {
                prop_assert!(matches!(action, KernelAction::Proxy | KernelAction::ProxyBound), "{}", context);
                // Nor is it given up before its name was looked for.
                let blind = decide(&policy, to, None, &bound);
                prop_assert!(blind.needs_name, "{} but {:?}", context, blind);
                prop_assert!(name.is_some_and(|name| bound.contains(&name)), "{}", context);
            }
        }
    }

    #[test]
    fn asking_for_requests_never_widens(tiers in any_tiers(ALL), to in any_destination()) {
        let blind: Vec<Policy> = tiers.iter().map(blind).collect();
        let (policy, blind) = (compile(&tiers), compile(&blind));
        prop_assert!(strictness(policy.decide_address_port(Protocol::Tcp, to)) >= strictness(blind.decide_address_port(Protocol::Tcp, to)));
        for ((bound, name, asked), (_, _, plain)) in answers(&policy, to).into_iter().zip(answers(&blind, to)) {
            prop_assert!(plain.allowed || !asked.allowed, "pinned for {bound:?}, shows {name:?}: {plain:?}, {asked:?}");
        }
        for name in names() {
            prop_assert!(blind.decide_name(&name).allowed || !policy.decide_name(&name).allowed, "{}", name);
        }
    }

    #[test]
    fn a_request_passes_exactly_if_its_flow_passes_and_every_tier_alone_lets_it_pass(
        tiers in any_tiers(ALL), to in any_destination(),
    ) {
        let together = compile(&tiers);
        let alone: Vec<SandboxPolicy> = tiers.iter().map(|tier| compile(std::slice::from_ref(tier))).collect();
        let names = names();
        for name in names.iter().map(Some).chain([None]) {
            let bound = &names[..];
            let flow = Flow { protocol: Protocol::Tcp, to, name, names_bound: bound };
            for (method, path, upgrade) in &requests() {
                let request = RequestHead { method, path, upgrade: *upgrade };
                let verdict = together.decide_request(&flow, &request);
                let each = alone.iter().all(|policy| policy.decide_request(&flow, &request).allowed);
                let context = format!("{request} showing {name:?}: {verdict:?}");
                prop_assert_eq!(verdict.allowed, each, "{}", context);
                let of_flow = together.decide(&flow);
                prop_assert!(of_flow.allowed || verdict == of_flow, "{}", context);
                prop_assert!(!verdict.allowed || verdict == of_flow, "{}", context);
                if of_flow.allowed && !verdict.allowed {
                    prop_assert!(matches!(verdict.reason, Reason::MethodDenied | Reason::PathDenied), "{}", context);
                    prop_assert!(of_flow.intercept, "who denies requests must read them: {}", context);
                }
            }
        }
    }

    #[test]
    fn where_no_name_is_denied_the_kernel_asks_userland_only_when_a_name_decides(
        policy in any_policy(Parts { deny_names: false, inside: false, ..ALL }), to in any_destination(),
    ) {
        prop_assume!(!address::wraps(&IpNet::from(to.ip())));
        let policy = compile(&[policy]);
        let answers = answers(&policy, to);
        match policy.decide_address_port(Protocol::Tcp, to) {
            KernelAction::ProxyBound => {
                prop_assert!(answers.iter().any(|(_, _, verdict)| verdict.allowed));
                prop_assert!(answers.iter().any(|(_, _, verdict)| !verdict.allowed));
            }
            KernelAction::Proxy | KernelAction::Audit(_) => {
                prop_assert!(false, "nothing makes a name necessary");
            }
            KernelAction::Deny(_) | KernelAction::Pass => {}
        }
    }

    #[test]
    fn the_answer_to_a_nameless_flow_says_truly_whether_a_name_can_help(tiers in any_tiers(ALL), to in any_destination()) {
        let policy = compile(&tiers);
        let unlisted = DomainName::parse("nobody.example").unwrap();
        for bound in pins() {
            let blind = decide(&policy, to, None, &bound);
            let shown = names();
            let mut shown = shown.iter().chain([&unlisted]);
            let helped = shown.any(|name| decide(&policy, to, Some(name), &bound).allowed);
            if !blind.allowed {
                prop_assert_eq!(blind.needs_name, helped, "pinned for {:?}: {:?}", bound, blind);
            }
            prop_assert!(!(blind.allowed && blind.needs_name));
        }
    }

    #[test]
    fn a_flow_passes_exactly_if_every_tier_alone_lets_it_pass(tiers in any_tiers(ALL), to in any_destination()) {
        let together = compile(&tiers);
        let alone: Vec<SandboxPolicy> = tiers.iter().map(|tier| compile(std::slice::from_ref(tier))).collect();
        for (bound, name, verdict) in answers(&together, to) {
            let each = alone.iter().map(|policy| decide(policy, to, name.as_ref(), &bound).allowed);
            let context = format!("pinned for {bound:?}, shows {name:?}: {verdict:?}");
            prop_assert_eq!(verdict.allowed, each.into_iter().all(|allowed| allowed), "{}", context);
        }
        for name in names() {
            let resolves = together.decide_name(&name).allowed;
            prop_assert!(!resolves || alone.iter().all(|policy| policy.decide_name(&name).allowed), "{}", name);
        }
        // One more tier takes away, also in the kernel.
        let above = compile(&tiers[..1]).decide_address_port(Protocol::Tcp, to);
        let below = together.decide_address_port(Protocol::Tcp, to);
        prop_assert!(strictness(below) >= strictness(above), "{:?} became {:?}", above, below);
        prop_assert!(!matches!(above, KernelAction::Deny(_)) || below == above);
    }

    #[test]
    fn a_name_resolves_exactly_if_some_flow_under_it_may_pass(
        tiers in any_tiers(Parts { allow_ranges: false, tcp: false, ..ALL }),
    ) {
        // In no listed range but the widest.
        let addresses = ["192.0.2.9", "2606:4700::1111"].map(|address| address.parse::<IpAddr>().unwrap());
        let policy = compile(&tiers);
        for name in names() {
            let bound = [name.clone()];
            let mut ports = PORTS.into_iter();
            let reachable = ports.any(|port| {
                let mut addresses = addresses.iter();
                addresses.any(|address| decide(&policy, (*address, port).into(), Some(&name), &bound).allowed)
            });
            prop_assert_eq!(policy.decide_name(&name).allowed, reachable, "{}", name);
        }
    }

    #[test]
    fn a_document_comes_back_from_the_store_as_it_was(policy in any_policy(ALL)) {
        let text = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<Policy>(&text).unwrap(), policy);
    }
}

/// The document in force.
fn enforced(policy: &Policy) -> Policy {
    let mut document = policy.to_value();
    document["enforcement"] = json!("enforce");
    Policy::parse(&document).expect("another word of the same field")
}

/// Every IPv6 address that carries this one, with something in the bits that may hold anything.
fn forms(four: Ipv4Addr) -> [IpAddr; 6] {
    let [a, b, c, d] = four.octets();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    [
        [0, 0, 0, 0, 0, 0, high, low],
        [0, 0, 0, 0, 0xffff, 0, high, low],
        [0x64, 0xff9b, 0, 0, 0, 0, high, low],
        [0x2002, high, low, 7, 0, 0, 0, 1],
        [0x2001, 0, high, low, 0, 7, 0x3333, 0x3333],
        [0x2001, 0, 0x6565, 0x6565, 0, 7, !high, !low],
    ]
    .map(IpAddr::from)
}

fn spelled_out(policy: &Policy, four: Ipv4Addr, form: IpAddr) -> Policy {
    let mut document = policy.to_value();
    let spell = |list: &mut serde_json::Value| {
        let list = list.as_array_mut().expect("a list");
        let four = IpAddr::V4(four);
        let mut ranges = list
            .iter()
            .filter_map(|range| range.as_str()?.parse::<IpNet>().ok());
        if ranges.any(|range| range.contains(&four)) {
            list.push(json!(form.to_string()));
        }
    };
    spell(&mut document["denied_cidrs"]);
    for rule in document["rules"].as_array_mut().expect("a list") {
        if rule["action"] == "deny" {
            spell(&mut rule["cidrs"]);
        }
    }
    Policy::parse(&document).expect("one more range")
}

#[test]
fn reasons_give_way_before_ports_do() {
    let ports: Vec<u16> = (0..12).map(|index| 1000 + 2 * index).collect();
    let few = Policy::parse(&json!({"mode": "allow_all", "allowed_ports": [443]})).unwrap();
    let many = Policy::parse(&json!({"mode": "allow_all", "allowed_ports": ports})).unwrap();
    let reason = |policy| {
        compile(&[policy])
            .kernel_table()
            .lookup(Ipv4Addr::new(203, 0, 113, 5).into(), Protocol::Tcp, 80)
    };
    assert_eq!(reason(few), KernelAction::Deny(Reason::PortDenied));
    assert_eq!(reason(many), KernelAction::Deny(Reason::DefaultDeny));
}

#[test]
fn prefixes_that_say_nothing_new_are_left_out() {
    let document = json!({"mode": "allow_all", "allowed_cidrs": ["203.0.113.0/24", "198.51.100.0/24"]});
    let table = compile(&[Policy::parse(&document).unwrap()]).kernel_table();
    assert_eq!(table.entries.len(), 2, "{table:?}");
}

#[test]
fn a_prefix_that_says_what_a_distant_one_says_is_kept() {
    let rules = json!([
        {"action": "allow", "cidrs": ["203.0.113.5"], "ports": ["443"]},
        {"action": "deny", "cidrs": ["203.0.113.0/24"], "ports": ["443"]},
    ]);
    let document = json!({"mode": "allow_all", "rules": rules});
    let table = compile(&[Policy::parse(&document).unwrap()]).kernel_table();
    let at = |address: &str| table.lookup(address.parse().unwrap(), Protocol::Tcp, 443);
    assert_eq!(at("203.0.112.5"), KernelAction::Pass);
    assert_eq!(at("203.0.113.6"), KernelAction::Deny(Reason::DeniedByRule));
    assert_eq!(at("203.0.113.5"), KernelAction::Pass);
}
