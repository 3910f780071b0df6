//! The kernels' tests inside the binary.

use std::process::Command;

use serde_json::Value;

use crate::{fails, ok, scratch, str, text};

#[test]
fn verify_reports_every_kernel_on_every_instruction_set() {
    let path = scratch("verify").join("report.json");
    let arguments = ["verify", "--minutes", "0", "--seed", "7", "--json", "--output", str(&path)];
    let report: Value = serde_json::from_str(&ok(&arguments)).unwrap();
    assert_eq!(report, serde_json::from_str::<Value>(&text(&path)).unwrap());
    assert_eq!(report["n_failures"], 0);
    let isas = report["isa_available"].as_array().unwrap();
    let kernels = report["kernels"].as_array().unwrap();
    for isa in isas {
        for kernel in ["linear", "lora_backward", "attention_backward", "adamw", "head_loss"] {
            for dtype in ["f32", "bf16"] {
                let backend = format!("{} {dtype}", isa.as_str().unwrap());
                let found =
                    kernels.iter().find(|k| k["kernel"] == kernel && k["backend"] == *backend);
                let found = found.unwrap_or_else(|| panic!("{kernel} on {backend}: {report}"));
                // Once, again, on three other numbers of threads, and parts of it.
                assert!(found["cases"] == 1 && found["executions"].as_u64() >= Some(5), "{found}");
                assert!(found["worst_error"].as_f64().unwrap() <= 1.0, "{found}");
            }
        }
    }
    // A case alone, in words; what is none.
    let case = kernels.iter().find(|k| k["kernel"] == "norm").unwrap()["worst_case"].as_str();
    let output = Command::new(env!("CARGO_BIN_EXE_polytape"))
        .args(["verify", "--threads", "1", "--case", case.unwrap()])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--threads is of no effect here"));
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("every kernel agrees") && printed.contains("\nnorm "), "{printed}");
    assert!(!printed.contains("\nlinear "), "{printed}");
    fails(&["verify", "--case", "softmax/1"], 2, "a kernel of linear, linear_backward");
    fails(&["verify", "--minutes=-1"], 2, "--minutes");
}

/// Flags of every verb that would do nothing here, and a GPU that is not there.
#[test]
fn verify_refuses_what_it_would_ignore() {
    fails(&["verify", "--dtype", "f32"], 2, "verify takes no --dtype");
    // Where there is a GPU, it is hidden.
    let output = Command::new(env!("CARGO_BIN_EXE_polytape"))
        .args(["verify", "--minutes", "0", "--device", "cuda"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("use --device cpu"), "{stderr}");
}
