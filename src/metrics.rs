//! What the adapter tells of itself: in the log what changed, and only that, so that an outage is one line when it starts
//! and one when it ends; and metrics in the text format of Prometheus, whose names and meanings are in metrics.txt.
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use crate::{certs, handler::Handler, prelude::*};
use std::fs;

/// Seconds, for answers from memory as for ages.
const BOUNDS: [f64; 12] = [0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 90.0, 120.0, f64::INFINITY];

/// The sum of what was added, and how much of it is up to each bound.
type Series = (f64, [u64; BOUNDS.len()]);

/// By the end of the name and by labels, whose values are of closed sets: nothing that callers send makes it grow.
static SERIES: Mutex<BTreeMap<(&str, String), Series>> = Mutex::new(BTreeMap::new());

/// An observation of a histogram, or more of anything else.
pub(crate) fn add(name: &'static str, labels: impl Into<String>, value: f64) {
    let mut all = lock(&SERIES);
    let (sum, below) = all.entry((name, labels.into())).or_default();
    *sum += value;
    below.iter_mut().zip(BOUNDS).for_each(|(count, bound)| *count += u64::from(value <= bound));
}

/// `ok`, or the word for what is wrong.
pub(crate) fn outcome<T>(result: &Result<T>) -> &'static str {
    result.as_ref().err().map_or("ok", |error| error.reason.word())
}

/// Does `work`, and takes down how long that took and what came of it.
pub(crate) fn timed<T>(name: &'static str, labels: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (since, result) = (Instant::now(), work());
    add(name, format!(r#"{labels}outcome="{}""#, outcome(&result)), since.elapsed().as_secs_f64());
    result
}

/// Of each thing that fails: the reason, and how often it did so far.
pub(crate) static FAILING: Mutex<BTreeMap<&str, (Reason, u64)>> = Mutex::new(BTreeMap::new());

/// Passes on how `thing` went, and logs it if that is another state than before.
pub(crate) fn noted<T>(thing: &'static str, result: Result<T>) -> Result<T> {
    add("outcomes_total", format!(r#"thing="{thing}",reason="{}""#, outcome(&result)), 1.0);
    if let Some((level, line)) = change(thing, result.as_ref().err()) {
        log::log!(level, "{line}");
    }
    result
}

fn change(thing: &'static str, error: Option<&Error>) -> Option<(log::Level, String)> {
    let mut failing = lock(&FAILING);
    let (before, failures) = failing.remove(thing).unzip();
    let failures = failures.unwrap_or(0);
    let Some(error) = error else {
        return before.map(|_| (log::Level::Info, format!("{thing}: works again (failures: {failures})")));
    };
    failing.insert(thing, (error.reason, failures + 1));
    (before != Some(error.reason)).then(|| (log::Level::Warn, format!("{thing}: {error}")))
}

/// All of them, beside those that were added the states of this moment.
pub(crate) fn page(handler: &Handler) -> Response {
    let Handler { connections, definitions, serving, store, sysdig, .. } = handler;
    let mut all = lock(&SERIES).clone();
    let mut set = |name, labels: &str, value| _ = all.insert((name, labels.to_owned()), (value, Default::default()));
    let (version, hash) = (env!("CARGO_PKG_VERSION"), &definitions.in_force().hash);
    set("build_info", &format!(r#"version="{version}",config_hash="{hash}""#), 1.0);
    set("config_reload_successful", "", f64::from(lock(&definitions.0).1.is_none()));
    for (verified, busy) in [(false, false), (false, true), (true, false), (true, true)] {
        let count = lock(&connections.live).values().filter(|it| (it.verified, it.busy) == (verified, busy)).count();
        set("connections", &format!(r#"verified="{verified}",busy="{busy}""#), count as f64);
    }
    let (questions, readings) = lock(store).sizes();
    set("store_entries", r#"of="questions""#, questions as f64);
    set("store_entries", r#"of="readings""#, readings as f64);
    let (minute, used) = *lock(&sysdig.queries);
    let used = if minute == unix_now() / 60 { used } else { 0 };
    set("sysdig_queries_left", "", handler.config.max_queries.saturating_sub(used) as f64);
    let end = lock(&serving.key).as_ref().map_or(0, |pair| certs::end(&pair.cert));
    set("certificate_expiry_timestamp_seconds", "", end as f64);
    // proc(5); a tick is 10 ms wherever Kubernetes runs.
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let number = |text: &str| text.split_whitespace().next()?.parse::<f64>().ok();
    let ticks: f64 = read("/proc/self/stat").split(' ').skip(13).take(2).filter_map(number).sum();
    let memory = read("/proc/self/status").lines().find_map(|line| number(line.strip_prefix("VmRSS:")?));
    set("process_cpu_seconds_total", "", ticks / 100.0);
    set("process_resident_memory_bytes", "", memory.unwrap_or_default() * 1024.0);
    set("process_open_fds", "", fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as f64);
    let mut text = String::new();
    for line in include_str!("metrics.txt").lines() {
        text += &format!("{line}\n");
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else { continue };
        for ((_, labels), (sum, below)) in all.iter().filter(|((end, _), _)| name.ends_with(end)) {
            if kind != "histogram" {
                text += &format!("{name}{{{labels}}} {sum}\n");
                continue;
            }
            for (bound, count) in BOUNDS.iter().zip(below) {
                let bound = bound.to_string().replace("inf", "+Inf");
                text += &format!("{name}_bucket{{{labels},le=\"{bound}\"}} {count}\n");
            }
            text += &format!("{name}_count{{{labels}}} {}\n{name}_sum{{{labels}}} {sum}\n", below.last().unwrap_or(&0));
        }
    }
    response(200, "text/plain; version=0.0.4; charset=utf-8", text, &[])
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
