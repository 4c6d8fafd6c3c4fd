//! The `sysdig-metrics-adapter` program; its settings are environment variables, see README.md.

fn main() -> std::process::ExitCode {
    sysdig_metrics_adapter::run::run()
}
