#![allow(clippy::unwrap_used)]
use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;

fn record(n: usize, block: &str) -> Vec<u8> {
    let length = block.len();
    format!(
        "WARC/1.0\r\nWARC-Type: x{n}\r\nContent-Length: {length}\r\nWARC-Target-URI: <http://a.test/{n}>\r\n\r\n{block}\r\n\r\n"
    )
    .into()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// Kinds and blocks of the records in a file, then how many were bad and too long.
fn read(file: &[u8]) -> (Vec<(String, Vec<u8>)>, u64, u64) {
    read_by(file, file.len().max(1))
}

/// The same, from a file that gives so many bytes at a time.
fn read_by(file: &[u8], piece: usize) -> (Vec<(String, Vec<u8>)>, u64, u64) {
    struct Slow<'a>(&'a [u8], usize);
    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(out.len());
            self.0.read(&mut out[..n])
        }
    }
    let mut records = Records::new(Slow(file, piece));
    let (mut all, mut bad, mut too_long) = (Vec::new(), 0, 0);
    while let Some(batch) = records.next_batch().unwrap() {
        (bad, too_long) = (bad + batch.bad, too_long + batch.too_long);
        let kind = |r: RecordRef<'_>| String::from_utf8_lossy(r.field("warc-type").unwrap_or_default()).into_owned();
        all.extend(batch.iter().map(|r| (kind(r), r.block.to_vec())));
    }
    (all, bad, too_long)
}

fn kinds(file: &[u8]) -> (Vec<String>, u64, u64) {
    let (all, bad, too_long) = read(file);
    (all.into_iter().map(|r| r.0).collect(), bad, too_long)
}

fn names(of: impl IntoIterator<Item = usize>) -> Vec<String> {
    of.into_iter().map(|n| format!("x{n}")).collect()
}

#[test]
fn packed_and_plain_files_give_the_same_records() {
    let records: Vec<Vec<u8>> = (0..5).map(|n| record(n, &format!("block {n}\r\n\r\nwith lines"))).collect();
    let plain = records.concat();
    let by_member: Vec<u8> = records.iter().flat_map(|r| gz(r)).collect();
    let wanted = read(&plain);
    assert_eq!((wanted.0.len(), wanted.1, wanted.2), (5, 0, 0));
    assert_eq!(wanted.0[3], ("x3".to_owned(), b"block 3\r\n\r\nwith lines".to_vec()));
    for file in [&by_member, &gz(&plain), &[by_member.clone(), vec![0; 1000]].concat(), &plain.replace_crlf()] {
        assert_eq!(read(file).0.iter().map(|r| &r.0).collect::<Vec<_>>(), wanted.0.iter().map(|r| &r.0).collect::<Vec<_>>());
        assert_eq!(read(file).1, 0);
        for piece in [1, 7, 1000] {
            assert_eq!(read_by(file, piece), read(file), "{piece}");
        }
    }
    assert_eq!(read(b""), (vec![], 0, 0));
}

trait ReplaceCrlf {
    fn replace_crlf(&self) -> Vec<u8>;
}

impl ReplaceCrlf for Vec<u8> {
    /// The same with bare line feeds, as some writers have it; lengths are made right again.
    fn replace_crlf(&self) -> Vec<u8> {
        String::from_utf8(self.clone())
            .unwrap()
            .replace("\r\n", "\n")
            .replace("Content-Length: 21", "Content-Length: 19")
            .into_bytes()
    }
}

#[test]
fn a_damaged_member_costs_itself_only() {
    let members: Vec<Vec<u8>> = (0..6).map(|n| gz(&record(n, &format!("block {n} {}", "text ".repeat(n * 40))))).collect();
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut members = members.clone();
        change(&mut members);
        kinds(&members.concat())
    };
    // Cut short: the next one begins in the middle of it.
    assert_eq!(with(&|m| m[2].truncate(40)), (names([0, 1, 3, 4, 5]), 1, 0));
    assert_eq!(with(&|m| m[2].truncate(4)), (names([0, 1, 3, 4, 5]), 1, 0));
    // A flipped bit in its data, in its checksum, in its length, in its magic number.
    for at in [30, members[3].len() - 6, members[3].len() - 2, 0, 3] {
        assert_eq!(with(&|m| m[3][at] ^= 0x81), (names([0, 1, 2, 4, 5]), 1, 0), "{at}");
    }
    // Between members: text, and what looks like a member.
    assert_eq!(with(&|m| m.insert(1, b"<html>503</html>".to_vec())), (names(0..6), 1, 0));
    assert_eq!(with(&|m| m.insert(1, b"\x1f\x8b\x08\0\0\0\0\0\0\0\x1f\x8b\x08\0".to_vec())), (names(0..6), 1, 0));
    assert_eq!(with(&|m| m.insert(1, gz(b"no record"))), (names(0..6), 1, 0));
    // The end is missing.
    assert_eq!(with(&|m| m[5].truncate(60)), (names(0..5), 1, 0));
    assert_eq!(kinds(&members.concat()[3..]), (names(1..6), 1, 0));
}

#[test]
fn a_wrong_length_costs_its_record_only() {
    let lie = |n: usize, length: &str| {
        String::from_utf8(record(n, "short")).unwrap().replace("Length: 5", &format!("Length: {length}")).into_bytes()
    };
    let long = (MAX + 1).to_string();
    for (length, bad, too_long) in [
        ("3", 1, 0),
        ("4000", 1, 0),
        ("0", 1, 0),
        ("-1", 1, 0),
        ("", 1, 0),
        (&long, 0, 1),
        ("18446744073709551615", 0, 1),
        ("1e9", 1, 0),
    ] {
        let file = [record(0, "a"), lie(1, length), record(2, "c"), record(3, "d")];
        assert_eq!(kinds(&file.concat()), (names([0, 2, 3]), bad, too_long), "{length}, plain");
        let packed: Vec<u8> = file.iter().flat_map(|r| gz(r)).collect();
        assert_eq!(kinds(&packed), (names([0, 2, 3]), bad, too_long), "{length}, packed");
    }
    let no_end = [
        record(0, "a"),
        b"WARC/1.0\r\nContent-Length: 3\r\n".to_vec(),
        vec![b'x'; 100_000],
        b"\r\n".to_vec(),
        record(2, "\nWARC/ c"),
    ];
    assert_eq!(kinds(&no_end.concat()), (names([0, 2]), 1, 0));
    let nested = record(1, std::str::from_utf8(&record(9, "inner")).unwrap());
    assert_eq!(
        kinds(&[record(0, "a"), nested, record(2, "c")].concat()),
        (names([0, 1, 2]), 0, 0),
        "a page about archives is a page"
    );
}

const MAX: usize = records::MAX_RECORD;

#[test]
fn long_records_and_bombs_are_passed_over() {
    let long = record(1, &"y".repeat(MAX + 1));
    let packed = [gz(&record(0, "a")), gz(&long), gz(&record(2, "c"))].concat();
    assert_eq!(kinds(&packed), (names([0, 2]), 0, 1));
    assert_eq!(kinds(&[record(0, "a"), long, record(2, "c")].concat()), (names([0, 2]), 0, 1));
    // 256 MiB of zeros in 256 KiB, as one record, as blank lines, and as nothing.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    bomb.write_all(b"WARC/1.0\r\nContent-Length: 300000000\r\n\r\n").unwrap();
    (0..256).for_each(|_| bomb.write_all(&[b'\n'; 1 << 20]).unwrap());
    let bomb = bomb.finish().unwrap();
    assert_eq!(kinds(&[gz(&record(0, "a")), bomb, gz(&record(2, "c"))].concat()), (names([0, 2]), 0, 1));
}

#[test]
fn a_bomb_is_left_when_it_is_known_for_one() {
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    bomb.write_all(b"WARC/1.0\r\nContent-Length: 9\r\n\r\n").unwrap();
    (0..256).for_each(|_| bomb.write_all(&[b' '; 1 << 20]).unwrap());
    let packed = bomb.finish().unwrap();
    let mut members = members::Members::new(packed.as_slice());
    let mut unpacked = 0;
    let mut out = Vec::with_capacity(1 << 20);
    loop {
        out.clear();
        match members.step(&mut out).unwrap() {
            members::Step::Data => unpacked += out.len(),
            members::Step::End { sound } => break assert!(!sound),
            members::Step::Eof => panic!("the bomb went off"),
        }
    }
    assert!(unpacked < 66 << 20, "{unpacked}");
}

#[test]
fn endless_searches_end() {
    // Each three bytes might be a member, each empty block costs work without bytes.
    let hostile: Vec<u8> = b"\x1f\x8b\x08\0\0\0\0\0\0\0".repeat(50_000);
    assert_eq!(kinds(&[gz(&record(0, "a")), hostile, gz(&record(1, "b"))].concat()), (names([0, 1]), 1, 0));
    let blocks: Vec<u8> = [b"\x1f\x8b\x08\0\0\0\0\0\0\0".as_slice(), &b"\0\0\0\xff\xff".repeat(20_000)].concat();
    assert_eq!(kinds(&[gz(&record(0, "a")), blocks.repeat(20), gz(&record(1, "b"))].concat()).0, names([0, 1]));
}

fn reader() -> Reader {
    Reader { token: "capfilt".to_owned(), opt_out: true, max_page: 1 << 20, max_text: 100 }
}

/// `url text` of what the records of a file hold, and the counts.
fn pairs(file: &[u8]) -> (Vec<String>, Counts) {
    let batch = Records::new(file).next_batch().unwrap().unwrap();
    let (found, counts) = reader().read(&batch);
    (found.into_iter().map(|f| format!("{} {}={}", f.url, f.text_source, f.text)).collect(), counts)
}

fn with_type(kind: &str, content: &str, block: &str) -> Vec<u8> {
    let length = block.len();
    let head = format!("WARC/1.1\r\nwarc-type: {kind}\r\nContent-Type: {content}\r\nWARC-Target-URI: http://a.test/dir/\r\n");
    format!("{head}Content-Length: {length}\r\n\r\n{block}\r\n\r\n").into()
}

#[test]
fn answers_are_read_as_the_crawler_would() {
    let page = "<base href='/b/'><img src=x.jpg alt='A  cat'><img srcset='s.jpg 1w, l.jpg 2w' title=t>";
    let answer =
        |head: &str| with_type("response", "application/http; msgtype=response", &format!("HTTP/1.1 {head}\r\n\r\n{page}"));
    let both = ["http://a.test/b/x.jpg alt=A cat", "http://a.test/b/l.jpg title=t"];
    assert_eq!(pairs(&answer("200 OK\r\nContent-Type: text/html")).0, both);
    assert_eq!(pairs(&with_type("resource", "text/html; charset=utf-8", page)).0, both);
    for not in ["404 Not Found", "301 Moved\r\nLocation: /", "200 OK\r\nContent-Type: text/plain", "200 OK\r\nX-Robots-Tag: noai"]
    {
        assert_eq!(pairs(&answer(not)).0, [] as [&str; 0], "{not}");
    }
    assert_eq!(pairs(&with_type("response", "text/dns", page)).0, [] as [&str; 0]);
    assert_eq!(pairs(&with_type("conversion", "text/html", page)).0, [] as [&str; 0]);
    let counts = pairs(&answer("200 OK\r\nTDM-Reservation: 1")).1;
    assert_eq!((counts.pages, counts.images, counts.pages_opted_out, counts.images_opted_out), (1, 2, 1, 2));
    assert_eq!(pairs(&with_type("response", "application/http", "no http")).1.bad, 1);
    let latin = with_type(
        "response",
        "application/http",
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=latin1\r\n\r\n<img src=x alt='caf?'>",
    );
    let latin: Vec<u8> = latin.iter().map(|b| if *b == b'?' { 0xe9 } else { *b }).collect();
    assert_eq!(pairs(&latin).0, ["http://a.test/dir/x alt=café"]);
}

/// A WAT record with these parts of the answer's metadata.
fn wat_pairs(headers: &str, html: &str) -> (Vec<String>, Counts) {
    let json = format!(
        "{{\"Container\":{{\"Filename\":\"x\"}},\"Envelope\":{{\"WARC-Header-Metadata\":{{\"WARC-Type\":\"response\",\
         \"WARC-Target-URI\":\"http://a.test/dir/page\"}},\"Payload-Metadata\":{{\"HTTP-Response-Metadata\":{{\"Headers\":{{{headers}}},\
         \"Response-Message\":{{\"Status\":\"200\"}},\"HTML-Metadata\":{html}}}}}}}}}"
    );
    pairs(&with_type("metadata", "application/json", &json))
}

#[test]
fn wat_records_give_images_with_their_texts() {
    let links = r#"{"Head":{"Title":"t","Base":"/b/"},"Links":[{"path":"A@/href","url":"/","text":"home"},
        {"path":"IMG@/src","url":"x.jpg","alt":"A  cat","title":"A cat"},{"url":"//c.test/y.png#f","alt":"any \"order\" \u00e9 \/","path":"IMG@/src"},
        {"path":"IMG@/src","url":"no-text.jpg"},{"path":"IMG@/src","url":"data:image/gif;base64,AA","alt":"stand-in"},
        {"path":"IMG@/src","url":"thumb.jpg","alt":"small","title":" "},{"path":"A@/href","url":"full.JPG","title":"large"},
        {"path":"IMG@/src","url":"other.jpg","alt":"beside"},{"path":"A@/href","url":"full.jpg","text":"another"},
        {"path":"IMG@/src","url":"in-page.jpg","alt":"linked"},{"path":"A@/href","url":"page.html"},
        {"path":"IMG@/longdesc","url":"desc.html"},{"path":"VIDEO@/poster","url":"p.jpg","alt":"no"}]}"#;
    let (found, counts) = wat_pairs(r#""Content-Type":"text/html""#, links);
    let wanted = [
        "http://a.test/b/x.jpg alt=A cat",
        "http://c.test/y.png alt=any \"order\" é /",
        "http://a.test/b/full.JPG alt=small",
        "http://a.test/b/full.JPG title=large",
        "http://a.test/b/other.jpg alt=beside",
        "http://a.test/b/in-page.jpg alt=linked",
    ];
    assert_eq!(found, wanted);
    assert_eq!((counts.records, counts.bad, counts.pages, counts.images), (1, 0, 1, 7));
}

#[test]
fn wishes_in_wat_records_count() {
    let links = |head: &str| format!(r#"{{"Head":{{{head}}},"Links":[{{"path":"IMG@/src","url":"x.jpg","alt":"cat"}}]}}"#);
    let given = |headers: &str, head: &str| wat_pairs(headers, &links(head)).0.len();
    assert_eq!(given("", ""), 1);
    assert_eq!(
        given(
            r#""X-Robots-Tag":"noarchive""#,
            r#""Metas":[{"name":"robots","content":"all"},{"property":"og:title","content":"noai"}]"#
        ),
        1
    );
    assert_eq!(given(r#""x-robots-tag":"noai""#, ""), 0);
    assert_eq!(given(r#""X-Robots-Tag":["noarchive","noimageai"]"#, ""), 0);
    assert_eq!(given(r#""TDM-Reservation":"1""#, ""), 0);
    assert_eq!(given("", r#""Metas":[{"http-equiv":"x","content":"noai"},{"content":"NOINDEX","name":"CapFilt"}]"#), 0);
    assert_eq!(given(r#""Content-Type":"text/plain""#, ""), 0);
    assert_eq!(wat_pairs(r#""X-Robots-Tag":"noai""#, &links("")).1.images_opted_out, 1);
}

#[test]
fn odd_json_is_read_or_counted() {
    let half = r#"{"Links":[{"path":"A@/href","url":"/","text":"cut \ud83d"},{"path":"IMG@/src","url":"x.jpg","alt":"half \ud83d pair"}]}"#;
    assert_eq!(wat_pairs("", half).0, ["http://a.test/dir/x.jpg alt=half \u{fffd}\u{fffd}\u{fffd} pair"]);
    let listed = r#"{"Links":[{"path":"IMG@/src","url":"x.jpg","alt":["first","second"],"new":{"a":[1,2,{}]}}],"New":true}"#;
    assert_eq!(wat_pairs("", listed).0, ["http://a.test/dir/x.jpg alt=first"]);
    for bad in [r#"{"Links":[{"path":"IMG@/src","url":"x.jpg","alt":"#, r#"{"Links":[{"path":"IMG@/src","url":5}]}"#] {
        assert_eq!(wat_pairs("", bad).1.bad, 1, "{bad}");
    }
    let deep = format!(r#"{{"Links":[{{"path":"IMG@/src","x":{}"#, "[".repeat(100_000));
    assert_eq!(wat_pairs("", &deep).1.bad, 1);
}

#[test]
fn files_are_found_by_path_folder_glob_and_list() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(at("sub")).unwrap();
    for name in ["b.warc.gz", "a.warc.wat.gz", "sub/c.wat", "notes.md", "d.warc"] {
        std::fs::write(at(name), name).unwrap();
    }
    std::fs::write(
        at("wat.paths.gz"),
        gz(b"crawl/1.wat.gz\n\n# old\nhttps://b.test/2.warc.gz\ncrawl/1.wat.gz\ns3://commoncrawl/3.wat.gz\n"),
    )
    .unwrap();
    let of = |paths: &[String], count: Option<usize>| {
        let (paths, base, seed) = (paths.to_vec(), "http://cc.test/data/".to_owned(), 7);
        expand(&ArchiveConfig { paths, base, count, seed, max_page_bytes: 1, options: BTreeMap::new() })
            .map_err(|e| e.to_string())
    };
    assert_eq!(of(&[at("d.warc")], None).unwrap(), [at("d.warc")]);
    assert_eq!(of(&[at("")], None).unwrap(), [at("a.warc.wat.gz"), at("b.warc.gz"), at("d.warc"), at("sub/c.wat")]);
    assert_eq!(of(&[at("*.gz"), at("b*")], None).unwrap().len(), 3, "each once");
    let listed = of(&[at("wat.paths.gz")], None).unwrap();
    assert_eq!(listed, ["http://cc.test/data/crawl/1.wat.gz", "https://b.test/2.warc.gz", "s3://commoncrawl/3.wat.gz"]);
    let public = "https://data.commoncrawl.org/3.wat.gz";
    assert!(matches!(files::remote(&listed[2]), Some(Remote::Web(url)) if url.as_str() == public));
    let two = of(&[at("wat.paths.gz")], Some(2)).unwrap();
    assert!(two.len() == 2 && two.iter().all(|path| listed.contains(path)));
    assert!(of(&[at("wat.paths.gz"), at("")], Some(5)).unwrap().len() == 5);
    for (path, why) in [
        (at("gone.warc"), "cannot read"),
        (at("*.zip"), "names no archive"),
        ("http://a.test/wat.paths.gz".to_owned(), "download it"),
    ] {
        assert!(of(&[path], None).unwrap_err().contains(why), "{why}");
    }
}

#[test]
fn a_fingerprint_tells_files_apart_but_not_copies() {
    let folder = tempfile::tempdir().unwrap();
    let of = |bytes: &[u8]| {
        let path = folder.path().join("x");
        std::fs::write(&path, bytes).unwrap();
        fingerprint(&path).unwrap()
    };
    for size in [0, 1, 4096, 4097, 100_000, 1 << 20] {
        let bytes: Vec<u8> = (0..size).map(|i: u32| (i * 7 % 251) as u8).collect();
        assert_eq!(of(&bytes), of(&bytes));
        for at in [0, bytes.len().saturating_sub(1)].into_iter().filter(|_| size > 0) {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(of(&bytes), of(&other), "{size} {at}");
        }
        assert_ne!(of(&bytes), of(&[bytes.as_slice(), b"x"].concat()));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_to_their_end(
        parts in proptest::collection::vec((0_usize..6, proptest::collection::vec(any::<u8>(), 0..60)), 0..12),
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
        piece in 1_usize..200,
    ) {
        let part = |(kind, noise): &(usize, Vec<u8>)| match kind {
            0 => noise.clone(),
            1 => record(1, &String::from_utf8_lossy(noise)),
            2 => gz(&record(2, &String::from_utf8_lossy(noise))),
            3 => gz(&with_type("response", "application/http", &format!("HTTP/1.1 200 OK\r\n\r\n<img src=x alt='{}'>", String::from_utf8_lossy(noise)))),
            4 => gz(&with_type("metadata", "application/json", &format!("{{\"Envelope\":\"IMG@{}\"}}", String::from_utf8_lossy(noise)))),
            _ => gz(noise),
        };
        let mut file: Vec<u8> = parts.iter().flat_map(part).collect();
        for (at, bits) in &flips {
            if !file.is_empty() {
                let at = at.index(file.len());
                file[at] ^= bits;
            }
        }
        prop_assert_eq!(read_by(&file, piece), read(&file));
        let mut n = 0;
        archive_pairs(file.as_slice(), |_, _| n += 1).unwrap();
    }

    #[test]
    fn sound_records_survive_any_one_damage(damaged in 0_usize..5, at in any::<proptest::sample::Index>(), bits in 1_u8..=255) {
        let records: Vec<Vec<u8>> = (0..5).map(|n| record(n, &format!("block {n} {}", "abc ".repeat(n * 20)))).collect();
        let mut file: Vec<Vec<u8>> = records.iter().map(|record| gz(record)).collect();
        let place = at.index(file[damaged].len());
        file[damaged][place] ^= bits;
        let (found, bad, _) = read(&file.concat());
        let whole = read(&records.concat()).0;
        let rest: Vec<_> = whole.iter().enumerate().filter(|(n, _)| *n != damaged).map(|(_, record)| record.clone()).collect();
        // Damage behind a record's last byte, and to what its bytes do not depend on (time, system, level, which of two equal pieces is
        // repeated), does it no harm. What comes of damaged data may look like several records.
        prop_assert!(found == whole || (found == rest && bad >= 1), "{:?} {} at {}", found, bad, place);
    }
}
