//! What every refusal has in common.

use sysdig_metrics_adapter::error::Error;

/// The token of the stand-ins, which no message may show. It begins as no escape such as `\0` ends.
pub const TOKEN: &str = "S0b5c7e1d-secret";

/// A refusal is one bounded line without secrets.
pub fn readable<T>(result: &Result<T, Error>) {
    if let Err(error) = result {
        assert!(!error.message.chars().any(char::is_control), "{:?}", error.message);
        assert!(!error.message.contains(TOKEN), "{}", error.message);
        assert!(error.message.len() < 3000, "{}", error.message.len());
    }
}
