//! Sorting a few numbers, as the queries of a text are.

/// Sorts `ids` and moves each of them, once, to the front; gives how many these are. No id is `u32::MAX`.
pub(super) fn sort_once(ids: &mut [u32]) -> usize {
    match ids.len() {
        0..=16 => by_rank::<16>(ids),
        17..=32 => by_rank::<32>(ids),
        _ => {
            ids.sort_unstable();
            let mut kept = 1;
            for i in 1..ids.len() {
                ids[kept] = ids[i];
                kept += usize::from(ids[i] != ids[kept - 1]);
            }
            kept
        }
    }
}

/// An id's place is how many are smaller. To count that for all takes no branch that depends on them, and is done for several at once.
fn by_rank<const N: usize>(ids: &mut [u32]) -> usize {
    // Signed numbers are compared sooner.
    const SIGN: u32 = 1 << 31;
    let mut all = [i32::MAX; N];
    for (to, id) in all.iter_mut().zip(&*ids) {
        *to = (*id ^ SIGN) as i32;
    }
    let mut ranks = [0; N];
    for id in &all[..ids.len()] {
        for (rank, other) in ranks.iter_mut().zip(&all) {
            *rank += i32::from(id < other);
        }
    }
    // Equal ids have the same rank; the places after it stay free.
    let mut sorted = [u32::MAX; N];
    for (rank, id) in ranks.iter().zip(&*ids) {
        sorted[*rank as usize % N] = *id;
    }
    let mut kept = 0;
    for id in &sorted[..ids.len()] {
        ids[kept] = *id;
        kept += usize::from(*id != u32::MAX);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn same_as_the_library(mut ids in proptest::collection::vec(prop_oneof![0_u32..20, any::<u32>().prop_map(|n| n / 2 * 2)], 0..50)) {
            let mut wanted = ids.clone();
            wanted.sort_unstable();
            wanted.dedup();
            let kept = sort_once(&mut ids);
            prop_assert_eq!(&ids[..kept], wanted);
        }
    }
}
