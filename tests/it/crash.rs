//! The walk of a crash: SIGKILL at many moments, and the same dataset in the end.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::world::{World, digest};

const KILLS: u32 = 20;

#[test]
fn killed_at_twenty_moments_the_run_ends_in_the_same_dataset() {
    let world = World::new(40);
    let began = Instant::now();
    let undisturbed = digest(&world.run(&[]));
    let whole = began.elapsed();

    let store = ["--set", "run.store=killed", "--set", "worker.runtime.work_dir=killed-work"];
    let mut early = 0;
    for i in 0..KILLS {
        let arguments: Vec<&str> = ["run", "run.toml"].into_iter().chain(store).collect();
        let mut child = world.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Moments spread by the golden ratio over a stretch in which each run gets a little further.
        let share = f64::from(i) * 0.618_034 % 1.0;
        std::thread::sleep(Duration::from_millis(150) + whole.mul_f64(share / 4.0));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            early += 1;
        }
        child.wait().unwrap();
    }
    assert!(early >= KILLS / 2, "only {early} of {KILLS} runs were killed before their end");
    let run = world.run(&["run.store=killed", "worker.runtime.work_dir=killed-work"]);
    assert_eq!(digest(&run), undisturbed);
    let check = world.json(&["store", "check", "--store", "killed", "--json"]);
    assert_eq!(check["findings"].as_array().unwrap().len(), 0, "{check}");
    let swept = world.json(&["store", "sweep", "--store", "killed", "--grace-hours", "0", "--json"]);
    assert_eq!(swept["young"], 0);
    let check = world.json(&["store", "check", "--store", "killed", "--json"]);
    assert_eq!((check["unreferenced"].as_u64(), check["findings"].as_array().unwrap().len()), (Some(0), 0));
    assert_eq!(world.run(&["run.store=killed", "worker.runtime.work_dir=killed-work"])["tasks_done"], 0);
}
