//! Docker
use crate::{
    discovery::{Endpoints, Query},
    docker::Engine,
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
#[allow(dead_code)]
pub struct Docker {
    engine: Engine,
    healthy_only: bool,
    own: bool,
}

impl Docker {
    pub fn new(engine: Engine, healthy_only: bool, own: bool) -> Self {
        Self { engine, healthy_only, own }
    }

    pub fn source(self, _query: Query) -> DockerSource {
        DockerSource {}
    }
}

#[derive(Debug)]
pub struct DockerSource {}

impl Source for DockerSource {
    type Item = Endpoints;
    async fn session(&mut self, _publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        std::future::pending().await
    }
}
