//! The current request header configuration, followed while the process runs.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::requestheader::RequestHeader;

/// How often the ConfigMap is read when nothing calls for it.
const PERIOD: Duration = Duration::from_secs(10);
/// An unknown certificate calls for a read, but not more often than this.
const SHORTEST: Duration = Duration::from_secs(1);

/// Whom to trust, as last read; the last good value stays when a later one is bad.
#[derive(Debug, Default)]
pub struct Trust {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Arc<RequestHeader>>,
    reads: u64,
    wanted: bool,
}

impl Trust {
    /// The configuration in force; None before the first successful read.
    pub fn current(&self) -> Option<Arc<RequestHeader>> {
        self.lock().current.clone()
    }

    /// Asks for a read now and waits for it, at most `patience`: a certificate that is not known
    /// yet may be one of a rotation.
    pub fn refreshed(&self, patience: Duration) -> Option<Arc<RequestHeader>> {
        let mut state = self.lock();
        state.wanted = true;
        self.changed.notify_all();
        let seen = state.reads;
        let (state, _) = self
            .changed
            .wait_timeout_while(state, patience, |state| state.reads == seen)
            .unwrap_or_else(PoisonError::into_inner);
        state.current.clone()
    }

    /// Calls `read` again and again, for ever.
    pub fn follow(&self, read: impl Fn() -> Option<RequestHeader>) {
        loop {
            let started = Instant::now();
            let found = read();
            let mut state = self.lock();
            if let Some(found) = found {
                state.current = Some(Arc::new(found));
            }
            state.reads += 1;
            state.wanted = false;
            self.changed.notify_all();
            drop(state);
            std::thread::sleep(SHORTEST.saturating_sub(started.elapsed()));
            let state = self.lock();
            let period = if state.current.is_some() { PERIOD } else { SHORTEST };
            let _ = self.changed.wait_timeout_while(state, period, |state| !state.wanted);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
