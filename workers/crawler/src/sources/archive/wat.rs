//! The JSON of a WAT record: what Common Crawl's extractor (`ia-web-commons`) kept of a page's tags and of the answer's headers.
//!
//! Of an image it keeps `src`, `alt` and `title`, without entities: no `srcset`, no late-loading attributes, no captions. A link stands
//! where it ends, so after the images in it, with its own text if it has any: a link to an image file that has none and stands right
//! after an image is taken to be around it. The last `<base>` counts, where in a page the first does.

mod split;

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use url::Url;

use crate::address;
use crate::html::{self, Page};
use crate::opt_out::Directives;

/// A page as a WAT record tells it.
pub(super) struct Told {
    pub(super) url: Url,
    pub(super) page: Page,
    /// What the headers ask for.
    pub(super) headers: Directives,
}

/// What a record is.
pub(super) enum Wat {
    Page(Box<Told>),
    /// Sound as far as that was looked at, but nothing with images: most records are about requests.
    Other,
    Bad,
}

/// Reads the JSON of one record. `token` is the crawler's name in `<meta>` and headers; texts are cut after `max_text` characters.
pub(super) fn read(json: &[u8], token: &str, max_text: usize) -> Wat {
    // Without an image there is nothing to find; most records end here.
    if !split::has_image(json) {
        return Wat::Other;
    }
    if let Some((rest, images)) = split::split(json, token)
        && let Ok(record) = serde_json::from_slice(&rest)
    {
        return page(record, Some(&images), token, max_text);
    }
    serde_json::from_slice(json).map_or(Wat::Bad, |record| page(record, None, token, max_text))
}

fn page(record: Record<'_>, images: Option<&Images<'_>>, token: &str, max_text: usize) -> Wat {
    let Envelope { warc, payload } = record.envelope;
    let Some(Http { headers, message, html: Some(html) }) = payload.and_then(|p| p.http) else { return Wat::Other };
    // An error page is no page of the site. Where no status is told, it is taken for a good one.
    let good = message.is_none_or(|m| m.status.0.is_empty() || m.status.0.starts_with('2'));
    let Some(url) = Url::parse(&warc.uri.0).ok().filter(address::is_web) else {
        return Wat::Other;
    };
    if !good || !html::is_html(headers.content_type.as_ref().map(|t| &*t.0)) {
        return Wat::Other;
    }
    let mut told = Told { page: Page::default(), headers: Directives::default(), url };
    for (name, values) in &headers.wishes {
        values.0.iter().for_each(|value| told.headers.add_header(&name.0, value.0.as_bytes(), token));
    }
    for meta in &html.head.metas {
        told.page.directives.add_meta(&meta.name.0, &meta.content.0, token);
    }
    let base = address::resolve(&told.url, &html.head.base.0);
    let base = base.as_ref().unwrap_or(&told.url);
    for image in &images.unwrap_or(&html.links).0 {
        let around = image.around.as_ref().filter(|(href, _)| address::may_be_image_file(href.0.as_bytes()));
        let around = around.and_then(|(href, title)| Some((address::resolve(base, &href.0)?, title)));
        let around = around.filter(|(target, _)| address::is_image_file(target));
        let title = around.as_ref().map(|(_, title)| *title).filter(|_| image.title.0.trim().is_empty()).unwrap_or(&image.title);
        let texts = html::texts_of(&image.alt.0, &title.0, max_text);
        told.page.images_seen += 1;
        if !texts.is_empty()
            && let Some(url) =
                around.map(|(target, _)| target.into()).or_else(|| address::resolve_image(base, image.src.0.trim()))
        {
            told.page.add_image(url, texts);
        }
    }
    Wat::Page(Box::new(told))
}

#[derive(Deserialize)]
struct Record<'a> {
    #[serde(borrow, rename = "Envelope")]
    envelope: Envelope<'a>,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default, rename = "WARC-Header-Metadata")]
    warc: WarcHead<'a>,
    #[serde(borrow, default, rename = "Payload-Metadata")]
    payload: Option<Payload<'a>>,
}

#[derive(Deserialize, Default)]
struct WarcHead<'a> {
    #[serde(borrow, default, rename = "WARC-Target-URI")]
    uri: Text<'a>,
}

#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(borrow, default, rename = "HTTP-Response-Metadata")]
    http: Option<Http<'a>>,
}

#[derive(Deserialize)]
struct Http<'a> {
    #[serde(borrow, default, rename = "Headers")]
    headers: Headers<'a>,
    #[serde(borrow, default, rename = "Response-Message")]
    message: Option<Message<'a>>,
    #[serde(borrow, default, rename = "HTML-Metadata")]
    html: Option<Html<'a>>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default, rename = "Status")]
    status: Text<'a>,
}

#[derive(Deserialize)]
struct Html<'a> {
    #[serde(borrow, default, rename = "Head")]
    head: Head<'a>,
    #[serde(borrow, default, rename = "Links")]
    links: Images<'a>,
}

#[derive(Deserialize, Default)]
struct Head<'a> {
    #[serde(borrow, default, rename = "Base")]
    base: Text<'a>,
    #[serde(borrow, default, rename = "Metas")]
    metas: Vec<Meta<'a>>,
}

#[derive(Deserialize)]
struct Meta<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    content: Text<'a>,
}

/// A text, in place if it has no escapes. Half a surrogate pair, which the extractor may leave where it cuts a text, is no error. Of
/// several values the first counts.
#[derive(Default)]
struct Text<'a>(Cow<'a, str>);

impl<'a> Text<'a> {
    /// A text without escapes.
    fn of(bytes: &'a [u8]) -> Self {
        Self(match std::str::from_utf8(bytes) {
            Ok(text) => Cow::Borrowed(text),
            Err(_) => String::from_utf8_lossy(bytes),
        })
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Text<'de>, E> {
        Ok(Text::of(bytes))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Text<'de>, E> {
        Ok(Text(Cow::Owned(Text::of(bytes).0.into_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Text<'de>, A::Error> {
        let first = list.next_element()?;
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(first.unwrap_or_default())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_bytes(TextVisitor)
    }
}

/// The headers that matter here. Of a header that occurs several times all values are there.
#[derive(Default)]
struct Headers<'a> {
    content_type: Option<Text<'a>>,
    /// Names and values of those with wishes.
    wishes: Vec<(Text<'a>, Values<'a>)>,
}

struct HeadersVisitor;

impl<'de> Visitor<'de> for HeadersVisitor {
    type Value = Headers<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("headers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers<'de>, A::Error> {
        let mut found = Headers::default();
        while let Some(name) = map.next_key::<Text<'de>>()? {
            if name.0.eq_ignore_ascii_case("content-type") {
                found.content_type = Some(map.next_value()?);
            } else if Directives::is_header(&name.0) {
                found.wishes.push((name, map.next_value()?));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Headers<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(HeadersVisitor)
    }
}

/// One text, or a list of them.
struct Values<'a>(Vec<Text<'a>>);

struct ValuesVisitor;

impl<'de> Visitor<'de> for ValuesVisitor {
    type Value = Values<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Values<'de>, E> {
        Ok(Values(vec![TextVisitor.visit_borrowed_bytes(bytes)?]))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Values<'de>, E> {
        Ok(Values(vec![TextVisitor.visit_bytes(bytes)?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Values<'de>, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element()? {
            all.push(one);
        }
        Ok(Values(all))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Values<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_bytes(ValuesVisitor)
    }
}

/// The images among the links of a page.
#[derive(Default)]
struct Images<'a>(Vec<Image<'a>>);

#[derive(Default)]
struct Image<'a> {
    src: Text<'a>,
    alt: Text<'a>,
    title: Text<'a>,
    /// Target and title of the link that seems to be around it.
    around: Option<(Text<'a>, Text<'a>)>,
}

struct ImagesVisitor;

impl<'de> Visitor<'de> for ImagesVisitor {
    type Value = Images<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of links")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Images<'de>, A::Error> {
        let mut images: Vec<Image<'de>> = Vec::new();
        let mut after_image = false;
        while let Some(link) = list.next_element_seed(LinkSeed { after_image })? {
            after_image = matches!(link, Link::Image(_));
            match (link, images.last_mut()) {
                (Link::Image(image), _) => images.push(image),
                (Link::Around(target, title), Some(image)) => image.around = Some((target, title)),
                _ => {}
            }
        }
        Ok(Images(images))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Images<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_seq(ImagesVisitor)
    }
}

/// The name of a member as it is written; empty where it has escapes, which no name that matters has.
struct Key<'a>(&'a [u8]);

struct KeyVisitor;

impl<'de> Visitor<'de> for KeyVisitor {
    type Value = Key<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Key<'de>, E> {
        Ok(Key(bytes))
    }

    fn visit_bytes<E: de::Error>(self, _: &[u8]) -> Result<Key<'de>, E> {
        Ok(Key(b""))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_bytes(KeyVisitor)
    }
}

enum Link<'a> {
    Image(Image<'a>),
    /// Around the image before it: target and title.
    Around(Text<'a>, Text<'a>),
    Other,
}

impl<'a> Link<'a> {
    fn new(path: &[u8], image: Image<'a>, has_text: bool, after_image: bool) -> Self {
        match path {
            b"IMG@/src" => Link::Image(image),
            b"A@/href" if after_image && !has_text => Link::Around(image.src, image.title),
            _ => Link::Other,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Link<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        LinkSeed { after_image: true }.deserialize(d)
    }
}

/// Reads one link; of links that are not wanted no more than it takes to tell.
#[derive(Clone, Copy)]
struct LinkSeed {
    after_image: bool,
}

impl<'de> DeserializeSeed<'de> for LinkSeed {
    type Value = Link<'de>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Link<'de>, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LinkSeed {
    type Value = Link<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a link")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Link<'de>, A::Error> {
        let (mut path, mut image, mut has_text) = (Text::default(), Image::default(), false);
        while let Some(Key(key)) = map.next_key()? {
            match key {
                b"path" => {
                    path = map.next_value()?;
                    if !(path.0 == "IMG@/src" || self.after_image && path.0 == "A@/href") {
                        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                    }
                }
                b"url" => image.src = map.next_value()?,
                b"alt" => image.alt = map.next_value()?,
                b"title" => image.title = map.next_value()?,
                other => {
                    has_text |= other == b"text";
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Link::new(path.0.as_bytes(), image, has_text, self.after_image))
    }
}
