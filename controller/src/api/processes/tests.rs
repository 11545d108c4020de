use serde_json::json;

use super::*;

fn document(body: &Value) -> Document {
    Document::parse(body.to_string().as_bytes()).expect("a document")
}

#[test]
fn a_process_is_started_with_pipes_or_a_terminal() {
    let start = |body: Value| begin(document(&body)).expect("a process");
    let plain = start(json!({"command": "a"}));
    assert_eq!((plain.terminal, plain.attended), (None, false));
    let terminal = start(json!({"command": ["a"], "pty": true, "background": false}));
    assert_eq!((terminal.terminal, terminal.attended), (Some(TERMINAL), true));
    let sized = start(json!({"command": "a", "pty": {"rows": 50, "cols": 132}, "cwd": "/tmp"}));
    assert_eq!(
        sized.terminal,
        Some(TerminalSize {
            rows: 50,
            columns: 132
        })
    );
    assert_eq!(sized.exec.working_dir.as_deref(), Some("/tmp"));
}

#[test]
fn a_refusal_names_the_field() {
    for (body, field) in [
        (json!({}), "command"),
        (json!({"command": "a", "pty": 1}), "pty"),
        (json!({"command": "a", "pty": {"rows": 0}}), "pty.rows"),
        (json!({"command": "a", "pty": {"cols": 1001}}), "pty.cols"),
        (json!({"command": "a", "pty": {"width": 1}}), "pty.width"),
        (json!({"command": "a", "background": "yes"}), "background"),
        (json!({"command": "a", "timeout": 1000}), "timeout"),
        (json!({"command": "a", "env": {"A=B": "x"}}), "env"),
    ] {
        let error = begin(document(&body)).expect_err("refused");
        assert_eq!(error.refused_field().as_deref(), Some(field), "{body}");
    }
    for (body, field) in [
        (json!({}), "data"),
        (json!({"data": 1}), "data"),
        (json!({"data": "%", "encoding": "base64"}), "data"),
        (json!({"data": "a", "encoding": "hex"}), "encoding"),
        (json!({"data": "x".repeat(MAX_INPUT + 1)}), "data"),
        (json!({"data": "a", "close": 1}), "close"),
    ] {
        let error = input(document(&body)).expect_err("refused");
        assert_eq!(error.refused_field().as_deref(), Some(field));
    }
    for value in [
        json!("NONE"),
        json!(0),
        json!(65),
        json!(-9),
        json!(true),
        json!("9"),
    ] {
        let error = signal_number(Some(&value)).expect_err("refused");
        assert_eq!(error.refused_field().as_deref(), Some("signal"), "{value}");
    }
}

#[test]
fn input_is_text_or_base64_and_signals_have_names_and_numbers() {
    let read = |body: Value| input(document(&body)).expect("input");
    assert_eq!(read(json!({"data": "é\n"})), (Bytes::from("é\n"), false));
    let binary = read(json!({"data": "/wA=\n", "encoding": "base64", "close": true}));
    assert_eq!(binary, (Bytes::from_static(&[255, 0]), true));
    assert_eq!(read(json!({"close": true})), (Bytes::new(), true));
    for value in [json!("SIGINT"), json!("int"), json!(2)] {
        assert_eq!(signal_number(Some(&value)).ok(), Some(2), "{value}");
    }
}

#[test]
fn only_what_can_be_a_process_is_one() {
    for name in ["proc-1", "1", "proc-18446744073709551615"] {
        assert!(is_name(name), "{name}");
    }
    for name in [
        "",
        "proc-",
        "proc-x",
        "-1",
        "../1",
        "proc-1/",
        "proc-184467440737095516150",
    ] {
        assert!(!is_name(name), "{name}");
    }
}
