//! One request and its answer, with caps on everything a server can stretch.

use std::time::{Duration, Instant};

use capfilt_schemas::FetchStatus;
use reqwest::header::{
    ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT,
};
use reqwest::{Client, Response};
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use super::failure::{Failure, LATE, classify};
use crate::address::{MAX_URL, is_web};
use crate::config::WebConfig;
use crate::html;
use crate::opt_out::Directives;

/// The stretch of time over which a body has to keep its least rate.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// What an answer is wanted for; it decides what is read of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// All of the body, or a failure; nothing if the headers opt out.
    Image,
    /// The beginning of the body; nothing if it is no HTML.
    Page,
    /// The beginning of the body.
    Text,
    /// All of the body, or a failure.
    Json,
}

impl Want {
    const fn accept(self) -> &'static str {
        match self {
            Self::Image => "image/webp,image/png,image/jpeg,image/gif,image/bmp,image/*;q=0.8,*/*;q=0.5",
            Self::Page => "text/html,application/xhtml+xml,*/*;q=0.5",
            Self::Text => "text/plain,text/xml,application/xml,*/*;q=0.5",
            Self::Json => "application/json",
        }
    }
}

/// A header that is sent along.
pub(crate) type Header = (HeaderName, HeaderValue);

/// One answer, and where it came from.
pub(crate) struct Answer {
    /// After redirects.
    pub(crate) url: Url,
    pub(crate) http_status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    /// The connection's place in the count: given back with the body, so that no more bodies wait for their work than are allowed to
    /// be on the way.
    pub(crate) connection: Option<OwnedSemaphorePermit>,
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

/// Asks once. The whole of it, from the connection to the last byte that is wanted, takes `within` at most.
pub(super) async fn exchange(
    client: &Client,
    url: &Url,
    web: &WebConfig,
    want: Want,
    key: Option<&Header>,
    max_body: usize,
    within: Duration,
) -> Result<Reply, Failure> {
    let deadline = tokio::time::Instant::now() + within;
    let mut request = client.get(url.clone()).header(USER_AGENT, &web.agent).header(ACCEPT, want.accept());
    if let Some((name, value)) = key {
        request = request.header(name, value);
    }
    let response = match tokio::time::timeout_at(deadline, request.send()).await {
        Ok(Ok(response)) => response,
        Ok(Err(e)) => return Err(classify(e, FetchStatus::Connect)),
        Err(_) => return Err(Failure { silent: true, ..Failure::new(FetchStatus::Timeout, LATE) }),
    };
    match tokio::time::timeout_at(deadline, receive(response, url, web, want, max_body, deadline)).await {
        Ok(reply) => reply,
        Err(_) => Err(Failure::new(FetchStatus::Timeout, LATE)),
    }
}

/// What is made of an answer once its head is there; somebody else ends it at `deadline`.
async fn receive(
    mut response: Response,
    url: &Url,
    web: &WebConfig,
    want: Want,
    max_body: usize,
    deadline: tokio::time::Instant,
) -> Result<Reply, Failure> {
    if let Some(target) = judge(&response, url)? {
        return Ok(Reply::Redirect(target));
    }
    let code = response.status().as_u16();
    let fail = |status, reason: String| Failure { http_status: Some(code), ..Failure::new(status, reason) };
    if code == 206 && !is_whole(response.headers()) {
        return Err(fail(FetchStatus::Truncated, "http 206 with a part that was not asked for".to_owned()));
    }
    let headers = std::mem::take(response.headers_mut());
    let answer = |body| {
        let headers = headers.clone();
        Ok(Reply::Answer(Answer { url: url.clone(), http_status: code, headers, body, connection: None }))
    };
    if want == Want::Image
        && web.opt_out
        && let Some(wish) = Directives::of_headers(&headers, web.token()).refusal()
    {
        return Err(fail(FetchStatus::OptOut, format!("the answer says {wish}")));
    }
    if want == Want::Page && !may_be_html(&headers) {
        return answer(Vec::new());
    }
    let cut = !matches!(want, Want::Image | Want::Json);
    let told = response.content_length().unwrap_or(0);
    if !cut && told > max_body as u64 {
        return Err(fail(FetchStatus::TooLarge, format!("the body has {told} bytes, more than {max_body}")));
    }
    let mut body = Vec::new();
    let mut rate = Rate::new(web.min_rate, deadline);
    loop {
        let chunk = match tokio::time::timeout_at(rate.next_look, response.chunk()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => return answer(body),
            Ok(Err(e)) => {
                let failure = classify(e, FetchStatus::Truncated);
                return Err(Failure { silent: false, http_status: Some(code), ..failure });
            }
            Err(_) if rate.keeps_up(body.len()) => continue,
            Err(_) => {
                let reason = format!("the body comes with less than {} bytes a second", web.min_rate);
                return Err(Failure::new(FetchStatus::Timeout, reason));
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

/// Judges an answer to a request for `url` by its head: where it sends us, or `None` if it is one of success.
pub(super) fn judge(answer: &Response, url: &Url) -> Result<Option<Url>, Failure> {
    let code = answer.status().as_u16();
    let fail = |status, reason: String| Err(Failure { http_status: Some(code), ..Failure::new(status, reason) });
    match code {
        ..200 => fail(FetchStatus::Connect, format!("http {code} was not asked for")),
        200..300 => Ok(None),
        301 | 302 | 303 | 307 | 308 => {
            redirect_target(url, answer.headers()).map(Some).or_else(|reason| fail(FetchStatus::Redirect, reason))
        }
        429 | 500.. => {
            let status = if code == 429 { FetchStatus::RateLimited } else { FetchStatus::HttpServer };
            let retry_after = retry_after(answer.headers());
            fail(status, format!("http {code}")).map_err(|failure| Failure { retry_after, ..failure })
        }
        300..400 => fail(FetchStatus::Redirect, format!("http {code} is no redirect that can be followed")),
        _ => fail(FetchStatus::HttpClient, format!("http {code}")),
    }
}

/// Whether a 206, which nobody asked for, brings all of it (RFC 9110, section 14.4).
fn is_whole(headers: &HeaderMap) -> bool {
    let range = headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok()?.trim().strip_prefix("bytes"));
    let Some((span, size)) = range.and_then(|r| r.trim().split_once('/')) else { return false };
    let Some((first, last)) = span.split_once('-') else { return false };
    let number = |text: &str| text.trim().parse::<u64>().ok();
    number(first) == Some(0) && number(size).zip(number(last)).is_some_and(|(size, last)| Some(last) == size.checked_sub(1))
}

/// Watches that a body keeps its least rate: it is looked at when a window is over, never while bytes flow. It is not looked at shortly
/// before the deadline, so that the same slow body always ends for the same reason.
struct Rate {
    need: usize,
    before: usize,
    next_look: tokio::time::Instant,
    deadline: tokio::time::Instant,
}

impl Rate {
    fn new(bytes_a_second: usize, deadline: tokio::time::Instant) -> Self {
        let need = bytes_a_second.saturating_mul(RATE_WINDOW.as_secs() as usize);
        let mut rate = Self { need, before: 0, next_look: tokio::time::Instant::now(), deadline };
        rate.plan();
        rate
    }

    fn plan(&mut self) {
        self.next_look += RATE_WINDOW;
        if self.next_look + RATE_WINDOW / 2 > self.deadline {
            self.next_look = self.deadline + RATE_WINDOW;
        }
    }

    /// To be asked at `next_look`, with the bytes so far.
    fn keeps_up(&mut self, bytes: usize) -> bool {
        let brought = bytes - self.before;
        self.before = bytes;
        self.plan();
        brought >= self.need
    }
}

fn redirect_target(from: &Url, headers: &HeaderMap) -> Result<Url, String> {
    let location = headers.get(LOCATION).ok_or("a redirect without a location")?;
    let location = String::from_utf8_lossy(location.as_bytes());
    let mut target = from.join(location.trim()).map_err(|e| format!("a redirect to an address that cannot be read ({e})"))?;
    target.set_fragment(None);
    let usable = is_web(&target) && target.as_str().len() <= MAX_URL;
    if usable { Ok(target) } else { Err("a redirect to what is no http or https address".to_owned()) }
}

/// How long the server asks to wait: seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Some(value.parse().map_or(Duration::MAX, Duration::from_secs));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(std::time::SystemTime::now()).unwrap_or(Duration::ZERO))
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
        assert_eq!(of("99999999999999999999999"), Some(Duration::MAX));
        assert_eq!((of("soon"), of("")), (None, None));
        assert_eq!(of("-1"), None);
    }

    #[test]
    fn a_part_is_the_whole_if_it_is() {
        let whole = |range: &str| is_whole(&HeaderMap::from_iter([(CONTENT_RANGE, range.parse().unwrap())]));
        assert!(whole("bytes 0-99/100") && whole(" bytes  0-0/1 "));
        for part in ["bytes 0-98/100", "bytes 1-99/100", "bytes 0-99/*", "bytes */100", "bytes 0-0/0", "x", "", "bytes 0-99"] {
            assert!(!whole(part), "{part}");
        }
        assert!(!is_whole(&HeaderMap::new()));
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
