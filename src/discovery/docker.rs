//! Docker
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
pub struct Docker {}

impl Docker {
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
