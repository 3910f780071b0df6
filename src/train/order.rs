//! Which examples a step sees: a permutation for each epoch, from the seed alone.
//!
//! ```text
//! epoch 0   4 1 3 | 0 2      epoch 1   2 0 4 | 1 3      per_step 3: steps 1 2 | 3 4
//! ```
//!
//! The batch of a step is a function of the seed and the step's number, so a run that is resumed in
//! the middle of an epoch goes on with the rows that it would have seen. That holds for every
//! [`Sampling`]: where tasks are drawn, their rows are drawn with replacement, which needs no memory.

use std::collections::BTreeMap;

use crate::kernels::philox::{Key, Purpose};

/// How often a task is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Sampling {
    /// As often as it has rows: every row once an epoch.
    #[default]
    Proportional,
    /// With a probability proportional to `n_rows^(1/T)`: 1 is proportional, more is more even (T5).
    Temperature(f64),
    /// All alike.
    Uniform,
}

/// Where tasks are drawn: their rows, and how they are drawn.
#[derive(Clone, Debug)]
struct Drawn {
    /// By task: its rows and its share, above 0 and at most 1.
    tasks: Vec<(Vec<usize>, f64)>,
    /// Different tasks in a step at most.
    per_step: Option<usize>,
}

impl Drawn {
    /// The rows of a step: place `i` has the words of block `i` of the step's stream.
    fn step(&self, seed: u64, step: u64, n: usize) -> Vec<usize> {
        let key = Key::new(seed, Purpose::Shuffle, step);
        // Of 53 bits: the least likely of many tasks comes, too.
        let draw = |i: usize, part: u32| {
            let words = key.block([i as u32, part, 0, 0]);
            let bits = u64::from(words[0]) << 21 | u64::from(words[1]) >> 11;
            bits as f64 * f64::powi(2.0, -53)
        };
        let shares: Vec<f64> = self.tasks.iter().map(|task| task.1).collect();
        let of_all = sums(&shares);
        // With replacement: a task's share of the rows is the same whatever the limit.
        let n_chosen = self.per_step.map_or(0, |k| k.min(n));
        let chosen: Vec<usize> = (0..n_chosen).map(|i| drawn(&of_all, draw(i, 2))).collect();
        (0..n)
            .map(|i| {
                let task = match chosen.len() {
                    0 => drawn(&of_all, draw(i, 0)),
                    n => chosen[i % n],
                };
                let rows = &self.tasks[task].0;
                rows[((draw(i, 1) * rows.len() as f64) as usize).min(rows.len() - 1)]
            })
            .collect()
    }
}

/// The sum of the shares up to and with each.
fn sums(shares: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    shares
        .iter()
        .map(|share| {
            sum += share;
            sum
        })
        .collect()
}

/// The one of a draw from `[0, 1)`, of the sums of their shares; never one without a share.
fn drawn(sums: &[f64], draw: f64) -> usize {
    let at = draw * sums.last().copied().unwrap_or(0.0);
    // A product that was rounded up is the sum itself: the last one with a share.
    let last = sums.partition_point(|&sum| sum < sums[sums.len() - 1]);
    sums.partition_point(|&sum| sum <= at).min(last)
}

/// At most `cap` examples of each task, drawn by the seed; in their order.
pub fn capped(tasks: &[u32], cap: usize, seed: u64) -> Vec<usize> {
    let mut rows: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    tasks.iter().enumerate().for_each(|(i, task)| rows.entry(*task).or_default().push(i));
    let mut kept: Vec<usize> = rows
        .values()
        .flat_map(|rows| {
            let order = epoch(rows.len(), true, seed, u64::MAX);
            order.into_iter().take(cap).map(|i| rows[i]).collect::<Vec<_>>()
        })
        .collect();
    kept.sort_unstable();
    kept
}

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
    drawn: Option<Drawn>,
    /// The epoch (of drawn batches: the step) whose order is at hand, and the order.
    current: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Batches of `per_step` of `n_examples`; the last one of an epoch may be smaller.
    ///
    /// # Panics
    /// If either is 0.
    pub fn new(n_examples: usize, per_step: usize, shuffle: bool, seed: u64) -> Self {
        assert!(n_examples > 0 && per_step > 0, "there is something to put into batches");
        Self { n_examples, per_step, shuffle, seed, drawn: None, current: None }
    }

    /// Batches whose tasks are drawn. `tasks` has the task of each example; `tasks_per_step` limits
    /// how many different ones are in a step. An epoch is as many steps as without.
    ///
    /// # Panics
    /// If there is not a task for each example, or the temperature is not above 0.
    pub fn drawing(
        mut self,
        sampling: Sampling,
        tasks: &[u32],
        tasks_per_step: Option<usize>,
    ) -> Self {
        assert_eq!(tasks.len(), self.n_examples, "a task for each example");
        let mut rows: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        tasks.iter().enumerate().for_each(|(i, task)| rows.entry(*task).or_default().push(i));
        let per_step = tasks_per_step.filter(|&n| n < rows.len());
        if sampling == Sampling::Proportional && per_step.is_none() {
            return self;
        }
        let most = rows.values().map(Vec::len).max().unwrap_or(1) as f64;
        let share = |n: usize| match sampling {
            Sampling::Proportional => n as f64 / most,
            Sampling::Uniform => 1.0,
            Sampling::Temperature(t) => {
                assert!(t > 0.0, "a temperature is above 0");
                (n as f64 / most).powf(1.0 / t).max(f64::MIN_POSITIVE)
            }
        };
        let tasks = rows.into_values().map(|rows| {
            let share = share(rows.len());
            (rows, share)
        });
        self.drawn = Some(Drawn { tasks: tasks.collect(), per_step });
        self
    }

    /// Steps in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_examples.div_ceil(self.per_step) as u64
    }

    /// The examples of step `step`, from 1.
    pub fn of_step(&mut self, step: u64) -> &[usize] {
        if let Some(drawn) = &self.drawn {
            let (_, rows) = self.current.insert((step, drawn.step(self.seed, step, self.per_step)));
            return rows;
        }
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
    fn tasks_are_drawn_by_their_share() {
        // 90 rows of task 3, 9 of task 5, 1 of task 8.
        let tasks: Vec<u32> = (0..100)
            .map(|i| {
                if i < 90 {
                    3
                } else if i < 99 {
                    5
                } else {
                    8
                }
            })
            .collect();
        let count = |sampling, per_step| {
            let mut batches = Batches::new(100, 10, true, 1).drawing(sampling, &tasks, per_step);
            let mut counts = BTreeMap::new();
            for step in 1..=2000 {
                let rows = batches.of_step(step).to_vec();
                let mut seen: Vec<u32> = rows.iter().map(|&row| tasks[row]).collect();
                seen.iter().for_each(|task| *counts.entry(*task).or_insert(0_u32) += 1);
                seen.sort_unstable();
                seen.dedup();
                assert!(per_step.is_none_or(|n| seen.len() <= n), "{seen:?}");
                assert_eq!(rows, batches.of_step(step), "a step has its batch");
            }
            [3, 5, 8].map(|task| f64::from(counts.get(&task).copied().unwrap_or(0)) / 20_000.0)
        };
        for (sampling, expected) in [
            (Sampling::Uniform, [1.0 / 3.0; 3]),
            (Sampling::Temperature(2.0), [9.49 / 13.49, 3.0 / 13.49, 1.0 / 13.49]),
            (Sampling::Temperature(1.0), [0.9, 0.09, 0.01]),
        ] {
            for (found, expected) in count(sampling, None).iter().zip(expected) {
                // Five standard deviations of 20,000 draws.
                assert!((found - expected).abs() < 0.018, "{sampling:?}: {found}, not {expected}");
            }
        }
        // However few tasks there are in a step, each has its share of all rows.
        for (sampling, per_step, expected) in [
            (Sampling::Uniform, 1, [1.0 / 3.0; 3]),
            (Sampling::Uniform, 2, [1.0 / 3.0; 3]),
            (Sampling::Proportional, 2, [0.9, 0.09, 0.01]),
            (Sampling::Temperature(1.0), 9, [0.9, 0.09, 0.01]),
        ] {
            for (found, expected) in count(sampling, Some(per_step)).iter().zip(expected) {
                // Five standard deviations of 2,000 draws.
                let deviation = f64::sqrt(expected * (1.0 - expected) / 2000.0);
                let shown = format!("{sampling:?}, {per_step}: {found}, not {expected}");
                assert!((found - expected).abs() < 5.0 * deviation, "{shown}");
            }
        }
    }

    #[test]
    fn a_task_of_next_to_no_share_is_next_to_never_drawn() {
        // Task 1 has a share of 1e-12, or of nothing that f64 could tell.
        let tasks: Vec<u32> = (0..1001).map(|i| u32::from(i == 1000)).collect();
        for t in [0.25, 0.001] {
            for per_step in [None, Some(1)] {
                let sampling = Sampling::Temperature(t);
                let mut batches =
                    Batches::new(1001, 4, true, 1).drawing(sampling, &tasks, per_step);
                assert!((1..100).all(|step| !batches.of_step(step).contains(&1000)));
            }
        }
    }

    #[test]
    fn proportional_is_every_row_once() {
        let mut plain = Batches::new(5, 2, true, 1);
        // A limit that no step could pass is none.
        for limit in [None, Some(2), Some(50)] {
            let tasks = [0, 0, 0, 1, 1];
            let mut drawn =
                Batches::new(5, 2, true, 1).drawing(Sampling::Proportional, &tasks, limit);
            assert!((1..9).all(|step| drawn.of_step(step) == plain.of_step(step)));
        }
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
