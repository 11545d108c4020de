//! The node's own addresses, which no sandbox may reach. Owns: knowing them at every moment, by watching the
//! kernel's announcements in the node's own namespace, and telling the datapath. What happens between an
//! address's appearance and its announcement is covered by the check before each dial ([`crate::egress::dial`]).

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{MulticastGroup, packet_route::address::AddressAttribute};
use sandgate_daemon::tasks::Tasks;

use crate::kernel::{Datapath, DatapathError};

/// The addresses are read anew this often, in case an announcement was lost.
const REREAD: Duration = Duration::from_secs(30);
/// Pause before watching again after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// The node's addresses. Clones share the same set.
#[derive(Debug, Clone, Default)]
pub struct NodeAddresses {
    known: Arc<RwLock<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    addresses: BTreeSet<IpAddr>,
    /// The datapath has taken them.
    told: bool,
}

/// The addresses could not be read or watched.
#[derive(Debug, thiserror::Error)]
pub enum NodeAddressError {
    /// The netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] std::io::Error),
    /// The list.
    #[error("cannot read the node's addresses: {0}")]
    Read(#[source] rtnetlink::Error),
    /// The announcements ended.
    #[error("the kernel's announcements of addresses ended")]
    Ended,
    /// The datapath.
    #[error("the kernel did not take the node's addresses: {0}")]
    Datapath(#[from] DatapathError),
}

impl NodeAddresses {
    /// Whether the address is one of this node.
    pub fn contains(&self, address: impl Into<IpAddr>) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.addresses.contains(&address.into())
    }

    /// Reads the addresses, tells the datapath, and goes on doing so whenever they change. Netlink sockets are
    /// served among the `late` tasks.
    ///
    /// # Errors
    /// When the first reading fails; later failures are logged and tried again.
    pub async fn watch(
        &self,
        tasks: &Tasks,
        late: &Tasks,
        datapath: Arc<Datapath>,
    ) -> Result<(), NodeAddressError> {
        let mut watch = Watch::open(late)?;
        self.reread(&watch.handle, &datapath).await?;
        let (known, late) = (self.clone(), late.clone());
        let ended = tasks.shutdown();
        tasks.spawn("node addresses", async move {
            loop {
                let error = tokio::select! {
                    error = known.follow(&mut watch, &datapath) => error,
                    () = ended.cancelled() => return,
                };
                tracing::warn!(%error, "cannot follow the node's addresses, trying again");
                tokio::time::sleep(PAUSE).await;
                match Watch::open(&late) {
                    Ok(again) => watch = again,
                    Err(error) => tracing::warn!(%error, "cannot watch the node's addresses"),
                }
            }
        });
        Ok(())
    }

    async fn follow(&self, watch: &mut Watch, datapath: &Datapath) -> NodeAddressError {
        loop {
            if let Err(error) = self.reread(&watch.handle, datapath).await {
                return error;
            }
            if let Ok(Err(error)) = tokio::time::timeout(REREAD, watch.changed()).await {
                return error;
            }
        }
    }

    async fn reread(&self, handle: &rtnetlink::Handle, datapath: &Datapath) -> Result<(), NodeAddressError> {
        self.learn(read(handle).await?, |list| datapath.set_node_addresses(list))
    }

    /// Remembers the addresses, and tells of them until they are taken. They count for netd in any case.
    fn learn(
        &self,
        found: BTreeSet<IpAddr>,
        tell: impl FnOnce(&[IpAddr]) -> Result<(), DatapathError>,
    ) -> Result<(), NodeAddressError> {
        let list: Vec<IpAddr> = found.iter().copied().collect();
        {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if known.told && known.addresses == found {
                return Ok(());
            }
            *known = Known {
                addresses: found,
                told: false,
            };
        }
        tracing::info!(count = list.len(), "the node's addresses changed");
        tell(&list)?;
        self.known.write().unwrap_or_else(PoisonError::into_inner).told = true;
        Ok(())
    }
}

type Announcements = futures_util::stream::BoxStream<'static, ()>;

struct Watch {
    handle: rtnetlink::Handle,
    announcements: Announcements,
}

impl Watch {
    fn open(tasks: &Tasks) -> Result<Self, NodeAddressError> {
        let (connection, handle, announcements) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
                .map_err(NodeAddressError::Open)?;
        tasks.spawn("netlink addresses", connection);
        Ok(Self {
            handle,
            announcements: announcements.map(|_| ()).boxed(),
        })
    }

    async fn changed(&mut self) -> Result<(), NodeAddressError> {
        self.announcements.next().await.ok_or(NodeAddressError::Ended)
    }
}

async fn read(handle: &rtnetlink::Handle) -> Result<BTreeSet<IpAddr>, NodeAddressError> {
    let mut found = BTreeSet::new();
    let mut listed = handle.address().get().execute();
    while let Some(message) = listed.try_next().await.map_err(NodeAddressError::Read)? {
        found.extend(ours(&message.attributes));
    }
    Ok(found)
}

/// The addresses of one entry that reach this node: its own, and the broadcast address. The far end of a
/// point-to-point link is not ours; IPv6 names the own address apart only where there is such an end.
fn ours(attributes: &[AddressAttribute]) -> Vec<IpAddr> {
    let (mut local, mut address, mut found) = (None, None, Vec::new());
    for attribute in attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip @ IpAddr::V6(_)) => address = Some(*ip),
            AddressAttribute::Broadcast(ip) => found.push(IpAddr::V4(*ip)),
            _ => {}
        }
    }
    found.extend(local.or(address));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn what_the_kernel_half_did_not_take_is_told_again_and_counts_meanwhile() {
        let (node, own) = (NodeAddresses::default(), ip("203.0.113.9"));
        let found = BTreeSet::from([own]);
        let refused = |_: &[IpAddr]| Err(DatapathError::UplinkGone);
        assert!(node.learn(found.clone(), refused).is_err());
        assert!(node.contains(own));
        assert!(node.learn(found.clone(), refused).is_err(), "told again");
        assert!(
            node.learn(found.clone(), |list| {
                assert_eq!(list, [own]);
                Ok(())
            })
            .is_ok()
        );
        assert!(node.learn(found, refused).is_ok(), "told once");
        assert!(node.learn(BTreeSet::new(), |_| Ok(())).is_ok());
        assert!(!node.contains(own));
    }

    #[test]
    fn the_far_end_of_a_link_is_not_ours_and_an_address_of_ipv6_is() {
        let (near, far) = (ip("2001:db8::1"), ip("2001:db8::2"));
        assert_eq!(ours(&[AddressAttribute::Address(near)]), [near]);
        let link = [AddressAttribute::Address(far), AddressAttribute::Local(near)];
        assert_eq!(ours(&link), [near]);
        let (near, far) = (ip("192.0.2.1"), ip("192.0.2.2"));
        let link = [AddressAttribute::Address(far), AddressAttribute::Local(near)];
        assert_eq!(ours(&link), [near]);
    }
}
