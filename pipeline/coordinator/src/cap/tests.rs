#![allow(clippy::unwrap_used)]
use capfilt_schemas::Table;
use capfilt_store::Store;
use proptest::prelude::*;

use super::*;
use crate::draw::parse_id;
use crate::testing::{Candidate, candidates};

proptest! {
    #[test]
    fn a_window_finds_the_nth_or_says_that_it_missed(
        mut places in proptest::collection::vec(0_u128..50, 1..40),
        n in 1_u64..40,
        (from, to) in (0_u128..50, 0_u128..50),
        cut in 0_usize..40,
    ) {
        let contest = Contest { query: 3, count: 1, quota: 1 };
        let empty = Windows::new(&[(contest, Span { from, to })]);
        let (mut a, mut b) = (empty.clone(), empty);
        let (left, right) = places.split_at(cut.min(places.len()));
        left.iter().for_each(|p| a.offer(3, || *p));
        right.iter().for_each(|p| b.offer(3, || *p));
        b.offer(2, || 0);
        b.offer(4, || 0);
        let found = a.join(b).windows[0].nth(n);
        places.sort_unstable();
        let expected = places.get(n as usize - 1).copied().filter(|p| (from..=to).contains(p));
        prop_assert_eq!(found, expected);
    }
}

#[tokio::test]
async fn windows_that_miss_are_widened_and_little_memory_means_more_passes() {
    let store = Store::open("memory:").await.unwrap();
    let row = |i: u32| Candidate {
        url: format!("http://a/{i}"),
        text: "t".to_owned(),
        source: "alt",
        page: String::new(),
        queries: (0..5).filter(|q| i.is_multiple_of(q + 1)).collect(),
    };
    let rows: Vec<_> = (0..3000).map(row).collect();
    let shards = [candidates(&store, &rows[..1100]).await, candidates(&store, &rows[1100..]).await];
    let all = (0..1100).map(|row| (0, row)).chain((0..1900).map(|row| (1, row))).collect();
    let readers = Readers::new(&store, Table::Candidates, &shards, 2);
    let columns = &[column::SAMPLE_ID, column::QUERIES];
    let pairs = Pairs { readers, rows: Arc::new(all), columns, memory: 1 << 20, deviations: DEVIATIONS };
    let counts = pairs.counts().await.unwrap();
    assert_eq!(counts, [3000, 1500, 1000, 750, 600]);
    let (contests, draws) = (contests(&counts, 100), Draws::new(1));
    let expected: Vec<u128> = (0..5)
        .map(|q| {
            let of_query = rows.iter().filter(|r| r.queries.contains(&q));
            let mut places: Vec<_> = of_query.map(|r| draws.place(q, parse_id(&r.id()).unwrap())).collect();
            places.sort_unstable();
            places[99]
        })
        .collect();
    // One pass; several that miss; and a pass for each query.
    for (deviations, memory) in [(DEVIATIONS, 1 << 20), (0.001, 1 << 20), (DEVIATIONS, 1)] {
        let pairs = Pairs { deviations, memory, ..pairs.clone() };
        assert_eq!(pairs.query_borders(&contests, draws).await.unwrap().0, expected);
    }
}

#[test]
fn windows_are_narrow_and_grow_to_everything() {
    let contest = Contest { query: 0, count: 54_000_000, quota: 20_000 };
    let span = Span::expected(&contest, DEVIATIONS);
    let expects = span.share() * contest.count as f64;
    assert!((1_700.0..1_900.0).contains(&expects), "{expects}");
    let (middle, all) = ((u128::from(contest.quota) << 64) / u128::from(contest.count), Span::expected(&contest, 1e9));
    assert!(span.from >> 64 < middle && middle < span.to >> 64);
    assert_eq!(all, Span { from: 0, to: u128::MAX });
}

#[test]
fn the_soft_rule_is_a_share_of_all_draws() {
    let borders = Borders::soft(&[Contest { query: 1, count: 3, quota: 1 }]);
    let third = (1_u128 << 64) / 3;
    assert_eq!(borders.0, [u128::MAX, (third << 64) - 1]);
}
