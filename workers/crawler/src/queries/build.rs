//! Makes a query list of what people read, write about and have words for.

use std::path::{Path, PathBuf};

use super::input::{InputFile, Meter, OnProgress};
use super::ngrams::{self, Counting};
use super::pick::{Picker, QuerySource};
use super::table::{QUERY_TABLE_VERSION, QueryTable, TableHead};
use super::tally::Tally;
use super::{titles, word_counts, wordnet};
use crate::CrawlError;

/// The files that a list is made of. Any part may be missing; the list is made of the others.
#[derive(Clone, Default, Debug)]
pub struct QueryInputs {
    /// Folders with WordNet's database files: `data.noun` and its like, or `dict` with them.
    pub wordnet: Vec<PathBuf>,
    /// Wikipedia's `pages-articles` XML: plain, `.gz`, or `.bz2` of one or many streams.
    pub dumps: Vec<PathBuf>,
    /// Words with how often they are used, in place of those of a dump.
    pub word_counts: Vec<PathBuf>,
    /// Wikimedia's page view files.
    pub page_views: Vec<PathBuf>,
    /// Titles without page views, all of which count as read.
    pub titles: Vec<PathBuf>,
}

/// How to make a list.
///
/// Sources get their share in the order WordNet, words, pairs of words, titles, until the budget is spent: so titles are cut first, then
/// pairs. Within a source the more frequent come first (more synsets, uses, uses, views), equally frequent ones by their bytes. A text that
/// an earlier source gave is not counted again.
#[derive(Clone, Debug)]
pub struct QueryBuild {
    /// What of.
    pub inputs: QueryInputs,
    /// The most queries. CLIP: 500,000.
    pub budget: usize,
    /// The least uses of a word. CLIP: 100.
    pub unigram_count: u64,
    /// The least pointwise mutual information of a pair of words: `log2(uses · all words / (uses of the first · uses of the second))`, in bits.
    /// MetaCLIP: 30. No pair has more than `log2(all words)`, which is 20 for a million words and 32 for the English Wikipedia: there, 30 bits
    /// are left to pairs of words that are hardly used but together.
    pub bigram_pmi: f64,
    /// The least uses of a pair of words. MetaCLIP: 1.
    pub bigram_count: u64,
    /// The least views of a title, over all page view files. MetaCLIP: 70.
    pub title_views: u64,
    /// The wiki whose page views count and whose titles are read, as page view files call it: `en`.
    pub wiki: String,
    /// Bytes of memory to stay within, roughly; what does not fit is kept in files.
    pub memory: usize,
    /// Threads that unpack, read and count.
    pub threads: usize,
    /// Where those files are while it runs; they have no name and never outlive the program.
    pub work_dir: PathBuf,
}

impl Default for QueryBuild {
    fn default() -> Self {
        Self {
            inputs: QueryInputs::default(),
            budget: 500_000,
            unigram_count: 100,
            bigram_pmi: 30.0,
            bigram_count: 1,
            title_views: 70,
            wiki: "en".to_owned(),
            memory: 1 << 30,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            work_dir: std::env::temp_dir(),
        }
    }
}

impl QueryBuild {
    /// Reads everything and picks the queries. `progress` is told from many threads.
    ///
    /// # Errors
    /// [`CrawlError::Config`] if there is nothing to read, [`CrawlError::Read`] and [`CrawlError::Format`] for inputs,
    /// [`CrawlError::Write`] if `work_dir` cannot be written.
    pub fn run(&self, progress: OnProgress) -> Result<QueryTable, CrawlError> {
        let of = &self.inputs;
        let mut synset_files = Vec::new();
        for folder in &of.wordnet {
            synset_files.extend(wordnet::files(folder)?);
        }
        let paths: Vec<&Path> = [&synset_files, &of.word_counts, &of.dumps, &of.page_views, &of.titles]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
            .collect();
        if paths.is_empty() {
            return Err(CrawlError::Config {
                setting: "inputs".to_owned(),
                reason: "there is nothing to make queries of".to_owned(),
            });
        }
        let meter = Meter::new(&paths, progress)?;
        tempfile::tempfile_in(&self.work_dir).map_err(|e| CrawlError::write(&self.work_dir, e))?;
        let mut build = Building { settings: self, picker: Picker::new(self.budget), inputs: Vec::new(), notes: Vec::new() };

        let mut synsets = 0;
        if !synset_files.is_empty() {
            let mut tally = build.tally();
            for path in &synset_files {
                let (n, file) = wordnet::count(path, &meter, &mut tally, &self.work_dir)?;
                synsets += n;
                build.inputs.push(file);
            }
            build.pick(QuerySource::Wordnet, tally, 1)?;
        }
        if !of.word_counts.is_empty() {
            let mut tally = build.tally();
            for path in &of.word_counts {
                build.inputs.push(word_counts::count(path, &meter, &mut tally, &self.work_dir)?);
            }
            build.pick(QuerySource::Unigram, tally, self.unigram_count)?;
        }
        let pages = if of.dumps.is_empty() { None } else { Some(build.dumps(&meter)?) };
        if !of.page_views.is_empty() {
            let (mut views, files) =
                titles::views(&of.page_views, &self.wiki, self.memory, self.threads, &self.work_dir, &meter)?;
            build.inputs.extend(files);
            let mut any = false;
            build.picker.source(QuerySource::Title, |offer| {
                while let Some((title, n)) = views.next().map_err(|e| CrawlError::write(&self.work_dir, e))? {
                    any = true;
                    if n >= self.title_views {
                        offer(&title, n, None);
                    }
                }
                Ok(())
            })?;
            if !any {
                build.notes.push(format!("no page view file has a line of the wiki `{}`", self.wiki));
            }
        }
        if !of.titles.is_empty() {
            let mut tally = build.tally();
            for path in &of.titles {
                build.inputs.push(titles::list(path, &self.wiki, &meter, &mut tally, &self.work_dir)?);
            }
            build.pick(QuerySource::Title, tally, 0)?;
        }
        let (rows, sources) = build.picker.finish();
        let head = TableHead {
            version: QUERY_TABLE_VERSION,
            budget: self.budget as u64,
            unigram_count: self.unigram_count,
            bigram_pmi: self.bigram_pmi,
            bigram_count: self.bigram_count,
            title_views: self.title_views,
            wiki: self.wiki.clone(),
            sources,
            pages,
            synsets,
            inputs: build.inputs,
        };
        Ok(QueryTable { rows, head, notes: build.notes })
    }
}

struct Building<'a> {
    settings: &'a QueryBuild,
    picker: Picker,
    inputs: Vec<InputFile>,
    notes: Vec<String>,
}

impl Building<'_> {
    fn tally(&self) -> Tally {
        Tally::new(self.settings.memory / 2, &self.settings.work_dir)
    }

    fn pick(&mut self, source: QuerySource, tally: Tally, least: u64) -> Result<(), CrawlError> {
        let fail = |e| CrawlError::write(&self.settings.work_dir, e);
        let mut merge = Tally::merge([tally]).map_err(fail)?;
        self.picker.source(source, |offer| {
            while let Some((text, n)) = merge.next().map_err(fail)? {
                if n >= least {
                    offer(&text, n, None);
                }
            }
            Ok(())
        })
    }

    /// Words (unless they come from a list) and pairs of words.
    fn dumps(&mut self, meter: &std::sync::Arc<Meter>) -> Result<super::table::Pages, CrawlError> {
        let build = self.settings;
        let settings = Counting {
            min_pmi: build.bigram_pmi,
            min_count: build.bigram_count.max(1),
            memory: build.memory,
            threads: build.threads,
            folder: &build.work_dir,
        };
        let mut ngrams = ngrams::count(&build.inputs.dumps, &settings, meter)?;
        self.inputs.append(&mut ngrams.files);
        let pages = ngrams.pages;
        for (n, what) in [(pages.broken, "not well-formed XML in UTF-8"), (pages.too_long, "longer than 16 MiB")] {
            if n > 0 {
                self.notes.push(format!("{n} pages of the dump were passed over: {what}"));
            }
        }
        if build.inputs.word_counts.is_empty() {
            self.picker.source(QuerySource::Unigram, |offer| {
                ngrams.words(&build.work_dir, |word, n| {
                    if n >= build.unigram_count {
                        offer(word, n, None);
                    }
                })
            })?;
        }
        if ngrams.highest_pmi() < build.bigram_pmi {
            self.notes.push(format!(
                "no pair of words can reach a PMI of {} bits in a text of {} words: the highest is {:.1}; a lower bigram PMI, with a least count, finds some",
                build.bigram_pmi,
                pages.words,
                ngrams.highest_pmi()
            ));
        }
        self.picker
            .source(QuerySource::Bigram, |offer| ngrams.pairs(&settings, |pair| offer(pair.text, pair.count, Some(pair.pmi))))?;
        Ok(pages)
    }
}
