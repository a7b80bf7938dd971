//! What the benches share: how a measurement is repeated, printed and kept.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;

/// That of the program, so that benches measure what it does.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Its settings: large buffers are kept for the next like small ones, for a minute, and lie in large pages. Training is then up to a third faster.
#[cfg(not(target_env = "msvc"))]
#[allow(unsafe_code, reason = "the name under which the allocator looks for its settings")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_SETTINGS: &[u8; 53] = b"oversize_threshold:0,dirty_decay_ms:60000,thp:always\0";

/// Figures of one bench, larger is better, in the order in which they were taken.
pub struct Figures<'a> {
    /// The bench: the name of its line and of its file `target/bench/<name>.jsonl`.
    pub name: &'a str,
    /// What the figures count, for a second: `images/s/core`.
    pub unit: &'a str,
    /// Our figures.
    pub ours: Vec<f64>,
    /// The peer and its figures, each taken right after ours.
    pub peer: Option<(String, Vec<f64>)>,
}

impl Figures<'_> {
    /// Prints a line for a person and appends one of JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn report(&self) -> std::io::Result<()> {
        let ours = Spread::of(&self.ours);
        let pairs: Option<Vec<f64>> =
            self.peer.as_ref().map(|(_, peer)| self.ours.iter().zip(peer).map(|(a, b)| a / b).collect());
        let ratio = pairs.as_ref().map(|p| Spread::of(p));
        let mut line = format!("{:<10} {ours} {}", self.name, self.unit);
        if let (Some((name, figures)), Some(ratio)) = (&self.peer, &ratio) {
            line = format!("{line}   {name} {}   ratio {ratio}", Spread::of(figures));
        }
        let record = json!({
            "name": self.name,
            "unit": self.unit,
            "ours": ours.median,
            "ours_all": self.ours,
            "peer": self.peer.as_ref().map(|(name, figures)| json!({"name": name, "figure": Spread::of(figures).median, "all": figures})),
            "ratio": ratio.as_ref().map(|r| r.median),
            "ratio_pairs": pairs,
            "machine": machine(),
        });
        let folder = target_folder().join("bench");
        std::fs::create_dir_all(&folder)?;
        let mut file = OpenOptions::new().create(true).append(true).open(folder.join(format!("{}.jsonl", self.name)))?;
        writeln!(file, "{record}")?;
        writeln!(std::io::stdout(), "{line}\n{record}")
    }
}

/// Median, least and largest.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = if n == 0 { f64::NAN } else { (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0 };
        Self { median, least: sorted.first().copied().unwrap_or(f64::NAN), most: sorted.last().copied().unwrap_or(f64::NAN) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }
}

/// The processor and how many of it, as the operating system names them.
fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split(": ").nth(1)).unwrap_or("unknown");
    format!("{model} × {}", std::thread::available_parallelism().map_or(1, usize::from))
}

/// Cargo's target folder: the bench's program stands in `<target>/<profile>/deps`.
fn target_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.ancestors().nth(3).map_or_else(|| PathBuf::from("target"), Path::to_path_buf)
}

/// CPU seconds, user and system, that this process has used, and those of its children that it has waited for.
#[must_use]
pub fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 to 17, counted after the name in parentheses, in clock ticks of 1/100 s.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (11..=14).map(ticks).sum::<f64>() / 100.0
}
