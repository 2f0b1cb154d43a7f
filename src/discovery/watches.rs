//! One watch per query, as long as a binding needs the query and a while longer.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::Notify, task::AbortHandle};

use super::{Discoveries, Endpoints, Query};
use crate::source::{Answers, Known, Publisher, ResyncRequests};

/// The watches that bindings need, and those that they needed recently.
#[derive(Debug)]
pub struct Watches {
    discoveries: Discoveries,
    resync: ResyncRequests,
    /// Notified when any answer changes.
    bell: Arc<Notify>,
    running: BTreeMap<Query, Watch>,
    /// Queries without a binding, each with the time since when. The oldest come first.
    lingering: VecDeque<(Instant, Query)>,
}

#[derive(Debug)]
struct Watch {
    answers: Answers<Endpoints>,
    task: AbortHandle,
    /// The last reported state (see [`told`]).
    told: (u64, u64, bool),
}

/// The state whose change is reported: the answer or the failure. Confirming the same answer is not a change.
fn told(known: &Known<Endpoints>) -> (u64, u64, bool) {
    (known.changes, known.failures, known.error.is_some())
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watches {
    /// How long a query without a binding is still followed: a consumer that restarts must not lose the endpoints of its
    /// service, especially while the registry is down.
    const LINGER: Duration = Duration::from_secs(10 * 60);
    /// Maximum number of such watches. The oldest ones end first.
    const LINGERING: usize = 256;

    pub fn new(discoveries: Discoveries, resync: ResyncRequests, bell: Arc<Notify>) -> Self {
        let (running, lingering) = (BTreeMap::new(), VecDeque::new());
        Self { discoveries, resync, bell, running, lingering }
    }

    /// Follows a query. Must be called within a runtime.
    pub fn ask(&mut self, query: &Query) {
        if self.running.contains_key(query) {
            self.lingering.retain(|(_, lingering)| lingering != query);
            return;
        }
        let Some(discovery) = self.discoveries.by_name.get(&query.via).cloned() else { return };
        let (publish, answers) = Publisher::new(self.bell.clone());
        let (followed, resync) = (query.clone(), self.resync.clone());
        let task = tokio::spawn(async move { discovery.watch(followed, publish, &resync).await });
        let watch = Watch { answers, task: task.abort_handle(), told: Default::default() };
        self.running.insert(query.clone(), watch);
    }

    /// Notes that a query has no binding any more.
    pub fn leave(&mut self, query: &Query, now: Instant) {
        if self.running.contains_key(query) && !self.lingers(query) {
            self.lingering.push_back((now, query.clone()));
        }
    }

    /// Whether a query is followed.
    pub fn follows(&self, query: &Query) -> bool {
        self.running.contains_key(query)
    }

    /// Stops following a query.
    pub fn end(&mut self, query: &Query) {
        self.lingering.retain(|(_, lingering)| lingering != query);
        self.running.remove(query);
    }

    /// Ends the queries that have had no binding for a while. Returns them.
    pub fn end_unasked(&mut self, now: Instant) -> Vec<Query> {
        let mut ended = Vec::new();
        while let Some((since, _)) = self.lingering.front()
            && (self.lingering.len() > Self::LINGERING
                || now.saturating_duration_since(*since) >= Self::LINGER)
            && let Some((_, query)) = self.lingering.pop_front()
        {
            self.running.remove(&query);
            ended.push(query);
        }
        ended
    }

    /// The states that changed since the last call, of all followed queries.
    pub fn news(&mut self) -> Vec<(Query, Known<Endpoints>)> {
        let mut news = Vec::new();
        for (query, watch) in &mut self.running {
            if !watch.answers.has_changed().unwrap_or(false) {
                continue;
            }
            let known = watch.answers.borrow_and_update();
            if told(&known) != watch.told {
                watch.told = told(&known);
                news.push((query.clone(), known.clone()));
            }
        }
        news
    }

    /// The current state of all queries with a binding.
    pub fn known(&self) -> BTreeMap<Query, Known<Endpoints>> {
        self.asked().map(|(query, watch)| (query.clone(), watch.answers.borrow().clone())).collect()
    }

    /// The receivers of the answers to all queries with a binding.
    pub fn answers(&self) -> Vec<(Query, Answers<Endpoints>)> {
        self.asked().map(|(query, watch)| (query.clone(), watch.answers.clone())).collect()
    }

    fn asked(&self) -> impl Iterator<Item = (&Query, &Watch)> {
        let lingering: HashSet<_> = self.lingering.iter().map(|(_, query)| query).collect();
        self.running.iter().filter(move |(query, _)| !lingering.contains(query))
    }

    fn lingers(&self, query: &Query) -> bool {
        self.lingering.iter().any(|(_, lingering)| lingering == query)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{discovery::Options, docker::Engine};

    fn watches(file: &std::path::Path) -> Watches {
        let settings = Options {
            healthy_only: true,
            docker: Engine::parse("unix:///nonexistent", None).unwrap(),
            consul: Default::default(),
            etcd: Default::default(),
        };
        let discoveries =
            Discoveries::parse(&[format!("file://{}", file.display())], &settings).unwrap();
        Watches::new(discoveries, ResyncRequests::new(Duration::from_secs(3600)), Arc::default())
    }

    fn query(watches: &Watches, name: &str) -> Query {
        watches.discoveries.query(&format!("{name};80").parse().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn what_nobody_asks_for_lingers_for_a_while_and_not_in_any_number() {
        let mut watches = watches("/nonexistent".as_ref());
        let start = Instant::now();
        let all: Vec<_> =
            (0..Watches::LINGERING + 10).map(|n| query(&watches, &format!("s{n:04}"))).collect();
        all.iter().for_each(|query| watches.ask(query));
        for (n, query) in all.iter().enumerate().skip(1) {
            watches.leave(query, start + Duration::from_millis(n as u64));
            watches.leave(query, start + Duration::from_secs(1));
        }
        // The oldest ones end.
        assert_eq!(watches.end_unasked(start), all[1..10]);
        assert_eq!(watches.end_unasked(start), []);
        assert_eq!(watches.known().into_keys().collect::<Vec<_>>(), all[..1]);
        assert_eq!(watches.running.len(), 1 + Watches::LINGERING);
        // A query with a binding again is not ended.
        watches.ask(&all[10]);
        let late = start + Watches::LINGER + Duration::from_secs(1);
        assert_eq!(watches.end_unasked(late), all[11..]);
        let known: Vec<_> = watches.known().into_keys().collect();
        assert_eq!(known, [all[0].clone(), all[10].clone()]);
        assert_eq!(watches.running.len(), 2);
    }

    #[tokio::test]
    async fn news_are_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services.toml");
        let service = |name: &str, port: u16| {
            format!("[[service]]\nname = \"{name}\"\nendpoints = [\"10.0.0.1:{port}\"]\n")
        };
        let write = |text: String| {
            // By a rename: a partly written file is an error.
            std::fs::write(folder.path().join("new"), text).unwrap();
            std::fs::rename(folder.path().join("new"), &file).unwrap();
        };
        write(service("a", 1) + &service("b", 1));
        let mut watches = watches(&file);
        let queries = ["a", "b"].map(|name| query(&watches, name));
        queries.iter().for_each(|query| watches.ask(query));

        type News = BTreeMap<Query, Known<Endpoints>>;
        async fn until(watches: &mut Watches, expected: &[Query]) -> News {
            let mut told = News::new();
            let deadline = Instant::now() + Duration::from_secs(60);
            while !expected.iter().all(|query| told.contains_key(query)) {
                assert!(Instant::now() < deadline, "told of {told:?}");
                tokio::time::sleep(Duration::from_millis(5)).await;
                told.extend(watches.news());
            }
            assert_eq!(told.len(), expected.len(), "{told:?}");
            told
        }
        until(&mut watches, &queries).await;
        assert!(watches.news().is_empty());
        write(service("a", 1) + &service("b", 2));
        let news = until(&mut watches, &queries[1..]).await;
        assert_eq!(news[&queries[1]].value.as_ref().unwrap().list[0].0.port(), 2);
        write("wrong".to_owned());
        let news = until(&mut watches, &queries).await;
        assert!(news.values().all(|known| known.error.is_some()));
    }
}
