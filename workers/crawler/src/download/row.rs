//! One row: its download, its image, and the words for what went wrong.

use std::sync::Arc;
use std::time::Instant;

use capfilt_runtime::on_rayon;
use capfilt_schemas::FetchStatus;

use super::DownloadConfig;
use super::exif;
use crate::address::{NOT_WEB, parse_listed};
use crate::digest::HashKind;
use crate::image;
use crate::traffic::Traffic;
use crate::web::{Answer, Want, Web};

/// What became of a row.
#[derive(Debug)]
pub(super) struct Fetched {
    /// The image, or why there is none.
    pub(super) result: Result<Picture, Missed>,
    /// The EXIF of the download, as a JSON object.
    pub(super) exif: Option<String>,
    /// The wanted hash of the download.
    pub(super) hash: Option<String>,
    /// The size of the download.
    pub(super) downloaded: u64,
}

/// An image as it is written.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) bytes: Vec<u8>,
    /// Width and height of the written image and of the downloaded one, in pixels.
    pub(super) sizes: [u32; 4],
}

/// Why there is no image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Missed {
    pub(super) status: FetchStatus,
    /// Whether the bytes came, but no image could be made of them.
    pub(super) of_image: bool,
    /// What stands in the row.
    pub(super) message: String,
}

/// What img2dataset says about an image for these reasons, in its `error_message` and `status_dict`.
const WORDS: [(FetchStatus, &str); 5] = [
    (FetchStatus::OptOut, "Use of image disallowed by X-Robots-Tag directive"),
    (FetchStatus::HashMismatch, "hash mismatch"),
    (FetchStatus::TooSmall, "image too small"),
    (FetchStatus::TooManyPixels, "image area too large"),
    (FetchStatus::Aspect, "aspect ratio too large"),
];
const HTTP_ERROR: &str = "HTTP Error ";

impl Missed {
    pub(super) fn new(status: FetchStatus, http_status: Option<u16>, reason: &str) -> Self {
        use FetchStatus as S;
        let of_image = matches!(status, S::Empty | S::NotImage | S::Decode | S::TooManyPixels | S::TooSmall | S::Aspect);
        // An opt-out list is no header.
        let known = status != S::OptOut || reason.starts_with("the answer says");
        let words = WORDS.iter().find(|(of, _)| *of == status && known).map(|(_, words)| (*words).to_owned());
        let message = words.unwrap_or_else(|| match (status, http_status) {
            (S::HttpClient | S::RateLimited | S::HttpServer, Some(code)) => {
                let known = reqwest::StatusCode::from_u16(code).ok().and_then(|s| s.canonical_reason());
                format!("{HTTP_ERROR}{code}: {}", known.unwrap_or_default())
            }
            _ => format!("{status}: {reason}"),
        });
        Self { status, of_image, message }
    }

    /// What is counted: one of a few texts, since reasons may differ from row to row.
    pub(super) fn label(&self) -> &str {
        let class = self.message.split(':').next().unwrap_or_default();
        if FetchStatus::parse(class).is_some() { class } else { &self.message }
    }
}

/// The status that a message of [`Missed`] is for.
pub(super) fn status_of(message: &str) -> Option<FetchStatus> {
    if let Some((status, _)) = WORDS.iter().find(|(_, words)| *words == message) {
        return Some(*status);
    }
    if let Some(rest) = message.strip_prefix(HTTP_ERROR) {
        let code: u16 = rest.split(':').next()?.trim().parse().ok()?;
        return Some(match code {
            429 => FetchStatus::RateLimited,
            500.. => FetchStatus::HttpServer,
            _ => FetchStatus::HttpClient,
        });
    }
    FetchStatus::parse(message.split(':').next().unwrap_or(message))
}

/// Downloads and stores one image, and counts it. With the answer comes the connection's place, which is to be kept until the image is written, so
/// that a slow disk slows the downloads.
pub(super) async fn obtain(
    web: &Web,
    url: &str,
    expected: Option<(String, HashKind)>,
    config: &Arc<DownloadConfig>,
    traffic: &Traffic,
) -> (Fetched, Option<Answer>) {
    let began = Instant::now();
    let (fetched, answer) = get(web, url, expected, config).await;
    let status = fetched.result.as_ref().map_or_else(|missed| missed.status, |_| FetchStatus::Ok);
    traffic.record(url, status, fetched.downloaded, began.elapsed());
    (fetched, answer)
}

async fn get(
    web: &Web,
    url: &str,
    expected: Option<(String, HashKind)>,
    config: &Arc<DownloadConfig>,
) -> (Fetched, Option<Answer>) {
    let missed = |miss: Missed| (Fetched { result: Err(miss), exif: None, hash: None, downloaded: 0 }, None);
    let Some(address) = parse_listed(url.trim()) else {
        return missed(Missed::new(FetchStatus::BadUrl, None, NOT_WEB));
    };
    let fetch = &config.fetch;
    let mut answer = match web.get(&address, &fetch.web, Want::Image, fetch.max_body).await {
        Ok(answer) => answer,
        Err(f) => return missed(Missed::new(f.status, f.http_status, &f.reason)),
    };
    let (body, config) = (std::mem::take(&mut answer.body), Arc::clone(config));
    match on_rayon(move || store(&body, expected, &config)).await {
        Ok(fetched) => (fetched, Some(answer)),
        Err(e) => missed(Missed::new(FetchStatus::Decode, None, &e.to_string())),
    }
}

/// What is made of a body.
fn store(body: &[u8], expected: Option<(String, HashKind)>, config: &DownloadConfig) -> Fetched {
    let missed = |status, reason: &str| Fetched {
        result: Err(Missed::new(status, None, reason)),
        exif: None,
        hash: None,
        downloaded: body.len() as u64,
    };
    if let Some((digest, kind)) = expected
        && let Err(refused) = image::verify(body, kind, &digest)
    {
        return missed(refused.status, &refused.reason);
    }
    let image = match image::store(body, &config.fetch.image) {
        Ok(image) => image,
        Err(refused) => return missed(refused.status, &refused.reason),
    };
    let hash = config.compute_hash.map(|kind| match kind {
        HashKind::Sha256 => image.sha256.to_string(),
        other => other.of(body),
    });
    let sizes = [image.width, image.height, image.original_width, image.original_height];
    Fetched {
        result: Ok(Picture { bytes: image.bytes, sizes }),
        exif: config.extract_exif.then(|| exif::read(body)),
        hash,
        downloaded: body.len() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_leads_back_to_its_status() {
        for status in FetchStatus::ALL.iter().filter(|s| **s != FetchStatus::Ok) {
            let codes: &[Option<u16>] = match status {
                FetchStatus::HttpClient => &[Some(404), Some(418), Some(499), None],
                FetchStatus::RateLimited => &[Some(429), None],
                FetchStatus::HttpServer => &[Some(503), Some(599), None],
                _ => &[Some(200), None],
            };
            for code in codes {
                let missed = Missed::new(*status, *code, "a: b");
                assert_eq!(status_of(&missed.message), Some(*status), "{}", missed.message);
                assert_eq!(status_of(missed.label()), Some(*status));
            }
        }
        let gone = Missed::new(FetchStatus::HttpClient, Some(404), "http 404");
        assert_eq!((gone.label(), gone.of_image), ("HTTP Error 404: Not Found", false));
        assert_eq!(Missed::new(FetchStatus::Timeout, None, "x").message, "timeout: x");
        assert_eq!(status_of("Sample failed"), None);
    }
}
