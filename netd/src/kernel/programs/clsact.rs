//! Filters of the `clsact` queueing discipline, for kernels without TCX: the first priority, and there the first in the
//! list. A filter lives with its interface, whoever made it. Its handle is kept in a symbolic link where a TCX link
//! would be pinned; the filter itself holds the program.

use std::{fs, io, mem, os::unix::fs::symlink, path::Path};

use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    packet_core::Nla as _,
    packet_route::tc::{TcAttribute, TcMessage},
};

use super::{
    super::{
        DatapathError,
        error::{on_file, on_program},
        pins,
    },
    on_hook,
};

/// Nothing can come before it.
const PRIORITY: u16 = 1;
/// `TCA_BPF_ID` of linux/pkt_cls.h.
const PROGRAM_ID: u16 = 11;
/// How the note of a handle begins.
const NOTE: &str = "clsact:";

/// The handle of the filter that is noted there.
pub(super) fn handle_at(path: &Path) -> Option<u16> {
    let note = fs::read_link(path).ok()?;
    note.to_str()?.strip_prefix(NOTE)?.parse().ok()
}

/// Gives an interface the discipline, if it has none.
pub(super) fn prepare(interface: &str) -> io::Result<()> {
    let added = tc::qdisc_add_clsact(interface).map_err(io::Error::other);
    // One that is there is not made again; whether it is, the kernel says when a filter is added.
    added.or_else(|error| {
        let present = crate::command::run(&["tc", "qdisc", "show", "dev", interface], "");
        let has = present.is_ok_and(|text| text.contains("clsact"));
        if has { Ok(()) } else { Err(error) }
    })
}

/// Puts the program into the filter, in one step; false when there is none.
pub(super) fn replace(
    program: &mut SchedClassifier,
    side: TcAttachType,
    interface: &str,
    handle: u16,
) -> bool {
    let Ok(link) = link(side, interface, handle) else {
        return false;
    };
    match program.attach_to_link(link).and_then(|id| program.take_link(id)) {
        Ok(link) => {
            // Closing it would remove the filter.
            mem::forget(link);
            true
        }
        Err(error) => {
            tracing::debug!(%error, interface, "no filter to put the program into");
            false
        }
    }
}

/// Makes the filter before all others, and notes its handle.
pub(super) fn create(
    program: &mut SchedClassifier,
    path: &Path,
    name: &'static str,
    side: TcAttachType,
    interface: &str,
) -> Result<(), DatapathError> {
    prepare(interface).map_err(on_hook("add a clsact queueing discipline"))?;
    // One of a netd that was killed before it could note it.
    for handle in [1, 2] {
        remove(side, interface, handle);
    }
    add(program, name, side, interface, 1)?;
    note(path, 1)
}

/// Adds a second filter, which comes first because it is the younger, and removes the one before.
pub(super) fn bring_forward(
    program: &mut SchedClassifier,
    path: &Path,
    name: &'static str,
    side: TcAttachType,
    interface: &str,
) -> Result<(), DatapathError> {
    let old = handle_at(path);
    let new = if old == Some(1) { 2 } else { 1 };
    prepare(interface).map_err(on_hook("add a clsact queueing discipline"))?;
    remove(side, interface, new);
    add(program, name, side, interface, new)?;
    note(path, new)?;
    if let Some(old) = old {
        remove(side, interface, old);
    }
    Ok(())
}

/// Removes the filter. That it is gone is fine.
pub(super) fn remove(side: TcAttachType, interface: &str, handle: u16) {
    // Closing it removes the filter.
    drop(link(side, interface, handle));
}

/// The id of the program that runs first, if its filter is the noted one.
pub(super) fn first(path: &Path, side: TcAttachType, interface: &str) -> Result<Option<u32>, DatapathError> {
    // On a kernel that has both, TCX comes before.
    if SchedClassifier::query_tcx(interface, side).is_ok_and(|(_, chain)| !chain.is_empty()) {
        return Ok(None);
    }
    let filters = filters(side, interface).map_err(on_hook("list the filters of an interface"))?;
    // Each priority is listed once without a handle.
    let first = filters.iter().find(|filter| u32::from(filter.header.handle) != 0);
    let noted = handle_at(path).map(u32::from);
    Ok(first
        .filter(|filter| {
            Some(u32::from(filter.header.handle)) == noted && filter.header.info >> 16 == u32::from(PRIORITY)
        })
        .and_then(program_of))
}

/// The id of a filter's program.
fn program_of(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let option = options.iter().find(|option| option.kind() == PROGRAM_ID)?;
    let mut bytes = vec![0; option.value_len()];
    option.emit_value(&mut bytes);
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn add(
    program: &mut SchedClassifier,
    name: &'static str,
    side: TcAttachType,
    interface: &str,
    handle: u16,
) -> Result<(), DatapathError> {
    let options = NlOptions {
        priority: PRIORITY,
        handle: TcHandle::new(0, handle),
        classid: None,
    };
    let link = program
        .attach_with_options(interface, side, TcAttachOptions::Netlink(options))
        .and_then(|id| program.take_link(id))
        .map_err(on_program("attach", name))?;
    // Closing it would remove the filter.
    mem::forget(link);
    Ok(())
}

fn note(path: &Path, handle: u16) -> Result<(), DatapathError> {
    pins::remove(path)?;
    symlink(format!("{NOTE}{handle}"), path).map_err(on_file("note a handle at", path))
}

fn link(side: TcAttachType, interface: &str, handle: u16) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, side, PRIORITY, TcHandle::new(0, handle), None)
}

/// The filters of one side, in the order in which they run.
fn filters(side: TcAttachType, interface: &str) -> io::Result<Vec<TcMessage>> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    let index = i32::try_from(index).map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let asked = handle.traffic_filter(index).get();
        let asked = match side {
            TcAttachType::Ingress => asked.ingress(),
            TcAttachType::Egress => asked.egress(),
            TcAttachType::Custom(_) => return Ok(Vec::new()),
        };
        let listed = asked.execute().try_collect::<Vec<_>>();
        tokio::select! {
            listed = listed => listed.map_err(io::Error::other),
            () = connection => Err(io::ErrorKind::BrokenPipe.into()),
        }
    })
}
