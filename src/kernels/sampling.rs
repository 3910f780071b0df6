//! The draw of a token, where the weights are known: arithmetic on integers.
//!
//! A token's weight is `e^(scale (logit - largest))` in units of 2^-40, rounded down. So sums have no order,
//! and every backend that agrees on the weights draws the same token.

use super::ops::SamplingRules;

/// The largest weight.
pub const ONE: u64 = 1 << 40;

/// What may be drawn.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The column.
    pub id: u32,
    /// What orders candidates.
    pub logit: f32,
    /// Above 0.
    pub weight: u64,
}

impl Candidate {
    /// A column whose weight is this share of the largest; none where that is nothing, or NaN.
    pub fn new(id: u32, logit: f32, weight: f64) -> Option<Self> {
        let weight = (weight * ONE as f64) as u64; // A NaN is 0.
        // -0 is equal to 0.
        (weight > 0).then_some(Self { id, logit: logit + 0.0, weight })
    }
}

impl SamplingRules {
    /// The least weight that may be drawn.
    pub fn min_weight(&self) -> u64 {
        (self.min_p * ONE as f64) as u64
    }
}

/// Draws one of the candidates, each with its weight's probability among those that the rules leave; 0 where there is none.
pub fn draw(mut kept: Vec<Candidate>, rules: &SamplingRules, uniform: f64) -> u32 {
    let sum = |kept: &[Candidate]| kept.iter().map(|c| c.weight).sum::<u64>();
    let descending =
        |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id));
    let SamplingRules { top_k, top_p, .. } = *rules;
    if top_k > 0 && top_k < kept.len() {
        // Equals of the last one stay, too.
        let (.., &mut last, _) = kept.select_nth_unstable_by(top_k - 1, descending);
        kept.retain(|c| c.logit >= last.logit);
    }
    if top_p < 1.0 {
        // One stays while those before it have not reached top_p; the first one always.
        let wanted = ((top_p * sum(&kept) as f64).ceil() as u64).max(1);
        let (mut n, mut sorted, mut before) = (0, 0, 0);
        while before < wanted && n < kept.len() {
            if n == sorted {
                // Only as many are sorted as are needed, most often a few of a vocabulary.
                let rest = &mut kept[n..];
                let more = (3 * n).max(64).min(rest.len());
                if more < rest.len() {
                    rest.select_nth_unstable_by(more - 1, descending);
                }
                rest[..more].sort_unstable_by(descending);
                sorted += more;
            }
            before += kept[n].weight;
            n += 1;
        }
        kept.truncate(n);
    }
    let least = rules.min_weight();
    kept.retain(|c| c.weight >= least);
    kept.sort_unstable_by_key(|c| c.id);
    let total = sum(&kept);
    let target = (uniform * total as f64) as u64; // As large as the total where that rounds up.
    let mut before = 0;
    let drawn = kept.iter().find(|c| {
        before += c.weight;
        before > target.min(total - 1)
    });
    drawn.map_or(0, |c| c.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBABILITIES: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];
    const ALL: SamplingRules = SamplingRules { top_k: 0, top_p: 1.0, min_p: 0.0 };

    fn candidates(probabilities: &[f64]) -> Vec<Candidate> {
        let largest = probabilities.iter().copied().fold(0.0, f64::max);
        let candidate = |(&p, id): (&f64, u32)| Candidate::new(id, p.ln() as f32, p / largest);
        probabilities.iter().zip(0..).filter_map(candidate).collect()
    }

    /// What is ever drawn.
    fn ids(rules: &SamplingRules, probabilities: &[f64]) -> Vec<u32> {
        let draws = (0..1000).map(|i| draw(candidates(probabilities), rules, f64::from(i) / 1e3));
        let mut ids: Vec<u32> = draws.collect();
        assert!(ids.is_sorted(), "by id");
        ids.dedup();
        ids
    }

    #[test]
    fn filters_keep_what_transformers_keeps() {
        let ids = |rules: SamplingRules| ids(&rules, &PROBABILITIES);
        assert_eq!(ids(ALL), [0, 1, 2, 3, 4]);
        assert_eq!(ids(SamplingRules { top_k: 2, ..ALL }), [1, 3]);
        assert_eq!(ids(SamplingRules { top_p: 0.3, ..ALL }), [1]);
        assert_eq!(ids(SamplingRules { top_p: 0.7, ..ALL }), [1, 3, 4]);
        assert_eq!(ids(SamplingRules { min_p: 0.5, ..ALL }), [1, 3, 4]);
        // top-p is of what top-k left: 0.4 of 0.65 is less than 0.7 of it.
        assert_eq!(ids(SamplingRules { top_k: 2, top_p: 0.7, ..ALL }), [1, 3]);
        assert_eq!(ids(SamplingRules { top_k: 2, top_p: 0.6, ..ALL }), [1]);
    }

    /// However many it takes, of equals and of others, in any order.
    #[test]
    fn top_p_is_the_first_of_all_in_order() {
        for (n, levels) in [(63, 9), (64, 1), (65, 70), (500, 7), (3000, 3000)] {
            let probabilities: Vec<f64> =
                (0..n).map(|i| f64::from(i * 7919 % n % levels + 1)).collect();
            let mut order: Vec<usize> = (0..n as usize).collect();
            order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
            let total: f64 = probabilities.iter().sum();
            for top_p in [0.001, 0.1, 0.5, 0.93, 0.999] {
                let mut before = 0.0;
                let wanted = order.iter().take_while(|&&i| {
                    let stays = before < top_p * total * (1.0 - 1e-12);
                    before += probabilities[i];
                    stays
                });
                let last = *wanted.max().unwrap() as u32;
                // The draw of the largest number is the last one that stays, by its column.
                let drawn = draw(candidates(&probabilities), &SamplingRules { top_p, ..ALL }, 1.0);
                assert_eq!(drawn, last, "{n} columns of {levels} levels, {top_p}");
            }
        }
    }

    #[test]
    fn equals_of_the_last_stay_by_top_k_and_go_by_id_by_top_p() {
        let equal = [0.2, 0.1, 0.2, 0.2, 0.1, 0.2];
        assert_eq!(ids(&SamplingRules { top_k: 2, ..ALL }, &equal), [0, 2, 3, 5]);
        assert_eq!(ids(&SamplingRules { top_p: 0.5, ..ALL }, &equal), [0, 2, 3]);
    }

    #[test]
    fn nothing_to_draw_is_the_first_token() {
        assert_eq!(draw(Vec::new(), &ALL, 0.5), 0);
        assert!(Candidate::new(3, f32::NAN, f64::NAN).is_none());
    }

    #[test]
    fn draws_are_as_probable_as_their_weights() {
        let n = 100_000;
        let mut counts = [0; 5];
        for i in 0..n {
            let uniform = f64::from(i) / f64::from(n);
            counts[draw(candidates(&PROBABILITIES), &ALL, uniform) as usize] += 1;
        }
        for (count, p) in counts.into_iter().zip(PROBABILITIES) {
            assert!((f64::from(count) - f64::from(n) * p).abs() <= 1.5, "{counts:?}");
        }
    }
}
