//! Archive files as Common Crawl makes them: WARC files of pages, and the WAT files that `ia-web-commons` makes of those.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::Write as _;
use std::rc::Rc;

use lol_html::html_content::{Element, TextChunk};
use lol_html::{HtmlRewriter, Settings, element, text};

/// A page that was crawled.
pub(crate) struct Page<'a> {
    pub(crate) url: &'a str,
    /// Headers of the answer beside `Content-Type`, each with its line end.
    pub(crate) headers: &'a str,
    pub(crate) html: &'a str,
}

/// A gzip member.
pub(crate) fn member(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// A record with the headers that Common Crawl writes.
pub(crate) fn record(kind: &str, target: &str, content_type: &str, block: &[u8]) -> Vec<u8> {
    let name = if kind == "warcinfo" { "WARC-Filename" } else { "WARC-Target-URI" };
    let head = format!(
        "WARC/1.0\r\nWARC-Type: {kind}\r\n{name}: {target}\r\nWARC-Date: 2024-05-19T07:25:24Z\r\n\
         WARC-Record-ID: <urn:uuid:2cd3845f-df52-4a79-b668-3a96d50e5fed>\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
        block.len()
    );
    [head.as_bytes(), block, b"\r\n\r\n"].concat()
}

const INFO: &[u8] = b"Software-Info: ia-web-commons.1.1.9-SNAPSHOT\r\nformat: WARC File Format 1.0\r\n\r\n";

/// The records of a WARC file: of each page the request, the answer and what the crawler noted.
#[allow(dead_code, reason = "the bench reads WAT files only")]
pub(crate) fn warc(pages: &[Page<'_>]) -> Vec<Vec<u8>> {
    let mut records = vec![record("warcinfo", "CC-MAIN-00000.warc.gz", "application/warc-fields", INFO)];
    for page in pages {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n{}Content-Length: {}\r\n\r\n{}",
            page.headers,
            page.html.len(),
            page.html
        );
        records.push(record("request", page.url, "application/http; msgtype=request", b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"));
        records.push(record("response", page.url, "application/http; msgtype=response", answer.as_bytes()));
        records.push(record(
            "metadata",
            page.url,
            "application/warc-fields",
            b"fetchTimeMs: 688\r\ncharset-detected: UTF-8\r\n\r\n",
        ));
    }
    records
}

/// The records of the WAT file that belongs to it.
pub(crate) fn wat(pages: &[Page<'_>]) -> Vec<Vec<u8>> {
    let mut records = vec![record("warcinfo", "CC-MAIN-00000.warc.wat.gz", "application/warc-fields", INFO)];
    let mut add = |target: &str, kind: &str, payload: &str| {
        let json = format!(
            "{{\"Container\":{{\"Filename\":\"CC-MAIN-20240519061520-20240519083520-00000.warc.gz\",\"Compressed\":true,\"Offset\":\"949\",\
             \"Gzip-Metadata\":{{\"Inflated-Length\":\"25358\",\"Footer-Length\":\"8\",\"Inflated-CRC\":\"536467295\",\"Deflate-Length\":\"5952\",\
             \"Header-Length\":\"10\"}}}},\"Envelope\":{{\"Format\":\"WARC\",\"WARC-Header-Length\":\"647\",\"Actual-Content-Length\":\"24707\",\
             \"WARC-Header-Metadata\":{{\"WARC-IP-Address\":\"128.199.40.232\",\"WARC-Target-URI\":{},\
             \"WARC-Warcinfo-ID\":\"<urn:uuid:ebb601fe-1e84-4e78-8104-902709383f99>\",\"WARC-Date\":\"2024-05-19T07:25:24Z\",\
             \"Content-Length\":\"24707\",\"WARC-Record-ID\":\"<urn:uuid:2cd3845f-df52-4a79-b668-3a96d50e5fed>\",\"WARC-Type\":\"{kind}\",\
             \"Content-Type\":\"application/http; msgtype={kind}\"}},\"Block-Digest\":\"sha1:U45OUWTVGO5ZPCXRAP5JJMF4OB4VXRQ5\",\
             \"Payload-Metadata\":{{{payload}}}}}}}",
            quoted(target)
        );
        records.push(record("metadata", target, "application/json", json.as_bytes()));
    };
    for page in pages {
        add(
            page.url,
            "request",
            "\"Actual-Content-Type\":\"application/http; msgtype=request\",\"HTTP-Request-Metadata\":{\"Headers-Length\":\"319\",\
             \"Entity-Trailing-Slop-Length\":\"0\",\"Entity-Length\":\"0\",\"Headers\":{\"Accept\":\"text/html,application/xhtml+xml\",\
             \"User-Agent\":\"CCBot/2.0 (https://commoncrawl.org/faq/)\",\"Connection\":\"Keep-Alive\",\"Host\":\"a.test\",\
             \"Accept-Language\":\"en-US,en;q=0.5\",\"Accept-Encoding\":\"gzip\"},\"Request-Message\":{\"Path\":\"/\",\
             \"Version\":\"HTTP/1.1\",\"Method\":\"GET\"},\"Entity-Digest\":\"sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ\"},\"Trailing-Slop-Length\":\"4\"",
        );
        let mut headers =
            String::from("\"Server\":\"nginx\",\"Vary\":\"Accept-Encoding\",\"Content-Type\":\"text/html; charset=utf-8\"");
        let mut lines: Vec<(&str, Vec<String>)> = Vec::new();
        for (name, value) in page.headers.lines().filter_map(|line| line.split_once(": ")) {
            match lines.iter_mut().find(|(n, _)| *n == name) {
                Some((_, values)) => values.push(quoted(value)),
                None => lines.push((name, vec![quoted(value)])),
            }
        }
        for (name, values) in lines {
            let value = if values.len() == 1 { values[0].clone() } else { format!("[{}]", values.join(",")) };
            write!(headers, ",{}:{value}", quoted(name)).unwrap();
        }
        let payload = format!(
            "\"Actual-Content-Type\":\"application/http; msgtype=response\",\"HTTP-Response-Metadata\":{{\"Headers-Length\":\"317\",\
             \"Entity-Trailing-Slop-Length\":\"0\",\"Entity-Length\":\"{}\",\"Headers\":{{{headers}}},\"Response-Message\":{{\"Status\":\"200\",\
             \"Version\":\"HTTP/1.1\",\"Reason\":\"OK\"}},\"HTML-Metadata\":{},\"Entity-Digest\":\"sha1:CYIY4H7KRQJBLBBRZLT4NSUPM4NG27KO\"}},\
             \"Trailing-Slop-Length\":\"4\"",
            page.html.len(),
            html_metadata(page.html)
        );
        add(page.url, "response", &payload);
        add(
            page.url,
            "metadata",
            "\"Actual-Content-Type\":\"application/metadata-fields\",\"WARC-Metadata-Metadata\":{\"Metadata-Records\":[{\"Value\":\"688\",\
             \"Name\":\"fetchTimeMs\"},{\"Value\":\"UTF-8\",\"Name\":\"charset-detected\"}]},\"Actual-Content-Length\":\"200\",\"Trailing-Slop-Length\":\"0\"",
        );
    }
    records
}

/// A JSON text.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}

/// The parts of `HTML-Metadata` as they are found.
#[derive(Default)]
struct Metadata {
    base: Option<String>,
    title: String,
    metas: Vec<String>,
    head_links: Vec<String>,
    scripts: Vec<String>,
    links: Vec<String>,
    /// Open anchors: the members of their objects, and their texts.
    anchors: Vec<(String, String)>,
}

/// What `ExtractingParseObserver` keeps: the attributes that it lists for each tag, in the order in which it adds them.
fn html_metadata(html: &str) -> String {
    let data = Rc::new(RefCell::new(Metadata::default()));
    let (tags, texts, titles) = (Rc::clone(&data), Rc::clone(&data), Rc::clone(&data));
    let settings = Settings::new()
        .with_strict(false)
        .append_element_content_handler(element!("*", move |el| {
            if el.tag_name() == "a" {
                let opening = anchor(el);
                tags.borrow_mut().anchors.push((opening, String::new()));
                let closing = Rc::clone(&tags);
                if let Some(handlers) = el.end_tag_handlers() {
                    handlers.push(Box::new(move |_| {
                        closing.borrow_mut().close_anchor();
                        Ok(())
                    }));
                }
            } else {
                tags.borrow_mut().tag(el);
            }
            Ok(())
        }))
        .append_element_content_handler(text!("a", move |t: &mut TextChunk<'_>| {
            let words = htmlize::unescape(t.as_str()).split_whitespace().collect::<Vec<_>>().join(" ");
            for (_, text) in &mut texts.borrow_mut().anchors {
                if !text.is_empty() && !words.is_empty() {
                    text.push(' ');
                }
                text.push_str(&words);
            }
            Ok(())
        }))
        .append_element_content_handler(text!("title", move |t: &mut TextChunk<'_>| {
            titles.borrow_mut().title.push_str(t.as_str().trim());
            Ok(())
        }));
    let mut reader = HtmlRewriter::new(settings, |_: &[u8]| {});
    reader.write(html.as_bytes()).unwrap();
    reader.end().unwrap();
    let data = data.borrow();
    let mut head = vec![format!("\"Title\":{}", quoted(&htmlize::unescape(&*data.title)))];
    head.extend(data.base.iter().map(|base| format!("\"Base\":{}", quoted(base))));
    for (name, list) in [("Metas", &data.metas), ("Link", &data.head_links), ("Scripts", &data.scripts)] {
        if !list.is_empty() {
            head.push(format!("\"{name}\":[{}]", list.join(",")));
        }
    }
    format!("{{\"Head\":{{{}}},\"Links\":[{}]}}", head.join(","), data.links.join(","))
}

fn value(el: &Element<'_, '_>, name: &str) -> Option<String> {
    el.get_attribute(name).map(|v| htmlize::unescape_attribute(v.as_str()).into_owned())
}

/// An object with path and address, and those attributes that are there.
fn link(el: &Element<'_, '_>, attribute: &str, others: &[&str]) -> Option<String> {
    let url = value(el, attribute)?;
    let mut object = format!("\"path\":\"{}@/{attribute}\",\"url\":{}", el.tag_name().to_uppercase(), quoted(&url));
    for name in others {
        if let Some(value) = value(el, name) {
            write!(object, ",\"{name}\":{}", quoted(&value)).unwrap();
        }
    }
    Some(object)
}

fn anchor(el: &Element<'_, '_>) -> String {
    link(el, "href", &["target", "alt", "title", "rel", "hreflang", "type"]).unwrap_or_default()
}

impl Metadata {
    fn close_anchor(&mut self) {
        let Some((mut object, text)) = self.anchors.pop() else { return };
        if object.is_empty() {
            return;
        }
        let text: String = text.trim().chars().take(128).collect();
        if !text.is_empty() {
            write!(object, ",\"text\":{}", quoted(&text)).unwrap();
        }
        self.links.push(format!("{{{object}}}"));
    }

    fn tag(&mut self, el: &Element<'_, '_>) {
        for name in ["background", "data-href", "data-uri"] {
            self.links.extend(link(el, name, &[]).map(|o| format!("{{{o}}}")));
        }
        let (list, found) = match el.tag_name().as_str() {
            "base" => return self.base = value(el, "href").or(self.base.take()),
            "meta" => {
                let of = |name: &str| value(el, name).map(|v| format!("\"{name}\":{}", quoted(&v)));
                let object: Vec<_> = ["name", "rel", "content", "http-equiv", "property"].into_iter().filter_map(of).collect();
                (&mut self.metas, (!object.is_empty()).then(|| object.join(",")))
            }
            "link" => (&mut self.head_links, link(el, "href", &["rel", "type"])),
            "script" => (&mut self.scripts, link(el, "src", &["type"])),
            "img" => (&mut self.links, link(el, "src", &["alt", "title"])),
            "area" => (&mut self.links, link(el, "href", &["rel"])),
            "form" => (&mut self.links, link(el, "action", &["target", "method"])),
            "iframe" | "frame" | "embed" | "video" | "audio" | "track" | "source" | "input" => {
                (&mut self.links, link(el, "src", &[]))
            }
            _ => return,
        };
        list.extend(found.map(|object| format!("{{{object}}}")));
    }
}
