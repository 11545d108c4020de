use super::*;

fn ended(exit_code: i32, stdout: &str, stderr: &str) -> Run {
    Run::Ended(Output {
        exit_code,
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
        truncated: false,
        timed_out: false,
        duration_ms: 1,
        changes: None,
    })
}

fn client(name: &str) -> &'static Program {
    const PROGRAMS: &[Program] = &CLIENTS;
    PROGRAMS
        .iter()
        .find(|program| program.name == name)
        .expect("known")
}

fn finding(installed: bool, ok: bool, detail: &str) -> DoctorFinding {
    DoctorFinding {
        installed,
        ok,
        detail: detail.to_owned(),
    }
}

#[test]
fn a_client_is_well_when_netd_answered_this_sandbox() {
    let id = SandboxId::random();
    let expected = expected(&id).expect("JSON");
    let others = super::expected(&SandboxId::random()).expect("JSON");
    let curl = |run| judge(client("curl"), run, &expected);
    assert_eq!(curl(ended(0, &expected, "")), finding(true, true, "answered"));
    let with_head = format!("HTTP/1.1 200 OK\r\n\r\n{expected}\n");
    assert_eq!(
        curl(ended(0, &with_head, "depth=0")),
        finding(true, true, "answered")
    );
    assert_eq!(
        curl(ended(0, &others, "")),
        finding(true, false, &format!("another answer: {others}"))
    );
    assert_eq!(curl(ended(0, "", "")), finding(true, false, "another answer:"));
    // An exit status counts whatever was written.
    assert_eq!(
        curl(ended(60, &expected, "curl: (60) SSL certificate problem\nMore\n")),
        finding(true, false, "curl: (60) SSL certificate problem More")
    );
    assert_eq!(
        curl(ended(1, "", " \n")),
        finding(true, false, "exit status 1 without a word")
    );
    assert_eq!(curl(ended(127, "", "x")), finding(false, false, "not installed"));
    assert_eq!(curl(Run::Lost("why".to_owned())), finding(true, false, "why"));
    let late = Run::Ended(Output {
        exit_code: 124,
        stdout: expected.clone(),
        stderr: "waiting".to_owned(),
        truncated: false,
        timed_out: true,
        duration_ms: 10_000,
        changes: None,
    });
    assert_eq!(curl(late), finding(true, false, "no end within 10 s: waiting"));
    assert_eq!(
        judge(client("git"), ended(0, "", ""), &expected),
        finding(true, true, "answered")
    );
}

#[test]
fn the_name_is_the_gateway_s() {
    let dns = |stdout| judge(&RESOLVER, ended(0, stdout, ""), "");
    assert_eq!(
        dns("169.254.1.1     STREAM doctor.sandgate.internal\n"),
        finding(true, true, "169.254.1.1")
    );
    for other in ["169.254.1.10 STREAM\n", "203.0.113.1\n", ""] {
        assert!(!dns(other).ok, "{other}");
    }
}

#[test]
fn health_is_of_what_is_installed() {
    let with = |finding: DoctorFinding| DoctorClient {
        name: "x".to_owned(),
        finding,
    };
    let (well, ill, absent) = (
        finding(true, true, ""),
        finding(true, false, ""),
        finding(false, false, ""),
    );
    for (dns, clients, healthy) in [
        (&well, vec![&well, &well], true),
        (&well, vec![&well, &absent], true),
        (&absent, vec![&well], true),
        (&ill, vec![&well], false),
        (&well, vec![&well, &ill], false),
        (&well, vec![&absent], false),
        (&well, vec![], false),
    ] {
        let clients = clients.into_iter().cloned().map(with).collect();
        assert_eq!(conclude(dns.clone(), clients).healthy, healthy);
    }
}

#[test]
fn what_the_sandbox_says_is_one_short_line() {
    let hostile = "\u{1b}[2Jgone\r\n{\"level\":\"error\"}\u{202e}txt\u{0}\u{200b}é\tend";
    assert_eq!(clean(hostile), "[2Jgone {\"level\":\"error\"} txt é end");
    let long = clean(&"é ".repeat(100_000));
    assert_eq!(long.chars().count(), MAX_DETAIL);
    assert_eq!(clean(&" ".repeat(100_000)), "");
}

#[test]
fn every_line_is_for_the_host() {
    for program in CLIENTS.iter().chain([&RESOLVER]) {
        assert!(program.line.contains(DOCTOR_HOST), "{}", program.name);
    }
}
