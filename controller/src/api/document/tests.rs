//! Every kind of field, right and wrong.

use serde_json::json;

use super::*;

fn document(body: &Value) -> Document {
    Document::parse(body.to_string().as_bytes()).expect("a document")
}

fn field<T>(result: Result<T, ApiError>) -> Option<String> {
    result.err().and_then(|error| error.refused_field())
}

#[test]
fn an_empty_body_is_an_empty_document() {
    for body in ["", " ", "\r\n", "{}", "null "] {
        match Document::parse(body.as_bytes()) {
            Ok(document) => assert!(document.is_empty() && document.finish().is_ok(), "{body:?}"),
            Err(_) => assert_eq!(body, "null ", "{body:?}"),
        }
    }
}

#[test]
fn what_is_no_object_is_refused() {
    for body in [
        "[]", "1", "\"a\"", "true", "null", "{", "{\"a\":}", "{}{}", "\u{0}", "{'a':1}",
    ] {
        let error = Document::parse(body.as_bytes()).expect_err(body);
        assert_eq!(error.code(), ErrorCode::ValidationError, "{body:?}");
    }
    assert!(Document::parse(b"{\"a\":\"\xff\"}").is_err());
    let deep = "{\"a\":".repeat(500) + "1" + &"}".repeat(500);
    assert!(Document::parse(deep.as_bytes()).is_err(), "nesting is bounded");
}

#[test]
fn a_field_has_one_type() {
    let all = json!({
        "text": "a", "number": 5, "flag": true, "texts": ["a", "b"], "map": {"k": "v"},
        "documents": [{"x": "y"}], "none": null
    });
    let mut right = document(&all);
    assert_eq!(right.text("text").ok().flatten().as_deref(), Some("a"));
    assert_eq!(right.whole("number", 1..=5).ok().flatten(), Some(5));
    assert_eq!(right.flag("flag").ok().flatten(), Some(true));
    assert_eq!(right.texts("texts").ok().flatten().expect("texts"), ["a", "b"]);
    assert_eq!(right.text_map("map").ok().flatten().expect("a map")["k"], "v");
    let mut inner = right
        .documents("documents")
        .ok()
        .flatten()
        .expect("documents")
        .remove(0);
    assert_eq!(inner.text("x").ok().flatten().as_deref(), Some("y"));
    assert_eq!(right.text("none").ok(), Some(None));
    assert!(right.finish().is_ok());

    for wrong in ["number", "flag", "texts", "map", "documents"] {
        assert_eq!(field(document(&all).text(wrong)).as_deref(), Some(wrong));
    }
    for wrong in ["text", "flag", "texts", "map"] {
        assert_eq!(field(document(&all).whole(wrong, 0..=9)).as_deref(), Some(wrong));
    }
    for wrong in ["text", "number", "texts"] {
        assert_eq!(field(document(&all).flag(wrong)).as_deref(), Some(wrong));
        assert_eq!(field(document(&all).text_map(wrong)).as_deref(), Some(wrong));
    }
    for wrong in ["text", "map"] {
        assert_eq!(field(document(&all).texts(wrong)).as_deref(), Some(wrong));
        assert_eq!(field(document(&all).documents(wrong)).as_deref(), Some(wrong));
    }
}

#[test]
fn a_refusal_names_the_element() {
    assert_eq!(
        field(document(&json!({"a": ["x", 1]})).texts("a")).as_deref(),
        Some("a[1]")
    );
    assert_eq!(
        field(document(&json!({"a": {"b": 1}})).text_map("a")).as_deref(),
        Some("a.b")
    );
    assert_eq!(
        field(document(&json!({"a": [{}, 1]})).documents("a")).as_deref(),
        Some("a[1]")
    );
    let mut outer = document(&json!({"a": [{"b": 1}]}));
    let mut inner = outer.documents("a").ok().flatten().expect("documents").remove(0);
    assert_eq!(field(inner.text("b")).as_deref(), Some("a[0].b"));
    assert_eq!(field(inner.required_text("c")).as_deref(), Some("a[0].c"));
}

#[test]
fn a_number_is_whole_and_in_range() {
    for (value, expected) in [
        (json!(1), Some(1)),
        (json!(9), Some(9)),
        (json!(0), None),
        (json!(10), None),
        (json!(-1), None),
        (json!(1.5), None),
        (json!(1e30), None),
        (json!("1"), None),
    ] {
        let mut document = document(&json!({ "n": value }));
        assert_eq!(document.whole("n", 1..=9).ok().flatten(), expected, "{value}");
    }
}

#[test]
fn what_is_left_is_misspelt() {
    let mut left = document(&json!({"known": "a", "unknwon": 1}));
    left.text("known").expect("known");
    assert_eq!(field(left.finish()).as_deref(), Some("unknwon"));
    assert!(
        document(&json!({"unknown": null})).finish().is_ok(),
        "null is absent"
    );
}
