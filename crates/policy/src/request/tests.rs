use super::*;

fn pattern(methods: &[&str], paths: &[&str], upgrade: bool) -> Result<RequestPattern, PolicyError> {
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    RequestPattern::new(&texts(methods), &texts(paths), upgrade)
}

fn mismatch(pattern: &RequestPattern, method: &str, path: &str, upgrade: bool) -> Option<Reason> {
    let path = NormalPath::parse(path).unwrap().0;
    let request = RequestHead {
        method,
        path: &path,
        upgrade,
    };
    assert_eq!(pattern.matches(&request), pattern.mismatch(&request).is_none());
    pattern.mismatch(&request)
}

#[test]
fn empty_lists_mean_everything_but_upgrades() {
    let all = pattern(&[], &[], false).unwrap();
    assert_eq!(mismatch(&all, "DELETE", "/x", false), None);
    assert_eq!(mismatch(&all, "GET", "/x", true), Some(Reason::MethodDenied));
    let all = pattern(&[], &[], true).unwrap();
    assert_eq!(mismatch(&all, "GET", "/x", true), None);
    assert_eq!(mismatch(&all, "GET", "/x", false), None);
}

#[test]
fn methods_and_paths_must_both_be_listed() {
    let some = pattern(&["GET", "HEAD"], &["/repos/**", "/user"], false).unwrap();
    assert_eq!(mismatch(&some, "GET", "/repos/a", false), None);
    assert_eq!(mismatch(&some, "HEAD", "/user", false), None);
    assert_eq!(
        mismatch(&some, "POST", "/user", false),
        Some(Reason::MethodDenied)
    );
    assert_eq!(
        mismatch(&some, "get", "/user", false),
        Some(Reason::MethodDenied),
        "methods are case-sensitive"
    );
    assert_eq!(mismatch(&some, "GET", "/users", false), Some(Reason::PathDenied));
}

#[test]
fn lists_are_read_strictly() {
    for (methods, paths, field) in [
        (&["GET", "get"][..], &[][..], "methods[1]"),
        (&[""], &[], "methods[0]"),
        (&["GET POST"], &[], "methods[0]"),
        (&["CONNECT"], &[], "methods[0]"),
        (&[], &["/a", "b"], "paths[1]"),
        (&[], &["/a*"], "paths[0]"),
        (&["A"; 33], &[], "methods"),
        (&[], &["/"; 101], "paths"),
    ] {
        assert_eq!(pattern(methods, paths, false).unwrap_err().field, field);
    }
    let read = pattern(&["M-SEARCH"], &["/%61/*"], true).unwrap();
    assert_eq!(read.methods(), ["M-SEARCH"]);
    assert_eq!(read.paths()[0].to_string(), "/a/*");
    assert!(read.upgrade());
}
