//! The data path is handed over to another process, and taken over from one.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    Proxy,
    handover::{Exported, Inherited},
    lists::Place,
    observed::Ask,
    owner::DELAY,
};
use crate::{
    counts::ConnectionCounts,
    table::Table,
    takeover::{
        Channel, ChannelError,
        message::{Connection, Figures, Handle, Message, ProcessFigures},
    },
};

/// Why the data path was not handed over or taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("a worker has ended")]
    Worker,
    #[error("cannot duplicate a listener (descriptor limit?): {0}")]
    Listener(#[source] io::Error),
}

/// The connections that another process took, of each worker.
#[derive(Debug, Default)]
pub struct HandedOver(Vec<Vec<Place>>);

impl HandedOver {
    /// How many they are.
    pub fn count(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }
}

impl Proxy {
    /// Has all workers stand still: nothing is accepted, moved or ended until [`Proxy::thaw`].
    pub async fn freeze(&self) -> Result<(), TakeoverError> {
        self.ask_all(Ask::Freeze).await.map(drop)
    }

    /// Has all workers go on.
    pub async fn thaw(&self) {
        // A worker that has ended ends the process.
        let _ = self.ask_all(Ask::Thaw).await;
    }

    /// Hands over the listeners, those of one worker after the other's.
    pub async fn hand_over_listeners(&self, channel: &Channel) -> Result<(), TakeoverError> {
        for set in self.ask_all(Ask::Listeners).await? {
            let set = set.map_err(TakeoverError::Listener)?;
            let of = Handle::PROXY.to_owned();
            let descriptors = set.len() as u32;
            let handle = Handle { of, descriptors, ..Handle::default() };
            let set: Vec<_> = set.iter().map(AsFd::as_fd).collect();
            channel.send(&Message::Handle(handle), &[], &set).await?;
        }
        Ok(())
    }

    /// Hands over the connections, and learns which of them the other process takes. Called while the workers stand still.
    pub async fn hand_over_connections(
        &self,
        channel: &mut Channel,
    ) -> Result<HandedOver, TakeoverError> {
        let mut all = Vec::new();
        for n in 0..self.asks.len() {
            let (mut taken, mut next) = (Vec::new(), Some(0));
            while let Some(from) = next {
                let (exported, after) = self.ask(n, |answer| Ask::Export(from, answer)).await?;
                next = after;
                taken.extend(offer(channel, exported).await?);
            }
            all.push(taken);
        }
        Ok(HandedOver(all))
    }

    /// Lets go of what another process has taken, and of the listeners. What it has not taken goes on here.
    pub async fn let_go(&self, handed_over: HandedOver) {
        self.shared.handed_over.store(true, Relaxed);
        for (n, places) in handed_over.0.into_iter().enumerate() {
            // A worker that has ended has let go of everything.
            let _ = self.ask(n, |answer| Ask::LetGo(places, answer)).await;
        }
        self.drain();
        self.thaw().await;
    }

    /// Takes connections that another process offers, while the workers stand still. Which of them it took.
    pub async fn adopt(
        &self,
        list: Vec<Connection>,
        bytes: Vec<u8>,
        sockets: Vec<OwnedFd>,
    ) -> Result<Vec<bool>, TakeoverError> {
        let workers = self.asks.len().max(1);
        let (mut bytes, mut sockets) = (VecDeque::from(bytes), VecDeque::from(sockets));
        let mut shares: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        let count = list.len();
        for (n, connection) in list.into_iter().enumerate() {
            let held = connection.directions.iter().flatten().map(|one| one.bytes as usize).sum();
            let inherited = Inherited {
                bytes: bytes.drain(..bytes.len().min(held)).collect(),
                sockets: sockets.drain(..sockets.len().min(connection.sockets())).collect(),
                connection,
            };
            if let Some(share) = shares.get_mut(n % workers) {
                share.push(inherited);
            }
        }
        let mut taken = vec![false; count];
        for (n, share) in shares.into_iter().enumerate() {
            let of_worker = self.ask(n, |answer| Ask::Adopt(share, answer)).await?;
            let places = taken.iter_mut().skip(n).step_by(workers);
            places.zip(of_worker).for_each(|(place, is_taken)| *place = is_taken);
        }
        Ok(taken)
    }

    /// The counts of the whole process, for another one.
    pub fn totals(&self) -> ProcessFigures {
        let sum = ConnectionCounts::default();
        self.shared.all_counts().for_each(|counts| sum.add(&counts.totals()));
        ProcessFigures {
            outcomes: self.shared.tally.totals(),
            counts: sum.totals(),
            takeovers: self.shared.takeovers.load(Relaxed),
            ..ProcessFigures::default()
        }
    }

    /// Adds the counts of the process before this one.
    pub fn inherit(&self, before: &ProcessFigures) {
        self.shared.tally.add_all(&before.outcomes);
        if let Some(counts) = self.shared.counts.first() {
            counts.0.add(&before.counts);
        }
        self.shared.takeovers.fetch_add(before.takeovers, Relaxed);
    }

    /// Says of the routes whose owners had them in the process before this one that they are old: the next process has the same doubts
    /// about them as this one.
    pub fn tell_inherited(&self, figures: &mut Figures, table: &Table) {
        for one in &mut figures.routes {
            let route = table.route_of(one.key, &one.owner);
            if route.is_some_and(|route| self.shared.is_inherited(route)) {
                one.age = None;
            }
        }
    }

    /// Notes the routes whose owners had them in the process before this one, long enough that no connection is older.
    pub fn inherit_routes(&self, figures: &Figures, table: &Table) {
        let is_settled = |age: u64| Duration::from_millis(age) >= DELAY;
        let settled = figures.routes.iter().filter(|route| route.age.is_none_or(is_settled));
        let numbers = settled.filter_map(|one| Some(table.route_of(one.key, &one.owner)?.number));
        let inherited = self.shared.inherited.write();
        inherited.unwrap_or_else(PoisonError::into_inner).extend(numbers);
    }

    /// Goes on with everything that another process handed over: it is this one's from now on.
    pub async fn go_on(&self) {
        self.shared.handed_over.store(false, Relaxed);
        self.shared.takeovers.fetch_add(1, Relaxed);
        self.thaw().await;
    }

    async fn ask<T>(
        &self,
        worker: usize,
        ask: impl FnOnce(oneshot::Sender<T>) -> Ask,
    ) -> Result<T, TakeoverError> {
        let (answer, answered) = oneshot::channel();
        let worker = self.asks.get(worker).ok_or(TakeoverError::Worker)?;
        worker.send(ask(answer)).map_err(|_| TakeoverError::Worker)?;
        answered.await.map_err(|_| TakeoverError::Worker)
    }

    /// All of them at the same time.
    pub(super) async fn ask_all<T>(
        &self,
        ask: impl Fn(oneshot::Sender<T>) -> Ask,
    ) -> Result<Vec<T>, TakeoverError> {
        let all = (0..self.asks.len()).map(|n| self.ask(n, &ask));
        futures_util::future::try_join_all(all).await
    }
}

/// Offers connections to the other process. Those that it takes.
async fn offer(
    channel: &mut Channel,
    exported: Vec<Exported>,
) -> Result<Vec<Place>, TakeoverError> {
    if exported.is_empty() {
        return Ok(Vec::new());
    }
    let bytes: Vec<_> = exported.iter().flat_map(|one| one.bytes.iter().copied()).collect();
    let sockets = exported.iter().flat_map(|one| &one.sockets);
    let sockets: Vec<_> = sockets.map(AsFd::as_fd).collect();
    let list = exported.iter().map(|one| one.connection.clone()).collect();
    channel.send(&Message::Connections { list }, &bytes, &sockets).await?;
    match channel.receive().await?.ok_or(ChannelError::Closed)? {
        (Message::Taken { taken }, ..) if taken.len() == exported.len() => {
            let taken = exported.iter().zip(taken).filter(|(_, taken)| *taken);
            Ok(taken.map(|(one, _)| one.place).collect())
        }
        _ => {
            Err(ChannelError::Unexpected("something other than which connections it takes").into())
        }
    }
}
