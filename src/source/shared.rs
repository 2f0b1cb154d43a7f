//! One source with many readers: an engine or a file is followed once, however many queries use it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::task::AbortHandle;

use super::{Answers, Publisher, SourceError, panicked};

/// A source that its readers share. The first reader starts it, and the end of the last one stops it. Clones share it.
#[derive(Debug)]
pub struct Shared<T>(Arc<Mutex<Weak<FollowedSource<T>>>>);

/// A followed source. Dropping it stops it.
#[derive(Debug)]
struct FollowedSource<T> {
    answers: Answers<T>,
    task: AbortHandle,
}

impl<T: Clone + PartialEq + Send + Sync + 'static> Shared<T> {
    /// Publishes what `answer` derives from each answer of the source, and passes its failures on. Never returns. `start`
    /// creates the task that follows the source, if there is none yet.
    pub async fn derive<F, U>(
        &self,
        start: impl FnOnce(Publisher<T>) -> F,
        publish: &Publisher<U>,
        answer: impl FnMut(&T) -> U,
    ) where
        F: Future<Output = ()> + Send + 'static,
        U: PartialEq,
    {
        let running = self.running(start);
        pass_on(running.answers.clone(), publish, answer).await;
    }

    fn running<F>(&self, start: impl FnOnce(Publisher<T>) -> F) -> Arc<FollowedSource<T>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // A panic elsewhere leaves the reference intact.
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.upgrade().unwrap_or_else(|| {
            // No task waits for this bell: readers get every change through `answers`.
            let (publish, answers) = Publisher::new(Arc::default());
            let task = tokio::spawn(start(publish));
            let running = Arc::new(FollowedSource { answers, task: task.abort_handle() });
            *slot = Arc::downgrade(&running);
            running
        })
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Drop for FollowedSource<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass_on<T: Clone, U: PartialEq>(
    mut source: Answers<T>,
    publish: &Publisher<U>,
    mut answer: impl FnMut(&T) -> U,
) {
    let (mut answers, mut failures) = (0, 0);
    let mut answered: Option<Arc<T>> = None;
    loop {
        let known = source.borrow_and_update().clone();
        if let Some(value) = known.value.filter(|_| known.answers != answers) {
            answers = known.answers;
            if answered.as_ref().is_some_and(|answered| Arc::ptr_eq(answered, &value)) {
                publish.confirm();
            } else {
                answered = match catch_unwind(AssertUnwindSafe(|| answer(&value))) {
                    Ok(answer) => {
                        publish.publish(answer);
                        Some(value)
                    }
                    Err(panic) => {
                        if let Err(error) = panicked::<()>(panic) {
                            publish.fail(&error);
                        }
                        None
                    }
                };
            }
        }
        if let Some(error) = known.error.filter(|_| known.failures != failures) {
            let error = SourceError::new(error);
            publish.fail(&match known.fix {
                Some(fix) => error.fixed_by(fix),
                None => error,
            });
            failures = known.failures;
        }
        if source.changed().await.is_err() {
            return publish.fail(&SourceError::new("the shared source has ended"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{ResyncRequests, Source, follow};

    #[tokio::test(start_paused = true)]
    async fn readers_know_what_the_source_knows() {
        let (publish, source) = Publisher::new(Arc::default());
        publish.publish(1);
        publish.fail(&SourceError::new("gone"));
        let (derived, mut answers) = Publisher::new(Arc::default());
        tokio::spawn(async move { pass_on(source, &derived, |n| n * 10).await });

        let known = answers.wait_for(|known| known.failures == 1).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error.as_deref()), (Some(&10), Some("gone")));
        publish.publish(2);
        let known = answers.wait_for(|known| known.answers == 2).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error), (Some(&20), None));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_cannot_be_made_is_a_failure_and_the_next_one_is_tried() {
        let (publish, source) = Publisher::new(Arc::default());
        let (derived, mut answers) = Publisher::new(Arc::default());
        let tenth = |n: &u32| 10_u32.checked_div(*n).expect("thrown on purpose");
        tokio::spawn(async move { pass_on(source, &derived, tenth).await });
        publish.publish(0);
        let known = answers.wait_for(|known| known.failures == 1).await.unwrap().clone();
        assert!(known.error.unwrap().contains("thrown on purpose"));
        publish.publish(2);
        let known = answers.wait_for(|known| known.answers == 1).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error), (Some(&5), None));
    }

    struct One;

    impl Source for One {
        type Item = u32;

        async fn session(
            &mut self,
            publish: &Publisher<u32>,
            _: &mut super::super::Resync,
        ) -> Result<(), SourceError> {
            publish.publish(1);
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_runs_once_and_ends_with_its_last_reader() {
        let shared = Shared::default();
        let resync = ResyncRequests::new(std::time::Duration::from_secs(120));
        let start = |publish| follow("one", One, publish, resync.subscribe());
        let first = shared.running(start);
        let second = shared.clone().running(start);
        assert!(Arc::ptr_eq(&first, &second));
        let mut answers = first.answers.clone();
        answers.wait_for(|known| known.answers == 1).await.unwrap();
        drop(first);
        assert!(Arc::ptr_eq(&second, &shared.running(start)));
        drop(second);
        while answers.changed().await.is_ok() {} // until its task, which holds the other end, has gone
        let (publish, mut answers) = Publisher::new(Arc::default());
        tokio::spawn(async move {
            let start = |publish| follow("one", One, publish, resync.subscribe());
            shared.derive(start, &publish, |n| *n).await
        });
        answers.wait_for(|known| known.answers == 1).await.unwrap();
    }
}
