//! How SQL operators share memory.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use datafusion::common::resources_datafusion_err;
use datafusion::error::Result;
use datafusion::execution::memory_pool::{
    FairSpillPool, GreedyMemoryPool, MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation,
};

/// A quarter for operators that can spill, shared fairly; half for the merges inside sorts, shared fairly as well; a quarter for the
/// rest.
///
/// In DataFusion's own fair pool the sorts may take everything, and a merge takes as much as it finds. The next merge, or the operator
/// that joins the sorted partitions, then fails for want of a few batches, though each could have done with less. A merge of rows
/// that were never spilled cannot do with less than those rows and their keys; a sort reserves twice its rows before it spills, so
/// twice as much for merges is always enough.
#[derive(Debug)]
pub(crate) struct SharedPool {
    limit: usize,
    spilling: FairSpillPool,
    merging: Merges,
    others: GreedyMemoryPool,
}

/// Merges: none may hold more than its share.
#[derive(Debug)]
struct Merges {
    limit: usize,
    /// How many there are, and how many there have been at once since there was none: shares must not grow while one ends after the
    /// other, or those that come late find nothing.
    count: Mutex<(usize, usize)>,
    pool: GreedyMemoryPool,
}

impl SharedPool {
    pub(crate) fn new(bytes: usize) -> Self {
        let quarter = bytes / 4;
        Self {
            limit: bytes,
            spilling: FairSpillPool::new(quarter),
            merging: Merges { limit: 2 * quarter, count: Mutex::default(), pool: GreedyMemoryPool::new(2 * quarter) },
            others: GreedyMemoryPool::new(quarter),
        }
    }

    fn side(&self, consumer: &MemoryConsumer) -> &dyn MemoryPool {
        if consumer.can_spill() {
            &self.spilling
        } else if consumer.name().starts_with("ExternalSorterMerge") {
            &self.merging
        } else {
            &self.others
        }
    }
}

impl fmt::Display for SharedPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.spilling, self.merging, self.others)
    }
}

impl MemoryPool for SharedPool {
    fn name(&self) -> &'static str {
        "shared"
    }

    fn register(&self, consumer: &MemoryConsumer) {
        self.side(consumer).register(consumer);
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        self.side(consumer).unregister(consumer);
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.side(reservation.consumer()).grow(reservation, additional);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.side(reservation.consumer()).shrink(reservation, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        self.side(reservation.consumer()).try_grow(reservation, additional)
    }

    fn reserved(&self) -> usize {
        self.spilling.reserved() + self.merging.reserved() + self.others.reserved()
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.limit)
    }
}

impl fmt::Display for Merges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "merges: {}", self.pool)
    }
}

impl MemoryPool for Merges {
    fn name(&self) -> &'static str {
        "merges"
    }

    fn register(&self, _: &MemoryConsumer) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        count.0 += 1;
        count.1 = count.1.max(count.0);
    }

    fn unregister(&self, _: &MemoryConsumer) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        count.0 = count.0.saturating_sub(1);
        if count.0 == 0 {
            count.1 = 0;
        }
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.pool.grow(reservation, additional);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.pool.shrink(reservation, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let share = self.limit / self.count.lock().unwrap_or_else(PoisonError::into_inner).1.max(1);
        if reservation.size() + additional > share {
            return Err(resources_datafusion_err!(
                "{} has {} bytes and asks for {additional}; its share is {share}",
                reservation.consumer().name(),
                reservation.size()
            ));
        }
        self.pool.try_grow(reservation, additional)
    }

    fn reserved(&self) -> usize {
        self.pool.reserved()
    }
}
