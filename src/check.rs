//! `check=tcp`: connects to endpoints at intervals. An endpoint that does not accept is used only if none does.
//!
//! One task checks an endpoint for all routes, as long as a binding has a check. After two failures in a row the check
//! fails. After one success it passes, and the endpoint's failed connections are forgotten too. A consumer's connection
//! that was opened proves as much as a probe, so the probe is then left out.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{info, warn};

use crate::{
    balance::EndpointState,
    descriptor::Check,
    discovery::Query,
    events::{Event, Events},
    proxy::{FailedChecks, Lack, probe},
    table::{Changes, Route, Table},
};

/// Interval between the starts of an endpoint's checks. It varies by 10 %, so that many hosts do not check at the same
/// time.
pub const INTERVAL: Duration = Duration::from_secs(2);
/// Connect timeout. The kernel sends a lost SYN again after a second.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of concurrent checks.
const AT_A_TIME: usize = 128;

/// Checks the endpoints of each table. Never returns. `mark` keeps our own connections from being captured.
pub async fn run(
    mut tables: watch::Receiver<Arc<Table>>,
    mark: Option<u32>,
    events: Events,
    failed: FailedChecks,
) {
    let permits = Arc::new(Semaphore::new(AT_A_TIME));
    let mut running: HashMap<usize, RunningCheck> = HashMap::new();
    let mut asked = CheckedQueries::default();
    loop {
        let table = tables.borrow_and_update().clone();
        if asked.follow(&table) {
            let wanted = asked.endpoints(&table);
            running.retain(|state, _| wanted.contains_key(state));
            for (key, (query, state)) in wanted {
                running.entry(key).or_insert_with(|| {
                    let to = (events.clone(), failed.clone());
                    let check = check(query, state.clone(), permits.clone(), mark, to);
                    RunningCheck { state, task: tokio::spawn(check).abort_handle() }
                });
            }
        }
        drop(table);
        if tables.changed().await.is_err() {
            return;
        }
    }
}

/// The queries of the routes that have checks, in the last table.
#[derive(Debug, Default)]
struct CheckedQueries {
    /// The version of this table. 0 before the first.
    seen: u64,
    queries: HashSet<Arc<Query>>,
}

impl CheckedQueries {
    /// Updates the queries. Returns whether there may be other endpoints to check: on most hosts few routes have checks.
    fn follow(&mut self, table: &Table) -> bool {
        let Changes { added, removed, upstreams, .. } = table.changes();
        let has_missed = std::mem::replace(&mut self.seen, table.version) + 1 != table.version;
        let has_check = |route: &Arc<Route>| route.binding.descriptor.check == Some(Check::Tcp);
        if has_missed || added.iter().chain(removed).any(has_check) {
            let checked = table.routes().filter(|route| has_check(route));
            self.queries = checked.map(|route| route.query.clone()).collect();
            return true;
        }
        upstreams.iter().any(|upstream| self.queries.contains(&upstream.query))
    }

    /// The endpoints to check, by identity, and the query of each.
    fn endpoints(&self, table: &Table) -> HashMap<usize, (Arc<Query>, Arc<EndpointState>)> {
        let upstreams = self.queries.iter().filter_map(|query| table.upstream(query));
        let endpoints = upstreams.flat_map(|upstream| {
            let states = upstream.rotation.endpoints().iter();
            states.map(|state| (Arc::as_ptr(state).addr(), (upstream.query.clone(), state.clone())))
        });
        endpoints.collect()
    }
}

/// An endpoint that is checked until this is dropped. Holding its state ensures that no other endpoint gets the same
/// identity (its address in memory).
struct RunningCheck {
    state: Arc<EndpointState>,
    task: AbortHandle,
}

impl Drop for RunningCheck {
    fn drop(&mut self) {
        self.task.abort();
        self.state.not_checked();
    }
}

async fn check(
    query: Arc<Query>,
    state: Arc<EndpointState>,
    permits: Arc<Semaphore>,
    mark: Option<u32>,
    (events, failed): (Events, FailedChecks),
) {
    // Spreads the checks of a table's endpoints over time.
    sleep(INTERVAL.mul_f64(fastrand::f64())).await;
    let mut opened = state.opened();
    let mut lacked = None;
    loop {
        let start = Instant::now();
        let before = std::mem::replace(&mut opened, state.opened());
        let result = if opened != before && state.failures() == 0 && !state.is_silent() {
            Ok(())
        } else {
            // The semaphore is never closed.
            let permit = permits.acquire().await;
            let result = timeout(TIMEOUT, probe(state.endpoint, mark)).await;
            drop(permit);
            result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        };
        let endpoint = state.endpoint;
        let lacking = result.as_ref().err().and_then(|error| Lack::of(error, endpoint, mark));
        let is_news = std::mem::replace(&mut lacked, lacking) != lacking;
        match result {
            Ok(()) => {
                let was_ejected = state.failures() != 0 || state.is_silent();
                if state.checked(true) {
                    info!(%endpoint, service = %query, "endpoint check passes");
                }
                if was_ejected {
                    info!(%endpoint, service = %query, "endpoint is back");
                    events.report(|| Event::EndpointBack { query: query.clone(), endpoint });
                }
            }
            // The result stays as it was.
            Err(error) if lacking.is_some() => {
                if is_news {
                    warn!(%endpoint, service = %query, %error, "cannot check endpoint");
                }
            }
            Err(error) if state.checked(false) => {
                warn!(%endpoint, service = %query, %error, "endpoint check fails");
                failed.report();
            }
            Err(_) => {}
        }
        sleep_until(start + INTERVAL.mul_f64(0.9 + fastrand::f64() / 5.0)).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::{
        balance::CheckResult,
        consumer::{Binding, Consumer},
        descriptor::Balance,
        discovery::Endpoints,
        model::{ConsumerId, Endpoint, Millis, ServiceName},
        table::Inputs,
    };

    /// A table with consumers with these descriptors, each with another address, and one service.
    fn table(before: &Table, descriptors: &[&str], endpoint: Endpoint) -> Option<Table> {
        let consumer = |(n, text): (usize, &&str)| {
            Arc::new(Consumer {
                id: ConsumerId::Local,
                name: "a".into(),
                namespace: "a".into(),
                sources: vec![std::net::IpAddr::from([10, 0, 0, n as u8])],
                arrivals: Vec::new(),
                gateways: vec![],
                bindings: vec![Binding { origin: "B".into(), descriptor: text.parse().unwrap() }],
                ends: vec![],
            })
        };
        let consumers: Vec<_> = descriptors.iter().enumerate().map(consumer).collect();
        let query = Query {
            via: "consul".into(),
            service: ServiceName::new("web").unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        };
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &consumers.iter().collect::<Vec<_>>(),
            contested: &Default::default(),
            known: &Default::default(),
            confirmed: 0,
            networks: &Default::default(),
            wiring: &Default::default(),
            endpoints: &[(query.clone(), Arc::new(Endpoints::new([endpoint], vec![])))]
                .into_iter()
                .collect(),
            vips: &[],
            gateways_are_vips: false,
            balance: Balance::RoundRobin,
            now: std::time::Instant::now(),
        };
        before.next(&inputs, |_| Ok(query.clone()))
    }

    #[tokio::test]
    async fn an_endpoint_is_checked_by_one_while_somebody_asks() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint(listener.local_addr().unwrap());
        let asked = table(&Table::default(), &["web;80;check=tcp"; 3], endpoint).unwrap();
        let state = asked.upstreams().next().unwrap().rotation.endpoints()[0].clone();
        let unasked = table(&asked, &["web;80"], endpoint).unwrap();
        let wanted = |table: &Table| {
            let mut asked = CheckedQueries::default();
            asked.follow(table);
            asked.endpoints(table).len()
        };
        assert_eq!(wanted(&asked), 1);
        assert_eq!(wanted(&unasked), 0);

        let (tables, receiver) = watch::channel(Arc::new(asked));
        let events = Events::default();
        let mut told = events.listen();
        let checks = tokio::spawn(run(receiver, None, events, FailedChecks::default()));
        let until = async |wanted: CheckResult| {
            while state.check() != wanted {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let deadline = Duration::from_secs(60);
        timeout(deadline, until(CheckResult::Passes)).await.expect("it passes");
        drop(listener);
        timeout(deadline, until(CheckResult::Fails)).await.expect("it fails");
        // Connections failed too, and ejected it.
        state.failed(Millis(0), Millis(1)).unwrap();
        let _again = TcpListener::bind(endpoint.0).await.unwrap();
        timeout(deadline, until(CheckResult::Passes)).await.expect("it passes again");
        let back = timeout(deadline, told.next()).await.expect("it is told").unwrap();
        assert!(
            matches!(&*back, Event::EndpointBack { query, .. } if query.service.as_str() == "web"),
            "{back:?}"
        );
        tables.send_replace(Arc::new(unasked));
        timeout(deadline, until(CheckResult::Not)).await.expect("nobody asks");
        checks.abort();
    }

    #[tokio::test]
    async fn an_endpoint_to_which_connections_open_is_not_probed() {
        // No program listens there: a probe would fail.
        let endpoint = Endpoint("127.0.0.1:1".parse().unwrap());
        let asked = table(&Table::default(), &["web;80;check=tcp"], endpoint).unwrap();
        let state = asked.upstreams().next().unwrap().rotation.endpoints()[0].clone();
        let (_tables, receiver) = watch::channel(Arc::new(asked));
        let failed = FailedChecks::default();
        let mut told = failed.listen();
        let checks = tokio::spawn(run(receiver, None, Events::default(), failed));
        let deadline = Duration::from_secs(60);
        let until = async |wanted: CheckResult, opens: bool| {
            while state.check() != wanted {
                if opens {
                    state.succeeded(Duration::ZERO);
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(deadline, until(CheckResult::Passes, true)).await.expect("connections prove it");
        assert!(!told.has_changed().unwrap());
        timeout(deadline, until(CheckResult::Fails, false))
            .await
            .expect("without any it is probed");
        timeout(deadline, told.changed()).await.expect("the workers hear of it").unwrap();
        checks.abort();
    }

    #[test]
    fn a_table_that_changes_no_checked_route_is_passed_over() {
        let endpoint = Endpoint("10.0.0.1:1".parse().unwrap());
        let one = table(&Table::default(), &["web;80;check=tcp"], endpoint).unwrap();
        let two = table(&one, &["web;80;check=tcp", "web;81"], endpoint).unwrap();
        let mut asked = CheckedQueries::default();
        assert!(asked.follow(&one));
        assert!(!asked.follow(&two));
        assert_eq!(asked.endpoints(&two).len(), 1);
        let endpoint = Endpoint("10.0.0.2:1".parse().unwrap());
        let moved = table(&two, &["web;80;check=tcp", "web;81"], endpoint).unwrap();
        assert!(asked.follow(&moved), "another endpoint");
        let unasked = table(&moved, &["web;80", "web;81"], endpoint).unwrap();
        assert!(asked.follow(&unasked));
        assert!(asked.endpoints(&unasked).is_empty());
        let endpoint = Endpoint("10.0.0.3:1".parse().unwrap());
        let moved = table(&unasked, &["web;80", "web;81"], endpoint).unwrap();
        assert!(!asked.follow(&moved), "nobody has it checked any more");
        assert!(asked.follow(&two), "one was missed");
    }
}
