//! The two programs and their links to interfaces.
//!
//! A link is made once, pinned, and then lives until it is unpinned or its interface goes; a newer netd replaces the
//! program in the living link, so that there is no moment without one.

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::TcAttachOptions,
    },
};
use nix::net::if_::if_nametoindex;

use super::{
    DatapathError,
    error::on_program,
    pins::{self, Pins},
};
use crate::router::RouterNamespace;

/// The object that build.rs made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netd-ebpf"));

/// Our programs and where they hang.
const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("from_sandbox", TcAttachType::Ingress),
    ("to_sandbox", TcAttachType::Egress),
];

/// The loaded object.
pub(super) struct Programs {
    object: Ebpf,
}

impl Programs {
    /// Loads the object with the pinned maps, pinning those that are not, and verifies the programs.
    pub(super) fn load(pins: &Pins) -> Result<Self, DatapathError> {
        let mut loader = EbpfLoader::new();
        for (name, path) in pins.map_paths() {
            loader.map_pin_path(name, path);
        }
        let mut object = loader
            .load(OBJECT)
            .map_err(|error| DatapathError::Load(Box::new(error)))?;
        for (name, _) in PROGRAMS {
            program(&mut object, name)?
                .load()
                .map_err(on_program("load", name))?;
        }
        Ok(Self { object })
    }

    /// Puts our programs into every link that an earlier netd pinned. Links whose interface is gone are unpinned.
    /// Returns the interfaces that are attached completely.
    pub(super) fn adopt(&mut self, pins: &Pins) -> Result<Vec<u32>, DatapathError> {
        let mut live: Vec<(u32, usize)> = Vec::new();
        for (ifindex, name, path) in pins.links()? {
            let ours = PROGRAMS.iter().find(|(program, _)| *program == name);
            let alive = match ours {
                Some((name, _)) => self.replace(&path, name)?,
                None => false,
            };
            if !alive {
                pins::remove(&path)?;
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
    }

    /// Attaches both programs to an interface of the router namespace, before all others, or finds them there.
    pub(super) fn attach(
        &mut self,
        router: &RouterNamespace,
        pins: &Pins,
        interface: &str,
        ifindex: u32,
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
            for (name, side) in PROGRAMS {
                let path = pins.link(ifindex, name);
                if !self.replace(&path, name)? {
                    pins::remove(&path)?;
                    self.create(&path, name, side, interface)?;
                }
                self.stands_first(name, side, interface)?;
            }
            Ok(())
        })?
    }

    /// Whether an interface lives that one of our pinned links hangs on.
    pub(super) fn hold(&mut self, pins: &Pins, ifindex: u32) -> Result<bool, DatapathError> {
        let (name, _) = PROGRAMS[0];
        self.replace(&pins.link(ifindex, name), name)
    }

    /// Unpins an interface's links; the programs are detached with them.
    pub(super) fn detach(pins: &Pins, ifindex: u32) -> Result<(), DatapathError> {
        PROGRAMS
            .iter()
            .try_for_each(|(name, _)| pins::remove(&pins.link(ifindex, name)))
    }

    /// Puts our program into a pinned link; false when there is none, or its interface is gone.
    fn replace(&mut self, path: &std::path::Path, name: &'static str) -> Result<bool, DatapathError> {
        if !path.exists() {
            return Ok(false);
        }
        let Ok(pinned) = PinnedLink::from_pin(path) else {
            return Ok(false);
        };
        let link = FdLink::from(pinned).try_into().map_err(on_link(name))?;
        let program = program(&mut self.object, name)?;
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

    fn create(
        &mut self,
        path: &std::path::Path,
        name: &'static str,
        side: TcAttachType,
        interface: &str,
    ) -> Result<(), DatapathError> {
        let program = program(&mut self.object, name)?;
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

    fn stands_first(
        &mut self,
        name: &'static str,
        side: TcAttachType,
        interface: &str,
    ) -> Result<(), DatapathError> {
        let ours = program(&mut self.object, name)?
            .info()
            .map_err(on_program("look at", name))?
            .id();
        let (_, chain) = SchedClassifier::query_tcx(interface, side).map_err(on_program("query", name))?;
        match chain.first() {
            Some(first) if first.id() == ours => Ok(()),
            Some(_) | None => Err(DatapathError::NotFirst {
                program: name,
                name: interface.to_owned(),
            }),
        }
    }

    /// A verified program, for tests that run it on crafted packets.
    pub(super) fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, DatapathError> {
        program(&mut self.object, name)
    }
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

fn on_link(program: &'static str) -> impl FnOnce(LinkError) -> DatapathError {
    move |source| DatapathError::Link {
        program,
        source: Box::new(source),
    }
}

/// Whether a link update failed because the link's interface is gone.
fn is_dead(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(call) => call.io_error.raw_os_error() == Some(libc::ENOLINK),
        _ => false,
    }
}
