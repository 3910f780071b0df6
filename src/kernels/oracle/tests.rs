//! The oracle against PEFT's golden vector, and every gradient against central differences.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::kernels::philox::Purpose;

fn tensor(values: &[f64], rows: usize, cols: usize) -> Tensor<Oracle> {
    Oracle.upload(values, rows, cols, Precision::Full)
}

fn weight(values: &[f64], rows: usize, cols: usize) -> Arc<Weight> {
    Arc::new(Weight { values: values.to_vec(), rows, cols })
}

/// Uniform in `[-1, 1)`; another sequence for another `what`.
fn random(what: u64, n: usize) -> Vec<f64> {
    let key = Key::new(what, Purpose::Data, 0);
    (0..n as u64).map(|i| 2.0 * f64::from(key.uniform(i)) - 1.0).collect()
}

fn dropout(n_tokens: u32) -> Dropout {
    let tokens = (0..n_tokens).map(|t| TokenKey { example: t / 3, position: t % 3 }).collect();
    Dropout { p: 0.3, key: Key::new(1, Purpose::Dropout, 2), site: 4, tokens }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    sum(a.len(), |i| a[i] * b[i])
}

fn assert_near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance * (1.0 + expected.abs()),
            "{what}[{i}]: {found}, not {expected}"
        );
    }
}

/// Asserts that `gradient` is that of `loss` at `x`: central differences, every element.
fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{what}");
    const STEP: f64 = 1e-6;
    for (i, &gradient) in gradient.iter().enumerate() {
        let at = |delta: f64| {
            let mut x = x.to_vec();
            x[i] += delta;
            loss(&x)
        };
        let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        // 1e-9 is what rounding the loss (about 1) leaves of a difference.
        let tolerance = 1e-6 * gradient.abs() + 3e-9;
        assert!(
            (difference - gradient).abs() <= tolerance,
            "{what}[{i}]: {gradient}, {difference}"
        );
    }
}

/// One optimisation step's worth of the golden vector of the specification (5.1).
struct Golden {
    noise: Option<[f64; 8]>,
    w: [f64; 8],
    y: [f64; 16],
    d_logits: [f64; 8],
    d_a: [f64; 8],
    d_b: [f64; 8],
    d_x: [f64; 16],
}

const GOLDEN_EVAL: Golden = Golden {
    noise: None,
    w: [
        0.6224593312,
        0.3775406688,
        0.8727521370,
        0.1272478630,
        0.4061545150,
        0.5938454850,
        0.2339152960,
        0.7660847040,
    ],
    y: [
        -0.6464202849,
        0.3734621936,
        1.9854371424,
        3.0053196210,
        0.1751752457,
        0.0658185461,
        -0.2075091625,
        -0.3168658621,
        -0.6363348584,
        0.4936084010,
        2.8073802446,
        3.9373235040,
        0.0933487231,
        0.2759491147,
        0.3005325777,
        0.4831329693,
    ],
    d_logits: [
        -0.0687879324,
        0.0369998486,
        -1.1686371586,
        0.1905523964,
        0.0310570661,
        -0.0512044455,
        -0.1088202263,
        0.5254118798,
    ],
    d_a: [
        0.5949240948,
        0.4432229425,
        -0.1811118104,
        1.8731799568,
        4.4369144707,
        2.2265180568,
        3.7522645636,
        3.7040573690,
    ],
    d_b: [
        -1.2154852257,
        0.7239750029,
        -1.1925999580,
        0.7597103984,
        4.1236310891,
        6.0936594229,
        4.6924441504,
        6.6141864023,
    ],
    d_x: [
        4.0678673335,
        4.6094026949,
        5.5208030184,
        6.0623383798,
        -0.4144102795,
        -0.4730026811,
        -0.5928927543,
        -0.6514851559,
        6.1552344751,
        7.1449624372,
        9.4876991781,
        10.4774271403,
        0.7560537680,
        0.8749168705,
        1.1035083416,
        1.2223714441,
    ],
};

const GOLDEN_TRAIN: Golden = Golden {
    noise: Some([0.25, 0.5, 0.75, 0.1, 0.9, 0.6, 0.3, 0.8]),
    w: [
        0.4843762875,
        0.5156237125,
        0.9843330236,
        0.0156669764,
        0.5284637360,
        0.4715362640,
        0.1234208655,
        0.8765791345,
    ],
    y: [
        -0.4943256357,
        0.5081223294,
        1.8880509193,
        2.8904988843,
        0.1064522294,
        0.0126995254,
        -0.1748139948,
        -0.2685666988,
        -0.7853960784,
        0.3545368217,
        2.9414753218,
        4.0814082218,
        0.1665857765,
        0.3269916136,
        0.2356301710,
        0.3960360081,
    ],
    d_logits: [
        -0.0061275402,
        0.0120682097,
        -0.9097123490,
        0.0344656449,
        0.0098361493,
        -0.0094874248,
        -0.0049771162,
        0.0708296939,
    ],
    d_a: [
        -0.4625547188,
        2.0121474647,
        -0.2895998708,
        1.6558815614,
        3.5373617461,
        1.5788162372,
        4.5336862107,
        4.6958534646,
    ],
    d_b: [
        -1.2672886586,
        0.6932691599,
        -1.1963664740,
        0.6821918732,
        3.6077758399,
        5.4148510980,
        5.2825505285,
        7.3145914360,
    ],
    d_x: [
        3.9131894844,
        4.3971975889,
        5.0657081048,
        5.5497162092,
        -0.3557889915,
        -0.4006035062,
        -0.4699703511,
        -0.5147848657,
        6.3295087350,
        7.4090505355,
        10.3644377657,
        11.4439795662,
        0.6206090569,
        0.7185689646,
        0.8941776803,
        0.9921375880,
    ],
};

#[test]
fn golden_vector_of_peft() {
    for golden in [GOLDEN_EVAL, GOLDEN_TRAIN] {
        let a = (0..8).map(|n| f64::from(n + 1) / 8.0);
        let b = (0..8).map(|n| (f64::from(n + 1) - 4.5) / 4.0);
        let logits = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0];
        let values: Vec<f64> = a.chain(b).chain(logits).collect();
        let model = Routed {
            n_linears: 1,
            n_tasks: 2,
            n_splits: 2,
            n_skills: 2,
            rank: 1,
            d_in: 4,
            d_out: 4,
            tasks: &[1, 0],
            segments: Segments::new(&[2, 2], &[0, 1], 2),
            weights: vec![weight(
                &(0..16).map(|n| f64::from(n + 1) / 16.0).collect::<Vec<_>>(),
                4,
                4,
            )],
            noise: golden.noise.as_ref().map_or(Noise::Off, |u| Noise::Given(u)),
            weighting: Weighting::default(),
            scale: 1.0,
        };
        let x =
            [1.0, -1.0, 2.0, 0.5, 0.0, 1.0, 0.0, -1.0, -0.5, 1.0, 1.0, 1.0, 2.0, 0.0, -1.0, 0.0];
        let forward = model.forward(&values, &x);
        assert_near("w", &forward.routing.weights.buffer, &golden.w, 1e-9);
        assert_near("y", &forward.y[0].buffer, &golden.y, 1e-9);
        let y = tensor(&forward.y[0].buffer, 4, 4);
        let (d_params, d_x) = model.backward(&values, &x, &forward, &[y]);
        assert_near("d_a", &d_params[..8], &golden.d_a, 1e-9);
        assert_near("d_b", &d_params[8..16], &golden.d_b, 1e-9);
        assert_near("d_logits", &d_params[16..], &golden.d_logits, 1e-9);
        assert_near("d_x", &d_x, &golden.d_x, 1e-9);
    }
}

/// Siblings with routed LoRA, all the way from parameters and `x` to their outputs and back.
/// The flat vector is `A, B, logits` of one linear after the other.
struct Routed<'a> {
    n_linears: usize,
    n_tasks: usize,
    n_splits: usize,
    n_skills: usize,
    rank: usize,
    d_in: usize,
    d_out: usize,
    tasks: &'a [u32],
    segments: Segments,
    weights: Vec<Arc<Weight>>,
    noise: Noise<'a>,
    weighting: Weighting,
    scale: f32,
}

struct RoutedForward {
    routing: Routing<Oracle>,
    mixed: Vec<MixedPair<Oracle>>,
    z: Vec<Tensor<Oracle>>,
    y: Vec<Tensor<Oracle>>,
}

impl<'a> Routed<'a> {
    fn bank(&self, linear: usize) -> Bank {
        let &Self { n_splits, n_skills, d_in, d_out, rank, .. } = self;
        let a_start = linear * self.len_of_one();
        let b_start = a_start + n_skills * d_in * rank;
        Bank { linear, a_start, b_start, n_splits, n_skills, d_in, d_out, rank }
    }

    fn len_of_one(&self) -> usize {
        self.n_skills * self.rank * (self.d_in + self.d_out)
            + self.n_tasks * self.n_splits * self.n_skills
    }

    fn logits(&self) -> Vec<usize> {
        (0..self.n_linears).map(|linear| self.bank(linear).b().end).collect()
    }

    fn route<'b>(&'b self, params: &'b Tensor<Oracle>, logits: &'b [usize]) -> Route<'b, Oracle> {
        let &Self { tasks, n_splits, n_skills, noise, weighting, .. } = self;
        Route { params, logits, tasks, n_splits, n_skills, noise, weighting }
    }

    fn forward(&self, params: &[f64], x: &[f64]) -> RoutedForward {
        let params = tensor(params, 1, params.len());
        let x = tensor(x, x.len() / self.d_in, self.d_in);
        let routing = Oracle.route(&self.route(&params, &self.logits()));
        let n_rows = self.tasks.len();
        let (order, weights) = (Order::Panel, &routing.weights);
        let stacked = |linear| Stacked { bank: self.bank(linear), params: &params, weights };
        let mixed: Vec<_> = (0..self.n_linears)
            .map(|linear| Oracle.mix(Mix { stacked: stacked(linear), n_rows }))
            .collect();
        let mixed_a: Vec<_> = mixed.iter().map(|pair| &pair.a).collect();
        let (segments, scale) = (&self.segments, self.scale);
        let z = Oracle.shrink(Shrink { x: &x, mixed_a: &mixed_a, segments, scale, order });
        let expand = |rhs: Vec<ExpandRhs<'_, Oracle>>| {
            let project = |(linear, rhs)| Projection {
                lora: Some(Expand { z: &z[linear], segments, rhs }),
                ..Projection::plain(&self.weights[linear])
            };
            let projections: Vec<_> = rhs.into_iter().enumerate().map(project).collect();
            let output = Precision::Activation;
            Oracle.linear(Linear { x: &x, projections: &projections, order, output })
        };
        let y = expand(mixed.iter().map(|pair| ExpandRhs::Mixed(&pair.b)).collect());

        // Straight from the bank it is the same.
        let y_stacked =
            expand((0..self.n_linears).map(|linear| ExpandRhs::Stacked(stacked(linear))).collect());
        for linear in 0..self.n_linears {
            let args = ShrinkStacked { x: &x, stacked: stacked(linear), segments, scale };
            let z_stacked = Oracle.shrink_stacked(args);
            assert_near("z, stacked", &z_stacked.buffer, &z[linear].buffer, 1e-14);
            assert_near("y, stacked", &y_stacked[linear].buffer, &y[linear].buffer, 1e-14);
        }
        RoutedForward { routing, mixed, z, y }
    }

    /// The gradients of the parameters and of `x`.
    fn backward(
        &self,
        params: &[f64],
        x: &[f64],
        forward: &RoutedForward,
        d_y: &[Tensor<Oracle>],
    ) -> (Vec<f64>, Vec<f64>) {
        let params = tensor(params, 1, params.len());
        let x = tensor(x, x.len() / self.d_in, self.d_in);
        let RoutedForward { routing, mixed, z, .. } = forward;
        let terms: Vec<_> = (0..self.n_linears)
            .map(|i| LoraTerm { z: &z[i], d_y: &d_y[i], mixed_b: &mixed[i].b })
            .collect();
        let (segments, scale) = (&self.segments, self.scale);
        let lora = Oracle.lora_backward(LoraBackward { x: &x, terms: &terms, segments, scale });
        let mut grads = Oracle.zeros(1, params.len(), Precision::Full);
        let (at, cols) = (routing.weights.rows, routing.weights.cols);
        let mut d_weights = Oracle.zeros(at, cols, Precision::Full);
        for (linear, LoraGradients { d_a, d_b, .. }) in lora.iter().enumerate() {
            let weights = &routing.weights;
            Oracle.unmix(Unmix {
                stacked: Stacked { bank: self.bank(linear), params: &params, weights },
                d_a,
                d_b,
                grads: &mut grads,
                d_weights: &mut d_weights,
            });
        }
        Oracle.route_backward(RouteBackward {
            forward: &self.route(&params, &self.logits()),
            routing,
            d_weights: &d_weights,
            grads: &mut grads,
        });
        let terms: Vec<_> = (0..self.n_linears)
            .map(|i| LinearBackwardTerm {
                d_y: &d_y[i],
                weight: &self.weights[i],
                lora: Some((&lora[i].d_z, &mixed[i].a, segments)),
            })
            .collect();
        let d_x = Oracle.linear_backward(LinearBackward { terms: &terms, d_residual: None });
        (grads.buffer.to_vec(), d_x.buffer.to_vec())
    }
}

#[test]
fn gradients_of_the_routed_lora() {
    let (n_splits, n_skills, rows) = (2, 3, 3);
    let u: Vec<f64> = random(1, 2 * rows * n_splits * n_skills);
    let u: Vec<f64> = u.iter().map(|u| u / 2.0 + 0.5).collect();
    let key = Key::new(1, Purpose::Router, 1);
    let noises = [Noise::Off, Noise::Given(&u), Noise::Philox { key, examples: &[5, 6, 7] }];
    let average_correction = Weighting { average_correction: true, ..Weighting::default() };
    let weightings = [Weighting::default(), average_correction];
    let cases = noises.into_iter().flat_map(|noise| [(noise, 1), (noise, 2)]);
    for ((noise, n_splits), weighting) in cases.flat_map(|case| weightings.map(|w| (case, w))) {
        let model = Routed {
            n_linears: 2,
            n_tasks: 4,
            n_splits,
            n_skills: n_skills * 2 / n_splits,
            rank: 2,
            d_in: 4,
            d_out: 6,
            tasks: &[3, 0, 3],
            segments: Segments::new(&[2, 1, 0, 3], &[2, 0, 1, 2], rows),
            weights: (0..2).map(|i| weight(&random(10 + i, 24), 6, 4)).collect(),
            noise,
            weighting,
            scale: 0.5,
        };
        let params = random(2, 2 * model.len_of_one());
        let x = random(3, 6 * 4);
        let d_y: Vec<_> = (0..2).map(|i| tensor(&random(20 + i, 36), 6, 6)).collect();
        let loss = |params: &[f64], x: &[f64]| {
            let y = model.forward(params, x).y;
            dot(&y[0].buffer, &d_y[0].buffer) + dot(&y[1].buffer, &d_y[1].buffer)
        };
        let (d_params, d_x) = model.backward(&params, &x, &model.forward(&params, &x), &d_y);
        assert_gradient("d_params", &params, &d_params, |params| loss(params, &x));
        assert_gradient("d_x", &x, &d_x, |x| loss(&params, x));
    }
}

#[test]
fn gradients_of_routing_and_its_clamps() {
    let u = [0.0, 0.2, 0.5, 0.9, 1.0 - f64::powi(2.0, -24), 0.3];
    for noise in [Noise::Off, Noise::Given(&u)] {
        let logits = [0.3, 20.0, -20.0, -1.0, 8.0, 2.0];
        fn route<'a>(params: &'a Tensor<Oracle>, noise: Noise<'a>) -> Route<'a, Oracle> {
            let weighting = Weighting::default();
            Route { params, logits: &[0], tasks: &[0], n_splits: 2, n_skills: 3, noise, weighting }
        }
        let params = tensor(&logits, 1, 6);
        let forward = route(&params, noise);
        let routing = Oracle.route(&forward);
        let d_weights = tensor(&random(1, 6), 1, 6);
        let mut grads = Oracle.zeros(1, 6, Precision::Full);
        let args = RouteBackward {
            forward: &forward,
            routing: &routing,
            d_weights: &d_weights,
            grads: &mut grads,
        };
        Oracle.route_backward(args);
        assert_gradient("d_logits", &logits, &grads.buffer, |logits| {
            let params = tensor(logits, 1, 6);
            dot(&Oracle.route(&route(&params, noise)).weights.buffer, &d_weights.buffer)
        });
    }
}

/// The authors' selector (mttl, in PyTorch 2.11 in f64: `p + (round(p) - p).detach()`, then times
/// sqrt(n_splits / n_skills) or over the sum + 1e-12), forward and backward.
#[test]
fn weightings_are_those_of_the_authors() {
    let logits = [0.3, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.2, -0.7, 0.1, 0.9, -0.2];
    let d_weights = [1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, 0.0, 0.75, -1.5, 0.5, 1.0];
    let on_off = [1.0, 1.0, 0.0].repeat(4);
    let corrected = [
        0.4690303509,
        0.5969068299,
        0.219589751,
        0.7191678027,
        0.5082359157,
        0.3082606652,
        0.6675467645,
        0.4489375789,
        0.2709235495,
        0.4286437116,
        0.5804878381,
        0.367559002,
    ];
    let d_corrected = [
        0.1995993757,
        -0.3210659425,
        0.0802664856,
        0.2571807105,
        -0.1918797275,
        0.0479699319,
        0.2435551363,
        0.0,
        0.1357708522,
        -0.3054220263,
        0.0838951492,
        0.2020964353,
    ];
    let d_rounded = [
        0.1833437338,
        -0.1474589499,
        0.0983059666,
        0.1049935854,
        -0.2350037122,
        -0.0881263921,
        0.074573226,
        -0.1237582864,
        -0.0277141092,
        -0.1246880201,
        0.1027501537,
        0.1856374295,
    ];
    let scaled = |factor: f64| on_off.iter().map(|w| w * factor).collect::<Vec<_>>();
    for (straight_through, average_correction, weights, d_logits) in [
        (false, true, corrected.to_vec(), d_corrected),
        (true, false, scaled(0.5), d_rounded),
        (true, true, scaled(0.8164965809), d_corrected),
    ] {
        let params = tensor(&logits, 1, 12);
        let forward = Route {
            params: &params,
            logits: &[0],
            tasks: &[0, 1],
            n_splits: 2,
            n_skills: 3,
            noise: Noise::Off,
            weighting: Weighting { straight_through, average_correction },
        };
        let routing = Oracle.route(&forward);
        assert_near("weights", &routing.weights.buffer, &weights, 1e-9);
        let mut grads = Oracle.zeros(1, 12, Precision::Full);
        Oracle.route_backward(RouteBackward {
            forward: &forward,
            routing: &routing,
            d_weights: &tensor(&d_weights, 2, 6),
            grads: &mut grads,
        });
        assert_near("d_logits", &grads.buffer, &d_logits, 1e-9);
    }
}

/// Rounding has no gradient. What passes straight through is that of `v = v0 + s̃ - s̃0`, whose value is
/// the rounded one here and whose slope is that of the sample; a split with nothing on has a sum of 1.
#[test]
fn gradients_of_rounded_routing_are_those_of_the_sample() {
    let logits = [0.3, -2.0, 1.5, -1.0, -0.2, -3.0, 0.1, 8.0, 2.0];
    let draws = [0.4, 0.2, 0.5, 0.3, 0.1, 0.6, 0.9, 0.3, 0.8];
    for (noise, average_correction) in
        [Noise::Off, Noise::Given(&draws)].into_iter().flat_map(|n| [(n, false), (n, true)])
    {
        let weighting = Weighting { straight_through: true, average_correction };
        let run = |params: &[f64], weighting| {
            Oracle.route(&Route {
                params: &tensor(params, 1, 9),
                logits: &[0],
                tasks: &[0],
                n_splits: 3,
                n_skills: 3,
                noise,
                weighting,
            })
        };
        let routing = run(&logits, weighting);
        let rounded: Vec<f64> = routing.samples.buffer.iter().map(|s| s.round()).collect();
        assert!(rounded.chunks(3).any(|split| split == [0.0; 3]), "one has nothing on");
        assert_eq!(routing.weights.buffer[..], weighting.weights(&rounded, 3)[..]);
        let (params, d_weights) = (tensor(&logits, 1, 9), tensor(&random(1, 9), 1, 9));
        let mut grads = Oracle.zeros(1, 9, Precision::Full);
        Oracle.route_backward(RouteBackward {
            forward: &Route {
                params: &params,
                logits: &[0],
                tasks: &[0],
                n_splits: 3,
                n_skills: 3,
                noise,
                weighting,
            },
            routing: &routing,
            d_weights: &d_weights,
            grads: &mut grads,
        });
        assert_gradient("d_logits", &logits, &grads.buffer, |logits| {
            let samples = run(logits, weighting).samples;
            let values: Vec<f64> = (0..9)
                .map(|i| rounded[i] + samples.buffer[i] - routing.samples.buffer[i])
                .collect();
            let weights = values.chunks(3).zip(rounded.chunks(3)).flat_map(|(values, rounded)| {
                let any = rounded.contains(&1.0);
                let n = if any { values.iter().sum() } else { 1.0 };
                values.iter().map(move |v| if average_correction { *v } else { v / n })
            });
            dot(&weights.collect::<Vec<_>>(), &d_weights.buffer)
        });
    }
}

#[test]
fn a_routed_row_that_is_all_off_has_no_weight() {
    let params = tensor(&[-28.0, -28.0, -120.0, -120.0], 1, 4);
    let args = Route {
        params: &params,
        logits: &[0],
        tasks: &[0],
        n_splits: 2,
        n_skills: 2,
        noise: Noise::Off,
        weighting: Weighting::default(),
    };
    let weights = Oracle.route(&args).weights;
    assert!((weights.at(0, 0) + weights.at(0, 1) - 0.58).abs() < 0.01);
    assert!(weights.at(0, 2) < 1e-39);
}

#[test]
fn gradients_of_norm() {
    let (x, d_y, residual) = (random(1, 15), tensor(&random(2, 15), 3, 5), random(3, 15));
    let (weight, bias, eps) = (weight(&random(4, 5), 1, 5), weight(&random(5, 5), 1, 5), 0.125);
    for (centered, bias) in [(false, None), (true, None), (true, Some(&bias))] {
        let norm = |x: &[f64]| {
            Oracle.norm(Norm { x: &tensor(x, 3, 5), weight: &weight, bias, centered, eps })
        };
        let Normed { y, stats } = norm(&x);
        let (x_tensor, d_residual) = (tensor(&x, 3, 5), Some(tensor(&residual, 3, 5)));
        let (x_tensor, weight, stats) = (&x_tensor, &weight, &stats);
        let again = Oracle.norm_again(NormAgain { x: x_tensor, weight, bias, stats });
        assert_eq!(y.buffer, again.buffer);
        let args = NormBackward { x: x_tensor, weight, stats, d_y: &d_y, d_residual };
        let d_x = Oracle.norm_backward(args);
        assert_gradient("norm", &x, &d_x.buffer, |x| {
            dot(&norm(x).y.buffer, &d_y.buffer) + dot(x, &residual)
        });
    }
}

#[test]
fn gradients_of_rope() {
    let angles = random(1, 5 * 3);
    let table: Vec<f64> = (0..5 * 6)
        .map(|i| match (i / 6, i % 6) {
            (position, pair) if pair < 3 => (9.0 * angles[position * 3 + pair]).cos(),
            (position, pair) => (9.0 * angles[position * 3 + pair - 3]).sin(),
        })
        .collect();
    let rotary = Rotary { table: tensor(&table, 5, 6) };
    let (x, d_y, positions) = (random(2, 4 * 12), random(3, 4 * 12), [4, 0, 1, 4]);
    let turned = |x: &[f64], inverse| {
        let x = tensor(x, 4, 12);
        Oracle.rope(Rope { x, rotary: &rotary, positions: &positions, inverse }).buffer.to_vec()
    };
    assert_gradient("rope", &x, &turned(&d_y, true), |x| dot(&turned(x, false), &d_y));
    assert_near("rope and back", &turned(&turned(&x, false), true), &x, 1e-14);
}

/// The score of a query and a key depends on the distance between them alone.
#[test]
fn rope_turns_by_position() {
    let frequencies = [1.0, 0.1];
    let table: Vec<f64> = (0..9)
        .flat_map(|position| {
            let angle = frequencies.map(|f| f * f64::from(position));
            angle.map(f64::cos).into_iter().chain(angle.map(f64::sin))
        })
        .collect();
    let rotary = Rotary { table: tensor(&table, 9, 4) };
    let at = |what, position| {
        let x = tensor(&random(what, 4), 1, 4);
        let args = Rope { x, rotary: &rotary, positions: &[position], inverse: false };
        Oracle.rope(args).buffer.to_vec()
    };
    let score = dot(&at(1, 5), &at(2, 3));
    assert!((dot(&at(1, 8), &at(2, 6)) - score).abs() < 1e-14);
    assert!((dot(&at(1, 8), &at(2, 5)) - score).abs() > 1e-3);
    assert_eq!(at(1, 0), random(1, 4));
}

#[test]
fn gradients_of_gather() {
    let (x, d_y, rows) = (random(1, 5 * 3), tensor(&random(2, 2 * 3), 2, 3), [4, 1]);
    let mut d_x = Oracle.zeros(5, 3, Precision::Activation);
    Oracle.cache_write(CacheWrite { cache: &mut d_x, source: &d_y, rows: &rows });
    assert_gradient("gather", &x, &d_x.buffer, |x| {
        dot(&Oracle.gather(Gather { x: &tensor(x, 5, 3), rows: &rows }).buffer, &d_y.buffer)
    });
}

#[test]
fn gradients_of_linear() {
    let (x, dropout) = (random(1, 12), dropout(3));
    let weights = [weight(&random(2, 20), 5, 4), weight(&random(3, 8), 2, 4)];
    let bias = weight(&random(4, 5), 1, 5);
    let residual = tensor(&random(5, 15), 3, 5);
    let d_y = [tensor(&random(6, 15), 3, 5), tensor(&random(7, 6), 3, 2)];
    let d_residual = random(8, 12);
    let loss = |x: &[f64]| {
        let projections = [
            Projection {
                bias: Some(&bias),
                dropout: Some(&dropout),
                residual: Some(&residual),
                ..Projection::plain(&weights[0])
            },
            Projection::plain(&weights[1]),
        ];
        let y = Oracle.linear(Linear {
            x: &tensor(x, 3, 4),
            projections: &projections,
            order: Order::Dot,
            output: Precision::Activation,
        });
        dot(&y[0].buffer, &d_y[0].buffer) + dot(&y[1].buffer, &d_y[1].buffer) + dot(x, &d_residual)
    };
    // Dropout is undone before the linear's own backward, as the tape does it.
    let d_y = [Oracle.dropout(&d_y[0], &dropout), d_y[1].clone()];
    let term = |i: usize| LinearBackwardTerm { d_y: &d_y[i], weight: &weights[i], lora: None };
    let d_x = Oracle.linear_backward(LinearBackward {
        terms: &[term(0), term(1)],
        d_residual: Some(tensor(&d_residual, 3, 4)),
    });
    assert_gradient("linear", &x, &d_x.buffer, loss);
}

#[test]
fn gradients_of_attention() {
    let head_dim = 3;
    let bias = RelativeBias { table: tensor(&random(1, 4 * 15), 4, 15), zero: 7 };
    let dropout = dropout(6);
    // Empty and one-token sequences, keys with room between, more queries than keys.
    let queries = Spans::packed(&[3, 0, 1, 2]);
    let keys = Spans { starts: vec![1, 5, 7, 12], lens: vec![4, 2, 5, 1] };
    for n_kv_heads in [4, 2, 1] {
        for variant in 0..10 {
            let (n_q, n_kv) = (6 * 4 * head_dim, 14 * n_kv_heads * head_dim);
            let (q, k, v) = (random(2, n_q), random(3, n_kv), random(4, n_kv));
            let d_o = tensor(&random(5, n_q), 6, 4 * head_dim);
            let tensors = |q: &[f64], k: &[f64], v: &[f64]| {
                let kv = |kv: &[f64]| tensor(kv, 14, n_kv_heads * head_dim);
                (tensor(q, 6, 4 * head_dim), kv(k), kv(v))
            };
            let inputs = tensors(&q, &k, &v);
            let with = |(q, k, v): &(Tensor<Oracle>, Tensor<Oracle>, Tensor<Oracle>),
                        run: &mut dyn FnMut(&Attention<'_, Oracle>)| {
                run(&Attention {
                    q,
                    k,
                    v,
                    queries: &queries,
                    keys: &keys,
                    n_heads: 4,
                    n_kv_heads,
                    head_dim,
                    scale: 0.5,
                    causal: variant & 1 != 0 || variant >= 8,
                    window: (variant >= 8).then_some(2),
                    bias: (variant & 2 != 0).then_some(&bias),
                    dropout: (variant & 4 != 0 || variant == 9).then_some(&dropout),
                });
            };
            let loss = |q: &[f64], k: &[f64], v: &[f64]| {
                let mut loss = 0.0;
                with(&tensors(q, k, v), &mut |args| {
                    loss = dot(&Oracle.attention(args).o.buffer, &d_o.buffer);
                });
                loss
            };
            let mut gradients = None;
            with(&inputs, &mut |forward| {
                let Attended { o, lse } = Oracle.attention(forward);
                let args = AttentionBackward { forward, o: &o, lse: &lse, d_o: &d_o };
                gradients = Some(Oracle.attention_backward(args));
            });
            let [d_q, d_k, d_v] = gradients.unwrap();
            let what = |name| format!("{name}, {n_kv_heads} key heads, variant {variant}");
            assert_gradient(&what("d_q"), &q, &d_q.buffer, |q| loss(q, &k, &v));
            assert_gradient(&what("d_k"), &k, &d_k.buffer, |k| loss(&q, k, &v));
            assert_gradient(&what("d_v"), &v, &d_v.buffer, |v| loss(&q, &k, v));
        }
    }
}

#[test]
fn one_query_at_a_time_with_a_cache_is_the_whole_sequence() {
    let all: Vec<Vec<f64>> = (1..4).map(|what| random(what, 5 * 2)).collect();
    let attend = |first: usize, n: usize| {
        let (queries, keys) = (Spans::packed(&[n]), Spans::packed(&[first + n]));
        let rows =
            |x: &[f64], from: usize| tensor(&x[2 * from..2 * (first + n)], first + n - from, 2);
        let bias = RelativeBias { table: tensor(&random(9, 9), 1, 9), zero: 4 };
        let attended = Oracle.attention(&Attention {
            q: &rows(&all[0], first),
            k: &rows(&all[1], 0),
            v: &rows(&all[2], 0),
            queries: &queries,
            keys: &keys,
            n_heads: 1,
            n_kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
            causal: true,
            window: Some(3),
            bias: Some(&bias),
            dropout: None,
        });
        attended.o.buffer.to_vec()
    };
    let one_by_one: Vec<f64> = (0..5).flat_map(|i| attend(i, 1)).collect();
    assert_eq!(attend(0, 5), one_by_one);
}

#[test]
fn gradients_of_gated() {
    let dropout = dropout(3);
    let (gate, up) = (random(1, 24), random(2, 24));
    let gate: Vec<f64> = gate.iter().map(|g| 5.0 * g).collect();
    let d_h = tensor(&random(3, 24), 3, 8);
    for activation in [Activation::Relu, Activation::GeluNew, Activation::Gelu, Activation::Silu] {
        for (has_up, dropout) in [(false, None), (true, None), (true, Some(&dropout))] {
            let loss = |gate: &[f64], up: &[f64]| {
                let (gate, up) = (tensor(gate, 3, 8), tensor(up, 3, 8));
                let up = has_up.then_some(&up);
                let h = Oracle.gated(&Gated { gate: &gate, up, activation, dropout });
                dot(&h.buffer, &d_h.buffer)
            };
            let (gate_tensor, up_tensor) = (tensor(&gate, 3, 8), tensor(&up, 3, 8));
            let args =
                Gated { gate: &gate_tensor, up: has_up.then_some(&up_tensor), activation, dropout };
            let (d_gate, d_up) = Oracle.gated_backward(&args, &d_h);
            let what = format!("{activation:?}");
            assert_gradient(&what, &gate, &d_gate.buffer, |gate| loss(gate, &up));
            assert_eq!(d_up.is_some(), has_up);
            if let Some(d_up) = d_up {
                assert_gradient(&what, &up, &d_up.buffer, |up| loss(&gate, up));
            }
        }
    }
}

#[test]
fn gradients_of_head_and_loss() {
    let (x, weight) = (random(1, 12), weight(&random(2, 28), 7, 4));
    let run = |x: &[f64], d_nll| {
        let (x, labels) = (&tensor(x, 3, 4), &[6, 0, 3]);
        Oracle.head_loss(HeadLoss { x, weight: &weight, labels, scale: 0.5, d_nll })
    };
    let d_x = run(&x, Some(0.25)).d_x.unwrap();
    assert_gradient("head_loss", &x, &d_x.buffer, |x| 0.25 * run(x, None).nll.iter().sum::<f64>());
}

#[test]
fn adamw_takes_the_textbook_step() {
    let mut state = [[1.0, 1.0, 1.0], [0.0; 3], [0.0; 3]].map(|values| tensor(&values, 1, 3));
    let [params, m, v] = &mut state;
    let grads = tensor(&[0.5, -0.25, 1.0], 1, 3);
    let groups = [ParamGroup { range: 0..2, lr: 0.125, weight_decay: 0.25 }];
    let (beta1, beta2) = (0.5, 0.75);
    for step in 1..3 {
        let (params, m, v) = (&mut *params, &mut *m, &mut *v);
        Oracle.adamw(AdamW {
            params,
            m,
            v,
            grads: &grads,
            groups: &groups,
            grad_scale: GradScale::Given(2.0),
            step,
            beta1,
            beta2,
            eps: 0.0,
        });
    }
    // With a constant gradient the corrected moments are the gradient and its square.
    let expected = |sign: f64| (0..2).fold(1.0, |p, _| p * (1.0 - 0.125 * 0.25) - 0.125 * sign);
    assert_near("params", &params.buffer, &[expected(1.0), expected(-1.0), 1.0], 1e-15);
    assert_near("m", &m.buffer, &[0.75, -0.375, 0.0], 1e-15);
}
