//! Consul
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
pub struct Consul {}

impl Consul {
    pub fn source(self, _query: Query) -> ConsulSource {
        ConsulSource {}
    }
}

#[derive(Debug)]
pub struct ConsulSource {}

impl Source for ConsulSource {
    type Item = Endpoints;
    async fn session(&mut self, _publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        std::future::pending().await
    }
}
