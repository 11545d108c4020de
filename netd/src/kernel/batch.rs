//! Many entries of a map in one call of the kernel's (`BPF_MAP_LOOKUP_BATCH`, `BPF_MAP_UPDATE_BATCH`,
//! `BPF_MAP_DELETE_BATCH` of bpf(2), since 5.6), which aya does not have. Knows nothing of what they mean.

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
const LOOKUP: libc::c_long = 24;
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

/// Entries of one call of [`each`]: more than any bucket of a hash map holds, as the kernel gives whole buckets.
const CHUNK: usize = 4096;

/// Where in a hash map [`some`] goes on, which the kernel says and reads. None: at its beginning.
pub(super) type Place = Option<u32>;

/// Shows every entry of a hash map. One that is added or removed meanwhile may be shown or not.
pub(super) fn each<K: Pod + Default, V: Pod + Default>(
    map: &MapData,
    seen: impl FnMut(&K, &V),
) -> Result<(), Stopped> {
    some(map, &mut None, usize::MAX, seen)
}

/// The same from a place on, until `most` entries were shown, or a chunk more; the place is then where to go on.
pub(super) fn some<K: Pod + Default, V: Pod + Default>(
    map: &MapData,
    place: &mut Place,
    most: usize,
    mut seen: impl FnMut(&K, &V),
) -> Result<(), Stopped> {
    let mut keys = vec![K::default(); CHUNK];
    let mut values = vec![V::default(); CHUNK];
    let refused = |source| Stopped { done: 0, source };
    let mut shown = 0;
    while shown < most {
        let (from, mut to) = (place.unwrap_or(0), 0_u32);
        let mut attributes = Attributes {
            in_batch: place.map_or(0, |_| (&raw const from).addr() as u64),
            out_batch: (&raw mut to).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: u32::try_from(CHUNK).map_err(|error| refused(io::Error::other(error)))?,
            map_fd: u32::try_from(map.fd().as_fd().as_raw_fd())
                .map_err(|error| refused(io::Error::other(error)))?,
            ..Attributes::default()
        };
        #[expect(unsafe_code, reason = "a system call")]
        // SAFETY: the kernel writes at most `count` keys and values, whose sizes are the map's (netd's pins are adopted
        // only if they have the sizes of these types), and reads and writes four bytes of place. All outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                LOOKUP,
                &raw mut attributes,
                size_of::<Attributes>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        // That there is no more is an error too, and comes with the last entries.
        let last = error
            .as_ref()
            .is_some_and(|error| error.kind() == io::ErrorKind::NotFound);
        if let Some(source) = error
            && !last
        {
            return Err(refused(source));
        }
        let count = usize::try_from(attributes.count).unwrap_or(0);
        shown += count;
        keys.iter()
            .zip(&values)
            .take(count)
            .for_each(|(key, value)| seen(key, value));
        *place = (!last).then_some(to);
        if last {
            break;
        }
    }
    Ok(())
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
