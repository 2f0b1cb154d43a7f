//! The bodies of answers, and files: limited in size. Only a few large ones are read at a time, and large ones are parsed
//! on threads on which no task waits.

#![expect(clippy::disallowed_methods, reason = "a thread of its own reads the file")]

use std::{
    fs,
    io::{Error, ErrorKind, Read, Result},
    panic::resume_unwind,
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// Maximum size of an answer that needs no place, in bytes.
const SMALL: usize = 256 << 10;
/// Maximum number of bytes that are parsed immediately, which takes at most some milliseconds.
const QUICK: usize = 64 << 10;

/// Places for the large answers of one peer, and threads to parse them. Each peer has its own. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct AnswerPlaces {
    bodies: Arc<Semaphore>,
    threads: Arc<Semaphore>,
}

impl Default for AnswerPlaces {
    fn default() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self { bodies: places(Self::AT_A_TIME), threads: places(Self::THREADS) }
    }
}

impl AnswerPlaces {
    /// Number of large answers at a time. Others wait, and so does the peer.
    const AT_A_TIME: usize = 3;
    /// Number of them that are parsed at a time, so that a slow one does not delay the next.
    const THREADS: usize = 2;
}

/// The part of an answer that was read so far.
#[derive(Debug, Default)]
pub(crate) struct Body {
    bytes: Vec<u8>,
    /// Set if it is large.
    place: Option<OwnedSemaphorePermit>,
}

/// An answer is longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer is longer than {0} bytes")]
pub(crate) struct TooLong(pub(crate) usize);

impl Body {
    /// Adds a piece, as long as there are at most `largest` bytes. Returns how long it waited for a place, for which the
    /// peer is not to blame.
    pub(crate) async fn add(
        &mut self,
        piece: &[u8],
        largest: usize,
        places: &AnswerPlaces,
    ) -> std::result::Result<Duration, TooLong> {
        let mut waited = Duration::ZERO;
        let length = self.bytes.len() + piece.len();
        if length > largest {
            return Err(TooLong(largest));
        }
        if length > SMALL && self.place.is_none() {
            let start = Instant::now();
            // The semaphore is never closed.
            self.place = places.bodies.clone().acquire_owned().await.ok();
            waited = start.elapsed();
        }
        self.bytes.extend_from_slice(piece);
        Ok(waited)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The result of `parse`. A large answer is parsed on another thread.
    pub(crate) async fn parsed<T: Send + 'static>(
        self,
        places: &AnswerPlaces,
        parse: impl FnOnce(&[u8]) -> T + Send + 'static,
    ) -> T {
        places.aside(self.bytes.len(), move || parse(&self.bytes)).await
    }
}

#[cfg(test)]
impl AnswerPlaces {
    /// Number of further large answers for which there is a place.
    pub(crate) fn free(&self) -> usize {
        self.bodies.available_permits()
    }

    pub(crate) async fn take_all(&self) -> OwnedSemaphorePermit {
        self.bodies.clone().acquire_many_owned(Self::AT_A_TIME as u32).await.unwrap()
    }
}

/// Whether work on this many bytes would delay other tasks.
pub(crate) fn is_large(bytes: usize) -> bool {
    bytes > QUICK
}

impl AnswerPlaces {
    /// Does work on this many bytes of the peer's: immediately, or on another thread if it would delay other tasks.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if !is_large(bytes) {
            return work();
        }
        // The semaphore is never closed.
        let place = self.threads.clone().acquire_owned().await;
        let work = move || {
            // Held even if the caller is gone.
            let _place = place;
            work()
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// Reads a regular text file of at most `largest` bytes. Blocks the thread.
pub(crate) fn file(path: &Path, largest: usize) -> Result<String> {
    let wrong = |reason: String| Err(Error::new(ErrorKind::InvalidInput, reason));
    // Opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return wrong("expected a regular file".to_owned());
    }
    let mut text = String::new();
    fs::File::open(path)?.take(largest as u64 + 1).read_to_string(&mut text)?;
    if text.len() > largest {
        return wrong(format!("longer than {largest} bytes"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_body_has_an_end_and_few_are_large_at_a_time() {
        let places = AnswerPlaces::default();
        let mut body = Body::default();
        assert_eq!(body.add(b"abc", 4, &places).await, Ok(Duration::ZERO));
        assert_eq!(body.add(b"de", 4, &places).await, Err(TooLong(4)));
        assert_eq!(body.bytes(), b"abc");

        let large = vec![0; SMALL + 1];
        let fill = || async {
            let mut body = Body::default();
            body.add(&large, usize::MAX, &places).await.unwrap();
            body
        };
        let mut all = Vec::new();
        for _ in 0..AnswerPlaces::AT_A_TIME {
            all.push(fill().await);
        }
        let one_more = || timeout(Duration::from_millis(50), fill());
        assert!(one_more().await.is_err(), "there is no place");
        // Small ones do not wait.
        let mut small = Body::default();
        small.add(&large[..SMALL], usize::MAX, &places).await.unwrap();
        all.pop();
        let kept = one_more().await.unwrap();
        assert!(one_more().await.is_err());
        drop(kept);
        assert!(one_more().await.is_ok());
    }

    #[tokio::test]
    async fn what_is_large_is_parsed_on_another_thread() {
        let (here, places) = (std::thread::current().id(), AnswerPlaces::default());
        let on = |bytes| places.aside(bytes, || std::thread::current().id());
        assert_eq!(on(QUICK).await, here);
        assert_ne!(on(QUICK + 1).await, here);
        // This many at a time for a peer. Another peer does not wait for them.
        let busy: Vec<_> = (0..AnswerPlaces::THREADS)
            .map(|_| {
                let (places, (go, wait)) = (places.clone(), std::sync::mpsc::channel::<()>());
                let work = async move { places.aside(QUICK + 1, move || wait.recv()).await };
                (tokio::spawn(work), go)
            })
            .collect();
        while places.threads.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(timeout(Duration::from_millis(50), on(QUICK + 1)).await.is_err());
        assert_ne!(
            AnswerPlaces::default().aside(QUICK + 1, || std::thread::current().id()).await,
            here
        );
        for (task, go) in busy {
            go.send(()).unwrap();
            task.await.unwrap().unwrap();
        }
        on(QUICK + 1).await;
    }

    #[test]
    fn a_file_is_regular_and_not_too_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert!(file(&path, 3).is_err());
        fs::write(&path, "abc").unwrap();
        assert_eq!(file(&path, 3).unwrap(), "abc");
        assert_eq!(file(&path, 2).unwrap_err().to_string(), "longer than 2 bytes");
        let error = file(folder.path(), 3).unwrap_err().to_string();
        assert_eq!(error, "expected a regular file");
    }
}
