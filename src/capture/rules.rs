//! What the firewall should do, said once for every backend. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use crate::{config::CaptureScope, model::Port, table::Table};

/// The name of everything in the firewall that is ours.
pub const NAME: &str = "embassy";

/// The mark of our own connections to endpoints (man 7 socket, SO_MARK), so that `--redirect` does not capture them.
/// Its value spells "em"; the lower half is left to others, such as Kubernetes, which masquerades what bears 0x4000.
pub const MARK: u32 = 0x656d_0000;

/// The settings that rules depend on, besides the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Also what is sent from here to a VIP, and what arrives for `own`.
    pub redirect: bool,
    pub scope: CaptureScope,
    /// Our listener's port.
    pub port: u16,
    /// With `redirect`: our own addresses, which linked containers dial.
    pub own: Vec<IpAddr>,
    /// With `redirect`: the registries and engines that we ourselves dial.
    pub servers: Vec<SocketAddr>,
    /// Whether containers that are not known yet are captured too.
    pub hold: bool,
    /// Whether connections to endpoints on this host's own networks go untracked.
    pub notrack: bool,
}

/// Before Docker's own chains at -100 (dstnat): a container that publishes a port must not win it from a route.
pub const PRIORITY: i32 = -110;

/// All rules, in a form that can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub redirect: bool,
    pub scope: CaptureScope,
    pub port: u16,
    pub vips: BTreeSet<IpAddr>,
    /// Addresses that are captured on declared ports only, whatever the scope: the host's own services live there too.
    pub own: BTreeSet<IpAddr>,
    /// Servers on a VIP that we ourselves dial: what is sent from here to them is not captured, whoever declared the port.
    /// Captured, our own question to a registry would wait for the registry's answer.
    pub spared: BTreeSet<SocketAddr>,
    /// Who dials, and on which port.
    pub declared: BTreeSet<(IpAddr, Port)>,
    /// The containers that are not known yet.
    pub unknown: Option<Unknown>,
    /// Networks to whose members our own connections are not tracked. These are bridges of this host: what it sends there
    /// leaves with the bridge's own address, and nobody translates it. Farther away it might need translation, which is
    /// connection tracking's work.
    pub untracked: BTreeSet<IpNet>,
    /// Of our chains, with nft: before everybody else's that translate.
    pub priority: i32,
}

/// Who is not known yet, and is captured on every port of a VIP on which nothing on this host listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// Whoever has an address here,
    pub networks: BTreeSet<IpNet>,
    /// but none of these.
    pub known: BTreeSet<IpAddr>,
}

impl Rules {
    pub fn of(table: &Table, settings: &Settings) -> Self {
        let vips: BTreeSet<_> = table.vips().iter().map(|vip| vip.0).collect();
        Self {
            redirect: settings.redirect,
            scope: settings.scope,
            port: settings.port,
            spared: settings
                .servers
                .iter()
                .copied()
                .filter(|server| settings.redirect && vips.contains(&server.ip()))
                .collect(),
            own: settings.own.iter().copied().filter(|own| !vips.contains(own)).collect(),
            vips,
            // Where everything is captured, they are too.
            unknown: (settings.hold && settings.scope == CaptureScope::Declared).then(|| Unknown {
                networks: table.networks().clone(),
                known: table.known().clone(),
            }),
            untracked: if settings.notrack { table.networks().clone() } else { BTreeSet::new() },
            priority: PRIORITY,
            declared: table.routes().map(|route| (route.key.source, route.key.port)).collect(),
        }
    }

    /// The spared servers whose port a consumer on this host declared: it reaches them instead of the service.
    pub fn shadowed(&self) -> impl Iterator<Item = SocketAddr> {
        // What a host sends to its own address comes from that address.
        let declares = |server: &SocketAddr| {
            Port::new(server.port())
                .is_some_and(|port| self.declared.contains(&(server.ip(), port)))
        };
        self.spared.iter().copied().filter(declares)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The same where containers that are not known yet are captured too.
    pub(in crate::capture) fn with_unknown(mut rules: Rules) -> Rules {
        rules.unknown = Some(Unknown {
            networks: ["172.17.0.0/16", "fd00::/64"].map(|text| text.parse().unwrap()).into(),
            known: ["172.17.0.2", "fd00::2"].map(|text| text.parse().unwrap()).into(),
        });
        rules
    }

    /// Two consumers, both families, a VIP of each.
    pub(in crate::capture) fn example(redirect: bool, scope: CaptureScope) -> Rules {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let declared =
            [("172.17.0.2", 6379), ("172.17.0.2", 80), ("172.18.0.5", 6379), ("fd00::2", 80)];
        Rules {
            redirect,
            scope,
            port: 9999,
            vips: ["172.17.0.1", "fd00::1"].map(address).into(),
            own: if redirect { [address("10.1.2.3")].into() } else { BTreeSet::new() },
            spared: if redirect {
                ["172.17.0.1:8500".parse().unwrap()].into()
            } else {
                BTreeSet::new()
            },
            unknown: None,
            untracked: BTreeSet::new(),
            priority: PRIORITY,
            declared: declared
                .map(|(source, port)| (address(source), Port::new(port).unwrap()))
                .into(),
        }
    }
}
