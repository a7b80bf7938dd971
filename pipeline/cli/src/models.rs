//! `capfilt model …`

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use capfilt_schemas::{AliasEvent, Digest, StageKind};
use capfilt_store::{IMPORTED, ROLES, Store};
use capfilt_vision::files::{Files, member_folders};
use serde_json::json;
use tempfile::TempDir;

use crate::args::ModelVerb;
use crate::config::{Models, ModelsSection, RunConfig};
use crate::hub::{Hub, HubName};
use crate::output::{Failure, bytes, moment, say, say_json, table};
use crate::store::{open, open_or_make};

pub(crate) async fn run(verb: ModelVerb) -> Result<ExitCode, Failure> {
    match verb {
        ModelVerb::List(args) => {
            let store = open(&args).await?;
            let mut events = Vec::new();
            for role in lists() {
                events.extend(store.alias_events(role).await?);
            }
            if args.json {
                say_json(&events)?;
            } else if events.is_empty() {
                say("there are no models yet");
            } else {
                say(&history(&events));
            }
        }
        ModelVerb::Show(args) => {
            let store = open(&args.store).await?;
            show(&store, &args.model, args.store.json).await?;
        }
        ModelVerb::Import(args) => {
            let store = open_or_make(&args.store).await?;
            if let Some(role) = &args.role {
                known_role(role)?;
            }
            let source = Source::of_argument(&args.model)?;
            let folder = checkpoint(&source, Some(&store)).await?;
            let digest = import(Some(&store), &source, &folder.path, args.role.as_deref()).await?;
            let role = args.role.as_deref().unwrap_or(IMPORTED);
            let key = format!("import/{digest}");
            let event = store.set_alias(role, digest, "import", &format!("from {source}"), &key, BTreeMap::new()).await?;
            match args.store.json {
                true => say_json(&event)?,
                false => say(&digest.to_string()),
            }
        }
        ModelVerb::Export(args) => {
            let store = open(&args.store).await?;
            let model = checkpoint(&Source::of_argument(&args.model)?, Some(&store)).await?;
            let members = member_folders(&model.path).concat();
            let Some(member) = members.get(args.member) else {
                let (model, wanted, last) = (&args.model, args.member, members.len() - 1);
                return Err(Failure::Usage(format!("`{model}` has no member {wanted}; its last one is {last}")));
            };
            export(member, &args.folder, args.overwrite)?;
            if args.store.json {
                say_json(&json!({ "folder": args.folder }))?;
            } else {
                say(&format!("written to {}", args.folder.display()));
            }
        }
        ModelVerb::Promote(args) => {
            let store = open_or_make(&args.store).await?;
            known_role(&args.role)?;
            let source = Source::of_argument(&args.model)?;
            let folder = checkpoint(&source, Some(&store)).await?;
            let model = match &source {
                Source::Store(name) => {
                    let model = resolve(&store, name).await?;
                    usable(&source, &folder.path, Some(&args.role))?;
                    model
                }
                _ => import(Some(&store), &source, &folder.path, Some(&args.role)).await?,
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

/// Where a model comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// A local folder.
    Folder(PathBuf),
    /// A repository of the Hugging Face hub.
    Hub(HubName),
    /// A model of the store: a role, or the first characters of a digest.
    Store(String),
    /// What plays the role in the store when the run begins.
    Promoted,
}

impl Source {
    /// What a name on the command line means. `hf:` before a name makes it one of the hub, a leading `/` or `.` a folder. Without
    /// either, what is a folder is a folder, what has one `/` is a name of the hub, and anything else one of the store.
    pub(crate) fn of_argument(text: &str) -> Result<Self, Failure> {
        match Self::by_form(text, Path::new(""))? {
            Some(source) => Ok(source),
            None => Ok(Self::Store(text.to_owned())),
        }
    }

    /// What a name in a config means, the same with three differences: folders start from the config's, `promoted` is what plays the
    /// role, and what is neither a name of the hub nor like a digest is a folder, even if it is not there.
    pub(crate) fn of_config(text: &str, folder: &Path) -> Result<Self, Failure> {
        if text == "promoted" {
            return Ok(Self::Promoted);
        }
        let digest = (6..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        match Self::by_form(text, folder)? {
            Some(source) => Ok(source),
            None if digest => Ok(Self::Store(text.to_owned())),
            None => Ok(Self::Folder(folder.join(text))),
        }
    }

    fn by_form(text: &str, folder: &Path) -> Result<Option<Self>, Failure> {
        if let Some(name) = text.strip_prefix("hf:") {
            let hub = HubName::parse(name).map(Self::Hub);
            let what = "is no name of the hub; it has the form `hf:owner/name` or `hf:owner/name@revision`";
            return hub.map(Some).ok_or_else(|| Failure::Usage(format!("`{text}` {what}")));
        }
        let path = folder.join(text);
        if text.starts_with(['/', '.']) || path.is_dir() {
            return Ok(Some(Self::Folder(path)));
        }
        Ok(HubName::parse(text).map(Self::Hub))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Hub(name) => write!(f, "hf:{name}"),
            Self::Store(name) => f.write_str(name),
            Self::Promoted => f.write_str("promoted"),
        }
    }
}

/// A folder with a checkpoint, there for as long as this is kept.
pub(crate) struct CheckpointFolder {
    pub(crate) path: PathBuf,
    _copy: Option<TempDir>,
}

/// The folder of a model: itself, the hub's cache, or a copy out of the store.
pub(crate) async fn checkpoint(source: &Source, store: Option<&Store>) -> Result<CheckpointFolder, Failure> {
    match (source, store) {
        (Source::Folder(path), _) => Ok(CheckpointFolder { path: path.clone(), _copy: None }),
        (Source::Hub(name), _) => {
            let read = || format!("`{name}` is read as a name of the hub; a folder would have to exist, or to begin with `./`");
            let path = Hub::from_env()?.checkpoint(name).await.with_context(read)?;
            Ok(CheckpointFolder { path, _copy: None })
        }
        (Source::Store(name), Some(store)) => {
            let model = resolve(store, name).await?;
            let copy = tempfile::tempdir().context("cannot make a temporary folder")?;
            store.write_model(&model, copy.path()).await?;
            Ok(CheckpointFolder { path: copy.path().to_owned(), _copy: Some(copy) })
        }
        (Source::Store(_) | Source::Promoted, _) => {
            let what = "is neither a folder nor a name of the hub (`owner/name`); for a model of a store, name it with --store";
            Err(Failure::Usage(format!("`{source}` {what}")))
        }
    }
}

/// The models that a run is given: checkpoints, put into the store if `write`, or what is there already. None if the run has no rounds.
pub(crate) async fn of_run(config: &RunConfig, store: &Store, write: bool) -> Result<Models, Failure> {
    let named = &config.models;
    if config.run.rounds == 0 {
        return Ok(Models::default());
    }
    let digest = async |what: &str, model: &str| -> Result<Digest, Failure> {
        let source = Source::of_config(model, Path::new(""))?;
        match &source {
            Source::Promoted if ROLES.contains(&what) => {
                let event = store.model_in_role(what).await?;
                let missing = || Failure::Usage(format!("models.{what} is `promoted`, but no model plays that role yet"));
                Ok(event.ok_or_else(missing)?.model)
            }
            Source::Promoted => Err(Failure::Usage(format!("models.{what} is `promoted`, but it plays no role"))),
            Source::Store(name) => {
                usable(&source, &checkpoint(&source, Some(store)).await?.path, Some(what))?;
                resolve(store, name).await
            }
            Source::Folder(_) | Source::Hub(_) => {
                let folder = checkpoint(&source, None).await?;
                import(write.then_some(store), &source, &folder.path, Some(what)).await
            }
        }
    };
    let first = match named.captioner.as_ref().zip(named.filter.as_ref()) {
        Some((captioner, filter)) => Some((digest(ROLES[0], captioner).await?, digest(ROLES[1], filter).await?)),
        None => None,
    };
    let clip = match &named.clip {
        Some(model) => Some(digest("clip", model).await?),
        None => None,
    };
    for (role, digest) in ROLES.iter().zip(first.into_iter().flat_map(|(captioner, filter)| [captioner, filter])) {
        if write && store.model_in_role(role).await?.is_none() {
            let reason = format!("first model of run {}", config.run.name);
            store.set_alias(role, digest, "import", &reason, &format!("import/{digest}"), Default::default()).await?;
        }
    }
    Ok(Models { first, clip, pretrained: pretrained(config, store, write).await? })
}

/// By role and setting, the files that fresh models begin with, put into the store if `write`.
async fn pretrained(config: &RunConfig, store: &Store, write: bool) -> Result<BTreeMap<(String, &'static str), Digest>, Failure> {
    let mut pretrained = BTreeMap::new();
    for (role, setting, weights) in config.weights() {
        let source = Source::of_config(weights, Path::new(""))?;
        if !matches!(source, Source::Folder(_) | Source::Hub(_)) {
            let what = "is neither a folder nor a repository of the hub (`owner/name`)";
            return Err(Failure::Usage(format!("train.{role}.{setting}: `{source}` {what}")));
        }
        let folder = checkpoint(&source, None).await?;
        let files = Files::of_folder(&folder.path)
            .map_err(|e| Failure::Usage(format!("train.{role}.{setting} cannot be read: {}", capfilt_store::chain(&e))))?;
        if files.is_sharded() {
            return Err(Failure::Usage(format!(
                "train.{role}.{setting}: `{source}` has its weights in shards; name one with a single file"
            )));
        }
        let names: Vec<&str> = [&files.weights].into_iter().chain(&files.small).map(String::as_str).collect();
        pretrained.insert((role.to_owned(), setting), stored(write.then_some(store), &folder.path, &names).await?);
    }
    Ok(pretrained)
}

/// A run keeps the models that its first round began with: a config that names others would be obeyed in nothing.
pub(crate) async fn same_as_begun(config: &RunConfig, store: &Store, models: &Models) -> Result<(), Failure> {
    let Some((captioner, filter)) = models.first else { return Ok(()) };
    let rounds = store.rounds(&config.run.name).await?;
    let Some(first) = rounds.iter().find(|record| record.round == 1) else { return Ok(()) };
    let ModelsSection { captioner: named_captioner, filter: named_filter, .. } = &config.models;
    let pairs = [(named_captioner, captioner, first.captioner, ROLES[0]), (named_filter, filter, first.filter, ROLES[1])];
    for (named, now, then, role) in pairs {
        if named.as_deref() != Some("promoted") && now != then {
            let (run, now, then) = (&config.run.name, now.short(), then.short());
            let what = format!("run `{run}` began with the {role} {then}, but models.{role} is {now} now");
            return Err(Failure::Usage(format!("{what}; give a run with other models another `run.name`")));
        }
    }
    Ok(())
}

/// Tells a checkpoint folder's digest, and puts it into the store, if one is given and has it not. What is not in the layout of the store
/// is brought into it.
async fn import(store: Option<&Store>, source: &Source, folder: &Path, role: Option<&str>) -> Result<Digest, Failure> {
    usable(source, folder, role)?;
    if member_folders(folder).concat().len() > 1 {
        return Err(Failure::Usage(format!(
            "`{source}` holds several members of a model, which only the store keeps together; name one of them"
        )));
    }
    let written;
    let names = capfilt_vision::stored_files(folder).context("cannot read the checkpoint")?;
    let as_stored = names.iter().all(|name| folder.join(name).is_file());
    let folder = if as_stored {
        folder
    } else {
        written = tempfile::tempdir().context("cannot make a temporary folder")?;
        capfilt_vision::write_checkpoint(folder, written.path())
            .context("cannot bring the checkpoint into the store's layout")?;
        written.path()
    };
    stored(store, folder, &names).await
}

/// Tells the digest of files of a folder, and puts them into the store, if one is given and has them not.
async fn stored(store: Option<&Store>, folder: &Path, names: &[&str]) -> Result<Digest, Failure> {
    let model = Store::open("memory:").await?.put_files(folder, names).await?;
    if let Some(store) = store
        && !store.holds(&model).await?
    {
        store.put_files(folder, names).await?;
    }
    Ok(model.digest)
}

/// Writes the checkpoint in a folder into another, as transformers opens it. It appears whole. Only a checkpoint is ever replaced.
fn export(model: &Path, target: &Path, overwrite: bool) -> Result<(), Failure> {
    let cannot = || format!("cannot write `{}`", target.display());
    let refused = |what: String| Err(Failure::Usage(format!("`{}` {what}", target.display())));
    let absolute = std::path::absolute(target).with_context(cannot)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return refused("is no folder that could be written; name a new one".to_owned());
    };
    // Named by the target, so that what a killed export left is found by the next one.
    let aside = parent.join(format!(".{}.capfilt-export", name.to_string_lossy()));
    let (new, old) = (aside.join("new"), aside.join("old"));
    if old.exists() && !absolute.exists() {
        std::fs::rename(&old, &absolute).with_context(cannot)?;
    }
    if absolute.is_symlink() || absolute.is_file() {
        return refused("is no folder; name one".to_owned());
    }
    let there = absolute.exists();
    if there {
        let entries =
            std::fs::read_dir(&absolute).and_then(|all| all.map(|entry| entry.map(|entry| entry.file_name())).collect());
        let mut entries: Vec<OsString> = entries.with_context(cannot)?;
        entries.sort_unstable();
        if !entries.is_empty() && !overwrite {
            return refused("is not empty; --overwrite replaces a checkpoint".to_owned());
        }
        if let Some(foreign) = entries.iter().find(|entry| !capfilt_vision::is_checkpoint_file(entry)) {
            return refused(format!(
                "holds `{}`, which is of no checkpoint written here; name another folder",
                foreign.display()
            ));
        }
    }
    if aside.exists() {
        std::fs::remove_dir_all(&aside).with_context(cannot)?;
    }
    std::fs::create_dir_all(&aside).with_context(cannot)?;
    let written = (|| {
        capfilt_vision::write_checkpoint(model, &new).with_context(cannot)?;
        if there {
            std::fs::rename(&absolute, &old).with_context(cannot)?;
        }
        std::fs::rename(&new, &absolute).with_context(cannot).inspect_err(|_| {
            if there {
                _ = std::fs::rename(&old, &absolute);
            }
        })
    })();
    _ = std::fs::remove_dir_all(&aside);
    Ok(written?)
}

fn usable(source: &Source, folder: &Path, role: Option<&str>) -> anyhow::Result<()> {
    let what = role.unwrap_or("checkpoint");
    capfilt_vision::check_checkpoint(folder, role).with_context(|| format!("`{source}` is no usable {what}"))
}

/// The roles, and the list of models without one.
fn lists() -> impl Iterator<Item = &'static str> {
    ROLES.iter().copied().chain([IMPORTED])
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
    for role in lists() {
        known.extend(store.alias_events(role).await?.into_iter().map(|e| e.model));
    }
    for commit in store.commits(StageKind::Train).await? {
        known.extend(commit.outputs.iter().map(|o| o.digest));
    }
    let found: Vec<Digest> = known.into_iter().filter(|d| !name.is_empty() && d.to_string().starts_with(name)).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Failure::Usage(format!(
            "no model `{name}` in the store; give a role, a digest, a checkpoint folder or a name of the hub (`owner/name`)"
        ))),
        _ => Err(Failure::Usage(format!("`{name}` fits {} models; give more characters", found.len()))),
    }
}

/// The files of a model, those of all members, and how long they are.
fn file_sizes(folder: &Path) -> std::io::Result<BTreeMap<String, u64>> {
    let mut sizes = BTreeMap::new();
    for member in member_folders(folder).concat() {
        for entry in std::fs::read_dir(&member)? {
            let (path, data) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            if let Some(name) = path.strip_prefix(folder).ok().filter(|_| data.is_file()) {
                sizes.insert(name.display().to_string(), data.len());
            }
        }
    }
    Ok(sizes)
}

async fn show(store: &Store, name: &str, as_json: bool) -> Result<(), Failure> {
    let digest = resolve(store, name).await?;
    let folder = checkpoint(&Source::Store(name.to_owned()), Some(store)).await?;
    let kind = capfilt_vision::kind_of(&folder.path).unwrap_or("no usable checkpoint");
    let members = member_folders(&folder.path).concat().len();
    let sizes = file_sizes(&folder.path).context("cannot read the model")?;
    let mut events = Vec::new();
    for role in lists() {
        events.extend(store.alias_events(role).await?.into_iter().filter(|e| e.model == digest));
    }
    let trained = store.commits(StageKind::Train).await?.into_iter().find(|c| c.outputs.iter().any(|o| o.digest == digest));
    let config = std::fs::read(folder.path.join("config.json")).ok();
    let config: serde_json::Value = config.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    if as_json {
        return say_json(&json!({
            "digest": digest, "kind": kind, "members": members, "files": sizes, "config": config, "events": events,
            "trained_by": trained.map(|c| c.task_id),
        }));
    }
    say(&format!("model {digest}: {kind}"));
    match trained {
        Some(c) => say(&format!("trained by task {} of run {}, {}", c.task_id, c.run, moment(c.committed_at_ms))),
        None => say("imported"),
    }
    if members > 1 {
        say(&format!("{members} members: each judges pairs that it was not trained on"));
    }
    for (file, size) in &sizes {
        say(&format!("  {file}  {}", bytes(*size)));
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
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_export_appears_whole_and_replaces_a_checkpoint_alone() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints/captioner");
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let refused = |target: &Path, overwrite: bool| match export(&model, target, overwrite) {
            Err(Failure::Usage(why)) => why,
            other => panic!("{other:?}"),
        };
        export(&model, &path("new/folder"), false).unwrap();
        let whole = |folder: &Path| capfilt_vision::check_checkpoint(folder, Some("captioner")).is_ok();
        assert!(whole(&path("new/folder")));
        assert!(refused(&path("new/folder"), false).contains("--overwrite"));
        export(&model, &path("new/folder"), true).unwrap();
        assert!(whole(&path("new/folder")));

        // What is no checkpoint stays, whatever is asked for.
        std::fs::create_dir(path("store")).unwrap();
        std::fs::write(path("store/store.json"), "{}").unwrap();
        assert!(refused(&path("store"), true).contains("store.json"));
        std::fs::write(path("a file"), "mine").unwrap();
        assert!(refused(&path("a file"), true).contains("no folder"));
        assert_eq!(std::fs::read_to_string(path("a file")).unwrap(), "mine");
        std::os::unix::fs::symlink(path("store"), path("link")).unwrap();
        assert!(refused(&path("link"), true).contains("no folder"));

        // Killed after the old checkpoint had gone aside: the next export begins by putting it back.
        let aside = path("new/.folder.capfilt-export");
        std::fs::create_dir_all(&aside).unwrap();
        std::fs::rename(path("new/folder"), aside.join("old")).unwrap();
        assert!(refused(&path("new/folder"), false).contains("--overwrite"));
        export(&model, &path("new/folder"), true).unwrap();
        assert!(whole(&path("new/folder")) && !aside.exists());
    }

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
