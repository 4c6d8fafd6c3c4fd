//! The `sysdig-metrics-adapter` program.
fn main() {}
