//! Two sockets joined in the kernel by a map of sockets: what one receives, the other one sends (bpf(2), sockmap). By
//! hand, because nothing but a benchmark uses it: the program is of six instructions.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

const MAP_CREATE: i64 = 0;
const MAP_UPDATE: i64 = 2;
const PROG_LOAD: i64 = 5;
const PROG_ATTACH: i64 = 8;
const SOCKMAP: u32 = 15;
const SK_SKB: u32 = 14;
const STREAM_VERDICT: u32 = 5;
const REDIRECT_MAP: u32 = 52;

/// Attributes of a call: longer ones than the kernel knows must be zero, and are.
struct Attributes([u8; 128]);

impl Attributes {
    fn words(words: &[(usize, u32)]) -> Self {
        let mut bytes = [0; 128];
        for (at, word) in words {
            bytes[*at..*at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        Self(bytes)
    }

    fn address<T>(mut self, at: usize, of: &T) -> Self {
        let address = std::ptr::from_ref(of).addr() as u64;
        self.0[at..at + 8].copy_from_slice(&address.to_ne_bytes());
        self
    }

    fn call(&self, call: i64) -> io::Result<i64> {
        // SAFETY: the attributes are laid out as the call wants them, and the addresses in them are of values that
        // outlive it.
        #[expect(unsafe_code, reason = "bpf(2) has no safe form")]
        let answer = unsafe { libc::syscall(libc::SYS_bpf, call, self.0.as_ptr(), self.0.len()) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(answer)
        }
    }

    fn descriptor(&self, call: i64) -> Result<OwnedFd> {
        let number = i32::try_from(self.call(call)?)?;
        // SAFETY: the kernel has just given it to us.
        #[expect(unsafe_code, reason = "bpf(2) has no safe form")]
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

/// The sockets are joined as long as this lives.
pub(super) struct Joined {
    _maps: [OwnedFd; 2],
    _programs: [OwnedFd; 2],
}

/// Joins two connected sockets.
pub(super) fn join(one: i32, other: i32) -> Result<Joined> {
    let maps = [map()?, map()?];
    let programs = [program(&maps[1])?, program(&maps[0])?];
    for (map, program) in maps.iter().zip(&programs) {
        let (map, program) = (number(map)?, number(program)?);
        Attributes::words(&[(0, map), (4, program), (8, STREAM_VERDICT)])
            .call(PROG_ATTACH)
            .context("attaching")?;
    }
    for (map, socket) in maps.iter().zip([one, other]) {
        let (key, value) = (0_u32, u32::try_from(socket)?);
        Attributes::words(&[(0, number(map)?)])
            .address(8, &key)
            .address(16, &value)
            .call(MAP_UPDATE)
            .context("a socket into its map")?;
    }
    Ok(Joined {
        _maps: maps,
        _programs: programs,
    })
}

fn number(descriptor: &OwnedFd) -> Result<u32> {
    Ok(u32::try_from(descriptor.as_raw_fd())?)
}

/// A map for one socket.
fn map() -> Result<OwnedFd> {
    Attributes::words(&[(0, SOCKMAP), (4, 4), (8, 4), (12, 1)])
        .descriptor(MAP_CREATE)
        .context("a map of sockets")
}

/// Sends what came on by the socket in the map.
fn program(map: &OwnedFd) -> Result<OwnedFd> {
    let instruction = |code: u8, registers: u8, immediate: u32| {
        let mut bytes = [code, registers, 0, 0, 0, 0, 0, 0];
        bytes[4..].copy_from_slice(&immediate.to_le_bytes());
        bytes
    };
    let code: [[u8; 8]; 6] = [
        // r2 = the map, in two halves of which the second is zero
        instruction(0x18, 0x12, number(map)?),
        instruction(0, 0, 0),
        // r3 = its key, r4 = no flags
        instruction(0xb7, 3, 0),
        instruction(0xb7, 4, 0),
        instruction(0x85, 0, REDIRECT_MAP),
        instruction(0x95, 0, 0),
    ];
    let license = *b"GPL\0";
    Attributes::words(&[(0, SK_SKB), (4, 6)])
        .address(8, &code)
        .address(16, &license)
        .descriptor(PROG_LOAD)
        .context("the program of a map of sockets")
}
