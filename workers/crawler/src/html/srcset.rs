//! The `srcset` attribute (HTML standard, 4.8.4.2.1): which of its images is the largest.

/// The largest image of a `srcset`: its address as written, and its width in pixels if that is told.
pub(super) fn largest(srcset: &str) -> Option<(&str, u32)> {
    let mut best: Option<(&str, u32, f64)> = None;
    let mut rest = srcset;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ',');
        if rest.is_empty() {
            return best.map(|(url, width, _)| (url, width));
        }
        let end = rest.find(|c: char| c.is_ascii_whitespace()).unwrap_or(rest.len());
        let (mut url, after) = rest.split_at(end);
        let mut descriptors = "";
        if url.ends_with(',') {
            url = url.trim_end_matches(',');
            rest = after;
        } else {
            let end = after.find(',').unwrap_or(after.len());
            (descriptors, rest) = after.split_at(end);
        }
        let (mut width, mut density) = (0, 1.0);
        for d in descriptors.split_ascii_whitespace() {
            match d.as_bytes().last() {
                Some(b'w') => width = d[..d.len() - 1].parse().unwrap_or(0),
                Some(b'x') => density = d[..d.len() - 1].parse().unwrap_or(1.0),
                _ => {}
            }
        }
        let usable = !url.is_empty() && !url.get(..5).is_some_and(|s| s.eq_ignore_ascii_case("data:"));
        if usable && best.is_none_or(|(_, w, d)| (width, density) > (w, d)) {
            best = Some((url, width, density));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_the_largest() {
        assert_eq!(largest("a.jpg 120w, b.jpg 640w, c.jpg 320w"), Some(("b.jpg", 640)));
        assert_eq!(largest("a.jpg, b.jpg 2x, c.jpg 1.5x"), Some(("b.jpg", 0)));
        assert_eq!(largest("a.jpg"), Some(("a.jpg", 0)));
        assert_eq!(largest("  ,a.jpg?x=1,2 100w ,\n b,c.jpg\t200w 50h,"), Some(("b,c.jpg", 200)));
        assert_eq!(largest("a.jpg 1x, b.jpg 100w"), Some(("b.jpg", 100)));
        assert_eq!(largest("data:image/gif;base64,AAAA 9000w, b.jpg 10w"), Some(("b.jpg", 10)));
    }

    #[test]
    fn nonsense_gives_nothing_or_the_address() {
        assert_eq!(largest(""), None);
        assert_eq!(largest(" , ,, "), None);
        assert_eq!(largest("a.jpg wide, b.jpg -5w"), Some(("a.jpg", 0)));
    }

    proptest! {
        #[test]
        fn always_ends(text in "[a-z0-9wx,. \n]{0,60}") {
            largest(&text);
        }
    }
}
