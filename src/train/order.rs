//! The order of the training examples: a permutation for each epoch, from the seed alone.

use crate::kernels::philox::{Key, Purpose};

/// The order of `n` examples in an epoch: a Fisher-Yates shuffle, or the file's order.
pub fn epoch(n: usize, shuffle: bool, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffle {
        let key = Key::new(seed, Purpose::Shuffle, epoch);
        for i in (1..n).rev() {
            // A 32-bit draw scaled to `0..=i`; the bias is below 2^-32 * n.
            let draw = u64::from(key.word(i as u64));
            order.swap(i, ((draw * (i as u64 + 1)) >> 32) as usize);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_permutation_of_its_own() {
        let mut first = epoch(100, true, 1, 0);
        assert_eq!(first, epoch(100, true, 1, 0));
        assert_ne!(first, epoch(100, true, 1, 1));
        assert_ne!(first, epoch(100, true, 2, 0));
        first.sort_unstable();
        assert_eq!(first, epoch(100, false, 1, 0));
        assert!(epoch(0, true, 1, 0).is_empty());
    }
}
