//! Adapter folders: PEFT's Poly adapters, read and written.
//!
//! ```text
//! adapter_config.json                     -> config
//! adapter_model.safetensors               -> modules, of each base_model.model.<path>
//!   .poly_lora_A                             lora_a [n_splits, n_skills, d_in/n_splits, r]
//!   .poly_lora_B                             lora_b [n_splits, n_skills, r, d_out/n_splits]
//!   .poly_router.module_logits               router_logits [n_tasks, n_splits·n_skills]
//! tasks.json (ours; PEFT ignores it)      -> tasks
//! ```
//!
//! What [`AdapterFiles::open`] returns is whole and consistent: every module has its three tensors, of
//! the shapes that the configuration implies, all finite; d_in and d_out are the only freedom, and
//! fitting them to the base is the model's task. PEFT warns about missing tensors and passes over
//! unexpected ones; here both are errors, since either means other numbers than were trained. The one
//! exception is `<path>.base_layer.weight`, a copy of the frozen base that PEFT saves beside an
//! adapted head: reported as ignored.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Result},
    formats::{
        checkpoint::near_names,
        disk,
        json::{excerpt, list_names, open_regular},
        poly_config::{self, PolyConfig},
        safetensors::{SafetensorsFile, write_atomically, write_safetensors},
        tasks::{self, TaskNames},
    },
    weighting::Weighting,
};

/// The name of the tensors' file in an adapter folder.
pub const FILE_NAME: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// Why a pickle is not read, and what to do.
pub(crate) const PICKLED: &str = "this is a pickle, which can run code and is not read; convert it \
    once, on a machine where that does not matter: python scripts/convert_pickled.py FILE, which \
    writes safetensors beside it";
/// What PEFT has no word for in how an adapter routes (`model::Routing`).
pub const ROUTING_FILE: &str = "routing.json";
/// What stands in front of a module's path.
pub(super) const PREFIX: &str = "base_model.model.";
const LORA_A: &str = ".poly_lora_A";
const LORA_B: &str = ".poly_lora_B";
const ROUTER: &str = ".poly_router.module_logits";
const BASE: &str = ".base_layer.weight";

/// One of a module's two banks, with its four dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Bank {
    /// `[n_splits, n_skills, d_in/n_splits, r]` or `[n_splits, n_skills, r, d_out/n_splits]`
    pub shape: [usize; 4],
    /// The elements, the last dimension fastest.
    pub values: Vec<f32>,
}

/// The adapter of one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// `[n_splits, n_skills, d_in/n_splits, r]`
    pub lora_a: Bank,
    /// `[n_splits, n_skills, r, d_out/n_splits]`
    pub lora_b: Bank,
    /// `[n_tasks, n_splits·n_skills]`, column q·n_skills+s
    pub router_logits: Vec<f32>,
}

impl AdapterModule {
    /// Input features of the linear.
    pub fn d_in(&self) -> usize {
        self.lora_a.shape[0] * self.lora_a.shape[2]
    }

    /// Output features of the linear.
    pub fn d_out(&self) -> usize {
        self.lora_b.shape[0] * self.lora_b.shape[3]
    }

    /// A task's mixing weights in inference, `[n_splits * n_skills]`: σ(z) over its sum in each split, or
    /// as the weighting says.
    pub fn mixing_weights(&self, task: usize, weighting: Weighting) -> Vec<f64> {
        let [n_splits, n_skills, ..] = self.lora_a.shape;
        let width = n_splits * n_skills;
        let logits = &self.router_logits[task * width..][..width];
        let samples: Vec<f64> =
            logits.iter().map(|&z| 1.0 / (1.0 + (-f64::from(z)).exp())).collect();
        weighting.weights(&samples, n_skills)
    }
}

/// An adapter folder's content.
#[derive(Clone, Debug)]
pub struct AdapterFiles {
    /// The folder.
    pub dir: PathBuf,
    /// `adapter_config.json`
    pub config: PolyConfig,
    /// The adapted linears, by their path in the base model.
    pub modules: BTreeMap<String, AdapterModule>,
    /// `tasks.json`, if there is one. Its length is `config.n_tasks`.
    pub tasks: Option<TaskNames>,
    /// Tensors that the file has and nothing needs.
    pub ignored: Vec<String>,
}

impl AdapterFiles {
    /// Reads and checks an adapter folder.
    pub fn open(adapter_dir: impl AsRef<Path>) -> Result<Self> {
        let dir = adapter_dir.as_ref().to_path_buf();
        let config = PolyConfig::open(&dir)?;
        let file = open_tensors(&dir)?;
        let (parts, ignored) = sort_names(&file, PREFIX, &[LORA_A, LORA_B, ROUTER])?;

        let mut modules = BTreeMap::new();
        for module in parts {
            let names = [LORA_A, LORA_B, ROUTER].map(|end| format!("{PREFIX}{module}{end}"));
            modules.insert(module.to_owned(), read_module(&file, &config, &names)?);
        }
        file.file().verify_unchanged()?;
        if modules.is_empty() {
            return Err(tensors_error(file.path(), "the file has no Poly tensor".to_owned()));
        }
        let tasks = TaskNames::open(&dir)?;
        if let Some(tasks) = &tasks
            && tasks.n_tasks() != config.n_tasks
        {
            return Err(Error::file(
                dir.join(tasks::FILE_NAME),
                format!(
                    "{} names, but n_tasks in {} is {}: there must be one name a task, in the \
                    order of their ids",
                    tasks.n_tasks(),
                    poly_config::FILE_NAME,
                    config.n_tasks
                ),
            ));
        }
        Ok(Self { dir, config, modules, tasks, ignored })
    }
}

fn tensors_error(path: &Path, detail: String) -> Error {
    Error::Tensors { path: path.to_path_buf(), detail }
}

/// Reads a checkpoint of the authors' code (mttl) that was converted to safetensors: the layout is the
/// same, and so is the scale 1/r; the names differ.
///
/// ```text
/// model.<path>.lora_a                   [n_splits, n_skills, d_in/n_splits, r]
/// model.<path>.lora_b                   [n_splits, n_skills, r, d_out/n_splits]
/// model.<path>.selector.module_logits   [n_tasks, n_splits·n_skills]
/// ```
pub fn open_authors(path: &Path) -> Result<(PolyConfig, BTreeMap<String, AdapterModule>)> {
    const ENDS: [&str; 3] = [".lora_a", ".lora_b", ".selector.module_logits"];
    let mut start = [0; 9];
    let is_pickle = std::io::Read::read_exact(&mut open_regular(path)?, &mut start).is_ok()
        // A zip, as torch writes it, or a bare pickle; a safetensors header begins behind 8 bytes.
        && (start.starts_with(b"PK\x03\x04") || (start[0] == 0x80 && start[8] != b'{'));
    if is_pickle {
        return Err(Error::file(path, PICKLED));
    }
    let file = SafetensorsFile::open(path)?;
    let (parts, _) = sort_names(&file, "model.", &ENDS)?;
    let names = |module: &str| ENDS.map(|end| format!("model.{module}{end}"));
    let Some(first) = parts.first() else {
        return Err(tensors_error(path, "the file has no Poly tensor".to_owned()));
    };
    // The sizes are in the shapes of any module; those of the others must agree.
    let shape = |name: &str| file.header().tensors.get(name).map_or(&[][..], |info| &info.shape);
    let [a, _, router] = names(first);
    let (&[n_splits, n_skills, _, r], &[n_tasks, _]) = (shape(&a), shape(&router)) else {
        return Err(shape_error(&file, &a, &[1, 1, 1, 1], shape(&a)));
    };
    let config = PolyConfig { r, n_tasks, n_skills, n_splits, ..PolyConfig::default() };
    config.validate().map_err(|error| error.in_file(path))?;
    let mut modules = BTreeMap::new();
    for module in parts {
        modules.insert(module.to_owned(), read_module(&file, &config, &names(module))?);
    }
    Ok((config, modules))
}

/// The tensors of an adapter folder.
pub(super) fn open_tensors(dir: &Path) -> Result<SafetensorsFile> {
    let path = dir.join(FILE_NAME);
    if !path.exists() && dir.join(PICKLE).exists() {
        return Err(Error::file(dir.join(PICKLE), PICKLED));
    }
    SafetensorsFile::open(&path)
}

/// The paths of all adapted modules, each of which has a tensor of each of these ends, and the names
/// that are ignored. Any other name is an error.
pub(super) fn sort_names<'f>(
    file: &'f SafetensorsFile,
    prefix: &str,
    ends: &[&str],
) -> Result<(Vec<&'f str>, Vec<String>)> {
    let mut parts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let (mut ignored, mut unexpected) = (Vec::new(), Vec::new());
    for name in file.header().tensors.keys() {
        let inner = name.strip_prefix(prefix);
        let part = inner
            .and_then(|inner| ends.iter().find_map(|&end| Some((inner.strip_suffix(end)?, end))));
        match (inner, part) {
            // Paths go into messages and files, so they must be printable.
            (_, Some((module, end)))
                if !module.is_empty() && !module.contains(char::is_control) =>
            {
                parts.entry(module).or_default().push(end);
            }
            (Some(inner), _) if inner.ends_with(BASE) => ignored.push(name.clone()),
            _ => unexpected.push(name.as_str()),
        }
    }
    let all_ends = || match ends.split_last() {
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    };
    if !unexpected.is_empty() {
        let kind = if ends.len() == 3 { "Poly" } else { "LoRA" };
        return Err(tensors_error(
            file.path(),
            format!(
                "{} tensors are not of a {kind} adapter: {}; expected {prefix}<path> with {}",
                unexpected.len(),
                list_names(unexpected.iter().copied()),
                all_ends()
            ),
        ));
    }
    let mut missing = Vec::new();
    for (module, found) in &parts {
        for end in ends.iter().filter(|end| !found.contains(end)) {
            missing.push(format!("{prefix}{module}{end}"));
        }
    }
    if let Some(first) = missing.first() {
        let near = near_names(first, file.header().tensors.keys().map(String::as_str));
        return Err(tensors_error(
            file.path(),
            format!(
                "{} tensors are missing: {}; near the first: {}",
                missing.len(),
                list_names(missing.iter().map(String::as_str)),
                list_names(near.into_iter())
            ),
        ));
    }
    for name in &ignored {
        tracing::warn!(
            "{}: tensor {} is not needed and was ignored",
            file.path().display(),
            excerpt(name)
        );
    }
    Ok((parts.into_keys().collect(), ignored))
}

fn read_module(
    file: &SafetensorsFile,
    config: &PolyConfig,
    [a, b, router]: &[String; 3],
) -> Result<AdapterModule> {
    let &PolyConfig { r, n_tasks, n_skills, n_splits, .. } = config;
    let lora_a = read_bank(file, a, |[.., d_in, _]| [n_splits, n_skills, d_in, r])?;
    let lora_b = read_bank(file, b, |[.., d_out]| [n_splits, n_skills, r, d_out])?;
    let (shape, router_logits) = read_values(file, router)?;
    let expected = [n_tasks, n_splits * n_skills];
    if shape != expected {
        return Err(shape_error(file, router, &expected, shape));
    }
    Ok(AdapterModule { lora_a, lora_b, router_logits })
}

/// A bank of the expected shape, which may take its free dimension from the shape found.
fn read_bank(
    file: &SafetensorsFile,
    name: &str,
    expected: impl Fn([usize; 4]) -> [usize; 4],
) -> Result<Bank> {
    let (shape, values) = read_values(file, name)?;
    // Of another number of dimensions, or of no element: say what would be right for one feature.
    let found = <[usize; 4]>::try_from(shape).ok().filter(|shape| !shape.contains(&0));
    let expected = expected(found.unwrap_or([1; 4]));
    match found {
        Some(shape) if shape == expected => Ok(Bank { shape, values }),
        _ => Err(shape_error(file, name, &expected, shape)),
    }
}

/// A tensor's shape and its values, widened to f32 and all finite.
pub(super) fn read_values<'a>(
    file: &'a SafetensorsFile,
    name: &str,
) -> Result<(&'a [usize], Vec<f32>)> {
    let Some((tensor, shape)) = file.tensor(name)? else {
        return Err(tensors_error(file.path(), format!("tensor {name} is missing")));
    };
    let values = tensor.to_f32();
    if let Some((i, value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        return Err(tensors_error(
            file.path(),
            format!(
                "tensor {} has the value {value} (element {i}); the adapter is damaged",
                excerpt(name)
            ),
        ));
    }
    Ok((shape, values))
}

pub(super) fn shape_error(
    file: &SafetensorsFile,
    name: &str,
    expected: &[usize],
    found: &[usize],
) -> Error {
    Error::Shape {
        path: file.path().to_path_buf(),
        name: name.to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    }
}

/// Writes an adapter folder that PEFT reads, creating it if need be.
///
/// Each file appears whole or not at all, `adapter_config.json` last: a folder that has it has all the
/// others. Where the folder has an adapter whose other files than the tensors differ, its configuration goes first, so
/// that a crash leaves no tensors beside another adapter's names; else there is always a whole one.
/// Values that are not finite are not saved, so an adapter on disk stays a good one.
///
/// # Panics
/// If a module's shapes or the number of names do not fit the configuration.
pub fn save_adapter(
    adapter_dir: impl AsRef<Path>,
    config: &PolyConfig,
    modules: &BTreeMap<String, AdapterModule>,
    tasks: Option<&TaskNames>,
) -> Result<()> {
    save_with_routing(adapter_dir.as_ref(), config, modules, tasks, None)
}

/// [`save_adapter`] with the content of [`ROUTING_FILE`], where the routing is not as PEFT's.
pub(crate) fn save_with_routing(
    dir: &Path,
    config: &PolyConfig,
    modules: &BTreeMap<String, AdapterModule>,
    tasks: Option<&TaskNames>,
    routing: Option<String>,
) -> Result<()> {
    config.validate()?;
    let &PolyConfig { r, n_tasks, n_skills, n_splits, .. } = config;
    let router_shape = [n_tasks, n_splits * n_skills];
    let mut tensors: Vec<(String, &[usize], &[f32])> = Vec::new();
    for (module, AdapterModule { lora_a, lora_b, router_logits }) in modules {
        let [.., d_in, _] = lora_a.shape;
        let [.., d_out] = lora_b.shape;
        assert_eq!(lora_a.shape, [n_splits, n_skills, d_in, r], "lora_a of {module}");
        assert_eq!(lora_b.shape, [n_splits, n_skills, r, d_out], "lora_b of {module}");
        tensors.push((format!("{PREFIX}{module}{LORA_A}"), &lora_a.shape, &lora_a.values));
        tensors.push((format!("{PREFIX}{module}{LORA_B}"), &lora_b.shape, &lora_b.values));
        tensors.push((format!("{PREFIX}{module}{ROUTER}"), &router_shape, router_logits));
    }
    for (name, _, values) in &tensors {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite(format!(
                "tensor {name} has the value {value}; the adapter was not written to {}",
                dir.display()
            )));
        }
    }
    let tensors: Vec<(&str, &[usize], &[f32])> =
        tensors.iter().map(|(name, shape, values)| (name.as_str(), *shape, *values)).collect();

    let names = tasks.and_then(TaskNames::to_json);
    if names.is_some() {
        assert_eq!(tasks.map(TaskNames::n_tasks), Some(n_tasks), "one name a task");
    }
    let others = [
        (tasks::FILE_NAME, names),
        (ROUTING_FILE, routing),
        (poly_config::FILE_NAME, Some(config.to_json())),
    ];
    let is_there = |(name, content): &(&str, Option<String>)| {
        let found = fs::read(dir.join(name)).ok();
        found.as_deref() == content.as_deref().map(str::as_bytes)
    };

    disk::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let config_path = dir.join(poly_config::FILE_NAME);
    if config_path.exists() && !others.iter().all(is_there) {
        disk::remove_file(&config_path).map_err(Error::io("remove", &config_path))?;
        disk::sync_dir(dir).map_err(Error::io("sync", dir))?;
    }
    write_safetensors(&dir.join(FILE_NAME), &tensors)?;
    for (name, content) in others {
        let path = dir.join(name);
        match content {
            Some(text) => write_atomically(&path, |file| file.write_all(text.as_bytes()))?,
            None => disk::remove_file(&path).map_err(Error::io("remove", &path))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Dtype,
        formats::safetensors::{TensorSpec, write_streamed},
    };

    const PATH: &str = "encoder.block.0.layer.0.SelfAttention.q";

    fn temporary(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("polytape-adapter-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    /// r 2, 3 tasks, 2 skills, 2 splits, one linear 6 -> 4.
    fn example() -> (PolyConfig, BTreeMap<String, AdapterModule>) {
        let config =
            PolyConfig { r: 2, n_tasks: 3, n_skills: 2, n_splits: 2, ..PolyConfig::default() };
        let bank = |shape: [usize; 4]| Bank {
            shape,
            values: (0..shape.iter().product()).map(|i| i as f32 * 0.5 - 1.0).collect(),
        };
        let module = AdapterModule {
            lora_a: bank([2, 2, 3, 2]),
            lora_b: bank([2, 2, 2, 2]),
            router_logits: (0..12).map(|i| i as f32).collect(),
        };
        (config, BTreeMap::from([(PATH.to_owned(), module)]))
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let dir = temporary("roundtrip");
        let (config, modules) = example();
        let names = ["x", "y", "z"].map(str::to_owned);
        let tasks = TaskNames::from_list(&names).unwrap();
        save_adapter(dir.join("deep/er"), &config, &modules, Some(&tasks)).unwrap();
        let dir = dir.join("deep/er");
        let read = AdapterFiles::open(&dir).unwrap();
        assert_eq!((&read.config, &read.modules, &read.tasks), (&config, &modules, &Some(tasks)));
        assert_eq!((read.modules[PATH].d_in(), read.modules[PATH].d_out()), (6, 4));
        assert!(read.ignored.is_empty());

        let bytes = fs::read(dir.join(FILE_NAME)).unwrap();
        save_adapter(&dir, &read.config, &read.modules, None).unwrap();
        assert_eq!(fs::read(dir.join(FILE_NAME)).unwrap(), bytes);
        assert_eq!(AdapterFiles::open(&dir).unwrap().tasks, None, "the old names went");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);

        let mut bad = modules.clone();
        bad.get_mut(PATH).unwrap().lora_b.values[3] = f32::NAN;
        let error = save_adapter(&dir, &config, &bad, None).unwrap_err().to_string();
        assert!(error.contains("poly_lora_B has the value NaN"), "{error}");
        assert_eq!(fs::read(dir.join(FILE_NAME)).unwrap(), bytes);
        fs::remove_dir_all(temporary("roundtrip")).unwrap_or_default();
    }

    /// Wherever a save ends early, the folder has the adapter of before, the new one, or none.
    #[test]
    fn a_save_that_ends_early_mixes_nothing() {
        let dir = temporary("early");
        let (config, old) = example();
        let mut new = old.clone();
        new.get_mut(PATH).unwrap().router_logits[0] = 77.0;
        let names = |names: [&str; 3]| TaskNames::from_list(&names.map(str::to_owned)).unwrap();
        let (old_names, new_names) = (names(["x", "y", "z"]), names(["z", "y", "x"]));
        let fixed = Some("{}".to_owned());
        for (tasks, routing) in [(&old_names, None), (&new_names, None), (&old_names, fixed)] {
            let is_changed = (tasks, &routing) != (&old_names, &None);
            let mut found = [0; 3];
            for n in 0.. {
                let _ = fs::remove_dir_all(&dir);
                save_adapter(&dir, &config, &old, Some(&old_names)).unwrap();
                let mut left = n;
                let refuse = move |_: &disk::Operation| {
                    left -= 1;
                    if left < 0 { Err(std::io::Error::other("no more")) } else { Ok(()) }
                };
                let save = || save_with_routing(&dir, &config, &new, Some(tasks), routing.clone());
                let done = disk::observed(refuse, save);
                let found_routing = fs::read_to_string(dir.join(ROUTING_FILE)).ok();
                match AdapterFiles::open(&dir) {
                    Ok(now) if now.modules == old => {
                        assert_eq!((now.tasks.as_ref(), found_routing), (Some(&old_names), None));
                        found[0] += 1;
                    }
                    Ok(now) => {
                        assert_eq!((&now.modules, now.tasks.as_ref()), (&new, Some(tasks)));
                        assert_eq!(found_routing, routing);
                        found[1] += 1;
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("adapter_config.json"), "{error}");
                        found[2] += 1;
                    }
                }
                if done.is_ok() {
                    break;
                }
            }
            assert!(found[0] > 0 && found[1] > 0 && (found[2] > 0) == is_changed, "{found:?}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn sixteen_bit_tensors_are_widened() {
        let dir = temporary("bf16");
        let (config, modules) = example();
        save_adapter(&dir, &config, &modules, None).unwrap();
        let file = SafetensorsFile::open(dir.join(FILE_NAME)).unwrap();
        let specs = file.header().tensors.iter().map(|(name, info)| TensorSpec {
            name: name.clone(),
            dtype: if name.ends_with("A") { Dtype::Bf16 } else { Dtype::F16 },
            shape: info.shape.clone(),
        });
        let specs: Vec<_> = specs.collect();
        write_streamed(&dir.join(FILE_NAME), specs, |spec, out| {
            for value in file.tensor(&spec.name).unwrap().unwrap().0.to_f32() {
                match spec.dtype {
                    Dtype::Bf16 => out.write_all(&half::bf16::from_f32(value).to_le_bytes())?,
                    _ => out.write_all(&half::f16::from_f32(value).to_le_bytes())?,
                }
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(AdapterFiles::open(&dir).unwrap().modules, modules);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn inconsistent_folders_are_refused() {
        let dir = temporary("bad");
        let (config, modules) = example();
        save_adapter(&dir, &config, &modules, None).unwrap();
        let name = |suffix: &str| format!("{PREFIX}{PATH}{suffix}");
        let a = (name(LORA_A), vec![2, 2, 3, 2], vec![0.0f32; 24]);
        let b = (name(LORA_B), vec![2, 2, 2, 2], vec![0.0; 16]);
        let z = (name(ROUTER), vec![3, 4], vec![0.0; 12]);
        let base = (name(BASE), vec![4, 6], vec![0.0; 24]);
        let open = |tensors: &[&(String, Vec<usize>, Vec<f32>)]| {
            let tensors: Vec<_> = tensors
                .iter()
                .map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..]))
                .collect();
            write_safetensors(&dir.join(FILE_NAME), &tensors).unwrap();
            AdapterFiles::open(&dir)
        };
        let read = open(&[&a, &b, &z, &base]).unwrap();
        assert_eq!(read.ignored, std::slice::from_ref(&base.0));

        let shaped = |t: &(String, Vec<usize>, Vec<f32>), shape: &[usize]| {
            (t.0.clone(), shape.to_vec(), vec![0.0; shape.iter().product()])
        };
        let mut nan = b.clone();
        nan.2[5] = f32::INFINITY;
        let extra = ("base_model.model.lm_head.weight".to_owned(), vec![1], vec![0.0]);
        let nameless = (format!("{PREFIX}.poly_lora_A").replace("..", "."), vec![1], vec![0.0]);
        let cases = [
            (
                open(&[&a, &b]),
                "1 tensors are missing: \"base_model.model.encoder.block.0.layer.0.SelfAttention.q.poly_router",
            ),
            (open(&[&z]), "2 tensors are missing"),
            (open(&[]), "no Poly tensor"),
            (
                open(&[&a, &b, &z, &extra]),
                "not of a Poly adapter: \"base_model.model.lm_head.weight\"",
            ),
            (open(&[&a, &b, &z, &nameless]), "not of a Poly adapter"),
            (
                open(&[&shaped(&a, &[2, 2, 3, 4]), &b, &z]),
                "poly_lora_A has shape [2, 2, 3, 4], not [2, 2, 3, 2]",
            ),
            (open(&[&shaped(&a, &[2, 3, 3, 2]), &b, &z]), "not [2, 2, 3, 2]"),
            (open(&[&shaped(&a, &[2, 2, 6]), &b, &z]), "has shape [2, 2, 6], not [2, 2, 1, 2]"),
            (open(&[&shaped(&a, &[2, 2, 0, 2]), &b, &z]), "has shape [2, 2, 0, 2]"),
            (
                open(&[&a, &shaped(&b, &[1, 2, 2, 4]), &z]),
                "poly_lora_B has shape [1, 2, 2, 4], not [2, 2, 2, 4]",
            ),
            (open(&[&a, &b, &shaped(&z, &[4, 3])]), "module_logits has shape [4, 3], not [3, 4]"),
            (open(&[&a, &nan, &z]), "has the value inf (element 5)"),
        ];
        for (result, reason) in cases {
            let error = result.unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(
                error.contains("adapter_model.safetensors") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }

        open(&[&a, &b, &z]).unwrap();
        fs::write(dir.join(tasks::FILE_NAME), r#"{"tasks":["x","y"]}"#).unwrap();
        let error = AdapterFiles::open(&dir).unwrap_err().to_string();
        assert!(
            error.contains("tasks.json: 2 names, but n_tasks in adapter_config.json is 3"),
            "{error}"
        );

        fs::rename(dir.join(FILE_NAME), dir.join(PICKLE)).unwrap();
        let error = AdapterFiles::open(&dir).unwrap_err().to_string();
        assert!(error.contains("adapter_model.bin: this is a pickle"), "{error}");
        fs::remove_file(dir.join(PICKLE)).unwrap();
        let error = AdapterFiles::open(&dir).unwrap_err().to_string();
        assert!(error.starts_with("cannot open ") && error.contains(FILE_NAME), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }
}
