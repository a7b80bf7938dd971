//! The samples section: image, texts, scores, verdicts. The filter is made of radio buttons and style rules, so it needs no script.

use super::data::Report;
use super::html::{Html, nothing, open, shortened};
use super::samples::{Fate, Sample, Text, Verdict};

/// Characters of a text and of an address that are shown.
const TEXT_LENGTH: usize = 280;
const URL_LENGTH: usize = 120;

pub(super) fn section(h: &mut Html, report: &Report) {
    let threshold = report.threshold();
    let lead = match threshold {
        Some(_) => "Drawn evenly from the four things that can happen to a pair. The tick on a score marks the threshold.",
        None => "Drawn evenly from the four things that can happen to a pair. Texts were kept by rank.",
    };
    open(h, "samples", "Samples", &lead);
    if report.samples.is_empty() {
        nothing(h, "No scored samples in a dataset version yet.");
        h.raw("</section>");
        return;
    }
    let of = |verdict: Verdict| report.samples.iter().filter(|s| s.verdict == verdict).count();
    h.raw("<div class=\"filter\"><input type=\"radio\" name=\"verdict\" id=\"show-all\" checked>");
    h.put("<label for=\"show-all\">All <b>{}</b></label>", &[&report.samples.len()]);
    for verdict in Verdict::ALL {
        let class = class(verdict);
        h.put("<input type=\"radio\" name=\"verdict\" id=\"show-{}\">", &[&class]);
        h.put("<label for=\"show-{}\">{} <b>{}</b></label>", &[&class, &name(verdict), &of(verdict)]);
    }
    match threshold {
        Some(t) => h.put("<div class=\"gallery\" style=\"--threshold:{}%\">", &[&format!("{:.1}", t.clamp(0.0, 1.0) * 100.0)]),
        None => h.raw("<div class=\"gallery ranked\">"),
    };
    report.samples.iter().for_each(|s| card(h, s));
    h.raw("</div></div></section>");
}

fn card(h: &mut Html, sample: &Sample) {
    h.put("\n<article class=\"card {}\"><figure>", &[&class(sample.verdict)]);
    match media_type(&sample.image) {
        Some(kind) => {
            h.put("<img loading=\"lazy\" alt=\"\" src=\"data:{};base64,", &[&kind]).base64(&sample.image).raw("\"");
            if let Some((width, height)) = sample.size {
                h.put(" width=\"{}\" height=\"{}\"", &[&width, &height]);
            }
            h.raw(">");
        }
        None => _ = h.raw("<span>no image</span>"),
    }
    h.raw("</figure><div class=\"texts\">");
    text(h, "web", &sample.web);
    for synthetic in &sample.synthetic {
        text(h, "synthetic", synthetic);
    }
    let page = sample.page_url.as_ref().unwrap_or(&sample.url);
    h.put("<p class=\"source\" title=\"{}\">{}</p></div></article>", &[&page, &shortened(page, URL_LENGTH)]);
}

fn text(h: &mut Html, origin: &'static str, text: &Text) {
    let out = if text.fate == Fate::Kept { "" } else { " out" };
    h.put("<div class=\"text{}\"><p class=\"head\"><span class=\"origin {}\">{}</span>", &[&out, &origin, &origin]);
    match text.fate {
        Fate::Kept => h.raw("<span class=\"badge good\">kept</span>"),
        Fate::Removed => h.raw("<span class=\"badge bad\">removed</span>"),
        Fate::Repeats => h.raw("<span class=\"badge plain\" title=\"Another text of the image says the same\">repeats</span>"),
        Fate::ImageDropped => {
            h.raw("<span class=\"badge plain\" title=\"A duplicate, too small, or held out\">image dropped</span>")
        }
    };
    h.put("</p><blockquote dir=\"auto\">{}</blockquote>", &[&shortened(&text.text, TEXT_LENGTH)]);
    if let Some(itm) = text.itm {
        let width = format!("{:.1}", itm.clamp(0.0, 1.0) * 100.0);
        h.put("<p class=\"score\"><span class=\"meter\"><i class=\"{}\" style=\"width:{}%\"></i></span>", &[&origin, &width]);
        h.put("<span>ITM <b>{}</b></span>", &[&format_args!("{itm:.3}")]);
        for (name, cosine) in [("ITC", text.itc), ("CLIP", text.clip)] {
            if let Some(cosine) = cosine {
                h.put("<span>{} {}</span>", &[&name, &format!("{cosine:.3}").replace('-', "−")]);
            }
        }
        h.raw("</p>");
    }
    h.raw("</div>");
}

const fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::BothKept => "both",
        Verdict::OnlySynthetic => "synthetic-only",
        Verdict::OnlyWeb => "web-only",
        Verdict::NothingKept => "neither",
    }
}

const fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::BothKept => "Both kept",
        Verdict::OnlySynthetic => "Web text replaced",
        Verdict::OnlyWeb => "Only web text kept",
        Verdict::NothingKept => "Both removed",
    }
}

/// The media type of an image that every browser shows, by its first bytes: what the store says about it is not trusted here.
fn media_type(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => Some("image/jpeg"),
        [0x89, b'P', b'N', b'G', ..] => Some("image/png"),
        [b'G', b'I', b'F', b'8', ..] => Some("image/gif"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some("image/webp"),
        _ => None,
    }
}
