#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::json;

use super::*;
use crate::build::BuildConfig;
use crate::testing::{Annotated, image, sample, stores, version};

#[tokio::test]
async fn what_a_threshold_moved_is_told() {
    let (_folder, stores) = stores().await;
    for store in stores {
        let samples: Vec<_> = (0..40).map(|n| sample(n, &format!("text {n}"), n as f32 / 40.0)).collect();
        let human = [Annotated { url: "people://1".into(), captions: vec!["a", "b"], image: image(900) }];
        let config = |min_itm, human| BuildConfig { min_itm, human, shard_rows: 9, ..BuildConfig::default() };
        let loose = version(&store, 1, &config(0.5, true), &samples, &human).await;
        let strict = version(&store, 2, &config(0.75, false), &samples, &human).await;
        let told = diff(&store, &loose, &strict, 3).await.unwrap();
        assert_eq!((told.from.as_str(), told.to.as_str(), told.same), ("demo@1", "demo@2", false));
        assert_eq!((told.kept, told.rescored), (10, 0));
        assert_eq!((told.removed["web"].texts, told.removed["human"].texts, told.added["web"].texts), (10, 2, 0));
        assert_eq!(told.removed["web"].examples.len(), 3);
        let example = &told.removed["web"].examples[0];
        assert!(example.itm.unwrap() < 0.75 && example.text.starts_with("text ") && example.url.starts_with("http://a/"));
        let changed = |name: &str, before, after| SettingChange { name: name.into(), before: Some(before), after: Some(after) };
        assert_eq!(told.settings, [changed("human", json!(true), json!(false)), changed("min_itm", json!(0.5), json!(0.75))]);
        let back = diff(&store, &strict, &loose, 3).await.unwrap();
        assert_eq!((back.added, back.removed), (told.removed, told.added));
        let itself = diff(&store, &loose, &loose, 3).await.unwrap();
        assert_eq!((itself.same, itself.kept, itself.added["web"].texts), (true, 22, 0));
        assert!(itself.settings.is_empty());
    }
}

#[tokio::test]
async fn new_scores_and_models_are_told() {
    let (_folder, stores) = stores().await;
    let store = &stores[1];
    let config = BuildConfig::default();
    let before = version(store, 1, &config, &[sample(1, "a", 0.8), sample(2, "b", 0.9)], &[]).await;
    let mut after = version(store, 2, &config, &[sample(1, "a", 0.8), sample(2, "b", 0.7)], &[]).await;
    after.lineage.filter = Some(Digest::of(b"another"));
    let told = diff(store, &before, &after, 3).await.unwrap();
    assert_eq!((told.kept, told.rescored), (2, 1));
    assert_eq!(told.settings.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["filter"]);
    let empty = version(store, 3, &config, &[], &[]).await;
    let told = diff(store, &empty, &before, 1).await.unwrap();
    assert_eq!((told.added["web"].texts, told.added["web"].examples.len()), (2, 1));
    let mut gone = before.clone();
    gone.shards[0].digest = Digest::of(b"gone");
    assert!(diff(store, &before, &gone, 1).await.is_err());
}
