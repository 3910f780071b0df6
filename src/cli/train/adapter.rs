//! The adapter that a run starts from: a fresh one, a given one, or a checkpoint's.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    super::OnOff,
    flags::{Resumed, spelling},
};
use crate::{
    error::{Error, Result},
    formats::{
        json::{UniqueMap, excerpt, read_json},
        poly_config::PolyConfig,
        tasks::TaskNames,
    },
    kernels::Backend,
    model::{
        Adapter, Model,
        routed_lora::parse_targets,
        routing::{Granularity, InitA, Routing},
        targets::resolve,
    },
    train::recipe::Recipe,
    weighting::Weighting,
};

/// What the adapter is like, and how it routes.
#[derive(Args)]
pub(super) struct AdapterFlags {
    /// Start from this adapter, with its configuration and task names.
    #[arg(long)]
    pub(super) adapter_init: Option<PathBuf>,
    /// Rank of a skill [default: 8].
    #[arg(long)]
    r: Option<usize>,
    /// Tasks [default: the largest id in the data + 1].
    #[arg(long)]
    n_tasks: Option<usize>,
    /// Skills in the bank [default: 4].
    #[arg(long)]
    n_skills: Option<usize>,
    /// Splits of the feature axis: 1 is Poly, more is MHR [default: 1].
    #[arg(long)]
    n_splits: Option<usize>,
    /// Names (q,v), a regular expression, or all-linear [default: the architecture's].
    #[arg(long)]
    target_modules: Option<String>,
    /// What is not adapted although it is a target: names, or a regular expression [default: nothing].
    #[arg(long)]
    exclude_modules: Option<String>,
    /// Whether B starts at zero.
    #[arg(long)]
    init_weights: Option<OnOff>,
    /// How A starts: within PEFT's bound or the authors' smaller one [default: peft].
    #[arg(long)]
    init: Option<InitFlag>,
    /// Who uses which skills: a learned mixture, one skill for all, or one for each task.
    #[arg(long, default_value = "learned")]
    routing: RoutingFlag,
    /// Skills given by hand: a JSON file {"task": ["skill", ...], ...}.
    #[arg(long, conflicts_with = "routing")]
    task_skills: Option<PathBuf>,
    /// Which linears share a router [default: linear, each has its own].
    #[arg(long)]
    router_granularity: Option<GranularityFlag>,
    /// Whether mixing weights are scaled by sqrt(n_splits / n_skills) instead of normalised
    /// [default: off].
    #[arg(long, visible_alias = "poly-average-correction")]
    average_correction: Option<OnOff>,
}

#[derive(Clone, Copy, ValueEnum)]
enum InitFlag {
    Peft,
    Authors,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoutingFlag {
    Learned,
    Shared,
    Private,
}

#[derive(Clone, Copy, ValueEnum)]
enum GranularityFlag {
    #[value(alias = "finegrained")]
    Linear,
    #[value(alias = "layerwise")]
    Layer,
    #[value(alias = "blockwise")]
    Block,
    #[value(alias = "coderwise")]
    Coder,
    #[value(alias = "coarsegrained")]
    One,
}

impl From<GranularityFlag> for Granularity {
    fn from(flag: GranularityFlag) -> Self {
        match flag {
            GranularityFlag::Linear => Self::Linear,
            GranularityFlag::Layer => Self::Layer,
            GranularityFlag::Block => Self::Block,
            GranularityFlag::Coder => Self::Coder,
            GranularityFlag::One => Self::One,
        }
    }
}

/// Where the tasks of the data come from.
pub(super) struct Data<'a> {
    pub(super) path: &'a Path,
    pub(super) model_dir: &'a PathBuf,
    pub(super) seed: u64,
    /// Whether a fresh adapter's router rounds.
    pub(super) straight_through: bool,
}

impl AdapterFlags {
    /// How a fresh adapter begins, for the settings.
    pub(super) fn settings(&self, recipe: &Recipe) -> [(String, Value); 2] {
        let is_fresh = self.adapter_init.is_none();
        let init = self.init.unwrap_or(match recipe.init_a {
            InitA::Peft => InitFlag::Peft,
            InitA::Authors => InitFlag::Authors,
        });
        let b_is_zero = self.init_weights.is_none_or(OnOff::is_on);
        [
            ("init".to_owned(), json!(is_fresh.then(|| spelling(init)))),
            ("init_weights".to_owned(), json!(is_fresh.then_some(b_is_zero))),
        ]
    }

    /// The adapter to start from. `tasks` are those of the data.
    pub(super) fn adapter<B: Backend>(
        &self,
        model: &Model<B>,
        resumed: Option<&Resumed>,
        recipe: &Recipe,
        data: &Data<'_>,
        tasks: impl FnOnce() -> Result<TaskNames>,
    ) -> Result<Adapter<B>> {
        if let Some(Resumed { dir, .. }) = resumed {
            let adapter = Adapter::open(model, dir)?;
            self.check_repeated(model, &adapter, "the checkpoint")?;
            return Ok(adapter);
        }
        if let Some(dir) = &self.adapter_init {
            let adapter = Adapter::open(model, dir)?;
            self.check_repeated(model, &adapter, "--adapter-init")?;
            if self.init_weights.is_some() || self.init.is_some() {
                return Err(Error::Usage(
                    "--init and --init-weights are for a fresh adapter, not for --adapter-init"
                        .into(),
                ));
            }
            if self.routing != RoutingFlag::Learned || self.task_skills.is_some() {
                return Err(Error::Usage(
                    "--routing and --task-skills are for a fresh adapter, not for --adapter-init"
                        .into(),
                ));
            }
            return Ok(adapter);
        }
        self.fresh(model, recipe, data, &tasks()?)
    }

    fn fresh<B: Backend>(
        &self,
        model: &Model<B>,
        recipe: &Recipe,
        data: &Data<'_>,
        tasks: &TaskNames,
    ) -> Result<Adapter<B>> {
        // Rows that name no task are of one.
        let n_tasks = self.n_tasks.unwrap_or(tasks.n_tasks().max(1));
        if n_tasks < tasks.n_tasks() {
            return Err(Error::Usage(format!(
                "--n-tasks {n_tasks} is less than the {} tasks of {}",
                tasks.n_tasks(),
                data.path.display()
            )));
        }
        let given: Option<Vec<Vec<usize>>> = match (&self.task_skills, self.routing) {
            (Some(path), _) => Some(read_task_skills(path, tasks, n_tasks)?),
            (None, RoutingFlag::Learned) => None,
            (None, RoutingFlag::Shared) => Some(vec![vec![0]; n_tasks]),
            (None, RoutingFlag::Private) => Some((0..n_tasks).map(|task| vec![task]).collect()),
        };
        let n_skills = match &given {
            Some(skills) => {
                let n = skills.iter().flatten().max().map_or(1, |last| last + 1);
                if let Some(asked) = self.n_skills.filter(|&asked| asked != n) {
                    return Err(Error::Usage(format!(
                        "--n-skills {asked}, but the routing that is given has {n}: leave it out"
                    )));
                }
                n
            }
            None => self.n_skills.unwrap_or(recipe.n_skills),
        };
        let weighting = Weighting {
            straight_through: data.straight_through,
            average_correction: self.average_correction.is_some_and(OnOff::is_on),
        };
        if given.is_some() && weighting != Weighting::default() {
            return Err(Error::Usage(
                "--average-correction and --router-sampling straight-through are for a routing that learns"
                    .into(),
            ));
        }
        let targets = self.target_modules.as_deref().map(parse_targets);
        let config = PolyConfig {
            task_type: Some(model.task_type().into()),
            base_model_name_or_path: Some(data.model_dir.display().to_string()),
            target_modules: targets.or_else(|| recipe.linears.targets(model.config())),
            exclude_modules: self.exclude_modules.as_deref().map(parse_targets),
            init_weights: self.init_weights.is_none_or(OnOff::is_on),
            r: self.r.unwrap_or(recipe.r),
            n_tasks,
            n_skills,
            // Splits would only cut what is not mixed.
            n_splits: self.n_splits.unwrap_or(if given.is_some() { 1 } else { recipe.n_splits }),
            weighting,
            ..PolyConfig::default()
        };
        let granularity = self.router_granularity.map(Granularity::from).unwrap_or_default();
        let init_a = match self.init {
            None => recipe.init_a,
            Some(InitFlag::Peft) => InitA::Peft,
            Some(InitFlag::Authors) => InitA::Authors,
        };
        let routing = Routing { granularity, ..Routing::default() };
        let mut adapter = Adapter::with_routing(model, &config, routing, init_a, data.seed)?;
        if let Some(skills) = &given {
            adapter.fix_routing(model, skills);
        }
        if weighting != Weighting::default() {
            tracing::info!(
                "PEFT knows no such routing and refuses the adapter; it loads what `export` makes of a task"
            );
        }
        if granularity != Granularity::Linear {
            tracing::info!(
                "PEFT knows no shared router: each linear gets a copy of its own on disk"
            );
        }
        Ok(adapter)
    }

    /// An adapter brings its configuration; a flag that says otherwise is an error.
    fn check_repeated<B: Backend>(
        &self,
        model: &Model<B>,
        adapter: &Adapter<B>,
        whose: &str,
    ) -> Result<()> {
        let config = adapter.config();
        let numbers = [
            ("--r", self.r, config.r),
            ("--n-tasks", self.n_tasks, config.n_tasks),
            ("--n-skills", self.n_skills, config.n_skills),
            ("--n-splits", self.n_splits, config.n_splits),
        ];
        for (flag, given, has) in numbers {
            if let Some(given) = given.filter(|&given| given != has) {
                return Err(Error::Usage(format!(
                    "{flag} {given} differs from the {has} of {whose}: leave it out"
                )));
            }
        }
        if let Some(given) = self.router_granularity.map(Granularity::from)
            && given != adapter.routing().granularity
        {
            return Err(Error::Usage(format!(
                "--router-granularity differs from that of {whose}: leave it out"
            )));
        }
        if let Some(given) = self.average_correction
            && given.is_on() != config.weighting.average_correction
        {
            return Err(Error::Usage(format!(
                "--average-correction differs from that of {whose}: leave it out"
            )));
        }
        let (targets, excluded) = (&self.target_modules, &self.exclude_modules);
        let modules = |given: &Option<String>| given.as_deref().map(parse_targets);
        let with_targets = PolyConfig { target_modules: modules(targets), ..config.clone() };
        let with_excluded = PolyConfig { exclude_modules: modules(excluded), ..config.clone() };
        for (flag, given, asked) in [
            ("--target-modules", targets, with_targets),
            ("--exclude-modules", excluded, with_excluded),
        ] {
            let Some(given) = given else { continue };
            let (targets, _) = resolve(&asked, model.modules(), model.default_targets())?;
            if targets != adapter.targets() {
                return Err(Error::Usage(format!(
                    "{flag} {given} differs from that of {whose}: leave it out"
                )));
            }
        }
        Ok(())
    }
}

/// Which skills each task uses, by a file of names; skills are numbered as they first appear in the
/// order of the tasks.
fn read_task_skills(path: &PathBuf, tasks: &TaskNames, n_tasks: usize) -> Result<Vec<Vec<usize>>> {
    let UniqueMap(by_name): UniqueMap<Vec<String>> = read_json(path, 64 << 20)?;
    if let Some(name) = by_name.keys().find(|name| tasks.id(name).is_none()) {
        return Err(Error::file(path, format!("task {} is not in the data", excerpt(name))));
    }
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut skills_of_tasks = Vec::with_capacity(n_tasks);
    for id in 0..n_tasks as u32 {
        let skills = tasks.name(id).and_then(|name| by_name.get(name));
        let Some(skills) = skills.filter(|skills| !skills.is_empty()) else {
            let name = tasks.name(id).map_or_else(|| id.to_string(), excerpt);
            return Err(Error::file(path, format!("task {name} has no skill: list at least one")));
        };
        let mut of_task = Vec::new();
        for skill in skills {
            let next = numbers.len();
            of_task.push(*numbers.entry(skill).or_insert(next));
        }
        skills_of_tasks.push(of_task);
    }
    Ok(skills_of_tasks)
}
