//! Progress: bars with rate and time left on a terminal, plain lines elsewhere. Everything goes to standard error.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use capfilt_coordinator::plan::{Plan, StageProgress};
use capfilt_crawler::Traffic;
use capfilt_runtime::{StageCounters, Telemetry};
use capfilt_schemas::StageKind;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::count;
use crate::pace::Pace;
use crate::{metrics, traffic};

/// How often a plain line is written for a stage that moves.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// All bars of the process stand in one block; messages are written above it.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
}

fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

fn line(text: &str) {
    if on_terminal() {
        let _ = bars().println(text);
    } else {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Writes log messages above the bars.
#[derive(Default)]
pub(crate) struct LogWriter(Vec<u8>);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            line(String::from_utf8_lossy(&self.0).trim_end());
        }
    }
}

/// One bar for one thing.
pub(crate) struct Bar {
    bar: ProgressBar,
    name: &'static str,
    unit: &'static str,
    began: Instant,
    last: Mutex<(Instant, u64)>,
}

impl Bar {
    pub(crate) fn new(name: &'static str, unit: &'static str) -> Self {
        let bar = bars().add(ProgressBar::new(0));
        bar.set_style(style(unit));
        bar.set_prefix(name);
        Self { bar, name, unit, began: Instant::now(), last: Mutex::new((Instant::now(), 0)) }
    }

    pub(crate) fn set(&self, done: u64, of: u64) {
        self.show(done, of, &Pace::of(self.began.elapsed(), done, of).map_or_else(String::new, |pace| pace.words()));
    }

    /// The same, with other words on how it goes.
    pub(crate) fn show(&self, done: u64, of: u64, message: &str) {
        self.bar.set_length(of.max(done));
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if !on_terminal() && done > last.1 && (last.0.elapsed() > LINE_EVERY || done == of) {
            line(format!("{:>9} {}/{} {} {message}", self.name, count(done), count(of), self.unit).trim_end());
            *last = (Instant::now(), done);
        }
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
        bars().remove(&self.bar);
    }
}

fn style(unit: &str) -> ProgressStyle {
    let template = format!("{{prefix:>9}} {{bar:24.cyan/blue}} {{human_pos}}/{{human_len}} {unit} {{msg}}");
    ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─")
}

/// The progress of a run: a bar a stage.
pub(crate) struct RunProgress {
    telemetry: Telemetry,
    traffic: Traffic,
    hourly_price: Option<f64>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    round: u32,
    bars: BTreeMap<StageKind, Shown>,
    /// Rows that were there when this process began.
    before: BTreeMap<StageKind, u64>,
}

struct Shown {
    bar: ProgressBar,
    unit: &'static str,
    /// When the stage was first seen to move, and where it stood then.
    began: Option<(Instant, u64)>,
    last_line: Option<Instant>,
    over: bool,
}

impl RunProgress {
    pub(crate) fn new(telemetry: Telemetry, traffic: Traffic, hourly_price: Option<f64>) -> Self {
        Self { telemetry, traffic, hourly_price, state: Mutex::new(State::default()) }
    }

    /// Shows a plan and what workers have done since.
    pub(crate) fn show(&self, plan: &Plan) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if plan.round != state.round {
            state.round = plan.round;
            if plan.round > 0 {
                line(&format!("round {}", plan.round));
            }
        }
        let counters = self.telemetry.snapshot();
        for (stage, progress) in &plan.progress {
            let note = if *stage == StageKind::Fetch { traffic::line(&self.traffic, self.hourly_price) } else { String::new() };
            state.stage(*stage, progress, counters.get(stage), &note);
        }
        metrics::publish(&self.traffic, self.hourly_price);
    }

    pub(crate) fn finish(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for shown in state.bars.values() {
            shown.bar.finish_and_clear();
        }
    }
}

impl State {
    fn stage(&mut self, stage: StageKind, progress: &StageProgress, counters: Option<&StageCounters>, note: &str) {
        let pending = progress.tasks > progress.done + progress.dead;
        if !pending && !self.bars.contains_key(&stage) {
            return;
        }
        let detail = counters.and_then(|c| c.detail).filter(|_| pending);
        // Rows of models and metrics tell nobody how far a stage is.
        let counted = !matches!(stage, StageKind::Train | StageKind::Evaluate);
        let by_rows = counted && (progress.rows > progress.rows_done || (progress.rows > 0 && detail.is_none()));
        // Rows of tasks under way count as well: a shard may take minutes.
        let written: u64 = counters.map_or(0, |c| c.rows.values().sum());
        let before = *self.before.entry(stage).or_insert_with(|| progress.rows_done.saturating_sub(written));
        let rows_done = progress.rows_done.max((before + written).min(progress.rows));
        let (done, of, unit) = match detail {
            Some(detail) if !by_rows => detail,
            _ if by_rows => (rows_done, progress.rows, "rows"),
            _ => (progress.done, progress.tasks, "tasks"),
        };
        let shown = self.bars.entry(stage).or_insert_with(|| {
            let bar = bars().add(ProgressBar::new(0));
            bar.set_prefix(stage.name());
            Shown { bar, unit: "", began: None, last_line: None, over: false }
        });
        if shown.unit != unit {
            shown.unit = unit;
            shown.began = None;
            shown.bar.set_style(style(unit));
        }
        shown.update(stage, (done, of), pending, progress.dead, note);
    }
}

impl Shown {
    fn update(&mut self, stage: StageKind, (done, of): (u64, u64), pending: bool, dead: u64, note: &str) {
        let (began, first) = *self.began.get_or_insert_with(|| (Instant::now(), done));
        let pace = Pace::of(began.elapsed(), done.saturating_sub(first), of.saturating_sub(first)).filter(|_| pending);
        metrics::publish_stage(stage.name(), done, of, if pending { pace.as_ref() } else { Some(&Pace::OVER) });
        let mut message = pace.map_or_else(String::new, |pace| pace.words());
        if dead > 0 {
            message = format!("{message} ({dead} given up)");
        }
        if pending && !note.is_empty() {
            message = format!("{message}  {note}");
        }
        self.bar.set_length(of.max(done));
        self.bar.set_position(done);
        self.bar.set_message(message.clone());
        if on_terminal() || (self.over && !pending) {
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() > LINE_EVERY);
        if due || !pending {
            self.last_line = Some(Instant::now());
            line(format!("{:>9} {}/{} {} {message}", stage.name(), count(done), count(of), self.unit).trim_end());
        }
        self.over = !pending;
    }
}
