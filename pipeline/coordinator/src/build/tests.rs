#![allow(clippy::unwrap_used, clippy::expect_used)]

use capfilt_schemas::{DatasetVersion, Table};
use capfilt_store::StoreError;
use proptest::prelude::*;

use super::*;
use crate::CoordinatorError;
use crate::balance::HardCap;
use crate::testing::{Annotated, Image, Kept, Sample, annotated, image, kept, sample, stores, triplet};

fn sql() -> SqlConfig {
    SqlConfig { memory_mib: 64, partitions: 2, spill_folder: None }
}

async fn memory() -> Store {
    Store::open("memory:").await.unwrap()
}

async fn run(
    store: &Store,
    config: &BuildConfig,
    samples: &[Sample],
    human: &[Annotated],
    heldout: &[Annotated],
) -> BuildOutcome {
    let inputs = BuildInputs {
        candidates: 90,
        selected: 80,
        triplets: vec![triplet(store, samples).await],
        cap: None,
        annotated: vec![annotated(store, human).await],
        heldout: vec![annotated(store, heldout).await],
        ..BuildInputs::default()
    };
    build(store, &sql(), config, inputs).await.unwrap()
}

#[tokio::test]
async fn what_no_model_has_judged_is_kept_whole() {
    let store = memory().await;
    let samples = [sample(1, "a", 0.1), sample(2, "b", 0.9)];
    let triplet = triplet(&store, &samples).await;
    let human = annotated(&store, &[people(3, &["three"])]).await;
    let inputs = BuildInputs { unjudged: vec![triplet.samples], annotated: vec![human], ..BuildInputs::default() };
    let done = build(&store, &sql(), &BuildConfig::default(), inputs).await.unwrap();
    let rows = kept(&store, &done.shards).await;
    assert_eq!((says(&rows, "web").len(), says(&rows, "synthetic").len(), says(&rows, "human")), (2, 0, vec!["three"]));
    assert!(rows.iter().all(|row| row.itm.is_none()));
    assert_eq!((step(&done, "texts judged"), step(&done, "kept web"), done.noise_ratio), (0, 2, None));
}

fn people(n: u64, captions: &[&'static str]) -> Annotated {
    Annotated { url: format!("people://{n}"), captions: captions.to_vec(), image: image(n) }
}

/// An image that looks like image `n` but for `bits` bits, and has other bytes.
fn lookalike(n: u64, bits: u32) -> Image {
    let mut other = image(n);
    other.original.push(bits as u8);
    other.phash = other.phash.map(|h| h ^ ((1 << bits) - 1));
    other
}

fn step(done: &BuildOutcome, name: &str) -> u64 {
    done.funnel.steps.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no step {name}")).1
}

fn says<'a>(rows: &'a [Kept], origin: &str) -> Vec<&'a str> {
    let mut texts: Vec<_> = rows.iter().filter(|r| r.origin == origin).map(|r| r.text.as_str()).collect();
    texts.sort_unstable();
    texts
}

#[tokio::test]
async fn the_itm_policy_judges_web_and_synthetic_texts_alike() {
    let (_folder, stores) = stores().await;
    for store in stores {
        let mut samples = vec![sample(1, "  a good text ", 0.5), sample(2, "a bad text", 0.4999)];
        samples[0].captions = vec!["a dog", "A DOG!", "a good text.", "noise", " "];
        (samples[0].itm, samples[0].itc) = (vec![0.9, 0.9, 0.9, 0.1, 0.9], vec![0.1; 5]);
        samples[1].captions = vec!["unscored"];
        samples.push(Sample { image: None, web: (None, None), ..sample(3, "no image", 0.9) });
        samples.push(Sample { web: (Some(f32::NAN), None), ..sample(4, "not a number", 0.9) });
        samples.push(sample(5, "   ", 0.9));
        let done = run(&store, &BuildConfig::default(), &samples, &[people(7, &["one", " two ", "one"])], &[]).await;
        let rows = kept(&store, &done.shards).await;
        assert_eq!(says(&rows, "web"), ["a good text"], "as found, but trimmed");
        assert_eq!(says(&rows, "synthetic"), ["a dog"], "what was said before is not said again");
        assert_eq!(says(&rows, "human"), ["one", "two"]);
        let web = rows.iter().find(|r| r.origin == "web").unwrap();
        assert_eq!((web.itm, web.url.as_str(), web.row), (Some(0.5), "http://a/1.jpg", 0));
        let human = rows.iter().find(|r| r.text == "two").unwrap();
        assert_eq!((human.itm, human.url.as_str()), (None, "people://7"));
        assert!(store.read_whole(Table::Annotated, &human.shard.parse().unwrap()).await.is_ok());
        assert!(rows.is_sorted_by_key(|r| (r.id.clone(), r.origin.clone(), r.text.clone())));
        assert_eq!(done.counts, StatusCounts::from([("web".into(), 1), ("synthetic".into(), 1), ("human".into(), 2)]));
        // Judged: two web texts, "a dog" and "noise"; the NaN and the caption without a score are not.
        assert_eq!(done.noise_ratio, Some(0.5));
        assert_eq!(done.facts["texts"]["web"], json!({"judged": 2, "kept": 1, "unjudged": 1, "noise_ratio": 0.5}));
        assert_eq!(done.facts["texts"]["synthetic"]["unjudged"], 1);
        assert_eq!(done.facts["fetch_status"], json!({"ok": 4, "http_4xx": 1}));
        assert_eq!(done.facts["itm_histogram"]["web"][10], 1);
        assert_eq!(done.facts["itm_histogram"]["web"][9], 1);
        assert_eq!(done.facts["itm_histogram"]["synthetic"][18], 1);
        let steps: Vec<_> = done.funnel.steps.iter().map(|(_, n)| *n).collect();
        assert_eq!(steps, [90, 80, 4, 4, 4, 4, 4, 4, 1, 1, 2]);
    }
}

#[tokio::test]
async fn the_rank_policy_keeps_the_best_of_web_and_synthetic() {
    let store = memory().await;
    let mut one = sample(1, "web", 0.1);
    one.web = (Some(0.1), Some(0.6));
    one.captions = vec!["first", "second", "third"];
    (one.itm, one.itc) = (vec![0.9, 0.8, 0.1], vec![0.6, 0.7, 0.6]);
    let rank = BuildConfig { policy: Policy::Rank, ..BuildConfig::default() };
    let texts = async |config: &BuildConfig| {
        let done = run(&store, config, std::slice::from_ref(&one), &[], &[]).await;
        let rows = kept(&store, &done.shards).await;
        (says(&rows, "web").len(), says(&rows, "synthetic").join(" "), done.noise_ratio)
    };
    assert_eq!(texts(&rank).await, (1, "second".into(), Some(0.5)), "of equal scores the web text wins");
    assert_eq!(texts(&BuildConfig { keep: 3, ..rank.clone() }).await, (1, "first second".into(), Some(0.25)));
    assert_eq!(texts(&BuildConfig { rank_by: Score::Itm, ..rank.clone() }).await, (0, "first second".into(), Some(0.5)));
    assert_eq!(texts(&BuildConfig { keep: 9, ..rank }).await.2, Some(0.0));
}

#[tokio::test]
async fn the_rank_policy_ranks_by_clip_where_there_is_one() {
    let store = memory().await;
    let mut scored = sample(1, "web", 0.1);
    (scored.captions, scored.itm, scored.itc) = (vec!["first", "second"], vec![0.9, 0.8], vec![0.9, 0.8]);
    scored.clip = Some((0.2, vec![0.1, 0.3]));
    let mut unscored = sample(2, "no cosine", 0.9);
    (unscored.captions, unscored.itm, unscored.itc) = (vec!["of this"], vec![0.9], vec![0.9]);
    let rank = BuildConfig { policy: Policy::Rank, rank_by: Score::Clip, ..BuildConfig::default() };
    let done = run(&store, &rank, &[scored.clone(), unscored.clone()], &[people(7, &["one"])], &[]).await;
    let mut rows = kept(&store, &done.shards).await;
    rows.sort_by(|a, b| a.text.cmp(&b.text));
    let said: Vec<_> = rows.iter().map(|row| (row.text.as_str(), row.clip)).collect();
    assert_eq!(said, [("one", None), ("second", Some(0.3)), ("web", Some(0.2))]);
    assert_eq!(done.facts["texts"]["web"]["unjudged"], 1, "what has no cosine is not judged");

    // Other policies carry the cosines on, and a dataset without any is stored as it was before there were some.
    let done = run(&store, &BuildConfig::default(), &[scored.clone()], &[], &[]).await;
    assert!(kept(&store, &done.shards).await.iter().all(|row| row.clip.is_some()));
    let plain = run(&store, &BuildConfig::default(), &[Sample { clip: None, ..scored }, unscored], &[], &[]).await;
    assert!(kept(&store, &plain.shards).await.iter().all(|row| row.clip.is_none()));
}

#[tokio::test]
async fn duplicates_leave_one_image() {
    let store = memory().await;
    let again = |text: &str, image: Image| Sample { image: Some(image), url: format!("http://b/{text}"), ..sample(0, text, 0.9) };
    let samples = [
        sample(1, "first", 0.9),
        again("same bytes", image(1)),
        again("near", lookalike(1, 4)),
        again("far", lookalike(1, 5)),
        sample(2, "other", 0.9),
    ];
    let ids = |texts: &[&str]| {
        let of = |t: &&str| samples.iter().find(|s| s.text == *t).map(|s| capfilt_schemas::sample_id(&s.url, &s.text)).unwrap();
        texts.iter().map(of).min().unwrap()
    };
    let done = run(&store, &BuildConfig::default(), &samples, &[], &[]).await;
    let rows = kept(&store, &done.shards).await;
    assert_eq!((step(&done, "fetched"), step(&done, "unique (exact)")), (5, 4));
    assert!(rows.iter().any(|r| r.text == "other"));
    // "near" and "far" differ in one bit, so whichever of the family comes first takes those around it along.
    let first = ids(&["first", "same bytes", "near", "far"]);
    assert!(rows.iter().any(|r| r.id == first), "the smallest sample id stays");
    assert_eq!(done.facts["duplicates"]["exact"], 1);
    assert_eq!(step(&done, "unique (perceptual)"), rows.len() as u64);

    let equal = BuildConfig { max_phash_distance: 0, ..BuildConfig::default() };
    assert_eq!(kept(&store, &run(&store, &equal, &samples, &[], &[]).await.shards).await.len(), 4);
    let exact = BuildConfig { perceptual: false, ..BuildConfig::default() };
    let done = run(&store, &exact, &samples, &[], &[]).await;
    assert_eq!(kept(&store, &done.shards).await.len(), 4);
    let both = kept(&store, &done.shards).await.into_iter().find(|r| r.text == "first" || r.text == "same bytes").unwrap();
    assert_eq!(both.id, ids(&["first", "same bytes"]));
}

#[tokio::test]
async fn people_win_over_the_web_and_are_never_scored_away() {
    let store = memory().await;
    let samples = [
        sample(1, "the annotated image", 0.99),
        Sample { image: Some(lookalike(2, 3)), ..sample(2, "looks like an annotated image", 0.99) },
        sample(3, "new", 0.99),
    ];
    let human = [people(1, &["a"]), people(2, &["b"]), Annotated { url: "people://copy".into(), ..people(1, &["c"]) }];
    let done = run(&store, &BuildConfig::default(), &samples, &human, &[]).await;
    let rows = kept(&store, &done.shards).await;
    assert_eq!(says(&rows, "human"), ["a", "b", "c"], "two people may annotate one image");
    assert_eq!(says(&rows, "web"), ["new"]);
    let without = run(&store, &BuildConfig { human: false, ..BuildConfig::default() }, &samples, &human, &[]).await;
    let rows = kept(&store, &without.shards).await;
    assert_eq!((says(&rows, "human").len(), says(&rows, "web").len()), (0, 3));
}

#[tokio::test]
async fn an_image_that_two_sets_have_counts_once() {
    let store = memory().await;
    let human = [people(1, &["a"]), people(2, &["b"])];
    let inputs = BuildInputs {
        annotated: vec![annotated(&store, &human).await, annotated(&store, &human[1..]).await],
        ..BuildInputs::default()
    };
    let done = build(&store, &sql(), &BuildConfig::default(), inputs).await.unwrap();
    assert_eq!(says(&kept(&store, &done.shards).await, "human"), ["a", "b"]);
}

#[tokio::test]
async fn a_held_out_image_does_not_stand_in_the_way_of_what_looks_like_it() {
    let store = memory().await;
    // 4 bits from the held-out image, and as many again from it: only the second may stay.
    let near = |bits: u32, n: u64| Sample { image: Some(lookalike(1, bits)), ..sample(n, "looks alike", 0.99) };
    let samples = [near(4, 2), near(8, 3)];
    let done = run(&store, &BuildConfig::default(), &samples, &[], &[people(1, &["x"])]).await;
    assert_eq!(kept(&store, &done.shards).await.len(), 1);
}

#[tokio::test]
async fn heldout_images_never_get_in() {
    let store = memory().await;
    let samples = [
        sample(1, "the very image", 0.99),
        Sample { image: Some(lookalike(2, 4)), ..sample(2, "looks like one", 0.99) },
        sample(3, "new", 0.99),
    ];
    let heldout = [people(1, &["x"]), people(2, &["y"]), people(4, &["z"])];
    for config in [BuildConfig::default(), BuildConfig { perceptual: false, ..BuildConfig::default() }] {
        let human = [people(4, &["annotated and held out"]), people(5, &["fine"])];
        let done = run(&store, &config, &samples, &human, &heldout).await;
        let rows = kept(&store, &done.shards).await;
        assert_eq!(rows.iter().map(|r| r.text.as_str()).filter(|t| *t != "new" && *t != "fine").count(), 0, "{rows:?}");
        assert_eq!(rows.len(), 2);
        assert_eq!((step(&done, "unique (perceptual)"), step(&done, "not held out")), (3, 1));
        assert_eq!(done.facts["human"]["held_out"], 1);
    }
}

#[tokio::test]
async fn small_images_are_left_out_but_not_those_of_people() {
    let store = memory().await;
    let small = |n, size| Sample { image: Some(Image { size, ..image(n) }), ..sample(n, &format!("{size:?}"), 0.9) };
    let samples = [small(1, (64, 64)), small(2, (63, 64)), small(3, (64, 63)), small(4, (500, 64))];
    let config = BuildConfig { min_width: 64, min_height: 64, ..BuildConfig::default() };
    let human = [Annotated { image: Image { size: (8, 8), ..image(5) }, ..people(5, &["tiny"]) }];
    let done = run(&store, &config, &samples, &human, &[]).await;
    assert_eq!((step(&done, "fetched"), step(&done, "large enough")), (4, 2));
    let rows = kept(&store, &done.shards).await;
    assert_eq!((says(&rows, "web"), says(&rows, "human")), (vec!["(500, 64)", "(64, 64)"], vec!["tiny"]));
}

fn some_samples() -> impl Strategy<Value = Vec<Sample>> {
    const WORDS: &[&str] = &["a cat", "A cat!", "a dog", "", "two dogs", "sky"];
    let word = proptest::sample::select(WORDS);
    let captions = proptest::collection::vec((word.clone(), 0..=20_u8, 0..=20_u8), 0..4);
    let one = (0_u64..30, 0_u32..7, word, 0..=20_u8, captions, 0_u8..10);
    let one = one.prop_map(|(n, bits, text, itm, captions, fate)| {
        let score = |s: u8| f32::from(s) / 20.0;
        Sample {
            image: (fate > 0).then(|| if bits == 0 { image(n) } else { lookalike(n, bits) }),
            captions: captions.iter().map(|c| c.0).collect(),
            itm: captions.iter().map(|c| score(c.1)).collect(),
            itc: captions.iter().map(|c| score(c.2)).collect(),
            url: format!("http://a/{n}-{bits}.jpg"),
            ..sample(n, text, score(itm))
        }
    });
    proptest::collection::vec(one, 0..50).prop_map(|mut all| {
        all.sort_by_key(|s| (s.url.clone(), s.text.clone()));
        all.dedup_by_key(|s| (s.url.clone(), s.text.clone()));
        all
    })
}

/// The rules of the module, one image after the other.
fn naive(config: &BuildConfig, samples: &[Sample]) -> Vec<(String, String, String)> {
    let mut images: Vec<_> =
        samples.iter().filter_map(|s| Some((capfilt_schemas::sample_id(&s.url, &s.text), s, s.image.as_ref()?))).collect();
    images.sort_by_key(|(id, _, _)| id.clone());
    let mut stay: Vec<&Image> = Vec::new();
    let mut rows = Vec::new();
    for (id, s, image) in images {
        let near = |a: &Image| (a.phash.unwrap() ^ image.phash.unwrap()).count_ones() <= config.max_phash_distance;
        if stay.iter().any(|a| a.original == image.original || config.perceptual && near(a)) {
            continue;
        }
        stay.push(image);
        let mut said = std::collections::HashSet::new();
        let mut texts = vec![("web", s.text.trim(), s.web.0, s.web.1)];
        texts.extend((0..s.captions.len()).map(|i| ("synthetic", s.captions[i].trim(), Some(s.itm[i]), Some(s.itc[i]))));
        texts.retain(|t| !t.1.is_empty() && said.insert(normalise(t.1)));
        match config.policy {
            Policy::Itm => texts.retain(|t| t.2.unwrap() >= config.min_itm as f32),
            Policy::Itc => texts.retain(|t| t.3.unwrap() >= config.min_itc as f32),
            Policy::Rank => {
                let score =
                    |t: &(&str, &str, Option<f32>, Option<f32>)| if config.rank_by == Score::Itc { t.3 } else { t.2 }.unwrap();
                texts.sort_by(|a, b| score(b).total_cmp(&score(a)));
                texts.truncate(usize::try_from(config.keep).unwrap());
            }
        }
        rows.extend(texts.into_iter().map(|t| (id.clone(), t.0.to_owned(), t.1.to_owned())));
    }
    rows.sort();
    rows
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn builds_what_the_rules_say_in_whatever_order_the_shards_come(
        samples in some_samples(),
        policy in proptest::sample::select(vec![Policy::Itm, Policy::Itc, Policy::Rank]),
        by_itm in any::<bool>(),
        keep in 1_u64..4,
        min_itm in 0.0_f64..=1.0,
        perceptual in any::<bool>(),
        cut in 0_usize..50,
    ) {
        let config = BuildConfig {
            policy,
            rank_by: if by_itm { Score::Itm } else { Score::Itc },
            keep,
            min_itm,
            min_itc: min_itm,
            perceptual,
            shard_rows: 11,
            ..BuildConfig::default()
        };
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = memory().await;
            let (a, b) = samples.split_at(cut.min(samples.len()));
            let mut triplets = vec![triplet(&store, a).await, triplet(&store, b).await];
            let inputs = |triplets: &Vec<Triplet>| BuildInputs { triplets: triplets.clone(), ..BuildInputs::default() };
            let done = build(&store, &sql(), &config, inputs(&triplets)).await.unwrap();
            let rows: Vec<_> = kept(&store, &done.shards).await.into_iter().map(|r| (r.id, r.origin, r.text)).collect();
            prop_assert_eq!(&rows, &naive(&config, &samples));
            prop_assert_eq!(done.counts.values().sum::<u64>(), rows.len() as u64);
            triplets.reverse();
            triplets.push(triplets[0]);
            let alone = SqlConfig { partitions: 1, ..sql() };
            prop_assert_eq!(build(&store, &alone, &config, inputs(&triplets)).await.unwrap(), done);
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn a_dataset_is_cut_into_shards_and_is_the_same_on_every_store() {
    let (_folder, stores) = stores().await;
    let samples: Vec<_> = (0..700).map(|n| sample(n, &format!("text {n}"), 0.9)).collect();
    let config = BuildConfig { shard_rows: 300, ..BuildConfig::default() };
    let mut digests = Vec::new();
    for store in &stores {
        let done = run(store, &config, &samples, &[people(1000, &["h"])], &[]).await;
        assert_eq!(done.shards.iter().map(|s| s.rows).collect::<Vec<_>>(), [300, 300, 101]);
        digests.push(DatasetVersion::digest_of(&done.shards));
    }
    assert_eq!(digests[0], digests[1]);
    let none = build(&stores[0], &sql(), &config, BuildInputs::default()).await.unwrap();
    assert_eq!((none.shards.len(), none.noise_ratio, none.counts["web"]), (0, None, 0));
}

#[tokio::test]
async fn shards_that_do_not_answer_each_other_are_named() {
    let store = memory().await;
    let (a, b) = ([sample(1, "a", 0.9), sample(2, "b", 0.9)], [sample(2, "b", 0.9), sample(1, "a", 0.9)]);
    let (one, other) = (triplet(&store, &a).await, triplet(&store, &b).await);
    let short = triplet(&store, &a[..1]).await;
    let mut miscounted = sample(3, "c", 0.9);
    (miscounted.captions, miscounted.itm, miscounted.itc) = (vec!["x", "y"], vec![0.5], vec![0.5]);
    let miscounted = triplet(&store, &[miscounted]).await;
    for (wrong, culprit, problem) in [
        (Triplet { scores: other.scores, ..one }, other.scores, "does not answer"),
        (Triplet { captions: short.captions, ..one }, short.captions, "ends at row 1"),
        (miscounted, miscounted.scores, "1 scores for the 2 captions"),
    ] {
        let inputs = BuildInputs { triplets: vec![wrong], ..BuildInputs::default() };
        let error = build(&store, &sql(), &BuildConfig::default(), inputs).await.unwrap_err();
        assert!(matches!(&error, CoordinatorError::Rows { shard, .. } if *shard == culprit), "{error}");
        assert!(error.to_string().contains(problem) && !error.is_retryable(), "{error}");
    }
}

#[tokio::test]
async fn damaged_and_missing_shards_are_named() {
    let (folder, stores) = stores().await;
    let store = &stores[0];
    let samples: Vec<_> = (0..20).map(|n| sample(n, &format!("text {n}"), 0.9)).collect();
    let one = triplet(store, &samples).await;
    let path = |table: &str, digest: Digest| folder.path().join(format!("objects/{table}/{digest}.parquet"));
    let attempt = async |t: Triplet| {
        let inputs = BuildInputs { triplets: vec![t], ..BuildInputs::default() };
        build(store, &sql(), &BuildConfig::default(), inputs).await
    };
    let (scores, whole) = (path("scores", one.scores), path("samples", one.samples));
    let (scored, sampled) = (std::fs::read(&scores).unwrap(), std::fs::read(&whole).unwrap());
    let mut flipped = scored.clone();
    flipped[scored.len() / 3] ^= 4;
    std::fs::write(&scores, &flipped).unwrap();
    let error = attempt(one).await.unwrap_err();
    assert!(
        matches!(&error, CoordinatorError::Store(StoreError::Corrupt { path, .. }) if path.contains(&one.scores.to_string()))
    );
    std::fs::write(&scores, &scored).unwrap();
    std::fs::write(&whole, &sampled[..sampled.len() - 50]).unwrap();
    let error = attempt(one).await.unwrap_err();
    assert!(error.to_string().contains(&one.samples.to_string()), "{error}");
    std::fs::write(&whole, &sampled).unwrap();
    let gone = Triplet { captions: Digest::of(b"gone"), ..one };
    let error = attempt(gone).await.unwrap_err();
    assert!(matches!(&error, CoordinatorError::Store(StoreError::Missing { path }) if path.contains(&gone.captions.to_string())));
    let gone = Triplet { samples: Digest::of(b"gone"), ..one };
    assert!(matches!(attempt(gone).await.unwrap_err(), CoordinatorError::Store(StoreError::Missing { .. })));
    assert_eq!(attempt(one).await.unwrap().counts["web"], 20);
}

#[tokio::test]
async fn bad_settings_are_named() {
    let store = memory().await;
    let default = BuildConfig::default;
    for (config, name) in [
        (BuildConfig { min_itm: 1.5, ..default() }, "build.min_itm"),
        (BuildConfig { min_itm: f64::NAN, ..default() }, "build.min_itm"),
        (BuildConfig { min_itc: f64::INFINITY, ..default() }, "build.min_itc"),
        (BuildConfig { keep: 0, ..default() }, "build.keep"),
        (BuildConfig { max_phash_distance: 9, ..default() }, "build.max_phash_distance"),
        (BuildConfig { shard_rows: 0, ..default() }, "build.shard_rows"),
    ] {
        let error = build(&store, &sql(), &config, BuildInputs::default()).await.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(serde_json::from_value::<BuildConfig>(json!({"min_clip": 0.5})).is_err());
    let back: BuildConfig = serde_json::from_value(serde_json::to_value(default()).unwrap()).unwrap();
    assert_eq!(back, default());
}

#[test]
fn texts_that_say_the_same_are_equal_when_normalised() {
    for same in ["A dog.", "a  dog", "\"A Dog\"!", " a-dog "] {
        assert_eq!(normalise(same), "a dog");
    }
    assert_ne!(normalise("two dogs"), normalise("a dog"));
    assert_eq!(normalise(" ★★ "), "★★");
    assert_ne!(normalise("★"), normalise("☆"));
    assert_eq!(normalise("ÉTÉ 2023"), "été 2023");
}

/// Rows whose queries are their own: `selected_for` of row i is `takers(i)`.
async fn wanted(store: &Store, samples: &[Sample], takers: impl Fn(usize) -> Vec<u32>) -> Triplet {
    let mut made = triplet(store, samples).await;
    made.samples = crate::testing::selected_for(store, &made.samples, takers).await;
    made
}

#[tokio::test]
async fn a_surplus_makes_up_for_lost_downloads_and_never_breaks_the_cap() {
    let store = memory().await;
    let ids = |samples: &[Sample]| samples.iter().map(|s| capfilt_schemas::sample_id(&s.url, &s.text)).collect::<Vec<_>>();
    // Query 1 was given 60 pairs for 30, query 2 took 10 of the same and may take 30.
    for lost_every in [100, 3, 2] {
        let mut samples: Vec<_> = (0..60).map(|n| sample(n, &format!("text {n}"), 0.9)).collect();
        for s in samples.iter_mut().skip(1).step_by(lost_every) {
            *s = Sample { image: None, web: (None, None), ..s.clone() };
        }
        let takers = |i: usize| if i.is_multiple_of(6) { vec![1, 2] } else { vec![1] };
        let (left, right) = samples.split_at(25);
        let whole = BuildInputs {
            triplets: vec![wanted(&store, left, takers).await, wanted(&store, right, |i| takers(i + 25)).await],
            cap: Some(HardCap { per_query: 30, seed: 4 }),
            ..BuildInputs::default()
        };
        let done = build(&store, &sql(), &BuildConfig::default(), whole).await.unwrap();
        let draws = crate::draw::Draws::new(4);
        let arrived: Vec<(usize, String)> =
            ids(&samples).into_iter().enumerate().filter(|(i, _)| samples[*i].image.is_some()).collect();
        let mut first: Vec<_> =
            arrived.iter().map(|(_, id)| (draws.place(1, crate::draw::parse_id(id).unwrap()), id.clone())).collect();
        first.sort();
        let mut expected: std::collections::BTreeSet<_> = first.into_iter().take(30).map(|(_, id)| id).collect();
        expected.extend(arrived.iter().filter(|(i, _)| takers(*i).contains(&2)).map(|(_, id)| id.clone()));
        let got: std::collections::BTreeSet<_> = kept(&store, &done.shards).await.into_iter().map(|k| k.id).collect();
        assert_eq!(got, expected, "lost every {lost_every}");
        assert_eq!(step(&done, "within per_query"), expected.len() as u64);
    }
}
