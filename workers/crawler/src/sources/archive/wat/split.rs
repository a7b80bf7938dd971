//! A WAT record taken apart by searches for a few bytes: most of it is links to pages, scripts and the like, over which a search passes
//! many times as fast as a reader of JSON.

use std::ops::Range;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::de::IgnoredAny;

use super::{Image, Images, Link, Text};
use crate::address;
use crate::opt_out::Directives;

/// Whether there is an image, or some other attribute of one.
pub(super) fn has_image(json: &[u8]) -> bool {
    SIGNS.any_image.find(json).is_some()
}

/// A record without its links, scripts and those `<meta>` that have no wishes, and the images among the links. `None` if the record is not
/// written as `ia-web-commons` writes it.
///
/// In valid JSON no quote within a text is without a backslash before it. So where the bytes that are searched for have quotes in the
/// middle, they are never part of a text.
pub(super) fn split<'a>(json: &'a [u8], token: &str) -> Option<(Vec<u8>, Images<'a>)> {
    let signs = &*SIGNS;
    let range = signs.list(json, &signs.links)?;
    let links = &json[range.clone()];
    let mut images: Vec<Image<'_>> = Vec::new();
    for at in signs.image.find_iter(links) {
        let object = at.checked_sub(IMAGE.len()).filter(|begin| links[*begin..].starts_with(IMAGE))?;
        let (link, length) = one(&links[object..])?;
        let Link::Image(mut image) = link else { return None };
        let next = &links[object + length..];
        if next.starts_with(b",{\"path\":\"A@/href\"")
            && may_lead_to_image(next)
            && let (Link::Around(target, title), _) = one(&next[1..])?
        {
            image.around = Some((target, title));
        }
        images.push(image);
    }
    let mut rest = [&json[..range.start], &json[range.end..]].concat();
    for key in [&signs.scripts, &signs.head_links] {
        if let Some(range) = signs.list(&rest, key) {
            rest.drain(range);
        }
    }
    if let Some(range) = signs.list(&rest, &signs.metas)
        && let Some(wishes) = signs.wishes(&rest[range.clone()], token)
    {
        rest.splice(range, wishes);
    }
    Some((rest, Images(images)))
}

/// Whether the link that `next` begins with may be one to an image file, as far as its raw bytes tell.
fn may_lead_to_image(next: &[u8]) -> bool {
    let Some(url) = next.strip_prefix(b",{\"path\":\"A@/href\",\"url\":\"") else { return true };
    let end = memchr::memchr2(b'"', b'\\', url).unwrap_or(url.len());
    url.get(end) != Some(&b'"') || address::may_be_image_file(&url[..end])
}

/// What is searched for in the bytes of a record.
struct Signs {
    any_image: Finder<'static>,
    image: Finder<'static>,
    links: Finder<'static>,
    scripts: Finder<'static>,
    head_links: Finder<'static>,
    metas: Finder<'static>,
    end: Finder<'static>,
    name: Finder<'static>,
    escape: Finder<'static>,
}

static SIGNS: LazyLock<Signs> = LazyLock::new(|| Signs {
    any_image: Finder::new("\"IMG@"),
    image: Finder::new("\"IMG@/src\""),
    links: Finder::new("\"Links\":[{"),
    scripts: Finder::new("\"Scripts\":[{"),
    head_links: Finder::new("\"Link\":[{"),
    metas: Finder::new("\"Metas\":[{"),
    end: Finder::new("}]"),
    name: Finder::new("\"name\""),
    escape: Finder::new("\\u006"),
});

impl Signs {
    /// Where the objects of a list stand; `key` ends with the first byte of the first one.
    fn list(&self, json: &[u8], key: &Finder<'_>) -> Option<Range<usize>> {
        let start = key.find(json)? + key.needle().len() - 1;
        // The list ends where, after all that closes with it, another key or nothing follows.
        let is_end = |at: &usize| {
            let after = &json[start + at + 2..];
            let after = &after[after.iter().take_while(|b| **b == b'}').count()..];
            matches!(after, [b',', b'"', b'A'..=b'Z' | b'a'..=b'z', ..]) || after.trim_ascii().is_empty()
        };
        let end = start + self.end.find_iter(&json[start..]).find(is_end)? + 1;
        Some(start..end)
    }

    /// The objects of a list of `<meta>` that may have wishes; `None` if they cannot be told from the others.
    fn wishes(&self, metas: &[u8], token: &str) -> Option<Vec<u8>> {
        // A key written with escapes would not be found.
        if self.escape.find(metas).is_some() {
            return None;
        }
        let mut wishes = Vec::new();
        let mut done = 0;
        for at in self.name.find_iter(metas) {
            let is_wish = match &metas[at + self.name.needle().len()..] {
                [b':', b'"', value @ ..] => {
                    let end = memchr::memchr2(b'"', b'\\', value).filter(|end| value[*end] == b'"')?;
                    std::str::from_utf8(&value[..end]).is_ok_and(|name| Directives::is_meta(name, token))
                }
                // It is a value itself.
                [b',' | b'}', ..] => false,
                _ => return None,
            };
            if is_wish && at >= done {
                let begin = metas[..=at].windows(2).rposition(|two| two == b"{\"")?;
                let mut objects = serde_json::Deserializer::from_slice(&metas[begin..]).into_iter::<IgnoredAny>();
                objects.next()?.ok()?;
                done = begin + objects.byte_offset();
                // Else these were not the first bytes of its object.
                if done < at {
                    return None;
                }
                wishes.extend_from_slice(if wishes.is_empty() { b"" } else { b"," });
                wishes.extend_from_slice(&metas[begin..done]);
            }
        }
        Some(wishes)
    }
}

/// What stands before the path of an image.
const IMAGE: &[u8] = b"{\"path\":";

/// The link that `json` begins with, after an image, and its length.
fn one(json: &[u8]) -> Option<(Link<'_>, usize)> {
    plain(json).or_else(|| {
        let mut stream = serde_json::Deserializer::from_slice(json).into_iter::<Link<'_>>();
        let link = stream.next()?.ok()?;
        Some((link, stream.byte_offset()))
    })
}

/// As [`one`], if all members are texts without escapes.
fn plain(json: &[u8]) -> Option<(Link<'_>, usize)> {
    let (mut path, mut image, mut has_text) = (&[][..], Image::default(), false);
    let mut rest = json.strip_prefix(b"{")?;
    loop {
        rest = rest.strip_prefix(b"\"")?;
        let (key, after) = rest.split_at(rest.iter().position(|b| matches!(b, b'"' | b'\\'))?);
        rest = after.strip_prefix(b"\":\"")?;
        let (value, after) = rest.split_at(memchr::memchr2(b'"', b'\\', rest)?);
        match key {
            b"path" => path = value,
            b"url" => image.src = Text::of(value),
            b"alt" => image.alt = Text::of(value),
            b"title" => image.title = Text::of(value),
            _ => has_text |= key == b"text",
        }
        rest = after.strip_prefix(b"\"")?;
        match rest {
            [b',', more @ ..] => rest = more,
            [b'}', more @ ..] => return Some((Link::new(path, image, has_text, true), json.len() - more.len())),
            _ => return None,
        }
    }
}
