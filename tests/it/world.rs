//! A small world for the program: a web site on loopback with pictures and pages, clean pairs, a config, and the program itself.

use std::fmt::Write as _;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::body::Body;
use axum::http::{Response, StatusCode, Uri};
use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

/// What the site's pictures can be called.
const COLOURS: [(&str, [u8; 3]); 6] = [
    ("red", [210, 40, 40]),
    ("green", [40, 170, 60]),
    ("blue", [50, 70, 210]),
    ("yellow", [230, 210, 50]),
    ("grey", [130, 130, 130]),
    ("pink", [240, 150, 190]),
];
const SHAPES: [&str; 4] = ["square", "circle", "cross", "stripes"];

/// The world; it ends when dropped.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) site: String,
    requests: Arc<AtomicU64>,
    outage: Arc<AtomicBool>,
    _server: tokio::runtime::Runtime,
}

/// Picture `n`: a shape in a colour on a background, all by its number. `noise` makes different bytes of what looks alike.
pub(crate) fn picture(n: usize, noise: u8) -> (RgbImage, String) {
    let (colour_name, colour) = COLOURS[n % COLOURS.len()];
    let shape = SHAPES[n / COLOURS.len() % SHAPES.len()];
    let seed = u32::try_from(n * 2_654_435_761 % 1_000_003).unwrap();
    let (cx, cy) = (20 + seed % 56, 20 + seed / 56 % 56);
    let r = 10 + i64::from(seed / 3 % 14);
    let image = RgbImage::from_fn(96, 96, |x, y| {
        let (dx, dy) = (i64::from(x) - i64::from(cx), i64::from(y) - i64::from(cy));
        let inside = match shape {
            "square" => dx.abs() < r && dy.abs() < r,
            "circle" => dx * dx + dy * dy < r * r,
            "cross" => (dx.abs() < r / 3 && dy.abs() < r) || (dy.abs() < r / 3 && dx.abs() < r),
            _ => (dx + dy).rem_euclid(8) < 4 && dx.abs() < r && dy.abs() < r,
        };
        let back =
            [u8::try_from(200 + x % 40).unwrap(), u8::try_from(255 - y / 2).unwrap(), u8::try_from(180 + seed % 60).unwrap()];
        let base = if inside { colour } else { back };
        Rgb(base.map(|c| c.wrapping_add(noise)))
    });
    (image, format!("a {colour_name} {shape} number {n}"))
}

pub(crate) fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// The text beside a picture on the site: every third is of another one.
fn alt(i: usize) -> String {
    picture(if i % 3 == 2 { i + 7 } else { i }, 0).1
}

/// The answer of the site to a path.
fn answer(path: &str, pictures: usize) -> Response<Body> {
    let page =
        |html: String| Response::builder().header("content-type", "text/html; charset=utf-8").body(Body::from(html)).unwrap();
    let status = |code: StatusCode| Response::builder().status(code).body(Body::from("no")).unwrap();
    let file = path.rsplit('/').next().unwrap_or_default();
    match path {
        "/" => {
            let links = (0..pictures.div_ceil(10)).fold(String::new(), |mut s, p| {
                let _ = write!(s, "<a href=\"/page/{p}.html\">page {p}</a> ");
                s
            });
            page(format!("<!doctype html><title>site</title>{links}<a href='/closed/secret.html'>closed</a>"))
        }
        "/robots.txt" => Response::new(Body::from("User-agent: *\nDisallow: /closed/\n")),
        _ if path.starts_with("/page/") => {
            let n: usize = file.trim_end_matches(".html").parse().unwrap_or(usize::MAX);
            let mut html = format!("<!doctype html><title>page {n}</title>");
            for i in (n.saturating_mul(10)..pictures).take(10) {
                // Every seventh picture is there twice.
                let text = alt(i);
                let _ = write!(html, "<figure><img src=\"../img/{i}.png\" alt=\"{text}\"></figure>");
                if i % 7 == 0 {
                    let _ = write!(html, "<img src=\"/img/copy-{i}.png\" alt=\"{text} again\">");
                }
            }
            page(format!(
                "{html}<img src='/img/gone.png' alt='a red square that is gone'><img src='/img/broken.png' alt='a blue circle that is broken'>"
            ))
        }
        "/img/gone.png" => status(StatusCode::NOT_FOUND),
        "/img/broken.png" => {
            Response::builder().header("content-type", "image/png").body(Body::from(&b"\x89PNG\r\n\x1a\nbroken"[..])).unwrap()
        }
        _ if path.starts_with("/img/") => {
            let n = file.trim_start_matches("copy-").trim_end_matches(".png").parse();
            n.map_or_else(
                |_| status(StatusCode::NOT_FOUND),
                |n| Response::new(Body::from(encode(&picture(n, 0).0, ImageFormat::Png))),
            )
        }
        _ => status(StatusCode::NOT_FOUND),
    }
}

/// The answer during an outage, to some of the pictures.
fn busy(path: &str) -> Option<Response<Body>> {
    let n: usize = path.strip_prefix("/img/")?.strip_suffix(".png")?.parse().ok()?;
    let code = match n % 4 {
        1 => StatusCode::SERVICE_UNAVAILABLE,
        2 => StatusCode::TOO_MANY_REQUESTS,
        _ => return None,
    };
    Some(Response::builder().status(code).body(Body::from("later")).unwrap())
}

impl World {
    /// A site of `pictures` pictures, and clean and held-out sets of 30 others each.
    pub(crate) fn new(pictures: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let requests = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&requests);
        let listener = server.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let site = format!("http://{}", listener.local_addr().unwrap());
        let outage = Arc::new(AtomicBool::new(false));
        let out = Arc::clone(&outage);
        let app = axum::Router::new().fallback(move |uri: Uri| {
            counted.fetch_add(1, Ordering::Relaxed);
            let down = out.load(Ordering::Relaxed).then(|| busy(uri.path())).flatten();
            async move { down.unwrap_or_else(|| answer(uri.path(), pictures)) }
        });
        server.spawn(async move { axum::serve(listener, app).await });
        let world = Self { folder, site, requests, outage, _server: server };
        world.clean_set("clean", 1_000, 30);
        world.clean_set("held", 2_000, 30);
        let words = COLOURS.iter().map(|(c, _)| *c).chain(SHAPES).collect::<Vec<_>>().join("\n");
        std::fs::write(world.path("queries.txt"), words).unwrap();
        std::fs::write(world.path("run.toml"), world.config()).unwrap();
        world
    }

    fn clean_set(&self, name: &str, first: usize, count: usize) {
        let folder = self.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        let (mut images, mut annotations) = (Vec::new(), Vec::new());
        for n in first..first + count {
            let (image, text) = picture(n, 0);
            let file = format!("{n}.png");
            std::fs::write(folder.join(&file), encode(&image, ImageFormat::Png)).unwrap();
            images.push(json!({"id": n, "file_name": file, "width": 96, "height": 96}));
            annotations.push(json!({"id": n, "image_id": n, "caption": text}));
        }
        let doc = json!({"images": images, "annotations": annotations});
        std::fs::write(folder.join("captions.json"), doc.to_string()).unwrap();
    }

    fn config(&self) -> String {
        let checkpoints = Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints");
        let checkpoints = checkpoints.canonicalize().expect("tests/checkpoints is in the repository");
        format!(
            r#"
[run]
name = "test"
store = "store"
snapshot = "1"
rounds = 2
[queries]
path = "queries.txt"
[[discover.sources]]
kind = "pages"
seeds = ["{site}/"]
[balance]
shard_rows = 16
[[annotated.sources]]
name = "clean"
annotations = "clean/captions.json"
[[heldout.sources]]
name = "held"
annotations = "held/captions.json"
[models]
captioner = "{checkpoints}/captioner"
filter = "{checkpoints}/filter"
[build]
min_itm = 0.02
max_phash_distance = 0
[retrain]
enabled = true
min_pairs = 10
# Whatever comes out is promoted, so that the second round has other models.
min_gain = -10.0
[train.captioner]
steps = 6
batch = 8
[train.filter]
steps = 6
batch = 8
[report]
path = "report.html"
[worker.runtime]
work_dir = "work"
[worker.trainer]
checkpoint_every = 2
[worker.crawler]
requests_per_second = 10000.0
allow_networks = ["127.0.0.0/8"]
"#,
            site = self.site,
            checkpoints = checkpoints.display(),
        )
    }

    /// Lets the config begin without models: a MED is pre-trained, the first captioner and filter start from it, and filter and MED are cross-fitted.
    pub(crate) fn begin_cold(&self) {
        let config = std::fs::read_to_string(self.path("run.toml")).unwrap();
        let (before, rest) = config.split_once("[models]").unwrap();
        let (_, build) = rest.split_once("[build]").unwrap();
        let (build, _) = build.split_once("[train.captioner]").unwrap();
        let (_, worker) = rest.split_once("[report]").unwrap();
        let fine_tuned = "init = 'med'\nsteps = 3\nbatch = 8\nweb_weight = 0.0\nsynthetic_weight = 0.0\nmomentum = 0.0\n";
        let train = format!(
            "[train.med]\nfolds = 2\nrepeats = 2\nsteps = 4\nbatch = 8\nqueue = 16\nvocab_size = 120\n[train.med.model]\nimage_size = 32\n\
             patch_size = 16\nwidth = 32\nheads = 2\nvision_layers = 1\ntext_layers = 1\nprojection = 16\n[train.captioner]\n{fine_tuned}\
             [train.filter]\nfolds = 2\nrepeats = 2\n{fine_tuned}"
        );
        std::fs::write(self.path("run.toml"), format!("{before}[build]{build}{train}[report]{worker}")).unwrap();
    }

    /// What is really on the site's pages, as `tests/judge_corpus.py` reads it.
    pub(crate) fn write_truth(&self, name: &str, pictures: usize) {
        let lines = (0..pictures).map(|i| {
            let (right, text) = (i % 3 != 2, alt(i));
            let (page, image) = (format!("{}/page/{}.html", self.site, i / 10), format!("{}/img/{i}.png", self.site));
            let line = json!({
                "page": page, "image": image, "alt": text, "title": null, "figcaption": null, "text_ok": right,
                "text_kind": if right { "clean" } else { "mismatch" }, "image_kind": "ok", "image_usable": true, "duplicate_of": null,
                "item": i.to_string(), "true_captions": [picture(i, 0).1], "server": null, "opt_out": false, "robots_disallowed": false,
            });
            format!("{line}\n")
        });
        std::fs::write(self.path(name), lines.collect::<String>()).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// From now on, some of the pictures cannot be had; or all can again.
    pub(crate) fn outage(&self, on: bool) {
        self.outage.store(on, Ordering::Relaxed);
    }

    /// How often the site was asked for anything.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// The program with arguments, in the world's folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null()).env("NO_COLOR", "1");
        command
    }

    pub(crate) fn capfilt(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What the program prints as JSON; it must end well.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let out = self.capfilt(arguments);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "capfilt {arguments:?} ended with {}: {said}", out.status);
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stdout)))
    }

    /// Runs the config to the end and tells the dataset's digest.
    pub(crate) fn run(&self, set: &[&str]) -> Value {
        let mut arguments = vec!["run", "run.toml", "--json"];
        for change in set {
            arguments.extend(["--set", change]);
        }
        self.json(&arguments)
    }

    /// The program must refuse: its exit code, and what it said.
    pub(crate) fn refuse(&self, arguments: &[&str]) -> (i32, String) {
        let out = self.capfilt(arguments);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success(), "capfilt {arguments:?} should have failed");
        (out.status.code().unwrap_or(-1), said)
    }
}

/// The program beside the test binary: `cargo test --workspace` has built it.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("capfilt");
    assert!(program.is_file(), "{} is not there; run `cargo build -p capfilt` first", program.display());
    program
}

/// The digest of the dataset that a run ended with.
pub(crate) fn digest(run: &Value) -> String {
    run["dataset"]["digest"].as_str().unwrap().to_owned()
}
