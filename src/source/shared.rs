//! One source behind many: an engine or a file that is followed once, however many queries it answers.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::task::AbortHandle;

use super::{Answers, Publisher, ResyncRequests, Source, SourceError, follow, panicked};

/// A source that its readers share. The first one starts it, and with the last one it ends. Clones are the same.
#[derive(Debug)]
pub struct Shared<T>(Arc<Mutex<Weak<Running<T>>>>);

/// A followed source; dropped, it ends.
#[derive(Debug)]
struct Running<T> {
    answers: Answers<T>,
    task: AbortHandle,
}

impl<T: Clone + PartialEq + Send + Sync + 'static> Shared<T> {
    /// Publishes for ever what `answer` makes of each answer from `source`, and passes its failures on. `name` is what
    /// the log calls the source.
    pub async fn derive<S, U>(
        &self,
        name: &str,
        source: impl FnOnce() -> S,
        resync: &ResyncRequests,
        publish: &Publisher<U>,
        answer: impl Fn(&T) -> U,
    ) where
        S: Source<Item = T> + 'static,
        U: PartialEq,
    {
        let running = self.running(name, source, resync);
        pass_on(running.answers.clone(), publish, answer).await;
    }

    fn running<S: Source<Item = T> + 'static>(
        &self,
        name: &str,
        source: impl FnOnce() -> S,
        resync: &ResyncRequests,
    ) -> Arc<Running<T>> {
        // A panic elsewhere leaves the reference whole.
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.upgrade().unwrap_or_else(|| {
            // Nobody waits for the bell: the readers hear of every change through `answers`.
            let (publish, answers) = Publisher::new(Arc::default());
            let (name, source, resync) = (name.to_owned(), source(), resync.subscribe());
            let task = tokio::spawn(async move { follow(&name, source, publish, resync).await });
            let running = Arc::new(Running { answers, task: task.abort_handle() });
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

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass_on<T: Clone, U: PartialEq>(
    mut source: Answers<T>,
    publish: &Publisher<U>,
    answer: impl Fn(&T) -> U,
) {
    let (mut answers, mut failures) = (0, 0);
    loop {
        let known = source.borrow_and_update().clone();
        if let Some(value) = known.value.filter(|_| known.answers != answers) {
            answers = known.answers;
            match catch_unwind(AssertUnwindSafe(|| answer(&value))) {
                Ok(value) => {
                    publish.publish(value);
                }
                Err(panic) => {
                    if let Err(error) = panicked::<()>(panic) {
                        publish.fail(&error);
                    }
                }
            }
        }
        if let Some(error) = known.error.filter(|_| known.failures != failures) {
            publish.fail(&SourceError::new(error));
            failures = known.failures;
        }
        if source.changed().await.is_err() {
            return publish.fail(&SourceError::new("what this comes from has ended"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let first = shared.running("one", || One, &resync);
        let second = shared.clone().running("one", || One, &resync);
        assert!(Arc::ptr_eq(&first, &second));
        let mut answers = first.answers.clone();
        answers.wait_for(|known| known.answers == 1).await.unwrap();
        drop(first);
        assert!(Arc::ptr_eq(&second, &shared.running("one", || One, &resync)));
        drop(second);
        while answers.changed().await.is_ok() {} // until its task, which holds the other end, has gone
        let (publish, mut answers) = Publisher::new(Arc::default());
        tokio::spawn(async move { shared.derive("one", || One, &resync, &publish, |n| *n).await });
        answers.wait_for(|known| known.answers == 1).await.unwrap();
    }
}
