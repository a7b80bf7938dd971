#![allow(clippy::unwrap_used)]
use super::*;
use arrow::array::{ArrayRef, StringArray};
use capfilt_schemas::{RunId, StageKind, Task};
use capfilt_store::Store;
use futures::TryStreamExt;
use std::io::Write;
use std::sync::Arc;

async fn work(folder: &Path) -> Work {
    let task =
        Task { stage: StageKind::Discover, stage_version: 1, params: serde_json::Value::Null, model: None, inputs: vec![] };
    Work::new(task, Store::open("memory:").await.unwrap(), RunId::new("test").unwrap(), folder)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// The pairs of a list file as `url text`, and the facts.
async fn read_as(name: &str, bytes: &[u8], columns: (&str, &str)) -> Result<(Vec<String>, serde_json::Value), StageError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let work = work(folder.path()).await;
    let list = ListConfig { path, format: None, url_col: columns.0.to_owned(), caption_col: columns.1.to_owned() };
    let found: Vec<Vec<Found>> = read_list(list, None, 50, work.clone()).try_collect().await?;
    Ok((found.into_iter().flatten().map(|f| format!("{} {}", f.url, f.text)).collect(), work.facts.to_value()))
}

fn parquet(rows: usize) -> Vec<u8> {
    let urls: ArrayRef =
        Arc::new(arrow::array::LargeStringArray::from_iter((0..rows).map(|i| Some(format!("http://a.test/{i}")))));
    let texts: ArrayRef = Arc::new(StringArray::from_iter((0..rows).map(|i| (i % 3 != 2).then(|| format!(" text  {i}")))));
    let other: ArrayRef = Arc::new(arrow::array::Int32Array::from_iter_values(0..rows as i32));
    let batch = RecordBatch::try_from_iter([("n", other), ("TEXT", texts), ("URL", urls)]).unwrap();
    let mut out = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut out, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    out
}

#[tokio::test]
async fn every_format_gives_its_rows_in_order() {
    let csv = "caption,url,x\n\"a, red\ncar\",http://a.test/1,9\n,http://a.test/2\nshort\nword,not an address\n";
    let wanted = ["http://a.test/1 a, red car", "not an address word"];
    let tsv = "url\tcaption\nhttp://a.test/1\ta, red car\nnot an address\tword\nhttp://a.test/2\t\n";
    let jsonl = "{\"url\": \"http://a.test/1\", \"caption\": \"a, red car\"}\n\n{broken\n[1]\n{\"url\": null, \"caption\": \"x\"}\n\
                 {\"caption\":\"word\",\"url\":\"not an address\"}";
    for (name, bytes) in [("l.csv", csv), ("l.tsv", tsv), ("l.jsonl", jsonl)] {
        for (name, bytes) in [(name.to_owned(), bytes.as_bytes().to_vec()), (format!("{name}.gz"), gzip(bytes.as_bytes()))] {
            let (found, facts) = read_as(&name, &bytes, ("url", "caption")).await.unwrap();
            assert_eq!(found, wanted, "{name}");
            assert!(facts["rows_without_address_or_text"].as_u64().unwrap() > 0);
            assert_eq!(facts.get("rows_unreadable").is_some(), name.starts_with("l.jsonl"));
        }
    }
    for (name, bytes) in [("l.parquet", parquet(3000)), ("l.parquet.gz", gzip(&parquet(3000)))] {
        let (found, facts) = read_as(name, &bytes, ("URL", "TEXT")).await.unwrap();
        assert_eq!(
            (found.len(), found[0].as_str(), found[2].as_str()),
            (2000, "http://a.test/0 text 0", "http://a.test/3 text 3")
        );
        assert_eq!((facts["rows_read"].as_u64(), facts["rows_without_address_or_text"].as_u64()), (Some(3000), Some(1000)));
    }
}

#[tokio::test]
async fn a_file_that_is_no_list_fails_the_task_with_its_reason() {
    let say = async |name: &str, bytes: &[u8]| {
        let e = read_as(name, bytes, ("url", "caption")).await.unwrap_err();
        assert!(!e.is_retryable());
        e.to_string()
    };
    assert!(say("l.csv", b"link,text\n1,2\n").await.contains("no column `url`, only link, text"));
    assert!(say("l.parquet", &parquet(3)).await.contains("no column `url`, only n, TEXT, URL"));
    assert!(say("l.parquet", b"nonsense").await.contains("not readable Parquet"));
    assert!(say("l.csv", b"").await.contains("no column `url`, only "));
    assert!(say("l.csv", b"url,caption\n").await.contains("it holds no row"));
    let strange = b"{\"URL\": \"http://a.test/\", \"TEXT\": \"a car\"}\n{broken\n";
    assert!(say("l.jsonl", strange).await.contains("none of its 2 rows has an address in `url` and a text in `caption`"));
    assert!(say("l.txt", b"x").await.contains("its name tells no format"));
    assert!(say("l.csv.gz", &gzip(&b"url,caption\n".repeat(9000))[..50]).await.contains("breaks off"));
    let gone = ListConfig { path: "/nowhere/l.csv".into(), format: None, url_col: "a".into(), caption_col: "b".into() };
    let folder = tempfile::tempdir().unwrap();
    let found: Result<Vec<_>, _> = read_list(gone, None, 50, work(folder.path()).await).try_collect().await;
    assert_eq!(found.unwrap_err().to_string(), "cannot read `/nowhere/l.csv`");
}

#[tokio::test]
async fn a_quote_that_nothing_closes_loses_no_row_in_silence() {
    let row = |i: usize, text: &str| format!("http://a.test/{i},{text}\n");
    for rows in [20, 400] {
        let mut csv = "url,caption\n".to_owned();
        csv.extend((0..rows).map(|i| row(i, if i == 3 { "\"a torn quote" } else { "a car" })));
        let error = read_as("l.csv", csv.as_bytes(), ("url", "caption")).await.unwrap_err().to_string();
        assert!(error.contains("the row at line 5 does not end"), "{error}");
    }
    // A quote within a text is no such thing, nor is a text of two lines.
    let csv = format!("url,caption\n{}{}", row(1, "a 5\" disk"), row(2, "\"two\nlines\""));
    let (found, _) = read_as("l.csv", csv.as_bytes(), ("url", "caption")).await.unwrap();
    assert_eq!(found, ["http://a.test/1 a 5\" disk", "http://a.test/2 two lines"]);
}

#[tokio::test]
async fn an_endless_line_is_passed_over() {
    let mut bytes = b"{\"url\":\"".to_vec();
    bytes.extend(vec![b'x'; 3 << 20]);
    bytes.extend(b"\n{\"url\":\"http://a.test/\",\"caption\":\"after\"}");
    let (found, facts) = read_as("l.jsonl", &bytes, ("url", "caption")).await.unwrap();
    assert_eq!((found, facts["rows_unreadable"].as_u64()), (vec!["http://a.test/ after".to_owned()], Some(1)));
}
