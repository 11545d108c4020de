//! Every input that is kept keeps every law: what fuzzing learnt, and what it once found.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use sandgate_fuzz::TARGETS;

/// Bytes that the corpora of one target may take: they are read by people, and carried by everybody.
const CORPUS_MAX: u64 = 128 * 1024;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora")
}

fn inputs(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let input = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, input)
    };
    paths.into_iter().map(read).collect()
}

fn replay(name: &str) {
    let target = sandgate_fuzz::target_of(name).unwrap_or_else(|| panic!("{name} is no target"));
    let inputs = inputs(&corpora().join(name));
    assert!(
        inputs.len() >= 10,
        "only {} inputs are kept for {name}",
        inputs.len()
    );
    let size: u64 = inputs.iter().map(|(_, input)| input.len() as u64).sum();
    assert!(
        size <= CORPUS_MAX,
        "{name} has {size} bytes of inputs; `make fuzz-merge` keeps fewer"
    );
    for (path, input) in inputs {
        let checked = catch_unwind(AssertUnwindSafe(|| (target.check)(&input)));
        assert!(checked.is_ok(), "{} breaks a law (see above)", path.display());
        // Half of it is what arrives when something is cut off.
        (target.check)(&input[..input.len() / 2]);
    }
}

#[test]
fn every_target_keeps_inputs_and_every_folder_has_a_target() {
    let mut folders: Vec<String> = fs::read_dir(corpora())
        .expect("the corpora")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    folders.sort();
    let mut names = TARGETS.map(|target| target.name.to_owned());
    names.sort();
    assert_eq!(folders, names);
}

macro_rules! replayed {
    ($($name:ident)+) => {
        $(
            #[test]
            fn $name() {
                replay(stringify!($name));
            }
        )+

        #[test]
        fn none_is_left_out() {
            let names = [$(stringify!($name)),+];
            assert_eq!(names, TARGETS.map(|target| target.name));
        }
    };
}

replayed! { hello head requests chunks dns found host path policy packet frames masked }
