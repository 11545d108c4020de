//! Many entries of a map in one call of the kernel's (`BPF_MAP_UPDATE_BATCH`, `BPF_MAP_DELETE_BATCH` of bpf(2), since
//! 5.6), which aya does not have. Knows nothing of what they mean.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Pod,
    maps::{MapData, MapError},
    sys::SyscallError,
};

/// Commands of `enum bpf_cmd` (linux/bpf.h).
const UPDATE: libc::c_long = 26;
const DELETE: libc::c_long = 27;

/// The part of `union bpf_attr` that the batch commands read.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A batch that the kernel did not do in whole.
#[derive(Debug)]
pub(super) struct Stopped {
    /// So many, from the first, are done.
    pub(super) done: usize,
    pub(super) source: io::Error,
}

impl From<Stopped> for MapError {
    fn from(stopped: Stopped) -> Self {
        Self::SyscallError(SyscallError {
            call: "bpf_map_batch",
            io_error: stopped.source,
        })
    }
}

/// Writes all entries, replacing those that are there.
pub(super) fn insert<K: Pod, V: Pod>(map: &MapData, keys: &[K], values: &[V]) -> Result<(), Stopped> {
    assert_eq!(keys.len(), values.len(), "a value for each key");
    call(map, UPDATE, keys, values.as_ptr().addr() as u64)
}

/// Removes all keys; one that is not there is fine.
pub(super) fn remove<K: Pod>(map: &MapData, mut keys: &[K]) -> Result<(), Stopped> {
    while !keys.is_empty() {
        match call(map, DELETE, keys, 0) {
            Ok(()) => break,
            // It stops at one that is missing.
            Err(stopped) if stopped.source.kind() == io::ErrorKind::NotFound => {
                keys = keys.get(stopped.done + 1..).unwrap_or_default();
            }
            Err(stopped) => return Err(stopped),
        }
    }
    Ok(())
}

fn call<K: Pod>(map: &MapData, command: libc::c_long, keys: &[K], values: u64) -> Result<(), Stopped> {
    let refused = |source| Stopped { done: 0, source };
    if keys.is_empty() {
        return Ok(());
    }
    let mut attributes = Attributes {
        keys: keys.as_ptr().addr() as u64,
        values,
        count: u32::try_from(keys.len()).map_err(|error| refused(io::Error::other(error)))?,
        map_fd: u32::try_from(map.fd().as_fd().as_raw_fd())
            .map_err(|error| refused(io::Error::other(error)))?,
        ..Attributes::default()
    };
    #[expect(unsafe_code, reason = "a system call")]
    // SAFETY: the kernel reads `count` keys and, for an update, as many values, whose sizes aya checked against the
    // map's when it was opened; both outlive the call. It writes nothing but `count`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw mut attributes,
            size_of::<Attributes>(),
        )
    };
    if result >= 0 {
        return Ok(());
    }
    Err(Stopped {
        done: usize::try_from(attributes.count).unwrap_or(0).min(keys.len()),
        source: io::Error::last_os_error(),
    })
}
