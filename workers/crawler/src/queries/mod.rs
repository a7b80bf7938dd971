//! The query list: what candidates are gathered for. [`QueryList`] reads one, [`QueryBuild`] makes one in the four parts of CLIP's recipe
//! (section 2.2 of the paper) with the thresholds that MetaCLIP (arXiv 2309.16671, table 1) found for it.
//!
//! Everything is counted by the matcher's words ([`words_of`](crate::matcher::words_of)), so no two queries of a table are the same to it.

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
