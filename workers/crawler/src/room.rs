//! Memory for results that wait for an earlier one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// So many bytes for the results of rows that come out in order. Room is taken for the largest result just before a row's work begins,
/// so that rows that wait for something else hold none; the earliest row always gets room, so it never waits for a later one.
pub(crate) struct Room {
    state: Mutex<State>,
    changed: Notify,
    largest: usize,
}

struct State {
    /// Below zero if the earliest row took more than there was.
    free: i64,
    earliest: u64,
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
        let state = State { free: signed(bytes), earliest: 0 };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new(), largest })
    }

    /// The place of row `row`, counted from 0. Places have to be dropped in the order of the rows.
    pub(crate) fn place(self: &Arc<Self>, row: u64) -> Place {
        Place { room: Arc::clone(self), row }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Takes room for the largest result, if there is any now.
    pub(crate) fn try_take(&self) -> Option<Taken> {
        let mut state = self.room.state();
        let fits = self.fits(&state);
        fits.then(|| {
            state.free -= signed(self.room.largest);
            Taken { room: Arc::clone(&self.room), bytes: self.room.largest }
        })
    }

    /// Waits until there is room. It may be gone again when this returns.
    pub(crate) async fn wait(&self) {
        loop {
            let mut changed = std::pin::pin!(self.room.changed.notified());
            changed.as_mut().enable();
            if self.fits(&self.room.state()) {
                return;
            }
            changed.await;
        }
    }

    fn fits(&self, state: &State) -> bool {
        self.row <= state.earliest || state.free >= signed(self.room.largest)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.room.state();
        state.earliest = state.earliest.max(self.row + 1);
        drop(state);
        self.room.changed.notify_waiters();
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
        self.room.state().free += signed(bytes);
        self.room.changed.notify_waiters();
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
    async fn who_waits_is_woken_when_an_earlier_row_is_out() {
        let room = Room::new(0, 10);
        let (first, second) = (room.place(0), room.place(1));
        let waiting = tokio::spawn(async move {
            second.wait().await;
            second.try_take().is_some()
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(first);
        assert!(waiting.await.unwrap());
    }
}
