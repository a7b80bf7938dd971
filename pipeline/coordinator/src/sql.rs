//! The SQL engine: one DataFusion session for one piece of work, with a bound on its memory and a folder to spill to.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::common::ScalarValue;
use datafusion::error::DataFusionError;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use serde::{Deserialize, Serialize};

use crate::memory::SharedPool;
use crate::{CoordinatorError, Result};

/// How fast and with how much memory SQL runs. It changes no result and is part of no digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SqlConfig {
    /// Memory for balancing, sorts and aggregates, in MiB; what does not fit is spilled to disk.
    pub memory_mib: usize,
    /// Threads that the work is spread over, at most one for every 16 MiB of memory; 0 is one for every core.
    pub partitions: usize,
    /// Where to spill; the system's temporary folder if absent.
    pub spill_folder: Option<PathBuf>,
}

impl Default for SqlConfig {
    fn default() -> Self {
        Self { memory_mib: 1024, partitions: 0, spill_folder: None }
    }
}

impl SqlConfig {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// [`CoordinatorError::Setting`].
    pub fn validate(&self) -> Result<()> {
        if self.memory_mib < 32 {
            let problem = format!("is {}; SQL needs at least 32 MiB", self.memory_mib);
            return Err(CoordinatorError::Setting { setting: "worker.sql.memory_mib", problem });
        }
        Ok(())
    }

    /// How many threads to use.
    pub(crate) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let wanted = if self.partitions == 0 { cores() } else { self.partitions };
        // Several sorts share a partition's memory; below 16 MiB they would spill every few batches.
        wanted.min(self.memory_mib / 16).max(1)
    }
}

/// Makes the stream of one partition of a registered table, as often as it is asked to.
pub(crate) type MakeStream = Arc<dyn Fn() -> BoxStream<'static, Result<RecordBatch>> + Send + Sync>;

/// A session. Tables are registered by name; queries are SQL text with `$name` parameters.
pub(crate) struct Sql {
    context: SessionContext,
    partitions: usize,
    memory_mib: usize,
    /// The first error of a scan: DataFusion passes errors on as text or behind several wrappings, and ours names the shard.
    scan_error: Arc<Mutex<Option<CoordinatorError>>>,
}

impl Sql {
    pub(crate) fn new(config: &SqlConfig) -> Result<Self> {
        config.validate()?;
        let partitions = config.threads();
        let spill = match &config.spill_folder {
            None => DiskManagerMode::OsTmpDirectory,
            Some(folder) => DiskManagerMode::Directories(vec![folder.clone()]),
        };
        let memory = config.memory_mib << 20;
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(SharedPool::new(memory)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(spill))
            .build_arc()
            .map_err(|e| CoordinatorError::Sql { query: "set-up", source: Box::new(e) })?;
        // What a sort sets aside for merging what it has spilled must fit into its share of the memory for merges.
        let reserve = (memory / partitions / 16).min(10 << 20);
        // A merge holds some twenty batches, and there is one in each partition; rows are mostly below 1 KiB.
        let batch_rows = (memory / 4 / partitions / 20 / 1024).clamp(64, 4096);
        let session = SessionConfig::new()
            .with_target_partitions(partitions)
            .with_sort_spill_reservation_bytes(reserve)
            .with_batch_size(batch_rows);
        let context = SessionContext::new_with_config_rt(session, runtime);
        Ok(Self { context, partitions, memory_mib: config.memory_mib, scan_error: Arc::default() })
    }

    /// How many partitions a table should offer.
    pub(crate) const fn partitions(&self) -> usize {
        self.partitions
    }

    /// Makes rows known as the table `name`.
    pub(crate) fn register(&self, name: &'static str, schema: &SchemaRef, partitions: Vec<MakeStream>) -> Result<()> {
        let partitions = partitions
            .into_iter()
            .map(|make| {
                let error = Arc::clone(&self.scan_error);
                Arc::new(Partition { name, schema: Arc::clone(schema), make, error }) as Arc<dyn PartitionStream>
            })
            .collect();
        let table = StreamingTable::try_new(Arc::clone(schema), partitions).map_err(|e| self.fail(name, e))?;
        self.context.register_table(name, Arc::new(table)).map_err(|e| self.fail(name, e))?;
        Ok(())
    }

    /// Makes the rows of a query known as the table `name`; nothing runs yet.
    pub(crate) async fn define(&self, name: &'static str, sql: &str, parameters: &[(&str, ScalarValue)]) -> Result<()> {
        let view = self.plan(name, sql, parameters).await?.into_view();
        self.context.register_table(name, view).map_err(|e| self.fail(name, e))?;
        Ok(())
    }

    /// Runs a query; `name` stands in its errors.
    pub(crate) async fn query(&self, name: &'static str, sql: &str, parameters: &[(&str, ScalarValue)]) -> Result<Rows<'_>> {
        let frame = self.plan(name, sql, parameters).await?;
        let stream = frame.execute_stream().await.map_err(|e| self.fail(name, e))?;
        Ok(Rows { sql: self, name, stream })
    }

    async fn plan(&self, name: &'static str, sql: &str, parameters: &[(&str, ScalarValue)]) -> Result<DataFrame> {
        let values: Vec<(String, ScalarValue)> = parameters.iter().map(|(n, v)| ((*n).to_owned(), v.clone())).collect();
        let frame = self.context.sql(sql).await.map_err(|e| self.fail(name, e))?;
        if values.is_empty() { Ok(frame) } else { frame.with_param_values(values).map_err(|e| self.fail(name, e)) }
    }

    fn fail(&self, query: &'static str, error: DataFusionError) -> CoordinatorError {
        if let Some(ours) = self.scan_error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return ours;
        }
        let source = Box::new(error);
        match source.find_root() {
            DataFusionError::ResourcesExhausted(_) => CoordinatorError::Memory { query, limit_mib: self.memory_mib, source },
            _ => CoordinatorError::Sql { query, source },
        }
    }
}

/// The rows of a running query.
pub(crate) struct Rows<'a> {
    sql: &'a Sql,
    name: &'static str,
    stream: SendableRecordBatchStream,
}

impl Rows<'_> {
    /// The next rows, or `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<RecordBatch>> {
        self.stream.next().await.transpose().map_err(|e| self.sql.fail(self.name, e))
    }
}

struct Partition {
    name: &'static str,
    schema: SchemaRef,
    make: MakeStream,
    error: Arc<Mutex<Option<CoordinatorError>>>,
}

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Partition").field("table", &self.name).finish_non_exhaustive()
    }
}

impl PartitionStream for Partition {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let slot = Arc::clone(&self.error);
        let rows = (self.make)().map_err(move |e| {
            let text = e.to_string();
            slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            DataFusionError::Execution(text)
        });
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), rows))
    }
}
