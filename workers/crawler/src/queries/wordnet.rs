//! WordNet's database files (`data.noun`, …; the format is that of the manual page `wndb(5WN)`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::input::{Input, InputFile, Meter};
use super::tally::Tally;
use crate::CrawlError;
use crate::matcher::words_of;

const FILES: [&str; 4] = ["data.noun", "data.verb", "data.adj", "data.adv"];
/// Where the files lie: in the folder itself (NLTK's `corpora/wordnet`, `/usr/share/wordnet`), in that of Princeton's archive, or in an
/// unpacked Debian package.
const PLACES: [&str; 4] = ["", "dict", "usr/share/wordnet", "WordNet-3.0/dict"];

/// The four files of a folder.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>, CrawlError> {
    let place = PLACES.iter().map(|p| folder.join(p)).find(|p| p.join(FILES[0]).is_file());
    let place = place.ok_or_else(|| {
        CrawlError::format(
            folder,
            "it has no WordNet database (data.noun, data.verb, data.adj, data.adv); give the folder `dict` of WordNet 3",
        )
    })?;
    Ok(FILES.iter().map(|f| place.join(f)).collect())
}

/// Adds the first word or phrase of every synset of a file, and says how many synsets there were.
pub(super) fn count(path: &Path, meter: &Arc<Meter>, tally: &mut Tally, folder: &Path) -> Result<(u64, InputFile), CrawlError> {
    let mut input = Input::open("wordnet", path, 1, meter)?;
    let (mut lines, mut words, mut synsets, mut outcome) = (input.lines(), String::new(), 0, Ok(()));
    loop {
        let (number, line) = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(e) => {
                outcome = Err(e);
                break;
            }
        };
        // The licence at the head is indented.
        if line.is_empty() || line.starts_with(b" ") {
            continue;
        }
        let Some(name) = std::str::from_utf8(line).ok().and_then(name_of) else {
            return Err(CrawlError::format(
                path,
                format!("line {number} is no synset; is it a file of WordNet's `dict` folder?"),
            ));
        };
        words_of(name, &mut words);
        synsets += 1;
        if words.trim() != "" {
            tally.add(words.trim(), 1).map_err(|e| CrawlError::write(folder, e))?;
        }
    }
    outcome.map_err(|e| input.fail(e))?;
    Ok((synsets, input.finish()?))
}

/// The first word of `offset file type count word id …`, without the mark of where an adjective may stand: `galore(ip)`.
pub(super) fn name_of(line: &str) -> Option<&str> {
    let mut fields = line.split(' ');
    let (offset, _file, kind, words) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let numbers =
        offset.len() == 8 && offset.bytes().all(|b| b.is_ascii_digit()) && u8::from_str_radix(words, 16).is_ok_and(|n| n > 0);
    let name = fields.next().filter(|_| numbers && matches!(kind, "n" | "v" | "a" | "s" | "r"))?;
    let mark = ["(p)", "(a)", "(ip)"].into_iter().find_map(|mark| name.strip_suffix(mark));
    Some(mark.unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synset_is_called_by_its_first_word() {
        assert_eq!(name_of("00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which"), Some("entity"));
        assert_eq!(name_of("00014358 00 s 02 abundant 0 galore(ip) 0 001 & 0001 a 0000 | x"), Some("abundant"));
        assert_eq!(name_of("00014358 00 s 01 galore(ip) 0 001 & 0001 a 0000 | x"), Some("galore"));
        assert_eq!(name_of("02124272 05 n 0a true_cat 0 cat 0"), Some("true_cat"));
        for bad in
            ["", "one two three four five", "0000174 03 n 01 x", "00001740 03 x 01 x", "00001740 03 n 00 x", "00001740 03 n 01"]
        {
            assert_eq!(name_of(bad), None, "{bad}");
        }
    }
}
