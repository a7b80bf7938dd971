//! What a robots.txt allows (RFC 9309).
//!
//! Of our own, so that a hostile file stays cheap: patterns are matched by plain searches in linear time, and nothing is compiled.

use std::time::Duration;

use memchr::memmem;
use url::{Position, Url};

/// How much of a robots.txt is read (RFC 9309 asks for at least 500 KiB).
pub(super) const MAX_BYTES: usize = 512 << 10;
/// A longer `Crawl-delay` is taken for this one: the directive is no standard, and a crawl has to end.
const MAX_DELAY: Duration = Duration::from_secs(10);
const MAX_SITEMAPS: usize = 50;

/// The rules for one crawler on one site.
#[derive(Clone, Default, Debug)]
pub(crate) struct Rules {
    /// All patterns, one after the other.
    patterns: Box<[u8]>,
    /// Where the pattern of each rule ends, and whether it allows. Longest pattern first, `Allow` before `Disallow` of the same length:
    /// the first that matches decides.
    rules: Box<[(u32, bool)]>,
    /// Least time between two requests.
    pub(crate) delay: Duration,
    /// Addresses of sitemaps, as written.
    pub(crate) sitemaps: Vec<String>,
}

#[derive(PartialEq)]
struct Rule {
    pattern: Vec<u8>,
    allow: bool,
}

#[derive(Default)]
struct Group {
    rules: Vec<Rule>,
    delay: Duration,
    named: bool,
}

impl Rules {
    /// Reads a file for the crawler with the product token `token`. Lines that are none of a robots.txt, and so all of an HTML page,
    /// are passed over.
    pub(crate) fn parse(body: &[u8], token: &str) -> Self {
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        let (mut ours, mut everybody, mut sitemaps) = (Group::default(), Group::default(), Vec::new());
        // Whether the group at hand is for us, for everybody; and whether its list of agents may still grow.
        let (mut for_us, mut for_all, mut naming) = (false, false, false);
        for line in body.split(|b| matches!(b, b'\n' | b'\r')) {
            let line = line.split(|b| *b == b'#').next().unwrap_or(line);
            let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
            let (key, value) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
            if key.eq_ignore_ascii_case(b"user-agent") {
                if !naming {
                    (for_us, for_all, naming) = (false, false, true);
                }
                let end = value.iter().position(|b| !b.is_ascii_alphabetic() && !b"-_".contains(b)).unwrap_or(value.len());
                for_all |= value == b"*";
                for_us |= value[..end].eq_ignore_ascii_case(token.as_bytes());
                ours.named |= for_us;
                continue;
            }
            if key.eq_ignore_ascii_case(b"sitemap") {
                if sitemaps.len() < MAX_SITEMAPS {
                    sitemaps.push(String::from_utf8_lossy(value).into_owned());
                }
                continue;
            }
            let delay = key.eq_ignore_ascii_case(b"crawl-delay").then(|| seconds(value));
            let allow = key.eq_ignore_ascii_case(b"allow");
            if delay.is_none() && !allow && !key.eq_ignore_ascii_case(b"disallow") {
                continue;
            }
            naming = false;
            for (group, meant) in [(&mut ours, for_us), (&mut everybody, for_all)] {
                match delay {
                    _ if !meant => {}
                    Some(delay) => group.delay = group.delay.max(delay),
                    None if value.is_empty() => {}
                    None => group.rules.push(Rule { pattern: normal_pattern(value), allow }),
                }
            }
        }
        let Group { mut rules, delay, .. } = if ours.named { ours } else { everybody };
        rules.sort_by(|a, b| (b.pattern.len(), b.allow, &b.pattern).cmp(&(a.pattern.len(), a.allow, &a.pattern)));
        rules.dedup();
        let patterns: Vec<u8> = rules.iter().flat_map(|r| &r.pattern).copied().collect();
        let ends = rules.iter().scan(0, |end, r| {
            *end += r.pattern.len() as u32;
            Some((*end, r.allow))
        });
        Self { rules: ends.collect(), patterns: patterns.into(), delay, sitemaps }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        let sitemaps = self.sitemaps.iter().map(|s| s.capacity() + size_of::<String>()).sum::<usize>();
        size_of::<Self>() + self.patterns.len() + size_of_val(&*self.rules) + sitemaps
    }

    /// Whether an address of the site may be asked for.
    pub(crate) fn allow(&self, url: &Url) -> bool {
        let target = &url[Position::BeforePath..Position::AfterQuery];
        if target == "/robots.txt" {
            return true;
        }
        let target = normal(target.as_bytes(), true);
        let path = target.split(|b| *b == b'?').next().unwrap_or(&target);
        // By the standard `/*.gif$` does not speak of `/x.gif?v=2`, but whoever writes it means the file: to forbid, the path is enough.
        let mut start = 0;
        for (end, allow) in &self.rules {
            let pattern = &self.patterns[start..*end as usize];
            start = *end as usize;
            if matches(pattern, &target) || (!allow && pattern.ends_with(b"$") && matches(pattern, path)) {
                return *allow;
            }
        }
        true
    }
}

fn seconds(value: &[u8]) -> Duration {
    let seconds = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()).unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 { MAX_DELAY } else { Duration::ZERO }).min(MAX_DELAY)
}

/// A pattern whose only special characters are `*` and a `$` at its end.
fn normal_pattern(value: &[u8]) -> Vec<u8> {
    match value.strip_suffix(b"$") {
        Some(front) => [normal(front, false), b"$".to_vec()].concat(),
        None => normal(value, false),
    }
}

/// One spelling for every path (RFC 9309, 2.2.2): escaped letters and digits are bare, all else that has to be is escaped, in upper
/// case. A literal `$`, and in addresses a literal `*`, is escaped too, so that it cannot be taken for the sign.
fn normal(path: &[u8], escape_star: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let escaped = (byte == b'%').then(|| Some((hex(*after.first()?)?, hex(*after.get(1)?)?))).flatten();
        let byte = match escaped {
            Some((high, low)) => {
                rest = &after[2..];
                high << 4 | low
            }
            None => byte,
        };
        let bare = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        let literal = byte.is_ascii_graphic() && byte != b'$' && (byte != b'*' || !escape_star);
        if bare || (escaped.is_none() && literal) {
            out.push(byte);
        } else {
            out.push(b'%');
            out.extend([byte >> 4, byte & 15].map(|n| b"0123456789ABCDEF"[usize::from(n)]));
        }
    }
    out
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|d| d as u8)
}

/// Whether `target` begins as `pattern` says, or is it as a whole if the pattern ends in `$`.
fn matches(pattern: &[u8], target: &[u8]) -> bool {
    let (pattern, whole) = pattern.strip_suffix(b"$").map_or((pattern, false), |p| (p, true));
    let mut parts = pattern.split(|b| *b == b'*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = target.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return !whole || rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if whole && parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = memmem::find(rest, part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_kept_is_small() {
        let rules = Rules::parse(format!("User-agent: *\n{}Disallow: /a", "Allow: /\n".repeat(60_000)).as_bytes(), "capfilt");
        assert!(rules.bytes() < 500, "{}", rules.bytes());
        assert!(rules.allow(&Url::parse("http://a.test/b").unwrap()) && !rules.allow(&Url::parse("http://a.test/a").unwrap()));
        let many: String = (0..40_000).map(|n| format!("Disallow: /{n}\n")).collect();
        assert!(Rules::parse(format!("User-agent: *\n{many}").as_bytes(), "capfilt").bytes() < many.len());
    }

    fn allowed(robots: &str, path: &str) -> bool {
        Rules::parse(robots.as_bytes(), "capfilt").allow(&Url::parse("http://a.test/").unwrap().join(path).unwrap())
    }

    fn one(rule: &str, path: &str) -> bool {
        !allowed(&format!("User-agent: *\nDisallow: {rule}"), path)
    }

    #[test]
    fn patterns_match_as_the_standard_says() {
        for (rule, path, hit) in [
            ("/", "/x", true),
            ("/fish", "/fish.html", true),
            ("/fish", "/Fish.asp", false),
            ("/fish", "/catfish", false),
            ("/fish/", "/fish", false),
            ("/fish*", "/fishheads/y", true),
            ("/*.php", "/folder/a.php?x", true),
            ("/*.php", "/", false),
            ("/*.php$", "/a.php", true),
            ("/*.php$", "/a.php?x", true),
            ("/*.php$", "/a?x.php$", false),
            ("/*.php$", "/a.phpx?y", false),
            ("/*.gif$", "/a.gif.gif", true),
            ("/fish*.php", "/fish/heads.php?a", true),
            ("/fish*.php", "/Fish.PHP", false),
            ("/$", "/", true),
            ("/$", "/a", false),
            ("/a*b*$", "/axxbyy", true),
            ("*", "/any", true),
            ("/a$b", "/a$b/c", true),
            ("/a?x=*&y", "/a?x=1&y=2", true),
            ("", "/x", false),
        ] {
            assert_eq!(one(rule, path), hit, "{rule} on {path}");
        }
    }

    #[test]
    fn escapes_have_one_spelling() {
        assert!(one("/private/", "/%70rivate/x"));
        assert!(one("/%70rivate/", "/private/x"));
        assert!(one("/caf%c3%a9", "/café"));
        assert!(one("/café", "/caf%C3%A9"));
        assert!(!one("/a/b", "/a%2Fb"), "an escaped slash is no slash");
        assert!(one("/a%2fb", "/a%2Fb"));
        assert!(one("/x%2a", "/x*") && !one("/x%2A", "/xy"), "an escaped star is a star");
        assert!(one("/100%", "/100%"));
    }

    #[test]
    fn the_longest_rule_decides_and_allow_wins_a_tie() {
        let robots = "user-agent: *\ndisallow: /private/\nAllow: /private/drafts/public\nallow: /page\ndisallow: /*.htm\nDisallow: /tie\nAllow: /tie";
        assert!(
            !allowed(robots, "/private/x") && allowed(robots, "/private/drafts/public/x") && !allowed(robots, "/private/drafts/")
        );
        assert!(!allowed(robots, "/page.htm") && allowed(robots, "/page.txt") && allowed(robots, "/tie"));
        assert!(allowed("User-agent: *\nDisallow: /", "/robots.txt"));
        assert!(!allowed("User-agent: *\nDisallow: /\nAllow: /*.gif$", "/x.gif?v=1"), "to allow, all of it must match");
    }

    #[test]
    fn the_group_of_our_name_goes_before_the_one_for_all() {
        let robots = "User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n\nUser-agent: *\nCrawl-delay: 1\nDisallow: /all/\n\
                      Sitemap: http://a.test/s.xml\nUser-agent: CapFilt/2.0 # us\nDisallow: /us/\n";
        assert!(allowed(robots, "/all/") && !allowed(robots, "/us/"));
        let other = Rules::parse(robots.as_bytes(), "someone");
        assert_eq!(
            (other.delay, other.sitemaps.as_slice()),
            (Duration::from_secs(1), ["http://a.test/s.xml".to_owned()].as_slice())
        );
        assert!(!other.allow(&Url::parse("http://a.test/all/").unwrap()));
        assert!(!Rules::parse(robots.as_bytes(), "ccbot").allow(&Url::parse("http://a.test/x").unwrap()));
        assert!(
            !allowed("User-agent: capfilt\nDisallow: /a\nUser-agent: x\nDisallow: /b\nUser-agent: capfilt\nDisallow: /c", "/c"),
            "groups add up"
        );
        assert!(allowed("User-agent: capfilt\nUser-agent: *\nAllow: /\n\nUser-agent: *\nDisallow: /x", "/x"));
        assert!(
            allowed("User-agent: capfilt\n\nUser-agent: other\nDisallow: /x", "/x")
                == allowed("User-agent: capfilt\nUser-agent: other\nDisallow: /x", "/x")
        );
    }

    #[test]
    fn what_is_no_robots_txt_allows_all() {
        for body in ["", "<html><body>not found: 404</body></html>", "Disallow: /x", "user-agent *\ndisallow /x", "\0\0\0"] {
            assert!(allowed(body, "/x"), "{body}");
        }
        assert!(!allowed("\u{feff}User-Agent : *\r\n  Disallow :/x  # why\r\n", "/x"));
        assert!(!allowed("User-agent: *\rDisallow: /x", "/x"));
    }

    #[test]
    fn delays_are_read_and_capped() {
        for (value, wanted) in
            [("2.5", 2.5), ("0", 0.0), ("-1", 0.0), ("3600", 10.0), ("inf", 10.0), ("nan", 0.0), ("soon", 0.0), ("1e300", 10.0)]
        {
            let delay = Rules::parse(format!("User-agent: *\nCrawl-delay: {value}").as_bytes(), "capfilt").delay;
            assert_eq!(delay.as_secs_f64(), wanted, "{value}");
        }
    }

    /// The matching rule as a sentence: a star is any run of characters.
    fn naive(pattern: &[u8], target: &[u8]) -> bool {
        match pattern.split_first() {
            None => true,
            Some((b'$', [])) => target.is_empty(),
            Some((b'*', rest)) => (0..=target.len()).any(|i| naive(rest, &target[i..])),
            Some((b, rest)) => target.first() == Some(b) && naive(rest, &target[1..]),
        }
    }

    proptest! {
        #[test]
        fn same_as_the_naive_match(pattern in "/[ab*]{0,6}\\$?", target in "/[ab]{0,8}") {
            prop_assert_eq!(matches(pattern.as_bytes(), target.as_bytes()), naive(pattern.as_bytes(), target.as_bytes()));
        }

        #[test]
        fn any_bytes_are_read(body: Vec<u8>) {
            Rules::parse(&body, "capfilt");
        }
    }
}
