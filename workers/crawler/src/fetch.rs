//! The fetch stage: `selected` rows in, the same rows with their image, or the reason why there is none, out.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::{AsArray, RecordBatch};
use capfilt_runtime::{RowStream, Stage, StageError, Work, on_rayon};
use capfilt_schemas::{FetchStatus, StageKind, Table, column};
use futures::{StreamExt, TryStreamExt, stream};
use url::Url;

use crate::config::{FetchConfig, ImageConfig, Reencode, ResizeMode, StoredFormat};
use crate::image::{self, Refused};
use crate::params::FetchParams;
use crate::room::{Place, Room, Taken};
use crate::rows::{ImageColumns, Outcome};
use crate::traffic::Traffic;
use crate::web::{Want, Web};

/// Raised whenever the same task would give other rows than before.
pub const FETCH_VERSION: u32 = 2;

/// Rows begun before an earlier one has ended; a row that waits for a slow host holds little, so there may be many.
const AHEAD: usize = 4096;

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
        let params = work.params::<FetchParams>()?;
        let web = web.without(&params.fetch.web, &params.opt_outs).await?;
        let config = Arc::new(params.fetch);
        let room = Room::new(web.settings().buffer, largest_result(&config));
        let facts = work.facts.clone();
        let rows = input
            .map_ok(|batch| {
                let batch = Arc::new(batch);
                stream::iter((0..batch.num_rows()).map(move |row| Ok((Arc::clone(&batch), row))))
            })
            .try_flatten();
        let results = rows
            .enumerate()
            .map(move |(number, row)| {
                let place = room.place(number as u64);
                row.map(|(batch, row)| (batch, row, place))
            })
            .map_ok(move |(batch, row, place)| {
                let (web, traffic, config) = (web.clone(), traffic.clone(), Arc::clone(&config));
                async move {
                    let url = batch
                        .column_by_name(column::URL)
                        .map_or_else(String::new, |c| c.as_string::<i32>().value(row).to_owned());
                    let began = Instant::now();
                    let (outcome, taken) = fetch(&web, &url, &config, &place).await?;
                    traffic.record(&url, outcome.status, outcome.bytes_downloaded.unwrap_or(0), began.elapsed());
                    Ok((batch, row, outcome, (taken, place)))
                }
            })
            .try_buffered(AHEAD);
        let mut columns = ImageColumns::default();
        let batches = results.try_filter_map(move |(batch, row, outcome, _room_and_place)| {
            facts.add("bytes_downloaded", outcome.bytes_downloaded.unwrap_or(0));
            columns.push(&outcome);
            let done = (row + 1 == batch.num_rows()).then(|| samples(&batch, std::mem::take(&mut columns))).transpose();
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

/// The most bytes that a stored image can have: three (PNG) or two a pixel of the largest stored size, or of the largest allowed one;
/// or those of the largest body that may be kept as it is.
fn largest_result(config: &FetchConfig) -> usize {
    let ImageConfig { size, resize, max_aspect, max_pixels, format, reencode, .. } = config.image;
    let square = f64::from(size) * f64::from(size);
    let pixels = if resize == ResizeMode::No { max_pixels } else { (square * max_aspect) as u64 };
    let bytes_a_pixel = if format == StoredFormat::Png { 3 } else { 2 };
    let encoded =
        usize::try_from(pixels.min(config.image.max_stored_pixels())).unwrap_or(usize::MAX).saturating_mul(bytes_a_pixel);
    match reencode {
        Reencode::Always => encoded,
        Reencode::IfNeeded => encoded.max(config.max_body),
        Reencode::Never => config.max_body,
    }
}

/// One row's download, and the room that its image takes.
///
/// # Errors
/// Only if the program is being stopped; whatever the web does is an outcome.
async fn fetch(web: &Web, url: &str, config: &Arc<FetchConfig>, place: &Place) -> Result<(Outcome, Option<Taken>), StageError> {
    let parsed = Url::parse(url).ok().filter(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
    let Some(mut address) = parsed else {
        let refused = Refused::new(FetchStatus::BadUrl, "not an absolute http or https address");
        return Ok((Outcome::refused(refused, None), None));
    };
    address.set_fragment(None);
    let mut answer = match web.get_into(place, &address, &config.web, Want::Image, config.max_body).await {
        Ok(answer) => answer,
        Err(failure) => return Ok((Outcome::refused(Refused::new(failure.status, failure.reason), failure.http_status), None)),
    };
    let (mut taken, config) = (answer.room.take(), Arc::clone(config));
    let outcome = on_rayon(move || {
        let http_status = Some(answer.http_status);
        match image::store(&answer.body, &config.image) {
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
    if let Some(taken) = &mut taken {
        taken.shrink(outcome.image.as_ref().map_or(0, |i| i.bytes.len()));
    }
    Ok((outcome, taken))
}

/// The rows of a `selected` batch with their image columns.
fn samples(selected: &RecordBatch, images: ImageColumns) -> Result<RecordBatch, StageError> {
    let mut columns = selected.columns().to_vec();
    columns.extend(images.finish());
    Ok(RecordBatch::try_new(Table::Samples.schema(), columns)?)
}
