//! Says in the log what changed, and only that: an outage is one line when it starts and one when it ends.

use crate::prelude::*;

/// Of each thing that fails: the reason, and how often it did so far.
static FAILING: Mutex<BTreeMap<&str, (Reason, u64)>> = Mutex::new(BTreeMap::new());

/// Passes on how `thing` went, and logs it if that is another state than before.
pub(crate) fn noted<T>(thing: &'static str, result: Result<T>) -> Result<T> {
    if let Some((level, line)) = change(thing, result.as_ref().err()) {
        log::log!(level, "{line}");
    }
    result
}

fn change(thing: &'static str, error: Option<&Error>) -> Option<(log::Level, String)> {
    let mut failing = lock(&FAILING);
    let (before, failures) = failing.remove(thing).unzip();
    let failures = failures.unwrap_or(0);
    let Some(Error { reason, message, .. }) = error else {
        return before.map(|_| (log::Level::Info, format!("{thing}: works again (failures: {failures})")));
    };
    failing.insert(thing, (*reason, failures + 1));
    let line = || (log::Level::Warn, format!("{thing}: {}: {message}", reason.word()));
    (before != Some(*reason)).then(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_two_lines_however_long() {
        let timeout = Error::new(Reason::BackendTimeout, "no answer within 5 s");
        let limited = Error::new(Reason::BackendRateLimited, "slow down");
        let lines: Vec<Option<String>> = [None, Some(&timeout), Some(&timeout), Some(&limited), Some(&limited), None, None]
            .into_iter()
            .map(|error| change("Sysdig", error).map(|(_, line)| line))
            .collect();
        let expected = [
            None,
            Some("Sysdig: backend-timeout: no answer within 5 s".to_owned()),
            None,
            Some("Sysdig: backend-rate-limited: slow down".to_owned()),
            None,
            Some("Sysdig: works again (failures: 4)".to_owned()),
            None,
        ];
        assert_eq!(lines, expected);
        assert!(change("Kubernetes", Some(&timeout)).is_some());
    }
}
