//! The real programs against a model of them: random packets under random policies, exceptions and flows. The seed is
//! printed; `SANDGATE_FUZZ_SEED` repeats a run, `SANDGATE_FUZZ_SECONDS` makes it longer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    thread,
    time::{Duration, Instant, SystemTime},
};

use netd::kernel::{EndpointHandle, EventReader, FlowEnd};
use netd_common::mark;
use sandgate_policy::{
    KernelAction, KernelTable, Platform, Policy, PortRange, PrivateException, Protocol, Reason, SandboxPolicy,
};
use serde_json::json;

use self::{
    model::{Fate, FlowId, Flows, Model, faces},
    packets::{Dice, PORTS, Place, address4, address6},
};
use crate::{
    lab::{self, Lab, NEXT, OK, PEER_MAC, REDIRECT, SHOT},
    packet::GATEWAY_MAC,
    world::privileged,
};

mod model;
mod packets;

const SECONDS: u64 = 9;
/// However slow the machine is.
const LEAST: usize = 2000;
/// Worlds of one run, each with its own exceptions.
const WORLDS: u32 = 3;
const ENDPOINTS: u8 = 4;
/// The kernel's limits of one window, with room to spare, and a little more than a window.
const EVENTS: u32 = 48;
const CONTROLS: u32 = 14;
const WINDOW: Duration = Duration::from_millis(120);

const PREFIXES: &[&str] = &[
    "203.0.113.0/24",
    "203.0.113.128/25",
    "203.0.113.66/32",
    "198.51.100.0/24",
    "198.51.100.200/32",
    "192.0.2.0/24",
    "0.0.0.0/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1:2::3/128",
    "2000::/3",
    "::/0",
];

/// One endpoint and all that the model must know of it.
struct Subject {
    handle: EndpointHandle,
    mac: [u8; 6],
    address: Ipv4Addr,
    has_ipv6: bool,
    policy: SandboxPolicy,
    table: KernelTable,
    bound: BTreeSet<IpAddr>,
    inward: BTreeSet<(SocketAddr, u16)>,
    flows: Flows,
    new_flows: bool,
    /// Of the current window.
    events: u32,
    controls: u32,
}

fn ranges(dice: &mut Dice) -> Vec<String> {
    let count = dice.below(3) + 1;
    let range = |dice: &mut Dice| {
        let (one, other) = (dice.pick(PORTS).max(1), dice.pick(PORTS).max(1));
        format!("{}-{}", one.min(other), one.max(other))
    };
    (0..count).map(|_| range(dice)).collect()
}

/// A document; `None`: the policy crate does not take it.
fn document(dice: &mut Dice) -> Option<Policy> {
    let rules: Vec<_> = (0..dice.below(7))
        .map(|_| {
            let mut cidrs: Vec<&str> = (0..dice.below(3)).map(|_| dice.pick(PREFIXES)).collect();
            let domains: &[&str] = match cidrs.is_empty() || dice.one_in(4) {
                true => &["example.org"],
                false => &[],
            };
            cidrs.dedup();
            json!({
                "action": dice.pick(&["allow", "allow", "deny"]),
                "protocol": dice.pick(&["http", "tcp"]),
                "cidrs": cidrs,
                "domains": domains,
                "ports": ranges(dice),
            })
        })
        .collect();
    let document = json!({
        "mode": dice.pick(&["allow_all", "deny_all", "allowlist", "denylist"]),
        "allowed_ports": [dice.pick(PORTS).max(1), 443],
        "rules": rules,
    });
    Policy::parse(&document).ok()
}

/// A policy of some tiers, and its table with ranges for UDP, some of them in audit mode.
fn policy(dice: &mut Dice, platform: &Platform) -> (SandboxPolicy, KernelTable) {
    loop {
        let tiers: Vec<(String, Policy)> = (0..dice.below(3) + 1)
            .filter_map(|tier| Some((format!("tier {tier}"), document(dice)?)))
            .collect();
        // Some are too large for the kernel.
        let Ok(policy) = SandboxPolicy::compile(platform, &tiers) else {
            continue;
        };
        let mut table = policy.kernel_table();
        for entry in &mut table.entries {
            let (first, last) = dice.pick(&[(0, 65_535), (443, 443), (80, 1004), (1005, 40_000)]);
            let action = dice.pick(&[
                KernelAction::Pass,
                KernelAction::Pass,
                KernelAction::Audit(Reason::DeniedByRule),
                KernelAction::Audit(Reason::PortDenied),
                KernelAction::Deny(Reason::DeniedByRule),
            ]);
            let room = entry.ranges.len() < sandgate_policy::MAX_RANGES;
            if room && entry.ranges.iter().all(|range| range.protocol == Protocol::Tcp) {
                entry.ranges.push(PortRange {
                    protocol: Protocol::Udp,
                    first,
                    last,
                    action,
                });
            }
        }
        return (policy, table);
    }
}

fn exceptions(dice: &mut Dice) -> Platform {
    let lists = [
        "",
        "10.0.0.5/32:443,10.0.0.0/24:80",
        "10.0.0.0/8:*,10.0.0.5/32:443,[fd00::]/8:443",
        "[fd00:1::5]/128:*,169.254.0.0/16:80,100.64.0.0/10:1000",
        "127.0.0.0/8:*,10.213.0.0/16:*,[fd53:4700::]/32:*",
    ];
    Platform::new(PrivateException::parse_list(dice.pick(&lists)).expect("a list"))
}

/// Addresses of the node, of which some are in force.
fn nodes(dice: &mut Dice) -> BTreeSet<IpAddr> {
    let all = ["203.0.113.200", "198.51.100.200", "2001:db8:ffff::9", "10.0.0.6"];
    let mut some = BTreeSet::new();
    for address in all {
        if dice.one_in(2) {
            some.insert(address.parse().expect("an address"));
        }
    }
    some
}

struct Run {
    dice: Dice,
    seed: u64,
    lab: Lab,
    reader: EventReader,
    platform: Platform,
    nodes: BTreeSet<IpAddr>,
    uplink: Option<u32>,
    subjects: Vec<Subject>,
    packets: usize,
    /// How often each kind of fate was met, so that a fuzz that meets only one is seen.
    met: BTreeMap<&'static str, usize>,
}

impl Run {
    fn open(seed: u64, mut dice: Dice) -> Self {
        let platform = exceptions(&mut dice);
        let lab = Lab::open(ENDPOINTS, &platform);
        let reader = lab.datapath.take_events().expect("a reader");
        let mut subjects = Vec::new();
        for (number, (sandbox, handle)) in lab.sandboxes.iter().enumerate() {
            let mut handle = *handle;
            let has_ipv6 = number > 0;
            if !has_ipv6 {
                let mut endpoint = sandbox.endpoint.clone();
                endpoint.address6 = None;
                handle = lab.datapath.attach(&endpoint).expect("attached");
            }
            let (policy, table) = policy(&mut dice, &platform);
            lab.datapath.set_policy(handle, &table).expect("a policy");
            subjects.push(Subject {
                handle,
                mac: sandbox.endpoint.mac,
                address: sandbox.endpoint.address,
                has_ipv6,
                policy,
                table,
                bound: BTreeSet::new(),
                inward: BTreeSet::new(),
                flows: Flows::new(),
                new_flows: true,
                events: 0,
                controls: 0,
            });
        }
        Self {
            dice,
            seed,
            lab,
            reader,
            platform,
            nodes: BTreeSet::new(),
            uplink: None,
            subjects,
            packets: 0,
            met: BTreeMap::new(),
        }
    }

    /// Changes one of the things that decide.
    fn change(&mut self) {
        let dice = &mut self.dice;
        let datapath = &self.lab.datapath;
        let index = dice.below(self.subjects.len());
        let subject = &mut self.subjects[index];
        match dice.below(9) {
            0 | 1 => {
                (subject.policy, subject.table) = policy(dice, &self.platform);
                datapath
                    .set_policy(subject.handle, &subject.table)
                    .expect("a policy");
            }
            2 => {
                self.nodes = nodes(dice);
                let list: Vec<IpAddr> = self.nodes.iter().copied().collect();
                datapath.set_node_addresses(&list).expect("node addresses");
            }
            3 => {
                let address: IpAddr = if dice.one_in(2) {
                    address4(dice).into()
                } else {
                    address6(dice).into()
                };
                let address = address.to_canonical();
                if subject.bound.remove(&address) {
                    datapath.unbind_address(subject.handle, address).expect("unbound");
                } else {
                    subject.bound.insert(address);
                    datapath.bind_address(subject.handle, address).expect("bound");
                }
            }
            4 => {
                let local =
                    SocketAddrV4::new(dice.pick(&[[169, 254, 1, 1], [203, 0, 113, 10]]).into(), 50_000);
                let port = dice.pick(&[7000, 40_000]);
                if subject.inward.remove(&(local.into(), port)) {
                    datapath
                        .revoke_inbound(subject.handle, port, local)
                        .expect("revoked");
                } else {
                    subject.inward.insert((local.into(), port));
                    datapath
                        .admit_inbound(subject.handle, port, local, 1)
                        .expect("admitted");
                }
            }
            5 => {
                if self.uplink.take().is_some() && dice.one_in(2) {
                    datapath.set_uplink(None).expect("no uplink");
                } else {
                    self.uplink = Some(self.lab.set_uplink());
                }
            }
            6 => {
                // More often allowed than not, as most is to be seen of open flows.
                subject.new_flows = !dice.one_in(3);
                datapath
                    .allow_new_flows(subject.handle, subject.new_flows)
                    .expect("said");
            }
            _ => self.collect(),
        }
    }

    /// Ended flows are those that were cut, each once; and those that a reset or both ends have ended a while ago.
    fn collect(&mut self) {
        for ended in self.lab.datapath.ended_flows().expect("flows") {
            let subject = self
                .subjects
                .iter_mut()
                .find(|subject| subject.handle == ended.endpoint)
                .expect("of an endpoint");
            let flow = FlowId {
                protocol: if ended.protocol == Protocol::Tcp { 6 } else { 17 },
                sandbox_port: ended.src.port(),
                remote: ended.dst,
            };
            let alive = subject.flows.remove(&flow);
            let fits = match ended.why {
                FlowEnd::PolicyTightened => alive == Some(false),
                FlowEnd::Closed | FlowEnd::Reset => alive == Some(true),
                FlowEnd::Idle | FlowEnd::EndpointGone => false,
            };
            assert!(fits, "seed {}: {ended:?} is {alive:?}", self.seed);
        }
        let left = self.subjects.iter().flat_map(|subject| subject.flows.values());
        assert!(
            left.copied().all(|alive| alive),
            "seed {}: not collected",
            self.seed
        );
    }

    /// One packet, some way.
    fn step(&mut self) {
        let index = self.dice.below(self.subjects.len());
        let Subject { events, controls, .. } = self.subjects[index];
        if events >= EVENTS || controls >= CONTROLS {
            // What is beyond the kernel's rates is another thing to test.
            thread::sleep(WINDOW);
            for subject in &mut self.subjects {
                (subject.events, subject.controls) = (0, 0);
            }
        }
        self.packets += 1;
        match self.dice.below(6) {
            0 => self.back(index),
            1 => self.toward(index),
            _ => self.away(index),
        }
    }

    fn away(&mut self, index: usize) {
        let Self {
            dice,
            lab,
            subjects,
            platform,
            nodes,
            uplink,
            reader,
            ..
        } = self;
        let subject = &mut subjects[index];
        let frame = subject.draw(dice, packets::out);
        let Ok(seen) = lab::run(
            &lab.datapath,
            "from_sandbox",
            (subject.handle.ifindex, 0, 0),
            &frame,
        ) else {
            assert!(frame.len() < 60, "the kernel takes no {frame:x?}");
            return;
        };
        let (handle, mut flows) = (subject.handle, std::mem::take(&mut subject.flows));
        let fate = subject.model(platform, nodes, uplink.is_some(), |model| {
            model.out(&frame, &mut flows)
        });
        subject.flows = flows;
        let told = reader.next_batch(Duration::ZERO).expect("events");
        subject.events += u32::try_from(told.len()).expect("few");
        let context = || {
            format!(
                "seed {} packet {}: {frame:02x?}\nmodel: {fate:?}\nprogram: {} mark {:#x}, {told:?}\n{:?}",
                self.seed, self.packets, seen.returned, seen.mark, subject.table
            )
        };
        let reasons = match &fate {
            Fate::Dropped(reasons) | Fate::Refused(reasons) => reasons.clone(),
            Fate::Left(Some((_, Some(reason)))) => BTreeSet::from([reason.as_str()]),
            Fate::Left(_) | Fate::Inward | Fate::Neighbour => BTreeSet::new(),
        };
        let audit = matches!(fate, Fate::Left(_));
        match &told[..] {
            [] => assert!(reasons.is_empty(), "no event\n{}", context()),
            [event] => {
                assert!(reasons.contains(event.reason.as_str()), "reason\n{}", context());
                assert_eq!(event.audit, audit, "{}", context());
                assert_eq!(
                    (event.ordinal, event.repeated),
                    (handle.ordinal, 1),
                    "{}",
                    context()
                );
            }
            [..] => panic!("several events\n{}", context()),
        }
        let (name, expected) = match &fate {
            Fate::Dropped(_) => ("dropped", (SHOT, None)),
            Fate::Refused(_) => ("refused", (OK, Some(mark::REFUSE))),
            Fate::Inward => ("inward", (NEXT, Some(mark::INBOUND))),
            Fate::Neighbour => ("neighbour", (NEXT, Some(mark::PROXY))),
            Fate::Left(_) => ("left", (REDIRECT, Some(mark::PASS))),
        };
        *self.met.entry(name).or_default() += 1;
        assert_eq!(seen.returned, expected.0, "{}", context());
        assert!(expected.1.is_none_or(|mark| mark == seen.mark), "{}", context());
        let mut after = frame.clone();
        if let Fate::Left(_) = fate {
            after[..6].copy_from_slice(&PEER_MAC);
            after[6..12].copy_from_slice(&GATEWAY_MAC);
        }
        assert_eq!(seen.frame, after, "{}", context());
        // Errors, and packets that only ask for an address, have a rate of their own.
        let control =
            frame[12..14] == [8, 6] || [1, 58].contains(&frame[if frame[12] == 8 { 23 } else { 20 }]);
        subject.controls += u32::from(control);
    }

    /// Through the uplink, to whoever has the address.
    fn back(&mut self, index: usize) {
        let Self {
            dice,
            lab,
            subjects,
            platform,
            nodes,
            uplink,
            ..
        } = self;
        let frame = subjects[index].draw(dice, packets::into);
        let Ok(seen) = lab::run(&lab.datapath, "from_uplink", (1, 0, 1), &frame) else {
            assert!(frame.len() < 60, "the kernel takes no {frame:x?}");
            return;
        };
        let is_for = |subject: &Subject| {
            let six = lab::address6(subject.address.octets()[3]);
            let four = frame.get(30..34) == Some(&subject.address.octets()) && frame[12..14] == [8, 0];
            four || frame.get(38..54) == Some(&six.octets()) && frame[12..14] == [0x86, 0xdd]
        };
        let owner = subjects.iter().position(is_for).unwrap_or(index);
        let stack = subjects[1].model(platform, nodes, true, |model| model.is_for_stack(&frame));
        let subject = &mut subjects[owner];
        let mut flows = std::mem::take(&mut subject.flows);
        // Nothing is attached to an uplink that there is not; what a test run makes of it is that of one that was there.
        let entered = !stack
            && subject.model(platform, nodes, true, |model| {
                model.into(&frame, 0, true, &mut flows)
            });
        subject.flows = flows;
        let (name, expected) = match (stack, entered) {
            (true, _) => ("to the stack", NEXT),
            (false, true) => ("entered", REDIRECT),
            (false, false) => ("kept out", SHOT),
        };
        *self.met.entry(name).or_default() += 1;
        let mut after = frame.clone();
        if entered {
            after[..6].copy_from_slice(&subject.mac);
            after[6..12].copy_from_slice(&GATEWAY_MAC);
        }
        assert_eq!(
            (seen.returned, &seen.frame),
            (expected, &after),
            "seed {} packet {}: uplink {uplink:?}: {frame:02x?}\n{:?}",
            self.seed,
            self.packets,
            subject.flows
        );
    }

    fn toward(&mut self, index: usize) {
        let Self {
            dice,
            lab,
            subjects,
            platform,
            nodes,
            uplink,
            ..
        } = self;
        let subject = &mut subjects[index];
        let frame = subject.draw(dice, packets::into);
        let marked = dice.pick(&[
            0,
            mark::NETD,
            mark::PROXY,
            mark::REFUSE,
            mark::INBOUND,
            mark::PASS,
        ]);
        let ingress = dice.pick(&[0, 1, 1, 77]);
        let place = (subject.handle.ifindex, marked, ingress);
        let Ok(seen) = lab::run(&lab.datapath, "to_sandbox", place, &frame) else {
            assert!(frame.len() < 60, "the kernel takes no {frame:x?}");
            return;
        };
        let mut flows = std::mem::take(&mut subject.flows);
        let admitted = subject.model(platform, nodes, uplink.is_some(), |model| {
            model.into(&frame, marked, ingress == 1, &mut flows)
        });
        subject.flows = flows;
        let name = if admitted { "delivered" } else { "unadmitted" };
        *self.met.entry(name).or_default() += 1;
        assert_eq!(
            seen.returned,
            if admitted { NEXT } else { SHOT },
            "seed {} packet {}: mark {marked:#x} from {ingress}: {frame:02x?}\n{:?}",
            self.seed,
            self.packets,
            subject.flows
        );
    }
}

impl Subject {
    fn draw(&self, dice: &mut Dice, how: fn(&mut Dice, &Place<'_>) -> Vec<u8>) -> Vec<u8> {
        let flows: Vec<FlowId> = self.flows.keys().copied().collect();
        let inward: Vec<(SocketAddr, u16)> = self.inward.iter().copied().collect();
        let number = self.address.octets()[3];
        let place = Place {
            mac: self.mac,
            address: self.address,
            address6: lab::address6(number),
            flows: &flows,
            inward: &inward,
        };
        how(dice, &place)
    }

    fn model<T>(
        &self,
        platform: &Platform,
        nodes: &BTreeSet<IpAddr>,
        uplink: bool,
        ask: impl FnOnce(&Model<'_>) -> T,
    ) -> T {
        let ruled = |protocol: Protocol, to: SocketAddr| match protocol {
            // Of an address that carries another the table says less than the decision: netd looks inside.
            Protocol::Tcp if faces(to.ip()).len() == 1 => self.policy.decide_address_port(protocol, to),
            Protocol::Tcp | Protocol::Udp => self.table.lookup(to.ip(), protocol, to.port()),
        };
        let denied = |to: SocketAddr| platform.denies(to);
        let private = |to: SocketAddr| is_private(to, nodes, platform);
        ask(&Model {
            mac: self.mac,
            address: self.address,
            address6: self.has_ipv6.then(|| lab::address6(self.address.octets()[3])),
            ruled: &ruled,
            platform: &denied,
            private: &private,
            bound: &self.bound,
            inward: &self.inward,
            uplink,
            new_flows: self.new_flows,
        })
    }
}

/// The node's addresses, each but for the exceptions that name exactly it; and the sandboxes', without exception.
fn is_private(to: SocketAddr, nodes: &BTreeSet<IpAddr>, platform: &Platform) -> bool {
    let sandboxes: [ipnet::IpNet; 2] = [
        "10.213.0.0/16".parse().expect("a prefix"),
        "fd53:4700::/64".parse().expect("a prefix"),
    ];
    let named = |exception: &PrivateException| {
        exception.network() == ipnet::IpNet::from(to.ip())
            && exception.port().is_none_or(|port| port == to.port())
    };
    sandboxes.iter().any(|range| range.contains(&to.ip()))
        || nodes.contains(&to.ip()) && !platform.exceptions().iter().any(named)
}

#[test]
fn the_programs_and_the_model_agree_on_random_packets() {
    if !privileged() {
        return;
    }
    let from_environment = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = from_environment("SANDGATE_FUZZ_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        u64::from(now.expect("after 1970").subsec_nanos())
    });
    let seconds = from_environment("SANDGATE_FUZZ_SECONDS").unwrap_or(SECONDS);
    println!("SANDGATE_FUZZ_SEED={seed}");
    let mut met: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut packets = 0;
    for world in 0..WORLDS {
        let mut run = Run::open(seed, Dice(seed ^ u64::from(world) << 56));
        let end = Instant::now() + Duration::from_secs(seconds) / WORLDS;
        while Instant::now() < end || run.packets < LEAST / WORLDS as usize {
            if run.dice.one_in(60) {
                run.change();
            }
            run.step();
        }
        run.collect();
        packets += run.packets;
        for (name, count) in run.met {
            *met.entry(name).or_default() += count;
        }
    }
    println!("{packets} packets: {met:?}");
    assert_eq!(met.len(), 10, "{met:?}");
}
