//! Which examples a step sees: a permutation for each epoch, from the seed alone.
//!
//! ```text
//! epoch 0   4 1 3 | 0 2      epoch 1   2 0 4 | 1 3      per_step 3: steps 1 2 | 3 4
//! ```
//!
//! The batch of a step is a function of the seed and the step's number, so a run that is resumed in
//! the middle of an epoch goes on with the rows that it would have seen.

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

/// The batches of a run.
#[derive(Clone, Debug)]
pub struct Batches {
    n_examples: usize,
    per_step: usize,
    shuffle: bool,
    seed: u64,
    /// The epoch whose order is at hand, and the order.
    current: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Batches of `per_step` of `n_examples`; the last one of an epoch may be smaller.
    ///
    /// # Panics
    /// If either is 0.
    pub fn new(n_examples: usize, per_step: usize, shuffle: bool, seed: u64) -> Self {
        assert!(n_examples > 0 && per_step > 0, "there is something to put into batches");
        Self { n_examples, per_step, shuffle, seed, current: None }
    }

    /// Steps in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_examples.div_ceil(self.per_step) as u64
    }

    /// The examples of step `step`, from 1.
    pub fn of_step(&mut self, step: u64) -> &[usize] {
        let (epoch_number, index) =
            ((step - 1) / self.steps_per_epoch(), (step - 1) % self.steps_per_epoch());
        if self.current.as_ref().is_none_or(|(number, _)| *number != epoch_number) {
            let order = epoch(self.n_examples, self.shuffle, self.seed, epoch_number);
            self.current = Some((epoch_number, order));
        }
        let order = self.current.as_ref().map_or(&[][..], |(_, order)| order);
        let first = index as usize * self.per_step;
        &order[first..(first + self.per_step).min(order.len())]
    }
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

    #[test]
    fn a_step_has_its_batch_wherever_one_begins() {
        let mut all = Batches::new(11, 4, true, 5);
        assert_eq!(all.steps_per_epoch(), 3);
        let batches: Vec<Vec<usize>> = (1..=9).map(|step| all.of_step(step).to_vec()).collect();
        for (i, epoch_batches) in batches.chunks(3).enumerate() {
            assert_eq!(epoch_batches.concat(), epoch(11, true, 5, i as u64));
        }
        for step in [8, 2, 9, 4] {
            assert_eq!(Batches::new(11, 4, true, 5).of_step(step), batches[step as usize - 1]);
            assert_eq!(all.of_step(step), batches[step as usize - 1], "in any order");
        }
    }
}
