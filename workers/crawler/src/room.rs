//! Memory for rows that come out in order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// So many bytes for rows that come out in order: for bodies on their way to an image, and for images that wait for an earlier row. A
/// row begins only while there is any room, its body takes what it needs, and its image waits until there is room for it. The earliest
/// row never waits, so it never waits for a later one.
pub(crate) struct Room(Mutex<State>);

struct State {
    /// Below zero if bodies, or the earliest row, took more than there was.
    free: i64,
    earliest: u64,
    /// Rows that wait, each with the bytes that it waits for and its bell. The earliest is rung first, and rings the next when it stops
    /// waiting.
    waiting: BTreeMap<u64, (usize, Arc<Notify>)>,
}

/// A row's place in the order, until its result has come out.
pub(crate) struct Place {
    room: Arc<Room>,
    row: u64,
}

/// Room that was taken; it is given back when this is dropped.
pub(crate) struct Held {
    room: Arc<Room>,
    row: u64,
    bytes: usize,
}

impl Room {
    /// Room for `bytes`.
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { free: signed(bytes), earliest: 0, waiting: BTreeMap::new() })))
    }

    /// The place of row `row`, counted from 0. Places have to be dropped in the order of the rows.
    pub(crate) fn place(self: &Arc<Self>, row: u64) -> Place {
        Place { room: Arc::clone(self), row }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are `bytes` for a row. They may be gone again when this returns.
    async fn wait(&self, row: u64, bytes: usize) {
        let _waiting = Waiting { room: self, row };
        loop {
            let bell = {
                let mut state = self.state();
                if state.fits(row, bytes) {
                    return;
                }
                let (wanted, bell) = state.waiting.entry(row).or_default();
                *wanted = bytes;
                Arc::clone(bell)
            };
            bell.notified().await;
        }
    }
}

impl State {
    fn fits(&self, row: u64, bytes: usize) -> bool {
        row <= self.earliest || self.free >= signed(bytes)
    }

    fn ring(&self) {
        if let Some((row, (bytes, bell))) = self.waiting.first_key_value()
            && self.fits(*row, *bytes)
        {
            bell.notify_one();
        }
    }
}

impl Place {
    /// Whether the row may begin: there is some room, or no earlier row.
    pub(crate) fn may_begin(&self) -> bool {
        self.room.state().fits(self.row, 1)
    }

    /// Waits until the row may begin. That may be over again when this returns.
    pub(crate) async fn begin(&self) {
        self.room.wait(self.row, 1).await;
    }

    /// Takes room for bytes that are here already, whether there is any or not.
    pub(crate) fn take(&self, bytes: usize) -> Held {
        self.room.state().free -= signed(bytes);
        Held { room: Arc::clone(&self.room), row: self.row, bytes }
    }
}

impl Held {
    /// Takes room for `bytes` more, if there is any now.
    pub(crate) fn try_grow(&mut self, bytes: usize) -> bool {
        let mut state = self.room.state();
        let fits = state.fits(self.row, bytes);
        if fits {
            state.free -= signed(bytes);
            self.bytes += bytes;
        }
        fits
    }

    /// Waits for room for `bytes` more, and takes it.
    pub(crate) async fn grow(&mut self, bytes: usize) {
        while !self.try_grow(bytes) {
            self.room.wait(self.row, bytes).await;
        }
    }

    /// Keeps room for `bytes` and gives back the rest.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let rest = self.bytes.saturating_sub(bytes);
        self.bytes -= rest;
        self.give_back(rest);
    }

    fn give_back(&self, bytes: usize) {
        let mut state = self.room.state();
        state.free += signed(bytes);
        state.ring();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.room.state();
        state.earliest = state.earliest.max(self.row + 1);
        state.ring();
    }
}

/// A row that may be waiting; when it no longer does, for whatever reason, the next one is rung.
struct Waiting<'a> {
    room: &'a Room,
    row: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.room.state();
        if state.waiting.remove(&self.row).is_some() {
            state.ring();
        }
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
        let room = Room::new(25);
        let places: Vec<Place> = (0..4).map(|row| room.place(row)).collect();
        let (mut second, mut third) = (places[1].take(10), places[2].take(10));
        assert!(places[3].may_begin() && third.try_grow(5), "5 bytes are free");
        assert!(!places[3].may_begin() && !second.try_grow(1), "no byte is free");
        assert!(places[0].may_begin());
        let mut first = places[0].take(10);
        assert!(first.try_grow(100));
        assert_eq!(room.state().free, -110);
        first.shrink(1);
        assert!(!places[3].may_begin(), "1 byte is missing");
        third.shrink(5);
        tokio::join!(places[3].begin(), second.grow(9));
        assert_eq!(room.state().free, 0);
        drop((first, second, third));
        assert_eq!(room.state().free, 25);
    }

    #[tokio::test]
    async fn who_waits_is_woken_one_after_the_other() {
        let room = Room::new(10);
        let first = room.place(0);
        let taken = first.take(10);
        let later: Vec<_> = (1..50)
            .map(|row| {
                let place = room.place(row);
                tokio::spawn(async move {
                    place.begin().await;
                    let mut taken = place.take(1);
                    taken.grow(row as usize).await;
                    // The places are given back in the order of the rows, by whoever holds them.
                    (taken, place)
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
        let room = Room::new(10);
        let places: Vec<Place> = (0..3).map(|row| room.place(row)).collect();
        let taken = places[0].take(10);
        let mut impatient = Box::pin(places[1].begin());
        assert!(futures::poll!(&mut impatient).is_pending());
        let mut patient = Box::pin(places[2].begin());
        assert!(futures::poll!(&mut patient).is_pending());
        drop(taken);
        drop(impatient);
        tokio::time::timeout(Duration::from_secs(5), patient).await.unwrap();
    }
}
