//! The client against hostile and broken peers.
