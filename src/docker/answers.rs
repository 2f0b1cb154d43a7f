//! An engine's answers and events: the fields that are read here, as engines from 20.10 to 29 and podman fill them. Pure.
//!
//! Texts such as a container's status are not enums on purpose: an engine may use a value that is not known yet.

use std::collections::HashMap;

use serde::{Deserialize, de::IgnoredAny};

use crate::json::{Most, MostFields};

/// Maximum number of variables, labels or ports of one container. The inspection of a container with more fails.
const MOST: usize = 1 << 17;
/// Maximum number of networks of one container.
const MOST_NETWORKS: usize = 1000;

/// `GET /containers/<id>/json`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Inspection {
    /// The caller knows the ID.
    #[cfg(any(test, fuzzing))]
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) state: Option<State>,
    pub(crate) host_config: Option<HostConfig>,
    pub(crate) config: Option<ContainerConfig>,
    pub(crate) network_settings: Option<NetworkSettings>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct State {
    pub(crate) running: Option<bool>,
    /// Only read for the values that podman uses for a container that is being stopped.
    pub(crate) status: Option<String>,
    pub(crate) paused: Option<bool>,
    pub(crate) restarting: Option<bool>,
    pub(crate) pid: Option<i64>,
    pub(crate) started_at: Option<String>,
    pub(crate) health: Option<Health>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Health {
    pub(crate) status: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct HostConfig {
    pub(crate) network_mode: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ContainerConfig {
    pub(crate) env: Option<Most<String, MOST>>,
    pub(crate) labels: Option<MostFields<String, String, MOST>>,
    pub(crate) exposed_ports: Option<MostFields<String, IgnoredAny, MOST>>,
    /// A name such as `SIGQUIT` or a number; absent or empty: SIGTERM.
    pub(crate) stop_signal: Option<StopSignal>,
}

/// Docker writes it as text, podman as a number in some answers.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum StopSignal {
    Text(String),
    Number(i64),
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct NetworkSettings {
    pub(crate) ports: Option<MostFields<String, Option<Most<PortBinding, MOST_NETWORKS>>, MOST>>,
    /// The key is the network's name.
    pub(crate) networks: Option<MostFields<String, NetworkEnd, MOST_NETWORKS>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct PortBinding {
    pub(crate) host_ip: Option<String>,
    pub(crate) host_port: Option<String>,
}

/// A container's end of a network. The engine leaves missing addresses empty.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct NetworkEnd {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: Option<String>,
    #[serde(rename = "IPAddress")]
    pub(crate) ip_address: Option<String>,
    #[serde(rename = "GlobalIPv6Address")]
    pub(crate) global_ipv6_address: Option<String>,
    pub(crate) mac_address: Option<String>,
    pub(crate) gateway: Option<String>,
    #[serde(rename = "IPv6Gateway")]
    pub(crate) ipv6_gateway: Option<String>,
}

/// An element of `GET /containers/json`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Summary {
    pub(crate) id: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) network_settings: Option<NetworkSettings>,
}

/// An element of podman's own list of networks. Podman's list in Docker's form waits for containers that are about to
/// start.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct PodmanNetwork {
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) driver: Option<String>,
    /// The bridge. For a macvlan, its parent interface.
    pub(crate) network_interface: Option<String>,
    pub(crate) internal: Option<bool>,
    pub(crate) subnets: Option<Most<Range, MOST_NETWORKS>>,
    pub(crate) options: Option<HashMap<String, String>>,
}

impl From<PodmanNetwork> for Network {
    fn from(network: PodmanNetwork) -> Self {
        let mut options = network.options.unwrap_or_default();
        if let Some(interface) = network.network_interface.filter(|name| !name.is_empty()) {
            let option = match network.driver.as_deref() {
                Some("bridge") => BRIDGE_NAME,
                _ => PARENT,
            };
            options.entry(option.to_owned()).or_insert(interface);
        }
        Self {
            id: network.id,
            name: network.name,
            driver: network.driver,
            internal: network.internal,
            ipam: Some(Ipam { config: network.subnets }),
            options: Some(options),
        }
    }
}

/// Options of networks: the name of a bridge, and the parent interface of a macvlan or ipvlan.
pub(crate) const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
pub(crate) const PARENT: &str = "parent";
/// Whether containers of a bridge network reach each other.
pub(crate) const TOGETHER: &str = "com.docker.network.bridge.enable_icc";

/// An element of `GET /networks`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Network {
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) driver: Option<String>,
    pub(crate) internal: Option<bool>,
    #[serde(rename = "IPAM")]
    pub(crate) ipam: Option<Ipam>,
    pub(crate) options: Option<HashMap<String, String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Ipam {
    pub(crate) config: Option<Most<Range, MOST_NETWORKS>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Range {
    #[serde(alias = "subnet")]
    pub(crate) subnet: Option<String>,
    #[serde(alias = "gateway")]
    pub(crate) gateway: Option<String>,
}

/// An element of `GET /events`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Event {
    #[serde(rename = "Type")]
    pub(crate) kind: Option<String>,
    pub(crate) action: Option<String>,
    pub(crate) actor: Option<Actor>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Actor {
    #[serde(rename = "ID")]
    pub(crate) id: Option<String>,
    pub(crate) attributes: Option<Attributes>,
}

/// The attributes that are read. The engine also sends all labels of the container among them.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Attributes {
    pub(crate) container: Option<String>,
    pub(crate) network: Option<String>,
    pub(crate) signal: Option<String>,
}

/// `GET /version`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Version {
    pub(crate) version: Option<String>,
    pub(crate) api_version: Option<String>,
}

/// The body of an error answer.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) message: String,
}

impl Network {
    pub(crate) fn gateways(&self) -> Vec<std::net::IpAddr> {
        let ranges = self.ipam.iter().filter_map(|ipam| ipam.config.as_deref()).flatten();
        ranges.filter_map(|range| range.gateway.as_deref()?.parse().ok()).collect()
    }

    pub(crate) fn ranges(&self) -> Vec<ipnet::IpNet> {
        let ranges = self.ipam.iter().filter_map(|ipam| ipam.config.as_deref()).flatten();
        ranges.filter_map(|range| range.subnet.as_deref()?.parse().ok()).collect()
    }
}
