//! The `sysdig-metrics-adapter` program: the server, or a command; its settings are environment variables, see README.md.

use sysdig_metrics_adapter::{commands, run};

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|it| it.to_string_lossy().into_owned()).collect();
    if arguments.is_empty() { run::run() } else { commands::run(&arguments) }
}
