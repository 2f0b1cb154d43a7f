//! What a start takes over from the previous embassy.

#![expect(clippy::disallowed_methods, reason = "only at the start, before anything is served")]

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Notify;
use tracing::{info, warn};

use super::{Fit, KeptEndpoint, LARGEST, Origin, parse, resume};
use crate::{
    discovery::{Endpoints, Query},
    provider::Listing,
};

/// The data to use until the sources answer.
#[derive(Debug, Default)]
pub struct Restored {
    /// `None` if no consumer is left.
    pub listing: Option<Arc<Listing>>,
    pub endpoints: HashMap<Query, Kept>,
}

/// The endpoints of a service that an earlier run knew.
#[derive(Debug, Clone)]
pub struct Kept {
    pub endpoints: Arc<Endpoints>,
    /// When its discovery last confirmed them.
    pub confirmed: Instant,
    /// Until when they may be used.
    pub until: Instant,
}

/// Reads the file at `path`, and takes over what is still valid `here`. A file that cannot be used is set aside, which is
/// logged. A missing file is normal. `bell` rings when a container's run ends.
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
        Ok(fit) => resume(path, here, fit, (now, max_age), bell),
        Err(reason) => {
            set_aside(path, &reason);
            Restored::default()
        }
    }
}

fn resume(
    path: &Path,
    here: &Origin,
    fit: Fit,
    (now, max_age): (u64, Duration),
    bell: &Arc<Notify>,
) -> Restored {
    let mut consumers = Vec::new();
    for kept in fit.consumers {
        let (name, id) = (kept.name.clone(), kept.id.clone());
        match resume::resume(kept, bell) {
            Ok(consumer) => consumers.push(Arc::new(consumer)),
            Err(reason) => {
                info!(consumer = %name, %id, %reason, "dropped from the saved table: no longer the same container run")
            }
        }
    }
    let (mut endpoints, mut oldest) = (HashMap::new(), Duration::ZERO);
    for (query, answer) in fit.answers {
        let of_containers = here.of_containers.contains(&query.via);
        let age = Duration::from_secs(now.saturating_sub(answer.confirmed));
        let answer = living(&query, answer.endpoints, of_containers, bell);
        if answer.list.is_empty() {
            continue;
        }
        let at = Instant::now();
        let kept = Kept {
            endpoints: Arc::new(answer),
            confirmed: at.checked_sub(age).unwrap_or(at),
            // An age that a clock cannot represent means no limit.
            until: at
                .checked_add(max_age.saturating_sub(age))
                .unwrap_or(at + Duration::from_secs(u32::MAX.into())),
        };
        oldest = oldest.max(age);
        endpoints.insert(query, kept);
    }
    info!(
        file = %path.display(), consumers = consumers.len(), services = endpoints.len(), oldest_s = oldest.as_secs(),
        "using the saved table until the sources answer"
    );
    let known = consumers.iter().flat_map(|consumer| &consumer.sources).copied().collect();
    let known = Arc::new(known);
    let listing = Listing { consumers, known, ..Listing::default() };
    Restored { listing: (!listing.consumers.is_empty()).then(|| Arc::new(listing)), endpoints }
}

/// An answer, without the endpoints of this host's containers that have changed.
fn living(
    query: &Query,
    kept: Vec<KeptEndpoint>,
    of_containers: bool,
    bell: &Arc<Notify>,
) -> Endpoints {
    let (mut list, mut stays) = (Vec::new(), BTreeMap::new());
    for KeptEndpoint { endpoint, runs } in kept {
        if of_containers {
            match resume::resume_stay(runs, endpoint.0.ip(), bell) {
                Ok(stay) => stays.insert(endpoint, stay),
                Err(reason) => {
                    info!(service = %query, %endpoint, %reason, "dropped from the saved table: no longer the same container run");
                    continue;
                }
            };
        }
        list.push(endpoint);
    }
    Endpoints { stays, ..Endpoints::new(list, Vec::new()) }
}

/// Reads a file that only this user or root can have written.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let wrong = |reason| Err(io::Error::new(ErrorKind::InvalidInput, reason));
    // Opening a pipe would wait for its writer.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return wrong("expected a regular file".to_owned());
    }
    if ![0, rustix::process::geteuid().as_raw()].contains(&about.uid()) {
        return wrong(format!(
            "it belongs to user {}: expected root or embassy's own",
            about.uid()
        ));
    }
    if about.mode() & 0o022 != 0 {
        return wrong(format!("other users may write it: its mode is {:o}", about.mode() & 0o777));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return wrong("more than 64 MiB".to_owned());
    }
    Ok(bytes)
}

/// Renames the file, for inspection.
fn set_aside(path: &Path, reason: &dyn std::fmt::Display) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".aside");
    let aside = PathBuf::from(aside);
    match fs::rename(path, &aside) {
        Ok(()) => {
            warn!(file = %path.display(), %reason, now_at = %aside.display(), "saved table set aside");
        }
        Err(error) => warn!(file = %path.display(), %reason, %error, "saved table not used"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
    async fn a_file_that_is_too_large_is_set_aside_and_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::File::create(&path).unwrap().set_len(LARGEST + 1).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), "more than 64 MiB");
        let restored = restore(&path, &document().origin, Duration::MAX, &Arc::default());
        assert!(restored.endpoints.is_empty() && !path.exists());
    }

    #[tokio::test]
    async fn endpoints_are_taken_over_and_a_container_that_is_not_there_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, render(&document()).unwrap()).unwrap();
        let restored = restore(&path, &document().origin, Duration::MAX, &Arc::default());
        assert!(restored.listing.is_none());
        let (query, kept) = restored.endpoints.iter().next().unwrap();
        assert_eq!(query.to_string(), "consul redis[eu,prod] port 53 in dc1");
        assert_eq!(kept.endpoints.list.len(), 2);
        assert!(path.exists());

        // It is not an endpoint any more either.
        let of_containers = ["consul".into()].into();
        let here = Origin { of_containers, ..document().origin };
        let restored = restore(&path, &here, Duration::MAX, &Arc::default());
        assert!(restored.endpoints.is_empty(), "{restored:?}");
    }

    #[tokio::test]
    async fn the_age_of_an_answer_is_its_own_and_bounds_its_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut document = document();
        document.written = now;
        document.answers.values_mut().for_each(|answer| answer.confirmed = now - 1000);
        fs::write(&path, render(&document).unwrap()).unwrap();
        let restore = |seconds| {
            let max_age = Duration::from_secs(seconds);
            super::restore(&path, &document.origin, max_age, &Arc::default()).endpoints
        };
        assert!(restore(900).is_empty());
        let kept = restore(5000).into_values().next().unwrap();
        let (age, left) = (kept.confirmed.elapsed(), kept.until.duration_since(Instant::now()));
        assert!(age >= Duration::from_secs(1000), "{age:?}");
        assert!(left <= Duration::from_secs(4000), "{left:?}");
    }

    #[tokio::test]
    async fn what_others_can_have_written_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let whole = render(&document()).unwrap();
        let is_used = || {
            !super::restore(&path, &document().origin, Duration::MAX, &Arc::default())
                .endpoints
                .is_empty()
        };
        let write = |mode| {
            fs::write(&path, &whole).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        };
        write(0o600);
        assert!(is_used());
        write(0o620);
        assert!(!is_used() && !path.exists());
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, &whole).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(!is_used());
        if rustix::process::geteuid().is_root() {
            write(0o600);
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert!(!is_used());
        }
    }
}
