//! A descriptor whose discovery is followed, as embassy does it.

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

/// How long anything may take that is to happen soon: long enough for the busiest machine, and for all that is waited
/// for before a server that hangs is given up.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// What an empty command line and environment mean.
pub(crate) fn settings() -> Options {
    Options {
        healthy_only: true,
        docker: Engine { address: Address::Unix("/nonexistent".into()), certificates: None },
        consul: ConsulSettings::default(),
        etcd: EtcdSettings::default(),
    }
}

/// A descriptor that is followed, as embassy does.
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
        // No resync comes to the rescue within a test: what is seen is seen by following.
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

    /// Waits until what is known is as wanted.
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

    /// Waits until just these are the endpoints, and nothing is wrong.
    pub(crate) async fn sees(&self, endpoints: &[&str]) -> Known<Endpoints> {
        self.until(&format!("endpoints {endpoints:?}"), |known| {
            known.error.is_none() && list(known).is_some_and(|list| list == endpoints)
        })
        .await
    }

    /// Waits until an error is shown that holds `text`.
    pub(crate) async fn fails(&self, text: &str) -> Known<Endpoints> {
        self.until(&format!("an error with {text:?}"), |known| {
            known.error.as_ref().is_some_and(|error| error.contains(text))
        })
        .await
    }
}

/// The endpoints that are in use.
pub(crate) fn list(known: &Known<Endpoints>) -> Option<Vec<String>> {
    Some(known.value.as_ref()?.list.iter().map(ToString::to_string).collect())
}

/// What was rejected beside them.
pub(crate) fn rejected(known: &Known<Endpoints>) -> Vec<String> {
    let rejected = known.value.iter().flat_map(|answer| &answer.rejected);
    rejected.map(|entry| format!("{}: {}", entry.what, entry.reason)).collect()
}
