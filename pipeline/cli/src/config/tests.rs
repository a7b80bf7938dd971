#![allow(clippy::unwrap_used)]

use super::*;
use capfilt_crawler::{ImageConfig, PagesConfig, SitemapsConfig, WebConfig};

fn after(text: &str, change: &str) -> Result<toml::Table, String> {
    let mut table: toml::Table = text.parse().unwrap();
    apply(&mut table, change).map(|()| table)
}

#[test]
fn settings_are_changed_from_the_command_line() {
    let text = "[build]\nmin_itm = 0.5\n[[discover.sources]]\nkind = 'list'\n";
    assert_eq!(after(text, "build.min_itm=0.6").unwrap()["build"]["min_itm"].as_float(), Some(0.6));
    assert_eq!(after(text, "run.name=x-1").unwrap()["run"]["name"].as_str(), Some("x-1"));
    assert_eq!(after(text, "run.rounds=3").unwrap()["run"]["rounds"].as_integer(), Some(3));
    let url = after(text, "worker.crawler.proxy=http://127.0.0.1:8080").unwrap();
    assert_eq!(url["worker"]["crawler"]["proxy"].as_str(), Some("http://127.0.0.1:8080"));
    let listed = after(text, "discover.sources.0.url_col=u").unwrap();
    assert_eq!(listed["discover"]["sources"][0]["url_col"].as_str(), Some("u"));
    for bad in ["build", "=1", "build..x=1", "build.min_itm.deep=1", "discover.sources.7.kind=x"] {
        assert!(after(text, bad).is_err(), "{bad}");
    }
}

#[test]
fn the_reference_of_gathering_tells_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/gather.toml");
    let config = RunConfig::load(&path, &[]).map_err(|f| f.text()).unwrap();
    let (fetch, usual) = (config.fetch, FetchConfig::default());
    let web = WebConfig { agent: usual.web.agent.clone(), ..fetch.web };
    let image = ImageConfig { quality: None, ..fetch.image };
    assert_eq!((config.balance, web, image, fetch.max_body), (BalanceConfig::default(), usual.web, usual.image, usual.max_body));
    assert_eq!(
        (config.worker.crawler, config.discover.max_text),
        (CrawlerWorkerConfig::default(), DiscoverConfig::default().max_text)
    );
    for source in config.discover.sources {
        match source {
            SourceConfig::Pages(p) => assert_eq!(p, PagesConfig { seeds: p.seeds.clone(), ..PagesConfig::default() }),
            SourceConfig::Sitemaps(s) => {
                assert_eq!(s, SitemapsConfig { sitemaps: s.sitemaps.clone(), ..SitemapsConfig::default() });
            }
            SourceConfig::Archive(_) | SourceConfig::List(_) | SourceConfig::Search(_) => {}
        }
    }
}

#[test]
fn the_reference_of_training_tells_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/train.toml");
    let config = RunConfig::load(&path, &[]).map_err(|f| f.text()).unwrap();
    let TrainSection::BuiltIn(told) = &config.train["filter"] else { panic!("it is built in") };
    let params = config.train_params().unwrap().remove("filter").unwrap();
    let params: TrainConfig = serde_json::from_value(params).unwrap();
    let usual = TrainConfig { role: params.role, epochs: params.epochs, ..TrainConfig::default() };
    assert_eq!(params, usual);
    // One is left out where a model has one member, the other stands beside it.
    let shown = json(&TrainConfig { folds: 2, repeats: 2, ..usual }).unwrap();
    let missing: Vec<_> = shown.as_object().unwrap().keys().filter(|key| !told.contains_key(*key)).collect();
    assert_eq!(missing, ["role", "steps"]);
    let metric = config.retrain.metric.clone();
    assert_eq!(config.retrain, RetrainConfig { enabled: true, metric, ..RetrainConfig::default() });
    assert_eq!((config.evaluate, config.worker.trainer), (EvaluateConfig::default(), TrainerWorkerConfig::default()));
}

#[test]
fn every_config_can_be_loaded() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            RunConfig::load(&path, &[]).map_err(|f| f.text()).unwrap();
        }
    }
}

/// The config of the demo with some settings changed.
fn demo(changes: &[&str]) -> Result<RunConfig, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/demo.toml");
    let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    RunConfig::load(&path, &changes).map_err(|f| f.text())
}

#[test]
fn ranking_by_clip_needs_a_clip() {
    let rank = ["build.policy=rank", "build.rank_by=clip"];
    let refused = demo(&rank).unwrap_err();
    assert!(refused.contains("models.clip"), "{refused}");
    let config = demo(&[rank[0], rank[1], "models.clip=some/more/clip"]).unwrap();
    let clip = config.models.clip.unwrap();
    assert!(clip.ends_with("configs/some/more/clip") && Path::new(&clip).is_absolute(), "{clip}");
}

#[test]
fn what_changes_captions_and_scores_is_in_their_parameters_and_nothing_else_is() {
    let params = |changes: &[&str], clip: Option<Digest>| {
        let config = demo(&[&["score.itc=cosine", "caption.sampling.strategy=nucleus"], changes].concat()).unwrap();
        let vision = &config.worker.vision;
        (json(&config.caption.params(vision)).unwrap(), json(&config.score.params(vision, clip)).unwrap())
    };
    let (caption, score) = params(&["caption.dtype=f32", "score.dtype=f32"], None);
    assert_eq!(score, serde_json::json!({"first_token": "enc"}));
    assert_eq!(caption["sampling"]["top_p"], 0.9);
    assert!(caption.get("dtype").is_none() && caption["sampling"].get("strategy").is_none());
    // What is usual hangs on the processor.
    let usual = params(&[], None).0.get("dtype").cloned();
    assert!(usual.is_none_or(|dtype| dtype == "bf16x3"));
    let (half, half_score) = params(&["worker.vision.device=cuda:0"], None);
    assert_eq!((&half["dtype"], &half_score["dtype"]), (&Value::from("bf16"), &Value::from("bf16")));
    assert_eq!(params(&["worker.vision.device=cuda:0", "caption.dtype=f32"], None).0, caption);
    let digest = Digest::of(b"a clip");
    assert_eq!(params(&[], Some(digest)).1["clip"], digest.to_string());
    let beam = params(&["caption.sampling.strategy=beam", "caption.sampling.num_beams=5"], None).0;
    assert_eq!(beam["sampling"]["num_beams"], 5);
    let refused = demo(&["caption.sampling.num_beams=5"]).unwrap_err();
    assert!(refused.contains("strategy"), "{refused}");
}

#[test]
fn every_config_of_the_project_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            RunConfig::load(&path, &[]).map_err(|f| f.text()).unwrap();
            seen += 1;
        }
    }
    assert!(seen > 0);
}
