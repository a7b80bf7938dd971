//! Why there is no answer, and what that says of another attempt and of the host.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use capfilt_schemas::FetchStatus;

use super::client::Forbidden;
use super::dns::{NoAddress, is_out_of_files};

/// Why an attempt that takes too long ends.
pub(super) const LATE: &str = "the time for one attempt passed";

/// Why there is no answer.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) status: FetchStatus,
    pub(crate) http_status: Option<u16>,
    pub(crate) reason: String,
    /// What the server asks to wait before the next attempt.
    pub(super) retry_after: Option<Duration>,
    /// Whether the same request may succeed later.
    pub(super) may_pass: bool,
    /// Whether the host gave no sign of life.
    pub(super) silent: bool,
    /// Whether it is this machine that could not: the attempt does not count.
    pub(super) ours: bool,
}

/// Whether a further attempt is worth while within minutes: certificates are not renewed that fast.
pub(super) const fn may_pass_soon(status: FetchStatus) -> bool {
    status.is_transient() && !matches!(status, FetchStatus::Tls)
}

impl Failure {
    pub(crate) fn new(status: FetchStatus, reason: impl Into<String>) -> Self {
        let may_pass = may_pass_soon(status);
        Self { status, http_status: None, reason: reason.into(), retry_after: None, may_pass, silent: false, ours: false }
    }

    /// The address's time is up.
    pub(super) fn late() -> Self {
        Self { may_pass: false, ..Self::new(FetchStatus::Timeout, "the deadline for the address passed") }
    }

    /// Nothing inside a network is asked.
    pub(super) fn forbidden() -> Self {
        Self::new(FetchStatus::ForbiddenAddress, Forbidden.to_string())
    }

    /// The process has no file left for another connection.
    pub(super) fn out_of_files() -> Self {
        Self { ours: true, ..Self::new(FetchStatus::Connect, "too many open files") }
    }
}

/// The status of a request that failed before an answer (`otherwise` is `Connect`) or in its body (`Truncated`).
///
/// The reason is one of a few sentences: how the system words a broken connection differs from one time to the next, and rows must not.
/// Its own words go to the log.
pub(super) fn classify(error: reqwest::Error, otherwise: FetchStatus) -> Failure {
    // A key may stand in the address, and errors are logged.
    let error = error.without_url();
    let mut status = if error.is_timeout() { FetchStatus::Timeout } else { otherwise };
    let mut failure = None;
    let mut next = error.source();
    while let Some(cause) = next {
        if is_tls(cause) {
            status = FetchStatus::Tls;
        }
        // hyper tells this to servers only in a typed way.
        if cause.to_string() == "message head is too large" {
            status = FetchStatus::TooLarge;
        }
        if cause.is::<Forbidden>() {
            failure = Some(Failure::forbidden());
        }
        match cause.downcast_ref::<NoAddress>() {
            Some(NoAddress::OutOfFiles) => failure = Some(Failure::out_of_files()),
            Some(none @ NoAddress::Absent) => {
                failure = Some(Failure { may_pass: false, ..Failure::new(FetchStatus::Dns, none.to_string()) });
            }
            Some(none @ NoAddress::Failed { until }) => {
                let retry_after = Some(until.saturating_duration_since(Instant::now()));
                failure = Some(Failure { retry_after, ..Failure::new(FetchStatus::Dns, none.to_string()) });
            }
            None => {}
        }
        if cause.downcast_ref::<io::Error>().is_some_and(is_out_of_files) {
            failure = Some(Failure::out_of_files());
        }
        next = cause.source();
    }
    tracing::debug!(%status, ?error, "request failed");
    if let Some(failure) = failure {
        return failure;
    }
    let reason = match status {
        FetchStatus::Timeout if error.is_connect() => "no connection in time",
        FetchStatus::Timeout => LATE,
        FetchStatus::Tls => "tls failed",
        FetchStatus::TooLarge => "the headers are too large",
        FetchStatus::Truncated => "the body broke off",
        _ => "no connection, or it broke before an answer",
    };
    let silent = matches!(status, FetchStatus::Timeout | FetchStatus::Connect);
    Failure { silent, ..Failure::new(status, reason) }
}

/// Whether it is an error of TLS, or an I/O error that wraps one.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.is::<rustls::Error>() || wrapped.is_some_and(|inner| is_tls(inner))
}
