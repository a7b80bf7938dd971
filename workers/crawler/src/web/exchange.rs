//! One request and its answer, with caps on everything a server can stretch.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capfilt_schemas::FetchStatus;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER, USER_AGENT};
use reqwest::{Client, Proxy, redirect};
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use super::Failure;
use crate::config::{CrawlerWorkerConfig, WebConfig};
use crate::opt_out::Directives;
use crate::{CrawlError, html};

/// Why an attempt that takes too long ends.
const LATE: &str = "the time for one attempt passed";

/// What an answer is wanted for; it decides what is read of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// All of the body, or a failure; nothing if the headers opt out.
    Image,
    /// The beginning of the body; nothing if it is no HTML.
    Page,
    /// The beginning of the body.
    Text,
}

impl Want {
    const fn accept(self) -> &'static str {
        match self {
            Self::Image => "image/webp,image/png,image/jpeg,image/gif,image/bmp,image/*;q=0.8,*/*;q=0.5",
            Self::Page => "text/html,application/xhtml+xml,*/*;q=0.5",
            Self::Text => "text/plain,text/xml,application/xml,*/*;q=0.5",
        }
    }
}

/// One answer, and where it came from.
pub(crate) struct Answer {
    /// After redirects.
    pub(crate) url: Url,
    pub(crate) http_status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    /// The connection's place in the count: given back with the body, so that no more bodies wait for their work than are allowed to
    /// be on the way.
    pub(super) _place: Option<OwnedSemaphorePermit>,
}

impl Answer {
    pub(crate) fn content_type(&self) -> Option<&str> {
        self.headers.get(CONTENT_TYPE)?.to_str().ok()
    }

    /// Whether the answer says that it is HTML, or says nothing.
    pub(crate) fn may_be_html(&self) -> bool {
        may_be_html(&self.headers)
    }
}

fn may_be_html(headers: &HeaderMap) -> bool {
    html::is_html(headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()))
}

/// Either the answer, or where it sends us.
pub(super) enum Reply {
    Answer(Answer),
    Redirect(Url),
}

/// The client: connections are kept and reused, redirects are left to the caller, and the environment's proxy settings do not count.
pub(super) fn client(config: &CrawlerWorkerConfig) -> Result<Client, CrawlError> {
    let fail = |e: &dyn Error| CrawlError::Client(e.to_string());
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| fail(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let mut builder = Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(redirect::Policy::none())
        .referer(false)
        .retry(reqwest::retry::never())
        .no_proxy()
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_max_idle_per_host(config.per_host)
        .dns_resolver(Resolver { fixed: config.resolve.clone() });
    if let Some(proxy) = &config.proxy {
        builder = builder.proxy(Proxy::all(proxy).map_err(|e| fail(&e))?);
    }
    builder.build().map_err(|e| fail(&e))
}

/// The system's resolver behind the fixed addresses of the config.
struct Resolver {
    fixed: std::collections::BTreeMap<String, SocketAddr>,
}

impl reqwest::dns::Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let fixed = self.fixed.get(name.as_str()).or_else(|| self.fixed.get("*")).copied();
        Box::pin(async move {
            let addresses: Vec<SocketAddr> = match fixed {
                Some(address) => vec![address],
                None => tokio::net::lookup_host((name.as_str(), 0)).await?.collect(),
            };
            Ok(Box::new(addresses.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// Asks once. The whole of it, from the connection to the last byte that is wanted, takes `within` at most.
pub(super) async fn exchange(
    client: &Client,
    url: &Url,
    web: &WebConfig,
    want: Want,
    max_body: usize,
    within: Duration,
) -> Result<Reply, Failure> {
    let work = exchange_unbounded(client, url, web, want, max_body);
    match tokio::time::timeout(within, work).await {
        Ok(reply) => reply,
        Err(_) => Err(Failure::new(FetchStatus::Timeout, LATE)),
    }
}

async fn exchange_unbounded(client: &Client, url: &Url, web: &WebConfig, want: Want, max_body: usize) -> Result<Reply, Failure> {
    let request = client.get(url.clone()).header(USER_AGENT, &web.agent).header(ACCEPT, want.accept());
    let mut response = request.send().await.map_err(|e| classify(&e, FetchStatus::Connect))?;
    let code = response.status().as_u16();
    let fail = |status, reason: String| Failure { http_status: Some(code), ..Failure::new(status, reason) };
    match code {
        200..300 => {}
        301 | 302 | 303 | 307 | 308 => {
            return redirect_target(url, response.headers()).map(Reply::Redirect).map_err(|e| fail(FetchStatus::Redirect, e));
        }
        429 | 500.. => {
            let status = if code == 429 { FetchStatus::RateLimited } else { FetchStatus::HttpServer };
            let retry_after = retry_after(response.headers());
            return Err(Failure { retry_after, ..fail(status, format!("http {code}")) });
        }
        300..400 => return Err(fail(FetchStatus::Redirect, format!("http {code} is no redirect that can be followed"))),
        _ => return Err(fail(FetchStatus::HttpClient, format!("http {code}"))),
    }
    let headers = std::mem::take(response.headers_mut());
    let answer =
        |body| Ok(Reply::Answer(Answer { url: url.clone(), http_status: code, headers: headers.clone(), body, _place: None }));
    if want == Want::Image
        && web.opt_out
        && let Some(wish) = Directives::of_headers(&headers, web.token()).refusal()
    {
        return Err(fail(FetchStatus::OptOut, format!("the answer says {wish}")));
    }
    if want == Want::Page && !may_be_html(&headers) {
        return answer(Vec::new());
    }
    let cut = want != Want::Image;
    let told = response.content_length().unwrap_or(0);
    if !cut && told > max_body as u64 {
        return Err(fail(FetchStatus::TooLarge, format!("the body has {told} bytes, more than {max_body}")));
    }
    let mut body = Vec::new();
    loop {
        let chunk = match response.chunk().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return answer(body),
            Err(e) => {
                let failure = classify(&e, FetchStatus::Truncated);
                return Err(Failure { http_status: (failure.status != FetchStatus::Timeout).then_some(code), ..failure });
            }
        };
        let room = max_body - body.len();
        if chunk.len() > room {
            if !cut {
                return Err(fail(FetchStatus::TooLarge, format!("the body has more than {max_body} bytes")));
            }
            body.extend_from_slice(&chunk[..room]);
            return answer(body);
        }
        body.extend_from_slice(&chunk);
    }
}

pub(super) fn redirect_target(from: &Url, headers: &HeaderMap) -> Result<Url, String> {
    let location = headers.get(LOCATION).ok_or("a redirect without a location")?;
    let location = String::from_utf8_lossy(location.as_bytes());
    let mut target = from.join(location.trim()).map_err(|e| format!("a redirect to an address that cannot be read ({e})"))?;
    target.set_fragment(None);
    let usable = matches!(target.scheme(), "http" | "https") && target.has_host() && target.as_str().len() <= html::MAX_URL;
    if usable { Ok(target) } else { Err("a redirect to what is no http or https address".to_owned()) }
}

/// How long the server asks to wait: seconds, or a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(std::time::SystemTime::now()).unwrap_or(Duration::ZERO))
}

/// The status of a request that failed before an answer (`otherwise` is `Connect`) or in its body (`Truncated`).
///
/// The reason is one of a few sentences: how the system words a broken connection differs from one time to the next, and rows must not.
/// Its own words go to the log.
pub(super) fn classify(error: &reqwest::Error, otherwise: FetchStatus) -> Failure {
    let mut status = if error.is_timeout() {
        FetchStatus::Timeout
    } else if error.is_dns() {
        FetchStatus::Dns
    } else {
        otherwise
    };
    let mut next = error.source();
    while let Some(cause) = next {
        if is_tls(cause) {
            status = FetchStatus::Tls;
        }
        // hyper tells this to servers only in a typed way.
        if cause.to_string() == "message head is too large" {
            status = FetchStatus::TooLarge;
        }
        next = cause.source();
    }
    tracing::debug!(%status, ?error, "request failed");
    let reason = match status {
        FetchStatus::Timeout => LATE,
        FetchStatus::Dns => "the host's name could not be resolved",
        FetchStatus::Tls => "tls failed",
        FetchStatus::TooLarge => "the headers are too large",
        FetchStatus::Truncated => "the body broke off",
        _ => "no connection, or it broke before an answer",
    };
    Failure::new(status, reason)
}

/// Whether it is an error of TLS, or an I/O error that wraps one.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.is::<rustls::Error>() || wrapped.is_some_and(|inner| is_tls(inner))
}

/// Time that is used up only while we wait for the server, not while we wait for a turn.
pub(super) struct Budget {
    left: Duration,
}

impl Budget {
    pub(super) const fn new(left: Duration) -> Self {
        Self { left }
    }

    /// Runs `work` with what is left, and takes off what it used.
    pub(super) async fn spend<T>(&mut self, work: impl AsyncFnOnce(Duration) -> T) -> T {
        let start = Instant::now();
        let result = work(self.left).await;
        self.left = self.left.saturating_sub(start.elapsed());
        result
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let of = |value: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]));
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(100));
        assert!((90..=100).contains(&of(&soon).unwrap().as_secs()));
        assert_eq!(of("soon"), None);
        assert_eq!(of("-1"), None);
    }

    #[test]
    fn redirects_lead_to_the_web_only() {
        let from = Url::parse("http://a.test/x/y").unwrap();
        let to = |location: &str| {
            redirect_target(&from, &HeaderMap::from_iter([(LOCATION, location.parse().unwrap())])).map(String::from)
        };
        assert_eq!(to("z?q#f").as_deref(), Ok("http://a.test/x/z?q"));
        assert_eq!(to("//b.test").as_deref(), Ok("http://b.test/"));
        for bad in ["file:///etc/passwd", "data:,x", "http://", "ftp://a.test/"] {
            assert!(to(bad).is_err(), "{bad}");
        }
        assert!(redirect_target(&from, &HeaderMap::new()).is_err());
    }
}
