//! What must not be in any dataset: the log of takedowns, what they cover, and the shards that stand for those from which bytes went.

use std::collections::{BTreeSet, HashSet};

use capfilt_schemas::{Digest, REMOVED_URL, Redaction, Table, Takedown};
use url::{Host, Url};

use crate::{Created, Result, Store, StoreError, layout, now_ms};

/// What to take down, checked and in one form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    urls: BTreeSet<String>,
    hosts: BTreeSet<String>,
    sha256: BTreeSet<Digest>,
}

impl Targets {
    /// Adds the address of an image.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it is not an absolute http or https address.
    pub fn add_url(&mut self, text: &str) -> Result<()> {
        let parsed = Url::parse(text.trim()).ok().filter(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
        let bad = || StoreError::Unknown(format!("`{text}` is not an absolute http or https address"));
        let mut url = parsed.ok_or_else(bad)?;
        url.set_fragment(None);
        self.urls.insert(url.into());
        Ok(())
    }

    /// Adds a host and all hosts below it; `*.example.org` is the same as `example.org`.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it is no host's name.
    pub fn add_host(&mut self, text: &str) -> Result<()> {
        let name = text.trim().trim_start_matches("*.").trim_matches('.');
        let bad = || StoreError::Unknown(format!("`{text}` is not the name of a host; write it without scheme, port and path"));
        match Host::parse(name).map_err(|_| bad())? {
            // A whole top-level domain is more likely a slip of the hand.
            Host::Domain(name) if !name.contains('.') => Err(bad()),
            // A number is an address of the Internet to a browser, but hardly to whoever wrote it.
            Host::Ipv4(_) if name.parse::<std::net::Ipv4Addr>().is_err() => Err(bad()),
            host => {
                self.hosts.insert(host.to_string());
                Ok(())
            }
        }
    }

    /// Adds the SHA-256 of an image's bytes as the server sent them.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it is none.
    pub fn add_sha256(&mut self, text: &str) -> Result<()> {
        let digest = text.trim().parse().map_err(|e: capfilt_schemas::DigestError| StoreError::Unknown(e.to_string()))?;
        self.sha256.insert(digest);
        Ok(())
    }

    /// Adds a line of a list: an address, a SHA-256 or a host, told apart by their form. Empty lines and those that start with `#` say
    /// nothing.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it is none of them.
    pub fn add_line(&mut self, line: &str) -> Result<()> {
        let line = line.trim();
        match line {
            "" => Ok(()),
            _ if line.starts_with('#') => Ok(()),
            _ if line.contains("://") => self.add_url(line),
            _ if line.len() == 64 && line.parse::<Digest>().is_ok() => self.add_sha256(line),
            _ => self.add_host(line),
        }
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.urls.is_empty() && self.hosts.is_empty() && self.sha256.is_empty()
    }

    /// As a record with this number.
    #[must_use]
    pub fn takedown(&self, number: u64, reason: Option<&str>) -> Takedown {
        Takedown {
            number,
            urls: self.urls.iter().cloned().collect(),
            hosts: self.hosts.iter().cloned().collect(),
            sha256: self.sha256.iter().copied().collect(),
            reason: reason.map(str::to_owned),
            made_at_ms: now_ms(),
        }
    }
}

/// All that some takedowns cover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenDown {
    count: u64,
    urls: HashSet<String>,
    hosts: HashSet<String>,
    sha256: HashSet<String>,
}

impl TakenDown {
    /// What `takedowns` cover together.
    #[must_use]
    pub fn of(takedowns: &[Takedown]) -> Self {
        let mut all = Self { count: takedowns.len() as u64, ..Self::default() };
        for takedown in takedowns {
            all.urls.extend(takedown.urls.iter().map(|u| key(u).1));
            all.hosts.extend(takedown.hosts.iter().cloned());
            all.sha256.extend(takedown.sha256.iter().map(ToString::to_string));
        }
        all
    }

    /// How many takedowns these are.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether nothing is covered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.urls.is_empty() && self.hosts.is_empty() && self.sha256.is_empty()
    }

    /// What is covered, as a name: takedowns that cover the same have the same digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut lines: Vec<String> = Vec::new();
        for (kind, set) in [("url", &self.urls), ("host", &self.hosts), ("sha256", &self.sha256)] {
            lines.extend(set.iter().map(|item| format!("{kind} {item}\n")));
        }
        lines.sort_unstable();
        Digest::of(lines.concat().as_bytes())
    }

    /// Whether the image at an address is covered, whatever its bytes.
    #[must_use]
    pub fn covers_url(&self, url: &str) -> bool {
        if url == REMOVED_URL {
            return true;
        }
        if self.urls.is_empty() && self.hosts.is_empty() {
            return false;
        }
        let (host, key) = key(url);
        let mut name = host.as_deref();
        while let Some(host) = name {
            if self.hosts.contains(host) {
                return true;
            }
            name = host.split_once('.').map(|(_, above)| above);
        }
        self.urls.contains(&key)
    }

    /// Whether an image is covered by its bytes, given their SHA-256 in lower-case hexadecimal.
    #[must_use]
    pub fn covers_bytes(&self, sha256: &str) -> bool {
        self.sha256.contains(sha256)
    }

    /// Whether an image is covered by its address or by its bytes.
    #[must_use]
    pub fn covers(&self, url: &str, sha256: Option<&str>) -> bool {
        sha256.is_some_and(|sha256| self.covers_bytes(sha256)) || self.covers_url(url)
    }
}

/// The host of an address, and the address in the form in which addresses are compared: without scheme, fragment and the dot that a host may
/// end in.
fn key(url: &str) -> (Option<String>, String) {
    let Ok(mut parsed) = Url::parse(url) else { return (None, url.to_owned()) };
    parsed.set_fragment(None);
    let host = parsed.host_str().map(|h| h.trim_end_matches('.').to_owned());
    let key = match parsed.scheme() {
        "http" | "https" => format!("{}{}", host.as_deref().unwrap_or_default(), &parsed[url::Position::AfterHost..]),
        _ => parsed.into(),
    };
    (host, key)
}

impl Store {
    /// Appends a takedown, unless the same was made before; that one is returned then.
    ///
    /// # Errors
    /// [`StoreError::Io`] or [`StoreError::Record`].
    pub async fn take_down(&self, targets: &Targets, reason: Option<&str>) -> Result<Takedown> {
        let wanted = targets.takedown(0, None);
        let same = |t: &Takedown| t.urls == wanted.urls && t.hosts == wanted.hosts && t.sha256 == wanted.sha256;
        self.append_json_once(&layout::takedowns(), same, |number| targets.takedown(number, reason)).await
    }

    /// All takedowns, oldest first.
    ///
    /// # Errors
    /// As [`take_down`](Self::take_down).
    pub async fn takedowns(&self) -> Result<Vec<Takedown>> {
        self.list_json(&layout::takedowns()).await
    }

    /// What all takedowns of the store cover.
    ///
    /// # Errors
    /// As [`take_down`](Self::take_down).
    pub async fn taken_down(&self) -> Result<TakenDown> {
        Ok(TakenDown::of(&self.takedowns().await?))
    }

    /// Lets a shard that has been put already, `redaction.to`, stand for another, and removes that one. Killed in between, the shard is
    /// readable all the same, and the same call again goes on. If another replacement was named first, it counts.
    ///
    /// # Errors
    /// As [`take_down`](Self::take_down).
    pub async fn redact(&self, redaction: &Redaction) -> Result<()> {
        let Redaction { table, from, .. } = redaction;
        if redaction.to.digest == *from {
            return Ok(());
        }
        if let Created::Exists(first) = self.create_json(&layout::redaction(*table, from), redaction).await?
            && first.to != redaction.to
        {
            tracing::warn!(%table, shard = %from, "another sweep was first; its replacement counts");
        }
        self.remove_redacted(*table, from).await
    }

    /// Removes the bytes of a shard that has a replacement.
    ///
    /// # Errors
    /// As [`take_down`](Self::take_down).
    pub async fn remove_redacted(&self, table: Table, from: &Digest) -> Result<()> {
        self.delete(&layout::object(table, from)).await
    }

    /// The redactions of a table, in the order of the shards replaced.
    ///
    /// # Errors
    /// As [`take_down`](Self::take_down).
    pub async fn redactions(&self, table: Table) -> Result<Vec<Redaction>> {
        self.list_json(&layout::redactions(table)).await
    }

    /// Which shard stands for one that is not there.
    pub(crate) async fn replacement(&self, table: Table, digest: &Digest) -> Result<Digest> {
        let there: Option<Redaction> = self.get_json(&layout::redaction(table, digest)).await?;
        there.map(|r| r.to.digest).ok_or_else(|| StoreError::Missing { path: layout::object(table, digest).to_string() })
    }

    /// The shards of a table whose bytes are there, in the order of their digests, with their size.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn shards(&self, table: Table) -> Result<Vec<(Digest, u64)>> {
        let found = self.list(&layout::objects(table)).await?;
        Ok(found.iter().filter_map(|m| Some((layout::digest_of(&m.location)?, m.size))).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn covering(lines: &[&str]) -> TakenDown {
        let mut targets = Targets::default();
        lines.iter().for_each(|l| targets.add_line(l).unwrap());
        TakenDown::of(&[targets.takedown(1, None)])
    }

    #[test]
    fn an_address_is_covered_however_it_is_written() {
        let down = covering(&["https://Example.org:443/a%20b/../c.jpg?x=1#top", "# a comment", ""]);
        for url in ["http://example.org/c.jpg?x=1", "https://example.org/c.jpg?x=1#other", "http://example.org./c.jpg?x=1"] {
            assert!(down.covers_url(url), "{url}");
        }
        assert!(covering(&["http://example.org.:81/c.jpg"]).covers_url("https://example.org:81/c.jpg"));
        for url in
            ["https://example.org/c.jpg", "https://www.example.org/c.jpg?x=1", "https://example.org:8080/c.jpg?x=1", "c.jpg", ""]
        {
            assert!(!down.covers_url(url), "{url}");
        }
        assert!(down.covers_url(REMOVED_URL) && TakenDown::default().covers_url(REMOVED_URL));
    }

    #[test]
    fn a_host_covers_the_hosts_below_it_and_no_other() {
        let down = covering(&["*.Example.org", "bücher.example", "127.0.0.1"]);
        for url in
            ["https://example.org/x", "http://a.b.example.org./x", "http://xn--bcher-kva.example/", "http://127.0.0.1:81/x"]
        {
            assert!(down.covers_url(url), "{url}");
        }
        for url in ["https://notexample.org/", "https://example.org.evil.net/", "http://127.0.0.2/", "https://org/"] {
            assert!(!down.covers_url(url), "{url}");
        }
    }

    #[test]
    fn bytes_are_covered_by_their_digest() {
        let digest = Digest::of(b"image").to_string();
        let down = covering(&[&digest.to_uppercase()]);
        assert!(down.covers("http://a.b/", Some(&digest)) && !down.covers("http://a.b/", None));
        assert!(!down.covers_bytes(&Digest::of(b"other").to_string()));
    }

    #[test]
    fn the_digest_is_of_what_is_covered() {
        let (a, b) = (covering(&["http://a.b/x", "c.d"]), covering(&["c.d", "https://a.b/x#y"]));
        assert_eq!(a.digest(), b.digest());
        assert_ne!(a.digest(), covering(&["http://a.b/x"]).digest());
    }

    #[test]
    fn what_is_none_of_the_three_is_refused_by_name() {
        let mut targets = Targets::default();
        for bad in ["ftp://a.b/x", "http://", "com", "a b", "a.b/c", "a.b:80", "0123"] {
            let said = targets.add_line(bad).map(|()| targets.clone()).unwrap_err().to_string();
            assert!(said.contains(bad), "{bad}: {said}");
        }
        assert!(targets.is_empty());
        assert!(targets.add_sha256("abc").is_err());
    }
}
