//! What the program says about itself. Changes here are changes for its users.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

fn help(verbs: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_capfilt")).args(verbs).arg("--help").env("COLUMNS", "110").output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn help_texts() {
    let verbs: [&[&str]; 18] = [
        &[],
        &["run"],
        &["retry"],
        &["plan"],
        &["status"],
        &["caption"],
        &["score"],
        &["queries"],
        &["queries", "build"],
        &["queries", "stats"],
        &["dataset"],
        &["dataset", "export"],
        &["dataset", "diff"],
        &["dataset", "takedown"],
        &["model"],
        &["store"],
        &["store", "sweep"],
        &["download"],
    ];
    let page: Vec<String> = verbs.iter().map(|v| format!("$ capfilt {} --help\n{}", v.join(" "), help(v))).collect();
    insta::assert_snapshot!(page.join("\n"));
}
