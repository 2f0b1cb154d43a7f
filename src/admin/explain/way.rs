//! What stands in the way of a consumer's connections, whatever service they are for: its networks, a firewall, limits.

use std::{collections::BTreeSet, net::IpAddr, sync::atomic::Ordering::Relaxed};

use super::Shown;
use crate::{
    capture::input::Barrier,
    config::CaptureMode,
    counts::numbered,
    limits::FEW,
    model::{Consumer, ConsumerId, Endpoint},
    provider::Listing,
    table::{Route, Table},
};

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Way {
    /// The VIPs that the consumers' networks have a way to, those of their own networks first.
    pub(super) vips: Vec<IpAddr>,
    /// One sentence each.
    pub(super) findings: Vec<String>,
    /// Whether the next connection is refused for it.
    pub(super) refused: bool,
}

pub(super) fn of(
    shown: &Shown,
    table: &Table,
    listing: &Listing,
    consumers: &[&Consumer],
    routes: &[&Route],
) -> Way {
    let mut way = Way::default();
    for consumer in consumers {
        let vips = vips_of(table, listing, consumer);
        if vips.is_empty() && !table.vips().is_empty() {
            let all: Vec<_> = table.vips().iter().map(ToString::to_string).collect();
            way.findings.push(format!(
                "No network of {} has a gateway on this host, or one of the VIPs in it ({}): what it dials may not arrive here. Give it a bridge network as well.",
                consumer.name,
                all.join(", "),
            ));
        }
        way.vips.extend(vips);
    }
    let mut seen = BTreeSet::new();
    way.vips.retain(|vip| seen.insert(*vip));
    let standing = shown.capture.as_ref().map(|capture| capture.standing()).unwrap_or_default();
    for Barrier { chain, remedy } in standing.barriers {
        way.findings.push(format!(
            "What is captured may be dropped, and then hangs: {chain}. To let it pass: {remedy}"
        ));
    }
    limits(&mut way, shown, routes);
    way
}

/// Limits that refuse the next connection.
fn limits(way: &mut Way, shown: &Shown, routes: &[&Route]) {
    let figures = &shown.figures;
    let (live, limit) = (figures.live(), figures.limit());
    let mut refused = |text: String| {
        way.findings.push(text);
        way.refused = true;
    };
    if figures.memory_short() && live >= FEW {
        refused("New connections are refused (memory_short): the memory that the control group allows is nearly used up.".into());
    }
    if live >= limit {
        let are = numbered(live, "connection is", "connections are");
        refused(format!(
            "New connections are refused (too_many_connections): {are} open, and no more may be (--max-connections)."
        ));
    }
    let Some(limit) = figures.limit_of_consumer() else { return };
    let mut told = Vec::new();
    for route in routes.iter().filter(|route| route.live_of_consumer.load(Relaxed) >= limit) {
        if told.contains(&&route.consumer) {
            continue;
        }
        told.push(&route.consumer);
        let has = numbered(route.live_of_consumer.load(Relaxed), "connection", "connections");
        refused(format!(
            "New connections are refused (too_many_of_consumer): {} has {has} open, and no more may be (--max-connections-per-consumer).",
            route.consumer_name,
        ));
    }
}

/// The VIPs that a consumer's connections can be sent to: those of its own networks, and where one of them has a gateway on
/// this host, by that all others.
fn vips_of(table: &Table, listing: &Listing, consumer: &Consumer) -> Vec<IpAddr> {
    let speaks = |vip: &IpAddr| consumer.sources.iter().any(|own| own.is_ipv4() == vip.is_ipv4());
    let all = table.vips().iter().map(|vip| vip.0).filter(speaks);
    let is_own = |vip: &IpAddr| {
        let shared = |net: &ipnet::IpNet| {
            net.contains(vip) && consumer.sources.iter().any(|own| net.contains(own))
        };
        consumer.gateways.contains(vip) || listing.networks.iter().any(shared)
    };
    let (own, others): (Vec<_>, Vec<_>) = all.partition(is_own);
    if consumer.id == ConsumerId::Local || !consumer.gateways.is_empty() {
        [own, others].concat()
    } else {
        own
    }
}

/// Endpoints that are the very address that is dialled: under rules of the user's own a connection to one would come back
/// to embassy, so none gets any.
pub(super) fn circular(shown: &Shown, table: &Table, route: &Route) -> Vec<Endpoint> {
    if shown.facts.mode != CaptureMode::None {
        return Vec::new();
    }
    let dialled = |endpoint: &Endpoint| {
        endpoint.0.port() == route.key.port.get()
            && table.vips().iter().any(|vip| vip.0 == endpoint.0.ip())
    };
    let endpoints = route.upstream.rotation.endpoints().iter().map(|state| state.endpoint);
    endpoints.filter(dialled).collect()
}
