//! Memory for results that wait for an earlier one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// So many bytes for the results of rows that come out in order. Room is taken for the largest result just before a row's work begins,
/// so that rows that wait for something else hold none; the earliest row always gets room, so it never waits for a later one.
pub(crate) struct Room {
    state: Mutex<State>,
    largest: usize,
}

struct State {
    /// Below zero if the earliest row took more than there was.
    free: i64,
    earliest: u64,
    /// Rows that wait, each with its bell. The earliest is rung first, and rings the next when it stops waiting.
    waiting: BTreeMap<u64, Arc<Notify>>,
}

/// A row's place in the order, until its result has come out.
pub(crate) struct Place {
    room: Arc<Room>,
    row: u64,
}

/// Room that was taken; it is given back when this is dropped.
pub(crate) struct Taken {
    room: Arc<Room>,
    bytes: usize,
}

impl Room {
    /// Room for `bytes`, in which no result is larger than `largest`.
    pub(crate) fn new(bytes: usize, largest: usize) -> Arc<Self> {
        let state = State { free: signed(bytes), earliest: 0, waiting: BTreeMap::new() };
        Arc::new(Self { state: Mutex::new(state), largest })
    }

    /// The place of row `row`, counted from 0. Places have to be dropped in the order of the rows.
    pub(crate) fn place(self: &Arc<Self>, row: u64) -> Place {
        Place { room: Arc::clone(self), row }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fits(&self, state: &State, row: u64) -> bool {
        row <= state.earliest || state.free >= signed(self.largest)
    }

    fn ring(&self, state: &State) {
        if let Some((row, bell)) = state.waiting.first_key_value()
            && self.fits(state, *row)
        {
            bell.notify_one();
        }
    }
}

impl Place {
    /// Takes room for the largest result, if there is any now.
    pub(crate) fn try_take(&self) -> Option<Taken> {
        let mut state = self.room.state();
        self.room.fits(&state, self.row).then(|| {
            state.free -= signed(self.room.largest);
            Taken { room: Arc::clone(&self.room), bytes: self.room.largest }
        })
    }

    /// Waits for room and takes as much of it as `bytes` need, which are no more than the largest result has.
    pub(crate) async fn take(&self, bytes: usize) -> Taken {
        loop {
            if let Some(mut taken) = self.try_take() {
                taken.shrink(bytes);
                return taken;
            }
            self.wait().await;
        }
    }

    /// Waits until there is room. It may be gone again when this returns.
    pub(crate) async fn wait(&self) {
        let _waiting = Waiting(self);
        loop {
            let bell = {
                let mut state = self.room.state();
                if self.room.fits(&state, self.row) {
                    return;
                }
                Arc::clone(state.waiting.entry(self.row).or_default())
            };
            bell.notified().await;
        }
    }
}

/// A row that may be waiting; when it no longer does, for whatever reason, the next one is rung.
struct Waiting<'a>(&'a Place);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let room = &self.0.room;
        let mut state = room.state();
        if state.waiting.remove(&self.0.row).is_some() {
            room.ring(&state);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.room.state();
        state.earliest = state.earliest.max(self.row + 1);
        self.room.ring(&state);
    }
}

impl Taken {
    /// Keeps room for `bytes` and gives back the rest.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let rest = self.bytes.saturating_sub(bytes);
        self.bytes -= rest;
        self.give_back(rest);
    }

    fn give_back(&self, bytes: usize) {
        let mut state = self.room.state();
        state.free += signed(bytes);
        self.room.ring(&state);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn later_rows_wait_and_the_earliest_never_does() {
        let room = Room::new(25, 10);
        let places: Vec<Place> = (0..4).map(|row| room.place(row)).collect();
        let mut later = places[2].try_take().unwrap();
        let last = places[3].try_take().unwrap();
        assert!(places[1].try_take().is_none(), "5 bytes are free");
        let first = places[0].try_take().unwrap();
        assert_eq!(room.state().free, -5);
        later.shrink(1);
        assert!(places[1].try_take().is_none(), "4 bytes are free");
        drop(last);
        places[1].wait().await;
        let second = places[1].try_take().unwrap();
        drop((first, second, later));
        assert_eq!(room.state().free, 25);
    }

    #[tokio::test]
    async fn who_waits_is_woken_one_after_the_other() {
        let room = Room::new(10, 10);
        let first = room.place(0);
        let taken = first.try_take().unwrap();
        let later: Vec<_> = (1..50)
            .map(|row| {
                let place = room.place(row);
                tokio::spawn(async move {
                    place.wait().await;
                    // The places are given back in the order of the rows, by whoever holds them.
                    (place.try_take(), place)
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(later.iter().all(|task| !task.is_finished()));
        drop((taken, first));
        for task in later {
            drop(tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap());
        }
        let state = room.state();
        assert_eq!((state.free, state.waiting.len()), (10, 0));
    }

    #[tokio::test]
    async fn who_gives_up_waiting_does_not_keep_the_bell() {
        let room = Room::new(10, 10);
        let places: Vec<Place> = (0..3).map(|row| room.place(row)).collect();
        let taken = places[0].try_take().unwrap();
        let mut impatient = Box::pin(places[1].wait());
        assert!(futures::poll!(&mut impatient).is_pending());
        let mut patient = Box::pin(places[2].wait());
        assert!(futures::poll!(&mut patient).is_pending());
        drop(taken);
        drop(impatient);
        tokio::time::timeout(Duration::from_secs(5), patient).await.unwrap();
    }
}
