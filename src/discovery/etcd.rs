//! Etcd
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
pub struct Etcd {}

impl Etcd {
    pub fn source(self, _query: Query) -> EtcdSource {
        EtcdSource {}
    }
}

#[derive(Debug)]
pub struct EtcdSource {}

impl Source for EtcdSource {
    type Item = Endpoints;
    async fn session(&mut self, _publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        std::future::pending().await
    }
}
