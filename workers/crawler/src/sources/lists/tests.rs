#![allow(clippy::unwrap_used)]
use super::*;
use arrow::array::{ArrayRef, BinaryArray, StringArray};
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
    let list =
        ListConfig { path, format: None, url_col: columns.0.to_owned(), caption_col: columns.1.to_owned(), verify_hash: None };
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
    let csv = "caption,url,x\n\"a, red\ncar\",HTTP://A.test:80/x/../1#top,9\n,http://a.test/2\nshort\nword,not an address\n";
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
async fn hashes_come_along() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("l.csv");
    std::fs::write(&path, "url,caption,h\nhttp://a.test/1,a car, 0AB1 \nhttp://a.test/2,a bus,\n").unwrap();
    let list: ListConfig = serde_json::from_value(serde_json::json!({"path": path, "verify_hash": ["h", "md5"]})).unwrap();
    let found: Vec<Vec<Found>> = read_list(list, None, 50, work(folder.path()).await).try_collect().await.unwrap();
    let hashes: Vec<Option<String>> = found.into_iter().flatten().map(|f| f.expected_hash).collect();
    assert_eq!(hashes, [Some("md5:0ab1".to_owned()), None]);

    // Parquet may have bytes for it, which may be digits already.
    let urls: ArrayRef = Arc::new(StringArray::from(vec!["http://a.test/1", "http://a.test/2", "http://a.test/3"]));
    let bytes = [Some([0xab; 32].to_vec()), Some(b"00ff".to_vec()), None];
    for kind in [DataType::Binary, DataType::BinaryView, DataType::LargeBinary] {
        let hashes: ArrayRef = Arc::new(BinaryArray::from_iter(bytes.iter().map(Option::as_deref)));
        let hashes = cast(&hashes, &kind).unwrap();
        let batch =
            RecordBatch::try_from_iter([("url", Arc::clone(&urls)), ("caption", Arc::clone(&urls)), ("h", hashes)]).unwrap();
        let path = folder.path().join("l.parquet");
        let mut writer = parquet::arrow::ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let list: ListConfig = serde_json::from_value(serde_json::json!({"path": path, "verify_hash": ["h", "sha256"]})).unwrap();
        let found: Vec<Vec<Found>> = read_list(list, None, 50, work(folder.path()).await).try_collect().await.unwrap();
        let hashes: Vec<Option<String>> = found.into_iter().flatten().map(|f| f.expected_hash).collect();
        assert_eq!(hashes, [Some(format!("sha256:{}", "ab".repeat(32))), Some("sha256:00ff".to_owned()), None], "{kind}");
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
    assert!(say("l.dat", b"x").await.contains("its name tells no format"));
    assert!(say("l.txt", b"x").await.contains("has no texts"));
    assert!(say("l.csv.gz", &gzip(&b"url,caption\n".repeat(9000))[..50]).await.contains("breaks off"));
    let gone = ListConfig {
        path: "/nowhere/l.csv".into(),
        format: None,
        url_col: "a".into(),
        caption_col: "b".into(),
        verify_hash: None,
    };
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

/// The survey and the rows of a list file, as JSON objects.
fn survey_and_rows(name: &str, bytes: &[u8], wanted: &[(&str, bool)]) -> Result<(Survey, Vec<serde_json::Value>), CrawlError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let file = ListFile { format: ListFormat::of_name(&path).unwrap(), path, hash_col: None };
    let wanted: Vec<Wanted> = wanted.iter().map(|(name, text)| Wanted { name: (*name).to_owned(), text: *text }).collect();
    let survey = file.survey(&wanted)?;
    let mut lines = Vec::new();
    let unreadable = file.read(&survey.schema, &mut |batch| {
        let mut writer =
            arrow_json::WriterBuilder::new().with_explicit_nulls(true).build::<_, arrow_json::writer::LineDelimited>(&mut lines);
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        Ok(true)
    })?;
    let rows: Vec<serde_json::Value> =
        lines.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect();
    assert_eq!((survey.rows, survey.unreadable), (rows.len() as u64, unreadable), "{name}");
    Ok((survey, rows))
}

#[test]
fn columns_get_the_types_that_hold_all_of_their_values() {
    let csv = "url,n,x,b,mixed,big,empty\nu1,1,1,true,1,1,\nu2,NA,2.5,False,two,99999999999999999999,\nu3,-3,,,3,3,\n";
    let names = [("url", true), ("n", false), ("x", false), ("b", false), ("mixed", false), ("big", false), ("empty", false)];
    let (survey, rows) = survey_and_rows("l.csv", csv.as_bytes(), &names).unwrap();
    let types: Vec<&DataType> = survey.schema.fields().iter().map(|f| f.data_type()).collect();
    use DataType::{Boolean, Float64, Int64, Utf8};
    assert_eq!(types, [&Utf8, &Int64, &Float64, &Boolean, &Utf8, &Utf8, &Utf8]);
    let wanted = serde_json::json!({"url": "u2", "n": null, "x": 2.5, "b": false, "mixed": "two", "big": "99999999999999999999", "empty": ""});
    assert_eq!(rows[1], wanted);

    let jsonl = r#"{"url": "u1", "n": 1, "box": [1, 2], "meta": {"a": 1}, "mixed": {"a": 1}, "text": 5}
{"url": "u2", "n": 2.5, "box": [0.5], "meta": {"b": "x", "a": null}, "mixed": 3, "text": "five"}
{"url": "u3", "n": null, "box": [], "meta": null, "mixed": null}"#;
    let names = [("url", true), ("n", false), ("box", false), ("meta", false), ("mixed", false), ("text", true)];
    for (name, bytes) in [("l.jsonl", jsonl.to_owned()), ("l.json", format!(" [{}]\n", jsonl.replace('\n', ",")))] {
        let (_, rows) = survey_and_rows(name, bytes.as_bytes(), &names).unwrap();
        let wanted = serde_json::json!([
            {"url": "u1", "n": 1.0, "box": [1.0, 2.0], "meta": {"a": 1, "b": null}, "mixed": "{\"a\":1}", "text": "5"},
            {"url": "u2", "n": 2.5, "box": [0.5], "meta": {"a": null, "b": "x"}, "mixed": "3", "text": "five"},
            {"url": "u3", "n": null, "box": [], "meta": null, "mixed": null, "text": null},
        ]);
        assert_eq!(serde_json::Value::Array(rows), wanted, "{name}");
    }
}

#[test]
fn odd_files_are_read_or_refused_by_name() {
    let url = [("url", true)];
    let urls = |name: &str, bytes: &[u8]| {
        survey_and_rows(name, bytes, &url)
            .map(|(_, rows)| rows.iter().map(|r| r["url"].as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>())
    };
    // Addresses with commas and quotes, empty lines, Windows line ends, a byte-order mark, no line end at the end.
    let text = b"\xef\xbb\xbfhttp://a.test/1,2?\"x\"\r\n\r\n  http://a.test/2  \n\nhttp://a.test/\xff";
    let wanted = ["http://a.test/1,2?\"x\"", "http://a.test/2", "http://a.test/\u{fffd}"];
    assert_eq!(urls("l.txt", text).unwrap(), wanted);
    assert_eq!(urls("l.txt", &gzip(text)).unwrap(), wanted, "packed files are known by their first bytes");
    assert_eq!(urls("l.csv", b"\xef\xbb\xbfurl,\"the caption\"\nu1,\"a \"\"b\"\"\nc\"\n").unwrap(), ["u1"]);
    assert_eq!(urls("l.tsv", b"\"url\"\tcaption\nu1\t\"torn\nu2\tx\n").unwrap(), ["u1", "u2"]);
    assert_eq!(urls("l.json", b"[]").unwrap(), [""; 0]);
    assert_eq!(urls("l.json", b"[{\"url\": \"u1\"}, 7, {\"url\": \"u2\"}]").unwrap(), ["u1", "u2"]);
    assert_eq!(urls("l.json", b"{\"url\": \"u1\"}\n{\"url\": \"u2\"}").unwrap(), ["u1", "u2"], "an object a line");
    assert_eq!(urls("l.txt", b"").unwrap(), [""; 0]);
    let error = |name: &str, bytes: &[u8]| urls(name, bytes).unwrap_err().to_string();
    assert!(error("l.csv", b"url,url\n1,2\n").contains("more than one column `url`"));
    assert!(error("l.json", b"[{\"url\": \"u1\"}, {\"url\": ").contains("no JSON array"));
    assert!(error("l.json", b"[{\"url\": \"u1\"}] x").contains("no JSON array"));
    assert!(error("l.jsonl", b"{\"URL\": 1}\n").contains("none of its 1 rows has a value in `url`"));
    assert!(error("l.csv", b"\xff\xfeu\0r\0l\0").contains("UTF-16"));
    assert!(survey_and_rows("l.txt", b"x", &[("text", true)]).unwrap_err().to_string().contains("no column `text`"));
    let mut long = b"[{\"url\": \"".to_vec();
    long.resize(3 << 20, b'x');
    assert!(error("l.json", &long).contains("longer than"));
    let mut long = vec![b'x'; 3 << 20];
    long.extend(b"\nhttp://a.test/");
    let (survey, _) = survey_and_rows("l.txt", &long, &url).unwrap();
    assert_eq!((survey.rows, survey.unreadable), (1, 1));
}

#[test]
fn parquet_keeps_its_types_and_order() {
    let (survey, rows) = survey_and_rows("l.parquet", &parquet(2500), &[("n", false), ("URL", true)]).unwrap();
    assert_eq!((survey.rows, survey.schema.field(0).data_type()), (2500, &DataType::Int32));
    assert!(rows.iter().enumerate().all(|(i, row)| row["n"] == i && row["URL"] == format!("http://a.test/{i}")));
}
