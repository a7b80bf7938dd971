//! Exports, opened by the libraries that people use: pyarrow, Hugging Face `datasets`, `webdataset`.

use std::path::Path;
use std::process::Command;

use crate::world::World;

#[test]
fn python_libraries_find_every_sample() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = project.join(".venv/bin/python");
    assert!(python.exists(), "the Python environment is not there; run `scripts/setup.sh test`");
    let world = World::new(30);
    let run = world.run(&["retrain.enabled=false", "run.rounds=1"]);
    let counts = run["dataset"]["counts"].as_object().unwrap();
    let pairs: u64 = counts.values().map(|n| n.as_u64().unwrap()).sum();
    let summary = world.json(&["dataset", "export", "test", "--out", "copy", "--store", "store", "--json"]);
    assert!(summary.is_object());
    let check = Command::new(python)
        .arg(project.join("tests/check_exports.py"))
        .args([world.path("copy").display().to_string(), pairs.to_string()])
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}");
    // The same again is left alone; something else is refused.
    assert!(world.capfilt(&["dataset", "export", "test", "--out", "copy", "--store", "store"]).status.success());
    world.run(&["retrain.enabled=false", "run.rounds=1", "build.min_itm=0.99"]);
    let (_, said) = world.refuse(&["dataset", "export", "test", "--out", "copy", "--store", "store"]);
    assert!(said.contains("--overwrite"), "{said}");
    assert!(world.capfilt(&["dataset", "export", "test", "--out", "copy", "--overwrite", "--store", "store"]).status.success());
}
