//! `capfilt download` as a user of img2dataset meets it: killed, resumed, and opened by the libraries that people use.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::world::World;

/// Arguments for the world's list of `pictures` pictures, of which every tenth is not there.
fn arguments(world: &World, pictures: usize) -> Vec<String> {
    let mut list = "link,text,number\n".to_owned();
    for n in 0..pictures {
        let name = if n % 10 == 9 { "gone".to_owned() } else { n.to_string() };
        let _ = writeln!(list, "http://h{}.test/img/{name}.png,\"picture {n}, \u{e9}t\u{e9}\",{n}", n % 4);
    }
    std::fs::write(world.path("list.csv"), list).unwrap();
    let site = world.site.trim_start_matches("http://");
    let line = format!(
        "download --url_list=list.csv --input-format csv --url_col link --caption_col text --save_additional_columns [\"number\"] \
         --image_size 64 --number_sample_per_shard 25 --output_format webdataset --requests_per_second 1000 --retries 0 --json \
         --set crawler.resolve.*={site}"
    );
    line.split_whitespace().map(str::to_owned).collect()
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if path.to_string_lossy().ends_with("_stats.json") {
            let mut stats: Value = serde_json::from_slice(&bytes).unwrap();
            for time in ["start_time", "end_time", "duration"] {
                stats.as_object_mut().unwrap().remove(time).unwrap();
            }
            bytes = stats.to_string().into_bytes();
        }
        (path.file_name().unwrap().to_string_lossy().into_owned(), bytes)
    });
    entries.collect()
}

#[test]
fn a_killed_download_goes_on_and_python_reads_it() {
    let world = World::new(400);
    let base = arguments(&world, 400);
    let to =
        |folder: &str| -> Vec<String> { base.iter().cloned().chain(["--output_folder".to_owned(), folder.to_owned()]).collect() };
    let run = |folder: &str| world.json(&to(folder).iter().map(String::as_str).collect::<Vec<_>>());
    let whole = run("whole");
    assert_eq!(
        (whole["shards"].as_u64(), whole["successes"].as_u64(), whole["failed_to_download"].as_u64()),
        (Some(16), Some(360), Some(40))
    );
    assert_eq!(whole["fetch"]["downloads"]["by_status"]["http_4xx"], 40);
    let mut killed = 0;
    for wait in [40, 90, 140, 190] {
        let arguments = to("killed");
        let mut child = world.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        killed += u32::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert!(killed > 0, "no run was killed before its end");
    let rest = run("killed");
    assert_eq!(rest["shards"].as_u64().unwrap() + rest["shards_there"].as_u64().unwrap(), 16);
    assert!(files(&world.path("killed")) == files(&world.path("whole")), "the same files, whatever happened on the way");
    assert_eq!(run("killed")["shards"], 0);

    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = project.join(".venv/bin/python");
    assert!(python.exists(), "the Python environment is not there; run `scripts/setup.sh test`");
    let check = Command::new(python)
        .arg(project.join("tests/check_exports.py"))
        .args([world.path("whole").display().to_string(), "360".to_owned(), "--formats".to_owned(), "download".to_owned()])
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}");
}

#[test]
fn metrics_say_what_the_progress_line_says() {
    let world = World::new(400);
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // A few seconds, so that there is something to look at.
    let slowly = |flag: String| if flag == "1000" { "20".to_owned() } else { flag };
    let mut arguments: Vec<String> = arguments(&world, 400).into_iter().map(slowly).collect();
    arguments.extend(["--hourly_price", "2.5", "--metrics", &address.to_string()].map(str::to_owned));
    let mut child = world.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let read = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let wanted = [
        r#"capfilt_downloads{status="ok"} "#,
        r#"capfilt_downloads{status="http_4xx"} "#,
        "capfilt_download_success_ratio 0.",
        "capfilt_downloaded_bytes_per_second ",
        "capfilt_cost_per_million_images ",
        r#"capfilt_host_downloads{host="h1.test",status="ok"} "#,
        r#"capfilt_host_bytes{host="h1.test"} "#,
        r#"capfilt_stage_done{stage="download"} "#,
        r#"capfilt_stage_expected{stage="download"} 400"#,
        r#"capfilt_stage_seconds_left{stage="download"} "#,
    ];
    let mut missing = wanted.to_vec();
    while child.try_wait().unwrap().is_none() && !missing.is_empty() {
        std::thread::sleep(Duration::from_millis(100));
        let answer = read().unwrap_or_default();
        missing = wanted.into_iter().filter(|line| !answer.contains(line)).collect();
    }
    let _ = child.kill();
    child.wait().unwrap();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn wrong_flags_and_lists_are_refused_before_anything_is_asked() {
    let world = World::new(5);
    arguments(&world, 5);
    std::fs::create_dir(world.path("empty")).unwrap();
    for (line, needle) in [
        ("download", "--url_list"),
        ("download list.csv --input_format csv", "no column `url`, only link, text, number"),
        ("download list.csv --input_format parquet --url_col link", "not readable Parquet"),
        ("download gone.txt", "gone.txt"),
        ("download empty --input_format csv.gz", ".csv.gz"),
        ("download list.csv --resize_mode stretch", "keep_ratio"),
        ("download list.csv --extract_exif maybe", "True or False"),
        ("download list.csv --bbox_col boxes", "blurred"),
    ] {
        let (code, said) = world.refuse(&line.split(' ').collect::<Vec<_>>());
        assert!(code == 2 && said.contains(needle), "{line}: {code} {said}");
    }
    assert_eq!(world.requests(), 0);
    assert!(!world.path("images").exists());
}
