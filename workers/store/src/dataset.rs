//! The log of dataset versions: numbered records, each a list of shards of kept pairs.

use std::collections::BTreeSet;

use capfilt_schemas::DatasetVersion;

use crate::{Result, Store, StoreError, layout};

impl Store {
    /// Appends a version, unless one with the same digest, build, run and round is there already; that one is returned then.
    ///
    /// # Errors
    /// [`StoreError::Io`] or [`StoreError::Record`].
    pub async fn append_dataset(&self, version: &DatasetVersion) -> Result<DatasetVersion> {
        let same = |v: &DatasetVersion| {
            v.digest == version.digest
                && v.lineage.build == version.lineage.build
                && v.run == version.run
                && v.round == version.round
        };
        let make = |n| DatasetVersion { version: n, ..version.clone() };
        self.append_json_once(&layout::dataset(&version.name), same, make).await
    }

    /// All versions of a dataset, oldest first; none if there is no such dataset.
    ///
    /// # Errors
    /// As [`append_dataset`](Self::append_dataset).
    pub async fn dataset_versions(&self, name: &str) -> Result<Vec<DatasetVersion>> {
        self.list_json(&layout::dataset(name)).await
    }

    /// One version; the newest when `version` is `None`.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] says which datasets and versions there are.
    pub async fn dataset_version(&self, name: &str, version: Option<u64>) -> Result<DatasetVersion> {
        let mut all = self.dataset_versions(name).await?;
        if all.is_empty() {
            let names = self.dataset_names().await?;
            let there =
                if names.is_empty() { "there is none yet".to_owned() } else { format!("there are: {}", names.join(", ")) };
            return Err(StoreError::Unknown(format!("no dataset `{name}` in the store; {there}")));
        }
        let newest = all.len();
        let found = match version {
            None => all.pop(),
            Some(n) => all.into_iter().find(|v| v.version == n),
        };
        found.ok_or_else(|| {
            StoreError::Unknown(format!("dataset `{name}` has no version {}; the newest is {newest}", version.unwrap_or(0)))
        })
    }

    /// The names of all datasets, in order.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn dataset_names(&self) -> Result<Vec<String>> {
        let found = self.list(&layout::datasets()).await?;
        let names: BTreeSet<String> = found.iter().filter_map(|m| Some(m.location.parts().nth(1)?.as_ref().to_owned())).collect();
        Ok(names.into_iter().collect())
    }
}
