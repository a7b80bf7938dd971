//! `capfilt doctor`: is everything there that a run needs?

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use capfilt_crawler::{SourceConfig, Web, opt_out_entries};
use capfilt_store::Store;
use serde::Serialize;
use url::{Host, Url};

use crate::args::DoctorArgs;
use crate::config::{Inputs, Models, RunConfig};
use crate::machine::{self, Disk};
use crate::models;
use crate::output::{Failure, say, say_json};

/// A name that is there for such questions (RFC 2606), for configs that name no host.
const ANY_NAME: &str = "example.com";
/// Names that no public server knows (RFC 6761).
const RESERVED: [&str; 4] = ["test", "example", "invalid", "localhost"];
/// Clocks may differ by this much before certificates and dates suffer.
const MAX_SKEW: f64 = 30.0;
/// Free bytes below which a run is likely to fail, and below which it may.
const LITTLE_DISK: [u64; 2] = [256 << 20, 10 << 30];
/// Open files beside those of connections.
const OTHER_FILES: u64 = 256;

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    Warning,
    Bad,
}

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    level: Level,
    says: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, level: Level, says: impl Into<String>) {
        self.0.push(Finding { what, level, says: says.into() });
    }

    fn note(&mut self, what: &'static str, result: Result<String, String>) {
        match result {
            Ok(says) => self.add(what, Level::Ok, says),
            Err(says) => self.add(what, Level::Bad, says),
        }
    }
}

pub(crate) async fn run(args: DoctorArgs) -> Result<ExitCode, Failure> {
    let mut findings = Findings::default();
    match args.view.config.load() {
        Err(e) => findings.note("config", Err(e.text())),
        Ok(config) => {
            findings.note("config", Ok(format!("run `{}`, {} rounds", config.run.name, config.run.rounds)));
            findings.note("threads", Ok(std::thread::available_parallelism().map_or(1, usize::from).to_string()));
            if config.run.rounds > 0 {
                let device = &config.worker.vision.device;
                findings.note("device", config.check_machine().map(|()| device.clone()).map_err(|e| e.text()));
            }
            files(&config, &mut findings);
            let says = |inputs: Inputs| {
                let (sources, clean, heldout) = (inputs.discover.len(), inputs.annotated.len(), inputs.heldout.len());
                format!("{} queries, {sources} sources, {clean} annotated and {heldout} held-out sets", inputs.queries.len())
            };
            findings.note("inputs", config.inputs().map(says).map_err(|e| e.text()));
            for (source, number) in config.discover.sources.iter().zip(1..) {
                if let Err(e) = source.probe() {
                    findings.add("sources", Level::Bad, format!("source {number}: {}", capfilt_store::chain(&e)));
                }
            }
            for (section, web) in [("discover", &config.discover.web), ("fetch", &config.fetch.web)] {
                if !web.opt_out_lists.is_empty() {
                    let says = opt_out_entries(&web.opt_out_lists).map(|n| format!("{n} entries in [{section}.web]"));
                    findings.note("opt-outs", says.map_err(|e| format!("[{section}.web]: {}", capfilt_store::chain(&e))));
                }
            }
            disk("work folder", &config.worker.runtime.work_dir, &mut findings);
            match Store::open(&config.run.store).await {
                Err(e) => findings.note("store", Err(Failure::from(e).text())),
                Ok(store) => {
                    findings.note("store", Ok(store.url().to_string()));
                    if let Ok(folder) = store.url().to_file_path() {
                        disk("store's disk", &folder, &mut findings);
                    }
                    let models = models::of_run(&config, &store, false).await;
                    let says = models.map(|Models { first, clip, .. }| match first {
                        Some((captioner, filter)) => {
                            let clip = clip.map_or_else(String::new, |clip| format!(", CLIP {}", clip.short()));
                            format!("captioner {}, filter {}{clip}", captioner.short(), filter.short())
                        }
                        None if config.run.rounds == 0 => "none are needed without rounds".to_owned(),
                        None => "the first ones are trained on what is found".to_owned(),
                    });
                    findings.note("models", says.map_err(|e| e.text()));
                }
            }
            network(&config, args.bandwidth.as_ref(), &mut findings).await;
        }
    }
    let Findings(findings) = findings;
    if args.view.json {
        say_json(&findings)?;
    } else {
        for f in &findings {
            let mark = match f.level {
                Level::Ok => "ok  ",
                Level::Warning => "warn",
                Level::Bad => "BAD ",
            };
            say(&format!("{mark}  {:<12} {}", f.what, f.says));
        }
    }
    let sound = findings.iter().all(|f| f.level != Level::Bad);
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Connections and those kept for later are open files.
fn files(config: &RunConfig, findings: &mut Findings) {
    let connections = config.worker.crawler.connections as u64;
    let wanted = connections * 4 + OTHER_FILES;
    match machine::file_limit() {
        Some(limit) if limit < wanted => {
            let says = format!("{limit} may be open, but {connections} connections can want {wanted}; raise `ulimit -n`");
            findings.add("open files", Level::Warning, says);
        }
        limit => findings.add("open files", Level::Ok, limit.map_or("without limit".to_owned(), |n| format!("{n} may be open"))),
    }
}

fn disk(what: &'static str, folder: &Path, findings: &mut Findings) {
    match Disk::of(folder) {
        Err(e) => findings.add(what, Level::Bad, format!("`{}` cannot be written: {e}", folder.display())),
        Ok(Disk { free, write_rate }) => {
            let level = match free {
                free if free < LITTLE_DISK[0] => Level::Bad,
                free if free < LITTLE_DISK[1] => Level::Warning,
                _ => Level::Ok,
            };
            let (free, rate) = (free as f64 / f64::from(1 << 30), write_rate / 1e6);
            findings.add(what, level, format!("{}: {free:.1} GiB free, writes {rate:.0} MB/s", folder.display()));
        }
    }
}

/// Names, a server, the clock by it, and bandwidth. What a run needs is bad if it fails, what it may need is a warning.
async fn network(config: &RunConfig, bandwidth: Option<&Url>, findings: &mut Findings) {
    let crawler = &config.worker.crawler;
    let web = match Web::new(crawler) {
        Ok(web) => web,
        Err(e) => return findings.add("web", Level::Bad, capfilt_store::chain(&e)),
    };
    let seed = config.discover.sources.iter().find_map(|source| match source {
        SourceConfig::Pages(pages) => pages.seeds.first().and_then(|seed| Url::parse(seed).ok()),
        _ => None,
    });
    let host = seed.as_ref().and_then(|seed| seed.host().map(|h| h.to_owned()));
    if let Some(proxy) = &crawler.proxy {
        findings.add("names", Level::Ok, format!("left to the proxy {proxy}"));
    } else {
        let name = match &host {
            Some(Host::Domain(name)) => Some((name.as_str(), Level::Bad)),
            Some(_) => None,
            None => Some((ANY_NAME, Level::Warning)),
        };
        if let Some((name, if_not)) = name {
            names(&web, config, name, if_not, findings).await;
        }
    }
    if let Some(seed) = &seed {
        server(&web, config, seed, findings).await;
    }
    if let Some(url) = bandwidth {
        match web.probe(url, &config.fetch.web.agent, Duration::from_secs(10), 1 << 30).await {
            Ok(probe) if probe.http_status == 200 => {
                let (mb, seconds) = (probe.bytes as f64 / 1e6, probe.body.as_secs_f64());
                findings.add(
                    "bandwidth",
                    Level::Ok,
                    format!("{:.1} MB/s ({mb:.1} MB in {seconds:.1} s)", mb / seconds.max(1e-9)),
                );
            }
            Ok(probe) => findings.add("bandwidth", Level::Bad, format!("{url} answers with {}", probe.http_status)),
            Err(why) => findings.add("bandwidth", Level::Bad, format!("{url}: {why}")),
        }
    }
}

/// Whether the built-in resolver finds a name, and how fast.
async fn names(web: &Web, config: &RunConfig, name: &str, if_not: Level, findings: &mut Findings) {
    let crawler = &config.worker.crawler;
    if crawler.resolve.contains_key(name) || crawler.resolve.contains_key("*") {
        return findings.add("names", Level::Ok, format!("`{name}` has a fixed address in worker.crawler.resolve"));
    }
    let begin = Instant::now();
    match web.addresses(name).await {
        Ok(found) => {
            let took = begin.elapsed().as_secs_f64() * 1e3;
            findings.add("names", Level::Ok, format!("`{name}` has {} addresses, found in {took:.0} ms", found.len()));
        }
        Err(why) => {
            let is_reserved = name.rsplit('.').next().is_some_and(|top| RESERVED.contains(&top));
            let (level, help) = if is_reserved {
                (Level::Warning, "it needs worker.crawler.proxy or worker.crawler.resolve")
            } else {
                (if_not, "check the network, or name servers in worker.crawler.dns.upstreams")
            };
            findings.add("names", level, format!("`{name}`: {why}; {help}"));
        }
    }
}

/// Whether the first seed's server answers, and what its clock says about ours.
async fn server(web: &Web, config: &RunConfig, seed: &Url, findings: &mut Findings) {
    let asked = SystemTime::now();
    match web.probe(seed, &config.discover.web.agent, config.discover.web.timeout, 0).await {
        Err(why) => findings.add("web", Level::Warning, format!("{seed}: {why}")),
        Ok(probe) => {
            let millis = probe.head.as_secs_f64() * 1e3;
            findings.add("web", Level::Ok, format!("{seed} answers with {} in {millis:.0} ms", probe.http_status));
            if let Some(date) = probe.date {
                let ahead = asked.duration_since(date).map_or_else(|e| -e.duration().as_secs_f64(), |d| d.as_secs_f64());
                let (level, says) = if ahead.abs() > MAX_SKEW {
                    let way = if ahead > 0.0 { "ahead of" } else { "behind" };
                    (Level::Warning, format!("{:.0} s {way} the server's; certificates and dates need a right one", ahead.abs()))
                } else {
                    (Level::Ok, "agrees with the server's".to_owned())
                };
                findings.add("clock", level, says);
            }
        }
    }
}
