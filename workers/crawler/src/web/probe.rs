//! One look at a server, for a person who wants to know whether this machine can reach it.

use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{DATE, USER_AGENT};
use url::Url;

use super::Web;
use super::client::Forbidden;
use super::failure::classify;
use crate::config::WebConfig;

/// What was seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The code of the answer; redirects are not followed.
    pub http_status: u16,
    /// From the question to the head of the answer.
    pub head: Duration,
    /// The server's clock, to the second.
    pub date: Option<SystemTime>,
    /// Bytes of the body that came.
    pub bytes: u64,
    /// The time that they took.
    pub body: Duration,
}

impl Web {
    /// Asks once, without robots.txt and without further attempts, and reads `max_bytes` of the body, or as many as come `within`.
    ///
    /// # Errors
    /// A sentence that says what failed.
    pub async fn probe(&self, url: &Url, agent: &str, within: Duration, max_bytes: u64) -> Result<Probe, String> {
        if !self.inner.route.admits(url) {
            return Err(format!("{Forbidden}; worker.crawler.allow_networks can allow it"));
        }
        let clients = self.clients(&WebConfig::default()).map_err(|failure| failure.reason)?;
        let (begin, deadline) = (Instant::now(), tokio::time::Instant::now() + within);
        let request = clients.fresh.get(url.clone()).header(USER_AGENT, agent).send();
        let answered = tokio::time::timeout_at(deadline, request).await.map_err(|_| format!("no answer within {within:?}"))?;
        let mut response = answered.map_err(|e| classify(e, capfilt_schemas::FetchStatus::Connect).reason)?;
        let head = begin.elapsed();
        let date = response.headers().get(DATE).and_then(|v| httpdate::parse_http_date(v.to_str().ok()?).ok());
        let (mut bytes, begin) = (0, Instant::now());
        while bytes < max_bytes
            && let Ok(Ok(Some(chunk))) = tokio::time::timeout_at(deadline, response.chunk()).await
        {
            bytes += chunk.len() as u64;
        }
        Ok(Probe { http_status: response.status().as_u16(), head, date, bytes, body: begin.elapsed() })
    }
}
