//! TCX links (Linux 6.6): an interface's own list of programs. A link is made once, pinned, and lives until it is
//! unpinned or its interface goes.

use std::{
    ffi::CString,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, LinkError, PinnedLink},
    tc::TcAttachOptions,
};

use super::{super::DatapathError, is_dead};
use crate::kernel::error::on_program;

/// Commands of `enum bpf_cmd` (linux/bpf.h).
const OBJECT_GET: libc::c_long = 7;
const LINK_DETACH: libc::c_long = 34;

/// Whether the kernel has such lists.
pub(super) fn is_there() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// Puts the program into a pinned link; false when there is none, or its interface is gone.
pub(super) fn replace(
    program: &mut SchedClassifier,
    path: &Path,
    name: &'static str,
) -> Result<bool, DatapathError> {
    if !path.exists() {
        return Ok(false);
    }
    let Ok(pinned) = PinnedLink::from_pin(path) else {
        return Ok(false);
    };
    let link = FdLink::from(pinned).try_into().map_err(on_link(name))?;
    match program.attach_to_link(link) {
        // Taken back and closed here: the pin keeps it.
        Ok(id) => program
            .take_link(id)
            .map(drop)
            .map(|()| true)
            .map_err(on_program("adopt", name)),
        Err(error) if is_dead(&error) => Ok(false),
        Err(error) => Err(on_program("replace", name)(error)),
    }
}

/// Makes a link before all others and pins it.
pub(super) fn create(
    program: &mut SchedClassifier,
    path: &Path,
    name: &'static str,
    side: TcAttachType,
    interface: &str,
) -> Result<(), DatapathError> {
    let link = program
        .attach_with_options(interface, side, TcAttachOptions::TcxOrder(LinkOrder::first()))
        .and_then(|id| program.take_link(id))
        .map_err(on_program("attach", name))?;
    let link = FdLink::try_from(link).map_err(on_link(name))?;
    link.pin(path).map(drop).map_err(|source| DatapathError::Pin {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// Takes a pinned link off its interface at once: without its pin alone it would go a moment later, and until then come
/// before any filter. That there is none is fine, and so is one whose interface is gone.
pub(super) fn detach(path: &Path) {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return;
    };
    // The parts of `union bpf_attr` that the two commands read: a path, a descriptor and flags; a descriptor.
    let named = [path.as_ptr().addr() as u64, 0];
    let Some(link) = bpf(OBJECT_GET, &named).and_then(|number| RawFd::try_from(number).ok()) else {
        return;
    };
    #[expect(unsafe_code, reason = "a descriptor that only the kernel knows the owner of")]
    // SAFETY: the kernel has just made it, for nobody else.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    let _gone = bpf(LINK_DETACH, &[link.as_raw_fd(), 0]);
}

/// A command of bpf(2) that aya does not have; its answer, if there is one.
fn bpf<T>(command: libc::c_long, attributes: &[T; 2]) -> Option<libc::c_long> {
    #[expect(unsafe_code, reason = "a system call")]
    // SAFETY: the kernel reads as many bytes as are said, of numbers of which one is the address of a path that outlives
    // the call, and writes nothing.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(attributes),
        )
    };
    (answer >= 0).then_some(answer)
}

/// The id of what stands first.
pub(super) fn first(
    side: TcAttachType,
    interface: &str,
    name: &'static str,
) -> Result<Option<u32>, DatapathError> {
    let (_, chain) = SchedClassifier::query_tcx(interface, side).map_err(on_program("query", name))?;
    Ok(chain.first().map(aya::programs::ProgramInfo::id))
}

fn on_link(program: &'static str) -> impl FnOnce(LinkError) -> DatapathError {
    move |source| DatapathError::Link {
        program,
        source: Box::new(source),
    }
}
