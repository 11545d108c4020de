//! Endpoints with addresses of both families whose interfaces never come up: for crafted packets alone.

use std::net::Ipv6Addr;

use aya::TestRunOptions;
use netd::kernel::{Datapath, EndpointHandle, Uplink};
use sandgate_policy::Platform;

use crate::world::{RunDir, Sandbox, config};

/// Offsets in `struct __sk_buff` (linux/bpf.h).
const MARK: usize = 8;
const INGRESS: usize = 36;
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

/// `TC_ACT_UNSPEC`.
pub(crate) const NEXT: u32 = u32::MAX;
/// `TC_ACT_OK`.
pub(crate) const OK: u32 = 0;
/// `TC_ACT_SHOT`.
pub(crate) const SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`.
pub(crate) const REDIRECT: u32 = 7;

/// The other end of the uplink.
pub(crate) const PEER_MAC: [u8; 6] = [0x02, 0x53, 0x47, 0xee, 0, 1];

/// What a program made of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) returned: u32,
    pub(crate) mark: u32,
    pub(crate) frame: Vec<u8>,
}

/// The endpoints. Fields drop in order: the datapath before its directory.
pub(crate) struct Lab {
    pub(crate) datapath: Datapath,
    pub(crate) sandboxes: Vec<(Sandbox, EndpointHandle)>,
    run_dir: RunDir,
}

impl Lab {
    pub(crate) fn open(count: u8, platform: &Platform) -> Self {
        let run_dir = RunDir::new();
        let datapath = Datapath::open(&config(run_dir.path()), platform).expect("a datapath");
        let sandboxes = (1..=count)
            .map(|number| {
                let mut sandbox = Sandbox::create(datapath.router(), number);
                sandbox.endpoint.address6 = Some(address6(number));
                let handle = datapath.attach(&sandbox.endpoint).expect("attached");
                (sandbox, handle)
            })
            .collect();
        Self {
            datapath,
            sandboxes,
            run_dir,
        }
    }

    /// Closes the datapath and opens another on the same pins.
    pub(crate) fn restart(self, platform: &Platform) -> Self {
        let Self {
            datapath,
            sandboxes,
            run_dir,
        } = self;
        drop(datapath);
        let datapath = Datapath::open(&config(run_dir.path()), platform).expect("a datapath");
        Self {
            datapath,
            sandboxes,
            run_dir,
        }
    }

    /// An uplink that is the interface `lo`: nothing is ever sent there, for test runs send nothing.
    pub(crate) fn set_uplink(&self) -> u32 {
        self.set_uplink_for(true)
    }

    /// The same, by which IPv6 leaves or does not.
    pub(crate) fn set_uplink_for(&self, ipv6: bool) -> u32 {
        let ifindex = 1;
        self.datapath
            .set_uplink(Some(Uplink {
                ifindex,
                peer_mac: PEER_MAC,
                ipv6,
            }))
            .expect("an uplink");
        ifindex
    }

    /// `from_sandbox` on a frame of an endpoint.
    pub(crate) fn out(&self, handle: EndpointHandle, frame: &[u8]) -> Seen {
        run(&self.datapath, "from_sandbox", (handle.ifindex, 0, 0), frame).expect("a run")
    }

    /// `to_sandbox` on a frame with a mark that came in through an interface (0: made on this machine).
    pub(crate) fn toward(&self, handle: EndpointHandle, mark: u32, ingress: u32, frame: &[u8]) -> bool {
        let seen = run(
            &self.datapath,
            "to_sandbox",
            (handle.ifindex, mark, ingress),
            frame,
        )
        .expect("a run");
        match seen.returned {
            NEXT => true,
            SHOT => false,
            other => panic!("to_sandbox returned {other}"),
        }
    }
}

/// The IPv6 address of a sandbox.
pub(crate) fn address6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd53, 0x4700, 0, 0, 0, 0, 0, u16::from(number))
}

/// Runs a program on a frame; the context is interface, mark and the interface it came in through. An error is the
/// kernel's, which takes no frame without a whole header for a test run.
pub(crate) fn run(
    datapath: &Datapath,
    program: &'static str,
    (ifindex, mark, ingress): (u32, u32, u32),
    frame: &[u8],
) -> Result<Seen, String> {
    let mut context = [0_u8; CONTEXT];
    for (offset, value) in [(IFINDEX, ifindex), (MARK, mark), (INGRESS, ingress)] {
        context[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let mut after = [0_u8; CONTEXT];
    let mut changed = vec![0_u8; frame.len() + 256];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut changed),
        ctx_in: Some(&context),
        ctx_out: Some(&mut after),
        ..TestRunOptions::default()
    };
    let result = datapath
        .test_run(program, options)
        .map_err(|error| error.to_string())?;
    changed.truncate(frame.len());
    Ok(Seen {
        returned: result.return_value,
        mark: u32::from_ne_bytes(after[MARK..MARK + 4].try_into().expect("four bytes")),
        frame: changed,
    })
}
