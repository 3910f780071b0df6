//! The frozen products of `cuda/linear_wgmma.cu` beside those of `cuda/linear.cu`, where shapes are larger than
//! random cases are: wide tiles, several tiles a block, more steps than stages, terms that follow one another.
//!
//! That comparison is made on the emulator only, where both add alike, so that the bits must be the same. What a GPU's
//! differ by is for the oracle to judge: `POLYTAPE_CUDA_GEMM` says by which of them every case runs there, `bench gemm`
//! has the shapes of models.

use polytape::{
    dtype::Dtype,
    kernels::{
        Backend, Precision,
        cuda::{Cuda, Gemm},
        ops::{
            Expand, ExpandRhs, Linear, LinearBackward, LinearBackwardTerm, Order, Projection,
            Segments,
        },
    },
};

use super::common::{Class, Gen, cuda_backends};

/// Tokens, output and input features.
const SHAPES: [[usize; 3]; 5] =
    [[1, 1032, 8], [130, 1288, 72], [300, 136, 344], [17, 257, 1048], [129, 24, 1280]];
const RANK: usize = 20;

/// Of a linear with everything, y and d_x.
fn run(cuda: &Cuda, [tokens, d_out, d_in]: [usize; 3]) -> [Vec<f64>; 2] {
    let mut random = Gen::new(5);
    let lens: Vec<usize> = (0..tokens).step_by(11).map(|t| 11.min(tokens - t)).collect();
    let rows: Vec<usize> = (0..lens.len()).map(|i| i % 3).collect();
    let segments = Segments::new(&lens, &rows, 3);
    let mut upload = |rows: usize, cols: usize, to| {
        cuda.upload(&random.values(Class::Uniform, rows * cols, false), rows, cols, to)
    };
    let x = upload(tokens, d_in, Precision::Activation);
    let d_y = [0, 1].map(|_| upload(tokens, d_out, Precision::Activation));
    let residual = upload(tokens, d_out, Precision::Activation);
    let (z, mixed_b) =
        (upload(tokens, RANK, Precision::Full), upload(3 * RANK, d_out, Precision::Full));
    let mixed_a = upload(3 * d_in, RANK, Precision::Full);
    let weights = [0, 1].map(|_| cuda.weight(&random.weight(Class::Uniform, d_out, d_in)));
    let bias = cuda.weight(&random.weight(Class::Uniform, 1, d_out));

    let lora = Expand { z: &z, segments: &segments, rhs: ExpandRhs::Mixed(&mixed_b) };
    let projection = Projection {
        bias: Some(&bias),
        lora: Some(lora),
        residual: Some(&residual),
        ..Projection::plain(&weights[0])
    };
    let (order, output) = (Order::Panel, Precision::Full);
    let y = cuda.linear(Linear { x: &x, projections: &[projection], order, output });

    let lora = Some((&z, &mixed_a, &segments));
    let term = |i: usize| LinearBackwardTerm { d_y: &d_y[i], weight: &weights[i], lora };
    let d_x = cuda.linear_backward(LinearBackward {
        terms: &[term(0), LinearBackwardTerm { lora: None, ..term(1) }, term(0)],
        d_residual: None,
    });
    [cuda.download(&y[0]), cuda.download(&d_x)]
}

#[test]
fn products_of_warpgroups_are_those_of_warps() {
    let emulated = cuda_backends()
        .filter(|cuda| cuda.device().is_strict() && cuda.compute_dtype() == Dtype::Bf16);
    for cuda in emulated {
        for shape in SHAPES {
            let [warps, groups] = [Gemm::Mma, Gemm::Wgmma]
                .map(|gemm| run(&cuda.clone().with_gemm(gemm).unwrap(), shape));
            for (what, (warps, groups)) in ["y", "d_x"].iter().zip(warps.iter().zip(&groups)) {
                assert!(warps.iter().all(|value| value.is_finite()), "{shape:?} {what}");
                let differ = warps.iter().zip(groups).filter(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(differ.count(), 0, "{shape:?}: elements of {what}");
            }
        }
    }
}

/// The first token's y and d_x among so many tokens of the same matrices.
fn of_first_token(cuda: &Cuda, tokens: usize, most: usize) -> Vec<f64> {
    let (d_out, d_in) = (512, 72);
    let mut random = Gen::new(6);
    let mut upload = |cols: usize| {
        let values = random.values(Class::Uniform, most * cols, false);
        cuda.upload(&values[..tokens * cols], tokens, cols, Precision::Activation)
    };
    // As wide as each other, so that both products choose the same tiles.
    let [x, d_y] = [d_in, d_in].map(&mut upload);
    let [forward, backward] = [[d_out, d_in], [d_in, d_out]]
        .map(|[rows, cols]| random.weight(Class::Uniform, rows, cols));
    let [forward, backward] = [forward, backward].map(|weight| cuda.weight(&weight));
    let projections = [Projection::plain(&forward)];
    let (order, output) = (Order::Panel, Precision::Full);
    let y = cuda.linear(Linear { x: &x, projections: &projections, order, output });
    let term = LinearBackwardTerm { d_y: &d_y, weight: &backward, lora: None };
    let d_x = cuda.linear_backward(LinearBackward { terms: &[term], d_residual: None });
    [&y[0], &d_x].into_iter().flat_map(|all| cuda.download(all)[..d_out].to_vec()).collect()
}

/// Tiles are as wide as keeps every multiprocessor busy, which depends on how many tokens there are.
#[test]
fn the_width_of_tiles_changes_no_bits() {
    let hopper = cuda_backends().filter(|cuda| {
        cuda.compute_dtype() == Dtype::Bf16 && cuda.device().hopper_multiprocessors() > 0
    });
    for cuda in hopper {
        let cuda = cuda.clone().with_gemm(Gemm::Wgmma).unwrap();
        // Of 512 columns, tiles of 256, of 128 (where there are multiprocessors enough) and of 64.
        let n = cuda.device().hopper_multiprocessors() as usize;
        let all = [n / 2 * 128, (n / 4).max(1) * 128, 1];
        let [wide, middle, alone] = all.map(|tokens| of_first_token(&cuda, tokens, all[0]));
        assert!(wide.iter().all(|value| value.is_finite()));
        assert_eq!(wide, middle);
        assert_eq!(wide, alone);
    }
}
