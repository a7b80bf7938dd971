//! Draws: the numbers by which queries choose among their pairs.

use arrow::array::{AsArray, ListArray, StringArray};
use arrow::datatypes::UInt32Type;

/// A sample id as a number: its 32 hexadecimal digits. Numbers and texts are in the same order.
pub(crate) fn parse_id(text: &str) -> Option<u128> {
    let mut bytes = [0; 16];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(u128::from_be_bytes(bytes))
}

/// The finaliser of `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014; Stafford's variant 13). Different numbers stay different.
pub(crate) const fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ n >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ n >> 31
}

/// Takes the place of a query in draws that are not a query's.
const NO_QUERY: u32 = u32::MAX;

/// All draws under one seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draws {
    seed: u64,
}

impl Draws {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { seed: mix(seed.wrapping_add(Self::STEP)) }
    }

    /// `SplitMix64`'s step: the golden ratio in 64 bits.
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    /// Where a pair stands among those of a query, smallest first. The upper half is the draw: the query's own permutation, spread
    /// evenly over all 64-bit numbers, of the upper half of the sample id. The lower half is that of the sample id, so that no two
    /// pairs stand at the same place. Sample ids are hashes, so the draws of two queries have nothing to do with each other.
    pub(crate) const fn place(self, query: u32, id: u128) -> u128 {
        let own = mix(self.seed.wrapping_add(Self::STEP.wrapping_mul(query as u64 + 1)));
        let (high, low) = ((id >> 64) as u64, id as u64);
        (mix(high ^ own) as u128) << 64 | low as u128
    }

    /// Where a pair stands among all, whatever its queries.
    pub(crate) const fn place_of_all(self, id: u128) -> u128 {
        self.place(NO_QUERY, id)
    }
}

/// The column of a batch that says which queries want each pair.
pub(crate) struct Wanted<'a> {
    lists: &'a ListArray,
    items: &'a [u32],
    sorted: Vec<u32>,
}

impl<'a> Wanted<'a> {
    pub(crate) fn new(lists: &'a ListArray) -> Self {
        Self { lists, items: lists.values().as_primitive::<UInt32Type>().values(), sorted: Vec::new() }
    }

    /// The queries of row `i`, ascending, each once.
    pub(crate) fn queries(&mut self, i: usize) -> &[u32] {
        let offsets = self.lists.value_offsets();
        let items = &self.items[offsets[i] as usize..offsets[i + 1] as usize];
        if items.windows(2).all(|two| two[0] < two[1]) {
            return items;
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(items);
        self.sorted.sort_unstable();
        self.sorted.dedup();
        &self.sorted
    }
}

/// The id in a row.
pub(crate) fn id_at(ids: &StringArray, i: usize) -> Result<u128, String> {
    parse_id(ids.value(i)).ok_or_else(|| format!("has the sample id `{}`, which is not 32 hexadecimal digits", ids.value(i)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn draws_are_fixed_for_ever() {
        let id = parse_id("00112233445566778899aabbccddeeff").unwrap();
        assert_eq!(id, 0x0011_2233_4455_6677_8899_AABB_CCDD_EEFF);
        assert_eq!(parse_id("0011"), None);
        assert_eq!(parse_id("0011223344556677889 aabbccddeeff"), None);
        let place = Draws::new(0).place(0, id);
        assert_eq!(place >> 64, u128::from(by_hand(0, 0, 0x0011_2233_4455_6677)));
        assert_eq!(place as u64, 0x8899_AABB_CCDD_EEFF);
        assert_ne!(Draws::new(1).place(0, id), Draws::new(0).place(1, id));
    }

    /// `SplitMix64` as published: the second output of a generator that starts at what the seed's generator gives.
    fn by_hand(seed: u64, query: u64, high: u64) -> u64 {
        let next = |state: u64| {
            let z = state;
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        let golden = 0x9E37_79B9_7F4A_7C15_u64;
        let base = next(seed.wrapping_add(golden));
        next(high ^ next(base.wrapping_add(golden.wrapping_mul(query + 1))))
    }

    #[test]
    fn draws_are_spread_evenly_and_queries_draw_independently() {
        let draws = Draws::new(7);
        let ids = (0..40_000_u64).map(|i| parse_id(&capfilt_schemas::sample_id(&format!("http://a/{i}"), "t")).unwrap());
        let taken = |query: u32, id: u128| draws.place(query, id) >> 64 < 1 << 62;
        let (mut one, mut both) = (0_u32, 0_u32);
        for id in ids {
            one += u32::from(taken(3, id));
            both += u32::from(taken(3, id) && taken(4, id));
        }
        // A quarter and a sixteenth; four standard deviations are 346 and 194.
        assert!((9_654..10_346).contains(&one), "{one}");
        assert!((2_306..2_694).contains(&both), "{both}");
    }
}
