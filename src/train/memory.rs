//! What training will need in memory, before it begins: a step on a backend that only counts.

use super::{TrainConfig, Trainer, choices::Choices};
use crate::{
    error::Result,
    kernels::{Backend, sizes::Sizes},
    model::{Example, Model},
};

/// Bytes of tensors in training. The base's weights and what a kernel needs while it runs are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBytes {
    /// What a trainer has before its first step: parameters and their moments.
    pub held: u64,
    /// At the peak of the step, with activations, and with what is held.
    pub peak: u64,
}

/// Bytes of a step on these examples.
///
/// # Errors
/// As [`Model::open`] and [`Trainer::step`].
pub fn step_bytes<B: Backend>(
    trainer: &Trainer<'_, B>,
    examples: &[&Example],
    wrong: Option<&[&[Example]]>,
) -> Result<StepBytes> {
    let base = trainer.model();
    let sizes = Sizes::instead_of(base.backend());
    let model = Model::open_on(sizes.clone(), base.dir())?;
    let adapter = trainer.adapter().on(&model);
    let config = TrainConfig { batch_size: examples.len().max(1), ..trainer.config().clone() };
    let mut counted = Trainer::new(&model, adapter, config)?;
    let held = sizes.held();
    match wrong {
        None => counted.step(examples)?,
        Some(wrong) => counted.step_on_choices(examples, wrong)?,
    };
    Ok(StepBytes { held, peak: sizes.peak() })
}

/// The places of the `n` examples with most tokens, those of their wrong choices included.
pub fn longest(examples: &[Example], choices: Option<&Choices>, n: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..examples.len()).collect();
    let of = |example: &Example| example.input.len() + example.labels.len();
    let tokens = |place: &usize| {
        let wrong = choices.map_or(&[][..], |choices| &choices.wrong[*place]);
        of(&examples[*place]) + wrong.iter().map(of).sum::<usize>()
    };
    places.sort_by_key(|place| std::cmp::Reverse(tokens(place)));
    places.truncate(n);
    places
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        Dtype,
        formats::poly_config::PolyConfig,
        kernels::cpu::{Cpu, isa::Isa},
        model::Adapter,
    };

    /// What is counted is what the CPU takes, but for scratch and for buffers that are larger than what
    /// is in them.
    #[test]
    fn the_count_is_what_a_step_takes() {
        for name in ["tiny", "llama", "bart", "gpt2"] {
            let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity").join(name);
            for (checkpointing, with_choices) in [(false, false), (true, false), (false, true)] {
                // Scratch depends on the instruction set.
                let isa = Isa::available()[0];
                let cpu = Cpu::with_isa(isa, Dtype::F32, 1).unwrap();
                let model = Model::open_on(cpu.clone(), base.join("base")).unwrap();
                let config = PolyConfig { n_tasks: 2, n_skills: 2, r: 2, ..PolyConfig::default() };
                let adapter = Adapter::new(&model, &config, 1).unwrap();
                let config =
                    TrainConfig { checkpointing, batch_size: 24, ..TrainConfig::default() };
                let mut trainer = Trainer::new(&model, adapter, config).unwrap();
                let example = |task| Example {
                    input: (0..24).map(|i| 3 + i % 7).collect(),
                    labels: vec![5, 6, 1],
                    task,
                    mixing: None,
                };
                let examples: Vec<Example> = (0..24).map(|i| example(i % 2)).collect();
                let examples: Vec<&Example> = examples.iter().collect();
                // As many tokens again and more.
                let wrong = [Example { labels: vec![5; 12], ..example(0) }, example(1)];
                let wrong = vec![&wrong[..]; examples.len()];
                let wrong = with_choices.then_some(&wrong[..]);
                let StepBytes { held, peak: counted } =
                    step_bytes(&trainer, &examples, wrong).unwrap();
                // Parameters, gradients and two moments.
                let state = 4 * size_of::<f32>() * trainer.adapter().n_params();
                assert!((state as u64..counted).contains(&held), "{held} held, {state} of state");
                match wrong {
                    None => trainer.step(&examples).unwrap(),
                    Some(wrong) => trainer.step_on_choices(&examples, wrong).unwrap(),
                };
                let taken = cpu.peak_bytes() as u64;
                let ratio = taken as f64 / counted as f64;
                let what = format!("{name} {checkpointing} {with_choices}");
                println!("{what}: {counted} counted, {taken} taken, {ratio:.3}");
                assert!((0.9..1.6).contains(&ratio), "{what}: {ratio}");
            }
        }
    }

    #[test]
    fn the_longest_have_the_longest_choices() {
        let example = |n| Example { input: vec![3; n], labels: vec![1], task: 0, mixing: None };
        let examples = [4, 9, 2, 7].map(example);
        assert_eq!(longest(&examples, None, 2), [1, 3]);
        let wrong = vec![vec![], vec![], vec![example(5), example(6)], vec![example(1)]];
        assert_eq!(longest(&examples, Some(&Choices { wrong }), 3), [2, 1, 3]);
    }
}
