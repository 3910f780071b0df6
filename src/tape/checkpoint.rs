//! Activation checkpointing: a block keeps its inputs only, and runs again in the backward.
//!
//! Everything random is counter-based and the mixing weights of the step are kept outside, so the
//! second run computes the same bits, and so do the gradients.

use super::{Operation, Pass, Tape, Var};
use crate::kernels::Backend;

struct CheckpointNode<F, B: Backend> {
    block: F,
    inputs: Vec<Var<B>>,
    output_id: Option<usize>,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// Runs `block` on `inputs`. With `keep` it is recorded as usual; without, only its inputs are
    /// kept and its operations are recorded when the backward reaches it.
    pub fn checkpoint(
        &mut self,
        inputs: &[&Var<B>],
        keep: bool,
        block: impl Fn(&mut Tape<'m, B>, &[Var<B>]) -> Var<B> + Send + 'm,
    ) -> Var<B> {
        let inputs: Vec<Var<B>> = inputs
            .iter()
            .map(|&var| Var { tensor: var.tensor.clone(), id: var.id, again: None })
            .collect();
        if keep || !self.recording {
            return block(self, &inputs);
        }
        self.recording = false;
        let output = block(self, &inputs);
        self.recording = true;
        // Whether the block holds an adapter is not known here; assuming so costs nothing but a
        // second run of blocks below the lowest adapter.
        let needed = self.adapted.is_some() || inputs.iter().any(|var| var.id.is_some());
        let output_id = self.new_id(needed);
        if output_id.is_some() {
            self.push(CheckpointNode { block, inputs, output_id });
        }
        Var { tensor: output.tensor, id: output_id, again: None }
    }
}

impl<'m, B, F> Operation<'m, B> for CheckpointNode<F, B>
where
    B: Backend,
    F: Fn(&mut Tape<'m, B>, &[Var<B>]) -> Var<B> + Send,
{
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_output) = pass.take(self.output_id) else { return };
        let mut tape = Tape::recording(pass.backend, pass.adapted);
        // The inputs' gradients so far go along, so that sums form in the order of a plain run.
        let mut seeds = Vec::new();
        let inputs: Vec<_> = self
            .inputs
            .iter()
            .map(|input| {
                let Some(outer) = input.id else { return input.clone() };
                let inner = tape.watched(input.tensor.clone());
                seeds.extend(inner.id.zip(pass.grads[outer].take()));
                inner
            })
            .collect();
        let output = (self.block)(&mut tape, &inputs);
        let Some(id) = output.id else { return };
        seeds.push((id, d_output));
        drop(output);
        let mut grads = tape.backward(seeds, pass.gradients);
        for (outer, inner) in self.inputs.iter().zip(&inputs) {
            if let (Some(outer), Some(inner)) = (outer.id, inner.id) {
                pass.grads[outer] = grads[inner].take();
            }
        }
    }
}
