//! Kubernetes custom metrics from Sysdig Monitor.
//!
//! ```text
//! door      accept, cap, deadlines, TLS, one bounded head, rebuilt; class = front-proxy or direct
//! server    tiny_http worker takes the request; slow work goes to the slow pool
//! handler   who asks, then (method, path, query) → typed Route → answer
//! readings  the object exists (kube), its value is known and fresh (sysdig)
//! api       MetricValueList / Status
//! ```
//!
//! The library exists for the program, its tests and its demo; see ARCHITECTURE.md.

pub mod api;
pub mod auth;
pub mod certs;
pub mod changes;
pub mod config;
pub mod connections;
pub mod der;
pub mod discovery;
pub mod door;
pub mod error;
pub mod handler;
pub mod head;
pub mod kube;
pub mod quantity;
pub mod readings;
pub mod requestheader;
pub mod route;
pub mod run;
pub mod server;
pub mod sysdig;
pub mod timestamp;
pub mod tls;

/// Takes a lock. What a thread that panicked leaves behind is usable: nothing panics between two changes.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
