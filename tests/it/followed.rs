//! Follows the discovery of a descriptor as embassy does.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use embassy::{
    discovery::{
        ConsulSettings, Discoveries, Endpoints, EtcdSettings, Options, Query, UriError, Watches,
    },
    docker::{Address, Engine},
    source::{Known, ResyncRequests},
};

/// Timeout for everything that should happen soon: long enough for a busy machine, and for all timeouts after which a
/// hanging server is given up.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The settings for an empty command line and environment.
pub(crate) fn settings() -> Options {
    Options {
        healthy_only: true,
        docker: Engine { address: Address::Unix("/nonexistent".into()), certificates: None },
        consul: ConsulSettings::default(),
        etcd: EtcdSettings::default(),
    }
}

/// A descriptor that is followed as embassy does.
pub(crate) struct Followed {
    watches: Watches,
    query: Query,
}

impl Followed {
    pub(crate) fn new(uri: &str, descriptor: &str) -> Self {
        Self::with(uri, &settings(), descriptor)
    }

    pub(crate) fn with(uri: &str, settings: &Options, descriptor: &str) -> Self {
        Self::try_with(uri, settings, descriptor).expect("a URI that is right")
    }

    pub(crate) fn try_with(
        uri: &str,
        settings: &Options,
        descriptor: &str,
    ) -> Result<Self, UriError> {
        Ok(Self::of(&Discoveries::parse(&[uri.to_owned()], settings)?, descriptor))
    }

    pub(crate) fn of(discoveries: &Discoveries, descriptor: &str) -> Self {
        // No resync happens within a test: changes are seen only by following.
        Self::read_again_by(discoveries, descriptor, &ResyncRequests::new(10 * SOON))
    }

    pub(crate) fn read_again_by(
        discoveries: &Discoveries,
        descriptor: &str,
        resync: &ResyncRequests,
    ) -> Self {
        let descriptor = descriptor.parse().expect("a descriptor that is right");
        let query = discoveries.query(&descriptor).expect("the discovery that was configured");
        let mut watches = Watches::new(discoveries.clone(), resync.clone(), Arc::default());
        watches.ask(&query);
        Self { watches, query }
    }

    pub(crate) fn known(&self) -> Known<Endpoints> {
        self.watches.known().remove(&self.query).expect("the one that is demanded")
    }

    /// Waits until the state is as wanted.
    pub(crate) async fn until(
        &self,
        wanted: &str,
        holds: impl Fn(&Known<Endpoints>) -> bool,
    ) -> Known<Endpoints> {
        let deadline = Instant::now() + SOON;
        loop {
            let known = self.known();
            if holds(&known) {
                return known;
            }
            assert!(Instant::now() < deadline, "{wanted}: did not happen; known is {known:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until exactly these are the endpoints, without an error.
    pub(crate) async fn sees(&self, endpoints: &[&str]) -> Known<Endpoints> {
        self.until(&format!("endpoints {endpoints:?}"), |known| {
            known.error.is_none() && list(known).is_some_and(|list| list == endpoints)
        })
        .await
    }

    /// Waits until there is an error that contains `text`.
    pub(crate) async fn fails(&self, text: &str) -> Known<Endpoints> {
        self.until(&format!("an error with {text:?}"), |known| {
            known.error.as_ref().is_some_and(|error| error.contains(text))
        })
        .await
    }
}

/// The endpoints in use.
pub(crate) fn list(known: &Known<Endpoints>) -> Option<Vec<String>> {
    Some(known.value.as_ref()?.list.iter().map(ToString::to_string).collect())
}

/// The rejected entries.
pub(crate) fn rejected(known: &Known<Endpoints>) -> Vec<String> {
    let rejected = known.value.iter().flat_map(|answer| &answer.rejected);
    rejected.map(|entry| format!("{}: {}", entry.what, entry.reason)).collect()
}
