//! Questions to Sysdig's Data API. Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.

use crate::prelude::*;
use crate::{promql::label_name, sysdig::OTHER_OBJECT, sysdig::invalid_answer};
use serde::Deserialize;
use std::vec;

/// Every container has it: where it has a value, silence of another metric means idleness.
const COMPANION: &str = "container.count";
const CLUSTER: &str = "kubernetes.cluster.name";
/// Labels beside those of resources that have another form in PromQL.
const LABELS: [&str; 5] = [CLUSTER, "container.name", "net.http.method", "net.http.statusCode", "net.http.url"];
/// There is no escape for a quote in the language of filters.
const UNFIT: &str = "cannot stand in a Sysdig filter: it holds a quote, a backslash or a control character";
const PAGE: usize = 1000;
const MOST_PAGES: usize = 20;

#[derive(Deserialize)]
struct Page {
    data: Vec<Line>,
}

/// The end of the window, and what stands in each of the columns.
#[derive(Deserialize)]
struct Line {
    t: u64,
    d: Vec<Value>,
}

pub(crate) fn rows(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64) -> Result<Rows> {
    let Question { metric, tuning: Tuning { time, group, window }, .. } = question;
    let mut metrics = vec![column(metric, time, group)];
    if metric != COMPANION && !question.is_host() {
        metrics.push(column(COMPANION, "avg", "sum"));
    }
    let (span, within) = ([end.saturating_sub(*window), end], [scope.requirements(question), question.labels.clone()]);
    let mut rows = Rows::new();
    for (object, end, mut cells) in ask(sysdig, question, question.object_labels(), span, &within.concat(), metrics)? {
        let value = match cells.next().unwrap_or_default() {
            Value::Null => None,
            Value::Number(number) => Some(Quantity::parse(&number.to_string())),
            _ => return Err(invalid_answer("a metric's value is no number")),
        };
        let seen = cells.next().is_some_and(|cell| !cell.is_null());
        let pods = (*question.resource == Resource::PODS).then_some(u64::from(seen || metric == COMPANION));
        let row = Row { end, value, pods, differing: String::new() };
        rows.entry(object).and_modify(|row| row.value = Some(Err(Reason::Ambiguous))).or_insert(row);
    }
    Ok(rows)
}

/// How many pods of each object Sysdig saw in the window that ends at `end`.
pub fn pods(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64) -> Result<BTreeMap<Object, u64>> {
    let (by, span) = (question.object_labels(), [end.saturating_sub(question.tuning.window), end]);
    let metrics = vec![json!({ "id": Resource::PODS.label }), column(COMPANION, "avg", "avg")];
    let mut pods = BTreeMap::new();
    for (object, _, mut cells) in ask(sysdig, question, by, span, &scope.requirements(question), metrics)? {
        *pods.entry(object).or_default() += u64::from(cells.all(|cell| !cell.is_null()));
    }
    Ok(pods)
}

pub(crate) fn is_collected(sysdig: &Sysdig, question: &Question, end: u64) -> Result<bool> {
    let (day, metrics) = ([end.saturating_sub(86_400), end], vec![column(&question.metric, "avg", "avg")]);
    let mut rows = ask(sysdig, question, [None; 2], day, &[], metrics)?.into_iter();
    Ok(rows.any(|(_, _, mut cells)| cells.any(|cell| !cell.is_null())))
}

pub(crate) fn catalogue(sysdig: &Sysdig) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for page in 0..MOST_PAGES {
        let path = format!("/api/v2/metrics/descriptors?limit={PAGE}&offset={}", page * PAGE);
        let found: Value = sysdig.ask(&path, None)?;
        let list = found.pointer("/metricDescriptors").and_then(Value::as_array);
        let list = list.ok_or_else(|| invalid_answer("metricDescriptors is missing"))?;
        let metrics = list.iter().filter(|it| it["metricType"] != "none" && it["metricType"] != "segmentBy");
        ids.extend(metrics.filter_map(|it| it["id"].as_str()).filter(|id| !id.is_empty()).map(str::to_owned));
        if list.len() < PAGE {
            break;
        }
    }
    Ok(ids)
}

/// All pages of an answer. A row has the object that its labels `by` name, the end of its window, and the metrics' cells.
fn ask(
    sysdig: &Sysdig, question: &Question, by: [Option<&str>; 2], [start, end]: [u64; 2], within: &[Requirement],
    metrics: Vec<Value>,
) -> Result<Vec<(Object, u64, vec::IntoIter<Value>)>> {
    let filter = filter(sysdig.cluster()?, within)?;
    let columns: Vec<Value> = by.iter().flatten().map(|label| json!({ "id": label })).chain(metrics).collect();
    let mut rows = Vec::new();
    for page in 0..MOST_PAGES {
        let body = json!({
            "start": start, "end": end, "sampling": end.saturating_sub(start), "metrics": columns, "filter": filter,
            "paging": { "from": page * PAGE, "to": (page + 1) * PAGE - 1 },
            "dataSourceType": if question.is_host() { "host" } else { "container" },
        });
        let Page { data } = sysdig.ask("/api/data", Some((JSON, body.to_string())))?;
        let last = data.len() < PAGE;
        for Line { t, d } in data {
            let whole = d.len() == columns.len();
            whole.then_some(()).ok_or_else(|| invalid_answer("a row has another number of columns than asked for"))?;
            let mut cells = d.into_iter();
            let [namespace, name] = by.map(|label| match label.and_then(|_| cells.next()) {
                Some(Value::String(text)) => Ok(text),
                Some(_) => Err(invalid_answer(OTHER_OBJECT)),
                None => Ok(String::new()),
            });
            rows.push(((namespace?, name?), t, cells));
        }
        if last {
            return Ok(rows);
        }
    }
    Err(invalid_answer("it has more rows than the adapter reads (20,000)"))
}

fn column(metric: &str, time: &str, group: &str) -> Value {
    json!({ "id": metric, "aggregations": { "time": time, "group": if group.is_empty() { "avg" } else { group } } })
}

/// Cluster and requirements, joined by `and`.
fn filter(cluster: &str, requirements: &[Requirement]) -> Result<String> {
    let cluster = Requirement::is(CLUSTER, [cluster.to_owned()]);
    let parts = iter::once(&cluster).chain(requirements).map(|Requirement { key, operator, values }| {
        let text = values.join(", ");
        let fits = !text.contains(|c: char| c.is_control() || "'\"\\".contains(c));
        ensure!(fits, InvalidRequest, "{} {UNFIT}", quoted(&text));
        let mut known = Resource::all().map(|it| it.label).chain(LABELS);
        let id = known.find(|label| label_name(label) == *key).unwrap_or(key);
        let list = values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ");
        Ok(match operator {
            Operator::In if values.len() == 1 => format!("{id} = {list}"),
            Operator::In => format!("{id} in ({list})"),
            Operator::NotIn => format!("not {id} in ({list})"),
            Operator::Exists => format!("{id} != null"),
            Operator::DoesNotExist => format!("{id} = null"),
        })
    });
    Ok(parts.collect::<Result<Vec<_>>>()?.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirement(key: &str, values: &[&str]) -> Requirement {
        Requirement::is(key, values.iter().map(|value| (*value).to_owned()))
    }

    #[test]
    fn a_filter_names_cluster_and_object_in_the_old_form() {
        let table = [
            (vec![], "kubernetes.cluster.name = 'blue'"),
            (
                vec![requirement("kubernetes.namespace.name", &["shop"]), requirement("kubernetes.pod.name", &["a", "b"])],
                "kubernetes.cluster.name = 'blue' and kubernetes.namespace.name = 'shop' and \
                 kubernetes.pod.name in ('a', 'b')",
            ),
            (
                vec![requirement("kube_statefulset_name", &["db"]), requirement("net.http.method", &["GET"])],
                "kubernetes.cluster.name = 'blue' and kubernetes.statefulSet.name = 'db' and net.http.method = 'GET'",
            ),
        ];
        for (requirements, expected) in table {
            assert_eq!(filter("blue", &requirements).unwrap(), expected);
        }
        for value in ["a'b", "a\"b", "a\\b", "a\nb"] {
            assert_eq!(filter("blue", &[requirement("l", &[value])]).unwrap_err().reason, Reason::InvalidRequest);
            assert_eq!(filter(value, &[]).unwrap_err().reason, Reason::InvalidRequest, "{value}");
        }
    }
}
