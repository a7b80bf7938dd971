//! Images with their texts, links and wishes, out of a page.

mod charset;
mod srcset;

use std::cell::RefCell;
use std::rc::Rc;

use capfilt_schemas::TextSource;
use lol_html::html_content::{Element, TextType};
use lol_html::{HtmlRewriter, MemorySettings, Settings, element, text};
use url::Url;

pub(crate) use charset::decode;

use crate::address::{is_image_file, resolve};
use crate::opt_out::Directives;
use crate::text::clean;

/// Most images, links and open figures of a page; what comes later is left.
const MAX_IMAGES: usize = 5_000;
const MAX_LINKS: usize = 5_000;
const MAX_FIGURES: usize = 32;
/// Bytes of addresses and texts kept of a page: it holds what a short page can blow itself up to.
const MAX_KEPT: usize = 2 << 20;
/// Memory that the parser may hold for unfinished tags.
const PARSER_BYTES: usize = 4 << 20;

/// Where an image's address stands when the page loads it late, the most telling first.
const LAZY: [&str; 4] = ["data-src", "data-original", "data-lazy-src", "data-lazy"];
const LAZY_SRCSET: [&str; 2] = ["data-srcset", "data-lazy-srcset"];

/// What a page holds.
#[derive(Debug)]
pub(crate) struct Page {
    /// In the order of the page.
    pub(crate) images: Vec<FoundImage>,
    /// How many there were, those that are not kept included.
    pub(crate) images_seen: u64,
    /// Where links without `rel="nofollow"` lead, without fragments.
    pub(crate) links: Vec<Url>,
    /// What `<meta>` asks for.
    pub(crate) directives: Directives,
    /// Bytes that may still be kept.
    room: usize,
}

impl Default for Page {
    fn default() -> Self {
        Self { images: Vec::new(), images_seen: 0, links: Vec::new(), directives: Directives::default(), room: MAX_KEPT }
    }
}

impl Page {
    /// Takes an image up, if there is room for it.
    pub(crate) fn add_image(&mut self, url: String, texts: Vec<(TextSource, String)>) -> bool {
        let bytes = url.len() + texts.iter().map(|(_, text)| text.len()).sum::<usize>();
        let kept = self.images.len() < MAX_IMAGES && self.afford(bytes);
        if kept {
            self.images.push(FoundImage { url, texts });
        }
        kept
    }

    /// Takes bytes off what may still be kept; `false` if there are too few.
    const fn afford(&mut self, bytes: usize) -> bool {
        let enough = bytes <= self.room;
        if enough {
            self.room -= bytes;
        }
        enough
    }
}

/// An image and the texts that belong to it.
#[derive(PartialEq, Debug)]
pub(crate) struct FoundImage {
    /// Absolute, without fragment: the largest version that the page names.
    pub(crate) url: String,
    /// Clean and not empty, at most one of a source, the preferred source first.
    pub(crate) texts: Vec<(TextSource, String)>,
}

/// Reads a page that was found at `url`. `token` is the crawler's name in `<meta>`; texts are cut after `max_text` characters.
pub(crate) fn extract(html: &str, url: &Url, token: &str, max_text: usize) -> Page {
    let state = Rc::new(RefCell::new(State::new(url.clone(), token, max_text)));
    read(html, &state, true);
    // A page may end inside of them.
    let noscript = std::mem::take(&mut state.borrow_mut().noscript);
    if !noscript.is_empty() {
        read(&noscript, &state, false);
    }
    let mut state = state.borrow_mut();
    while !state.figures.is_empty() {
        state.end_figure();
    }
    std::mem::take(&mut state.page)
}

struct State {
    base: Url,
    base_is_set: bool,
    token: String,
    max_text: usize,
    page: Page,
    anchor: Option<Anchor>,
    /// Width and address of the best `<source>` of the open `<picture>`.
    picture: Option<(u32, String)>,
    figures: Vec<Figure>,
    noscript: String,
}

/// An open `<a>` that leads to an image file.
struct Anchor {
    target: Url,
    title: String,
}

#[derive(Default)]
struct Figure {
    caption: String,
    images: Vec<usize>,
}

type Shared = Rc<RefCell<State>>;

/// Runs the parser over a page, or over the content of a `<noscript>`, which it treats as text.
fn read(html: &str, state: &Shared, whole_page: bool) {
    let s = |state: &Shared| Rc::clone(state);
    let (base, meta, anchor, picture, source) = (s(state), s(state), s(state), s(state), s(state));
    let (img, figure, caption, block, noscript, fallback) = (s(state), s(state), s(state), s(state), s(state), s(state));
    let mut settings = Settings::new()
        .with_strict(false)
        .with_memory_settings(MemorySettings::new().with_max_allowed_memory_usage(PARSER_BYTES))
        .append_element_content_handler(element!("base[href]", move |el| {
            base.borrow_mut().set_base(el);
            Ok(())
        }))
        .append_element_content_handler(element!("meta[name][content]", move |el| {
            let mut state = meta.borrow_mut();
            let (name, content) = (attribute(el, "name"), attribute(el, "content"));
            let State { page, token, .. } = &mut *state;
            page.directives.add_meta(&name, &content, token);
            Ok(())
        }))
        .append_element_content_handler(element!("a[href], area[href]", move |el| {
            anchor.borrow_mut().open_anchor(el);
            let closing = Rc::clone(&anchor);
            close(el, move || closing.borrow_mut().anchor = None);
            Ok(())
        }))
        .append_element_content_handler(element!("picture", move |el| {
            picture.borrow_mut().picture = None;
            let closing = Rc::clone(&picture);
            close(el, move || closing.borrow_mut().picture = None);
            Ok(())
        }))
        .append_element_content_handler(element!("picture source", move |el| {
            source.borrow_mut().source(el);
            Ok(())
        }))
        .append_element_content_handler(element!("img, amp-img", move |el| {
            img.borrow_mut().image(el);
            Ok(())
        }))
        .append_element_content_handler(element!("figure", move |el| {
            let mut state = figure.borrow_mut();
            if state.figures.len() < MAX_FIGURES {
                state.figures.push(Figure::default());
                let closing = Rc::clone(&figure);
                close(el, move || closing.borrow_mut().end_figure());
            }
            Ok(())
        }))
        .append_element_content_handler(text!("figcaption", move |chunk| {
            if matches!(chunk.text_type(), TextType::Data | TextType::RCData) {
                caption.borrow_mut().caption(chunk.as_str());
            }
            Ok(())
        }))
        .append_element_content_handler(element!("figcaption br, figcaption p, figcaption div, figcaption li", move |_| {
            block.borrow_mut().caption(" ");
            Ok(())
        }));
    if whole_page {
        settings = settings
            .append_element_content_handler(text!("noscript", move |chunk| {
                noscript.borrow_mut().noscript.push_str(chunk.as_str());
                Ok(())
            }))
            .append_element_content_handler(element!("noscript", move |el| {
                let closing = Rc::clone(&fallback);
                close(el, move || {
                    let content = std::mem::take(&mut closing.borrow_mut().noscript);
                    read(&content, &closing, false);
                });
                Ok(())
            }));
    }
    let mut rewriter = HtmlRewriter::new(settings, |_: &[u8]| {});
    // What was found before the parser gave up (its memory is capped) stays found.
    if rewriter.write(html.as_bytes()).is_ok() {
        let _ = rewriter.end();
    }
}

/// Calls `then` at the element's end tag, if it has one.
fn close(el: &mut Element<'_, '_>, then: impl FnOnce() + 'static) {
    if let Some(handlers) = el.end_tag_handlers() {
        handlers.push(Box::new(move |_| {
            then();
            Ok(())
        }));
    }
}

impl State {
    fn new(base: Url, token: &str, max_text: usize) -> Self {
        Self {
            base,
            base_is_set: false,
            token: token.to_owned(),
            max_text,
            page: Page::default(),
            anchor: None,
            picture: None,
            figures: Vec::new(),
            noscript: String::new(),
        }
    }

    /// The first `<base>` counts.
    fn set_base(&mut self, el: &Element<'_, '_>) {
        if !self.base_is_set
            && let Some(base) = self.resolve(&attribute(el, "href"))
        {
            self.base = base;
            self.base_is_set = true;
        }
    }

    fn open_anchor(&mut self, el: &Element<'_, '_>) {
        self.anchor = None;
        let Some(target) = self.resolve(&attribute(el, "href")) else { return };
        if is_image_file(&target) {
            self.anchor = Some(Anchor { target, title: attribute(el, "title") });
            return;
        }
        let rel = attribute(el, "rel");
        let follow = !rel.split_ascii_whitespace().any(|r| r.eq_ignore_ascii_case("nofollow"));
        if follow && self.page.links.len() < MAX_LINKS && self.page.afford(target.as_str().len()) {
            self.page.links.push(target);
        }
    }

    fn source(&mut self, el: &Element<'_, '_>) {
        let kind = attribute(el, "type");
        if !kind.is_empty() && !["image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif"].contains(&kind.trim()) {
            return;
        }
        for name in LAZY_SRCSET.into_iter().chain(["srcset"]) {
            if let Some((url, width)) = srcset::largest(&attribute(el, name))
                && self.picture.as_ref().is_none_or(|(w, _)| width > *w)
            {
                self.picture = Some((width, url.to_owned()));
            }
        }
    }

    fn image(&mut self, el: &Element<'_, '_>) {
        let Some(url) = self.image_url(el) else { return };
        let own_title = attribute(el, "title");
        let title = match &self.anchor {
            Some(anchor) if own_title.trim().is_empty() => &anchor.title,
            _ => &own_title,
        };
        let texts = texts_of(&attribute(el, "alt"), title, self.max_text);
        self.page.images_seen += 1;
        let place = self.page.images.len();
        if self.page.add_image(url.into(), texts)
            && let Some(figure) = self.figures.last_mut()
        {
            figure.images.push(place);
        }
    }

    /// The full-size file that a link around the image leads to; else the largest of `<source>` and `srcset`; else a late-loading
    /// attribute (then `src` is a stand-in); else `src`.
    fn image_url(&mut self, el: &Element<'_, '_>) -> Option<Url> {
        let picture = self.picture.take();
        if let Some(anchor) = &self.anchor {
            return Some(anchor.target.clone());
        }
        let mut best = picture;
        for name in LAZY_SRCSET.into_iter().chain(["srcset"]) {
            if let Some((url, width)) = srcset::largest(&attribute(el, name))
                && best.as_ref().is_none_or(|(w, _)| width > *w)
            {
                best = Some((width, url.to_owned()));
            }
        }
        let named = best.and_then(|(_, url)| self.resolve(&url));
        named.or_else(|| LAZY.into_iter().chain(["src"]).find_map(|name| self.resolve(&attribute(el, name))))
    }

    fn caption(&mut self, text: &str) {
        let max = self.max_text * 8;
        if let Some(figure) = self.figures.last_mut()
            && figure.caption.len() < max
        {
            figure.caption.push_str(text);
        }
    }

    fn end_figure(&mut self) {
        let Some(figure) = self.figures.pop() else { return };
        let caption = clean(&htmlize::unescape(figure.caption.as_str()), self.max_text);
        if caption.is_empty() {
            return;
        }
        for i in figure.images {
            if !self.page.afford(caption.len()) {
                return;
            }
            let texts = &mut self.page.images[i].texts;
            texts.push((TextSource::Figcaption, caption.clone()));
            texts.sort_by_key(|(source, _)| *source);
            texts.dedup_by_key(|(source, _)| *source);
        }
    }

    fn resolve(&self, reference: &str) -> Option<Url> {
        resolve(&self.base, reference)
    }
}

/// The texts of an image's own attributes, clean, those that are empty left out.
pub(crate) fn texts_of(alt: &str, title: &str, max_text: usize) -> Vec<(TextSource, String)> {
    let texts = [(TextSource::Alt, alt), (TextSource::Title, title)].map(|(source, text)| (source, clean(text, max_text)));
    texts.into_iter().filter(|(_, text)| !text.is_empty()).collect()
}

/// Whether a `Content-Type` says HTML, or nothing.
pub(crate) fn is_html(content_type: Option<&str>) -> bool {
    let Some(kind) = content_type else { return true };
    let kind = kind.split(';').next().unwrap_or("").trim();
    kind.eq_ignore_ascii_case("text/html") || kind.eq_ignore_ascii_case("application/xhtml+xml")
}

/// An attribute without entities; empty if it is not there.
fn attribute(el: &Element<'_, '_>, name: &str) -> String {
    el.get_attribute(name).map_or_else(String::new, |value| htmlize::unescape_attribute(value.as_str()).into_owned())
}

#[cfg(test)]
mod tests;
