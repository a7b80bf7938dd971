//! The built-in resolver: several servers, none of which can hold up a name; one query at a time for a name; and a memory for what is
//! there, what is not there, and what could not be found out.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt, Shared};
use futures::stream::{FuturesUnordered, StreamExt};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Hosts, TokioResolver};

use crate::CrawlError;
use crate::config::DnsConfig;

/// Once the IPv4 addresses are there, IPv6 ones get this much more time (RFC 8305, section 3).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// A server that let us wait is asked last for this long.
const SLOW_FOR: Duration = Duration::from_secs(30);
/// Waits for a socket.
const SOCKET_PAUSES: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(30), Duration::from_millis(100)];
/// Queries to one server that may wait for their answers; as many names are looked up at once as there are connections.
const QUERIES_AT_ONCE: usize = 8192;

/// Why a name has no address.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum NoAddress {
    /// There is no such name, or it has no addresses.
    #[error("the host's name does not exist")]
    Absent,
    /// The servers failed; they are not asked for this name again before `until`.
    #[error("the host's name could not be resolved")]
    Failed {
        /// When another try is worth it.
        until: Instant,
    },
    /// This machine has no more sockets for queries.
    #[error("too many open files")]
    OutOfFiles,
}

type Answer = Result<Arc<[IpAddr]>, NoAddress>;

/// An answer, and how long it counts.
#[derive(Clone)]
struct Kept {
    answer: Answer,
    until: Instant,
}

type Search = Shared<BoxFuture<'static, Kept>>;

/// The resolver. Cheap to clone.
#[derive(Clone)]
pub(super) struct Dns(Arc<Inner>);

struct Inner {
    config: DnsConfig,
    hosts: Hosts,
    servers: Vec<Server>,
    ipv6: bool,
    cache: Mutex<Cache>,
}

struct Server {
    resolver: TokioResolver,
    slow_until: Mutex<Option<Instant>>,
}

impl Dns {
    /// # Errors
    /// [`CrawlError::Config`] or [`CrawlError::Client`].
    pub(super) fn new(config: &DnsConfig) -> Result<Self, CrawlError> {
        let servers = servers(config)?;
        if servers.is_empty() {
            tracing::info!("no DNS server is known; give one in worker.crawler.dns.upstreams");
        }
        let servers = servers.into_iter().map(|s| Server::new(s, config)).collect::<Result<_, _>>();
        Ok(Self(Arc::new(Inner {
            hosts: Hosts::from_system().unwrap_or_default(),
            servers: servers.map_err(|e| CrawlError::Client(e.to_string()))?,
            ipv6: config.ipv6.unwrap_or_else(has_ipv6),
            cache: Mutex::new(Cache::new(config.cache)),
            config: config.clone(),
        })))
    }

    /// The addresses of a name, IPv4 first, at least one. It ends within `timeout`.
    pub(super) async fn addresses(&self, name: &str) -> Answer {
        let search = {
            let mut cache = self.0.cache.lock().unwrap_or_else(PoisonError::into_inner);
            match cache.get(name) {
                Some(search) => search,
                None => {
                    let (inner, name) = (Arc::clone(&self.0), name.to_owned());
                    // A task of its own: whoever asked first may go away, the others still wait for the answer.
                    let task = tokio::spawn({
                        let name = name.clone();
                        async move { inner.find(&name).await }
                    });
                    let search = task.map(|kept| kept.unwrap_or_else(|_| Kept::failed(Duration::ZERO))).boxed().shared();
                    cache.insert(name, search.clone());
                    search
                }
            }
        };
        search.await.answer
    }
}

/// The servers of the config, or those of the system.
pub(super) fn servers(config: &DnsConfig) -> Result<Vec<SocketAddr>, CrawlError> {
    let given = config.servers()?;
    if !given.is_empty() {
        return Ok(given);
    }
    let system = hickory_resolver::system_conf::read_system_conf();
    let servers = system.map(|(config, _)| config.name_servers().iter().map(|s| SocketAddr::new(s.ip, 53)).collect());
    Ok(servers.unwrap_or_default())
}

/// Whether the machine has a route to the IPv6 internet. Connecting a UDP socket sends nothing.
fn has_ipv6() -> bool {
    let public = Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888);
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).and_then(|socket| socket.connect((public, 53))).is_ok()
}

impl Kept {
    fn failed(how_long: Duration) -> Self {
        let until = Instant::now() + how_long;
        Self { answer: Err(NoAddress::Failed { until }), until }
    }
}

impl Server {
    fn new(address: SocketAddr, config: &DnsConfig) -> Result<Self, NetError> {
        let with_port = |mut connection: ConnectionConfig| {
            connection.port = address.port();
            connection
        };
        let connections = vec![with_port(ConnectionConfig::udp()), with_port(ConnectionConfig::tcp())];
        let server = NameServerConfig::new(address.ip(), true, connections);
        let mut options = ResolverOpts::default();
        options.timeout = config.timeout;
        options.attempts = 0;
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.max_active_requests = QUERIES_AT_ONCE;
        let resolver =
            TokioResolver::builder_with_config(ResolverConfig::from_name_servers(vec![server]), TokioRuntimeProvider::default())
                .with_options(options)
                .build()?;
        Ok(Self { resolver, slow_until: Mutex::new(None) })
    }

    /// hickory tells only that it had no socket, not why; so that is looked at here. Files that are free again are used at once.
    async fn query(&self, name: &Name, kind: RecordType) -> Result<Lookup, NetError> {
        for pause in SOCKET_PAUSES {
            match self.resolver.lookup(name.clone(), kind).await {
                Err(NetError::NoConnections) => match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)) {
                    Err(e) if is_out_of_files(&e) => return Err(e.into()),
                    _ => tokio::time::sleep(pause).await,
                },
                answer => return answer,
            }
        }
        self.resolver.lookup(name.clone(), kind).await
    }

    fn set_slow(&self, slow: bool) {
        *self.slow_until.lock().unwrap_or_else(PoisonError::into_inner) = slow.then(|| Instant::now() + SLOW_FOR);
    }

    fn is_slow(&self) -> bool {
        self.slow_until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| until > Instant::now())
    }
}

impl Inner {
    async fn find(&self, host: &str) -> Kept {
        let name = Name::from_ascii(host).map(|mut name| {
            // Never a name of the local search domains.
            name.set_fqdn(true);
            name
        });
        let Ok(name) = name else {
            return Kept { answer: Err(NoAddress::Absent), until: Instant::now() + self.config.max_negative_ttl };
        };
        let local: Vec<IpAddr> = [RecordType::A, RecordType::AAAA]
            .into_iter()
            .filter_map(|kind| self.hosts.lookup_static_host(&Query::query(name.clone(), kind)))
            .flat_map(|found| found.answers().iter().filter_map(|r| r.data.ip_addr()).collect::<Vec<_>>())
            .collect();
        if !local.is_empty() {
            return Kept { answer: Ok(local.into()), until: Instant::now() + self.config.max_ttl };
        }
        match tokio::time::timeout(self.config.timeout, self.both_families(&name)).await {
            Ok(kept) => kept,
            Err(_) => Kept::failed(self.config.failure_ttl),
        }
    }

    /// A records count; AAAA records are added if they come soon after, and waited for only if there are no A records.
    async fn both_families(&self, name: &Name) -> Kept {
        if !self.ipv6 {
            return self.ask(name, RecordType::A).await;
        }
        let mut v6 = std::pin::pin!(self.ask(name, RecordType::AAAA).fuse());
        let mut v4 = std::pin::pin!(self.ask(name, RecordType::A).fuse());
        let mut early = None;
        let found = loop {
            tokio::select! {
                found = &mut v4 => break found,
                found = &mut v6, if early.is_none() => early = Some(found),
            }
        };
        let other = match early {
            Some(other) => Some(other),
            None if found.answer.is_ok() => tokio::time::timeout(RESOLUTION_DELAY, v6).await.ok(),
            None => Some(v6.await),
        };
        match (&found.answer, other) {
            (Ok(v4), Some(Kept { answer: Ok(v6), until })) => {
                Kept { answer: Ok(v4.iter().chain(v6.iter()).copied().collect()), until: until.min(found.until) }
            }
            // Where one family is not there and the other could not be found out, nothing is known.
            (Err(NoAddress::Absent), Some(other)) => other,
            (Err(_), Some(other)) if other.answer.is_ok() => other,
            _ => found,
        }
    }

    /// Asks one server after the other, without waiting long for any: the first that knows counts.
    async fn ask(&self, name: &Name, kind: RecordType) -> Kept {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        order.sort_by_key(|i| self.servers[*i].is_slow());
        let mut to_ask = std::iter::repeat_n(order, self.config.attempts as usize).flatten().peekable();
        let mut asked = FuturesUnordered::new();
        let mut silent = Vec::new();
        loop {
            match to_ask.next() {
                Some(i) => {
                    silent.push(i);
                    asked.push(async move { (i, self.servers[i].query(name, kind).await) });
                }
                None if asked.is_empty() => return Kept::failed(self.config.failure_ttl),
                None => {}
            }
            let impatient = tokio::time::sleep(self.config.patience);
            tokio::select! {
                answer = asked.next() => {
                    let Some((i, answer)) = answer else { continue };
                    if let Some(kept) = self.understood(answer) {
                        self.servers[i].set_slow(false);
                        return kept;
                    }
                    silent.retain(|s| *s != i);
                }
                () = impatient, if to_ask.peek().is_some() => silent.iter().for_each(|i| self.servers[*i].set_slow(true)),
            }
        }
    }

    /// What a server says, if it says anything: `None` where another one may know more.
    fn understood(&self, answer: Result<Lookup, NetError>) -> Option<Kept> {
        let config = &self.config;
        let (now, seconds) = (Instant::now(), |ttl: u32| Duration::from_secs(ttl.into()));
        let absent = |ttl: Duration| Some(Kept { answer: Err(NoAddress::Absent), until: now + ttl.min(config.max_negative_ttl) });
        match answer {
            Ok(found) => {
                let addresses: Arc<[IpAddr]> = found.answers().iter().filter_map(|r| r.data.ip_addr()).collect();
                if addresses.is_empty() {
                    return absent(config.failure_ttl);
                }
                let ttl = seconds(found.answers().iter().map(|r| r.ttl).min().unwrap_or(0));
                Some(Kept { answer: Ok(addresses), until: now + ttl.max(config.min_ttl).min(config.max_ttl) })
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                absent(none.negative_ttl.map_or(config.failure_ttl, seconds).max(config.failure_ttl))
            }
            Err(NetError::Io(e)) if is_out_of_files(&e) => Some(Kept { answer: Err(NoAddress::OutOfFiles), until: now }),
            Err(e) => {
                tracing::debug!(error = %e, "a DNS server failed");
                None
            }
        }
    }
}

/// Searches under way and what came of them, in two halves: when the younger is full the older is forgotten, and what is used again moves
/// over. So what is rarely asked for goes first, and nothing is searched.
struct Cache {
    young: HashMap<String, Search>,
    old: HashMap<String, Search>,
    half: usize,
}

impl Cache {
    fn new(size: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: size.div_ceil(2) }
    }

    /// The search for a name, if it is under way or its answer still counts.
    fn get(&mut self, name: &str) -> Option<Search> {
        if let Some((name, search)) = self.old.remove_entry(name) {
            self.insert(name, search);
        }
        let search = self.young.get(name)?;
        search.peek().is_none_or(|kept| kept.until > Instant::now()).then(|| search.clone())
    }

    fn insert(&mut self, name: String, search: Search) {
        if self.young.len() >= self.half && !self.young.contains_key(&name) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(name, search);
    }
}

/// Whether the process or the machine, not the server, is at its end: `EMFILE`, `ENFILE`.
pub(super) fn is_out_of_files(error: &std::io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

#[cfg(test)]
mod tests;
