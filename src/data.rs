//! Questions to Sysdig's Data API. Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.

use crate::prelude::*;
use crate::{promql::label_name, sysdig::CLUSTER, sysdig::UNUSABLE};
use serde::Deserialize;

/// Every container has it: where it has a value, silence of another metric means idleness.
const COMPANION: &str = "container.count";
/// Labels beside those of resources that have another form in PromQL.
const LABELS: [&str; 5] = [CLUSTER, "container.name", "net.http.method", "net.http.statusCode", "net.http.url"];
/// There is no escape for a quote in the language of filters.
const UNFIT: &str = "cannot stand in a Sysdig filter: it holds a quote, a backslash or a control character";
const PAGE: usize = 1000;
const MOST_PAGES: usize = 20;

pub(crate) fn rows(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64) -> Result<Rows> {
    let Question { metric, tuning: Tuning { time, group, .. }, labels, .. } = question;
    let companion = (metric != COMPANION && *question.resource != Resource::NODES).then(|| column(COMPANION, "avg", "sum"));
    let metrics: Vec<_> = iter::once(column(metric, time, group)).chain(companion).collect();
    let within = [question.requirements(scope, sysdig.cluster()?), labels.clone()].concat();
    let mut rows = Rows::new();
    for (object, Line { t: end, d: cells }) in ask(sysdig, question, &within, end, &metrics)? {
        let (value, seen) = (cells.first().unwrap_or(&Value::Null), cells.get(1).is_some_and(|cell| !cell.is_null()));
        ensure!(value.is_null() || value.is_number(), BackendInvalidAnswer, "{UNUSABLE}: a metric's value is no number");
        let value = value.as_number().map(|number| Quantity::parse(&number.to_string()));
        let pods = (*question.resource == Resource::PODS).then_some(u64::from(seen || metric == COMPANION));
        let row = Row { end, value, pods, ..Row::default() };
        rows.entry(object).and_modify(|row| row.value = Some(Err(Reason::Ambiguous))).or_insert(row);
    }
    Ok(rows)
}

pub fn pods(sysdig: &Sysdig, question: &Question, scope: &Scope, end: u64) -> Result<BTreeMap<Object, u64>> {
    let metrics = [json!({ "id": Resource::PODS.label }), column(COMPANION, "avg", "avg")];
    let mut pods = BTreeMap::new();
    for (object, line) in ask(sysdig, question, &question.requirements(scope, sysdig.cluster()?), end, &metrics)? {
        *pods.entry(object).or_default() += u64::from(!line.d.contains(&Value::Null));
    }
    Ok(pods)
}

pub(crate) fn is_collected(sysdig: &Sysdig, question: &Question, end: u64) -> Result<bool> {
    let tuning = Tuning { window: 86_400, ..question.tuning };
    let wide = Question { tuning, resource: &Resource::CLUSTER, legacy: false, ..question.clone() };
    let rows = ask(sysdig, &wide, &[sysdig.cluster()?], end, &[column(&question.metric, "avg", "avg")])?;
    Ok(rows.iter().any(|(_, line)| !line.d.contains(&Value::Null)))
}

pub(crate) fn catalogue(sysdig: &Sysdig) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for page in 0..MOST_PAGES {
        let path = format!("/api/v2/metrics/descriptors?limit={PAGE}&offset={}", page * PAGE);
        let found: Value = sysdig.ask(&path, JSON, String::new())?;
        let missing = || refusal!(BackendInvalidAnswer, "{UNUSABLE}: metricDescriptors is missing");
        let list = found["metricDescriptors"].as_array().ok_or_else(missing)?;
        let metrics = list.iter().filter(|it| it["metricType"] != "none" && it["metricType"] != "segmentBy");
        ids.extend(metrics.filter_map(|it| it["id"].as_str()).filter(|id| !id.is_empty()).map(str::to_owned));
        if list.len() < PAGE {
            break;
        }
    }
    Ok(ids)
}

/// What is stricter than a [`Value`], which takes the last of two that have the same name.
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

/// All pages of an answer: of each line the object that its labels name, and the line with the metrics' columns only.
fn ask(sysdig: &Sysdig, question: &Question, within: &[Requirement], end: u64, metrics: &[Value]) -> Result<Vec<(Object, Line)>> {
    let (filter, by, start) = (filter(within)?, question.object_labels(), end.saturating_sub(question.tuning.window));
    let columns: Vec<Value> = by.iter().flatten().map(|label| json!({ "id": label })).chain(metrics.iter().cloned()).collect();
    let read = |Line { t, d }: Line| {
        let mut cells = Some(d).filter(|cells| cells.len() == columns.len())?.into_iter();
        let name = |label: Option<_>| label.map_or(Some(String::new()), |_| Some(cells.next()?.as_str()?.to_owned()));
        let [namespace, name] = by.map(name);
        Some(((namespace?, name?), Line { t, d: cells.collect() }))
    };
    let mut rows = Vec::new();
    for page in 0..MOST_PAGES {
        let body = json!({
            "start": start, "end": end, "sampling": end - start, "metrics": columns, "filter": filter,
            "paging": { "from": page * PAGE, "to": (page + 1) * PAGE - 1 },
            "dataSourceType": if *question.resource == Resource::NODES { "host" } else { "container" },
        });
        let Page { data } = sysdig.ask("/api/data", JSON, body.to_string())?;
        let found = data.into_iter().map(read).collect::<Option<Vec<_>>>();
        let other = || refusal!(BackendInvalidAnswer, "{UNUSABLE}: it does not have the rows and columns asked for");
        rows.extend(found.ok_or_else(other)?);
        if rows.len() < (page + 1) * PAGE {
            return Ok(rows);
        }
    }
    Err(refusal!(BackendInvalidAnswer, "{UNUSABLE}: it has more rows than the adapter reads (20,000)"))
}

fn column(metric: &str, time: &str, group: &str) -> Value {
    json!({ "id": metric, "aggregations": { "time": time, "group": if group.is_empty() { "avg" } else { group } } })
}

fn filter(requirements: &[Requirement]) -> Result<String> {
    let parts = requirements.iter().map(|Requirement { key, operator, values }| {
        let fits = |value: &String| !value.contains(|c: char| c.is_control() || "'\"\\".contains(c));
        ensure!(values.iter().all(fits), InvalidRequest, "{} {UNFIT}", quoted(&values.join(", ")));
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
            let within = [vec![requirement(CLUSTER, &["blue"])], requirements].concat();
            assert_eq!(filter(&within).unwrap(), expected);
        }
        for value in ["a'b", "a\"b", "a\\b", "a\nb"] {
            assert_eq!(filter(&[requirement("l", &[value])]).unwrap_err().reason, Reason::InvalidRequest);
            assert_eq!(filter(&[requirement(CLUSTER, &[value])]).unwrap_err().reason, Reason::InvalidRequest, "{value}");
        }
    }
}
