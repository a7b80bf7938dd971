#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};

use capfilt_schemas::TextSource;
use capfilt_store::StoreError;
use proptest::prelude::*;

use super::*;
use crate::draw::parse_id;
use crate::testing::{Candidate, candidates, selected, stores};

fn pair(url: usize, text: &str, source: &'static str, queries: &[u32]) -> Candidate {
    Candidate { url: format!("http://a/{url}"), text: text.to_owned(), source, page: String::new(), queries: queries.to_vec() }
}

fn settings() -> SqlConfig {
    SqlConfig { memory_mib: 64, partitions: 2, spill_folder: None }
}

/// A query's draw for a pair, then the id.
fn place(config: &BalanceConfig, q: u32, id: &str) -> u128 {
    Draws::new(config.seed).place(q, parse_id(id).unwrap())
}

/// The definition, word by word: keep the best candidate of each key, let each query take its smallest draws.
fn naive(config: &BalanceConfig, rows: &[Candidate]) -> Vec<(String, Vec<u32>)> {
    let mut best = BTreeMap::<String, &Candidate>::new();
    let rank = |c: &Candidate| (TextSource::parse(c.source).unwrap(), place(config, u32::MAX, &c.id()), c.id());
    for c in rows.iter().filter(|c| !c.queries.is_empty()) {
        let key = if config.dedup == Dedup::Url { c.url.clone() } else { c.id() };
        let there = best.entry(key).or_insert(c);
        if rank(c) < rank(there) {
            *there = c;
        }
    }
    let mut takers = BTreeMap::<String, Vec<u32>>::new();
    let queries: BTreeSet<u32> = best.values().flat_map(|c| c.queries.clone()).collect();
    for q in queries {
        let mut all: Vec<_> =
            best.values().filter(|c| c.queries.contains(&q)).map(|c| (place(config, q, &c.id()), c.id())).collect();
        all.sort();
        let (count, quota) = (all.len() as u64, (config.per_query as f64 / config.expected_success).ceil() as u64);
        all.retain(|(place, _)| {
            let smaller = best.values().filter(|c| c.queries.contains(&q) && self::place(config, q, &c.id()) < *place).count();
            match config.rule {
                Rule::Cap => (smaller as u64) < quota,
                // draw / 2^64 < quota / count, without rounding.
                Rule::Soft => (place >> 64) * u128::from(count) < u128::from(quota) << 64,
            }
        });
        for (_, id) in all {
            takers.entry(id).or_default().push(q);
        }
    }
    let mut chosen: Vec<_> = takers.into_iter().collect();
    if let Some(max) = config.max_pairs {
        chosen.sort_by_key(|(id, _)| place(config, u32::MAX, id));
        chosen.truncate(usize::try_from(max).unwrap());
        chosen.sort();
    }
    chosen
}

fn some_candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let sources = prop_oneof![Just("alt"), Just("figcaption"), Just("title"), Just("list")];
    let one = (0_usize..25, "[a-c]{1,2}", sources, "[xy]?", proptest::collection::btree_set(0_u32..6, 0..4));
    let one = one.prop_map(|(url, text, source, page, queries)| Candidate {
        url: format!("http://a/{url}"),
        text,
        source,
        page,
        queries: queries.into_iter().collect(),
    });
    // A pair has the same queries wherever it is found: they come from its text.
    proptest::collection::vec(one, 0..60).prop_map(|mut rows| {
        let mut of = BTreeMap::new();
        for c in &mut rows {
            c.queries = of.entry(c.id()).or_insert_with(|| c.queries.clone()).clone();
        }
        rows
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn takes_exactly_what_the_definition_takes(
        rows in some_candidates(),
        per_query in 1_u64..8,
        by_url in any::<bool>(),
        soft in any::<bool>(),
        expected_success in prop_oneof![Just(1.0), Just(0.7), Just(0.25)],
        max_pairs in proptest::option::of(1_u64..30),
        seed in 0_u64..3,
        cut in 0_usize..60,
    ) {
        let dedup = if by_url { Dedup::Url } else { Dedup::UrlText };
        let rule = if soft { Rule::Soft } else { Rule::Cap };
        let config = BalanceConfig { per_query, rule, expected_success, dedup, max_pairs, seed, shard_rows: 7 };
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = Store::open("memory:").await.unwrap();
            let (a, b) = rows.split_at(cut.min(rows.len()));
            let mut reversed = rows.clone();
            reversed.reverse();
            let halves = [candidates(&store, a).await, candidates(&store, b).await];
            let whole = [candidates(&store, &reversed).await];
            let got = balance(&store, &settings(), &config, &halves).await.unwrap();
            let again = balance(&store, &SqlConfig { partitions: 1, ..settings() }, &config, &whole).await.unwrap();
            let expected = naive(&config, &rows);
            prop_assert_eq!(selected(&store, &got.outputs).await, expected.clone());
            prop_assert_eq!(&got.outputs, &again.outputs, "cut and order of the input matter");
            prop_assert!(got.outputs.iter().rev().skip(1).all(|o| o.rows == 7));
            prop_assert_eq!(got.counts["ok"], expected.len() as u64);
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn each_query_gets_exactly_its_cap() {
    let (_folder, stores) = stores().await;
    for store in stores {
        let rows: Vec<_> = (0..300).map(|i| pair(i, &format!("text {i}"), "alt", if i < 5 { &[1, 2] } else { &[1] })).collect();
        let shards = [candidates(&store, &rows[..120]).await, candidates(&store, &rows[120..]).await];
        let config = BalanceConfig { per_query: 10, ..BalanceConfig::default() };
        let done = balance(&store, &settings(), &config, &shards).await.unwrap();
        let takers: Vec<u32> = selected(&store, &done.outputs).await.into_iter().flat_map(|(_, q)| q).collect();
        assert_eq!(takers.iter().filter(|q| **q == 1).count(), 10);
        assert_eq!(takers.iter().filter(|q| **q == 2).count(), 5, "a query with fewer matches takes them all");
        assert_eq!(done.facts["queries_capped"], 1);
        assert_eq!(done.facts["heads"][0], json!({"query": 1, "matches": 300}));
        assert_eq!((&done.facts["candidates"], &done.facts["unique"]), (&json!(300), &json!(300)));
        let other = BalanceConfig { seed: 1, ..config };
        assert_ne!(balance(&store, &settings(), &other, &shards).await.unwrap().outputs, done.outputs);
    }
}

#[tokio::test]
async fn an_address_keeps_the_text_of_the_best_source() {
    let store = Store::open("memory:").await.unwrap();
    let rows = [
        pair(1, "a title", "title", &[3]),
        pair(1, "an alt", "alt", &[2]),
        pair(1, "no query", "alt", &[]),
        pair(2, "listed", "list", &[2]),
    ];
    let shard = candidates(&store, &rows).await;
    let config = BalanceConfig::default();
    let by_url = balance(&store, &settings(), &config, &[shard, shard]).await.unwrap();
    let mut expected = vec![(rows[1].id(), vec![2]), (rows[3].id(), vec![2])];
    expected.sort();
    assert_eq!(selected(&store, &by_url.outputs).await, expected);
    assert_eq!((&by_url.facts["matched"], &by_url.facts["unique"]), (&json!(3), &json!(2)));
    let by_text = BalanceConfig { dedup: Dedup::UrlText, ..config };
    let by_text = balance(&store, &settings(), &by_text, &[shard]).await.unwrap();
    assert_eq!(by_text.counts["ok"], 3);
    let row = store.read_whole(Table::Selected, &by_url.outputs[0].digest).await.unwrap();
    assert_eq!(row.schema(), Table::Selected.schema());
}

#[tokio::test]
async fn what_does_not_fit_is_spilled_and_changes_nothing() {
    let store = Store::open("memory:").await.unwrap();
    let filler = "x".repeat(1500);
    let rows: Vec<_> = (0..30_000).map(|i| pair(i, &format!("{i} {filler}"), "alt", &[1, 2, 3])).collect();
    let shards = [candidates(&store, &rows[..9000]).await, candidates(&store, &rows[9000..]).await];
    let config = BalanceConfig { per_query: 25_000, shard_rows: 100_000, ..BalanceConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let small = SqlConfig { memory_mib: 32, partitions: 2, spill_folder: Some(folder.path().to_owned()) };
    let large = SqlConfig { memory_mib: 1024, partitions: 1, spill_folder: None };
    let spilled = balance(&store, &small, &config, &shards).await.unwrap();
    assert_eq!(spilled, balance(&store, &large, &config, &shards).await.unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    let nowhere = SqlConfig { spill_folder: Some(folder.path().join("gone")), ..small };
    let error = balance(&store, &nowhere, &config, &shards).await.unwrap_err();
    assert!(matches!(&error, CoordinatorError::Spill { .. }) && error.to_string().contains("gone"), "{error}");
}

#[tokio::test]
async fn an_address_on_very_many_pages_is_one_pair() {
    let store = Store::open("memory:").await.unwrap();
    let found = |n: usize| Candidate { page: format!("http://p/{n}"), ..pair(1, "a logo", "alt", &[1]) };
    let rows: Vec<_> = (0..2000).map(found).collect();
    let forward = candidates(&store, &rows).await;
    let backward = candidates(&store, &rows.iter().rev().cloned().collect::<Vec<_>>()).await;
    let config = BalanceConfig::default();
    let one = balance(&store, &settings(), &config, &[forward]).await.unwrap();
    let other = balance(&store, &settings(), &config, &[backward]).await.unwrap();
    assert_eq!((one.counts["ok"], &one.facts["candidates"]), (1, &json!(2000)));
    assert_eq!(one.outputs, other.outputs, "the page that is named does not depend on the order");
}

#[tokio::test]
async fn the_soft_rule_takes_about_as_many_and_the_cap_exactly() {
    let store = Store::open("memory:").await.unwrap();
    let rows: Vec<_> = (0..20_000).map(|i| pair(i, "text", "alt", if i % 4 == 0 { &[5, 6] } else { &[5] })).collect();
    let shard = candidates(&store, &rows).await;
    let run = async |rule, expected_success| {
        let config = BalanceConfig { per_query: 1000, rule, expected_success, ..BalanceConfig::default() };
        let done = balance(&store, &settings(), &config, &[shard]).await.unwrap();
        let takers: Vec<u32> = selected(&store, &done.outputs).await.into_iter().flat_map(|(_, q)| q).collect();
        [5, 6].map(|q| takers.iter().filter(|t| **t == q).count())
    };
    assert_eq!(run(Rule::Cap, 1.0).await, [1000, 1000]);
    assert_eq!(run(Rule::Cap, 0.8).await, [1250, 1250]);
    // Four standard deviations of a binomial count around 1000 (of 20,000 and of 5000) and 2000.
    let [frequent, rarer] = run(Rule::Soft, 1.0).await;
    assert!((877..1123).contains(&frequent) && frequent != 1000, "{frequent}");
    assert!((887..1113).contains(&rarer), "{rarer}");
    let [frequent, _] = run(Rule::Soft, 0.5).await;
    assert!((1830..2170).contains(&frequent), "{frequent}");
}

#[tokio::test]
async fn nothing_in_nothing_out() {
    let store = Store::open("memory:").await.unwrap();
    let config = BalanceConfig::default();
    let empty = candidates(&store, &[]).await;
    for inputs in [&[][..], &[empty]] {
        let done = balance(&store, &settings(), &config, inputs).await.unwrap();
        assert_eq!((done.outputs.len(), done.counts["ok"]), (0, 0));
    }
}

#[tokio::test]
async fn bad_settings_and_bad_shards_are_named() {
    let store = Store::open("memory:").await.unwrap();
    for (config, name) in [
        (BalanceConfig { per_query: 0, ..BalanceConfig::default() }, "balance.per_query"),
        (BalanceConfig { max_pairs: Some(0), ..BalanceConfig::default() }, "balance.max_pairs"),
        (BalanceConfig { shard_rows: 0, ..BalanceConfig::default() }, "balance.shard_rows"),
        (BalanceConfig { expected_success: 0.0, ..BalanceConfig::default() }, "balance.expected_success"),
        (BalanceConfig { expected_success: f64::NAN, ..BalanceConfig::default() }, "balance.expected_success"),
        (BalanceConfig { expected_success: 70.0, ..BalanceConfig::default() }, "balance.expected_success"),
    ] {
        let error = balance(&store, &settings(), &config, &[]).await.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(serde_json::from_str::<BalanceConfig>(r#"{"per_qery": 3}"#).is_err());
    let missing = Digest::of(b"missing");
    let error = balance(&store, &settings(), &BalanceConfig::default(), &[missing]).await.unwrap_err();
    assert!(
        matches!(&error, CoordinatorError::Store(StoreError::Missing { path }) if path.contains(&missing.to_string())),
        "{error}"
    );
    let junk = store.put_object(Table::Candidates, bytes::Bytes::from_static(b"not parquet")).await.unwrap();
    let error = balance(&store, &settings(), &BalanceConfig::default(), &[junk]).await.unwrap_err();
    assert!(error.to_string().contains(&junk.to_string()) && !error.is_retryable(), "{error}");
    let odd = candidates(&store, &[pair(1, "t", "caption", &[1])]).await;
    let error = balance(&store, &settings(), &BalanceConfig::default(), &[odd]).await.unwrap_err().to_string();
    assert!(error.contains("caption") && error.contains(&odd.to_string()), "{error}");
    let list = candidates(&store, &[pair(1, "t", "alt", &[1, u32::MAX])]).await;
    let error = balance(&store, &settings(), &BalanceConfig::default(), &[list]).await.unwrap_err().to_string();
    assert!(error.contains("4294967295") && error.contains(&list.to_string()), "{error}");
    let small = SqlConfig { memory_mib: 1, ..settings() };
    assert!(balance(&store, &small, &BalanceConfig::default(), &[]).await.is_err());
}

#[tokio::test]
async fn a_flipped_bit_is_found() {
    let (folder, stores) = stores().await;
    let rows: Vec<_> = (0..50).map(|i| pair(i, &format!("text {i}"), "alt", &[1])).collect();
    let shard = candidates(&stores[0], &rows).await;
    let path = folder.path().join(format!("objects/candidates/{shard}.parquet"));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = balance(&stores[0], &settings(), &BalanceConfig::default(), &[shard]).await.unwrap_err();
    assert!(
        matches!(&error, CoordinatorError::Store(StoreError::Corrupt { path, .. }) if path.contains(&shard.to_string())),
        "{error}"
    );
}
