//! Checkpoints of the Hugging Face hub, or of a server that speaks its protocol: fetched into the cache that its own tools use.
//!
//! `hf-hub` asks, resumes and lays out the cache. What it leaves open is done here: all files are of one commit, each is held against
//! the size and the SHA-256 that the hub tells before it is used, a hub that falls silent is given up, and the token goes only to a
//! repository that asks for one.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use capfilt_vision::files::{Files, shard_of_tensors};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;

use crate::progress::Bar;

/// The hub itself.
const ENDPOINT: &str = "https://huggingface.co";
/// The revision of a name without one.
const MAIN: &str = "main";
/// How often a file is asked for while connections break.
const ATTEMPTS: u32 = 5;
/// How long to wait before the second attempt; twice as long before each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// A repository of the hub at a revision: `owner/name` or `owner/name@revision`, where a revision is a branch, a tag, a pull request
/// (`refs/pr/18`) or a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct HubName {
    repository: String,
    revision: String,
}

impl HubName {
    /// Reads a name; none if the text cannot be one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (owner, name) = repository.split_once('/')?;
        let word = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let revision_fits = revision.split('/').all(word);
        (word(owner) && word(name) && revision_fits)
            .then(|| Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            MAIN => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// Where the hub is, and what is known of it here.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    /// How long it may be silent.
    patience: Duration,
}

/// What the hub tells of a repository.
#[derive(Deserialize)]
struct Listing {
    /// The commit.
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl Sibling {
    /// The name of its bytes in the cache.
    fn blob(&self) -> Option<&str> {
        let name = self.lfs.as_ref().map(|lfs| &lfs.sha256).or(self.blob_id.as_ref())?;
        name.bytes().all(|b| b.is_ascii_hexdigit()).then_some(name)
    }
}

impl Hub {
    /// As the variables say that the tools of Hugging Face obey: `HF_ENDPOINT`; `HF_HOME`, `HF_HUB_CACHE`; `HF_TOKEN`, `HF_TOKEN_PATH`;
    /// `HF_HUB_OFFLINE`.
    pub(crate) fn from_env() -> anyhow::Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let below = |name: &str, path: &str| variable(name).map(|folder| Path::new(&folder).join(path));
        let home = variable("HF_HOME").map(PathBuf::from).or_else(|| below("XDG_CACHE_HOME", "huggingface"));
        let home = home.or_else(|| below("HOME", ".cache/huggingface")).context("no folder for the hub's cache; set HF_HOME")?;
        let cache = variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        Ok(Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned(),
            cache: std::path::absolute(cache).context("the hub's cache has no path")?,
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_uppercase().as_str())),
            patience: Duration::from_secs(60),
        })
    }

    /// The folder with a checkpoint's files, fetched as far as they are not in the cache.
    ///
    /// # Errors
    /// There is no such repository or revision, no access to it or no network, it holds no checkpoint, or what arrives is damaged.
    pub(crate) async fn checkpoint(&self, name: &HubName) -> anyhow::Result<PathBuf> {
        if self.offline {
            return self.cached(name).map_err(|missing| {
                let why = "HF_HUB_OFFLINE is set, and the cache lacks it";
                anyhow!("cannot fetch `{name}`: {why}: {missing}; unset it once, or copy the files into the cache")
            });
        }
        // What a commit holds never changes. Other tools may have fetched a part of it.
        if is_commit(&name.revision)
            && let Ok(folder) = self.cached(name)
            && Files::of_folder(&folder).is_ok_and(|files| files.is_whole())
        {
            return Ok(folder);
        }
        let (sender, mut receiver) = oneshot::channel();
        let moved = Arc::new(AtomicU64::new(0));
        let (hub, wanted, counter) = (self.clone(), name.clone(), Arc::clone(&moved));
        // A thread that nobody waits for: it may hang on a connection that says nothing.
        std::thread::spawn(move || sender.send(hub.fetch(&wanted, &counter)));
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            tokio::select! {
                fetched = &mut receiver => return fetched.unwrap_or_else(|_| {
                    Err(anyhow!("cannot fetch `{name}`: {} does not answer as the hub does", self.endpoint))
                }),
                () = tokio::time::sleep(self.patience / 20) => {}
            }
            let now = moved.load(Ordering::Relaxed);
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > self.patience {
                let seconds = self.patience.as_secs();
                return Err(anyhow!("cannot fetch `{name}`: {} was silent for {seconds} s; try again", self.endpoint));
            }
        }
    }

    /// The folder of a checkpoint all of whose files are in the cache.
    ///
    /// # Errors
    /// What is missing.
    fn cached(&self, name: &HubName) -> Result<PathBuf, String> {
        let commit = match is_commit(&name.revision) {
            true => name.revision.clone(),
            false => {
                let path = self.cache.join(name.at(MAIN).folder_name()).join("refs").join(&name.revision);
                std::fs::read_to_string(&path).map_err(|_| format!("there is no `{}`", path.display()))?.trim().to_owned()
            }
        };
        let folder = self.snapshot(name, &commit);
        let files = Files::of_folder(&folder).map_err(|e| e.to_string())?;
        if files.is_sharded() {
            let shards = shard_of_tensors(&folder.join(&files.weights)).map_err(|e| e.to_string())?;
            if let Some(gone) = shards.values().find(|shard| !folder.join(shard).exists()) {
                return Err(format!("there is no `{}`", folder.join(gone).display()));
            }
        }
        Ok(folder)
    }

    fn snapshot(&self, name: &HubName, commit: &str) -> PathBuf {
        Cache::new(self.cache.clone()).repo(name.at(commit)).pointer_path(commit)
    }

    /// Fetches what the cache lacks. `moved` grows while the hub answers.
    fn fetch(&self, name: &HubName, moved: &Arc<AtomicU64>) -> anyhow::Result<PathBuf> {
        let doors = self.doors()?;
        let listing = match doors.ask(|api| list(api, name)) {
            Ok(listing) => listing,
            Err(error) => {
                return match self.cached(name) {
                    Ok(folder) if is_unreachable(&error) => {
                        tracing::warn!("{}; the copy in the cache is used", self.explain(name, &error));
                        Ok(folder)
                    }
                    _ => Err(anyhow!("cannot fetch `{name}`: {}", self.explain(name, &error))),
                };
            }
        };
        let commit = listing.sha.as_str();
        if !is_commit(commit) {
            return Err(anyhow!("cannot fetch `{name}`: {} does not answer as the hub does", self.endpoint));
        }
        moved.fetch_add(1, Ordering::Relaxed);
        let files =
            Files::pick(listing.siblings.iter().map(|s| s.rfilename.as_str())).map_err(|what| anyhow!("`{name}` {what}"))?;
        let fetch = Fetch { hub: self, doors: &doors, name, commit, siblings: &listing.siblings, moved };
        for file in files.small.iter().chain([&files.weights]) {
            fetch.file(file)?;
        }
        let folder = self.snapshot(name, commit);
        if files.is_sharded() {
            let mut shards: Vec<String> = shard_of_tensors(&folder.join(&files.weights))?.into_values().collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in &shards {
                fetch.file(shard)?;
            }
        }
        // Under this name it is found offline.
        let cache = Cache::new(self.cache.clone()).repo(name.at(&name.revision));
        cache.create_ref(commit).with_context(|| format!("cannot write into the hub's cache `{}`", self.cache.display()))?;
        Ok(folder)
    }

    fn doors(&self) -> anyhow::Result<Doors> {
        let api = |token| {
            let builder = ApiBuilder::from_cache(Cache::new(self.cache.clone()));
            builder
                .with_endpoint(self.endpoint.clone())
                .with_token(token)
                .with_user_agent("capfilt", env!("CARGO_PKG_VERSION"))
                .build()
        };
        let tokens = [None].into_iter().chain(self.token.clone().map(Some));
        Ok(Doors(tokens.map(api).collect::<Result<_, _>>().context("no client for the hub")?))
    }

    /// What an error of the library means for the person who named `name`.
    fn explain(&self, name: &HubName, error: &ApiError) -> String {
        let (endpoint, repository) = (&self.endpoint, &name.repository);
        match status(error) {
            Some(401) if self.token.is_none() => {
                let why = "knows no such repository, or it is not open to all";
                format!("{endpoint} {why}; accept its terms there if it has some, and set HF_TOKEN to a token of your account")
            }
            Some(401) => format!("{endpoint} knows no such repository, or does not take the token"),
            Some(403) => {
                format!(
                    "access is restricted; accept the terms at {endpoint}/{repository}, and set HF_TOKEN to a token of that account"
                )
            }
            Some(404) => format!("{endpoint} has no repository `{repository}` with a revision `{}`", name.revision),
            Some(status) => format!("{endpoint} answered with status {status}"),
            None if is_unreachable(error) => format!("{endpoint} cannot be reached ({error})"),
            None => error.to_string(),
        }
    }
}

impl HubName {
    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repository.clone(), RepoType::Model, revision.to_owned())
    }
}

/// Without a token, and then, if there is one, with it.
struct Doors(Vec<Api>);

impl Doors {
    fn ask<T>(&self, call: impl Fn(&Api) -> Result<T, ApiError>) -> Result<T, ApiError> {
        let (last, first) = self.0.split_last().ok_or(ApiError::MissingHeader("Authorization"))?;
        for api in first {
            match call(api) {
                Err(error) if matches!(status(&error), Some(401 | 403 | 404)) => {}
                done => return done,
            }
        }
        call(last)
    }
}

fn list(api: &Api, name: &HubName) -> Result<Listing, ApiError> {
    let request = api.repo(name.at(&name.revision)).info_request().query("blobs", "true");
    let mut response = request.call().map_err(Box::new)?;
    Ok(response.body_mut().read_json().map_err(Box::new)?)
}

/// The files of one commit.
struct Fetch<'a> {
    hub: &'a Hub,
    doors: &'a Doors,
    name: &'a HubName,
    commit: &'a str,
    siblings: &'a [Sibling],
    moved: &'a Arc<AtomicU64>,
}

impl Fetch<'_> {
    /// Fetches a file unless the cache has it, whole and as the hub tells it.
    #[expect(clippy::disallowed_methods, reason = "it runs on a thread for blocking work")]
    fn file(&self, file: &str) -> anyhow::Result<()> {
        let name = self.name;
        let sibling = self.siblings.iter().find(|s| s.rfilename == file);
        let sibling =
            sibling.with_context(|| format!("`{name}` is not whole: it has no `{file}`, which its index of shards names"))?;
        let pointer = self.hub.snapshot(name, self.commit).join(file);
        if let (Ok(there), Some(size)) = (std::fs::metadata(&pointer), sibling.size)
            && there.len() == size
        {
            return Ok(());
        }
        let blobs = Cache::new(self.hub.cache.clone()).repo(name.at(self.commit));
        let blob = sibling.blob().map(|blob| blobs.blob_path(blob));
        self.clear(&pointer, blob.as_deref(), sibling);
        if let Some(blob) = &blob
            && matches!(self.damage(blob, sibling), Ok(None))
        {
            return link(blob, &pointer).with_context(|| format!("cannot write `{}`", pointer.display()));
        }
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tracing::warn!("`{file}` of `{name}`: {last}; trying again");
                std::thread::sleep(FIRST_PAUSE * 2_u32.pow(attempt - 1));
            }
            self.clear(&pointer, blob.as_deref(), sibling);
            let download = |api: &Api| self.download(&api.repo(name.at(self.commit)), file);
            match self.doors.ask(download) {
                Ok(path) => match self.damage(&path, sibling).with_context(|| format!("cannot read `{}`", path.display()))? {
                    None => return Ok(()),
                    Some(what) => last = what,
                },
                Err(error) if is_unreachable(&error) || matches!(status(&error), Some(416)) => {
                    last = self.hub.explain(name, &error);
                }
                Err(error) => return Err(anyhow!("cannot fetch `{file}` of `{name}`: {}", self.hub.explain(name, &error))),
            }
        }
        self.clear(&pointer, blob.as_deref(), sibling);
        Err(anyhow!("cannot fetch `{file}` of `{name}`, {ATTEMPTS} times in a row: {last}"))
    }

    fn download(&self, repository: &ApiRepo, file: &str) -> Result<PathBuf, ApiError> {
        let meter = Meter { bar: Bar::new("hub", "kB"), moved: Arc::clone(self.moved), file: file.to_owned(), done: 0, of: 0 };
        repository.download_with_progress(file, meter)
    }

    /// What is wrong with a file that should be the hub's; none if nothing is.
    fn damage(&self, path: &Path, sibling: &Sibling) -> std::io::Result<Option<String>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        if let Some(size) = sibling.size
            && size != length
        {
            return Ok(Some(format!("{length} bytes arrived where the hub tells {size}")));
        }
        let Some(lfs) = &sibling.lfs else { return Ok(None) };
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => {
                    hash.update(&buffer[..read]);
                    // Nobody waits in vain.
                    self.moved.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let differs = !lfs.sha256.eq_ignore_ascii_case(&format!("{:x}", hash.finalize()));
        Ok(differs.then(|| "what arrived has another SHA-256 than the hub tells".to_owned()))
    }

    /// Removes what is in the way of a good copy: a damaged one, and a part that is no part of it.
    fn clear(&self, pointer: &Path, blob: Option<&Path>, sibling: &Sibling) {
        for file in std::fs::canonicalize(pointer).ok().as_deref().into_iter().chain(blob) {
            if file.exists() && !matches!(self.damage(file, sibling), Ok(None)) {
                let _ = std::fs::remove_file(file);
            }
        }
        if !pointer.exists() {
            let _ = std::fs::remove_file(pointer);
        }
        if let (Some(blob), Some(size)) = (blob, sibling.size) {
            let part = blob.with_extension("part");
            if std::fs::metadata(&part).is_ok_and(|part| part.len() >= size) {
                let _ = std::fs::remove_file(part);
            }
        }
    }
}

/// Makes a file of a snapshot: a link to its bytes, relative as those of other tools.
fn link(blob: &Path, pointer: &Path) -> std::io::Result<()> {
    if pointer.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(pointer.parent().unwrap_or(pointer))?;
    let name = blob.file_name().unwrap_or_default();
    std::os::unix::fs::symlink(Path::new("../../blobs").join(name), pointer)
}

/// Shows a download, and that it moves.
struct Meter {
    bar: Bar,
    moved: Arc<AtomicU64>,
    file: String,
    done: u64,
    of: u64,
}

impl Progress for Meter {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.of) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.moved.fetch_add(1, Ordering::Relaxed);
        self.bar.show(self.done / 1000, self.of.div_ceil(1000), &self.file);
    }

    fn finish(&mut self) {}
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish();
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// True where the same request may succeed a little later.
fn is_unreachable(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => status == 429 || status >= 500,
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Protocol(_)
            | ureq::Error::Rustls(_) => true,
            _ => false,
        },
        // Of the disk it is when it has no more room, of the connection otherwise.
        ApiError::IoError(error) => !matches!(
            error.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::NotFound
        ),
        _ => false,
    }
}
