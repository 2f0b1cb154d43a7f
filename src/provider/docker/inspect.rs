//! An engine's answer about one container, read by the fields that engines from 20.10 to 29 all fill. Pure.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use bollard::models::{ContainerInspectResponse, EndpointSettings};

use super::containers::{Attachment, Found, Network, NetworkId, Running};
use crate::provider::bindings::bindings;

/// What the answer says of the container.
pub(super) fn found(answer: &ContainerInspectResponse, prefix: &str) -> Found {
    let Some(state) = answer.state.as_ref().filter(|state| state.running == Some(true)) else {
        return Found::NotRunning;
    };
    let name: Arc<str> = answer.name.as_deref().unwrap_or_default().trim_start_matches('/').into();
    let config = answer.config.as_ref();
    let env = config.and_then(|config| config.env.as_deref()).unwrap_or_default();
    let labels = config.and_then(|config| config.labels.as_ref());
    let labels = labels.into_iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()));
    let (bindings, problems) = bindings(&name, prefix, env.iter().map(String::as_str), labels);
    Found::Running(Running {
        name,
        started_at: state.started_at.as_deref().unwrap_or_default().into(),
        network: network(answer),
        bindings,
        problems,
    })
}

fn network(answer: &ContainerInspectResponse) -> Network {
    let mode = answer.host_config.as_ref().and_then(|config| config.network_mode.as_deref());
    match mode.unwrap_or_default() {
        "host" => Network::Host,
        mode => match mode.strip_prefix("container:") {
            Some(target) => Network::Of(target.to_owned()),
            None => Network::Own(attachments(answer)),
        },
    }
}

fn attachments(answer: &ContainerInspectResponse) -> BTreeMap<NetworkId, Attachment> {
    let networks = answer.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let attached = networks.into_iter().flatten().filter_map(|(_, end)| {
        let id = end.network_id.as_deref().filter(|id| !id.is_empty())?;
        Some((id.into(), attachment(end)))
    });
    attached.collect()
}

/// An engine leaves an address that does not exist empty.
fn attachment(end: &EndpointSettings) -> Attachment {
    let both = |v4: &Option<String>, v6: &Option<String>| {
        [v4, v6].into_iter().filter_map(|text| text.as_deref()?.parse::<IpAddr>().ok()).collect()
    };
    Attachment {
        addresses: both(&end.ip_address, &end.global_ipv6_address),
        gateways: both(&end.gateway, &end.ipv6_gateway),
    }
}
