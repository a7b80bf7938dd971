//! A small HTTP/1.1 server of many hosts, every answer of which is a function in a test.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a test is asked.
pub(crate) struct Request {
    pub(crate) host: String,
    /// With the query.
    pub(crate) path: String,
    /// How often this address was asked for before.
    pub(crate) before: usize,
    /// How many requests came over this connection before.
    pub(crate) nth: usize,
    pub(crate) head: String,
}

/// What it answers.
pub(crate) enum Reply {
    /// Status line and headers are made, with a right `Content-Length`.
    Plain(u16, Vec<(String, String)>, Vec<u8>),
    /// These bytes, then the connection is closed.
    Raw(Vec<u8>),
    /// These bytes, then the connection is reset.
    Reset(Vec<u8>),
    /// The first bytes, then the second ones again and again, with a pause before each, until the client has gone.
    Endless(Vec<u8>, Vec<u8>, Duration),
    /// The answer, later.
    Late(Duration, Box<Reply>),
}

pub(crate) fn ok(kind: &str, body: impl Into<Vec<u8>>) -> Reply {
    Reply::Plain(200, vec![("Content-Type".to_owned(), kind.to_owned())], body.into())
}

/// The head of an answer with an image, and with these header lines.
pub(crate) fn head(extra: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n{extra}\r\n").into_bytes()
}

pub(crate) fn status(code: u16) -> Reply {
    Reply::Plain(code, vec![], b"an error page".to_vec())
}

pub(crate) fn with(reply: Reply, name: &str, value: &str) -> Reply {
    match reply {
        Reply::Plain(code, mut headers, body) => {
            headers.push((name.to_owned(), value.to_owned()));
            Reply::Plain(code, headers, body)
        }
        other => other,
    }
}

pub(crate) fn redirect(to: &str) -> Reply {
    with(status(302), "Location", to)
}

#[derive(Default)]
struct Counts {
    hits: BTreeMap<String, usize>,
    order: Vec<String>,
    live: BTreeMap<String, usize>,
    most: BTreeMap<String, usize>,
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    counts: Arc<Mutex<Counts>>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Mutex::new(Counts::default()));
        let (shared, answer) = (Arc::clone(&counts), Arc::new(answer));
        let task = tokio::spawn(async move {
            loop {
                let Ok((connection, _)) = listener.accept().await else {
                    // Too many open files, perhaps: others will close theirs.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let (shared, answer) = (Arc::clone(&shared), Arc::clone(&answer));
                tokio::spawn(async move { serve(connection, &shared, &*answer).await });
            }
        });
        Self { address, counts, task }
    }

    /// How often `host/path` was asked for.
    pub(crate) fn hits(&self, address: &str) -> usize {
        self.counts.lock().unwrap().hits.get(address).copied().unwrap_or(0)
    }

    /// Everything that was asked for, in order.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.counts.lock().unwrap().order.clone()
    }

    /// Most requests at work at once at a host.
    pub(crate) fn most_at_once(&self, host: &str) -> usize {
        self.counts.lock().unwrap().most.get(host).copied().unwrap_or(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut connection: TcpStream, counts: &Mutex<Counts>, answer: &(dyn Fn(&Request) -> Reply + Send + Sync)) {
    let mut nth = 0;
    while let Some(head) = read_head(&mut connection).await {
        let path = head.split(' ').nth(1).unwrap_or("/").to_owned();
        let host =
            head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned)).unwrap_or_default();
        let host = host.split(':').next().unwrap_or_default().to_owned();
        let address = format!("{host}{path}");
        let before = {
            let mut counts = counts.lock().unwrap();
            counts.order.push(address.clone());
            let live = counts.live.entry(host.clone()).or_default();
            *live += 1;
            let live = *live;
            let most = counts.most.entry(host.clone()).or_default();
            *most = live.max(*most);
            let hits = counts.hits.entry(address).or_default();
            *hits += 1;
            *hits - 1
        };
        let reply = answer(&Request { host: host.clone(), path, before, nth, head });
        nth += 1;
        let go_on = send(&mut connection, reply).await;
        *counts.lock().unwrap().live.entry(host).or_default() -= 1;
        if !go_on {
            return;
        }
    }
}

async fn read_head(connection: &mut TcpStream) -> Option<String> {
    let mut head = vec![connection.read_u8().await.ok()?];
    if head == [0x16] {
        // A TLS greeting: it is answered as servers do that only speak HTTP.
        let _ = connection.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        // Closed with bytes unread, the connection would be reset and the answer lost.
        let _ = connection.read_to_end(&mut head).await;
        return None;
    }
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.ok()?);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// Whether the connection may be used again.
async fn send(connection: &mut TcpStream, mut reply: Reply) -> bool {
    while let Reply::Late(pause, later) = reply {
        tokio::time::sleep(pause).await;
        reply = *later;
    }
    match reply {
        Reply::Plain(code, headers, body) => {
            let mut head = format!("HTTP/1.1 {code} x\r\nContent-Length: {}\r\n", body.len());
            headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
            head.push_str("\r\n");
            connection.write_all(&[head.into_bytes(), body].concat()).await.is_ok()
        }
        Reply::Raw(bytes) => {
            let _ = connection.write_all(&bytes).await;
            let _ = connection.shutdown().await;
            false
        }
        Reply::Reset(bytes) => {
            let _ = connection.write_all(&bytes).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = connection.set_zero_linger();
            false
        }
        Reply::Endless(first, again, pause) => {
            let mut alive = connection.write_all(&first).await.is_ok();
            while alive {
                tokio::time::sleep(pause).await;
                alive = connection.write_all(&again).await.is_ok();
            }
            false
        }
        Reply::Late(..) => false,
    }
}
