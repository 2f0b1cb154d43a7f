//! The PROXY protocol: announces the consumer to an endpoint (haproxy.org/download/3.0/doc/proxy-protocol.txt). Pure.

use std::net::{IpAddr, SocketAddr};

use crate::{
    descriptor::ProxyProtocol,
    model::{OriginalDestination, SourceAddress},
    table::Route,
};

/// Types of version 2's type-length-values, in the range for custom use (2.2.7, PP2_TYPE_MIN_CUSTOM).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tlv {
    /// The consumer's name.
    ConsumerName = 0xE0,
    /// The container's full ID, or `local` for the static provider's consumer.
    ConsumerId = 0xE1,
    /// The service's name in discovery.
    Service = 0xE2,
}

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and the command for a relayed connection (PROXY).
const PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The bytes that are sent before a connection's data.
pub(super) fn header(
    version: ProxyProtocol,
    route: &Route,
    SourceAddress(source): SourceAddress,
    OriginalDestination(destination): OriginalDestination,
) -> Vec<u8> {
    match version {
        ProxyProtocol::V1 => v1(source, destination).into_bytes(),
        ProxyProtocol::V2 => {
            let id = route.consumer.full();
            let tlvs = [
                (Tlv::ConsumerName, &*route.consumer_name),
                (Tlv::ConsumerId, id),
                (Tlv::Service, route.query.service.as_str()),
            ];
            v2(source, destination, &tlvs)
        }
    }
}

fn v1(source: SocketAddr, destination: SocketAddr) -> String {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (source.ip(), destination.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port())
}

fn v2(source: SocketAddr, destination: SocketAddr, tlvs: &[(Tlv, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            body.extend(from.octets());
            body.extend(to.octets());
            TCP_OVER_IPV4
        }
        (from, to) => {
            // Both ends of a connection must have the same family: an IPv4 address is mapped to IPv6.
            body.extend(ipv6(from).octets());
            body.extend(ipv6(to).octets());
            TCP_OVER_IPV6
        }
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    for (kind, value) in tlvs {
        // Names are far shorter than the maximum length. A longer name is cut.
        let length = u16::try_from(value.len()).unwrap_or(u16::MAX).min(LONGEST);
        body.push(*kind as u8);
        body.extend(length.to_be_bytes());
        body.extend(value.bytes().take(length.into()));
    }
    let mut header = Vec::with_capacity(SIGNATURE.len() + 4 + body.len());
    header.extend(SIGNATURE);
    header.extend([PROXY, family]);
    // Three values of at most LONGEST fit.
    header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(body);
    header
}

/// Maximum length of a value in bytes. Docker's names and Consul's services are shorter.
const LONGEST: u16 = 1024;

fn ipv6(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn version_1_is_a_line() {
        let line = v1(address("172.17.0.2:34567"), address("172.17.0.1:6379"));
        assert_eq!(line, "PROXY TCP4 172.17.0.2 172.17.0.1 34567 6379\r\n");
        let line = v1(address("[fd00::2]:34567"), address("[fd00::1]:6379"));
        assert_eq!(line, "PROXY TCP6 fd00::2 fd00::1 34567 6379\r\n");
    }

    #[test]
    fn version_2_is_bytes_with_values_of_ours_behind_the_addresses() {
        let bytes =
            v2(address("172.17.0.2:258"), address("172.17.0.1:80"), &[(Tlv::Service, "web")]);
        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x12".to_vec();
        expected.extend([172, 17, 0, 2, 172, 17, 0, 1, 1, 2, 0, 80]);
        expected.extend(b"\xE2\x00\x03web");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn version_2_of_ipv6_has_36_bytes_of_addresses() {
        let bytes = v2(address("[fd00::2]:1"), address("[fd00::1]:2"), &[]);
        assert_eq!(bytes[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(bytes.len(), 16 + 36);
    }

    #[test]
    fn no_name_is_too_long() {
        let long = "x".repeat(100_000);
        let bytes = v2(
            address("1.2.3.4:1"),
            address("1.2.3.4:2"),
            &[(Tlv::ConsumerName, long.as_str()); 3],
        );
        let said = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
        assert_eq!(bytes.len(), 16 + said);
    }
}
