//! The query list: what candidates are gathered for. [`QueryList`] reads one, [`QueryBuild`] makes one in the four parts of CLIP's recipe
//! (section 2.2 of the paper) with the thresholds that MetaCLIP (arXiv 2309.16671, table 1) found for it.
//!
//! Everything is counted by the matcher's words (`words_of`), so no two queries of a table are the same to it.

mod build;
mod bz2;
mod dump;
mod input;
mod list;
mod ngrams;
mod pick;
mod table;
mod tally;
mod titles;
mod wikitext;
mod word_counts;
mod wordnet;

#[cfg(test)]
mod tests;

pub use build::{QueryBuild, QueryInputs};
pub use input::{InputFile, OnProgress};
pub use list::{Query, QueryList};
pub use pick::{QueryRow, QuerySource, SourceCounts};
pub use table::{Pages, QUERY_TABLE_VERSION, QueryTable, TableHead};

/// Reads any bytes as a dump, as wikitext, as page views and as WordNet's lines.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn read_any(data: &[u8]) {
    let (hidden, mut text, mut prose) = (wikitext::HiddenLinks::new([]), String::new(), String::new());
    let whole = String::from_utf8_lossy(data);
    wikitext::plain(&whole, &hidden, &mut prose);
    assert!(prose.len() <= 2 * whole.len() + 1);
    let end = dump::chunks(data, |chunk| {
        let read = chunk.pages(&mut text, |_, wikitext| {
            wikitext::plain(wikitext, &chunk.hidden, &mut prose);
            Ok::<_, ()>(())
        });
        read.is_ok()
    });
    assert!(end.is_ok());
    for line in data.split(|b| *b == b'\n') {
        titles::read_any(line);
        std::str::from_utf8(line).ok().and_then(wordnet::name_of);
    }
}
