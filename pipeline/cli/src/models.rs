//! `capfilt model …`

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use capfilt_schemas::{AliasEvent, Digest, StageKind};
use capfilt_store::{ROLES, Store};
use serde_json::json;

use crate::args::ModelVerb;
use crate::config::{Models, RunConfig};
use crate::output::{Failure, bytes, moment, say, say_json, table};
use crate::store::{open, open_or_make};

pub(crate) async fn run(verb: ModelVerb) -> Result<ExitCode, Failure> {
    match verb {
        ModelVerb::List(args) => {
            let store = open(&args).await?;
            let mut events = Vec::new();
            for role in ROLES {
                events.extend(store.alias_events(role).await?);
            }
            if args.json {
                say_json(&events)?;
            } else if events.is_empty() {
                say("no model plays a role yet");
            } else {
                say(&history(&events));
            }
        }
        ModelVerb::Show(args) => {
            let store = open(&args.store).await?;
            show(&store, &args.model, args.store.json).await?;
        }
        ModelVerb::Promote(args) => {
            let store = open_or_make(&args.store).await?;
            known_role(&args.role)?;
            let folder = Path::new(&args.model);
            let model = if folder.is_dir() {
                import(Some(&store), folder, &args.role).await?
            } else {
                let model = resolve(&store, &args.model).await?;
                let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
                store.write_model(&model, folder.path()).await?;
                usable(folder.path(), &args.role).with_context(|| format!("model {}", model.short()))?;
                model
            };
            let event = store.set_alias(&args.role, model, "promote", &args.reason, "", BTreeMap::new()).await?;
            tell(&event, args.store.json)?;
        }
        ModelVerb::Rollback(args) => {
            let store = open(&args.store).await?;
            known_role(&args.role)?;
            let events = store.alias_events(&args.role).await?;
            let Some(before) = before_last(&events) else {
                return Err(Failure::Usage(format!("no other model has played the role `{}` yet", args.role)));
            };
            let event = store.set_alias(&args.role, before.model, "rollback", &args.reason, "", before.metrics.clone()).await?;
            tell(&event, args.store.json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The event that the role goes back to: that before the one in force. A rollback takes the event in force off the history, so that a
/// second one goes back further.
fn before_last(events: &[AliasEvent]) -> Option<&AliasEvent> {
    let mut in_force: Vec<&AliasEvent> = Vec::new();
    for event in events {
        if event.action == "rollback" {
            in_force.pop();
        } else if in_force.last().is_none_or(|last| last.model != event.model) {
            in_force.push(event);
        }
    }
    in_force.iter().rev().nth(1).copied()
}

/// The checkpoint folder that a person means by `name`.
///
/// # Errors
/// There is no such folder.
pub(crate) fn open_model(name: &str) -> Result<PathBuf, Failure> {
    let folder = PathBuf::from(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    Err(Failure::Usage(format!("there is no folder `{name}`; give a checkpoint folder as a model")))
}

/// The models of the first round: checkpoint folders, put into the store if `write`, or whatever plays the role there. None if the run
/// has no rounds.
pub(crate) async fn of_run(config: &RunConfig, store: &Store, write: bool) -> Result<Option<Models>, Failure> {
    let Some(named) = config.models.as_ref().filter(|_| config.run.rounds > 0) else { return Ok(None) };
    let mut digests = Vec::new();
    for (role, model) in ROLES.iter().zip([&named.captioner, &named.filter]) {
        if model == "promoted" {
            let event = store.model_in_role(role).await?;
            let event =
                event.ok_or_else(|| Failure::Usage(format!("models.{role} is `promoted`, but no model plays that role yet")))?;
            digests.push(event.model);
            continue;
        }
        let digest = import(write.then_some(store), Path::new(model), role).await?;
        if write && store.model_in_role(role).await?.is_none() {
            let reason = format!("first model of run {}", config.run.name);
            store.set_alias(role, digest, "import", &reason, &format!("import/{digest}"), Default::default()).await?;
        }
        digests.push(digest);
    }
    let clip = match &named.clip {
        Some(folder) => Some(import(write.then_some(store), Path::new(folder), "clip").await?),
        None => None,
    };
    Ok(Some(Models { captioner: digests[0], filter: digests[1], clip }))
}

/// A run keeps the models that its first round began with: a config that names others would be obeyed in nothing.
pub(crate) async fn same_as_begun(config: &RunConfig, store: &Store, models: Option<&Models>) -> Result<(), Failure> {
    let (Some(named), Some(models)) = (&config.models, models) else { return Ok(()) };
    let rounds = store.rounds(&config.run.name).await?;
    let Some(first) = rounds.iter().find(|record| record.round == 1) else { return Ok(()) };
    let pairs =
        [(&named.captioner, models.captioner, first.captioner, ROLES[0]), (&named.filter, models.filter, first.filter, ROLES[1])];
    for (named, now, then, role) in pairs {
        if named != "promoted" && now != then {
            let (run, now, then) = (&config.run.name, now.short(), then.short());
            let what = format!("run `{run}` began with the {role} {then}, but models.{role} is {now} now");
            return Err(Failure::Usage(format!("{what}; give a run with other models another `run.name`")));
        }
    }
    Ok(())
}

/// Tells a checkpoint folder's digest, and puts it into the store, if one is given and has it not.
async fn import(store: Option<&Store>, folder: &Path, role: &str) -> Result<Digest, Failure> {
    usable(folder, role)?;
    let mut files = BTreeMap::new();
    for name in capfilt_store::CHECKPOINT_FILES {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        files.insert((*name).to_owned(), bytes);
    }
    // SigLIP's padding.
    if role == "clip"
        && let Ok(bytes) = std::fs::read(folder.join("tokenizer_config.json"))
    {
        files.insert("tokenizer_config.json".to_owned(), bytes);
    }
    let model = Store::open("memory:").await?.put_model(&files).await?;
    if let Some(store) = store
        && !store.holds(&model).await?
    {
        store.put_model(&files).await?;
    }
    Ok(model.digest)
}

fn usable(folder: &Path, role: &str) -> anyhow::Result<()> {
    capfilt_vision::check_checkpoint(folder, role).with_context(|| format!("`{}` is no usable {role}", folder.display()))
}

fn known_role(role: &str) -> Result<(), Failure> {
    if ROLES.contains(&role) {
        return Ok(());
    }
    Err(Failure::Usage(format!("no role `{role}`; the roles are {}", ROLES.join(" and "))))
}

/// The model that a role or the first characters of a digest mean.
async fn resolve(store: &Store, name: &str) -> Result<Digest, Failure> {
    if ROLES.contains(&name) {
        let event = store.model_in_role(name).await?;
        return event.map(|e| e.model).ok_or_else(|| Failure::Usage(format!("no model plays the role `{name}` yet")));
    }
    let mut known = BTreeSet::new();
    for role in ROLES {
        known.extend(store.alias_events(role).await?.into_iter().map(|e| e.model));
    }
    for commit in store.commits(StageKind::Train).await? {
        known.extend(commit.outputs.iter().map(|o| o.digest));
    }
    let found: Vec<Digest> = known.into_iter().filter(|d| d.to_string().starts_with(name)).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Failure::Usage(format!("no model `{name}` in the store; give a role, a digest or a checkpoint folder"))),
        _ => Err(Failure::Usage(format!("`{name}` fits {} models; give more characters", found.len()))),
    }
}

async fn show(store: &Store, name: &str, as_json: bool) -> Result<(), Failure> {
    let digest = resolve(store, name).await?;
    let files = store.get_model(&digest).await?;
    let mut events = Vec::new();
    for role in ROLES {
        events.extend(store.alias_events(role).await?.into_iter().filter(|e| e.model == digest));
    }
    let trained = store.commits(StageKind::Train).await?.into_iter().find(|c| c.outputs.iter().any(|o| o.digest == digest));
    let config: serde_json::Value = files.get("config.json").and_then(|b| serde_json::from_slice(b).ok()).unwrap_or_default();
    if as_json {
        let sizes: BTreeMap<_, _> = files.iter().map(|(n, b)| (n, b.len())).collect();
        return say_json(&json!({
            "digest": digest, "files": sizes, "config": config, "events": events,
            "trained_by": trained.map(|c| c.task_id),
        }));
    }
    say(&format!("model {digest}"));
    match trained {
        Some(c) => say(&format!("trained by task {} of run {}, {}", c.task_id, c.run, moment(c.committed_at_ms))),
        None => say("imported"),
    }
    for (file, content) in &files {
        say(&format!("  {file}  {}", bytes(content.len() as u64)));
    }
    if !events.is_empty() {
        say(&history(&events));
    }
    Ok(())
}

fn tell(event: &AliasEvent, as_json: bool) -> Result<(), Failure> {
    if as_json {
        return say_json(event);
    }
    say(&format!("{} is now played by {} ({})", event.role, event.model.short(), event.action));
    Ok(())
}

fn history(events: &[AliasEvent]) -> String {
    let mut rows = vec![["role", "no", "model", "action", "when", "why"].map(str::to_owned).to_vec()];
    for e in events {
        let number = e.number.to_string();
        rows.push(vec![e.role.clone(), number, e.model.short(), e.action.clone(), moment(e.created_at_ms), e.reason.clone()]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rollback_goes_further_back() {
        let event = |number: u64, model: &str, action: &str| AliasEvent {
            role: "filter".to_owned(),
            number,
            model: Digest::of(model.as_bytes()),
            action: action.to_owned(),
            reason: String::new(),
            key: String::new(),
            metrics: BTreeMap::new(),
            created_at_ms: number,
        };
        let mut events =
            vec![event(1, "a", "import"), event(2, "b", "promote"), event(3, "b", "promote"), event(4, "c", "promote")];
        let back = |events: &[AliasEvent]| before_last(events).map(|e| e.model);
        for (number, model) in [(5, "b"), (6, "a")] {
            assert_eq!(back(&events), Some(Digest::of(model.as_bytes())));
            events.push(event(number, model, "rollback"));
        }
        assert_eq!(back(&events), None);
        events.push(event(7, "d", "promote"));
        assert_eq!(back(&events), Some(Digest::of(b"a")));
    }
}
