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

    // A run that got to its end is no longer one to kill: the next one begins in a new store.
    let settings = |n: usize| [format!("run.store=killed-{n}"), format!("worker.runtime.work_dir=killed-work-{n}")];
    let (mut stores, mut kills, mut runs) = (1, 0, 0);
    while kills < KILLS {
        let mut child = world.command(&["run", "run.toml"]);
        for setting in settings(stores) {
            child.args(["--set", &setting]);
        }
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Moments spread by the golden ratio over a stretch in which each run gets a little further.
        let share = f64::from(runs) * 0.618_034 % 1.0;
        runs += 1;
        std::thread::sleep(Duration::from_millis(150) + whole.mul_f64(share / 8.0));
        if let Some(ended) = child.try_wait().unwrap() {
            assert!(ended.success(), "{ended}");
            stores += 1;
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
    }
    for n in 1..=stores {
        let settings = settings(n);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        assert_eq!(digest(&world.run(&settings)), undisturbed);
        let store = format!("killed-{n}");
        let check = world.json(&["store", "check", "--store", &store, "--json"]);
        assert_eq!(check["findings"].as_array().unwrap().len(), 0, "{check}");
        let swept = world.json(&["store", "sweep", "--store", &store, "--grace-hours", "0", "--json"]);
        assert_eq!(swept["young"], 0);
        let check = world.json(&["store", "check", "--store", &store, "--json"]);
        assert_eq!((check["unreferenced"].as_u64(), check["findings"].as_array().unwrap().len()), (Some(0), 0));
        assert_eq!(world.run(&settings)["tasks_done"], 0);
    }
}
