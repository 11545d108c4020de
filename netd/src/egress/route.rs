//! What the kernel thinks of a destination, asked at the moment of each dial. Owns: one netlink socket in the
//! node's namespace.
//!
//! The kernel answers while the question is being sent, so nothing is waited for, and no other task takes part:
//! this is on the way of every connection.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, PoisonError},
};

use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, route::RouteType},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Longest answer: a route with its attributes.
const ANSWER: usize = 8192;
/// Answers to earlier questions that may lie before the one that is waited for.
const STALE: usize = 16;

/// Looks routes up.
#[derive(Debug)]
pub(super) struct Routes {
    conversation: Mutex<Conversation>,
}

#[derive(Debug)]
struct Conversation {
    socket: Socket,
    sequence: u32,
}

impl Routes {
    /// Asks in the calling thread's network namespace, for good.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // To the kernel, and from nobody else.
        socket.connect(&SocketAddr::new(0, 0))?;
        let conversation = Mutex::new(Conversation { socket, sequence: 0 });
        Ok(Self { conversation })
    }

    /// Of what type the route to an address is.
    ///
    /// # Errors
    /// When there is none, or the kernel does not answer.
    pub(super) fn kind(&self, to: IpAddr) -> io::Result<RouteType> {
        let mut conversation = self.conversation.lock().unwrap_or_else(PoisonError::into_inner);
        conversation.ask(to)
    }
}

impl Conversation {
    fn ask(&mut self, to: IpAddr) -> io::Result<RouteType> {
        self.sequence = self.sequence.wrapping_add(1);
        let route = match to {
            IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to, 32)
                .build(),
            IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to, 128)
                .build(),
        };
        let mut question = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(route));
        question.header.flags = NLM_F_REQUEST;
        question.header.sequence_number = self.sequence;
        question.finalize();
        let mut bytes = vec![0; question.buffer_len()];
        question.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        for _ in 0..STALE {
            let mut answer = Vec::with_capacity(ANSWER);
            self.socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => Ok(route.header.kind),
                NetlinkPayload::Error(error) => Err(error.to_io()),
                _ => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "another answer than a route",
                )),
            };
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "answers to other questions",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_this_machine_is_local_each_time() {
        let routes = Routes::open().expect("a netlink socket");
        for _ in 0..100 {
            let kind = routes.kind(Ipv4Addr::LOCALHOST.into()).expect("a route");
            assert_eq!(kind, RouteType::Local);
        }
        // A machine without IPv6 has no route at all: that is an error, and no leave to dial.
        assert_ne!(
            routes.kind(Ipv6Addr::LOCALHOST.into()).ok(),
            Some(RouteType::Unicast)
        );
        let broadcast = routes
            .kind(Ipv4Addr::new(127, 255, 255, 255).into())
            .expect("a route");
        assert_ne!(broadcast, RouteType::Unicast);
    }

    #[test]
    fn questions_at_once_get_their_own_answers() {
        let routes = Routes::open().expect("a netlink socket");
        std::thread::scope(|scope| {
            for address in [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(224, 0, 0, 1).into()] {
                let routes = &routes;
                scope.spawn(move || {
                    let first = routes.kind(address).ok();
                    for _ in 0..1000 {
                        assert_eq!(routes.kind(address).ok(), first);
                    }
                });
            }
        });
    }
}
