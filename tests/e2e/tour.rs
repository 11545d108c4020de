//! The README's tour, pasted: every line of it works as it stands.

use std::path::Path;

use crate::machine::Machine;

const MARK: &str = "<!-- tour:";
const FENCE: &str = "```";

pub(crate) fn every_line_of_the_readmes_tour_works(machine: &Machine) {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = std::fs::read_to_string(&readme).expect("the README");
    let lines = tour(&readme);
    assert!(lines.len() >= 12, "the tour has only {} lines", lines.len());
    // Each line is announced, so that its answer can be told from the others'.
    let script: String = lines
        .iter()
        .enumerate()
        .map(|(index, line)| format!("echo '@@ {index}'\n{line}\n"))
        .collect();
    let script = format!("set -eu -o pipefail\n{script}echo '@@ end'\n");
    let output = machine
        .world
        .node()
        .command("bash", &["-c", &script])
        .expect("the tour");
    let output = String::from_utf8_lossy(&output.stdout).into_owned();

    let answer_to = |part: &str| {
        let index = lines.iter().position(|line| line.contains(part));
        let index = index.unwrap_or_else(|| panic!("no line of the tour has {part:?}"));
        let after = output
            .split_once(&format!("@@ {index}\n"))
            .map(|(_, after)| after);
        let answer = after.and_then(|after| after.split("@@ ").next());
        answer.unwrap_or_else(|| panic!("line {index} said nothing:\n{output}"))
    };
    assert!(
        answer_to("python3 hello.py").contains(r#""stdout":"42\n""#),
        "{output}"
    );
    assert!(
        answer_to("process.version").contains(r#""exit_code":0"#),
        "{output}"
    );
    assert_eq!(answer_to("jq -r .content"), "42\n");
    assert!(
        answer_to("allowed_domains").contains(r#""applied":true"#),
        "{output}"
    );
    assert!(answer_to("http_code").contains(r#""stdout":"200\n""#), "{output}");
    let audit = answer_to("/egress/audit");
    for expected in [
        r#"["allow","allowed","example.com",80"#,
        "platform_denied",
        "address_not_bound",
    ] {
        assert!(audit.contains(expected), "{expected} is missing in\n{audit}");
    }
    assert!(
        answer_to(r#""stream": true"#).contains(r#""type":"done""#),
        "{output}"
    );
    assert!(answer_to("/stop").contains(r#""success":true"#), "{output}");

    let stored = answer_to("API_TOKEN");
    assert!(
        stored.contains(r#""name":"API_TOKEN""#) && !stored.contains("s3cret"),
        "{output}"
    );
    let called = answer_to("httpbin.org/bearer");
    assert!(
        called.contains("authenticated") && called.contains("[redacted:") && !called.contains("s3cret"),
        "{output}"
    );
    let heard = machine.world.mirror.only("/bearer");
    assert_eq!(heard.all("authorization"), ["Bearer s3cret-0123456789"]);
    // The placeholder, and no line that has the key.
    let looked = answer_to("printenv API_TOKEN");
    assert!(
        looked.contains(r"\n0\n") && !looked.contains("s3cret"),
        "{output}"
    );
    assert!(
        answer_to("-X PUT $API/secrets").contains(r#""applied":true"#),
        "{output}"
    );
    assert_eq!(answer_to("-o /dev/null -w '%{http_code}"), "401\n");
    assert!(
        answer_to("X-Tunnel-Token").contains("Directory listing"),
        "{output}"
    );
    assert!(
        answer_to("-X DELETE $API/tunnels").contains(r#""success":true"#),
        "{output}"
    );
}

/// The lines of the shell blocks between the mark and the next heading.
fn tour(readme: &str) -> Vec<&str> {
    let (_, tour) = readme.split_once(MARK).expect("the tour's mark");
    let tour = tour.split("\n## ").next().expect("a first part");
    let blocks = tour.split(FENCE).skip(1).step_by(2);
    blocks
        .flat_map(|block| block.lines().skip(1))
        .filter(|line| !line.trim().is_empty())
        .collect()
}
