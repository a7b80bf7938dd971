//! The fetch stage: `selected` rows in, the same rows with their image, or the reason why there is none, out.

use std::sync::Arc;
use std::time::Instant;

use capfilt_runtime::{RowStream, Stage, StageError, Work, on_rayon};
use capfilt_schemas::{FetchStatus, StageKind};
use capfilt_store::TakenDown;
use futures::{StreamExt, TryStreamExt, stream};

use crate::address::{NOT_WEB, parse_listed};
use crate::columns::{ImageColumns, Outcome};
use crate::config::FetchConfig;
use crate::digest::HashKind;
use crate::image::{self, Refused};
use crate::params::FetchParams;
use crate::room::{Held, Place, Room};
use crate::rows::Rows;
use crate::traffic::Traffic;
use crate::web::{AHEAD, Want, Web};

/// Raised whenever the same task would give other rows than before.
pub const FETCH_VERSION: u32 = 4;

/// Downloads images. Many requests are at work at once; rows come out in the order in which they came in.
pub struct Fetch {
    web: Web,
    traffic: Traffic,
}

impl Fetch {
    /// The stage.
    #[must_use]
    pub fn new(web: Web) -> Self {
        Self { web, traffic: Traffic::default() }
    }

    /// What its downloads lead to, for whoever watches.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }

    async fn start(web: Web, traffic: Traffic, work: Work, input: RowStream) -> Result<RowStream, StageError> {
        let FetchParams { fetch: config, opt_outs, retry, .. } = work.params()?;
        let config = Arc::new(config);
        // What was taken down is a fact of the store, as what a server answers is one of the web: it is in the rows, not in the name.
        let taken_down = Arc::new(work.store.taken_down().await?);
        let web = web.without(&config.web, &opt_outs).await?.without_taken_down(Arc::clone(&taken_down));
        let room = Room::new(web.settings().buffer);
        let facts = work.facts.clone();
        let rows = input
            .and_then(move |batch| std::future::ready(Rows::new(batch, retry.as_ref()).map(Arc::new)))
            .map_ok(|rows| stream::iter((0..rows.len()).map(move |row| Ok((Arc::clone(&rows), row)))))
            .try_flatten();
        let results = rows
            .enumerate()
            .map(move |(number, row)| {
                let place = room.place(number as u64);
                row.map(|(rows, row)| (rows, row, place))
            })
            .and_then(|(rows, row, place)| async move {
                // What is only copied is here already.
                if rows.wants(row) {
                    return Ok((rows, row, place, None));
                }
                place.begin().await;
                let copied = place.take(rows.held(row));
                Ok((rows, row, place, Some(copied)))
            })
            .map_ok(move |(rows, row, place, copied)| {
                let (web, traffic) = (web.clone(), traffic.clone());
                let (config, taken_down) = (Arc::clone(&config), Arc::clone(&taken_down));
                async move {
                    if !rows.wants(row) {
                        return Ok((rows, row, None, (copied, place)));
                    }
                    let (url, began) = (rows.url(row), Instant::now());
                    let (outcome, held) = fetch(&web, url, rows.expected_hash(row), &config, &taken_down, &place).await?;
                    traffic.record(url, outcome.status, outcome.bytes_downloaded.unwrap_or(0), began.elapsed());
                    Ok((rows, row, Some(outcome), (held, place)))
                }
            })
            .try_buffered(AHEAD);
        let mut columns = ImageColumns::default();
        let batches = results.try_filter_map(move |(rows, row, outcome, _room_and_place)| {
            if let Some(outcome) = outcome {
                facts.add("bytes_downloaded", outcome.bytes_downloaded.unwrap_or(0));
                columns.push(&outcome);
            }
            let done = (row + 1 == rows.len()).then(|| rows.finish(std::mem::take(&mut columns))).transpose();
            std::future::ready(done)
        });
        Ok(batches.boxed())
    }
}

impl Stage for Fetch {
    fn kind(&self) -> StageKind {
        StageKind::Fetch
    }

    fn process(&self, work: Work, input: RowStream) -> RowStream {
        stream::once(Self::start(self.web.clone(), self.traffic(), work, input)).try_flatten().boxed()
    }
}

/// One row's download, and the room that its image takes.
///
/// # Errors
/// Only if the program is being stopped; whatever the web does is an outcome.
async fn fetch(
    web: &Web,
    url: &str,
    expected_hash: Option<&str>,
    config: &Arc<FetchConfig>,
    taken_down: &Arc<TakenDown>,
    place: &Place,
) -> Result<(Outcome, Option<Held>), StageError> {
    // Of what was removed from the rows no address is left.
    if taken_down.covers_url(url) {
        return Ok((Outcome::refused(Refused::new(FetchStatus::TakenDown, "the address was taken down"), None), None));
    }
    let Some(address) = parse_listed(url) else {
        return Ok((Outcome::refused(Refused::new(FetchStatus::BadUrl, NOT_WEB), None), None));
    };
    let answer = match web.get_at(place, &address, &config.web, Want::Image, config.max_body).await {
        Ok(answer) => answer,
        Err(failure) => return Ok((Outcome::refused(Refused::new(failure.status, failure.reason), failure.http_status), None)),
    };
    let mut held = place.take(answer.body.len());
    let (mut answer, most) = {
        let config = Arc::clone(config);
        on_rayon(move || {
            let most = image::largest(&answer.body, &config.image);
            (answer, most)
        })
        .await?
    };
    if !held.try_grow(most) {
        // The earliest row may need the connection.
        answer.connection = None;
        held.grow(most).await;
    }
    let (config, taken_down) = (Arc::clone(config), Arc::clone(taken_down));
    let expected = expected_hash.and_then(HashKind::parse_digest).map(|(kind, digest)| (kind, digest.to_owned()));
    let outcome = on_rayon(move || {
        let http_status = Some(answer.http_status);
        let verified = expected.map_or(Ok(()), |(kind, digest)| image::verify(&answer.body, kind, &digest));
        match verified.and_then(|()| image::store(&answer.body, &config.image)) {
            Ok(image) if taken_down.covers_bytes(&image.sha256.to_string()) => {
                Outcome::refused(Refused::new(FetchStatus::TakenDown, "the image was taken down"), None)
            }
            Ok(image) => Outcome {
                status: FetchStatus::Ok,
                error: None,
                http_status,
                bytes_downloaded: Some(answer.body.len() as u64),
                image: Some(image),
            },
            Err(refused) => Outcome::refused(refused, http_status),
        }
    })
    .await?;
    held.shrink(outcome.image.as_ref().map_or(0, |i| i.bytes.len()));
    Ok((outcome, Some(held)))
}
