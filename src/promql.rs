//! Questions in PromQL: one request asks for the value of each object, its newest sample's time, the pods that Sysdig sees,
//! and how late samples arrive. Source: <https://docs.sysdig.com/en/sysdig-monitor/prometheuspublicapiservicelimits>.

use crate::prelude::*;
use crate::sysdig::{STEP, UNUSABLE};

/// Sysdig's own metrics: the old id, the name in PromQL, and what a sample is. `delta`: the change since the sample
/// before, as the agent tells it; `gauge`: a state. What applications tell is a `counter`: a total since some start.
/// Source: <https://docs.sysdig.com/en/docs/sysdig-monitor/using-monitor/metrics/metrics-library/>.
pub(crate) const OWN: &str = include_str!("legacy-metrics.txt");
/// Every container has it, whatever its traffic.
const COMPANION: &str = "sysdig_container_up";
/// No group aggregation of Sysdig's: the average over containers, of which each must have one series.
pub(crate) const EACH: &str = "each";
/// The labels of a series that tell its container, and one of before a restart from one of after it.
const CONTAINER: [&str; 7] =
    ["kube_namespace_name", "kube_pod_name", "kube_pod_uid", "container_name", "container", "container_id", "instance"];
/// The label that tells the parts of an answer apart.
const PART: &str = "sysdig_metrics_adapter";
/// A longer query travels in a body, which is of this type.
const LONGEST_GET: usize = 2000;
const FORM: &str = "application/x-www-form-urlencoded";
/// Samples that arrive later than this are not waited for.
const MOST_LAG: u64 = 60;

/// Sysdig's label in PromQL: `kube_pod_name` for `kubernetes.pod.name`.
pub(crate) fn label_name(label: &str) -> String {
    let plain = label.replace(['.', '-', '/'], "_");
    plain.strip_prefix("kubernetes_").map(|rest| format!("kube_{}", rest.to_ascii_lowercase())).unwrap_or(plain)
}

/// The window ends where samples have arrived: one cut short would make a sum too small, and scale down.
pub(crate) fn rows(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64) -> Result<Rows> {
    let lag = sysdig.lag.load(Relaxed);
    let (found, seen) = rows_at(sysdig, question, scope, end, lag)?;
    sysdig.lag.store(seen, Relaxed);
    if seen > lag { Ok(rows_at(sysdig, question, scope, end, seen)?.0) } else { Ok(found) }
}

/// The rows of a window that ends `lag` before `end`, and the lag that the answer shows.
fn rows_at(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64, lag: u64) -> Result<(Rows, u64)> {
    let answer = ask(sysdig, &query(question, &question.requirements(scope, sysdig.cluster()?), lag)?, end)?;
    let (_, kind) = series(question)?;
    let (mut rows, mut seen, mut known) = (Rows::new(), lag, BTreeMap::new());
    for series in items(&answer, "/data/result") {
        let (labels, value) = (&series["metric"], series["value"][1].as_str().unwrap_or_default());
        let text = |label: &str| labels[label].as_str().unwrap_or_default();
        let time = value.parse::<f64>().map_or(0, |seconds| seconds as u64);
        if text(PART) == "lag" {
            seen = (end.saturating_sub(time) / STEP * STEP).min(MOST_LAG);
            continue;
        }
        let name = |label: Option<&str>| label.map_or("", |label| text(&label_name(label))).to_owned();
        let object = Object::from(question.object_labels().map(name));
        // What was silent for five minutes has no time, however long the window is.
        let empty = Row { end: end.saturating_sub(lag + question.tuning.window), pods: Some(0), ..Row::default() };
        let row = rows.entry(object.clone()).or_insert(empty);
        match text(PART) {
            "value" if row.value.is_none() => row.value = Some(Quantity::parse(value)),
            "several" => {
                let each = question.tuning.group == EACH;
                let whose = CONTAINER.map(|label| labels[label].as_str().filter(|_| each));
                if let Some(other) = known.insert((object, whose), labels) {
                    row.differing = differing(other, labels);
                }
            }
            "pods" => row.pods = value.parse().ok(),
            "time" => row.end = time.min(end - lag),
            _ => return Err(refusal!(BackendInvalidAnswer, "{UNUSABLE}: it has a series that was not asked for")),
        }
    }
    // Silence of what counts changes is idleness, if the pods are seen; of anything else it is just silence.
    rows.retain(|_, row| kind == "delta" || row.value.is_some());
    rows.values_mut().filter(|row| row.value.is_none()).for_each(|row| row.end = end - lag);
    rows.values_mut().filter(|row| !row.differing.is_empty()).for_each(|row| row.value = Some(Err(Reason::Ambiguous)));
    Ok((rows, seen))
}

/// The labels by which two series differ, with both values.
fn differing(one: &Value, other: &Value) -> String {
    let keys = [one, other].into_iter().filter_map(Value::as_object).flat_map(|labels| labels.keys());
    let keys: BTreeSet<_> = keys.filter(|key| one[*key] != other[*key]).collect();
    let both = |key: &String| BTreeSet::from([one, other].map(|labels| labels[key].to_string()));
    let shown = |key: &String| format!("{key} ({})", Vec::from_iter(both(key)).join(", "));
    keys.into_iter().map(shown).collect::<Vec<_>>().join(", ")
}

pub(crate) fn is_collected(sysdig: &Sysdig, question: &Question, end: u64) -> Result<bool> {
    let ((name, _), cluster) = (series(question)?, matchers(&[sysdig.cluster()?]));
    let answer = ask(sysdig, &format!("count(last_over_time({name}{{{cluster}}}[1d]))"), end)?;
    Ok(items(&answer, "/data/result").next().is_some())
}

pub(crate) fn names(sysdig: &Sysdig) -> Result<Vec<String>> {
    let answer = sysdig.ask("/prometheus/api/v1/label/__name__/values", JSON, String::new())?;
    Ok(items(&answer, "/data").filter_map(Value::as_str).map(str::to_owned).collect())
}

fn ask(sysdig: &Sysdig, query: &str, time: u64) -> Result<Value> {
    let (path, form) = ("/prometheus/api/v1/query", format!("query={}&time={time}", percent_encode(query)));
    let long = form.len() > LONGEST_GET;
    let answer: Value =
        if long { sysdig.ask(path, FORM, form) } else { sysdig.ask(&format!("{path}?{form}"), JSON, String::new()) }?;
    ensure!(answer["data"]["resultType"] == "vector", BackendInvalidAnswer, "{UNUSABLE}: it is no vector");
    // What begins otherwise is a remark on the query; all else means that series are missing.
    let cut = items(&answer, "/warnings").filter_map(Value::as_str).find(|it| !it.starts_with("PromQL ")).map(quoted);
    cut.map_or(Ok(answer), |cut| Err(refusal!(BackendInvalidAnswer, "{UNUSABLE}: it is not whole: {cut}")))
}

/// Name of the series of a metric, and what a sample of it is.
pub(crate) fn series(question: &Question) -> Result<(String, &'static str)> {
    let metric = question.metric.as_str();
    if let Some((before, _)) = metric.split_once('{') {
        let name = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').next();
        return Ok((name.unwrap_or_default().to_owned(), "template"));
    }
    let own = OWN.lines().filter_map(|line| line.split_once(' ').and_then(|(id, it)| Some((id, it.split_once(' ')?))));
    let container = metric.replacen("sysdig_host_", "sysdig_container_", 1).replacen("sysdig_program_", "sysdig_container_", 1);
    if let Some((id, (name, kind))) = own.clone().find(|(id, (name, _))| *id == metric || *name == container) {
        let flavour = if *question.resource == Resource::NODES { "sysdig_host_" } else { "sysdig_container_" };
        let name = if id == metric { name.replacen("sysdig_container_", flavour, 1) } else { metric.to_owned() };
        return Ok((name, kind));
    }
    let family = metric.split('.').next().unwrap_or_default();
    let near = || own.map(|(id, _)| id).filter(|id| id.starts_with(family)).collect::<Vec<_>>().join(", ");
    let mend = "ask for it as Sysdig Monitor's PromQL explorer names it (ids of its family that have one: ";
    let safe = !metric.contains(['.', '-']);
    ensure!(safe, InvalidRequest, "{metric} has no name in PromQL that is safe to assume: {mend}{})", near());
    let total = ["_total", "_count", "_sum", "_bucket"].iter().any(|end| metric.ends_with(end));
    Ok((metric.to_owned(), if total && !metric.starts_with("sysdig_") { "counter" } else { "gauge" }))
}

/// The query about the objects `within` these requirements.
pub(crate) fn query(question: &Question, within: &[Requirement], lag: u64) -> Result<String> {
    let Tuning { time, group, window } = question.tuning;
    let (name, kind) = series(question)?;
    let matching = matchers(&[within, &question.labels].concat());
    // The sample on the older edge is one of the window before.
    let range = format!("[{}ms]{}", window * 1000 - 1, if lag > 0 { format!(" offset {lag}s") } else { String::new() });
    let samples = format!("{name}{{{matching}}}{range}");
    let by = question.object_labels().into_iter().flatten().map(label_name).collect::<Vec<_>>().join(", ");
    let value = match (kind, time) {
        // What is put in last is not looked at again.
        ("template", _) => question.metric.replace("$by", &by).replace("[$window]", &range).replace("$matchers", &matching),
        ("counter", "avg" | "timeAvg") => format!("rate({samples})"),
        ("counter", "sum") => format!("increase({samples})"),
        ("counter", _) => return Err(refusal!(InvalidRequest, "{name} counts up: its {time} over time means nothing")),
        ("delta", "avg" | "timeAvg") => format!("sum_over_time({samples}) / {window}"),
        (_, "timeAvg") => format!("avg_over_time({samples})"),
        _ => format!("{time}_over_time({samples})"),
    };
    let (single, containers) = (["", EACH].contains(&group), *question.resource != Resource::NODES);
    let whose = [if group == EACH { CONTAINER.as_slice() } else { &[] }, &[by.as_str()]].concat().join(", ");
    let (pod, seen) = (label_name(Resource::PODS.label), format!("{COMPANION}{{{}}}", matchers(within)));
    let part = |part, asked: bool, query| asked.then(|| format!("label_replace({query}, \"{PART}\", \"{part}\", \"\", \"\")"));
    let parts = [
        part("value", true, format!("{} by ({by}) ({value})", if single { "avg" } else { group })),
        part("several", single, format!("topk by ({whose}) (2, ({value}) and on ({whose}) (count by ({whose}) ({value}) > 1))")),
        part("time", true, format!("max by ({by}) (timestamp({name}{{{matching}}}))")),
        part("pods", containers, format!("count by ({by}) (count by ({pod}, {by}) (last_over_time({seen}{range})))")),
        part("lag", containers, format!("max(timestamp({seen}))")),
    ];
    Ok(parts.into_iter().flatten().collect::<Vec<_>>().join(" or "))
}

fn matchers(requirements: &[Requirement]) -> String {
    let matchers = requirements.iter().map(|Requirement { key, operator, values }| {
        let pattern = values.iter().map(|value| pattern(value)).collect::<Vec<_>>().join("|");
        // A label that is not there is empty, so what must not be there has no values to match but the empty one.
        let sign = if matches!(operator, Operator::In | Operator::DoesNotExist) { "=~" } else { "!~" };
        // A string of JSON is one of PromQL: <https://prometheus.io/docs/prometheus/latest/querying/basics/#string-literals>.
        format!("{}{sign}{}", label_name(key), json!(pattern))
    });
    matchers.collect::<Vec<_>>().join(",")
}

/// A regular expression for exactly `text`.
fn pattern(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '-' || !c.is_ascii();
    text.chars().flat_map(|c| (!plain(c)).then_some('\\').into_iter().chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysdig::CLUSTER;

    fn question(metric: &str, time: &'static str) -> Question {
        Question {
            metric: metric.to_owned(),
            tuning: Tuning { time, group: "sum", window: 60 },
            resource: &Resource::PODS,
            legacy: false,
            labels: Vec::new(),
        }
    }

    fn cluster(name: &str) -> Requirement {
        Requirement::is(CLUSTER, [name.to_owned()])
    }

    fn asked(question: &Question) -> Result<String> {
        let scope = [("shop".to_owned(), "a".to_owned())].into_iter().unzip();
        query(question, &question.requirements(&scope, cluster("blue")), 0)
    }

    #[test]
    fn labels_have_sysdigs_names_of_both_kinds() {
        let table = [
            ("kubernetes.cluster.name", "kube_cluster_name"),
            ("kubernetes.daemonSet.name", "kube_daemonset_name"),
            ("kubernetes.pod.label.app-name", "kube_pod_label_app_name"),
            ("kube_pod_name", "kube_pod_name"),
            ("container.name", "container_name"),
            ("example.com/tier", "example_com_tier"),
        ];
        for (label, expected) in table {
            assert_eq!(label_name(label), expected);
        }
    }

    #[test]
    fn a_pattern_escapes_what_has_a_meaning_and_nothing_else_as_re2_refuses_that() {
        for (text, expected) in [("a-1_b", "a-1_b"), ("a.b|c", r"a\.b\|c"), ("prod–eu", "prod–eu"), ("é€", "é€")] {
            assert_eq!(pattern(text), expected);
        }
    }

    #[test]
    fn the_function_over_time_follows_what_a_sample_is() {
        let table = [
            ("net.http.request.count", "avg", "sum_over_time(sysdig_container_net_http_request_count{X}[59999ms]) / 60"),
            ("net.http.request.count", "timeAvg", "sum_over_time(sysdig_container_net_http_request_count{X}[59999ms]) / 60"),
            ("net.http.request.count", "max", "max_over_time(sysdig_container_net_http_request_count{X}[59999ms])"),
            ("sysdig_host_net_total_bytes", "avg", "sum_over_time(sysdig_host_net_total_bytes{X}[59999ms]) / 60"),
            ("cpu.used.percent", "avg", "avg_over_time(sysdig_container_cpu_used_percent{X}[59999ms])"),
            ("cpu.used.percent", "timeAvg", "avg_over_time(sysdig_container_cpu_used_percent{X}[59999ms])"),
            ("queue_depth", "min", "min_over_time(queue_depth{X}[59999ms])"),
            ("orders_total", "avg", "rate(orders_total{X}[59999ms])"),
            ("orders_total", "sum", "increase(orders_total{X}[59999ms])"),
        ];
        for (metric, time, expected) in table {
            let query = asked(&question(metric, time)).unwrap();
            let series = r#"kube_cluster_name=~"blue",kube_namespace_name=~"shop",kube_pod_name=~"a""#;
            let expected = expected.replace('X', series);
            assert!(
                query.starts_with(&format!("label_replace(sum by (kube_namespace_name, kube_pod_name) ({expected})")),
                "{metric}: {query}"
            );
        }
        for (metric, time) in [("orders_total", "max"), ("jvm.heap.used", "avg"), ("net.http.nope", "avg"), ("a-b", "avg")] {
            assert!(asked(&question(metric, time)).is_err(), "{metric}");
        }
        let refusal = asked(&question("net.http.nope", "avg")).unwrap_err().message;
        assert!(refusal.contains("net.http.request.count, net.http.request.time"), "{refusal}");
    }

    #[test]
    fn a_node_is_asked_for_as_a_host_and_has_no_pods() {
        let node = Question { resource: &Resource::NODES, ..question("cpu.used.percent", "avg") };
        let query = asked(&node).unwrap();
        assert!(query.contains("sum by (kube_node_name) (avg_over_time(sysdig_host_cpu_used_percent{"), "{query}");
        assert!(!query.contains(COMPANION), "{query}");
    }

    #[test]
    fn a_question_about_the_whole_cluster_has_no_list_that_begins_with_a_comma() {
        for group in [EACH, "", "sum"] {
            let tuning = Tuning { group, ..Tuning::DEFAULT };
            let cluster = Question { resource: &Resource::CLUSTER, tuning, ..question("queue_depth", "avg") };
            let query = asked(&cluster).unwrap();
            assert!(!query.contains("(,") && query.contains("by ()"), "{query}");
        }
    }

    #[test]
    fn nothing_in_a_value_can_end_its_string_or_mean_more_than_itself() {
        let hostile = ["a\"} or up{x=\"", "a\\", "a\nb", "a|b", ".*", "a.b", "(", "[a]", "a{2}", "^$", "\"", "\\\"", "é"];
        for value in hostile {
            let text = matchers(&[cluster(value)]);
            let quoted = text.strip_prefix("kube_cluster_name=~").expect("one matcher");
            let pattern: String = serde_json::from_str(quoted).expect("one string");
            let mut plain = String::new();
            let mut rest = pattern.chars();
            while let Some(c) = rest.next() {
                assert!(c.is_alphanumeric() || "_-\\".contains(c), "{c} of {value:?} is not escaped in {pattern:?}");
                plain.push(if c == '\\' { rest.next().expect("an escape is of something") } else { c });
            }
            assert_eq!(plain, value);
        }
    }

    #[test]
    fn every_line_of_the_table_of_metrics_is_whole() {
        for line in OWN.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [id, name, kind] = words[..] else { panic!("{line}") };
            assert!(id.bytes().all(|b| b.is_ascii_lowercase() || b == b'.'), "{line}");
            assert!(name.starts_with("sysdig_container_") && ["delta", "gauge"].contains(&kind), "{line}");
            assert_eq!(OWN.lines().filter(|other| other.split(' ').next() == Some(id)).count(), 1, "{line}");
        }
    }
}
