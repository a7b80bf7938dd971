//! The handle on the store, and the few ways in which bytes go in and out.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use capfilt_schemas::{Digest, Output, Table};
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use url::Url;

use crate::error::chain;
use crate::{Result, StoreError, layout};

/// The layout that this program reads and writes.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Marker {
    format: u32,
}

impl Marker {
    fn check(&self) -> std::result::Result<(), String> {
        if self.format == FORMAT {
            return Ok(());
        }
        Err(format!("it has format {}, this program reads format {FORMAT}", self.format))
    }
}

/// What came of creating a record.
#[derive(Debug, Clone, PartialEq)]
pub enum Created<T> {
    /// It is there now, and was not before.
    New,
    /// Somebody was first; this is what they wrote.
    Exists(T),
}

/// A place for shards and records. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    url: Url,
}

impl Store {
    /// Opens the store at `address`, and makes it there if it does not exist yet: a folder's path, or a URL (`file:`, `memory:`).
    ///
    /// # Errors
    /// [`StoreError::Open`] if the address cannot be understood, reached or written to, or holds another format.
    pub async fn open(address: &str) -> Result<Self> {
        let fail = |reason: String| StoreError::Open { url: address.to_owned(), reason };
        let place = place(address).map_err(fail)?;
        if let (_, Some(folder)) = &place {
            std::fs::create_dir_all(folder).map_err(|e| fail(format!("the folder cannot be made ({e})")))?;
        }
        let store = backend(place).map_err(fail)?;
        let marker = store
            .create_json(&layout::marker(), &Marker { format: FORMAT })
            .await
            .map_err(|e| fail(format!("it cannot be reached or written to ({})", chain(&e))))?;
        if let Created::Exists(marker) = marker {
            marker.check().map_err(fail)?;
        }
        Ok(store)
    }

    /// Opens the store at `address` if there is one, and changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the address cannot be understood or reached, or holds another format.
    pub async fn open_existing(address: &str) -> Result<Option<Self>> {
        let fail = |reason: String| StoreError::Open { url: address.to_owned(), reason };
        let place = place(address).map_err(fail)?;
        if place.1.as_ref().is_some_and(|folder| !folder.is_dir()) {
            return Ok(None);
        }
        let store = backend(place).map_err(fail)?;
        let marker = store.get_json::<Marker>(&layout::marker()).await;
        let marker = marker.map_err(|e| fail(format!("it cannot be reached ({})", chain(&e))))?;
        marker.map(|marker| marker.check().map(|()| store).map_err(fail)).transpose()
    }

    /// Where the store is.
    #[must_use]
    pub const fn url(&self) -> &Url {
        &self.url
    }

    /// The object store underneath, rooted at this store: for engines that read shards themselves.
    #[must_use]
    pub fn object_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner)
    }

    /// Puts an object under the name of its bytes. Putting it twice is the same as once, but for its age: a sweep then knows that it is
    /// wanted again, and bytes that a broken disk left under its name are mended.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn put_object(&self, table: Table, bytes: Bytes) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        let path = layout::object(table, &digest);
        match self.inner.put(&path, PutPayload::from_bytes(bytes)).await {
            Ok(_) => Ok(digest),
            Err(source) => Err(StoreError::Io { verb: "write", path: path.to_string(), source }),
        }
    }

    /// Whether an object is there with the size that it should have.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn holds(&self, output: &Output) -> Result<bool> {
        Ok(self.head(&layout::object(output.table, &output.digest)).await?.is_some_and(|there| there.size == output.bytes))
    }

    /// An object's bytes, held against its name; where it was [redacted](Self::redact), those of its replacement.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Corrupt`] or [`StoreError::Io`].
    pub async fn get_object(&self, table: Table, digest: &Digest) -> Result<Bytes> {
        let mut digest = *digest;
        loop {
            let path = layout::object(table, &digest);
            let Some(bytes) = self.get(&path).await? else {
                digest = self.replacement(table, &digest).await?;
                continue;
            };
            let found = Digest::of(&bytes);
            return if found == digest { Ok(bytes) } else { Err(StoreError::Corrupt { path: path.to_string(), found }) };
        }
    }

    /// Where below [`object_store`](Self::object_store) an object's bytes are, for engines that read parts of a shard themselves, and
    /// how many; where it was [redacted](Self::redact), its replacement's.
    ///
    /// # Errors
    /// [`StoreError::Missing`] or [`StoreError::Io`].
    pub async fn locate(&self, table: Table, digest: &Digest) -> Result<(Path, u64)> {
        let mut digest = *digest;
        loop {
            match self.head(&layout::object(table, &digest)).await? {
                Some(there) => return Ok((there.location, there.size)),
                None => digest = self.replacement(table, &digest).await?,
            }
        }
    }

    async fn head(&self, path: &Path) -> Result<Option<ObjectMeta>> {
        match self.inner.head(path).await {
            Ok(there) => Ok(Some(there)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StoreError::Io { verb: "read", path: path.to_string(), source }),
        }
    }

    /// Creates `path` if it is not there; `true` if this call made it.
    pub(crate) async fn create(&self, path: &Path, bytes: Bytes) -> Result<bool> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(path, PutPayload::from_bytes(bytes), options).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(source) => Err(StoreError::Io { verb: "write", path: path.to_string(), source }),
        }
    }

    /// Creates a record, or tells what stands there already.
    pub(crate) async fn create_json<T: Serialize + DeserializeOwned>(&self, path: &Path, record: &T) -> Result<Created<T>> {
        let json = serde_json::to_vec_pretty(record).map_err(|source| StoreError::Record { path: path.to_string(), source })?;
        if self.create(path, json.into()).await? {
            return Ok(Created::New);
        }
        let there = self.get_json(path).await?;
        there.map(Created::Exists).ok_or_else(|| StoreError::Missing { path: path.to_string() })
    }

    /// Appends a record under the next free number below `folder`; `make` is told the number.
    pub(crate) async fn append_json<T: Serialize + DeserializeOwned>(&self, folder: &Path, make: impl Fn(u64) -> T) -> Result<T> {
        self.append_json_once(folder, |_| false, make).await
    }

    /// As [`append_json`](Self::append_json), unless a record is there already that is the `same`; that one is returned then. Of two
    /// that append the same at once, one gets the other's.
    pub(crate) async fn append_json_once<T: Serialize + DeserializeOwned>(
        &self,
        folder: &Path,
        same: impl Fn(&T) -> bool,
        make: impl Fn(u64) -> T,
    ) -> Result<T> {
        let mut last = 0;
        for meta in self.list(folder).await? {
            last = last.max(layout::number_of(&meta.location).unwrap_or(0));
            if let Some(there) = self.get_json(&meta.location).await?.filter(&same) {
                return Ok(there);
            }
        }
        loop {
            last += 1;
            let record = make(last);
            match self.create_json(&layout::numbered(folder, last), &record).await? {
                Created::New => return Ok(record),
                Created::Exists(there) if same(&there) => return Ok(there),
                Created::Exists(_) => {}
            }
        }
    }

    pub(crate) async fn get(&self, path: &Path) -> Result<Option<Bytes>> {
        let fail = |source| StoreError::Io { verb: "read", path: path.to_string(), source };
        match self.inner.get(path).await {
            Ok(found) => found.bytes().await.map(Some).map_err(fail),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(fail(source)),
        }
    }

    pub(crate) async fn get_json<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>> {
        let Some(bytes) = self.get(path).await? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|source| StoreError::Record { path: path.to_string(), source })
    }

    /// Every record directly or deeper below `folder`, in the order of their paths.
    pub(crate) async fn list_json<T: DeserializeOwned>(&self, folder: &Path) -> Result<Vec<T>> {
        let mut records = Vec::new();
        for meta in self.list(folder).await? {
            if let Some(record) = self.get_json(&meta.location).await? {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Everything below `folder`, in the order of their paths.
    pub(crate) async fn list(&self, folder: &Path) -> Result<Vec<ObjectMeta>> {
        let mut found: Vec<ObjectMeta> = self.inner.list(Some(folder)).try_collect().await.map_err(|source| StoreError::Io {
            verb: "list",
            path: folder.to_string(),
            source,
        })?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(found)
    }

    pub(crate) async fn delete(&self, path: &Path) -> Result<()> {
        match self.inner.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(StoreError::Io { verb: "delete", path: path.to_string(), source }),
        }
    }
}

impl<T> Created<T> {
    /// Whether this call made the record.
    pub const fn is_new(&self) -> bool {
        matches!(self, Self::New)
    }
}

/// The URL of an address, and the folder that it means; none is memory.
fn place(address: &str) -> std::result::Result<(Url, Option<PathBuf>), String> {
    if address == "memory:" || address == "memory:///" {
        return Ok((Url::parse("memory:///").map_err(|e| e.to_string())?, None));
    }
    let url = match Url::parse(address) {
        Ok(url) if url.scheme().len() > 1 => url,
        _ => {
            let path = std::path::absolute(address).map_err(|e| format!("`{address}` is no path ({e})"))?;
            Url::from_directory_path(&path).map_err(|()| format!("`{}` cannot be written as a URL", path.display()))?
        }
    };
    if url.scheme() != "file" {
        return Err(format!("stores have no backend for `{}:`; use a folder, `file:` or `memory:`", url.scheme()));
    }
    let folder = url.to_file_path().map_err(|()| "a file URL needs an absolute path".to_owned())?;
    Ok((url, Some(folder)))
}

/// What is at a [`place`], which is there.
fn backend((url, folder): (Url, Option<PathBuf>)) -> std::result::Result<Store, String> {
    let inner: Arc<dyn ObjectStore> = match folder {
        None => Arc::new(InMemory::new()),
        Some(folder) => Arc::new(LocalFileSystem::new_with_prefix(folder).map_err(|e| e.to_string())?),
    };
    Ok(Store { inner, url })
}

/// Milliseconds since 1970-01-01 UTC.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
