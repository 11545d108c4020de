//! What `make fuzz` runs: libFuzzer over the target that `$FUZZ_TARGET` names. One program for
//! all targets, so that it is linked once.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use sandgate_fuzz::{TARGETS, Target, target_of};

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

fn chosen() -> &'static Target {
    CHOSEN.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        target_of(&name).unwrap_or_else(|| {
            let names = TARGETS.map(|target| target.name).join(", ");
            panic!("$FUZZ_TARGET is {name:?}; the targets are {names}")
        })
    })
}

fuzz_target!(|data: &[u8]| {
    let target = chosen();
    if data.len() <= target.longest {
        (target.check)(data);
    }
});
