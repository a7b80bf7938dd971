#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};

use ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::*;
use crate::build::BuildConfig;
use crate::testing::{Annotated, Image, Sample, image, kept, sample, stores, version};

fn sql() -> SqlConfig {
    SqlConfig { memory_mib: 64, partitions: 2, spill_folder: None }
}

/// Twenty web images in one shard, one with two captions and a PNG, and one image of people with two captions.
async fn some_version(store: &Store) -> DatasetVersion {
    let mut samples: Vec<Sample> = (0..20).map(|n| sample(n, &format!("text \"{n}\"\nof web"), 0.75)).collect();
    let png = [&[0x89, b'P', b'N', b'G'][..], &[7; 40]].concat();
    samples[3].image = Some(Image { bytes: png, ..image(3) });
    samples[3].captions = vec!["a cat", "a dog"];
    (samples[3].itm, samples[3].itc) = (vec![0.7, 0.6], vec![0.1, 0.2]);
    samples[3].clip = Some((0.5, vec![0.25, 0.125]));
    let human = [Annotated { url: "people://1".into(), captions: vec!["one", "two"], image: image(900) }];
    version(store, 4, &BuildConfig { shard_rows: 10, ..BuildConfig::default() }, &samples, &human).await
}

/// The cosines of [`some_version`].
fn cosine_of(text: &str) -> Option<f64> {
    match text {
        "text \"3\"\nof web" => Some(0.5),
        "a cat" => Some(0.25),
        "a dog" => Some(0.125),
        _ => None,
    }
}

fn config(folder: &Path) -> ExportConfig {
    ExportConfig { folder: folder.join("out"), samples_per_file: 10, ..ExportConfig::default() }
}

async fn export_to(store: &Store, version: &DatasetVersion, config: &ExportConfig) -> Result<ExportSummary> {
    export(store, &sql(), version, config, |_| {}).await
}

/// Every file below a folder, by path.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                files.insert(path.strip_prefix(folder).unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap());
            }
        }
    }
    files
}

#[tokio::test]
async fn webdataset_and_parquet_and_blip_give_every_pair_back() {
    let (_folder, stores) = stores().await;
    let place = tempfile::tempdir().unwrap();
    let mut trees = Vec::new();
    for (n, store) in stores.iter().enumerate() {
        let version = some_version(store).await;
        let config = ExportConfig { folder: place.path().join(format!("out{n}")), ..config(place.path()) };
        let told = AtomicU64::new(0);
        let done = export(store, &sql(), &version, &config, |pairs| told.store(pairs, Ordering::Relaxed)).await.unwrap();
        assert!(!done.already_there);
        assert_eq!((done.manifest.pairs, done.manifest.images, told.into_inner()), (24, 21, 24));
        assert_eq!(done.manifest.counts, version.counts);
        let mut expected: Vec<_> = kept(store, &version.shards).await.into_iter().map(|r| (r.id, r.origin, r.text)).collect();
        expected.sort();
        let read = [webdataset_pairs(&config.folder), parquet_pairs(&config.folder)];
        for pairs in read {
            let mut texts: Vec<_> = pairs.iter().map(|p| (p.0.clone(), p.1.clone(), p.2.clone())).collect();
            texts.sort();
            assert_eq!(texts, expected);
            let cat = pairs.iter().find(|p| p.2 == "a cat").unwrap();
            assert!(cat.3.starts_with(&[0x89, b'P', b'N', b'G']));
            let web = pairs.iter().find(|p| p.2 == "text \"5\"\nof web").unwrap();
            assert_eq!(web.3, image(5).bytes, "the pixels are those of its own image");
        }
        blip_pairs(&config.folder, &expected);
        trees.push(tree(&config.folder));
    }
    assert_eq!(trees[0], trees[1], "the same version gives the same bytes from every store");
    let left: BTreeSet<_> = std::fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

type Read4 = (String, String, String, Vec<u8>);

fn webdataset_pairs(folder: &Path) -> Vec<Read4> {
    let mut pairs = Vec::new();
    let mut keys = BTreeSet::new();
    let mut files: Vec<_> = std::fs::read_dir(folder.join("webdataset")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 3, "24 pairs, 10 a file");
    for file in files {
        let mut tar = tar::Archive::new(std::fs::File::open(file).unwrap());
        let mut members = Vec::new();
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            members.push((name, bytes));
        }
        for sample in members.chunks(3) {
            let key = sample[0].0.split('.').next().unwrap();
            assert!(keys.insert(key.to_owned()), "{key} twice");
            assert_eq!(sample[1].0, format!("{key}.txt"));
            assert_eq!(sample[2].0, format!("{key}.json"));
            assert!(sample[0].0.ends_with(".jpg") || sample[0].0.ends_with(".png"));
            let about: Value = serde_json::from_slice(&sample[2].1).unwrap();
            let field = |name: &str| about[name].as_str().unwrap().to_owned();
            if field("origin") == "web" {
                assert_eq!(about["itm"], 0.75);
            }
            let text = String::from_utf8(sample[1].1.clone()).unwrap();
            assert_eq!(about["clip"].as_f64(), cosine_of(&text), "{text}");
            assert_eq!(about["width"], 100);
            pairs.push((
                field("sample_id"),
                field("origin"),
                String::from_utf8(sample[1].1.clone()).unwrap(),
                sample[0].1.clone(),
            ));
        }
    }
    pairs
}

fn parquet_pairs(folder: &Path) -> Vec<Read4> {
    let mut pairs = Vec::new();
    let mut files: Vec<_> = std::fs::read_dir(folder.join("parquet")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 3);
    for file in files {
        let open = || std::fs::File::open(&file).unwrap();
        let metadata = SerializedFileReader::new(open()).unwrap().metadata().file_metadata().clone();
        let entries = metadata.key_value_metadata().unwrap();
        let features = entries.iter().find(|kv| kv.key == "huggingface").unwrap().value.clone().unwrap();
        let features: Value = serde_json::from_str(&features).unwrap();
        assert_eq!(features["info"]["features"]["image"]["_type"], "Image");
        let reader = ParquetRecordBatchReaderBuilder::try_new(open()).unwrap();
        let in_schema: Value = serde_json::from_str(&reader.schema().metadata()["huggingface"]).unwrap();
        assert_eq!(in_schema, features, "pyarrow hands on the metadata of the Arrow schema");
        for batch in reader.build().unwrap() {
            let batch = batch.unwrap();
            let names: Vec<_> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
            let declared: BTreeSet<_> = features["info"]["features"].as_object().unwrap().keys().cloned().collect();
            assert_eq!(names.iter().cloned().collect::<BTreeSet<_>>(), declared);
            let image = batch.column(0).as_struct();
            let bytes = image.column_by_name("bytes").unwrap().as_binary::<i32>();
            let text = |name: &str, i| batch.column_by_name(name).unwrap().as_string::<i32>().value(i).to_owned();
            let clip = batch.column_by_name("clip").unwrap().as_primitive::<Float32Type>();
            for i in 0..batch.num_rows() {
                assert_eq!(clip.is_valid(i).then(|| f64::from(clip.value(i))), cosine_of(&text("text", i)));
                pairs.push((text("sample_id", i), text("origin", i), text("text", i), bytes.value(i).to_vec()));
            }
        }
    }
    pairs
}

fn blip_pairs(folder: &Path, expected: &[(String, String, String)]) {
    let list: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.join("blip.json")).unwrap()).unwrap();
    let mut captions: Vec<_> = list.iter().map(|e| e["caption"].as_str().unwrap()).collect();
    captions.sort_unstable();
    let mut wanted: Vec<_> = expected.iter().map(|e| e.2.as_str()).collect();
    wanted.sort_unstable();
    assert_eq!(captions, wanted);
    let paths: BTreeSet<_> = list.iter().map(|e| e["image"].as_str().unwrap()).collect();
    assert_eq!(paths.len(), 21, "an image is written once for all its texts");
    assert!(paths.iter().all(|p| std::fs::metadata(folder.join(p)).unwrap().len() > 0));
}

#[tokio::test]
async fn the_card_and_the_manifest_say_what_is_there() {
    let (_folder, stores) = stores().await;
    let place = tempfile::tempdir().unwrap();
    let version = some_version(&stores[1]).await;
    let config = config(place.path());
    let done = export_to(&stores[1], &version, &config).await.unwrap();
    let card = std::fs::read_to_string(config.folder.join("README.md")).unwrap();
    for part in [
        "---\npretty_name: \"demo v4\"\nlicense: unknown\n",
        "path: parquet/*.parquet",
        "n<1K",
        &version.digest.to_string(),
        "| human | 2 |",
        "0.5 or more",
        "| fetched | 20 |",
        "load_dataset(",
        "\"max_phash_distance\": 4",
    ] {
        assert!(card.contains(part), "no `{part}` in:\n{card}");
    }
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(config.folder.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest, done.manifest);
    for file in &manifest.files {
        assert_eq!(std::fs::metadata(config.folder.join(&file.path)).unwrap().len(), file.bytes);
    }
    let only = ExportConfig {
        folder: place.path().join("list"),
        formats: vec![Format::Blip, Format::Blip],
        blip_images: false,
        ..config
    };
    export_to(&stores[1], &version, &only).await.unwrap();
    let files: Vec<_> = tree(&only.folder).into_keys().collect();
    assert_eq!(files, ["README.md", "blip.json", "manifest.json"]);
    let list: Vec<Value> = serde_json::from_slice(&std::fs::read(only.folder.join("blip.json")).unwrap()).unwrap();
    assert!(list.iter().all(|e| e["url"].is_string() && e["image"].is_null()));
    assert!(!std::fs::read_to_string(only.folder.join("README.md")).unwrap().contains("parquet"));
}

#[tokio::test]
async fn a_complete_export_is_left_and_anything_else_is_in_the_way() {
    let (_folder, stores) = stores().await;
    let (store, place) = (&stores[0], tempfile::tempdir().unwrap());
    let version = some_version(store).await;
    let config = config(place.path());
    std::fs::create_dir(&config.folder).unwrap();
    export_to(store, &version, &config).await.unwrap();
    let before = tree(&config.folder);
    let card = config.folder.join("README.md");
    std::fs::write(&card, "mine").unwrap();
    assert!(export_to(store, &version, &config).await.unwrap().already_there);
    assert_eq!(std::fs::read(&card).unwrap(), b"mine", "nothing is written again");

    let other_layout = ExportConfig { samples_per_file: 5, ..config.clone() };
    let error = export_to(store, &version, &other_layout).await.unwrap_err().to_string();
    assert!(error.contains("--overwrite") && error.contains("layout"), "{error}");
    let smaller = crate::testing::version(store, 5, &BuildConfig::default(), &[sample(1, "a", 0.9)], &[]).await;
    let error = export_to(store, &smaller, &config).await.unwrap_err().to_string();
    assert!(error.contains("demo@4") && error.contains("--overwrite"), "{error}");
    let replace = ExportConfig { overwrite: true, ..config.clone() };
    assert_eq!(export_to(store, &smaller, &replace).await.unwrap().manifest.pairs, 1);
    assert!(!config.folder.join("webdataset/00001.tar").exists(), "nothing of the old export is left");
    assert_eq!(export_to(store, &version, &replace).await.unwrap().manifest.pairs, 24);
    assert_eq!(tree(&config.folder), before);

    std::fs::write(config.folder.join("webdataset/00000.tar"), "cut").unwrap();
    let error = export_to(store, &version, &config).await.unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
    export_to(store, &version, &replace).await.unwrap();
    assert_eq!(tree(&config.folder), before);

    std::fs::write(&card, "mine").unwrap();
    assert!(!export_to(store, &version, &replace).await.unwrap().already_there, "what is asked for is done");
    assert_eq!(tree(&config.folder), before);

    let home = ExportConfig { folder: place.path().to_owned(), overwrite: true, ..config.clone() };
    let error = export_to(store, &version, &home).await.unwrap_err().to_string();
    assert!(error.contains("other files"), "somebody's folder is never replaced: {error}");
    assert!(config.folder.exists());
}

#[tokio::test]
async fn a_killed_or_failed_export_leaves_no_torn_folder() {
    let (folder, stores) = stores().await;
    let (store, place) = (&stores[0], tempfile::tempdir().unwrap());
    let version = some_version(store).await;
    let config = config(place.path());
    // What a killed export leaves.
    let partial = place.path().join(".out.partial/webdataset");
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("99999.tar"), "torn").unwrap();
    std::fs::write(place.path().join(".out.partial/.lock"), "").unwrap();

    let shard = kept(store, &version.shards).await.into_iter().find(|r| r.origin == "web").unwrap().shard;
    let path = folder.path().join(format!("objects/samples/{shard}.parquet"));
    let sound = std::fs::read(&path).unwrap();
    let mut damaged = sound.clone();
    let at = damaged.windows(3).position(|w| w == [0xFF, 0xD8, 0xFF]).unwrap();
    damaged[at + 5] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let error = export_to(store, &version, &config).await.unwrap_err().to_string();
    assert!(error.contains("corrupt") && error.contains(&shard), "a bit of a pixel is noticed: {error}");
    assert!(!config.folder.exists() && !place.path().join(".out.partial").exists());

    std::fs::write(&path, sound).unwrap();
    let living = Staging::open(&config.folder).unwrap();
    let error = export_to(store, &version, &config).await.unwrap_err().to_string();
    assert!(error.contains("another export"), "{error}");
    drop(living);
    export_to(store, &version, &config).await.unwrap();
    assert!(!config.folder.join("webdataset/99999.tar").exists());
    assert!(!config.folder.join(".lock").exists());
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let (_folder, stores) = stores().await;
    let (store, place) = (&stores[1], tempfile::tempdir().unwrap());
    let mut version = some_version(store).await;
    let good = config(place.path());
    for (bad, name) in [
        (ExportConfig { formats: vec![], ..good.clone() }, "export.formats"),
        (ExportConfig { samples_per_file: 0, ..good.clone() }, "export.samples_per_file"),
        (ExportConfig { folder: "/".into(), ..good.clone() }, "export.folder"),
    ] {
        let error = export_to(store, &version, &bad).await.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(export_to(store, &version, &ExportConfig { folder: "/proc/no/such".into(), ..good.clone() }).await.is_err());
    version.shards.truncate(1);
    version.shards[0].digest = Digest::of(b"gone");
    assert!(export_to(store, &version, &good).await.is_err());
    version.shards.clear();
    let empty = export_to(store, &version, &good).await.unwrap();
    assert_eq!((empty.manifest.pairs, empty.manifest.files.len()), (0, 1));
    assert_eq!(std::fs::read(good.folder.join("blip.json")).unwrap(), b"[]\n");
}

#[test]
fn keys_are_safe_file_names() {
    assert_eq!(safe("00ff"), "00ff");
    for evil in ["../x", "a.b", "", "ü"] {
        assert_eq!(safe(evil).len(), 64);
    }
}
