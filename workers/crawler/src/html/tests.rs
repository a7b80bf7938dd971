#![allow(clippy::unwrap_used)]
use super::*;
use crate::address::MAX_URL;
use proptest::prelude::*;

fn page(html: &str) -> Page {
    extract(html, &Url::parse("http://a.test/dir/page.html").unwrap(), "capfilt", 100)
}

/// `url | alt=… | figcaption=… | title=…`, without the host where it is the page's.
fn images(html: &str) -> Vec<String> {
    let line = |image: FoundImage| {
        let texts: Vec<_> = image.texts.iter().map(|(source, text)| format!("{source}={text}")).collect();
        format!("{} {}", image.url.trim_start_matches("http://a.test"), texts.join(" | ")).trim_end().to_owned()
    };
    page(html).images.into_iter().map(line).collect()
}

fn links(html: &str) -> Vec<String> {
    page(html).links.into_iter().map(String::from).collect()
}

#[test]
fn plain_images_with_their_texts() {
    assert_eq!(
        images(r#"<img src="x.jpg" alt="a  red&nbsp;car" title='R&eacute;sum&#233;'>"#),
        ["/dir/x.jpg alt=a red car | title=Résumé"]
    );
    assert_eq!(images("<IMG SRC=/x.jpg ALT='upper case'>"), ["/x.jpg alt=upper case"]);
    assert_eq!(images("<img src='//b.test/x.jpg?a=1&amp;b=2#top' alt=''>"), ["http://b.test/x.jpg?a=1&b=2"]);
    assert_eq!(images("<div><img src=a.jpg alt=one><p><img src=b.jpg alt=two>"), ["/dir/a.jpg alt=one", "/dir/b.jpg alt=two"]);
}

#[test]
fn what_is_no_address_is_no_image() {
    for src in [
        "data:image/gif;base64,R0lGOD",
        "javascript:void(0)",
        "about:blank",
        "",
        " ",
        "http://",
        "mailto:a@b.test",
        "file:///x.jpg",
    ] {
        assert_eq!(images(&format!("<img src='{src}' alt='a cat'>")), [] as [&str; 0], "{src}");
    }
    assert_eq!(images("<img alt='no src'>"), [] as [&str; 0]);
    let long = "x".repeat(MAX_URL);
    assert_eq!(images(&format!("<img src='{long}.jpg' alt='a cat'>")), [] as [&str; 0]);
}

#[test]
fn the_largest_version_is_taken() {
    assert_eq!(images("<img src=s.jpg srcset='s.jpg 120w, l.jpg 640w' alt=x>"), ["/dir/l.jpg alt=x"]);
    assert_eq!(images("<img src=s.jpg srcset='s.jpg 1x, l.jpg 2x' alt=x>"), ["/dir/l.jpg alt=x"]);
    let picture = "<picture><source srcset='p.webp 800w' type='image/webp'><source srcset='p.avif 1600w' type='image/avif'>\
                   <img src=s.jpg srcset='m.jpg 400w' alt=x></picture><img src=after.jpg alt=y>";
    assert_eq!(images(picture), ["/dir/p.webp alt=x", "/dir/after.jpg alt=y"]);
    let by_media =
        "<picture><source srcset=l.jpg media='(min-width: 800px)'><source srcset=m.jpg><img src=s.jpg alt=x></picture>";
    assert_eq!(images(by_media), ["/dir/l.jpg alt=x"]);
}

#[test]
fn late_loading_attributes_go_before_src() {
    assert_eq!(images("<img src='data:image/gif;base64,AA' data-src=x.jpg alt=x>"), ["/dir/x.jpg alt=x"]);
    for name in ["data-original", "data-lazy-src", "data-lazy", "data-srcset", "data-lazy-srcset"] {
        assert_eq!(images(&format!("<img src=blank.gif {name}=x.jpg alt=x>")), ["/dir/x.jpg alt=x"], "{name}");
    }
    assert_eq!(images("<img src=x.jpg data-src='' alt=x>"), ["/dir/x.jpg alt=x"]);
}

#[test]
fn a_link_to_an_image_file_goes_before_the_thumbnail() {
    assert_eq!(
        images("<a href='/full.JPG?v=1' title='the title'><img src=t.jpg alt=x></a>"),
        ["/full.JPG?v=1 alt=x | title=the title"]
    );
    assert_eq!(images("<a href=/full.jpg title=theirs><img src=t.jpg title=own></a>"), ["/full.jpg title=own"]);
    assert_eq!(images("<a href=/page.html title=t><img src=t.jpg alt=x></a>"), ["/dir/t.jpg alt=x"]);
    assert_eq!(images("<a href=/wiki/File:A.jpg><img src=t.jpg alt=x></a>"), ["/dir/t.jpg alt=x"]);
    assert_eq!(images("<a href=/full.jpg>text</a><img src=t.jpg alt=x>"), ["/dir/t.jpg alt=x"]);
    assert_eq!(images("<a href=/full.jpg>open <a href=/p><img src=t.jpg alt=x>"), ["/dir/t.jpg alt=x"]);
}

#[test]
fn noscript_holds_images() {
    assert_eq!(
        images("<div></div><noscript><img src='x.jpg' alt='a &amp; b'></noscript><img src=y.jpg>"),
        ["/dir/x.jpg alt=a & b", "/dir/y.jpg"]
    );
    assert_eq!(images("<a href=/full.jpg><noscript><img src=x.jpg alt=x></noscript></a>"), ["/full.jpg alt=x"]);
    assert_eq!(images("<noscript><img src=x.jpg alt=x>"), ["/dir/x.jpg alt=x"]);
    let figure = "<figure><noscript><img src=x.jpg></noscript><figcaption>c</figcaption></figure>";
    assert_eq!(images(figure), ["/dir/x.jpg figcaption=c"]);
}

#[test]
fn figcaptions_belong_to_the_images_of_their_figure() {
    let html = "<img src=0.jpg><figure><img src=1.jpg alt=one><figcaption>A <b>big</b>\n caption<br>of &lt;two&gt;</figcaption>\
                <img src=2.jpg></figure><img src=3.jpg>";
    let both = "A big caption of <two>";
    assert_eq!(
        images(html),
        [
            "/dir/0.jpg".to_owned(),
            format!("/dir/1.jpg alt=one | figcaption={both}"),
            format!("/dir/2.jpg figcaption={both}"),
            "/dir/3.jpg".to_owned()
        ]
    );
    let nested = "<figure><figure><img src=1.jpg><figcaption>inner</figcaption></figure><figcaption>outer</figcaption></figure>";
    assert_eq!(images(nested), ["/dir/1.jpg figcaption=inner"]);
    assert_eq!(images("<figure><img src=1.jpg><figcaption>never closed"), ["/dir/1.jpg figcaption=never closed"]);
    assert_eq!(images("<figcaption>lost</figcaption><img src=1.jpg>"), ["/dir/1.jpg"]);
    assert_eq!(
        images("<figure><img src=1.jpg><figcaption>a<script>b</script><style>c</style></figcaption></figure>"),
        ["/dir/1.jpg figcaption=a"]
    );
}

#[test]
fn base_moves_relative_addresses() {
    assert_eq!(images("<base href='/other/'><img src=x.jpg alt=x>"), ["/other/x.jpg alt=x"]);
    assert_eq!(images("<base href='http://b.test/'><base href='/c/'><img src=x.jpg>"), ["http://b.test/x.jpg"]);
    assert_eq!(images("<base href='data:text/plain,'><img src=x.jpg>"), ["/dir/x.jpg"]);
    let far = format!("<base href='http://b.test/{}/'><img src=x.jpg>", "y".repeat(MAX_URL - 16));
    assert_eq!(images(&far), [] as [&str; 0], "an address that grows too long is left out");
}

#[test]
fn links_are_followed_unless_told_not_to() {
    assert_eq!(
        links("<a href='/b?x=1#f'>b</a><a rel='NoFollow ugc' href=/c>c</a><area href=d><a>e</a>"),
        ["http://a.test/b?x=1", "http://a.test/dir/d"]
    );
    assert_eq!(links("<a href='mailto:x@y.test'></a><a href='javascript:0'></a><a href='x.png'></a>"), [] as [&str; 0]);
}

#[test]
fn meta_is_heard_wherever_it_stands() {
    assert_eq!(page("<img src=x.jpg><meta NAME=robots content='NOAI, noimageai'>").directives.refusal(), Some("noai"));
    assert_eq!(page("<meta content=noindex name=capfilt>").directives.refusal(), Some("noindex"));
    assert_eq!(page("<meta name=otherbot content=noindex>").directives.refusal(), None);
    assert!(page("<meta name=robots content=nofollow>").directives.nofollow());
}

#[test]
fn hostile_pages_stay_small() {
    let many = "<img src=x.jpg alt=x>".repeat(MAX_IMAGES + 10) + &"<a href=/y>y</a>".repeat(MAX_LINKS + 10);
    let found = page(&many);
    assert_eq!((found.images.len(), found.links.len()), (MAX_IMAGES, MAX_LINKS));
    let deep = page(&("<figure><div><noscript><figure><picture>".repeat(10_000) + "<img src=x.jpg alt=deep>"));
    assert!(deep.images.len() <= 1);
    let endless_tag = page(&format!("<img src=a.jpg alt=first><img alt='{}", "x".repeat(8 << 20)));
    assert_eq!(endless_tag.images.len(), 1);
    let base = "b".repeat(1900);
    let blown_up = page(&format!("<base href='/{base}/'>{}", "<a href=y>y</a><img src=x alt=x>".repeat(4000)));
    assert!((blown_up.images.len() + blown_up.links.len()) * 1900 <= MAX_KEPT);
    let captions = format!("<figure>{}<figcaption>{}</figcaption></figure>", "<img src=x>".repeat(5000), "word ".repeat(200));
    let kept: usize = extract(&captions, &Url::parse("http://a.test/").unwrap(), "", 1000)
        .images
        .iter()
        .flat_map(|i| &i.texts)
        .map(|t| t.1.len())
        .sum();
    assert!(kept <= MAX_KEPT);
    let long_text = page(&format!("<img src=a.jpg alt='{}'>", "wörd ".repeat(1000)));
    assert_eq!(long_text.images[0].texts[0].1.chars().count(), 99, "cut at 100 characters, without the space at the end");
}

proptest! {
    #[test]
    fn any_text_is_a_page(html in "(<(/)?(img|a|figure|figcaption|noscript|picture|source|base|meta)( (src|href|alt|srcset|name|content)=['\"a-z&;, ]{0,9}){0,2}>?|[a-z&;<>\"' ]{0,6}){0,25}") {
        for image in page(&html).images {
            prop_assert!(image.texts.iter().all(|(_, t)| !t.is_empty() && t.trim() == t));
        }
    }
}
