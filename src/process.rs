//! What this process uses, as Linux tells it.

use std::fs;

/// Memory of this process, in MiB; 0 where the system does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// The peak of the resident size, mapped weights included.
    pub peak_rss_mib: u64,
    /// Resident anonymous memory now: without the mapped weights.
    pub anon_mib: u64,
}

/// Bytes that the system could still give without swapping, if it tells.
pub fn available_bytes() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// How much of this process's memory lies in huge pages, in MiB, mapped files included; 0 where the system does not tell.
pub fn huge_mib() -> u64 {
    let all = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let kinds = ["AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"];
    kinds.iter().map(|kind| mib(&all, kind)).sum()
}

/// A field of a file of Linux's, rounded up to MiB; 0 if it is not there.
fn mib(fields: &str, field: &str) -> u64 {
    let line = fields.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
    kib.unwrap_or(0_u64).div_ceil(1024)
}

impl Memory {
    /// As of now.
    pub fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self { peak_rss_mib: mib(&status, "VmHWM:"), anon_mib: mib(&status, "RssAnon:") }
    }
}
