//! `doctor`: what this machine offers and what is used of it.

use std::fs;

use clap::Args;
use serde_json::{Map, json};

use super::{Common, Device, print, print_json};
use crate::{
    dtype::Dtype,
    error::Result,
    kernels::{
        cpu::{Cpu, Peaks, isa::Isa},
        cuda::{self, Cuda},
    },
};

#[derive(Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    pub(super) common: Common,
}

impl Doctor {
    pub(super) fn run(&self) -> Result<()> {
        let dtype = self.common.dtype().unwrap_or(Dtype::Bf16);
        let cpu = Cpu::new(dtype, self.common.n_threads())?;
        let available: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
        let model = cpu_model();
        let memory = field("/proc/meminfo", "MemTotal").unwrap_or_else(|| "unknown".into());
        let free = field("/proc/meminfo", "MemAvailable").unwrap_or_else(|| "unknown".into());
        let forced = std::env::var("POLYTAPE_ISA").ok().filter(|name| !name.is_empty());
        let caches: Vec<String> = (0..4)
            .filter_map(|i| {
                let dir = format!("/sys/devices/system/cpu/cpu0/cache/index{i}");
                let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).ok();
                let (level, kind, size) = (read("level")?, read("type")?, read("size")?);
                Some(format!("L{} {} {}", level.trim(), kind.trim().to_lowercase(), size.trim()))
            })
            .collect();
        let Peaks { fma, amx, read, read_by_one } = cpu.peaks();
        let cuda = cuda::probe();
        if let Device::Cuda = self.common.device {
            Cuda::new(dtype)?; // Fails where --device cuda would.
        }
        if self.common.json {
            return print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"), "cpu": model, "isa": cpu.isa().name(),
                "isa_available": available, "isa_forced": forced, "threads": cpu.n_threads(),
                "memory": memory, "memory_available": free, "caches": caches,
                "fma_gflop_per_s": fma / 1e9, "amx_gflop_per_s": amx.map(|amx| amx / 1e9),
                "read_gb_per_s": read / 1e9, "read_gb_per_s_one_thread": read_by_one / 1e9,
                "cuda": cuda.iter().map(|(k, v)| ((*k).to_owned(), v.clone().into())).collect::<Map<_, _>>(),
            }));
        }
        let why = match forced {
            Some(_) => "forced by POLYTAPE_ISA",
            None => "the fastest one",
        };
        for (name, value) in [
            ("polytape", env!("CARGO_PKG_VERSION").to_owned()),
            ("cpu", model),
            ("caches", caches.join(", ")),
            ("instruction sets", available.join(", ")),
            ("in use", format!("{} ({why}), {} threads", cpu.isa().name(), cpu.n_threads())),
            ("f32 peak", format!("{:.0} GFLOP/s, measured now", fma / 1e9)),
            ("bf16 tiles", amx.map_or("no AMX".into(), |amx| format!("{:.0} GFLOP/s", amx / 1e9))),
            ("memory", format!("{memory}, {free} available")),
            (
                "read from memory",
                format!("{:.1} GB/s, {:.1} GB/s by one thread", read / 1e9, read_by_one / 1e9),
            ),
        ]
        .into_iter()
        .chain(cuda)
        {
            print(&format!("{name:<17} {value}"))?;
        }
        Ok(())
    }
}

/// What the CPU calls itself.
pub(super) fn cpu_model() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into())
}

/// The value of a field in one of Linux's `name: value` files.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
