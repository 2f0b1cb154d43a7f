//! Recognises a consumer, or an endpoint's container, of an earlier embassy by its process.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use tokio::sync::Notify;

use super::KeptConsumer;
use crate::{
    consumer::Consumer,
    docker::process::{HeldProcess, addresses},
    model::{ConsumerId, ContainerId, Process, RunEnd, Stay},
};

/// The consumer that an earlier embassy knew, if it is still the same run. It keeps the addresses that its network still
/// has. The error says why it is not the same.
pub(super) fn resume(kept: KeptConsumer, bell: &Arc<Notify>) -> Result<Consumer, String> {
    let own = open(&kept.id, kept.process)?;
    let namespace = open(&kept.namespace, kept.namespace_process)?;
    // While embassy did not run, it may have left a network, and another container may have its address.
    let has = addresses_of(&own)?;
    let sources: Vec<_> = kept.sources.into_iter().filter(|source| has.contains(source)).collect();
    if sources.is_empty() {
        return Err("it has other addresses".to_owned());
    }
    Ok(Consumer {
        id: ConsumerId::Container { id: kept.id, started_at: kept.started_at },
        name: kept.name,
        namespace: kept.namespace.as_str().into(),
        sources,
        arrivals: Vec::new(),
        gateways: kept.gateways,
        bindings: kept.bindings,
        ends: [own, namespace].map(|process| follow(process, bell)).into(),
    })
}

/// The runs on which an endpoint at `address` depends, if all of them continue and their network still has the address. The
/// error says why not.
pub(super) fn resume_stay(
    runs: Vec<(ContainerId, Process)>,
    address: IpAddr,
    bell: &Arc<Notify>,
) -> Result<Stay, String> {
    let held = runs
        .into_iter()
        .map(|(id, was)| Ok((open(&id, was)?, id)))
        .collect::<Result<Vec<_>, String>>()?;
    let (owner, _) = held.last().ok_or("its container's process was not seen")?;
    let has = addresses_of(owner)?;
    if !has.contains(&address) {
        return Err("it has other addresses".to_owned());
    }
    let runs = held.into_iter().map(|(process, id)| (id, follow(process, bell)));
    Ok(Stay { runs: runs.collect(), left: Vec::new() })
}

/// Opens a process, and checks that it is the saved one.
fn open(id: &ContainerId, was: Process) -> Result<HeldProcess, String> {
    let held = HeldProcess::open(id, was.pid)
        .map_err(|error| format!("process {} of container {id}: {error}", was.pid))?;
    match held.process == was {
        true => Ok(held),
        false => Err(format!("process {} of container {id} belongs to another run", was.pid)),
    }
}

/// The addresses in a process's network. An error if the process has ended.
fn addresses_of(process: &HeldProcess) -> Result<BTreeSet<IpAddr>, String> {
    let found = process.look(addresses).map_err(|error| error.to_string())?;
    found.map_err(|error| format!("its addresses: {error}"))
}

fn follow(process: HeldProcess, bell: &Arc<Notify>) -> RunEnd {
    let end = RunEnd::default();
    process.follow(&end, vec![bell.clone()]);
    end
}
