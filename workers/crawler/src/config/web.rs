//! How the crawler behaves towards servers, and the route that its requests take.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::bad;
use crate::{CrawlError, units};

/// How the crawler behaves towards servers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WebConfig {
    /// The `User-Agent`. Its leading word is the name that robots.txt and `X-Robots-Tag` are searched for; it should lead to a person.
    pub agent: String,
    /// Whether robots.txt (RFC 9309) is obeyed.
    pub robots: bool,
    /// Whether `noai`, `noimageai`, `noindex`, `noimageindex` and `tdm-reservation: 1` in headers and pages are obeyed.
    pub opt_out: bool,
    /// Files of addresses whose owners have opted out: hosts (with their subdomains), addresses, `https://host/path/*`, or SHA-256 of
    /// addresses, one a line.
    pub opt_out_lists: Vec<PathBuf>,
    /// Most time for one attempt, from the connection to the last byte of the body.
    #[serde(with = "units::time")]
    pub timeout: Duration,
    /// Most time of an attempt until the connection stands: name resolution, TCP and TLS.
    #[serde(with = "units::time")]
    pub connect_timeout: Duration,
    /// Most time for an address from its first request on: attempts, redirects, waits between them. Before that it waits for its turn as
    /// long as manners and good answers to others take, and so much beside.
    #[serde(with = "units::time")]
    pub deadline: Duration,
    /// A body must bring so many bytes a second, over every five seconds of it; 0 asks for nothing.
    #[serde(with = "units::size")]
    pub min_rate: usize,
    /// Further attempts after one that failed in a way that may pass.
    pub retries: u32,
    /// The wait before the first further attempt; it doubles each time.
    #[serde(with = "units::time")]
    pub backoff: Duration,
    /// A `Retry-After` up to this is waited for; a longer one ends the attempts of its address. The host's other addresses wait, if it is
    /// over within their `deadline`.
    #[serde(with = "units::time")]
    pub max_retry_after: Duration,
    /// Redirects followed for one address.
    pub max_redirects: u32,
    /// A host that has given no sign of life for so long, to eight requests at least, is left alone for ten minutes: its other addresses
    /// fail at once, in the same way. 0 never gives up.
    #[serde(with = "units::time")]
    pub give_up_host_after: Duration,
}

impl Default for WebConfig {
    fn default() -> Self {
        Self {
            agent: concat!("capfilt/", env!("CARGO_PKG_VERSION"), " (image-text dataset crawler; obeys robots.txt)").to_owned(),
            robots: true,
            opt_out: true,
            opt_out_lists: Vec::new(),
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            deadline: Duration::from_secs(900),
            min_rate: 256,
            retries: 2,
            backoff: Duration::from_millis(500),
            max_retry_after: Duration::from_secs(30),
            max_redirects: 5,
            give_up_host_after: Duration::from_secs(60),
        }
    }
}

impl WebConfig {
    pub(super) fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.token().is_empty() || !self.agent.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            let why = "it must begin with a name of letters, `-` and `_`, and hold only printable ASCII";
            return Err(bad(&format!("{name}.agent"), why));
        }
        for (setting, time) in [("timeout", self.timeout), ("connect_timeout", self.connect_timeout), ("deadline", self.deadline)]
        {
            if time.is_zero() {
                return Err(bad(&format!("{name}.{setting}"), "it is zero"));
            }
        }
        Ok(())
    }

    /// The product token of the agent (RFC 9309, section 2.2.1): its leading letters, `-` and `_`.
    #[must_use]
    pub fn token(&self) -> &str {
        let end = self.agent.find(|c: char| !c.is_ascii_alphabetic() && c != '-' && c != '_');
        &self.agent[..end.unwrap_or(self.agent.len())]
    }
}

/// `[worker.crawler]`: speed and route.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrawlerWorkerConfig {
    /// Most requests at work at once.
    pub connections: usize,
    /// Most requests at work at once at one host.
    pub per_host: usize,
    /// Most requests a second to one host; a host that answers 429 gets fewer.
    pub requests_per_second: f64,
    /// Bytes of bodies, and of finished images that wait for an earlier one, at which a fetch task begins no further request.
    #[serde(with = "units::size")]
    pub buffer: usize,
    /// An HTTP proxy for all requests: `http://127.0.0.1:3128`. Names are resolved by it, and it has to refuse those that lead into private
    /// networks: only addresses that are written as such are refused here.
    pub proxy: Option<String>,
    /// Addresses of host names, in place of DNS; `*` stands for every name without its own. A port here replaces 80 or 443.
    pub resolve: BTreeMap<String, SocketAddr>,
    /// Networks that may be asked although they are not on the public internet: `["10.0.0.0/8"]`. Private, loopback, link-local and all
    /// other special addresses are refused otherwise, whatever name or redirect leads to them; those in `resolve` are your own choice.
    pub allow_networks: Vec<IpNet>,
    /// Files of further certificates (PEM) that are trusted, beside Mozilla's roots: for a TLS proxy.
    pub ca_files: Vec<PathBuf>,
    /// How names are resolved.
    pub dns: DnsConfig,
}

impl Default for CrawlerWorkerConfig {
    fn default() -> Self {
        Self {
            connections: 64,
            per_host: 4,
            requests_per_second: 10.0,
            buffer: 512 << 20,
            proxy: None,
            resolve: BTreeMap::new(),
            allow_networks: Vec::new(),
            ca_files: Vec::new(),
            dns: DnsConfig::default(),
        }
    }
}

impl CrawlerWorkerConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self) -> Result<(), CrawlError> {
        if self.connections == 0 || self.per_host == 0 {
            return Err(bad("worker.crawler.connections and per_host", "they must be at least 1"));
        }
        if self.requests_per_second.is_nan() || self.requests_per_second <= 0.0 {
            return Err(bad("worker.crawler.requests_per_second", "it must be above 0"));
        }
        if self.dns.timeout.is_zero() || self.dns.attempts == 0 || self.dns.cache == 0 {
            return Err(bad("worker.crawler.dns", "timeout, attempts and cache must be above 0"));
        }
        self.dns.servers()?;
        Ok(())
    }
}

/// `[worker.crawler.dns]`: the built-in resolver. Its cache belongs to the process.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DnsConfig {
    /// Servers to ask, in order of preference: `["1.1.1.1", "[2620:fe::fe]:53"]`; those of the system (`/etc/resolv.conf`) if empty.
    pub upstreams: Vec<String>,
    /// When a server has not answered for this long, the next one is asked too.
    #[serde(with = "units::time")]
    pub patience: Duration,
    /// Most time for one name.
    #[serde(with = "units::time")]
    pub timeout: Duration,
    /// Rounds over all servers, within `timeout`.
    pub attempts: u32,
    /// Whether AAAA records are asked for; by default if the machine has a route to the IPv6 internet.
    pub ipv6: Option<bool>,
    /// Names kept in memory.
    pub cache: usize,
    /// Shortest time an address is kept, whatever its record says.
    #[serde(with = "units::time")]
    pub min_ttl: Duration,
    /// Longest time an address is kept.
    #[serde(with = "units::time")]
    pub max_ttl: Duration,
    /// Longest time it is kept that a name does not exist.
    #[serde(with = "units::time")]
    pub max_negative_ttl: Duration,
    /// How long it is kept that the servers failed (`SERVFAIL`, `REFUSED`, silence).
    #[serde(with = "units::time")]
    pub failure_ttl: Duration,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            upstreams: Vec::new(),
            patience: Duration::from_millis(400),
            timeout: Duration::from_secs(4),
            attempts: 2,
            ipv6: None,
            cache: 200_000,
            min_ttl: Duration::from_secs(60),
            max_ttl: Duration::from_secs(3600),
            max_negative_ttl: Duration::from_secs(300),
            failure_ttl: Duration::from_secs(2),
        }
    }
}

impl DnsConfig {
    /// The servers of `upstreams`, with port 53 where none is given.
    pub(crate) fn servers(&self) -> Result<Vec<SocketAddr>, CrawlError> {
        let parse = |text: &String| {
            let server = text.parse().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)));
            server.map_err(|_| bad("worker.crawler.dns.upstreams", &format!("`{text}` is no IP address, with or without a port")))
        };
        self.upstreams.iter().map(parse).collect()
    }
}
