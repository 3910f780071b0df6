//! Attention and its backward.

use std::sync::Arc;

use bytemuck::NoUninit;

use super::{
    Buffer, Cuda, must, narrow,
    tables::{DropoutArg, DropoutTable},
};
use crate::{
    dtype::Dtype,
    error::Error,
    kernels::{Backend, Precision, ops::*},
    tensor::Tensor,
};

/// Queries (or keys) of a block: a warp each.
const WARPS: u32 = 8;
/// Of the kernels for tensor cores, as `cuda/attention_tiles.cu` has them: queries (or keys) of a block, which has two threads
/// each; rows of the other side that pass through its shared memory at a time.
const TILE_QUERIES: u32 = 64;
const FORWARD_KEYS: usize = 64;
const BACKWARD_OTHERS: usize = 32;
const WARP: usize = 32;

/// `Attention` of `cuda/attention.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttentionArg {
    q: u64,
    k: u64,
    v: u64,
    spans: u64,
    tiles: u64,
    bias: u64,
    dropout: DropoutArg,
    n_distances: u32,
    zero: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    causal: u32,
    scale: f32,
    /// 0: none.
    window: u32,
}

/// The argument with what it points to.
struct Prepared {
    arg: AttentionArg,
    n_tiles: usize,
    _spans: Arc<Buffer>,
    _tiles: Arc<Buffer>,
    _dropout: DropoutTable,
}

impl Prepared {
    /// Cut into tiles of `height` of these sequences' rows.
    fn new(cuda: &Cuda, args: &Attention<'_, Cuda>, lens: &[usize], height: u32) -> Self {
        let &Attention { q, k, v, queries, keys, n_heads, n_kv_heads, head_dim, .. } = args;
        assert_eq!(queries.n(), keys.n(), "keys for each sequence");
        assert!(queries.end() <= q.rows && keys.end() <= k.rows, "spans lie in their tensors");
        assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads));
        if let Some(window) = args.window {
            assert!(args.causal && window > 0, "a window ends at the query and has it");
        }
        if let Some(bias) = args.bias {
            let lens = queries.lens.iter().zip(&keys.lens);
            for (&n_queries, &n_keys) in lens.filter(|&(&q, &k)| q > 0 && k > 0) {
                let highest = if args.causal { bias.zero } else { bias.zero + n_queries - 1 };
                // From the last query's first key to the first query's last.
                let fits = bias.zero + 1 >= n_keys && highest < bias.table.cols;
                assert!(fits, "the bias table has every distance");
            }
        }
        let (q_cols, kv_cols) = (n_heads * head_dim, n_kv_heads * head_dim);
        let (spans, (tiles, n_tiles)) = (cuda.spans(queries, keys), cuda.tiles(lens, height));
        let dropout = cuda.dropout_arg(args.dropout, q.rows);
        let n_distances = args.bias.map_or(0, |bias| bias.table.cols);
        let arg = AttentionArg {
            q: q.activation(cuda, q.rows, q_cols),
            k: k.activation(cuda, k.rows, kv_cols),
            v: v.activation(cuda, k.rows, kv_cols),
            spans: spans.address(),
            tiles: tiles.address(),
            bias: args.bias.map_or(0, |bias| bias.table.full(n_heads, n_distances)),
            dropout: dropout.arg,
            n_distances: narrow(n_distances),
            zero: narrow(args.bias.map_or(0, |bias| bias.zero)),
            n_heads: narrow(n_heads),
            n_kv_heads: narrow(n_kv_heads),
            head_dim: narrow(head_dim),
            causal: u32::from(args.causal),
            scale: args.scale,
            // One that no sequence fills is none; kernels take differences of it.
            window: narrow(args.window.map_or(0, |window| window.min(1 << 30))),
        };
        Self { arg, n_tiles, _spans: spans, _tiles: tiles, _dropout: dropout }
    }
}

/// Rows that no sequence covers are zero.
fn zeros_unless_covered(cuda: &Cuda, like: &Tensor<Cuda>, spans: &Spans) -> Tensor<Cuda> {
    let covered = spans.lens.iter().sum::<usize>() == like.rows;
    let make = if covered { Cuda::alloc } else { Cuda::zeros };
    make(cuda, like.rows, like.cols, Precision::Activation)
}

/// Which of its versions a kernel runs in.
struct Version {
    module: &'static str,
    /// Rows of a block.
    height: u32,
    threads: u32,
    /// What follows the kernels' names.
    suffix: String,
    /// Of the forward and the backward.
    shared_bytes: [usize; 2],
    /// The forward's kernel where no sequence has more than one query, if there is one, and its shared memory.
    one: Option<(String, usize)>,
}

impl Version {
    fn of(cuda: &Cuda, head_dim: usize) -> Self {
        // Columns of a head that a lane owns in f32.
        let columns = match head_dim.div_ceil(WARP) {
            0..=1 => 1,
            2 => 2,
            3..=4 => 4,
            5..=8 => 8,
            _ => must(Err(Error::Device(format!(
                "heads are {head_dim} columns wide, and the CUDA kernels have them up to 256: use --device cpu"
            )))),
        };
        // Wider heads do not fit in the registers of the tensor cores' kernels, which copy rows by 16 bytes.
        if cuda.compute == Dtype::Bf16 && columns < 8 && head_dim.is_multiple_of(8) {
            let row_bytes = 2 * columns * WARP;
            // Rows of two matrices, and the next ones on their way.
            let rows = |own: usize, others: usize| own * TILE_QUERIES as usize + 4 * others;
            // Two statistics of a query and of the next.
            let stats_bytes = 4 * 4 * BACKWARD_OTHERS;
            Self {
                module: "attention_tiles",
                height: TILE_QUERIES,
                threads: 2 * TILE_QUERIES,
                suffix: format!("_tiles_{columns}"),
                shared_bytes: [
                    rows(1, FORWARD_KEYS) * row_bytes,
                    rows(2, BACKWARD_OTHERS) * row_bytes + stats_bytes,
                ],
                // Without what tiles need, more blocks fit. The query, and of each warp a result and two statistics.
                one: Some((format!("attention_one_{columns}"), 4 * (5 * columns * WARP + 8))),
            }
        } else {
            // Keys and values take turns in the forward.
            let (row_bytes, own) = (4 * (head_dim + 1), WARPS as usize);
            Self {
                module: "attention",
                height: WARPS,
                threads: WARPS * 32,
                suffix: format!("_{columns}"),
                shared_bytes: [own + WARP, 2 * (own + WARP)].map(|rows| rows * row_bytes),
                one: None,
            }
        }
    }
}

pub(super) fn attention(cuda: &Cuda, args: &Attention<'_, Cuda>) -> Attended<Cuda> {
    let Version { module, height, threads, suffix, shared_bytes, one } =
        Version::of(cuda, args.head_dim);
    let is_decoding = args.queries.lens.iter().all(|&len| len <= 1);
    let tiles = (format!("attention{suffix}"), shared_bytes[0]);
    let (name, shared_bytes) = one.filter(|_| is_decoding).unwrap_or(tiles);
    let prepared = Prepared::new(cuda, args, &args.queries.lens, height);
    let mut o = zeros_unless_covered(cuda, args.q, args.queries);
    let mut lse = cuda.alloc(args.q.rows, args.n_heads, Precision::Full);
    let kernel = cuda.kernel(module, name).arg(o.address_mut()).arg(lse.address_mut());
    let kernel = kernel.arg(prepared.arg).shared_bytes(shared_bytes);
    kernel.launch([prepared.n_tiles, args.n_heads, 1], threads);
    Attended { o, lse }
}

pub(super) fn attention_backward(
    cuda: &Cuda,
    args: AttentionBackward<'_, Cuda>,
) -> [Tensor<Cuda>; 3] {
    let AttentionBackward { forward, o, lse, d_o } = args;
    let &Attention { q, k, n_heads, n_kv_heads, head_dim, queries, keys, .. } = forward;
    let (d_o, o) = (d_o.activation(cuda, q.rows, q.cols), o.activation(cuda, q.rows, q.cols));
    let lse = lse.full(q.rows, n_heads);
    let mut inner = cuda.alloc(q.rows, n_heads, Precision::Full);
    let kernel = cuda.kernel("attention", "attention_inner").arg(inner.address_mut());
    let kernel = kernel.arg(d_o).arg(o).count(q.rows * n_heads).count(head_dim);
    kernel.launch([(q.rows * n_heads).div_ceil(4 * WARPS as usize), 1, 1], WARPS * 32);

    let Version { module, height, threads, suffix, shared_bytes: [_, shared_bytes], .. } =
        Version::of(cuda, head_dim);
    let mut d_q = zeros_unless_covered(cuda, q, queries);
    let prepared = Prepared::new(cuda, forward, &queries.lens, height);
    let name = format!("attention_backward_queries{suffix}");
    let kernel = cuda.kernel(module, name).arg(d_q.address_mut()).arg(d_o).arg(lse);
    let kernel = kernel.arg(inner.address()).arg(prepared.arg).shared_bytes(shared_bytes);
    kernel.launch([prepared.n_tiles, n_heads, 1], threads);

    let [mut d_k, mut d_v] = [0, 1].map(|_| zeros_unless_covered(cuda, k, keys));
    let prepared = Prepared::new(cuda, forward, &keys.lens, height);
    let name = format!("attention_backward_keys{suffix}");
    let kernel = cuda.kernel(module, name).arg(d_k.address_mut()).arg(d_v.address_mut());
    let kernel = kernel.arg(d_o).arg(lse).arg(inner.address()).arg(prepared.arg);
    let kernel = kernel.shared_bytes(shared_bytes);
    kernel.launch([prepared.n_tiles, n_kv_heads, 1], threads);
    [d_q, d_k, d_v]
}
