//! A run over a web that is hostile in every layer: names, TLS, HTTP/1.1, HTTP/2, redirects, bodies, images. Every address ends in time
//! with its status, the same one each time, and the good pictures of the same hosts all arrive.

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use capfilt_crawler::{CrawlerWorkerConfig, DnsConfig, Fetch, FetchConfig, Web, WebConfig};
use capfilt_schemas::FetchStatus as S;
use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::names::Names;
use crate::server::{Reply, Request, Server, head, ok, redirect, status, with};
use crate::support::{gzip, png, run, selected, texts};
use crate::tls;

const MAX_BODY: usize = 300_000;

/// A chunk of a PNG with its checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    [&(data.len() as u32).to_be_bytes(), kind.as_slice(), data, &crc.sum().to_be_bytes()].concat()
}

/// A PNG of a size with some chunks before its (missing or tiny) pixels.
fn png_with(width: u32, height: u32, chunks: &[Vec<u8>]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let mut pixels = ZlibEncoder::new(Vec::new(), Compression::best());
    pixels.write_all(&[0; 1_000]).unwrap();
    let pixels = chunk(b"IDAT", &pixels.finish().unwrap());
    [b"\x89PNG\r\n\x1a\n".as_slice(), &chunk(b"IHDR", &header), &chunks.concat(), &pixels, &chunk(b"IEND", &[])].concat()
}

/// A good picture behind a chunk that unpacks to 100 MB.
fn png_with_bomb(kind: &[u8; 4], before: &[u8]) -> Vec<u8> {
    let mut bomb = ZlibEncoder::new(before.to_vec(), Compression::best());
    (0..100).for_each(|_| bomb.write_all(&vec![0; 1 << 20]).unwrap());
    let good = png(7);
    let after_header = 8 + 25;
    [&good[..after_header], &chunk(kind, &bomb.finish().unwrap()), &good[after_header..]].concat()
}

/// What every host says; paths are behaviours.
fn answer(r: &Request) -> Reply {
    let image = || ok("image/png", png(1));
    let half = || [head("Content-Length: 1000\r\n"), png(1)[..60].to_vec()].concat();
    let chunked = || head("Transfer-Encoding: chunked\r\n");
    let encoded = |body: Vec<u8>, how: &str| with(ok("image/png", body), "Content-Encoding", how);
    // What goes on until the client's time is over is slowed down a little: all of it shares this machine.
    let (drip, flood) = (Duration::from_millis(100), Duration::from_millis(5));
    let path = r.path.split('?').next().unwrap_or_default();
    match path {
        "/robots.txt" => status(404),
        // Before the head.
        "/stall" => Reply::Late(Duration::from_secs(600), Box::new(image())),
        "/closed-at-once" => Reply::Raw(vec![]),
        "/reset-at-once" => Reply::Reset(vec![]),
        "/http-0.9" => Reply::Raw(png(1)),
        "/ssh" => Reply::Raw(b"SSH-2.0-OpenSSH_9.9\r\n".to_vec()),
        "/nothing-but-newlines" => Reply::Endless(vec![], b"\r\n".repeat(40_000), Duration::ZERO),
        "/drip-head" => Reply::Endless(b"HTTP/1.1 200 OK\r\n".to_vec(), b"X-A: b\r\n".to_vec(), drip),
        "/endless-head" => Reply::Endless(b"HTTP/1.1 200 OK\r\n".to_vec(), b"X-A: b\r\n".repeat(8_000), Duration::ZERO),
        "/endless-header" => Reply::Endless(b"HTTP/1.1 200 OK\r\nX-A: ".to_vec(), vec![b'a'; 65_536], Duration::ZERO),
        "/many-headers" => {
            let headers: String = (0..5_000).map(|n| format!("X-{n}: a\r\n")).collect();
            Reply::Raw([head(&headers), png(1)].concat())
        }
        "/endless-status" => Reply::Endless(b"HTTP/1.1 200 ".to_vec(), vec![b'O'; 65_536], Duration::ZERO),
        "/1xx-flood" => Reply::Endless(vec![], b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".repeat(100), flood),
        "/1xx-drip" => Reply::Endless(vec![], b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), drip),
        "/1xx-then-good" => {
            Reply::Raw([b"HTTP/1.1 103 Early Hints\r\n\r\n".repeat(3), head("Connection: close\r\n"), png(1)].concat())
        }
        "/upgrade" => Reply::Raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_vec()),
        // Lengths.
        "/long-length" => Reply::Raw(half()),
        "/short-length" => Reply::Raw([head("Content-Length: 100\r\n"), png(1)].concat()),
        "/two-lengths" => Reply::Raw([head("Content-Length: 100\r\nContent-Length: 5000\r\n"), png(1)].concat()),
        "/negative-length" => Reply::Raw([head("Content-Length: -5\r\n"), png(1)].concat()),
        "/huge-length" => Reply::Endless(head("Content-Length: 99999999999999\r\n"), vec![0; 10], Duration::from_secs(5)),
        "/overflowing-length" => Reply::Raw([head("Content-Length: 99999999999999999999999\r\n"), png(1)].concat()),
        "/cut-chunks" => Reply::Raw([chunked(), b"100\r\nabc".to_vec()].concat()),
        "/bad-chunks" => Reply::Raw([chunked(), b"zz\r\nabc".to_vec()].concat()),
        "/huge-chunk" => Reply::Raw([chunked(), b"ffffffffffffffff\r\nabc".to_vec()].concat()),
        "/endless-chunk-size" => Reply::Endless(chunked(), b"0".repeat(8_192), flood),
        "/endless-chunk-extension" => Reply::Endless([chunked(), b"1;".to_vec()].concat(), b"x".repeat(65_536), Duration::ZERO),
        "/endless-trailers" => {
            Reply::Endless([chunked(), b"0\r\n".to_vec()].concat(), b"X-A: b\r\n".repeat(8_000), Duration::ZERO)
        }
        // Bodies.
        "/drip" => Reply::Endless(head("Content-Length: 100000\r\n"), b"x".to_vec(), drip),
        "/stall-after-head" => Reply::Endless(head("Content-Length: 1000\r\n"), vec![], Duration::from_secs(600)),
        "/stall-in-body" => Reply::Endless(half(), vec![], Duration::from_secs(600)),
        "/endless" => Reply::Endless(head(""), vec![0; 65_536], Duration::ZERO),
        "/endless-chunks" => {
            Reply::Endless(chunked(), [b"10000\r\n".to_vec(), vec![b'x'; 0x10000], b"\r\n".to_vec()].concat(), Duration::ZERO)
        }
        "/reset-in-body" => Reply::Reset(half()),
        "/empty" => ok("image/png", ""),
        "/html" => ok("image/jpeg", "<!doctype html><h1>no hotlinking</h1>"),
        "/multipart" => {
            let part = [b"--x\r\nContent-Type: image/png\r\n\r\n".to_vec(), png(1), b"\r\n".to_vec()].concat();
            ok("multipart/x-mixed-replace; boundary=x", part.repeat(2))
        }
        "/lying-type" => ok("application/pdf", png(1)),
        "/polyglot" => ok("image/png", [b"GIF89a/*".to_vec(), png(1), b"*/=1;<script>alert(1)</script>".to_vec()].concat()),
        "/zip-behind" => ok("image/png", [png(1), b"PK\x03\x04".repeat(100)].concat()),
        "/cut-picture" => ok("image/png", &png(1)[..png(1).len() / 2]),
        "/pixel-bomb" => ok("image/png", png_with(20_000, 20_000, &[])),
        "/4-billion" => ok("image/png", png_with(u32::MAX, u32::MAX, &[])),
        "/icc-bomb" => ok("image/png", png_with_bomb(b"iCCP", b"x\0\0")),
        "/text-bomb" => ok("image/png", png_with_bomb(b"zTXt", b"x\0\0")),
        // Codings.
        "/gzip" => encoded(gzip(&png(1)), "gzip"),
        "/gzip-bomb" => encoded(gzip(&vec![0; 50_000_000]), "gzip"),
        "/gzip-twice" => encoded(gzip(&gzip(&png(1))), "gzip, gzip"),
        "/gzip-cut" => encoded(gzip(&png(1))[..50].to_vec(), "gzip"),
        "/gzip-endless-name" => Reply::Endless(
            [head("Content-Encoding: gzip\r\n"), b"\x1f\x8b\x08\x08\0\0\0\0\0\xff".to_vec()].concat(),
            vec![b'n'; 8_192],
            flood,
        ),
        "/gzip-endless-nothing" => Reply::Endless(
            [head("Content-Encoding: gzip\r\n"), b"\x1f\x8b\x08\0\0\0\0\0\0\xff".to_vec()].concat(),
            // Stored blocks of no bytes.
            b"\0\0\0\xff\xff".repeat(1_000),
            flood,
        ),
        "/no-gzip" => encoded(b"not packed at all".to_vec(), "gzip"),
        "/no-deflate" => encoded(vec![0xff; 500], "deflate"),
        "/deflate-bomb" => {
            let mut bomb = ZlibEncoder::new(Vec::new(), Compression::best());
            (0..50).for_each(|_| bomb.write_all(&vec![0; 1 << 20]).unwrap());
            encoded(bomb.finish().unwrap(), "deflate")
        }
        "/brotli-bomb" => encoded(BROTLI_BOMB.to_vec(), "br"),
        // It says that it needs a window of a gigabyte.
        "/brotli-window" => encoded(vec![0x11, 0x1e, 0x3b, 0xff, 0xff, 0xff, 0x3f, 0, 0, 0, 0], "br"),
        "/unknown-coding" => encoded(png(1), "x-unheard-of"),
        // Codes.
        "/204" => Reply::Raw(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
        "/206" => with(Reply::Plain(206, vec![], png(1)[..80].to_vec()), "Content-Range", "bytes 0-79/5000"),
        "/206-whole" => {
            let n = png(1).len();
            with(Reply::Plain(206, vec![], png(1)), "Content-Range", &format!("bytes 0-{}/{n}", n - 1))
        }
        "/300" => status(300),
        "/304" => Reply::Raw(b"HTTP/1.1 304 Not Modified\r\n\r\n".to_vec()),
        "/404" => status(404),
        "/999" => status(999),
        "/503" => status(503),
        "/503-then-good" if r.before == 0 => with(status(503), "Retry-After", "1"),
        "/503-date" if r.before == 0 => with(status(503), "Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT"),
        "/503-absurd" => with(status(503), "Retry-After", "99999999999999999999999999"),
        // Redirects.
        "/loop" => redirect("/loop"),
        "/growing-loop" => redirect(&format!("{}?{}", path, "x".repeat(r.path.len()))),
        "/to-nowhere" => status(302),
        "/to-file" => redirect("file:///etc/passwd"),
        "/to-data" => redirect("data:image/png;base64,AAAA"),
        "/to-private" => redirect("http://192.168.1.1/admin.png"),
        "/to-metadata" => redirect("http://169.254.169.254/latest/meta-data/"),
        "/to-metadata-in-disguise" => redirect("http://[::ffff:a9fe:a9fe]/latest/meta-data/"),
        "/to-decimal" => redirect("http://2852039166/latest/meta-data/"),
        "/to-private-name" => redirect("http://private-name.test/x.png"),
        "/to-itself-by-https" => {
            let host = r.head.lines().find_map(|l| l.strip_prefix("host: ")).unwrap();
            redirect(&format!("https://{host}/x"))
        }
        "/endless-location" => redirect(&format!("/{}", "x".repeat(100_000))),
        _ => image(),
    }
}

/// 30 MB of zeros, as `brotli -q 11 -w 24` packs them.
const BROTLI_BOMB: [u8; 27] = [
    0xcf, 0xff, 0xff, 0x7f, 0xf8, 0x27, 0, 0xe2, 0xb1, 0x40, 0x20, 0xf7, 0xfe, 0x3f, 0xff, 0x86, 0x93, 0xf1, 0x4f, 0, 0xc4, 0x61,
    1, 0x80, 0xce, 0x6e, 0x32,
];

/// Paths of [`answer`], and what must come of them.
const PATHS: &[(&str, S)] = &[
    ("/stall", S::Timeout),
    ("/closed-at-once", S::Connect),
    ("/reset-at-once", S::Connect),
    ("/http-0.9", S::Connect),
    ("/ssh", S::Connect),
    ("/nothing-but-newlines", S::TooLarge),
    ("/drip-head", S::Timeout),
    ("/endless-head", S::TooLarge),
    ("/endless-header", S::TooLarge),
    ("/many-headers", S::TooLarge),
    ("/endless-status", S::TooLarge),
    ("/1xx-flood", S::Timeout),
    ("/1xx-drip", S::Timeout),
    ("/1xx-then-good", S::Ok),
    ("/upgrade", S::Connect),
    ("/long-length", S::Truncated),
    ("/short-length", S::Decode),
    ("/two-lengths", S::Connect),
    ("/negative-length", S::Connect),
    ("/huge-length", S::TooLarge),
    ("/overflowing-length", S::Connect),
    ("/cut-chunks", S::Truncated),
    ("/bad-chunks", S::Truncated),
    ("/huge-chunk", S::Truncated),
    ("/endless-chunk-size", S::Timeout),
    ("/endless-chunk-extension", S::Truncated),
    ("/endless-trailers", S::Truncated),
    ("/drip", S::Timeout),
    ("/stall-after-head", S::Timeout),
    ("/stall-in-body", S::Timeout),
    ("/endless", S::TooLarge),
    ("/endless-chunks", S::TooLarge),
    ("/reset-in-body", S::Truncated),
    ("/empty", S::Empty),
    ("/html", S::NotImage),
    ("/multipart", S::NotImage),
    ("/lying-type", S::Ok),
    ("/polyglot", S::TooManyPixels),
    ("/zip-behind", S::Ok),
    ("/cut-picture", S::Decode),
    ("/pixel-bomb", S::TooManyPixels),
    ("/4-billion", S::TooManyPixels),
    ("/icc-bomb", S::Ok),
    ("/text-bomb", S::Ok),
    ("/gzip", S::Ok),
    ("/gzip-bomb", S::TooLarge),
    ("/gzip-twice", S::NotImage),
    ("/gzip-cut", S::Truncated),
    ("/gzip-endless-name", S::Timeout),
    ("/gzip-endless-nothing", S::Timeout),
    ("/no-gzip", S::Truncated),
    ("/no-deflate", S::Truncated),
    ("/deflate-bomb", S::TooLarge),
    ("/brotli-bomb", S::TooLarge),
    ("/brotli-window", S::Truncated),
    ("/unknown-coding", S::Ok),
    ("/204", S::Empty),
    ("/206", S::Truncated),
    ("/206-whole", S::Ok),
    ("/300", S::Redirect),
    ("/304", S::Redirect),
    ("/404", S::HttpClient),
    ("/999", S::HttpServer),
    ("/503", S::HttpServer),
    ("/503-then-good", S::Ok),
    ("/503-date", S::Ok),
    ("/503-absurd", S::HttpServer),
    ("/loop", S::Redirect),
    ("/growing-loop", S::Redirect),
    ("/to-nowhere", S::Redirect),
    ("/to-file", S::Redirect),
    ("/to-data", S::Redirect),
    ("/to-private", S::ForbiddenAddress),
    ("/to-metadata", S::ForbiddenAddress),
    ("/to-metadata-in-disguise", S::ForbiddenAddress),
    ("/to-decimal", S::ForbiddenAddress),
    ("/to-private-name", S::ForbiddenAddress),
    ("/to-itself-by-https", S::Tls),
    ("/endless-location", S::Redirect),
];

/// Hosts, by their names and how they take TLS, and what must come of a good picture there.
const HOSTS: &[(&str, S)] = &[
    ("http://black-hole.test:PORT/x", S::Dns),
    ("http://no-such-name.test:PORT/x", S::Dns),
    ("http://no-address.test:PORT/x", S::Dns),
    ("http://servfail.test:PORT/x", S::Dns),
    ("http://late-name.test:PORT/x", S::Ok),
    ("http://private-name.test:PORT/x", S::ForbiddenAddress),
    ("http://metadata-name.test:PORT/x", S::ForbiddenAddress),
    ("http://unspecified-name.test:PORT/x", S::ForbiddenAddress),
    ("http://mixed.test:PORT/x", S::Ok),
    ("http://half-dead.test:PORT/x", S::Ok),
    ("http://10.0.0.1/x", S::ForbiddenAddress),
    ("http://localhost.:PORT/x", S::Ok),
    ("http://[::1]:PORT/x", S::ForbiddenAddress),
    ("http://[fd00:ec2::254]/latest/", S::ForbiddenAddress),
    ("http://0x7f000001:PORT/x", S::Ok),
    ("http://refused.test:CLOSED/x", S::Connect),
    ("http://silent.test:SILENT/x", S::Timeout),
    ("http://busy.test:PORT/x", S::Ok),
    ("https://plain.test:PORT/x", S::Tls),
    ("https://good.tls.test:TLS/x", S::Ok),
    ("https://cut.tls.test:TLS/x", S::Truncated),
    ("https://silent.tls.test:TLS/x", S::Timeout),
    ("https://stalled.tls.test:TLS/x", S::Timeout),
    ("https://half.tls.test:TLS/x", S::Timeout),
    ("https://garbage.tls.test:TLS/x", S::Tls),
    ("https://alert.tls.test:TLS/x", S::Tls),
    ("https://self-signed.tls.test:TLS/x", S::Tls),
    ("https://expired.tls.test:TLS/x", S::Tls),
    ("https://other-name.tls.test:TLS/x", S::Tls),
    ("https://h2-good.tls.test:TLS/x", S::Ok),
    ("https://h2-goaway.tls.test:TLS/x", S::Connect),
    ("https://h2-goaway-then-good.tls.test:TLS/x", S::Connect),
    ("https://h2-reset.tls.test:TLS/x", S::Connect),
    ("https://h2-reset-in-body.tls.test:TLS/x", S::Truncated),
    ("https://h2-stall.tls.test:TLS/x", S::Timeout),
    ("https://h2-mute.tls.test:TLS/x", S::Timeout),
    ("https://h2-stall-in-body.tls.test:TLS/x", S::Timeout),
    ("https://h2-continuation-flood.tls.test:TLS/x", S::Connect),
    ("https://h2-empty-continuation-flood.tls.test:TLS/x", S::Connect),
    ("https://h2-header-bomb.tls.test:TLS/x", S::Connect),
    ("https://h2-ping-flood.tls.test:TLS/x", S::Timeout),
    ("https://h2-settings-flood.tls.test:TLS/x", S::Timeout),
    ("https://h2-empty-data-flood.tls.test:TLS/x", S::Truncated),
    ("https://h2-endless.tls.test:TLS/x", S::TooLarge),
    ("https://h2-huge-frame.tls.test:TLS/x", S::Truncated),
    ("https://h2-no-such-stream.tls.test:TLS/x", S::Connect),
    ("https://h2-garbage.tls.test:TLS/x", S::Connect),
];

/// The servers of one run.
struct World {
    folder: tempfile::TempDir,
    server: Server,
    names: Names,
    tls: SocketAddr,
    closed: SocketAddr,
    /// A port that takes connections into its queue, and never looks at them.
    silent: std::net::TcpListener,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tls = tls::start(&folder.path().join("ca.pem"), png(2)).await;
        let server = Server::start(|r| match (r.host.as_str(), r.path.as_str()) {
            // Every third request over a connection finds it closed, as if it had been idle for too long.
            ("keep-alive-cut.test", _) if r.nth % 3 == 2 => Reply::Raw(vec![]),
            ("rebinding.test", "/robots.txt") => Reply::Raw(b"HTTP/1.1 404 x\r\nConnection: close\r\n\r\n".to_vec()),
            ("busy.test", "/x") if r.before == 0 => with(status(429), "Retry-After", "1"),
            ("very-busy.test", "/x") => with(status(429), "Retry-After", "3600"),
            ("no-rules.test", "/robots.txt") => status(500),
            ("endless-rules.test", "/robots.txt") => Reply::Endless(head(""), b"Disallow: /y\n".repeat(5_000), Duration::ZERO),
            ("rules-to-metadata.test", "/robots.txt") => redirect("http://169.254.169.254/"),
            _ => answer(r),
        })
        .await;
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self { folder, server, names: Names::start().await, tls, closed, silent }
    }

    fn url(&self, text: &str) -> String {
        let ports = [
            ("PORT", self.server.address),
            ("TLS", self.tls),
            ("CLOSED", self.closed),
            ("SILENT", self.silent.local_addr().unwrap()),
        ];
        ports
            .iter()
            .fold(text.to_owned(), |url, (name, address)| url.replace(&format!(":{name}"), &format!(":{}", address.port())))
    }

    fn web(&self) -> Web {
        Web::new(&self.worker()).unwrap()
    }

    fn worker(&self) -> CrawlerWorkerConfig {
        let dns = DnsConfig {
            upstreams: vec![self.names.address.to_string()],
            patience: Duration::from_millis(500),
            timeout: Duration::from_secs(2),
            ipv6: Some(false),
            ..DnsConfig::default()
        };
        CrawlerWorkerConfig {
            connections: 120,
            per_host: 120,
            requests_per_second: 100_000.0,
            allow_networks: vec!["127.0.0.0/8".parse().unwrap()],
            ca_files: vec![self.folder.path().join("ca.pem")],
            dns,
            ..CrawlerWorkerConfig::default()
        }
    }

    /// All addresses, each with its status: every behaviour at a host of its own and at one that has them all, and good pictures
    /// between them.
    fn cases(&self) -> Vec<(String, S)> {
        let mut cases = Vec::new();
        for (i, (path, wanted)) in PATHS.iter().enumerate() {
            cases.push((self.url(&format!("http://host-{i}.test:PORT{path}")), *wanted));
            cases.push((self.url(&format!("http://host-{i}.test:PORT/good?{i}")), S::Ok));
            cases.push((self.url(&format!("http://all.test:PORT{path}?all")), *wanted));
            cases.push((self.url(&format!("http://all.test:PORT/good?{i}")), S::Ok));
        }
        cases.extend(HOSTS.iter().map(|(url, wanted)| (self.url(url), *wanted)));
        for (url, wanted) in [
            ("http://very-busy.test:PORT/x", S::RateLimited),
            ("http://no-rules.test:PORT/x", S::HttpServer),
            ("http://endless-rules.test:PORT/x", S::Ok),
            ("http://rules-to-metadata.test:PORT/x", S::ForbiddenAddress),
            ("gopher://a.test/", S::BadUrl),
            ("http://a.test:99999/", S::BadUrl),
        ] {
            cases.push((self.url(url), wanted));
        }
        cases.extend((0..40).map(|n| (self.url(&format!("http://keep-alive-cut.test:PORT/{n}")), S::Ok)));
        cases
    }
}

/// Time for an attempt, further attempts, and the deadline.
const WEB: (Duration, u32, Duration) = (Duration::from_secs(5), 1, Duration::from_secs(60));

fn config() -> FetchConfig {
    let (timeout, retries, deadline) = WEB;
    let web = WebConfig {
        timeout,
        retries,
        deadline,
        connect_timeout: Duration::from_secs(4),
        backoff: Duration::from_millis(40),
        max_retry_after: Duration::from_secs(5),
        ..WebConfig::default()
    };
    FetchConfig { web, max_body: MAX_BODY, ..FetchConfig::default() }
}

/// Statuses and reasons of a run, and how long it took.
async fn fetched(world: &World, urls: &[String]) -> (Vec<(String, String)>, Duration) {
    let stage = Fetch::new(world.web());
    let begin = Instant::now();
    // Where TLS is at stake, robots.txt would be the first to fail.
    let (tls, plain): (Vec<_>, Vec<_>) = urls.iter().cloned().partition(|url| url.contains(".tls.test"));
    let without_robots = FetchConfig { web: WebConfig { robots: false, ..config().web }, ..config() };
    let tasks = [(config(), plain), (without_robots, tls)].map(async |(config, urls)| {
        let (rows, _) = run(&stage, &config.params("now").unwrap(), selected(&urls)).await.unwrap();
        assert_eq!(texts(&rows, "url"), urls, "one row out for one row in, in order");
        urls.into_iter().zip(texts(&rows, "status").into_iter().zip(texts(&rows, "error"))).collect::<Vec<_>>()
    });
    let mut found: HashMap<String, (String, String)> = futures::future::join_all(tasks).await.into_iter().flatten().collect();
    (urls.iter().map(|url| found.remove(url).unwrap()).collect(), begin.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_address_ends_with_its_status_twice() {
    let world = World::new().await;
    let cases = world.cases();
    assert!(PATHS.len() + HOSTS.len() >= 100);
    let urls: Vec<String> = cases.iter().map(|c| c.0.clone()).collect();
    let (first, took) = fetched(&world, &urls).await;
    let wrong: Vec<String> = cases
        .iter()
        .zip(&first)
        .filter(|((_, wanted), (found, _))| wanted.as_str() != found)
        .map(|((url, wanted), (found, why))| format!("{url}: {found} ({why}) in place of {wanted}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // All rows are on their way at once, so one deadline is the whole of it; the rest is for a busy machine.
    assert!(took < WEB.2 + Duration::from_secs(60), "{took:?}");
    assert!(first.iter().all(|(_, why)| !why.contains("deadline")), "each ended by its own limits");
    assert!(world.names.asked("black-hole.test") < 20 && world.names.asked("no-such-name.test") < 4);

    let again = World::new().await;
    let urls: Vec<String> = again.cases().into_iter().map(|c| c.0).collect();
    let (second, _) = fetched(&again, &urls).await;
    // Ports, which some reasons tell, differ from run to run.
    let bare = |why: &str| why.replace(|c: char| c.is_ascii_digit(), "");
    let other: Vec<_> =
        first.iter().zip(&second).zip(&urls).filter(|((a, b), _)| (&a.0, bare(&a.1)) != (&b.0, bare(&b.1))).collect();
    assert!(other.is_empty(), "not the same in another run: {other:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_turns_private_is_not_followed() {
    let world = World::new().await;
    let mut worker = world.worker();
    (worker.dns.min_ttl, worker.dns.max_ttl) = (Duration::ZERO, Duration::ZERO);
    let stage = Fetch::new(Web::new(&worker).unwrap());
    let urls = [world.url("http://rebinding.test:PORT/x")];
    let (rows, _) = run(&stage, &config().params("now").unwrap(), selected(&urls)).await.unwrap();
    // Its robots.txt was had while the name was still ours.
    assert_eq!(
        (texts(&rows, "status"), world.server.hits("rebinding.test/robots.txt")),
        (vec!["forbidden_address".to_owned()], 1)
    );
    assert_eq!(world.server.hits("rebinding.test/x"), 0);
}

/// The peak of this process's memory, in bytes.
#[cfg(target_os = "linux")]
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// This test program again, with one test that is otherwise passed over, behind a shell command.
#[cfg(target_os = "linux")]
fn in_its_own_process(test: &str, before: &str) {
    let program = std::env::current_exe().unwrap();
    let run = std::process::Command::new("sh")
        .args(["-c", &format!("{before} exec \"$0\" \"$@\"")])
        .arg(Path::new(&program))
        .args([test, "--exact", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_bounded() {
    in_its_own_process("hostile::memory_in_its_own_process", "");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by memory_is_bounded"]
async fn memory_in_its_own_process() {
    let world = World::new().await;
    // Bombs, many times each.
    let (world, bombs) =
        (&world, PATHS.iter().filter(|(path, _)| ["bomb", "endless", "huge", "many", "window"].iter().any(|w| path.contains(w))));
    let urls: Vec<String> =
        bombs.flat_map(|(path, _)| (0..20).map(move |n| world.url(&format!("http://host-{n}.test:PORT{path}")))).collect();
    assert!(urls.len() > 300);
    let before = peak();
    fetched(world, &urls).await;
    let grown = peak() - before;
    // The servers of the test are in the same process. What was unpacked would be some 40 GB.
    assert!(grown < 700 << 20, "{} MiB", grown >> 20);
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_few_files_are_waited_for() {
    // The server is here: with as few files it could not answer, which is another trouble.
    let world = World::new().await;
    let before = format!("ulimit -n 64; SERVER={}", world.server.address);
    let child = move || in_its_own_process("hostile::few_files_in_their_own_process", &before);
    tokio::task::spawn_blocking(child).await.unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by too_few_files_are_waited_for"]
async fn few_files_in_their_own_process() {
    let server: SocketAddr = std::env::var("SERVER").unwrap().parse().unwrap();
    // 150 hosts at once, with 64 files.
    let urls: Vec<String> = (0..150).map(|n| format!("http://host-{n}.test:{}/good", server.port())).collect();
    let worker = CrawlerWorkerConfig {
        connections: 120,
        allow_networks: vec!["127.0.0.0/8".parse().unwrap()],
        resolve: [("*".to_owned(), server)].into(),
        ..CrawlerWorkerConfig::default()
    };
    let config = FetchConfig { web: WebConfig { robots: false, ..config().web }, ..config() };
    let (rows, _) = run(&Fetch::new(Web::new(&worker).unwrap()), &config.params("now").unwrap(), selected(&urls)).await.unwrap();
    let mut wrong = texts(&rows, "error");
    wrong.retain(|why| why != "-");
    assert!(texts(&rows, "status").iter().all(|s| s == "ok"), "{} of {}: {:?}", wrong.len(), urls.len(), wrong.first());
}
