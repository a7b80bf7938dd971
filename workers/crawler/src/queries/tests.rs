//! Lists built from real files: a piece of the English Wikipedia, WordNet, and counts of English words (`scripts/setup.sh test` fetches them).
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::*;
use crate::CrawlError;

fn data(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/test-data").join(name);
    assert!(path.exists(), "{} is not there: run scripts/setup.sh test once", path.display());
    path
}

fn build(inputs: QueryInputs) -> QueryBuild {
    QueryBuild { inputs, threads: 2, ..QueryBuild::default() }
}

fn run(build: &QueryBuild) -> QueryTable {
    build.run(Box::new(|_, _| ())).unwrap()
}

fn counts(table: &QueryTable, source: QuerySource) -> HashMap<&str, u64> {
    table.rows.iter().filter(|r| r.source == source).map(|r| (&*r.text, r.count)).collect()
}

/// The pages of the piece of Wikipedia, and what stands before them.
fn pages() -> (String, Vec<String>) {
    let mut xml = String::new();
    bzip2::read::BzDecoder::new(std::fs::File::open(data("enwiki.xml.bz2")).unwrap()).read_to_string(&mut xml).unwrap();
    let (head, rest) = xml.split_once("<page>").unwrap();
    let pages = rest.split("<page>").map(|p| format!("<page>{}", p.trim_end_matches("</mediawiki>\n")));
    (head.to_owned(), pages.collect())
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

#[test]
fn every_synset_of_wordnet() {
    let table = run(&build(QueryInputs { wordnet: vec![data("query_sources/wordnet")], ..QueryInputs::default() }));
    assert_eq!(table.head.synsets, 117_659);
    let counts = counts(&table, QuerySource::Wordnet);
    // 86,571 names in lower case, as a plain reading of the files has them; some are the same words to the matcher (`ice-cream`, `ice cream`).
    assert_eq!(table.rows.len() as u64, table.head.sources[0].kept);
    assert!((86_000..=86_571).contains(&table.rows.len()), "{}", table.rows.len());
    assert_eq!(counts.values().sum::<u64>(), 117_659);
    for word in ["entity", "heron", "ice cream", "galore", "new york"] {
        assert!(counts.contains_key(word), "{word}");
    }
}

#[test]
fn words_and_pairs_of_a_real_dump() {
    let inputs = QueryInputs { dumps: vec![data("enwiki.xml.bz2")], ..QueryInputs::default() };
    let table = run(&QueryBuild { bigram_pmi: 8.0, bigram_count: 20, ..build(inputs.clone()) });
    let pages = table.head.pages.unwrap();
    assert_eq!((pages.articles, pages.redirects, pages.other, pages.broken, pages.too_long), (106, 100, 0, 0, 0));
    let words = counts(&table, QuerySource::Unigram);
    // What Python counts in the text that mwparserfromhell 0.7 leaves: 462,296 words, 534 of them 100 times and more. It differs from ours in
    // what it takes for markup.
    let near = |ours: u64, theirs: u64, percent: u64| ours.abs_diff(theirs) * 100 <= theirs * percent;
    assert!(near(pages.words, 462_296, 1) && near(words.len() as u64, 534, 2), "{} words, {} frequent", pages.words, words.len());
    for (word, n) in [("the", 32_995), ("of", 18_005), ("and", 14_243), ("in", 12_145), ("anarchism", 121), ("aristotle", 273)] {
        assert!(near(words[word], n, 1), "{word} {}", words[word]);
    }
    assert!(words.values().all(|n| *n >= 100));
    let pairs = counts(&table, QuerySource::Bigram);
    for pair in ["soviet union", "prime minister", "ayn rand", "civil war"] {
        assert!(pairs.contains_key(pair), "{pair}");
    }
    assert!(table.rows.iter().all(|r| r.pmi.is_some_and(|bits| bits >= 8.0) == (r.source == QuerySource::Bigram)));
    assert!(table.notes.is_empty(), "{:?}", table.notes);

    // At 30 bits nothing of so short a text is left, and that is said.
    let strict = run(&build(inputs));
    assert_eq!(counts(&strict, QuerySource::Bigram).len(), 0);
    assert!(strict.notes[0].contains("30 bits") && strict.notes[0].contains("18.8"), "{:?}", strict.notes);
}

#[test]
fn packing_threads_and_memory_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (head, pages) = pages();
    let pages = &pages[..40];
    let xml = format!("{head}{}</mediawiki>", pages.concat());
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).unwrap();
        folder.path().join(name)
    };
    // A stream for some pages each, as Wikimedia packs them; streams that end anywhere, as parallel packers make them; plain; gzip.
    let multistream: Vec<u8> = std::iter::once(head)
        .chain(pages.chunks(7).map(<[String]>::concat))
        .chain(["</mediawiki>".to_owned()])
        .flat_map(|p| packed(p.as_bytes()))
        .collect();
    let cut: Vec<u8> = xml.as_bytes().chunks(90_001).flat_map(packed).collect();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(xml.as_bytes()).unwrap();
    let rows = |path: PathBuf, threads: usize, memory: usize| {
        let inputs = QueryInputs { dumps: vec![path], ..QueryInputs::default() };
        let build = QueryBuild {
            threads,
            memory,
            unigram_count: 5,
            bigram_pmi: 5.0,
            bigram_count: 3,
            work_dir: folder.path().to_owned(),
            ..build(inputs)
        };
        run(&build).rows
    };
    let expected = rows(file("plain.xml", xml.as_bytes()), 1, 1 << 30);
    assert!(expected.len() > 900, "{}", expected.len());
    assert!(rows(file("multi.xml.bz2", &multistream), 3, 1 << 30) == expected);
    assert!(rows(file("cut.xml.bz2", &cut), 2, 1 << 30) == expected);
    assert!(rows(file("gz.xml", &gz.finish().unwrap()), 2, 1 << 20) == expected);
    assert!(rows(folder.path().join("plain.xml"), 2, 0) == expected);
}

#[test]
fn all_parts_make_one_table() {
    let folder = tempfile::tempdir().unwrap();
    let views = folder.path().join("pageviews-20220829-000000");
    std::fs::write(
        &views,
        "en Heron 40 0\nen.m Heron 40 0\nen Eiffel_Tower 70 0\nen Rarely_Read 69 0\nen Mona_Lisa_(painting) 500 0\n",
    )
    .unwrap();
    let titles = folder.path().join("titles.txt");
    std::fs::write(&titles, "page_title\nEiffel_Tower\nRarely_Read\n").unwrap();
    let inputs = QueryInputs {
        wordnet: vec![data("query_sources/wordnet")],
        word_counts: vec![data("query_sources/word_counts.tsv")],
        dumps: Vec::new(),
        page_views: vec![views],
        titles: vec![titles],
    };
    let settings = build(inputs);
    let table = run(&settings);
    let titles = counts(&table, QuerySource::Title);
    assert_eq!(titles, HashMap::from([("rarely read", 0), ("mona lisa", 500)]), "heron and the tower are in WordNet");
    let counted: Vec<_> = table.head.sources.iter().map(|s| (s.source, s.found, s.repeated, s.cut)).collect();
    assert_eq!((counted[2].1, counted[2].2), (5, 3));
    assert!(counted.iter().all(|c| c.3 == 0));
    let words = counts(&table, QuerySource::Unigram);
    assert!(words.len() > 150_000 && words.values().all(|n| *n >= 100), "{}", words.len());

    // The same files and settings give the same bytes, whatever the memory; a list reads them as they were written.
    let (one, two) = (folder.path().join("one.parquet"), folder.path().join("two.parquet"));
    table.write(&one, false).unwrap();
    let small = QueryBuild { memory: 1 << 20, threads: 1, ..settings.clone() };
    run(&small).write(&two, false).unwrap();
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap());
    assert!(matches!(table.write(&one, false), Err(CrawlError::Write { .. })));
    table.write(&one, true).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
    let list = QueryList::load(&one).unwrap();
    assert_eq!(list.len(), table.rows.len());
    assert!(list.iter().zip(&table.rows).all(|(q, r)| (q.text, q.source) == (&*r.text, r.source.name())));
    assert_eq!(TableHead::load(&one).unwrap(), Some(table.head.clone()));
    assert_eq!(
        table.head.inputs.iter().map(|f| f.name.as_str()).collect::<Vec<_>>()[3..],
        ["data.adv", "word_counts.tsv", "pageviews-20220829-000000", "titles.txt"]
    );

    // A smaller budget cuts from the end.
    let cut = run(&QueryBuild { budget: 100_000, ..settings });
    assert_eq!(cut.rows[..], table.rows[..100_000]);
    assert_eq!(cut.head.sources[2].cut, 2);
}

#[test]
fn says_what_is_wrong_with_an_input() {
    let folder = tempfile::tempdir().unwrap();
    let say = |name: &str, bytes: &[u8], inputs: fn(PathBuf) -> QueryInputs| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        build(inputs(path)).run(Box::new(|_, _| ())).unwrap_err().to_string()
    };
    let dump = |p| QueryInputs { dumps: vec![p], ..QueryInputs::default() };
    let words = |p| QueryInputs { word_counts: vec![p], ..QueryInputs::default() };
    assert!(say("none.xml", b"<html></html>", dump).contains("holds no `<page>`"));
    assert!(say("cut.xml", b"<page><text>x</text></page><page><te", dump).contains("ends within a page"));
    let whole = packed(b"<page><text>x</text></page>");
    assert!(say("cut.bz2", &whole[..whole.len() - 2], dump).contains("cut short"));
    assert!(say("words.txt", b"word,count\ncat,1\ndog\n", words).contains("line 3 is not a word and a count"));
    let newer = folder.path().join("newer.parquet");
    let counts = folder.path().join("words.tsv");
    std::fs::write(&counts, "cat\t200\n").unwrap();
    let mut table = run(&build(words(counts)));
    table.head.version += 1;
    table.write(&newer, false).unwrap();
    assert!(QueryList::load(&newer).unwrap_err().to_string().contains("version 2"));
    let wordnet = build(QueryInputs { wordnet: vec![folder.path().to_owned()], ..QueryInputs::default() });
    assert!(wordnet.run(Box::new(|_, _| ())).unwrap_err().to_string().contains("no WordNet database"));
    let gone = build(dump(folder.path().join("gone")));
    assert!(matches!(gone.run(Box::new(|_, _| ())), Err(CrawlError::Read { .. })));
    assert!(matches!(build(QueryInputs::default()).run(Box::new(|_, _| ())), Err(CrawlError::Config { .. })));
}
