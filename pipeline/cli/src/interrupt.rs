//! When the program is asked to stop: Ctrl-C, or SIGTERM, as service managers and schedulers send it.

use tokio::signal::unix::{SignalKind, signal};

/// Waits until the program is asked to stop; for ever, if it cannot know.
pub(crate) async fn interrupted() {
    let of = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = of(SignalKind::interrupt()) => {}
        () = of(SignalKind::terminate()) => {}
    }
}
