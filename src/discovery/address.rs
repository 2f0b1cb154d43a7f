//! Checks that an entry of a registry is a usable endpoint: the IP address of one host, and a port.

use std::net::{IpAddr, SocketAddr};

pub(super) use crate::registry::excerpt;

use crate::model::{Endpoint, Port};

/// The endpoint at `address` (an IP address, IPv6 without brackets) and `port`. The error says what was expected.
pub(super) fn endpoint(address: &str, port: &str) -> Result<Endpoint, String> {
    let ip: IpAddr = address
        .parse()
        .map_err(|_| format!("address {:?}: expected an IP address", excerpt(address)))?;
    // An IPv4-mapped IPv6 address is the same endpoint as its IPv4 address.
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_multicast() {
        return Err(format!("address {ip}: expected the address of one host"));
    }
    let port: Port =
        port.parse().map_err(|_| format!("port {:?}: expected 1 to 65535", excerpt(port)))?;
    Ok(Endpoint(SocketAddr::new(ip, port.get())))
}

/// Parses `1.2.3.4:80` or `[::1]:80`.
pub(super) fn host_and_port(text: &str) -> Result<Endpoint, String> {
    let wrong = || format!("{:?}: expected address:port, IPv6 in brackets", excerpt(text));
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    match host.strip_prefix('[') {
        Some(host) => endpoint(host.strip_suffix(']').ok_or_else(wrong)?, port),
        None if host.contains(':') => Err(wrong()),
        None => endpoint(host, port),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_families_are_read() {
        for (text, endpoint) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[fd00::1]:65535", "[fd00::1]:65535"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(host_and_port(text).map(|e| e.to_string()), Ok(endpoint.to_owned()));
        }
    }

    #[test]
    fn each_wrong_form_says_what_was_expected() {
        for (text, reason) in [
            ("", "\"\": expected address:port, IPv6 in brackets"),
            ("10.0.0.1", "\"10.0.0.1\": expected address:port, IPv6 in brackets"),
            ("fd00::1:80", "\"fd00::1:80\": expected address:port, IPv6 in brackets"),
            ("[fd00::1:80", "\"[fd00::1:80\": expected address:port, IPv6 in brackets"),
            ("db.example:80", "address \"db.example\": expected an IP address"),
            (":80", "address \"\": expected an IP address"),
            ("0.0.0.0:80", "address 0.0.0.0: expected the address of one host"),
            ("[::]:80", "address ::: expected the address of one host"),
            ("224.0.0.1:80", "address 224.0.0.1: expected the address of one host"),
            ("10.0.0.1:0", "port \"0\": expected 1 to 65535"),
            ("10.0.0.1:http", "port \"http\": expected 1 to 65535"),
            ("10.0.0.1:65536", "port \"65536\": expected 1 to 65535"),
        ] {
            assert_eq!(host_and_port(text), Err(reason.to_owned()));
        }
    }

    #[test]
    fn a_long_wrong_value_is_cut() {
        let reason = host_and_port(&"ü".repeat(1000)).unwrap_err();
        assert!(reason.chars().count() < 150, "{reason}");
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_read_prints_back(text in "(\\PC|[0-9.:\\[\\]]){0,50}") {
            if let Ok(endpoint) = host_and_port(&text) {
                prop_assert_eq!(host_and_port(&endpoint.to_string()), Ok(endpoint));
            }
        }
    }
}
