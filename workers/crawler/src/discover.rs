//! The discover stage: a source's texts against the query list, into `candidates`.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringBuilder, UInt32Builder};
use arrow::datatypes::DataType;
use capfilt_runtime::{RowStream, Stage, StageError, Work, on_rayon};
use capfilt_schemas::{StageKind, Table, sample_id};
use futures::{StreamExt, TryStreamExt, stream};

use crate::columns::list_of;
use crate::config::SourceConfig;
use crate::matcher::Scratch;
use crate::params::DiscoverParams;
use crate::sources::{Found, FoundStream, crawl, read_archive, read_list, read_sitemaps, search};
use crate::{CrawlError, Matcher, QueryList, Web};

/// Raised whenever the same task would give other rows than before.
pub const DISCOVER_VERSION: u32 = 3;

/// Reads one source and keeps the texts that some query is for.
#[derive(Clone)]
pub struct Discover {
    web: Web,
    matcher: Arc<Matcher>,
    queries: Arc<QueryList>,
}

impl Discover {
    /// The stage for tasks with the list that `matcher` is made of; search APIs are asked for its texts.
    #[must_use]
    pub const fn new(web: Web, matcher: Arc<Matcher>, queries: Arc<QueryList>) -> Self {
        Self { web, matcher, queries }
    }

    async fn start(self, work: Work) -> Result<RowStream, StageError> {
        let Self { web, matcher, queries } = self;
        let params: DiscoverParams = work.params()?;
        let here = matcher.digest();
        if params.queries != here {
            let error = CrawlError::WrongFile { what: "query list", wanted: params.queries, found: here.to_string() };
            return Err(error.into());
        }
        let web = web.without(&params.web, &params.opt_outs).await?;
        let (source, found): (String, FoundStream) = match params.source {
            SourceConfig::Pages(pages) => ("pages".to_owned(), crawl(web, pages, params.web, params.max_text, work.clone())),
            SourceConfig::Search(config) => {
                let none = || StageError::Input("a search wants the part of the queries that it asks for".to_owned());
                let part = params.part.ok_or_else(none)?;
                let name = config.adapter.name.clone();
                (name, search(web, *config, part, queries, params.web, params.max_text, work.clone()))
            }
            SourceConfig::Sitemaps(maps) => {
                let found = read_sitemaps(web, maps, params.web, params.max_text, work.clone());
                ("sitemaps".to_owned(), found)
            }
            SourceConfig::List(list) => {
                let name = list.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (name, read_list(list, params.list, params.max_text, work.clone()))
            }
            SourceConfig::Archive(archive) => {
                let path = archive.paths.first().cloned().unwrap_or_default();
                let name = path.rsplit('/').next().unwrap_or_default().to_owned();
                (name, read_archive(web, &archive, params.list, &params.web, params.max_text, work.clone()))
            }
        };
        let facts = work.facts.clone();
        // One batch is matched while the next is on its way.
        let matched = found
            .map(move |batch| {
                let (matcher, source, facts) = (Arc::clone(&matcher), source.clone(), facts.clone());
                async move {
                    let batch = batch?;
                    let texts = batch.len() as u64;
                    let rows = on_rayon(move || candidates(&batch, &source, &matcher)).await??;
                    facts.add("texts_seen", texts);
                    facts.add("texts_without_query", texts - rows.num_rows() as u64);
                    Ok(rows)
                }
            })
            .buffered(2)
            .try_filter(|rows| std::future::ready(rows.num_rows() > 0));
        Ok(matched.boxed())
    }
}

impl Stage for Discover {
    fn kind(&self) -> StageKind {
        StageKind::Discover
    }

    fn process(&self, work: Work, _input: RowStream) -> RowStream {
        stream::once(self.clone().start(work)).try_flatten().boxed()
    }
}

/// Rows of `candidates`, one for each text that holds a query, in order.
fn candidates(found: &[Found], source: &str, matcher: &Matcher) -> Result<RecordBatch, StageError> {
    let mut texts: [StringBuilder; 7] = Default::default();
    let mut queries = list_of(UInt32Builder::new(), DataType::UInt32);
    matcher.find_all(found.iter().map(|f| f.text.as_str()), &mut Scratch::default(), |i, ids| {
        if ids.is_empty() {
            return;
        }
        let f = &found[i];
        let [sample, url, text, text_source, page, from, hash] = &mut texts;
        sample.append_value(sample_id(&f.url, &f.text));
        url.append_value(&f.url);
        text.append_value(&f.text);
        text_source.append_value(f.text_source.as_str());
        page.append_option(f.page_url.as_deref());
        from.append_value(source);
        hash.append_option(f.expected_hash.as_deref());
        queries.values().append_slice(ids);
        queries.append(true);
    });
    let mut columns: Vec<ArrayRef> = texts.iter_mut().map(|b| Arc::new(b.finish()) as ArrayRef).collect();
    columns.push(Arc::new(queries.finish()));
    Ok(RecordBatch::try_new(Table::Candidates.schema(), columns)?)
}
