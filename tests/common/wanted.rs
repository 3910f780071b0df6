//! Which backends `POLYTAPE_BACKENDS` names.

/// Those that there are.
const NAMES: [&str; 4] = ["cpu", "emulated-cpu", "emulated", "gpu"];

/// Whether it has a backend, as it does without the variable. A name that is none would leave tests without a backend,
/// and they would pass.
pub(crate) fn is_wanted(name: &str) -> bool {
    assert!(NAMES.contains(&name));
    let Ok(list) = std::env::var("POLYTAPE_BACKENDS") else { return true };
    for name in list.split(',') {
        assert!(
            NAMES.contains(&name),
            "POLYTAPE_BACKENDS has {name:?}, which is none of {NAMES:?}"
        );
    }
    list.split(',').any(|n| n == name)
}
