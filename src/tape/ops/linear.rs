//! Frozen linears, with the routed LoRA where they are adapted:
//! `y = residual + dropout(x·Wᵀ + bias + (1/r) x·Â·B̂)`.
//!
//! Siblings (q, k, v; gate and up) are one operation, so that their input is read, packed and saved
//! once. Saved: nothing for a frozen linear; for an adapted one `x` (computed again where that is
//! cheap) and `z = x·Â / r`, `[tokens, r]`. The mixed pairs are not saved, as mixing again costs
//! `S/tokens` of using them; but where an operation is a launch, whose cost is that of the launch, they are, as long
//! as they are small ([`keeps_pair`]).

use std::sync::Arc;

use crate::{
    kernels::{
        Backend, Precision,
        ops::{
            Bank, Dropout, Expand, ExpandRhs, Linear, LinearBackward, LinearBackwardTerm,
            LoraBackward, LoraGradients, LoraTerm, Mix, MixedPair, Projection, Segments, Shrink,
            ShrinkStacked, Stacked, UnmixEach, UnmixTerm,
        },
        planner::Mode,
    },
    tape::{Adapted, Gradients, Operation, Pass, Saved, Tape, Var},
    tensor::Tensor,
};

/// A linear of the base.
pub struct FrozenLinear<B: Backend> {
    /// `[d_out, d_in]`.
    pub weight: B::Weight,
    /// `[1, d_out]`.
    pub bias: Option<B::Weight>,
    /// Its number among the base's linears, by which an adapter finds it.
    pub index: usize,
}

/// What comes after a linear.
pub struct LinearSpec<'a, B: Backend> {
    /// Added at the end.
    pub residual: Option<&'a Var<B>>,
    /// Before the residual.
    pub dropout: Option<Dropout>,
    /// Full precision for logits.
    pub full_precision: bool,
}

impl<'a, B: Backend> LinearSpec<'a, B> {
    /// A residual and nothing else.
    pub fn onto(residual: &'a Var<B>) -> Self {
        Self { residual: Some(residual), dropout: None, full_precision: false }
    }
}

struct LinearNode<'m, B: Backend> {
    linears: Vec<&'m FrozenLinear<B>>,
    /// Where any of the linears is adapted.
    x: Option<Saved<B>>,
    x_id: Option<usize>,
    /// By linear: its rank-space activation.
    z: Vec<Option<Tensor<B>>>,
    /// By linear, where they are kept.
    pairs: Vec<Option<MixedPair<B>>>,
    segments: Option<Arc<Segments>>,
    dropout: Option<Dropout>,
    residual_id: Option<usize>,
    y_ids: Vec<Option<usize>>,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// One linear: `[tokens, d_out]`.
    pub fn linear(
        &mut self,
        x: &Var<B>,
        linear: &'m FrozenLinear<B>,
        segments: &Arc<Segments>,
        spec: LinearSpec<'_, B>,
    ) -> Var<B> {
        let mut outputs = self.apply(x, vec![linear], segments, spec);
        outputs.pop().expect("one output for one linear")
    }

    /// Siblings that share `x`: each `[tokens, d_out]`.
    pub fn linears<const N: usize>(
        &mut self,
        x: &Var<B>,
        linears: [&'m FrozenLinear<B>; N],
        segments: &Arc<Segments>,
    ) -> [Var<B>; N] {
        let spec = LinearSpec { residual: None, dropout: None, full_precision: false };
        let outputs = self.apply(x, linears.to_vec(), segments, spec);
        outputs.try_into().unwrap_or_else(|_| unreachable!("an output for each linear"))
    }

    fn apply(
        &mut self,
        x: &Var<B>,
        linears: Vec<&'m FrozenLinear<B>>,
        segments: &Arc<Segments>,
        spec: LinearSpec<'_, B>,
    ) -> Vec<Var<B>> {
        let LinearSpec { residual, dropout, full_precision } = spec;
        let banks: Vec<Option<Bank>> = match self.adapted {
            Some(adapted) => linears.iter().map(|linear| adapted.banks[linear.index]).collect(),
            None => vec![None; linears.len()],
        };
        let output = if full_precision { Precision::Full } else { Precision::Activation };
        let lora = self.adapted.and_then(|adapted| self.shrink(x, adapted, &banks, segments));
        let projections: Vec<Projection<'_, B>> = linears
            .iter()
            .zip(&banks)
            .enumerate()
            .map(|(i, (linear, bank))| Projection {
                weight: &linear.weight,
                bias: linear.bias.as_ref(),
                lora: lora.as_ref().zip(*bank).and_then(|(lora, bank)| {
                    let z = lora.z[i].as_ref()?;
                    Some(Expand { z, segments, rhs: lora.rhs(i, bank) })
                }),
                dropout: dropout.as_ref(),
                residual: residual.map(Var::tensor),
            })
            .collect();
        let outputs = self.backend.linear(Linear {
            x: x.tensor(),
            projections: &projections,
            order: self.order,
            output,
        });
        drop(projections);

        let inputs_need = x.id().is_some() || residual.is_some_and(|r| r.id().is_some());
        let y_ids: Vec<_> =
            banks.iter().map(|bank| self.new_id(inputs_need || bank.is_some())).collect();
        let outputs: Vec<_> = outputs
            .into_iter()
            .zip(&y_ids)
            .map(|(tensor, &id)| Var { tensor, id, again: None })
            .collect();
        if y_ids.iter().any(Option::is_some) {
            let is_adapted = lora.is_some();
            let (z, mut pairs) = lora.map_or_else(Default::default, |lora| (lora.z, lora.pairs));
            // All of them or none: mixing again is one launch for all.
            let n_rows = self.adapted.map_or(0, |adapted| adapted.mixture.n_rows);
            let mut adapted = banks.iter().flatten();
            let are_kept = self.backend.is_queued()
                && adapted.all(|bank| keeps_pair(bank, n_rows, segments.n_tokens()));
            if !are_kept {
                pairs.clear();
            }
            self.push(LinearNode {
                linears,
                x: is_adapted.then(|| x.save()),
                x_id: x.id(),
                segments: is_adapted.then(|| Arc::clone(segments)),
                z,
                pairs,
                dropout,
                residual_id: residual.and_then(Var::id),
                y_ids,
            });
        }
        outputs
    }

    /// The first half of the routed LoRA for those of the siblings that are adapted.
    fn shrink(
        &self,
        x: &Var<B>,
        adapted: Adapted<'m, B>,
        banks: &[Option<Bank>],
        segments: &Segments,
    ) -> Option<Lora<'m, B>> {
        let &Bank { rank, n_skills, .. } = banks.iter().flatten().next()?;
        let scale = 1.0 / rank as f32;
        let mut lora = Lora { adapted, pairs: Vec::new(), z: Vec::new() };
        let mode = adapted.mode.unwrap_or_else(|| {
            Mode::for_tokens(segments.n_tokens(), adapted.mixture.n_rows, n_skills)
        });
        if mode == Mode::Stacked {
            for bank in banks {
                lora.pairs.push(None);
                lora.z.push(bank.map(|bank| {
                    self.backend.shrink_stacked(ShrinkStacked {
                        x: x.tensor(),
                        stacked: adapted.stacked(bank),
                        segments,
                        scale,
                    })
                }));
            }
            return Some(lora);
        }
        let adapted_banks: Vec<Bank> = banks.iter().copied().flatten().collect();
        let mut pairs = adapted.pairs(self.backend, &adapted_banks).into_iter();
        lora.pairs = banks.iter().map(|bank| bank.and_then(|_| pairs.next())).collect();
        let mixed_a: Vec<_> = lora.pairs.iter().flatten().map(|pair| &pair.a).collect();
        let mut z = self
            .backend
            .shrink(Shrink { x: x.tensor(), mixed_a: &mixed_a, segments, scale, order: self.order })
            .into_iter();
        lora.z = banks.iter().map(|bank| bank.and_then(|_| z.next())).collect();
        Some(lora)
    }
}

/// Whether the mixed pairs of a linear are small: 2 MiB at most, or an eighth of its input and output in f32.
fn keeps_pair(bank: &Bank, n_rows: usize, n_tokens: usize) -> bool {
    const SMALL: usize = 2 << 20;
    let Bank { d_in, d_out, rank, .. } = *bank;
    let bytes = |rows: usize| rows * (d_in + d_out) * size_of::<f32>();
    bytes(n_rows * rank) <= SMALL.max(bytes(n_tokens) / 8)
}

/// The routed LoRA of a sibling group between its two halves.
struct Lora<'m, B: Backend> {
    adapted: Adapted<'m, B>,
    /// By linear; none in stacked mode.
    pairs: Vec<Option<MixedPair<B>>>,
    /// By linear, `[tokens, rank]`.
    z: Vec<Option<Tensor<B>>>,
}

impl<B: Backend> Lora<'_, B> {
    fn rhs(&self, i: usize, bank: Bank) -> ExpandRhs<'_, B> {
        match &self.pairs[i] {
            Some(pair) => ExpandRhs::Mixed(&pair.b),
            None => ExpandRhs::Stacked(self.adapted.stacked(bank)),
        }
    }
}

impl<'m, B: Backend> Adapted<'m, B> {
    fn stacked(&self, bank: Bank) -> Stacked<'m, B> {
        Stacked { bank, params: self.params, weights: &self.mixture.routing.weights }
    }

    /// Each bank's mixed pairs: kept ones, or mixed now.
    fn pairs(&self, backend: &B, banks: &[Bank]) -> Vec<MixedPair<B>> {
        if let Some(pairs) = &self.mixture.pairs {
            return banks.iter().map(|bank| pairs[bank.linear].clone()).collect();
        }
        let mix = |&bank| Mix { stacked: self.stacked(bank), n_rows: self.mixture.n_rows };
        backend.mix_each(&banks.iter().map(mix).collect::<Vec<_>>())
    }
}

impl<'m, B: Backend> Operation<'m, B> for LinearNode<'m, B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let backend = pass.backend;
        // The siblings whose outputs were used.
        let mut used = Vec::new();
        for (i, (linear, &y_id)) in self.linears.iter().zip(&self.y_ids).enumerate() {
            let Some(mut d_y) = pass.take(y_id) else { continue };
            if self.residual_id.is_some() {
                pass.give(self.residual_id, d_y.clone());
            }
            if let Some(dropout) = &self.dropout {
                d_y = backend.dropout(&d_y, dropout);
            }
            used.push(Sibling {
                linear,
                d_y,
                z: self.z.get(i).and_then(Option::as_ref),
                pair: self.pairs.get(i).and_then(Option::as_ref),
                lora: None,
            });
        }
        if let (Some(saved), Some(segments), Some(adapted)) =
            (&self.x, &self.segments, pass.adapted)
        {
            self.lora_backward(pass, adapted, saved, segments, &mut used);
        }
        if self.x_id.is_none() || used.is_empty() {
            return;
        }
        let terms: Vec<_> = used
            .iter()
            .map(|sibling| LinearBackwardTerm {
                d_y: &sibling.d_y,
                weight: &sibling.linear.weight,
                lora: sibling
                    .lora
                    .as_ref()
                    .zip(self.segments.as_ref())
                    .map(|((d_z, mixed_a), segments)| (d_z, mixed_a, segments.as_ref())),
            })
            .collect();
        let d_residual = pass.take(self.x_id);
        let d_x = backend.linear_backward(LinearBackward { terms: &terms, d_residual });
        pass.give(self.x_id, d_x);
    }
}

/// One output of the operation during its backward.
struct Sibling<'a, B: Backend> {
    linear: &'a FrozenLinear<B>,
    d_y: Tensor<B>,
    z: Option<&'a Tensor<B>>,
    /// If it was kept.
    pair: Option<&'a MixedPair<B>>,
    /// `d_z` and the mixed `Â`, once known.
    lora: Option<(Tensor<B>, Tensor<B>)>,
}

impl<'m, B: Backend> LinearNode<'m, B> {
    /// Gradients of bank and mixing weights, and `d_z`, of the adapted siblings.
    fn lora_backward(
        &self,
        pass: &mut Pass<'_, '_, B>,
        adapted: Adapted<'m, B>,
        saved: &Saved<B>,
        segments: &Segments,
        used: &mut [Sibling<'_, B>],
    ) {
        let backend = pass.backend;
        let mut routed: Vec<_> = used
            .iter_mut()
            .filter_map(|sibling| {
                let bank = adapted.banks[sibling.linear.index]?;
                let z = sibling.z?;
                Some((sibling, bank, z))
            })
            .collect();
        let banks: Vec<Bank> = routed.iter().map(|&(_, bank, _)| bank).collect();
        let Some(rank) = banks.first().map(|bank| bank.rank) else { return };
        let kept: Option<Vec<_>> = routed.iter().map(|(s, ..)| s.pair.cloned()).collect();
        let pairs = kept.unwrap_or_else(|| adapted.pairs(backend, &banks));
        let x = pass.value(saved);
        let terms: Vec<_> = routed
            .iter()
            .zip(&pairs)
            .map(|((sibling, _, z), pair)| LoraTerm { z, d_y: &sibling.d_y, mixed_b: &pair.b })
            .collect();
        let scale = 1.0 / rank as f32;
        let gradients =
            backend.lora_backward(LoraBackward { x: &x, terms: &terms, segments, scale });
        drop(terms);
        let terms: Vec<_> = banks
            .iter()
            .zip(&gradients)
            .map(|(&bank, LoraGradients { d_a, d_b, .. })| UnmixTerm {
                stacked: adapted.stacked(bank),
                d_a,
                d_b,
            })
            .collect();
        let Gradients { params: grads, weights: d_weights } = &mut *pass.gradients;
        backend.unmix_each(UnmixEach { terms: &terms, grads, d_weights });
        for (((sibling, ..), gradient), pair) in routed.iter_mut().zip(gradients).zip(pairs) {
            sibling.lora = Some((gradient.d_z, pair.a));
        }
    }
}
