//! Kubernetes custom metrics from Sysdig Monitor.
//!
//! The library exists for the program, its tests and its demo; see ARCHITECTURE.md. Its interface is [`run::run`].
#![doc(hidden)]

mod api;
mod auth;
mod certs;
mod changes;
pub mod config;
mod connections;
mod data;
pub mod der;
mod discovery;
mod door;
pub mod error;
mod handler;
pub mod head;
pub mod kube;
mod promql;
pub mod quantity;
mod readings;
pub mod requestheader;
pub mod route;
pub mod run;
pub mod selector;
mod server;
pub mod sysdig;
mod timestamp;
pub mod tls;

/// Takes a lock. What a thread that panicked leaves behind is usable: nothing panics between two changes.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
