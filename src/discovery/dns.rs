//! Dns
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
#[allow(dead_code)]
pub struct Dns {
    resolver: std::net::SocketAddr,
}

impl Dns {
    pub fn new(resolver: std::net::SocketAddr) -> Self {
        Self { resolver }
    }

    pub fn source(self, _query: Query) -> DnsSource {
        DnsSource {}
    }
}

#[derive(Debug)]
pub struct DnsSource {}

impl Source for DnsSource {
    type Item = Endpoints;
    async fn session(&mut self, _publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        std::future::pending().await
    }
}
