//! Which id a task's name has.
//!
//! ```text
//! tasks.json {"tasks": ["qnli", "sst2"]}   ->  qnli 0, sst2 1     for any data
//! rows with names and ids                  ->  as they say        for training
//! rows with names only                     ->  0, 1, ... in order of first appearance
//! ```
//!
//! A name has one id and an id at most one name. Where a row gives both, the name decides and the id
//! must agree; a disagreement is an error with the row's line, because a row trained under another
//! task's routing is not visible in any loss. Ids are below [`TaskNames::n_tasks`].

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use crate::{
    error::{Error, Result},
    formats::{
        json::{self, excerpt, list_names},
        poly_config::MAX_TASKS,
        rows::Row,
    },
};

/// The name of the file in an adapter folder.
pub const FILE_NAME: &str = "tasks.json";
/// The most bytes of `tasks.json`.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The names and ids of tasks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskNames {
    names: BTreeMap<u32, String>,
    ids: HashMap<String, u32>,
    n_tasks: usize,
}

impl TaskNames {
    /// Names for the ids 0, 1, ...; what is wrong with them otherwise.
    pub fn from_list(list: &[String]) -> Result<Self, String> {
        if list.is_empty() || list.len() > MAX_TASKS {
            return Err(format!("expected 1 to {MAX_TASKS} tasks, found {}", list.len()));
        }
        let mut tasks = Self { n_tasks: list.len(), ..Self::default() };
        for (id, name) in (0..).zip(list) {
            if name.is_empty() {
                return Err(format!("the name of task {id} is empty"));
            }
            if let Some(first) = tasks.ids.insert(name.clone(), id) {
                return Err(format!("tasks {first} and {id} have the same name {}", excerpt(name)));
            }
            tasks.names.insert(id, name.clone());
        }
        Ok(tasks)
    }

    /// `n_tasks` ids without names: those of an adapter that has no `tasks.json`.
    pub fn unnamed(n_tasks: usize) -> Self {
        Self { n_tasks, ..Self::default() }
    }

    /// Reads `tasks.json` of an adapter folder, if there is one.
    pub fn open(adapter_dir: impl AsRef<Path>) -> Result<Option<Self>> {
        #[derive(serde::Deserialize)]
        struct File {
            tasks: Vec<String>,
        }
        let path = adapter_dir.as_ref().join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let file: File = json::read_json(&path, MAX_FILE_BYTES)?;
        Self::from_list(&file.tasks).map(Some).map_err(|detail| Error::file(path, detail))
    }

    /// The tasks of training rows: as the rows' ids say if any row has one, else numbered in order of
    /// first appearance. Each row comes with its file, for the messages.
    pub fn from_rows<'a>(
        rows: impl IntoIterator<Item = (&'a Path, &'a Row)> + Clone,
    ) -> Result<Self> {
        let fail = |(path, row): (&Path, &Row), detail| {
            Err(Error::Line { path: path.to_path_buf(), line: row.line, detail })
        };
        let mut tasks = Self::default();
        let mut first: HashMap<u32, (&Path, usize)> = HashMap::new(); // Of the names that have an id.
        let place = |path: &Path, (file, line): (&Path, usize)| match file == path {
            true => format!("on line {line}"),
            false => format!("on line {line} of {}", file.display()),
        };
        for at @ (path, row) in rows.clone() {
            let Some(id) = row.task_id else { continue };
            if id as usize >= MAX_TASKS {
                return fail(
                    at,
                    format!("task_id {id} is too large: at most {MAX_TASKS} tasks are supported"),
                );
            }
            tasks.n_tasks = tasks.n_tasks.max(id as usize + 1);
            let Some(name) = &row.task else { continue };
            match (tasks.ids.get(name), tasks.names.get(&id)) {
                (None, None) => {
                    tasks.ids.insert(name.clone(), id);
                    tasks.names.insert(id, name.clone());
                    first.insert(id, (path, row.line));
                }
                (Some(&known), _) if known == id => {}
                (Some(known), _) => {
                    let place = place(path, first[known]);
                    return fail(
                        at,
                        format!(
                            "task {} has task_id {id} here, but {known} {place}",
                            excerpt(name)
                        ),
                    );
                }
                (None, Some(known)) => {
                    let (name, known) = (excerpt(name), excerpt(known));
                    let place = place(path, first[&id]);
                    return fail(
                        at,
                        format!("task_id {id} is task {name} here, but {known} {place}"),
                    );
                }
            }
        }
        let has_ids = tasks.n_tasks > 0;
        for at @ (_, row) in rows {
            let Some(name) = &row.task else { continue };
            if tasks.ids.contains_key(name) {
                continue;
            }
            if has_ids {
                return fail(
                    at,
                    format!(
                        "task {} has no task_id in any row, but other tasks have: give one to \
                        all or to none",
                        excerpt(name)
                    ),
                );
            }
            if tasks.n_tasks == MAX_TASKS {
                return fail(at, format!("more than {MAX_TASKS} tasks"));
            }
            let id = tasks.n_tasks as u32;
            tasks.ids.insert(name.clone(), id);
            tasks.names.insert(id, name.clone());
            tasks.n_tasks += 1;
        }
        Ok(tasks)
    }

    /// The id of a row's task; `None` if the row names none. `path` is for the messages.
    pub fn resolve(&self, row: &Row, path: &Path) -> Result<Option<u32>> {
        let fail = |detail| Err(Error::Line { path: path.to_path_buf(), line: row.line, detail });
        if let Some(id) = row.task_id
            && id as usize >= self.n_tasks
        {
            return fail(format!(
                "task_id {id} is out of range: there are {} tasks, 0 to {}",
                self.n_tasks,
                self.n_tasks.saturating_sub(1)
            ));
        }
        let Some(name) = &row.task else { return Ok(row.task_id) };
        match (self.ids.get(name), row.task_id) {
            (Some(&id), None) => Ok(Some(id)),
            (Some(&id), Some(given)) if id == given => Ok(Some(id)),
            (Some(id), Some(given)) => fail(format!(
                "task {} has id {id}, but the row's task_id is {given}",
                excerpt(name)
            )),
            // The adapter knows no names, so the id is all there is to go by.
            (None, Some(given)) if self.names.is_empty() => Ok(Some(given)),
            (None, None) if self.names.is_empty() => fail(format!(
                "task {} has no id: the adapter has no {FILE_NAME}; give task_id",
                excerpt(name)
            )),
            (None, _) => fail(format!(
                "task {} is not known; known: {}",
                excerpt(name),
                list_names(self.names.values().map(String::as_str))
            )),
        }
    }

    /// Names for `n_tasks` ids: those that are known, and an id's number where it has none.
    pub fn filled(&self, n_tasks: usize) -> Vec<String> {
        let filler = |id: usize| {
            let mut name = id.to_string();
            while self.id(&name).is_some() {
                name.insert(0, '_');
            }
            name
        };
        (0..n_tasks)
            .map(|id| self.name(id as u32).map_or_else(|| filler(id), str::to_owned))
            .collect()
    }

    /// Ids are below this.
    pub fn n_tasks(&self) -> usize {
        self.n_tasks
    }

    /// The id of a name.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// The name of an id, if it has one.
    pub fn name(&self, id: u32) -> Option<&str> {
        self.names.get(&id).map(String::as_str)
    }

    /// All names, by id, if every id has one.
    pub fn to_list(&self) -> Option<Vec<String>> {
        (self.names.len() == self.n_tasks).then(|| self.names.values().cloned().collect())
    }

    /// The content of `tasks.json`, if every id has a name.
    pub fn to_json(&self) -> Option<String> {
        self.to_list().map(|list| format!("{:#}", serde_json::json!({ "tasks": list })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::rows::{RowReader, Targets};

    /// Rows of (task, task_id), on lines 1, 2, ...
    fn rows(tasks: &[(&str, i64)]) -> Vec<Row> {
        let mut text = String::new();
        for &(name, id) in tasks {
            let mut row = serde_json::json!({"input": "x"});
            if !name.is_empty() {
                row["task"] = name.into();
            }
            if id >= 0 {
                row["task_id"] = id.into();
            }
            text += &format!("{row}\n");
        }
        RowReader::new(text.as_bytes(), "d.jsonl", Targets::Optional).map(Result::unwrap).collect()
    }

    fn learn(given: &[(&str, i64)]) -> Result<TaskNames, String> {
        let rows = rows(given);
        let rows = rows.iter().map(|row| (Path::new("d.jsonl"), row));
        TaskNames::from_rows(rows).map_err(|error| error.to_string())
    }

    #[test]
    fn training_rows_number_the_tasks() {
        let path = Path::new("d.jsonl");
        let tasks = learn(&[("b", -1), ("a", -1), ("b", -1)]).unwrap();
        assert_eq!((tasks.id("b"), tasks.id("a"), tasks.n_tasks()), (Some(0), Some(1), 2));
        assert_eq!(tasks.to_list(), Some(vec!["b".to_owned(), "a".to_owned()]));

        // A name that is bound further down is bound all the same.
        let given = [("a", -1), ("b", 0), ("a", 2), ("", 1)];
        let tasks = learn(&given).unwrap();
        assert_eq!((tasks.id("a"), tasks.name(0), tasks.name(1)), (Some(2), Some("b"), None));
        assert_eq!((tasks.n_tasks(), tasks.to_list()), (3, None));
        let ids: Vec<_> =
            rows(&given).iter().map(|row| tasks.resolve(row, path).unwrap()).collect();
        assert_eq!(ids, [Some(2), Some(0), Some(2), Some(1)]);

        assert_eq!(learn(&[("", -1)]).unwrap(), TaskNames::default());
        let error = learn(&[("a", 0), ("b", 1), ("a", 1)]).unwrap_err();
        assert_eq!(error, "d.jsonl:3: task \"a\" has task_id 1 here, but 0 on line 1");
        let error = learn(&[("a", 0), ("b", 0)]).unwrap_err();
        assert_eq!(error, "d.jsonl:2: task_id 0 is task \"b\" here, but \"a\" on line 1");
        let error = learn(&[("a", 0), ("b", -1)]).unwrap_err();
        assert!(error.starts_with("d.jsonl:2: task \"b\" has no task_id in any row"), "{error}");
        let error = learn(&[("a", 4_000_000_000)]).unwrap_err();
        assert!(error.starts_with("d.jsonl:1: task_id 4000000000 is too large"), "{error}");
    }

    #[test]
    fn rows_agree_with_a_given_list() {
        let path = Path::new("d.jsonl");
        let tasks = TaskNames::from_list(&["a".to_owned(), "b".to_owned()]).unwrap();
        let resolve = |tasks: &TaskNames, row: (&str, i64)| {
            tasks.resolve(&rows(&[row])[0], path).map_err(|error| error.to_string())
        };
        for (row, id) in
            [(("b", -1), Some(1)), (("b", 1), Some(1)), (("", 0), Some(0)), (("", -1), None)]
        {
            assert_eq!(resolve(&tasks, row), Ok(id));
        }
        for (row, reason) in [
            (("b", 0), "task \"b\" has id 1, but the row's task_id is 0"),
            (("c", -1), "task \"c\" is not known; known: \"a\", \"b\""),
            (("c", 1), "task \"c\" is not known"),
            (("", 2), "task_id 2 is out of range: there are 2 tasks, 0 to 1"),
        ] {
            let error = resolve(&tasks, row).unwrap_err();
            assert!(error.starts_with("d.jsonl:1: ") && error.contains(reason), "{error}");
        }
        let unnamed = TaskNames::unnamed(2);
        assert_eq!(resolve(&unnamed, ("x", 1)), Ok(Some(1)));
        assert!(
            resolve(&unnamed, ("x", -1)).unwrap_err().contains("has no tasks.json; give task_id")
        );
    }

    #[test]
    fn the_file_is_read_back_and_bad_ones_are_refused() {
        let folder = std::env::temp_dir().join(format!("polytape-tasks-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(TaskNames::open(&folder).unwrap(), None);
        let tasks = TaskNames::from_list(&["é".to_owned(), "b".to_owned()]).unwrap();
        std::fs::write(folder.join(FILE_NAME), tasks.to_json().unwrap()).unwrap();
        assert_eq!(TaskNames::open(&folder).unwrap(), Some(tasks));
        for (json, reason) in [
            (r#"{"tasks":["a","b","a"]}"#, "tasks 0 and 2 have the same name \"a\""),
            (r#"{"tasks":["a",""]}"#, "the name of task 1 is empty"),
            (r#"{"tasks":[]}"#, "found 0"),
            (r#"{"tasks":[1]}"#, "expected a string"),
            (r#"{"names":["a"]}"#, "missing field `tasks`"),
        ] {
            std::fs::write(folder.join(FILE_NAME), json).unwrap();
            let error = TaskNames::open(&folder).unwrap_err().to_string();
            assert!(error.contains("tasks.json: ") && error.contains(reason), "{error}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
