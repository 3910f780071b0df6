//! The tape: reverse mode over whole-matrix operations of a transformer.
//!
//! An operation runs when it is called and leaves behind a record of what its backward needs.
//! [`Tape::backward`] walks the records from the last to the first. There are a dozen operations,
//! each in its own file under [`ops`] with its forward, its saved values and its backward side by
//! side; there is no tensor library underneath.
//!
//! ```text
//! x ─ norm ─┬─ routed linears q,k,v ─ attention ─ linear o ─(+ x)─ norm ─ routed linears ─ gated ─ linear ─(+)
//!           └ not kept: computed again from x and 1/rms when the backward wants it
//! ```
//!
//! Only the adapter learns. So the only things that are saved are what `dx` and the adapter's
//! gradients need: a frozen linear saves nothing, siblings that share an input save it once, and an
//! input that is cheap to compute again (`Saved::Again`) is not saved at all. A value below the
//! lowest adapter has no [`Var::id`] and costs no backward.
//!
//! Gradients: `grads[id]` starts empty. The first contribution is stored as it is (a shared handle,
//! no copy); a later one is added, where possible inside the kernel that computes it.

mod checkpoint;
pub mod ops;

use crate::{
    kernels::{
        Backend,
        ops::{Bank, MixedPair, Order, Routing},
        planner::Mode,
    },
    tensor::Tensor,
};

/// A value on the tape.
pub struct Var<B: Backend> {
    tensor: Tensor<B>,
    id: Option<usize>,
    again: Option<usize>,
}

impl<B: Backend> Var<B> {
    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor<B>) -> Self {
        Self { tensor, id: None, again: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor<B> {
        &self.tensor
    }

    /// Where its gradient will be, if it needs one.
    pub fn id(&self) -> Option<usize> {
        self.id
    }

    /// What an operation keeps of it for its backward.
    fn save(&self) -> Saved<B> {
        match self.again {
            Some(node) => Saved::Again(node),
            None => Saved::Kept(self.tensor.clone()),
        }
    }
}

impl<B: Backend> Clone for Var<B> {
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.clone(), id: self.id, again: self.again }
    }
}

/// A value that a backward needs.
enum Saved<B: Backend> {
    /// Kept.
    Kept(Tensor<B>),
    /// Computed again by the record that made it: the same bits.
    Again(usize),
}

/// A record: what one operation's backward needs.
trait Operation<'m, B: Backend>: Send {
    /// Takes the gradients of the outputs and gives those of the inputs.
    fn backward(&self, pass: &mut Pass<'_, 'm, B>);

    /// The output again. Only for operations whose outputs carry [`Var::again`].
    fn again(&self, _backend: &B) -> Tensor<B> {
        unreachable!("only norms and activations are computed again")
    }
}

/// The adapter as the tape sees it during one pass: parameters, banks and one mixture.
pub struct Adapted<'m, B: Backend> {
    /// All parameters, flat.
    pub params: &'m Tensor<B>,
    /// By the number of the base's linear: its bank, where it is adapted.
    pub banks: &'m [Option<Bank>],
    /// The mixing weights, and the mixed pairs where they are kept.
    pub mixture: &'m Mixture<B>,
    /// How the routed LoRA runs; none: the cheaper way for each use.
    pub mode: Option<Mode>,
}

impl<B: Backend> Clone for Adapted<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Adapted<'_, B> {}

/// The mixing weights of some routing rows in every adapted linear.
pub struct Mixture<B: Backend> {
    /// Weights and samples, `[n_linears * n_rows, n_splits * n_skills]`.
    pub routing: Routing<B>,
    /// Routing rows.
    pub n_rows: usize,
    /// By bank: the mixed pairs, kept for an engine that uses them again and again.
    pub pairs: Option<Vec<MixedPair<B>>>,
}

/// Where a backward leaves the adapter's gradients.
pub struct Gradients<B: Backend> {
    /// Of the parameters, flat; added to.
    pub params: Tensor<B>,
    /// Of the mixing weights, `[n_linears * n_rows, n_splits * n_skills]`; added to.
    pub weights: Tensor<B>,
}

/// Records operations and runs them backwards.
pub struct Tape<'m, B: Backend> {
    backend: &'m B,
    adapted: Option<Adapted<'m, B>>,
    order: Order,
    recording: bool,
    loss_shape: Option<ops::LossShape<'m>>,
    nodes: Vec<Box<dyn Operation<'m, B> + 'm>>,
    n_vars: usize,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// A tape that records, for training.
    pub fn recording(backend: &'m B, adapted: Option<Adapted<'m, B>>) -> Self {
        Self { recording: true, ..Self::inference(backend, adapted, Order::Panel) }
    }

    /// A tape that records nothing, for evaluation and generation.
    pub fn inference(backend: &'m B, adapted: Option<Adapted<'m, B>>, order: Order) -> Self {
        Self {
            backend,
            adapted,
            order,
            recording: false,
            loss_shape: None,
            nodes: Vec::new(),
            n_vars: 0,
        }
    }

    /// The backend that computes.
    pub fn backend(&self) -> &'m B {
        self.backend
    }

    /// A value whose gradient is wanted.
    pub fn watched(&mut self, tensor: Tensor<B>) -> Var<B> {
        let id = self.new_id(true);
        Var { tensor, id, again: None }
    }

    /// A gradient's place for an output, where one is needed.
    fn new_id(&mut self, needed: bool) -> Option<usize> {
        (needed && self.recording).then(|| {
            self.n_vars += 1;
            self.n_vars - 1
        })
    }

    /// Keeps a record.
    fn push(&mut self, node: impl Operation<'m, B> + 'm) -> usize {
        self.nodes.push(Box::new(node));
        self.nodes.len() - 1
    }

    /// Runs every record backwards. `seeds` are gradients that come from outside; an operation that
    /// knows its own (the loss) needs none. Returns the gradients that nobody took: those of
    /// watched values, by [`Var::id`].
    pub fn backward(
        mut self,
        seeds: Vec<(usize, Tensor<B>)>,
        gradients: &mut Gradients<B>,
    ) -> Vec<Option<Tensor<B>>> {
        let mut grads: Vec<Option<Tensor<B>>> = (0..self.n_vars).map(|_| None).collect();
        for (id, seed) in seeds {
            grads[id] = Some(seed);
        }
        while let Some(node) = self.nodes.pop() {
            let mut pass = Pass {
                backend: self.backend,
                adapted: self.adapted,
                earlier: &self.nodes,
                grads,
                gradients: &mut *gradients,
            };
            node.backward(&mut pass);
            grads = pass.grads;
        }
        grads
    }
}

/// What a record's backward works with.
struct Pass<'a, 'm, B: Backend> {
    backend: &'m B,
    adapted: Option<Adapted<'m, B>>,
    earlier: &'a [Box<dyn Operation<'m, B> + 'm>],
    grads: Vec<Option<Tensor<B>>>,
    gradients: &'a mut Gradients<B>,
}

impl<B: Backend> Pass<'_, '_, B> {
    /// The gradient of an output, which nobody needs any more.
    fn take(&mut self, id: Option<usize>) -> Option<Tensor<B>> {
        self.grads[id?].take()
    }

    /// Adds to the gradient of an input.
    fn give(&mut self, id: Option<usize>, grad: Tensor<B>) {
        let Some(id) = id else { return };
        let sum = match self.grads[id].take() {
            Some(before) => self.backend.add(before, &grad),
            None => grad,
        };
        self.grads[id] = Some(sum);
    }

    /// A saved value.
    fn value(&self, saved: &Saved<B>) -> Tensor<B> {
        match saved {
            Saved::Kept(tensor) => tensor.clone(),
            Saved::Again(node) => self.earlier[*node].again(self.backend),
        }
    }
}
