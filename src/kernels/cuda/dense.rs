//! Embedding, norm, linears, gated products, element-wise operations and the head.

use std::sync::Arc;

use bytemuck::{NoUninit, Pod, Zeroable};

use super::{
    Buffer, Chosen, Cuda, Weight,
    gemm::{self, GEMM_THREADS, MMA_TILE, SCALAR_TILE},
    lora::BankArg,
    narrow,
    tables::{DropoutArg, DropoutTable},
};
use crate::{
    dtype::Dtype,
    kernels::{Precision, ops::*},
    tensor::Tensor,
};

/// Siblings that `linear_backward` takes in one launch.
pub(super) const MAX_TERMS: usize = 4;
/// Logits that exist at a time.
const HEAD_BYTES: usize = 256 << 20;

pub(super) fn embed(cuda: &Cuda, args: Embed<'_, Cuda>) -> Tensor<Cuda> {
    let Embed { table, ids, scale } = args;
    let (vocabulary, _) = table.shape();
    assert!(ids.iter().all(|&id| (id as usize) < vocabulary), "ids are in the vocabulary");
    let ids_buffer = cuda.buffer_of(ids);
    rows_of(cuda, table, (&ids_buffer, ids.len()), scale)
}

pub(super) fn embed_chosen(cuda: &Cuda, table: &Weight, ids: &Chosen, scale: f32) -> Tensor<Cuda> {
    assert!(ids.n_columns <= table.shape().0, "ids are in the vocabulary");
    rows_of(cuda, table, (&ids.columns, ids.n), scale)
}

/// Rows of a table by so many ids, which are below its height.
fn rows_of(cuda: &Cuda, table: &Weight, (ids, n): (&Buffer, usize), scale: f32) -> Tensor<Cuda> {
    let (_, d) = table.shape();
    let mut y = cuda.alloc(n, d, Precision::Activation);
    let kernel = cuda.kernel("embed", "embed").arg(y.address_mut()).arg(table.matrix());
    kernel.arg(ids.address()).count(d).arg(scale).launch([n, 1, 1], 128);
    y
}

pub(super) fn cache_write(cuda: &Cuda, args: CacheWrite<'_, Cuda>) {
    let CacheWrite { cache, source, rows } = args;
    assert!(rows.iter().all(|&row| row < cache.rows), "rows are in the cache");
    let source_address = source.activation(cuda, rows.len(), cache.cols);
    assert_eq!(cache.dtype, cuda.compute);
    let d = cache.cols;
    let rows_buffer = cuda.indices(rows.iter().map(|&row| narrow(row)));
    let kernel = cuda.kernel("embed", "cache_write").arg(cache.address_mut()).arg(source_address);
    kernel.arg(rows_buffer.address()).count(d).launch([rows.len(), 1, 1], 128);
}

pub(super) fn rope(cuda: &Cuda, args: Rope<'_, Cuda>) -> Tensor<Cuda> {
    let Rope { x, rotary, positions, inverse } = args;
    let (rows, width) = (x.rows, x.cols);
    let Tensor { rows: n_positions, cols: head_dim, .. } = rotary.table;
    assert!(head_dim > 0 && head_dim % 2 == 0 && width % head_dim == 0, "heads of whole pairs");
    assert_eq!(positions.len(), rows, "a position for each token");
    assert!(positions.iter().all(|&p| (p as usize) < n_positions), "an angle for each position");
    let from = x.activation(cuda, rows, width);
    let x = Some(x);
    let y = cuda.reuse_or_alloc(&x, rows, width);
    let positions = cuda.indices(positions.iter().copied());
    let kernel = cuda.kernel("rope", "rope").arg(y.address()).arg(from);
    let kernel = kernel.arg(rotary.table.full(n_positions, head_dim)).arg(positions.address());
    let kernel = kernel.count(width).count(head_dim).arg(if inverse { -1.0_f32 } else { 1.0 });
    kernel.launch([rows, (width / 2).div_ceil(8 * 128), 1], 128);
    y
}

pub(super) fn gather(cuda: &Cuda, args: Gather<'_, Cuda>) -> Tensor<Cuda> {
    let Gather { x, rows } = args;
    assert!(rows.iter().all(|&row| row < x.rows), "rows are in the matrix");
    let mut y = cuda.alloc(rows.len(), x.cols, Precision::Activation);
    let from = x.activation(cuda, x.rows, x.cols);
    let rows_buffer = cuda.indices(rows.iter().map(|&row| narrow(row)));
    // An embedding's table is rows, too.
    let kernel = cuda.kernel("embed", "embed").arg(y.address_mut()).arg(from);
    kernel.arg(rows_buffer.address()).count(x.cols).arg(1.0_f32).launch([rows.len(), 1, 1], 128);
    y
}

/// Threads of a norm's block: whole warps for 8 columns each, `NORM_THREADS` of `cuda/norm.cu` at most.
fn norm_threads(d: usize) -> u32 {
    narrow(d.div_ceil(8)).next_multiple_of(32).clamp(32, 256)
}

pub(super) fn norm(cuda: &Cuda, args: Norm<'_, Cuda>) -> Normed<Cuda> {
    let Norm { x, weight, bias, centered, eps } = args;
    let (rows, d) = (x.rows, x.cols);
    let mut y = cuda.alloc(rows, d, Precision::Activation);
    let mut rstd = cuda.alloc(rows, 1, Precision::Full);
    let mut mean = centered.then(|| cuda.alloc(rows, 1, Precision::Full));
    let kernel = cuda.kernel("norm", "norm_rows").arg(y.address_mut()).arg(rstd.address_mut());
    let kernel = kernel.arg(mean.as_mut().map_or(0, Tensor::address_mut));
    let kernel = kernel.arg(x.activation(cuda, rows, d)).arg(weight.vector(d));
    let kernel = kernel.arg(bias.map_or(0, |bias| bias.vector(d)));
    kernel.arg(eps).count(d).launch([rows, 1, 1], norm_threads(d));
    Normed { y, stats: NormStats { mean, rstd } }
}

/// The address of the means, where there are any.
fn means(stats: &NormStats<Cuda>, rows: usize) -> u64 {
    stats.mean.as_ref().map_or(0, |mean| mean.full(rows, 1))
}

pub(super) fn norm_again(cuda: &Cuda, args: NormAgain<'_, Cuda>) -> Tensor<Cuda> {
    let NormAgain { x, weight, bias, stats } = args;
    let (rows, d) = (x.rows, x.cols);
    let mut y = cuda.alloc(rows, d, Precision::Activation);
    let kernel = cuda.kernel("norm", "norm_again").arg(y.address_mut());
    let kernel = kernel.arg(stats.rstd.full(rows, 1)).arg(means(stats, rows));
    let kernel = kernel.arg(x.activation(cuda, rows, d)).arg(weight.vector(d));
    let kernel = kernel.arg(bias.map_or(0, |bias| bias.vector(d)));
    kernel.count(d).launch([rows, 1, 1], norm_threads(d));
    y
}

/// The address of a residual that may be there.
fn residual(cuda: &Cuda, residual: Option<&Tensor<Cuda>>, rows: usize, cols: usize) -> u64 {
    residual.map_or(0, |residual| residual.activation(cuda, rows, cols))
}

pub(super) fn norm_backward(cuda: &Cuda, args: NormBackward<'_, Cuda>) -> Tensor<Cuda> {
    let NormBackward { x, weight, stats, d_y, d_residual } = args;
    let (rows, d) = (x.rows, x.cols);
    let d_x = cuda.reuse_or_alloc(&d_residual, rows, d);
    let kernel = cuda.kernel("norm", "norm_backward").arg(d_x.address());
    let kernel = kernel.arg(residual(cuda, d_residual.as_ref(), rows, d));
    let kernel = kernel.arg(d_y.activation(cuda, rows, d)).arg(x.activation(cuda, rows, d));
    let kernel = kernel.arg(weight.vector(d)).arg(stats.rstd.full(rows, 1));
    let kernel = kernel.arg(means(stats, rows));
    kernel.count(d).launch([rows, 1, 1], norm_threads(d));
    d_x
}

/// `Expand` of `cuda/linear.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpandArg {
    z: u64,
    token_rows: u64,
    mixed_b: u64,
    ready: u64,
    bank: BankArg,
}

impl ExpandArg {
    /// Whether it is of a stacked one that is made before the products.
    pub(super) fn is_ready(&self) -> bool {
        self.ready != 0
    }
}

/// `Epilogue` of `cuda/linear.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct EpilogueArg {
    bias: u64,
    residual: u64,
    pub(super) expand: ExpandArg,
    dropout: DropoutArg,
}

/// An epilogue with what it points to.
struct Epilogue {
    arg: EpilogueArg,
    _token_rows: Option<Arc<Buffer>>,
    _ready: Option<Tensor<Cuda>>,
    _dropout: DropoutTable,
}

/// Columns that `expand_stacked` of `cuda/linear.cu` has at a time.
pub(super) const EXPAND_COLUMNS: usize = 16;

fn epilogue(
    cuda: &Cuda,
    projection: &Projection<'_, Cuda>,
    tokens: usize,
    order: Order,
) -> Epilogue {
    let (d_out, _) = projection.weight.shape();
    let mut ready = None;
    let (expand, token_rows) = match &projection.lora {
        None => (ExpandArg::zeroed(), None),
        Some(Expand { z, segments, rhs }) => {
            assert_eq!(segments.n_tokens(), tokens);
            let rank = z.cols;
            let (mixed_b, bank) = match rhs {
                ExpandRhs::Mixed(mixed_b) => {
                    let address = mixed_b.full(segments.n_rows() * rank, d_out);
                    (address, BankArg::mixed(rank, d_out))
                }
                ExpandRhs::Stacked(stacked) => {
                    assert_eq!((stacked.bank.rank, stacked.bank.d_out), (rank, d_out));
                    // By the shape alone: no bits change with how many tokens there are.
                    let width = d_out / stacked.bank.n_splits;
                    if order == Order::Panel
                        && cuda.compute == Dtype::Bf16
                        && width.is_multiple_of(EXPAND_COLUMNS)
                    {
                        ready = Some(cuda.alloc(tokens, d_out, Precision::Full));
                    }
                    (0, BankArg::new(stacked, segments.n_rows()))
                }
            };
            let token_rows = cuda.token_rows(segments);
            let z = z.full(tokens, rank);
            let ready = ready.as_mut().map_or(0, Tensor::address_mut);
            let token_rows_address = token_rows.address();
            let arg = ExpandArg { z, token_rows: token_rows_address, mixed_b, ready, bank };
            (arg, Some(token_rows))
        }
    };
    let dropout = cuda.dropout_arg(projection.dropout, tokens);
    let arg = EpilogueArg {
        bias: projection.bias.map_or(0, |bias| bias.vector(d_out)),
        residual: residual(cuda, projection.residual, tokens, d_out),
        expand,
        dropout: dropout.arg,
    };
    Epilogue { arg, _token_rows: token_rows, _ready: ready, _dropout: dropout }
}

pub(super) fn linear(cuda: &Cuda, args: Linear<'_, Cuda>) -> Vec<Tensor<Cuda>> {
    let Linear { x, projections, order, output } = args;
    let mut all = Vec::with_capacity(projections.len());
    for siblings in projections.chunks(gemm::MAX_PROJECTIONS) {
        let mut tables = Vec::new(); // They live until the launch is queued.
        let own = siblings.iter().map(|projection| {
            let d_out = projection.weight.shape().0;
            let epilogue = epilogue(cuda, projection, x.rows, order);
            let mut y = cuda.alloc(x.rows, d_out, output);
            let weight = projection.weight.matrix();
            let arg = ProjectionArg::new(y.address_mut(), weight, epilogue.arg, d_out);
            tables.push(epilogue);
            all.push(y);
            arg
        });
        let own: Vec<_> = own.collect();
        let d_in = siblings[0].weight.shape().1;
        assert!(siblings.iter().all(|p| p.weight.shape().1 == d_in), "siblings share their input");
        let address = x.activation(cuda, x.rows, d_in);
        let forward = gemm::Forward { projections: &own, x: address, tokens: x.rows, d_in, output };
        if order == Order::Panel {
            forward.launch(cuda);
        } else {
            forward.launch_dot(cuda);
        }
    }
    all
}

/// `Projection` of `cuda/linear.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ProjectionArg {
    y: u64,
    pub(super) weight: u64,
    pub(super) epilogue: EpilogueArg,
    pub(super) d_out: u32,
    padding: u32,
}

impl ProjectionArg {
    fn new(y: u64, weight: u64, epilogue: EpilogueArg, d_out: usize) -> Self {
        Self { y, weight, epilogue, d_out: narrow(d_out), padding: 0 }
    }
}

/// `Term` of `cuda/linear.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct TermArg {
    pub(super) d_y: u64,
    pub(super) weight: u64,
    d_z: u64,
    mixed_a: u64,
    token_rows: u64,
    pub(super) d_out: u32,
    rank: u32,
}

/// `Terms` of `cuda/linear.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
pub(super) struct TermsArg {
    pub(super) terms: [TermArg; MAX_TERMS],
    pub(super) n: u32,
    padding: u32,
}

pub(super) fn linear_backward(cuda: &Cuda, args: LinearBackward<'_, Cuda>) -> Tensor<Cuda> {
    let LinearBackward { terms, d_residual } = args;
    assert!((1..=MAX_TERMS).contains(&terms.len()), "{} siblings", terms.len());
    let (tokens, d_in) = (terms[0].d_y.rows, terms[0].weight.shape().1);
    let mut arg =
        TermsArg { terms: [TermArg::zeroed(); MAX_TERMS], n: narrow(terms.len()), padding: 0 };
    let mut tables = Vec::new(); // They live until the launch is queued.
    for (term, arg) in terms.iter().zip(&mut arg.terms) {
        let (d_out, width) = term.weight.shape();
        assert_eq!(width, d_in, "siblings share their input");
        arg.d_y = term.d_y.activation(cuda, tokens, d_out);
        (arg.weight, arg.d_out) = (term.weight.matrix(), narrow(d_out));
        if let Some((d_z, mixed_a, segments)) = term.lora {
            assert_eq!(segments.n_tokens(), tokens);
            arg.d_z = d_z.full(tokens, d_z.cols);
            arg.mixed_a = mixed_a.full(segments.n_rows() * d_in, d_z.cols);
            arg.rank = narrow(d_z.cols);
            let token_rows = cuda.token_rows(segments);
            arg.token_rows = token_rows.address();
            tables.push(token_rows);
        }
    }
    let d_x = cuda.reuse_or_alloc(&d_residual, tokens, d_in);
    let d_residual = residual(cuda, d_residual.as_ref(), tokens, d_in);
    gemm::Backward { d_x: d_x.address(), d_residual, terms: arg, tokens, d_in }.launch(cuda);
    d_x
}

/// The kernels' number of a non-linearity.
fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::Relu => 0,
        Activation::GeluNew => 1,
        Activation::Gelu => 2,
        Activation::Silu => 3,
    }
}

/// Blocks of a kernel whose threads each have eight columns of a token.
fn groups_grid(tokens: usize, cols: usize) -> [usize; 3] {
    [tokens, cols.div_ceil(8 * 128), 1]
}

pub(super) fn gated(cuda: &Cuda, args: &Gated<'_, Cuda>) -> Tensor<Cuda> {
    let &Gated { gate, up, activation, dropout } = args;
    let (tokens, d) = (gate.rows, gate.cols);
    let dropout = cuda.dropout_arg(dropout, tokens);
    let mut h = cuda.alloc(tokens, d, Precision::Activation);
    let kernel = cuda.kernel("gated", "gated").arg(h.address_mut());
    let kernel = kernel.arg(gate.activation(cuda, tokens, d)).arg(residual(cuda, up, tokens, d));
    let kernel = kernel.arg(dropout.arg).arg(activation_number(activation)).count(d);
    kernel.launch(groups_grid(tokens, d), 128);
    h
}

pub(super) fn gated_backward(
    cuda: &Cuda,
    args: &Gated<'_, Cuda>,
    d_h: &Tensor<Cuda>,
) -> (Tensor<Cuda>, Option<Tensor<Cuda>>) {
    let &Gated { gate, up, activation, dropout } = args;
    let (tokens, d) = (gate.rows, gate.cols);
    let dropout = cuda.dropout_arg(dropout, tokens);
    let mut d_gate = cuda.alloc(tokens, d, Precision::Activation);
    let mut d_up = up.map(|_| cuda.alloc(tokens, d, Precision::Activation));
    let kernel = cuda.kernel("gated", "gated_backward").arg(d_gate.address_mut());
    let kernel = kernel.arg(d_up.as_mut().map_or(0, Tensor::address_mut));
    let kernel = kernel.arg(d_h.activation(cuda, tokens, d));
    let kernel = kernel.arg(gate.activation(cuda, tokens, d)).arg(residual(cuda, up, tokens, d));
    let kernel = kernel.arg(dropout.arg).arg(activation_number(activation)).count(d);
    kernel.launch(groups_grid(tokens, d), 128);
    (d_gate, d_up)
}

pub(super) fn dropout(cuda: &Cuda, x: &Tensor<Cuda>, dropout: &Dropout) -> Tensor<Cuda> {
    let (tokens, d) = (x.rows, x.cols);
    let dropout = cuda.dropout_arg(Some(dropout), tokens);
    let mut y = cuda.alloc(tokens, d, Precision::Activation);
    let kernel = cuda.kernel("elementwise", "dropout").arg(y.address_mut());
    let kernel = kernel.arg(x.activation(cuda, tokens, d)).arg(dropout.arg).count(d);
    kernel.launch(groups_grid(tokens, d), 128);
    y
}

pub(super) fn add(cuda: &Cuda, a: Tensor<Cuda>, b: &Tensor<Cuda>) -> Tensor<Cuda> {
    let (rows, cols, n) = (a.rows, a.cols, a.len());
    let a = Some(a);
    let y = cuda.reuse_or_alloc(&a, rows, cols);
    let kernel = cuda.kernel("elementwise", "add").arg(y.address());
    let kernel = kernel.arg(residual(cuda, a.as_ref(), rows, cols));
    let kernel = kernel.arg(b.activation(cuda, rows, cols)).arg(n as u64);
    kernel.launch([n.div_ceil(256), 1, 1], 256);
    y
}

/// `SAMPLE_THREADS` of `cuda/sampling.cu`.
const SAMPLE_THREADS: u32 = 512;
const HEAD_THREADS: u32 = 1024;

pub(super) fn head_loss(cuda: &Cuda, args: HeadLoss<'_, Cuda>) -> Loss<Cuda> {
    let HeadLoss { x, weight, labels, scale, d_nll } = args;
    let (tokens, d_model) = (x.rows, x.cols);
    let (vocabulary, width) = weight.shape();
    assert_eq!((labels.len(), width), (tokens, d_model));
    assert!(
        labels.iter().all(|&label| (label as usize) < vocabulary),
        "labels are in the vocabulary"
    );
    let labels = cuda.buffer_of(labels);
    let nll = cuda.unwritten_numbers(tokens);
    let mut d_x = d_nll.map(|_| cuda.alloc(tokens, d_model, Precision::Activation));
    // Whole tiles, so that a chunk's last one is not mostly empty, and of those what the backward takes least for.
    let most = (HEAD_BYTES / (4 * vocabulary)).next_multiple_of(MMA_TILE.side);
    let chunk = gemm::best_tokens(cuda, most, d_model).min(tokens).max(1);
    let mut raw = cuda.alloc(chunk, vocabulary, Precision::Full);
    let item = cuda.compute.size_bytes();
    let rounded = (d_nll.is_some() && cuda.compute == Dtype::Bf16)
        .then(|| cuda.alloc(chunk, vocabulary, Precision::Activation));
    let d_raw = rounded.as_ref().map(Tensor::address);
    for first in (0..tokens).step_by(chunk) {
        let n = chunk.min(tokens - first);
        let row = (first * d_model * item) as u64;
        let plain = EpilogueArg::zeroed();
        let product = ProjectionArg::new(raw.address_mut(), weight.matrix(), plain, vocabulary);
        let x = x.activation(cuda, tokens, d_model) + row;
        let output = Precision::Full;
        gemm::Forward { projections: &[product], x, tokens: n, d_in: d_model, output }.launch(cuda);
        let kernel = cuda.kernel("head", "head_softmax");
        let kernel = kernel.arg(nll.address() + 8 * first as u64).arg(raw.address_mut());
        let kernel = kernel.arg(d_raw.unwrap_or(0));
        let kernel = kernel.arg(labels.address() + 4 * first as u64).count(vocabulary).arg(scale);
        let kernel = kernel.arg(d_nll.unwrap_or(0.0)).arg(u32::from(d_nll.is_some()));
        kernel.launch([n, 1, 1], HEAD_THREADS);
        let Some(d_x) = &mut d_x else { continue };
        let to = d_x.address_mut() + row;
        if let Some(d_y) = d_raw {
            let mut terms = TermsArg { terms: [TermArg::zeroed(); MAX_TERMS], n: 1, padding: 0 };
            let (weight, d_out) = (weight.matrix(), narrow(vocabulary));
            terms.terms[0] = TermArg { d_y, weight, d_out, ..TermArg::zeroed() };
            let (tokens, d_in) = (n, d_model);
            gemm::Backward { d_x: to, d_residual: 0, terms, tokens, d_in }.launch(cuda);
        } else {
            let kernel = cuda.kernel("head", "head_backward").arg(to);
            let kernel = kernel.arg(raw.address()).arg(weight.matrix());
            let kernel = kernel.count(n).count(d_model).count(vocabulary);
            let kernel = kernel.shared_bytes(SCALAR_TILE.shared_bytes);
            kernel.launch(SCALAR_TILE.grid(n, d_model), GEMM_THREADS);
        }
    }
    Loss { nll, d_x }
}

pub(super) fn argmax(cuda: &Cuda, logits: &Tensor<Cuda>, forbidden: &[u32]) -> Chosen {
    let (n, n_columns) = (logits.rows, logits.cols);
    let columns = cuda.take(4 * n);
    let forbidden_buffer = cuda.indices(forbidden.iter().copied());
    let kernel = cuda.kernel("head", "argmax").arg(columns.address());
    let kernel = kernel.arg(logits.full(n, n_columns)).arg(forbidden_buffer.address());
    let kernel = kernel.count(forbidden.len()).count(n_columns);
    kernel.launch([n, 1, 1], HEAD_THREADS);
    let arrival = cuda.fetch(&columns, 4 * n);
    Chosen { columns, n, n_columns, arrival }
}

pub(super) fn sample(cuda: &Cuda, args: &Sample<'_, Cuda>) -> Chosen {
    let Sample { logits, scale, forbidden, forbids, ref rules, uniforms } = *args;
    let (n, n_columns) = (logits.rows, logits.cols);
    assert!(n_columns > 0 && scale > 0.0, "a column, and logits in their order");
    assert_eq!((forbids.len(), uniforms.len()), (n, n), "one for each row");
    let columns = cuda.take(4 * n);
    let uniforms = cuda.buffer_of(uniforms);
    let forbidden_buffer = cuda.indices(forbidden.iter().copied());
    let n_forbidden = |&forbids: &bool| if forbids { narrow(forbidden.len()) } else { 0 };
    let n_forbidden = cuda.indices(forbids.iter().map(n_forbidden));
    let kernel = cuda.kernel("sampling", "sample").arg(columns.address());
    let kernel = kernel.arg(logits.full(n, n_columns)).arg(uniforms.address());
    let kernel = kernel.arg(forbidden_buffer.address()).arg(n_forbidden.address());
    let kernel = kernel.count(n_columns).arg(scale).count(rules.top_k.min(n_columns));
    kernel.arg(rules.top_p).arg(rules.min_weight()).launch([n, 1, 1], SAMPLE_THREADS);
    let arrival = cuda.fetch(&columns, 4 * n);
    Chosen { columns, n, n_columns, arrival }
}
