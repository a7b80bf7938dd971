//! A MediaWiki XML dump (`pages-articles`), as a stream: cut between pages, so that each part is read by another thread.

use std::io::{self, Read};
use std::sync::Arc;

use memchr::memmem::{self, Finder};
use quick_xml::events::Event;

use super::wikitext::HiddenLinks;

/// Bytes of XML handed over at a time, at least a page.
const CHUNK: usize = 1 << 20;
/// The longest page that is read. MediaWiki's own limit is 2 MiB of wikitext.
const LONGEST_PAGE: usize = 16 << 20;
const PAGE: &[u8] = b"<page>";
const PAGE_END: &[u8] = b"</page>";
/// Namespaces of links that are not prose: media, files, categories.
const HIDDEN_NAMESPACES: [&[u8]; 3] = [b"-2", b"6", b"14"];

/// Some whole pages, with what their dump's header says.
pub(super) struct Chunk {
    xml: Vec<u8>,
    pub(super) hidden: Arc<HiddenLinks>,
}

/// What was in a dump.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DumpEnd {
    /// Pages longer than [`LONGEST_PAGE`], which were passed over.
    pub(super) too_long: u64,
    /// Whether there was a page at all.
    pub(super) pages: bool,
    /// Whether it ended within a page.
    pub(super) cut: bool,
}

/// Cuts a dump into chunks, until `take` wants no more.
pub(super) fn chunks(mut dump: impl Read, mut take: impl FnMut(Chunk) -> bool) -> io::Result<DumpEnd> {
    let page_end = Finder::new(PAGE_END);
    let mut end = DumpEnd::default();
    let mut hidden: Option<Arc<HiddenLinks>> = None;
    let (mut held, mut searched, mut skipping) = (Vec::new(), 0, false);
    loop {
        let n = (&mut dump).take(CHUNK as u64).read_to_end(&mut held)?;
        if n == 0 {
            break;
        }
        // Only what is new is searched, with room for an end that lies across.
        if skipping {
            match page_end.find(&held) {
                Some(at) => {
                    held.drain(..at + PAGE_END.len());
                    (skipping, searched) = (false, 0);
                }
                None => {
                    held.drain(..held.len().saturating_sub(PAGE_END.len()));
                    continue;
                }
            }
        }
        let last = memmem::rfind(&held[searched..], PAGE_END).map(|at| searched + at + PAGE_END.len());
        if let Some(last) = last {
            let rest = held.split_off(last);
            let xml = std::mem::replace(&mut held, rest);
            let hidden = hidden.get_or_insert_with(|| Arc::new(HiddenLinks::new(header(&xml))));
            end.pages = true;
            if !take(Chunk { xml, hidden: Arc::clone(hidden) }) {
                return Ok(end);
            }
        }
        searched = held.len().saturating_sub(PAGE_END.len());
        if held.len() > LONGEST_PAGE {
            end.too_long += 1;
            skipping = true;
        }
    }
    end.cut = skipping || memmem::find(&held, PAGE).is_some();
    Ok(end)
}

/// The names of namespaces that a header gives, of those that are hidden.
fn header(xml: &[u8]) -> Vec<String> {
    let head = &xml[..memmem::find(xml, PAGE).unwrap_or(0)];
    let mut reader = quick_xml::Reader::from_reader(head);
    let (mut names, mut wanted) = (Vec::new(), false);
    // A header that is not XML costs the names that come after the fault.
    while let Ok(event) = reader.read_event() {
        match event {
            Event::Start(e) if e.name().as_ref() == b"namespace" => {
                let key = e.try_get_attribute("key").ok().flatten();
                wanted = key.is_some_and(|k| HIDDEN_NAMESPACES.contains(&k.value.as_ref()));
            }
            Event::Text(text) if wanted => names.extend(text.decode().ok().map(String::from)),
            Event::End(_) => wanted = false,
            Event::Eof => break,
            _ => {}
        }
    }
    names
}

/// What became of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PageKind {
    /// Its wikitext has been read.
    Article,
    Redirect,
    /// A talk page, a template, a category, …
    OtherNamespace,
    /// It is not well-formed XML in UTF-8.
    Broken,
}

impl Chunk {
    /// Calls `each` for every page, with the wikitext if it is an article; `text` is reused.
    pub(super) fn pages<E>(&self, text: &mut String, mut each: impl FnMut(PageKind, &str) -> Result<(), E>) -> Result<(), E> {
        let mut rest = self.xml.as_slice();
        while let Some(end) = memmem::find(rest, PAGE_END) {
            let start = memmem::rfind(&rest[..end], PAGE).unwrap_or(end);
            let kind = page(&rest[start..end], text).unwrap_or(PageKind::Broken);
            each(kind, text)?;
            rest = &rest[end + PAGE_END.len()..];
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Field {
    None,
    Namespace,
    Text,
}

/// Reads `<page>…`, of which the last `<text>` counts; `None` if it cannot be read.
fn page(xml: &[u8], text: &mut String) -> Option<PageKind> {
    let mut reader = quick_xml::Reader::from_reader(xml);
    let mut namespace = String::new();
    let (mut field, mut redirect, mut any) = (Field::None, false, false);
    text.clear();
    loop {
        let into = match field {
            Field::Namespace => Some(&mut namespace),
            Field::Text => Some(&mut *text),
            Field::None => None,
        };
        match (reader.read_event().ok()?, into) {
            (Event::Start(e), _) => match e.name().as_ref() {
                b"ns" => field = Field::Namespace,
                b"text" => {
                    text.clear();
                    (field, any) = (Field::Text, true);
                }
                b"redirect" => redirect = true,
                _ => {}
            },
            (Event::Empty(e), _) => match e.name().as_ref() {
                b"text" => {
                    text.clear();
                    any = true;
                }
                b"redirect" => redirect = true,
                _ => {}
            },
            (Event::End(_), _) => field = Field::None,
            (Event::Text(e), Some(into)) => into.push_str(&e.decode().ok()?),
            (Event::CData(e), Some(into)) => into.push_str(&e.decode().ok()?),
            (Event::GeneralRef(e), Some(into)) => match e.resolve_char_ref().ok()? {
                Some(c) => into.push(c),
                None => into.push_str(quick_xml::escape::resolve_predefined_entity(&e.decode().ok()?)?),
            },
            (Event::Eof, _) => break,
            _ => {}
        }
    }
    Some(match (any, redirect, namespace.trim()) {
        (false, ..) => PageKind::Broken,
        (_, true, _) => PageKind::Redirect,
        // Dumps before 2012 have no namespaces; their other pages have a prefix in the title, and few of them are in `pages-articles`.
        (.., "" | "0") => PageKind::Article,
        _ => PageKind::OtherNamespace,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "<mediawiki><siteinfo><namespaces><namespace key=\"6\">Datei</namespace><namespace key=\"0\" />\
        <namespace key=\"1\">Diskussion</namespace></namespaces></siteinfo>\n";

    fn article(text: &str) -> String {
        format!("  <page><title>t</title><ns>0</ns><revision><text xml:space=\"preserve\">{text}</text></revision></page>\n")
    }

    fn read(xml: &[u8]) -> (Vec<(PageKind, String)>, DumpEnd, Option<Arc<HiddenLinks>>) {
        let (mut got, mut hidden, mut buffer) = (Vec::new(), None, String::new());
        let end = chunks(xml, |chunk| {
            chunk
                .pages(&mut buffer, |kind, text| {
                    got.push((kind, text.to_owned()));
                    Ok::<_, ()>(())
                })
                .unwrap();
            hidden = Some(chunk.hidden);
            true
        })
        .unwrap();
        (got, end, hidden)
    }

    #[test]
    fn tells_articles_from_the_rest() {
        let xml = format!(
            "{HEAD}{}{}<page><ns>1</ns><text>talk</text></page><page><ns>0</ns><redirect title=\"x\" /><text>#R</text></page>\
             <page><ns>0</ns></page><page><ns>0</ns><text>a &bogus; b</text></page><page><ns>0</ns><text bytes=\"0\" /></page></mediawiki>",
            article("caf&#xe9; &lt;b&gt; &amp;amp; 'x'"),
            article("old</text></revision><revision><text>new"),
        );
        let (got, end, hidden) = read(xml.as_bytes());
        let kinds: Vec<_> = got.iter().map(|g| g.0).collect();
        use PageKind::{Article, Broken, OtherNamespace, Redirect};
        assert_eq!(kinds, [Article, Article, OtherNamespace, Redirect, Broken, Broken, Article]);
        assert_eq!(got[0].1, "café <b> &amp; 'x'");
        assert_eq!(got[1].1, "new");
        assert_eq!(end, DumpEnd { too_long: 0, pages: true, cut: false });
        assert!(format!("{hidden:?}").contains("datei") && !format!("{hidden:?}").contains("diskussion"));
    }

    #[test]
    fn a_page_that_never_ends_is_passed_over_in_bounded_memory() {
        let before = format!("{HEAD}{}", article("one"));
        let after = format!("</text></page>{}</mediawiki>", article("two"));
        let endless = io::repeat(b'x').take(3 * LONGEST_PAGE as u64);
        let dump = before.as_bytes().chain(&b"<page><ns>0</ns><text>"[..]).chain(endless).chain(after.as_bytes());
        let (mut got, mut longest) = (Vec::new(), 0);
        let mut buffer = String::new();
        let end = chunks(dump, |chunk| {
            longest = longest.max(chunk.xml.len());
            chunk
                .pages(&mut buffer, |_, text| {
                    got.push(text.to_owned());
                    Ok::<_, ()>(())
                })
                .is_ok()
        })
        .unwrap();
        assert_eq!(got, ["one", "two"]);
        assert_eq!(end, DumpEnd { too_long: 1, pages: true, cut: false });
        assert!(longest <= LONGEST_PAGE + 2 * CHUNK);
    }

    #[test]
    fn knows_where_a_dump_was_cut() {
        let whole = format!("{HEAD}{}{}</mediawiki>", article("one"), article("two"));
        assert!(read(&whole.as_bytes()[..whole.len() - 40]).1.cut);
        assert_eq!(read(b"no dump at all").1, DumpEnd::default());
        assert_eq!(read(b"").1, DumpEnd::default());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(parts in proptest::collection::vec(proptest::sample::select(vec![
            "<page>", "</page>", "<text>", "</text>", "<ns>", "0", "</ns>", "<!--", "]]>", "<![CDATA[", "&#x0;", "&#xD800;", "&", "<", ">", "\"", "\u{e9}", "<?", "<text a=",
        ]), 0..40), cut in any::<prop::sample::Index>()) {
            let mut bytes = parts.concat().into_bytes();
            if !bytes.is_empty() {
                bytes.truncate(cut.index(bytes.len()) + 1);
            }
            read(&bytes);
        }
    }
}
