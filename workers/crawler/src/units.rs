//! Lengths of time and sizes as people write them in a config: `"10s"`, `"250ms"`, `"20 MiB"`.

use std::time::Duration;

const TIMES: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZES: [(&str, u64); 7] =
    [("B", 1), ("kB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// A number and a unit; the number may have a decimal point, the unit may stand apart.
fn parse(text: &str, units: &[(&str, u64)], what: &str) -> Result<u64, String> {
    let help = || {
        let names: Vec<_> = units.iter().map(|u| u.0).collect();
        format!("`{text}` is not a {what}: write a number and one of {}", names.join(", "))
    };
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(help)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| help())?;
    let scale = units.iter().find(|u| u.0 == unit.trim()).ok_or_else(help)?.1;
    let value = number * scale as f64;
    if value > 1e15 { Err(help()) } else { Ok(value.round() as u64) }
}

/// The shortest exact spelling, so that equal values have equal texts in a task's name.
fn spell(value: u64, units: &[(&str, u64)], gap: &str) -> String {
    let exact = units.iter().filter(|u| value != 0 && value.is_multiple_of(u.1)).max_by_key(|u| u.1);
    let (unit, scale) = exact.unwrap_or(&units[0]);
    format!("{}{gap}{unit}", value / scale)
}

/// A number of bytes as people write it: `20 MiB`, `5MB`.
///
/// # Errors
/// A sentence that says what to write.
pub fn parse_size(text: &str) -> Result<usize, String> {
    usize::try_from(parse(text.trim(), &SIZES, "size")?).map_err(|e| e.to_string())
}

/// A size as people write it.
pub(crate) fn size_text(bytes: usize) -> String {
    spell(bytes as u64, &SIZES, " ")
}

/// `#[serde(with = "units::time")]` for a [`Duration`].
pub(crate) mod time {
    use super::{Duration, TIMES, parse, spell};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&spell(u64::try_from(value.as_millis()).unwrap_or(u64::MAX), &TIMES, ""))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(d)?;
        parse(text.trim(), &TIMES, "length of time").map(Duration::from_millis).map_err(serde::de::Error::custom)
    }
}

/// `#[serde(with = "units::size")]` for a number of bytes.
pub(crate) mod size {
    use super::{SIZES, parse_size, spell};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &usize, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&spell(*value as u64, &SIZES, " "))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<usize, D::Error> {
        let text = String::deserialize(d)?;
        parse_size(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse("10s", &TIMES, "t").unwrap(), 10_000);
        assert_eq!(parse("1.5 m", &TIMES, "t").unwrap(), 90_000);
        assert_eq!(parse("20 MiB", &SIZES, "s").unwrap(), 20 << 20);
        assert_eq!(parse("5MB", &SIZES, "s").unwrap(), 5_000_000);
        for bad in ["", "10", "s", "-1s", "1 fortnight", "1..2s", "1e3s", "99999999999999999999d"] {
            assert!(parse(bad, &TIMES, "length of time").is_err(), "{bad}");
        }
        assert_eq!(
            parse("ten", &TIMES, "length of time").unwrap_err(),
            "`ten` is not a length of time: write a number and one of ms, s, m, h, d"
        );
    }

    proptest! {
        #[test]
        fn spelling_reads_back(value in 0_u64..1 << 45) {
            prop_assert_eq!(parse(&spell(value, &TIMES, ""), &TIMES, "t").unwrap(), value);
            prop_assert_eq!(parse(&spell(value, &SIZES, " "), &SIZES, "s").unwrap(), value);
        }
    }

    #[test]
    fn equal_values_have_one_spelling() {
        assert_eq!(spell(90_000, &TIMES, ""), "90s");
        assert_eq!(spell(120_000, &TIMES, ""), "2m");
        assert_eq!(spell(0, &TIMES, ""), "0ms");
        assert_eq!(spell(20 << 20, &SIZES, " "), "20 MiB");
    }
}
