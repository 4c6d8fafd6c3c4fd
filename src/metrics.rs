//! The adapter's own metrics, in the text format of Prometheus.
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use crate::prelude::*;
use std::fs;

/// Seconds, for answers from memory as for ages.
const BOUNDS: [f64; 12] = [0.0001, 0.001, 0.01, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 90.0, 120.0, f64::INFINITY];

/// The sum of what was observed, and how much of it is up to each bound.
type Series = (f64, [u64; BOUNDS.len()]);

/// By the end of the name and by labels, whose values are of closed sets: nothing that callers send makes it grow.
static SERIES: Mutex<BTreeMap<(&str, String), Series>> = Mutex::new(BTreeMap::new());

pub(crate) fn set(name: &'static str, labels: &str, value: f64) {
    lock(&SERIES).entry((name, labels.to_owned())).or_default().0 = value;
}

pub(crate) fn observe(name: &'static str, labels: &str, value: f64) {
    let mut all = lock(&SERIES);
    let (sum, below) = all.entry((name, labels.to_owned())).or_default();
    *sum += value;
    below.iter_mut().zip(BOUNDS).for_each(|(count, bound)| *count += u64::from(value <= bound));
}

/// Takes down what became of a request, and what its answer waited for.
pub(crate) fn request(route: &str, status: u16, reason: &str, waited_for: Wait, since: Instant) {
    let waited_for = format!("{waited_for:?}").to_ascii_lowercase();
    let labels = format!(r#"route="{route}",code="{status}",reason="{reason}",waited_for="{waited_for}""#);
    observe("request_duration_seconds", &labels, since.elapsed().as_secs_f64());
}

/// Does `work`, and takes down how long that took and what came of it.
pub(crate) fn timed<T>(name: &'static str, labels: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (since, result) = (Instant::now(), work());
    let outcome = result.as_ref().err().map_or("ok", |error| error.reason.word());
    observe(name, &format!(r#"{labels}outcome="{outcome}""#), since.elapsed().as_secs_f64());
    result
}

pub(crate) fn response(connections: &Connections) -> Response {
    for (verified, busy) in [(false, false), (false, true), (true, false), (true, true)] {
        set("connections", &format!(r#"verified="{verified}",busy="{busy}""#), connections.count(verified, busy) as f64);
    }
    set("build_info", concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), 1.0);
    // proc(5); a tick is 10 ms wherever Kubernetes runs.
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let number = |text: &str| text.split_whitespace().next()?.parse::<f64>().ok();
    let ticks: f64 = read("/proc/self/stat").split(' ').skip(13).take(2).filter_map(number).sum();
    let memory = read("/proc/self/status").lines().find_map(|line| number(line.strip_prefix("VmRSS:")?));
    set("process_cpu_seconds_total", "", ticks / 100.0);
    set("process_resident_memory_bytes", "", memory.unwrap_or_default() * 1024.0);
    set("process_open_fds", "", fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as f64);
    let (mut text, all) = (String::new(), lock(&SERIES).clone());
    for line in include_str!("metrics.txt").lines() {
        text += &format!("{line}\n");
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else { continue };
        for ((_, labels), (sum, below)) in all.iter().filter(|((end, _), _)| name.ends_with(end)) {
            for (bound, count) in BOUNDS.iter().zip(below).filter(|_| kind == "histogram") {
                let bound = bound.to_string().replace("inf", "+Inf");
                text += &format!("{name}_bucket{{{labels},le=\"{bound}\"}} {count}\n");
            }
            let total = match (kind, below) {
                ("histogram", [.., count]) => &format!("{name}_count{{{labels}}} {count}\n{name}_sum"),
                _ => name,
            };
            text += &format!("{total}{{{labels}}} {sum}\n");
        }
    }
    Response::bytes(200, "text/plain; version=0.0.4; charset=utf-8", text.into_bytes())
}
