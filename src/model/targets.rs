//! Which linears of a base an adapter adapts: PEFT's matching rules.
//!
//! ```text
//! target_modules   none          the architecture's default (T5: q, v)
//!                  list          exact path, or path that ends in "." + entry
//!                  string        regular expression that matches the whole path; look-around, too
//!                  "all-linear"  every linear but the output head
//! exclude_modules  list, string  the same matching; wins
//! ```
//!
//! As in PEFT, a target that matches something which is not a linear is an error, and so is a set of
//! targets that matches nothing. Unlike in PEFT, widths that `n_splits` does not divide are refused
//! here, not at the first step.

use std::collections::BTreeSet;

use regex::RegexBuilder;

use super::{Module, ModuleKind};
use crate::{
    error::{Error, Result},
    formats::{
        json::{excerpt, list_names},
        poly_config::{PolyConfig, TargetModules},
    },
};

const ALL_LINEAR: &str = "all-linear";
const MAX_PATTERN_BYTES: usize = 1 << 10;
/// What a pattern may become.
const MAX_COMPILED_BYTES: usize = 1 << 20;
/// Steps of a search with look-around: the time of others grows with the path alone.
const MAX_STEPS: usize = 100_000;

/// A linear that is adapted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its path in the base.
    pub path: String,
    /// Its number among the base's linears.
    pub index: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
}

/// The adapted linears in the base's order, and the `target_modules` to write down for them.
///
/// # Errors
/// If nothing matches, something that is not a linear matches, a pattern is not one, or `n_splits`
/// does not divide a width.
pub fn resolve(
    config: &PolyConfig,
    modules: &[Module],
    default_targets: &[&str],
) -> Result<(Vec<Target>, TargetModules)> {
    config.validate()?;
    let written = match &config.target_modules {
        Some(targets) => targets.clone(),
        None => TargetModules::List(default_targets.iter().map(|&t| t.to_owned()).collect()),
    };
    let excluded = config.exclude_modules.as_ref().map(Matcher::new).transpose()?;
    let is_excluded = |path: &str| excluded.as_ref().map_or(Ok(false), |m| m.matches(path));
    let all_linear = matches!(&written, TargetModules::Pattern(p) if is_all_linear(p));
    let matcher = if all_linear { None } else { Some(Matcher::new(&written)?) };

    let mut targets = Vec::new();
    for Module { path, kind } in modules {
        let hit = match (&matcher, kind) {
            (Some(matcher), _) => matcher.matches(path)?,
            (None, ModuleKind::Linear { .. }) => true,
            (None, _) => false,
        };
        if !hit || is_excluded(path)? {
            continue;
        }
        match *kind {
            ModuleKind::Linear { index, d_in, d_out } => {
                targets.push(Target { path: path.clone(), index, d_in, d_out });
            }
            ModuleKind::Head => {
                return Err(Error::Config(format!(
                    "target_modules matches {path}, the output head, which cannot be adapted; exclude it"
                )));
            }
            ModuleKind::Other => {
                return Err(Error::Config(format!(
                    "target_modules matches {path}, which is not a linear; name linears only"
                )));
            }
        }
    }
    if targets.is_empty() {
        return Err(Error::Config(nothing_matched(&written, excluded.is_some(), modules)));
    }
    for Target { path, d_in, d_out, .. } in &targets {
        for (axis, width) in [("input", d_in), ("output", d_out)] {
            if width % config.n_splits != 0 {
                return Err(Error::Config(format!(
                    "n_splits {} does not divide the {axis} width {width} of {path}",
                    config.n_splits
                )));
            }
        }
    }
    let written = if all_linear {
        named(targets.iter().map(|target| &target.path), modules)
    } else {
        written
    };
    Ok((targets, written))
}

fn is_all_linear(pattern: &str) -> bool {
    pattern.eq_ignore_ascii_case(ALL_LINEAR)
}

enum Matcher {
    List(BTreeSet<String>),
    Pattern(regex::Regex),
    /// A pattern with look-around or references back.
    Fancy(fancy_regex::Regex),
}

impl Matcher {
    fn new(modules: &TargetModules) -> Result<Self> {
        match modules {
            TargetModules::List(list) => Ok(Self::List(list.clone())),
            TargetModules::Pattern(pattern) => {
                if pattern.len() > MAX_PATTERN_BYTES {
                    return Err(Error::Config(format!(
                        "a module pattern of {} bytes is too long: at most {MAX_PATTERN_BYTES} are allowed",
                        pattern.len()
                    )));
                }
                let compile = |pattern: &str| {
                    RegexBuilder::new(pattern).size_limit(MAX_COMPILED_BYTES).build()
                };
                let compile_fancy = |pattern: &str| {
                    fancy_regex::RegexBuilder::new(pattern)
                        .delegate_size_limit(MAX_COMPILED_BYTES)
                        .backtrack_limit(MAX_STEPS)
                        .build()
                };
                // By itself first: "q)|(?:v" must not become a pattern by what is put around it.
                let whole = format!(r"\A(?:{pattern})\z");
                let refused = |why: &str| {
                    // The lines above the last one draw the pattern.
                    let reason = why.lines().last().unwrap_or_default();
                    let pattern = excerpt(pattern);
                    Error::Config(format!("{pattern} is not a pattern for module names: {reason}"))
                };
                let error = match compile(pattern).and_then(|_| compile(&whole)) {
                    Ok(compiled) => return Ok(Self::Pattern(compiled)),
                    Err(error) => error.to_string(),
                };
                if !["look-around", "backreferences"].iter().any(|what| error.contains(what)) {
                    return Err(refused(&error));
                }
                if pattern.contains('{') {
                    // The crate bounds neither what counts in a look-behind become nor empty repetitions.
                    return Err(refused("repetitions by {} are not supported beside look-around"));
                }
                compile_fancy(pattern)
                    .and_then(|_| compile_fancy(&whole))
                    .map(Self::Fancy)
                    .map_err(|error| refused(&error.to_string()))
            }
        }
    }

    fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::Pattern(pattern) => Ok(pattern.is_match(path)),
            Self::Fancy(pattern) => pattern.is_match(path).map_err(|_| {
                let pattern = excerpt(pattern.as_str());
                Error::Config(format!(
                    "{pattern} takes more than {MAX_STEPS} steps at {path}: simplify it"
                ))
            }),
            Self::List(list) => Ok(list.contains(path)
                || path.match_indices('.').any(|(dot, _)| list.contains(&path[dot + 1..]))),
        }
    }
}

/// `target_modules` for these paths: their last parts where they select no other module.
pub fn named<'p>(paths: impl IntoIterator<Item = &'p String>, modules: &[Module]) -> TargetModules {
    let paths: BTreeSet<&str> = paths.into_iter().map(String::as_str).collect();
    suffixes(&paths, modules)
}

/// The last parts of the targets' names where they select exactly the targets, else full paths.
fn suffixes(paths: &BTreeSet<&str>, modules: &[Module]) -> TargetModules {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let short: BTreeSet<String> = paths.iter().map(|path| last(path)).collect();
    let selected = modules.iter().filter(|m| short.contains(&last(&m.path))).count();
    if selected == paths.len() {
        TargetModules::List(short)
    } else {
        TargetModules::List(paths.iter().map(|&path| path.to_owned()).collect())
    }
}

fn nothing_matched(targets: &TargetModules, excludes: bool, modules: &[Module]) -> String {
    let linears: BTreeSet<&str> = modules
        .iter()
        .filter(|m| matches!(m.kind, ModuleKind::Linear { .. }))
        .filter_map(|m| m.path.rsplit('.').next())
        .collect();
    let names: Vec<_> = linears.into_iter().collect();
    let targets = match targets {
        TargetModules::List(list) => {
            format!("[{}]", list_names(list.iter().map(String::as_str)))
        }
        TargetModules::Pattern(pattern) => excerpt(pattern),
    };
    let excludes = if excludes { " after exclude_modules" } else { "" };
    format!(
        "target_modules {targets} matches nothing{excludes}; the base's linears are named {}",
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<Module> {
        let linear = |path: &str, index| Module {
            path: path.into(),
            kind: ModuleKind::Linear { index, d_in: 12, d_out: 8 },
        };
        vec![
            Module { path: "encoder".into(), kind: ModuleKind::Other },
            linear("encoder.0.q", 0),
            linear("encoder.0.v", 1),
            linear("decoder.0.q", 2),
            linear("decoder.0.qv", 3),
            Module { path: "lm_head".into(), kind: ModuleKind::Head },
        ]
    }

    fn list(names: &[&str]) -> Option<TargetModules> {
        Some(TargetModules::List(names.iter().map(|&n| n.to_owned()).collect()))
    }

    fn pattern(pattern: &str) -> Option<TargetModules> {
        Some(TargetModules::Pattern(pattern.into()))
    }

    fn paths(targets: Option<TargetModules>, exclude: Option<TargetModules>) -> Result<Vec<usize>> {
        let config =
            PolyConfig { target_modules: targets, exclude_modules: exclude, ..Default::default() };
        let (targets, _) = resolve(&config, &modules(), &["q", "v"])?;
        Ok(targets.iter().map(|t| t.index).collect())
    }

    #[test]
    fn matching_is_pefts() {
        assert_eq!(paths(None, None).unwrap(), [0, 1, 2]);
        assert_eq!(paths(list(&["q"]), None).unwrap(), [0, 2]);
        assert_eq!(paths(list(&["0.q", "decoder.0.qv"]), None).unwrap(), [0, 2, 3]);
        assert_eq!(paths(pattern(r".*\.q"), None).unwrap(), [0, 2]); // Whole path: not "qv".
        assert_eq!(paths(pattern("q|encoder.0.v"), None).unwrap(), [1]); // Anchors hold the bar.
        assert_eq!(paths(pattern("All-Linear"), None).unwrap(), [0, 1, 2, 3]);
        assert_eq!(paths(pattern(r"(?!encoder).*\.q"), None).unwrap(), [2]);
        assert_eq!(paths(pattern(r".*(?<!decoder\.0)\.q|encoder.0.v"), None).unwrap(), [0, 1]);
        assert_eq!(paths(list(&["q"]), list(&["decoder"])).unwrap(), [0, 2]);
        assert_eq!(paths(list(&["q"]), pattern(r"decoder\..*")).unwrap(), [0]);
    }

    #[test]
    fn what_cannot_be_adapted_is_refused() {
        for (targets, exclude, message) in [
            (list(&["k"]), None, "matches nothing; the base's linears are named q, qv, v"),
            (list(&["all-linear"]), None, "matches nothing"),
            (list(&["v"]), list(&["v"]), "matches nothing after exclude_modules"),
            (list(&["encoder"]), None, "matches encoder, which is not a linear"),
            (list(&["lm_head"]), None, "the output head"),
            (pattern("("), None, "\"(\" is not a pattern for module names: error: unclosed group"),
            (pattern("q)|(?:v"), None, "is not a pattern for module names: error: unopened group"),
            (
                pattern("(?=q)|(v"),
                None,
                "is not a pattern for module names: Parsing error at position",
            ),
            (pattern(r"(?<=(\w{1,1000}){1,1000}q)x"), None, "not supported beside look-around"),
            (pattern("((?=.)){99999999999999}q"), None, "is not a pattern for module names"),
            (pattern("(?:(?=.).|(?=.).|(?=.).|(?=.).)*!"), None, "steps at encoder"),
            (list(&["\u{1b}[2J"]), None, r#"target_modules ["\u{1b}[2J"] matches nothing"#),
        ] {
            let error = paths(targets, exclude).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let config = PolyConfig { n_splits: 3, ..Default::default() };
        let error = resolve(&config, &modules(), &["q"]).unwrap_err().to_string();
        assert!(error.contains("n_splits 3 does not divide the output width 8 of encoder.0.q"));
    }

    #[test]
    fn all_linear_is_written_as_suffixes() {
        let config = PolyConfig { target_modules: pattern("all-linear"), ..Default::default() };
        let (_, written) = resolve(&config, &modules(), &[]).unwrap();
        assert_eq!(Some(written), list(&["q", "qv", "v"]));
    }
}
