//! Holding the store against its records, and sweeping what no record names.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use capfilt_schemas::{
    AliasEvent, Commit, DatasetVersion, Digest, Failure, Redaction, RetryRecord, RoundRecord, RoundResult, StageKind, Table,
    Takedown,
};
use object_store::ObjectMeta;
use object_store::path::Path;
use serde::Serialize;

use crate::{Result, RunEvent, Store, StoreError, layout, now_ms, registry};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The object or record.
    pub path: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What a check saw.
#[derive(Debug, Default, Clone, Serialize)]
pub struct CheckReport {
    /// Records read, of every kind.
    pub records: u64,
    /// Objects read and held against their digests.
    pub objects: u64,
    /// Bytes of those objects.
    pub bytes: u64,
    /// Objects that no record names: left by attempts that were killed or lost. Harmless; `sweep` removes them.
    pub unreferenced: u64,
    /// What is wrong. Empty for a sound store.
    pub findings: Vec<Finding>,
}

/// What a sweep did, or would do.
#[derive(Debug, Default, Clone, Serialize)]
pub struct SweepReport {
    /// Objects removed.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Unreferenced objects left alone because they are younger than the grace time.
    pub young: u64,
}

/// Every object that some record names, with the record that names it and its size where the record tells.
type References = BTreeMap<(Table, Digest), (String, Option<u64>)>;

impl Store {
    /// Reads every record and every object that a record names, and reports whatever does not fit.
    ///
    /// # Errors
    /// [`StoreError::Io`] only; everything else is a finding.
    pub async fn check(&self) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        let named = self.references(&mut report).await?;
        for ((table, digest), (by, size)) in &named {
            let path = layout::object(*table, digest).to_string();
            match self.get_object(*table, digest).await {
                Ok(bytes) => {
                    report.objects += 1;
                    report.bytes += bytes.len() as u64;
                    if size.is_some_and(|s| s != bytes.len() as u64) {
                        report.find(path, format!("its size is not the one that `{by}` records"));
                    }
                }
                Err(StoreError::Missing { .. }) => report.find(path, format!("missing, but `{by}` names it")),
                Err(e @ StoreError::Corrupt { .. }) => report.find(path, e.to_string()),
                Err(e) => return Err(e),
            }
        }
        for (meta, table, digest) in self.all_objects(&mut report).await? {
            if !named.contains_key(&(table, digest)) {
                report.unreferenced += 1;
                tracing::debug!(path = %meta.location, "unreferenced object");
            }
        }
        Ok(report)
    }

    /// Removes objects that no record names and that are older than `grace`: long enough for a running worker to commit what it has
    /// put. With `dry_run` only counts.
    ///
    /// # Errors
    /// [`StoreError::Io`]; [`StoreError::Unknown`] if the store has unreadable records, since they may name objects.
    pub async fn sweep(&self, grace: Duration, dry_run: bool) -> Result<SweepReport> {
        // Objects are listed before records: what is committed in between is then known to be named.
        let mut findings = CheckReport::default();
        let objects = self.all_objects(&mut findings).await?;
        let named = self.references(&mut findings).await?;
        if let Some(bad) = findings.findings.first() {
            return Err(StoreError::Unknown(format!(
                "nothing was swept: `{}` {}; run `capfilt store check` and mend that first",
                bad.path, bad.problem
            )));
        }
        let limit = now_ms().saturating_sub(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let mut report = SweepReport::default();
        for (meta, table, digest) in objects {
            if named.contains_key(&(table, digest)) {
                continue;
            }
            if u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0) > limit {
                report.young += 1;
                continue;
            }
            report.objects += 1;
            report.bytes += meta.size;
            if !dry_run {
                self.delete(&meta.location).await?;
            }
        }
        Ok(report)
    }

    async fn references(&self, report: &mut CheckReport) -> Result<References> {
        let mut named = References::new();
        for stage in StageKind::ALL {
            for (path, commit) in self.records::<Commit>(&layout::commits(*stage), report).await? {
                if commit.task.id() != commit.task_id || layout::digest_of(&path) != Some(commit.task_id.0) {
                    report.find(path.to_string(), "the task in it has another name than the record".to_owned());
                }
                for o in &commit.outputs {
                    named.insert((o.table, o.digest), (path.to_string(), Some(o.bytes)));
                }
            }
        }
        for (path, version) in self.records::<DatasetVersion>(&layout::datasets(), report).await? {
            if DatasetVersion::digest_of(&version.shards) != version.digest {
                report.find(path.to_string(), "its digest is not that of its shards".to_owned());
            }
            for input in &version.lineage.inputs {
                named.entry((input.table, input.digest)).or_insert((path.to_string(), None));
            }
            for o in &version.shards {
                named.insert((o.table, o.digest), (path.to_string(), Some(o.bytes)));
            }
        }
        for role in registry::ROLES.iter().chain([&registry::IMPORTED]) {
            for (path, event) in self.records::<AliasEvent>(&layout::model_role(role), report).await? {
                named.entry((Table::Models, event.model)).or_insert((path.to_string(), None));
            }
        }
        let is_round = |p: &Path| p.parts().nth(2).is_some_and(|part| part.as_ref() == "rounds");
        for (path, round) in self.records_where::<RoundRecord>(&Path::from("runs"), is_round, report).await? {
            for model in [round.captioner, round.filter] {
                named.entry((Table::Models, model)).or_insert((path.to_string(), None));
            }
        }
        self.records::<Failure>(&layout::all_failures(), report).await?;
        let of_runs = Path::from("runs");
        let below = |folder: &'static str| move |p: &Path| p.parts().nth(2).is_some_and(|part| part.as_ref() == folder);
        self.records_where::<RoundResult>(&of_runs, below("results"), report).await?;
        self.records_where::<RunEvent>(&of_runs, below("events"), report).await?;
        self.records_where::<RetryRecord>(&of_runs, below("retries"), report).await?;
        self.records::<Takedown>(&layout::takedowns(), report).await?;
        self.replaced(&mut named, report).await?;
        Ok(named)
    }

    /// Puts the shards that are read in the place of those that were redacted.
    async fn replaced(&self, named: &mut References, report: &mut CheckReport) -> Result<()> {
        for table in Table::ALL {
            let mut replaced = BTreeMap::new();
            for (path, redaction) in self.records::<Redaction>(&layout::redactions(*table), report).await? {
                if redaction.table != *table || layout::digest_of(&path) != Some(redaction.from) {
                    report.find(path.to_string(), "the shard in it has another name than the record".to_owned());
                }
                replaced.insert(redaction.from, (path, redaction.to));
            }
            let named_here = |d: &&Digest| named.contains_key(&(*table, **d));
            for from in replaced.keys().filter(named_here).copied().collect::<Vec<_>>() {
                let mut at = from;
                // A chain is as long as there are links, unless it runs in a circle.
                for _ in 0..=replaced.len() {
                    let Some((path, to)) = replaced.get(&at) else { break };
                    named.remove(&(*table, at));
                    named.insert((*table, to.digest), (path.to_string(), Some(to.bytes)));
                    at = to.digest;
                }
            }
        }
        Ok(())
    }

    async fn records<T: serde::de::DeserializeOwned>(&self, folder: &Path, report: &mut CheckReport) -> Result<Vec<(Path, T)>> {
        self.records_where(folder, |_| true, report).await
    }

    async fn records_where<T: serde::de::DeserializeOwned>(
        &self,
        folder: &Path,
        wanted: impl Fn(&Path) -> bool,
        report: &mut CheckReport,
    ) -> Result<Vec<(Path, T)>> {
        let mut found = Vec::new();
        for meta in self.list(folder).await? {
            if !wanted(&meta.location) {
                continue;
            }
            match self.get_json(&meta.location).await {
                Ok(Some(record)) => {
                    report.records += 1;
                    found.push((meta.location, record));
                }
                Ok(None) => {}
                Err(StoreError::Record { path, source }) => report.find(path, format!("is not a record of its kind ({source})")),
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }

    async fn all_objects(&self, report: &mut CheckReport) -> Result<Vec<(ObjectMeta, Table, Digest)>> {
        let mut found = Vec::new();
        let mut strange = BTreeSet::new();
        for table in Table::ALL {
            for meta in self.list(&layout::objects(*table)).await? {
                match layout::digest_of(&meta.location) {
                    Some(digest) => found.push((meta, *table, digest)),
                    None => _ = strange.insert(meta.location.to_string()),
                }
            }
        }
        for path in strange {
            report.find(path, "is not named by a digest; it is not capfilt's".to_owned());
        }
        Ok(found)
    }
}

impl CheckReport {
    fn find(&mut self, path: String, problem: String) {
        self.findings.push(Finding { path, problem });
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub const fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }
}
