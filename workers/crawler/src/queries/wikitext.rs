//! The prose of a wiki page: wikitext without its markup.
//!
//! One pass, in time and memory linear in the page whatever it holds: open templates, tables and links stand on a stack with the place where
//! their text began, and what is not shown is cut off the output when they end. What is opened and never closed is text, as in MediaWiki.

use memchr::memmem;

/// Templates, tables and links inside each other; MediaWiki stops at 40 templates. What is deeper is taken as text.
const DEEPEST: usize = 1_000;
/// The longest tag, with its attributes.
const LONGEST_TAG: usize = 1 << 10;
/// Elements that are no prose, with all that is in them.
const NOT_PROSE: [&str; 18] = [
    "ref",
    "math",
    "chem",
    "ce",
    "gallery",
    "timeline",
    "score",
    "syntaxhighlight",
    "source",
    "graph",
    "imagemap",
    "templatedata",
    "hiero",
    "mapframe",
    "maplink",
    "inputbox",
    "style",
    "script",
];
/// The element whose content is text as it stands.
const LITERAL: &str = "nowiki";
/// Elements that end what stands before them.
const BREAKS: [&str; 12] = ["br", "p", "div", "li", "ul", "ol", "td", "tr", "th", "hr", "blockquote", "poem"];

/// Prefixes of links to pictures and categories, which are not prose, in the wiki's language and in English.
#[derive(Clone, Debug)]
pub(super) struct HiddenLinks(Vec<String>);

impl HiddenLinks {
    /// English ones, and those of a dump's header.
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let english = ["file", "image", "media", "category"].map(str::to_owned);
        Self(english.into_iter().chain(names.into_iter().map(|n| n.to_lowercase())).collect())
    }

    fn hide(&self, target: &str) -> bool {
        let Some((prefix, _)) = target.split_once(':') else { return false };
        let prefix = prefix.trim();
        prefix.len() < 64 && self.0.contains(&prefix.replace('_', " ").to_lowercase())
    }
}

/// `[[de:Katze]]` at the foot of a page: the page in another language.
fn is_language_link(target: &str) -> bool {
    let Some((prefix, _)) = target.split_once(':') else { return false };
    let lower = prefix.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
    lower && (matches!(prefix.len(), 2 | 3) || (prefix.len() <= 12 && prefix.contains('-')))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Template,
    Table,
    /// Before its first `|`.
    Target,
    /// After it.
    Label,
    /// A link of which nothing is shown.
    Hidden,
}

/// Puts the prose of `text` into `out` (emptied first). A line end stands wherever something was left out between words that do not follow
/// each other.
pub(super) fn plain(text: &str, hidden: &HiddenLinks, out: &mut String) {
    out.clear();
    let mut page =
        Page { text, hidden, out, open: Vec::new(), templates: 0, missing: [false; NOT_PROSE.len() + 1], no_comment_end: false };
    page.run();
}

struct Page<'a> {
    text: &'a str,
    hidden: &'a HiddenLinks,
    out: &'a mut String,
    open: Vec<(Kind, usize)>,
    templates: usize,
    /// Elements whose end does not come any more: searched for once.
    missing: [bool; NOT_PROSE.len() + 1],
    no_comment_end: bool,
}

impl Page<'_> {
    fn run(&mut self) {
        let bytes = self.text.as_bytes();
        let (mut at, mut copied) = (0, 0);
        while at < bytes.len() {
            if !is_special(bytes[at]) {
                at += 1;
                continue;
            }
            self.out.push_str(&self.text[copied..at]);
            // What is not markup is a character like any other.
            let next = self.markup(at).unwrap_or_else(|| {
                self.out.push(char::from(bytes[at]));
                at + 1
            });
            at = next;
            copied = next;
        }
        self.out.push_str(&self.text[copied..]);
    }

    /// What to do with the special byte at `at`: where to go on, or `None` if it stands for itself.
    fn markup(&mut self, at: usize) -> Option<usize> {
        let rest = &self.text[at..];
        let bytes = rest.as_bytes();
        match (bytes[0], bytes.get(1)) {
            (b'<', _) => self.angle(at),
            (b'{', Some(b'{')) => self.start(Kind::Template).then_some(at + 2),
            (b'{', Some(b'|')) => (self.at_line_start(at) && self.start(Kind::Table)).then_some(at + 2),
            (b'}', Some(b'}')) => self.end_template().then_some(at + 2),
            (b'|', Some(b'}')) if self.at_line_start(at) && self.end_table() => Some(at + 2),
            (b'|', _) => self.pipe().then_some(at + 1),
            (b'[', Some(b'[')) => self.start(Kind::Target).then_some(at + 2),
            (b'[', _) => url_prefix(&rest[1..]).map(|_| self.skip_url(at + 1)),
            (b']', Some(b']')) => self.end_link().then_some(at + 2),
            (b':', Some(b'/')) if rest.starts_with("://") => {
                // The scheme is written already.
                let written = &self.out[self.open.last().map_or(0, |(_, start)| *start)..];
                let scheme = written.bytes().rev().take(10).take_while(u8::is_ascii_alphabetic).count();
                (scheme > 1).then(|| {
                    self.out.truncate(self.out.len() - scheme);
                    self.skip_url(at)
                })
            }
            (b'\'', Some(b'\'')) => Some(at + bytes.iter().take_while(|b| **b == b'\'').count()),
            (b'_', Some(b'_')) => {
                let name = bytes[2..].iter().take(32).take_while(|b| b.is_ascii_uppercase()).count();
                (name > 0 && bytes[2 + name..].starts_with(b"__")).then_some(at + name + 4)
            }
            (b'&', Some(_)) => {
                let end = bytes.iter().take(32).position(|b| *b == b';')?;
                let entity = &rest[..=end];
                let meant = htmlize::unescape(entity);
                (meant != entity).then(|| {
                    self.out.push_str(&meant);
                    at + end + 1
                })
            }
            (b'\n', _) => {
                // A link's target is one line.
                while matches!(self.open.last(), Some((Kind::Target, _))) {
                    self.open.pop();
                }
                None
            }
            _ => None,
        }
    }

    fn at_line_start(&self, at: usize) -> bool {
        self.text[..at].bytes().rev().take(64).find(|b| !matches!(b, b' ' | b'\t' | b':')).is_none_or(|b| b == b'\n')
    }

    fn start(&mut self, kind: Kind) -> bool {
        if self.open.len() == DEEPEST {
            return false;
        }
        self.templates += usize::from(kind == Kind::Template);
        self.open.push((kind, self.out.len()));
        true
    }

    fn cut(&mut self, to: usize) {
        self.out.truncate(to);
        self.out.push('\n');
    }

    /// Ends the innermost template, and whatever was opened in it and not closed.
    fn end_template(&mut self) -> bool {
        if self.templates == 0 {
            return false;
        }
        while let Some((kind, start)) = self.open.pop() {
            if kind == Kind::Template {
                self.templates -= 1;
                self.cut(start);
                break;
            }
        }
        true
    }

    fn end_table(&mut self) -> bool {
        let links =
            self.open.iter().rev().take_while(|(kind, _)| matches!(kind, Kind::Target | Kind::Label | Kind::Hidden)).count();
        let table = self.open.len().checked_sub(links + 1).filter(|i| self.open[*i].0 == Kind::Table);
        table.is_some_and(|i| {
            self.cut(self.open[i].1);
            self.open.truncate(i);
            true
        })
    }

    /// Ends a link's target, of which nothing is shown.
    fn pipe(&mut self) -> bool {
        let Some((kind, start)) = self.open.last_mut() else { return false };
        match kind {
            Kind::Target if self.hidden.hide(&self.out[*start..]) => *kind = Kind::Hidden,
            Kind::Target => *kind = Kind::Label,
            Kind::Label => {}
            _ => return false,
        }
        if *kind == Kind::Label {
            let start = *start;
            self.out.truncate(start);
        }
        true
    }

    fn end_link(&mut self) -> bool {
        let Some((kind, start)) = self.open.last().copied() else { return false };
        let shown = match kind {
            Kind::Label => true,
            Kind::Hidden => false,
            Kind::Target => {
                let target = &self.out[start..];
                !self.hidden.hide(target) && !is_language_link(target)
            }
            Kind::Template | Kind::Table => return false,
        };
        if !shown {
            self.cut(start);
        }
        self.open.pop();
        true
    }

    /// The place behind an address that starts at `at`.
    fn skip_url(&mut self, at: usize) -> usize {
        let ends = |c: char| c.is_whitespace() || "<>[]|{}\"".contains(c);
        self.out.push(' ');
        self.text[at..].find(ends).map_or(self.text.len(), |n| at + n)
    }

    fn angle(&mut self, at: usize) -> Option<usize> {
        let rest = &self.text[at..];
        if rest.starts_with("<!--") && !self.no_comment_end {
            let end = memmem::find(rest.as_bytes(), b"-->");
            self.no_comment_end = end.is_none();
            return end.map(|n| at + n + 3);
        }
        let bytes = rest.as_bytes();
        let closing = usize::from(bytes.get(1) == Some(&b'/'));
        let name_len = bytes[1 + closing..].iter().take(20).take_while(|b| b.is_ascii_alphanumeric()).count();
        if !bytes.get(1 + closing)?.is_ascii_alphabetic() {
            return None;
        }
        let name = rest[1 + closing..1 + closing + name_len].to_ascii_lowercase();
        let end = memchr::memchr(b'>', &bytes[..bytes.len().min(LONGEST_TAG)])? + 1;
        let alone = closing == 1 || bytes[end - 2] == b'/';
        if BREAKS.contains(&name.as_str()) {
            self.out.push('\n');
        }
        if alone {
            return Some(at + end);
        }
        let kind = NOT_PROSE.iter().chain([&LITERAL]).position(|n| *n == name).filter(|kind| !self.missing[*kind]);
        let Some(kind) = kind else { return Some(at + end) };
        let Some((inner, next)) = self.element_end(at + end, &name) else {
            self.missing[kind] = true;
            return Some(at + end);
        };
        match name.as_str() {
            LITERAL => self.out.push_str(&self.text[at + end..inner]),
            // A note stands between words that belong together, a formula in place of one.
            "ref" => {}
            _ => self.out.push('\n'),
        }
        Some(next)
    }

    /// Where `</name` stands after `from`, and what comes behind it.
    fn element_end(&self, from: usize, name: &str) -> Option<(usize, usize)> {
        let bytes = &self.text.as_bytes()[from..];
        memmem::find_iter(bytes, b"</").find_map(|i| {
            let tail = &bytes[i + 2..];
            let named = tail.get(..name.len())?.eq_ignore_ascii_case(name.as_bytes());
            let behind = &tail[name.len().min(tail.len())..];
            let gap = behind.iter().take(LONGEST_TAG).take_while(|b| b.is_ascii_whitespace()).count();
            (named && behind.get(gap) == Some(&b'>')).then_some((from + i, from + i + 2 + name.len() + gap + 1))
        })
    }
}

const fn is_special(byte: u8) -> bool {
    matches!(byte, b'<' | b'{' | b'}' | b'|' | b'[' | b']' | b':' | b'\'' | b'_' | b'&' | b'\n')
}

/// The scheme of an address in `[…]`.
fn url_prefix(text: &str) -> Option<()> {
    let scheme = text.bytes().take(10).take_while(u8::is_ascii_alphabetic).count();
    let behind = &text[scheme..];
    (behind.starts_with("//") || behind.starts_with("://") || text.starts_with("mailto:")).then_some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// The prose with runs of spaces as one, `/` for line ends.
    fn prose(text: &str) -> String {
        let mut out = String::new();
        plain(text, &HiddenLinks::new(["Datei".to_owned()]), &mut out);
        let lines: Vec<_> =
            out.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|l| !l.is_empty()).collect();
        lines.join("/")
    }

    #[test]
    fn links_show_their_labels() {
        assert_eq!(prose("a [[red car|fast [[x]] one]] and [[cat]]s"), "a fast x one and cats");
        assert_eq!(prose("[[File:A.jpg|thumb|a [[heron|bird]] here]]b [[datei: B.png]] c"), "b/c");
        assert_eq!(prose("[[Category:Birds]][[:Category:Birds|birds]] [[de:Vogel]] [[zh-yue:鳥]]"), "birds");
        assert_eq!(
            prose("[http://x.org/a?b=c the site], [//y.org y] [mailto:a@b.c mail], [sic] http://bare.example/x_y end"),
            "the site], y] mail], [sic] end"
        );
        assert_eq!(prose("a [[broken\nlink]] b"), "a broken/link]] b");
    }

    #[test]
    fn what_is_not_prose_goes() {
        assert_eq!(prose("a {{cite|x={{y|[[z]]}}|{{{1}}} }} b"), "a/b");
        assert_eq!(prose("a<ref name=\"x\">{{cite</ref> b<ref name=x /> c<REF>d</Ref >e"), "a b ce");
        assert_eq!(prose("x <math>\\frac{{a}}{b}</math> y<!-- {{ --> z"), "x/y z");
        assert_eq!(prose("one\n{| class=x\n|-\n| {{t|}} || [[a|b]]\n{|\n|inner\n|}\n|}\ntwo"), "one/two");
        assert_eq!(
            prose("'''Bold''' ''it'''s'' <b>b</b> __NOTOC__ a<br/>b &nbsp;&amp;&eacute; &x; <nowiki>{{no}}</nowiki>"),
            "Bold its b a/b &é &x; {{no}}"
        );
        assert_eq!(prose("== Head ==\n* item"), "== Head ==/* item");
    }

    #[test]
    fn what_never_ends_is_text() {
        assert_eq!(prose("a {{b [[c|d"), "a b d");
        assert_eq!(prose("a }} b ]] c |} d"), "a }} b ]] c |} d");
        assert_eq!(prose("a <!-- b"), "a <!-- b");
        assert_eq!(prose("a <ref>b"), "a b");
        assert_eq!(prose("1 < 2 <3 </ >"), "1 < 2 <3 </ >");
        assert_eq!(prose("{{a [[b }} c"), "c");
    }

    #[test]
    fn hostile_depth_and_length_take_linear_time() {
        let deep = 300_000;
        for unit in [
            "{{", "[[a|", "{|\n", "\n{|", "<ref>", "<!--", "<a ", "</", "[[File:", "''", "&", "://", "<nowiki>", "x}}", "|}",
            "__A",
        ] {
            let mut out = String::new();
            let started = std::time::Instant::now();
            plain(&unit.repeat(deep), &HiddenLinks::new([]), &mut out);
            let both = unit.repeat(deep) + &"}}".repeat(deep) + &"]]".repeat(deep);
            plain(&both, &HiddenLinks::new([]), &mut out);
            assert!(out.len() <= both.len() + deep);
            eprintln!("{unit:?} {:?}", started.elapsed());
        }
    }

    proptest! {
        #[test]
        fn foreign_markup_never_panics(parts in proptest::collection::vec(
            proptest::sample::select(vec![
                "{{", "}}", "{|", "|}", "[[", "]]", "[", "]", "|", "\n", "'", "''", "<ref>", "</ref>", "<ref/>", "<!--", "-->", "<", ">", "&amp;", "&",
                "é", "猫", "a b", "File:", "://", "http://x", "__", "TOC", "<nowiki>", "</nowiki>", "<br", ":", " ", "de:", "ab",
            ]), 0..60)) {
            let text = parts.concat();
            let mut out = String::new();
            plain(&text, &HiddenLinks::new([]), &mut out);
            prop_assert!(out.len() <= 2 * text.len() + 1);
        }

        #[test]
        fn plain_text_stays(text in "[a-zA-Zéß猫0-9 .,;!?()-]{0,80}") {
            let mut out = String::new();
            plain(&text, &HiddenLinks::new([]), &mut out);
            prop_assert_eq!(out, text);
        }
    }
}
