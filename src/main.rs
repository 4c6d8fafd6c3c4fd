//! The `sysdig-metrics-adapter` program; its settings are environment variables, see README.md.

use std::process::ExitCode;

fn main() -> ExitCode {
    sysdig_metrics_adapter::run::run()
}
