//! Where the endpoints of a discovery may be. A registry decides to which addresses embassy connects from the host. It must
//! not be able to lead consumers to services that only this host can reach. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::model::{Endpoint, Vip};

/// Where the endpoints of one discovery may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Allowed {
    /// Any address: the source is a file of this host, or containers of this host.
    #[default]
    Anywhere,
    Within {
        /// `--endpoints`. `None`: all addresses except special ones.
        networks: Option<Arc<[IpNet]>>,
        /// Whether the discovery's URI has `?loopback=allow`.
        loopback: bool,
    },
}

/// Where the endpoints of all discoveries may be.
#[derive(Debug, Clone, Default)]
pub struct Bounds {
    /// By the discovery's name. A discovery that is missing here may name any address.
    pub allowed: BTreeMap<Arc<str>, Allowed>,
    /// The addresses on which embassy itself listens. An unspecified address stands for all addresses of this host.
    pub own: Vec<SocketAddr>,
}

impl Bounds {
    /// Why an endpoint of this discovery must not be used. `None`: it may be used.
    pub fn refusal(
        &self,
        via: &str,
        endpoint: Endpoint,
        vips: &BTreeSet<Vip>,
    ) -> Option<NotAllowed> {
        self.allowed.get(via)?.refusal(endpoint, Here { vips, own: &self.own })
    }
}

/// Addresses of this host that endpoints must not have.
#[derive(Debug, Clone, Copy)]
struct Here<'a> {
    vips: &'a BTreeSet<Vip>,
    own: &'a [SocketAddr],
}

/// Why an endpoint must not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAllowed {
    Unspecified,
    Multicast,
    Loopback,
    LinkLocal,
    Metadata,
    Vip,
    Own,
    Outside,
}

impl fmt::Display for NotAllowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unspecified => "it is an unspecified address",
            Self::Multicast => "it is a multicast or broadcast address",
            Self::Loopback => "it is a loopback address, where only this host itself can connect",
            Self::LinkLocal => "it is a link-local address",
            Self::Metadata => "it is the address of a cloud's metadata service",
            Self::Vip => "it is a VIP of this host, where connections come back to embassy",
            Self::Own => "embassy listens there itself",
            Self::Outside => "it is in none of the networks of --endpoints",
        })
    }
}

impl NotAllowed {
    /// What to do about it.
    pub fn fix(self) -> &'static str {
        match self {
            Self::Loopback => {
                "if the registry means this host, add ?loopback=allow to its -discovery URI; else register the address of the instance"
            }
            Self::LinkLocal | Self::Metadata | Self::Vip | Self::Outside => {
                "register another address, or list this one in --endpoints"
            }
            Self::Unspecified | Self::Multicast | Self::Own => {
                "register the address of the instance"
            }
        }
    }
}

impl Allowed {
    fn refusal(&self, endpoint: Endpoint, here: Here<'_>) -> Option<NotAllowed> {
        let Self::Within { networks, loopback } = self else { return None };
        let address = endpoint.0.ip().to_canonical();
        if is_own(address, endpoint.0.port(), here) {
            return Some(NotAllowed::Own);
        }
        let networks = networks.as_deref();
        let listed = |net: &&IpNet| net.contains(&address);
        let Some(special) = special(address, here.vips) else {
            let outside = networks.is_some_and(|all| !all.iter().any(|net| listed(&net)));
            return outside.then_some(NotAllowed::Outside);
        };
        // A special address is only allowed by a network that consists of such addresses: 0.0.0.0/0 does not allow
        // 127.0.0.1.
        let means = |net: &&IpNet| match special {
            NotAllowed::Loopback | NotAllowed::LinkLocal => {
                let bounds = [net.network(), net.broadcast()];
                bounds
                    .into_iter()
                    .all(|bound| self::special(bound, &BTreeSet::new()) == Some(special))
            }
            NotAllowed::Metadata | NotAllowed::Vip => net.prefix_len() == net.max_prefix_len(),
            _ => false,
        };
        let allowed = (special == NotAllowed::Loopback && *loopback)
            || networks.unwrap_or_default().iter().filter(listed).any(|net| means(&net));
        (!allowed).then_some(special)
    }
}

/// Why no instance of a service can have this address. `None`: it can.
fn special(address: IpAddr, vips: &BTreeSet<Vip>) -> Option<NotAllowed> {
    let (unspecified, multicast, loopback, link_local) = match address {
        IpAddr::V4(v4) => (
            // "This network" (RFC 1122, section 3.2.1.3): Linux then connects to the host itself.
            v4.octets().first() == Some(&0),
            v4.is_multicast() || v4.is_broadcast(),
            v4.is_loopback(),
            v4.is_link_local(),
        ),
        IpAddr::V6(v6) => {
            (v6.is_unspecified(), v6.is_multicast(), v6.is_loopback(), v6.is_unicast_link_local())
        }
    };
    let vip = || vips.iter().any(|vip| vip.0.to_canonical() == address);
    match () {
        () if unspecified => Some(NotAllowed::Unspecified),
        () if multicast => Some(NotAllowed::Multicast),
        () if loopback => Some(NotAllowed::Loopback),
        () if METADATA.contains(&address) => Some(NotAllowed::Metadata),
        () if link_local => Some(NotAllowed::LinkLocal),
        () if vip() => Some(NotAllowed::Vip),
        () => None,
    }
}

/// Metadata services: of most clouds, of AWS via IPv6, of Alibaba, of Oracle. They give credentials to every program on the
/// host.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

fn is_own(address: IpAddr, port: u16, here: Here<'_>) -> bool {
    let of_this_host = || {
        let vip = here.vips.iter().any(|vip| vip.0.to_canonical() == address);
        vip || address.is_loopback() || address.is_unspecified()
    };
    here.own.iter().any(|own| {
        let ip = own.ip().to_canonical();
        own.port() == port && (ip == address || ip.is_unspecified() && of_this_host())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(networks: &[&str], loopback: bool, endpoint: &str) -> Option<NotAllowed> {
        let networks: Option<Arc<[IpNet]>> = (!networks.is_empty())
            .then(|| networks.iter().map(|net| net.parse().unwrap()).collect());
        let vips = [Vip("172.17.0.1".parse().unwrap()), Vip("fd00:17::1".parse().unwrap())].into();
        let own = ["0.0.0.0:9999", "[::]:9999", "10.0.0.1:9990"].map(|own| own.parse().unwrap());
        let endpoint = if endpoint.contains("]:") || !endpoint.contains("::") {
            endpoint.to_owned()
        } else {
            format!("[{endpoint}]:80")
        };
        let endpoint = if endpoint.contains(':') { endpoint } else { format!("{endpoint}:80") };
        let here = Here { vips: &vips, own: &own };
        Allowed::Within { networks, loopback }.refusal(Endpoint(endpoint.parse().unwrap()), here)
    }

    #[test]
    fn what_only_this_host_can_reach_is_refused_in_every_form() {
        for (endpoint, expected) in [
            ("10.0.0.1", None),
            ("8.8.8.8", None),
            ("2001:db8::1", None),
            ("fd00::1", None),
            ("::ffff:10.0.0.1", None),
            ("127.0.0.1", Some(NotAllowed::Loopback)),
            ("127.8.9.10", Some(NotAllowed::Loopback)),
            ("::1", Some(NotAllowed::Loopback)),
            ("::ffff:127.0.0.1", Some(NotAllowed::Loopback)),
            ("0.0.0.0", Some(NotAllowed::Unspecified)),
            ("0.1.2.3", Some(NotAllowed::Unspecified)),
            ("::", Some(NotAllowed::Unspecified)),
            ("::ffff:0.0.0.0", Some(NotAllowed::Unspecified)),
            ("169.254.1.1", Some(NotAllowed::LinkLocal)),
            ("fe80::1", Some(NotAllowed::LinkLocal)),
            ("::ffff:169.254.1.1", Some(NotAllowed::LinkLocal)),
            ("169.254.169.254", Some(NotAllowed::Metadata)),
            ("::ffff:169.254.169.254", Some(NotAllowed::Metadata)),
            ("fd00:ec2::254", Some(NotAllowed::Metadata)),
            ("224.0.0.1", Some(NotAllowed::Multicast)),
            ("255.255.255.255", Some(NotAllowed::Multicast)),
            ("ff02::1", Some(NotAllowed::Multicast)),
            ("172.17.0.1", Some(NotAllowed::Vip)),
            ("::ffff:172.17.0.1", Some(NotAllowed::Vip)),
            ("fd00:17::1", Some(NotAllowed::Vip)),
            ("172.17.0.1:9999", Some(NotAllowed::Own)),
            ("127.0.0.1:9999", Some(NotAllowed::Own)),
            ("[::1]:9999", Some(NotAllowed::Own)),
            ("10.0.0.1:9990", Some(NotAllowed::Own)),
            ("10.0.0.2:9990", None),
        ] {
            assert_eq!(refusal(&[], false, endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn loopback_is_opened_by_the_uri_and_nothing_else_is() {
        for (endpoint, expected) in [
            ("127.0.0.1", None),
            ("::1", None),
            ("::ffff:127.0.0.1", None),
            ("127.0.0.1:9999", Some(NotAllowed::Own)),
            ("0.0.0.0", Some(NotAllowed::Unspecified)),
            ("169.254.169.254", Some(NotAllowed::Metadata)),
            ("172.17.0.1", Some(NotAllowed::Vip)),
        ] {
            assert_eq!(refusal(&[], true, endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn networks_narrow_and_open_what_they_mean() {
        let everything = ["0.0.0.0/0", "::/0"];
        for (networks, endpoint, expected) in [
            (&["10.0.0.0/8"][..], "10.1.2.3", None),
            (&["10.0.0.0/8"], "::ffff:10.1.2.3", None),
            (&["10.0.0.0/8"], "192.168.0.1", Some(NotAllowed::Outside)),
            (&["10.0.0.0/8"], "2001:db8::1", Some(NotAllowed::Outside)),
            (&everything, "192.168.0.1", None),
            (&everything, "127.0.0.1", Some(NotAllowed::Loopback)),
            (&everything, "::1", Some(NotAllowed::Loopback)),
            (&everything, "169.254.169.254", Some(NotAllowed::Metadata)),
            (&everything, "172.17.0.1", Some(NotAllowed::Vip)),
            (&["127.0.0.0/8"], "127.0.0.1", None),
            (&["127.0.0.0/8"], "127.0.0.1:9999", Some(NotAllowed::Own)),
            (&["169.254.0.0/16"], "169.254.7.7", None),
            (&["169.254.0.0/16"], "169.254.169.254", Some(NotAllowed::Metadata)),
            (&["169.254.169.254/32"], "169.254.169.254", None),
            (&["172.17.0.0/16"], "172.17.0.1", Some(NotAllowed::Vip)),
            (&["172.17.0.0/16"], "172.17.0.2", None),
            (&["172.17.0.1/32"], "172.17.0.1", None),
            (&["0.0.0.0/32"], "0.0.0.0", Some(NotAllowed::Unspecified)),
        ] {
            assert_eq!(refusal(networks, false, endpoint), expected, "{networks:?} {endpoint}");
        }
    }

    #[test]
    fn a_file_says_where_it_likes() {
        let vips = [Vip("172.17.0.1".parse().unwrap())].into();
        let here = Here { vips: &vips, own: &[] };
        for endpoint in ["127.0.0.1:80", "172.17.0.1:80", "169.254.169.254:80"] {
            assert_eq!(Allowed::Anywhere.refusal(Endpoint(endpoint.parse().unwrap()), here), None);
        }
    }
}
