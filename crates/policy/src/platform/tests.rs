use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn excepting(list: &str) -> Platform {
    Platform::new(PrivateException::parse_list(list).unwrap())
}

#[test]
fn private_metadata_and_reserved_addresses_are_denied() {
    let denied = [
        "0.0.0.0",
        "0.255.255.255",
        "10.0.0.0",
        "10.255.255.255",
        "100.64.0.1",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "64:ff9b:1::cb00:7105",
    ];
    for address in denied {
        let address: IpAddr = address.parse().unwrap();
        assert!(
            Platform::default().denies(SocketAddr::new(address, 443)),
            "{address}"
        );
    }
}

#[test]
fn public_and_documentation_addresses_are_not_denied() {
    let public = [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "168.63.129.15",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.0.2.1",
        "192.167.255.255",
        "198.17.255.255",
        "198.20.0.0",
        "198.51.100.1",
        "203.0.113.1",
        "223.255.255.255",
        "2001:db8::1",
        "2606:4700::1111",
        "::ffff:203.0.113.1",
    ];
    for address in public {
        let address: IpAddr = address.parse().unwrap();
        assert!(
            !Platform::default().denies(SocketAddr::new(address, 443)),
            "{address}"
        );
    }
}

#[test]
fn an_exception_opens_its_pair_and_nothing_else() {
    let platform = excepting("10.0.0.5/32:443, [fd00::]/8:443,10.1.0.0/16:*");
    for open in [
        "10.0.0.5:443",
        "10.1.2.3:22",
        "[fd12::1]:443",
        "[::ffff:10.0.0.5]:443",
    ] {
        assert!(!platform.denies(at(open)), "{open}");
    }
    for shut in [
        "10.0.0.5:444",
        "10.0.0.6:443",
        "10.2.0.0:22",
        "[fd12::1]:80",
        "[fe80::1]:443",
        "169.254.169.254:80",
    ] {
        assert!(platform.denies(at(shut)), "{shut}");
    }
    assert_eq!(platform.exceptions()[0].port(), Some(443));
    assert_eq!(platform.exceptions()[2].port(), None);
}

#[test]
fn a_list_of_exceptions_is_read_strictly() {
    assert_eq!(PrivateException::parse_list(" "), Ok(Vec::new()));
    for form in [
        "10.0.0.5",
        "10.0.0.5:443",
        "10.0.0.5/32",
        "10.0.0.5/32:",
        "10.0.0.5/32:0",
        "10.0.0.5/32:+1",
        "10.0.0.5/32:65536",
        "10.0.0.5/33:1",
        "fd00::/8:443",
        "[fd00::/8]:443",
        "10.0.0.5/32:443,",
        "x:*",
    ] {
        let error = PrivateException::parse_list(form).unwrap_err();
        assert!(matches!(error, ExceptionError::Form(_)), "{form}: {error}");
    }
    let error = PrivateException::parse_list("10.0.0.5/8:443")
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "`10.0.0.5/8:443` has bits beyond its prefix length; the range is 10.0.0.0/8"
    );
    for wide in ["0.0.0.0/0:*", "203.0.113.0/24:443", "[::]/0:*", "10.0.0.0/7:443"] {
        let error = PrivateException::parse_list(wide).unwrap_err();
        assert!(matches!(error, ExceptionError::NotDenied(_)), "{wide}: {error}");
    }
    assert_eq!(
        PrivateException::parse_list(&"10.0.0.5/32:1,".repeat(65)),
        Err(ExceptionError::TooMany(66))
    );
}

#[test]
fn a_policy_that_allows_only_what_the_platform_denies_is_refused() {
    let policy = |document| Policy::parse(&document).unwrap();
    let listed = policy(json!({"mode": "allowlist", "allowed_cidrs": ["203.0.113.0/24", "10.1.0.0/16"]}));
    assert_eq!(
        Platform::default().check(&listed).unwrap_err().field,
        "allowed_cidrs[1]"
    );
    assert_eq!(excepting("10.1.2.3/32:443").check(&listed), Ok(()));
    let rules =
        json!([{"action": "deny", "cidrs": ["10.0.0.0/8"]}, {"action": "allow", "cidrs": ["127.0.0.1"]}]);
    let ruled = policy(json!({"mode": "allowlist", "rules": rules}));
    assert_eq!(
        Platform::default().check(&ruled).unwrap_err().field,
        "rules[1].cidrs[0]"
    );
    let wide = policy(json!({"mode": "allowlist", "allowed_cidrs": ["0.0.0.0/0"]}));
    assert_eq!(Platform::default().check(&wide), Ok(()));
}

#[test]
fn what_the_operator_denies_is_denied_in_every_form_and_cannot_be_opened() {
    let own = DeniedRanges::parse(" 198.51.100.0/24, 2001:db8:5::/48,10.1.0.0/16").unwrap();
    let platform = excepting("10.0.0.0/8:*,[fd00::]/8:*").without(own);
    for denied in [
        "198.51.100.7:443",
        "[64:ff9b::198.51.100.7]:443",
        "[2002:c633:6407::1]:443",
        "[::198.51.100.7]:443",
        "[2001:db8:5:6::7]:80",
        "10.1.2.3:443",
        "192.168.0.1:443",
    ] {
        assert!(platform.denies(at(denied)), "{denied}");
    }
    for open in [
        "198.51.101.7:443",
        "[2001:db8:6::7]:443",
        "10.2.2.3:443",
        "[fd00::7]:443",
    ] {
        assert!(!platform.denies(at(open)), "{open}");
    }
    let policy =
        |range: &str| Policy::parse(&json!({"mode": "allowlist", "allowed_cidrs": [range]})).unwrap();
    for refused in ["198.51.100.0/25", "2001:db8:5::/64", "10.1.2.0/24"] {
        assert!(platform.check(&policy(refused)).is_err(), "{refused}");
    }
    for taken in ["198.51.100.0/23", "2001:db8::/32", "10.0.0.0/8"] {
        assert_eq!(platform.check(&policy(taken)), Ok(()), "{taken}");
    }
}

#[test]
fn a_list_of_ranges_that_is_not_clear_is_refused_by_its_entry() {
    for (list, said) in [
        ("198.51.100.0", "`198.51.100.0` is not a range"),
        ("198.51.100.0/24,", "`` is not a range"),
        ("2001:db8::/129", "`2001:db8::/129` is not a range"),
        ("198.51.100.7/24", "the range is 198.51.100.0/24"),
        ("2001:db8::1/64", "the range is 2001:db8::/64"),
        ("::/0", "as IPv4"),
        ("::ffff:198.51.100.0/120", "as IPv4"),
    ] {
        let error = DeniedRanges::parse(list).unwrap_err().to_string();
        assert!(error.contains(said), "{list}: {error}");
    }
    let many = vec!["198.51.100.0/24"; 257].join(",");
    assert!(matches!(
        DeniedRanges::parse(&many),
        Err(DeniedRangeError::TooMany(257))
    ));
    assert_eq!(DeniedRanges::parse(" ").unwrap().ranges(), []);
    assert_eq!(
        DeniedRanges::parse("2000::/3,0.0.0.0/0").unwrap().ranges().len(),
        2
    );
}

fn any_ipv4() -> impl Strategy<Value = Ipv4Addr> {
    let edges = always_denied4()
        .iter()
        .flat_map(|range| [range.network(), range.broadcast()])
        .flat_map(|edge| {
            let bits = edge.to_bits();
            [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(Ipv4Addr::from_bits)
        });
    prop_oneof![
        any::<Ipv4Addr>(),
        proptest::sample::select(edges.collect::<Vec<_>>())
    ]
}

proptest! {
    #[test]
    fn an_ipv6_form_is_denied_exactly_where_its_ipv4_address_is(
        inner in any_ipv4(), public in Just(Ipv4Addr::new(203, 0, 113, 9)), port in 1u16.., low in any::<u64>(),
    ) {
        let platform = excepting("10.0.0.0/8:443,169.254.0.0/16:*");
        let denied = platform.denies(SocketAddr::new(inner.into(), port));
        let [a, b] = [inner.to_bits() >> 16, inner.to_bits() & 0xffff].map(|half| u16::try_from(half).unwrap());
        let tail = low.to_be_bytes();
        let tail = |at: usize| u16::from_be_bytes([tail[at], tail[at + 1]]);
        let [pa, pb] = [public.to_bits() >> 16, public.to_bits() & 0xffff].map(|half| u16::try_from(half).unwrap());
        let mut forms = vec![
            Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, a, b),
            Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, a, b),
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a, b),
            Ipv6Addr::new(0x2002, a, b, tail(0), tail(2), tail(4), tail(6), 1),
            Ipv6Addr::new(0x2001, 0, pa, pb, tail(0), tail(2), !a, !b),
            Ipv6Addr::new(0x2001, 0, a, b, tail(0), tail(2), !pa, !pb),
        ];
        // :: and ::1 are denied as such, whatever exceptions there are for 0.0.0.0/8.
        if a != 0 || b > 1 {
            forms.push(Ipv6Addr::new(0, 0, 0, 0, 0, 0, a, b));
        }
        for form in forms {
            prop_assert_eq!(platform.denies(SocketAddr::new(form.into(), port)), denied, "{}", form);
        }
    }
}
