//! What the report is made of, gathered from the records of the store.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use capfilt_schemas::{
    AliasEvent, Commit, DatasetVersion, Digest, Failure, Funnel, Input, Origin, RoundRecord, RoundResult, RowStatus, StageKind,
    StatusCounts, Table, TaskId,
};
use capfilt_store::{ROLES, RunEvent, Store};
use serde_json::Value;

use super::ReportInput;
use super::samples::{self, Sample};
use crate::Result;

/// Everything that the page shows.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) input: ReportInput,
    /// First round first.
    pub(super) rounds: Vec<Round>,
    /// In the order of the stages; only those that did something.
    pub(super) stages: Vec<StageLine>,
    /// In the order of rounds and roles.
    pub(super) trainings: Vec<Training>,
    /// Outcomes of the downloads.
    pub(super) fetch: StatusCounts,
    /// Sums of the numeric facts of the discover tasks.
    pub(super) discover: BTreeMap<String, f64>,
    /// Tasks of this run that failed at least once.
    pub(super) failed: Vec<FailedTask>,
    pub(super) events: Vec<RunEvent>,
    /// Changes of roles that concern this run's models.
    pub(super) models: Vec<AliasEvent>,
    pub(super) samples: Vec<Sample>,
    /// When the run's work began and ended, in milliseconds since 1970-01-01 UTC.
    pub(super) span: Option<(u64, u64)>,
    /// How long this run was at work in all, in milliseconds; pauses between calls do not count.
    pub(super) busy_ms: u64,
}

/// One round: what it worked with and what came of it, as far as it got.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) record: Option<RoundRecord>,
    /// The newest version, if the round was built several times.
    pub(super) version: Option<DatasetVersion>,
    pub(super) result: Option<RoundResult>,
    /// The facts of the version's build.
    facts: Value,
}

/// How a model learned; of one with several members, the first of them.
#[derive(Debug)]
pub(super) struct Training {
    pub(super) round: u32,
    pub(super) role: String,
    /// By loss (`itc`, `itm`, `lm`): (step, its mean since the point before).
    pub(super) losses: BTreeMap<String, Vec<(f64, f64)>>,
}

/// One stage's work.
#[derive(Debug)]
pub(super) struct StageLine {
    pub(super) stage: StageKind,
    pub(super) tasks: u64,
    /// Of these, done by another run.
    pub(super) reused: u64,
    /// Rows worked on.
    pub(super) rows: u64,
    /// Of these, ended with another status than `ok`; `None` for stages whose rows have none.
    pub(super) rows_failed: Option<u64>,
    /// Failed attempts.
    pub(super) failures: u64,
    /// Time in which at least one of its tasks was at work.
    pub(super) busy_ms: u64,
}

/// A task that failed at least once.
#[derive(Debug)]
pub(super) struct FailedTask {
    pub(super) last: Failure,
    pub(super) attempts: u32,
    /// Whether a later attempt succeeded.
    pub(super) recovered: bool,
}

/// Shares of judged texts that were thrown out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noise {
    pub(super) all: Option<f64>,
    pub(super) web: Option<f64>,
    pub(super) synthetic: Option<f64>,
}

impl Report {
    /// The newest round that has built something.
    pub(super) fn newest(&self) -> Option<&Round> {
        self.rounds.iter().rev().find(|r| r.version.is_some())
    }

    /// The ITM probability from which on texts are kept, if that is how the newest version was made.
    pub(super) fn threshold(&self) -> Option<f32> {
        self.newest().and_then(|r| r.version.as_ref()).and_then(samples::threshold)
    }

    /// The way of the pairs: that of the newest version, or as far as the run has got.
    pub(super) fn funnel(&self) -> Funnel {
        if let Some(version) = self.newest().and_then(|r| r.version.as_ref()) {
            return version.funnel.clone();
        }
        let rows = |stage| self.stages.iter().find(|s| s.stage == stage).map(|s| s.rows);
        let fetched = self.fetch.get("ok").copied().filter(|_| !self.fetch.is_empty());
        let known = [("candidates", rows(StageKind::Discover)), ("selected", rows(StageKind::Balance)), ("fetched", fetched)];
        Funnel { steps: known.into_iter().filter_map(|(step, n)| Some((step.to_owned(), n?))).collect() }
    }
}

impl Round {
    /// The noise ratios of the round's build, where they were recorded.
    pub(super) fn noise(&self) -> Noise {
        let of = |origin: Origin| self.facts["texts"][origin.as_str()]["noise_ratio"].as_f64();
        let all = self.version.as_ref().and_then(|v| v.noise_ratio);
        Noise { all, web: of(Origin::Web), synthetic: of(Origin::Synthetic) }
    }

    /// How many texts of an origin have an ITM probability in each of equal parts of [0, 1].
    pub(super) fn histogram(&self, origin: Origin) -> Option<Vec<u64>> {
        let bins = self.facts["itm_histogram"][origin.as_str()].as_array()?;
        let bins = bins.iter().map(Value::as_u64).collect::<Option<Vec<_>>>()?;
        (!bins.is_empty()).then_some(bins)
    }
}

/// Reads it all.
pub(super) async fn gather(store: &Store, input: &ReportInput) -> Result<Report> {
    let run = &input.run;
    let mut commits = Vec::new();
    for stage in StageKind::ALL {
        commits.extend(store.commits(*stage).await?);
    }
    let rounds = rounds(store, input, &commits).await?;
    let shown = relevant(&commits, &rounds, input);
    let mut failures = store.all_failures().await?;
    let tasks: HashSet<TaskId> = shown.iter().map(|c| c.task_id).collect();
    failures.retain(|f| f.run == *run || tasks.contains(&f.task_id));
    let mut shown = shown;
    let superseded = superseded(&shown);
    shown.retain(|c| !superseded.contains(&c.task_id));
    let stages = stage_lines(&shown, &failures, input);
    let mut fetch = StatusCounts::new();
    let mut discover = BTreeMap::new();
    for commit in &shown {
        match commit.task.stage {
            StageKind::Fetch => {
                for (status, n) in &commit.counts {
                    *fetch.entry(status.clone()).or_default() += n;
                }
            }
            StageKind::Discover => {
                let facts = commit.facts.as_object().into_iter().flatten();
                for (name, n) in facts.filter_map(|(k, v)| Some((k, v.as_f64()?))) {
                    *discover.entry(name.clone()).or_default() += n;
                }
            }
            _ => {}
        }
    }
    let events = store.events(run).await?;
    let own: Vec<&Commit> = shown.iter().copied().filter(|c| c.run == *run).collect();
    let work = own.iter().map(|c| interval(c));
    let moments = work.clone().chain(events.iter().map(|e| (e.at_ms, e.at_ms)));
    let span = moments.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    let newest = rounds.iter().rev().find_map(|r| r.version.as_ref());
    let samples = match newest {
        Some(version) => samples::choose(store, version, input).await?,
        None => Vec::new(),
    };
    Ok(Report {
        busy_ms: union_ms(work.collect()),
        failed: failed_tasks(failures, &commits.iter().map(|c| c.task_id).collect()),
        models: models(store, input, &rounds).await?,
        input: input.clone(),
        trainings: trainings(&shown, &rounds),
        rounds,
        stages,
        fetch,
        discover,
        events,
        samples,
        span,
    })
}

async fn rounds(store: &Store, input: &ReportInput, commits: &[Commit]) -> Result<Vec<Round>> {
    let records = store.rounds(&input.run).await?;
    let results = store.round_results(&input.run).await?;
    let mut versions = store.dataset_versions(&input.dataset).await?;
    versions.retain(|v| v.run == input.run);
    // Settings that were tried in between led to versions of their own; those of the version meant are shown.
    let meant = input.version.and_then(|n| versions.iter().find(|v| v.version == n)).map(|v| v.settings.clone());
    let numbers: BTreeSet<u32> = records.iter().map(|r| r.round).chain(versions.iter().map(|v| v.round)).collect();
    let round = |number: u32| {
        let of_round = || versions.iter().filter(|v| v.round == number);
        let version =
            of_round().rfind(|v| meant.as_ref().is_none_or(|meant| v.settings == *meant)).or_else(|| of_round().next_back());
        let version = version.cloned();
        let build = version.as_ref().map(|v| v.lineage.build);
        let same = |r: &&RoundResult| r.round == number && build.is_some_and(|build| r.rests_on.contains(&build));
        Round {
            number,
            record: records.iter().find(|r| r.round == number).cloned(),
            result: results.iter().rfind(same).cloned(),
            facts: commits.iter().find(|c| Some(c.task_id) == build).map_or(Value::Null, |c| c.facts.clone()),
            version,
        }
    };
    Ok(numbers.into_iter().map(round).collect())
}

/// The commits that the shown versions rest on and led to, whichever run made them; while a round has no version yet, also
/// everything else that this run did. Work on settings that were given up since is left out.
fn relevant<'a>(commits: &'a [Commit], rounds: &[Round], input: &ReportInput) -> Vec<&'a Commit> {
    let by_id: HashMap<TaskId, &Commit> = commits.iter().map(|c| (c.task_id, c)).collect();
    let mut makers: HashMap<Input, Vec<&Commit>> = HashMap::new();
    for commit in commits {
        for output in commit.as_inputs() {
            makers.entry(output).or_default().push(commit);
        }
    }
    let versions: Vec<&DatasetVersion> = rounds.iter().filter_map(|r| r.version.as_ref()).collect();
    let mut found = HashSet::new();
    let mut open: Vec<Input> = Vec::new();
    for version in &versions {
        found.insert(version.lineage.build);
        open.extend(&version.lineage.inputs);
    }
    let mut seen: HashSet<Input> = HashSet::new();
    while let Some(input) = open.pop() {
        if seen.insert(input) {
            for maker in makers.get(&input).into_iter().flatten() {
                found.insert(maker.task_id);
                open.extend(&maker.task.inputs);
            }
        }
    }
    let unfinished = rounds.last().is_none_or(|r| r.version.is_none());
    let shards: HashSet<Digest> = versions.iter().flat_map(|v| v.shards.iter().map(|s| s.digest)).collect();
    let trained = |c: &Commit| c.task.stage == StageKind::Train && c.task.inputs_of(Table::Dataset).any(|d| shards.contains(&d));
    found.extend(commits.iter().filter(|c| trained(c) || unfinished && c.run == input.run).map(|c| c.task_id));
    let made = found.iter().filter_map(|id| by_id.get(id)).filter(|c| c.task.stage == StageKind::Train);
    let mut judged: HashSet<Digest> = made.flat_map(|c| c.outputs.iter().map(|o| o.digest)).collect();
    judged.extend(rounds.iter().filter_map(|r| r.record.as_ref()).flat_map(|r| [r.captioner, r.filter]));
    let evaluated = |c: &&Commit| c.task.stage == StageKind::Evaluate && c.task.model.is_some_and(|m| judged.contains(&m));
    found.extend(commits.iter().filter(evaluated).map(|c| c.task_id));
    commits.iter().filter(|c| found.contains(&c.task_id)).collect()
}

/// The downloads that a retry has replaced: what they counted is counted anew by it.
fn superseded(shown: &[&Commit]) -> HashSet<TaskId> {
    let fetches = || shown.iter().filter(|c| c.task.stage == StageKind::Fetch);
    let retried: HashSet<Digest> = fetches()
        .filter(|c| c.as_inputs().ne(c.task.inputs.iter().copied()))
        .flat_map(|c| c.task.inputs_of(Table::Samples))
        .collect();
    let mut counted = HashSet::new();
    // A retry that changed nothing has the very rows of the download before it.
    let counts = |c: &&&Commit| {
        c.outputs.iter().all(|o| !retried.contains(&o.digest)) && counted.insert(c.outputs.first().map(|o| o.digest))
    };
    let kept: HashSet<TaskId> = fetches().filter(counts).map(|c| c.task_id).collect();
    fetches().map(|c| c.task_id).filter(|id| !kept.contains(id)).collect()
}

fn stage_lines(commits: &[&Commit], failures: &[Failure], input: &ReportInput) -> Vec<StageLine> {
    let line = |stage: &StageKind| {
        let mine: Vec<&&Commit> = commits.iter().filter(|c| c.task.stage == *stage).collect();
        let failures = failures.iter().filter(|f| f.stage == *stage).count() as u64;
        if mine.is_empty() && failures == 0 {
            return None;
        }
        // A row without an image is nothing to caption or to score.
        let counted = |skip: &str| {
            let counts = mine.iter().flat_map(|c| &c.counts).filter(|(status, _)| status.as_str() != skip);
            counts.map(|(_, n)| n).sum::<u64>()
        };
        let all = counted(RowStatus::NoImage.as_str());
        let has_status = matches!(stage, StageKind::Fetch | StageKind::Annotate | StageKind::Caption | StageKind::Score);
        let ok: u64 = mine.iter().filter_map(|c| c.counts.get("ok")).sum();
        Some(StageLine {
            stage: *stage,
            tasks: mine.len() as u64,
            reused: mine.iter().filter(|c| c.run != input.run).count() as u64,
            rows: if has_status { all } else { mine.iter().flat_map(|c| &c.outputs).map(|o| o.rows).sum() },
            rows_failed: has_status.then(|| all.saturating_sub(ok)),
            failures,
            busy_ms: union_ms(mine.iter().map(|c| interval(c)).collect()),
        })
    };
    StageKind::ALL.iter().filter_map(line).collect()
}

/// What the trainer has told of the trainings.
fn trainings(shown: &[&Commit], rounds: &[Round]) -> Vec<Training> {
    let training = |commit: &&Commit| {
        let built: HashSet<Digest> = commit.task.inputs_of(Table::Dataset).collect();
        let of_round =
            |r: &&Round| r.version.as_ref().is_some_and(|v| v.shards.iter().map(|s| s.digest).collect::<HashSet<_>>() == built);
        let (round, role) = (rounds.iter().find(of_round)?.number, commit.task.params["role"].as_str()?.to_owned());
        let mut losses = BTreeMap::<String, Vec<(f64, f64)>>::new();
        for line in commit.facts["log"].as_array()? {
            for (loss, value) in line["losses"].as_object().into_iter().flatten() {
                if let Some(point) = line["step"].as_f64().zip(value.as_f64()) {
                    losses.entry(loss.clone()).or_default().push(point);
                }
            }
        }
        (!losses.is_empty()).then_some(Training { round, role, losses })
    };
    let train = shown.iter().filter(|c| c.task.stage == StageKind::Train);
    let mut found: Vec<Training> = train.filter_map(training).collect();
    found.sort_by(|a, b| (a.round, &a.role).cmp(&(b.round, &b.role)));
    found
}

fn failed_tasks(failures: Vec<Failure>, done: &HashSet<TaskId>) -> Vec<FailedTask> {
    let mut tasks: Vec<FailedTask> = Vec::new();
    for failure in failures {
        let (recovered, attempts) = (done.contains(&failure.task_id), failure.attempt);
        match tasks.last_mut() {
            Some(task) if task.last.task_id == failure.task_id => *task = FailedTask { last: failure, attempts, recovered },
            _ => tasks.push(FailedTask { last: failure, attempts, recovered }),
        }
    }
    tasks.sort_by_key(|t| (t.recovered, t.last.stage, t.last.failed_at_ms));
    tasks
}

async fn models(store: &Store, input: &ReportInput, rounds: &[Round]) -> Result<Vec<AliasEvent>> {
    let used: HashSet<Digest> = rounds.iter().filter_map(|r| r.record.as_ref()).flat_map(|r| [r.captioner, r.filter]).collect();
    let key = format!("{}/", input.run);
    let mut found = Vec::new();
    for role in ROLES {
        let mut events = store.alias_events(role).await?;
        events.retain(|e| e.key.starts_with(&key) || used.contains(&e.model));
        found.extend(events);
    }
    Ok(found)
}

/// When a task was at work.
fn interval(commit: &Commit) -> (u64, u64) {
    (commit.committed_at_ms.saturating_sub(commit.elapsed_ms), commit.committed_at_ms)
}

/// The length of the union of intervals.
fn union_ms(mut intervals: Vec<(u64, u64)>) -> u64 {
    intervals.sort_unstable();
    let (mut total, mut reached) = (0, 0);
    for (from, to) in intervals {
        total += to.saturating_sub(from.max(reached));
        reached = reached.max(to);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_at_work_counts_once() {
        assert_eq!(union_ms(vec![(10, 20), (15, 30), (12, 13), (40, 45)]), 25);
        assert_eq!(union_ms(Vec::new()), 0);
    }
}
