//! What a page or an image asks of crawlers (`X-Robots-Tag`, `<meta name="robots">`, the TDM reservation protocol), and lists of those
//! who asked somewhere else.

mod lists;

use reqwest::header::HeaderMap;

pub use lists::opt_out_entries;
pub(crate) use lists::{OptOuts, digests};

/// The wishes that were found. Wishes of several places add up.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Directives {
    noindex: bool,
    nofollow: bool,
    noimageindex: bool,
    noai: bool,
    noimageai: bool,
    tdm_reservation: bool,
}

/// Rules with a value after a colon: their names are not names of bots.
const WITH_VALUE: [&str; 4] = ["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"];

impl Directives {
    /// The wishes in an answer's headers that are for all bots or for the one named `token`.
    pub(crate) fn of_headers(headers: &HeaderMap, token: &str) -> Self {
        let mut found = Self::default();
        headers.iter().for_each(|(name, value)| found.add_header(name.as_str(), value.as_bytes(), token));
        found
    }

    /// Whether a header of this name has wishes in it.
    pub(crate) fn is_header(name: &str) -> bool {
        ["x-robots-tag", "tdm-reservation"].iter().any(|n| name.eq_ignore_ascii_case(n))
    }

    /// One header, if it is one with wishes in it.
    pub(crate) fn add_header(&mut self, name: &str, value: &[u8], token: &str) {
        if name.eq_ignore_ascii_case("x-robots-tag") {
            self.add_robots_tag(&String::from_utf8_lossy(value), token);
        } else if name.eq_ignore_ascii_case("tdm-reservation") {
            self.tdm_reservation |= value.trim_ascii() == b"1";
        }
    }

    /// One `X-Robots-Tag`: rules apart by commas; `bot:` before a rule says for whom it and the rules after it are.
    fn add_robots_tag(&mut self, value: &str, token: &str) {
        let mut for_us = true;
        for part in value.split(',') {
            let mut rule = part;
            if let Some((bot, rest)) = part.split_once(':') {
                let bot = bot.trim();
                // Behind a comma of its own a date of `unavailable_after` has colons too, but no bot's name has blanks.
                if !WITH_VALUE.iter().any(|v| bot.eq_ignore_ascii_case(v)) && !bot.contains(char::is_whitespace) {
                    for_us = bot == "*" || bot.eq_ignore_ascii_case("robots") || bot.eq_ignore_ascii_case(token);
                    rule = rest;
                }
            }
            if for_us {
                self.add_rule(rule);
            }
        }
    }

    /// Whether a `<meta>` of this name has wishes in it.
    pub(crate) fn is_meta(name: &str, token: &str) -> bool {
        ["robots", "tdm-reservation", token].iter().any(|n| name.trim().eq_ignore_ascii_case(n))
    }

    /// One `<meta name= content=>`, both without entities.
    pub(crate) fn add_meta(&mut self, name: &str, content: &str, token: &str) {
        let name = name.trim();
        if name.eq_ignore_ascii_case("robots") || name.eq_ignore_ascii_case(token) {
            content.split(',').for_each(|rule| self.add_rule(rule));
        } else if name.eq_ignore_ascii_case("tdm-reservation") {
            self.tdm_reservation |= content.trim() == "1";
        }
    }

    fn add_rule(&mut self, rule: &str) {
        match rule.trim().to_ascii_lowercase().as_str() {
            "noindex" => self.noindex = true,
            "nofollow" => self.nofollow = true,
            "none" => (self.noindex, self.nofollow) = (true, true),
            "noimageindex" => self.noimageindex = true,
            "noai" => self.noai = true,
            "noimageai" => self.noimageai = true,
            _ => {}
        }
    }

    /// Both together.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self {
            noindex: self.noindex || other.noindex,
            nofollow: self.nofollow || other.nofollow,
            noimageindex: self.noimageindex || other.noimageindex,
            noai: self.noai || other.noai,
            noimageai: self.noimageai || other.noimageai,
            tdm_reservation: self.tdm_reservation || other.tdm_reservation,
        }
    }

    /// The first wish, if any, that forbids to take the image (or the images of the page) into a dataset.
    pub(crate) const fn refusal(&self) -> Option<&'static str> {
        match self {
            Self { noai: true, .. } => Some("noai"),
            Self { noimageai: true, .. } => Some("noimageai"),
            Self { noindex: true, .. } => Some("noindex"),
            Self { noimageindex: true, .. } => Some("noimageindex"),
            Self { tdm_reservation: true, .. } => Some("tdm-reservation: 1"),
            _ => None,
        }
    }

    /// Whether the links of the page are not to be followed.
    pub(crate) const fn nofollow(&self) -> bool {
        self.nofollow
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refusal(tag: &'static str) -> Option<&'static str> {
        let mut headers = HeaderMap::new();
        headers.append("x-robots-tag", tag.parse().unwrap());
        Directives::of_headers(&headers, "capfilt").refusal()
    }

    #[test]
    fn rules_for_everybody_count() {
        assert_eq!(refusal("noai, noimageai"), Some("noai"));
        assert_eq!(refusal(" NoImageAI "), Some("noimageai"));
        assert_eq!(refusal("max-snippet: 5, noindex"), Some("noindex"));
        assert_eq!(refusal("unavailable_after: Wed, 03 Dec 2030 13:09:53 GMT, noai"), Some("noai"));
        assert_eq!(refusal("unavailable_after: Wednesday, 03-Dec-30 13:09:53 GMT, noai"), Some("noai"));
        assert_eq!(refusal("none"), Some("noindex"));
        assert_eq!(refusal("*: noimageindex"), Some("noimageindex"));
        for harmless in ["", "all", "nofollow", "noaix", "unavailable_after: 25 Jun 2010 15:00:00 PST", "max-image-preview:none"]
        {
            assert_eq!(refusal(harmless), None, "{harmless}");
        }
    }

    #[test]
    fn rules_for_another_bot_do_not() {
        assert_eq!(refusal("otherbot: noai, noimageai"), None);
        assert_eq!(refusal("otherbot: noai, CapFilt: noimageai"), Some("noimageai"));
        assert_eq!(refusal("capfilt: nofollow, otherbot: noindex"), None);
        let mut two = HeaderMap::new();
        two.append("x-robots-tag", "otherbot: noindex".parse().unwrap());
        two.append("x-robots-tag", "noai".parse().unwrap());
        assert_eq!(Directives::of_headers(&two, "capfilt").refusal(), Some("noai"), "a header line begins anew");
    }

    #[test]
    fn tdm_reservation_is_one_or_nothing() {
        let with = |value: &'static str| {
            let headers = HeaderMap::from_iter([("tdm-reservation".parse().unwrap(), value.parse().unwrap())]);
            Directives::of_headers(&headers, "capfilt").refusal()
        };
        assert_eq!(with("1"), Some("tdm-reservation: 1"));
        assert_eq!(with("0"), None);
    }

    #[test]
    fn meta_counts_for_robots_and_for_us() {
        let of = |name: &str, content: &str| {
            let mut d = Directives::default();
            d.add_meta(name, content, "capfilt");
            (d.refusal(), d.nofollow())
        };
        assert_eq!(of("ROBOTS", "noai, nofollow"), (Some("noai"), true));
        assert_eq!(of("capfilt", "noindex"), (Some("noindex"), false));
        assert_eq!(of("googlebot", "noindex"), (None, false));
        assert_eq!(of("tdm-reservation", "1"), (Some("tdm-reservation: 1"), false));
    }
}
