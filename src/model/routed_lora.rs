//! The adapter: a bank of skills (A, B) and router logits for every adapted linear.
//!
//! ```text
//! y = x·Wᵀ + (1/r) x·Â·B̂      Â[q] = Σ_s w[q,s] A[q,s]      B̂[q] = Σ_s w[q,s] B[q,s]
//! w[q,·] = s̃[q,·] / (Σ_s s̃[q,s] + 1e-12)                     s̃ = relaxed Bernoulli(Z[task]) or σ(Z[task])
//! ```
//!
//! ([`Weighting`](crate::weighting::Weighting) has the authors' other ways from s̃ to w.)
//!
//! All parameters are one flat f32 vector: A and B of every linear in the base's order, then every
//! linear's router logits. So clipping and the optimiser are one pass, and the two learning rates
//! are two ranges.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    ops::Range,
    path::Path,
};

use super::{
    Mixing, Model,
    routing::{self, InitA, ON, Routing},
    targets::{self, Target},
};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::{self, AdapterFiles, AdapterModule, save_with_routing},
        poly_config::{self, PolyConfig, TargetModules},
        tasks::TaskNames,
    },
    kernels::{
        Backend, Precision,
        ops::{self, Bank, Key, Mix, Noise, Route, Stacked},
        philox::Purpose,
        planner::Mode,
    },
    tape::{Adapted, Mixture},
    tensor::Tensor,
};

/// A Poly / MHR adapter on a base.
pub struct Adapter<B: Backend> {
    config: PolyConfig,
    routing: Routing,
    targets: Vec<Target>,
    /// By the number of the base's linear; one more for the head.
    banks: Vec<Option<Bank>>,
    /// By bank: where its router's logits start. Banks that share a router share the place.
    logits: Vec<usize>,
    params: Tensor<B>,
    tasks: Option<TaskNames>,
}

impl<B: Backend> fmt::Debug for Adapter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter")
            .field("config", &self.config)
            .field("linears", &self.targets.len())
            .finish_non_exhaustive()
    }
}

impl<B: Backend> Adapter<B> {
    /// A fresh adapter: A uniform in ±1/sqrt(d_in / n_splits), B zero (or uniform in ±1/sqrt(r) with
    /// `init_weights` off), router logits uniform in ±0.001, as PEFT.
    ///
    /// # Errors
    /// If the configuration is out of range, matches nothing or does not fit the base.
    pub fn new(base: &Model<B>, config: &PolyConfig, seed: u64) -> Result<Self> {
        Self::with_routing(base, config, Routing::default(), InitA::default(), seed)
    }

    /// A fresh adapter whose linears may share routers, and whose A may begin otherwise.
    ///
    /// # Errors
    /// As [`Adapter::new`].
    pub fn with_routing(
        base: &Model<B>,
        config: &PolyConfig,
        routing: Routing,
        init_a: InitA,
        seed: u64,
    ) -> Result<Self> {
        let (mut adapter, n) = Self::layout(base, config, routing)?;
        let key = Key::new(seed, Purpose::Init, 0);
        let mut values = vec![0.0; n];
        let mut draw = 0;
        let mut fill = |range: &mut [f64], bound: f64| {
            for value in range {
                *value = (2.0 * f64::from(key.uniform(draw)) - 1.0) * bound;
                draw += 1;
            }
        };
        let PolyConfig { r, n_tasks, n_skills, n_splits, init_weights, .. } = *config;
        for (bank, &logits) in adapter.banks.iter().flatten().zip(&adapter.logits) {
            fill(&mut values[bank.a()], init_a.bound(bank.d_in, n_splits));
            if !init_weights {
                fill(&mut values[bank.b()], (r as f64).powf(-0.5));
            }
            fill(&mut values[logits..logits + n_tasks * n_splits * n_skills], 1e-3);
        }
        adapter.params = base.backend().upload(&values, 1, n, Precision::Full);
        Ok(adapter)
    }

    /// The same adapter on the same base elsewhere, with parameters that are not written yet.
    pub(crate) fn on<C: Backend>(&self, base: &Model<C>) -> Adapter<C> {
        let Self { config, routing, targets, banks, logits, params, tasks } = self;
        Adapter {
            config: config.clone(),
            routing: *routing,
            targets: targets.clone(),
            banks: banks.clone(),
            logits: logits.clone(),
            params: base.backend().room(params.rows(), params.cols(), Precision::Full),
            tasks: tasks.clone(),
        }
    }

    /// Loads a PEFT adapter folder onto a base.
    ///
    /// # Errors
    /// If the folder is malformed or the adapter is of another base: the message names the module,
    /// what the base has and what the adapter has.
    pub fn open(base: &Model<B>, dir: impl AsRef<Path>) -> Result<Self> {
        let files = AdapterFiles::open(dir)?;
        let routing = Routing::open(&files.dir)?;
        Self::from_files(base, files, routing)
    }

    /// Loads what a folder has onto a base.
    pub(crate) fn from_files(
        base: &Model<B>,
        files: AdapterFiles,
        routing: Routing,
    ) -> Result<Self> {
        let (mut adapter, n) = Self::layout(base, &files.config, routing)
            .map_err(|error| error.in_file(&files.dir.join(poly_config::FILE_NAME)))?;
        let path = files.dir.join(adapter::FILE_NAME);
        let missing: Vec<_> = adapter
            .targets
            .iter()
            .filter(|target| !files.modules.contains_key(&target.path))
            .map(|target| target.path.as_str())
            .collect();
        let known: BTreeMap<_, _> = adapter.targets.iter().map(|t| (t.path.as_str(), t)).collect();
        let unexpected: Vec<_> =
            files.modules.keys().filter(|name| !known.contains_key(name.as_str())).collect();
        if let Some(first) = missing.first() {
            return Err(Error::Tensors {
                path,
                detail: format!(
                    "{} of the linears that target_modules selects in this base have no tensors here, the first is {first}; the adapter is of another base or its configuration was changed",
                    missing.len()
                ),
            });
        }
        if let Some(first) = unexpected.first() {
            return Err(Error::Tensors {
                path,
                detail: format!(
                    "{} modules are not linears that target_modules selects in this base, the first is {first}; the adapter is of another base or its configuration was changed",
                    unexpected.len()
                ),
            });
        }
        let mut values = vec![0.0; n];
        let set = |to: &mut [f64], from: &[f32]| {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = f64::from(from));
        };
        for (target, (bank, &logits)) in
            adapter.targets.iter().zip(adapter.banks.iter().flatten().zip(&adapter.logits))
        {
            let module = &files.modules[&target.path];
            for (part, expected, found) in
                [("input", target.d_in, module.d_in()), ("output", target.d_out, module.d_out())]
            {
                if expected != found {
                    return Err(Error::Tensors {
                        path,
                        detail: format!(
                            "the adapter of {} has {part} width {found}, the base's linear has {expected}; the adapter is of another base",
                            target.path
                        ),
                    });
                }
            }
            set(&mut values[bank.a()], &module.lora_a.values);
            set(&mut values[bank.b()], &module.lora_b.values);
            set(&mut values[logits..], &module.router_logits);
        }
        for (target, &logits) in adapter.targets.iter().zip(&adapter.logits) {
            let own = &files.modules[&target.path].router_logits;
            let shared = &values[logits..logits + own.len()];
            if shared.iter().zip(own).any(|(shared, &own)| *shared != f64::from(own)) {
                return Err(Error::Tensors {
                    path,
                    detail: format!(
                        "the router logits of {} differ from those of the linears that share its router; {} was changed, or the adapter was trained elsewhere: remove that file to give each linear its own",
                        target.path,
                        routing::FILE_NAME
                    ),
                });
            }
        }
        adapter.params = base.backend().upload(&values, 1, n, Precision::Full);
        adapter.tasks = files.tasks;
        Ok(adapter)
    }

    /// Places of all parameters, and how many they are.
    fn layout(base: &Model<B>, config: &PolyConfig, routing: Routing) -> Result<(Self, usize)> {
        let modules = base.modules();
        let (targets, written) = targets::resolve(config, modules, base.default_targets())?;
        let PolyConfig { r: rank, n_tasks, n_skills, n_splits, .. } = *config;
        let mut banks = vec![None; base.n_linears() + 1];
        let mut at = 0;
        for (linear, target) in targets.iter().enumerate() {
            let &Target { index, d_in, d_out, .. } = target;
            let a_start = at;
            let b_start = a_start + n_skills * d_in * rank;
            at = b_start + n_skills * d_out * rank;
            let bank = Bank { linear, a_start, b_start, n_splits, n_skills, d_in, d_out, rank };
            banks[index] = Some(bank);
        }
        let n_logits = n_tasks * n_splits * n_skills;
        let mut routers: HashMap<String, usize> = HashMap::new();
        let mut router = |path: &str| {
            let next = at + routers.len() * n_logits;
            *routers.entry(routing.granularity.router_of(path)).or_insert(next)
        };
        let logits = targets.iter().map(|target| router(&target.path)).collect();
        let n = at + routers.len() * n_logits;
        let config = PolyConfig { target_modules: Some(written), ..config.clone() };
        let params = base.backend().zeros(0, 0, Precision::Full);
        Ok((Self { config, routing, targets, banks, logits, params, tasks: None }, n))
    }

    /// A copy that changes apart from this one.
    pub fn copy(&self, backend: &B) -> Self {
        Self {
            config: self.config.clone(),
            routing: self.routing,
            targets: self.targets.clone(),
            banks: self.banks.clone(),
            logits: self.logits.clone(),
            params: backend.copy(&self.params),
            tasks: self.tasks.clone(),
        }
    }

    /// The configuration, with `target_modules` resolved.
    pub fn config(&self) -> &PolyConfig {
        &self.config
    }

    /// How it routes, where that is not PEFT's way.
    pub fn routing(&self) -> Routing {
        self.routing
    }

    /// Gives the routing instead of letting it learn: each task uses the skills that are listed for
    /// it, in equal parts, in every split of every linear.
    ///
    /// # Panics
    /// If there is not a list for each task, or a skill is not below `n_skills`.
    pub fn fix_routing(&mut self, base: &Model<B>, skills_of_tasks: &[Vec<usize>]) {
        let PolyConfig { n_tasks, n_skills, n_splits, .. } = self.config;
        assert_eq!(skills_of_tasks.len(), n_tasks, "a list for each task");
        let mut values = base.backend().download(&self.params);
        for start in self.routers() {
            for (task, skills) in skills_of_tasks.iter().enumerate() {
                let row = &mut values[start + task * n_splits * n_skills..][..n_splits * n_skills];
                row.fill(-ON);
                for split in row.chunks_exact_mut(n_skills) {
                    skills.iter().for_each(|&skill| split[skill] = ON);
                }
            }
        }
        self.params = base.backend().upload(&values, 1, values.len(), Precision::Full);
        self.routing.fixed = true;
    }

    /// Where each router's logits start.
    fn routers(&self) -> Vec<usize> {
        let mut routers = self.logits.clone();
        routers.sort_unstable();
        routers.dedup();
        routers
    }

    /// The adapted linears, in the base's order.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The names of the tasks, where they are known.
    pub fn tasks(&self) -> Option<&TaskNames> {
        self.tasks.as_ref()
    }

    /// The tasks: their names where they are known, and how many they are.
    pub fn task_names(&self) -> TaskNames {
        self.tasks.clone().unwrap_or_else(|| TaskNames::unnamed(self.config.n_tasks))
    }

    /// Gives the tasks names.
    pub fn set_tasks(&mut self, tasks: Option<TaskNames>) {
        self.tasks = tasks;
    }

    /// All parameters, flat: A and B of every linear, then every linear's router logits.
    pub fn params(&self) -> &Tensor<B> {
        &self.params
    }

    /// All parameters, for an optimiser.
    pub fn params_mut(&mut self) -> &mut Tensor<B> {
        &mut self.params
    }

    /// The number of parameters.
    pub fn n_params(&self) -> usize {
        self.params.len()
    }

    /// The number of A's and B's parameters; the rest are router logits.
    pub fn n_bank_params(&self) -> usize {
        self.logits.first().copied().unwrap_or(0)
    }

    /// Where the routing rows of these tasks lie in the flat vector, router by router.
    pub fn router_rows(&self, tasks: &[u32]) -> Vec<Range<usize>> {
        let width = self.config.n_splits * self.config.n_skills;
        let row = |start: usize, task: u32| {
            let first = start + task as usize * width;
            first..first + width
        };
        self.routers()
            .into_iter()
            .flat_map(|start| tasks.iter().map(move |&task| row(start, task)))
            .collect()
    }

    /// The logits of each split of each router.
    pub fn splits(&self) -> Vec<SplitLogits> {
        let PolyConfig { n_tasks, n_skills, n_splits, .. } = self.config;
        let split = |start: usize, q: usize| SplitLogits {
            first: start + q * n_skills,
            n_tasks,
            n_skills,
            stride: n_splits * n_skills,
        };
        self.routers()
            .into_iter()
            .flat_map(|start| (0..n_splits).map(move |q| split(start, q)))
            .collect()
    }

    /// The same adapter with one more task, whose routing rows are `fresh(router, column)`; A, B and
    /// the other rows keep their bits. The tasks stay without names.
    ///
    /// # Errors
    /// If there can be no more tasks.
    pub fn with_one_more_task(
        &self,
        base: &Model<B>,
        fresh: impl Fn(usize, usize) -> f64,
    ) -> Result<Self> {
        let n_tasks = self.config.n_tasks;
        let config = PolyConfig { n_tasks: n_tasks + 1, ..self.config.clone() };
        config.validate()?;
        let (mut more, n) = Self::layout(base, &config, self.routing)?;
        let backend = base.backend();
        let old = backend.download(&self.params);
        let mut values = vec![0.0; n];
        let n_bank = self.n_bank_params();
        values[..n_bank].copy_from_slice(&old[..n_bank]);
        let width = config.n_splits * config.n_skills;
        for (router, (from, to)) in self.routers().into_iter().zip(more.routers()).enumerate() {
            let len = n_tasks * width;
            values[to..to + len].copy_from_slice(&old[from..from + len]);
            for (column, value) in values[to + len..to + len + width].iter_mut().enumerate() {
                *value = fresh(router, column);
            }
        }
        more.params = backend.upload(&values, 1, n, Precision::Full);
        Ok(more)
    }

    /// By the number of the base's linear: its bank, where it is adapted.
    pub fn banks(&self) -> &[Option<Bank>] {
        &self.banks
    }

    /// The arguments of routing these tasks.
    pub fn route<'a>(&'a self, tasks: &'a [u32], noise: Noise<'a>) -> Route<'a, B> {
        let PolyConfig { n_skills, n_splits, weighting, .. } = self.config;
        let (params, logits) = (&self.params, &self.logits[..]);
        Route { params, logits, tasks, n_splits, n_skills, noise, weighting }
    }

    /// The mixing weights of the routing rows of [`Adapter::route`]; with `keep_pairs` also the mixed
    /// pairs.
    ///
    /// # Panics
    /// If a task is not below `n_tasks`.
    pub fn mixture(&self, backend: &B, route: &Route<'_, B>, keep_pairs: bool) -> Mixture<B> {
        for &task in route.tasks {
            assert!((task as usize) < self.config.n_tasks, "task {task} is out of range");
        }
        let routing = backend.route(route);
        self.mixture_from(backend, routing, route.tasks.len(), keep_pairs)
    }

    /// The mixtures of an inference, a routing row each.
    ///
    /// # Panics
    /// If [`Mixing::check`] fails for one.
    pub fn mixture_of(&self, backend: &B, mixings: &[Mixing], keep_pairs: bool) -> Mixture<B> {
        for mixing in mixings {
            if let Err(error) = mixing.check(&self.config) {
                panic!("{error}");
            }
        }
        let PolyConfig { n_tasks, n_skills, n_splits, .. } = self.config;
        // Every task that has a part in one is routed once.
        let needed: BTreeSet<u32> =
            mixings.iter().flat_map(|m| m.parts(n_tasks)).map(|(task, _)| task).collect();
        let needed: Vec<u32> = needed.into_iter().collect();
        let rows_of: HashMap<u32, usize> =
            needed.iter().enumerate().map(|(row, &task)| (task, row)).collect();
        let (width, n_needed) = (n_splits * n_skills, needed.len());
        let learned = if needed.is_empty() {
            Vec::new()
        } else {
            let routing = backend.route(&self.route(&needed, Noise::Off));
            backend.download(&routing.weights)
        };
        let mut weights = Vec::with_capacity(self.targets.len() * mixings.len() * width);
        for linear in 0..self.targets.len() {
            for mixing in mixings {
                let of_task = |task| {
                    let row = linear * n_needed + rows_of[&task];
                    Cow::Borrowed(&learned[row * width..][..width])
                };
                weights.extend(mixing.weights(&self.config, &of_task));
            }
        }
        let rows = self.targets.len() * mixings.len();
        let weights = backend.upload(&weights, rows, width, Precision::Full);
        // Samples are for a backward.
        let routing = ops::Routing { samples: weights.clone(), weights };
        self.mixture_from(backend, routing, mixings.len(), keep_pairs)
    }

    fn mixture_from(
        &self,
        backend: &B,
        routing: ops::Routing<B>,
        n_rows: usize,
        keep_pairs: bool,
    ) -> Mixture<B> {
        let pairs = keep_pairs.then(|| {
            let (params, weights) = (&self.params, &routing.weights);
            let mix = |&bank| Mix { stacked: Stacked { bank, params, weights }, n_rows };
            backend.mix_each(&self.banks.iter().flatten().map(mix).collect::<Vec<_>>())
        });
        Mixture { routing, n_rows, pairs }
    }

    /// Bytes of the mixed pairs of `n_rows` routing rows.
    pub fn pair_bytes(&self, n_rows: usize) -> usize {
        let per_row: usize =
            self.banks.iter().flatten().map(|bank| bank.rank * (bank.d_in + bank.d_out)).sum();
        4 * n_rows * per_row
    }

    /// The adapter as the tape sees it.
    pub fn on_tape<'m>(&'m self, mixture: &'m Mixture<B>, mode: Option<Mode>) -> Adapted<'m, B> {
        Adapted { params: &self.params, banks: &self.banks, mixture, mode }
    }

    /// Saves it as PEFT does, with `tasks.json` beside where task names are known. A crash leaves the
    /// adapter of before or the new one; where the folder has one of other names, routing or settings, perhaps none.
    ///
    /// # Errors
    /// If a value is not finite, or the folder cannot be written.
    pub fn save_peft(&self, backend: &B, dir: impl AsRef<Path>) -> Result<()> {
        let (modules, tasks) = (self.modules(backend), self.tasks.as_ref());
        save_with_routing(dir.as_ref(), &self.config, &modules, tasks, self.routing.to_json())
    }

    /// The parameters by module, as PEFT's files have them.
    pub fn modules(&self, backend: &B) -> BTreeMap<String, AdapterModule> {
        let values = backend.download(&self.params);
        let narrow = |range: std::ops::Range<usize>| -> Vec<f32> {
            values[range].iter().map(|&v| v as f32).collect()
        };
        let PolyConfig { r, n_tasks, n_skills, n_splits, .. } = self.config;
        self.targets
            .iter()
            .zip(self.banks.iter().flatten().zip(&self.logits))
            .map(|(target, (bank, &logits))| {
                let module = AdapterModule {
                    lora_a: adapter::Bank {
                        shape: [n_splits, n_skills, bank.d_in / n_splits, r],
                        values: narrow(bank.a()),
                    },
                    lora_b: adapter::Bank {
                        shape: [n_splits, n_skills, r, bank.d_out / n_splits],
                        values: narrow(bank.b()),
                    },
                    router_logits: narrow(logits..logits + n_tasks * n_splits * n_skills),
                };
                (target.path.clone(), module)
            })
            .collect()
    }
}

/// Where the logits of one split of one router lie in the flat vector.
#[derive(Clone, Copy, Debug)]
pub struct SplitLogits {
    first: usize,
    stride: usize,
    n_tasks: usize,
    /// Skills.
    pub n_skills: usize,
}

impl SplitLogits {
    /// The place of each, `[n_tasks, n_skills]`.
    pub fn places(self) -> impl Iterator<Item = usize> {
        let Self { first, stride, n_tasks, n_skills } = self;
        (0..n_tasks).flat_map(move |task| (0..n_skills).map(move |s| first + task * stride + s))
    }
}

impl<B: Backend> Model<B> {
    /// The linears that an adapter may adapt.
    pub fn n_linears(&self) -> usize {
        self.modules().iter().filter(|m| matches!(m.kind, super::ModuleKind::Linear { .. })).count()
    }

    /// PEFT's default targets of this architecture.
    pub fn default_targets(&self) -> &'static [&'static str] {
        self.config().default_targets()
    }
}

/// `target_modules` from a flag: a list where it has commas or is one plain word, else a pattern.
pub fn parse_targets(flag: &str) -> TargetModules {
    let is_name = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.'))
    };
    let names: Vec<_> = flag.split(',').map(str::trim).collect();
    if names.iter().all(|name| is_name(name)) {
        TargetModules::List(names.into_iter().map(str::to_owned).collect())
    } else {
        TargetModules::Pattern(flag.to_owned())
    }
}
