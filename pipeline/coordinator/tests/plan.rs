//! The planner against a model of the world: whatever is interrupted, repeated or delayed, the same work gets done once.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::plan::{Action, Observation, Plan, PlanConfig, StageParams, plan};
use capfilt_coordinator::retrain::{Measured, RetrainConfig};
use capfilt_schemas::{
    Commit, DatasetRef, DatasetVersion, Digest, FetchStatus, Output, RetryRecord, RoundResult, RunId, StageKind, Table, Takedown,
    Task, TaskId,
};
use proptest::prelude::*;
use serde_json::json;

fn config() -> PlanConfig {
    let train = |role: &str| (role.to_owned(), json!({ "role": role }));
    PlanConfig {
        run: RunId::new("test").unwrap(),
        dataset: "test".to_owned(),
        rounds: 2,
        models: Some((Digest::of(b"captioner"), Digest::of(b"filter"))),
        stages: StageParams {
            discover: vec![json!({"source": 1}), json!({"source": 2})],
            balance: json!({}),
            fetch: json!({}),
            annotated: vec![json!({"set": "clean"})],
            heldout: vec![json!({"set": "held"})],
            caption: json!({}),
            score: json!({}),
            build: json!({"min_itm": 0.5}),
            train: BTreeMap::from([train("captioner"), train("filter")]),
            evaluate: json!({}),
            versions: BTreeMap::new(),
        },
        retrain: RetrainConfig { enabled: true, min_pairs: 1, confidence: 0.0, ..RetrainConfig::default() },
        max_attempts: 3,
        sql: SqlConfig::default(),
        work_dir: "work".into(),
        check_model: |_, _| Ok(()),
    }
}

/// A store that works tasks off by their names alone.
#[derive(Default)]
struct World {
    seen: Observation,
    /// How often each task was worked on.
    worked: BTreeMap<TaskId, u32>,
    promotions: u32,
    /// Downloads of shards to come of which some rows time out.
    outage: u32,
}

impl World {
    fn work(&mut self, task: &Task) {
        let id = task.id();
        *self.worked.entry(id).or_default() += 1;
        let shards = if task.stage == StageKind::Balance { 3 } else { 1 };
        let outputs = (0..shards).map(|i| Output {
            table: task.stage.output(),
            digest: Digest::of(format!("{id}/{i}").as_bytes()),
            rows: 10,
            bytes: 100,
        });
        if task.stage == StageKind::Evaluate {
            // A captioner that was trained is better than the first one, a filter is not.
            let first = task.model == Some(Digest::of(b"captioner")) || task.model == Some(Digest::of(b"filter"));
            let role = task.params["role"].as_str().unwrap();
            let metrics = match role {
                "captioner" => ("captioner/cider_d", if first { 0.1 } else { 0.2 }),
                _ => ("filter/auroc", if first { 0.8 } else { 0.7 }),
            };
            let values = BTreeMap::from([(metrics.0.to_owned(), metrics.1)]);
            self.seen.metrics.insert(id, Measured { values, ..Measured::default() });
        }
        let commit = Commit {
            task_id: id,
            task: task.clone(),
            run: RunId::new("test").unwrap(),
            outputs: outputs.collect(),
            counts: self.counts(task),
            facts: json!({}),
            committed_at_ms: 0,
            elapsed_ms: 0,
        };
        self.seen.commits.insert(id, commit);
    }

    fn counts(&mut self, task: &Task) -> BTreeMap<String, u64> {
        let fails = task.stage == StageKind::Fetch && task.params.get("retry").is_none() && self.outage > 0;
        self.outage -= u32::from(fails);
        let rows = if fails { [("ok", 7), ("timeout", 3)] } else { [("ok", 10), ("timeout", 0)] };
        rows.into_iter().map(|(status, n)| (status.to_owned(), n)).collect()
    }

    fn retry(&mut self, config: &PlanConfig, status: FetchStatus) {
        let number = self.seen.retries.len() as u64 + 1;
        let (run, settings) = (config.run.clone(), config.fetch_settings());
        self.seen.retries.push(RetryRecord { run, number, statuses: vec![status], settings, asked_at_ms: 0 });
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Own(task) => self.work(task),
            Action::StartRound(record) => {
                if self.seen.rounds.iter().all(|r| r.round != record.round) {
                    self.seen.rounds.push(record.clone());
                }
            }
            Action::FinishRound(finish) => {
                self.promotions += u32::try_from(finish.promoted.len()).unwrap();
                let outputs = &self.seen.commits[&finish.build].outputs;
                self.seen.results.push(RoundResult {
                    round: finish.record.round,
                    dataset: DatasetRef { version: 1, digest: DatasetVersion::digest_of(outputs) },
                    metrics: finish.metrics.clone(),
                    challenger_metrics: finish.challenger_metrics.clone(),
                    promoted: finish.promoted.keys().cloned().collect(),
                    reasons: finish.reasons.clone(),
                    rests_on: finish.rests_on.iter().copied().collect(),
                    finished_at_ms: 0,
                });
            }
        }
    }

    /// Works everything off, at each step only what `pick` allows.
    fn run(&mut self, config: &PlanConfig, mut pick: impl FnMut() -> bool) -> Plan {
        for _ in 0..2_000 {
            let now = plan(config, &self.seen);
            if now.complete || now.stuck.is_some() {
                return now;
            }
            for task in &now.tasks {
                if pick() {
                    self.work(task);
                }
            }
            for action in &now.actions {
                if pick() {
                    self.act(action);
                }
            }
        }
        panic!("the run never ends");
    }

    fn datasets(&self) -> BTreeSet<TaskId> {
        self.of_stage(StageKind::Build)
    }

    fn of_stage(&self, stage: StageKind) -> BTreeSet<TaskId> {
        self.seen.commits.values().filter(|c| c.task.stage == stage).map(|c| c.task_id).collect()
    }
}

#[test]
fn a_run_does_everything_once_and_then_nothing() {
    let (config, mut world) = (config(), World::default());
    let end = world.run(&config, || true);
    assert!(end.complete);
    assert!(world.worked.values().all(|n| *n == 1));
    let count = |stage| world.of_stage(stage).len();
    assert_eq!((count(StageKind::Discover), count(StageKind::Annotate), count(StageKind::Fetch)), (2, 2, 3));
    // Round 2 has another captioner (promoted) and so other captions; the filter stayed, but has new captions to score.
    assert_eq!((count(StageKind::Caption), count(StageKind::Score), count(StageKind::Build)), (6, 6, 2));
    assert_eq!((count(StageKind::Train), world.promotions), (4, 1));
    assert_ne!(world.seen.rounds[0].captioner, world.seen.rounds[1].captioner);
    assert_eq!(world.seen.rounds[0].filter, world.seen.rounds[1].filter);
    let again = plan(&config, &world.seen);
    assert!(again.complete && again.tasks.is_empty() && again.actions.is_empty());
    assert_eq!(again.last_build, end.last_build);
}

#[test]
fn another_threshold_builds_again_and_computes_no_text_and_no_score() {
    let (mut config, mut world) = (config(), World::default());
    let first = world.run(&config, || true);
    let (captions, scores) = (world.of_stage(StageKind::Caption), world.of_stage(StageKind::Score));
    config.stages.build = json!({"min_itm": 0.7});
    let second = world.run(&config, || true);
    assert!(second.complete);
    assert_eq!(world.of_stage(StageKind::Caption), captions);
    assert_eq!(world.of_stage(StageKind::Score), scores);
    assert_eq!(world.of_stage(StageKind::Build).len(), 4);
    assert_ne!(first.last_build, second.last_build);
    // Only the last round can still lead to other models.
    assert_eq!(world.of_stage(StageKind::Train).len(), 6);
    config.stages.build = json!({"min_itm": 0.5});
    assert_eq!(world.run(&config, || true).last_build, first.last_build, "the old settings are still done");
}

#[test]
fn what_is_trained_later_is_promoted_all_the_same() {
    let (mut config, mut world) = (config(), World::default());
    config.retrain.enabled = false;
    let without = world.run(&config, || true);
    assert!(without.complete && world.promotions == 0);
    config.retrain.enabled = true;
    assert!(world.run(&config, || true).complete);
    // The last round can still lead to other models, and does so once.
    let promoted = world.promotions;
    assert_eq!(promoted, 1);
    let last = world.seen.results.last().unwrap();
    assert!(!last.challenger_metrics.is_empty() && !last.promoted.is_empty());
    assert!(world.run(&config, || true).complete);
    assert_eq!(world.promotions, promoted);
    // Other judges, another result.
    let results = world.seen.results.len();
    config.stages.evaluate = json!({"other": true});
    assert!(world.run(&config, || true).complete);
    assert!(world.seen.results.len() > results);
}

#[test]
fn without_a_challenger_there_are_no_metrics_of_one() {
    let (mut config, mut world) = (config(), World::default());
    config.stages.train.clear();
    assert!(world.run(&config, || true).complete);
    assert!(world.seen.results.iter().all(|r| r.challenger_metrics.is_empty()));
}

#[test]
fn a_further_round_goes_on_from_the_last() {
    let (mut config, mut world) = (config(), World::default());
    config.rounds = 1;
    world.run(&config, || true);
    let worked = world.worked.len();
    config.rounds = 2;
    assert!(world.run(&config, || true).complete);
    assert!(world.worked.len() > worked);
    let worked = world.worked.len();
    // The second round promoted nothing: a third has the same models, and all its work is done.
    config.rounds = 3;
    assert!(world.run(&config, || true).complete);
    assert_eq!(world.worked.len(), worked);
    assert!(world.worked.values().all(|n| *n == 1));
    assert_eq!(world.seen.rounds.len(), 3);
}

#[test]
fn a_run_without_models_trains_its_first_ones_on_what_it_found() {
    let (mut config, mut world) = (config(), World::default());
    config.models = None;
    let train = |role: &str, init: &str| (role.to_owned(), json!({ "role": role, "init": init }));
    config.stages.train = BTreeMap::from([train("med", "fresh"), train("captioner", "med"), train("filter", "med")]);
    let end = world.run(&config, || true);
    assert!(end.complete);
    assert!(world.worked.values().all(|n| *n == 1));
    let trained = |role: &str| -> Vec<Task> {
        let commits = world.seen.commits.values().filter(|c| c.task.stage == StageKind::Train && c.task.params["role"] == role);
        commits.map(|c| c.task.clone()).collect()
    };
    // Before the first round and in it; the second has the same models, and all its work is done. The first MED has no vocabulary to keep.
    let (meds, captioners) = (trained("med"), trained("captioner"));
    assert_eq!((meds.len(), captioners.len(), trained("filter").len()), (2, 2, 2));
    assert_eq!(meds.iter().filter(|task| task.model.is_none()).count(), 1);
    let made: BTreeSet<Digest> = meds.iter().map(|task| world.seen.commits[&task.id()].outputs[0].digest).collect();
    assert!(captioners.iter().all(|task| made.contains(&task.model.unwrap())));
    let first = captioners.iter().find(|task| world.seen.commits[&task.id()].outputs[0].digest == world.seen.rounds[0].captioner);
    let built_of = |task: &Task| {
        world.seen.commits.values().find(|c| c.task.stage == StageKind::Build && c.as_inputs().eq(task.inputs.iter().copied()))
    };
    assert!(built_of(first.unwrap()).unwrap().task.inputs_of(Table::Captions).next().is_none());
    assert_eq!(world.of_stage(StageKind::Build).len(), 2);
}

#[test]
fn too_few_new_pairs_train_nothing_and_the_round_says_why() {
    let (mut config, mut world) = (config(), World::default());
    // A built version has 10 rows; the first models were trained elsewhere, so to them all are new.
    config.retrain.min_new_pairs = 10;
    let mut reasons = Vec::new();
    loop {
        let now = plan(&config, &world.seen);
        if now.complete {
            break;
        }
        now.tasks.iter().for_each(|task| world.work(task));
        for action in &now.actions {
            if let Action::FinishRound(finish) = action {
                reasons.push((finish.record.round, finish.reasons.clone()));
            }
            world.act(action);
        }
    }
    assert_eq!(world.of_stage(StageKind::Train).len(), 2);
    let (round, said) = reasons.last().unwrap();
    assert_eq!((*round, said.len()), (2, 2));
    assert!(said["captioner"].contains("0 pairs more"), "{said:?}");
}

#[test]
fn a_run_whose_first_models_cannot_be_trained_says_so() {
    let (mut config, mut world) = (config(), World::default());
    config.models = None;
    loop {
        let now = plan(&config, &world.seen);
        if let Some(why) = now.stuck {
            assert!(why.contains("no first captioner and filter"), "{why}");
            break;
        }
        for task in &now.tasks {
            match task.stage {
                StageKind::Train => _ = world.seen.failures.insert(task.id(), (1, false)),
                _ => world.work(task),
            }
        }
        now.actions.iter().for_each(|action| world.act(action));
    }
    assert!(world.seen.rounds.is_empty());
}

#[test]
fn where_every_caption_was_given_up_nothing_is_built() {
    let (config, mut world) = (config(), World::default());
    loop {
        let now = plan(&config, &world.seen);
        if let Some(why) = now.stuck {
            assert!(why.contains("every caption or score task was given up"), "{why}");
            break;
        }
        assert!(!now.complete);
        for task in &now.tasks {
            match task.stage {
                StageKind::Caption => _ = world.seen.failures.insert(task.id(), (1, false)),
                _ => world.work(task),
            }
        }
        now.actions.iter().for_each(|action| world.act(action));
    }
    assert!(world.of_stage(StageKind::Build).is_empty());
}

#[test]
fn without_rounds_the_run_ends_with_the_download() {
    let (config, mut world) = (PlanConfig { rounds: 0, models: None, ..config() }, World::default());
    let end = world.run(&config, || true);
    assert!(end.complete && end.stuck.is_none() && end.downloads.fetched);
    assert_eq!((world.of_stage(StageKind::Fetch).len(), end.found.len()), (3, 2));
    assert!(world.seen.rounds.is_empty() && world.of_stage(StageKind::Caption).is_empty());
}

#[test]
fn where_nothing_was_selected_nothing_is_built() {
    let (mut config, mut world) = (config(), World::default());
    let stuck = |config: &PlanConfig, world: &mut World| loop {
        let now = plan(config, &world.seen);
        if now.stuck.is_some() || !world.datasets().is_empty() {
            break now.stuck;
        }
        now.tasks.iter().for_each(|task| world.work(task));
        for action in &now.actions {
            world.act(action);
        }
        let empty = world.seen.commits.values_mut().filter(|c| c.task.stage == StageKind::Balance);
        empty.for_each(|balance| balance.outputs.clear());
    };
    assert_eq!(stuck(&config, &mut world), None, "there are pairs that people wrote");
    config.stages.annotated.clear();
    assert_eq!(stuck(&config, &mut World::default()).as_deref(), Some("balancing selected none of 20 candidates"));
}

#[test]
fn a_task_that_was_given_up_does_not_stop_the_rest() {
    let (config, mut world) = (config(), World::default());
    loop {
        let now = plan(&config, &world.seen);
        if now.complete {
            assert!(!now.dead.is_empty());
            break;
        }
        for task in &now.tasks {
            // The first fetch task never succeeds.
            if task.stage == StageKind::Fetch && world.of_stage(StageKind::Fetch).is_empty() && world.seen.failures.is_empty() {
                world.seen.failures.insert(task.id(), (3, true));
            } else if !world.seen.failures.contains_key(&task.id()) {
                world.work(task);
            }
        }
        now.actions.iter().for_each(|a| world.act(a));
    }
    assert_eq!(world.of_stage(StageKind::Fetch).len(), 2);
    assert_eq!(world.datasets().len(), 2);
}

#[test]
fn a_training_that_was_given_up_leaves_the_role_as_it_is() {
    for external in [false, true] {
        let (mut config, mut world) = (config(), World::default());
        if external {
            config.stages.train.insert("captioner".to_owned(), json!({"role": "captioner", "command": ["train"]}));
        }
        loop {
            let now = plan(&config, &world.seen);
            assert_eq!(now.stuck, None);
            if now.complete {
                break;
            }
            let fails = |task: &Task| task.stage == StageKind::Train && task.params["role"] == "captioner";
            for task in &now.tasks {
                match fails(task) {
                    true => _ = world.seen.failures.insert(task.id(), (1, false)),
                    false => world.work(task),
                }
            }
            for action in &now.actions {
                match action {
                    Action::Own(task) if fails(task) => _ = world.seen.failures.insert(task.id(), (1, false)),
                    action => world.act(action),
                }
            }
        }
        let result = &world.seen.results[0];
        assert!(result.reasons["captioner"].contains("could not be trained"), "{result:?}");
        assert_eq!(
            result.challenger_metrics.keys().collect::<Vec<_>>(),
            ["filter/auroc"],
            "the champion's are not the challenger's"
        );
        assert!(world.seen.rounds.iter().all(|round| round.captioner == Digest::of(b"captioner")));
    }
}

#[test]
fn nothing_goes_on_without_the_coordinators_own_tasks() {
    let (config, mut world) = (config(), World::default());
    for _ in 0..50 {
        let now = plan(&config, &world.seen);
        now.tasks.iter().for_each(|t| world.work(t));
        if let Some(Action::Own(balance)) = now.actions.first() {
            world.seen.failures.insert(balance.id(), (1, false));
        }
    }
    let end = plan(&config, &world.seen);
    assert!(end.stuck.unwrap().contains("balance"));
}

#[test]
fn without_retraining_both_rounds_use_the_same_models() {
    let (mut config, mut world) = (config(), World::default());
    config.retrain.enabled = false;
    assert!(world.run(&config, || true).complete);
    assert_eq!(world.of_stage(StageKind::Train).len(), 0);
    assert_eq!(world.of_stage(StageKind::Caption).len(), 3, "the same models: the same captions");
    assert_eq!(world.datasets().len(), 1);
}

#[test]
fn a_retry_fetches_shards_with_such_rows_and_nothing_else_again() {
    let mut config = config();
    config.retrain.enabled = false;
    let mut world = World { outage: 1, ..World::default() };
    let first = world.run(&config, || true);
    let fetched = |timeouts| BTreeMap::from([("ok".to_owned(), 30 - timeouts), ("timeout".to_owned(), timeouts)]);
    assert_eq!((&first.downloads.statuses, first.downloads.fetched), (&fetched(3), true));
    world.retry(&config, FetchStatus::Dns);
    assert_eq!(plan(&config, &world.seen).last_build, first.last_build, "no row has that status");
    world.retry(&config, FetchStatus::Timeout);
    let now = plan(&config, &world.seen);
    assert_eq!(now.tasks.len(), 1, "the shard is fetched again, and what rests on it waits: {:?}", now.tasks);
    assert!(now.downloads.retrying && now.downloads.fetched && now.tasks[0].params["retry"]["name"] == "test/2");
    let second = world.run(&config, || true);
    assert_eq!((second.downloads.statuses.clone(), second.downloads.retrying), (fetched(0), false));
    assert_ne!(second.last_build, first.last_build);
    let count = |stage| world.of_stage(stage).len();
    assert_eq!((count(StageKind::Fetch), count(StageKind::Caption), count(StageKind::Build)), (4, 4, 2));
    assert!(world.worked.values().all(|n| *n == 1));
    // It was asked for under these settings: under others everything is fetched anew, once.
    config.stages.fetch = json!({"size": 512});
    assert!(world.run(&config, || true).complete);
    assert_eq!(world.of_stage(StageKind::Fetch).len(), 7);
}

#[test]
fn a_retry_that_was_given_up_leaves_what_was_there() {
    let (config, mut world) = (config(), World { outage: 3, ..World::default() });
    let first = world.run(&config, || true);
    world.retry(&config, FetchStatus::Timeout);
    for task in plan(&config, &world.seen).tasks {
        world.seen.failures.insert(task.id(), (3, true));
    }
    let now = plan(&config, &world.seen);
    assert!(now.complete && now.dead.len() == 3 && !now.downloads.retrying);
    assert_eq!(now.last_build, first.last_build);
}

#[test]
fn a_takedown_builds_again_and_neither_fetches_nor_captions() {
    let (config, mut world) = (config(), World::default());
    let first = world.run(&config, || true);
    let of = |world: &World| [StageKind::Fetch, StageKind::Caption, StageKind::Score].map(|stage| world.of_stage(stage));
    let (before, builds) = (of(&world), world.datasets().len());
    let takedown = |number, host: &str| Takedown {
        number,
        urls: vec![],
        hosts: vec![host.to_owned()],
        sha256: vec![],
        reason: None,
        made_at_ms: number,
    };
    world.seen.takedowns.push(takedown(1, "a.test"));
    let second = world.run(&config, || true);
    assert!(second.complete && second.last_build != first.last_build);
    assert_eq!((of(&world), world.datasets().len()), (before, builds + 2));
    world.seen.takedowns.push(takedown(2, "a.test"));
    assert_eq!(plan(&config, &world.seen).last_build, second.last_build, "it covers nothing new");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_order_and_interruption_the_same_dataset_comes_out(seed in any::<u64>()) {
        let config = config();
        let mut straight = World::default();
        let expected = straight.run(&config, || true).last_build;
        let mut state = seed | 1;
        let mut world = World::default();
        let end = world.run(&config, || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % 3 == 0
        });
        prop_assert_eq!(end.last_build, expected);
        prop_assert_eq!(world.datasets(), straight.datasets());
        prop_assert_eq!(world.worked.keys().collect::<Vec<_>>(), straight.worked.keys().collect::<Vec<_>>());
    }
}

#[test]
fn a_build_knows_the_cap_only_where_more_was_selected_than_may_stay() {
    let cap_of = |balance: serde_json::Value| {
        let (mut config, mut world) = (config(), World::default());
        config.stages.balance = balance;
        world.run(&config, || true);
        let build = world.seen.commits.values().find(|c| c.task.stage == StageKind::Build).unwrap().task.clone();
        build.params.get("cap").cloned()
    };
    let surplus = json!({"per_query": 5, "seed": 3, "expected_success": 0.5});
    assert_eq!(cap_of(surplus), Some(json!({"per_query": 5, "seed": 3})));
    assert_eq!(cap_of(json!({"per_query": 5})), None);
    assert_eq!(cap_of(json!({"per_query": 5, "expected_success": 0.5, "rule": "soft"})), None, "the soft rule is no cap");
}
