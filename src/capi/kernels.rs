//! The kernels alone: the grouped routed LoRA over the caller's buffers, which are read and written
//! in place.

use std::{
    ffi::{c_char, c_void},
    sync::Arc,
};

use super::{
    handles::{self, Handle},
    memory::{self, Lent, Versioned, optional_settings, optional_text, read, settings},
    model::{POLYTAPE_DTYPE_BF16, POLYTAPE_DTYPE_F16, POLYTAPE_DTYPE_F32, compute_dtype},
    status::{Failure, call},
};
use crate::{
    dtype::Dtype,
    kernels::{
        Backend, Precision,
        cpu::{Cpu, isa::Isa},
        ops::{
            Bank, Expand, ExpandRhs, Linear, LinearBackward, LinearBackwardTerm, LoraBackward,
            LoraTerm, Mix, Noise, Order, Projection, Route, RouteBackward, Routing, Segments,
            Shrink, ShrinkStacked, Stacked, Unmix, Weighting,
        },
        planner::Mode,
    },
    tensor::{Frozen, Tensor},
};

/// A CPU: an instruction set, threads and a compute type. Any thread may use it, several at a time.
pub struct polytape_kernels {
    _private: [u8; 0],
}

impl Handle for polytape_kernels {
    type Object = Cpu;
    const NAME: &'static str = "kernels";
}

/// How kernels compute. All zero but `size` is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_kernels_options {
    /// sizeof(polytape_kernels_options).
    pub size: usize,
    /// The POLYTAPE_DTYPE_ of activations: F32 (also where it is AUTO) or BF16.
    pub dtype: u32,
    /// Threads; 0: one a core.
    pub n_threads: u32,
    /// "scalar", "avx2", "avx512" or "amx"; null: what the environment variable POLYTAPE_ISA names, or
    /// where it is not set the fastest that this CPU has.
    pub isa: *const c_char,
}

impl Default for polytape_kernels_options {
    fn default() -> Self {
        Self { size: size_of::<Self>(), dtype: 0, n_threads: 0, isa: std::ptr::null() }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and a pointer.
unsafe impl Versioned for polytape_kernels_options {
    const NAME: &'static str = "polytape_kernels_options";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// Kernels on this CPU. `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_kernels_new(
    options: *const polytape_kernels_options,
    kernels: *mut *mut polytape_kernels,
) -> i32 {
    call(|| {
        memory::check_place(kernels, "kernels")?;
        let options = optional_settings(options)?;
        let dtype = compute_dtype(options.dtype)?.unwrap_or(Dtype::F32);
        let isa = match optional_text(options.isa, "isa")? {
            None => Isa::detect()?,
            Some(name) => {
                Isa::available().into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
                    let message = format!("this CPU has no instruction set {name:?}");
                    Failure::new(super::POLYTAPE_NO_DEVICE, message)
                })?
            }
        };
        let made = Cpu::with_isa(isa, dtype, options.n_threads as usize)?;
        memory::put(kernels, handles::give(made), "kernels")
    })
}

/// Frees kernels; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_kernels_free(kernels: *mut polytape_kernels) -> i32 {
    call(|| handles::free(kernels))
}

/// Routers: the arguments of polytape_route and polytape_route_backward.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_router {
    /// sizeof(polytape_router).
    pub size: usize,
    /// Parameters, [n_params]: somewhere in them each linear's router logits
    /// [n_tasks, n_splits * n_skills].
    pub params: *const f32,
    /// Their number.
    pub n_params: usize,
    /// Where each linear's logits start, [n_linears].
    pub logits: *const usize,
    /// Linears.
    pub n_linears: usize,
    /// Rows of the router.
    pub n_tasks: usize,
    /// Splits.
    pub n_splits: usize,
    /// Skills.
    pub n_skills: usize,
    /// The task of each routing row, [n_rows].
    pub tasks: *const u32,
    /// Routing rows.
    pub n_rows: usize,
    /// Uniform draws in [0, 1) of relaxed Bernoulli routing, [n_linears * n_rows, n_splits *
    /// n_skills]; null: plain sigmoid, as in inference.
    pub noise: *const f64,
}

impl Default for polytape_router {
    fn default() -> Self {
        Self {
            size: size_of::<Self>(),
            params: std::ptr::null(),
            n_params: 0,
            logits: std::ptr::null(),
            n_linears: 0,
            n_tasks: 0,
            n_splits: 0,
            n_skills: 0,
            tasks: std::ptr::null(),
            n_rows: 0,
            noise: std::ptr::null(),
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and pointers.
unsafe impl Versioned for polytape_router {
    const NAME: &'static str = "polytape_router";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// A product of sizes, if memory could have so many. A 0 does not excuse the others: parts of the
/// product are computed too.
fn product(sizes: &[usize], name: &str) -> Result<usize, Failure> {
    let all = sizes.iter().try_fold(1_usize, |all, &size| all.checked_mul(size.max(1)));
    all.filter(|&n| n <= isize::MAX as usize / 8)
        .map(|n| if sizes.contains(&0) { 0 } else { n })
        .ok_or_else(|| Failure::size(format!("{name} would have {sizes:?} elements")))
}

/// Checked arguments.
struct Router<'a> {
    params: Tensor<Cpu>,
    lent: Vec<(&'static str, Lent)>,
    args: polytape_router,
    logits: &'a [usize],
    tasks: &'a [u32],
    noise: Option<&'a [f64]>,
    /// Elements of the mixing weights.
    n_weights: usize,
}

impl Router<'_> {
    fn new(cpu: &Cpu, router: *const polytape_router) -> Result<Self, Failure> {
        let args = settings(router)?;
        let logits = read(args.logits, args.n_linears, "logits")?;
        let tasks = read(args.tasks, args.n_rows, "tasks")?;
        let polytape_router { n_linears, n_rows, n_tasks, n_splits, n_skills, .. } = args;
        if n_skills == 0 || n_splits == 0 {
            return Err(Failure::usage("n_skills and n_splits must be at least 1"));
        }
        let n_weights = product(&[n_linears, n_rows, n_splits, n_skills], "the weights")?;
        let table = product(&[n_tasks, n_splits, n_skills], "the logits")?;
        let inside =
            |&start: &usize| start.checked_add(table).is_some_and(|end| end <= args.n_params);
        if !logits.iter().all(inside) {
            let n = args.n_params;
            return Err(Failure::size(format!(
                "logits of {table} elements are not inside the {n} parameters"
            )));
        }
        if let Some(task) = tasks.iter().find(|&&task| task as usize >= n_tasks) {
            return Err(Failure::usage(format!("task {task} of {n_tasks}")));
        }
        let noise = match args.noise.is_null() {
            true => None,
            false => Some(read(args.noise, n_weights, "noise")?),
        };
        let params = Lent::read(args.params, args.n_params, "params")?;
        let lent = vec![
            ("params", params.again()),
            ("logits", Lent::read(args.logits, n_linears, "logits")?),
            ("tasks", Lent::read(args.tasks, n_rows, "tasks")?),
            ("noise", Lent::read(args.noise, noise.map_or(0, <[f64]>::len), "noise")?),
        ];
        let params = cpu.lend(params, 1, args.n_params, Precision::Full)?;
        Ok(Self { params, lent, args, logits, tasks, noise, n_weights })
    }

    fn route(&self) -> Route<'_, Cpu> {
        Route {
            params: &self.params,
            logits: self.logits,
            tasks: self.tasks,
            n_splits: self.args.n_splits,
            n_skills: self.args.n_skills,
            noise: self.noise.map_or(Noise::Off, Noise::Given),
            weighting: Weighting::default(),
        }
    }
}

/// Mixing weights of every routing row in every linear: `weights` and `samples` are
/// [n_linears * n_rows, n_splits * n_skills], `samples` what the backward wants beside.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_route(
    kernels: *const polytape_kernels,
    router: *const polytape_router,
    weights: *mut f32,
    samples: *mut f32,
) -> i32 {
    call(|| {
        let cpu = handles::object(kernels)?;
        let mut router = Router::new(&cpu, router)?;
        router.lent.push(("weights", Lent::write(weights, router.n_weights, "weights")?));
        router.lent.push(("samples", Lent::write(samples, router.n_weights, "samples")?));
        Lent::check_apart(&router.lent)?;
        let found = cpu.route(&router.route());
        for (to, from) in [(weights, found.weights), (samples, found.samples)] {
            copy(memory::write(to, router.n_weights, "weights")?, &cpu.download(&from));
        }
        Ok(())
    })
}

fn copy(to: &mut [f32], from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = from as f32);
}

/// Adds the gradient of the router logits to `grads`, [n_params] as the parameters. `d_weights` is the
/// gradient of the mixing weights; all three are [n_linears * n_rows, n_splits * n_skills].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_route_backward(
    kernels: *const polytape_kernels,
    router: *const polytape_router,
    weights: *const f32,
    samples: *const f32,
    d_weights: *const f32,
    grads: *mut f32,
) -> i32 {
    call(|| {
        let cpu = handles::object(kernels)?;
        let mut router = Router::new(&cpu, router)?;
        let (n, width) = (router.n_weights, router.args.n_splits * router.args.n_skills);
        let (rows, n_params) = (n / width, router.args.n_params);
        let mut lend = |pointer, name: &'static str| {
            let lent = Lent::read(pointer, n, name)?;
            router.lent.push((name, lent.again()));
            Ok::<_, Failure>(cpu.lend(lent, rows, width, Precision::Full)?)
        };
        let routing =
            Routing { weights: lend(weights, "weights")?, samples: lend(samples, "samples")? };
        let d_weights = lend(d_weights, "d_weights")?;
        let lent = Lent::write(grads, n_params, "grads")?;
        router.lent.push(("grads", lent.again()));
        Lent::check_apart(&router.lent)?;
        let mut grads = cpu.lend(lent, 1, n_params, Precision::Full)?;
        cpu.route_backward(RouteBackward {
            forward: &router.route(),
            routing: &routing,
            d_weights: &d_weights,
            grads: &mut grads,
        });
        Ok(())
    })
}

/// A routed linear: y = x·Wᵀ + bias + (1/rank) x·Â·B̂, the pair Â, B̂ mixed for each routing row.
/// Activations (x, y and their gradients) are of the kernels' dtype, row-major; all else is f32.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_routed_linear {
    /// sizeof(polytape_routed_linear).
    pub size: usize,
    /// Parameters, [n_params]: somewhere in them A [n_splits, n_skills, d_in / n_splits, rank] and
    /// B [n_splits, n_skills, rank, d_out / n_splits], as PEFT has them.
    pub params: *const f32,
    /// Their number.
    pub n_params: usize,
    /// First element of A.
    pub a_start: usize,
    /// First element of B.
    pub b_start: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
    /// Rank.
    pub rank: usize,
    /// Splits; divides both widths.
    pub n_splits: usize,
    /// Skills.
    pub n_skills: usize,
    /// Mixing weights, [n_rows, n_splits * n_skills].
    pub mixing_weights: *const f32,
    /// Routing rows.
    pub n_rows: usize,
    /// The number of tokens of each sequence, [n_sequences]; `n_tokens` below is their sum.
    pub lens: *const usize,
    /// The routing row of each sequence, [n_sequences].
    pub rows: *const usize,
    /// Sequences, one after the other.
    pub n_sequences: usize,
    /// [n_tokens, d_in].
    pub x: *const c_void,
    /// The frozen weight, [d_out, d_in], at any alignment; null: the routed LoRA alone.
    pub weight: *const c_void,
    /// [d_out], of the weight's type; null: none.
    pub bias: *const c_void,
    /// The POLYTAPE_DTYPE_ of weight and bias: F32, BF16 or F16.
    pub weight_dtype: u32,
    /// 0.
    pub reserved: u32,
}

impl Default for polytape_routed_linear {
    fn default() -> Self {
        Self {
            size: size_of::<Self>(),
            params: std::ptr::null(),
            n_params: 0,
            a_start: 0,
            b_start: 0,
            d_in: 0,
            d_out: 0,
            rank: 0,
            n_splits: 0,
            n_skills: 0,
            mixing_weights: std::ptr::null(),
            n_rows: 0,
            lens: std::ptr::null(),
            rows: std::ptr::null(),
            n_sequences: 0,
            x: std::ptr::null(),
            weight: std::ptr::null(),
            bias: std::ptr::null(),
            weight_dtype: POLYTAPE_DTYPE_F32,
            reserved: 0,
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and pointers.
unsafe impl Versioned for polytape_routed_linear {
    const NAME: &'static str = "polytape_routed_linear";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// Checked arguments, lent for one call.
struct RoutedLinear {
    cpu: Arc<Cpu>,
    bank: Bank,
    segments: Segments,
    params: Tensor<Cpu>,
    weights: Tensor<Cpu>,
    x: Tensor<Cpu>,
    weight: Frozen,
    bias: Option<Frozen>,
    lent: Vec<(&'static str, Lent)>,
    n_params: usize,
    has_weight: bool,
}

impl RoutedLinear {
    fn new(cpu: Arc<Cpu>, args: *const polytape_routed_linear) -> Result<Self, Failure> {
        let args = settings(args)?;
        let bank = bank(&args)?;
        let Bank { n_splits, n_skills, d_in, d_out, .. } = bank;
        let lens = read(args.lens, args.n_sequences, "lens")?;
        let rows = read(args.rows, args.n_sequences, "rows")?;
        let n_tokens = lens.iter().try_fold(0_usize, |all, &len| all.checked_add(len));
        let n_tokens = n_tokens.ok_or_else(|| Failure::size("lens add up to too much"))?;
        if let Some(row) = rows.iter().find(|&&row| row >= args.n_rows) {
            return Err(Failure::usage(format!("routing row {row} of {}", args.n_rows)));
        }
        product(&[n_tokens, d_in.max(d_out).max(bank.rank)], "activations")?;
        product(&[args.n_rows, d_in.max(d_out), bank.rank], "mixed pairs")?;
        let width = product(&[n_splits, n_skills], "a row of weights")?;
        let n_weights = product(&[args.n_rows, width], "mixing_weights")?;
        let mut lent = Vec::new();
        let mut note = |name, memory: Lent| {
            lent.push((name, memory.again()));
            memory
        };
        let full = Precision::Full;
        let params = note("params", Lent::read(args.params, args.n_params, "params")?);
        let params = cpu.lend(params, 1, args.n_params, full)?;
        let weights = Lent::read(args.mixing_weights, n_weights, "mixing_weights")?;
        let weights = cpu.lend(note("mixing_weights", weights), args.n_rows, width, full)?;
        let x = note("x", activations(&cpu, args.x.cast_mut(), n_tokens * d_in, false, "x")?);
        let x = cpu.lend(x, n_tokens, d_in, Precision::Activation)?;
        let dtype = match args.weight_dtype {
            POLYTAPE_DTYPE_F32 => Dtype::F32,
            POLYTAPE_DTYPE_BF16 => Dtype::Bf16,
            POLYTAPE_DTYPE_F16 => Dtype::F16,
            other => return Err(Failure::usage(format!("weight_dtype {other} is none"))),
        };
        let mut frozen = |pointer: *const c_void, rows: usize, cols: usize, name: &'static str| {
            let n_bytes = product(&[rows, cols, dtype.size_bytes()], name)?;
            let memory = note(name, Lent::read(pointer.cast::<u8>(), n_bytes, name)?);
            Ok::<_, Failure>(Frozen::new(Arc::new(memory), 0..n_bytes, dtype, rows, cols))
        };
        let has_weight = !args.weight.is_null();
        // Without a weight the product has no terms.
        let weight = frozen(args.weight, d_out, if has_weight { d_in } else { 0 }, "weight")?;
        let bias = match args.bias.is_null() {
            true => None,
            false => Some(frozen(args.bias, 1, d_out, "bias")?),
        };
        let (segments, n_params) = (Segments::new(lens, rows, args.n_rows), args.n_params);
        Ok(Self {
            cpu,
            bank,
            segments,
            params,
            weights,
            x,
            weight,
            bias,
            lent,
            n_params,
            has_weight,
        })
    }

    fn stacked(&self) -> Stacked<'_, Cpu> {
        Stacked { bank: self.bank, params: &self.params, weights: &self.weights }
    }

    fn scale(&self) -> f32 {
        1.0 / self.bank.rank as f32
    }

    fn n_tokens(&self) -> usize {
        self.segments.n_tokens()
    }

    /// `z = scale * x·Â`, then `y`.
    fn forward(&self, add: bool, y: Tensor<Cpu>, z: &mut [f32]) -> Result<(), Failure> {
        let (cpu, segments, order) = (&*self.cpu, &self.segments, Order::Panel);
        let mode = Mode::for_tokens(segments.n_tokens(), segments.n_rows(), self.bank.n_skills);
        let pair = (mode == Mode::Mixed)
            .then(|| cpu.mix(Mix { stacked: self.stacked(), n_rows: segments.n_rows() }));
        let (stacked, scale, x) = (self.stacked(), self.scale(), &self.x);
        let hidden = match &pair {
            Some(pair) => {
                let mixed_a = &[&pair.a];
                cpu.shrink(Shrink { x, mixed_a, segments, scale, order }).remove(0)
            }
            None => cpu.shrink_stacked(ShrinkStacked { x, stacked, segments, scale }),
        };
        let rhs = pair.as_ref().map_or(ExpandRhs::Stacked(stacked), |p| ExpandRhs::Mixed(&p.b));
        let nothing;
        let x = if self.has_weight {
            x
        } else {
            nothing = cpu.zeros(self.n_tokens(), 0, Precision::Activation);
            &nothing
        };
        let projection = Projection {
            bias: self.bias.as_ref(),
            lora: Some(Expand { z: &hidden, segments, rhs }),
            ..Projection::plain(&self.weight)
        };
        let output = Precision::Activation;
        let args = Linear { x, projections: &[projection], order, output };
        cpu.linear_into(args, add, &mut [y]);
        if !z.is_empty() {
            copy(z, &cpu.download(&hidden));
        }
        Ok(())
    }
}

/// Where A and B lie, if they lie in the parameters.
fn bank(args: &polytape_routed_linear) -> Result<Bank, Failure> {
    let &polytape_routed_linear { d_in, d_out, rank, n_splits, n_skills, .. } = args;
    for (name, value) in [
        ("rank", rank),
        ("n_splits", n_splits),
        ("n_skills", n_skills),
        ("d_in", d_in),
        ("d_out", d_out),
    ] {
        if value == 0 {
            return Err(Failure::usage(format!("{name} is 0")));
        }
    }
    if !d_in.is_multiple_of(n_splits) || !d_out.is_multiple_of(n_splits) {
        return Err(Failure::usage(format!(
            "n_splits {n_splits} does not divide d_in {d_in} and d_out {d_out}"
        )));
    }
    product(&[n_skills, d_in.max(d_out), rank], "a bank")?;
    let (a_start, b_start) = (args.a_start, args.b_start);
    let bank = Bank { linear: 0, a_start, b_start, n_splits, n_skills, d_in, d_out, rank };
    let ends = [(a_start, bank.a_len()), (b_start, bank.b_len())]
        .map(|(start, len)| start.checked_add(len).filter(|&end| end <= args.n_params));
    let [Some(a_end), Some(b_end)] = ends else {
        let n = args.n_params;
        return Err(Failure::size(format!(
            "A or B ({} and {} elements) is not inside the {n} parameters",
            bank.a_len(),
            bank.b_len()
        )));
    };
    if a_start < b_end && b_start < a_end {
        return Err(Failure::size("A and B overlap"));
    }
    Ok(bank)
}

/// Activations of the kernels' dtype.
fn activations(
    cpu: &Cpu,
    pointer: *mut c_void,
    n: usize,
    writable: bool,
    name: &str,
) -> Result<Lent, Failure> {
    match (cpu.compute_dtype(), writable) {
        (Dtype::Bf16, false) => Lent::read(pointer.cast_const().cast::<u16>(), n, name),
        (Dtype::Bf16, true) => Lent::write(pointer.cast::<u16>(), n, name),
        (_, false) => Lent::read(pointer.cast_const().cast::<f32>(), n, name),
        (_, true) => Lent::write(pointer.cast::<f32>(), n, name),
    }
}

/// The forward. `y` is [n_tokens, d_out]; with `add` not 0 the result is added to what is in it. `z`
/// [n_tokens, rank] is what the backward wants; null: it is not wanted.
/// A routing row's A and B are mixed first, or its tokens go through all skills, whichever is less work
/// for the numbers of tokens, routing rows and skills of the call. The two sum in another order, so a
/// token's last bits may depend on how many are beside it. Those of an engine never do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_routed_linear_forward(
    kernels: *const polytape_kernels,
    linear: *const polytape_routed_linear,
    add: i32,
    y: *mut c_void,
    z: *mut f32,
) -> i32 {
    call(|| {
        let cpu = handles::object(kernels)?;
        let mut linear = RoutedLinear::new(Arc::clone(&cpu), linear)?;
        let (n_tokens, Bank { d_out, rank, .. }) = (linear.n_tokens(), linear.bank);
        let y = activations(&cpu, y, n_tokens * d_out, true, "y")?;
        linear.lent.push(("y", y.again()));
        let n_z = if z.is_null() { 0 } else { n_tokens * rank };
        linear.lent.push(("z", Lent::write(z, n_z, "z")?));
        Lent::check_apart(&linear.lent)?;
        let y = cpu.lend(y, n_tokens, d_out, Precision::Activation)?;
        let z = memory::write(z, n_z, "z")?;
        cpu.scope(|| linear.forward(add != 0, y, z))
    })
}

/// Where a backward leaves its gradients.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_routed_gradients {
    /// sizeof(polytape_routed_gradients).
    pub size: usize,
    /// Of A and B, [n_params] as the parameters; added to.
    pub params: *mut f32,
    /// Of the mixing weights, [n_rows, n_splits * n_skills]; added to.
    pub mixing_weights: *mut f32,
    /// Of x, [n_tokens, d_in]; null: it is not wanted.
    pub x: *mut c_void,
    /// Not 0: the gradient of x is added to what is there.
    pub add_to_x: u32,
    /// 0.
    pub reserved: u32,
}

impl Default for polytape_routed_gradients {
    fn default() -> Self {
        Self {
            size: size_of::<Self>(),
            params: std::ptr::null_mut(),
            mixing_weights: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            add_to_x: 0,
            reserved: 0,
        }
    }
}

// SAFETY: `repr(C)`, begins with `size`, numbers and pointers.
unsafe impl Versioned for polytape_routed_gradients {
    const NAME: &'static str = "polytape_routed_gradients";
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// The backward. `linear` is as it was in the forward, `z` [n_tokens, rank] what the forward gave,
/// `d_y` [n_tokens, d_out] the gradient of y.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polytape_routed_linear_backward(
    kernels: *const polytape_kernels,
    linear: *const polytape_routed_linear,
    z: *const f32,
    d_y: *const c_void,
    gradients: *const polytape_routed_gradients,
) -> i32 {
    call(|| {
        let cpu = handles::object(kernels)?;
        let mut linear = RoutedLinear::new(Arc::clone(&cpu), linear)?;
        let gradients = settings(gradients)?;
        let Bank { d_in, d_out, rank, n_splits, n_skills, .. } = linear.bank;
        let (n_tokens, n_rows) = (linear.n_tokens(), linear.segments.n_rows());
        let width = n_splits * n_skills;
        let z = Lent::read(z, n_tokens * rank, "z")?;
        let d_y = activations(&cpu, d_y.cast_mut(), n_tokens * d_out, false, "d_y")?;
        let params = Lent::write(gradients.params, linear.n_params, "gradients.params")?;
        let weights = Lent::write(gradients.mixing_weights, n_rows * width, "mixing_weights")?;
        let n_x = if gradients.x.is_null() { 0 } else { n_tokens * d_in };
        let d_x = activations(&cpu, gradients.x, n_x, true, "gradients.x")?;
        for (name, lent) in [
            ("z", &z),
            ("d_y", &d_y),
            ("gradients.params", &params),
            ("gradients.mixing_weights", &weights),
            ("gradients.x", &d_x),
        ] {
            linear.lent.push((name, lent.again()));
        }
        Lent::check_apart(&linear.lent)?;
        let z = cpu.lend(z, n_tokens, rank, Precision::Full)?;
        let d_y = cpu.lend(d_y, n_tokens, d_out, Precision::Activation)?;
        let mut grads = cpu.lend(params, 1, linear.n_params, Precision::Full)?;
        let mut d_weights = cpu.lend(weights, n_rows, width, Precision::Full)?;
        let mut d_x = match gradients.x.is_null() {
            true => None,
            false => Some(cpu.lend(d_x, n_tokens, d_in, Precision::Activation)?),
        };
        let add_to_x = gradients.add_to_x != 0;
        cpu.scope(|| {
            let (segments, scale, stacked) = (&linear.segments, linear.scale(), linear.stacked());
            let pair = cpu.mix(Mix { stacked, n_rows });
            let terms = &[LoraTerm { z: &z, d_y: &d_y, mixed_b: &pair.b }];
            let found = cpu.lora_backward(LoraBackward { x: &linear.x, terms, segments, scale });
            let found = &found[0];
            cpu.unmix(Unmix {
                stacked,
                d_a: &found.d_a,
                d_b: &found.d_b,
                grads: &mut grads,
                d_weights: &mut d_weights,
            });
            let Some(d_x) = &mut d_x else { return };
            let lora = Some((&found.d_z, &pair.a, segments));
            let (nothing, no_weight);
            let (d_y, weight) = if linear.has_weight {
                (&d_y, &linear.weight)
            } else {
                nothing = cpu.zeros(n_tokens, 0, Precision::Activation);
                no_weight = Frozen::from_f32(&[], 0, d_in, Dtype::F32);
                (&nothing, &no_weight)
            };
            let terms = &[LinearBackwardTerm { d_y, weight, lora }];
            cpu.linear_backward_into(LinearBackward { terms, d_residual: None }, add_to_x, d_x);
        });
        Ok(())
    })
}
