//! TCX links (Linux 6.6): an interface's own list of programs. A link is made once, pinned, and lives until it is
//! unpinned or its interface goes.

use std::path::Path;

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, LinkError, PinnedLink},
    tc::TcAttachOptions,
};

use super::{super::DatapathError, is_dead};
use crate::kernel::error::on_program;

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
