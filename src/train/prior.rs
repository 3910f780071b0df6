//! The Indian-buffet-process prior of the router (Polytropon), as its authors' code has it.
//!
//! ```text
//! P = σ(Z)   H = 1[P > 1/2]   m_s = Σ_k H[k, s]   K_h: how many columns equal the column h
//! penalty = Σ_h lnΓ(K_h + 1) - Σ_{s: m_s > 0} ( lnΓ(N - m_s + 1) + lnΓ(m_s) )
//! d penalty / d Z[k, s] = ( ψ(N - m_s + 1) - ψ(m_s) ) P (1 - P)   where m_s > 0, else 0
//! ```
//!
//! N is the number of tasks, k counts tasks and s the skills of one split of one router. The step
//! function passes its gradient straight through; K_h carries none. The authors drop the terms with
//! the concentration α and N!, so α has no effect here either.

use std::collections::HashMap;

/// Penalty and gradient of one split's logits, `[n_tasks, n_skills]`.
pub fn ibp(logits: &[f64], n_skills: usize) -> (f64, Vec<f64>) {
    let n_tasks = logits.len() / n_skills;
    let column =
        |s: usize| -> Vec<bool> { (0..n_tasks).map(|k| logits[k * n_skills + s] > 0.0).collect() };
    let mut histories: HashMap<Vec<bool>, usize> = HashMap::new();
    let mut penalty = 0.0;
    let mut slopes = vec![0.0; n_skills];
    for (s, slope) in slopes.iter_mut().enumerate() {
        let column = column(s);
        let m = column.iter().filter(|&&on| on).count();
        if m > 0 {
            penalty -= ln_gamma(n_tasks - m + 1) + ln_gamma(m);
            *slope = digamma(n_tasks - m + 1) - digamma(m);
            *histories.entry(column).or_default() += 1;
        }
    }
    // A map's order is random, but a sum over sorted counts is not.
    let mut counts: Vec<usize> = histories.into_values().collect();
    counts.sort_unstable();
    penalty += counts.into_iter().map(|n| ln_gamma(n + 1)).sum::<f64>();
    let gradient = logits.iter().enumerate().map(|(i, z)| {
        let p = 1.0 / (1.0 + (-z).exp());
        slopes[i % n_skills] * p * (1.0 - p)
    });
    (penalty, gradient.collect())
}

/// ln Γ(n) = ln (n - 1)!
fn ln_gamma(n: usize) -> f64 {
    (2..n).map(|k| (k as f64).ln()).sum()
}

/// ψ(n) = -γ + Σ_{k<n} 1/k
fn digamma(n: usize) -> f64 {
    const EULER: f64 = 0.577_215_664_901_532_9;
    (1..n).map(|k| 1.0 / k as f64).sum::<f64>() - EULER
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_functions_at_integers() {
        assert_eq!((ln_gamma(1), ln_gamma(2)), (0.0, 0.0));
        assert!((ln_gamma(6) - 120.0_f64.ln()).abs() < 1e-12);
        assert!((digamma(1) + 0.577_215_664_901_532_9).abs() < 1e-15);
        assert!((digamma(4) - (1.0 + 0.5 + 1.0 / 3.0 - 0.577_215_664_901_532_9)).abs() < 1e-15);
    }

    /// Three tasks, four skills: two of one history, one of another, one that nobody uses.
    #[test]
    fn the_penalty_is_the_formula() {
        #[rustfmt::skip]
        let logits = [ 1.0,  2.0, -1.0, -3.0,
                       0.5,  0.1, -2.0, -1.0,
                      -1.0, -0.2,  3.0, -2.0];
        let (penalty, gradient) = ibp(&logits, 4);
        // m = 2, 2, 1, 0; histories 110 (twice) and 001.
        let of = |m: usize| ln_gamma(3 - m + 1) + ln_gamma(m);
        assert!((penalty - (2.0_f64.ln() - 2.0 * of(2) - of(1))).abs() < 1e-12);
        let slope = |m: usize| digamma(3 - m + 1) - digamma(m);
        for (i, z) in logits.iter().enumerate() {
            let p = 1.0 / (1.0 + (-z).exp());
            let expected = [slope(2), slope(2), slope(1), 0.0][i % 4] * p * (1.0 - p);
            assert!((gradient[i] - expected).abs() < 1e-12, "{i}");
        }
        // Training goes down the penalty: a skill that more than half of the tasks use becomes likelier still, a
        // rare one rarer.
        assert!(slope(1) > 0.0 && slope(3) < 0.0);
    }
}
