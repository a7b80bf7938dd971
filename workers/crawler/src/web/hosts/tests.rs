//! Pace and patience, on a clock of the test.
#![allow(clippy::unwrap_used)]
use super::*;
use capfilt_schemas::FetchStatus;
use futures::future::join_all;
use std::sync::atomic::{AtomicUsize, Ordering};

/// That of an address that has had no turn yet.
fn clock() -> Clock {
    Clock::new(Duration::from_secs(60))
}

fn limited(pause: Duration) -> Failure {
    Failure { retry_after: Some(pause), ..Failure::new(FetchStatus::RateLimited, "http 429") }
}

fn manners() -> WebConfig {
    WebConfig { max_retry_after: Duration::from_secs(1), backoff: Duration::ZERO, ..WebConfig::default() }
}

#[tokio::test(start_paused = true)]
async fn requests_to_one_host_are_spaced_and_few_at_once() {
    let hosts = Hosts::new(2, 100.0);
    let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    join_all((0..10).map(|_| async {
        let _slot = hosts.enter("a", Duration::ZERO, &clock()).await.unwrap();
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(30)).await;
        now.fetch_sub(1, Ordering::SeqCst);
    }))
    .await;
    assert_eq!(most.load(Ordering::SeqCst), 2);
    // Five pairs of 30 ms, the second of each pair 10 ms later.
    assert!(start.elapsed() >= Duration::from_millis(160), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn hosts_do_not_wait_for_each_other_and_a_crawl_delay_counts() {
    let hosts = Hosts::new(4, 1000.0);
    let start = Instant::now();
    for _ in 0..3 {
        drop(hosts.enter("slow", Duration::from_millis(300), &clock()).await);
    }
    assert!(start.elapsed() >= Duration::from_millis(600));
    let other = Instant::now();
    drop(hosts.enter("other", Duration::ZERO, &clock()).await);
    assert!(other.elapsed() < Duration::from_millis(250));
}

/// A request that is granted at once, whatever the pace.
fn slot(hosts: &Hosts, host: &str) -> Slot {
    Slot { host: hosts.host(host), _permit: None, granted: Instant::now(), spacing: Duration::ZERO }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_left_alone_is_not_forgotten() {
    let hosts = Hosts::new(4, 1000.0);
    let asked = Duration::from_secs(3600);
    slot(&hosts, "shut").too_fast(&limited(asked), &manners());
    // A shorter wish afterwards does not open it.
    slot(&hosts, "shut").too_fast(&limited(Duration::from_secs(5)), &manners());
    drop(hosts.host("idle"));
    tokio::time::advance(IDLE * 2).await;
    hosts.hosts.lock().unwrap().limit = 2;
    hosts.host("new");
    let known = hosts.hosts.lock().unwrap().hosts.keys().cloned().collect::<Vec<_>>();
    assert!(known.contains(&"shut".to_owned()) && !known.contains(&"idle".to_owned()), "{known:?}");
    assert_eq!(hosts.enter("shut", Duration::ZERO, &clock()).await.err().unwrap().status, FetchStatus::RateLimited);
}

#[tokio::test(start_paused = true)]
async fn a_429_slows_the_host_down_until_it_is_trusted_again() {
    let hosts = Hosts::new(4, 1000.0);
    let spacing = || hosts.host("a").pace().spacing;
    let wave = [(); 4].map(|()| slot(&hosts, "a"));
    tokio::time::advance(Duration::from_millis(10)).await;
    wave.iter().for_each(|slot| slot.too_fast(&limited(Duration::from_millis(400)), &manners()));
    assert_eq!(spacing(), FIRST_SPACING, "what was begun together is told once");
    let start = Instant::now();
    drop(hosts.enter("a", Duration::ZERO, &clock()).await);
    assert!(start.elapsed() >= Duration::from_millis(400), "nobody comes before the pause is over");
    slot(&hosts, "a").too_fast(&limited(Duration::ZERO), &manners());
    assert_eq!(spacing(), FIRST_SPACING * 2);
    let good = slot(&hosts, "a");
    (0..TRUST_AFTER - 1).for_each(|_| good.fine());
    assert_eq!(spacing(), FIRST_SPACING * 2);
    good.fine();
    assert!(spacing() < FIRST_SPACING * 2);
    (0..TRUST_AFTER * 100).for_each(|_| good.fine());
    assert!(spacing() < Duration::from_millis(1));
    (0..GIVE_UP_AFTER - 1).for_each(|_| slot(&hosts, "a").too_fast(&limited(Duration::ZERO), &manners()));
    assert_eq!(spacing(), MAX_SPACING);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_wants_no_more_is_left_alone() {
    let hosts = Hosts::new(4, 1000.0);
    slot(&hosts, "pause").too_fast(&limited(Duration::from_secs(1000)), &manners());
    assert!(hosts.enter("pause", Duration::ZERO, &clock()).await.is_err());
    (0..GIVE_UP_AFTER - 1).for_each(|_| slot(&hosts, "never").too_fast(&limited(Duration::ZERO), &manners()));
    slot(&hosts, "never").fine();
    (0..GIVE_UP_AFTER - 1).for_each(|_| slot(&hosts, "never").too_fast(&limited(Duration::ZERO), &manners()));
    assert!(hosts.host("never").pace().shut.is_none(), "a good answer in between");
    slot(&hosts, "never").too_fast(&limited(Duration::ZERO), &manners());
    assert!(hosts.enter("never", Duration::ZERO, &clock()).await.is_err());
    assert!(hosts.enter("other", Duration::ZERO, &clock()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_dead_host_is_given_up_and_tried_again_later() {
    let hosts = Hosts::new(4, 1000.0);
    let dead = Failure::new(FetchStatus::Timeout, "no sign");
    let most = Duration::from_secs(10);
    let slot = hosts.enter("dead", Duration::ZERO, &clock()).await.unwrap();
    (0..100).for_each(|_| slot.silent(&dead, most));
    assert!(hosts.enter("dead", Duration::ZERO, &clock()).await.is_ok(), "an outage of a moment");
    tokio::time::advance(most).await;
    slot.heard(false);
    (0..100).for_each(|_| slot.silent(&dead, Duration::ZERO));
    assert!(hosts.enter("dead", Duration::ZERO, &clock()).await.is_ok(), "never, if so told");
    slot.heard(false);
    (0..LEAST_SILENCES - 1).for_each(|_| slot.silent(&dead, most));
    assert!(hosts.enter("dead", Duration::ZERO, &clock()).await.is_ok(), "too few to tell");
    slot.silent(&dead, most);
    let failure = hosts.enter("dead", Duration::ZERO, &clock()).await.err().unwrap();
    assert_eq!((failure.status, failure.reason.as_str(), failure.may_pass), (FetchStatus::Timeout, "no sign", false));
    tokio::time::advance(LEFT_ALONE).await;
    hosts.enter("dead", Duration::ZERO, &clock()).await.unwrap().silent(&dead, most);
    assert!(hosts.enter("dead", Duration::ZERO, &clock()).await.is_err(), "one trial is enough");
    tokio::time::advance(LEFT_ALONE).await;
    hosts.enter("dead", Duration::ZERO, &clock()).await.unwrap().heard(true);
    slot.silent(&dead, most);
    assert!(hosts.enter("dead", Duration::ZERO, &clock()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_long_pause_is_waited_for_by_those_whose_time_it_leaves() {
    let hosts = Hosts::new(4, 1000.0);
    let pause = Duration::from_secs(40);
    hosts.enter("a", Duration::ZERO, &clock()).await.unwrap().too_fast(&limited(pause), &manners());
    let begun = clock();
    tokio::time::advance(Duration::from_secs(5)).await;
    begun.begin();
    let start = Instant::now();
    assert!(hosts.enter("a", Duration::ZERO, &Clock::new(Duration::from_secs(30))).await.is_err());
    assert!(start.elapsed() < Duration::from_secs(1), "who cannot wait is told so at once");
    assert!(hosts.enter("a", Duration::ZERO, &clock()).await.is_ok());
    assert!(hosts.enter("a", Duration::ZERO, &begun).await.is_ok());
    assert_eq!(start.elapsed().as_secs(), 35);
}

#[tokio::test(start_paused = true)]
async fn waiting_counts_only_while_the_host_does_nothing_well() {
    let limit = Duration::from_secs(60);
    let turns = async |delay: u64, takes: u64, answered: bool| {
        let hosts = Hosts::new(2, 1000.0);
        join_all((0..400).map(|_| async {
            let clock = Clock::new(limit);
            let Ok(slot) = hosts.enter("a", Duration::from_secs(delay), &clock).await else { return false };
            clock.begin();
            tokio::time::sleep(Duration::from_secs(takes)).await;
            slot.heard(answered);
            true
        }))
        .await
    };
    assert!(turns(5, 1, false).await.iter().all(|had| *had), "its manners ask for 33 minutes");
    assert!(turns(0, 3, true).await.iter().all(|had| *had), "good answers, however slow");
    let dripped = turns(0, 3, false).await.iter().filter(|had| **had).count();
    assert!((38..=42).contains(&dripped), "two every three seconds, for a minute: {dripped}");
}

#[tokio::test(start_paused = true)]
async fn what_was_begun_comes_before_what_was_not() {
    let hosts = Hosts::new(1, 1.0);
    let order = Mutex::new(Vec::new());
    let turn = async |name: &'static str, clock: Clock| {
        let slot = hosts.enter("a", Duration::ZERO, &clock).await.unwrap();
        order.lock().unwrap().push(name);
        drop(slot);
    };
    let begun = Clock::new(Duration::from_secs(600));
    begun.begin();
    let new = async || turn("new", Clock::new(Duration::from_secs(600))).await;
    let news = join_all((0..5).map(|_| new()));
    tokio::join!(news, async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        turn("begun", begun).await;
    });
    assert_eq!(*order.lock().unwrap(), ["new", "new", "begun", "new", "new", "new"]);
}

#[test]
fn idle_hosts_are_forgotten_and_busy_ones_are_not() {
    let hosts = Hosts::new(1, 1000.0);
    let busy = hosts.host("busy");
    for n in 0..KEPT_HOSTS {
        hosts.host(&n.to_string()).pace().next -= IDLE * 2;
    }
    let known = || hosts.hosts.lock().unwrap().hosts.len();
    assert!(known() < KEPT_HOSTS);
    assert!(Arc::ptr_eq(&busy, &hosts.host("busy")));
}
