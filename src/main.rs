//! The `sysdig-metrics-adapter` program; its settings are environment variables, see README.md.

use std::io::{Write, stderr};
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().len() < 2 {
        return sysdig_metrics_adapter::run::run();
    }
    let name = concat!("sysdig-metrics-adapter ", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(stderr(), "{name} takes no arguments: its settings are environment variables, see README.md");
    ExitCode::from(2)
}
