//! Where CPU and tensor work runs: never on a tokio thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use tokio::sync::{mpsc, oneshot};

use crate::StageError;

/// Runs `work` on the rayon pool. If the caller goes away the result is dropped.
///
/// # Errors
/// [`StageError::Panicked`] if `work` panics.
pub async fn on_rayon<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Result<R, StageError> {
    let (reply, answer) = oneshot::channel();
    let span = tracing::Span::current();
    rayon::spawn(move || {
        let result = span.in_scope(|| catch_unwind(AssertUnwindSafe(work)));
        let _ = reply.send(result);
    });
    match answer.await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(panic)) => Err(StageError::Panicked(panic_text(&*panic))),
        Err(_) => Err(StageError::Cancelled),
    }
}

/// Runs `work`, which may wait for disks or for others, on a thread for such work.
///
/// # Errors
/// [`StageError::Panicked`] if `work` panics; [`StageError::Cancelled`] if the runtime ends.
pub async fn on_blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Result<R, StageError> {
    let span = tracing::Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    done.map_err(|e| match e.try_into_panic() {
        Ok(panic) => StageError::Panicked(panic_text(&*panic)),
        Err(_) => StageError::Cancelled,
    })
}

type Job<M> = Box<dyn FnOnce(&mut M) + Send>;

/// One OS thread that owns a model (or any state) of one device and does one thing after the other.
///
/// The channel to it holds one job, so the next batch is prepared while this one is worked on, and not more.
pub struct ModelThread<M> {
    jobs: mpsc::Sender<Job<M>>,
}

impl<M> Clone for ModelThread<M> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

impl<M: 'static> ModelThread<M> {
    /// Starts the thread and waits until `load` has made the model in it.
    ///
    /// # Errors
    /// What `load` fails with; [`StageError::Panicked`].
    pub async fn spawn(name: &str, load: impl FnOnce() -> Result<M, StageError> + Send + 'static) -> Result<Self, StageError> {
        let (jobs, mut inbox) = mpsc::channel::<Job<M>>(1);
        let (ready, loaded) = oneshot::channel();
        let run = move || {
            let mut model = match catch_unwind(AssertUnwindSafe(load)) {
                Ok(Ok(model)) => model,
                Ok(Err(e)) => return drop(ready.send(Err(e))),
                Err(panic) => return drop(ready.send(Err(StageError::Panicked(panic_text(&*panic))))),
            };
            let _ = ready.send(Ok(()));
            while let Some(job) = inbox.blocking_recv() {
                job(&mut model);
            }
        };
        thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|e| StageError::Failed {
            message: format!("no thread for {name}"),
            retryable: true,
            source: Some(Box::new(e)),
        })?;
        loaded.await.map_err(|_| StageError::Cancelled)??;
        Ok(Self { jobs })
    }

    /// Runs `work` on the model's thread and waits for its answer.
    ///
    /// # Errors
    /// [`StageError::Panicked`] if `work` panics (the thread goes on).
    pub async fn call<R: Send + 'static>(&self, work: impl FnOnce(&mut M) -> R + Send + 'static) -> Result<R, StageError> {
        let (reply, answer) = oneshot::channel();
        let span = tracing::Span::current();
        let job: Job<M> = Box::new(move |model| {
            let result = span.in_scope(|| catch_unwind(AssertUnwindSafe(|| work(model))));
            let _ = reply.send(result);
        });
        self.jobs.send(job).await.map_err(|_| StageError::Cancelled)?;
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(panic)) => Err(StageError::Panicked(panic_text(&*panic))),
            Err(_) => Err(StageError::Cancelled),
        }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
