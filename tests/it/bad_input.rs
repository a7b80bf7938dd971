//! Bad input gets the error it deserves, and nothing committed is touched.

use std::path::{Path, PathBuf};

use crate::world::World;

fn copy_checkpoint(world: &World, role: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints").join(role);
    let to = world.path(&format!("broken-{role}"));
    std::fs::create_dir_all(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to
}

#[test]
fn a_config_is_read_strictly() {
    let world = World::new(5);
    let config = std::fs::read_to_string(world.path("run.toml")).unwrap();
    for (wrong, right, needle) in [
        ("min_itmm = 0.02", "min_itm = 0.02", "min_itmm"),
        ("[bild]\nmin_itm", "[build]\nmin_itm", "bild"),
        ("rounds = -1", "rounds = 2", "rounds"),
        ("rounds = \"two\"", "rounds = 2", "line"),
        ("name = \"../up\"", "name = \"test\"", "cannot name a run"),
        ("kind = \"gopher\"", "kind = \"pages\"", "gopher"),
        ("[train.judge]\nsteps", "[train.filter]\nsteps", "judge"),
    ] {
        assert!(config.contains(right));
        std::fs::write(world.path("bad.toml"), config.replacen(right, wrong, 1)).unwrap();
        let (code, said) = world.refuse(&["run", "bad.toml"]);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(needle) && said.contains("bad.toml"), "{needle}: {said}");
    }
    let (code, said) = world.refuse(&["run", "no-such.toml"]);
    assert!(code == 2 && said.contains("no-such.toml"), "{said}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "build.nonsense=1"]);
    assert!(code == 2 && said.contains("nonsense"), "{said}");
}

#[test]
fn missing_files_and_unreachable_stores_are_named() {
    let world = World::new(5);
    for (set, code, needle) in [
        ("queries.path=gone.txt", 2, "gone.txt"),
        ("annotated.sources.0.annotations=gone.json", 2, "gone.json"),
        ("models.captioner=gone", 1, "gone"),
        ("models.captioner=promoted", 2, "promoted"),
        ("run.store=/proc/not/there", 3, "/proc/not/there"),
        ("run.store=gopher://x/y", 3, "gopher"),
    ] {
        let (found, said) = world.refuse(&["run", "run.toml", "--set", set]);
        assert!(found == code && said.contains(needle), "{set}: {found} {said}");
    }
    assert_eq!(world.requests(), 0);
    let (code, said) = world.refuse(&["store", "check", "--store", "mistyped"]);
    assert!(code == 2 && said.contains("mistyped") && !world.path("mistyped").exists(), "{said}");
    for verb in ["status", "queries stats"] {
        let line: Vec<&str> = verb.split(' ').chain(["run.toml", "--set", "run.store=mistyped"]).collect();
        let (code, said) = world.refuse(&line);
        assert!(
            code == 2 && said.contains("there is no store at") && said.contains("mistyped") && !world.path("mistyped").exists(),
            "{verb}: {said}"
        );
    }
    assert!(world.capfilt(&["plan", "run.toml", "--set", "run.store=later"]).status.success());
    assert!(!world.path("later").exists());
}

#[test]
fn doctor_sees_what_a_run_would_stumble_over() {
    let world = World::new(5);
    std::fs::write(world.path("list.csv"), "link,text\nhttp://a.test/1.png,red\n").unwrap();
    std::fs::write(world.path("opt-outs.txt"), "a.test\nnot a host\n").unwrap();
    let search =
        r#"discover.sources.0={kind="search", adapter={name="mine", url="http://a.test/?q={query}", per_page=1, items="/r",
        image=["/u"], texts={title="/t"}, rate=1.0, key={env="CAPFILT_NO_SUCH_KEY", parameter="k"}}}"#
            .replace('\n', "");
    for (set, needle) in [
        ("queries.path=gone.txt", "gone.txt"),
        (r#"discover.sources.0={kind="list", path="list.csv"}"#, "source 1: cannot use"),
        (r#"discover.sources.0={kind="list", path="list.csv", url_col="link"}"#, "no column `caption`"),
        (&search, "CAPFILT_NO_SUCH_KEY is not set"),
        (r#"fetch.web.opt_out_lists=["opt-outs.txt"]"#, "opt-outs.txt"),
    ] {
        let output = world.capfilt(&["doctor", "run.toml", "--set", set]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.code() == Some(2) && said.contains("BAD") && said.contains(needle), "{set}: {said}");
    }
    std::fs::write(world.path("opt-outs.txt"), "a.test\n").unwrap();
    let output = world.capfilt(&["doctor", "run.toml", "--set", r#"fetch.web.opt_out_lists=["opt-outs.txt"]"#]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 entries in [fetch.web]"), "{said}");
}

#[test]
fn a_checkpoint_with_wrong_tensors_is_refused_by_name() {
    let world = World::new(5);
    let folder = copy_checkpoint(&world, "filter");
    let file = folder.join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let length = usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
    let header = text(&whole[8..8 + length]);
    let set = format!("models.filter={}", folder.display());
    let refused = |header: &str, needle: &str| {
        assert_eq!(header.len(), length, "the header keeps its length");
        let mut bytes = whole.clone();
        bytes[8..8 + length].copy_from_slice(header.as_bytes());
        std::fs::write(&file, bytes).unwrap();
        let (_, said) = world.refuse(&["run", "run.toml", "--set", &set]);
        assert!(said.contains(needle), "{needle}: {said}");
    };
    refused(&header.replacen("itm_head.bias", "itm_head.bais", 1), "itm_head.bias");
    refused(&header.replacen("itm_head.bias", "itm_head.bais", 1), "itm_head.bais");
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let (_, said) = world.refuse(&["run", "run.toml", "--set", &set]);
    assert!(said.contains("model.safetensors"), "{said}");
    assert!(!world.path("store/commits").exists());
}

#[test]
fn a_corrupt_shard_stops_only_what_needs_it() {
    let world = World::new(20);
    let plain = ["retrain.enabled=false", "run.rounds=1"];
    let before = world.run(&plain);
    let samples = world.path("store/objects/samples");
    let shard = std::fs::read_dir(&samples).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&shard, &bytes).unwrap();
    let name = shard.file_stem().unwrap().to_string_lossy().into_owned();
    let check = world.capfilt(&["store", "check", "--store", "store"]);
    assert_eq!(check.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&check.stderr).contains(&name));
    // Other captions need the images: the tasks of that shard are given up, the rest goes on.
    let out = world.capfilt(&[
        "run",
        "run.toml",
        "--json",
        "--set",
        plain[0],
        "--set",
        plain[1],
        "--set",
        "caption.seed=9",
        "--set",
        "worker.runtime.max_attempts=1",
    ]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains(&name) && said.contains("corrupt"), "{said}");
    // Mended, the same run comes to its end, and what was committed before is as it was.
    bytes[middle] ^= 0xff;
    std::fs::write(&shard, &bytes).unwrap();
    let again = world.json(&[
        "run",
        "run.toml",
        "--json",
        "--retry-failed",
        "--set",
        plain[0],
        "--set",
        plain[1],
        "--set",
        "caption.seed=9",
    ]);
    assert_eq!(again["tasks_given_up"], 0);
    assert_eq!(crate::world::digest(&world.run(&plain)), crate::world::digest(&before));
}
