//! What a start takes over from the embassy before it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Notify;
use tracing::{info, warn};

use super::{Fit, Origin, parse};
use crate::{
    discovery::{Endpoints, Query},
    provider::{Listing, docker},
};

/// What is used until the sources answer.
#[derive(Debug, Default)]
pub struct Restored {
    /// `None` where nobody is left.
    pub listing: Option<Arc<Listing>>,
    pub endpoints: HashMap<Query, Arc<Endpoints>>,
}

/// Bytes of the largest file that is read.
const LARGEST: u64 = 64 << 20;

/// Reads the file at `path`, and takes over what still holds `here`. A file that cannot be used is set aside and said;
/// none is no complaint. `bell` rings when a container's run ends.
pub fn restore(path: &Path, here: &Origin, max_age: Duration, bell: &Arc<Notify>) -> Restored {
    let bytes = match read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Restored::default(),
        Err(error) => {
            set_aside(path, &error);
            return Restored::default();
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let fit = match parse(&bytes) {
        Ok(document) => document.fit(here, now, max_age).map_err(|unfit| unfit.to_string()),
        Err(damage) => Err(damage.to_string()),
    };
    match fit {
        Ok(fit) => resume(path, fit, bell),
        Err(reason) => {
            set_aside(path, &reason);
            Restored::default()
        }
    }
}

fn resume(path: &Path, fit: Fit, bell: &Arc<Notify>) -> Restored {
    let mut consumers = Vec::new();
    for kept in fit.consumers {
        let (name, id) = (kept.name.clone(), kept.id.clone());
        match docker::resume(kept, bell) {
            Ok(consumer) => consumers.push(consumer),
            Err(reason) => info!(consumer = %name, %id, %reason, "not as it was kept"),
        }
    }
    info!(
        file = %path.display(), consumers = consumers.len(), services = fit.answers.len(),
        "kept from the last run, for as long as the sources do not answer"
    );
    let known = consumers.iter().flat_map(|consumer| &consumer.sources).copied().collect();
    let listing = Listing { consumers, known, ..Listing::default() };
    let endpoints = fit
        .answers
        .into_iter()
        .map(|(query, endpoints)| (query, Arc::new(Endpoints::new(endpoints, Vec::new()))));
    Restored {
        listing: (!listing.consumers.is_empty()).then(|| Arc::new(listing)),
        endpoints: endpoints.collect(),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // To open a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "expected a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(io::Error::new(ErrorKind::InvalidInput, "more than 64 MiB"));
    }
    Ok(bytes)
}

/// Moves the file out of the way, for people to look at.
fn set_aside(path: &Path, reason: &dyn std::fmt::Display) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".aside");
    let aside = PathBuf::from(aside);
    match fs::rename(path, &aside) {
        Ok(()) => {
            warn!(file = %path.display(), %reason, now_at = %aside.display(), "kept table set aside");
        }
        Err(error) => warn!(file = %path.display(), %reason, %error, "kept table not used"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::document, *};
    use crate::state::document::render;

    #[tokio::test]
    async fn what_cannot_be_used_is_set_aside_and_an_absent_file_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let restore = |here| super::restore(&path, here, Duration::MAX, &Arc::default());
        let here = document().origin;
        assert!(restore(&here).endpoints.is_empty());

        let foreign = Origin { machine: "other".into(), ..here.clone() };
        for (bytes, here) in [
            (b"garbage".to_vec(), &here),
            (Vec::new(), &here),
            (render(&document()).unwrap(), &foreign),
        ] {
            fs::write(&path, &bytes).unwrap();
            assert!(restore(here).endpoints.is_empty());
            assert_eq!(fs::read(folder.path().join("table.aside")).unwrap(), bytes);
            assert!(!path.exists());
        }
    }

    #[tokio::test]
    async fn endpoints_are_taken_over_and_a_container_that_is_not_there_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, render(&document()).unwrap()).unwrap();
        let restored = restore(&path, &document().origin, Duration::MAX, &Arc::default());
        assert!(restored.listing.is_none());
        let (query, endpoints) = restored.endpoints.iter().next().unwrap();
        assert_eq!(query.to_string(), "consul redis[eu,prod] port 53 in dc1");
        assert_eq!(endpoints.list.len(), 2);
        assert!(path.exists());
    }
}
