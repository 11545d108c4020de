//! Loop devices, by the kernel's own calls: attaching a file, and finding what is attached.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsRawFd as _, RawFd},
    path::{Path, PathBuf},
};

/// `LOOP_CTL_GET_FREE` of `linux/loop.h`.
const GET_FREE: libc::Ioctl = 0x4c82;
/// `LOOP_CONFIGURE` of `linux/loop.h` (kernel 5.8).
const CONFIGURE: libc::Ioctl = 0x4c0a;
/// `LOOP_CLR_FD` of `linux/loop.h`.
const CLEAR: libc::Ioctl = 0x4c01;
/// `LO_FLAGS_AUTOCLEAR`: detaches when the last user is gone, also after a crash.
const AUTOCLEAR: u32 = 4;
/// Others take free devices at the same time; so often is tried again.
const ATTEMPTS: usize = 256;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    descriptor: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// An attached device. It detaches by itself when this and every mount of it are gone.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Attaches a file to a free device.
    pub(super) fn attach(backing: &File) -> io::Result<Self> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        let descriptor = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
        for _ in 0..ATTEMPTS {
            let number = free_number(control.as_raw_fd())?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(device) => device,
                Err(error) if busy(&error) || error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let config = LoopConfig {
                descriptor,
                block_size: 4096,
                info: LoopInfo {
                    device: 0,
                    inode: 0,
                    rdevice: 0,
                    offset: 0,
                    size_limit: 0,
                    number: 0,
                    encrypt_type: 0,
                    encrypt_key_size: 0,
                    flags: AUTOCLEAR,
                    file_name: [0; 64],
                    crypt_name: [0; 64],
                    encrypt_key: [0; 32],
                    init: [0; 2],
                },
                reserved: [0; 8],
            };
            match configure(device.as_raw_fd(), &config) {
                Ok(()) => return Ok(Self { path, _open: device }),
                Err(error) if busy(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("no free loop device"))
    }

    /// The device's node.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Every attached device whose file lies below `folder`: the node and the file.
pub(super) fn attached_below(folder: &Path) -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(b"loop") {
            continue;
        }
        // Absent on a free device.
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        let backing = backing.trim_end_matches('\n');
        let backing = Path::new(backing.strip_suffix(" (deleted)").unwrap_or(backing));
        if backing.starts_with(folder) {
            found.push((Path::new("/dev").join(name), backing.to_owned()));
        }
    }
    Ok(found)
}

/// Asks the kernel to detach a device as soon as nobody uses it.
pub(super) fn detach(device: &Path) -> io::Result<()> {
    let device = File::open(device)?;
    // SAFETY: LOOP_CLR_FD takes no argument; the descriptor is open.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), CLEAR) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn busy(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::ENXIO | libc::EAGAIN)
    )
}

fn free_number(control: RawFd) -> io::Result<i32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument; the descriptor is open.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let number = unsafe { libc::ioctl(control, GET_FREE) };
    if number < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(number)
    }
}

fn configure(device: RawFd, config: &LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which LoopConfig mirrors field by field; the
    // reference outlives the call, and both descriptors are open.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let answer = unsafe { libc::ioctl(device, CONFIGURE, std::ptr::from_ref(config)) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_size() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
