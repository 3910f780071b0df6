//! The routed LoRA: router, mixing, the thin products, and all their gradients.

use bytemuck::{NoUninit, Pod, Zeroable};

use super::{Cuda, narrow};
use crate::{
    dtype::Dtype,
    kernels::{Precision, ops::*},
    tensor::Tensor,
};

/// Tokens of a block (a warp each) and ranks of a lane in `cuda/shrink.cu` and `cuda/grad.cu`.
const TOKENS: usize = 8;
const RANKS: usize = 8;
/// Tokens and ranks of a block of `cuda/thin.cuh`.
const THIN_TOKENS: u32 = 16;
const THIN_RANKS: usize = 16;
/// Threads of a block of `thin_stacked`, and blocks of a tile.
const STACKED_THREADS: u32 = 512;
const STACKED_BLOCKS: usize = 8;
/// Elements of a block of `cuda/mix.cu`.
const MIXED: usize = 1024;
/// Features of a side of a tile of `d_pair`.
const OUTER: usize = 32;
/// Linears of one launch: `MAX_SIBLINGS` of `cuda/siblings.cuh`.
const MAX_SIBLINGS: usize = 4;

/// `Bank` of `cuda/bank.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct BankArg {
    a: u64,
    b: u64,
    weights: u64,
    n_splits: u32,
    n_skills: u32,
    d_in: u32,
    d_out: u32,
    rank: u32,
    padding: u32,
}

impl BankArg {
    pub(super) fn new(stacked: &Stacked<'_, Cuda>, n_rows: usize) -> Self {
        let Stacked { bank, params, weights } = stacked;
        let width = bank.n_splits * bank.n_skills;
        assert!(bank.a().end <= params.len() && bank.b().end <= params.len());
        assert!(
            bank.d_in.is_multiple_of(bank.n_splits) && bank.d_out.is_multiple_of(bank.n_splits)
        );
        assert!((bank.linear + 1) * n_rows <= weights.rows, "mixing weights of the bank's linear");
        let params = params.full(params.rows, params.cols);
        let weights = weights.full(weights.rows, width);
        Self {
            a: params + 4 * bank.a_start as u64,
            b: params + 4 * bank.b_start as u64,
            weights: weights + 4 * (bank.linear * n_rows * width) as u64,
            n_splits: narrow(bank.n_splits),
            n_skills: narrow(bank.n_skills),
            d_in: narrow(bank.d_in),
            d_out: narrow(bank.d_out),
            rank: narrow(bank.rank),
            padding: 0,
        }
    }

    /// Only the shape of a mixed B.
    pub(super) fn mixed(rank: usize, d_out: usize) -> Self {
        Self { rank: narrow(rank), d_out: narrow(d_out), ..Self::zeroed() }
    }
}

/// `Route` of `cuda/route.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RouteArg {
    params: u64,
    logits: u64,
    tasks: u64,
    examples: u64,
    draws: u64,
    key: [u32; 2],
    noise: u32,
    n_linears: u32,
    n_rows: u32,
    n_splits: u32,
    n_skills: u32,
    rounds: u32,
    /// 0: weights are normalised.
    factor: f32,
    padding: u32,
}

/// Calls `run` with the router's argument while what it points to lives.
fn with_route<R>(cuda: &Cuda, args: &Route<'_, Cuda>, run: impl FnOnce(RouteArg) -> R) -> R {
    let &Route { params, logits, tasks, n_splits, n_skills, noise, weighting } = args;
    let width = n_splits * n_skills;
    let last = tasks.iter().max().map_or(0, |&task| (task as usize + 1) * width);
    assert!(logits.iter().all(|start| start + last <= params.len()), "router logits lie in params");
    let logits_table = cuda.words(logits.iter().map(|&start| start as u64));
    let tasks_buffer = cuda.buffer_of(tasks);
    let n_draws = logits.len() * tasks.len() * width;
    let (number, key, examples, draws) = match noise {
        Noise::Off => (0, [0; 2], None, None),
        Noise::Philox { key, examples } => {
            assert_eq!(examples.len(), tasks.len());
            (1, key.words(), Some(cuda.buffer_of(examples)), None)
        }
        Noise::Given(draws) => {
            assert_eq!(draws.len(), n_draws);
            let draws: Vec<f32> = draws.iter().map(|&u| u as f32).collect();
            (2, [0; 2], None, Some(cuda.buffer_of(&draws)))
        }
    };
    run(RouteArg {
        params: params.full(params.rows, params.cols),
        logits: logits_table.address(),
        tasks: tasks_buffer.address(),
        examples: examples.as_ref().map_or(0, |buffer| buffer.address()),
        draws: draws.as_ref().map_or(0, |buffer| buffer.address()),
        key,
        noise: number,
        n_linears: narrow(logits.len()),
        n_rows: narrow(tasks.len()),
        n_splits: narrow(n_splits),
        n_skills: narrow(n_skills),
        rounds: u32::from(weighting.straight_through),
        factor: weighting.factor(n_splits, n_skills).map_or(0.0, |factor| factor as f32),
        padding: 0,
    })
}

pub(super) fn route(cuda: &Cuda, args: &Route<'_, Cuda>) -> Routing<Cuda> {
    let (rows, width) = (args.logits.len() * args.tasks.len(), args.n_splits * args.n_skills);
    let mut weights = cuda.alloc(rows, width, Precision::Full);
    let mut samples = cuda.alloc(rows, width, Precision::Full);
    with_route(cuda, args, |arg| {
        let kernel = cuda.kernel("route", "route").arg(weights.address_mut());
        let kernel = kernel.arg(samples.address_mut()).arg(arg);
        kernel.launch([(rows * args.n_splits).div_ceil(128), 1, 1], 128);
    });
    Routing { weights, samples }
}

/// Linears by the router that they share: where each router's linears start in the list that follows, one
/// past the last, and the list. Routers in order of their places.
///
/// # Panics
/// If routers of `len` logits overlap in part: their gradients would be added twice at a time.
fn by_router(logits: &[usize], len: usize) -> (Vec<u64>, usize) {
    let mut linears: Vec<usize> = (0..logits.len()).collect();
    linears.sort_by_key(|&linear| logits[linear]); // Stable: a router's linears stay in order.
    let routers: Vec<&[usize]> = linears.chunk_by(|&a, &b| logits[a] == logits[b]).collect();
    let start = |router: &[usize]| logits[router[0]];
    assert!(
        routers.windows(2).all(|pair| start(pair[0]) + len <= start(pair[1])),
        "routers are shared as a whole or not at all"
    );
    let ends = routers.iter().scan(0, |at, router| Some(std::mem::replace(at, *at + router.len())));
    let words = ends.chain([linears.len()]).chain(linears.iter().copied());
    (words.map(|word| word as u64).collect(), routers.len())
}

pub(super) fn route_backward(cuda: &Cuda, args: RouteBackward<'_, Cuda>) {
    let RouteBackward { forward, routing: Routing { weights, samples }, d_weights, grads } = args;
    let (n_linears, n_rows) = (forward.logits.len(), forward.tasks.len());
    let (rows, width) = (n_linears * n_rows, forward.n_splits * forward.n_skills);
    assert_eq!(grads.len(), forward.params.len());
    if rows == 0 {
        return;
    }
    let last = forward.tasks.iter().max().map_or(0, |&task| (task as usize + 1) * width);
    let (routers, n_routers) = by_router(forward.logits, last);
    let routers = cuda.words(routers.into_iter());
    let mut d_logits = cuda.alloc(rows, width, Precision::Full);
    with_route(cuda, forward, |arg| {
        let kernel = cuda.kernel("route", "route_backward").arg(d_logits.address_mut());
        let kernel = kernel.arg(d_weights.full(rows, width)).arg(weights.full(rows, width));
        let kernel = kernel.arg(samples.full(rows, width)).arg(arg);
        kernel.launch([(rows * forward.n_splits).div_ceil(128), 1, 1], 128);
        let kernel = cuda.kernel("route", "route_sum").arg(grads.address_mut());
        let kernel = kernel.arg(d_logits.address()).arg(routers.address()).count(n_routers);
        kernel.arg(arg).launch([(n_routers * n_rows * width).div_ceil(128), 1, 1], 128);
    });
}

/// `MixedPair` of `cuda/siblings.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MixedPairArg {
    a: u64,
    b: u64,
    bank: BankArg,
}

pub(super) fn mix(cuda: &Cuda, args: &[Mix<'_, Cuda>]) -> Vec<MixedPair<Cuda>> {
    let mut all = Vec::with_capacity(args.len());
    for siblings in args.chunks(MAX_SIBLINGS) {
        let n_rows = siblings[0].n_rows;
        let mut pairs = [MixedPairArg::zeroed(); MAX_SIBLINGS];
        let mut elements = 0;
        for (Mix { stacked, n_rows: own_rows }, pair) in siblings.iter().zip(&mut pairs) {
            assert_eq!(*own_rows, n_rows, "siblings have the same routing rows");
            let Bank { d_in, d_out, rank, .. } = stacked.bank;
            let mut a = cuda.alloc(n_rows * d_in, rank, Precision::Full);
            let mut b = cuda.alloc(n_rows * rank, d_out, Precision::Full);
            let bank = BankArg::new(stacked, n_rows);
            *pair = MixedPairArg { a: a.address_mut(), b: b.address_mut(), bank };
            elements = elements.max((d_in + d_out) * rank);
            all.push(MixedPair { a, b });
        }
        let kernel = cuda.kernel("mix", "mix").arg(pairs);
        kernel.launch([elements.div_ceil(MIXED), n_rows, siblings.len()], 256);
    }
    all
}

/// `Unmixed` of `cuda/siblings.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct UnmixedArg {
    d_a: u64,
    d_b: u64,
    d_weights: u64,
    d_mixed_a: u64,
    d_mixed_b: u64,
    bank: BankArg,
}

pub(super) fn unmix(cuda: &Cuda, args: UnmixEach<'_, Cuda>) {
    let UnmixEach { terms, grads, d_weights } = args;
    for (i, term) in terms.iter().enumerate() {
        let other =
            |other: &UnmixTerm<'_, Cuda>| other.stacked.bank.linear != term.stacked.bank.linear;
        assert!(
            terms[..i].iter().all(other),
            "each linear once: blocks of one launch add to its gradients"
        );
    }
    let grads_address = grads.address_mut();
    for siblings in terms.chunks(MAX_SIBLINGS) {
        let n_rows = siblings[0].d_a.rows / siblings[0].stacked.bank.d_in;
        let mut all = [UnmixedArg::zeroed(); MAX_SIBLINGS];
        let mut blocks = 0;
        for (UnmixTerm { stacked, d_a, d_b }, one) in siblings.iter().zip(&mut all) {
            let bank = stacked.bank;
            let width = bank.n_splits * bank.n_skills;
            assert_eq!(grads.len(), stacked.params.len());
            d_weights.assert_shape(stacked.weights.rows, stacked.weights.cols);
            *one = UnmixedArg {
                d_a: grads_address + 4 * bank.a_start as u64,
                d_b: grads_address + 4 * bank.b_start as u64,
                d_weights: d_weights.address_mut() + 4 * (bank.linear * n_rows * width) as u64,
                d_mixed_a: d_a.full(n_rows * bank.d_in, bank.rank),
                d_mixed_b: d_b.full(n_rows * bank.rank, bank.d_out),
                bank: BankArg::new(stacked, n_rows),
            };
            let elements = bank.a_len() + bank.b_len();
            blocks = blocks.max(n_rows * width + elements.div_ceil(MIXED));
        }
        let kernel = cuda.kernel("mix", "unmix").arg(all).count(n_rows);
        kernel.launch([blocks, siblings.len(), 1], 256);
    }
}

/// Blocks of a kernel with a warp a token.
fn token_grid(tokens: usize, rank: usize) -> [usize; 3] {
    [tokens.div_ceil(TOKENS), rank.div_ceil(RANKS), 1]
}

/// `ThinProduct` of `cuda/siblings.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ThinProductArg {
    z: u64,
    lhs: u64,
    right: u64,
    depth: u32,
    padding: u32,
}

/// Products with a matrix of `rank` columns for each routing row: `z = scale * lhs·right[row]`.
struct Thin<'a> {
    /// The kernel's module, its name in f32 and in bf16.
    kernel: [&'static str; 3],
    rank: usize,
    segments: &'a Segments,
    scale: f32,
}

impl Thin<'_> {
    /// Of each `lhs` `[tokens, depth]` with its `right`, `[rows, depth, rank]`, or transposed as the
    /// kernel has it.
    fn run(self, cuda: &Cuda, operands: &[(&Tensor<Cuda>, u64)]) -> Vec<Tensor<Cuda>> {
        let Self { kernel: [module, plain, tiled], rank, segments, scale } = self;
        let tokens = segments.n_tokens();
        let mut all = Vec::with_capacity(operands.len());
        for siblings in operands.chunks(MAX_SIBLINGS) {
            let mut products = [ThinProductArg::zeroed(); MAX_SIBLINGS];
            for (&(lhs, right), product) in siblings.iter().zip(&mut products) {
                let mut z = cuda.alloc(tokens, rank, Precision::Full);
                let (depth, lhs) = (narrow(lhs.cols), lhs.activation(cuda, tokens, lhs.cols));
                *product = ThinProductArg { z: z.address_mut(), lhs, right, depth, padding: 0 };
                all.push(z);
            }
            if cuda.compute == Dtype::Bf16 {
                let (tiles, n_tiles) = cuda.run_tiles(segments, THIN_TOKENS);
                let kernel = cuda.kernel(module, tiled).arg(products).arg(tiles.address());
                let grid = [n_tiles, rank.div_ceil(THIN_RANKS), siblings.len()];
                kernel.count(rank).arg(scale).launch(grid, 256);
            } else {
                let token_rows = cuda.token_rows(segments);
                let kernel = cuda.kernel(module, plain).arg(products).arg(token_rows.address());
                let [x, y, _] = token_grid(tokens, rank);
                let kernel = kernel.count(tokens).count(rank).arg(scale);
                kernel.launch([x, y, siblings.len()], 32 * TOKENS as u32);
            }
        }
        all
    }
}

pub(super) fn shrink(cuda: &Cuda, args: Shrink<'_, Cuda>) -> Vec<Tensor<Cuda>> {
    let Shrink { x, mixed_a, segments, scale, order: _ } = args;
    assert_eq!(segments.n_tokens(), x.rows);
    let Some(rank) = mixed_a.first().map(|mixed_a| mixed_a.cols) else { return Vec::new() };
    let right = |mixed_a: &&Tensor<Cuda>| mixed_a.full(segments.n_rows() * x.cols, rank);
    let operands: Vec<_> = mixed_a.iter().map(|mixed_a| (x, right(mixed_a))).collect();
    let kernel = ["shrink", "shrink", "shrink_tiles"];
    Thin { kernel, rank, segments, scale }.run(cuda, &operands)
}

pub(super) fn shrink_stacked(cuda: &Cuda, args: ShrinkStacked<'_, Cuda>) -> Tensor<Cuda> {
    let ShrinkStacked { x, stacked, segments, scale } = args;
    let (tokens, rank) = (x.rows, stacked.bank.rank);
    assert_eq!(segments.n_tokens(), tokens);
    let token_rows = cuda.token_rows(segments);
    let mut z = cuda.alloc(tokens, rank, Precision::Full);
    let x = x.activation(cuda, tokens, stacked.bank.d_in);
    let bank = BankArg::new(&stacked, segments.n_rows());
    // Which of the two depends on the bank's shape alone: no bits change with how many tokens there are.
    let width = stacked.bank.d_in / stacked.bank.n_splits;
    let tiles = cuda.compute == Dtype::Bf16 && width.is_multiple_of(8);
    let name = if tiles { "shrink_stacked_tiles" } else { "shrink_stacked" };
    let kernel = cuda.kernel("shrink", name).arg(z.address_mut()).arg(x);
    let kernel = kernel.arg(token_rows.address()).arg(bank);
    if !tiles {
        let grid = token_grid(tokens, rank);
        kernel.count(tokens).arg(scale).launch(grid, 32 * TOKENS as u32);
        return z;
    }
    let grid = [tokens.div_ceil(THIN_TOKENS as usize), rank.div_ceil(THIN_RANKS), STACKED_BLOCKS];
    let (n_tiles, sums) = (grid[0] * grid[1], THIN_TOKENS as usize * THIN_RANKS);
    let mut partials = cuda.alloc(n_tiles * STACKED_BLOCKS, sums, Precision::Full);
    let done = cuda.counters(n_tiles);
    let kernel = kernel.arg(partials.address_mut()).arg(done.address());
    kernel.count(tokens).arg(scale).launch(grid, STACKED_THREADS);
    z
}

/// `PairGradient` of `cuda/siblings.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PairGradientArg {
    d_a: u64,
    d_b: u64,
    d_y: u64,
    z: u64,
    d_z: u64,
    d_out: u32,
    padding: u32,
}

pub(super) fn lora_backward(cuda: &Cuda, args: LoraBackward<'_, Cuda>) -> Vec<LoraGradients<Cuda>> {
    let LoraBackward { x, terms, segments, scale } = args;
    let (tokens, d_in, n_rows) = (x.rows, x.cols, segments.n_rows());
    assert_eq!(segments.n_tokens(), tokens);
    let Some(rank) = terms.first().map(|term| term.z.cols) else { return Vec::new() };
    let right = |term: &LoraTerm<'_, Cuda>| term.mixed_b.full(n_rows * rank, term.d_y.cols);
    let operands: Vec<_> = terms.iter().map(|term| (term.d_y, right(term))).collect();
    let kernel = ["grad", "d_z", "d_z_tiles"];
    let d_z = Thin { kernel, rank, segments, scale }.run(cuda, &operands);

    // The kernel, and how many features and ranks a block has.
    let (name, features, ranks) = match cuda.compute {
        Dtype::Bf16 => ("d_pair_tiles", 128, THIN_RANKS),
        _ => ("d_pair", OUTER, OUTER),
    };
    let runs = cuda.row_runs(segments);
    let mut all: Vec<LoraGradients<Cuda>> = Vec::with_capacity(terms.len());
    let mut d_z = d_z.into_iter();
    for siblings in terms.chunks(MAX_SIBLINGS) {
        let mut pairs = [PairGradientArg::zeroed(); MAX_SIBLINGS];
        let mut widest = 0;
        for ((term, d_z), pair) in siblings.iter().zip(&mut d_z).zip(&mut pairs) {
            let d_out = term.d_y.cols;
            let mut d_a = cuda.alloc(n_rows * d_in, rank, Precision::Full);
            let mut d_b = cuda.alloc(n_rows * rank, d_out, Precision::Full);
            *pair = PairGradientArg {
                d_a: d_a.address_mut(),
                d_b: d_b.address_mut(),
                d_y: term.d_y.activation(cuda, tokens, d_out),
                z: term.z.full(tokens, rank),
                d_z: d_z.address(),
                d_out: narrow(d_out),
                padding: 0,
            };
            widest = widest.max(d_out);
            all.push(LoraGradients { d_z, d_a, d_b });
        }
        let kernel = cuda.kernel("grad", name).arg(pairs).arg(x.activation(cuda, tokens, d_in));
        let kernel = kernel.arg(runs.row_segments()).arg(runs.row_runs()).count(d_in).count(rank);
        let blocks = d_in.div_ceil(features) + widest.div_ceil(features);
        let grid = [blocks, rank.div_ceil(ranks), siblings.len() * n_rows];
        kernel.count(n_rows).launch(grid, 256);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::by_router;

    #[test]
    fn linears_that_share_a_router_stand_together() {
        assert_eq!(by_router(&[7, 20, 7, 7], 5), (vec![0, 3, 4, 0, 2, 3, 1], 2));
        assert_eq!(by_router(&[30, 20, 10], 10), (vec![0, 1, 2, 3, 2, 1, 0], 3));
        assert_eq!(by_router(&[], 3), (vec![0], 0));
    }

    #[test]
    #[should_panic(expected = "shared as a whole")]
    fn routers_do_not_overlap_in_part() {
        by_router(&[0, 4], 5);
    }
}
