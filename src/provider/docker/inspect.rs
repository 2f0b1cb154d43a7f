//! An engine's answer about one container, read by the fields that engines from 20.10 to 29 all fill. Pure.

use std::{collections::BTreeMap, sync::Arc};

use bollard::models::{ContainerInspectResponse, EndpointSettings};

use super::containers::{Attachment, Found, Network, NetworkId, Running};
use crate::{docker::client::addresses, model::RunEnd, provider::bindings::bindings};

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
        end: RunEnd::default(),
        pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or_default(),
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

fn attachment(end: &EndpointSettings) -> Attachment {
    let gateways = [&end.gateway, &end.ipv6_gateway];
    let gateways = gateways.into_iter().filter_map(|text| text.as_deref()?.parse().ok());
    Attachment { addresses: addresses(end).collect(), gateways: gateways.collect() }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// An engine's answer, out of a file that also says where it is from.
    fn answer(file: &str) -> ContainerInspectResponse {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        serde_json::from_value(file["answer"].take()).unwrap()
    }

    fn running(file: &str) -> Running {
        match found(&answer(file), "BACKEND_") {
            Found::Running(running) => running,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn engines_from_20_10_to_29_say_the_same() {
        let old = running(include_str!("fixtures/inspect-20.10.json"));
        assert_eq!(old, running(include_str!("fixtures/inspect-29.json")));

        assert_eq!((&*old.name, &*old.started_at), ("app", "2026-11-22T19:03:57.425590444Z"));
        let bindings: Vec<_> = old.bindings.iter().map(|b| b.descriptor.to_string()).collect();
        assert_eq!(bindings, ["/services/web;80", "redis;6379"]);
        let Network::Own(attachments) = old.network else { panic!("{:?}", old.network) };
        let texts = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut ends: Vec<_> =
            attachments.values().map(|a| (texts(&a.addresses), texts(&a.gateways))).collect();
        ends.sort();
        let back = (
            ["10.9.0.2", "fd00:aaaa::2"].map(String::from),
            ["10.9.0.1", "fd00:aaaa::1"].map(String::from),
        );
        let bridge = (["172.17.0.3".to_owned()], ["172.17.0.1".to_owned()]);
        let expected = [(back.0.to_vec(), back.1.to_vec()), (bridge.0.to_vec(), bridge.1.to_vec())];
        assert_eq!(ends, expected);
    }

    #[test]
    fn a_network_of_anothers_is_known_by_its_mode() {
        let shared = running(include_str!("fixtures/inspect-20.10-shared.json"));
        let owner = answer(include_str!("fixtures/inspect-20.10.json")).id.unwrap();
        assert_eq!(shared.network, Network::Of(owner));
        let host = running(include_str!("fixtures/inspect-20.10-host.json"));
        assert_eq!(host.network, Network::Host);
    }

    #[test]
    fn what_does_not_run_is_not_there() {
        let mut answer = answer(include_str!("fixtures/inspect-20.10.json"));
        answer.state.as_mut().unwrap().running = Some(false);
        assert_eq!(found(&answer, "BACKEND_"), Found::NotRunning);
        assert_eq!(found(&ContainerInspectResponse::default(), "BACKEND_"), Found::NotRunning);
    }
}
