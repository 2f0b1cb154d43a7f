//! Connections of the kernel path that embassy ends, as the proxy ends its own: those of a route that is gone, and those to an endpoint
//! that is gone, if their binding says so.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{
    diag::{Diagnosis, Open},
    inside::within,
    layout::{Gone, Peer, Place},
    programs::Programs,
};
use crate::{
    model::{Endpoint, RunEnd},
    table::{RouteKey, RouteNumber},
};

/// How long one look may reset connections. What is left waits for the next look.
const PATIENCE: Duration = Duration::from_millis(50);

/// Connections that are to be ended.
#[derive(Debug, Clone)]
pub(super) struct Ending {
    pub(super) route: RouteNumber,
    pub(super) key: RouteKey,
    /// The consumer's run.
    pub(super) run: RunEnd,
    /// Those to this endpoint, unless it is back by then. `None`: all of the route.
    pub(super) endpoint: Option<Endpoint>,
    /// The places that they count for.
    pub(super) places: HashSet<Place>,
    /// The consumer's other addresses: their connections may count for the same places, and are another route's.
    pub(super) others: Vec<IpAddr>,
    pub(super) at: Instant,
    /// Whether it was done once: a connection that chose its endpoint before may not have been seen then, because it had sent no SYN.
    pub(super) is_repeated: bool,
}

impl Ending {
    fn why(&self) -> Gone {
        match self.endpoint {
            Some(_) => Gone::Endpoint,
            None => Gone::Route,
        }
    }

    /// Whether a connection from this address is meant.
    fn means(&self, local: IpAddr, peer: &Peer) -> bool {
        self.endpoint.is_none_or(|endpoint| endpoint == peer.endpoint)
            && self.places.contains(&peer.route)
            && !self.others.iter().any(|other| other.to_canonical() == local)
    }
}

/// What is due now of the connections that are to be ended. Those of routes that are gone come first.
pub(super) fn take_due(endings: &mut Vec<Ending>, now: Instant) -> Vec<Ending> {
    endings.retain(|one| !one.run.has_ended());
    let mut due: Vec<_> = endings.extract_if(.., |one| one.at <= now).collect();
    due.sort_by_key(|one| one.endpoint.is_some());
    due
}

/// Those of one run, the first's.
pub(super) fn take_run(due: &mut Vec<Ending>) -> Option<(RunEnd, Vec<Ending>)> {
    let run = due.first()?.run.clone();
    let of_run = due.extract_if(.., |one| one.run.is(&run)).collect();
    Some((run, of_run))
}

/// Whether the time of one look is over.
pub(super) fn is_over(start: Instant) -> bool {
    start.elapsed() >= PATIENCE
}

/// Ends those of the sockets in a run's network that are meant. Says how many; `None`: the network cannot be entered.
pub(super) fn end(
    run: &RunEnd,
    programs: &mut Programs,
    endings: &[Ending],
) -> Option<io::Result<usize>> {
    let why = |open: &Open| {
        let ending = endings.iter().find(|one| one.means(open.local(), &open.peer));
        ending.map(Ending::why)
    };
    within(run, || end_here(programs, why))
}

/// The same in this thread's network namespace. `why`: `None` if a connection is not meant. After an error it goes on.
pub(super) fn end_here(
    programs: &mut Programs,
    why: impl Fn(&Open) -> Option<Gone>,
) -> io::Result<usize> {
    let mut diagnosis = Diagnosis::open()?;
    let open = diagnosis.list(programs.peers())?;
    let mut ended = Ok(0);
    for one in open.iter().filter(|one| one.peer.is_live) {
        let Some(why) = why(one) else { continue };
        match end_one(programs, &mut diagnosis, one, why) {
            Ok(is_ended) => ended = ended.map(|n| n + usize::from(is_ended)),
            Err(error) => ended = ended.and(Err(error)),
        }
    }
    ended
}

fn end_one(
    programs: &mut Programs,
    diagnosis: &mut Diagnosis,
    open: &Open,
    why: Gone,
) -> io::Result<bool> {
    // First: the program that sees its end must know the reason.
    let doomed = programs.doomed.insert(open.cookie(), why as u32, 0);
    doomed.map_err(io::Error::other)?;
    let done = diagnosis.destroy(open);
    if !matches!(done, Ok(true)) {
        // It has ended by itself.
        let _ = programs.doomed.remove(&open.cookie());
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Port;

    fn ending(endpoint: Option<u8>, run: &RunEnd, at: Instant) -> Ending {
        let source = [10, 0, 0, 1].into();
        Ending {
            route: RouteNumber::default(),
            key: RouteKey::tcp(source, Port::new(80).unwrap()),
            run: run.clone(),
            endpoint: endpoint.map(|n| Endpoint(([10, 0, 1, n], 80).into())),
            places: [Place { index: 1, generation: 2 }].into(),
            others: vec!["::ffff:10.0.0.2".parse().unwrap()],
            at,
            is_repeated: false,
        }
    }

    #[test]
    fn connections_of_another_address_or_place_or_to_another_endpoint_stay() {
        let peer = |n, generation| Peer {
            endpoint: Endpoint(([10, 0, 1, n], 80).into()),
            route: Place { index: 1, generation },
            is_live: true,
        };
        let local = |n| IpAddr::from([10, 0, 0, n]);
        let run = RunEnd::default();
        let (one, all) =
            (ending(Some(1), &run, Instant::now()), ending(None, &run, Instant::now()));
        assert!(one.means(local(1), &peer(1, 2)) && all.means(local(1), &peer(1, 2)));
        assert!(!one.means(local(1), &peer(2, 2)) && all.means(local(1), &peer(2, 2)));
        assert!(!one.means(local(2), &peer(1, 2)) && !all.means(local(2), &peer(1, 2)));
        assert!(!all.means(local(1), &peer(1, 3)), "the place is another's");
    }

    #[test]
    fn what_is_due_is_taken_by_run_and_those_of_routes_that_are_gone_first() {
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        let [a, b, ended] = std::array::from_fn(|_| RunEnd::default());
        ended.mark_ended();
        let mut all = vec![
            ending(Some(1), &a, now),
            ending(Some(2), &b, now),
            ending(None, &b, now),
            ending(Some(3), &a, later),
            ending(None, &ended, later),
        ];
        let mut due = take_due(&mut all, now);
        assert_eq!(all.len(), 1, "of a run that has ended nothing is left to end");
        let (run, first) = take_run(&mut due).unwrap();
        assert!(run.is(&b) && first.len() == 2 && first[0].endpoint.is_none());
        let (run, second) = take_run(&mut due).unwrap();
        assert!(run.is(&a) && second.len() == 1);
        assert!(take_run(&mut due).is_none());
    }
}
