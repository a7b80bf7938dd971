//! The study of bootstrapping (`scripts/study.py`), at a size at which it shows that it works and nothing else.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::world::{World, program};

#[test]
fn the_study_trains_every_arm_and_goes_on_where_it_stopped() {
    let world = World::new(20);
    world.begin_cold();
    world.write_truth("truth.jsonl", 20);
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let study = || {
        // As in configs/study.toml: what starts from a model has no use for it.
        let words = format!("train.med.word_weights={root}/tests/checkpoints/filter");
        let changes = ["score.itc=standardized", "build.policy=itc", "build.min_itc=0.0", &words];
        let ran = Command::new(format!("{root}/.venv/bin/python"))
            .arg(format!("{root}/scripts/study.py"))
            .arg("--capfilt")
            .arg(program())
            .args(["run.toml", "--out", "study", "--seeds", "2", "--jobs", "2", "--no-plot"])
            .args(["--truth", "truth.jsonl", "--queries", "queries.txt"])
            .args(changes.iter().flat_map(|change| ["--set", change]))
            .current_dir(world.folder.path())
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        serde_json::from_slice::<Value>(&std::fs::read(world.path("study/study.json")).unwrap()).unwrap()
    };
    let first = study();
    assert_eq!(first["runs"].as_array().unwrap().len(), 10);
    let auroc = |arm: &str| first["arms"][arm]["filter/auroc"]["mean"].as_f64().unwrap();
    for arm in ["web", "filter", "captioner", "both", "shared"] {
        assert!(auroc(arm) > 0.0 && auroc(arm) < 1.0, "{first}");
        assert!(first["arms"][arm]["captioner/cider_d"]["gain"]["ci95"].is_f64(), "{first}");
    }
    // Every arm has its own texts, and every seed its own models.
    let commits = std::fs::read_dir(world.path("store/commits/train")).unwrap();
    let commits = commits.map(|entry| serde_json::from_slice::<Value>(&std::fs::read(entry.unwrap().path()).unwrap()).unwrap());
    // The seeds of the arms are 1 and 2, that of all others 0.
    let of_arms = |commit: &Value| commit["task"]["params"]["role"] == "captioner" && commit["task"]["params"]["seed"] != 0;
    let models: BTreeSet<String> = commits.filter(of_arms).map(|commit| commit["outputs"][0]["digest"].to_string()).collect();
    assert_eq!(models.len(), 10);
    // A third of the texts are of other pictures.
    for filter in ["filter_on_known_noise", "shared_filter_on_known_noise", "second_filter_on_known_noise"] {
        let found = &first[filter];
        assert!(found["judged"].as_u64() > Some(10) && found["wrong"].as_u64() > Some(3), "{filter}: {found}");
        assert!(found["auroc_itc"]["mismatch"].is_f64() && found["right_kept"].is_f64(), "{filter}: {found}");
    }
    let page = std::fs::read_to_string(world.path("study/README.md")).unwrap();
    assert!(page.contains("| shared |") && page.contains("127.8") && page.contains("| AUROC | overall | mismatch |"), "{page}");

    let commits = |stage: &str| std::fs::read_dir(world.path(&format!("store/commits/{stage}"))).unwrap().count();
    let trained = commits("train");
    assert_eq!(study(), first);
    assert_eq!(commits("train"), trained);
}
