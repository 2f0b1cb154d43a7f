//! File
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
pub struct File {}

impl File {
    pub fn source(self, _query: Query) -> FileSource {
        FileSource {}
    }
}

#[derive(Debug)]
pub struct FileSource {}

impl Source for FileSource {
    type Item = Endpoints;
    async fn session(&mut self, _publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        std::future::pending().await
    }
}
