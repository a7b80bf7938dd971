//! Sorting a few numbers, as the queries of a text are.

use pulp::{Arch, Simd, WithSimd};

use super::at_least;

/// Most numbers that are sorted by rank.
const MOST: usize = 64;

/// Sorts each part of `ids`, given where it ends, without doubles, one after the other into `sorted`; then `ends` say where it ends there.
/// No id is `u32::MAX`.
pub(super) fn sort_each(ids: &mut Vec<u32>, ends: &mut [usize], sorted: &mut Vec<u32>) {
    // What follows on a part is read and written with it.
    let room = ends.last().map_or(0, |end| *end) + MOST;
    at_least(ids, room);
    at_least(sorted, room);
    Arch::new().dispatch(SortEach { ids, ends, sorted });
}

struct SortEach<'a> {
    ids: &'a mut [u32],
    ends: &'a mut [usize],
    sorted: &'a mut [u32],
}

impl WithSimd for SortEach<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { ids, ends, sorted } = self;
        let (mut start, mut at) = (0, 0);
        for end in ends {
            let len = *end - start;
            at += match len {
                0..=16 => by_rank::<S, 16>(simd, &ids[start..], len, &mut sorted[at..]),
                17..=32 => by_rank::<S, 32>(simd, &ids[start..], len, &mut sorted[at..]),
                33..=MOST => by_rank::<S, MOST>(simd, &ids[start..], len, &mut sorted[at..]),
                _ => by_library(&mut ids[start..*end], &mut sorted[at..]),
            };
            start = *end;
            *end = at;
        }
    }
}

fn by_library(ids: &mut [u32], sorted: &mut [u32]) -> usize {
    ids.sort_unstable();
    let mut kept = 0;
    for (i, id) in ids.iter().enumerate() {
        if i == 0 || ids[i - 1] != *id {
            sorted[kept] = *id;
            kept += 1;
        }
    }
    kept
}

/// An id's place is how many are smaller. To count that for all takes no branch that depends on them, and is done for several at once.
#[inline(always)]
fn by_rank<S: Simd, const N: usize>(simd: S, ids: &[u32], len: usize, out: &mut [u32]) -> usize {
    let (all, ids, out) = (&ids[..N], &ids[..len], &mut out[..N]);
    let mut ranks = [0; N];
    let (none, one) = (simd.splat_u32s(0), simd.splat_u32s(1));
    for (ranks, others) in S::as_mut_simd_u32s(&mut ranks).0.iter_mut().zip(S::as_simd_u32s(all).0) {
        let mut rank = none;
        for id in ids {
            let is_less = simd.less_than_u32s(simd.splat_u32s(*id), *others);
            rank = simd.add_u32s(rank, simd.select_u32s(is_less, one, none));
        }
        *ranks = rank;
    }
    // Equal ids have the same rank; the places after it stay free.
    out.fill(u32::MAX);
    for (rank, id) in ranks.iter().zip(ids) {
        out[*rank as usize % N] = *id;
    }
    if out[..ids.len()].iter().all(|id| *id != u32::MAX) {
        return ids.len();
    }
    let mut kept = 0;
    for i in 0..ids.len() {
        let id = out[i];
        out[kept % N] = id;
        kept += usize::from(id != u32::MAX);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn same_as_the_library(
            parts in proptest::collection::vec(
                proptest::collection::vec(prop_oneof![0_u32..20, any::<u32>().prop_map(|n| n / 2 * 2)], 0..80),
                0..6,
            ),
        ) {
            let mut ids = parts.concat();
            let mut ends: Vec<usize> = parts.iter().scan(0, |end, part| { *end += part.len(); Some(*end) }).collect();
            let mut sorted = vec![7; 3];
            sort_each(&mut ids, &mut ends, &mut sorted);
            let mut start = 0;
            for (mut wanted, end) in parts.into_iter().zip(ends) {
                wanted.sort_unstable();
                wanted.dedup();
                prop_assert_eq!(&sorted[start..end], wanted);
                start = end;
            }
        }
    }
}
