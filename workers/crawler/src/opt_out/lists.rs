//! Lists of addresses whose owners have opted out.
//!
//! A line of a list is one of
//! - a host, `example.org`: it and its subdomains; `*.example.org`: only its subdomains;
//! - an address, `https://example.org/a.jpg`;
//! - the beginning of addresses, `https://example.org/art/*`: the star stands at the end, after a slash;
//! - the SHA-256 of an address, in hex, so that a list need not tell what it protects.
//!
//! `http` and `https` are the same here, `#` begins a comment, and the file may be gzipped. An entry takes 16 bytes of memory.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use capfilt_schemas::Digest;
use sha2::{Digest as _, Sha256};
use url::{Host, Position, Url};

use crate::CrawlError;
use crate::address;
use crate::digest::file_digest;
use crate::unpack;

/// A longer line is no entry; the file is none of ours.
const MAX_LINE: u64 = 64 << 10;
/// Beginnings are looked for up to so many slashes deep.
const MAX_DEPTH: usize = 64;

/// The entries of some lists, as the first half of SHA-256 of their kind and text: sorted, without repeats.
#[derive(Default)]
pub(crate) struct OptOuts(Box<[u128]>);

impl OptOuts {
    /// Reads lists, and checks that they are the ones with the given digests.
    ///
    /// # Errors
    /// [`CrawlError::WrongFile`]; [`CrawlError::Read`] or [`CrawlError::Format`], which names file and line.
    pub(crate) fn load(paths: &[PathBuf], wanted: &[Digest]) -> Result<Self, CrawlError> {
        let mut entries = Vec::new();
        for (i, path) in paths.iter().enumerate() {
            let found = file_digest(path)?;
            if wanted.get(i) != Some(&found) {
                let wanted = wanted.get(i).copied().unwrap_or(found);
                return Err(CrawlError::WrongFile { what: "opt-out list", wanted, found: found.to_string() });
            }
            read(path, &mut entries)?;
        }
        entries.sort_unstable();
        entries.dedup();
        Ok(Self(entries.into_boxed_slice()))
    }

    /// Whether an entry names the address.
    pub(crate) fn name(&self, url: &Url) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let has = |key: u128| self.0.binary_search(&key).is_ok();
        let host = host_of(url);
        if has(key("host", &host)) {
            return true;
        }
        let is_name = matches!(url.host(), Some(Host::Domain(_)));
        let parents = host.match_indices('.').map(|(dot, _)| &host[dot + 1..]);
        if is_name && parents.clone().any(|parent| has(key("host", parent)) || has(key("under", parent))) {
            return true;
        }
        let mut whole = url.clone();
        whole.set_fragment(None);
        if spellings(&whole).any(|address| has(key_of_digest(Sha256::digest(address).into()))) {
            return true;
        }
        let address = without_scheme(&whole);
        has(key("address", &address))
            || address.match_indices('/').take(MAX_DEPTH).any(|(slash, _)| has(key("beginning", &address[..=slash])))
    }
}

/// Reads opt-out lists, and tells how many different entries they have.
///
/// # Errors
/// [`CrawlError::Read`] and [`CrawlError::Format`], which names file and line.
pub fn opt_out_entries(paths: &[PathBuf]) -> Result<usize, CrawlError> {
    Ok(OptOuts::load(paths, &digests(paths)?)?.0.len())
}

/// The digests of lists, for a task's name.
pub(crate) fn digests(paths: &[PathBuf]) -> Result<Vec<Digest>, CrawlError> {
    paths.iter().map(|path| file_digest(path)).collect()
}

fn read(path: &Path, entries: &mut Vec<u128>) -> Result<(), CrawlError> {
    let failed = |e| CrawlError::read(path, e);
    let mut lines = unpack::open(path).map_err(failed)?;
    let (mut line, mut number) = (Vec::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        if lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)? == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_start_matches('\u{feff}');
        let text = if text.starts_with('#') { "" } else { text.split(" #").next().unwrap_or(text) }.trim();
        if !text.is_empty() {
            let is_whole = (line.len() as u64) < MAX_LINE;
            let entry = entry(text).filter(|_| is_whole).ok_or_else(|| {
                let shown: String = text.chars().take(80).collect();
                let reason = format!(
                    "line {number}, `{shown}`, is no host, no http or https address (a `*` may follow its last slash) and no SHA-256"
                );
                CrawlError::Format { path: path.to_owned(), reason }
            })?;
            entries.push(entry);
        }
    }
}

/// The key of one entry.
fn entry(text: &str) -> Option<u128> {
    if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return text.parse::<Digest>().ok().map(|digest| key_of_digest(*digest.as_bytes()));
    }
    let has_scheme = text.contains("://");
    if has_scheme || text.contains('/') {
        let beginning = text.strip_suffix("/*").map(|front| format!("{front}/"));
        let address = beginning.as_deref().unwrap_or(text);
        let with_scheme = if has_scheme { address.to_owned() } else { format!("http://{address}") };
        let url = address::parse_listed(&with_scheme)?;
        let kind = if beginning.is_some() { "beginning" } else { "address" };
        return Some(key(kind, &without_scheme(&url)));
    }
    let (kind, name) = text.strip_prefix("*.").map_or(("host", text), |name| ("under", name));
    let is_bare = !name.contains(['@', '?', '#']) && (name.starts_with('[') || !name.contains(':'));
    let url = Url::parse(&format!("http://{name}/")).ok().filter(|_| is_bare)?;
    Some(key(kind, &host_of(&url)))
}

fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    host.strip_suffix('.').unwrap_or(host).to_owned()
}

/// The texts of an address of which a list may have the digest: as it is and without the dot that a host may end in, with either scheme.
fn spellings(url: &Url) -> impl Iterator<Item = String> {
    let (before, after) = (&url[Position::AfterScheme..Position::BeforeHost], &url[Position::AfterHost..]);
    let host = url.host_str().unwrap_or_default();
    let hosts = [Some(host), host.strip_suffix('.')].into_iter().flatten();
    hosts.flat_map(move |host| ["http", "https"].map(|scheme| format!("{scheme}{before}{host}{after}")))
}

/// Host, port if it is not the usual one, path and query.
fn without_scheme(url: &Url) -> String {
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    format!("{}{port}{}", host_of(url), &url[Position::BeforePath..Position::AfterQuery])
}

fn key(kind: &str, text: &str) -> u128 {
    key_of_digest(Sha256::new().chain_update(kind).chain_update([0]).chain_update(text).finalize().into())
}

fn key_of_digest(digest: [u8; 32]) -> u128 {
    let (first, _) = digest.split_at(16);
    first.iter().fold(0, |key, byte| key << 8 | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    fn list(lines: &str) -> Result<OptOuts, CrawlError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list.txt");
        std::fs::write(&path, lines).unwrap();
        OptOuts::load(std::slice::from_ref(&path), &digests(std::slice::from_ref(&path))?)
    }

    fn named(list: &OptOuts, url: &str) -> bool {
        list.name(&Url::parse(url).unwrap())
    }

    #[test]
    fn entries_name_what_they_say() {
        let hash = hex(Sha256::digest("https://secret.test/x.jpg").as_slice());
        let other = hex(Sha256::digest("http://hidden.test/x.jpg").as_slice());
        let list = list(&format!(
            "\u{feff}# opted out\r\nexample.org\n*.under.test # why\n\nhttps://b.test/a.jpg?x=1\nc.test/art/*\nhttp://d.test:8080/*\n\
             {}\n{other}\nBÜCHER.test\n127.0.0.1\nhttp://e.test/cafÉ.jpg#f\n",
            hash.to_uppercase()
        ))
        .unwrap();
        for yes in [
            "http://example.org/",
            "https://EXAMPLE.org./x?y",
            "https://a.b.example.org:444/",
            "http://a.under.test/",
            "http://b.test/a.jpg?x=1#top",
            "https://c.test/art/",
            "http://c.test/art/deep/er.png?q",
            "https://d.test:8080/x",
            "https://secret.test/x.jpg#there",
            "http://secret.test/x.jpg",
            "http://secret.test./x.jpg",
            "https://hidden.test/x.jpg",
            "http://xn--bcher-kva.test/",
            "http://127.0.0.1/x",
            "https://e.test/caf%C3%89.jpg",
        ] {
            assert!(named(&list, yes), "{yes}");
        }
        for no in [
            "http://example.org.evil.test/",
            "http://notexample.org/",
            "http://under.test/",
            "http://b.test/a.jpg",
            "http://b.test/",
            "http://c.test/art",
            "http://c.test/artists/x",
            "http://d.test/x",
            "https://secret.test/x.jpg?y",
            "https://secret.test:8080/x.jpg",
            "http://1.127.0.0.1.test/",
        ] {
            assert!(!named(&list, no), "{no}");
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn a_line_that_is_no_entry_is_named() {
        for bad in ["two words", "ftp://a.test/x", "http://", "a.test:80", "user@a.test", "http://[::1/", "a.test?x"] {
            let error = list(&format!("a.test\n{bad}\n")).err().unwrap_or_else(|| panic!("{bad} is taken")).to_string();
            assert!(error.contains("list.txt`: line 2, `") && error.contains(bad), "{error}");
        }
        assert!(list(&"x".repeat(200_000)).is_err());
    }

    #[test]
    fn packed_lists_are_read_and_changed_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list.gz");
        let mut gz = flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), flate2::Compression::fast());
        (0..5_000).for_each(|n| writeln!(gz, "h{n}.test").unwrap());
        gz.finish().unwrap();
        let paths = [path.clone()];
        let digests = digests(&paths).unwrap();
        let list = OptOuts::load(&paths, &digests).unwrap();
        assert!(named(&list, "http://h4999.test/") && !named(&list, "http://h5000.test/"));
        assert_eq!(list.0.len(), 5_000);
        assert!(OptOuts::load(&paths, &[]).err().unwrap().to_string().contains("opt-out list"));
        std::fs::write(&path, "a.test").unwrap();
        assert!(OptOuts::load(&paths, &digests).is_err());
    }
}
