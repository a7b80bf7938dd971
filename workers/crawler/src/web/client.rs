//! The clients that requests go through: TLS, proxy, and the resolver behind its guard.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use reqwest::{Client, Proxy, redirect};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use url::Url;

use super::dns::Dns;
use super::guard;
use crate::CrawlError;
use crate::config::CrawlerWorkerConfig;

/// A connection without requests is kept for this long. Short: a crawl meets many hosts, and each kept one is an open file.
const IDLE: Duration = Duration::from_secs(8);
/// Addresses of a host that are tried: the time for connecting is shared among them.
const ADDRESSES_TRIED: usize = 3;
/// An HTTP/2 connection with requests that says nothing for this long is asked whether it lives, and has as long to answer.
const PING_AFTER: Duration = Duration::from_secs(3);

/// What clients are made from: one for each `connect_timeout`.
pub(super) struct Route {
    config: CrawlerWorkerConfig,
    tls: rustls::ClientConfig,
    resolver: Arc<Resolver>,
}

/// A client in two forms.
#[derive(Clone)]
pub(super) struct Clients {
    /// It keeps connections and uses them again.
    pub(super) keeping: Client,
    /// Each request has a connection of its own: for further attempts, since the one that was kept may have been the trouble.
    pub(super) fresh: Client,
}

impl Route {
    pub(super) fn new(config: &CrawlerWorkerConfig) -> Result<Self, CrawlError> {
        let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        for path in &config.ca_files {
            let unusable = |reason: String| CrawlError::Format { path: path.clone(), reason };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| unusable(e.to_string()))? {
                let certificate = certificate.map_err(|e| unusable(e.to_string()))?;
                roots.add(certificate).map_err(|e| unusable(format!("a certificate in it cannot be used: {e}")))?;
            }
        }
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| CrawlError::Client(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let proxy = config.proxy.as_ref().and_then(|p| Url::parse(p).ok()?.host_str().map(str::to_owned));
        let fixed = config.resolve.clone();
        let resolver = Resolver { fixed, proxy, allowed: config.allow_networks.clone(), dns: Dns::new(&config.dns)? };
        Ok(Self { config: config.clone(), tls, resolver: Arc::new(resolver) })
    }

    /// Redirects are left to the caller, and the environment's proxy settings do not count.
    pub(super) fn clients(&self, connect_timeout: Duration) -> Result<Clients, CrawlError> {
        let build = |idle: usize| {
            let mut builder = Client::builder()
                .tls_backend_preconfigured(self.tls.clone())
                .redirect(redirect::Policy::none())
                .referer(false)
                .retry(reqwest::retry::never())
                .no_proxy()
                .connect_timeout(connect_timeout)
                .pool_idle_timeout(IDLE)
                .pool_max_idle_per_host(idle)
                .http2_keep_alive_interval(PING_AFTER)
                .http2_keep_alive_timeout(PING_AFTER)
                .dns_resolver(Arc::clone(&self.resolver));
            if let Some(proxy) = &self.config.proxy {
                builder = builder.proxy(Proxy::all(proxy)?);
            }
            builder.build()
        };
        let both = || Ok(Clients { keeping: build(self.config.per_host)?, fresh: build(0)? });
        both().map_err(|e: reqwest::Error| CrawlError::Client(e.to_string()))
    }

    /// Whether an address may be asked, as far as it can be told before its name is resolved.
    pub(super) fn admits(&self, url: &Url) -> bool {
        guard::literal(url).is_none_or(|ip| guard::admits(&self.config.allow_networks, ip))
    }

    pub(super) fn dns(&self) -> &Dns {
        &self.resolver.dns
    }
}

/// The fixed addresses of the config, then DNS behind the guard.
struct Resolver {
    fixed: std::collections::BTreeMap<String, SocketAddr>,
    /// The name of the proxy's host: where it is is the operator's choice.
    proxy: Option<String>,
    allowed: Vec<IpNet>,
    dns: Dns,
}

/// A name leads only to addresses that must not be asked.
#[derive(Debug, thiserror::Error)]
#[error("the host is not on the public internet")]
pub(super) struct Forbidden;

impl reqwest::dns::Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let fixed = self.fixed.get(name.as_str()).or_else(|| self.fixed.get("*")).copied();
        if let Some(address) = fixed {
            return Box::pin(async move { Ok(Box::new(std::iter::once(address)) as reqwest::dns::Addrs) });
        }
        let trusted = self.proxy.as_deref() == Some(name.as_str());
        let (dns, allowed) = (self.dns.clone(), self.allowed.clone());
        Box::pin(async move {
            let found = dns.addresses(name.as_str()).await?;
            let may_be_asked = |ip: &std::net::IpAddr| trusted || guard::admits(&allowed, *ip);
            let addresses: Vec<SocketAddr> =
                found.iter().copied().filter(may_be_asked).take(ADDRESSES_TRIED).map(|ip| SocketAddr::new(ip, 0)).collect();
            if addresses.is_empty() { Err(Forbidden.into()) } else { Ok(Box::new(addresses.into_iter()) as reqwest::dns::Addrs) }
        })
    }
}
