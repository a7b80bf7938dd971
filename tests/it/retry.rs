//! Failed downloads again: what comes out is what a first success would have given.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::world::{World, digest};

/// Settings of all runs here: no second attempt within a download, no training.
const PLAIN: [&str; 3] = ["fetch.web.retries=0", "retrain.enabled=false", "run.rounds=1"];

/// The arguments of a verb over the store `name`.
fn over(verb: &[&str], name: &str) -> Vec<String> {
    let mut all: Vec<String> = verb.iter().map(|v| (*v).to_owned()).collect();
    let own = [format!("run.store={name}"), format!("worker.runtime.work_dir={name}-work")];
    all.extend(PLAIN.iter().map(|p| (*p).to_owned()).chain(own).flat_map(|s| ["--set".to_owned(), s]));
    all
}

fn json(world: &World, verb: &[&str], name: &str) -> Value {
    let arguments = over(verb, name);
    world.json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn samples(world: &World, name: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(world.path(name).join("objects/samples")).unwrap();
    files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
}

const RUN: [&str; 3] = ["run", "run.toml", "--json"];
const RETRY: [&str; 3] = ["retry", "run.toml", "--json"];

#[test]
fn after_a_retry_the_samples_are_those_of_an_undisturbed_run() {
    let world = World::new(24);
    let calm = json(&world, &RUN, "calm");
    world.outage(true);
    let disturbed = json(&world, &RUN, "store");
    assert_ne!(digest(&disturbed), digest(&calm));
    world.outage(false);
    assert_eq!(json(&world, &RUN, "store")["tasks_done"], 0, "a run by itself tries nothing again");

    let (code, said) = world.refuse(&["retry", "run.toml", "--status", "dns,sometimes"]);
    assert!(code == 2 && said.contains("`sometimes`") && said.contains("http_5xx"), "{said}");
    let (code, said) = world.refuse(&["retry", "run.toml", "--set", "run.store=fresh"]);
    assert!(code == 1 && said.contains("capfilt run run.toml"), "{said}");
    let asked = world.requests();
    let dry = json(&world, &["retry", "run.toml", "--json", "--dry-run"], "store");
    // Pictures 1, 5, … 21 were answered by 503, pictures 2, 6, … 22 by 429.
    assert_eq!((&dry["rows"], &dry["downloads"]["http_5xx"], &dry["downloads"]["http_429"]), (&12.into(), &6.into(), &6.into()));
    assert_eq!(world.requests(), asked);

    let some = json(&world, &["retry", "run.toml", "--json", "--status", "http_429"], "store");
    assert_eq!(
        (&some["retry"]["number"], &some["retry"]["rows"], some["tasks_given_up"].clone()),
        (&1.into(), &6.into(), 0.into())
    );
    assert_eq!((&some["retry"]["now"]["http_5xx"], &some["retry"]["now"]["http_429"]), (&6.into(), &Value::Null));
    assert_ne!(digest(&some), digest(&calm));
    let all = json(&world, &RETRY, "store");
    assert_eq!((&all["retry"]["number"], &all["retry"]["rows"]), (&2.into(), &6.into()));
    assert_eq!(digest(&all), digest(&calm));
    assert!(samples(&world, "store").is_superset(&samples(&world, "calm")));
    // robots.txt may be asked for once more by each program; of the pictures, only those that failed.
    assert!((12..=14).contains(&(world.requests() - asked)), "{} requests", world.requests() - asked);

    let again = json(&world, &RETRY, "store");
    assert_eq!((&again["retry"]["number"], &again["tasks_done"], digest(&again)), (&Value::Null, &0.into(), digest(&calm)));
    let arguments = over(&["retry", "run.toml"], "store");
    let said = world.capfilt(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).stdout;
    assert!(String::from_utf8_lossy(&said).contains("nothing to fetch again: none of"));
    // What can never be had stays as it is, however often it is asked for.
    let gone = json(&world, &["retry", "run.toml", "--json", "--status", "http_4xx,decode,not_image"], "store");
    assert!(gone["retry"]["rows"].as_u64() >= Some(1) && gone["retry"]["before"] == gone["retry"]["now"], "{}", gone["retry"]);
    assert_eq!(digest(&gone), digest(&calm));
    let check = world.json(&["store", "check", "--store", "store", "--json"]);
    assert_eq!(check["findings"].as_array().unwrap().len(), 0, "{check}");
}

#[test]
fn a_retry_that_is_killed_ends_in_the_same_dataset() {
    let world = World::new(24);
    let calm = json(&world, &RUN, "calm");
    world.outage(true);
    json(&world, &RUN, "store");
    world.outage(false);
    // Killed as soon as there is one more record of each kind that a retry makes.
    for folder in ["runs/test/retries", "commits/fetch", "commits/caption", "commits/score", "commits/build"] {
        let name = folder.replace('/', "-");
        assert!(Command::new("cp").arg("-r").args([world.path("store"), world.path(&name)]).status().unwrap().success());
        let records = || std::fs::read_dir(world.path(&name).join(folder)).map_or(0, Iterator::count);
        let before = records();
        let arguments = over(&RETRY, &name);
        let mut child = world
            .command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while records() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(records() > before, "the retry wrote nothing to {folder}");
        child.kill().unwrap();
        child.wait().unwrap();
        let end = json(&world, &RETRY, &name);
        assert_eq!((digest(&end), &end["tasks_given_up"]), (digest(&calm), &0.into()), "killed at {folder}");
        let retries = std::fs::read_dir(world.path(&name).join("runs/test/retries")).unwrap().count();
        assert_eq!(retries, 1, "an interrupted retry goes on, and is not asked for anew");
    }
}
