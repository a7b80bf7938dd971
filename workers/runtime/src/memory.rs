//! The queue of a single process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use capfilt_schemas::{StageKind, Task, TaskId};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::{Delivery, Depth, QueueError, WorkQueue};

/// How long [`receive`](WorkQueue::receive) waits for a task.
const PATIENCE: Duration = Duration::from_millis(500);

/// A queue in memory. It forgets everything when the process ends, which is no loss: the planner fills it again from the store.
#[derive(Default)]
pub struct MemoryQueue {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Default)]
struct State {
    tasks: HashMap<TaskId, Entry>,
    order: HashMap<StageKind, VecDeque<TaskId>>,
    receipts: u64,
}

struct Entry {
    task: Arc<Task>,
    /// Not handed out before this moment: the end of a lease or of a delay.
    hidden_until: Option<Instant>,
    /// The receipt of the delivery that holds the lease; 0 when none does.
    receipt: u64,
}

impl MemoryQueue {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, stage: StageKind, lease: Duration) -> Option<Delivery> {
        let now = Instant::now();
        let order = self.order.entry(stage).or_default();
        let tasks = &mut self.tasks;
        order.retain(|id| tasks.contains_key(id));
        let id = *order.iter().find(|id| tasks.get(id).is_some_and(|e| e.hidden_until.is_none_or(|until| until <= now)))?;
        let entry = tasks.get_mut(&id)?;
        self.receipts += 1;
        entry.receipt = self.receipts;
        entry.hidden_until = Some(now + lease);
        Some(Delivery { task: Arc::clone(&entry.task), id, receipt: self.receipts })
    }

    /// The entry whose lease `delivery` still holds.
    fn held(&mut self, delivery: &Delivery) -> Option<&mut Entry> {
        let now = Instant::now();
        let holds = |e: &&mut Entry| e.receipt == delivery.receipt && e.hidden_until.is_some_and(|until| until > now);
        self.tasks.get_mut(&delivery.id).filter(holds)
    }
}

#[async_trait]
impl WorkQueue for MemoryQueue {
    async fn enqueue(&self, tasks: &[Task]) -> Result<(), QueueError> {
        let mut state = self.lock();
        for task in tasks {
            let id = task.id();
            if state.tasks.contains_key(&id) {
                continue;
            }
            state.tasks.insert(id, Entry { task: Arc::new(task.clone()), hidden_until: None, receipt: 0 });
            state.order.entry(task.stage).or_default().push_back(id);
        }
        drop(state);
        self.arrived.notify_waiters();
        Ok(())
    }

    async fn receive(&self, stage: StageKind, lease: Duration) -> Result<Option<Delivery>, QueueError> {
        // Interest is registered before looking, so that a task which arrives in between wakes us.
        let arrived = self.arrived.notified();
        if let Some(delivery) = self.lock().take(stage, lease) {
            return Ok(Some(delivery));
        }
        // A lease or a delay may end without a notification: hence the second look after a while.
        let _ = timeout(PATIENCE, arrived).await;
        Ok(self.lock().take(stage, lease))
    }

    async fn extend(&self, delivery: &Delivery, lease: Duration) -> Result<bool, QueueError> {
        let mut state = self.lock();
        let Some(entry) = state.held(delivery) else { return Ok(false) };
        entry.hidden_until = Some(Instant::now() + lease);
        Ok(true)
    }

    async fn ack(&self, delivery: &Delivery) -> Result<(), QueueError> {
        let mut state = self.lock();
        if state.tasks.get(&delivery.id).is_some_and(|e| e.receipt == delivery.receipt) {
            state.tasks.remove(&delivery.id);
        }
        Ok(())
    }

    async fn retry(&self, delivery: &Delivery, after: Duration) -> Result<(), QueueError> {
        let mut state = self.lock();
        if let Some(entry) = state.held(delivery) {
            entry.receipt = 0;
            entry.hidden_until = Some(Instant::now() + after);
        }
        Ok(())
    }

    async fn depth(&self, stage: StageKind) -> Result<Depth, QueueError> {
        let (now, state) = (Instant::now(), self.lock());
        let mut depth = Depth::default();
        for entry in state.tasks.values().filter(|e| e.task.stage == stage) {
            let leased = entry.receipt != 0 && entry.hidden_until.is_some_and(|until| until > now);
            *(if leased { &mut depth.in_flight } else { &mut depth.waiting }) += 1;
        }
        Ok(depth)
    }
}
