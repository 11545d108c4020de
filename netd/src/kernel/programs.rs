//! The two programs and where they hang: on the router ends of sandbox veths, before all others.
//!
//! Two means: [`tcx`] links (Linux 6.6), which are pinned, and [`clsact`] filters on older kernels. With both, what
//! hangs there lives until it is taken away or its interface goes, and a newer netd replaces the program in it, so that
//! there is no moment without one.

mod clsact;
mod tcx;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TcAttachType},
};
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{
    Attach, DatapathError,
    error::{on_file, on_program},
    pins::{self, Pins},
};
use crate::{
    command,
    router::{RouterError, RouterNamespace, pass},
};

/// The object that build.rs made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netd-ebpf"));

/// Our programs and where they hang.
const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("from_sandbox", TcAttachType::Ingress),
    ("to_sandbox", TcAttachType::Egress),
];

/// The program at the router's end of the uplink.
const UPLINK: (&str, TcAttachType) = ("from_uplink", TcAttachType::Ingress);

/// The same, where a list is wanted.
const AT_UPLINK: [(&str, TcAttachType); 1] = [UPLINK];

/// How programs hang on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// Links in the interface's own list of programs.
    Tcx,
    /// Filters of the `clsact` queueing discipline.
    Clsact,
}

/// The loaded object.
pub(super) struct Programs {
    object: Ebpf,
    means: Means,
    /// Ids of copies that were put before intruders, besides those of the object.
    copies: BTreeSet<u32>,
    /// Interfaces that were set down because ours did not come first.
    down: BTreeSet<u32>,
}

/// An interface on which one of our programs was gone, or another one had come before it.
#[derive(Debug)]
pub struct Guarded {
    /// Index of the interface.
    pub ifindex: u32,
    /// It is the uplink's, and no endpoint's.
    pub uplink: bool,
    /// Why ours do not stand first again; an endpoint's interface was set down then, and the uplink is not used.
    pub outcome: Result<(), DatapathError>,
}

impl Means {
    /// What is wanted and what this kernel has, by asking it and not by its version. In the calling thread's network
    /// namespace, whose `lo` may have a clsact queueing discipline afterwards.
    ///
    /// # Errors
    /// Names what is missing.
    pub(super) fn here(wanted: Attach) -> Result<Self, DatapathError> {
        let has_tcx = wanted != Attach::Clsact && tcx::is_there();
        let filters = || clsact::prepare("lo").map(|()| Self::Clsact);
        match wanted {
            Attach::Auto | Attach::Tcx if has_tcx => Ok(Self::Tcx),
            Attach::Tcx => Err(DatapathError::Unsupported(
                "it has no TCX links (Linux 6.6, CONFIG_NET_XGRESS), and SANDGATE_ATTACH is `tcx`".to_owned(),
            )),
            Attach::Clsact => filters().map_err(|error| {
                DatapathError::Unsupported(format!(
                    "it has no clsact queueing discipline (CONFIG_NET_SCH_INGRESS), and SANDGATE_ATTACH is `clsact`: {error}"
                ))
            }),
            Attach::Auto => filters().map_err(|error| {
                DatapathError::Unsupported(format!(
                    "programs can be attached to interfaces neither by TCX links (Linux 6.6, CONFIG_NET_XGRESS) nor by \
                     filters of a clsact queueing discipline (CONFIG_NET_SCH_INGRESS): {error}"
                ))
            }),
        }
    }

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcx => "TCX links",
            Self::Clsact => "clsact filters",
        }
    }
}

impl Programs {
    /// Loads the object with the pinned maps, pinning those that are not, and verifies the programs.
    pub(super) fn load(pins: &Pins, means: Means) -> Result<Self, DatapathError> {
        let object = load(Some(pins))?;
        Ok(Self {
            object,
            means,
            copies: BTreeSet::new(),
            down: BTreeSet::new(),
        })
    }

    /// Loads the object and verifies the programs, with maps that nobody else sees.
    pub(super) fn try_load() -> Result<Ebpf, DatapathError> {
        load(None)
    }

    /// Puts our programs wherever an earlier netd's hang. What hung on interfaces that are gone is forgotten. Returns
    /// the interfaces that are attached completely.
    pub(super) fn adopt(&mut self, router: &RouterNamespace, pins: &Pins) -> Result<Vec<u32>, DatapathError> {
        router.run(|| {
            let mut live: Vec<(u32, usize)> = Vec::new();
            for (ifindex, name, path) in pins.links()? {
                let mut known = PROGRAMS.iter().chain([&UPLINK]);
                let ours = known.find(|(program, _)| *program == name);
                let alive = match ours {
                    Some((name, side)) => self.replace(&path, name, *side, ifindex)?,
                    None => false,
                };
                if !alive {
                    let side = ours.map(|(_, side)| *side);
                    take_down(&path, side, ifindex)?;
                } else if name == UPLINK.0 {
                    // Of no endpoint.
                } else if let Some((_, count)) = live.iter_mut().find(|(seen, _)| *seen == ifindex) {
                    *count += 1;
                } else {
                    live.push((ifindex, 1));
                }
            }
            Ok(live
                .into_iter()
                .filter(|(_, count)| *count == PROGRAMS.len())
                .map(|(ifindex, _)| ifindex)
                .collect())
        })?
    }

    /// Attaches both programs to an interface of the router namespace, before all others, or finds them there.
    pub(super) fn attach(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        interface: &str,
        ifindex: u32,
    ) -> Result<(), DatapathError> {
        self.attach_each(router, pins, (interface, ifindex), &PROGRAMS)
    }

    /// The same with the program of the uplink's end in the router namespace.
    pub(super) fn attach_uplink(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        ifindex: u32,
    ) -> Result<(), DatapathError> {
        self.attach_each(router, pins, (pass::INTERFACE, ifindex), &AT_UPLINK)
    }

    fn attach_each(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        (interface, ifindex): (&str, u32),
        programs: &[(&'static str, TcAttachType)],
    ) -> Result<(), DatapathError> {
        // Interfaces are looked up in the namespace of the calling thread.
        router.run(|| {
            let found = if_nametoindex(interface).ok();
            if found != Some(ifindex) {
                let name = interface.to_owned();
                return Err(DatapathError::Interface {
                    name,
                    announced: ifindex,
                    found,
                });
            }
            for (name, side) in programs.iter().copied() {
                let path = pins.link(ifindex, name);
                if !self.replace(&path, name, side, ifindex)? {
                    take_down(&path, Some(side), ifindex)?;
                    self.create(&path, name, side, interface)?;
                }
                self.stands_first(&path, name, side, interface)?;
            }
            Ok(())
        })?
    }

    /// Whether an interface lives on which one of our programs hangs.
    pub(super) fn hold(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        ifindex: u32,
    ) -> Result<bool, DatapathError> {
        let (name, side) = PROGRAMS[0];
        router.run(|| self.replace(&pins.link(ifindex, name), name, side, ifindex))?
    }

    /// Takes both programs off an interface.
    pub(super) fn detach(router: &RouterNamespace, pins: &Pins, ifindex: u32) -> Result<(), DatapathError> {
        let filtered = PROGRAMS
            .iter()
            .any(|(name, _)| clsact::handle_at(&pins.link(ifindex, name)).is_some());
        if !filtered {
            return PROGRAMS
                .iter()
                .try_for_each(|(name, _)| pins::remove(&pins.link(ifindex, name)));
        }
        router.run(|| {
            PROGRAMS
                .iter()
                .try_for_each(|(name, side)| take_down(&pins.link(ifindex, name), Some(*side), ifindex))
        })?
    }

    /// Looks whether our programs still come first on the interfaces of endpoints, and on that of the uplink in use.
    /// Where another one has come before, ours is put before it again; where that fails, an endpoint's interface is set
    /// down, so that nothing passes. The uplink is the caller's to take out of use.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub(super) fn guard(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        endpoints: &[u32],
        uplink: Option<u32>,
    ) -> Result<Vec<Guarded>, DatapathError> {
        let of_endpoints = endpoints.iter().map(|ifindex| (ifindex, &PROGRAMS[..], false));
        let of_uplink = uplink.iter().map(|ifindex| (ifindex, &AT_UPLINK[..], true));
        router.run(|| {
            let mut found = Vec::new();
            for (ifindex, programs, uplink) in of_endpoints.chain(of_uplink) {
                // One that went away takes its programs with it.
                let Some(interface) = name_of(*ifindex) else {
                    continue;
                };
                let mut moved = false;
                let outcome = programs.iter().try_for_each(|(name, side)| {
                    let path = pins.link(*ifindex, name);
                    if self.stands_first(&path, name, *side, &interface).is_ok() {
                        return Ok(());
                    }
                    moved = true;
                    self.bring_forward(pins, &path, name, *side, &interface)?;
                    self.stands_first(&path, name, *side, &interface)
                });
                if outcome.is_err() && name_of(*ifindex).is_none() {
                    continue;
                }
                let was_down = self.down.contains(ifindex);
                if uplink {
                    // Not used any more: `to_sandbox` admits nothing that came by it.
                } else if outcome.is_err() {
                    set_link(&interface, "down")?;
                    self.down.insert(*ifindex);
                } else if was_down {
                    set_link(&interface, "up")?;
                    self.down.remove(ifindex);
                }
                if moved || outcome.is_err() {
                    found.push(Guarded {
                        ifindex: *ifindex,
                        uplink,
                        outcome,
                    });
                }
            }
            Ok(found)
        })?
    }

    /// Puts our program where one of ours hangs; false when there is none, or its interface is gone.
    fn replace(
        &mut self,
        path: &Path,
        name: &'static str,
        side: TcAttachType,
        ifindex: u32,
    ) -> Result<bool, DatapathError> {
        let program = program(&mut self.object, name)?;
        match (self.means, clsact::handle_at(path)) {
            (Means::Clsact, Some(handle)) => {
                Ok(name_of(ifindex)
                    .is_some_and(|interface| clsact::replace(program, side, &interface, handle)))
            }
            (Means::Tcx, None) => tcx::replace(program, path, name),
            // Of another kernel, or of other means by order: made anew. Until then the router namespace lets nothing
            // through that no program has marked.
            (Means::Clsact, None) | (Means::Tcx, Some(_)) => Ok(false),
        }
    }

    fn create(
        &mut self,
        path: &Path,
        name: &'static str,
        side: TcAttachType,
        interface: &str,
    ) -> Result<(), DatapathError> {
        let program = program(&mut self.object, name)?;
        match self.means {
            Means::Tcx => tcx::create(program, path, name, side, interface),
            Means::Clsact => clsact::create(program, path, name, side, interface),
        }
    }

    fn stands_first(
        &mut self,
        path: &Path,
        name: &'static str,
        side: TcAttachType,
        interface: &str,
    ) -> Result<(), DatapathError> {
        let ours = program(&mut self.object, name)?
            .info()
            .map_err(on_program("look at", name))?;
        let first = match self.means {
            Means::Tcx => tcx::first(side, interface, name)?,
            Means::Clsact => clsact::first(path, side, interface)?,
        };
        if first.is_some_and(|first| first == ours.id() || self.copies.contains(&first)) {
            return Ok(());
        }
        Err(DatapathError::NotFirst {
            program: name,
            name: interface.to_owned(),
        })
    }

    /// Puts our program before all others again. A list takes a program only once, so this one is of a fresh copy of the
    /// object, and the old one goes when the new one stands.
    fn bring_forward(
        &mut self,
        pins: &Pins,
        path: &Path,
        name: &'static str,
        side: TcAttachType,
        interface: &str,
    ) -> Result<(), DatapathError> {
        let mut fresh = load(Some(pins))?;
        let program = program(&mut fresh, name)?;
        let copy = program.info().map_err(on_program("look at", name))?.id();
        self.copies.insert(copy);
        match self.means {
            Means::Tcx => {
                // Names in a BPF file system hold no dots.
                let new = PathBuf::from(format!("{}-new", path.display()));
                pins::remove(&new)?;
                tcx::create(program, &new, name, side, interface)?;
                fs::rename(&new, path).map_err(on_file("replace", path))
            }
            Means::Clsact => clsact::bring_forward(program, path, name, side, interface),
        }
    }

    /// A verified program, for tests that run it on crafted packets.
    pub(super) fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, DatapathError> {
        program(&mut self.object, name)
    }
}

/// With the pinned maps, or with maps of its own.
fn load(pins: Option<&Pins>) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for (name, path) in pins.into_iter().flat_map(Pins::map_paths) {
        loader.map_pin_path(name, path);
    }
    let mut object = loader
        .load(OBJECT)
        .map_err(|error| DatapathError::Load(Box::new(error)))?;
    for (name, _) in PROGRAMS.into_iter().chain([UPLINK]) {
        program(&mut object, name)?
            .load()
            .map_err(on_program("load", name))?;
    }
    Ok(object)
}

/// Takes off what hangs there and forgets it.
fn take_down(path: &Path, side: Option<TcAttachType>, ifindex: u32) -> Result<(), DatapathError> {
    match (clsact::handle_at(path), side, name_of(ifindex)) {
        (Some(handle), Some(side), Some(interface)) => clsact::remove(side, &interface, handle),
        (Some(_), ..) => {}
        (None, ..) => tcx::detach(path),
    }
    pins::remove(path)
}

/// Sets it up or down; one that went away is neither.
fn set_link(interface: &str, state: &str) -> Result<(), DatapathError> {
    let set = command::run(&["ip", "link", "set", "dev", interface, state], "");
    if set.is_err() && if_nametoindex(interface).is_err() {
        return Ok(());
    }
    set.map_err(RouterError::from)?;
    Ok(())
}

fn name_of(ifindex: u32) -> Option<String> {
    if_indextoname(ifindex).ok()?.into_string().ok()
}

fn program<'object>(
    object: &'object mut Ebpf,
    name: &'static str,
) -> Result<&'object mut SchedClassifier, DatapathError> {
    object
        .program_mut(name)
        .ok_or(DatapathError::Absent(name))?
        .try_into()
        .map_err(on_program("find", name))
}

/// Whether a call failed because its interface is gone.
fn is_dead(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(call) => call.io_error.raw_os_error() == Some(libc::ENOLINK),
        _ => false,
    }
}

/// An error about something that hangs on an interface and that aya knows only as an `io::Error`.
fn on_hook(action: &'static str) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Io { action, source }
}
