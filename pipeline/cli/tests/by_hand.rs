//! `capfilt caption` and `capfilt score` on image files and the checkpoints of the demo.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn checkpoint(role: &str) -> String {
    root().join("tests/checkpoints").join(role).display().to_string()
}

fn image(name: &str) -> PathBuf {
    root().join("workers/crawler/fuzz/seeds/image").join(name)
}

fn capfilt(args: &[&str], images: &[&Path], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capfilt"));
    command.args(args).args(images).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    String::from_utf8(output.stdout.clone()).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_same_image_has_the_same_captions_wherever_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("another name.JPG");
    std::fs::copy(image("rgb.jpg"), &copy).unwrap();
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let args = ["caption", "--model", &checkpoint("captioner"), "--captions", "2", "--seed", "5", "--json"];
    let both = capfilt(&args, &[&image("rgb.jpg"), &image("grey.png")], "");
    assert!(both.status.success(), "{both:?}");
    let moved = capfilt(&args, &[folder.path()], "");
    let (both, moved) = (lines(&both), lines(&moved));
    assert_eq!((both.len(), moved.len()), (2, 1), "a folder stands for its images");
    assert_eq!(both[0]["captions"], moved[0]["captions"]);
    assert_ne!(both[0]["captions"], both[1]["captions"]);
    let captions = both[0]["captions"].as_array().unwrap();
    assert!(captions.len() == 2 && captions.iter().all(|c| c["ids"].as_array().unwrap().len() >= 5 && c["score"].is_null()));
    let other = lines(&capfilt(&[&args[..6], &["6", "--json"]].concat(), &[&image("rgb.jpg")], ""));
    assert_ne!(both[0]["captions"], other[0]["captions"], "another seed");
}

#[test]
fn a_bad_image_is_told_of_and_the_others_are_done() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.png");
    std::fs::write(&broken, b"\x89PNG, or so it says").unwrap();
    let gone = folder.path().join("gone.jpg");
    let model = checkpoint("captioner");
    let args = ["caption", "--model", &model, "--strategy", "beam", "--num-beams", "2", "--length-penalty", "-0.5"];
    let out = capfilt(&args, &[&broken, &image("rgb.jpg"), &gone], "");
    assert_eq!(out.status.code(), Some(1));
    let (said, complained) = (String::from_utf8(out.stdout.clone()).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(said.lines().count() == 1 && said.contains("rgb.jpg\t"), "{said}");
    assert!(complained.contains("broken.png") && complained.contains("gone.jpg"), "{complained}");
    let out = capfilt(&[&args[..], &["--json"]].concat(), &[&broken, &image("rgb.jpg")], "");
    assert_eq!(out.status.code(), Some(1));
    let lines = lines(&out);
    assert!(lines.iter().any(|line| line["error"].is_string()));
    assert!(lines.iter().any(|line| line["captions"][0]["score"].as_f64().is_some_and(|score| score < 0.0)));
}

#[test]
fn a_setting_of_another_strategy_is_refused() {
    for setting in [["--top-p", "0.5"], ["--top-k", "3"], ["--temperature", "2"]] {
        let args = ["caption", "--model", &checkpoint("captioner"), "--strategy", "greedy", setting[0], setting[1]];
        let out = capfilt(&args, &[&image("rgb.jpg")], "");
        assert_eq!(out.status.code(), Some(2), "{setting:?}");
        assert!(String::from_utf8(out.stderr).unwrap().contains(setting[0]), "{setting:?}");
    }
}

#[test]
fn scores_that_are_no_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint("filter")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let mut weights = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
    weights[header..].fill(0xff);
    std::fs::write(&path, weights).unwrap();
    let args = ["score", "--json", "--text", "a dog", "--model", folder.path().to_str().unwrap()];
    let out = capfilt(&args, &[&image("rgb.jpg")], "");
    assert_eq!((out.status.code(), out.stdout.len()), (Some(1), 0));
    assert!(String::from_utf8(out.stderr).unwrap().contains("not a number"));
}

#[test]
fn texts_are_scored_from_arguments_and_from_a_list() {
    let model = checkpoint("filter");
    let args = ["score", "--model", &model, "--text", "a picture of a dog", "--texts", "-"];
    let json = capfilt(&[&args[..], &["--json"]].concat(), &[&image("rgb.jpg"), &image("grey.png")], "a cat\n\n two birds \n");
    assert!(json.status.success(), "{json:?}");
    let answers = lines(&json);
    assert_eq!(answers.len(), 2);
    for answer in &answers {
        let texts = answer["texts"].as_array().unwrap();
        let said: Vec<_> = texts.iter().map(|text| text["text"].as_str().unwrap()).collect();
        assert_eq!(said, ["a picture of a dog", "a cat", "two birds"]);
        for text in texts {
            assert!(text["itm_logits"].as_array().unwrap().len() == 2 && text["itc"].is_f64() && text.get("clip").is_none());
            assert!((0.0..=1.0).contains(&text["itm"].as_f64().unwrap()));
        }
    }
    let cls = capfilt(&[&args[..], &["--json", "--first-token", "cls"]].concat(), &[&image("rgb.jpg")], "");
    let (enc, cls) = (&answers[0]["texts"][0], &lines(&cls)[0]["texts"][0]);
    assert_eq!(enc["itc"], cls["itc"]);
    assert_ne!(enc["itm"], cls["itm"]);
    let table = String::from_utf8(capfilt(&args, &[&image("rgb.jpg")], "a cat\n").stdout).unwrap();
    let head: Vec<&str> = table.lines().next().unwrap().split_whitespace().take(2).collect();
    assert!(head == ["ITM", "ITC"] && table.lines().count() == 3 && table.contains("a picture of a dog"), "{table}");
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let refused = |args: &[&str], reason: &str, code: i32| {
        let out = capfilt(args, &[&image("rgb.jpg")], "");
        let complained = String::from_utf8(out.stderr).unwrap();
        assert!(complained.contains(reason) && out.status.code() == Some(code), "{args:?}: {complained} {:?}", out.status);
    };
    let (captioner, filter) = (checkpoint("captioner"), checkpoint("filter"));
    refused(&["caption", "--model", &filter], "text_decoder", 1);
    refused(&["score", "--model", &captioner, "--text", "a dog"], "text_encoder", 1);
    refused(&["caption", "--model", "no/such/folder"], "neither a folder nor a name of the hub", 2);
    refused(&["caption", "--model", &captioner, "--num-beams", "3"], "strategy", 2);
    refused(&["caption", "--model", &captioner, "--temperature", "0"], "greedy", 2);
    refused(&["caption", "--model", &captioner, "--device", "tpu"], "device `tpu`", 2);
    refused(&["caption", "--model", &captioner, "--temperature", "-1"], "temperature", 2);
    refused(&["score", "--model", &filter], "no text", 2);
    refused(&["score", "--model", &filter, "--model", &filter, "--text", "a dog"], "one of each kind", 1);
}

#[test]
fn a_device_that_is_not_there_is_told_of() {
    let (model, config) = (checkpoint("captioner"), root().join("configs/demo.toml").display().to_string());
    let refused = |args: &[&str], images: &[&Path], code: i32| {
        let out = capfilt(args, images, "");
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{said}");
        said
    };
    for verb in ["run", "retry", "plan"] {
        let said = refused(&[verb, &config, "--device", "gpu"], &[], 2);
        assert!(said.contains("`gpu`") && said.contains("cuda:N"), "{said}");
    }
    if !cfg!(feature = "cuda") {
        let by_hand = refused(&["caption", "--model", &model, "--device", "cuda"], &[&image("rgb.jpg")], 2);
        for said in [by_hand, refused(&["run", &config, "--device", "cuda:1"], &[], 2)] {
            assert!(said.contains("`cuda") && said.contains("--features cuda"), "{said}");
        }
    }
}
