//! What is taken down is in no new version and no export, and after a sweep in no file of the store.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use arrow::array::{Array, AsArray};
use capfilt_schemas::{DatasetVersion, Digest, Table, column};
use capfilt_store::Store;
use image::ImageFormat;
use serde_json::Value;

use crate::world::{World, encode, picture};

const PLAIN: [&str; 2] = ["retrain.enabled=false", "run.rounds=1"];

fn block<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// The images of the store by address, as they are stored.
fn images(world: &World, name: &str) -> BTreeMap<String, Vec<u8>> {
    block(async {
        let store = Store::open(world.path(name).to_str().unwrap()).await.unwrap();
        let mut images = BTreeMap::new();
        for (digest, _) in store.shards(Table::Samples).await.unwrap() {
            let rows = store.read_whole(Table::Samples, &digest).await.unwrap();
            let url = rows.column_by_name(column::URL).unwrap().as_string::<i32>();
            let image = rows.column_by_name(column::IMAGE).unwrap().as_binary::<i32>();
            let there = (0..rows.num_rows()).filter(|i| image.is_valid(*i));
            images.extend(there.map(|i| (url.value(i).to_owned(), image.value(i).to_vec())));
        }
        images
    })
}

/// The (address, text, origin) of every pair of a version.
fn pairs(world: &World, version: u64) -> Vec<(String, String, String)> {
    block(async {
        let store = Store::open(world.path("store").to_str().unwrap()).await.unwrap();
        let version: DatasetVersion = store.dataset_version("test", Some(version)).await.unwrap();
        let mut pairs = Vec::new();
        for shard in &version.shards {
            let rows = store.read_whole(Table::Dataset, &shard.digest).await.unwrap();
            let of = |name: &str, i: usize| rows.column_by_name(name).unwrap().as_string::<i32>().value(i).to_owned();
            pairs.extend((0..rows.num_rows()).map(|i| (of(column::URL, i), of(column::TEXT, i), of(column::ORIGIN, i))));
        }
        pairs
    })
}

/// Whether some file below `folder` holds `bytes`.
fn holds(folder: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, bytes);
        }
        let found = std::fs::read(&path).unwrap();
        found.windows(bytes.len()).any(|w| w == bytes)
    })
}

fn check(world: &World, store: &str) -> Value {
    let check = world.json(&["store", "check", "--store", store, "--json"]);
    assert_eq!(check["findings"].as_array().unwrap().len(), 0, "{check}");
    check
}

/// A store with one version of 24 pictures, of which four are taken down: 1 by its address, 0 and its copy, and 2 by its bytes. Tells their
/// addresses and stored bytes.
fn taken_down() -> (World, Vec<(String, Vec<u8>)>) {
    let world = World::new(24);
    world.run(&PLAIN);
    let at = |name: &str| format!("{}/img/{name}.png", world.site);
    let stored = images(&world, "store");
    let gone: Vec<(String, Vec<u8>)> =
        ["0", "copy-0", "1", "2"].iter().map(|name| (at(name), stored[&at(name)].clone())).collect();
    let down = ["dataset", "takedown", "--store", "store", "--json"];
    let with = |more: &[&str]| world.json(&[&down[..], more].concat());

    let dry = with(&["--url", &at("0"), "--copies", "--dry-run"]);
    assert_eq!((&dry["reach"]["samples"]["rows"], &dry["dry_run"]), (&2.into(), &true.into()), "{dry}");
    assert!(!world.path("store/takedowns").exists());
    let first = with(&["--url", &at("0"), "--copies", "--reason", "asked by mail"]);
    assert_eq!(
        (&first["takedown"]["number"], &first["new"], first["takedown"]["sha256"].as_array().unwrap().len()),
        (&1.into(), &true.into(), 1)
    );
    let again = with(&["--url", &at("0"), "--copies"]);
    assert_eq!((&again["takedown"]["number"], &again["new"]), (&1.into(), &false.into()));
    let bytes = Digest::of(&encode(&picture(2, 0).0, ImageFormat::Png));
    std::fs::write(world.path("list.txt"), format!("# by post\n{}\n\n{bytes}\nno-such-host.test\n", at("1"))).unwrap();
    let listed = with(&["--file", "list.txt"]);
    assert_eq!((&listed["takedown"]["number"], &listed["reach"]["samples"]["rows"]), (&2.into(), &2.into()), "{listed}");
    let all = with(&["--list"]);
    assert_eq!(all.as_array().unwrap().len(), 2);
    (world, gone)
}

#[test]
fn new_versions_exports_and_after_a_sweep_the_store_are_without_them() {
    let (world, gone) = taken_down();
    let is_gone = |url: &String| gone.iter().any(|(g, _)| g == url);
    for (url, bytes) in &gone {
        assert!(holds(&world.path("store/objects"), bytes), "{url}");
    }
    let before = pairs(&world, 1);
    let left = before.iter().filter(|p| is_gone(&p.0)).count();
    assert!(left > 0, "the first version has some of them");
    let shown = world.json(&["dataset", "show", "test@1", "--store", "store", "--json"]);
    assert_eq!(shown["left_out"], left);

    // Exports, of an old version as well.
    let export =
        |out: &str| world.json(&["dataset", "export", "test@1", "--out", out, "--store", "store", "--json"])["manifest"].clone();
    let early = export("early");
    assert_eq!((early["left_out"].as_u64(), early["pairs"].as_u64()), (Some(left as u64), Some((before.len() - left) as u64)));
    for (url, bytes) in &gone {
        assert!(!holds(&world.path("early/blip.json").parent().unwrap().join("images"), bytes), "{url}");
        assert!(!holds(&world.path("early/webdataset"), bytes), "{url}");
    }

    // The next run builds, and does nothing else.
    let asked = world.requests();
    let second = world.run(&PLAIN);
    assert_eq!((&second["tasks_done"], &second["dataset"]["takedowns"]), (&1.into(), &2.into()));
    assert_eq!(world.requests(), asked);
    let rest: Vec<_> = before.into_iter().filter(|p| !is_gone(&p.0)).collect();
    assert_eq!(pairs(&world, 2), rest, "all other pairs are as they were");
    let diff = world.json(&["dataset", "diff", "test@1", "test@2", "--store", "store", "--json"]);
    assert_eq!((&diff["taken_down"], &diff["kept"]), (&left.into(), &rest.len().into()), "{diff}");
    check(&world, "store");

    // What an external trainer was given lies in the work folder.
    std::fs::create_dir_all(world.path("work/external/task")).unwrap();
    std::fs::rename(world.path("early"), world.path("work/external/task/export")).unwrap();
    let manifest = world.path("work/external/task/export/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap().replace(&format!("\"left_out\": {left}"), "\"left_out\": 0");
    std::fs::write(&manifest, text).unwrap();

    let sweep = ["store", "sweep", "--store", "run.toml", "--grace-hours", "0", "--json"];
    let dry = world.json(&[&sweep[..], &["--dry-run"]].concat());
    assert_eq!(dry["redacted"]["tables"]["samples"]["rows"], 4, "{dry}");
    assert!(holds(&world.path("store/objects"), &gone[0].1) && manifest.exists());
    let swept = world.json(&sweep);
    assert_eq!(swept["redacted"]["tables"], dry["redacted"]["tables"]);
    assert_eq!((&swept["redacted"]["tables"]["captions"]["rows"], &swept["work_dir_exports"]), (&4.into(), &1.into()), "{swept}");
    assert!(swept["redacted"]["bytes"].as_u64() > Some(gone.iter().map(|g| g.1.len() as u64).sum()));
    for (url, bytes) in &gone {
        assert!(!holds(&world.path("store/objects"), bytes) && !holds(&world.path("work"), bytes), "{url}");
    }
    assert!(images(&world, "store").keys().all(|url| !is_gone(url)));
    assert_eq!(check(&world, "store")["unreferenced"], 0);
    assert_eq!(world.json(&sweep)["redacted"]["tables"], serde_json::json!({}), "once is enough");

    // Old versions can be read and exported still, and the run is as done as it was.
    assert_eq!((pairs(&world, 1), pairs(&world, 2)), (rest.clone(), rest));
    let late = export("late");
    assert_eq!((&late["left_out"], &late["pairs"], &late["files"]), (&early["left_out"], &early["pairs"], &early["files"]));
    let third = world.run(&PLAIN);
    assert_eq!((&third["tasks_done"], &third["dataset"]["digest"]), (&0.into(), &second["dataset"]["digest"]));
    // Another threshold, other captions: all that is left can still be worked with.
    let other = world.run(&[&PLAIN[..], &["build.min_itm=0.01", "caption.seed=7"]].concat());
    assert_eq!(other["tasks_given_up"], 0);
    // Another state of the web: they are found again, and not fetched.
    let fresh = world.run(&[&PLAIN[..], &["run.snapshot=second"]].concat());
    assert_eq!(fresh["tasks_given_up"], 0);
    let status =
        world.json(&["status", "run.toml", "--json", "--set", PLAIN[0], "--set", PLAIN[1], "--set", "run.snapshot=second"]);
    assert_eq!(status["downloads"]["taken_down"], 4, "{}", status["downloads"]);
    for (url, bytes) in &gone {
        assert!(!holds(&world.path("store/objects"), bytes), "{url}");
    }
}

#[test]
fn a_sweep_that_is_killed_is_finished_by_the_next() {
    let (world, gone) = taken_down();
    let copy = |from: &Path, to: &Path| {
        let status = std::process::Command::new("cp").arg("-r").args([from, to]).status().unwrap();
        assert!(status.success());
    };
    for moment in 0..8_u64 {
        let name = format!("copy-{moment}");
        copy(&world.path("store"), &world.path(&name));
        let mut child = world
            .command(&["store", "sweep", "--store", &name, "--grace-hours", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + 15 * moment));
        child.kill().unwrap();
        child.wait().unwrap();
        check(&world, &name);
        world.json(&["store", "sweep", "--store", &name, "--grace-hours", "0", "--json"]);
        assert_eq!(check(&world, &name)["unreferenced"], 0);
        for (url, bytes) in &gone {
            assert!(!holds(&world.path(&name).join("objects"), bytes), "{url} after a kill at moment {moment}");
        }
    }
}

#[test]
fn what_cannot_be_taken_down_is_refused_by_name() {
    let world = World::new(5);
    std::fs::create_dir(world.path("store")).unwrap();
    std::fs::write(world.path("store/store.json"), r#"{"format": 1}"#).unwrap();
    std::fs::write(world.path("list.txt"), "example.org\nhttp://example.org/x\nnot a host\n").unwrap();
    let down = ["dataset", "takedown", "--store", "store"];
    for (more, needle) in [
        (&[][..], "--url"),
        (&["--url", "example.org/x.jpg"], "`example.org/x.jpg`"),
        (&["--host", "com"], "`com`"),
        (&["--sha256", "abc"], "`abc`"),
        (&["--file", "list.txt"], "line 3"),
        (&["--file", "gone.txt"], "gone.txt"),
    ] {
        let (code, said) = world.refuse(&[&down[..], more].concat());
        assert!(code == 2 && said.contains(needle), "{needle}: {code} {said}");
    }
    assert!(!world.path("store/takedowns").exists());
}
