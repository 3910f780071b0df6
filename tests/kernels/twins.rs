//! The frozen products of `cuda/linear_wgmma.cu` beside those of `cuda/linear.cu`, where shapes are larger than
//! random cases are: wide tiles, several tiles a block, more steps than stages, terms that follow one another.
//!
//! On the emulator only, where both add alike, so that the bits must be the same. What a GPU's differ by is for
//! the oracle to judge: `POLYTAPE_CUDA_GEMM=wgmma` runs every case there, `bench gemm` the shapes of models.

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
