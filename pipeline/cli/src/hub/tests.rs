//! Against a server that speaks the hub's protocol, and breaks it where a test says so.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use capfilt_vision::files;
use futures::StreamExt as _;
use tempfile::TempDir;

use super::*;

const REPOSITORY: &str = "owner/model";
const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";
const TOKEN: &str = "hf_secret";

/// What a server does other than the hub.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    /// Nothing.
    None,
    /// Each connection of a download breaks after this many bytes.
    Breaks(usize),
    /// The first connection of a download breaks after this many bytes, and later ones begin at the beginning.
    Restarts(usize),
    /// Files end too early, as if they ended there.
    CutOff,
    /// Files are of the right length and hold other bytes.
    Garbled,
    /// Downloads never end.
    Silent,
    /// Everything is answered with this status.
    Status(u16),
    /// The listing is no JSON.
    Nonsense,
}

struct World {
    /// Commit → files.
    commits: BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>,
    /// Revision → commit.
    revisions: BTreeMap<String, &'static str>,
    fault: Fault,
    /// Files are given only to those with the token.
    gated: bool,
    /// Path and bearer of each request.
    requests: Vec<(String, Option<String>)>,
}

#[derive(Clone)]
struct Server {
    address: SocketAddr,
    world: Arc<Mutex<World>>,
}

impl Server {
    async fn start() -> Self {
        let files = |weights: u8| {
            let texts = [files::CONFIG, files::PREPROCESSOR, files::TOKENIZER, "README.md", "tf_model.h5"];
            let mut all: BTreeMap<String, Vec<u8>> =
                texts.map(|name| (name.to_owned(), format!("{{\"{name}\": 1}}").into())).into();
            all.insert(files::WEIGHTS.to_owned(), (0..300_000_u32).map(|n| (n as u8).wrapping_mul(weights)).collect());
            all
        };
        let commits = BTreeMap::from([(FIRST, files(3)), (SECOND, files(5))]);
        let revisions = BTreeMap::from([("main".to_owned(), FIRST), ("refs/pr/18".to_owned(), SECOND)]);
        let world = World { commits, revisions, fault: Fault::None, gated: false, requests: Vec::new() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self { address: listener.local_addr().unwrap(), world: Arc::new(Mutex::new(world)) };
        let router = Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        server
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.world.lock().unwrap());
    }

    /// The paths asked for since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.world.lock().unwrap().requests).into_iter().map(|(path, _)| path).collect()
    }

    fn hub(&self, home: &TempDir) -> Hub {
        Hub {
            endpoint: format!("http://{}", self.address),
            cache: home.path().join("hub"),
            token: None,
            offline: false,
            patience: Duration::from_secs(30),
        }
    }

    fn weights(&self, commit: &str) -> Vec<u8> {
        self.world.lock().unwrap().commits[commit][files::WEIGHTS].clone()
    }
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    let bearer =
        request.headers().get(header::AUTHORIZATION).map(|v| v.to_str().unwrap().trim_start_matches("Bearer ").to_owned());
    let path = request.uri().path().to_owned();
    let mut world = server.world.lock().unwrap();
    world.requests.push((path.clone(), bearer.clone()));
    if let Fault::Status(status) = world.fault {
        return StatusCode::from_u16(status).unwrap().into_response();
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPOSITORY}/revision/")) {
        return listing(&world, &revision.replace("%2F", "/"));
    }
    if let Some(rest) = path.strip_prefix(&format!("/{REPOSITORY}/resolve/")) {
        let (commit, file) = rest.split_once('/').unwrap();
        if world.gated && bearer.as_deref() != Some(TOKEN) {
            return StatusCode::FORBIDDEN.into_response();
        }
        return resolve(&world, server.address, commit, file);
    }
    // Small files lie behind a relative redirect, large ones on another host, which is the same here.
    for (prefix, small) in [("/api/resolve-cache/", true), ("/cdn/", false)] {
        if let Some((commit, file)) = path.strip_prefix(prefix).and_then(|rest| rest.split_once('/')) {
            return content(&mut world, commit, file, request.headers(), small);
        }
    }
    StatusCode::NOT_FOUND.into_response()
}

fn listing(world: &World, revision: &str) -> Response {
    if world.fault == Fault::Nonsense {
        return "<html>".into_response();
    }
    let revision = world.revisions.get(revision).copied().unwrap_or(revision);
    let Some((commit, files)) = world.commits.get_key_value(revision) else { return StatusCode::NOT_FOUND.into_response() };
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let (size, sha256) = (bytes.len(), format!("{:x}", Sha256::digest(bytes)));
        match size > 1000 {
            true => {
                serde_json::json!({"rfilename": name, "size": size, "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}})
            }
            false => serde_json::json!({"rfilename": name, "size": size, "blobId": etag(bytes)}),
        }
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    serde_json::json!({"id": REPOSITORY, "sha": commit, "siblings": siblings}).to_string().into_response()
}

/// As the hub names small files; any name does.
fn etag(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))[..40].to_owned()
}

fn resolve(world: &World, address: SocketAddr, commit: &str, file: &str) -> Response {
    let Some(bytes) = world.commits.get(commit).and_then(|files| files.get(file)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let redirect = |location: String| {
        let size = bytes.len().to_string();
        let sha256 = format!("\"{:x}\"", Sha256::digest(bytes));
        let headers =
            [("location", location), ("x-repo-commit", commit.to_owned()), ("x-linked-etag", sha256), ("x-linked-size", size)];
        (StatusCode::FOUND, headers, "").into_response()
    };
    match bytes.len() > 1000 {
        true => redirect(format!("http://{address}/cdn/{commit}/{file}")),
        false => {
            (StatusCode::TEMPORARY_REDIRECT, [("location", format!("/api/resolve-cache/{commit}/{file}"))], "").into_response()
        }
    }
}

fn content(world: &mut World, commit: &str, file: &str, headers: &HeaderMap, small: bool) -> Response {
    let mut bytes = world.commits[commit][file].clone();
    let whole = bytes.len();
    let range = headers.get(header::RANGE).map(|v| v.to_str().unwrap().trim_start_matches("bytes=").to_owned());
    let (start, end) = range.as_deref().and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let (start, end) = (start.parse().unwrap_or(0), end.parse().map_or(whole, |end: usize| end + 1));
    let probe = end == 1;
    let named = [("etag", format!("\"{}\"", etag(&bytes))), ("x-repo-commit", commit.to_owned())];
    if start >= whole {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    let mut part = (StatusCode::PARTIAL_CONTENT, format!("bytes {start}-{}/{whole}", end - 1), start);
    let mut breaks_at = None;
    if !small && !probe {
        match world.fault {
            Fault::Breaks(at) => breaks_at = Some(at),
            Fault::Restarts(at) if start == 0 => breaks_at = Some(at),
            Fault::Restarts(_) => part = (StatusCode::OK, String::new(), 0),
            Fault::CutOff => bytes.truncate(whole / 2),
            Fault::Garbled => bytes[1000] ^= 1,
            Fault::Silent => {
                return Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>()).into_response();
            }
            Fault::None | Fault::Status(_) | Fault::Nonsense => {}
        }
    }
    let (status, content_range, start) = part;
    let body = bytes.get(start..end.min(bytes.len())).unwrap_or_default().to_vec();
    let body = match breaks_at {
        Some(at) => {
            let sent = body[..at.min(body.len())].to_vec();
            let breaks = at < body.len();
            // What was written before goes out while the server waits.
            let broken = futures::stream::once(tokio::time::sleep(Duration::from_millis(50)))
                .filter_map(move |()| std::future::ready(breaks.then(|| Err(std::io::Error::other("broken")))));
            Body::from_stream(futures::stream::iter([Ok(Bytes::from(sent))]).chain(broken))
        }
        None => Body::from(body),
    };
    (status, named, [("content-range", content_range)], body).into_response()
}

fn name(text: &str) -> HubName {
    HubName::parse(text).unwrap()
}

async fn failure(hub: &Hub, text: &str) -> String {
    format!("{:#}", hub.checkpoint(&name(text)).await.unwrap_err())
}

/// The files of a snapshot that are there and can be read.
fn there(folder: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(folder).map(|entries| entries.map(|e| e.unwrap().path()).collect::<Vec<_>>()).unwrap_or_default();
    let mut names: Vec<String> =
        entries.iter().filter(|path| path.exists()).map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

const WANTED: [&str; 4] = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"];

#[test]
fn names_of_the_hub_are_told_from_other_texts() {
    for (text, repository, revision) in [
        ("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-base", "main"),
        ("Salesforce/blip-itm-base-coco@refs/pr/5", "Salesforce/blip-itm-base-coco", "refs/pr/5"),
        ("a/b@1.0", "a/b", "1.0"),
    ] {
        let parsed = name(text);
        assert_eq!((parsed.repository.as_str(), parsed.revision.as_str()), (repository, revision));
        assert_eq!(parsed.to_string(), text);
    }
    for text in [
        "",
        "model",
        "a/b/c",
        "/a/b",
        "../a",
        "./a",
        "a/..",
        "a/b@../../x",
        "a/b@",
        "a/b@/x",
        "a b/c",
        "https://hf.co/a/b",
        "a/b@.x",
    ] {
        assert_eq!(HubName::parse(text), None, "{text}");
    }
}

#[tokio::test]
async fn what_is_needed_is_fetched_once() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let hub = server.hub(&home);
    let folder = hub.checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!(folder, home.path().join("hub/models--owner--model/snapshots").join(FIRST));
    assert_eq!(there(&folder), WANTED);
    assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));
    let asked = server.requests();
    assert!(!asked.iter().any(|path| path.contains("tf_model") || path.contains("README")), "{asked:?}");

    // Again: what does `main` mean, and nothing else.
    assert_eq!(hub.checkpoint(&name(REPOSITORY)).await.unwrap(), folder);
    assert_eq!(server.requests(), ["/api/models/owner/model/revision/main"]);
    // A commit that is there is asked for nowhere.
    assert_eq!(hub.checkpoint(&name(&format!("{REPOSITORY}@{FIRST}"))).await.unwrap(), folder);
    assert_eq!(server.requests(), [""; 0]);

    let other = hub.checkpoint(&name("owner/model@refs/pr/18")).await.unwrap();
    assert!(other.ends_with(SECOND) && server.requests()[0].ends_with("/revision/refs%2Fpr%2F18"));
    assert_eq!(std::fs::read(other.join(files::WEIGHTS)).unwrap(), server.weights(SECOND));
    // `main` moves on.
    server.change(|world| _ = world.revisions.insert("main".to_owned(), SECOND));
    assert_eq!(hub.checkpoint(&name(REPOSITORY)).await.unwrap(), other);
    assert_eq!(server.requests().len(), 1);
    // A commit with the same files has the same bytes in the cache.
    const THIRD: &str = "3333333333333333333333333333333333333333";
    server.change(|world| {
        let mut files = world.commits[SECOND].clone();
        files.insert("README.md".to_owned(), b"more".to_vec());
        world.commits.insert(THIRD, files);
        world.revisions.insert("main".to_owned(), THIRD);
    });
    let third = hub.checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!((there(&third), server.requests().len()), (there(&other), 1));
    assert_eq!(
        std::fs::canonicalize(third.join(files::WEIGHTS)).unwrap(),
        std::fs::canonicalize(other.join(files::WEIGHTS)).unwrap()
    );
}

#[tokio::test]
async fn shards_are_fetched_as_their_index_names_them() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    server.change(|world| {
        let files = world.commits.get_mut(FIRST).unwrap();
        files.remove(files::WEIGHTS);
        files.insert("model.safetensors.index.json".to_owned(), index.into());
        files.insert("model-1.safetensors".to_owned(), vec![1; 2000]);
    });
    let text = failure(&server.hub(&home), REPOSITORY).await;
    assert!(text.contains("is not whole: it has no `model-2.safetensors`"), "{text}");
    server.change(|world| drop(world.commits.get_mut(FIRST).unwrap().insert("model-2.safetensors".to_owned(), vec![2; 5000])));
    let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), [2; 5000]);

    let offline = Hub { offline: true, ..server.hub(&home) };
    assert_eq!(offline.checkpoint(&name(REPOSITORY)).await.unwrap(), folder);
    std::fs::remove_file(folder.join("model-1.safetensors")).unwrap();
    let text = failure(&offline, REPOSITORY).await;
    assert!(text.contains("model-1.safetensors"), "{text}");
}

#[tokio::test]
async fn offline_only_the_cache_is_used() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let offline = Hub { offline: true, ..server.hub(&home) };
    let text = failure(&offline, REPOSITORY).await;
    assert!(
        text.contains("`owner/model`: HF_HUB_OFFLINE is set, and the cache lacks it") && text.contains("refs/main"),
        "{text}"
    );
    assert_eq!(server.requests(), [""; 0]);

    let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
    server.requests();
    assert_eq!(offline.checkpoint(&name(REPOSITORY)).await.unwrap(), folder);
    assert_eq!(offline.checkpoint(&name(&format!("owner/model@{FIRST}"))).await.unwrap(), folder);
    assert!(failure(&offline, "owner/model@v2").await.contains("refs/v2"));
    assert_eq!(server.requests(), [""; 0]);
    std::fs::remove_file(folder.join(files::WEIGHTS)).unwrap();
    assert!(failure(&offline, REPOSITORY).await.contains("has no weights"));
}

#[tokio::test]
async fn where_the_hub_cannot_be_reached_the_cache_helps_out() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let nowhere = Hub { endpoint: "http://127.0.0.1:9".to_owned(), ..server.hub(&home) };
    let text = failure(&nowhere, REPOSITORY).await;
    assert!(text.contains("http://127.0.0.1:9 cannot be reached"), "{text}");
    let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!(nowhere.checkpoint(&name(REPOSITORY)).await.unwrap(), folder);
    server.change(|world| world.fault = Fault::Status(503));
    assert_eq!(server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap(), folder);
    // A repository that is gone is no failing network.
    server.change(|world| world.fault = Fault::Status(404));
    assert!(failure(&server.hub(&home), REPOSITORY).await.contains("has no repository"));
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let (hub, known) = (server.hub(&home), Hub { token: Some("hf_wrong".to_owned()), ..server.hub(&home) });
    for (fault, hub, part) in [
        (Fault::Status(401), &hub, "knows no such repository, or it is not open to all; accept its terms"),
        (Fault::Status(401), &known, "does not take the token"),
        (Fault::Status(403), &hub, "access is restricted; accept the terms at http://127.0.0.1"),
        (Fault::Status(404), &hub, "has no repository `owner/model` with a revision `main`"),
        (Fault::Status(418), &hub, "answered with status 418"),
        (Fault::Nonsense, &hub, "cannot fetch `owner/model`"),
    ] {
        server.change(|world| world.fault = fault);
        let text = failure(hub, REPOSITORY).await;
        assert!(text.contains(part), "{fault:?}: {text}");
    }
    server.change(|world| world.fault = Fault::None);
    assert!(failure(&hub, "owner/model@v7").await.contains("with a revision `v7`"));
    assert!(failure(&hub, "owner/other").await.contains("has no repository `owner/other`"));
    server.change(|world| drop(world.commits.get_mut(FIRST).unwrap().remove(files::WEIGHTS)));
    assert!(failure(&hub, REPOSITORY).await.contains("`owner/model` has no weights: none of model.safetensors"));
}

#[tokio::test]
async fn the_token_goes_only_where_one_is_asked_for() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    let hub = Hub { token: Some(TOKEN.to_owned()), ..server.hub(&home) };
    hub.checkpoint(&name(REPOSITORY)).await.unwrap();
    assert!(server.world.lock().unwrap().requests.iter().all(|(_, bearer)| bearer.is_none()));

    server.change(|world| world.gated = true);
    let fresh = TempDir::new().unwrap();
    let text = failure(&server.hub(&fresh), REPOSITORY).await;
    assert!(text.contains("access is restricted"), "{text}");
    let folder = Hub { cache: fresh.path().join("hub"), ..hub }.checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!(there(&folder), WANTED);
}

#[tokio::test]
async fn broken_connections_are_taken_up_where_they_broke() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    // 300,000 bytes in pieces of 120,000.
    server.change(|world| world.fault = Fault::Breaks(120_000));
    let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
    assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));

    // A server that begins anew where it should go on: noticed, and fetched again.
    let fresh = TempDir::new().unwrap();
    server.change(|world| world.fault = Fault::Restarts(120_000));
    let hub = server.hub(&fresh);
    let fetched = tokio::spawn(async move { hub.checkpoint(&name(REPOSITORY)).await });
    tokio::time::sleep(Duration::from_millis(900)).await;
    server.change(|world| world.fault = Fault::None);
    let folder = fetched.await.unwrap().unwrap();
    assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));
}

#[tokio::test]
async fn nothing_torn_is_taken_for_whole() {
    for (fault, part) in [
        (Fault::CutOff, "150000 bytes arrived where the hub tells 300000"),
        (Fault::Garbled, "another SHA-256 than the hub tells"),
        (Fault::Breaks(0), "5 times in a row"),
    ] {
        let (server, home) = (Server::start().await, TempDir::new().unwrap());
        server.change(|world| world.fault = fault);
        let text = failure(&server.hub(&home), REPOSITORY).await;
        assert!(text.contains("cannot fetch `model.safetensors` of `owner/model`") && text.contains(part), "{text}");
        let snapshot = home.path().join("hub/models--owner--model/snapshots").join(FIRST);
        assert!(!there(&snapshot).contains(&files::WEIGHTS.to_owned()), "{fault:?}");
        assert!(failure(&Hub { offline: true, ..server.hub(&home) }, REPOSITORY).await.contains("refs/main"));
        // The next time all is well.
        server.change(|world| world.fault = Fault::None);
        let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
        assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));
        // What was damaged in the cache since is fetched again.
        std::fs::write(folder.join(files::WEIGHTS), "cut").unwrap();
        server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
        assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));
    }
}

#[tokio::test]
async fn a_part_that_was_left_whole_or_too_long_is_no_obstacle() {
    let server = Server::start().await;
    for length in [300_000, 400_000] {
        let home = TempDir::new().unwrap();
        let blobs = home.path().join("hub/models--owner--model/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let part = blobs.join(format!("{:x}.part", Sha256::digest(server.weights(FIRST))));
        std::fs::write(part, vec![7; length]).unwrap();
        let folder = server.hub(&home).checkpoint(&name(REPOSITORY)).await.unwrap();
        assert_eq!(std::fs::read(folder.join(files::WEIGHTS)).unwrap(), server.weights(FIRST));
    }
}

#[tokio::test]
async fn a_hub_that_falls_silent_is_given_up() {
    let (server, home) = (Server::start().await, TempDir::new().unwrap());
    server.change(|world| world.fault = Fault::Silent);
    let hub = Hub { patience: Duration::from_secs(1), ..server.hub(&home) };
    let text = failure(&hub, REPOSITORY).await;
    assert!(text.contains("was silent for 1 s"), "{text}");
}
