//! Whom netd asks and whom it believes, and what it keeps of the answers.

use std::{net::IpAddr, time::Duration};

use harness::{
    dns::{Answer, Forgery, Manner, Mood},
    probe::{self, Probe},
    wait,
    world::{OK, RESOLVER, RESOLVER6, SECOND_RESOLVER, WILD},
};
use hickory_proto::op::ResponseCode;
use serde_json::json;

use super::{NXDOMAIN, Named, REFUSED, SERVFAIL, ask, assert_addresses, policy};

/// How long a server that was well again may be left alone.
const RECOVERY: Duration = Duration::from_secs(120);

/// Restores the servers' good mood also when a case fails.
struct Moods<'a>(&'a Named);

impl Moods<'_> {
    fn set(&self, moods: [Mood; 3]) {
        let servers: [IpAddr; 3] = [RESOLVER.into(), SECOND_RESOLVER.into(), RESOLVER6.into()];
        for (server, mood) in servers.into_iter().zip(moods) {
            self.0.world.dns.feel(server, mood);
        }
    }
}

impl Drop for Moods<'_> {
    fn drop(&mut self) {
        self.set([Mood::Well; 3]);
    }
}

/// Which servers were asked for a name, in order.
fn asked_of(named: &Named, name: &str) -> Vec<IpAddr> {
    let queries = named.world.dns.queries_for(name);
    queries.iter().map(|query| query.server.ip()).collect()
}

/// Asks for fresh names until one is asked of this server first.
fn wait_until_first(named: &Named, probe: &Probe<'_>, server: IpAddr, zone: &str) {
    let mut number = 0;
    wait::until("the server is asked first", RECOVERY, || {
        number += 1;
        let name = format!("again{number}.{zone}");
        assert_addresses(&ask(probe, &name), &[WILD.into()]);
        (asked_of(named, &name).first() == Some(&server)).then_some(())
    });
}

pub(crate) fn forged_answers_are_not_heard(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let single = [
        Forgery::Id,
        Forgery::Question,
        Forgery::Letters,
        Forgery::Port,
        Forgery::Address,
        Forgery::Junk,
    ];
    let mut all: Vec<Vec<Forgery>> = single.iter().map(|forgery| vec![*forgery]).collect();
    all.push(single.to_vec());
    // Somebody who guesses without end.
    all.push(vec![Forgery::Id; 100]);
    for (index, forged) in all.into_iter().enumerate() {
        let name = format!("forged{index}.wild.test");
        let manner = Manner {
            forged: forged.clone(),
            ..Manner::default()
        };
        named.world.dns.behave(&name, manner);
        assert_addresses(&ask(&probe, &name), &[WILD.into()]);
        let by_tcp = named.world.dns.queries_for(&name).iter().any(|query| query.tcp);
        let doubted = forged.contains(&Forgery::Letters) || forged.len() > 16;
        assert_eq!(
            by_tcp, doubted,
            "{forged:?}: TCP decides where somebody may be guessing"
        );
    }
    // A server that changes the letters is believed by TCP.
    let manner = Manner {
        lower: true,
        ..Manner::default()
    };
    named.world.dns.behave("lower-case-server.wild.test", manner);
    assert_addresses(&ask(&probe, "lower-case-server.wild.test"), &[WILD.into()]);
    sandbox.stop();
}

pub(crate) fn a_sandbox_cannot_answer_netds_questions(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let slow = Manner {
        delay: Duration::from_secs(1),
        ..Manner::default()
    };
    named.world.dns.behave("awaited.wild.test", slow);
    // While the question is open it shouts answers at whatever port might wait for one, from port 53.
    let shout = format!(
        "python3 - <<'END'\nimport socket, struct, threading\n\
         ask = lambda: socket.getaddrinfo('awaited.wild.test', 443)\n\
         waiting = threading.Thread(target=ask); waiting.start()\n\
         name = b'\\x07awaited\\x04wild\\x04test\\0'\n\
         body = struct.pack('>5H', 0x8180, 1, 1, 0, 0) + name + struct.pack('>2H', 1, 1)\n\
         body += b'\\xc0\\x0c' + struct.pack('>2HIH', 1, 1, 60, 4) + bytes([203, 0, 113, 66])\n\
         out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         for to in ('169.254.1.1', '198.51.100.130', '{RESOLVER}'):\n\
         \x20 for port in range(32768, 34768):\n\
         \x20   try: out.sendto(struct.pack('>H', port & 0xffff) + body, (to, port))\n\
         \x20   except OSError: pass\n\
         waiting.join()\nprint(sorted({{entry[4][0] for entry in ask()}}))\nEND"
    );
    assert_eq!(sandbox.sh_ok(&shout), format!("['{WILD}']"));
    assert_addresses(&ask(&probe, "awaited.wild.test"), &[WILD.into()]);
    sandbox.stop();
}

pub(crate) fn an_upstream_that_fails_is_passed_over_and_remembered(named: &Named) {
    let sandbox = named.allowed(&json!({ "unique_names_per_minute": 10_000 }));
    let probe = named.probe(&sandbox);
    let moods = Moods(named);
    let (well, silent) = (Mood::Well, Mood::Silent);
    let failing = Mood::Failing(ResponseCode::ServFail);
    let [first, second, third]: [IpAddr; 3] = [RESOLVER.into(), SECOND_RESOLVER.into(), RESOLVER6.into()];
    wait_until_first(named, &probe, first, "well.wild.test");

    // A failure, or a refusal: the next one is asked, and the first is not blamed.
    for code in [ResponseCode::ServFail, ResponseCode::Refused] {
        moods.set([Mood::Failing(code), well, well]);
        let name = format!("code{}.wild.test", u16::from(code));
        for index in 0..3 {
            let name = format!("n{index}.{name}");
            assert_addresses(&ask(&probe, &name), &[WILD.into()]);
            assert!(asked_of(named, &name).starts_with(&[first, second]), "{name}");
        }
    }

    // Silence: one question waits for it, and those after it do not.
    moods.set([silent, well, well]);
    assert_addresses(&ask(&probe, "waits.silent.wild.test"), &[WILD.into()]);
    assert!(asked_of(named, "waits.silent.wild.test").starts_with(&[first, second]));
    // At once: after a few seconds it is tried again.
    let names: Vec<String> = (0..5).map(|index| format!("n{index}.silent.wild.test")).collect();
    let questions: Vec<_> = names.iter().map(|name| probe::dns(RESOLVER, name)).collect();
    for (name, outcome) in names.iter().zip(probe.try_all(&questions)) {
        assert_addresses(&outcome, &[WILD.into()]);
        let asked = asked_of(named, name);
        assert_eq!(asked.first(), Some(&second), "{name}: {asked:?}");
    }

    // The one by IPv6 is as good as any.
    moods.set([silent, failing, well]);
    assert_addresses(&ask(&probe, "six.wild.test"), &[WILD.into()]);
    assert!(asked_of(named, "six.wild.test").contains(&third));

    // All of them: an answer that says so, long before a client gives up.
    moods.set([failing; 3]);
    assert_eq!(ask(&probe, "all.failing.wild.test").rcode, SERVFAIL);
    moods.set([silent; 3]);
    let nothing = ask(&probe, "all.silent.wild.test");
    assert_eq!(nothing.rcode, SERVFAIL, "{nothing:?}");
    // What may not be asked is refused as ever.
    assert_eq!(ask(&probe, "all.silent.evil.test").rcode, REFUSED);

    // Whoever is well again is asked first again.
    moods.set([well; 3]);
    assert_addresses(&ask(&probe, "after.wild.test"), &[WILD.into()]);
    wait_until_first(named, &probe, first, "back.wild.test");

    // A lost datagram costs patience and nothing else.
    let lossy = Manner {
        lost: 2,
        ..Manner::default()
    };
    named.world.dns.behave("lossy.wild.test", lossy);
    assert_addresses(&ask(&probe, "lossy.wild.test"), &[WILD.into()]);
    wait_until_first(named, &probe, first, "settled.wild.test");
    sandbox.stop();
}

pub(crate) fn what_one_organisation_asked_another_cannot_tell(named: &Named) {
    let (own, same) = (named.fenced(), named.fenced());
    let other = named.other.sandbox(&json!({ "network": policy(&json!({})) }));
    let [own_probe, same_probe, other_probe] = [&own, &same, &other].map(|sandbox| named.probe(sandbox));
    let kept = Manner {
        ttl: 600,
        ..Manner::default()
    };
    named.world.dns.behave("kept.wild.test", kept);
    let first = ask(&own_probe, "kept.wild.test");
    assert_addresses(&first, &[WILD.into()]);
    assert!(first.ttl.is_some_and(|ttl| (1..=60).contains(&ttl)), "{first:?}");
    for _ in 0..5 {
        assert_addresses(&ask(&own_probe, "KEPT.wild.test"), &[WILD.into()]);
        assert_addresses(&ask(&same_probe, "kept.wild.test"), &[WILD.into()]);
    }
    assert_eq!(named.asked("kept.wild.test"), 1, "one organisation asks once");
    assert_addresses(&ask(&other_probe, "kept.wild.test"), &[WILD.into()]);
    assert_eq!(
        named.asked("kept.wild.test"),
        2,
        "another one asks for itself, and waits as long"
    );

    // The cache gives nobody what the policy does not, and no address to whoever did not ask.
    let third = named.fenced();
    let third_probe = named.probe(&third);
    third_probe
        .try_one(&probe::https(WILD, "kept.wild.test"))
        .assert_refused_at_connect();
    third.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] }));
    assert_eq!(ask(&third_probe, "kept.wild.test").rcode, REFUSED);
    same_probe
        .try_one(&probe::https(WILD, "kept.wild.test"))
        .assert_answered("hello from");
    assert_eq!(named.asked("kept.wild.test"), 2);

    // What does not exist is remembered too, as long as its zone says, and not longer.
    assert_eq!(ask(&own_probe, "nothing.other.test").rcode, NXDOMAIN);
    named
        .world
        .dns
        .set("nothing.other.test", Answer::Addresses(vec![OK.into()]));
    wait::until("the name is there", RECOVERY, || {
        (ask(&own_probe, "nothing.other.test").rcode == Some(0)).then_some(())
    });

    // Many at once ask once.
    let slow = Manner {
        delay: Duration::from_millis(400),
        ttl: 600,
        ..Manner::default()
    };
    named.world.dns.behave("together.wild.test", slow);
    let many = "python3 -c \"import socket, threading\n\
                t = [threading.Thread(target=socket.gethostbyname, args=('together.wild.test',)) for _ in range(20)]\n\
                [x.start() for x in t]; [x.join() for x in t]\"";
    own.sh_ok(many);
    assert_eq!(named.asked("together.wild.test"), 1);
    for sandbox in [third, other, same, own] {
        sandbox.stop();
    }
}
