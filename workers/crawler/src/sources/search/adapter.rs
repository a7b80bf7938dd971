//! How a search API is spoken to, told as data: what is asked for, and where in the answer things stand.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use capfilt_schemas::TextSource;
use reqwest::header::{HeaderName, HeaderValue};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use url::Url;
use url::form_urlencoded::byte_serialize;

use crate::address::{NOT_WEB, is_web};
use crate::web::Header;
use crate::{CrawlError, units};

/// The ready adapters, by their names.
const READY: [(&str, &str); 2] =
    [("openverse", include_str!("openverse.toml")), ("wikimedia_commons", include_str!("wikimedia_commons.toml"))];
/// What stands for something in the template of an address.
const PLACEHOLDERS: [&str; 5] = ["{query}", "{page}", "{offset}", "{cursor}", "{per_page}"];

/// A search API that answers in JSON.
///
/// Places in an answer are JSON pointers (RFC 6901), in which `*` stands for every element of an array or object:
/// `/tags/*/name`. An endpoint is made for programs, so robots.txt does not count for it, but the agent is told and `rate` is kept.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Its name, as it stands in `source`.
    pub name: String,
    /// The address of a page of results. In it stand `{query}`, perhaps `{per_page}`, and for further pages one of `{page}`,
    /// `{offset}` (in results, from 0) and `{cursor}`.
    pub url: String,
    /// Results of a page.
    pub per_page: u32,
    /// The number of the first page.
    #[serde(default = "one")]
    pub first_page: u32,
    /// The results, in an answer.
    pub items: String,
    /// The address of the image, in a result; the first place that has one counts.
    pub image: Vec<String>,
    /// The texts, in a result, by what they are. Several values of one place are joined by commas; HTML is left out.
    pub texts: BTreeMap<TextSource, String>,
    /// The page that the image stands on, in a result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page: Option<String>,
    /// What leads to the next page, in an answer: a value for `{cursor}`, an object of further query parameters, or an address. Nothing
    /// there: this was the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// How many results there are, in an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<String>,
    /// How many pages there are, in an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<String>,
    /// What stands only in an answer that is none, although its HTTP status is 200.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Most requests a second.
    pub rate: f64,
    /// Queries asked at once.
    #[serde(default = "one")]
    pub at_once: u32,
    /// Most bytes of an answer.
    #[serde(default = "max_body", with = "units::size")]
    pub max_body: usize,
    /// The key, if the API wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<ApiKey>,
}

/// Where a key comes from and goes to. The key itself is never written anywhere.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// The environment variable that holds it.
    pub env: String,
    /// The header that it is sent in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// The query parameter that it is sent in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// What stands before it in the header: `"Bearer "`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// Whether nothing works without it.
    #[serde(default = "yes")]
    pub required: bool,
}

const fn one() -> u32 {
    1
}

const fn yes() -> bool {
    true
}

const fn max_body() -> usize {
    4 << 20
}

/// A key as it is sent.
#[derive(Default)]
pub(super) struct Key {
    pub(super) header: Option<Header>,
    parameter: Option<(String, String)>,
}

/// Which page of the results of a query.
#[derive(Clone, Default)]
pub(super) struct Position {
    /// Pages before it.
    page: u32,
    cursor: Option<Value>,
}

/// What an answer holds.
#[derive(Default, Debug)]
pub(super) struct Page {
    /// Results, those without an image or a text included.
    pub(super) results: usize,
    pub(super) images: Vec<Image>,
    next: Option<Value>,
    last: bool,
}

/// One result.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Image {
    pub(super) url: String,
    pub(super) page: Option<String>,
    /// Not clean yet.
    pub(super) texts: Vec<(TextSource, String)>,
}

/// Reads an adapter: the name of a ready one, or a table.
pub(super) fn read<'de, D: Deserializer<'de>>(d: D) -> Result<Adapter, D::Error> {
    struct NameOrTable;
    impl<'de> Visitor<'de> for NameOrTable {
        type Value = Adapter;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the name of an adapter or a table")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Adapter, E> {
            let Some((_, text)) = READY.iter().find(|(ready, _)| *ready == name) else {
                let names = READY.map(|(name, _)| name).join(", ");
                return Err(E::custom(format!("there is no adapter `{name}`: write one of {names}, or a table")));
            };
            toml::from_str(text).map_err(E::custom)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Adapter, A::Error> {
            Adapter::deserialize(MapAccessDeserializer::new(map)).map_err(A::Error::custom)
        }
    }
    d.deserialize_any(NameOrTable)
}

impl Adapter {
    /// Checks what serde cannot; `name` is the setting.
    pub(super) fn check(&self, name: &str) -> Result<(), CrawlError> {
        let bad = |field: &str, reason: String| Err(CrawlError::Config { setting: format!("{name}.{field}"), reason });
        if !self.url.contains("{query}") {
            return bad("url", "it has no `{query}`".to_owned());
        }
        let bare = PLACEHOLDERS.iter().fold(self.url.clone(), |url, placeholder| url.replace(placeholder, "1"));
        if bare.contains(['{', '}']) {
            return bad("url", format!("it may have {} in braces, nothing else", PLACEHOLDERS.join(", ")));
        }
        if !Url::parse(&bare).is_ok_and(|url| is_web(&url)) {
            return bad("url", format!("`{}` is {NOT_WEB}", self.url));
        }
        if self.url.contains("{cursor}") && self.next.is_none() {
            return bad("next", "it is missing, but the address has a `{cursor}`".to_owned());
        }
        if self.image.is_empty() || self.texts.is_empty() {
            return bad("image and texts", "each needs a place in a result".to_owned());
        }
        let places = [&self.page, &self.next, &self.total, &self.pages, &self.error].into_iter().flatten();
        let places = places.chain(&self.image).chain(self.texts.values()).chain([&self.items]);
        if let Some(place) = { places }.find(|place| !place.is_empty() && !place.starts_with('/')) {
            return bad("items, image, texts, …", format!("`{place}` is no JSON pointer: it must begin with `/`"));
        }
        if !(self.rate > 0.0 && self.rate.is_finite()) {
            return bad("rate", "it must be above 0".to_owned());
        }
        if self.per_page == 0 || self.at_once == 0 || self.max_body == 0 {
            return bad("per_page, at_once and max_body", "they must be at least 1".to_owned());
        }
        if let Some(key) = &self.key
            && key.header.is_some() == key.parameter.is_some()
        {
            return bad("key", "it needs either `header` or `parameter`".to_owned());
        }
        if let Some(header) = self.key.as_ref().and_then(|key| key.header.as_ref())
            && HeaderName::from_bytes(header.as_bytes()).is_err()
        {
            return bad("key.header", format!("`{header}` is no name of a header"));
        }
        Ok(())
    }

    /// Time between two requests.
    pub(super) fn delay(&self) -> Duration {
        Duration::try_from_secs_f64(1.0 / self.rate).unwrap_or(Duration::MAX)
    }

    /// The key, out of the environment.
    pub(super) fn key(&self) -> Result<Key, CrawlError> {
        let Some(key) = &self.key else { return Ok(Key::default()) };
        let bad = |reason: &str| CrawlError::Config {
            setting: format!("adapter {}", self.name),
            reason: format!("the environment variable {} {reason}", key.env),
        };
        let value = match std::env::var(&key.env) {
            Ok(value) if !value.trim().is_empty() => value.trim().to_owned(),
            Err(std::env::VarError::NotUnicode(_)) => return Err(bad("is not UTF-8")),
            _ if key.required => return Err(bad("is not set; put the API's key there")),
            _ => return Ok(Key::default()),
        };
        if let Some(parameter) = &key.parameter {
            return Ok(Key { header: None, parameter: Some((parameter.clone(), value)) });
        }
        let name = HeaderName::from_bytes(key.header.as_deref().unwrap_or_default().as_bytes());
        let mut value =
            HeaderValue::from_str(&format!("{}{value}", key.prefix)).map_err(|_| bad("holds what no header may hold"))?;
        value.set_sensitive(true);
        Ok(Key { header: name.ok().map(|name| (name, value)), parameter: None })
    }

    /// The address of a page of results.
    pub(super) fn address(&self, query: &str, at: &Position, key: &Key) -> Option<Url> {
        let encode = |text: &str| byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20");
        let scalar = at.cursor.as_ref().and_then(text_of).unwrap_or_default();
        let values = [
            encode(query),
            (u64::from(at.page) + u64::from(self.first_page)).to_string(),
            (u64::from(at.page) * u64::from(self.per_page)).to_string(),
            encode(&scalar),
            self.per_page.to_string(),
        ];
        let fill = |template: &str| {
            let mut out = String::new();
            let mut rest = template;
            // What a query brings along is never taken for a placeholder.
            while let Some((before, from)) = rest.split_once('{') {
                out.push_str(before);
                let known = PLACEHOLDERS.iter().zip(&values).find(|(placeholder, _)| from.starts_with(&placeholder[1..]));
                match known {
                    Some((placeholder, value)) => {
                        out.push_str(value);
                        rest = &from[placeholder.len() - 1..];
                    }
                    None => {
                        out.push('{');
                        rest = from;
                    }
                }
            }
            out + rest
        };
        let mut url = Url::parse(&fill(&self.url)).ok()?;
        match &at.cursor {
            Some(Value::Object(more)) => {
                let more: Vec<_> = more.iter().filter_map(|(name, value)| Some((name, text_of(value)?))).collect();
                let kept: Vec<_> =
                    url.query_pairs().into_owned().filter(|(name, _)| more.iter().all(|(n, _)| *n != name)).collect();
                url.query_pairs_mut().clear().extend_pairs(kept).extend_pairs(more);
            }
            Some(Value::String(next)) if !self.url.contains("{cursor}") => {
                let to = url.join(next).ok()?;
                // Whatever the answer says, the key stays where it belongs.
                if to.origin() != url.origin() {
                    return None;
                }
                url = to;
            }
            _ => {}
        }
        if let Some((name, value)) = &key.parameter {
            url.query_pairs_mut().append_pair(name, value);
        }
        Some(url)
    }

    /// Reads the answer for `at`. The error is a word for what is wrong with it.
    pub(super) fn read(&self, body: &[u8], at: &Position) -> Result<Page, &'static str> {
        let answer: Value = serde_json::from_slice(body).map_err(|_| "not_json")?;
        let first = |place: &Option<String>| place.as_ref().and_then(|place| all(&answer, place).into_iter().next());
        if first(&self.error).is_some() {
            return Err("error");
        }
        let items = all(&answer, &self.items);
        let image = |item: &Value| {
            let value = |place: &String| all(item, place).into_iter().find_map(text_of);
            let url = self.image.iter().find_map(value)?;
            let texts = self.texts.iter().map(|(source, place)| {
                let values: Vec<String> = all(item, place).into_iter().filter_map(text_of).collect();
                (*source, values.join(", "))
            });
            let texts = texts.filter(|(_, text)| !text.trim().is_empty()).collect();
            Some(Image { url, page: self.page.as_ref().and_then(value), texts })
        };
        let number = |place: &Option<String>| first(place).and_then(Value::as_u64);
        let after = u64::from(at.page) + 1;
        let last = number(&self.pages).is_some_and(|pages| after >= pages)
            || number(&self.total).is_some_and(|total| after * u64::from(self.per_page) >= total);
        let next = first(&self.next).filter(|next| !next.is_null()).cloned();
        Ok(Page { results: items.len(), images: items.into_iter().filter_map(image).collect(), next, last })
    }

    /// The page after `at`, if there is one.
    pub(super) fn after(&self, at: &Position, page: &Page) -> Option<Position> {
        let numbered = self.url.contains("{page}") || self.url.contains("{offset}");
        let more = !page.last && if self.next.is_some() { page.next.is_some() } else { numbered };
        more.then(|| Position { page: at.page.saturating_add(1), cursor: page.next.clone() })
    }
}

/// The values at a place.
fn all<'v>(value: &'v Value, place: &str) -> Vec<&'v Value> {
    let mut at = vec![value];
    for part in place.split('/').skip(1) {
        at = match part {
            "*" => at.into_iter().flat_map(elements).collect(),
            _ => {
                let key = part.replace("~1", "/").replace("~0", "~");
                let step = |value: &'v Value| match value {
                    Value::Object(fields) => fields.get(&key),
                    Value::Array(items) => items.get(key.parse::<usize>().ok()?),
                    _ => None,
                };
                at.into_iter().filter_map(step).collect()
            }
        };
    }
    at
}

fn elements(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    }
}

/// A string or number as text.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
