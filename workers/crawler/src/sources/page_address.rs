//! One spelling for the addresses of pages, so that no page is asked for under two names.

use url::Url;

use crate::address::{MAX_URL, is_web};

/// Query keys that name a visit or a campaign, never a page.
const SESSION_KEYS: [&str; 17] = [
    "sid",
    "session",
    "sessionid",
    "session_id",
    "phpsessid",
    "jsessionid",
    "aspsessionid",
    "cfid",
    "cftoken",
    "zenid",
    "osCsid",
    "gclid",
    "fbclid",
    "msclkid",
    "mc_cid",
    "mc_eid",
    "yclid",
];
/// Path segments of an address; more is a trap that grows at each step.
const MAX_SEGMENTS: usize = 24;
/// How often a path may repeat a segment: `/a/b/a/b/a/b/…` comes from relative links that lead into themselves.
const MAX_REPEATS: usize = 3;

/// The address without fragment, session and campaign keys; `None` if it cannot be that of a page worth asking for.
pub(super) fn page_address(mut url: Url) -> Option<Url> {
    if !is_web(&url) {
        return None;
    }
    url.set_fragment(None);
    if let Some(at) = url.path().to_ascii_lowercase().find(";jsessionid=") {
        let path = url.path()[..at].to_owned();
        url.set_path(&path);
    }
    if let Some(query) = url.query() {
        let is_session = |pair: &&str| {
            let key = pair.split('=').next().unwrap_or("");
            SESSION_KEYS.iter().any(|k| key.eq_ignore_ascii_case(k)) || key.to_ascii_lowercase().starts_with("utm_")
        };
        let kept: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty() && !is_session(pair)).collect();
        let kept = kept.join("&");
        url.set_query((!kept.is_empty()).then_some(kept.as_str()));
    }
    let segments: Vec<&str> = url.path().split('/').filter(|s| !s.is_empty()).collect();
    let repeats = |s: &str| segments.iter().filter(|other| **other == s).count() > MAX_REPEATS;
    let trap = segments.len() > MAX_SEGMENTS || segments.iter().any(|s| repeats(s));
    (!trap && url.as_str().len() <= MAX_URL).then_some(url)
}

/// What an address has in common with those that differ from it only in numbers and in the values of its query.
pub(super) fn shape(url: &Url) -> String {
    let mut shape = url.authority().to_owned();
    let mut in_number = false;
    for c in url.path().chars() {
        let digit = c.is_ascii_digit();
        if !digit {
            shape.push(c);
        } else if !in_number {
            shape.push('#');
        }
        in_number = digit;
    }
    let mut keys: Vec<&str> = url.query().unwrap_or("").split('&').filter_map(|pair| pair.split('=').next()).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys.into_iter().filter(|k| !k.is_empty()) {
        shape.push('&');
        shape.push_str(key);
    }
    shape
}

/// Whether a host belongs to a list of names, `*.example.org` and `*`.
pub(super) fn is_listed(host: &str, listed: &[String]) -> bool {
    listed.iter().any(|entry| match entry.strip_prefix('*') {
        Some("") => true,
        Some(suffix) => host.len() > suffix.len() && host.to_ascii_lowercase().ends_with(&suffix.to_ascii_lowercase()),
        None => host.eq_ignore_ascii_case(entry),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn normal(url: &str) -> Option<String> {
        page_address(Url::parse(url).unwrap()).map(String::from)
    }

    #[test]
    fn what_names_no_page_is_dropped() {
        assert_eq!(normal("HTTP://A.test:80/x?sid=12&b=2&utm_source=y&PHPSESSID=1#top").as_deref(), Some("http://a.test/x?b=2"));
        assert_eq!(normal("http://a.test/x?").as_deref(), Some("http://a.test/x"));
        assert_eq!(normal("http://a.test/x?&&a&sid=").as_deref(), Some("http://a.test/x?a"));
        assert_eq!(normal("http://a.test/x;jsessionid=AB12?p=1").as_deref(), Some("http://a.test/x?p=1"));
        assert_eq!(normal("http://a.test/x?side=1&id=2").as_deref(), Some("http://a.test/x?side=1&id=2"));
    }

    #[test]
    fn traps_and_other_schemes_are_no_pages() {
        assert_eq!(normal("ftp://a.test/x"), None);
        assert_eq!(normal("mailto:a@b.test"), None);
        assert_eq!(normal("http://a.test/a/b/a/b/a/b/a/b"), None);
        assert!(normal("http://a.test/2024/01/01/01").is_some());
        assert_eq!(normal(&format!("http://a.test/{}", "x/y".repeat(40))), None);
        assert_eq!(normal(&format!("http://a.test/{}", "x".repeat(MAX_URL))), None);
    }

    #[test]
    fn shapes_forget_numbers_and_values() {
        let of = |url: &str| shape(&Url::parse(url).unwrap());
        assert_eq!(of("http://a.test/cal/2024/12"), of("http://a.test/cal/7/1"));
        assert_eq!(of("http://a.test/x?day=1&b=2"), of("http://a.test/x?b=9&day=77&day=3"));
        assert_ne!(of("http://a.test/x?day=1"), of("http://a.test/x"));
        assert_ne!(of("http://a.test/cal/1"), of("http://b.test/cal/1"));
        assert_ne!(of("http://a.test/gallery/1"), of("http://a.test/blog/1"));
    }

    #[test]
    fn hosts_are_listed_by_name_or_suffix() {
        let list = |entries: &[&str]| entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>();
        assert!(is_listed("A.test", &list(&["a.TEST"])));
        assert!(is_listed("x.y.a.test", &list(&["*.a.test"])) && !is_listed("a.test", &list(&["*.a.test"])));
        assert!(!is_listed("evila.test", &list(&["*.a.test", "a.test"])));
        assert!(is_listed("anything", &list(&["*"])) && !is_listed("anything", &[]));
    }

    proptest! {
        #[test]
        fn a_normal_address_stays(path in "(/[a-z0-9;=]{0,5}){0,5}", query in "([a-z_]{0,4}=?[a-z0-9]{0,3}&?){0,5}") {
            if let Some(once) = page_address(Url::parse(&format!("http://a.test{path}?{query}")).unwrap()) {
                prop_assert_eq!(page_address(once.clone()), Some(once));
            }
        }
    }
}
