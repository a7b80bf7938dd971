//! The dataset card: `README.md` with the front matter that dataset hubs read.

use std::fmt::Write as _;

use capfilt_schemas::{DatasetVersion, Digest, Origin};
use serde_json::Value;

use super::{Format, Manifest};

/// The card of an exported version. It holds no time and no place, so that the same export has the same card.
pub(super) fn card(version: &DatasetVersion, manifest: &Manifest) -> String {
    let mut page = front_matter(manifest);
    let (name, number) = (&manifest.dataset, manifest.version);
    // Writing to a String cannot fail.
    _ = write!(
        page,
        "# {name}, version {number}\n\n\
         {pairs} pairs of {images} images, gathered from the web by query, captioned and filtered by models (CapFilt, \
         [arXiv 2201.12086](https://arxiv.org/abs/2201.12086)), and written by capfilt.\n\n\
         | | |\n|---|---|\n\
         | digest | `{digest}` |\n| run, round | `{run}`, {round} |\n| build task | `{build}` |\n\
         | captioner | {captioner} |\n| filter | {filter} |\n| policy | {policy} |\n| noise ratio | {noise} |\n\n",
        pairs = manifest.pairs,
        images = manifest.images,
        digest = manifest.digest,
        run = version.run,
        round = version.round,
        build = version.lineage.build,
        captioner = model(version.lineage.captioner),
        filter = model(version.lineage.filter),
        policy = policy(&version.settings),
        noise = version.noise_ratio.map_or_else(
            || "no text was judged".to_owned(),
            |r| format!("{:.1} % of the judged texts were thrown out", 100.0 * r)
        ),
    );
    if version.takedowns > 0 || manifest.left_out > 0 {
        _ = write!(
            page,
            "{} takedowns were in force when the version was built; {} of its pairs were taken down since and are not in this copy.\n\n",
            version.takedowns, manifest.left_out
        );
    }
    page.push_str("## Texts\n\n| origin | pairs | |\n|---|---:|---|\n");
    for origin in Origin::ALL {
        let what = match origin {
            Origin::Web => "found beside the image on the web, and kept by the policy",
            Origin::Synthetic => "written by the captioner, and kept by the policy",
            Origin::Human => "written by people as a caption; not filtered",
        };
        _ = writeln!(page, "| {origin} | {} | {what} |", manifest.counts.get(origin.as_str()).copied().unwrap_or(0));
    }
    page.push_str("\n## How it came about\n\n| step | left |\n|---|---:|\n");
    for (step, left) in &version.funnel.steps {
        _ = writeln!(page, "| {step} | {left} |");
    }
    page.push_str("\nSettings of the build:\n\n```json\n");
    page.push_str(&serde_json::to_string_pretty(&version.settings).unwrap_or_default());
    page.push_str("\n```\n\n");
    page.push_str(&inputs(version));
    page.push_str(FIELDS);
    page.push_str(&how_to_load(manifest));
    page.push_str(LICENCE);
    page
}

fn front_matter(manifest: &Manifest) -> String {
    let size = match manifest.pairs {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        1_000_000..10_000_000 => "1M<n<10M",
        10_000_000..100_000_000 => "10M<n<100M",
        100_000_000..1_000_000_000 => "100M<n<1B",
        _ => "n>1B",
    };
    // A JSON string is a YAML string, whatever the name holds.
    let name = Value::from(format!("{} v{}", manifest.dataset, manifest.version));
    let mut yaml = format!(
        "---\npretty_name: {name}\nlicense: unknown\ntask_categories:\n- image-to-text\n- text-to-image\ntags:\n- image-text\n\
         - capfilt\nsize_categories:\n- {size}\n"
    );
    if manifest.formats.contains(&Format::Parquet) && manifest.pairs > 0 {
        yaml.push_str("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: parquet/*.parquet\n");
    }
    yaml.push_str("---\n\n");
    yaml
}

/// The policy in words, as far as the settings tell.
fn model(digest: Option<Digest>) -> String {
    digest.map_or_else(|| "none".to_owned(), |digest| format!("`{digest}`"))
}

fn policy(settings: &Value) -> String {
    let setting =
        |name: &str| settings.get(name).map_or_else(|| "?".to_owned(), |v| v.as_str().map_or(v.to_string(), str::to_owned));
    match setting("policy").as_str() {
        "itm" => format!("a text is kept if its probability of matching the image (ITM) is {} or more", setting("min_itm")),
        "rank" => format!("the {} best texts of an image by {} are kept", setting("keep"), setting("rank_by")),
        other => other.to_owned(),
    }
}

fn inputs(version: &DatasetVersion) -> String {
    let mut tables: Vec<_> = version.lineage.inputs.iter().map(|i| i.table).collect();
    tables.sort_unstable();
    tables.dedup();
    let count = |table| version.lineage.inputs.iter().filter(|i| i.table == table).count();
    let list: Vec<String> = tables.into_iter().map(|t| format!("{} of `{t}`", count(t))).collect();
    if list.is_empty() { String::new() } else { format!("Shards read: {}; `manifest.json` names them.\n\n", list.join(", ")) }
}

const FIELDS: &str = "## Fields\n\n\
    `text`; `origin` (web, synthetic, human); `sample_id` (the same for all texts of a pair); `url` (where the image was found); \
    `itm` (probability that image and text match) and `itc` (cosine of image and text), by the filter, and `clip` (their cosine by a \
    CLIP model, if the run had one), all empty for human texts; `sha256` of the image as the server sent it (images here are re-encoded).\n\n";

fn how_to_load(manifest: &Manifest) -> String {
    let mut text = "## How to load it\n\n```python\n".to_owned();
    for format in &manifest.formats {
        text.push_str(match format {
            Format::Parquet => {
                "from datasets import load_dataset\nrows = load_dataset(\"parquet\", data_files=\"parquet/*.parquet\", split=\"train\")\n\
                 rows[0][\"image\"], rows[0][\"text\"]\n\n"
            }
            Format::Webdataset => {
                "import glob, webdataset\nrows = webdataset.WebDataset(sorted(glob.glob(\"webdataset/*.tar\")), shardshuffle=False)\n\
                 rows = rows.decode(\"pil\").to_tuple(\"jpg;png;webp\", \"txt\", \"json\")\n\n"
            }
            Format::Blip => "import json\nrows = json.load(open(\"blip.json\"))  # for BLIP: image_root is this folder\n\n",
        });
    }
    text.truncate(text.trim_end().len());
    text.push_str("\n```\n\n");
    text
}

const LICENCE: &str = "## Licences\n\n\
    Images and web texts belong to those who published them; their licences were not looked up and are unknown. `url` tells where \
    each came from. Check the licences before you pass the data on or train for more than research. Machine-written texts may be \
    wrong, and both models carry the biases of what they were trained on.\n";
