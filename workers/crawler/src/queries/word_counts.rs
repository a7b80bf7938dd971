//! Lists of words with how often they are used, in place of a dump: `word<TAB>count`, `word count` or `word,count`.

use std::path::Path;
use std::sync::Arc;

use super::input::{Input, InputFile, Meter};
use super::tally::Tally;
use crate::CrawlError;
use crate::matcher::words_of;

/// Adds the counts of a file. Forms of a word that the matcher folds into one are added up.
pub(super) fn count(path: &Path, meter: &Arc<Meter>, tally: &mut Tally, folder: &Path) -> Result<InputFile, CrawlError> {
    let mut input = Input::open("word_counts", path, 1, meter)?;
    let (mut lines, mut words, mut outcome) = (input.lines(), String::new(), Ok(()));
    loop {
        let (number, line) = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(e) => {
                outcome = Err(e);
                break;
            }
        };
        let Ok(line) = std::str::from_utf8(line) else {
            return Err(CrawlError::format(path, format!("line {number} is not UTF-8")));
        };
        if line.trim().is_empty() {
            continue;
        }
        let Some((word, n)) = word_and_count(line) else {
            if number == 1 {
                continue; // the names of the columns
            }
            return Err(CrawlError::format(path, format!("line {number} is not a word and a count: write `word<TAB>count`")));
        };
        words_of(word, &mut words);
        if words.trim() != "" {
            tally.add(words.trim(), n).map_err(|e| CrawlError::write(folder, e))?;
        }
    }
    outcome.map_err(|e| input.fail(e))?;
    input.finish()
}

fn word_and_count(line: &str) -> Option<(&str, u64)> {
    let line = line.trim();
    let (word, count) =
        line.rsplit_once('\t').or_else(|| line.rsplit_once(',')).or_else(|| line.rsplit_once(char::is_whitespace))?;
    Some((word.trim().trim_matches('"'), count.trim().trim_matches('"').parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_ways_to_write_a_count() {
        assert_eq!(word_and_count("cat\t12"), Some(("cat", 12)));
        assert_eq!(word_and_count("the 183212978"), Some(("the", 183_212_978)));
        assert_eq!(word_and_count("\"a, b\",7"), Some(("a, b", 7)));
        assert_eq!(word_and_count("new york, 7"), Some(("new york", 7)));
        for bad in ["word,count", "cat", "cat\t-1", "cat\t1.5", "", "12"] {
            assert_eq!(word_and_count(bad), None, "{bad}");
        }
    }
}
