//! Kubernetes custom metrics from Sysdig Monitor.
pub mod quantity;
pub mod timestamp;
