//! `capfilt dataset takedown`, and what a sweep removes after it.

use std::io::Read as _;
use std::path::Path;

use capfilt_coordinator::takedown::{Reach, Reached, reach};
use capfilt_schemas::Takedown;
use capfilt_store::{Store, StoreError, TakenDown, Targets};
use serde_json::json;

use crate::args::TakedownArgs;
use crate::output::{Failure, count, moment, say, say_json, table};
use crate::store::open;

pub(crate) async fn run(args: TakedownArgs) -> Result<(), Failure> {
    let store = open(&args.store).await?;
    if args.list {
        return list(&store, args.store.json).await;
    }
    let mut targets = targets(&args)?;
    let mut found = reach(&store, &TakenDown::of(&[targets.takedown(0, None)])).await?;
    if args.copies {
        for digest in &found.sha256 {
            targets.add_sha256(&digest.to_string())?;
        }
        found = reach(&store, &TakenDown::of(&[targets.takedown(0, None)])).await?;
    }
    let known = store.takedowns().await?.len() as u64;
    let reason = args.reason.as_deref();
    let takedown = if args.dry_run { targets.takedown(known + 1, reason) } else { store.take_down(&targets, reason).await? };
    let fresh = takedown.number > known;
    if args.store.json {
        return say_json(&json!({ "takedown": takedown, "new": fresh, "dry_run": args.dry_run, "reach": found }));
    }
    say(&told(&takedown, &found, fresh, args.dry_run));
    Ok(())
}

fn targets(args: &TakedownArgs) -> Result<Targets, Failure> {
    let mut targets = Targets::default();
    args.url.iter().try_for_each(|url| targets.add_url(url))?;
    args.host.iter().try_for_each(|host| targets.add_host(host))?;
    args.sha256.iter().try_for_each(|digest| targets.add_sha256(digest))?;
    if let Some(path) = &args.file {
        let name = path.display();
        for (n, line) in lines(path).map_err(|e| Failure::Usage(format!("cannot read `{name}`: {e}")))?.lines().enumerate() {
            let at =
                |e: StoreError| Failure::Usage(format!("`{name}`, line {}: {e}; write an address, a host or a SHA-256", n + 1));
            targets.add_line(line).map_err(at)?;
        }
    }
    if targets.is_empty() {
        let what = "say what to take down: --url, --host, --sha256 or --file; `--list` shows the takedowns made so far";
        return Err(Failure::Usage(what.to_owned()));
    }
    Ok(targets)
}

fn lines(path: &Path) -> std::io::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        return std::io::stdin().read_to_string(&mut text).map(|_| text);
    }
    std::fs::read_to_string(path)
}

async fn list(store: &Store, as_json: bool) -> Result<(), Failure> {
    let takedowns = store.takedowns().await?;
    if as_json {
        return say_json(&takedowns);
    }
    if takedowns.is_empty() {
        say("nothing was taken down yet");
        return Ok(());
    }
    let mut rows = vec![["takedown", "made", "addresses", "hosts", "hashes", "reason"].map(str::to_owned).to_vec()];
    for t in &takedowns {
        let sizes = [t.urls.len(), t.hosts.len(), t.sha256.len()].map(|n| count(n as u64));
        let [urls, hosts, sha256] = sizes;
        rows.push(vec![t.number.to_string(), moment(t.made_at_ms), urls, hosts, sha256, t.reason.clone().unwrap_or_default()]);
    }
    say(&table(&rows));
    Ok(())
}

fn told(takedown: &Takedown, found: &Reach, fresh: bool, dry_run: bool) -> String {
    let n = takedown.number;
    let mut lines = vec![match (dry_run, fresh) {
        (true, _) => "this takedown would cover:".to_owned(),
        (false, true) => format!("takedown {n} covers:"),
        (false, false) => format!("the same was taken down before, as number {n}; it covers:"),
    }];
    let images =
        |reached: &Reached, what: &str| format!("  {} images {what}, in {} shards", count(reached.rows), count(reached.shards));
    lines.push(images(&found.samples, "from the web"));
    if found.annotated.rows > 0 {
        lines.push(images(&found.annotated, "of annotated sets (their files are outside of the store: remove them there)"));
    }
    for v in &found.versions {
        lines.push(format!("  {} pairs of {}@{}", count(v.pairs), v.dataset, v.version));
    }
    if !dry_run {
        lines.push(
            "new versions, downloads and exports leave them out from now on; next: `capfilt run` builds a version without them, \
             `capfilt store sweep` removes their bytes from the store"
                .to_owned(),
        );
        lines.push("not reached: models trained on them, exports made before, copies elsewhere".to_owned());
    }
    lines.join("\n")
}
