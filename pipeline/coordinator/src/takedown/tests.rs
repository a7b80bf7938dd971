#![allow(clippy::unwrap_used)]

use capfilt_store::Targets;

use super::*;
use crate::build::BuildConfig;
use crate::export::{ExportConfig, export};
use crate::testing::{Annotated, Sample, image, kept, sample, stores, version};
use crate::{SqlConfig, diff};

/// Thirty images of the web, ten of them on another host, and two of people.
fn rows() -> (Vec<Sample>, Vec<Annotated>) {
    let host = |n: u64| if n < 20 { "http://one.test" } else { "http://img.two.test" };
    let samples =
        (0..30).map(|n| Sample { url: format!("{}/{n}.jpg", host(n)), ..sample(n, &format!("text {n}"), 0.75) }).collect();
    let human = |n: u64| Annotated { url: format!("people://{n}"), captions: vec!["one", "two"], image: image(n) };
    (samples, vec![human(900), human(901)])
}

async fn take_down(store: &Store, lines: &[&str]) -> TakenDown {
    let mut targets = Targets::default();
    lines.iter().for_each(|line| targets.add_line(line).unwrap());
    store.take_down(&targets, None).await.unwrap();
    store.taken_down().await.unwrap()
}

/// The bytes of the store's objects, all in one.
async fn bytes(store: &Store) -> Vec<u8> {
    let mut all = Vec::new();
    for table in [Table::Samples, Table::Annotated, Table::Dataset] {
        for (digest, _) in store.shards(table).await.unwrap() {
            all.extend(store.get_object(table, &digest).await.unwrap());
        }
    }
    all
}

fn has(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|w| w == part)
}

#[tokio::test]
async fn what_is_taken_down_goes_by_address_host_and_bytes() {
    let (_folder, stores) = stores().await;
    let place = tempfile::tempdir().unwrap();
    for (n, store) in stores.iter().enumerate() {
        let (samples, human) = rows();
        let first = version(store, 1, &BuildConfig::default(), &samples, &human).await;
        let first = store.append_dataset(&first).await.unwrap();
        let gone = [3, 5, 900, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29];
        let of_hash = |n: u64| Digest::of(&image(n).original).to_string();
        let down = take_down(store, &["https://one.test/3.jpg", &of_hash(5), &of_hash(900), "two.test"]).await;

        let found = reach(store, &down).await.unwrap();
        assert_eq!((found.samples.rows, found.annotated.rows), (12, 1));
        // A text for each of the web, and two for the image of people.
        assert_eq!(found.versions, [ReachedVersion { dataset: "demo".to_owned(), version: 1, pairs: 14 }]);
        assert_eq!(found.sha256.len(), 13);
        assert_eq!(left_out(store, &first, &down).await.unwrap(), 14);

        let dry = redact(store, true).await.unwrap();
        let all = bytes(store).await;
        assert!(gone.iter().all(|n| has(&all, &image(*n).bytes)));
        assert_eq!(dry.tables[&Table::Samples], Reached { shards: 1, rows: 12 });
        let done = redact(store, false).await.unwrap();
        assert_eq!(done.tables, dry.tables);
        let all = bytes(store).await;
        for n in (0..30).chain([900, 901]) {
            let there = !gone.contains(&n);
            assert_eq!(has(&all, &image(n).bytes), there, "image {n}");
            assert_eq!(has(&all, of_hash(n).as_bytes()) || has(&all, format!("text {n}").as_bytes()), there, "text {n}");
        }
        assert_eq!(redact(store, false).await.unwrap(), Redacted::default(), "once is enough");
        assert!(store.check().await.unwrap().is_sound());
        assert_eq!(left_out(store, &first, &down).await.unwrap(), 14);
        assert_eq!(kept(store, &first.shards).await.len(), 20);
        let config = ExportConfig { folder: place.path().join(n.to_string()), ..ExportConfig::default() };
        let copy = export(store, &SqlConfig::default(), &first, &config, |_| {}).await.unwrap();
        assert_eq!((copy.manifest.pairs, copy.manifest.left_out), (20, 14));
        assert!(export(store, &SqlConfig::default(), &first, &config, |_| {}).await.unwrap().already_there);

        // One more, and the same: a shard that was redacted is redacted again.
        take_down(store, &["http://one.test/4.jpg"]).await;
        let stale = export(store, &SqlConfig::default(), &first, &config, |_| {}).await.unwrap_err().to_string();
        assert!(stale.contains("1 pairs that were taken down since"), "{stale}");
        let more = redact(store, false).await.unwrap();
        assert_eq!(more.tables[&Table::Samples], Reached { shards: 1, rows: 1 });
        assert!(!has(&bytes(store).await, &image(4).bytes));
        assert!(store.check().await.unwrap().is_sound());
        assert_eq!(diff::diff(store, &first, &first, 5).await.unwrap().taken_down, 30);
    }
}

#[tokio::test]
async fn a_build_leaves_out_what_is_covered_and_changes_nothing_else() {
    let (_folder, stores) = stores().await;
    let store = &stores[1];
    let (samples, human) = rows();
    let before = version(store, 1, &BuildConfig::default(), &samples, &human).await;
    let inputs = crate::build::BuildInputs {
        triplets: vec![crate::testing::triplet(store, &samples).await],
        annotated: vec![crate::testing::annotated(store, &human).await],
        ..Default::default()
    };
    let build = async |down: &TakenDown| {
        let inputs = crate::build::BuildInputs { taken_down: Arc::new(down.clone()), ..inputs.clone() };
        crate::build::build(store, &SqlConfig::default(), &BuildConfig::default(), inputs).await.unwrap()
    };
    let same = build(&take_down(store, &["elsewhere.test"]).await).await;
    assert_eq!(same.shards, before.shards, "what covers nothing changes nothing");
    let down = take_down(store, &["img.two.test", &Digest::of(&image(900).original).to_string()]).await;
    let without = build(&down).await;
    let rest: Vec<_> = kept(store, &before.shards).await;
    let rest: Vec<_> = rest.into_iter().filter(|r| !down.covers_url(&r.url) && r.url != "people://900").collect();
    assert_eq!(kept(store, &without.shards).await, rest);
    assert_eq!((rest.len(), &without.facts["fetch_status"]["taken_down"]), (22, &10.into()));
    // The same from shards whose bytes are gone.
    redact(store, false).await.unwrap();
    assert_eq!(build(&down).await.shards, without.shards);
}
