//! Values that many tasks share: one task gets them for all.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{sync::Mutex, time::Instant};

use crate::source::{Backoff, SourceError};

/// A value that many tasks use, such as a connection. The first task that needs it creates it, and again the first one
/// after it was lost. While it cannot be created, all tasks get the same error immediately, and one of them tries again
/// after each pause.
pub(super) struct Reused<T>(Mutex<Slot<T>>);

struct Slot<T> {
    made: Option<Arc<T>>,
    /// Why it could not be created, and when the next attempt is allowed.
    failed: Option<(SourceError, Instant)>,
    backoff: Backoff,
}

impl<T> Default for Reused<T> {
    fn default() -> Self {
        Self(Mutex::new(Slot { made: None, failed: None, backoff: Backoff::default() }))
    }
}

impl<T> Reused<T> {
    /// The value. Created by `make` if there is none.
    pub(super) async fn get(
        &self,
        make: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<Arc<T>, SourceError> {
        let mut slot = self.0.lock().await;
        if let Some(made) = &slot.made {
            return Ok(made.clone());
        }
        if let Some((error, _)) = slot.failed.as_ref().filter(|(_, until)| Instant::now() < *until)
        {
            return Err(error.clone());
        }
        match make.await {
            Ok(made) => {
                let made = Arc::new(made);
                *slot =
                    Slot { made: Some(made.clone()), failed: None, backoff: Backoff::default() };
                Ok(made)
            }
            Err(error) => {
                // The shortest pause: a caller that waited this long after the same failure really tries again.
                let pause = slot.backoff.next(0.0);
                slot.failed = Some((error.clone(), Instant::now() + pause));
                Err(error)
            }
        }
    }

    /// Discards the value if it is still the current one: many tasks lose the same one at the same time.
    pub(super) async fn lost(&self, lost: &Arc<T>) {
        let made = &mut self.0.lock().await.made;
        if made.as_ref().is_some_and(|made| Arc::ptr_eq(made, lost)) {
            *made = None;
        }
    }
}

impl<T> fmt::Debug for Reused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reused")
    }
}

/// How long a failed question is remembered.
const FAILED: Duration = Duration::from_millis(500);

/// The answer to a question that many tasks ask. It is not asked again while the answer is recent.
#[derive(Debug)]
pub(super) struct Recent<T>(Mutex<Option<(Instant, Result<T, SourceError>)>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Recent<T> {
    /// The answer, at most `age` old. A failure is only shared by tasks that ask at the same time.
    pub(super) async fn get(
        &self,
        age: Duration,
        ask: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<T, SourceError> {
        let mut last = self.0.lock().await;
        if let Some((at, answer)) = &*last
            && at.elapsed() < if answer.is_ok() { age } else { age.min(FAILED) }
        {
            return answer.clone();
        }
        let answer = ask.await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_makes_it_for_all_and_another_only_once_it_is_lost() {
        let (reused, made) = (Reused::default(), AtomicUsize::new(0));
        let get = || {
            reused.get(async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(made.fetch_add(1, Relaxed))
            })
        };
        let all = join_all((0..300).map(|_| get())).await;
        assert!(all.iter().all(|one| one.as_deref() == Ok(&0)));
        let first = get().await.unwrap();
        // If many report the same loss, it counts once.
        reused.lost(&first).await;
        reused.lost(&first).await;
        assert_eq!(get().await.as_deref(), Ok(&1));
        reused.lost(&first).await;
        assert_eq!(get().await.as_deref(), Ok(&1));
    }

    #[tokio::test(start_paused = true)]
    async fn while_it_cannot_be_made_few_try() {
        let (reused, tries) = (Reused::<()>::default(), AtomicUsize::new(0));
        let get = || {
            reused.get(async {
                tries.fetch_add(1, Relaxed);
                Err(SourceError::new("no"))
            })
        };
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            let all = join_all((0..300).map(|_| get())).await;
            assert!(all.iter().all(|one| one.as_ref().err() == Some(&SourceError::new("no"))));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let tries = tries.load(Relaxed);
        // The attempts are 0.05, 0.1, 0.2, ... 2.5 s apart.
        assert!((20..=40).contains(&tries), "{tries} tries");
    }

    #[tokio::test(start_paused = true)]
    async fn a_recent_answer_is_everybodys() {
        let (recent, asked) = (Recent::default(), AtomicUsize::new(0));
        let get = || recent.get(Duration::from_secs(5), async { Ok(asked.fetch_add(1, Relaxed)) });
        let all = join_all((0..300).map(|_| get())).await;
        assert!(all.iter().all(|one| *one == Ok(0)));
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(get().await, Ok(1));
    }
}
