//! File
use crate::{
    discovery::{Endpoints, Query},
    source::{Publisher, Source, SourceError},
};

#[derive(Debug, Clone)]
#[allow(dead_code)]
pub struct File {
    path: std::path::PathBuf,
}

impl File {
    pub fn new(path: std::path::PathBuf) -> Self {
        Self { path }
    }

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
