//! The plan of the house is a test: who may import whom.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Every crate of the house with the crates of the house that it may import, directly.
const EDGES: &[(&str, &[&str])] = &[
    ("capfilt-schemas", &[]),
    ("capfilt-store", &["capfilt-schemas"]),
    ("capfilt-runtime", &["capfilt-schemas", "capfilt-store"]),
    ("capfilt-models", &[]),
    ("capfilt-crawler", &["capfilt-schemas", "capfilt-store", "capfilt-runtime"]),
    ("capfilt-vision", &["capfilt-schemas", "capfilt-store", "capfilt-runtime", "capfilt-models"]),
    ("capfilt-trainer", &["capfilt-schemas", "capfilt-store", "capfilt-runtime", "capfilt-models"]),
    ("capfilt-coordinator", &["capfilt-schemas", "capfilt-store"]),
    (
        "capfilt",
        &[
            "capfilt-schemas",
            "capfilt-store",
            "capfilt-runtime",
            "capfilt-crawler",
            "capfilt-vision",
            "capfilt-trainer",
            "capfilt-coordinator",
        ],
    ),
];

/// Libraries that only some crates may import.
const OWNED: &[(&str, &[&str])] = &[
    ("datafusion", &["capfilt-coordinator"]),
    ("candle-core", &["capfilt-models"]),
    ("candle-nn", &["capfilt-models"]),
    ("tokenizers", &["capfilt-models"]),
    ("reqwest", &["capfilt-crawler"]),
    ("clap", &["capfilt"]),
    ("hf-hub", &["capfilt"]),
    ("ureq", &["capfilt"]),
    ("anyhow", &["capfilt"]),
    ("async-nats", &["capfilt-runtime"]),
];

/// Libraries that a crate must do without.
const NEVER: &[(&str, &[&str])] = &[
    ("capfilt-schemas", &["tokio", "futures", "object_store", "parquet", "async-trait"]),
    ("capfilt-models", &["tokio", "futures", "arrow", "parquet", "object_store"]),
];

/// Every package of the workspace with what it depends on, tests aside.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let arguments = ["metadata", "--no-deps", "--format-version", "1", "--manifest-path", manifest];
    let output = std::process::Command::new(env!("CARGO")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let normal = |package: &Value| list(&package["dependencies"]).iter().filter(|d| d["kind"] != "dev").map(name).collect();
    list(&metadata["packages"]).iter().map(|package| (name(package), normal(package))).collect()
}

#[test]
fn crates_import_only_what_the_plan_allows() {
    let imports = imports();
    let known: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).chain(["capfilt-tests"]).collect();
    let found: BTreeSet<&str> = imports.keys().map(String::as_str).collect();
    assert_eq!(found, known, "a crate came or went; say in EDGES and in ARCHITECTURE.md what it may import");
    for (name, allowed) in EDGES {
        for import in imports[*name].iter().filter(|i| known.contains(i.as_str())) {
            assert!(allowed.contains(&import.as_str()), "{name} must not import {import}");
        }
    }
}

#[test]
fn libraries_stay_in_their_rooms() {
    let imports = imports();
    for (library, owners) in OWNED {
        for (name, libraries) in &imports {
            let allowed = owners.contains(&name.as_str()) || name == "capfilt-tests";
            assert!(allowed || !libraries.contains(*library), "{name} must not import {library}: it belongs to {owners:?}");
        }
    }
    for (name, libraries) in NEVER {
        for library in *libraries {
            assert!(!imports[*name].contains(*library), "{name} must do without {library}");
        }
    }
}

#[test]
fn the_table_of_architecture_md_is_this_one() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md")).unwrap();
    for (name, allowed) in EDGES {
        let allowed: Vec<&str> = allowed.iter().map(|a| a.trim_start_matches("capfilt-")).collect();
        let row = format!("| `{name}` | {} |", if allowed.is_empty() { "–".to_owned() } else { allowed.join(", ") });
        assert!(text.contains(&row), "ARCHITECTURE.md lacks the row {row}");
    }
}
