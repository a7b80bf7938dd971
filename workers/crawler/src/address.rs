//! Addresses of the web: which are worth asking for, what they mean on a page, and which name image files.

use url::{Position, Url};

/// Longest address worth keeping, in bytes. It also bounds what a long `<base>` can blow a short page up to.
pub(crate) const MAX_URL: usize = 2048;

/// Why an address is not asked for, if [`is_web`] is not true of it.
pub(crate) const NOT_WEB: &str = "not an absolute http or https address";

/// Whether it is an http or https address with a host.
pub(crate) fn is_web(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https") && url.has_host()
}

/// An absolute web address that is not too long, without its fragment.
pub(crate) fn parse(text: &str) -> Option<Url> {
    let fits = |url: &Url| is_web(url) && text.len().max(url.as_str().len()) <= MAX_URL;
    Url::parse(text).ok().filter(fits).map(without_fragment)
}

/// As [`parse`], however long: for what somebody lists.
pub(crate) fn parse_listed(text: &str) -> Option<Url> {
    Url::parse(text).ok().filter(is_web).map(without_fragment)
}

fn without_fragment(mut url: Url) -> Url {
    url.set_fragment(None);
    url
}

/// What `reference` means on a page at `base`: an absolute http or https address without fragment.
pub(crate) fn resolve(base: &Url, reference: &str) -> Option<Url> {
    let reference = reference.trim();
    if reference.is_empty() || reference.len() > MAX_URL || reference.starts_with("data:") {
        return None;
    }
    let url = without_fragment(base.join(reference).ok()?);
    (is_web(&url) && url.as_str().len() <= MAX_URL).then_some(url)
}

/// As [`resolve`], for the address of an image: most are written as they are spelled in the end, or lack only what the page's address
/// begins with. These need no parser.
pub(crate) fn resolve_image(base: &Url, reference: &str) -> Option<String> {
    let from_base = |end| &base[..end];
    let of_site = [("https://", "https://"), ("http://", "http://"), ("//", from_base(Position::BeforeUsername))];
    let of_site = of_site.into_iter().find_map(|(sign, start)| Some((start, reference.strip_prefix(sign)?)));
    let (start, rest) = if let Some((start, rest)) = of_site {
        let host = &rest[..rest.find('/').unwrap_or(0)];
        let is_name = host.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-');
        // A last label that begins with a letter is no part of an IPv4 address.
        let top = host.rsplit('.').next().is_some_and(|label| label.starts_with(|c: char| c.is_ascii_lowercase()));
        let is_punycode = host.as_bytes().array_windows().any(|four| four == b"xn--");
        (start, if is_name && top && !is_punycode { rest } else { "" })
    } else if reference.starts_with('/') {
        (from_base(Position::BeforePath), reference)
    } else if reference.starts_with(|c: char| c.is_ascii_alphanumeric()) && !reference.contains(':') {
        let before_query = from_base(Position::AfterPath);
        (&before_query[..before_query.rfind('/').map_or(0, |at| at + 1)], reference)
    } else {
        ("", "")
    };
    if !rest.is_empty() && start.len() + rest.len() <= MAX_URL && is_plain(rest) {
        return Some([start, rest].concat());
    }
    resolve(base, reference).map(Into::into)
}

/// Whether a path, perhaps with a query, stands for itself. A dot may be a segment of its own, written `%2e` too.
fn is_plain(path: &str) -> bool {
    const PLAIN: [bool; 256] = {
        let (mut plain, others) = ([false; 256], b"/-_.~=&+,;()!*$@:?%");
        let mut b = 0;
        while b < 256 {
            plain[b] = (b as u8).is_ascii_alphanumeric();
            b += 1;
        }
        let mut i = 0;
        while i < others.len() {
            plain[others[i] as usize] = true;
            i += 1;
        }
        plain
    };
    let bytes = path.as_bytes();
    let may_be_dots = |pair: &[u8; 2]| (pair[0] == b'/') & ((pair[1] == b'.') | (pair[1] == b'%'));
    let is_name = |segment: &str| match segment.as_bytes() {
        [b'.', second, ..] => second.is_ascii_alphanumeric(),
        [first, ..] => !matches!(first, b'.' | b'%'),
        [] => true,
    };
    bytes.iter().fold(true, |all, b| all & PLAIN[usize::from(*b)])
        && (!bytes.array_windows().fold(false, |any, pair| any | may_be_dots(pair)) || path.split('/').skip(1).all(is_name))
}

/// Whether the address names an image file. `/wiki/File:x.jpg` is a page about one.
pub(crate) fn is_image_file(url: &Url) -> bool {
    let name = url.path().rsplit('/').next().unwrap_or("");
    let Some((stem, extension)) = name.rsplit_once('.') else { return false };
    is_image_extension(extension.as_bytes()) && !stem.contains(':') && !stem.contains("%3A")
}

/// Whether [`is_image_file`] may be true of what `reference` means: it can be seen of most that it is not.
pub(crate) fn may_be_image_file(reference: &[u8]) -> bool {
    let path = &reference[..memchr::memchr2(b'?', b'#', reference).unwrap_or(reference.len())];
    let path = path.trim_ascii_end();
    let extension = &path[memchr::memrchr2(b'.', b'/', path).map_or(0, |at| at + 1)..];
    // Without a path it is the page; tabs, line ends and blanks of other scripts may be left out.
    is_image_extension(extension)
        || path.trim_ascii().is_empty()
        || path.iter().fold(false, |any, b| any | (*b < b' '))
        || !extension.is_ascii()
}

fn is_image_extension(extension: &[u8]) -> bool {
    ["jpg", "jpeg", "png", "webp", "gif", "bmp"].iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_absolute_web_addresses_are_read() {
        assert_eq!(parse("HTTPS://A.test/x#top").unwrap().as_str(), "https://a.test/x");
        for bad in ["", "/x", "a.test/x", "ftp://a.test/", "mailto:a@b.test", "http://"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(parse(&format!("http://a.test/{}", "x".repeat(MAX_URL))), None);
    }

    proptest! {
    #[test]
    fn the_short_way_leads_to_the_same_address(
        base in "https?://[a-zA-Z.]{1,4}\\.[a-z]{2}(:80)?(/[a-z.%é]{0,3}){0,3}(\\?[a-z/]{0,3})?",
        reference in "(https?://|//|HTTP://|data:)?[a-zA-Z0-9.é%@-]{0,5}(:[0-9]{0,2})?(/|//|\\\\)?([a-zA-Z0-9 ._~!$&'()*+,;=:@%é|^-]{0,4}(/|/\\.|\\.\\./|/%2e)?){0,3}(\\.(jpg|\tPnG)[ \u{a0}]?)?(\\?[a-z'\"=<]{0,3})?(#x)?",
    ) {
        if let Ok(base) = Url::parse(&base) {
            let resolved = resolve(&base, &reference);
            prop_assert!(may_be_image_file(reference.as_bytes()) || !resolved.as_ref().is_some_and(is_image_file));
            prop_assert_eq!(resolve_image(&base, &reference), resolved.map(String::from));
        }
    }
    }
}
