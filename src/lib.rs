//! The library of the program, its tests and its demo; see ARCHITECTURE.md. Its interface is [`run::run`].
#![doc(hidden)]

mod api;
mod auth;
mod certs;
pub mod commands;
pub mod config;
pub mod data;
pub mod definitions;
pub mod der;
mod discovery;
mod door;
pub mod error;
mod handler;
pub mod head;
pub mod kube;
mod metrics;
mod promql;
pub mod quantity;
mod readings;
pub mod requestheader;
pub mod route;
pub mod run;
pub mod selector;
mod store;
pub mod sysdig;
pub mod tls;

/// The adapter's own words, and those of others that nearly every file uses.
mod prelude {
    pub(crate) use crate::api::{JSON, Response, response, rfc3339};
    pub(crate) use crate::config::{Config, Secret};
    pub(crate) use crate::error::{Error, Reason, Result, ensure, quoted, refusal};
    pub(crate) use crate::kube::{Kube, ROLES, items, named, text};
    pub(crate) use crate::route::{APIS, EXTERNAL, GROUP, Read, Resource, Route, Select, percent_encode};
    pub(crate) use crate::selector::{Operator, Requirement, Tuning, settle};
    pub(crate) use crate::sysdig::{Object, Question, Row, Rows, Scope, Sysdig};
    pub(crate) use crate::{door::Connections, forever, lock, metrics, quantity::Quantity, unix_now};
    pub(crate) use crate::{requestheader::Trust, tls::Serving};
    pub(crate) use serde_json::{Value, json};
    pub(crate) use std::collections::{BTreeMap, BTreeSet};
    pub(crate) use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    pub(crate) use std::sync::{Arc, Condvar, Mutex, PoisonError};
    pub(crate) use std::time::{Duration, Instant};
    pub(crate) use std::{iter, thread};
    pub(crate) use ureq::http::Method;
}

pub(crate) fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// At least 0 and below 1, in the 53 bits of the type, for what must differ between replicas or starts.
pub(crate) fn random() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(0_u8) >> 11) as f64 / (1_u64 << 53) as f64
}

/// What lives as long as the process does.
pub(crate) fn forever<T>(it: T) -> &'static T {
    Box::leak(Box::new(it))
}

/// Takes a lock. What a thread that panicked leaves behind is usable: nothing panics between two changes.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
