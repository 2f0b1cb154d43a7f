//! WHO asks for what: consumers and their bindings, from Docker or from the command line.

use std::{sync::Arc, time::Duration};

use tokio::sync::Notify;

use crate::source::{Answers, Publisher, follow};

pub mod bindings;
pub mod docker;
pub mod fixed;

use crate::model::Consumer;

/// Everybody who asks, and what was wrong with what they wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub consumers: Vec<Consumer>,
    pub problems: Vec<Problem>,
}

/// Something that a consumer wrote and that cannot be done. Its other bindings work.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The container's name.
    pub consumer: Arc<str>,
    /// The variable or label, where one is to blame.
    pub origin: Arc<str>,
    pub reason: String,
}

/// The configured provider.
#[derive(Debug)]
pub enum Provider {
    Docker(Box<docker::DockerProvider>),
    Static(Box<Consumer>),
}

impl Provider {
    /// Starts following it; `bell` rings at every change.
    pub fn start(self, resync: Duration, bell: Arc<Notify>) -> Answers<Listing> {
        let (publish, answers) = Publisher::new(bell);
        match self {
            Self::Docker(docker) => {
                tokio::spawn(async move { follow("docker", *docker, publish, resync).await });
            }
            Self::Static(consumer) => {
                publish.publish(Listing { consumers: vec![*consumer], problems: Vec::new() });
            }
        }
        answers
    }
}
