//! Saving, while the disk fails or the power goes: whatever happens, and whenever, every folder that is
//! called a checkpoint is a whole one, and the newest that was ever finished is there or a newer one.
//!
//! `tests/cli/resume.rs` kills the binary; a kill never loses what was written, a loss of power does. Here
//! the operations of a save are recorded, and played again as far as a disk may have got: what was
//! not synced is there, or not, or torn.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/folder.rs"]
mod folder;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    rc::Rc,
};

use folder::Folder;
use polytape::{
    Dtype, Result,
    formats::{
        adapter::AdapterFiles,
        disk::{Operation, observed},
        folder::write_folder,
        poly_config::PolyConfig,
        safetensors::{SafetensorsFile, write_atomically},
    },
    kernels::cpu::Cpu,
    model::{Adapter, Example, Model},
    train::{
        TrainConfig, Trainer,
        checkpoint::{self, TrainerState},
    },
};

fn model() -> Model {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity/tiny/base");
    Model::open_on(Cpu::new(Dtype::F32, 1).unwrap(), base).unwrap()
}

fn trainer(model: &Model) -> Trainer<'_, Cpu> {
    let config = PolyConfig { n_tasks: 2, n_skills: 2, r: 2, ..PolyConfig::default() };
    Trainer::new(model, Adapter::new(model, &config, 1).unwrap(), TrainConfig::default()).unwrap()
}

/// One step, then its checkpoint; of all only the last two are kept.
fn step_and_save(trainer: &mut Trainer<'_, Cpu>, out: &Path) -> Result<()> {
    let example = Example { input: vec![5, 6, 1], labels: vec![7, 1], task: 1, mixing: None };
    trainer.step(&[&example])?;
    save(trainer, out)
}

fn save(trainer: &Trainer<'_, Cpu>, out: &Path) -> Result<()> {
    let state = TrainerState { global_step: trainer.steps_done(), ..TrainerState::default() };
    checkpoint::save(out, trainer, &state, &serde_json::Map::new())?;
    checkpoint::rotate(out, 2)
}

/// Every checkpoint is whole, by name; gives the steps.
fn check(out: &Path, model: &Model) -> Vec<u64> {
    let found = checkpoint::list(out).unwrap();
    for checkpoint in &found {
        let state = checkpoint::read_state(&checkpoint.path).unwrap();
        assert_eq!(state.global_step, checkpoint.step);
        AdapterFiles::open(&checkpoint.path).unwrap();
        let moments = SafetensorsFile::open(checkpoint.path.join("optimizer.safetensors")).unwrap();
        assert!(moments.tensor("exp_avg_sq").unwrap().is_some());
        checkpoint::check_arguments(&checkpoint.path, &serde_json::Map::new()).unwrap();
    }
    // The newest is what a run goes on from.
    if let Some(newest) = found.last() {
        let adapter = Adapter::open(model, &newest.path).unwrap();
        let mut trainer = Trainer::new(model, adapter, TrainConfig::default()).unwrap();
        trainer.restore(&newest.path, newest.step).unwrap();
    }
    found.iter().map(|checkpoint| checkpoint.step).collect()
}

/// Each operation of a save fails once, or from then on: the error names the operation, the
/// checkpoints before are whole, and the next save works.
#[test]
fn a_disk_that_fails_costs_one_checkpoint() {
    let model = model();
    let mut kinds = BTreeMap::new();
    for persistent in [false, true] {
        for n in 0.. {
            let folder = Folder::new(&format!("io-{persistent}"));
            let out = &folder.0;
            let mut trainer = trainer(&model);
            step_and_save(&mut trainer, out).unwrap();
            step_and_save(&mut trainer, out).unwrap();
            let count = Rc::new(Cell::new(0));
            let observer = {
                let count = Rc::clone(&count);
                move |operation: &Operation| {
                    let now = count.replace(count.get() + 1);
                    let fails = if persistent { now >= n } else { now == n };
                    // Also what cleans up may fail, and is not to hide the first error.
                    if !fails {
                        return Ok(());
                    }
                    Err(match operation {
                        Operation::Write(..) => io::ErrorKind::StorageFull.into(),
                        _ => io::Error::other("the disk failed"),
                    })
                }
            };
            let done = observed(observer, || step_and_save(&mut trainer, out));
            let Err(error) = done else {
                assert!(count.get() <= n, "operation {n} failed, and nobody said so");
                assert_eq!(check(out, &model), [2, 3]);
                break;
            };
            assert_eq!(error.exit_code(), 1, "{error}");
            let message = error.to_string();
            let kind = message.split(' ').nth(1).unwrap().to_owned();
            *kinds.entry(kind).or_insert(0) += 1;
            assert!(message.contains(out.to_str().unwrap()), "{message}");
            let steps = check(out, &model);
            assert!(steps.starts_with(&[1, 2]) || steps == [2, 3], "operation {n}: {steps:?}");
            if !persistent {
                let hidden = |name: &str| name.starts_with('.');
                let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name());
                let left: Vec<_> = names.filter(|name| hidden(name.to_str().unwrap())).collect();
                assert!(left.is_empty() || steps.contains(&3), "operation {n}: {left:?}");
            }
            // The disk works again.
            checkpoint::remove_leftovers(out).unwrap();
            save(&trainer, out).unwrap();
            assert_eq!(check(out, &model), [2, 3]);
            assert_eq!(fs::read_dir(out).unwrap().count(), 2);
        }
    }
    println!("{kinds:?}");
    for kind in ["create", "write", "sync", "rename", "remove"] {
        assert!(kinds.get(kind).is_some_and(|&n| n >= 2), "{kind}: {kinds:?}");
    }
}

/// A file keeps its content whatever fails while it is replaced, and so does a folder that is made.
#[test]
fn a_disk_that_fails_changes_no_output() {
    let folder = Folder::new("outputs");
    let (file, dir) = (folder.0.join("answers.jsonl"), folder.0.join("lora"));
    for n in 0.. {
        fs::write(&file, "old").unwrap();
        let count = Cell::new(0);
        let observer = move |_: &Operation| {
            if count.replace(count.get() + 1) == n { Err(io::Error::other("no")) } else { Ok(()) }
        };
        let done = observed(observer, || -> Result<()> {
            write_atomically(&file, |file| io::Write::write_all(file, b"new"))?;
            write_folder(&dir, |dir| {
                write_atomically(&dir.join("a"), |file| io::Write::write_all(file, b"a"))
            })
        });
        let names = fs::read_dir(&folder.0).unwrap().count();
        let content = fs::read_to_string(&file).unwrap();
        assert!(content == "old" || content == "new");
        if dir.exists() {
            assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "a");
            fs::remove_dir_all(&dir).unwrap();
        }
        match done {
            Ok(()) => {
                assert_eq!((names, content.as_str()), (2, "new"));
                assert!(n > 8, "{n} operations only");
                break;
            }
            Err(_) => assert!(names <= 2, "operation {n} left something behind"),
        }
    }
}

/// What a disk may have got of the operations before a loss of power.
#[derive(Default)]
struct Disk {
    /// Content by path; none for a folder.
    entries: BTreeMap<PathBuf, Option<Vec<u8>>>,
}

/// The bytes of a sector, which is written whole or not at all.
const SECTOR: usize = 512;

impl Disk {
    /// The state after some operations: names that were synced are there, others by chance; content that
    /// was synced is there, of other content any sectors, and the length only by chance.
    fn after(operations: &[Operation], mut coin: impl FnMut() -> bool) -> Self {
        let mut disk = Self::default();
        let mut lost = BTreeMap::new(); // New names that the disk did not get, and the old ones.
        for (i, operation) in operations.iter().enumerate() {
            let later = &operations[i + 1..];
            let synced = |path: &Path| later.contains(&Operation::Sync(path.to_path_buf()));
            let named = |path: &Path, coin: &mut dyn FnMut() -> bool| {
                synced(path.parent().unwrap()) || coin()
            };
            match operation {
                Operation::CreateDir(path) if named(path, &mut coin) => {
                    disk.entries.insert(path.clone(), None);
                }
                Operation::Create(path)
                    if named(path, &mut coin)
                        && disk.entries.contains_key(path.parent().unwrap()) =>
                {
                    disk.entries.insert(path.clone(), Some(Vec::new()));
                }
                Operation::Write(path, bytes) => {
                    let Some(Some(content)) = disk.entries.get_mut(path) else { continue };
                    // The file's next sync is under this name: it has no other before.
                    if synced(path) {
                        content.extend(bytes);
                    } else if coin() {
                        for sector in bytes.chunks(SECTOR) {
                            let start = content.len();
                            content.resize(start + sector.len(), 0);
                            if coin() {
                                content[start..].copy_from_slice(sector);
                            }
                        }
                    }
                }
                Operation::Rename(from, to) if named(to, &mut coin) => disk.rename(from, to),
                Operation::Rename(from, to) => {
                    lost.insert(to, from);
                }
                // What has its old name again has lost any of its content.
                Operation::Remove(path) if lost.contains_key(path) => {
                    disk.remove_some(lost[path], &mut coin)
                }
                Operation::Remove(path) if named(path, &mut coin) => {
                    disk.entries.retain(|entry, _| !entry.starts_with(path));
                }
                // A removal that has only begun.
                Operation::Remove(path) => disk.remove_some(path, &mut coin),
                _ => {}
            }
        }
        disk
    }

    /// Any of a folder's content goes; its name stays.
    fn remove_some(&mut self, path: &Path, mut coin: impl FnMut() -> bool) {
        self.entries.retain(|entry, _| entry == path || !entry.starts_with(path) || coin());
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        let moved: Vec<_> =
            self.entries.keys().filter(|path| path.starts_with(from)).cloned().collect();
        if !moved.is_empty() {
            self.entries.retain(|path, _| !path.starts_with(to) || path.starts_with(from));
        }
        for path in moved {
            let entry = self.entries.remove(&path).unwrap();
            let rest = path.strip_prefix(from).unwrap();
            let new = if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) };
            self.entries.insert(new, entry);
        }
    }

    /// Writes it below `to`, instead of `from`.
    fn write(&self, from: &Path, to: &Path) {
        for (path, content) in &self.entries {
            let path = to.join(path.strip_prefix(from).unwrap());
            match content {
                None => fs::create_dir_all(path).unwrap(),
                Some(content) if path.parent().unwrap().is_dir() => {
                    fs::write(path, content).unwrap();
                }
                Some(_) => {}
            }
        }
    }
}

/// Four saves, two of which remove an old one, cut off anywhere.
#[test]
fn after_a_loss_of_power_the_newest_checkpoint_is_there() {
    const N_STATES: u64 = 1000;
    let model = model();
    let folder = Folder::new("power");
    let out = folder.0.join("out");
    fs::create_dir(&out).unwrap();
    let operations = Rc::new(RefCell::new(Vec::new()));
    let observer = {
        let operations = Rc::clone(&operations);
        move |operation: &Operation| {
            operations.borrow_mut().push(operation.clone());
            Ok(())
        }
    };
    // How many operations there were when each save was done.
    let done = observed(observer, || {
        let mut trainer = trainer(&model);
        [(); 4].map(|()| {
            step_and_save(&mut trainer, &out).unwrap();
            operations.borrow().len()
        })
    });
    let mut operations = operations.borrow().clone();
    operations.insert(0, Operation::CreateDir(out.clone()));
    operations.insert(1, Operation::Sync(folder.0.clone()));
    let done = done.map(|n| n + 2);
    assert!(operations.len() > 100, "{}", operations.len());

    let again = folder.0.join("again");
    let (mut state, mut newest_seen, mut torn) = (1_u64, [0; 5], 0);
    for _ in 0..N_STATES {
        let mut coin = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 40 & 1 == 1
        };
        let mut cut = 0;
        (0..16).for_each(|_| cut = cut * 2 + usize::from(coin()));
        let cut = 2 + cut % (operations.len() - 1);
        let disk = Disk::after(&operations[..cut], &mut coin);
        let _ = fs::remove_dir_all(&again);
        disk.write(&folder.0, &folder.0.join("again-parent"));
        fs::rename(folder.0.join("again-parent/out"), &again).unwrap();
        let steps = check(&again, &model);
        let finished = done.iter().filter(|&&n| n <= cut).count() as u64;
        let newest = steps.last().copied().unwrap_or(0);
        assert!(newest >= finished, "{finished} saves were done, {steps:?} are there");
        newest_seen[newest as usize] += 1;
        torn += usize::from(fs::read_dir(&again).unwrap().count() > steps.len());
        checkpoint::remove_leftovers(&again).unwrap();
        assert_eq!(fs::read_dir(&again).unwrap().count(), steps.len());
    }
    println!("the newest checkpoint in {N_STATES} states: {newest_seen:?}; {torn} had leftovers");
    assert!(newest_seen.iter().all(|&n| n > 20) && torn > 100, "{newest_seen:?} {torn}");
}

/// The states are harsh enough: saving without syncs does not pass.
#[test]
fn without_syncs_a_loss_of_power_is_seen() {
    let folder = Folder::new("careless");
    let (hidden, file) = (folder.0.join(".hidden"), folder.0.join("file"));
    let careful = [
        Operation::Create(hidden.clone()),
        Operation::Write(hidden.clone(), vec![1; 2000]),
        Operation::Sync(hidden.clone()),
        Operation::Rename(hidden, file.clone()),
        Operation::Sync(folder.0.clone()),
    ];
    let mut state = 5_u64;
    let mut whole = |operations: &[Operation]| {
        let coin = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 40 & 1 == 1
        };
        let mut start = vec![
            Operation::CreateDir(folder.0.clone()),
            Operation::Sync(folder.0.parent().unwrap().to_path_buf()),
        ];
        start.extend_from_slice(operations);
        Disk::after(&start, coin).entries.get(&file) == Some(&Some(vec![1; 2000]))
    };
    assert!((0..100).all(|_| whole(&careful)));
    for missing in [2, 4] {
        let mut careless = careful.to_vec();
        careless.remove(missing);
        let n = (0..100).filter(|_| whole(&careless)).count();
        assert!(n < 90, "without operation {missing} {n} of 100 are whole");
    }
}
