//! An accepted connection: its source, its original destination, and its route.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::{
    model::{OriginalDestination, Port, SourceAddress, Vip},
    outcome::Outcome,
    table::{Route, RouteKey, Table},
};

/// The original destinations that count as VIPs, besides those in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destinations {
    /// All addresses: the user's own rules decide what is captured.
    Any,
    /// The VIPs, and these addresses of this host.
    VipsAnd(Vec<IpAddr>),
}

/// A connection accepted by one of our listeners.
#[derive(Debug, Clone, Copy)]
pub(super) struct Captured {
    pub source: SourceAddress,
    pub destination: OriginalDestination,
    /// Whether the connection was made to our listener itself, and was not captured.
    pub is_direct: bool,
}

impl Captured {
    /// A connection that was accepted on `port`.
    pub(super) fn of(stream: &TcpStream, peer: SocketAddr, port: u16) -> Result<Self, Outcome> {
        let destination =
            original_destination(stream, peer).map_err(|_| Outcome::NoOriginalDestination)?;
        // Connection tracking also knows connections that were not captured: their destination is the listener itself. If
        // the port differs, the listener's address need not be read.
        let is_direct = destination.port() == port
            && stream.local_addr().map_err(|_| Outcome::ConsumerReset)? == destination;
        let (source, destination) = (SourceAddress(peer), OriginalDestination(destination));
        Ok(Self { source, destination, is_direct })
    }

    /// Its route, or why it has none.
    pub(super) fn route(
        &self,
        table: &Table,
        destinations: &Destinations,
    ) -> Result<Arc<Route>, Outcome> {
        if self.is_direct {
            return Err(Outcome::DirectDial);
        }
        let (source, destination) = (self.source.0.ip(), self.destination.0);
        let is_vip = match destinations {
            Destinations::Any => true,
            Destinations::VipsAnd(own) => {
                table.vips().contains(&Vip(destination.ip())) || own.contains(&destination.ip())
            }
        };
        if !is_vip {
            return Err(Outcome::NotAVip);
        }
        let port = Port::new(destination.port()).ok_or(Outcome::NoRoute)?;
        match table.route(&RouteKey::tcp(source, port)) {
            Some(route) => Ok(route.clone()),
            None if table.known().contains(&source) => Err(Outcome::NoRoute),
            None => Err(Outcome::UnknownConsumer),
        }
    }
}

/// The original destination of a captured connection, from connection tracking.
fn original_destination(stream: &TcpStream, peer: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address = if peer.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() }?;
    address.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::testing::{captured, table};

    fn recognised(
        destinations: &Destinations,
        source: &str,
        destination: &str,
    ) -> Result<(), Outcome> {
        let source = SocketAddr::new(source.parse().unwrap(), 1);
        captured(source, destination.parse().unwrap()).route(&table(), destinations).map(drop)
    }

    #[test]
    fn only_what_a_consumer_declared_and_the_capture_destination_is_served() {
        let vips = Destinations::VipsAnd(vec!["172.17.0.9".parse().unwrap()]);
        for (source, destination, expected) in [
            ("172.17.0.2", "172.17.0.1:6379", Ok(())),
            ("172.17.0.2", "172.17.0.9:6379", Ok(())),
            ("172.17.0.2", "10.0.0.1:6379", Err(Outcome::NotAVip)),
            ("172.17.0.2", "172.17.0.1:6380", Err(Outcome::NoRoute)),
            ("172.17.0.3", "172.17.0.1:6379", Err(Outcome::UnknownConsumer)),
            ("172.17.0.4", "172.17.0.1:6379", Err(Outcome::NoRoute)),
        ] {
            assert_eq!(
                recognised(&vips, source, destination),
                expected,
                "{source} to {destination}"
            );
        }
    }

    #[test]
    fn under_the_users_own_rules_any_destination_counts_but_our_own_listener() {
        assert_eq!(recognised(&Destinations::Any, "172.17.0.2", "10.0.0.1:6379"), Ok(()));
        let indirect = captured(([172, 17, 0, 2], 1).into(), ([10, 0, 0, 1], 6379).into());
        let direct = Captured { is_direct: true, ..indirect };
        let refused = direct.route(&table(), &Destinations::Any);
        assert_eq!(refused.map(drop), Err(Outcome::DirectDial));
    }
}
