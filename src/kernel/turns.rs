//! The order of a service's endpoints, from one set to the next. Pure.

/// The order that takes over from `before`, whose first had the turn `base`, when it is the turn `turn`: those that stay keep
/// their order, starting with the one whose turn it is, and new ones come last. As `Rotation::succeed`.
pub(super) fn succeed<T: Copy + PartialEq>(
    before: &[T],
    base: u64,
    turn: u64,
    now: &[T],
) -> Vec<T> {
    let at = match before.len() {
        0 => 0,
        // A remainder of a usize fits one.
        len => (turn.wrapping_sub(base) % len as u64) as usize,
    };
    let (later, sooner) = before.split_at(at.min(before.len()));
    let in_turn = sooner.iter().chain(later).filter(|one| now.contains(one));
    let new = now.iter().filter(|one| !before.contains(one));
    in_turn.chain(new).copied().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_one_whose_turn_it_is_comes_first() {
        assert_eq!(succeed(&[1, 2, 3], 10, 11, &[1, 2, 3]), [2, 3, 1]);
        assert_eq!(succeed(&[1, 2, 3], 10, 11, &[1, 3, 4]), [3, 1, 4]);
        assert_eq!(succeed(&[], 0, 5, &[7, 8]), [7, 8]);
        assert!(succeed(&[1], 0, 0, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn changes_leave_the_turns_of_those_that_stay_even(
            stay in 1..6_u8,
            changes in prop::collection::vec((prop::collection::btree_set(10..20_u8, 0..4), 0..30_u64), 1..20),
        ) {
            let staying: Vec<u8> = (0..stay).collect();
            let (mut order, mut base, mut turn) = (staying.clone(), 0_u64, 0_u64);
            let mut got = vec![0_i64; 20];
            for (others, picks) in changes {
                let all: Vec<u8> = staying.iter().copied().chain(others).collect();
                order = succeed(&order, base, turn, &all);
                base = turn;
                prop_assert_eq!(order.len(), all.len());
                for _ in 0..picks {
                    got[usize::from(order[((turn - base) % order.len() as u64) as usize])] += 1;
                    turn += 1;
                }
                let of = |n: &u8| got[usize::from(*n)];
                let (most, least) = (staying.iter().map(of).max().unwrap(), staying.iter().map(of).min().unwrap());
                prop_assert!(most - least <= 1, "{got:?}");
            }
        }
    }
}
