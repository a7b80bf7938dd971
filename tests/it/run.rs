//! The main job, end to end, with the real program.

use serde_json::Value;

use crate::world::{World, digest};

fn rows(run: &Value, stage: &str) -> u64 {
    run["progress"][stage]["rows_done"].as_u64().unwrap_or(0)
}

#[test]
fn the_whole_loop_and_then_nothing_again() {
    let world = World::new(40);
    let first = world.run(&[]);
    assert_eq!(first["complete"], true);
    assert_eq!(first["tasks_given_up"], 0);
    let (candidates, selected) = (rows(&first, "discover"), rows(&first, "balance"));
    // 40 pictures, 6 copies, and the two that cannot be had.
    assert_eq!((candidates, selected), (48, 48), "{}", first["progress"]);
    let counts = &first["dataset"]["counts"];
    assert!(counts["web"].as_u64() > Some(0) && counts["synthetic"].as_u64() > Some(0), "{counts}");
    assert_eq!(counts["human"], 30);
    let results = first["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for metric in ["captioner/cider_d", "captioner/bleu_4", "filter/auroc", "filter/tr_at_1", "filter/ir_at_10"] {
        assert!(results[0]["metrics"][metric].is_f64(), "{metric}: {}", results[0]);
        assert!(results[0]["challenger_metrics"][metric].is_f64(), "{metric}");
    }
    assert_eq!(results[0]["promoted"].as_array().unwrap().len(), 2);
    let page = std::fs::read_to_string(world.path("report.html")).unwrap();
    assert!(page.contains("a red square") && page.len() > 10_000);

    let asked = world.requests();
    let second = world.run(&[]);
    assert_eq!(second["tasks_done"], 0);
    assert_eq!(digest(&second), digest(&first));
    assert_eq!(world.requests(), asked, "the second run asks the site for nothing");
    let out = world.capfilt(&["run", "run.toml"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("nothing to do"));

    let check = world.json(&["store", "check", "--store", "store", "--json"]);
    assert_eq!(check["findings"].as_array().unwrap().len(), 0);
    let plan = world.json(&["plan", "run.toml", "--json"]);
    assert_eq!(plan["complete"], true);
    let status = world.json(&["status", "run.toml", "--json"]);
    assert_eq!(status["rounds"].as_array().unwrap().len(), 2);
    assert!(!status["events"].as_array().unwrap().is_empty());

    for from in ["run.toml", "store"] {
        let stats = world.json(&["queries", "stats", from, "--json", "--plot", "plot.svg"]);
        assert_eq!((&stats["before"]["texts"], &stats["after"]["texts"]), (&Value::from(48), &Value::from(48)), "{stats}");
        assert!(stats["share_matched"].as_f64().unwrap() > 0.0);
        // A picture's text says its colour and its shape.
        assert_eq!(stats["before"]["entries_per_text"], 2.0, "{stats}");
        assert_eq!(stats["top"][0]["text"].is_string(), from == "run.toml", "a store does not know the names");
        assert!(std::fs::read_to_string(world.path("plot.svg")).unwrap().contains("<polyline"));
    }
    let shown = world.capfilt(&["queries", "stats", "run.toml"]);
    assert!(shown.status.success() && String::from_utf8_lossy(&shown.stdout).contains("entries per text"));
    let (code, _) = world.refuse(&["queries", "stats", "store", "--run", "other"]);
    assert_eq!(code, 2);
}

#[test]
fn without_rounds_it_gathers_and_needs_no_models() {
    let world = World::new(20);
    let gather = |models: &str| {
        let config = format!(
            "[run]\nname = 'gather'\nstore = 'gathered'\nsnapshot = '1'\nrounds = 0\n[queries]\npath = 'queries.txt'\n\
             [[discover.sources]]\nkind = 'pages'\nseeds = ['{}/']\n{models}\n[report]\npath = 'gathered.html'\n[worker.runtime]\n\
             work_dir = 'gathering'\n[worker.crawler]\nrequests_per_second = 10000.0\nallow_networks = ['127.0.0.0/8']\n",
            world.site
        );
        std::fs::write(world.path("gather.toml"), config).unwrap();
    };
    gather("");
    let run = world.json(&["run", "gather.toml", "--json"]);
    assert_eq!((&run["complete"], &run["dataset"], rows(&run, "caption")), (&Value::from(true), &Value::Null, 0));
    assert_eq!(rows(&run, "fetch"), rows(&run, "balance"));
    assert!(rows(&run, "fetch") > 20);
    assert_eq!(world.json(&["run", "gather.toml", "--json"])["tasks_done"], 0);
    let status = world.capfilt(&["status", "gather.toml"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("run gather: complete"), "{status:?}");
    let (code, said) = world.refuse(&["run", "gather.toml", "--set", "run.rounds=1"]);
    assert!(code == 2 && said.contains("[models]") && said.contains("run.rounds = 0"), "{said}");

    // A list that fits nothing ends in words, not in an empty version.
    std::fs::write(world.path("queries.txt"), "zebra\n").unwrap();
    let (code, said) = world.refuse(&["run", "gather.toml", "--set", "run.store=nothing"]);
    assert!(code != 0 && said.contains("cannot go on"), "{said}");
    let status = world.capfilt(&["status", "gather.toml", "--set", "run.store=nothing"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("cannot go on"), "{status:?}");

    // What of an archive could not be read is said.
    let record = |html: &str| {
        let block = format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n{html}");
        let length = block.len();
        format!(
            "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {}/\r\nContent-Type: application/http\r\nContent-Length: {length}\r\n\r\n{block}\r\n\r\n",
            world.site
        )
    };
    std::fs::write(world.path("queries.txt"), "red\n").unwrap();
    let whole = record("<img src='/img/0.png' alt='a red square'>") + &record("<img src='/img/1.png' alt='a red circle'>");
    std::fs::write(world.path("cut.warc"), &whole[..whole.len() - 30]).unwrap();
    gather("[[discover.sources]]\nkind = 'archive'\npaths = ['cut.warc']");
    let out = world.capfilt(&["run", "gather.toml", "--set", "run.name=cut"]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stderr).contains("1 records of archives were cut"), "{out:?}");
}

#[test]
fn a_cold_start_pretrains_a_med_and_makes_its_first_models_of_it() {
    let world = World::new(20);
    world.begin_cold();
    // Its words begin as those of another model, by which the store knows it.
    let words = format!("train.med.word_weights={}/checkpoints/filter", env!("CARGO_MANIFEST_DIR"));
    let one = ["run.rounds=1", "build.min_itm=0.0", &words];
    let run = world.run(&one);
    assert_eq!((&run["complete"], &run["tasks_given_up"]), (&Value::from(true), &Value::from(0)));
    let versions = world.json(&["dataset", "list", "--store", "store", "--json"]);
    let rounds: Vec<_> = versions.as_array().unwrap().iter().map(|v| (v["round"].clone(), v["counts"].clone())).collect();
    assert_eq!((&rounds[0].0, &rounds[1].0, rounds.len()), (&Value::from(0), &Value::from(1), 2), "{versions}");
    assert!(rounds[0].1["web"].as_u64() > Some(0) && rounds[0].1["human"] == 30 && rounds[0].1["synthetic"] == 0, "{versions}");
    assert!(rounds[1].1["synthetic"].as_u64() > Some(0), "{versions}");
    let status = world.json(&["status", "run.toml", "--json"]);
    assert_ne!(status["rounds"][0]["captioner"], status["rounds"][0]["filter"]);
    assert_eq!(run["results"][0]["promoted"].as_array().unwrap().len(), 2);
    assert_eq!(world.run(&one)["tasks_done"], 0);
    let report = std::fs::read_to_string(world.path("report.html")).unwrap();
    assert!(report.contains("Learning curves") && report.contains("Round 0: med") && report.contains("Round 1: filter"));
    assert_eq!(world.json(&["store", "check", "--store", "store", "--json"])["findings"].as_array().unwrap().len(), 0);

    let (code, said) = world.refuse(&["run", "run.toml", "--set", "train.med.folds=3"]);
    assert!(code == 2 && said.contains("train.filter.folds is 2, but train.med.folds is 3: it would start from a MED"), "{said}");
    for (change, part) in [
        ("train.filter.repeats=3", "train.filter.repeats is 3, but train.med.repeats is 2"),
        ("train.med.word_weights=nowhere", "train.med.word_weights cannot be read"),
        ("train.med.word_weights=promoted", "neither a folder nor a repository"),
        ("train.filter.word_weights=nowhere", "train.filter.word_weights cannot be read"),
        ("train.med.trunk_weights=nowhere", "`model.trunk` and `trunk_weights` go together"),
        ("train.med.model.trunk=resnet", "efficientnet_lite0"),
    ] {
        let (code, said) = world.refuse(&["run", "run.toml", "--set", change]);
        assert!(code == 2 && said.contains(part), "{change}: {said}");
    }
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "models.captioner=promoted"]);
    assert!(code == 2 && said.contains("name both, or neither"), "{said}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "retrain.enabled=false"]);
    assert!(code == 2 && said.contains("[train.captioner]"), "{said}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "train.filter.init=parent"]);
    assert!(code == 2 && said.contains("begins without models"), "{said}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "run.store=other", "--set", "retrain.min_pairs=1000"]);
    assert!(code != 0 && said.contains("retrain.min_pairs"), "{said}");
}

#[test]
fn a_clip_trained_on_each_version_measures_it() {
    let world = World::new(20);
    let clip = "train.clip={steps=4, batch=8, vocab_size=600, model={image_size=32, patch_size=16, width=32, heads=2, vision_layers=1, \
                text_layers=1, projection=16, positions=24}}";
    let classes = "evaluate.zero_shot={classes=['red', 'green', 'blue']}";
    let run = world.run(&[clip, classes, "run.rounds=1"]);
    assert_eq!(run["tasks_given_up"], 0);
    let result = &run["results"][0];
    for metric in ["clip/ir_at_1", "clip/tr_at_5", "clip/auroc", "clip/zero_shot_at_1"] {
        let value = result["challenger_metrics"][metric].as_f64();
        assert!(value.is_some_and(|value| (0.0..=1.0).contains(&value)), "{metric}: {result}");
        assert!(result["metrics"][metric].is_null(), "{metric}: {result}");
    }
    assert!(result["promoted"].as_array().unwrap().iter().all(|role| role != "clip"), "{result}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", clip, "--set", "train.clip.init=parent"]);
    assert!(code == 2 && said.contains("plays no role"), "{said}");
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "evaluate.zero_shot={classes=['red']}"]);
    assert!(code == 2 && said.contains("too few"), "{said}");
}

#[test]
fn a_surplus_is_downloaded_and_the_cap_holds_all_the_same() {
    let world = World::new(40);
    let small = ["retrain.enabled=false", "run.rounds=1", "balance.per_query=3"];
    let funnel = |run: &Value, step: &str| {
        let steps = run["dataset"]["funnel"]["steps"].as_array().unwrap().clone();
        steps.iter().find(|s| s[0] == step).and_then(|s| s[1].as_u64())
    };
    let exact = world.run(&small);
    let surplus = world.run(&[&small[..], &["balance.expected_success=0.5"]].concat());
    assert!(rows(&surplus, "balance") > rows(&exact, "balance"));
    assert_eq!(funnel(&exact, "within per_query"), None);
    let (images, within) = (funnel(&surplus, "not held out").unwrap(), funnel(&surplus, "within per_query").unwrap());
    // Each of the queries takes three at most, and each pair is taken by one at least.
    let stats = world.json(&["queries", "stats", "run.toml", "--json", "--set", "balance.per_query=3"]);
    let queries = stats["before"]["queries"].as_u64().unwrap();
    assert!(within < images && within <= 3 * queries, "{within} of {images}, {queries} queries");
}

#[test]
fn another_threshold_is_a_query_and_the_diff_shows_what_moved() {
    let world = World::new(30);
    let first = world.run(&["retrain.enabled=false", "run.rounds=1"]);
    let asked = world.requests();
    let second = world.run(&["retrain.enabled=false", "run.rounds=1", "build.min_itm=0.9"]);
    assert_ne!(digest(&second), digest(&first));
    assert_eq!(second["tasks_done"], 1, "the build and nothing else: {}", second["progress"]);
    assert_eq!(world.requests(), asked);
    let diff = world.json(&["dataset", "diff", "test@1", "test", "--store", "run.toml", "--json"]);
    assert!(diff.to_string().contains("min_itm"), "{diff}");
    let text = world.capfilt(&["dataset", "diff", "test@1", "test@2", "--store", "store"]);
    assert!(text.status.success());
    let versions = world.json(&["dataset", "list", "--store", "store", "--json"]);
    assert_eq!(versions.as_array().unwrap().len(), 2);
    // Back to the first settings: the old version, at once.
    let third = world.run(&["retrain.enabled=false", "run.rounds=1"]);
    assert_eq!((digest(&third), &third["tasks_done"]), (digest(&first), &Value::from(0)));
}

#[test]
fn a_dry_run_changes_nothing() {
    let world = World::new(10);
    let plan = world.json(&["run", "run.toml", "--dry-run", "--json"]);
    assert_eq!(plan["complete"], false);
    assert!(!plan["tasks"].as_array().unwrap().is_empty());
    assert_eq!(world.requests(), 0);
    let commits = world.path("store/commits");
    assert!(!commits.exists());
    assert!(!world.path("store/objects").exists());
}

#[test]
fn models_are_promoted_and_rolled_back() {
    let world = World::new(20);
    world.run(&[]);
    let events = world.json(&["model", "list", "--store", "store", "--json"]);
    let filters: Vec<&Value> = events.as_array().unwrap().iter().filter(|e| e["role"] == "filter").collect();
    assert_eq!(filters[0]["action"], "import");
    assert!(filters.len() >= 2 && filters[1]["action"] == "promote", "{events}");
    let now = filters.last().unwrap()["model"].as_str().unwrap();
    let back = world.json(&["model", "rollback", "filter", "--store", "store", "--json"]);
    assert_ne!(back["model"], now);
    let again = world.json(&["model", "promote", "filter", &now[..10], "--store", "store", "--json"]);
    assert_eq!(again["model"], now);
    let shown = world.json(&["model", "show", "filter", "--store", "store", "--json"]);
    assert_eq!(shown["digest"], now);
    assert!(shown["trained_by"].is_string() && shown["kind"] == "filter (BLIP)", "{shown}");
    // What a person put in service is what the next round works with.
    let first = filters[0]["model"].as_str().unwrap();
    world.json(&["model", "promote", "filter", &first[..12], "--store", "store", "--json"]);
    // And it stays where a round is decided again, however good its challenger is.
    let again = world.run(&["evaluate.seed=1"]);
    let mut told = again["results"].as_array().unwrap().iter().filter_map(|r| r["reasons"]["filter"].as_str());
    assert!(told.next_back().unwrap().contains("a person chose"), "{again}");
    assert_eq!(world.json(&["model", "show", "filter", "--store", "store", "--json"])["digest"], first);
    world.run(&["run.rounds=3"]);
    let third = std::fs::read_to_string(world.folder.path().join("store/runs/test/rounds/00000003.json")).unwrap();
    assert!(third.contains(first), "{third}");
    // What is measured of a model may decide about it, and nothing else.
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "retrain.metric.filter='filter/aurco'"]);
    let measured = again["results"][0]["metrics"].as_object().unwrap().keys();
    assert!(code == 2 && measured.filter(|name| name.starts_with("filter/")).all(|name| said.contains(name.as_str())), "{said}");
    // A model plays only the role that it has the parts for.
    let (code, said) = world.refuse(&["model", "promote", "captioner", &first[..12], "--store", "store"]);
    assert_eq!(code, 1);
    assert!(said.contains("no usable captioner") && said.contains("text_decoder"), "{said}");
    let named = format!("models.captioner='{}'", &first[..12]);
    let (code, said) = world.refuse(&["run", "run.toml", "--set", "run.name=other", "--set", &named]);
    assert!(code == 1 && said.contains("no usable captioner") && said.contains("text_decoder"), "{said}");
}
