//! The conformance suite of queue engines: the same cases on every engine.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use capfilt_runtime::{Depth, MemoryQueue, WorkQueue};
use capfilt_schemas::{StageKind, Task};
use serde_json::json;

const LEASE: Duration = Duration::from_secs(30);

fn task(stage: StageKind, n: u32) -> Task {
    Task { stage, stage_version: 1, params: json!({ "n": n }), model: None, inputs: vec![] }
}

async fn hands_out_in_order_and_by_stage(queue: Arc<dyn WorkQueue>) {
    let tasks: Vec<Task> = (0..3).map(|n| task(StageKind::Fetch, n)).chain([task(StageKind::Score, 9)]).collect();
    queue.enqueue(&tasks).await.unwrap();
    for expected in &tasks[..3] {
        let delivery = queue.receive(StageKind::Fetch, LEASE).await.unwrap().unwrap();
        assert_eq!(*delivery.task, *expected);
        assert_eq!(delivery.id, expected.id());
        queue.ack(&delivery).await.unwrap();
    }
    assert!(queue.receive(StageKind::Fetch, LEASE).await.unwrap().is_none());
    assert_eq!(queue.depth(StageKind::Score).await.unwrap(), Depth { waiting: 1, in_flight: 0 });
}

async fn a_task_is_in_the_queue_once(queue: Arc<dyn WorkQueue>) {
    let one = [task(StageKind::Fetch, 1)];
    queue.enqueue(&one).await.unwrap();
    queue.enqueue(&one).await.unwrap();
    let delivery = queue.receive(StageKind::Fetch, LEASE).await.unwrap().unwrap();
    queue.enqueue(&one).await.unwrap();
    assert_eq!(queue.depth(StageKind::Fetch).await.unwrap(), Depth { waiting: 0, in_flight: 1 });
    queue.ack(&delivery).await.unwrap();
    assert_eq!(queue.depth(StageKind::Fetch).await.unwrap(), Depth::default());
    queue.enqueue(&one).await.unwrap();
    assert!(queue.receive(StageKind::Fetch, LEASE).await.unwrap().is_some(), "after the ack it may come again");
}

async fn a_silent_worker_loses_its_lease(queue: Arc<dyn WorkQueue>) {
    queue.enqueue(&[task(StageKind::Fetch, 1)]).await.unwrap();
    let first = queue.receive(StageKind::Fetch, Duration::from_secs(2)).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let second = queue.receive(StageKind::Fetch, LEASE).await.unwrap().expect("handed out again");
    assert_eq!(first.id, second.id);
    assert!(!queue.extend(&first, LEASE).await.unwrap());
    queue.ack(&first).await.unwrap();
    queue.retry(&first, Duration::ZERO).await.unwrap();
    assert_eq!(queue.depth(StageKind::Fetch).await.unwrap().in_flight, 1, "a late ack or retry does not touch the new owner");
    assert!(queue.extend(&second, LEASE).await.unwrap());
}

async fn an_extended_lease_holds(queue: Arc<dyn WorkQueue>) {
    queue.enqueue(&[task(StageKind::Fetch, 1)]).await.unwrap();
    let delivery = queue.receive(StageKind::Fetch, Duration::from_secs(3)).await.unwrap().unwrap();
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(queue.extend(&delivery, Duration::from_secs(3)).await.unwrap());
        assert!(queue.receive(StageKind::Fetch, LEASE).await.unwrap().is_none());
    }
}

async fn retry_comes_after_its_delay(queue: Arc<dyn WorkQueue>) {
    queue.enqueue(&[task(StageKind::Fetch, 1)]).await.unwrap();
    let delivery = queue.receive(StageKind::Fetch, LEASE).await.unwrap().unwrap();
    queue.retry(&delivery, Duration::from_secs(5)).await.unwrap();
    assert!(queue.receive(StageKind::Fetch, LEASE).await.unwrap().is_none());
    assert_eq!(queue.depth(StageKind::Fetch).await.unwrap(), Depth { waiting: 1, in_flight: 0 });
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(queue.receive(StageKind::Fetch, LEASE).await.unwrap().is_some());
}

async fn many_workers_get_each_task_once(queue: Arc<dyn WorkQueue>) {
    let tasks: Vec<Task> = (0..200).map(|n| task(StageKind::Fetch, n)).collect();
    queue.enqueue(&tasks).await.unwrap();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let queue = Arc::clone(&queue);
        workers.spawn(async move {
            let mut got = Vec::new();
            while let Some(delivery) = queue.receive(StageKind::Fetch, LEASE).await.unwrap() {
                queue.ack(&delivery).await.unwrap();
                got.push(delivery.id);
            }
            got
        });
    }
    let mut got: Vec<_> = workers.join_all().await.into_iter().flatten().collect();
    got.sort_unstable();
    let mut expected: Vec<_> = tasks.iter().map(Task::id).collect();
    expected.sort_unstable();
    assert_eq!(got, expected);
}

macro_rules! conformance {
    ($engine:ident, $make:expr; $($case:ident)+) => {
        mod $engine {
            $(#[tokio::test(start_paused = true)]
            async fn $case() {
                super::$case(super::Arc::new($make)).await;
            })+
        }
    };
}

conformance!(memory, super::MemoryQueue::new();
    hands_out_in_order_and_by_stage
    a_task_is_in_the_queue_once
    a_silent_worker_loses_its_lease
    an_extended_lease_holds
    retry_comes_after_its_delay
    many_workers_get_each_task_once
);
