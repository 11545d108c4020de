//! What the kernel holds of BPF for one instance: pins, maps with every key in them, programs and links, asked by
//! bpf(2) itself, so that nothing is forgotten because the programs forgot it.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result, bail};

/// Commands of `enum bpf_cmd` (linux/bpf.h).
#[derive(Clone, Copy)]
#[repr(i64)]
enum Call {
    NextKey = 4,
    LoadProgram = 5,
    Pin = 6,
    ObjectGet = 7,
    NextProgram = 11,
    OpenProgram = 13,
    OpenMap = 14,
    Information = 15,
    OpenLink = 30,
    NextLink = 31,
}

/// `enum bpf_map_type`: those that have all their entries from the beginning, or none.
const WITHOUT_KEYS: [u32; 3] = [
    2,  /* array */
    6,  /* array per CPU */
    27, /* ring buffer */
];
/// The most keys of a map that are listed; more would be a leak that needs no list.
const KEYS_MAX: usize = 100_000;
/// Bytes that any of the kernel's descriptions needs.
const DESCRIPTION: usize = 256;

/// Everything of one instance.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Objects {
    /// `maps/ENDPOINTS`, `links/5-from_sandbox`, each with the id of what is pinned there.
    pub pins: BTreeSet<String>,
    /// Maps with their ids: pinned, or used by a program.
    pub maps: BTreeSet<String>,
    /// Every key in them, in hexadecimal.
    pub keys: BTreeSet<String>,
    /// Programs with their ids.
    pub programs: BTreeSet<String>,
    /// Links with the program and the interface that each joins.
    pub links: BTreeSet<String>,
}

/// Looks at everything that hangs together with the pins below `bpffs`.
///
/// # Errors
/// Without privilege, or when the pins cannot be read.
pub fn objects(bpffs: &Path) -> Result<Objects> {
    let mut found = Objects::default();
    let (mut map_ids, mut program_ids) = (BTreeSet::new(), BTreeSet::new());
    for folder in ["maps", "links"] {
        let Ok(entries) = fs::read_dir(bpffs.join(folder)) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let description = match pinned(&entry.path()) {
                Ok(object) => describe(&object)?,
                // A canary's or a sandbox's, which has just gone.
                Err(_) if !entry.path().exists() => continue,
                Err(error) => return Err(error),
            };
            let id = word(&description, 4);
            found.pins.insert(format!("{folder}/{name} id {id}"));
            if folder == "maps" {
                map_ids.insert(id);
            } else {
                program_ids.insert(word(&description, 8));
            }
        }
    }
    for id in ids(Call::NextProgram)? {
        let Some((name, maps)) = program(id)? else {
            continue;
        };
        if program_ids.contains(&id) || maps.iter().any(|map| map_ids.contains(map)) {
            program_ids.insert(id);
            // A program that an instance runs with maps of its own would be a second wall.
            map_ids.extend(&maps);
            found.programs.insert(format!("{name} id {id}"));
        }
    }
    for id in map_ids {
        let Some(map) = open(Call::OpenMap, id)? else {
            continue;
        };
        let description = describe(&map)?;
        let name = text(&description, 24);
        found.maps.insert(format!("{name} id {id}"));
        if !WITHOUT_KEYS.contains(&word(&description, 0)) {
            let size = usize::try_from(word(&description, 8))?;
            for key in keys(&map, size).with_context(|| format!("the keys of {name}"))? {
                let shown: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
                found.keys.insert(format!("{name} {shown}"));
            }
        }
    }
    for id in ids(Call::NextLink)? {
        let Some(link) = open(Call::OpenLink, id)? else {
            continue;
        };
        let description = describe(&link)?;
        let (program, interface) = (word(&description, 8), word(&description, 16));
        if program_ids.contains(&program) {
            found
                .links
                .insert(format!("id {id} program {program} interface {interface}"));
        }
    }
    Ok(found)
}

impl Objects {
    /// How many keys a map holds.
    pub fn keys_of(&self, map: &str) -> usize {
        let prefix = format!("{map} ");
        self.keys.iter().filter(|key| key.starts_with(&prefix)).count()
    }
}

/// How many bytes of the pinned ring buffer hold what nobody has read, and how many there are. The kernel shows the
/// positions of reader and writer in the first two pages of the map.
///
/// # Errors
/// When it is not there, or no ring buffer.
pub fn ring(bpffs: &Path, name: &str) -> Result<(u64, u64)> {
    let map = pinned(&bpffs.join("maps").join(name))?;
    let size = word(&describe(&map)?, 16);
    let page =
        usize::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("a page size")?)?;
    let position = |at: usize| -> Result<u64> {
        let offset = libc::off_t::try_from(at)?;
        // SAFETY: a new mapping of one page, read once within it, and taken away.
        #[expect(unsafe_code, reason = "the positions are only to be had from shared memory")]
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                page,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                offset,
            );
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error()).context("mapping a ring buffer");
            }
            let value = start.cast::<u64>().read_volatile();
            libc::munmap(start, page);
            Ok(value)
        }
    };
    let (read, written) = (position(0)?, position(page)?);
    Ok((written.saturating_sub(read), u64::from(size)))
}

/// Name and maps of a program; `None` when it is gone.
fn program(id: u32) -> Result<Option<(String, Vec<u32>)>> {
    let Some(program) = open(Call::OpenProgram, id)? else {
        return Ok(None);
    };
    let mut maps = [0_u32; 64];
    let mut description = [0; DESCRIPTION];
    description[52..56].copy_from_slice(&u32::try_from(maps.len())?.to_ne_bytes());
    description[56..64].copy_from_slice(&(maps.as_mut_ptr() as u64).to_ne_bytes());
    let description = describe_into(&program, description)?;
    let count = usize::try_from(word(&description, 52))?;
    if count > maps.len() {
        bail!("a program with {count} maps");
    }
    Ok(Some((text(&description, 64), maps[..count].to_vec())))
}

/// Loads a classifier that lets every packet pass and asks no other, and pins it there.
///
/// # Errors
/// Without privilege, or where no BPF file system is.
pub fn pin_open_door(path: &Path) -> Result<()> {
    // `BPF_PROG_TYPE_SCHED_CLS`; `r0 = TC_ACT_OK` and `exit` of linux/bpf.h.
    let (kind, instructions) = (3, [0xb7_u64, 0x95].map(u64::to_le));
    let mut attributes = Attributes::default();
    attributes.set_word(0, kind);
    attributes.set_word(4, u32::try_from(instructions.len())?);
    attributes.set_long(8, instructions.as_ptr() as u64);
    attributes.set_long(16, c"GPL".as_ptr() as u64);
    let program = descriptor(attributes.call(Call::LoadProgram).context("an open door")?)?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes::default();
    attributes.set_long(0, name.as_ptr() as u64);
    attributes.set_word(8, u32::try_from(program.as_raw_fd())?);
    attributes.call(Call::Pin).context("an open door")?;
    Ok(())
}

/// Ids of everything of a kind on this machine.
fn ids(next: Call) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    let mut last = 0;
    loop {
        let mut attributes = Attributes::default();
        attributes.set_word(0, last);
        match attributes.call(next) {
            Ok(_) => last = attributes.word(4),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error).context("listing BPF objects"),
        }
        found.push(last);
    }
}

fn open(call: Call, id: u32) -> Result<Option<OwnedFd>> {
    let mut attributes = Attributes::default();
    attributes.set_word(0, id);
    match attributes.call(call) {
        Ok(number) => Ok(Some(descriptor(number)?)),
        // Others on this machine come and go: one is gone, or (a link, EAGAIN) not quite there yet.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::WouldBlock) => Ok(None),
        Err(error) => Err(error).context("opening a BPF object"),
    }
}

fn pinned(path: &Path) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes::default();
    attributes.set_long(0, name.as_ptr() as u64);
    let number = attributes
        .call(Call::ObjectGet)
        .with_context(|| path.display().to_string())?;
    descriptor(number)
}

fn describe(object: &OwnedFd) -> Result<[u8; DESCRIPTION]> {
    describe_into(object, [0; DESCRIPTION])
}

fn describe_into(object: &OwnedFd, mut description: [u8; DESCRIPTION]) -> Result<[u8; DESCRIPTION]> {
    let mut attributes = Attributes::default();
    attributes.set_word(0, u32::try_from(object.as_raw_fd())?);
    attributes.set_word(4, u32::try_from(DESCRIPTION)?);
    attributes.set_long(8, description.as_mut_ptr() as u64);
    attributes
        .call(Call::Information)
        .context("describing a BPF object")?;
    Ok(description)
}

fn keys(map: &OwnedFd, size: usize) -> Result<Vec<Vec<u8>>> {
    let mut found: Vec<Vec<u8>> = Vec::new();
    loop {
        let mut next = vec![0; size];
        let mut attributes = Attributes::default();
        attributes.set_word(0, u32::try_from(map.as_raw_fd())?);
        attributes.set_long(8, found.last().map_or(0, |key| key.as_ptr() as u64));
        attributes.set_long(16, next.as_mut_ptr() as u64);
        match attributes.call(Call::NextKey) {
            Ok(_) => found.push(next),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error.into()),
        }
        if found.len() > KEYS_MAX {
            bail!("more than {KEYS_MAX} keys");
        }
    }
}

/// `union bpf_attr`.
#[derive(Default)]
#[repr(C, align(8))]
struct Attributes([u8; 32]);

impl Attributes {
    fn set_word(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn set_long(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }

    fn word(&self, at: usize) -> u32 {
        word(&self.0, at)
    }

    fn call(&mut self, call: Call) -> io::Result<i64> {
        // SAFETY: the attributes are laid out as the call wants them, and every address in them is of a buffer that
        // its caller keeps alive over the call and whose size it has given.
        #[expect(unsafe_code, reason = "bpf(2) has no safe form")]
        let answer = unsafe { libc::syscall(libc::SYS_bpf, call as i64, self.0.as_mut_ptr(), self.0.len()) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(answer)
        }
    }
}

fn descriptor(number: i64) -> Result<OwnedFd> {
    let number = i32::try_from(number)?;
    // SAFETY: the kernel has just given it to us.
    #[expect(unsafe_code, reason = "bpf(2) has no safe form")]
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn text(bytes: &[u8], at: usize) -> String {
    let name = &bytes[at..at + 16];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}
