//! Connections of the kernel path that embassy ends, as the proxy ends its own: those of a route that is gone, and those to an endpoint
//! that is gone, if their binding says so.

use std::{io, time::Instant};

use super::{
    diag::{Diagnosis, Open},
    inside::within,
    layout::Gone,
    programs::Programs,
};
use crate::{
    model::{Endpoint, RunEnd},
    table::{RouteKey, RouteNumber},
};

/// Connections that are to be ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) route: RouteNumber,
    pub(super) key: RouteKey,
    /// The consumer's run.
    pub(super) run: RunEnd,
    /// Those to this endpoint, unless it is back by then. `None`: all of the route.
    pub(super) endpoint: Option<Endpoint>,
    pub(super) at: Instant,
}

impl Ending {
    pub(super) fn why(&self) -> Gone {
        match self.endpoint {
            Some(_) => Gone::Endpoint,
            None => Gone::Route,
        }
    }
}

/// Ends those of the sockets in a run's network that are meant. Says how many; `None`: the network cannot be entered.
pub(super) fn end(
    run: &RunEnd,
    programs: &mut Programs,
    why: Gone,
    is_meant: impl Fn(&Open) -> bool + Send,
) -> Option<io::Result<usize>> {
    within(run, || end_here(programs, why, is_meant))
}

/// The same in this thread's network namespace.
pub(super) fn end_here(
    programs: &mut Programs,
    why: Gone,
    is_meant: impl Fn(&Open) -> bool,
) -> io::Result<usize> {
    let mut diagnosis = Diagnosis::open()?;
    let open = diagnosis.list(programs.peers())?;
    let mut ended = 0;
    for one in open.iter().filter(|one| one.peer.is_live && is_meant(one)) {
        // First: the program that sees its end must know the reason.
        let doomed = programs.doomed.insert(one.cookie(), why as u32, 0);
        doomed.map_err(io::Error::other)?;
        let done = diagnosis.destroy(one);
        if !matches!(done, Ok(true)) {
            // It has ended by itself.
            let _ = programs.doomed.remove(&one.cookie());
        }
        ended += usize::from(done?);
    }
    Ok(ended)
}
